"""Order on streams, captures of the caller, and contexts that are not ours."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

graphs = pytest.mark.parametrize("graphs", ["off", "auto"])
LONG = 100_000_000  # cycles: some 50 ms, against calls of some 20 us


@graphs
@pytest.mark.parametrize("stream", ["default", "side"])
def test_input_that_is_written_late(load, engines, stream, graphs) -> None:
    """The input gets its contents after a long kernel on the caller's stream; the output is read there too."""
    engine = load("mlp", graphs=graphs)
    with reference.on_stream("torch", stream):
        x = torch.empty(8, 64, device="cuda")
        y = torch.empty(8, 10, device="cuda")
        for seed in range(6):
            new = reference.random_input("mlp", 8, seed)
            source = torch.from_numpy(new).cuda()
            x.fill_(float("nan"))
            torch.cuda._sleep(LONG)
            x.copy_(source)
            y.copy_(engine(x=x)["y"])
            x.fill_(float("nan"))  # the engine has read it by then
            reference.check("mlp", engines, new, y.cpu().numpy())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@graphs
@pytest.mark.parametrize("stream", ["default", "side"])
def test_an_engine_on_each_gpu(load, engines, stream, graphs) -> None:
    """Called at once from two threads, then in turn while GPU 0 is current; each on the streams of its own GPU."""
    made = [load("mlp", device=device, graphs=graphs) for device in range(2)]

    def late(device: int, seed: int) -> None:
        new = reference.random_input("mlp", 8, seed)
        source = torch.from_numpy(new).to(f"cuda:{device}")
        x = torch.full_like(source, float("nan"))
        with torch.cuda.device(device):
            torch.cuda._sleep(LONG)
        x.copy_(source)
        y = made[device](x=x)["y"]
        x.fill_(float("nan"))  # the engine has read it by then
        assert y.device == x.device
        reference.check("mlp", engines, new, y.cpu().numpy())

    def work(device: int) -> int:
        with torch.cuda.device(device), reference.on_stream("torch", stream):
            for seed in range(8):
                late(device, 10 * device + seed)
            return torch.cuda.current_device()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [0, 1]
    for seed in range(8):
        for device in range(2):
            late(device, seed)
    assert torch.cuda.current_device() == 0


@graphs
def test_stream_argument_and_later_streams(load, engines, graphs) -> None:
    engine = load("mlp", graphs=graphs)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for turn in range(12):
        x = reference.random_input("mlp", 8, turn)
        tensor = reference.make("torch", x)
        torch.cuda.synchronize()
        side = streams[turn % 3]
        y = engine(x=tensor, stream=side)["y"]
        side.synchronize()
        reference.check("mlp", engines, x, y.cpu().numpy())


@pytest.mark.parametrize("stream", ["default", "side"])
@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_no_wait_for_the_rest_of_the_device(load, stream, graphs) -> None:
    """A long kernel on another stream is still running when a synchronised call returns."""
    engine = load("mlp", graphs=graphs)
    x = torch.ones(8, 64, device="cuda")
    other, finished = torch.cuda.Stream(), torch.cuda.Event()
    with reference.on_stream("torch", stream):
        for _ in range(10):
            engine(x=x, synchronize=True)
        while graphs == "auto" and not engine.stats["replays"]:  # CUDA frees what the comparison needed behind all work
            engine(x=x, synchronize=True)
        for _ in range(100):
            engine(x=x, synchronize=True)
        with torch.cuda.stream(other):
            torch.cuda._sleep(40 * LONG)
            finished.record()
        for _ in range(3):
            engine(x=x, synchronize=True)
        assert not finished.query()
    torch.cuda.synchronize()


def test_a_call_does_not_wait_for_its_own_work(load) -> None:
    engine = load("mlp", graphs="off")
    x = torch.ones(8, 64, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(10):
            engine(x=x)
        torch.cuda.synchronize()
        torch.cuda._sleep(40 * LONG)
        engine(x=x)
        done = torch.cuda.Event()
        done.record()
        assert not done.query()
    assert engine.stats["waits"] == 0
    torch.cuda.synchronize()


def test_synchronize_waits(load) -> None:
    engine = load("mlp")
    x = torch.ones(8, 64, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        torch.cuda._sleep(LONG)
        before = torch.cuda.Event()
        before.record()
        engine(x=x, synchronize=True)
        assert before.query()


@graphs
def test_inside_the_callers_capture(load, engines, graphs) -> None:
    engine = load("mlp", graphs=graphs)
    x = torch.zeros(8, 64, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(5):
            engine(x=x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = x * 2
        y = engine(x=doubled)["y"] + 0
    for seed in range(4):
        new = reference.random_input("mlp", 8, seed)
        x.copy_(torch.from_numpy(new))
        for _ in range(3):  # outside calls between the replays must not share their buffers
            engine(x=torch.ones(8, 64, device="cuda"))
        graph.replay()
        reference.check("mlp", engines, 2 * new, y.cpu().numpy())
    assert engine.stats["captured_by_caller"] == 1


def test_two_calls_in_one_capture(load, engines) -> None:
    engine = load("mlp")
    first, second = (torch.zeros(n, 64, device="cuda") for n in (8, 3))
    for x in (first, second):
        engine(x=x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [engine(x=x)["y"] for x in (first, second)]
    for seed in range(3):
        new = [reference.random_input("mlp", n, seed) for n in (8, 3)]
        for x, value in zip((first, second), new, strict=True):
            x.copy_(torch.from_numpy(value))
        graph.replay()
        for value, y in zip(new, outputs, strict=True):
            reference.check("mlp", engines, value, y.cpu().numpy())


FOREIGN = """
    import ctypes, sys
    import jetrt

    cuda = ctypes.CDLL("libcuda.so.1")
    assert cuda.cuInit(0) == 0
    context = ctypes.c_void_p()
    assert cuda.cuCtxCreate_v2(ctypes.byref(context), 0, 0) == 0
    import numpy
    try:
        engine = jetrt.Engine(sys.argv[1])
        engine(x=numpy.zeros((8, 64), numpy.float32))
    except jetrt.errors.JetrtError as error:
        print(type(error).__name__, error)
"""


def test_foreign_context_is_named(engines) -> None:
    """PyCUDA's autoinit makes such a context; memory of one is nothing in the other."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FOREIGN), str(engines / "mlp.engine")],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "primary" in done.stdout
    assert "context" in done.stdout
