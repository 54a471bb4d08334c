//! Looking into an engine: its layers for some shapes, and the time that each takes.

use super::executor::{locked, Call, Executor};
use super::session::Session;
use crate::cuda::Stream;
use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use crate::trt::LayerTime;

impl Executor {
    /// TensorRT's JSON about the layers. With shapes (in engine input order, none for shape tensors) in a profile: as they are then.
    pub fn inspect(&self, shapes: Option<&[Option<Dims>]>, profile: usize) -> Result<String> {
        let Some(shapes) = shapes else {
            return self.engine.inspect(None);
        };
        let mut context = self.engine.create_context(true)?;
        let stream = Stream::new(self.device)?;
        context.set_profile(profile, &stream)?;
        stream.synchronize()?;
        for (&i, dims) in self.inputs.iter().zip(shapes) {
            if let Some(dims) = dims {
                context.set_shape(i, dims)?;
            }
        }
        self.engine.inspect(Some(&context))
    }

    /// Milliseconds of each layer in each of `runs` eager calls.
    pub fn layer_times(&self, call: &Call<'_>, runs: usize) -> Result<Vec<Vec<LayerTime>>> {
        if !self.graphs_off {
            return Err(Error::new(
                Kind::Argument,
                "layer times need eager calls: load the engine with graphs=\"off\".",
            ));
        }
        if self.is_closed() {
            return Err(self.closed_error());
        }
        let _entered = self.device.enter()?;
        let mut kept = locked(&self.for_layers);
        // A session of its own: a context that has a profiler waits at every call.
        if kept.is_none() {
            let mut session = Session::new(&self.engine, None, &self.background)?;
            session.context.measure_layers()?;
            *kept = Some(session);
        }
        let Some(session) = kept.as_mut() else {
            return Err(self.closed_error());
        };
        let mut times = Vec::new();
        // The first call for these shapes prepares things that belong to no layer.
        for run in 0..=runs {
            if let Err(e) = self.run_on(session, call) {
                session.context.forget();
                session.shapes = None;
                session.settle(&e);
                return Err(e);
            }
            let layers = session.context.layer_times();
            if run > 0 {
                times.push(layers);
            }
        }
        Ok(times)
    }
}
