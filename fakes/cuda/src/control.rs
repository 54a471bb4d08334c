//! What tests use to steer the stand-in and to look at it; none of this is counted as a call.

use std::ffi::{c_char, c_void, CStr, CString};

use crate::state::*;
use crate::work::{self, Op};

unsafe fn text<'a>(pointer: *const c_char) -> &'a str {
    if pointer.is_null() {
        return "";
    }
    CStr::from_ptr(pointer).to_str().unwrap_or("")
}

/// Forgets calls, mistakes, the injected failure and a lost device; objects stay, as their owners may be alive.
#[no_mangle]
pub extern "C" fn fake_cuda_reset() {
    let _entered = enter();
    let state = st();
    state.calls = Calls::default();
    state.errors.clear();
    state.sticky = 0;
}

/// The n-th call from now fails with `code`, once; 0 takes that back.
#[no_mangle]
pub extern "C" fn fake_cuda_fail_at(n: i64, code: i32) {
    let _entered = enter();
    let calls = &mut st().calls;
    calls.countdown = n;
    calls.code = code;
    calls.last_failed = CString::default();
}

#[no_mangle]
pub extern "C" fn fake_cuda_calls() -> u64 {
    let _entered = enter();
    st().calls.total
}

#[no_mangle]
pub unsafe extern "C" fn fake_cuda_call_count(name: *const c_char) -> u64 {
    let _entered = enter();
    st().calls.by_name.get(text(name)).copied().unwrap_or(0)
}

/// The i-th call since the reset (65536 are kept), or null.
#[no_mangle]
pub extern "C" fn fake_cuda_call_name(i: u64, buffer: *mut c_char, size: u64) -> i32 {
    let _entered = enter();
    let Some(name) = st().calls.log.get(i as usize) else { return 0 };
    let n = name.len().min(size.saturating_sub(1) as usize);
    // SAFETY: the caller gives `size` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(name.as_ptr().cast(), buffer, n);
        *buffer.add(n) = 0;
    }
    1
}

/// The name of the call that the last injected failure hit, or "".
#[no_mangle]
pub extern "C" fn fake_cuda_last_failed() -> *const c_char {
    let _entered = enter();
    st().calls.last_failed.as_ptr()
}

#[no_mangle]
pub unsafe extern "C" fn fake_cuda_live(kind: *const c_char) -> u64 {
    let _entered = enter();
    let state = st();
    let blocks = |fits: fn(Kind) -> bool| state.blocks.values().filter(|block| fits(block.kind)).count() as u64;
    match text(kind) {
        "device" => blocks(|kind| matches!(kind, Kind::Device(_))),
        "pinned" => blocks(|kind| kind == Kind::Pinned),
        "registered" => blocks(|kind| kind == Kind::Registered),
        "bytes" => {
            let device = |block: &&Block| matches!(block.kind, Kind::Device(_));
            state.blocks.values().filter(device).map(|block| block.size as u64).sum()
        }
        "stream" => state.streams.values().filter(|stream| stream.user && !stream.zombie).count() as u64,
        "event" => state.events.len() as u64,
        "graph" => state.graphs.len() as u64,
        "graph_exec" => state.execs.len() as u64,
        "module" => state.modules.len() as u64,
        "context" => state.contexts.values().filter(|context| context.references > 0).count() as u64,
        "retain" => state.contexts.values().map(|context| u64::from(context.references)).sum(),
        "capture" => state.captures.len() as u64,
        "pending" => state.streams.values().map(|stream| stream.queue.len() as u64).sum(),
        _ => u64::MAX,
    }
}

#[no_mangle]
pub extern "C" fn fake_cuda_errors() -> u64 {
    let _entered = enter();
    st().errors.len() as u64
}

/// Valid until the next reset.
#[no_mangle]
pub extern "C" fn fake_cuda_error_text(i: u64) -> *const c_char {
    let _entered = enter();
    st().errors.get(i as usize).map_or(std::ptr::null(), |text| text.as_ptr())
}

/// Changes a setting of the running process: devices, integrated, memory, sm, driver, capture_fail, reuse. 0 when there is none by that name.
#[no_mangle]
pub unsafe extern "C" fn fake_cuda_set(name: *const c_char, value: i64) -> i32 {
    let _entered = enter();
    let settings = &mut st().settings;
    let field = match text(name) {
        "devices" => &mut settings.devices,
        "integrated" => &mut settings.integrated,
        "memory" => &mut settings.memory,
        "sm" => &mut settings.sm,
        "driver" => &mut settings.driver,
        "capture_fail" => &mut settings.capture_fail,
        "reuse" => &mut settings.reuse,
        _ => return 0,
    };
    *field = value;
    1
}

/// 1 when a kernel on that device may touch the bytes; else 0, and what was wrong goes on the list of mistakes.
#[no_mangle]
pub unsafe extern "C" fn fake_cuda_reachable(address: u64, size: u64, device: i32, what: *const c_char) -> i32 {
    let _entered = enter();
    if reachable(address, size as usize, device) {
        return 1;
    }
    mistake(format!(
        "{}: a kernel on device {device} touched {size} bytes at {address:#x}, which it cannot reach",
        text(what)
    ));
    0
}

/// Where an address lies: 0 pageable, 1 page-locked, 2 device, -1 freed or out of range.
#[no_mangle]
pub extern "C" fn fake_cuda_place(address: u64, size: u64) -> i32 {
    let _entered = enter();
    match place(address, size as usize) {
        Place::Pageable => 0,
        Place::Locked => 1,
        Place::Device(_) => 2,
        Place::Wrong => -1,
    }
}

/// A mistake that another stand-in found.
#[no_mangle]
pub unsafe extern "C" fn fake_cuda_mistake(what: *const c_char) {
    let _entered = enter();
    mistake(text(what));
}

/// Puts a function that stands for a kernel on a stream. It is counted, and fails, as cuLaunchKernel: that is what it stands for.
#[no_mangle]
pub extern "C" fn fake_cuda_launch(stream: u64, function: unsafe extern "C" fn(*mut c_void) -> i32, data: u64) -> i32 {
    call("cuLaunchKernel", || {
        current()?;
        let key = work::stream(stream)?;
        work::enqueue(key, Op::Kernel { function, data })
    })
}
