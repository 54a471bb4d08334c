//! TensorRT's engine inspector: what the plan's layers are.

use super::abi::{engine as engine_slot, inspector as slot, layer_information_format};
use super::object::{call, refused, text, Object};
use super::{Context, Engine};
use crate::error::Result;
use std::ffi::{c_char, c_void};

impl Engine {
    /// The engine's layers as TensorRT's JSON; with a context whose shapes are set, with the shapes that follow from them.
    pub fn inspect(&self, context: Option<&Context>) -> Result<String> {
        let lib = self.lib;
        let mark = crate::log::TENSORRT.mark();
        let _entered = self.device.enter()?;
        // SAFETY: VCudaEngine::createEngineInspector(), VEngineInspector::setExecutionContext(const IExecutionContext*) and
        // getEngineInformation(LayerInformationFormat), whose text lives as long as the inspector.
        self.with_handle(|engine| unsafe {
            let made = call!(lib, engine, engine_slot::CREATE_ENGINE_INSPECTOR, fn() -> *mut c_void)?;
            let inspector = Object::new(made).ok_or_else(|| refused("TensorRT could not create an engine inspector", mark))?;
            if let Some(c) = context {
                let p = c.object().public();
                if !call!(lib, inspector, slot::SET_EXECUTION_CONTEXT, fn(*mut c_void) -> bool, p)? {
                    return Err(refused("the engine inspector refused the execution context", mark));
                }
            }
            let json = call!(
                lib,
                inspector,
                slot::GET_ENGINE_INFORMATION,
                fn(i32) -> *const c_char,
                layer_information_format::JSON
            )?;
            if json.is_null() {
                return Err(refused("TensorRT gave no information about the engine's layers", mark));
            }
            Ok(text(json))
        })
    }
}
