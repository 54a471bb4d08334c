"""The runtime "openvino_cpu", where openvino is installed."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest

import jetrt
from jetrt import errors

pytest.importorskip("openvino", reason="the package openvino is not installed")

from jetrt.runtimes.openvino_cpu import OpenvinoModel

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.full((2, 3), 10, dtype=np.float32)


def test_six_methods(add):
    runtime = jetrt.get_runtime("openvino_cpu", threads=1)
    assert runtime.current_runtime_label() == "openvino_cpu"
    entry = runtime.compile_engine(add, jetrt.BuildConfig(optimization_profiles=[("a", (1, 3), (2, 3), (8, 3))]))
    assert set(entry.versions) == {"openvino", "jetrt"}
    handle = runtime.deserialize_engine(entry)
    np.testing.assert_array_equal(runtime.infer(handle, {"a": A, "b": B})["sum"], A + B)
    assert handle.model.load_report["precision"] == "f32"
    runtime.release_engine(handle)
    with pytest.raises(errors.ClosedEngineError):
        runtime.infer(handle, {"a": A, "b": B})
    assert isinstance(runtime.thermal_state(), jetrt.ThermalState)
    assert "openvino_cpu" in jetrt.available_runtimes()


def test_it_agrees_with_onnx_cpu(add, tmp_path, onnx_models):
    f32 = onnx_models.F32
    path = onnx_models.save(
        tmp_path / "mlp.onnx",
        [("MatMul", ["x", "w"], ["h"], {}), ("Softmax", ["h"], ["y"], {})],
        [("x", f32, ["N", 16]), ("w", f32, [16, 8])],
        [("y", f32, ["N", 8])],
    )
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((5, 16), np.float32), rng.standard_normal((16, 8), np.float32)
    one = jetrt.load(path, runtime="openvino_cpu")
    other = jetrt.load(path, runtime="onnx_cpu")
    for name in ("inputs", "outputs"):
        for key, info in getattr(other, name).items():
            twin = getattr(one, name)[key]
            assert (info.name, info.dtype, info.shape, info.mode) == (twin.name, twin.dtype, twin.shape, twin.mode)
    np.testing.assert_allclose(one(x, w)["y"], other(x, w)["y"], rtol=1e-4, atol=1e-6)


def test_results_are_the_callers_own(add):
    model = OpenvinoModel(add)
    first = model(A, B)["sum"]
    model(B, B)
    np.testing.assert_array_equal(first, A + B)


def test_out(add):
    model = OpenvinoModel(add)
    targets = {"sum": np.empty((2, 3), np.float32), "twice": np.empty((2, 3), np.float32)}
    assert model(A, B, out=targets)["twice"] is targets["twice"]
    np.testing.assert_array_equal(targets["twice"], A + A)
    with pytest.raises(errors.InferenceError, match=r"output 'sum' is \(2, 3\), out= has \(5, 3\)"):
        model(A, B, out={**targets, "sum": np.empty((5, 3), np.float32)})


def test_bfloat16(tmp_path, onnx_models):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    model = OpenvinoModel(onnx_models.bfloat16(tmp_path / "b.onnx"))
    x = np.array([1, -2.5, 3.140625, 0], ml_dtypes.bfloat16)
    outputs = model(x)
    np.testing.assert_array_equal(outputs["y"], x.astype(np.float32))
    np.testing.assert_array_equal(outputs["z"].view(np.uint16), x.view(np.uint16))


def test_other_element_types(tmp_path, onnx_models):
    proto = onnx_models.onnx.TensorProto
    for kind, dtype in (
        (proto.INT64, "int64"),
        (proto.BOOL, "bool"),
        (proto.FLOAT16, "float16"),
        (proto.INT32, "int32"),
    ):
        path = onnx_models.save(
            tmp_path / f"{dtype}.onnx", [("Identity", ["x"], ["y"], {})], [("x", kind, ["N"])], [("y", kind, ["N"])]
        )
        model = OpenvinoModel(path)
        assert (model.inputs["x"].dtype, model.inputs["x"].shape) == (dtype, (-1,))
        x = np.array([0, 1, 1], dtype)
        np.testing.assert_array_equal(model(x)["y"], x)
        assert model(x)["y"].dtype == x.dtype


def test_threads(add):
    model = OpenvinoModel(add)
    failures = []

    def work(seed):
        for i in range(50):
            a = np.full((2 + seed % 3, 3), seed * 1000 + i, np.float32)
            if not np.array_equal(model(a, a)["sum"], a + a):
                failures.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert model.stats["calls"] == 8 * 50


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m(A),
            errors.InputNameError,
            "input 'b': found nothing (the input is missing); allowed: float32[-1, 3].",
        ),
        (lambda m: m(A, B[:, :2].copy()), errors.ShapeError, "input 'b': found [2, 2]; allowed: [any, 3]."),
        (lambda m: m(A, B.astype("f8")), errors.DTypeError, "input 'b': found float64; allowed: float32."),
        (lambda m: m(A, B, stream=1), errors.InferenceError, "add: openvino_cpu has no streams"),
        (lambda m: m(A, np.ones((5, 3), np.float32)), errors.InferenceError, "add: OpenVINO failed: "),
    ],
)
def test_bad_input(add, call, error, message):
    model = OpenvinoModel(add)
    with pytest.raises(error, match="^" + re.escape(message)):
        call(model)
    np.testing.assert_array_equal(model(A, B)["sum"], A + B)  # and the next call works


def test_what_it_cannot_take(add, tmp_path):
    (tmp_path / "noise.onnx").write_bytes(b"noise" * 20)
    with pytest.raises(errors.EngineDeserializeError, match=r"noise\.onnx was refused by openvino 20\d\d"):
        OpenvinoModel(tmp_path / "noise.onnx")
    with pytest.raises(errors.EngineBuildError, match=r"noise\.onnx was refused by openvino"):
        jetrt.get_runtime("openvino_cpu").compile_engine(tmp_path / "noise.onnx")
    (tmp_path / "a.engine").write_bytes(b"ftrt" + bytes(60))
    with pytest.raises(errors.EngineDeserializeError, match="is a TensorRT plan; openvino_cpu runs ONNX files"):
        OpenvinoModel(tmp_path / "a.engine")
    with pytest.raises(
        errors.EngineBuildError, match="precision 'int8' was asked for, and openvino_cpu has fp32, fp16"
    ):
        jetrt.get_runtime("openvino_cpu").compile_engine(add, jetrt.BuildConfig("int8"))
    with pytest.raises(errors.EngineBuildError, match="says precision 'fp32' and the runtime's options say 'bf16'"):
        jetrt.get_runtime("openvino_cpu", precision="bf16").compile_engine(add, jetrt.BuildConfig("fp32"))
    with pytest.raises(FileNotFoundError):
        OpenvinoModel(tmp_path / "absent.onnx")
