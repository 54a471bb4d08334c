//! An execution context: shapes, addresses, enqueue. Sets only what changed.

use super::abi::context as slot;
use super::object::{call, refused, Object, RawDims};
use super::profiler::Profiler;
use super::{Engine, OutputAllocator};
use crate::cuda::Stream;
use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use std::ffi::{c_char, c_void};
use std::sync::Arc;

type SetAddress = unsafe extern "C" fn(*mut c_void, *const c_char, *mut c_void) -> bool;
type SetShape = unsafe extern "C" fn(*mut c_void, *const c_char, *const RawDims) -> bool;
type Enqueue = unsafe extern "C" fn(*mut c_void, *mut c_void) -> bool;

/// `!Sync` in spirit: every method that changes it takes `&mut self`, so two threads cannot use one context at once.
/// Fields drop in order: the context before the engine that made it.
#[derive(Debug)]
pub struct Context {
    object: Object,
    set_address: SetAddress,
    set_shape: SetShape,
    enqueue: Enqueue,
    profile: usize,
    shapes: Vec<Option<Dims>>,
    addresses: Vec<u64>,
    allocators: Vec<(usize, Box<OutputAllocator>)>,
    profiler: Option<Box<Profiler>>,
    engine: Arc<Engine>,
}

impl std::fmt::Debug for OutputAllocator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OutputAllocator")
    }
}

impl Context {
    pub(super) fn new(object: Object, engine: Arc<Engine>) -> Result<Context> {
        let n = engine.io.len();
        // SAFETY: the three aliases are the signatures of VExecutionContext's methods in abi/vtables.csv.
        let (set_address, set_shape, enqueue) = unsafe {
            (
                object.method::<SetAddress>(engine.lib, &slot::SET_TENSOR_ADDRESS)?,
                object.method::<SetShape>(engine.lib, &slot::SET_INPUT_SHAPE)?,
                object.method::<Enqueue>(engine.lib, &slot::ENQUEUE_V3)?,
            )
        };
        Ok(Context {
            object,
            set_address,
            set_shape,
            enqueue,
            profile: 0,
            shapes: vec![None; n],
            addresses: vec![0; n],
            allocators: Vec::new(),
            profiler: None,
            engine,
        })
    }

    pub(super) fn object(&self) -> &Object {
        &self.object
    }

    pub(super) fn profiler(&self) -> Option<&Profiler> {
        self.profiler.as_deref()
    }

    pub(super) fn keep_profiler(&mut self, profiler: Box<Profiler>) {
        self.profiler = Some(profiler);
    }

    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Switches the optimisation profile, in stream order. Shapes must be set again after it.
    pub fn set_profile(&mut self, profile: usize, stream: &Stream) -> Result<()> {
        if profile == self.profile {
            return Ok(());
        }
        let mark = crate::log::TENSORRT.mark();
        // SAFETY: VExecutionContext::setOptimizationProfileAsync(int32_t, cudaStream_t).
        let ok = unsafe {
            call!(
                self.engine.lib,
                self.object,
                slot::SET_OPTIMIZATION_PROFILE_ASYNC,
                fn(i32, *mut c_void) -> bool,
                profile as i32,
                stream.handle() as *mut c_void
            )
        }?;
        self.shapes.fill(None);
        if !ok {
            return Err(refused(format!("optimisation profile {profile} was refused"), mark));
        }
        self.profile = profile;
        Ok(())
    }

    /// Sets an input's shape; no call when it is the one that is set already.
    #[inline]
    pub fn set_shape(&mut self, tensor: usize, dims: &Dims) -> Result<()> {
        if self.shapes[tensor].as_ref() == Some(dims) {
            return Ok(());
        }
        let mark = crate::log::TENSORRT.mark();
        let raw = RawDims::from(dims);
        let io = &self.engine.io[tensor];
        // SAFETY: signature as in `new`; name and dims live during the call.
        if unsafe { (self.set_shape)(self.object.implementation(), io.c_name().as_ptr(), &raw) } {
            self.shapes[tensor] = Some(*dims);
            Ok(())
        } else {
            self.shapes[tensor] = None;
            Err(refused(format!("input '{}': TensorRT refused shape {dims}", io.name), mark).with("tensor", io.name.clone()))
        }
    }

    /// Binds an address; no call when it is bound already. Host shape tensors pass `force`, because their contents count too.
    #[inline]
    pub fn set_address(&mut self, tensor: usize, address: u64, force: bool) -> Result<()> {
        if self.addresses[tensor] == address && !force {
            return Ok(());
        }
        let mark = crate::log::TENSORRT.mark();
        let io = &self.engine.io[tensor];
        // SAFETY: signature as in `new`; the executor keeps the memory alive until the work that uses it is done.
        if unsafe { (self.set_address)(self.object.implementation(), io.c_name().as_ptr(), address as *mut c_void) } {
            self.addresses[tensor] = address;
            Ok(())
        } else {
            self.addresses[tensor] = 0;
            Err(refused(format!("tensor '{}': TensorRT refused address {address:#x}", io.name), mark).with("tensor", io.name.clone()))
        }
    }

    /// Forgets every bound address, so that the next call binds all of them again.
    pub fn forget(&mut self) {
        self.addresses.fill(0);
        self.shapes.fill(None);
    }

    /// Are all shapes known? The error names what TensorRT still misses.
    pub fn infer_shapes(&mut self) -> Result<()> {
        let mark = crate::log::TENSORRT.mark();
        let mut missing: Vec<*const c_char> = vec![std::ptr::null(); self.engine.io.len()];
        // SAFETY: VExecutionContext::inferShapes(int32_t, const char**); the array has room for that many names.
        let n = unsafe {
            call!(
                self.engine.lib,
                self.object,
                slot::INFER_SHAPES,
                fn(i32, *mut *const c_char) -> i32,
                missing.len() as i32,
                missing.as_mut_ptr()
            )
        }?;
        if n == 0 {
            return Ok(());
        }
        // SAFETY: TensorRT wrote up to n names that live as long as the engine.
        let names: Vec<String> = missing
            .iter()
            .filter(|p| !p.is_null())
            .map(|&p| unsafe { super::object::text(p) })
            .collect();
        Err(refused(
            format!(
                "TensorRT could not infer the output shapes; not specified or invalid: {}",
                if names.is_empty() { "unknown".into() } else { names.join(", ") }
            ),
            mark,
        ))
    }

    /// A tensor's shape with the input shapes that are set; -1 where only the data decide.
    pub fn shape(&self, tensor: usize) -> Result<Dims> {
        let io = &self.engine.io[tensor];
        // SAFETY: VExecutionContext::getTensorShape(const char*) returns Dims by value.
        let raw = unsafe {
            call!(
                self.engine.lib,
                self.object,
                slot::GET_TENSOR_SHAPE,
                fn(*const c_char) -> RawDims,
                io.c_name().as_ptr()
            )
        }?;
        raw.dims()
            .ok_or_else(|| Error::new(Kind::Inference, format!("tensor '{}': TensorRT gives no shape", io.name)))
    }

    /// The most bytes that an output can have with the shapes that are set.
    pub fn max_output_bytes(&self, tensor: usize) -> Result<u64> {
        let io = &self.engine.io[tensor];
        // SAFETY: VExecutionContext::getMaxOutputSize(const char*) returns int64_t, -1 on error.
        let n = unsafe {
            call!(
                self.engine.lib,
                self.object,
                slot::GET_MAX_OUTPUT_SIZE,
                fn(*const c_char) -> i64,
                io.c_name().as_ptr()
            )
        }?;
        u64::try_from(n).map_err(|_| Error::new(Kind::Inference, format!("output '{}': TensorRT gives no maximum size", io.name)))
    }

    /// The allocator of a data-dependent output, made and registered at the first use.
    pub fn allocator(&mut self, tensor: usize) -> Result<&OutputAllocator> {
        if let Some(i) = self.allocators.iter().position(|(t, _)| *t == tensor) {
            return Ok(&self.allocators[i].1);
        }
        let allocator = OutputAllocator::new(self.engine.lib);
        let io = &self.engine.io[tensor];
        let mark = crate::log::TENSORRT.mark();
        // SAFETY: VExecutionContext::setOutputAllocator(const char*, IOutputAllocator*); the box lives as long as the context.
        let ok = unsafe {
            call!(
                self.engine.lib,
                self.object,
                slot::SET_OUTPUT_ALLOCATOR,
                fn(*const c_char, *mut c_void) -> bool,
                io.c_name().as_ptr(),
                allocator.public()
            )
        }?;
        if !ok {
            return Err(refused(format!("output '{}': TensorRT refused an output allocator", io.name), mark));
        }
        self.allocators.push((tensor, allocator));
        let last = self.allocators.len() - 1;
        Ok(&self.allocators[last].1)
    }

    /// Gives the context its scratch memory (contexts made without their own).
    pub fn set_device_memory(&mut self, address: u64, bytes: u64) -> Result<()> {
        let lib = self.engine.lib;
        // SAFETY: VExecutionContext::setDeviceMemoryV2(void*, int64_t), or setDeviceMemory(void*) before 10.1; the owner of
        // this context keeps the memory alive.
        unsafe {
            if lib.has(&slot::SET_DEVICE_MEMORY_V2) {
                call!(
                    lib,
                    self.object,
                    slot::SET_DEVICE_MEMORY_V2,
                    fn(*mut c_void, i64) -> (),
                    address as *mut c_void,
                    bytes as i64
                )
            } else {
                call!(
                    lib,
                    self.object,
                    slot::SET_DEVICE_MEMORY,
                    fn(*mut c_void) -> (),
                    address as *mut c_void
                )
            }
        }
    }

    /// Enqueues the engine. The addresses bound must stay valid until the stream has passed this point.
    #[inline]
    pub fn enqueue(&mut self, stream: &Stream) -> Result<()> {
        // SAFETY: signature as in `new`; shapes and addresses are set.
        if unsafe { (self.enqueue)(self.object.implementation(), stream.handle() as *mut c_void) } {
            return Ok(());
        }
        Err(Error::new(Kind::Inference, "enqueueV3 failed"))
    }

    /// The typed error of a failed enqueue or context: with TensorRT's lines since the mark.
    pub fn explain(&self, e: Error, mark: u64) -> Error {
        self.engine.failed(e, mark)
    }
}
