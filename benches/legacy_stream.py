"""What an eager call costs on the legacy default stream: enqueued there directly, and on a stream of the engine's that
CUDA orders with it (what jetrt does). Host time with the GPU idle and with work waiting, and time to completion.

    python benches/legacy_stream.py --engines FOLDER
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import engines_folder, machine, markdown, relative_command, summary, write
from host_cost import dit5_inputs

import jetrt


def engine(path: Path, direct: bool) -> jetrt.Engine:
    os.environ["JETRT_LEGACY_DIRECT"] = "1" if direct else "0"  # read when an engine is loaded
    return jetrt.Engine(path, graphs="off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=os.environ.get("JETRT_TEST_ENGINES"))
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    path = engines_folder(arguments.engines) / "dit5.engine"
    inputs = dit5_inputs(122)
    engines = {"direct": engine(path, True), "joined": engine(path, False)}
    busy = torch.randn(8192, 8192, device="cuda")
    samples: dict[str, list[int]] = {}

    def timed(row: str, work: Callable[[], Any]) -> None:
        start = time.perf_counter_ns()
        work()
        samples.setdefault(row, []).append(time.perf_counter_ns() - start)
        torch.cuda.synchronize()

    def to_completion(call: jetrt.Engine) -> None:
        for _ in range(20):
            call(**inputs)
        torch.cuda.synchronize()

    with torch.inference_mode():
        for call in engines.values():
            for _ in range(20):
                call(**inputs)
        torch.cuda.synchronize()
        for _ in range(arguments.rounds):
            for name, call in engines.items():
                timed(f"{name}: host time of a call, GPU idle", lambda call=call: call(**inputs))
                torch.mm(busy, busy)
                timed(f"{name}: host time of a call, a large matrix product waiting", lambda call=call: call(**inputs))
                timed(f"{name}: 20 calls until they are done", lambda call=call: to_completion(call))
    rows = {name: summary(values) for name, values in sorted(samples.items())}
    keys = ("min", "median", "p99")
    print(markdown(("us", *keys), [(n, *(f"{r[k] / 1e3:.1f}" for k in keys)) for n, r in rows.items()]))
    write("legacy_stream", {"command": relative_command(), "machine": machine(), "unit": "ns", "rows": rows})


if __name__ == "__main__":
    main()
