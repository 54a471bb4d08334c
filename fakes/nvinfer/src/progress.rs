//! The caller's progress monitor, and phases as the builder reports them.

use std::ffi::{c_char, CString};

use crate::abi::progress_monitor as slots;
use crate::object::user_method;

pub struct Progress {
    monitor: usize,
    open: Vec<(CString, i32, i32)>,
    canceled: bool,
}

impl Progress {
    pub fn new(monitor: usize) -> Progress {
        Progress {
            monitor,
            open: Vec::new(),
            canceled: false,
        }
    }

    pub fn start(&mut self, name: &str, steps: i32) {
        let name = CString::new(name).unwrap_or_default();
        let parent = self.open.last().map_or(std::ptr::null(), |(parent, ..)| parent.as_ptr());
        if self.monitor != 0 {
            // SAFETY: the caller's monitor, by its slot.
            unsafe {
                if let Some(method) = user_method(self.monitor as *mut u8, slots::PHASE_START) {
                    let method: unsafe extern "C" fn(*mut u8, *const c_char, *const c_char, i32) = std::mem::transmute(method);
                    method(self.monitor as *mut u8, name.as_ptr(), parent, steps.max(1));
                }
            }
        }
        self.open.push((name, 0, steps.max(1)));
    }

    /// One more step of the innermost phase; false: the caller wants an end.
    pub fn step(&mut self) -> bool {
        let Some((name, done, steps)) = self.open.last_mut() else {
            return true;
        };
        let step = *done;
        if step >= *steps {
            return !self.canceled;
        }
        *done += 1;
        if self.monitor != 0 {
            // SAFETY: as above.
            unsafe {
                if let Some(method) = user_method(self.monitor as *mut u8, slots::STEP_COMPLETE) {
                    let method: unsafe extern "C" fn(*mut u8, *const c_char, i32) -> bool = std::mem::transmute(method);
                    self.canceled |= !method(self.monitor as *mut u8, name.as_ptr(), step);
                }
            }
        }
        !self.canceled
    }

    /// Steps up to this share of the innermost phase, at least asking once.
    pub fn up_to(&mut self, share: f64) -> bool {
        let Some(&(_, done, steps)) = self.open.last() else { return true };
        let wanted = ((f64::from(steps) * share) as i32).min(steps - 1);
        (done..wanted).all(|_| self.step()) && !self.canceled
    }

    /// All the steps that are left of the innermost phase.
    pub fn rest(&mut self) -> bool {
        let Some(&(_, done, steps)) = self.open.last() else { return true };
        (done..steps).all(|_| self.step())
    }

    pub fn finish(&mut self) {
        let Some((name, ..)) = self.open.pop() else { return };
        if self.monitor == 0 {
            return;
        }
        // SAFETY: as above.
        unsafe {
            if let Some(method) = user_method(self.monitor as *mut u8, slots::PHASE_FINISH) {
                let method: unsafe extern "C" fn(*mut u8, *const c_char) = std::mem::transmute(method);
                method(self.monitor as *mut u8, name.as_ptr());
            }
        }
    }

    /// What is still open when a build ends early is finished too.
    pub fn finish_all(&mut self) {
        while !self.open.is_empty() {
            self.finish();
        }
    }
}
