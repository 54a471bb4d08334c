//! Inputs of a call: where each is bound, and what brings it there first.

use super::executor::{Call, Executor};
use super::plan::{need, HostMode, Need};
use super::resolve::Resolved;
use super::session::{page_locked, HostPath, Session};
use super::stats::Stats;
use crate::cuda::memory::copy_on_device;
use crate::cuda::Stream;
use crate::error::{Error, Kind, Result};
use crate::tensor::{Place, TensorView};
use crate::trt::IoTensor;

impl Executor {
    pub(super) fn host_path(&self, v: &TensorView, io: &IoTensor, waits: bool) -> Result<HostPath> {
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

    /// What must happen to one input that cannot be bound as it is, and the address that will be bound.
    pub(super) fn plan_input(
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
    pub(super) fn stage(
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
    pub(super) fn mark_reading(&self, session: &mut Session, staged: &[(usize, Need, HostPath)], stream: &Stream) -> Result<()> {
        for &(k, n, path) in staged {
            if n == Need::Host && path == HostPath::Mapped {
                session.staging[self.inputs[k]].reading(self.device, stream)?;
            }
        }
        Ok(())
    }

    /// `out=`: exactly the result's type, shape and layout.
    pub(super) fn check_given(&self, resolved: &Resolved, given: &[TensorView]) -> Result<()> {
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
            let layout = || format!("row-major, at a multiple of {} bytes", super::plan::ALIGNMENT);
            if !v.contiguous {
                return wrong(Kind::Layout, v.to_string(), layout());
            }
            if v.place != Place::Device(self.device.ordinal) {
                return wrong(Kind::Device, v.place.to_string(), format!("cuda:{}", self.device.ordinal));
            }
            if !v.ptr.is_multiple_of(super::plan::ALIGNMENT) {
                return wrong(Kind::Layout, format!("address {:#x}", v.ptr), layout());
            }
        }
        Ok(())
    }
}
