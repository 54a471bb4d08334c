//! `jetrt.Engine`: loading, properties, `run`, `prepare`, `close`. What a call does is in `call`.

use super::call::{called, locked, Arguments, Held, Keywords, Read};
use super::convert::{metadata, one_of, ordinal, pip_folders, seconds, shape};
use super::info::machine;
use super::logging::drain;
use super::tables::{DeviceMemory, TensorInfo};
use super::tensor::Tensor;
use crate::cuda::{Device, Relaxed};
use crate::dlpack::vectorcall::callable_type;
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::exec::{
    Call, DeviceTensor, Executor, GraphMode, HostMode, OnDtype, OnStrided, Options, OutputMode, Outputs, Policy, ProfileChoice,
};
use crate::shape::Dims;
use crate::tensor::OwnedTensor;
use crate::trt::plan::PlanFile;
use crate::trt::{library, LayerTime, Library, LoadReport, Loading};
use pyo3::exceptions::{PyKeyError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyMapping, PySequence, PyString};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// Every executor of this process, for closing at exit.
static ALL: Mutex<Vec<Weak<Executor>>> = Mutex::new(Vec::new());

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = m.py();
    m.add_class::<TensorInfo>()?;
    m.add_class::<DeviceMemory>()?;
    let base = py.get_type::<EngineBase>();
    m.add("_EngineBase", &base)?;
    m.add("Engine", callable_type(py, c"jetrt._core.Engine", DOC, &base, called)?)?;
    m.add_function(wrap_pyfunction!(close_all, m)?)?;
    // Engines that are still alive at exit are closed while the driver and TensorRT still work.
    py.import("atexit")?.call_method1("register", (m.getattr("_close_all")?,))?;
    Ok(())
}

#[pyfunction]
#[pyo3(name = "_close_all")]
fn close_all(py: Python<'_>) {
    let all = std::mem::take(&mut *locked(&ALL));
    py.detach(|| {
        for executor in all.iter().filter_map(Weak::upgrade) {
            executor.close();
        }
    });
}

const DOC: &std::ffi::CStr = c"Engine(path, *, device=0, graphs='auto', outputs='pooled', on_strided='error', on_dtype='error', host='auto', profile='auto', max_contexts=1, timeout=None, plugins=(), allow_host_code=False, verify='auto', warmup=2, graph_bytes=268435456, device_memory=None, refit=None, weight_streaming_budget=None)
--

A TensorRT engine, loaded from a plan file and ready to be called.

    engine = jetrt.Engine(\"model.engine\")
    out = engine(x=array)        # by name, or positionally in engine order

Inputs: torch, numpy, CuPy and JAX arrays, anything with __dlpack__ or __cuda_array_interface__. Name, dtype, rank, every
dimension (against the optimisation profile), device, alignment (256 bytes) and contiguity are checked before TensorRT
sees them; nothing is converted or copied unless a policy says so. Returns a dict name -> tensor in the library and on the
device of the first input.

Options of a call (unless an input has that name): stream (a stream object of torch, CuPy or cuda.core, or an int
handle, whose stream must then outlive the engine; default: the current stream of the inputs' library), out (a mapping name -> tensor to write into),
synchronize (wait for the result), timeout (seconds to wait for a free execution context).

Options of the constructor:
  device           GPU ordinal
  graphs           'auto': CUDA graphs are captured when a call repeats; 'off'; 'require': never eager
  outputs          'pooled': buffers are reused when no result holds them; 'fresh': new memory for each result
  on_strided       'error', or 'copy': pack such inputs by one kernel (counted in stats)
  on_dtype         'error', or 'cast': convert inputs by one kernel (counted in stats)
  host             arrays in host memory: 'auto' (staged; in place on an integrated GPU when page-locked), 'mapped' (in
                   place, page-locked only), 'staged', 'error'
  profile          'auto' (the first that fits), or a number
  max_contexts     execution contexts, for callers in several threads; each takes device_memory_size bytes
  timeout          seconds that a caller waits for a free context; None: for ever
  plugins          plugin libraries to load, besides libnvinfer_plugin beside TensorRT
  allow_host_code  load a plan that carries host code: it runs in this process
  verify           'auto': the .sha256 file and the manifest (.json) beside the plan, where there are any, must fit the plan and this
                   machine; 'off': loads anyway, and what does not fit becomes a warning
  warmup           eager calls of one shape and address set before its graph is captured
  graph_bytes      device memory that captured graphs may take, least recently used ones first to go
  device_memory    a DeviceMemory for the context's scratch space, shared by engines that never run at the same time
  refit            the ONNX file that a stripped plan gets its weights from
  weight_streaming_budget  bytes of weights that stay on the GPU, for a plan that was built with weight streaming

Raises PlanError (not a plan, damaged, another version), EngineDeserializeError, LibraryNotFoundError,
UnsupportedVersionError, OutOfMemoryError, OSError. Calls raise the subclasses of InputError, ContextTimeoutError,
ClosedEngineError, GraphCaptureError, InferenceError, CudaError, OutOfMemoryError.";

/// The state behind `jetrt.Engine`, which adds the vectorcall slot.
#[pyclass(module = "jetrt._core", name = "_EngineBase", subclass, frozen)]
pub struct EngineBase {
    pub(super) executor: Arc<Executor>,
    path: PathBuf,
    report: LoadReport,
    metadata: Option<String>,
    pub(super) timeout: Option<Duration>,
    input_names: Vec<Py<PyString>>,
    pub(super) output_names: Vec<Py<PyString>>,
    pub(super) keywords: Mutex<Option<Keywords>>,
    pub(super) held: Mutex<VecDeque<Held>>,
    /// Views of the last call's inputs: in the steady state only their addresses are taken anew.
    pub(super) spare: Mutex<Option<Box<Read>>>,
}

#[pymethods]
impl EngineBase {
    #[new]
    #[pyo3(signature = (path, *, device = None, graphs = "auto", outputs = "pooled", on_strided = "error", on_dtype = "error", host = "auto", profile = None,
        max_contexts = 1, timeout = None, plugins = Vec::new(), allow_host_code = false, verify = "auto", warmup = 2, graph_bytes = 256 << 20, device_memory = None,
        refit = None, weight_streaming_budget = None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        device: Option<&Bound<'_, PyAny>>,
        graphs: &str,
        outputs: &str,
        on_strided: &str,
        on_dtype: &str,
        host: &str,
        profile: Option<&Bound<'_, PyAny>>,
        max_contexts: i64,
        timeout: Option<f64>,
        plugins: Vec<PathBuf>,
        allow_host_code: bool,
        verify: &str,
        warmup: u32,
        graph_bytes: u64,
        device_memory: Option<&Bound<'_, DeviceMemory>>,
        refit: Option<PathBuf>,
        weight_streaming_budget: Option<i64>,
    ) -> PyResult<EngineBase> {
        let device = device.map(ordinal).transpose()?.unwrap_or(0);
        let policy = Policy {
            strided: one_of("on_strided", on_strided, &[("error", OnStrided::Error), ("copy", OnStrided::Copy)])?,
            dtype: one_of("on_dtype", on_dtype, &[("error", OnDtype::Error), ("cast", OnDtype::Cast)])?,
            host: one_of(
                "host",
                host,
                &[
                    ("auto", HostMode::Auto),
                    ("mapped", HostMode::Mapped),
                    ("staged", HostMode::Staged),
                    ("error", HostMode::Error),
                ],
            )?,
        };
        let profile = match profile {
            None => ProfileChoice::Auto,
            Some(p) => match p.extract::<usize>() {
                Ok(n) => ProfileChoice::Fixed(n),
                Err(_) => one_of("profile", &p.str()?.to_string(), &[("auto", ProfileChoice::Auto)])?,
            },
        };
        if max_contexts < 1 {
            return Err(PyValueError::new_err(format!(
                "max_contexts: found {max_contexts}; allowed: 1 or more"
            )));
        }
        let memory = device_memory.map(|m| Arc::clone(&m.get().memory));
        if let Some(m) = device_memory {
            if m.get().device != device {
                return Err(PyValueError::new_err(format!(
                    "device_memory lies on cuda:{} and the engine goes to cuda:{device}",
                    m.get().device
                )));
            }
            if max_contexts != 1 {
                return Err(PyValueError::new_err(
                    "device_memory is the scratch space of one context: max_contexts must be 1",
                ));
            }
        }
        let options = Options {
            policy,
            graphs: one_of(
                "graphs",
                graphs,
                &[("auto", GraphMode::Auto), ("off", GraphMode::Off), ("require", GraphMode::Require)],
            )?,
            warmup,
            graph_bytes,
            outputs: one_of("outputs", outputs, &[("pooled", OutputMode::Pooled), ("fresh", OutputMode::Fresh)])?,
            profile,
            max_contexts: max_contexts as usize,
            memory,
            legacy_direct: std::env::var_os("JETRT_LEGACY_DIRECT").is_some_and(|v| v == "1"),
        };
        let verify = one_of("verify", verify, &[("auto", true), ("off", false)])?;
        let timeout = timeout.map(seconds).transpose()?;
        let folders = pip_folders(py);
        // The file first: what is wrong with it can be said without a GPU.
        let plan = py.detach(|| PlanFile::open(&path))?;
        let (gpu, lib) = py.detach(|| -> Result<(&'static Device, &'static Library)> {
            // A capture that another thread runs must not mind.
            let _relaxed = Relaxed::enter();
            Ok((Device::get(device)?, library(&folders, Some(plan.header.version))?))
        })?;
        let warnings = check_manifest(py, &plan, machine(py, gpu, lib)?, verify, refit.as_deref())?;
        let loaded = py.detach(|| -> Result<(Arc<Executor>, LoadReport, Option<String>)> {
            let _relaxed = Relaxed::enter();
            lib.load_plugins(&plugins)?;
            let (engine, mut report) = crate::trt::Engine::load(
                lib,
                gpu,
                &Loading {
                    plan: &plan,
                    allow_host_code,
                    verify,
                    refit: refit.as_deref(),
                    weight_streaming_budget,
                },
            )?;
            report.warnings.splice(0..0, warnings);
            let metadata = plan.header.metadata.clone();
            // The mapping goes before the contexts come: their memory should find room.
            drop(plan);
            Ok((Executor::new(engine, options)?, report, metadata))
        });
        drain(py);
        let (executor, report, metadata) = loaded?;
        let mut all = locked(&ALL);
        all.retain(|w| w.strong_count() > 0);
        all.push(Arc::downgrade(&executor));
        drop(all);
        let names = |which: &[usize]| {
            which
                .iter()
                .map(|&i| PyString::intern(py, &executor.engine.io[i].name).unbind())
                .collect()
        };
        Ok(EngineBase {
            input_names: names(&executor.inputs),
            output_names: names(&executor.outputs),
            path,
            report,
            metadata,
            timeout,
            keywords: Mutex::new(None),
            held: Mutex::new(VecDeque::new()),
            spare: Mutex::new(None),
            executor,
        })
    }

    /// The same as calling the engine, with the inputs as one mapping (name -> array) or sequence (in engine order).
    #[pyo3(signature = (inputs, *, stream = None, out = None, synchronize = false, timeout = None))]
    fn run<'py>(
        &self,
        py: Python<'py>,
        inputs: &Bound<'py, PyAny>,
        stream: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
        synchronize: bool,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let objects = self.inputs_of(inputs)?;
        let a = Arguments {
            inputs: objects.iter().map(|o| o.as_ref().map(Bound::as_borrowed)).collect(),
            stream: stream.map(Bound::as_borrowed),
            out: out.map(Bound::as_borrowed),
            synchronize,
            timeout: timeout.map(seconds).transpose()?.or(self.timeout),
        };
        self.run_sorted(py, &a)
    }

    /// Does beforehand what a live call must not wait for: resolves shapes, warms up, captures the graphs and compares each
    /// with an eager run.
    ///
    /// shapes: a list of mappings input name -> shape; input tensors of these shapes are made (zeros), and calls with them
    /// replay. inputs: a list of mappings input name -> array, the very arrays that live calls will pass. stream: as in a call.
    /// Returns a list of dicts: profile, outputs (name -> shape), graph (bool), reason (why eager, or None), inputs (name -> tensor).
    #[pyo3(signature = (shapes = None, *, inputs = None, stream = None))]
    fn prepare<'py>(
        &self,
        py: Python<'py>,
        shapes: Option<&Bound<'py, PyAny>>,
        inputs: Option<&Bound<'py, PyAny>>,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyList>> {
        let reports = PyList::empty(py);
        let mut sets: Vec<Vec<Option<Bound<'py, PyAny>>>> = Vec::new();
        for set in shapes.map(|s| s.try_iter()).transpose()?.into_iter().flatten() {
            sets.push(self.zeros(py, &set?)?);
        }
        for set in inputs.map(|s| s.try_iter()).transpose()?.into_iter().flatten() {
            sets.push(self.inputs_of(&set?)?);
        }
        for set in sets {
            let a = self.arguments(&set, stream)?;
            let read = self.read_inputs(py, &a)?;
            let call = Call {
                inputs: &read.views,
                stream: read.stream,
                outputs: Outputs::Engine,
                to_host: read.to_host,
                synchronize: false,
                timeout: a.timeout,
                want_done: false,
            };
            let prepared = py.detach(|| self.executor.prepare(&call));
            drain(py);
            let prepared = prepared?;
            let report = PyDict::new(py);
            report.set_item("profile", prepared.profile)?;
            let outputs = PyDict::new(py);
            for (name, dims) in &prepared.outputs {
                outputs.set_item(name, shape(py, dims)?)?;
            }
            report.set_item("outputs", outputs)?;
            report.set_item("graph", prepared.eager_because.is_none())?;
            report.set_item("reason", prepared.eager_because)?;
            let tensors = PyDict::new(py);
            for (name, obj) in self.input_names.iter().zip(&set) {
                tensors.set_item(name.bind(py), obj)?;
            }
            report.set_item("inputs", tensors)?;
            reports.append(report)?;
        }
        Ok(reports)
    }

    /// The inputs by name, in engine order.
    #[getter]
    fn inputs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.table(py, &self.executor.inputs)
    }

    /// The outputs by name, in engine order.
    #[getter]
    fn outputs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.table(py, &self.executor.outputs)
    }

    /// The engine's name, as its builder gave it.
    #[getter]
    fn name(&self) -> &str {
        &self.executor.engine.name
    }

    /// The plan's path, as it was given.
    #[getter]
    fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// Ordinal of the GPU.
    #[getter(device)]
    fn device_ordinal(&self) -> i32 {
        self.device()
    }

    #[getter]
    fn closed(&self) -> bool {
        self.executor.is_closed()
    }

    /// Number of optimisation profiles.
    #[getter]
    fn num_profiles(&self) -> usize {
        self.executor.engine.profiles
    }

    /// The library's version, such as "10.6.0.26".
    #[getter]
    fn tensorrt_version(&self) -> String {
        self.executor.engine.lib.version.to_string()
    }

    /// Device memory of one execution context, in bytes.
    #[getter]
    fn device_memory_size(&self) -> u64 {
        self.executor.engine.device_memory
    }

    /// What loading took: seconds, bytes (of the plan), peak_host_bytes (host memory above the start that the kernel could not
    /// reclaim, sampled), sha256_verified, warnings (TensorRT's lines), tensorrt, library, found_by.
    #[getter]
    fn load_report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (d, r) = (PyDict::new(py), &self.report);
        d.set_item("seconds", r.seconds)?;
        d.set_item("bytes", r.plan_bytes)?;
        d.set_item("peak_host_bytes", r.peak_host_bytes)?;
        d.set_item("sha256_verified", r.sha256_verified)?;
        d.set_item("warnings", &r.warnings)?;
        d.set_item("tensorrt", &r.tensorrt)?;
        d.set_item("library", &r.library)?;
        d.set_item("found_by", self.executor.engine.lib.found_by)?;
        Ok(d)
    }

    /// Counters since loading (calls, eager, replays, copies, casts, bytes copied, waits, allocations …), graphs (number, bytes,
    /// thrashing) and graph_failures (shapes -> why they are not replayed).
    #[getter]
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let d = PyDict::new(py);
        for (name, value) in self.executor.stats.counters() {
            d.set_item(name, value)?;
        }
        let (n, bytes, thrashing) = self.executor.graph_counts();
        d.set_item("graphs", n)?;
        d.set_item("graph_bytes", bytes)?;
        d.set_item("graphs_thrashing", thrashing)?;
        let failures = PyDict::new(py);
        for (shapes, why) in locked(&self.executor.stats.graph_failures).iter() {
            failures.set_item(shapes, why)?;
        }
        d.set_item("graph_failures", failures)?;
        Ok(d)
    }

    /// TensorRT's JSON about the plan's layers. shapes: a mapping input name -> shape in that profile, to see the layers as they are
    /// for these. A plan says as much as its profiling verbosity allowed when it was built.
    #[pyo3(signature = (shapes = None, *, profile = 0))]
    fn inspect(&self, py: Python<'_>, shapes: Option<&Bound<'_, PyAny>>, profile: usize) -> PyResult<String> {
        let mut dims = vec![None; self.executor.inputs.len()];
        if let Some(shapes) = shapes {
            for (k, shape) in self.inputs_of(shapes)?.iter().enumerate() {
                let io = self.input(k);
                let Some(shape) = shape else { continue };
                let given: Vec<i64> = shape.extract()?;
                if !io.host {
                    dims[k] = Dims::new(&given).filter(Dims::is_static);
                }
            }
        }
        let for_shapes = shapes.is_some();
        let out = py.detach(|| self.executor.inspect(for_shapes.then_some(&dims[..]), profile));
        drain(py);
        Ok(out?)
    }

    /// Runs the engine eagerly and measures each layer (TensorRT's profiler). inputs, stream: as in `run`. Needs graphs="off".
    /// Returns a list with one list of (layer name, milliseconds) for each run.
    #[pyo3(signature = (inputs, *, runs = 10, stream = None))]
    fn layer_times(
        &self,
        py: Python<'_>,
        inputs: &Bound<'_, PyAny>,
        runs: usize,
        stream: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Vec<(String, f32)>>> {
        let objects = self.inputs_of(inputs)?;
        let a = self.arguments(&objects, stream)?;
        let read = self.read_inputs(py, &a)?;
        let call = Call {
            inputs: &read.views,
            stream: read.stream,
            outputs: Outputs::Engine,
            to_host: read.to_host,
            synchronize: true,
            timeout: a.timeout,
            want_done: false,
        };
        let times = py.detach(|| self.executor.layer_times(&call, runs));
        drain(py);
        let plain = |run: Vec<LayerTime>| run.into_iter().map(|t| (t.name, t.ms)).collect();
        Ok(times?.into_iter().map(plain).collect())
    }

    /// The JSON that Ultralytics writes before a plan, or None.
    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        metadata(py, self.metadata.as_deref())
    }

    /// Waits for the engine's work and frees everything but the results that are still held. Safe to call again. A graph of
    /// `jetrt.graph` that launches this engine raises ClosedEngineError from then on.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.executor.check_own_launch()?;
        py.detach(|| self.executor.close());
        let held = std::mem::take(&mut *locked(&self.held));
        drop(held);
        drain(py);
        Ok(())
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        if slf.get().executor.is_closed() {
            return Err(slf.get().executor.closed_error().into());
        }
        Ok(slf.clone())
    }

    #[pyo3(signature = (exc_type, exc, traceback))]
    fn __exit__(&self, py: Python<'_>, exc_type: &Bound<'_, PyAny>, exc: &Bound<'_, PyAny>, traceback: &Bound<'_, PyAny>) -> PyResult<()> {
        let _ = (exc_type, exc, traceback);
        self.close(py)
    }

    fn __repr__(&self) -> String {
        let list = |which: &[usize]| {
            which
                .iter()
                .map(|&i| format!("{} {}{}", self.io()[i].name, self.io()[i].dtype, self.io()[i].shape))
                .collect::<Vec<_>>()
                .join(", ")
        };
        format!(
            "<jetrt.Engine '{}'{}: {} -> {}; TensorRT {}, cuda:{}, {} profile(s)>",
            self.path.display(),
            if self.executor.is_closed() { " (closed)" } else { "" },
            list(&self.executor.inputs),
            list(&self.executor.outputs),
            self.executor.engine.lib.version,
            self.device(),
            self.executor.engine.profiles,
        )
    }
}

/// What `jetrt.provenance` says about the manifest beside the plan: it raises, or gives warnings. Without one, Python is not asked.
fn check_manifest(
    py: Python<'_>,
    plan: &PlanFile,
    machine: Bound<'_, PyDict>,
    verify: bool,
    refit: Option<&Path>,
) -> PyResult<Vec<String>> {
    let mut manifest = plan.path.as_os_str().to_owned();
    manifest.push(".json");
    if !Path::new(&manifest).exists() {
        return Ok(Vec::new());
    }
    let verify = if verify { "auto" } else { "off" };
    let version = plan.header.version.to_string();
    py.import("jetrt.provenance")?
        .call_method1("check_for_core", (&plan.path, machine, verify, version, refit))?
        .extract()
}

impl EngineBase {
    fn table<'py>(&self, py: Python<'py>, which: &[usize]) -> PyResult<Bound<'py, PyDict>> {
        let d = PyDict::new(py);
        for &i in which {
            d.set_item(&self.io()[i].name, TensorInfo { io: self.io()[i].clone() })?;
        }
        Ok(d)
    }

    /// Inputs in engine order as the arguments of a call; every one must be there.
    fn arguments<'a, 'py>(
        &self,
        objects: &'a [Option<Bound<'py, PyAny>>],
        stream: Option<&'a Bound<'py, PyAny>>,
    ) -> PyResult<Arguments<'a, 'py>> {
        if let Some(k) = objects.iter().position(Option::is_none) {
            return Err(self.missing(k));
        }
        Ok(Arguments {
            inputs: objects.iter().map(|o| o.as_ref().map(Bound::as_borrowed)).collect(),
            stream: stream.map(Bound::as_borrowed),
            timeout: self.timeout,
            ..Arguments::default()
        })
    }

    /// A mapping or sequence of inputs, in engine order.
    fn inputs_of<'py>(&self, inputs: &Bound<'py, PyAny>) -> PyResult<Vec<Option<Bound<'py, PyAny>>>> {
        let n = self.executor.inputs.len();
        let mut objects = vec![None; n];
        if let Ok(mapping) = inputs.cast::<PyMapping>() {
            for key in mapping.keys()?.iter() {
                let name: String = key.extract()?;
                let k = (0..n)
                    .find(|&k| self.input(k).name == name)
                    .ok_or_else(|| self.unknown_input(&name))?;
                objects[k] = Some(mapping.get_item(&key)?);
            }
            return Ok(objects);
        }
        let sequence = inputs
            .cast::<PySequence>()
            .map_err(|_| PyTypeError::new_err("inputs: a mapping from input name to array, or a sequence of arrays in engine order"))?;
        if sequence.len()? != n {
            return Err(Error::input(
                Kind::InputName,
                &format!("#{n}"),
                format!("{} inputs", sequence.len()?),
                format!("{n}"),
                "Pass one array per input.",
            )
            .into());
        }
        for (k, slot) in objects.iter_mut().enumerate() {
            *slot = Some(sequence.get_item(k)?);
        }
        Ok(objects)
    }

    /// Zero-filled inputs of these shapes, owned by whoever holds them.
    fn zeros<'py>(&self, py: Python<'py>, shapes: &Bound<'py, PyAny>) -> PyResult<Vec<Option<Bound<'py, PyAny>>>> {
        let mapping = shapes
            .cast::<PyMapping>()
            .map_err(|_| PyTypeError::new_err("shapes: a list of mappings from input name to shape"))?;
        for key in mapping.keys()?.iter() {
            let name: String = key.extract()?;
            if !(0..self.executor.inputs.len()).any(|k| self.input(k).name == name) {
                return Err(self.unknown_input(&name));
            }
        }
        let mut out = Vec::new();
        for (k, name) in self.input_names.iter().enumerate() {
            let io = self.input(k);
            let dims: Vec<i64> = match mapping.get_item(name.bind(py)) {
                Ok(s) => s.extract()?,
                // A static input needs no word.
                Err(e) if e.is_instance_of::<PyKeyError>(py) && io.shape.is_static() => io.shape.as_slice().to_vec(),
                Err(_) => return Err(self.missing(k)),
            };
            let dims = Dims::new(&dims).filter(Dims::is_static).ok_or_else(|| {
                Error::input(
                    Kind::Shape,
                    &io.name,
                    format!("{dims:?}"),
                    "a shape without dynamic dimensions",
                    "Give numbers for all dimensions.",
                )
            })?;
            let tensor = py.detach(|| DeviceTensor::zeros(self.executor.engine.device, io.dtype, dims))?;
            out.push(Some(if io.host {
                self.host_zeros(py, io.dtype, &dims)?
            } else {
                Bound::new(py, Tensor::new(tensor.owned(), None))?.into_any()
            }));
        }
        Ok(out)
    }

    fn host_zeros<'py>(&self, py: Python<'py>, dtype: DType, dims: &Dims) -> PyResult<Bound<'py, PyAny>> {
        py.import("numpy")?.call_method1("zeros", (shape(py, dims)?, dtype.name()))
    }
}

impl DeviceTensor {
    fn owned(self) -> OwnedTensor {
        OwnedTensor {
            view: self.view,
            host_ptr: None,
            owner: Arc::new(self),
        }
    }
}
