"""Every engine against its reference: from every array library, eager and graphed, on both kinds of stream."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference

pytestmark = pytest.mark.gpu

FRAMEWORKS = ("torch", "numpy", "cupy", "jax")
graphs = pytest.mark.parametrize("graphs", ["off", "auto"])
stream = pytest.mark.parametrize("stream", ["default", "side"])


@stream
@graphs
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["mlp", "conv_fp16", "nonzero"])
def test_matches_onnx(load, engines, name, framework, graphs, stream) -> None:
    reference.need(framework)
    engine = load(name, graphs=graphs)
    with reference.on_stream(framework, stream) as options:
        for n in reference.SIZES[name]:
            for turn in range(5):  # past the warm-up, so that "auto" replays what it captured
                x = reference.random_input(name, n, seed=1000 * n + turn)
                outputs = engine(x=reference.make(framework, x), **options)
                assert list(outputs) == ["y"]
                reference.check(name, engines, x, reference.to_numpy(framework, outputs["y"]))


@stream
@graphs
@pytest.mark.parametrize("framework", ["torch", "numpy", "jax"])  # CuPy has no bfloat16
def test_dit5_is_exact_to_rounding(load, framework, graphs, stream) -> None:
    pytest.importorskip("ml_dtypes")
    reference.need(framework)
    engine = load("dit5", graphs=graphs)
    with reference.on_stream(framework, stream) as options:
        for s in reference.SIZES["dit5"]:
            for turn in range(5):
                inputs = reference.dit5_inputs(s, seed=s + turn, timestep=turn - 2)
                given = {key: reference.make(framework, value) for key, value in inputs.items()}
                output = engine(**given, **options)["output"]
                reference.check_dit5(inputs, reference.to_numpy(framework, output))


@stream
@pytest.mark.parametrize("name", ["mlp", "conv_fp16"])
def test_graph_replays_new_contents(load, engines, name, stream) -> None:
    """One set of addresses, other contents each time: the replay must read what is there now."""
    import torch

    engine = load(name, graphs="require")
    with reference.on_stream("torch", stream):
        x = reference.make("torch", reference.random_input(name, 4, seed=0))
        for turn in range(12):
            new = reference.random_input(name, 4, seed=turn)
            x.copy_(torch.from_numpy(new))
            reference.check(name, engines, new, reference.to_numpy("torch", engine(x=x)["y"]))
    assert engine.stats["replays"] >= 6, engine.stats


def test_graph_equals_eager_bit_for_bit(load) -> None:
    import torch

    x = torch.randn(8, 64, device="cuda")
    eager = load("mlp", graphs="off")(x=x)["y"].clone()
    graphed = load("mlp", graphs="require")
    for _ in range(8):
        assert torch.equal(graphed(x=x)["y"], eager)
    assert graphed.stats["replays"] > 0, graphed.stats


def test_prepared_shapes_need_no_capture_later(load) -> None:
    import torch

    engine = load("mlp", graphs="require")
    engine.prepare([{"x": (8, 64)}, {"x": (1, 64)}])
    captures = engine.stats["captures"]
    assert captures >= 2
    eager = load("mlp", graphs="off")
    for n in (8, 1, 8):
        x = torch.randn(n, 64, device="cuda")
        assert torch.equal(engine(x=x)["y"], eager(x=x)["y"])
    assert engine.stats["new_shapes"] <= 2


@graphs
def test_positional_and_run_are_the_same_call(load, graphs) -> None:
    import torch

    engine = load("dit5", graphs=graphs)
    inputs = reference.dit5_inputs(122, seed=3)
    given = {name: reference.make("torch", value) for name, value in inputs.items()}
    by_name = engine(**given)["output"]
    in_order = tuple(given[name] for name in engine.inputs)
    for other in (engine(*in_order), engine.run(given), engine.run(in_order)):
        assert torch.equal(other["output"], by_name)


def test_nothing_found_is_an_empty_output(load) -> None:
    import torch

    y = load("nonzero")(x=torch.zeros(8, 4, device="cuda"))["y"]
    assert tuple(y.shape) == (2, 0)
    assert y.dtype == torch.int64


def test_data_dependent_output_grows_and_shrinks(load, engines) -> None:
    engine = load("nonzero")
    for n in (1, 64, 2, 64, 1):
        x = np.ones((n, 4), dtype=np.float32)
        y = engine(x=reference.make("torch", x))["y"]
        reference.check("nonzero", engines, x, reference.to_numpy("torch", y))


@graphs
@pytest.mark.parametrize("contexts", [1, 8])
def test_eight_threads(load, engines, graphs, contexts) -> None:
    import torch

    engine = load("mlp", graphs=graphs, max_contexts=contexts)

    def work(k: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(100):
                x = reference.random_input("mlp", 1 + (k + turn) % 8, seed=1000 * k + turn)
                y = engine(x=reference.make("torch", x))["y"]
                reference.check("mlp", engines, x, reference.to_numpy("torch", y))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
