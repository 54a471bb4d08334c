"""How far outputs are from the reference.

Compared are:

- shape and type; NaN and infinities, element by element;
- integers and bools exactly;
- floats in float64 (half types widened first) over the finite elements, found `a` against expected `b`:
  cosine = a·b / (|a| |b|), 1 by definition where both are zero everywhere and 0 where one is;
  max abs = max |a-b|; mean abs = mean |a-b| ("L1");
  max rel = max |a-b| / (|b| + eps), eps = mean |b| + `Limits.absolute` / `Limits.max_rel`;
  to peak = max |a-b| / max |b|.

Cosine alone is blind to a few wrong elements among many and to a wrong factor; max rel sees both. Its eps is the usual
size of an element, because rounding gives an element near zero an error that fits its neighbours, not itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..report import dims
from .arrays import Array, dtype_name, widened
from .thresholds import Limits, Thresholds

__all__ = ["OutputComparison", "compare"]


@dataclass(frozen=True)
class OutputComparison:
    """One output at one point. What does not apply is None: integers have no cosine, floats no `differing`."""

    output: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    cosine: float | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    max_rel: float | None = None
    to_peak: float | None = None
    #: Elements where one side is NaN or infinite and the other is something else.
    nonfinite: int = 0
    #: Integer or bool elements that differ.
    differing: int | None = None
    #: The element with the largest error: its index, what was found and what was expected.
    worst: tuple[tuple[int, ...], float, float] | None = None
    #: Largest magnitude of the reference; 0 means that nothing but zeros was compared.
    peak: float = 0.0
    #: Why it failed; empty when it passed.
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.reasons


def compare(
    found: Mapping[str, Array],
    expected: Mapping[str, Array],
    thresholds: Thresholds,
    *,
    dtypes: Mapping[str, str] | None = None,
) -> list[OutputComparison]:
    """Compares every output. `dtypes` are those that the plan was told to have (`--io-formats`) where the model has
    others; any other difference of type fails."""
    dtypes = dtypes or {}
    result = []
    for name in dict.fromkeys([*expected, *found]):
        if name not in found or name not in expected:
            array = expected[name] if name in expected else found[name]
            reason = "the plan has no such output" if name in expected else "the reference has no such output"
            result.append(OutputComparison(name, dtype_name(array), array.shape, array.size, reasons=(reason,)))
        else:
            result.append(_compare(name, found[name], expected[name], thresholds.for_output(name), dtypes.get(name)))
    return result


def _compare(name: str, a: Array, b: Array, limits: Limits, told: str | None) -> OutputComparison:
    base = OutputComparison(name, dtype_name(b), b.shape, b.size)
    if dtype_name(a) not in (dtype_name(b), told):
        return replace(base, reasons=(f"type {dtype_name(a)}, expected {told or dtype_name(b)}",))
    if a.shape != b.shape:
        return replace(base, reasons=(f"shape {dims(a.shape)}, expected {dims(b.shape)}",))
    exact = [array.dtype.kind in "biu" for array in (a, b)]
    if all(exact):
        return _compare_exactly(base, a, b, limits)
    return _compare_floats(base, widened(a), widened(b), limits)


def _compare_exactly(base: OutputComparison, a: Array, b: Array, limits: Limits) -> OutputComparison:
    different = np.flatnonzero(a != b)
    count = int(different.size)
    peak = float(np.abs(b.astype(np.float64)).max(initial=0))
    result = replace(base, differing=count, peak=peak)
    if not count:
        return result
    index = tuple(map(int, np.unravel_index(different[0], b.shape)))
    result = replace(result, worst=(index, float(a[index]), float(b[index])))
    if count > limits.differing * b.size:
        reason = f"{count} of {b.size} elements differ, allowed {limits.differing:g} of them"
        return replace(result, reasons=(reason,))
    return result


class _Chunk(NamedTuple):
    start: int
    a: Array  # float64, finite elements alone
    b: Array
    finite: Array  # where they are in the piece
    wrong: int  # NaN and infinities that do not agree
    nan: int


def _chunks(a: Array, b: Array, size: int = 1 << 20) -> Iterator[_Chunk]:
    """Pieces, so that float64 copies of a large output need not be in memory."""
    flat_a, flat_b = np.ravel(a), np.ravel(b)
    for start in range(0, flat_b.size, size):
        x = flat_a[start : start + size].astype(np.float64)
        y = flat_b[start : start + size].astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        yield _Chunk(start, x[finite], y[finite], finite, int((~finite & ~same).sum()), int(np.isnan(y).sum()))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # of float64 values alone, which TensorRT has not
def _compare_floats(base: OutputComparison, a: Array, b: Array, limits: Limits) -> OutputComparison:
    aa = bb = ab = size_b = size_d = peak = largest = 0.0
    count = wrong = nan = 0
    for chunk in _chunks(a, b):
        wrong, nan, count = wrong + chunk.wrong, nan + chunk.nan, count + chunk.b.size
        if not chunk.b.size:
            continue
        aa += float(chunk.a @ chunk.a)
        bb += float(chunk.b @ chunk.b)
        ab += float(chunk.a @ chunk.b)
        magnitude = np.abs(chunk.b)
        error = np.abs(chunk.a - chunk.b)
        size_b += float(magnitude.sum())
        size_d += float(error.sum())
        peak = max(peak, float(magnitude.max()))
        largest = max(largest, float(error.max()))

    mean = size_b / count if count else 0.0
    eps = mean + (limits.absolute / limits.max_rel if limits.max_rel else 0.0)
    max_rel, where = 0.0, None
    for chunk in _chunks(a, b):
        error = np.abs(chunk.a - chunk.b)
        relative = np.where(error == 0, 0.0, error / (np.abs(chunk.b) + eps))  # x / 0 is infinite, 0 / 0 is 0
        if relative.size and (here := float(relative.max())) > max_rel:
            max_rel = here
            where = chunk.start + int(np.flatnonzero(chunk.finite)[int(relative.argmax())])

    cosine = (1.0 if aa == bb else 0.0) if aa == 0 or bb == 0 else ab / math.sqrt(aa) / math.sqrt(bb)
    result = replace(
        base,
        cosine=min(cosine, 1.0),
        max_abs=largest,
        mean_abs=size_d / count if count else 0.0,
        max_rel=max_rel,
        to_peak=(largest / peak if peak else math.inf) if largest else 0.0,
        nonfinite=wrong,
        peak=peak,
        worst=None if where is None else _element(a, b, where),
    )
    rms = math.sqrt(bb / count) if count else 0.0
    return replace(result, reasons=tuple(_reasons(result, limits, rms, nan)))


def _element(a: Array, b: Array, flat: int) -> tuple[tuple[int, ...], float, float]:
    index = tuple(map(int, np.unravel_index(flat, b.shape)))
    return index, float(a[index]), float(b[index])


def _reasons(result: OutputComparison, limits: Limits, rms: float, nan: int) -> Iterator[str]:
    if result.nonfinite:
        yield f"{result.nonfinite} of {result.elements} elements are NaN or infinite on one side only"
    if nan and nan == result.elements:
        yield "the reference is NaN everywhere, so nothing was compared"
    if limits.cosine is not None and result.cosine is not None and rms:
        # What errors of the size of `absolute` alone may cost is given back.
        allowed = limits.cosine - 2 * (limits.absolute / rms) ** 2
        if not result.cosine >= allowed:
            yield f"cosine {result.cosine:.7g}, allowed from {allowed:.7g}"
    for name in ("max_rel", "max_abs", "mean_abs", "to_peak"):
        found, allowed = getattr(result, name), getattr(limits, name)
        if allowed is not None and not found <= allowed:
            place = ""
            if name == "max_rel" and result.worst is not None:
                index, a, b = result.worst
                place = f" (found {a:.6g} at {dims(index)}, expected {b:.6g})"
            yield f"{name} {found:.4g}, allowed up to {allowed:g}{place}"
