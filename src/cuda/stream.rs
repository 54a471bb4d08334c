//! Streams and events.

use super::driver::{cuda, driver};
use super::ffi::*;
use super::graph::Relaxed;
use super::Device;
use crate::error::Result;
use std::sync::{Arc, Mutex};

/// The legacy default stream: what scripts that never name a stream use.
pub const LEGACY: u64 = 0;
/// The per-thread default stream.
pub const PER_THREAD: u64 = 2;

const BLOCKING: u32 = 0;
const NON_BLOCKING: u32 = 1;
const DISABLE_TIMING: u32 = 2;
const NOT_READY: u32 = 600;

/// A stream, owned (destroyed on drop) or the caller's.
#[derive(Debug)]
pub struct Stream {
    raw: CUstream,
    owner: Option<&'static Device>,
}

// SAFETY: CUDA streams may be used from any thread whose current context is the stream's (driver API, "Stream Management").
unsafe impl Send for Stream {}
// SAFETY: as above; the driver locks internally.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream that does not wait for the legacy default stream by itself.
    pub fn new(device: &'static Device) -> Result<Stream> {
        Stream::with_flags(device, NON_BLOCKING)
    }

    /// The device's stream that CUDA orders with the legacy default stream both ways, without events: work enqueued on either
    /// starts after what was enqueued on the other before. There is one, for as long as somebody has it: two of them would not
    /// be ordered with each other, and one engine could read what another has not written yet.
    pub fn joined_to_legacy(device: &'static Device) -> Result<Arc<Stream>> {
        let mut shared = device.joined.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(stream) = shared.upgrade() {
            return Ok(stream);
        }
        let stream = Arc::new(Stream::with_flags(device, BLOCKING)?);
        *shared = Arc::downgrade(&stream);
        Ok(stream)
    }

    /// The handle of a stream that is nobody else's, one for each device, for as long as the process lives: torch hands out its own
    /// streams in turn, and what another thread enqueued on one would become part of a capture there.
    pub fn for_captures(device: &'static Device) -> Result<u64> {
        static STREAMS: Mutex<Vec<(i32, Stream)>> = Mutex::new(Vec::new());
        let mut streams = STREAMS.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, stream)) = streams.iter().find(|(ordinal, _)| *ordinal == device.ordinal) {
            return Ok(stream.handle());
        }
        let stream = Stream::new(device)?;
        let handle = stream.handle();
        streams.push((device.ordinal, stream));
        Ok(handle)
    }

    fn with_flags(device: &'static Device, flags: u32) -> Result<Stream> {
        let d = driver()?;
        let _entered = device.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is live and a context is current.
        unsafe { cuda!(d, cuStreamCreate(&mut raw, flags)) }?;
        Ok(Stream { raw, owner: Some(device) })
    }

    /// The caller's stream: it must live as long as work is being ordered on it.
    #[inline]
    pub fn borrowed(handle: u64) -> Stream {
        // 1 is CUDA's other name for the legacy stream; one name is enough here.
        Stream {
            raw: (if handle == 1 { LEGACY } else { handle }) as CUstream,
            owner: None,
        }
    }

    #[inline]
    pub fn handle(&self) -> u64 {
        self.raw as u64
    }

    pub(super) fn raw(&self) -> CUstream {
        self.raw
    }

    pub fn synchronize(&self) -> Result<()> {
        let d = driver()?;
        // Another thread's capture must not mind that this one waits.
        let _relaxed = Relaxed::enter();
        // SAFETY: the stream is alive.
        unsafe { cuda!(d, cuStreamSynchronize(self.raw)) }
    }

    /// Work enqueued here from now on starts after the event's last record.
    #[inline]
    pub fn wait(&self, event: &Event) -> Result<()> {
        let d = driver()?;
        // SAFETY: stream and event are alive; flags must be 0.
        unsafe { cuda!(d, cuStreamWaitEvent(self.raw, event.raw, 0)) }
    }

    /// The number of the capture that somebody runs on this stream. The legacy stream cannot be captured (asking about it
    /// while another stream is would be an error).
    #[inline]
    pub fn capture_id(&self) -> Result<Option<u64>> {
        if self.handle() == LEGACY {
            return Ok(None);
        }
        let d = driver()?;
        let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let mut id = 0u64;
        let null = std::ptr::null_mut();
        // SAFETY: stream is alive and both pointers are live; the other results are optional.
        unsafe {
            cuda!(
                d,
                cuStreamGetCaptureInfo_v2(self.raw, &mut status, &mut id, null, null.cast(), null.cast())
            )
        }?;
        Ok((status == CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE).then_some(id))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let (Some(device), Ok(d)) = (self.owner, driver()) {
            let _entered = device.enter_anyway();
            // SAFETY: owned, dropped once. The driver lets work in flight finish first.
            let _ = unsafe { cuda!(d, cuStreamDestroy_v2(self.raw)) };
        }
    }
}

/// An event without timing: a point in a stream that others can wait for.
#[derive(Debug)]
pub struct Event {
    raw: CUevent,
    device: &'static Device,
}

// SAFETY: CUDA events may be used from any thread (driver API, "Event Management").
unsafe impl Send for Event {}
// SAFETY: as above; the driver locks internally.
unsafe impl Sync for Event {}

impl Event {
    pub fn new(device: &'static Device) -> Result<Event> {
        let d = driver()?;
        let _entered = device.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is live and a context is current.
        unsafe { cuda!(d, cuEventCreate(&mut raw, DISABLE_TIMING)) }?;
        Ok(Event { raw, device })
    }

    #[inline]
    pub fn record(&self, stream: &Stream) -> Result<()> {
        let d = driver()?;
        // SAFETY: event and stream are alive and of one context.
        unsafe { cuda!(d, cuEventRecord(self.raw, stream.raw)) }
    }

    /// Has the recorded point passed?
    pub fn is_done(&self) -> Result<bool> {
        let d = driver()?;
        let _relaxed = Relaxed::enter();
        // SAFETY: the event is alive.
        match unsafe { (d.f.cuEventQuery)(self.raw) } {
            0 => Ok(true),
            NOT_READY => Ok(false),
            code => d.check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Blocks the calling thread until the recorded point has passed.
    pub fn synchronize(&self) -> Result<()> {
        let d = driver()?;
        let _relaxed = Relaxed::enter();
        // SAFETY: the event is alive.
        unsafe { cuda!(d, cuEventSynchronize(self.raw)) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(d) = driver() {
            let _entered = self.device.enter_anyway();
            // SAFETY: owned, dropped once; destroying a recorded event is allowed.
            let _ = unsafe { cuda!(d, cuEventDestroy_v2(self.raw)) };
        }
    }
}
