//! Finding, opening and dating `libnvinfer`.

use super::abi::Slot;
use super::logger::Logger;
use super::object::{Handle, Object};
use super::plan::PlanVersion;
use crate::error::{Error, Kind, Result};
use libloading::os::unix::{Library as Dl, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{c_char, c_void, CStr, CString};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
    pub build: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)?;
        if self.build != 0 {
            write!(f, ".{}", self.build)?;
        }
        Ok(())
    }
}

impl Version {
    /// From `getInferLibVersion`: major*1000+minor*100+patch up to 9.x, major*10000+minor*100+patch from 10.0 (abi facts §5).
    pub fn from_number(v: i32) -> Version {
        let v = v.max(0) as u32;
        let scale = if v < 10_000 { 1_000 } else { 10_000 };
        Version {
            major: v / scale,
            minor: v % scale / 100,
            patch: v % 100,
            build: 0,
        }
    }

    /// Slot tables exist for 10.x and 11.x; within a major, tables only grow at the end.
    pub fn is_supported(&self) -> bool {
        matches!(self.major, 10 | 11)
    }
}

const SUPPORTED: &str = "TensorRT 10.0 to 10.16 and 11.x";
const JETPACKS: &str =
    "JetPack 6.1 and 6.2 have 10.3, JetPack 7.0 and 7.1 have 10.13, JetPack 7.2 has 10.16; JetPack 6.0 has 8.6, JetPack 5 has 8.5";

/// `libnvinfer`, opened for the life of the process.
pub struct Library {
    /// Never closed, not even when the version is refused: unloading what has run its initialisers is not safe.
    dl: ManuallyDrop<Dl>,
    pub path: PathBuf,
    /// Which step of the search found it.
    pub found_by: &'static str,
    pub version: Version,
    logger: OnceLock<Logger>,
    plugins: Mutex<Vec<PathBuf>>,
}

static LIBRARY: OnceLock<Library> = OnceLock::new();

/// The library, opened at the first call. A failure is not remembered. `extra` are folders to search (the `tensorrt_libs`
/// folders of pip packages); `plan` is the version a plan asks for, so that its major is tried first.
pub fn library(extra: &[PathBuf], plan: Option<PlanVersion>) -> Result<&'static Library> {
    if let Some(l) = LIBRARY.get() {
        return Ok(l);
    }
    let opened = open(extra, plan)?;
    Ok(LIBRARY.get_or_init(|| opened))
}

/// The library, if one was opened.
pub fn opened() -> Option<&'static Library> {
    LIBRARY.get()
}

const FOLDERS: [&str; 9] = [
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu/nvidia",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/local/tensorrt/lib",
    "/usr/local/TensorRT/lib",
    "/opt/tensorrt/lib",
    "/usr/local/cuda/lib64",
];

/// The majors to look for, the plan's own first; the last three only to say by name that they are not supported.
fn majors(plan: Option<PlanVersion>) -> Vec<u32> {
    let mut m = vec![10, 11, 12, 9, 8];
    if let Some(p) = plan {
        m.sort_by_key(|&x| x != u32::from(p.major));
    }
    m
}

/// `libnvinfer.so.N` and longer names of it in a folder.
fn in_folder(folder: &Path, majors: &[u32]) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for m in majors {
        let exact = format!("libnvinfer.so.{m}");
        if folder.join(&exact).exists() {
            out.push(folder.join(&exact));
            continue;
        }
        let mut longer: Vec<PathBuf> = std::fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .filter(|p| {
                p.file_name()
                    .and_then(|n| n.to_str())
                    .is_some_and(|n| n.starts_with(&format!("{exact}.")))
            })
            .collect();
        longer.sort();
        out.extend(longer.pop());
    }
    out
}

/// A library that the process has already: loading a second copy would give two TensorRTs that do not know each other.
fn loaded_already() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|l| l.split_once('/').map(|(_, p)| PathBuf::from(format!("/{p}"))))
        .find(|p| {
            let name = p.file_name().and_then(|n| n.to_str()).unwrap_or("");
            name == "libnvinfer.so" || name.starts_with("libnvinfer.so.")
        })
}

#[cold]
fn open(extra: &[PathBuf], plan: Option<PlanVersion>) -> Result<Library> {
    let majors = majors(plan);
    let mut tried: Vec<String> = Vec::new();
    if let Some(path) = std::env::var_os("JETRT_TENSORRT_PATH").filter(|p| !p.is_empty()) {
        // Said explicitly: this and nothing else.
        let path = PathBuf::from(path);
        let candidates = if path.is_dir() {
            in_folder(&path, &majors)
        } else {
            vec![path.clone()]
        };
        for c in &candidates {
            match try_open(c, "JETRT_TENSORRT_PATH") {
                Ok(l) => return checked(l),
                Err(e) => tried.push(e),
            }
        }
        if candidates.is_empty() {
            tried.push(format!(
                "{}: no libnvinfer.so.10 or libnvinfer.so.11 in this folder",
                path.display()
            ));
        }
        return Err(not_found(
            tried,
            "JETRT_TENSORRT_PATH is set, so nothing else was searched: correct it or unset it.",
        ));
    }
    let mut steps: Vec<(PathBuf, &'static str)> = Vec::new();
    steps.extend(loaded_already().map(|p| (p, "loaded already")));
    for folder in extra {
        steps.extend(in_folder(folder, &majors).into_iter().map(|p| (p, "pip package")));
    }
    steps.extend(
        majors
            .iter()
            .map(|m| (PathBuf::from(format!("libnvinfer.so.{m}")), "system loader")),
    );
    for folder in FOLDERS {
        steps.extend(in_folder(Path::new(folder), &majors).into_iter().map(|p| (p, "system folder")));
    }
    let mut unsupported = None;
    for (path, how) in steps {
        match try_open(&path, how) {
            Ok(l) if l.version.is_supported() || how == "loaded already" => return checked(l),
            Ok(l) => {
                unsupported.get_or_insert(l);
            }
            Err(e) => tried.push(e),
        }
    }
    match unsupported {
        Some(l) => checked(l),
        None => Err(not_found(
            tried,
            "Install TensorRT (on JetPack: apt install nvidia-jetpack or libnvinfer10; elsewhere: pip install tensorrt-cu12-libs) or set JETRT_TENSORRT_PATH to its folder.",
        )),
    }
}

fn not_found(tried: Vec<String>, next: &str) -> Error {
    Error::new(
        Kind::LibraryNotFound,
        format!("libnvinfer (TensorRT) cannot be opened; tried:\n  {}\n{next}", tried.join("\n  ")),
    )
    .with("library", "libnvinfer.so.10")
    .with("searched", tried)
}

fn checked(l: Library) -> Result<Library> {
    if l.version.is_supported() {
        return Ok(l);
    }
    Err(Error::new(
        Kind::UnsupportedVersion,
        format!(
            "{}: this is TensorRT {}; jetrt runs {SUPPORTED} ({JETPACKS}). Install a supported TensorRT or set JETRT_TENSORRT_PATH to one.",
            l.path.display(),
            l.version
        ),
    )
    .with("library", l.path.display().to_string())
    .with("found", l.version.to_string())
    .with("supported", SUPPORTED))
}

fn try_open(path: &Path, found_by: &'static str) -> Result<Library, String> {
    // SAFETY: running TensorRT's initialisers is the purpose.
    let dl = unsafe { Dl::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| format!("{} ({found_by}): {e}", path.display()))?;
    // SAFETY: the symbol, where it exists, is `int32_t ()` in every version.
    let number = unsafe {
        let f = dl
            .get::<unsafe extern "C" fn() -> i32>(b"getInferLibVersion\0")
            .map_err(|e| format!("{} ({found_by}): not TensorRT: {e}", path.display()))?;
        (*f)()
    };
    let mut version = Version::from_number(number);
    // SAFETY: as above; the symbol is absent before 10.0.
    if let Ok(f) = unsafe { dl.get::<unsafe extern "C" fn() -> i32>(b"getInferLibBuildVersion\0") } {
        // SAFETY: as above.
        version.build = unsafe { (*f)() }.max(0) as u32;
    }
    let path = real_path(&dl).unwrap_or_else(|| path.to_path_buf());
    Ok(Library {
        dl: ManuallyDrop::new(dl),
        path,
        found_by,
        version,
        logger: OnceLock::new(),
        plugins: Mutex::new(Vec::new()),
    })
}

/// Where the loader found it, from the address of one of its functions.
fn real_path(dl: &Dl) -> Option<PathBuf> {
    // SAFETY: only the address is used.
    let address = unsafe { dl.get::<*const c_void>(b"getInferLibVersion\0") }.ok()?.into_raw() as usize;
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (lo, hi) = range.split_once('-')?;
        let inside = (usize::from_str_radix(lo, 16).ok()?..usize::from_str_radix(hi, 16).ok()?).contains(&address);
        inside.then(|| rest.find('/').map(|i| PathBuf::from(&rest[i..]))).flatten()
    })
}

impl Library {
    /// The slot's number in this version, or an error that names the method and the version.
    #[inline]
    pub fn slot(&self, slot: &Slot) -> Result<usize> {
        slot.index(self.version.major, self.version.minor).ok_or_else(|| self.lacks(slot))
    }

    #[cold]
    fn lacks(&self, slot: &Slot) -> Error {
        Error::new(
            Kind::UnsupportedVersion,
            format!("TensorRT {} has no {}::{}; {}", self.version, slot.class, slot.method, JETPACKS),
        )
        .with("library", self.path.display().to_string())
        .with("found", self.version.to_string())
        .with("supported", format!("a version with {}", slot.method))
    }

    pub fn has(&self, slot: &Slot) -> bool {
        slot.index(self.version.major, self.version.minor).is_some()
    }

    pub fn symbol(&self, name: &CStr) -> Option<*const c_void> {
        // SAFETY: only the address is taken.
        unsafe { self.dl.get::<*const c_void>(name.to_bytes_with_nul()) }
            .ok()
            .map(|s| s.into_raw().cast_const())
    }

    /// The one logger of the process, as TensorRT takes it.
    pub(super) fn logger(&self) -> *mut c_void {
        self.logger.get_or_init(|| Logger::new(self)).public()
    }

    /// What the factories take as the caller's version: the library's own, so that it cannot mismatch.
    fn number(&self) -> i32 {
        (self.version.major * 10_000 + self.version.minor * 100 + self.version.patch) as i32
    }

    pub fn create_runtime(&self) -> Result<Object> {
        let mark = crate::log::TENSORRT.mark();
        // SAFETY: the factory's signature is `void*(ILogger*, int32_t)` in every version; the logger lives for ever.
        let made = unsafe {
            let f = self
                .dl
                .get::<unsafe extern "C" fn(*mut c_void, i32) -> *mut c_void>(b"createInferRuntime_INTERNAL\0");
            f.map(|f| (*f)(self.logger(), self.number()))
        };
        made.ok().and_then(Object::new).ok_or_else(|| {
            Error::new(
                Kind::Deserialize,
                format!("{}: TensorRT {} could not create a runtime", self.path.display(), self.version),
            )
            .with_log(crate::log::TENSORRT.since(mark))
        })
    }

    pub fn create_builder(&self) -> Result<Object> {
        let mark = crate::log::TENSORRT.mark();
        // SAFETY: `bool(const char*)`, from 10.16: where libnvinfer looks for its builder resources. Older versions search
        // LD_LIBRARY_PATH, which only whoever starts the process can set.
        if let Ok(f) = unsafe {
            self.dl
                .get::<unsafe extern "C" fn(*const c_char) -> bool>(b"setInternalLibraryPath\0")
        } {
            let folder = self.path.parent().and_then(|p| CString::new(p.as_os_str().as_encoded_bytes()).ok());
            if let Some(folder) = folder {
                // SAFETY: as above; the string lives during the call.
                unsafe { (*f)(folder.as_ptr()) };
            }
        }
        // SAFETY: the factory's signature is `void*(ILogger*, int32_t)` in every version; the logger lives for ever.
        let made = unsafe {
            let f = self
                .dl
                .get::<unsafe extern "C" fn(*mut c_void, i32) -> *mut c_void>(b"createInferBuilder_INTERNAL\0");
            f.map(|f| (*f)(self.logger(), self.number()))
        };
        match made {
            Err(_) => Err(Error::new(
                Kind::Build,
                format!(
                    "{}: this libnvinfer has no builder (a lean or dispatch runtime). Install the full TensorRT {}.",
                    self.path.display(),
                    self.version
                ),
            )),
            Ok(made) => Object::new(made).ok_or_else(|| {
                Error::new(
                    Kind::Build,
                    format!("{}: TensorRT {} could not create a builder", self.path.display(), self.version),
                )
                .with_log(crate::log::TENSORRT.since(mark))
            }),
        }
    }

    /// A refitter of that ICudaEngine, which must outlive it.
    pub(super) fn create_refitter(&self, engine: Handle) -> Result<Object> {
        let mark = crate::log::TENSORRT.mark();
        // SAFETY: the factory's signature is `void*(ICudaEngine*, ILogger*, int32_t)` in every version.
        let made = unsafe {
            let f = self
                .dl
                .get::<unsafe extern "C" fn(*mut c_void, *mut c_void, i32) -> *mut c_void>(b"createInferRefitter_INTERNAL\0");
            f.map(|f| (*f)(engine.public(), self.logger(), self.number()))
        };
        made.ok().and_then(Object::new).ok_or_else(|| {
            Error::new(
                Kind::Deserialize,
                format!("TensorRT {} could not create a refitter for this engine", self.version),
            )
            .with_log(crate::log::TENSORRT.since(mark))
        })
    }

    /// Opens `libnvinfer_plugin` beside the library, when it is there, and each of `more`; each is initialised once.
    pub fn load_plugins(&self, more: &[PathBuf]) -> Result<()> {
        let mut done = self.plugins.lock().unwrap_or_else(|e| e.into_inner());
        let beside = self.path.with_file_name(format!("libnvinfer_plugin.so.{}", self.version.major));
        let first = beside.exists().then_some(beside);
        for path in first.into_iter().chain(more.iter().cloned()) {
            if done.contains(&path) {
                continue;
            }
            self.open_plugin(&path)?;
            done.push(path);
        }
        Ok(())
    }

    fn open_plugin(&self, path: &Path) -> Result<()> {
        let mark = crate::log::TENSORRT.mark();
        // SAFETY: a plugin is code that the user asked to run. Global, so that plugins may use each other's symbols.
        let dl = unsafe { Dl::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(|e| {
            Error::new(
                Kind::LibraryNotFound,
                format!(
                    "plugin library {}: {e}. Give the path of a library built for TensorRT {}.",
                    path.display(),
                    self.version.major
                ),
            )
            .with("library", path.display().to_string())
        })?;
        // Libraries of the user's own register their creators in static initialisers and need no entry point.
        // SAFETY: `bool(void*, const char*)`, not noexcept, hence "C-unwind".
        let ok = match unsafe { dl.get::<unsafe extern "C-unwind" fn(*mut c_void, *const c_char) -> bool>(b"initLibNvInferPlugins\0") } {
            // SAFETY: as above; the logger lives for ever.
            Ok(f) => unsafe { (*f)(self.logger(), c"".as_ptr()) },
            Err(_) => true,
        };
        // Never unloaded: engines keep pointers into it.
        std::mem::forget(dl);
        if ok {
            return Ok(());
        }
        Err(Error::new(
            Kind::Deserialize,
            format!("plugin library {}: initLibNvInferPlugins failed", path.display()),
        )
        .with_log(crate::log::TENSORRT.since(mark)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_numbers_of_both_schemes() {
        assert_eq!(Version::from_number(8601).to_string(), "8.6.1");
        assert_eq!(Version::from_number(100_600).to_string(), "10.6.0");
        assert_eq!(Version::from_number(101_501).to_string(), "10.15.1");
        assert_eq!(
            Version::from_number(110_100),
            Version {
                major: 11,
                minor: 1,
                patch: 0,
                build: 0
            }
        );
        assert!(!Version::from_number(8601).is_supported());
        assert!(!Version::from_number(120_000).is_supported());
    }

    #[test]
    fn the_plans_major_is_tried_first() {
        assert_eq!(majors(None), [10, 11, 12, 9, 8]);
        assert_eq!(
            majors(Some(PlanVersion {
                major: 11,
                minor: 0,
                patch: 0,
                build: 0
            })),
            [11, 10, 12, 9, 8]
        );
    }
}
