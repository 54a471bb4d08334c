"""The trtexec command that measures what a row of "tensorrt" measured.

The defaults changed between the majors: 10.x copies inputs and outputs and captures no CUDA graph, 11.x does the
opposite. So both are printed, with everything said. What to compare: "GPU Compute Time" with gpu_ms, "Enqueue Time"
with enqueue_ms, "Latency" (copies included) with the end-to-end median. Its throughput is not that of a row: trtexec
enqueues the next query before the last one is over.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from .timing import Plan

__all__ = ["commands"]


def commands(
    plan: str,
    shapes: Mapping[str, Sequence[int]],
    *,
    graph: bool,
    copies: bool,
    timing: Plan,
    threads: int,
    device: int,
) -> dict[str, str]:
    """By TensorRT's version line."""
    common = ["trtexec", f"--loadEngine={plan}"]
    if shapes:
        # A scalar has no dimensions to give.
        sized = (f"{name}:{'x'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())
        common.append(f"--shapes={','.join(sized)}")
    if device:
        common.append(f"--device={device}")
    common += [f"--iterations={timing.calls}", f"--duration={timing.seconds:g}", "--warmUp=500"]
    common += ["--avgRuns=100", "--percentile=50,90,99"]
    if timing.idle_ms:
        common.append(f"--idleTime={timing.idle_ms:g}")
    if threads > 1:
        common += [f"--infStreams={threads}", "--threads"]
    ten = [*common, "--useSpinWait", *(["--useCudaGraph"] if graph else []), *([] if copies else ["--noDataTransfers"])]
    eleven = [
        *common,
        *([] if graph else ["--noCudaGraph"]),
        *(["--includeDataTransfers"] if copies else []),
    ]
    return {"10.x": shlex.join(ten), "11.x": shlex.join(eleven)}
