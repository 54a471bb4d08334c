//! What a build checks, and the plan that comes of it.

use std::collections::BTreeMap;

use serde_json::{json, Map, Value};

use crate::abi::{
    builder_flag, hardware_compatibility_level, layer_type, memory_pool_type, preview_feature, severity, tactic_source, Member,
};
use crate::calibrate::{self, Scales};
use crate::config::{member, Config};
use crate::driver::sm;
use crate::faults;
use crate::graph;
use crate::network::{Network, Tensor};
use crate::object::of;
use crate::onnx::{self, Model};
use crate::plan::{dtype_name, width, Weights, HEADER, SERIALIZATION};
use crate::precision::{choose, explicit, layers, Choice};
use crate::profile::{Profile, TimingCache};
use crate::progress::Progress;
use crate::record::{mistake, version};
use crate::Reporter;

/// More values than this are not put into a plan.
const MOST: usize = 4 << 20;

type Done<T> = Result<T, String>;

fn name(tensor: &Tensor) -> String {
    tensor.name.to_string_lossy().into_owned()
}

fn usage(why: impl std::fmt::Display) -> String {
    format!("Error Code 4: API Usage Error ({why})")
}

fn check_profile(tensor: &Tensor, profile: &Profile, index: usize) -> Done<()> {
    let name = name(tensor);
    let Some(entry) = profile.entries.get(&name) else {
        return match tensor {
            _ if tensor.shape_tensor => Err(usage(format!("Profile {index} is missing values for shape input tensor {name}."))),
            _ if tensor.dims.known() => Ok(()),
            _ => Err(usage(format!("{name}: dynamic input is missing dimensions in profile {index}."))),
        };
    };
    if tensor.shape_tensor {
        let Some(values) = &entry.values[0] else {
            return Err(usage(format!("Profile {index} is missing values for shape input tensor {name}.")));
        };
        if tensor.dims.known() && values.len() != tensor.dims.volume() {
            return Err(usage(format!(
                "Profile {index} provides number of elements in shape tensor {name}: {}. This doesn't match product of tensor dimensions {}.",
                values.len(),
                tensor.dims.volume()
            )));
        }
        return Ok(());
    }
    if entry.values[0].is_some() {
        return Err(usage(format!("{name}: shape values set for non-shape input in profile {index}.")));
    }
    let [Some(min), Some(opt), Some(max)] = entry.dims else {
        return Err(usage(format!("{name}: dynamic input is missing dimensions in profile {index}.")));
    };
    if min.nb != tensor.dims.nb {
        return Err(usage(format!(
            "Dimension mismatch for tensor {name} and profile {index}. Profile has {} dimensions but tensor has {}.",
            min.nb, tensor.dims.nb
        )));
    }
    for (d, &size) in tensor.dims.shape().iter().enumerate() {
        if size >= 0 && (min.d[d] != size || opt.d[d] != size || max.d[d] != size) {
            return Err(usage(format!(
                "Dimension mismatch for tensor {name} and profile {index}. At dimension axis {d}, profile has min={}, opt={}, max={} but tensor has {size}.",
                min.d[d], opt.d[d], max.d[d]
            )));
        }
    }
    Ok(())
}

/// Whether Q/DQ nodes say what is quantised, and to what.
fn quantized_by_nodes(network: &Network) -> Vec<i32> {
    let all = network.all_layers();
    let kinds = all.iter().filter(|layer| layer.kind == layer_type::QUANTIZE);
    let mut types: Vec<i32> = kinds
        .flat_map(|layer| network.tensors(&layer.outputs))
        .map(|tensor| tensor.dtype)
        .collect();
    types.extend(all.iter().filter_map(|layer| explicit(network, layer)));
    types
}

fn check(network: &Network, config: &Config, reporter: &Reporter) -> Done<()> {
    if network.outputs.is_empty() {
        return Err(usage("Network must have at least one output."));
    }
    if network.parser.as_ref().is_some_and(|parser| parser.strong_count() == 0) {
        mistake("a network was built after its parser, which owns the weights, had been destroyed");
    }
    let precisions = [
        builder_flag::PREFER_PRECISION_CONSTRAINTS,
        builder_flag::OBEY_PRECISION_CONSTRAINTS,
        builder_flag::INT8,
        builder_flag::FP8,
        builder_flag::INT4,
        builder_flag::FP16,
        builder_flag::BF16,
    ];
    if network.strong {
        if let Some(flag) = precisions.iter().find(|flag| config.has(**flag)) {
            return Err(format!(
                "Error Code 3: API Usage Error (Parameter check failed, condition: !config.getFlag(BuilderFlag::k{}))",
                flag.name
            ));
        }
        if config.calibrator != 0 {
            return Err(usage(
                "INT8 calibrator cannot be used with a network created with kSTRONGLY_TYPED mode.",
            ));
        }
    } else if config.has(builder_flag::WEIGHT_STREAMING) {
        return Err(usage("kWEIGHT_STREAMING is only supported for kSTRONGLY_TYPED networks."));
    }
    if config.has(builder_flag::INT8) && config.has(builder_flag::FP8) {
        return Err(usage("INT8 mode and FP8 mode aren't allowed to be enabled together."));
    }
    if config.has(builder_flag::FP8) && config.number("HardwareCompatibilityLevel") != 0 {
        return Err(usage("FP8 is not supported in hardware compatibility mode."));
    }
    let here = sm()?;
    if config.has(builder_flag::BF16) && here < 80 {
        return Err(usage("Networks with BF16 precision require hardware with BF16 support."));
    }
    let quantized = quantized_by_nodes(network);
    if quantized.contains(&crate::abi::data_type::FP8) && here < 89 {
        return Err(usage("Networks with FP8 Q/DQ layers require hardware with FP8 support."));
    }
    if !network.strong && quantized.contains(&crate::abi::data_type::INT8) && !config.has(builder_flag::INT8) {
        return Err(usage(
            "Int8 precision has been set for at least one layer or layer output, but int8 is not configured in the builder.",
        ));
    }
    if !quantized.is_empty() && config.calibrator != 0 {
        reporter.log(severity::WARNING, "Calibrator won't be used in explicit quantization mode. Please insert Quantize/Dequantize layers to indicate which tensors to quantize/dequantize.");
    }
    let inputs = network.tensors(&network.inputs);
    if config.profiles.is_empty() && inputs.iter().any(|tensor| !tensor.dims.known() || tensor.shape_tensor) {
        return Err(usage(
            "Network has dynamic or shape inputs, but no optimization profile has been defined.",
        ));
    }
    for (index, profile) in config.profiles.iter().enumerate() {
        for tensor in &inputs {
            check_profile(tensor, profile, index)?;
        }
        for unknown in profile
            .entries
            .keys()
            .filter(|name| !inputs.iter().any(|t| &self::name(t) == *name))
        {
            reporter.log(
                severity::VERBOSE,
                &format!("Profile {index} has an entry for {unknown}, which is no input of the network."),
            );
        }
    }
    for path in &config.plugins {
        if !std::path::Path::new(path.to_string_lossy().as_ref()).is_file() {
            return Err(usage(format!("Unable to open library: {}", path.to_string_lossy())));
        }
    }
    Ok(())
}

// Weights and the program --------------------------------------------------------------------------------------------

/// A float weight of a model: what a refit can replace.
pub struct Refittable {
    pub name: String,
    pub dims: Vec<i64>,
    pub dtype: i32,
    /// Empty where there are too many.
    pub values: Vec<f32>,
}

fn is_float(dtype: i64) -> bool {
    matches!(dtype, 1 | 10 | 11 | 16)
}

/// The float initializers and constants of a model, and w and b of its `fake_plan`.
pub fn refittable(model: &Model, path: Option<&std::path::Path>) -> Done<Vec<Refittable>> {
    let mut result = Vec::new();
    let constants = model.graph.nodes.iter().filter(|node| node.op == "Constant").filter_map(|node| {
        let tensor = node.attributes.get("value")?.tensor.as_ref()?;
        Some((node.outputs.first()?.clone(), tensor))
    });
    let initializers = model.graph.initializers.iter().map(|data| (data.name.clone(), data));
    let all: Vec<(String, &onnx::Data)> = initializers.chain(constants).filter(|(_, data)| is_float(data.dtype)).collect();
    let total = all.iter().map(|(_, data)| data.count()).fold(0, usize::saturating_add);
    for (name, data) in all {
        data.check(path)?;
        result.push(Refittable {
            name,
            dims: data.dims.clone(),
            dtype: onnx::dtype(data.dtype).unwrap_or(0),
            values: if total > MOST { Vec::new() } else { data.values(path)? },
        });
    }
    let fields = fake_plan(model)?;
    for key in ["w", "b"] {
        let rows = fields[key].as_array().cloned().unwrap_or_default();
        let values = |value: &Value| -> Vec<f32> {
            let list = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
            list.iter().filter_map(Value::as_f64).map(|x| x as f32).collect()
        };
        let flat: Vec<f32> = rows.iter().flat_map(values).collect();
        if !rows.is_empty() {
            let columns = (flat.len() / rows.len()) as i64;
            let dims = if key == "w" {
                vec![rows.len() as i64, columns]
            } else {
                vec![rows.len() as i64]
            };
            result.push(Refittable {
                name: key.to_owned(),
                dims,
                dtype: 0,
                values: flat,
            });
        }
    }
    Ok(result)
}

/// A number that another set of weights does not have.
pub fn fingerprint<'a>(weights: impl Iterator<Item = (&'a str, Vec<f32>)>) -> String {
    let mut all = Weights::default();
    for (name, values) in weights {
        let array = graph::Array {
            dims: vec![values.len()],
            values: values.iter().map(|&x| f64::from(x)).collect(),
        };
        all.named.insert(name.to_owned(), array);
    }
    all.hash()
}

fn fake_plan(model: &Model) -> Done<Value> {
    match model.metadata.get("fake_plan") {
        Some(text) => serde_json::from_str(text).map_err(|why| format!("fake: fake_plan of the model is not JSON: {why}")),
        None => Ok(Value::Null),
    }
}

/// Where a tensor comes from when nothing but Identity lies between.
fn origin<'a>(model: &'a Model, name: &'a str) -> &'a str {
    match model.graph.producer(name) {
        Some(node) if node.op == "Identity" => node.inputs.first().map_or(name, |input| origin(model, input)),
        _ => name,
    }
}

/// The fields of the plan that say what it computes: the model's own word, or its nodes where the stand-in can run them.
fn program(network: &Network, choices: &[Choice], scales: &Scales) -> Done<Map<String, Value>> {
    let none = |why: &str| Err(format!("fake: no program for this model: {why}"));
    let object = |value: Value| value.as_object().cloned().unwrap_or_default();
    let Some(model) = &network.model else {
        let copies = network.all_layers().iter().all(|layer| layer.op == "Identity");
        return if copies {
            Ok(object(json!({"program": "copy"})))
        } else {
            none("it did not come from a parser")
        };
    };
    let fields = fake_plan(model)?;
    if fields.is_object() {
        let mut fields = object(fields);
        fields.remove("io");
        if let Some(product) = choices
            .iter()
            .find(|c| c.kind == layer_type::MATRIX_MULTIPLY && c.precision != "explicit")
        {
            fields.entry("compute").or_insert_with(|| json!(product.precision));
        }
        return Ok(fields);
    }
    let graph_ = &model.graph;
    let inputs: Vec<&str> = graph_
        .inputs
        .iter()
        .map(|i| i.name.as_str())
        .filter(|name| graph_.is_input(name))
        .collect();
    let sources: Vec<&str> = graph_.outputs.iter().map(|output| origin(model, &output.name)).collect();
    if sources == inputs {
        return Ok(object(json!({"program": "copy"})));
    }
    if let [node] = graph_.nodes.as_slice() {
        if node.op == "NonZero" {
            return Ok(object(json!({"program": "nonzero"})));
        }
    }
    if let Some(node) = graph_.nodes.iter().find(|node| !graph::OPS.contains(&node.op.as_str())) {
        return none(&format!("the stand-in does not compute {} ({})", node.op, node.name));
    }
    let mut nodes = Vec::new();
    for (node, choice) in graph_.nodes.iter().zip(choices) {
        let mut described = graph::describe(node);
        described.insert("precision".to_owned(), json!(choice.precision));
        let scale = |name: &String| scales.get(name).map_or(Value::Null, |scale| json!(scale));
        described.insert("scales".to_owned(), node.inputs.iter().map(scale).collect());
        nodes.push(Value::Object(described));
    }
    let mut weights = Map::new();
    let path = network.path.as_deref();
    let constants = graph_.nodes.iter().filter_map(|node| {
        let tensor = node.attributes.get("value")?.tensor.as_ref()?;
        Some((node.outputs.first()?.clone(), tensor))
    });
    for (name, data) in graph_.initializers.iter().map(|data| (data.name.clone(), data)).chain(constants) {
        if data.count() > MOST {
            return none(&format!("{name} has {} values", data.count()));
        }
        weights.insert(name, graph::describe_weights(&data.dims, &data.values(path)?));
    }
    Ok(object(json!({"program": "graph", "graph": {"nodes": nodes, "weights": weights}})))
}

// The plan -----------------------------------------------------------------------------------------------------------

fn io(network: &Network, config: &Config) -> Vec<Value> {
    let given = network
        .model
        .as_ref()
        .and_then(|model| fake_plan(model).ok())
        .map_or(Value::Null, |fields| fields["io"].clone());
    let describe = |tensor: &Tensor, mode: &str| {
        let name = name(tensor);
        let format = (0..13).find(|bit| tensor.formats >> bit & 1 != 0).unwrap_or(0);
        let mut one =
            json!({"name": name, "mode": mode, "dtype": dtype_name(tensor.dtype), "shape": tensor.dims.shape(), "format": format});
        let mut profiles = Vec::new();
        let mut values = Vec::new();
        for profile in config.profiles.iter().filter(|_| mode == "input") {
            let entry = profile.entries.get(&name).cloned().unwrap_or_default();
            profiles.push(entry.dims.map(|dims| dims.unwrap_or(tensor.dims).shape().to_vec()));
            if tensor.shape_tensor {
                values.push(entry.values);
            }
        }
        one["profiles"] = json!(profiles);
        one["values"] = json!(values);
        if tensor.shape_tensor {
            one["location"] = json!("host");
        }
        let own = given.as_array().and_then(|io| io.iter().find(|other| other["name"] == *name));
        for key in ["debug", "location"] {
            if let Some(value) = own.and_then(|own| own.get(key)) {
                one[key] = value.clone();
            }
        }
        one
    };
    let inputs = network.tensors(&network.inputs);
    let outputs = network.tensors(&network.outputs);
    inputs
        .iter()
        .map(|t| describe(t, "input"))
        .chain(outputs.iter().map(|t| describe(t, "output")))
        .collect()
}

fn names(bits: u32, all: &[Member]) -> Vec<&'static str> {
    (0..32)
        .filter(|bit| bits >> bit & 1 != 0)
        .filter_map(|bit| member(all, bit))
        .map(|one| one.name)
        .collect()
}

/// What the plan was built with, for tests to ask.
fn built(network: &Network, config: &Config, choices: &[Choice], scales: &Scales, cached: (usize, usize)) -> Value {
    let pools: BTreeMap<&str, u64> = config
        .pools
        .iter()
        .filter_map(|(pool, size)| Some((member(memory_pool_type::ALL, *pool)?.name, *size)))
        .collect();
    let precisions: BTreeMap<&str, &str> = choices.iter().map(|choice| (choice.name.as_str(), choice.precision)).collect();
    let plugins: Vec<_> = config.plugins.iter().map(|path| path.to_string_lossy().into_owned()).collect();
    let (major, minor, patch, build) = version();
    let mut built = json!({
        "version": format!("{major}.{minor}.{patch}.{build}"),
        "flags": config.flag_names(),
        "tactic_sources": names(config.number("TacticSources") as u32, tactic_source::ALL),
        "preview_features": names(config.previews, preview_feature::ALL),
        "pools": pools,
        "precisions": precisions,
        "plugins": plugins,
        "scales": scales,
        "strongly_typed": network.strong,
        "timing_cache": {"given": !config.cache.is_null(), "hits": cached.0, "misses": cached.1},
    });
    for (key, value) in &config.numbers {
        built[key] = json!(value);
    }
    built
}

/// What the timing cache already knew, and what it learned.
fn time_layers(config: &Config, choices: &[Choice], reporter: &Reporter) -> Done<(usize, usize)> {
    if config.has(builder_flag::DISABLE_TIMING_CACHE) {
        reporter.log(severity::INFO, "Timing cache disabled. Turning it on will improve builder speed.");
        return Ok((0, choices.len()));
    }
    if config.cache.is_null() {
        reporter.log(
            severity::INFO,
            "Local timing cache in use. Profiling results in this builder pass will not be stored.",
        );
        return Ok((0, choices.len()));
    }
    reporter.log(
        severity::INFO,
        "Global timing cache in use. Profiling results in this builder pass will be stored.",
    );
    // SAFETY: the caller's cache, which it keeps through the build.
    let cache = unsafe { of::<TimingCache>(config.cache) };
    let level = config.number("BuilderOptimizationLevel");
    let (mut hits, mut misses) = (0, 0);
    for choice in choices {
        let key = format!("{} {} level {level}", choice.name, choice.precision);
        let known = cache.entries.contains_key(&key);
        if !known && config.has(builder_flag::ERROR_ON_TIMING_CACHE_MISS) {
            return Err(format!("Error Code 10: Internal Error (Could not find any implementation for node {}. Adding new entry to timing cache is not allowed if `BuilderFlag::kERROR_ON_TIMING_CACHE_MISS` is set.)", choice.name));
        }
        cache.entries.entry(key).or_insert(0.001);
        hits += usize::from(known);
        misses += usize::from(!known);
    }
    Ok((hits, misses))
}

fn warn_of_norms(choices: &[Choice], reporter: &Reporter) {
    if choices
        .iter()
        .any(|c| c.kind == layer_type::NORMALIZATION && c.precision == "float16")
    {
        reporter.log(severity::WARNING, "Detected layernorm nodes in FP16.");
        reporter.log(severity::WARNING, "Running layernorm after self-attention with FP16 Reduce or Pow may cause overflow. Forcing Reduce or Pow Layers in FP32 precision, or exporting the model to use INormalizationLayer (available with ONNX opset >= 17) can help preserving accuracy.");
    }
}

fn warn_of_weights(weights: &[Refittable], choices: &[Choice], reporter: &Reporter) {
    if !choices.iter().any(|choice| choice.precision == "float16") {
        return;
    }
    for one in weights
        .iter()
        .filter(|one| one.values.iter().any(|x| x.is_finite() && x.abs() > 65504.0))
    {
        reporter.log(
            severity::WARNING,
            &format!("Weights [name={}] had the following issues when converted to FP16:", one.name),
        );
        reporter.log(
            severity::WARNING,
            " - Detected finite FP32 values which would overflow in FP16 and converted them to the closest finite FP16 value.",
        );
    }
}

fn plan(
    network: &Network,
    config: &Config,
    choices: &[Choice],
    scales: &Scales,
    settings: &Value,
    cached: (usize, usize),
) -> Done<Vec<u8>> {
    let mut content = program(network, choices, scales)?;
    let weights = match &network.model {
        Some(model) => refittable(model, network.path.as_deref())?,
        None => Vec::new(),
    };
    warn_of_weights(&weights, choices, &network.reporter);
    let size = |one: &Refittable| {
        let sizes = one.dims.iter().map(|&d| d.max(0) as usize);
        sizes.fold(width(one.dtype).max(1), usize::saturating_mul)
    };
    let bytes = weights.iter().map(size).fold(0, usize::saturating_add).min(1 << 40);
    let stripped = config.has(builder_flag::STRIP_PLAN);
    let refit = if stripped || config.has(builder_flag::REFIT_IDENTICAL) {
        Some("identical")
    } else if config.has(builder_flag::REFIT) || config.has(builder_flag::REFIT_INDIVIDUAL) {
        Some("full")
    } else {
        None
    };
    let mut put = |key: &str, value: Value| {
        content.insert(key.to_owned(), value);
    };
    put("io", json!(io(network, config)));
    put("name", json!(network.name.to_string_lossy()));
    put("layers", json!(layers(network, choices, settings)));
    put("built", built(network, config, choices, scales, cached));
    put("sm", json!(sm()?));
    put("weights_bytes", json!(bytes.clamp(4096, 64 << 20)));
    put("weight_streaming", json!(config.has(builder_flag::WEIGHT_STREAMING)));
    let level = member(
        hardware_compatibility_level::ALL,
        config.number("HardwareCompatibilityLevel") as i32,
    );
    put("hardware_compatibility", json!(level.map_or("NONE", |one| one.name)));
    let compatible = config.has(builder_flag::VERSION_COMPATIBLE);
    put("version_compatible", json!(compatible));
    put("host_code", json!(compatible && !config.has(builder_flag::EXCLUDE_LEAN_RUNTIME)));
    if let Some(refit) = refit {
        let list: Vec<Value> = weights
            .iter()
            .map(|one| json!({"name": one.name, "dims": one.dims, "dtype": one.dtype}))
            .collect();
        put("refit", json!(refit));
        put("refit_weights", json!(list));
        put(
            "refit_hash",
            json!(fingerprint(weights.iter().map(|one| (one.name.as_str(), one.values.clone())))),
        );
    }
    if stripped {
        put("stripped", json!(true));
        put("stripped_bytes", json!(bytes));
        let columns = content.get("b").and_then(Value::as_array).map_or(0, Vec::len);
        content.entry("columns").or_insert_with(|| json!(columns));
        content.remove("w");
        content.remove("b");
        if let Some(named) = content.get_mut("graph").and_then(|g| g["weights"].as_object_mut()) {
            for one in &weights {
                if let Some(weight) = named.get_mut(&one.name) {
                    weight["values"] = json!([]);
                }
            }
        }
    }
    for (key, value) in faults::of_plan(settings) {
        content.insert(key, value);
    }
    let cap = config.number("MaxAuxStreams");
    if let Some(streams) = content.get("aux_streams").and_then(Value::as_i64).filter(|&n| cap >= 0 && n > cap) {
        content.insert("aux_streams".to_owned(), json!(streams.min(cap)));
    }
    let body = Value::Object(content).to_string();
    let (major, minor, patch, build) = version();
    let mut bytes = b"ftrt".to_vec();
    bytes.extend(SERIALIZATION.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(((HEADER + body.len()) as u64).to_le_bytes());
    bytes.extend([major, minor, patch, build].map(|n| n as u8));
    bytes.extend(body.as_bytes());
    Ok(bytes)
}

/// The whole build; the error is the line to log, empty for none.
pub fn build(network: &Network, config: &Config, reporter: &Reporter) -> Done<Vec<u8>> {
    let settings = faults::settings(Some(config.number("BuilderOptimizationLevel") as i32));
    check(network, config, reporter)?;
    let mut progress = Progress::new(config.monitor);
    let result = phases(network, config, reporter, &settings, &mut progress);
    progress.finish_all();
    result
}

fn phases(network: &Network, config: &Config, reporter: &Reporter, settings: &Value, progress: &mut Progress) -> Done<Vec<u8>> {
    let canceled = || "Error Code 2: Internal Error (Build canceled by user)".to_owned();
    let going = |on: bool| if on { Ok(()) } else { Err(canceled()) };
    progress.start("Building Engine", 4);
    let mut scales = Scales::new();
    if config.has(builder_flag::INT8) && !network.strong && quantized_by_nodes(network).is_empty() {
        progress.start("Calibrating", 1);
        // In float32 throughout, as the calibration engine is.
        let plain = choose(network, &Config::new(config.reporter, Default::default()), &scales, &json!({}))?;
        let graph = program(network, &plain, &scales).ok().map(|fields| graph::read(&fields["graph"]));
        scales = calibrate::scales(network, config, graph.as_ref().filter(|graph| !graph.steps.is_empty()), reporter)?;
        going(progress.step())?;
        progress.finish();
    }
    going(progress.step())?;
    let choices = choose(network, config, &scales, settings)?;
    warn_of_norms(&choices, reporter);
    if let Some(needed) = settings["needs_workspace"].as_u64() {
        let limit = config.pools.get(&0).copied().unwrap_or(0);
        if limit < needed {
            reporter.log(
                severity::WARNING,
                &format!(
                    "Tactic Device request: {}MB Available: {}MB. Device memory is insufficient to use tactic.",
                    needed >> 20,
                    limit >> 20
                ),
            );
            let node = choices.first().map_or("", |choice| choice.name.as_str());
            return Err(format!(
                "Error Code 10: Internal Error (Could not find any implementation for node {node}.)"
            ));
        }
    }
    progress.start("Building engine from subgraph", 3);
    progress.start("Computing profile costs", config.profiles.len() as i32);
    (0..config.profiles.len().max(1)).try_for_each(|_| going(progress.step()))?;
    progress.finish();
    going(progress.step())?;
    progress.start("Timing graph nodes", (choices.len() as i32).max(20));
    let cached = time_layers(config, &choices, reporter)?;
    faults::perform(settings, reporter, &mut |share| progress.up_to(share)).map_err(|why| if why.is_empty() { why } else { canceled() })?;
    going(progress.rest())?;
    progress.finish();
    going(progress.step())?;
    let bytes = plan(network, config, &choices, &scales, settings, cached)?;
    going(progress.step())?;
    progress.finish();
    (0..3).try_for_each(|_| going(progress.step()))?;
    progress.finish();
    reporter.log(severity::INFO, "Engine generation completed in 0.01 seconds.");
    reporter.log(
        severity::INFO,
        "[MemUsageStats] Peak memory usage during Engine building and serialization: CPU: 1 MiB",
    );
    Ok(bytes)
}
