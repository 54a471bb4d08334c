"""Whether the times of a row can be trusted: stable, unstable or throttled, by the rules of `LIMITS` alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from .telemetry import Reading
from .timing import Summary, Warmed, percentile

__all__ = ["LIMITS", "Cause", "Judgement", "Verdict", "judge"]

Verdict = Literal["stable", "unstable", "throttled", ""]
#: What throttled a row: heat; power (a cap of the driver, an over-current event); or, whatever the sensors say, a GPU
#: clock that fell.
Cause = Literal["thermal", "power", "clock"]

#: All thresholds, with what is compared.
LIMITS = {
    "calls": 20,  # fewer calls get no verdict
    "spread": 0.15,  # (p90 - p10) / median
    "tail": 2.0,  # p99 / median
    "drift": 0.05,  # |median of the last third - median of the first third| / median
    "clock": 0.90,  # GPU clock after the row / clock before it
}


class Judgement(NamedTuple):
    verdict: Verdict
    reasons: list[str]
    #: Empty unless the verdict is "throttled".
    throttled_by: list[Cause]


def judge(times: Sequence[float], warmed: Warmed | None, before: Reading | None, after: Reading | None) -> Judgement:
    """On end-to-end times in the order of the calls. Throttled goes before unstable. What no sensor told (``None``)
    counts neither way."""
    throttled = _throttled(before, after)
    told = list(throttled.values())
    summary = Summary.of(times)
    if summary is None or summary.calls < LIMITS["calls"]:
        few = f"{len(times)} calls, fewer than {LIMITS['calls']}: no verdict"
        return Judgement("throttled", told, list(throttled)) if throttled else Judgement("", [few], [])
    reasons = []
    if warmed is not None and not warmed.stable:
        reasons.append(f"warm-up: {warmed.reason}")
    ordered = sorted(times)
    middle = summary.median
    if middle > 0:
        spread = (summary.p90 - percentile(ordered, 0.10)) / middle
        if spread > LIMITS["spread"]:
            reasons.append(f"spread: (p90 - p10) / median is {spread:.2f}, above {LIMITS['spread']}")
        tail = summary.p99 / middle
        if tail > LIMITS["tail"]:
            reasons.append(f"tail: p99 is {tail:.1f} times the median, above {LIMITS['tail']}")
        third = len(times) // 3
        drift = (statistics.median(times[-third:]) - statistics.median(times[:third])) / middle
        if abs(drift) > LIMITS["drift"]:
            reasons.append(f"drift: the last third is {drift:+.1%} from the first, more than {LIMITS['drift']:.0%}")
    if throttled:
        return Judgement("throttled", told + reasons, list(throttled))
    return Judgement("unstable" if reasons else "stable", reasons, [])


def _throttled(before: Reading | None, after: Reading | None) -> dict[Cause, str]:
    """What throttled, each with the sentence that says when."""
    readings = {when: found for when, found in (("before", before), ("after", after)) if found is not None}
    throttled: dict[Cause, str] = {}
    flags: tuple[tuple[Cause, str], ...] = (("thermal", "throttle_active"), ("power", "power_throttle_active"))
    for cause, flag in flags:
        found = {when: reading for when, reading in readings.items() if getattr(reading, flag)}
        if found:
            # The sensors name all that holds clocks down in one list.
            names = dict.fromkeys(name for reading in found.values() for name in reading.reasons)
            why = ", ".join(names) or "the sensors gave no reason"
            throttled[cause] = f"{cause} throttling {' and '.join(found)} the row: {why}"
    if before is not None and after is not None and before.gpu_clock_mhz and after.gpu_clock_mhz:
        share = after.gpu_clock_mhz / before.gpu_clock_mhz
        # A clock that rose from idle is no throttling, one that fell under load is.
        if share < LIMITS["clock"]:
            throttled["clock"] = (
                f"the GPU clock fell from {before.gpu_clock_mhz:g} to {after.gpu_clock_mhz:g} MHz, "
                f"below {LIMITS['clock']:.0%}"
            )
    return throttled
