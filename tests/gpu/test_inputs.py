"""Inputs on a GPU: policies that copy or cast, and everything that must be refused instead of reinterpreted."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import reference

from jetrt import errors

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

graphs = pytest.mark.parametrize("graphs", ["off", "auto"])


class Interface:
    """Device memory that speaks `__cuda_array_interface__` alone, as camera libraries do."""

    def __init__(self, tensor, shape, strides, typestr, offset: int = 0) -> None:
        self.tensor = tensor  # kept alive
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": shape,
            "strides": strides,  # bytes
            "typestr": typestr,
            "data": (tensor.data_ptr() + offset, False),
            "stream": None,
        }


def mlp_input(seed: int = 0, n: int = 8):
    return reference.make("torch", reference.random_input("mlp", n, seed))


# ---- on_strided="copy" ------------------------------------------------------------------------------------------

STRIDED = {
    "transposed": lambda x: x.t().contiguous().t(),
    "pitched": lambda x: torch.nn.functional.pad(x, (0, 3))[:, :-3],
    "every second row": lambda x: torch.stack((x, x + 1), 1).view(-1, 64)[::2],
    "expanded": lambda x: x[:1].expand(x.shape[0], -1),
}


@graphs
@pytest.mark.parametrize("layout", STRIDED)
def test_strided_input_is_copied_when_asked_for(load, engines, layout, graphs) -> None:
    engine = load("mlp", on_strided="copy", graphs=graphs)
    for seed in range(5):
        x = STRIDED[layout](mlp_input(seed))
        assert not x.is_contiguous()
        y = engine(x=x)["y"]
        reference.check("mlp", engines, x.contiguous().cpu().numpy(), y.cpu().numpy())
    assert (engine.stats["strided_copies"], engine.stats["casts"]) == (5, 0)


@pytest.mark.parametrize("layout", STRIDED)
def test_strided_input_is_refused_otherwise(load, layout) -> None:
    with pytest.raises(errors.LayoutError, match=r"x.*stride") as caught:
        load("mlp")(x=STRIDED[layout](mlp_input()))
    assert caught.value.tensor == "x"
    assert "on_strided" in str(caught.value)


@pytest.mark.parametrize("flip", ["rows", "columns", "both"])
def test_negative_strides_of_numpy(load, engines, flip) -> None:
    x = reference.random_input("mlp", 8, seed=1)
    view = {"rows": x[::-1], "columns": x[:, ::-1], "both": x[::-1, ::-1]}[flip]
    y = load("mlp", on_strided="copy")(x=view)["y"]
    reference.check("mlp", engines, np.ascontiguousarray(view), y)


def test_negative_strides_on_the_device(load, engines) -> None:
    x = reference.random_input("mlp", 8, seed=2)
    tensor = reference.make("torch", x)
    flipped = Interface(tensor, (8, 64), (-256, 4), "<f4", offset=7 * 256)
    y = load("mlp", on_strided="copy")(x=flipped)["y"]
    reference.check("mlp", engines, np.ascontiguousarray(x[::-1]), y.numpy())


def test_pitched_camera_frame(load, engines) -> None:
    """Rows of 64 floats, 512 bytes apart: what a capture API hands over."""
    x = reference.random_input("conv_fp16", 1, seed=0)
    memory = torch.full((1, 3, 64, 128), float("nan"), device="cuda")
    memory[..., :64] = torch.from_numpy(x)
    frame = Interface(memory, (1, 3, 64, 64), (3 * 64 * 512, 64 * 512, 512, 4), "<f4")
    with pytest.raises(errors.LayoutError, match="x"):
        load("conv_fp16")(x=frame)
    y = load("conv_fp16", on_strided="copy")(x=frame)["y"]
    reference.check("conv_fp16", engines, x, y.numpy())


def test_camera_frame_of_bytes_height_width_channel(load, engines) -> None:
    """Transposed, padded and cast in one kernel."""
    pixels = np.random.default_rng(0).integers(0, 4, (64, 64, 3), dtype=np.uint8)
    pitch = 256
    memory = torch.zeros(64, pitch, dtype=torch.uint8, device="cuda")
    memory[:, :192] = torch.from_numpy(pixels.reshape(64, 192))
    frame = Interface(memory, (1, 3, 64, 64), (64 * pitch, 1, pitch, 3), "|u1")
    y = load("conv_fp16", on_strided="copy", on_dtype="cast")(x=frame)["y"]
    x = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    reference.check("conv_fp16", engines, x, y.numpy())


# ---- on_dtype="cast" --------------------------------------------------------------------------------------------

CASTS = [
    torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    torch.bool,
]  # fmt: skip


@graphs
@pytest.mark.parametrize("dtype", CASTS, ids=str)
def test_cast_to_float32(load, engines, dtype, graphs) -> None:
    engine = load("mlp", on_dtype="cast", graphs=graphs)
    for seed in range(4):
        given = mlp_input(seed).to(dtype)
        y = engine(x=given)["y"]
        reference.check("mlp", engines, given.to(torch.float32).cpu().numpy(), y.cpu().numpy())
    assert engine.stats["casts"] == 4


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_cast_to_bf16_int64_and_bool(load, framework) -> None:
    pytest.importorskip("ml_dtypes")
    inputs = reference.dit5_inputs(122, seed=4, timestep=3)
    given = {name: value.astype(np.float32) for name, value in inputs.items()}
    given = {name: reference.make(framework, value) for name, value in given.items()}
    output = load("dit5", on_dtype="cast")(**given)["output"]
    reference.check_dit5(inputs, reference.to_numpy(framework, output))


def test_cast_and_gather_together(load) -> None:
    engine = load("mlp", on_strided="copy", on_dtype="cast")
    x = mlp_input(0).half().t().contiguous().t()
    expected = load("mlp")(x=x.float().contiguous())["y"]
    assert torch.equal(engine(x=x)["y"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32], ids=str)
def test_dtype_is_refused_otherwise(load, dtype) -> None:
    with pytest.raises(errors.DTypeError, match=r"x.*float32") as caught:
        load("mlp")(x=mlp_input().to(dtype))
    assert isinstance(caught.value, TypeError)
    assert caught.value.tensor == "x"
    assert str(dtype).removeprefix("torch.") in str(caught.value)


# ---- refused, by name -------------------------------------------------------------------------------------------


def test_shape_outside_every_profile(load) -> None:
    with pytest.raises(errors.ShapeError, match="65") as caught:
        load("mlp")(x=torch.zeros(65, 64, device="cuda"))
    assert isinstance(caught.value, ValueError)
    assert caught.value.tensor == "x"
    assert "64" in str(caught.value)  # what is allowed


@pytest.mark.parametrize("shape", [(8,), (8, 64, 1), (8, 63), (0, 64)])
def test_wrong_rank_or_dimension(load, shape) -> None:
    with pytest.raises(errors.ShapeError, match="x"):
        load("mlp")(x=torch.zeros(shape, device="cuda"))


def test_inputs_that_do_not_fit_each_other(load) -> None:
    """Each dimension is inside its profile, but S must be one number."""
    pytest.importorskip("ml_dtypes")
    inputs = reference.dit5_inputs(122, seed=0)
    inputs["image_mask"] = inputs["image_mask"][:, :100]
    given = {name: reference.make("torch", value) for name, value in inputs.items()}
    with pytest.raises(errors.InferenceError):
        load("dit5")(**given)


@pytest.mark.parametrize(("given", "text"), [({"y": 0}, "y"), ({}, "x"), ({"x": 0, "extra": 0}, "extra")])
def test_names(load, given, text) -> None:
    with pytest.raises(errors.InputNameError, match=text):
        load("mlp")(**{name: mlp_input() for name in given})


def test_requires_grad_while_grad_mode_is_on(load) -> None:
    engine = load("mlp")
    x = mlp_input().requires_grad_()
    with pytest.raises(errors.GradError, match="x"):
        engine(x=x)
    with torch.no_grad():
        engine(x=x)


@pytest.mark.parametrize("shape", [(8, 64), (1, 64)])
def test_negative_bit_is_not_lost(load, shape) -> None:
    """torch keeps the sign of `x.conj().imag` in a flag, not in memory."""
    x = torch.complex(torch.zeros(shape), torch.randn(shape)).cuda().conj().imag
    assert x.is_neg()
    for policy in ("error", "copy"):
        with pytest.raises(errors.LayoutError, match=r"x.*(negat|stride)"):
            load("mlp", on_strided=policy)(x=x)


def test_negative_bit_of_one_element(load) -> None:
    """One element is contiguous at any distance, so only the flag tells."""
    timestep = torch.complex(torch.zeros(1), torch.ones(1)).cuda().conj().imag
    assert timestep.is_neg()
    given = {
        "sa_embs": torch.zeros(1, 41, 64, device="cuda"),
        "vl_embs": torch.zeros(1, 8, 64, device="cuda"),
        "image_mask": torch.ones(1, 8, dtype=torch.bool, device="cuda"),
        "backbone_attention_mask": torch.ones(1, 8, dtype=torch.bool, device="cuda"),
    }
    with pytest.raises(errors.LayoutError, match=r"timestep.*negat"):
        load("dit5", on_dtype="cast")(**given, timestep=timestep)


def test_fake_tensor_has_no_memory(load) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.zeros(8, 64, device="cuda")
    with pytest.raises(errors.InputError, match="x"):
        load("mlp")(x=x)


def test_meta_tensor_has_no_memory(load) -> None:
    with pytest.raises(errors.InputError, match="x"):
        load("mlp")(x=torch.zeros(8, 64, device="meta"))


def test_subclass_and_parameter(load, engines) -> None:
    engine = load("mlp")
    x = reference.random_input("mlp", 8, seed=6)
    with torch.no_grad():
        y = engine(x=torch.nn.Parameter(reference.make("torch", x)))["y"]
    reference.check("mlp", engines, x, y.cpu().numpy())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_gpu(load) -> None:
    with pytest.raises(errors.DeviceError, match=r"cuda:1.*cuda:0"):
        load("mlp")(x=mlp_input().to("cuda:1"))


@graphs
def test_nothing_is_copied_that_was_not_asked_for(load, graphs) -> None:
    engine = load("mlp", on_strided="copy", on_dtype="cast", graphs=graphs)
    for seed in range(8):
        engine(x=mlp_input(seed))
    stats = engine.stats
    for counter in ("strided_copies", "casts", "host_to_device_bytes", "device_to_host_bytes", "host_to_host_bytes"):
        assert stats[counter] == 0, counter


@graphs
def test_good_call_after_a_bad_one(load, engines, graphs) -> None:
    engine = load("mlp", graphs=graphs)
    for seed in range(6):
        x = reference.random_input("mlp", 8, seed)
        with pytest.raises(errors.ShapeError):
            engine(x=torch.zeros(8, 65, device="cuda"))
        y = engine(x=reference.make("torch", x))["y"]
        reference.check("mlp", engines, x, y.cpu().numpy())


def test_closed_engine(load) -> None:
    engine = load("mlp")
    engine.close()
    assert engine.closed
    with pytest.raises(errors.ClosedEngineError, match="mlp"):
        engine(x=mlp_input())


def test_no_context_in_time(load) -> None:
    """One context, held by a call that waits for a long kernel."""
    engine = load("mlp", max_contexts=1, graphs="off")
    x = mlp_input()
    engine(x=x)
    inside = threading.Event()

    def occupy() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(3_000_000_000)
            inside.set()
            engine(x=x, synchronize=True)

    thread = threading.Thread(target=occupy)
    thread.start()
    inside.wait()
    seen = None
    while thread.is_alive() and seen is None:  # the other thread needs a moment to get inside
        try:
            engine(x=x, timeout=0.01)
        except errors.ContextTimeoutError as error:
            seen = error
    thread.join()
    if seen is None:
        pytest.skip("a call that only waits for its stream holds no context")
    assert isinstance(seen, TimeoutError)
    assert (seen.seconds, seen.max_contexts) == (0.01, 1)


# ---- shapes of data that are easy to get wrong ------------------------------------------------------------------


def test_int64_and_bool_inputs_are_read_as_such(load) -> None:
    """A timestep read as bf16, or a mask as anything but bytes, changes the result."""
    pytest.importorskip("ml_dtypes")
    engine = load("dit5")
    for timestep in (0, 1, 127, -3):
        inputs = reference.dit5_inputs(64, seed=timestep & 0xFF, timestep=timestep)
        inputs["image_mask"][:] = True
        inputs["backbone_attention_mask"][:, ::2] = False
        given = {name: reference.make("torch", value) for name, value in inputs.items()}
        output = engine(**given)["output"]
        reference.check_dit5(inputs, reference.to_numpy("torch", output))


def test_host_array_beside_device_tensors(load) -> None:
    """A scalar from numpy among tensors of the GPU is staged, not refused and not misread."""
    pytest.importorskip("ml_dtypes")
    inputs = reference.dit5_inputs(122, seed=8, timestep=5)
    given = {name: reference.make("torch", value) for name, value in inputs.items()}
    given["timestep"] = inputs["timestep"]
    output = load("dit5")(**given)["output"]
    reference.check_dit5(inputs, reference.to_numpy("torch", output))


def test_host_array_may_change_after_the_call(load, engines) -> None:
    """The staging copy is taken at the call."""
    engine = load("mlp")
    x = reference.random_input("mlp", 8, seed=0)
    side = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            given = x.copy()
            tensor = engine(x=given, out={"y": torch.empty(8, 10, device="cuda")}, stream=side)["y"]
            given[:] = np.nan
        side.synchronize()
        reference.check("mlp", engines, x, tensor.cpu().numpy())


@pytest.mark.parametrize("host", ["auto", "staged"])
def test_pinned_numpy_array(load, engines, host) -> None:
    import jetrt

    engine = load("mlp", host=host)
    x = jetrt.pinned_empty((8, 64), "float32")
    for seed in range(5):
        x[:] = reference.random_input("mlp", 8, seed)
        reference.check("mlp", engines, x, engine(x=x)["y"])
