"""The parity gate: what a plan computes against a reference, at min, opt and max of every profile.

TensorRT builds some models wrongly without a word, so the outputs are compared for what they hold:

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ..errors import ManifestError, ParityError
from ..report import dims, table
from .arrays import Array, dtype_name, widened
from .cases import POINTS, Case, Point, points
from .thresholds import Limits, Thresholds, refused

if TYPE_CHECKING:
    from .reference import Reference

__all__ = [
    "POINTS",
    "Case",
    "CaseReport",
    "Limits",
    "OutputComparison",
    "ParityReport",
    "Thresholds",
    "compare",
    "gate",
    "judge",
    "not_run",
    "points",
]

# ---------------------------------------------------------------------------------------------------------- comparison


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


# -------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class CaseReport:
    profile: int
    point: Point
    #: Of the inputs.
    shapes: Mapping[str, tuple[int, ...]]
    outputs: tuple[OutputComparison, ...]


@dataclass(frozen=True)
class ParityReport:
    """Passed and failed are verdicts; "not run" means that nothing is known, and says why."""

    state: Literal["passed", "failed", "not run"]
    reason: str | None = None
    #: `Reference.to_mapping`: kind, versions, settings.
    reference: Mapping[str, Any] | None = None
    thresholds: Thresholds | None = None
    cases: tuple[CaseReport, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Where the comparison shows less than it seems to."""
        result = []
        for name in dict.fromkeys(output.output for case in self.cases for output in case.outputs):
            seen = [output for case in self.cases for output in case.outputs if output.output == name]
            if all(output.elements == 0 for output in seen):
                result.append(f"output {name!r} has no elements at any point, so no value was compared; give --inputs")
            elif all(output.peak == 0 for output in seen):
                result.append(f"output {name!r} is 0 everywhere in the reference, which shows little; give --inputs")
        return result

    def failures(self) -> list[tuple[CaseReport, OutputComparison]]:
        return [(case, output) for case in self.cases for output in case.outputs if not output.passed]

    def table(self) -> str:
        """The kind of reference, a line for each output at each point, reasons and notes."""
        reference = self.reference or {}
        versions = ", ".join(f"{name} {version}" for name, version in reference.get("versions", {}).items())
        lines = [f"parity {self.state}" + (f": {self.reason}" if self.reason else "")]
        if reference:
            lines.append(f"reference: {reference.get('kind')}" + (f" ({versions})" if versions else ""))
        rows = []
        for case in self.cases:
            for o in case.outputs:
                verdict = "; ".join(o.reasons) or "passed"
                values = [_shown(getattr(o, name)) for name in ("cosine", "max_abs", "max_rel", "differing")]
                rows.append([f"{case.profile}.{case.point}", o.output, f"{o.dtype}{dims(o.shape)}", *values, verdict])
        if rows:
            lines += ["", table(["point", "output", "type", "cosine", "max abs", "max rel", "differ", ""], rows)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON; a float that JSON has no word for is text ("inf")."""
        return {
            "state": self.state,
            "reason": self.reason,
            "reference": dict(self.reference) if self.reference is not None else None,
            "thresholds": self.thresholds.to_mapping() if self.thresholds is not None else None,
            "cases": [
                {
                    "profile": case.profile,
                    "point": case.point,
                    "shapes": {name: list(shape) for name, shape in case.shapes.items()},
                    "outputs": [_plain(asdict(output)) for output in case.outputs],
                }
                for case in self.cases
            ],
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> ParityReport:
        """Raises `ManifestError` for a mapping that `to_mapping` cannot have made."""
        try:
            state = data["state"]
            if state not in ("passed", "failed", "not run"):
                raise ValueError(f"state is {state!r}")
            thresholds = data.get("thresholds")
            report = cls(
                state,
                data.get("reason"),
                data.get("reference"),
                Thresholds.from_mapping(thresholds) if thresholds is not None else None,
                tuple(_case_from(case) for case in data.get("cases", ())),
            )
            if (state == "passed") != (bool(report.cases) and not report.failures()):
                raise ValueError(f"state is {state!r}, and the cases say something else")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(error) from error
        return report


def _damaged(error: Exception) -> ManifestError:
    why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return ManifestError(f"parity: the record is damaged: {why}. Compare again with `jetrt verify`.")


def _shown(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.7g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _case_from(data: Mapping[str, Any]) -> CaseReport:
    if data["point"] not in POINTS:
        raise ValueError(f"point is {data['point']!r}")
    shapes = {name: tuple(map(int, shape)) for name, shape in data["shapes"].items()}
    return CaseReport(int(data["profile"]), data["point"], shapes, tuple(map(_output_from, data["outputs"])))


def _output_from(data: Mapping[str, Any]) -> OutputComparison:
    values = dict(data)
    for name in ("cosine", "max_abs", "mean_abs", "max_rel", "to_peak"):
        values[name] = None if data[name] is None else float(data[name])
    values["peak"] = float(data["peak"])
    values["shape"] = tuple(map(int, data["shape"]))
    values["reasons"] = tuple(map(str, data["reasons"]))
    if data["worst"] is not None:
        index, found, expected = data["worst"]
        values["worst"] = (tuple(map(int, index)), float(found), float(expected))
    return OutputComparison(**values)


def not_run(reason: str, thresholds: Thresholds | None = None) -> ParityReport:
    return ParityReport("not run", _line(reason), thresholds=thresholds)


def _line(text: str) -> str:
    """One line, as a manifest keeps it."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def judge(
    cases: Sequence[Case],
    found: Sequence[Mapping[str, Array]],
    references: Sequence[Reference],
    thresholds: Thresholds,
    *,
    dtypes: Mapping[str, str] | None = None,
) -> ParityReport:
    """The report for the outputs of a plan (`found`) and of the reference at the same cases, in the same order."""
    if not cases:
        return not_run("there was no case to compare", thresholds)
    reports = []
    for case, outputs, reference in zip(cases, found, references, strict=True):
        shapes = {name: array.shape for name, array in case.inputs.items()}
        compared = compare(outputs, reference.outputs, thresholds, dtypes=dtypes)
        reports.append(CaseReport(case.profile, case.point, shapes, tuple(compared)))
    names = dict.fromkeys(output.output for report in reports for output in report.outputs)
    if not names:
        return not_run("neither the plan nor the reference has an output", thresholds)
    unknown = [name for name in thresholds.outputs if name not in names]
    if unknown:
        raise refused("there is no such output", ", ".join(unknown), ", ".join(names))
    report = ParityReport("passed", None, references[0].to_mapping(), thresholds, tuple(reports))
    failures = report.failures()
    if not failures:
        return report
    where, output = failures[0]
    total = sum(len(each.outputs) for each in reports)
    first = f"output {output.output!r} at {where.point} of profile {where.profile}: {'; '.join(output.reasons)}"
    return replace(report, state="failed", reason=_line(f"{len(failures)} of {total} comparisons; {first}"))


def gate(report: ParityReport, *, allow_not_run: bool = False) -> None:
    """Raises `ParityError` unless the report passed (or was not run, where that is allowed)."""
    if report.state == "not run" and not allow_not_run:
        raise ParityError(
            f"Parity was not checked: {report.reason} Install what is missing, give --reference out.npz, "
            "or build with --no-parity to take the plan unchecked.",
            failures=[],
        )
    if report.state != "failed":
        return
    failures = report.failures()
    case, output = failures[0]
    more = f" So do {len(failures) - 1} other comparisons." if len(failures) > 1 else ""
    precision = report.thresholds.precision if report.thresholds is not None else "fp32"
    raise ParityError(
        f"output {output.output!r} at {case.point} of profile {case.profile} differs from the reference "
        f"({(report.reference or {}).get('kind')}): {'; '.join(output.reasons)}.{more} {_next_step(output, precision)}",
        failures=[{"profile": c.profile, "point": c.point, **_plain(asdict(o))} for c, o in failures],
    )


def _next_step(output: OutputComparison, precision: str) -> str:
    """What to try first."""
    reduced = precision not in ("fp32", "tf32")
    if output.nonfinite and reduced:
        return "Values that half precision cannot hold come from norms most often: --fp32-norms, or --precision bf16."
    if output.differing or (output.dtype.startswith(("int", "uint", "bool"))):
        return (
            "An index of a maximum flips where values tie or nearly do, and a row count follows it: "
            f"give real data with --inputs, or allow some with --parity-limit '{output.output}:differing=0.01'."
        )
    if reduced:
        return (
            "--precision fp32 tells whether an operator is wrong or only rounded; if rounded, "
            "--fp32-norms or --fp32-patterns keep single layers in fp32. "
            "If random inputs are not what the model expects, give real ones with --inputs."
        )
    return (
        "fp32 rounds too little for this: the parser or a kernel computes something else than the ONNX. "
        "Try another --opt-level or TensorRT version, or export that operator differently; "
        "if random inputs are not what the model expects, give real ones with --inputs."
    )
