"""What a bench found, as plain records: a row for each subject, precision, runtime, batch and number of threads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from ..report import table
from .options import RUNTIMES
from .telemetry import Reading
from .timing import Summary
from .verdict import LIMITS, Cause

__all__ = ["COLUMNS", "SCHEMA", "BenchReport", "Row", "Status"]

SCHEMA: Final = "jetrt-bench-1"

#: ok; skipped: it cannot be had here, nothing was run; failed: it raised; nan: measured, and its results hold NaN;
#: interrupted: Ctrl-C came while it ran, the figures are of the calls until then; not run: Ctrl-C came before it;
#: incomplete: a total with a component missing.
Status = Literal["ok", "skipped", "failed", "nan", "interrupted", "not run", "incomplete"]


@dataclass
class Row:
    model: str
    kind: str
    precision: str
    runtime: str
    batch: int | None
    concurrency: int
    status: Status = "not run"
    #: Why it is not ok.
    reason: str = ""
    #: "480", "736x960", "970x1024".
    imgsz: str = ""
    #: Milliseconds of a call from the host's clock, and the parts that the runtime can tell (`timing.PARTS`).
    end_to_end: Summary | None = None
    parts: dict[str, Summary] = field(default_factory=dict)
    #: Frames (samples) per second of all threads together.
    fps: float | None = None
    #: What a call works on.
    frames: int | None = None
    compile_seconds: float | None = None
    compiled_now: bool | None = None
    load_seconds: float | None = None
    #: calls, seconds, stable, reason; ``None`` where there was none.
    warmup: dict[str, Any] | None = None
    verdict: str = ""
    verdict_reasons: list[str] = field(default_factory=list)
    throttled_by: list[Cause] = field(default_factory=list)
    #: state ("passed", "failed", "not compared"), reason, reference, cosine, max_abs, max_rel, outputs.
    accuracy: dict[str, Any] | None = None
    #: Bytes: host_peak (of the process), host_added, device_used (all processes; sampled between calls).
    memory: dict[str, int | None] = field(default_factory=dict)
    before: Reading | None = None
    after: Reading | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    #: "graph" or "eager", where the runtime knows.
    graph: str | None = None
    audit: dict[str, Any] | None = None
    #: The plan or file that ran.
    runs: str | None = None
    #: TensorRT version line -> the command of trtexec that measures the same.
    trtexec: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Which row it is, in a few words."""
        words = [self.model, self.precision, self.runtime]
        words += [f"batch {self.batch}"] if self.batch is not None else []
        words += [f"{self.concurrency} threads"] if self.concurrency != 1 else []
        return " ".join(filter(None, words))

    @property
    def verdict_text(self) -> str:
        """The verdict, "throttled (power)" with what did it."""
        return f"{self.verdict} ({', '.join(self.throttled_by)})" if self.throttled_by else self.verdict

    def shown(self) -> dict[str, str]:
        """The cells for people."""
        return {**self.cells(), "verdict": self.verdict_text}

    def to_mapping(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found |= {
            "end_to_end": None if self.end_to_end is None else asdict(self.end_to_end),
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "before": None if self.before is None else self.before.to_mapping(),
            "after": None if self.after is None else self.after.to_mapping(),
        }
        plain: dict[str, Any] = _plain(found)
        return plain

    def cells(self) -> dict[str, str]:
        """The row of the CSV. What is not known is empty."""
        e, a = self.end_to_end, self.accuracy or {}
        host, device = self.memory.get("host_peak"), self.memory.get("device_used")
        last = self.after or self.before
        copies = [self.parts[name].median for name in ("h2d", "d2h") if name in self.parts]
        known: dict[str, Any] = {
            "model": self.model,
            "imgsz": self.imgsz,
            "precision": self.precision,
            "runtime": RUNTIMES[self.runtime].csv if self.runtime in RUNTIMES else self.runtime,
            "batch": self.batch,
            "mean_ms": e and e.mean,
            "median_ms": e and e.median,
            "p90_ms": e and e.p90,
            "p99_ms": e and e.p99,
            "fps": self.fps,
            "status": self.status,
            "min_ms": e and e.min,
            "max_ms": e and e.max,
            "enqueue_ms": self.parts["enqueue"].median if "enqueue" in self.parts else None,
            "gpu_ms": self.parts["gpu"].median if "gpu" in self.parts else None,
            "copy_ms": sum(copies) if copies else None,
            "concurrency": self.concurrency,
            "calls": e and e.calls,
            "compile_s": self.compile_seconds,
            "load_s": self.load_seconds,
            "verdict": self.verdict,
            "throttled_by": " ".join(self.throttled_by),
            "accuracy": a.get("state"),
            "cosine": a.get("cosine"),
            "max_abs_error": a.get("max_abs"),
            "host_peak_mib": None if host is None else host / 2**20,
            "device_mib": None if device is None else device / 2**20,
            "gpu_clock_mhz": last and last.gpu_clock_mhz,
            "power_w": last and last.power_w,
            "gpu_temp_c": last and last.gpu_temp_c,
            "cpu_temp_c": last and last.cpu_temp_c,
            "reason": self.reason,
        }
        return {name: _cell(value, name) for name, value in known.items()}


@dataclass
class BenchReport:
    rows: list[Row]
    options: dict[str, Any]
    environment: dict[str, Any]
    #: ISO 8601, UTC.
    started: str
    #: Ctrl-C ended it; what was measured until then is here.
    interrupted: bool = False
    #: True once every row was tried.
    complete: bool = False
    #: About the bench as a whole.
    notes: list[str] = field(default_factory=list)
    #: What was written: "csv", "json", "markdown", "picture" -> path.
    files: dict[str, str] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "started": self.started,
            "complete": self.complete,
            "interrupted": self.interrupted,
            "options": self.options,
            "verdict_limits": dict(LIMITS),
            "environment": _plain(self.environment),
            "notes": list(self.notes),
            "rows": [row.to_mapping() for row in self.rows],
        }

    @property
    def size(self) -> str:
        """That of all rows; "mixed" where they differ, "" where nothing has one."""
        sizes = list(dict.fromkeys(row.imgsz for row in self.rows if row.imgsz))
        return sizes[0] if len(sizes) == 1 else "mixed" if sizes else ""

    def table(self) -> str:
        """For a terminal."""
        lines = [[cells[name] for name in _SHOWN] for cells in (row.shown() for row in self.rows)]
        text = table([_SHOWN[name] for name in _SHOWN], lines)
        told: dict[str, list[str]] = {}  # rows with one reason are named together
        for row in self.rows:
            if row.reason and row.status not in ("ok", "not run"):
                told.setdefault(f"{row.status}: {_brief(row.reason)}", []).append(row.label)
            if row.verdict in ("unstable", "throttled"):
                told.setdefault(f"{row.verdict}: {'; '.join(row.verdict_reasons)}", []).append(row.label)
            for note in row.notes:
                told.setdefault(f"note: {_brief(note)}", []).append(row.label)
        reasons = [f"{', '.join(labels)}: {reason}" for reason, labels in told.items()]
        return "\n".join([text, *([""] if reasons else []), *reasons])


_SHOWN = {
    "model": "model",
    "precision": "precision",
    "runtime": "runtime",
    "batch": "batch",
    "concurrency": "threads",
    "median_ms": "median ms",
    "p90_ms": "p90",
    "p99_ms": "p99",
    "gpu_ms": "gpu",
    "enqueue_ms": "enqueue",
    "copy_ms": "copies",
    "fps": "fps",
    "compile_s": "compile s",
    "cosine": "cosine",
    "verdict": "verdict",
    "status": "status",
}


def total(rows: Sequence[Row]) -> list[Row]:
    """For a pipeline of several components: the sum over them, for each (precision, runtime, batch, concurrency), and
    for the fastest row of each. Means add up; so do medians, as the time of a usual pass. Percentiles do not."""
    models = list(dict.fromkeys(row.model for row in rows))
    if len(models) < 2:
        return []
    groups: dict[tuple[str, str, int | None, int], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.precision, row.runtime, row.batch, row.concurrency), {})[row.model] = row
    found = []
    for (precision, runtime, batch, concurrency), members in groups.items():
        if len(members) == len(models) and any(row.end_to_end for row in members.values()):
            found.append(_sum(list(members.values()), precision, runtime, batch, concurrency))
    timed = [row for row in rows if row.status == "ok" and row.end_to_end is not None and row.concurrency == 1]
    least = min((row.batch for row in timed if row.batch is not None), default=None)
    timed = [row for row in timed if row.batch in (None, least)]
    best = {model: min(mine, key=_median) for model in models if (mine := [row for row in timed if row.model == model])}
    if best:
        chosen = _sum([best[m] for m in models if m in best], "fastest", "fastest", None, 1)
        missing = [model for model in models if model not in best]
        if missing:
            chosen.status, chosen.reason = "incomplete", f"no row of {', '.join(missing)} is ok"
            chosen.end_to_end, chosen.parts = None, {}
        chosen.notes = [
            f"{row.model}: {row.precision} {row.runtime} batch {row.batch}"
            + (", whose accuracy failed" if (row.accuracy or {}).get("state") == "failed" else "")
            for row in best.values()
        ]
        found.append(chosen)
    return found


def _median(row: Row) -> float:
    assert row.end_to_end is not None
    return row.end_to_end.median


def _sum(rows: Sequence[Row], precision: str, runtime: str, batch: int | None, concurrency: int) -> Row:
    result = Row("total", "pipeline", precision, runtime, batch, concurrency, status="ok")
    missing = [row.model for row in rows if row.status != "ok" or row.end_to_end is None]
    known = [row.end_to_end for row in rows if row.end_to_end is not None and row.status == "ok"]
    if missing:
        result.status, result.reason = "incomplete", f"no row of {', '.join(missing)} is ok"
    if known and not missing:
        nan = math.nan  # percentiles and extremes of a sum are not those of its parts
        result.end_to_end = Summary(
            min(e.calls for e in known), nan, sum(e.mean for e in known), sum(e.median for e in known), nan, nan, nan
        )
        for part in ("enqueue", "h2d", "gpu", "d2h"):
            if all(part in row.parts for row in rows):
                medians = sum(row.parts[part].median for row in rows)
                means = sum(row.parts[part].mean for row in rows)
                result.parts[part] = Summary(result.end_to_end.calls, nan, means, medians, nan, nan, nan)
        if batch is not None and result.end_to_end.mean > 0 and concurrency == 1:
            result.fps = 1e3 * batch / result.end_to_end.mean
    compiled = [row.compile_seconds for row in rows if row.compile_seconds is not None]
    result.compile_seconds = sum(compiled) if compiled else None
    return result


def _cell(value: Any, name: str) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, float):
        if name == "cosine":
            return f"{value:.7f}"
        if name == "max_abs_error":
            return f"{value:.3g}"
        return f"{value:.4f}" if name.endswith("_ms") else f"{value:.2f}"
    # One line, whatever is in a name or a message; no CSV of Python 3.10 can hold a NUL.
    return " ".join(str(value).replace("\0", "\ufffd").split())


def _brief(text: str, most: int = 300) -> str:
    """On one line; the JSON has all of it."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"


def _plain(value: Any) -> Any:
    """As JSON has it; a float that JSON has no word for becomes null, what is no plain value its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


#: Of the CSV, in this order.
COLUMNS: Final = tuple(Row("", "", "", "", None, 1).cells())
