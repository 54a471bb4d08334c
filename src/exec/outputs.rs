//! Outputs of an eager call: the memory that each is written to, and the tensors made of it.

use super::executor::{locked, Call, Executor, Outputs};
use super::pool::Where;
use super::resolve::Resolved;
use super::session::Session;
use crate::cuda::Stream;
use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use crate::tensor::{OwnedTensor, Place, TensorView};
use smallvec::SmallVec;
use std::sync::{Arc, Mutex};

pub(super) type Targets = SmallVec<[Target; 2]>;

/// Where one output of an eager call is written.
pub(super) enum Target {
    Leased(Arc<super::pool::Lease>),
    Scratch(u64),
    Given(TensorView),
    Allocated(Arc<Mutex<Option<Arc<super::pool::Lease>>>>),
}

impl Executor {
    pub(super) fn owned(&self, k: usize, ptr: u64, host: Option<u64>, dims: Dims, owner: Arc<dyn Send + Sync>) -> OwnedTensor {
        let view = TensorView::new(ptr, self.output(k).dtype, dims, None, Place::Device(self.device.ordinal));
        OwnedTensor {
            view,
            host_ptr: host,
            owner,
        }
    }

    /// Binds every output: a leased buffer, the caller's memory, scratch memory, or an allocator where only the data decide.
    pub(super) fn bind_outputs(
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
            } else {
                Target::Leased(self.pool.lease(k, plan.bytes, place, work, alone, &io.name, &self.stats)?)
            };
            // A host output is written by the host: it gets the host's address.
            let address = match &target {
                Target::Scratch(p) => *p,
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

    pub(super) fn arm_allocator(&self, session: &mut Session, k: usize, place: Where, stream: u64, alone: bool) -> Result<Target> {
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

    pub(super) fn collect_outputs(
        &self,
        session: &mut Session,
        resolved: &Resolved,
        targets: Targets,
        enqueued: bool,
    ) -> Result<Vec<OwnedTensor>> {
        let mut outputs = Vec::with_capacity(targets.len());
        let mut failed = None;
        for (k, target) in targets.into_iter().enumerate() {
            let dims = resolved.outputs[k].dims;
            let nobody: fn() -> Arc<dyn Send + Sync> = || Arc::new(());
            outputs.push(match target {
                Target::Given(v) => self.owned(k, v.ptr, None, dims, nobody()),
                Target::Scratch(p) => self.owned(k, p, None, dims, nobody()),
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
}
