//! Running an engine. A call goes through `executor`, which alone orders streams: `resolve` (shapes; the rules are in `plan`,
//! pure), `inputs`, then `replay` of a graph or an eager enqueue with `outputs`; `capture` makes the graphs that `graphs` keeps.
//! Who owns which memory: `pool` (outputs), `session` (a context and its staging). `callers_capture` is the case in which the
//! caller captures; `captured` the record that it may keep of that, `launches` and `fill` what launching such a graph needs.

mod background;
mod callers_capture;
mod capture;
mod captured;
mod executor;
mod fill;
mod graphs;
mod inputs;
mod inspect;
mod launches;
mod outputs;
pub mod plan;
mod pool;
mod replay;
mod resolve;
mod session;
pub mod stats;
mod streams;
mod tensors;

pub use capture::Prepared;
pub use captured::Captured;
pub use executor::{Call, Executor, Options, Outputs};
pub use fill::{fill, Pair};
pub use graphs::GraphMode;
pub use launches::Launches;
pub use plan::{HostMode, OnDtype, OnStrided, Policy, ProfileChoice};
pub use pool::{record_stream, OutputMode};
pub use session::{copy_packed, ContextMemory};
pub use tensors::{DeviceTensor, HostBuffer};
