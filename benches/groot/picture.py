"""The stages of an action, as bars: python benches/groot/picture.py [benches/results/groot_head.json] [-o FILE.png]

One panel for each number of layers, one bar for each variant: ms on the GPU's timeline, from the call until the actions
are there, gaps included. "between" is torch's operations, and whatever the GPU waited for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: Colours that stay apart for colour-blind readers.
COLOURS = {
    "state encoder": "#56B4E9",
    "VL self-attention": "#CC79A7",
    "action encoder": "#009E73",
    "DiT": "#0072B2",
    "action decoder": "#E69F00",
    "between": "#BBBBBB",
}


def bars(bundle: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Variant and ms by stage, in the order of COLOURS; what was not measured is left out."""
    found = []
    for name, row in bundle.get("stages", {}).items():
        if "ms" in row:
            found.append((name, {stage: row["ms"][stage] for stage in COLOURS if row["ms"].get(stage, 0.0) > 0}))
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(layers, bars(bundle)) for layers, bundle in result["bundles"].items()]
    panels = [(layers, rows) for layers, rows in panels if rows]
    if not panels:
        raise SystemExit("no stages in this file: run head.py without --no-counts")
    heights = [len(rows) for _, rows in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, 0.9 + sum(0.42 * n + 0.8 for n in heights)), squeeze=False, height_ratios=heights
    )
    for (layers, rows), (axis,) in zip(panels, axes, strict=True):
        # A bar that would make the others slivers is cut, and says its length.
        ends = {name: sum(stages.values()) for name, stages in rows}
        limit = 1.15 * max(
            (end for name, end in ends.items() if not name.startswith("torch")), default=max(ends.values())
        )
        for place, (name, stages) in enumerate(rows):
            left = 0.0
            for stage, ms in stages.items():
                axis.barh(place, ms, left=left, color=COLOURS[stage], height=0.7)
                left += ms
            cut = ends[name] > limit
            at = 0.93 * limit if cut else left
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5} if cut else None
            axis.text(at, place, f" {left:.2f} ms{' →' if cut else ''}", va="center", fontsize=8, bbox=box)
        axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.08 * limit)
        axis.set_title(f"{layers} layers, S = {result['bundles'][layers]['s']}, 4 steps", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1][0].set_xlabel("ms per action")
    used = [stage for stage in COLOURS if any(stage in stages for _, rows in panels for _, stages in rows)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[stage]) for stage in used]
    figure.legend(handles, used, loc="upper center", ncols=len(used), fontsize=8, frameon=False)
    machine = result["machine"]
    note = (
        f"{machine['gpu']}, TensorRT {machine['libraries'].get('tensorrt')}, torch {machine['versions'].get('torch')}"
    )
    figure.text(0.99, 0.005, note, ha="right", fontsize=7, color="#666666")
    figure.tight_layout(rect=(0, 0.015, 1, 0.96))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS / "groot_head.json")
    parser.add_argument("-o", "--output", type=Path, help="default: the file's name, as .png")
    options = parser.parse_args()
    path = options.output or options.file.with_suffix(".png")
    draw(json.loads(options.file.read_text()), path)
    print(path)


if __name__ == "__main__":
    main()
