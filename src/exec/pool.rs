//! Output memory. A buffer is leased to a result and comes back when the last tensor that shares it is gone; it is written
//! again only after every stream that the engine saw has passed that point.

use super::background::Background;
use super::stats::Stats;
use super::streams::Seen;
use crate::cuda::memory::{DeviceBuffer, PinnedBuffer};
use crate::cuda::{Device, Relaxed, Stream};
use crate::error::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputMode {
    Pooled,
    /// New memory for each result, freed with it.
    Fresh,
}

/// Where an output lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    Device,
    /// Page-locked host memory that both sides address.
    Host,
}

#[derive(Debug)]
enum Memory {
    Device(DeviceBuffer),
    Host(PinnedBuffer),
}

/// One allocation for outputs.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    /// Streams that `record_stream` announced since the buffer was leased.
    announced: Mutex<Vec<u64>>,
    /// Is there any? Asked at every replay, so without the lock.
    any_announced: AtomicBool,
}

/// Every live buffer by its address, so that `record_stream` finds the one behind a tensor.
static LIVE: Mutex<BTreeMap<u64, Weak<Buffer>>> = Mutex::new(BTreeMap::new());

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Buffer {
    pub fn new(device: &'static Device, bytes: u64, place: Where, what: &str) -> Result<Arc<Buffer>> {
        // Rounded up, so that a slightly larger shape needs no new memory.
        let bytes = bytes.max(1).div_ceil(512) * 512;
        let memory = match place {
            Where::Device => Memory::Device(DeviceBuffer::new(device, bytes, what)?),
            Where::Host => Memory::Host(PinnedBuffer::new(device, bytes, what)?),
        };
        let buffer = Arc::new(Buffer {
            memory,
            announced: Mutex::new(Vec::new()),
            any_announced: AtomicBool::new(false),
        });
        locked(&LIVE).insert(buffer.ptr(), Arc::downgrade(&buffer));
        Ok(buffer)
    }

    /// The address for the device.
    pub fn ptr(&self) -> u64 {
        match &self.memory {
            Memory::Device(m) => m.ptr(),
            Memory::Host(m) => m.ptr(),
        }
    }

    pub fn host(&self) -> Option<u64> {
        match &self.memory {
            Memory::Device(_) => None,
            Memory::Host(m) => Some(m.host()),
        }
    }

    pub fn bytes(&self) -> u64 {
        match &self.memory {
            Memory::Device(m) => m.bytes(),
            Memory::Host(m) => m.bytes(),
        }
    }

    pub fn announce(&self, streams: &[u64]) {
        let mut announced = locked(&self.announced);
        for &s in streams {
            if !announced.contains(&s) {
                announced.push(s);
            }
        }
        self.any_announced.store(!announced.is_empty(), Ordering::Release);
    }

    #[inline]
    pub fn has_announced(&self) -> bool {
        self.any_announced.load(Ordering::Acquire)
    }

    /// The streams announced since last time; forgets them.
    pub fn take_announced(&self) -> Vec<u64> {
        if !self.has_announced() {
            return Vec::new();
        }
        let mut announced = locked(&self.announced);
        self.any_announced.store(false, Ordering::Release);
        std::mem::take(&mut announced)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        locked(&LIVE).remove(&self.ptr());
    }
}

/// Says that a stream which the engine has not seen uses the tensor at `ptr`: its buffer is not written again before that
/// stream has passed the point where the tensor is dropped.
pub fn record_stream(ptr: u64, stream: u64) -> Result<()> {
    let found = locked(&LIVE)
        .range(..=ptr)
        .next_back()
        .and_then(|(_, b)| b.upgrade())
        .filter(|b| ptr < b.ptr() + b.bytes());
    let Some(buffer) = found else {
        return Err(Error::new(
            Kind::Argument,
            format!(
                "record_stream: address {ptr:#x} is no output of a jetrt engine. Pass a tensor that an engine returned (or a view of one)."
            ),
        ));
    };
    buffer.announce(&[Stream::borrowed(stream).handle()]);
    Ok(())
}

/// A stream that is about to be destroyed, its work done: nobody waits for it any more, whoever it was announced to.
pub fn forget_stream(stream: u64) {
    let live: Vec<Arc<Buffer>> = locked(&LIVE).values().filter_map(Weak::upgrade).collect();
    for buffer in live {
        let mut announced = locked(&buffer.announced);
        announced.retain(|&s| s != stream);
        buffer.any_announced.store(!announced.is_empty(), Ordering::Release);
    }
}

#[derive(Debug, Default)]
struct Free {
    /// Per output, per place: returned last, taken first.
    lists: Vec<[Vec<Arc<Buffer>>; 2]>,
    closed: bool,
}

#[derive(Debug)]
pub struct Pool {
    device: &'static Device,
    seen: Arc<Seen>,
    background: Arc<Background>,
    mode: OutputMode,
    free: Mutex<Free>,
}

/// More free buffers than this of one output are given back to CUDA at the next call.
const KEEP_FREE: usize = 32;

impl Pool {
    pub fn new(device: &'static Device, seen: Arc<Seen>, background: Arc<Background>, mode: OutputMode, outputs: usize) -> Arc<Pool> {
        let lists = (0..outputs).map(|_| Default::default()).collect();
        Arc::new(Pool {
            device,
            seen,
            background,
            mode,
            free: Mutex::new(Free { lists, closed: false }),
        })
    }

    /// A buffer of at least `bytes` for output number `output`, safe to be written by work enqueued on `stream` from now on.
    /// `alone`: no other stream was ever seen. `name` is for errors.
    #[allow(clippy::too_many_arguments)]
    pub fn lease(
        self: &Arc<Pool>,
        output: usize,
        bytes: u64,
        place: Where,
        stream: &Stream,
        alone: bool,
        name: &str,
        stats: &Stats,
    ) -> Result<Arc<Lease>> {
        let (found, discarded) = {
            let mut free = locked(&self.free);
            let list = &mut free.lists[output][place as usize];
            let mut discarded: Vec<Arc<Buffer>> = Vec::new();
            let mut found = None;
            while let Some(b) = list.pop() {
                if b.bytes() >= bytes {
                    found = Some(b);
                    break;
                }
                // Shapes have grown: a buffer that is too small now is not kept.
                discarded.push(b);
            }
            if list.len() > KEEP_FREE {
                discarded.extend(list.drain(..list.len() - KEEP_FREE));
            }
            (found, discarded)
        };
        for buffer in discarded {
            self.free_after_use(buffer);
        }
        if let Some(buffer) = found {
            let announced = buffer.take_announced();
            // Host memory is released by the host after it waited: no stream is behind.
            let ordered = if place == Where::Host || (alone && announced.is_empty()) {
                Ok(true)
            } else {
                self.seen.order_after_all(stream, &announced)
            };
            if let Ok(true) = ordered {
                return Ok(self.lend(output, buffer));
            }
            buffer.announce(&announced);
            self.give_back(output, buffer);
            ordered?;
        }
        Stats::add(&stats.output_allocations, 1);
        Ok(self.lend(output, Buffer::new(self.device, bytes, place, &format!("output '{name}'"))?))
    }

    fn lend(self: &Arc<Pool>, output: usize, buffer: Arc<Buffer>) -> Arc<Lease> {
        Arc::new(Lease {
            buffer: Some(buffer),
            output,
            pool: Arc::clone(self),
        })
    }

    fn give_back(&self, output: usize, buffer: Arc<Buffer>) {
        let place = if buffer.host().is_some() { Where::Host } else { Where::Device };
        let mut free = locked(&self.free);
        if self.mode == OutputMode::Fresh && !free.closed {
            drop(free);
            return self.free_after_use(buffer);
        }
        if !free.closed {
            // At the front when it could not be ordered is not worth the care: the next call tries again.
            free.lists[output][place as usize].push(buffer);
            return;
        }
        drop(free);
        let _relaxed = Relaxed::enter();
        drop(buffer);
    }

    /// Frees a buffer once every stream that may use it has passed this point.
    fn free_after_use(&self, buffer: Arc<Buffer>) {
        let mut streams = buffer.take_announced();
        streams.extend(self.seen.handles());
        self.background.free_after(buffer, &streams);
    }

    /// Frees what is free; leased buffers are freed when their tensors go.
    pub fn close(&self) {
        let lists = {
            let mut free = locked(&self.free);
            free.closed = true;
            free.lists
                .iter_mut()
                .flat_map(|l| l.iter_mut().flat_map(std::mem::take))
                .collect::<Vec<_>>()
        };
        drop(lists);
    }
}

/// Ownership of a buffer by one result; on drop it goes back to the pool. Any thread may drop it.
#[derive(Debug)]
pub struct Lease {
    buffer: Option<Arc<Buffer>>,
    output: usize,
    pool: Arc<Pool>,
}

impl Lease {
    pub fn buffer(&self) -> &Buffer {
        // The option is emptied by drop only.
        match &self.buffer {
            Some(b) => b,
            None => unreachable!("a lease holds its buffer until it is dropped"),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(b) = self.buffer.take() {
            self.pool.give_back(self.output, b);
        }
    }
}
