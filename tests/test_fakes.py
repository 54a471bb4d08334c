"""The stand-ins themselves: they expose the mistakes they are there to expose, and behave where nothing is wrong."""

from __future__ import annotations

import csv
import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fakes

ROOT = Path(__file__).resolve().parent.parent
INVALID_VALUE, OUT_OF_MEMORY, NOT_READY, ILLEGAL_ADDRESS = 1, 2, 600, 700
UNSUPPORTED, INVALIDATED, UNJOINED, ISOLATION, IMPLICIT, CAPTURED_EVENT = 900, 901, 904, 905, 906, 907
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
FRESH, FREED = 0xCD, 0xDB


# The driver -----------------------------------------------------------------------------------------------------------


class Driver(fakes.FakeCuda):
    """Driver calls that must succeed, and the handles they made."""

    def ok(self, name: str, *arguments: Any) -> None:
        code = self.call(name, *arguments)
        assert code == 0, f"{name}: {code}, {self.errors()}"

    def made(self, name: str, *arguments: Any) -> int:
        out = c_uint64()
        self.ok(name, byref(out), *arguments)
        return out.value

    def device(self, n: int) -> int:
        return self.made("cuMemAlloc_v2", n)

    def pinned(self, n: int) -> int:
        return self.made("cuMemHostAlloc", n, 0)

    def stream(self, non_blocking: bool = True) -> int:
        return self.made("cuStreamCreate", int(non_blocking))

    def event(self) -> int:
        return self.made("cuEventCreate", 2)

    def capture(self, stream: int, mode: int = THREAD_LOCAL) -> None:
        self.ok("cuStreamBeginCapture_v2", stream, mode)

    def end(self, stream: int) -> tuple[int, int]:
        graph = c_uint64(1)
        code = self.call("cuStreamEndCapture", stream, byref(graph))
        return code, graph.value

    def nodes(self, graph: int) -> int:
        n = ctypes.c_size_t()
        self.ok("cuGraphGetNodes", graph, None, byref(n))
        return n.value


def fill(address: int, value: int, n: int) -> None:
    ctypes.memset(address, value, n)


def read(address: int, n: int) -> bytes:
    return ctypes.string_at(address, n)


@pytest.fixture
def cuda() -> Iterator[Driver]:
    driver = Driver()
    driver.reset()
    driver.ok("cuInit", 0)
    before = c_uint64()
    driver.ok("cuCtxGetCurrent", byref(before))
    context = driver.made("cuDevicePrimaryCtxRetain", 0)
    driver.ok("cuCtxSetCurrent", context)
    live = driver.all_live()
    yield driver
    driver.fail_at(0)
    assert driver.all_live() == live
    driver.ok("cuCtxSetCurrent", before.value)
    driver.ok("cuDevicePrimaryCtxRelease_v2", 0)
    driver.reset()


class Copying:
    """Pinned → device → pinned on a stream, n bytes of 7."""

    def __init__(self, cuda: Driver, n: int = 64) -> None:
        self.cuda, self.n = cuda, n
        self.source, self.memory, self.result = cuda.pinned(n), cuda.device(n), cuda.pinned(n)
        fill(self.source, 7, n)

    def there(self, stream: int) -> None:
        self.cuda.ok("cuMemcpyHtoDAsync_v2", self.memory, self.source, self.n, stream)

    def back(self, stream: int) -> None:
        self.cuda.ok("cuMemcpyDtoHAsync_v2", self.result, self.memory, self.n, stream)

    def close(self) -> None:
        self.cuda.ok("cuMemFreeHost", self.source)
        self.cuda.ok("cuMemFree_v2", self.memory)
        self.cuda.ok("cuMemFreeHost", self.result)


@pytest.fixture
def copying(cuda: Driver) -> Iterator[Copying]:
    copying = Copying(cuda)
    yield copying
    copying.close()


@pytest.fixture
def stream(cuda: Driver) -> Iterator[int]:
    stream = cuda.stream()
    yield stream
    cuda.ok("cuStreamDestroy_v2", stream)


def test_result_is_stale_until_the_stream_is_waited_for(cuda: Driver, copying: Copying, stream: int) -> None:
    copying.there(stream)
    copying.back(stream)
    assert read(copying.result, 64) == bytes([FRESH]) * 64
    cuda.ok("cuStreamSynchronize", stream)
    assert read(copying.result, 64) == b"\7" * 64
    assert cuda.errors() == []


def test_pageable_source_is_read_at_the_call_and_pageable_target_written_by_it(
    cuda: Driver, copying: Copying, stream: int
) -> None:
    source, target = ctypes.create_string_buffer(b"\1" * 64), ctypes.create_string_buffer(64)
    cuda.ok("cuMemcpyHtoDAsync_v2", copying.memory, ctypes.addressof(source), 64, stream)
    source.raw = b"\2" * 64
    cuda.ok("cuMemcpyDtoHAsync_v2", ctypes.addressof(target), copying.memory, 64, stream)
    assert target.raw == b"\1" * 64


def test_pinned_source_is_read_when_the_stream_gets_there(cuda: Driver, copying: Copying, stream: int) -> None:
    copying.there(stream)
    fill(copying.source, 9, 64)  # too early: nobody waited
    copying.back(stream)
    cuda.ok("cuStreamSynchronize", stream)
    assert read(copying.result, 64) == b"\x09" * 64


@pytest.mark.parametrize("joined", [False, True])
def test_streams_are_ordered_by_events_alone(cuda: Driver, copying: Copying, stream: int, joined: bool) -> None:
    other, event = cuda.stream(), cuda.event()
    copying.there(stream)
    cuda.ok("cuEventRecord", event, stream)
    if joined:
        cuda.ok("cuStreamWaitEvent", other, event, 0)
    copying.back(other)
    cuda.ok("cuStreamSynchronize", other)
    assert read(copying.result, 64) == (b"\7" if joined else bytes([FRESH])) * 64
    cuda.ok("cuStreamSynchronize", stream)
    cuda.ok("cuStreamDestroy_v2", other)
    cuda.ok("cuEventDestroy_v2", event)


@pytest.mark.parametrize("non_blocking", [False, True])
def test_legacy_stream_waits_for_blocking_streams_only(cuda: Driver, copying: Copying, non_blocking: bool) -> None:
    stream = cuda.stream(non_blocking)
    copying.there(stream)
    copying.back(0)
    cuda.ok("cuStreamSynchronize", 0)
    assert read(copying.result, 64) == (bytes([FRESH]) if non_blocking else b"\7") * 64
    cuda.ok("cuStreamSynchronize", stream)
    cuda.ok("cuStreamDestroy_v2", stream)


def test_blocking_stream_waits_for_the_legacy_one(cuda: Driver, copying: Copying) -> None:
    stream = cuda.stream(non_blocking=False)
    copying.there(0)
    copying.back(stream)
    cuda.ok("cuStreamSynchronize", stream)
    assert read(copying.result, 64) == b"\7" * 64
    cuda.ok("cuStreamDestroy_v2", stream)


def test_queries_say_not_ready_once(cuda: Driver, copying: Copying, stream: int) -> None:
    event = cuda.event()
    assert cuda.call("cuEventQuery", event) == 0  # never recorded
    copying.there(stream)
    cuda.ok("cuEventRecord", event, stream)
    copying.back(stream)
    assert [cuda.call("cuEventQuery", event) for _ in range(3)] == [NOT_READY, 0, 0]
    assert read(copying.result, 64) == bytes([FRESH]) * 64, "a query of the event went past it"
    assert [cuda.call("cuStreamQuery", stream) for _ in range(3)] == [NOT_READY, 0, 0]
    assert read(copying.result, 64) == b"\7" * 64
    cuda.ok("cuEventDestroy_v2", event)


def test_destroyed_stream_still_does_its_work(cuda: Driver, copying: Copying) -> None:
    stream = cuda.stream()
    copying.there(stream)
    copying.back(stream)
    cuda.ok("cuStreamDestroy_v2", stream)
    cuda.ok("cuCtxSynchronize")
    assert read(copying.result, 64) == b"\7" * 64
    assert cuda.call("cuStreamSynchronize", stream) == 400
    assert "destroyed" in cuda.errors()[0] or "no stream" in cuda.errors()[0]


def test_memory_mistakes(cuda: Driver) -> None:
    memory, pinned = cuda.device(64), cuda.pinned(64)
    assert [cuda.place(memory), cuda.place(pinned), cuda.place(memory, 65)] == ["device", "pinned", "freed"]
    assert cuda.call("cuMemcpyHtoD_v2", memory, pinned, 65) == INVALID_VALUE
    assert cuda.call("cuMemcpyHtoD_v2", memory + 1, pinned, 64) == INVALID_VALUE
    assert cuda.call("cuMemFreeHost", memory) == INVALID_VALUE
    fill(memory, 7, 64)
    cuda.ok("cuMemFree_v2", memory)
    assert read(memory, 64) == bytes([FREED]) * 64
    assert cuda.call("cuMemFree_v2", memory) == INVALID_VALUE
    assert cuda.call("cuMemcpyDtoH_v2", pinned, memory, 8) == INVALID_VALUE
    assert "freed twice" in cuda.errors()[-2]
    assert len(cuda.errors()) == 5
    cuda.ok("cuMemFreeHost", pinned)


def test_work_on_memory_freed_meanwhile_loses_the_device(cuda: Driver, copying: Copying, stream: int) -> None:
    memory = cuda.device(64)
    cuda.ok("cuMemsetD8Async", memory, 1, 64, stream)
    cuda.ok("cuMemFree_v2", memory)
    assert cuda.call("cuStreamSynchronize", stream) == ILLEGAL_ADDRESS
    assert cuda.call("cuMemsetD8Async", copying.memory, 1, 64, stream) == ILLEGAL_ADDRESS
    assert "when the work ran" in cuda.errors()[0]
    cuda.reset()


def test_registered_memory_and_attributes(cuda: Driver) -> None:
    array = np.zeros(4096, np.uint8)
    address = array.ctypes.data
    out, kind = c_uint64(), c_int()
    assert cuda.call("cuPointerGetAttribute", byref(kind), 2, address) == INVALID_VALUE
    cuda.ok("cuMemHostRegister_v2", address, 4096, 0)
    cuda.ok("cuMemHostGetDevicePointer_v2", byref(out), address + 8, 0)
    cuda.ok("cuPointerGetAttribute", byref(kind), 2, address + 8)
    assert (out.value, kind.value) == (address + 8, 1)
    assert cuda.call("cuMemHostRegister_v2", address + 16, 16, 0) == 712
    cuda.ok("cuMemHostUnregister", address)
    assert cuda.call("cuMemHostUnregister", address) == 713


@pytest.mark.parametrize("reuse", [0, 1])
def test_freed_address_comes_back_only_where_asked_for(cuda: Driver, reuse: int) -> None:
    cuda.set("reuse", reuse)
    first = cuda.device(1000)
    cuda.ok("cuMemFree_v2", first)
    second = cuda.device(1000)
    assert (first == second) is bool(reuse)
    assert read(second, 1000) == bytes([FRESH]) * 1000
    cuda.ok("cuMemFree_v2", second)
    cuda.set("reuse", 0)


def test_memory_is_bounded_over_many_allocations(cuda: Driver) -> None:
    seen = set()
    for _ in range(300):
        memory = cuda.device(1 << 20)
        seen.add(memory)
        cuda.ok("cuMemFree_v2", memory)
    assert len(seen) < 100


def test_out_of_memory(cuda: Driver) -> None:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.ok("cuMemGetInfo_v2", byref(free), byref(total))
    out = c_uint64()
    assert cuda.call("cuMemAlloc_v2", byref(out), free.value + 1) == OUT_OF_MEMORY
    assert total.value == 8 << 30
    assert cuda.errors() == []


# Capture --------------------------------------------------------------------------------------------------------------


def test_captured_work_runs_at_each_launch_and_not_before(cuda: Driver, copying: Copying, stream: int) -> None:
    cuda.capture(stream)
    copying.there(stream)
    copying.back(stream)
    code, graph = cuda.end(stream)
    assert code == 0
    assert cuda.nodes(graph) == 2
    execution = cuda.made("cuGraphInstantiateWithFlags", graph, 0)
    cuda.ok("cuGraphDestroy", graph)
    cuda.ok("cuStreamSynchronize", stream)
    assert read(copying.result, 64) == bytes([FRESH]) * 64
    for value in (1, 2):
        fill(copying.source, value, 64)
        cuda.ok("cuGraphLaunch", execution, stream)
        cuda.ok("cuStreamSynchronize", stream)
        assert read(copying.result, 64) == bytes([value]) * 64
    cuda.ok("cuGraphExecDestroy", execution)
    assert cuda.call("cuGraphLaunch", execution, stream) == INVALID_VALUE


def test_two_launches_of_one_graph_follow_each_other(cuda: Driver, copying: Copying, stream: int) -> None:
    other = cuda.stream()
    cuda.capture(stream)
    copying.there(stream)
    code, graph = cuda.end(stream)
    execution = cuda.made("cuGraphInstantiate_v2", graph, None, None, 0)
    cuda.ok("cuGraphLaunch", execution, stream)
    cuda.ok("cuMemsetD8Async", copying.memory, 3, 64, stream)
    cuda.ok("cuGraphLaunch", execution, other)
    copying.back(other)
    cuda.ok("cuStreamSynchronize", other)
    assert code == 0
    assert read(copying.result, 64) == b"\7" * 64
    cuda.ok("cuStreamSynchronize", stream)
    cuda.ok("cuGraphExecDestroy", execution)
    cuda.ok("cuGraphDestroy", graph)
    cuda.ok("cuStreamDestroy_v2", other)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda c, s, m: c.call("cuStreamSynchronize", s), UNSUPPORTED),
        (lambda c, s, m: c.call("cuStreamQuery", s), UNSUPPORTED),
        (lambda c, s, m: c.call("cuCtxSynchronize"), UNSUPPORTED),
        (lambda c, s, m: c.call("cuMemAlloc_v2", byref(c_uint64()), 64), UNSUPPORTED),
        (lambda c, s, m: c.call("cuMemHostAlloc", byref(c_uint64()), 64, 0), UNSUPPORTED),
        (lambda c, s, m: c.call("cuMemcpyDtoH_v2", m.result, m.memory, 8), UNSUPPORTED),
        (lambda c, s, m: c.call("cuStreamBeginCapture_v2", s, 0), 401),
    ],
)
@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL])
def test_what_a_capture_does_not_survive(
    cuda: Driver, copying: Copying, stream: int, call: Callable[..., int], code: int, mode: int
) -> None:
    cuda.capture(stream, mode)
    copying.there(stream)
    assert call(cuda, stream, copying) == code
    survives = code == 401
    end, graph = cuda.end(stream)
    assert (end, graph == 0) == ((0, False) if survives else (INVALIDATED, True))
    if graph:
        cuda.ok("cuGraphDestroy", graph)
    status = c_int(9)
    cuda.ok("cuStreamIsCapturing", stream, byref(status))
    assert status.value == 0


@pytest.mark.parametrize(("mode", "code"), [(GLOBAL, UNSUPPORTED), (THREAD_LOCAL, 0), (RELAXED, 0)])
def test_another_thread_disturbs_a_global_capture_only(
    cuda: Driver, copying: Copying, stream: int, mode: int, code: int
) -> None:
    context = c_uint64()
    cuda.ok("cuCtxGetCurrent", byref(context))
    codes: list[int] = []

    def allocate() -> None:
        out = c_uint64()
        cuda.ok("cuCtxSetCurrent", context.value)
        codes.append(cuda.call("cuMemAlloc_v2", byref(out), 64))
        if out.value:
            cuda.ok("cuMemFree_v2", out.value)

    cuda.capture(stream, mode)
    copying.there(stream)
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    end, graph = cuda.end(stream)
    assert codes == [code]
    assert end == (INVALIDATED if code else 0)
    if graph:
        cuda.ok("cuGraphDestroy", graph)


def test_capture_and_the_legacy_stream(cuda: Driver, copying: Copying) -> None:
    assert cuda.call("cuStreamBeginCapture_v2", 0, RELAXED) == UNSUPPORTED
    blocking = cuda.stream(non_blocking=False)
    cuda.capture(blocking, RELAXED)
    assert cuda.call("cuMemsetD8Async", copying.memory, 0, 8, 0) == IMPLICIT
    assert cuda.end(blocking) == (INVALIDATED, 0)
    cuda.ok("cuStreamDestroy_v2", blocking)


def test_empty_capture_gives_an_empty_graph(cuda: Driver, stream: int) -> None:
    cuda.capture(stream)
    code, graph = cuda.end(stream)
    assert (code, cuda.nodes(graph)) == (0, 0)
    cuda.ok("cuGraphDestroy", graph)


@pytest.mark.parametrize("joined", [False, True])
def test_forked_capture_must_come_back(cuda: Driver, copying: Copying, stream: int, joined: bool) -> None:
    side, out, back = cuda.stream(), cuda.event(), cuda.event()
    cuda.capture(stream)
    copying.there(stream)
    cuda.ok("cuEventRecord", out, stream)
    cuda.ok("cuStreamWaitEvent", side, out, 0)
    copying.back(side)
    cuda.ok("cuEventRecord", back, side)
    if joined:
        cuda.ok("cuStreamWaitEvent", stream, back, 0)
    code, graph = cuda.end(stream)
    assert code == (0 if joined else UNJOINED)
    if joined:
        assert cuda.nodes(graph) == 2
        cuda.ok("cuGraphDestroy", graph)
    cuda.ok("cuStreamDestroy_v2", side)
    cuda.ok("cuEventDestroy_v2", out)
    cuda.ok("cuEventDestroy_v2", back)


def test_events_inside_and_outside_a_capture(cuda: Driver, copying: Copying, stream: int) -> None:
    other, outside, inside = cuda.stream(), cuda.event(), cuda.event()
    copying.there(other)
    cuda.ok("cuEventRecord", outside, other)
    cuda.capture(stream)
    assert cuda.call("cuStreamWaitEvent", stream, outside, 0) == ISOLATION
    assert cuda.end(stream)[0] == INVALIDATED
    cuda.capture(stream)
    cuda.ok("cuEventRecord", inside, stream)
    assert cuda.call("cuEventSynchronize", inside) == CAPTURED_EVENT
    assert cuda.end(stream)[0] == INVALIDATED
    cuda.ok("cuStreamSynchronize", other)
    cuda.ok("cuStreamDestroy_v2", other)
    cuda.ok("cuEventDestroy_v2", outside)
    cuda.ok("cuEventDestroy_v2", inside)


def test_captures_can_be_made_to_fail(cuda: Driver, copying: Copying, stream: int) -> None:
    cuda.set("capture_fail", INVALIDATED)
    cuda.capture(stream)
    copying.there(stream)
    assert cuda.end(stream) == (INVALIDATED, 0)
    cuda.set("capture_fail", 0)


# Failing calls --------------------------------------------------------------------------------------------------------


def test_nth_call_fails_once_and_is_named(cuda: Driver, stream: int) -> None:
    cuda.fail_at(2, 999)
    memory = cuda.device(8)
    assert cuda.call("cuMemsetD8Async", memory, 0, 8, stream) == 999
    assert cuda.last_failed() == "cuMemsetD8Async"
    before, count = cuda.calls(), cuda.count("cuMemsetD8Async")
    cuda.ok("cuMemsetD8Async", memory, 0, 8, stream)
    assert (cuda.calls(), cuda.count("cuMemsetD8Async")) == (before + 1, count + 1)
    assert cuda.log()[-2:] == ["cuMemsetD8Async", "cuMemsetD8Async"]
    cuda.ok("cuStreamSynchronize", stream)
    cuda.fail_at(1, 999)
    assert cuda.call("cuMemFree_v2", memory) == 999
    assert cuda.place(memory) == "freed", "a failing call that gives something back must still do so"
    assert cuda.errors() == []


def test_failing_end_of_capture_ends_it_and_gives_no_graph(cuda: Driver, copying: Copying, stream: int) -> None:
    cuda.capture(stream)
    copying.there(stream)
    cuda.fail_at(1, 999)
    assert cuda.end(stream) == (999, 0)
    cuda.ok("cuStreamSynchronize", stream)


def test_walk_over_driver_calls_of_a_small_run(cuda: Driver) -> None:
    def run() -> bool:
        made: list[tuple[str, int]] = []

        def step(name: str, *arguments: Any, undo: str = "") -> None:
            out = c_uint64()
            if cuda.call(name, *((byref(out), *arguments) if undo else arguments)):
                raise ArithmeticError(name)
            if undo:
                made.append((undo, out.value))

        try:
            step("cuMemAlloc_v2", 64, undo="cuMemFree_v2")
            step("cuMemHostAlloc", 64, 0, undo="cuMemFreeHost")
            step("cuStreamCreate", 1, undo="cuStreamDestroy_v2")
            (_, memory), (_, host), (_, stream) = made
            step("cuMemcpyHtoDAsync_v2", memory, host, 64, stream)
            step("cuStreamSynchronize", stream)
            return True
        except ArithmeticError:
            return False
        finally:
            for undo, handle in reversed(made):
                if undo == "cuMemFree_v2":
                    cuda.call("cuCtxSynchronize")
                cuda.call(undo, handle)

    live, start = cuda.all_live(), cuda.calls()
    assert run()
    n = cuda.calls() - start
    failed = []
    for i in range(1, n + 1):
        cuda.fail_at(i)
        run()
        failed.append(cuda.last_failed())
        assert cuda.all_live() == live
    cuda.fail_at(0)
    assert run()
    assert failed[:5] == [
        "cuMemAlloc_v2",
        "cuMemHostAlloc",
        "cuStreamCreate",
        "cuMemcpyHtoDAsync_v2",
        "cuStreamSynchronize",
    ]
    assert cuda.errors() == []


# The kernel -----------------------------------------------------------------------------------------------------------

PTX = b"""
.version 8.2
.target sm_70
.address_size 64
.visible .entry jetrt_copy_cast(.param .align 8 .b8 p[168])
{ ret; }
"""


def launch(
    cuda: Driver, stream: int, dst: int, src: int, dims: list[int], strides: list[int], types: tuple[int, int]
) -> int:
    module = cuda.made("cuModuleLoadData", PTX)
    function = cuda.made("cuModuleGetFunction", module, b"jetrt_copy_cast")
    n = int(np.prod(dims))
    pad = [0] * (8 - len(dims))
    block = struct.pack("<QQQ8q8qiiii", dst, src, n, *dims, *pad, *strides, *pad, len(dims), *types, 0)
    assert len(block) == 168
    buffer = ctypes.create_string_buffer(block, 168)
    parameters = (c_void_p * 1)(ctypes.addressof(buffer))
    one = ctypes.c_uint
    code = cuda.call(
        "cuLaunchKernel", function, one(1), one(1), one(1), one(256), one(1), one(1), one(0), stream, parameters, None
    )
    buffer.raw = b"\0" * 168  # parameters are taken at the call
    if code == 0:
        code = cuda.call("cuStreamSynchronize", stream)
    cuda.call("cuModuleUnload", module)
    return code


def test_kernel_casts_a_strided_tensor(cuda: Driver, stream: int) -> None:
    values = np.array([[1.5, -2.75, 3.0], [1e30, 0.0, -1.0]], np.float32)
    source, memory, target = cuda.pinned(values.nbytes), cuda.device(48), cuda.pinned(48)
    ctypes.memmove(source, values.ctypes.data, values.nbytes)
    # Transposed: dims (3, 2), strides (1, 3); to int64 (8), then to bool (4).
    assert launch(cuda, stream, memory, source, [3, 2], [1, 3], (0, 8)) == 0
    cuda.ok("cuMemcpyDtoH_v2", target, memory, 48)
    got = np.frombuffer(read(target, 48), np.int64).reshape(3, 2)
    assert got[:, 0].tolist() == [1, -2, 3]
    assert launch(cuda, stream, memory, source, [3, 2], [1, 3], (0, 4)) == 0
    cuda.ok("cuMemcpyDtoH_v2", target, memory, 6)
    assert np.frombuffer(read(target, 6), np.bool_).tolist() == [True, True, True, False, True, True]
    # bfloat16 rounds to nearest even: 1.00390625 lies between 1.0 and 1.0078125.
    ctypes.memmove(source, np.array([1.00390625], np.float32).ctypes.data, 4)
    assert launch(cuda, stream, memory, source, [1], [1], (0, 7)) == 0
    cuda.ok("cuMemcpyDtoH_v2", target, memory, 2)
    assert read(target, 2) == b"\x80\x3f"
    for name, address in (("cuMemFreeHost", source), ("cuMemFree_v2", memory), ("cuMemFreeHost", target)):
        cuda.ok(name, address)
    assert cuda.errors() == []


def test_kernel_cannot_reach_pageable_memory(cuda: Driver, stream: int) -> None:
    array, memory = np.zeros(8, np.float32), cuda.device(32)
    assert launch(cuda, stream, memory, array.ctypes.data, [8], [1], (0, 0)) == ILLEGAL_ADDRESS
    assert "cannot reach" in cuda.errors()[0]
    cuda.reset()
    cuda.ok("cuMemFree_v2", memory)


def test_ptx_newer_than_the_driver_or_the_gpu_is_refused(cuda: Driver) -> None:
    out = c_uint64()
    assert cuda.call("cuModuleLoadData", byref(out), PTX.replace(b"8.2", b"8.7")) == 222
    assert cuda.call("cuModuleLoadData", byref(out), PTX.replace(b"sm_70", b"sm_100")) == 209
    assert cuda.call("cuModuleLoadData", byref(out), b"no PTX") == 200
    module = cuda.made("cuModuleLoadData", PTX)
    assert cuda.call("cuModuleGetFunction", byref(out), module, b"other") == 500
    cuda.ok("cuModuleUnload", module)


def test_settings_from_the_environment() -> None:
    code = """
import ctypes, fakes
cuda = fakes.FakeCuda()
value = ctypes.c_int()
print(cuda.call("cuInit", 0), end=" ")
for attribute in (18, 75, 76):
    cuda.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, 1)
    print(value.value, end=" ")
cuda.call("cuDeviceGetCount", ctypes.byref(value))
print(value.value)
"""
    env = {"FAKE_CUDA_DEVICES": 2, "FAKE_CUDA_INTEGRATED": 1, "FAKE_CUDA_SM": 87}
    assert fakes.run_python(code, env=env).stdout.split() == ["0", "1", "8", "7", "2"]
    assert fakes.run_python(code, env={"FAKE_CUDA_DEVICES": 0}).stdout.split()[0] == "100"


# TensorRT, called by hand through the slots of abi/vtables.csv --------------------------------------------------------

Dims = type("Dims", (ctypes.Structure,), {"_fields_": [("nb", c_int32), ("d", c_int64 * 8)]})


def dims(*shape: int) -> Any:
    result = Dims()
    result.nb = len(shape)
    result.d[: len(shape)] = shape
    return result


class Trt:
    """The stand-in's library in this process, and enough of a caller to run an engine."""

    def __init__(self) -> None:
        self.fake = fakes.FakeTrt()
        self.cuda = Driver()
        self.version = tuple(int(part) for part in os.environ["FAKE_TRT_VERSION"].split(".")[:2])
        with (ROOT / "abi" / "vtables.csv").open(newline="") as file:
            self.rows = list(csv.DictReader(file))
        self.lines: list[tuple[int, str]] = []
        self.keep: list[Any] = []
        log = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_char_p)(self._log)
        self.logger = self.implement("ILogger", log=log)
        create = self.fake.library["createInferRuntime_INTERNAL"]
        create.restype, create.argtypes = c_void_p, [c_void_p, c_int]
        self.create = create

    def _log(self, _this: int, severity: int, text: bytes) -> None:
        self.lines.append((severity, text.decode()))

    def errors(self) -> list[str]:
        return [text for severity, text in self.lines if severity <= 1]

    def slot(self, cls: str, method: str) -> int | None:
        major, minor = self.version
        for row in self.rows:
            if (row["class"], row["method"]) != (cls, method) or "IStreamReader&" in row["signature"]:
                continue
            since = tuple(int(part) for part in row["since"].removeprefix("<=").split(".")[:2])
            columns = [key for key in row if re.fullmatch(rf"{major}\.\d+", key) and row[key]]
            if columns and since <= (major, minor):
                return int(row[columns[0]])
        return None

    def implement(self, interface: str, **methods: Any) -> int:
        """An object of ours with that interface."""
        table = (c_void_p * 16)()
        self.keep += [table, *methods.values()]
        methods["getInterfaceInfo"] = self.fake.library[f"fake_trt_info_{interface}"]
        for name, function in methods.items():
            slot = self.slot(interface, name)
            if slot is not None:
                table[slot] = ctypes.cast(function, c_void_p).value
        body = (c_void_p * 1)(ctypes.addressof(table))
        self.keep.append(body)
        return ctypes.addressof(body)

    def call_slot(self, this: int, slot: int, result: Any, *arguments: Any) -> Any:
        implementation = c_void_p.from_address(this + 8).value
        assert implementation is not None
        assert implementation != this
        table = c_void_p.from_address(implementation).value
        assert table is not None
        address = c_void_p.from_address(table + 8 * slot).value
        assert address is not None
        kinds = [c_void_p]
        for argument in arguments:
            kinds.append(
                {bytes: c_char_p, bool: c_bool, int: c_int64}.get(type(argument), type(argument))  # type: ignore[arg-type]
            )
        return ctypes.CFUNCTYPE(result, *kinds)(address)(implementation, *arguments)

    def call(self, this: int, cls: str, method: str, result: Any, *arguments: Any) -> Any:
        slot = self.slot(cls, method)
        assert slot is not None, method
        return self.call_slot(this, slot, result, *arguments)

    def destroy(self, this: int) -> None:
        table = c_void_p.from_address(this).value
        assert table is not None
        address = c_void_p.from_address(table + 8).value
        assert address is not None
        ctypes.CFUNCTYPE(None, c_void_p)(address)(this)

    def runtime(self) -> int:
        made = self.create(self.logger, 0)
        if made is None or made < 4096:
            raise RuntimeError(f"no runtime: {self.errors()}")
        return int(made)

    def engine(self, runtime: int, plan: bytes) -> int | None:
        result = self.call(runtime, "VRuntime", "deserializeCudaEngine", c_void_p, plan, len(plan))
        return None if result is None else int(result)

    def context(self, engine: int, strategy: int = 0) -> int | None:
        result = self.call(engine, "VCudaEngine", "createExecutionContext", c_void_p, c_int32(strategy))
        return None if result is None else int(result)

    def bind(self, context: int, name: str, address: int, shape: tuple[int, ...] | None = None) -> bool:
        if shape is not None:
            wanted = dims(*shape)
            done = self.call(
                context, "VExecutionContext", "setInputShape", c_bool, name.encode(), ctypes.addressof(wanted)
            )
            if not done:
                return False
        return bool(self.call(context, "VExecutionContext", "setTensorAddress", c_bool, name.encode(), address))

    def enqueue(self, context: int, stream: int) -> bool:
        return bool(self.call(context, "VExecutionContext", "enqueueV3", c_bool, stream))

    def shape(self, this: int, cls: str, name: str) -> list[int] | None:
        got = self.call(this, cls, "getTensorShape", Dims, name.encode())
        return None if got.nb < 0 else list(got.d[: got.nb])


class Session:
    """A runtime, an engine and a context for one plan, with a stream; `close` gives all back and looks for leaks."""

    def __init__(self, plan: bytes, strategy: int = 0) -> None:
        self.trt = trt = Trt()
        trt.fake.reset()
        trt.cuda.reset()
        trt.cuda.ok("cuInit", 0)
        trt.cuda.made("cuDevicePrimaryCtxRetain", 0)
        trt.cuda.ok("cuCtxSetCurrent", 0xC0DE0000)
        self.cuda = trt.cuda
        self.live = (self.cuda.all_live(), trt.fake.all_live())
        self.runtime = trt.runtime()
        engine = trt.engine(self.runtime, plan)
        assert engine, trt.errors()
        self.engine = engine
        context = trt.context(engine, strategy)
        assert context, trt.errors()
        self.context = context
        self.stream = self.cuda.stream()
        self.memory: list[int] = []

    def device(self, n: int) -> int:
        self.memory.append(self.cuda.device(n))
        return self.memory[-1]

    def upload(self, array: np.ndarray[Any, Any]) -> int:
        memory = self.device(max(array.nbytes, 1))
        array = np.ascontiguousarray(array)
        self.cuda.ok("cuMemcpyHtoD_v2", memory, array.ctypes.data, array.nbytes)
        return memory

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        result = np.empty(shape, dtype)
        self.cuda.ok("cuMemcpyDtoH_v2", result.ctypes.data, address, result.nbytes)
        return result

    def close(self, clean: bool = True) -> None:
        self.cuda.call("cuCtxSynchronize")
        for this in (self.context, self.engine, self.runtime):
            self.trt.destroy(this)
        for memory in self.memory:
            self.cuda.call("cuMemFree_v2", memory)
        self.cuda.call("cuStreamDestroy_v2", self.stream)
        if clean:
            assert (self.cuda.errors(), self.trt.fake.errors()) == ([], [])
        assert (self.cuda.all_live(), self.trt.fake.all_live()) == self.live
        self.cuda.call("cuDevicePrimaryCtxRelease_v2", 0)
        self.cuda.reset()
        self.trt.fake.reset()


@pytest.fixture
def session() -> Iterator[Callable[..., Session]]:
    made: list[Session] = []

    def make(program: Any = "mlp", strategy: int = 0, **fields: Any) -> Session:
        made.append(Session(fakes.plan_bytes(program, **fields), strategy))
        return made[-1]

    yield make
    for one in made:
        one.close()


def run_mlp(session: Session) -> None:
    trt = session.trt
    x = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    source, target = session.upload(x), session.device(8 * 10 * 4)
    assert trt.bind(session.context, "x", source, (8, 64))
    assert trt.bind(session.context, "y", target)
    assert trt.shape(session.context, "VExecutionContext", "y") == [8, 10]
    assert trt.enqueue(session.context, session.stream)
    assert session.cuda.live("pending") > 0
    session.cuda.ok("cuStreamSynchronize", session.stream)
    np.testing.assert_allclose(
        session.download(target, (8, 10), np.float32), fakes.mlp_reference(x), rtol=1e-5, atol=1e-5
    )


WALK = """
import test_fakes, fakes
from ctypes import c_int32, c_char_p, c_void_p
session = test_fakes.Session(fakes.plan_bytes("mlp", log=[[2, "a warning"]]))
trt = session.trt
test_fakes.run_mlp(session)
names = [trt.call(session.engine, "VCudaEngine", "getIOTensorName", c_char_p, c_int32(i)) for i in range(2)]
assert names == [b"x", b"y"], names
assert trt.call(session.engine, "VCudaEngine", "getNbIOTensors", c_int32) == 2
assert trt.shape(session.engine, "VCudaEngine", "x") == [-1, 64]
low = trt.call(session.engine, "VCudaEngine", "getProfileShape", test_fakes.Dims, b"x", c_int32(0), c_int32(2))
assert list(low.d[:low.nb]) == [64, 64]
inspector = trt.call(session.engine, "VCudaEngine", "createEngineInspector", c_void_p)
assert b"Layers" in trt.call(inspector, "VEngineInspector", "getEngineInformation", c_char_p, c_int32(1))
trt.destroy(inspector)
memory = trt.call(session.engine, "VCudaEngine", "serialize", c_void_p)
size = trt.call(memory, "VHostMemory", "size", test_fakes.c_uint64)
assert size == len(fakes.plan_bytes("mlp", log=[[2, "a warning"]]))
trt.destroy(memory)
assert (2, "a warning") in trt.lines, trt.lines
session.close()
print(trt.slot("ILogger", "log"), trt.slot("VExecutionContext", "enqueueV3"))
"""


@pytest.mark.parametrize(
    ("version", "slots"),
    [("10.0.0.6", "0 37"), ("10.6.0.26", "0 37"), ("10.16.0.1", "0 37"), ("11.0.0.114", "4 36"), ("11.1.0.2", "4 36")],
)
def test_an_engine_runs_by_the_slots_of_each_version(version: str, slots: str) -> None:
    assert fakes.run_python(WALK, version=version).stdout.strip() == slots


@pytest.mark.parametrize(
    ("slot", "text"),
    [
        (
            "trt.slot('VCudaEngine', 'createRefitter')",
            "slot 42 of ICudaEngine was called, which is not filled: createRefitter",
        ),
        ("54", "slot 54 of ICudaEngine was called, which is not filled: no such method in this version"),
    ],
)
def test_slots_that_nobody_filled_abort_with_their_name(slot: str, text: str) -> None:
    code = f"""
import test_fakes, fakes, ctypes
session = test_fakes.Session(fakes.plan_bytes("mlp"))
trt = session.trt
trt.call_slot(session.engine, {slot}, ctypes.c_void_p)
"""
    done = fakes.run_python(code, check=False)
    assert done.returncode < 0
    assert text in done.stderr


def test_library_of_another_major_version() -> None:
    code = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print(library.getInferLibVersion(), hasattr(library, "getInferLibMajorVersion"))
"""
    old = fakes.run_python(code, "libnvinfer.so.8", version="8.6.1.6")
    assert old.stdout.split() == ["8601", "False"]
    new = fakes.run_python(code, "libnvinfer.so.12", version="12.0.0.1")
    assert new.stdout.split() == ["120000", "True"]


def test_no_driver_no_runtime() -> None:
    code = "import test_fakes; trt = test_fakes.Trt(); print(trt.create(trt.logger, 0), trt.errors())"
    out = fakes.run_python(code, env={"FAKE_CUDA_DEVICES": 0}).stdout
    assert out.startswith(str(0x238))
    assert "CUDA error 100" in out


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (lambda: b"junk" + bytes(100), "Magic tag does not match"),
        (lambda: fakes.plan_bytes("mlp")[:20], "Magic tag does not match"),
        (lambda: fakes.plan_bytes("mlp")[:-10], "does not match archive size"),
        (lambda: fakes.plan_bytes("mlp", serialization=3), "Version tag does not match"),
        (
            lambda: fakes.plan_bytes("mlp", version="10.5.0.18"),
            "expecting library version 10.6.0.26 got 10.5.0.18, please rebuild.",
        ),
        (lambda: fakes.plan_bytes("mlp", sm=87), "expecting compute 9.0 got compute 8.7, please rebuild."),
        (lambda: fakes.plan_bytes("mlp", host_code=True), "since IRuntime::getEngineHostCodeAllowed() is false."),
        (lambda: fakes.plan_bytes("mlp", fail="deserialize"), "the plan says so"),
    ],
)
def test_plans_that_are_refused(session: Callable[..., Session], plan: Callable[[], bytes], text: str) -> None:
    s = session()
    assert s.trt.engine(s.runtime, plan()) is None
    assert len(s.trt.errors()) == 1
    assert text in s.trt.errors()[0]


def test_host_code_when_allowed_and_warning_about_another_model(session: Callable[..., Session]) -> None:
    s = session()
    s.trt.call(s.runtime, "VRuntime", "setEngineHostCodeAllowed", None, True)
    engine = s.trt.engine(s.runtime, fakes.plan_bytes("mlp", host_code=True, foreign_model=True))
    assert engine
    assert any(severity == 2 and "different models of devices" in text for severity, text in s.trt.lines)
    s.trt.destroy(engine)


def test_what_is_missing_at_enqueue_is_named(session: Callable[..., Session]) -> None:
    s = session()
    source, target = s.device(8 * 64 * 4), s.device(8 * 10 * 4)
    assert not s.trt.enqueue(s.context, s.stream)
    assert "shape of input x has not been set" in s.trt.errors()[-1]
    assert not s.trt.bind(s.context, "x", source, (65, 64))
    assert "[65, 64]" in s.trt.errors()[-1]
    assert "[64, 64]" in s.trt.errors()[-1]
    assert not s.trt.bind(s.context, "x", source, (8, 63))
    assert not s.trt.bind(s.context, "nothing", source)
    assert "invalid tensor name: nothing" in s.trt.errors()[-1]
    wanted = dims(8, 64)
    assert s.trt.call(s.context, "VExecutionContext", "setInputShape", c_bool, b"x", ctypes.addressof(wanted))
    assert not s.trt.enqueue(s.context, s.stream)
    assert "Address is not set for input tensor x" in s.trt.errors()[-1]
    assert s.trt.bind(s.context, "x", source)
    assert not s.trt.enqueue(s.context, s.stream)
    assert "output tensor y" in s.trt.errors()[-1]
    assert s.trt.bind(s.context, "y", target)
    assert s.trt.enqueue(s.context, s.stream)
    s.cuda.ok("cuStreamSynchronize", s.stream)


def test_dit5(session: Callable[..., Session]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    s = session("dit5", aux_streams=2)
    rng = np.random.default_rng(2)
    length = 100
    arrays = {
        "sa_embs": rng.standard_normal((1, 41, 64)).astype(ml_dtypes.bfloat16),
        "vl_embs": rng.standard_normal((1, length, 64)).astype(ml_dtypes.bfloat16),
        "timestep": np.array([3], np.int64),
        "image_mask": rng.random((1, length)) > 0.3,
        "backbone_attention_mask": rng.random((1, length)) > 0.3,
    }
    for name, array in arrays.items():
        assert s.trt.bind(s.context, name, s.upload(array), array.shape)
    target = s.device(41 * 64 * 2)
    assert s.trt.bind(s.context, "output", target)
    assert s.trt.enqueue(s.context, s.stream)
    s.cuda.ok("cuStreamSynchronize", s.stream)
    got = s.download(target, (1, 41, 64), np.uint16).view(ml_dtypes.bfloat16)
    wanted = fakes.dit5_reference(*arrays.values()).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))
    assert s.cuda.count("cuLaunchKernel") == 4 + 2


@pytest.mark.parametrize("given", [True, False])
def test_output_of_data_dependent_shape(session: Callable[..., Session], given: bool) -> None:
    s = session("nonzero")
    x = np.array([[0, 1, 0, 2], [3, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    calls: list[Any] = []
    place = s.device(2 * 12 * 8) if given else 0

    def reallocate(_this: int, name: bytes, current: int, size: int, alignment: int, _stream: int) -> int:
        calls.append((name, current or 0, size, alignment))
        return place

    def notify(_this: int, name: bytes, shape: Any) -> None:
        calls.append((name, list(shape.contents.d[: shape.contents.nb])))

    allocator = s.trt.implement(
        "IOutputAllocator",
        reallocateOutputAsync=ctypes.CFUNCTYPE(c_void_p, c_void_p, c_char_p, c_void_p, c_uint64, c_uint64, c_void_p)(
            reallocate
        ),
        notifyShape=ctypes.CFUNCTYPE(None, c_void_p, c_char_p, POINTER(Dims))(notify),
    )
    assert s.trt.bind(s.context, "x", s.upload(x), (3, 4))
    assert s.trt.shape(s.context, "VExecutionContext", "y") == [2, -1]
    assert s.trt.call(s.context, "VExecutionContext", "getMaxOutputSize", c_int64, b"y") == 2 * 12 * 8
    assert s.trt.call(s.context, "VExecutionContext", "setOutputAllocator", c_bool, b"y", allocator)
    assert s.trt.enqueue(s.context, s.stream) is given
    assert calls[0] == (b"y", 0, 2 * 3 * 8, 256)
    if not given:
        assert "output allocator of y gave nothing" in s.trt.errors()[-1]
        return
    assert calls[1] == (b"y", [2, 3])
    s.cuda.ok("cuStreamSynchronize", s.stream)
    np.testing.assert_array_equal(s.download(place, (2, 3), np.int64), fakes.nonzero_reference(x))
    # It waits inside enqueue, which no capture survives.
    s.cuda.capture(s.stream)
    assert not s.trt.enqueue(s.context, s.stream)
    assert s.cuda.end(s.stream)[0] == INVALIDATED


def test_shape_tensor_is_read_on_the_host(session: Callable[..., Session]) -> None:
    s = session("shape_input")
    size = np.array([2, 3], np.int64)
    target = s.device(6 * 4)
    assert s.trt.bind(s.context, "x", s.upload(np.arange(4, dtype=np.float32)), (4,))
    assert s.trt.call(s.context, "VExecutionContext", "inferShapes", c_int32, c_int32(0), 0) == 1
    assert s.trt.bind(s.context, "size", size.ctypes.data, (2,))
    assert s.trt.call(s.context, "VExecutionContext", "inferShapes", c_int32, c_int32(0), 0) == 0
    assert s.trt.shape(s.context, "VExecutionContext", "y") == [2, 3]
    assert s.trt.bind(s.context, "y", target)
    assert s.trt.enqueue(s.context, s.stream)
    s.cuda.ok("cuStreamSynchronize", s.stream)
    assert s.download(target, (2, 3), np.float32).tolist() == [[0, 1, 2], [3, 0, 1]]
    size[:] = 9
    assert s.trt.call(s.context, "VExecutionContext", "inferShapes", c_int32, c_int32(0), 0) == -1
    assert "[9, 9]" in s.trt.errors()[-1]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int32", "int64", "bool", "uint8", "fp8"])
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 1, 3)])
def test_copies_of_every_dtype_and_rank(session: Callable[..., Session], dtype: str, shape: tuple[int, ...]) -> None:
    s = session(fakes.copy_of(dtype, shape))
    width = {"float32": 4, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2}.get(dtype, 1)
    data = np.arange(int(np.prod(shape)) * width, dtype=np.uint8)
    target = s.device(max(data.nbytes, 1))
    assert s.trt.bind(s.context, "x", s.upload(data))
    assert s.trt.bind(s.context, "y", target)
    assert s.trt.enqueue(s.context, s.stream)
    s.cuda.ok("cuStreamSynchronize", s.stream)
    np.testing.assert_array_equal(s.download(target, data.shape, np.uint8), data)


def bound_mlp(s: Session) -> int:
    target = s.device(8 * 10 * 4)
    assert s.trt.bind(s.context, "x", s.upload(np.ones((8, 64), np.float32)), (8, 64))
    assert s.trt.bind(s.context, "y", target)
    return target


def test_enqueue_on_the_legacy_stream_waits(session: Callable[..., Session]) -> None:
    s = session()
    bound_mlp(s)
    assert s.trt.enqueue(s.context, s.stream)
    assert s.trt.fake.count("legacy_stream") == 0
    before = s.cuda.count("cuStreamSynchronize")
    assert s.trt.enqueue(s.context, 0)
    assert s.cuda.count("cuStreamSynchronize") == before + 1
    assert s.trt.fake.count("legacy_stream") == 1
    assert any("Using default stream in enqueueV3()" in text for _, text in s.trt.lines)
    s.cuda.ok("cuCtxSynchronize")


def captured(s: Session) -> tuple[bool, int, int]:
    s.cuda.capture(s.stream)
    enqueued = s.trt.enqueue(s.context, s.stream)
    return enqueued, *s.cuda.end(s.stream)


def test_captured_engine(session: Callable[..., Session]) -> None:
    s = session(nodes=4)
    target = bound_mlp(s)
    # The first call for new shapes cannot be captured, the next ones can.
    assert captured(s) == (False, INVALIDATED, 0)
    assert s.trt.enqueue(s.context, s.stream)
    s.cuda.ok("cuStreamSynchronize", s.stream)
    wanted = s.download(target, (8, 10), np.float32)
    s.cuda.ok("cuMemsetD8Async", target, 0, 320, s.stream)
    enqueued, code, graph = captured(s)
    assert (enqueued, code, s.cuda.nodes(graph)) == (True, 0, 4)
    execution = s.cuda.made("cuGraphInstantiateWithFlags", graph, 0)
    s.cuda.ok("cuGraphLaunch", execution, s.stream)
    s.cuda.ok("cuStreamSynchronize", s.stream)
    np.testing.assert_array_equal(s.download(target, (8, 10), np.float32), wanted)
    s.cuda.ok("cuGraphExecDestroy", execution)
    s.cuda.ok("cuGraphDestroy", graph)


@pytest.mark.parametrize(
    ("kind", "enqueued", "code", "nodes"),
    [("empty", True, 0, 0), ("fail", False, 0, 0), ("sync", False, INVALIDATED, 0), ("differ", True, 0, 2)],
)
def test_what_goes_wrong_only_under_capture(
    session: Callable[..., Session], kind: str, enqueued: bool, code: int, nodes: int
) -> None:
    s = session(in_capture=kind)
    target = bound_mlp(s)
    assert s.trt.enqueue(s.context, s.stream)
    s.cuda.ok("cuStreamSynchronize", s.stream)
    wanted = s.download(target, (8, 10), np.float32)
    got = captured(s)
    assert got[:2] == (enqueued, code)
    if code:
        return
    assert s.cuda.nodes(got[2]) == nodes
    execution = s.cuda.made("cuGraphInstantiateWithFlags", got[2], 0)
    s.cuda.ok("cuGraphLaunch", execution, s.stream)
    s.cuda.ok("cuStreamSynchronize", s.stream)
    same = bool((s.download(target, (8, 10), np.float32) == wanted).all())
    assert same is (kind != "differ")
    s.cuda.ok("cuGraphExecDestroy", execution)
    s.cuda.ok("cuGraphDestroy", got[2])


def test_context_memory_of_the_caller(session: Callable[..., Session]) -> None:
    s = session(strategy=2, device_memory=4096)
    bound_mlp(s)
    assert not s.trt.enqueue(s.context, s.stream)
    assert "4096" in s.trt.errors()[-2]
    assert s.trt.call(s.engine, "VCudaEngine", "getDeviceMemorySizeV2", c_int64) == 4096
    s.trt.call(s.context, "VExecutionContext", "setDeviceMemoryV2", None, s.device(4096), 4096)
    assert s.trt.enqueue(s.context, s.stream)
    s.cuda.ok("cuStreamSynchronize", s.stream)


def test_profiles(session: Callable[..., Session]) -> None:
    profiles = [([1, 4], [2, 4], [4, 4]), ([5, 4], [6, 4], [9, 4])]
    s = session(fakes.copy_of("float32", [-1, 4], profiles))
    assert s.trt.call(s.engine, "VCudaEngine", "getNbOptimizationProfiles", c_int32) == 2
    memory = s.device(9 * 16)
    assert not s.trt.bind(s.context, "x", memory, (6, 4))
    profile = ("VExecutionContext", "setOptimizationProfileAsync", c_bool)
    assert s.trt.call(s.context, *profile, c_int32(1), s.stream)
    assert s.trt.bind(s.context, "x", memory, (6, 4))
    assert not s.trt.bind(s.context, "x", memory, (4, 4))
    assert not s.trt.call(s.context, *profile, c_int32(2), s.stream)
    s.cuda.ok("cuStreamSynchronize", s.stream)


def test_profiler(session: Callable[..., Session]) -> None:
    s = session()
    bound_mlp(s)
    layers: list[bytes] = []
    report = ctypes.CFUNCTYPE(None, c_void_p, c_char_p, c_float)(lambda _this, name, _ms: layers.append(name))
    profiler = s.trt.implement("IProfiler", reportLayerTime=report)
    s.trt.call(s.context, "VExecutionContext", "setProfiler", None, profiler)
    assert s.trt.enqueue(s.context, s.stream)
    assert layers == [b"layer_0", b"layer_1"]


STREAMED = """
import ctypes, fakes, test_fakes
from ctypes import c_bool, c_int, c_int64, c_void_p
plan = fakes.plan_bytes("mlp")
session = test_fakes.Session(plan)
trt, at, reads = session.trt, 0, []
cut = len(plan)

def read(_this, target, n, _stream):
    global at
    part = plan[:cut][at:at + min(n, 1000)]
    ctypes.memmove(target, part, len(part))
    at += len(part)
    reads.append(len(part))
    return len(part)

def seek(_this, offset, where):
    global at
    at = {0: 0, 1: at, 2: len(plan)}[where] + offset
    return True

reader = trt.implement(
    "IStreamReaderV2",
    read=ctypes.CFUNCTYPE(c_int64, c_void_p, c_void_p, c_int64, c_void_p)(read),
    seek=ctypes.CFUNCTYPE(c_bool, c_void_p, c_int64, c_int)(seek),
)
engine = trt.call(session.runtime, "VRuntime", "deserializeCudaEngineV2", c_void_p, reader)
assert sum(reads) == len(plan) + 28, reads
trt.destroy(engine)
at, cut = 0, 100
assert trt.call(session.runtime, "VRuntime", "deserializeCudaEngineV2", c_void_p, reader) is None
assert "ended early" in trt.errors()[-1]
session.close()
"""


@pytest.mark.parametrize("version", ["10.7.0.23", "11.0.0.114"])
def test_plan_from_a_stream(version: str) -> None:
    fakes.run_python(STREAMED, version=version)


def test_allocator_and_error_recorder_of_the_caller(session: Callable[..., Session]) -> None:
    s = session()
    live: list[int] = []
    told: list[bytes] = []
    references: list[int] = []

    def allocate(_this: int, size: int, alignment: int, _flags: int) -> int:
        assert alignment == 256
        live.append(s.cuda.device(size))
        return live[-1]

    def deallocate(_this: int, memory: int) -> bool:
        live.remove(memory)
        s.cuda.ok("cuMemFree_v2", memory)
        return True

    def report(_this: int, _code: int, text: bytes) -> bool:
        told.append(text)
        return True

    count = ctypes.CFUNCTYPE(c_int32, c_void_p)
    allocator = s.trt.implement(
        "IGpuAllocator",
        allocate=ctypes.CFUNCTYPE(c_void_p, c_void_p, c_uint64, c_uint64, ctypes.c_uint32)(allocate),
        deallocate=ctypes.CFUNCTYPE(c_bool, c_void_p, c_void_p)(deallocate),
    )
    recorder = s.trt.implement(
        "IErrorRecorder",
        reportError=ctypes.CFUNCTYPE(c_bool, c_void_p, c_int32, c_char_p)(report),
        incRefCount=count(lambda _this: references.append(1) or 1),
        decRefCount=count(lambda _this: references.append(-1) or 0),
    )
    s.trt.call(s.runtime, "VRuntime", "setGpuAllocator", None, allocator)
    s.trt.call(s.runtime, "VRuntime", "setErrorRecorder", None, recorder)
    assert s.trt.engine(s.runtime, b"junk") is None
    assert b"Magic tag" in told[0]
    engine = s.trt.engine(s.runtime, fakes.plan_bytes("mlp"))
    assert engine
    context = s.trt.context(engine)
    assert context
    assert len(live) == 2
    s.trt.destroy(context)
    s.trt.destroy(engine)
    assert live == []
    s.trt.call(s.runtime, "VRuntime", "setErrorRecorder", None, 0)
    assert references == [1, -1]


def test_plugins_are_initialised_through_a_name_of_their_own() -> None:
    trt = Trt()
    plugins = ctypes.CDLL(str(Path(os.environ[fakes.MARK]) / "libnvinfer_plugin.so.10"))
    before = trt.fake.count("initLibNvInferPlugins")
    plugins.initLibNvInferPlugins.argtypes = [c_void_p, c_char_p]
    plugins.initLibNvInferPlugins.restype = c_bool
    assert plugins.initLibNvInferPlugins(trt.logger, b"")
    assert trt.fake.count("initLibNvInferPlugins") == before + 1
    trt.fake.fail_at(1)
    assert not plugins.initLibNvInferPlugins(trt.logger, b"")
    trt.fake.reset()


def test_contexts_in_many_threads(session: Callable[..., Session]) -> None:
    s = session(nodes=3, aux_streams=1)
    current = c_uint64()
    s.cuda.ok("cuCtxGetCurrent", byref(current))
    contexts = [s.trt.context(s.engine) for _ in range(8)]
    wrong: list[Any] = []

    def work(context: int, seed: int) -> None:
        try:
            s.cuda.ok("cuCtxSetCurrent", current.value)
            stream = s.cuda.stream()
            for i in range(20):
                x = np.random.default_rng(seed * 100 + i).standard_normal((8, 64)).astype(np.float32)
                source, target = s.cuda.device(x.nbytes), s.cuda.device(320)
                s.cuda.ok("cuMemcpyHtoDAsync_v2", source, x.ctypes.data, x.nbytes, stream)
                assert s.trt.bind(context, "x", source, (8, 64))
                assert s.trt.bind(context, "y", target)
                assert s.trt.enqueue(context, stream)
                y = np.empty((8, 10), np.float32)
                s.cuda.ok("cuMemcpyDtoHAsync_v2", y.ctypes.data, target, 320, stream)
                np.testing.assert_allclose(y, fakes.mlp_reference(x), rtol=1e-5, atol=1e-5)
                s.cuda.ok("cuMemFree_v2", source)
                s.cuda.ok("cuMemFree_v2", target)
            s.cuda.ok("cuStreamSynchronize", stream)
            s.cuda.ok("cuStreamDestroy_v2", stream)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(context, i)) for i, context in enumerate(contexts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for context in contexts:
        assert context
        s.trt.destroy(context)


def test_mistakes_with_objects_are_recorded() -> None:
    s = Session(fakes.plan_bytes("mlp"))
    bound_mlp(s)
    assert s.trt.enqueue(s.context, s.stream)
    other = s.trt.context(s.engine)
    assert other
    s.cuda.ok("cuStreamSynchronize", s.stream)
    assert s.trt.enqueue(s.context, s.stream)
    context, s.context = s.context, other
    s.trt.destroy(context)
    assert s.cuda.call("cuStreamSynchronize", s.stream) == ILLEGAL_ADDRESS
    s.trt.destroy(context)
    errors = s.trt.fake.errors()
    assert "2 pieces of its work had not run" in errors[0]
    assert "after its execution context had been destroyed" in errors[1]
    assert "destroyed twice" in errors[2]
    s.cuda.reset()
    s.close(clean=False)


def test_engine_memory_must_be_the_devices() -> None:
    s = Session(fakes.plan_bytes("mlp"))
    array = np.ones((8, 64), np.float32)
    assert s.trt.bind(s.context, "x", array.ctypes.data, (8, 64))
    assert s.trt.bind(s.context, "y", s.device(8 * 10 * 4))
    assert s.trt.enqueue(s.context, s.stream)
    assert s.cuda.call("cuStreamSynchronize", s.stream) == ILLEGAL_ADDRESS
    assert s.cuda.errors()[0].startswith("x: ")
    s.cuda.reset()
    s.close(clean=False)


def test_walk_over_calls_of_the_runtime() -> None:
    """Every failing call is seen by its caller and logged, and gives back what it had taken."""
    trt = Trt()
    trt.fake.reset()
    trt.cuda.reset()
    trt.cuda.ok("cuInit", 0)
    trt.cuda.made("cuDevicePrimaryCtxRetain", 0)
    trt.cuda.ok("cuCtxSetCurrent", 0xC0DE0000)
    source, target, stream = trt.cuda.device(2048), trt.cuda.device(2048), trt.cuda.stream()
    plan = fakes.plan_bytes("mlp", aux_streams=1)

    def run() -> bool:
        made: list[int] = []
        try:
            made.append(trt.runtime())
            for step in (trt.engine, trt.context):
                this = step(made[-1], plan) if step == trt.engine else trt.context(made[-1])
                if this is None:
                    return False
                made.append(this)
            if not (trt.bind(made[-1], "x", source, (8, 64)) and trt.bind(made[-1], "y", target)):
                return False
            if trt.shape(made[-1], "VExecutionContext", "y") is None:
                return False
            return trt.enqueue(made[-1], stream) and trt.cuda.call("cuStreamSynchronize", stream) == 0
        except RuntimeError:
            return False
        finally:
            trt.cuda.call("cuCtxSynchronize")
            for this in reversed(made):
                trt.destroy(this)

    live = (trt.cuda.all_live(), trt.fake.all_live())
    for fake in (trt.fake, trt.cuda):
        start = fake.calls()
        assert run()
        n = fake.calls() - start
        assert n > 5
        seen = []
        for i in range(1, n + 1):
            trt.lines.clear()
            fake.fail_at(i)
            passed = run()
            seen.append(fake.last_failed())
            # Giving back has nobody left to tell; neither has the test's own wait afterwards.
            if seen[-1] not in ("cuMemFree_v2", "cuStreamDestroy_v2", "cuEventDestroy_v2", "cuCtxSynchronize"):
                assert not passed, seen[-1]
                assert trt.errors() or seen[-1] == "cuStreamSynchronize", seen[-1]
            assert (trt.cuda.all_live(), trt.fake.all_live()) == live, seen[-1]
        fake.fail_at(0)
        assert run()
        assert "" not in seen
    assert trt.fake.errors() == []
    assert trt.cuda.errors() == []
    for name, handle in (("cuMemFree_v2", source), ("cuMemFree_v2", target), ("cuStreamDestroy_v2", stream)):
        trt.cuda.ok(name, handle)
    trt.cuda.ok("cuDevicePrimaryCtxRelease_v2", 0)
    trt.cuda.reset()
    trt.fake.reset()


# The interface tables -------------------------------------------------------------------------------------------------


def test_generated_slots_are_current(tmp_path: Path) -> None:
    check = [sys.executable, str(ROOT / "abi" / "generate.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0
    # In a copy whose table says something else, the same check fails.
    shutil.copytree(ROOT / "abi", tmp_path / "abi")
    (tmp_path / "src" / "trt").mkdir(parents=True)
    shutil.copy(ROOT / "src" / "trt" / "abi.rs", tmp_path / "src" / "trt" / "abi.rs")
    enums = tmp_path / "abi" / "enums.csv"
    enums.write_text(
        enums.read_text().replace("DataType,kBF16,4,1,7,7,7,7,7,7,7,7", "DataType,kBF16,4,1,6,6,6,6,6,6,6,6")
    )
    done = subprocess.run(
        [*check[:1], str(tmp_path / "abi" / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "abi/generate.py" in done.stderr
