//! Device memory and page-locked host memory.

use super::driver::{cuda, driver};
use super::ffi::*;
use super::graph::Relaxed;
use super::{Device, Stream};
use crate::error::{Error, Field, Kind, Result};
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};

const PORTABLE: u32 = 1;
const DEVICE_MAP: u32 = 2;
const OUT_OF_MEMORY: i64 = 2;

/// Allocations that this process's jetrt has made so far: the steady state makes none, and tests assert it.
pub static DEVICE_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
pub static HOST_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

fn out_of_memory(e: Error, device: &Device, what: &str, bytes: u64) -> Error {
    if e.field("code") != Some(&Field::Int(OUT_OF_MEMORY)) {
        return e;
    }
    let (free, total) = device.memory().unwrap_or((0, 0));
    Error::new(
        Kind::OutOfMemory,
        format!(
            "{what}: {bytes} bytes requested, {free} free of {total} on cuda:{} ({}). Free memory (other engines, torch.cuda.empty_cache()), use smaller shapes or fewer contexts.",
            device.ordinal, device.info.name
        ),
    )
    .with("requested", bytes)
    .with("free", free)
    .with("total", total)
}

/// Bytes of device memory, freed on drop.
#[derive(Debug)]
pub struct DeviceBuffer {
    ptr: CUdeviceptr,
    bytes: u64,
    device: &'static Device,
}

impl DeviceBuffer {
    /// At least one byte is allocated, so that even an empty tensor has an address that TensorRT accepts. `what` names it in the error.
    pub fn new(device: &'static Device, bytes: u64, what: &str) -> Result<DeviceBuffer> {
        let d = driver()?;
        let _entered = device.enter()?;
        let _relaxed = Relaxed::enter();
        let mut ptr = 0;
        // SAFETY: the pointer is live and a context is current.
        unsafe { cuda!(d, cuMemAlloc_v2(&mut ptr, bytes.max(1) as usize)) }.map_err(|e| out_of_memory(e, device, what, bytes))?;
        DEVICE_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        Ok(DeviceBuffer { ptr, bytes, device })
    }

    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if let Ok(d) = driver() {
            let _entered = self.device.enter_anyway();
            // A tensor may be dropped while this thread captures a graph, where freeing would otherwise break the capture.
            let _relaxed = Relaxed::enter();
            // SAFETY: owned and freed once. cuMemFree waits for work in flight that may still use it.
            let _ = unsafe { cuda!(d, cuMemFree_v2(self.ptr)) };
        }
    }
}

/// Page-locked host memory that the device can address too.
#[derive(Debug)]
pub struct PinnedBuffer {
    host: *mut c_void,
    ptr: CUdeviceptr,
    bytes: u64,
    device: &'static Device,
}

// SAFETY: plain memory; whoever holds the buffer decides who writes when.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above; shared references only give out addresses.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    pub fn new(device: &'static Device, bytes: u64, what: &str) -> Result<PinnedBuffer> {
        let d = driver()?;
        let _entered = device.enter()?;
        let _relaxed = Relaxed::enter();
        let mut host = std::ptr::null_mut();
        // SAFETY: the pointer is live and a context is current.
        unsafe { cuda!(d, cuMemHostAlloc(&mut host, bytes.max(1) as usize, PORTABLE | DEVICE_MAP)) }
            .map_err(|e| out_of_memory(e, device, what, bytes))?;
        HOST_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // Owned from here on: a failure below frees it.
        let mut buffer = PinnedBuffer {
            host,
            ptr: 0,
            bytes,
            device,
        };
        // SAFETY: `host` was allocated above with DEVICE_MAP.
        unsafe { cuda!(d, cuMemHostGetDevicePointer_v2(&mut buffer.ptr, host, 0)) }?;
        Ok(buffer)
    }

    /// The address for the device.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// The address for the host.
    pub fn host(&self) -> u64 {
        self.host as u64
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Do two buffers of one size hold the same bytes? Whoever asks has waited for the work that writes them.
    pub fn same_bytes(&self, other: &PinnedBuffer) -> bool {
        // SAFETY: each host address has `bytes` readable bytes as long as its buffer lives.
        let bytes = |b: &PinnedBuffer| unsafe { std::slice::from_raw_parts(b.host.cast::<u8>(), b.bytes as usize) };
        bytes(self) == bytes(other)
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if let Ok(d) = driver() {
            let _entered = self.device.enter_anyway();
            let _relaxed = Relaxed::enter();
            // SAFETY: owned and freed once.
            let _ = unsafe { cuda!(d, cuMemFreeHost(self.host)) };
        }
    }
}

/// The device's address of host memory that is page-locked and mapped (by whomever); `None` for pageable memory.
pub fn mapped_address(host: u64) -> Result<Option<u64>> {
    let d = driver()?;
    let mut ptr: CUdeviceptr = 0;
    // SAFETY: the attribute writes one pointer; the driver only looks the address up.
    let code = unsafe {
        (d.f.cuPointerGetAttribute)(
            (&raw mut ptr).cast(),
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_POINTER,
            host,
        )
    };
    match code {
        0 => Ok((ptr != 0).then_some(ptr)),
        // INVALID_VALUE is the driver's answer for memory that it does not know.
        1 => Ok(None),
        _ => d.check("cuPointerGetAttribute", code).map(|()| None),
    }
}

/// Which device's memory an address is; `None` when CUDA does not know it.
pub fn device_of(ptr: u64) -> Result<Option<i32>> {
    let d = driver()?;
    let mut ordinal = 0i32;
    // SAFETY: the attribute writes one int; the driver only looks the address up.
    let code = unsafe {
        (d.f.cuPointerGetAttribute)(
            (&raw mut ordinal).cast(),
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            ptr,
        )
    };
    match code {
        0 => Ok(Some(ordinal)),
        1 => Ok(None),
        _ => d.check("cuPointerGetAttribute", code).map(|()| None),
    }
}

/// Host to device, in stream order. `host` must stay valid until then: page-locked memory of ours, or memory that the caller waits for.
pub fn copy_to_device(dst: u64, host: u64, bytes: u64, stream: &Stream) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let d = driver()?;
    // SAFETY: both ranges have `bytes` bytes (checked by the executor against the tensors' sizes) and outlive the copy.
    unsafe { cuda!(d, cuMemcpyHtoDAsync_v2(dst, host as *const c_void, bytes as usize, stream.raw())) }
}

/// Device to host, in stream order.
pub fn copy_to_host(host: u64, src: u64, bytes: u64, stream: &Stream) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let d = driver()?;
    // SAFETY: as for `copy_to_device`.
    unsafe { cuda!(d, cuMemcpyDtoHAsync_v2(host as *mut c_void, src, bytes as usize, stream.raw())) }
}

/// Device to device, in stream order.
pub fn copy_on_device(dst: u64, src: u64, bytes: u64, stream: &Stream) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let d = driver()?;
    // SAFETY: as for `copy_to_device`.
    unsafe { cuda!(d, cuMemcpyDtoDAsync_v2(dst, src, bytes as usize, stream.raw())) }
}

/// Fills device memory, in stream order.
pub fn fill(dst: u64, byte: u8, bytes: u64, stream: &Stream) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let d = driver()?;
    // SAFETY: the range has `bytes` bytes and outlives the work.
    unsafe { cuda!(d, cuMemsetD8Async(dst, byte, bytes as usize, stream.raw())) }
}

/// Copies device memory into `out` and waits for it. The caller has ordered the producer's work before.
pub fn read_back(device: i32, ptr: u64, out: &mut [u8]) -> Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    let d = driver()?;
    let _entered = Device::get(device)?.enter()?;
    let _relaxed = Relaxed::enter();
    // SAFETY: `out` has the stated length; the caller vouches for the device range.
    unsafe { cuda!(d, cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), ptr, out.len())) }
}

/// Copies between host addresses: into and out of page-locked staging memory.
pub fn copy_on_host(dst: u64, src: u64, bytes: u64) {
    if bytes != 0 {
        // SAFETY: both ranges have `bytes` bytes and never overlap: one side is always a buffer of ours that nobody else sees yet.
        unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst as *mut u8, bytes as usize) }
    }
}
