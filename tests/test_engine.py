"""Calls: every kind of input in, every kind of output out, the policies, and what the engine tells of itself."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import rig

import fakes
import jetrt
from jetrt import errors

clean, load = map(pytest.fixture, (rig.clean, rig.load))

X = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
Y = fakes.mlp_reference(X)


def close_to(got: Any, wanted: Any = Y) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


# What an engine tells -------------------------------------------------------------------------------------------------


def test_tables(load: Any) -> None:
    engine = load("dit5", name="DiT")
    assert list(engine.inputs) == ["sa_embs", "vl_embs", "timestep", "image_mask", "backbone_attention_mask"]
    assert [t.dtype for t in engine.inputs.values()] == ["bfloat16", "bfloat16", "int64", "bool", "bool"]
    vl, out = engine.inputs["vl_embs"], engine.outputs["output"]
    assert (vl.name, vl.shape, vl.mode, vl.location) == ("vl_embs", (1, -1, 64), "input", "device")
    assert vl.profiles == vl.profile == [((1, 1, 64), (1, 122, 64), (1, 512, 64))]
    assert engine.inputs["timestep"].profiles == [((1,), (1,), (1,))]
    assert (out.shape, out.mode, out.profiles) == ((1, 41, 64), "output", [])
    assert "inear" in out.format
    assert repr(vl).startswith("TensorInfo(input 'vl_embs' bfloat16[1, -1, 64], profiles [1, 1, 64]")
    assert (engine.name, engine.device, engine.num_profiles, engine.closed) == ("DiT", 0, 1, False)
    assert engine.tensorrt_version == "10.6.0.26"
    assert engine.device_memory_size == 1024
    assert f"<jetrt.Engine '{engine.path}': sa_embs bfloat16[1, 41, 64], " in repr(engine)


def test_shape_tensor_in_the_tables(load: Any) -> None:
    engine = load("shape_input")
    assert engine.inputs["size"].location == "host"


# Calls ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda e, a, b: e(a, b),
        lambda e, a, b: e(a, b=b),
        lambda e, a, b: e(b=b, a=a),
        lambda e, a, b: e.run([a, b]),
        lambda e, a, b: e.run((a, b), synchronize=True, stream=None, timeout=None, out=None),
        lambda e, a, b: e.run({"b": b, "a": a}),
        lambda e, a, b: e(a, b, stream=None, synchronize=False, timeout=None, out=None),
    ],
)
def test_call_shapes(load: Any, call: Any) -> None:
    engine = load("add")
    a, b = X[:2, :8].copy(), X[2:4, :8].copy()
    for _ in range(3):
        out = call(engine, a, b)
        assert list(out) == ["y"]
        close_to(out["y"], a + b)
    assert engine.stats["calls"] == 3


def test_inputs_named_like_options(load: Any) -> None:
    plan = fakes.copy_of("float32", [2], n=4)
    for tensor, name in zip(plan["io"], ("stream", "out", "synchronize", "timeout"), strict=False):
        tensor["name"] = name
    engine = load(plan)
    arrays = {name: np.full(2, i, np.float32) for i, name in enumerate(engine.inputs)}
    for out in (engine(**arrays), engine.run(arrays, synchronize=True)):
        assert [float(y[0]) for y in out.values()] == [0, 1, 2, 3]


def test_nested_call_from_an_argument(load: Any) -> None:
    """Reading an option runs Python code, which may call the same engine."""
    engine = load("add")
    a = X[:2, :8].copy()

    class Truth:
        def __bool__(self) -> bool:
            close_to(engine(a, b=a)["y"], a + a)
            return True

    close_to(engine(a, b=a, synchronize=Truth())["y"], a + a)


def test_dit5_in_its_own_types(load: Any) -> None:
    bf16 = pytest.importorskip("ml_dtypes").bfloat16
    engine, rng = load("dit5"), np.random.default_rng(1)
    for length in (1, 122, 7, 512):
        sa = rng.standard_normal((1, 41, 64)).astype(bf16)
        vl = rng.standard_normal((1, length, 64)).astype(bf16)
        masks = rng.random((2, 1, length)) > 0.3
        step = np.array([7])
        out = engine(sa, vl, step, *masks)["output"]
        assert out.dtype == bf16
        np.testing.assert_array_equal(out, fakes.dit5_reference(sa, vl, step, *masks).astype(bf16))
    assert engine.stats["casts"] == engine.stats["strided_copies"] == 0


DTYPES = ["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 1, 3, 1, 2, 1, 1, 2)])
def test_every_dtype_and_rank(load: Any, dtype: str, shape: tuple[int, ...]) -> None:
    np_dtype = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    engine = load(fakes.copy_of(dtype, shape))
    x = (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(np_dtype)
    y = engine(x)["y"]
    assert (y.dtype, y.shape) == (x.dtype, shape)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("place", ["host", "device"])
def test_empty(load: Any, place: str) -> None:
    engine = load(fakes.copy_of("float32", [-1, 4], [([0, 4], [2, 4], [4, 4])]))
    x = np.zeros((0, 4), np.float32)
    for graph in range(5):
        y = engine(x if place == "host" else rig.Array(x))["y"]
        assert (tuple(y.shape), y.dtype) == ((0, 4), "float32"), graph
    close_to(engine(X[:2, :4].copy())["y"], X[:2, :4])


def test_data_dependent_shapes(load: Any) -> None:
    engine = load("nonzero")
    for data in (X[:, :4], np.zeros((3, 4)), np.ones((64, 4)), X[:2, :4]):
        data = np.ascontiguousarray(data > 0.2, np.float32)
        for x in (data, rig.Array(data)):
            y = engine(x)["y"]
            y = y if isinstance(y, np.ndarray) else y.numpy()
            assert y.dtype == np.int64
            np.testing.assert_array_equal(y, fakes.nonzero_reference(data))
    (why,) = set(engine.stats["graph_failures"].values())
    assert why == "an output's shape depends on the data"


def test_shape_tensors(load: Any) -> None:
    engine = load("shape_input")
    x = np.arange(4, dtype=np.float32)
    for size in ((2, 3), (8, 8), (1, 1), (2, 3)):
        for given in (np.array(size), np.array([size[0], 0, size[1]])[::2]):
            y = engine(x, given)["y"]
            assert y.shape == size
            np.testing.assert_array_equal(y, np.resize(x, size))
    assert engine.stats["new_shapes"] == 3
    said = "the values [9, 1] of shape tensor size lie outside [1, 1] ~ [8, 8]"
    with pytest.raises(errors.InferenceError, match="TensorRT could not infer the output shapes") as caught:
        engine(x, np.array([9, 1]))
    assert said in caught.value.log[0]
    assert caught.value.bound == ["x float32[4] on cpu", "size int64[2] on cpu"]
    assert engine(x, np.array([2, 3]))["y"].shape == (2, 3)


def test_profiles(load: Any) -> None:
    two = fakes.copy_of("float32", [-1, 4], [([1, 4], [2, 4], [4, 4]), ([3, 4], [6, 4], [9, 4])])
    auto, second = load(two), load(two, {"profile": 1})
    assert auto.num_profiles == 2
    for n in (1, 4, 5, 9, 3, 1):
        x = X[:n, :4].copy() if n < 9 else np.ones((9, 4), np.float32)
        close_to(auto(x)["y"], x)
        if n >= 3:
            close_to(second(x)["y"], x)
    switched = rig.trt().count("setOptimizationProfileAsync")
    # First fit: 3 and 4 are the first profile's; the second engine switches once (its graphs' contexts, too).
    assert [auto.prepare([{"x": (n, 4)}])[0]["profile"] for n in (3, 4, 5)] == [0, 0, 1]
    assert switched >= 3


def test_several_outputs(load: Any) -> None:
    engine = load(fakes.copy_of("float32", [-1, 4], [([1, 4], [2, 4], [8, 4])], n=3))
    arrays = [X[:2, 4 * i : 4 * i + 4].copy() for i in range(3)]
    for _ in range(6):
        out = engine(*arrays)
        assert list(out) == ["y0", "y1", "y2"]
        for y, x in zip(out.values(), arrays, strict=True):
            np.testing.assert_array_equal(y, x)


def test_more_inputs_than_fit_a_small_array(load: Any) -> None:
    engine = load(fakes.copy_of("float32", [2], n=20))
    arrays = [np.full(2, i, np.float32) for i in range(20)]
    given = [rig.Array(a) for a in arrays]
    for _ in range(5):
        for inputs in (arrays, given):
            out = engine(*inputs).values()
            assert [float((y if isinstance(y, np.ndarray) else y.numpy())[0]) for y in out] == list(range(20))


# Inputs ---------------------------------------------------------------------------------------------------------------


class Capsule:
    """Somebody's array that speaks DLPack; on the host, as it lends numpy's capsules."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize(
    ("make", "result"),
    [
        (lambda: X.copy(), np.ndarray),
        pytest.param(
            lambda: Capsule(X.copy()),
            jetrt.Tensor,
            marks=pytest.mark.skipif(not hasattr(np.ndarray, "__dlpack__"), reason="numpy 1.21 lends no capsules"),
        ),
        (lambda: rig.Array(X), jetrt.Tensor),
    ],
)
def test_results_come_back_as_the_first_input_came(load: Any, make: Any, result: type) -> None:
    engine = load("mlp")
    for _ in range(5):
        y = engine(make())["y"]
        assert type(y) is result
        close_to(y if result is np.ndarray else y.numpy())


def test_first_input_decides_where_results_lie(load: Any) -> None:
    engine = load("add")
    a = X[:2, :8].copy()
    near = rig.Array(a)
    y = engine(near, a)["y"]
    assert (type(y), y.device) == (jetrt.Tensor, "cuda:0")
    close_to(y.numpy(), a + a)
    y = engine(a, near)["y"]
    assert isinstance(y, np.ndarray)
    close_to(y, a + a)


def test_a_tensor_of_ours_goes_in_again(load: Any) -> None:
    """Ordered by itself: nobody waits in between."""
    engine = load(fakes.copy_of("float32", [8, 64]))
    t = rig.Array(X)
    rig.cuda().reset()
    for _ in range(6):
        t = engine(t)["y"]
    assert rig.cuda().count("cuStreamSynchronize") == rig.cuda().count("cuEventSynchronize") == 0
    close_to(t.numpy(), X)


def test_a_host_array_is_read_before_the_call_returns(load: Any) -> None:
    """The caller may change it at once, whether the results are waited for or not."""
    engine = load("add")
    near, a = rig.Array(np.zeros((2, 8), np.float32)), np.ones((2, 8), np.float32)
    pinned = jetrt.pinned_empty((2, 8))
    for x in (a, pinned):
        x[:] = 1
        y = engine(near, x)["y"]
        x[:] = 5
        close_to(y.numpy(), np.ones((2, 8)))


def test_inputs_live_until_they_were_read(load: Any) -> None:
    """An array without streams of its own, dropped by the caller at once, is kept until the work is done."""
    engine = load("mlp")
    x = rig.Array(X)
    gone = weakref.ref(x)
    y = engine(x)["y"]
    del x
    gc.collect()
    assert gone() is not None
    close_to(y.numpy())
    engine(rig.Array(X))
    # Let go by a later call, or by closing.
    engine.close()
    gc.collect()
    assert gone() is None


# Policies -------------------------------------------------------------------------------------------------------------

STRIDED = [
    lambda x: x.T,
    lambda x: x[::2, ::-1],
    lambda x: x[1:, 3:5],
    lambda x: np.broadcast_to(x[0], (3, x.shape[1])),
    lambda x: np.broadcast_to(x[:1, :1], (4, 4)),
    lambda x: x[:, :0],
    lambda x: x,
]


@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool", "float16"])
@pytest.mark.parametrize("host", ["auto", "staged"])
def test_copies_and_casts_from_the_host(load: Any, view: Any, dtype: str, host: str) -> None:
    program = fakes.copy_of("float32", [-1, -1], [([0, 0], [2, 2], [16, 16])])
    engine = load(program, {"on_strided": "copy", "on_dtype": "cast", "host": host})
    x = view((np.arange(30) % 7).reshape(5, 6).astype(dtype))
    for _ in range(4):
        y = engine(x)["y"]
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y, x.astype(np.float32))
    stats = engine.stats
    assert stats["casts"] == (0 if dtype == "float32" or not x.size else 4)
    assert stats["strided_copies"] == (0 if x.flags.c_contiguous else 4)


@pytest.mark.parametrize("to", ["float32", "float16", "int32", "int64", "bool", "uint8"])
def test_casts_on_the_device(load: Any, to: str) -> None:
    """As torch's `.to()`, from any type and layout of a device array, in one kernel."""
    engine = load(fakes.copy_of(to, [2, 3]), {"on_dtype": "cast", "on_strided": "copy"})
    for dtype in ("float64", "int16", "uint32", "bool", "float32"):
        sign = 1 if "uint" in dtype + to else -1
        data = np.array([[0, 1, sign * 2.75], [3.5, 100, 1.25]]).astype(dtype)
        for array in (
            rig.Array(data),
            rig.Array(data.T.copy(), shape=(2, 3), strides=(data.itemsize, 2 * data.itemsize)),
        ):
            rig.cuda().reset()
            y = engine(array)["y"].numpy()
            np.testing.assert_array_equal(y, data.astype(to))
            assert rig.cuda().count("cuMemcpyHtoDAsync_v2") == 0


def test_without_a_policy_nothing_is_copied(load: Any) -> None:
    engine = load("mlp", {"graphs": "off"})
    x = rig.Array(X)
    engine(x)
    rig.cuda().reset()
    engine(x)
    copies = [name for name in rig.cuda().log() if "Memcpy" in name or "Memset" in name]
    assert copies == []
    stats = engine.stats
    assert stats["host_to_device_bytes"] == stats["device_to_host_bytes"] == stats["host_to_host_bytes"] == 0


def test_bytes_are_counted(load: Any) -> None:
    engine = load("mlp", {"graphs": "off"})
    engine(X)
    stats = engine.stats
    assert (stats["host_to_host_bytes"], stats["host_to_device_bytes"], stats["device_to_host_bytes"]) == (
        2048,
        2048,
        320,
    )
    pinned = jetrt.pinned_empty((8, 64))
    pinned[:] = X
    close_to(engine(pinned)["y"])
    after = engine.stats
    # Copied from where it lies: the call waits, so that the caller cannot change it before.
    assert after["host_to_host_bytes"] == 2048
    assert after["host_to_device_bytes"] == 4096


# Memory that CPU and GPU share ----------------------------------------------------------------------------------------


INTEGRATED = """
import sys, numpy as np, fakes, jetrt, rig
x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
pinned = jetrt.pinned_empty((8, 64))
pinned[:] = x
staged = jetrt.Engine(sys.argv[1], host="staged", graphs=sys.argv[2])
wanted, negative = staged(x)["y"], staged(-x)["y"]
for host in ("auto", "mapped"):
    engine = jetrt.Engine(sys.argv[1], host=host, graphs=sys.argv[2], warmup=1)
    streams = rig.cuda().live("stream")
    for _ in range(5):
        np.testing.assert_array_equal(engine(pinned)["y"], wanted)
        rig.compared(streams)
    stats = engine.stats
    moved = [stats[name] for name in ("host_to_device_bytes", "device_to_host_bytes", "host_to_host_bytes")]
    assert moved == [0, 0, 0], moved
    assert (stats["replays"] > 0) == (sys.argv[2] == "auto")
    pinned[:] = -x
    held = engine(pinned)["y"]
    np.testing.assert_array_equal(held, negative)
    pinned[:] = x
    np.testing.assert_array_equal(engine(pinned)["y"], wanted)
    np.testing.assert_array_equal(held, negative)
    # The result is host memory that the GPU wrote in place.
    assert rig.cuda().place(rig.address(held)) == "pinned"
    if host == "mapped":
        try:
            engine(x)
        except jetrt.errors.DeviceError as error:
            assert "found pageable host memory; allowed: page-locked memory" in str(error)
        else:
            raise AssertionError
        continue
    for _ in range(5):
        np.testing.assert_array_equal(engine(x)["y"], wanted)
        rig.compared(streams)
    assert engine.stats["host_to_host_bytes"] == 5 * x.nbytes
    assert engine.stats["host_to_device_bytes"] == engine.stats["device_to_host_bytes"] == 0
    # A slice that begins inside a page-locked buffer is aligned as TensorRT wants it, or copied.
    inside = jetrt.pinned_empty(8 * 64 + 1)[1:].reshape(8, 64)
    inside[:] = x
    np.testing.assert_array_equal(engine(inside)["y"], wanted)
    engine.close()
print(rig.mistakes())
"""


@pytest.mark.parametrize("graphs", ["off", "auto"])
@pytest.mark.parametrize(
    "env", [{"FAKE_CUDA_INTEGRATED": 1}, {"JETRT_FORCE_INTEGRATED": 1}], ids=lambda e: next(iter(e))
)
def test_integrated(tmp_path: Any, env: dict[str, Any], graphs: str) -> None:
    plan = fakes.write_plan(tmp_path / "a.plan")
    assert fakes.run_python(INTEGRATED, str(plan), graphs, env=env).stdout == "[]\n"
