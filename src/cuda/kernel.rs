//! The copy-and-cast kernel: any strided tensor into a packed one, in one launch; and plain copies of many tensors in one
//! launch. Source and PTX: `kernels/`.

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

/// One job of a kernel, as in `kernels/copy_cast.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
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

const NO_JOB: CopyCast = CopyCast {
    dst: 0,
    src: 0,
    n: 0,
    dims: [0; 8],
    strides: [0; 8],
    ndim: 0,
    src_type: 0,
    dst_type: 0,
    pad: 0,
};

impl CopyCast {
    fn new(dst: u64, src: &TensorView, src_type: i32, dst_type: i32) -> CopyCast {
        let layout = if src.contiguous {
            src.dims.contiguous_strides()
        } else {
            src.strides
        };
        let mut job = CopyCast {
            dst,
            src: src.ptr,
            n: src.elements(),
            ndim: src.dims.rank() as i32,
            src_type,
            dst_type,
            ..NO_JOB
        };
        job.dims[..src.dims.rank()].copy_from_slice(src.dims.as_slice());
        job.strides[..layout.rank()].copy_from_slice(layout.as_slice());
        job
    }
}

/// Jobs of one batched launch: what 4096 bytes of parameters hold.
const BATCH: usize = 24;

/// A plain copy: `src`, of any strides, goes to `dst`, packed.
#[derive(Debug, Clone, Copy)]
pub struct PlainCopy {
    pub dst: u64,
    pub src: TensorView,
    /// Bytes of one element: 1, 2, 4 or 8.
    pub size: u64,
}

/// The kernels, loaded on one device, for the life of the process.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    function: CUfunction,
    batch: CUfunction,
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
        let (mut module, mut function, mut batch) = (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: PTX is a NUL-terminated text; the pointers are live; a context is current.
        unsafe {
            cuda!(d, cuModuleLoadData(&mut module, PTX.as_ptr().cast()))?;
            cuda!(d, cuModuleGetFunction(&mut function, module, c"jetrt_copy_cast".as_ptr()))?;
            cuda!(d, cuModuleGetFunction(&mut batch, module, c"jetrt_copy_batch".as_ptr()))?;
        }
        let kernel = Kernel {
            function,
            batch,
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
        let mut job = CopyCast::new(dst, src, src.dtype.code(), to.code());
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

    /// Makes these copies, as many as a launch holds at a time. Every address must be reachable by the device, and every
    /// `dst` have room for the elements of its `src`.
    pub fn launch_plain(&self, copies: &[PlainCopy], stream: &Stream) -> Result<()> {
        for some in copies.chunks(BATCH) {
            let mut jobs = [NO_JOB; BATCH];
            let mut blocks = 1;
            let mut count = 0;
            for copy in some.iter().filter(|c| c.src.elements() > 0) {
                // An unsigned integer of that size: the bytes are what counts.
                let code = match copy.size {
                    1 => DType::U8,
                    2 => DType::U16,
                    4 => DType::U32,
                    _ => DType::U64,
                }
                .code();
                jobs[count] = CopyCast::new(copy.dst, &copy.src, code, code);
                count += 1;
                // A packed source is moved 16 bytes at a time where it can be.
                let steps = match copy.src.contiguous {
                    true => (copy.src.elements() * copy.size).div_ceil(16),
                    false => copy.src.elements(),
                };
                blocks = steps.div_ceil(u64::from(THREADS)).max(blocks);
            }
            if count == 0 {
                continue;
            }
            let blocks = blocks.min(u64::from(self.blocks_max)) as u32;
            let mut params = [jobs.as_mut_ptr().cast()];
            let d = driver()?;
            // SAFETY: the kernel takes one array of BATCH jobs, which the driver copies at the call, and looks at the first
            // `count`; the caller vouches for the addresses.
            unsafe {
                cuda!(
                    d,
                    cuLaunchKernel(
                        self.batch,
                        blocks,
                        count as u32,
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
            }?;
        }
        Ok(())
    }
}
