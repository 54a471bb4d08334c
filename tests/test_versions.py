"""One binary over the TensorRT versions: every table of slots runs, and what has none is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fakes

VERSIONS = [
    "10.0.0.6",
    "10.1.0.27",
    "10.3.0.30",
    "10.7.0.23",
    "10.8.0.43",
    "10.13.3.9",
    "10.16.2.10",
    "11.0.0.114",
    "11.1.0.106",
]

# Loading, every getter, eager, graph, data-dependent output, host shape tensor, user memory, an error with log lines.
RUN = """
import sys, time
import numpy as np
import fakes, jetrt

folder, version = sys.argv[1:]
plan = lambda program, **f: fakes.write_plan(f"{folder}/{program}.plan", program, **f)
x = np.random.default_rng(0).standard_normal((4, 64)).astype("f4")
with jetrt.Engine(plan("mlp")) as engine:
    assert engine.tensorrt_version == version, engine.tensorrt_version
    assert engine.inputs["x"].profiles and engine.device_memory_size >= 0 and engine.num_profiles == 1
    for _ in range(6):
        np.testing.assert_allclose(engine(x)["y"], fakes.mlp_reference(x), rtol=1e-5, atol=1e-5)
        while engine.stats["captures"] and not engine.stats["replays"]:
            time.sleep(0.01)
            np.testing.assert_allclose(engine(x)["y"], fakes.mlp_reference(x), rtol=1e-5, atol=1e-5)
    assert engine.stats["replays"] > 0, engine.stats
with jetrt.Engine(plan("nonzero")) as engine:
    z = (x[:, :4] > 0).astype("f4")
    np.testing.assert_array_equal(engine(z)["y"], np.stack(np.nonzero(z)))
memory = jetrt.DeviceMemory(1 << 20)
with jetrt.Engine(plan("mlp", device_memory=4096), device_memory=memory) as engine:
    np.testing.assert_allclose(engine(x)["y"], fakes.mlp_reference(x), rtol=1e-5, atol=1e-5)
with jetrt.Engine(plan("mlp", fail="enqueue"), graphs="off") as engine:
    try:
        engine(x)
    except jetrt.errors.InferenceError as error:
        assert error.log and error.bound == ["x float32[4, 64] on cpu"], (error.log, error.bound)
    else:
        raise AssertionError("no error")
assert fakes.FakeTrt().errors() == [] and fakes.FakeCuda().errors() == []
print("ran", jetrt.library_info()["tensorrt"])
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_runs(tmp_path: Path, version: str) -> None:
    done = fakes.run_python(RUN, str(tmp_path), version, version=version)
    assert done.stdout == f"ran {version}\n"


LOAD = """
import sys, jetrt
for use in (lambda: jetrt.Engine(sys.argv[1]), jetrt.library_info):
    try:
        use()
    except jetrt.errors.UnsupportedVersionError as error:
        print(error.found, "|", error.supported, "|", error)
"""


@pytest.mark.parametrize(("version", "found"), [("8.6.1", "8.6.1"), ("12.0.0.1", "12.0.0")])
def test_refused_by_name(tmp_path: Path, version: str, found: str) -> None:
    plan = fakes.write_plan(tmp_path / "a.plan", version="10.6.0.26")
    done = fakes.run_python(LOAD, str(plan), version=version)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(found)
        assert "| TensorRT 10.0 to 10.16 and 11.x |" in line
        assert f"this is TensorRT {found}" in line
        assert "JetPack 6.1 and 6.2 have 10.3" in line


def test_the_plans_major_decides_between_two_libraries(tmp_path: Path) -> None:
    """Both majors in one folder: the one that the plan was built by is opened."""
    code = """
import sys, jetrt
print(jetrt.Engine(sys.argv[1]).tensorrt_version.split(".")[0])
"""
    folder = tmp_path / "both"
    folder.mkdir()
    for version in ("10.6.0.26", "11.1.0.106"):
        name = f"libnvinfer.so.{fakes.major(version)}"
        shutil.copy(fakes.library_dir(version) / name, folder / name)
    for version in ("10.6.0.26", "11.1.0.106"):
        plan = fakes.write_plan(tmp_path / "a.plan", version=version)
        done = fakes.run_python(code, str(plan), version=version, env={"JETRT_TENSORRT_PATH": folder})
        assert done.stdout.strip() == str(fakes.major(version))


@pytest.mark.parametrize(("version", "known"), [("10.6.0.26", False), ("10.14.1.48", True), ("11.1.0.106", True)])
def test_a_stripped_plan_without_a_manifest(tmp_path: Path, version: str, known: bool) -> None:
    """From 10.14 the library itself tells that a plan has no weights; before, only the manifest does."""
    code = """
import sys
from pathlib import Path
import fakes, jetrt
folder = Path(sys.argv[1])
onnx = fakes.onnx_model(folder / "m.onnx")
typed = {"strongly_typed": True} if sys.argv[2] == "11" else {}
shapes = {"min": "x:1x64", "opt": "x:8x64", "max": "x:64x64"}
plan = jetrt.build(onnx, folder / "m.engine", strip_plan=True, parity=False, progress="none", **typed, **shapes).path
Path(f"{plan}.json").unlink()
jetrt.Engine(plan, refit=onnx).close()
print(jetrt.Engine(plan, verify="off").load_report["warnings"])
try:
    jetrt.Engine(plan)
except jetrt.errors.PlanError as error:
    print(error)
"""
    done = fakes.run_python(code, str(tmp_path), str(fakes.major(version)), version=version)
    assert ("this plan was built without" in done.stdout) is known, done.stdout
    assert done.stdout.count("bytes of weights (kSTRIP_PLAN)") == (2 if known else 0)
