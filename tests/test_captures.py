"""What `jetrt.graph` stands on: the record of a capture of the caller's, its launches, and the batched copy."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rig

import fakes
from jetrt import _core, errors

clean, load = map(pytest.fixture, (rig.clean, rig.load))

RNG = np.random.default_rng(0)
A, B, C = RNG.standard_normal((3, 8, 64)).astype(np.float32)


@pytest.fixture
def streams(clean: None) -> Iterator[list[int]]:
    with rig.new_stream() as one, rig.new_stream() as two:
        yield [one, two]


class Graph:
    """What torch's `CUDAGraph` is to a `_Capture`: something with `replay()`, which launches on the current stream."""

    def __init__(self, launched: int, stream: int) -> None:
        self.launched, self.stream = launched, stream

    def replay(self) -> None:
        rig.ok("cuGraphLaunch", self.launched, self.stream)


class Captured:
    """One engine in a graph of its own, with its fixed input and output."""

    def __init__(self, engine: Any, stream: int, launches: Any = None) -> None:
        self.launches = launches or _core._Launches()
        self.x = rig.Array(np.zeros_like(A))
        with rig.capturing(stream, 1) as graph:
            self.capture = _core._Capture(stream, self.launches)
            self.y = engine(self.x, stream=stream)["y"]
        self.graph = Graph(graph[0], stream)
        self.capture.bind(self.graph, [self.x], [self.y], ["x"], ["y"])

    def __call__(self, x: Any, out: Any, stream: int) -> Any:
        self.graph.stream = stream
        return self.capture.replay([x], [] if out is None else [out], stream)

    def free(self) -> None:
        self.capture.stop()
        rig.ok("cuGraphExecDestroy", self.graph.launched)
        del self.y
        self.capture.release()


def is_result_of(got: Any, x: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(got, fakes.mlp_reference(x), rtol=1e-5, atol=1e-5)


# The record -----------------------------------------------------------------------------------------------------------


def test_replays_with_other_inputs_and_new_outputs(streams: list[int], load: Any) -> None:
    engine = load("mlp")
    captured = Captured(engine, streams[0])
    assert captured.capture.engines == [engine.path]
    assert captured.capture.alive
    kept = []
    for stream in (streams[0], streams[1], rig.LEGACY, streams[0]):
        for data in (A, B):
            x, out = rig.Array(data), rig.Array(shape=(8, 10))
            assert captured(x, out, stream) is None
            kept.append((out, stream, data, x))
    for out, stream, data, _ in kept:
        is_result_of(rig.fetch(out, stream), data)
    captured.free()
    assert not captured.capture.alive
    assert captured(A, None, streams[0]) == "the graph was released meanwhile"
    captured.capture.release()  # again


def test_three_launches_and_no_wait(streams: list[int], load: Any) -> None:
    captured = Captured(load("mlp"), streams[0])
    x, out = rig.Array(A), rig.Array(shape=(8, 10))
    captured(x, out, streams[0])
    rig.cuda().reset()
    captured(x, out, streams[0])
    calls = rig.cuda().log()
    assert [name for name in calls if name.startswith(("cuLaunch", "cuGraphLaunch"))] == [
        "cuLaunchKernel", "cuGraphLaunch", "cuLaunchKernel",
    ]  # fmt: skip
    assert not [name for name in calls if "Synchronize" in name or "Alloc" in name or "WaitEvent" in name]
    is_result_of(rig.fetch(out, streams[0]), A)
    captured.free()


def test_launches_of_two_graphs_follow_each_other(streams: list[int], load: Any) -> None:
    """Graphs that share memory (torch's pool): a launch waits for the one before, wherever that was."""
    launches, engine = _core._Launches(), load("mlp")
    first, second = Captured(engine, streams[0], launches), Captured(engine, streams[0], launches)
    out = [rig.Array(shape=(8, 10)) for _ in range(2)]
    inputs = rig.Array(A), rig.Array(B)
    first(inputs[0], out[0], streams[0])
    second(inputs[1], out[1], streams[1])
    # Only the second stream is waited for; the first is behind it all the same.
    is_result_of(rig.fetch(out[1], streams[1]), B)
    is_result_of(rig.peek(out[0]), A)
    for captured in (first, second):
        captured.free()


def test_the_engines_buffers_live_as_long_as_the_record(streams: list[int], load: Any) -> None:
    engine = load("mlp", {"graphs": "off"})
    x = rig.Array(A)
    engine(x, stream=streams[0])
    rig.ok("cuStreamSynchronize", streams[0])
    before = rig.live()
    captured = Captured(engine, streams[0])
    with_it = rig.live()
    assert with_it["IExecutionContext"] == before["IExecutionContext"] + 1
    for _ in range(5):
        held = engine(x, stream=streams[0])["y"]
        assert rig.address(held) != rig.address(captured.y)
    captured.free()
    del captured, held
    gc.collect()
    after = rig.live()
    assert {k: after[k] for k in ("IExecutionContext", "graph_exec")} == {
        k: before[k] for k in ("IExecutionContext", "graph_exec")
    }


def test_an_engine_that_nobody_else_holds_lives_as_long_as_the_record(clean: None, tmp_path: Any) -> None:
    import jetrt

    with rig.new_stream() as stream:
        captured = Captured(jetrt.Engine(fakes.write_plan(tmp_path / "m.plan", "mlp")), stream)
        gc.collect()
        assert rig.trt().live("ICudaEngine") == 1
        x, out = rig.Array(B), rig.Array(shape=(8, 10))
        assert captured(x, out, stream) is None
        is_result_of(rig.fetch(out, stream), B)
        captured.free()
        assert rig.trt().live("ICudaEngine") == 0


def test_a_forgotten_record_gives_everything_back(streams: list[int], load: Any) -> None:
    captured = Captured(load("mlp"), streams[0])
    x, out = rig.Array(A), rig.Array(shape=(8, 10))
    captured(x, out, streams[0])
    launched, capture = captured.graph.launched, captured.capture
    captured.y = None
    del captured, capture  # waits for the launch
    is_result_of(rig.peek(out), A)
    rig.ok("cuGraphExecDestroy", launched)


def test_engines_of_one_capture(streams: list[int], load: Any) -> None:
    """Also one that is called twice, and one that another capture uses at the same time."""
    first, second = load("mlp"), load(fakes.copy_of("float32", [8, 64]))
    other = Captured(first, streams[1])
    x = rig.Array(A)
    with rig.capturing(streams[0], 1) as graph:
        capture = _core._Capture(streams[0], _core._Launches())
        assert capture.nodes == 0
        y = first(second(second(x, stream=streams[0])["y"], stream=streams[0])["y"], stream=streams[0])["y"]
        assert capture.nodes > 0
    assert capture.engines == [second.path, first.path]
    assert other.capture.engines == [first.path]
    second.close()
    assert not capture.alive
    assert other.capture.alive
    rig.ok("cuGraphExecDestroy", graph[0])
    del y
    capture.release()
    other.free()


def test_no_capture(streams: list[int]) -> None:
    with pytest.raises(errors.GraphCaptureError, match="no capture runs on stream"):
        _core._Capture(streams[0], _core._Launches())
    with pytest.raises(errors.GraphCaptureError, match="no capture runs on stream"):
        _core._Capture(0, _core._Launches())


def test_branches_of_a_capture_have_contexts_of_their_own(streams: list[int], load: Any) -> None:
    """They run at once, so that one context (one scratch memory) for both would be used twice at the same time."""
    engine = load("mlp")
    one, two = rig.Array(A), rig.Array(B)
    before = rig.trt().live("IExecutionContext")
    event, back = rig.made("cuEventCreate", 0), rig.made("cuEventCreate", 0)
    with rig.capturing(streams[0], 1) as graph:
        capture = _core._Capture(streams[0], _core._Launches())
        rig.ok("cuEventRecord", event, streams[0])
        rig.ok("cuStreamWaitEvent", streams[1], event, 0)
        results = [engine(one, stream=streams[0])["y"], engine(two, stream=streams[1])["y"]]
        again = engine(two, stream=streams[0])["y"]
        rig.ok("cuEventRecord", back, streams[1])
        rig.ok("cuStreamWaitEvent", streams[0], back, 0)
    assert rig.trt().live("IExecutionContext") == before + 2
    assert capture.engines == [engine.path]
    rig.ok("cuGraphLaunch", graph[0], streams[0])
    for got, data in zip((*results, again), (A, B, B), strict=True):
        is_result_of(rig.fetch(got, streams[0]), data)
    rig.ok("cuGraphExecDestroy", graph[0])
    for handle in (event, back):
        rig.ok("cuEventDestroy_v2", handle)
    del results, again
    capture.release()
    assert rig.trt().live("IExecutionContext") == before


# Closing --------------------------------------------------------------------------------------------------------------


def test_a_closed_engine_ends_its_graph(streams: list[int], load: Any) -> None:
    engine = load("mlp")
    captured = Captured(engine, streams[0])
    x, out = rig.Array(A), rig.Array(shape=(8, 10))
    captured(x, out, streams[1])
    engine.close()  # waits for the launch, on a stream that the engine never saw
    is_result_of(rig.peek(out), A)
    assert not captured.capture.alive
    for _ in range(2):
        with pytest.raises(errors.ClosedEngineError, match=r"engine '.*0\.plan' is closed, and this graph launches it"):
            captured(x, out, streams[0])
    assert rig.cuda().count("cuGraphLaunch") == 1
    captured.free()


def test_a_close_waits_for_the_thread_that_launches(streams: list[int], load: Any) -> None:
    engine = load("mlp")
    captured = Captured(engine, streams[0])
    x, out = rig.Array(A), rig.Array(shape=(8, 10))
    inside, go, closed = threading.Event(), threading.Event(), threading.Event()
    launch = captured.graph.replay

    def slowly() -> None:
        inside.set()
        assert go.wait(20)
        launch()

    captured.graph.replay = slowly

    def run(what: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: (rig.enter(), what()))
        thread.start()
        return thread

    calling = run(lambda: captured(x, out, streams[0]))
    assert inside.wait(20)
    closing = run(lambda: (engine.close(), closed.set()))
    assert not closed.wait(0.2)
    go.set()
    for thread in (calling, closing):
        thread.join()
    assert closed.is_set()
    is_result_of(rig.peek(out), A)
    captured.free()


@pytest.mark.parametrize("what", ["close", "stop", "replay"])
def test_from_inside_its_own_launch(streams: list[int], load: Any, what: str) -> None:
    """A signal handler or a finaliser runs between the launches: an error, no deadlock, and memory stays in place."""
    engine = load("mlp")
    captured = Captured(engine, streams[0])
    x, out = rig.Array(A), rig.Array(shape=(8, 10))
    launch, said = captured.graph.replay, []
    calls = {
        "close": engine.close,
        "stop": captured.capture.stop,
        "replay": lambda: captured(x, out, streams[0]),
    }

    def interrupted() -> None:
        with pytest.raises(errors.GraphCaptureError, match="after the call") as error:
            calls[what]()
        said.append(error.value)
        launch()

    captured.graph.replay = interrupted
    assert captured(x, out, streams[0]) is None
    assert said[0].reason
    is_result_of(rig.fetch(out, streams[0]), A)
    captured.graph.replay = launch
    captured.free()


def test_a_launch_that_fails(streams: list[int], load: Any) -> None:
    """The error goes to the caller, the next launch is ordered behind what was enqueued, and nothing hangs."""
    captured = Captured(load("mlp"), streams[0])
    x, out = rig.Array(A), rig.Array(shape=(8, 10))
    launch = captured.graph.replay

    def fails() -> None:
        raise KeyboardInterrupt

    captured.graph.replay = fails
    other = rig.Array(B)
    with pytest.raises(KeyboardInterrupt):
        captured(other, out, streams[1])
    captured.graph.replay = launch
    captured(x, out, streams[0])
    is_result_of(rig.fetch(out, streams[0]), A)
    captured.free()


def test_every_driver_call_of_a_launch_may_fail(streams: list[int], load: Any) -> None:
    captured = Captured(load("mlp"), streams[0])
    x, out = rig.Array(A), rig.Array(shape=(8, 10))
    captured(x, out, streams[0])
    rig.ok("cuStreamSynchronize", streams[0])
    for n in range(1, 100):
        rig.cuda().reset()
        rig.cuda().fail_at(n)
        with contextlib.suppress(errors.JetrtError, AssertionError):
            captured(x, out, streams[1])
        reached = rig.cuda().last_failed()
        rig.cuda().fail_at(0)
        captured(x, out, streams[0])
        is_result_of(rig.fetch(out, streams[0]), A)
        if not reached:
            break
    else:
        pytest.fail("the walk did not end")
    assert n > 5
    captured.free()


def test_inside_a_capture_of_the_callers(streams: list[int], load: Any) -> None:
    captured = Captured(load("mlp"), streams[0])
    x, out = rig.Array(A), rig.Array(shape=(8, 10))
    with rig.capturing(streams[1], 1) as graph:
        assert captured(x, out, streams[1]) == "inside a capture of the caller's"
        rig.ok("cuMemsetD8Async", x.ptr, 0, 4, streams[1])
    rig.ok("cuGraphExecDestroy", graph[0])
    assert rig.cuda().count("cuGraphLaunch") == 0
    captured.free()


def test_from_many_threads(streams: list[int], load: Any) -> None:
    captured = Captured(load("mlp"), streams[0])
    wrong: list[BaseException] = []
    local = threading.local()

    def calls(seed: int) -> None:
        try:
            rig.enter()
            stream = rig.made("cuStreamCreate", 1)
            for k in range(20):
                data = np.random.default_rng(seed * 100 + k).standard_normal((8, 64)).astype(np.float32)
                x, out = rig.Array(data), rig.Array(shape=(8, 10))
                local.graph = Graph(captured.graph.launched, stream)
                captured.capture.replay([x], [out], stream)
                is_result_of(rig.fetch(out, stream), data)
            captured.launches.wait()
            rig.ok("cuStreamDestroy_v2", stream)
        except BaseException as error:
            wrong.append(error)

    captured.graph.replay = lambda: local.graph.replay()
    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    captured.free()


# The copy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5, 24, 25, 60])
def test_fill(streams: list[int], n: int) -> None:
    dtypes = ["f4", "f2", "u1", "i8", "?", "i2", "f8"]
    data = [(RNG.random((3, k + 1)) * 100 + 1).astype(dtypes[k % len(dtypes)]) for k in range(n)]
    sources = [rig.Array(x) for x in data]
    targets = [rig.Array(np.zeros_like(x)) for x in data]
    _core._fill(targets, tuple(sources), streams[0])
    assert rig.cuda().count("cuLaunchKernel") == -(-n // 24)
    for target, x in zip(targets, data, strict=True):
        np.testing.assert_array_equal(rig.fetch(target, streams[0]), x)
    if n:
        assert _core._same_bytes(targets, sources)
        targets[-1].write(np.zeros_like(data[-1]))
        assert not _core._same_bytes(targets, sources)


def test_fill_from_any_strides(streams: list[int]) -> None:
    whole = RNG.standard_normal((6, 8)).astype(np.float32)
    views = {
        "transposed": ((8, 6), (4, 32), whole.T),
        "every other row": ((3, 8), (64, 4), whole[::2]),
        "expanded": ((5, 8), (0, 4), np.broadcast_to(whole[:1], (5, 8))),
        "a corner": ((2, 3), (32, 4), whole[:2, :3]),
        "nothing": ((0, 8), (32, 4), whole[:0]),
    }
    for shape, strides, expected in views.values():
        source = rig.Array(whole, shape=shape, strides=strides)
        target = rig.Array(shape=shape)
        _core._fill([target], [source], streams[0])
        np.testing.assert_array_equal(rig.fetch(target, streams[0]), expected)
    # The same layout without gaps is copied as it lies.
    source, target = (rig.Array(whole, shape=(8, 6), strides=(4, 32)) for _ in range(2))
    target.write(np.zeros_like(whole))
    _core._fill([target], [source], streams[0])
    np.testing.assert_array_equal(rig.fetch(target, streams[0]).reshape(6, 8), whole)
    assert _core._same_bytes([source], [target])


def test_fill_keeps_every_bit(streams: list[int]) -> None:
    """Signalling NaNs, negative zeros and denormals too: bytes, not numbers."""
    bits = np.array([0x7F800001, 0xFFC00000, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    source, target = rig.Array(bits), rig.Array(np.zeros_like(bits))
    _core._fill([target], [source], streams[0])
    rig.ok("cuStreamSynchronize", streams[0])
    assert rig.peek(target).tobytes() == bits.tobytes()
    assert _core._same_bytes([source], [target])
    target.write(np.where(bits == 0, np.float32(0), bits))  # +0 for -0
    assert not _core._same_bytes([source], [target])


def test_fill_refuses(streams: list[int]) -> None:
    x = rig.Array(A)
    wrong = [
        (errors.DTypeError, rig.Array(A.astype(np.float16)), "found float16; allowed: float32"),
        (errors.ShapeError, rig.Array(A[:4]), r"found \[4, 64\]; allowed: \[8, 64\]"),
        (errors.DeviceError, A, "found cpu; allowed: cuda:0"),
    ]
    for kind, source, said in wrong:
        with pytest.raises(kind, match=f"input 'features': {said}"):
            _core._fill([x, x], [x, source], streams[0], names=["noise", "features"])
    with pytest.raises(errors.LayoutError, match="a target that is row-major"):
        _core._fill([rig.Array(A, shape=(64, 8), strides=(4, 256))], [rig.Array(shape=(64, 8))], streams[0])
    with pytest.raises(errors.InputNameError, match="2 sources for 1 targets"):
        _core._fill([x], [x, x], streams[0])
    assert rig.cuda().count("cuLaunchKernel") == 0


def test_replay_refuses_other_tensors(streams: list[int], load: Any) -> None:
    captured = Captured(load("mlp"), streams[0])
    x, out = rig.Array(A), rig.Array(shape=(8, 10))
    with pytest.raises(errors.ShapeError, match=r"input 'x': found \[4, 64\]"):
        captured(rig.Array(A[:4]), out, streams[0])
    with pytest.raises(errors.ShapeError, match=r"input 'y': found \[8, 10\]; allowed: \[4, 10\]"):
        captured(x, rig.Array(shape=(4, 10)), streams[0])
    with pytest.raises(errors.InputNameError, match="found 2 inputs; allowed: 1 inputs"):
        captured.capture.replay([x, x], [out], streams[0])
    captured(x, out, streams[0])
    is_result_of(rig.fetch(out, streams[0]), A)
    captured.free()


def test_set_bytes(streams: list[int]) -> None:
    arrays = [rig.Array(A), rig.Array(A, shape=(64, 8), strides=(4, 256)), rig.Array(A[:0])]
    _core._set_bytes(arrays, 0xFF, streams[0])
    assert np.isnan(rig.fetch(arrays[0], streams[0])).all()
    assert np.isnan(rig.peek(arrays[1])).all()
    for wrong in (rig.Array(A, shape=(8, 32), strides=(256, 8)), A):
        with pytest.raises(errors.LayoutError, match="allowed: a tensor without gaps on cuda:0"):
            _core._set_bytes([wrong], 0, streams[0])
