"""The wheels in dist/: what the ELF of the extension needs, and from which glibc on it runs.

`make wheel` and `make wheel-aarch64` run this on what they built (JETRT_EXPECT_WHEEL names the machine); a plain test
run looks at whatever wheels there are.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

DIST = Path(__file__).parent.parent / "dist"
EXPECTED = os.environ.get("JETRT_EXPECT_WHEEL")
WHEELS = sorted(DIST.glob("jetrt-*.whl"))

MACHINES = {"x86_64": 62, "aarch64": 183}
LIBRARIES = {"libc.so.6", "libpthread.so.0", "libdl.so.2", "libm.so.6", "libgcc_s.so.1"}
LOADERS = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
GLIBC = (2, 28)  # of the manylinux tag


@dataclass
class Elf:
    machine: int
    needed: set[str]
    versions: set[str]  # symbol versions wanted of those libraries, such as GLIBC_2.17
    search: list[str]  # RPATH and RUNPATH


def read_elf(data: bytes) -> Elf:
    """The few facts that the tests ask for, from the dynamic section of a 64-bit little-endian library."""
    assert data[:6] == b"\x7fELF\x02\x01"
    machine = struct.unpack_from("<H", data, 18)[0]
    offset = struct.unpack_from("<Q", data, 32)[0]
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + i * size) for i in range(count)]
    loads = [(vaddr, start, length) for kind, _, start, vaddr, _, length, _, _ in headers if kind == 1]

    def at(address: int) -> int:
        return next(start + address - vaddr for vaddr, start, length in loads if vaddr <= address < vaddr + length)

    _, _, start, _, _, length, _, _ = next(header for header in headers if header[0] == 2)
    entries = [struct.unpack_from("<qQ", data, start + i) for i in range(0, length, 16)]
    single = dict(entries)
    strings = at(single[5])  # DT_STRTAB

    def text(index: int) -> str:
        return data[strings + index : data.index(b"\0", strings + index)].decode()

    versions = set()
    need = at(single[0x6FFFFFFE]) if 0x6FFFFFFE in single else 0  # DT_VERNEED
    for _ in range(single.get(0x6FFFFFFF, 0)):  # DT_VERNEEDNUM
        _, amount, _, aux, following = struct.unpack_from("<HHIII", data, need)
        item = need + aux
        for _ in range(amount):
            _, _, _, name, after = struct.unpack_from("<IHHII", data, item)
            versions.add(text(name))
            item += after
        need += following
    return Elf(
        machine,
        needed={text(value) for tag, value in entries if tag == 1},
        versions=versions,
        search=[text(value) for tag, value in entries if tag in (15, 29)],
    )


def test_the_reader_reads_this_interpreter():
    # A reader that finds nothing would let every wheel pass.
    elf = read_elf(Path("/proc/self/exe").read_bytes())
    assert elf.machine == MACHINES[os.uname().machine]
    assert "libc.so.6" in elf.needed
    assert any(version.startswith("GLIBC_2.") for version in elf.versions)


@pytest.mark.skipif(EXPECTED is None, reason="no wheel was promised (JETRT_EXPECT_WHEEL)")
def test_the_wheel_was_built():
    assert [wheel.name for wheel in WHEELS if wheel.name.endswith(f"_{EXPECTED}.whl")] != []


if not WHEELS:
    WHEELS = [pytest.param(None, marks=pytest.mark.skip(reason="dist/ has no wheel: `make wheel` builds one"))]


@pytest.fixture(params=WHEELS, ids=lambda wheel: wheel.name if wheel else "none")
def wheel(request):
    return request.param


def test_tags(wheel):
    python, abi, platforms = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("cp310", "abi3")
    for tag in platforms.split("."):
        major, minor, machine = re.fullmatch(
            r"manylinux_?(\d+)_(\d+)_(\w+)", tag.replace("manylinux2014", "manylinux_2_17")
        ).groups()
        assert (int(major), int(minor)) <= GLIBC
        assert machine in MACHINES


def test_extension(wheel):
    machine = next(name for name in MACHINES if wheel.name.endswith(f"_{name}.whl"))
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in Path(name).name]
        assert libraries == ["jetrt/_core.abi3.so"]  # and so no library of NVIDIA's
        elf = read_elf(archive.read(libraries[0]))
    assert elf.machine == MACHINES[machine]
    assert elf.needed <= LIBRARIES | LOADERS
    assert elf.search == []
    wanted = {version for version in elf.versions if version.startswith("GLIBC_")}
    assert wanted, "an extension without any glibc symbol was misread"
    for version in wanted:
        assert tuple(map(int, version.removeprefix("GLIBC_").split("."))) <= GLIBC, version


def test_content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert not [name for name in names if "__pycache__" in name]
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        entry_points = archive.read(next(name for name in names if name.endswith("/entry_points.txt"))).decode()
    source = Path(__file__).parent.parent / "python" / "jetrt"
    for file in [*source.rglob("*.py"), *source.rglob("*.pyi"), *source.rglob("py.typed")]:
        assert f"jetrt/{file.relative_to(source).as_posix()}" in names
    assert "Requires-Python: >=3.10" in metadata
    assert "Requires-Dist: numpy>=1.21" in metadata
    assert "jetrt=jetrt.cli:main" in entry_points.replace(" ", "")
