//! Objects laid out as the real library lays them out: a public object `{ vptr, mImpl }` inside its implementation, the implementation's
//! own table reached through `mImpl`. Slots that nobody filled abort with their class and number, the one after the last too.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::abi::{self, Slot};
use crate::record::{live, mistake, version};

#[repr(C)]
pub struct Public {
    vptr: *const usize,
    implementation: *mut u8,
}

#[repr(C)]
pub struct Object<T> {
    vtable: *const usize,
    /// The public object lies at an offset that only the library knows.
    _before: [u64; 3],
    public: Public,
    body: Option<T>,
}

/// Who may give an object back.
#[derive(Clone, Copy)]
pub enum Destroyed {
    /// The caller, through slot 1 of the public object's own table.
    ByCaller,
    /// Nobody but the object that made it.
    ByOwner,
    /// The caller, through this slot: the object's methods are slots of that same table.
    By(Slot),
}

pub trait Class: Sized + 'static {
    const NAME: &'static str;
    /// Which row of `NAMES` is this class.
    const ROW: usize;
    const DESTROYED: Destroyed = Destroyed::ByCaller;
    fn filled() -> Vec<(Slot, usize)>;
    /// Before the body is dropped.
    fn destroyed(&mut self) {}
}

const NAMES: [&str; 19] = [
    "IRuntime",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "IEngineInspector",
    "IBuilder",
    "IBuilderConfig",
    "INetworkDefinition",
    "ITensor",
    "ILayer",
    "IOptimizationProfile",
    "ITimingCache",
    "IRefitter",
    "IParser",
    "IParserError",
    "IParserRefitter",
    "a public object",
    "a destroyed object",
    "a public object that was destroyed",
];
const PUBLIC: usize = 16;
const DEAD: usize = 17;
const DEAD_PUBLIC: usize = 18;
const LENGTH: usize = 96;

unsafe extern "C" fn unfilled<const ROW: usize, const SLOT: usize>() -> ! {
    let method = match ROW {
        0 => name(abi::runtime::ALL, SLOT),
        1 => name(abi::engine::ALL, SLOT),
        2 => name(abi::context::ALL, SLOT),
        3 => name(abi::host_memory::ALL, SLOT),
        4 => name(abi::inspector::ALL, SLOT),
        5 => name(abi::builder::ALL, SLOT),
        6 => name(abi::builder_config::ALL, SLOT),
        7 => name(abi::network::ALL, SLOT),
        8 => name(abi::tensor::ALL, SLOT),
        9 => name(abi::layer::ALL, SLOT),
        10 => name(abi::optimization_profile::ALL, SLOT),
        11 => name(abi::timing_cache::ALL, SLOT),
        12 => name(abi::refitter::ALL, SLOT),
        13 => name(abi::parser::ALL, SLOT),
        14 => name(abi::parser_error::ALL, SLOT),
        15 => name(abi::parser_refitter::ALL, SLOT),
        _ => "",
    };
    eprintln!(
        "fake nvinfer: slot {SLOT} of {} was called, which is not filled: {method}",
        NAMES[ROW]
    );
    std::process::abort();
}

fn name(slots: &[Slot], index: usize) -> &'static str {
    let (major, minor, ..) = version();
    slots
        .iter()
        .find(|slot| slot.index(major, minor) == Some(index))
        .map_or("no such method in this version", |s| s.method)
}

macro_rules! row {
    ($row:literal: $($slot:literal)*) => { [$(unfilled::<$row, $slot> as *const () as usize),*] };
}
macro_rules! rows {
    ($($row:literal)*) => { [$(row!($row:
        0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
        32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
        64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95)),*] };
}

fn unfilled_row(row: usize) -> [usize; LENGTH] {
    let rows: [[usize; LENGTH]; 19] = rows!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18);
    rows[row]
}

/// A table that lives as long as the process, kept by what it is for.
fn table(key: (usize, usize), fill: impl FnOnce(&mut [usize; LENGTH]), row: usize) -> *const usize {
    static TABLES: Mutex<Option<HashMap<(usize, usize), usize>>> = Mutex::new(None);
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    let at = *tables.get_or_insert_with(HashMap::new).entry(key).or_insert_with(|| {
        let mut slots = unfilled_row(row);
        fill(&mut slots);
        // offset_to_top and type_info come before slot 0.
        let mut whole = vec![0usize, 0];
        whole.extend(slots);
        whole.leak()[2..].as_ptr() as usize
    });
    at as *const usize
}

fn implementation_table<T: Class>() -> *const usize {
    let (major, minor, ..) = version();
    let fill = |slots: &mut [usize; LENGTH]| {
        for (slot, function) in T::filled() {
            if let Some(index) = slot.index(major, minor) {
                slots[index] = function;
            }
        }
        if let Destroyed::By(slot) = T::DESTROYED {
            if let Some(index) = slot.index(major, minor) {
                slots[index] = destroy_directly::<T> as *const () as usize;
            }
        }
    };
    table((T::ROW, 0), fill, T::ROW)
}

unsafe extern "C" fn complete_destructor(_: *mut Public) {
    mistake("the complete destructor (slot 0) was called: it does not give the object back, slot 1 does");
}

unsafe extern "C" fn destroyed_twice(_: *mut Public) {
    mistake("an object was destroyed twice");
}

unsafe extern "C" fn not_the_callers<T: Class>(_: *mut Public) {
    mistake(&format!(
        "the caller destroyed an {}, which belongs to the object that made it",
        T::NAME
    ));
}

unsafe extern "C" fn destroy<T: Class>(this: *mut Public) {
    retire(this.cast::<u8>().sub(std::mem::offset_of!(Object<T>, public)).cast::<Object<T>>());
}

unsafe extern "C" fn destroy_directly<T: Class>(this: *mut Object<T>) {
    retire(this);
}

/// The shell stays behind, so that using it again is told apart from using another object.
unsafe fn retire<T: Class>(object: *mut Object<T>) {
    let (major, minor, ..) = version();
    let again = match T::DESTROYED {
        Destroyed::By(slot) => slot.index(major, minor),
        _ => None,
    };
    let twice = |index: usize| move |slots: &mut [usize; LENGTH]| slots[index] = destroyed_twice as *const () as usize;
    (*object).vtable = match again {
        Some(index) => table((DEAD, index), twice(index), DEAD),
        None => table((DEAD, 0), |_| {}, DEAD),
    };
    (*object).public.vptr = table((DEAD_PUBLIC, 0), twice(abi::DELETING_DESTRUCTOR), DEAD_PUBLIC);
    if let Some(mut body) = (*object).body.take() {
        body.destroyed();
    }
    live(T::NAME, -1);
}

/// An object that another one owns goes with it.
pub unsafe fn discard<T: Class>(public: *mut Public) {
    retire((*public).implementation.cast::<Object<T>>());
}

pub unsafe fn discard_direct<T: Class>(object: *mut Object<T>) {
    retire(object);
}

pub fn make<T: Class>(body: T) -> *mut Public {
    let destructor = match T::DESTROYED {
        Destroyed::ByOwner => not_the_callers::<T> as *const () as usize,
        _ => destroy::<T> as *const () as usize,
    };
    let public_table = table(
        (PUBLIC, T::ROW),
        |slots| {
            slots[0] = complete_destructor as *const () as usize;
            slots[abi::DELETING_DESTRUCTOR] = destructor;
        },
        PUBLIC,
    );
    let object = Box::leak(Box::new(Object {
        vtable: implementation_table::<T>(),
        _before: [0xABAD_1DEA; 3],
        public: Public {
            vptr: public_table,
            implementation: std::ptr::null_mut(),
        },
        body: Some(body),
    }));
    object.public.implementation = std::ptr::from_mut(object).cast();
    live(T::NAME, 1);
    &mut object.public
}

/// An object whose methods are slots of the table that its own pointer points to.
pub fn make_direct<T: Class>(body: T) -> *mut Object<T> {
    // SAFETY: a public object just made.
    unsafe { (*make(body)).implementation.cast() }
}

/// The body behind a public object that a caller passes in; anything but a live object of that class ends the process.
pub unsafe fn of<'a, T: Class>(public: *mut Public) -> &'a mut T {
    if (public as usize) < 4096 || (*public.cast::<Public>()).implementation.is_null() {
        eprintln!("fake nvinfer: {public:?} was passed for an {}", T::NAME);
        std::process::abort();
    }
    let object = (*public).implementation.cast::<Object<T>>();
    if (*object).vtable != implementation_table::<T>() {
        eprintln!("fake nvinfer: what was passed for an {} is none, or is destroyed", T::NAME);
        std::process::abort();
    }
    Object::body(object)
}

impl<T: Class> Object<T> {
    /// A method's `this`, as the caller took it from `mImpl`.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn body<'a>(this: *mut Self) -> &'a mut T {
        if this.is_null() || (this as usize) < 4096 || !(this as usize).is_multiple_of(8) {
            eprintln!("fake nvinfer: a method of {} was called with this = {this:?}", T::NAME);
            std::process::abort();
        }
        match (*this).body.as_mut() {
            Some(body) => body,
            None => {
                eprintln!("fake nvinfer: a method of a destroyed {} was called", T::NAME);
                std::process::abort();
            }
        }
    }

    pub fn public(this: *mut Self) -> *mut Public {
        // SAFETY: `this` is a live object of ours.
        unsafe { &mut (*this).public }
    }
}

/// A method of an object that the user implements, by its slot.
pub unsafe fn user_method(object: *mut u8, slot: Slot) -> Option<usize> {
    let (major, minor, ..) = version();
    let index = slot.index(major, minor)?;
    let vptr = *object.cast::<*const usize>();
    Some(*vptr.add(index))
}

#[repr(C)]
pub struct InterfaceInfo {
    kind: *const std::ffi::c_char,
    major: i32,
    minor: i32,
}

/// What the user's object says it is; a wrong answer is a mistake on record.
pub unsafe fn check_kind(object: *mut u8, slot: Slot, kind: &std::ffi::CStr) {
    check_kinds(object, slot, &[kind]);
}

pub unsafe fn check_kinds(object: *mut u8, slot: Slot, kinds: &[&std::ffi::CStr]) {
    if object.is_null() {
        return;
    }
    let Some(method) = user_method(object, slot) else { return };
    let method: unsafe extern "C" fn(*mut u8) -> InterfaceInfo = std::mem::transmute(method);
    let info = method(object);
    if info.kind.is_null() || !kinds.contains(&std::ffi::CStr::from_ptr(info.kind)) || (info.major, info.minor) != (1, 0) {
        mistake(&format!("an object passed as {:?} does not say so in getInterfaceInfo", kinds[0]));
    }
}

/// Answers to getInterfaceInfo for callers that cannot return a structure themselves, such as ctypes.
macro_rules! answers {
    ($($name:ident: $module:ident),*) => { $(
        #[no_mangle]
        #[allow(non_snake_case)]
        pub extern "C" fn $name(_: *mut u8) -> InterfaceInfo {
            InterfaceInfo { kind: abi::$module::KIND.as_ptr(), major: abi::$module::INTERFACE_MAJOR, minor: abi::$module::INTERFACE_MINOR }
        }
    )* };
}
answers!(
    fake_trt_info_ILogger: logger,
    fake_trt_info_IOutputAllocator: output_allocator,
    fake_trt_info_IProfiler: profiler,
    fake_trt_info_IErrorRecorder: error_recorder,
    fake_trt_info_IStreamReaderV2: stream_reader_v2,
    fake_trt_info_IGpuAllocator: gpu_allocator,
    fake_trt_info_IDebugListener: debug_listener,
    fake_trt_info_IProgressMonitor: progress_monitor,
    fake_trt_info_IInt8EntropyCalibrator2: int8_entropy_calibrator_2,
    fake_trt_info_IInt8MinMaxCalibrator: int8_min_max_calibrator
);
