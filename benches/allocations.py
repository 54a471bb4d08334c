"""Allocations per call once an engine is warm; the target is none.

    python benches/allocations.py --engines FOLDER          # writes benches/results/allocations.json

Counted over many calls: what jetrt counts itself (`engine.stats`), what torch's allocator was asked for, free device
memory, the C heap in use, and Python's own blocks.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from typing import Any

import torch
from common import engines_folder, machine, markdown, plain, print_targets, target, write
from host_cost import dit5_inputs, keyword_call

import jetrt


class Heap(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def heap_in_use() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Heap
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def numbers(stats: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in stats.items():
        if isinstance(value, dict):
            flat |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--out", default="allocations")
    args = parser.parse_args()
    plan = engines_folder(args.engines) / "dit5.engine"
    stable, other, shape = dit5_inputs(122), dit5_inputs(122), dit5_inputs(64)
    cases = {"stable": [stable], "2 addresses": [stable, other], "2 shapes": [stable, shape]}
    rows: dict[str, dict[str, Any]] = {}
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for mode, graphs in (("eager", "off"), ("graph", "auto")):
            for case, sets in cases.items():
                engine = jetrt.Engine(plan, graphs=graphs)
                call = keyword_call(engine, sets)

                def calls(n: int, call: Any = call) -> None:
                    for _ in range(n):
                        call()
                    torch.cuda.synchronize()

                calls(2000)
                gc.collect()
                before = numbers(plain(engine.stats))
                heap, blocks = heap_in_use(), sys.getallocatedblocks()
                asked = torch.cuda.memory_stats()["allocation.all.allocated"]
                free = torch.cuda.mem_get_info()[0]
                calls(args.calls)
                free -= torch.cuda.mem_get_info()[0]
                asked = torch.cuda.memory_stats()["allocation.all.allocated"] - asked
                heap, blocks = heap_in_use() - heap, sys.getallocatedblocks() - blocks
                after = numbers(plain(engine.stats))
                rows[f"{mode}, {case}"] = {
                    "device_bytes": free,
                    "torch_allocations": asked,
                    "heap_bytes": heap,
                    "python_blocks": blocks,
                    "engine_stats_difference": {k: v - before.get(k, 0) for k, v in after.items()},
                }
                engine.close()
    targets = [
        target(f"{name}: {what} over {args.calls} calls", row[key], limit, unit)
        for name, row in rows.items()
        for what, key, limit, unit in (
            ("device memory taken", "device_bytes", 0, "bytes"),
            ("allocations asked of torch", "torch_allocations", 0, "allocations"),
            ("growth of the C heap", "heap_bytes", 64 * 1024, "bytes"),
        )
    ]
    result = {
        "machine": machine(),
        "calls": args.calls,
        "stream": "side stream",
        "rows": rows,
        "targets": targets,
    }
    path = write(args.out, result)
    keys = ("device_bytes", "torch_allocations", "heap_bytes", "python_blocks")
    table = [[name, *(str(row[key]) for key in keys)] for name, row in rows.items()]
    print(markdown([f"over {args.calls} calls", *keys], table))
    for name, row in rows.items():
        print(f"\n{name}: {row['engine_stats_difference']}")
    print_targets(targets)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
