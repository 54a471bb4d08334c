//! The driver, found the way TensorRT finds it: `libcuda.so.1`, at run time. It must be the other stand-in.

use std::ffi::{c_void, CStr, CString};
use std::sync::OnceLock;

macro_rules! driver {
    ($($field:ident = $symbol:literal: fn($($type:ty),*) -> $ret:ty;)*) => {
        pub struct Driver { $(pub $field: unsafe extern "C" fn($($type),*) -> $ret,)* }
        impl Driver {
            unsafe fn open() -> Result<Driver, String> {
                let handle = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
                if handle.is_null() {
                    return Err("CUDA initialization failure with error: 35. Please check your CUDA installation: no libcuda.so.1".to_owned());
                }
                $(
                    let name = CString::new($symbol).unwrap_or_default();
                    let $field = libc::dlsym(handle, name.as_ptr());
                    if $field.is_null() {
                        return Err(format!("the driver found is not the stand-in that this library needs: no {}", $symbol));
                    }
                )*
                Ok(Driver { $($field: std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> $ret>($field),)* })
            }
        }
    };
}

driver! {
    init = "cuInit": fn(u32) -> i32;
    current = "cuCtxGetCurrent": fn(*mut u64) -> i32;
    set_current = "cuCtxSetCurrent": fn(u64) -> i32;
    retain = "cuDevicePrimaryCtxRetain": fn(*mut u64, i32) -> i32;
    device = "cuCtxGetDevice": fn(*mut i32) -> i32;
    attribute = "cuDeviceGetAttribute": fn(*mut i32, i32, i32) -> i32;
    total = "cuDeviceTotalMem_v2": fn(*mut usize, i32) -> i32;
    alloc = "cuMemAlloc_v2": fn(*mut u64, usize) -> i32;
    free = "cuMemFree_v2": fn(u64) -> i32;
    synchronize = "cuStreamSynchronize": fn(u64) -> i32;
    capturing = "cuStreamIsCapturing": fn(u64, *mut i32) -> i32;
    stream_create = "cuStreamCreate": fn(*mut u64, u32) -> i32;
    stream_destroy = "cuStreamDestroy_v2": fn(u64) -> i32;
    stream_wait = "cuStreamWaitEvent": fn(u64, u64, u32) -> i32;
    event_create = "cuEventCreate": fn(*mut u64, u32) -> i32;
    event_record = "cuEventRecord": fn(u64, u64) -> i32;
    event_destroy = "cuEventDestroy_v2": fn(u64) -> i32;
    launch = "fake_cuda_launch": fn(u64, unsafe extern "C" fn(*mut c_void) -> i32, u64) -> i32;
    reachable = "fake_cuda_reachable": fn(u64, u64, i32, *const std::ffi::c_char) -> i32;
    place = "fake_cuda_place": fn(u64, u64) -> i32;
}

pub fn driver() -> Result<&'static Driver, &'static str> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    // SAFETY: symbols of the driver's own signatures.
    DRIVER.get_or_init(|| unsafe { Driver::open() }).as_ref().map_err(String::as_str)
}

/// A driver call's code, worded as TensorRT words it.
pub fn check(code: i32, what: &str) -> Result<(), String> {
    match code {
        0 => Ok(()),
        2 => Err(format!("Error Code 1: Cuda Runtime (In {what}: out of memory)")),
        code => Err(format!("Error Code 1: Cuda Runtime (In {what}: CUDA error {code})")),
    }
}

/// Compute capability of the current device, as 90 for 9.0.
pub fn sm() -> Result<i64, String> {
    let driver = driver()?;
    let device = driver.attach()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: plain driver calls.
    unsafe {
        check((driver.attribute)(&mut major, 75, device), "cuDeviceGetAttribute")?;
        check((driver.attribute)(&mut minor, 76, device), "cuDeviceGetAttribute")?;
    }
    Ok(i64::from(major * 10 + minor))
}

impl Driver {
    /// As the CUDA runtime does: where no context is current, the primary one of device 0 is made so.
    pub fn attach(&self) -> Result<i32, String> {
        // SAFETY: plain driver calls with valid places for results.
        unsafe {
            check((self.init)(0), "cuInit")?;
            let mut context = 0;
            check((self.current)(&mut context), "cuCtxGetCurrent")?;
            if context == 0 {
                check((self.retain)(&mut context, 0), "cuDevicePrimaryCtxRetain")?;
                check((self.set_current)(context), "cuCtxSetCurrent")?;
            }
            let mut device = 0;
            check((self.device)(&mut device), "cuCtxGetDevice")?;
            Ok(device)
        }
    }

    pub fn may_touch(&self, address: u64, bytes: usize, device: i32, what: &CStr) -> bool {
        // SAFETY: a plain call.
        unsafe { (self.reachable)(address, bytes as u64, device, what.as_ptr()) != 0 }
    }
}
