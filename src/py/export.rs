//! Results, as tensors of the library that the inputs came from, on the same memory.

use crate::dlpack::capsule::{self, Options};
use crate::dlpack::exchange::Exchange;
use crate::dlpack::ndarray;
use crate::error::{Error, Kind};
use crate::py::import::{torch_exchange, torch_has_cuda, Library};
use crate::py::tensor::{Ready, Tensor};
use crate::tensor::{OwnedTensor, Place};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::sync::Arc;

/// Hands `t` over. `ready` tells when its contents are complete; torch (whose stream the work is ordered on) and numpy
/// (for whom the caller has waited) do not need it.
pub fn export<'py>(py: Python<'py>, t: OwnedTensor, to: Library, ready: Option<Arc<dyn Ready>>) -> PyResult<Bound<'py, PyAny>> {
    match to {
        Library::Torch => torch(py, t),
        Library::Numpy if t.host_ptr.is_none() => Err(Error::new(
            Kind::Device,
            format!("a result ({}) lies in device memory, where numpy cannot read it. Ask for host outputs, or call .numpy() on a jetrt.Tensor.", t.view),
        )
        .with("found", t.view.place.to_string())
        .into()),
        Library::Numpy => ndarray::over(py, t),
        // Both ask the tensor for a capsule and name their stream, before which it orders itself.
        Library::Cupy => py.import(intern!(py, "cupy"))?.call_method1(intern!(py, "from_dlpack"), (Tensor::new(t, ready),)),
        Library::Jax => py.import(intern!(py, "jax.dlpack"))?.call_method1(intern!(py, "from_dlpack"), (Tensor::new(t, ready),)),
        Library::Jetrt | Library::Other => Ok(Bound::new(py, Tensor::new(t, ready))?.into_any()),
    }
}

fn torch<'py>(py: Python<'py>, t: OwnedTensor) -> PyResult<Bound<'py, PyAny>> {
    if matches!(t.view.place, Place::Device(_)) {
        start_torch_cuda(py, &t)?;
    }
    if let Some(exchange) = torch_exchange(py).filter(|_| Exchange::takes(t.view.dtype)) {
        return exchange.to_py(py, t);
    }
    // The legacy capsule: every torch takes it.
    let capsule = capsule::give(py, t, Options::default())?;
    static TAKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let take = TAKE.get_or_try_init(py, || py.import("torch.utils.dlpack")?.getattr("from_dlpack").map(Bound::unbind))?;
    take.bind(py).call1((capsule,))
}

/// A tensor wrapped from outside does not start torch's CUDA side, which the operators on it then miss.
fn start_torch_cuda(py: Python<'_>, t: &OwnedTensor) -> PyResult<()> {
    static STARTED: PyOnceLock<()> = PyOnceLock::new();
    if STARTED.get(py).is_some() {
        return Ok(());
    }
    let torch = py.import("torch")?;
    if !torch_has_cuda(py)? {
        return Err(Error::new(
            Kind::Device,
            format!("a result ({}) cannot become a torch tensor: this torch was built without CUDA. Install a CUDA build, or pass numpy arrays.", t.view),
        )
        .with("found", t.view.place.to_string())
        .into());
    }
    torch.getattr("cuda")?.call_method0("init")?;
    let _ = STARTED.set(py, ());
    Ok(())
}
