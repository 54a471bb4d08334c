//! The builder's configuration.

use super::super::abi::{
    builder as builder_slot, builder_config as slot, builder_flag, hardware_compatibility_level, memory_pool_type, opt_profile_selector,
    optimization_profile as profile_slot, profiling_verbosity, runtime_platform, tactic_source, tiling_optimization_level, Slot,
};
use super::super::object::{call, Handle, RawDims};
use super::{member, refused, took, Algorithm, Builder, Calibrator, NextBatch};
use crate::error::{Error, Kind, Result};
use crate::shape::Range;
use std::ffi::{c_char, c_void, CString};
use std::path::PathBuf;

/// One optimisation profile: shapes of every input with dynamic dimensions, values of every shape tensor (min, opt, max).
#[derive(Debug, Default)]
pub struct Profile {
    pub shapes: Vec<(String, Range)>,
    pub values: Vec<(String, [Vec<i64>; 3])>,
}

const SELECTORS: [(i32, &str); 3] = [
    (opt_profile_selector::MIN, "min"),
    (opt_profile_selector::OPT, "opt"),
    (opt_profile_selector::MAX, "max"),
];

/// Settings that are a number, or the name of an enum's member.
enum Setting {
    Int(Slot, Slot),
    Long(Slot, Slot),
    Word(Slot, Slot, fn(&Builder, &str) -> Result<i32>),
}

fn setting(name: &str) -> Option<Setting> {
    use Setting::{Int, Long, Word};
    Some(match name {
        "builder_optimization_level" => Int(slot::SET_BUILDER_OPTIMIZATION_LEVEL, slot::GET_BUILDER_OPTIMIZATION_LEVEL),
        "max_aux_streams" => Int(slot::SET_MAX_AUX_STREAMS, slot::GET_MAX_AUX_STREAMS),
        "avg_timing_iterations" => Int(slot::SET_AVG_TIMING_ITERATIONS, slot::GET_AVG_TIMING_ITERATIONS),
        "max_nb_tactics" => Int(slot::SET_MAX_NB_TACTICS, slot::GET_MAX_NB_TACTICS),
        "l2_limit_for_tiling" => Long(slot::SET_L2_LIMIT_FOR_TILING, slot::GET_L2_LIMIT_FOR_TILING),
        "profiling_verbosity" => Word(slot::SET_PROFILING_VERBOSITY, slot::GET_PROFILING_VERBOSITY, |_, v| {
            let found = profiling_verbosity::ALL.iter().find(|(n, _)| *n == v);
            found.map(|(_, value)| *value).ok_or_else(|| {
                let allowed: Vec<&str> = profiling_verbosity::ALL.iter().map(|(n, _)| *n).collect();
                Error::new(
                    Kind::BuildOption,
                    format!("profiling_verbosity {v}; allowed: {}", allowed.join(", ")),
                )
            })
        }),
        "hardware_compatibility_level" => Word(
            slot::SET_HARDWARE_COMPATIBILITY_LEVEL,
            slot::GET_HARDWARE_COMPATIBILITY_LEVEL,
            |b, v| member(b.lib, "hardware compatibility level", hardware_compatibility_level::ALL, v),
        ),
        "tiling_optimization_level" => Word(slot::SET_TILING_OPTIMIZATION_LEVEL, slot::GET_TILING_OPTIMIZATION_LEVEL, |b, v| {
            member(b.lib, "tiling optimisation level", tiling_optimization_level::ALL, v)
        }),
        "runtime_platform" => Word(slot::SET_RUNTIME_PLATFORM, slot::GET_RUNTIME_PLATFORM, |b, v| {
            member(b.lib, "runtime platform", runtime_platform::ALL, v)
        }),
        _ => return None,
    })
}

impl Builder {
    /// Names of the flags that this version has.
    pub fn known_flags(&self) -> Vec<&'static str> {
        let v = self.lib.version;
        builder_flag::ALL
            .iter()
            .filter(|m| m.value(v.major, v.minor).is_some())
            .map(|m| m.name)
            .collect()
    }

    fn flag_is_set(&self, value: i32) -> Result<bool> {
        // SAFETY: VBuilderConfig::getFlag(BuilderFlag).
        unsafe { call!(self.lib, self.config, slot::GET_FLAG, fn(i32) -> bool, value) }
    }

    pub fn flags(&self) -> Result<Vec<&'static str>> {
        let v = self.lib.version;
        let mut out: Vec<(i32, &'static str)> = Vec::new();
        for m in builder_flag::ALL {
            let Some(value) = m.value(v.major, v.minor) else { continue };
            // Some have two names: the first is the current one.
            if !out.iter().any(|(known, _)| *known == value) && self.flag_is_set(value)? {
                out.push((value, m.name));
            }
        }
        Ok(out.into_iter().map(|(_, name)| name).collect())
    }

    pub fn set_flag(&self, name: &str, on: bool) -> Result<()> {
        let value = member(self.lib, "builder flag", builder_flag::ALL, name)?;
        let mark = crate::log::TENSORRT.mark();
        let set = if on { slot::SET_FLAG } else { slot::CLEAR_FLAG };
        // SAFETY: VBuilderConfig::setFlag(BuilderFlag) and clearFlag(BuilderFlag).
        unsafe { call!(self.lib, self.config, set, fn(i32) -> (), value) }?;
        took(&format!("builder flag {name}"), on, self.flag_is_set(value)?).map_err(|e| e.with_log(crate::log::TENSORRT.since(mark)))
    }

    pub fn memory_limit(&self, pool: &str) -> Result<u64> {
        let pool = member(self.lib, "memory pool", memory_pool_type::ALL, pool)?;
        // SAFETY: VBuilderConfig::getMemoryPoolLimit(MemoryPoolType).
        unsafe { call!(self.lib, self.config, slot::GET_MEMORY_POOL_LIMIT, fn(i32) -> u64, pool) }
    }

    pub fn set_memory_limit(&self, pool: &str, bytes: u64) -> Result<()> {
        let value = member(self.lib, "memory pool", memory_pool_type::ALL, pool)?;
        // SAFETY: VBuilderConfig::setMemoryPoolLimit(MemoryPoolType, uint64_t).
        unsafe { call!(self.lib, self.config, slot::SET_MEMORY_POOL_LIMIT, fn(i32, u64) -> (), value, bytes) }?;
        took(&format!("limit of memory pool {pool}"), bytes, self.memory_limit(pool)?)
    }

    /// A setting by name, as a number or as the name of an enum's member.
    pub fn set_option(&self, name: &str, value: &str) -> Result<()> {
        let lib = self.lib;
        let unknown = || Error::new(Kind::BuildOption, format!("{name}: no such setting of the builder")).with("option", name);
        let no_number = || {
            Error::new(Kind::BuildOption, format!("{name}: found {value:?}; allowed: a whole number"))
                .with("option", name)
                .with("found", value)
        };
        // SAFETY: the setters and getters are VBuilderConfig's, and each kind states the type that they take and give. Some
        // setters return bool in some versions and nothing in others: the return register is not read.
        unsafe {
            match setting(name).ok_or_else(unknown)? {
                Setting::Int(set, get) => {
                    let v: i32 = value.parse().map_err(|_| no_number())?;
                    call!(lib, self.config, set, fn(i32) -> (), v)?;
                    took(name, v, call!(lib, self.config, get, fn() -> i32)?)
                }
                Setting::Long(set, get) => {
                    let v: i64 = value.parse().map_err(|_| no_number())?;
                    call!(lib, self.config, set, fn(i64) -> (), v)?;
                    took(name, v, call!(lib, self.config, get, fn() -> i64)?)
                }
                Setting::Word(set, get, number) => {
                    let v = number(self, value)?;
                    call!(lib, self.config, set, fn(i32) -> (), v)?;
                    took(name, v, call!(lib, self.config, get, fn() -> i32)?)
                }
            }
        }
    }

    /// The number that a setting has now; enum members as their number.
    pub fn option(&self, name: &str) -> Result<i64> {
        let lib = self.lib;
        // SAFETY: as in `set_option`.
        unsafe {
            match setting(name) {
                None => Err(Error::new(Kind::BuildOption, format!("{name}: no such setting of the builder")).with("option", name)),
                Some(Setting::Long(_, get)) => call!(lib, self.config, get, fn() -> i64),
                Some(Setting::Int(_, get) | Setting::Word(_, get, _)) => call!(lib, self.config, get, fn() -> i32).map(i64::from),
            }
        }
    }

    /// Allows these tactic sources and no others.
    pub fn set_tactic_sources(&self, names: &[String]) -> Result<()> {
        let mut mask = 0u32;
        for name in names {
            mask |= 1 << member(self.lib, "tactic source", tactic_source::ALL, name)?;
        }
        let mark = crate::log::TENSORRT.mark();
        // SAFETY: VBuilderConfig::setTacticSources(uint32_t) and getTacticSources().
        unsafe {
            if !call!(self.lib, self.config, slot::SET_TACTIC_SOURCES, fn(u32) -> bool, mask)? {
                return Err(refused(format!("tactic sources {} were refused", names.join(", ")), mark));
            }
            took(
                "tactic sources",
                mask,
                call!(self.lib, self.config, slot::GET_TACTIC_SOURCES, fn() -> u32)?,
            )
        }
    }

    /// Plugin libraries to put into the plan.
    pub fn set_plugins_to_serialize(&self, paths: &[PathBuf]) -> Result<()> {
        let names: Vec<CString> = paths
            .iter()
            .map(|p| {
                CString::new(p.to_string_lossy().as_bytes())
                    .map_err(|_| Error::new(Kind::Argument, format!("{}: a path cannot hold a NUL byte", p.display())))
            })
            .collect::<Result<_>>()?;
        let pointers: Vec<*const c_char> = names.iter().map(|n| n.as_ptr()).collect();
        // SAFETY: VBuilderConfig::setPluginsToSerialize(const char*const*, int32_t), which copies, and getNbPluginsToSerialize().
        unsafe {
            call!(
                self.lib,
                self.config,
                slot::SET_PLUGINS_TO_SERIALIZE,
                fn(*const *const c_char, i32) -> (),
                pointers.as_ptr(),
                pointers.len() as i32
            )?;
            let found = call!(self.lib, self.config, slot::GET_NB_PLUGINS_TO_SERIALIZE, fn() -> i32)?;
            took("number of plugins to serialise", pointers.len() as i32, found)
        }
    }

    /// A filled profile; the builder owns it.
    fn profile(&self, profile: &Profile) -> Result<Handle> {
        let lib = self.lib;
        let mark = crate::log::TENSORRT.mark();
        // SAFETY: VBuilder::createOptimizationProfile(); VOptimizationProfile's methods with the signatures of abi/vtables.csv. Names,
        // dimensions and values live during each call, which copies them.
        unsafe {
            let made = call!(lib, self.builder, builder_slot::CREATE_OPTIMIZATION_PROFILE, fn() -> *mut c_void)?;
            let object = Handle::new(made).ok_or_else(|| refused("TensorRT could not make an optimisation profile", mark))?;
            for (name, range) in &profile.shapes {
                let c_name = c_string(name)?;
                for ((selector, word), dims) in SELECTORS.iter().zip([&range.min, &range.opt, &range.max]) {
                    let raw = RawDims::from(dims);
                    let ok = call!(
                        lib,
                        object,
                        profile_slot::SET_DIMENSIONS,
                        fn(*const c_char, i32, *const RawDims) -> bool,
                        c_name.as_ptr(),
                        *selector,
                        &raw
                    )?;
                    let found = call!(
                        lib,
                        object,
                        profile_slot::GET_DIMENSIONS,
                        fn(*const c_char, i32) -> RawDims,
                        c_name.as_ptr(),
                        *selector
                    )?;
                    if !ok || found.dims().as_ref() != Some(dims) {
                        return Err(refused(format!("profile of '{name}': {word} {dims} was refused"), mark));
                    }
                }
            }
            for (name, values) in &profile.values {
                let c_name = c_string(name)?;
                for ((selector, word), values) in SELECTORS.iter().zip(values) {
                    let ok = self.set_values(object, &c_name, *selector, values)?;
                    if !ok {
                        return Err(refused(
                            format!("profile of shape tensor '{name}': {word} {values:?} was refused"),
                            mark,
                        ));
                    }
                }
            }
            if !call!(lib, object, profile_slot::IS_VALID, fn() -> bool)? {
                return Err(refused(format!("the optimisation profile is not valid: {profile:?}"), mark));
            }
            Ok(object)
        }
    }

    fn set_values(&self, object: Handle, name: &CString, selector: i32, values: &[i64]) -> Result<bool> {
        let lib = self.lib;
        let n = values.len() as i32;
        // SAFETY: VOptimizationProfile::setShapeValuesV2(const char*, int, const int64_t*, int32_t) from 10.11, else setShapeValues with int32_t.
        unsafe {
            if lib.has(&profile_slot::SET_SHAPE_VALUES_V2) {
                return call!(
                    lib,
                    object,
                    profile_slot::SET_SHAPE_VALUES_V2,
                    fn(*const c_char, i32, *const i64, i32) -> bool,
                    name.as_ptr(),
                    selector,
                    values.as_ptr(),
                    n
                );
            }
            let small: Vec<i32> = values
                .iter()
                .map(|&v| i32::try_from(v))
                .collect::<std::result::Result<_, _>>()
                .map_err(|_| {
                    Error::new(
                        Kind::BuildOption,
                        format!("values {values:?} of {name:?}: TensorRT {} takes 32-bit values only", lib.version),
                    )
                })?;
            call!(
                lib,
                object,
                profile_slot::SET_SHAPE_VALUES,
                fn(*const c_char, i32, *const i32, i32) -> bool,
                name.as_ptr(),
                selector,
                small.as_ptr(),
                n
            )
        }
    }

    /// Adds an optimisation profile; its number.
    pub fn add_profile(&self, profile: &Profile) -> Result<i32> {
        let mark = crate::log::TENSORRT.mark();
        let object = self.profile(profile)?;
        // SAFETY: VBuilderConfig::addOptimizationProfile(const IOptimizationProfile*).
        let index = unsafe {
            call!(
                self.lib,
                self.config,
                slot::ADD_OPTIMIZATION_PROFILE,
                fn(*mut c_void) -> i32,
                object.public()
            )
        }?;
        if index < 0 {
            return Err(refused(format!("the optimisation profile was refused: {profile:?}"), mark));
        }
        Ok(index)
    }

    /// An int8 calibrator, and the profile (min = opt = max) that it runs in.
    pub fn set_calibrator(
        &mut self,
        algorithm: Algorithm,
        batch_size: i32,
        cache: Option<Vec<u8>>,
        next: NextBatch,
        shapes: &Profile,
    ) -> Result<()> {
        let lib = self.lib;
        let mark = crate::log::TENSORRT.mark();
        let calibrator = Calibrator::new(lib, algorithm, batch_size, cache, next)?;
        let profile = self.profile(shapes)?;
        // SAFETY: VBuilderConfig::setInt8Calibrator(IInt8Calibrator*) and its getter, setCalibrationProfile(const IOptimizationProfile*);
        // the box lives longer than the configuration.
        unsafe {
            call!(
                lib,
                self.config,
                slot::SET_INT8_CALIBRATOR,
                fn(*mut c_void) -> (),
                calibrator.public()
            )?;
            let found = call!(lib, self.config, slot::GET_INT8_CALIBRATOR, fn() -> *mut c_void)?;
            took("int8 calibrator", calibrator.public(), found)?;
            if !call!(
                lib,
                self.config,
                slot::SET_CALIBRATION_PROFILE,
                fn(*mut c_void) -> bool,
                profile.public()
            )? {
                return Err(refused("the calibration profile was refused", mark));
            }
        }
        self.calibrator = Some(calibrator);
        Ok(())
    }
}

fn c_string(name: &str) -> Result<CString> {
    CString::new(name).map_err(|_| Error::new(Kind::Argument, format!("{name:?}: a tensor name cannot hold a NUL byte")))
}
