//! Shapes that were checked and resolved once: in the steady state a call only finds them again.

use super::executor::{locked, Executor};
use super::plan::{choose_profile, need, OutputPlan};
use super::session::{copy_packed, Session};
use super::stats::Stats;
use crate::cuda::{Relaxed, Stream};
use crate::error::Result;
use crate::shape::Dims;
use crate::tensor::TensorView;
use crate::trt::IoTensor;
use std::sync::atomic::Ordering;
use std::sync::Arc;

/// Shapes that were checked and resolved once.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) id: u64,
    pub(super) dims: Vec<Dims>,
    /// Contents of host shape tensors: they decide shapes too.
    pub(super) values: Vec<Vec<u8>>,
    pub(super) profile: usize,
    pub(super) outputs: Vec<OutputPlan>,
    /// Why this signature can have no graph.
    pub(super) not_graphable: Option<&'static str>,
}

#[derive(Default)]
pub(super) struct Signatures {
    /// Most recently used first.
    pub(super) list: Vec<Arc<Resolved>>,
}

pub(super) const SIGNATURES: usize = 256;

impl Executor {
    /// The resolved shapes of these inputs, checked. In the steady state this compares, and computes nothing.
    pub(super) fn resolve(&self, session: &mut Session, inputs: &[TensorView]) -> Result<Arc<Resolved>> {
        let values = |v: &TensorView, io: &IoTensor| -> Result<Vec<u8>> {
            if !io.host {
                return Ok(Vec::new());
            }
            // Before a byte is read: it must be host memory, and of the engine's type.
            need(io, v, self.device.ordinal, &self.options.policy)?;
            let mut bytes = vec![0u8; v.bytes().unwrap_or(0) as usize];
            copy_packed(bytes.as_mut_ptr() as u64, v);
            Ok(bytes)
        };
        let host: Vec<Vec<u8>> = if self.has_host_inputs {
            let all = inputs.iter().enumerate().map(|(k, v)| values(v, self.input(k)));
            all.collect::<Result<_>>()?
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
    pub(super) fn resolve_new(&self, session: &mut Session, inputs: &[TensorView], values: Vec<Vec<u8>>) -> Result<Arc<Resolved>> {
        let _relaxed = Relaxed::enter();
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

    pub(super) fn set_shapes(&self, session: &mut Session, resolved: &Resolved, stream: &Stream) -> Result<()> {
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
}
