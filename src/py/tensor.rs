//! `jetrt.Tensor`: a result for callers whose array library is unknown. It owns its memory and speaks every protocol.

use crate::cuda::memory::read_back;
use crate::dlpack::capsule::{self, Options};
use crate::dlpack::ndarray;
use crate::error::{Error, Kind, Result};
use crate::tensor::{OwnedTensor, Place, TensorView};
use pyo3::exceptions::{PyAttributeError, PyBufferError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyTuple};
use std::sync::Arc;

/// When the contents of a tensor are complete.
pub trait Ready: Send + Sync {
    /// Makes this stream (a driver handle; 1 is the legacy default stream, 2 the per-thread one) wait for them.
    fn order(&self, stream: u64) -> Result<()>;
    /// Waits for them on this thread. Called without the GIL.
    fn wait(&self) -> Result<()>;
}

/// A tensor that owns its memory: a result whose caller gave no array of a known library.
///
/// Any array library takes it: `torch.from_dlpack(t)`, `cupy.asarray(t)`, `numpy.from_dlpack(t)`. It can be handed out
/// any number of times; all share the memory, which is reused when the last of them is gone.
#[pyclass(module = "jetrt._core", frozen)]
pub struct Tensor {
    tensor: OwnedTensor,
    ready: Option<Arc<dyn Ready>>,
}

const CPU: (i32, i32) = (1, 0);
const CUDA: i32 = 2;
const LEGACY_DEFAULT: u64 = 1;

impl Tensor {
    /// `ready`: `None` when the contents are complete already.
    pub fn new(tensor: OwnedTensor, ready: Option<Arc<dyn Ready>>) -> Tensor {
        Tensor { tensor, ready }
    }

    pub fn tensor(&self) -> &OwnedTensor {
        &self.tensor
    }

    /// The view, with `stream` made to wait for its contents; host memory is waited for here.
    pub fn order_before(&self, py: Python<'_>, stream: Option<u64>) -> PyResult<TensorView> {
        match (self.tensor.view.place, stream, &self.ready) {
            (Place::Host, ..) => self.wait(py)?,
            (Place::Device(_), Some(stream), Some(ready)) => ready.order(stream)?,
            _ => {}
        }
        Ok(self.tensor.view)
    }

    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        match &self.ready {
            Some(ready) => Ok(py.detach(|| ready.wait())?),
            None => Ok(()),
        }
    }

    /// The contents in memory of the host, by a copy.
    fn copy_to_host(&self, py: Python<'_>) -> PyResult<OwnedTensor> {
        self.wait(py)?;
        let view = self.tensor.view;
        let bytes = view.bytes().and_then(|b| usize::try_from(b).ok()).filter(|_| view.contiguous);
        let Some(bytes) = bytes else {
            return Err(PyBufferError::new_err(format!(
                "{view} cannot be copied to the host: it is not contiguous"
            )));
        };
        let memory = match (view.place, self.tensor.host_ptr) {
            (Place::Device(device), None) => py.detach(|| -> Result<Vec<u8>> {
                let mut memory = vec![0; bytes];
                if bytes > 0 {
                    read_back(device, view.ptr, &mut memory)?;
                }
                Ok(memory)
            })?,
            _ => capsule::host_bytes(&self.tensor)?,
        };
        let ptr = memory.as_ptr() as u64;
        Ok(OwnedTensor {
            view: TensorView {
                ptr,
                place: Place::Host,
                ..view
            },
            host_ptr: Some(ptr),
            owner: Arc::new(memory),
        })
    }

    fn own_device(&self) -> (i32, i32) {
        match self.tensor.view.place {
            Place::Device(i) => (CUDA, i),
            Place::Host => CPU,
        }
    }
}

#[pymethods]
impl Tensor {
    /// The shape.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.tensor.view.dims.as_slice())
    }

    /// The element type by name, such as "float32" or "bfloat16".
    #[getter]
    fn dtype(&self) -> &'static str {
        self.tensor.view.dtype.name()
    }

    /// "cuda:0", or "cpu".
    #[getter]
    fn device(&self) -> String {
        self.tensor.view.place.to_string()
    }

    /// Bytes that the elements take.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.tensor.view.bytes().unwrap_or(0)
    }

    /// The address of the first element, in the memory of `device`.
    #[getter]
    fn data_ptr(&self) -> u64 {
        self.tensor.view.ptr
    }

    fn __repr__(&self) -> String {
        let view = &self.tensor.view;
        format!("jetrt.Tensor({}{}, device='{}')", view.dtype, view.dims, view.place)
    }

    fn __len__(&self) -> PyResult<usize> {
        match self.tensor.view.dims.as_slice().first() {
            Some(n) => Ok(usize::try_from(*n)?),
            None => Err(PyTypeError::new_err("len() of a 0-d tensor")),
        }
    }

    /// (device type, index) in DLPack's numbers: (2, i) for CUDA, (1, 0) for the host.
    fn __dlpack_device__(&self) -> (i32, i32) {
        self.own_device()
    }

    /// A DLPack capsule on this memory.
    ///
    /// `stream` is made to wait for the contents. `dl_device=(1, 0)` gives host memory: the same where the host can read
    /// it, a copy otherwise (refused by `copy=False`).
    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<i64>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        let versioned = max_version.is_some_and(|(major, _)| major >= 1);
        let own = self.own_device();
        let to_host = match dl_device {
            Some(d) if d == own => false,
            None => false,
            Some(CPU) => true,
            Some((kind, index)) => {
                return Err(PyBufferError::new_err(format!(
                    "{} cannot be handed out on DLPack device ({kind}, {index}); it can on {own:?} and on the host (1, 0)",
                    self.__repr__()
                )))
            }
        };
        let readable = self.tensor.host_ptr.is_some();
        if copy == Some(true) || (to_host && !readable) {
            if copy == Some(false) {
                return Err(PyBufferError::new_err(format!(
                    "{} lies in device memory: without a copy the host cannot read it",
                    self.__repr__()
                )));
            }
            if !to_host && own.0 == CUDA {
                return Err(PyBufferError::new_err(
                    "a copy on the GPU is the consumer's to make: import without copy=True, then copy",
                ));
            }
            let t = self.copy_to_host(py)?;
            return capsule::give(
                py,
                t,
                Options {
                    versioned,
                    copied: true,
                    as_host: true,
                },
            );
        }
        if to_host || own == CPU {
            self.wait(py)?;
        } else if let Some(ready) = &self.ready {
            match stream {
                // No stream named means the legacy default one; -1 means that the consumer takes care.
                None => ready.order(LEGACY_DEFAULT)?,
                Some(-1) => {}
                Some(s) if s > 0 => ready.order(s as u64)?,
                Some(s) => {
                    return Err(PyValueError::new_err(format!(
                        "stream: found {s}; allowed: None, -1, 1 (legacy default), 2 (per thread) or a handle"
                    )))
                }
            }
        }
        capsule::give(
            py,
            self.tensor.clone(),
            Options {
                versioned,
                copied: false,
                as_host: to_host,
            },
        )
    }

    /// A numpy array on this memory, where the host can read it; `numpy()` copies otherwise.
    #[pyo3(signature = (dtype = None, copy = None))]
    fn __array__<'py>(&self, py: Python<'py>, dtype: Option<Bound<'py, PyAny>>, copy: Option<bool>) -> PyResult<Bound<'py, PyAny>> {
        if self.tensor.host_ptr.is_none() {
            let message = format!(
                "{} lies in device memory, which numpy cannot read in place. Call .numpy(), which copies it to the host.",
                self.__repr__()
            );
            return Err(Error::new(Kind::Device, message)
                .with("found", self.device())
                .with("allowed", "host-readable memory")
                .into());
        }
        self.wait(py)?;
        let array = ndarray::over(py, self.tensor.clone())?;
        let same = match &dtype {
            None => true,
            Some(d) => array.getattr(intern!(py, "dtype"))?.eq(d)?,
        };
        match (same, dtype, copy) {
            (false, Some(dtype), None | Some(true)) => array.call_method1(intern!(py, "astype"), (dtype,)),
            (false, ..) => Err(PyValueError::new_err("another dtype needs a copy, which copy=False forbids")),
            (true, _, Some(true)) => array.call_method0(intern!(py, "copy")),
            (true, ..) => Ok(array),
        }
    }

    /// The contents as a numpy array: on the same memory where the host can read it, else a copy. Waits for them.
    fn numpy<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        // Before the copy: a type that numpy lacks is refused at once.
        ndarray::descr(py, self.tensor.view.dtype)?;
        match self.tensor.host_ptr {
            Some(_) => {
                self.wait(py)?;
                ndarray::over(py, self.tensor.clone())
            }
            None => ndarray::over(py, self.copy_to_host(py)?),
        }
    }

    /// Version 3 of the interface; only for device memory, and for types that numpy has.
    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let view = self.tensor.view;
        if view.place == Place::Host {
            return Err(PyAttributeError::new_err(
                "__cuda_array_interface__: this tensor lies in host memory",
            ));
        }
        let Some(typestr) = view.dtype.typestr() else {
            return Err(PyAttributeError::new_err(format!(
                "__cuda_array_interface__ has no name for {}; use DLPack",
                view.dtype
            )));
        };
        let out = PyDict::new(py);
        out.set_item("shape", self.shape(py)?)?;
        out.set_item("typestr", typestr)?;
        out.set_item("data", (if view.elements() == 0 { 0 } else { view.ptr }, false))?;
        out.set_item("version", 3)?;
        let size = view.dtype.size().unwrap_or(1) as i64;
        match view.contiguous {
            true => out.set_item("strides", py.None())?,
            false => out.set_item("strides", PyTuple::new(py, view.strides.as_slice().iter().map(|s| s * size))?)?,
        }
        match &self.ready {
            // The consumer orders itself after the stream named here, and that one after the contents.
            Some(ready) => {
                ready.order(LEGACY_DEFAULT)?;
                out.set_item("stream", LEGACY_DEFAULT)?;
            }
            None => out.set_item("stream", py.None())?,
        }
        Ok(out)
    }
}
