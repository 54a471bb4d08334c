"""Plain-text tables about a model and its latency, as `jetrt run` and the demo print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .runtime import Model, TensorDescription

__all__ = ["io_table", "latency_table", "size", "table"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def size(count: int | None) -> str:
    """Bytes as "2.87 GiB", "64.0 MiB" or "0.5 KiB"; "unknown" for None."""
    if count is None:
        return "unknown"
    for shift, unit in ((30, "GiB"), (20, "MiB")):
        if abs(count) >= 1 << shift:
            return f"{count / (1 << shift):.{2 if shift == 30 else 1}f} {unit}"
    return f"{count / 1024:.1f} KiB" if count else "0"


def dims(shape: Sequence[object]) -> str:
    """`[1, 3, -1]`; -1 is a dynamic dimension."""
    return "[" + ", ".join(map(str, shape)) + "]"


def io_table(model: Model) -> str:
    """Every input and output with type, shape, place, and the ranges of its optimisation profiles."""

    def row(info: TensorDescription) -> list[str]:
        ranges = "; ".join(" / ".join(map(dims, profile)) for profile in info.profiles)
        return [info.mode, info.name, info.dtype, dims(info.shape), info.location, ranges]

    tensors: list[TensorDescription] = [*model.inputs.values(), *model.outputs.values()]
    header = ["", "name", "dtype", "shape", "memory", "min / opt / max"]
    rows = [row(info) for info in tensors]
    if not any(cells[-1] for cells in rows):
        header, rows = header[:-1], [cells[:-1] for cells in rows]
    return table(header, rows)


def percentiles(seconds: Sequence[float]) -> Mapping[str, float]:
    """min, median, p90, p99, max; each a value that was measured (nearest rank)."""
    ordered = sorted(seconds)

    def at(fraction: float) -> float:
        rank = -(-len(ordered) * fraction // 1)  # rounded up
        return ordered[max(int(rank), 1) - 1]

    return {"min": ordered[0], "median": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": ordered[-1]}


def latency_table(seconds: Sequence[float]) -> str:
    """Latency percentiles in milliseconds."""
    values = percentiles(seconds)
    header = ["latency, ms", *values]
    return table(header, [[f"{len(seconds)} calls", *(f"{1e3 * value:.3f}" for value in values.values())]])
