//! What is to go wrong with a build: the model's `fake_build` (a JSON object in its metadata_props), over it FAKE_TRT_BUILD of the
//! environment, key by key.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use crate::Reporter;

fn model() -> MutexGuard<'static, Value> {
    static MODEL: OnceLock<Mutex<Value>> = OnceLock::new();
    MODEL.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

fn parsed(text: &str, whose: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|why| {
        eprintln!("fake nvinfer: {whose} is not JSON: {why}");
        std::process::abort();
    })
}

fn over(base: &mut Map<String, Value>, more: &Value) {
    for (key, value) in more.as_object().into_iter().flatten() {
        base.insert(key.clone(), value.clone());
    }
}

/// The model parsed last says this; setters that come before a parse know the environment alone.
pub fn of_model(text: Option<&str>) {
    *model() = text.map_or(Value::Null, |text| parsed(text, "fake_build"));
}

/// Everything asked for, that of the level on top.
pub fn settings(level: Option<i32>) -> Value {
    let mut all = Map::new();
    over(&mut all, &model());
    if let Ok(text) = std::env::var("FAKE_TRT_BUILD") {
        over(&mut all, &parsed(&text, "FAKE_TRT_BUILD"));
    }
    let levels = all.remove("levels").unwrap_or_default();
    if let Some(level) = level {
        over(&mut all, &levels[level.to_string()]);
    }
    Value::Object(all)
}

pub fn strings(value: &Value) -> Vec<String> {
    match value {
        Value::String(one) => vec![one.clone()],
        Value::Array(many) => many.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

/// Whether this setter, flag or pool silently does not take.
pub fn ignored(what: &str) -> bool {
    strings(&settings(None)["ignore"]).iter().any(|one| one == what)
}

pub fn log(reporter: &Reporter, lines: &Value) {
    for line in lines.as_array().into_iter().flatten() {
        reporter.log(line[0].as_i64().unwrap_or(2) as i32, line[1].as_str().unwrap_or(""));
    }
}

/// Ends the process, or hangs it, as asked.
pub fn end(how: &str) {
    match how {
        // SAFETY: signals to this process itself.
        "crash" => unsafe {
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            libc::raise(libc::SIGSEGV);
        },
        // SAFETY: as above.
        "kill" => unsafe {
            libc::kill(libc::getpid(), libc::SIGKILL);
        },
        "abort" => std::process::abort(),
        "exit" => std::process::exit(3),
        "hang" => loop {
            std::thread::sleep(Duration::from_secs(3600));
        },
        _ => {}
    }
}

/// Lines, memory, time and the end of a stage, in this order. `beat` is called about every 20 ms with the share of the time gone by, and
/// answers false to cancel; what is returned says whether the stage may go on to succeed.
pub fn perform(settings: &Value, reporter: &Reporter, beat: &mut dyn FnMut(f64) -> bool) -> Result<(), String> {
    log(reporter, &settings["log"]);
    let bytes = settings["memory"].as_u64().unwrap_or(0) as usize;
    let mut eaten = vec![0u8; bytes];
    for page in eaten.chunks_mut(4096) {
        page[0] = 1;
    }
    let seconds = settings["seconds"].as_f64().unwrap_or(0.0);
    let silent = settings["silent"].as_bool().unwrap_or(false);
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < seconds {
        std::thread::sleep(Duration::from_secs_f64(seconds.min(0.02)));
        if !silent && !beat((start.elapsed().as_secs_f64() / seconds).min(1.0)) {
            return Err("Build canceled by user".to_owned());
        }
    }
    std::hint::black_box(&eaten);
    let outcome = settings["outcome"].as_str().unwrap_or("");
    end(outcome);
    if outcome == "null" {
        return Err(String::new());
    }
    Ok(())
}

/// The settings that are about the engine and not about the build: they go into the plan.
pub fn of_plan(settings: &Value) -> Map<String, Value> {
    const KEYS: [&str; 9] = [
        "fail",
        "differ",
        "run",
        "run_log",
        "every",
        "ms",
        "in_capture",
        "load_log",
        "aux_streams",
    ];
    let mut result = Map::new();
    for key in KEYS {
        if !settings[key].is_null() {
            result.insert(key.to_owned(), settings[key].clone());
        }
    }
    if let Some(lines) = result.remove("load_log") {
        result.insert("log".to_owned(), lines);
    }
    result
}

/// `*` stands for anything.
pub fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => {
            name.starts_with(head)
                && (head.len()..=name.len())
                    .filter(|&at| name.is_char_boundary(at))
                    .any(|at| matches(rest, &name[at..]))
        }
    }
}
