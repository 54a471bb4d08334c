"""Python and its packages, by the folders that installers leave, without importing any."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..platform import _text as small_file

__all__ = ["Package", "Python", "all_packages", "find_packages", "read_python", "system_packages"]

_INTERESTING: Final = re.compile(
    r"numpy|torch(vision|audio)?|torch-tensorrt|tensorrt.*|onnx(sim|slim|script)?|onnx-graphsurgeon|onnxruntime.*|polygraphy|openvino"
    r"|opencv-.*|pycuda|cuda-python|cuda-bindings|cupy.*|nvidia-(ml-py|modelopt|cudnn.*|cuda-runtime.*|cublas.*|cudss.*)"
    r"|pynvml|jetson-stats|ultralytics|scipy|pillow|matplotlib|transformers|triton|ml-dtypes|safetensors|gtsam|jetrt"
)


@dataclass(frozen=True)
class Package:
    name: str
    #: ``None``: the module is there and nothing says its version (OpenCV of JetPack).
    version: str | None
    #: The folder of `sys.path` that it lies in.
    folder: str


@dataclass(frozen=True)
class Python:
    version: str
    implementation: str
    executable: str
    prefix: str
    #: In a virtual environment: does it see the packages of the system's Python? ``None``: it is none.
    venv_sees_system: bool | None
    conda: bool
    #: PEP 668: pip refuses to install into the system's Python.
    externally_managed: bool
    free_threaded: bool
    #: Where Debian's Python keeps its packages.
    system_folders: tuple[str, ...]


def read_python(root: str | os.PathLike[str] = "/") -> Python:
    venv = sys.prefix != sys.base_prefix
    configuration = small_file(Path(sys.prefix), "pyvenv.cfg") or ""
    sees = re.search(r"(?im)^include-system-site-packages\s*=\s*true\s*$", configuration) is not None
    short = f"{sys.version_info.major}.{sys.version_info.minor}"
    folders = (
        "usr/lib/python3/dist-packages",
        f"usr/lib/python{short}/dist-packages",
        f"usr/local/lib/python{short}/dist-packages",
    )
    return Python(
        version=platform.python_version(),
        implementation=platform.python_implementation(),
        executable=sys.executable,
        prefix=sys.prefix,
        venv_sees_system=sees if venv else None,
        conda=(Path(sys.prefix) / "conda-meta").is_dir(),
        externally_managed=(Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").is_file(),
        free_threaded=bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        system_folders=tuple(str(Path(root, folder)) for folder in folders if Path(root, folder).is_dir()),
    )


def find_packages(path: Sequence[str]) -> dict[str, Package]:
    """Packages of interest in these folders, by name; the first folder counts, as it does for an import."""
    found = {name: package for name, package in all_packages(path).items() if _INTERESTING.fullmatch(name)}
    if not any(name.startswith("opencv-") for name in found):
        # OpenCV of JetPack and Debian says nothing about itself.
        folder = next((f for f in path if f and any(Path(f).glob("cv2*"))), None)
        if folder is not None:
            found["opencv (no metadata)"] = Package("opencv (no metadata)", None, folder)
    return dict(sorted(found.items()))


def all_packages(path: Sequence[str]) -> dict[str, Package]:
    found: dict[str, Package] = {}
    for folder in path:
        for name, version in _distributions(folder or "."):
            found.setdefault(name, Package(name, version, folder))
    return found


def _distributions(folder: str) -> Iterator[tuple[str, str | None]]:
    # `importlib.metadata` parses each METADATA (milliseconds for a long one). The name of the folder says the same by
    # specification; it is asked only where the name does not (egg-info of Debian).
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = re.fullmatch(r"([A-Za-z0-9._]+?)(?:-([^-]+))?(?:-py[\d.]+)?\.(dist|egg)-info", entry.name)
            if match is None:
                continue
            name, version, kind = match.groups()
            if kind == "dist" and not Path(entry.path, "METADATA").is_file():
                continue  # what a broken uninstall leaves
            if version is None:
                with contextlib.suppress(Exception):  # damaged metadata of others is no concern here
                    version = importlib.metadata.Distribution.at(Path(entry.path)).version
            yield re.sub(r"[-_.]+", "-", name).lower(), version


def system_packages(root: str | os.PathLike[str] = "/") -> dict[str, str]:
    """Debian packages of NVIDIA and OpenCV that are installed, with versions."""
    try:
        text = Path(root, "var/lib/dpkg/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found = {}
    wanted = re.compile(
        r"Package: ((?:python3-)?libnv(?:infer|onnx)[\w.+-]*|tensorrt[\w.+-]*|nvidia-[\w.+-]*|cuda-toolkit-\d[\w.-]*"
        r"|libcudnn\d[\w.-]*|python3-(?:opencv|pycuda|numpy)|libopencv-python)\n"
    )
    for stanza in text.split("\n\n"):
        match = wanted.match(stanza)
        if match and "\nStatus: install ok installed" in stanza:
            version = re.search(r"\nVersion: (\S+)", stanza)
            found[match[1]] = version[1] if version else "unknown"
    return dict(sorted(found.items()))
