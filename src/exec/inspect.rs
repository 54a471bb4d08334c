//! Looking into an engine: its layers for some shapes, and the time that each takes.

use super::executor::{Call, Executor};
use crate::cuda::Stream;
use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use crate::trt::{with_profiler, LayerTime};

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
        let _entered = self.device.enter()?;
        let mut session = self.checkout(call.stream, call.timeout)?;
        // The first call for these shapes prepares things that belong to no layer.
        self.run_on(&mut session, call)?;
        with_profiler(&mut *session, |s| &mut s.context, runs, |s| self.run_on(s, call).map(drop))
    }
}
