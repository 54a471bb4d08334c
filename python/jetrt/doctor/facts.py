"""What the checks look at: the environment, and what only `jetrt doctor` takes the time to read."""

from __future__ import annotations

import contextlib
import importlib.metadata
import mmap
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..environment import Environment
from ..environment import read as read_environment
from ..errors import JetrtError, PlanError
from . import children

if TYPE_CHECKING:
    from ..environment import Python
    from ..provenance import Machine, Manifest

__all__ = ["Extension", "Facts", "PlanFile", "Requirement", "gather"]

#: Suffixes of plans, as scripts name them.
SUFFIXES: Final = (".engine", ".plan", ".trt")

#: Modules that are compiled against numpy's C interface, and the files that tell which.
_EXTENSIONS: Final = {
    "cv2": ("cv2*.so", "cv2/cv2*.so", "cv2/python-*/cv2*.so"),
    "torch": ("torch/lib/libtorch_python.so",),
    "onnxruntime": ("onnxruntime/capi/onnxruntime_pybind11_state*.so",),
    "openvino": ("openvino/_pyopenvino*.so",),
    "pycuda": ("pycuda/_driver*.so",),
    "gtsam": ("gtsam/gtsam*.so",),
    "scipy": ("scipy/linalg/_flapack*.so",),
    "pandas": ("pandas/_libs/lib.*.so",),
    "matplotlib": ("matplotlib/_path*.so",),
    "sklearn": ("sklearn/utils/murmurhash*.so",),
    "numba": ("numba/_helperlib*.so",),
    "cupy": ("cupy/_core/core*.so",),
}


@dataclass(frozen=True)
class Extension:
    """A compiled module that was made for numpy 1 and fails under numpy 2."""

    module: str
    file: str


@dataclass(frozen=True)
class Requirement:
    """What a package says that it needs of numpy, and does not have."""

    package: str
    text: str


@dataclass(frozen=True)
class PlanFile:
    path: Path
    #: Of the header, "10.6.0.26"; ``None`` where `problem` says why.
    tensorrt: str | None = None
    problem: str = ""
    manifest: Manifest | None = None


@dataclass(frozen=True)
class Facts:
    environment: Environment
    #: The folder whose plans and scripts were looked at.
    folder: Path
    #: The raw environment variables; for checks of single names, never to be shown whole.
    environ: Mapping[str, str] = field(repr=False)
    #: Modules for numpy 1, whatever numpy is there.
    numpy1_modules: tuple[Extension, ...] = ()
    unmet_requirements: tuple[Requirement, ...] = ()
    #: Module ("pycuda", "tensorrt") -> who imports or requires it.
    needed_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Has the installed torch its CUDA part? ``None``: there is no torch.
    torch_has_cuda: bool | None = None
    plans: tuple[PlanFile, ...] = ()
    #: What CUDA and TensorRT say about the machine, from a process of their own, or why that failed.
    machine: Machine | None = None
    machine_problem: str = ""
    #: Module -> what went wrong when it was imported in a process of its own ("" if nothing did); with `--deep`.
    imports: Mapping[str, str] = field(default_factory=dict)
    unchecked: tuple[tuple[str, str], ...] = ()


def gather(
    folder: str | os.PathLike[str] = ".",
    *,
    deep: bool = False,
    root: str | os.PathLike[str] = "/",
    environ: Mapping[str, str] | None = None,
    path: Sequence[str] | None = None,
    python: Python | None = None,
    arch: str | None = None,
    machine: Any = None,
) -> Facts:
    """Reads it all. `machine()` gives the machine as CUDA sees it; by default a child process asks, where the folder
    has plans with a manifest or `deep` is set. The other arguments are those of `jetrt.environment.read`, for tests.

    Raises OSError for a folder that cannot be read."""
    environ = os.environ if environ is None else environ
    path = list(sys.path if path is None else path)
    folder = Path(folder)
    environment = read_environment(root, environ=environ, path=path, python=python, arch=arch)
    plans = tuple(_plans(folder))
    found, problem = None, ""
    if deep or any(plan.manifest is not None for plan in plans):
        try:
            found = (machine or children.machine)()
        except children.ChildError as error:
            problem = str(error)
    unmet, unchecked = _unmet(path, environment.version_of("numpy"))
    return Facts(
        environment=environment,
        folder=folder,
        environ=environ,
        numpy1_modules=tuple(_numpy1(path)),
        unmet_requirements=unmet,
        needed_by=_needed(folder, path, ("pycuda", "tensorrt")),
        torch_has_cuda=_torch_has_cuda(path),
        plans=plans,
        machine=found,
        machine_problem=problem,
        imports=children.imports(environment) if deep else {},
        unchecked=unchecked,
    )


def _plans(folder: Path) -> Iterator[PlanFile]:
    from .._core import read_plan
    from ..provenance import Manifest

    for file in sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.is_dir()):
        try:
            version, problem = str(read_plan(file)["tensorrt"]), ""
        except PlanError as error:
            version, problem = None, str(error)
        except OSError as error:
            version, problem = None, f"{file} cannot be read: {error.strerror or error}"
        manifest = None
        try:
            manifest = Manifest.read(file)
            if manifest is not None and not problem and manifest.engine.bytes != file.stat().st_size:
                problem = (
                    f"{file} has {file.stat().st_size} bytes and its manifest was written for a plan of "
                    f"{manifest.engine.bytes}: one of the two was replaced alone"
                )
        except JetrtError as error:
            problem = problem or str(error)
        yield PlanFile(file, version, problem, manifest)


def _numpy1(path: Sequence[str]) -> Iterator[Extension]:
    """An extension imports numpy's C interface by name. Those for numpy 2 name `numpy._core`, and `numpy.core` as a
    fallback; those for numpy 1 name `numpy.core` alone, which has no such interface in numpy 2."""
    for module, patterns in _EXTENSIONS.items():
        for folder in path:
            files = sorted(f for pattern in patterns for f in Path(folder or ".").glob(pattern))
            for file in files:
                with contextlib.suppress(OSError, ValueError), file.open("rb") as opened:
                    with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                        if data.find(b"numpy.core") >= 0 and data.find(b"numpy._core") < 0:
                            yield Extension(module, str(file))
                    break
            if files or (Path(folder or ".") / module).is_dir():
                break  # what lies in later folders is not imported


def _unmet(path: Sequence[str], numpy: str | None) -> tuple[tuple[Requirement, ...], tuple[tuple[str, str], ...]]:
    if numpy is None:
        return (), ()
    try:
        try:
            from packaging.requirements import Requirement as Parsed
        except ImportError:
            from pip._vendor.packaging.requirements import Requirement as Parsed  # type: ignore[assignment,unused-ignore]
    except ImportError:
        return (), (("what packages require of numpy", "neither `packaging` nor `pip` is installed"),)
    found: dict[str, Requirement | None] = {}
    for distribution in importlib.metadata.distributions(path=list(path)):
        with contextlib.suppress(Exception):  # damaged metadata of others
            name = distribution.metadata["Name"]
            for text in distribution.requires or ():
                if re.match(r"numpy\b(?!-)", text, re.I) and name not in found:
                    wanted = Parsed(text)
                    applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
                    if applies and not wanted.specifier.contains(numpy, prereleases=True):
                        found[name] = Requirement(name, str(wanted.specifier))
            found.setdefault(name, None)  # a copy in a later folder is not imported
    return tuple(sorted((f for f in found.values() if f), key=lambda f: f.package)), ()


def _needed(folder: Path, path: Sequence[str], modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Scripts of the folder that import a module, and installed packages that require it."""
    found: dict[str, list[str]] = {module: [] for module in modules}
    for file in sorted(folder.glob("*.py"))[:200]:
        try:
            text = file.read_bytes()[: 1 << 20].decode(errors="replace")
        except OSError:
            continue
        for module in modules:
            if re.search(rf"(?m)^[ \t]*(?:import|from)[ \t]+{module}\b", text):
                found[module].append(file.name)
    for distribution in importlib.metadata.distributions(path=list(path)):
        with contextlib.suppress(Exception):
            for text in distribution.requires or ():
                name = re.match(r"[\w.-]+", text)
                if name and "extra ==" not in text and name[0].lower() in modules:
                    found[name[0].lower()].append(f"the package {distribution.metadata['Name']}")
    return {module: tuple(dict.fromkeys(users)) for module, users in found.items()}


def _torch_has_cuda(path: Sequence[str]) -> bool | None:
    for folder in path:
        library = Path(folder or ".", "torch", "lib")
        if library.is_dir():
            return (library / "libtorch_cuda.so").exists()
    return None
