"""`jetrt env`: what files tell about a machine, quickly and without opening anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import machines
import pytest
from machines import ARM, X86, Laid, installed, tensorrt

import fakes
from jetrt import environment
from jetrt.cli import main
from jetrt.environment import used_by_jetrt, used_by_loader


def test_an_orin(tmp_path: Path) -> None:
    found = Laid().environment(tmp_path)
    assert found.tegra
    assert (found.platform.l4t, found.platform.jetpack, found.platform.power_mode) == ("36.5.0", "6.2.2", "MAXN_SUPER")
    assert [(gpu.name, gpu.bus, gpu.sm) for gpu in found.gpus] == [("Orin", None, 87)]
    assert found.system.toolkits == {str(tmp_path / "usr/local/cuda-12.6"): "12.6.11"}
    assert found.system_packages == {"libnvinfer10": "10.3.0.30-1+cuda12.5"}
    assert found.packages["numpy"].version == "1.26.4"
    assert found.memory.swap_total == 8 << 30
    library = used_by_jetrt(found.libraries)
    assert library is not None
    assert (library.version, library.found_by) == ("10.3.0", "loader")
    assert library.path == str(tmp_path / ARM / "libnvinfer.so.10")
    assert found.power.gpu_clock_max == 1173000000


def test_a_thor_and_a_workstation(tmp_path: Path) -> None:
    thor = Laid("thor").environment(tmp_path / "thor")
    assert [(gpu.name, gpu.bus, gpu.sm) for gpu in thor.gpus] == [("NVIDIA Thor", "0000:01:00.0", 110)]
    found = Laid("workstation").environment(tmp_path / "workstation")
    assert not found.tegra
    assert [gpu.name for gpu in found.gpus] == ["NVIDIA RTX 6000 Ada Generation"]
    library = used_by_jetrt(found.libraries)
    assert library is not None
    assert (library.version, library.found_by) == ("10.13.3.9", "pip package")  # which its file's name does not say
    (driver,) = found.libraries_of("cuda")
    assert (driver.version, driver.path) == ("580.82.07", str(tmp_path / "workstation" / X86 / "libcuda.so.1"))
    assert "11111111" not in json.dumps(found.to_mapping())  # no GPU's UUID


def test_a_gpu_without_a_driver(tmp_path: Path) -> None:
    files = {name: None for name in machines.WORKSTATION if "proc/driver" in name}
    device = "sys/bus/pci/devices/0000:65:00.0"
    bus = {f"{device}/vendor": "0x10de\n", f"{device}/class": "0x030000\n", f"{device}/device": "0x26b1\n"}
    found = Laid("workstation", files | bus).environment(tmp_path)
    assert [(gpu.name, gpu.bus) for gpu in found.gpus] == [("NVIDIA PCI device 0x26b1", "0000:65:00.0")]


def test_the_order_of_the_search(tmp_path: Path) -> None:
    """As the extension has it: JETRT_TENSORRT_PATH alone, pip packages, the loader (10 before 11), system folders."""
    files: dict[str, Any] = {
        **tensorrt("opt/a", "11.1.0"),
        **tensorrt("opt/b", "10.9.0"),
        **tensorrt("usr/local/tensorrt/lib", "10.2.0"),
    }
    path = {"LD_LIBRARY_PATH": "ROOT/opt/a:ROOT/opt/b"}

    def used(where: str, more: dict[str, Any] | None = None, **environ: str) -> str | None:
        board = Laid(files={**files, **(more or {})}, environ=environ)
        library = used_by_jetrt(board.environment(tmp_path / where).libraries)
        return library.version if library else None

    assert used("1", JETRT_TENSORRT_PATH="ROOT/opt/a", **path) == "11.1.0"
    pip = {"venv/tensorrt_libs/libnvinfer.so.10": "x"} | installed("tensorrt-cu12-libs", "10.7.0")
    assert used("2", pip, **path) == "10.7.0"
    assert used("3", **path) == "10.9.0"
    assert used("4") == "10.3.0"
    assert used("5", dict.fromkeys(tensorrt(ARM, "10.3.0"))) == "10.2.0"
    # The loader itself goes by folders alone.
    libraries = Laid(files=files, environ=path).environment(tmp_path / "6").libraries
    first = used_by_loader(libraries, "nvinfer")
    assert first is not None
    assert first.version == "11.1.0"
    assert used_by_loader(libraries, "nvinfer", 10).version == "10.9.0"  # type: ignore[union-attr]


def test_the_stand_ins_are_found_as_the_extension_finds_them() -> None:
    import jetrt

    library = used_by_jetrt(environment.read().libraries)
    assert library is not None
    assert Path(library.file) == Path(jetrt.library_info()["path"]).resolve()


def test_packages(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, name in (
        (first, "torch-2.8.0.dist-info"),
        (second, "torch-2.1.0.dist-info"),
        (first, "opencv_python_headless-4.10.0.84.dist-info"),
        (second, "scipy-1.2.3-py3.10.egg-info"),
        (second, "requests-2.0.dist-info"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "METADATA").write_text("")
    (first / "numpy-9.9.dist-info").mkdir()  # what a broken uninstall leaves
    found = environment.packages.find_packages([str(first), str(second), str(tmp_path / "none"), ""])
    versions = {name: package.version for name, package in found.items()}
    assert versions["torch"] == "2.8.0"
    assert versions["opencv-python-headless"] == "4.10.0.84"
    assert versions["scipy"] == "1.2.3"
    assert "requests" not in versions
    assert "numpy" not in versions


def test_opencv_that_says_nothing_about_itself(tmp_path: Path) -> None:
    (tmp_path / "cv2").mkdir()
    (found,) = environment.packages.find_packages([str(tmp_path)]).values()
    assert (found.name, found.version) == ("opencv (no metadata)", None)


HEAVY = "{'numpy', 'torch', 'onnxruntime', 'onnx', 'cv2', 'tensorrt', 'pycuda', 'matplotlib', 'scipy'}"


def test_nothing_heavy_is_imported_or_opened() -> None:
    code = f"""
import sys
from jetrt.cli import main
assert main(["env", "--json"]) == 0
print("IMPORTED", sorted({HEAVY} & set(sys.modules)), [m for m in sys.modules if m.startswith("jetrt.builder")])
print("OPENED", [line for line in open("/proc/self/maps") if "nvinfer" in line or "libcuda" in line])
"""
    printed = fakes.run_python(code).stdout
    assert "IMPORTED [] []" in printed
    assert "OPENED []" in printed


def test_it_imports_only_its_own_command() -> None:
    code = """
import sys
from jetrt.cli import main
main(["env"])
print("COMMANDS", sorted(m for m in sys.modules if m.startswith("jetrt.commands.")))
"""
    assert "COMMANDS ['jetrt.commands.env']" in fakes.run_python(code).stdout


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD_TENSORRT_RUNTIME", "ON")
    monkeypatch.setenv("BUILD_NUMBER_OF_JENKINS", "4711")
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-verysecretverysecret")
    assert main(["env", "--json", "--output", str(tmp_path / "results/figures/env_report.txt")]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["schema"] == "jetrt-environment-1"
    assert found["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert found["switches"] == {"BUILD_NUMBER_OF_JENKINS": "[hidden]", "BUILD_TENSORRT_RUNTIME": "ON"}
    assert "secret" not in printed
    assert (tmp_path / "results/figures/env_report.txt").read_text() == printed
    assert found == environment.collect() | {"memory": found["memory"]} | {"platform": found["platform"]}
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "\npackages\n" in text
    assert "used by jetrt" in text


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["env", "--output", str(tmp_path / "file" / "report.txt")]) == 1
    assert "file" in capsys.readouterr().err
    assert main(["env", "--output", str(tmp_path)]) == 1
    assert "IsADirectoryError" in capsys.readouterr().err


def test_text_of_every_board(tmp_path: Path) -> None:
    for kind in machines.TREES:
        text = environment.text(Laid(kind).environment(tmp_path / kind))
        assert "None" not in text
        assert "used by jetrt" in text
