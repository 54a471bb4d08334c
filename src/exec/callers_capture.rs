//! Calls inside a capture that the caller runs: enqueued plainly, on a context and outputs that belong to that graph.

use super::captured::Captured;
use super::executor::{locked, Call, Executor, Finished, Outputs};
use super::pool::{Buffer, Where};
use super::resolve::Resolved;
use super::session::Session;
use super::stats::Stats;
use crate::cuda::memory::{fill, DeviceBuffer};
use crate::cuda::{Relaxed, Stream};
use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use crate::tensor::Place;
use std::sync::{Arc, Weak};

/// What the graphs of the caller's captures use.
#[derive(Default)]
pub(super) struct ForCaptures {
    sessions: Vec<CaptureSession>,
    /// Outputs, with the number of their capture: never reused.
    outputs: Vec<(u64, Arc<Buffer>)>,
}

/// A session for one capture, one of its streams (branches of a graph run at once) and one set of shapes.
struct CaptureSession {
    capture: u64,
    stream: u64,
    dims: Vec<Dims>,
    /// The resolved shapes, by number, that it was warmed up for.
    warm: Option<u64>,
    session: Session,
}

impl ForCaptures {
    pub(super) fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.sessions.iter().map(|c| &c.session)
    }
}

impl Executor {
    /// Gives back what that capture of the caller's was given; its graph is not launched any more.
    pub(super) fn release_capture(&self, id: u64) {
        let _entered = self.device.enter_anyway();
        let _relaxed = Relaxed::enter();
        let mut all = locked(&self.for_captures);
        let (gone, left) = std::mem::take(&mut all.sessions)
            .into_iter()
            .partition::<Vec<_>, _>(|c| c.capture == id);
        all.sessions = left;
        let (outputs, left) = std::mem::take(&mut all.outputs)
            .into_iter()
            .partition::<Vec<_>, _>(|(c, _)| *c == id);
        all.outputs = left;
        drop(all);
        drop(gone);
        drop(outputs);
        locked(&self.records).retain(|r| r.strong_count() > 0);
    }

    /// The record of that capture, if somebody keeps one, is told that this engine takes part.
    fn join_record(&self, id: u64) {
        if let (Some(record), Some(me)) = (Captured::find(id), self.me.upgrade()) {
            if record.join(&me) {
                locked(&self.records).push(Arc::downgrade(&record));
            }
        }
    }

    /// Refuses while this very thread launches a graph that uses the engine: what it uses must not go in between.
    pub fn check_own_launch(&self) -> Result<()> {
        let records = locked(&self.records).clone();
        if records.iter().filter_map(Weak::upgrade).any(|r| r.launches.by_this_thread()) {
            return Err(Error::new(
                Kind::GraphCapture,
                format!(
                    "engine '{}' is closed by a signal handler or a finaliser while this thread launches a graph with it. Close it after the call.",
                    self.engine.label
                ),
            )
            .with("reason", "closed while it is being launched"));
        }
        Ok(())
    }

    /// Inside a capture of the caller's: enqueue plainly. The context and the outputs belong to that graph from now on.
    pub(super) fn run_into_capture(&self, call: &Call<'_>, handle: u64, id: u64) -> Result<Finished> {
        let refuse = |what: &str| Error::new(Kind::GraphCapture, format!("inside a capture of the caller's: {what}")).with("reason", what);
        if call.to_host || call.synchronize {
            return Err(refuse(
                "results for the host need a wait, which a capture cannot have; pass CUDA tensors and no synchronize",
            ));
        }
        let stream = Stream::borrowed(handle);
        self.join_record(id);
        let mut all = locked(&self.for_captures);
        let ForCaptures { sessions, outputs: pinned } = &mut *all;
        let _relaxed = Relaxed::enter();
        let same =
            |s: &CaptureSession| s.capture == id && s.stream == stream.handle() && s.dims.iter().eq(call.inputs.iter().map(|v| &v.dims));
        let i = match sessions.iter().position(same) {
            Some(i) => i,
            None => {
                sessions.push(CaptureSession {
                    capture: id,
                    stream: stream.handle(),
                    dims: call.inputs.iter().map(|v| v.dims).collect(),
                    warm: None,
                    session: Session::new(&self.engine, self.options.memory.as_ref(), &self.background)?,
                });
                sessions.len() - 1
            }
        };
        let CaptureSession { session, warm, .. } = &mut sessions[i];
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
        if *warm != Some(resolved.id) || session.shapes != Some(resolved.id) {
            self.warm_up(session, &resolved)?;
            *warm = Some(resolved.id);
        }
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
                pinned.push((id, Arc::clone(&b)));
                outputs.push(self.owned(k, b.ptr(), None, plan.dims, b));
            }
        }
        let mark = crate::log::TENSORRT.mark();
        session.context.enqueue(&stream).map_err(|e| session.context.explain(e, mark))?;
        drop(all);
        Stats::add(&self.stats.captured_by_caller, 1);
        Ok(Finished {
            outputs,
            done: None,
            stream: handle,
            captured: true,
        })
    }

    /// One enqueue on the session's own stream, with zeros for inputs (the caller's hold nothing yet while it captures): the
    /// first enqueue after a change of shapes cannot be captured.
    pub(super) fn warm_up(&self, session: &mut Session, resolved: &Resolved) -> Result<()> {
        let stream = Stream::borrowed(session.stream.handle());
        let mut buffers = Vec::new();
        let done = self.warm_up_on(&stream, session, resolved, &mut buffers);
        // Also after a failure: part of the work may be under way, in memory that goes now.
        let waited = stream.synchronize();
        done.and(waited)
    }

    pub(super) fn warm_up_on(
        &self,
        stream: &Stream,
        session: &mut Session,
        resolved: &Resolved,
        buffers: &mut Vec<DeviceBuffer>,
    ) -> Result<()> {
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
}
