//! DLPack: tensors of other libraries as [`TensorView`](crate::tensor::TensorView)s, and our tensors as theirs.
//!
//! `managed` knows the C structures and no Python; the other files move them through Python objects: `exchange` by
//! the C table that torch ≥ 2.10 hangs on its tensor type, `capsule` by `__dlpack__`, `ndarray` by numpy's own C API.
//! `vectorcall` makes the one callable type that needs CPython's C API by hand.

// Without Python only its tests use it.
#[cfg_attr(not(feature = "python"), allow(dead_code))]
mod managed;
pub use managed::Managed;
#[cfg(feature = "python")]
pub(crate) use managed::{checked, refused_dtype, refused_rank, DTYPES};

#[cfg(feature = "python")]
pub mod capsule;
#[cfg(feature = "python")]
pub mod exchange;
#[cfg(feature = "python")]
pub mod ndarray;
#[cfg(feature = "python")]
pub mod vectorcall;
