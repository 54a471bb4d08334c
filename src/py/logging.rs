//! TensorRT's log lines into Python's `logging`, under the name `jetrt.tensorrt`.

use crate::log::TENSORRT;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

/// Hands over what was logged since last time. Called while the GIL is held, after native work; a logging handler that
/// raises does not turn a good call into a failed one.
#[inline]
pub fn drain(py: Python<'_>) {
    if TENSORRT.pending() {
        hand_over(py);
    }
}

#[cold]
fn hand_over(py: Python<'_>) {
    static LOGGER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let (lines, lost) = TENSORRT.drain();
    let send = || -> PyResult<()> {
        let logger = LOGGER
            .get_or_try_init(py, || {
                py.import("logging")?
                    .call_method1("getLogger", ("jetrt.tensorrt",))
                    .map(Bound::unbind)
            })?
            .bind(py);
        for (severity, text) in &lines {
            // As an argument, so that a '%' in the text is only text.
            logger.call_method1(intern!(py, "log"), (severity.python_level(), "%s", text))?;
        }
        if lost > 0 {
            logger.call_method1(
                intern!(py, "warning"),
                ("%s TensorRT log lines were dropped before Python could read them", lost),
            )?;
        }
        Ok(())
    };
    if let Err(e) = send() {
        e.write_unraisable(py, None);
    }
}
