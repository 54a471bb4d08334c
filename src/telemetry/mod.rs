//! Temperatures, clocks and throttling: `sysfs` looks at the kernel's files, `latest` hands what was found from the one thread that
//! looks to any number of threads that ask. Nothing here starts a thread; a look may take as long as the kernel makes it take.

pub mod files;
pub mod latest;
pub mod sysfs;

pub use latest::Latest;
pub use sysfs::{Sample, Sampler};
