"""`jetrt.trt_torch` with the real torch, on engines that TensorRT built: what the stand-ins cannot show."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import exits
import pytest
import reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from jetrt import errors  # noqa: E402 - after torch, if there is one

S = 122
NAMES = ("sa_embs", "vl_embs", "timestep", "image_mask", "backbone_attention_mask")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JETRT_TRT_SYNCHRONIZE", "JETRT_GRAPHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")  # no table


@pytest.fixture
def make(engines: Path) -> Iterator[Callable[..., Any]]:
    """`make("dit5", cls=Engine, options…)`: closed at the end of the test."""
    from jetrt.trt_torch import Engine

    made: list[Any] = []

    def load(name: str = "dit5", cls: type = Engine, **options: Any) -> Any:
        made.append(cls(str(engines / f"{name}.engine"), **options))
        return made[-1]

    yield load
    while made:
        made.pop().close()


def inputs_of(length: int = S, seed: int = 0, device: str = "cuda") -> dict[str, Any]:
    made = {k: reference.make("torch", v) for k, v in reference.dit5_inputs(length, seed=seed).items()}
    return {k: v.to(device) for k, v in made.items()}


def set_shapes(engine: Any, length: int = S) -> None:
    engine.set_runtime_tensor_shape("vl_embs", (1, length, 64))
    for name in ("image_mask", "backbone_attention_mask"):
        engine.set_runtime_tensor_shape(name, (1, length))


def busy(milliseconds: int = 300) -> Any:
    """Keeps the current stream busy; the event says when that is over."""
    event = torch.cuda.Event()
    torch.cuda._sleep(int(milliseconds * 1e6 * 2))
    event.record()
    return event


def same_bits(a: Any, b: Any) -> bool:
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))


@pytest.fixture
def wanted(load: Callable[..., Any]) -> Callable[..., Any]:
    """What the core gives for these inputs."""
    engine = load("dit5", graphs="off")
    return lambda inputs: engine(**inputs)["output"].clone()


# Results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", reference.SIZES["dit5"])
def test_bit_for_bit_what_the_binding_gives(make: Any, engines: Path, length: int) -> None:
    from test_binding import bindings, run_binding

    trt = bindings()
    engine, inputs = make(), inputs_of(length)
    set_shapes(engine, length)
    expected = run_binding(trt, engines / "dit5.engine", inputs)["output"]
    for _ in range(3):
        got = engine(*inputs.values())["output"]
        assert type(got) is torch.Tensor
        assert (got.dtype, got.device) == (torch.bfloat16, torch.device("cuda:0"))
        assert same_bits(got, expected)
    # NVIDIA's enumerations, now that its package is imported.
    if "tensorrt" in sys.modules:
        assert engine.handle.get_tensor_mode("sa_embs") == trt.TensorIOMode.INPUT
        assert engine.handle.get_tensor_dtype("sa_embs") == trt.DataType.BF16


def test_tensorrts_types(engines: Path) -> None:
    from test_binding import bindings

    from jetrt.trt_torch import torch_type

    trt = bindings()
    for name in ("float32", "float16", "bfloat16", "int8", "int32", "bool", "uint8", "int64"):
        assert torch_type(getattr(trt, name)) is getattr(torch, name)
    with pytest.raises(TypeError):
        torch_type(trt.fp8)


def test_strided_expanded_and_unaligned_inputs(make: Any, wanted: Any) -> None:
    engine, inputs = make(), inputs_of()
    set_shapes(engine)
    y = wanted(inputs)
    wide = torch.zeros(1, 41, 128, dtype=torch.bfloat16, device="cuda")
    wide[:, :, ::2] = inputs["sa_embs"]
    room = torch.zeros(S * 64 + 3, dtype=torch.bfloat16, device="cuda")
    room[3:] = inputs["vl_embs"].flatten()
    changed = {**inputs, "sa_embs": wide[:, :, ::2], "vl_embs": room[3:].view(1, S, 64)}
    assert same_bits(engine(**changed)["output"], y)
    assert engine.core.stats["strided_copies"] >= 1
    row = inputs["sa_embs"][:, :1].expand(1, 41, 64)
    assert same_bits(engine(**{**inputs, "sa_embs": row})["output"], wanted({**inputs, "sa_embs": row.contiguous()}))


def test_results_stay_valid(make: Any, wanted: Any) -> None:
    engine = make()
    set_shapes(engine)
    sets = [inputs_of(seed=i) for i in range(20)]
    results = [engine(**inputs)["output"] for inputs in sets]
    assert len({y.data_ptr() for y in results}) == len(results)
    for y, inputs in zip(results, sets, strict=True):
        assert same_bits(y, wanted(inputs))


def test_what_is_refused(make: Any) -> None:
    engine, inputs = make(), inputs_of()
    with pytest.raises(AssertionError, match="set_runtime_tensor_shape"):
        engine(**inputs)
    set_shapes(engine)
    for change in (
        {"sa_embs": inputs["sa_embs"].cpu()},
        {"sa_embs": inputs["sa_embs"].float()},
        {"timestep": inputs["timestep"].to(torch.bfloat16)},
        {"sa_embs": inputs["sa_embs"][:, 1:]},
        {"sa_embs": None},
    ):
        with pytest.raises(AssertionError):
            engine(**{**inputs, **change})
    del inputs["timestep"]
    with pytest.raises(AssertionError, match="missing: timestep"):
        engine(**inputs)
    assert engine.core.stats["calls"] == 0


# Streams, waits, memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [False, True])
def test_nothing_is_waited_for(make: Any, wanted: Any, side: bool) -> None:
    engine, inputs = make(), inputs_of()
    set_shapes(engine)
    y = wanted(inputs)
    engine(**inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.default_stream()):
        for _ in range(2):  # once for CUDA, which may wait while it loads a kernel for its first use
            over = busy()
            source = {k: v.clone() for k, v in inputs.items()}
            z = engine(**source)["output"]
            source["sa_embs"].zero_()
            doubled = z * 2
            waited = over.query()
        assert not waited
        torch.cuda.current_stream().synchronize()
    assert over.query()
    assert same_bits(z, y)
    assert same_bits(doubled, y * 2)


def test_two_engines_in_a_row(make: Any, wanted: Any) -> None:
    """The second reads what the first has just been told to write, on the default stream and on another."""
    second, first, inputs = make(), make(), inputs_of()
    for engine in (first, second):
        set_shapes(engine)
    y = wanted({**inputs, "sa_embs": wanted(inputs)})
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(20):
                busy(2)
                z = second(**{**inputs, "sa_embs": first(**inputs)["output"]})["output"]
                torch.cuda.current_stream().synchronize()
                assert same_bits(z, y)


@pytest.mark.parametrize("how", ["call", "constructor", "environment"])
def test_waiting_as_the_scripts_class_does(make: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("JETRT_TRT_SYNCHRONIZE", "1")
    engine, inputs = make(**({"synchronize": True} if how == "constructor" else {})), inputs_of()
    set_shapes(engine)
    over = busy()
    engine(**inputs, **({"synchronize": True} if how == "call" else {}))
    assert over.query()


@pytest.mark.parametrize("deterministic", [False, True])
def test_neither_fill_nor_allocation(make: Any, deterministic: bool) -> None:
    engine, inputs = make(), inputs_of()
    set_shapes(engine)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        for _ in range(3):
            engine(**inputs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(10):
                engine(**inputs)
            torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    finally:
        torch.use_deterministic_algorithms(False)
    names = [e.name for e in profile.events()]
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) >= 10, "the profiler saw no kernels"
    assert [n for n in on_device if "fill" in n.lower() or "memset" in n.lower()] == []
    assert [n for n in names if n in ("cudaStreamSynchronize", "cuStreamSynchronize")] == []


def test_many_calls_take_no_more_memory(make: Any) -> None:
    engine = make()
    sets = {length: inputs_of(length) for length in (1, S, 512)}

    def run(n: int) -> None:
        for i in range(n):
            length = list(sets)[i % 3]
            set_shapes(engine, length)
            engine(**sets[length])
        torch.cuda.synchronize()
        gc.collect()

    run(300)
    free = torch.cuda.mem_get_info()[0]
    held = torch.cuda.memory_allocated()
    run(10_000)
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.mem_get_info()[0] >= free - (4 << 20)  # others may use the GPU, too


def test_loading_again_and_again(engines: Path) -> None:
    from jetrt.trt_torch import Engine

    x = torch.zeros(2, 64, device="cuda")

    def run(n: int) -> None:
        for i in range(n):
            engine = Engine(engines / "mlp.engine")
            engine.set_runtime_tensor_shape("x", (2, 64))
            engine(x)
            if i % 2:
                engine.close()
            del engine
        gc.collect()
        torch.cuda.synchronize()

    run(5)
    free = torch.cuda.mem_get_info()[0]
    run(50)
    assert torch.cuda.mem_get_info()[0] >= free - (16 << 20)


def test_threads(make: Any, wanted: Any) -> None:
    engine = make()
    set_shapes(engine)
    sets = [inputs_of(seed=i) for i in range(4)]
    results = [wanted(inputs) for inputs in sets]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                y = engine(**sets[i])["output"]
                torch.cuda.current_stream().synchronize()
                assert same_bits(y, results[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_the_second_device(engines: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from jetrt.trt_torch import Engine

    with torch.cuda.device(1):
        engine = Engine(engines / "dit5.engine")
        set_shapes(engine)
    assert torch.cuda.current_device() == 0
    with engine.core:
        inputs = inputs_of(device="cuda:1")
        y = engine(**inputs)["output"]
        assert y.device == torch.device("cuda:1")
        reference.check_dit5(reference.dit5_inputs(S, seed=0), y.float().cpu().numpy())
        assert torch.cuda.current_device() == 0
        with pytest.raises(errors.DeviceError, match="cuda:0"):
            engine(**{**inputs, "sa_embs": inputs["sa_embs"].to("cuda:0")})


# Modes and graphs -----------------------------------------------------------------------------------------------------


def test_modes(make: Any, wanted: Any) -> None:
    engine, inputs = make(), inputs_of()
    set_shapes(engine)
    y = wanted(inputs)
    with torch.inference_mode():
        inside = inputs_of()
        z = engine(**inside)["output"]
        assert z.is_inference()
        assert same_bits(z, y)
    assert same_bits(engine(**inside)["output"], y)
    inputs["sa_embs"].requires_grad_()
    inputs["vl_embs"] = torch.nn.Parameter(inputs["vl_embs"])
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            z = engine(**inputs)["output"]
        assert not z.requires_grad
        assert same_bits(z, y)


def test_inside_the_callers_graph(make: Any, wanted: Any) -> None:
    first, second, inputs = make(), make(), inputs_of()
    for engine in (first, second):
        set_shapes(engine)

    def loop() -> Any:
        x = inputs["sa_embs"]
        for _ in range(4):
            x = x + first(**{**inputs, "sa_embs": x})["output"] / 4
        return second(**{**inputs, "sa_embs": x})["output"]

    eager = loop().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y = loop()
    graph.replay()
    assert same_bits(y, eager)
    for seed in (1, 2):
        for name, x in inputs_of(seed=seed).items():
            inputs[name].copy_(x)
        graph.replay()
        z = y.clone()
        assert same_bits(z, loop())
    torch.cuda.synchronize()
    graph.reset()


def test_graph_safe_engine(make: Any, wanted: Any) -> None:
    from jetrt.trt_torch import GraphSafeEngine

    engine, inputs = make(cls=GraphSafeEngine), inputs_of()
    set_shapes(engine)
    y = engine(**inputs)["output"]
    place = y.data_ptr()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = engine(**inputs)["output"]
        doubled = z * 2
    assert z.data_ptr() == place
    for seed in (1, 2):
        for name, x in inputs_of(seed=seed).items():
            inputs[name].copy_(x)
        graph.replay()
        assert same_bits(z, wanted(inputs))
        assert same_bits(doubled, z * 2)
    fresh = engine(**inputs, cache_outputs=False)["output"]
    assert fresh.data_ptr() != place
    assert same_bits(fresh, z)
    torch.cuda.synchronize()
    graph.reset()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine(**inputs)


@pytest.mark.parametrize("name", ["mlp", "nonzero"])
def test_graph_safe_engine_with_dynamic_outputs(make: Any, engines: Path, name: str) -> None:
    from jetrt.trt_torch import GraphSafeEngine

    engine = make(name, cls=GraphSafeEngine)
    for i, n in enumerate((8, 31, 8, 31, 8)):
        x = reference.random_input(name, n, seed=i)
        engine.set_runtime_tensor_shape("x", x.shape)
        y = engine(torch.from_numpy(x).cuda())["y"]
        reference.check(name, engines, x, y.cpu().numpy())


# The end --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", exits.TRT_TORCH)
def test_the_interpreter_ends_in_any_order(engines: Path, way: str) -> None:
    exits.run(exits.TRT_TORCH[way], engines / "mlp.engine", PYTHONWARNINGS="ignore")
