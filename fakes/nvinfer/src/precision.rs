//! Which precision each layer gets, and what the engine inspector says about it.

use std::collections::BTreeMap;

use serde_json::{json, Value};

use crate::abi::{builder_flag, data_type, layer_type};
use crate::config::Config;
use crate::faults::{matches, strings};
use crate::network::{Layer, Network, Tensor};
use crate::object::of;
use crate::plan::{dtype_name, Dims};

#[derive(Clone)]
pub struct Choice {
    pub name: String,
    pub kind: i32,
    /// float32, tf32, float16, …; "explicit" for int8 or fp8 between Q and DQ nodes.
    pub precision: &'static str,
    pub dtype: i32,
}

fn is_float(dtype: i32) -> bool {
    matches!(
        dtype,
        data_type::FLOAT | data_type::HALF | data_type::BF16 | data_type::FP8 | data_type::INT8
    )
}

fn multiplies(kind: i32) -> bool {
    matches!(
        kind,
        layer_type::CONVOLUTION | layer_type::DECONVOLUTION | layer_type::MATRIX_MULTIPLY
    )
}

fn text(tensor: &Tensor) -> String {
    tensor.name.to_string_lossy().into_owned()
}

/// The type between Q and DQ that a layer's first input comes from.
pub fn explicit(network: &Network, layer: &Layer) -> Option<i32> {
    let first = *layer.inputs.first()?;
    let source = network.all_layers().into_iter().find(|one| one.outputs.contains(&first))?;
    (source.kind == layer_type::DEQUANTIZE).then(|| {
        // SAFETY: a tensor of this network.
        source
            .inputs
            .first()
            .map_or(data_type::INT8, |&tensor| unsafe { of::<Tensor>(tensor) }.dtype)
    })
}

/// One choice for each layer; the error is the line to log.
pub fn choose(network: &Network, config: &Config, scales: &BTreeMap<String, f32>, settings: &Value) -> Result<Vec<Choice>, String> {
    let keep = strings(&settings["keep_fp32"]);
    let obeyed = config.has(builder_flag::OBEY_PRECISION_CONSTRAINTS) || config.has(builder_flag::PREFER_PRECISION_CONSTRAINTS);
    let mut result = Vec::new();
    for layer in network.all_layers() {
        let name = layer.name.to_string_lossy().into_owned();
        let outputs = network.tensors(&layer.outputs);
        let own = outputs.first().map_or(data_type::FLOAT, |tensor| tensor.dtype);
        let asked = layer.precision.or(layer.types.iter().flatten().next().copied()).filter(|_| obeyed);
        let quantized = explicit(network, layer).filter(|_| multiplies(layer.kind));
        let has_scales = || {
            let inputs = network.tensors(&layer.inputs);
            inputs
                .iter()
                .chain(&outputs)
                .all(|t| t.range.is_some() || scales.contains_key(&text(t)))
        };
        let dtype = if !is_float(own) {
            own
        } else if let Some(quantized) = quantized {
            quantized
        } else if network.strong {
            own
        } else if let Some(asked) = asked {
            let missing = match asked {
                data_type::HALF if !config.has(builder_flag::FP16) => Some("fp16"),
                data_type::BF16 if !config.has(builder_flag::BF16) => Some("bf16"),
                data_type::INT8 if !config.has(builder_flag::INT8) => Some("Int8"),
                _ => None,
            };
            if let Some(kind) = missing {
                return Err(format!("Error Code 4: API Usage Error ({name}: {kind} precision has been set for at least one layer or layer output, but {} is not configured in the builder.)", kind.to_lowercase()));
            }
            asked
        } else if keep.iter().any(|pattern| matches(pattern, &name)) {
            data_type::FLOAT
        } else if config.has(builder_flag::INT8) && !scales.is_empty() && has_scales() {
            data_type::INT8
        } else if config.has(builder_flag::FP16) {
            data_type::HALF
        } else if config.has(builder_flag::BF16) {
            data_type::BF16
        } else {
            data_type::FLOAT
        };
        let tf32 = config.has(builder_flag::TF32) && multiplies(layer.kind);
        let precision = match dtype {
            _ if quantized.is_some() => "explicit",
            data_type::FLOAT if tf32 => "tf32",
            other => dtype_name(other),
        };
        result.push(Choice {
            name,
            kind: layer.kind,
            precision,
            dtype,
        });
    }
    Ok(result)
}

// The inspector's view -----------------------------------------------------------------------------------------------

/// The layers of TensorRT's own kernels name formats at length, those of its compiler name types.
fn format(dtype: i32, own_kernels: bool) -> &'static str {
    match (dtype, own_kernels) {
        (data_type::FLOAT, true) => "Row major linear FP32",
        (data_type::HALF, true) => "Row major linear FP16 format",
        (data_type::INT8, true) => "Row major Int8 format",
        (data_type::INT32, true) => "Row major linear Int32",
        (data_type::BOOL, true) => "Row major linear BOOL",
        (data_type::UINT8, true) => "Row major linear UInt8 format",
        (data_type::FP8, true) => "Row major linear FP8 format",
        (data_type::INT64, true) => "Row major linear Int64 format",
        (data_type::BF16, true) => "Row major linear BF16 format",
        (data_type::FLOAT, false) => "Float",
        (data_type::HALF, false) => "Half",
        (data_type::INT8, false) => "Int8",
        (data_type::INT32, false) => "Int32",
        (data_type::BOOL, false) => "Bool",
        (data_type::UINT8, false) => "UInt8",
        (data_type::FP8, false) => "FP8",
        (data_type::INT64, false) => "Int64",
        (data_type::BF16, false) => "BFloat16",
        _ => "Unknown format",
    }
}

fn tactic(choice: &Choice) -> String {
    let kernel = match choice.kind {
        layer_type::CONVOLUTION => "xmma_fprop_implicit_gemm",
        layer_type::DECONVOLUTION => "xmma_dgrad_implicit_gemm",
        layer_type::MATRIX_MULTIPLY => "xmma_gemm",
        _ => return String::new(),
    };
    let (arch, types) = match (choice.precision, choice.dtype) {
        ("tf32", _) => ("sm80", "f32f32_tf32f32_f32"),
        (_, data_type::HALF) => ("sm80", "f16f16_f16f16_f16"),
        (_, data_type::BF16) => ("sm80", "bf16bf16_bf16f32_f32"),
        (_, data_type::INT8) => ("sm80", "i8i8_i8i32_f32"),
        (_, data_type::FP8) => ("sm89", "e4m3e4m3_e4m3f32_f32"),
        _ => ("sm80", "f32f32_f32f32_f32"),
    };
    format!("{arch}_{kernel}_{types}_tn_n_tilesize128x64x64_stage4_warpsize2x2x1_tensor16x8x16")
}

fn kind_name(kind: i32, op: &str) -> (&'static str, bool) {
    match kind {
        layer_type::CONVOLUTION => ("CaskConvolution", true),
        layer_type::DECONVOLUTION => ("CaskDeconvolutionV2", true),
        layer_type::POOLING => ("CaskPooling", true),
        layer_type::MATRIX_MULTIPLY => ("gemm", false),
        layer_type::CONSTANT => ("Constant", true),
        layer_type::SHUFFLE => ("Shuffle", true),
        layer_type::SHAPE => ("Shape", true),
        layer_type::NON_ZERO => ("NonZero", true),
        layer_type::PLUGIN_V2 | layer_type::PLUGIN_V3 => ("PluginV3", true),
        _ if op == "Identity" => ("NoOp", true),
        _ => ("kgen", false),
    }
}

/// The engine's layers as its inspector lists them in detail: the network's, and the reformats between the types of the
/// engine's inputs and outputs and those inside.
pub fn layers(network: &Network, choices: &[Choice], settings: &Value) -> Vec<Value> {
    let mut types: BTreeMap<String, i32> = network
        .tensors(&network.inputs)
        .iter()
        .map(|tensor| (text(tensor), tensor.dtype))
        .collect();
    let dims = |dims: &Dims| json!(dims.shape());
    let one = |name: &str, shape: &Value, dtype: i32, own: bool| json!({"Name": name, "Location": "Device", "Dimensions": shape, "Format/Datatype": format(dtype, own)});
    let reformat = |title: String, from: (String, i32), to: (String, i32), shape: &Value| {
        json!({"Name": title, "LayerType": "Reformat", "Inputs": [one(&from.0, shape, from.1, true)],
            "Outputs": [one(&to.0, shape, to.1, true)], "ParameterType": "Reformat", "Origin": "REFORMAT",
            "TacticValue": "0x00000000000003e8", "StreamId": 0, "Metadata": ""})
    };
    let mut result = Vec::new();
    for (layer, choice) in network.all_layers().iter().zip(choices) {
        if layer.kind == layer_type::CONSTANT {
            continue;
        }
        let (kind, own) = kind_name(layer.kind, &layer.op);
        let converts = matches!(layer.kind, layer_type::CAST | layer_type::QUANTIZE | layer_type::DEQUANTIZE);
        let mut inputs = Vec::new();
        for (i, tensor) in network.tensors(&layer.inputs).iter().enumerate() {
            let mut name = text(tensor);
            let shape = dims(&tensor.dims);
            let from = types.get(&name).copied().unwrap_or(tensor.dtype);
            let wanted = if is_float(from) && is_float(choice.dtype) && !converts {
                choice.dtype
            } else {
                from
            };
            if from != wanted {
                let title = format!("Reformatting CopyNode for Input Tensor {i} to {}", choice.name);
                let new = format!("Reformatted Input Tensor {i} to {}", choice.name);
                result.push(reformat(title, (name, from), (new.clone(), wanted), &shape));
                name = new;
            }
            inputs.push(one(&name, &shape, wanted, own));
        }
        let mut outputs = Vec::new();
        let mut after = Vec::new();
        for (i, tensor) in network.tensors(&layer.outputs).iter().enumerate() {
            let mut name = text(tensor);
            let shape = dims(&tensor.dims);
            let inner = if is_float(tensor.dtype) && !converts {
                // What a product of quantised operands gives is not quantised.
                if choice.precision == "explicit" {
                    tensor.dtype
                } else {
                    choice.dtype
                }
            } else {
                tensor.dtype
            };
            types.insert(name.clone(), inner);
            if tensor.output && inner != tensor.dtype {
                let title = format!("Reformatting CopyNode for Output Tensor {i} to {}", choice.name);
                let new = format!("Reformatted Output Tensor {i} to {}", choice.name);
                after.push(reformat(title, (new.clone(), inner), (name.clone(), tensor.dtype), &shape));
                name = new;
            }
            outputs.push(one(&name, &shape, inner, own));
        }
        let tactic = tactic(choice);
        let mut entry = json!({"Name": choice.name, "LayerType": kind, "Inputs": inputs, "Outputs": outputs,
            "TacticValue": "0x0000000000000000", "StreamId": 0, "Metadata": format!("[ONNX Layer: {}]", choice.name)});
        if !tactic.is_empty() {
            entry["TacticName"] = json!(tactic);
        }
        if own {
            entry["ParameterType"] = json!(layer.op);
        }
        result.push(entry);
        result.extend(after);
    }
    if settings["foreign"].as_bool().unwrap_or(false) && !result.is_empty() {
        return foreign(network, choices, &one);
    }
    result
}

/// Everything in one node whose inside nobody sees.
fn foreign(network: &Network, choices: &[Choice], one: &dyn Fn(&str, &Value, i32, bool) -> Value) -> Vec<Value> {
    let side = |tensors: &[*mut crate::object::Public]| {
        let tensors = network.tensors(tensors);
        let described = tensors.iter().map(|t| one(&text(t), &json!(t.dims.shape()), t.dtype, true));
        Value::Array(described.collect())
    };
    let ends = (choices.first(), choices.last());
    let name = match ends {
        (Some(a), Some(b)) => format!("{{ForeignNode[{}...{}]}}", a.name, b.name),
        _ => "{ForeignNode[]}".to_owned(),
    };
    let metadata: Vec<String> = choices.iter().map(|choice| format!("[ONNX Layer: {}]", choice.name)).collect();
    vec![
        json!({"Name": name, "LayerType": "Myelin", "Inputs": side(&network.inputs), "Outputs": side(&network.outputs),
            "TacticName": "__foreignNode", "TacticValue": "0x0000000000000000", "StreamId": 0, "Metadata": metadata.join("\u{1f}")}),
    ]
}
