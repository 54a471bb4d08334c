//! TensorRT by `dlopen`: the library and its version, plan files, the runtime objects that run an engine.
//!
//! Why the calls here are sound: no TensorRT header is used. Each object is a C++ object of a known layout (`{vptr, impl}`),
//! each method a slot of the implementation's vtable whose number, signature and version range come from `abi.rs`, which is
//! generated from verified tables (`abi/`). The library's version is read before any object is made, and a slot that
//! the version does not have is a typed error instead of a call.

pub mod abi;
mod allocator;
pub mod build;
mod context;
mod engine;
mod inspector;
mod library;
mod logger;
mod object;
pub mod plan;
mod profiler;

pub use allocator::OutputAllocator;
pub use context::Context;
pub use engine::{Engine, IoTensor, LoadReport, Loading};
pub use library::{library, opened, Library, Version};
pub use profiler::LayerTime;
