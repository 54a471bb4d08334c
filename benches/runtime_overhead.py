"""What a call costs through `InferenceRuntime.infer` over the call of the engine itself.

    python benches/runtime_overhead.py --engines FOLDER    # writes benches/results/runtime_overhead.json

Same engine, same tensors, same stream, nothing waited for, rows interleaved. The log level is WARNING, as in a program
that set up no logging; the row at DEBUG shows what the timing of each call costs then.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

import torch
from common import (
    Block,
    clocks,
    engines_folder,
    interleave,
    machine,
    markdown,
    plain,
    print_targets,
    python_block,
    summary,
    target,
    write,
)

import jetrt


def at_level(level: int, block: Block) -> Block:
    log = logging.getLogger("jetrt.runtime")

    def run(n: int) -> Sequence[int]:
        before = log.level
        log.setLevel(level)
        try:
            return block(n)
        finally:
            log.setLevel(before)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines")
    parser.add_argument("--engine", default="mlp", help="name of the plan in that folder (mlp)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=int, default=200)
    parser.add_argument("--out", default="runtime_overhead")
    args = parser.parse_args()

    plan = engines_folder(args.engines) / f"{args.engine}.engine"
    log = logging.getLogger("jetrt.runtime")
    log.addHandler(logging.NullHandler())
    log.propagate = False  # a handler's own cost is no part of this
    runtime = jetrt.get_runtime("tensorrt")
    handle = runtime.deserialize_engine(runtime.compile_engine(plan))
    engine: Any = handle.model
    inputs = {}
    for info in engine.inputs.values():
        shape = info.profiles[0][1] if info.profiles else info.shape
        inputs[info.name] = torch.zeros(tuple(shape), dtype=getattr(torch, info.dtype), device="cuda")
    stream = torch.cuda.Stream()

    def row(call: Any, level: int = logging.WARNING) -> Block:
        return at_level(level, python_block(call, stream.synchronize))

    direct = "Engine.__call__"
    rows = {
        direct: row(lambda: engine(**inputs)),
        "Engine.run": row(lambda: engine.run(inputs)),
        "InferenceRuntime.infer": row(lambda: runtime.infer(handle, inputs, synchronize=False)),
        "InferenceRuntime.infer, log level DEBUG": row(
            lambda: runtime.infer(handle, inputs, synchronize=False), logging.DEBUG
        ),
    }
    before = clocks()
    with torch.cuda.stream(stream):
        samples = interleave(rows, args.rounds, args.block)
    results = {name: summary([ns / 1e3 for ns in values]) for name, values in samples.items()}

    header = ["µs", "min", "median", "p99"]
    print(
        markdown(
            header,
            [[name, *(f"{found[key]:.2f}" for key in ("min", "median", "p99"))] for name, found in results.items()],
        )
    )
    over = results["InferenceRuntime.infer"]["median"] - results[direct]["median"]
    targets = [target(f"infer over {direct}, median", over, 1.0, "µs")]
    print_targets(targets)
    write(
        args.out,
        {
            "machine": machine(),
            "clocks": {"before": before, "after": clocks()},
            "plan": plan.name,
            "stats": plain(engine.stats),
            "results_us": results,
            "targets": targets,
        },
    )


if __name__ == "__main__":
    main()
