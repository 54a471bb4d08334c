//! Devices and their primary contexts.

use super::driver::{cuda, driver, Driver};
use super::ffi::*;
use super::stream::Stream;
use crate::error::{Error, Kind, Result};
use std::sync::{Mutex, Weak};

#[derive(Debug, Clone)]
pub struct Info {
    pub name: String,
    /// 87 for compute capability 8.7.
    pub sm: i32,
    pub sm_count: i32,
    pub total_memory: u64,
    /// CPU and GPU share one memory (Jetson, GB10). `JETRT_FORCE_INTEGRATED=1` sets it, for tests on a discrete GPU.
    pub integrated: bool,
}

/// A device with its primary context, which is retained for the life of the process: releasing it at interpreter exit
/// races the driver's own teardown.
#[derive(Debug)]
pub struct Device {
    pub ordinal: i32,
    pub info: Info,
    context: CUcontext,
    /// What `Stream::joined_to_legacy` gives.
    pub(super) joined: Mutex<Weak<Stream>>,
}

// SAFETY: a CUcontext may be used from any thread (CUDA driver API, "Context Management"); the rest is plain data.
unsafe impl Send for Device {}
// SAFETY: as above; what changes in a Device has a lock.
unsafe impl Sync for Device {}

static DEVICES: Mutex<Vec<&'static Device>> = Mutex::new(Vec::new());

impl Device {
    /// The device of that ordinal; its primary context is created when needed.
    pub fn get(ordinal: i32) -> Result<&'static Device> {
        let mut known = DEVICES.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(d) = known.iter().find(|d| d.ordinal == ordinal) {
            return Ok(d);
        }
        let device: &'static Device = Box::leak(Box::new(Device::open(ordinal)?));
        known.push(device);
        Ok(device)
    }

    pub fn count() -> Result<i32> {
        let d = driver()?;
        let mut n = 0;
        // SAFETY: the pointer is to a live int.
        unsafe { cuda!(d, cuDeviceGetCount(&mut n)) }?;
        Ok(n)
    }

    fn open(ordinal: i32) -> Result<Device> {
        let d = driver()?;
        let count = Device::count()?;
        if !(0..count).contains(&ordinal) {
            return Err(Error::new(
                Kind::Device,
                format!("device {ordinal} does not exist: this process sees {count} CUDA device(s), numbered from 0. Pass one of them as device=."),
            )
            .with("found", format!("cuda:{ordinal}"))
            .with("allowed", format!("0..{count}")));
        }
        let mut raw = 0;
        // SAFETY: the pointer is to a live CUdevice and the ordinal is in range.
        unsafe { cuda!(d, cuDeviceGet(&mut raw, ordinal)) }?;
        let info = Device::read_info(d, raw)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: `raw` is a device of this driver. Retained once for the life of the process.
        unsafe { cuda!(d, cuDevicePrimaryCtxRetain(&mut context, raw)) }?;
        Ok(Device {
            ordinal,
            info,
            context,
            joined: Mutex::default(),
        })
    }

    fn read_info(d: &Driver, raw: CUdevice) -> Result<Info> {
        let attribute = |a: CUdevice_attribute| -> Result<i32> {
            let mut v = 0;
            // SAFETY: the pointer is to a live int and `raw` is a device.
            unsafe { cuda!(d, cuDeviceGetAttribute(&mut v, a, raw)) }?;
            Ok(v)
        };
        let mut name = [0u8; 256];
        let mut total = 0usize;
        // SAFETY: the buffer has the stated length, which leaves the driver room for its NUL; `total` is live.
        unsafe {
            cuda!(d, cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32 - 1, raw))?;
            cuda!(d, cuDeviceTotalMem_v2(&mut total, raw))?;
        }
        let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
        use CUdevice_attribute as A;
        Ok(Info {
            name: String::from_utf8_lossy(&name[..end]).into_owned(),
            sm: attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
                + attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            sm_count: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            total_memory: total as u64,
            integrated: attribute(A::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0
                || std::env::var_os("JETRT_FORCE_INTEGRATED").is_some_and(|v| v == "1"),
        })
    }

    /// Makes this device's primary context current for the calling thread until the guard is gone.
    #[inline]
    pub fn enter(&self) -> Result<Entered> {
        let d = driver()?;
        let mut current = std::ptr::null_mut();
        // SAFETY: the pointer is to a live CUcontext.
        unsafe { cuda!(d, cuCtxGetCurrent(&mut current)) }?;
        if current == self.context {
            return Ok(Entered { pop: false });
        }
        self.enter_from(d, current)
    }

    #[cold]
    fn enter_from(&self, d: &Driver, current: CUcontext) -> Result<Entered> {
        if current.is_null() && self.ordinal == 0 {
            // A thread without a context gets the first device's, as the CUDA runtime would give it. (Another device's would make
            // that the current one of torch, too.)
            // SAFETY: the context is retained for ever.
            unsafe { cuda!(d, cuCtxSetCurrent(self.context)) }?;
            return Ok(Entered { pop: false });
        }
        let mut of = 0;
        if !current.is_null() {
            // SAFETY: there is a current context, and the pointer is live.
            unsafe { cuda!(d, cuCtxGetDevice(&mut of)) }?;
        }
        if !current.is_null() && !is_primary(d, current, of)? {
            return Err(Error::new(
                Kind::Device,
                format!(
                    "the current CUDA context of this thread is not the primary context of device {of} (PyCUDA's autoinit makes such a context): its streams and \
                     memory do not work with TensorRT, torch or jetrt and end in 'Cask' and 'invalid resource handle' errors. Use the primary context: \
                     pycuda.autoprimaryctx instead of pycuda.autoinit, or pop yours around jetrt calls."
                ),
            )
            .with("found", "a CUDA context that is not primary")
            .with("allowed", format!("the primary context of cuda:{}", self.ordinal)));
        }
        // SAFETY: the context is retained for ever; the guard pops it on this thread.
        unsafe { cuda!(d, cuCtxPushCurrent_v2(self.context)) }?;
        Ok(Entered { pop: true })
    }

    /// As [`Device::enter`], for giving something back: that must happen whatever is current, and even when the driver does
    /// not say what is.
    pub fn enter_anyway(&self) -> Entered {
        let Ok(d) = driver() else { return Entered { pop: false } };
        let mut current = std::ptr::null_mut();
        // SAFETY: the pointer is to a live CUcontext.
        if unsafe { cuda!(d, cuCtxGetCurrent(&mut current)) }.is_ok() && current == self.context {
            return Entered { pop: false };
        }
        // SAFETY: the context is retained for ever; the guard pops it on this thread.
        let pushed = unsafe { cuda!(d, cuCtxPushCurrent_v2(self.context)) };
        Entered { pop: pushed.is_ok() }
    }

    /// Free and total bytes of device memory.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let d = driver()?;
        let _entered = self.enter()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: both pointers are live and a context is current.
        unsafe { cuda!(d, cuMemGetInfo_v2(&mut free, &mut total)) }?;
        Ok((free as u64, total as u64))
    }
}

fn is_primary(d: &Driver, context: CUcontext, device: CUdevice) -> Result<bool> {
    let (mut flags, mut active) = (0, 0);
    // SAFETY: both pointers are live; `device` came from the driver.
    unsafe { cuda!(d, cuDevicePrimaryCtxGetState(device, &mut flags, &mut active)) }?;
    if active == 0 {
        return Ok(false);
    }
    let mut primary = std::ptr::null_mut();
    // SAFETY: retained only to compare, and released at once; it is active, so this neither creates nor destroys it.
    unsafe {
        cuda!(d, cuDevicePrimaryCtxRetain(&mut primary, device))?;
        cuda!(d, cuDevicePrimaryCtxRelease_v2(device))?;
    }
    Ok(primary == context)
}

/// Keeps a device's context current; see [`Device::enter`].
#[must_use]
pub struct Entered {
    pop: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pop {
            if let Ok(d) = driver() {
                let mut popped = std::ptr::null_mut();
                // SAFETY: this guard pushed a context on this thread (guards are not Send: they live inside one call).
                let _ = unsafe { cuda!(d, cuCtxPopCurrent_v2(&mut popped)) };
            }
        }
    }
}
