//! The one error type of the core. No Python in here: `py::errors` turns a value of this type into the class of
//! `jetrt.errors` that [`Error::class`] names, once, at the boundary.

use std::fmt;

/// What a Python exception gets as an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Field {
    Text(String),
    Int(i64),
    Real(f64),
    List(Vec<String>),
}

impl From<&str> for Field {
    fn from(v: &str) -> Self {
        Field::Text(v.into())
    }
}
impl From<String> for Field {
    fn from(v: String) -> Self {
        Field::Text(v)
    }
}
impl From<i64> for Field {
    fn from(v: i64) -> Self {
        Field::Int(v)
    }
}
impl From<u64> for Field {
    fn from(v: u64) -> Self {
        Field::Int(i64::try_from(v).unwrap_or(i64::MAX))
    }
}
impl From<f64> for Field {
    fn from(v: f64) -> Self {
        Field::Real(v)
    }
}
impl From<Vec<String>> for Field {
    fn from(v: Vec<String>) -> Self {
        Field::List(v)
    }
}

/// The classes of `jetrt.errors` that native code raises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    LibraryNotFound,
    UnsupportedVersion,
    Deserialize,
    Plan,
    Build,
    BuildOption,
    Model,
    Inference,
    Shape,
    DType,
    Layout,
    Device,
    InputName,
    Grad,
    ContextTimeout,
    Closed,
    GraphCapture,
    OutOfMemory,
    Cuda,
    /// A wrong argument that is not a tensor (an unknown policy, a negative timeout): Python's own `ValueError`.
    Argument,
    /// A wrong type of argument: Python's own `TypeError`.
    ArgumentType,
    /// The plan cannot be opened or read: Python's own `OSError` family, by errno.
    File,
}

impl Kind {
    /// The name of the Python class, looked up in `jetrt.errors`, else in `builtins`.
    pub fn class(self) -> &'static str {
        match self {
            Kind::LibraryNotFound => "LibraryNotFoundError",
            Kind::UnsupportedVersion => "UnsupportedVersionError",
            Kind::Deserialize => "EngineDeserializeError",
            Kind::Plan => "PlanError",
            Kind::Build => "EngineBuildError",
            Kind::BuildOption => "BuildOptionError",
            Kind::Model => "ModelError",
            Kind::Inference => "InferenceError",
            Kind::Shape => "ShapeError",
            Kind::DType => "DTypeError",
            Kind::Layout => "LayoutError",
            Kind::Device => "DeviceError",
            Kind::InputName => "InputNameError",
            Kind::Grad => "GradError",
            Kind::ContextTimeout => "ContextTimeoutError",
            Kind::Closed => "ClosedEngineError",
            Kind::GraphCapture => "GraphCaptureError",
            Kind::OutOfMemory => "OutOfMemoryError",
            Kind::Cuda => "CudaError",
            Kind::Argument => "ValueError",
            Kind::ArgumentType => "TypeError",
            Kind::File => "OSError",
        }
    }
}

/// An error with its message (what failed, found, allowed, next step) and the fields of its Python class.
/// Boxed, so that the happy path returns a small `Result`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Error(Box<Detail>);

#[derive(Debug, Clone)]
struct Detail {
    kind: Kind,
    message: String,
    fields: Vec<(&'static str, Field)>,
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    #[cold]
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error(Box::new(Detail {
            kind,
            message: message.into(),
            fields: Vec::new(),
        }))
    }

    /// Adds (or replaces) a field of the Python exception.
    pub fn with(mut self, name: &'static str, value: impl Into<Field>) -> Self {
        self.0.fields.retain(|(n, _)| *n != name);
        self.0.fields.push((name, value.into()));
        self
    }

    /// The log lines of the failing call, in the message and as the field `log`.
    pub fn with_log(mut self, lines: Vec<String>) -> Self {
        if lines.is_empty() {
            return self;
        }
        self.0.message.push_str("\nTensorRT said:");
        for line in &lines {
            self.0.message.push_str("\n  ");
            self.0.message.push_str(line);
        }
        self.with("log", lines)
    }

    /// A sentence in front of the message: what was being done when this happened.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    pub fn message(&self) -> &str {
        &self.0.message
    }

    pub fn fields(&self) -> &[(&'static str, Field)] {
        &self.0.fields
    }

    pub fn field(&self, name: &str) -> Option<&Field> {
        self.0.fields.iter().find(|(n, _)| *n == name).map(|(_, v)| v)
    }

    /// Reading a file failed; the errno travels so that Python raises `FileNotFoundError` and its kin.
    #[cold]
    pub fn file(path: &std::path::Path, doing: &str, e: &std::io::Error) -> Self {
        Error::new(Kind::File, format!("{}: {doing}: {e}", path.display()))
            .with("path", path.display().to_string())
            .with("errno", i64::from(e.raw_os_error().unwrap_or(0)))
    }

    /// An input that TensorRT must not see: which tensor, what was found, what is allowed, what to do.
    #[cold]
    pub fn input(kind: Kind, tensor: &str, found: impl Into<String>, allowed: impl Into<String>, next: &str) -> Self {
        let (found, allowed) = (found.into(), allowed.into());
        Error::new(kind, format!("input '{tensor}': found {found}; allowed: {allowed}. {next}"))
            .with("tensor", tensor)
            .with("found", found)
            .with("allowed", allowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_names_tensor_found_allowed_and_next_step() {
        let e = Error::input(Kind::Shape, "x", "[3, 64]", "[1..8, 64]", "Pass a smaller batch.");
        assert_eq!(
            e.to_string(),
            "input 'x': found [3, 64]; allowed: [1..8, 64]. Pass a smaller batch."
        );
        assert_eq!(e.field("tensor"), Some(&Field::Text("x".into())));
        assert_eq!(e.kind().class(), "ShapeError");
    }

    #[test]
    fn log_lines_travel_in_message_and_field() {
        let e = Error::new(Kind::Inference, "enqueueV3 failed").with_log(vec!["a".into(), "b".into()]);
        assert_eq!(e.message(), "enqueueV3 failed\nTensorRT said:\n  a\n  b");
        assert_eq!(e.field("log"), Some(&Field::List(vec!["a".into(), "b".into()])));
        assert_eq!(Error::new(Kind::Cuda, "m").with_log(vec![]).field("log"), None);
    }

    #[test]
    fn an_error_is_one_word() {
        assert_eq!(std::mem::size_of::<Result<()>>(), 8);
    }
}
