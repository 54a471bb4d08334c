//! A stand-in for TensorRT and its ONNX parser (`libnvinfer.so.10` or `.so.11`, by FAKE_TRT_VERSION): real object layout and slot numbers, real
//! rules about shapes, addresses, streams and capture, and about building; its work done through the driver stand-in, its failures worded
//! like TensorRT's.
#![allow(clippy::missing_safety_doc, clippy::too_many_arguments)]

#[path = "../../../src/trt/abi.rs"]
mod abi;
mod builder;
mod calibrate;
mod compile;
mod config;
mod context;
mod driver;
mod engine;
mod faults;
mod graph;
mod inspector;
mod network;
mod object;
mod onnx;
mod parser;
mod plan;
mod precision;
mod profile;
mod program;
mod progress;
mod record;
mod refit;
mod runtime;

use std::ffi::{c_char, c_void, CStr, CString};

use object::{user_method, Public};
use record::{called, mistake, version};

/// The caller's logger and error recorder.
#[derive(Clone, Copy)]
pub struct Reporter {
    pub logger: usize,
    pub recorder: usize,
}

impl Reporter {
    pub fn log(&self, severity: i32, text: &str) {
        let Ok(line) = CString::new(text) else { return };
        // SAFETY: the logger outlives what was made with it, and its table has the layout of this version.
        unsafe {
            if let Some(method) = user_method(self.logger as *mut u8, abi::logger::LOG) {
                let method: unsafe extern "C" fn(*mut u8, i32, *const c_char) = std::mem::transmute(method);
                method(self.logger as *mut u8, severity, line.as_ptr());
            }
            if severity <= abi::severity::ERROR && self.recorder != 0 {
                if let Some(method) = user_method(self.recorder as *mut u8, abi::error_recorder::REPORT_ERROR) {
                    let method: unsafe extern "C" fn(*mut u8, i32, *const c_char) -> bool = std::mem::transmute(method);
                    method(self.recorder as *mut u8, abi::error_code::INTERNAL_ERROR, line.as_ptr());
                }
            }
        }
    }

    pub fn error(&self, text: &str) {
        self.log(abi::severity::ERROR, text);
    }

    pub unsafe fn set_recorder(&mut self, recorder: *mut u8) {
        object::check_kind(recorder, abi::error_recorder::GET_INTERFACE_INFO, abi::error_recorder::KIND);
        for (object, slot) in [
            (recorder as usize, abi::error_recorder::INC_REF_COUNT),
            (self.recorder, abi::error_recorder::DEC_REF_COUNT),
        ] {
            if object == 0 {
                continue;
            }
            if let Some(method) = user_method(object as *mut u8, slot) {
                let method: unsafe extern "C" fn(*mut u8) -> i32 = std::mem::transmute(method);
                method(object as *mut u8);
            }
        }
        self.recorder = recorder as usize;
    }
}

/// Counts a call; when it is the one told to fail, says so through the logger and answers false.
pub fn allowed(reporter: &Reporter, class: &str, method: &str) -> bool {
    if called(method) {
        return true;
    }
    reporter.error(&format!(
        "{class}::{method}: Error Code 2: Internal Error (this call was told to fail)"
    ));
    false
}

pub unsafe fn text<'a>(pointer: *const c_char) -> &'a CStr {
    if pointer.is_null() {
        c""
    } else {
        CStr::from_ptr(pointer)
    }
}

/// What the real factories return on failure: the offset of the public object, added to a null pointer.
const FAILED: usize = 0x238;

#[no_mangle]
pub extern "C" fn getInferLibVersion() -> i32 {
    let (major, minor, patch, _) = version();
    (major * 10000 + minor * 100 + patch) as i32
}

#[no_mangle]
pub extern "C" fn getInferLibMajorVersion() -> i32 {
    version().0 as i32
}

#[no_mangle]
pub extern "C" fn getInferLibMinorVersion() -> i32 {
    version().1 as i32
}

#[no_mangle]
pub extern "C" fn getInferLibPatchVersion() -> i32 {
    version().2 as i32
}

#[no_mangle]
pub extern "C" fn getInferLibBuildVersion() -> i32 {
    version().3 as i32
}

/// What every factory begins with: the logger in this version's layout, and the call's own failure.
unsafe fn reporter(logger: *mut u8, factory: &str) -> Option<Reporter> {
    let (major, minor, ..) = version();
    if abi::logger::LOG.index(major, minor).is_none() {
        eprintln!("fake nvinfer: {factory} of version {major}.{minor}, whose layout nobody knows");
        std::process::abort();
    }
    if logger.is_null() {
        return None;
    }
    if major >= 11 {
        object::check_kind(logger, abi::logger::GET_INTERFACE_INFO, abi::logger::KIND);
    }
    let reporter = Reporter {
        logger: logger as usize,
        recorder: 0,
    };
    if !called(factory) {
        reporter.error(&format!("{factory}: Error Code 2: Internal Error (this call was told to fail)"));
        return None;
    }
    Some(reporter)
}

/// An object that needs the GPU.
unsafe fn on_device(logger: *mut u8, factory: &str, make: impl FnOnce(Reporter) -> *mut Public) -> *mut Public {
    let Some(reporter) = reporter(logger, factory) else {
        return FAILED as *mut Public;
    };
    match driver::driver().map_err(str::to_owned).and_then(|driver| driver.attach()) {
        Ok(_) => {
            reporter.log(
                abi::severity::INFO,
                "[MemUsageChange] Init CUDA: CPU +1, GPU +0, now: CPU 1, GPU 0 (MiB)",
            );
            make(reporter)
        }
        Err(why) => {
            reporter.error(&format!("{factory}: Error Code 6: API Usage Error ({why})"));
            FAILED as *mut Public
        }
    }
}

#[no_mangle]
pub unsafe extern "C" fn createInferRuntime_INTERNAL(logger: *mut u8, _version: i32) -> *mut Public {
    on_device(logger, "createInferRuntime", |reporter| {
        object::make(runtime::Runtime::new(reporter))
    })
}

#[no_mangle]
pub unsafe extern "C" fn createInferBuilder_INTERNAL(logger: *mut u8, _version: i32) -> *mut Public {
    on_device(logger, "createInferBuilder", |reporter| {
        object::make(builder::Builder::new(reporter))
    })
}

#[no_mangle]
pub unsafe extern "C" fn createInferRefitter_INTERNAL(engine: *mut Public, logger: *mut u8, _version: i32) -> *mut Public {
    let Some(reporter) = reporter(logger, "createInferRefitter") else {
        return FAILED as *mut Public;
    };
    match refit::Refitter::new(engine, reporter) {
        Some(refitter) => object::make(refitter),
        None => {
            reporter.error(
                "createInferRefitter: Error Code 3: API Usage Error (Parameter check failed, condition: !isNoneRefittable(). The engine was not built with a refit flag)",
            );
            std::ptr::null_mut()
        }
    }
}

#[no_mangle]
pub unsafe extern "C" fn createNvOnnxParser_INTERNAL(network: *mut Public, logger: *mut u8, _version: i32) -> *mut c_void {
    match reporter(logger, "createNvOnnxParser") {
        Some(reporter) => object::make_direct(parser::Parser::new(network, reporter)).cast(),
        None => std::ptr::null_mut(),
    }
}

#[no_mangle]
pub unsafe extern "C" fn createNvOnnxParserRefitter_INTERNAL(refitter: *mut Public, logger: *mut u8, _version: i32) -> *mut c_void {
    match reporter(logger, "createNvOnnxParserRefitter") {
        Some(reporter) => object::make_direct(refit::ParserRefitter::new(refitter, reporter)).cast(),
        None => std::ptr::null_mut(),
    }
}

#[no_mangle]
pub extern "C" fn getNvOnnxParserVersion() -> i32 {
    100
}

/// The plugin library's entry; the stand-in is one file under both names.
#[no_mangle]
pub unsafe extern "C" fn initLibNvInferPlugins(logger: *mut u8, namespace: *const c_char) -> bool {
    if namespace.is_null() {
        mistake("initLibNvInferPlugins got a null namespace");
        return false;
    }
    if called("initLibNvInferPlugins") {
        return true;
    }
    if !logger.is_null() {
        Reporter {
            logger: logger as usize,
            recorder: 0,
        }
        .error("initLibNvInferPlugins: this call was told to fail");
    }
    false
}
