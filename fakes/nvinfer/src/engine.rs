//! ICudaEngine.

use std::ffi::{c_char, CStr};
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::Arc;

use crate::abi::{allocation_strategy, data_type, engine as slots, gpu_allocator, tensor_format, Slot};
use crate::context::Context;
use crate::driver::{check, driver};
use crate::inspector::Inspector;
use crate::object::{make, user_method, Class, Object, Public};
use crate::plan::{width, Dims, Plan, Tensor};
use crate::record::mistake;
use crate::runtime::HostMemory;
use crate::{allowed, text, Reporter};

pub struct Engine {
    pub plan: Arc<Plan>,
    pub reporter: Reporter,
    pub weights: Arc<Memory>,
    pub allocator: usize,
    pub device: i32,
    /// Bytes of weights that stay on the device, of an engine built for streaming them.
    budget: AtomicI64,
    engines: Arc<AtomicUsize>,
    contexts: Arc<AtomicUsize>,
}

/// Device memory of an engine or a context, from the user's allocator where there is one.
pub struct Memory {
    pub address: u64,
    allocator: usize,
}

impl Memory {
    pub fn new(bytes: usize, allocator: usize, what: &str) -> Result<Memory, String> {
        let mut address = 0;
        if bytes > 0 {
            // SAFETY: the user's method by its slot, or a plain driver call.
            unsafe {
                match user_method_of(allocator, gpu_allocator::ALLOCATE) {
                    Some(method) => {
                        let method: unsafe extern "C" fn(*mut u8, u64, u64, u32) -> u64 = std::mem::transmute(method);
                        address = method(allocator as *mut u8, bytes as u64, 256, 0);
                        if address == 0 {
                            return Err(format!("{what}: Error Code 1: Cuda Runtime (the allocator gave nothing)"));
                        }
                    }
                    None => check((driver()?.alloc)(&mut address, bytes), what)?,
                }
            }
        }
        Ok(Memory { address, allocator })
    }
}

unsafe fn user_method_of(object: usize, slot: Slot) -> Option<usize> {
    if object == 0 {
        return None;
    }
    user_method(object as *mut u8, slot)
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.address == 0 {
            return;
        }
        // SAFETY: given back the way it was obtained. A failure has nowhere to go; the driver stand-in frees nevertheless.
        unsafe {
            match user_method_of(self.allocator, gpu_allocator::DEALLOCATE) {
                Some(method) => {
                    let method: unsafe extern "C" fn(*mut u8, u64) -> bool = std::mem::transmute(method);
                    method(self.allocator as *mut u8, self.address);
                }
                None => {
                    if let Ok(driver) = driver() {
                        (driver.free)(self.address);
                    }
                }
            }
        }
    }
}

impl Engine {
    pub fn new(plan: Plan, reporter: Reporter, allocator: usize, device: i32, engines: Arc<AtomicUsize>) -> Result<Engine, String> {
        let weights = Arc::new(Memory::new(plan.weights_bytes, allocator, "IRuntime::deserializeCudaEngine")?);
        engines.fetch_add(1, Ordering::Relaxed);
        Ok(Engine {
            plan: Arc::new(plan),
            reporter,
            weights,
            allocator,
            device,
            budget: AtomicI64::new(-2),
            engines,
            contexts: Arc::new(AtomicUsize::new(0)),
        })
    }

    /// The tensor by that name; a wrong name is logged, as TensorRT does.
    unsafe fn tensor(&self, name: *const c_char, method: &str) -> Option<&Tensor> {
        let found = self.plan.find(text(name));
        if found.is_none() {
            self.reporter.error(&format!(
                "ICudaEngine::{method}: Error Code 3: Internal Error (Given invalid tensor name: {}. Get valid tensor names with getIOTensorName())",
                text(name).to_string_lossy()
            ));
        }
        found.map(|i| &self.plan.io[i])
    }
}

impl Class for Engine {
    const NAME: &'static str = "ICudaEngine";
    const ROW: usize = 1;

    fn destroyed(&mut self) {
        self.engines.fetch_sub(1, Ordering::Relaxed);
        let left = self.contexts.load(Ordering::Relaxed);
        if left > 0 {
            mistake(&format!("an engine was destroyed before {left} of its execution contexts"));
        }
    }

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (slots::GET_P_IMPL, get_pimpl as *const () as usize),
            (slots::GET_NB_LAYERS, nb_layers as *const () as usize),
            (slots::SERIALIZE, serialize as *const () as usize),
            (slots::CREATE_EXECUTION_CONTEXT, create_context as *const () as usize),
            (
                slots::CREATE_EXECUTION_CONTEXT_WITHOUT_DEVICE_MEMORY,
                create_context_without as *const () as usize,
            ),
            (slots::GET_DEVICE_MEMORY_SIZE, memory_size as *const () as usize),
            (slots::GET_DEVICE_MEMORY_SIZE_V2, memory_size as *const () as usize),
            (slots::GET_DEVICE_MEMORY_SIZE_FOR_PROFILE, memory_size_for as *const () as usize),
            (slots::GET_DEVICE_MEMORY_SIZE_FOR_PROFILE_V2, memory_size_for as *const () as usize),
            (slots::IS_REFITTABLE, is_refittable as *const () as usize),
            (slots::GET_NAME, name as *const () as usize),
            (slots::GET_NB_OPTIMIZATION_PROFILES, nb_profiles as *const () as usize),
            (slots::GET_PROFILE_TENSOR_VALUES, profile_values_32 as *const () as usize),
            (slots::GET_PROFILE_TENSOR_VALUES_V2, profile_values as *const () as usize),
            (slots::GET_ENGINE_CAPABILITY, zero as *const () as usize),
            (slots::SET_ERROR_RECORDER, set_recorder as *const () as usize),
            (slots::GET_ERROR_RECORDER, get_recorder as *const () as usize),
            (slots::HAS_IMPLICIT_BATCH_DIMENSION, never as *const () as usize),
            (slots::GET_TACTIC_SOURCES, tactic_sources as *const () as usize),
            (slots::GET_PROFILING_VERBOSITY, verbosity as *const () as usize),
            (slots::CREATE_ENGINE_INSPECTOR, create_inspector as *const () as usize),
            (slots::GET_TENSOR_SHAPE, tensor_shape as *const () as usize),
            (slots::GET_TENSOR_DATA_TYPE, tensor_dtype as *const () as usize),
            (slots::GET_TENSOR_LOCATION, tensor_location as *const () as usize),
            (slots::IS_SHAPE_INFERENCE_IO, is_shape_io as *const () as usize),
            (slots::GET_TENSOR_IO_MODE, tensor_mode as *const () as usize),
            (slots::GET_TENSOR_BYTES_PER_COMPONENT, minus_one as *const () as usize),
            (slots::GET_TENSOR_BYTES_PER_COMPONENT_V2, minus_one as *const () as usize),
            (slots::GET_TENSOR_COMPONENTS_PER_ELEMENT, minus_one as *const () as usize),
            (slots::GET_TENSOR_COMPONENTS_PER_ELEMENT_V2, minus_one as *const () as usize),
            (slots::GET_TENSOR_VECTORIZED_DIM, minus_one as *const () as usize),
            (slots::GET_TENSOR_VECTORIZED_DIM_V2, minus_one as *const () as usize),
            (slots::GET_TENSOR_FORMAT, tensor_format as *const () as usize),
            (slots::GET_TENSOR_FORMAT_V2, tensor_format as *const () as usize),
            (slots::GET_TENSOR_FORMAT_DESC, tensor_format_text as *const () as usize),
            (slots::GET_TENSOR_FORMAT_DESC_V2, tensor_format_text as *const () as usize),
            (slots::GET_PROFILE_SHAPE, profile_shape as *const () as usize),
            (slots::GET_NB_IO_TENSORS, nb_io as *const () as usize),
            (slots::GET_IO_TENSOR_NAME, io_name as *const () as usize),
            (slots::GET_HARDWARE_COMPATIBILITY_LEVEL, hardware as *const () as usize),
            (slots::GET_NB_AUX_STREAMS, nb_aux_streams as *const () as usize),
            (slots::SET_WEIGHT_STREAMING_BUDGET, set_budget as *const () as usize),
            (slots::SET_WEIGHT_STREAMING_BUDGET_V2, set_budget as *const () as usize),
            (slots::GET_WEIGHT_STREAMING_BUDGET, get_budget as *const () as usize),
            (slots::GET_WEIGHT_STREAMING_BUDGET_V2, get_budget as *const () as usize),
            (slots::GET_MINIMUM_WEIGHT_STREAMING_BUDGET, zero as *const () as usize),
            (slots::GET_STREAMABLE_WEIGHTS_SIZE, streamable as *const () as usize),
            (slots::GET_WEIGHT_STREAMING_AUTOMATIC_BUDGET, zero as *const () as usize),
            (slots::GET_WEIGHT_STREAMING_SCRATCH_MEMORY_SIZE, zero as *const () as usize),
            (slots::IS_DEBUG_TENSOR, is_debug as *const () as usize),
            (slots::GET_ENGINE_STAT, stat as *const () as usize),
            (slots::GET_ALIASED_INPUT_TENSOR, aliased as *const () as usize),
        ]
    }
}

type This = *mut Object<Engine>;

unsafe extern "C" fn get_pimpl(this: This) -> *mut Public {
    Object::public(this)
}

unsafe extern "C" fn zero(_: This) -> i64 {
    0
}

unsafe extern "C" fn never(_: This) -> bool {
    false
}

unsafe extern "C" fn minus_one(_: This, _: *const c_char, _: i32) -> i32 {
    -1
}

unsafe extern "C" fn nb_layers(this: This) -> i32 {
    Object::body(this).plan.nodes as i32
}

unsafe extern "C" fn serialize(this: This) -> *mut Public {
    let engine = Object::body(this);
    if !allowed(&engine.reporter, "ICudaEngine", "serialize") {
        return std::ptr::null_mut();
    }
    make(HostMemory(engine.plan.bytes.clone()))
}

unsafe fn new_context(this: This, strategy: i32) -> *mut Public {
    let engine = Object::body(this);
    if !allowed(&engine.reporter, "ICudaEngine", "createExecutionContext") {
        return std::ptr::null_mut();
    }
    let made = if engine.plan.fails("context") {
        Err("ICudaEngine::createExecutionContext: Error Code 4: Internal Error (the plan says so)".to_owned())
    } else {
        Context::new(engine, Object::public(this), strategy, engine.contexts.clone())
    };
    match made {
        Ok(context) => make(context),
        Err(why) => {
            engine.reporter.error(&why);
            std::ptr::null_mut()
        }
    }
}

unsafe extern "C" fn create_context(this: This, strategy: i32) -> *mut Public {
    new_context(this, strategy)
}

unsafe extern "C" fn create_context_without(this: This) -> *mut Public {
    new_context(this, allocation_strategy::USER_MANAGED)
}

unsafe extern "C" fn memory_size(this: This) -> i64 {
    Object::body(this).plan.device_memory as i64
}

unsafe extern "C" fn memory_size_for(this: This, profile: i32) -> i64 {
    let plan = &Object::body(this).plan;
    if (0..plan.profiles as i32).contains(&profile) {
        plan.device_memory as i64
    } else {
        0
    }
}

unsafe extern "C" fn name(this: This) -> *const c_char {
    Object::body(this).plan.name.as_ptr()
}

unsafe extern "C" fn nb_profiles(this: This) -> i32 {
    Object::body(this).plan.profiles as i32
}

unsafe extern "C" fn profile_values(this: This, name: *const c_char, profile: i32, select: i32) -> *const i64 {
    let engine = Object::body(this);
    let Some(tensor) = engine.tensor(name, "getProfileTensorValues") else {
        return std::ptr::null();
    };
    match (tensor.values.get(profile as usize), select) {
        (Some(values), 0..=2) => values[select as usize].as_ptr(),
        _ => std::ptr::null(),
    }
}

unsafe extern "C" fn profile_values_32(this: This, name: *const c_char, profile: i32, select: i32) -> *const i32 {
    let engine = Object::body(this);
    let Some(tensor) = engine.tensor(name, "getProfileTensorValues") else {
        return std::ptr::null();
    };
    // The 32-bit getter does not serve 64-bit shape tensors.
    if tensor.dtype != data_type::INT32 {
        return std::ptr::null();
    }
    match (tensor.values.get(profile as usize), select) {
        (Some(values), 0..=2) => {
            // The real pointer lives as long as the engine; this one a little longer.
            values[select as usize]
                .iter()
                .map(|&v| v as i32)
                .collect::<Vec<_>>()
                .leak()
                .as_ptr()
        }
        _ => std::ptr::null(),
    }
}

unsafe extern "C" fn set_recorder(this: This, recorder: *mut u8) {
    Object::body(this).reporter.set_recorder(recorder);
}

unsafe extern "C" fn get_recorder(this: This) -> usize {
    Object::body(this).reporter.recorder
}

unsafe extern "C" fn create_inspector(this: This) -> *mut Public {
    let engine = Object::body(this);
    if !allowed(&engine.reporter, "ICudaEngine", "createEngineInspector") {
        return std::ptr::null_mut();
    }
    make(Inspector::new(engine))
}

unsafe extern "C" fn tensor_shape(this: This, name: *const c_char) -> Dims {
    let engine = Object::body(this);
    if !allowed(&engine.reporter, "ICudaEngine", "getTensorShape") {
        return Dims::BAD;
    }
    engine.tensor(name, "getTensorShape").map_or(Dims::BAD, |tensor| tensor.shape)
}

unsafe extern "C" fn tensor_dtype(this: This, name: *const c_char) -> i32 {
    Object::body(this)
        .tensor(name, "getTensorDataType")
        .map_or(0, |tensor| tensor.dtype)
}

unsafe extern "C" fn tensor_location(this: This, name: *const c_char) -> i32 {
    Object::body(this)
        .tensor(name, "getTensorLocation")
        .map_or(0, |tensor| i32::from(tensor.host))
}

unsafe extern "C" fn is_shape_io(this: This, name: *const c_char) -> bool {
    Object::body(this)
        .tensor(name, "isShapeInferenceIO")
        .is_some_and(|tensor| tensor.host)
}

unsafe extern "C" fn tensor_mode(this: This, name: *const c_char) -> i32 {
    // kNONE for a name that is not there, without a word.
    let plan = &Object::body(this).plan;
    plan.find(text(name)).map_or(0, |i| if plan.io[i].input { 1 } else { 2 })
}

unsafe extern "C" fn tensor_format(this: This, name: *const c_char) -> i32 {
    Object::body(this)
        .tensor(name, "getTensorFormat")
        .map_or(tensor_format::LINEAR, |tensor| tensor.format)
}

unsafe extern "C" fn tensor_format_text(this: This, name: *const c_char) -> *const c_char {
    let Some(tensor) = Object::body(this).tensor(name, "getTensorFormatDesc") else {
        return c"".as_ptr();
    };
    let text: &CStr = match (tensor.format, tensor.dtype) {
        (0, data_type::FLOAT) => c"Row major linear FP32 format (kLINEAR)",
        (0, data_type::HALF) => c"Row major linear FP16 format (kLINEAR)",
        (0, data_type::BF16) => c"Row major linear BF16 format (kLINEAR)",
        (0, data_type::INT64) => c"Row major linear INT64 format (kLINEAR)",
        (0, data_type::INT32) => c"Row major linear INT32 format (kLINEAR)",
        (0, data_type::INT8) => c"Row major linear INT8 format (kLINEAR)",
        (0, data_type::BOOL) => c"Row major linear BOOL format (kLINEAR)",
        (0, _) => c"Row major linear format (kLINEAR)",
        _ => c"Vectorized format",
    };
    text.as_ptr()
}

unsafe extern "C" fn profile_shape(this: This, name: *const c_char, profile: i32, select: i32) -> Dims {
    let engine = Object::body(this);
    if !allowed(&engine.reporter, "ICudaEngine", "getProfileShape") {
        return Dims::BAD;
    }
    let Some(tensor) = engine.tensor(name, "getProfileShape") else {
        return Dims::BAD;
    };
    if !tensor.input || !(0..=2).contains(&select) || !(0..engine.plan.profiles as i32).contains(&profile) {
        engine
            .reporter
            .error("ICudaEngine::getProfileShape: Error Code 3: API Usage Error (Parameter check failed)");
        return Dims::BAD;
    }
    tensor
        .profiles
        .get(profile as usize)
        .map_or(tensor.shape, |shapes| shapes[select as usize])
}

unsafe extern "C" fn nb_io(this: This) -> i32 {
    Object::body(this).plan.io.len() as i32
}

unsafe extern "C" fn io_name(this: This, index: i32) -> *const c_char {
    let engine = Object::body(this);
    if !allowed(&engine.reporter, "ICudaEngine", "getIOTensorName") {
        return std::ptr::null();
    }
    engine
        .plan
        .io
        .get(index as usize)
        .map_or(std::ptr::null(), |tensor| tensor.name.as_ptr())
}

unsafe extern "C" fn nb_aux_streams(this: This) -> i32 {
    Object::body(this).plan.aux_streams as i32
}

fn streams(engine: &Engine) -> bool {
    engine.plan.content["weight_streaming"] == true
}

unsafe extern "C" fn streamable(this: This) -> i64 {
    let engine = Object::body(this);
    if streams(engine) {
        engine.plan.weights_bytes as i64
    } else {
        0
    }
}

unsafe extern "C" fn get_budget(this: This) -> i64 {
    let engine = Object::body(this);
    match engine.budget.load(Ordering::Relaxed) {
        -2 => streamable(this),
        budget => budget,
    }
}

unsafe extern "C" fn set_budget(this: This, budget: i64) -> bool {
    let engine = Object::body(this);
    let why = if !streams(engine) {
        "This engine was not built with weight streaming support. This engine must be rebuilt by setting BuilderFlag::kWEIGHT_STREAMING during build time."
    } else if engine.contexts.load(Ordering::Relaxed) > 0 {
        "The weight streaming budget cannot be modified while there are active IExecutionContexts."
    } else if !(0..=engine.plan.weights_bytes as i64).contains(&budget) {
        "The weight streaming budget must be at least 0 and at most the streamable weights' size."
    } else {
        if allowed(&engine.reporter, "ICudaEngine", "setWeightStreamingBudgetV2") {
            engine.budget.store(budget, Ordering::Relaxed);
            return true;
        }
        return false;
    };
    engine.reporter.error(&format!(
        "ICudaEngine::setWeightStreamingBudgetV2: Error Code 3: API Usage Error ({why})"
    ));
    false
}

unsafe extern "C" fn is_refittable(this: This) -> bool {
    Object::body(this).plan.content["refit"].is_string()
}

unsafe extern "C" fn tactic_sources(this: This) -> u32 {
    Object::body(this).plan.content["built"]["TacticSources"].as_u64().unwrap_or(0) as u32
}

unsafe extern "C" fn verbosity(this: This) -> i32 {
    Object::body(this).plan.content["built"]["ProfilingVerbosity"].as_i64().unwrap_or(0) as i32
}

unsafe extern "C" fn hardware(this: This) -> i32 {
    let name = &Object::body(this).plan.content["hardware_compatibility"];
    let all = crate::abi::hardware_compatibility_level::ALL;
    let (major, minor, ..) = crate::record::version();
    all.iter()
        .find(|one| name == one.name)
        .and_then(|one| one.value(major, minor))
        .unwrap_or(0)
}

unsafe extern "C" fn is_debug(this: This, name: *const c_char) -> bool {
    Object::body(this).tensor(name, "isDebugTensor").is_some_and(|tensor| tensor.debug)
}

unsafe extern "C" fn stat(this: This, which: i32) -> i64 {
    let plan = &Object::body(this).plan;
    match which {
        0 => plan.weights_bytes as i64,
        1 => plan.content["stripped_bytes"].as_i64().filter(|_| plan.weights().lost).unwrap_or(0),
        _ => -1,
    }
}

unsafe extern "C" fn aliased(_: This, _: *const c_char) -> *const c_char {
    std::ptr::null()
}

/// Bytes that a tensor of that shape takes.
pub fn bytes(tensor: &Tensor, dims: &Dims) -> usize {
    dims.volume() * width(tensor.dtype)
}
