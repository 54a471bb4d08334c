//! Streams that only work when somebody waits for them, events, and graph capture.
//!
//! Work is queued at the call and done when a wait needs it, in the order that streams, events and the legacy stream's rules impose and in
//! no other. A wait that the caller forgot therefore shows as stale data every time, not now and then.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Instant;

use crate::kernel::{self, CopyCast};
use crate::state::*;

#[derive(Clone, Copy)]
pub struct Copy2D {
    pub dst: u64,
    pub dst_pitch: usize,
    pub src: u64,
    pub src_pitch: usize,
    pub width: usize,
    pub height: usize,
}

#[derive(Clone)]
pub enum Op {
    Copy {
        dst: u64,
        src: u64,
        n: usize,
    },
    /// A pageable source, read when the call was made.
    Data {
        dst: u64,
        bytes: Arc<Vec<u8>>,
    },
    Copy2D(Copy2D),
    Set {
        dst: u64,
        value: u32,
        width: usize,
        n: usize,
    },
    Host {
        function: unsafe extern "C" fn(*mut c_void),
        data: u64,
    },
    /// A function that stands for kernels; what it returns, if not 0, is the error that the device reports.
    Kernel {
        function: unsafe extern "C" fn(*mut c_void) -> i32,
        data: u64,
    },
    CopyCast(Arc<CopyCast>),
    CopyBatch(Arc<Vec<CopyCast>>),
    Mark {
        event: u64,
        version: u64,
    },
    Await {
        stream: u64,
        position: u64,
    },
    Graph(Arc<Vec<Op>>),
}

impl Op {
    /// CUgraphNodeType.
    fn node_type(&self) -> i32 {
        match self {
            Op::Kernel { .. } | Op::CopyCast(_) | Op::CopyBatch(_) => 0,
            Op::Copy { .. } | Op::Data { .. } | Op::Copy2D(_) => 1,
            Op::Set { .. } => 2,
            Op::Host { .. } => 3,
            Op::Graph(_) => 4,
            Op::Mark { .. } | Op::Await { .. } => 5,
        }
    }
}

pub struct Stream {
    pub context: u64,
    pub non_blocking: bool,
    pub priority: i32,
    /// Made by cuStreamCreate.
    pub user: bool,
    /// Destroyed with work left, which still completes.
    pub zombie: bool,
    pub queue: VecDeque<Op>,
    pub issued: u64,
    pub done: u64,
    /// How far a query has already asked and been told "not ready".
    asked: u64,
    pub capture: Option<u64>,
    /// Nodes of the capture that the next one on this stream depends on, directly or not.
    known: BTreeSet<usize>,
}

impl Stream {
    pub fn new(context: u64, non_blocking: bool, priority: i32, user: bool) -> Self {
        Stream {
            context,
            non_blocking,
            priority,
            user,
            zombie: false,
            queue: VecDeque::new(),
            issued: 0,
            done: 0,
            asked: 0,
            capture: None,
            known: BTreeSet::new(),
        }
    }
}

#[derive(Default)]
pub struct Event {
    pub context: u64,
    pub timing: bool,
    pub version: u64,
    pub mark: Option<(u64, u64)>,
    pub captured: Option<(u64, BTreeSet<usize>)>,
    pub asked: bool,
    pub time: Option<Instant>,
}

pub struct Capture {
    pub id: u64,
    pub origin: u64,
    pub mode: i32,
    pub thread: u64,
    pub nodes: Vec<Op>,
    pub graph: u64,
    pub invalid: bool,
}

pub struct Graph {
    pub nodes: Vec<(u64, Op)>,
}

pub struct Exec {
    pub context: u64,
    pub nodes: Arc<Vec<Op>>,
    pub last: Option<(u64, u64)>,
}

// Stream handles ----------------------------------------------------------------------------------------------------

fn legacy_key(context: u64) -> u64 {
    context | 1
}

pub fn is_legacy(key: u64) -> bool {
    key >> 63 == 0 && key & 1 == 1
}

/// The registry key of a handle, default streams included.
pub fn stream(handle: u64) -> Result<u64, i32> {
    match handle {
        0..=2 => {
            let context = current()?;
            let key = if handle == 2 {
                1 << 63 | thread() << 34 | context
            } else {
                legacy_key(context)
            };
            st().streams.entry(key).or_insert_with(|| Stream::new(context, false, 0, false));
            Ok(key)
        }
        _ => match st().streams.get(&handle) {
            Some(stream) if stream.user && !stream.zombie => Ok(handle),
            Some(_) => refuse(INVALID_HANDLE, format!("stream {handle:#x} was destroyed")),
            None => refuse(INVALID_HANDLE, format!("{handle:#x} is no stream")),
        },
    }
}

// Capture rules -----------------------------------------------------------------------------------------------------

pub fn invalidate(capture: u64) {
    if let Some(capture) = st().captures.get_mut(&capture) {
        capture.invalid = true;
    }
}

/// Calls that CUDA names potentially unsafe while a capture runs: allocation, synchronous copies, queries and waits.
pub fn unsafe_call() -> Outcome {
    let me = thread();
    let mode = CAPTURE_MODE.get();
    let hit: Vec<u64> = st()
        .captures
        .values()
        .filter(|capture| match mode {
            0 => capture.mode == 0 || (capture.mode == 1 && capture.thread == me),
            1 => capture.mode != 2 && capture.thread == me,
            _ => false,
        })
        .map(|capture| capture.id)
        .collect();
    break_captures(&hit, CAPTURE_UNSUPPORTED)
}

/// What the call would have broken is invalid from here on, and the call itself is refused.
fn break_captures(hit: &[u64], error: i32) -> Outcome {
    for id in hit {
        invalidate(*id);
    }
    if hit.is_empty() {
        Ok(())
    } else {
        Err(error)
    }
}

/// The legacy stream would order itself against every blocking stream, which a capturing one cannot take.
fn implicit(key: u64) -> Outcome {
    if !is_legacy(key) {
        return Ok(());
    }
    let context = key & !1;
    let hit: Vec<u64> = st()
        .streams
        .values()
        .filter(|stream| stream.context == context && !stream.non_blocking)
        .filter_map(|stream| stream.capture)
        .collect();
    break_captures(&hit, CAPTURE_IMPLICIT)
}

/// Before a wait for, or a query of, a stream.
pub fn may_wait(key: u64) -> Outcome {
    if let Some(capture) = st().streams.get(&key).and_then(|stream| stream.capture) {
        invalidate(capture);
        return Err(CAPTURE_UNSUPPORTED);
    }
    implicit(key)?;
    unsafe_call()
}

pub fn capturing(key: u64) -> Result<Option<u64>, i32> {
    let Some(id) = st().streams.get(&key).and_then(|stream| stream.capture) else {
        return Ok(None);
    };
    match st().captures.get(&id) {
        Some(capture) if capture.invalid => Err(CAPTURE_INVALIDATED),
        _ => Ok(Some(id)),
    }
}

// Queueing ----------------------------------------------------------------------------------------------------------

fn push(key: u64, op: Op) {
    if let Some(stream) = st().streams.get_mut(&key) {
        stream.queue.push_back(op);
        stream.issued += 1;
    }
}

fn await_tail(key: u64, other: u64) {
    let Some(stream) = st().streams.get(&other) else { return };
    if stream.done < stream.issued {
        let position = stream.issued;
        push(key, Op::Await { stream: other, position });
    }
}

/// The legacy stream waits for the blocking ones, and they for it.
fn order_with_legacy(key: u64) {
    let Some(stream) = st().streams.get(&key) else { return };
    let context = stream.context;
    if is_legacy(key) {
        let mut others: Vec<u64> = st()
            .streams
            .iter()
            .filter(|(other, stream)| **other != key && stream.context == context && !stream.non_blocking)
            .map(|(other, _)| *other)
            .collect();
        others.sort_unstable();
        for other in others {
            await_tail(key, other);
        }
    } else if !stream.non_blocking {
        await_tail(key, legacy_key(context));
    }
}

/// Queues, or records into the running capture.
pub fn enqueue(key: u64, op: Op) -> Outcome {
    if let Some(id) = capturing(key)? {
        let state = st();
        let (Some(capture), Some(stream)) = (state.captures.get_mut(&id), state.streams.get_mut(&key)) else {
            return Err(CAPTURE_INVALIDATED);
        };
        stream.known.insert(capture.nodes.len());
        capture.nodes.push(op);
        return Ok(());
    }
    implicit(key)?;
    order_with_legacy(key);
    push(key, op);
    Ok(())
}

pub fn position(key: u64) -> u64 {
    st().streams.get(&key).map_or(0, |stream| stream.issued)
}

// Working off -------------------------------------------------------------------------------------------------------

/// Works a stream off up to a position, and whatever that work waits for.
pub fn drain(key: u64, upto: u64) {
    loop {
        let Some(stream) = st().streams.get_mut(&key) else { return };
        if stream.done >= upto {
            break;
        }
        let Some(op) = stream.queue.pop_front() else { break };
        let device = device_of(stream.context);
        run(&op, device);
        if let Some(stream) = st().streams.get_mut(&key) {
            stream.done += 1;
        }
    }
    let finished = st()
        .streams
        .get(&key)
        .is_some_and(|stream| stream.zombie && stream.queue.is_empty());
    if finished {
        st().streams.remove(&key);
    }
}

pub fn drain_all(context: u64) {
    let mut keys: Vec<u64> = st()
        .streams
        .iter()
        .filter(|(_, stream)| stream.context == context)
        .map(|(key, _)| *key)
        .collect();
    keys.sort_unstable();
    for key in keys {
        drain(key, u64::MAX);
    }
}

pub fn health() -> Outcome {
    match st().sticky {
        0 => Ok(()),
        code => Err(code),
    }
}

fn lost(text: String) {
    mistake(text);
    st().sticky = ILLEGAL_ADDRESS;
}

fn touchable(address: u64, n: usize, what: &str) -> bool {
    if n == 0 || place(address, n) != Place::Wrong {
        return true;
    }
    lost(format!(
        "{what} of {n} bytes at {address:#x}, which is not (or no longer) a live block of that size, when the work ran"
    ));
    false
}

fn run(op: &Op, device: i32) {
    if st().sticky != 0 && !matches!(op, Op::Await { .. } | Op::Mark { .. }) {
        return;
    }
    // SAFETY: every range is checked just before it is touched; pageable ones are the caller's word, as with the real driver.
    unsafe {
        match op {
            Op::Copy { dst, src, n } => {
                if touchable(*src, *n, "a copy read") && touchable(*dst, *n, "a copy write") {
                    std::ptr::copy(*src as *const u8, *dst as *mut u8, *n);
                }
            }
            Op::Data { dst, bytes } => {
                if touchable(*dst, bytes.len(), "a copy write") {
                    std::ptr::copy(bytes.as_ptr(), *dst as *mut u8, bytes.len());
                }
            }
            Op::Copy2D(c) => {
                for row in 0..c.height {
                    let (src, dst) = (c.src + (row * c.src_pitch) as u64, c.dst + (row * c.dst_pitch) as u64);
                    if !touchable(src, c.width, "a 2D copy read") || !touchable(dst, c.width, "a 2D copy write") {
                        break;
                    }
                    std::ptr::copy(src as *const u8, dst as *mut u8, c.width);
                }
            }
            Op::Set { dst, value, width, n } => {
                if touchable(*dst, n * width, "a memset") {
                    let bytes = value.to_le_bytes();
                    for i in 0..*n {
                        std::ptr::copy(bytes.as_ptr(), (*dst as *mut u8).add(i * width), *width);
                    }
                }
            }
            Op::Host { function, data } => function(*data as *mut c_void),
            Op::Kernel { function, data } => {
                let code = function(*data as *mut c_void);
                if code != 0 {
                    st().sticky = code;
                }
            }
            Op::CopyCast(parameters) => {
                if let Err(text) = kernel::run(parameters, device) {
                    lost(text);
                }
            }
            Op::CopyBatch(jobs) => {
                if let Err(text) = kernel::run_batch(jobs, device) {
                    lost(text);
                }
            }
            Op::Mark { event, version } => {
                if let Some(event) = st().events.get_mut(event) {
                    if event.version == *version {
                        event.time = Some(Instant::now());
                    }
                }
            }
            Op::Await { stream, position } => drain(*stream, *position),
            Op::Graph(nodes) => {
                for node in nodes.iter() {
                    run(node, device);
                }
            }
        }
    }
}

pub fn wait(key: u64) -> Outcome {
    may_wait(key)?;
    // A wait for the legacy stream is one for the blocking streams, too (seen on an H200).
    order_with_legacy(key);
    drain(key, u64::MAX);
    health()
}

/// "Not ready" once, then progress: who asks again has waited.
pub fn query(key: u64) -> Outcome {
    may_wait(key)?;
    order_with_legacy(key);
    let Some(stream) = st().streams.get_mut(&key) else {
        return Err(INVALID_HANDLE);
    };
    if stream.done < stream.issued {
        if stream.asked < stream.issued {
            stream.asked = stream.issued;
            return Err(NOT_READY);
        }
        drain(key, u64::MAX);
    }
    health()
}

pub fn destroy_stream(key: u64) {
    let Some(stream) = st().streams.get_mut(&key) else { return };
    if let Some(capture) = stream.capture.take() {
        invalidate(capture);
        mistake("a stream was destroyed while it captured");
        if st().captures.get(&capture).is_some_and(|c| c.origin == key) {
            end(capture);
        }
    }
    let Some(stream) = st().streams.get_mut(&key) else { return };
    if stream.queue.is_empty() {
        st().streams.remove(&key);
    } else {
        stream.zombie = true;
    }
}

// Events ------------------------------------------------------------------------------------------------------------

pub fn record(event: u64, key: u64) -> Outcome {
    let Some(stream) = st().streams.get(&key) else {
        return Err(INVALID_HANDLE);
    };
    let (context, known) = (stream.context, stream.known.clone());
    match st().events.get(&event) {
        None => return refuse(INVALID_HANDLE, format!("{event:#x} is no event")),
        Some(event) if event.context != context => {
            return refuse(INVALID_HANDLE, "an event was recorded on a stream of another context");
        }
        Some(_) => {}
    }
    let capture = capturing(key)?;
    let version = handle();
    if capture.is_none() {
        enqueue(key, Op::Mark { event, version })?;
    }
    let at = position(key);
    let Some(event) = st().events.get_mut(&event) else {
        return Err(INVALID_HANDLE);
    };
    event.version = version;
    event.asked = false;
    event.time = None;
    match capture {
        Some(id) => {
            event.captured = Some((id, known));
            event.mark = None;
        }
        None => {
            event.captured = None;
            event.mark = Some((key, at));
        }
    }
    Ok(())
}

pub fn wait_event(key: u64, event: u64) -> Outcome {
    let capture = capturing(key)?;
    let Some(found) = st().events.get(&event) else {
        return refuse(INVALID_HANDLE, format!("{event:#x} is no event"));
    };
    let (mark, captured) = (found.mark, found.captured.clone());
    match (captured, capture) {
        (Some((id, known)), joined) => {
            if !st().captures.contains_key(&id) {
                return Err(CAPTURED_EVENT);
            }
            if joined.is_some_and(|own| own != id) || is_legacy(key) {
                invalidate(id);
                return Err(if is_legacy(key) { CAPTURE_IMPLICIT } else { CAPTURE_ISOLATION });
            }
            let Some(stream) = st().streams.get_mut(&key) else {
                return Err(INVALID_HANDLE);
            };
            if joined.is_none() {
                stream.known.clear();
            }
            stream.capture = Some(id);
            stream.known.extend(known);
            Ok(())
        }
        (None, Some(id)) => {
            // Work outside the capture cannot be waited for inside it.
            if mark.is_some() {
                invalidate(id);
                return Err(CAPTURE_ISOLATION);
            }
            Ok(())
        }
        (None, None) => match mark {
            Some((stream, position)) => enqueue(key, Op::Await { stream, position }),
            None => Ok(()),
        },
    }
}

fn event_state(event: u64) -> Result<Option<(u64, u64)>, i32> {
    let Some(found) = st().events.get(&event) else {
        return refuse(INVALID_HANDLE, format!("{event:#x} is no event"));
    };
    if let Some((capture, _)) = &found.captured {
        invalidate(*capture);
        return Err(CAPTURED_EVENT);
    }
    let mark = found.mark;
    unsafe_call()?;
    // A stream that is gone has finished.
    Ok(mark.filter(|(stream, position)| st().streams.get(stream).is_some_and(|stream| stream.done < *position)))
}

pub fn event_query(event: u64) -> Outcome {
    let Some((stream, position)) = event_state(event)? else {
        return health();
    };
    let Some(found) = st().events.get_mut(&event) else {
        return Err(INVALID_HANDLE);
    };
    if !found.asked {
        found.asked = true;
        return Err(NOT_READY);
    }
    drain(stream, position);
    health()
}

pub fn event_wait(event: u64) -> Outcome {
    if let Some((stream, position)) = event_state(event)? {
        drain(stream, position);
    }
    health()
}

/// Milliseconds between two events that have both happened.
pub fn elapsed(start: u64, end: u64) -> Result<f32, i32> {
    let state = st();
    let (Some(a), Some(b)) = (state.events.get(&start), state.events.get(&end)) else {
        return refuse(INVALID_HANDLE, "cuEventElapsedTime got something that is no event");
    };
    if !a.timing || !b.timing || a.version == 0 || b.version == 0 {
        return Err(INVALID_HANDLE);
    }
    match (a.time, b.time) {
        (Some(a), Some(b)) => Ok(b.saturating_duration_since(a).as_secs_f32() * 1e3),
        _ => Err(NOT_READY),
    }
}

// Capture -----------------------------------------------------------------------------------------------------------

pub fn begin(key: u64, mode: i32) -> Outcome {
    if is_legacy(key) {
        return Err(CAPTURE_UNSUPPORTED);
    }
    if !(0..=2).contains(&mode) {
        return Err(INVALID_VALUE);
    }
    let (id, graph) = (handle(), handle());
    let Some(stream) = st().streams.get_mut(&key) else {
        return Err(INVALID_HANDLE);
    };
    if stream.capture.is_some() {
        return Err(ILLEGAL_STATE);
    }
    stream.capture = Some(id);
    stream.known.clear();
    st().captures.insert(
        id,
        Capture {
            id,
            origin: key,
            mode,
            thread: thread(),
            nodes: Vec::new(),
            graph,
            invalid: false,
        },
    );
    Ok(())
}

fn end(id: u64) -> Option<Capture> {
    for stream in st().streams.values_mut() {
        if stream.capture == Some(id) {
            stream.capture = None;
        }
    }
    st().captures.remove(&id)
}

pub fn finish(key: u64) -> Result<u64, i32> {
    let Some(stream) = st().streams.get(&key) else {
        return Err(INVALID_HANDLE);
    };
    let (capture, known) = (stream.capture, stream.known.len());
    let Some(id) = capture else { return Err(ILLEGAL_STATE) };
    let Some(running) = st().captures.get(&id) else {
        return Err(ILLEGAL_STATE);
    };
    if running.origin != key {
        invalidate(id);
        return Err(903); // unmatched: the capture was begun on another stream
    }
    if running.mode != 2 && running.thread != thread() {
        return Err(CAPTURE_WRONG_THREAD);
    }
    let Some(capture) = end(id) else { return Err(ILLEGAL_STATE) };
    if st().settings.capture_fail != 0 {
        return Err(st().settings.capture_fail as i32);
    }
    if capture.invalid {
        return Err(CAPTURE_INVALIDATED);
    }
    if known != capture.nodes.len() {
        return Err(CAPTURE_UNJOINED);
    }
    let nodes: Vec<(u64, Op)> = capture.nodes.into_iter().map(|op| (handle(), op)).collect();
    for (node, op) in &nodes {
        st().nodes.insert(*node, op.node_type());
    }
    st().graphs.insert(capture.graph, Graph { nodes });
    Ok(capture.graph)
}

pub fn destroy_graph(graph: u64) -> Outcome {
    match st().graphs.remove(&graph) {
        None => refuse(INVALID_VALUE, format!("{graph:#x} is no graph, or was destroyed before")),
        Some(graph) => {
            for (node, _) in &graph.nodes {
                st().nodes.remove(node);
            }
            Ok(())
        }
    }
}

pub fn instantiate(graph: u64) -> Result<u64, i32> {
    let context = current()?;
    let Some(found) = st().graphs.get(&graph) else {
        return refuse(INVALID_VALUE, format!("{graph:#x} is no graph"));
    };
    let nodes = Arc::new(found.nodes.iter().map(|(_, op)| op.clone()).collect());
    let exec = handle();
    st().execs.insert(
        exec,
        Exec {
            context,
            nodes,
            last: None,
        },
    );
    Ok(exec)
}

pub fn launch(exec: u64, key: u64) -> Outcome {
    let Some(found) = st().execs.get(&exec) else {
        return refuse(INVALID_VALUE, format!("{exec:#x} is no graph executable, or was destroyed before"));
    };
    let (nodes, last) = (found.nodes.clone(), found.last);
    if capturing(key)?.is_some() {
        return enqueue(key, Op::Graph(nodes));
    }
    // Launches of one executable never overlap.
    if let Some((stream, position)) = last {
        if stream != key && st().streams.get(&stream).is_some_and(|stream| stream.done < position) {
            push(key, Op::Await { stream, position });
        }
    }
    enqueue(key, Op::Graph(nodes))?;
    let at = position(key);
    if let Some(found) = st().execs.get_mut(&exec) {
        found.last = Some((key, at));
    }
    Ok(())
}
