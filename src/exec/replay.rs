//! Replaying captured graphs.

use super::executor::{locked, Call, Executor, Finished, Outputs};
use super::graphs::{Entry, KeyRef, OutputSet};
use super::plan::{is_ready, Need, OutputPlan};
use super::resolve::Resolved;
use super::session::{HostPath, Session};
use super::stats::Stats;
use crate::cuda::Stream;
use crate::error::Result;
use crate::tensor::OwnedTensor;
use std::sync::Arc;

impl Executor {
    /// The steady state of graphs: inputs that are bound as they are, a graph for their addresses, nobody holding its outputs.
    /// Needs no session. `None`: not that case.
    pub(super) fn replay_at_once(&self, call: &Call<'_>) -> Result<Option<Finished>> {
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
    pub(super) fn order_replay(&self, entry: &mut Entry, stream: &Stream) -> Result<bool> {
        let alone = self.seen.note(stream.handle());
        if !alone || entry.set.buffers.iter().any(|l| l.buffer().has_announced()) {
            // Readers of the last result that were on another stream, and the last replay itself.
            let mut announced: Vec<u64> = entry.set.buffers.iter().flat_map(|l| l.buffer().take_announced()).collect();
            let count = announced.len();
            announced.push(entry.last_stream);
            let ordered = self.seen.order_after_all(stream, &announced);
            if !matches!(ordered, Ok(true)) {
                // Still to be waited for, by whoever reuses the set.
                if let Some(l) = entry.set.buffers.first() {
                    l.buffer().announce(&announced[..count]);
                }
                return ordered;
            }
        }
        entry.last_stream = stream.handle();
        Ok(true)
    }

    /// The outputs of a graph that was just launched.
    pub(super) fn replayed(&self, entry: &Entry, resolved: &Resolved) -> Vec<OwnedTensor> {
        Stats::add(&self.stats.replays, 1);
        let owned = |(k, plan): (usize, &OutputPlan)| {
            let b = entry.set.buffers[k].buffer();
            self.owned(k, b.ptr(), b.host(), plan.dims, Arc::clone(&entry.set) as Arc<OutputSet>)
        };
        resolved.outputs.iter().enumerate().map(owned).collect()
    }

    /// Launches a graph on the caller's stream; the outputs and that stream. `None`: it cannot be ordered now, run eagerly.
    pub(super) fn replay(
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
}
