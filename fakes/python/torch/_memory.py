"""Memory: the caching allocator of CUDA with its private pools for graphs, page-locked and ordinary host memory.

A block belongs to the stream that it was asked for on. Once its last tensor is gone it serves that stream's next
request of its size; streams told by record_stream are waited for first. Until then it holds 0xDB, written in the
stream's order.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
from typing import Any

import numpy as np

from . import _driver, _standin
from ._standin import counts

ROUNDED = 512


class OutOfMemoryError(RuntimeError):
    """What torch raises where device memory is short."""


OutOfMemoryError.__module__ = "torch"


class Pool:
    """Memory that belongs to graphs; given back once the last graph that uses it is gone."""

    def __init__(self) -> None:
        self.users = 0


class Block:
    def __init__(self, ptr: int, size: int, device: int, stream: int, pool: Pool | None) -> None:
        self.ptr, self.size, self.device, self.stream, self.pool = ptr, size, device, stream, pool
        self.readers: set[int] = set()
        self.events: list[int] = []


# A tensor may die anywhere, in the middle of this module, too.
_lock = threading.RLock()
_free: list[Block] = []
_waiting: list[Block] = []  # for events of record_stream
_live: set[Block] = set()
_pinned_live: dict[int, int] = {}
_pinned_free: list[tuple[int, int]] = []
_reserved: dict[int, int] = {}
_allocated: dict[int, int] = {}
_peak: dict[int, int] = {}
_fractions: dict[int, float] = {}
_pools: dict[Any, Pool] = {}
_captures: dict[int, Pool] = {}  # capture id -> pool
_ids = itertools.count(1)


def new_pool_id(*, of_graph: bool) -> tuple[int, int]:
    """As torch numbers them: (n, 0) for a graph's own, (0, n) for those that the user asks for."""
    n = next(_ids)
    return (n, 0) if of_graph else (0, n)


def pool_enter(identity: tuple[int, int], capture: int) -> None:
    with _lock:
        pool = _pools.setdefault(identity, Pool())
        pool.users += 1
        _captures[capture] = pool


def pool_captured(capture: int) -> None:
    with _lock:
        _captures.pop(capture, None)


def pool_leave(identity: tuple[int, int], streams: set[int]) -> None:
    """A graph is gone. `streams`: where it was launched."""
    with _lock:
        pool = _pools[identity]
        pool.users -= 1
        if pool.users == 0:
            del _pools[identity]
        for block in [*_free, *_waiting, *_live]:
            if block.pool is pool:
                block.readers |= streams


def total(device: int) -> int:
    size = ctypes.c_size_t()
    _driver.call("cuDeviceTotalMem_v2", ctypes.byref(size), ctypes.c_int(device))
    return size.value


def _settings() -> str:
    return os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))


def check_settings() -> None:
    """FAKE_TORCH_EXPANDABLE_SEGMENTS=fail: as on a device that lacks them."""
    if "expandable_segments:True" in _settings() and os.environ.get("FAKE_TORCH_EXPANDABLE_SEGMENTS") == "fail":
        raise _driver.AcceleratorError("CUDA error: operation not supported")


def _from_driver(size: int, device: int) -> int:
    limit = _fractions.get(device)
    if limit is not None and _reserved.get(device, 0) + size > limit * total(device):
        return 0
    made = ctypes.c_uint64()
    with _driver.on(device), _driver.relaxed():
        error = _driver.code("cuMemAlloc_v2", ctypes.byref(made), size)
    if error == _driver.OUT_OF_MEMORY:
        return 0
    _driver.check(error)
    counts["driver_allocations"] += 1
    return made.value


def allocate(nbytes: int, device: int, stream: int) -> Block:
    size = -(-max(nbytes, 1) // ROUNDED) * ROUNDED
    capture = _driver.capture_id(stream) if _captures else 0
    with _lock:
        pool = _captures.get(capture)
        if not capture:
            _take_back()
        for i in range(len(_free) - 1, -1, -1):  # the last one first
            b = _free[i]
            if (b.size, b.device, b.stream, b.pool) == (size, device, stream, pool):
                del _free[i]
                break
        else:
            check_settings()
            ptr = _from_driver(size, device)
            if not ptr and not _captures:
                release()
                ptr = _from_driver(size, device)
            if not ptr:
                raise OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB of {total(device) / 2**20:.2f}; "
                    f"{_reserved.get(device, 0) / 2**20:.2f} are reserved."
                )
            b = Block(ptr, size, device, stream, pool)
            _reserved[device] = _reserved.get(device, 0) + size
        _live.add(b)
        now = _allocated[device] = _allocated.get(device, 0) + size
        _peak[device] = max(_peak.get(device, 0), now)
    counts["allocations"] += 1
    return b


def _give_back(b: Block) -> None:
    """The last tensor on a block is gone."""
    if sys.is_finalizing():
        return
    with _lock:
        _live.discard(b)
        _allocated[b.device] -= b.size
        readers = b.readers - {b.stream}
        capturing = bool(_driver.capture_id(b.stream))
        with _driver.on(b.device):
            if not capturing:
                for stream in readers:
                    event = ctypes.c_uint64()
                    if _driver.code("cuEventCreate", ctypes.byref(event), ctypes.c_uint(2)) == 0:
                        _driver.code("cuEventRecord", event.value, stream)
                        b.events.append(event.value)
            # A graph's memory is rewritten by the graph alone.
            if _standin.poison and b.pool is None and not readers and _driver.idle(b.stream):
                _driver.code("cuMemsetD8Async", b.ptr, ctypes.c_ubyte(0xDB), b.size, b.stream)
        b.readers = readers if b.pool is not None else set()
        (_waiting if b.events else _free).append(b)


def _take_back(*, wait: bool = False) -> None:
    """Blocks that a recorded stream has passed serve again."""
    for b in list(_waiting):
        with _driver.on(b.device):
            while b.events:
                error = _driver.code("cuEventSynchronize" if wait else "cuEventQuery", b.events[0])
                if error == _driver.NOT_READY:
                    break
                _driver.code("cuEventDestroy_v2", b.events.pop(0))
        if not b.events:
            _waiting.remove(b)
            _free.append(b)


def release(device: int | None = None) -> None:
    """What no tensor holds goes back to the driver once the streams that used it are through, as in cudaFree."""
    with _lock:
        _take_back(wait=True)
        for b in list(_free):
            if device not in (None, b.device) or (b.pool is not None and b.pool.users):
                continue
            _free.remove(b)
            with _driver.on(b.device):
                for stream in {b.stream, *b.readers}:
                    if not _driver.capture_id(stream):
                        _driver.code("cuStreamSynchronize", stream)
                with _driver.relaxed():
                    _driver.code("cuMemFree_v2", b.ptr)
            _reserved[b.device] -= b.size


def release_all() -> None:
    release()
    with _lock:
        while _pinned_free:
            ptr, _ = _pinned_free.pop()
            _driver.code("cuMemFreeHost", ptr)
        _fractions.clear()
        _peak.clear()


def live() -> int:
    """Bytes of device memory that tensors hold."""
    with _lock:
        return sum(b.size for b in _live)


class Storage:
    """Memory that tensors share. `device` is -1 on the host."""

    def __init__(self, ptr: int, nbytes: int, device: int, owner: Any = None, *, pinned: bool = False) -> None:
        self.ptr, self.nbytes, self.device, self.owner, self.pinned = ptr, nbytes, device, owner, pinned
        self.version = 0
        # Of the bytes that were given by others: what to call once no tensor is left.
        self.deleter: Any = None

    def __del__(self) -> None:
        owner, self.owner = self.owner, None
        if isinstance(owner, Block):
            _give_back(owner)
        if self.deleter is not None:
            deleter, self.deleter = self.deleter, None
            deleter()

    # torch.UntypedStorage, as far as it is shown
    def data_ptr(self) -> int:
        return self.ptr

    def size(self) -> int:
        return self.nbytes

    def __len__(self) -> int:
        return self.nbytes


class _Pinned:
    def __init__(self, ptr: int, size: int) -> None:
        self.ptr, self.size = ptr, size

    def __del__(self) -> None:
        # The device may still read it: kept until somebody has waited (release_all).
        _pinned_free.append((self.ptr, self.size))


def on_device(nbytes: int, device: int, stream: int) -> Storage:
    block = allocate(nbytes, device, stream)
    return Storage(block.ptr if nbytes else 0, nbytes, device, block)


def on_host(nbytes: int, *, pinned: bool = False) -> Storage:
    if pinned:
        with _driver.relaxed():
            ptr = _driver.made("cuMemHostAlloc", max(nbytes, 1), ctypes.c_uint(1))
        return Storage(ptr, nbytes, -1, _Pinned(ptr, nbytes), pinned=True)
    # Aligned to 64 bytes, as torch's.
    raw = np.empty(nbytes + 64, np.uint8)
    ptr = -(-raw.ctypes.data // 64) * 64
    ctypes.memset(ptr, 0xCD, nbytes)
    return Storage(ptr if nbytes else 0, nbytes, -1, raw)


def is_pinned(address: int) -> bool:
    """Also memory that others have registered."""
    place = _driver.library["fake_cuda_place"]
    return address != 0 and int(place(ctypes.c_uint64(address), ctypes.c_uint64(1))) == 1
