//! `__dlpack__` capsules, in and out, versioned (DLPack 1.x) and legacy.

use super::exchange::device_of;
use super::managed::{self, Managed};
use crate::error::{Error, Kind};
use crate::tensor::{OwnedTensor, Place};
use dlpark::ffi::{DLManagedTensor, DLManagedTensorVersioned};
use dlpark::DlpackFlags;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods};
use pyo3::{ffi, PyTypeInfo};
use std::ffi::CStr;

const LEGACY: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const USED_LEGACY: &CStr = c"used_dltensor";
const USED_VERSIONED: &CStr = c"used_dltensor_versioned";

/// Takes the tensor out of a capsule, which is renamed so that nobody takes it twice.
pub fn take(capsule: &Bound<'_, PyAny>, name: &str) -> PyResult<Managed> {
    let py = capsule.py();
    let refuse = |found: String| -> PyErr {
        Error::input(
            Kind::Layout,
            name,
            found,
            "a fresh DLPack capsule",
            "Call __dlpack__ again for every import.",
        )
        .into()
    };
    let Ok(capsule) = capsule.cast::<PyCapsule>() else {
        return Err(refuse(format!("an object of type {} from __dlpack__", capsule.get_type().name()?)));
    };
    if let Ok(t) = capsule.pointer_checked(Some(VERSIONED)) {
        let t = t.cast::<DLManagedTensorVersioned>();
        // SAFETY: the name says what it points to; the version lies first in every version of the structure.
        let version = unsafe { t.as_ref().version };
        if version.major != managed::VERSION.major {
            // Left in its capsule, whose destructor releases it.
            return Err(refuse(format!("a tensor of DLPack {}.{}", version.major, version.minor)));
        }
        rename(py, capsule, USED_VERSIONED)?;
        // SAFETY: valid, of major version 1, and ours since the rename.
        return Ok(unsafe { Managed::versioned(t) });
    }
    if let Ok(t) = capsule.pointer_checked(Some(LEGACY)) {
        rename(py, capsule, USED_LEGACY)?;
        // SAFETY: the name said what it points to, and it is ours since the rename.
        return Ok(unsafe { Managed::legacy(t.cast::<DLManagedTensor>()) });
    }
    let found = match capsule.name()? {
        // SAFETY: the name is copied before anybody could change it.
        Some(n) => unsafe { n.as_cstr() }.to_string_lossy().into_owned(),
        None => "no name".into(),
    };
    Err(refuse(format!("a capsule named {found}")))
}

fn rename(py: Python<'_>, capsule: &Bound<'_, PyCapsule>, name: &'static CStr) -> PyResult<()> {
    // SAFETY: a capsule, and a name that lives for ever.
    match unsafe { ffi::PyCapsule_SetName(capsule.as_ptr(), name.as_ptr()) } {
        0 => Ok(()),
        _ => Err(PyErr::fetch(py)),
    }
}

/// What a capsule says about its tensor.
#[derive(Clone, Copy, Default)]
pub struct Options {
    /// The consumer announced DLPack ≥ 1.0.
    pub versioned: bool,
    /// The consumer alone has this memory.
    pub copied: bool,
    /// Present memory that both sides reach as the host's.
    pub as_host: bool,
}

/// A capsule that shares the tensor's memory. Dropped unused, it releases the tensor.
pub fn give<'py>(py: Python<'py>, t: OwnedTensor, options: Options) -> PyResult<Bound<'py, PyCapsule>> {
    let (ptr, device) = match (options.as_host, t.host_ptr) {
        (false, _) => (t.view.ptr, device_of(t.view.place)),
        (true, Some(host)) => (host, device_of(Place::Host)),
        (true, None) => {
            return Err(PyBufferError::new_err(
                "this tensor lies in device memory that the host cannot read",
            ))
        }
    };
    let flags = if options.copied {
        DlpackFlags::IS_COPIED
    } else {
        DlpackFlags::empty()
    };
    let (pointer, name, destructor): (_, _, ffi::PyCapsule_Destructor) = if options.versioned {
        (managed::versioned(t, ptr, device, flags).cast(), VERSIONED, drop_versioned)
    } else {
        (managed::legacy(t, ptr, device).cast(), LEGACY, drop_legacy)
    };
    // SAFETY: pointer, name and destructor belong together.
    let made = unsafe { PyCapsule::new_with_pointer_and_destructor(py, pointer, name, Some(destructor)) };
    if made.is_err() {
        // SAFETY: no capsule was made, so the structure is still ours.
        unsafe {
            match options.versioned {
                true => drop(Managed::versioned(pointer.cast())),
                false => drop(Managed::legacy(pointer.cast())),
            }
        }
    }
    made
}

unsafe extern "C" fn drop_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: called by Python with the dying capsule; under its first name it still owns the structure.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) != 0 {
            let t = ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr());
            if let Some(t) = std::ptr::NonNull::new(t) {
                drop(Managed::versioned(t.cast()));
            }
        }
    }
}

unsafe extern "C" fn drop_legacy(capsule: *mut ffi::PyObject) {
    // SAFETY: as in `drop_versioned`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, LEGACY.as_ptr()) != 0 {
            let t = ffi::PyCapsule_GetPointer(capsule, LEGACY.as_ptr());
            if let Some(t) = std::ptr::NonNull::new(t) {
                drop(Managed::legacy(t.cast()));
            }
        }
    }
}

/// Is this object a capsule itself (given in place of the tensor that made it)?
pub fn is_capsule(obj: &Bound<'_, PyAny>) -> bool {
    PyCapsule::is_type_of(obj)
}

/// A copy of the bytes of a contiguous tensor that the host can read. The caller has waited for them.
pub fn host_bytes(t: &OwnedTensor) -> PyResult<Vec<u8>> {
    let bytes = t.view.bytes().and_then(|b| usize::try_from(b).ok()).filter(|_| t.view.contiguous);
    match (t.host_ptr, bytes) {
        (_, Some(0)) => Ok(Vec::new()),
        // SAFETY: the owner keeps that many bytes readable at `host`.
        (Some(host), Some(n)) if host != 0 => Ok(unsafe { std::slice::from_raw_parts(host as usize as *const u8, n) }.to_vec()),
        _ => Err(PyBufferError::new_err(format!(
            "{} cannot be copied: it is not contiguous memory that the host can read",
            t.view
        ))),
    }
}
