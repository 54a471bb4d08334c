//! On files in memory, which can answer what no regular file does. Whole boards: tests/test_thermal.py.

use super::*;
use proptest::prelude::*;
use std::cell::RefCell;
use std::io::{Error, Result};

/// A file's text, or the error that every read of it gives.
type File = std::result::Result<String, ErrorKind>;

#[derive(Default)]
struct Fake {
    files: RefCell<BTreeMap<String, File>>,
    reads: RefCell<Vec<String>>,
}

impl Fake {
    fn set(&self, path: &str, text: &str) {
        self.files.borrow_mut().insert(path.into(), Ok(text.into()));
    }

    fn fail(&self, path: &str, kind: ErrorKind) {
        self.files.borrow_mut().insert(path.into(), Err(kind));
    }

    fn remove(&self, path: &str) {
        self.files.borrow_mut().remove(path);
    }

    fn reads(&self, path: &str) -> usize {
        self.reads.borrow().iter().filter(|read| *read == path).count()
    }
}

impl Files for &Fake {
    fn read(&self, path: &str) -> Result<String> {
        self.reads.borrow_mut().push(path.into());
        match self.files.borrow().get(path) {
            None => Err(ErrorKind::NotFound.into()),
            Some(Ok(text)) => Ok(text.clone()),
            Some(Err(kind)) => Err(Error::from(*kind)),
        }
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let files = self.files.borrow();
        let below = files.keys().filter_map(|path| path.strip_prefix(folder)?.strip_prefix('/'));
        let mut names: Vec<String> = below.filter_map(|rest| Some(rest.split('/').next()?.to_owned())).collect();
        names.dedup();
        names
    }
}

fn zone_at(files: &Fake, number: usize, kind: &str, milli: &str) -> String {
    let at = format!("sys/class/thermal/thermal_zone{number}");
    files.set(&format!("{at}/type"), kind);
    files.set(&format!("{at}/temp"), milli);
    format!("{at}/temp")
}

fn cooler(files: &Fake, number: usize, kind: &str, state: &str) -> String {
    let at = format!("sys/class/thermal/cooling_device{number}");
    files.set(&format!("{at}/type"), kind);
    files.set(&format!("{at}/cur_state"), state);
    format!("{at}/cur_state")
}

fn look(files: &Fake) -> Sample {
    Sampler::on(files).sample()
}

#[test]
fn nothing_there_is_nothing_known_and_nothing_wrong() {
    assert_eq!(look(&Fake::default()), Sample::default());
}

#[test]
fn zones_go_by_what_they_are_called() {
    for (cpu, gpu) in [("CPU-therm", "GPU-therm"), ("cpu-thermal", "gpu-thermal")] {
        let files = Fake::default();
        zone_at(&files, 0, "soc0-thermal", "90000");
        zone_at(&files, 7, gpu, "41250");
        zone_at(&files, 12, cpu, "48062");
        zone_at(&files, 13, "tj-thermal", "95000");
        let sample = look(&files);
        assert_eq!((sample.cpu_temp_c, sample.gpu_temp_c), (Some(48.062), Some(41.25)));
        assert_eq!((&*sample.source["cpu_temp_c"], &*sample.source["gpu_temp_c"]), (cpu, gpu));
        assert!(sample.integrated_gpu && sample.unreadable.is_empty());
    }
}

#[test]
fn a_gated_zone_is_unknown_and_asked_once() {
    let files = Fake::default();
    zone_at(&files, 0, "cpu-thermal", "48062");
    let path = zone_at(&files, 1, "gpu-thermal", "");
    let gated = zone_at(&files, 2, "cv0-thermal", "");
    files.fail(&path, ErrorKind::WouldBlock);
    files.fail(&gated, ErrorKind::WouldBlock);
    let mut sampler = Sampler::on(&files);
    for looks in 1..=5 {
        let sample = sampler.sample();
        assert_eq!((sample.cpu_temp_c, sample.gpu_temp_c), (Some(48.062), None));
        assert_eq!(sample.unreadable, ["gpu-thermal"]);
        assert!(!sample.source.contains_key("gpu_temp_c"));
        assert_eq!(files.reads(&path), looks);
    }
    assert_eq!(files.reads(&gated), 0, "of no use here");
}

#[test]
fn a_zone_that_answered_last_time_is_asked_twice() {
    let files = Fake::default();
    let path = zone_at(&files, 0, "gpu-thermal", "50000");
    let mut sampler = Sampler::on(&files);
    sampler.sample();
    files.fail(&path, ErrorKind::WouldBlock);
    assert_eq!(sampler.sample().gpu_temp_c, None);
    assert_eq!(files.reads(&path), 1 + 2);
    sampler.sample();
    assert_eq!(files.reads(&path), 1 + 2 + 1, "it did not answer last time");
    files.set(&path, "51000");
    assert_eq!(sampler.sample().gpu_temp_c, Some(51.0));
}

/// Answers EAGAIN to every second read, as a busy firmware does.
struct Busy<'a>(&'a Fake, RefCell<bool>);

impl Files for Busy<'_> {
    fn read(&self, path: &str) -> Result<String> {
        if path.ends_with("/temp") && self.1.replace_with(|refused| !*refused) {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.0.read(path)
    }

    fn names(&self, folder: &str) -> Vec<String> {
        self.0.names(folder)
    }
}

#[test]
fn a_passing_refusal_is_met_by_the_second_try() {
    let files = Fake::default();
    zone_at(&files, 0, "gpu-thermal", "50000");
    let mut sampler = Sampler::on(Busy(&files, RefCell::new(false)));
    for _ in 0..4 {
        assert_eq!(sampler.sample().gpu_temp_c, Some(50.0));
    }
}

#[test]
fn no_temperature_that_cannot_be() {
    for text in [
        "-256000",
        "0",
        "-40001",
        "150001",
        "4294711296",
        "N/A",
        "",
        "12.5",
        "99999999999999999999",
        "0x20",
        "nan",
    ] {
        let files = Fake::default();
        zone_at(&files, 0, "gpu-thermal", text);
        let sample = look(&files);
        assert_eq!(sample.gpu_temp_c, None, "{text}");
        assert_eq!(sample.unreadable, ["gpu-thermal"], "{text}");
    }
    let files = Fake::default();
    zone_at(&files, 0, "gpu-thermal", "-12500");
    assert_eq!(look(&files).gpu_temp_c, Some(-12.5), "outdoors in winter");
}

#[test]
fn what_throttles_and_what_does_not() {
    let kinds = [
        ("gpu-throttle-alert", "1", true),
        ("soc345-throttle-alert", "2", true),
        ("CPU-throttle-alert", "1", true),
        ("devfreq-17000000.gpu", "3", true),
        ("cpufreq-cpu12", "1", true),
        ("thermal-cpufreq-0", "1", true),
        ("hot-surface-alert", "1", false),
        ("pwm-fan", "4", false),
        ("Processor", "3", false),
        ("intel_powerclamp", "10", false),
    ];
    for (kind, state, throttles) in kinds {
        let files = Fake::default();
        zone_at(&files, 0, "gpu-thermal", "50000");
        cooler(&files, 0, "cpu-throttle-alert", "0");
        cooler(&files, 10, kind, state);
        let sample = look(&files);
        assert_eq!(sample.throttle_active, Some(throttles), "{kind}");
        assert_eq!(sample.reasons, if throttles { vec![kind] } else { vec![] });
    }
}

#[test]
fn not_throttled_is_said_only_of_what_was_looked_at() {
    let files = Fake::default();
    let state = cooler(&files, 0, "cpufreq-cpu0", "0");
    assert_eq!(look(&files).throttle_active, None, "no GPU among the files");
    zone_at(&files, 0, "gpu-thermal", "50000");
    assert_eq!(look(&files).throttle_active, Some(false));
    for bad in ["", "-1", "on", "100001"] {
        files.set(&state, bad);
        let sample = look(&files);
        assert_eq!(
            (sample.throttle_active, &*sample.unreadable),
            (None, &["cpufreq-cpu0".to_owned()][..]),
            "{bad}"
        );
    }
    files.fail(&state, ErrorKind::PermissionDenied);
    assert_eq!(look(&files).throttle_active, None);
    files.remove(&state);
    assert_eq!(look(&files).throttle_active, None, "vanished while it was looked at");
    let other = cooler(&files, 1, "gpu-throttle-alert", "0");
    assert_eq!(look(&files).throttle_active, None, "the other one may be at work");
    files.set(&other, "1");
    assert_eq!(look(&files).throttle_active, Some(true));
    files.set(&other, "0");
    files.set(&state, "0");
    assert_eq!(look(&files).throttle_active, Some(false));
}

#[test]
fn throttling_of_a_machine_without_gpu_files_still_counts() {
    let files = Fake::default();
    cooler(&files, 0, "cpufreq-cpu0", "5");
    assert_eq!(look(&files).throttle_active, Some(true));
}

#[test]
fn over_current_is_a_count_that_grew() {
    let files = Fake::default();
    let count = "sys/class/hwmon/hwmon3/oc3_event_cnt";
    files.set("sys/class/hwmon/hwmon3/name", "soctherm_oc");
    files.set("sys/class/hwmon/hwmon3/oc1_event_cnt", "0");
    files.set(count, "1");
    let mut sampler = Sampler::on(&files);
    let mut seen = || {
        let s = sampler.sample();
        (s.power_throttle_active, s.over_current_events.get("oc3").copied(), s.reasons)
    };
    let none = Vec::<String>::new;
    assert_eq!(seen(), (None, Some(1), none()), "one event at boot is told, and is no change");
    assert_eq!(seen(), (Some(false), Some(1), none()));
    files.set(count, "4");
    assert_eq!(seen(), (Some(true), Some(4), vec!["soctherm_oc oc3".to_owned()]));
    assert_eq!(seen(), (Some(false), Some(4), none()));
    files.set(count, "0");
    assert_eq!(seen(), (Some(false), Some(0), none()), "set back: the other counter still speaks");
    files.fail(count, ErrorKind::InvalidInput);
    assert_eq!(seen(), (Some(false), None, none()));
    files.set(count, "9");
    assert_eq!(
        seen(),
        (Some(false), Some(9), none()),
        "not known before, so not known to have grown"
    );
    files.set("sys/class/hwmon/hwmon7/name", "soctherm_oc");
    files.remove("sys/class/hwmon/hwmon3/name");
    assert_eq!(seen(), (None, None, none()), "gone");
}

#[test]
fn clocks_in_hertz_and_a_gated_one_is_none() {
    for (name, video) in [
        ("17000000.ga10b", "15480000.vic"),
        ("17000000.gpu", "15480000.vic"),
        ("gpu-gpc-0", "gpu-nvd-0"),
    ] {
        let files = Fake::default();
        let at = format!("sys/class/devfreq/{name}");
        files.set(&format!("sys/class/devfreq/{video}/cur_freq"), "115200000");
        files.set(&format!("{at}/cur_freq"), "1300500000");
        files.set(&format!("{at}/max_freq"), "1575000000");
        let sample = look(&files);
        assert_eq!((sample.gpu_clock_mhz, sample.gpu_clock_max_mhz), (Some(1300), Some(1575)));
        assert_eq!(sample.source["gpu_clock_mhz"], format!("devfreq {name}"));
        assert!(sample.integrated_gpu);
        files.set(&format!("{at}/cur_freq"), "0");
        let sample = look(&files);
        assert_eq!((sample.gpu_clock_mhz, sample.unreadable.len()), (None, 0));
        for bad in ["-1300500000", "4294967295000000", "fast"] {
            files.set(&format!("{at}/cur_freq"), bad);
            let sample = look(&files);
            assert_eq!(
                (sample.gpu_clock_mhz, &*sample.unreadable),
                (None, &[format!("devfreq {name}")][..]),
                "{bad}"
            );
        }
    }
}

#[test]
fn load_in_thousandths_where_there_is_one() {
    let files = Fake::default();
    files.set("sys/class/devfreq/17000000.gpu/cur_freq", "306000000");
    assert_eq!(look(&files).gpu_load, None);
    files.set("sys/devices/platform/gpu.0/load", "0");
    assert_eq!(look(&files).gpu_load, Some(0.0));
    files.set("sys/class/devfreq/17000000.gpu/device/load", "995");
    assert_eq!(look(&files).gpu_load, Some(0.995));
    files.set("sys/class/devfreq/17000000.gpu/device/load", "-5");
    let sample = look(&files);
    assert_eq!(
        (sample.gpu_load, &*sample.unreadable),
        (Some(0.0), &["gpu load".to_owned()][..]),
        "the other path's"
    );
}

#[test]
fn power_by_label() {
    let files = Fake::default();
    let at = "sys/class/hwmon/hwmon5";
    files.set(&format!("{at}/name"), "ina3221");
    for (n, label, mv, ma) in [
        (1, "VDD_IN", "5072", "1136"),
        (2, "NC", "0", "0"),
        (3, "VDD_SOC", "5064", "-40"),
        (4, "VDD_CV", "1", "1"),
    ] {
        files.set(&format!("{at}/in{n}_label"), label);
        files.set(&format!("{at}/in{n}_input"), mv);
        files.set(&format!("{at}/curr{n}_input"), ma);
    }
    files.set(&format!("{at}/in7_label"), "sum of shunt voltages");
    let sample = look(&files);
    assert_eq!(sample.power_w, Some(5072.0 * 1136.0 / 1e6));
    assert_eq!(sample.rails_w.keys().collect::<Vec<_>>(), ["VDD_IN", "VDD_SOC"]);
    assert_eq!(sample.rails_w["VDD_SOC"], 0.0, "slightly below zero");
    files.set(&format!("{at}/curr3_input"), "-4000");
    let sample = look(&files);
    assert_eq!(
        (sample.rails_w.get("VDD_SOC"), &*sample.unreadable),
        (None, &["VDD_SOC".to_owned()][..])
    );
    files.set("sys/class/hwmon/hwmon9/name", "ina238");
    files.set("sys/class/hwmon/hwmon9/power1_input", "36487000");
    let sample = look(&files);
    assert_eq!((sample.power_w, &*sample.source["power_w"]), (Some(36.487), "VIN"));
}

#[test]
fn processors_of_pcs() {
    let files = Fake::default();
    zone_at(&files, 0, "acpitz", "27800");
    assert_eq!(look(&files).cpu_temp_c, None, "of the board, nobody knows where");
    files.set("sys/class/hwmon/hwmon1/name", "k10temp");
    files.set("sys/class/hwmon/hwmon1/temp1_label", "Tctl");
    files.set("sys/class/hwmon/hwmon1/temp1_input", "72000");
    let sample = look(&files);
    assert_eq!((sample.cpu_temp_c, &*sample.source["cpu_temp_c"]), (Some(72.0), "k10temp Tctl"));
    files.set("sys/class/hwmon/hwmon1/temp2_label", "Tdie");
    files.set("sys/class/hwmon/hwmon1/temp2_input", "45000");
    assert_eq!(look(&files).cpu_temp_c, Some(45.0), "Tctl has an offset here");
    files.set("sys/class/hwmon/hwmon1/name", "coretemp");
    files.set("sys/class/hwmon/hwmon1/temp1_label", "Package id 0");
    files.set("sys/class/hwmon/hwmon1/temp2_label", "Core 0");
    assert_eq!(look(&files).cpu_temp_c, Some(72.0));
    zone_at(&files, 1, "x86_pkg_temp", "81000");
    assert_eq!(look(&files).source["cpu_temp_c"], "x86_pkg_temp", "the hotter of two packages");
    let spark = Fake::default();
    spark.set("sys/class/dmi/id/product_name", "NVIDIA_DGX_Spark");
    zone_at(&spark, 0, "acpitz", "44000");
    zone_at(&spark, 1, "acpitz", "46500");
    assert_eq!(look(&spark).cpu_temp_c, Some(46.5));
}

#[test]
fn nothing_that_blocks_is_touched() {
    let files = Fake::default();
    cooler(&files, 0, "gpu-throttle-alert", "0");
    for path in [
        "sys/class/thermal/cooling_device0/thermal_trip_event_block",
        "sys/devices/platform/gpu-throttle-alert/thermal_trip_event_block",
    ] {
        files.set(path, "0");
    }
    look(&files);
    assert!(!files.reads.borrow().iter().any(|path| path.contains("thermal_trip_event")));
}

#[test]
fn memory_clocks() {
    let files = Fake::default();
    files.fail("sys/kernel/debug/bpmp/debug/clk/emc/rate", ErrorKind::PermissionDenied);
    let sample = look(&files);
    assert_eq!((sample.memory_clock_mhz, sample.unreadable.len()), (None, 0), "for root alone");
    files.set("sys/kernel/debug/bpmp/debug/clk/emc/rate", "3199000000");
    assert_eq!(look(&files).memory_clock_mhz, Some(3199));
    files.set("sys/class/devfreq/bwmgr/cur_freq", "4266000000");
    assert_eq!(look(&files).memory_clock_mhz, Some(4266));
}

const PATHS: [&str; 17] = [
    "sys/class/dmi/id/product_name",
    "sys/class/thermal/thermal_zone0/type",
    "sys/class/thermal/thermal_zone0/temp",
    "sys/class/thermal/cooling_device0/type",
    "sys/class/thermal/cooling_device0/cur_state",
    "sys/class/hwmon/hwmon0/name",
    "sys/class/hwmon/hwmon0/in1_label",
    "sys/class/hwmon/hwmon0/in1_input",
    "sys/class/hwmon/hwmon0/curr1_input",
    "sys/class/hwmon/hwmon0/power1_input",
    "sys/class/hwmon/hwmon0/oc1_event_cnt",
    "sys/class/hwmon/hwmon0/temp1_label",
    "sys/class/hwmon/hwmon0/temp1_input",
    "sys/class/devfreq/gpu-gpc-0/cur_freq",
    "sys/class/devfreq/gpu-gpc-0/max_freq",
    "sys/devices/gpu.0/load",
    "sys/class/devfreq/bwmgr/cur_freq",
];

fn content() -> impl Strategy<Value = File> {
    let words = proptest::sample::select(vec![
        "gpu-thermal",
        "cpu-thermal",
        "acpitz",
        "x86_pkg_temp",
        "gpu-throttle-alert",
        "cpufreq-cpu0",
        "ina3221",
        "ina238",
        "soctherm_oc",
        "coretemp",
        "k10temp",
        "Tdie",
        "VDD_IN",
        "NC",
        "NVIDIA_DGX_Spark",
        "-256000",
        "0",
        "N/A",
        "",
    ]);
    let kinds = vec![
        ErrorKind::WouldBlock,
        ErrorKind::PermissionDenied,
        ErrorKind::NotFound,
        ErrorKind::InvalidInput,
    ];
    prop_oneof![
        4 => words.prop_map(|w| Ok(w.to_owned())),
        3 => any::<i64>().prop_map(|n| Ok(n.to_string())),
        3 => (-300_000..300_000_i64).prop_map(|n| Ok(n.to_string())),
        1 => any::<String>().prop_map(Ok),
        2 => proptest::sample::select(kinds).prop_map(Err),
    ]
}

proptest! {
    /// Whatever the files say, no panic and no value that cannot be; every value says where it is from.
    #[test]
    fn garbage(looks in proptest::collection::vec(proptest::collection::vec(content(), PATHS.len()), 1..4)) {
        let files = Fake::default();
        let mut sampler = Sampler::on(&files);
        for contents in looks {
            for (path, content) in PATHS.iter().zip(contents) {
                files.files.borrow_mut().insert((*path).into(), content);
            }
            let s = sampler.sample();
            for t in [s.cpu_temp_c, s.gpu_temp_c].into_iter().flatten() {
                prop_assert!((-40.0..=150.0).contains(&t) && t != 0.0);
            }
            for clock in [s.gpu_clock_mhz, s.gpu_clock_max_mhz, s.memory_clock_mhz].into_iter().flatten() {
                prop_assert!((1..=20_000).contains(&clock));
            }
            prop_assert!(s.gpu_load.is_none_or(|l| (0.0..=1.0).contains(&l)));
            prop_assert!(s.rails_w.values().chain(&s.power_w).all(|w| (0.0..=5000.0).contains(w)));
            prop_assert_eq!(s.throttle_active == Some(true), s.reasons.iter().any(|r| !r.starts_with("soctherm_oc")));
            for (name, known) in [
                ("cpu_temp_c", s.cpu_temp_c.is_some()), ("gpu_temp_c", s.gpu_temp_c.is_some()),
                ("throttle_active", s.throttle_active.is_some()), ("power_throttle_active", s.power_throttle_active.is_some()),
                ("gpu_clock_mhz", s.gpu_clock_mhz.is_some()), ("gpu_clock_max_mhz", s.gpu_clock_max_mhz.is_some()),
                ("memory_clock_mhz", s.memory_clock_mhz.is_some()), ("gpu_load", s.gpu_load.is_some()), ("power_w", s.power_w.is_some()),
            ] {
                prop_assert_eq!(s.source.contains_key(name), known, "{}", name);
            }
        }
    }
}
