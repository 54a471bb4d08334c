//! IParser and IParserError: a real ONNX file becomes the layers of a network, or errors as TensorRT's parser words them.

use std::collections::HashMap;
use std::ffi::{c_char, CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::abi::{data_type, layer_type, parser as slots, parser_error as error_slots, parser_error_code, severity, Slot};
use crate::network::{Network, Tensor};
use crate::object::{discard_direct, make_direct, of, Class, Destroyed, Object, Public};
use crate::onnx::{self, Graph, Model, Node};
use crate::plan::Dims;
use crate::record::version;
use crate::{allowed, faults, text, Reporter};

pub struct Failure {
    pub code: i32,
    pub why: String,
    pub file: String,
    pub line: i32,
    pub function: &'static str,
    /// Its number, name and operator.
    pub node: Option<(usize, String, String)>,
}

const IMPORTER: &str = "/_src/parsers/onnxOpenSource/ModelImporter.cpp";

impl Failure {
    pub fn of_model(code: i32, function: &'static str, why: &str) -> Failure {
        Failure {
            code,
            why: why.to_owned(),
            file: IMPORTER.to_owned(),
            line: 0,
            function,
            node: None,
        }
    }
}

pub struct ParserError {
    code: i32,
    line: i32,
    node: i32,
    desc: CString,
    file: CString,
    function: CString,
    name: CString,
    operator: CString,
}

/// Errors as the caller reads them, one object each.
#[derive(Default)]
pub struct Errors(Vec<*mut Object<ParserError>>);

impl Errors {
    pub fn add(&mut self, failure: &Failure) {
        let c = |text: &str| CString::new(text.replace('\0', "")).unwrap_or_default();
        let (node, name, operator) = failure
            .node
            .as_ref()
            .map_or((-1, "", ""), |(i, name, op)| (*i as i32, name.as_str(), op.as_str()));
        self.0.push(make_direct(ParserError {
            code: failure.code,
            line: failure.line,
            node,
            desc: c(&failure.why),
            file: c(&failure.file),
            function: c(failure.function),
            name: c(name),
            operator: c(operator),
        }));
    }

    pub fn len(&self) -> i32 {
        self.0.len() as i32
    }

    pub fn get(&self, index: i32) -> *mut Object<ParserError> {
        usize::try_from(index)
            .ok()
            .and_then(|i| self.0.get(i).copied())
            .unwrap_or(std::ptr::null_mut())
    }

    pub fn clear(&mut self) {
        for error in self.0.drain(..) {
            // SAFETY: made by `add`, and given back here alone.
            unsafe { discard_direct(error) };
        }
    }
}

/// The kind of layer that an operator becomes; None: there is no importer for it.
pub fn layer_kind(op: &str) -> Option<i32> {
    let (major, minor, ..) = version();
    let since = |wanted: u32, kind: i32, before: i32| if major > 10 || minor >= wanted { kind } else { before };
    Some(match op {
        "Conv" | "DeformConv" => layer_type::CONVOLUTION,
        "ConvTranspose" => layer_type::DECONVOLUTION,
        "Relu" | "Sigmoid" | "Tanh" | "LeakyRelu" | "Elu" | "Selu" | "Softsign" | "Softplus" | "HardSigmoid" | "HardSwish" | "Clip"
        | "Gelu" | "ThresholdedRelu" | "Celu" | "Mish" | "Shrink" | "ScaledTanh" | "ParametricSoftplus" => layer_type::ACTIVATION,
        "MaxPool" | "AveragePool" | "GlobalAveragePool" | "GlobalMaxPool" | "LpPool" | "GlobalLpPool" => layer_type::POOLING,
        "LRN" => layer_type::LRN,
        "BatchNormalization" | "ImageScaler" => layer_type::SCALE,
        "Softmax" | "LogSoftmax" | "Hardmax" => layer_type::SOFTMAX,
        "Concat" => layer_type::CONCATENATION,
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Max" | "Min" | "Sum" | "Mean" | "And" | "Or" | "Xor" | "Equal" | "Greater" | "Less"
        | "GreaterOrEqual" | "LessOrEqual" | "Mod" | "BitShift" => layer_type::ELEMENTWISE,
        "Abs" | "Neg" | "Sqrt" | "Exp" | "Log" | "Floor" | "Ceil" | "Round" | "Erf" | "Not" | "Sin" | "Cos" | "Tan" | "Asin" | "Acos"
        | "Atan" | "Sinh" | "Cosh" | "Asinh" | "Acosh" | "Atanh" | "Reciprocal" | "Sign" | "IsInf" | "IsNaN" => layer_type::UNARY,
        "Reshape" | "Transpose" | "Flatten" | "DepthToSpace" | "SpaceToDepth" => layer_type::SHUFFLE,
        "Squeeze" => since(7, layer_type::SQUEEZE, layer_type::SHUFFLE),
        "Unsqueeze" => since(7, layer_type::UNSQUEEZE, layer_type::SHUFFLE),
        "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin" | "ReduceProd" | "ReduceL1" | "ReduceL2" | "ReduceLogSum"
        | "ReduceLogSumExp" | "ReduceSumSquare" => layer_type::REDUCE,
        "TopK" | "ArgMax" | "ArgMin" => layer_type::TOPK,
        "Gather" | "GatherElements" | "GatherND" => layer_type::GATHER,
        "MatMul" | "Gemm" => layer_type::MATRIX_MULTIPLY,
        "Constant" => layer_type::CONSTANT,
        "Identity" | "Dropout" => layer_type::IDENTITY,
        "Cast" | "CastLike" => layer_type::CAST,
        "Slice" | "Split" | "Pad" | "Expand" | "Tile" => layer_type::SLICE,
        "Shape" | "Size" => layer_type::SHAPE,
        "PRelu" => layer_type::PARAMETRIC_RELU,
        "Resize" | "Upsample" => layer_type::RESIZE,
        "Where" | "Trilu" => layer_type::SELECT,
        "Range" | "ConstantOfShape" | "EyeLike" | "RandomUniform" | "RandomUniformLike" | "RandomNormal" | "RandomNormalLike" => {
            layer_type::FILL
        }
        "QuantizeLinear" | "TRT_FP8QuantizeLinear" | "TRT_INT4QuantizeLinear" => layer_type::QUANTIZE,
        "DequantizeLinear" | "TRT_FP8DequantizeLinear" | "TRT_INT4DequantizeLinear" => layer_type::DEQUANTIZE,
        "Scatter" | "ScatterND" | "ScatterElements" => layer_type::SCATTER,
        "Einsum" => layer_type::EINSUM,
        "OneHot" => layer_type::ONE_HOT,
        "NonZero" => layer_type::NON_ZERO,
        "GridSample" => layer_type::GRID_SAMPLE,
        "NonMaxSuppression" => layer_type::NMS,
        "ReverseSequence" => layer_type::REVERSE_SEQUENCE,
        "LayerNormalization" | "InstanceNormalization" | "GroupNormalization" | "MeanVarianceNormalization" | "LpNormalization" => {
            layer_type::NORMALIZATION
        }
        "CumSum" => since(8, layer_type::CUMULATIVE, layer_type::RECURRENCE),
        "LSTM" | "GRU" | "RNN" | "Loop" | "Scan" => layer_type::RECURRENCE,
        "If" => layer_type::CONDITION,
        "RoiAlign" => layer_type::PLUGIN_V2,
        _ => return None,
    })
}

/// What is known of a graph's tensors before TensorRT would have inferred the rest.
struct Known<'a> {
    graph: &'a Graph,
    types: HashMap<String, i32>,
    dims: HashMap<String, Dims>,
    tensors: HashMap<String, *mut Public>,
}

impl Known<'_> {
    fn dtype(&self, node: &Node, output: usize) -> i32 {
        let declared = |name: &String| {
            let of = |values: &[onnx::Value]| values.iter().find(|v| &v.name == name).and_then(|v| onnx::dtype(v.dtype));
            of(&self.graph.outputs).or_else(|| of(&self.graph.values))
        };
        let input = |i: usize| node.inputs.get(i).and_then(|name| self.types.get(name).copied());
        let tensor = |name: &str| node.attributes.get(name)?.tensor.as_ref().and_then(|data| onnx::dtype(data.dtype));
        let found = match node.op.as_str() {
            "Cast" => onnx::dtype(node.int("to", 1)),
            "Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin" | "NonMaxSuppression" => Some(data_type::INT64),
            "TopK" if output == 1 => Some(data_type::INT64),
            "Equal" | "Greater" | "Less" | "GreaterOrEqual" | "LessOrEqual" | "Not" | "And" | "Or" | "Xor" | "IsInf" | "IsNaN" => {
                Some(data_type::BOOL)
            }
            "QuantizeLinear" => input(2).or(Some(data_type::INT8)),
            "DequantizeLinear" => input(1),
            "Constant" => tensor("value"),
            "ConstantOfShape" => tensor("value"),
            "Where" => input(1),
            _ => None,
        };
        found
            .or_else(|| node.outputs.get(output).and_then(declared))
            .or_else(|| input(0))
            .unwrap_or(data_type::FLOAT)
    }

    fn shape(&self, node: &Node, output: &String) -> Dims {
        let declared = self.graph.outputs.iter().chain(&self.graph.values).find(|v| &v.name == output);
        if let Some(dims) = declared.and_then(|v| v.dims.as_ref()) {
            return Dims::new(&dims.iter().take(8).map(|(d, _)| *d).collect::<Vec<_>>());
        }
        let input = |i: usize| node.inputs.get(i).and_then(|name| self.dims.get(name).copied());
        let known = match node.op.as_str() {
            "MatMul" => input(0).zip(input(1)).map(|(mut a, b)| {
                if let (Some(at), Some(&n)) = (a.shape().len().checked_sub(1), b.shape().last()) {
                    a.d[at] = n;
                }
                a
            }),
            "NonZero" => input(0).map(|a| Dims::new(&[i64::from(a.nb), -1])),
            op if matches!(
                layer_kind(op),
                Some(layer_type::ACTIVATION | layer_type::UNARY | layer_type::CAST | layer_type::IDENTITY | layer_type::SOFTMAX)
                    | Some(layer_type::NORMALIZATION | layer_type::QUANTIZE | layer_type::DEQUANTIZE)
            ) =>
            {
                input(0)
            }
            "Add" | "Sub" | "Mul" | "Div" => (0..2).filter_map(input).max_by_key(|dims| dims.nb),
            _ => None,
        };
        known.unwrap_or(Dims::BAD)
    }
}

/// Whether an input of the graph says a shape to some node.
fn says_shape(graph: &Graph, name: &str) -> bool {
    graph.nodes.iter().any(|node| {
        node.inputs.iter().enumerate().any(|(i, input)| {
            input == name
                && matches!(
                    (node.op.as_str(), i),
                    ("Reshape" | "Expand" | "Tile", 1) | ("ConstantOfShape", 0) | ("Slice", 1..=4) | ("Resize", 3)
                )
        })
    })
}

/// Fills the network; the failures are those that TensorRT's parser would list.
fn import(model: &Model, path: Option<&Path>, network: &mut Network, reporter: &Reporter) -> Vec<Failure> {
    let graph = &model.graph;
    let mut failures = Vec::new();
    if model.opset < 7 {
        reporter.log(
            severity::WARNING,
            "TensorRT supports ONNX graphs generated with at least opset 7. Models using older opsets are not guaranteed to work.",
        );
    }
    let mut known = Known {
        graph,
        types: HashMap::new(),
        dims: HashMap::new(),
        tensors: HashMap::new(),
    };
    let wanted: serde_json::Value = model
        .metadata
        .get("fake_plan")
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default();
    for input in graph.inputs.iter().filter(|input| graph.initializer(&input.name).is_none()) {
        let failure = |why: &str, code: i32| Failure {
            code,
            why: format!("Assertion failed: {why}"),
            file: input.name.clone(),
            line: 417,
            function: "importInput",
            node: None,
        };
        let Some(dtype) = onnx::dtype(input.dtype) else {
            failures.push(failure(
                "convertDtype(onnxDtype.elem_type(), &trtDtype) && \"Failed to convert ONNX date type to TensorRT data type.\"",
                parser_error_code::UNSUPPORTED_NODE,
            ));
            continue;
        };
        let dims = input.dims.clone().unwrap_or_default();
        if dims.len() > 8 {
            failures.push(failure("convertOnnxDims(onnxDtype.shape().dim(), trt_dims, namedDims) && \"Failed to convert ONNX dimensions to TensorRT dimensions.\"", parser_error_code::UNSUPPORTED_GRAPH));
            continue;
        }
        let shape = Dims::new(&dims.iter().map(|(d, _)| *d).collect::<Vec<_>>());
        let tensor = network.add_tensor(&input.name, shape, dtype);
        network.inputs.push(tensor);
        // SAFETY: a tensor just made.
        let body = unsafe { of::<Tensor>(tensor) };
        body.input = true;
        let host = wanted["io"]
            .as_array()
            .is_some_and(|io| io.iter().any(|one| one["name"] == *input.name && one["location"] == "host"));
        body.shape_tensor = host || (shape.nb <= 1 && says_shape(graph, &input.name));
        for (d, (_, name)) in dims.iter().enumerate().filter(|(_, (_, name))| !name.is_empty()) {
            body.names[d] = CString::new(name.as_str()).ok();
        }
        if dtype == data_type::INT64 {
            reporter.log(severity::WARNING, &format!("Make sure input {} has Int64 binding.", input.name));
        }
        known.types.insert(input.name.clone(), dtype);
        known.dims.insert(input.name.clone(), shape);
        known.tensors.insert(input.name.clone(), tensor);
    }
    for initializer in &graph.initializers {
        if let Err(why) = initializer.check(path) {
            reporter.error(&why);
            failures.push(Failure {
                line: 292,
                ..Failure::of_model(
                    parser_error_code::UNSUPPORTED_NODE,
                    "parseGraph",
                    "Assertion failed: ctx->getWeightsContext().convertOnnxWeights(initializer, &weights) && \"Failed to import initializer.\"",
                )
            });
            return failures;
        }
        known
            .types
            .insert(initializer.name.clone(), onnx::dtype(initializer.dtype).unwrap_or(0));
        known.dims.insert(
            initializer.name.clone(),
            Dims::new(&initializer.dims[..initializer.dims.len().min(8)]),
        );
    }
    for (i, node) in graph.nodes.iter().enumerate() {
        let function = model.functions.contains(&node.op);
        let kind = layer_kind(&node.op);
        let failure = |code: i32, why: &str, file: &str, line: i32, function: &'static str| Failure {
            code,
            why: why.to_owned(),
            file: format!("/_src/parsers/onnxOpenSource/{file}"),
            line,
            function,
            node: Some((i, node.name.clone(), node.op.clone())),
        };
        if kind.is_none() && !function {
            reporter.log(
                severity::INFO,
                &format!("No checker registered for op: {}. Attempting to check as plugin.", node.op),
            );
            failures.push(failure(
                parser_error_code::INVALID_NODE,
                "creator && \"Plugin not found, are the plugin name, version, and namespace correct?\"",
                "onnxOpCheckers.cpp",
                780,
                "checkFallbackPluginImporter",
            ));
            continue;
        }
        if !failures.is_empty() {
            continue;
        }
        let known_name = |name: &String| name.is_empty() || known.types.contains_key(name);
        if !node.inputs.iter().all(known_name) {
            failures.push(failure(
                parser_error_code::INVALID_GRAPH,
                "Assertion failed: ctx->tensors().count(inputName) && \"Node input was not registered.\"",
                "ModelImporter.cpp",
                136,
                "parseNode",
            ));
            continue;
        }
        let inputs = node.inputs.iter().filter_map(|name| known.tensors.get(name).copied()).collect();
        let mut outputs = Vec::new();
        for (k, name) in node.outputs.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
            let (dtype, shape) = (known.dtype(node, k), known.shape(node, name));
            if dtype == data_type::UINT8 && !graph.outputs.iter().any(|output| &output.name == name) {
                failures.push(failure(
                    parser_error_code::UNSUPPORTED_NODE,
                    "Assertion failed: legalUINT8 && \"TensorRT does not support UINT8 types for intermediate tensors!\"",
                    "ModelImporter.cpp",
                    226,
                    "parseNode",
                ));
            }
            let tensor = network.add_tensor(name, shape, dtype);
            known.types.insert(name.clone(), dtype);
            known.dims.insert(name.clone(), shape);
            known.tensors.insert(name.clone(), tensor);
            outputs.push(tensor);
        }
        network.add_layer(kind.unwrap_or(layer_type::IDENTITY), &node.op, &node.name, inputs, outputs);
    }
    if !failures.is_empty() {
        return failures;
    }
    for output in &graph.outputs {
        let Some(&(mut tensor)) = known.tensors.get(&output.name) else {
            failures.push(Failure::of_model(
                parser_error_code::INVALID_GRAPH,
                "importModel",
                "Assertion failed: mImporterCtx.tensors().count(output.name()) && \"The output tensor was not registered.\"",
            ));
            continue;
        };
        // SAFETY: a tensor of this network; so is the next one.
        let mut body = unsafe { of::<Tensor>(tensor) };
        if body.input {
            // TensorRT has no tensor that is both.
            body.name = CString::new(format!("__{}", output.name)).unwrap_or_default();
            let copy = network.add_tensor(&output.name, body.dims, body.dtype);
            network.add_layer(layer_type::IDENTITY, "Identity", &output.name, vec![tensor], vec![copy]);
            tensor = copy;
            body = unsafe { of::<Tensor>(copy) };
        }
        body.output = true;
        network.outputs.push(tensor);
        for (d, (_, name)) in output
            .dims
            .iter()
            .flatten()
            .enumerate()
            .filter(|(_, (_, name))| !name.is_empty())
            .take(8)
        {
            body.names[d] = CString::new(name.as_str()).ok();
        }
        if body.dtype == data_type::INT64 {
            reporter.log(severity::WARNING, &format!("Make sure output {} has Int64 binding.", output.name));
        }
    }
    failures
}

pub struct Parser {
    reporter: Reporter,
    network: *mut Public,
    errors: Errors,
    flags: u32,
    alive: Arc<()>,
}

impl Parser {
    pub fn new(network: *mut Public, reporter: Reporter) -> Parser {
        Parser {
            reporter,
            network,
            errors: Errors::default(),
            flags: 1,
            alive: Arc::new(()),
        }
    }

    fn read(bytes: &[u8]) -> Result<Model, Vec<Failure>> {
        onnx::parse(bytes).map_err(|why| {
            vec![Failure::of_model(
                parser_error_code::MODEL_DESERIALIZE_FAILED,
                "deserializeOnnxModel",
                &format!("Assertion failed: model->ParseFromCodedStream(&codedInput) && \"Failed to parse the ONNX model.\" ({why})"),
            )]
        })
    }

    fn parse(&mut self, model: Model, path: Option<PathBuf>) -> Result<(), Vec<Failure>> {
        faults::of_model(model.metadata.get("fake_build").map(String::as_str));
        let stage = &faults::settings(None)["parse"];
        if let Err(why) = faults::perform(stage, &self.reporter, &mut |_| true) {
            return Err(vec![Failure::of_model(parser_error_code::INTERNAL_ERROR, "importModel", &why)]);
        }
        // SAFETY: the network that the parser was made for, which must outlive it.
        let network = unsafe { of::<Network>(self.network) };
        let failures = import(&model, path.as_deref(), network, &self.reporter);
        network.parser = Some(Arc::downgrade(&self.alive));
        network.path = path;
        network.model = Some(model);
        if failures.is_empty() {
            Ok(())
        } else {
            Err(failures)
        }
    }

    fn keep(&mut self, done: Result<(), Vec<Failure>>) -> bool {
        for failure in done.as_ref().err().into_iter().flatten() {
            self.errors.add(failure);
        }
        done.is_ok()
    }

    fn may_start(&self, method: &str) -> bool {
        if !allowed(&self.reporter, "IParser", method) {
            return false;
        }
        // SAFETY: as above.
        if !unsafe { of::<Network>(self.network) }.layers.is_empty() {
            self.reporter.error("Parse was called with a non-empty network definition");
            return false;
        }
        true
    }
}

impl Class for Parser {
    const NAME: &'static str = "IParser";
    const ROW: usize = 13;
    const DESTROYED: Destroyed = Destroyed::By(slots::DTOR_DELETING);

    fn destroyed(&mut self) {
        self.errors.clear();
    }

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (slots::PARSE, parse as *const () as usize),
            (slots::PARSE_FROM_FILE, parse_from_file as *const () as usize),
            (slots::SUPPORTS_OPERATOR, supports_operator as *const () as usize),
            (slots::GET_NB_ERRORS, nb_errors as *const () as usize),
            (slots::GET_ERROR, get_error as *const () as usize),
            (slots::CLEAR_ERRORS, clear_errors as *const () as usize),
            (slots::GET_USED_VC_PLUGIN_LIBRARIES, plugin_libraries as *const () as usize),
            (slots::SET_FLAGS, set_flags as *const () as usize),
            (slots::GET_FLAGS, get_flags as *const () as usize),
            (slots::SET_FLAG, set_flag as *const () as usize),
            (slots::CLEAR_FLAG, clear_flag as *const () as usize),
            (slots::GET_FLAG, get_flag as *const () as usize),
            (slots::SET_BUILDER_CONFIG, set_config as *const () as usize),
        ]
    }
}

type This = *mut Object<Parser>;

pub unsafe fn path_of(name: *const c_char) -> Option<PathBuf> {
    (!name.is_null()).then(|| PathBuf::from(OsStr::from_bytes(text(name).to_bytes())))
}

unsafe extern "C" fn parse(this: This, bytes: *const u8, size: u64, path: *const c_char) -> bool {
    let parser = Object::body(this);
    if !parser.may_start("parse") {
        return false;
    }
    let model = Parser::read(std::slice::from_raw_parts(bytes, size as usize));
    let done = model.and_then(|model| parser.parse(model, path_of(path)));
    parser.keep(done)
}

unsafe extern "C" fn parse_from_file(this: This, name: *const c_char, _verbosity: i32) -> bool {
    let parser = Object::body(this);
    if !parser.may_start("parseFromFile") {
        return false;
    }
    let shown = text(name).to_string_lossy();
    let path = path_of(name).unwrap_or_default();
    if path.exists() && !path.is_file() {
        parser.reporter.error(&format!("Input is not a regular file: {shown}"));
        return false;
    }
    let Some(model) = std::fs::read(&path).ok().and_then(|bytes| onnx::parse(&bytes).ok()) else {
        // As the real one: a line in the log, and no error in the list.
        parser.reporter.error(&format!("Failed to parse ONNX model from file: {shown}!"));
        return false;
    };
    let lines = [
        format!("Input filename:   {shown}"),
        format!("ONNX IR version:  0.0.{}", model.ir_version),
        format!("Opset version:    {}", model.opset),
        format!("Producer name:    {}", model.producer),
    ];
    lines.iter().for_each(|line| parser.reporter.log(severity::INFO, line));
    let done = parser.parse(model, Some(path));
    for failure in done.as_ref().err().into_iter().flatten() {
        if let Some((i, _, op)) = &failure.node {
            // SAFETY: the network that the parser was made for.
            let node = of::<Network>(parser.network).model.as_ref().map(|m| m.graph.nodes[*i].clone());
            let output = node.and_then(|n| n.outputs.first().cloned()).unwrap_or_default();
            parser
                .reporter
                .error(&format!("While parsing node number {i} [{op} -> \"{output}\"]:"));
            parser.reporter.error(&format!("--- Begin node ---\nop_type: \"{op}\"\n"));
            parser.reporter.error("--- End node ---");
        }
        parser.reporter.error(&format!(
            "ERROR: {}:{} In function {}:\n[{}] {}",
            failure.file, failure.line, failure.function, failure.code, failure.why
        ));
    }
    parser.keep(done)
}

unsafe extern "C" fn supports_operator(_: This, name: *const c_char) -> bool {
    layer_kind(&text(name).to_string_lossy()).is_some()
}

unsafe extern "C" fn nb_errors(this: This) -> i32 {
    Object::body(this).errors.len()
}

unsafe extern "C" fn get_error(this: This, index: i32) -> *mut Object<ParserError> {
    Object::body(this).errors.get(index)
}

unsafe extern "C" fn clear_errors(this: This) {
    Object::body(this).errors.clear();
}

unsafe extern "C" fn plugin_libraries(_: This, count: *mut i64) -> usize {
    count.write(0);
    0
}

unsafe extern "C" fn set_flags(this: This, flags: u32) {
    Object::body(this).flags = flags;
}

unsafe extern "C" fn get_flags(this: This) -> u32 {
    Object::body(this).flags
}

unsafe extern "C" fn set_flag(this: This, flag: i32) {
    if !faults::ignored("parserFlag") {
        Object::body(this).flags |= 1 << flag;
    }
}

unsafe extern "C" fn clear_flag(this: This, flag: i32) {
    Object::body(this).flags &= !(1 << flag);
}

unsafe extern "C" fn get_flag(this: This, flag: i32) -> bool {
    Object::body(this).flags >> flag & 1 != 0
}

unsafe extern "C" fn set_config(_: This, _config: *mut Public) -> bool {
    true
}

// IParserError -------------------------------------------------------------------------------------------------------

impl Class for ParserError {
    const NAME: &'static str = "IParserError";
    const ROW: usize = 14;
    const DESTROYED: Destroyed = Destroyed::ByOwner;

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (error_slots::CODE, error_code as *const () as usize),
            (error_slots::DESC, error_desc as *const () as usize),
            (error_slots::FILE, error_file as *const () as usize),
            (error_slots::LINE, error_line as *const () as usize),
            (error_slots::FUNC, error_function as *const () as usize),
            (error_slots::NODE, error_node as *const () as usize),
            (error_slots::NODE_NAME, error_name as *const () as usize),
            (error_slots::NODE_OPERATOR, error_operator as *const () as usize),
            (error_slots::LOCAL_FUNCTION_STACK, error_stack as *const () as usize),
            (error_slots::LOCAL_FUNCTION_STACK_SIZE, error_stack_size as *const () as usize),
        ]
    }
}

type That = *mut Object<ParserError>;

unsafe extern "C" fn error_code(this: That) -> i32 {
    Object::body(this).code
}

unsafe extern "C" fn error_desc(this: That) -> *const c_char {
    Object::body(this).desc.as_ptr()
}

unsafe extern "C" fn error_file(this: That) -> *const c_char {
    Object::body(this).file.as_ptr()
}

unsafe extern "C" fn error_line(this: That) -> i32 {
    Object::body(this).line
}

unsafe extern "C" fn error_function(this: That) -> *const c_char {
    Object::body(this).function.as_ptr()
}

unsafe extern "C" fn error_node(this: That) -> i32 {
    Object::body(this).node
}

unsafe extern "C" fn error_name(this: That) -> *const c_char {
    Object::body(this).name.as_ptr()
}

unsafe extern "C" fn error_operator(this: That) -> *const c_char {
    Object::body(this).operator.as_ptr()
}

unsafe extern "C" fn error_stack(_: That) -> usize {
    0
}

unsafe extern "C" fn error_stack_size(_: That) -> i32 {
    0
}
