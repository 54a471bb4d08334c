//! Small values between Python and the core: streams, GPUs, seconds, words, shapes.

use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::path::PathBuf;
use std::time::Duration;

pub fn seconds(s: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(s).map_err(|_| {
        Error::new(
            Kind::Argument,
            format!("timeout={s}: seconds to wait, zero or more, or None to wait for ever"),
        )
    })
}

/// A stream as a driver handle: an int, or an object of torch (`cuda_stream`), CuPy (`ptr`) or cuda.core (`__cuda_stream__`).
pub fn stream_handle(obj: &Bound<'_, PyAny>) -> PyResult<u64> {
    let py = obj.py();
    if let Ok(h) = obj.extract::<u64>() {
        return Ok(h);
    }
    if let Some(h) = obj.getattr_opt(intern!(py, "cuda_stream"))? {
        return h.extract();
    }
    if let Some(protocol) = obj.getattr_opt(intern!(py, "__cuda_stream__"))? {
        let (_version, handle): (i64, u64) = protocol.call0()?.extract()?;
        return Ok(handle);
    }
    if let Some(h) = obj.getattr_opt(intern!(py, "ptr"))? {
        return h.extract();
    }
    Err(PyTypeError::new_err(format!(
        "stream: found {}; allowed: an int handle, or a stream of torch, CuPy or cuda.core (anything with __cuda_stream__)",
        obj.get_type().name()?
    )))
}

/// `tensorrt_libs` folders of pip packages on `sys.path`.
pub fn pip_folders(py: Python<'_>) -> Vec<PathBuf> {
    let read = || -> PyResult<Vec<PathBuf>> {
        let path: Vec<Bound<'_, PyAny>> = py.import("sys")?.getattr("path")?.extract()?;
        Ok(path
            .iter()
            .filter_map(|p| p.extract::<PathBuf>().ok())
            .map(|p| p.join("tensorrt_libs"))
            .filter(|p| p.is_dir())
            .collect())
    };
    read().unwrap_or_default()
}

pub fn one_of<T: Copy>(name: &str, value: &str, table: &[(&str, T)]) -> PyResult<T> {
    table.iter().find(|(n, _)| *n == value).map(|(_, v)| *v).ok_or_else(|| {
        let allowed: Vec<String> = table.iter().map(|(n, _)| format!("\"{n}\"")).collect();
        PyValueError::new_err(format!("{name}: found \"{value}\"; allowed: {}", allowed.join(", ")))
    })
}

/// A GPU by number, as "cuda:1", or as torch's or CuPy's device object.
pub fn ordinal(obj: &Bound<'_, PyAny>) -> PyResult<i32> {
    if let Ok(i) = obj.extract::<i32>() {
        return Ok(i);
    }
    let text = obj.str()?.to_string();
    let bad = || PyValueError::new_err(format!("device: found {text}; allowed: a GPU number, or \"cuda:N\""));
    if text == "cuda" {
        return Ok(0);
    }
    text.strip_prefix("cuda:").and_then(|n| n.parse().ok()).ok_or_else(bad)
}

/// `(1, 3, 64, 64)`
pub fn shape<'py>(py: Python<'py>, dims: &Dims) -> PyResult<Bound<'py, PyTuple>> {
    PyTuple::new(py, dims.as_slice())
}

/// Ultralytics' JSON as Python objects.
pub fn metadata<'py>(py: Python<'py>, json: Option<&str>) -> PyResult<Option<Bound<'py, PyAny>>> {
    json.map(|text| py.import("json")?.call_method1("loads", (text,))).transpose()
}
