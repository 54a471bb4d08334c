//! IOptimizationProfile and ITimingCache.

use std::collections::BTreeMap;
use std::ffi::c_char;
use std::sync::Arc;

use serde_json::{json, Value};

use crate::abi::{optimization_profile as slots, timing_cache as cache_slots, Slot};
use crate::driver::sm;
use crate::network::usage;
use crate::object::{make, of, Class, Destroyed, Object, Public};
use crate::plan::Dims;
use crate::record::version;
use crate::runtime::HostMemory;
use crate::{allowed, text, Reporter};

#[derive(Clone, Default)]
pub struct Entry {
    /// min, opt, max.
    pub dims: [Option<Dims>; 3],
    pub values: [Option<Vec<i64>>; 3],
    /// The same for the getter of 32 bits, whose pointer has to last.
    short: [Option<Arc<[i32]>>; 3],
}

impl Entry {
    fn ordered(&self) -> bool {
        let fits = |low: &[i64], high: &[i64]| low.len() == high.len() && low.iter().zip(high).all(|(a, b)| a <= b);
        let pairs = [(0, 1), (1, 2), (0, 2)];
        pairs.iter().all(|&(a, b)| match (&self.dims[a], &self.dims[b]) {
            (Some(low), Some(high)) => fits(low.shape(), high.shape()),
            _ => true,
        }) && pairs.iter().all(|&(a, b)| match (&self.values[a], &self.values[b]) {
            (Some(low), Some(high)) => fits(low, high),
            _ => true,
        })
    }

    fn complete(&self) -> bool {
        let all = |n: usize| n == 0 || n == 3;
        all(self.dims.iter().flatten().count()) && all(self.values.iter().flatten().count())
    }
}

#[derive(Clone)]
pub struct Profile {
    pub entries: BTreeMap<String, Entry>,
    extra: f32,
    reporter: Reporter,
}

impl Profile {
    pub fn new(reporter: Reporter) -> Profile {
        Profile {
            entries: BTreeMap::new(),
            extra: 1.0,
            reporter,
        }
    }

    pub fn valid(&self) -> bool {
        self.entries.values().all(|entry| entry.ordered() && entry.complete())
    }

    /// Keeps the entry when it fits those already there.
    fn change(&mut self, name: *const c_char, select: i32, method: &str, change: impl FnOnce(&mut Entry, usize)) -> bool {
        // SAFETY: a name as the caller gave it.
        let name = unsafe { text(name) }.to_string_lossy().into_owned();
        if !allowed(&self.reporter, "IOptimizationProfile", method) {
            return false;
        }
        let method = format!("IOptimizationProfile::{method}");
        if !(0..3).contains(&select) {
            usage(
                &self.reporter,
                &method,
                "condition: int(select) >= 0 && int(select) < EnumMax<OptProfileSelector>()",
            );
            return false;
        }
        let mut entry = self.entries.get(&name).cloned().unwrap_or_default();
        change(&mut entry, select as usize);
        if !entry.ordered() {
            usage(&self.reporter, &method, "condition: validate(mThreadResources.getErrorRecorder(), newEntry, true). Specified optimization profiles must satisfy MIN<=OPT<=MAX.");
            return false;
        }
        if crate::faults::ignored("profile") {
            return true;
        }
        self.entries.insert(name, entry);
        true
    }

    unsafe fn entry(&self, name: *const c_char) -> Option<&Entry> {
        self.entries.get(text(name).to_string_lossy().as_ref())
    }
}

impl Class for Profile {
    const NAME: &'static str = "IOptimizationProfile";
    const ROW: usize = 10;
    const DESTROYED: Destroyed = Destroyed::ByOwner;

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (slots::SET_DIMENSIONS, set_dimensions as *const () as usize),
            (slots::GET_DIMENSIONS, dimensions as *const () as usize),
            (slots::SET_SHAPE_VALUES, set_values_32 as *const () as usize),
            (slots::SET_SHAPE_VALUES_V2, set_values as *const () as usize),
            (slots::GET_NB_SHAPE_VALUES, nb_values as *const () as usize),
            (slots::GET_SHAPE_VALUES, values_32 as *const () as usize),
            (slots::GET_SHAPE_VALUES_V2, values as *const () as usize),
            (slots::SET_EXTRA_MEMORY_TARGET, set_extra as *const () as usize),
            (slots::GET_EXTRA_MEMORY_TARGET, extra as *const () as usize),
            (slots::IS_VALID, is_valid as *const () as usize),
        ]
    }
}

type This = *mut Object<Profile>;

unsafe extern "C" fn set_dimensions(this: This, name: *const c_char, select: i32, dims: *const Dims) -> bool {
    let profile = Object::body(this);
    if dims.is_null() || !(0..=8).contains(&(*dims).nb) || (*dims).shape().iter().any(|&d| d < 0) {
        usage(
            &profile.reporter,
            "IOptimizationProfile::setDimensions",
            "condition: std::all_of(dims.d, dims.d + dims.nbDims, [](int64_t x) noexcept { return x >= 0; }).",
        );
        return false;
    }
    let dims = Dims::new((*dims).shape());
    profile.change(name, select, "setDimensions", |entry, k| entry.dims[k] = Some(dims))
}

unsafe extern "C" fn dimensions(this: This, name: *const c_char, select: i32) -> Dims {
    let profile = Object::body(this);
    let k = usize::try_from(select).unwrap_or(3).min(2);
    match profile.entry(name).and_then(|entry| entry.dims[k]) {
        Some(dims) => dims,
        None => {
            profile.reporter.error(&format!("IOptimizationProfile::getDimensions: Error Code 4: Internal Error (Cannot get dimensions for input: {}. Input is not present in this OptimizationProfile)", text(name).to_string_lossy()));
            Dims::BAD
        }
    }
}

unsafe fn put_values(this: This, name: *const c_char, select: i32, values: Vec<i64>, method: &str) -> bool {
    let short: Arc<[i32]> = values.iter().map(|&v| v as i32).collect();
    Object::body(this).change(name, select, method, |entry, k| {
        entry.values[k] = Some(values);
        entry.short[k] = Some(short);
    })
}

unsafe extern "C" fn set_values_32(this: This, name: *const c_char, select: i32, values: *const i32, n: i32) -> bool {
    let values = std::slice::from_raw_parts(values, n.max(0) as usize);
    put_values(this, name, select, values.iter().map(|&v| i64::from(v)).collect(), "setShapeValues")
}

unsafe extern "C" fn set_values(this: This, name: *const c_char, select: i32, values: *const i64, n: i32) -> bool {
    let values = std::slice::from_raw_parts(values, n.max(0) as usize).to_vec();
    put_values(this, name, select, values, "setShapeValuesV2")
}

unsafe extern "C" fn nb_values(this: This, name: *const c_char) -> i32 {
    let entry = Object::body(this).entry(name);
    entry
        .and_then(|entry| entry.values.iter().flatten().next())
        .map_or(-1, |values| values.len() as i32)
}

unsafe extern "C" fn values_32(this: This, name: *const c_char, select: i32) -> *const i32 {
    let k = usize::try_from(select).unwrap_or(3).min(2);
    let entry = Object::body(this).entry(name);
    entry
        .and_then(|entry| entry.short[k].as_ref())
        .map_or(std::ptr::null(), |values| values.as_ptr())
}

unsafe extern "C" fn values(this: This, name: *const c_char, select: i32) -> *const i64 {
    let k = usize::try_from(select).unwrap_or(3).min(2);
    let entry = Object::body(this).entry(name);
    entry
        .and_then(|entry| entry.values[k].as_ref())
        .map_or(std::ptr::null(), |values| values.as_ptr())
}

unsafe extern "C" fn set_extra(this: This, target: f32) -> bool {
    let profile = Object::body(this);
    if !(0.0..=1.0).contains(&target) {
        usage(
            &profile.reporter,
            "IOptimizationProfile::setExtraMemoryTarget",
            "condition: target >= 0.F && target <= 1.F",
        );
        return false;
    }
    profile.extra = target;
    true
}

unsafe extern "C" fn extra(this: This) -> f32 {
    Object::body(this).extra
}

unsafe extern "C" fn is_valid(this: This) -> bool {
    Object::body(this).valid()
}

// ITimingCache -------------------------------------------------------------------------------------------------------

pub struct TimingCache {
    version: String,
    sm: i64,
    pub entries: BTreeMap<String, f64>,
    reporter: Reporter,
}

const MAGIC: &[u8; 4] = b"ftim";

impl TimingCache {
    /// Empty for an empty blob, else what it holds; None when it is no timing cache.
    pub fn read(blob: &[u8], reporter: Reporter) -> Option<TimingCache> {
        let (major, minor, patch, build) = version();
        let mut cache = TimingCache {
            version: format!("{major}.{minor}.{patch}.{build}"),
            sm: sm().unwrap_or(0),
            entries: BTreeMap::new(),
            reporter,
        };
        if blob.is_empty() {
            return Some(cache);
        }
        let content: Value = serde_json::from_slice(blob.strip_prefix(MAGIC)?).ok()?;
        cache.version = content["version"].as_str()?.to_owned();
        cache.sm = content["sm"].as_i64()?;
        for (key, ms) in content["entries"].as_object()? {
            cache.entries.insert(key.clone(), ms.as_f64()?);
        }
        Some(cache)
    }

    /// Why it cannot be used by this library and on this GPU.
    pub fn mismatch(&self, ignore_device: bool) -> Option<String> {
        let (major, minor, patch, build) = version();
        let ours = format!("{major}.{minor}.{patch}.{build}");
        let here = sm().unwrap_or(0);
        if self.version != ours {
            return Some(format!(
                "Timing cache header mismatch: expected version = {ours}, got version = {}. The timing cache will not be used!",
                self.version
            ));
        }
        (self.sm != here && !ignore_device).then(|| {
            format!(
                "Timing cache header mismatch: Runtime device: SM = {here}, Incoming ITimingCache: SM = {}. The incoming cache will not be used!",
                self.sm
            )
        })
    }
}

impl Class for TimingCache {
    const NAME: &'static str = "ITimingCache";
    const ROW: usize = 11;

    fn filled() -> Vec<(Slot, usize)> {
        vec![
            (cache_slots::SERIALIZE, serialize as *const () as usize),
            (cache_slots::COMBINE, combine as *const () as usize),
            (cache_slots::RESET, reset as *const () as usize),
        ]
    }
}

type Cache = *mut Object<TimingCache>;

unsafe extern "C" fn serialize(this: Cache) -> *mut Public {
    let cache = Object::body(this);
    if !allowed(&cache.reporter, "ITimingCache", "serialize") {
        return std::ptr::null_mut();
    }
    let content = json!({"version": cache.version, "sm": cache.sm, "entries": cache.entries}).to_string();
    cache
        .reporter
        .log(4, &format!("Serialized {} timing cache entries.", cache.entries.len()));
    make(HostMemory([MAGIC.as_slice(), content.as_bytes()].concat()))
}

unsafe extern "C" fn combine(this: Cache, other: *mut Public, ignore: bool) -> bool {
    let (cache, other) = (Object::body(this), of::<TimingCache>(other));
    if !allowed(&cache.reporter, "ITimingCache", "combine") {
        return false;
    }
    if other.version != cache.version || (other.sm != cache.sm && !ignore) {
        cache.reporter.log(
            2,
            "Timing cache header mismatch: the two caches are of different versions or devices. The incoming cache will not be used!",
        );
        return false;
    }
    for (key, ms) in &other.entries {
        cache.entries.entry(key.clone()).or_insert(*ms);
    }
    true
}

unsafe extern "C" fn reset(this: Cache) -> bool {
    Object::body(this).entries.clear();
    true
}
