"""CUDA graphs: when one is captured, what it replays, what happens where it does not pay; captures of the caller's."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rig

import fakes
from jetrt import errors

clean, load = map(pytest.fixture, (rig.clean, rig.load))

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((2, 8, 64)).astype(np.float32)


@pytest.fixture
def stream(clean: None) -> Iterator[int]:
    with rig.new_stream() as stream:
        yield stream


def is_result_of(got: Any, x: np.ndarray[Any, Any]) -> None:
    got = got if isinstance(got, np.ndarray) else got.numpy()
    np.testing.assert_allclose(got, fakes.mlp_reference(x), rtol=1e-5, atol=1e-5)


def counted(engine: Any, *names: str) -> list[int]:
    stats = engine.stats
    return [stats[name] for name in names or ("eager", "captures", "replays")]


class Calls:
    """Calls one after the other, each behind the comparison of what the one before captured."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.own = engine, rig.cuda().live("stream")

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        out = self.engine(*inputs, **options)
        rig.compared(self.own)
        return out["y"]


# When -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
@pytest.mark.parametrize("place", ["host", "device"])
def test_captured_after_the_warm_up(load: Any, warmup: int, place: str) -> None:
    engine = load("mlp", {"warmup": warmup})
    call, x = Calls(engine), rig.Array(A)
    for i in range(warmup + 4):
        data = A + np.float32(i)
        x.write(data)
        is_result_of(call(data if place == "host" else x), data)
    assert counted(engine) == [warmup + 1, 1, 3]
    assert engine.stats["graphs"] == 1
    assert engine.stats["graph_bytes"] == 1024 + 320
    assert engine.stats["graph_failures"] == {}


def test_off(load: Any) -> None:
    engine = load("mlp", {"graphs": "off"})
    for _ in range(9):
        engine(A)
    assert counted(engine) == [9, 0, 0]
    assert rig.cuda().count("cuStreamBeginCapture_v2") == 0
    (report,) = engine.prepare([{"x": (8, 64)}])
    assert (report["graph"], report["reason"]) == (False, 'graphs="off"')


def test_each_shape_and_each_address_has_its_own(load: Any) -> None:
    engine = load("add", {"warmup": 0})
    call = Calls(engine)
    arrays = [rig.Array(RNG.standard_normal((n, 8)).astype(np.float32)) for n in (2, 2, 3, 3)]
    pairs = [(a, b) for a, b in itertools.product(arrays, arrays) if a.shape == b.shape]
    for _ in range(3):
        for a, b in pairs:
            np.testing.assert_array_equal(call(a, b).numpy(), rig.peek(a) + rig.peek(b))
    assert counted(engine) == [8, 8, 16]


def test_a_live_call_does_not_wait_for_the_comparison(stream: int, load: Any) -> None:
    engine, x = load("mlp", {"warmup": 0}), rig.Array(shape=(8, 64))
    own = rig.cuda().live("stream")
    x.write(A, stream)
    y = engine(x, stream=stream)["y"]
    # Captured, launched and to be compared; nothing of that has kept the call.
    assert engine.stats["captures"] == 1
    assert engine.stats["waits"] == 0
    rig.compared(own)
    is_result_of(rig.fetch(y, stream), A)


@pytest.mark.parametrize("fields", [{"nodes": 7}, {"aux_streams": 2, "nodes": 4}, {"device_memory": 0}])
def test_engines_of_many_kernels_and_streams(load: Any, fields: dict[str, Any]) -> None:
    engine, x = load("mlp", {"warmup": 0}, **fields), rig.Array(A)
    engine.prepare(inputs=[[x]])
    for data in (B, A, B):
        x.write(data)
        is_result_of(engine(x)["y"], data)
    assert counted(engine, "captures", "replays") == [2, 3]


# Outputs that are held ------------------------------------------------------------------------------------------------


def test_output_sets_alternate(stream: int, load: Any) -> None:
    """The result of the last call is usually still held when the next one begins."""
    engine, x = load("mlp"), rig.Array(A)
    engine.prepare(inputs=[{"x": x}], stream=stream)
    eager = engine.stats["eager"]
    places, y = [], None
    for i in range(6):
        data = A + np.float32(i)
        x.write(data, stream)
        y = engine(x, stream=stream)["y"]
        is_result_of(rig.fetch(y, stream), data)
        places.append(rig.address(y))
    assert places[:2] * 3 == places
    assert len(set(places)) == 2
    assert counted(engine, "replays") == [6]
    assert engine.stats["eager"] == eager


def test_more_held_results_than_output_sets_are_eager(load: Any) -> None:
    engine, x = load("mlp", {"warmup": 0}), rig.Array(A)
    call, held = Calls(engine), []
    for i in range(12):
        data = A + np.float32(i)
        x.write(data)
        held.append((call(x, synchronize=True), data))
    for y, data in held:
        is_result_of(y, data)
    eager, captures, replays = counted(engine)
    assert captures == 4
    assert eager + replays == 12
    del held, y
    before = counted(engine, "replays")[0]
    for _ in range(5):
        is_result_of(call(x), data)
    assert counted(engine, "replays") == [before + 5]


# graphs="require" -----------------------------------------------------------------------------------------------------


def test_required(load: Any) -> None:
    engine, x = load("mlp", {"graphs": "require"}), rig.Array(A)
    held = []
    for i in range(5):
        data = A + np.float32(i)
        x.write(data)
        held.append((engine(x, synchronize=True)["y"], data))
        is_result_of(engine(data)["y"], data)
    for y, data in held:
        is_result_of(y, data)
    assert counted(engine, "replays") == [10]


NEEDS = "a graph of this call needs 1344 bytes (context and outputs) and graph_bytes allows 100"


@pytest.mark.parametrize(
    ("program", "fields", "options", "reason"),
    [
        ("nonzero", {}, {}, "an output's shape depends on the data"),
        ("shape_input", {}, {}, "the engine has host shape tensors, whose values a graph would freeze"),
        ("mlp", {}, {"outputs": "fresh"}, 'outputs="fresh" gives every result a new address'),
        ("mlp", {}, {"graph_bytes": 100}, NEEDS),
        ("mlp", {"in_capture": "differ"}, {}, "differ"),
        ("mlp", {"in_capture": "empty"}, {}, "empty"),
        ("mlp", {"in_capture": "fail"}, {}, "enqueueV3 failed"),
        ("mlp", {"in_capture": "sync"}, {}, "enqueueV3 failed"),
    ],
)
def test_required_where_it_cannot_be(load: Any, program: str, fields: Any, options: Any, reason: str) -> None:
    engine = load(program, {"graphs": "require", **options}, **fields)
    inputs = {"nonzero": [A[:2, :4].copy()], "shape_input": [np.zeros(4, np.float32), np.array([2, 3])]}.get(
        program, [A]
    )
    for _ in range(3):
        with pytest.raises(errors.GraphCaptureError) as caught:
            engine(*inputs)
        assert reason in caught.value.reason or reason in str(caught.value)
        assert caught.value.reason
    with pytest.raises(errors.GraphCaptureError) as caught:
        engine.prepare(inputs=[inputs])
    assert reason in str(caught.value)
    assert counted(engine, "replays") == [0]


# Failures -------------------------------------------------------------------------------------------------------------

WHY = {
    "differ": "the replayed graph's outputs differ from eager ones",
    "empty": "the captured graph is empty: TensorRT enqueued nothing on the capturing stream",
    "fail": "enqueueV3 failed",
    "sync": "enqueueV3 failed",
}


@pytest.mark.parametrize("kind", WHY)
@pytest.mark.parametrize("place", ["host", "device"])
def test_what_fails_only_under_capture_is_said_once(stream: int, load: Any, kind: str, place: str) -> None:
    engine, x = load("mlp", {"warmup": 1}, in_capture=kind), rig.Array(A)
    call = Calls(engine)
    for i in range(6):
        data = A + np.float32(i)
        x.write(data)
        is_result_of(call(data if place == "host" else x), data)
    assert counted(engine, "eager", "replays", "capture_failures", "graphs") == [6, 0, 1, 0]
    ((signature, why),) = engine.stats["graph_failures"].items()
    assert signature == "x[8, 64]"
    assert why.startswith(WHY[kind])
    # Another shape is another matter, and the streams work as before.
    is_result_of(call(A[:2].copy()), A[:2])
    y = engine(x, stream=stream)["y"]
    is_result_of(rig.fetch(y, stream), data)


def test_a_capture_that_the_driver_refuses(load: Any) -> None:
    engine, x = load("mlp", {"warmup": 0}), rig.Array(A)
    call = Calls(engine)
    rig.cuda().set("capture_fail", 1)
    try:
        for _ in range(3):
            is_result_of(call(x), A)
    finally:
        rig.cuda().set("capture_fail", 0)
    assert counted(engine, "eager", "replays", "capture_failures") == [3, 0, 1]


def test_the_caller_gets_its_own_memory_back_from_a_graph_that_differs(stream: int, load: Any) -> None:
    """A trial replay writes where `out=` points; what stays there is the eager result."""
    engine, x, y = load("mlp", {"warmup": 0}, in_capture="differ"), rig.Array(A), rig.Array(shape=(8, 10))
    call = Calls(engine)
    for _ in range(3):
        call(x, stream=stream, out={"y": y})
        is_result_of(rig.fetch(y, stream), A)
    assert counted(engine, "replays", "capture_failures") == [0, 1]


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_least_recently_used_graphs_go(load: Any) -> None:
    engine = load("mlp", {"warmup": 0, "graph_bytes": 3 * (1024 + 320)})
    call, shapes = Calls(engine), [8, 7, 6]
    for n in shapes:
        call(A[:n].copy())
    assert counted(engine, "graphs", "graph_evictions") == [3, 0]
    call(A)  # used again: the next to go is 7
    held = call(A[:5].copy())
    assert counted(engine, "graphs", "graph_evictions") == [3, 1]
    before = counted(engine, "replays")[0]
    for n in (8, 6, 5):
        is_result_of(call(A[:n].copy()), A[:n])
    assert counted(engine, "replays") == [before + 3]
    is_result_of(call(A[:7].copy()), A[:7])
    assert counted(engine, "replays") == [before + 3]
    assert engine.stats["graph_bytes"] <= 3 * (1024 + 320)
    is_result_of(held, A[:5])


def test_addresses_that_never_come_back_are_not_captured(load: Any) -> None:
    engine = load("mlp")
    call = Calls(engine)
    arrays = [rig.Array(A + np.float32(i)) for i in range(50)]
    for i, x in enumerate(arrays):
        is_result_of(call(x), A + np.float32(i))
    assert counted(engine) == [50, 0, 0]


def test_addresses_that_keep_changing_are_not_captured_for_ever(load: Any) -> None:
    """More of them than fit: after a while a call does what it does without graphs, and nothing more."""
    engine, plain = load("mlp", {"graph_bytes": 3000}), load("mlp", {"graphs": "off"})
    call = Calls(engine)
    arrays = [rig.Array(A + np.float32(i)) for i in range(6)]
    for _ in range(20):
        for i, x in enumerate(arrays):
            is_result_of(call(x), A + np.float32(i))
    assert engine.stats["graphs_thrashing"]
    captures = counted(engine, "captures")[0]
    assert 8 <= captures <= 12
    logs = []
    for one in (engine, plain, engine, plain):
        rig.cuda().reset()
        is_result_of(one(arrays[0])["y"], A)
        logs.append(rig.cuda().log())
    assert len(logs[2]) <= len(logs[3])
    assert counted(engine, "captures") == [captures]


# prepare --------------------------------------------------------------------------------------------------------------


def test_prepare_shapes(load: Any) -> None:
    engine = load("add")
    reports = engine.prepare([{"a": (2, 8), "b": (2, 8)}, {"a": (3, 8), "b": (3, 8)}])
    assert [r["graph"] for r in reports] == [True, True]
    assert [r["reason"] for r in reports] == [None, None]
    assert [r["outputs"] for r in reports] == [{"y": (2, 8)}, {"y": (3, 8)}]
    eager = engine.stats["eager"]
    for report, n in zip(reports, (2, 3), strict=True):
        a = report["inputs"]["a"]
        assert (a.shape, a.device, a.dtype) == ((n, 8), "cuda:0", "float32")
        for _ in range(2):
            held = engine(**report["inputs"])["y"]
            assert (held.numpy() == 0).all()
    assert counted(engine, "eager", "replays") == [eager, 4]


def test_prepare_fills_in_static_shapes(load: Any) -> None:
    engine = load("dit5")
    names = {"vl_embs": (1, 9, 64), "image_mask": (1, 9), "backbone_attention_mask": (1, 9)}
    (report,) = engine.prepare([names])
    assert report["graph"]
    assert {name: tensor.shape for name, tensor in report["inputs"].items()} == {
        "sa_embs": (1, 41, 64),
        "timestep": (1,),
        **names,
    }
    with pytest.raises(errors.InputNameError, match="input 'vl_embs': found nothing"):
        engine.prepare([{}])


def test_prepare_inputs(stream: int, load: Any) -> None:
    engine, x = load("mlp"), rig.Array(A)
    for inputs in ({"x": x}, [x], (x,)):
        (report,) = engine.prepare(inputs=[inputs], stream=stream)
        assert report["inputs"]["x"] is x
    eager = engine.stats["eager"]
    is_result_of(rig.fetch(engine(x, stream=stream)["y"], stream), A)
    assert counted(engine, "eager", "replays") == [eager, 1]
    # Host arrays, too: what counts is where they are staged.
    (report,) = engine.prepare(inputs=[[B]])
    eager = engine.stats["eager"]
    is_result_of(engine(A)["y"], A)
    assert counted(engine, "eager", "replays") == [eager, 2]


def test_prepare_says_why_not(load: Any) -> None:
    for program, options, shapes, why in (
        ("nonzero", {}, {"x": (2, 4)}, "an output's shape depends on the data"),
        ("mlp", {"outputs": "fresh"}, {"x": (2, 64)}, 'outputs="fresh" gives every result a new address'),
        ("shape_input", {}, {"x": (4,), "size": (2,)}, "the engine has host shape tensors"),
    ):
        engine = load(program, options)
        if program == "shape_input":
            (report,) = engine.prepare(inputs=[[np.zeros(4, np.float32), np.array([2, 3])]])
            assert report["outputs"] == {"y": (2, 3)}
        else:
            (report,) = engine.prepare([shapes])
        assert not report["graph"]
        assert report["reason"].startswith(why)


# Captures of the caller's ---------------------------------------------------------------------------------------------


def replayed(graph: int, stream: int) -> None:
    rig.ok("cuGraphLaunch", graph, stream)
    rig.ok("cuStreamSynchronize", stream)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("options", [{"graphs": "off"}, {"warmup": 0}, {"outputs": "fresh"}])
def test_inside_a_capture_of_the_callers(stream: int, load: Any, mode: int, options: dict[str, Any]) -> None:
    engine = load("mlp", options)
    x, out = rig.Array(A), rig.Array(shape=(8, 10))
    before = engine(x, stream=stream)["y"]
    with rig.capturing(stream, mode) as graph:
        y = engine(x, stream=stream)["y"]
        smaller = engine(rows_of(x, 2), stream=stream)["y"]
        again = engine(x, stream=stream, out={"y": out})["y"]
    assert again is out
    assert counted(engine, "captured_by_caller", "replays") == [3, 0]
    for data in (B, A):
        x.write(data, stream)
        replayed(graph[0], stream)
        for got, n in ((y, 8), (smaller, 2), (out, 8)):
            is_result_of(rig.peek(got), data[:n])
    # The caller's graph goes on writing there: nobody else gets that memory, although the tensors are gone.
    places = {rig.address(y), rig.address(smaller)}
    del y, smaller
    held = [engine(x, stream=stream)["y"] for _ in range(5)]
    assert not places & {rig.address(h) for h in held}
    x.write(B, stream)
    replayed(graph[0], stream)
    for h in (*held, before):
        is_result_of(rig.fetch(h, stream), A)
    rig.ok("cuGraphExecDestroy", graph[0])


def rows_of(x: rig.Array, n: int) -> Any:
    """The first rows, without owning them."""
    view = rig.Array.__new__(rig.Array)
    view.__dict__.update(x.__dict__, shape=(n, *x.shape[1:]), base=0, owner=x)
    return view


@pytest.mark.parametrize(
    ("program", "call", "said"),
    [
        ("mlp", lambda e, x, s: e(A, stream=s), "results for the host need a wait, which a capture cannot have"),
        ("mlp", lambda e, x, s: e(x, stream=s, synchronize=True), "results for the host need a wait"),
        ("add", lambda e, x, s: e(x, A[:, :8].copy(), stream=s), "input 'b' is in host memory"),
        ("nonzero", lambda e, x, s: e(x, stream=s), "an output's shape depends on the data"),
    ],
)
def test_refused_inside_a_capture_of_the_callers(stream: int, load: Any, program: str, call: Any, said: str) -> None:
    """And the capture goes on: only the call is refused."""
    engine = load(program)
    x = rig.Array(np.ascontiguousarray(A[:, : engine.inputs[next(iter(engine.inputs))].shape[1]]))
    with rig.capturing(stream) as graph:
        with pytest.raises(errors.GraphCaptureError, match=f"inside a capture of the caller's: .*{said}"):
            call(engine, x, stream)
        rig.ok("cuMemsetD8Async", x.ptr, 0, 4, stream)
    rig.ok("cuGraphExecDestroy", graph[0])


def test_one_engines_result_goes_into_another_inside_a_capture(stream: int, load: Any) -> None:
    """Made before the capture, on another stream: the capture cannot wait for that, so the call does."""
    first, second = load(fakes.copy_of("float32", [8, 64])), load("mlp")
    x, z = rig.Array(A), rig.Array(B)
    z.stream = 1  # the legacy stream, in the words of the interface
    y = first(x)["y"]
    with rig.capturing(stream) as graph:
        one = second(y, stream=stream)["y"]
        two = second(z, stream=stream)["y"]
        three = second(first(y, stream=stream)["y"], stream=stream)["y"]
    replayed(graph[0], stream)
    for got, data in ((one, A), (two, B), (three, A)):
        is_result_of(rig.peek(got), data)
    rig.ok("cuGraphExecDestroy", graph[0])


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("options", [{"graphs": "off"}, {"warmup": 0}, {"graphs": "require"}])
def test_while_another_thread_captures(stream: int, load: Any, mode: int, options: dict[str, Any]) -> None:
    """Whatever an engine does meanwhile, in the strictest mode too: load, allocate, wait, capture, free."""
    x = rig.Array(A)
    began, go, wrong = threading.Event(), threading.Event(), []

    def capture() -> None:
        try:
            rig.enter()
            with rig.capturing(stream, mode) as graph:
                rig.ok("cuMemsetD8Async", x.ptr, 0, 4, stream)
                began.set()
                assert go.wait(20)
            rig.ok("cuGraphExecDestroy", graph[0])
        except BaseException as error:
            wrong.append(error)
            began.set()

    thread = threading.Thread(target=capture)
    thread.start()
    try:
        assert began.wait(20)
        engine, y = load("mlp", options), array_beside(mode)
        for n in (2, 8, 8, 8):
            is_result_of(engine(A[:n].copy())["y"], A[:n])
        if y is not None:
            is_result_of(engine(y)["y"], A)
        engine.close()
    finally:
        go.set()
        thread.join()
    assert wrong == []


def array_beside(mode: int) -> rig.Array | None:
    """The caller's own allocation is allowed beside a thread-local capture only."""
    return rig.Array(A) if mode == 1 else None
