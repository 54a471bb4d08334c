//! An engine: loading a plan, and the table of its inputs and outputs, read once.

use super::abi::{
    self, allocation_strategy, engine as slot, opt_profile_selector, runtime as runtime_slot, tensor_io_mode, tensor_location,
};
use super::library::Library;
use super::object::{call, text, Object, RawDims};
use super::plan::PlanFile;
use super::Context;
use crate::cuda::Device;
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::shape::{Dims, Range};
use std::ffi::{c_char, c_void, CStr, CString};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// One input or output.
#[derive(Debug, Clone)]
pub struct IoTensor {
    pub name: String,
    c_name: CString,
    pub input: bool,
    pub dtype: DType,
    /// -1 where the dimension is dynamic.
    pub shape: Dims,
    /// The values are read or written in host memory (a shape tensor).
    pub host: bool,
    pub linear: bool,
    pub format: String,
    /// Per optimisation profile; empty for outputs.
    pub profiles: Vec<Range>,
}

impl IoTensor {
    pub fn c_name(&self) -> &CStr {
        &self.c_name
    }

    /// A device input as a table would describe it, for tests of the pure parts.
    #[cfg(test)]
    pub fn for_tests(name: &str, dtype: DType, shape: Dims, profiles: Vec<Range>) -> IoTensor {
        let c_name = CString::new(name).unwrap();
        IoTensor {
            name: name.into(),
            c_name,
            input: true,
            dtype,
            shape,
            host: false,
            linear: true,
            format: "Row major linear".into(),
            profiles,
        }
    }
}

/// What loading cost and said.
#[derive(Debug, Clone, Default)]
pub struct LoadReport {
    pub seconds: f64,
    pub plan_bytes: u64,
    /// The most host memory above the start that the kernel could not reclaim (anonymous and shared pages), sampled every 2 ms.
    pub peak_host_bytes: u64,
    pub sha256_verified: bool,
    pub warnings: Vec<String>,
    pub tensorrt: String,
    pub library: String,
}

pub struct Loading<'a> {
    pub plan: &'a PlanFile,
    pub allow_host_code: bool,
    pub verify: bool,
    /// The ONNX file whose weights a stripped plan gets.
    pub refit: Option<&'a Path>,
    /// Bytes of weights that stay on the GPU; the rest is streamed from the host at each call.
    pub weight_streaming_budget: Option<i64>,
}

/// TensorRT's objects of one engine. Fields drop in order: the engine before the runtime that made it.
#[derive(Debug)]
struct Handle {
    engine: Object,
    _runtime: Object,
}

/// A deserialised engine: its tables, and TensorRT's objects until `release`.
#[derive(Debug)]
pub struct Engine {
    handle: Mutex<Option<Handle>>,
    /// The plan's path, for messages: most engines are called "Unnamed Network 0".
    pub label: String,
    pub lib: &'static Library,
    pub device: &'static Device,
    pub name: String,
    pub io: Vec<IoTensor>,
    pub profiles: usize,
    pub device_memory: u64,
    pub aux_streams: i32,
    pub layers: i32,
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorRT {} at {}", self.version, self.path.display())
    }
}

impl Engine {
    /// Verifies the plan, hands it to TensorRT in place and reads the table of tensors.
    pub fn load(lib: &'static Library, device: &'static Device, request: &Loading<'_>) -> Result<(Engine, LoadReport)> {
        let plan = request.plan;
        let start = Instant::now();
        let mut report = LoadReport {
            plan_bytes: plan.bytes(),
            tensorrt: lib.version.to_string(),
            library: lib.path.display().to_string(),
            ..LoadReport::default()
        };
        check_version(lib, plan)?;
        if request.verify {
            report.sha256_verified = plan.verify_sidecar()?;
        }
        let _entered = device.enter()?;
        let runtime = lib.create_runtime()?;
        if request.allow_host_code {
            // SAFETY: VRuntime::setEngineHostCodeAllowed(bool).
            unsafe { call!(lib, runtime, runtime_slot::SET_ENGINE_HOST_CODE_ALLOWED, fn(bool) -> (), true) }?;
        }
        let mark = crate::log::TENSORRT.mark();
        let bytes = plan.plan();
        let (made, peak) = with_memory_peak(|| {
            // SAFETY: VRuntime::deserializeCudaEngine(const void*, uint64_t); the mapping outlives the call and TensorRT keeps no pointer into it.
            unsafe {
                call!(
                    lib,
                    runtime,
                    runtime_slot::DESERIALIZE_CUDA_ENGINE,
                    fn(*const c_void, u64) -> *mut c_void,
                    bytes.as_ptr().cast(),
                    bytes.len() as u64
                )
            }
        });
        report.peak_host_bytes = peak;
        let lines = crate::log::TENSORRT.since(mark);
        let object = Object::new(made?).ok_or_else(|| not_deserialised(plan, lib, device, lines.clone()))?;
        report.warnings = lines;
        match request.refit {
            Some(onnx) => refit(lib, &object, onnx).map_err(|e| e.context(plan.path.display()))?,
            None => match stripped(lib, &object)? {
                0 => {}
                bytes if request.verify => return Err(without_weights(plan, bytes)),
                bytes => report.warnings.push(without_weights(plan, bytes).message().to_owned()),
            },
        }
        if let Some(bytes) = request.weight_streaming_budget {
            stream_weights(lib, &object, bytes).map_err(|e| e.context(plan.path.display()))?;
        }
        let mut engine = Engine {
            handle: Mutex::new(None),
            label: plan.path.display().to_string(),
            lib,
            device,
            name: String::new(),
            io: Vec::new(),
            profiles: 0,
            device_memory: 0,
            aux_streams: 0,
            layers: 0,
        };
        let handle = Handle {
            engine: object,
            _runtime: runtime,
        };
        engine.read_tables(&handle.engine).map_err(|e| e.context(plan.path.display()))?;
        engine.handle = Mutex::new(Some(handle));
        report.seconds = start.elapsed().as_secs_f64();
        Ok((engine, report))
    }

    fn read_tables(&mut self, o: &Object) -> Result<()> {
        let lib = self.lib;
        // SAFETY: the signatures are those of VCudaEngine in abi/vtables.csv; a name that TensorRT gives is a NUL-terminated string that lives as long as the engine.
        unsafe {
            self.name = text(call!(lib, o, slot::GET_NAME, fn() -> *const c_char)?);
            self.profiles = call!(lib, o, slot::GET_NB_OPTIMIZATION_PROFILES, fn() -> i32)?.max(0) as usize;
            self.aux_streams = call!(lib, o, slot::GET_NB_AUX_STREAMS, fn() -> i32)?;
            self.layers = call!(lib, o, slot::GET_NB_LAYERS, fn() -> i32)?;
            self.device_memory = if lib.has(&slot::GET_DEVICE_MEMORY_SIZE_V2) {
                call!(lib, o, slot::GET_DEVICE_MEMORY_SIZE_V2, fn() -> i64)?.max(0) as u64
            } else {
                call!(lib, o, slot::GET_DEVICE_MEMORY_SIZE, fn() -> u64)?
            };
            let n = call!(lib, o, slot::GET_NB_IO_TENSORS, fn() -> i32)?;
            let mut io = Vec::new();
            for i in 0..n {
                let name = call!(lib, o, slot::GET_IO_TENSOR_NAME, fn(i32) -> *const c_char, i)?;
                if name.is_null() {
                    return Err(Error::new(
                        Kind::Deserialize,
                        format!("TensorRT gives no name for tensor {i} of {n}"),
                    ));
                }
                io.push(self.read_tensor(o, CStr::from_ptr(name).to_owned())?);
            }
            self.io = io;
        }
        Ok(())
    }

    fn read_tensor(&self, o: &Object, c_name: CString) -> Result<IoTensor> {
        let lib = self.lib;
        let p = c_name.as_ptr();
        let name = c_name.to_string_lossy().into_owned();
        let unreadable = |what: &str| Error::new(Kind::Deserialize, format!("tensor '{name}': TensorRT {} gives {what}", lib.version));
        // SAFETY: as in `read_tables`; `p` lives during each call; Dims come back by value (sret), as `extern "C"` passes them.
        unsafe {
            let code = call!(lib, o, slot::GET_TENSOR_DATA_TYPE, fn(*const c_char) -> i32, p)?;
            let dtype = DType::from_trt(code).ok_or_else(|| unreadable(&format!("data type {code}, which jetrt does not know")))?;
            let shape = call!(lib, o, slot::GET_TENSOR_SHAPE, fn(*const c_char) -> RawDims, p)?;
            let shape = shape.dims().ok_or_else(|| unreadable(&format!("rank {}", shape.rank)))?;
            let mode = call!(lib, o, slot::GET_TENSOR_IO_MODE, fn(*const c_char) -> i32, p)?;
            if mode != tensor_io_mode::INPUT && mode != tensor_io_mode::OUTPUT {
                return Err(unreadable(&format!("I/O mode {mode}")));
            }
            let input = mode == tensor_io_mode::INPUT;
            let host = call!(lib, o, slot::GET_TENSOR_LOCATION, fn(*const c_char) -> i32, p)? == tensor_location::HOST;
            let format = call!(lib, o, slot::GET_TENSOR_FORMAT, fn(*const c_char) -> i32, p)?;
            let description = text(call!(lib, o, slot::GET_TENSOR_FORMAT_DESC, fn(*const c_char) -> *const c_char, p)?);
            let mut profiles = Vec::new();
            for profile in 0..if input { self.profiles } else { 0 } {
                let get = |which: i32| -> Result<Dims> {
                    let d = call!(
                        lib,
                        o,
                        slot::GET_PROFILE_SHAPE,
                        fn(*const c_char, i32, i32) -> RawDims,
                        p,
                        profile as i32,
                        which
                    )?;
                    d.dims().ok_or_else(|| unreadable(&format!("no shape for profile {profile}")))
                };
                profiles.push(Range {
                    min: get(opt_profile_selector::MIN)?,
                    opt: get(opt_profile_selector::OPT)?,
                    max: get(opt_profile_selector::MAX)?,
                });
            }
            Ok(IoTensor {
                name,
                c_name: c_name.clone(),
                input,
                dtype,
                shape,
                host,
                linear: format == abi::tensor_format::LINEAR,
                format: description,
                profiles,
            })
        }
    }

    /// A new execution context; with `own_memory` false its scratch memory is set later, by the user's.
    pub fn create_context(self: &Arc<Self>, own_memory: bool) -> Result<Context> {
        let strategy = if own_memory {
            allocation_strategy::STATIC
        } else {
            allocation_strategy::USER_MANAGED
        };
        let mark = crate::log::TENSORRT.mark();
        let _entered = self.device.enter()?;
        // SAFETY: VCudaEngine::createExecutionContext(ExecutionContextAllocationStrategy), an int enum.
        let made = self
            .with_handle(|engine| unsafe { call!(self.lib, engine, slot::CREATE_EXECUTION_CONTEXT, fn(i32) -> *mut c_void, strategy) })?;
        let object = Object::new(made).ok_or_else(|| {
            let what = format!("{}: TensorRT could not create an execution context", self.label);
            self.failed(Error::new(Kind::Inference, what), mark)
        })?;
        Context::new(object, Arc::clone(self))
    }

    /// Does something with TensorRT's engine while it is sure to be there.
    pub(super) fn with_handle<T>(&self, work: impl FnOnce(&Object) -> Result<T>) -> Result<T> {
        let handle = self.handle.lock().unwrap_or_else(|e| e.into_inner());
        match &*handle {
            Some(handle) => work(&handle.engine),
            None => Err(Error::new(Kind::Closed, format!("{}: this engine is closed", self.label)).with("engine", self.label.clone())),
        }
    }

    /// Frees TensorRT's engine. Every context must be gone: they are destroyed before their engine.
    pub fn release(&self) {
        let handle = self.handle.lock().unwrap_or_else(|e| e.into_inner()).take();
        let _entered = self.device.enter_anyway();
        drop(handle);
    }

    /// An error with TensorRT's lines since the mark. A failed allocation is reported only there: then it is the typed one.
    pub(super) fn failed(&self, e: Error, mark: u64) -> Error {
        let lines = crate::log::TENSORRT.since(mark);
        if !lines.iter().any(|l| is_out_of_memory(l)) {
            return e.with_log(lines);
        }
        let what = format!("{} for lack of memory ({} bytes of scratch space)", e.message(), self.device_memory);
        out_of_memory(self.device, &what, self.device_memory).with_log(lines)
    }
}

/// Bytes of weights that a plan was built without; 0 where this version cannot tell (before 10.14).
fn stripped(lib: &Library, engine: &Object) -> Result<i64> {
    if !lib.has(&slot::GET_ENGINE_STAT) {
        return Ok(0);
    }
    // SAFETY: VCudaEngine::getEngineStat(EngineStat).
    unsafe {
        call!(
            lib,
            engine,
            slot::GET_ENGINE_STAT,
            fn(i32) -> i64,
            abi::engine_stat::STRIPPED_WEIGHTS_SIZE
        )
    }
    .map(|bytes| bytes.max(0))
}

fn without_weights(plan: &PlanFile, bytes: i64) -> Error {
    let path = plan.path.display();
    Error::new(
        Kind::Plan,
        format!("{path}: this plan was built without {bytes} bytes of weights (kSTRIP_PLAN) and computes nonsense until it is refitted. Load it with its model: refit=\"model.onnx\"."),
    )
    .with("path", path.to_string())
    .with("found", "a stripped plan")
    .with("allowed", "refit=\"model.onnx\"")
}

fn refit(lib: &'static Library, engine: &Object, onnx: &Path) -> Result<()> {
    let problems = super::build::refit(lib, **engine, onnx)?;
    if problems.is_empty() {
        return Ok(());
    }
    let reasons: Vec<String> = problems
        .iter()
        .map(|p| format!("node {} {} ({}): {}", p.node, p.name, p.operator, p.reason))
        .collect();
    Err(Error::new(
        Kind::Deserialize,
        format!("the plan could not be refitted from {}: {}", onnx.display(), reasons.join("; ")),
    )
    .with("path", onnx.display().to_string())
    .with("log", reasons))
}

fn stream_weights(lib: &Library, engine: &Object, bytes: i64) -> Result<()> {
    let mark = crate::log::TENSORRT.mark();
    // SAFETY: VCudaEngine::setWeightStreamingBudgetV2(int64_t) and getStreamableWeightsSize().
    let (ok, all) = unsafe {
        (
            call!(lib, engine, slot::SET_WEIGHT_STREAMING_BUDGET_V2, fn(i64) -> bool, bytes)?,
            call!(lib, engine, slot::GET_STREAMABLE_WEIGHTS_SIZE, fn() -> i64)?,
        )
    };
    if ok {
        return Ok(());
    }
    Err(Error::new(
        Kind::Argument,
        format!("weight_streaming_budget={bytes}: allowed: 0 to {all} bytes, and only for a plan that was built with weight streaming"),
    )
    .with_log(crate::log::TENSORRT.since(mark)))
}

fn is_out_of_memory(line: &str) -> bool {
    line.contains("out of memory") || line.contains("OutOfMemory") || line.contains("could not be allocated")
}

fn out_of_memory(device: &Device, what: &str, requested: u64) -> Error {
    let (free, total) = device.memory().unwrap_or((0, 0));
    Error::new(
        Kind::OutOfMemory,
        format!(
            "{what}: {free} bytes free of {total} on cuda:{}. Free device memory or use fewer contexts.",
            device.ordinal
        ),
    )
    .with("requested", requested)
    .with("free", free)
    .with("total", total)
}

fn check_version(lib: &Library, plan: &PlanFile) -> Result<()> {
    let (p, l) = (plan.header.version, lib.version);
    let same = u32::from(p.major) == l.major && u32::from(p.minor) == l.minor && u32::from(p.patch) == l.patch;
    // A version-compatible plan may be older than the library; only TensorRT can tell. A newer plan never loads.
    let newer = (u32::from(p.major), u32::from(p.minor), u32::from(p.patch)) > (l.major, l.minor, l.patch);
    if same || !newer {
        return Ok(());
    }
    Err(version_error(plan, lib, Vec::new()))
}

fn version_error(plan: &PlanFile, lib: &Library, lines: Vec<String>) -> Error {
    Error::new(
        Kind::Plan,
        format!(
            "{}: this plan was built by TensorRT {}, and {} is TensorRT {}. A plan runs only on the version that built it: build it again here (jetrt build --onnx … --engine …) or \
             point JETRT_TENSORRT_PATH at TensorRT {}.{}.",
            plan.path.display(),
            plan.header.version,
            lib.path.display(),
            lib.version,
            plan.header.version.major,
            plan.header.version.minor,
        ),
    )
    .with("path", plan.path.display().to_string())
    .with("found", plan.header.version.to_string())
    .with("allowed", lib.version.to_string())
    .with_log(lines)
}

#[cold]
fn not_deserialised(plan: &PlanFile, lib: &Library, device: &Device, lines: Vec<String>) -> Error {
    let says = |s: &str| lines.iter().any(|l| l.contains(s));
    let path = plan.path.display();
    if says("not compatible with this version of TensorRT") || says("incompatible serialization version") {
        return version_error(plan, lib, lines);
    }
    let what = format!(
        "{path}: TensorRT {} could not deserialise this plan (built by TensorRT {})",
        lib.version, plan.header.version
    );
    if lines.iter().any(|l| is_out_of_memory(l)) {
        return out_of_memory(device, &format!("{what} for lack of memory"), plan.plan().len() as u64)
            .with("path", path.to_string())
            .with_log(lines);
    }
    let next = if says("getEngineHostCodeAllowed") {
        "The plan carries host code (a version-compatible plan does), which would run in this process: load it with allow_host_code=True only if you trust where it comes from."
    } else if says("incompatible device") || says("expecting compute") || says("Target GPU SM") {
        "The plan was built for another GPU: build it again on this one."
    } else if says("Platform specific tag mismatch") {
        "The plan was built on another platform (x86-64 against aarch64): build it again here."
    } else if says("plugin") || says("Plugin") {
        "It needs a plugin library: pass plugins=[\"…\"]."
    } else {
        "The file is damaged, or TensorRT's log lines below say why."
    };
    Error::new(Kind::Deserialize, format!("{what}. {next}"))
        .with("path", path.to_string())
        .with_log(lines)
}

/// Runs `work` and samples how much unreclaimable memory the process has above its start.
fn with_memory_peak<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = unreclaimable();
    let (stop, peak) = (AtomicBool::new(false), AtomicU64::new(before));
    let out = std::thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                peak.fetch_max(unreclaimable(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let out = work();
        stop.store(true, Ordering::Relaxed);
        out
    });
    peak.fetch_max(unreclaimable(), Ordering::Relaxed);
    (out, peak.load(Ordering::Relaxed).saturating_sub(before))
}

/// Anonymous and shared resident bytes; 0 where /proc does not tell (then the report says 0, not a guess).
fn unreclaimable() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| -> u64 {
        status
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .and_then(|v| v.trim().trim_end_matches("kB").trim().parse().ok())
            .unwrap_or(0)
            * 1024
    };
    field("RssAnon:") + field("RssShmem:")
}
