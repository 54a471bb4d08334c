"""Messages and arrays between a process and its child: JSON and raw bytes, nothing is ever unpickled.

A frame is ``<u64 length><JSON>`` and then the bytes of the arrays that the JSON lists (name, dtype, shape).
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Mapping
from math import prod
from typing import IO, Any

import numpy as np

from .arrays import Array, dtype_name, from_bits

__all__ = ["FrameError", "Link", "Message"]

Message = dict[str, Any]
_LENGTH = struct.Struct("<Q")
#: Of the JSON alone; the layers of a large network take some megabytes.
_LARGEST = 1 << 30


class FrameError(Exception):
    """What came is no message: the other process writes where it should not, or is another program."""


class Link:
    """One end of two pipes. Sending is safe from several threads; receiving is for one."""

    def __init__(self, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
        self._in, self._out = incoming, outgoing
        self._sending = threading.Lock()

    def send(self, message: Message, arrays: Mapping[str, Array] | None = None) -> None:
        """Raises `BrokenPipeError` when the other side is gone."""
        packed = {name: _native(array) for name, array in (arrays or {}).items()}
        described = [[name, dtype_name(array), array.shape] for name, array in packed.items()]
        head = json.dumps({**message, "arrays": described}).encode()
        with self._sending:
            self._out.write(_LENGTH.pack(len(head)) + head)
            for array in packed.values():
                self._out.write(array.reshape(-1).view(np.uint8).data)
            self._out.flush()

    def receive(self) -> tuple[Message, dict[str, Array]]:
        """The next frame. Raises `EOFError` when the other side is gone, `FrameError` for what is no frame."""
        (length,) = _LENGTH.unpack(self._bytes(_LENGTH.size))
        if length > _LARGEST:
            raise FrameError(f"a message of {length} bytes; the largest allowed has {_LARGEST}")
        head = self._bytes(length)
        try:
            message: Message = json.loads(head)
            described = [(name, dtype, _dtype(dtype), _shape(shape)) for name, dtype, shape in message.pop("arrays")]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise FrameError(f"{bytes(head[:80])!r} is no message ({type(error).__name__}: {error})") from error
        arrays = {}
        for name, dtype, kind, shape in described:
            array = np.frombuffer(self._bytes(prod(shape) * kind.itemsize), kind).reshape(shape)
            arrays[name] = from_bits(array) if dtype == "bfloat16" else array
        return message, arrays

    def _bytes(self, count: int) -> bytearray:
        try:
            data = bytearray(count)
        except (MemoryError, OverflowError) as error:
            raise FrameError(f"{count} bytes are announced, which do not fit into memory") from error
        view, filled = memoryview(data), 0
        while filled < count:
            read = self._in.readinto(view[filled:])  # type: ignore[attr-defined]
            if not read:
                raise EOFError("the other process is gone")
            filled += read
        return data


def _native(array: Array) -> Array:
    """Contiguous, and in the byte order of this machine, which both processes share."""
    array = np.asarray(array, order="C")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        return np.dtype(np.uint16)
    try:
        kind = np.dtype(name)
    except TypeError:
        try:
            import ml_dtypes
        except ImportError as error:
            raise ValueError(f"arrays of {name} need the package ml_dtypes: pip install 'jetrt[build]'") from error
        kind = np.dtype(getattr(ml_dtypes, name))
    if kind.hasobject or kind.itemsize == 0:
        raise ValueError(f"arrays of {name} are not sent")
    return kind


def _shape(shape: Any) -> tuple[int, ...]:
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{shape} is no shape")
    return tuple(shape)
