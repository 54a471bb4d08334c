"""`jetrt doctor`: each finding where it must be made, and on machines in good order none."""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import machines
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import ARM, CONF, ORIN, WORKSTATION, X86, Laid, cgroup, installed, meminfo, release, tensorrt
from manifests import MANIFEST

from jetrt import doctor
from jetrt.cli import main
from jetrt.doctor import bundle, children, facts, library_checks, release_checks
from jetrt.doctor.versions import differ, numbers
from jetrt.environment import variables
from jetrt.provenance import EngineFile, Manifest

NUMPY1 = "\0numpy.core.multiarray\0_ARRAY_API\0"
NUMPY2 = "\0numpy._core._multiarray_umath\0numpy.core._multiarray_umath\0"
CV2 = {"venv/cv2/cv2.abi3.so": NUMPY1}
NUMPY_2 = {"venv/numpy-1.26.4.dist-info/METADATA": None, **installed("numpy", "2.2.6")}
NO_TENSORRT: dict[str, Any] = dict.fromkeys(tensorrt(ARM, "10.3.0"))
NO_CUDA: dict[str, Any] = {f"{ARM}/nvidia/libcuda.so.1.1": None, f"{ARM}/nvidia/libcuda.so.1": None}
APT = {"usr/lib/python3.10/dist-packages/tensorrt-10.3.0.dist-info/METADATA": "Name: tensorrt\nVersion: 10.3.0\n"}
OTHER = "opt/trt/lib"

#: id of the finding, severity, words of its text, the machine.
FOUND: list[tuple[str, str, str, Laid]] = [
    ("numpy-abi", "error", "numpy is 2.2.6, and compiled for numpy 1 are: cv2", Laid(files=CV2 | NUMPY_2)),
    (
        "numpy-requirement",
        "warning",
        "gtsam wants numpy <2",
        Laid(files=NUMPY_2 | installed("gtsam", "4.2", ["numpy<2"])),
    ),
    (
        "venv-without-system-packages",
        "warning",
        "does not see tensorrt 10.3.0 of .*, which bench.py use",
        Laid(files=APT, python={"venv_sees_system": False}, folder={"bench.py": "import tensorrt as trt\n"}),
    ),
    ("venv-without-system-packages", "note", "does not see", Laid(files=APT, python={"venv_sees_system": False})),
    (
        "tensorrt-binding-and-library",
        "error",
        r"tensorrt-cu12-bindings is 10\.9\.0\.34 and the library that it would use is 10\.13\.3\.9",
        Laid(
            "workstation",
            {"venv/tensorrt_cu12_bindings-10.13.3.9.dist-info/METADATA": None}
            | installed("tensorrt-cu12-bindings", "10.9.0.34"),
        ),
    ),
    (
        "tensorrt-binding-and-library",
        "error",
        r"tensorrt is 10\.3\.0 and the library that it would use is 10\.7\.0",
        Laid(
            files=installed("tensorrt", "10.3.0") | tensorrt(OTHER, "10.7.0"),
            environ={"LD_LIBRARY_PATH": f"ROOT/{OTHER}"},
        ),
    ),
    (
        "parser-elsewhere",
        "warning",
        "libnvonnxparser is not beside it but in",
        Laid(
            files={f"{ARM}/libnvonnxparser.so.10.3.0": None, f"{ARM}/libnvonnxparser.so.10": None}
            | {f"{OTHER}/libnvonnxparser.so.10": "library"},
            environ={"LD_LIBRARY_PATH": f"ROOT/{OTHER}"},
        ),
    ),
    (
        "mixed-tensorrt",
        "error",
        r"programs get .*libnvinfer\.so\.10 \(10\.3\.0\) together with .*libnvinfer_plugin\.so\.10 \(10\.7\.0\)",
        Laid(
            files={f"{OTHER}/libnvinfer_plugin.so.10.7.0": "library"}
            | {f"{OTHER}/libnvinfer_plugin.so.10": "-> libnvinfer_plugin.so.10.7.0"},
            environ={"LD_LIBRARY_PATH": f"ROOT/{OTHER}"},
        ),
    ),
    (
        "builder-resource-missing",
        "warning",
        "no libnvinfer_builder_resource beside",
        Laid(files={f"{ARM}/libnvinfer_builder_resource.so.10.3.0": None}),
    ),
    (
        "builder-resource-missing",
        "warning",
        "are for SM 90, and this GPU has SM 87",
        Laid(
            files={f"{ARM}/libnvinfer_builder_resource.so.10.3.0": None}
            | {f"{ARM}/libnvinfer_builder_resource_sm90.so.10.3.0": "library"}
        ),
    ),
    (
        "stub-libcuda",
        "warning",
        "stub to link programs with",
        Laid(
            files={"usr/local/cuda/lib64/stubs/libcuda.so": "stub"},
            environ={"LD_LIBRARY_PATH": "/keep:ROOT/usr/local/cuda/lib64/stubs"},
        ),
    ),
    (
        "stub-libcuda",
        "error",
        "stub to link programs with",
        Laid(
            files={"usr/local/cuda/lib64/stubs/libcuda.so.1": "stub"},
            environ={"LD_LIBRARY_PATH": "ROOT/usr/local/cuda/lib64/stubs"},
        ),
    ),
    (
        "pycuda-missing",
        "warning",
        "PyCUDA is not installed, and bench.py use it",
        Laid(folder={"bench.py": "x = 1\nimport pycuda.autoinit\n"}),
    ),
    (
        "pycuda-missing",
        "warning",
        "the package trtutils use it",
        Laid(files=installed("trtutils", "0.7", ["pycuda>=2022", "rich"])),
    ),
    (
        "swap-missing",
        "warning",
        "the swap on disk is 0, with 15.20 GiB",
        Laid(files={"proc/meminfo": meminfo(15.2, 12, 0)}),
    ),
    (
        "swap-missing",
        "warning",
        r"; 7\.60 GiB of zram lie in the memory itself",
        Laid(
            files={"proc/meminfo": meminfo(15.2, 12, 7.6)}
            | {"proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 7969177 0 5\n"}
        ),
    ),
    ("memory-low", "warning", "GiB can be had", Laid(files={"proc/meminfo": meminfo(15.2, 1.2)})),
    ("memory-low", "warning", "can be had", Laid("workstation", {"proc/meminfo": meminfo(125, 0.5)})),
    ("power-mode", "note", "the power mode is 15W", Laid(files={"var/lib/nvpmodel/status": "pmode:0000"})),
    (
        "jetson-clocks",
        "note",
        "moves between 306 and 1173 MHz",
        Laid(files={"sys/class/devfreq/17000000.gpu/min_freq": "306000000\n"}),
    ),
    (
        "l4t-refuses-large-allocations",
        "error",
        r"36\.4\.7 refuses large allocations",
        Laid(files={"etc/nv_tegra_release": release("36.4.7")}),
    ),
    ("l4t-keeps-memory", "note", "keeps memory", Laid("thor", {"etc/nv_tegra_release": release("39.2.1")})),
    (
        "l4t-reboots-on-large-allocations",
        "warning",
        "can reboot the device",
        Laid("thor", {"etc/nv_tegra_release": release("39.2.1")}),
    ),
    (
        "thor-normalisation-crash",
        "warning",
        r"TensorRT 10\.13\.3 on Thor",
        Laid("thor", dict.fromkeys(tensorrt(ARM, "10.16.2")) | tensorrt(ARM, "10.13.3")),
    ),
    (
        "tensorrt-11-on-jetson",
        "warning",
        r"TensorRT 11\.1\.0 is in use on a Jetson",
        Laid("thor", dict.fromkeys(tensorrt(ARM, "10.16.2")) | tensorrt(ARM, "11.1.0")),
    ),
    ("torch-without-cudss", "error", r"libcudss\.so\.0", Laid(files=installed("torch", "2.9.1"))),
    (
        "driver-too-old",
        "error",
        "tensorrt-cu13-libs needs CUDA 13, so a driver from 580 on, and 540.4.0 is loaded",
        Laid(files=installed("tensorrt-cu13-libs", "10.13.3.9")),
    ),
    (
        "driver-too-old",
        "error",
        r"torch 2\.11\.0\+cu130 needs CUDA 13",
        Laid(files=installed("torch", "2.11.0+cu130")),
    ),
    (
        "driver-and-libcuda",
        "error",
        r"580\.82\.07 loaded, and .* is of 580\.95\.05",
        Laid(
            "workstation",
            {f"{X86}/libcuda.so.580.82.07": None, f"{X86}/libcuda.so.580.95.05": "library"}
            | {f"{X86}/libcuda.so.1": "-> libcuda.so.580.95.05"},
        ),
    ),
    (
        "cgroup-memory",
        "warning",
        r"allows 2\.00 GiB of 15\.20 GiB, 1\.00 GiB are left",
        Laid(files=cgroup(memory__max=str(2 << 30), memory__current=str(1 << 30))),
    ),
    ("cgroup-memory", "note", r"allows 8\.00 GiB", Laid(files=cgroup(memory__max=str(8 << 30), memory__current="0"))),
    ("cgroup-cpus", "note", r"allows 1\.5 CPUs", Laid(files=cgroup(cpu__max="150000 100000"))),
    ("trt-disable-myelin", "warning", "TRT_DISABLE_MYELIN is set to '1'", Laid(environ={"TRT_DISABLE_MYELIN": "1"})),
    (
        "expandable-segments",
        "warning",
        "PYTORCH_CUDA_ALLOC_CONF asks for expandable_segments",
        Laid(environ={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,garbage_collection_threshold:0.6"}),
    ),
    ("no-visible-devices", "error", "hides every GPU", Laid(environ={"CUDA_VISIBLE_DEVICES": ""})),
    ("launch-blocking", "warning", "CUDA_LAUNCH_BLOCKING is set", Laid(environ={"CUDA_LAUNCH_BLOCKING": "1"})),
    ("tensorrt-path", "error", "does not exist", Laid(environ={"JETRT_TENSORRT_PATH": "ROOT/no/such"})),
    ("debug-build", "warning", "debug build", Laid(profile="debug")),
    (
        "container-without-gpu",
        "error",
        "no libcuda.so.1, and NVIDIA_VISIBLE_DEVICES is not set",
        Laid(files={**NO_CUDA, ".dockerenv": ""}),
    ),
    ("libcuda-missing", "error", "no libcuda.so.1", Laid(files=NO_CUDA)),
    ("tensorrt-missing", "error", "no libnvinfer", Laid(files=NO_TENSORRT)),
    (
        "tensorrt-unsupported",
        "error",
        r"the only TensorRT is 8\.6\.2 in",
        Laid(files={**NO_TENSORRT, **tensorrt(ARM, "8.6.2")}),
    ),
    (
        "externally-managed",
        "note",
        "PEP 668",
        Laid(python={"externally_managed": True, "venv_sees_system": None}),
    ),
    (
        "torch-without-cuda",
        "warning",
        r"torch 2\.8\.0 is a build without CUDA",
        Laid(files=installed("torch", "2.8.0") | {"venv/torch/lib/libtorch_cpu.so": "x"}),
    ),
    (
        "overlapping-packages",
        "warning",
        "onnxruntime and onnxruntime-gpu are installed together",
        Laid(files=installed("onnxruntime", "1.23.0") | installed("onnxruntime-gpu", "1.23.0")),
    ),
    ("plan-damaged", "error", "truncated|no TensorRT plan", Laid(folder={"m.engine": b"not a plan at all"})),
]


@pytest.mark.parametrize("kind", machines.TREES)
def test_a_machine_in_good_order(tmp_path: Path, kind: str) -> None:
    report = Laid(kind).report(tmp_path)
    assert report.findings == ()
    assert report.unchecked == ()
    assert (report.code, report.text()) == (0, "nothing found")


@pytest.mark.parametrize(("name", "severity", "words", "board"), FOUND, ids=[f"{f[0]}-{f[1]}" for f in FOUND])
def test_found(tmp_path: Path, name: str, severity: str, words: str, board: Laid) -> None:
    report = board.report(tmp_path)
    (finding,) = [f for f in report.findings if f.id == name]
    assert finding.severity == severity
    assert re.search(words, finding.what), finding.what
    assert finding.why
    assert finding.fix
    assert all(finding.fix)
    assert report.unchecked == ()
    assert report.code == int(any(f.severity != "note" for f in report.findings))


def test_every_check_is_tested() -> None:
    """Every id that the code or the table can give has a case above, or a test of its own."""
    folder = Path(doctor.__file__).parent
    sources = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*_checks.py"))
    ids = set(re.findall(r'Finding\(\s*"([\w-]+)"', sources)) | {entry["id"] for entry in release_checks.entries()}
    assert ids == {case[0] for case in FOUND} | OWN


#: Findings whose tests follow below.
OWN = {"import-fails", "plan-of-another-machine", "plan-of-another-setup", "no-gpu"}


#: Near misses: (the finding that must not be made, the machine).
NOT_FOUND: list[tuple[str, Laid]] = [
    ("numpy-abi", Laid(files=CV2)),  # numpy 1
    ("numpy-abi", Laid(files={"venv/cv2/cv2.abi3.so": NUMPY2} | NUMPY_2)),
    ("numpy-requirement", Laid(files=installed("gtsam", "4.2", ["numpy<2"]))),
    ("numpy-requirement", Laid(files=NUMPY_2 | installed("gtsam", "4.2", ['numpy<2; extra == "old"', "numpy-stl<1"]))),
    ("venv-without-system-packages", Laid(files=APT)),
    ("pycuda-missing", Laid(folder={"bench.py": "# import pycuda.autoinit\n"})),
    ("pycuda-missing", Laid(files=installed("pycuda", "2025.1"), folder={"bench.py": "import pycuda.autoinit\n"})),
    ("tensorrt-binding-and-library", Laid(files=installed("tensorrt", "10.3.0"))),
    (
        "mixed-tensorrt",
        Laid(files=tensorrt(OTHER, "10.7.0"), environ={"LD_LIBRARY_PATH": f"ROOT/{OTHER}"}),
    ),
    (
        "builder-resource-missing",
        Laid(
            files={f"{ARM}/libnvinfer_builder_resource.so.10.3.0": None}
            | {f"{ARM}/libnvinfer_builder_resource_sm86.so.10.3.0": "library"}
        ),
    ),
    ("stub-libcuda", Laid(files={"usr/local/cuda/lib64/stubs/libcuda.so": "stub"})),
    ("swap-missing", Laid("thor")),
    ("memory-low", Laid("workstation", {"proc/meminfo": meminfo(125, 2)})),
    ("power-mode", Laid(files={"var/lib/nvpmodel/status": None})),
    ("cgroup-memory", Laid(files=cgroup(memory__max="max", memory__current="5"))),
    ("cgroup-memory", Laid(files=cgroup(memory__max=str(1 << 50), memory__current="5"))),
    ("cgroup-cpus", Laid(files=cgroup(cpu__max="max 100000"))),
    ("cgroup-cpus", Laid(files=cgroup(cpu__max="800000 100000"))),
    ("expandable-segments", Laid("workstation", environ={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})),
    ("expandable-segments", Laid(environ={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"})),
    ("no-visible-devices", Laid(environ={"CUDA_VISIBLE_DEVICES": "0"})),
    ("launch-blocking", Laid(environ={"CUDA_LAUNCH_BLOCKING": "0"})),
    ("tensorrt-path", Laid(environ={"JETRT_TENSORRT_PATH": f"ROOT/{ARM}"})),
    ("driver-too-old", Laid("workstation", installed("torch", "2.11.0+cu130"))),
    ("driver-too-old", Laid(files=installed("torch", "2.8.0+cu126"))),
    ("thor-normalisation-crash", Laid()),
    ("torch-without-cudss", Laid(files=installed("torch", "2.9.1") | installed("nvidia-cudss-cu12", "0.6"))),
    ("torch-without-cuda", Laid(files=installed("torch", "2.8.0") | {"venv/torch/lib/libtorch_cuda.so": "x"})),
    ("externally-managed", Laid(python={"externally_managed": True})),
    ("container-without-gpu", Laid(files={".dockerenv": ""})),
]


@pytest.mark.parametrize(("name", "board"), NOT_FOUND, ids=[f"{i}-{case[0]}" for i, case in enumerate(NOT_FOUND)])
def test_not_found(tmp_path: Path, name: str, board: Laid) -> None:
    report = board.report(tmp_path)
    assert name not in [f.id for f in report.findings], report.text()
    assert report.unchecked == ()


def test_fixes_are_exact(tmp_path: Path) -> None:
    def fix(name: str, board: Laid, where: str) -> tuple[str, ...]:
        return next(f.fix for f in board.report(tmp_path / where).findings if f.id == name)

    python = tmp_path / "a/venv/bin/python"
    assert fix("numpy-abi", Laid(files=CV2 | NUMPY_2), "a") == (f"{python} -m pip install 'numpy<2'",)
    stubs = Laid(files={"stubs/libcuda.so": "stub"}, environ={"LD_LIBRARY_PATH": "/keep:ROOT/stubs:/more"})
    assert fix("stub-libcuda", stubs, "b") == ("export LD_LIBRARY_PATH=/keep:/more",)
    mode = Laid(files={"var/lib/nvpmodel/status": "pmode:0001", "etc/nvpmodel.conf": CONF})
    assert fix("power-mode", mode, "c") == ("sudo nvpmodel -m 2  # MAXN_SUPER",)
    segments = Laid(environ={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:64"})
    assert fix("expandable-segments", segments, "d") == ("export PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64",)
    assert fix("no-visible-devices", Laid(environ={"CUDA_VISIBLE_DEVICES": "-1"}), "e") == (
        "unset CUDA_VISIBLE_DEVICES",
    )


# Plans ----------------------------------------------------------------------------------------------------------------


def written(folder: Path, **changes: Any) -> Path:
    """A plan with a manifest."""
    machine = replace(machines.MACHINES["orin"], **changes.pop("machine", {}))
    path = machines.plan(folder, version=machine.tensorrt)
    manifest = replace(MANIFEST, engine=EngineFile.of(path), machine=machine, **changes)
    Manifest.path_for(path).write_text(manifest.to_json())
    return path


def examined(root: Path, tmp: Path, **more: Any) -> doctor.Report:
    here = more.pop("here", machines.MACHINES["orin"])
    facts_ = Laid().facts(root, **more)
    return doctor.check(replace(facts_, plans=tuple(facts._plans(tmp)), machine=here))


def test_plans_that_run_here(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    folder.mkdir()
    written(folder)
    assert examined(tmp_path / "root", folder).findings == ()


def test_a_plan_of_another_machine(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    folder.mkdir()
    written(folder, machine={"sm_count": 16, "tensorrt": "10.7.0.23"})
    (finding,) = examined(tmp_path / "root", folder).findings
    assert finding.id == "plan-of-another-machine"
    assert "sm_count is 8 here and 16 in the plan" in finding.what
    assert "tensorrt is 10.3.0.30 here and 10.7.0.23 in the plan" in finding.what
    assert finding.fix[0].startswith("jetrt build --onnx 'my model.onnx'")


def test_a_plan_of_another_tensorrt_without_a_manifest(tmp_path: Path) -> None:
    """Files alone tell it: the header's version, and the name of the library."""
    folder = tmp_path / "plans"
    folder.mkdir()
    machines.plan(folder, version="10.13.3.9")
    (finding,) = examined(tmp_path / "root", folder, here=None).findings
    assert (finding.id, finding.severity) == ("plan-of-another-machine", "error")
    assert "TensorRT is 10.3.0 here and 10.13.3.9 in the plan" in finding.what
    assert finding.fix == (f"jetrt build --onnx MODEL.onnx --engine {folder / 'm.engine'} --rebuild",)


def test_a_plan_of_another_architecture_without_asking_cuda(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    folder.mkdir()
    written(folder, machine={"arch": "x86_64", "sm": 90})
    (finding,) = examined(tmp_path / "root", folder, here=None).findings
    assert "arch is aarch64 here and x86_64 in the plan; sm is 87 here and 90 in the plan" in finding.what


def test_a_version_compatible_plan_runs_on_a_newer_tensorrt(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    folder.mkdir()
    written(folder, machine={"tensorrt": "10.1.0.27"}, version_compatible=True)
    assert examined(tmp_path / "root", folder, here=None).findings == ()


def test_a_plan_of_another_setup(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    folder.mkdir()
    written(folder, machine={"power_mode": "15W"})
    (finding,) = examined(tmp_path / "root", folder).findings
    assert (finding.id, finding.severity) == ("plan-of-another-setup", "note")
    assert "power_mode is MAXN_SUPER here and was 15W" in finding.what


def test_a_plan_whose_manifest_is_anothers(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    folder.mkdir()
    path = written(folder)
    path.write_bytes(path.read_bytes() + b"more")
    (finding,) = examined(tmp_path / "root", folder).findings
    assert finding.id == "plan-damaged"
    assert "its manifest was written for a plan of" in finding.what
    Manifest.path_for(path).write_text("{")
    (finding,) = examined(tmp_path / "other", folder).findings
    assert finding.id == "plan-damaged"


# Processes of their own -----------------------------------------------------------------------------------------------


def test_what_cuda_says(tmp_path: Path) -> None:
    """On the stand-ins: a child process asks them."""
    assert children.machine().gpu == "Fake GPU 0"
    facts_ = Laid().facts(tmp_path, deep=True, machine=_fails)
    assert facts_.machine_problem == "no CUDA"
    assert ("whether the plans fit this GPU", "no CUDA") in doctor.check(facts_).unchecked


def _fails() -> Any:
    raise children.ChildError("no CUDA")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("", ""),
        ("raise ImportError('libcudss.so.0: cannot open')", "ImportError: libcudss.so.0: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process was ended by signal 11"),
        (
            "import sys; print('A module that was compiled using NumPy 1.x cannot be run in', file=sys.stderr)",
            "it was compiled for numpy 1 and this is numpy 2",
        ),
        ("import time; time.sleep(60)", "took longer than 1 s"),
    ],
)
def test_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, problem: str) -> None:
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = children._import("broken", timeout=1 if "sleep" in code else 20)
    assert problem in found
    assert bool(found) is bool(problem)
    facts_ = replace(Laid().facts(tmp_path / "root"), imports={"broken": found})
    assert [f.id for f in doctor.check(facts_).findings] == (["import-fails"] if problem else [])


# The whole ------------------------------------------------------------------------------------------------------------


def test_a_check_that_fails_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("surprise")

    monkeypatch.setattr(library_checks, "CHECKS", (broken,))
    report = Laid(environ={"CUDA_LAUNCH_BLOCKING": "1"}).report(tmp_path)
    assert [f.id for f in report.findings] == ["launch-blocking"]
    assert report.unchecked == (("broken", "RuntimeError: surprise"),)
    assert "not checked: broken: RuntimeError: surprise" in report.text()


def test_ignored_findings_are_told(tmp_path: Path) -> None:
    facts_ = Laid(environ={"CUDA_LAUNCH_BLOCKING": "1"}).facts(tmp_path)
    report = doctor.check(facts_, ["launch-blocking", "no-such"])
    assert (report.findings, report.ignored, report.code) == ((), ("launch-blocking",), 0)
    assert report.text() == "nothing found (1 ignored)"


def test_unreadable_and_strange_files(tmp_path: Path) -> None:
    """Nothing that a file of the system holds stops the rest."""
    strange = {
        "proc/meminfo": "\0\xff garbage",
        "etc/nv_tegra_release": "",
        "etc/nvpmodel.conf": "< POWER_MODEL",
        "var/lib/nvpmodel/status": "pmode:99999999999999",
        "proc/swaps": "/dev/zram0",
        "proc/self/cgroup": "0::/../../..\n:::\n",
        "sys/fs/cgroup/memory.max": "-5",
        "sys/fs/cgroup/cpu.max": "5 0",
        "sys/class/devfreq/17000000.gpu/min_freq": "fast",
        "var/lib/dpkg/status": "Package: libnvinfer10\n",
        "venv/bad-1.0.dist-info/METADATA": "\xff",
        f"{ARM}/libnvinfer.so.10": "-> nowhere",
        **{name: None for name in ORIN if name.startswith(f"{ARM}/libnvinfer.so")},
    }
    strange[f"{ARM}/libnvinfer.so.10"] = "-> nowhere"
    report = Laid(files=strange).report(tmp_path)
    assert report.unchecked == ()
    assert "tensorrt-missing" in [f.id for f in report.findings]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`jetrt doctor` sees this machine in its own folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "jetrt-doctor-1"
    assert found["code"] == code
    assert found["unchecked"] == []
    ids = [f["id"] for f in found["findings"]]
    assert "debug-build" in ids
    assert main(["doctor", *(word for f in found["findings"] for word in ("--ignore", f["id"]))]) == 0
    assert capsys.readouterr().out == f"nothing found ({len(set(ids))} ignored)\n"
    (here / "m.engine").write_bytes(b"PK\x03\x04 a checkpoint")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "error: plan-damaged: " in printed
    assert "zip archive" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "jetrt: nowhere is not a folder: give the one that has your plans and scripts"),
        (["--include", "x.log"], "jetrt: --include puts files into a bundle: give --bundle FILE.tar.gz too"),
        (["--bundle", "report.zip"], "jetrt: --bundle report.zip: the name must end in .tar.gz"),
    ],
)
def test_a_command_line_that_makes_no_sense(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["doctor", *words]) == 2
    assert capsys.readouterr().err.strip() == message


# The bundle -----------------------------------------------------------------------------------------------------------

SECRETS = {
    "NVIDIA_API_KEY": "nvapi-AbCdEfGhIjKlMnOpQr",
    "HF_TOKEN": "hf_abcdefghijklmnopqrs",
    "MY_PASSWORD": 'corr"ect-horse',
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "DATABASE_DSN": "postgres://bob:hunter2@db",
    "BUILD_TAG": "jenkins-job-4711",
    "CUDA_CACHE_URL": "https://bob:hunter22@cache.example/x",
}
PRIVATE = ["alice", "robot-17", "alice@example.org", *SECRETS.values(), "hunter2", 'corr\\"ect', "00:11:22:33:44:55"]


def unpacked(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {
            member.name: opened.read() for member in archive.getmembers() if (opened := archive.extractfile(member))
        }


def test_no_secret_is_in_the_bundle(tmp_path: Path) -> None:
    environ = {**SECRETS, "HOME": "/home/alice", "USER": "alice", "HOSTNAME": "robot-17"}
    board = Laid(
        files={"etc/os-release": 'PRETTY_NAME="robot-17 of alice"\n', "proc/version": "Linux (alice@example.org)\n"},
        environ={**environ, "LD_LIBRARY_PATH": "/home/alice/lib", "PYTHONPATH": "/home/carol/src"},
        folder={"alice.engine": b"nonsense"},
    )
    log = tmp_path / "alice-build.log"
    log.write_text(
        f"user alice at robot-17, key {SECRETS['NVIDIA_API_KEY']}\nPOST https://u:{SECRETS['HF_TOKEN']}@x.io/p?token=abc1234567\n"
        f"mac 00:11:22:33:44:55 password = {SECRETS['MY_PASSWORD']}\nAuthorization: Bearer abcdef0123456789\n"
        "GPU-11111111-2222-3333-4444-555555555555\n"
    )
    facts_ = board.facts(tmp_path / "root", deep=False)
    report = doctor.check(facts_)
    path = tmp_path / "report.tar.gz"
    scrub = bundle.scrubber(facts_.environ, user="alice", host="robot-17")
    bundle.write_bundle(path, facts_, report, include=[log], root=tmp_path / "root", search=[], scrub=scrub)
    contents = unpacked(path)
    everything = b"\n".join([*contents.values(), *(name.encode() for name in contents)]).decode(errors="replace")
    for word in [*PRIVATE, "carol", "abc1234567", "abcdef0123456789", "GPU-11111111"]:
        assert word not in everything, word
    assert "jenkins" not in everything
    # What is not secret is still there.
    assert "NVIDIA Jetson Orin NX" in everything
    assert "plan-damaged" in everything
    assert "[hidden]" in contents["report/included/0-USER-build.log"].decode()


def test_what_the_bundle_holds(tmp_path: Path) -> None:
    facts_ = replace(Laid("thor").facts(tmp_path / "root"), machine=machines.MACHINES["thor"])
    path = tmp_path / "report.tar.gz"
    model = tmp_path / "m.onnx"
    model.write_bytes(b"\x08\x07\0binary")
    bundle.write_bundle(path, facts_, doctor.check(facts_), include=[model], root=tmp_path / "root", search=[])
    contents = unpacked(path)
    text = contents["report/REPORT.md"].decode()
    for row in (
        "| Platform | NVIDIA Jetson AGX Thor Developer Kit |",
        "| CUDA compute capability | 11.0 |",
        "| Driver | 595.78 |",
        "| Jetson Linux | 39.2.0 |",
        "| TensorRT | 10.16.2.10 |",
    ):
        assert row in text
    assert contents["report/included/0-m.onnx"] == model.read_bytes()
    assert json.loads(contents["report/gpu.json"])["sm_count"] == 20
    assert b"R39" in contents["report/system/etc/nv_tegra_release"]
    assert [p.name for p in tmp_path.iterdir() if "report" in p.name] == ["report.tar.gz"]


def test_the_bundle_of_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--bundle", "x.tar.gz"])
    told = capsys.readouterr().out
    assert "x.tar.gz: " in told
    assert "Look through them before you send it: REPORT.md" in told
    assert "x/doctor.json" in unpacked(here / "x.tar.gz")
    assert main(["doctor", "--bundle", "no/such/x.tar.gz"]) == 1
    assert "FileNotFoundError" in capsys.readouterr().err
    assert main(["doctor", "--bundle", "y.tar.gz", "--include", "no.log"]) == 1
    assert "no.log" in capsys.readouterr().err
    assert not (here / "y.tar.gz").exists()


@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_filtering_any_text(content: str) -> None:
    scrub = bundle.scrubber({"MY_TOKEN": "s3cr3t-value", "HOME": "/home/alice"}, user="alice", host="robot-17")
    once = scrub(f"{content} s3cr3t-value /home/alice/x")
    assert "s3cr3t-value" not in once
    assert "alice" not in once.rsplit(" ", 2)[-1]


@pytest.mark.parametrize("name", ["NVIDIA_API_KEY", "TORCH_HUB_TOKEN", "JETRT_PASSWORD", "CUDA_AUTH", "BUILD_SECRET"])
def test_variables_that_hold_secrets_are_never_shown(name: str) -> None:
    assert variables.shown_variables({name: "value"}) == {}
    assert variables.switches({name: "value"}) == {}


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.text(max_size=5))
def test_versions(parts: list[int], rest: str) -> None:
    text = ".".join(map(str, parts))
    assert numbers(text) == tuple(parts)
    assert not differ(text, text)
    assert not differ(text, None)
    assert differ(f"{parts[0]}.1", f"{parts[0] + 1}.1")
    assert numbers(f"x{rest}") == ()


def test_no_gpu_is_a_note(tmp_path: Path) -> None:
    files = {name: None for name in WORKSTATION if "proc/driver" in name}
    report = Laid("workstation", files).report(tmp_path)
    assert [(f.id, f.severity) for f in report.findings] == [("no-gpu", "note")]
    assert report.code == 0


# The page -------------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs/tools.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_page_lists_every_finding() -> None:
    table = section("doctor").partition("| finding |")[2].partition("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`([a-z0-9-]+)`", row.split("|")[1])}
    assert listed == {case[0] for case in FOUND} | OWN


@pytest.mark.parametrize("command", ["env", "doctor", "plan"])
def test_the_page_has_the_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out)) - {"--help"}
    told = set(re.findall(r"(?m)^\| `(--[a-z][\w-]*)", section(command)))
    assert told == known
