//! A callable type with a vectorcall slot, which `#[pyclass]` cannot set.
//!
//! Through `tp_call` every call of `engine(x=…)` would build a tuple and a dict first; vectorcall hands over the caller's
//! own argument array (60 instead of 590 ns for five keywords). The type derives from a pyclass that holds the state, adds
//! one pointer to each instance, and behaves like any other heap type: Python can subclass it and override `__call__`.

use pyo3::exceptions::{PyRuntimeError, PyTypeError};
use pyo3::ffi;
use pyo3::panic::PanicException;
use pyo3::prelude::*;
use pyo3::types::{PyTuple, PyType};
use pyo3::Borrowed;
use std::any::Any;
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::mem::{size_of, transmute};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr;
use std::sync::OnceLock;

/// Gets the positional arguments, then the values of the keywords in the order of `kwnames`.
pub type Handler = for<'py> fn(
    slf: &Bound<'py, PyAny>,
    args: &[Borrowed<'_, 'py, PyAny>],
    kwnames: Option<&Bound<'py, PyTuple>>,
) -> PyResult<Bound<'py, PyAny>>;

/// In the limited API since 3.12 only, but with this meaning in every version since 3.8 (PEP 590).
const HAVE_VECTORCALL: std::ffi::c_ulong = 1 << 11;
const ARGUMENTS_OFFSET: usize = 1 << (usize::BITS - 1);

extern "C" {
    // Exported since 3.8; in the limited API since 3.12, which is why pyo3 does not declare it for abi3-py310.
    fn PyVectorcall_Call(callable: *mut ffi::PyObject, args: *mut ffi::PyObject, kwargs: *mut ffi::PyObject) -> *mut ffi::PyObject;
}

/// What the C functions of one type need. A plain function pointer cannot carry data, so every type takes one of a few
/// places, and each place has functions of its own.
struct Place {
    handler: Handler,
    base_new: ffi::newfunc,
    /// Where in the instance the vectorcall pointer lies.
    offset: usize,
}

const PLACES: usize = 4;
static TAKEN: [OnceLock<Place>; PLACES] = [const { OnceLock::new() }; PLACES];
const NEW: [ffi::newfunc; PLACES] = [new::<0>, new::<1>, new::<2>, new::<3>];
const CALL: [ffi::vectorcallfunc; PLACES] = [call::<0>, call::<1>, call::<2>, call::<3>];

/// Makes the type `name` (`"package.module.Type"`) over `base`, a pyclass that allows subclasses. At most four in a process.
pub fn callable_type<'py>(
    py: Python<'py>,
    name: &CStr,
    doc: &CStr,
    base: &Bound<'py, PyType>,
    handler: Handler,
) -> PyResult<Bound<'py, PyType>> {
    let size: usize = base.getattr("__basicsize__")?.extract()?;
    // SAFETY: a heap type (every pyclass is one); the slot holds a function of this signature or null.
    let base_new = unsafe { transmute::<*mut c_void, Option<ffi::newfunc>>(ffi::PyType_GetSlot(base.as_type_ptr(), ffi::Py_tp_new)) };
    let base_new = base_new.ok_or_else(|| PyTypeError::new_err("the base type has no constructor"))?;
    let offset = size.next_multiple_of(size_of::<ffi::vectorcallfunc>());
    let basicsize =
        c_int::try_from(offset + size_of::<ffi::vectorcallfunc>()).map_err(|_| PyTypeError::new_err("the base type is too large"))?;

    let mut place = Place { handler, base_new, offset };
    let mut index = None;
    for (i, cell) in TAKEN.iter().enumerate() {
        match cell.set(place) {
            Ok(()) => {
                index = Some(i);
                break;
            }
            Err(back) => place = back,
        }
    }
    let index = index.ok_or_else(|| PyRuntimeError::new_err("too many callable types in this process"))?;

    let members = [
        ffi::PyMemberDef {
            name: c"__vectorcalloffset__".as_ptr(),
            type_code: ffi::Py_T_PYSSIZET,
            offset: offset as ffi::Py_ssize_t,
            flags: ffi::Py_READONLY,
            doc: ptr::null(),
        },
        ffi::PyMemberDef::default(),
    ];
    // Python keeps the pointers to the methods, and before 3.11 that to the name too.
    let methods: &'static mut [ffi::PyMethodDef; 2] = Box::leak(Box::new([
        ffi::PyMethodDef {
            ml_name: c"__reduce__".as_ptr(),
            ml_meth: ffi::PyMethodDefPointer {
                PyCFunction: refuse_pickling,
            },
            ml_flags: ffi::METH_NOARGS,
            ml_doc: ptr::null(),
        },
        ffi::PyMethodDef::zeroed(),
    ]));
    let name: &'static CStr = Box::leak(name.to_owned().into_boxed_c_str());
    let slot = |slot: c_int, pfunc: *mut c_void| ffi::PyType_Slot { slot, pfunc };
    let mut slots = [
        slot(ffi::Py_tp_new, NEW[index] as *mut c_void),
        slot(ffi::Py_tp_call, PyVectorcall_Call as *mut c_void),
        slot(ffi::Py_tp_doc, doc.as_ptr().cast_mut().cast()),
        slot(ffi::Py_tp_members, members.as_ptr().cast_mut().cast()),
        slot(ffi::Py_tp_methods, methods.as_mut_ptr().cast()),
        ffi::PyType_Slot::default(),
    ];
    let mut spec = ffi::PyType_Spec {
        name: name.as_ptr(),
        basicsize,
        itemsize: 0,
        flags: (ffi::Py_TPFLAGS_DEFAULT | ffi::Py_TPFLAGS_BASETYPE | HAVE_VECTORCALL) as c_uint,
        slots: slots.as_mut_ptr(),
    };
    let bases = PyTuple::new(py, [base])?;
    // No dealloc slot: Python then gives the type the one of its own heap types, which ends in the base's. Nor anything
    // about cycles: a base that takes part in collection passes that on.
    // SAFETY: slots and members are read, and members copied, during the call; name and methods live for ever.
    unsafe {
        Bound::from_owned_ptr_or_err(py, ffi::PyType_FromSpecWithBases(&mut spec, bases.as_ptr()))?
            .cast_into::<PyType>()
            .map_err(PyErr::from)
    }
}

unsafe extern "C" fn new<const I: usize>(
    ty: *mut ffi::PyTypeObject,
    args: *mut ffi::PyObject,
    kwargs: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    let Some(place) = TAKEN[I].get() else { return ptr::null_mut() };
    // SAFETY: the arguments are passed on as they came. The base allocates by `ty`, whose size includes our pointer.
    unsafe {
        let made = (place.base_new)(ty, args, kwargs);
        if !made.is_null() {
            made.byte_add(place.offset).cast::<ffi::vectorcallfunc>().write(CALL[I]);
        }
        made
    }
}

unsafe extern "C" fn call<const I: usize>(
    callable: *mut ffi::PyObject,
    args: *const *mut ffi::PyObject,
    nargsf: usize,
    kwnames: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    attached(|py| {
        let outcome = match TAKEN[I].get() {
            None => Err(PyRuntimeError::new_err("the callable type was not made")),
            // SAFETY: vectorcall passes a callable, `nargs` positional values and one value per name, all borrowed for the
            // call. `Borrowed` is a transparent pointer to an object.
            Some(place) => unsafe {
                let slf = Borrowed::from_ptr(py, callable);
                let kwnames = (!kwnames.is_null()).then(|| Borrowed::from_ptr(py, kwnames));
                let kwnames = match &kwnames {
                    Some(names) => names.cast::<PyTuple>().ok(),
                    None => None,
                };
                let n = (nargsf & !ARGUMENTS_OFFSET) + kwnames.map_or(0, |k| k.len());
                let args = match n {
                    0 => &[],
                    _ => std::slice::from_raw_parts(args.cast::<Borrowed<'_, '_, PyAny>>(), n),
                };
                catch_unwind(AssertUnwindSafe(|| (place.handler)(&slf, args, kwnames.as_deref())))
                    .unwrap_or_else(|payload| Err(panicked(payload)))
            },
        };
        match outcome {
            Ok(result) => result.into_ptr(),
            Err(e) => {
                e.restore(py);
                ptr::null_mut()
            }
        }
    })
}

/// Python holds the interpreter already when it calls us; this tells pyo3 so. While the interpreter shuts down pyo3 declines
/// (`attach` would panic, and with that abort the process), and the call fails with an exception.
fn attached(f: impl FnOnce(Python<'_>) -> *mut ffi::PyObject) -> *mut ffi::PyObject {
    Python::try_attach(f).unwrap_or_else(|| {
        // SAFETY: called by Python, so the interpreter is held.
        unsafe { ffi::PyErr_SetString(ffi::PyExc_RuntimeError, c"the interpreter is shutting down".as_ptr()) };
        ptr::null_mut()
    })
}

#[cold]
fn panicked(payload: Box<dyn Any + Send>) -> PyErr {
    let text = payload
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned());
    PanicException::new_err(text.unwrap_or_else(|| "panic in native code".into()))
}

unsafe extern "C" fn refuse_pickling(slf: *mut ffi::PyObject, _: *mut ffi::PyObject) -> *mut ffi::PyObject {
    attached(|py| {
        // SAFETY: Python passes the instance, borrowed for the call.
        let slf = unsafe { Borrowed::from_ptr(py, slf) };
        let name = slf.get_type().name().map(|n| n.to_string()).unwrap_or_default();
        PyTypeError::new_err(format!(
            "cannot pickle or copy '{name}' object: it owns native resources of this process. Pass what it was made from (the path), \
             and make it again there."
        ))
        .restore(py);
        ptr::null_mut()
    })
}

const _: () = assert!(size_of::<Borrowed<'static, 'static, PyAny>>() == size_of::<*mut c_char>());
