"""DLPack in and out, by the legacy capsule."""

from __future__ import annotations

import ctypes
from typing import Any

from .. import _dtypes, _memory
from .._tensor import Tensor
from ._dlpack import CPU, CUDA, CUDA_HOST, Deleter, Managed

_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6, "float8_e4m3fn": 10, "float8_e5m2": 12}


_api = ctypes.pythonapi
_api.PyCapsule_IsValid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_api.PyCapsule_New.restype = ctypes.py_object

# Names that capsules keep pointing at.
_FRESH, _USED = ctypes.c_char_p(b"dltensor"), ctypes.c_char_p(b"used_dltensor")


def _dtype(code: int, bits: int, lanes: int) -> _dtypes.dtype:
    for d in _dtypes.ALL:
        if lanes == 1 and bits == d.itemsize * 8 and code == _CODES.get(d.name.rstrip("0123456789")):
            return d
        if d.name in _CODES and _CODES[d.name] == code:
            return d
    raise RuntimeError(f"Unsupported dtype of DLPack: code {code}, {bits} bits, {lanes} lanes")


def from_dlpack(tensor: Any) -> Tensor:
    """A capsule, or an object with `__dlpack__`; on the same memory, which is released with the last tensor on it."""
    if hasattr(tensor, "__dlpack__"):
        if tensor.__dlpack_device__()[0] == CUDA:
            from .. import cuda

            stream = cuda.current_stream(tensor.__dlpack_device__()[1]).cuda_stream
            tensor = tensor.__dlpack__(stream=stream or 1)
        else:
            tensor = tensor.__dlpack__()
    if not _api.PyCapsule_IsValid(tensor, _FRESH):
        raise RuntimeError("from_dlpack received an invalid capsule, or one that was taken before")
    address = _api.PyCapsule_GetPointer(tensor, _FRESH)
    _api.PyCapsule_SetName(tensor, _USED)
    managed = Managed.from_address(address)
    found = managed.tensor
    of = _dtype(found.code, found.bits, found.lanes)
    shape = tuple(found.shape[i] for i in range(found.ndim))
    strides = tuple(found.strides[i] for i in range(found.ndim)) if found.strides else None
    device = found.device_id if found.device_type == CUDA else -1
    reach = (
        1 + sum((d - 1) * s for d, s in zip(shape, strides, strict=True)) if strides else _dtypes.Size(shape).numel()
    )
    storage = _memory.Storage((found.data or 0) + found.byte_offset, reach * of.itemsize, device)
    storage.deleter = lambda: managed.deleter(address) if managed.deleter else None
    return Tensor._make(storage, shape, of, strides)


_exported: dict[int, Any] = {}


@Deleter
def _release(address: int) -> None:
    _exported.pop(address, None)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _unused(capsule: int) -> None:
    """The capsule dies: a tensor that nobody took is let go of."""
    api = ctypes.pythonapi
    valid = api["PyCapsule_IsValid"]
    valid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    if valid(capsule, _FRESH):
        pointer = api["PyCapsule_GetPointer"]
        pointer.argtypes, pointer.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_void_p
        _exported.pop(pointer(capsule, _FRESH), None)


def export(t: Tensor, stream: Any, dl_device: Any, copy: Any) -> Any:
    if dl_device is not None or copy is not None:
        raise NotImplementedError("stand-in torch: __dlpack__(dl_device=…, copy=…)")
    if t.requires_grad:
        raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
    if t.is_cuda and stream is not None and stream != -1:
        from .. import cuda

        if stream == 0:
            raise BufferError("per-spec, stream 0 is ambiguous")
        current = cuda.current_stream(t.device)
        consumer = 0 if stream == 1 else stream
        if consumer != current.cuda_stream:
            cuda.ExternalStream(consumer, t.device).wait_stream(current)
    n = t.ndim
    managed = Managed()
    shape, strides = (ctypes.c_int64 * n)(*t.shape), (ctypes.c_int64 * n)(*t.stride())
    d = managed.tensor
    d.data = t.data_ptr() or None
    d.device_type = CUDA if t.is_cuda else CUDA_HOST if t.is_pinned() else CPU
    d.device_id = max(t.get_device(), 0)
    d.ndim, d.bits, d.lanes = n, t.dtype.itemsize * 8, 1
    d.code = _CODES.get(t.dtype.name, _CODES.get(t.dtype.name.rstrip("0123456789"), 255))
    d.shape, d.strides = ctypes.cast(shape, type(d.shape)), ctypes.cast(strides, type(d.strides))
    managed.deleter = _release
    address = ctypes.addressof(managed)
    _exported[address] = managed, shape, strides, t
    return _api.PyCapsule_New(address, _FRESH, ctypes.cast(_unused, ctypes.c_void_p))


def to_dlpack(t: Tensor) -> Any:
    return export(t, None, None, None)
