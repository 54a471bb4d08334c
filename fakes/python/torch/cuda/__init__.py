"""`torch.cuda` over the stand-in driver."""

# ruff: noqa: F401 - what is imported here are torch's names
from __future__ import annotations

import ctypes
from typing import Any

from .. import _driver, _memory, _random
from .._dtypes import device as _device
from .._memory import OutOfMemoryError
from .._standin import counts
from . import graphs, memory, random, streams
from .graphs import CUDAGraph, graph, graph_pool_handle, is_current_stream_capturing
from .memory import (
    empty_cache,
    get_per_process_memory_fraction,
    max_memory_allocated,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_peak_memory_stats,
    set_per_process_memory_fraction,
)
from .random import get_rng_state, get_rng_state_all, initial_seed, manual_seed, manual_seed_all, set_rng_state
from .streams import Event, ExternalStream, Stream, StreamContext, current_stream, default_stream, set_stream, stream

default_generators = _random.cuda_generators


def is_available() -> bool:
    return _driver.device_count() > 0


def device_count() -> int:
    return _driver.device_count()


def is_initialized() -> bool:
    return _driver.started()


def init() -> None:
    if not _driver.started():
        if not is_available():
            raise RuntimeError("No CUDA GPUs are available")
        _driver.start()
        _memory.check_settings()


def _index(of: Any) -> int:
    if of is None:
        return current_device()
    of = of if isinstance(of, int) else _device(of)
    if isinstance(of, _device):
        if of.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {of}")
        of = current_device() if of.index is None else of.index
    return int(of)


def current_device() -> int:
    init()
    return _driver.thread.device


def set_device(device: Any) -> None:
    init()
    index = _index(device)
    if index >= len(_driver._contexts):
        raise _driver.AcceleratorError("CUDA error: invalid device ordinal")
    if index >= 0:
        _driver.thread.device = index
        _driver.enter(index)


class device:  # noqa: N801 - torch's name
    """`with torch.cuda.device(1):`"""

    def __init__(self, device: Any) -> None:
        self.idx, self.prev_idx = _index(device), -1

    def __enter__(self) -> None:
        self.prev_idx = current_device()
        set_device(self.idx)

    def __exit__(self, *exception: object) -> None:
        set_device(self.prev_idx)


class device_of(device):  # noqa: N801 - torch's name
    def __init__(self, tensor: Any) -> None:
        super().__init__(tensor.get_device() if tensor.is_cuda else None)


def synchronize(device: Any = None) -> None:
    index = _index(device)
    counts["waits"] += 1
    counts["device_waits"] += 1
    init()
    with _driver.on(index):
        _driver.call("cuCtxSynchronize")


def _sleep(cycles: int) -> None:
    """Keeps the stream busy on a GPU. Here all work is under way until somebody waits for it."""


class _Properties:
    def __init__(self, index: int) -> None:
        def attribute(number: int) -> int:
            value = ctypes.c_int()
            _driver.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), ctypes.c_int(index))
            return value.value

        name = ctypes.create_string_buffer(64)
        _driver.call("cuDeviceGetName", name, ctypes.c_int(64), ctypes.c_int(index))
        self.name = name.value.decode()
        self.major, self.minor = attribute(75), attribute(76)
        self.multi_processor_count = attribute(16)
        self.is_integrated = attribute(18)
        self.total_memory = _memory.total(index)


def get_device_properties(device: Any = None) -> _Properties:
    init()
    return _Properties(_index(device))


def get_device_name(device: Any = None) -> str:
    return get_device_properties(device).name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    found = get_device_properties(device)
    return found.major, found.minor


__all__ = [name for name in dir() if not name.startswith("_")]
