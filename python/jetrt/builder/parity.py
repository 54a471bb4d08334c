"""The parity gate: what a plan computes against a reference, at min, opt and max of every profile.

TensorRT builds some models wrongly without a word, so its outputs are compared for what they hold (`comparison`), and
what differs by more than the limits (`thresholds`) fails the build.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ManifestError, ParityError
from ..report import dims, table
from .arrays import Array
from .cases import POINTS, Case, Point, points
from .comparison import OutputComparison, compare
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
