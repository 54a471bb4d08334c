"""What a notebook shows of an engine: a card with its inputs, outputs and profiles, and a histogram of latencies.

jetrt.notebook.enable()      # an engine as the last line of a cell is then shown as its card
jetrt.notebook.Card(engine)
jetrt.notebook.Histogram(seconds)
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import dims, io_table, latency_table, percentiles, size

__all__ = ["Card", "Histogram", "enable"]


def enable() -> None:
    """Shows engines as cards in this IPython. Raises RuntimeError outside of it."""
    try:
        from IPython import get_ipython  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise RuntimeError("IPython is not installed: a card is shown in a notebook") from None
    from ._core import Engine

    shell: Any = get_ipython()
    if shell is None:
        raise RuntimeError("this is no IPython: a card is shown in a notebook")
    shell.display_formatter.formatters["text/html"].for_type(Engine, lambda engine: Card(engine)._repr_html_())


@dataclass(frozen=True)
class Card:
    """An engine: what it is, its inputs and outputs, its profiles, and what its calls did so far."""

    engine: Any

    def _facts(self) -> dict[str, str]:
        engine, stats = self.engine, self.engine.stats
        report = engine.load_report
        facts = {
            "plan": f"{Path(engine.path).name}, {size(report['bytes'])}, loaded in {report['seconds']:.2f} s",
            "TensorRT": f"{engine.tensorrt_version} on GPU {engine.device}",
            "memory of a context": size(engine.device_memory_size),
            "profiles": str(engine.num_profiles),
            "calls": f"{stats['calls']}: {stats['replays']} as graphs, {stats['eager']} eager",
            "copies": f"{stats['casts']} casts, {stats['strided_copies']} of strided inputs",
        }
        if stats["graph_failures"]:
            facts["graphs that failed"] = "; ".join(stats["graph_failures"].values())
        return facts

    def __repr__(self) -> str:
        rows = "\n".join(f"{name}: {value}" for name, value in self._facts().items())
        return f"{self.engine.name}\n{rows}\n{io_table(self.engine)}"

    def _repr_html_(self) -> str:
        tensors = [*self.engine.inputs.values(), *self.engine.outputs.values()]
        rows = [
            [t.mode, t.name, t.dtype, dims(t.shape), *[" / ".join(map(dims, profile)) for profile in t.profiles]]
            for t in tensors
        ]
        count = max(map(len, rows), default=4)
        header = ["", "name", "dtype", "shape", *(f"profile {i}: min / opt / max" for i in range(count - 4))]
        facts = [[name, value] for name, value in self._facts().items()]
        return (
            f"<h4>{html.escape(self.engine.name)}</h4>{_table([], facts)}"
            f"{_table(header, [row + [''] * (count - len(row)) for row in rows])}"
        )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = line(header, "th") if header else ""
    return f"<table>{head}{''.join(line(row, 'td') for row in rows)}</table>"


@dataclass(frozen=True)
class Histogram:
    """Latencies in seconds, as counts over milliseconds with the percentiles below. Raises ValueError for none, and for
    what is no time."""

    seconds: Sequence[float]
    bins: int = 40

    def __post_init__(self) -> None:
        if not self.seconds or not all(math.isfinite(s) and s >= 0 for s in self.seconds):
            raise ValueError("seconds: found none, or one that is negative or not finite; allowed: at least one time")
        if self.bins < 1:
            raise ValueError(f"bins: found {self.bins}; allowed: at least 1")

    def counts(self) -> list[int]:
        """How many fall into each of the bins between the least and the most."""
        low, high = min(self.seconds), max(self.seconds)
        width = (high - low) / self.bins
        found = [0] * self.bins
        for value in self.seconds:
            found[min(int((value - low) / width), self.bins - 1) if width > 0 else 0] += 1
        return found

    def __repr__(self) -> str:
        return latency_table(self.seconds)

    def _repr_html_(self) -> str:
        counts, low, high = self.counts(), min(self.seconds), max(self.seconds)
        height, step = 120, 10
        most = max(counts)
        bars = "".join(
            f'<rect x="{i * step}" y="{height - h:.1f}" width="{step - 1}" height="{h:.1f}" fill="currentColor"/>'
            for i, count in enumerate(counts)
            for h in [count / most * height]
        )
        width = step * self.bins
        ends = f"{1e3 * low:.3f} ms", f"{1e3 * high:.3f} ms"
        labels = (
            f'<text x="0" y="{height + 16}" font-size="12">{ends[0]}</text>'
            f'<text x="{width}" y="{height + 16}" font-size="12" text-anchor="end">{ends[1]}</text>'
        )
        values = percentiles(self.seconds)
        rows = [[f"{1e3 * value:.3f}" for value in values.values()]]
        picture = f'<svg width="{width}" height="{height + 20}" role="img">{bars}{labels}</svg>'
        return f"{picture}{_table([f'{name}, ms' for name in values], rows)}"
