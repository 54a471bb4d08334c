//! Any array object becomes one [`TensorView`]: without a copy, without a guess.

use crate::dlpack::exchange::{refused, Exchange};
use crate::dlpack::{capsule, checked, ndarray, refused_dtype, refused_rank, Managed};
use crate::dtype::DType;
use crate::error::{Error, Kind};
use crate::py::errors;
use crate::py::tensor::Tensor;
use crate::shape::{Dims, MAX_DIMS};
use crate::tensor::{Place, TensorView};
use pyo3::exceptions::{PyAttributeError, PyException, PyRuntimeError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyBytes, PyComplex, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple, PyType};
use pyo3::PyTypeInfo;

/// The library that a tensor came from, which decides what the results come back as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Library {
    Torch,
    Numpy,
    Cupy,
    Jax,
    #[default]
    Jetrt,
    Other,
}

/// What the producer handed over to keep its memory alive.
pub type Keep = Managed;

/// An input as it was found.
pub struct Imported {
    /// Valid while the caller's object lives and, where there is one, `keep`.
    pub view: TensorView,
    pub library: Library,
    /// To be held until the work that reads the tensor is enqueued (device memory) or done (host memory).
    pub keep: Option<Keep>,
    /// The stream after which the data is complete, where the producer named one instead of ordering itself before ours.
    pub producer_stream: Option<u64>,
    pub read_only: bool,
    /// The producer says "CUDA" but not which GPU (`__cuda_array_interface__`): `view.place` is an assumption.
    pub place_assumed: bool,
}

impl Imported {
    fn borrowed(view: TensorView, library: Library) -> Imported {
        Imported {
            view,
            library,
            keep: None,
            producer_stream: None,
            read_only: false,
            place_assumed: false,
        }
    }
}

/// What is known about a type.
#[derive(Clone, Copy)]
struct Known {
    library: Library,
    exchange: Option<Exchange>,
    /// The library's own type, no subclass.
    exact: bool,
}

/// The types that libraries make their tensors of, found once and kept for ever (there are seven). Everything else,
/// subclasses included, is looked at anew: it may be made and forgotten at run time.
static KNOWN: [PyOnceLock<(Py<PyType>, Known)>; 8] = [const { PyOnceLock::new() }; 8];

fn known(obj: &Bound<'_, PyAny>) -> Known {
    let (py, ty) = (obj.py(), obj.get_type_ptr());
    for cell in &KNOWN {
        match cell.get(py) {
            Some((t, known)) if t.as_ptr() == ty.cast() => return *known,
            Some(_) => {}
            None => break,
        }
    }
    classify(&obj.get_type())
}

#[cold]
fn classify(ty: &Bound<'_, PyType>) -> Known {
    let mut found = Known {
        library: Library::Other,
        exchange: None,
        exact: false,
    };
    for (i, base) in ty.mro().iter().enumerate() {
        let Ok(base) = base.cast_into::<PyType>() else { continue };
        let (Ok(module), Ok(name)) = (base.module(), base.qualname()) else {
            continue;
        };
        let (Ok(module), Ok(name)) = (module.to_str(), name.to_str()) else {
            continue;
        };
        found.library = match (module.split('.').next().unwrap_or_default(), name) {
            ("torch", "Tensor") => Library::Torch,
            ("numpy", "ndarray") => Library::Numpy,
            ("cupy", "ndarray") => Library::Cupy,
            ("jax", "Array") | ("jaxlib", "ArrayImpl") => Library::Jax,
            ("jetrt", "Tensor") => Library::Jetrt,
            _ => continue,
        };
        found.exchange = Exchange::of_type(ty);
        found.exact = i == 0;
        if found.exact || found.exchange.is_some() {
            keep(ty, found);
        }
        break;
    }
    found
}

fn keep(ty: &Bound<'_, PyType>, known: Known) {
    let py = ty.py();
    let mut entry = (ty.clone().unbind(), known);
    for cell in &KNOWN {
        match cell.set(py, entry) {
            Ok(()) => return,
            Err(back) => entry = back,
        }
        // Another thread found the same type meanwhile.
        if cell.get(py).is_some_and(|(t, _)| t.is(ty)) {
            return;
        }
    }
}

pub fn library_of(obj: &Bound<'_, PyAny>) -> Library {
    known(obj).library
}

/// Is it a `torch.Tensor` itself, no subclass?
pub fn is_torch_tensor(obj: &Bound<'_, PyAny>) -> bool {
    let known = known(obj);
    known.library == Library::Torch && known.exact
}

/// The exchange table of `torch.Tensor`, where torch is imported and has one.
pub fn torch_exchange(py: Python<'_>) -> Option<Exchange> {
    static TABLE: PyOnceLock<Option<Exchange>> = PyOnceLock::new();
    if let Some(known) = TABLE.get(py) {
        return *known;
    }
    let torch = imported(py, "torch")?;
    // Not remembered while torch is still being imported.
    let ty = torch.getattr(intern!(py, "Tensor")).ok()?.cast_into::<PyType>().ok()?;
    *TABLE.get_or_init(py, || Exchange::of_type(&ty))
}

/// A module that somebody has imported already; jetrt imports none of the array libraries by itself.
pub fn imported<'py>(py: Python<'py>, name: &str) -> Option<Bound<'py, PyAny>> {
    let modules = py.import(intern!(py, "sys")).ok()?.getattr(intern!(py, "modules")).ok()?;
    modules.get_item(name).ok().filter(|m| !m.is_none())
}

/// The stream on which this library works now, as a driver handle, and its object where that object owns it (torch's are
/// never destroyed); `None` where the library has no such notion.
pub fn current_stream(py: Python<'_>, library: Library, device: i32) -> PyResult<Option<(u64, Option<Py<PyAny>>)>> {
    match library {
        Library::Torch => {
            if !torch_has_cuda(py)? {
                return Ok(None);
            }
            if let Some(exchange) = torch_exchange(py) {
                return Ok(Some((exchange.current_stream(py, device)?, None)));
            }
            static ASK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
            let ask = ASK.get_or_try_init(py, || py.import("torch.cuda")?.getattr("current_stream").map(Bound::unbind))?;
            let handle = ask.bind(py).call1((device,))?.getattr(intern!(py, "cuda_stream"))?.extract()?;
            Ok(Some((handle, None)))
        }
        Library::Cupy => {
            static ASK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
            let ask = ASK.get_or_try_init(py, || py.import("cupy.cuda")?.getattr("get_current_stream").map(Bound::unbind))?;
            // CuPy has a current stream for every device.
            let stream = ask.bind(py).call1((device,))?;
            let handle = stream.getattr(intern!(py, "ptr"))?.extract()?;
            Ok(Some((handle, Some(stream.unbind()))))
        }
        Library::Numpy | Library::Jax | Library::Jetrt | Library::Other => Ok(None),
    }
}

/// Was this torch built for CUDA? (A CPU or ROCm build has no CUDA stream and takes no CUDA tensor.)
pub fn torch_has_cuda(py: Python<'_>) -> PyResult<bool> {
    static CUDA: PyOnceLock<bool> = PyOnceLock::new();
    if let Some(known) = CUDA.get(py) {
        return Ok(*known);
    }
    let Some(torch) = imported(py, "torch") else { return Ok(false) };
    let cuda = !torch.getattr("version")?.getattr("cuda")?.is_none();
    Ok(*CUDA.get_or_init(py, || cuda))
}

/// Does this torch tensor require grad? Other objects do not.
pub fn requires_grad(obj: &Bound<'_, PyAny>) -> PyResult<bool> {
    if library_of(obj) != Library::Torch {
        return Ok(false);
    }
    obj.getattr(intern!(obj.py(), "requires_grad"))?.is_truthy()
}

/// Is torch recording gradients on this thread? Not where torch is not imported.
pub fn grad_enabled(py: Python<'_>) -> PyResult<bool> {
    static ASK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    if ASK.get(py).is_none() {
        let Some(torch) = imported(py, "torch") else { return Ok(false) };
        let ask = torch.getattr("is_grad_enabled")?.unbind();
        let _ = ASK.set(py, ask);
    }
    match ASK.get(py) {
        Some(ask) => ask.bind(py).call0()?.is_truthy(),
        None => Ok(false),
    }
}

/// A torch tensor through the exchange table, the quickest way in, written over the view of the last call. False where
/// there is no table for it.
#[inline]
pub fn exchanged(obj: &Bound<'_, PyAny>, name: &str, view: &mut TensorView) -> PyResult<bool> {
    let Some(exchange) = known(obj).exchange else { return Ok(false) };
    exchange.refresh(obj, name, view)?;
    // torch negates lazily only where imaginary parts are looked at. Those lie two apart, or, when there is only one, at the
    // second half of a complex number. Asking every tensor would double the cost of the import; what this misses is a
    // negated tensor whose layout was then overridden by hand (`as_strided`, `resize_`).
    if !view.contiguous || (view.elements() == 1 && may_be_imaginary(view)) {
        refuse_negated(obj, name)?;
    }
    Ok(true)
}

/// Does this one number lie where the imaginary part of a complex number would?
fn may_be_imaginary(view: &TensorView) -> bool {
    let half = match view.dtype {
        DType::F16 => 2,
        DType::F32 => 4,
        DType::F64 => 8,
        _ => return false,
    };
    !view.ptr.is_multiple_of(2 * half)
}

/// Reads any array object. `name` is the input's, for messages; `stream` is the stream on which the tensor will be read,
/// for the producer to order itself before (`None`: it need not); `device` is the engine's GPU.
pub fn import(obj: &Bound<'_, PyAny>, name: &str, stream: Option<u64>, device: i32) -> PyResult<Imported> {
    let mut view = TensorView::default();
    if exchanged(obj, name, &mut view)? {
        return Ok(Imported::borrowed(view, Library::Torch));
    }
    let known = known(obj);
    match known.library {
        Library::Numpy => {
            if !known.exact {
                refuse_masked(obj, name)?;
            }
            let (view, read_only) = ndarray::view(obj, name)?;
            Ok(Imported {
                read_only,
                ..Imported::borrowed(view, Library::Numpy)
            })
        }
        // torch < 2.10 (JetPack's own wheels): its attributes take a fifth of the time of its __dlpack__.
        Library::Torch if known.exact => torch_attributes(obj, name),
        Library::Torch => {
            let py = obj.py();
            // Gradients are the caller's to check; torch's own export refuses such a tensor whatever grad mode says.
            let plain = if requires_grad(obj)? {
                obj.call_method0(intern!(py, "detach"))?
            } else {
                obj.clone()
            };
            let found = protocols(&plain, name, stream, device, Library::Torch)?;
            refuse_negated(obj, name)?;
            Ok(found)
        }
        Library::Jetrt => match obj.cast::<Tensor>() {
            Ok(t) => Ok(Imported::borrowed(t.get().order_before(obj.py(), stream)?, Library::Jetrt)),
            Err(_) => protocols(obj, name, stream, device, Library::Jetrt),
        },
        library => protocols(obj, name, stream, device, library),
    }
}

/// A `torch.Tensor` by its attributes, borrowed as through the exchange table.
fn torch_attributes(obj: &Bound<'_, PyAny>, name: &str) -> PyResult<Imported> {
    let py = obj.py();
    let label = obj.getattr(intern!(py, "dtype"))?;
    let Some(dtype) = torch_dtypes(py)?.iter().find(|(t, _)| t.is(&label)).map(|(_, d)| *d) else {
        return Err(refused_dtype(name, label.str()?.to_string().trim_start_matches("torch.")).into());
    };
    let list = |v: Bound<'_, PyAny>| -> PyResult<Dims> {
        let v = v.cast::<PyTuple>()?;
        if v.len() > MAX_DIMS {
            return Err(refused_rank(name, v.len() as i64).into());
        }
        let mut out = [0i64; MAX_DIMS];
        for (to, from) in out.iter_mut().zip(v.iter_borrowed()) {
            *to = from.extract()?;
        }
        Ok(Dims::new(&out[..v.len()]).unwrap_or_default())
    };
    // Sparse, nested and transformed tensors have no address or no strides, and torch says so.
    let memory = || -> PyResult<(u64, Dims, Dims)> {
        let ptr = obj.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let strides = list(obj.call_method0(intern!(py, "stride"))?)?;
        Ok((ptr, list(obj.getattr(intern!(py, "shape"))?)?, strides))
    };
    let (ptr, dims, strides) = match memory() {
        Ok(m) => m,
        Err(e) if e.get_type(py).is(py.get_type::<PyRuntimeError>()) => return Err(refused(py, name, e)),
        Err(e) => return Err(e),
    };
    let place = if obj.getattr(intern!(py, "is_cuda"))?.is_truthy()? && torch_has_cuda(py)? {
        Place::Device(obj.call_method0(intern!(py, "get_device"))?.extract()?)
    } else {
        let device = obj.getattr(intern!(py, "device"))?.getattr(intern!(py, "type"))?;
        match device.extract::<&str>()? {
            "cpu" => Place::Host,
            // Allowed through to the null pointer's message, which names it.
            "meta" => Place::Host,
            other => {
                // A ROCm build calls its devices "cuda", too.
                let found = format!(
                    "a tensor on a device of type '{other}' of a torch {} CUDA",
                    if torch_has_cuda(py)? { "with" } else { "without" }
                );
                let next = "Copy it to the engine's GPU or to the host first.";
                return Err(Error::input(Kind::Device, name, found, "CUDA or host memory", next).into());
            }
        }
    };
    let view = checked(ptr, ptr == 0, dtype, dims, Some(strides), place, name)?;
    refuse_negated(obj, name)?;
    Ok(Imported::borrowed(view, Library::Torch))
}

/// torch's type objects (there is one of each), as far as this torch has them. Types of less than a byte are left out:
/// torch stores them in ways of its own.
fn torch_dtypes(py: Python<'_>) -> PyResult<&'static [(Py<PyAny>, DType)]> {
    use DType::*;
    const WHOLE: [DType; 15] = [F32, F16, Bf16, I64, I32, Bool, U8, I8, F64, I16, Fp8, E8M0, U16, U32, U64];
    static TYPES: PyOnceLock<Vec<(Py<PyAny>, DType)>> = PyOnceLock::new();
    let found = TYPES.get_or_try_init(py, || -> PyResult<_> {
        let torch = py.import("torch")?;
        let mut out = Vec::new();
        for d in WHOLE {
            if let Some(t) = torch.getattr_opt(d.name())? {
                out.push((t.unbind(), d));
            }
        }
        Ok(out)
    })?;
    Ok(found)
}

/// Refuses a tensor whose stored values are not its values. (The conjugate bit is on complex tensors only.)
fn refuse_negated(obj: &Bound<'_, PyAny>, name: &str) -> PyResult<()> {
    if obj.call_method0(intern!(obj.py(), "is_neg"))?.is_truthy()? {
        return Err(Error::input(
            Kind::Layout,
            name,
            "a lazily negated tensor (torch's negative bit): its memory holds the opposite values",
            "a tensor whose memory holds its values",
            "Call x.resolve_neg() first.",
        )
        .into());
    }
    Ok(())
}

/// A masked array is an ndarray too, and its mask would be lost.
fn refuse_masked(obj: &Bound<'_, PyAny>, name: &str) -> PyResult<()> {
    let py = obj.py();
    if obj.getattr_opt(intern!(py, "mask"))?.is_some() && obj.getattr_opt(intern!(py, "filled"))?.is_some() {
        return Err(Error::input(
            Kind::Layout,
            name,
            "a masked array",
            "an array in which every element counts",
            "Fill the masked elements first: x.filled(value).",
        )
        .into());
    }
    Ok(())
}

/// `__dlpack__`, else `__cuda_array_interface__`, else a sentence on what to pass.
#[cold]
fn protocols(obj: &Bound<'_, PyAny>, name: &str, stream: Option<u64>, device: i32, library: Library) -> PyResult<Imported> {
    let py = obj.py();
    if let Some(export) = obj.getattr_opt(intern!(py, "__dlpack__"))? {
        return dlpack(obj, &export, name, stream, device, library);
    }
    if let Some(interface) = obj.getattr_opt(intern!(py, "__cuda_array_interface__"))? {
        return cuda_array(&interface, name, device, library);
    }
    if capsule::is_capsule(obj) {
        let keep = capsule::take(obj, name)?;
        let (view, read_only) = (keep.view(name, device)?, keep.read_only());
        return Ok(Imported {
            keep: Some(keep),
            read_only,
            ..Imported::borrowed(view, library)
        });
    }
    if ndarray_like(obj) {
        // An object that only speaks numpy's protocols (a pandas Series, a PIL image) would have to be copied or guessed.
        return Err(unsupported(obj, name, "Convert it: numpy.asarray(x)."));
    }
    Err(unsupported(obj, name, "Wrap it: numpy.asarray(x, dtype=...)."))
}

fn ndarray_like(obj: &Bound<'_, PyAny>) -> bool {
    let py = obj.py();
    [intern!(py, "__array__"), intern!(py, "__array_interface__")]
        .iter()
        .any(|a| obj.hasattr(*a).unwrap_or(false))
}

#[cold]
fn unsupported(obj: &Bound<'_, PyAny>, name: &str, next: &str) -> PyErr {
    let py = obj.py();
    let ty = obj.get_type();
    let plain = [
        PyList::type_object(py),
        PyTuple::type_object(py),
        PyFloat::type_object(py),
        PyInt::type_object(py),
        PyBool::type_object(py),
        PyComplex::type_object(py),
        PyString::type_object(py),
        PyBytes::type_object(py),
        PyDict::type_object(py),
    ];
    let label = ty.fully_qualified_name().map(|n| n.to_string()).unwrap_or_default();
    let found = match plain.iter().any(|p| p.is(&ty)) {
        true => format!("a Python {label}"),
        false if obj.is_none() => "None".into(),
        false => format!("an object of type {label}"),
    };
    let allowed = "an array of torch, numpy, CuPy or JAX, or an object with __dlpack__ or __cuda_array_interface__";
    Error::input(Kind::DType, name, found, allowed, next).into()
}

const CUDA: i32 = 2;
const LEGACY_DEFAULT: u64 = 1;

fn dlpack(
    obj: &Bound<'_, PyAny>,
    export: &Bound<'_, PyAny>,
    name: &str,
    stream: Option<u64>,
    device: i32,
    library: Library,
) -> PyResult<Imported> {
    let py = obj.py();
    let failed = |cause: PyErr| -> PyErr {
        // Ctrl-C and the like are no refusal.
        if !cause.is_instance_of::<PyException>(py) {
            return cause;
        }
        let found = format!("a tensor that its library does not hand out ({})", errors::brief(py, &cause));
        errors::caused_by(
            py,
            Error::input(
                Kind::Layout,
                name,
                found,
                "a tensor that __dlpack__ hands out",
                "The cause below says why.",
            ),
            cause,
        )
    };
    let on_cuda = match obj.call_method0(intern!(py, "__dlpack_device__")) {
        Ok(d) => d.extract::<(i32, i32)>().map_err(failed)?.0 == CUDA,
        // Capsules from before the device query are all the host's.
        Err(e) if e.is_instance_of::<PyAttributeError>(py) => false,
        Err(e) => return Err(failed(e)),
    };
    // In the protocol 0 is ambiguous and 1 is the legacy default stream; -1 asks for no ordering.
    let wanted = match stream {
        Some(0) => 1,
        Some(s) => s as i64,
        None => -1,
    };
    let keywords = |names: &[&str]| -> PyResult<Bound<'_, PyDict>> {
        let d = PyDict::new(py);
        for n in names {
            match *n {
                "stream" => d.set_item(*n, wanted)?,
                _ => d.set_item(*n, (1, 0))?,
            }
        }
        Ok(d)
    };
    // Newest form first; older producers know fewer keywords and say so with a TypeError.
    let forms: &[&[&str]] = if on_cuda {
        &[&["max_version", "stream"], &["stream"], &[]]
    } else {
        &[&["max_version"], &[]]
    };
    let mut made = None;
    for form in forms {
        match export.call((), Some(&keywords(form)?)) {
            Ok(c) => {
                made = Some((c, form));
                break;
            }
            Err(e) if e.is_instance_of::<PyTypeError>(py) && !form.is_empty() => {}
            Err(e) => return Err(failed(e)),
        }
    }
    let Some((made, form)) = made else {
        return Err(PyTypeError::new_err("__dlpack__ was not called"));
    };
    let keep = capsule::take(&made, name)?;
    let (view, read_only) = (keep.view(name, device)?, keep.read_only());
    // A producer that was not told our stream orders itself before the legacy default stream.
    let producer_stream = (on_cuda && stream.is_some() && !form.contains(&"stream")).then_some(LEGACY_DEFAULT);
    Ok(Imported {
        keep: Some(keep),
        read_only,
        producer_stream,
        ..Imported::borrowed(view, library)
    })
}

/// Versions 2 and 3. The dictionary is read whole: every key changes the meaning.
fn cuda_array(interface: &Bound<'_, PyAny>, name: &str, device: i32, library: Library) -> PyResult<Imported> {
    let refuse = |kind: Kind, found: String, allowed: &str, next: &str| -> PyErr { Error::input(kind, name, found, allowed, next).into() };
    let malformed = |what: &str| {
        refuse(
            Kind::Layout,
            format!("a __cuda_array_interface__ {what}"),
            "versions 2 and 3 of the interface",
            "This is a fault of the library that made the tensor.",
        )
    };
    let Ok(dict) = interface.cast::<PyDict>() else {
        return Err(malformed("that is no dict"));
    };
    let get = |key: &str| -> PyResult<Option<Bound<'_, PyAny>>> { Ok(dict.get_item(key)?.filter(|v| !v.is_none())) };
    let need = |key: &str| -> PyResult<Bound<'_, PyAny>> { get(key)?.ok_or_else(|| malformed(&format!("without '{key}'"))) };

    let version: i64 = need("version")?.extract().map_err(|_| malformed("whose version is no number"))?;
    if !(2..=3).contains(&version) {
        return Err(malformed(&format!("of version {version}")));
    }
    if get("mask")?.is_some() {
        return Err(refuse(
            Kind::Layout,
            "a masked array".into(),
            "an array in which every element counts",
            "Fill the masked elements first.",
        ));
    }
    let typestr: String = need("typestr")?.extract().map_err(|_| malformed("whose typestr is no string"))?;
    let Some(dtype) = DType::from_typestr(&typestr) else {
        return Err(refuse(
            Kind::DType,
            format!("elements of type '{typestr}'"),
            crate::dlpack::DTYPES,
            "Convert it to the type that the engine expects first; types that numpy lacks come through __dlpack__.",
        ));
    };
    let list = |key: &str, v: Bound<'_, PyAny>| -> PyResult<Dims> {
        let v: Vec<i64> = v.extract().map_err(|_| malformed(&format!("whose {key} is no tuple of numbers")))?;
        Dims::new(&v).ok_or_else(|| {
            refuse(
                Kind::Shape,
                format!("{} dimensions", v.len()),
                &format!("0 to {MAX_DIMS} dimensions"),
                "Reshape it to the rank that the engine expects.",
            )
        })
    };
    let dims = list("shape", need("shape")?)?;
    let (ptr, read_only): (u64, bool) = need("data")?
        .extract()
        .map_err(|_| malformed("whose data is no (pointer, read-only) pair"))?;
    let strides = match get("strides")? {
        None => None,
        Some(v) => {
            let bytes = list("strides", v)?;
            if bytes.rank() != dims.rank() {
                return Err(malformed("with another number of strides than of dimensions"));
            }
            let size = dtype.size().unwrap_or(1) as i64;
            let mut out = [0; MAX_DIMS];
            for (to, from) in out.iter_mut().zip(bytes.as_slice()) {
                *to = ndarray::elements(*from, size, name)?;
            }
            Dims::new(&out[..dims.rank()])
        }
    };
    let producer_stream = match get("stream")? {
        None => None,
        Some(s) => match s.extract::<u64>() {
            Ok(0) => return Err(malformed("with stream 0, which the interface forbids as ambiguous")),
            Ok(s) => Some(s),
            Err(_) => return Err(malformed("whose stream is no number")),
        },
    };
    let view = checked(ptr, ptr == 0, dtype, dims, strides, Place::Device(device), name)?;
    Ok(Imported {
        read_only,
        producer_stream,
        place_assumed: true,
        ..Imported::borrowed(view, library)
    })
}
