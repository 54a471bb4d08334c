"""A bench as Markdown: the table, what is not ok, the conditions, and how trtexec measures the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .results import BenchReport, Row

__all__ = ["markdown"]

_SHOWN = {
    "model": "component",
    "imgsz": "size",
    "precision": "precision",
    "runtime": "runtime",
    "batch": "batch",
    "concurrency": "threads",
    "median_ms": "median ms",
    "mean_ms": "mean",
    "p90_ms": "p90",
    "p99_ms": "p99",
    "gpu_ms": "GPU",
    "enqueue_ms": "enqueue",
    "copy_ms": "copies",
    "fps": "fps",
    "compile_s": "compile s",
    "cosine": "cosine",
    "max_abs_error": "max error",
    "verdict": "verdict",
    "status": "status",
}


def markdown(report: BenchReport) -> str:
    cells = [row.shown() for row in report.rows]
    used = {name: title for name, title in _SHOWN.items() if any(row[name] for row in cells)}
    lines = ["# Latency", ""]
    if report.interrupted:
        lines += ["**Interrupted: what was measured until then.**", ""]
    elif not report.complete:
        lines += ["**Not complete yet.**", ""]
    lines += _table(list(used.values()), [[row[name] for name in used] for row in cells])
    lines += ["", *_notes(report), *_conditions(report), *_trtexec(report.rows)]
    return "\n".join(lines).rstrip() + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(entries: Sequence[str]) -> str:
        return "| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |"

    return [line(header), "|" + "---|" * len(header), *map(line, rows)]


def _notes(report: BenchReport) -> list[str]:
    told = list(report.notes)
    for row in report.rows:
        where = row.label
        if row.reason:
            told.append(f"{where}: {row.status}: {' '.join(row.reason.split())}")
        if row.accuracy and row.accuracy["state"] == "failed":
            told.append(f"{where}: accuracy: {' '.join(str(row.accuracy['reason']).split())}")
        told += [f"{where}: {row.verdict}: {reason}" for reason in row.verdict_reasons]
        told += [f"{where}: {' '.join(note.split())}" for note in row.notes]
    return ["Notes:", "", *(f"- {entry}" for entry in dict.fromkeys(told)), ""] if told else []


def _conditions(report: BenchReport) -> list[str]:
    timing: dict[str, Any] = report.options["timing"]
    lines = [
        f"Measured from {report.started}: at least {timing['calls']} calls and {timing['seconds']:g} s a row, "
        f"{timing['idle_ms']:g} ms between calls, inputs and outputs in {report.options['data']} memory. Milliseconds; "
        "median, p90 and p99 are end to end, GPU, enqueue and copies are medians.",
    ]
    rows = [row for row in report.rows if row.before is not None and row.after is not None]
    if rows:
        first, last = rows[0].before, rows[-1].after
        assert first is not None
        assert last is not None
        pairs = [
            ("GPU clock", first.gpu_clock_mhz, last.gpu_clock_mhz, "MHz"),
            ("power", first.power_w, last.power_w, "W"),
            ("GPU temperature", first.gpu_temp_c, last.gpu_temp_c, "°C"),
            ("CPU temperature", first.cpu_temp_c, last.cpu_temp_c, "°C"),
        ]
        told = [f"{name} {a:g} → {b:g} {unit}" for name, a, b, unit in pairs if a is not None and b is not None]
        if told:
            lines.append(f"Before the first row and after the last: {', '.join(told)}.")
    return [*lines, ""]


def _trtexec(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row.trtexec]
    if not found:
        return []
    lines = [
        "The same with trtexec. Compare its GPU Compute Time with GPU, Enqueue Time with enqueue, Latency with the",
        "median; its throughput is another figure, since it enqueues the next query before the last one is over.",
        "",
        "```sh",
    ]
    for row in found:
        lines += [f"{command}  # TensorRT {line}" for line, command in row.trtexec.items()]
    return [*lines, "```", ""]
