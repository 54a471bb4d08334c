"""Writes the figures of benches/results/*.json into the pages of PAGES, between two comments such as FIGURES.

python benches/report.py            writes them
python benches/report.py --check    exits 1 where a page says something else
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    ("C, enqueueV3 only", "C, `enqueueV3` only"),
    ("C, 5 shapes + 6 addresses + enqueueV3", "C, 5 shapes + 6 addresses + `enqueueV3`"),
    ("C, cuGraphLaunch", "C, `cuGraphLaunch` of the same"),
    ("torch.cuda.CUDAGraph.replay()", "`torch.cuda.CUDAGraph.replay()` of the same"),
    ("binding, enqueue only", "NVIDIA's Python binding, enqueue only"),
    ("binding, shapes + addresses + enqueue", "NVIDIA's Python binding, shapes + addresses + enqueue"),
    ("TensorRTDiTWrapper", "`TensorRTDiTWrapper` of the GR00T script"),
    ("Engine of trt_torch.py, with its wait", "`Engine` of `trt_torch.py`, with its wait"),
    ("jetrt eager, stable", "**jetrt, eager**"),
    ("jetrt eager, 1000 addresses", "jetrt, eager, 1000 sets of addresses in turn"),
    ("jetrt eager, 2 shapes", "jetrt, eager, 2 shapes in turn"),
    ("jetrt graph, stable", "**jetrt, graph**"),
    ("jetrt graph, 1000 addresses", "jetrt, graphs allowed, 1000 sets of addresses in turn"),
    ("jetrt graph, 2 shapes", "jetrt, graph, 2 shapes in turn"),
]


def load(name: str) -> Any:
    return json.loads((ROOT / "benches" / "results" / f"{name}.json").read_text())


def there(name: str) -> bool:
    return (ROOT / "benches" / "results" / f"{name}.json").exists()


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def us(row: dict[str, float]) -> list[str]:
    return [f"{row[key] / 1e3:.1f}" for key in ("min", "median", "p99")]


def figures() -> str:
    host, allocations, gil = load("host_cost"), load("allocations"), load("gil")
    memory, legacy = load("load_memory"), load("legacy_stream")
    machine, tables = host["machine"], host["tables"]
    versions = machine["versions"]
    side, default = tables["side_stream"]["rows"], tables["default_stream"]["rows"]
    host_rows = [[text, *us(side[name]), *us(default[name])] for name, text in ROWS]
    frameworks = [[name, *us(row)] for name, row in tables["frameworks"]["rows"].items()]
    per_second = tables["threads"]["rows"]
    threads = [[n, *(f"{row[key]:,.0f}" for key in ("min", "median", "max"))] for n, row in per_second.items()]
    legacy_rows = [[name, *us(row)] for name, row in legacy["rows"].items()]
    loads = [
        [
            name,
            f"{row['seconds']:.2f}",
            f"{row['peak_above_start'] / 2**20:,.0f}",
            f"{row['peak_of_mapped_files_above_start'] / 2**20:,.0f}",
        ]
        for name, row in memory["rows"].items()
    ]
    grown = max(row["device_bytes"] for row in allocations["rows"].values())
    counted = ("output_allocations", "staging_allocations")
    made = sum(row["engine_stats_difference"][key] for row in allocations["rows"].values() for key in counted)
    late = {name: row["late"] for name, row in gil["rows"].items()}
    missed = [t for t in host["targets"] if not t["met"]]
    judged = "\n".join(f"- missed: {t['target']}: {t['measured']:.2f} µs, limit {t['limit']:.2f} µs" for t in missed)
    met = len(host["targets"]) - len(missed)
    wide = ["", "side stream: min", "median", "p99", "legacy default stream: min", "median", "p99"]
    peaks = [
        "",
        "seconds",
        "peak host memory that cannot be reclaimed, above the start, MiB",
        "peak of file pages, MiB",
    ]
    return f"""
Measured on one {machine["gpu"]} (driver {machine["driver"]}, {machine["cpus"]} cores of an {machine["cpu"]}), TensorRT
{machine["libraries"]["tensorrt"]}, Python {machine["python"]}, torch {versions["torch"]}, on {machine["date"][:10]}, by
`{machine["command"]}` and its neighbours in `benches/`, all rows of a table interleaved in one run. The machine is
shared: read ratios, and medians before minima. Raw numbers, clocks and counters: `benches/results/`.

Host time of one call, µs, for an engine of 5 CUDA inputs and 1 output (`dit5`, 4 kernels), from torch:

{table(wide, host_rows)}

The targets: 3 µs above the bare C call when eager, 1.1 × the bare launch + 2 µs by graph, 12 × below the script's
wrapper, and no loss against eager when addresses keep changing. {met} of {len(host["targets"])} comparisons met.
{judged}

One input and one output (`mlp`), by library, µs:

{table(["", "min", "median", "p99"], frameworks)}

Calls per second from several threads, each on its own stream:

{table(["", "min", "median", "max"], threads)}

The legacy default stream, µs (TensorRT warns that it may add waits there; with 10.6 and this engine none was seen, and
joining costs nothing measurable, so jetrt joins):

{table(["", "min", "median", "p99"], legacy_rows)}

Loading a plan of {memory["plan_bytes"] / 1e9:.2f} GB:

{table(peaks, loads)}

In {allocations["calls"]:,} warm calls of each kind jetrt allocated {made} buffers; device memory grew by {grown} bytes.
A Python thread that ticks every {gil["period_s"] * 1e3:.1f} ms while an engine runs for 2 s had this many late ticks:
{", ".join(f"{n} ({name})" for name, n in late.items())}.
"""


def accuracy() -> str:
    found, rows = load("build_ocr"), []
    for model, name in (("det", "detection"), ("rec", "recognition")):
        for precision in ("fp32", "fp16", "bf16", "int8"):
            row = found[f"{model}_{precision}"]
            gate = "passed" if row["status"] == 0 else "refused"
            row = row if row["status"] == 0 else row["without limits"]
            shares = sorted(row["audit"]["shares"].items(), key=lambda share: -share[1])
            where = ", ".join(f"{100 * part:.3g} % {kind}" for kind, part in shares)
            cosine, most = min(o["cosine"] for o in row["outputs"]), max(o["max_rel"] for o in row["outputs"])
            rows.append([name, precision, gate, f"{cosine:.6f}", f"{most:.2g}", where])
    return table(["model", "precision", "gate", "cosine", "max rel", "where the time went"], rows)


def cost() -> str:
    medians = load("build_cost")["medians"]
    names = {"binding": "NVIDIA's binding", "jetrt": "jetrt, `--no-parity --no-audit`"}
    keys = ("build_seconds", "seconds", "wall_seconds")
    rows = [
        [names.get(name, name), *(f"{row[key]:.1f}" for key in keys), f"{row['peak_bytes'] / 2**30:.2f} GiB"]
        for name, row in medians.items()
    ]
    against = {key: medians["jetrt"][key] / medians["binding"][key] for key in medians["binding"]}
    rows.append(["jetrt without checks / binding", *(f"{ratio:.3f}" for ratio in against.values())])
    return table(["", "build, s", "process, s", "wall, s", "peak of host memory"], rows)


GROOT = {
    "script: Engine, with its waits and zero fills": "script: `Engine`, with its waits and fills",
    "bare binding, asynchronous": "NVIDIA's binding, asynchronous",
    "bare binding, one graph": "NVIDIA's binding, one graph, inputs in place",
    "bare binding, one graph, inputs copied in": "the same, inputs copied in",
    "bare binding, one graph, constants made beforehand": "the same, inputs in place, constants made beforehand",
    "jetrt: Engine in the unchanged script": "**jetrt in the unchanged script**",
    "jetrt: groot.optimize, one graph": "**jetrt, `optimize`**",
    "jetrt: graph() around the unchanged head": "jetrt, `jetrt.graph` around the unchanged head",
    "script: TensorRTDiTWrapper, the rest in torch": "script: `TensorRTDiTWrapper`, the rest in torch",
    "jetrt: TensorRTDiTWrapper, the rest in torch": "**jetrt's `TensorRTDiTWrapper`**, the rest in torch",
    "jetrt: TensorRTDiTWrapper, groot.optimize, one graph": "**the same, `optimize`**",
    "torch eager": "torch, eager",
    "torch.compile of the DiT": "torch, DiT by torch.compile (for one S)",
}


#: What the shorter tables have.
GROOT_SHORT = [name for name in GROOT if "TensorRTDiTWrapper" not in name and "one graph, " not in name]


def head_table(found: dict[str, Any], what: str, names: Iterable[str] = tuple(GROOT)) -> str:
    """Of a file of benches/groot/head.py: the rows that were run, the targets, and what was not run."""
    rows, absent = [], []
    for layers, bundle in found["bundles"].items():
        varying = bundle.get("varying", {}).get("rows", {})
        for name, text in ((name, GROOT[name]) for name in names):
            if name in bundle["skipped"]:
                absent.append(f"- not run: {layers} layers: «{name}»: {bundle['skipped'][name].splitlines()[0][:200]}")
            if name not in bundle["fixed"]["rows"]:
                continue
            row, counts = bundle["fixed"]["rows"][name], bundle["counts"][name]["profiler"]
            host, device, done = row["host_us"], row["device_ms"], row["done_ms"]
            times = [f"{host['median']:.0f}", f"{device['median']:.2f}", f"{done['median']:.2f}", f"{done['p99']:.2f}"]
            changing = f"{varying[name]['done_ms']['median']:.2f}" if name in varying else ""
            waits = bundle["driver"][name]["waits"]
            rows.append([f"{layers} layers: {text}", *times, changing, f"{waits:g}", f"{counts['fills']:g}"])
    header = [what, "host, µs", "device, ms", "done, ms", "p99", "done, S changing, ms", "waits", "fills"]
    judged = [
        f"- {'met' if t['met'] else 'missed'}: {t['target']}: {t['measured']:.2f}, limit {t['limit']:.2f}"
        for t in found["targets"]
    ]
    return "\n".join([table(header, rows), "", *judged, *absent])


def groot() -> str:
    found, control = load("groot_head"), load("groot_control")["bundles"]["2"]["control"]
    machine = found["machine"]
    more = ""
    if there("groot_head_vl"):
        vl = load("groot_head_vl")
        more += f"""
The same with N1.7's self-attention over the vision-language tokens as an engine too, 14 engine calls (the scripts' 16
are these and one each for vision and language, in the backbone):

{head_table(vl, "action head, N1.7, 14 calls", GROOT_SHORT)}
"""
    if there("groot_head_n16"):
        n16 = load("groot_head_n16")
        (s,) = {bundle["s"] for bundle in n16["bundles"].values()}
        more += f"""
N1.6, S = {s}, 13 engine calls:

{head_table(n16, "action head, N1.6", GROOT_SHORT)}
"""
    robot = [
        [
            f"{title}: {GROOT[name]}",
            f"{row['host_us']['median']:.0f}",
            *(f"{row['done_ms'][k]:.2f}" for k in ("median", "p99", "worst", "jitter")),
        ]
        for title, part in control.items()
        for name, row in part["rows"].items()
    ]
    return f"""
Measured on one {machine["gpu"]} (driver {machine["driver"]}), TensorRT {machine["libraries"]["tensorrt"]}, torch
{machine["versions"]["torch"]}, Python {machine["python"]}, on {machine["date"][:10]}, by `benches/groot/head.py`:
random weights, S = {found["bundles"]["2"]["s"]}, 4 steps, 13 engine calls (4 where only the DiT is an engine), all rows
of a bundle interleaved in one run, medians of {found["settings"]["actions"]} actions after
{found["settings"]["warmup"]}.
"host" is until the call returns, "done" until the actions are there, with one wait; waits and fills are counted.

{head_table(found, "action head, N1.7")}
{more}
As a robot has it, 2 layers, idle between actions (clocks go down, caches go cold):

{table(["", "host, µs", "done, ms", "p99", "worst", "jitter"], robot)}

![What an action's time is spent on](groot_head.png)
"""


PAGES = {
    "README.md": {"FIGURES": figures},
    "docs/building.md": {"ACCURACY": accuracy, "COST": cost},
    "docs/groot.md": {"FIGURES": groot},
}


def main() -> int:
    differ = []
    for name, parts in PAGES.items():
        path = ROOT / name
        wanted = text = path.read_text(encoding="utf-8")
        for mark, write in parts.items():
            head, begin, rest = wanted.partition(f"<!-- {mark} -->")
            _, end, tail = rest.partition(f"<!-- /{mark} -->")
            if not end:
                sys.exit(f"{name} lacks <!-- {mark} --> … <!-- /{mark} -->")
            wanted = f"{head}{begin}\n{write()}\n{end}{tail}"
        if wanted != text:
            differ.append(name)
            if "--check" not in sys.argv:
                path.write_text(wanted, encoding="utf-8")
    if differ and "--check" in sys.argv:
        print(f"{', '.join(differ)}: not the figures of benches/results; run python benches/report.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
