//! One call of an engine: arguments sorted, inputs read as views, the executor run, results handed over.

use super::convert::{seconds, stream_handle};
use super::engine::EngineBase;
use super::export::export;
use super::import::{self, Imported, Keep, Library};
use super::logging::drain;
use super::tensor::Ready;
use crate::cuda::memory::device_of;
use crate::cuda::{Device, Event, Stream};
use crate::error::{Error, Kind, Result};
use crate::exec::{record_stream, Call, Executor, Outputs};
use crate::tensor::{Place, TensorView};
use crate::trt::IoTensor;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PyString, PyTuple};
use pyo3::Borrowed;
use smallvec::SmallVec;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

type Inline<T> = SmallVec<[T; 8]>;

pub(super) fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
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
pub(super) struct Keywords {
    names: Py<PyTuple>,
    words: Vec<Word>,
}

/// Inputs of other libraries that must live until the GPU has read them.
pub(super) struct Held {
    until: Event,
    _keep: Vec<Keep>,
    _objects: Vec<Py<PyAny>>,
}

pub(super) fn called<'py>(
    slf: &Bound<'py, PyAny>,
    args: &[Borrowed<'_, 'py, PyAny>],
    kwnames: Option<&Bound<'py, PyTuple>>,
) -> PyResult<Bound<'py, PyAny>> {
    let engine = slf.cast::<EngineBase>()?.get();
    engine.call(slf.py(), args, kwnames).map(Bound::into_any)
}

/// One call's arguments, sorted.
#[derive(Default)]
pub(super) struct Arguments<'a, 'py> {
    pub(super) inputs: Inline<Option<Borrowed<'a, 'py, PyAny>>>,
    pub(super) stream: Option<Borrowed<'a, 'py, PyAny>>,
    pub(super) out: Option<Borrowed<'a, 'py, PyAny>>,
    pub(super) synchronize: bool,
    pub(super) timeout: Option<Duration>,
}

/// The stream of a call, and which library's inputs it came from.
pub(super) struct CallStream {
    handle: Option<u64>,
    /// Current streams of the other libraries among the inputs: the work goes behind those too.
    others: Inline<u64>,
    /// The inputs' memory could be reused before the stream has read it: they must outlive the work.
    keep: bool,
}

impl EngineBase {
    pub(super) fn io(&self) -> &[IoTensor] {
        &self.executor.engine.io
    }

    pub(super) fn input(&self, k: usize) -> &IoTensor {
        &self.io()[self.executor.inputs[k]]
    }

    pub(super) fn output(&self, k: usize) -> &IoTensor {
        &self.io()[self.executor.outputs[k]]
    }

    pub(super) fn device(&self) -> i32 {
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
    pub(super) fn unknown_input(&self, name: &str) -> PyErr {
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

    fn sort<'a, 'py>(&self, args: &'a [Borrowed<'a, 'py, PyAny>], kwnames: Option<&Bound<'py, PyTuple>>) -> PyResult<Arguments<'a, 'py>> {
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
                sorted.option(word, value)?;
            }
        }
        Ok(sorted)
    }

    pub(super) fn missing(&self, k: usize) -> PyErr {
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

    /// Which stream the work is ordered on: the one named, else the current one of the inputs' library. `left` are the
    /// inputs that are not read yet.
    fn choose_stream(&self, py: Python<'_>, a: &Arguments<'_, '_>, torch_on_gpu: bool, left: &[usize]) -> PyResult<CallStream> {
        let mut chosen = CallStream {
            handle: None,
            others: SmallVec::new(),
            keep: false,
        };
        if let Some(s) = a.stream {
            // A stream that was named is what the caller ordered the inputs on, of whatever library they are.
            let handle = stream_handle(&s)?;
            self.executor.keep_stream(handle, || Box::new(Bound::clone(&s).unbind()));
            chosen.handle = Some(handle);
        }
        let among_left = |library: Library| {
            left.iter()
                .any(|&k| a.inputs[k].as_ref().is_some_and(|o| import::library_of(o) == library))
        };
        // Tensors on the host have no stream.
        for (library, asked) in [
            (Library::Torch, torch_on_gpu || among_left(Library::Torch)),
            (Library::Cupy, among_left(Library::Cupy)),
        ] {
            if !asked {
                continue;
            }
            let current = import::current_stream(py, library, self.device())?;
            let handle = current.map(|(handle, owner)| {
                if let Some(owner) = owner {
                    self.executor.keep_stream(handle, || Box::new(owner));
                }
                handle
            });
            match (handle, chosen.handle) {
                (Some(h), None) => chosen.handle = Some(h),
                (Some(h), Some(first)) if h != first && a.stream.is_none() => chosen.others.push(h),
                // Its allocator orders memory on its own stream, not on the named one.
                (Some(h), Some(named)) => chosen.keep |= h != named,
                _ => {}
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
        let a = self.sort(args, kwnames)?;
        self.run_sorted(py, &a)
    }

    pub(super) fn run_sorted<'py>(&self, py: Python<'py>, a: &Arguments<'_, 'py>) -> PyResult<Bound<'py, PyDict>> {
        if self.executor.is_closed() {
            return Err(self.executor.closed_error().into());
        }
        if let Some(k) = a.inputs.iter().position(Option::is_none) {
            return Err(self.missing(k));
        }
        let mut read = self.read_inputs(py, a)?;
        let given = match a.out {
            Some(out) => Some(self.import_out(&out, read.stream)?),
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
        let needs_event =
            !matches!(library, Library::Torch | Library::Numpy) && !to_host && !finished.captured && !finished.outputs.is_empty();
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

    /// Every input as a view, over what the last call left there.
    pub(super) fn read_inputs(&self, py: Python<'_>, a: &Arguments<'_, '_>) -> PyResult<Box<Read>> {
        let mut read = self.reader();
        // torch's exchange table needs no stream, and tells whether there is one to ask for.
        let mut left: Inline<usize> = SmallVec::new();
        let mut torch_on_gpu = false;
        for (k, obj) in a.inputs.iter().flatten().enumerate() {
            let view = &mut read.views[k];
            if !import::exchanged(obj, &self.input(k).name, view)? {
                left.push(k);
                continue;
            }
            let on_device = matches!(view.place, Place::Device(_));
            torch_on_gpu |= on_device;
            if k == 0 {
                read.library = Library::Torch;
                read.to_host = !on_device;
            }
            if !on_device {
                read.objects.push(Bound::clone(obj).unbind());
            }
        }
        if left.len() < a.inputs.len()
            || left
                .iter()
                .any(|&k| a.inputs[k].as_ref().is_some_and(|o| import::library_of(o) == Library::Torch))
        {
            self.check_gradient(py, &a.inputs)?;
        }
        let stream = self.choose_stream(py, a, torch_on_gpu, &left)?;
        read.stream = stream.handle;
        // A producer that orders itself before its reader must know the reader's stream now.
        let reader = stream.handle.unwrap_or_else(|| self.executor.front_stream());
        if stream.keep {
            read.objects.extend(a.inputs.iter().flatten().map(|obj| Bound::clone(obj).unbind()));
        }
        for k in left {
            let Some(obj) = &a.inputs[k] else { continue };
            let io = self.input(k);
            let view = &mut read.views[k];
            let mut one: Imported = import::import(obj, &io.name, Some(reader), self.device())?;
            resolve_place(&mut one)?;
            *view = one.view;
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
                // A tensor of a library that does not free in stream order must outlive the work.
                None if !on_device || stream.handle.is_none() || one.library == Library::Other => {
                    read.objects.push(Bound::clone(obj).unbind())
                }
                None => {}
            }
        }
        for &other in &stream.others {
            self.executor.order(other, reader)?;
        }
        Ok(read)
    }

    fn import_out(&self, out: &Bound<'_, PyAny>, stream: Option<u64>) -> PyResult<Given> {
        let mut given = Given {
            views: SmallVec::new(),
            objects: Vec::new(),
            _keep: Vec::new(),
        };
        // Whoever still works on the caller's tensor is before the engine.
        let reader = stream.unwrap_or_else(|| self.executor.front_stream());
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
            let mut one = import::import(&obj, &io.name, Some(reader), self.device())?;
            resolve_place(&mut one)?;
            if let Some(producer) = one.producer_stream.filter(|&p| p != reader) {
                self.executor.order(producer, reader)?;
            }
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

/// `__cuda_array_interface__` does not say which GPU it means; the driver does.
pub(super) fn resolve_place(one: &mut Imported) -> Result<()> {
    if one.place_assumed && one.view.ptr != 0 {
        if let Some(d) = device_of(one.view.ptr)? {
            one.view.place = Place::Device(d);
        }
    }
    Ok(())
}

/// The inputs of a call as views, and what keeps them alive.
#[derive(Default)]
pub(super) struct Read {
    pub(super) views: Vec<TensorView>,
    pub(super) stream: Option<u64>,
    /// Of the first input: what the results come back as.
    pub(super) library: Library,
    pub(super) to_host: bool,
    pub(super) keep: Vec<Keep>,
    pub(super) objects: Vec<Py<PyAny>>,
}

struct Given {
    views: Inline<TensorView>,
    objects: Vec<Py<PyAny>>,
    _keep: Vec<Keep>,
}

impl<'a, 'py> Arguments<'a, 'py> {
    fn option(&mut self, word: Word, value: Borrowed<'a, 'py, PyAny>) -> PyResult<()> {
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

/// When the results on one stream are complete.
struct StreamReady {
    event: Event,
    stream: u64,
    device: &'static Device,
}

impl StreamReady {
    fn new(executor: &Executor, stream: u64) -> Result<Arc<StreamReady>> {
        let device = executor.engine.device;
        // The default streams are those of the current context.
        let _entered = device.enter()?;
        let event = Event::new(device)?;
        event.record(&Stream::borrowed(stream))?;
        Ok(Arc::new(StreamReady { event, stream, device }))
    }
}

struct OutputReady {
    event: Arc<StreamReady>,
    ptr: u64,
}

impl Ready for OutputReady {
    fn order(&self, stream: u64) -> Result<()> {
        let _entered = self.event.device.enter()?;
        let consumer = Stream::borrowed(stream);
        if consumer.handle() != self.event.stream {
            if consumer.capture_id()?.is_some() {
                // A capture cannot wait for what was enqueued outside it: this thread does.
                self.event.event.synchronize()?;
            } else {
                consumer.wait(&self.event.event)?;
            }
            // The engine has not seen this stream: its buffer must not be written again before that stream is past it.
            record_stream(self.ptr, consumer.handle())?;
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        let _entered = self.event.device.enter()?;
        self.event.event.synchronize()
    }
}
