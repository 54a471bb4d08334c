"""The cases of the ONNX backend test suite that the package `onnx` brings along; nothing is fetched."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Data on disk, in the package. The kind "real" is left out: large models without data that would have to be fetched.
KINDS = ("simple", "pytorch-operator", "pytorch-converted")


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    model: bytes  # the ONNX file
    rtol: float
    atol: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    #: (inputs, expected outputs) of each run, in the order of the names. Not every value is an array: lists
    #: (sequences), None (an empty optional) and arrays of strings are among them.
    data: tuple[tuple[tuple[Any, ...], tuple[Any, ...]], ...]


def collect() -> list[Case]:
    """Every case, by name: what the package generates for single nodes, and what it stores."""
    cases = sorted([*_generated(), *_stored()], key=lambda case: case.name)
    assert len({case.name for case in cases}) == len(cases)
    return cases


def _case(found: Any, model: Any, data: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> Case:
    return Case(
        name=found.name,
        kind=found.kind,
        model=model.SerializeToString(),
        rtol=found.rtol,
        atol=found.atol,
        inputs=tuple(value.name for value in _fed(model.graph)),
        outputs=tuple(value.name for value in model.graph.output),
        data=tuple((tuple(map(_plain, ins)), tuple(map(_plain, outs))) for ins, outs in data),
    )


def _fed(graph: Any) -> list[Any]:
    """The inputs that a caller gives; in old models the stored weights are inputs too."""
    stored = {weight.name for weight in graph.initializer}
    return [value for value in graph.input if value.name not in stored]


def _plain(value: Any) -> Any:
    import onnx

    if isinstance(value, onnx.TensorProto):  # how the package holds the types that numpy has no name for
        value = onnx.numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _generated() -> Iterator[Case]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflows and divisions by zero that the cases are about
        found = collect_testcases(None)
    return (_case(case, case.model, case.data_sets) for case in found)


def _stored() -> Iterator[Case]:
    import onnx
    from onnx.backend.test.loader import load_model_tests

    for kind in KINDS:
        for found in load_model_tests(kind=kind):
            folder = Path(found.model_dir)
            model = onnx.load(folder / "model.onnx")
            graph = model.graph
            data = [
                (_read(_fed(graph), sets, "input"), _read(graph.output, sets, "output"))
                for sets in sorted(folder.glob("test_data_set_*"))
            ]
            yield _case(found, model, data)


def _read(values: Sequence[Any], folder: Path, stem: str) -> list[Any]:
    import onnx

    arrays = []
    for i, value in enumerate(values):
        content = (folder / f"{stem}_{i}.pb").read_bytes()
        if value.type.HasField("sequence_type"):
            arrays.append(onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(content)))
        elif value.type.HasField("optional_type"):
            arrays.append(onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(content)))
        else:
            arrays.append(onnx.numpy_helper.to_array(onnx.TensorProto.FromString(content)))
    return arrays


def difference(expected: Sequence[Any], found: Sequence[Any], rtol: float, atol: float) -> str | None:
    """What the suite would complain about: count, shapes, types, values. None where all is well.

    Types without arithmetic in numpy are compared as float32, bfloat16 within 2 units in the last place; both are the
    suite's own rules (onnx.backend.test.runner.Runner.assert_similar_outputs).
    """
    if len(expected) != len(found):
        return f"{len(found)} outputs; expected {len(expected)}"
    for i, (want, got) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(want, np.ndarray):
            return f"output {i}: an array; expected {type(want).__name__}"
        if want.shape != got.shape:
            return f"output {i}: shape {list(got.shape)}; expected {list(want.shape)}"
        if want.dtype != got.dtype:
            return f"output {i}: {got.dtype.name}; expected {want.dtype.name}"
        tolerance = max(rtol, 2**-6) if want.dtype.name == "bfloat16" else rtol
        if want.dtype.isbuiltin == 2:  # of ml_dtypes
            want, got = want.astype(np.float32), got.astype(np.float32)
        if want.dtype.kind in "OUS":
            close = np.equal(want, got)
        else:
            with np.errstate(all="ignore"):
                close = np.isclose(got, want, rtol=tolerance, atol=atol, equal_nan=True)
        if not close.all():
            at = tuple(int(k) for k in np.argwhere(~close)[0])
            wrong = f"{int((~close).sum())} of {close.size} values differ"
            return f"output {i}: {wrong}, first at {list(at)}: {got[at]}; expected {want[at]}"
    return None
