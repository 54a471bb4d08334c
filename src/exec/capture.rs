//! Capturing graphs: a trial beside an eager run, compared with it bit by bit before the graph is used.

use super::executor::{locked, Call, Executor, Outputs};
use super::graphs::{Entry, GraphMode, Graphs, KeyRef, OutputSet, Verdict};
use super::plan::Need;
use super::pool::{OutputMode, Where};
use super::resolve::Resolved;
use super::session::{HostPath, Session};
use super::stats::Stats;
use crate::cuda::memory::{copy_on_device, copy_to_host, fill, DeviceBuffer, PinnedBuffer};
use crate::cuda::{Capture, Device, Graph, Relaxed, Stream, PER_THREAD};
use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use crate::tensor::OwnedTensor;
use crate::trt::Context;
use std::sync::Arc;

/// What a capture needs, on trial: until its stream is done, everything stays. Fields drop in order: the graph first.
pub(super) struct Trial {
    pub(super) graph: Option<Graph>,
    pub(super) context: Context,
    pub(super) set: OutputSet,
    pub(super) snapshot: DeviceBuffer,
    pub(super) replayed: DeviceBuffer,
    pub(super) stream: Stream,
}

/// Eager outputs and replayed outputs, to be compared bit by bit.
pub(super) struct Comparison {
    pub(super) snapshot: DeviceBuffer,
    pub(super) replayed: DeviceBuffer,
    pub(super) bytes: u64,
    pub(super) stream: Stream,
    pub(super) device: &'static Device,
}

impl Comparison {
    pub(super) fn equal(&self) -> Result<bool> {
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

/// What `prepare` did for one set of shapes.
pub struct Prepared {
    pub profile: usize,
    pub outputs: Vec<(String, Dims)>,
    /// `None`: a graph is captured and equals eager; else why not.
    pub eager_because: Option<String>,
}

impl Executor {
    pub(super) fn signature_text(&self, dims: &[Dims]) -> String {
        dims.iter()
            .enumerate()
            .map(|(k, d)| format!("{}{d}", self.input(k).name))
            .collect::<Vec<_>>()
            .join(" ")
    }

    pub(super) fn failure_of(&self, resolved: &Resolved) -> Option<String> {
        locked(&self.stats.graph_failures)
            .get(&self.signature_text(&resolved.dims))
            .cloned()
    }

    /// A signature that can have no graph: said once in the stats, an error when graphs are required.
    pub(super) fn not_graphable(&self, resolved: &Resolved, why: &'static str) -> Result<()> {
        let mut failures = locked(&self.stats.graph_failures);
        if failures.len() < 256 {
            // Only built for a signature that is not there yet: shapes of these engines may change at each call.
            let text = self.signature_text(&resolved.dims);
            failures.entry(text).or_insert_with(|| why.into());
        }
        Ok(())
    }

    pub(super) fn report_wrong_graphs(&self) {
        let wrong = locked(&self.graphs).take_wrong();
        if let Some(entry) = wrong {
            self.stats.graph_failed(
                self.signature_text(&entry.dims),
                "the replayed graph's outputs differ from eager ones".into(),
            );
            let last = entry.last_stream;
            self.background.free_after(entry, &[last]);
        }
    }

    /// Captures a graph of the call that was just enqueued on `work`; a failure is remembered and reported, never raised.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn capture_after(
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
                self.stats
                    .graph_failed(self.signature_text(&resolved.dims), e.message().to_string());
            }
        }
    }

    pub(super) fn keep(&self, entry: Entry) {
        Stats::add(&self.stats.captures, 1);
        let out = locked(&self.graphs).insert(entry);
        Stats::add(&self.stats.graph_evictions, out.len() as u64);
        for entry in out {
            let last = entry.last_stream;
            self.background.free_after(entry, &[last]);
        }
    }

    /// The graph of one call, replayed once beside the eager run: what remains is to compare the two.
    pub(super) fn capture(
        &self,
        session: &mut Session,
        resolved: &Arc<Resolved>,
        call: &Call<'_>,
        addresses: &[u64],
        eager: &[OwnedTensor],
        work: &Stream,
    ) -> Result<(Entry, Comparison)> {
        let _relaxed = Relaxed::enter();
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
                let name = &self.output(k).name;
                let lease = self.pool.lease(k, plan.bytes, place, &trial.stream, false, name, &self.stats)?;
                targets.push(lease.buffer().ptr());
                trial.set.buffers.push(lease);
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
    pub(super) fn try_graph(
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

    pub(super) fn compare_in_background(&self, comparison: Comparison, verdict: Arc<Verdict>) {
        self.background.run(move || {
            // A comparison that cannot be made counts as a difference: the graph is not used.
            verdict.set(comparison.equal().unwrap_or(false));
        });
    }

    /// Captures and compares, waiting for the result: for `prepare` and graphs="require".
    pub(super) fn require_graph(
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
            self.stats
                .graph_failed(self.signature_text(&resolved.dims), e.message().to_string());
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
        if call.stream == Some(PER_THREAD) {
            self.check_thread(true)?;
            return self.behind_per_thread_stream(call, |call| self.prepare_entered(call));
        }
        self.prepare_entered(call)
    }

    fn prepare_entered(&self, call: &Call<'_>) -> Result<Prepared> {
        let _relaxed = Relaxed::enter();
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
}
