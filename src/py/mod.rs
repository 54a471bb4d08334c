//! The Python module `jetrt._core`. Only this folder (and `dlpack`, for capsules and the call protocol) knows pyo3.

mod build;
mod call;
mod captures;
mod convert;
mod engine;
pub(crate) mod errors;
mod export;
mod guards;
mod import;
mod info;
mod logging;
mod probe;
mod tables;
mod telemetry;
mod tensor;
mod unchanged;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
#[pyo3(name = "_core")]
pub fn core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    engine::register(m)?;
    build::register(m)?;
    captures::register(m)?;
    m.add_class::<guards::Guards>()?;
    m.add_class::<unchanged::Unchanged>()?;
    telemetry::register(m)?;
    m.add_class::<tensor::Tensor>()?;
    m.add_function(wrap_pyfunction!(probe::describe, m)?)?;
    m.add_function(wrap_pyfunction!(probe::roundtrip, m)?)?;
    info::register(m)
}
