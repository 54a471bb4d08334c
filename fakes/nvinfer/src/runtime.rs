//! IRuntime and IHostMemory.

use std::ffi::{c_char, c_void, CString};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use crate::abi::{gpu_allocator, host_memory, runtime as slots, stream_reader_v2, Slot};
use crate::driver::{driver, sm};
use crate::engine::Engine;
use crate::object::{check_kind, make, user_method, Class, Object, Public};
use crate::plan;
use crate::record::mistake;
use crate::{allowed, Reporter};

pub struct Runtime {
    pub reporter: Reporter,
    host_code: bool,
    max_threads: i32,
    tempfile_flags: u32,
    dla: i32,
    directory: CString,
    allocator: usize,
    engines: Arc<AtomicUsize>,
}

impl Runtime {
    pub fn new(reporter: Reporter) -> Runtime {
        Runtime {
            reporter,
            host_code: false,
            max_threads: 1,
            tempfile_flags: 3,
            dla: -1,
            directory: CString::default(),
            allocator: 0,
            engines: Arc::new(AtomicUsize::new(0)),
        }
    }

    fn deserialize(&self, bytes: &[u8]) -> *mut Public {
        let result = driver().map_err(str::to_owned).and_then(|driver| {
            let device = driver.attach()?;
            let (plan, log) = plan::parse(bytes, self.host_code, sm()?)?;
            self.reporter.log(
                crate::abi::severity::INFO,
                &format!("Loaded engine size: {} MiB", bytes.len() >> 20),
            );
            for (severity, line) in log {
                self.reporter.log(severity, &line);
            }
            Engine::new(plan, self.reporter, self.allocator, device, self.engines.clone())
        });
        match result {
            Ok(engine) => make(engine),
            Err(why) => {
                self.reporter.error(&why);
                std::ptr::null_mut()
            }
        }
    }
}

impl Class for Runtime {
    const NAME: &'static str = "IRuntime";
    const ROW: usize = 0;

    fn destroyed(&mut self) {
        let left = self.engines.load(Ordering::Relaxed);
        if left > 0 {
            mistake(&format!("a runtime was destroyed before {left} of its engines"));
        }
    }

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (slots::GET_P_IMPL, get_pimpl as *const () as usize),
            (slots::DESERIALIZE_CUDA_ENGINE, deserialize as *const () as usize),
            (slots::DESERIALIZE_CUDA_ENGINE_V2, deserialize_v2 as *const () as usize),
            (slots::SET_DLA_CORE, set_dla as *const () as usize),
            (slots::GET_DLA_CORE, get_dla as *const () as usize),
            (slots::GET_NB_DLA_CORES, nb_dla as *const () as usize),
            (slots::SET_GPU_ALLOCATOR, set_allocator as *const () as usize),
            (slots::SET_ERROR_RECORDER, set_recorder as *const () as usize),
            (slots::GET_ERROR_RECORDER, get_recorder as *const () as usize),
            (slots::GET_LOGGER, get_logger as *const () as usize),
            (slots::SET_MAX_THREADS, set_max_threads as *const () as usize),
            (slots::GET_MAX_THREADS, get_max_threads as *const () as usize),
            (slots::SET_TEMPORARY_DIRECTORY, set_directory as *const () as usize),
            (slots::GET_TEMPORARY_DIRECTORY, get_directory as *const () as usize),
            (slots::SET_TEMPFILE_CONTROL_FLAGS, set_flags as *const () as usize),
            (slots::GET_TEMPFILE_CONTROL_FLAGS, get_flags as *const () as usize),
            (slots::SET_ENGINE_HOST_CODE_ALLOWED, set_host_code as *const () as usize),
            (slots::GET_ENGINE_HOST_CODE_ALLOWED, get_host_code as *const () as usize),
        ]
    }
}

type This = *mut Object<Runtime>;

unsafe extern "C" fn get_pimpl(this: This) -> *mut Public {
    Object::public(this)
}

unsafe extern "C" fn deserialize(this: This, blob: *const u8, size: u64) -> *mut Public {
    let runtime = Object::body(this);
    if !allowed(&runtime.reporter, "IRuntime", "deserializeCudaEngine") {
        return std::ptr::null_mut();
    }
    if blob.is_null() {
        runtime
            .reporter
            .error("IRuntime::deserializeCudaEngine: Error Code 3: API Usage Error (Parameter check failed, condition: blob != nullptr.)");
        return std::ptr::null_mut();
    }
    runtime.deserialize(std::slice::from_raw_parts(blob, size as usize))
}

unsafe extern "C" fn deserialize_v2(this: This, reader: *mut u8) -> *mut Public {
    let runtime = Object::body(this);
    if !allowed(&runtime.reporter, "IRuntime", "deserializeCudaEngine") {
        return std::ptr::null_mut();
    }
    check_kind(reader, stream_reader_v2::GET_INTERFACE_INFO, stream_reader_v2::KIND);
    let (Some(read), Some(seek)) = (
        user_method(reader, stream_reader_v2::READ),
        user_method(reader, stream_reader_v2::SEEK),
    ) else {
        return std::ptr::null_mut();
    };
    let read: unsafe extern "C" fn(*mut u8, *mut c_void, i64, u64) -> i64 = std::mem::transmute(read);
    let seek: unsafe extern "C" fn(*mut u8, i64, i32) -> bool = std::mem::transmute(seek);
    // As much as the header promises, the header read first and once more from the start.
    let mut header = [0u8; plan::HEADER];
    let mut plan = Vec::new();
    let complete = read(reader, header.as_mut_ptr().cast(), header.len() as i64, 0) == header.len() as i64 && seek(reader, 0, 0) && {
        let promised = u64::from_le_bytes([
            header[16], header[17], header[18], header[19], header[20], header[21], header[22], header[23],
        ]) as usize;
        plan.resize(promised.min(1 << 30), 0u8);
        let mut at = 0;
        while at < plan.len() {
            let n = read(reader, plan[at..].as_mut_ptr().cast(), (plan.len() - at).min(4096) as i64, 0);
            if n <= 0 {
                break;
            }
            at += n as usize;
        }
        at == promised
    };
    if !complete {
        runtime.reporter.error("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion read == requested failed.The stream ended early)");
        return std::ptr::null_mut();
    }
    runtime.deserialize(&plan)
}

unsafe extern "C" fn set_dla(this: This, core: i32) {
    Object::body(this).dla = core;
}

unsafe extern "C" fn get_dla(this: This) -> i32 {
    Object::body(this).dla
}

unsafe extern "C" fn nb_dla(_: This) -> i32 {
    0
}

unsafe extern "C" fn set_allocator(this: This, allocator: *mut u8) {
    check_kind(allocator, gpu_allocator::GET_INTERFACE_INFO, gpu_allocator::KIND);
    Object::body(this).allocator = allocator as usize;
}

unsafe extern "C" fn set_recorder(this: This, recorder: *mut u8) {
    Object::body(this).reporter.set_recorder(recorder);
}

unsafe extern "C" fn get_recorder(this: This) -> usize {
    Object::body(this).reporter.recorder
}

unsafe extern "C" fn get_logger(this: This) -> usize {
    Object::body(this).reporter.logger
}

unsafe extern "C" fn set_max_threads(this: This, n: i32) -> bool {
    let runtime = Object::body(this);
    if n < 1 || !allowed(&runtime.reporter, "IRuntime", "setMaxThreads") {
        return false;
    }
    runtime.max_threads = n;
    true
}

unsafe extern "C" fn get_max_threads(this: This) -> i32 {
    Object::body(this).max_threads
}

unsafe extern "C" fn set_directory(this: This, path: *const c_char) {
    Object::body(this).directory = crate::text(path).to_owned();
}

unsafe extern "C" fn get_directory(this: This) -> *const c_char {
    Object::body(this).directory.as_ptr()
}

unsafe extern "C" fn set_flags(this: This, flags: u32) {
    Object::body(this).tempfile_flags = flags;
}

unsafe extern "C" fn get_flags(this: This) -> u32 {
    Object::body(this).tempfile_flags
}

unsafe extern "C" fn set_host_code(this: This, allowed: bool) {
    Object::body(this).host_code = allowed;
}

unsafe extern "C" fn get_host_code(this: This) -> bool {
    Object::body(this).host_code
}

pub struct HostMemory(pub Vec<u8>);

impl Class for HostMemory {
    const NAME: &'static str = "IHostMemory";
    const ROW: usize = 3;

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (host_memory::DATA, data as *const () as usize),
            (host_memory::SIZE, size as *const () as usize),
            (host_memory::TYPE, kind as *const () as usize),
        ]
    }
}

unsafe extern "C" fn data(this: *mut Object<HostMemory>) -> *const u8 {
    Object::body(this).0.as_ptr()
}

unsafe extern "C" fn size(this: *mut Object<HostMemory>) -> u64 {
    Object::body(this).0.len() as u64
}

unsafe extern "C" fn kind(_: *mut Object<HostMemory>) -> i32 {
    crate::abi::data_type::INT8
}
