"""Draws where the time of a plan goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import PlanError, RuntimeNotAvailableError
from ..report import dims
from ._collect import Data
from ._text import short

# Okabe and Ito's colours, which stay apart for colour-blind eyes; what is slow and exact is dark.
COLOURS = {
    "fp32": "#D55E00",
    "tf32": "#E69F00",
    "bf16": "#56B4E9",
    "fp16": "#0072B2",
    "fp8": "#009E73",
    "int8": "#CC79A7",
    "int4": "#CC79A7",
    "fp4": "#009E73",
    "several": "#F0E442",
    "unknown": "#888888",
    "conversion or other": "#CCCCCC",
}


def picture(data: Data, out: str | os.PathLike[str], *, layers: int = 30) -> None:
    """Draws the slowest layers as bars, coloured by precision, and how their shares add up; PNG, SVG or PDF.

    The times are those of this machine, or those that the build stored. Raises `RuntimeNotAvailableError` without
    matplotlib, `PlanError` where there are no times.
    """
    rows, title = _timed(data)
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise RuntimeNotAvailableError(
            "The picture needs the package matplotlib: pip install 'jetrt[plot]'.", missing=["matplotlib"]
        ) from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # type: ignore[import-not-found,unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    from matplotlib.patches import Patch  # type: ignore[import-not-found,unused-ignore]

    ordered = sorted(rows, key=lambda row: -row["ms"])
    shown = ordered[:layers]
    total = sum(row["ms"] for row in ordered)
    kinds = [_kind(row) for row in shown]
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "jetrt"}):
        figure = Figure(figsize=(12, max(1.9 + 0.26 * len(shown), 3.5)), layout="constrained", dpi=130)
        FigureCanvasAgg(figure)
        axes, added = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [5, 1.3]})
        places = range(len(shown))
        bars = axes.barh(places, [row["ms"] for row in shown], color=[COLOURS[kind] for kind in kinds], height=0.76)
        for bar, row in zip(bars, shown, strict=True):
            axes.annotate(
                f"{row['ms']:.3g} ms",
                (bar.get_width(), bar.get_y() + bar.get_height() / 2),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        axes.set_yticks(places, [short(row["name"].replace("$", ""), 60) for row in shown], fontsize=7.5)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, shown[0]["ms"] * 1.12)
        axes.set_xlabel("median time of a layer, ms")

        sums, reached = [], 0.0
        for row in shown:
            reached += row["ms"]
            sums.append(100 * reached / total)
        added.fill_betweenx(places, sums, color="#dddddd")
        added.plot(sums, places, color="#222222", linewidth=1, marker="o", markersize=2.5)
        added.set_xlim(0, 103)
        added.set_xlabel("added up, % of all layers")
        added.tick_params(axis="y", left=False)
        for each in (axes, added):
            each.spines[["top", "right"]].set_visible(False)
            each.grid(axis="x", color="#dddddd", linewidth=0.6)
            each.set_axisbelow(True)

        parts = {kind: sum(r["ms"] for r in ordered if _kind(r) == kind) / total for kind in map(_kind, ordered)}
        handles = [
            Patch(color=COLOURS[kind], label=f"{kind}  {100 * part:.1f} %")
            for kind, part in sorted(parts.items(), key=lambda item: -item[1])
        ]
        axes.legend(handles=handles, title="precision, share of time", loc="lower right", fontsize=8, title_fontsize=8)
        rest = f"{len(shown)} slowest of {len(ordered)} layers, " if len(ordered) > len(shown) else ""
        figure.suptitle(f"{title}\n{rest}{total:.3f} ms in all", fontsize=10, x=0.01, ha="left")
        figure.savefig(out)


def _timed(data: Data) -> tuple[list[Data], str]:
    """The layers that have times, and what they are of."""
    device, manifest = data["device"], data["manifest"]
    name = Path(data["file"]["path"]).name
    if device is not None and device["timing"] is not None:
        layers = device["layers"]
        machine = data["here"] or {}
        at = ", ".join(f"{tensor} {dims(shape)}" for tensor, shape in device["shapes"].items())
        where = f"{machine.get('gpu', 'GPU')}, TensorRT {device['tensorrt']}\nprofile {device['profile']}: {at}"
    elif manifest is not None and manifest["audit"]:
        layers = manifest["audit"].get("layers") or []
        machine = manifest["machine"]
        where = f"{machine['gpu']}, TensorRT {machine['tensorrt']}, as measured when it was built"
    else:
        layers, where = [], ""
    rows = [layer for layer in layers if _drawable(layer)]
    if not rows:
        why = data.get("device_problem") or (device or {}).get("timing_problem") or "no layer took any time"
        raise PlanError(
            f"{name}: no layer times to draw: neither from a GPU ({why}) nor from a manifest.",
            path=data["file"]["path"],
        )
    return rows, f"{name} on {where}"


def _drawable(layer: Any) -> bool:
    """A manifest may hold anything; what took no time is not drawn either."""
    return (
        isinstance(layer, dict)
        and isinstance(layer.get("name"), str)
        and isinstance(layer.get("ms"), (int, float))
        and layer["ms"] > 0
        and set(layer.get("possible") or ()) <= COLOURS.keys()
    )


def _kind(row: Data) -> str:
    possible = row.get("possible") or ()
    if possible:
        return possible[0] if len(possible) == 1 else "several"
    return "unknown" if row.get("matrix") else "conversion or other"
