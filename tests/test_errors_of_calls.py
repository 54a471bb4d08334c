"""Bad input: every refusal by its class, its message and its fields. Nothing is reinterpreted, nothing is computed."""

# ruff: noqa: E501 (one case a line)

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rig

import fakes
import jetrt
from jetrt import errors

clean, load = map(pytest.fixture, (rig.clean, rig.load))

F32 = np.float32
TWO = fakes.copy_of("float32", [-1, 4], [([1, 4], [2, 4], [4, 4]), ([6, 4], [6, 4], [9, 4])])


def zeros(*shape: int, dtype: Any = F32) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


def refused(error: type[Exception], call: Callable[[], Any], *said: str) -> Any:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for text in said:
        assert text in str(caught.value), str(caught.value)
    return caught.value


# Inputs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "options", "call", "error", "said"),
    [
        ("add", {}, lambda e: e(a=zeros(2, 8), c=zeros(2, 8)), errors.InputNameError, "input 'c': found no input of that name; allowed: a, b"),
        ("add", {}, lambda e: e.run({"a": zeros(2, 8), "c": 1}), errors.InputNameError, "input 'c': found no input of that name; allowed: a, b"),
        ("add", {}, lambda e: e(zeros(2, 8)), errors.InputNameError, "input 'b': found nothing (the input is missing); allowed: float32[-1, 8]. Pass all of: a, b"),
        ("add", {}, lambda e: e(), errors.InputNameError, "input 'a': found nothing"),
        ("add", {}, lambda e: e(*[zeros(2, 8)] * 3), errors.InputNameError, "found 3 positional inputs; allowed: 2: a, b"),
        ("add", {}, lambda e: e.run([zeros(2, 8)]), errors.InputNameError, "found 1 inputs; allowed: 2"),
        ("add", {}, lambda e: e(zeros(2, 8), zeros(2, 8), a=zeros(2, 8)), errors.InputNameError, "input 'a': found the input twice (by position and by name)"),
        ("add", {}, lambda e: e.run(3), TypeError, "inputs: a mapping from input name to array, or a sequence"),
        ("mlp", {}, lambda e: e(zeros(64)), errors.ShapeError, "input 'x': found [64], 1 dimension(s); allowed: [1..64, 64], 2 dimension(s). Add or remove dimensions"),
        ("mlp", {}, lambda e: e(zeros(0, 64)), errors.ShapeError, "input 'x': found [0, 64]; allowed: [1..64, 64]"),
        ("mlp", {}, lambda e: e(zeros(65, 64)), errors.ShapeError, "input 'x': found [65, 64]; allowed: [1..64, 64]. Change the shape, or build the engine with a profile"),
        ("mlp", {}, lambda e: e(zeros(2, 63)), errors.ShapeError, "input 'x': found [2, 63]; allowed: [1..64, 64]"),
        (TWO, {}, lambda e: e(zeros(5, 4)), errors.ShapeError, "found [5, 4]; allowed: [1..4, 4] in profile 0, [6..9, 4] in profile 1. No profile fits all inputs together"),
        (TWO, {"profile": 1}, lambda e: e(zeros(2, 4)), errors.ShapeError, "found [2, 4]; allowed: [6..9, 4] in profile 1"),
        ("add", {}, lambda e: e(zeros(2, 8), zeros(17, 8)), errors.ShapeError, "input 'b': found [17, 8]; allowed: [1..16, 8]"),
        ("mlp", {}, lambda e: e(zeros(2, 64, dtype="f8")), errors.DTypeError, "input 'x': found float64; allowed: float32. Convert it once where it is made, or pass on_dtype=\"cast\""),
        ("mlp", {}, lambda e: e(zeros(2, 64, dtype="i4")), errors.DTypeError, "input 'x': found int32; allowed: float32. Convert it, or pass on_dtype"),
        ("mlp", {"on_dtype": "cast"}, lambda e: e(zeros(2, 64, dtype="c8")), errors.DTypeError, "input 'x': found complex64"),
        ("shape_input", {"on_dtype": "cast"}, lambda e: e(zeros(4), np.array([2, 3], "i4")), errors.DTypeError, "input 'size': found int32; allowed: int64"),
        ("mlp", {"host": "error"}, lambda e: e(zeros(2, 64)), errors.DeviceError, "input 'x': found cpu; allowed: cuda:0 (host=\"error\"). Move the tensor to the GPU, or load the engine with host=\"auto\""),
        ("mlp", {"host": "mapped"}, lambda e: e(zeros(2, 64)), errors.DeviceError, "input 'x': found pageable host memory; allowed: page-locked memory (host=\"mapped\"). Make the array with jetrt.pinned_empty"),
        ("mlp", {}, lambda e: e(zeros(64, 2).T), errors.LayoutError, "input 'x': found shape [2, 64] with strides [1, 2] (in elements); allowed: row-major strides [64, 1]. Pass .contiguous(), or on_strided=\"copy\""),
        ("mlp", {}, lambda e: e(np.broadcast_to(zeros(64), (2, 64))), errors.LayoutError, "with strides [0, 1]"),
        ("mlp", {}, lambda e: e([[1.0] * 64]), errors.DTypeError, "input 'x': found a Python list"),
        ("mlp", {}, lambda e: e(zeros(2, 64), stream="main"), TypeError, "stream: found str; allowed: an int handle, or a stream of torch, CuPy or cuda.core"),
        ("mlp", {}, lambda e: e(zeros(2, 64), timeout=-1), ValueError, "timeout=-1: seconds to wait, zero or more, or None"),
        ("mlp", {}, lambda e: e.run([zeros(2, 64)], timeout=float("nan")), ValueError, "timeout=NaN: seconds to wait"),
        ("mlp", {}, lambda e: e.prepare([{"z": (2, 64)}]), errors.InputNameError, "input 'z': found no input of that name; allowed: x"),
        ("mlp", {}, lambda e: e.prepare([{}]), errors.InputNameError, "input 'x': found nothing (the input is missing)"),
        ("mlp", {}, lambda e: e.prepare([{"x": (-1, 64)}]), errors.ShapeError, "found [-1, 64]; allowed: a shape without dynamic dimensions"),
        ("mlp", {}, lambda e: e.prepare([{"x": (65, 64)}]), errors.ShapeError, "found [65, 64]; allowed: [1..64, 64]"),
        ("mlp", {}, lambda e: e.prepare([3]), TypeError, "shapes: a list of mappings from input name to shape"),
    ],
)  # fmt: skip
def test_refused(load: Any, program: Any, options: dict, call: Callable[[Any], Any], error: Any, said: str) -> None:
    engine = load(program, options)
    raised = refused(error, lambda: call(engine), said)
    if isinstance(raised, errors.InputError):
        assert raised.tensor in said or raised.tensor in str(raised)
        assert raised.found
        assert raised.allowed
    assert (rig.trt().count("enqueueV3"), rig.cuda().count("cuLaunchKernel")) == (0, 0)
    assert engine.stats["calls"] == 0


def test_a_shape_tensor_on_the_gpu(load: Any) -> None:
    engine = load("shape_input")
    size = rig.Array(np.array([2, 3]))
    refused(
        errors.DeviceError, lambda: engine(zeros(4), size), "input 'size': found cuda:0; allowed: cpu: this is a shape"
    )


def test_an_input_of_another_gpu(tmp_path: Path) -> None:
    code = """
import rig, jetrt, sys, numpy as np
from jetrt import errors
engine = jetrt.Engine(sys.argv[1])
rig.ok("cuCtxSetCurrent", rig.made("cuDevicePrimaryCtxRetain", 1))
far = rig.Array.__new__(rig.Array)
far.shape, far.dtype, far.strides, far.stream, far.ptr = (2, 64), np.dtype("f4"), None, None, rig.made("cuMemAlloc_v2", 512)
far.base = far.ptr
rig.enter()
try:
    engine(far)
except errors.DeviceError as error:
    print(error)
far.shape = (2, 10)
try:
    engine(np.zeros((2, 64), np.float32), out={"y": far})
except errors.DeviceError as error:
    print(error)
try:
    jetrt.Engine(sys.argv[1], device=2)
except errors.DeviceError as error:
    print(error)
with jetrt.Engine(sys.argv[1], device="cuda:1") as other:
    far.shape = (2, 64)
    print(other(far)["y"].device)
"""
    plan = fakes.write_plan(tmp_path / "a.plan")
    said = fakes.run_python(code, str(plan), env={"FAKE_CUDA_DEVICES": 2}).stdout.splitlines()
    assert said == [
        "input 'x': found cuda:1; allowed: cuda:0. Move the tensor, or load the engine with device= of the tensor.",
        "out=: input 'y': found cuda:1; allowed: cuda:0. Pass a tensor of exactly that kind as out=.",
        "device 2 does not exist: this process sees 2 CUDA device(s), numbered from 0. Pass one of them as device=.",
        "cuda:1",
    ]


def test_device_arrays_by_layout(load: Any) -> None:
    strict, packing = load("mlp"), load("mlp", {"on_strided": "copy"})
    data = np.arange(128, dtype=F32).reshape(2, 64)
    inside = rig.Array(data, offset=64)
    said = refused(errors.LayoutError, lambda: strict(inside), "input 'x': found address 0x", "a multiple of 256 bytes")
    assert "This is a slice that begins inside a buffer: pass a copy of it (.clone()), or on_strided=" in str(said)
    turned = rig.Array(data.T, shape=(2, 64), strides=(4, 8))
    refused(errors.LayoutError, lambda: strict(turned), "found shape [2, 64] with strides [1, 2]")
    for array in (inside, turned):
        np.testing.assert_allclose(packing(array)["y"].numpy(), fakes.mlp_reference(data), rtol=1e-6)
    assert packing.stats["strided_copies"] == 2


@pytest.mark.parametrize("which", ["input 'x'", "output 'y'"])
def test_formats_that_are_not_row_major(load: Any, which: str) -> None:
    program = fakes.copy_of("float32", [2, 4])
    program["io"][which == "output 'y'"]["format"] = 1
    engine = load(program)
    for call in (lambda: engine(zeros(2, 4)), lambda: engine(rig.Array(zeros(2, 4)))):
        raised = refused(
            errors.LayoutError, call, f"{which}: found ", "Vectorized format", "linear I/O (jetrt build --io-formats "
        )
        assert raised.tensor == which[-2]


def test_a_tensor_that_requires_grad(load: Any) -> None:
    torch = pytest.importorskip("torch")
    engine = load("mlp")
    x = torch.zeros(2, 64, requires_grad=True)
    refused(
        errors.GradError,
        lambda: engine(x),
        "input 'x': found a tensor that requires grad, while grad mode is on",
        "Call it under torch.inference_mode() or torch.no_grad(), or pass x.detach()",
    )
    with torch.no_grad():
        engine(x)
    engine(x.detach())


def test_grad_mode_is_asked_of_whatever_torch_is_there(tmp_path: Path) -> None:
    """The same where torch is not installed: its two questions, asked of something that looks like it."""
    code = """
import sys, types, numpy as np, fakes, jetrt
class Tensor:
    requires_grad = True
Tensor.__module__ = "torch"
about = types.SimpleNamespace(cuda=None)
sys.modules["torch"] = types.SimpleNamespace(is_grad_enabled=lambda: True, Tensor=Tensor, version=about)
try:
    jetrt.Engine(fakes.write_plan(sys.argv[1]))(Tensor())
except jetrt.errors.GradError as error:
    print(error)
"""
    said = fakes.run_python(code, str(tmp_path / "a.plan")).stdout
    assert said.startswith(
        "input 'x': found a tensor that requires grad, while grad mode is on; allowed: tensors without"
    )


# Engines ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda e: e(zeros(2, 64)),
        lambda e: e.run([zeros(2, 64)]),
        lambda e: e.prepare([{"x": (2, 64)}]),
        lambda e: e.__enter__(),
    ],
)
def test_closed(load: Any, use: Callable[[Any], Any]) -> None:
    engine = load("mlp")
    assert not engine.closed
    engine.close()
    engine.close()
    assert engine.closed
    raised = refused(errors.ClosedEngineError, lambda: use(engine), "is closed. Load it again to use it.")
    assert raised.engine
    assert "(closed)" in repr(engine)
    assert list(engine.inputs) == ["x"]


def test_context_timeout(load: Any) -> None:
    program = fakes.copy_of("float32", [-1, -1], [([1, 1], [2, 2], [2000, 2000])])
    engine = load(program, {"timeout": 30.0, "on_strided": "copy"})
    raised: list[errors.ContextTimeoutError] = []
    # Packing a large array keeps the only context busy for a while, and again until somebody has met it.
    slow = zeros(1000, 1000).T

    def busy() -> None:
        while not raised:
            engine(slow)

    other = threading.Thread(target=busy)
    other.start()

    def met() -> bool:
        try:
            engine(zeros(2, 2), timeout=0.001)
        except errors.ContextTimeoutError as error:
            raised.append(error)
        return bool(raised)

    rig.until(met, lambda: "a timeout")
    other.join()
    assert str(raised[0]).startswith(
        "no execution context was free within 0.001 s (max_contexts=1). Raise max_contexts"
    )
    assert isinstance(raised[0], TimeoutError)
    assert (raised[0].seconds, raised[0].max_contexts, raised[0].engine) == (0.001, 1, engine.path)
    engine(zeros(2, 2))


WORDS = {
    "graphs": '"auto", "off", "require"',
    "outputs": '"pooled", "fresh"',
    "on_strided": '"error", "copy"',
    "on_dtype": '"error", "cast"',
    "host": '"auto", "mapped", "staged", "error"',
    "profile": '"auto"',
    "verify": '"auto", "off"',
}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        *(({name: "no"}, ValueError, f'{name}: found "no"; allowed: {words}') for name, words in WORDS.items()),
        ({"timeout": -1.0}, ValueError, "timeout=-1: seconds to wait, zero or more"),
        ({"timeout": float("nan")}, ValueError, "timeout=NaN"),
        ({"max_contexts": 0}, ValueError, "max_contexts: found 0; allowed: 1 or more"),
        ({"max_contexts": -1}, ValueError, "max_contexts: found -1; allowed: 1 or more"),
        ({"profile": 1}, ValueError, "profile=1: this engine has 1 optimisation profile(s), numbered from 0"),
        ({"profile": -1}, ValueError, "profile"),
        ({"device": "cpu"}, ValueError, 'device: found cpu; allowed: a GPU number, or "cuda:N"'),
        ({"device": 1}, errors.DeviceError, "device 1 does not exist: this process sees 1 CUDA device(s)"),
        ({"device": -1}, errors.DeviceError, "device -1 does not exist"),
        ({"warmup": -1}, OverflowError, ""),
        ({"graph_bytes": -1}, OverflowError, ""),
        ({"plugins": ["no.so"]}, errors.LibraryNotFoundError, "plugin library no.so: "),
        ({"no": 1}, TypeError, "no"),
    ],
)
def test_options(clean: None, tmp_path: Path, options: dict[str, Any], error: type[Exception], said: str) -> None:
    plan = fakes.write_plan(tmp_path / "a.plan")
    refused(error, lambda: jetrt.Engine(plan, **options), said)


def test_context_memory_that_does_not_fit(clean: None, tmp_path: Path) -> None:
    plan = fakes.write_plan(tmp_path / "a.plan", device_memory=4096)
    small, large = jetrt.DeviceMemory(4095), jetrt.DeviceMemory(4096)
    said = "device_memory has 4095 bytes and this engine's context needs 4096. Make it larger"
    refused(ValueError, lambda: jetrt.Engine(plan, device_memory=small), said)
    refused(ValueError, lambda: jetrt.Engine(plan, device_memory=large, max_contexts=2), "max_contexts must be 1")
    refused(TypeError, lambda: jetrt.Engine(plan, device_memory=4096))


# Plans ------------------------------------------------------------------------------------------------------------------

JSON = b'{"a": 1}'
PLAN = "this is a truncated TensorRT plan: "


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "this is an empty file (an interrupted build leaves one)"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x05", "this is an ONNX model: build a plan from it first (jetrt build --onnx … "),
        (b"PK\x03\x04" + bytes(40), "this is a zip archive (a torch checkpoint or .npz, perhaps)"),
        (b"\x7fELF\x02\x01" + bytes(40), "this is a program or shared library"),
        (bytes(64), "this is all zeros (an interrupted copy leaves such a file)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer: the file itself was not fetched"),
        (b"hello world, no plan", "this is no TensorRT plan: it begins with"),
        (b"ptrt" + bytes(40), "an inner piece of a TensorRT plan: its first bytes are missing"),
        (b"ftrt\x02", PLAN + "5 bytes, and the preamble alone has 28"),
        (len(JSON).to_bytes(4, "little") + JSON + b"nothing", "a JSON prefix (as Ultralytics writes) that no TensorRT plan follows"),
        (len(JSON).to_bytes(4, "little") + JSON + b"ftrt", PLAN + "4 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_plan(clean: None, tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.plan"
    path.write_bytes(content)
    for read in (jetrt.Engine, jetrt.read_plan):
        raised = refused(errors.PlanError, lambda: read(path), f"{path}: ", said, "Give the path of a TensorRT plan")  # noqa: B023
        assert (raised.path, raised.allowed) == (str(path), "a TensorRT plan file")
        assert raised.found in said or said.removeprefix("this is ") in raised.found
    assert rig.trt().calls() == 0


def test_truncated_and_damaged(clean: None, tmp_path: Path) -> None:
    whole, path = fakes.plan_bytes("mlp"), tmp_path / "a.plan"
    path.write_bytes(whole[:-1])
    refused(errors.PlanError, lambda: jetrt.Engine(path), f"{PLAN}{len(whole) - 1} bytes of {len(whole)}")
    path.write_bytes(whole[:-5] + b"*****")
    raised = refused(
        errors.EngineDeserializeError,
        lambda: jetrt.Engine(path),
        f"{path}: TensorRT 10.6.0.26 could not deserialise this plan (built by TensorRT 10.6.0.26)",
        "The file is damaged, or TensorRT's log lines below say why.\nTensorRT said:\n  IRuntime::deserializeCudaEngine",
    )
    assert raised.path == str(path)
    assert "Serialization assertion" in raised.log[0]


def test_paths(clean: None, tmp_path: Path) -> None:
    for name in ("b.engine", "a.trt", "c.onnx"):
        (tmp_path / name).touch()
    refused(errors.PlanError, lambda: jetrt.Engine(tmp_path), "this is a directory (with a.trt, b.engine)")
    missing = refused(FileNotFoundError, lambda: jetrt.Engine(tmp_path / "no.plan"), "no.plan: cannot open the plan")
    assert missing.filename == str(tmp_path / "no.plan")
    refused(TypeError, lambda: jetrt.Engine(3))


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"version": "10.7.0.1"}, errors.PlanError, "this plan was built by TensorRT 10.7.0.1, and "),
        (
            {"version": "10.5.0.1"},
            errors.PlanError,
            "A plan runs only on the version that built it: build it again here",
        ),
        ({"version": "10.6.0.25"}, errors.PlanError, "point JETRT_TENSORRT_PATH at TensorRT 10.6."),
        ({"version": "11.0.0.1"}, errors.PlanError, "this plan was built by TensorRT 11.0.0.1"),
        ({"serialization": 7}, errors.EngineDeserializeError, "Serialized Engine Version: 7"),
        ({"sm": 87}, errors.EngineDeserializeError, "The plan was built for another GPU: build it again on this one."),
        (
            {"host_code": True},
            errors.EngineDeserializeError,
            "The plan carries host code (a version-compatible plan does), ",
        ),
    ],
)
def test_plans_for_something_else(clean: None, tmp_path: Path, fields: dict, error: Any, said: str) -> None:
    path = fakes.write_plan(tmp_path / "a.plan", **fields)
    raised = refused(error, lambda: jetrt.Engine(path), said, f"{path}: ")
    if error is errors.PlanError:
        assert (raised.found, raised.allowed) == (fields["version"], "10.6.0.26")


def test_host_code_that_is_allowed(load: Any) -> None:
    load("mlp", {"allow_host_code": True}, host_code=True)(zeros(2, 64))


def test_checksum(clean: None, tmp_path: Path) -> None:
    path = fakes.write_plan(tmp_path / "a.plan")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    beside = tmp_path / "a.plan.sha256"
    verified = []
    for text in (None, digest, f"{digest.upper()}  a.plan\n"):
        if text is not None:
            beside.write_text(text)
        with jetrt.Engine(path) as engine:
            verified.append(engine.load_report["sha256_verified"])
    assert verified == [False, True, True]
    beside.write_text("0" * 64)
    raised = refused(
        errors.PlanError,
        lambda: jetrt.Engine(path),
        f"{path}: its SHA-256 is {digest}, and {beside} says {'0' * 64}: the plan is damaged or was replaced",
    )
    assert (raised.found, raised.allowed) == (digest, "0" * 64)
    with jetrt.Engine(path, verify="off") as engine:
        assert not engine.load_report["sha256_verified"]
    for text in ("", "no digest", digest[:-1]):
        beside.write_text(text)
        refused(errors.PlanError, lambda: jetrt.Engine(path), f"{beside}: no SHA-256 digest in this file")
    beside.unlink()
    beside.mkdir()
    refused(IsADirectoryError, lambda: jetrt.Engine(path), "cannot read the checksum beside the plan")


# Machines ---------------------------------------------------------------------------------------------------------------

LOAD = """
import sys, jetrt
try:
    jetrt.Engine(sys.argv[1])
except jetrt.errors.JetrtError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("env", "error", "said"),
    [
        ({"FAKE_CUDA_DEVICES": 0}, "CudaError", "the driver is there but finds no usable GPU (is one visible to this process?"),
        ({"LD_LIBRARY_PATH": None}, "LibraryNotFoundError", "the CUDA driver (libcuda.so.1) cannot be opened: libcuda.so.1: "),
        ({"FAKE_CUDA_DRIVER": 12010}, "UnsupportedVersionError", "this CUDA driver is of CUDA 12.1; jetrt needs one of CUDA 12.2"),
        ({"JETRT_TENSORRT_PATH": "/nowhere"}, "LibraryNotFoundError", "JETRT_TENSORRT_PATH is set, so nothing else was searched"),
        ({"FAKE_CUDA_MEMORY": 4096}, "OutOfMemoryError", "4096 on cuda:0"),
    ],
)  # fmt: skip
def test_machines(tmp_path: Path, env: dict[str, Any], error: str, said: str) -> None:
    plan = fakes.write_plan(tmp_path / "a.plan")
    found = fakes.run_python(LOAD, str(plan), env=env).stdout
    assert found.startswith(error)
    assert said in found


def test_no_tensorrt_anywhere(tmp_path: Path) -> None:
    # A folder with the driver alone.
    (tmp_path / "libcuda.so.1").symlink_to(fakes.library_dir() / "libcuda.so.1")
    plan = fakes.write_plan(tmp_path / "a.plan")
    env = {"LD_LIBRARY_PATH": tmp_path, "JETRT_TENSORRT_PATH": None}
    found = fakes.run_python(LOAD, str(plan), env=env).stdout
    assert found.startswith(
        "LibraryNotFoundError libnvinfer (TensorRT) cannot be opened; tried:\n  libnvinfer.so.10 (system loader)"
    )
    assert "libnvinfer.so.11 (system loader)" in found
    assert "Install TensorRT (on JetPack: apt install nvidia-jetpack" in found


def test_a_current_context_that_is_not_the_primary_one(load: Any) -> None:
    engine = load("mlp")
    held = engine(rig.Array(zeros(2, 64)))["y"]
    foreign = rig.made("cuCtxCreate_v2", 0, 0)
    try:
        for use in (lambda: engine(zeros(2, 64)), lambda: load("mlp"), lambda: jetrt.pinned_empty(3)):
            refused(
                errors.DeviceError,
                use,
                "the current CUDA context of this thread is not the primary context of device 0 (PyCUDA's autoinit",
                "Use the primary context: pycuda.autoprimaryctx instead of pycuda.autoinit",
            )
        # What is dropped meanwhile is given back all the same.
        del held
        engine.close()
        current = ctypes.c_uint64()
        rig.ok("cuCtxGetCurrent", ctypes.byref(current))
        assert current.value == foreign
    finally:
        rig.ok("cuCtxDestroy_v2", foreign)
