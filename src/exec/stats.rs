//! Counters of one engine, readable at any time as `engine.stats`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        #[derive(Debug, Default)]
        pub struct Stats {
            $($(#[$doc])* pub $name: AtomicU64,)*
            /// Why graphs are not used, by signature.
            pub graph_failures: Mutex<BTreeMap<String, String>>,
        }

        impl Stats {
            /// Name and value of every counter.
            pub fn counters(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    /// Finished calls.
    calls,
    /// Calls that enqueued the engine.
    eager,
    /// Calls that replayed a graph.
    replays,
    /// Graphs captured.
    captures,
    /// Captures that failed, or whose replay differed from eager.
    capture_failures,
    /// Graphs dropped to stay within `graph_bytes`.
    graph_evictions,
    /// Calls enqueued into a capture of the caller's.
    captured_by_caller,
    /// Inputs packed by a kernel (on_strided="copy").
    strided_copies,
    /// Inputs converted by a kernel (on_dtype="cast").
    casts,
    /// Bytes copied from host to device.
    host_to_device_bytes,
    /// Bytes copied from device to host.
    device_to_host_bytes,
    /// Bytes copied between host buffers (into page-locked staging memory).
    host_to_host_bytes,
    /// Times the host waited for the GPU.
    waits,
    /// Output buffers allocated.
    output_allocations,
    /// Staging buffers allocated.
    staging_allocations,
    /// Calls whose shapes had not been seen before.
    new_shapes,
}

impl Stats {
    #[inline]
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    pub fn graph_failed(&self, signature: String, reason: String) {
        Stats::add(&self.capture_failures, 1);
        let mut failures = self.graph_failures.lock().unwrap_or_else(|e| e.into_inner());
        // Bounded: shapes may be many.
        if failures.len() < 256 {
            failures.insert(signature, reason);
        }
    }
}
