//! Safe, small pieces of the CUDA driver API: device, stream, event, memory, graph, the copy kernel. Every return code is
//! checked. Handles own what they name and release it on drop; what a drop cannot report is dropped with it (the only
//! failures left then are those of a device that is gone already).

mod device;
mod driver;
mod ffi;
mod graph;
pub mod kernel;
pub mod memory;
mod stream;

pub use device::{Device, Entered, Info};
pub use driver::driver;
pub use graph::{abandon_capture, captured_nodes, Capture, Graph, Relaxed};
pub use stream::{Event, Stream, LEGACY, PER_THREAD};
