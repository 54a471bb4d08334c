//! Our `ILogger`: one object for the process, because TensorRT keeps the first one it is given.

use super::abi;
use super::library::Library;
use super::object::{text, InterfaceInfo, VTable};
use crate::log::{Severity, TENSORRT};
use std::ffi::{c_char, c_void};
use std::io::Write;
use std::panic::catch_unwind;

#[repr(C)]
pub struct Logger {
    vptr: *const *const c_void,
}

// SAFETY: immutable after construction; `log` only pushes into a locked queue.
unsafe impl Send for Logger {}
// SAFETY: as above.
unsafe impl Sync for Logger {}

extern "C" fn log(_this: *mut c_void, severity: i32, message: *const c_char) {
    // SAFETY: TensorRT passes a NUL-terminated string that lives during the call.
    let line = unsafe { text(message) };
    // A panic must not unwind into C++.
    let _ = catch_unwind(|| {
        // TensorRT can log thousands of verbose lines per load; Python's user asks for them by JETRT_LOG=verbose.
        let severity = Severity::from_code(severity);
        if severity <= Severity::Info && to_stderr() {
            let _ = writeln!(std::io::stderr(), "{line}");
        }
        if severity < Severity::Verbose || verbose() {
            TENSORRT.push(severity, line);
        }
    });
}

fn verbose() -> bool {
    static ON: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *ON.get_or_init(|| std::env::var_os("JETRT_LOG").is_some_and(|v| v == "verbose"))
}

/// In a process that may crash, where whoever started it reads what it prints: what is queued would be lost.
fn to_stderr() -> bool {
    static ON: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *ON.get_or_init(|| std::env::var_os("JETRT_LOG_STDERR").is_some_and(|v| v == "1"))
}

pub(super) extern "C" fn language(_this: *mut c_void) -> i32 {
    abi::api_language::CPP
}

extern "C" fn info(_this: *mut c_void) -> InterfaceInfo {
    InterfaceInfo {
        kind: abi::logger::KIND.as_ptr(),
        major: abi::logger::INTERFACE_MAJOR,
        minor: abi::logger::INTERFACE_MINOR,
    }
}

impl Logger {
    /// The layout depends on the major version, so the version must be known first.
    pub fn new(lib: &Library) -> Logger {
        let mut table = VTable::new(lib, abi::logger::ALL.len());
        table.set(lib, &abi::logger::LOG, log as *const c_void);
        table.set(lib, &abi::logger::GET_API_LANGUAGE, language as *const c_void);
        table.set(lib, &abi::logger::GET_INTERFACE_INFO, info as *const c_void);
        Logger { vptr: table.leak() }
    }

    pub fn public(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}
