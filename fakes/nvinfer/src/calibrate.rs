//! INT8 without Q/DQ: the calibrator's protocol, and the scales that come of it.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_char, c_void, CString};

use crate::abi::{calibration_algo_type, data_type, int8_entropy_calibrator_2 as slots, layer_type, severity};
use crate::config::Config;
use crate::driver::driver;
use crate::graph::{Array, Graph};
use crate::network::{Network, Tensor};
use crate::object::user_method;
use crate::plan::{width, Dims};
use crate::program::get;
use crate::record::{mistake, version};
use crate::Reporter;

pub type Scales = BTreeMap<String, f32>;

const FAILURE: &str = "Calibration failure occurred with no scaling factors detected. This could be due to no int8 calibrator or insufficient custom scales for network layers. Please see int8 sample to setup calibration correctly.";

fn name(tensor: &Tensor) -> String {
    tensor.name.to_string_lossy().into_owned()
}

/// Tensors that int8 needs a scale for.
fn wanted<'a>(network: &Network) -> Vec<&'a mut Tensor> {
    let mut all = network.tensors(&network.inputs);
    for layer in network.all_layers().iter().filter(|layer| layer.kind != layer_type::CONSTANT) {
        all.extend(network.tensors(&layer.outputs));
    }
    all.retain(|tensor| matches!(tensor.dtype, data_type::FLOAT | data_type::HALF | data_type::BF16));
    all
}

struct Calibrator(usize);

impl Calibrator {
    /// # Safety
    /// The type is that of the slot.
    unsafe fn method<F: Copy>(&self, slot: crate::abi::Slot) -> Option<F> {
        user_method(self.0 as *mut u8, slot).map(|method| std::mem::transmute_copy(&method))
    }

    fn algorithm(&self) -> Option<&'static str> {
        // SAFETY: a calibrator of the caller, whose getAlgorithm is in this slot for every kind.
        let algorithm = unsafe { self.method::<unsafe extern "C" fn(*mut u8) -> i32>(slots::GET_ALGORITHM)?(self.0 as *mut u8) };
        Some(match algorithm {
            calibration_algo_type::ENTROPY_CALIBRATION => "EntropyCalibration",
            calibration_algo_type::ENTROPY_CALIBRATION_2 => "EntropyCalibration2",
            calibration_algo_type::MINMAX_CALIBRATION => "MinMaxCalibration",
            _ => "LegacyCalibration",
        })
    }

    fn cache(&self) -> Option<Vec<u8>> {
        let mut size = 0u64;
        // SAFETY: the caller's method; what it returns is readable for that many bytes.
        unsafe {
            let method: unsafe extern "C" fn(*mut u8, *mut u64) -> *const u8 = self.method(slots::READ_CALIBRATION_CACHE)?;
            let at = method(self.0 as *mut u8, &mut size);
            (!at.is_null() && size > 0).then(|| std::slice::from_raw_parts(at, size as usize).to_vec())
        }
    }
}

fn read_cache(bytes: &[u8], header: &str, algorithm: &str, reporter: &Reporter) -> Option<Scales> {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.lines();
    let first = lines.next().unwrap_or("");
    if first != header {
        let same_algorithm = first.rsplit('-').next() == Some(algorithm);
        reporter.log(
            severity::WARNING,
            if same_algorithm {
                "Calibration table does not match."
            } else {
                "Calibration table does not match calibrator algorithm type."
            },
        );
        return None;
    }
    let mut scales = Scales::new();
    for line in lines.filter(|line| !line.is_empty()) {
        let parsed = line
            .rsplit_once(": ")
            .and_then(|(name, hex)| Some((name, u32::from_str_radix(hex, 16).ok()?)));
        let Some((name, bits)) = parsed else {
            reporter.error(&format!(
                "Could not parse the following line from the calibration cache: \"{line}\""
            ));
            return None;
        };
        scales.insert(name.to_owned(), f32::from_bits(bits));
    }
    Some(scales)
}

/// What a batch holds, once the caller's pointers have been looked at.
fn read_batch(inputs: &[(CString, i32, Dims)], bindings: &[u64]) -> Result<HashMap<String, Array>, String> {
    let driver = driver()?;
    let device = driver.attach()?;
    let mut batch = HashMap::new();
    for ((name, dtype, dims), &address) in inputs.iter().zip(bindings) {
        let shown = name.to_string_lossy();
        let size = dims.volume() * width(*dtype);
        if address == 0 || !driver.may_touch(address, size, device, name) {
            return Err(format!(
                "Error Code 1: Cuda Runtime (the calibrator's binding for {shown} is not {size} bytes of device memory)"
            ));
        }
        // SAFETY: the stand-in's device memory, which the check above found to be that large.
        let (bytes, values) = unsafe {
            (
                std::slice::from_raw_parts(address as *const u8, size),
                (0..dims.volume()).map(|k| get(address, *dtype, k)).collect(),
            )
        };
        if size >= 16 && bytes.iter().all(|&byte| byte == 0xCD) {
            mistake(&format!(
                "getBatch returned before the data of {shown} had arrived in device memory"
            ));
        }
        let dims = dims.shape().iter().map(|&d| d as usize).collect();
        batch.insert(shown.into_owned(), Array { dims, values });
    }
    Ok(batch)
}

/// Runs all batches; the largest absolute value of each tensor.
fn measure(
    calibrator: &Calibrator,
    network: &Network,
    config: &Config,
    graph: Option<&Graph>,
    reporter: &Reporter,
) -> Result<BTreeMap<String, f64>, String> {
    let profile = config.calibration_profile.as_ref().or_else(|| {
        if !config.profiles.is_empty() {
            reporter.log(severity::WARNING, "Calibration Profile is not defined. Calibrating with Profile 0");
        }
        config.profiles.first()
    });
    let mut inputs = Vec::new();
    for tensor in network.tensors(&network.inputs).iter().filter(|tensor| !tensor.shape_tensor) {
        let given = profile.and_then(|profile| profile.entries.get(&name(tensor))?.dims[1]);
        let dims = given.unwrap_or(tensor.dims);
        if !dims.known() {
            return Err(format!(
                "Error Code 4: API Usage Error ({}: dynamic input is missing dimensions in the calibration profile.)",
                name(tensor)
            ));
        }
        inputs.push((tensor.name.clone(), tensor.dtype, dims));
    }
    // SAFETY: the caller's methods, by their slots.
    let (batch_size, get_batch) = unsafe {
        (
            calibrator.method::<unsafe extern "C" fn(*mut u8) -> i32>(slots::GET_BATCH_SIZE),
            calibrator.method::<unsafe extern "C" fn(*mut u8, *mut u64, *const *const c_char, i32) -> bool>(slots::GET_BATCH),
        )
    };
    let (Some(batch_size), Some(get_batch)) = (batch_size, get_batch) else {
        return Err(FAILURE.to_owned());
    };
    let this = calibrator.0 as *mut u8;
    // SAFETY: as above.
    unsafe { batch_size(this) };
    let names: Vec<*const c_char> = inputs.iter().map(|(name, ..)| name.as_ptr()).collect();
    let mut largest: BTreeMap<String, f64> = BTreeMap::new();
    reporter.log(severity::INFO, "Starting Calibration.");
    for number in 0.. {
        let mut bindings = vec![0u64; inputs.len()];
        // SAFETY: as above; the arrays live through the call.
        if !unsafe { get_batch(this, bindings.as_mut_ptr(), names.as_ptr(), inputs.len() as i32) } {
            break;
        }
        let batch = read_batch(&inputs, &bindings)?;
        let values = graph.and_then(|graph| graph.run(&batch, &graph.weights).ok());
        let all = values.unwrap_or_else(|| {
            // Nothing to compute with: every tensor is taken to be as large as the first input.
            let first = inputs.first().map(|(name, ..)| name.to_string_lossy().into_owned());
            let like = first.and_then(|name| batch.get(&name).cloned()).unwrap_or_default();
            let rest = wanted(network)
                .iter()
                .map(|tensor| (name(tensor), like.clone()))
                .collect::<HashMap<_, _>>();
            rest.into_iter().chain(batch).collect()
        });
        for (name, array) in &all {
            let most = array.values.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            let old = largest.entry(name.clone()).or_insert(0.0);
            *old = old.max(most);
        }
        reporter.log(severity::INFO, &format!("  Calibrated batch {number} in 0.001 seconds."));
    }
    Ok(largest)
}

/// The scale of each tensor; the error is the line to log.
pub fn scales(network: &Network, config: &Config, graph: Option<&Graph>, reporter: &Reporter) -> Result<Scales, String> {
    let tensors = wanted(network);
    let mut scales: Scales = tensors
        .iter()
        .filter_map(|tensor| tensor.range.map(|(low, high)| (name(tensor), low.abs().max(high.abs()) / 127.0)))
        .collect();
    if config.calibrator == 0 {
        reporter.log(
            severity::WARNING,
            "Calibrator is not being used. Users must provide dynamic range for all tensors that are not Int32 or Bool.",
        );
        if scales.is_empty() {
            return Err(FAILURE.to_owned());
        }
    } else {
        let calibrator = Calibrator(config.calibrator);
        let algorithm = calibrator.algorithm().unwrap_or("LegacyCalibration");
        let (major, minor, patch, _) = version();
        let header = format!("TRT-{}-{algorithm}", major * 10000 + minor * 100 + patch);
        reporter.log(severity::INFO, &format!("Reading Calibration Cache for calibrator: {algorithm}"));
        let cached = calibrator
            .cache()
            .and_then(|bytes| read_cache(&bytes, &header, algorithm, reporter));
        if let Some(cached) = cached {
            reporter.log(
                severity::INFO,
                "Generated calibration scales using calibration cache. Make sure that calibration cache has latest scales.",
            );
            reporter.log(
                severity::INFO,
                "To regenerate calibration cache, please delete the existing one. TensorRT will generate a new calibration cache.",
            );
            scales.extend(cached);
        } else {
            let largest = measure(&calibrator, network, config, graph, reporter)?;
            if largest.is_empty() {
                return Err(FAILURE.to_owned());
            }
            // Entropy calibration cuts outliers off.
            let share = if algorithm.starts_with("Entropy") { 0.95 } else { 1.0 };
            let mut text = format!("{header}\n");
            for tensor in &tensors {
                let name = name(tensor);
                let Some(&most) = largest.get(&name) else { continue };
                if most == 0.0 {
                    reporter.log(severity::WARNING, &format!("Tensor {name} is uniformly zero."));
                }
                let scale = (most * share / 127.0) as f32;
                text += &format!("{name}: {:08x}\n", scale.to_bits());
                scales.insert(name, scale);
            }
            reporter.log(severity::INFO, "  Post Processing Calibration data in 0.001 seconds.");
            reporter.log(severity::INFO, "Calibration completed in 0.01 seconds.");
            reporter.log(severity::INFO, &format!("Writing Calibration Cache for calibrator: {header}"));
            // SAFETY: the caller's method; the text lives through the call.
            unsafe {
                if let Some(write) = calibrator.method::<unsafe extern "C" fn(*mut u8, *const c_void, u64)>(slots::WRITE_CALIBRATION_CACHE)
                {
                    write(calibrator.0 as *mut u8, text.as_ptr().cast(), text.len() as u64);
                }
            }
        }
    }
    for tensor in tensors.iter().filter(|tensor| !scales.contains_key(&name(tensor))) {
        reporter.log(severity::WARNING, &format!("Missing scale and zero-point for tensor {}, expect fall back to non-int8 implementation for any layer consuming or producing given tensor", name(tensor)));
    }
    Ok(scales)
}
