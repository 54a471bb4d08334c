"""Small ONNX models, written where they are needed."""

from __future__ import annotations

from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed (it does not take numpy 1.21)")
pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed (it does not take numpy 1.21)")

F32, I64, BF16 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BFLOAT16


def save(path: Path, nodes, inputs, outputs) -> Path:
    """inputs and outputs: (name, type, shape); a dimension that is a string is dynamic."""

    def info(tensors):
        return [onnx.helper.make_tensor_value_info(*tensor) for tensor in tensors]

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in nodes],
        "test",
        info(inputs),
        info(outputs),
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def add(path: Path) -> Path:
    """sum = a + b, float32 [N,3]; twice = a + a."""
    return save(
        path,
        [("Add", ["a", "b"], ["sum"], {}), ("Add", ["a", "a"], ["twice"], {})],
        [("a", F32, ["N", 3]), ("b", F32, ["N", 3])],
        [("sum", F32, ["N", 3]), ("twice", F32, ["N", 3])],
    )


def bfloat16(path: Path) -> Path:
    """y = x in float32 and z = x rounded down to bfloat16 again; x bfloat16 [N]."""
    return save(
        path,
        [("Cast", ["x"], ["y"], {"to": F32}), ("Cast", ["y"], ["z"], {"to": BF16})],
        [("x", BF16, ["N"])],
        [("y", F32, ["N"]), ("z", BF16, ["N"])],
    )


def nonzero(path: Path) -> Path:
    """y = indices of what is not zero in x, int64 [1,K]."""
    return save(path, [("NonZero", ["x"], ["y"], {})], [("x", F32, ["N"])], [("y", I64, [1, "K"])])


def identity(path: Path) -> Path:
    return save(path, [("Identity", ["x"], ["y"], {})], [("x", F32, ["N"])], [("y", F32, ["N"])])
