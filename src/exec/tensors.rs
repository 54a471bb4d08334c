//! Tensors that jetrt makes for the user: zero-filled inputs, page-locked arrays.

use crate::cuda::memory::{fill, DeviceBuffer, PinnedBuffer};
use crate::cuda::{Device, Stream};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use crate::tensor::{Place, TensorView};

/// Zeros in device memory.
#[derive(Debug)]
pub struct DeviceTensor {
    pub view: TensorView,
    _buffer: DeviceBuffer,
}

impl DeviceTensor {
    pub fn zeros(device: &'static Device, dtype: DType, dims: Dims) -> Result<DeviceTensor> {
        let bytes = dims
            .volume()
            .and_then(|n| dtype.bytes(n))
            .ok_or_else(|| Error::new(Kind::Shape, format!("shape {dims} of {dtype} overflows 64 bits")))?;
        let _entered = device.enter()?;
        let buffer = DeviceBuffer::new(device, bytes, "input tensor")?;
        let stream = Stream::new(device)?;
        fill(buffer.ptr(), 0, bytes, &stream)?;
        stream.synchronize()?;
        let view = TensorView::new(buffer.ptr(), dtype, dims, None, Place::Device(device.ordinal));
        Ok(DeviceTensor { view, _buffer: buffer })
    }
}

/// Page-locked host memory of the user's.
#[derive(Debug)]
pub struct HostBuffer(PinnedBuffer);

impl HostBuffer {
    pub fn new(device: &'static Device, bytes: u64) -> Result<HostBuffer> {
        Ok(HostBuffer(PinnedBuffer::new(device, bytes, "pinned_empty")?))
    }

    pub fn host(&self) -> u64 {
        self.0.host()
    }
}
