//! A stand-in for the CUDA driver library: the driver's own rules over host memory, and a record of what was called.
//!
//! - Streams are lazy (`work.rs`), so a forgotten wait gives stale data every time. Fresh and freed memory is filled with patterns.
//! - Every exported `cu…` function is counted and can be told to fail at the n-th call (`control.rs`).
//! - What the driver would answer with an error, and what it would let pass as undefined behaviour, lands on a list that tests assert empty.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

mod control;
mod kernel;
mod state;
mod work;

use std::ffi::{c_char, c_void, CStr};
use std::sync::Arc;

use state::*;
use work::{Copy2D, Event, Op, Stream};

/// Writes a result; a null place for it is the caller's mistake.
unsafe fn put<T>(out: *mut T, value: T) -> Outcome {
    if out.is_null() {
        return refuse(INVALID_VALUE, "a null pointer where a result belongs");
    }
    out.write(value);
    Ok(())
}

macro_rules! exports {
    ($kind:ident: $( fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block )*) => { $(
        #[no_mangle]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> i32 {
            $kind(stringify!($name), || { #[allow(unused_unsafe)] unsafe { $body } })
        }
    )* };
}

fn device(ordinal: i32) -> Outcome {
    if ordinal >= 0 && i64::from(ordinal) < st().settings.devices {
        Ok(())
    } else {
        Err(INVALID_DEVICE)
    }
}

fn active(context: u64) -> bool {
    st().contexts.get(&context).is_some_and(|context| context.references > 0)
}

fn primary(ordinal: i32) -> u64 {
    PRIMARY + 16 * ordinal as u64
}

const ERRORS: &[(i32, &CStr, &CStr)] = &[
    (0, c"CUDA_SUCCESS", c"no error"),
    (1, c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
    (2, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
    (3, c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
    (4, c"CUDA_ERROR_DEINITIALIZED", c"driver shutting down"),
    (34, c"CUDA_ERROR_STUB_LIBRARY", c"CUDA driver is a stub library"),
    (
        35,
        c"CUDA_ERROR_INSUFFICIENT_DRIVER",
        c"CUDA driver version is insufficient for CUDA runtime version",
    ),
    (100, c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected"),
    (101, c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
    (200, c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"),
    (201, c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
    (
        209,
        c"CUDA_ERROR_NO_BINARY_FOR_GPU",
        c"no kernel image is available for execution on the device",
    ),
    (218, c"CUDA_ERROR_INVALID_PTX", c"a PTX JIT compilation failed"),
    (
        222,
        c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        c"the provided PTX was compiled with an unsupported toolchain.",
    ),
    (400, c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
    (
        401,
        c"CUDA_ERROR_ILLEGAL_STATE",
        c"the operation cannot be performed in the present state",
    ),
    (500, c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
    (600, c"CUDA_ERROR_NOT_READY", c"device not ready"),
    (700, c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
    (709, c"CUDA_ERROR_CONTEXT_IS_DESTROYED", c"context is destroyed"),
    (
        712,
        c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        c"part or all of the requested memory range is already mapped",
    ),
    (
        713,
        c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        c"pointer does not correspond to a registered memory region",
    ),
    (719, c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
    (801, c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"),
    (
        900,
        c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        c"operation not permitted when stream is capturing",
    ),
    (
        901,
        c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        c"operation failed due to a previous error during capture",
    ),
    (
        903,
        c"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
        c"capture was not ended in the same stream as it began",
    ),
    (904, c"CUDA_ERROR_STREAM_CAPTURE_UNJOINED", c"capturing stream has unjoined work"),
    (
        905,
        c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
        c"dependency created on uncaptured work in another stream",
    ),
    (
        906,
        c"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
        c"operation would make the legacy stream depend on a capturing blocking stream",
    ),
    (
        907,
        c"CUDA_ERROR_CAPTURED_EVENT",
        c"operation not permitted on an event last recorded in a capturing stream",
    ),
    (
        908,
        c"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
        c"attempt to terminate a thread-local capture sequence from another thread",
    ),
    (999, c"CUDA_ERROR_UNKNOWN", c"unknown error"),
];

fn error_row(code: i32) -> Result<&'static (i32, &'static CStr, &'static CStr), i32> {
    ERRORS.iter().find(|row| row.0 == code).ok_or(INVALID_VALUE)
}

exports! { plain_call:
    fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        if st().settings.devices <= 0 {
            return Err(NO_DEVICE);
        }
        st().initialized = true;
        Ok(())
    }
    fn cuDriverGetVersion(version: *mut i32) { put(version, st().settings.driver as i32) }
    fn cuGetErrorName(code: i32, text: *mut *const c_char) { put(text, error_row(code)?.1.as_ptr()) }
    fn cuGetErrorString(code: i32, text: *mut *const c_char) { put(text, error_row(code)?.2.as_ptr()) }
}

// Devices and contexts ----------------------------------------------------------------------------------------------

exports! { call:
    fn cuDeviceGetCount(count: *mut i32) { put(count, st().settings.devices as i32) }
    fn cuDeviceGet(out: *mut i32, ordinal: i32) { device(ordinal)?; put(out, ordinal) }
    fn cuDeviceGetName(name: *mut c_char, length: i32, dev: i32) {
        device(dev)?;
        let text = format!("Fake GPU {dev}\0");
        if name.is_null() || length <= 0 {
            return Err(INVALID_VALUE);
        }
        let n = text.len().min(length as usize);
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, n);
        *name.add(n - 1) = 0;
        Ok(())
    }
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], dev: i32) { device(dev)?; put(uuid, [0xFA, 0xCE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, dev as u8]) }
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], dev: i32) { device(dev)?; put(uuid, [0xFA, 0xCE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, dev as u8]) }
    fn cuDeviceGetPCIBusId(text: *mut c_char, length: i32, dev: i32) {
        device(dev)?;
        let id = format!("0000:{:02x}:00.0\0", dev + 1);
        if text.is_null() || (length as usize) < id.len() {
            return Err(INVALID_VALUE);
        }
        std::ptr::copy_nonoverlapping(id.as_ptr().cast(), text, id.len());
        Ok(())
    }
    fn cuDeviceGetAttribute(value: *mut i32, attribute: i32, dev: i32) {
        device(dev)?;
        let settings = &st().settings;
        let integrated = (settings.integrated != 0) as i32;
        put(value, match attribute {
            1 => 1024,                                  // threads per block
            2 | 3 => 1024,
            4 => 64,
            5 => i32::MAX,                              // grid
            6 | 7 => 65535,
            8 => 49152,
            10 => 32,                                   // warp
            13 => 1_500_000,
            16 => 16,                                   // multiprocessors
            18 => integrated,
            19 => 1,                                    // can map host memory
            20 => 0,                                    // compute mode
            31 => 1,
            33 => dev + 1,                              // PCI bus
            34 | 50 => 0,
            36 => 1_000_000,
            37 => 256,
            38 => 4 << 20,
            39 => 1536,
            40 => 2,
            41 => 1,                                    // unified addressing
            75 => (settings.sm / 10) as i32,
            76 => (settings.sm % 10) as i32,
            78 => 1,                                    // stream priorities
            83 => 1,                                    // managed memory
            88 => 0,                                    // pageable access
            89 => 1 - integrated,                       // concurrent managed access
            91 => 1,                                    // the host's pointer serves for registered memory
            99 => 1,                                    // host register supported
            100 => 0,
            115 => 1,                                   // memory pools
            _ => 0,
        })
    }
    fn cuDeviceTotalMem_v2(bytes: *mut usize, dev: i32) { device(dev)?; put(bytes, st().settings.memory as usize) }
    fn cuDeviceCanAccessPeer(can: *mut i32, dev: i32, peer: i32) { device(dev)?; device(peer)?; put(can, 0) }
    fn cuDevicePrimaryCtxRetain(out: *mut u64, dev: i32) {
        device(dev)?;
        let handle = primary(dev);
        put(out, handle)?;
        st().contexts
            .entry(handle)
            .or_insert(Context { device: dev, references: 0, primary: true, flags: 0 })
            .references += 1;
        Ok(())
    }
    fn cuDevicePrimaryCtxGetState(dev: i32, flags: *mut u32, active: *mut i32) {
        device(dev)?;
        let (f, a) = st().contexts.get(&primary(dev)).map_or((0, 0), |c| (c.flags, (c.references > 0) as i32));
        put(flags, f)?;
        put(active, a)
    }
    fn cuDevicePrimaryCtxSetFlags_v2(dev: i32, flags: u32) {
        device(dev)?;
        if let Some(context) = st().contexts.get_mut(&primary(dev)) {
            context.flags = flags;
        }
        Ok(())
    }
    fn cuCtxGetCurrent(out: *mut u64) { put(out, CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0))) }
    fn cuCtxSetCurrent(context: u64) {
        if context != 0 && !active(context) {
            return refuse(INVALID_CONTEXT, format!("{context:#x} is no active context"));
        }
        CURRENT.with_borrow_mut(|stack| {
            stack.pop();
            if context != 0 {
                stack.push(context);
            }
        });
        Ok(())
    }
    fn cuCtxPushCurrent_v2(context: u64) {
        if !active(context) {
            return refuse(INVALID_CONTEXT, format!("{context:#x} is no active context"));
        }
        CURRENT.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    }
    fn cuCtxGetDevice(dev: *mut i32) { put(dev, device_of(current()?)) }
    fn cuCtxGetFlags(flags: *mut u32) { let c = current()?; put(flags, st().contexts.get(&c).map_or(0, |c| c.flags)) }
    fn cuCtxGetApiVersion(context: u64, version: *mut u32) { let _ = context; put(version, 3020) }
    fn cuCtxGetStreamPriorityRange(least: *mut i32, greatest: *mut i32) {
        current()?;
        if !least.is_null() { least.write(0); }
        if !greatest.is_null() { greatest.write(-5); }
        Ok(())
    }
    fn cuCtxCreate_v2(out: *mut u64, flags: u32, dev: i32) {
        device(dev)?;
        unsafe_call()?;
        let context = handle();
        put(out, context)?;
        st().contexts.insert(context, Context { device: dev, references: 1, primary: false, flags });
        CURRENT.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    }
}

exports! { destroy_call:
    fn cuDevicePrimaryCtxRelease_v2(dev: i32) {
        device(dev)?;
        let handle = primary(dev);
        let Some(context) = st().contexts.get_mut(&handle).filter(|c| c.references > 0) else {
            return refuse(INVALID_CONTEXT, "a primary context was released more often than retained");
        };
        context.references -= 1;
        if context.references == 0 {
            work::drain_all(handle);
            tear_down(handle);
        }
        Ok(())
    }
    fn cuCtxDestroy_v2(context: u64) {
        if st().contexts.get(&context).is_none_or(|c| c.primary) {
            return refuse(INVALID_CONTEXT, format!("{context:#x} is no context made by cuCtxCreate"));
        }
        work::drain_all(context);
        tear_down(context);
        st().contexts.remove(&context);
        CURRENT.with_borrow_mut(|stack| {
            if stack.last() == Some(&context) {
                stack.pop();
            }
        });
        Ok(())
    }
    // Undoes a push, so it does so even when told to fail.
    fn cuCtxPopCurrent_v2(out: *mut u64) {
        match CURRENT.with_borrow_mut(Vec::pop) {
            Some(context) => {
                if !out.is_null() {
                    out.write(context);
                }
                Ok(())
            }
            None => refuse(INVALID_CONTEXT, "cuCtxPopCurrent with no context current"),
        }
    }
}

// Memory ------------------------------------------------------------------------------------------------------------

use work::unsafe_call;

/// Both ends of a copy, checked when it is asked for.
fn ends(dst: u64, src: u64, n: usize, name: &str) -> Result<(Place, Place), i32> {
    let (to, from) = (place(dst, n), place(src, n));
    for (which, address, found) in [("to", dst, to), ("from", src, from)] {
        if n > 0 && found == Place::Wrong {
            return refuse(
                INVALID_VALUE,
                format!("{name}: {n} bytes {which} {address:#x} are no live block of that size"),
            );
        }
    }
    Ok((to, from))
}

fn needs_device(address: u64, n: usize, name: &str) -> Outcome {
    match place(address, n) {
        _ if n == 0 => Ok(()),
        Place::Device(_) | Place::Locked => Ok(()),
        _ => refuse(INVALID_VALUE, format!("{name}: {n} bytes at {address:#x} are not the device's")),
    }
}

fn copy_async(name: &str, dst: u64, src: u64, n: usize, stream: u64) -> Outcome {
    current()?;
    let key = work::stream(stream)?;
    let (to, from) = ends(dst, src, n, name)?;
    if n == 0 {
        return Ok(());
    }
    if work::capturing(key)?.is_some() {
        return work::enqueue(key, Op::Copy { dst, src, n });
    }
    match (to, from) {
        (_, Place::Pageable) => {
            // SAFETY: the caller's own memory, as with the real driver.
            let bytes = unsafe { std::slice::from_raw_parts(src as *const u8, n) }.to_vec();
            work::enqueue(
                key,
                Op::Data {
                    dst,
                    bytes: Arc::new(bytes),
                },
            )?;
        }
        _ => work::enqueue(key, Op::Copy { dst, src, n })?,
    }
    if to == Place::Pageable {
        // The driver returns from such a copy once it is done.
        work::drain(key, work::position(key));
        return work::health();
    }
    Ok(())
}

fn copy_now(name: &str, dst: u64, src: u64, n: usize) -> Outcome {
    current()?;
    unsafe_call()?;
    let key = work::stream(1)?;
    ends(dst, src, n, name)?;
    if n == 0 {
        return Ok(());
    }
    work::enqueue(key, Op::Copy { dst, src, n })?;
    work::drain(key, work::position(key));
    work::health()
}

fn set_async(name: &str, dst: u64, value: u32, width: usize, n: usize, stream: u64) -> Outcome {
    current()?;
    let key = work::stream(stream)?;
    needs_device(dst, n * width, name)?;
    if n == 0 {
        return Ok(());
    }
    work::enqueue(key, Op::Set { dst, value, width, n })
}

#[repr(C)]
pub struct Memcpy2D {
    src_x: usize,
    src_y: usize,
    src_type: u32,
    src_host: u64,
    src_device: u64,
    src_array: u64,
    src_pitch: usize,
    dst_x: usize,
    dst_y: usize,
    dst_type: u32,
    dst_host: u64,
    dst_device: u64,
    dst_array: u64,
    dst_pitch: usize,
    width: usize,
    height: usize,
}

fn attribute(attribute: i32, address: u64, out: *mut c_void) -> Result<bool, i32> {
    let found = block_at(address);
    let write = |value: u64, size: usize| {
        // SAFETY: the caller gives room for the attribute's type.
        unsafe { std::ptr::copy_nonoverlapping(value.to_le_bytes().as_ptr(), out.cast(), size) };
    };
    if out.is_null() {
        return Err(INVALID_VALUE);
    }
    let size = match attribute {
        1 | 3 | 4 | 7 | 11 | 12 => 8,
        2 | 6 | 9 | 15 => 4,
        8 | 10 | 13 => 1,
        _ => return Err(INVALID_VALUE),
    };
    let Some((start, block)) = found else {
        write(if attribute == 9 { u64::from(u32::MAX) - 1 } else { 0 }, size);
        return Ok(false);
    };
    write(
        match attribute {
            1 => block.context,
            2 => match block.kind {
                Kind::Device(_) => 2,
                _ => 1,
            },
            3 => address,
            4 => match block.kind {
                Kind::Device(_) => return Err(INVALID_VALUE),
                _ => address,
            },
            7 => block.id,
            9 => device_of(block.context) as u64,
            11 => start,
            12 => block.size as u64,
            13 => 1,
            _ => 0,
        },
        size,
    );
    Ok(true)
}

exports! { call:
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let device = device_of(current()?);
        let all = st().settings.memory as usize;
        put(free, all.saturating_sub(device_bytes(device) as usize))?;
        put(total, all)
    }
    fn cuMemAlloc_v2(out: *mut u64, size: usize) {
        let context = current()?;
        unsafe_call()?;
        let address = allocate(Kind::Device(device_of(context)), size, 0)?;
        put(out, address)
    }
    fn cuMemAllocAsync(out: *mut u64, size: usize, stream: u64) {
        let key = work::stream(stream)?;
        if work::capturing(key)?.is_some() {
            return Err(CAPTURE_UNSUPPORTED);
        }
        put(out, allocate(Kind::Device(device_of(current()?)), size, 0)?)
    }
    fn cuMemHostAlloc(out: *mut u64, size: usize, flags: u32) {
        unsafe_call()?;
        put(out, allocate(Kind::Pinned, size, flags)?)
    }
    fn cuMemAllocHost_v2(out: *mut u64, size: usize) {
        unsafe_call()?;
        put(out, allocate(Kind::Pinned, size, 0)?)
    }
    fn cuMemHostGetDevicePointer_v2(out: *mut u64, host: u64, flags: u32) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        match place(host, 1) {
            Place::Locked => put(out, host),
            _ => refuse(INVALID_VALUE, format!("cuMemHostGetDevicePointer: {host:#x} is not page-locked")),
        }
    }
    fn cuMemHostGetFlags(flags: *mut u32, host: u64) {
        match block_at(host) {
            Some((_, block)) if !matches!(block.kind, Kind::Device(_)) => put(flags, block.flags),
            _ => Err(INVALID_VALUE),
        }
    }
    fn cuMemHostRegister_v2(host: u64, size: usize, flags: u32) {
        let context = current()?;
        unsafe_call()?;
        if host == 0 || size == 0 {
            return Err(INVALID_VALUE);
        }
        let overlaps = st().blocks.range(..host + size as u64).next_back()
            .is_some_and(|(start, block)| start + block.size as u64 > host);
        if overlaps {
            return refuse(ALREADY_REGISTERED, format!("cuMemHostRegister: {host:#x} is page-locked already"));
        }
        let id = handle();
        st().blocks.insert(host, Block { size, kind: Kind::Registered, context, id, flags });
        Ok(())
    }
    fn cuMemGetAddressRange_v2(base: *mut u64, size: *mut usize, address: u64) {
        let Some((start, block)) = block_at(address) else { return Err(INVALID_VALUE) };
        if !base.is_null() { base.write(start); }
        if !size.is_null() { size.write(block.size); }
        Ok(())
    }
    fn cuPointerGetAttribute(data: *mut c_void, which: i32, address: u64) {
        if attribute(which, address, data)? { Ok(()) } else { Err(INVALID_VALUE) }
    }
    fn cuPointerGetAttributes(count: u32, which: *const i32, data: *const *mut c_void, address: u64) {
        for i in 0..count as usize {
            // A pointer of the wrong kind for one attribute is no error here.
            if let Err(code) = attribute(*which.add(i), address, *data.add(i)) {
                if *which.add(i) != 4 {
                    return Err(code);
                }
                (*data.add(i)).cast::<u64>().write(0);
            }
        }
        Ok(())
    }
    fn cuMemcpyHtoDAsync_v2(dst: u64, src: u64, n: usize, stream: u64) {
        needs_device(dst, n, "cuMemcpyHtoDAsync")?;
        copy_async("cuMemcpyHtoDAsync", dst, src, n, stream)
    }
    fn cuMemcpyDtoHAsync_v2(dst: u64, src: u64, n: usize, stream: u64) {
        needs_device(src, n, "cuMemcpyDtoHAsync")?;
        copy_async("cuMemcpyDtoHAsync", dst, src, n, stream)
    }
    fn cuMemcpyDtoDAsync_v2(dst: u64, src: u64, n: usize, stream: u64) {
        needs_device(dst, n, "cuMemcpyDtoDAsync")?;
        needs_device(src, n, "cuMemcpyDtoDAsync")?;
        copy_async("cuMemcpyDtoDAsync", dst, src, n, stream)
    }
    fn cuMemcpyAsync(dst: u64, src: u64, n: usize, stream: u64) { copy_async("cuMemcpyAsync", dst, src, n, stream) }
    fn cuMemcpyPeerAsync(dst: u64, to: u64, src: u64, from: u64, n: usize, stream: u64) {
        let _ = (to, from);
        copy_async("cuMemcpyPeerAsync", dst, src, n, stream)
    }
    fn cuMemcpy2DAsync_v2(copy: *const Memcpy2D, stream: u64) {
        current()?;
        let key = work::stream(stream)?;
        let c = &*copy;
        let address = |kind: u32, host: u64, device: u64| match kind {
            1 => Ok(host),
            2 | 4 => Ok(device),
            _ => Err(INVALID_VALUE),
        };
        let or_width = |pitch: usize| if pitch == 0 { c.width } else { pitch };
        let (src_pitch, dst_pitch) = (or_width(c.src_pitch), or_width(c.dst_pitch));
        let src = address(c.src_type, c.src_host, c.src_device)? + (c.src_y * src_pitch + c.src_x) as u64;
        let dst = address(c.dst_type, c.dst_host, c.dst_device)? + (c.dst_y * dst_pitch + c.dst_x) as u64;
        if c.width > src_pitch || c.width > dst_pitch {
            return refuse(INVALID_VALUE, "cuMemcpy2DAsync: rows longer than their pitch");
        }
        if c.width == 0 || c.height == 0 {
            return Ok(());
        }
        let (to, from) = ends(dst, src, (c.height - 1) * src_pitch.min(dst_pitch) + c.width, "cuMemcpy2DAsync")?;
        if work::capturing(key)?.is_none() && from == Place::Pageable {
            let rows: Vec<u8> = (0..c.height)
                .flat_map(|row| std::slice::from_raw_parts((src as *const u8).add(row * src_pitch), c.width))
                .copied()
                .collect();
            if dst_pitch == c.width {
                work::enqueue(key, Op::Data { dst, bytes: Arc::new(rows) })?;
            } else {
                for (row, bytes) in rows.chunks(c.width).enumerate() {
                    let bytes = Arc::new(bytes.to_vec());
                    work::enqueue(key, Op::Data { dst: dst + (row * dst_pitch) as u64, bytes })?;
                }
            }
        } else {
            let copy = Copy2D { dst, dst_pitch, src, src_pitch, width: c.width, height: c.height };
            work::enqueue(key, Op::Copy2D(copy))?;
        }
        if work::capturing(key)?.is_none() && to == Place::Pageable {
            work::drain(key, work::position(key));
        }
        work::health()
    }
    fn cuMemcpy(dst: u64, src: u64, n: usize) { copy_now("cuMemcpy", dst, src, n) }
    fn cuMemcpyHtoD_v2(dst: u64, src: u64, n: usize) {
        needs_device(dst, n, "cuMemcpyHtoD")?;
        copy_now("cuMemcpyHtoD", dst, src, n)
    }
    fn cuMemcpyDtoH_v2(dst: u64, src: u64, n: usize) {
        needs_device(src, n, "cuMemcpyDtoH")?;
        copy_now("cuMemcpyDtoH", dst, src, n)
    }
    fn cuMemcpyDtoD_v2(dst: u64, src: u64, n: usize) { copy_now("cuMemcpyDtoD", dst, src, n) }
    fn cuMemsetD8Async(dst: u64, value: u8, n: usize, stream: u64) {
        set_async("cuMemsetD8Async", dst, u32::from(value), 1, n, stream)
    }
    fn cuMemsetD32Async(dst: u64, value: u32, n: usize, stream: u64) {
        set_async("cuMemsetD32Async", dst, value, 4, n, stream)
    }
    // Asynchronous to the host for device memory, in the legacy stream.
    fn cuMemsetD8_v2(dst: u64, value: u8, n: usize) {
        unsafe_call()?;
        set_async("cuMemsetD8", dst, u32::from(value), 1, n, 1)
    }
}

/// Frees a block of one kind that starts exactly at `address`.
fn free(name: &str, address: u64, fits: fn(Kind) -> bool) -> Outcome {
    if address == 0 {
        return Ok(());
    }
    match st().blocks.get(&address) {
        Some(block) if fits(block.kind) => {}
        Some(_) => return refuse(INVALID_VALUE, format!("{name}: {address:#x} is another kind of memory")),
        None => return refuse(INVALID_VALUE, format!("{name}: {address:#x} is no live block (freed twice?)")),
    }
    let refused = unsafe_call();
    release(address);
    refused
}

exports! { destroy_call:
    fn cuMemFree_v2(address: u64) { free("cuMemFree", address, |kind| matches!(kind, Kind::Device(_))) }
    fn cuMemFreeHost(address: u64) { free("cuMemFreeHost", address, |kind| kind == Kind::Pinned) }
    fn cuMemFreeAsync(address: u64, stream: u64) {
        // Freed in stream order; the work before it is done first.
        let key = work::stream(stream)?;
        work::drain(key, work::position(key));
        free("cuMemFreeAsync", address, |kind| matches!(kind, Kind::Device(_)))
    }
    fn cuMemHostUnregister(address: u64) {
        unsafe_call()?;
        match st().blocks.get(&address) {
            Some(block) if block.kind == Kind::Registered => {
                st().blocks.remove(&address);
                Ok(())
            }
            _ => refuse(NOT_REGISTERED, format!("cuMemHostUnregister: {address:#x} is not registered")),
        }
    }
}

// Streams and events ------------------------------------------------------------------------------------------------

fn create_stream(out: *mut u64, flags: u32, priority: i32) -> Outcome {
    let context = current()?;
    if flags > 1 {
        return Err(INVALID_VALUE);
    }
    let key = handle();
    // SAFETY: checked for null by `put`.
    unsafe { put(out, key)? };
    st().streams.insert(key, Stream::new(context, flags == 1, priority, true));
    Ok(())
}

fn capture_state(stream: u64) -> Result<(i32, u64, u64), i32> {
    let key = work::stream(stream)?;
    let Some(found) = st().streams.get(&key) else {
        return Err(INVALID_HANDLE);
    };
    match found.capture.and_then(|id| st().captures.get(&id)) {
        None => {
            if work::is_legacy(key) {
                let context = found.context;
                if st()
                    .streams
                    .values()
                    .any(|s| s.context == context && !s.non_blocking && s.capture.is_some())
                {
                    return Err(CAPTURE_IMPLICIT);
                }
            }
            Ok((0, 0, 0))
        }
        Some(capture) => Ok((1 + i32::from(capture.invalid), capture.id, capture.graph)),
    }
}

exports! { call:
    fn cuStreamCreate(out: *mut u64, flags: u32) { create_stream(out, flags, 0) }
    fn cuStreamCreateWithPriority(out: *mut u64, flags: u32, priority: i32) { create_stream(out, flags, priority) }
    fn cuStreamQuery(stream: u64) { work::query(work::stream(stream)?) }
    fn cuStreamWaitEvent(stream: u64, event: u64, flags: u32) {
        let _ = flags;
        work::wait_event(work::stream(stream)?, event)
    }
    fn cuStreamGetCtx(stream: u64, context: *mut u64) {
        let key = work::stream(stream)?;
        put(context, st().streams.get(&key).map_or(0, |s| s.context))
    }
    fn cuStreamGetFlags(stream: u64, flags: *mut u32) {
        let key = work::stream(stream)?;
        put(flags, st().streams.get(&key).map_or(0, |s| u32::from(s.non_blocking)))
    }
    fn cuStreamGetPriority(stream: u64, priority: *mut i32) {
        let key = work::stream(stream)?;
        put(priority, st().streams.get(&key).map_or(0, |s| s.priority))
    }
    fn cuStreamGetId(stream: u64, id: *mut u64) { let key = work::stream(stream)?; put(id, key) }
    fn cuStreamIsCapturing(stream: u64, status: *mut i32) { put(status, capture_state(stream)?.0) }
    fn cuStreamGetCaptureInfo_v2(
        stream: u64, status: *mut i32, id: *mut u64, graph: *mut u64, dependencies: *mut *const u64, count: *mut usize,
    ) {
        let (state, capture, its_graph) = capture_state(stream)?;
        put(status, state)?;
        if !id.is_null() { id.write(capture); }
        if !graph.is_null() { graph.write(its_graph); }
        if !dependencies.is_null() { dependencies.write(std::ptr::null()); }
        if !count.is_null() { count.write(0); }
        Ok(())
    }
    fn cuStreamBeginCapture_v2(stream: u64, mode: i32) { work::begin(work::stream(stream)?, mode) }
    fn cuThreadExchangeStreamCaptureMode(mode: *mut i32) {
        if mode.is_null() || !(0..=2).contains(&*mode) {
            return Err(INVALID_VALUE);
        }
        *mode = CAPTURE_MODE.replace(*mode);
        Ok(())
    }
    fn cuEventCreate(out: *mut u64, flags: u32) {
        let context = current()?;
        let event = handle();
        put(out, event)?;
        st().events.insert(event, Event { context, timing: flags & 2 == 0, ..Event::default() });
        Ok(())
    }
    fn cuEventRecord(event: u64, stream: u64) { work::record(event, work::stream(stream)?) }
    fn cuEventRecordWithFlags(event: u64, stream: u64, flags: u32) {
        let _ = flags;
        work::record(event, work::stream(stream)?)
    }
    fn cuEventQuery(event: u64) { work::event_query(event) }
    fn cuEventElapsedTime(ms: *mut f32, start: u64, end: u64) { put(ms, work::elapsed(start, end)?) }
    fn cuEventElapsedTime_v2(ms: *mut f32, start: u64, end: u64) { put(ms, work::elapsed(start, end)?) }
}

exports! { destroy_call:
    fn cuStreamDestroy_v2(stream: u64) {
        if stream <= 2 {
            return refuse(INVALID_HANDLE, "a default stream cannot be destroyed");
        }
        work::destroy_stream(work::stream(stream)?);
        Ok(())
    }
    fn cuEventDestroy_v2(event: u64) {
        match st().events.remove(&event) {
            Some(_) => Ok(()),
            None => refuse(INVALID_HANDLE, format!("{event:#x} is no event, or was destroyed before")),
        }
    }
}

/// Ends the capture whatever happens, so it does so even when told to fail; the graph is then not handed out.
#[no_mangle]
pub unsafe extern "C" fn cuStreamEndCapture(stream: u64, graph: *mut u64) -> i32 {
    let mut made = 0;
    let code = destroy_call("cuStreamEndCapture", || {
        made = work::finish(work::stream(stream)?)?;
        Ok(())
    });
    let _entered = enter();
    if code != 0 && made != 0 {
        let _ = work::destroy_graph(made);
        made = 0;
    }
    if !graph.is_null() {
        graph.write(made);
    }
    code
}

// A wait that is told to fail has waited all the same, as one that brings the news of an earlier failure has: afterwards nothing runs any more.
exports! { destroy_call:
    fn cuCtxSynchronize() {
        let context = current()?;
        let hit: Vec<u64> = st().streams.values().filter(|s| s.context == context).filter_map(|s| s.capture).collect();
        for id in &hit {
            work::invalidate(*id);
        }
        if !hit.is_empty() {
            return Err(CAPTURE_UNSUPPORTED);
        }
        unsafe_call()?;
        work::drain_all(context);
        work::health()
    }
    fn cuStreamSynchronize(stream: u64) { work::wait(work::stream(stream)?) }
    fn cuEventSynchronize(event: u64) { work::event_wait(event) }
}

// Graphs ------------------------------------------------------------------------------------------------------------

exports! { call:
    fn cuGraphInstantiateWithFlags(exec: *mut u64, graph: u64, flags: u64) {
        let _ = flags;
        put(exec, work::instantiate(graph)?)
    }
    fn cuGraphInstantiate_v2(exec: *mut u64, graph: u64, node: *mut u64, log: *mut c_char, size: usize) {
        let _ = (node, log, size);
        put(exec, work::instantiate(graph)?)
    }
    fn cuGraphLaunch(exec: u64, stream: u64) { work::launch(exec, work::stream(stream)?) }
    fn cuGraphUpload(exec: u64, stream: u64) {
        work::stream(stream)?;
        if st().execs.contains_key(&exec) { Ok(()) } else { refuse(INVALID_VALUE, format!("{exec:#x} is no graph executable")) }
    }
    fn cuGraphGetNodes(graph: u64, nodes: *mut u64, count: *mut usize) {
        if count.is_null() {
            return Err(INVALID_VALUE);
        }
        // One that is still being captured tells how many it has; nodes get their handles at the end.
        if let Some(capture) = st().captures.values().find(|capture| capture.graph == graph && nodes.is_null()) {
            *count = capture.nodes.len();
            return Ok(());
        }
        let Some(found) = st().graphs.get(&graph) else { return refuse(INVALID_VALUE, format!("{graph:#x} is no graph")) };
        if !nodes.is_null() {
            for i in 0..*count {
                nodes.add(i).write(found.nodes.get(i).map_or(0, |(node, _)| *node));
            }
            *count = (*count).min(found.nodes.len());
        } else {
            *count = found.nodes.len();
        }
        Ok(())
    }
    fn cuGraphNodeGetType(node: u64, kind: *mut i32) {
        match st().nodes.get(&node) {
            Some(found) => put(kind, *found),
            None => refuse(INVALID_VALUE, format!("{node:#x} is no node of a live graph")),
        }
    }
}

exports! { destroy_call:
    fn cuGraphDestroy(graph: u64) { work::destroy_graph(graph) }
    fn cuGraphExecDestroy(exec: u64) {
        match st().execs.remove(&exec) {
            Some(_) => Ok(()),
            None => refuse(INVALID_VALUE, format!("{exec:#x} is no graph executable, or was destroyed before")),
        }
    }
}

// Modules and launches ----------------------------------------------------------------------------------------------

/// PTX only, read as far as the driver's own first checks go.
fn load_module(out: *mut u64, image: *const c_void) -> Outcome {
    let context = current()?;
    unsafe_call()?;
    if image.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the driver too takes PTX as text that ends in 0.
    let text = unsafe { CStr::from_ptr(image.cast()) };
    let Ok(text) = text.to_str() else { return Err(INVALID_IMAGE) };
    let directive = |name: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(name))
            .map(|rest| rest.trim().to_owned())
    };
    let (Some(version), Some(target)) = (directive(".version"), directive(".target")) else {
        return Err(INVALID_IMAGE);
    };
    let number = |text: &str| {
        text.chars()
            .filter(char::is_ascii_digit)
            .collect::<String>()
            .parse::<i64>()
            .unwrap_or(0)
    };
    // PTX 8.0 came with CUDA 12.0, 8.2 with 12.2; the two minor numbers march together that far and a little beyond.
    let driver = st().settings.driver;
    let newest = 80 + (driver - 12000) / 10 - i64::from(driver >= 12060);
    if number(&version) > newest {
        return Err(UNSUPPORTED_PTX_VERSION);
    }
    if number(target.split(',').next().unwrap_or("")) > st().settings.sm {
        return Err(NO_BINARY_FOR_GPU);
    }
    let entries: Vec<String> = text
        .match_indices(".entry")
        .map(|(at, _)| text[at + 6..].trim_start())
        .map(|rest| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_' || *c == '$').collect())
        .collect();
    if entries.is_empty() {
        return Err(INVALID_PTX);
    }
    let module = handle();
    // SAFETY: checked for null by `put`.
    unsafe { put(out, module)? };
    st().modules.insert(module, Module { context, entries });
    Ok(())
}

exports! { call:
    fn cuModuleLoadData(out: *mut u64, image: *const c_void) { load_module(out, image) }
    fn cuModuleLoadDataEx(out: *mut u64, image: *const c_void, count: u32, options: *mut i32, values: *mut *mut c_void) {
        let _ = (count, options, values);
        load_module(out, image)
    }
    fn cuModuleGetFunction(out: *mut u64, module: u64, name: *const c_char) {
        let Some(found) = st().modules.get(&module) else { return refuse(INVALID_HANDLE, format!("{module:#x} is no module")) };
        if name.is_null() {
            return Err(INVALID_VALUE);
        }
        let name = CStr::from_ptr(name).to_string_lossy().into_owned();
        if !found.entries.contains(&name) {
            return Err(NOT_FOUND);
        }
        let function = handle();
        put(out, function)?;
        st().functions.insert(function, Function { module, name });
        Ok(())
    }
    fn cuLaunchKernel(
        function: u64, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared: u32, stream: u64,
        parameters: *const *const c_void, extra: *const *const c_void,
    ) {
        let _ = shared;
        let context = current()?;
        let key = work::stream(stream)?;
        let Some(found) = st().functions.get(&function) else {
            return refuse(INVALID_HANDLE, format!("{function:#x} is no function"));
        };
        let module_context = st().modules.get(&found.module).map(|module| module.context);
        let stream_context = st().streams.get(&key).map(|stream| stream.context);
        if module_context != Some(context) || stream_context != Some(context) {
            return refuse(INVALID_HANDLE, "a kernel was launched with a function or stream of another context");
        }
        let threads = u64::from(bx) * u64::from(by) * u64::from(bz);
        if threads == 0 || threads > 1024 || gx == 0 || gy == 0 || gz == 0 || gy > 65535 || gz > 65535 {
            return refuse(INVALID_VALUE, format!("a launch of ({gx},{gy},{gz}) blocks of ({bx},{by},{bz}) threads"));
        }
        let batch = match found.name.as_str() {
            "jetrt_copy_cast" => false,
            "jetrt_copy_batch" => true,
            other => return refuse(INVALID_VALUE, format!("this stand-in does not know the kernel {other}")),
        };
        let mut block: *const c_void = std::ptr::null();
        if !parameters.is_null() {
            block = *parameters;
        } else if !extra.is_null() {
            let mut i = 0;
            while *extra.add(i) as usize != 0 {
                if *extra.add(i) as usize == 1 {
                    block = *extra.add(i + 1);
                }
                i += 2;
            }
        }
        if block.is_null() {
            return refuse(INVALID_VALUE, "a kernel of jetrt was launched without its parameter");
        }
        if batch {
            if gy as usize > kernel::BATCH {
                return refuse(INVALID_VALUE, format!("jetrt_copy_batch has {} jobs and was launched for {gy}", kernel::BATCH));
            }
            let jobs = block.cast::<kernel::CopyCast>();
            let jobs = (0..gy as usize).map(|i| jobs.add(i).read_unaligned()).collect();
            return work::enqueue(key, Op::CopyBatch(Arc::new(jobs)));
        }
        let parameter = block.cast::<kernel::CopyCast>().read_unaligned();
        work::enqueue(key, Op::CopyCast(Arc::new(parameter)))
    }
    fn cuLaunchHostFunc(stream: u64, function: unsafe extern "C" fn(*mut c_void), data: *mut c_void) {
        let key = work::stream(stream)?;
        work::enqueue(key, Op::Host { function, data: data as u64 })
    }
}

exports! { destroy_call:
    fn cuModuleUnload(module: u64) {
        unsafe_call()?;
        match st().modules.remove(&module) {
            Some(_) => {
                st().functions.retain(|_, function| function.module != module);
                Ok(())
            }
            None => refuse(INVALID_HANDLE, format!("{module:#x} is no module, or was unloaded before")),
        }
    }
}
