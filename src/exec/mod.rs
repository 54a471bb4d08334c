//! Running an engine: what to do with each input (`plan`, pure), who owns which memory (`pool`, `session`), when a graph
//! replays (`graphs`), and the one place that orders streams (`executor`).

mod background;
mod executor;
mod graphs;
pub mod plan;
mod pool;
mod session;
pub mod stats;
mod streams;
mod tensors;

pub use executor::{Call, Executor, Options, Outputs, Prepared};
pub use graphs::GraphMode;
pub use plan::{HostMode, OnDtype, OnStrided, Policy, ProfileChoice};
pub use pool::{record_stream, OutputMode};
pub use session::ContextMemory;
pub use tensors::{DeviceTensor, HostBuffer};
