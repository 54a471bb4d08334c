//! The boundary of errors: [`Error`] to the Python class that it names, and back.

use crate::error::{Error, Field, Kind};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyModule};

impl From<Error> for PyErr {
    fn from(e: Error) -> PyErr {
        // An error that is turned while no interpreter runs any more has nobody to reach.
        Python::try_attach(|py| raised(py, &e)).unwrap_or_else(|| PyRuntimeError::new_err(e.message().to_owned()))
    }
}

fn raised(py: Python<'_>, e: &Error) -> PyErr {
    let message = e.message().to_owned();
    match e.kind() {
        Kind::Argument => return PyValueError::new_err(message),
        Kind::ArgumentType => return PyTypeError::new_err(message),
        Kind::File => return file_error(e, message),
        _ => {}
    }
    let made = || -> PyResult<PyErr> {
        let fields = PyDict::new(py);
        for (name, value) in e.fields() {
            match value {
                Field::Text(v) => fields.set_item(name, v)?,
                Field::Int(v) => fields.set_item(name, v)?,
                Field::Real(v) => fields.set_item(name, v)?,
                Field::List(v) => fields.set_item(name, v)?,
            }
        }
        let class = classes(py)?.getattr(e.kind().class())?;
        let value = class.call((&message,), Some(&fields))?;
        // What is known of such log lines is a help; without it the error is the same.
        let _ = explained(py, e, &value);
        Ok(PyErr::from_value(value))
    };
    // Without the Python package there are no classes; the message must come through all the same.
    made().unwrap_or_else(|_| PyRuntimeError::new_err(message.clone()))
}

/// Adds what the table of known failures says about TensorRT's lines, to errors that carry some.
fn explained(py: Python<'_>, e: &Error, value: &Bound<'_, PyAny>) -> PyResult<()> {
    let stage = match e.kind() {
        Kind::Deserialize | Kind::Plan => "load",
        Kind::Inference | Kind::OutOfMemory | Kind::Cuda | Kind::GraphCapture => "run",
        _ => return Ok(()),
    };
    if e.field("log").is_none() {
        return Ok(());
    }
    let options = PyDict::new(py);
    options.set_item("tensorrt", crate::trt::opened().map(|l| l.version.to_string()))?;
    options.set_item("stage", stage)?;
    py.import("jetrt.known_failures")?.call_method("attach", (value,), Some(&options))?;
    Ok(())
}

/// Python picks FileNotFoundError, PermissionError and the like by the number.
fn file_error(e: &Error, message: String) -> PyErr {
    let path = match e.field("path") {
        Some(Field::Text(p)) => Some(p.clone()),
        _ => None,
    };
    match (e.field("errno"), path) {
        (Some(Field::Int(errno)), Some(path)) if *errno != 0 => PyOSError::new_err((*errno, message, path)),
        (Some(Field::Int(errno)), None) if *errno != 0 => PyOSError::new_err((*errno, message)),
        _ => PyOSError::new_err(message),
    }
}

fn classes<'py>(py: Python<'py>) -> PyResult<Bound<'py, PyModule>> {
    static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    Ok(MODULE
        .get_or_try_init(py, || py.import("jetrt.errors").map(Bound::unbind))?
        .bind(py)
        .clone())
}

/// The error with the exception that led to it as its `__cause__`.
#[cold]
pub fn caused_by(py: Python<'_>, e: Error, cause: PyErr) -> PyErr {
    let out = PyErr::from(e);
    out.set_cause(py, Some(cause));
    out
}

/// `TypeError: what it said`, the first line, for messages.
#[cold]
pub fn brief(py: Python<'_>, e: &PyErr) -> String {
    let class = e.get_type(py).name().map(|n| n.to_string()).unwrap_or_default();
    let text = e.value(py).str().map(|s| s.to_string()).unwrap_or_default();
    match text.lines().next() {
        Some(line) if !line.is_empty() => format!("{class}: {line}"),
        _ => class,
    }
}
