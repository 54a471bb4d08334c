//! Our `IOutputAllocator`: memory for outputs whose size only the data decides.

use super::abi::output_allocator as abi;
use super::library::Library;
use super::logger::language;
use super::object::{InterfaceInfo, RawDims, VTable};
use crate::error::{Error, Result};
use crate::shape::Dims;
use std::ffi::{c_char, c_void};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Mutex, OnceLock};

/// Gives memory of at least that many bytes and returns its address. Called by TensorRT inside `enqueueV3`.
pub type Grow = Box<dyn FnMut(u64) -> Result<u64> + Send>;

/// One data-dependent output of one context. Boxed by its owner: TensorRT keeps its address.
#[repr(C)]
pub struct OutputAllocator {
    vptr: *const *const c_void,
    state: Mutex<State>,
}

struct State {
    grow: Option<Grow>,
    shape: Option<Dims>,
    error: Option<Error>,
}

// SAFETY: the state is behind a lock; the vptr points to a leaked, immutable table.
unsafe impl Send for OutputAllocator {}
// SAFETY: as above.
unsafe impl Sync for OutputAllocator {}

/// SAFETY: `this` must be the address of a live OutputAllocator; TensorRT passes what `set_output_allocator` gave it.
unsafe fn state<'a>(this: *mut c_void) -> std::sync::MutexGuard<'a, State> {
    // SAFETY: the caller's.
    unsafe { &*this.cast::<OutputAllocator>() }
        .state
        .lock()
        .unwrap_or_else(|e| e.into_inner())
}

extern "C" fn reallocate(this: *mut c_void, _name: *const c_char, _current: *mut c_void, size: u64, _alignment: u64) -> *mut c_void {
    // A panic must not unwind into C++. cuMemAlloc aligns to 256 bytes, which is the most that TensorRT asks for outputs.
    catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: TensorRT calls with the object it was given, which lives as long as its context.
        let mut s = unsafe { state(this) };
        match s.grow.as_mut().map(|grow| grow(size)) {
            Some(Ok(p)) => p as *mut c_void,
            Some(Err(e)) => {
                s.error = Some(e);
                std::ptr::null_mut()
            }
            None => std::ptr::null_mut(),
        }
    }))
    .unwrap_or(std::ptr::null_mut())
}

extern "C" fn reallocate_async(
    this: *mut c_void,
    name: *const c_char,
    current: *mut c_void,
    size: u64,
    alignment: u64,
    _stream: *mut c_void,
) -> *mut c_void {
    reallocate(this, name, current, size, alignment)
}

extern "C" fn notify_shape(this: *mut c_void, _name: *const c_char, dims: *const RawDims) {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        if !dims.is_null() {
            // SAFETY: as in `reallocate`; the reference lives during the call.
            unsafe { state(this).shape = (*dims).dims() };
        }
    }));
}

extern "C" fn info(_this: *mut c_void) -> InterfaceInfo {
    InterfaceInfo {
        kind: abi::KIND.as_ptr(),
        major: abi::INTERFACE_MAJOR,
        minor: abi::INTERFACE_MINOR,
    }
}

struct Table(*const *const c_void);
// SAFETY: points to a leaked, immutable table.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}
static TABLE: OnceLock<Table> = OnceLock::new();

impl OutputAllocator {
    pub fn new(lib: &Library) -> Box<OutputAllocator> {
        let table = TABLE.get_or_init(|| {
            let mut t = VTable::new(lib, abi::ALL.len());
            t.set(lib, &abi::GET_API_LANGUAGE, language as *const c_void);
            t.set(lib, &abi::GET_INTERFACE_INFO, info as *const c_void);
            t.set(lib, &abi::REALLOCATE_OUTPUT, reallocate as *const c_void);
            t.set(lib, &abi::REALLOCATE_OUTPUT_ASYNC, reallocate_async as *const c_void);
            t.set(lib, &abi::NOTIFY_SHAPE, notify_shape as *const c_void);
            Table(t.leak())
        });
        Box::new(OutputAllocator {
            vptr: table.0,
            state: Mutex::new(State {
                grow: None,
                shape: None,
                error: None,
            }),
        })
    }

    pub fn public(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    /// Before an enqueue: how to get memory for this call.
    pub fn arm(&self, grow: Grow) {
        *self.lock() = State {
            grow: Some(grow),
            shape: None,
            error: None,
        };
    }

    /// After an enqueue: the shape that TensorRT told, or the error of the allocation that failed.
    pub fn disarm(&self) -> Result<Option<Dims>> {
        let mut s = self.lock();
        s.grow = None;
        match s.error.take() {
            Some(e) => Err(e),
            None => Ok(s.shape.take()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}
