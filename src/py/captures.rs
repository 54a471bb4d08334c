//! The native side of `jetrt.graph`: `_Launches`, `_Capture`, `_abandon_capture`, `_fill`,
//! `_set_bytes`, `_same_bytes`.

use super::call::{locked, resolve_place};
use super::convert::{ordinal, stream_handle};
use super::import::{self, import, Imported, Library};
use super::logging::drain;
use crate::cuda::kernel::Kernel;
use crate::cuda::memory::{self, read_back};
use crate::cuda::{abandon_capture, Device, Event, Stream};
use crate::error::{Error, Kind, Result};
use crate::exec::{fill, Captured, Launches, Pair};
use crate::shape::is_dense;
use crate::tensor::{Place, TensorView};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use smallvec::SmallVec;
use std::sync::{Arc, Mutex};

type Inline<T> = SmallVec<[T; 8]>;

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<GraphLaunches>()?;
    m.add_class::<Capture>()?;
    m.add_function(wrap_pyfunction!(capture_stream, m)?)?;
    m.add_function(wrap_pyfunction!(abandon, m)?)?;
    m.add_function(wrap_pyfunction!(fill_tensors, m)?)?;
    m.add_function(wrap_pyfunction!(set_bytes, m)?)?;
    m.add_function(wrap_pyfunction!(same_bytes, m)?)
}

/// Launches of graphs that share memory: one at a time, each behind the one before, on whatever threads and streams.
#[pyclass(module = "jetrt._core", name = "_Launches", frozen, weakref)]
pub struct GraphLaunches {
    launches: Arc<Launches>,
}

#[pymethods]
impl GraphLaunches {
    #[new]
    #[pyo3(signature = (device = None))]
    fn new(py: Python<'_>, device: Option<&Bound<'_, PyAny>>) -> PyResult<GraphLaunches> {
        let device = device.map(ordinal).transpose()?.unwrap_or(0);
        let launches = py.detach(|| Launches::new(Device::get(device)?))?;
        Ok(GraphLaunches {
            launches: Arc::new(launches),
        })
    }

    /// Waits until all that was launched is done.
    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.launches.wait())?)
    }
}

/// A graph of the caller's with its fixed tensors.
struct Graph {
    graph: Py<PyAny>,
    kernel: Kernel,
    inputs: Vec<Fixed>,
    outputs: Vec<Fixed>,
}

struct Fixed {
    view: TensorView,
    name: String,
    tensor: Py<PyAny>,
}

impl Fixed {
    fn name(&self) -> &str {
        &self.name
    }
}

/// The capture that runs on a stream: which engines take part, and later the launches of its graph.
///
/// stream: the int handle of a stream that captures now. Raises GraphCaptureError where none does. Engines that are called in
/// the capture from here on are kept alive, with what their part of the graph uses, until `release`.
#[pyclass(module = "jetrt._core", name = "_Capture", frozen)]
pub struct Capture {
    record: Arc<Captured>,
    graph: Mutex<Option<Arc<Graph>>>,
}

#[pymethods]
impl Capture {
    #[new]
    #[pyo3(signature = (stream, launches))]
    fn new(stream: u64, launches: &GraphLaunches) -> PyResult<Capture> {
        Ok(Capture {
            record: Captured::of_stream(stream, Arc::clone(&launches.launches))?,
            graph: Mutex::new(None),
        })
    }

    /// The names of the engines that took part.
    #[getter]
    fn engines(&self) -> Vec<String> {
        self.record.engines()
    }

    /// How many nodes the graph has so far, while the capture runs.
    #[getter]
    fn nodes(&self) -> PyResult<usize> {
        Ok(self.record.nodes()?)
    }

    /// False once one of the engines was closed, or the capture released.
    #[getter]
    fn alive(&self) -> bool {
        self.record.alive()
    }

    /// What `replay` launches: an object with `replay()`, which launches on the current stream, and the tensors that it reads
    /// and writes, each list with its names. All are held until `release`.
    #[pyo3(signature = (graph, inputs, outputs, input_names, output_names))]
    fn bind(
        &self,
        graph: Bound<'_, PyAny>,
        inputs: &Bound<'_, PyAny>,
        outputs: &Bound<'_, PyAny>,
        input_names: Vec<String>,
        output_names: Vec<String>,
    ) -> PyResult<()> {
        let device = self.record.launches.device;
        let fixed = |tensors: &Bound<'_, PyAny>, names: Vec<String>| -> PyResult<Vec<Fixed>> {
            let mut out = Vec::new();
            for (tensor, name) in tensors.try_iter()?.zip(names) {
                let tensor = tensor?;
                let view = read(&tensor, &name, None, device.ordinal)?.view;
                out.push(Fixed {
                    view,
                    name,
                    tensor: tensor.unbind(),
                });
            }
            Ok(out)
        };
        let graph = Graph {
            graph: graph.unbind(),
            kernel: Kernel::get(device)?,
            inputs: fixed(inputs, input_names)?,
            outputs: fixed(outputs, output_names)?,
        };
        *locked(&self.graph) = Some(Arc::new(graph));
        Ok(())
    }

    /// Copies `inputs` over the graph's, launches it, and copies its outputs over `outputs` (one launch for each of the three),
    /// behind the last launch and in the order of `stream` (default: torch's current one).
    ///
    /// inputs: one tensor for each of the graph's, of the same shape and dtype, any strides; or a callable, which is given the
    /// graph's own to write into, on torch's current stream. outputs: tensors likewise, or none, or a callable that returns
    /// them; it is called when the graph was launched, while the GPU works. Returns None, or why nothing was
    /// launched: a capture runs on that stream, or the graph was released. Raises ClosedEngineError when an engine of the graph was
    /// closed.
    #[pyo3(signature = (inputs, outputs, stream = None))]
    fn replay<'py>(
        &self,
        py: Python<'py>,
        inputs: &Bound<'py, PyAny>,
        outputs: &Bound<'py, PyAny>,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Option<&'static str>> {
        const RELEASED: &str = "the graph was released meanwhile";
        let Some(graph) = locked(&self.graph).clone() else {
            return Ok(Some(RELEASED));
        };
        let device = self.record.launches.device;
        let stream = stream_of(py, stream, device.ordinal)?;
        let read_outputs = |outputs: &Bound<'py, PyAny>| -> PyResult<Tensors> {
            let name = |k: usize| graph.outputs.get(k).map(Fixed::name);
            let targets = Tensors::read(outputs, name, stream, device.ordinal)?;
            let found = targets.views.len();
            (found == 0 || found == graph.outputs.len())
                .then_some(targets)
                .ok_or_else(|| wrong_count(found, graph.outputs.len(), "outputs").into())
        };
        let mut sources = Tensors::default();
        let (mut places, mut written): (Inline<&Fixed>, Inline<(&Fixed, Bound<'py, PyAny>)>) = Default::default();
        let found = inputs.len()?;
        if found != graph.inputs.len() {
            return Err(wrong_count(found, graph.inputs.len(), "inputs").into());
        }
        for (one, place) in inputs.try_iter()?.zip(&graph.inputs) {
            let one = one?;
            if one.is_callable() {
                written.push((place, one));
            } else {
                sources.add(&one, place.name(), stream, device.ordinal)?;
                places.push(place);
            }
        }
        let made_later = outputs.is_callable();
        let given = if made_later { Tensors::default() } else { read_outputs(outputs)? };
        let before: Inline<Pair<'_>> = sources.over(&places);
        let turn = py.detach(|| -> Result<_> {
            let _entered = device.enter()?;
            if Stream::borrowed(stream).capture_id()?.is_some() {
                return Ok(Err("inside a capture of the caller's"));
            }
            let Some(turn) = self.record.turn(stream)? else {
                return Ok(Err(RELEASED));
            };
            sources.order(device, stream)?;
            fill(&graph.kernel, device.ordinal, &before, &turn.stream)?;
            Ok(Ok(turn))
        })?;
        let turn = match turn {
            Ok(turn) => turn,
            Err(why) => return Ok(Some(why)),
        };
        for (place, write) in &written {
            write.call1((&place.tensor,))?;
        }
        graph.graph.call_method0(py, intern!(py, "replay"))?;
        let mut targets = if made_later { read_outputs(&outputs.call0()?)? } else { given };
        let after: Inline<Pair<'_>> = targets.from(&graph.outputs);
        py.detach(|| -> Result<()> {
            let _entered = device.enter()?;
            targets.order(device, stream)?;
            fill(&graph.kernel, device.ordinal, &after, &turn.stream)?;
            drop(turn);
            Ok(())
        })?;
        drop(after);
        // What other libraries handed over lives until the work is enqueued.
        sources.keep.clear();
        targets.keep.clear();
        Ok(None)
    }

    /// No launch from here on: waits for those under way. The graph may be destroyed afterwards, before `release`.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.record.stop())?)
    }

    /// Stops, and gives back what the engines keep for the graph, and the tensors. Safe to call again.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        let released = py.detach(|| self.record.release());
        drain(py);
        released?;
        let graph = locked(&self.graph).take();
        drop(graph);
        Ok(())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // A launch that needs the GIL must not be waited for with it.
        Python::try_attach(|py| py.detach(|| self.record.release()))
            .unwrap_or_else(|| self.record.release())
            .unwrap_or_default();
    }
}

/// The handle of a stream of that GPU on which nobody else enqueues; it is never destroyed.
#[pyfunction]
#[pyo3(name = "_capture_stream")]
fn capture_stream(py: Python<'_>, device: &Bound<'_, PyAny>) -> PyResult<u64> {
    let device = ordinal(device)?;
    Ok(py.detach(|| Stream::for_captures(Device::get(device)?))?)
}

/// Ends a capture that was left running on this stream of that GPU, if one is. Its graph is thrown away.
#[pyfunction]
#[pyo3(name = "_abandon_capture", signature = (stream, device = None))]
fn abandon(py: Python<'_>, stream: u64, device: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
    let device = device.map(ordinal).transpose()?.unwrap_or(0);
    Ok(py.detach(|| -> Result<()> {
        let _entered = Device::get(device)?.enter()?;
        abandon_capture(&Stream::borrowed(stream))
    })?)
}

/// Copies each of `sources` over the one of `targets`, in one launch on `stream` (default: torch's current one).
///
/// Pairs have one shape and one dtype; a target is contiguous, or without gaps and of its source's strides. Raises DTypeError,
/// ShapeError, DeviceError or LayoutError with the name of the tensor, before anything is copied.
#[pyfunction]
#[pyo3(name = "_fill", signature = (targets, sources, stream = None, *, device = None, names = None))]
fn fill_tensors<'py>(
    py: Python<'py>,
    targets: &Bound<'py, PyAny>,
    sources: &Bound<'py, PyAny>,
    stream: Option<&Bound<'py, PyAny>>,
    device: Option<&Bound<'py, PyAny>>,
    names: Option<Vec<String>>,
) -> PyResult<()> {
    let device = Device::get(device.map(ordinal).transpose()?.unwrap_or(0))?;
    let stream = stream_of(py, stream, device.ordinal)?;
    let name = |k: usize| names.as_ref().and_then(|names| names.get(k)).map(String::as_str);
    let targets = Tensors::read(targets, name, stream, device.ordinal)?;
    let sources = Tensors::read(sources, name, stream, device.ordinal)?;
    let n = targets.views.len();
    if sources.views.len() != n || names.as_ref().is_some_and(|names| names.len() != n) {
        let found = format!("{} sources for {n} targets", sources.views.len());
        return Err(Error::input(Kind::InputName, "#", found, "one source and one name for each", "Pass as many.").into());
    }
    let names = names.unwrap_or_else(|| (0..n).map(|k| format!("#{k}")).collect());
    let pairs: Inline<Pair<'_>> = (0..n)
        .map(|k| Pair {
            name: &names[k],
            target: targets.views[k],
            source: sources.views[k],
        })
        .collect();
    py.detach(|| -> Result<()> {
        let _entered = device.enter()?;
        sources.order(device, stream)?;
        targets.order(device, stream)?;
        fill(&Kernel::get(device)?, device.ordinal, &pairs, &Stream::borrowed(stream))
    })?;
    Ok(())
}

/// Sets every byte of these tensors, which have no gaps, on `stream` (default: torch's current one).
#[pyfunction]
#[pyo3(name = "_set_bytes", signature = (tensors, value, stream = None, *, device = None))]
fn set_bytes<'py>(
    py: Python<'py>,
    tensors: &Bound<'py, PyAny>,
    value: u8,
    stream: Option<&Bound<'py, PyAny>>,
    device: Option<&Bound<'py, PyAny>>,
) -> PyResult<()> {
    let device = Device::get(device.map(ordinal).transpose()?.unwrap_or(0))?;
    let stream = stream_of(py, stream, device.ordinal)?;
    let tensors = Tensors::read(tensors, |_| None, stream, device.ordinal)?;
    for view in &tensors.views {
        if !without_gaps(view) || view.place != Place::Device(device.ordinal) {
            let allowed = format!("a tensor without gaps on cuda:{}", device.ordinal);
            return Err(Error::input(Kind::Layout, "#", view.to_string(), allowed, "Pass .contiguous().").into());
        }
    }
    py.detach(|| -> Result<()> {
        let _entered = device.enter()?;
        tensors.order(device, stream)?;
        for view in &tensors.views {
            memory::fill(view.ptr, value, view.bytes().unwrap_or(0), &Stream::borrowed(stream))?;
        }
        Ok(())
    })?;
    Ok(())
}

fn without_gaps(view: &TensorView) -> bool {
    view.contiguous || is_dense(view.dims.as_slice(), view.strides.as_slice())
}

/// Do these tensors hold the same bytes, each pair of one shape, dtype and layout without gaps? Reads them back to the host: their
/// streams must have been waited for.
#[pyfunction]
#[pyo3(name = "_same_bytes", signature = (first, second, *, device = None))]
fn same_bytes<'py>(
    py: Python<'py>,
    first: &Bound<'py, PyAny>,
    second: &Bound<'py, PyAny>,
    device: Option<&Bound<'py, PyAny>>,
) -> PyResult<bool> {
    let device = device.map(ordinal).transpose()?.unwrap_or(0);
    let a = Tensors::read(first, |_| None, 0, device)?;
    let b = Tensors::read(second, |_| None, 0, device)?;
    if a.views.len() != b.views.len() {
        return Ok(false);
    }
    let same = |a: &TensorView, b: &TensorView| -> Result<bool> {
        let layout = |v: &TensorView| if v.contiguous { v.dims.contiguous_strides() } else { v.strides };
        let alike = a.dtype == b.dtype && a.dims == b.dims && (a.contiguous && b.contiguous || layout(a) == layout(b));
        if !alike || !without_gaps(a) || a.place != Place::Device(device) || b.place != a.place {
            return Err(Error::input(
                Kind::Layout,
                "#",
                format!("{a} and {b}"),
                "two tensors of one shape, dtype and layout on the GPU",
                "Copy one like the other.",
            ));
        }
        let read = |v: &TensorView| -> Result<Vec<u8>> {
            let mut out = vec![0u8; v.bytes().unwrap_or(0) as usize];
            read_back(device, v.ptr, &mut out)?;
            Ok(out)
        };
        Ok(read(a)? == read(b)?)
    };
    Ok(py.detach(|| -> Result<bool> {
        for (a, b) in a.views.iter().zip(&b.views) {
            if !same(a, b)? {
                return Ok(false);
            }
        }
        Ok(true)
    })?)
}

/// Tensors of one argument, as views.
#[derive(Default)]
struct Tensors {
    views: Inline<TensorView>,
    /// Streams that their libraries name instead of ordering themselves.
    producers: Inline<u64>,
    keep: Vec<import::Keep>,
}

impl Tensors {
    /// A list or tuple of tensors that will be used on `stream`; `name` is the name of each, for messages.
    fn read<'a>(tensors: &Bound<'_, PyAny>, name: impl Fn(usize) -> Option<&'a str>, stream: u64, device: i32) -> PyResult<Tensors> {
        let mut out = Tensors::default();
        let mut add = |k: usize, tensor: &Bound<'_, PyAny>| out.add(tensor, name(k).unwrap_or("#"), stream, device);
        if let Ok(list) = tensors.cast::<PyList>() {
            list.iter().enumerate().try_for_each(|(k, t)| add(k, &t))?;
        } else {
            tensors
                .cast::<PyTuple>()?
                .iter_borrowed()
                .enumerate()
                .try_for_each(|(k, t)| add(k, &t))?;
        }
        Ok(out)
    }

    fn add(&mut self, tensor: &Bound<'_, PyAny>, name: &str, stream: u64, device: i32) -> PyResult<()> {
        let one = read(tensor, name, Some(stream), device)?;
        self.views.push(one.view);
        self.producers.extend(one.producer_stream.filter(|&p| p != stream));
        self.keep.extend(one.keep);
        Ok(())
    }

    fn over<'a>(&self, fixed: &[&'a Fixed]) -> Inline<Pair<'a>> {
        let pair = |(&f, v): (&&'a Fixed, &TensorView)| Pair {
            name: &f.name,
            target: f.view,
            source: *v,
        };
        fixed.iter().zip(&self.views).map(pair).collect()
    }

    fn from<'a>(&self, fixed: &'a [Fixed]) -> Inline<Pair<'a>> {
        let pair = |(f, v): (&'a Fixed, &TensorView)| Pair {
            name: &f.name,
            target: *v,
            source: f.view,
        };
        fixed.iter().zip(&self.views).map(pair).collect()
    }

    fn order(&self, device: &'static Device, stream: u64) -> Result<()> {
        for &producer in &self.producers {
            let reader = Stream::borrowed(stream);
            let event = Event::new(device)?;
            event.record(&Stream::borrowed(producer))?;
            reader.wait(&event)?;
        }
        Ok(())
    }
}

fn wrong_count(found: usize, allowed: usize, what: &str) -> Error {
    let (found, allowed) = (format!("{found} {what}"), format!("{allowed} {what}"));
    Error::input(Kind::InputName, "#", found, allowed, "Pass one tensor for each.")
}

pub(super) fn read(tensor: &Bound<'_, PyAny>, name: &str, stream: Option<u64>, device: i32) -> PyResult<Imported> {
    let mut one = import(tensor, name, stream, device)?;
    resolve_place(&mut one)?;
    Ok(one)
}

/// The stream that was named, else torch's current one of that GPU.
fn stream_of(py: Python<'_>, stream: Option<&Bound<'_, PyAny>>, device: i32) -> PyResult<u64> {
    if let Some(stream) = stream {
        return stream_handle(stream);
    }
    match import::current_stream(py, Library::Torch, device)? {
        Some((handle, _)) => Ok(handle),
        None => Err(Error::new(
            Kind::Argument,
            "stream: torch is not imported, or was built without CUDA: name a stream",
        )
        .into()),
    }
}
