//! INetworkDefinition, ITensor and ILayer.

use std::ffi::{c_char, CString};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use crate::abi::{self, data_type, layer as layer_slots, network as slots, tensor as tensor_slots, Slot};
use crate::object::{discard, make, of, Class, Destroyed, Object, Public};
use crate::onnx::Model;
use crate::plan::Dims;
use crate::{allowed, text, Reporter};

/// What a builder and the objects it made know of each other.
#[derive(Default)]
pub struct Shared {
    pub objects: AtomicUsize,
    /// Whether the network made last is strongly typed: a configuration made after it then refuses precisions.
    pub strong: AtomicBool,
}

pub struct Network {
    pub reporter: Reporter,
    pub strong: bool,
    pub name: CString,
    pub inputs: Vec<*mut Public>,
    pub outputs: Vec<*mut Public>,
    pub layers: Vec<*mut Public>,
    tensors: Vec<*mut Public>,
    pub model: Option<Model>,
    pub path: Option<PathBuf>,
    /// The parser that filled it, which owns the weights.
    pub parser: Option<Weak<()>>,
    shared: Arc<Shared>,
}

pub struct Tensor {
    pub name: CString,
    pub dims: Dims,
    pub dtype: i32,
    pub input: bool,
    pub output: bool,
    pub formats: u32,
    pub shape_tensor: bool,
    pub names: [Option<CString>; 8],
    pub range: Option<(f32, f32)>,
    location: i32,
    broadcast: bool,
    strong: bool,
    reporter: Reporter,
}

pub struct Layer {
    pub kind: i32,
    pub op: String,
    pub name: CString,
    pub inputs: Vec<*mut Public>,
    pub outputs: Vec<*mut Public>,
    pub precision: Option<i32>,
    /// What was asked for each output.
    pub types: Vec<Option<i32>>,
    metadata: CString,
    strong: bool,
    ranks: i32,
    reporter: Reporter,
}

pub fn usage(reporter: &Reporter, method: &str, why: &str) {
    reporter.error(&format!("{method}: Error Code 3: API Usage Error (Parameter check failed, {why})"));
}

impl Network {
    pub fn new(reporter: Reporter, flags: u32, shared: Arc<Shared>) -> Network {
        let (major, minor, ..) = crate::record::version();
        let bit = abi::network_definition_creation_flag::STRONGLY_TYPED.value(major, minor);
        let strong = major >= 11 || bit.is_some_and(|bit| flags >> bit & 1 != 0);
        shared.objects.fetch_add(1, Ordering::Relaxed);
        shared.strong.store(strong, Ordering::Relaxed);
        Network {
            reporter,
            strong,
            name: c"Unnamed Network 0".to_owned(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            layers: Vec::new(),
            tensors: Vec::new(),
            model: None,
            path: None,
            parser: None,
            shared,
        }
    }

    pub fn add_tensor(&mut self, name: &str, dims: Dims, dtype: i32) -> *mut Public {
        let made = make(Tensor {
            name: CString::new(name).unwrap_or_default(),
            dims,
            dtype,
            input: false,
            output: false,
            formats: (1 << 13) - 1,
            shape_tensor: false,
            names: [const { None }; 8],
            range: None,
            location: 0,
            broadcast: false,
            strong: self.strong,
            reporter: self.reporter,
        });
        self.tensors.push(made);
        made
    }

    pub fn add_layer(&mut self, kind: i32, op: &str, name: &str, inputs: Vec<*mut Public>, outputs: Vec<*mut Public>) -> *mut Public {
        let types = vec![None; outputs.len()];
        let made = make(Layer {
            kind,
            op: op.to_owned(),
            name: CString::new(name).unwrap_or_default(),
            inputs,
            outputs,
            precision: None,
            types,
            metadata: CString::new(format!("[ONNX Layer: {name}]")).unwrap_or_default(),
            strong: self.strong,
            ranks: 1,
            reporter: self.reporter,
        });
        self.layers.push(made);
        made
    }

    pub fn tensors<'a>(&self, of_them: &[*mut Public]) -> Vec<&'a mut Tensor> {
        // SAFETY: tensors of this network, which live as long as it does.
        of_them.iter().map(|&tensor| unsafe { of::<Tensor>(tensor) }).collect()
    }

    pub fn all_layers<'a>(&self) -> Vec<&'a mut Layer> {
        // SAFETY: as above.
        self.layers.iter().map(|&layer| unsafe { of::<Layer>(layer) }).collect()
    }
}

impl Class for Network {
    const NAME: &'static str = "INetworkDefinition";
    const ROW: usize = 7;

    fn destroyed(&mut self) {
        for &layer in &self.layers {
            // SAFETY: made by add_layer and given back by nobody else; the tensors likewise.
            unsafe { discard::<Layer>(layer) };
        }
        for &tensor in &self.tensors {
            // SAFETY: as above.
            unsafe { discard::<Tensor>(tensor) };
        }
        self.shared.objects.fetch_sub(1, Ordering::Relaxed);
    }

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (slots::ADD_INPUT, add_input as *const () as usize),
            (slots::MARK_OUTPUT, mark_output as *const () as usize),
            (slots::UNMARK_OUTPUT, unmark_output as *const () as usize),
            (slots::GET_NB_LAYERS, nb_layers as *const () as usize),
            (slots::GET_LAYER, get_layer as *const () as usize),
            (slots::GET_NB_INPUTS, nb_inputs as *const () as usize),
            (slots::GET_INPUT, get_input as *const () as usize),
            (slots::GET_NB_OUTPUTS, nb_outputs as *const () as usize),
            (slots::GET_OUTPUT, get_output as *const () as usize),
            (slots::ADD_IDENTITY, add_identity as *const () as usize),
            (slots::SET_NAME, set_name as *const () as usize),
            (slots::GET_NAME, get_name as *const () as usize),
        ]
    }
}

type This = *mut Object<Network>;

fn nth(list: &[*mut Public], index: i32) -> *mut Public {
    usize::try_from(index)
        .ok()
        .and_then(|i| list.get(i).copied())
        .unwrap_or(std::ptr::null_mut())
}

unsafe extern "C" fn add_input(this: This, name: *const c_char, dtype: i32, dims: *const Dims) -> *mut Public {
    let network = Object::body(this);
    let name = text(name).to_string_lossy().into_owned();
    let taken = network
        .tensors(&network.inputs)
        .iter()
        .any(|one| one.name.to_string_lossy() == name);
    if !allowed(&network.reporter, "INetworkDefinition", "addInput") {
        return std::ptr::null_mut();
    }
    if dims.is_null() || taken || (*dims).shape().iter().any(|&d| d < -1) {
        usage(
            &network.reporter,
            "INetworkDefinition::addInput",
            &format!("condition: the name {name:?} is new and its dimensions make sense"),
        );
        return std::ptr::null_mut();
    }
    let made = network.add_tensor(&name, Dims::new((*dims).shape()), dtype);
    of::<Tensor>(made).input = true;
    network.inputs.push(made);
    made
}

unsafe extern "C" fn mark_output(this: This, tensor: *mut Public) {
    let network = Object::body(this);
    of::<Tensor>(tensor).output = true;
    if !network.outputs.contains(&tensor) {
        network.outputs.push(tensor);
    }
}

unsafe extern "C" fn unmark_output(this: This, tensor: *mut Public) {
    let network = Object::body(this);
    of::<Tensor>(tensor).output = false;
    network.outputs.retain(|&one| one != tensor);
}

unsafe extern "C" fn nb_layers(this: This) -> i32 {
    Object::body(this).layers.len() as i32
}

unsafe extern "C" fn get_layer(this: This, index: i32) -> *mut Public {
    nth(&Object::body(this).layers, index)
}

unsafe extern "C" fn nb_inputs(this: This) -> i32 {
    Object::body(this).inputs.len() as i32
}

unsafe extern "C" fn get_input(this: This, index: i32) -> *mut Public {
    nth(&Object::body(this).inputs, index)
}

unsafe extern "C" fn nb_outputs(this: This) -> i32 {
    Object::body(this).outputs.len() as i32
}

unsafe extern "C" fn get_output(this: This, index: i32) -> *mut Public {
    nth(&Object::body(this).outputs, index)
}

unsafe extern "C" fn add_identity(this: This, input: *mut Public) -> *mut Public {
    let network = Object::body(this);
    let from = of::<Tensor>(input);
    let name = format!("(Unnamed Layer* {}) [Identity]", network.layers.len());
    let output = network.add_tensor(&format!("{name}_output"), from.dims, from.dtype);
    network.add_layer(abi::layer_type::IDENTITY, "Identity", &name, vec![input], vec![output])
}

unsafe extern "C" fn set_name(this: This, name: *const c_char) {
    Object::body(this).name = text(name).to_owned();
}

unsafe extern "C" fn get_name(this: This) -> *const c_char {
    Object::body(this).name.as_ptr()
}

// ITensor ------------------------------------------------------------------------------------------------------------

impl Class for Tensor {
    const NAME: &'static str = "ITensor";
    const ROW: usize = 8;
    const DESTROYED: Destroyed = Destroyed::ByOwner;

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (tensor_slots::SET_NAME, tensor_set_name as *const () as usize),
            (tensor_slots::GET_NAME, tensor_name as *const () as usize),
            (tensor_slots::SET_DIMENSIONS, set_dimensions as *const () as usize),
            (tensor_slots::GET_DIMENSIONS, dimensions as *const () as usize),
            (tensor_slots::SET_TYPE, set_type as *const () as usize),
            (tensor_slots::GET_TYPE, dtype as *const () as usize),
            (tensor_slots::SET_DYNAMIC_RANGE, set_range as *const () as usize),
            (tensor_slots::DYNAMIC_RANGE_IS_SET, range_is_set as *const () as usize),
            (tensor_slots::RESET_DYNAMIC_RANGE, reset_range as *const () as usize),
            (tensor_slots::GET_DYNAMIC_RANGE_MIN, range_min as *const () as usize),
            (tensor_slots::GET_DYNAMIC_RANGE_MAX, range_max as *const () as usize),
            (tensor_slots::IS_NETWORK_INPUT, is_input as *const () as usize),
            (tensor_slots::IS_NETWORK_OUTPUT, is_output as *const () as usize),
            (tensor_slots::SET_BROADCAST_ACROSS_BATCH, set_broadcast as *const () as usize),
            (tensor_slots::GET_BROADCAST_ACROSS_BATCH, get_broadcast as *const () as usize),
            (tensor_slots::GET_LOCATION, location as *const () as usize),
            (tensor_slots::SET_LOCATION, set_location as *const () as usize),
            (tensor_slots::SET_ALLOWED_FORMATS, set_formats as *const () as usize),
            (tensor_slots::GET_ALLOWED_FORMATS, formats as *const () as usize),
            (tensor_slots::IS_SHAPE_TENSOR, is_shape_tensor as *const () as usize),
            (tensor_slots::IS_EXECUTION_TENSOR, is_execution_tensor as *const () as usize),
            (tensor_slots::SET_DIMENSION_NAME, set_dimension_name as *const () as usize),
            (tensor_slots::GET_DIMENSION_NAME, dimension_name as *const () as usize),
        ]
    }
}

type Its = *mut Object<Tensor>;

unsafe extern "C" fn tensor_set_name(this: Its, name: *const c_char) {
    Object::body(this).name = text(name).to_owned();
}

unsafe extern "C" fn tensor_name(this: Its) -> *const c_char {
    Object::body(this).name.as_ptr()
}

unsafe extern "C" fn set_dimensions(this: Its, dims: *const Dims) {
    let tensor = Object::body(this);
    if !tensor.input || dims.is_null() {
        tensor
            .reporter
            .error("ITensor::setDimensions: Error Code 3: API Usage Error (only dimensions of network inputs can be set)");
        return;
    }
    tensor.dims = Dims::new((*dims).shape());
}

unsafe extern "C" fn dimensions(this: Its) -> Dims {
    Object::body(this).dims
}

unsafe extern "C" fn set_type(this: Its, dtype: i32) {
    let tensor = Object::body(this);
    let name = tensor.name.to_string_lossy();
    if tensor.strong && !(tensor.input || tensor.output) {
        usage(
            &tensor.reporter,
            "ITensor::setType",
            "condition: setType can not be called for non network I/O tensor for a strongly typed network.",
        );
    } else if tensor.strong && tensor.output && dtype != tensor.dtype {
        usage(&tensor.reporter, "ITensor::setType", &format!("condition: the output type of {name} must be same as inferred output type for a strongly typed network. If specific network output type is required, consider using a nvinfer1::ICastLayer."));
    } else {
        if !(tensor.input || tensor.output) {
            tensor.reporter.log(2, &format!("ITensor::setType({dtype}) was called on non I/O tensor: {name}. This will have no effect unless this tensor is marked as an output."));
        }
        if !crate::faults::ignored("setType") {
            tensor.dtype = dtype;
        }
    }
}

unsafe extern "C" fn dtype(this: Its) -> i32 {
    Object::body(this).dtype
}

unsafe extern "C" fn set_range(this: Its, min: f32, max: f32) -> bool {
    Object::body(this).range = Some((min, max));
    true
}

unsafe extern "C" fn range_is_set(this: Its) -> bool {
    Object::body(this).range.is_some()
}

unsafe extern "C" fn reset_range(this: Its) {
    Object::body(this).range = None;
}

unsafe extern "C" fn range_min(this: Its) -> f32 {
    Object::body(this).range.map_or(f32::NAN, |range| range.0)
}

unsafe extern "C" fn range_max(this: Its) -> f32 {
    Object::body(this).range.map_or(f32::NAN, |range| range.1)
}

unsafe extern "C" fn is_input(this: Its) -> bool {
    Object::body(this).input
}

unsafe extern "C" fn is_output(this: Its) -> bool {
    Object::body(this).output
}

unsafe extern "C" fn set_broadcast(this: Its, on: bool) {
    Object::body(this).broadcast = on;
}

unsafe extern "C" fn get_broadcast(this: Its) -> bool {
    Object::body(this).broadcast
}

unsafe extern "C" fn location(this: Its) -> i32 {
    Object::body(this).location
}

unsafe extern "C" fn set_location(this: Its, location: i32) {
    Object::body(this).location = location;
}

unsafe extern "C" fn set_formats(this: Its, formats: u32) {
    let tensor = Object::body(this);
    if tensor.shape_tensor && formats != 1 {
        usage(
            &tensor.reporter,
            "ITensor::setAllowedFormats",
            "condition: Only linear tensor format is allowed for shape tensors",
        );
    } else if !crate::faults::ignored("setAllowedFormats") {
        tensor.formats = formats;
    }
}

unsafe extern "C" fn formats(this: Its) -> u32 {
    Object::body(this).formats
}

unsafe extern "C" fn is_shape_tensor(this: Its) -> bool {
    Object::body(this).shape_tensor
}

unsafe extern "C" fn is_execution_tensor(this: Its) -> bool {
    !Object::body(this).shape_tensor
}

unsafe extern "C" fn set_dimension_name(this: Its, index: i32, name: *const c_char) {
    let tensor = Object::body(this);
    if (0..8).contains(&index) {
        tensor.names[index as usize] = (!name.is_null()).then(|| text(name).to_owned());
    }
}

unsafe extern "C" fn dimension_name(this: Its, index: i32) -> *const c_char {
    let tensor = Object::body(this);
    usize::try_from(index)
        .ok()
        .and_then(|i| tensor.names.get(i)?.as_ref())
        .map_or(std::ptr::null(), |name| name.as_ptr())
}

// ILayer -------------------------------------------------------------------------------------------------------------

impl Class for Layer {
    const NAME: &'static str = "ILayer";
    const ROW: usize = 9;
    const DESTROYED: Destroyed = Destroyed::ByOwner;

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (layer_slots::GET_TYPE, layer_type as *const () as usize),
            (layer_slots::SET_NAME, layer_set_name as *const () as usize),
            (layer_slots::GET_NAME, layer_name as *const () as usize),
            (layer_slots::GET_NB_INPUTS, layer_nb_inputs as *const () as usize),
            (layer_slots::GET_INPUT, layer_input as *const () as usize),
            (layer_slots::GET_NB_OUTPUTS, layer_nb_outputs as *const () as usize),
            (layer_slots::GET_OUTPUT, layer_output as *const () as usize),
            (layer_slots::SET_INPUT, layer_set_input as *const () as usize),
            (layer_slots::SET_PRECISION, set_precision as *const () as usize),
            (layer_slots::GET_PRECISION, precision as *const () as usize),
            (layer_slots::PRECISION_IS_SET, precision_is_set as *const () as usize),
            (layer_slots::RESET_PRECISION, reset_precision as *const () as usize),
            (layer_slots::SET_OUTPUT_TYPE, set_output_type as *const () as usize),
            (layer_slots::GET_OUTPUT_TYPE, output_type as *const () as usize),
            (layer_slots::OUTPUT_TYPE_IS_SET, output_type_is_set as *const () as usize),
            (layer_slots::RESET_OUTPUT_TYPE, reset_output_type as *const () as usize),
            (layer_slots::SET_METADATA, set_metadata as *const () as usize),
            (layer_slots::GET_METADATA, metadata as *const () as usize),
            (layer_slots::SET_NB_RANKS, set_ranks as *const () as usize),
            (layer_slots::GET_NB_RANKS, ranks as *const () as usize),
        ]
    }
}

type One = *mut Object<Layer>;

unsafe extern "C" fn layer_type(this: One) -> i32 {
    Object::body(this).kind
}

unsafe extern "C" fn layer_set_name(this: One, name: *const c_char) {
    Object::body(this).name = text(name).to_owned();
}

unsafe extern "C" fn layer_name(this: One) -> *const c_char {
    Object::body(this).name.as_ptr()
}

unsafe extern "C" fn layer_nb_inputs(this: One) -> i32 {
    Object::body(this).inputs.len() as i32
}

unsafe extern "C" fn layer_input(this: One, index: i32) -> *mut Public {
    nth(&Object::body(this).inputs, index)
}

unsafe extern "C" fn layer_nb_outputs(this: One) -> i32 {
    Object::body(this).outputs.len() as i32
}

unsafe extern "C" fn layer_output(this: One, index: i32) -> *mut Public {
    nth(&Object::body(this).outputs, index)
}

unsafe extern "C" fn layer_set_input(this: One, index: i32, tensor: *mut Public) {
    if let Some(input) = usize::try_from(index).ok().and_then(|i| Object::body(this).inputs.get_mut(i)) {
        *input = tensor;
    }
}

unsafe extern "C" fn set_precision(this: One, dtype: i32) {
    let layer = Object::body(this);
    if layer.strong {
        usage(
            &layer.reporter,
            "ILayer::setPrecision",
            "condition: !mNetwork->usingStronglyTyped(). INetworkLayer::setPrecision() cannot be called for a strongly typed network.",
        );
    } else if !crate::faults::ignored("setPrecision") {
        layer.precision = Some(dtype);
    }
}

unsafe extern "C" fn precision(this: One) -> i32 {
    Object::body(this).precision.unwrap_or(data_type::FLOAT)
}

unsafe extern "C" fn precision_is_set(this: One) -> bool {
    Object::body(this).precision.is_some()
}

unsafe extern "C" fn reset_precision(this: One) {
    Object::body(this).precision = None;
}

unsafe extern "C" fn set_output_type(this: One, index: i32, dtype: i32) {
    let layer = Object::body(this);
    if layer.strong {
        usage(
            &layer.reporter,
            "ILayer::setOutputType",
            "condition: !mNetwork->usingStronglyTyped(). INetworkLayer::setOutputType cannot be called for a strongly typed network.",
        );
    } else if let Some(kind) = usize::try_from(index).ok().and_then(|i| layer.types.get_mut(i)) {
        if !crate::faults::ignored("setOutputType") {
            *kind = Some(dtype);
        }
    } else {
        usage(&layer.reporter, "ILayer::setOutputType", "condition: index < getNbOutputs()");
    }
}

unsafe extern "C" fn output_type(this: One, index: i32) -> i32 {
    let layer = Object::body(this);
    let i = usize::try_from(index).unwrap_or(usize::MAX);
    match (layer.types.get(i), layer.outputs.get(i)) {
        (Some(Some(kind)), _) => *kind,
        (_, Some(&tensor)) => of::<Tensor>(tensor).dtype,
        _ => data_type::FLOAT,
    }
}

unsafe extern "C" fn output_type_is_set(this: One, index: i32) -> bool {
    usize::try_from(index)
        .ok()
        .and_then(|i| Object::body(this).types.get(i).copied())
        .flatten()
        .is_some()
}

unsafe extern "C" fn reset_output_type(this: One, index: i32) {
    if let Some(kind) = usize::try_from(index).ok().and_then(|i| Object::body(this).types.get_mut(i)) {
        *kind = None;
    }
}

unsafe extern "C" fn set_metadata(this: One, text_: *const c_char) {
    Object::body(this).metadata = text(text_).to_owned();
}

unsafe extern "C" fn metadata(this: One) -> *const c_char {
    Object::body(this).metadata.as_ptr()
}

unsafe extern "C" fn set_ranks(this: One, ranks: i32) -> bool {
    Object::body(this).ranks = ranks;
    true
}

unsafe extern "C" fn ranks(this: One) -> i32 {
    Object::body(this).ranks
}
