//! Building a plan: a builder with one network (filled by the ONNX parser) and one configuration. Every setter that returns
//! nothing is read back, so that what was asked for and did not take is an error instead of another plan.

mod calibrator;
mod config;
mod monitor;
mod network;
mod parser;

pub use calibrator::{Algorithm, Calibrator, NextBatch};
pub use config::Profile;
pub use monitor::{Event, Monitor, Progress};
pub use network::{NetworkLayer, NetworkTensor};
pub use parser::Problem;

use super::abi::{
    builder as slot, builder_config as config_slot, host_memory, network_definition_creation_flag as creation, timing_cache, Member,
};
use super::library::Library;
use super::object::{call, Handle, Object};
use crate::cuda::Device;
use crate::error::{Error, Kind, Result};
use parser::{Parser, ParserRefitter};
use std::ffi::c_void;
use std::fmt::Debug;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// TensorRT's objects of one build. Fields drop in order: what is made before what it was made from; the parser owns the weights.
pub struct Builder {
    config: Object,
    timing_cache: Option<Object>,
    network: Object,
    parser: Parser,
    builder: &'static Object,
    calibrator: Option<Box<Calibrator>>,
    _monitor: Option<Box<Monitor>>,
    pub progress: Arc<Progress>,
    pub lib: &'static Library,
    pub device: &'static Device,
    pub strongly_typed: bool,
}

/// What a build cost.
pub struct Built {
    pub bytes: u64,
    pub seconds: f64,
}

#[cold]
fn refused(what: impl Into<String>, mark: u64) -> Error {
    Error::new(Kind::Build, what).with_log(crate::log::TENSORRT.since(mark))
}

/// The number of an enum member of that name in this version.
fn member(lib: &Library, what: &str, all: &[Member], name: &str) -> Result<i32> {
    let known = all.iter().find(|m| m.name == name);
    if let Some(value) = known.and_then(|m| m.value(lib.version.major, lib.version.minor)) {
        return Ok(value);
    }
    let has = |m: &&Member| m.value(lib.version.major, lib.version.minor).is_some();
    let allowed: Vec<&str> = all.iter().filter(has).map(|m| m.name).collect();
    let why = match known {
        None => "there is none of that name".to_string(),
        Some(m) => format!("TensorRT {} does not have it ({})", lib.version, versions(m)),
    };
    Err(
        Error::new(Kind::BuildOption, format!("{what} {name}: {why}; allowed: {}.", allowed.join(", ")))
            .with("option", name)
            .with("allowed", allowed.join(", ")),
    )
}

fn versions(m: &Member) -> String {
    let one = |major: u32, entry: Option<(u16, u16, u16)>| match entry {
        None => format!("not in {major}.x"),
        Some((_, first, u16::MAX)) => format!("in {major}.{first} and later {major}.x"),
        Some((_, first, last)) => format!("in {major}.{first} to {major}.{last}"),
    };
    format!("it is {}, {}", one(10, m.v10), one(11, m.v11))
}

/// A value that was set and read back.
fn took<T: PartialEq + Debug>(what: &str, wanted: T, found: T) -> Result<()> {
    if wanted == found {
        return Ok(());
    }
    Err(Error::new(
        Kind::Build,
        format!("{what}: set to {wanted:?}, and TensorRT kept {found:?}. A plan built now would not be the one that was asked for."),
    ))
}

/// One IBuilder for each GPU, kept for the process: making one costs seconds (it loads more than a gigabyte of kernels), and several
/// networks may use it in turn.
fn builder_of(lib: &'static Library, device: &'static Device) -> Result<&'static Object> {
    static BUILDERS: Mutex<Vec<(i32, &'static Object)>> = Mutex::new(Vec::new());
    let mut all = BUILDERS.lock().unwrap_or_else(|e| e.into_inner());
    if let Some((_, builder)) = all.iter().find(|(ordinal, _)| *ordinal == device.ordinal) {
        return Ok(builder);
    }
    let builder: &'static Object = Box::leak(Box::new(lib.create_builder()?));
    all.push((device.ordinal, builder));
    Ok(builder)
}

impl Builder {
    pub fn new(lib: &'static Library, device: &'static Device, strongly_typed: bool) -> Result<Builder> {
        let _entered = device.enter()?;
        let builder = builder_of(lib, device)?;
        let mut flags = 0;
        if strongly_typed {
            flags |= 1 << member(lib, "network flag", creation::ALL, "STRONGLY_TYPED")?;
        }
        // A builder that is refused its resources says why in the log.
        let mark = crate::log::TENSORRT.mark();
        let missing = |what: &str| refused(format!("TensorRT {} could not make {what}", lib.version), mark);
        // SAFETY: VBuilder::createNetworkV2(uint32_t) and createBuilderConfig().
        let (network, config) = unsafe {
            (
                call!(lib, builder, slot::CREATE_NETWORK_V2, fn(u32) -> *mut c_void, flags)?,
                call!(lib, builder, slot::CREATE_BUILDER_CONFIG, fn() -> *mut c_void)?,
            )
        };
        let network = Object::new(network).ok_or_else(|| missing("a network"))?;
        let config = Object::new(config).ok_or_else(|| missing("a builder configuration"))?;
        let parser = Parser::new(lib, *network)?;
        let progress = Arc::<Progress>::default();
        let mut monitor = None;
        if lib.has(&config_slot::SET_PROGRESS_MONITOR) {
            let m = Monitor::new(lib, Arc::clone(&progress));
            // SAFETY: VBuilderConfig::setProgressMonitor(IProgressMonitor*); the box lives longer than the configuration.
            unsafe { call!(lib, config, config_slot::SET_PROGRESS_MONITOR, fn(*mut c_void) -> (), m.public()) }?;
            monitor = Some(m);
        }
        Ok(Builder {
            config,
            timing_cache: None,
            network,
            parser,
            builder,
            calibrator: None,
            _monitor: monitor,
            progress,
            lib,
            device,
            strongly_typed,
        })
    }

    pub fn parse(&self, path: &Path, flags: &[String]) -> Result<Vec<Problem>> {
        let _entered = self.device.enter()?;
        for flag in flags {
            self.parser.set_flag(flag)?;
        }
        self.parser.parse(path)
    }

    /// Builds, and writes the plan to `path`, which must not exist yet; on disk when this returns.
    pub fn build(&mut self, path: &Path) -> Result<Built> {
        let _entered = self.device.enter()?;
        let lib = self.lib;
        let mark = crate::log::TENSORRT.mark();
        let start = Instant::now();
        // SAFETY: VBuilder::buildSerializedNetwork(INetworkDefinition&, IBuilderConfig&).
        let made = unsafe {
            call!(
                lib,
                self.builder,
                slot::BUILD_SERIALIZED_NETWORK,
                fn(*mut c_void, *mut c_void) -> *mut c_void,
                self.network.public(),
                self.config.public()
            )
        }?;
        if let Some(e) = self.calibrator.as_ref().and_then(|c| c.take_error()) {
            return Err(e);
        }
        let plan = Object::new(made).ok_or_else(|| {
            let what = if self.progress.is_cancelled() {
                "the build was stopped"
            } else {
                "TensorRT built no plan"
            };
            refused(what, mark)
        })?;
        let seconds = start.elapsed().as_secs_f64();
        let bytes = contents(lib, &plan)?;
        write_new(path, bytes)?;
        Ok(Built {
            bytes: bytes.len() as u64,
            seconds,
        })
    }

    fn read_timing_cache(&self, data: &[u8]) -> Result<Object> {
        let mark = crate::log::TENSORRT.mark();
        // SAFETY: VBuilderConfig::createTimingCache(const void*, uint64_t), which copies.
        let made = unsafe {
            call!(
                self.lib,
                self.config,
                config_slot::CREATE_TIMING_CACHE,
                fn(*const c_void, u64) -> *mut c_void,
                data.as_ptr().cast(),
                data.len() as u64
            )
        }?;
        Object::new(made).ok_or_else(|| refused("TensorRT could not read the timing cache", mark))
    }

    /// The configuration owns it.
    fn used_timing_cache(&self) -> Result<Option<Handle>> {
        // SAFETY: VBuilderConfig::getTimingCache().
        let cache = unsafe { call!(self.lib, self.config, config_slot::GET_TIMING_CACHE, fn() -> *mut c_void) }?;
        Ok(Handle::new(cache))
    }

    /// Gives the builder tactic timings of earlier builds; false when they are of another library or GPU and were refused.
    pub fn set_timing_cache(&mut self, data: &[u8], ignore_mismatch: bool) -> Result<bool> {
        let lib = self.lib;
        // SAFETY: VBuilderConfig::setTimingCache(const ITimingCache&, bool); the field keeps what it took.
        unsafe {
            let cache = self.read_timing_cache(data)?;
            let ok = call!(
                lib,
                self.config,
                config_slot::SET_TIMING_CACHE,
                fn(*mut c_void, bool) -> bool,
                cache.public(),
                ignore_mismatch
            )?;
            if ok {
                self.timing_cache = Some(cache);
            }
            Ok(ok)
        }
    }

    /// Adds the timings of another cache to the one in use. False when it is of another library or GPU, or there is none in use.
    pub fn combine_timing_cache(&self, data: &[u8]) -> Result<bool> {
        let lib = self.lib;
        // SAFETY: VTimingCache::combine(const ITimingCache&, bool) on the configuration's cache.
        unsafe {
            let Some(cache) = self.used_timing_cache()? else {
                return Ok(false);
            };
            let other = self.read_timing_cache(data)?;
            call!(
                lib,
                cache,
                timing_cache::COMBINE,
                fn(*mut c_void, bool) -> bool,
                other.public(),
                false
            )
        }
    }

    /// The timing cache as it is now; `None` when there is none.
    pub fn timing_cache(&self) -> Result<Option<Vec<u8>>> {
        let lib = self.lib;
        // SAFETY: VTimingCache::serialize() gives an object of ours.
        unsafe {
            let Some(cache) = self.used_timing_cache()? else {
                return Ok(None);
            };
            let data = call!(lib, cache, timing_cache::SERIALIZE, fn() -> *mut c_void)?;
            let Some(data) = Object::new(data) else {
                return Ok(None);
            };
            contents(lib, &data).map(|bytes| Some(bytes.to_vec()))
        }
    }

    pub fn calibrator(&self) -> Option<&Calibrator> {
        self.calibrator.as_deref()
    }
}

/// The bytes of an IHostMemory.
fn contents<'a>(lib: &Library, memory: &'a Object) -> Result<&'a [u8]> {
    // SAFETY: VHostMemory::data() and size() describe memory that lives as long as the object.
    unsafe {
        let data = call!(lib, memory, host_memory::DATA, fn() -> *const u8)?;
        let size = call!(lib, memory, host_memory::SIZE, fn() -> u64)?;
        Ok(if data.is_null() || size == 0 {
            &[]
        } else {
            std::slice::from_raw_parts(data, size as usize)
        })
    }
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |e: std::io::Error| Error::file(path, &format!("cannot write the plan ({} bytes)", bytes.len()), &e);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| {
        let _ = std::fs::remove_file(path);
        failed(e)
    })
}

/// Refits an engine with the weights of an ONNX file. The complaints of the parser, none when every weight was replaced.
pub fn refit(lib: &'static Library, engine: Handle, onnx: &Path) -> Result<Vec<Problem>> {
    use super::abi::refitter as slot;
    let mark = crate::log::TENSORRT.mark();
    let refitter = lib.create_refitter(engine)?;
    // Alive until the engine has its weights: TensorRT 10.6 reads them in refitCudaEngine, from the parser's memory.
    let weights = ParserRefitter::new(lib, *refitter)?;
    let problems = weights.refit_from(onnx)?;
    if !problems.is_empty() {
        return Ok(problems);
    }
    // SAFETY: VRefitter::getMissingWeights(int32_t, const char**), where size 0 only counts, and refitCudaEngine().
    let (missing, ok) = unsafe {
        let missing = call!(
            lib,
            refitter,
            slot::GET_MISSING_WEIGHTS,
            fn(i32, *mut *const std::ffi::c_char) -> i32,
            0,
            std::ptr::null_mut()
        )?;
        (missing, call!(lib, refitter, slot::REFIT_CUDA_ENGINE, fn() -> bool)?)
    };
    if missing > 0 || !ok {
        return Err(Error::new(
            Kind::Deserialize,
            format!(
                "{}: the engine could not be refitted from this ONNX file ({missing} weights missing)",
                onnx.display()
            ),
        )
        .with("path", onnx.display().to_string())
        .with_log(crate::log::TENSORRT.since(mark)));
    }
    Ok(problems)
}
