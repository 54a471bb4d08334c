"""What an action costs besides time: calls of the driver, waits, kernels, fills, allocations; counted by hooks."""

from __future__ import annotations

import collections
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import mapped

HERE = Path(__file__).resolve().parent

#: Driver calls in which the host waits for the GPU, without the suffixes of their variants.
WAITS = ("cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize", "cuMemcpyDtoH", "cuMemFree")
ALLOCATIONS = ("cuMemAlloc", "cuMemAllocAsync", "cuMemCreate", "cuMemAllocPitch", "cuMemAllocHost", "cuMemHostAlloc")
RUNTIME_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def plain_name(name: str) -> str:
    """Without the suffixes of a function's variants: cuStreamSynchronize_ptsz, cuMemAlloc_v2."""
    for suffix in ("_ptsz", "_ptds", "_v2", "_v3"):
        name = name.removesuffix(suffix)
    return name


class DriverCalls:
    """Counts every call of the driver while it is started. Raises OSError where CUPTI cannot be had, with the reason.

    CUPTI serves one subscriber: close this before torch.profiler is used.
    """

    def __init__(self, cupti: str | None = None) -> None:
        if cupti is None:
            loaded = mapped("libcupti.so")  # torch brings it
            if not loaded:
                raise OSError("no libcupti in this process")
            if not mapped("libcuda.so"):
                raise OSError("no libcuda in this process; CUPTI crashes without it")
            cupti = loaded[0]
        with tempfile.TemporaryDirectory(prefix="jetrt-calls-") as folder:
            library = Path(folder) / "libdriver_calls.so"
            source = str(HERE / "driver_calls.c")
            command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", str(library), source, "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(f"driver_calls.c does not compile: {done.stderr.strip()}")
            self.library = ctypes.CDLL(str(library))  # stays mapped without its file
        self.library.driver_calls_count.restype = ctypes.c_uint64
        self.library.driver_calls_count.argtypes = [ctypes.c_uint32, ctypes.POINTER(ctypes.c_char_p)]
        self.check(self.library.driver_calls_open(cupti.encode()), f"subscribe with {Path(cupti).name}")

    def check(self, code: int, what: str) -> None:
        if code:
            raise OSError(f"CUPTI: {what} gave {code}")

    def during(self, work: Callable[[], Any]) -> dict[str, int]:
        """Name to number of calls, by all threads of this process."""
        self.check(self.library.driver_calls_start(), "start")
        try:
            work()
        finally:
            self.check(self.library.driver_calls_stop(), "stop")
        found: dict[str, int] = {}
        for number in range(self.library.driver_calls_functions()):
            name = ctypes.c_char_p()
            count = self.library.driver_calls_count(number, ctypes.byref(name))
            if count and name.value:
                found[name.value.decode()] = found.get(name.value.decode(), 0) + count
        return dict(sorted(found.items()))

    def close(self) -> None:
        self.check(self.library.driver_calls_close(), "unsubscribe")


def driver_figures(calls: dict[str, int], actions: int) -> dict[str, Any]:
    """Per action: waits, allocations, graph launches, and every call by name."""
    by_name: collections.Counter[str] = collections.Counter()
    for name, count in calls.items():
        by_name[plain_name(name)] += count

    def total(names: tuple[str, ...]) -> float:
        return sum(by_name[name] for name in names) / actions

    return {
        "waits": total(WAITS),
        "allocations": total(ALLOCATIONS),
        "graph_launches": total(("cuGraphLaunch",)),
        "kernel_launches": total(("cuLaunchKernel", "cuLaunchKernelEx")),
        "calls": {name: count / actions for name, count in sorted(by_name.items())},
    }


def kernel_kind(name: str) -> str:
    """fill, copy or kernel: what a line of the GPU's timeline is."""
    if "FillFunctor" in name or name.startswith("Memset"):
        return "fill"
    return "copy" if name.startswith("Memcpy") else "kernel"


def profile_figures(work: Callable[[], Any], actions: int) -> dict[str, Any]:
    """Per action by torch.profiler: fills, copies, kernels, the time that the GPU was busy, and the runtime's waits."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    events = profiler.events()
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    kinds = collections.Counter(kernel_kind(event.name) for event in on_gpu)
    runtime = collections.Counter(event.name for event in events if event.device_type == DeviceType.CPU)
    return {
        "fills": kinds["fill"] / actions,
        "copies": kinds["copy"] / actions,
        "kernels": kinds["kernel"] / actions,
        "busy_ms": sum(event.time_range.elapsed_us() for event in on_gpu) / 1000 / actions,
        "waits": sum(runtime[name] for name in RUNTIME_WAITS) / actions,
        "graph_launches": runtime["cudaGraphLaunch"] / actions,
    }


def torch_allocations(work: Callable[[], Any], actions: int) -> float:
    """Per action: blocks that torch's caching allocator gave out."""
    import torch

    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    work()
    return (torch.cuda.memory_stats()["allocation.all.allocated"] - before) / actions
