//! numpy arrays through numpy's own C API: read in place, and made over memory that somebody else owns.

use super::managed::{checked, refused_dtype, refused_rank};
use crate::dtype::DType;
use crate::error::{Error, Kind};
use crate::shape::{Dims, MAX_DIMS};
use crate::tensor::{OwnedTensor, Place, TensorView};
use numpy::npyffi::{self, NpyTypes, PY_ARRAY_API};
use numpy::{PyArrayDescr, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyCapsule;
use pyo3::{intern, PyTypeInfo};
use std::ffi::c_int;

/// Imports numpy. To be called before anything that touches its C API: the `numpy` crate panics where this fails.
pub fn ready(py: Python<'_>) -> PyResult<()> {
    static READY: PyOnceLock<()> = PyOnceLock::new();
    READY.get_or_try_init(py, || py.import("numpy").map(drop)).copied()
}

pub fn is_array(obj: &Bound<'_, PyAny>) -> bool {
    ready(obj.py()).is_ok() && PyUntypedArray::is_type_of(obj)
}

/// The array as it lies in memory, borrowed from `obj`, and whether it is read-only.
pub fn view(obj: &Bound<'_, PyAny>, name: &str) -> PyResult<(TensorView, bool)> {
    ready(obj.py())?;
    let array = obj.cast::<PyUntypedArray>()?;
    let dtype = dtype_of(&array.dtype(), name)?;
    // SAFETY: an array, read while we hold it and are attached.
    let (data, flags) = unsafe {
        let fields = npyffi::_PyArray_GET_ITEM_DATA(array.as_array_ptr().cast_const());
        ((*fields).data as u64, (*fields).flags)
    };
    let (shape, byte_strides) = (array.shape(), array.strides());
    let n = shape.len();
    if n > MAX_DIMS {
        return Err(refused_rank(name, n as i64).into());
    }
    let (mut dims, mut strides) = ([0; MAX_DIMS], [0; MAX_DIMS]);
    for (to, from) in dims.iter_mut().zip(shape) {
        *to = *from as i64;
    }
    let dims = Dims::new(&dims[..n]).unwrap_or_default();
    let strides = if flags & npyffi::NPY_ARRAY_C_CONTIGUOUS != 0 {
        None
    } else {
        let size = dtype.size().unwrap_or(1) as i64;
        for (to, from) in strides.iter_mut().zip(byte_strides) {
            *to = elements(*from as i64, size, name)?;
        }
        Dims::new(&strides[..n])
    };
    let view = checked(data, data == 0, dtype, dims, strides, Place::Host, name)?;
    Ok((view, flags & npyffi::NPY_ARRAY_WRITEABLE == 0))
}

/// A stride in elements; one that is no multiple of the element (a field of a record, for one) cannot be said.
pub fn elements(bytes: i64, size: i64, name: &str) -> crate::error::Result<i64> {
    if bytes % size == 0 {
        return Ok(bytes / size);
    }
    Err(Error::input(
        Kind::Layout,
        name,
        format!("a stride of {bytes} bytes between elements of {size}"),
        "strides that are multiples of the element size",
        "Make a contiguous copy first (numpy.ascontiguousarray).",
    ))
}

fn dtype_of(descr: &Bound<'_, PyArrayDescr>, name: &str) -> PyResult<DType> {
    let known = match descr.num() {
        0 => Some(DType::Bool),
        1 => Some(DType::I8),
        2 => Some(DType::U8),
        3 => Some(DType::I16),
        4 => Some(DType::U16),
        5 => Some(DType::I32),
        6 => Some(DType::U32),
        // C's long, which has 64 bits wherever TensorRT runs on Linux; and long long.
        7 | 9 if descr.itemsize() == 8 => Some(DType::I64),
        8 | 10 if descr.itemsize() == 8 => Some(DType::U64),
        11 => Some(DType::F32),
        12 => Some(DType::F64),
        23 => Some(DType::F16),
        _ => None,
    };
    match known {
        Some(d) if descr.is_native_byteorder() != Some(false) => Ok(d),
        Some(d) => Err(Error::input(
            Kind::DType,
            name,
            format!("{d} in the other byte order ({})", descr.str()?),
            "elements in this machine's byte order",
            "Convert it: x.astype(x.dtype.newbyteorder('=')).",
        )
        .into()),
        None => extension(descr, name),
    }
}

/// The types that ml_dtypes adds to numpy (bfloat16 and its kin); the rest is refused.
#[cold]
fn extension(descr: &Bound<'_, PyArrayDescr>, name: &str) -> PyResult<DType> {
    let py = descr.py();
    let label: String = descr.getattr(intern!(py, "name"))?.extract()?;
    let theirs = descr.num() >= npyffi::NPY_TYPES::NPY_USERDEF as c_int && descr.typeobj().module()? == "ml_dtypes";
    match DType::from_name(&label) {
        Some(d) if theirs && d.size() == Some(descr.itemsize() as u64) => Ok(d),
        Some(d) if theirs && d.size().is_none() => Err(Error::input(
            Kind::DType,
            name,
            format!("{label} with one element a byte, as ml_dtypes stores it"),
            format!("{label} packed two to a byte"),
            "Pass a packed tensor through DLPack.",
        )
        .into()),
        _ => Err(refused_dtype(name, &label).into()),
    }
}

/// numpy's type object for `dtype`.
pub fn descr<'py>(py: Python<'py>, dtype: DType) -> PyResult<Bound<'py, PyArrayDescr>> {
    ready(py)?;
    if let Some(typestr) = dtype.typestr() {
        return PyArrayDescr::new(py, typestr);
    }
    let next = "Pass torch tensors to get torch tensors back, or pip install ml_dtypes.";
    let refuse =
        |found: String| Error::new(Kind::DType, format!("numpy cannot hold the result: {found}. {next}")).with("found", dtype.name());
    if dtype.size().is_none() {
        return Err(refuse(format!("{dtype} is packed two to a byte")).into());
    }
    match py.import("ml_dtypes").and_then(|m| m.getattr(dtype.name())) {
        Ok(scalar) => PyArrayDescr::new(py, scalar),
        Err(_) => Err(refuse(format!("{dtype} is not a type of numpy's own, and ml_dtypes is not installed")).into()),
    }
}

/// A writable array over the tensor's host memory; its base keeps the owner. The caller has waited for the contents.
pub fn over<'py>(py: Python<'py>, t: OwnedTensor) -> PyResult<Bound<'py, PyAny>> {
    let Some(host) = t.host_ptr else {
        return Err(PyBufferError::new_err(
            "this tensor lies in device memory that the host cannot read",
        ));
    };
    let view = t.view;
    let descr = descr(py, view.dtype)?;
    let strides = if view.contiguous {
        view.dims.contiguous_strides()
    } else {
        view.strides
    };
    let size = view.dtype.size().unwrap_or(1) as isize;
    let mut shape = [0isize; MAX_DIMS];
    let mut steps = [0isize; MAX_DIMS];
    for (i, (d, s)) in view.dims.as_slice().iter().zip(strides.as_slice()).enumerate() {
        (shape[i], steps[i]) = (*d as isize, *s as isize * size);
    }
    let base = PyCapsule::new_with_value(py, t, c"jetrt.memory")?;
    // SAFETY: shape and strides describe memory that `base` keeps; NewFromDescr steals the reference to the type and
    // SetBaseObject that to the base, both also when they fail.
    unsafe {
        let ty = npyffi::get_type_object(py, NpyTypes::PyArray_Type);
        let array = PY_ARRAY_API.PyArray_NewFromDescr(
            py,
            ty,
            descr.into_dtype_ptr(),
            view.dims.rank() as c_int,
            shape.as_mut_ptr(),
            steps.as_mut_ptr(),
            host as usize as *mut _,
            npyffi::NPY_ARRAY_WRITEABLE,
            std::ptr::null_mut(),
        );
        let array = Bound::from_owned_ptr_or_err(py, array)?;
        match PY_ARRAY_API.PyArray_SetBaseObject(py, array.as_ptr().cast(), base.into_ptr()) {
            0 => Ok(array),
            _ => Err(PyErr::fetch(py)),
        }
    }
}
