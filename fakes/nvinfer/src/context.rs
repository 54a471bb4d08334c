//! IExecutionContext: what is bound, what may be enqueued, and how the work reaches the stream.

use std::ffi::{c_char, CString};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;

use crate::abi::{allocation_strategy, context as slots, debug_listener, gpu_allocator, output_allocator, profiler, Slot};
use crate::driver::{check, driver, Driver};
use crate::engine::{bytes, Engine, Memory};
use crate::object::{check_kind, user_method, Class, Object, Public};
use crate::plan::{width, Dims, Plan, Program};
use crate::program::{self, Job, JobKind};
use crate::record::{mistake, noted};
use crate::{allowed, text, Reporter};

#[derive(Clone, Copy)]
struct Bound {
    /// Unset: None.
    dims: Option<Dims>,
    address: Option<u64>,
    allocator: usize,
}

struct Aux {
    streams: Vec<u64>,
    own: bool,
    /// One for the start, then one for the end of each.
    events: Vec<u64>,
}

pub struct Context {
    pub plan: Arc<Plan>,
    reporter: Reporter,
    engine: usize,
    weights: Arc<Memory>,
    allocator: usize,
    device: i32,
    contexts: Arc<AtomicUsize>,
    id: u64,
    strategy: i32,
    memory: Option<Memory>,
    users_memory: (u64, i64),
    profile: i32,
    bound: Vec<Bound>,
    /// Shapes that some enqueue has already prepared for; a change of shape leaves work to the next enqueue.
    prepared: bool,
    consumed: u64,
    profiler: usize,
    emits: bool,
    reports: usize,
    listener: usize,
    debug: Vec<bool>,
    unfused_debug: bool,
    aux: Aux,
    name: CString,
    debug_sync: bool,
    cache_limit: u64,
    nvtx: i32,
    temporary: usize,
    /// The thread that is inside a method, 0: none.
    busy: AtomicU64,
}

impl Context {
    pub fn new(engine: &Engine, public: *mut Public, strategy: i32, contexts: Arc<AtomicUsize>) -> Result<Context, String> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let what = "ICudaEngine::createExecutionContext";
        let plan = engine.plan.clone();
        let memory = match strategy {
            allocation_strategy::STATIC | allocation_strategy::ON_PROFILE_CHANGE => {
                Some(Memory::new(plan.device_memory, engine.allocator, what)?)
            }
            allocation_strategy::USER_MANAGED => None,
            other => return Err(format!("{what}: Error Code 3: API Usage Error (allocation strategy {other})")),
        };
        let mut context = Context {
            reporter: engine.reporter,
            engine: public as usize,
            weights: engine.weights.clone(),
            allocator: engine.allocator,
            device: engine.device,
            contexts,
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            strategy,
            memory,
            users_memory: (0, 0),
            profile: 0,
            bound: Vec::new(),
            prepared: false,
            consumed: 0,
            profiler: 0,
            emits: true,
            reports: 0,
            listener: 0,
            debug: vec![false; plan.io.len()],
            unfused_debug: false,
            aux: Aux {
                streams: Vec::new(),
                own: false,
                events: Vec::new(),
            },
            name: plan.name.clone(),
            debug_sync: false,
            cache_limit: 0,
            nvtx: 0,
            temporary: 0,
            busy: AtomicU64::new(0),
            plan,
        };
        context.reset_shapes();
        // On an early return from here the count is given back by `destroyed`, which Drop does not call: so count last.
        let made = context.make_aux(what);
        if let Err(why) = made {
            context.drop_aux();
            return Err(why);
        }
        context.contexts.fetch_add(1, Ordering::Relaxed);
        Ok(context)
    }

    fn make_aux(&mut self, what: &str) -> Result<(), String> {
        let n = self.plan.aux_streams;
        if n == 0 {
            return Ok(());
        }
        let driver = driver()?;
        self.aux.own = true;
        for _ in 0..n {
            let mut stream = 0;
            // SAFETY: plain driver calls with valid places for results.
            check(unsafe { (driver.stream_create)(&mut stream, 1) }, what)?;
            self.aux.streams.push(stream);
        }
        for _ in 0..=n {
            let mut event = 0;
            // SAFETY: as above.
            check(unsafe { (driver.event_create)(&mut event, 2) }, what)?;
            self.aux.events.push(event);
        }
        Ok(())
    }

    fn drop_aux_streams(&mut self) {
        let Ok(driver) = driver() else { return };
        for stream in std::mem::take(&mut self.aux.streams) {
            if self.aux.own {
                // SAFETY: made by make_aux.
                unsafe { (driver.stream_destroy)(stream) };
            }
        }
    }

    fn drop_aux(&mut self) {
        self.drop_aux_streams();
        let Ok(driver) = driver() else { return };
        for event in std::mem::take(&mut self.aux.events) {
            // SAFETY: made by make_aux.
            unsafe { (driver.event_destroy)(event) };
        }
    }

    /// After creation and a change of profile: what is dynamic must be said again. Addresses stay.
    fn reset_shapes(&mut self) {
        let old = std::mem::take(&mut self.bound);
        self.bound = self
            .plan
            .io
            .iter()
            .enumerate()
            .map(|(i, tensor)| Bound {
                dims: (tensor.input && tensor.shape.known()).then_some(tensor.shape),
                address: old.get(i).and_then(|bound| bound.address),
                allocator: old.get(i).map_or(0, |bound| bound.allocator),
            })
            .collect();
        self.prepared = false;
    }

    fn api(&self, method: &str, why: &str) {
        self.reporter
            .error(&format!("IExecutionContext::{method}: Error Code 3: API Usage Error ({why})"));
    }

    fn find(&self, name: *const c_char, method: &str) -> Option<usize> {
        // SAFETY: a name as the caller gave it.
        let name = unsafe { text(name) };
        let found = self.plan.find(name);
        if found.is_none() {
            self.api(
                method,
                &format!(
                    "Given invalid tensor name: {}. Get valid tensor names with getIOTensorName()",
                    name.to_string_lossy()
                ),
            );
        }
        found
    }

    /// The values of the shape tensor, read from the host now.
    fn sizes(&self) -> Option<Vec<i64>> {
        let (i, tensor) = self.plan.inputs().find(|(_, tensor)| tensor.host)?;
        let (address, dims) = (self.bound[i].address?, self.bound[i].dims?);
        let driver = driver().ok()?;
        // SAFETY: a look at where the address lies.
        if unsafe { (driver.place)(address, bytes(tensor, &dims) as u64) } == 2 {
            mistake(&format!(
                "shape tensor {:?} was bound to device memory; TensorRT reads it on the host",
                tensor.name
            ));
            return None;
        }
        // SAFETY: the caller's host memory of that shape.
        Some(unsafe {
            (0..dims.volume())
                .map(|k| match width(tensor.dtype) {
                    8 => (address as *const i64).add(k).read_unaligned(),
                    _ => i64::from((address as *const i32).add(k).read_unaligned()),
                })
                .collect()
        })
    }

    /// Every tensor's shape as far as it follows from the inputs; None while an input's is missing.
    pub fn resolve(&self) -> Option<Vec<Dims>> {
        let mut shapes: Vec<Dims> = self.bound.iter().map(|bound| bound.dims.unwrap_or(Dims::BAD)).collect();
        if self.plan.inputs().any(|(i, _)| shapes[i].nb < 0) {
            return None;
        }
        let sizes = self.sizes();
        for (i, _) in self.plan.outputs() {
            shapes[i] = self.plan.output_shape(i, &shapes, sizes.as_deref());
        }
        Some(shapes)
    }

    fn fits_profile(&self, i: usize, dims: &Dims, method: &str) -> bool {
        let tensor = &self.plan.io[i];
        let name = tensor.name.to_string_lossy();
        if dims.nb != tensor.shape.nb {
            self.api(
                method,
                &format!(
                    "Parameter check failed, condition: engineDims.nbDims == dims.nbDims. Tensor {name} has {} dimensions, {} were given",
                    tensor.shape.nb, dims.nb
                ),
            );
            return false;
        }
        if let Some([min, _, max]) = tensor.profiles.get(self.profile as usize) {
            let inside = (0..dims.nb as usize).all(|d| (min.d[d]..=max.d[d]).contains(&dims.d[d]));
            if !inside {
                self.api(method, &format!("Parameter check failed, condition: profileMinDims.d[i] <= dimensions.d[i] <= profileMaxDims.d[i]. Supplied binding dimension {:?} for bindings[{i}] {name} exceed min ~ max range {:?} ~ {:?} of profile {}", dims.shape(), min.shape(), max.shape(), self.profile));
                return false;
            }
        } else if dims != &tensor.shape {
            self.api(method, &format!("Parameter check failed, condition: engineDims.d[i] == dims.d[i]. Static dimension mismatch while setting input shape for {name}. Set dimensions are {:?}. Expected dimensions are {:?}.", dims.shape(), tensor.shape.shape()));
            return false;
        }
        true
    }

    fn scratch(&self, method: &str) -> Option<u64> {
        match &self.memory {
            Some(memory) => Some(memory.address),
            None if self.plan.device_memory == 0 => Some(0),
            None => {
                let (address, size) = self.users_memory;
                if address == 0 || (size >= 0 && size < self.plan.device_memory as i64) {
                    self.api(
                        method,
                        &format!(
                            "the context was created without device memory and was given {size} bytes of {}",
                            self.plan.device_memory
                        ),
                    );
                    return None;
                }
                Some(address)
            }
        }
    }

    fn launch(&self, driver: &Driver, stream: u64, job: Job) -> Result<(), String> {
        let id = program::submit(job);
        // SAFETY: the function takes a job's number and looks it up.
        let code = unsafe { (driver.launch)(stream, program::work, id) };
        if code != 0 {
            program::withdraw(id);
        }
        check(code, "IExecutionContext::enqueueV3")
    }

    fn enqueue(&mut self, stream: u64) -> Result<(), String> {
        let driver = driver()?;
        let usage = |why: String| Err(format!("IExecutionContext::enqueueV3: Error Code 3: API Usage Error ({why})"));
        let plan = self.plan.clone();
        let faulty = (plan.enqueues.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(plan.every);
        if faulty {
            crate::faults::log(&self.reporter, &plan.content["run_log"]);
            crate::faults::end(&plan.run);
            if plan.fails("enqueue") {
                return Err("IExecutionContext::enqueueV3: Error Code 7: Internal Error (the plan says so)".to_owned());
            }
        }
        for (i, tensor) in plan.inputs() {
            let name = tensor.name.to_string_lossy();
            if self.bound[i].dims.is_none() {
                return usage(format!(
                    "Parameter check failed, condition: allInputDimensionsSpecified. The shape of input {name} has not been set"
                ));
            }
            if self.bound[i].address.unwrap_or(0) == 0 {
                return usage(format!("Parameter check failed, condition: mContext.profileObliviousBindings.at(profileObliviousIndex). Address is not set for input tensor {name}. Call setInputTensorAddress or setTensorAddress before enqueue"));
            }
        }
        let Some(shapes) = self.resolve() else {
            return usage("shapes cannot be inferred".to_owned());
        };
        for (i, tensor) in plan.outputs() {
            if self.bound[i].address.unwrap_or(0) == 0 && self.bound[i].allocator == 0 {
                return usage(format!("Parameter check failed, condition: mContext.profileObliviousBindings.at(profileObliviousIndex) || getPtrOrNull(mOutputAllocators, profileObliviousIndex). Neither address or allocator is set for output tensor {}. Call setOutputTensorAddress, setTensorAddress or setOutputAllocator before enqueue/execute", tensor.name.to_string_lossy()));
            }
        }
        let Some(scratch) = self.scratch("enqueueV3") else {
            return Err("IExecutionContext::enqueueV3: no device memory".to_owned());
        };

        let mut status = 0;
        // SAFETY: plain driver calls with valid places for results, here and below.
        check(unsafe { (driver.capturing)(stream, &mut status) }, "IExecutionContext::enqueueV3")?;
        let captured = status != 0;
        if stream <= 1 {
            noted("legacy_stream");
            self.reporter.log(2, "Using default stream in enqueueV3() may lead to performance issues due to additional calls to cudaStreamSynchronize() by TensorRT to ensure correct synchronization. Please use non-default stream instead.");
            check(unsafe { (driver.synchronize)(stream) }, "IExecutionContext::enqueueV3")?;
        }
        if captured {
            match plan.in_capture.as_str() {
                "empty" => return Ok(()),
                "fail" => {
                    return Err(
                        "IExecutionContext::enqueueV3: Error Code 7: Internal Error (the plan does not let itself be captured)".to_owned(),
                    )
                }
                "sync" => check(unsafe { (driver.synchronize)(stream) }, "IExecutionContext::enqueueV3")?,
                _ => {}
            }
        }
        if !self.prepared {
            // The first enqueue for a shape does work that cannot be captured.
            noted("prepare");
            if captured {
                check(
                    unsafe { (driver.synchronize)(stream) },
                    "IExecutionContext::enqueueV3, first call for these shapes",
                )?;
            }
            self.prepared = true;
        }

        let mut tensors: Vec<(u64, Dims)> = self
            .bound
            .iter()
            .zip(&shapes)
            .map(|(bound, dims)| (bound.address.unwrap_or(0), *dims))
            .collect();
        let job = |kind: JobKind, tensors: &[(u64, Dims)]| Job {
            plan: plan.clone(),
            context: self.id,
            captured,
            device: self.device,
            tensors: tensors.to_vec(),
            scratch,
            weights: self.weights.address,
            kind,
            faulty,
        };
        if plan.data_dependent() {
            self.launch(driver, stream, job(JobKind::Count, &tensors))?;
            check(unsafe { (driver.synchronize)(stream) }, "IExecutionContext::enqueueV3")?;
        }
        for (i, tensor) in plan.outputs() {
            if plan.data_dependent() {
                tensors[i].1.d[1] = program::counted(self.id) as i64;
            }
            let allocator = self.bound[i].allocator;
            if allocator == 0 {
                continue;
            }
            let (address, dims) = tensors[i];
            // Never zero, even for an empty tensor.
            let size = bytes(tensor, &dims).max(1) as u64;
            // SAFETY: the user's allocator, by its slots.
            unsafe {
                let allocator = allocator as *mut u8;
                let Some(reallocate) = user_method(allocator, output_allocator::REALLOCATE_OUTPUT_ASYNC) else {
                    continue;
                };
                let reallocate: unsafe extern "C" fn(*mut u8, *const c_char, u64, u64, u64, u64) -> u64 = std::mem::transmute(reallocate);
                let place = reallocate(allocator, tensor.name.as_ptr(), address, size, 256, stream);
                if place == 0 {
                    return Err(format!("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (the output allocator of {} gave nothing for {size} bytes)", tensor.name.to_string_lossy()));
                }
                tensors[i].0 = place;
                let Some(notify) = user_method(allocator, output_allocator::NOTIFY_SHAPE) else {
                    continue;
                };
                let notify: unsafe extern "C" fn(*mut u8, *const c_char, *const Dims) = std::mem::transmute(notify);
                notify(allocator, tensor.name.as_ptr(), &dims);
            }
        }
        for _ in 1..plan.nodes {
            self.launch(driver, stream, job(JobKind::Filler, &tensors))?;
        }
        let aux: Vec<(u64, u64)> = self
            .aux
            .streams
            .iter()
            .copied()
            .zip(self.aux.events.iter().skip(1).copied())
            .collect();
        if let (Some(&start), false) = (self.aux.events.first(), aux.is_empty()) {
            check(unsafe { (driver.event_record)(start, stream) }, "IExecutionContext::enqueueV3")?;
            for (side, end) in aux {
                check(unsafe { (driver.stream_wait)(side, start, 0) }, "IExecutionContext::enqueueV3")?;
                self.launch(driver, side, job(JobKind::Filler, &tensors))?;
                check(unsafe { (driver.event_record)(end, side) }, "IExecutionContext::enqueueV3")?;
                check(unsafe { (driver.stream_wait)(stream, end, 0) }, "IExecutionContext::enqueueV3")?;
            }
        }
        self.launch(driver, stream, job(JobKind::Compute, &tensors))?;
        if self.consumed != 0 {
            check(
                unsafe { (driver.event_record)(self.consumed, stream) },
                "IExecutionContext::enqueueV3",
            )?;
        }
        if self.profiler != 0 && self.emits {
            check(unsafe { (driver.synchronize)(stream) }, "IExecutionContext::enqueueV3")?;
            self.report();
        } else if self.profiler != 0 {
            self.reports += 1;
        }
        if self.debug_sync {
            check(unsafe { (driver.synchronize)(stream) }, "IExecutionContext::enqueueV3")?;
        }
        Ok(())
    }

    fn report(&self) {
        for i in 0..self.plan.nodes {
            let (layer, ms) = match self.plan.layers.get(i) {
                Some(layer) => (layer.name.clone(), layer.ms + self.plan.ms as f32 / self.plan.nodes as f32),
                None => (CString::new(format!("layer_{i}")).unwrap_or_default(), 0.001),
            };
            // SAFETY: the user's profiler, by its slot.
            unsafe {
                if let Some(method) = user_method(self.profiler as *mut u8, profiler::REPORT_LAYER_TIME) {
                    let method: unsafe extern "C" fn(*mut u8, *const c_char, f32) = std::mem::transmute(method);
                    method(self.profiler as *mut u8, layer.as_ptr(), ms);
                }
            }
        }
    }
}

impl Class for Context {
    const NAME: &'static str = "IExecutionContext";
    const ROW: usize = 2;

    fn destroyed(&mut self) {
        let pending = program::forget(self.id);
        if pending > 0 {
            mistake(&format!(
                "an execution context was destroyed while {pending} pieces of its work had not run"
            ));
        }
        self.contexts.fetch_sub(1, Ordering::Relaxed);
        self.drop_aux();
    }

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (slots::GET_P_IMPL, get_pimpl as *const () as usize),
            (slots::SET_DEBUG_SYNC, set_debug_sync as *const () as usize),
            (slots::GET_DEBUG_SYNC, get_debug_sync as *const () as usize),
            (slots::SET_PROFILER, set_profiler as *const () as usize),
            (slots::GET_PROFILER, get_profiler as *const () as usize),
            (slots::GET_ENGINE, get_engine as *const () as usize),
            (slots::SET_NAME, set_name as *const () as usize),
            (slots::GET_NAME, get_name as *const () as usize),
            (slots::SET_DEVICE_MEMORY, set_device_memory as *const () as usize),
            (slots::SET_DEVICE_MEMORY_V2, set_device_memory_v2 as *const () as usize),
            (slots::GET_OPTIMIZATION_PROFILE, get_profile as *const () as usize),
            (slots::ALL_INPUT_DIMENSIONS_SPECIFIED, all_dimensions as *const () as usize),
            (slots::ALL_INPUT_SHAPES_SPECIFIED, all_dimensions as *const () as usize),
            (slots::SET_ERROR_RECORDER, set_recorder as *const () as usize),
            (slots::GET_ERROR_RECORDER, get_recorder as *const () as usize),
            (slots::EXECUTE_V2, execute_v2 as *const () as usize),
            (slots::SET_OPTIMIZATION_PROFILE_ASYNC, set_profile as *const () as usize),
            (slots::SET_ENQUEUE_EMITS_PROFILE, set_emits as *const () as usize),
            (slots::GET_ENQUEUE_EMITS_PROFILE, get_emits as *const () as usize),
            (slots::REPORT_TO_PROFILER, report_to_profiler as *const () as usize),
            (slots::SET_INPUT_SHAPE, set_input_shape as *const () as usize),
            (slots::GET_TENSOR_SHAPE, get_tensor_shape as *const () as usize),
            (slots::GET_TENSOR_STRIDES, get_tensor_strides as *const () as usize),
            (slots::SET_TENSOR_ADDRESS, set_tensor_address as *const () as usize),
            (slots::GET_TENSOR_ADDRESS, get_tensor_address as *const () as usize),
            (slots::SET_INPUT_TENSOR_ADDRESS, set_input_address as *const () as usize),
            (slots::SET_OUTPUT_TENSOR_ADDRESS, set_output_address as *const () as usize),
            (slots::GET_OUTPUT_TENSOR_ADDRESS, get_tensor_address as *const () as usize),
            (slots::INFER_SHAPES, infer_shapes as *const () as usize),
            (slots::SET_INPUT_CONSUMED_EVENT, set_consumed as *const () as usize),
            (slots::GET_INPUT_CONSUMED_EVENT, get_consumed as *const () as usize),
            (slots::SET_OUTPUT_ALLOCATOR, set_output_allocator as *const () as usize),
            (slots::GET_OUTPUT_ALLOCATOR, get_output_allocator as *const () as usize),
            (slots::GET_MAX_OUTPUT_SIZE, max_output_size as *const () as usize),
            (slots::SET_TEMPORARY_STORAGE_ALLOCATOR, set_temporary as *const () as usize),
            (slots::GET_TEMPORARY_STORAGE_ALLOCATOR, get_temporary as *const () as usize),
            (slots::ENQUEUE_V3, enqueue_v3 as *const () as usize),
            (slots::SET_PERSISTENT_CACHE_LIMIT, set_cache_limit as *const () as usize),
            (slots::GET_PERSISTENT_CACHE_LIMIT, get_cache_limit as *const () as usize),
            (slots::SET_NVTX_VERBOSITY, set_nvtx as *const () as usize),
            (slots::GET_NVTX_VERBOSITY, get_nvtx as *const () as usize),
            (slots::SET_AUX_STREAMS, set_aux as *const () as usize),
            (slots::SET_DEBUG_LISTENER, set_listener as *const () as usize),
            (slots::GET_DEBUG_LISTENER, get_listener as *const () as usize),
            (slots::SET_TENSOR_DEBUG_STATE, set_debug_state as *const () as usize),
            (slots::GET_DEBUG_STATE, get_debug_state as *const () as usize),
            (slots::SET_ALL_TENSORS_DEBUG_STATE, set_all_debug as *const () as usize),
            (
                slots::UPDATE_DEVICE_MEMORY_SIZE_FOR_SHAPES,
                update_memory_size as *const () as usize,
            ),
            (slots::SET_UNFUSED_TENSORS_DEBUG_STATE, set_unfused as *const () as usize),
            (slots::GET_UNFUSED_TENSORS_DEBUG_STATE, get_unfused as *const () as usize),
        ]
    }
}

type This = *mut Object<Context>;

/// A context serves one thread at a time; two at once is a mistake on record.
struct Busy<'a>(&'a AtomicU64, bool);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        if self.1 {
            self.0.store(0, Ordering::Release);
        }
    }
}

unsafe fn enter<'a>(this: This) -> (&'a mut Context, Busy<'a>) {
    let context: &'a mut Context = Object::body(this);
    let flag: &'a AtomicU64 = &*std::ptr::from_ref(&context.busy);
    let me = libc::gettid() as u64;
    let before = flag.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed);
    let first = before.is_ok();
    // The same thread may come back, from inside an output allocator for instance.
    if before.is_err_and(|other| other != me) {
        mistake("one execution context was used by two threads at once");
    }
    (context, Busy(flag, first))
}

unsafe extern "C" fn get_pimpl(this: This) -> *mut Public {
    Object::public(this)
}

unsafe extern "C" fn set_debug_sync(this: This, on: bool) {
    enter(this).0.debug_sync = on;
}

unsafe extern "C" fn get_debug_sync(this: This) -> bool {
    enter(this).0.debug_sync
}

unsafe extern "C" fn set_profiler(this: This, object: *mut u8) {
    let (major, ..) = crate::record::version();
    if major >= 11 {
        check_kind(object, profiler::GET_INTERFACE_INFO, profiler::KIND);
    }
    enter(this).0.profiler = object as usize;
}

unsafe extern "C" fn get_profiler(this: This) -> usize {
    enter(this).0.profiler
}

unsafe extern "C" fn get_engine(this: This) -> usize {
    enter(this).0.engine
}

unsafe extern "C" fn set_name(this: This, name: *const c_char) {
    enter(this).0.name = text(name).to_owned();
}

unsafe extern "C" fn get_name(this: This) -> *const c_char {
    enter(this).0.name.as_ptr()
}

unsafe extern "C" fn set_device_memory(this: This, memory: u64) {
    // The old form says no size; the caller vouches for it.
    set_device_memory_v2(this, memory, -1);
}

unsafe extern "C" fn set_device_memory_v2(this: This, memory: u64, size: i64) {
    let (context, _busy) = enter(this);
    if context.strategy != allocation_strategy::USER_MANAGED {
        context.api("setDeviceMemoryV2", "the context was not created with kUSER_MANAGED");
        mistake("setDeviceMemory on a context that has memory of its own");
        return;
    }
    if size >= 0 && size < context.plan.device_memory as i64 {
        context.api(
            "setDeviceMemoryV2",
            &format!("{size} bytes given, {} needed", context.plan.device_memory),
        );
    }
    if !memory.is_multiple_of(256) {
        context.api("setDeviceMemoryV2", "the memory is not aligned to 256 bytes");
        mistake("device memory for a context must be aligned to 256 bytes");
    }
    context.users_memory = (memory, size);
}

unsafe extern "C" fn get_profile(this: This) -> i32 {
    enter(this).0.profile
}

unsafe extern "C" fn all_dimensions(this: This) -> bool {
    enter(this).0.resolve().is_some()
}

unsafe extern "C" fn set_recorder(this: This, recorder: *mut u8) {
    enter(this).0.reporter.set_recorder(recorder);
}

unsafe extern "C" fn get_recorder(this: This) -> usize {
    enter(this).0.reporter.recorder
}

unsafe extern "C" fn execute_v2(this: This, bindings: *const u64) -> bool {
    let (context, _busy) = enter(this);
    if !allowed(&context.reporter, "IExecutionContext", "executeV2") {
        return false;
    }
    for i in 0..context.bound.len() {
        context.bound[i].address = Some(*bindings.add(i));
    }
    let done = context
        .enqueue(0)
        .and_then(|()| check((driver()?.synchronize)(0), "IExecutionContext::executeV2"));
    if let Err(why) = &done {
        context.reporter.error(why);
    }
    done.is_ok()
}

unsafe extern "C" fn set_profile(this: This, index: i32, stream: u64) -> bool {
    let (context, _busy) = enter(this);
    if !allowed(&context.reporter, "IExecutionContext", "setOptimizationProfileAsync") {
        return false;
    }
    if !(0..context.plan.profiles as i32).contains(&index) {
        context.api(
            "setOptimizationProfileAsync",
            &format!("Profile index {index} is not in [0, {})", context.plan.profiles),
        );
        return false;
    }
    let Ok(driver) = driver() else { return false };
    let filler = Job {
        plan: context.plan.clone(),
        context: context.id,
        captured: false,
        device: context.device,
        tensors: Vec::new(),
        scratch: 0,
        weights: 0,
        kind: JobKind::Filler,
        faulty: false,
    };
    if let Err(why) = context.launch(driver, stream, filler) {
        context.reporter.error(&why);
        return false;
    }
    if context.profile != index {
        context.profile = index;
        context.reset_shapes();
    }
    true
}

unsafe extern "C" fn set_emits(this: This, on: bool) {
    enter(this).0.emits = on;
}

unsafe extern "C" fn get_emits(this: This) -> bool {
    enter(this).0.emits
}

unsafe extern "C" fn report_to_profiler(this: This) -> bool {
    let (context, _busy) = enter(this);
    if context.profiler == 0 || context.reports == 0 {
        return false;
    }
    context.report();
    context.reports = 0;
    true
}

unsafe extern "C" fn set_input_shape(this: This, name: *const c_char, dims: *const Dims) -> bool {
    let (context, _busy) = enter(this);
    if !allowed(&context.reporter, "IExecutionContext", "setInputShape") {
        return false;
    }
    let Some(i) = context.find(name, "setInputShape") else {
        return false;
    };
    if !context.plan.io[i].input || dims.is_null() {
        context.api("setInputShape", "Parameter check failed, condition: the tensor is an input");
        return false;
    }
    let dims = Dims::new((*dims).shape());
    if !context.fits_profile(i, &dims, "setInputShape") {
        return false;
    }
    if context.bound[i].dims != Some(dims) {
        context.bound[i].dims = Some(dims);
        context.prepared = false;
    }
    true
}

unsafe extern "C" fn get_tensor_shape(this: This, name: *const c_char) -> Dims {
    let (context, _busy) = enter(this);
    if !allowed(&context.reporter, "IExecutionContext", "getTensorShape") {
        return Dims::BAD;
    }
    let Some(i) = context.find(name, "getTensorShape") else {
        return Dims::BAD;
    };
    match context.resolve() {
        Some(shapes) => shapes[i],
        None => context.bound[i].dims.unwrap_or(context.plan.io[i].shape),
    }
}

unsafe extern "C" fn get_tensor_strides(this: This, name: *const c_char) -> Dims {
    let mut dims = get_tensor_shape(this, name);
    let mut stride = 1;
    for d in (0..dims.nb.max(0) as usize).rev() {
        let size = dims.d[d];
        dims.d[d] = if stride < 0 { -1 } else { stride };
        stride = if size < 0 || stride < 0 { -1 } else { stride * size };
    }
    dims
}

unsafe fn set_address(this: This, name: *const c_char, address: u64, method: &str, fits: fn(bool) -> bool) -> bool {
    let (context, _busy) = enter(this);
    if !allowed(&context.reporter, "IExecutionContext", method) {
        return false;
    }
    let Some(i) = context.find(name, method) else { return false };
    if !fits(context.plan.io[i].input) {
        context.api(method, "the tensor has the other mode");
        return false;
    }
    context.bound[i].address = Some(address);
    true
}

unsafe extern "C" fn set_tensor_address(this: This, name: *const c_char, address: u64) -> bool {
    set_address(this, name, address, "setTensorAddress", |_| true)
}

unsafe extern "C" fn set_input_address(this: This, name: *const c_char, address: u64) -> bool {
    set_address(this, name, address, "setInputTensorAddress", |input| input)
}

unsafe extern "C" fn set_output_address(this: This, name: *const c_char, address: u64) -> bool {
    set_address(this, name, address, "setOutputTensorAddress", |input| !input)
}

unsafe extern "C" fn get_tensor_address(this: This, name: *const c_char) -> u64 {
    let (context, _busy) = enter(this);
    context
        .find(name, "getTensorAddress")
        .and_then(|i| context.bound[i].address)
        .unwrap_or(0)
}

unsafe extern "C" fn infer_shapes(this: This, count: i32, names: *mut *const c_char) -> i32 {
    let (context, _busy) = enter(this);
    if !allowed(&context.reporter, "IExecutionContext", "inferShapes") || context.plan.fails("shapes") {
        return -1;
    }
    let missing: Vec<usize> = context
        .plan
        .inputs()
        .filter(|(i, tensor)| context.bound[*i].dims.is_none() || (tensor.host && context.bound[*i].address.is_none()))
        .map(|(i, _)| i)
        .collect();
    for (k, i) in missing.iter().take(count.max(0) as usize).enumerate() {
        names.add(k).write(context.plan.io[*i].name.as_ptr());
    }
    if missing.is_empty() && context.plan.program == Program::ShapeInput {
        let sizes = context.sizes().unwrap_or_default();
        for (_, tensor) in context.plan.inputs() {
            let Some([min, _, max]) = tensor.values.get(context.profile as usize) else {
                continue;
            };
            if !sizes
                .iter()
                .zip(min.iter().zip(max))
                .all(|(v, (low, high))| (low..=high).contains(&v))
            {
                context.api(
                    "inferShapes",
                    &format!(
                        "the values {sizes:?} of shape tensor {} lie outside {min:?} ~ {max:?}",
                        tensor.name.to_string_lossy()
                    ),
                );
                return -1;
            }
        }
    }
    missing.len() as i32
}

unsafe extern "C" fn set_consumed(this: This, event: u64) -> bool {
    let (context, _busy) = enter(this);
    if !allowed(&context.reporter, "IExecutionContext", "setInputConsumedEvent") {
        return false;
    }
    context.consumed = event;
    true
}

unsafe extern "C" fn get_consumed(this: This) -> u64 {
    enter(this).0.consumed
}

unsafe extern "C" fn set_output_allocator(this: This, name: *const c_char, allocator: *mut u8) -> bool {
    let (context, _busy) = enter(this);
    if !allowed(&context.reporter, "IExecutionContext", "setOutputAllocator") {
        return false;
    }
    check_kind(allocator, output_allocator::GET_INTERFACE_INFO, output_allocator::KIND);
    match context.find(name, "setOutputAllocator") {
        Some(i) if !context.plan.io[i].input => {
            context.bound[i].allocator = allocator as usize;
            true
        }
        _ => false,
    }
}

unsafe extern "C" fn get_output_allocator(this: This, name: *const c_char) -> usize {
    let (context, _busy) = enter(this);
    context.find(name, "getOutputAllocator").map_or(0, |i| context.bound[i].allocator)
}

unsafe extern "C" fn max_output_size(this: This, name: *const c_char) -> i64 {
    let (context, _busy) = enter(this);
    if !allowed(&context.reporter, "IExecutionContext", "getMaxOutputSize") {
        return -1;
    }
    let Some(i) = context.find(name, "getMaxOutputSize").filter(|i| !context.plan.io[*i].input) else {
        return -1;
    };
    let Some(mut shapes) = context.resolve() else { return -1 };
    if context.plan.data_dependent() {
        let volume = context.plan.inputs().next().map_or(0, |(input, _)| shapes[input].volume());
        shapes[i].d[1] = volume as i64;
    }
    bytes(&context.plan.io[i], &shapes[i]) as i64
}

unsafe extern "C" fn set_temporary(this: This, allocator: *mut u8) -> bool {
    check_kind(allocator, gpu_allocator::GET_INTERFACE_INFO, gpu_allocator::KIND);
    enter(this).0.temporary = allocator as usize;
    true
}

unsafe extern "C" fn get_temporary(this: This) -> usize {
    let (context, _busy) = enter(this);
    if context.temporary != 0 {
        context.temporary
    } else {
        context.allocator
    }
}

unsafe extern "C" fn enqueue_v3(this: This, stream: u64) -> bool {
    let (context, _busy) = enter(this);
    if !allowed(&context.reporter, "IExecutionContext", "enqueueV3") {
        return false;
    }
    match context.enqueue(stream) {
        Ok(()) => true,
        Err(why) => {
            context.reporter.error(&why);
            false
        }
    }
}

unsafe extern "C" fn set_cache_limit(this: This, size: u64) {
    enter(this).0.cache_limit = size;
}

unsafe extern "C" fn get_cache_limit(this: This) -> u64 {
    enter(this).0.cache_limit
}

unsafe extern "C" fn set_nvtx(this: This, verbosity: i32) -> bool {
    enter(this).0.nvtx = verbosity;
    true
}

unsafe extern "C" fn get_nvtx(this: This) -> i32 {
    enter(this).0.nvtx
}

unsafe extern "C" fn set_aux(this: This, streams: *const u64, count: i32) {
    let (context, _busy) = enter(this);
    context.drop_aux_streams();
    context.aux.own = false;
    for i in 0..(count.max(0) as usize).min(context.plan.aux_streams) {
        context.aux.streams.push(*streams.add(i));
    }
}

unsafe extern "C" fn set_listener(this: This, listener: *mut u8) -> bool {
    check_kind(listener, debug_listener::GET_INTERFACE_INFO, debug_listener::KIND);
    enter(this).0.listener = listener as usize;
    true
}

unsafe extern "C" fn get_listener(this: This) -> usize {
    enter(this).0.listener
}

unsafe extern "C" fn set_debug_state(this: This, name: *const c_char, on: bool) -> bool {
    let (context, _busy) = enter(this);
    match context.find(name, "setTensorDebugState") {
        Some(i) if context.plan.io[i].debug => {
            context.debug[i] = on;
            true
        }
        _ => false,
    }
}

unsafe extern "C" fn get_debug_state(this: This, name: *const c_char) -> bool {
    let (context, _busy) = enter(this);
    context.find(name, "getDebugState").is_some_and(|i| context.debug[i])
}

unsafe extern "C" fn set_all_debug(this: This, on: bool) -> bool {
    let (context, _busy) = enter(this);
    for (state, tensor) in context.debug.iter_mut().zip(&context.plan.io) {
        *state = on && tensor.debug;
    }
    true
}

unsafe extern "C" fn update_memory_size(this: This) -> u64 {
    let (context, _busy) = enter(this);
    if context.resolve().is_none() || !allowed(&context.reporter, "IExecutionContext", "updateDeviceMemorySizeForShapes") {
        return 0;
    }
    context.plan.device_memory as u64
}

unsafe extern "C" fn set_unfused(this: This, on: bool) -> bool {
    enter(this).0.unfused_debug = on;
    true
}

unsafe extern "C" fn get_unfused(this: This) -> bool {
    enter(this).0.unfused_debug
}
