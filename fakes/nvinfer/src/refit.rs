//! IRefitter and IParserRefitter.

use std::collections::HashMap;
use std::ffi::{c_char, c_void, CString};
use std::path::Path;
use std::sync::{Arc, Weak};

use half::{bf16, f16};

use crate::abi::{data_type, parser_error_code, parser_refitter as parser_slots, refitter as slots, severity, Slot};
use crate::compile::{fingerprint, refittable};
use crate::engine::Engine;
use crate::graph::Array;
use crate::object::{of, Class, Destroyed, Object, Public};
use crate::parser::{path_of, Errors, Failure, ParserError};
use crate::plan::{width, Plan};
use crate::record::mistake;
use crate::{allowed, onnx, text, Reporter};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct WeightsOf {
    dtype: i32,
    values: *const c_void,
    count: i64,
}

pub struct Refitter {
    reporter: Reporter,
    plan: Arc<Plan>,
    /// Every weight that a refit may set, in the plan's order.
    all: Vec<(CString, Vec<usize>, i32)>,
    given: HashMap<String, Vec<f32>>,
    /// The parser refitters whose memory the weights lie in until the engine has them.
    owners: Vec<Weak<()>>,
    threads: i32,
    validation: bool,
}

impl Refitter {
    /// None for an engine that was not built to be refitted.
    pub fn new(engine: *mut Public, reporter: Reporter) -> Option<Refitter> {
        // SAFETY: the engine that the caller passes to the factory.
        let plan = unsafe { of::<Engine>(engine) }.plan.clone();
        if !plan.content["refit"].is_string() {
            return None;
        }
        let all = plan.content["refit_weights"].as_array().into_iter().flatten().map(|one| {
            let dims = one["dims"].as_array().into_iter().flatten();
            let dims = dims.filter_map(serde_json::Value::as_u64).map(|d| d as usize).collect();
            (
                CString::new(one["name"].as_str().unwrap_or("")).unwrap_or_default(),
                dims,
                one["dtype"].as_i64().unwrap_or(0) as i32,
            )
        });
        Some(Refitter {
            reporter,
            all: all.collect(),
            given: HashMap::new(),
            owners: Vec::new(),
            threads: 1,
            validation: true,
            plan,
        })
    }

    fn find(&self, name: &str) -> Option<&(CString, Vec<usize>, i32)> {
        self.all.iter().find(|(one, ..)| one.to_string_lossy() == name)
    }

    fn set(&mut self, name: &str, values: Vec<f32>) -> bool {
        let Some((_, dims, _)) = self.find(name) else {
            self.reporter.error(&format!(
                "IRefitter::setNamedWeights: Error Code 3: API Usage Error (name {name} is not that of refittable weights)"
            ));
            return false;
        };
        let wanted: usize = dims.iter().product();
        if values.len() != wanted {
            self.reporter.error(&format!(
                "IRefitter::setNamedWeights: Error Code 3: API Usage Error ({name}: refit weights count {} does not match {wanted})",
                values.len()
            ));
            return false;
        }
        self.given.insert(name.to_owned(), values);
        true
    }

    /// What a stripped plan still needs.
    fn missing(&self) -> Vec<&CString> {
        let lost = self.plan.weights().lost;
        let all = self.all.iter().map(|(name, ..)| name);
        all.filter(|name| lost && !self.given.contains_key(name.to_string_lossy().as_ref()))
            .collect()
    }

    fn refit(&mut self) -> bool {
        if !allowed(&self.reporter, "IRefitter", "refitCudaEngine") {
            return false;
        }
        let missing: Vec<String> = self.missing().iter().map(|name| name.to_string_lossy().into_owned()).collect();
        if !missing.is_empty() {
            self.reporter.error(&format!(
                "IRefitter::refitCudaEngine: Error Code 4: API Usage Error (missing {} needed Weights. Call IRefitter::getMissingWeights to query the names: {})",
                missing.len(),
                missing.join(", ")
            ));
            return false;
        }
        if self.owners.drain(..).any(|owner| owner.strong_count() == 0) {
            mistake("an engine was refitted after the parser refitter, which owns the weights, had been destroyed");
        }
        let identical = self.plan.content["refit"] == "identical";
        let complete = self.given.len() == self.all.len();
        let same = fingerprint(self.given.iter().map(|(name, values)| (name.as_str(), values.clone()))) == self.plan.content["refit_hash"];
        if identical && complete && !same {
            mistake("an engine built with kREFIT_IDENTICAL was refitted with other weights than it was built with");
        }
        let given = std::mem::take(&mut self.given);
        self.plan.refit(|weights| {
            for (name, values) in given {
                let dims = self.find(&name).map(|(_, dims, _)| dims.clone()).unwrap_or_default();
                // Those of `affine` have these names; a graph may have weights that are called so too.
                match name.as_str() {
                    "w" if !weights.named.contains_key("w") => {
                        let columns = dims.get(1).copied().unwrap_or(1).max(1);
                        weights.w = values.chunks(columns).map(<[f32]>::to_vec).collect();
                    }
                    "b" if !weights.named.contains_key("b") => weights.b = values,
                    _ => {
                        let values = values.into_iter().map(f64::from).collect();
                        weights.named.insert(name, Array { dims, values });
                    }
                }
            }
            weights.lost = false;
        });
        true
    }
}

impl Class for Refitter {
    const NAME: &'static str = "IRefitter";
    const ROW: usize = 12;

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (slots::GET_P_IMPL, get_pimpl as *const () as usize),
            (slots::REFIT_CUDA_ENGINE, refit as *const () as usize),
            (slots::REFIT_CUDA_ENGINE_ASYNC, refit_async as *const () as usize),
            (slots::SET_ERROR_RECORDER, set_recorder as *const () as usize),
            (slots::GET_ERROR_RECORDER, get_recorder as *const () as usize),
            (slots::SET_NAMED_WEIGHTS, set_named as *const () as usize),
            (slots::SET_NAMED_WEIGHTS_WITH_LOCATION, set_named_at as *const () as usize),
            (slots::UNSET_NAMED_WEIGHTS, unset as *const () as usize),
            (slots::GET_MISSING_WEIGHTS, missing as *const () as usize),
            (slots::GET_ALL_WEIGHTS, all as *const () as usize),
            (slots::GET_WEIGHTS_PROTOTYPE, prototype as *const () as usize),
            (slots::GET_LOGGER, logger as *const () as usize),
            (slots::SET_MAX_THREADS, set_threads as *const () as usize),
            (slots::GET_MAX_THREADS, threads as *const () as usize),
            (slots::SET_WEIGHTS_VALIDATION, set_validation as *const () as usize),
            (slots::GET_WEIGHTS_VALIDATION, validation as *const () as usize),
        ]
    }
}

type This = *mut Object<Refitter>;

unsafe extern "C" fn get_pimpl(this: This) -> *mut Public {
    Object::public(this)
}

unsafe extern "C" fn refit(this: This) -> bool {
    Object::body(this).refit()
}

unsafe extern "C" fn refit_async(this: This, _stream: u64) -> bool {
    Object::body(this).refit()
}

unsafe extern "C" fn set_recorder(this: This, recorder: *mut u8) {
    Object::body(this).reporter.set_recorder(recorder);
}

unsafe extern "C" fn get_recorder(this: This) -> usize {
    Object::body(this).reporter.recorder
}

unsafe extern "C" fn set_named(this: This, name: *const c_char, weights: WeightsOf) -> bool {
    let refitter = Object::body(this);
    if !allowed(&refitter.reporter, "IRefitter", "setNamedWeights") {
        return false;
    }
    let count = weights.count.max(0) as usize;
    if weights.values.is_null() {
        return false;
    }
    let bytes = std::slice::from_raw_parts(weights.values.cast::<u8>(), count * width(weights.dtype));
    let two = |c: &[u8]| u16::from_le_bytes([c[0], c[1]]);
    let values: Vec<f32> = match weights.dtype {
        data_type::FLOAT => bytes
            .chunks_exact(4)
            .map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]))
            .collect(),
        data_type::HALF => bytes.chunks_exact(2).map(|c| f16::from_bits(two(c)).to_f32()).collect(),
        data_type::BF16 => bytes.chunks_exact(2).map(|c| bf16::from_bits(two(c)).to_f32()).collect(),
        _ => Vec::new(),
    };
    refitter.set(&text(name).to_string_lossy(), values)
}

unsafe extern "C" fn set_named_at(this: This, name: *const c_char, weights: WeightsOf, _location: i32) -> bool {
    set_named(this, name, weights)
}

unsafe extern "C" fn unset(this: This, name: *const c_char) -> bool {
    Object::body(this).given.remove(text(name).to_string_lossy().as_ref()).is_some()
}

unsafe fn list(names: &[&CString], size: i32, to: *mut *const c_char) -> i32 {
    for (i, name) in names.iter().enumerate().take(size.max(0) as usize) {
        to.add(i).write(name.as_ptr());
    }
    names.len() as i32
}

unsafe extern "C" fn missing(this: This, size: i32, to: *mut *const c_char) -> i32 {
    list(&Object::body(this).missing(), size, to)
}

unsafe extern "C" fn all(this: This, size: i32, to: *mut *const c_char) -> i32 {
    let names: Vec<&CString> = Object::body(this).all.iter().map(|(name, ..)| name).collect();
    list(&names, size, to)
}

unsafe extern "C" fn prototype(this: This, name: *const c_char) -> WeightsOf {
    let found = Object::body(this).find(&text(name).to_string_lossy());
    WeightsOf {
        dtype: found.map_or(0, |(.., dtype)| *dtype),
        values: std::ptr::null(),
        count: found.map_or(-1, |(_, dims, _)| dims.iter().product::<usize>() as i64),
    }
}

unsafe extern "C" fn logger(this: This) -> usize {
    Object::body(this).reporter.logger
}

unsafe extern "C" fn set_threads(this: This, n: i32) -> bool {
    let refitter = Object::body(this);
    refitter.threads = n.max(1);
    n >= 1
}

unsafe extern "C" fn threads(this: This) -> i32 {
    Object::body(this).threads
}

unsafe extern "C" fn set_validation(this: This, on: bool) {
    Object::body(this).validation = on;
}

unsafe extern "C" fn validation(this: This) -> bool {
    Object::body(this).validation
}

// IParserRefitter ----------------------------------------------------------------------------------------------------

pub struct ParserRefitter {
    reporter: Reporter,
    refitter: *mut Public,
    errors: Errors,
    alive: Arc<()>,
}

impl ParserRefitter {
    pub fn new(refitter: *mut Public, reporter: Reporter) -> ParserRefitter {
        ParserRefitter {
            reporter,
            refitter,
            errors: Errors::default(),
            alive: Arc::default(),
        }
    }

    /// Sets the refitter's weights from a model; the engine changes when the refitter is told to refit.
    fn refit(&mut self, bytes: &[u8], path: Option<&Path>) -> bool {
        let failure = |code: i32, why: &str| {
            Box::new(Failure {
                file: "/_src/parsers/onnxOpenSource/ModelRefitter.cpp".to_owned(),
                ..Failure::of_model(code, "refitOnnxWeights", why)
            })
        };
        let weights = match onnx::parse(bytes) {
            Ok(model) => refittable(&model, path).map_err(|why| {
                self.reporter.error(&why);
                failure(
                    parser_error_code::UNSUPPORTED_NODE,
                    "Assertion failed: mWeightsContext.convertOnnxWeights(initializer, &weights, true) && \"Failed to import initializer.\"",
                )
            }),
            Err(why) => Err(failure(
                parser_error_code::MODEL_DESERIALIZE_FAILED,
                &format!("Assertion failed: fileLoadSuccess && \"Failed to parse the ONNX model!\" ({why})"),
            )),
        };
        let done = weights.and_then(|weights| {
            // SAFETY: the refitter that this one was made for, which must outlive it.
            let refitter = unsafe { of::<Refitter>(self.refitter) };
            refitter.owners.push(Arc::downgrade(&self.alive));
            let mut set = 0;
            for one in weights {
                if refitter.find(&one.name).is_none() {
                    continue;
                }
                if !refitter.set(&one.name, one.values) {
                    return Err(failure(
                        parser_error_code::REFIT_FAILED,
                        "Assertion failed: mRefitter->setNamedWeights(initializer.name().c_str(), std::move(weights)) && \"Failed to set named weights\"",
                    ));
                }
                set += 1;
            }
            if set != refitter.all.len() {
                return Err(failure(
                    parser_error_code::REFIT_FAILED,
                    "Assertion failed: successfullyRefittedWeights == numberOfWeightsToRefit && \"Failed to refit all the weights.\"",
                ));
            }
            Ok(())
        });
        match done {
            Ok(()) => true,
            Err(failure) => {
                self.reporter.log(
                    severity::ERROR,
                    &format!("ERROR: {}:{} [{}] {}", failure.file, failure.line, failure.code, failure.why),
                );
                self.errors.add(&failure);
                false
            }
        }
    }
}

impl Class for ParserRefitter {
    const NAME: &'static str = "IParserRefitter";
    const ROW: usize = 15;
    const DESTROYED: Destroyed = Destroyed::By(parser_slots::DTOR_DELETING);

    fn destroyed(&mut self) {
        self.errors.clear();
    }

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (parser_slots::REFIT_FROM_BYTES, refit_from_bytes as *const () as usize),
            (parser_slots::REFIT_FROM_FILE, refit_from_file as *const () as usize),
            (parser_slots::GET_NB_ERRORS, nb_errors as *const () as usize),
            (parser_slots::GET_ERROR, get_error as *const () as usize),
            (parser_slots::CLEAR_ERRORS, clear_errors as *const () as usize),
        ]
    }
}

type That = *mut Object<ParserRefitter>;

unsafe extern "C" fn refit_from_bytes(this: That, bytes: *const u8, size: u64, path: *const c_char) -> bool {
    let one = Object::body(this);
    allowed(&one.reporter, "IParserRefitter", "refitFromBytes")
        && one.refit(std::slice::from_raw_parts(bytes, size as usize), path_of(path).as_deref())
}

unsafe extern "C" fn refit_from_file(this: That, name: *const c_char) -> bool {
    let one = Object::body(this);
    if !allowed(&one.reporter, "IParserRefitter", "refitFromFile") {
        return false;
    }
    let path = path_of(name).unwrap_or_default();
    // A file that is not there is read as one that is no model: a field that ends early.
    let bytes = std::fs::read(&path).unwrap_or_else(|_| vec![0xFF]);
    one.refit(&bytes, Some(&path))
}

unsafe extern "C" fn nb_errors(this: That) -> i32 {
    Object::body(this).errors.len()
}

unsafe extern "C" fn get_error(this: That, index: i32) -> *mut Object<ParserError> {
    Object::body(this).errors.get(index)
}

unsafe extern "C" fn clear_errors(this: That) {
    Object::body(this).errors.clear();
}
