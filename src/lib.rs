//! jetrt: runs NVIDIA TensorRT engines. Data flows one way: Python call → `TensorView` → `exec::plan` → `exec::executor` →
//! `OwnedTensor`. Unsafe code lives in `cuda`, `trt`, `dlpack` and nowhere else.
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks, clippy::unwrap_used, clippy::expect_used)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod cuda;
pub mod dlpack;
pub mod dtype;
pub mod error;
pub mod exec;
pub mod log;
#[cfg(feature = "python")]
pub mod py;
pub mod shape;
pub mod telemetry;
pub mod tensor;
pub mod trt;
