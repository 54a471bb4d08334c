//! IBuilder.

use std::ffi::c_void;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::abi::{builder as slots, gpu_allocator, Slot};
use crate::config::Config;
use crate::driver::sm;
use crate::network::{Network, Shared};
use crate::object::{check_kind, discard, make, of, Class, Object, Public};
use crate::profile::Profile;
use crate::record::mistake;
use crate::runtime::HostMemory;
use crate::{allowed, compile, Reporter};

pub struct Builder {
    reporter: Reporter,
    shared: Arc<Shared>,
    profiles: Vec<*mut Public>,
    threads: i32,
    allocator: usize,
}

impl Builder {
    pub fn new(reporter: Reporter) -> Builder {
        Builder {
            reporter,
            shared: Arc::default(),
            profiles: Vec::new(),
            threads: 1,
            allocator: 0,
        }
    }
}

impl Class for Builder {
    const NAME: &'static str = "IBuilder";
    const ROW: usize = 5;

    fn destroyed(&mut self) {
        let left = self.shared.objects.load(Ordering::Relaxed);
        if left > 0 {
            let text = "Destroying a builder object before destroying objects it created leads to undefined behavior.";
            self.reporter
                .error(&format!("IBuilder::~IBuilder: Error Code 3: API Usage Error ({text})"));
            mistake(&format!("a builder was destroyed before {left} of its networks and configurations"));
        }
        for &profile in &self.profiles {
            // SAFETY: made by create_profile, and given back by nobody else.
            unsafe { discard::<Profile>(profile) };
        }
    }

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (slots::PLATFORM_HAS_FAST_FP16, fast_fp16 as *const () as usize),
            (slots::PLATFORM_HAS_FAST_INT8, fast_int8 as *const () as usize),
            (slots::PLATFORM_HAS_TF32, has_tf32 as *const () as usize),
            (slots::GET_MAX_DLA_BATCH_SIZE, zero as *const () as usize),
            (slots::GET_NB_DLA_CORES, zero as *const () as usize),
            (slots::SET_GPU_ALLOCATOR, set_allocator as *const () as usize),
            (slots::CREATE_BUILDER_CONFIG, create_config as *const () as usize),
            (slots::CREATE_NETWORK_V2, create_network as *const () as usize),
            (slots::CREATE_OPTIMIZATION_PROFILE, create_profile as *const () as usize),
            (slots::SET_ERROR_RECORDER, set_recorder as *const () as usize),
            (slots::GET_ERROR_RECORDER, get_recorder as *const () as usize),
            (slots::RESET, reset as *const () as usize),
            (slots::BUILD_SERIALIZED_NETWORK, build as *const () as usize),
            (slots::IS_NETWORK_SUPPORTED, is_supported as *const () as usize),
            (slots::GET_LOGGER, get_logger as *const () as usize),
            (slots::SET_MAX_THREADS, set_threads as *const () as usize),
            (slots::GET_MAX_THREADS, get_threads as *const () as usize),
        ]
    }
}

type This = *mut Object<Builder>;

unsafe extern "C" fn fast_fp16(_: This) -> bool {
    sm().is_ok_and(|sm| sm >= 53 && sm != 61)
}

unsafe extern "C" fn fast_int8(_: This) -> bool {
    sm().is_ok_and(|sm| sm >= 61)
}

unsafe extern "C" fn has_tf32(_: This) -> bool {
    sm().is_ok_and(|sm| sm >= 80)
}

unsafe extern "C" fn zero(_: This) -> i32 {
    0
}

unsafe extern "C" fn set_allocator(this: This, allocator: *mut u8) {
    check_kind(allocator, gpu_allocator::GET_INTERFACE_INFO, gpu_allocator::KIND);
    Object::body(this).allocator = allocator as usize;
}

unsafe extern "C" fn create_config(this: This) -> *mut Public {
    let builder = Object::body(this);
    if !allowed(&builder.reporter, "IBuilder", "createBuilderConfig") {
        return std::ptr::null_mut();
    }
    make(Config::new(builder.reporter, builder.shared.clone()))
}

unsafe extern "C" fn create_network(this: This, flags: u32) -> *mut Public {
    let builder = Object::body(this);
    if !allowed(&builder.reporter, "IBuilder", "createNetworkV2") {
        return std::ptr::null_mut();
    }
    let (major, minor, ..) = crate::record::version();
    let known = crate::abi::network_definition_creation_flag::ALL;
    let known = known
        .iter()
        .filter_map(|one| one.value(major, minor))
        .fold(0u32, |all, bit| all | 1 << bit);
    if flags & !known != 0 {
        builder.reporter.error("IBuilder::createNetworkV2: Error Code 3: API Usage Error (Parameter check failed, condition: flagSet.toU32() < (1U << EnumMax<NetworkDefinitionCreationFlag>()))");
        return std::ptr::null_mut();
    }
    make(Network::new(builder.reporter, flags, builder.shared.clone()))
}

unsafe extern "C" fn create_profile(this: This) -> *mut Public {
    let builder = Object::body(this);
    if !allowed(&builder.reporter, "IBuilder", "createOptimizationProfile") {
        return std::ptr::null_mut();
    }
    let profile = make(Profile::new(builder.reporter));
    builder.profiles.push(profile);
    profile
}

unsafe extern "C" fn set_recorder(this: This, recorder: *mut u8) {
    Object::body(this).reporter.set_recorder(recorder);
}

unsafe extern "C" fn get_recorder(this: This) -> usize {
    Object::body(this).reporter.recorder
}

unsafe extern "C" fn reset(_: This) {}

unsafe extern "C" fn build(this: This, network: *mut Public, config: *mut Public) -> *mut Public {
    let builder = Object::body(this);
    let (network, config) = (of::<Network>(network), of::<Config>(config));
    if !allowed(&builder.reporter, "IBuilder", "buildSerializedNetwork") {
        return std::ptr::null_mut();
    }
    match compile::build(network, config, &builder.reporter) {
        Ok(plan) => make(HostMemory(plan)),
        Err(why) => {
            if !why.is_empty() {
                builder.reporter.error(&format!("IBuilder::buildSerializedNetwork: {why}"));
            }
            std::ptr::null_mut()
        }
    }
}

unsafe extern "C" fn is_supported(_: This, _network: *mut Public, _config: *mut Public) -> bool {
    true
}

unsafe extern "C" fn get_logger(this: This) -> *mut c_void {
    Object::body(this).reporter.logger as *mut c_void
}

unsafe extern "C" fn set_threads(this: This, n: i32) -> bool {
    let builder = Object::body(this);
    if n < 1 || !allowed(&builder.reporter, "IBuilder", "setMaxThreads") {
        return false;
    }
    builder.threads = n;
    true
}

unsafe extern "C" fn get_threads(this: This) -> i32 {
    Object::body(this).threads
}
