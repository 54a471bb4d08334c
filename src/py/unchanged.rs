//! `_Unchanged`: is what a graph has baked in of Python objects still there? Asked before each replay, of some dozens of places.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

type Place = (Py<PyDict>, Py<PyAny>);

/// Places in dicts and what was found there: an object (None: nothing), or a tensor at an address; and what has to be empty.
#[pyclass(module = "jetrt._core", name = "_Unchanged", frozen)]
pub struct Unchanged {
    objects: Vec<(Place, Py<PyAny>)>,
    tensors: Vec<(Place, usize)>,
    empty: Vec<Py<PyAny>>,
}

#[pymethods]
impl Unchanged {
    #[new]
    fn new(
        objects: Vec<(Py<PyDict>, Py<PyAny>, Py<PyAny>)>,
        tensors: Vec<(Py<PyDict>, Py<PyAny>, usize)>,
        empty: Vec<Py<PyAny>>,
    ) -> Unchanged {
        Unchanged {
            objects: objects.into_iter().map(|(dict, key, object)| ((dict, key), object)).collect(),
            tensors: tensors.into_iter().map(|(dict, key, address)| ((dict, key), address)).collect(),
            empty,
        }
    }

    /// The position of the first one that changed, counted through the three lists; None where all is as it was.
    fn changed(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        let at = |(dict, key): &Place| dict.bind(py).get_item(key.bind(py));
        for (k, (place, before)) in self.objects.iter().enumerate() {
            let same = match at(place)? {
                Some(now) => now.is(before),
                None => before.is_none(py),
            };
            if !same {
                return Ok(Some(k));
            }
        }
        for (k, (place, before)) in self.tensors.iter().enumerate() {
            let same = match at(place)? {
                Some(now) if !now.is_none() => now.call_method0(intern!(py, "data_ptr"))?.extract::<usize>()? == *before,
                _ => false,
            };
            if !same {
                return Ok(Some(self.objects.len() + k));
            }
        }
        for (k, one) in self.empty.iter().enumerate() {
            if !one.bind(py).is_empty()? {
                return Ok(Some(self.objects.len() + self.tensors.len() + k));
            }
        }
        Ok(None)
    }
}
