//! Which version this library plays, what was called, what lives, and what the caller did wrong.

use std::collections::HashMap;
use std::ffi::{c_char, CStr, CString};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

#[derive(Default)]
struct Record {
    total: u64,
    by_name: HashMap<String, u64>,
    live: HashMap<&'static str, i64>,
    countdown: i64,
    last_failed: CString,
    mistakes: Vec<CString>,
}

fn record() -> MutexGuard<'static, Record> {
    static RECORD: OnceLock<Mutex<Record>> = OnceLock::new();
    RECORD.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// Major, minor, patch, build, from FAKE_TRT_VERSION.
pub fn version() -> (u32, u32, u32, u32) {
    static VERSION: OnceLock<(u32, u32, u32, u32)> = OnceLock::new();
    *VERSION.get_or_init(|| {
        let text = std::env::var("FAKE_TRT_VERSION").unwrap_or_else(|_| "10.6.0.26".to_owned());
        let mut parts = text.split('.').map(|part| part.parse().unwrap_or(0));
        let mut next = || parts.next().unwrap_or(0);
        (next(), next(), next(), next())
    })
}

/// Counts a call whose failure its caller can see; false when it is the one told to fail.
pub fn called(name: &str) -> bool {
    let mut record = record();
    record.total += 1;
    *record.by_name.entry(name.to_owned()).or_insert(0) += 1;
    if record.countdown > 0 {
        record.countdown -= 1;
        if record.countdown == 0 {
            record.last_failed = CString::new(name).unwrap_or_default();
            return false;
        }
    }
    true
}

/// Counts what has no way to fail.
pub fn noted(name: &str) {
    *record().by_name.entry(name.to_owned()).or_insert(0) += 1;
}

pub fn live(kind: &'static str, change: i64) {
    *record().live.entry(kind).or_insert(0) += change;
}

pub fn mistake(text: &str) {
    if std::env::var_os("FAKE_TRT_TRACE").is_some() {
        eprintln!("fake nvinfer: {text}");
    }
    record().mistakes.push(CString::new(text.replace('\0', "")).unwrap_or_default());
}

unsafe fn text<'a>(pointer: *const c_char) -> &'a str {
    if pointer.is_null() {
        return "";
    }
    CStr::from_ptr(pointer).to_str().unwrap_or("")
}

/// Forgets calls, mistakes and the injected failure; objects stay.
#[no_mangle]
pub extern "C" fn fake_trt_reset() {
    let mut record = record();
    *record = Record {
        live: std::mem::take(&mut record.live),
        ..Record::default()
    };
}

/// The n-th call from now that can fail does, once; 0 takes that back.
#[no_mangle]
pub extern "C" fn fake_trt_fail_at(n: i64) {
    let mut record = record();
    record.countdown = n;
    record.last_failed = CString::default();
}

/// Calls so far that can fail.
#[no_mangle]
pub extern "C" fn fake_trt_calls() -> u64 {
    record().total
}

#[no_mangle]
pub unsafe extern "C" fn fake_trt_call_count(name: *const c_char) -> u64 {
    record().by_name.get(text(name)).copied().unwrap_or(0)
}

#[no_mangle]
pub extern "C" fn fake_trt_last_failed() -> *const c_char {
    record().last_failed.as_ptr()
}

/// kind: the name of an interface, such as ICudaEngine.
#[no_mangle]
pub unsafe extern "C" fn fake_trt_live(kind: *const c_char) -> u64 {
    record().live.get(text(kind)).copied().unwrap_or(0) as u64
}

#[no_mangle]
pub extern "C" fn fake_trt_errors() -> u64 {
    record().mistakes.len() as u64
}

/// Valid until the next reset.
#[no_mangle]
pub extern "C" fn fake_trt_error_text(i: u64) -> *const c_char {
    record().mistakes.get(i as usize).map_or(std::ptr::null(), |text| text.as_ptr())
}
