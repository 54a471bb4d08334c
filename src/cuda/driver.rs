//! The CUDA driver as a table of functions, filled once by `dlopen`. The types are cudarc's; the table is our own because
//! cudarc's panics where a library or symbol is missing, prefers a stub `libcuda.so`, and reads return codes as a closed
//! enum that a newer driver may exceed.

use super::ffi::*;
use crate::error::{Error, Kind, Result};
use libloading::Library;
use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void, CStr};
use std::sync::OnceLock;

macro_rules! table {
    ($($name:ident ( $($arg:ty),* );)*) => {
        #[allow(non_snake_case)]
        pub(super) struct Table { $(pub $name: unsafe extern "C" fn($($arg),*) -> u32,)* }

        #[allow(non_snake_case)]
        impl Table {
            /// SAFETY: `lib` must be a CUDA driver: its symbols then have these signatures (cudarc's `sys`, CUDA 12.2).
            unsafe fn fill(lib: &Library) -> std::result::Result<Table, Vec<String>> {
                let mut missing = Vec::new();
                $(
                    // SAFETY: the caller vouches for the library; the pointer is only used while `lib` is open (for ever).
                    let $name = match unsafe { lib.get::<unsafe extern "C" fn($($arg),*) -> u32>(concat!(stringify!($name), "\0").as_bytes()) } {
                        Ok(f) => Some(*f),
                        Err(_) => { missing.push(stringify!($name).to_string()); None }
                    };
                )*
                match ($($name,)*) {
                    ($(Some($name),)*) => Ok(Table { $($name,)* }),
                    _ => Err(missing),
                }
            }
        }
    };
}

table! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut CUdevice, c_int);
    cuDeviceGetName(*mut c_char, c_int, CUdevice);
    cuDeviceGetAttribute(*mut c_int, CUdevice_attribute, CUdevice);
    cuDeviceTotalMem_v2(*mut usize, CUdevice);
    cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
    cuDevicePrimaryCtxGetState(CUdevice, *mut c_uint, *mut c_int);
    cuDevicePrimaryCtxRelease_v2(CUdevice);
    cuCtxGetCurrent(*mut CUcontext);
    cuCtxSetCurrent(CUcontext);
    cuCtxPushCurrent_v2(CUcontext);
    cuCtxPopCurrent_v2(*mut CUcontext);
    cuCtxGetDevice(*mut CUdevice);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemAlloc_v2(*mut CUdeviceptr, usize);
    cuMemFree_v2(CUdeviceptr);
    cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    cuMemFreeHost(*mut c_void);
    cuMemHostGetDevicePointer_v2(*mut CUdeviceptr, *mut c_void, c_uint);
    cuPointerGetAttribute(*mut c_void, CUpointer_attribute, CUdeviceptr);
    cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
    cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
    cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, usize, CUstream);
    cuMemcpyDtoH_v2(*mut c_void, CUdeviceptr, usize);
    cuStreamCreate(*mut CUstream, c_uint);
    cuStreamDestroy_v2(CUstream);
    cuStreamSynchronize(CUstream);
    cuStreamWaitEvent(CUstream, CUevent, c_uint);
    cuStreamGetCaptureInfo_v2(CUstream, *mut CUstreamCaptureStatus, *mut u64, *mut CUgraph, *mut *const CUgraphNode, *mut usize);
    cuMemsetD8Async(CUdeviceptr, u8, usize, CUstream);
    cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode);
    cuStreamEndCapture(CUstream, *mut CUgraph);
    cuThreadExchangeStreamCaptureMode(*mut CUstreamCaptureMode);
    cuEventCreate(*mut CUevent, c_uint);
    cuEventRecord(CUevent, CUstream);
    cuEventQuery(CUevent);
    cuEventSynchronize(CUevent);
    cuEventDestroy_v2(CUevent);
    cuGraphInstantiateWithFlags(*mut CUgraphExec, CUgraph, c_ulonglong);
    cuGraphLaunch(CUgraphExec, CUstream);
    cuGraphUpload(CUgraphExec, CUstream);
    cuGraphDestroy(CUgraph);
    cuGraphExecDestroy(CUgraphExec);
    cuGraphGetNodes(CUgraph, *mut CUgraphNode, *mut usize);
    cuGraphNodeGetType(CUgraphNode, *mut c_uint);
    cuModuleLoadData(*mut CUmodule, *const c_void);
    cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
    cuLaunchKernel(CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void);
    cuGetErrorName(u32, *mut *const c_char);
    cuGetErrorString(u32, *mut *const c_char);
}

/// Where `libcuda.so.1` is looked for: the loader first, then the folders of L4T, which some containers leave off the path.
/// Never `libcuda.so`: that name is often the link-time stub of a toolkit.
pub const CANDIDATES: [&str; 3] = [
    "libcuda.so.1",
    "/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1",
    "/usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1",
];

/// What the kernel's PTX needs.
const OLDEST: i32 = 12020;

pub struct Driver {
    pub(super) f: Table,
    pub library: &'static str,
    /// 12060 for CUDA 12.6.
    pub version: i32,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

/// The driver, opened and initialised once; a failure is not remembered, so a repaired setup works without a restart.
pub fn driver() -> Result<&'static Driver> {
    if let Some(d) = DRIVER.get() {
        return Ok(d);
    }
    let opened = open()?;
    Ok(DRIVER.get_or_init(|| opened))
}

#[cold]
fn open() -> Result<Driver> {
    let mut reasons = Vec::new();
    for name in CANDIDATES {
        // SAFETY: loading the CUDA driver runs its initialisers, which is what every CUDA program does.
        match unsafe { Library::new(name) } {
            Ok(lib) => {
                // Leaked on purpose: unloading a driver that other libraries of the process use is never right.
                let lib: &'static Library = Box::leak(Box::new(lib));
                // SAFETY: a library of this name is the CUDA driver.
                let f = unsafe { Table::fill(lib) }.map_err(|missing| {
                    Error::new(
                        Kind::UnsupportedVersion,
                        format!("{name}: this CUDA driver lacks {}; jetrt needs a driver of CUDA 12.2 (JetPack 6.0) or later. Update the driver.", missing.join(", ")),
                    )
                    .with("library", name)
                    .with("found", format!("a driver without {}", missing.join(", ")))
                    .with("supported", "CUDA 12.2 or later")
                })?;
                let mut driver = Driver {
                    f,
                    library: name,
                    version: 0,
                };
                driver.init()?;
                return Ok(driver);
            }
            Err(e) => reasons.push(format!("{name}: {e}")),
        }
    }
    Err(Error::new(
        Kind::LibraryNotFound,
        format!(
            "the CUDA driver (libcuda.so.1) cannot be opened: {}. Install the NVIDIA driver; in a container start it with the NVIDIA runtime \
             (--runtime nvidia or --gpus all).",
            reasons.join("; ")
        ),
    )
    .with("library", "libcuda.so.1")
    .with("searched", CANDIDATES.iter().map(|c| c.to_string()).collect::<Vec<_>>()))
}

impl Driver {
    fn init(&mut self) -> Result<()> {
        // SAFETY: cuInit takes a zero flag word and may be called any number of times.
        self.check("cuInit", unsafe { (self.f.cuInit)(0) }).map_err(|e| {
            e.context(format!(
                "{}: the driver is there but finds no usable GPU (is one visible to this process? see nvidia-smi)",
                self.library
            ))
        })?;
        let mut version = 0;
        // SAFETY: the pointer is to a live int.
        self.check("cuDriverGetVersion", unsafe { (self.f.cuDriverGetVersion)(&mut version) })?;
        if version < OLDEST {
            let found = format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
            return Err(Error::new(
                Kind::UnsupportedVersion,
                format!(
                    "{}: this CUDA driver is of {found}; jetrt needs one of CUDA 12.2 (JetPack 6.0) or later. Update the driver.",
                    self.library
                ),
            )
            .with("library", self.library)
            .with("found", found)
            .with("supported", "CUDA 12.2 or later"));
        }
        self.version = version;
        Ok(())
    }

    /// Turns a return code into a typed error that names the call.
    #[inline]
    pub(super) fn check(&self, call: &'static str, code: u32) -> Result<()> {
        if code == 0 {
            Ok(())
        } else {
            Err(self.error(call, code))
        }
    }

    #[cold]
    fn error(&self, call: &'static str, code: u32) -> Error {
        let text = |f: unsafe extern "C" fn(u32, *mut *const c_char) -> u32| {
            let mut p: *const c_char = std::ptr::null();
            // SAFETY: the driver writes a pointer to a static string, or leaves null for a code it does not know.
            unsafe {
                f(code, &mut p);
                (!p.is_null()).then(|| CStr::from_ptr(p).to_string_lossy().into_owned())
            }
        };
        let name = text(self.f.cuGetErrorName).unwrap_or_else(|| format!("CUDA error {code}"));
        let what = text(self.f.cuGetErrorString).unwrap_or_else(|| "unknown to this driver".into());
        let next = match code {
            2 => "Free device memory or use a smaller shape.",
            100 => "No GPU is visible to this process: check nvidia-smi, CUDA_VISIBLE_DEVICES and the container's runtime.",
            400 => "Usually a stream or context that belongs to another CUDA context: use the primary context (torch and jetrt do).",
            700 | 716 | 717 | 718 | 719 => "An earlier kernel on this device failed and the CUDA context is unusable: restart the process; CUDA_LAUNCH_BLOCKING=1 finds the kernel.",
            _ => "See the CUDA driver API documentation of this call.",
        };
        Error::new(
            Kind::Cuda,
            format!("{call} failed: {name} ({code}): {}. {next}", what.trim_end_matches('.')),
        )
        .with("call", call)
        .with("code", i64::from(code))
        .with("name", name)
    }
}

/// Calls a driver function and checks its code: `cuda!(cuEventRecord(event, stream))` is a `Result<()>`. Expands to an
/// unsafe call, so it stands inside `unsafe` blocks of this module only.
macro_rules! cuda {
    ($driver:expr, $name:ident ( $($arg:expr),* $(,)? )) => {
        $driver.check(stringify!($name), ($driver.f.$name)($($arg),*))
    };
}
pub(super) use cuda;
