//! IBuilderConfig: what is set is kept and answered, what TensorRT refuses is refused with its words.

use std::collections::BTreeMap;
use std::ffi::{c_char, CString};
use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::abi::{
    builder_config as slots, builder_flag, int8_entropy_calibrator_2 as entropy, int8_min_max_calibrator as min_max, memory_pool_type,
    preview_feature, progress_monitor, tactic_source, Member, Slot,
};
use crate::driver::driver;
use crate::faults::ignored;
use crate::network::{usage, Shared};
use crate::object::{check_kind, check_kinds, make, of, Class, Object, Public};
use crate::profile::{Profile, TimingCache};
use crate::record::version;
use crate::{allowed, text, Reporter};

pub struct Config {
    pub reporter: Reporter,
    shared: Arc<Shared>,
    strong: bool,
    pub flags: u32,
    pub quantization_flags: u32,
    /// Everything that is one number, by the setter's name.
    pub numbers: BTreeMap<&'static str, i64>,
    pub pools: BTreeMap<i32, u64>,
    pub previews: u32,
    pub profiles: Vec<Profile>,
    pub calibration_profile: Option<Profile>,
    calibration_profile_object: *mut Public,
    pub calibrator: usize,
    pub monitor: usize,
    pub cache: *mut Public,
    pub plugins: Vec<CString>,
    text: CString,
}

/// The member of that number in this version.
pub fn member(all: &[Member], value: i32) -> Option<&Member> {
    let (major, minor, ..) = version();
    all.iter().find(|one| one.value(major, minor) == Some(value))
}

fn defaults() -> BTreeMap<&'static str, i64> {
    let (major, minor, ..) = version();
    let sources = [tactic_source::EDGE_MASK_CONVOLUTIONS, tactic_source::JIT_CONVOLUTIONS];
    let sources = sources
        .iter()
        .filter_map(|one| one.value(major, minor))
        .fold(0, |all, bit| all | 1 << bit);
    BTreeMap::from([
        ("AvgTimingIterations", 1),
        ("BuilderOptimizationLevel", 3),
        ("MaxAuxStreams", -1),
        ("MaxNbTactics", -1),
        ("TacticSources", sources),
        ("DLACore", -1),
        ("L2LimitForTiling", -1),
    ])
}

impl Config {
    pub fn new(reporter: Reporter, shared: Arc<Shared>) -> Config {
        shared.objects.fetch_add(1, Ordering::Relaxed);
        let mut config = Config {
            reporter,
            strong: shared.strong.load(Ordering::Relaxed),
            shared,
            flags: 0,
            quantization_flags: 0,
            numbers: BTreeMap::new(),
            pools: BTreeMap::new(),
            previews: 0,
            profiles: Vec::new(),
            calibration_profile: None,
            calibration_profile_object: std::ptr::null_mut(),
            calibrator: 0,
            monitor: 0,
            cache: std::ptr::null_mut(),
            plugins: Vec::new(),
            text: CString::default(),
        };
        config.clear();
        config
    }

    fn clear(&mut self) {
        let (major, minor, ..) = version();
        let mut memory = 0;
        if let Ok(driver) = driver() {
            // SAFETY: a plain driver call with a place for its result.
            unsafe { (driver.total)(&mut memory, 0) };
        }
        self.flags = builder_flag::TF32.value(major, minor).map_or(0, |bit| 1 << bit);
        self.numbers = defaults();
        self.pools = memory_pool_type::ALL
            .iter()
            .filter_map(|one| Some((one.value(major, minor)?, one.name)))
            .map(|(value, name)| {
                let default = match name {
                    "WORKSPACE" | "TACTIC_DRAM" => memory as u64,
                    "TACTIC_SHARED_MEMORY" => 1 << 30,
                    "DLA_LOCAL_DRAM" => 1 << 30,
                    "DLA_GLOBAL_DRAM" => 1 << 29,
                    _ => 0,
                };
                (value, default)
            })
            .collect();
        self.previews = preview_feature::PROFILE_SHARING_0806.value(major, minor).map_or(0, |bit| 1 << bit);
        self.profiles.clear();
        self.calibration_profile = None;
        self.calibrator = 0;
        self.monitor = 0;
        self.cache = std::ptr::null_mut();
        self.plugins.clear();
    }

    pub fn has(&self, flag: Member) -> bool {
        let (major, minor, ..) = version();
        flag.value(major, minor).is_some_and(|bit| self.flags >> bit & 1 != 0)
    }

    pub fn number(&self, what: &str) -> i64 {
        self.numbers.get(what).copied().unwrap_or(0)
    }

    /// Names of the flags that are set.
    pub fn flag_names(&self) -> Vec<&'static str> {
        (0..32)
            .filter(|bit| self.flags >> bit & 1 != 0)
            .filter_map(|bit| member(builder_flag::ALL, bit))
            .map(|one| one.name)
            .collect()
    }

    fn refuse(&self, method: &str, why: &str) {
        usage(&self.reporter, &format!("IBuilderConfig::{method}"), &format!("condition: {why}"));
    }

    fn turn(&mut self, bit: i32, on: bool) {
        let method = if on { "setFlag" } else { "clearFlag" };
        let Some(flag) = member(builder_flag::ALL, bit) else {
            return self.refuse(method, "int(builderFlag) >= 0 && int(builderFlag) < EnumMax<BuilderFlag>()");
        };
        if ignored(flag.name) || ignored(method) {
            return;
        }
        let strong = self.strong;
        let why = match flag.name {
            _ if !on => None,
            name @ ("FP16" | "INT8" | "BF16" | "FP8" | "INT4" | "FP4") if strong => {
                Some(format!("builderFlag != BuilderFlag::k{name} || !getConfig().stronglyTyped. Setting BuilderFlag::k{name} is not allowed set for kSTRONGLY_TYPED network."))
            }
            name @ ("OBEY_PRECISION_CONSTRAINTS" | "PREFER_PRECISION_CONSTRAINTS" | "SAFETY_SCOPE") if strong => {
                Some(format!("builderFlag != BuilderFlag::k{name} || !getConfig().stronglyTyped. k{name} cannot be set for kSTRONGLY_TYPED network."))
            }
            "OBEY_PRECISION_CONSTRAINTS" if self.has(builder_flag::PREFER_PRECISION_CONSTRAINTS) => {
                Some("kOBEY_PRECISION_CONSTRAINTS cannot be set if kPREFER_PRECISION_CONSTRAINTS is set.".to_owned())
            }
            "PREFER_PRECISION_CONSTRAINTS" if self.has(builder_flag::OBEY_PRECISION_CONSTRAINTS) => {
                Some("kPREFER_PRECISION_CONSTRAINTS cannot be set if kOBEY_PRECISION_CONSTRAINTS is set.".to_owned())
            }
            "EXCLUDE_LEAN_RUNTIME" if !self.has(builder_flag::VERSION_COMPATIBLE) => {
                Some("kEXCLUDE_LEAN_RUNTIME can only be set if kVERSION_COMPATIBLE is set.".to_owned())
            }
            _ => None,
        };
        if let Some(why) = why {
            return self.refuse(method, &why);
        }
        let refits = [builder_flag::REFIT, builder_flag::REFIT_IDENTICAL, builder_flag::REFIT_INDIVIDUAL];
        if on && refits.iter().any(|one| one.name == flag.name) {
            let (major, minor, ..) = version();
            for other in refits {
                if other.name == flag.name || !self.has(other) {
                    continue;
                }
                self.reporter.log(
                    2,
                    "Unset previous flag because kREFIT, kREFIT_INDIVIDUAL and kREFIT_IDENTICAL are mutually exclusive.",
                );
                self.flags &= !(1 << other.value(major, minor).unwrap_or(31));
            }
        }
        if on {
            self.flags |= 1 << bit;
        } else {
            self.flags &= !(1 << bit);
        }
    }
}

impl Class for Config {
    const NAME: &'static str = "IBuilderConfig";
    const ROW: usize = 6;

    fn destroyed(&mut self) {
        self.shared.objects.fetch_sub(1, Ordering::Relaxed);
    }

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (slots::SET_AVG_TIMING_ITERATIONS, set_avg as *const () as usize),
            (slots::GET_AVG_TIMING_ITERATIONS, get_avg as *const () as usize),
            (slots::SET_ENGINE_CAPABILITY, set_capability as *const () as usize),
            (slots::GET_ENGINE_CAPABILITY, get_capability as *const () as usize),
            (slots::SET_INT8_CALIBRATOR, set_calibrator as *const () as usize),
            (slots::GET_INT8_CALIBRATOR, get_calibrator as *const () as usize),
            (slots::SET_FLAGS, set_flags as *const () as usize),
            (slots::GET_FLAGS, get_flags as *const () as usize),
            (slots::CLEAR_FLAG, clear_flag as *const () as usize),
            (slots::SET_FLAG, set_flag as *const () as usize),
            (slots::GET_FLAG, get_flag as *const () as usize),
            (slots::CAN_RUN_ON_DLA, never as *const () as usize),
            (slots::SET_DLA_CORE, set_dla as *const () as usize),
            (slots::GET_DLA_CORE, get_dla as *const () as usize),
            (slots::SET_DEFAULT_DEVICE_TYPE, set_device as *const () as usize),
            (slots::GET_DEFAULT_DEVICE_TYPE, get_device as *const () as usize),
            (slots::RESET, reset as *const () as usize),
            (slots::SET_PROFILE_STREAM, set_stream as *const () as usize),
            (slots::GET_PROFILE_STREAM, get_stream as *const () as usize),
            (slots::ADD_OPTIMIZATION_PROFILE, add_profile as *const () as usize),
            (slots::GET_NB_OPTIMIZATION_PROFILES, nb_profiles as *const () as usize),
            (slots::SET_PROFILING_VERBOSITY, set_verbosity as *const () as usize),
            (slots::GET_PROFILING_VERBOSITY, get_verbosity as *const () as usize),
            (slots::SET_CALIBRATION_PROFILE, set_calibration_profile as *const () as usize),
            (slots::GET_CALIBRATION_PROFILE, get_calibration_profile as *const () as usize),
            (slots::SET_QUANTIZATION_FLAGS, set_quantization as *const () as usize),
            (slots::GET_QUANTIZATION_FLAGS, get_quantization as *const () as usize),
            (slots::SET_TACTIC_SOURCES, set_sources as *const () as usize),
            (slots::GET_TACTIC_SOURCES, get_sources as *const () as usize),
            (slots::CREATE_TIMING_CACHE, create_cache as *const () as usize),
            (slots::SET_TIMING_CACHE, set_cache as *const () as usize),
            (slots::GET_TIMING_CACHE, get_cache as *const () as usize),
            (slots::SET_MEMORY_POOL_LIMIT, set_pool as *const () as usize),
            (slots::GET_MEMORY_POOL_LIMIT, get_pool as *const () as usize),
            (slots::SET_PREVIEW_FEATURE, set_preview as *const () as usize),
            (slots::GET_PREVIEW_FEATURE, get_preview as *const () as usize),
            (slots::SET_BUILDER_OPTIMIZATION_LEVEL, set_level as *const () as usize),
            (slots::GET_BUILDER_OPTIMIZATION_LEVEL, get_level as *const () as usize),
            (slots::SET_HARDWARE_COMPATIBILITY_LEVEL, set_hardware as *const () as usize),
            (slots::GET_HARDWARE_COMPATIBILITY_LEVEL, get_hardware as *const () as usize),
            (slots::SET_PLUGINS_TO_SERIALIZE, set_plugins as *const () as usize),
            (slots::GET_PLUGIN_TO_SERIALIZE, get_plugin as *const () as usize),
            (slots::GET_NB_PLUGINS_TO_SERIALIZE, nb_plugins as *const () as usize),
            (slots::SET_MAX_AUX_STREAMS, set_aux as *const () as usize),
            (slots::GET_MAX_AUX_STREAMS, get_aux as *const () as usize),
            (slots::SET_PROGRESS_MONITOR, set_monitor as *const () as usize),
            (slots::GET_PROGRESS_MONITOR, get_monitor as *const () as usize),
            (slots::SET_RUNTIME_PLATFORM, set_platform as *const () as usize),
            (slots::GET_RUNTIME_PLATFORM, get_platform as *const () as usize),
            (slots::SET_MAX_NB_TACTICS, set_tactics as *const () as usize),
            (slots::GET_MAX_NB_TACTICS, get_tactics as *const () as usize),
            (slots::SET_TILING_OPTIMIZATION_LEVEL, set_tiling as *const () as usize),
            (slots::GET_TILING_OPTIMIZATION_LEVEL, get_tiling as *const () as usize),
            (slots::SET_L2_LIMIT_FOR_TILING, set_l2 as *const () as usize),
            (slots::GET_L2_LIMIT_FOR_TILING, get_l2 as *const () as usize),
        ]
    }
}

type This = *mut Object<Config>;

/// Setters and getters of one number each: void ones, whose value must lie in a range.
macro_rules! numbers {
    ($($key:literal: $set:ident, $get:ident, $type:ty, $range:expr;)*) => { $(
        unsafe extern "C" fn $set(this: This, value: $type) -> bool {
            let config = Object::body(this);
            let method = concat!("set", $key);
            if !$range.contains(&i64::from(value)) {
                config.refuse(method, concat!($key, " lies in its range"));
                return false;
            }
            if !allowed(&config.reporter, "IBuilderConfig", method) {
                return false;
            }
            if !ignored(method) {
                config.numbers.insert($key, i64::from(value));
            }
            true
        }

        unsafe extern "C" fn $get(this: This) -> $type {
            Object::body(this).number($key) as $type
        }
    )* };
}

numbers! {
    "AvgTimingIterations": set_avg, get_avg, i32, (1..i64::MAX);
    "EngineCapability": set_capability, get_capability, i32, (0..3);
    "DLACore": set_dla, get_dla, i32, (-1..2);
    "DefaultDeviceType": set_device, get_device, i32, (0..2);
    "ProfilingVerbosity": set_verbosity, get_verbosity, i32, (0..3);
    "BuilderOptimizationLevel": set_level, get_level, i32, (0..6);
    "HardwareCompatibilityLevel": set_hardware, get_hardware, i32, (0..3);
    "MaxAuxStreams": set_aux, get_aux, i32, (0..i64::MAX);
    "RuntimePlatform": set_platform, get_platform, i32, (0..2);
    "MaxNbTactics": set_tactics, get_tactics, i32, (-1..i64::MAX);
    "TilingOptimizationLevel": set_tiling, get_tiling, i32, (0..4);
    "L2LimitForTiling": set_l2, get_l2, i64, (-1..i64::MAX);
    "ProfileStream": set_stream, get_stream, i64, (i64::MIN..i64::MAX);
}

unsafe extern "C" fn never(_: This) -> bool {
    false
}

unsafe extern "C" fn set_calibrator(this: This, calibrator: *mut u8) {
    check_kinds(calibrator, entropy::GET_INTERFACE_INFO, &[entropy::KIND, min_max::KIND]);
    if !ignored("setInt8Calibrator") {
        Object::body(this).calibrator = calibrator as usize;
    }
}

unsafe extern "C" fn get_calibrator(this: This) -> usize {
    Object::body(this).calibrator
}

unsafe extern "C" fn set_flags(this: This, flags: u32) {
    let config = Object::body(this);
    for bit in 0..32 {
        if flags >> bit & 1 != config.flags >> bit & 1 {
            config.turn(bit, flags >> bit & 1 != 0);
        }
    }
}

unsafe extern "C" fn get_flags(this: This) -> u32 {
    Object::body(this).flags
}

unsafe extern "C" fn clear_flag(this: This, flag: i32) {
    Object::body(this).turn(flag, false);
}

unsafe extern "C" fn set_flag(this: This, flag: i32) {
    Object::body(this).turn(flag, true);
}

unsafe extern "C" fn get_flag(this: This, flag: i32) -> bool {
    (0..32).contains(&flag) && Object::body(this).flags >> flag & 1 != 0
}

unsafe extern "C" fn reset(this: This) {
    Object::body(this).clear();
}

unsafe extern "C" fn add_profile(this: This, profile: *mut Public) -> i32 {
    let config = Object::body(this);
    let profile = of::<Profile>(profile);
    if !allowed(&config.reporter, "IBuilderConfig", "addOptimizationProfile") {
        return -1;
    }
    if !profile.valid() {
        config.refuse("addOptimizationProfile", "profile->isValid()");
        return -1;
    }
    config.profiles.push(profile.clone());
    config.profiles.len() as i32 - 1
}

unsafe extern "C" fn nb_profiles(this: This) -> i32 {
    Object::body(this).profiles.len() as i32
}

unsafe extern "C" fn set_calibration_profile(this: This, profile: *mut Public) -> bool {
    let config = Object::body(this);
    if profile.is_null() {
        config.calibration_profile = None;
        return true;
    }
    let given = of::<Profile>(profile);
    if !given.valid() {
        config.refuse("setCalibrationProfile", "!profile || profile->isValid()");
        return false;
    }
    if !allowed(&config.reporter, "IBuilderConfig", "setCalibrationProfile") {
        return false;
    }
    config.calibration_profile = Some(given.clone());
    config.calibration_profile_object = profile;
    true
}

unsafe extern "C" fn get_calibration_profile(this: This) -> *mut Public {
    let config = Object::body(this);
    match config.calibration_profile {
        Some(_) => config.calibration_profile_object,
        None => std::ptr::null_mut(),
    }
}

unsafe extern "C" fn set_quantization(this: This, flags: u32) {
    Object::body(this).quantization_flags = flags;
}

unsafe extern "C" fn get_quantization(this: This) -> u32 {
    Object::body(this).quantization_flags
}

unsafe extern "C" fn set_sources(this: This, sources: u32) -> bool {
    let config = Object::body(this);
    if (0..32).any(|bit| sources >> bit & 1 != 0 && member(tactic_source::ALL, bit).is_none()) {
        config.refuse("setTacticSources", "tacticSources < 1U << EnumMax<TacticSource>()");
        return false;
    }
    if !allowed(&config.reporter, "IBuilderConfig", "setTacticSources") {
        return false;
    }
    if !ignored("setTacticSources") {
        config.numbers.insert("TacticSources", i64::from(sources));
    }
    true
}

unsafe extern "C" fn get_sources(this: This) -> u32 {
    Object::body(this).number("TacticSources") as u32
}

unsafe extern "C" fn create_cache(this: This, blob: *const u8, size: u64) -> *mut Public {
    let config = Object::body(this);
    if !allowed(&config.reporter, "IBuilderConfig", "createTimingCache") {
        return std::ptr::null_mut();
    }
    let blob = if blob.is_null() {
        &[]
    } else {
        std::slice::from_raw_parts(blob, size as usize)
    };
    match TimingCache::read(blob, config.reporter) {
        Some(cache) => make(cache),
        None => {
            config.reporter.error("IBuilderConfig::createTimingCache: Error Code 1: Serialization (Serialization assertion stdMagicTag == magicTagRead failed.Magic tag does not match)");
            std::ptr::null_mut()
        }
    }
}

unsafe extern "C" fn set_cache(this: This, cache: *mut Public, ignore_mismatch: bool) -> bool {
    let config = Object::body(this);
    let given = of::<TimingCache>(cache);
    if !allowed(&config.reporter, "IBuilderConfig", "setTimingCache") {
        return false;
    }
    if let Some(why) = given.mismatch(ignore_mismatch) {
        config.reporter.log(2, &why);
        return false;
    }
    config.cache = cache;
    true
}

unsafe extern "C" fn get_cache(this: This) -> *mut Public {
    Object::body(this).cache
}

unsafe extern "C" fn set_pool(this: This, pool: i32, size: u64) {
    let config = Object::body(this);
    let Some(kind) = member(memory_pool_type::ALL, pool) else {
        return config.refuse("setMemoryPoolLimit", "int(pool) >= 0 && int(pool) < EnumMax<MemoryPoolType>()");
    };
    if kind.name.starts_with("DLA") {
        return config.refuse(
            "setMemoryPoolLimit",
            "false. Setting DLA memory pool size on TensorRT build with DLA disabled.",
        );
    }
    if kind.name == "TACTIC_SHARED_MEMORY" && size > 1 << 30 {
        return config.refuse(
            "setMemoryPoolLimit",
            "poolSize <= kTACTIC_MAX_SHMEM_DEFAULT_SIZE. kTACTIC_SHARED_MEMORY must be < 1GiB",
        );
    }
    if !ignored(kind.name) && !ignored("setMemoryPoolLimit") {
        config.pools.insert(pool, size);
    }
}

unsafe extern "C" fn get_pool(this: This, pool: i32) -> u64 {
    Object::body(this).pools.get(&pool).copied().unwrap_or(0)
}

unsafe extern "C" fn set_preview(this: This, feature: i32, on: bool) {
    let config = Object::body(this);
    if member(preview_feature::ALL, feature).is_none() {
        return config.refuse("setPreviewFeature", "int(feature) >= 0 && int(feature) < EnumMax<PreviewFeature>()");
    }
    if on {
        config.previews |= 1 << feature;
    } else {
        config.previews &= !(1 << feature);
    }
}

unsafe extern "C" fn get_preview(this: This, feature: i32) -> bool {
    (0..32).contains(&feature) && Object::body(this).previews >> feature & 1 != 0
}

unsafe extern "C" fn set_plugins(this: This, paths: *const *const c_char, count: i32) {
    let config = Object::body(this);
    let paths: Vec<CString> = (0..count.max(0) as usize).map(|i| text(*paths.add(i)).to_owned()).collect();
    if let Some(twice) = paths.iter().enumerate().find(|(i, path)| paths[..*i].contains(path)) {
        return config.refuse(
            "setPluginsToSerialize",
            &format!(
                "Plugin paths for serialization must be unique. Duplicate path is {}",
                twice.1.to_string_lossy()
            ),
        );
    }
    if !ignored("setPluginsToSerialize") {
        config.plugins = paths;
    }
}

unsafe extern "C" fn get_plugin(this: This, index: i32) -> *const c_char {
    let config = Object::body(this);
    match usize::try_from(index).ok().and_then(|i| config.plugins.get(i)) {
        Some(path) => path.as_ptr(),
        None => config.text.as_ptr(),
    }
}

unsafe extern "C" fn nb_plugins(this: This) -> i32 {
    Object::body(this).plugins.len() as i32
}

unsafe extern "C" fn set_monitor(this: This, monitor: *mut u8) {
    check_kind(monitor, progress_monitor::GET_INTERFACE_INFO, progress_monitor::KIND);
    Object::body(this).monitor = monitor as usize;
}

unsafe extern "C" fn get_monitor(this: This) -> usize {
    Object::body(this).monitor
}
