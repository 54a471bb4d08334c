//! Small functions of the module: build and library information, plan headers, page-locked arrays.

use super::convert::{metadata, pip_folders, stream_handle};
use super::export::export;
use super::import::{import, Library as From};
use crate::cuda::memory::{DEVICE_ALLOCATIONS, HOST_ALLOCATIONS};
use crate::cuda::Device;
use crate::dtype::DType;
use crate::error::{Error, Kind};
use crate::exec::{record_stream, HostBuffer};
use crate::shape::Dims;
use crate::tensor::{OwnedTensor, Place, TensorView};
use crate::trt::plan::PlanFile;
use crate::trt::Library;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::Arc;

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(build_info, m)?)?;
    m.add_function(wrap_pyfunction!(library_info, m)?)?;
    m.add_function(wrap_pyfunction!(machine_of, m)?)?;
    m.add_function(wrap_pyfunction!(read_plan, m)?)?;
    m.add_function(wrap_pyfunction!(pinned_empty, m)?)?;
    m.add_function(wrap_pyfunction!(record, m)?)
}

/// How this extension was built: version, profile ("release" or "debug"), target, compiler.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let d = PyDict::new(py);
    d.set_item("version", env!("CARGO_PKG_VERSION"))?;
    d.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    d.set_item("target", concat!(env!("JETRT_TARGET")))?;
    d.set_item("rustc", env!("JETRT_RUSTC"))?;
    d.set_item("python_abi", "abi3-py310")?;
    d.set_item("tensorrt", "10.0 to 10.16, 11.x")?;
    Ok(d)
}

/// Which libnvinfer and which CUDA driver this process uses, what found them, and the GPUs. Raises LibraryNotFoundError or
/// UnsupportedVersionError as loading an engine would.
#[pyfunction]
fn library_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let lib = crate::trt::library(&pip_folders(py), None)?;
    let driver = crate::cuda::driver()?;
    let d = PyDict::new(py);
    d.set_item("tensorrt", lib.version.to_string())?;
    d.set_item("path", lib.path.display().to_string())?;
    d.set_item("found_by", lib.found_by)?;
    d.set_item("driver", driver.library)?;
    d.set_item("cuda_driver", format!("{}.{}", driver.version / 1000, driver.version % 1000 / 10))?;
    let mut devices = Vec::new();
    for i in 0..Device::count()? {
        let info = &Device::get(i)?.info;
        let one = PyDict::new(py);
        one.set_item("name", &info.name)?;
        one.set_item("sm", info.sm)?;
        one.set_item("sm_count", info.sm_count)?;
        one.set_item("total_memory", info.total_memory)?;
        one.set_item("integrated", info.integrated)?;
        devices.push(one);
    }
    d.set_item("devices", devices)?;
    d.set_item("device_allocations", DEVICE_ALLOCATIONS.load(Ordering::Relaxed))?;
    d.set_item("host_allocations", HOST_ALLOCATIONS.load(Ordering::Relaxed))?;
    Ok(d)
}

/// What a manifest says of a machine and the core knows: tensorrt, cuda (the driver's newest), sm (90), sm_count, gpu, memory_bytes, integrated.
pub fn machine<'py>(py: Python<'py>, device: &Device, lib: &Library) -> PyResult<Bound<'py, PyDict>> {
    let driver = crate::cuda::driver()?;
    let d = PyDict::new(py);
    d.set_item("tensorrt", lib.version.to_string())?;
    d.set_item("cuda", format!("{}.{}", driver.version / 1000, driver.version % 1000 / 10))?;
    d.set_item("sm", device.info.sm)?;
    d.set_item("sm_count", device.info.sm_count)?;
    d.set_item("gpu", &device.info.name)?;
    d.set_item("memory_bytes", device.info.total_memory)?;
    d.set_item("integrated", device.info.integrated)?;
    Ok(d)
}

/// The same for a GPU by number.
#[pyfunction]
#[pyo3(name = "_machine", signature = (device = 0))]
fn machine_of(py: Python<'_>, device: i32) -> PyResult<Bound<'_, PyDict>> {
    let lib = crate::trt::library(&pip_folders(py), None)?;
    machine(py, Device::get(device)?, lib)
}

/// What a plan's header says, without TensorRT and without a GPU.
///
/// Returns a dict with kind ("plan"), tensorrt (the version that built it), serialization, bytes, and metadata (the JSON
/// that Ultralytics puts before a plan, or None). Raises PlanError for anything that is not a plan, OSError for a file
/// that cannot be read.
#[pyfunction]
fn read_plan<'py>(py: Python<'py>, path: PathBuf) -> PyResult<Bound<'py, PyDict>> {
    let plan = py.detach(|| PlanFile::open(&path))?;
    let d = PyDict::new(py);
    d.set_item("kind", "plan")?;
    d.set_item("tensorrt", plan.header.version.to_string())?;
    d.set_item("serialization", plan.header.serialization)?;
    d.set_item("bytes", plan.bytes())?;
    d.set_item("metadata", metadata(py, plan.header.metadata.as_deref())?)?;
    Ok(d)
}

/// An uninitialised numpy array in page-locked memory that the GPU of ordinal 0 (and, being portable, every other) can
/// address: inputs made of it are used in place on an integrated GPU and copied asynchronously on a discrete one.
///
/// shape: an int or a sequence of ints. dtype: a numpy dtype or its name. Freed with the last array on it.
#[pyfunction]
#[pyo3(signature = (shape, dtype = None))]
fn pinned_empty<'py>(py: Python<'py>, shape: &Bound<'py, PyAny>, dtype: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
    let dims: Vec<i64> = match shape.extract::<i64>() {
        Ok(n) => vec![n],
        Err(_) => shape.extract()?,
    };
    let name: String = match dtype {
        None => "float32".into(),
        Some(d) => match py.import("numpy")?.call_method1("dtype", (d,)) {
            Ok(d) => d.getattr("name")?.extract()?,
            // "bfloat16" is no name to numpy until ml_dtypes is imported.
            Err(e) => d.extract::<String>().map_err(|_| e)?,
        },
    };
    let dtype = DType::from_name(&name).filter(|d| d.size().is_some()).ok_or_else(|| {
        Error::new(Kind::Argument, format!("pinned_empty: dtype '{name}' is not known; use one of float32, float16, bfloat16, int64, int32, int8, uint8, bool, float64."))
    })?;
    let bad = || {
        Error::new(
            Kind::Argument,
            format!("pinned_empty: shape {dims:?} is not allowed; at most 8 dimensions, none negative."),
        )
    };
    let dims = Dims::new(&dims).filter(Dims::is_static).ok_or_else(bad)?;
    let bytes = dims.volume().and_then(|n| dtype.bytes(n)).ok_or_else(bad)?;
    let buffer = py.detach(|| HostBuffer::new(Device::get(0)?, bytes))?;
    let host = buffer.host();
    let view = TensorView::new(host, dtype, dims, None, Place::Host);
    export(
        py,
        OwnedTensor {
            view,
            host_ptr: Some(host),
            owner: Arc::new(buffer),
        },
        From::Numpy,
        None,
    )
}

/// Says that `stream` uses `tensor`, an output of an engine (or a view of one): its memory is not written again before that
/// stream has passed the point where the tensor is dropped. Needed only for streams on which the engine was never called.
///
/// stream: as for Engine.__call__. Raises ValueError when the tensor is no engine output.
#[pyfunction]
#[pyo3(name = "record_stream")]
fn record(py: Python<'_>, tensor: &Bound<'_, PyAny>, stream: &Bound<'_, PyAny>) -> PyResult<()> {
    let found = import(tensor, "tensor", None, 0)?;
    let handle = stream_handle(stream)?;
    // The producer may have been told a stream by `import`; ours only.
    let _ = py;
    Ok(record_stream(found.view.ptr, handle)?)
}
