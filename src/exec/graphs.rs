//! Captured graphs of one engine: which call may replay which graph, and when a graph is worth capturing.

use super::pool::Lease;
use crate::cuda::Graph;
use crate::shape::Dims;
use crate::trt::Context;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::Arc;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GraphMode {
    Off,
    /// Captured when a call repeats; eager otherwise.
    Auto,
    /// A call that cannot replay a graph is an error.
    Require,
}

/// What a graph has baked in: the resolved shapes, and every address that it reads or writes of the caller's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub shapes: u64,
    pub addresses: Vec<u64>,
    pub host_outputs: bool,
}

/// The same without owning the addresses, for the lookup of every call.
#[derive(Clone, Copy)]
pub struct KeyRef<'a> {
    pub shapes: u64,
    pub addresses: &'a [u64],
    pub host_outputs: bool,
}

impl KeyRef<'_> {
    #[inline]
    fn fingerprint(&self) -> u64 {
        let mix = |h: u64, x: u64| (h ^ x).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        self.addresses
            .iter()
            .fold(mix(u64::from(self.host_outputs), self.shapes), |h, &a| mix(h, a))
    }

    #[inline]
    fn is(&self, key: &Key) -> bool {
        self.shapes == key.shapes && self.host_outputs == key.host_outputs && self.addresses == key.addresses.as_slice()
    }

    fn owned(&self) -> Key {
        Key {
            shapes: self.shapes,
            addresses: self.addresses.to_vec(),
            host_outputs: self.host_outputs,
        }
    }
}

/// The output buffers that a graph writes. Held by results too: while one of them lives, the graph is not replayed.
#[derive(Debug)]
pub struct OutputSet {
    pub buffers: Vec<Arc<Lease>>,
}

/// The verdict on a graph's first replay against eager, written by whoever compared.
#[derive(Debug, Default)]
pub struct Verdict(AtomicU8);

impl Verdict {
    pub fn set(&self, equal: bool) {
        self.0.store(if equal { 1 } else { 2 }, Ordering::Release);
    }

    /// `None` while the comparison is under way.
    #[inline]
    pub fn get(&self) -> Option<bool> {
        match self.0.load(Ordering::Acquire) {
            0 => None,
            v => Some(v == 1),
        }
    }
}

/// One captured graph, with everything that it touches. Fields drop in order: the graph first.
#[derive(Debug)]
pub struct Entry {
    pub key: Key,
    pub graph: Graph,
    /// Never used again, but the graph runs in its memory.
    _context: Context,
    pub set: Arc<OutputSet>,
    pub verdict: Arc<Verdict>,
    pub dims: Vec<Dims>,
    pub bytes: u64,
    pub last_stream: u64,
    used: u64,
    replays: u64,
}

impl Entry {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        key: Key,
        graph: Graph,
        context: Context,
        set: Arc<OutputSet>,
        verdict: Arc<Verdict>,
        dims: Vec<Dims>,
        bytes: u64,
        last_stream: u64,
    ) -> Entry {
        Entry {
            key,
            graph,
            _context: context,
            set,
            verdict,
            dims,
            bytes,
            last_stream,
            used: 0,
            replays: 0,
        }
    }
}

/// What a call should do about graphs.
pub enum Decision {
    /// Replay this entry.
    Replay(usize),
    /// Run eagerly and capture afterwards.
    Capture,
    /// Run eagerly.
    Eager,
}

/// Fingerprints are mixed already.
#[derive(Default)]
pub struct Mixed(u64);

impl Hasher for Mixed {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(b);
        }
    }
    fn write_u64(&mut self, x: u64) {
        self.0 = x;
    }
}

type Map<V> = HashMap<u64, V, BuildHasherDefault<Mixed>>;

/// How many output sets one key may have: the result of the last call is usually still held when the next begins.
const SETS_PER_KEY: usize = 4;
/// Keys whose calls are counted; when more come along, addresses or shapes change too much for graphs anyway.
const COUNTED_KEYS: usize = 1024;
/// After this many evictions, captures must have paid: this many replays per capture.
const EVICTIONS_BEFORE_JUDGEMENT: u64 = 8;
const REPLAYS_PER_CAPTURE: u64 = 16;

/// The captured graphs, bounded by bytes, least recently used first to go.
pub struct Graphs {
    pub mode: GraphMode,
    warmup: u32,
    limit: u64,
    entries: Vec<Entry>,
    by_key: Map<Vec<usize>>,
    seen: Map<u32>,
    failed: Map<()>,
    bytes: u64,
    clock: u64,
    captured: u64,
    replayed: u64,
    evicted: u64,
}

impl Graphs {
    pub fn new(mode: GraphMode, warmup: u32, limit: u64) -> Graphs {
        Graphs {
            mode,
            warmup,
            limit,
            entries: Vec::new(),
            by_key: Map::default(),
            seen: Map::default(),
            failed: Map::default(),
            bytes: 0,
            clock: 0,
            captured: 0,
            replayed: 0,
            evicted: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Have captures stopped paying, because addresses or shapes change all the time?
    pub fn thrashing(&self) -> bool {
        self.evicted >= EVICTIONS_BEFORE_JUDGEMENT && self.replayed < self.captured * REPLAYS_PER_CAPTURE
    }

    /// A graph of this key that is verified and whose outputs nobody holds.
    #[inline]
    pub fn free(&self, key: KeyRef<'_>) -> Option<usize> {
        let list = self.by_key.get(&key.fingerprint())?;
        list.iter().copied().find(|&i| {
            let e = &self.entries[i];
            key.is(&e.key) && e.verdict.get() == Some(true) && e.is_free()
        })
    }

    /// A graph of this key that is verified and whose outputs nobody holds, else whether to capture one.
    pub fn decide(&mut self, key: KeyRef<'_>) -> Decision {
        let fp = key.fingerprint();
        let mut sets = 0;
        if let Some(list) = self.by_key.get(&fp) {
            for &i in list {
                let e = &self.entries[i];
                if !key.is(&e.key) {
                    continue;
                }
                sets += 1;
                match e.verdict.get() {
                    Some(true) if e.is_free() => return Decision::Replay(i),
                    // One comparison at a time, and a key that differed once is not tried again.
                    None | Some(false) if self.mode == GraphMode::Auto => return Decision::Eager,
                    _ => {}
                }
            }
        }
        let failed = self.failed.contains_key(&fp);
        if self.mode == GraphMode::Require {
            return if failed { Decision::Eager } else { Decision::Capture };
        }
        if failed || sets >= SETS_PER_KEY || self.thrashing() {
            return Decision::Eager;
        }
        if self.seen.len() >= COUNTED_KEYS {
            self.seen.clear();
        }
        let count = self.seen.entry(fp).or_insert(0);
        *count += 1;
        if *count > self.warmup {
            Decision::Capture
        } else {
            Decision::Eager
        }
    }

    #[inline]
    pub fn entry(&mut self, i: usize) -> &mut Entry {
        self.clock += 1;
        self.replayed += 1;
        let e = &mut self.entries[i];
        e.used = self.clock;
        e.replays += 1;
        e
    }

    pub fn fail(&mut self, key: KeyRef<'_>) {
        self.failed.insert(key.fingerprint(), ());
    }

    /// Is there a graph whose replay differed from eager? Takes it out.
    pub fn take_wrong(&mut self) -> Option<Entry> {
        let i = self.entries.iter().position(|e| e.verdict.get() == Some(false))?;
        let e = self.remove(i);
        self.failed.insert(e.key_ref().fingerprint(), ());
        Some(e)
    }

    pub fn key_of(key: KeyRef<'_>) -> Key {
        key.owned()
    }

    /// Would an entry of that many bytes fit at all?
    pub fn fits(&self, bytes: u64) -> bool {
        bytes <= self.limit
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Adds an entry; returns those that had to go.
    pub fn insert(&mut self, mut entry: Entry) -> Vec<Entry> {
        let mut out = Vec::new();
        while self.bytes + entry.bytes > self.limit {
            let Some(oldest) = (0..self.entries.len()).min_by_key(|&i| self.entries[i].used) else {
                break;
            };
            self.evicted += 1;
            out.push(self.remove(oldest));
        }
        self.clock += 1;
        entry.used = self.clock;
        self.captured += 1;
        self.bytes += entry.bytes;
        let fp = entry.key_ref().fingerprint();
        self.by_key.entry(fp).or_default().push(self.entries.len());
        self.entries.push(entry);
        out
    }

    fn remove(&mut self, i: usize) -> Entry {
        let e = self.entries.swap_remove(i);
        self.bytes -= e.bytes;
        let moved = self.entries.len();
        let fp = e.key_ref().fingerprint();
        if let Some(list) = self.by_key.get_mut(&fp) {
            list.retain(|&x| x != i);
        }
        if self.by_key.get(&fp).is_some_and(Vec::is_empty) {
            self.by_key.remove(&fp);
        }
        if moved != i {
            let fp = self.entries[i].key_ref().fingerprint();
            for x in self.by_key.get_mut(&fp).into_iter().flatten() {
                if *x == moved {
                    *x = i;
                }
            }
        }
        e
    }

    /// Everything out, to be dropped; for `close`.
    pub fn clear(&mut self) -> Vec<Entry> {
        self.by_key.clear();
        self.bytes = 0;
        self.mode = GraphMode::Off;
        std::mem::take(&mut self.entries)
    }
}

impl Entry {
    /// Does nobody hold an output? The count is exact: nobody can gain a share of a set that only this cache holds.
    #[inline]
    fn is_free(&self) -> bool {
        let free = Arc::strong_count(&self.set) == 1;
        // What the last holder did with the memory happened before.
        std::sync::atomic::fence(Ordering::Acquire);
        free
    }

    fn key_ref(&self) -> KeyRef<'_> {
        KeyRef {
            shapes: self.key.shapes,
            addresses: &self.key.addresses,
            host_outputs: self.key.host_outputs,
        }
    }
}
