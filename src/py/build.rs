//! `_Network`: one build, step by step. Used inside the process that builds (`jetrt.builder.child`), never in the user's.

use super::convert::{one_of, ordinal, pip_folders, shape};
use super::import::import;
use super::logging::drain;
use crate::cuda::memory::{copy_to_device, DeviceBuffer};
use crate::cuda::{Device, Stream};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::exec::copy_packed;
use crate::shape::{Dims, Range};
use crate::tensor::Place;
use crate::trt::build::{Algorithm, Builder, NetworkTensor, NextBatch, Problem, Profile, Progress};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Network>()?;
    m.add_class::<BuildProgress>()
}

/// What TensorRT reports during a build, for the thread that watches it.
#[pyclass(module = "jetrt._core", name = "_BuildProgress", frozen)]
struct BuildProgress(Arc<Progress>);

#[pymethods]
impl BuildProgress {
    /// Tuples (kind, phase, parent phase, number) since this was called last; kind is "start" (number: steps), "step" or "finish". Hands
    /// TensorRT's log lines to Python's logging as well.
    fn events(&self, py: Python<'_>) -> Vec<(&'static str, String, String, i32)> {
        drain(py);
        self.0.take().into_iter().map(|e| (e.kind, e.phase, e.parent, e.number)).collect()
    }

    /// Asks TensorRT to stop at its next step.
    fn cancel(&self) {
        self.0.cancel();
    }
}

/// A network parsed from an ONNX file and the configuration that it is to be built with.
#[pyclass(module = "jetrt._core", name = "_Network", frozen)]
struct Network {
    builder: Mutex<Builder>,
    progress: Arc<Progress>,
    tensorrt: String,
}

type Shapes = HashMap<String, (Vec<i64>, Vec<i64>, Vec<i64>)>;

pub fn problems<'py>(py: Python<'py>, found: &[Problem]) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for p in found {
        let d = PyDict::new(py);
        d.set_item("node", p.node)?;
        d.set_item("name", &p.name)?;
        d.set_item("operator", &p.operator)?;
        d.set_item("code", &p.code)?;
        d.set_item("reason", &p.reason)?;
        d.set_item("stack", &p.stack)?;
        list.append(d)?;
    }
    Ok(list)
}

fn dims_of(name: &str, shape: &[i64]) -> Result<Dims> {
    Dims::new(shape).filter(Dims::is_static).ok_or_else(|| {
        Error::new(
            Kind::BuildOption,
            format!("profile of '{name}': found {shape:?}; allowed: at most 8 dimensions, none negative."),
        )
    })
}

/// (min, opt, max) by input name, sorted by name so that equal calls make equal builds.
fn profile(shapes: Shapes, values: Shapes) -> Result<Profile> {
    let mut out = Profile::default();
    for (name, (min, opt, max)) in shapes {
        let (min, opt, max) = (dims_of(&name, &min)?, dims_of(&name, &opt)?, dims_of(&name, &max)?);
        out.shapes.push((name, Range { min, opt, max }));
    }
    out.values = values.into_iter().map(|(name, (min, opt, max))| (name, [min, opt, max])).collect();
    out.shapes.sort_by(|a, b| a.0.cmp(&b.0));
    out.values.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(out)
}

fn dtype(name: &str) -> Result<DType> {
    DType::from_name(name)
        .filter(|d| d.code() < 100)
        .ok_or_else(|| Error::new(Kind::BuildOption, format!("{name}: TensorRT has no data type of that name")))
}

fn tensors<'py>(py: Python<'py>, all: &[NetworkTensor]) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for t in all {
        let d = PyDict::new(py);
        d.set_item("name", &t.name)?;
        d.set_item("dtype", &t.dtype)?;
        d.set_item("shape", shape(py, &t.shape)?)?;
        d.set_item("shape_tensor", t.shape_tensor)?;
        let names: Vec<Option<&str>> = t
            .dimension_names
            .iter()
            .map(|n| Some(n.as_str()).filter(|n| !n.is_empty()))
            .collect();
        d.set_item("dimension_names", names)?;
        list.append(d)?;
    }
    Ok(list)
}

/// Calls Python for a batch and brings it to the GPU; the addresses stay valid until the next batch.
fn next_batch(callback: Py<PyAny>, device: &'static Device, stream: Stream) -> NextBatch {
    let mut buffers: HashMap<String, DeviceBuffer> = HashMap::new();
    Box::new(move |names| {
        Python::try_attach(|py| {
            let failed = |e: PyErr| {
                let cause = super::errors::brief(py, &e);
                e.write_unraisable(py, None);
                Error::new(Kind::Build, format!("the calibration data could not be read: {cause}"))
            };
            let batch = callback.bind(py).call1((names.to_vec(),)).map_err(failed)?;
            if batch.is_none() {
                return Ok(None);
            }
            let mut addresses = Vec::new();
            for name in names {
                let array = batch.get_item(name).map_err(failed)?;
                let found = import(&array, name, None, device.ordinal).map_err(failed)?;
                let bytes = found
                    .view
                    .bytes()
                    .filter(|_| found.view.place == Place::Host)
                    .ok_or_else(|| Error::new(Kind::Build, format!("calibration data of '{name}': allowed: numpy arrays")))?;
                if buffers.get(name).is_none_or(|b| b.bytes() < bytes) {
                    buffers.insert(
                        name.clone(),
                        DeviceBuffer::new(device, bytes, &format!("calibration batch of '{name}'"))?,
                    );
                }
                let Some(buffer) = buffers.get(name) else { continue };
                let mut packed = vec![0u8; bytes as usize];
                copy_packed(packed.as_mut_ptr() as u64, &found.view);
                copy_to_device(buffer.ptr(), packed.as_ptr() as u64, bytes, &stream)?;
                // TensorRT reads on a stream of its own as soon as this returns.
                stream.synchronize()?;
                addresses.push(buffer.ptr());
            }
            Ok(Some(addresses))
        })
        .unwrap_or(Ok(None))
    })
}

impl Network {
    fn lock(&self) -> MutexGuard<'_, Builder> {
        self.builder.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Native work without the GIL; TensorRT's lines go to Python's logging afterwards.
    fn detached<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut Builder) -> Result<T> + Send) -> PyResult<T> {
        let out = py.detach(|| work(&mut self.lock()));
        drain(py);
        Ok(out?)
    }
}

#[pymethods]
impl Network {
    #[new]
    #[pyo3(signature = (*, strongly_typed = false, plugins = Vec::new(), device = None))]
    fn new(py: Python<'_>, strongly_typed: bool, plugins: Vec<PathBuf>, device: Option<&Bound<'_, PyAny>>) -> PyResult<Network> {
        let device = device.map(ordinal).transpose()?.unwrap_or(0);
        let folders = pip_folders(py);
        let made = py.detach(|| -> Result<Builder> {
            let gpu = Device::get(device)?;
            let lib = crate::trt::library(&folders, None)?;
            lib.load_plugins(&plugins)?;
            Builder::new(lib, gpu, strongly_typed)
        });
        drain(py);
        let builder = made?;
        Ok(Network {
            progress: Arc::clone(&builder.progress),
            tensorrt: builder.lib.version.to_string(),
            builder: Mutex::new(builder),
        })
    }

    /// The library's version, such as "10.6.0.26".
    #[getter]
    fn tensorrt(&self) -> &str {
        &self.tensorrt
    }

    #[getter]
    fn progress(&self) -> BuildProgress {
        BuildProgress(Arc::clone(&self.progress))
    }

    /// Parses an ONNX file with its external data. Returns the parser's complaints, dicts with node, name, operator, code, reason and
    /// stack; an empty list when it was understood.
    #[pyo3(signature = (path, flags = Vec::new()))]
    fn parse<'py>(&self, py: Python<'py>, path: PathBuf, flags: Vec<String>) -> PyResult<Bound<'py, PyList>> {
        let found = self.detached(py, |b| b.parse(&path, &flags))?;
        problems(py, &found)
    }

    /// Dicts with name, dtype, shape (-1: dynamic), shape_tensor, dimension_names.
    #[getter]
    fn inputs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        tensors(py, &self.lock().inputs()?)
    }

    #[getter]
    fn outputs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        tensors(py, &self.lock().outputs()?)
    }

    /// Dicts with index, name, type, inputs, outputs, output_dtypes.
    #[getter]
    fn layers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for (index, l) in self.lock().layers()?.into_iter().enumerate() {
            let d = PyDict::new(py);
            d.set_item("index", index)?;
            d.set_item("name", l.name)?;
            d.set_item("type", l.kind)?;
            d.set_item("inputs", l.inputs)?;
            d.set_item("outputs", l.outputs)?;
            d.set_item("output_dtypes", l.output_dtypes)?;
            list.append(d)?;
        }
        Ok(list)
    }

    fn set_layer_precision(&self, index: i32, dtype_name: &str) -> PyResult<()> {
        Ok(self.lock().set_layer_precision(index, dtype(dtype_name)?)?)
    }

    #[pyo3(signature = (name, dtype_name = None, formats = Vec::new()))]
    fn set_io_format(&self, name: &str, dtype_name: Option<&str>, formats: Vec<String>) -> PyResult<()> {
        let wanted = dtype_name.map(dtype).transpose()?;
        Ok(self.lock().set_io_format(name, wanted, &formats)?)
    }

    /// Names of the builder flags that are set.
    #[getter]
    fn flags(&self) -> PyResult<Vec<&'static str>> {
        Ok(self.lock().flags()?)
    }

    /// Names of the builder flags that this version has.
    #[getter]
    fn known_flags(&self) -> Vec<&'static str> {
        self.lock().known_flags()
    }

    #[pyo3(signature = (name, on = true))]
    fn set_flag(&self, name: &str, on: bool) -> PyResult<()> {
        Ok(self.lock().set_flag(name, on)?)
    }

    /// Bytes.
    fn memory_limit(&self, pool: &str) -> PyResult<u64> {
        Ok(self.lock().memory_limit(pool)?)
    }

    fn set_memory_limit(&self, pool: &str, bytes: u64) -> PyResult<()> {
        Ok(self.lock().set_memory_limit(pool, bytes)?)
    }

    /// A setting of the configuration, as a number or as the name of an enum's member.
    fn set_option(&self, name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let text = value.str()?.to_string();
        Ok(self.lock().set_option(name, &text)?)
    }

    /// The number that a setting has now.
    fn option(&self, name: &str) -> PyResult<i64> {
        Ok(self.lock().option(name)?)
    }

    fn set_tactic_sources(&self, names: Vec<String>) -> PyResult<()> {
        Ok(self.lock().set_tactic_sources(&names)?)
    }

    fn set_plugins_to_serialize(&self, paths: Vec<PathBuf>) -> PyResult<()> {
        Ok(self.lock().set_plugins_to_serialize(&paths)?)
    }

    /// Adds an optimisation profile: (min, opt, max) shapes of inputs, and values of shape tensors. Returns its number.
    #[pyo3(signature = (shapes, values = HashMap::new()))]
    fn add_profile(&self, py: Python<'_>, shapes: Shapes, values: Shapes) -> PyResult<i32> {
        self.detached(py, |b| b.add_profile(&profile(shapes, values)?))
    }

    /// An int8 calibrator (TensorRT 10). algorithm: "entropy" or "minmax". next_batch(names) returns a mapping name -> numpy array, or
    /// None at the end. cache: what an earlier calibration wrote. shapes: of the calibration profile (min = opt = max).
    #[pyo3(signature = (algorithm, batch_size, next_batch, shapes, cache = None))]
    fn set_calibrator(
        &self,
        py: Python<'_>,
        algorithm: &str,
        batch_size: i32,
        next_batch: Py<PyAny>,
        shapes: HashMap<String, Vec<i64>>,
        cache: Option<Vec<u8>>,
    ) -> PyResult<()> {
        let algorithm = one_of(
            "algorithm",
            algorithm,
            &[("entropy", Algorithm::Entropy), ("minmax", Algorithm::MinMax)],
        )?;
        let same = shapes.into_iter().map(|(n, s)| (n, (s.clone(), s.clone(), s))).collect();
        self.detached(py, |b| {
            let feed = self::next_batch(next_batch, b.device, Stream::new(b.device)?);
            b.set_calibrator(algorithm, batch_size, cache, feed, &profile(same, HashMap::new())?)
        })
    }

    /// What the calibrator was given to keep in this build, or None.
    #[getter]
    fn calibration_cache<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        let written = self.lock().calibrator().and_then(|c| c.written());
        written.map(|w| PyBytes::new(py, &w))
    }

    /// How often TensorRT asked the calibrator for a batch.
    #[getter]
    fn calibration_batches(&self) -> u64 {
        self.lock().calibrator().map_or(0, |c| c.batches())
    }

    /// False: TensorRT refused it as one of another library, GPU or configuration.
    #[pyo3(signature = (data, ignore_mismatch = false))]
    fn set_timing_cache(&self, py: Python<'_>, data: &[u8], ignore_mismatch: bool) -> PyResult<bool> {
        self.detached(py, |b| b.set_timing_cache(data, ignore_mismatch))
    }

    /// Adds another timing cache to the one in use; false when it does not fit.
    fn combine_timing_cache(&self, py: Python<'_>, data: &[u8]) -> PyResult<bool> {
        self.detached(py, |b| b.combine_timing_cache(data))
    }

    fn timing_cache<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let data = self.lock().timing_cache()?;
        Ok(data.map(|d| PyBytes::new(py, &d)))
    }

    /// Builds, and writes the plan to a new file, on disk when this returns. Returns a dict with bytes and seconds (of the build alone).
    fn build<'py>(&self, py: Python<'py>, path: PathBuf) -> PyResult<Bound<'py, PyDict>> {
        let built = self.detached(py, |b| b.build(&path))?;
        let d = PyDict::new(py);
        d.set_item("bytes", built.bytes)?;
        d.set_item("seconds", built.seconds)?;
        Ok(d)
    }
}
