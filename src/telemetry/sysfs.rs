//! One look at the files in which Linux and NVIDIA's kernels keep temperatures, clocks, power and throttling.
//!
//! Nothing is found by number: zones, cooling devices and monitors are numbered in the order in which drivers came up. Each look finds
//! them again, so that what appears, vanishes or moves is met as it is. What does not answer, or answers with something that cannot be,
//! is unknown. Sensors that nothing here uses are not asked: a power-gated one costs a call to another processor and fails.

use super::files::{Files, Root};
use std::collections::{BTreeMap, HashSet};
use std::io::ErrorKind;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

const ZONES: &str = "sys/class/thermal";
const MONITORS: &str = "sys/class/hwmon";
const DEVFREQ: &str = "sys/class/devfreq";

/// Thousandths of a degree that a chip can have. Firmware says -256 °C, and drivers 0, for a sensor that is switched off.
const MILLIDEGREES: RangeInclusive<i64> = -40_000..=150_000;
const HERTZ: RangeInclusive<i64> = 1_000_000..=20_000_000_000;
/// Before the one repetition of a read that a busy firmware refused.
const PAUSE: Duration = Duration::from_millis(1);

/// What one look found; `None` is unknown.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sample {
    pub cpu_temp_c: Option<f64>,
    pub gpu_temp_c: Option<f64>,
    /// Whether heat slows anything down. "No" is said only of a machine whose GPU these files describe.
    pub throttle_active: Option<bool>,
    /// Whether an over-current event was counted since the last look.
    pub power_throttle_active: Option<bool>,
    /// Names of the cooling devices and counters that are why.
    pub reasons: Vec<String>,
    pub gpu_clock_mhz: Option<u32>,
    pub gpu_clock_max_mhz: Option<u32>,
    pub memory_clock_mhz: Option<u32>,
    /// 0 to 1.
    pub gpu_load: Option<f64>,
    /// Of the whole module, where it is measured.
    pub power_w: Option<f64>,
    pub rails_w: BTreeMap<String, f64>,
    /// Events since boot: one of them can still hold clocks down.
    pub over_current_events: BTreeMap<String, u64>,
    /// Where each value is from.
    pub source: BTreeMap<&'static str, String>,
    /// What is there and cannot be read.
    pub unreadable: Vec<String>,
    /// Whether there is a GPU among the files, as on Jetson.
    pub integrated_gpu: bool,
}

/// Looks, and remembers what the next look needs.
pub struct Sampler<F = Root> {
    files: F,
    /// Sensors that answered last time. Only these are asked twice: one that is power-gated fails however often it is asked.
    answered: HashSet<String>,
    events: BTreeMap<String, u64>,
}

impl Sampler<Root> {
    pub fn new(root: impl Into<PathBuf>) -> Sampler<Root> {
        Sampler::on(Root::new(root))
    }
}

impl<F: Files> Sampler<F> {
    pub fn on(files: F) -> Sampler<F> {
        Sampler {
            files,
            answered: HashSet::new(),
            events: BTreeMap::new(),
        }
    }

    pub fn sample(&mut self) -> Sample {
        let mut look = Look {
            files: &self.files,
            answered_before: std::mem::take(&mut self.answered),
            answered: HashSet::new(),
            out: Sample::default(),
        };
        look.zones();
        look.monitors(&self.events);
        look.gpu();
        look.memory_clock();
        look.cooling();
        self.answered = look.answered;
        self.events.clone_from(&look.out.over_current_events);
        look.out
    }
}

/// A thermal zone or sensor that is of use here.
enum Zone {
    Cpu,
    Gpu,
    /// The firmware's own, of which only some boards are known to mean the processor.
    Acpi,
}

/// By the name's content: `CPU-therm` of JetPack 5, `cpu-thermal` since.
fn zone(kind: &str) -> Option<Zone> {
    match kind.split(['-', '_']).next() {
        Some("cpu") => Some(Zone::Cpu),
        Some("gpu") => Some(Zone::Gpu),
        Some("acpitz") => Some(Zone::Acpi),
        _ if kind == "x86_pkg_temp" => Some(Zone::Cpu),
        _ => None,
    }
}

/// Whether a cooling device that is at work means lower clocks. `hot-surface-alert` warns of touching the case, `pwm-fan` is a fan.
fn slows_down(kind: &str) -> bool {
    // Kernels before 5.12 put "thermal-" in front.
    let kind = kind.strip_prefix("thermal-").unwrap_or(kind);
    kind.ends_with("-throttle-alert") || kind.starts_with("devfreq-") || kind.starts_with("cpufreq-")
}

/// `17000000.ga10b` of JetPack 5, `17000000.gpu` of 6 and 7, `gpu-gpc-0` of Thor; not `gpu-nvd-0`, Thor's video engines.
fn is_gpu(devfreq: &str) -> bool {
    devfreq.starts_with("gpu-gpc-") || [".gpu", ".ga10b", ".gv11b", ".gp10b"].iter().any(|end| devfreq.ends_with(end))
}

fn mhz(hertz: i64) -> Option<u32> {
    u32::try_from(hertz / 1_000_000).ok()
}

struct Look<'a, F> {
    files: &'a F,
    answered_before: HashSet<String>,
    answered: HashSet<String>,
    out: Sample,
}

impl<F: Files> Look<'_, F> {
    fn names(&self, folder: &str, prefix: &str) -> Vec<String> {
        let mut names = self.files.names(folder);
        names.retain(|name| name.starts_with(prefix));
        names
    }

    fn unreadable(&mut self, what: &str) {
        if !self.out.unreadable.iter().any(|known| known == what) {
            self.out.unreadable.push(what.to_owned());
        }
    }

    /// A whole number within bounds. `what` is noted when the file is there and says nothing of use.
    fn number(&mut self, path: &str, what: &str, bounds: RangeInclusive<i64>) -> Option<i64> {
        let found = match self.files.read(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return None,
            found => found.ok().and_then(|text| text.parse().ok()).filter(|n| bounds.contains(n)),
        };
        if found.is_none() {
            self.unreadable(what);
        }
        found
    }

    fn temperature(&mut self, path: &str, what: &str) -> Option<f64> {
        let mut text = self.files.read(path);
        if self.answered_before.contains(path) && matches!(&text, Err(e) if e.kind() == ErrorKind::WouldBlock) {
            thread::sleep(PAUSE);
            text = self.files.read(path);
        }
        let degrees = text
            .ok()
            .and_then(|text| text.parse::<i64>().ok())
            .filter(|n| MILLIDEGREES.contains(n) && *n != 0);
        match degrees {
            Some(n) => {
                self.answered.insert(path.to_owned());
                Some(n as f64 / 1000.0)
            }
            None => {
                self.unreadable(what);
                None
            }
        }
    }

    /// The higher of two: a machine may have a zone for each processor.
    fn cpu_temperature(&mut self, found: Option<f64>, from: String) {
        if found.is_some() && found > self.out.cpu_temp_c {
            self.out.cpu_temp_c = found;
            self.out.source.insert("cpu_temp_c", from);
        }
    }

    fn zones(&mut self) {
        let spark = self
            .files
            .read("sys/class/dmi/id/product_name")
            .is_ok_and(|name| name.contains("DGX_Spark"));
        for folder in self.names(ZONES, "thermal_zone") {
            let Ok(name) = self.files.read(&format!("{ZONES}/{folder}/type")) else {
                continue;
            };
            let kind = name.to_lowercase();
            let path = format!("{ZONES}/{folder}/temp");
            match zone(&kind) {
                Some(Zone::Gpu) => {
                    self.out.integrated_gpu = true;
                    let found = self.temperature(&path, &name);
                    if found.is_some() && found > self.out.gpu_temp_c {
                        self.out.gpu_temp_c = found;
                        self.out.source.insert("gpu_temp_c", name);
                    }
                }
                Some(Zone::Acpi) if !spark => {}
                Some(Zone::Cpu | Zone::Acpi) => {
                    let found = self.temperature(&path, &name);
                    self.cpu_temperature(found, name);
                }
                None => {}
            }
        }
    }

    fn cooling(&mut self) {
        let mut active = Vec::new();
        let (mut readable, mut mute) = (false, false);
        for folder in self.names(ZONES, "cooling_device") {
            let Ok(name) = self.files.read(&format!("{ZONES}/{folder}/type")) else {
                continue;
            };
            if !slows_down(&name.to_lowercase()) {
                continue;
            }
            match self.number(&format!("{ZONES}/{folder}/cur_state"), &name, 0..=100_000) {
                Some(0) => readable = true,
                Some(_) => active.push(name),
                None => mute = true,
            }
        }
        active.sort();
        active.dedup();
        // One that does not answer may be the one that is at work.
        if !active.is_empty() || (readable && !mute && self.out.integrated_gpu) {
            self.out.throttle_active = Some(!active.is_empty());
            self.out.source.insert("throttle_active", "cooling devices".into());
        }
        self.out.reasons.append(&mut active);
    }

    fn monitors(&mut self, before: &BTreeMap<String, u64>) {
        for folder in self.files.names(MONITORS) {
            let at = format!("{MONITORS}/{folder}");
            match self.files.read(&format!("{at}/name")).as_deref() {
                Ok("soctherm_oc") => self.over_current(&at, before),
                Ok("ina3221") => self.rails(&at),
                Ok("ina238") => self.total(&at),
                Ok(name @ ("coretemp" | "k10temp")) => self.package(&at, name),
                _ => {}
            }
        }
    }

    fn over_current(&mut self, at: &str, before: &BTreeMap<String, u64>) {
        for n in 1..=3 {
            let name = format!("oc{n}");
            let Some(count) = self.number(&format!("{at}/{name}_event_cnt"), &format!("soctherm_oc {name}"), 0..=i64::MAX) else {
                continue;
            };
            let count = count as u64;
            // A count that fell was set back, and says nothing about the time between.
            if let Some(last) = before.get(&name).filter(|last| **last <= count) {
                let active = count > *last;
                if active {
                    self.out.reasons.push(format!("soctherm_oc {name}"));
                }
                self.out.power_throttle_active = Some(active || self.out.power_throttle_active == Some(true));
                self.out.source.insert("power_throttle_active", "soctherm_oc".into());
            }
            self.out.over_current_events.insert(name, count);
        }
    }

    fn rail(&mut self, label: &str, watts: f64) {
        // A gated rail reads slightly below zero.
        if !(-1.0..=5000.0).contains(&watts) {
            return self.unreadable(label);
        }
        let watts = watts.max(0.0);
        if matches!(label, "VDD_IN" | "VIN") {
            self.out.power_w = Some(watts);
            self.out.source.insert("power_w", label.to_owned());
        }
        self.out.rails_w.insert(label.to_owned(), watts);
    }

    fn rails(&mut self, at: &str) {
        // Beyond 3 come shunt voltages.
        for n in 1..=3 {
            let Ok(label) = self.files.read(&format!("{at}/in{n}_label")) else {
                continue;
            };
            if label == "NC" || label == "sum of shunt voltages" {
                continue;
            }
            let millivolts = self.number(&format!("{at}/in{n}_input"), &label, 0..=100_000);
            let milliamperes = self.number(&format!("{at}/curr{n}_input"), &label, -100_000..=1_000_000);
            if let (Some(mv), Some(ma)) = (millivolts, milliamperes) {
                self.rail(&label, (mv * ma) as f64 / 1e6);
            }
        }
    }

    /// Thor's input, which is measured by a monitor of its own that has no label.
    fn total(&mut self, at: &str) {
        if let Some(microwatts) = self.number(&format!("{at}/power1_input"), "VIN", 0..=5_000_000_000) {
            return self.rail("VIN", microwatts as f64 / 1e6);
        }
        let millivolts = self.number(&format!("{at}/in1_input"), "VIN", 0..=100_000);
        let milliamperes = self.number(&format!("{at}/curr1_input"), "VIN", -100_000..=1_000_000);
        if let (Some(mv), Some(ma)) = (millivolts, milliamperes) {
            self.rail("VIN", (mv * ma) as f64 / 1e6);
        }
    }

    /// Of Intel's and AMD's processors.
    fn package(&mut self, at: &str, name: &str) {
        let mut labels = self.names(at, "temp");
        labels.retain(|file| file.ends_with("_label"));
        let labelled: Vec<(String, String)> = labels
            .into_iter()
            .filter_map(|file| Some((self.files.read(&format!("{at}/{file}")).ok()?, file.replace("_label", "_input"))))
            .collect();
        // Tctl carries an offset on some of AMD's, which Tdie does not.
        let tdie = labelled.iter().any(|(label, _)| label == "Tdie");
        for (label, file) in labelled {
            if label.starts_with("Package id") || label == "Tdie" || (label == "Tctl" && !tdie) {
                let from = format!("{name} {label}");
                let found = self.temperature(&format!("{at}/{file}"), &from);
                self.cpu_temperature(found, from);
            }
        }
    }

    fn clock(&mut self, path: &str, what: &str) -> Option<u32> {
        // A gated clock reads 0, which is no clock.
        let hertz = self.number(path, what, 0..=*HERTZ.end())?;
        HERTZ.contains(&hertz).then(|| mhz(hertz)).flatten()
    }

    fn gpu(&mut self) {
        let Some(name) = self.files.names(DEVFREQ).into_iter().find(|name| is_gpu(name)) else {
            return;
        };
        self.out.integrated_gpu = true;
        let at = format!("{DEVFREQ}/{name}");
        let from = format!("devfreq {name}");
        self.out.gpu_clock_mhz = self.clock(&format!("{at}/cur_freq"), &from);
        self.out.gpu_clock_max_mhz = self.clock(&format!("{at}/max_freq"), &from);
        // Of the device behind it, and under the names that older releases gave that. Thor has none.
        for path in [
            format!("{at}/device/load"),
            "sys/devices/platform/gpu.0/load".into(),
            "sys/devices/gpu.0/load".into(),
        ] {
            if let Some(thousandths) = self.number(&path, "gpu load", 0..=1000) {
                self.out.gpu_load = Some(thousandths as f64 / 1000.0);
                self.out.source.insert("gpu_load", from.clone());
                break;
            }
        }
        if self.out.gpu_clock_mhz.is_some() {
            self.out.source.insert("gpu_clock_mhz", from.clone());
        }
        if self.out.gpu_clock_max_mhz.is_some() {
            self.out.source.insert("gpu_clock_max_mhz", from);
        }
    }

    fn memory_clock(&mut self) {
        if let Some(found) = self.clock(&format!("{DEVFREQ}/bwmgr/cur_freq"), "devfreq bwmgr") {
            self.out.memory_clock_mhz = Some(found);
            self.out.source.insert("memory_clock_mhz", "devfreq bwmgr".into());
            return;
        }
        // Orin's is for root alone, and nothing to complain of otherwise.
        let hertz = self.files.read("sys/kernel/debug/bpmp/debug/clk/emc/rate");
        if let Some(hertz) = hertz.ok().and_then(|text| text.parse().ok()).filter(|n| HERTZ.contains(n)) {
            self.out.memory_clock_mhz = mhz(hertz);
            self.out.source.insert("memory_clock_mhz", "emc".into());
        }
    }
}

#[cfg(test)]
mod tests;
