"""The builder, parser, refitter and inspector of the TensorRT stand-in: what jetrt relies on, called by hand through the slots."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from ctypes import byref, c_bool, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fakes
from test_fakes import Dims, Session, Trt, dims

NAN_BITS = 0xCDCDCDCD
FP16, INT8, REFIT, TF32, OBEY, VERSION, LEAN, STRIP, IDENTICAL = 0, 1, 4, 6, 9, 13, 14, 19, 20
WORKSPACE = 0
FLOAT, HALF = 0, 1
RANGE = ([1, 64], [8, 64], [64, 64])


class Build(Trt):
    """A builder with a network, a parser and a configuration."""

    def __init__(self, strong: bool = False) -> None:
        super().__init__()
        self.fake.reset()
        self.cuda.reset()
        self.cuda.ok("cuInit", 0)
        self.cuda.made("cuDevicePrimaryCtxRetain", 0)
        self.cuda.ok("cuCtxSetCurrent", 0xC0DE0000)
        self.live = (self.cuda.all_live(), self.fake.all_live())
        self.onnx = ctypes.CDLL(str(Path(os.environ[fakes.MARK]) / f"libnvonnxparser.so.{self.version[0]}"))
        self.builder = self.factory("createInferBuilder_INTERNAL", self.logger, 0)
        bit = 1 if self.version[0] == 10 else 0
        self.network = self.made(self.builder, "VBuilder", "createNetworkV2", c_uint32(int(strong) << bit))
        self.config = self.made(self.builder, "VBuilder", "createBuilderConfig")
        self.parser = self.factory("createNvOnnxParser_INTERNAL", self.network, self.logger, 100)
        self.others: list[int] = []

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
        kinds = [{bytes: c_char_p, int: c_uint64}.get(type(a), type(a)) for a in arguments]  # type: ignore[arg-type]
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
        for this in self.others:
            self.destroy(this)
        self.direct(self.parser, "IParser", "~dtor_deleting", None)
        for this in (self.config, self.network, self.builder):
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
    for one in made:
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
