//! Our int8 calibrators (TensorRT 10): batches from the caller, the cache in and out.

use super::super::abi::{int8_entropy_calibrator_2 as entropy, int8_min_max_calibrator as min_max, Slot};
use super::super::library::Library;
use super::super::logger::language;
use super::super::object::{text, InterfaceInfo, VTable};
use crate::error::{Error, Result};
use std::ffi::{c_char, c_void};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Mutex;

/// The device addresses of the next batch for these input names, in order; `None` when the data are at an end. The copies to the
/// device must be finished when it returns.
pub type NextBatch = Box<dyn FnMut(&[String]) -> Result<Option<Vec<u64>>> + Send>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// `IInt8EntropyCalibrator2`.
    Entropy,
    /// `IInt8MinMaxCalibrator`.
    MinMax,
}

/// What the slots of one calibrator interface are called in `abi`.
struct Interface {
    slots: usize,
    /// Language, info, batch size, batch, read, write, algorithm.
    named: [Slot; 7],
    info: extern "C" fn(*mut c_void) -> InterfaceInfo,
    code: extern "C" fn(*mut c_void) -> i32,
}

macro_rules! interface {
    ($module:ident, $code:expr) => {{
        extern "C" fn info(_this: *mut c_void) -> InterfaceInfo {
            InterfaceInfo {
                kind: $module::KIND.as_ptr(),
                major: $module::INTERFACE_MAJOR,
                minor: $module::INTERFACE_MINOR,
            }
        }
        extern "C" fn code(_this: *mut c_void) -> i32 {
            $code
        }
        Interface {
            slots: $module::ALL.len(),
            named: [
                $module::GET_API_LANGUAGE,
                $module::GET_INTERFACE_INFO,
                $module::GET_BATCH_SIZE,
                $module::GET_BATCH,
                $module::READ_CALIBRATION_CACHE,
                $module::WRITE_CALIBRATION_CACHE,
                $module::GET_ALGORITHM,
            ],
            info,
            code,
        }
    }};
}

impl Algorithm {
    fn interface(self) -> Interface {
        use super::super::abi::calibration_algo_type as code;
        match self {
            Algorithm::Entropy => interface!(entropy, code::ENTROPY_CALIBRATION_2),
            Algorithm::MinMax => interface!(min_max, code::MINMAX_CALIBRATION),
        }
    }
}

struct State {
    next: NextBatch,
    /// Given to TensorRT when it asks.
    cache: Option<Vec<u8>>,
    /// What TensorRT wrote.
    written: Option<Vec<u8>>,
    batches: u64,
    error: Option<Error>,
}

#[repr(C)]
pub struct Calibrator {
    vptr: *const *const c_void,
    batch_size: i32,
    state: Mutex<State>,
}

// SAFETY: the vptr points to a leaked, immutable table; the state is behind a lock.
unsafe impl Send for Calibrator {}

/// SAFETY: `this` must be the address of a live Calibrator; TensorRT passes what `setInt8Calibrator` gave it.
unsafe fn calibrator<'a>(this: *mut c_void) -> &'a Calibrator {
    // SAFETY: the caller's.
    unsafe { &*this.cast::<Calibrator>() }
}

extern "C" fn batch_size(this: *mut c_void) -> i32 {
    // SAFETY: see `calibrator`.
    unsafe { calibrator(this) }.batch_size
}

extern "C" fn batch(this: *mut c_void, bindings: *mut *mut c_void, names: *const *const c_char, n: i32) -> bool {
    catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: see `calibrator`; both arrays have `n` entries, the names are NUL-terminated.
        unsafe {
            let mut s = calibrator(this).lock();
            s.batches += 1;
            let n = n.max(0) as usize;
            let wanted: Vec<String> = (0..n).map(|i| text(*names.add(i))).collect();
            match (s.next)(&wanted) {
                Ok(Some(addresses)) if addresses.len() == n => {
                    for (i, a) in addresses.into_iter().enumerate() {
                        *bindings.add(i) = a as *mut c_void;
                    }
                    true
                }
                Ok(_) => false,
                Err(e) => {
                    s.error = Some(e);
                    false
                }
            }
        }
    }))
    .unwrap_or(false)
}

extern "C" fn read_cache(this: *mut c_void, length: *mut u64) -> *const c_void {
    // SAFETY: see `calibrator`; the cache is not touched while TensorRT reads it (it changes only before and after a build).
    unsafe {
        let s = calibrator(this).lock();
        *length = s.cache.as_ref().map_or(0, |c| c.len() as u64);
        s.cache.as_ref().map_or(std::ptr::null(), |c| c.as_ptr().cast())
    }
}

extern "C" fn write_cache(this: *mut c_void, data: *const c_void, length: u64) {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: see `calibrator`; TensorRT passes that many bytes.
        unsafe {
            if !data.is_null() {
                calibrator(this).lock().written = Some(std::slice::from_raw_parts(data.cast::<u8>(), length as usize).to_vec());
            }
        }
    }));
}

impl Calibrator {
    /// Boxed, because TensorRT keeps its address.
    pub fn new(lib: &Library, algorithm: Algorithm, batch_size_: i32, cache: Option<Vec<u8>>, next: NextBatch) -> Result<Box<Calibrator>> {
        let i = algorithm.interface();
        // The interface is gone in 11: a typed error that says so.
        lib.slot(&i.named[3])?;
        let functions = [
            language as *const c_void,
            i.info as *const c_void,
            batch_size as *const c_void,
            batch as *const c_void,
            read_cache as *const c_void,
            write_cache as *const c_void,
            i.code as *const c_void,
        ];
        let mut t = VTable::new(lib, i.slots);
        for (slot, function) in i.named.iter().zip(functions) {
            t.set(lib, slot, function);
        }
        Ok(Box::new(Calibrator {
            vptr: t.leak(),
            batch_size: batch_size_,
            state: Mutex::new(State {
                next,
                cache,
                written: None,
                batches: 0,
                error: None,
            }),
        }))
    }

    pub fn public(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The cache that TensorRT wrote in this build.
    pub fn written(&self) -> Option<Vec<u8>> {
        self.lock().written.clone()
    }

    /// How often TensorRT asked for a batch: above 0 with a cache given means that it did not take the cache.
    pub fn batches(&self) -> u64 {
        self.lock().batches
    }

    /// Why a batch could not be had, if one could not.
    pub fn take_error(&self) -> Option<Error> {
        self.lock().error.take()
    }
}
