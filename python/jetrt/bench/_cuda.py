"""What the bench needs of CUDA's driver beside the engine: a stream, events, arrays in device memory, free memory.

By ctypes, since it measures from outside of what jetrt's core does; the core has its own binding.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from ..builder.arrays import Array
from ..errors import CudaError, LibraryNotFoundError

__all__ = ["Device", "DeviceArray", "Event", "Stream", "device", "download", "loading_mode", "shown"]

#: numpy has no name for it; this is what jetrt reads it by.
_BFLOAT16 = "<V2"
_NON_BLOCKING = 1


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise LibraryNotFoundError(
            f"libcuda.so.1 cannot be opened ({error}): CUDA events need NVIDIA's driver.", library="libcuda.so.1"
        ) from error
    _check("cuInit", driver.cuInit(0))
    return driver


def _check(name: str, code: int) -> None:
    if code:
        raise CudaError(f"{name} returned CUDA error {code}.", call=name, code=code)


def _call(name: str, *arguments: Any) -> None:
    """A driver function; whole numbers are passed as 64 bits, which serves handles, addresses and sizes."""
    passed = [ctypes.c_uint64(a) if isinstance(a, int) else a for a in arguments]
    _check(name, getattr(_driver(), name)(*passed))


def _made(name: str, *arguments: Any) -> int:
    handle = ctypes.c_uint64()
    _call(name, ctypes.byref(handle), *arguments)
    return handle.value


class Device:
    """One GPU with its primary context, which is the one that jetrt's core and torch use."""

    def __init__(self, index: int) -> None:
        self.index = index
        _driver()
        self._context = _made("cuDevicePrimaryCtxRetain", index)

    def enter(self) -> None:
        """Makes the context current in this thread."""
        _call("cuCtxSetCurrent", self._context)

    def memory(self) -> tuple[int, int]:
        """Bytes that are free and bytes in all, every process counted."""
        self.enter()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value


@functools.cache
def device(index: int) -> Device:
    return Device(index)


def loading_mode() -> str | None:
    """How the driver loads kernels, "eager" or "lazy"; ``None`` where it cannot say."""
    mode = ctypes.c_int()
    try:
        code = _driver().cuModuleGetLoadingMode(ctypes.byref(mode))
    except (AttributeError, LibraryNotFoundError, CudaError):  # a driver before CUDA 11.7
        return None
    return {1: "eager", 2: "lazy"}.get(mode.value) if code == 0 else None


class Stream:
    def __init__(self, gpu: Device) -> None:
        gpu.enter()
        self.handle = _made("cuStreamCreate", _NON_BLOCKING)

    def wait(self) -> None:
        _call("cuStreamSynchronize", self.handle)

    def close(self) -> None:
        if self.handle:
            _call("cuStreamDestroy_v2", self.handle)
            self.handle = 0


class Event:
    """A mark in a stream. What lies between two of them is read with `since`, once the stream was waited for."""

    def __init__(self) -> None:
        self.handle = _made("cuEventCreate", 0)

    def record(self, stream: Stream) -> None:
        _call("cuEventRecord", self.handle, stream.handle)

    def since(self, start: Event) -> float:
        """Milliseconds from that one."""
        found = ctypes.c_float()
        _call("cuEventElapsedTime", ctypes.byref(found), start.handle, self.handle)
        return found.value

    def close(self) -> None:
        if self.handle:
            _call("cuEventDestroy_v2", self.handle)
            self.handle = 0


class DeviceArray:
    """Device memory with a shape and a type, shown to jetrt as ``__cuda_array_interface__``."""

    def __init__(self, like: Array) -> None:
        self.shape, self.dtype, self.nbytes = like.shape, like.dtype, like.nbytes
        self.pointer = _made("cuMemAlloc_v2", max(like.nbytes, 1))
        typestr = _BFLOAT16 if like.dtype.name in ("bfloat16", "void16") else like.dtype.str
        self.__cuda_array_interface__ = {
            "shape": like.shape,
            "typestr": typestr,
            "data": (self.pointer, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }

    def upload(self, source: Array, stream: Stream) -> None:
        """Orders a copy on the stream; `source` must stay as it is until that was waited for."""
        _call("cuMemcpyHtoDAsync_v2", self.pointer, source.ctypes.data, self.nbytes, stream.handle)

    def close(self) -> None:
        if self.pointer:
            _call("cuMemFree_v2", self.pointer)
            self.pointer = 0


def download(target: Array, pointer: int, nbytes: int, stream: Stream) -> None:
    """Orders a copy from device memory to the beginning of `target`."""
    _call("cuMemcpyDtoHAsync_v2", target.ctypes.data, pointer, nbytes, stream.handle)


def shown(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of this type can be shown to jetrt as device memory."""
    return dtype.kind in "biuf" or dtype.name in ("bfloat16", "void16")
