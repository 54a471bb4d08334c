"""Which machine this is, from the files of boards as their owners recorded them."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetrt import platform
from jetrt.platform import Platform, identify
from jetrt.provenance import Machine

MEMORY = (
    "MemTotal:        7800504 kB\nMemFree:          201004 kB\nMemAvailable:    5242880 kB\nHugePages_Total:       0\n"
)
GIB = 1 << 30


def nvrm(module: str) -> str:
    return f"NVRM version: NVIDIA UNIX {module}\nGCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04.2)\n"


def release(major: int, revision: str, rest: str = "BOARD: generic, EABI: aarch64, DATE: Fri Aug 7 05:54:22 AM") -> str:
    return f"# R{major} (release), REVISION: {revision}, GCID: 42132812, {rest} UTC 2026\n# KERNEL_VARIANT: oot\n"


NVPMODEL = """\
# < POWER_MODEL ID=2 NAME=COMMENTED >
< PARAM TYPE=FILE NAME=CPU_ONLINE >
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
TPC_POWER_GATING TPC_PG_MASK 240
  <  POWER_MODEL ID=2  NAME=MAXN_SUPER  >
< PM_CONFIG DEFAULT=1 >
"""

ORIN_NANO_JP6 = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "etc/nv_tegra_release": release(36, "4.7"),
    "proc/driver/nvidia/version": nvrm("Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain@mobile)"),
    "var/lib/nvpmodel/status": "pmode:0002",
    "etc/nvpmodel.conf": NVPMODEL,
    "proc/meminfo": MEMORY,
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
}
ORIN_AGX_JP5 = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0000\0nvidia,tegra234\0",
    "etc/nv_tegra_release": release(35, "4.1", "BOARD: t186ref, EABI: aarch64, DATE: Tue Aug  1 19:57:35"),
    "var/lib/nvpmodel/status": "pmode:0000 fmode:quiet\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=3 NAME=MODE_50W >\n",
}
THOR_R39 = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    "etc/nv_tegra_release": release(39, "2.1"),
    "proc/driver/nvidia/version": nvrm("Open Kernel Module for aarch64  595.78  Release Build  (dvs-builder@U22)"),
    "var/lib/nvpmodel/status": "pmode:0001\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
}
SPARK = {
    "sys/class/dmi/id/product_name": "NVIDIA_DGX_Spark\n",
    "proc/driver/nvidia/version": nvrm("Open Kernel Module for aarch64  580.95.05  Release Build  (dvs-builder@U22)"),
    # The image of a container for Jetsons.
    "etc/nv_tegra_release": release(36, "4.7"),
}
X86 = {
    "sys/class/dmi/id/product_name": "ThinkStation P620\n",
    "proc/driver/nvidia/version": nvrm("x86_64 Kernel Module  550.135  Fri Jan 10 20:00:00 UTC 2025"),
    "etc/nv_tegra_release": release(36, "4.7"),
}


def lay_out(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "arch", "expected"),
    [
        pytest.param(
            ORIN_NANO_JP6,
            "aarch64",
            Platform(
                "aarch64",
                board="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
                l4t="36.4.7",
                jetpack="6.2.1",
                power_mode="MAXN_SUPER",
                driver="540.4.0",
                cuda="12.6.11",
                memory_total=7800504 << 10,
                memory_available=5 * GIB,
                integrated=True,
            ),
            id="orin_nano_jp6",
        ),
        pytest.param(
            ORIN_AGX_JP5,
            "aarch64",
            Platform(
                "aarch64",
                board="NVIDIA Jetson AGX Orin Developer Kit",
                l4t="35.4.1",
                jetpack="5.1.2",
                power_mode="MAXN",
                integrated=True,
            ),
            id="orin_agx_jp5",
        ),
        pytest.param(
            THOR_R39,
            "aarch64",
            Platform(
                "aarch64",
                board="NVIDIA Jetson AGX Thor Developer Kit",
                l4t="39.2.1",
                jetpack="7.2.1",
                power_mode="120W",
                driver="595.78",
                integrated=True,
            ),
            id="thor_r39",
        ),
        pytest.param(
            SPARK,
            "aarch64",
            Platform("aarch64", board="NVIDIA_DGX_Spark", driver="580.95.05", integrated=True),
            id="spark",
        ),
        pytest.param(X86, "x86_64", Platform("x86_64", board="ThinkStation P620", driver="550.135"), id="x86"),
        pytest.param({}, "x86_64", Platform("x86_64"), id="nothing"),
    ],
)
def test_boards(tmp_path: Path, files: dict[str, str], arch: str, expected: Platform) -> None:
    assert identify(lay_out(tmp_path, files), arch=arch) == expected


@pytest.mark.parametrize(
    ("name", "text", "field", "expected"),
    [
        ("etc/nv_tegra_release", release(36, "5.9"), "l4t", "36.5.9"),
        ("etc/nv_tegra_release", release(36, "5.9"), "jetpack", None),  # not in the table: unknown, no neighbour of it
        ("etc/nv_tegra_release", release(38, "2"), "jetpack", "7.0"),
        ("etc/nv_tegra_release", "R36\n", "l4t", None),
        ("etc/nv_tegra_release", "", "l4t", None),
        ("var/lib/nvpmodel/status", "pmode:0007", "power_mode", None),  # the configuration has no such mode
        ("var/lib/nvpmodel/status", "NVPM ERROR: no mode", "power_mode", None),
        ("etc/nvpmodel.conf", "", "power_mode", None),
        ("var/lib/nvpmodel/status", "pmode:" + "9" * 5000, "power_mode", None),
        ("etc/nvpmodel.conf", "< POWER_MODEL ID=2 NAME=<b> >", "power_mode", None),
        ("proc/driver/nvidia/version", "N/A\n", "driver", None),
        ("proc/meminfo", "MemTotal: lots\n", "memory_total", None),
        ("proc/meminfo", f"MemTotal: {'9' * 5000} kB\n", "memory_total", None),
        ("usr/local/cuda/version.json", '{"cuda": {"version": 12}}', "cuda", None),
        ("usr/local/cuda/version.json", '["cuda"]', "cuda", None),
        ("usr/local/cuda/version.json", "[" * 100_000, "cuda", None),
        ("proc/device-tree/model", "\0\0", "board", None),
    ],
)
def test_what_a_file_does_not_say_is_unknown(tmp_path: Path, name: str, text: str, field: str, expected: Any) -> None:
    root = lay_out(tmp_path, {**ORIN_NANO_JP6, name: text})
    assert getattr(identify(root, arch="aarch64"), field) == expected


def test_the_module_says_the_driver_where_proc_does_not(tmp_path: Path) -> None:
    assert identify(lay_out(tmp_path, {"sys/module/nvidia/version": "580.82.07\n"})).driver == "580.82.07"
    assert identify(lay_out(tmp_path, {"sys/module/nvidia/version": "none\n"})).driver is None


def test_jetson_is_known_without_its_release_file(tmp_path: Path) -> None:
    files = {name: text for name, text in ORIN_NANO_JP6.items() if name != "etc/nv_tegra_release"}
    found = identify(lay_out(tmp_path, files), arch="aarch64")
    assert (found.l4t, found.jetpack, found.integrated) == (None, None, True)


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link", "unreadable"])
def test_a_source_that_cannot_be_read_is_unknown_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    lay_out(tmp_path, ORIN_NANO_JP6)
    for name in ORIN_NANO_JP6:
        path = tmp_path / name
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)  # a reader that waits for its writer hangs here
        elif kind == "folder":
            path.mkdir()
        elif kind == "dangling link":
            path.symlink_to(tmp_path / "nowhere")
        elif os.geteuid() != 0:
            path.write_text("secret")
            path.chmod(0)
    found: list[Platform] = []
    thread = threading.Thread(target=lambda: found.append(identify(tmp_path, arch="aarch64")), daemon=True)
    thread.start()
    thread.join(5)
    assert found == [Platform("aarch64")]


def test_a_gated_sensor_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What reading sysfs gives for a part that has no power.
    lay_out(tmp_path, ORIN_NANO_JP6)

    def gated(fd: int, length: int) -> bytes:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(platform.os, "read", gated)
    assert identify(tmp_path, arch="aarch64") == Platform("aarch64")


@given(st.dictionaries(st.sampled_from([*ORIN_NANO_JP6, "sys/module/nvidia/version"]), st.binary(max_size=200)))
def test_any_bytes_give_an_answer(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    root = tmp_path_factory.mktemp("root")
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    found = identify(root, arch="aarch64")
    assert found.arch == "aarch64"
    for text in (found.l4t, found.power_mode, found.driver):
        assert text is None or text.isprintable()


def test_here() -> None:
    found = identify()
    assert found.arch == os.uname().machine
    assert found.memory_total is not None
    assert found.memory_available is not None
    assert 0 < found.memory_available <= found.memory_total


CORE = {
    "tensorrt": "10.3.0.30",
    "cuda": "12.6",
    "sm": 87,
    "sm_count": 8,
    "gpu": "Orin",
    "memory_bytes": 7_987_728_384,
    "integrated": True,
}


def test_a_machine_is_what_the_core_and_the_files_say(tmp_path: Path) -> None:
    asked = []

    def core(device: int) -> dict[str, Any]:
        asked.append(device)
        return CORE

    machine = Machine.here(1, core=core, root=lay_out(tmp_path, ORIN_NANO_JP6))
    assert asked == [1]
    assert machine == Machine(
        tensorrt="10.3.0.30",
        cuda="12.6",
        driver="540.4.0",
        sm=87,
        sm_count=8,
        gpu="Orin",
        arch=os.uname().machine,
        l4t="36.4.7" if os.uname().machine == "aarch64" else None,
        jetpack="6.2.1" if os.uname().machine == "aarch64" else None,
        power_mode="MAXN_SUPER",
        memory_bytes=7_987_728_384,
    )
    assert Machine.here(core=lambda _: {**CORE, "driver": "600.1"}, root=tmp_path).driver == "600.1"


def test_the_table_of_releases() -> None:
    assert list(platform.JETPACK) == sorted(platform.JETPACK, key=lambda l4t: [int(n) for n in l4t.split(".")])
    for l4t, jetpack in platform.JETPACK.items():
        # They moved together: L4T 35 is JetPack 5, 36 is 6, 38 and 39 are 7.
        assert jetpack[0] == {"35": "5", "36": "6", "38": "7", "39": "7"}[l4t[:2]]
