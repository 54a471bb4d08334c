"""Where TensorRT is found, what loading tells, and what it leaves behind."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rig

import fakes
import jetrt

clean, load = map(pytest.fixture, (rig.clean, rig.load))
X = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)


# The library ----------------------------------------------------------------------------------------------------------

FOUND = """
import ctypes, sys, jetrt
for path in sys.argv[2:]:
    ctypes.CDLL(path) if path.endswith(".10") else sys.path.append(path)
jetrt.Engine(sys.argv[1])
info = jetrt.library_info()
print(info["found_by"], info["path"])
"""


@pytest.mark.parametrize("step", ["folder", "file", "loaded already", "pip package", "system loader"])
def test_search_order(tmp_path: Path, step: str) -> None:
    plan = fakes.write_plan(tmp_path / "a.plan")
    library = (fakes.library_dir() / "libnvinfer.so.10").resolve()
    # A copy elsewhere, so that it shows which one was taken.
    other = tmp_path / "tensorrt_libs"
    other.mkdir()
    (other / "libnvinfer.so.10").write_bytes(library.read_bytes())
    env: dict[str, Any] = {"JETRT_TENSORRT_PATH": None}
    arguments: list[str] = []
    expected, how = library, step
    if step == "folder":
        env["JETRT_TENSORRT_PATH"], expected, how = other, other / "libnvinfer.so.10", "JETRT_TENSORRT_PATH"
    elif step == "file":
        env["JETRT_TENSORRT_PATH"] = expected = other / "libnvinfer.so.10"
        how = "JETRT_TENSORRT_PATH"
    elif step == "loaded already":
        expected = other / "libnvinfer.so.10"
        arguments = [str(expected)]
    elif step == "pip package":
        expected = other / "libnvinfer.so.10"
        arguments = [str(tmp_path)]
    done = fakes.run_python(FOUND, str(plan), *arguments, env=env)
    assert done.stdout.strip() == f"{how} {expected}"


def test_plugins_are_opened_once(tmp_path: Path) -> None:
    code = """
import sys, fakes, jetrt
plan = fakes.write_plan(sys.argv[1] + "/a.plan")
beside = str(fakes.library_dir() / "libnvinfer_plugin.so.10")
for _ in range(2):
    jetrt.Engine(plan, plugins=[beside]).close()
print(fakes.FakeTrt().count("initLibNvInferPlugins"))
try:
    jetrt.Engine(plan, plugins=["/nowhere/libmine.so"])
except jetrt.errors.LibraryNotFoundError as error:
    print(error)
"""
    lines = fakes.run_python(code, str(tmp_path)).stdout.splitlines()
    assert lines[0] == "1"
    assert lines[1].startswith("plugin library /nowhere/libmine.so: ")
    assert lines[1].endswith("Give the path of a library built for TensorRT 10.")


# What loading tells ---------------------------------------------------------------------------------------------------


def test_report_and_tables(load: Callable[..., Any]) -> None:
    engine = load("dit5")
    report = engine.load_report
    assert report["bytes"] == Path(engine.path).stat().st_size
    assert report["seconds"] > 0
    assert report["warnings"] == []
    assert report["tensorrt"] == engine.tensorrt_version == fakes.VERSION
    vl = engine.inputs["vl_embs"]
    assert (vl.name, vl.dtype, vl.shape) == ("vl_embs", "bfloat16", (1, -1, 64))
    assert (vl.mode, vl.location) == ("input", "device")
    assert vl.profiles == vl.profile == [((1, 1, 64), (1, 122, 64), (1, 512, 64))]
    assert engine.outputs["output"].profiles == []
    assert "vl_embs bfloat16[1, -1, 64]" in repr(engine)
    assert "profiles [1, 1, 64] / [1, 122, 64] / [1, 512, 64]" in repr(vl)


def test_a_warning_is_in_the_report_and_in_the_log(load: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "jetrt.tensorrt"):
        engine = load("mlp", foreign_model=True)
    (warning,) = engine.load_report["warnings"]
    assert "different models of devices" in warning
    logged = [(r.name, r.levelno) for r in caplog.records if r.getMessage() == warning]
    assert logged == [("jetrt.tensorrt", logging.WARNING)]


def test_a_percent_sign_in_a_log_line_is_text(load: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "jetrt.tensorrt"):
        load("mlp", log=[[2, "100 %s done"], [3, "for information"]])
    assert "100 %s done" in [r.getMessage() for r in caplog.records]
    assert "for information" in [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]


def test_ultralytics_metadata(clean: None, tmp_path: Path) -> None:
    about = {"task": "detect", "names": {"0": "cat"}}
    prefix = json.dumps(about).encode()
    path = tmp_path / "yolo.engine"
    path.write_bytes(struct.pack("<I", len(prefix)) + prefix + fakes.plan_bytes("mlp"))
    assert jetrt.read_plan(path)["metadata"] == about
    with jetrt.Engine(path) as engine:
        assert engine.metadata == about
        np.testing.assert_allclose(engine(X)["y"], fakes.mlp_reference(X), rtol=1e-5, atol=1e-5)


def test_read_plan_needs_neither_gpu_nor_tensorrt(tmp_path: Path) -> None:
    plan = fakes.write_plan(tmp_path / "a.plan", version="10.3.0.30")
    code = "import sys, jetrt; print(jetrt.read_plan(sys.argv[1]))"
    done = fakes.run_python(code, str(plan), env={"LD_LIBRARY_PATH": None, "JETRT_TENSORRT_PATH": None})
    size = plan.stat().st_size
    expected = {"kind": "plan", "tensorrt": "10.3.0.30", "serialization": 2, "bytes": size, "metadata": None}
    assert done.stdout.strip() == str(expected)


# Memory of the context ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_two_engines_share_the_memory_of_their_contexts(load: Callable[..., Any], graphs: str) -> None:
    memory = jetrt.DeviceMemory(8192)
    before = rig.cuda().live("bytes")
    first = load("mlp", {"device_memory": memory, "graphs": graphs}, device_memory=8192)
    second = load("mlp", {"device_memory": memory, "graphs": graphs}, device_memory=4096)
    assert first.device_memory_size == 8192
    # Neither context has scratch memory of its own; what is left are an address for empty tensors and the weights.
    alone = load("mlp", {"graphs": graphs}, device_memory=8192)
    own = rig.cuda().live("bytes") - before
    for _ in range(6):
        for engine in (first, second, alone):
            np.testing.assert_allclose(engine(X)["y"], fakes.mlp_reference(X), rtol=1e-5, atol=1e-5)
    assert own < 3 * 8192
    assert memory.nbytes == 8192


# What loading leaves behind -------------------------------------------------------------------------------------------


def test_nothing_is_written(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    folder = tmp_path / "plans"
    folder.mkdir()
    plan = fakes.write_plan(folder / "a.plan")
    folder.chmod(0o555)
    code = """
import sys, numpy as np, jetrt
with jetrt.Engine(sys.argv[1]) as engine:
    for _ in range(5):
        engine(np.zeros((8, 64), "f4"))
"""
    env = {"HOME": home, "XDG_CACHE_HOME": home / "cache", "TMPDIR": folder}
    fakes.run_python(code, str(plan), env=env)
    assert not list(home.iterdir())
    assert list(folder.iterdir()) == [plan]


EXITS = {
    "engine alive": "engine = jetrt.Engine(plan); engine(x)",
    "result alive": "y = jetrt.Engine(plan)(x)",
    "engine in a cycle": "class Node: pass\nn = Node(); n.me = n; n.engine = jetrt.Engine(plan); n.engine(x)",
    "result outlives close": "with jetrt.Engine(plan) as e: y = e(x)",
    "graph captured": "engine = jetrt.Engine(plan, graphs='require'); y = [engine(x) for _ in range(3)]",
    "comparison under way": "engine = jetrt.Engine(plan, warmup=0); engine(x)",
    "engine in a module": "import types\nsys.modules['m'] = m = types.ModuleType('m'); m.e = jetrt.Engine(plan)",
    "closed by atexit": "import atexit\nengine = jetrt.Engine(plan); atexit.register(engine.close); engine(x)",
    "called by atexit": "import atexit\nengine = jetrt.Engine(plan); atexit.register(lambda: engine(x))",
    "device memory alive": "m = jetrt.DeviceMemory(8192); engine = jetrt.Engine(plan, device_memory=m); engine(x)",
    "pinned array alive": "x = jetrt.pinned_empty((8, 64)); x[...] = 0; engine = jetrt.Engine(plan); engine(x)",
    "sys.exit inside with": "with jetrt.Engine(plan) as engine:\n    engine(x)\n    sys.exit(0)",
}


@pytest.mark.parametrize("how", EXITS)
def test_interpreter_exit(tmp_path: Path, how: str) -> None:
    plan = fakes.write_plan(tmp_path / "a.plan")
    code = f"import sys, numpy as np, jetrt\nplan, x = sys.argv[1], np.zeros((8, 64), 'f4')\n{EXITS[how]}\n"
    done = fakes.run_python(code, str(plan))
    assert done.stderr == ""
