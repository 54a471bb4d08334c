//! Our `IProgressMonitor`: collects what TensorRT reports, and asks it to stop.

use super::super::abi::progress_monitor as abi;
use super::super::library::Library;
use super::super::logger::language;
use super::super::object::{text, InterfaceInfo, VTable};
use std::ffi::{c_char, c_void};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// `number`: the steps of a phase that starts, the step that is done.
#[derive(Debug, Clone)]
pub struct Event {
    pub kind: &'static str,
    pub phase: String,
    pub parent: String,
    pub number: i32,
}

/// What whoever watches a build shares with it.
#[derive(Debug, Default)]
pub struct Progress {
    events: Mutex<Vec<Event>>,
    cancelled: AtomicBool,
}

impl Progress {
    /// What happened since this was asked last.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.events.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// TensorRT is told at the next step; there may be none for a long time.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn push(&self, event: Event) {
        self.events.lock().unwrap_or_else(|e| e.into_inner()).push(event);
    }
}

#[repr(C)]
pub struct Monitor {
    vptr: *const *const c_void,
    progress: Arc<Progress>,
}

// SAFETY: the vptr points to a leaked, immutable table; the rest is shared by locks.
unsafe impl Send for Monitor {}

/// SAFETY: `this` must be the address of a live Monitor; TensorRT passes what `setProgressMonitor` gave it.
unsafe fn progress<'a>(this: *mut c_void) -> &'a Progress {
    // SAFETY: the caller's.
    unsafe { &(*this.cast::<Monitor>()).progress }
}

extern "C" fn phase_start(this: *mut c_void, phase: *const c_char, parent: *const c_char, steps: i32) {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: TensorRT passes the object and NUL-terminated strings (or null) that live during the call.
        unsafe {
            let (phase, parent) = (text(phase), text(parent));
            progress(this).push(Event {
                kind: "start",
                phase,
                parent,
                number: steps,
            });
        }
    }));
}

extern "C" fn step_complete(this: *mut c_void, phase: *const c_char, step: i32) -> bool {
    catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: as in `phase_start`.
        unsafe {
            let p = progress(this);
            p.push(Event {
                kind: "step",
                phase: text(phase),
                parent: String::new(),
                number: step,
            });
            !p.is_cancelled()
        }
    }))
    .unwrap_or(true)
}

extern "C" fn phase_finish(this: *mut c_void, phase: *const c_char) {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: as in `phase_start`.
        unsafe {
            progress(this).push(Event {
                kind: "finish",
                phase: text(phase),
                parent: String::new(),
                number: 0,
            });
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

impl Monitor {
    /// Boxed, because TensorRT keeps its address. A build makes one, so its table may as well be its own.
    pub fn new(lib: &Library, progress: Arc<Progress>) -> Box<Monitor> {
        let mut t = VTable::new(lib, abi::ALL.len());
        t.set(lib, &abi::GET_API_LANGUAGE, language as *const c_void);
        t.set(lib, &abi::GET_INTERFACE_INFO, info as *const c_void);
        t.set(lib, &abi::PHASE_START, phase_start as *const c_void);
        t.set(lib, &abi::STEP_COMPLETE, step_complete as *const c_void);
        t.set(lib, &abi::PHASE_FINISH, phase_finish as *const c_void);
        Box::new(Monitor { vptr: t.leak(), progress })
    }

    pub fn public(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}
