"""The choice of a runtime: flags, packages, fallbacks, one object for many consumers; handles after a restart; logs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fakes
import jetrt
from jetrt import errors, runtime, thermal
from jetrt.runtimes import tensorrt as tensorrt_module

X = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in list(os.environ):
        if variable.startswith(("JETRT_RUNTIME", "BUILD_")):
            monkeypatch.delenv(variable)
    runtime._shared.clear()
    yield
    runtime._shared.clear()


@pytest.fixture
def no_tensorrt(monkeypatch):
    def library_info():
        raise errors.LibraryNotFoundError("libnvinfer.so was not found in 5 places", library="libnvinfer.so")

    monkeypatch.setattr(tensorrt_module._core, "library_info", library_info)


@pytest.fixture
def add(tmp_path):
    import onnx_models  # skips where there is no onnxruntime

    return onnx_models.add(tmp_path / "add.onnx")


@pytest.fixture
def plan(tmp_path):
    return fakes.write_plan(tmp_path / "mlp.engine", "mlp")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts a package of that name before all others; what it raises is raised when it is imported."""

    def make(name, content):
        folder = tmp_path / f"site-{name}" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(content)
        monkeypatch.syspath_prepend(folder.parent)
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)

    return make


# --------------------------------------------------------------------------------------------- flags and packages


def test_a_flag_that_is_off_is_named_and_the_package_too(monkeypatch, no_tensorrt):
    monkeypatch.setenv("BUILD_TENSORRT_RUNTIME", "OFF")
    with pytest.raises(errors.RuntimeNotAvailableError) as caught:
        jetrt.get_runtime("tensorrt")
    assert caught.value.missing == [
        "the flag BUILD_TENSORRT_RUNTIME, which is OFF in the environment; set it to ON",
        "libnvinfer.so was not found in 5 places",
    ]
    for part in ("BUILD_TENSORRT_RUNTIME", "libnvinfer.so was not found", "Nothing else was tried in its place"):
        assert part in str(caught.value)
    assert "tensorrt" not in jetrt.available_runtimes()


def test_a_flag_gates_load_too(monkeypatch, plan):
    monkeypatch.setenv("BUILD_TENSORRT_RUNTIME", "0")
    with pytest.raises(errors.RuntimeNotAvailableError, match="the flag BUILD_TENSORRT_RUNTIME, which is OFF"):
        jetrt.load(plan)


def test_a_name_that_is_nearly_right():
    with pytest.raises(errors.RuntimeNotAvailableError, match=r"no runtime 'tensort' \(did you mean 'tensorrt'\?\)"):
        runtime.from_config({"name": "tensort"}, consumers=["c2_vpr"])


def test_flags_of_the_configuration(monkeypatch):
    monkeypatch.setenv("BUILD_TENSORRT_RUNTIME", "OFF")
    config = {"name": "tensorrt", "build_flags": {"BUILD_TENSORRT_RUNTIME": True}}
    assert runtime.from_config(config).current_runtime_label() == "tensorrt"
    config = {"name": "tensorrt", "build_flags": {"BUILD_TENSORRT_RUNTIME": False}}
    with pytest.raises(errors.RuntimeNotAvailableError, match="which is OFF in the configuration; set it to ON"):
        runtime.from_config(config)


def test_what_is_not_allowed(monkeypatch):
    """A program that was tested with two runtimes names their flags alone; no way around them is shown."""
    monkeypatch.setenv("BUILD_PYTORCH_FP16_RUNTIME", "OFF")
    with pytest.raises(errors.RuntimeNotAvailableError) as caught:
        runtime.from_config(
            {"name": "onnx_trt_ep"},
            allowed=["tensorrt", "pytorch_fp16"],
            consumers=["c2_vpr", "c3_matcher"],
        )
    assert str(caught.value) == (
        "The runtime 'onnx_trt_ep' is not allowed here, which c2_vpr, c3_matcher need. "
        "Missing: the runtime 'onnx_trt_ep' among those that are allowed. "
        "Allowed here, and what switches it on: 'tensorrt' (BUILD_TENSORRT_RUNTIME), "
        "'pytorch_fp16' (BUILD_PYTORCH_FP16_RUNTIME). "
        "Available: 'tensorrt'. Nothing else was tried in its place."
    )
    assert caught.value.consumers == ["c2_vpr", "c3_matcher"]
    assert caught.value.available == ["tensorrt"]
    assert "BUILD_ONNX_TRT_EP_RUNTIME" not in str(caught.value)


def test_allowed_only_takes_away():
    config = {"name": "onnx_cpu", "allowed": ["tensorrt"]}
    with pytest.raises(errors.RuntimeNotAvailableError, match="'onnx_cpu' is not allowed here"):
        runtime.from_config(config, allowed=["tensorrt", "onnx_cpu"])
    with pytest.raises(ValueError, match=r"allowed=: found 'onnx'; allowed: tensorrt, .*did you mean onnx_cpu"):
        runtime.from_config(config, allowed=["onnx"])


def test_a_package_that_is_broken_is_named_with_its_error(package):
    package("onnxruntime", "raise OSError('libonnxruntime.so: undefined symbol: _ZN4onnx\\n')")
    with pytest.raises(errors.RuntimeNotAvailableError) as caught:
        jetrt.get_runtime("onnx_cpu")
    assert caught.value.missing == [
        "the package onnxruntime, which is installed and fails when it is imported "
        "(OSError: libonnxruntime.so: undefined symbol: _ZN4onnx); pip install 'jetrt[cpu]'"
    ]
    # A look at the packages alone would have listed it.
    assert "onnx_cpu" not in caught.value.available


def test_a_package_that_leaves_while_it_is_imported(package):
    package("openvino", "import sys; sys.exit('no licence')")
    with pytest.raises(errors.RuntimeNotAvailableError, match=r"fails when it is imported \(SystemExit: no licence\)"):
        jetrt.get_runtime("openvino_cpu")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("onnx_trt_ep", "onnxruntime"),
        ("pytorch_fp16", "torch"),
        ("torch_tensorrt", "torch"),
        ("torch_tensorrt", "torch_tensorrt"),
        ("openvino_cpu", "openvino"),
        ("onnx_cpu", "onnxruntime"),
    ],
)
def test_a_package_that_is_missing_is_named(monkeypatch, name, missing):
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    with pytest.raises(errors.RuntimeNotAvailableError) as caught:
        jetrt.get_runtime(name)
    assert any(f"the package {missing} (pip install" in reason for reason in caught.value.missing)
    assert caught.value.runtime == name
    assert name not in caught.value.available


def test_looking_for_runtimes_imports_no_heavy_package():
    code = "import sys, jetrt; print(jetrt.available_runtimes()); heavy = {'torch', 'torch_tensorrt', 'openvino'}; "
    done = fakes.run_python(code + "print(sorted(heavy & set(sys.modules)))")
    assert done.stdout.splitlines()[-1] == "[]"


# ------------------------------------------------------------------------------------------------------ fallbacks


def test_a_fallback_is_logged_and_visible(no_tensorrt, add, caplog):
    config = {"name": "tensorrt", "fallback": ["onnx_cpu"], "consumers": ["c2_vpr"], "onnx_cpu": {"threads": 1}}
    chosen = runtime.from_config(config)
    assert chosen.current_runtime_label() == "onnx_cpu (fallback for tensorrt)"
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage() == (
        "fallback: runtime=onnx_cpu stands in for tensorrt; missing: libnvinfer.so was not found in 5 places"
    )
    assert warning.event == "fallback"
    assert warning.fields["consumers"] == ["c2_vpr"]
    # The label is in the record of every engine; the entry is the runtime's own.
    entry = chosen.compile_engine(add)
    assert entry.runtime == "onnx_cpu"
    handle = chosen.deserialize_engine(entry)
    a = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(chosen.infer(handle, {"a": a, "b": a})["sum"], a + a)


def test_nothing_falls_back_where_the_first_can_be_had(caplog):
    chosen = runtime.from_config({"name": "tensorrt"}, fallback=["onnx_cpu"])
    assert chosen.current_runtime_label() == "tensorrt"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_model_that_cannot_be_built_never_falls_back(tmp_path):
    (tmp_path / "noise.engine").write_bytes(b"noise" * 20)
    chosen = runtime.from_config({"name": "tensorrt", "fallback": ["onnx_cpu"]})
    with pytest.raises(errors.EngineBuildError, match=r"noise\.engine"):
        chosen.compile_engine(tmp_path / "noise.engine")
    assert chosen.current_runtime_label() == "tensorrt"


def test_fallbacks_that_are_missing_too(no_tensorrt, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(errors.RuntimeNotAvailableError) as caught:
        runtime.from_config({"name": "tensorrt"}, fallback=["openvino_cpu"], allowed=["tensorrt", "openvino_cpu"])
    assert caught.value.missing == [
        "libnvinfer.so was not found in 5 places",
        "for the fallback 'openvino_cpu': the package openvino (pip install openvino)",
    ]
    assert "Tried in its place too: 'openvino_cpu'." in str(caught.value)
    assert "Available: none" in str(caught.value)


def test_a_fallback_must_be_allowed():
    with pytest.raises(ValueError, match="fallback=: found 'onnx_cpu'; allowed: tensorrt"):
        runtime.from_config({"name": "tensorrt"}, allowed=["tensorrt"], fallback=["onnx_cpu"])


# ----------------------------------------------------------------------------------------- one object for everybody


def test_one_object_for_the_same_configuration(monkeypatch):
    config = {"name": "tensorrt", "tensorrt": {"max_contexts": 2}}
    first = runtime.shared_runtime(config, consumers=["c2_vpr"])
    assert runtime.shared_runtime(dict(config), consumers=["c3_matcher"]) is first
    assert runtime.shared_runtime({"name": "tensorrt"}) is not first
    assert runtime.from_config(config) is not first
    monkeypatch.setenv("JETRT_RUNTIME", "tensorrt")
    assert runtime.shared_runtime() is runtime.shared_runtime({"name": "tensorrt"})


def test_threads_get_the_same_object(monkeypatch):
    made = []
    choose = runtime._choose

    def slowly(config):
        made.append(config)
        time.sleep(0.05)
        return choose(config)

    monkeypatch.setattr(runtime, "_choose", slowly)
    found: queue.SimpleQueue = queue.SimpleQueue()
    threads = [
        threading.Thread(target=lambda: found.put(runtime.shared_runtime({"name": "tensorrt"}))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(found.get()) for _ in threads}) == 1
    assert len(made) == 1


def test_a_failure_is_not_remembered(no_tensorrt, monkeypatch):
    with pytest.raises(errors.RuntimeNotAvailableError):
        runtime.shared_runtime({"name": "tensorrt"})
    monkeypatch.undo()
    assert runtime.shared_runtime({"name": "tensorrt"}).current_runtime_label() == "tensorrt"


def test_a_forked_child_starts_anew():
    code = """
import os
from jetrt import runtime
mine = runtime.shared_runtime({"name": "tensorrt"})
runtime._shared_lock.acquire()  # as if another thread were choosing while this one forks
child = os.fork()
if child == 0:
    os._exit(0 if runtime.shared_runtime({"name": "tensorrt"}) is not mine else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    fakes.run_python(code)


# ------------------------------------------------------------------------------------------ handles after a restart


def test_an_engine_after_a_restart(plan, tmp_path):
    before = jetrt.get_runtime("tensorrt")
    entry = before.compile_engine(plan)
    handle = before.deserialize_engine(entry)
    expected = before.infer(handle, {"x": X})["y"]
    entry.save(tmp_path / "mlp.json")
    code = """
import sys, numpy as np, jetrt
entry = jetrt.EngineCacheEntry.load(sys.argv[1])
runtime = jetrt.get_runtime(entry.runtime)
handle = runtime.deserialize_engine(entry)
np.save(sys.argv[3], runtime.infer(handle, {"x": np.load(sys.argv[2])})["y"])
runtime.release_engine(handle)
"""
    np.save(tmp_path / "x.npy", X)
    fakes.run_python(code, str(tmp_path / "mlp.json"), str(tmp_path / "x.npy"), str(tmp_path / "y.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)


def test_an_entry_keeps_everything(plan, tmp_path):
    config = jetrt.BuildConfig("int8", 64, tmp_path / "c.npz", [("x", (1, 64), (8, 64), (64, 64))])
    entry = jetrt.EngineCacheEntry(plan, "ab" * 32, 7, "tensorrt", {"tensorrt": "10.6.0.26"}, config)
    entry.save(tmp_path / "entry.json")
    assert jetrt.EngineCacheEntry.load(tmp_path / "entry.json") == entry


def test_engine_and_entry_move_together(plan, tmp_path):
    entry = jetrt.get_runtime("tensorrt").compile_engine(plan)
    entry.save(tmp_path / "mlp.json")
    assert json.loads((tmp_path / "mlp.json").read_text())["path"] == "mlp.engine"
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("mlp.engine", "mlp.json"):
        (tmp_path / name).rename(moved / name)
    found = jetrt.EngineCacheEntry.load(moved / "mlp.json")
    assert found.path == moved / "mlp.engine"
    jetrt.get_runtime("tensorrt").deserialize_engine(found)
    elsewhere = tmp_path / "elsewhere" / "mlp.json"
    elsewhere.parent.mkdir()
    found.save(elsewhere)  # not below that folder: the whole path
    assert jetrt.EngineCacheEntry.load(elsewhere).path == moved / "mlp.engine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("noise", "it is no JSON"),
        ([], "it holds a list, not an object"),
        ({"schema": "x"}, "schema is 'x'; allowed: 'jetrt-engine-entry-1'"),
        ({"sha256": 3}, "sha256 is 3, not of type str"),
        ({"size_bytes": None}, "size_bytes is None, not of type int"),
        ({"versions": {"tensorrt": 10}}, "each must be a text"),
        ({"build_config": {"precision": "fp12"}}, "build_config: precision is 'fp12'; allowed: fp32"),
        ({"build_config": {"precison": "fp16"}}, "build_config: .*unexpected keyword argument 'precison'"),
    ],
)
def test_an_entry_that_is_damaged(plan, tmp_path, change, message):
    path = tmp_path / "mlp.json"
    jetrt.get_runtime("tensorrt").compile_engine(plan).save(path)
    if isinstance(change, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(errors.EngineDeserializeError, match=rf"mlp\.json is no engine entry of jetrt: .*{message}"):
        jetrt.EngineCacheEntry.load(path)


def test_another_version_of_what_ran_it(add, tmp_path):
    chosen = jetrt.get_runtime("onnx_cpu")
    path = tmp_path / "add.json"
    chosen.compile_engine(add).save(path)
    content = json.loads(path.read_text())
    content["versions"]["onnxruntime"] = "1.2.3"
    path.write_text(json.dumps(content))
    with pytest.raises(
        errors.EngineDeserializeError,
        match=r"add\.onnx: the entry was made with onnxruntime 1\.2\.3, here .*compile_engine on the runtime 'onnx",
    ):
        chosen.deserialize_engine(jetrt.EngineCacheEntry.load(path))


# ----------------------------------------------------------------------------------------------------------- logs


def records(caplog, event):
    return [record for record in caplog.records if getattr(record, "event", None) == event]


def test_ready_names_every_resident_engine(plan, tmp_path, caplog):
    caplog.set_level(logging.INFO, "jetrt")
    chosen = runtime.from_config({"name": "tensorrt"}, consumers=["c2_vpr"])
    named = tmp_path / "ultravpr__sm90_jpnone_trt10.6.0.26_fp16.engine"
    fakes.write_plan(named, "mlp")
    first = chosen.deserialize_engine(chosen.compile_engine(plan))
    second = chosen.deserialize_engine(chosen.compile_engine(named))
    texts = [record.getMessage() for record in records(caplog, "ready")]
    assert texts[0] == "ready: runtime=tensorrt, engines=[]"
    assert texts[1].startswith(f"ready: runtime=tensorrt, engines=[mlp]; deserialised {plan} in ")
    assert texts[2].startswith("ready: runtime=tensorrt, engines=[mlp, ultravpr@fp16]; deserialised ")
    assert records(caplog, "ready")[2].fields["engines"] == ["mlp", "ultravpr@fp16"]
    chosen.release_engine(first)
    chosen.release_engine(first)
    third = chosen.deserialize_engine(first.entry)
    assert records(caplog, "ready")[-1].fields["engines"] == ["mlp", "ultravpr@fp16"]
    for handle in (second, third):
        chosen.release_engine(handle)


def test_errors_are_logged_and_raised(plan, tmp_path, caplog):
    chosen = jetrt.get_runtime("tensorrt")
    entry = chosen.compile_engine(plan)
    plan.write_bytes(b"noise" * 20)
    with pytest.raises(errors.EngineDeserializeError, match="changed since"):
        chosen.deserialize_engine(entry)
    with pytest.raises(errors.EngineBuildError):
        chosen.compile_engine(plan)
    first, second = records(caplog, "error")
    assert (first.levelname, first.fields["error"]) == ("ERROR", "EngineDeserializeError")
    assert first.getMessage().startswith("EngineDeserializeError during deserialize_engine; engine=mlp; ")
    assert (second.levelname, second.fields["during"]) == ("ERROR", "compile_engine")


def test_out_of_memory_in_infer_is_logged(plan, caplog, monkeypatch):
    chosen = jetrt.get_runtime("tensorrt")
    handle = chosen.deserialize_engine(chosen.compile_engine(plan))

    class Full:
        closed = False

        def run(self, inputs, *, synchronize):
            raise errors.OutOfMemoryError("4096 bytes of device memory were wanted")

    full = jetrt.EngineHandle(handle.entry, Full())
    for level in (logging.INFO, logging.DEBUG):  # DEBUG takes the other way, which measures time
        caplog.set_level(level, "jetrt")
        caplog.clear()
        with pytest.raises(errors.OutOfMemoryError):
            chosen.infer(full, {"x": X})
        (record,) = records(caplog, "error")
        assert record.getMessage() == "OOM during infer; engine=mlp; 4096 bytes of device memory were wanted"


def test_timing_is_logged_only_at_debug(plan, caplog):
    chosen = jetrt.get_runtime("tensorrt")
    handle = chosen.deserialize_engine(chosen.compile_engine(plan))
    caplog.set_level(logging.INFO, "jetrt")
    chosen.infer(handle, {"x": X})
    assert records(caplog, "infer") == []
    caplog.set_level(logging.DEBUG, "jetrt")
    y = chosen.infer(handle, {"x": X})["y"]
    np.testing.assert_allclose(y, fakes.mlp_reference(X), rtol=1e-5, atol=1e-6)
    (record,) = records(caplog, "infer")
    assert re.fullmatch(r"infer engine=mlp took=\d+\.\d{3}ms", record.getMessage())
    assert record.fields["took_ms"] > 0
    chosen.infer(handle, {"x": X}, synchronize=False)
    assert "enqueued_in=" in records(caplog, "infer")[-1].getMessage()


def test_thermal_state_is_that_of_the_device_and_never_raises_unless_asked(monkeypatch):
    known = jetrt.ThermalState(41.0, 52.0, False, 918, 1)
    asked = []

    class Monitor:
        def state(self):
            return known

        def require(self):
            raise errors.TelemetryUnavailableError("nothing answers")

    monkeypatch.setattr(thermal, "monitor", lambda device: asked.append(device) or Monitor())
    chosen = jetrt.get_runtime("tensorrt", device=1)
    assert chosen.thermal_state() is known
    with pytest.raises(errors.TelemetryUnavailableError, match="nothing answers"):
        chosen.thermal_state(require=True)
    assert asked == [1, 1]


def test_the_thermal_state_of_this_machine():
    state = jetrt.get_runtime("tensorrt").thermal_state()
    assert isinstance(state, jetrt.ThermalState)
    assert type(state.thermal_throttle_active) is bool


# -------------------------------------------------------------------------------------------------- under load


def test_calls_of_several_consumers_beside_a_larger_engine(tmp_path):
    """The mix of a vision stack, without its clock: every call is answered, with its own result, and none is lost."""
    chosen = runtime.shared_runtime({"name": "tensorrt", "tensorrt": {"max_contexts": 2, "timeout": 60}})
    small = chosen.deserialize_engine(chosen.compile_engine(fakes.write_plan(tmp_path / "lightglue.engine", "mlp")))
    large = chosen.deserialize_engine(chosen.compile_engine(fakes.write_plan(tmp_path / "ultravpr.engine", "mlp")))
    answered: queue.SimpleQueue = queue.SimpleQueue()
    calls = {"matcher 0": 60, "matcher 1": 60, "matcher 2": 60, "reranker": 120, "vpr": 20}

    def consume(name: str) -> None:
        mine = runtime.shared_runtime({"name": "tensorrt", "tensorrt": {"max_contexts": 2, "timeout": 60}})
        rows = 64 if name == "vpr" else 1 + len(name) % 3
        for index in range(calls[name]):
            x = np.full((rows, 64), index + len(name) / 16, np.float32)
            try:
                y = mine.infer(large if name == "vpr" else small, {"x": x})["y"]
                good = np.allclose(y, fakes.mlp_reference(x), rtol=1e-4, atol=1e-4)
                answered.put((name, index, mine is chosen and good))
            except Exception as error:
                answered.put((name, index, error))

    threads = [threading.Thread(target=consume, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [answered.get() for _ in range(answered.qsize())]
    assert sorted(row[:2] for row in found) == sorted((name, index) for name, n in calls.items() for index in range(n))
    assert [row for row in found if row[2] is not True] == []
    for handle in (small, large):
        chosen.release_engine(handle)


def test_the_load_of_a_vision_stack_on_its_schedule(tmp_path):
    """`benches/deadlines.py` for a moment: what it counts, and not how long anything took."""
    path = Path(__file__).parent.parent / "benches" / "deadlines.py"
    spec = importlib.util.spec_from_file_location("deadlines", path)
    deadlines = importlib.util.module_from_spec(spec)
    sys.modules["deadlines"] = deadlines  # dataclasses look their module up
    spec.loader.exec_module(deadlines)

    chosen = runtime.shared_runtime({"name": "tensorrt", "tensorrt": {"max_contexts": 2}})
    handles = [
        chosen.deserialize_engine(chosen.compile_engine(fakes.write_plan(tmp_path / f"{name}.engine", "mlp")))
        for name in ("small", "large")
    ]
    consumers = [
        deadlines.consumer(chosen, handles[0], "re-ranker", 10, seed=1),
        deadlines.consumer(chosen, handles[0], "matcher", 3, seed=2),
        deadlines.consumer(chosen, handles[1], "larger engine", 1, seed=3),
    ]
    counts = deadlines.load_test(chosen, consumers, 1.0)
    assert [counts[each.name].due for each in consumers] == [30, 9, 3]
    for count in counts.values():
        assert (count.lost, count.wrong, count.failed) == (0, 0, [])

    # It would see a wrong result and a lost call.
    spoilt = dataclasses.replace(
        consumers[2], expected=[{"y": each["y"] + 1} for each in consumers[2].expected], name="spoilt"
    )
    chosen.release_engine(handles[0])
    counts = deadlines.load_test(chosen, [spoilt, consumers[1]], 0.5)
    assert counts["spoilt"].wrong == counts["spoilt"].due == 1
    assert counts["matcher"].lost == counts["matcher"].due == 4
    assert counts["matcher"].failed[0].startswith("ClosedEngineError")
