"""Where the libraries of CUDA and TensorRT lie and of which version they are, by name and place; none is opened."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from .packages import Package

__all__ = ["Library", "find_libraries", "used_by_jetrt", "used_by_loader"]

_NAMES: Final = (
    *("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvinfer_builder_resource", "nvinfer_lean", "nvinfer_dispatch"),
    *("cuda", "nvidia-ml", "cudart", "cudnn"),
)
#: libnvinfer_builder_resource_sm86.so.10.13.3, libcuda.so.1, libnvinfer.so.10
_FILE: Final = re.compile(r"lib(" + "|".join(map(re.escape, _NAMES)) + r")(?:_sm(\d+)\w*|_ptx)?\.so(?:\.(\d[\d.]*))?")
#: As jetrt's own search has them; those of the driver on L4T behind.
_FOLDERS: Final = (
    *("usr/lib/aarch64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu/nvidia", "usr/lib64"),
    *("usr/local/lib", "usr/local/tensorrt/lib", "usr/local/TensorRT/lib", "opt/tensorrt/lib", "usr/local/cuda/lib64"),
    *("usr/lib/aarch64-linux-gnu/tegra", "usr/local/cuda/compat"),
)
_TENSORRT: Final = ("nvinfer", "nvonnxparser")


@dataclass(frozen=True)
class Library:
    """One file, whatever links lead to it in its folder."""

    #: "nvinfer", "nvonnxparser", "cuda".
    name: str
    path: str
    #: What the path leads to in the end.
    file: str
    #: As far as the file's name or the pip package that has it says.
    version: str | None
    #: Which step of the search finds it: "JETRT_TENSORRT_PATH", "pip package", "LD_LIBRARY_PATH", "loader",
    #: "system folder".
    found_by: str
    #: Of a builder resource: the SM that it is for.
    sm: int | None = None
    #: A `libcuda` to link with, which cannot run anything.
    stub: bool = False
    #: Place in the loader's order, where the loader finds it at all.
    loader_rank: int | None = None

    @property
    def major(self) -> int | None:
        return int(self.version.split(".")[0]) if self.version else None

    @property
    def folder(self) -> str:
        return str(Path(self.file).parent)


def find_libraries(
    root: str | os.PathLike[str],
    environ: Mapping[str, str],
    path: Sequence[str],
    packages: Mapping[str, Package],
) -> tuple[Library, ...]:
    """Every library of interest, in the order of jetrt's own search."""
    found: dict[tuple[str, str], Library] = {}
    for rank, (folder, step, files) in enumerate(_places(Path(root), environ, path)):
        for library in _in_folder(folder, step, files, packages):
            key = library.name, library.file
            first = found.setdefault(key, library)
            if step in ("LD_LIBRARY_PATH", "loader") and first.loader_rank is None:
                found[key] = replace(first, loader_rank=rank)
    return tuple(found.values())


def used_by_loader(libraries: Sequence[Library], name: str, major: int | None = None) -> Library | None:
    """The library of this name that a program gets from the loader, such as the `tensorrt` package of JetPack."""
    found = [lib for lib in libraries if lib.name == name and lib.loader_rank is not None]
    return min((lib for lib in found if major in (None, lib.major)), key=lambda lib: lib.loader_rank or 0, default=None)


def used_by_jetrt(libraries: Sequence[Library]) -> Library | None:
    """The libnvinfer that jetrt would open: TensorRT 10 before 11 in each step of its search."""
    steps = ("JETRT_TENSORRT_PATH", "pip package", "loader", "system folder")
    found = [
        (steps.index("loader" if lib.found_by == "LD_LIBRARY_PATH" else lib.found_by), lib.major, place, lib)
        for place, lib in enumerate(libraries)
        if lib.name == "nvinfer" and lib.major in (10, 11)
    ]
    if any(entry[0] == 0 for entry in found):
        found = [entry for entry in found if entry[0] == 0]
    return min(found, key=lambda entry: entry[:3])[3] if found else None


def _places(
    root: Path, environ: Mapping[str, str], path: Sequence[str]
) -> Iterator[tuple[Path, str, list[str] | None]]:
    """(folder, step, names of files; None: all of the folder)."""
    given = environ.get("JETRT_TENSORRT_PATH")
    if given:
        place = Path(given)
        yield (
            (place, "JETRT_TENSORRT_PATH", None)
            if place.is_dir()
            else (
                place.parent,
                "JETRT_TENSORRT_PATH",
                [place.name],
            )
        )
    for folder in path:
        if folder and (place := Path(folder, "tensorrt_libs")).is_dir():
            yield place, "pip package", None
    for folder in environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder:
            yield Path(folder), "LD_LIBRARY_PATH", None
    # The loader's cache holds whole paths; taken as bytes, so that its format does not matter.
    with contextlib.suppress(OSError):
        cache = (root / "etc/ld.so.cache").read_bytes()
        names = b"|".join(re.escape(name).encode() for name in _NAMES)
        cached: dict[Path, list[str]] = {}
        for text in dict.fromkeys(re.findall(rb"/[^\0]*/lib(?:" + names + rb")[\w.]*\.so[\d.]*(?=\0)", cache)):
            file = root / os.fsdecode(text).lstrip("/")
            cached.setdefault(file.parent, []).append(file.name)
        for place, files in cached.items():
            yield place, "loader", files
    for name in _FOLDERS:
        yield root / name, "system folder", None


def _in_folder(folder: Path, step: str, files: list[str] | None, packages: Mapping[str, Package]) -> Iterator[Library]:
    try:
        names = os.listdir(folder) if files is None else files  # noqa: PTH208 -- names alone are wanted, many of them
    except OSError:
        return
    best: dict[tuple[str, str], Library] = {}
    for name in sorted(names, key=len):
        match = _FILE.fullmatch(name)
        if match is None or (step in ("JETRT_TENSORRT_PATH", "pip package") and not match[1].startswith(_TENSORRT)):
            continue
        file = Path(os.path.realpath(folder / name))
        if not file.is_file():
            continue  # a link that leads nowhere
        longest = _FILE.fullmatch(file.name)
        version = (longest and longest[3]) or match[3]
        sm = int(match[2]) if match[2] else None
        if step == "pip package" and (version is None or "." not in version):
            version = _pip_version(match[1], packages, version)
        key = match[1], str(file)
        stub = match[1] == "cuda" and folder.name == "stubs"
        library = Library(match[1], str(folder / name), str(file), version, step, sm, stub)
        # The name with the major number is the one that programs ask for.
        if key not in best or (match[3] and "." not in match[3]):
            best[key] = library
    yield from best.values()


def _pip_version(name: str, packages: Mapping[str, Package], fallback: str | None) -> str | None:
    if name.startswith(_TENSORRT):
        for package, found in packages.items():
            if re.fullmatch(r"tensorrt-cu\d+-libs|tensorrt-libs", package) and found.version:
                return found.version
    return fallback
