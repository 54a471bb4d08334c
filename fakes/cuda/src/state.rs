//! The one lock, the registries behind it, and the record of calls and mistakes.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::CString;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::work::{Capture, Event, Exec, Graph, Stream};

pub const INVALID_VALUE: i32 = 1;
pub const OUT_OF_MEMORY: i32 = 2;
pub const NOT_INITIALIZED: i32 = 3;
pub const NO_DEVICE: i32 = 100;
pub const INVALID_DEVICE: i32 = 101;
pub const INVALID_IMAGE: i32 = 200;
pub const INVALID_CONTEXT: i32 = 201;
pub const INVALID_PTX: i32 = 218;
pub const UNSUPPORTED_PTX_VERSION: i32 = 222;
pub const NO_BINARY_FOR_GPU: i32 = 209;
pub const INVALID_HANDLE: i32 = 400;
pub const ILLEGAL_STATE: i32 = 401;
pub const NOT_FOUND: i32 = 500;
pub const NOT_READY: i32 = 600;
pub const ILLEGAL_ADDRESS: i32 = 700;
pub const ALREADY_REGISTERED: i32 = 712;
pub const NOT_REGISTERED: i32 = 713;
pub const CONTEXT_IS_DESTROYED: i32 = 709;
pub const CAPTURE_UNSUPPORTED: i32 = 900;
pub const CAPTURE_INVALIDATED: i32 = 901;
pub const CAPTURE_UNJOINED: i32 = 904;
pub const CAPTURE_ISOLATION: i32 = 905;
pub const CAPTURE_IMPLICIT: i32 = 906;
pub const CAPTURED_EVENT: i32 = 907;
pub const CAPTURE_WRONG_THREAD: i32 = 908;

/// What fresh and freed memory is filled with: neither may ever look like a result.
pub const FRESH: u8 = 0xCD;
pub const POISON: u8 = 0xDB;
const FILL_LIMIT: usize = 64 << 20;

pub type Outcome = Result<(), i32>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Device(i32),
    Pinned,
    Registered,
}

#[derive(Clone, Copy, Debug)]
pub struct Block {
    pub size: usize,
    pub kind: Kind,
    pub context: u64,
    pub id: u64,
    pub flags: u32,
}

#[derive(Clone)]
pub struct Context {
    pub device: i32,
    /// Retains of a primary context; 1 for one made by cuCtxCreate. 0: not active.
    pub references: u32,
    pub primary: bool,
    pub flags: u32,
}

pub struct Module {
    pub context: u64,
    pub entries: Vec<String>,
}

pub struct Function {
    pub module: u64,
    pub name: String,
}

pub struct Settings {
    pub devices: i64,
    pub integrated: i64,
    pub memory: i64,
    pub sm: i64,
    pub driver: i64,
    /// Every capture fails at its end with this code.
    pub capture_fail: i64,
    /// A freed address may be handed out again at once, as the real allocator does.
    pub reuse: i64,
}

impl Settings {
    fn from_environment() -> Self {
        let read = |name: &str, default: i64| {
            std::env::var(name)
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(default)
        };
        Settings {
            devices: read("FAKE_CUDA_DEVICES", 1),
            integrated: read("FAKE_CUDA_INTEGRATED", 0),
            memory: read("FAKE_CUDA_MEMORY", 8 << 30),
            sm: read("FAKE_CUDA_SM", 90),
            driver: read("FAKE_CUDA_DRIVER", 12060),
            capture_fail: read("FAKE_CUDA_CAPTURE_FAIL", 0),
            reuse: read("FAKE_CUDA_REUSE", 0),
        }
    }
}

#[derive(Default)]
pub struct Calls {
    pub total: u64,
    pub by_name: HashMap<&'static str, u64>,
    pub log: Vec<&'static str>,
    /// Calls left until the injected failure (1: the next one), 0: none.
    pub countdown: i64,
    pub code: i32,
    pub last_failed: CString,
}

pub struct State {
    pub settings: Settings,
    pub initialized: bool,
    pub calls: Calls,
    pub errors: Vec<CString>,
    /// As on a real device, an illegal access makes every later call fail.
    pub sticky: i32,
    pub next_handle: u64,
    pub blocks: BTreeMap<u64, Block>,
    pub contexts: HashMap<u64, Context>,
    pub streams: HashMap<u64, Stream>,
    pub events: HashMap<u64, Event>,
    pub captures: HashMap<u64, Capture>,
    pub graphs: HashMap<u64, Graph>,
    pub execs: HashMap<u64, Exec>,
    pub nodes: HashMap<u64, i32>,
    pub modules: HashMap<u64, Module>,
    pub functions: HashMap<u64, Function>,
    arenas: HashMap<i32, Arena>,
}

struct Arena {
    next: u64,
    end: u64,
    /// Freed and poisoned, not to be handed out again soon: who still uses it shall find the poison.
    resting: VecDeque<(u64, usize)>,
    resting_bytes: usize,
    free: HashMap<usize, Vec<u64>>,
}

const QUARANTINE: usize = 64 << 20;

struct Global(UnsafeCell<Option<State>>);
// SAFETY: only reached through `st`, whose callers hold LOCK.
unsafe impl Sync for Global {}
static GLOBAL: Global = Global(UnsafeCell::new(None));
static LOCK: Mutex<()> = Mutex::new(());

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    pub static CURRENT: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    /// 0 global, 1 thread-local, 2 relaxed.
    pub static CAPTURE_MODE: Cell<i32> = const { Cell::new(0) };
    static THREAD: u64 = {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    };
}

pub fn thread() -> u64 {
    THREAD.with(|id| *id)
}

/// The lock, which the holding thread may take again: a host function runs while its stream is worked off.
pub struct Entered(#[allow(dead_code)] Option<MutexGuard<'static, ()>>);

pub fn enter() -> Entered {
    let depth = DEPTH.get();
    let guard = (depth == 0).then(|| LOCK.lock().unwrap_or_else(PoisonError::into_inner));
    DEPTH.set(depth + 1);
    Entered(guard)
}

impl Drop for Entered {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// Callers hold LOCK and let go of the reference before anything can call back.
#[allow(clippy::mut_from_ref)]
pub fn st() -> &'static mut State {
    debug_assert!(DEPTH.get() > 0);
    // SAFETY: LOCK is held (see above), so no other thread is here.
    let state = unsafe { &mut *GLOBAL.0.get() };
    state.get_or_insert_with(|| State {
        settings: Settings::from_environment(),
        initialized: false,
        calls: Calls::default(),
        errors: Vec::new(),
        sticky: 0,
        next_handle: 0x5eed_0000,
        blocks: BTreeMap::new(),
        contexts: HashMap::new(),
        streams: HashMap::new(),
        events: HashMap::new(),
        captures: HashMap::new(),
        graphs: HashMap::new(),
        execs: HashMap::new(),
        nodes: HashMap::new(),
        modules: HashMap::new(),
        functions: HashMap::new(),
        arenas: HashMap::new(),
    })
}

pub fn handle() -> u64 {
    let state = st();
    state.next_handle += 16;
    state.next_handle
}

/// Puts a mistake of the caller on the list that tests assert empty.
pub fn mistake(text: impl AsRef<str>) {
    let text = text.as_ref().replace('\0', "");
    if std::env::var_os("FAKE_CUDA_TRACE").is_some() {
        eprintln!("fake cuda: {text}");
    }
    st().errors.push(CString::new(text).unwrap_or_default());
}

/// A mistake that the driver answers with a code.
pub fn refuse<T>(code: i32, text: impl AsRef<str>) -> Result<T, i32> {
    mistake(text);
    Err(code)
}

fn count(name: &'static str) -> i32 {
    let calls = &mut st().calls;
    calls.total += 1;
    *calls.by_name.entry(name).or_insert(0) += 1;
    if calls.log.len() < 1 << 16 {
        calls.log.push(name);
    }
    if calls.countdown > 0 {
        calls.countdown -= 1;
        if calls.countdown == 0 {
            calls.last_failed = CString::new(name).unwrap_or_default();
            return calls.code;
        }
    }
    0
}

/// An ordinary call: an injected failure happens before any effect.
pub fn call(name: &'static str, body: impl FnOnce() -> Outcome) -> i32 {
    let _entered = enter();
    let injected = count(name);
    if injected != 0 {
        return injected;
    }
    if !st().initialized {
        return NOT_INITIALIZED;
    }
    if st().sticky != 0 {
        return st().sticky;
    }
    body().err().unwrap_or(0)
}

/// A call that needs neither cuInit nor a healthy device.
pub fn plain_call(name: &'static str, body: impl FnOnce() -> Outcome) -> i32 {
    let _entered = enter();
    let injected = count(name);
    if injected != 0 {
        return injected;
    }
    body().err().unwrap_or(0)
}

/// A call that gives something back: it does so even when it is told to fail, or the device is lost.
pub fn destroy_call(name: &'static str, body: impl FnOnce() -> Outcome) -> i32 {
    let _entered = enter();
    let injected = count(name);
    if !st().initialized {
        return NOT_INITIALIZED;
    }
    let code = body().err().unwrap_or(0);
    if injected != 0 {
        injected
    } else if code != 0 {
        code
    } else {
        st().sticky
    }
}

// Contexts ----------------------------------------------------------------------------------------------------------

pub const PRIMARY: u64 = 0xc0de_0000;

pub fn current() -> Result<u64, i32> {
    let top = CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0));
    if top == 0 {
        return Err(INVALID_CONTEXT);
    }
    match st().contexts.get(&top) {
        Some(context) if context.references > 0 => Ok(top),
        _ => Err(CONTEXT_IS_DESTROYED),
    }
}

pub fn device_of(context: u64) -> i32 {
    st().contexts.get(&context).map_or(0, |context| context.device)
}

/// Everything that belonged to a context goes with it; whatever its owner had not given back is a mistake on record.
pub fn tear_down(context: u64) {
    let state = st();
    let left = |what: &str, n: usize| {
        if n > 0 {
            mistake(format!("context {context:#x} ended with {n} {what} not given back"));
        }
    };
    let blocks: Vec<u64> = state
        .blocks
        .iter()
        .filter(|(_, block)| block.context == context)
        .map(|(address, _)| *address)
        .collect();
    left("blocks of memory", blocks.len());
    for address in blocks {
        release(address);
    }
    let state = st();
    left(
        "streams",
        state
            .streams
            .values()
            .filter(|s| s.context == context && s.user && !s.zombie)
            .count(),
    );
    state.streams.retain(|_, stream| stream.context != context);
    left("events", state.events.values().filter(|event| event.context == context).count());
    state.events.retain(|_, event| event.context != context);
    left("modules", state.modules.values().filter(|module| module.context == context).count());
    state.modules.retain(|_, module| module.context != context);
    left(
        "graph executables",
        state.execs.values().filter(|exec| exec.context == context).count(),
    );
    state.execs.retain(|_, exec| exec.context != context);
}

impl Arena {
    fn reserve(base: u64) -> Result<Arena, i32> {
        // SAFETY: a fresh reservation that replaces nothing.
        let at = unsafe {
            libc::mmap(
                base as *mut libc::c_void,
                ARENA as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        if at as u64 != base {
            return refuse(OUT_OF_MEMORY, format!("the address space at {base:#x} is taken"));
        }
        let (resting, free) = (VecDeque::new(), HashMap::new());
        Ok(Arena {
            next: base + 4096,
            end: base + ARENA,
            resting,
            resting_bytes: 0,
            free,
        })
    }

    fn take(&mut self, room: usize) -> Result<u64, i32> {
        if let Some(address) = self.free.get_mut(&room).and_then(Vec::pop) {
            return Ok(address);
        }
        let address = self.next;
        if address + room as u64 > self.end {
            return Err(OUT_OF_MEMORY);
        }
        self.next += room as u64;
        Ok(address)
    }

    fn give_back(&mut self, address: u64, room: usize, limit: usize) {
        self.resting.push_back((address, room));
        self.resting_bytes += room;
        while self.resting_bytes > limit {
            let Some((address, room)) = self.resting.pop_front() else { break };
            self.resting_bytes -= room;
            let (from, to) = (address.div_ceil(4096) * 4096, (address + room as u64) / 4096 * 4096);
            if to > from && room > 1 << 20 {
                // SAFETY: whole pages inside the block.
                unsafe { libc::madvise(from as *mut libc::c_void, (to - from) as usize, libc::MADV_DONTNEED) };
            }
            self.free.entry(room).or_default().push(address);
        }
    }
}

// Memory ------------------------------------------------------------------------------------------------------------

const ARENA: u64 = 1 << 40;
const PINNED_ARENA: i32 = -1;

fn arena_base(which: i32) -> u64 {
    if which == PINNED_ARENA {
        0x2000_0000_0000
    } else {
        0x1000_0000_0000 + which as u64 * ARENA
    }
}

pub fn in_arena(address: u64) -> bool {
    let devices = arena_base(0)..arena_base(16);
    let pinned = arena_base(PINNED_ARENA)..arena_base(PINNED_ARENA) + ARENA;
    devices.contains(&address) || pinned.contains(&address)
}

pub fn device_bytes(device: i32) -> u64 {
    let integrated = st().settings.integrated != 0;
    st().blocks
        .values()
        .filter(|block| block.kind == Kind::Device(device) || (integrated && block.kind == Kind::Pinned))
        .map(|block| block.size as u64)
        .sum()
}

pub fn allocate(kind: Kind, size: usize, flags: u32) -> Result<u64, i32> {
    let context = current()?;
    if size == 0 {
        return Err(INVALID_VALUE);
    }
    let which = match kind {
        Kind::Device(device) => device,
        _ => PINNED_ARENA,
    };
    let device = device_of(context);
    if kind != Kind::Pinned || st().settings.integrated != 0 {
        let left = (st().settings.memory as u64).saturating_sub(device_bytes(device));
        if size as u64 > left {
            return Err(OUT_OF_MEMORY);
        }
    }
    let room = room_for(size);
    let state = st();
    let arena = match state.arenas.entry(which) {
        Entry::Occupied(arena) => arena.into_mut(),
        Entry::Vacant(none) => none.insert(Arena::reserve(arena_base(which))?),
    };
    let address = arena.take(room)?;
    // SAFETY: the block was just carved out of the arena.
    unsafe { std::ptr::write_bytes(address as *mut u8, FRESH, size.min(FILL_LIMIT)) };
    let id = handle();
    st().blocks.insert(
        address,
        Block {
            size,
            kind,
            context,
            id,
            flags,
        },
    );
    Ok(address)
}

fn room_for(size: usize) -> usize {
    // 512 like the driver's own blocks, and a gap so that neighbouring blocks never touch.
    size.div_ceil(512) * 512 + 512
}

/// Gives a block back and poisons it. The caller has checked that it exists.
pub fn release(address: u64) {
    let Some(block) = st().blocks.remove(&address) else { return };
    let which = match block.kind {
        Kind::Device(device) => device,
        Kind::Pinned => PINNED_ARENA,
        Kind::Registered => return,
    };
    // SAFETY: arena memory stays mapped.
    unsafe { std::ptr::write_bytes(address as *mut u8, POISON, block.size.min(FILL_LIMIT)) };
    let reuse = st().settings.reuse != 0;
    if let Some(arena) = st().arenas.get_mut(&which) {
        arena.give_back(address, room_for(block.size), if reuse { 0 } else { QUARANTINE });
    }
}

/// The block that holds `address`, with its start.
pub fn block_at(address: u64) -> Option<(u64, Block)> {
    let (start, block) = st().blocks.range(..=address).next_back()?;
    (address < start + block.size as u64).then_some((*start, *block))
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    Device(i32),
    /// Page-locked: the device may touch it, and copies of it are asynchronous.
    Locked,
    Pageable,
    /// Looks like device memory but is freed, or the range runs past its block.
    Wrong,
}

pub fn place(address: u64, size: usize) -> Place {
    match block_at(address) {
        Some((start, block)) => {
            if address - start + size as u64 > block.size as u64 {
                return Place::Wrong;
            }
            match block.kind {
                Kind::Device(device) => Place::Device(device),
                Kind::Pinned | Kind::Registered => Place::Locked,
            }
        }
        None if in_arena(address) || address < 4096 => Place::Wrong,
        None => Place::Pageable,
    }
}

/// Whether a kernel on `device` may touch these bytes.
pub fn reachable(address: u64, size: usize, device: i32) -> bool {
    size == 0
        || match place(address, size) {
            Place::Device(owner) => owner == device,
            Place::Locked => true,
            Place::Pageable | Place::Wrong => false,
        }
}
