"""How far the outputs of a row are from the reference, by the measures and limits of `jetrt build`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..builder.arrays import Array, load_npz, widened
from ..builder.comparison import OutputComparison, compare
from ..builder.reference import ReferenceUnavailable, opened
from ..builder.thresholds import Thresholds
from .options import BenchOptions
from .subjects import Subject

__all__ = ["References", "judged", "not_compared", "with_nan"]


class References:
    """Reference outputs of a subject, computed once for each set of inputs."""

    def __init__(self, subject: Subject, options: BenchOptions) -> None:
        self._subject, self._options = subject, options
        self._known: dict[tuple[Any, ...], tuple[Mapping[str, Array], str]] = {}

    def of(self, inputs: Mapping[str, Array]) -> tuple[Mapping[str, Array], str]:
        """The outputs, and what computed them. Raises `ReferenceUnavailable`, `BuildOptionError`."""
        key = tuple((name, array.shape, array.dtype.str, hash(array.tobytes())) for name, array in inputs.items())
        if key not in self._known:
            self._known[key] = self._computed(inputs)
        return self._known[key]

    def _computed(self, inputs: Mapping[str, Array]) -> tuple[Mapping[str, Array], str]:
        given, subject = self._options.reference, self._subject
        if given is not None and given.suffix.lower() != ".onnx":
            return load_npz(given, "--reference"), f"{given.name}"
        model = given if given is not None else subject.path if subject.kind == "onnx" else None
        if model is not None:
            return self._onnx(model, inputs)
        if subject.kind == "torch":
            return self._torch(inputs)
        what = "a plan does not have its model" if subject.kind == "plan" else "nothing else computes what it does"
        give = "MODEL.onnx or FILE.npz" if subject.kind == "plan" else "FILE.npz"
        raise ReferenceUnavailable(f"there is no reference: {what}. Give --reference {give}.")

    def _onnx(self, model: Path, inputs: Mapping[str, Array]) -> tuple[Mapping[str, Array], str]:
        with opened(model, threads=self._options.threads) as source:
            found = source.compute(inputs)
        versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
        return found.outputs, f"{found.kind} ({versions})"

    def _torch(self, inputs: Mapping[str, Array]) -> tuple[Mapping[str, Array], str]:
        """The module itself in fp32 on the device of the row. Its weights may be narrower; they stay as they are."""
        from .torch_session import TorchSession

        try:
            session = TorchSession.open(
                self._subject, "pytorch_fp16", "fp32", None, self._options, sole=False, inputs=inputs
            )
        except Exception as error:  # the user's code may raise anything
            raise ReferenceUnavailable(f"the module in fp32: {type(error).__name__}: {error}") from error
        try:
            return session.outputs(), f"the module in fp32 on {self._options.device}"
        except Exception as error:
            raise ReferenceUnavailable(f"the module in fp32: {type(error).__name__}: {error}") from error
        finally:
            session.close()


def judged(found: Mapping[str, Array], expected: Mapping[str, Array], what: str, precision: str) -> dict[str, Any]:
    """The record of a row; its cosine and errors are the worst over the outputs."""
    limits = Thresholds.of(precision if precision in _KNOWN else "fp32")
    types = {name: found[name].dtype.name for name in found}
    outputs = compare(found, expected, limits, dtypes=types)
    failed = [output for output in outputs if not output.passed]
    return {
        "state": "failed" if failed else "passed",
        "reason": "; ".join(f"{o.output}: {', '.join(o.reasons)}" for o in failed),
        "reference": what,
        "limits": limits.precision,
        "cosine": _worst(outputs, "cosine", min),
        "max_abs": _worst(outputs, "max_abs", max),
        "max_rel": _worst(outputs, "max_rel", max),
        "outputs": [
            {
                "output": o.output,
                "cosine": o.cosine,
                "max_abs": o.max_abs,
                "max_rel": o.max_rel,
                "differing": o.differing,
                "nonfinite": o.nonfinite,
                "reasons": list(o.reasons),
            }
            for o in outputs
        ],
    }


_KNOWN = ("fp32", "fp16", "bf16", "int8", "fp8", "mixed")


def not_compared(reason: str) -> dict[str, Any]:
    keys = ("reference", "limits", "cosine", "max_abs", "max_rel")
    return {"state": "not compared", "reason": reason, **dict.fromkeys(keys), "outputs": []}


def _worst(outputs: Sequence[OutputComparison], name: str, pick: Any) -> float | None:
    values = [value for output in outputs if (value := getattr(output, name)) is not None and math.isfinite(value)]
    return pick(values) if values else None


def with_nan(found: Mapping[str, Any]) -> str | None:
    """Which outputs hold NaN, as a sentence; ``None``: no one."""
    told = []
    for name, value in found.items():
        wide = widened(np.asarray(value))
        if wide.dtype.kind in "fc" and (count := int(np.isnan(wide).sum())):
            told.append(f"output {name!r}: {count} of {wide.size} elements are NaN")
    return "; ".join(told) or None
