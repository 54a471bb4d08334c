//! `_Guards`: which prepared call is this one? Asked before each launch of `jetrt.graph`, so it is asked natively.

use super::call::locked;
use super::captures::read;
use super::import;
use crate::tensor::{Place, TensorView};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use smallvec::SmallVec;
use std::sync::{Arc, Mutex};

/// Arguments by position and name, and what was prepared for them.
#[pyclass(module = "jetrt._core", name = "_Guards", frozen)]
#[derive(Default)]
pub struct Guards {
    // Replaced as a whole: comparing may run Python, which must not happen under the lock.
    prepared: Mutex<Arc<Vec<Arc<Prepared>>>>,
}

struct Prepared {
    positional: Vec<Expected>,
    /// In the order of their names.
    named: Vec<(Py<PyString>, Expected)>,
    modes: Py<PyAny>,
    gradient_free: bool,
    value: Py<PyAny>,
}

enum Expected {
    Tensor(TensorView),
    Plain(Py<PyAny>),
}

enum Found<'a, 'py> {
    Tensor(&'a Bound<'py, PyAny>, TensorView),
    Plain(&'a Bound<'py, PyAny>),
}

#[pymethods]
impl Guards {
    #[new]
    fn new() -> Guards {
        Guards::default()
    }

    /// Remembers `value` for calls like this one. Modes are compared by `==`. False, and nothing is remembered, where an argument
    /// is neither a torch.Tensor nor a plain value (None, bool, int, float, str, bytes).
    fn add(
        &self,
        args: &Bound<'_, PyTuple>,
        kwargs: &Bound<'_, PyDict>,
        modes: Py<PyAny>,
        gradient_free: bool,
        value: Py<PyAny>,
    ) -> PyResult<bool> {
        let expected = |object: &Bound<'_, PyAny>| match found(object) {
            Some(Found::Tensor(_, view)) => Some(Expected::Tensor(view)),
            Some(Found::Plain(_)) => Some(Expected::Plain(object.clone().unbind())),
            None => None,
        };
        let Some(positional) = args.iter_borrowed().map(|a| expected(&a)).collect() else {
            return Ok(false);
        };
        let mut named = Vec::new();
        for (name, object) in kwargs.iter() {
            let Some(one) = expected(&object) else { return Ok(false) };
            named.push((name.cast_into::<PyString>()?, one));
        }
        let key = |name: &Bound<'_, PyString>| name.to_string_lossy().into_owned();
        named.sort_by_key(|(name, _)| key(name));
        let one = Prepared {
            positional,
            named: named.into_iter().map(|(name, one)| (name.unbind(), one)).collect(),
            modes,
            gradient_free,
            value,
        };
        self.change(|all| all.push(Arc::new(one)));
        Ok(true)
    }

    /// Forgets that value.
    fn remove(&self, value: &Bound<'_, PyAny>) {
        self.change(|all| all.retain(|one| !one.value.is(value)));
    }

    /// The value that was added for such a call, and the tensors of this one: positional ones, then by name in the order of the
    /// names. None where there is none, or where gradients are recorded and it is not free of them.
    fn find<'py>(
        &self,
        args: &Bound<'py, PyTuple>,
        kwargs: &Bound<'py, PyDict>,
        modes: &Bound<'py, PyAny>,
        recording: bool,
    ) -> PyResult<Option<(Py<PyAny>, Bound<'py, PyList>)>> {
        let py = args.py();
        let prepared = Arc::clone(&locked(&self.prepared));
        if prepared.is_empty() {
            return Ok(None);
        }
        let positional: SmallVec<[Bound<'py, PyAny>; 8]> = args.iter().collect();
        let names: SmallVec<[(Bound<'py, PyAny>, Bound<'py, PyAny>); 16]> = kwargs.iter().collect();
        let mut given: SmallVec<[Found<'_, 'py>; 16]> = SmallVec::new();
        for object in positional.iter().chain(names.iter().map(|(_, object)| object)) {
            let Some(one) = found(object) else { return Ok(None) };
            given.push(one);
        }
        let (by_position, by_name) = given.split_at(positional.len());
        for one in prepared.iter() {
            if one.positional.len() != by_position.len() || one.named.len() != by_name.len() || (recording && !one.gradient_free) {
                continue;
            }
            let mut tensors: SmallVec<[&Bound<'py, PyAny>; 8]> = SmallVec::new();
            let mut same = one
                .positional
                .iter()
                .zip(by_position)
                .all(|(expected, given)| matches(py, expected, given, &mut tensors));
            for (name, expected) in &one.named {
                let at = names.iter().position(|(given, _)| same_name(given, name.bind(py)));
                same = same && at.is_some_and(|at| matches(py, expected, &by_name[at], &mut tensors));
            }
            if !same || !one.modes.bind(py).eq(modes)? {
                continue;
            }
            if recording {
                for tensor in &tensors {
                    if import::requires_grad(tensor)? {
                        return Ok(None);
                    }
                }
            }
            return Ok(Some((one.value.clone_ref(py), PyList::new(py, tensors)?)));
        }
        Ok(None)
    }
}

impl Guards {
    fn change(&self, how: impl FnOnce(&mut Vec<Arc<Prepared>>)) {
        let mut all = locked(&self.prepared);
        let mut next = all.as_ref().clone();
        how(&mut next);
        let before = std::mem::replace(&mut *all, Arc::new(next));
        drop(all);
        drop(before); // not under the lock: this may run finalisers
    }
}

fn found<'a, 'py>(object: &'a Bound<'py, PyAny>) -> Option<Found<'a, 'py>> {
    if import::is_torch_tensor(object) {
        // What cannot be read (sparse, lazily negated) is for the way that says why.
        let one = read(object, "", None, 0).ok()?;
        return Some(Found::Tensor(object, one.view));
    }
    let plain = object.is_none()
        || object.is_exact_instance_of::<PyBool>()
        || object.is_exact_instance_of::<PyInt>()
        || object.is_exact_instance_of::<PyFloat>()
        || object.is_exact_instance_of::<PyString>()
        || object.is_exact_instance_of::<PyBytes>();
    plain.then_some(Found::Plain(object))
}

fn matches<'a, 'py>(
    py: Python<'py>,
    expected: &Expected,
    given: &Found<'a, 'py>,
    tensors: &mut SmallVec<[&'a Bound<'py, PyAny>; 8]>,
) -> bool {
    match (expected, given) {
        (Expected::Tensor(expected), Found::Tensor(object, view)) => {
            tensors.push(object);
            alike(expected, view)
        }
        (Expected::Plain(expected), Found::Plain(given)) => same_plain(expected.bind(py), given),
        _ => false,
    }
}

fn alike(a: &TensorView, b: &TensorView) -> bool {
    let on_device = matches!(a.place, Place::Device(_));
    on_device
        && a.place == b.place
        && a.dtype == b.dtype
        && a.dims == b.dims
        && a.contiguous == b.contiguous
        && (a.contiguous || a.strides == b.strides)
}

/// One type and one value. A NaN is like nothing, and 0.0 is not -0.0.
fn same_plain(a: &Bound<'_, PyAny>, b: &Bound<'_, PyAny>) -> bool {
    if let (Ok(a), Ok(b)) = (a.cast_exact::<PyFloat>(), b.cast_exact::<PyFloat>()) {
        return a.value() == b.value() && a.value().to_bits() == b.value().to_bits();
    }
    a.is(b) || (a.get_type().is(b.get_type()) && a.eq(b).unwrap_or(false))
}

fn same_name(given: &Bound<'_, PyAny>, name: &Bound<'_, PyString>) -> bool {
    given.is(name) || given.eq(name).unwrap_or(false)
}
