//! What an engine shows of itself and takes besides tensors: `TensorInfo`, `DeviceMemory`.

use super::convert::shape;
use crate::cuda::memory::DeviceBuffer;
use crate::cuda::Device;
use crate::exec::ContextMemory;
use crate::trt::IoTensor;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use std::sync::Arc;

/// Device memory that the user owns, for the scratch space of contexts.
#[pyclass(module = "jetrt._core", frozen)]
pub struct DeviceMemory {
    pub(super) memory: Arc<ContextMemory>,
    pub(super) device: i32,
}

#[pymethods]
impl DeviceMemory {
    #[new]
    #[pyo3(signature = (nbytes, device = 0))]
    fn new(py: Python<'_>, nbytes: u64, device: i32) -> PyResult<DeviceMemory> {
        let buffer = py.detach(|| DeviceBuffer::new(Device::get(device)?, nbytes, "DeviceMemory"))?;
        Ok(DeviceMemory {
            memory: Arc::new(ContextMemory { buffer }),
            device,
        })
    }

    /// Size in bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.memory.buffer.bytes()
    }

    /// Ordinal of the GPU.
    #[getter]
    fn device(&self) -> i32 {
        self.device
    }

    fn __repr__(&self) -> String {
        format!("DeviceMemory({} bytes on cuda:{})", self.nbytes(), self.device)
    }
}

/// One input or output of an engine.
#[pyclass(module = "jetrt._core", frozen)]
pub struct TensorInfo {
    pub(super) io: IoTensor,
}

#[pymethods]
impl TensorInfo {
    /// The tensor's name in the engine.
    #[getter]
    fn name(&self) -> &str {
        &self.io.name
    }

    /// The element type by name, such as "float32", "bfloat16", "int64", "bool".
    #[getter]
    fn dtype(&self) -> &'static str {
        self.io.dtype.name()
    }

    /// The shape; -1 where a dimension is dynamic.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        shape(py, &self.io.shape)
    }

    /// "input" or "output".
    #[getter]
    fn mode(&self) -> &'static str {
        if self.io.input {
            "input"
        } else {
            "output"
        }
    }

    /// "device", or "host" for a shape tensor.
    #[getter]
    fn location(&self) -> &'static str {
        if self.io.host {
            "host"
        } else {
            "device"
        }
    }

    /// TensorRT's description of the memory layout.
    #[getter]
    fn format(&self) -> &str {
        &self.io.format
    }

    /// The shapes (min, opt, max) of each optimisation profile; empty for an output.
    #[getter]
    fn profiles<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let one = |r: &crate::shape::Range| -> PyResult<Bound<'py, PyTuple>> {
            PyTuple::new(py, [shape(py, &r.min)?, shape(py, &r.opt)?, shape(py, &r.max)?])
        };
        PyList::new(py, self.io.profiles.iter().map(one).collect::<PyResult<Vec<_>>>()?)
    }

    /// The same as `profiles`.
    #[getter]
    fn profile<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        self.profiles(py)
    }

    fn __repr__(&self) -> String {
        let profiles = match self.io.profiles.as_slice() {
            [] => String::new(),
            p => format!(
                ", profiles {}",
                p.iter()
                    .map(|r| format!("{} / {} / {}", r.min, r.opt, r.max))
                    .collect::<Vec<_>>()
                    .join("; ")
            ),
        };
        format!(
            "TensorInfo({} '{}' {}{}{profiles})",
            self.mode(),
            self.io.name,
            self.io.dtype,
            self.io.shape
        )
    }
}
