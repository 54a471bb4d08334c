//! C++ objects: calling theirs, and making ours.

use super::abi::{Slot, DELETING_DESTRUCTOR, IMPL_OFFSET};
use super::library::Library;
use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use std::ffi::{c_char, c_void, CStr};
use std::ptr::NonNull;

/// TensorRT's `Dims`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawDims {
    pub rank: i32,
    pub d: [i64; 8],
}

const _: () = assert!(std::mem::size_of::<RawDims>() == super::abi::DIMS_BYTES);

impl From<&Dims> for RawDims {
    fn from(dims: &Dims) -> RawDims {
        let mut d = [0; 8];
        d[..dims.rank()].copy_from_slice(dims.as_slice());
        RawDims {
            rank: dims.rank() as i32,
            d,
        }
    }
}

impl RawDims {
    /// `None` for the rank -1 that TensorRT gives for an unknown tensor.
    pub fn dims(&self) -> Option<Dims> {
        let n = usize::try_from(self.rank).ok()?;
        Dims::new(self.d.get(..n)?)
    }
}

/// The public pointer of an object that TensorRT made and something else owns.
#[derive(Clone, Copy, Debug)]
pub struct Handle(NonNull<c_void>);

// SAFETY: the pointer may move between threads; which calls may run at once is the owner's business (see Engine, Context).
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// `None` for null and for the small non-null pointers that some factories return on failure (abi facts §9: 0x238).
    pub fn new(p: *mut c_void) -> Option<Handle> {
        if (p as usize) < 4096 {
            return None;
        }
        NonNull::new(p).map(Handle)
    }

    pub fn public(&self) -> *mut c_void {
        self.0.as_ptr()
    }

    /// The implementation, which every method of the V classes takes as `this`.
    #[inline]
    pub fn implementation(&self) -> *mut c_void {
        // SAFETY: a public object is `{vptr, impl}` (verified for every supported version).
        unsafe { *self.0.as_ptr().byte_add(IMPL_OFFSET).cast::<*mut c_void>() }
    }

    /// The function behind a slot of the implementation's vtable; a typed error when this version lacks it.
    ///
    /// SAFETY: `F` must be the `extern "C"` signature of that method with a leading `this`.
    pub unsafe fn method<F: Copy>(&self, lib: &Library, slot: &Slot) -> Result<F> {
        // SAFETY: the implementation begins with its vptr; the rest is the caller's.
        unsafe { in_table(self.implementation(), lib, slot) }
    }

    /// As `method`, for the classes without an implementation behind them (the ONNX parser's): the object's own vtable.
    ///
    /// SAFETY: as for `method`.
    pub unsafe fn own_method<F: Copy>(&self, lib: &Library, slot: &Slot) -> Result<F> {
        // SAFETY: the object begins with its vptr; the rest is the caller's.
        unsafe { in_table(self.public(), lib, slot) }
    }
}

/// SAFETY: `object` must begin with the vptr of the slot's class, and `F` be the method's signature.
unsafe fn in_table<F: Copy>(object: *mut c_void, lib: &Library, slot: &Slot) -> Result<F> {
    const { assert!(std::mem::size_of::<F>() == std::mem::size_of::<*const ()>()) };
    let index = lib.slot(slot)?;
    // SAFETY: the caller's; the table has this slot in this version.
    unsafe {
        let vtable = *object.cast::<*const *const c_void>();
        Ok(std::mem::transmute_copy(&*vtable.add(index)))
    }
}

/// An object that TensorRT made and we own; destroyed on drop.
#[derive(Debug)]
pub struct Object(Handle);

impl Object {
    pub fn new(p: *mut c_void) -> Option<Object> {
        Handle::new(p).map(Object)
    }
}

impl std::ops::Deref for Object {
    type Target = Handle;

    #[inline]
    fn deref(&self) -> &Handle {
        &self.0
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: slot 1 of the public vtable is the deleting destructor in every version; owned, so called once.
        unsafe {
            let vtable = *self.public().cast::<*const unsafe extern "C" fn(*mut c_void)>();
            (*vtable.add(DELETING_DESTRUCTOR))(self.public());
        }
    }
}

/// `call!(lib, object, slot, fn(args) -> ret, values…)`: a method call as `Result<ret>`. Stands inside `unsafe` blocks.
macro_rules! call {
    ($lib:expr, $object:expr, $slot:expr, fn($($t:ty),*) -> $r:ty $(, $v:expr)* $(,)?) => {
        $object
            .method::<unsafe extern "C" fn(*mut ::std::ffi::c_void $(, $t)*) -> $r>($lib, &$slot)
            .map(|f| f($object.implementation() $(, $v)*))
    };
}
pub(super) use call;

/// The same for objects without an implementation behind them.
macro_rules! own_call {
    ($lib:expr, $object:expr, $slot:expr, fn($($t:ty),*) -> $r:ty $(, $v:expr)* $(,)?) => {
        $object
            .own_method::<unsafe extern "C" fn(*mut ::std::ffi::c_void $(, $t)*) -> $r>($lib, &$slot)
            .map(|f| f($object.public() $(, $v)*))
    };
}
pub(super) use own_call;

/// What `IVersionedInterface::getInterfaceInfo` returns.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct InterfaceInfo {
    pub kind: *const c_char,
    pub major: i32,
    pub minor: i32,
}

/// A vtable for objects that we make: `[offset_to_top, type_info, slots…]`, leaked, one per interface and process.
pub struct VTable(Vec<*const c_void>);

impl VTable {
    /// A table of `slots` destructors that do nothing: TensorRT never owns our objects, and Rust frees them itself.
    pub fn new(lib: &Library, slots: usize) -> VTable {
        extern "C" fn nothing(_this: *mut c_void) {}
        let mut entries = vec![nothing as *const c_void; slots + 2];
        entries[0] = std::ptr::null();
        entries[1] = type_info(lib);
        VTable(entries)
    }

    /// Puts a function into the slot of that version; ignored where the version's interface has no such slot.
    pub fn set(&mut self, lib: &Library, slot: &Slot, function: *const c_void) {
        if let Some(entry) = slot.index(lib.version.major, lib.version.minor).and_then(|i| self.0.get_mut(i + 2)) {
            *entry = function;
        }
    }

    /// The address that goes into an object's first word.
    pub fn leak(self) -> *const *const c_void {
        // SAFETY: the table has two entries before slot 0.
        unsafe { Vec::leak(self.0).as_ptr().add(2) }
    }
}

/// A type_info for our objects, so that a `dynamic_cast` on one fails instead of crashing; null where libstdc++ is not
/// reachable through the library (no known TensorRT code casts these interfaces).
fn type_info(lib: &Library) -> *const c_void {
    #[repr(C)]
    struct TypeInfo {
        vptr: *const c_void,
        name: *const c_char,
    }
    let Some(table) = lib.symbol(c"_ZTVN10__cxxabiv117__class_type_infoE") else {
        return std::ptr::null();
    };
    // SAFETY: an object's vptr points 16 bytes into its class's table (Itanium C++ ABI).
    let vptr = unsafe { table.byte_add(16) };
    std::ptr::from_ref(Box::leak(Box::new(TypeInfo {
        vptr,
        name: c"13RustTrtObject".as_ptr(),
    })))
    .cast()
}

/// A C string of TensorRT's as text; empty for null.
///
/// SAFETY: `p` must be null or a NUL-terminated string that is alive.
pub unsafe fn text(p: *const c_char) -> String {
    if p.is_null() {
        return String::new();
    }
    // SAFETY: the caller's.
    unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned()
}

/// TensorRT said no to something that jetrt had checked: the lines it logged say why.
#[cold]
pub fn refused(what: impl Into<String>, mark: u64) -> Error {
    Error::new(Kind::Inference, what).with_log(crate::log::TENSORRT.since(mark))
}
