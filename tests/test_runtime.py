"""`InferenceRuntime`, its records, `load`, and the runtime "onnx_cpu"."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import fakes
import jetrt
from jetrt import errors
from jetrt.runtimes import tensorrt as tensorrt_module
from jetrt.runtimes.onnx_cpu import OnnxModel

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.full((2, 3), 10, dtype=np.float32)


@pytest.fixture
def model(add):
    with OnnxModel(add) as model:
        yield model


# ----------------------------------------------------------------------------------------------------- interface


def test_six_methods(add):
    runtime = jetrt.get_runtime("onnx_cpu")
    assert isinstance(runtime, jetrt.InferenceRuntime)
    assert runtime.current_runtime_label() == "onnx_cpu"

    entry = runtime.compile_engine(add, jetrt.BuildConfig(optimization_profiles=[("a", [1, 3], [2, 3], [8, 3])]))
    assert entry.path == add
    assert entry.sha256 == hashlib.sha256(add.read_bytes()).hexdigest()
    assert entry.size_bytes == add.stat().st_size
    assert entry.runtime == "onnx_cpu"
    assert entry.versions["jetrt"] == jetrt.__version__
    assert set(entry.versions) == {"onnxruntime", "jetrt"}

    handle = runtime.deserialize_engine(entry)
    assert handle.entry is entry
    np.testing.assert_array_equal(runtime.infer(handle, {"a": A, "b": B})["sum"], A + B)

    assert isinstance(runtime.thermal_state(), jetrt.ThermalState)

    runtime.release_engine(handle)
    runtime.release_engine(handle)  # a second time does nothing
    with pytest.raises(errors.ClosedEngineError):
        runtime.infer(handle, {"a": A, "b": B})


def test_abstract():
    with pytest.raises(TypeError, match="abstract"):
        jetrt.InferenceRuntime()
    assert jetrt.InferenceRuntime.__abstractmethods__ == {
        "compile_engine",
        "deserialize_engine",
        "infer",
        "release_engine",
        "thermal_state",
        "current_runtime_label",
    }


def test_records_are_frozen_and_have_the_fields():
    def fields(cls):
        return [field.name for field in dataclasses.fields(cls)]

    assert fields(jetrt.BuildConfig) == ["precision", "workspace_mb", "calibration_dataset", "optimization_profiles"]
    assert fields(jetrt.ThermalState) == [
        "cpu_temp_c",
        "gpu_temp_c",
        "thermal_throttle_active",
        "measured_clock_mhz",
        "measured_at",
    ]
    state = jetrt.ThermalState(51.5, None, False, 1300, 12345)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.gpu_temp_c = 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp12"}, "precision is 'fp12'; allowed: fp32, fp16, bf16, int8, fp8, mixed"),
        ({"workspace_mb": 0}, "workspace_mb is 0"),
        ({"optimization_profiles": [("x", (1, 3), (2, 3), (4,))]}, "profile of 'x': .* differ in rank"),
        ({"optimization_profiles": [("x", (4,), (2,), (8,))]}, r"profile of 'x': min \(4,\) <= opt \(2,\)"),
    ],
)
def test_build_config_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        jetrt.BuildConfig(**arguments)


def test_entry_of_a_file_that_changed(add, tmp_path, onnx_models):
    runtime = jetrt.get_runtime("onnx_cpu")
    entry = runtime.compile_engine(add)
    onnx_models.identity(add)
    with pytest.raises(errors.EngineDeserializeError, match=r"add\.onnx changed since its entry was made") as caught:
        runtime.deserialize_engine(entry)
    assert caught.value.path == str(add)
    add.unlink()
    with pytest.raises(FileNotFoundError, match=r"add\.onnx"):
        runtime.deserialize_engine(entry)


def test_entry_and_handle_of_another_runtime(add):
    runtime = jetrt.get_runtime("onnx_cpu")
    entry = dataclasses.replace(runtime.compile_engine(add), runtime="tensorrt")
    with pytest.raises(errors.EngineDeserializeError, match="made by the runtime 'tensorrt' and this is 'onnx_cpu'"):
        runtime.deserialize_engine(entry)
    handle = jetrt.EngineHandle(entry, OnnxModel(add))
    with pytest.raises(errors.InferenceError, match="belongs to the runtime 'tensorrt'"):
        runtime.infer(handle, {"a": A, "b": B})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (jetrt.BuildConfig(precision="fp16"), "precision 'fp16' was asked for, and onnx_cpu runs a model in the types"),
        (jetrt.BuildConfig(calibration_dataset="data.npz"), "calibration was asked for"),
        (
            jetrt.BuildConfig(optimization_profiles=[("c", (1,), (1,), (1,))]),
            "names input 'c' of rank 1; the model has",
        ),
        (
            jetrt.BuildConfig(optimization_profiles=[("a", (1,), (1,), (1,))]),
            "names input 'a' of rank 1; the model has",
        ),
    ],
)
def test_onnx_cpu_refuses_what_it_cannot_build(add, config, message):
    with pytest.raises(errors.EngineBuildError, match=message) as caught:
        jetrt.get_runtime("onnx_cpu").compile_engine(add, config)
    assert caught.value.path == str(add)


def test_onnx_cpu_opens_nothing_in_another_precision_than_was_configured(add):
    configured = jetrt.from_config({"name": "onnx_cpu", "precision": "fp16"})
    for use in (configured.open, configured.compile_engine):
        with pytest.raises(errors.EngineBuildError, match="precision 'fp16' was asked for"):
            use(add)


def test_compile_of_a_broken_file(tmp_path, onnx_models):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x07 not a model")
    with pytest.raises(errors.EngineBuildError, match=r"broken\.onnx was refused by onnxruntime"):
        jetrt.get_runtime("onnx_cpu").compile_engine(broken)


# ------------------------------------------------------------------------------------------------ chosen by name


def test_unknown_runtime_names_what_there_is():
    with pytest.raises(
        errors.RuntimeNotAvailableError,
        match="no runtime 'cuda'; jetrt knows 'tensorrt', 'onnx_trt_ep', 'pytorch_fp16', 'torch_tensorrt', 'onnx_cpu'",
    ) as caught:
        jetrt.get_runtime("cuda")
    assert caught.value.runtime == "cuda"
    assert caught.value.available == jetrt.available_runtimes() != []


@pytest.fixture
def no_tensorrt(monkeypatch):
    def library_info():
        raise errors.LibraryNotFoundError("libnvinfer.so was not found in 5 places", library="libnvinfer.so")

    monkeypatch.setattr(tensorrt_module._core, "library_info", library_info)


def test_a_missing_library_is_named_and_nothing_falls_back(no_tensorrt, no_torch, tmp_path, onnx_models):
    plan = tmp_path / "a.engine"
    plan.write_bytes(b"ftrt")
    for attempt in (lambda: jetrt.get_runtime("tensorrt"), lambda: jetrt.load(plan)):
        with pytest.raises(errors.RuntimeNotAvailableError) as caught:
            attempt()
        assert "'tensorrt' cannot be had here. Missing: libnvinfer.so was not found in 5 places" in str(caught.value)
        assert "Available: 'onnx_cpu'" in str(caught.value)
        assert caught.value.missing == ["libnvinfer.so was not found in 5 places"]
        assert caught.value.available == ["onnx_cpu"]
    assert jetrt.available_runtimes() == ["onnx_cpu"]


@pytest.fixture
def no_torch(monkeypatch):
    for package in ("torch", "torch_tensorrt", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.setenv("BUILD_ONNX_TRT_EP_RUNTIME", "OFF")  # an onnxruntime may have the provider


def test_a_missing_package_is_named(no_tensorrt, no_torch, monkeypatch, add):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(errors.RuntimeNotAvailableError, match=r"pip install 'jetrt\[cpu\]'") as caught:
        jetrt.load(add, runtime="onnx_cpu")
    assert caught.value.runtime == "onnx_cpu"
    assert caught.value.available == []
    assert "Available: none" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- load


def test_load_an_onnx_file(add):
    with jetrt.load(add, runtime="onnx_cpu", threads=1) as model:
        np.testing.assert_array_equal(model(a=A, b=B)["sum"], A + B)


def test_load_an_onnx_file_needs_the_runtime_named(add):
    with pytest.raises(errors.PlanError, match=r"is an ONNX file and no runtime was named\. .*runtime=\"onnx_cpu\""):
        jetrt.load(add)


@pytest.mark.parametrize(
    ("name", "what"), [("m.pt2", "a torch.export program"), ("m.pt", "a torch file"), ("m.ts", "a TorchScript file")]
)
def test_load_a_torch_file_needs_the_runtime_named(tmp_path, name, what):
    with pytest.raises(errors.PlanError, match=rf'is {what} and no runtime was named\. .*runtime="pytorch_fp16"'):
        jetrt.load(tmp_path / name)


def test_load_an_object_needs_the_runtime_named():
    with pytest.raises(errors.PlanError, match=r'object is an object and no runtime .*runtime="pytorch_fp16"'):
        jetrt.load(object())


def test_load_an_onnx_file_on_tensorrt_gives_the_command_that_builds(add):
    with pytest.raises(errors.EngineBuildError, match="loading builds nothing") as caught:
        jetrt.load(add, runtime="tensorrt")
    assert f"`jetrt build --onnx {add} --engine {add.with_suffix('.engine')}`" in str(caught.value)


def test_load_a_plan_on_the_cpu(tmp_path, onnx_models):
    plan = tmp_path / "a.engine"
    plan.write_bytes(b"ftrt" + bytes(60))
    with pytest.raises(errors.EngineDeserializeError, match=r"is a TensorRT plan; onnx_cpu runs ONNX files"):
        jetrt.load(plan, runtime="onnx_cpu")


def test_unknown_option(add):
    with pytest.raises(TypeError, match="graphs"):
        jetrt.load(add, runtime="onnx_cpu", graphs="auto")
    with pytest.raises(ValueError, match="on_strided is 'maybe'; allowed: 'error' or 'copy'"):
        jetrt.load(add, runtime="onnx_cpu", on_strided="maybe")


def test_load_what_is_not_a_file(tmp_path, onnx_models):
    for load in (lambda path: jetrt.load(path, runtime="onnx_cpu"), jetrt.Engine):
        with pytest.raises(FileNotFoundError, match=r"absent\.model") as caught:
            load(tmp_path / "absent.model")
        assert caught.value.filename == str(tmp_path / "absent.model")
    with pytest.raises(IsADirectoryError):
        jetrt.load(tmp_path, runtime="onnx_cpu")


# ------------------------------------------------------------------------------------------------------ tensorrt

X = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)


@pytest.fixture
def plan(tmp_path):
    return fakes.write_plan(tmp_path / "mlp.engine", "mlp")


def test_six_methods_on_tensorrt(plan):
    runtime = jetrt.get_runtime("tensorrt", max_contexts=2)
    assert runtime.current_runtime_label() == "tensorrt"
    entry = runtime.compile_engine(plan)
    assert (entry.runtime, entry.size_bytes, entry.build_config) == ("tensorrt", plan.stat().st_size, None)
    assert entry.sha256 == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert entry.versions == {"tensorrt": fakes.VERSION, "jetrt": jetrt.__version__}

    handle = runtime.deserialize_engine(entry)
    assert isinstance(handle.model, jetrt.Engine)
    outputs = runtime.infer(handle, {"x": X})
    np.testing.assert_allclose(outputs["y"], fakes.mlp_reference(X), rtol=1e-5, atol=1e-6)
    runtime.release_engine(handle)
    with pytest.raises(errors.ClosedEngineError):
        runtime.infer(handle, {"x": X})


def test_a_build_configuration_does_not_change_a_plan(plan, caplog):
    entry = jetrt.get_runtime("tensorrt").compile_engine(plan, jetrt.BuildConfig(precision="fp16"))
    assert entry.build_config is None
    (record,) = [record for record in caplog.records if record.name == "jetrt.runtime"]
    assert record.levelname == "WARNING"
    assert "was built elsewhere: the build configuration is not applied" in record.getMessage()


def test_compile_an_onnx_file(tmp_path):
    model = fakes.onnx_model(tmp_path / "mlp.onnx")
    runtime = jetrt.get_runtime("tensorrt")
    config = jetrt.BuildConfig(
        precision="fp16", workspace_mb=64, optimization_profiles=[("x", (1, 64), (8, 64), (64, 64))]
    )
    entry = runtime.compile_engine(model, config)
    assert entry.path.name == "mlp__sm90_jpnone_trt10.6.0.26_fp16.engine"
    assert entry.build_config == config
    assert entry.versions == {"tensorrt": fakes.VERSION, "jetrt": jetrt.__version__}
    built = fakes.plan_content(entry.path)["built"]
    assert "FP16" in str(built)
    outputs = runtime.infer(runtime.deserialize_engine(entry), {"x": X})
    np.testing.assert_allclose(outputs["y"], fakes.mlp_reference(X), rtol=1e-2, atol=1e-2)

    before = entry.path.stat().st_mtime_ns
    assert runtime.compile_engine(model, config) == entry  # the same one is not built again
    assert entry.path.stat().st_mtime_ns == before
    with pytest.raises(errors.BuildOptionError, match="--max"):
        runtime.compile_engine(model)  # a dynamic dimension without a profile


def test_compile_what_is_not_a_plan(tmp_path):
    (tmp_path / "noise.engine").write_bytes(b"noise" * 20)
    with pytest.raises(errors.EngineBuildError, match=r"noise\.engine") as caught:
        jetrt.get_runtime("tensorrt").compile_engine(tmp_path / "noise.engine")
    assert isinstance(caught.value.__cause__, errors.PlanError)
    with pytest.raises(errors.PlanError, match=r"noise\.engine"):
        jetrt.load(tmp_path / "noise.engine")


def test_load_a_plan(plan):
    for runtime in (None, "tensorrt"):
        with jetrt.load(plan, runtime, max_contexts=2) as engine:
            assert isinstance(engine, jetrt.Engine)
            np.testing.assert_allclose(engine(X)["y"], fakes.mlp_reference(X), rtol=1e-5, atol=1e-6)
    assert jetrt.available_runtimes()[0] == "tensorrt"


def test_both_runtimes_answer_and_refuse_alike(tmp_path, onnx_models):
    """The same call, the same error classes: what `load` returns can be exchanged."""
    engine = jetrt.load(fakes.write_plan(tmp_path / "add.engine", "add"))
    f32 = onnx_models.F32
    path = onnx_models.save(
        tmp_path / "add.onnx",
        [("Add", ["a", "b"], ["y"], {})],
        [("a", f32, ["N", 8]), ("b", f32, ["N", 8])],
        [("y", f32, ["N", 8])],
    )
    model = jetrt.load(path, runtime="onnx_cpu")
    a, b = np.arange(32, dtype=np.float32).reshape(4, 8), np.ones((4, 8), np.float32)
    for name in ("inputs", "outputs"):
        for key, info in getattr(engine, name).items():
            twin = getattr(model, name)[key]
            assert (info.name, info.dtype, info.shape, info.mode) == (twin.name, twin.dtype, twin.shape, twin.mode)
    for good in (
        lambda m: m(a, b),
        lambda m: m(b=b, a=a),
        lambda m: m.run([a, b]),
        lambda m: m(a, b, synchronize=True),
    ):
        np.testing.assert_array_equal(good(engine)["y"], good(model)["y"])
    for bad in (
        lambda m: m(a),
        lambda m: m(a, b, c=b),
        lambda m: m(a, b, b),
        lambda m: m(a, b, a=a),
        lambda m: m(a, b[:, :7].copy()),
        lambda m: m(a, b[0]),
        lambda m: m(a, b.astype(np.float64)),
        lambda m: m(a, b.astype(">f4")),
        lambda m: m(a, np.asfortranarray(b)),
        lambda m: m(a, [1.0]),
        lambda m: m(a, None),
        lambda m: m(a, np.ma.masked_array(b, b > 3)),
        lambda m: m(a, b, out={"y": b.astype(np.float64)}),
        lambda m: m(a, b, out={"y": np.asfortranarray(b)}),
    ):
        with pytest.raises(errors.InputError) as one:
            bad(engine)
        with pytest.raises(errors.InputError) as other:
            bad(model)
        assert type(one.value) is type(other.value), (one.value, other.value)
        assert one.value.tensor == other.value.tensor


# ----------------------------------------------------------------------------------------------- onnx_cpu: calls


def test_description(model, add):
    assert list(model.inputs) == ["a", "b"]
    info = model.inputs["a"]
    assert (info.name, info.dtype, info.shape, info.mode, info.location) == ("a", "float32", (-1, 3), "input", "host")
    assert info.profiles == info.profile == []
    assert model.outputs["twice"].mode == "output"
    assert (model.name, model.path, model.closed) == ("add", str(add), False)
    assert model.load_report["bytes"] == add.stat().st_size
    assert repr(model) == (
        "<OnnxModel add: a float32[-1, 3], b float32[-1, 3] -> sum float32[-1, 3], twice float32[-1, 3]>"
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(A, B),
        lambda m: m(A, b=B),
        lambda m: m(a=A, b=B),
        lambda m: m.run({"b": B, "a": A}),
        lambda m: m.run([A, B]),
        lambda m: m(A, B, synchronize=True, timeout=1.0),
    ],
)
def test_call_shapes(model, call):
    outputs = call(model)
    assert list(outputs) == ["sum", "twice"]
    np.testing.assert_array_equal(outputs["sum"], A + B)
    np.testing.assert_array_equal(outputs["twice"], A + A)
    assert type(outputs["sum"]) is np.ndarray


def test_data_dependent_shape(tmp_path, onnx_models):
    model = OnnxModel(onnx_models.nonzero(tmp_path / "nonzero.onnx"))
    assert model.outputs["y"].shape == (1, -1)
    np.testing.assert_array_equal(model(np.array([0, 3, 0, 7], np.float32))["y"], [[1, 3]])
    assert model(np.zeros(4, np.float32))["y"].shape == (1, 0)
    assert model(np.zeros(0, np.float32))["y"].shape == (1, 0)


def test_results_are_the_callers_own(tmp_path, onnx_models):
    model = OnnxModel(onnx_models.identity(tmp_path / "identity.onnx"))
    x = np.array([1, 2, 3], np.float32)
    first = model(x)["y"]
    second = model(x * 2)["y"]
    assert not np.shares_memory(first, x)
    np.testing.assert_array_equal(first, [1, 2, 3])
    model.close()
    gc.collect()
    np.testing.assert_array_equal(second, [2, 4, 6])


def test_out(model):
    targets = {"twice": np.empty((2, 3), np.float32), "sum": np.empty((2, 3), np.float32)}
    outputs = model(A, B, out=targets)
    assert list(outputs) == ["sum", "twice"]
    assert outputs["sum"] is targets["sum"]
    assert outputs["twice"] is targets["twice"]
    np.testing.assert_array_equal(targets["sum"], A + B)
    np.testing.assert_array_equal(targets["twice"], A + A)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (np.empty((2, 4), np.float32), errors.ShapeError, "found [2, 4]; allowed: [any, 3]."),
        (np.empty((2, 3), np.float64), errors.DTypeError, "found float64; allowed: float32."),
        (np.empty((3, 2), np.float32).T, errors.LayoutError, "found strides (4, 8) (bytes) for shape [2, 3]; allowed:"),
        (np.broadcast_to(np.float32(0), (2, 3)), errors.LayoutError, "found strides (0, 0) (bytes)"),
        (np.frombuffer(bytes(24), np.float32).reshape(2, 3), errors.LayoutError, "found read-only memory; allowed:"),
    ],
)
def test_out_that_does_not_fit(model, target, error, message):
    with pytest.raises(error, match="^output 'sum': " + re.escape(message)) as caught:
        model(A, B, out={"sum": target, "twice": np.empty((2, 3), np.float32)})
    assert caught.value.tensor == "sum"


def test_out_of_the_wrong_size_is_never_written(model):
    target = np.zeros((5, 3), np.float32)  # fits the description [-1,3], not this call
    with pytest.raises(errors.InferenceError, match="add: onnxruntime failed") as caught:
        model(A, B, out={"sum": target, "twice": np.empty((2, 3), np.float32)})
    assert caught.value.bound == ["a float32[2, 3]", "b float32[2, 3]"]
    assert not target.any()


def test_out_by_other_names(model):
    target = np.empty((2, 3), np.float32)
    with pytest.raises(errors.InputNameError, match="'product': found no output of that name in out=; allowed: sum"):
        model(A, B, out={"sum": target, "twice": target, "product": target})
    with pytest.raises(errors.InputNameError, match="output 'twice': found nothing in out=; allowed: a tensor"):
        model(A, B, out={"sum": target})


def test_policies_are_counted(add):
    model = OnnxModel(add, on_strided="copy", on_dtype="cast")
    wide = np.asfortranarray(A)
    np.testing.assert_array_equal(model(wide, B.astype(np.float64))["sum"], A + B)
    np.testing.assert_array_equal(model(A, B)["sum"], A + B)
    assert model.stats == {"calls": 2, "strided_copies": 1, "casts": 1}


def test_threads(model):
    failures = []

    def work(seed):
        for i in range(50):
            a = np.full((2, 3), seed * 1000 + i, np.float32)
            if not np.array_equal(model(a, B)["sum"], a + B):
                failures.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_model_that_fails_while_running(model):
    with pytest.raises(errors.InferenceError, match=r"(?s)add: onnxruntime failed: .*Bound: a float32") as caught:
        model(A, np.zeros((5, 3), np.float32))
    assert caught.value.bound == ["a float32[2, 3]", "b float32[5, 3]"]
    assert caught.value.log
    np.testing.assert_array_equal(model(A, B)["sum"], A + B)  # and the next call works


# ------------------------------------------------------------------------------------------- onnx_cpu: bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m(a=A),
            errors.InputNameError,
            "input 'b': found nothing (the input is missing); allowed: float32[-1, 3]. Pass all of: a, b.",
        ),
        (lambda m: m(a=A, b=B, c=B), errors.InputNameError, "input 'c': found no input of that name; allowed: a, b."),
        (lambda m: m(A, B, B), errors.InputNameError, "input '#2': found 3 positional inputs; allowed: 2: a, b."),
        (lambda m: m(A, B, a=A), errors.InputNameError, "input 'a': found the input twice (by position and by name);"),
        (lambda m: m(A[0], B), errors.ShapeError, "input 'a': found [3]; allowed: [any, 3]. Change the shape"),
        (lambda m: m(A.T.copy(), B), errors.ShapeError, "input 'a': found [3, 2]; allowed: [any, 3]. Change the shape"),
        (lambda m: m(A.astype("f8"), B), errors.DTypeError, "input 'a': found float64; allowed: float32. Convert it"),
        (lambda m: m(A.astype(">f4"), B), errors.DTypeError, "input 'a': found >f4, in the other byte order;"),
        (
            lambda m: m(A, np.asfortranarray(B)),
            errors.LayoutError,
            "input 'b': found strides (4, 8) (bytes) for shape [2, 3]; allowed: contiguous memory. Make it contiguous",
        ),
        (lambda m: m(A, [[1, 2, 3]]), errors.DTypeError, "input 'b': found an object of type list; allowed: an array"),
        (lambda m: m(A, None), errors.DTypeError, "input 'b': found None; allowed: an array of numpy, torch or JAX"),
        (lambda m: m(np.ma.masked_array(A, A > 3), B), errors.LayoutError, "input 'a': found a masked array;"),
        (lambda m: m(A, B, stream=7), errors.InferenceError, "add: onnx_cpu has no streams, so it cannot wait for"),
    ],
)
def test_bad_input(model, call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)) as caught:
        call(model)
    assert caught.value.engine == "add"
    assert model.stats["calls"] == 0
    assert isinstance(caught.value, errors.InferenceError)


def test_fields_of_an_input_error(model):
    with pytest.raises(ValueError, match="found") as caught:
        model(np.zeros((2, 4), np.float32), B)
    assert (caught.value.tensor, caught.value.found, caught.value.allowed) == ("a", "[2, 4]", "[any, 3]")
    with pytest.raises(TypeError) as caught:
        model(A, B.astype(np.int32))
    assert (caught.value.tensor, caught.value.found, caught.value.allowed) == ("b", "int32", "float32")


def test_a_stranger_with_dlpack_or_on_a_device(model):
    class OnCpu:
        def __dlpack__(self, **_):
            return A.__dlpack__()

        def __dlpack_device__(self):
            return (1, 0)

    class OnGpu(OnCpu):
        def __dlpack_device__(self):
            return (2, 1)

    class Cai:
        __cuda_array_interface__ = {"shape": (2, 3)}  # noqa: RUF012

    np.testing.assert_array_equal(model(OnCpu(), B)["sum"], A + B)
    with pytest.raises(errors.DeviceError, match="'a': found device 1 of DLPack type 2; allowed: cpu"):
        model(OnGpu(), B)
    with pytest.raises(errors.DeviceError, match="'b': found a CUDA array; allowed: cpu"):
        model(A, Cai())


def test_closed(model):
    model.close()
    model.close()
    assert model.closed
    assert "closed" in repr(model)
    with pytest.raises(errors.ClosedEngineError, match="add: the model is closed"):
        model(A, B)


def test_a_type_that_is_not_a_tensor(tmp_path, onnx_models):
    string = onnx_models.onnx.TensorProto.STRING
    path = onnx_models.save(
        tmp_path / "text.onnx", [("Identity", ["x"], ["y"], {})], [("x", string, [1])], [("y", string, [1])]
    )
    with pytest.raises(errors.EngineDeserializeError, match=r"input 'x' is a tensor\(string\); onnx_cpu handles"):
        OnnxModel(path)


# ------------------------------------------------------------------------------------- onnx_cpu: other libraries


def test_bfloat16_of_numpy(tmp_path, onnx_models):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    model = OnnxModel(onnx_models.bfloat16(tmp_path / "b.onnx"))
    x = np.array([1, -2.5, 3.140625, 0], ml_dtypes.bfloat16)
    outputs = model(x)
    assert outputs["y"].dtype == np.float32
    np.testing.assert_array_equal(outputs["y"], x.astype(np.float32))
    assert outputs["z"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(outputs["z"].view(np.uint16), x.view(np.uint16))
    assert model(x[:0])["z"].shape == (0,)
    with pytest.raises(errors.DTypeError, match="'x': found float32; allowed: bfloat16"):
        model(x.astype(np.float32))
    target = np.zeros(4, ml_dtypes.bfloat16)
    model(x, out={"y": np.zeros(4, np.float32), "z": target})
    np.testing.assert_array_equal(target.view(np.uint16), x.view(np.uint16))


def test_torch(model, tmp_path, onnx_models):
    torch = pytest.importorskip("torch")
    a, b = torch.from_numpy(A), torch.from_numpy(B)
    outputs = model(a, b)
    assert isinstance(outputs["sum"], torch.Tensor)
    assert torch.equal(outputs["sum"], a + b)
    assert isinstance(model(A, b)["sum"], np.ndarray)  # the first input decides

    with pytest.raises(errors.GradError, match=r"'a': found a tensor that requires grad .*torch\.no_grad"):
        model(a.clone().requires_grad_(), b)
    with torch.no_grad():
        assert torch.equal(model(a.clone().requires_grad_(), b)["sum"], a + b)

    half = onnx_models.bfloat16(tmp_path / "b.onnx")
    x = torch.tensor([1, -2.5, 3.140625], dtype=torch.bfloat16)
    outputs = OnnxModel(half)(x)
    assert outputs["z"].dtype == torch.bfloat16
    assert torch.equal(outputs["z"], x)


def test_torch_lazy_negation(add):
    torch = pytest.importorskip("torch")
    z = torch.complex(torch.from_numpy(A), torch.from_numpy(B))
    lazy = z.conj().imag  # the memory holds +10, the tensor says −10
    assert lazy.is_neg()
    with pytest.raises(errors.LayoutError, match="lazily negated"):
        OnnxModel(add)(lazy, torch.from_numpy(B))
    model = OnnxModel(add, on_strided="copy")
    assert torch.equal(model(lazy, torch.from_numpy(B))["sum"], torch.zeros(2, 3))
    assert model.stats["strided_copies"] >= 1


def test_jax(model):
    jax = pytest.importorskip("jax")
    outputs = model(jax.numpy.asarray(A), jax.numpy.asarray(B))
    assert isinstance(outputs["sum"], jax.Array)
    np.testing.assert_array_equal(np.asarray(outputs["sum"]), A + B)


def test_errors_cross_a_process_boundary(model):
    import pickle

    with pytest.raises(errors.ShapeError) as caught:
        model(np.zeros((2, 4), np.float32), B)
    twin = pickle.loads(pickle.dumps(caught.value))
    assert (str(twin), twin.tensor, twin.found) == (str(caught.value), "a", "[2, 4]")


def test_the_source_tree_is_not_what_is_tested():
    # The tests are about the built wheel; a checkout on sys.path would hide a file that the wheel lacks.
    assert Path(jetrt.__file__).parent != Path(__file__).parent.parent / "python" / "jetrt"
