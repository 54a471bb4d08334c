"""The TensorRT stand-in's builder, parser, refitter and inspector: what jetrt relies on, called through the slots."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_fakes import Dims, Session, Trt, dims

import fakes

FP16, INT8, REFIT, TF32, OBEY, VERSION, LEAN, STRIP, IDENTICAL = 0, 1, 4, 6, 9, 13, 14, 19, 20
WORKSPACE = 0
FLOAT, HALF = 0, 1
RANGE = ([1, 64], [8, 64], [64, 64])


class Build(Trt):
    """A builder with a network, a parser and a configuration."""

    def __init__(self, strong: bool = False, opened: bool = True) -> None:
        super().__init__()
        self.fake.reset()
        self.cuda.reset()
        self.cuda.ok("cuInit", 0)
        self.cuda.made("cuDevicePrimaryCtxRetain", 0)
        self.cuda.ok("cuCtxSetCurrent", 0xC0DE0000)
        self.live = (self.cuda.all_live(), self.fake.all_live())
        self.onnx = ctypes.CDLL(str(Path(os.environ[fakes.MARK]) / f"libnvonnxparser.so.{self.version[0]}"))
        self.builder = self.network = self.config = self.parser = 0
        self.others: list[int] = []
        if opened:
            self.open(strong)

    def open(self, strong: bool = False) -> None:
        self.builder = self.factory("createInferBuilder_INTERNAL", self.logger, 0)
        bit = 1 if self.version[0] == 10 else 0
        self.network = self.made(self.builder, "VBuilder", "createNetworkV2", c_uint32(int(strong) << bit))
        self.config = self.made(self.builder, "VBuilder", "createBuilderConfig")
        self.parser = self.factory("createNvOnnxParser_INTERNAL", self.network, self.logger, 100)

    def factory(self, name: str, *arguments: int) -> int:
        function = self.onnx[name]
        function.restype, function.argtypes = c_void_p, [c_void_p] * (len(arguments) - 1) + [c_int32]
        made = function(*arguments)
        assert made is not None
        assert made > 4096, self.errors()
        return int(made)

    def made(self, this: int, cls: str, method: str, *arguments: Any) -> int:
        made = self.call(this, cls, method, c_void_p, *arguments)
        assert made, self.errors()
        return int(made)

    def direct(self, this: int, cls: str, method: str, result: Any, *arguments: Any) -> Any:
        """A method of an object that has no implementation apart."""
        slot = self.slot(f"nvonnxparser::{cls}", method)
        assert slot is not None, method
        table = c_void_p.from_address(this).value
        assert table is not None
        address = c_void_p.from_address(table + 8 * slot).value
        assert address is not None
        kinds = [{bytes: c_char_p, int: c_uint64}.get(type(a), type(a)) for a in arguments]
        return ctypes.CFUNCTYPE(result, c_void_p, *kinds)(address)(this, *arguments)

    def parse(self, path: Path) -> bool:
        return bool(self.direct(self.parser, "IParser", "parseFromFile", c_bool, str(path).encode(), c_int32(2)))

    def parse_errors(self, of: int | None = None, cls: str = "IParser") -> list[dict[str, Any]]:
        of = self.parser if of is None else of
        result = []
        for i in range(self.direct(of, cls, "getNbErrors", c_int32)):
            error = self.direct(of, cls, "getError", c_void_p, c_int32(i))
            said = {"node": c_int32, "code": c_int32, "nodeName": c_char_p, "nodeOperator": c_char_p, "desc": c_char_p}
            result.append({key: self.direct(error, "IParserError", key, kind) for key, kind in said.items()})
        return result

    def set(self, method: str, *arguments: Any, result: Any = None) -> Any:
        return self.call(self.config, "VBuilderConfig", method, result, *arguments)

    def get(self, method: str, result: Any = c_int32, *arguments: Any) -> Any:
        return self.call(self.config, "VBuilderConfig", method, result, *arguments)

    def flag(self, *flags: int) -> None:
        for flag in flags:
            self.set("setFlag", c_int32(flag))

    def profile(self, **shapes: Any) -> int:
        """Makes one; each input's min, opt and max."""
        profile = self.made(self.builder, "VBuilder", "createOptimizationProfile")
        for name, three in shapes.items():
            for i, shape in enumerate(three):
                assert self.profile_dims(profile, name, i, shape), self.errors()
        return profile

    def profile_dims(self, profile: int, name: str, select: int, shape: Any) -> bool:
        wanted = dims(*shape)
        method = ("VOptimizationProfile", "setDimensions", c_bool)
        return bool(self.call(profile, *method, name.encode(), c_int32(select), ctypes.addressof(wanted)))

    def add_profile(self, **shapes: Any) -> None:
        assert self.set("addOptimizationProfile", self.profile(**shapes), result=c_int32) >= 0

    def build(self) -> bytes | None:
        memory = self.call(self.builder, "VBuilder", "buildSerializedNetwork", c_void_p, self.network, self.config)
        return None if memory is None else self.bytes_of(memory)

    def bytes_of(self, memory: int) -> bytes:
        size = self.call(memory, "VHostMemory", "size", c_uint64)
        data = ctypes.string_at(self.call(memory, "VHostMemory", "data", c_void_p), size)
        self.destroy(memory)
        return data

    def layers(self) -> list[int]:
        count = self.call(self.network, "VNetworkDefinition", "getNbLayers", c_int32)
        return [self.made(self.network, "VNetworkDefinition", "getLayer", c_int32(i)) for i in range(count)]

    def tensor(self, mode: str, index: int = 0) -> int:
        return self.made(self.network, "VNetworkDefinition", f"get{mode}", c_int32(index))

    def close(self, mistakes: list[str] | None = None) -> None:
        if self.parser:
            self.direct(self.parser, "IParser", "~dtor_deleting", None)
        for this in (*self.others, self.config, self.network, self.builder):
            if this:
                self.destroy(this)
        assert self.fake.errors() == (mistakes or [])
        assert self.cuda.errors() == []
        assert (self.cuda.all_live(), self.fake.all_live()) == self.live
        self.cuda.call("cuDevicePrimaryCtxRelease_v2", 0)
        self.fake.reset()


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., Build]]:
    """Makes a builder that has parsed a model; what is left over at the end is an error."""
    made: list[Build] = []

    def make(model: Any = "mlp", strong: bool = False, **fields: Any) -> Build:
        one = Build(strong)
        made.append(one)
        assert one.parse(fakes.onnx_model(tmp_path / "m.onnx", model, **fields)), one.errors()
        return one

    yield make
    for one in reversed(made):
        one.close()


def run(plan: bytes, x: np.ndarray[Any, Any], shape: tuple[int, ...], before: Any = None) -> np.ndarray[Any, Any]:
    """What the engine computes; `before` is called with the session first."""
    session = Session(plan)
    if before is not None:
        before(session)
    target = session.device(int(np.prod(shape)) * 4)
    assert session.trt.bind(session.context, "x", session.upload(x), x.shape)
    assert session.trt.bind(session.context, "y", target)
    assert session.trt.shape(session.context, "VExecutionContext", "y") == list(shape)
    assert session.trt.enqueue(session.context, session.stream), session.trt.errors()
    session.cuda.ok("cuStreamSynchronize", session.stream)
    result = session.download(target, shape, np.float32)
    session.close()
    return result


def batch(rows: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).standard_normal((rows, 64)).astype(np.float32)


# Parsing --------------------------------------------------------------------------------------------------------------


def test_network_as_the_parser_made_it(build: Callable[..., Build]) -> None:
    b = build("norm")
    names = [b.call(layer, "VLayer", "getName", c_char_p) for layer in b.layers()]
    kinds = [b.call(layer, "VLayer", "getType", c_int32) for layer in b.layers()]
    assert names == [b"/first", b"/norm", b"/relu", b"/y"]
    assert kinds == [17, 45, 2, 17]  # MATRIX_MULTIPLY, NORMALIZATION, ACTIVATION
    x = b.tensor("Input")
    got = b.call(x, "VTensor", "getDimensions", Dims)
    assert list(got.d[: got.nb]) == [-1, 64]
    assert b.call(x, "VTensor", "getDimensionName", c_char_p, c_int32(0)) == b"batch"
    assert b.call(x, "VTensor", "getDimensionName", c_char_p, c_int32(1)) is None
    assert b.call(x, "VTensor", "isNetworkInput", c_bool)
    assert b.call(b.tensor("Output"), "VTensor", "getName", c_char_p) == b"y"
    assert b.parse_errors() == []


def test_build_and_run_what_onnx_says(build: Callable[..., Build]) -> None:
    b = build("mlp")
    b.add_profile(x=RANGE)
    b.set("clearFlag", c_int32(TF32))
    plan = b.build()
    assert plan, b.errors()
    x = batch()
    np.testing.assert_allclose(run(plan, x, (8, 10)), fakes.mlp_reference(x), rtol=1e-5, atol=1e-5)
    content = fakes.plan_content(plan)
    assert content["io"][0]["profiles"] == [[[1, 64], [8, 64], [64, 64]]]
    assert content["built"]["flags"] == []
    assert content["built"]["precisions"] == {"/product": "float32", "/y": "float32"}


def foreign_op(**more: Any) -> dict[str, Any]:
    nodes = [fakes.node("Relu", ["x"], ["a"]), fakes.node("Foo", ["a"], ["b"], ""), fakes.node("Bar", ["b"], ["y"])]
    io = {"inputs": [("x", "float32", [2, 4])], "outputs": [("y", "float32", [2, 4])]}
    return {"nodes": nodes, **io, **more}


@pytest.fixture
def empty() -> Iterator[Build]:
    one = Build()
    yield one
    one.close()


def test_unknown_operators_are_listed_all(empty: Build, tmp_path: Path) -> None:
    assert not empty.parse(fakes.onnx_model(tmp_path / "m.onnx", foreign_op()))
    found = empty.parse_errors()
    assert [(e["node"], e["nodeName"], e["nodeOperator"], e["code"]) for e in found] == [
        (1, b"node_of_b", b"Foo", 6),
        (2, b"/y", b"Bar", 6),
    ]
    assert b"Plugin not found, are the plugin name, version, and namespace correct?" in found[0]["desc"]
    assert 'While parsing node number 1 [Foo -> "b"]:' in empty.errors()
    assert not empty.parse(tmp_path / "m.onnx")
    assert "non-empty network" in empty.errors()[-1]
    empty.direct(empty.parser, "IParser", "clearErrors", None)
    assert empty.parse_errors() == []


def test_files_that_are_no_models(empty: Build, tmp_path: Path) -> None:
    whole = fakes.onnx_bytes("mlp")
    path = tmp_path / "m.onnx"
    for content in (whole[:-50], whole[: len(whole) // 2], b"\xff" * 20):
        path.write_bytes(content)
        assert not empty.parse(path)
        assert f"Failed to parse ONNX model from file: {path}!" in empty.errors()[-1]
    for missing in (tmp_path / "none.onnx", tmp_path):
        assert not empty.parse(missing)
    assert "Input is not a regular file" in empty.errors()[-1]
    assert empty.parse_errors() == []  # as the real parser: the log says it, the list does not
    data = whole[:-50]
    assert not empty.direct(empty.parser, "IParser", "parse", c_bool, data, c_uint64(len(data)), c_char_p(None))
    assert [e["code"] for e in empty.parse_errors()] == [3]


def test_external_data(empty: Build, tmp_path: Path) -> None:
    path = fakes.onnx_model(tmp_path / "m.onnx", external="w.bin")
    (tmp_path / "w.bin").rename(tmp_path / "other.bin")
    folder = tmp_path / "inner"
    folder.mkdir()
    assert not empty.parse(fakes.onnx_model(folder / "m.onnx", external="../w.bin"))
    assert "Relative paths to parent (../) are not allowed" in empty.errors()[0]
    (tmp_path / "w.bin").unlink()
    empty.lines.clear()
    assert not empty.parse(path)
    assert empty.errors()[0] == f"Failed to open file: {tmp_path / 'w.bin'}"
    assert [(e["node"], e["code"]) for e in empty.parse_errors()] == [(-1, 8)] * 2
    (tmp_path / "w.bin").write_bytes(b"short")
    assert not empty.parse(path)
    assert "Failed to read weights from external file" in "".join(empty.errors())
    (tmp_path / "other.bin").replace(tmp_path / "w.bin")
    assert empty.parse(path)


def test_type_that_tensorrt_has_not(empty: Build, tmp_path: Path) -> None:
    path = fakes.onnx_model(tmp_path / "m.onnx", "copy", inputs=[("x", "complex64", [2])])
    assert not empty.parse(path)
    (error,) = empty.parse_errors()
    assert (error["node"], error["code"]) == (-1, 8)
    assert b"Failed to convert ONNX date type to TensorRT data type." in error["desc"]


def test_hand_written_onnx_is_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    for model in ("mlp", "norm", "qdq", "conv", "add", "copy", "nonzero", "shape_input"):
        path = fakes.onnx_model(tmp_path / "m.onnx", model, external="w.bin", build={"ms": 1})
        onnx.checker.check_model(str(path))


@pytest.mark.parametrize("model", ["mlp", "norm", "qdq", "conv", "add"])
def test_graphs_compute_what_onnxruntime_does(build: Callable[..., Build], tmp_path: Path, model: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    b = build(model)
    b.set("clearFlag", c_int32(TF32))
    if model == "qdq":
        b.flag(INT8)
    names = ["a", "b"] if model == "add" else ["x"]
    shape = {"conv": (2, 3, 8, 8), "add": (2, 8)}.get(model, (2, 64))
    b.add_profile(**dict.fromkeys(names, (shape, shape, shape)))
    plan = b.build()
    assert plan, b.errors()
    rng = np.random.default_rng(4)
    feed = {name: rng.standard_normal(shape).astype(np.float32) for name in names}
    wanted = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]).run(None, feed)
    session = Session(plan)
    target = session.device(wanted[0].nbytes)
    for name, array in feed.items():
        assert session.trt.bind(session.context, name, session.upload(array), shape)
    assert session.trt.bind(session.context, "y", target)
    assert session.trt.enqueue(session.context, session.stream)
    session.cuda.ok("cuStreamSynchronize", session.stream)
    got = session.download(target, wanted[0].shape, np.float32)
    session.close()
    np.testing.assert_allclose(got, wanted[0], rtol=1e-4, atol=1e-5)


# Configuration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("AvgTimingIterations", 4, 0),
        ("ProfilingVerbosity", 2, 3),
        ("BuilderOptimizationLevel", 5, -1),
        ("HardwareCompatibilityLevel", 1, 9),
        ("MaxAuxStreams", 3, -1),
        ("RuntimePlatform", 1, 2),
        ("MaxNbTactics", 8, -2),
    ],
)
def test_setters_are_read_back(empty: Build, monkeypatch: pytest.MonkeyPatch, name: str, good: int, bad: int) -> None:
    before = empty.get(f"get{name}")
    empty.set(f"set{name}", c_int32(bad))
    assert empty.get(f"get{name}") == before
    assert f"IBuilderConfig::set{name}: Error Code 3" in empty.errors()[-1]
    monkeypatch.setenv("FAKE_TRT_BUILD", json.dumps({"ignore": [f"set{name}"]}))
    empty.set(f"set{name}", c_int32(good))
    assert empty.get(f"get{name}") == before
    monkeypatch.delenv("FAKE_TRT_BUILD")
    empty.set(f"set{name}", c_int32(good))
    assert empty.get(f"get{name}") == good


def test_flags(empty: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    assert empty.get("getFlags", c_uint32) == 1 << TF32
    empty.flag(REFIT)
    empty.flag(IDENTICAL)
    assert empty.get("getFlags", c_uint32) == 1 << TF32 | 1 << IDENTICAL
    assert any("mutually exclusive" in text for _, text in empty.lines)
    empty.flag(LEAN)
    assert "kEXCLUDE_LEAN_RUNTIME can only be set if kVERSION_COMPATIBLE is set." in empty.errors()[-1]
    empty.flag(VERSION, LEAN)
    assert empty.get("getFlag", c_bool, c_int32(LEAN))
    monkeypatch.setenv("FAKE_TRT_BUILD", json.dumps({"ignore": "FP16"}))
    empty.flag(FP16)
    assert not empty.get("getFlag", c_bool, c_int32(FP16))


def test_pools_tactic_sources_plugins(empty: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    assert empty.get("getMemoryPoolLimit", c_uint64, c_int32(WORKSPACE)) == 8 << 30  # all of the device's memory
    empty.set("setMemoryPoolLimit", c_int32(WORKSPACE), c_uint64(1 << 20))
    assert empty.get("getMemoryPoolLimit", c_uint64, c_int32(WORKSPACE)) == 1 << 20
    monkeypatch.setenv("FAKE_TRT_BUILD", json.dumps({"ignore": ["WORKSPACE"]}))
    empty.set("setMemoryPoolLimit", c_int32(WORKSPACE), c_uint64(1 << 21))
    assert empty.get("getMemoryPoolLimit", c_uint64, c_int32(WORKSPACE)) == 1 << 20
    empty.set("setMemoryPoolLimit", c_int32(1), c_uint64(1 << 20))
    assert "DLA disabled" in empty.errors()[-1]
    assert empty.set("setTacticSources", c_uint32(0b1000), result=c_bool)
    assert empty.get("getTacticSources", c_uint32) == 0b1000
    assert not empty.set("setTacticSources", c_uint32(1 << 9), result=c_bool)
    paths = (c_char_p * 2)(b"/a.so", b"/b.so")
    empty.set("setPluginsToSerialize", ctypes.addressof(paths), c_int32(2))
    assert empty.get("getNbPluginsToSerialize") == 2
    assert empty.get("getPluginToSerialize", c_char_p, c_int32(1)) == b"/b.so"
    paths[1] = b"/a.so"
    empty.set("setPluginsToSerialize", ctypes.addressof(paths), c_int32(2))
    assert "Duplicate path is /a.so" in empty.errors()[-1]


def test_strongly_typed_networks_refuse_precisions(build: Callable[..., Build]) -> None:
    b = build("mlp", strong=True)
    b.flag(FP16)
    assert "Setting BuilderFlag::kFP16 is not allowed set for kSTRONGLY_TYPED network." in b.errors()[-1]
    assert not b.get("getFlag", c_bool, c_int32(FP16))
    b.call(b.layers()[0], "VLayer", "setPrecision", None, c_int32(HALF))
    assert "cannot be called for a strongly typed network" in b.errors()[-1]
    assert not b.call(b.layers()[0], "VLayer", "precisionIsSet", c_bool)
    b.add_profile(x=RANGE)
    plan = b.build()
    assert plan, b.errors()
    assert fakes.plan_content(plan)["built"]["strongly_typed"] is True


def test_flag_set_before_the_strongly_typed_network_fails_the_build(build: Callable[..., Build]) -> None:
    one = Build()
    one.flag(FP16)
    network = one.made(one.builder, "VBuilder", "createNetworkV2", c_uint32(2))
    one.others.append(network)
    assert one.call(one.builder, "VBuilder", "buildSerializedNetwork", c_void_p, network, one.config) is None
    one.close()
    b = build("mlp", strong=True)
    b.flag(21)  # WEIGHT_STREAMING
    b.add_profile(x=RANGE)
    plan = b.build()
    assert plan
    assert fakes.plan_content(plan)["weight_streaming"] is True


# Profiles -------------------------------------------------------------------------------------------------------------


def test_profiles_are_ordered(empty: Build) -> None:
    profile = empty.profile(x=([2, 4], [3, 4], [4, 4]))
    assert empty.call(profile, "VOptimizationProfile", "isValid", c_bool)
    assert not empty.profile_dims(profile, "x", 0, [5, 4])
    assert "MIN<=OPT<=MAX" in empty.errors()[-1]
    assert not empty.profile_dims(profile, "x", 2, [4, 4, 4])
    assert not empty.profile_dims(profile, "x", 2, [-1, 4])
    got = empty.call(profile, "VOptimizationProfile", "getDimensions", Dims, b"x", c_int32(2))
    assert list(got.d[: got.nb]) == [4, 4]
    half = empty.made(empty.builder, "VBuilder", "createOptimizationProfile")
    assert empty.profile_dims(half, "x", 0, [1])
    assert empty.set("addOptimizationProfile", half, result=c_int32) == -1
    assert empty.set("addOptimizationProfile", profile, result=c_int32) == 0
    assert empty.get("getNbOptimizationProfiles") == 1


@pytest.mark.parametrize(
    ("profile", "text"),
    [
        (None, "Network has dynamic or shape inputs, but no optimization profile has been defined."),
        ({}, "x: dynamic input is missing dimensions in profile 0."),
        ({"z": RANGE}, "x: dynamic input is missing dimensions in profile 0."),
        (
            {"x": ([1, 64], [1, 65], [1, 66])},
            "At dimension axis 1, profile has min=64, opt=65, max=66 but tensor has 64.",
        ),
        ({"x": ([1], [1], [1])}, "Profile has 1 dimensions but tensor has 2."),
    ],
)
def test_builds_without_a_right_profile(build: Callable[..., Build], profile: Any, text: str) -> None:
    b = build("mlp")
    if profile is not None:
        b.add_profile(**profile)
    assert b.build() is None
    assert text in b.errors()[-1]


@pytest.mark.parametrize("version", ["10.6.0.26", "10.11.0.33", "11.0.0.114"])
def test_values_of_shape_tensors(version: str, tmp_path: Path) -> None:
    code = """
import ctypes, fakes, sys, test_fakes_builder as t
from ctypes import c_bool, c_int32, c_int64
b = t.Build()
path = fakes.onnx_model(sys.argv[1], "shape_input")
assert b.parse(path), b.errors()
assert b.call(b.tensor("Input", 1), "VTensor", "isShapeTensor", c_bool)
assert not b.call(b.tensor("Input", 0), "VTensor", "isShapeTensor", c_bool)
b.add_profile()
assert b.build() is None
assert "Profile 0 is missing values for shape input tensor size." in b.errors()[-1]
b.call(b.config, "VBuilderConfig", "reset", None)
new = b.version >= (10, 11)
profile = b.made(b.builder, "VBuilder", "createOptimizationProfile")
for i, values in enumerate(([1, 1], [2, 3], [8, 8])):
    array = ((c_int64 if new else c_int32) * 2)(*values)
    name = "setShapeValuesV2" if new else "setShapeValues"
    at = ctypes.addressof(array)
    assert b.call(profile, "VOptimizationProfile", name, c_bool, b"size", c_int32(i), at, c_int32(2))
assert b.call(profile, "VOptimizationProfile", "getNbShapeValues", c_int32, b"size") == 2
assert b.set("addOptimizationProfile", profile, result=c_int32) == 0
plan = b.build()
io = fakes.plan_content(plan)["io"]
assert [(t["name"], t.get("location"), t["values"]) for t in io[1:2]] == [("size", "host", [[[1, 1], [2, 3], [8, 8]]])]
b.close()
"""
    fakes.run_python(code, str(tmp_path / "m.onnx"), version=version)


# Precision ------------------------------------------------------------------------------------------------------------


def built(b: Build, *flags: int, **profile: Any) -> bytes:
    b.flag(*flags)
    b.add_profile(**(profile or {"x": RANGE}))
    plan = b.build()
    assert plan, b.errors()
    return plan


def error_of(plan: bytes, x: np.ndarray[Any, Any]) -> float:
    return float(np.abs(run(plan, x, (8, 10)) - fakes.mlp_reference(x)).max())


@pytest.mark.parametrize(("flags", "low", "high"), [((), 1e-5, 1e-2), ((FP16,), 1e-4, 1e-2), ((17,), 1e-3, 1e-1)])
def test_lower_precision_shows_in_the_results(
    build: Callable[..., Build], flags: tuple[int, ...], low: float, high: float
) -> None:
    plan = built(build("mlp"), *flags)
    names = {(): "tf32", (FP16,): "float16", (17,): "bfloat16"}
    assert fakes.plan_content(plan)["built"]["precisions"]["/product"] == names[flags]
    assert low < error_of(plan, batch()) < high


def inspect(plan: bytes, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    session = Session(plan)
    trt = session.trt
    inspector = trt.call(session.engine, "VCudaEngine", "createEngineInspector", c_void_p)
    if shapes:
        for name, shape in shapes.items():
            assert trt.bind(session.context, name, 0, shape)
        assert trt.call(inspector, "VEngineInspector", "setExecutionContext", c_bool, session.context)
    text = trt.call(inspector, "VEngineInspector", "getEngineInformation", c_char_p, c_int32(1))
    first = trt.call(inspector, "VEngineInspector", "getLayerInformation", c_char_p, c_int32(0), c_int32(1))
    trt.destroy(inspector)
    session.close()
    result: dict[str, Any] = json.loads(text)
    assert json.loads(first) == result["Layers"][0]
    return result


def test_inspector(build: Callable[..., Build]) -> None:
    b = build("mlp")
    names_only = built(b, FP16)
    assert inspect(names_only) == {
        "Layers": [
            "Reformatting CopyNode for Input Tensor 0 to /product",
            *("/product", "/y"),
            "Reformatting CopyNode for Output Tensor 0 to /y",
        ],
        "Bindings": ["x", "y"],
    }
    b.set("setProfilingVerbosity", c_int32(2))
    detailed = b.build()
    assert detailed
    layer = inspect(detailed)["Layers"][1]
    assert (layer["LayerType"], layer["Metadata"]) == ("gemm", "[ONNX Layer: /product]")
    assert "f16f16_f16f16_f16" in layer["TacticName"]
    assert layer["Inputs"][0]["Format/Datatype"] == layer["Outputs"][0]["Format/Datatype"] == "Half"
    assert layer["Outputs"][0]["Dimensions"] == [-1, 10]
    assert inspect(detailed, {"x": (5, 64)})["Layers"][1]["Outputs"][0]["Dimensions"] == [5, 10]


def test_convolutions_are_worded_as_those_of_tensorrts_own_kernels(build: Callable[..., Build]) -> None:
    b = build("conv")
    b.set("setProfilingVerbosity", c_int32(2))
    shape = (1, 3, 8, 8)
    layers = inspect(built(b, FP16, x=(shape, shape, shape)))["Layers"]
    assert [layer["LayerType"] for layer in layers[:2]] == ["Reformat", "CaskConvolution"]
    assert layers[1]["Inputs"][0]["Format/Datatype"] == "Row major linear FP16 format"


def test_layer_times_have_the_layers_names(build: Callable[..., Build]) -> None:
    session = Session(built(build("mlp", build={"ms": 2})))
    times: dict[bytes, float] = {}
    report = ctypes.CFUNCTYPE(None, c_void_p, c_char_p, c_float)(lambda _this, name, ms: times.update({name: ms}))
    profiler = session.trt.implement("IProfiler", reportLayerTime=report)
    session.trt.call(session.context, "VExecutionContext", "setProfiler", None, profiler)
    assert session.trt.bind(session.context, "x", session.upload(batch()), (8, 64))
    assert session.trt.bind(session.context, "y", session.device(320))
    assert session.trt.enqueue(session.context, session.stream)
    assert set(times) == {b"/product", b"/y"}
    assert 2 < sum(times.values()) < 3
    session.close()


def test_precision_of_a_layer_counts_only_when_it_must_be_obeyed(build: Callable[..., Build]) -> None:
    b = build("norm")
    norm = b.layers()[1]
    assert not b.call(norm, "VLayer", "precisionIsSet", c_bool)
    b.call(norm, "VLayer", "setPrecision", None, c_int32(FLOAT))
    b.call(norm, "VLayer", "setOutputType", None, c_int32(0), c_int32(FLOAT))
    assert b.call(norm, "VLayer", "getOutputType", c_int32, c_int32(0)) == FLOAT
    plan: bytes | None = built(b, FP16)
    assert plan
    assert fakes.plan_content(plan)["built"]["precisions"]["/norm"] == "float16"
    assert any("Detected layernorm nodes in FP16" in text for severity, text in b.lines if severity == 2)
    b.lines.clear()
    b.flag(OBEY)
    plan = b.build()
    assert plan
    assert fakes.plan_content(plan)["built"]["precisions"]["/norm"] == "float32"
    assert not any("layernorm" in text for _, text in b.lines)
    b.call(norm, "VLayer", "setPrecision", None, c_int32(7))
    assert b.build() is None
    assert "bf16 precision has been set for at least one layer" in b.errors()[-1]


def test_norms_overflow_in_float16(build: Callable[..., Build]) -> None:
    b = build("norm")
    x = batch() * 200
    good = run(built(b), x, (8, 64))
    bad = run(built(b, FP16), x, (8, 64))
    b.call(b.layers()[1], "VLayer", "setPrecision", None, c_int32(FLOAT))
    cured = run(built(b, OBEY), x, (8, 64))
    assert np.abs(bad - good).max() > 0.5
    assert np.abs(cured - good).max() < 0.02


def test_layers_that_silently_stay_float32(build: Callable[..., Build]) -> None:
    plan = built(build("mlp", build={"keep_fp32": "/prod*"}), FP16)
    assert fakes.plan_content(plan)["built"]["precisions"] == {"/product": "tf32", "/y": "float16"}


def test_one_node_that_hides_its_inside(build: Callable[..., Build]) -> None:
    b = build("mlp", build={"foreign": True})
    b.set("setProfilingVerbosity", c_int32(2))
    (layer,) = inspect(built(b, FP16))["Layers"]
    assert layer["Name"] == "{ForeignNode[/product.../y]}"
    assert layer["LayerType"] == "Myelin"


def test_types_and_formats_of_inputs_and_outputs(build: Callable[..., Build]) -> None:
    b = build("mlp")
    x = b.tensor("Input")
    b.call(x, "VTensor", "setType", None, c_int32(HALF))
    b.call(x, "VTensor", "setAllowedFormats", None, c_uint32(1 << 2))
    assert b.call(x, "VTensor", "getType", c_int32) == HALF
    assert b.call(x, "VTensor", "getAllowedFormats", c_uint32) == 1 << 2
    io = fakes.plan_content(built(b, FP16))["io"]
    assert [(t["dtype"], t["format"]) for t in io] == [("float16", 2), ("float32", 0)]


# INT8 -----------------------------------------------------------------------------------------------------------------


class Calibrator:
    """Batches of data, a cache to read, and what was asked and written."""

    def __init__(self, b: Build, batches: list[np.ndarray[Any, Any]], cache: bytes | None = None, **more: Any) -> None:
        self.asked: list[list[bytes]] = []
        self.written: list[bytes] = []
        self.memory = b.cuda.device(8 * 64 * 4)
        left = list(batches)
        pointer = more.get("pointer", self.memory)

        def get_batch(_this: int, bindings: Any, names: Any, count: int) -> bool:
            self.asked.append([names[i] for i in range(count)])
            if not left:
                return False
            array = left.pop(0)
            b.cuda.ok("cuMemcpyHtoD_v2", self.memory, array.ctypes.data, array.nbytes)
            bindings[0] = pointer
            return True

        def read(_this: int, length: Any) -> int | None:
            length[0] = len(cache or b"")
            return ctypes.cast(self.cache, c_void_p).value if cache else None

        self.cache = ctypes.create_string_buffer(cache or b"")
        pointers = ctypes.POINTER(c_void_p)
        self.object = b.implement(
            more.get("interface", "IInt8EntropyCalibrator2"),
            getBatchSize=ctypes.CFUNCTYPE(c_int32, c_void_p)(lambda _this: 8),
            getBatch=ctypes.CFUNCTYPE(c_bool, c_void_p, pointers, ctypes.POINTER(c_char_p), c_int32)(get_batch),
            readCalibrationCache=ctypes.CFUNCTYPE(c_void_p, c_void_p, ctypes.POINTER(c_uint64))(read),
            writeCalibrationCache=ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_uint64)(
                lambda _this, data, size: self.written.append(ctypes.string_at(data, size))
            ),
            getAlgorithm=ctypes.CFUNCTYPE(c_int32, c_void_p)(lambda _this: more.get("algorithm", 2)),
        )
        b.flag(INT8)
        b.set("setInt8Calibrator", self.object)
        assert b.set("setCalibrationProfile", b.profile(x=([8, 64],) * 3), result=c_bool)
        b.add_profile(x=RANGE)


def test_int8_without_calibrator_or_qdq_fails(build: Callable[..., Build]) -> None:
    b = build("mlp")
    b.flag(INT8)
    b.add_profile(x=RANGE)
    assert b.build() is None
    assert any("Calibrator is not being used." in text for severity, text in b.lines if severity == 2)
    assert "Calibration failure occurred with no scaling factors detected." in b.errors()[-1]


def test_calibration(build: Callable[..., Build]) -> None:
    b = build("mlp")
    calibrator = Calibrator(b, [batch(), batch() * 2])
    plan = b.build()
    assert plan, b.errors()
    assert calibrator.asked == [[b"x"]] * 3
    (cache,) = calibrator.written
    header, *lines = cache.decode().splitlines()
    assert header == "TRT-100600-EntropyCalibration2"
    scales = {name: np.uint32(int(value, 16)).view(np.float32) for name, value in (line.split(": ") for line in lines)}
    assert set(scales) == {"x", "product", "y"}
    np.testing.assert_allclose(scales["x"], np.abs(batch()).max() * 2 * 0.95 / 127, rtol=1e-5)
    assert fakes.plan_content(plan)["built"]["precisions"] == {"/product": "int8", "/y": "int8"}
    assert 1e-3 < error_of(plan, batch()) < 0.5
    b.cuda.ok("cuMemFree_v2", calibrator.memory)
    again = Calibrator(b, [], cache)
    assert b.build()
    assert (again.asked, again.written) == ([], [])
    b.cuda.ok("cuMemFree_v2", again.memory)


@pytest.mark.parametrize(
    ("cache", "text"),
    [
        (b"TRT-100500-EntropyCalibration2\nx: 3d000000\n", "Calibration table does not match."),
        (b"TRT-100600-MinMaxCalibration\nx: 3d000000\n", "does not match calibrator algorithm type."),
        (b"TRT-100600-EntropyCalibration2\nx 3d000000\n", "Could not parse the following line"),
    ],
)
def test_caches_that_are_passed_over(build: Callable[..., Build], cache: bytes, text: str) -> None:
    b = build("mlp")
    calibrator = Calibrator(b, [batch()], cache)
    assert b.build()
    assert any(text in line for _, line in b.lines)
    assert len(calibrator.asked) == 2
    b.cuda.ok("cuMemFree_v2", calibrator.memory)


def test_cache_that_lacks_a_tensor(build: Callable[..., Build]) -> None:
    b = build("mlp")
    calibrator = Calibrator(b, [], b"TRT-100600-MinMaxCalibration\nx: 3d000000\nproduct: 3d000000\n", algorithm=3)
    plan = b.build()
    assert plan
    assert any("Missing scale and zero-point for tensor y" in text for _, text in b.lines)
    assert fakes.plan_content(plan)["built"]["precisions"] == {"/product": "int8", "/y": "float32"}
    b.cuda.ok("cuMemFree_v2", calibrator.memory)


def test_calibrator_that_gives_the_wrong_memory_or_none(build: Callable[..., Build]) -> None:
    b = build("mlp")
    for pointer, batches, text in (
        (0, [batch()], "the calibrator's binding for x is not 2048 bytes of device memory"),
        (0, [], "Calibration failure occurred"),
    ):
        calibrator = Calibrator(b, batches, pointer=pointer)
        assert b.build() is None
        assert text in b.errors()[-1]
        b.cuda.ok("cuMemFree_v2", calibrator.memory)


def test_qdq_says_what_is_quantised(build: Callable[..., Build]) -> None:
    b = build("qdq")
    b.add_profile(x=RANGE)
    assert b.build() is None
    assert "int8 is not configured in the builder" in b.errors()[-1]
    b.set("setProfilingVerbosity", c_int32(2))
    plan = built(b, INT8)
    layers = {layer["Name"]: layer for layer in inspect(plan)["Layers"]}
    assert "i8i8_i8i32_f32" in layers["/product"]["TacticName"]
    assert 0 < error_of(plan, batch()) < 1


# Progress and caches --------------------------------------------------------------------------------------------------


def monitor(b: Build, stop_in: bytes = b"") -> list[tuple[Any, ...]]:
    events: list[tuple[Any, ...]] = []

    def step(_this: int, name: bytes, n: int) -> bool:
        events.append(("step", name, n))
        return name != stop_in

    b.set(
        "setProgressMonitor",
        b.implement(
            "IProgressMonitor",
            phaseStart=ctypes.CFUNCTYPE(None, c_void_p, c_char_p, c_char_p, c_int32)(
                lambda _this, name, parent, n: events.append(("start", name, parent, n))
            ),
            stepComplete=ctypes.CFUNCTYPE(c_bool, c_void_p, c_char_p, c_int32)(step),
            phaseFinish=ctypes.CFUNCTYPE(None, c_void_p, c_char_p)(lambda _this, name: events.append(("finish", name))),
        ),
    )
    return events


def test_progress(build: Callable[..., Build]) -> None:
    b = build("mlp", build={"seconds": 0.1})
    events = monitor(b)
    built(b)
    starts = {name: (parent, n) for kind, name, parent, n in (e for e in events if e[0] == "start")}
    assert starts[b"Building Engine"][0] is None
    assert starts[b"Timing graph nodes"][0] == b"Building engine from subgraph"
    for name, (_, n) in starts.items():
        assert [e[2] for e in events if e[:2] == ("step", name)] == list(range(n))
        assert events.count(("finish", name)) == 1
    assert events[-1] == ("finish", b"Building Engine")


def test_build_that_is_canceled(build: Callable[..., Build]) -> None:
    b = build("mlp", build={"seconds": 60})
    events = monitor(b, b"Timing graph nodes")
    b.add_profile(x=RANGE)
    assert b.build() is None
    assert "Build canceled by user" in b.errors()[-1]
    assert sum(e[0] == "start" for e in events) == sum(e[0] == "finish" for e in events)


def timing_cache(b: Build, blob: bytes) -> int | None:
    cache = b.set("createTimingCache", blob, len(blob), result=c_void_p)
    if cache is not None:
        b.others.append(cache)
    return None if cache is None else int(cache)


def test_timing_cache(build: Callable[..., Build]) -> None:
    b = build("mlp")
    first = timing_cache(b, b"")
    assert b.set("setTimingCache", first, False, result=c_bool)
    assert b.get("getTimingCache", c_void_p) == first
    counts = [fakes.plan_content(built(b))["built"]["timing_cache"] for _ in range(2)]
    assert [(c["hits"], c["misses"]) for c in counts] == [(0, 2), (2, 0)]
    assert first
    blob = b.bytes_of(b.made(first, "VTimingCache", "serialize"))
    assert b'"version":"10.6.0.26"' in blob
    b.flag(16)  # ERROR_ON_TIMING_CACHE_MISS
    second = timing_cache(b, b"")
    assert second
    assert b.set("setTimingCache", second, False, result=c_bool)
    assert b.build() is None
    assert "kERROR_ON_TIMING_CACHE_MISS" in b.errors()[-1]
    assert b.call(second, "VTimingCache", "combine", c_bool, timing_cache(b, blob), False)
    assert b.build()
    for old, new, ignored in ((b"10.6.0.26", b"10.5.0.18", False), (b'"sm":90', b'"sm":87', True)):
        other = timing_cache(b, blob.replace(old, new))
        assert not b.set("setTimingCache", other, False, result=c_bool)
        assert "Timing cache header mismatch" in b.lines[-1][1]
        assert b.set("setTimingCache", other, True, result=c_bool) is ignored
    assert timing_cache(b, b"junk") is None
    assert "Magic tag does not match" in b.errors()[-1]


# Plans that need something --------------------------------------------------------------------------------------------


def refit(session: Session, path: Path | None, refits: bool = True, early: bool = False) -> list[str]:
    """From an ONNX file, as jetrt does it."""
    b = Build.__new__(Build)
    b.__dict__.update(session.trt.__dict__)
    b.onnx = ctypes.CDLL(str(Path(os.environ[fakes.MARK]) / f"libnvonnxparser.so.{b.version[0]}"))
    refitter = b.factory("createInferRefitter_INTERNAL", session.engine, session.trt.logger, 0)
    missing = b.call(refitter, "VRefitter", "getMissingWeights", c_int32, c_int32(0), c_void_p(None))
    names = (c_char_p * missing)()
    b.call(refitter, "VRefitter", "getMissingWeights", c_int32, c_int32(missing), ctypes.addressof(names))
    result = [name.decode() for name in names]
    parser = 0
    if path is not None:
        parser = b.factory("createNvOnnxParserRefitter_INTERNAL", refitter, session.trt.logger, 100)
        done = b.direct(parser, "IParserRefitter", "refitFromFile", c_bool, str(path).encode())
        assert done is refits, session.trt.errors()
        if not refits:
            (error,) = b.parse_errors(parser, "IParserRefitter")
            assert error["code"] in (3, 14)
    if parser and early:
        b.direct(parser, "IParserRefitter", "~dtor_deleting", None)
    assert b.call(refitter, "VRefitter", "refitCudaEngine", c_bool) is refits
    if parser and not early:
        b.direct(parser, "IParserRefitter", "~dtor_deleting", None)
    session.trt.destroy(refitter)
    return result


@pytest.mark.parametrize("plan", [None, {"program": "affine", "w": [[1.0] * 10] * 64, "b": [0.5] * 10}])
def test_stripped_plan(build: Callable[..., Build], tmp_path: Path, plan: Any) -> None:
    fields = {} if plan is None else {"plan": plan, "weights": {}, "nodes": [fakes.node("MatMul", ["x", "x"], ["y"])]}
    b = build("mlp", **fields)
    b.set("clearFlag", c_int32(TF32))
    stripped = built(b, STRIP)
    x = batch()
    assert not run(stripped, x, (8, 10)).any()
    names: list[str] = []
    got = run(stripped, x, (8, 10), lambda session: names.extend(refit(session, tmp_path / "m.onnx")))
    assert names == ["w", "b"]
    wanted = fakes.mlp_reference(x) if plan is None else x.sum(1, keepdims=True).repeat(10, 1) + 0.5
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_refit_that_cannot_be(build: Callable[..., Build], tmp_path: Path) -> None:
    b = build("mlp")
    session = Session(built(b))
    assert (
        b.fake.library["createInferRefitter_INTERNAL"](c_void_p(session.engine), c_void_p(session.trt.logger), 0) == 0
    )
    assert "isNoneRefittable" in session.trt.errors()[-1]
    session.close()
    session = Session(built(b, STRIP))
    refit(session, None, refits=False)
    assert "missing 2 needed Weights" in session.trt.errors()[-1]
    refit(session, fakes.onnx_model(tmp_path / "other.onnx", "add"), refits=False)
    refit(session, tmp_path / "none.onnx", refits=False)
    w = np.zeros((64, 11), np.float32)
    refit(session, fakes.onnx_model(tmp_path / "other.onnx", weights={"w": w, "b": w[0]}), refits=False)
    session.close()


def test_stripped_plan_with_the_weights_of_another_model_is_a_mistake(
    build: Callable[..., Build], tmp_path: Path
) -> None:
    plan = built(build("mlp"), STRIP)
    session = Session(plan)
    w = np.ones((64, 10), np.float32)
    refit(session, fakes.onnx_model(tmp_path / "other.onnx", weights={"w": w, "b": w[0]}))
    assert "kREFIT_IDENTICAL was refitted with other weights" in session.trt.fake.errors()[0]
    refit(session, tmp_path / "m.onnx", early=True)
    assert "parser refitter, which owns the weights, had been destroyed" in session.trt.fake.errors()[1]
    session.trt.fake.reset()
    session.close()


def test_version_compatible_plans(build: Callable[..., Build], tmp_path: Path) -> None:
    b = build("mlp")
    full = built(b)
    lean = built(b, VERSION, LEAN)
    b.set("clearFlag", c_int32(LEAN))
    embedded = b.build()
    assert embedded
    code = """
import sys, test_fakes
trt = test_fakes.Trt()
runtime = trt.runtime()
for i, path in enumerate(sys.argv[1:]):
    trt.call(runtime, "VRuntime", "setEngineHostCodeAllowed", None, i == 2)
    engine = trt.engine(runtime, open(path, "rb").read())
    print(engine is not None, trt.errors()[-1:] if engine is None else "")
"""
    for name, plan in (("lean", lean), ("full", full), ("embedded", embedded)):
        (tmp_path / name).write_bytes(plan)
    paths = [str(tmp_path / name) for name in ("lean", "embedded", "embedded", "full")]
    same = fakes.run_python(code, *paths).stdout.splitlines()
    assert [line.split()[0] for line in same] == ["True", "False", "True", "True"]
    assert "getEngineHostCodeAllowed" in same[1]
    other = fakes.run_python(code, *paths, version="10.7.0.23").stdout.splitlines()
    assert [line.split()[0] for line in other] == ["False", "False", "True", "False"]


def test_hardware_compatible_plans(build: Callable[..., Build], tmp_path: Path) -> None:
    b = build("mlp")
    code = """
import sys, test_fakes
trt = test_fakes.Trt()
engine = trt.engine(trt.runtime(), open(sys.argv[1], "rb").read())
print(engine is not None, trt.errors())
"""
    path = tmp_path / "m.engine"
    path.write_bytes(built(b))
    assert "expecting compute 8.6 got compute 9.0" in fakes.run_python(code, str(path), env={"FAKE_CUDA_SM": 86}).stdout
    b.set("setHardwareCompatibilityLevel", c_int32(1))
    path.write_bytes(built(b))
    assert fakes.run_python(code, str(path), env={"FAKE_CUDA_SM": 86}).stdout.startswith("True")
    assert fakes.run_python(code, str(path), env={"FAKE_CUDA_SM": 75}).stdout.startswith("False")


def test_weight_streaming(build: Callable[..., Build]) -> None:
    b = build("mlp")
    session = Session(built(b))
    budget = ("VCudaEngine", "setWeightStreamingBudgetV2", c_bool)
    assert not session.trt.call(session.engine, *budget, c_int64(0))
    assert "kWEIGHT_STREAMING during build time" in session.trt.errors()[-1]
    session.close()
    b.flag(21)
    assert b.build() is None
    assert "kWEIGHT_STREAMING is only supported for kSTRONGLY_TYPED networks." in b.errors()[-1]
    strong = build("mlp", strong=True)
    session = Session(built(strong, 21))
    assert session.trt.call(session.engine, "VCudaEngine", "getStreamableWeightsSize", c_int64) == 4096
    assert not session.trt.call(session.engine, *budget, c_int64(0))
    assert "while there are active IExecutionContexts" in session.trt.errors()[-1]
    session.trt.destroy(session.context)
    assert not session.trt.call(session.engine, *budget, c_int64(5000))
    assert session.trt.call(session.engine, *budget, c_int64(1000))
    assert session.trt.call(session.engine, "VCudaEngine", "getWeightStreamingBudgetV2", c_int64) == 1000
    context = session.trt.context(session.engine)
    assert context
    session.context = context
    session.close()


def test_engine_says_that_it_is_stripped(tmp_path: Path) -> None:
    code = """
import fakes, sys, test_fakes_builder as t
b = t.Build()
assert b.parse(fakes.onnx_model(sys.argv[1], "mlp"))
session = t.Session(t.built(b, 19))
assert session.trt.call(session.engine, "VCudaEngine", "getEngineStat", t.c_int64, t.c_int32(1)) == (64 * 10 + 10) * 4
assert session.trt.call(session.engine, "VCudaEngine", "isRefittable", t.c_bool)
t.refit(session, sys.argv[1])
assert session.trt.call(session.engine, "VCudaEngine", "getEngineStat", t.c_int64, t.c_int32(1)) == 0
session.close()
"""
    fakes.run_python(code, str(tmp_path / "m.onnx"), version="10.14.1.48")


# Faults on demand -----------------------------------------------------------------------------------------------------

FAULT = """
import fakes, json, os, sys, test_fakes_builder as t
b = t.Build()
ok = b.parse(fakes.onnx_model(sys.argv[1], "mlp", build=json.loads(sys.argv[2])))
print("parsed", ok, flush=True)
b.add_profile(x=t.RANGE)
b.set("setBuilderOptimizationLevel", t.c_int32(int(sys.argv[3])))
plan = b.build()
print("built", plan is not None, json.dumps(b.lines), flush=True)
if plan:
    print("ran", float(abs(t.run(plan, t.batch(), (8, 10)) - fakes.mlp_reference(t.batch())).max()), flush=True)
"""


def fault(tmp_path: Path, build: dict[str, Any], level: int = 3, **more: Any) -> tuple[int, str]:
    done = fakes.run_python(FAULT, str(tmp_path / "m.onnx"), json.dumps(build), str(level), check=False, **more)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("outcome", "status"),
    [("crash", -signal.SIGSEGV), ("abort", -signal.SIGABRT), ("kill", -signal.SIGKILL), ("exit", 3)],
)
def test_builds_that_end_the_process(tmp_path: Path, outcome: str, status: int) -> None:
    got, out = fault(tmp_path, {"outcome": outcome, "log": [[2, "a last line"]]})
    assert (got, out.split()) == (status, ["parsed", "True"])
    assert fault(tmp_path, {"parse": {"outcome": outcome}}) == (status, "")


def test_build_that_gives_nothing_or_hangs(tmp_path: Path) -> None:
    status, out = fault(tmp_path, {"outcome": "null", "log": [[1, "it was not to be"]]})
    assert status == 0
    assert "built False" in out
    assert "it was not to be" in out
    with pytest.raises(subprocess.TimeoutExpired):
        fault(tmp_path, {"outcome": "hang"}, timeout=3)


def test_levels_and_the_environment(tmp_path: Path) -> None:
    build = {
        "log": [[2, "every level"]],
        "levels": {"3": {"fail": "enqueue"}, "4": {"differ": 0.5}, "5": {"run": "crash"}, "2": {"outcome": "null"}},
    }
    assert float(fault(tmp_path, build, 1)[1].split()[-1]) < 0.01
    assert "built False" in fault(tmp_path, build, 2)[1]
    assert "ran" not in fault(tmp_path, build, 3)[1]
    assert float(fault(tmp_path, build, 4)[1].split()[-1]) > 1
    status, out = fault(tmp_path, build, 5)
    assert (status, "built True" in out) == (-signal.SIGSEGV, True)
    env = {"FAKE_TRT_BUILD": json.dumps({"levels": {}, "log": [[2, "of the environment"]]})}
    status, out = fault(tmp_path, build, 5, env=env)
    assert status == 0
    assert "of the environment" in out
    assert "every level" not in out


def test_time_and_memory(tmp_path: Path) -> None:
    code = """
import fakes, sys, time, test_fakes_builder as t
b = t.Build()
b.parse(fakes.onnx_model(sys.argv[1], "mlp", build={"seconds": 0.5, "silent": True, "memory": 300 << 20, "ms": 20}))
events = t.monitor(b)
b.add_profile(x=t.RANGE)
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before, start = peak(), time.monotonic()
plan = b.build()
assert time.monotonic() - start > 0.5
assert peak() - before > 250 << 10
start = time.monotonic()
t.run(plan, t.batch(), (8, 10))
assert time.monotonic() - start > 0.02
"""
    fakes.run_python(code, str(tmp_path / "m.onnx"))


def test_faults_of_every_third_run(build: Callable[..., Build]) -> None:
    session = Session(built(build("mlp", build={"differ": True, "every": 3, "run_log": [[2, "unstable"]]})))
    x, target = batch(), session.device(320)
    assert session.trt.bind(session.context, "x", session.upload(x), (8, 64))
    assert session.trt.bind(session.context, "y", target)
    right = []
    for _ in range(6):
        assert session.trt.enqueue(session.context, session.stream)
        session.cuda.ok("cuStreamSynchronize", session.stream)
        right.append(
            bool(np.allclose(session.download(target, (8, 10), np.float32), fakes.mlp_reference(x), atol=0.01))
        )
    assert right == [True, True, False] * 2
    assert sum(text == "unstable" for _, text in session.trt.lines) == 2
    session.close()


def test_workspace_that_is_too_small(build: Callable[..., Build]) -> None:
    b = build("mlp", build={"needs_workspace": 64 << 20})
    assert built(b)
    b.set("setMemoryPoolLimit", c_int32(WORKSPACE), c_uint64(32 << 20))
    assert b.build() is None
    assert "Could not find any implementation for node /product." in b.errors()[-1]
    assert any("Tactic Device request: 64MB Available: 32MB." in text for _, text in b.lines)


def test_models_without_a_program(build: Callable[..., Build]) -> None:
    b = build("mlp", nodes=[fakes.node("Gather", ["x", "b"], ["y"])])
    b.add_profile(x=RANGE)
    assert b.build() is None
    assert "fake: no program for this model: the stand-in does not compute Gather (/y)" in b.errors()[-1]


# Objects --------------------------------------------------------------------------------------------------------------

ORDER = """
import fakes, sys, test_fakes_builder as t
b = t.Build()
b.parse(fakes.onnx_model(sys.argv[1], "mlp"))
b.add_profile(x=t.RANGE)
b.direct(b.parser, "IParser", "~dtor_deleting", None)
assert b.build()
b.destroy(b.builder)
b.destroy(b.layers()[0])
b.direct(b.parser, "IParser", "~dtor_deleting", None)
print(*b.fake.errors(), sep="\\n", flush=True)
b.destroy(b.network)
b.call(b.network, "VNetworkDefinition", "getNbLayers", None)
"""


def test_objects_destroyed_too_early_or_by_the_wrong_hand(tmp_path: Path) -> None:
    done = fakes.run_python(ORDER, str(tmp_path / "m.onnx"), check=False)
    assert done.stdout.splitlines() == [
        "a network was built after its parser, which owns the weights, had been destroyed",
        "a builder was destroyed before 2 of its networks and configurations",
        "the caller destroyed an ILayer, which belongs to the object that made it",
        "an object was destroyed twice",
    ]
    assert done.returncode == -signal.SIGABRT
    assert "a destroyed object" in done.stderr


WALK = """
import fakes, sys, test_fakes_builder as t
b = t.Build()
assert b.parse(fakes.onnx_model(sys.argv[1], "mlp")), b.errors()
assert b.parse_errors() == []
assert len(b.layers()) == 2
b.set("setBuilderOptimizationLevel", t.c_int32(2))
assert b.get("getBuilderOptimizationLevel") == 2
b.set("setProfilingVerbosity", t.c_int32(2))
if b.version < (11, 0):
    b.flag(t.FP16)
b.add_profile(x=t.RANGE)
cache = t.timing_cache(b, b"")
assert b.set("setTimingCache", cache, False, result=t.c_bool)
events = t.monitor(b)
plan = b.build()
assert plan, b.errors()
assert events
assert t.error_of(plan, t.batch()) < 0.01
assert t.inspect(plan)["Layers"][0]["Name"]
b.close()
print(fakes.plan_content(plan)["built"]["flags"])
"""


@pytest.mark.parametrize("version", ["10.0.0.6", "10.3.0.26", "10.8.0.43", "10.16.0.1", "11.0.0.114", "11.1.0.2"])
def test_a_build_by_the_slots_of_each_version(version: str, tmp_path: Path) -> None:
    out = fakes.run_python(WALK, str(tmp_path / "m.onnx"), version=version).stdout
    assert out.strip() == ("['TF32']" if version.startswith("11") else "['FP16', 'TF32']")


def test_walk_over_calls_of_the_builder(tmp_path: Path) -> None:
    """Every failing call is seen by its caller and logged, and nothing is left over."""
    path = fakes.onnx_model(tmp_path / "m.onnx")

    def attempt(fail_at: int) -> tuple[bool, int, str]:
        b = Build(opened=False)
        b.fake.fail_at(fail_at)
        try:
            b.open()
            assert b.parse(path)
            assert b.set("setTimingCache", timing_cache(b, b""), False, result=c_bool)
            b.set("setBuilderOptimizationLevel", c_int32(2))
            assert b.get("getBuilderOptimizationLevel") == 2
            b.add_profile(x=RANGE)
            assert b.build()
            passed = True
        except (AssertionError, TypeError):
            passed = False
        seen = b.fake.last_failed()
        assert passed or b.errors(), seen
        calls = b.fake.calls()
        b.fake.fail_at(0)
        b.close()
        return passed, calls, seen

    passed, calls, _ = attempt(0)
    assert passed
    assert calls > 10
    for i in range(1, calls + 1):
        passed, _, seen = attempt(i)
        assert seen
        assert not passed, seen
