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

__all__ = ["Device", "DeviceArray", "Event", "Stream", "device", "download", "loading_mode", "on_device", "shown"]

#: Types that the array interface has no name for: (code, bits) of DLPack.
_DLPACK = {"bfloat16": (4, 16), "void16": (4, 16), "float8_e4m3fn": (10, 8)}
_CUDA = 2  # kDLCUDA
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

    def wait(self) -> None:
        """Waits for all that was enqueued on it, whatever library did, and leaves the current context as it is."""
        _call("cuCtxPushCurrent_v2", self._context)
        try:
            _call("cuCtxSynchronize")
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_uint64()))

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
    """Device memory with a shape and a type."""

    def __init__(self, like: Array) -> None:
        self.nbytes = like.nbytes
        self.pointer = _made("cuMemAlloc_v2", max(like.nbytes, 1))

    def upload(self, source: int, stream: Stream) -> None:
        """Orders a copy from this host address on the stream; it must stay as it is until that was waited for."""
        _call("cuMemcpyHtoDAsync_v2", self.pointer, source, self.nbytes, stream.handle)

    def close(self) -> None:
        if self.pointer:
            _call("cuMemFree_v2", self.pointer)
            self.pointer = 0


class _InterfaceArray(DeviceArray):
    def __init__(self, like: Array) -> None:
        super().__init__(like)
        self.__cuda_array_interface__ = {
            "shape": like.shape,
            "typestr": like.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


class _DlTensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h, its parts in one row."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class _DlpackArray(DeviceArray):
    """What a capsule points to is the same for every call and stays with this object, so that it needs no deleter."""

    def __init__(self, like: Array, device: int) -> None:
        super().__init__(like)
        self._device = (_CUDA, device)
        self._shape = (ctypes.c_int64 * max(like.ndim, 1))(*like.shape)
        code, bits = _DLPACK[like.dtype.name]
        shape = ctypes.addressof(self._shape)
        self._tensor = _DlTensor(self.pointer, _CUDA, device, like.ndim, code, bits, 1, shape, None, 0, None, None)
        self._new = ctypes.pythonapi.PyCapsule_New
        self._new.restype, self._new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **_: Any) -> Any:
        return self._new(ctypes.addressof(self._tensor), b"dltensor", None)


def on_device(like: Array, device: int) -> DeviceArray:
    """Memory for such an array, shown to jetrt in the way that has a name for its type."""
    return _DlpackArray(like, device) if like.dtype.name in _DLPACK else _InterfaceArray(like)


def download(target: int, pointer: int, nbytes: int, stream: Stream) -> None:
    """Orders a copy from device memory to this host address."""
    _call("cuMemcpyDtoHAsync_v2", target, pointer, nbytes, stream.handle)


def shown(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of this type can be shown to jetrt as device memory."""
    return dtype.kind in "biuf" or dtype.name in _DLPACK
