"""Order on streams, and the memory of results. The stand-in does work only when somebody waits for it: a missing wait
shows as stale data every time."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import rig

import fakes
import jetrt
from jetrt import errors

clean, load = map(pytest.fixture, (rig.clean, rig.load))

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((2, 8, 64)).astype(np.float32)
GRAPHS = [{"graphs": "off"}, {"warmup": 0}]


@pytest.fixture
def streams(clean: None) -> Iterator[list[int]]:
    with rig.new_stream() as one, rig.new_stream() as two, rig.new_stream() as three:
        yield [one, two, three]


def is_result_of(got: Any, x: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(got, fakes.mlp_reference(x), rtol=1e-5, atol=1e-5)


def copied(source: Any, stream: int) -> rig.Array:
    """What a reader on this stream sees."""
    target = rig.Array(shape=source.shape, dtype=source.dtype)
    rig.ok("cuMemcpyDtoDAsync_v2", target.ptr, rig.address(source), source.nbytes, stream)
    return target


def order(first: int, then: int) -> None:
    """The caller's own event: what `then` gets from now on is behind what `first` has now."""
    event = rig.made("cuEventCreate", ctypes.c_uint(2))
    rig.ok("cuEventRecord", event, first)
    rig.ok("cuStreamWaitEvent", then, event, 0)
    rig.ok("cuEventDestroy_v2", event)


def prepared(engine: Any, *inputs: Any, stream: int) -> None:
    """Warm, and with a graph where graphs are on."""
    engine.prepare(inputs=[list(inputs)], stream=stream)


# Streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", GRAPHS)
@pytest.mark.parametrize("which", ["legacy", "its other name", "per thread", "own", "own blocking"])
def test_work_is_ordered_on_the_callers_stream(load: Any, options: dict[str, Any], which: str) -> None:
    with rig.new_stream() as own, rig.new_stream(0) as blocking:
        engine = load("mlp", options)
        names = {"legacy": rig.LEGACY, "its other name": 1, "per thread": rig.PER_THREAD, "own": own}
        stream = names.get(which, blocking)
        x = rig.Array(shape=(8, 64))
        prepared(engine, x, stream=stream)
        rig.cuda().reset()
        seen = []
        for data in (A, B, A):
            # Written, read, and written again in the order of the stream alone.
            x.write(data, stream)
            y = engine(x, stream=stream)["y"]
            seen.append((copied(y, stream), data))
            x.write(np.zeros_like(data), stream)
        assert not any(rig.cuda().count(name) for name in ("cuStreamSynchronize", "cuEventSynchronize"))
        rig.ok("cuStreamSynchronize", stream)
        for got, data in seen:
            is_result_of(rig.peek(got), data)
        assert engine.stats["replays"] == (0 if "graphs" in options else 3)
        engine.close()


def test_nothing_is_waited_for(streams: list[int], load: Any) -> None:
    """The results of a call on a stream are there when the stream has got to them, and not before."""
    engine = load("mlp", {"graphs": "off"})
    y = engine(rig.Array(A), stream=streams[0])["y"]
    assert (rig.peek(y).view(np.uint8) == 0xCD).all()
    is_result_of(rig.fetch(y, streams[0]), A)
    assert engine.stats["waits"] == 0


@pytest.mark.parametrize("options", GRAPHS)
def test_synchronize(streams: list[int], load: Any, options: dict[str, Any]) -> None:
    engine, x = load("mlp", options), rig.Array(A)
    prepared(engine, x, stream=streams[0])
    waits = engine.stats["waits"]
    for stream in (*streams, rig.LEGACY, None):
        is_result_of(rig.peek(engine(x, stream=stream, synchronize=True)["y"]), A)
    assert engine.stats["waits"] == waits + 5


@pytest.mark.parametrize("options", GRAPHS)
def test_the_producers_stream_comes_first(streams: list[int], load: Any, options: dict[str, Any]) -> None:
    """`__cuda_array_interface__` names the stream that still writes the array."""
    engine, x = load("mlp", options), rig.Array(shape=(8, 64))
    x.stream = streams[0]
    for data in (A, B, A, B):
        x.write(data, streams[0])
        is_result_of(engine(x)["y"].numpy(), data)
        x.write(data * 2, streams[0])
        is_result_of(rig.fetch(engine(x, stream=streams[1])["y"], streams[1]), data * 2)


def test_out_is_written_behind_whoever_still_uses_it(streams: list[int], load: Any) -> None:
    engine, y = load("mlp"), rig.Array(shape=(8, 10))
    y.stream = streams[0]
    y.write(np.ones((8, 10), np.float32), streams[0])
    before = copied(y, streams[0])
    engine(rig.Array(A), stream=streams[1], out={"y": y})
    is_result_of(rig.fetch(y, streams[1]), A)
    np.testing.assert_array_equal(rig.fetch(before, streams[0]), 1)


@pytest.mark.parametrize("options", GRAPHS)
@pytest.mark.parametrize(
    ("one", "two"), [("own", "other"), ("own", "legacy"), ("legacy", "own"), ("per thread", "own")]
)
def test_a_buffer_is_reused_behind_every_stream(
    streams: list[int], load: Any, options: dict[str, Any], one: Any, two: Any
) -> None:
    """One stream reads a result, which is dropped; another stream's result goes to the same memory."""
    names = {"own": streams[0], "other": streams[1], "legacy": rig.LEGACY, "per thread": rig.PER_THREAD}
    one, two = names[one], names[two]
    engine, x = load("mlp", options), rig.Array(A)
    prepared(engine, x, stream=one)
    for _ in range(3):
        x.write(A, one)
        first = engine(x, stream=one)["y"]
        order(one, two)
        where, read = rig.address(first), copied(first, one)
        del first
        x.write(B, two)
        second = engine(x, stream=two)["y"]
        order(two, one)
        assert rig.address(second) == where
        is_result_of(rig.fetch(second, two), B)
        is_result_of(rig.fetch(read, one), A)
        del second


@pytest.mark.parametrize("options", GRAPHS)
@pytest.mark.parametrize("announced", ["record_stream", "record_stream of a view", "__dlpack__", "not at all"])
def test_a_reader_on_a_stream_that_the_engine_has_not_seen(
    streams: list[int], load: Any, options: dict[str, Any], announced: str
) -> None:
    one, _, reader = streams
    engine, x = load("mlp", options), rig.Array(A)
    prepared(engine, x, stream=one)
    for _ in range(3):
        x.write(A, one)
        y = engine(x, stream=one)["y"]
        if announced == "record_stream":
            jetrt.record_stream(y, reader)
        elif announced == "record_stream of a view":
            view = rig.Array.__new__(rig.Array)
            view.ptr, view.shape, view.dtype = rig.address(y) + 4, (3,), np.dtype("f4")
            view.base, view.strides, view.stream = 0, None, None
            jetrt.record_stream(view, reader)
        elif announced == "__dlpack__":
            capsule = y.__dlpack__(stream=reader)
            del capsule
        if announced != "__dlpack__":  # which makes its reader wait, too
            order(one, reader)
        where, read = rig.address(y), copied(y, reader)
        del y
        x.write(B, one)
        again = engine(x, stream=one)["y"]
        assert rig.address(again) == where
        is_result_of(rig.fetch(again, one), B)
        got = rig.fetch(read, reader)
        # The control: this reader came too late, as nobody had been told of it.
        is_result_of(got, B if announced == "not at all" else A)
        del again


@pytest.mark.parametrize("options", GRAPHS)
def test_a_reader_that_is_an_engine_which_is_gone(load: Any, options: dict[str, Any], tmp_path: Any) -> None:
    """It read on a stream of its own, which has gone with it: there is nothing to wait for any more."""
    first, x = load(fakes.copy_of("float32", [8, 64]), options), rig.Array(A)
    for _ in range(4):
        second = jetrt.Engine(fakes.write_plan(tmp_path / "second.plan"))
        y = first(x)["y"]
        is_result_of(second(y)["y"].numpy(), A)
        del second
        gc.collect()
        del y
        np.testing.assert_array_equal(first(x)["y"].numpy(), A)


def test_record_stream_of_something_else(load: Any) -> None:
    with pytest.raises(ValueError, match=r"is no output of a jetrt engine\. Pass a tensor that an engine returned"):
        jetrt.record_stream(rig.Array(A), rig.LEGACY)
    engine = load("mlp")
    with pytest.raises(TypeError, match="stream: found float"):
        jetrt.record_stream(engine(rig.Array(A))["y"], 1.5)


class StreamObject:
    """One of torch, CuPy or cuda.core, by what is asked of it."""

    def __init__(self, kind: str, handle: int) -> None:
        if kind == "__cuda_stream__":
            self.handle = handle
        else:
            setattr(self, kind, handle)

    def __getattr__(self, name: str) -> Any:
        if name == "__cuda_stream__" and "handle" in self.__dict__:
            return lambda: (0, self.handle)
        raise AttributeError(name)


@pytest.mark.parametrize("kind", ["cuda_stream", "ptr", "__cuda_stream__"])
def test_stream_objects(streams: list[int], load: Any, kind: str) -> None:
    engine, x = load("mlp"), rig.Array(shape=(8, 64))
    x.write(A, streams[0])
    stream = StreamObject(kind, streams[0])
    gone = weakref.ref(stream)
    y = engine(x, stream=stream)["y"]
    is_result_of(rig.fetch(y, streams[0]), A)
    # Results may be in use on it: it lives as long as the engine does.
    del stream
    gc.collect()
    assert gone() is not None
    del engine


def test_per_thread_streams_of_two_threads(load: Any) -> None:
    """One handle, two streams, and neither can be waited for by the other's thread."""
    engine = load("mlp")
    is_result_of(engine(rig.Array(A), stream=rig.PER_THREAD, synchronize=True)["y"].numpy(), A)
    raised: list[BaseException] = []

    def other() -> None:
        try:
            engine(rig.Array(A), stream=rig.PER_THREAD)
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "per-thread default stream" in str(raised[0])


CUPY = """
import gc, sys, types, weakref, numpy as np, fakes, jetrt, rig
A = np.ones((8, 64), "f4")

class Stream:
    def __init__(self): self.ptr = rig.made("cuStreamCreate", 1)
    def __del__(self): rig.ok("cuStreamDestroy_v2", self.ptr)

class ndarray(rig.Array):
    pass

rig.enter()
ndarray.__module__ = "cupy"
current = [Stream()]
cupy, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
cupy.from_dlpack = lambda tensor: ("cupy", tensor, tensor.__dlpack__(stream=current[0].ptr))
cuda.get_current_stream = lambda device: current[0]
cupy.cuda = cuda
sys.modules.update({"cupy": cupy, "cupy.cuda": cuda})

x = ndarray(shape=(8, 64))
with jetrt.Engine(sys.argv[1]) as engine:
    for _ in range(3):
        x.write(A, current[0].ptr)
        library, y, _ = engine(x)["y"]
        assert library == "cupy"
        np.testing.assert_allclose(rig.fetch(y, current[0].ptr), fakes.mlp_reference(A), rtol=1e-5)
    # The engine has results on it in mind: a stream that nobody else holds lives on.
    gone = weakref.ref(current[0])
    current[0] = Stream()
    for _ in range(3):
        x.write(A * 2, current[0].ptr)
        y = engine(x)["y"][1]
        np.testing.assert_allclose(rig.fetch(y, current[0].ptr), fakes.mlp_reference(A * 2), rtol=1e-5)
    assert gone() is not None
del engine, y, _
gc.collect()
jetrt.pinned_empty(1)
assert gone() is None
print(rig.mistakes())
"""


def test_the_current_stream_of_cupy(tmp_path: Any) -> None:
    """CuPy destroys a stream with its object."""
    plan = fakes.write_plan(tmp_path / "a.plan")
    assert fakes.run_python(CUPY, str(plan)).stdout == "[]\n"


OTHER_GPU = """
import sys, numpy as np, fakes, jetrt, rig
A = np.ones((8, 64), "f4")
rig.cuda()
rig.ok("cuCtxSetCurrent", rig.made("cuDevicePrimaryCtxRetain", 1))
x, z = rig.Array.__new__(rig.Array), rig.Array.__new__(rig.Array)
for array, shape in ((x, (8, 64)), (z, (8, 10))):
    array.shape, array.dtype, array.base = shape, np.dtype("f4"), 0
    array.strides = array.stream = None
    array.ptr = rig.made("cuMemAlloc_v2", array.nbytes)
own, reader = rig.made("cuStreamCreate", 1), rig.made("cuStreamCreate", 1)
rig.enter()
engine = jetrt.Engine(sys.argv[1], device=1, warmup=1)
for stream in (own, rig.LEGACY, None) * 4:
    # Written on the legacy stream of the other GPU, whose context is not the current one here.
    rig.ok("cuCtxSetCurrent", rig.made("cuDevicePrimaryCtxRetain", 1))
    x.write(A, stream or 0)
    x.stream = 1 if stream is None else None
    rig.enter()
    y = engine(x, stream=stream)["y"]
    y.__dlpack__(stream=reader)
    rig.ok("cuMemcpyDtoDAsync_v2", z.ptr, rig.address(y), z.nbytes, reader)
    np.testing.assert_allclose(rig.fetch(z, reader), fakes.mlp_reference(A), rtol=1e-5)
    rig.ok("cuMemsetD8Async", z.ptr, 0, z.nbytes, reader)
    np.testing.assert_allclose(engine(A)["y"], fakes.mlp_reference(A), rtol=1e-5)
del y
engine.close()
print(rig.mistakes())
"""


def test_a_gpu_that_is_not_the_current_one(tmp_path: Any) -> None:
    plan = fakes.write_plan(tmp_path / "a.plan")
    assert fakes.run_python(OTHER_GPU, str(plan), env={"FAKE_CUDA_DEVICES": 2}).stdout == "[]\n"


WITHOUT_CONTEXT = """
import sys, threading, numpy as np, fakes, jetrt, rig
A = np.ones((8, 64), "f4")
fakes.FakeCuda().call("cuInit", 0)
def current():
    return rig.made("cuCtxGetCurrent")
def work(device):
    found = [current()]
    engine = jetrt.Engine(sys.argv[1], device=device, graphs="off")
    found.append(current())
    np.testing.assert_allclose(engine(A)["y"], fakes.mlp_reference(A), rtol=1e-5)
    engine.close()
    print(device, [c != 0 for c in [*found, current()]])
for device in (1, 0):
    thread = threading.Thread(target=work, args=(device,))
    thread.start()
    thread.join()
"""


def test_a_thread_without_a_context_gets_that_of_the_first_gpu_alone(tmp_path: Any) -> None:
    """What torch calls the current device is the GPU of the thread's context; without one, it is the first."""
    plan = fakes.write_plan(tmp_path / "a.plan")
    found = fakes.run_python(WITHOUT_CONTEXT, str(plan), env={"FAKE_CUDA_DEVICES": 2}).stdout
    assert found == "1 [False, False, False]\n0 [False, True, True]\n"


def test_results_are_read_by_any_thread(streams: list[int], load: Any) -> None:
    """One without a CUDA context of its own, too."""
    engine, x = load("mlp"), rig.Array(A)
    y = engine(x, stream=streams[0])["y"]
    got: list[Any] = []

    def read() -> None:
        got.append(y.numpy())
        got.append(y.__dlpack__(stream=streams[1]) is not None)
        got.append(engine(y.numpy() @ np.ones((10, 64), np.float32))["y"].shape)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    is_result_of(got[0], A)
    assert got[1:] == [True, (8, 10)]


# Memory ---------------------------------------------------------------------------------------------------------------

MAKES = ("cuMemAlloc_v2", "cuMemHostAlloc", "cuStreamCreate", "cuModuleLoadData", "cuGraphInstantiateWithFlags")


@pytest.mark.parametrize("options", GRAPHS)
@pytest.mark.parametrize("kind", ["device", "host", "strided", "mixed", "two streams", "data-dependent"])
def test_the_steady_state_allocates_nothing(streams: list[int], load: Any, options: dict[str, Any], kind: str) -> None:
    program = "nonzero" if kind == "data-dependent" else fakes.copy_of("float32", [8, 64], n=2)
    engine = load(program, {**options, "on_strided": "copy", "on_dtype": "cast"})
    a, b = rig.Array(A), rig.Array(B)
    turned = rig.Array(A.T.copy(), shape=(8, 64), strides=(4, 32))
    small = (A[:, :4] > 0).astype(np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "device": lambda: engine(a, b, stream=streams[0]),
        "host": lambda: engine(A, B.astype(np.float64)),
        "strided": lambda: engine(turned, b, stream=streams[0]),
        "mixed": lambda: engine(a, B, stream=streams[0]),
        "two streams": lambda: [engine(a, b, stream=s) for s in streams[:2]],
        "data-dependent": lambda: engine(small),
    }
    own = rig.cuda().live("stream")
    for _ in range(4):
        calls[kind]()
        rig.compared(own)
    stats = engine.stats
    rig.cuda().reset()
    for _ in range(10):
        calls[kind]()
    assert {name: rig.cuda().count(name) for name in MAKES} == dict.fromkeys(MAKES, 0)
    # One event a call keeps foreign inputs alive, or tells when a result is ready; nothing piles up.
    assert rig.cuda().count("cuEventCreate") == rig.cuda().count("cuEventDestroy_v2") or kind != "host"
    now = engine.stats
    assert all(now[name] == stats[name] for name in ("output_allocations", "staging_allocations", "new_shapes"))


@pytest.mark.parametrize("options", [*GRAPHS, {"outputs": "fresh"}])
@pytest.mark.parametrize("host", [False, True])
def test_held_results_are_never_overwritten(load: Any, options: dict[str, Any], host: bool) -> None:
    engine, x = load("mlp", options), rig.Array(A)
    held, data = [], [RNG.standard_normal((8, 64)).astype(np.float32) for _ in range(12)]
    own = rig.cuda().live("stream")
    for d in data:
        if host:
            held.append(engine(d)["y"])
        else:
            x.write(d)
            held.append(engine(x, synchronize=True)["y"])
        rig.compared(own)
    assert len({rig.address(y) for y in held}) == len(held)
    for y, d in zip(held, data, strict=True):
        is_result_of(y if host else y.numpy(), d)
    # All the memory comes back to the pool, and is used again.
    before = engine.stats["output_allocations"]
    del held, y
    for d in data:
        x.write(d)
        is_result_of(engine(d)["y"] if host else engine(x)["y"].numpy(), d)
    if "outputs" not in options:
        assert engine.stats["output_allocations"] <= before + 1


@pytest.mark.parametrize("outputs", ["pooled", "fresh"])
@pytest.mark.parametrize("order_of_sizes", [(1, 64, 1, 64), (64, 32, 1, 2), (1, 2, 4, 64)])
def test_shapes_that_grow_without_a_wait(
    streams: list[int], load: Any, outputs: str, order_of_sizes: tuple[int, ...]
) -> None:
    """What has become too small may still be at work: it is freed behind that."""
    engine = load("mlp", {"outputs": outputs, "graphs": "off", "on_strided": "copy"})
    reads = []
    for n in order_of_sizes * 2:
        data = RNG.standard_normal((n, 64)).astype(np.float32)
        x = rig.Array(data.T.copy(), shape=(n, 64), strides=(4, 4 * n))
        y = engine(x, stream=streams[0])["y"]
        reads.append((copied(y, streams[0]), data, x))
        del y
    rig.ok("cuStreamSynchronize", streams[0])
    for got, data, _ in reads:
        is_result_of(rig.peek(got), data)
    if outputs == "pooled":
        assert engine.stats["output_allocations"] <= len(set(order_of_sizes))


def test_fresh_results(load: Any) -> None:
    engine, x = load("mlp", {"outputs": "fresh"}), rig.Array(A)
    places = set()
    for _ in range(5):
        y = engine(x)["y"]
        places.add(rig.address(y))
        is_result_of(y.numpy(), A)
    assert len(places) == 5
    assert engine.stats["replays"] == 0
    (why,) = set(engine.stats["graph_failures"].values())
    assert why == 'outputs="fresh" gives every result a new address'


@pytest.mark.parametrize("options", GRAPHS)
def test_out(streams: list[int], load: Any, options: dict[str, Any]) -> None:
    engine, x, y = load("mlp", options), rig.Array(A), rig.Array(shape=(8, 10))
    own = rig.cuda().live("stream")
    for data in (A, B, A, B, A):
        x.write(data)
        out = engine(x, stream=streams[0], out={"y": y})
        assert out["y"] is y
        is_result_of(rig.fetch(y, streams[0]), data)
        rig.compared(own)
    assert (engine.stats["replays"] > 0) == ("graphs" not in options)
    # From the host, into the device: nothing is copied back, and the call waits only if told to.
    engine(B, out={"y": y}, synchronize=True)
    is_result_of(rig.peek(y), B)
    # Given memory is no output of the pool, and an engine's output can be given.
    held = engine(x, stream=streams[0])["y"]
    is_result_of(rig.fetch(engine(x, stream=streams[0], out={"y": held})["y"], streams[0]), A)


def read_only() -> rig.Array:
    class Sealed(rig.Array):
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            shown = super().__cuda_array_interface__
            return {**shown, "data": (shown["data"][0], True)}

    return Sealed(shape=(8, 10))


@pytest.mark.parametrize(
    ("out", "error", "said"),
    [
        (dict, errors.InputNameError, "input 'out': found 0 tensors; allowed: y. Pass one tensor per output."),
        (lambda: {"z": rig.Array(shape=(8, 10))}, errors.InputNameError, "input 'y': found nothing in out="),
        (lambda: {"y": rig.Array(shape=(8, 10)), "z": 1}, errors.InputNameError, "found 2 tensors; allowed: y"),
        (lambda: {"y": rig.Array(shape=(8, 9))}, errors.ShapeError, "out=: input 'y': found [8, 9]; allowed: [8, 10]"),
        (lambda: {"y": rig.Array(shape=(4, 10))}, errors.ShapeError, "found [4, 10]; allowed: [8, 10]"),
        (lambda: {"y": rig.Array(shape=(8, 10), dtype="f2")}, errors.DTypeError, "found float16; allowed: float32"),
        (lambda: {"y": rig.Array(shape=(8, 10), offset=4)}, errors.LayoutError, "row-major, at a multiple of 256"),
        (lambda: {"y": rig.Array(shape=(8, 10), strides=(4, 32))}, errors.LayoutError, "row-major"),
        (lambda: {"y": np.zeros((8, 10), np.float32)}, errors.DeviceError, "found cpu; allowed: cuda:0"),
        (lambda: {"y": read_only()}, errors.LayoutError, "found read-only memory in out="),
        (lambda: 3, TypeError, "out= takes a mapping from output name to tensor"),
    ],
)
def test_out_that_does_not_fit(load: Any, out: Any, error: type[Exception], said: str) -> None:
    engine = load("mlp")
    given = out()
    with pytest.raises(error) as caught:
        engine(A, out=given)
    assert said in str(caught.value)
    assert rig.trt().count("enqueueV3") == 0


def test_out_for_a_shape_that_depends_on_the_data(load: Any) -> None:
    engine = load("nonzero")
    with pytest.raises(errors.ShapeError, match="no out= for an output whose shape depends on the data"):
        engine(np.ones((2, 4), np.float32), out={"y": rig.Array(shape=(2, 8), dtype="i8")})


@pytest.mark.parametrize("options", [*GRAPHS, {"outputs": "fresh"}])
@pytest.mark.parametrize("host", [False, True])
def test_results_outlive_the_engine(load: Any, options: dict[str, Any], host: bool) -> None:
    engine = load("mlp", options)
    x = A if host else rig.Array(A)
    own = rig.cuda().live("stream")
    for _ in range(4):
        y = engine(x)["y"]
        rig.compared(own)
    engine.close()
    is_result_of(y if host else y.numpy(), A)
    gone = rig.address(y)
    del engine
    gc.collect()
    is_result_of(y if host else y.numpy(), A)
    del y
    gc.collect()
    assert rig.cuda().place(gone) in ("freed", "pageable")


@pytest.mark.parametrize("options", GRAPHS)
def test_results_are_dropped_by_any_thread(load: Any, options: dict[str, Any]) -> None:
    engine, x = load("mlp", options), rig.Array(A)
    own = rig.cuda().live("stream")
    for i in range(8):
        held = [engine(x)]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        rig.compared(own)
        if i == 3:
            before = engine.stats["output_allocations"]
    assert engine.stats["output_allocations"] == before


def test_a_result_is_dropped_while_its_thread_captures(streams: list[int], load: Any) -> None:
    engine, x = load("mlp"), rig.Array(A)
    y, late = engine(x, stream=streams[0])["y"], engine(x, stream=streams[0])["y"]
    with rig.capturing(streams[1]) as graph:
        del y
        engine.close()
        del late
        rig.ok("cuMemsetD8Async", x.ptr, 0, 4, streams[1])
    rig.ok("cuGraphExecDestroy", graph[0])
