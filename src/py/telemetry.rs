//! `_Latest` and `_Sysfs`: what `jetrt.thermal` is made of.

use crate::error::{Error, Kind};
use crate::telemetry::{Latest, Sample, Sampler};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyLatest>()?;
    m.add_class::<Sysfs>()
}

/// The newest object that was published, for readers that must not wait.
#[pyclass(module = "jetrt._core", name = "_Latest", frozen)]
struct PyLatest(Latest<Py<PyAny>>);

#[pymethods]
impl PyLatest {
    #[new]
    fn new(max_age_s: f64) -> PyResult<PyLatest> {
        let max_age =
            Duration::try_from_secs_f64(max_age_s).map_err(|e| Error::new(Kind::Argument, format!("max_age_s is {max_age_s}: {e}.")))?;
        Ok(PyLatest(Latest::new(max_age)))
    }

    fn publish(&self, value: Py<PyAny>) {
        self.0.publish(value);
    }

    fn clear(&self) {
        self.0.clear();
    }

    /// None when nothing was published for `max_age_s` seconds.
    fn get(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.0.read(|value| value.clone_ref(py))
    }
}

/// Looks at the kernel's files below a root folder.
#[pyclass(module = "jetrt._core", name = "_Sysfs", frozen)]
struct Sysfs(Mutex<Sampler>);

#[pymethods]
impl Sysfs {
    #[new]
    fn new(root: PathBuf) -> Sysfs {
        Sysfs(Mutex::new(Sampler::new(root)))
    }

    /// What is known now, by name; None is unknown. Without the GIL, for as long as the kernel takes.
    fn sample<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        // A panic leaves a baseline of counters behind, which any next look replaces.
        let sample = py.detach(|| self.0.lock().unwrap_or_else(|e| e.into_inner()).sample());
        dict(py, &sample)
    }
}

fn dict<'py>(py: Python<'py>, sample: &Sample) -> PyResult<Bound<'py, PyDict>> {
    let d = PyDict::new(py);
    d.set_item("cpu_temp_c", sample.cpu_temp_c)?;
    d.set_item("gpu_temp_c", sample.gpu_temp_c)?;
    d.set_item("throttle_active", sample.throttle_active)?;
    d.set_item("power_throttle_active", sample.power_throttle_active)?;
    d.set_item("gpu_clock_mhz", sample.gpu_clock_mhz)?;
    d.set_item("gpu_clock_max_mhz", sample.gpu_clock_max_mhz)?;
    d.set_item("memory_clock_mhz", sample.memory_clock_mhz)?;
    d.set_item("gpu_load", sample.gpu_load)?;
    d.set_item("power_w", sample.power_w)?;
    d.set_item("rails_w", &sample.rails_w)?;
    d.set_item("over_current_events", &sample.over_current_events)?;
    d.set_item("source", &sample.source)?;
    d.set_item("reasons", PyTuple::new(py, &sample.reasons)?)?;
    d.set_item("unreadable", PyTuple::new(py, &sample.unreadable)?)?;
    d.set_item("integrated_gpu", sample.integrated_gpu)?;
    Ok(d)
}
