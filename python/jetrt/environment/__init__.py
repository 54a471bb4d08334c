"""What this machine has: versions, libraries, settings. Files alone are read: nothing heavy is imported, no library is
opened, no process is started and no CUDA context is made.

`collect()` gives it as JSON-able data, `read()` as records (what `jetrt doctor` examines), `text()` for people. All
of it is read below a root folder, so that tests lay out the files of a board.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .. import _core
from .. import platform as _platform
from .libraries import Library, find_libraries, used_by_jetrt, used_by_loader
from .packages import Package, Python, find_packages, read_python, system_packages
from .shown import text
from .system import Gpu, Memory, Power, System, find_gpus, read_memory, read_power, read_system
from .variables import shown_variables, switches

__all__ = [
    "SCHEMA",
    "Environment",
    "Gpu",
    "Library",
    "Memory",
    "Package",
    "Power",
    "Python",
    "System",
    "collect",
    "read",
    "text",
    "used_by_jetrt",
    "used_by_loader",
]

SCHEMA: Final = "jetrt-environment-1"


@dataclass(frozen=True)
class Environment:
    """This machine and this Python, as files tell of them; ``None`` is unknown, or does not exist here."""

    jetrt: Mapping[str, Any]
    python: Python
    #: Packages of interest by normalised name ("opencv-python"): the one that an import would take.
    packages: Mapping[str, Package]
    #: The same of the system's Python, as far as this Python does not see them (a venv without system packages).
    hidden_packages: Mapping[str, Package]
    #: Debian packages of NVIDIA's, with versions: where TensorRT came by apt.
    system_packages: Mapping[str, str]
    system: System
    platform: _platform.Platform
    gpus: tuple[Gpu, ...]
    memory: Memory
    power: Power
    #: In the order in which jetrt and the loader would look.
    libraries: tuple[Library, ...]
    #: `BUILD_*` switches of the runtimes.
    switches: Mapping[str, str]
    #: Environment variables that change how CUDA, TensorRT or jetrt work; none that could hold a secret.
    variables: Mapping[str, str]

    @property
    def tegra(self) -> bool:
        """Is this a Jetson?"""
        return self.system.soc is not None or self.platform.l4t is not None

    def libraries_of(self, name: str) -> list[Library]:
        return [library for library in self.libraries if library.name == name]

    def version_of(self, *names: str) -> str | None:
        """The version of the first of these packages that is there."""
        return next((self.packages[name].version for name in names if name in self.packages), None)

    def to_mapping(self) -> dict[str, Any]:
        """As dicts, lists and plain values (JSON)."""
        return {"schema": SCHEMA, **_plain(dataclasses.asdict(self))}


def collect() -> dict[str, Any]:
    """`read()` of this machine as dicts, lists and plain values (JSON)."""
    return read().to_mapping()


def read(
    root: str | os.PathLike[str] = "/",
    *,
    environ: Mapping[str, str] | None = None,
    path: Sequence[str] | None = None,
    python: Python | None = None,
    arch: str | None = None,
) -> Environment:
    """Reads the files. `environ`, `path` (of imports), `python` and `arch` replace this process's own, for tests."""
    environ = os.environ if environ is None else environ
    path = sys.path if path is None else path
    python = python or read_python(root)
    packages = find_packages(path)
    outside = [folder for folder in python.system_folders if folder not in path]
    debian = system_packages(root)
    return Environment(
        jetrt=_core.build_info(),
        python=python,
        packages=packages,
        hidden_packages={n: p for n, p in find_packages(outside).items() if n not in packages},
        system_packages=debian,
        system=read_system(root, environ),
        platform=_platform.identify(root, arch=arch),
        gpus=find_gpus(root),
        memory=read_memory(root),
        power=read_power(root),
        libraries=find_libraries(root, environ, path, packages),
        switches=switches(environ),
        variables=shown_variables(environ),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
