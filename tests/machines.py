"""Machines as file trees: an Orin with JetPack 6.2.2, a Thor with 7.2, a workstation; each in good order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fakes
from jetrt import doctor
from jetrt.environment import Environment, Python, read
from jetrt.provenance import Machine

KIB = 1 << 10
ARM = "usr/lib/aarch64-linux-gnu"
X86 = "usr/lib/x86_64-linux-gnu"
CONF = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"


def meminfo(total: float, available: float, swap: float = 8) -> str:
    """Of so many GiB."""
    rows = {"MemTotal": total, "MemFree": available / 2, "MemAvailable": available, "SwapTotal": swap}
    return "".join(f"{name}: {int(gib * KIB * KIB)} kB\n" for name, gib in rows.items())


def release(l4t: str) -> str:
    major, _, rest = l4t.partition(".")
    return f"# R{major} (release), REVISION: {rest}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Fri Aug 7 2026\n"


def tensorrt(folder: str, version: str) -> dict[str, str]:
    """Its libraries, as the packages lay them out."""
    names = ["nvinfer", "nvinfer_plugin", "nvonnxparser", "nvinfer_builder_resource"]
    files = {f"{folder}/lib{name}.so.{version}": "library" for name in names}
    major = version.split(".")[0]
    return files | {f"{folder}/lib{n}.so.{major}": f"-> lib{n}.so.{version}" for n in names if "resource" not in n}


def installed(name: str, version: str, requires: Iterable[str] = ()) -> dict[str, str]:
    """A package in the folder of the virtual environment."""
    folder = f"venv/{name.replace('-', '_')}-{version}.dist-info"
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", *(f"Requires-Dist: {r}\n" for r in requires)]
    return {f"{folder}/METADATA": "".join(lines)}


def cgroup(**files: str) -> dict[str, str]:
    return {"proc/self/cgroup": "0::/\n", **{f"sys/fs/cgroup/{n.replace('__', '.')}": t for n, t in files.items()}}


ORIN = {
    "etc/os-release": 'PRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
    "etc/nv_tegra_release": release("36.5.0"),
    "etc/nvpmodel.conf": CONF,
    "var/lib/nvpmodel/status": "pmode:0002",
    "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0000\0nvidia,tegra234\0",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n",
    "proc/meminfo": meminfo(15.2, 12),
    "proc/swaps": "Filename Type Size Used Priority\n/swapfile file 8388604 0 -2\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "1173000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1173000000\n",
    "usr/local/cuda-12.6/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
    f"{ARM}/nvidia/libcuda.so.1.1": "library",
    f"{ARM}/nvidia/libcuda.so.1": "-> libcuda.so.1.1",
    "var/lib/dpkg/status": "Package: libnvinfer10\nStatus: install ok installed\nVersion: 10.3.0.30-1+cuda12.5\n\n"
    "Package: bash\nStatus: install ok installed\nVersion: 5\n",
    **tensorrt(ARM, "10.3.0"),
    **installed("numpy", "1.26.4"),
}
THOR = {
    **{name: text for name, text in ORIN.items() if "nvinfer" not in name and "nvonnx" not in name},
    "etc/nv_tegra_release": release("39.2.0"),
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  595.78  Release Build\n",
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA Thor\n",
    "proc/meminfo": meminfo(122, 100, 0),
    "proc/swaps": "Filename Type Size Used Priority\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "",
    "sys/class/devfreq/gpu-gpc-0/min_freq": "1575000000\n",
    "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000\n",
    "var/lib/dpkg/status": "",
    **tensorrt(ARM, "10.16.2"),
}
WORKSTATION = {
    "etc/os-release": 'PRETTY_NAME="Ubuntu 24.04.2 LTS"\n',
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Fri Jan 10 2025\n",
    "proc/driver/nvidia/gpus/0000:65:00.0/information": "Model: \t\t NVIDIA RTX 6000 Ada Generation\n"
    "GPU UUID: \t GPU-11111111-2222-3333-4444-555555555555\n",
    "proc/meminfo": meminfo(125, 90, 0),
    f"{X86}/libcuda.so.580.82.07": "library",
    f"{X86}/libcuda.so.1": "-> libcuda.so.580.82.07",
    "venv/tensorrt_libs/libnvinfer.so.10": "library",
    "venv/tensorrt_libs/libnvinfer_plugin.so.10": "library",
    "venv/tensorrt_libs/libnvonnxparser.so.10": "library",
    "venv/tensorrt_libs/libnvinfer_builder_resource.so.10.13.3": "library",
    **installed("tensorrt-cu12-libs", "10.13.3.9"),
    **installed("tensorrt-cu12-bindings", "10.13.3.9"),
    **installed("numpy", "2.2.6"),
}
TREES = {"orin": ORIN, "thor": THOR, "workstation": WORKSTATION}
#: The same as CUDA sees them.
MACHINES = {
    "orin": Machine(
        "10.3.0.30", "12.6", "540.4.0", 87, 8, "Orin", "aarch64", "36.5.0", "6.2.2", "MAXN_SUPER", 16 << 30
    ),
    "thor": Machine(
        "10.16.2.10", "13.2", "595.78", 110, 20, "NVIDIA Thor", "aarch64", "39.2.0", "7.2", None, 122 << 30
    ),
    "workstation": Machine(
        "10.13.3.9",
        "13.0",
        "580.82.07",
        89,
        142,
        "NVIDIA RTX 6000 Ada Generation",
        "x86_64",
        None,
        None,
        None,
        48 << 30,
    ),
}


@dataclass(frozen=True)
class Laid:
    """A machine in a folder: `files` on top of a tree ("-> x" is a link, None: not there), and a process there."""

    kind: str = "orin"
    files: Mapping[str, str | None] = field(default_factory=dict)
    #: "ROOT" in a value is the folder.
    environ: Mapping[str, str] = field(default_factory=dict)
    #: Scripts and plans of the user's folder.
    folder: Mapping[str, str | bytes] = field(default_factory=dict)
    python: Mapping[str, Any] = field(default_factory=dict)
    #: Of jetrt's build; the tests run in a debug build.
    profile: str = "release"

    def _arguments(self, root: Path) -> dict[str, Any]:
        files = {name: text for name, text in {**TREES[self.kind], **self.files}.items() if text is not None}
        lay_out(root, files)
        cached = [f"/{name}".encode() for name in files if name.startswith("usr/lib/") and ".so." in name]
        (root / "etc").mkdir(exist_ok=True)
        (root / "etc/ld.so.cache").write_bytes(b"glibc-ld.so.cache1.1\0" + b"\0".join(cached) + b"\0")
        values = {
            "version": "3.10.12",
            "implementation": "CPython",
            "executable": str(root / "venv/bin/python"),
            "prefix": str(root / "venv"),
            "venv_sees_system": True,
            "conda": False,
            "externally_managed": False,
            "free_threaded": False,
            "system_folders": (str(root / "usr/lib/python3.10/dist-packages"),),
        }
        return {
            "root": root,
            "environ": {name: text.replace("ROOT", str(root)) for name, text in self.environ.items()},
            "path": [str(root / "venv")],
            "python": Python(**{**values, **self.python}),
            "arch": "x86_64" if self.kind == "workstation" else "aarch64",
        }

    def environment(self, root: Path) -> Environment:
        return read(**self._arguments(root))

    def facts(self, root: Path, **more: Any) -> doctor.Facts:
        arguments = self._arguments(root)
        folder = root / "work"
        folder.mkdir()
        for name, content in self.folder.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        facts = doctor.gather(folder, **arguments, **{"machine": lambda: MACHINES[self.kind], **more})
        jetrt = {**facts.environment.jetrt, "profile": self.profile}
        return replace(facts, environment=replace(facts.environment, jetrt=jetrt))

    def report(self, root: Path, **more: Any) -> doctor.Report:
        return doctor.check(self.facts(root, **more))


def lay_out(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            path.symlink_to(text[3:])
        else:
            path.write_text(text)


def plan(folder: Path, name: str = "m.engine", version: str = "10.6.0.26") -> Path:
    """A plan of the stand-in whose header names that TensorRT."""
    path = folder / name
    fakes.write_plan(path, "mlp")
    data = bytearray(path.read_bytes())
    data[24:28] = bytes(int(part) & 0xFF for part in version.split("."))
    path.write_bytes(data)
    return path
