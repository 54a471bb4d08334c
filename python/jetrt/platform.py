"""What this machine is, from a few small files: no CUDA, no subprocess, nothing to import but the standard library.

A source that is absent, unreadable or not what it should be gives ``None``, never a guess. Everything is read below a
root folder, so that tests lay out the files of a board.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["JETPACK", "Platform", "identify"]

#: L4T release -> JetPack, from NVIDIA's release notes. Public tables disagree in places (36.5.0), so that a JetPack is
#: good for names and warnings; the L4T release is the truth.
JETPACK: Final = {
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "35.6.2": "5.1.5",
    "35.6.3": "5.1.5",
    "35.6.4": "5.1.6",
    "36.2.0": "6.0-DP",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.2": "6.1-rev1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "36.5.2": "6.2.3",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.2.2": "7.0",
    "38.4.0": "7.1",
    "39.0.0": "7.2-EA",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}


@dataclass(frozen=True)
class Platform:
    """This machine; ``None`` is unknown, or does not exist here."""

    #: As the kernel names it: "aarch64", "x86_64".
    arch: str
    #: For people. On Jetsons it is free text of the device tree and can name another module than the one below it.
    board: str | None = None
    #: Jetson Linux release, "36.4.7".
    l4t: str | None = None
    #: "6.2.1"; ``None`` for an L4T that `JETPACK` does not have.
    jetpack: str | None = None
    #: Name of the nvpmodel mode, "MAXN_SUPER": the one that was set last, as nvpmodel itself recorded it.
    power_mode: str | None = None
    #: Version of the loaded kernel module, "580.82.07".
    driver: str | None = None
    #: Version of the CUDA toolkit under /usr/local/cuda, which need not be the one of the driver.
    cuda: str | None = None
    #: Bytes of system memory, and those that a program can get without swapping.
    memory_total: int | None = None
    memory_available: int | None = None
    #: Whether the GPU shares the system's memory. The files tell it of Jetson and DGX Spark; otherwise ask the driver.
    integrated: bool | None = None


def identify(root: str | os.PathLike[str] = "/", *, arch: str | None = None) -> Platform:
    """Reads the files; well below a millisecond. `arch` replaces what the kernel says, for tests."""
    top = Path(root)
    arch = arch or os.uname().machine
    board = _text(top, "proc/device-tree/model")
    soc = _text(top, "proc/device-tree/compatible") or ""
    product = _text(top, "sys/class/dmi/id/product_name")
    spark = product is not None and "DGX_Spark" in product
    # A container may carry the release file of another machine's image, so that it counts on ARM alone.
    l4t = _l4t(_text(top, "etc/nv_tegra_release")) if arch == "aarch64" and not spark else None
    jetson = l4t is not None or re.search(r"nvidia,tegra\d", soc) is not None
    memory = meminfo(top)
    return Platform(
        arch=arch,
        board=board or product,
        l4t=l4t,
        jetpack=JETPACK.get(l4t or ""),
        power_mode=_power_mode(_text(top, "var/lib/nvpmodel/status"), _text(top, "etc/nvpmodel.conf")),
        driver=_driver(_text(top, "proc/driver/nvidia/version"), _text(top, "sys/module/nvidia/version")),
        cuda=_cuda(_text(top, "usr/local/cuda/version.json")),
        memory_total=memory.get("MemTotal"),
        memory_available=memory.get("MemAvailable"),
        integrated=True if jetson or spark else None,
    )


def meminfo(root: str | os.PathLike[str] = "/") -> dict[str, int]:
    """The lines of /proc/meminfo that count memory, in bytes: MemTotal, MemFree, MemAvailable and so on."""
    text = _text(Path(root), "proc/meminfo") or ""
    return {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d{1,15}) kB$", text, re.M | re.ASCII)}


def _text(top: Path, name: str) -> str | None:
    """A small file without surrounding blanks and NULs; ``None`` when it is absent, empty, or no regular file."""
    with contextlib.suppress(OSError):
        # Not blocked by a named pipe. A read of sysfs may fail with EAGAIN, or give None through Python's files.
        fd = os.open(top / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return os.read(fd, 1 << 18).decode(errors="replace").strip("\0\t\r\n ") or None
        finally:
            os.close(fd)
    return None


def _l4t(text: str | None) -> str | None:
    # "# R36 (release), REVISION: 4.7, GCID: …": BOARD and DATE behind it say nothing reliable.
    match = re.match(r"# R(\d+) \(release\), REVISION: (\d+)(?:\.(\d+))?,", text or "", re.ASCII)
    return f"{match[1]}.{match[2]}.{match[3] or 0}" if match else None


def _power_mode(status: str | None, configuration: str | None) -> str | None:
    # nvpmodel writes "pmode:0002", older ones "pmode:0000 fmode:quiet"; its configuration has the names.
    mode = re.match(r"pmode:(\d{1,9})\b", status or "", re.ASCII)
    if mode is None:
        return None
    names = re.findall(
        r"^\s*<\s*POWER_MODEL\s+ID=(\d{1,9})\s+NAME=([!-;=?-~]+)\s*>", configuration or "", re.M | re.ASCII
    )
    return next((name for number, name in names if int(number) == int(mode[1])), None)


def _driver(version: str | None, module: str | None) -> str | None:
    # The line is "… Open Kernel Module for x86_64  580.82.07  Release Build …" for the open module, and
    # "… x86_64 Kernel Module  550.135  Fri Jan 10 …" for the closed one.
    line = re.search(r"^NVRM version:.* Kernel Module.*?\s(\d+(?:\.\d+)+)(?=\s|$)", version or "", re.M | re.ASCII)
    if line is not None:
        return line[1]
    whole = re.fullmatch(r"\d+(?:\.\d+)+", module or "", re.ASCII)
    return whole[0] if whole else None


def _cuda(text: str | None) -> str | None:
    try:
        version = json.loads(text or "")["cuda"]["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return version if isinstance(version, str) else None
