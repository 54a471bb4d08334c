//! `TensorView`: what every input becomes, whatever library it came from.

use crate::dtype::DType;
use crate::shape::{is_contiguous, Dims};
use std::fmt;

/// Where the bytes of a view can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Memory of this CUDA device.
    Device(i32),
    /// Memory of the host that the view's producer says nothing more about.
    Host,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Device(i) => write!(f, "cuda:{i}"),
            Place::Host => f.write_str("cpu"),
        }
    }
}

impl Default for TensorView {
    /// An empty host tensor without memory.
    fn default() -> TensorView {
        TensorView {
            ptr: 0,
            dtype: DType::U8,
            dims: Dims::new(&[0]).unwrap_or_default(),
            strides: Dims::default(),
            contiguous: true,
            place: Place::Host,
        }
    }
}

/// A borrowed tensor: valid as long as the caller holds the object that it was made from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TensorView {
    pub ptr: u64,
    pub dtype: DType,
    pub dims: Dims,
    /// In elements; meaningful only when `contiguous` is false.
    pub strides: Dims,
    pub contiguous: bool,
    pub place: Place,
}

impl TensorView {
    /// A view with strides in elements, or row-major when there are none.
    pub fn new(ptr: u64, dtype: DType, dims: Dims, strides: Option<Dims>, place: Place) -> TensorView {
        match strides {
            Some(s) if !is_contiguous(dims.as_slice(), s.as_slice()) => TensorView {
                ptr,
                dtype,
                dims,
                strides: s,
                contiguous: false,
                place,
            },
            _ => TensorView {
                ptr,
                dtype,
                dims,
                strides: Dims::default(),
                contiguous: true,
                place,
            },
        }
    }

    pub fn elements(&self) -> u64 {
        self.dims.volume().unwrap_or(0)
    }

    /// Bytes that the elements take when packed; `None` on overflow.
    pub fn bytes(&self) -> Option<u64> {
        self.dtype.bytes(self.dims.volume()?)
    }
}

/// `float32[2, 3] on cuda:0`
impl fmt::Display for TensorView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{} on {}", self.dtype, self.dims, self.place)?;
        if !self.contiguous {
            write!(f, " with strides {}", self.strides)?;
        }
        Ok(())
    }
}

/// A tensor that shares the ownership of its memory: what the executor gives out. Dropping the last clone of `owner`
/// returns the memory to where it came from; it may happen on any thread.
#[derive(Clone)]
pub struct OwnedTensor {
    pub view: TensorView,
    /// The address at which the host can read the same bytes (mapped or host memory), after a wait.
    pub host_ptr: Option<u64>,
    pub owner: std::sync::Arc<dyn Send + Sync>,
}
