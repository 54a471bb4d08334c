"""Warming up, measuring, and the figures of a row of samples.

A call is timed by itself, the next one begins when it is over (a closed loop), and `idle_ms` may pass between two.

Warm-up ends when the medians of the last two windows of calls differ by no more than `STABLE`, at the earliest after
`min_calls` calls and `MIN_WARMUP_SECONDS`, at the latest after `max_seconds`; that it ended without becoming stable is
said. Measuring ends when both `calls` and `seconds` are reached, or at `limit_seconds`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

__all__ = [
    "PARTS",
    "Call",
    "Measured",
    "Plan",
    "Sample",
    "Summary",
    "Warmed",
    "measure",
    "percentile",
    "warm_up",
]

STABLE = 0.02
WINDOW = 10
MIN_WARMUP_SECONDS = 0.2

#: Parts of a call that a runtime may be able to tell apart.
PARTS = ("enqueue", "h2d", "gpu", "d2h")


class Sample(NamedTuple):
    """One call, in milliseconds. What the runtime cannot tell is ``None``, never 0."""

    #: Host clock from before the call until its results can be read.
    end_to_end: float
    #: Host clock from before the call until it returned, the work still running.
    enqueue: float | None = None
    #: CUDA events about the copies in, the computation and the copies out.
    h2d: float | None = None
    gpu: float | None = None
    d2h: float | None = None


class Call(Protocol):
    """One measured call; for one thread."""

    def __call__(self) -> Sample: ...


@dataclass(frozen=True)
class Plan:
    """How long a row is warmed up and measured."""

    calls: int = 200
    seconds: float = 2.0
    limit_seconds: float = 60.0
    min_calls: int = 10
    max_seconds: float = 10.0
    idle_ms: float = 0.0


# ------------------------------------------------------------------------------------------------------------- figures


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest sample that at least this share of all samples does not exceed; always a sample."""
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


@dataclass(frozen=True)
class Summary:
    """Milliseconds over the samples of a row."""

    calls: int
    min: float
    mean: float
    median: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary | None:
        """``None`` without samples."""
        if not samples:
            return None
        ordered = sorted(samples)
        return cls(
            calls=len(ordered),
            min=ordered[0],
            mean=statistics.fmean(ordered),
            median=statistics.median(ordered),
            p90=percentile(ordered, 0.90),
            p99=percentile(ordered, 0.99),
            max=ordered[-1],
        )


# ------------------------------------------------------------------------------------------------------------- warm-up


@dataclass(frozen=True)
class Warmed:
    calls: int
    seconds: float
    stable: bool
    #: Why it is not stable, or what failed; empty otherwise.
    reason: str = ""


def warm_up(call: Call, plan: Plan, *, clock: Callable[[], float] = time.perf_counter) -> Warmed:
    """Calls until the times are stable. What a call raises goes through."""
    begin = clock()
    times: list[float] = []
    while True:
        times.append(call().end_to_end)
        elapsed = clock() - begin
        enough = len(times) >= plan.min_calls and elapsed >= min(MIN_WARMUP_SECONDS, plan.max_seconds)
        if enough and len(times) >= 2 * WINDOW:
            before, last = (statistics.median(times[-2 * WINDOW : -WINDOW]), statistics.median(times[-WINDOW:]))
            if abs(last - before) <= STABLE * min(before, last):
                return Warmed(len(times), elapsed, True)
        if elapsed >= plan.max_seconds:
            reason = (
                f"two windows of {WINDOW} calls still differed by more than {STABLE:.0%} after {elapsed:.1f} s"
                if len(times) >= 2 * WINDOW
                else f"{len(times)} calls took {elapsed:.1f} s, too few to compare two windows of {WINDOW}"
            )
            return Warmed(len(times), elapsed, False, reason)


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Measured:
    """Samples in the order of the calls; of several threads the first of each, the second of each, and so on."""

    samples: list[Sample] = field(default_factory=list)
    #: From the first call of any thread to the end of the last, less the idling that was asked for.
    busy_seconds: float = 0.0
    #: What ended it early; ``None``: it was complete.
    stopped: BaseException | None = None
    #: Whether `limit_seconds` ended it before the calls were reached.
    limited: bool = False

    def part(self, name: str) -> list[float]:
        values = (getattr(sample, name) for sample in self.samples)
        return [value for value in values if value is not None]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection in the middle of a call; what exists now is not walked again."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure(calls: Sequence[Call], plan: Plan, *, tick: Callable[[], None] = lambda: None) -> Measured:
    """Measures as many threads as there are calls. An error or Ctrl-C ends it and is in `stopped`, with the samples
    so far. `tick` is called now and then, between two calls of the first thread."""
    stop = threading.Event()
    found = [_Thread(call, plan, stop) for call in calls]
    result = Measured()
    with _quiet():
        begin = time.perf_counter()
        others = [threading.Thread(target=each.run, daemon=True) for each in found[1:]]
        try:
            for thread in others:
                thread.start()
            found[0].run(tick)
            for thread in others:
                while thread.is_alive():
                    thread.join(0.2)
                    tick()
        except KeyboardInterrupt as interrupt:
            result.stopped = interrupt
        finally:
            stop.set()
            for thread in others:
                thread.join()
        wall = time.perf_counter() - begin
    together = itertools.zip_longest(*(each.samples for each in found))
    result.samples = [sample for one_of_each in together for sample in one_of_each if sample is not None]
    for each in found:
        result.stopped = result.stopped or each.error
        result.limited |= each.limited
    idle = max((each.idled for each in found), default=0.0)
    result.busy_seconds = max(wall - idle, 0.0)
    return result


class _Thread:
    def __init__(self, call: Call, plan: Plan, stop: threading.Event) -> None:
        self.samples: list[Sample] = []
        self.error: BaseException | None = None
        self.limited = False
        self.idled = 0.0
        self._call, self._plan, self._stop = call, plan, stop

    def run(self, tick: Callable[[], None] = lambda: None) -> None:
        plan, call, samples = self._plan, self._call, self.samples
        pause = plan.idle_ms / 1e3
        begin = looked = time.perf_counter()
        try:
            while not self._stop.is_set():
                samples.append(call())
                now = time.perf_counter()
                if (len(samples) >= plan.calls and now - begin >= plan.seconds) or now - begin >= plan.limit_seconds:
                    self.limited = len(samples) < plan.calls
                    break
                if now - looked > 0.1:
                    tick()
                    looked = time.perf_counter()
                if pause:
                    before = time.perf_counter()
                    time.sleep(pause)
                    self.idled += time.perf_counter() - before
        except KeyboardInterrupt:
            raise
        except Exception as error:  # the code of others may raise anything; the row says what
            self.error = error
            self._stop.set()
