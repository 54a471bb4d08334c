"""The runtime "onnx_trt_ep": the refusal on the onnxruntime that is installed, everything else on a stand-in."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import jetrt
from jetrt import errors
from jetrt.runtimes import _trt_provider
from jetrt.runtimes.onnx_trt_ep import OnnxTrtModel

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.full((2, 3), 10, dtype=np.float32)


@pytest.fixture
def rules(onnx_models):
    import stand_in_onnxruntime

    return stand_in_onnxruntime.Rules()


@pytest.fixture
def ort(rules, tmp_path, monkeypatch):
    """Puts the stand-in in place; to be called once the rules are set."""
    import stand_in_onnxruntime

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def put():
        module = stand_in_onnxruntime.make(rules, tmp_path / f"site{len(rules.sessions)}")
        monkeypatch.setitem(sys.modules, "onnxruntime", module)
        return module

    return put


# ------------------------------------------------------------------------------------- the onnxruntime that is here


def test_the_installed_onnxruntime_is_refused_by_name(onnx_models, add):
    import onnxruntime

    if "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("the installed onnxruntime has the TensorRT provider")
    with pytest.raises(errors.RuntimeNotAvailableError) as caught:
        jetrt.load(add, runtime="onnx_trt_ep")
    (missing,) = caught.value.missing
    assert missing.startswith(
        f"the provider TensorrtExecutionProvider, which onnxruntime {onnxruntime.__version__} was built without"
    )
    assert "libonnxruntime_providers_tensorrt.so" in missing
    assert "pip install onnxruntime-gpu" in missing
    assert "onnx_trt_ep" not in jetrt.available_runtimes()


def test_the_record_of_the_installed_onnxruntime_is_read(add, onnx_models):
    """The stand-in's record is made up; this is the real one, on the CPU."""
    import onnxruntime

    from jetrt.runtimes._placement import count_nodes, refuse_partition

    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime keeps no record of the assignment")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(str(add), options, providers=["CPUExecutionProvider"])
    placement = count_nodes(session, {}, {})
    assert placement.nodes == {"CPUExecutionProvider": 2}
    with pytest.raises(errors.EngineDeserializeError, match=r"2 of 2 nodes do not run on TensorRT: .*\(Add\) on CPU"):
        refuse_partition(add, placement)


def test_the_profile_of_the_installed_onnxruntime_is_read(add, onnx_models, tmp_path):
    import onnxruntime

    from jetrt.runtimes._placement import _profiled
    from jetrt.runtimes._session_model import described

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    (tmp_path / "profile").mkdir()
    options.profile_file_prefix = str(tmp_path / "profile" / "placement")
    session = onnxruntime.InferenceSession(str(add), options, providers=["CPUExecutionProvider"])
    inputs, _ = described(add, "onnx_trt_ep", session)
    placement = _profiled(session, inputs, {"a": (2, 3), "b": (2, 3)})
    assert placement.nodes == {"CPUExecutionProvider": 2}
    assert placement.source == "a profiled call"
    assert not (tmp_path / "profile").exists()


# ------------------------------------------------------------------------------------------- what the machine lacks


def test_a_library_that_is_missing_is_named_with_the_pairing(ort, rules, monkeypatch):
    rules.version = "1.20.1"
    module = ort()
    library = _trt_provider._provider_library()
    library.write_bytes(b"\0libnvinfer.so.10\0libcudnn.so.77\0")
    with pytest.raises(errors.RuntimeNotAvailableError) as caught:
        jetrt.get_runtime("onnx_trt_ep")
    (missing,) = caught.value.missing
    assert missing.startswith("libraries of TensorrtExecutionProvider: libcudnn.so.77 (cannot open shared object file")
    assert f"onnxruntime {module.__version__} is built with TensorRT 10.4" in missing
    assert "LD_LIBRARY_PATH" in missing
    assert "onnx_trt_ep" not in caught.value.available


@pytest.mark.parametrize(
    ("version", "missing"),
    [
        ("1.20.1", None),  # 10.4: what is here is newer, of the same major number
        ("1.24.0", None),  # not in the table: the libraries decide
        (
            "1.22.0",
            "a TensorRT for TensorrtExecutionProvider: onnxruntime 1.22.0 is built with TensorRT 10.9 and "
            "libnvinfer.so.10 here is 10.6; install the onnxruntime for TensorRT 10.6, or TensorRT 10.9",
        ),
        (
            "1.17.3",
            "a TensorRT for TensorrtExecutionProvider: onnxruntime 1.17.3 is built with TensorRT 8.6 and "
            "libnvinfer.so.10 here is 10.6; install the onnxruntime for TensorRT 10.6, or TensorRT 8.6",
        ),
    ],
)
def test_the_pairing_of_versions(ort, rules, version, missing):
    rules.version = version
    ort()
    if missing is None:
        assert jetrt.get_runtime("onnx_trt_ep").current_runtime_label() == "onnx_trt_ep"
        return
    with pytest.raises(errors.RuntimeNotAvailableError) as caught:
        jetrt.get_runtime("onnx_trt_ep")
    assert caught.value.missing == [missing]


def test_libraries_beside_the_libnvinfer_that_jetrt_uses(ort, rules, monkeypatch, tmp_path):
    """pip puts TensorRT's libraries where no loader looks."""
    folder = Path(jetrt.library_info()["path"]).parent
    (tmp_path / "libnvonnxparser.so.77").symlink_to(folder / "libnvinfer.so.10")
    ort()
    _trt_provider._provider_library().write_bytes(b"\0libnvonnxparser.so.77\0")
    with pytest.raises(errors.RuntimeNotAvailableError, match=r"libnvonnxparser\.so\.77 \(cannot open shared object"):
        jetrt.get_runtime("onnx_trt_ep")
    info = {**jetrt.library_info(), "path": str(tmp_path / "libnvinfer.so.10")}
    monkeypatch.setattr(_trt_provider._core, "library_info", lambda: info)
    assert jetrt.get_runtime("onnx_trt_ep").current_runtime_label() == "onnx_trt_ep"


def test_a_package_without_the_provider(ort, rules):
    rules.providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    ort()
    with pytest.raises(errors.RuntimeNotAvailableError, match=r"does not list \(CUDAExecutionProvider, CPUExecution"):
        jetrt.get_runtime("onnx_trt_ep")


def test_a_provider_that_silently_does_not_load(ort, rules, add):
    """Several versions of onnxruntime warn and go on with the CPU."""
    rules.loads = False
    ort()
    with pytest.raises(
        errors.EngineDeserializeError, match="made a session without TensorrtExecutionProvider"
    ) as caught:
        jetrt.load(add, runtime="onnx_trt_ep")
    assert "(it has CPUExecutionProvider)" in str(caught.value)


# ---------------------------------------------------------------------------------------------------- how it is asked


def test_the_session_is_asked_for_without_any_fallback(ort, rules, add):
    ort()
    model = jetrt.load(add, runtime="onnx_trt_ep")
    (asked,) = rules.sessions
    assert asked.names == ["TensorrtExecutionProvider"]
    assert asked.enable_fallback == 0
    assert asked.entries["session.disable_cpu_ep_fallback"] == "1"
    given = asked.given["TensorrtExecutionProvider"]
    assert given["device_id"] == "0"
    assert given["trt_engine_cache_enable"] == "True"
    assert not any("fp16" in key or "int8" in key or "bf16" in key for key in given)
    assert model.placement == {"TensorrtExecutionProvider": 2}
    assert model.load_report["placement_from"] == "onnxruntime's record"
    np.testing.assert_array_equal(model(a=A, b=B)["sum"], A + B)
    assert repr(model).startswith("<OnnxTrtModel add: a float32[-1, 3]")


def test_options_of_the_build_configuration(ort, rules, add):
    ort()
    config = jetrt.BuildConfig("fp16", 64, None, [("a", (1, 3), (2, 3), (8, 3)), ("b", (1, 3), (2, 3), (8, 3))])
    runtime = jetrt.get_runtime("onnx_trt_ep", device=1)
    entry = runtime.compile_engine(add, config)
    assert entry.build_config == config
    assert entry.versions["onnxruntime"] == "1.24.0"
    assert entry.versions["tensorrt"] == jetrt.library_info()["tensorrt"]
    handle = runtime.deserialize_engine(entry)
    built, loaded = (asked.given["TensorrtExecutionProvider"] for asked in rules.sessions)
    assert built == loaded  # so that the engine in the cache is the one that was built
    assert built["trt_fp16_enable"] == "True"
    assert built["trt_max_workspace_size"] == str(64 << 20)
    assert built["trt_profile_min_shapes"] == "a:1x3,b:1x3"
    assert built["trt_profile_opt_shapes"] == "a:2x3,b:2x3"
    assert built["trt_profile_max_shapes"] == "a:8x3,b:8x3"
    assert built["device_id"] == "1"
    np.testing.assert_array_equal(runtime.infer(handle, {"a": A, "b": B})["twice"], A + A)
    runtime.release_engine(handle)
    with pytest.raises(errors.ClosedEngineError):
        runtime.infer(handle, {"a": A, "b": B})


def test_profiles_of_inputs_with_one_shape(ort, rules, tmp_path, onnx_models):
    f32 = onnx_models.F32
    path = onnx_models.save(
        tmp_path / "mixed.onnx",
        [("Add", ["x", "w"], ["y"], {})],
        [("x", f32, ["N", 3]), ("w", f32, [1, 3])],
        [("y", f32, ["N", 3])],
    )
    ort()
    OnnxTrtModel(path, profiles=[("x", (1, 3), (2, 3), (8, 3)), ("w", (1, 3), (1, 3), (1, 3))])
    assert rules.sessions[-1].given["TensorrtExecutionProvider"]["trt_profile_max_shapes"] == "x:8x3"
    with pytest.raises(errors.EngineBuildError, match=r"profile of 'w' .*\[2, 3\], and the input is always \[1, 3\]"):
        OnnxTrtModel(path, profiles=[("w", (1, 3), (1, 3), (2, 3))])


def test_a_cache_folder_for_each_model_and_configuration(ort, rules, add, tmp_path, onnx_models):
    """onnxruntime names an engine after the structure of the graph; models that differ in weights would share it."""
    ort()

    def folder(path, **options):
        return jetrt.load(path, runtime="onnx_trt_ep", **options).load_report["cache"]

    f32 = onnx_models.F32
    folders = []
    for value in (1.0, 2.0):
        constant = onnx_models.onnx.helper.make_tensor("v", f32, [1], [value])
        nodes = [("Constant", [], ["c"], {"value": constant}), ("Add", ["x", "c"], ["y"], {})]
        path = onnx_models.save(tmp_path / f"{value}.onnx", nodes, [("x", f32, [1])], [("y", f32, [1])])
        folders.append(folder(path))
    folders += [folder(add), folder(add, precision="fp16"), folder(add, precision="bf16"), folder(add, device=1)]
    assert len(set(folders)) == len(folders)
    assert folder(add) == folders[2]
    assert folders[2].startswith(str(tmp_path / "cache" / "jetrt" / "onnx_trt_ep"))
    assert folder(add, cache_dir=tmp_path / "mine").startswith(str(tmp_path / "mine"))
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.EngineBuildError, match=r"the cache folder .* cannot be made .*Give another cache_dir"):
        folder(add, cache_dir=tmp_path / "file")


# ------------------------------------------------------------------------------------------------- nodes elsewhere


@pytest.mark.parametrize("record", [True, False])
def test_nodes_that_tensorrt_does_not_take(ort, rules, tmp_path, onnx_models, record, caplog):
    f32 = onnx_models.F32
    path = onnx_models.save(
        tmp_path / "mixed.onnx",
        [("Relu", ["x"], ["r"], {"name": "first"}), ("Erf", ["r"], ["y"], {"name": "second"})],
        [("x", f32, [4])],
        [("y", f32, [4])],
    )
    rules.refused, rules.record = {"Erf"}, record
    ort()
    with pytest.raises(errors.EngineDeserializeError, match=r"does not take every node.*allow_partition=True"):
        jetrt.load(path, runtime="onnx_trt_ep")
    with pytest.raises(errors.EngineBuildError, match=r"does not take every node"):
        jetrt.get_runtime("onnx_trt_ep").compile_engine(path)

    caplog.set_level(logging.INFO, "jetrt")
    model = jetrt.load(path, runtime="onnx_trt_ep", allow_partition=True)
    asked = rules.sessions[-1]
    assert asked.names == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert "session.disable_cpu_ep_fallback" not in asked.entries
    assert model.placement == {"TensorrtExecutionProvider": 1, "CUDAExecutionProvider": 1}
    assert model.load_report["placement_from"] == ("onnxruntime's record" if record else "a profiled call")
    (placed,) = [r for r in caplog.records if getattr(r, "event", None) == "placement"]
    assert "CUDAExecutionProvider 1, TensorrtExecutionProvider 1" in placed.getMessage()
    x = np.array([-1, 0, 1, 2], np.float32)
    assert model(x)["y"][0] == 0


@pytest.mark.parametrize("record", [True, False])
def test_nodes_on_another_provider_although_the_cpu_was_forbidden(ort, rules, add, record):
    """Forbidding the CPU says nothing of other providers: the count decides."""
    rules.refused, rules.record, rules.elsewhere = {"Add"}, record, "DmlExecutionProvider"
    ort()
    with pytest.raises(
        errors.EngineDeserializeError, match=r"add\.onnx: 2 of 2 nodes do not run on TensorRT: "
    ) as caught:
        OnnxTrtModel(add)
    assert re.search(r"\(Add\) on DmlExecutionProvider; .*allow_partition=True", str(caught.value))
    assert len(caught.value.log) == 2


def test_a_count_that_is_not_known_is_no_count(ort, rules, add):
    rules.record, rules.run_fails = False, True
    ort()
    with pytest.raises(
        errors.EngineDeserializeError, match=r"where the nodes run is not known \(the profiled call failed"
    ):
        OnnxTrtModel(add)
    assert OnnxTrtModel(add, allow_partition=True).placement == {}


# ------------------------------------------------------------------------------------------------------------ int8


def test_int8_without_scales_is_refused(ort, add):
    ort()
    with pytest.raises(errors.EngineBuildError, match=r"no QuantizeLinear nodes, and there is no calibration_table"):
        OnnxTrtModel(add, precision="int8")


def test_calibration_data_is_refused(ort, add, tmp_path):
    ort()
    config = jetrt.BuildConfig("int8", calibration_dataset=tmp_path / "data.npz")
    with pytest.raises(
        errors.EngineBuildError,
        match=r"calibration was asked for, and onnx_trt_ep has fp32, fp16, bf16, int8 and no calibration",
    ):
        jetrt.get_runtime("onnx_trt_ep").compile_engine(add, config)
    with pytest.raises(errors.EngineBuildError, match="precision 'fp8' was asked for"):
        jetrt.get_runtime("onnx_trt_ep").compile_engine(add, jetrt.BuildConfig("fp8"))


def test_int8_of_an_explicitly_quantised_model(ort, rules, tmp_path, onnx_models):
    import onnx

    f32 = onnx_models.F32
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    weights = [
        onnx.helper.make_tensor("scale", f32, [], [0.5]),
        onnx.helper.make_tensor("zero", onnx.TensorProto.INT8, [], [0]),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "q", [info("x", f32, [4])], [info("y", f32, [4])], weights)
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "q.onnx")
    ort()
    model = OnnxTrtModel(tmp_path / "q.onnx", precision="int8")
    given = rules.sessions[-1].given["TensorrtExecutionProvider"]
    assert given["trt_int8_enable"] == "True"
    assert "trt_int8_calibration_table_name" not in given
    np.testing.assert_array_equal(model(np.array([0.6, 1, -1, 0], np.float32))["y"], [0.5, 1, -1, 0])


def make_table(path, model, tensorrt=(10, 6, 0)):
    """A calibration cache as `jetrt build` saves it."""
    from types import SimpleNamespace

    from jetrt.builder.calibration_cache import save_cache

    data = SimpleNamespace(sha256="ab" * 32, preprocessing=None, shapes={"a": (2, 3)}, to_mapping=dict)
    content = f"TRT-{tensorrt[0] * 10000 + tensorrt[1] * 100}-EntropyCalibration2\na: 3c010a14\n".encode()
    save_cache(path, content, model=model, data=data, algorithm="entropy", tensorrt=tensorrt)
    return path


def test_a_calibration_table_is_passed_on_in_the_cache_folder(ort, rules, add, tmp_path):
    table = make_table(tmp_path / "add.cache", hashlib.sha256(add.read_bytes()).hexdigest())
    ort()
    runtime = jetrt.get_runtime("onnx_trt_ep", calibration_table=table)
    runtime.compile_engine(add, jetrt.BuildConfig("int8"))
    given = rules.sessions[-1].given["TensorrtExecutionProvider"]
    assert given["trt_int8_enable"] == "True"
    assert given["trt_int8_use_native_calibration_table"] == "True"
    assert given["trt_int8_calibration_table_name"] == "add.cache"
    assert (Path(given["trt_engine_cache_path"]) / "add.cache").read_bytes() == table.read_bytes()
    with pytest.raises(errors.EngineBuildError, match=r"calibration_table is given and precision is 'fp32'"):
        OnnxTrtModel(add, calibration_table=table)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("model", "the model's SHA-256 is 0000"),
        ("TensorRT", "TensorRT is 10.3.0, expected 10.6.0"),
        ("bytes", "its SHA-256 is "),
        ("sidecar", "there is no add.cache.json, which says what it was made from"),
        ("damage", "add.cache.json is damaged"),
        ("table", "it cannot be read (No such file"),
    ],
)
def test_a_calibration_table_that_cannot_be_trusted(ort, add, tmp_path, spoil, message, caplog):
    digest = hashlib.sha256(add.read_bytes()).hexdigest()
    table = make_table(
        tmp_path / "add.cache",
        "0" * 64 if spoil == "model" else digest,
        (10, 3, 0) if spoil == "TensorRT" else (10, 6, 0),
    )
    sidecar = tmp_path / "add.cache.json"
    if spoil == "bytes":
        table.write_bytes(table.read_bytes() + b"b: 3c010a14\n")
    elif spoil in ("sidecar", "table"):
        (sidecar if spoil == "sidecar" else table).unlink()
    elif spoil == "damage":
        sidecar.write_text("{")
    ort()
    with pytest.raises(errors.CalibrationCacheError, match=re.escape(message)) as caught:
        jetrt.get_runtime("onnx_trt_ep", calibration_table=table).compile_engine(add, jetrt.BuildConfig("int8"))
    assert "this calibration table cannot be trusted" in str(caught.value)
    assert "--recalibrate" in str(caught.value)
    assert caught.value.path == str(table)
    assert [record.levelname for record in caplog.records if getattr(record, "event", None) == "error"] == ["ERROR"]
