//! torch's C exchange table (`__dlpack_c_exchange_api__`, torch ≥ 2.10): a tensor read in tens of nanoseconds, without
//! a reference count touched, and one made without a capsule.

use super::managed::{self, is_like, view_of};
use crate::dtype::DType;
use crate::error::{Error, Kind};
use crate::py::errors;
use crate::tensor::{OwnedTensor, Place, TensorView};
use dlpark::ffi::{DLDevice, DLDeviceType, DLManagedTensorVersioned, DLPackExchangeAPI, DLPackExchangeAPIHeader, DLTensor};
use dlpark::DlpackFlags;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyType};
use pyo3::{ffi, intern};
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;

/// The table of one exact type. A handle: copy it, keep it. It keeps its type alive for ever, so look it up once a type.
#[derive(Clone, Copy)]
pub struct Exchange {
    /// Address of the type that the table was found on; `view` takes instances of no other.
    ty: usize,
    read: unsafe extern "C" fn(*mut c_void, *mut DLTensor) -> c_int,
    make: unsafe extern "C" fn(*mut DLManagedTensorVersioned, *mut *mut c_void) -> c_int,
    stream: unsafe extern "C" fn(DLDeviceType, i32, *mut *mut c_void) -> c_int,
}

impl Exchange {
    /// The table of `torch.Tensor` or `torch.nn.Parameter`. Subclasses inherit the attribute, but what they mean by
    /// their memory is theirs (a `FakeTensor` has none), so they get `None`, as do other libraries.
    pub fn of_type(ty: &Bound<'_, PyType>) -> Option<Exchange> {
        let name = (ty.module().ok()?, ty.qualname().ok()?);
        if !matches!(
            (name.0.to_str().ok()?, name.1.to_str().ok()?),
            ("torch", "Tensor") | ("torch.nn.parameter", "Parameter")
        ) {
            return None;
        }
        let capsule = ty
            .getattr_opt(intern!(ty.py(), "__dlpack_c_exchange_api__"))
            .ok()??
            .cast_into::<PyCapsule>()
            .ok()?;
        let mut at = capsule
            .pointer_checked(Some(c"dlpack_exchange_api"))
            .ok()?
            .as_ptr()
            .cast::<DLPackExchangeAPIHeader>();
        // A newer major version may have chained an older table that we can read.
        loop {
            // SAFETY: the capsule's name says what it points to; tables stay for the life of the process.
            let header = unsafe { at.as_ref() }?;
            if header.version.major == managed::VERSION.major {
                break;
            }
            at = header.prev_api;
        }
        // SAFETY: a table of major version 1 has the layout of `DLPackExchangeAPI`.
        let api = unsafe { &*at.cast::<DLPackExchangeAPI>() };
        let found = Exchange {
            ty: ty.as_type_ptr() as usize,
            read: api.dltensor_from_py_object_no_sync?,
            make: api.managed_tensor_to_py_object_no_sync?,
            stream: api.current_work_stream?,
        };
        // Else another type could one day lie at the same address.
        std::mem::forget(ty.clone());
        Some(found)
    }

    /// The tensor as it lies in memory, borrowed from `obj`. A lazily negated or conjugated tensor shows its stored
    /// values, and one that requires grad shows like any other: both are the caller's to check.
    pub fn view(&self, obj: &Bound<'_, PyAny>, name: &str) -> PyResult<TensorView> {
        if obj.get_type_ptr() as usize != self.ty {
            return Err(PyTypeError::new_err("the exchange table of another type"));
        }
        let mut t = MaybeUninit::<DLTensor>::uninit();
        // SAFETY: `obj` is an instance of the type that the function was found on; it fills `t` or fails.
        if unsafe { (self.read)(obj.as_ptr().cast(), t.as_mut_ptr()) } != 0 {
            return Err(refused(obj.py(), name, PyErr::fetch(obj.py())));
        }
        // SAFETY: filled, as the call succeeded; shape and strides belong to `obj`, which outlives this function.
        let view = unsafe {
            let t = t.assume_init();
            view_of(&t, DlpackFlags::empty(), name, t.device.device_id)
        };
        Ok(view?)
    }

    /// As [`Exchange::view`], written over the view of the last call: where only the address has changed, only that is taken.
    #[inline]
    pub fn refresh(&self, obj: &Bound<'_, PyAny>, name: &str, view: &mut TensorView) -> PyResult<()> {
        if obj.get_type_ptr() as usize == self.ty {
            let mut t = MaybeUninit::<DLTensor>::uninit();
            // SAFETY: as in `view`.
            if unsafe { (self.read)(obj.as_ptr().cast(), t.as_mut_ptr()) } == 0 {
                // SAFETY: as in `view`.
                unsafe {
                    let t = t.assume_init();
                    if is_like(&t, view) {
                        view.ptr = t.data as u64;
                        return Ok(());
                    }
                    *view = view_of(&t, DlpackFlags::empty(), name, t.device.device_id)?;
                }
                return Ok(());
            }
            return Err(refused(obj.py(), name, PyErr::fetch(obj.py())));
        }
        Err(PyTypeError::new_err("the exchange table of another type"))
    }

    /// torch's current stream on this device, as a driver handle (0: the legacy default stream).
    pub fn current_stream(&self, py: Python<'_>, device: i32) -> PyResult<u64> {
        let mut stream = ptr::null_mut();
        // SAFETY: the function of a valid table; it writes the handle or sets an exception.
        match unsafe { (self.stream)(DLDeviceType::CUDA, device, &mut stream) } {
            0 => Ok(stream as u64),
            _ => Err(PyErr::fetch(py)),
        }
    }

    /// Types for which `to_py` is known to work in every torch that has the table.
    pub fn takes(dtype: DType) -> bool {
        use DType::*;
        matches!(dtype, F32 | F16 | Bf16 | F64 | I8 | I16 | I32 | I64 | U8 | Bool)
    }

    /// A tensor that shares `t`'s memory. torch never releases a structure that it refused, so whatever it might refuse
    /// is refused here: send the rest through a capsule.
    pub fn to_py<'py>(&self, py: Python<'py>, t: OwnedTensor) -> PyResult<Bound<'py, PyAny>> {
        if !Self::takes(t.view.dtype) {
            return Err(PyBufferError::new_err(format!(
                "the exchange table is not used for {}",
                t.view.dtype
            )));
        }
        let (ptr, device) = (t.view.ptr, device_of(t.view.place));
        let managed = managed::versioned(t, ptr, device, DlpackFlags::empty());
        let mut out = ptr::null_mut();
        // SAFETY: the structure is valid and its ownership goes to the callee.
        if unsafe { (self.make)(managed.as_ptr(), &mut out) } != 0 {
            return Err(PyErr::fetch(py));
        }
        // SAFETY: on success `out` is a new reference (or null with an exception set, should the callee misbehave).
        unsafe { Bound::from_owned_ptr_or_err(py, out.cast::<ffi::PyObject>()) }
    }
}

pub(super) fn device_of(place: Place) -> DLDevice {
    match place {
        Place::Device(device_id) => DLDevice {
            device_type: DLDeviceType::CUDA,
            device_id,
        },
        Place::Host => DLDevice {
            device_type: DLDeviceType::CPU,
            device_id: 0,
        },
    }
}

/// torch found no strided memory behind the tensor: sparse, meta, quantised, or inside a functional transform.
#[cold]
pub(crate) fn refused(py: Python<'_>, name: &str, cause: PyErr) -> PyErr {
    let e = Error::input(
        Kind::Layout,
        name,
        format!("a tensor that torch cannot show as memory ({})", errors::brief(py, &cause)),
        "a dense tensor with memory of its own",
        "Sparse, quantised, meta and transformed tensors must be made dense first.",
    );
    errors::caused_by(py, e, cause)
}
