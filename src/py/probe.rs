//! `_describe` and `_roundtrip`: what jetrt sees in an array, for tests and bug reports.

use super::export::export;
use super::import::{import, requires_grad, Keep, Library};
use crate::error::{Error, Kind};
use crate::tensor::{OwnedTensor, Place};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::sync::Arc;

/// What jetrt sees in an array object, as a dict. For tests and bug reports.
#[pyfunction]
#[pyo3(name = "_describe", signature = (obj, *, stream = None, device = 0))]
pub fn describe<'py>(obj: &Bound<'py, PyAny>, stream: Option<u64>, device: i32) -> PyResult<Bound<'py, PyDict>> {
    let py = obj.py();
    let found = import(obj, "obj", stream, device)?;
    let view = found.view;
    let out = PyDict::new(py);
    out.set_item("ptr", view.ptr)?;
    out.set_item("dtype", view.dtype.name())?;
    out.set_item("shape", PyTuple::new(py, view.dims.as_slice())?)?;
    let strides = if view.contiguous {
        view.dims.contiguous_strides()
    } else {
        view.strides
    };
    out.set_item("strides", PyTuple::new(py, strides.as_slice())?)?;
    out.set_item("contiguous", view.contiguous)?;
    out.set_item("device", view.place.to_string())?;
    out.set_item("library", format!("{:?}", found.library).to_lowercase())?;
    out.set_item("read_only", found.read_only)?;
    out.set_item("kept", found.keep.is_some())?;
    out.set_item("producer_stream", found.producer_stream)?;
    out.set_item("requires_grad", requires_grad(obj)?)?;
    Ok(out)
}

/// Holds an imported tensor's memory for an exported one.
struct Held {
    _obj: Py<PyAny>,
    _keep: Option<Keep>,
}

/// The same memory, imported and exported again to the library that it came from (`to`: to another). For tests and bug reports.
#[pyfunction]
#[pyo3(name = "_roundtrip", signature = (obj, *, to = None))]
pub fn roundtrip<'py>(obj: &Bound<'py, PyAny>, to: Option<&str>) -> PyResult<Bound<'py, PyAny>> {
    let found = import(obj, "obj", None, 0)?;
    let to = match to {
        None => found.library,
        Some("torch") => Library::Torch,
        Some("numpy") => Library::Numpy,
        Some("cupy") => Library::Cupy,
        Some("jax") => Library::Jax,
        Some("jetrt") => Library::Jetrt,
        Some(other) => {
            return Err(Error::new(
                Kind::Argument,
                format!("to: found '{other}'; allowed: torch, numpy, cupy, jax, jetrt."),
            )
            .into())
        }
    };
    let host_ptr = (found.view.place == Place::Host).then_some(found.view.ptr);
    let owner = Arc::new(Held {
        _obj: obj.clone().unbind(),
        _keep: found.keep,
    });
    export(
        obj.py(),
        OwnedTensor {
            view: found.view,
            host_ptr,
            owner,
        },
        to,
        None,
    )
}
