//! Running calls. The only place that orders streams.
//!
//! Which stream the work goes to: the caller's, where the call may be enqueued there directly. On the legacy default stream
//! TensorRT may add waits: then it is a stream of the session's that CUDA itself orders with the legacy stream both ways
//! (events would do the same and cost 1.1 µs more). A caller without a stream (numpy) gets the session's own. A graph is launched
//! on the caller's stream even when that is the legacy one.

use super::background::Background;
use super::callers_capture::ForCaptures;
use super::captured::Captured;
use super::graphs::{Decision, GraphMode, Graphs, KeyRef};
use super::plan::{is_ready, Need, Policy, ProfileChoice};
use super::pool::{forget_stream, OutputMode, Pool, Where};
use super::resolve::{Resolved, Signatures};
use super::session::{ContextMemory, Guard, HostPath, Session, Sessions};
use super::stats::Stats;
use super::streams::{Keep, Seen};
use crate::cuda::kernel::Kernel;
use crate::cuda::memory::{copy_to_host, DeviceBuffer};
use crate::cuda::{Device, Event, Relaxed, Stream, LEGACY, PER_THREAD};
use crate::error::{Error, Kind, Result};
use crate::tensor::{OwnedTensor, Place, TensorView};
use crate::trt::{Engine, IoTensor};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::thread::ThreadId;
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
    /// Enqueued into a capture of the caller's: nobody can wait for that, only for launches of the caller's graph.
    pub captured: bool,
}

pub struct Executor {
    pub engine: Arc<Engine>,
    pub(super) options: Options,
    pub(super) device: &'static Device,
    pub(super) kernel: Kernel,
    /// Positions of inputs and outputs in `engine.io`.
    pub inputs: Vec<usize>,
    pub outputs: Vec<usize>,
    pub(super) has_host_inputs: bool,
    pub(super) sessions: Sessions,
    pub(super) signatures: Mutex<Signatures>,
    pub(super) graphs: Mutex<Graphs>,
    pub(super) graphs_off: bool,
    pub(super) seen: Arc<Seen>,
    pub(super) pool: Arc<Pool>,
    /// An address for tensors without elements.
    pub(super) nothing: DeviceBuffer,
    /// For callers whose library has no stream, at import time.
    pub(super) front: Stream,
    /// The thread that called on its per-thread default stream, if one did.
    per_thread: OnceLock<ThreadId>,
    /// What captures of the caller's use, kept as long as the engine, or until the record of that capture is released.
    pub(super) for_captures: Mutex<ForCaptures>,
    /// Records of captures that this engine takes part in: they keep it alive.
    pub(super) records: Mutex<Vec<Weak<Captured>>>,
    pub(super) me: Weak<Executor>,
    /// The session that layers are measured in. Kept: a caller without a stream gets the session's, which the pool then knows.
    pub(super) for_layers: Mutex<Option<Session>>,
    pub(super) next_id: AtomicU64,
    pub(super) background: Arc<Background>,
    pub(super) closed: AtomicBool,
    pub stats: Arc<Stats>,
}

pub(super) fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Executor {
    pub fn new(engine: Engine, options: Options) -> Result<Arc<Executor>> {
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
        let kernel = Kernel::get(device)?;
        let nothing = DeviceBuffer::new(device, 512, "address of empty tensors")?;
        let front = Stream::new(device)?;
        let executor = Arc::new_cyclic(|me| Executor {
            kernel,
            has_host_inputs: inputs.iter().any(|&i| engine.io[i].host),
            sessions: Sessions::new(options.max_contexts.max(1)),
            signatures: Mutex::default(),
            graphs: Mutex::new(Graphs::new(options.graphs, options.warmup, options.graph_bytes)),
            graphs_off: options.graphs == GraphMode::Off,
            pool: Pool::new(device, Arc::clone(&seen), Arc::clone(&background), options.outputs, outputs.len()),
            seen,
            nothing,
            front,
            per_thread: OnceLock::new(),
            for_captures: Mutex::default(),
            records: Mutex::default(),
            me: Weak::clone(me),
            for_layers: Mutex::default(),
            next_id: AtomicU64::new(0),
            background: Arc::clone(&background),
            closed: AtomicBool::new(false),
            stats: Arc::new(Stats::default()),
            inputs,
            outputs,
            device,
            engine,
            options,
        });
        // The first context now, so that loading says whether there is memory for it.
        drop(executor.checkout(None, None)?);
        Ok(executor)
    }

    pub(super) fn input(&self, k: usize) -> &IoTensor {
        &self.engine.io[self.inputs[k]]
    }

    pub(super) fn output(&self, k: usize) -> &IoTensor {
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

    pub(super) fn checkout(&self, stream: Option<u64>, timeout: Option<Duration>) -> Result<Guard<'_>> {
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
        if handle != PER_THREAD {
            self.seen.note_kept(Stream::borrowed(handle).handle(), keep);
        }
    }

    /// Work on `reader` from now on starts after what is enqueued on `producer` by now.
    pub fn order(&self, producer: u64, reader: u64) -> Result<()> {
        let _entered = self.device.enter()?;
        let event = Event::new(self.device)?;
        event.record(&Stream::borrowed(producer))?;
        let reader = Stream::borrowed(reader);
        match reader.capture_id()? {
            // A capture cannot wait for what is enqueued outside it: this thread does.
            Some(id) if Stream::borrowed(producer).capture_id()? != Some(id) => event.synchronize(),
            _ => reader.wait(&event),
        }
    }

    pub fn run(&self, call: &Call<'_>) -> Result<Finished> {
        if self.is_closed() {
            return Err(self.closed_error());
        }
        let _entered = self.device.enter()?;
        let mark = crate::log::TENSORRT.mark();
        let per_thread = call.stream == Some(PER_THREAD);
        if per_thread || self.per_thread.get().is_some() {
            self.check_thread(per_thread)?;
        }
        let run = || match per_thread {
            true => self.behind_per_thread_stream(call, |call| self.run_entered(call)),
            false => self.run_entered(call),
        };
        run()
            .map_err(|e| self.explain(e, call, mark))
            .inspect(|_| Stats::add(&self.stats.calls, 1))
    }

    /// The per-thread default stream is another one in each thread, under one handle: what one thread still reads there, no
    /// other thread's call can wait for.
    #[cold]
    pub(super) fn check_thread(&self, per_thread: bool) -> Result<()> {
        let me = std::thread::current().id();
        let owner = if per_thread {
            self.per_thread.get_or_init(|| me)
        } else {
            self.per_thread.get().unwrap_or(&me)
        };
        if *owner == me {
            return Ok(());
        }
        Err(Error::new(
            Kind::Argument,
            "this engine was called on the per-thread default stream (handle 2) of another thread, whose work no other thread can wait for. \
             Pass a stream of your own (stream=) where an engine is called from several threads.",
        ))
    }

    /// Runs the call on the engine's front stream, joined to the per-thread stream of this thread by events both ways: the
    /// handle of that one is good in this thread only.
    #[cold]
    pub(super) fn behind_per_thread_stream<T>(&self, call: &Call<'_>, run: impl FnOnce(&Call<'_>) -> Result<T>) -> Result<T> {
        if Stream::borrowed(PER_THREAD).capture_id()?.is_some() {
            return run(call);
        }
        let front = self.front_stream();
        self.order(PER_THREAD, front)?;
        let done = run(&Call {
            stream: Some(front),
            ..*call
        });
        self.order(front, PER_THREAD)?;
        done
    }

    /// What was bound goes into the exception of a call that TensorRT or CUDA refused.
    #[cold]
    pub(super) fn explain(&self, e: Error, call: &Call<'_>, mark: u64) -> Error {
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

    pub(super) fn run_entered(&self, call: &Call<'_>) -> Result<Finished> {
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

    pub(super) fn run_on(&self, session: &mut Session, call: &Call<'_>) -> Result<Finished> {
        let resolved = self.resolve(session, call.inputs)?;
        // A capture that another thread runs must not mind what TensorRT allocates or waits for here: it may for new shapes,
        // and where the data decide. In the steady state it does not, and the two driver calls are saved.
        let may_allocate = session.shapes != Some(resolved.id) || resolved.not_graphable.is_some();
        let _relaxed = may_allocate.then(Relaxed::enter);
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

    /// What follows the engine's work: results to the host, waits, the event that frees inputs.
    pub(super) fn finish(&self, call: &Call<'_>, mut outputs: Vec<OwnedTensor>, stream: &Stream) -> Result<Finished> {
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
            captured: false,
        })
    }

    pub(super) fn eager(
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

    /// Waits for the engine's work and gives back everything but the outputs that somebody still holds.
    pub fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let _entered = self.device.enter_anyway();
        let _relaxed = Relaxed::enter();
        // Graphs of the caller's that somebody keeps a record of: launched no more from here on.
        let records = std::mem::take(&mut *locked(&self.records));
        for record in records.iter().filter_map(Weak::upgrade) {
            record.engine_closes(&self.engine.label);
        }
        let sessions = self.sessions.close();
        let for_captures = std::mem::take(&mut *locked(&self.for_captures));
        let for_layers = locked(&self.for_layers).take();
        // From here on nobody replays; what has been launched is waited for.
        let entries = locked(&self.graphs).clear();
        self.seen.wait_all();
        let others = for_captures.sessions().chain(&for_layers);
        for s in sessions.iter().map(|s| &**s).chain(others) {
            let _ = s.stream.synchronize();
            let _ = s.legacy.synchronize();
        }
        self.background.close();
        drop(entries);
        drop(sessions);
        drop(for_captures);
        drop(for_layers);
        self.pool.close();
        self.engine.release();
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        self.close();
        // Another engine's results were perhaps read here.
        forget_stream(self.front_stream());
    }
}
