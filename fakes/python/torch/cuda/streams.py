"""Streams and events. A stream is one of 32 per device and is never destroyed; each thread has its own current ones."""

from __future__ import annotations

import ctypes
import itertools
import threading
from typing import Any

from .. import _driver
from .._dtypes import device as _device
from .._standin import counts

PER_DEVICE = 32


class _Thread(threading.local):
    def __init__(self) -> None:
        self.current: dict[int, int] = {}


_thread = _Thread()
_pools: dict[tuple[int, bool], tuple[list[int], Any]] = {}
_lock = threading.Lock()


def reset() -> None:
    """The current streams of this thread are the default ones again; all work is done."""
    _thread.current.clear()
    for (device, _), (handles, _) in list(_pools.items()):
        with _driver.on(device):
            for handle in handles:
                if not _driver.capture_id(handle):
                    _driver.code("cuStreamSynchronize", handle)
    for device in range(_driver.device_count()):
        with _driver.on(device):
            _driver.code("cuStreamSynchronize", 0)


def _from_pool(device: int, high: bool) -> int:
    with _lock:
        if (device, high) not in _pools:
            with _driver.on(device):
                made = [
                    _driver.made("cuStreamCreateWithPriority", ctypes.c_uint(1), ctypes.c_int(-1 if high else 0))
                    for _ in range(PER_DEVICE)
                ]
            _pools[device, high] = made, itertools.cycle(made)
        return int(next(_pools[device, high][1]))


class Stream:
    cuda_stream: int
    device_index: int

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        from . import _index, init

        init()
        if kwargs:
            raise NotImplementedError(f"stand-in torch: Stream({', '.join(kwargs)}=…)")
        self.device_index = _index(device)
        self.priority = -1 if priority < 0 else 0
        self.cuda_stream = _from_pool(self.device_index, priority < 0)

    @classmethod
    def _over(cls, handle: int, device: int) -> Stream:
        made = object.__new__(Stream)
        made.cuda_stream, made.device_index, made.priority = handle, device, 0
        return made

    @property
    def device(self) -> _device:
        return _device("cuda", self.device_index)

    @property
    def stream_id(self) -> int:
        return self.cuda_stream

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.cuda_stream)

    def query(self) -> bool:
        with _driver.on(self.device_index):
            error = _driver.code("cuStreamQuery", self.cuda_stream)
        if error == _driver.NOT_READY:
            return False
        _driver.check(error)
        return True

    def synchronize(self) -> None:
        with _driver.on(self.device_index):
            _driver.wait(self.cuda_stream)

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (self.cuda_stream, self.device_index) == (
            other.cuda_stream,
            other.device_index,
        )

    def __hash__(self) -> int:
        return hash((self.cuda_stream, self.device_index))

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device={self.device} cuda_stream={self.cuda_stream:#x}>"

    def __enter__(self) -> Stream:
        raise NotImplementedError("stand-in torch: `with stream:`; use torch.cuda.stream(stream)")


class ExternalStream(Stream):
    """A stream that another library made."""

    def __init__(self, stream_ptr: int, device: Any = None) -> None:
        from . import _index, init

        init()
        self.cuda_stream, self.device_index, self.priority = stream_ptr, _index(device), 0


def default_stream(device: Any = None) -> Stream:
    """The legacy default stream."""
    from . import _index

    return Stream._over(0, _index(device))


def current_stream(device: Any = None) -> Stream:
    from . import _index, init

    init()
    index = _index(device)
    return Stream._over(_thread.current.get(index, 0), index)


def set_stream(stream: Stream | None) -> None:
    from . import set_device

    if stream is not None:
        set_device(stream.device_index)
        _thread.current[stream.device_index] = stream.cuda_stream


class StreamContext:
    """`with torch.cuda.stream(s):`"""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        from . import current_device

        if self.stream is None:
            return
        self._device = current_device()
        self._here = current_stream()
        self._there = current_stream(self.stream.device_index)
        set_stream(self.stream)

    def __exit__(self, *exception: object) -> None:
        from . import set_device

        if self.stream is None:
            return
        set_stream(self._there)
        set_stream(self._here)
        set_device(self._device)


def stream(stream: Stream | None) -> StreamContext:
    return StreamContext(stream)


class Event:
    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        if interprocess or external:
            raise NotImplementedError("stand-in torch: events of other processes, or external ones")
        self._flags = (0 if enable_timing else 2) | (1 if blocking else 0)
        self.cuda_event = 0
        self._device = -1

    def record(self, stream: Stream | None = None) -> None:
        stream = current_stream() if stream is None else stream
        with _driver.on(stream.device_index):
            if not self.cuda_event:
                self.cuda_event = _driver.made("cuEventCreate", ctypes.c_uint(self._flags))
                self._device = stream.device_index
            if stream.device_index != self._device:
                raise RuntimeError(
                    f"Event device {self._device} does not match recording stream's device {stream.device_index}."
                )
            _driver.call("cuEventRecord", self.cuda_event, stream.cuda_stream)

    def wait(self, stream: Stream | None = None) -> None:
        stream = current_stream() if stream is None else stream
        if self.cuda_event:
            with _driver.on(stream.device_index):
                _driver.call("cuStreamWaitEvent", stream.cuda_stream, self.cuda_event, 0)

    def query(self) -> bool:
        if not self.cuda_event:
            return True
        error = _driver.code("cuEventQuery", self.cuda_event)
        if error == _driver.NOT_READY:
            return False
        _driver.check(error)
        return True

    def synchronize(self) -> None:
        if self.cuda_event:
            counts["waits"] += 1
            _driver.call("cuEventSynchronize", self.cuda_event)

    def elapsed_time(self, end: Event) -> float:
        if self._flags & 2 or end._flags & 2:
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if not self.cuda_event or not end.cuda_event:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        ms = ctypes.c_float()
        _driver.call("cuEventElapsedTime", ctypes.byref(ms), self.cuda_event, end.cuda_event)
        return ms.value

    def __del__(self) -> None:
        if getattr(self, "cuda_event", 0):
            _driver.code("cuEventDestroy_v2", self.cuda_event)
            self.cuda_event = 0
