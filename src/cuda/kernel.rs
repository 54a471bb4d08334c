//! The copy-and-cast kernel: any strided tensor into a packed one, in one launch. Source and PTX: `kernels/`.

use super::driver::{cuda, driver};
use super::ffi::*;
use super::{Device, Stream};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::TensorView;
use std::sync::Mutex;

/// PTX 8.2 for sm_70: what the drivers of JetPack 6 (CUDA 12.2) accept.
const PTX: &str = concat!(include_str!("../../kernels/copy_cast.ptx"), "\0");
const THREADS: u32 = 256;

/// The kernel's one parameter, as in `kernels/copy_cast.cu`.
#[repr(C)]
struct CopyCast {
    dst: u64,
    src: u64,
    n: u64,
    dims: [i64; 8],
    strides: [i64; 8],
    ndim: i32,
    src_type: i32,
    dst_type: i32,
    pad: i32,
}

/// The kernel, loaded on one device, for the life of the process.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    function: CUfunction,
    blocks_max: u32,
}

// SAFETY: a CUfunction may be launched from any thread (CUDA driver API); its module is never unloaded.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

static LOADED: Mutex<Vec<(i32, Kernel)>> = Mutex::new(Vec::new());

impl Kernel {
    pub fn get(device: &'static Device) -> Result<Kernel> {
        let mut loaded = LOADED.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, k)) = loaded.iter().find(|(o, _)| *o == device.ordinal) {
            return Ok(*k);
        }
        let d = driver()?;
        let _entered = device.enter()?;
        let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: PTX is a NUL-terminated text; both pointers are live; a context is current.
        unsafe {
            cuda!(d, cuModuleLoadData(&mut module, PTX.as_ptr().cast()))?;
            cuda!(d, cuModuleGetFunction(&mut function, module, c"jetrt_copy_cast".as_ptr()))?;
        }
        let kernel = Kernel {
            function,
            blocks_max: (device.info.sm_count.max(1) as u32) * 16,
        };
        loaded.push((device.ordinal, kernel));
        Ok(kernel)
    }

    /// Writes `src` (of `to.casts_to`-compatible type, any strides) to `dst`, packed and converted to `to`. `src.ptr` must
    /// be reachable by the device.
    pub fn launch(&self, dst: u64, src: &TensorView, to: DType, stream: &Stream) -> Result<()> {
        let n = src.elements();
        if n == 0 {
            return Ok(());
        }
        let (mut dims, mut strides) = ([0; 8], [0; 8]);
        let layout = if src.contiguous {
            src.dims.contiguous_strides()
        } else {
            src.strides
        };
        dims[..src.dims.rank()].copy_from_slice(src.dims.as_slice());
        strides[..layout.rank()].copy_from_slice(layout.as_slice());
        let mut job = CopyCast {
            dst,
            src: src.ptr,
            n,
            dims,
            strides,
            ndim: src.dims.rank() as i32,
            src_type: src.dtype.code(),
            dst_type: to.code(),
            pad: 0,
        };
        let blocks = n.div_ceil(u64::from(THREADS)).min(u64::from(self.blocks_max)) as u32;
        let mut params = [(&raw mut job).cast()];
        let d = driver()?;
        // SAFETY: the kernel takes exactly one CopyCast, which the driver copies at the call; `dst` has room for n elements
        // of `to` (the staging buffer was sized for it) and the view describes readable device memory.
        unsafe {
            cuda!(
                d,
                cuLaunchKernel(
                    self.function,
                    blocks,
                    1,
                    1,
                    THREADS,
                    1,
                    1,
                    0,
                    stream.raw(),
                    params.as_mut_ptr(),
                    std::ptr::null_mut()
                )
            )
        }
    }
}
