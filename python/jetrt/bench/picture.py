"""One picture of a bench: a bar for each row, with what it is made of, and how far p99 reaches."""

from __future__ import annotations

import os

from ..errors import RuntimeNotAvailableError
from .results import BenchReport, Row

__all__ = ["picture"]

# Okabe and Ito's colours, as in the picture of `jetrt inspect`.
_COLOURS = {"h2d": "#56B4E9", "gpu": "#0072B2", "d2h": "#009E73", "rest": "#BBBBBB", "all": "#D55E00"}
_LABELS = {
    "h2d": "copies in",
    "gpu": "GPU",
    "d2h": "copies out",
    "rest": "host, waiting",
    "all": "end to end (parts unknown)",
}
_MOST = 60


def picture(report: BenchReport, out: str | os.PathLike[str]) -> None:
    """Draws medians, PNG, SVG or PDF by the name. Raises `RuntimeNotAvailableError` without matplotlib, or where no row
    has a time."""
    rows = [row for row in report.rows if row.end_to_end is not None and row.runtime != "fastest"]
    if not rows:
        raise RuntimeNotAvailableError("no row has a time to draw.", missing=[])
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise RuntimeNotAvailableError(
            "it needs the package matplotlib: pip install 'jetrt[plot]'.", missing=["matplotlib"]
        ) from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # type: ignore[import-not-found,unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    from matplotlib.patches import Patch  # type: ignore[import-not-found,unused-ignore]

    shown = rows[:_MOST]
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "jetrt"}):
        figure = Figure(figsize=(10, max(1.8 + 0.34 * len(shown), 3.0)), layout="constrained", dpi=130)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        used: dict[str, None] = {}
        reach = 0.0
        for place, row in enumerate(shown):
            summary = row.end_to_end
            assert summary is not None
            left = 0.0
            for name, width in _parts(row).items():
                axes.barh(place, width, left=left, color=_COLOURS[name], height=0.68)
                used[name] = None
                left += width
            end = left
            if summary.p99 == summary.p99:  # a total has none
                axes.plot([left, summary.p99], [place, place], color="#222222", linewidth=0.8)
                axes.plot([summary.p99], [place], color="#222222", marker="|", markersize=6)
                end = max(left, summary.p99)
            reach = max(reach, end)
            axes.annotate(
                _label(row),
                (end, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        axes.set_yticks(range(len(shown)), [_name(row).replace("$", "") for row in shown], fontsize=8)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, reach * 1.3 or 1)
        axes.set_xlabel("median of a call, ms; the line ends at p99")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(
            handles=[Patch(color=_COLOURS[name], label=_LABELS[name]) for name in _COLOURS if name in used],
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncol=5,
            fontsize=8,
            frameon=False,
        )
        rest = f", the first {len(shown)} of {len(rows)} rows" if len(rows) > len(shown) else ""
        partial = ", interrupted" if report.interrupted else ""
        figure.suptitle(f"Latency{_where(report)}{rest}{partial}", fontsize=10, x=0.01, ha="left")
        figure.savefig(out)


def _where(report: BenchReport) -> str:
    names = [gpu.get("name") for gpu in report.environment.get("gpus", []) if isinstance(gpu, dict)]
    size = f", input {report.size}" if report.size not in ("", "mixed") else ""
    return (f" on {names[0]}" if names and names[0] else "") + size


def _parts(row: Row) -> dict[str, float]:
    """What the median is made of; medians of parts need not add up, and what is left over is the host's."""
    summary = row.end_to_end
    assert summary is not None
    known: dict[str, float] = {name: row.parts[name].median for name in ("h2d", "gpu", "d2h") if name in row.parts}
    if "gpu" not in known:
        return {"all": summary.median}
    return {**known, "rest": max(summary.median - sum(known.values()), 0.0)}


def _name(row: Row) -> str:
    more = [f"batch {row.batch}"] if row.batch not in (None, 1) else []
    more += [f"{row.concurrency} threads"] if row.concurrency != 1 else []
    return " ".join([row.model, row.precision, row.cells()["runtime"], *more])


def _label(row: Row) -> str:
    assert row.end_to_end is not None
    median = row.end_to_end.median
    words = [f"{median:.3g} ms" if median < 100 else f"{median:,.0f} ms"]
    words += [f"{row.fps:,.1f} fps" if row.fps < 100 else f"{row.fps:,.0f} fps"] if row.fps else []
    words += [row.verdict_text] if row.verdict in ("unstable", "throttled") else []
    words += [row.status] if row.status != "ok" else []
    return ", ".join(words)
