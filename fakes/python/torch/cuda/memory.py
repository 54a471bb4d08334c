"""What the allocator holds, and its limits."""

from __future__ import annotations

import ctypes
from typing import Any

from .. import _driver, _memory
from .._standin import counts


def _of(device: Any) -> int:
    from . import _index, init

    init()
    return _index(device)


def empty_cache() -> None:
    if _driver.started():
        _memory.release()


def memory_allocated(device: Any = None) -> int:
    """Bytes that tensors hold."""
    return _memory._allocated.get(_of(device), 0)


def max_memory_allocated(device: Any = None) -> int:
    return _memory._peak.get(_of(device), 0)


def memory_reserved(device: Any = None) -> int:
    """Bytes that the allocator has from the driver."""
    return _memory._reserved.get(_of(device), 0)


def reset_peak_memory_stats(device: Any = None) -> None:
    index = _of(device)
    _memory._peak[index] = _memory._allocated.get(index, 0)


def memory_stats(device: Any = None) -> dict[str, int]:
    index = _of(device)
    return {
        "allocation.all.allocated": counts["allocations"],
        "num_device_alloc": counts["driver_allocations"],
        "allocated_bytes.all.current": memory_allocated(index),
        "allocated_bytes.all.peak": max_memory_allocated(index),
        "reserved_bytes.all.current": memory_reserved(index),
    }


def mem_get_info(device: Any = None) -> tuple[int, int]:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with _driver.on(_of(device)):
        _driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    if not isinstance(fraction, float):
        raise TypeError("Invalid type for fraction argument, must be `float`")
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    _memory._fractions[_of(device)] = fraction


def get_per_process_memory_fraction(device: Any = None) -> float:
    return _memory._fractions.get(_of(device), 1.0)
