"""Does `jetrt bench` measure what the bare C calls measure? The same plan, the two in turn.

    python benches/bench_agreement.py PLAN [PLAN …]         # writes benches/results/bench_agreement.json

A round is one `jetrt.bench` of the plan (inputs and outputs in device memory) and as many calls of floor_latency.c,
which enqueues, waits, and times by events without Python; both on inputs of the same bytes. Compared are the medians
over all rounds: end to end, and GPU. Once with CUDA graphs and once without, each against its own kind. The target is
2 % on the end-to-end median of calls of a millisecond and more; what a shorter one costs on top, called from Python, is
what host_cost.py measures.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Floor, clocks, compile_floor, machine, markdown, print_targets, target, write

import jetrt
import jetrt.bench
from jetrt.bench import _cuda

LIMIT = 1.02
LONG_MS = 1.0  # calls from here on are held to the limit


def compile_latency() -> ctypes.CDLL:
    library = compile_floor("floor_latency.c")
    numbers, floats = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_double)
    library.floor_latency.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, numbers, numbers, floats]
    return library


@contextlib.contextmanager
def floor_of(library: ctypes.CDLL, plan: Path, shapes: dict[str, Sequence[int]]) -> Iterator[Floor]:
    gpu = _cuda.device(0)
    gpu.enter()
    stream = _cuda.Stream(gpu)
    floor = Floor(library, plan, [shapes], stream.handle)
    try:
        yield floor
    finally:
        floor.close()
        stream.close()


def floor_calls(floor: Floor, mode: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds."""
    _cuda.device(0).enter()
    done, enqueue = (ctypes.c_uint64 * calls)(), (ctypes.c_uint64 * calls)()
    gpu = (ctypes.c_double * calls)()
    floor.check(floor.library.floor_latency(floor.handle, mode, calls, done, enqueue, gpu))
    found = {"end_to_end": done, "enqueue": enqueue, "gpu": gpu}
    return {name: [value / 1e6 for value in values] for name, values in found.items()}


def constant_inputs(engine: jetrt.Engine, shapes: dict[str, Sequence[int]], folder: Path) -> Path | None:
    """The bytes that floor.c fills its inputs with; None where numpy has not all of the types."""
    arrays = {}
    for name, info in engine.inputs.items():
        try:
            dtype = np.dtype(info.dtype)
        except TypeError:
            return None
        shape = tuple(shapes.get(name, info.shape))
        arrays[name] = np.frombuffer(b"\x01" * (math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
    path = folder / "inputs.npz"
    np.savez(path, **arrays)
    return path


def compared(library: ctypes.CDLL, plan: Path, graphs: str, rounds: int, calls: int, folder: Path) -> dict[str, Any]:
    with jetrt.Engine(plan) as engine:
        shapes = {n: list(i.profiles[0][1]) for n, i in engine.inputs.items() if i.profiles and -1 in i.shape}
        inputs = constant_inputs(engine, shapes, folder)
    given = {name: (tuple(shape), None) for name, shape in shapes.items()}
    batch = next((shape[0] for shape in shapes.values()), None)
    timing = {"calls": calls, "seconds": 0, "max_seconds": 1.0}
    ours: dict[str, list[float]] = {"end_to_end": [], "enqueue": [], "gpu": []}
    bare: dict[str, list[float]] = {"end_to_end": [], "enqueue": [], "gpu": []}
    mode = Floor.GRAPH if graphs == "auto" else Floor.ENQUEUE
    ran = ""
    with floor_of(library, plan, shapes) as floor:
        for _ in range(rounds):
            options: dict[str, Any] = {"data": "device", "graphs": graphs, "shapes": given, "timing": timing}
            options["inputs"] = inputs
            if batch is not None:
                options["batches"] = [batch]
            (row,) = jetrt.bench.bench(plan, **options).rows
            if row.status != "ok" or row.end_to_end is None:
                raise SystemExit(f"{plan}: {row.status}: {row.reason}")
            ran = row.graph or ""
            ours["end_to_end"].append(row.end_to_end.median)
            for name in ("enqueue", "gpu"):
                ours[name].append(row.parts[name].median)
            for name, values in floor_calls(floor, mode, calls).items():
                bare[name].append(statistics.median(values))
    medians = {name: (statistics.median(ours[name]), statistics.median(bare[name])) for name in ours}
    return {
        "plan": plan.name,
        "graphs": graphs,
        "ran": ran,
        "shapes": shapes,
        "inputs": "of the same bytes" if inputs else "random and constant",
        "rounds": {"bench": ours, "floor": bare},
        "medians_ms": {name: {"bench": a, "floor": b, "ratio": a / b} for name, (a, b) in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--out", default="bench_agreement")
    arguments = parser.parse_args()
    library = compile_latency()
    before = clocks()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            compared(library, plan, graphs, arguments.rounds, arguments.calls, Path(folder))
            for plan in arguments.plans
            for graphs in ("auto", "off")
        ]
    rows, targets = [], []
    for result in results:
        found = result["medians_ms"]
        cells = [f"{found[name][side]:.4f}" for name in ("end_to_end", "gpu", "enqueue") for side in ("bench", "floor")]
        ratios = [f"{found[name]['ratio']:.4f}" for name in ("end_to_end", "gpu")]
        rows.append([result["plan"], result["ran"], *cells[:2], ratios[0], *cells[2:4], ratios[1], *cells[4:]])
        if found["end_to_end"]["floor"] >= LONG_MS:
            what = f"{result['plan']}, {result['ran']}: bench over the floor, end to end"
            targets.append(target(what, found["end_to_end"]["ratio"], LIMIT, "x"))
    header = ["plan", "", "bench ms", "floor", "ratio", "bench GPU ms", "floor", "ratio", "bench enqueue ms", "floor"]
    print(markdown(header, rows))
    print_targets(targets)
    data = {"machine": machine(), "clocks": {"before": before, "after": clocks()}, "results": results}
    print(write(arguments.out, {**data, "targets": targets}))


if __name__ == "__main__":
    main()
