//! CUDA graphs: capture that always ends, and executables.

use super::driver::{cuda, driver};
use super::ffi::*;
use super::{Device, Stream};
use crate::error::{Error, Kind, Result};

/// Memory-allocation nodes: a graph that has one can be replayed only in special circumstances, so we refuse it.
const MEM_ALLOC_NODE: u32 = 10;
const MEM_FREE_NODE: u32 = 11;

/// While it lives, this thread may allocate, free and wait although somebody captures a graph: what it does then is not
/// part of that capture and touches no captured stream.
pub struct Relaxed {
    before: Option<CUstreamCaptureMode>,
}

impl Relaxed {
    pub fn enter() -> Relaxed {
        Relaxed::with(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
    }

    fn with(mut mode: CUstreamCaptureMode) -> Relaxed {
        Relaxed {
            before: exchange(&mut mode).then_some(mode),
        }
    }
}

/// Swaps the thread's capture mode with `mode`; false when the driver refuses.
fn exchange(mode: &mut CUstreamCaptureMode) -> bool {
    // SAFETY: the pointer is live; the driver writes the previous mode, one of the enum's three values.
    driver().is_ok_and(|d| unsafe { cuda!(d, cuThreadExchangeStreamCaptureMode(mode)) }.is_ok())
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        if let Some(mut mode) = self.before {
            exchange(&mut mode);
        }
    }
}

/// A capture in progress on a stream. Ends when dropped, whatever happened, so that the stream is usable again.
pub struct Capture<'a> {
    stream: &'a Stream,
    open: bool,
    /// What is captured must not allocate or wait on the side, even if this thread may otherwise.
    _strict: Relaxed,
}

impl<'a> Capture<'a> {
    /// Thread-local mode: what other threads do (torch allocating memory, say) cannot break this capture.
    pub fn begin(stream: &'a Stream) -> Result<Capture<'a>> {
        let d = driver()?;
        let strict = Relaxed::with(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        // SAFETY: the stream is alive.
        unsafe {
            cuda!(
                d,
                cuStreamBeginCapture_v2(stream.raw(), CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            )
        }?;
        Ok(Capture {
            stream,
            open: true,
            _strict: strict,
        })
    }

    /// Ends the capture and instantiates it. Refuses an empty graph (TensorRT on a wrong device captured nothing, silently)
    /// and one that allocates memory.
    pub fn finish(mut self, device: &'static Device) -> Result<Graph> {
        self.open = false;
        let template = Template(end(self.stream)?);
        let d = driver()?;
        let mut count = 0usize;
        // SAFETY: a null array asks for the count.
        unsafe { cuda!(d, cuGraphGetNodes(template.0, std::ptr::null_mut(), &mut count)) }?;
        if count == 0 {
            return Err(Error::new(
                Kind::GraphCapture,
                "the captured graph is empty: TensorRT enqueued nothing on the capturing stream",
            )
            .with("reason", "empty graph"));
        }
        let mut nodes = vec![std::ptr::null_mut(); count];
        // SAFETY: the array has room for `count` nodes.
        unsafe { cuda!(d, cuGraphGetNodes(template.0, nodes.as_mut_ptr(), &mut count)) }?;
        for &node in &nodes[..count.min(nodes.len())] {
            let mut kind = 0;
            // SAFETY: the node belongs to the graph, which is alive; the type is a 32-bit enum.
            unsafe { cuda!(d, cuGraphNodeGetType(node, &mut kind)) }?;
            if kind == MEM_ALLOC_NODE || kind == MEM_FREE_NODE {
                return Err(Error::new(
                    Kind::GraphCapture,
                    "the captured graph allocates memory and cannot be replayed freely",
                )
                .with("reason", "memory node in graph"));
            }
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: the template is alive; no flags.
        unsafe { cuda!(d, cuGraphInstantiateWithFlags(&mut raw, template.0, 0)) }?;
        let graph = Graph { raw, nodes: count, device };
        // Upload now, so that the first replay is as quick as the others.
        // SAFETY: graph and stream are alive.
        unsafe { cuda!(d, cuGraphUpload(raw, self.stream.raw())) }?;
        Ok(graph)
    }
}

/// How many nodes the capture that runs on this stream has so far; 0 where none does.
pub fn captured_nodes(stream: &Stream) -> Result<usize> {
    let d = driver()?;
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut id, mut graph, mut count) = (0u64, std::ptr::null_mut(), 0usize);
    let null: *mut usize = std::ptr::null_mut();
    // SAFETY: the stream is alive and the pointers are live; the dependencies are optional.
    unsafe {
        cuda!(
            d,
            cuStreamGetCaptureInfo_v2(stream.raw(), &mut status, &mut id, &mut graph, null.cast(), null)
        )
    }?;
    if status == CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE {
        // SAFETY: the graph lives as long as its capture runs; a null array asks for the count.
        unsafe { cuda!(d, cuGraphGetNodes(graph, std::ptr::null_mut(), &mut count)) }?;
    }
    Ok(count)
}

/// Ends the capture that somebody left running on this stream, if one is; its graph is thrown away.
pub fn abandon_capture(stream: &Stream) -> Result<()> {
    let d = driver()?;
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut id, null) = (0u64, std::ptr::null_mut());
    // SAFETY: the stream is alive and both pointers are live; the other results are optional.
    unsafe {
        cuda!(
            d,
            cuStreamGetCaptureInfo_v2(stream.raw(), &mut status, &mut id, null, null.cast(), null.cast())
        )
    }?;
    if status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
        if let Ok(raw) = end(stream) {
            drop(Template(raw));
        }
    }
    Ok(())
}

fn end(stream: &Stream) -> Result<CUgraph> {
    let d = driver()?;
    let mut raw = std::ptr::null_mut();
    // SAFETY: the stream is capturing, and this thread began it.
    let ended = unsafe { cuda!(d, cuStreamEndCapture(stream.raw(), &mut raw)) };
    let template = Template(raw);
    ended?;
    if raw.is_null() {
        return Err(Error::new(Kind::GraphCapture, "the capture ended without a graph").with("reason", "no graph"));
    }
    std::mem::forget(template);
    Ok(raw)
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.open {
            if let Ok(raw) = end(self.stream) {
                drop(Template(raw));
            }
        }
    }
}

/// The graph as captured; needed only until it is instantiated.
struct Template(CUgraph);

impl Drop for Template {
    fn drop(&mut self) {
        if let (false, Ok(d)) = (self.0.is_null(), driver()) {
            // SAFETY: owned, destroyed once.
            let _ = unsafe { cuda!(d, cuGraphDestroy(self.0)) };
        }
    }
}

/// An executable graph. Launches of one graph are serialised by CUDA, on whatever streams.
#[derive(Debug)]
pub struct Graph {
    raw: CUgraphExec,
    pub nodes: usize,
    device: &'static Device,
}

// SAFETY: a graph executable may be launched from any thread; calls on one executable are serialised by the executor's lock.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Graph {
    #[inline]
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        let d = driver()?;
        // SAFETY: graph and stream are alive, of one context.
        unsafe { cuda!(d, cuGraphLaunch(self.raw, stream.raw())) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(d) = driver() {
            let _entered = self.device.enter_anyway();
            // SAFETY: owned, destroyed once; the driver lets a running launch finish.
            let _ = unsafe { cuda!(d, cuGraphExecDestroy(self.raw)) };
        }
    }
}
