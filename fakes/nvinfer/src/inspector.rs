//! IEngineInspector.

use std::ffi::{c_char, CString};
use std::sync::Arc;

use serde_json::{json, Value};

use crate::abi::{inspector, layer_information_format, profiling_verbosity, Slot};
use crate::context::Context;
use crate::engine::Engine;
use crate::object::{of, Class, Object, Public};
use crate::plan::Plan;
use crate::{allowed, Reporter};

pub struct Inspector {
    plan: Arc<Plan>,
    reporter: Reporter,
    context: *mut Public,
    text: CString,
}

impl Inspector {
    pub fn new(engine: &Engine) -> Inspector {
        Inspector {
            plan: engine.plan.clone(),
            reporter: engine.reporter,
            context: std::ptr::null_mut(),
            text: CString::default(),
        }
    }

    /// The plans that were not built here have layers that are just numbered.
    fn layer(&self, index: usize) -> Option<Value> {
        if self.plan.layers.is_empty() {
            return (index < self.plan.nodes).then(|| json!(format!("layer_{index}")));
        }
        let layer = self.plan.layers.get(index)?;
        let verbosity = self.plan.content["built"]["ProfilingVerbosity"].as_i64().unwrap_or(0) as i32;
        Some(match verbosity {
            profiling_verbosity::NONE => json!(""),
            profiling_verbosity::DETAILED => self.known(layer.detail.clone()),
            _ => json!(layer.name.to_string_lossy()),
        })
    }

    /// A context whose shapes are set says what the dynamic dimensions are; those that are none of a network input's follow the first of them.
    fn known(&self, mut layer: Value) -> Value {
        if self.context.is_null() {
            return layer;
        }
        // SAFETY: the caller's context, which it promised to keep.
        let Some(shapes) = unsafe { of::<Context>(self.context) }.resolve() else {
            return layer;
        };
        let io = &self.plan.io;
        let any = io
            .iter()
            .zip(&shapes)
            .filter(|(tensor, _)| tensor.input)
            .flat_map(|(tensor, dims)| tensor.shape.shape().iter().zip(dims.shape().to_vec()).map(|(&d, n)| (d, n)))
            .find(|(d, _)| *d < 0)
            .map_or(1, |(_, n)| n);
        for side in ["Inputs", "Outputs"] {
            for tensor in layer[side].as_array_mut().into_iter().flatten() {
                let place = io.iter().position(|one| tensor["Name"] == *one.name.to_string_lossy());
                for (d, size) in tensor["Dimensions"].as_array_mut().into_iter().flatten().enumerate() {
                    if size == &json!(-1) {
                        *size = json!(place.and_then(|i| shapes[i].shape().get(d).copied()).unwrap_or(any));
                    }
                }
            }
        }
        layer
    }

    fn said(&self, index: usize, format: i32) -> Option<String> {
        let layer = self.layer(index)?;
        Some(match (&layer, format) {
            (layer, layer_information_format::JSON) => layer.to_string(),
            (Value::String(name), _) => name.clone(),
            (layer, _) => layer["Name"].as_str().unwrap_or("").to_owned(),
        })
    }
}

impl Class for Inspector {
    const NAME: &'static str = "IEngineInspector";
    const ROW: usize = 4;

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (inspector::GET_P_IMPL, inspector_pimpl as *const () as usize),
            (inspector::SET_EXECUTION_CONTEXT, inspector_set_context as *const () as usize),
            (inspector::GET_EXECUTION_CONTEXT, inspector_context as *const () as usize),
            (inspector::GET_LAYER_INFORMATION, layer_information as *const () as usize),
            (inspector::GET_ENGINE_INFORMATION, engine_information as *const () as usize),
            (inspector::SET_ERROR_RECORDER, inspector_set_recorder as *const () as usize),
            (inspector::GET_ERROR_RECORDER, inspector_recorder as *const () as usize),
        ]
    }
}

type Look = *mut Object<Inspector>;

unsafe extern "C" fn inspector_pimpl(this: Look) -> *mut Public {
    Object::public(this)
}

unsafe extern "C" fn inspector_set_context(this: Look, context: *mut Public) -> bool {
    Object::body(this).context = context;
    true
}

unsafe extern "C" fn inspector_context(this: Look) -> *mut Public {
    Object::body(this).context
}

unsafe extern "C" fn inspector_set_recorder(this: Look, recorder: *mut u8) {
    Object::body(this).reporter.set_recorder(recorder);
}

unsafe extern "C" fn inspector_recorder(this: Look) -> usize {
    Object::body(this).reporter.recorder
}

unsafe extern "C" fn layer_information(this: Look, index: i32, format: i32) -> *const c_char {
    let look = Object::body(this);
    if !allowed(&look.reporter, "IEngineInspector", "getLayerInformation") {
        return std::ptr::null();
    }
    let Some(text) = usize::try_from(index).ok().and_then(|i| look.said(i, format)) else {
        return std::ptr::null();
    };
    look.text = CString::new(text).unwrap_or_default();
    look.text.as_ptr()
}

unsafe extern "C" fn engine_information(this: Look, format: i32) -> *const c_char {
    let look = Object::body(this);
    if !allowed(&look.reporter, "IEngineInspector", "getEngineInformation") {
        return std::ptr::null();
    }
    let text = if format == layer_information_format::JSON {
        let layers: Vec<_> = (0..look.plan.nodes).filter_map(|i| look.layer(i)).collect();
        let bindings: Vec<_> = look.plan.io.iter().map(|t| t.name.to_string_lossy().into_owned()).collect();
        json!({"Layers": layers, "Bindings": bindings}).to_string()
    } else {
        (0..look.plan.nodes)
            .filter_map(|i| look.said(i, format))
            .map(|line| line + "\n")
            .collect()
    };
    look.text = CString::new(text).unwrap_or_default();
    look.text.as_ptr()
}
