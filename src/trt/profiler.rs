//! Our `IProfiler`: the time of each layer of an enqueue.

use super::abi::{context as context_slot, profiler as abi};
use super::library::Library;
use super::logger::language;
use super::object::{call, text, InterfaceInfo, VTable};
use super::Context;
use crate::error::Result;
use std::ffi::{c_char, c_void};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Mutex;

/// Milliseconds of one layer in one run.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTime {
    pub name: String,
    pub ms: f32,
}

#[derive(Debug)]
#[repr(C)]
pub(super) struct Profiler {
    vptr: *const *const c_void,
    times: Mutex<Vec<LayerTime>>,
}

// SAFETY: the vptr points to a leaked, immutable table; the times are behind a lock.
unsafe impl Send for Profiler {}

extern "C" fn report(this: *mut c_void, layer: *const c_char, ms: f32) {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: TensorRT passes the profiler that the context was given, and a NUL-terminated string.
        unsafe {
            let name = text(layer);
            let times = &(*this.cast::<Profiler>()).times;
            times.lock().unwrap_or_else(|e| e.into_inner()).push(LayerTime { name, ms });
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

impl Profiler {
    /// Boxed, because TensorRT keeps its address.
    fn new(lib: &Library) -> Box<Profiler> {
        let mut t = VTable::new(lib, abi::ALL.len());
        // Both are part of the interface since 11 only.
        t.set(lib, &abi::GET_API_LANGUAGE, language as *const c_void);
        t.set(lib, &abi::GET_INTERFACE_INFO, info as *const c_void);
        t.set(lib, &abi::REPORT_LAYER_TIME, report as *const c_void);
        Box::new(Profiler {
            vptr: t.leak(),
            times: Mutex::new(Vec::new()),
        })
    }

    /// What was reported since this was asked last.
    fn take(&self) -> Vec<LayerTime> {
        std::mem::take(&mut *self.times.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

impl Context {
    /// Measures each layer from now on: TensorRT then waits inside `enqueueV3`. A context keeps its profiler (10.6 refuses to take
    /// none again), so this is for contexts that serve nothing else.
    pub fn measure_layers(&mut self) -> Result<()> {
        let profiler = Profiler::new(self.engine().lib);
        let p = std::ptr::from_ref(&*profiler).cast_mut().cast::<c_void>();
        // SAFETY: VExecutionContext::setProfiler(IProfiler*); the context's field keeps the box until the context is gone.
        unsafe {
            call!(
                self.engine().lib,
                self.object(),
                context_slot::SET_PROFILER,
                fn(*mut c_void) -> (),
                p
            )
        }?;
        self.keep_profiler(profiler);
        Ok(())
    }

    /// The layer times since this was asked last.
    pub fn layer_times(&self) -> Vec<LayerTime> {
        self.profiler().map(Profiler::take).unwrap_or_default()
    }
}
