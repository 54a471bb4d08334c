//! Plans: the real 28-byte header, then JSON that says what the engine does.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use serde_json::Value;

use crate::abi::data_type;
use crate::graph::{self, Array, Graph};
use crate::record::version;

pub const HEADER: usize = 28;
pub const SERIALIZATION: u32 = 2;

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dims {
    pub nb: i32,
    pub d: [i64; 8],
}

const _: () = assert!(std::mem::size_of::<Dims>() == crate::abi::DIMS_BYTES);

impl Dims {
    pub const BAD: Dims = Dims { nb: -1, d: [0; 8] };

    pub fn new(shape: &[i64]) -> Dims {
        let mut d = [0; 8];
        d[..shape.len()].copy_from_slice(shape);
        Dims { nb: shape.len() as i32, d }
    }

    pub fn shape(&self) -> &[i64] {
        &self.d[..self.nb.clamp(0, 8) as usize]
    }

    pub fn volume(&self) -> usize {
        let sizes = self.shape().iter().map(|&d| d.max(0) as usize);
        sizes.fold(1, usize::saturating_mul)
    }

    pub fn known(&self) -> bool {
        self.nb >= 0 && self.shape().iter().all(|&d| d >= 0)
    }
}

pub struct Tensor {
    pub name: CString,
    pub input: bool,
    pub dtype: i32,
    pub shape: Dims,
    pub host: bool,
    pub format: i32,
    /// min, opt, max for each profile.
    pub profiles: Vec<[Dims; 3]>,
    /// min, opt, max of the values of a shape tensor, for each profile.
    pub values: Vec<[Vec<i64>; 3]>,
    pub debug: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    Dit5,
    Affine,
    Copy,
    Nonzero,
    Add,
    ShapeInput,
    /// The layers of an ONNX model, computed one after the other.
    Graph,
}

/// What a refit replaces.
#[derive(Default)]
pub struct Weights {
    pub w: Vec<Vec<f32>>,
    pub b: Vec<f32>,
    pub named: HashMap<String, Array>,
    /// A stripped plan that has not been refitted: it computes zeros.
    pub lost: bool,
}

impl Weights {
    /// FNV over the values, to tell a refit with the same weights from another.
    pub fn hash(&self) -> String {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut take = |x: f32| {
            for byte in x.to_bits().to_le_bytes() {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
        };
        self.w.iter().flatten().chain(&self.b).for_each(|&x| take(x));
        let mut names: Vec<&String> = self.named.keys().collect();
        names.sort();
        for name in names {
            self.named[name].values.iter().for_each(|&x| take(x as f32));
        }
        format!("{hash:016x}")
    }
}

pub struct Layer {
    pub name: CString,
    pub ms: f32,
    /// What the inspector says about it in detail.
    pub detail: Value,
}

pub struct Plan {
    pub name: CString,
    pub program: Program,
    pub io: Vec<Tensor>,
    pub profiles: usize,
    pub device_memory: usize,
    pub weights_bytes: usize,
    pub nodes: usize,
    pub aux_streams: usize,
    /// Stages that fail: deserialize, context, shapes, enqueue.
    pub fail: Vec<String>,
    /// What goes wrong only under capture: differ, empty, fail, sync.
    pub in_capture: String,
    weights: RwLock<Weights>,
    /// Columns of the product in `affine`.
    columns: usize,
    pub graph: Graph,
    shapes: Mutex<Option<(Vec<Dims>, Vec<Dims>)>>,
    /// The precision in which `affine` computes.
    pub compute: String,
    pub layers: Vec<Layer>,
    pub content: Value,
    /// Every how many-th call of enqueue the faults below happen.
    pub every: u64,
    pub enqueues: AtomicU64,
    /// What happens to the process in enqueue: crash, abort, exit, kill, hang; or lost: the device goes when the work runs.
    pub run: String,
    pub differ: Value,
    /// How long the work takes.
    pub ms: f64,
    pub bytes: Vec<u8>,
}

/// bytes of one element; 0 for types below a byte.
pub fn width(dtype: i32) -> usize {
    match dtype {
        data_type::FLOAT | data_type::INT32 => 4,
        data_type::HALF | data_type::BF16 => 2,
        data_type::INT64 => 8,
        data_type::INT8 | data_type::BOOL | data_type::UINT8 | data_type::FP8 | data_type::E8M0 => 1,
        _ => 0,
    }
}

fn dtype(name: &str) -> Result<i32, String> {
    Ok(match name {
        "float32" => data_type::FLOAT,
        "float16" => data_type::HALF,
        "int8" => data_type::INT8,
        "int32" => data_type::INT32,
        "bool" => data_type::BOOL,
        "uint8" => data_type::UINT8,
        "float8_e4m3fn" | "fp8" => data_type::FP8,
        "bfloat16" => data_type::BF16,
        "int64" => data_type::INT64,
        "int4" => data_type::INT4,
        "fp4" => data_type::FP4,
        other => return Err(format!("no dtype {other}")),
    })
}

/// The name that `dtype` reads.
pub fn dtype_name(dtype: i32) -> &'static str {
    match dtype {
        data_type::FLOAT => "float32",
        data_type::HALF => "float16",
        data_type::INT8 => "int8",
        data_type::INT32 => "int32",
        data_type::BOOL => "bool",
        data_type::UINT8 => "uint8",
        data_type::FP8 => "float8_e4m3fn",
        data_type::BF16 => "bfloat16",
        data_type::INT64 => "int64",
        data_type::INT4 => "int4",
        _ => "fp4",
    }
}

fn numbers(value: &Value) -> Vec<i64> {
    value
        .as_array()
        .map_or_else(Vec::new, |items| items.iter().filter_map(Value::as_i64).collect())
}

fn floats(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .map_or_else(Vec::new, |items| items.iter().filter_map(Value::as_f64).map(|x| x as f32).collect())
}

fn dims(value: &Value) -> Result<Dims, String> {
    let shape = numbers(value);
    if shape.len() > crate::abi::MAX_DIMS {
        return Err(format!("{} dimensions", shape.len()));
    }
    Ok(Dims::new(&shape))
}

fn c(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

fn tensor(value: &Value) -> Result<Tensor, String> {
    let text = |key: &str, default: &'static str| value[key].as_str().unwrap_or(default).to_owned();
    let shape = dims(&value["shape"])?;
    let mut profiles = Vec::new();
    for profile in value["profiles"].as_array().into_iter().flatten() {
        profiles.push([dims(&profile[0])?, dims(&profile[1])?, dims(&profile[2])?]);
    }
    let values = value["values"].as_array().map_or_else(Vec::new, |all| {
        all.iter().map(|v| [numbers(&v[0]), numbers(&v[1]), numbers(&v[2])]).collect()
    });
    Ok(Tensor {
        name: c(value["name"].as_str().ok_or("a tensor without a name")?),
        input: text("mode", "input") == "input",
        dtype: dtype(&text("dtype", "float32"))?,
        shape,
        host: text("location", "device") == "host",
        format: value["format"].as_i64().unwrap_or(0) as i32,
        profiles,
        values,
        debug: value["debug"].as_bool().unwrap_or(false),
    })
}

/// The plan, and the lines to log before it is used; or the line that says why not.
pub fn parse(bytes: &[u8], host_code_allowed: bool, sm: i64) -> Result<(Plan, Vec<(i32, String)>), String> {
    let serialization =
        |what: &str| format!("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion {what})");
    if bytes.len() < HEADER || &bytes[..4] != b"ftrt" {
        return Err(serialization("stdMagicTag == magicTagRead failed.Magic tag does not match)"));
    }
    let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let size = u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32;
    if u32_at(4) != SERIALIZATION {
        return Err(serialization(&format!(
            "stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match. Note: Current Version: {SERIALIZATION}, Serialized Engine Version: {}",
            u32_at(4)
        )));
    }
    let (major, minor, patch, build) = version();
    let got = [bytes[24], bytes[25], bytes[26], bytes[27]].map(u32::from);
    // A version-compatible plan brings the runtime of its own version, within one major.
    let brings_runtime = || {
        let content: Option<Value> = serde_json::from_slice(&bytes[HEADER..]).ok();
        got[0] == major && content.is_some_and(|content| content["host_code"] == true && content["version_compatible"] == true)
    };
    if got != [major, minor, patch, build] && !brings_runtime() {
        return Err(format!(
            "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is not compatible with this version of TensorRT, expecting library version {major}.{minor}.{patch}.{build} got {}.{}.{}.{}, please rebuild.)",
            got[0], got[1], got[2], got[3]
        ));
    }
    if size != bytes.len() as u64 {
        return Err(serialization(&format!(
            "{size} == {} failed.Size specified in header does not match archive size",
            bytes.len()
        )));
    }
    let json = std::str::from_utf8(&bytes[HEADER..]).map_err(|e| serialization(&format!("plan is text failed.{e}")))?;
    let value: Value = serde_json::from_str(json).map_err(|e| serialization(&format!("plan is JSON failed.{e}")))?;
    let wrong = |why: String| serialization(&format!("plan makes sense failed.{why}"));

    if value["host_code"].as_bool().unwrap_or(false) && !host_code_allowed {
        return Err("IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (Cannot deserialize engine with lean runtime since IRuntime::getEngineHostCodeAllowed() is false.)".to_owned());
    }
    let built_for = value["sm"].as_i64().unwrap_or(sm);
    let compatible = value["hardware_compatibility"] == "AMPERE_PLUS" && sm >= 80;
    if built_for != sm && !compatible {
        return Err(format!(
            "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is generated on an incompatible device, expecting compute {}.{} got compute {}.{}, please rebuild.)",
            sm / 10, sm % 10, built_for / 10, built_for % 10
        ));
    }
    let mut io = Vec::new();
    for one in value["io"].as_array().into_iter().flatten() {
        io.push(tensor(one).map_err(wrong)?);
    }
    let program = match value["program"].as_str().unwrap_or("") {
        "dit5" => Program::Dit5,
        "affine" => Program::Affine,
        "copy" => Program::Copy,
        "nonzero" => Program::Nonzero,
        "add" => Program::Add,
        "shape_input" => Program::ShapeInput,
        "graph" => Program::Graph,
        other => return Err(wrong(format!("no program {other:?}"))),
    };
    let strings = |key: &str| -> Vec<String> {
        match &value[key] {
            Value::String(one) => vec![one.clone()],
            Value::Array(many) => many.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            _ => Vec::new(),
        }
    };
    let mut log: Vec<(i32, String)> = value["log"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|line| (line[0].as_i64().unwrap_or(3) as i32, line[1].as_str().unwrap_or("").to_owned()))
        .collect();
    if value["foreign_model"].as_bool().unwrap_or(false) {
        log.push((2, "Using an engine plan file across different models of devices is not recommended and is likely to affect performance or even cause errors.".to_owned()));
    }
    let number = |key: &str, default: usize| value[key].as_u64().map_or(default, |n| n as usize);
    let profiles = io.iter().map(|t| t.profiles.len().max(t.values.len())).max().unwrap_or(0).max(1);
    let layers: Vec<Layer> = value["layers"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|layer| Layer {
            name: c(layer["Name"].as_str().or(layer.as_str()).unwrap_or("")),
            ms: 0.001,
            detail: layer.clone(),
        })
        .collect();
    let weights = Weights {
        w: value["w"].as_array().into_iter().flatten().map(floats).collect(),
        b: floats(&value["b"]),
        named: graph::read_weights(&value["graph"]["weights"]),
        lost: value["stripped"].as_bool().unwrap_or(false),
    };
    let plan = Plan {
        name: c(value["name"].as_str().unwrap_or("Unnamed Network 0")),
        program,
        profiles,
        device_memory: number("device_memory", 1024),
        weights_bytes: number("weights_bytes", 4096),
        nodes: number("nodes", layers.len()).max(1),
        aux_streams: number("aux_streams", 0),
        fail: strings("fail"),
        in_capture: value["in_capture"].as_str().unwrap_or("").to_owned(),
        columns: number("columns", weights.b.len()),
        weights: RwLock::new(weights),
        graph: graph::read(&value["graph"]),
        shapes: Mutex::default(),
        compute: value["compute"].as_str().unwrap_or("float32").to_owned(),
        layers,
        every: number("every", 1).max(1) as u64,
        enqueues: AtomicU64::new(0),
        run: value["run"].as_str().unwrap_or("").to_owned(),
        differ: value["differ"].clone(),
        ms: value["ms"].as_f64().unwrap_or(0.0),
        bytes: bytes.to_vec(),
        io,
        content: value,
    };
    if plan.fail.iter().any(|stage| stage == "deserialize") {
        return Err(serialization("the plan says so failed."));
    }
    Ok((plan, log))
}

impl Plan {
    pub fn find(&self, name: &CStr) -> Option<usize> {
        self.io.iter().position(|tensor| tensor.name.as_c_str() == name)
    }

    pub fn fails(&self, stage: &str) -> bool {
        self.fail.iter().any(|one| one == stage)
    }

    pub fn inputs(&self) -> impl Iterator<Item = (usize, &Tensor)> {
        self.io.iter().enumerate().filter(|(_, tensor)| tensor.input)
    }

    pub fn outputs(&self) -> impl Iterator<Item = (usize, &Tensor)> {
        self.io.iter().enumerate().filter(|(_, tensor)| !tensor.input)
    }

    pub fn weights(&self) -> RwLockReadGuard<'_, Weights> {
        self.weights.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn refit(&self, change: impl FnOnce(&mut Weights)) {
        change(&mut self.weights.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// The outputs' shapes of a graph, found by computing with zeros.
    fn graph_shapes(&self, shapes: &[Dims]) -> Vec<Dims> {
        let mut last = self.shapes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((inputs, outputs)) = &*last {
            if inputs == shapes {
                return outputs.clone();
            }
        }
        if self.inputs().any(|(i, _)| shapes[i].volume() > 1 << 28) {
            return self.io.iter().map(|tensor| tensor.shape).collect();
        }
        let zeros = self.inputs().map(|(i, tensor)| {
            let dims: Vec<usize> = shapes[i].shape().iter().map(|&d| d.max(0) as usize).collect();
            (tensor.name.to_string_lossy().into_owned(), Array::zeros(&dims))
        });
        let weights = self.weights();
        let values = self.graph.run(&zeros.collect(), &weights.named).unwrap_or_default();
        let found = self.io.iter().map(|tensor| {
            values.get(tensor.name.to_string_lossy().as_ref()).map_or(tensor.shape, |array| {
                Dims::new(&array.dims.iter().map(|&d| d as i64).collect::<Vec<_>>())
            })
        });
        let outputs: Vec<Dims> = found.collect();
        *last = Some((shapes.to_vec(), outputs.clone()));
        outputs
    }

    pub fn data_dependent(&self) -> bool {
        self.program == Program::Nonzero
    }

    /// What an output's shape is for these input shapes (and the values of a shape tensor); -1 where the data decides.
    pub fn output_shape(&self, output: usize, shapes: &[Dims], sizes: Option<&[i64]>) -> Dims {
        let inputs: Vec<usize> = self.inputs().map(|(i, _)| i).collect();
        let nth = self.outputs().position(|(i, _)| i == output).unwrap_or(0);
        match self.program {
            Program::Copy => shapes[inputs[nth.min(inputs.len() - 1)]],
            Program::Add | Program::Dit5 => shapes[inputs[0]],
            Program::Affine => {
                let mut dims = shapes[inputs[0]];
                let last = dims.shape().len().saturating_sub(1);
                dims.d[last] = self.columns as i64;
                dims
            }
            Program::Nonzero => Dims::new(&[shapes[inputs[0]].shape().len() as i64, -1]),
            Program::ShapeInput => sizes.map_or(self.io[output].shape, Dims::new),
            Program::Graph => self.graph_shapes(&inputs_only(shapes, &inputs))[output],
        }
    }
}

/// Outputs' shapes, which are being found, left out.
fn inputs_only(shapes: &[Dims], inputs: &[usize]) -> Vec<Dims> {
    (0..shapes.len())
        .map(|i| if inputs.contains(&i) { shapes[i] } else { Dims::BAD })
        .collect()
}
