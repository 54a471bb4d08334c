//! The network as the parser made it: inputs, outputs, layers; and what may be changed on them.

use super::super::abi::{layer as layer_slot, layer_type, network as slot, tensor as tensor_slot, tensor_format};
use super::super::object::{call, text, Handle, RawDims};
use super::{refused, took, Builder};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::shape::Dims;
use std::ffi::{c_char, c_void};

/// An input or output of the network.
#[derive(Debug, Clone)]
pub struct NetworkTensor {
    pub name: String,
    pub dtype: String,
    /// -1 where the dimension is dynamic.
    pub shape: Dims,
    /// Its values, not only its shape, decide shapes: a profile must state them.
    pub shape_tensor: bool,
    /// Of each dimension; empty where it has none.
    pub dimension_names: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct NetworkLayer {
    pub name: String,
    /// `CONVOLUTION`, `NORMALIZATION`, …
    pub kind: String,
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
    pub output_dtypes: Vec<String>,
}

fn dtype_name(code: i32) -> String {
    DType::from_trt(code).map_or_else(|| format!("type {code}"), |d| d.name().to_string())
}

impl Builder {
    fn tensors(&self, inputs: bool) -> Result<Vec<Handle>> {
        let (lib, n) = (self.lib, &self.network);
        let (count, get) = if inputs {
            (slot::GET_NB_INPUTS, slot::GET_INPUT)
        } else {
            (slot::GET_NB_OUTPUTS, slot::GET_OUTPUT)
        };
        // SAFETY: VNetworkDefinition::getNbInputs/getNbOutputs() and getInput/getOutput(int32_t); the network owns what they give.
        unsafe {
            let count = call!(lib, n, count, fn() -> i32)?;
            (0..count)
                .map(|i| {
                    let p = call!(lib, n, get, fn(i32) -> *mut c_void, i)?;
                    Handle::new(p).ok_or_else(|| Error::new(Kind::Build, format!("TensorRT gives no tensor {i} of {count}")))
                })
                .collect()
        }
    }

    fn tensor_name(&self, t: Handle) -> Result<String> {
        // SAFETY: VTensor::getName(); the string lives as long as the tensor.
        unsafe { Ok(text(call!(self.lib, t, tensor_slot::GET_NAME, fn() -> *const c_char)?)) }
    }

    fn tensor_type(&self, t: Handle) -> Result<i32> {
        // SAFETY: VTensor::getType().
        unsafe { call!(self.lib, t, tensor_slot::GET_TYPE, fn() -> i32) }
    }

    fn describe(&self, t: Handle) -> Result<NetworkTensor> {
        let lib = self.lib;
        // SAFETY: the signatures are those of VTensor in abi/vtables.csv; a null dimension name means that there is none.
        unsafe {
            let name = self.tensor_name(t)?;
            let raw = call!(lib, t, tensor_slot::GET_DIMENSIONS, fn() -> RawDims)?;
            let shape = raw
                .dims()
                .ok_or_else(|| Error::new(Kind::Build, format!("tensor '{name}': TensorRT gives rank {}", raw.rank)))?;
            let dimension_names = (0..shape.rank() as i32)
                .map(|i| {
                    let p = call!(lib, t, tensor_slot::GET_DIMENSION_NAME, fn(i32) -> *const c_char, i)?;
                    Ok(text(p))
                })
                .collect::<Result<_>>()?;
            Ok(NetworkTensor {
                name,
                dtype: dtype_name(self.tensor_type(t)?),
                shape,
                shape_tensor: call!(lib, t, tensor_slot::IS_SHAPE_TENSOR, fn() -> bool)?,
                dimension_names,
            })
        }
    }

    pub fn inputs(&self) -> Result<Vec<NetworkTensor>> {
        self.tensors(true)?.into_iter().map(|t| self.describe(t)).collect()
    }

    pub fn outputs(&self) -> Result<Vec<NetworkTensor>> {
        self.tensors(false)?.into_iter().map(|t| self.describe(t)).collect()
    }

    fn layer(&self, index: i32) -> Result<Handle> {
        // SAFETY: VNetworkDefinition::getLayer(int32_t), null when there is none; the network owns it.
        let p = unsafe { call!(self.lib, self.network, slot::GET_LAYER, fn(i32) -> *mut c_void, index) }?;
        Handle::new(p).ok_or_else(|| Error::new(Kind::Argument, format!("layer {index}: the network has none of that number")))
    }

    /// Tensors of a layer; optional inputs that are not there are left out.
    fn layer_tensors(&self, layer: Handle, inputs: bool) -> Result<Vec<Handle>> {
        let lib = self.lib;
        let (count, get) = if inputs {
            (layer_slot::GET_NB_INPUTS, layer_slot::GET_INPUT)
        } else {
            (layer_slot::GET_NB_OUTPUTS, layer_slot::GET_OUTPUT)
        };
        // SAFETY: VLayer::getNbInputs/getNbOutputs() and getInput/getOutput(int32_t).
        unsafe {
            let count = call!(lib, layer, count, fn() -> i32)?;
            let mut out = Vec::new();
            for i in 0..count {
                out.extend(Handle::new(call!(lib, layer, get, fn(i32) -> *mut c_void, i)?));
            }
            Ok(out)
        }
    }

    pub fn layers(&self) -> Result<Vec<NetworkLayer>> {
        let lib = self.lib;
        // SAFETY: VNetworkDefinition::getNbLayers().
        let count = unsafe { call!(lib, self.network, slot::GET_NB_LAYERS, fn() -> i32) }?;
        let mut out = Vec::with_capacity(count.max(0) as usize);
        for i in 0..count {
            let layer = self.layer(i)?;
            // SAFETY: VLayer::getType() and getName().
            let (code, name) = unsafe {
                (
                    call!(lib, layer, layer_slot::GET_TYPE, fn() -> i32)?,
                    text(call!(lib, layer, layer_slot::GET_NAME, fn() -> *const c_char)?),
                )
            };
            let outputs = self.layer_tensors(layer, false)?;
            let names = |t: Vec<Handle>| t.into_iter().map(|t| self.tensor_name(t)).collect::<Result<Vec<_>>>();
            out.push(NetworkLayer {
                name,
                kind: layer_type::ALL
                    .iter()
                    .find(|(_, v)| *v == code)
                    .map_or_else(|| format!("type {code}"), |(n, _)| (*n).to_string()),
                output_dtypes: outputs
                    .iter()
                    .map(|&t| self.tensor_type(t).map(dtype_name))
                    .collect::<Result<_>>()?,
                inputs: names(self.layer_tensors(layer, true)?)?,
                outputs: names(outputs)?,
            });
        }
        Ok(out)
    }

    /// Asks for a layer to be computed in that type and to give it out (its outputs of floating point only).
    pub fn set_layer_precision(&self, index: i32, dtype: DType) -> Result<()> {
        let lib = self.lib;
        let layer = self.layer(index)?;
        let what = format!("precision of layer {index}");
        // SAFETY: VLayer::setPrecision(DataType), precisionIsSet(), getPrecision(), setOutputType(int32_t, DataType),
        // outputTypeIsSet(int32_t), getOutputType(int32_t). The getters answer float32 where nothing is set.
        unsafe {
            call!(lib, layer, layer_slot::SET_PRECISION, fn(i32) -> (), dtype.code())?;
            took(&what, true, call!(lib, layer, layer_slot::PRECISION_IS_SET, fn() -> bool)?)?;
            took(&what, dtype.code(), call!(lib, layer, layer_slot::GET_PRECISION, fn() -> i32)?)?;
            for (i, t) in self.layer_tensors(layer, false)?.into_iter().enumerate() {
                let floating = matches!(DType::from_trt(self.tensor_type(t)?), Some(DType::F32 | DType::F16 | DType::Bf16));
                if !floating {
                    continue;
                }
                let i = i as i32;
                call!(lib, layer, layer_slot::SET_OUTPUT_TYPE, fn(i32, i32) -> (), i, dtype.code())?;
                took(
                    &format!("type of output {i} of layer {index}"),
                    true,
                    call!(lib, layer, layer_slot::OUTPUT_TYPE_IS_SET, fn(i32) -> bool, i)?,
                )?;
                took(
                    &format!("type of output {i} of layer {index}"),
                    dtype.code(),
                    call!(lib, layer, layer_slot::GET_OUTPUT_TYPE, fn(i32) -> i32, i)?,
                )?;
            }
        }
        Ok(())
    }

    /// The element type and the memory formats that an input or output may have in the plan.
    pub fn set_io_format(&self, name: &str, dtype: Option<DType>, formats: &[String]) -> Result<()> {
        let lib = self.lib;
        let mut all = self.tensors(true)?;
        all.extend(self.tensors(false)?);
        let mut names = Vec::new();
        for t in all {
            let found = self.tensor_name(t)?;
            if found != name {
                names.push(found);
                continue;
            }
            let mut mask = 0u32;
            for format in formats {
                let Some((_, bit)) = tensor_format::ALL.iter().find(|(n, _)| n == format) else {
                    let allowed: Vec<&str> = tensor_format::ALL.iter().map(|(n, _)| *n).collect();
                    return Err(Error::new(
                        Kind::BuildOption,
                        format!("format of '{name}': found {format}; allowed: {}", allowed.join(", ")),
                    ));
                };
                mask |= 1 << bit;
            }
            // SAFETY: VTensor::setType(DataType), setAllowedFormats(uint32_t), getAllowedFormats().
            unsafe {
                if let Some(d) = dtype {
                    call!(lib, t, tensor_slot::SET_TYPE, fn(i32) -> (), d.code())?;
                    took(&format!("type of '{name}'"), d.code(), self.tensor_type(t)?)?;
                }
                if mask != 0 {
                    call!(lib, t, tensor_slot::SET_ALLOWED_FORMATS, fn(u32) -> (), mask)?;
                    let found = call!(lib, t, tensor_slot::GET_ALLOWED_FORMATS, fn() -> u32)?;
                    took(&format!("formats of '{name}'"), mask, found)?;
                }
            }
            return Ok(());
        }
        Err(refused(
            format!("'{name}' is no input or output; those are {}", names.join(", ")),
            u64::MAX,
        ))
    }
}
