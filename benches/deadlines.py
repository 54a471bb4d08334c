"""Deadlines under the load of a vision stack: small calls at 39 Hz from several threads beside a larger engine.

    python benches/deadlines.py --engines FOLDER --seconds 180    # writes benches/results/deadlines.json

One shared runtime serves all: at every frame (3 Hz) a re-ranker makes 10 small calls and a matcher 3, in threads of
their own and spread over the frame; another thread runs a larger engine once a frame; a fourth reads the thermal state
once a second. A call is due at its place in the schedule and must be answered, with the right result, before the next
one of its consumer is due. Late, wrong and lost calls are counted. Arrays are numpy's, so that each call copies in,
computes, copies out and waits.
"""

from __future__ import annotations

import argparse
import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FRAMES_PER_SECOND = 3.0


@dataclass(frozen=True)
class Consumer:
    """Who calls which engine how often."""

    name: str
    handle: Any
    #: Sets of inputs, taken in turn, and what they must give.
    inputs: Sequence[Mapping[str, Any]]
    expected: Sequence[Mapping[str, Any]]
    calls_per_frame: int

    @property
    def period(self) -> float:
        return 1.0 / (FRAMES_PER_SECOND * self.calls_per_frame)


@dataclass
class Count:
    """What became of a consumer's calls. Seconds from the moment a call was due to its result."""

    due: int = 0
    answered: int = 0
    wrong: int = 0
    late: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.due - self.answered


def consumer(runtime: Any, handle: Any, name: str, calls_per_frame: int, *, sets: int = 4, seed: int = 0) -> Consumer:
    """A consumer with random inputs of the usual shapes; what they must give is computed now, one call at a time."""
    rng = np.random.default_rng(seed)
    inputs = []
    for _ in range(sets):
        made = {}
        for info in handle.model.inputs.values():
            shape = tuple(info.profiles[0][1] if info.profiles else info.shape)
            made[info.name] = rng.standard_normal(shape).astype(info.dtype)
        inputs.append(made)
    expected = [{k: np.array(v) for k, v in runtime.infer(handle, each).items()} for each in inputs]
    return Consumer(name, handle, inputs, expected, calls_per_frame)


def load_test(runtime: Any, consumers: Sequence[Consumer], seconds: float) -> dict[str, Count]:
    """Runs the schedule. Every due call is made, however late it is."""
    counts = {each.name: Count() for each in consumers}
    begin = time.perf_counter() + 0.05

    def consume(one: Consumer) -> None:
        count = counts[one.name]
        for index in range(max(1, int(seconds / one.period))):
            due = begin + index * one.period
            while (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            count.due += 1
            turn = index % len(one.inputs)
            try:
                found = runtime.infer(one.handle, one.inputs[turn])
            except Exception as error:
                count.failed.append(f"{type(error).__name__}: {error}")
                continue
            taken = time.perf_counter() - due
            count.answered += 1
            count.seconds.append(taken)
            count.late += taken > one.period
            count.wrong += not all(
                np.allclose(found[name], value, rtol=1e-3, atol=1e-3) for name, value in one.expected[turn].items()
            )

    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            runtime.thermal_state()

    watcher = threading.Thread(target=watch)
    watcher.start()
    threads = [threading.Thread(target=consume, args=(each,)) for each in consumers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    return counts


def main() -> None:
    from common import clocks, engines_folder, machine, markdown, plain, print_targets, summary, target, write

    import jetrt
    from jetrt.runtime import shared_runtime

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines")
    parser.add_argument("--small", default="mlp", help="plan of the re-ranker and the matcher (mlp)")
    parser.add_argument("--large", default="conv_fp16", help="plan of the larger engine (conv_fp16)")
    parser.add_argument("--large-calls", type=int, default=1, help="calls of the larger engine in a frame (1)")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--out", default="deadlines")
    args = parser.parse_args()

    folder = engines_folder(args.engines)
    runtime = shared_runtime({"name": "tensorrt", "tensorrt": {"max_contexts": 2}})
    handles = {
        name: runtime.deserialize_engine(runtime.compile_engine(folder / f"{name}.engine"))
        for name in (args.small, args.large)
    }
    consumers = [
        consumer(runtime, handles[args.small], "re-ranker", 10, seed=1),
        consumer(runtime, handles[args.small], "matcher", 3, seed=2),
        consumer(runtime, handles[args.large], "larger engine", args.large_calls, seed=3),
    ]
    before = clocks()
    counts = load_test(runtime, consumers, args.seconds)

    rows, results = [], {}
    for each in consumers:
        count = counts[each.name]
        times = summary([1e3 * value for value in count.seconds]) if count.seconds else {}
        times["max"] = 1e3 * max(count.seconds, default=float("nan"))
        found = dataclasses.asdict(count)
        del found["seconds"]
        results[each.name] = {**found, "lost": count.lost, "deadline_ms": 1e3 * each.period, "ms": times}
        rows.append(
            [
                each.name,
                f"{1 / each.period:.0f}",
                f"{1e3 * each.period:.1f}",
                *(str(number) for number in (count.due, count.lost, count.wrong, count.late)),
                *(f"{times.get(key, float('nan')):.2f}" for key in ("median", "p99", "max")),
            ]
        )
    print(
        markdown(
            ["consumer", "Hz", "deadline, ms", "due", "lost", "wrong", "late", "median, ms", "p99, ms", "max, ms"], rows
        )
    )
    targets = [
        target(f"{what} calls", sum(results[each.name][what] for each in consumers), 0, "calls")
        for what in ("lost", "wrong", "late")
    ]
    print_targets(targets)
    write(
        args.out,
        {
            "machine": machine(),
            "clocks": {"before": before, "after": clocks()},
            "seconds": args.seconds,
            "plans": {"small": args.small, "large": args.large},
            "runtime": runtime.current_runtime_label(),
            "thermal": plain(dataclasses.asdict(runtime.thermal_state())),
            "jetrt": jetrt.__version__,
            "results": results,
            "targets": targets,
        },
    )


if __name__ == "__main__":
    main()
