"""Does a Python thread keep ticking while an engine runs?

    python benches/gil.py --engines FOLDER          # writes benches/results/gil.json

A thread ticks every half millisecond while the main thread makes calls that wait some 20 ms each for the GPU (the
engine is queued behind a long kernel). The same with nothing running, and with a wait that holds the GIL on purpose,
shows what the figures look like when all is well and when it is not.
"""

from __future__ import annotations

import argparse
import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from common import clocks, engines_folder, machine, markdown, plain, print_targets, target, write

import jetrt

PERIOD = 0.0005
LATE = 0.005  # a tick that comes this much late was held up by something other than the scheduler
SLEEP = 40_000_000  # GPU cycles in front of each call


def ticks_during(work: Callable[[], Any]) -> dict[str, float]:
    gaps: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(PERIOD)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticker = threading.Thread(target=tick)
    ticker.start()
    time.sleep(0.05)
    gaps.clear()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    seen = list(gaps)
    stop.set()
    ticker.join()
    return {
        "seconds": seconds,
        "ticks": len(seen),
        "ticks_per_second": len(seen) / seconds,
        "late": sum(gap > PERIOD + LATE for gap in seen),
        "longest_gap_ms": 1000 * max(seen, default=seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines")
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--out", default="gil")
    args = parser.parse_args()
    plan = engines_folder(args.engines) / "conv_fp16.engine"
    stream = torch.cuda.Stream()
    x = torch.randn(16, 3, 64, 64, device="cuda")
    host = x.cpu().numpy()
    engines = {name: jetrt.Engine(plan, graphs=name) for name in ("off", "auto")}
    holding = ctypes.PyDLL("libcuda.so.1")  # PyDLL keeps the GIL for the whole call

    def behind_a_long_kernel(call: Callable[[], Any]) -> Callable[[], None]:
        def work() -> None:
            with torch.cuda.stream(stream):
                for _ in range(args.calls):
                    torch.cuda._sleep(SLEEP)
                    call()

        return work

    def hold_the_gil() -> None:
        assert holding.cuStreamSynchronize(ctypes.c_void_p(stream.cuda_stream)) == 0

    for engine in engines.values():
        with torch.cuda.stream(stream):
            for _ in range(20):
                engine(x=x, synchronize=True)
                engine(x=host, stream=stream)
    torch.cuda.synchronize()
    cases = {
        "nothing runs": lambda: time.sleep(2),
        "jetrt eager, synchronize=True": behind_a_long_kernel(lambda: engines["off"](x=x, synchronize=True)),
        "jetrt graph, synchronize=True": behind_a_long_kernel(lambda: engines["auto"](x=x, synchronize=True)),
        "jetrt, numpy in and out": behind_a_long_kernel(lambda: engines["off"](x=host, stream=stream)),
        "control: a wait that holds the GIL": behind_a_long_kernel(hold_the_gil),
    }
    before = clocks()
    rows = {name: ticks_during(work) for name, work in cases.items()}
    limit = rows["nothing runs"]["late"]
    targets = [
        target(f"{name}: no more late ticks than with nothing running", row["late"], limit, "ticks")
        for name, row in rows.items()
        if name.startswith("jetrt")
    ]
    result = {
        "machine": machine(),
        "period_s": PERIOD,
        "late_after_s": LATE,
        "stream": "side stream",
        "rows": rows,
        "targets": targets,
        "engine_stats": {name: plain(engine.stats) for name, engine in engines.items()},
        "clocks": {"before": before, "after": clocks()},
    }
    path = write(args.out, result)
    keys = ("seconds", "ticks_per_second", "late", "longest_gap_ms")
    print(markdown(["while", *keys], [[name, *(f"{row[k]:.2f}" for k in keys)] for name, row in rows.items()]))
    print_targets(targets)
    if rows["control: a wait that holds the GIL"]["late"] <= limit:
        raise SystemExit("the control shows no late tick: this machine cannot show the difference")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
