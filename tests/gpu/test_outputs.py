"""Who owns an output, and for how long."""

from __future__ import annotations

import gc

import pytest
import reference

pytestmark = pytest.mark.gpu

graphs = pytest.mark.parametrize("graphs", ["off", "auto"])


def mlp_input(seed: int, n: int = 8):
    return reference.make("torch", reference.random_input("mlp", n, seed))


@graphs
@pytest.mark.parametrize("outputs", ["pooled", "fresh"])
@pytest.mark.parametrize("framework", ["torch", "numpy", "cupy", "jax"])
def test_a_held_output_is_never_overwritten(load, engines, framework, outputs, graphs) -> None:
    reference.need(framework)
    engine = load("mlp", graphs=graphs, outputs=outputs)
    xs = [reference.random_input("mlp", 8, seed) for seed in range(20)]
    held = [engine(x=reference.make(framework, x))["y"] for x in xs]
    for x, y in zip(xs, held, strict=True):
        reference.check("mlp", engines, x, reference.to_numpy(framework, y))


@graphs
def test_a_view_keeps_its_buffer(load, engines, graphs) -> None:
    engine = load("mlp", graphs=graphs)
    x = mlp_input(0)
    for _ in range(5):
        engine(x=x)
    view = engine(x=x)["y"][2:4].t()
    expected = view.clone()
    for seed in range(1, 10):
        engine(x=mlp_input(seed))
    assert (view == expected).all()


def test_pool_gives_a_released_buffer_again(load) -> None:
    engine = load("mlp", graphs="off")
    x = mlp_input(0)
    addresses = {engine(x=x)["y"].data_ptr() for _ in range(50)}
    assert len(addresses) <= 2


def test_fresh_outputs_live_side_by_side(load) -> None:
    engine = load("mlp", outputs="fresh")
    x = mlp_input(0)
    held = [engine(x=x)["y"] for _ in range(10)]
    assert len({y.data_ptr() for y in held}) == 10


@graphs
def test_out_is_written_in_place(load, engines, graphs) -> None:
    import torch

    engine = load("mlp", graphs=graphs)
    out = torch.full((8, 10), float("nan"), device="cuda")
    for seed in range(6):
        x = reference.random_input("mlp", 8, seed)
        outputs = engine(x=reference.make("torch", x), out={"y": out})
        assert outputs["y"].data_ptr() == out.data_ptr()
        reference.check("mlp", engines, x, out.cpu().numpy())


@pytest.mark.parametrize("wrong", ["shape", "dtype", "strides"])
def test_out_of_the_wrong_kind_is_refused(load, wrong) -> None:
    import torch

    from jetrt import errors

    out, expected = {
        "shape": (torch.empty(7, 10, device="cuda"), errors.ShapeError),
        "dtype": (torch.empty(8, 10, device="cuda", dtype=torch.float16), errors.DTypeError),
        "strides": (torch.empty(10, 8, device="cuda").t(), errors.LayoutError),
    }[wrong]
    with pytest.raises(expected, match="y"):
        load("mlp")(x=mlp_input(0), out={"y": out})


@graphs
def test_output_outlives_its_engine(load, engines, graphs) -> None:
    engine = load("mlp", graphs=graphs)
    x = reference.random_input("mlp", 8, seed=5)
    tensor = reference.make("torch", x)
    for _ in range(5):
        y = engine(x=tensor)["y"]
    engine.close()
    del engine
    gc.collect()
    reference.check("mlp", engines, x, reference.to_numpy("torch", y))


def test_record_stream_keeps_the_buffer_from_reuse(load) -> None:
    """Another stream reads the output late; the pool must not hand the buffer out before it has."""
    import torch

    import jetrt

    engine = load("mlp", graphs="off")
    first, second = mlp_input(1), mlp_input(2)
    expected = engine(x=first)["y"].clone()
    reader = torch.cuda.Stream()
    for _ in range(5):
        y = engine(x=first)["y"]
        reader.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(reader):
            torch.cuda._sleep(50_000_000)
            copy = torch.empty_like(expected)
            copy.copy_(y)
        jetrt.record_stream(y, reader)
        del y
        for _ in range(20):
            engine(x=second)
        torch.cuda.synchronize()
        assert torch.equal(copy, expected)


def test_numpy_result_is_ready_when_it_is_returned(load, engines) -> None:
    engine = load("conv_fp16")
    for seed in range(10):
        x = reference.random_input("conv_fp16", 16, seed)
        reference.check("conv_fp16", engines, x, engine(x=x)["y"])


def test_plain_tensor_for_a_plain_input(load, engines) -> None:
    """An input that names no library gives a jetrt.Tensor, which the others can take."""
    import torch

    import jetrt

    class Frame:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            self.__cuda_array_interface__ = dict(tensor.__cuda_array_interface__)

    x = reference.random_input("mlp", 8, seed=9)
    y = load("mlp")(x=Frame(reference.make("torch", x)))["y"]
    assert type(y) is jetrt.Tensor
    assert (y.shape, y.dtype, y.device, y.nbytes) == ((8, 10), "float32", "cuda:0", 320)
    reference.check("mlp", engines, x, torch.from_dlpack(y).cpu().numpy())
    reference.check("mlp", engines, x, y.numpy())
    reference.check("mlp", engines, x, y.numpy())
    assert y.__cuda_array_interface__["data"][0] == y.data_ptr
    cupy = pytest.importorskip("cupy")
    reference.check("mlp", engines, x, cupy.asnumpy(cupy.asarray(y)))
