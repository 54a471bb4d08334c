//! `jetrt.Engine`: arguments in, one call of the executor, results out.

use super::export::export;
use super::import::{self, Imported, Keep, Library};
use super::info::{metadata, shape};
use super::logging::drain;
use super::tensor::{Ready, Tensor};
use crate::cuda::memory::{device_of, DeviceBuffer};
use crate::cuda::{Device, Event, Stream};
use crate::dlpack::vectorcall::callable_type;
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::exec::{
    record_stream, Call, ContextMemory, DeviceTensor, Executor, GraphMode, HostMode, OnDtype, OnStrided, Options, OutputMode, Outputs,
    Policy, ProfileChoice,
};
use crate::shape::Dims;
use crate::tensor::{OwnedTensor, Place, TensorView};
use crate::trt::plan::PlanFile;
use crate::trt::{library, IoTensor, LoadReport, Loading};
use pyo3::exceptions::{PyKeyError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyMapping, PySequence, PyString, PyTuple};
use pyo3::{intern, Borrowed};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

type Inline<T> = SmallVec<[T; 8]>;

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

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

const DOC: &std::ffi::CStr = c"Engine(path, *, device=0, graphs='auto', outputs='pooled', on_strided='error', on_dtype='error', host='auto', profile='auto', max_contexts=1, timeout=None, plugins=(), allow_host_code=False, verify='auto', warmup=2, graph_bytes=268435456, device_memory=None)
--

A TensorRT engine, loaded from a plan file and ready to be called.

    engine = jetrt.Engine(\"model.engine\")
    out = engine(x=array)        # by name, or positionally in engine order

Inputs: torch, numpy, CuPy and JAX arrays, anything with __dlpack__ or __cuda_array_interface__. Name, dtype, rank, every
dimension (against the optimisation profile), device, alignment (256 bytes) and contiguity are checked before TensorRT
sees them; nothing is converted or copied unless a policy says so. Returns a dict name -> tensor in the library and on the
device of the first input.

Options of a call (unless an input has that name): stream (an int handle, or a stream object of torch, CuPy or
cuda.core; default: the current stream of the inputs' library), out (a mapping name -> tensor to write into),
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
  verify           'auto' checks the .sha256 file beside the plan when there is one; 'off'
  warmup           eager calls of one shape and address set before its graph is captured
  graph_bytes      device memory that captured graphs may take, least recently used ones first to go
  device_memory    a DeviceMemory for the context's scratch space, shared by engines that never run at the same time

Raises PlanError (not a plan, damaged, another version), EngineDeserializeError, LibraryNotFoundError,
UnsupportedVersionError, OutOfMemoryError, OSError. Calls raise the subclasses of InputError, ContextTimeoutError,
ClosedEngineError, GraphCaptureError, InferenceError, CudaError, OutOfMemoryError.";

/// Device memory that the user owns, for the scratch space of contexts.
#[pyclass(module = "jetrt._core", frozen)]
pub struct DeviceMemory {
    memory: Arc<ContextMemory>,
    device: i32,
}

#[pymethods]
impl DeviceMemory {
    #[new]
    #[pyo3(signature = (nbytes, device = 0))]
    fn new(py: Python<'_>, nbytes: u64, device: i32) -> PyResult<DeviceMemory> {
        let buffer = py.detach(|| DeviceBuffer::new(Device::get(device)?, nbytes, "DeviceMemory"))?;
        Ok(DeviceMemory {
            memory: Arc::new(ContextMemory { buffer }),
            device,
        })
    }

    /// Size in bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.memory.buffer.bytes()
    }

    /// Ordinal of the GPU.
    #[getter]
    fn device(&self) -> i32 {
        self.device
    }

    fn __repr__(&self) -> String {
        format!("DeviceMemory({} bytes on cuda:{})", self.nbytes(), self.device)
    }
}

/// One input or output of an engine.
#[pyclass(module = "jetrt._core", frozen)]
pub struct TensorInfo {
    io: IoTensor,
}

#[pymethods]
impl TensorInfo {
    /// The tensor's name in the engine.
    #[getter]
    fn name(&self) -> &str {
        &self.io.name
    }

    /// The element type by name, such as "float32", "bfloat16", "int64", "bool".
    #[getter]
    fn dtype(&self) -> &'static str {
        self.io.dtype.name()
    }

    /// The shape; -1 where a dimension is dynamic.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        shape(py, &self.io.shape)
    }

    /// "input" or "output".
    #[getter]
    fn mode(&self) -> &'static str {
        if self.io.input {
            "input"
        } else {
            "output"
        }
    }

    /// "device", or "host" for a shape tensor.
    #[getter]
    fn location(&self) -> &'static str {
        if self.io.host {
            "host"
        } else {
            "device"
        }
    }

    /// TensorRT's description of the memory layout.
    #[getter]
    fn format(&self) -> &str {
        &self.io.format
    }

    /// The shapes (min, opt, max) of each optimisation profile; empty for an output.
    #[getter]
    fn profiles<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let one = |r: &crate::shape::Range| -> PyResult<Bound<'py, PyTuple>> {
            PyTuple::new(py, [shape(py, &r.min)?, shape(py, &r.opt)?, shape(py, &r.max)?])
        };
        PyList::new(py, self.io.profiles.iter().map(one).collect::<PyResult<Vec<_>>>()?)
    }

    /// The same as `profiles`.
    #[getter]
    fn profile<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        self.profiles(py)
    }

    fn __repr__(&self) -> String {
        let profiles = match self.io.profiles.as_slice() {
            [] => String::new(),
            p => format!(
                ", profiles {}",
                p.iter()
                    .map(|r| format!("{} / {} / {}", r.min, r.opt, r.max))
                    .collect::<Vec<_>>()
                    .join("; ")
            ),
        };
        format!(
            "TensorInfo({} '{}' {}{}{profiles})",
            self.mode(),
            self.io.name,
            self.io.dtype,
            self.io.shape
        )
    }
}

/// The options of a call, besides its inputs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Word {
    Input(usize),
    Stream,
    Out,
    Synchronize,
    Timeout,
}

/// What the keywords of the last call meant: a call site passes the same tuple of names each time.
struct Keywords {
    names: Py<PyTuple>,
    words: Vec<Word>,
}

/// Inputs of other libraries that must live until the GPU has read them.
struct Held {
    until: Event,
    _keep: Vec<Keep>,
    _objects: Vec<Py<PyAny>>,
}

/// The state behind `jetrt.Engine`, which adds the vectorcall slot.
#[pyclass(module = "jetrt._core", name = "_EngineBase", subclass, frozen)]
pub struct EngineBase {
    executor: Arc<Executor>,
    path: PathBuf,
    report: LoadReport,
    metadata: Option<String>,
    timeout: Option<Duration>,
    input_names: Vec<Py<PyString>>,
    output_names: Vec<Py<PyString>>,
    keywords: Mutex<Option<Keywords>>,
    held: Mutex<VecDeque<Held>>,
    /// Views of the last call's inputs: in the steady state only their addresses are taken anew.
    spare: Mutex<Option<Box<Read>>>,
}

fn called<'py>(
    slf: &Bound<'py, PyAny>,
    args: &[Borrowed<'_, 'py, PyAny>],
    kwnames: Option<&Bound<'py, PyTuple>>,
) -> PyResult<Bound<'py, PyAny>> {
    let engine = slf.cast::<EngineBase>()?.get();
    engine.call(slf.py(), args, kwnames).map(Bound::into_any)
}

/// One call's arguments, sorted.
#[derive(Default)]
struct Arguments<'a, 'py> {
    inputs: Inline<Option<Borrowed<'a, 'py, PyAny>>>,
    stream: Option<Borrowed<'a, 'py, PyAny>>,
    out: Option<Borrowed<'a, 'py, PyAny>>,
    synchronize: bool,
    timeout: Option<Duration>,
}

/// The stream of a call, and which library's inputs it came from.
struct CallStream {
    handle: Option<u64>,
    /// Current streams of the other libraries among the inputs: the work goes behind those too.
    others: Inline<u64>,
    /// Is an input torch's?
    has_torch: bool,
}

impl EngineBase {
    fn io(&self) -> &[IoTensor] {
        &self.executor.engine.io
    }

    fn input(&self, k: usize) -> &IoTensor {
        &self.io()[self.executor.inputs[k]]
    }

    fn output(&self, k: usize) -> &IoTensor {
        &self.io()[self.executor.outputs[k]]
    }

    fn device(&self) -> i32 {
        self.executor.engine.device.ordinal
    }

    /// What a keyword means: an input, or an option of the call.
    fn word(&self, name: &str) -> Option<Word> {
        if let Some(k) = (0..self.executor.inputs.len()).find(|&k| self.input(k).name == name) {
            return Some(Word::Input(k));
        }
        Some(match name {
            "stream" => Word::Stream,
            "out" => Word::Out,
            "synchronize" => Word::Synchronize,
            "timeout" => Word::Timeout,
            _ => return None,
        })
    }

    #[cold]
    fn unknown_input(&self, name: &str) -> PyErr {
        let names: Vec<&str> = (0..self.executor.inputs.len()).map(|k| self.input(k).name.as_str()).collect();
        Error::input(
            Kind::InputName,
            name,
            "no input of that name",
            names.join(", "),
            "Check the spelling; engine.inputs lists them.",
        )
        .into()
    }

    #[cold]
    fn words(&self, kwnames: &Bound<'_, PyTuple>) -> PyResult<Vec<Word>> {
        let mut words = Vec::with_capacity(kwnames.len());
        for name in kwnames.iter() {
            let name = name.cast::<PyString>()?.to_str()?.to_owned();
            words.push(self.word(&name).ok_or_else(|| self.unknown_input(&name))?);
        }
        Ok(words)
    }

    fn sort<'a, 'py>(
        &self,
        py: Python<'py>,
        args: &'a [Borrowed<'a, 'py, PyAny>],
        kwnames: Option<&Bound<'py, PyTuple>>,
    ) -> PyResult<Arguments<'a, 'py>> {
        let n = self.executor.inputs.len();
        let mut sorted = Arguments {
            inputs: SmallVec::from_elem(None, n),
            timeout: self.timeout,
            ..Arguments::default()
        };
        let positional = args.len() - kwnames.map_or(0, |k| k.len());
        if positional > n {
            return Err(Error::input(
                Kind::InputName,
                &format!("#{n}"),
                format!("{positional} positional inputs"),
                format!(
                    "{n}: {}",
                    (0..n).map(|k| self.input(k).name.as_str()).collect::<Vec<_>>().join(", ")
                ),
                "Pass one array per input, in this order or by name.",
            )
            .into());
        }
        for (slot, value) in sorted.inputs.iter_mut().zip(&args[..positional]) {
            *slot = Some(*value);
        }
        if let Some(kwnames) = kwnames {
            let mut cache = locked(&self.keywords);
            let words = match &*cache {
                Some(k) if k.names.is(kwnames) => &k.words,
                _ => {
                    let words = self.words(kwnames)?;
                    &cache
                        .insert(Keywords {
                            names: kwnames.clone().unbind(),
                            words,
                        })
                        .words
                }
            };
            let mut options: Inline<(Word, Borrowed<'a, 'py, PyAny>)> = SmallVec::new();
            for (word, value) in words.iter().zip(&args[positional..]) {
                match *word {
                    Word::Input(k) if sorted.inputs[k].is_some() => {
                        let name = &self.input(k).name;
                        return Err(Error::input(
                            Kind::InputName,
                            name,
                            "the input twice (by position and by name)",
                            "once",
                            "Remove one of the two.",
                        )
                        .into());
                    }
                    Word::Input(k) => sorted.inputs[k] = Some(*value),
                    other => options.push((other, *value)),
                }
            }
            // Options may run Python code, which may call this engine again.
            drop(cache);
            for (word, value) in options {
                sorted.option(py, word, value)?;
            }
        }
        Ok(sorted)
    }

    fn missing(&self, k: usize) -> PyErr {
        let io = self.input(k);
        let names: Vec<&str> = (0..self.executor.inputs.len()).map(|k| self.input(k).name.as_str()).collect();
        Error::input(
            Kind::InputName,
            &io.name,
            "nothing (the input is missing)",
            format!("{}{}", io.dtype, io.shape),
            &format!("Pass all of: {}.", names.join(", ")),
        )
        .into()
    }

    /// Which stream the work is ordered on: the one named, else the current one of the inputs' library.
    fn choose_stream(&self, py: Python<'_>, a: &Arguments<'_, '_>) -> PyResult<CallStream> {
        let mut chosen = CallStream {
            handle: None,
            others: SmallVec::new(),
            has_torch: false,
        };
        if let Some(s) = a.stream {
            let handle = stream_handle(&s)?;
            self.executor.keep_stream(handle, || Box::new(Bound::clone(&s).unbind()));
            chosen.handle = Some(handle);
        }
        let mut has_cupy = false;
        for obj in a.inputs.iter().flatten() {
            let library = import::library_of(obj);
            let asked = match library {
                Library::Torch => &mut chosen.has_torch,
                Library::Cupy => &mut has_cupy,
                _ => continue,
            };
            if !std::mem::replace(asked, true) {
                // A stream that was named is what the caller ordered the inputs on, of whatever library they are.
                if a.stream.is_some() {
                    continue;
                }
                match (import::current_stream(py, library, self.device())?, chosen.handle) {
                    (Some(h), None) => chosen.handle = Some(h),
                    (Some(h), Some(first)) if h != first => chosen.others.push(h),
                    _ => {}
                }
            }
        }
        Ok(chosen)
    }

    fn check_gradient(&self, py: Python<'_>, inputs: &[Option<Borrowed<'_, '_, PyAny>>]) -> PyResult<()> {
        if !import::grad_enabled(py)? {
            return Ok(());
        }
        for (k, obj) in inputs.iter().enumerate() {
            if let Some(obj) = obj {
                if import::requires_grad(obj)? {
                    return Err(Error::input(
                        Kind::Grad,
                        &self.input(k).name,
                        "a tensor that requires grad, while grad mode is on",
                        "tensors without gradient: an engine has no backward pass",
                        "Call it under torch.inference_mode() or torch.no_grad(), or pass x.detach().",
                    )
                    .into());
                }
            }
        }
        Ok(())
    }

    fn call<'py>(
        &self,
        py: Python<'py>,
        args: &[Borrowed<'_, 'py, PyAny>],
        kwnames: Option<&Bound<'py, PyTuple>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let a = self.sort(py, args, kwnames)?;
        self.run_sorted(py, &a)
    }

    fn run_sorted<'py>(&self, py: Python<'py>, a: &Arguments<'_, 'py>) -> PyResult<Bound<'py, PyDict>> {
        if self.executor.is_closed() {
            return Err(self.executor.closed_error().into());
        }
        if let Some(k) = a.inputs.iter().position(Option::is_none) {
            return Err(self.missing(k));
        }
        let stream = self.choose_stream(py, a)?;
        if stream.has_torch {
            self.check_gradient(py, &a.inputs)?;
        }
        let mut read = self.reader();
        self.import_all(&a.inputs, &stream, &mut read)?;
        let given = match a.out {
            Some(out) => Some(self.import_out(&out)?),
            None => None,
        };
        let to_host = read.to_host && given.is_none();
        let call = Call {
            inputs: &read.views,
            stream: read.stream,
            outputs: given.as_ref().map_or(Outputs::Engine, |g| Outputs::Given(&g.views)),
            to_host,
            synchronize: a.synchronize,
            timeout: a.timeout,
            want_done: !read.keep.is_empty() || !read.objects.is_empty(),
        };
        let finished = py.detach(|| self.executor.run(&call));
        drain(py);
        let finished = finished?;
        if let Some(until) = finished.done {
            self.hold(Held {
                until,
                _keep: std::mem::take(&mut read.keep),
                _objects: std::mem::take(&mut read.objects),
            })?;
        }
        let library = read.library;
        // The caller's arrays are not kept any longer than needed.
        read.keep.clear();
        read.objects.clear();
        *locked(&self.spare) = Some(read);
        let results = PyDict::new(py);
        if let Some(given) = given {
            for (name, obj) in self.output_names.iter().zip(given.objects) {
                results.set_item(name.bind(py), obj)?;
            }
            return Ok(results);
        }
        // torch and numpy need no event: torch works on the stream that the results are ordered on, numpy's are waited for.
        let needs_event = !matches!(library, Library::Torch | Library::Numpy) && !to_host && !finished.outputs.is_empty();
        let ready = if needs_event {
            Some(StreamReady::new(&self.executor, finished.stream)?)
        } else {
            None
        };
        for (k, out) in finished.outputs.into_iter().enumerate() {
            let ready = ready
                .clone()
                .map(|event| Arc::new(OutputReady { event, ptr: out.view.ptr }) as Arc<dyn Ready>);
            results.set_item(self.output_names[k].bind(py), export(py, out, library, ready)?)?;
        }
        Ok(results)
    }

    /// Fills in `read`, over what the last call left there.
    fn import_all(&self, inputs: &[Option<Borrowed<'_, '_, PyAny>>], stream: &CallStream, read: &mut Read) -> PyResult<()> {
        read.stream = stream.handle;
        // A producer that orders itself before its reader must know the reader's stream now.
        let reader = stream.handle.unwrap_or_else(|| self.executor.front_stream());
        for (k, obj) in inputs.iter().flatten().enumerate() {
            let io = self.input(k);
            let view = &mut read.views[k];
            if import::exchanged(obj, &io.name, view)? {
                let on_device = matches!(view.place, Place::Device(_));
                if k == 0 {
                    read.library = Library::Torch;
                    read.to_host = !on_device;
                }
                if !on_device {
                    read.objects.push(Bound::clone(obj).unbind());
                }
                continue;
            }
            let one: Imported = import::import(obj, &io.name, Some(reader), self.device())?;
            *view = one.view;
            if one.place_assumed && view.ptr != 0 {
                if let Some(d) = device_of(view.ptr)? {
                    view.place = Place::Device(d);
                }
            }
            let on_device = matches!(view.place, Place::Device(_));
            if on_device && stream.handle.is_none() {
                // Other libraries have ordered themselves before the engine's own front stream.
                read.stream = Some(reader);
            }
            if let Some(producer) = one.producer_stream.filter(|&p| p != reader) {
                self.executor.order(producer, reader)?;
            }
            if k == 0 {
                read.library = one.library;
                read.to_host = !on_device;
            }
            match one.keep {
                Some(keep) => read.keep.push(keep),
                // Page-locked arrays may be read in place after the call has returned.
                // A tensor of a library without a stream of its own must outlive the work.
                None if !on_device || stream.handle.is_none() => read.objects.push(Bound::clone(obj).unbind()),
                None => {}
            }
        }
        for &other in &stream.others {
            self.executor.order(other, reader)?;
        }
        Ok(())
    }

    fn import_out(&self, out: &Bound<'_, PyAny>) -> PyResult<Given> {
        let mut given = Given {
            views: SmallVec::new(),
            objects: Vec::new(),
            _keep: Vec::new(),
        };
        let mapping = out
            .cast::<PyMapping>()
            .map_err(|_| PyTypeError::new_err("out= takes a mapping from output name to tensor"))?;
        if mapping.len()? != self.executor.outputs.len() {
            let names: Vec<&str> = (0..self.executor.outputs.len()).map(|k| self.output(k).name.as_str()).collect();
            return Err(Error::input(
                Kind::InputName,
                "out",
                format!("{} tensors", mapping.len()?),
                names.join(", "),
                "Pass one tensor per output.",
            )
            .into());
        }
        for (k, name) in self.output_names.iter().enumerate() {
            let io = self.output(k);
            let missing = || {
                Error::input(
                    Kind::InputName,
                    &io.name,
                    "nothing in out=",
                    "a tensor for every output",
                    "Add it to out=.",
                )
            };
            let obj = mapping.get_item(name.bind(out.py())).map_err(|_| PyErr::from(missing()))?;
            let one = import::import(&obj, &io.name, None, self.device())?;
            if one.read_only {
                return Err(Error::input(
                    Kind::Layout,
                    &io.name,
                    "read-only memory in out=",
                    "memory that may be written",
                    "Pass a writable tensor.",
                )
                .into());
            }
            given.views.push(one.view);
            given.objects.push(obj.unbind());
            given._keep.extend(one.keep);
        }
        Ok(given)
    }

    /// Where the inputs of a call are read into: what the last call used, unless another thread has it.
    fn reader(&self) -> Box<Read> {
        let mut read = locked(&self.spare).take().unwrap_or_default();
        read.views.resize(self.executor.inputs.len(), TensorView::default());
        read.library = Library::default();
        read.to_host = false;
        read
    }

    /// Keeps inputs until the GPU has read them, and lets go of those that it has.
    fn hold(&self, new: Held) -> PyResult<()> {
        let mut done = Vec::new();
        {
            let mut held = locked(&self.held);
            while held.front().is_some_and(|h| h.until.is_done().unwrap_or(true)) {
                done.extend(held.pop_front());
            }
            held.push_back(new);
        }
        // Dropping runs other libraries' code: not under the lock.
        drop(done);
        Ok(())
    }
}

/// The inputs of a call as views, and what keeps them alive.
#[derive(Default)]
struct Read {
    views: Vec<TensorView>,
    stream: Option<u64>,
    /// Of the first input: what the results come back as.
    library: Library,
    to_host: bool,
    keep: Vec<Keep>,
    objects: Vec<Py<PyAny>>,
}

struct Given {
    views: Inline<TensorView>,
    objects: Vec<Py<PyAny>>,
    _keep: Vec<Keep>,
}

impl<'a, 'py> Arguments<'a, 'py> {
    fn option(&mut self, py: Python<'py>, word: Word, value: Borrowed<'a, 'py, PyAny>) -> PyResult<()> {
        let _ = py;
        match word {
            Word::Stream if !value.is_none() => self.stream = Some(value),
            Word::Out if !value.is_none() => self.out = Some(value),
            Word::Synchronize => self.synchronize = value.is_truthy()?,
            Word::Timeout if !value.is_none() => self.timeout = Some(seconds(value.extract()?)?),
            _ => {}
        }
        Ok(())
    }
}

fn seconds(s: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(s).map_err(|_| {
        Error::new(
            Kind::Argument,
            format!("timeout={s}: seconds to wait, zero or more, or None to wait for ever"),
        )
    })
}

/// A stream as a driver handle: an int, or an object of torch (`cuda_stream`), CuPy (`ptr`) or cuda.core (`__cuda_stream__`).
pub fn stream_handle(obj: &Bound<'_, PyAny>) -> PyResult<u64> {
    let py = obj.py();
    if let Ok(h) = obj.extract::<u64>() {
        return Ok(h);
    }
    if let Some(h) = obj.getattr_opt(intern!(py, "cuda_stream"))? {
        return h.extract();
    }
    if let Some(protocol) = obj.getattr_opt(intern!(py, "__cuda_stream__"))? {
        let (_version, handle): (i64, u64) = protocol.call0()?.extract()?;
        return Ok(handle);
    }
    if let Some(h) = obj.getattr_opt(intern!(py, "ptr"))? {
        return h.extract();
    }
    Err(PyTypeError::new_err(format!(
        "stream: found {}; allowed: an int handle, or a stream of torch, CuPy or cuda.core (anything with __cuda_stream__)",
        obj.get_type().name()?
    )))
}

/// When the results on one stream are complete.
struct StreamReady {
    event: Event,
    stream: u64,
}

impl StreamReady {
    fn new(executor: &Executor, stream: u64) -> Result<Arc<StreamReady>> {
        let event = Event::new(executor.engine.device)?;
        event.record(&Stream::borrowed(stream))?;
        Ok(Arc::new(StreamReady { event, stream }))
    }
}

struct OutputReady {
    event: Arc<StreamReady>,
    ptr: u64,
}

impl Ready for OutputReady {
    fn order(&self, stream: u64) -> Result<()> {
        let consumer = Stream::borrowed(stream);
        if consumer.handle() != self.event.stream {
            consumer.wait(&self.event.event)?;
            // The engine has not seen this stream: its buffer must not be written again before that stream is past it.
            record_stream(self.ptr, consumer.handle())?;
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        self.event.event.synchronize()
    }
}

/// `tensorrt_libs` folders of pip packages on `sys.path`.
pub fn pip_folders(py: Python<'_>) -> Vec<PathBuf> {
    let read = || -> PyResult<Vec<PathBuf>> {
        let path: Vec<Bound<'_, PyAny>> = py.import("sys")?.getattr("path")?.extract()?;
        Ok(path
            .iter()
            .filter_map(|p| p.extract::<PathBuf>().ok())
            .map(|p| p.join("tensorrt_libs"))
            .filter(|p| p.is_dir())
            .collect())
    };
    read().unwrap_or_default()
}

fn one_of<T: Copy>(name: &str, value: &str, table: &[(&str, T)]) -> PyResult<T> {
    table.iter().find(|(n, _)| *n == value).map(|(_, v)| *v).ok_or_else(|| {
        let allowed: Vec<String> = table.iter().map(|(n, _)| format!("\"{n}\"")).collect();
        PyValueError::new_err(format!("{name}: found \"{value}\"; allowed: {}", allowed.join(", ")))
    })
}

/// A GPU by number, as "cuda:1", or as torch's or CuPy's device object.
fn ordinal(obj: &Bound<'_, PyAny>) -> PyResult<i32> {
    if let Ok(i) = obj.extract::<i32>() {
        return Ok(i);
    }
    let text = obj.str()?.to_string();
    let bad = || PyValueError::new_err(format!("device: found {text}; allowed: a GPU number, or \"cuda:N\""));
    if text == "cuda" {
        return Ok(0);
    }
    text.strip_prefix("cuda:").and_then(|n| n.parse().ok()).ok_or_else(bad)
}

#[pymethods]
impl EngineBase {
    #[new]
    #[pyo3(signature = (path, *, device = None, graphs = "auto", outputs = "pooled", on_strided = "error", on_dtype = "error", host = "auto", profile = None,
        max_contexts = 1, timeout = None, plugins = Vec::new(), allow_host_code = false, verify = "auto", warmup = 2, graph_bytes = 256 << 20, device_memory = None))]
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
        let loaded = py.detach(|| -> Result<(Executor, LoadReport, Option<String>)> {
            // The file first: what is wrong with it can be said without a GPU.
            let plan = PlanFile::open(&path)?;
            let gpu = Device::get(device)?;
            let lib = library(&folders, Some(plan.header.version))?;
            lib.load_plugins(&plugins)?;
            let (engine, report) = crate::trt::Engine::load(
                lib,
                gpu,
                &Loading {
                    plan: &plan,
                    allow_host_code,
                    verify,
                },
            )?;
            let metadata = plan.header.metadata.clone();
            // The mapping goes before the contexts come: their memory should find room.
            drop(plan);
            Ok((Executor::new(engine, options)?, report, metadata))
        });
        drain(py);
        let (executor, report, metadata) = loaded?;
        let executor = Arc::new(executor);
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
            let a = Arguments {
                inputs: set.iter().map(|o| o.as_ref().map(Bound::as_borrowed)).collect(),
                stream: stream.map(Bound::as_borrowed),
                timeout: self.timeout,
                ..Arguments::default()
            };
            if let Some(k) = a.inputs.iter().position(Option::is_none) {
                return Err(self.missing(k));
            }
            let chosen = self.choose_stream(py, &a)?;
            let mut read = self.reader();
            self.import_all(&a.inputs, &chosen, &mut read)?;
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

    /// The JSON that Ultralytics writes before a plan, or None.
    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        metadata(py, self.metadata.as_deref())
    }

    /// Waits for the engine's work and frees everything but the results that are still held. Safe to call again.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.executor.close());
        let held = std::mem::take(&mut *locked(&self.held));
        drop(held);
        drain(py);
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        if slf.get().executor.is_closed() {
            return Err(slf.get().executor.closed_error().into());
        }
        Ok(slf.clone())
    }

    #[pyo3(signature = (exc_type, exc, traceback))]
    fn __exit__(&self, py: Python<'_>, exc_type: &Bound<'_, PyAny>, exc: &Bound<'_, PyAny>, traceback: &Bound<'_, PyAny>) {
        let _ = (exc_type, exc, traceback);
        self.close(py);
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

impl EngineBase {
    fn table<'py>(&self, py: Python<'py>, which: &[usize]) -> PyResult<Bound<'py, PyDict>> {
        let d = PyDict::new(py);
        for &i in which {
            d.set_item(&self.io()[i].name, TensorInfo { io: self.io()[i].clone() })?;
        }
        Ok(d)
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
