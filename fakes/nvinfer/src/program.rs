//! What the engines compute, on plain memory. It runs when the stream gets there.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use half::{bf16, f16};

use crate::abi::data_type;
use crate::driver::driver;
use crate::graph::{round, Array};
use crate::plan::{width, Dims, Plan, Program};
use crate::record::mistake;

pub struct Job {
    pub plan: Arc<Plan>,
    pub context: u64,
    pub captured: bool,
    pub device: i32,
    /// Address and shape for each tensor of the engine, in its order.
    pub tensors: Vec<(u64, Dims)>,
    pub scratch: u64,
    pub weights: u64,
    pub kind: JobKind,
    /// The plan's faults are due.
    pub faulty: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    /// One of an engine's kernels that leaves no trace.
    Filler,
    Compute,
    /// Counts what a data-dependent output will hold, into `counted`.
    Count,
}

const DEVICE_LOST: i32 = 700;

#[derive(Default)]
struct Jobs {
    next: u64,
    waiting: HashMap<u64, Arc<Job>>,
    counted: HashMap<u64, usize>,
}

/// Never held while the driver is called: the driver calls back with its own lock held.
fn jobs() -> MutexGuard<'static, Jobs> {
    static JOBS: OnceLock<Mutex<Jobs>> = OnceLock::new();
    JOBS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn submit(job: Job) -> u64 {
    let mut jobs = jobs();
    jobs.next += 1;
    let id = jobs.next;
    jobs.waiting.insert(id, Arc::new(job));
    id
}

pub fn withdraw(id: u64) {
    jobs().waiting.remove(&id);
}

pub fn counted(context: u64) -> usize {
    jobs().counted.get(&context).copied().unwrap_or(0)
}

/// Called when a context goes: how much of its eager work had not run yet.
pub fn forget(context: u64) -> usize {
    let mut jobs = jobs();
    let pending = jobs.waiting.values().filter(|job| job.context == context && !job.captured).count();
    jobs.waiting.retain(|_, job| job.context != context);
    jobs.counted.remove(&context);
    pending
}

pub unsafe extern "C" fn work(data: *mut c_void) -> i32 {
    let id = data as u64;
    let job = {
        let mut jobs = jobs();
        let Some(job) = jobs.waiting.get(&id).cloned() else {
            drop(jobs);
            mistake("work ran (or a graph was launched) after its execution context had been destroyed");
            return DEVICE_LOST;
        };
        if !job.captured {
            jobs.waiting.remove(&id);
        }
        job
    };
    if job.kind == JobKind::Filler {
        return 0;
    }
    let Ok(driver) = driver() else { return DEVICE_LOST };
    for (tensor, (address, dims)) in job.plan.io.iter().zip(&job.tensors) {
        let counting = job.kind == JobKind::Count;
        if tensor.host || (counting && !tensor.input) {
            continue;
        }
        if !driver.may_touch(*address, dims.volume() * width(tensor.dtype), job.device, &tensor.name) {
            return DEVICE_LOST;
        }
    }
    if job.plan.device_memory > 0 && !driver.may_touch(job.scratch, job.plan.device_memory, job.device, c"the context's device memory") {
        return DEVICE_LOST;
    }
    if !driver.may_touch(job.weights, job.plan.weights_bytes, job.device, c"the engine's weights") {
        return DEVICE_LOST;
    }
    // Whoever shares this memory finds it overwritten.
    if job.plan.device_memory > 0 {
        std::ptr::write_bytes(job.scratch as *mut u8, 0x5C, job.plan.device_memory);
    }
    if job.kind == JobKind::Count {
        let n = nonzero(&job, None);
        jobs().counted.insert(job.context, n);
    } else {
        if job.plan.ms > 0.0 {
            std::thread::sleep(std::time::Duration::from_secs_f64(job.plan.ms / 1e3));
        }
        compute(&job);
        if job.faulty {
            if job.plan.run == "lost" {
                return DEVICE_LOST;
            }
            spoil(&job);
        }
        if job.captured && job.plan.in_capture == "differ" {
            if let Some((i, tensor)) = job.plan.outputs().next() {
                let (address, dims) = job.tensors[i];
                std::ptr::write_bytes(address as *mut u8, 0x3C, dims.volume() * width(tensor.dtype));
            }
        }
    }
    0
}

pub unsafe fn get(address: u64, dtype: i32, i: usize) -> f64 {
    let at = (address as *const u8).add(i * width(dtype));
    match dtype {
        data_type::FLOAT => f64::from(at.cast::<f32>().read_unaligned()),
        data_type::HALF => f16::from_bits(at.cast::<u16>().read_unaligned()).to_f64(),
        data_type::BF16 => bf16::from_bits(at.cast::<u16>().read_unaligned()).to_f64(),
        data_type::INT8 => f64::from(at.cast::<i8>().read()),
        data_type::INT32 => f64::from(at.cast::<i32>().read_unaligned()),
        data_type::INT64 => at.cast::<i64>().read_unaligned() as f64,
        _ => f64::from(at.read()),
    }
}

unsafe fn set(address: u64, dtype: i32, i: usize, x: f64) {
    let at = (address as *mut u8).add(i * width(dtype));
    match dtype {
        data_type::FLOAT => at.cast::<f32>().write_unaligned(x as f32),
        data_type::HALF => at.cast::<u16>().write_unaligned(f16::from_f64(x).to_bits()),
        data_type::BF16 => at.cast::<u16>().write_unaligned(bf16::from_f32(x as f32).to_bits()),
        data_type::INT8 => at.cast::<i8>().write(x as i8),
        data_type::INT32 => at.cast::<i32>().write_unaligned(x as i32),
        data_type::INT64 => at.cast::<i64>().write_unaligned(x as i64),
        data_type::BOOL => at.write(u8::from(x != 0.0)),
        _ => at.write(x as u8),
    }
}

/// How many elements of the first input are not zero; their indices, row by row, go to `out` with `k` columns.
unsafe fn nonzero(job: &Job, out: Option<(u64, usize)>) -> usize {
    let Some((input, tensor)) = job.plan.inputs().next() else {
        return 0;
    };
    let (address, dims) = job.tensors[input];
    let mut found = 0;
    for i in 0..dims.volume() {
        if get(address, tensor.dtype, i) == 0.0 {
            continue;
        }
        if let Some((out, k)) = out {
            let mut rest = i;
            for axis in (0..dims.shape().len()).rev() {
                let size = dims.d[axis] as usize;
                (out as *mut i64).add(axis * k + found).write_unaligned((rest % size) as i64);
                rest /= size;
            }
        }
        found += 1;
    }
    found
}

/// Outputs as wrong as the plan says: a number is a relative error, "nan" is that, anything else is noise.
unsafe fn spoil(job: &Job) {
    for (i, tensor) in job.plan.outputs() {
        let (address, dims) = job.tensors[i];
        let each = |f: &dyn Fn(f64) -> f64| {
            for k in 0..dims.volume() {
                set(address, tensor.dtype, k, f(get(address, tensor.dtype, k)));
            }
        };
        match &job.plan.differ {
            serde_json::Value::Null | serde_json::Value::Bool(false) => {}
            serde_json::Value::Number(n) => each(&|x| x * (1.0 + n.as_f64().unwrap_or(0.0))),
            serde_json::Value::String(text) if text == "nan" => each(&|_| f64::NAN),
            _ => std::ptr::write_bytes(address as *mut u8, 0x3C, dims.volume() * width(tensor.dtype)),
        }
    }
}

unsafe fn compute(job: &Job) {
    let plan = &job.plan;
    let weights = plan.weights();
    if weights.lost {
        for (i, tensor) in plan.outputs() {
            let (address, dims) = job.tensors[i];
            std::ptr::write_bytes(address as *mut u8, 0, dims.volume() * width(tensor.dtype));
        }
        return;
    }
    let inputs: Vec<usize> = plan.inputs().map(|(i, _)| i).collect();
    let outputs: Vec<usize> = plan.outputs().map(|(i, _)| i).collect();
    let input = |n: usize| (job.tensors[inputs[n]].0, plan.io[inputs[n]].dtype, job.tensors[inputs[n]].1);
    let output = |n: usize| (job.tensors[outputs[n]].0, plan.io[outputs[n]].dtype, job.tensors[outputs[n]].1);
    match plan.program {
        Program::Copy => {
            for n in 0..outputs.len() {
                let ((src, dtype, dims), (dst, ..)) = (input(n.min(inputs.len() - 1)), output(n));
                std::ptr::copy(src as *const u8, dst as *mut u8, dims.volume() * width(dtype));
            }
        }
        Program::Add => {
            let (dst, dtype, dims) = output(0);
            for i in 0..dims.volume() {
                let sum = (0..inputs.len()).map(|n| get(input(n).0, input(n).1, i)).sum();
                set(dst, dtype, i, sum);
            }
        }
        Program::Affine => {
            let ((x, from, _), (y, to, dims)) = (input(0), output(0));
            let (columns, depth) = (weights.b.len(), weights.w.len());
            let operand = |x: f64| round(&plan.compute, x) as f32;
            for row in 0..dims.volume() / columns.max(1) {
                for column in 0..columns {
                    let mut sum = weights.b[column];
                    for k in 0..depth {
                        sum += operand(get(x, from, row * depth + k)) * operand(f64::from(weights.w[k][column]));
                    }
                    set(y, to, row * columns + column, f64::from(sum));
                }
            }
        }
        Program::Dit5 => {
            // sa + the mean over S of (vl where both masks hold) + timestep
            let (sa, vl, time, image, backbone) = (input(0), input(1), input(2), input(3), input(4));
            let (out, dtype, dims) = output(0);
            let (s, width) = (vl.2.d[1] as usize, vl.2.d[2] as usize);
            let mut mean = vec![0f32; width];
            for position in 0..s {
                if get(image.0, image.1, position) != 0.0 && get(backbone.0, backbone.1, position) != 0.0 {
                    for (column, sum) in mean.iter_mut().enumerate() {
                        *sum += get(vl.0, vl.1, position * width + column) as f32;
                    }
                }
            }
            let step = get(time.0, time.1, 0) as f32;
            for i in 0..dims.volume() {
                let value = get(sa.0, sa.1, i) as f32 + mean[i % width] / s as f32 + step;
                set(out, dtype, i, f64::from(value));
            }
        }
        Program::Nonzero => {
            let (out, _, dims) = output(0);
            nonzero(job, Some((out, dims.d[1] as usize)));
        }
        Program::ShapeInput => {
            let ((x, from, dims), (y, to, out)) = (input(0), output(0));
            for i in 0..out.volume() {
                set(y, to, i, get(x, from, i % dims.volume().max(1)));
            }
        }
        Program::Graph => {
            let given = plan.inputs().map(|(i, tensor)| {
                let (address, dims) = job.tensors[i];
                let array = Array {
                    dims: dims.shape().iter().map(|&d| d as usize).collect(),
                    values: (0..dims.volume()).map(|k| get(address, tensor.dtype, k)).collect(),
                };
                (tensor.name.to_string_lossy().into_owned(), array)
            });
            match plan.graph.run(&given.collect(), &weights.named) {
                Ok(values) => {
                    for (i, tensor) in plan.outputs() {
                        let (address, dims) = job.tensors[i];
                        let found = values
                            .get(tensor.name.to_string_lossy().as_ref())
                            .map_or(&[][..], |array| &array.values);
                        for (k, &x) in found.iter().enumerate().take(dims.volume()) {
                            set(address, tensor.dtype, k, x);
                        }
                    }
                }
                Err(why) => mistake(&format!("the graph of a plan could not be computed: {why}")),
            }
        }
    }
}
