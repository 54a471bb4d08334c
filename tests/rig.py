"""What the tests of the core on the stand-ins share: device memory and streams of the caller's, a look for leaks."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import fakes

PRIMARY = 0xC0DE0000  # the stand-in's primary context of device 0
LEGACY, PER_THREAD = 0, 2


@functools.cache
def cuda() -> fakes.FakeCuda:
    driver = fakes.FakeCuda()
    assert driver.call("cuInit", 0) == 0
    made("cuDevicePrimaryCtxRetain", 0)
    return driver


@functools.cache
def trt() -> fakes.FakeTrt:
    return fakes.FakeTrt()


def ok(name: str, *arguments: Any) -> None:
    code = cuda().call(name, *arguments)
    assert code == 0, f"{name}: {code}"


def made(name: str, *arguments: Any) -> int:
    """What a driver function of the form `f(&handle, …)` makes."""
    handle = ctypes.c_uint64()
    code = fakes.FakeCuda().call(name, ctypes.byref(handle), *arguments)
    assert code == 0, f"{name}: {code}"
    return handle.value


def enter() -> None:
    """Makes the primary context current, as whatever made the caller's tensors has done before it calls an engine."""
    ok("cuCtxSetCurrent", PRIMARY)


class Array:
    """A tensor of the caller's in device memory, shown as `__cuda_array_interface__`. `data=None`: not written yet."""

    def __init__(
        self,
        data: np.ndarray[Any, Any] | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        dtype: Any = np.float32,
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
        stream: int | None = None,
    ) -> None:
        enter()
        self.shape = shape if data is None or shape is not None else data.shape
        self.dtype = np.dtype(dtype if data is None else data.dtype)
        self.strides, self.stream, self.offset = strides, stream, offset
        assert self.shape is not None
        nbytes = int(np.prod(self.shape)) * self.dtype.itemsize if data is None else data.nbytes
        self.base = made("cuMemAlloc_v2", nbytes + offset + 1)
        self.ptr = self.base + offset
        if data is not None:
            self.write(data)

    def write(self, data: np.ndarray[Any, Any], stream: int | None = None) -> None:
        """At once, or on a stream: then nothing is there before the stream has got to it."""
        data = np.ascontiguousarray(data)
        if stream is None:
            ok("cuMemcpyHtoD_v2", self.ptr, data.ctypes.data, data.nbytes)
        else:
            ok("cuMemcpyHtoDAsync_v2", self.ptr, data.ctypes.data, data.nbytes, stream)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        typestr = self.dtype.str if self.dtype.kind != "V" else "<V2"
        found = {"shape": self.shape, "typestr": typestr, "data": (self.ptr, False), "version": 3}
        return {**found, "strides": self.strides, "stream": self.stream}

    def __del__(self) -> None:
        if self.base == 0:
            return  # a view
        # On whatever thread, and whatever is current there.
        cuda().call("cuCtxPushCurrent_v2", PRIMARY)
        cuda().call("cuMemFree_v2", self.base)
        cuda().call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_uint64()))


def address(tensor: Any) -> int:
    if isinstance(tensor, np.ndarray):
        return tensor.ctypes.data
    return int(tensor.__cuda_array_interface__["data"][0])


def peek(tensor: Any) -> np.ndarray[Any, Any]:
    """What lies in the tensor's memory now, waiting for nothing: the stand-in's device memory is the host's."""
    shown = tensor.__cuda_array_interface__
    dtype, shape = np.dtype(shown["typestr"]), shown["shape"]
    n = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(ctypes.string_at(address(tensor), n), dtype).reshape(shape)


def fetch(tensor: Any, stream: int) -> np.ndarray[Any, Any]:
    """The contents once this stream has got here; only its own order counts."""
    ok("cuStreamSynchronize", stream)
    return peek(tensor)


@contextlib.contextmanager
def new_stream(flags: int = 1) -> Iterator[int]:
    """A stream of the caller's; flags 0: one that orders itself with the legacy stream."""
    enter()
    stream = made("cuStreamCreate", flags)
    yield stream
    ok("cuStreamDestroy_v2", stream)


@contextlib.contextmanager
def capturing(stream: int, mode: int = 0) -> Iterator[list[int]]:
    """A capture of the caller's (0: global, 1: thread-local, 2: relaxed); the list gets the executable graph."""
    ok("cuStreamBeginCapture_v2", stream, ctypes.c_int(mode))
    got: list[int] = []
    graph = ctypes.c_uint64()
    try:
        yield got
    finally:
        code = cuda().call("cuStreamEndCapture", stream, ctypes.byref(graph))
    assert code == 0, f"the capture was broken: {code}"
    got.append(made("cuGraphInstantiateWithFlags", graph.value, 0))
    ok("cuGraphDestroy", graph.value)


def abandon_capture(stream: int) -> None:
    """Ends a capture that may be broken."""
    graph = ctypes.c_uint64()
    cuda().call("cuStreamEndCapture", stream, ctypes.byref(graph))
    if graph.value:
        cuda().call("cuGraphDestroy", graph.value)


def until(condition: Callable[[], bool], what: Callable[[], str] = lambda: "it", seconds: float = 10) -> None:
    """Waits for another thread; a deadline far beyond what it needs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what()} did not happen"
        time.sleep(0.001)


def compared(streams: int) -> None:
    """Waits until the comparisons of captured graphs are over: each has a stream of its own as long as it runs."""
    until(lambda: cuda().live("stream") == streams, lambda: "comparison")


def live() -> dict[str, int]:
    return {**cuda().all_live(), **trt().all_live()}


def mistakes() -> list[str]:
    return cuda().errors() + trt().errors()


# Fixtures: a module takes them by `clean, load = map(pytest.fixture, (rig.clean, rig.load))`. -------------------------


def clean() -> Iterator[None]:
    """Nothing leaks and nothing was done wrong: compared before and after each test."""
    import jetrt

    jetrt.pinned_empty(1)  # the driver, and what is kept for the process
    enter()
    gc.collect()
    before = live()
    cuda().reset()
    trt().reset()
    yield
    gc.collect()
    enter()
    kept = {"module": 0}
    # What a call discarded is freed by a thread.
    until(lambda: {**live(), **kept} == {**before, **kept}, lambda: f"giving back ({before} before, {live()} now)")
    assert mistakes() == []
    assert cuda().count("cuCtxSynchronize") == 0


def load(clean: None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`load(program, options, plan fields…)`: an engine, closed at the end of the test."""
    import jetrt

    engines = contextlib.ExitStack()
    count = itertools.count()

    def make(
        program: str | Mapping[str, Any] = "mlp", options: Mapping[str, Any] | None = None, /, **fields: Any
    ) -> Any:
        path = fakes.write_plan(tmp_path / f"{next(count)}.plan", program, **fields)
        return engines.enter_context(jetrt.Engine(path, **(options or {})))

    with engines:
        yield make
