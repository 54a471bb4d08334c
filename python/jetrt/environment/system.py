"""The operating system, memory, GPUs and power settings, from small files."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..platform import _text as small_file
from ..platform import meminfo

__all__ = ["Gpu", "Memory", "Power", "System", "find_gpus", "read_memory", "read_power", "read_system"]

#: System on chip of the device tree -> (name, SM). Of Xavier and older, jetrt runs on none.
_SOCS: Final = {"tegra194": ("Xavier", 72), "tegra234": ("Orin", 87), "tegra264": ("Thor", 110)}


@dataclass(frozen=True)
class System:
    name: str | None
    kernel: str | None
    #: Of this process, "2.35".
    glibc: str | None
    #: "docker", "podman", "kubernetes" or "container"; ``None``: no sign of one.
    container: str | None
    #: "tegra234" on Orin.
    soc: str | None
    #: Versions of CUDA toolkits, by folder.
    toolkits: Mapping[str, str]


@dataclass(frozen=True)
class Gpu:
    name: str
    #: "0000:01:00.0"; ``None`` for the GPU of an Orin, which is not on the PCI bus.
    bus: str | None
    #: Where the name tells it.
    sm: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes; ``None`` is unknown, or no limit."""

    total: int | None
    available: int | None
    free: int | None
    swap_total: int
    #: The part of the swap that lies in memory itself, compressed.
    zram_total: int
    #: The tightest limit of the cgroups that this process is in, and what they use of it.
    cgroup_limit: int | None
    cgroup_used: int | None
    #: CPUs that the cgroup allows, such as 1.5.
    cgroup_cpus: float | None


@dataclass(frozen=True)
class Power:
    """Of a Jetson."""

    #: nvpmodel's modes, number -> name, and the number of the one that is set.
    modes: Mapping[int, str]
    mode: int | None
    #: Of the GPU, in Hz: while `jetson_clocks` holds, the least is the most.
    gpu_clock_min: int | None
    gpu_clock_max: int | None


def read_system(root: str | os.PathLike[str] = "/", environ: Mapping[str, str] | None = None) -> System:
    top = Path(root)
    release = re.search(r'(?m)^PRETTY_NAME="?([^"\n]*)', small_file(top, "etc/os-release") or "")
    compatible = re.search(r"nvidia,(tegra\d+)", small_file(top, "proc/device-tree/compatible") or "")
    toolkits = {}
    for folder in sorted(top.glob("usr/local/cuda-*")):
        version = re.search(r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([\d.]+)"', small_file(folder, "version.json") or "")
        if version and not folder.is_symlink():
            toolkits[str(folder)] = version[1]
    return System(
        name=release[1] if release else None,
        kernel=small_file(top, "proc/sys/kernel/osrelease"),
        glibc=platform.libc_ver()[1] or None,
        container=_container(top, environ or {}),
        soc=compatible[1] if compatible else None,
        toolkits=toolkits,
    )


def _container(top: Path, environ: Mapping[str, str]) -> str | None:
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "kubernetes"
    if (top / "run/.containerenv").exists():
        return "podman"
    if (top / ".dockerenv").exists():
        return "docker"
    cgroup = small_file(top, "proc/1/cgroup") or ""
    return "container" if re.search(r"docker|kubepods|containerd|libpod|lxc", cgroup) else None


def find_gpus(root: str | os.PathLike[str] = "/") -> tuple[Gpu, ...]:
    top = Path(root)
    found = []
    # What the driver says of its GPUs; their UUIDs stay out.
    for file in sorted(top.glob("proc/driver/nvidia/gpus/*/information")):
        model = re.search(r"(?m)^Model:\s+(.+?)\s*$", small_file(file.parent, file.name) or "")
        name = model[1] if model else "NVIDIA GPU"
        found.append(Gpu(name, file.parent.name, _sm(name)))
    soc = re.search(r"nvidia,(tegra\d+)", small_file(top, "proc/device-tree/compatible") or "")
    if soc and soc[1] in _SOCS and not found:
        name, sm = _SOCS[soc[1]]
        found.append(Gpu(name, None, sm))
    if not found:
        # Without the driver, or in a container that was given none, the bus still shows them.
        for folder in sorted(top.glob("sys/bus/pci/devices/*")):
            display = (small_file(folder, "class") or "").startswith("0x03")
            if display and small_file(folder, "vendor") == "0x10de":
                found.append(Gpu(f"NVIDIA PCI device {small_file(folder, 'device') or 'unknown'}", folder.name))
    return tuple(found)


def _sm(name: str) -> int | None:
    known = {"Thor": 110, "GB10": 121, "Orin": 87, "H100": 90, "H200": 90, "A100": 80}
    return next((sm for word, sm in known.items() if re.search(rf"\b{word}\b", name)), None)


def read_memory(root: str | os.PathLike[str] = "/") -> Memory:
    top = Path(root)
    info = meminfo(top)
    swaps = re.findall(r"(?m)^(/\S+)\s+\S+\s+(\d+)\s", small_file(top, "proc/swaps") or "")
    limit, used, cpus = _cgroup(top)
    total = info.get("MemTotal")
    if limit is not None and total is not None and limit >= total:
        limit = used = None  # it limits nothing
    return Memory(
        total=total,
        available=info.get("MemAvailable"),
        free=info.get("MemFree"),
        swap_total=info.get("SwapTotal", 0),
        zram_total=sum(int(kib) << 10 for name, kib in swaps if "/zram" in name),
        cgroup_limit=limit,
        cgroup_used=used,
        cgroup_cpus=cpus,
    )


def _cgroup(top: Path) -> tuple[int | None, int | None, float | None]:
    """(bytes allowed, bytes used, CPUs allowed) by the tightest group above this process."""
    limits, cpus = [], []
    for folder in _groups(top):
        for most, now in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit = _number(small_file(folder, most))
            if limit is not None:
                limits.append((limit, _number(small_file(folder, now)), folder))
        quota = re.fullmatch(r"(\d+) (\d+)", small_file(folder, "cpu.max") or "")
        if quota is None:
            values = small_file(folder, "cpu.cfs_quota_us"), small_file(folder, "cpu.cfs_period_us")
            quota = re.fullmatch(r"(\d+) (\d+)", " ".join(value or "" for value in values))
        if quota and int(quota[2]):
            cpus.append(int(quota[1]) / int(quota[2]))
    tightest = min(limits, key=lambda entry: entry[0], default=(None, None, None))
    return tightest[0], tightest[1], min(cpus, default=None)


def _groups(top: Path) -> Iterator[Path]:
    for line in (small_file(top, "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            base = top / "sys/fs/cgroup"
        elif controllers in ("memory", "cpu", "cpu,cpuacct"):
            base = top / "sys/fs/cgroup" / controllers
        else:
            continue
        # In a namespace of its own, the group that is named may not be visible; the top one then is its own.
        group = base / name.strip("/")
        while True:
            yield group
            if group == base or base not in group.parents:
                break
            group = group.parent


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


def read_power(root: str | os.PathLike[str] = "/") -> Power:
    top = Path(root)
    configuration = small_file(top, "etc/nvpmodel.conf") or ""
    modes = re.findall(r"(?m)^\s*<\s*POWER_MODEL\s+ID=(\d{1,9})\s+NAME=([!-;=?-~]+)\s*>", configuration)
    mode = re.match(r"pmode:(\d{1,9})\b", small_file(top, "var/lib/nvpmodel/status") or "")
    clocks: list[int | None] = [None, None]
    with contextlib.suppress(OSError):
        for folder in sorted((top / "sys/class/devfreq").iterdir()):
            # By the device's name: "17000000.gpu", "17000000.ga10b", and the graphics clock of Thor.
            if re.fullmatch(r"[0-9a-f]+\.(gpu|ga10b|gv11b)|gpu-gpc-0", folder.name):
                clocks = [_number(small_file(folder, f"{end}_freq")) for end in ("min", "max")]
                break
    return Power({int(n): name for n, name in modes}, int(mode[1]) if mode else None, clocks[0], clocks[1])
