//! Running calls. The only place that orders streams.
//!
//! Which stream the work goes to: the caller's, where the call may be enqueued there directly. On the legacy default stream
//! TensorRT may add waits: then it is a stream of the session's that CUDA itself orders with the legacy stream both ways
//! (events would do the same and cost 1.1 µs more). A caller without a stream (numpy) gets the session's own. A graph is launched
//! on the caller's stream even when that is the legacy one.

use super::background::Background;
use super::graphs::{Decision, Entry, GraphMode, Graphs, KeyRef, OutputSet, Verdict};
use super::plan::{choose_profile, is_ready, need, HostMode, Need, OutputPlan, Policy, ProfileChoice};
use super::pool::{Buffer, OutputMode, Pool, Where};
use super::session::{copy_packed, page_locked, ContextMemory, Guard, HostPath, Session, Sessions};
use super::stats::Stats;
use super::streams::{Keep, Seen};
use crate::cuda::kernel::Kernel;
use crate::cuda::memory::{copy_on_device, copy_to_host, fill, DeviceBuffer, PinnedBuffer};
use crate::cuda::{Capture, Device, Event, Graph, Relaxed, Stream, LEGACY};
use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use crate::tensor::{OwnedTensor, Place, TensorView};
use crate::trt::{Context, Engine, IoTensor};
use smallvec::SmallVec;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

#[derive(Clone)]
pub struct Options {
    pub policy: Policy,
    pub graphs: GraphMode,
    pub warmup: u32,
    pub graph_bytes: u64,
    pub outputs: OutputMode,
    pub profile: ProfileChoice,
    pub max_contexts: usize,
    pub memory: Option<Arc<ContextMemory>>,
    /// Enqueue on the legacy default stream itself; only for measuring what that costs.
    pub legacy_direct: bool,
}

/// Where results go.
#[derive(Clone, Copy)]
pub enum Outputs<'a> {
    /// As the engine was told (`OutputMode`).
    Engine,
    /// Into the caller's tensors, in engine output order.
    Given(&'a [TensorView]),
}

pub struct Call<'a> {
    /// In the engine's input order.
    pub inputs: &'a [TensorView],
    /// The caller's stream; `None` when there is none.
    pub stream: Option<u64>,
    pub outputs: Outputs<'a>,
    /// The results must be readable by the host, now.
    pub to_host: bool,
    pub synchronize: bool,
    pub timeout: Option<Duration>,
    /// The caller frees its inputs when it is told that the work is done.
    pub want_done: bool,
}

pub struct Finished {
    /// In engine output order; empty with `Outputs::Given`.
    pub outputs: Vec<OwnedTensor>,
    /// Shapes of the outputs, also for given ones.
    pub done: Option<Event>,
    /// The stream on which the outputs are ready in order.
    pub stream: u64,
}

/// What `prepare` did for one set of shapes.
pub struct Prepared {
    pub profile: usize,
    pub outputs: Vec<(String, Dims)>,
    /// `None`: a graph is captured and equals eager; else why not.
    pub eager_because: Option<String>,
}

/// Shapes that were checked and resolved once.
#[derive(Debug)]
struct Resolved {
    id: u64,
    dims: Vec<Dims>,
    /// Contents of host shape tensors: they decide shapes too.
    values: Vec<Vec<u8>>,
    profile: usize,
    outputs: Vec<OutputPlan>,
    /// Why this signature can have no graph.
    not_graphable: Option<&'static str>,
}

#[derive(Default)]
struct Signatures {
    /// Most recently used first.
    list: Vec<Arc<Resolved>>,
}

const SIGNATURES: usize = 256;

struct CaptureSession {
    capture: u64,
    dims: Vec<Dims>,
    session: Session,
}

pub struct Executor {
    pub engine: Arc<Engine>,
    options: Options,
    device: &'static Device,
    kernel: Kernel,
    /// Positions of inputs and outputs in `engine.io`.
    pub inputs: Vec<usize>,
    pub outputs: Vec<usize>,
    has_host_inputs: bool,
    sessions: Sessions,
    signatures: Mutex<Signatures>,
    graphs: Mutex<Graphs>,
    graphs_off: bool,
    seen: Arc<Seen>,
    pool: Arc<Pool>,
    /// An address for tensors without elements.
    nothing: DeviceBuffer,
    /// For callers whose library has no stream, at import time.
    front: Stream,
    /// One session per capture of the caller's and its shapes, kept as long as the engine: its graph uses the session's memory.
    for_captures: Mutex<Vec<CaptureSession>>,
    /// Outputs enqueued into captures of the caller's: never reused.
    pinned_for_captures: Mutex<Vec<Arc<Buffer>>>,
    next_id: AtomicU64,
    background: Arc<Background>,
    closed: AtomicBool,
    pub stats: Arc<Stats>,
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Executor {
    pub fn new(engine: Engine, options: Options) -> Result<Executor> {
        let device = engine.device;
        let engine = Arc::new(engine);
        let inputs: Vec<usize> = (0..engine.io.len()).filter(|&i| engine.io[i].input).collect();
        let outputs: Vec<usize> = (0..engine.io.len()).filter(|&i| !engine.io[i].input).collect();
        if let Some(m) = &options.memory {
            if m.buffer.bytes() < engine.device_memory {
                return Err(Error::new(
                    Kind::Argument,
                    format!("device_memory has {} bytes and this engine's context needs {}. Make it larger: DeviceMemory(max of the engines' device_memory_size).", m.buffer.bytes(), engine.device_memory),
                ));
            }
        }
        if let ProfileChoice::Fixed(p) = options.profile {
            if p >= engine.profiles.max(1) {
                return Err(Error::new(
                    Kind::Argument,
                    format!(
                        "profile={p}: this engine has {} optimisation profile(s), numbered from 0.",
                        engine.profiles
                    ),
                ));
            }
        }
        let seen = Arc::new(Seen::new(device));
        let background = Arc::new(Background::new(device));
        let executor = Executor {
            kernel: Kernel::get(device)?,
            has_host_inputs: inputs.iter().any(|&i| engine.io[i].host),
            sessions: Sessions::new(options.max_contexts.max(1)),
            signatures: Mutex::default(),
            graphs: Mutex::new(Graphs::new(options.graphs, options.warmup, options.graph_bytes)),
            graphs_off: options.graphs == GraphMode::Off,
            pool: Pool::new(device, Arc::clone(&seen), Arc::clone(&background), outputs.len()),
            seen,
            nothing: DeviceBuffer::new(device, 512, "address of empty tensors")?,
            front: Stream::new(device)?,
            for_captures: Mutex::default(),
            pinned_for_captures: Mutex::default(),
            next_id: AtomicU64::new(0),
            background: Arc::clone(&background),
            closed: AtomicBool::new(false),
            stats: Arc::new(Stats::default()),
            inputs,
            outputs,
            device,
            engine,
            options,
        };
        // The first context now, so that loading says whether there is memory for it.
        drop(executor.checkout(None, None)?);
        Ok(executor)
    }

    fn input(&self, k: usize) -> &IoTensor {
        &self.engine.io[self.inputs[k]]
    }

    fn output(&self, k: usize) -> &IoTensor {
        &self.engine.io[self.outputs[k]]
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub fn front_stream(&self) -> u64 {
        self.front.handle()
    }

    pub fn closed_error(&self) -> Error {
        Error::new(
            Kind::Closed,
            format!("engine '{}' is closed. Load it again to use it.", self.engine.label),
        )
        .with("engine", self.engine.label.clone())
    }

    fn checkout(&self, stream: Option<u64>, timeout: Option<Duration>) -> Result<Guard<'_>> {
        self.sessions.checkout(
            stream,
            timeout,
            || {
                let _relaxed = Relaxed::enter();
                Session::new(&self.engine, self.options.memory.as_ref(), &self.background)
            },
            || self.closed_error(),
        )
    }

    /// Notes a stream object of the caller's and keeps it alive: outputs may be in use there.
    pub fn keep_stream(&self, handle: u64, keep: impl FnOnce() -> Keep) {
        self.seen.note_kept(Stream::borrowed(handle).handle(), keep);
    }

    /// Work on `reader` from now on starts after what is enqueued on `producer` by now.
    pub fn order(&self, producer: u64, reader: u64) -> Result<()> {
        let _entered = self.device.enter()?;
        let event = Event::new(self.device)?;
        event.record(&Stream::borrowed(producer))?;
        Stream::borrowed(reader).wait(&event)
    }

    pub fn run(&self, call: &Call<'_>) -> Result<Finished> {
        if self.is_closed() {
            return Err(self.closed_error());
        }
        let _entered = self.device.enter()?;
        let mark = crate::log::TENSORRT.mark();
        self.run_entered(call)
            .map_err(|e| self.explain(e, call, mark))
            .inspect(|_| Stats::add(&self.stats.calls, 1))
    }

    /// What was bound goes into the exception of a call that TensorRT or CUDA refused.
    #[cold]
    fn explain(&self, e: Error, call: &Call<'_>, mark: u64) -> Error {
        let e = e.with("engine", self.engine.label.clone());
        if !matches!(e.kind(), Kind::Inference | Kind::Cuda | Kind::OutOfMemory) {
            return e;
        }
        let bound: Vec<String> = call
            .inputs
            .iter()
            .enumerate()
            .map(|(k, v)| format!("{} {v}", self.input(k).name))
            .collect();
        let e = if e.field("log").is_none() {
            e.with_log(crate::log::TENSORRT.since(mark))
        } else {
            e
        };
        e.context(format!(
            "engine '{}' with {}",
            self.engine.label,
            if bound.is_empty() { "no inputs".into() } else { bound.join(", ") }
        ))
        .with("bound", bound)
    }

    fn run_entered(&self, call: &Call<'_>) -> Result<Finished> {
        if let Some(handle) = call.stream {
            if let Some(id) = Stream::borrowed(handle).capture_id()? {
                return self.run_into_capture(call, handle, id);
            }
        }
        if let Some(done) = self.replay_at_once(call)? {
            return Ok(done);
        }
        let mut session = self.checkout(call.stream, call.timeout)?;
        let out = self.run_on(&mut session, call);
        if let Err(e) = &out {
            // Nothing is known of the context's state now: bind everything again next time.
            session.context.forget();
            session.shapes = None;
            session.settle(e);
        }
        out
    }

    /// The steady state of graphs: inputs that are bound as they are, a graph for their addresses, nobody holding its outputs.
    /// Needs no session. `None`: not that case.
    fn replay_at_once(&self, call: &Call<'_>) -> Result<Option<Finished>> {
        let (Some(stream), Outputs::Engine) = (call.stream, call.outputs) else {
            return Ok(None);
        };
        if self.graphs_off || self.has_host_inputs || self.options.memory.is_some() || call.inputs.len() > 16 {
            return Ok(None);
        }
        let mut addresses = [0u64; 16];
        for (k, v) in call.inputs.iter().enumerate() {
            if !is_ready(self.input(k), v, self.device.ordinal) {
                return Ok(None);
            }
            addresses[k] = v.ptr;
        }
        let resolved = {
            let signatures = locked(&self.signatures);
            let same = |r: &&Arc<Resolved>| r.dims.iter().zip(call.inputs).all(|(d, v)| *d == v.dims);
            match signatures.list.iter().find(same) {
                Some(r) => Arc::clone(r),
                None => return Ok(None),
            }
        };
        let key = KeyRef {
            shapes: resolved.id,
            addresses: &addresses[..call.inputs.len()],
            host_outputs: call.to_host,
        };
        let mut graphs = locked(&self.graphs);
        let Some(i) = graphs.free(key) else { return Ok(None) };
        let stream = Stream::borrowed(stream);
        let entry = graphs.entry(i);
        if !self.order_replay(entry, &stream)? {
            return Ok(None);
        }
        entry.graph.launch(&stream)?;
        let outputs = self.replayed(entry, &resolved);
        // A wait for the result must not hold up other threads' replays.
        drop(graphs);
        self.finish(call, outputs, &stream).map(Some)
    }

    /// Puts `stream` behind everybody who may still read what this graph will overwrite. False when that is impossible
    /// now, because one of those streams is being captured.
    fn order_replay(&self, entry: &mut Entry, stream: &Stream) -> Result<bool> {
        let alone = self.seen.note(stream.handle());
        if !alone || entry.set.buffers.iter().any(|b| b.has_announced()) {
            // Readers of the last result that were on another stream, and the last replay itself.
            let mut announced: Vec<u64> = entry.set.buffers.iter().flat_map(|b| b.take_announced()).collect();
            let count = announced.len();
            announced.push(entry.last_stream);
            let ordered = self.seen.order_after_all(stream, &announced);
            if !matches!(ordered, Ok(true)) {
                // Still to be waited for, by whoever reuses the set.
                if let Some(b) = entry.set.buffers.first() {
                    b.announce(&announced[..count]);
                }
                return ordered;
            }
        }
        entry.last_stream = stream.handle();
        Ok(true)
    }

    /// The outputs of a graph that was just launched.
    fn replayed(&self, entry: &Entry, resolved: &Resolved) -> Vec<OwnedTensor> {
        Stats::add(&self.stats.replays, 1);
        let owned = |(k, plan): (usize, &OutputPlan)| {
            let b = &entry.set.buffers[k];
            self.owned(k, b.ptr(), b.host(), plan.dims, Arc::clone(&entry.set) as Arc<OutputSet>)
        };
        resolved.outputs.iter().enumerate().map(owned).collect()
    }

    /// The resolved shapes of these inputs, checked. In the steady state this compares, and computes nothing.
    fn resolve(&self, session: &mut Session, inputs: &[TensorView]) -> Result<Arc<Resolved>> {
        let values = |v: &TensorView, io: &IoTensor| -> Vec<u8> {
            if !io.host {
                return Vec::new();
            }
            let mut bytes = vec![0u8; v.bytes().unwrap_or(0) as usize];
            copy_packed(bytes.as_mut_ptr() as u64, v);
            bytes
        };
        let host: Vec<Vec<u8>> = if self.has_host_inputs {
            inputs.iter().enumerate().map(|(k, v)| values(v, self.input(k))).collect()
        } else {
            Vec::new()
        };
        {
            let mut signatures = locked(&self.signatures);
            let same = |r: &Resolved| r.dims.iter().zip(inputs).all(|(d, v)| *d == v.dims) && r.values == host;
            if let Some(i) = signatures.list.iter().position(|r| same(r)) {
                if i > 0 {
                    let r = signatures.list.remove(i);
                    signatures.list.insert(0, r);
                }
                return Ok(Arc::clone(&signatures.list[0]));
            }
        }
        self.resolve_new(session, inputs, host)
    }

    #[cold]
    fn resolve_new(&self, session: &mut Session, inputs: &[TensorView], values: Vec<Vec<u8>>) -> Result<Arc<Resolved>> {
        Stats::add(&self.stats.new_shapes, 1);
        let io: Vec<&IoTensor> = self.inputs.iter().map(|&i| &self.engine.io[i]).collect();
        let dims: Vec<Dims> = inputs.iter().map(|v| v.dims).collect();
        let profile = choose_profile(&io, &dims, self.options.profile, self.engine.profiles)?;
        let mut resolved = Resolved {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            dims,
            values,
            profile,
            outputs: Vec::new(),
            not_graphable: self
                .has_host_inputs
                .then_some("the engine has host shape tensors, whose values a graph would freeze"),
        };
        // Switching the profile is stream-ordered: on the session's own stream, behind the session's last work.
        session.order(&Stream::borrowed(session.stream.handle()))?;
        let stream = Stream::borrowed(session.stream.handle());
        self.set_shapes(session, &resolved, &stream)?;
        session.context.infer_shapes()?;
        for &o in &self.outputs {
            let plan = OutputPlan::new(&self.engine.io[o], session.context.shape(o)?)?;
            if plan.data_dependent {
                resolved.not_graphable = Some("an output's shape depends on the data");
            }
            if self.engine.io[o].host {
                resolved.not_graphable = Some("an output is a host tensor");
            }
            resolved.outputs.push(plan);
        }
        let resolved = Arc::new(resolved);
        let mut signatures = locked(&self.signatures);
        signatures.list.insert(0, Arc::clone(&resolved));
        signatures.list.truncate(SIGNATURES);
        Ok(resolved)
    }

    fn set_shapes(&self, session: &mut Session, resolved: &Resolved, stream: &Stream) -> Result<()> {
        if session.shapes == Some(resolved.id) {
            return Ok(());
        }
        session.shapes = None;
        session.context.set_profile(resolved.profile, stream)?;
        for (k, &i) in self.inputs.iter().enumerate() {
            session.context.set_shape(i, &resolved.dims[k])?;
            if self.has_host_inputs && self.engine.io[i].host {
                let changed = session.values[i] != resolved.values[k];
                if changed {
                    session.values[i].clone_from(&resolved.values[k]);
                }
                // TensorRT wants an address even for no values.
                let address = if session.values[i].is_empty() {
                    self.nothing.ptr()
                } else {
                    session.values[i].as_ptr() as u64
                };
                session.context.set_address(i, address, changed)?;
            }
        }
        session.shapes = Some(resolved.id);
        Ok(())
    }

    fn host_path(&self, v: &TensorView, io: &IoTensor, waits: bool) -> Result<HostPath> {
        let integrated = self.device.info.integrated;
        let mode = self.options.policy.host;
        let plain = v.dtype == io.dtype;
        let locked = page_locked(v)?;
        let aligned = |p: u64| p.is_multiple_of(super::plan::ALIGNMENT);
        Ok(match (mode, locked) {
            (HostMode::Mapped, None) => {
                return Err(Error::input(
                    Kind::Device,
                    &io.name,
                    "pageable host memory",
                    "page-locked memory (host=\"mapped\")",
                    "Make the array with jetrt.pinned_empty(shape, dtype), or load the engine with host=\"auto\".",
                ))
            }
            (HostMode::Mapped, Some(p)) => HostPath::InPlace(p),
            (HostMode::Auto, Some(p)) if integrated && (!plain || aligned(p)) => HostPath::InPlace(p),
            (HostMode::Auto, _) if integrated => HostPath::Mapped,
            // Only when this call waits: otherwise the caller could change its array before it was read.
            (_, Some(_)) if waits => HostPath::Direct,
            _ => HostPath::Staged,
        })
    }

    fn run_on(&self, session: &mut Session, call: &Call<'_>) -> Result<Finished> {
        let resolved = self.resolve(session, call.inputs)?;
        let all_ready = call
            .inputs
            .iter()
            .enumerate()
            .all(|(k, v)| is_ready(self.input(k), v, self.device.ordinal));
        // The addresses to bind; staged inputs have theirs before anything is enqueued.
        let mut addresses = [0u64; 16];
        let mut more;
        let total = call.inputs.len() + if let Outputs::Given(g) = call.outputs { g.len() } else { 0 };
        let addresses: &mut [u64] = if total <= addresses.len() {
            &mut addresses[..total]
        } else {
            more = vec![0u64; total];
            &mut more
        };
        let mut staged: Vec<(usize, Need, HostPath)> = Vec::new();
        if all_ready {
            for (a, v) in addresses.iter_mut().zip(call.inputs) {
                *a = v.ptr;
            }
        } else {
            for (k, v) in call.inputs.iter().enumerate() {
                addresses[k] = self.plan_input(session, k, v, call, &mut staged)?;
            }
        }
        if let Outputs::Given(given) = call.outputs {
            self.check_given(&resolved, given)?;
            for (a, v) in addresses[call.inputs.len()..].iter_mut().zip(given) {
                *a = if v.ptr == 0 { self.nothing.ptr() } else { v.ptr };
            }
        }

        let mut capture = false;
        if !self.graphs_off {
            let key = KeyRef {
                shapes: resolved.id,
                addresses,
                host_outputs: call.to_host,
            };
            let graphable = match resolved.not_graphable {
                None if matches!(call.outputs, Outputs::Engine) && self.options.outputs == OutputMode::Fresh => {
                    Some("outputs=\"fresh\" gives every result a new address")
                }
                // Mapped or kernel-read memory of the caller's is part of the key by address; a first cast is a kernel before the graph.
                other => other,
            };
            match graphable {
                None => {
                    let mut graphs = locked(&self.graphs);
                    match graphs.decide(key) {
                        Decision::Replay(i) => {
                            if let Some((outputs, stream)) = self.replay(session, graphs.entry(i), &resolved, call, &staged)? {
                                drop(graphs);
                                return self.finish(call, outputs, &stream);
                            }
                        }
                        Decision::Capture => capture = true,
                        Decision::Eager => {}
                    }
                    drop(graphs);
                    self.report_wrong_graphs();
                }
                Some(why) => self.not_graphable(&resolved, why)?,
            }
            if capture && self.options.graphs == GraphMode::Require {
                // Never eager: capture, compare (waiting), and run the call by the graph itself.
                self.require_graph(session, &resolved, call, addresses, &staged)?;
                let mut graphs = locked(&self.graphs);
                if let Decision::Replay(i) = graphs.decide(KeyRef {
                    shapes: resolved.id,
                    addresses,
                    host_outputs: call.to_host,
                }) {
                    if let Some((outputs, stream)) = self.replay(session, graphs.entry(i), &resolved, call, &staged)? {
                        drop(graphs);
                        return self.finish(call, outputs, &stream);
                    }
                }
                return Err(
                    Error::new(Kind::GraphCapture, "graphs=\"require\": the captured graph could not be replayed")
                        .with("reason", "not replayable"),
                );
            }
            if self.options.graphs == GraphMode::Require {
                let reason = self.failure_of(&resolved).unwrap_or_else(|| "a capture failed before".into());
                return Err(Error::new(
                    Kind::GraphCapture,
                    format!("graphs=\"require\", and this call cannot be a graph: {reason}. Use graphs=\"auto\" to run it eagerly."),
                )
                .with("reason", reason));
            }
        }
        self.eager(session, &resolved, call, addresses, &staged, capture)
    }

    /// What must happen to one input that cannot be bound as it is, and the address that will be bound.
    fn plan_input(
        &self,
        session: &mut Session,
        k: usize,
        v: &TensorView,
        call: &Call<'_>,
        staged: &mut Vec<(usize, Need, HostPath)>,
    ) -> Result<u64> {
        let io = self.input(k);
        let n = need(io, v, self.device.ordinal, &self.options.policy)?;
        let t = self.inputs[k];
        match n {
            Need::HostValues => Ok(0),
            Need::Bind => Ok(if v.elements() == 0 { self.nothing.ptr() } else { v.ptr }),
            _ if v.elements() == 0 => Ok(self.nothing.ptr()),
            Need::Pack => {
                let bytes = io.dtype.bytes(v.elements()).unwrap_or(0);
                staged.push((k, n, HostPath::Direct));
                session.packed(t, bytes, self.device, &io.name, &self.stats)
            }
            Need::Host => {
                let path = self.host_path(v, io, call.to_host || call.synchronize)?;
                let plain = v.dtype == io.dtype;
                staged.push((k, n, path));
                match path {
                    HostPath::InPlace(p) if plain => Ok(p),
                    HostPath::Mapped if plain => Ok(session.pinned(t, v.bytes().unwrap_or(0), self.device, &io.name, &self.stats)?.1),
                    _ => session.packed(t, io.dtype.bytes(v.elements()).unwrap_or(0), self.device, &io.name, &self.stats),
                }
            }
        }
    }

    /// Enqueues copies and casts of the inputs that need them; fills in addresses that were not known before.
    fn stage(
        &self,
        session: &mut Session,
        call: &Call<'_>,
        staged: &[(usize, Need, HostPath)],
        addresses: &mut [u64],
        stream: &Stream,
    ) -> Result<()> {
        for &(k, n, path) in staged {
            let (io, v, t) = (self.input(k), &call.inputs[k], self.inputs[k]);
            let cast = v.dtype != io.dtype;
            let mut source = *v;
            if n == Need::Host {
                source = session.stage_host(t, v, path, cast, &io.name, self.device, stream, &self.stats)?;
                if !v.contiguous {
                    Stats::add(&self.stats.strided_copies, 1);
                }
                if !cast {
                    addresses[k] = source.ptr;
                    continue;
                }
            } else if !v.contiguous || !cast {
                Stats::add(&self.stats.strided_copies, 1);
            }
            if cast {
                Stats::add(&self.stats.casts, 1);
            }
            let bytes = io.dtype.bytes(v.elements()).unwrap_or(0);
            let dst = session.packed(t, bytes, self.device, &io.name, &self.stats)?;
            if cast || !source.contiguous {
                self.kernel.launch(dst, &source, io.dtype, stream)?;
            } else {
                copy_on_device(dst, source.ptr, bytes, stream)?;
            }
            addresses[k] = dst;
        }
        Ok(())
    }

    /// Page-locked staging memory that the engine (or a cast) reads in place may be refilled only behind this point.
    fn mark_reading(&self, session: &mut Session, staged: &[(usize, Need, HostPath)], stream: &Stream) -> Result<()> {
        for &(k, n, path) in staged {
            if n == Need::Host && path == HostPath::Mapped {
                session.staging[self.inputs[k]].reading(self.device, stream)?;
            }
        }
        Ok(())
    }

    /// `out=`: exactly the result's type, shape and layout.
    fn check_given(&self, resolved: &Resolved, given: &[TensorView]) -> Result<()> {
        for (k, v) in given.iter().enumerate() {
            let (io, plan) = (self.output(k), &resolved.outputs[k]);
            let wrong = |kind: Kind, found: String, allowed: String| {
                let e = Error::input(kind, &io.name, found, allowed, "Pass a tensor of exactly that kind as out=.");
                Err(e.context("out="))
            };
            if plan.data_dependent {
                return wrong(
                    Kind::Shape,
                    "a tensor".into(),
                    "no out= for an output whose shape depends on the data".into(),
                );
            }
            if v.dtype != io.dtype {
                return wrong(Kind::DType, v.dtype.name().into(), io.dtype.name().into());
            }
            if v.dims != plan.dims {
                return wrong(Kind::Shape, v.dims.to_string(), plan.dims.to_string());
            }
            if !v.contiguous || !v.ptr.is_multiple_of(super::plan::ALIGNMENT) {
                return wrong(
                    Kind::Layout,
                    v.to_string(),
                    format!("row-major, at a multiple of {} bytes", super::plan::ALIGNMENT),
                );
            }
            if v.place != Place::Device(self.device.ordinal) {
                return wrong(Kind::Device, v.place.to_string(), format!("cuda:{}", self.device.ordinal));
            }
        }
        Ok(())
    }

    /// Launches a graph on the caller's stream; the outputs and that stream. `None`: it cannot be ordered now, run eagerly.
    fn replay(
        &self,
        session: &mut Session,
        entry: &mut Entry,
        resolved: &Resolved,
        call: &Call<'_>,
        staged: &[(usize, Need, HostPath)],
    ) -> Result<Option<(Vec<OwnedTensor>, Stream)>> {
        let stream = Stream::borrowed(call.stream.unwrap_or(session.stream.handle()));
        if !self.order_replay(entry, &stream)? {
            return Ok(None);
        }
        if !staged.is_empty() || self.options.memory.is_some() {
            session.order(&stream)?;
            let mut ignored = entry.key.addresses.clone();
            self.stage(session, call, staged, &mut ignored, &stream)?;
        }
        entry.graph.launch(&stream)?;
        if !staged.is_empty() {
            self.mark_reading(session, staged, &stream)?;
        }
        let outputs = if matches!(call.outputs, Outputs::Engine) {
            self.replayed(entry, resolved)
        } else {
            Stats::add(&self.stats.replays, 1);
            Vec::new()
        };
        Ok(Some((outputs, stream)))
    }

    fn owned(&self, k: usize, ptr: u64, host: Option<u64>, dims: Dims, owner: Arc<dyn Send + Sync>) -> OwnedTensor {
        let view = TensorView::new(ptr, self.output(k).dtype, dims, None, Place::Device(self.device.ordinal));
        OwnedTensor {
            view,
            host_ptr: host,
            owner,
        }
    }

    /// What follows the engine's work: results to the host, waits, the event that frees inputs.
    fn finish(&self, call: &Call<'_>, mut outputs: Vec<OwnedTensor>, stream: &Stream) -> Result<Finished> {
        if call.to_host && matches!(call.outputs, Outputs::Engine) {
            for (k, out) in outputs.iter_mut().enumerate() {
                if out.host_ptr.is_none() {
                    let bytes = self.output(k).dtype.bytes(out.view.elements()).unwrap_or(0);
                    let lease = self
                        .pool
                        .lease(k, bytes, Where::Host, stream, true, &self.output(k).name, &self.stats)?;
                    let (host, ptr) = (lease.buffer().host().unwrap_or(0), lease.buffer().ptr());
                    copy_to_host(host, out.view.ptr, bytes, stream)?;
                    Stats::add(&self.stats.device_to_host_bytes, bytes);
                    *out = self.owned(k, ptr, Some(host), out.view.dims, lease);
                }
                out.view.place = Place::Host;
                out.view.ptr = out.host_ptr.unwrap_or(0);
            }
        }
        let mut wait = call.to_host || call.synchronize;
        for (k, out) in outputs.iter_mut().enumerate() {
            // Host tensors (shapes) are written by the host side of TensorRT, complete when the stream is.
            if let (true, Some(host)) = (self.output(k).host, out.host_ptr) {
                out.view.place = Place::Host;
                out.view.ptr = host;
                wait = true;
            }
        }
        if wait {
            Stats::add(&self.stats.waits, 1);
            stream.synchronize()?;
        }
        let done = if call.want_done && !wait {
            let e = Event::new(self.device)?;
            e.record(stream)?;
            Some(e)
        } else {
            None
        };
        Ok(Finished {
            outputs,
            done,
            stream: stream.handle(),
        })
    }

    fn eager(
        &self,
        session: &mut Session,
        resolved: &Arc<Resolved>,
        call: &Call<'_>,
        addresses: &mut [u64],
        staged: &[(usize, Need, HostPath)],
        capture: bool,
    ) -> Result<Finished> {
        let caller = Stream::borrowed(call.stream.unwrap_or(session.stream.handle()));
        let alone = self.seen.note(caller.handle());
        let join = caller.handle() == LEGACY && !self.options.legacy_direct;
        let work = if join {
            Stream::borrowed(session.legacy.handle())
        } else {
            Stream::borrowed(caller.handle())
        };
        session.order(&work)?;
        self.stage(session, call, staged, addresses, &work)?;
        self.set_shapes(session, resolved, &work)?;
        for (k, &i) in self.inputs.iter().enumerate() {
            if !self.engine.io[i].host {
                session.context.set_address(i, addresses[k], false)?;
            }
        }
        let targets = self.bind_outputs(session, resolved, call, &addresses[call.inputs.len()..], &work, alone)?;
        let mark = crate::log::TENSORRT.mark();
        let enqueued = session.context.enqueue(&work);
        let outputs = self.collect_outputs(session, resolved, targets, enqueued.is_ok());
        self.mark_reading(session, staged, &work)?;
        enqueued.map_err(|e| session.context.explain(e, mark))?;
        let outputs = outputs?;
        Stats::add(&self.stats.eager, 1);
        if capture {
            self.capture_after(session, resolved, call, addresses, &outputs, &work);
        }
        // What must be waited for is waited for where it was made.
        let at = if call.to_host || call.synchronize || call.want_done {
            &work
        } else {
            &caller
        };
        self.finish(
            call,
            if matches!(call.outputs, Outputs::Given(_)) {
                Vec::new()
            } else {
                outputs
            },
            at,
        )
    }

    /// Binds every output: a leased buffer, the caller's memory, scratch memory, or an allocator where only the data decide.
    fn bind_outputs(
        &self,
        session: &mut Session,
        resolved: &Resolved,
        call: &Call<'_>,
        given: &[u64],
        work: &Stream,
        alone: bool,
    ) -> Result<Targets> {
        let mapped = call.to_host && self.device.info.integrated;
        let mut targets = Targets::new();
        for (k, plan) in resolved.outputs.iter().enumerate() {
            let (io, t) = (self.output(k), self.outputs[k]);
            if let Outputs::Given(views) = call.outputs {
                session.context.set_address(t, given[k], false)?;
                targets.push(Target::Given(views[k]));
                continue;
            }
            let place = if io.host || mapped { Where::Host } else { Where::Device };
            if plan.data_dependent {
                targets.push(self.arm_allocator(session, k, place, work.handle(), alone)?);
                continue;
            }
            let target = if place == Where::Device && call.to_host {
                Target::Scratch(session.scratch(t, plan.bytes, self.device, &io.name, &self.stats)?)
            } else if self.options.outputs == OutputMode::Fresh {
                Target::Fresh(Buffer::new(self.device, plan.bytes, place, &format!("output '{}'", io.name))?)
            } else {
                Target::Leased(self.pool.lease(k, plan.bytes, place, work, alone, &io.name, &self.stats)?)
            };
            // A host output is written by the host: it gets the host's address.
            let address = match &target {
                Target::Scratch(p) => *p,
                Target::Fresh(b) => {
                    if io.host {
                        b.host().unwrap_or(0)
                    } else {
                        b.ptr()
                    }
                }
                Target::Leased(l) => {
                    if io.host {
                        l.buffer().host().unwrap_or(0)
                    } else {
                        l.buffer().ptr()
                    }
                }
                Target::Given(_) | Target::Allocated(_) => 0,
            };
            session.context.set_address(t, address, false)?;
            targets.push(target);
        }
        Ok(targets)
    }

    fn arm_allocator(&self, session: &mut Session, k: usize, place: Where, stream: u64, alone: bool) -> Result<Target> {
        let slot: Arc<Mutex<Option<Arc<super::pool::Lease>>>> = Arc::default();
        let (into, pool, stats, name) = (
            Arc::clone(&slot),
            Arc::clone(&self.pool),
            Arc::clone(&self.stats),
            self.output(k).name.clone(),
        );
        let allocator = session.context.allocator(self.outputs[k])?;
        allocator.arm(Box::new(move |bytes| {
            let lease = pool.lease(k, bytes, place, &Stream::borrowed(stream), alone, &name, &stats)?;
            let address = lease.buffer().ptr();
            *locked(&into) = Some(lease);
            Ok(address)
        }));
        Ok(Target::Allocated(slot))
    }

    fn collect_outputs(&self, session: &mut Session, resolved: &Resolved, targets: Targets, enqueued: bool) -> Result<Vec<OwnedTensor>> {
        let mut outputs = Vec::with_capacity(targets.len());
        let mut failed = None;
        for (k, target) in targets.into_iter().enumerate() {
            let dims = resolved.outputs[k].dims;
            let nobody: fn() -> Arc<dyn Send + Sync> = || Arc::new(());
            outputs.push(match target {
                Target::Given(v) => self.owned(k, v.ptr, None, dims, nobody()),
                Target::Scratch(p) => self.owned(k, p, None, dims, nobody()),
                Target::Fresh(b) => self.owned(k, b.ptr(), b.host(), dims, b),
                Target::Leased(l) => self.owned(k, l.buffer().ptr(), l.buffer().host(), dims, l),
                Target::Allocated(slot) => {
                    // Always disarmed, so that a failed call leaves nothing behind in the context.
                    let told = session.context.allocator(self.outputs[k]).and_then(|a| a.disarm());
                    let lease = locked(&slot).take();
                    match (told, lease) {
                        (Err(e), _) => {
                            failed.get_or_insert(e);
                            self.owned(k, 0, None, dims, nobody())
                        }
                        (Ok(Some(d)), Some(l)) if d.is_static() => self.owned(k, l.buffer().ptr(), l.buffer().host(), d, l),
                        (Ok(Some(d)), None) if d.volume() == Some(0) => self.owned(k, self.nothing.ptr(), None, d, nobody()),
                        (Ok(d), _) => {
                            if enqueued {
                                let d = d.map_or("no shape".into(), |d| d.to_string());
                                failed.get_or_insert(Error::new(
                                    Kind::Inference,
                                    format!("output '{}': TensorRT told {d} for this data-dependent output", self.output(k).name),
                                ));
                            }
                            self.owned(k, 0, None, dims, nobody())
                        }
                    }
                }
            });
        }
        match failed {
            Some(e) => Err(e),
            None => Ok(outputs),
        }
    }

    // ------------------------------------------------------------------------------------------------------------ graphs

    fn signature_text(&self, resolved: &Resolved) -> String {
        resolved
            .dims
            .iter()
            .enumerate()
            .map(|(k, d)| format!("{}{d}", self.input(k).name))
            .collect::<Vec<_>>()
            .join(" ")
    }

    fn failure_of(&self, resolved: &Resolved) -> Option<String> {
        locked(&self.stats.graph_failures).get(&self.signature_text(resolved)).cloned()
    }

    /// A signature that can have no graph: said once in the stats, an error when graphs are required.
    fn not_graphable(&self, resolved: &Resolved, why: &'static str) -> Result<()> {
        let mut failures = locked(&self.stats.graph_failures);
        if failures.len() < 256 {
            // Only built for a signature that is not there yet: shapes of these engines may change at each call.
            let text = self.signature_text(resolved);
            failures.entry(text).or_insert_with(|| why.into());
        }
        Ok(())
    }

    fn report_wrong_graphs(&self) {
        let wrong = locked(&self.graphs).take_wrong();
        if let Some(entry) = wrong {
            self.stats.graph_failed(
                format!("{:?}", entry.dims),
                "the replayed graph's outputs differ from eager ones".into(),
            );
            let last = entry.last_stream;
            self.background.free_after(entry, &[last]);
        }
    }

    /// Captures a graph of the call that was just enqueued on `work`; a failure is remembered and reported, never raised.
    #[allow(clippy::too_many_arguments)]
    fn capture_after(
        &self,
        session: &mut Session,
        resolved: &Arc<Resolved>,
        call: &Call<'_>,
        addresses: &[u64],
        outputs: &[OwnedTensor],
        work: &Stream,
    ) {
        let key = KeyRef {
            shapes: resolved.id,
            addresses,
            host_outputs: call.to_host,
        };
        match self.capture(session, resolved, call, addresses, outputs, work) {
            Ok((entry, comparison)) => {
                let verdict = Arc::clone(&entry.verdict);
                self.keep(entry);
                self.compare_in_background(comparison, verdict);
            }
            Err(e) => {
                locked(&self.graphs).fail(key);
                self.stats.graph_failed(self.signature_text(resolved), e.message().to_string());
            }
        }
    }

    fn keep(&self, entry: Entry) {
        Stats::add(&self.stats.captures, 1);
        let out = locked(&self.graphs).insert(entry);
        Stats::add(&self.stats.graph_evictions, out.len() as u64);
        for entry in out {
            let last = entry.last_stream;
            self.background.free_after(entry, &[last]);
        }
    }

    /// The graph of one call, replayed once beside the eager run: what remains is to compare the two.
    fn capture(
        &self,
        session: &mut Session,
        resolved: &Arc<Resolved>,
        call: &Call<'_>,
        addresses: &[u64],
        eager: &[OwnedTensor],
        work: &Stream,
    ) -> Result<(Entry, Comparison)> {
        let own_memory = self.options.memory.is_none();
        let sizes: Vec<u64> = resolved.outputs.iter().map(|p| p.bytes).collect();
        let given = matches!(call.outputs, Outputs::Given(_));
        let set_bytes: u64 = if given { 0 } else { sizes.iter().sum() };
        let bytes = set_bytes + if own_memory { self.engine.device_memory } else { 0 };
        {
            let graphs = locked(&self.graphs);
            if !graphs.fits(bytes) {
                return Err(Error::new(
                    Kind::GraphCapture,
                    format!(
                        "a graph of this call needs {bytes} bytes (context and outputs) and graph_bytes allows {}",
                        graphs.limit()
                    ),
                )
                .with("reason", "graph_bytes"));
            }
        }
        let place = if call.to_host && self.device.info.integrated {
            Where::Host
        } else {
            Where::Device
        };
        let total: u64 = sizes.iter().map(|b| b.div_ceil(512) * 512).sum();
        let mut trial = Trial {
            graph: None,
            context: self.engine.create_context(own_memory)?,
            set: OutputSet { buffers: Vec::new() },
            snapshot: DeviceBuffer::new(self.device, total, "copy of the eager outputs")?,
            replayed: DeviceBuffer::new(self.device, total, "copy of the replayed outputs")?,
            stream: Stream::new(self.device)?,
        };
        if let Some(m) = &self.options.memory {
            trial.context.set_device_memory(m.buffer.ptr(), m.buffer.bytes())?;
        }
        let mut targets = Vec::new();
        for (k, plan) in resolved.outputs.iter().enumerate() {
            if given {
                targets.push(eager[k].view.ptr);
            } else {
                let name = format!("output '{}' of a graph", self.output(k).name);
                let b = Buffer::new(self.device, plan.bytes, place, &name)?;
                targets.push(b.ptr());
                trial.set.buffers.push(b);
            }
        }
        let from: Vec<u64> = eager.iter().map(|o| o.view.ptr).collect();
        let tried = self
            .try_graph(session, resolved, addresses, &from, &targets, &mut trial, given, work)
            .and_then(|()| {
                trial
                    .graph
                    .take()
                    .ok_or_else(|| Error::new(Kind::GraphCapture, "no graph was captured"))
            });
        // What the caller enqueues next may overwrite the inputs that the trial reads: behind it. That goes for one that failed, too.
        let ordered = session.leave.record(&trial.stream).and_then(|()| work.wait(&session.leave));
        let graph = match tried.and_then(|graph| ordered.map(|()| graph)) {
            Ok(graph) => graph,
            Err(e) => {
                // Seldom: the caller waits here when its stream could not be told to.
                let _relaxed = Relaxed::enter();
                let _ = trial.stream.synchronize();
                let handle = trial.stream.handle();
                self.background.free_after(trial, &[handle]);
                return Err(e);
            }
        };
        let Trial {
            context,
            set,
            snapshot,
            replayed,
            stream,
            ..
        } = trial;
        let key = Graphs::key_of(KeyRef {
            shapes: resolved.id,
            addresses,
            host_outputs: call.to_host,
        });
        let entry = Entry::new(
            key,
            graph,
            context,
            Arc::new(set),
            Arc::default(),
            resolved.dims.clone(),
            bytes,
            work.handle(),
        );
        let comparison = Comparison {
            snapshot,
            replayed,
            bytes: total,
            stream,
            device: self.device,
        };
        Ok((entry, comparison))
    }

    /// On the trial's own stream, behind the eager run on `work`: a copy of the eager results, a warm-up, the capture, and a
    /// replay whose results are copied too.
    #[allow(clippy::too_many_arguments)]
    fn try_graph(
        &self,
        session: &mut Session,
        resolved: &Resolved,
        addresses: &[u64],
        eager: &[u64],
        targets: &[u64],
        trial: &mut Trial,
        given: bool,
        work: &Stream,
    ) -> Result<()> {
        let (stream, context) = (&trial.stream, &mut trial.context);
        session.leave.record(work)?;
        stream.wait(&session.leave)?;
        let sizes = || resolved.outputs.iter().map(|p| p.bytes);
        let gather = |into: &DeviceBuffer, from: &[u64]| -> Result<()> {
            let mut at = into.ptr();
            for (p, n) in from.iter().zip(sizes()) {
                copy_on_device(at, *p, n, stream)?;
                at += n.div_ceil(512) * 512;
            }
            Ok(())
        };
        fill(trial.snapshot.ptr(), 0, trial.snapshot.bytes(), stream)?;
        fill(trial.replayed.ptr(), 0, trial.replayed.bytes(), stream)?;
        gather(&trial.snapshot, eager)?;
        context.set_profile(resolved.profile, stream)?;
        for (k, &i) in self.inputs.iter().enumerate() {
            context.set_shape(i, &resolved.dims[k])?;
            context.set_address(i, addresses[k], false)?;
        }
        for (k, &t) in self.outputs.iter().enumerate() {
            context.set_address(t, targets[k], false)?;
        }
        // The first enqueue after a change of shapes updates the context and must not be captured.
        let mark = crate::log::TENSORRT.mark();
        context.enqueue(stream).map_err(|e| context.explain(e, mark))?;
        let capture = Capture::begin(stream)?;
        let enqueued = context.enqueue(stream);
        let graph = match enqueued {
            Ok(()) => capture.finish(self.device)?,
            Err(e) => {
                drop(capture);
                return Err(context.explain(e, mark));
            }
        };
        let graph = trial.graph.insert(graph);
        // A replay that writes nothing must not pass for equal.
        for (p, n) in targets.iter().zip(sizes()) {
            fill(*p, 0xA5, n, stream)?;
        }
        let launched = graph.launch(stream).and_then(|()| gather(&trial.replayed, targets));
        if given {
            // The caller's memory gets the eager result back, whatever the graph did.
            let mut at = trial.snapshot.ptr();
            for (p, n) in targets.iter().zip(sizes()) {
                copy_on_device(*p, at, n, stream)?;
                at += n.div_ceil(512) * 512;
            }
        }
        launched
    }

    fn compare_in_background(&self, comparison: Comparison, verdict: Arc<Verdict>) {
        self.background.run(move || {
            // A comparison that cannot be made counts as a difference: the graph is not used.
            verdict.set(comparison.equal().unwrap_or(false));
        });
    }

    /// Captures and compares, waiting for the result: for `prepare` and graphs="require".
    fn require_graph(
        &self,
        session: &mut Session,
        resolved: &Arc<Resolved>,
        call: &Call<'_>,
        addresses: &mut [u64],
        staged: &[(usize, Need, HostPath)],
    ) -> Result<()> {
        let given_views = if let Outputs::Given(g) = call.outputs { Some(g) } else { None };
        let eager_call = Call {
            outputs: given_views.map_or(Outputs::Engine, Outputs::Given),
            to_host: false,
            synchronize: false,
            want_done: false,
            ..*call
        };
        let caller = Stream::borrowed(call.stream.unwrap_or(session.stream.handle()));
        let finished = {
            let r = self.eager(session, resolved, &eager_call, addresses, staged, false)?;
            if let Some(given) = given_views {
                given
                    .iter()
                    .enumerate()
                    .map(|(k, v)| self.owned(k, v.ptr, None, v.dims, Arc::new(())))
                    .collect()
            } else {
                r.outputs
            }
        };
        let outcome = self
            .capture(session, resolved, call, addresses, &finished, &caller)
            .and_then(|(entry, comparison)| {
                Stats::add(&self.stats.waits, 1);
                match comparison.equal() {
                    Ok(true) => {
                        entry.verdict.set(true);
                        self.keep(entry);
                        Ok(())
                    }
                    other => {
                        // Waits for the replay first.
                        drop(comparison);
                        let last = entry.last_stream;
                        self.background.free_after(entry, &[last]);
                        Err(other.err().unwrap_or_else(|| {
                            Error::new(Kind::GraphCapture, "the replayed graph's outputs differ from eager ones")
                                .with("reason", "replay differs from eager")
                        }))
                    }
                }
            });
        outcome.map_err(|e| {
            locked(&self.graphs).fail(KeyRef {
                shapes: resolved.id,
                addresses,
                host_outputs: call.to_host,
            });
            self.stats.graph_failed(self.signature_text(resolved), e.message().to_string());
            if e.kind() == Kind::GraphCapture {
                e
            } else {
                Error::new(Kind::GraphCapture, format!("the call could not be captured: {}", e.message()))
                    .with("reason", e.message().to_string())
            }
        })
    }

    /// Resolves, warms up, captures and compares for these inputs before a live call needs it; waits for the result.
    pub fn prepare(&self, call: &Call<'_>) -> Result<Prepared> {
        if self.is_closed() {
            return Err(self.closed_error());
        }
        let _entered = self.device.enter()?;
        let mark = crate::log::TENSORRT.mark();
        let inner = |session: &mut Session| -> Result<Prepared> {
            let resolved = self.resolve(session, call.inputs)?;
            let mut staged = Vec::new();
            let mut addresses = vec![0u64; call.inputs.len()];
            for (k, v) in call.inputs.iter().enumerate() {
                addresses[k] = self.plan_input(session, k, v, call, &mut staged)?;
            }
            let fresh = self.options.outputs == OutputMode::Fresh;
            let fresh = fresh.then_some("outputs=\"fresh\" gives every result a new address");
            let off = self.graphs_off.then_some("graphs=\"off\"");
            let because = off.or(resolved.not_graphable).or(fresh).map(str::to_string);
            let because = match because {
                Some(why) => {
                    // Still warmed up: the first live call then only enqueues.
                    let quiet = Call {
                        to_host: false,
                        synchronize: true,
                        ..*call
                    };
                    self.eager(session, &resolved, &quiet, &mut addresses, &staged, false)?;
                    Some(why)
                }
                // Two output sets: the result of a call is usually still held when the next one begins.
                None => (0..2)
                    .find_map(|_| self.require_graph(session, &resolved, call, &mut addresses, &staged).err())
                    .map(|e| {
                        session.settle(&e);
                        e.message().to_string()
                    }),
            };
            if let (Some(why), GraphMode::Require) = (&because, self.options.graphs) {
                return Err(Error::new(
                    Kind::GraphCapture,
                    format!("graphs=\"require\", and this call cannot be a graph: {why}"),
                )
                .with("reason", why.clone()));
            }
            let outputs = resolved
                .outputs
                .iter()
                .enumerate()
                .map(|(k, p)| (self.output(k).name.clone(), p.dims))
                .collect();
            Ok(Prepared {
                profile: resolved.profile,
                outputs,
                eager_because: because,
            })
        };
        let prepared = self.checkout(call.stream, call.timeout).and_then(|mut session| {
            let prepared = inner(&mut session);
            if let Err(e) = &prepared {
                session.context.forget();
                session.shapes = None;
                session.settle(e);
            }
            prepared
        });
        prepared.map_err(|e| self.explain(e, call, mark))
    }

    pub fn graph_counts(&self) -> (usize, u64, bool) {
        let g = locked(&self.graphs);
        (g.len(), g.bytes(), g.thrashing())
    }

    // ------------------------------------------------------------------------------------------- captures of the caller's

    /// Inside a capture of the caller's: enqueue plainly. The context and the outputs belong to that graph from now on.
    fn run_into_capture(&self, call: &Call<'_>, handle: u64, id: u64) -> Result<Finished> {
        let refuse = |what: &str| Error::new(Kind::GraphCapture, format!("inside a capture of the caller's: {what}")).with("reason", what);
        if call.to_host || call.synchronize {
            return Err(refuse(
                "results for the host need a wait, which a capture cannot have; pass CUDA tensors and no synchronize",
            ));
        }
        let stream = Stream::borrowed(handle);
        let mut sessions = locked(&self.for_captures);
        let _relaxed = Relaxed::enter();
        let same = |s: &CaptureSession| s.capture == id && s.dims.iter().eq(call.inputs.iter().map(|v| &v.dims));
        let i = match sessions.iter().position(same) {
            Some(i) => i,
            None => {
                sessions.push(CaptureSession {
                    capture: id,
                    dims: call.inputs.iter().map(|v| v.dims).collect(),
                    session: Session::new(&self.engine, self.options.memory.as_ref(), &self.background)?,
                });
                sessions.len() - 1
            }
        };
        let session = &mut sessions[i].session;
        let resolved = self.resolve(session, call.inputs)?;
        if let Some(why) = resolved.not_graphable {
            return Err(refuse(why));
        }
        let mut addresses = Vec::with_capacity(call.inputs.len());
        let mut staged = Vec::new();
        for (k, v) in call.inputs.iter().enumerate() {
            if v.place == Place::Host {
                return Err(refuse(&format!("input '{}' is in host memory", self.input(k).name)));
            }
            addresses.push(self.plan_input(session, k, v, call, &mut staged)?);
        }
        self.warm_up(session, &resolved)?;
        self.stage(session, call, &staged, &mut addresses, &stream)?;
        for (k, &i) in self.inputs.iter().enumerate() {
            session.context.set_address(i, addresses[k], false)?;
        }
        let mut outputs = Vec::new();
        if let Outputs::Given(given) = call.outputs {
            self.check_given(&resolved, given)?;
            for (k, v) in given.iter().enumerate() {
                session.context.set_address(self.outputs[k], v.ptr, false)?;
            }
        } else {
            for (k, plan) in resolved.outputs.iter().enumerate() {
                let b = Buffer::new(self.device, plan.bytes, Where::Device, &format!("output '{}'", self.output(k).name))?;
                session.context.set_address(self.outputs[k], b.ptr(), false)?;
                locked(&self.pinned_for_captures).push(Arc::clone(&b));
                outputs.push(self.owned(k, b.ptr(), None, plan.dims, b));
            }
        }
        let mark = crate::log::TENSORRT.mark();
        session.context.enqueue(&stream).map_err(|e| session.context.explain(e, mark))?;
        Stats::add(&self.stats.captured_by_caller, 1);
        Ok(Finished {
            outputs,
            done: None,
            stream: handle,
        })
    }

    /// One enqueue on the session's own stream, with zeros for inputs (the caller's hold nothing yet while it captures): the
    /// first enqueue after a change of shapes cannot be captured.
    fn warm_up(&self, session: &mut Session, resolved: &Resolved) -> Result<()> {
        let stream = Stream::borrowed(session.stream.handle());
        let mut buffers = Vec::new();
        let done = self.warm_up_on(&stream, session, resolved, &mut buffers);
        // Also after a failure: part of the work may be under way, in memory that goes now.
        let waited = stream.synchronize();
        done.and(waited)
    }

    fn warm_up_on(&self, stream: &Stream, session: &mut Session, resolved: &Resolved, buffers: &mut Vec<DeviceBuffer>) -> Result<()> {
        self.set_shapes(session, resolved, stream)?;
        let mut zero = |bytes: u64| -> Result<u64> {
            let b = DeviceBuffer::new(self.device, bytes, "warm-up")?;
            let p = b.ptr();
            buffers.push(b);
            fill(p, 0, bytes, stream)?;
            Ok(p)
        };
        for (k, &i) in self.inputs.iter().enumerate() {
            let bytes = resolved.dims[k]
                .volume()
                .and_then(|n| self.engine.io[i].dtype.bytes(n))
                .unwrap_or(0);
            session.context.set_address(i, zero(bytes)?, false)?;
        }
        for (k, &t) in self.outputs.iter().enumerate() {
            session.context.set_address(t, zero(resolved.outputs[k].bytes)?, false)?;
        }
        let mark = crate::log::TENSORRT.mark();
        session.context.enqueue(stream).map_err(|e| session.context.explain(e, mark))
    }

    // ------------------------------------------------------------------------------------------------------------- close

    /// Waits for the engine's work and gives back everything but the outputs that somebody still holds.
    pub fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let _entered = self.device.enter_anyway();
        let _relaxed = Relaxed::enter();
        let sessions = self.sessions.close();
        let for_captures = std::mem::take(&mut *locked(&self.for_captures));
        // From here on nobody replays; what has been launched is waited for.
        let entries = locked(&self.graphs).clear();
        self.seen.wait_all();
        for s in sessions.iter().map(|s| &**s).chain(for_captures.iter().map(|c| &c.session)) {
            let _ = s.stream.synchronize();
            let _ = s.legacy.synchronize();
        }
        self.background.close();
        drop(entries);
        drop(sessions);
        drop(for_captures);
        drop(std::mem::take(&mut *locked(&self.pinned_for_captures)));
        self.pool.close();
        self.engine.release();
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        self.close();
    }
}

type Targets = SmallVec<[Target; 2]>;

/// Where one output of an eager call is written.
enum Target {
    Leased(Arc<super::pool::Lease>),
    Fresh(Arc<Buffer>),
    Scratch(u64),
    Given(TensorView),
    Allocated(Arc<Mutex<Option<Arc<super::pool::Lease>>>>),
}

/// What a capture needs, on trial: until its stream is done, everything stays. Fields drop in order: the graph first.
struct Trial {
    graph: Option<Graph>,
    context: Context,
    set: OutputSet,
    snapshot: DeviceBuffer,
    replayed: DeviceBuffer,
    stream: Stream,
}

/// Eager outputs and replayed outputs, to be compared bit by bit.
struct Comparison {
    snapshot: DeviceBuffer,
    replayed: DeviceBuffer,
    bytes: u64,
    stream: Stream,
    device: &'static Device,
}

impl Comparison {
    fn equal(&self) -> Result<bool> {
        let _entered = self.device.enter()?;
        let _relaxed = Relaxed::enter();
        let host = || PinnedBuffer::new(self.device, self.bytes, "comparison of graph and eager");
        let (a, b) = (host()?, host()?);
        let read = |to: &PinnedBuffer, from: &DeviceBuffer| copy_to_host(to.host(), from.ptr(), self.bytes, &self.stream);
        let copied = read(&a, &self.snapshot).and_then(|()| read(&b, &self.replayed));
        // Also after a failure: one copy may be under way.
        self.stream.synchronize()?;
        copied?;
        Ok(a.same_bytes(&b))
    }
}

impl Drop for Comparison {
    fn drop(&mut self) {
        let _entered = self.device.enter_anyway();
        let _relaxed = Relaxed::enter();
        let _ = self.stream.synchronize();
    }
}
