//! NVIDIA's ONNX parser, by `dlopen` from libnvinfer's folder: parsing a model into a network, and refitting an engine from one.

use super::super::abi::{parser as slot, parser_error as error_slot, parser_error_code, parser_flag, parser_refitter as refit_slot, Slot};
use super::super::library::Library;
use super::super::object::{own_call, text, Handle};
use super::refused;
use crate::error::{Error, Kind, Result};
use libloading::os::unix::{Library as Dl, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{c_char, c_void, CString};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// `NV_ONNX_PARSER_VERSION`, the same in every version (abi facts §9).
const PARSER_VERSION: i32 = 100;

type Factory = unsafe extern "C-unwind" fn(*mut c_void, *mut c_void, i32) -> *mut c_void;

/// One complaint of the parser.
#[derive(Debug, Clone, Default)]
pub struct Problem {
    /// Index of the node in the graph, -1 where it is about no node.
    pub node: i32,
    pub name: String,
    pub operator: String,
    /// `UNSUPPORTED_NODE`, `MODEL_DESERIALIZE_FAILED`, …
    pub code: String,
    pub reason: String,
    /// Local functions that the node is in, outermost first.
    pub stack: Vec<String>,
}

/// Where `libnvonnxparser` lies: in libnvinfer's own folder, because it calls the same tables and must be of the same version.
fn path_of(lib: &Library) -> Result<PathBuf> {
    let name = format!("libnvonnxparser.so.{}", lib.version.major);
    let exact = lib.path.with_file_name(&name);
    if exact.exists() {
        return Ok(exact);
    }
    let folder = lib.path.parent().unwrap_or(Path::new("."));
    let longer = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .find(|p| {
            let file = p.file_name().and_then(|n| n.to_str()).unwrap_or("");
            file.starts_with(&format!("{name}."))
        });
    longer.ok_or_else(|| {
        Error::new(
            Kind::LibraryNotFound,
            format!(
                "{name} is not in {}, where libnvinfer is, and building needs the parser of the same TensorRT {}. Install it there (on JetPack: apt install libnvonnxparsers10).",
                folder.display(),
                lib.version
            ),
        )
        .with("library", name)
        .with("searched", vec![folder.display().to_string()])
    })
}

fn opened(lib: &Library) -> Result<&'static Dl> {
    static PARSER: OnceLock<Dl> = OnceLock::new();
    if let Some(dl) = PARSER.get() {
        return Ok(dl);
    }
    let path = path_of(lib)?;
    // SAFETY: running the parser's initialisers is the purpose. It is never closed: its objects' code lives there.
    let dl = unsafe { Dl::open(Some(&path), RTLD_NOW | RTLD_LOCAL) }
        .map_err(|e| Error::new(Kind::LibraryNotFound, format!("{}: {e}", path.display())).with("library", path.display().to_string()))?;
    Ok(PARSER.get_or_init(|| dl))
}

fn made_by(lib: &'static Library, symbol: &[u8], over: *mut c_void) -> Result<Handle> {
    let mark = crate::log::TENSORRT.mark();
    let dl = opened(lib)?;
    // SAFETY: both factories are `void*(void*, void*, int)`; the object they work on and the logger outlive what they make.
    let made = unsafe {
        let f = dl.get::<Factory>(symbol).map_err(|e| {
            Error::new(
                Kind::UnsupportedVersion,
                format!("libnvonnxparser of TensorRT {}: {e}", lib.version),
            )
        })?;
        (*f)(over, lib.logger(), PARSER_VERSION)
    };
    Handle::new(made).ok_or_else(|| refused(format!("TensorRT {} could not make an ONNX parser", lib.version), mark))
}

/// SAFETY: `count` and `get` must be getNbErrors and getError of the object's class.
unsafe fn problems(lib: &Library, object: Handle, count: &Slot, get: &Slot) -> Result<Vec<Problem>> {
    let mut out = Vec::new();
    // SAFETY: the caller's; the error objects live until clearErrors, and their strings as long as they do.
    unsafe {
        for i in 0..own_call!(lib, object, *count, fn() -> i32)? {
            let Some(e) = Handle::new(own_call!(lib, object, *get, fn(i32) -> *mut c_void, i)?) else {
                continue;
            };
            let code = own_call!(lib, e, error_slot::CODE, fn() -> i32)?;
            let string = |slot: &Slot| -> Result<String> { Ok(text(own_call!(lib, e, *slot, fn() -> *const c_char)?)) };
            let depth = own_call!(lib, e, error_slot::LOCAL_FUNCTION_STACK_SIZE, fn() -> i32)?.clamp(0, 64);
            let names = own_call!(lib, e, error_slot::LOCAL_FUNCTION_STACK, fn() -> *const *const c_char)?;
            let stack = (0..depth as usize)
                .filter(|_| !names.is_null())
                .map(|k| text(*names.add(k)))
                .collect();
            out.push(Problem {
                node: own_call!(lib, e, error_slot::NODE, fn() -> i32)?,
                name: string(&error_slot::NODE_NAME)?,
                operator: string(&error_slot::NODE_OPERATOR)?,
                code: parser_error_code::ALL
                    .iter()
                    .find(|(_, v)| *v == code)
                    .map_or_else(|| code.to_string(), |(name, _)| (*name).to_string()),
                reason: string(&error_slot::DESC)?,
                stack,
            });
        }
    }
    Ok(out)
}

/// A parser and the network that it fills. It owns the weights: it must live until the plan is built.
#[derive(Debug)]
pub struct Parser {
    lib: &'static Library,
    object: Handle,
}

impl Parser {
    pub fn new(lib: &'static Library, network: Handle) -> Result<Parser> {
        let object = made_by(lib, b"createNvOnnxParser_INTERNAL\0", network.public())?;
        Ok(Parser { lib, object })
    }

    /// Sets a flag such as `NATIVE_INSTANCENORM`.
    pub fn set_flag(&self, name: &str) -> Result<()> {
        let lib = self.lib;
        let value = super::member(lib, "parser flag", parser_flag::ALL, name)?;
        // SAFETY: IParser::setFlag(OnnxParserFlag) and getFlag.
        let on = unsafe {
            own_call!(lib, self.object, slot::SET_FLAG, fn(i32) -> (), value)?;
            own_call!(lib, self.object, slot::GET_FLAG, fn(i32) -> bool, value)?
        };
        super::took(&format!("parser flag {name}"), true, on)
    }

    /// Parses a file with its external data; the complaints, none when it was understood.
    pub fn parse(&self, path: &Path) -> Result<Vec<Problem>> {
        let file = c_path(path)?;
        let mark = crate::log::TENSORRT.mark();
        // SAFETY: IParser::parseFromFile(const char*, int32_t verbosity); then getNbErrors and getError of the same class.
        let (ok, mut found) = unsafe {
            let warnings = 2;
            let ok = own_call!(
                self.lib,
                self.object,
                slot::PARSE_FROM_FILE,
                fn(*const c_char, i32) -> bool,
                file.as_ptr(),
                warnings
            )?;
            (ok, problems(self.lib, self.object, &slot::GET_NB_ERRORS, &slot::GET_ERROR)?)
        };
        if !ok && found.is_empty() {
            found.push(Problem {
                node: -1,
                code: "INTERNAL_ERROR".into(),
                reason: crate::log::TENSORRT.since(mark).join("; "),
                ..Problem::default()
            });
        }
        Ok(found)
    }
}

impl Drop for Parser {
    fn drop(&mut self) {
        // SAFETY: the deleting destructor is a slot of the parser's own table (not slot 1); owned, so called once.
        let _ = unsafe { own_call!(self.lib, self.object, slot::DTOR_DELETING, fn() -> ()) };
    }
}

/// What gives a refitter the weights of an ONNX file. It owns them: it must live until the engine is refitted.
pub(super) struct ParserRefitter {
    lib: &'static Library,
    object: Handle,
}

impl ParserRefitter {
    pub(super) fn new(lib: &'static Library, refitter: Handle) -> Result<ParserRefitter> {
        let object = made_by(lib, b"createNvOnnxParserRefitter_INTERNAL\0", refitter.public())?;
        Ok(ParserRefitter { lib, object })
    }

    /// The complaints, none when all weights were taken.
    pub(super) fn refit_from(&self, path: &Path) -> Result<Vec<Problem>> {
        let file = c_path(path)?;
        let lib = self.lib;
        let mark = crate::log::TENSORRT.mark();
        // SAFETY: IParserRefitter::refitFromFile(const char*); then getNbErrors and getError of the same class.
        let (ok, mut found) = unsafe {
            let ok = own_call!(
                lib,
                self.object,
                refit_slot::REFIT_FROM_FILE,
                fn(*const c_char) -> bool,
                file.as_ptr()
            )?;
            (ok, problems(lib, self.object, &refit_slot::GET_NB_ERRORS, &refit_slot::GET_ERROR)?)
        };
        if !ok && found.is_empty() {
            found.push(Problem {
                node: -1,
                code: "REFIT_FAILED".into(),
                reason: crate::log::TENSORRT.since(mark).join("; "),
                ..Problem::default()
            });
        }
        Ok(found)
    }
}

impl Drop for ParserRefitter {
    fn drop(&mut self) {
        // SAFETY: the deleting destructor is a slot of its own table (not slot 1); owned, so called once.
        let _ = unsafe { own_call!(self.lib, self.object, refit_slot::DTOR_DELETING, fn() -> ()) };
    }
}

fn c_path(path: &Path) -> Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::new(Kind::Argument, format!("{}: a path cannot hold a NUL byte", path.display())))
}
