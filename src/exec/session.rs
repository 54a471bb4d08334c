//! A session: one execution context with what belongs to it (own stream, staging memory). Checked out by one call at a time,
//! so one context is never used twice at once.

use super::background::Background;
use super::plan::runs;
use super::stats::Stats;
use crate::cuda::memory::{copy_on_host, copy_to_device, mapped_address, DeviceBuffer, PinnedBuffer};
use crate::cuda::{Device, Event, Stream};
use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use crate::tensor::{Place, TensorView};
use crate::trt::{Context, Engine};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Scratch memory of contexts that the user owns, shareable between engines that never run at the same time.
#[derive(Debug)]
pub struct ContextMemory {
    pub buffer: DeviceBuffer,
}

/// Staging memory of one input.
#[derive(Debug, Default)]
pub struct Staging {
    /// What is bound: packed, of the engine's type.
    packed: Option<DeviceBuffer>,
    /// Bytes as they came from the host, when they must still be converted.
    raw: Option<DeviceBuffer>,
    pinned: Option<PinnedBuffer>,
    /// Recorded behind the copy out of `pinned`: until then the host must not write there again.
    copied: Option<Event>,
    in_flight: bool,
}

/// Memory of a session, made or made larger when needed.
struct Growing<'a> {
    /// Frees the memory that was too small behind the session's last work, which may still use it.
    background: &'a Background,
    last_stream: Option<u64>,
    stats: &'a Stats,
}

impl Growing<'_> {
    fn at_least<'b, B: Send + 'static>(
        &self,
        slot: &'b mut Option<B>,
        bytes: u64,
        size: impl Fn(&B) -> u64,
        make: impl Fn(u64) -> Result<B>,
    ) -> Result<&'b B> {
        if slot.as_ref().is_none_or(|b| size(b) < bytes) {
            if let Some(old) = slot.take() {
                self.background.free_after(old, self.last_stream.as_slice());
            }
            Stats::add(&self.stats.staging_allocations, 1);
            let bytes = bytes.max(1).div_ceil(512) * 512;
            // On a small device both may not fit: once more when the old one is gone.
            let made = make(bytes).or_else(|e| {
                if e.kind() != Kind::OutOfMemory {
                    return Err(e);
                }
                self.background.settle();
                make(bytes)
            });
            *slot = Some(made?);
        }
        slot.as_ref().ok_or_else(|| Error::new(Kind::OutOfMemory, "no staging memory"))
    }
}

fn for_input<'a>(device: &'static Device, name: &'a str) -> impl Fn(u64) -> Result<DeviceBuffer> + use<'a> {
    move |n| DeviceBuffer::new(device, n, &format!("staging buffer of input '{name}'"))
}

impl Staging {
    /// Waits while earlier work still reads the page-locked memory.
    fn wait_until_read(&mut self, stats: &Stats) -> Result<()> {
        if let Some(e) = self.copied.as_ref().filter(|_| self.in_flight) {
            if !e.is_done()? {
                Stats::add(&stats.waits, 1);
                e.synchronize()?;
            }
        }
        self.in_flight = false;
        Ok(())
    }

    /// Marks the page-locked memory as being read by the work enqueued on `stream` so far.
    pub fn reading(&mut self, device: &'static Device, stream: &Stream) -> Result<()> {
        if self.copied.is_none() {
            self.copied = Some(Event::new(device)?);
        }
        if let Some(e) = &self.copied {
            e.record(stream)?;
            self.in_flight = true;
        }
        Ok(())
    }
}

/// Copies a host view into packed memory.
pub fn copy_packed(dst: u64, v: &TensorView) {
    let (Some(bytes), Some(size)) = (v.bytes(), v.dtype.size()) else {
        return;
    };
    if v.contiguous {
        return copy_on_host(dst, v.ptr, bytes);
    }
    let mut at = dst;
    for (offset, n) in runs(&v.dims, &v.strides) {
        let length = n as u64 * size;
        copy_on_host(at, v.ptr.wrapping_add_signed(offset * size as i64), length);
        at += length;
    }
}

/// How a host array reaches the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostPath {
    /// Bound at its own mapped address.
    InPlace(u64),
    /// Copied into page-locked memory, which is bound.
    Mapped,
    /// Copied to the device from its own page-locked memory.
    Direct,
    /// Copied into page-locked memory, and from there to the device.
    Staged,
}

#[derive(Debug)]
pub struct Session {
    pub context: Context,
    /// For callers without a stream.
    pub stream: Stream,
    /// For callers on the legacy default stream, on which TensorRT itself may add waits and cannot be captured. Shared by all.
    pub legacy: Arc<Stream>,
    /// The shapes that are set in the context, by number.
    pub shapes: Option<u64>,
    pub enter: Event,
    pub leave: Event,
    /// The stream of the last work that used this session's memory.
    pub last_stream: Option<u64>,
    pub staging: Vec<Staging>,
    /// Values of host shape tensors, at stable addresses.
    pub values: Vec<Vec<u8>>,
    /// Device memory for outputs that go on to the host.
    pub scratch: Vec<Option<DeviceBuffer>>,
    background: Arc<Background>,
    _memory: Option<Arc<ContextMemory>>,
}

impl Session {
    pub fn new(engine: &Arc<Engine>, memory: Option<&Arc<ContextMemory>>, background: &Arc<Background>) -> Result<Session> {
        let device = engine.device;
        let mut context = engine.create_context(memory.is_none())?;
        if let Some(m) = memory {
            context.set_device_memory(m.buffer.ptr(), m.buffer.bytes())?;
        }
        let n = engine.io.len();
        Ok(Session {
            context,
            stream: Stream::new(device)?,
            legacy: Stream::joined_to_legacy(device)?,
            shapes: None,
            enter: Event::new(device)?,
            leave: Event::new(device)?,
            last_stream: None,
            staging: (0..n).map(|_| Staging::default()).collect(),
            values: vec![Vec::new(); n],
            scratch: (0..n).map(|_| None).collect(),
            background: Arc::clone(background),
            _memory: memory.cloned(),
        })
    }

    /// This session's memory is about to be used by work on `stream`: after what the last stream did with it.
    pub fn order(&mut self, stream: &Stream) -> Result<()> {
        if let Some(last) = self.last_stream.filter(|&l| l != stream.handle()) {
            let last = Stream::borrowed(last);
            if last.capture_id()?.is_none() {
                self.enter.record(&last)?;
                stream.wait(&self.enter)?;
            }
        }
        self.last_stream = Some(stream.handle());
        Ok(())
    }

    /// After a call that failed with this error: nothing of it is under way any more, so that its inputs may go.
    #[cold]
    pub fn settle(&self, e: &Error) {
        if !matches!(e.kind(), Kind::Inference | Kind::Cuda | Kind::OutOfMemory | Kind::GraphCapture) {
            // Refused before anything was enqueued.
            return;
        }
        for handle in self.last_stream.into_iter().chain([self.stream.handle(), self.legacy.handle()]) {
            let stream = Stream::borrowed(handle);
            if !matches!(stream.capture_id(), Ok(Some(_))) {
                let _ = stream.synchronize();
            }
        }
    }

    fn growing<'a>(background: &'a Background, last_stream: Option<u64>, stats: &'a Stats) -> Growing<'a> {
        Growing {
            background,
            last_stream,
            stats,
        }
    }

    /// The device buffer that a packed input of that size is written to.
    pub fn packed(&mut self, tensor: usize, bytes: u64, device: &'static Device, name: &str, stats: &Stats) -> Result<u64> {
        Session::growing(&self.background, self.last_stream, stats)
            .at_least(
                &mut self.staging[tensor].packed,
                bytes,
                DeviceBuffer::bytes,
                for_input(device, name),
            )
            .map(DeviceBuffer::ptr)
    }

    /// Bytes as they come from the host, before they are converted.
    fn raw(&mut self, tensor: usize, bytes: u64, device: &'static Device, name: &str, stats: &Stats) -> Result<u64> {
        Session::growing(&self.background, self.last_stream, stats)
            .at_least(&mut self.staging[tensor].raw, bytes, DeviceBuffer::bytes, for_input(device, name))
            .map(DeviceBuffer::ptr)
    }

    /// Page-locked memory for that many bytes: (host address, device address). Waits only while earlier work still reads it.
    pub fn pinned(&mut self, tensor: usize, bytes: u64, device: &'static Device, name: &str, stats: &Stats) -> Result<(u64, u64)> {
        let make = |n| PinnedBuffer::new(device, n, &format!("page-locked staging buffer of input '{name}'"));
        self.staging[tensor].wait_until_read(stats)?;
        Session::growing(&self.background, self.last_stream, stats)
            .at_least(&mut self.staging[tensor].pinned, bytes, PinnedBuffer::bytes, make)
            .map(|b| (b.host(), b.ptr()))
    }

    /// Scratch device memory for output `tensor`.
    pub fn scratch(&mut self, tensor: usize, bytes: u64, device: &'static Device, name: &str, stats: &Stats) -> Result<u64> {
        let make = |n| DeviceBuffer::new(device, n, &format!("output '{name}'"));
        Session::growing(&self.background, self.last_stream, stats)
            .at_least(&mut self.scratch[tensor], bytes, DeviceBuffer::bytes, make)
            .map(DeviceBuffer::ptr)
    }

    /// Enqueues what brings a host array to where the GPU reads it: the address to bind, or the packed view that a kernel
    /// must still convert.
    #[allow(clippy::too_many_arguments)]
    pub fn stage_host(
        &mut self,
        tensor: usize,
        v: &TensorView,
        path: HostPath,
        cast: bool,
        name: &str,
        device: &'static Device,
        stream: &Stream,
        stats: &Stats,
    ) -> Result<TensorView> {
        let bytes = v.bytes().unwrap_or(0);
        let packed = TensorView {
            contiguous: true,
            strides: Dims::default(),
            place: Place::Device(device.ordinal),
            ..*v
        };
        if let HostPath::InPlace(ptr) = path {
            return Ok(TensorView { ptr, ..packed });
        }
        let (host, mapped) = if path == HostPath::Direct {
            (v.ptr, 0)
        } else {
            let to = self.pinned(tensor, bytes, device, name, stats)?;
            copy_packed(to.0, v);
            Stats::add(&stats.host_to_host_bytes, bytes);
            to
        };
        if path == HostPath::Mapped {
            return Ok(TensorView { ptr: mapped, ..packed });
        }
        let dst = if cast {
            self.raw(tensor, bytes, device, name, stats)?
        } else {
            self.packed(tensor, bytes, device, name, stats)?
        };
        copy_to_device(dst, host, bytes, stream)?;
        Stats::add(&stats.host_to_device_bytes, bytes);
        if path == HostPath::Staged {
            self.staging[tensor].reading(device, stream)?;
        }
        Ok(TensorView { ptr: dst, ..packed })
    }
}

/// Is this host array page-locked and packed, and at which address does the device see it?
pub fn page_locked(v: &TensorView) -> Result<Option<u64>> {
    if !v.contiguous || v.ptr == 0 {
        return Ok(None);
    }
    mapped_address(v.ptr)
}

/// The engine's sessions: at most `max`, made when first needed.
pub struct Sessions {
    inner: Mutex<Inner>,
    returned: Condvar,
    pub max: usize,
}

#[derive(Default)]
struct Inner {
    /// Boxed: a session is large, and is moved in and out at every call.
    #[allow(clippy::vec_box)]
    free: Vec<Box<Session>>,
    made: usize,
    /// Callers that wait: nobody is woken (a system call) when there is none.
    waiting: usize,
    closed: bool,
}

impl Sessions {
    pub fn new(max: usize) -> Sessions {
        Sessions {
            inner: Mutex::new(Inner::default()),
            returned: Condvar::new(),
            max,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A free session, preferably the one that last worked on that stream; waits up to `timeout` (for ever without one).
    pub fn checkout(
        &self,
        stream: Option<u64>,
        timeout: Option<Duration>,
        make: impl Fn() -> Result<Session>,
        closed: impl Fn() -> Error,
    ) -> Result<Guard<'_>> {
        let start = Instant::now();
        let mut inner = self.lock();
        loop {
            if inner.closed {
                return Err(closed());
            }
            if !inner.free.is_empty() {
                let last = inner.free.len() - 1;
                let i = if last == 0 {
                    0
                } else {
                    inner.free.iter().rposition(|s| s.last_stream == stream).unwrap_or(last)
                };
                return Ok(Guard {
                    session: Some(inner.free.swap_remove(i)),
                    pool: self,
                });
            }
            if inner.made < self.max {
                inner.made += 1;
                drop(inner);
                return match make() {
                    Ok(s) => Ok(Guard {
                        session: Some(Box::new(s)),
                        pool: self,
                    }),
                    Err(e) => {
                        self.lock().made -= 1;
                        self.returned.notify_all();
                        Err(e)
                    }
                };
            }
            inner.waiting += 1;
            inner = match timeout {
                None => self.returned.wait(inner).unwrap_or_else(|e| e.into_inner()),
                Some(t) => {
                    let left = t.saturating_sub(start.elapsed());
                    if left.is_zero() {
                        inner.waiting -= 1;
                        return Err(Error::new(
                            Kind::ContextTimeout,
                            format!(
                                "no execution context was free within {} s (max_contexts={}). Raise max_contexts (each takes device memory), raise timeout, or call from fewer threads.",
                                t.as_secs_f64(),
                                self.max
                            ),
                        )
                        .with("seconds", t.as_secs_f64())
                        .with("max_contexts", self.max as u64));
                    }
                    self.returned.wait_timeout(inner, left).unwrap_or_else(|e| e.into_inner()).0
                }
            };
            inner.waiting -= 1;
        }
    }

    /// No further checkouts; waits for those under way and gives all sessions out, to be dropped.
    #[allow(clippy::vec_box)]
    pub fn close(&self) -> Vec<Box<Session>> {
        let mut inner = self.lock();
        inner.closed = true;
        self.returned.notify_all();
        while inner.free.len() < inner.made {
            inner.waiting += 1;
            inner = self.returned.wait(inner).unwrap_or_else(|e| e.into_inner());
            inner.waiting -= 1;
        }
        inner.made = 0;
        std::mem::take(&mut inner.free)
    }
}

/// A checked-out session; goes back on drop.
pub struct Guard<'a> {
    session: Option<Box<Session>>,
    pool: &'a Sessions,
}

impl Deref for Guard<'_> {
    type Target = Session;
    fn deref(&self) -> &Session {
        match &self.session {
            Some(s) => s,
            None => unreachable!("a guard holds its session until it is dropped"),
        }
    }
}

impl DerefMut for Guard<'_> {
    fn deref_mut(&mut self) -> &mut Session {
        match &mut self.session {
            Some(s) => s,
            None => unreachable!("a guard holds its session until it is dropped"),
        }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Some(s) = self.session.take() {
            let mut inner = self.pool.lock();
            inner.free.push(s);
            if inner.waiting > 0 {
                self.pool.returned.notify_all();
            }
        }
    }
}
