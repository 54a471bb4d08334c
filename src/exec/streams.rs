//! Which streams an engine has seen, and making one wait for the others.

use crate::cuda::{Device, Event, Stream};
use crate::error::Result;
use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

/// Something that keeps a stream of the caller's alive (a Python stream object).
pub type Keep = Box<dyn Any + Send>;

/// Streams on which outputs of an engine may be in use. A handle given as a bare number must outlive the engine's outputs.
#[derive(Debug)]
pub struct Seen {
    device: &'static Device,
    inner: Mutex<Inner>,
    /// The handle of the only stream seen so far, else `SEVERAL`: asked at every call, so without the lock.
    only: AtomicU64,
}

/// No stream handle: those are small numbers or addresses.
const NONE: u64 = u64::MAX;
const SEVERAL: u64 = u64::MAX - 1;

#[derive(Default)]
struct Inner {
    handles: Vec<u64>,
    keep: Vec<Keep>,
    /// Events to reuse; one wait uses one, and it is free again as soon as the wait is enqueued.
    events: Vec<Event>,
}

impl Inner {
    /// True when the stream is new.
    fn add(&mut self, handle: u64) -> bool {
        let new = !self.handles.contains(&handle);
        if new {
            self.handles.push(handle);
        }
        new
    }

    fn only(&self) -> u64 {
        match self.handles.as_slice() {
            [] => NONE,
            [one] => *one,
            _ => SEVERAL,
        }
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.handles)
    }
}

impl Seen {
    pub fn new(device: &'static Device) -> Seen {
        Seen {
            device,
            inner: Mutex::new(Inner::default()),
            only: AtomicU64::new(NONE),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Notes a stream; true when it is the only one seen so far, so that stream order alone protects everything.
    #[inline]
    pub fn note(&self, handle: u64) -> bool {
        self.only.load(Ordering::Acquire) == handle || self.note_another(handle)
    }

    fn note_another(&self, handle: u64) -> bool {
        let mut s = self.lock();
        s.add(handle);
        self.only.store(s.only(), Ordering::Release);
        s.handles.len() == 1
    }

    /// Notes a stream together with what keeps it alive.
    pub fn note_kept(&self, handle: u64, keep: impl FnOnce() -> Keep) {
        let mut s = self.lock();
        if s.add(handle) {
            s.keep.push(keep());
            self.only.store(s.only(), Ordering::Release);
        }
    }

    pub fn handles(&self) -> Vec<u64> {
        self.lock().handles.clone()
    }

    /// Makes `stream` wait for what is enqueued on every seen stream (and `more`) by now. False when that cannot be done
    /// because one of them is being captured: then the memory in question must not be reused yet.
    pub fn order_after_all(&self, stream: &Stream, more: &[u64]) -> Result<bool> {
        let mut s = self.lock();
        let mut others = s.handles.clone();
        for &h in more {
            if !others.contains(&h) {
                others.push(h);
            }
        }
        others.retain(|&h| h != stream.handle());
        for &h in &others {
            if Stream::borrowed(h).capture_id()?.is_some() {
                return Ok(false);
            }
        }
        for &h in &others {
            let event = match s.events.pop() {
                Some(e) => e,
                None => Event::new(self.device)?,
            };
            let done = event.record(&Stream::borrowed(h)).and_then(|()| stream.wait(&event));
            s.events.push(event);
            done?;
        }
        Ok(true)
    }

    /// Blocks until every seen stream has passed this point; streams that are being captured are skipped.
    pub fn wait_all(&self) {
        for h in self.handles() {
            let stream = Stream::borrowed(h);
            if !matches!(stream.capture_id(), Ok(Some(_))) {
                let _ = stream.synchronize();
            }
        }
    }
}
