"""onnxruntime's TensorRT provider on this machine: is it built in, which libraries and which TensorRT does it want."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import re
import sys
from pathlib import Path
from typing import Final

from .. import _core
from ..errors import CudaError, LibraryNotFoundError, UnsupportedVersionError
from ._packages import broken, version_of

PROVIDER: Final = "TensorrtExecutionProvider"

#: onnxruntime -> the TensorRT that its published packages are built with, as its documentation of the provider says.
#: An older TensorRT of the same major number lacks functions that the provider calls.
PAIRED: Final = {
    (1, 17): (8, 6),
    (1, 18): (10, 0),
    (1, 19): (10, 2),
    (1, 20): (10, 4),
    (1, 21): (10, 8),
    (1, 22): (10, 9),
}

_STEP: Final = "pip install onnxruntime-gpu, or on Jetson NVIDIA's build of it"


def missing(*, deep: bool) -> list[str]:
    """What keeps onnxruntime from using TensorRT here, one sentence each. Without `deep` nothing is imported."""
    lacking = broken("onnxruntime", _STEP, deep=deep)
    if lacking:
        return lacking
    library = _provider_library()
    if library is None:
        return [
            f"the provider {PROVIDER}, which onnxruntime {version()} was built without "
            f"(it has no libonnxruntime_providers_tensorrt.so); {_STEP}"
        ]
    if not deep:
        return []
    import onnxruntime

    have = onnxruntime.get_available_providers()
    if PROVIDER not in have:
        return [f"the provider {PROVIDER}, which onnxruntime {version()} does not list ({', '.join(have)}); {_STEP}"]
    return _libraries(library)


def version() -> str:
    """Of onnxruntime, without importing it."""
    module = sys.modules.get("onnxruntime")
    if module is not None:
        return str(module.__version__)
    return version_of("onnxruntime-gpu", "onnxruntime") or "of an unknown version"


def tensorrt_version() -> str | None:
    """Of the TensorRT that jetrt has opened or finds; onnxruntime meets the same one."""
    with contextlib.suppress(LibraryNotFoundError, UnsupportedVersionError, CudaError):
        return str(_core.library_info()["tensorrt"])
    return None


def _provider_library() -> Path | None:
    """The provider's library in the package. An own build may have it elsewhere: then the list of providers counts."""
    module = sys.modules.get("onnxruntime")
    if module is not None:
        places = [str(Path(str(module.__file__)).parent)]
    else:
        spec = importlib.util.find_spec("onnxruntime")
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
    for place in places:
        if (found := _in_package(Path(place))) is not None:
            return found
    if module is not None and PROVIDER in module.get_available_providers():
        return Path("libonnxruntime_providers_tensorrt.so")
    return None


def _in_package(folder: Path) -> Path | None:
    library = folder / "capi" / "libonnxruntime_providers_tensorrt.so"
    return library if library.is_file() else None


def _libraries(provider: Path) -> list[str]:
    """Which libraries the provider needs and cannot get, and a TensorRT of another version than it was built with.

    onnxruntime says of such a failure only "please install TensorRT libraries"; so they are opened here first. The
    TensorRT that jetrt uses is opened before, so that both meet the same one.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version())
    paired = PAIRED.get((int(numbers[1]), int(numbers[2]))) if numbers else None
    pairing = f"onnxruntime {version()} is built with " + (
        f"TensorRT {paired[0]}.{paired[1]}" if paired else "a TensorRT that is not in jetrt's table"
    )
    beside = None
    if tensorrt_version() is not None:  # opens it
        beside = Path(str(_core.library_info()["path"])).parent
    if not provider.is_file():
        return []
    lacking, absent = [], []
    for name in _needed(provider):
        try:
            library = _opened(name, beside)
        except OSError as error:
            absent.append(f"{name} ({str(error).removeprefix(f'{name}: ')})")
            continue
        if name.startswith("libnvinfer.so") and paired is not None:
            found = _tensorrt_version(library)
            if found[0] != paired[0] or found < paired:
                has = ".".join(map(str, found))
                lacking.append(
                    f"a TensorRT for {PROVIDER}: {pairing} and {name} here is {has}; "
                    f"install the onnxruntime for TensorRT {has}, or TensorRT {paired[0]}.{paired[1]}"
                )
    if absent:
        lacking.append(
            f"libraries of {PROVIDER}: {', '.join(absent)}; {pairing}; put their folders on LD_LIBRARY_PATH (where pip "
            "installed CUDA: call onnxruntime.preload_dlls(), or import torch, first)"
        )
    return lacking


def _opened(name: str, beside: Path | None) -> ctypes.CDLL:
    """The library as the loader finds it, or TensorRT's own beside the libnvinfer that jetrt uses, which the
    loader knows by its name from then on."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        if beside is None or not name.startswith("libnv") or not (beside / name).is_file():
            raise
    return ctypes.CDLL(str(beside / name))


_NEEDED = re.compile(rb"\0(lib(?:nvinfer|nvonnxparser|cudart|cublas|cudnn)\.so\.\d+)(?=\0)")


def _needed(library: Path) -> list[str]:
    """NVIDIA's libraries that the provider is linked with: their names stand in its string table."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return sorted({match[1].decode() for match in _NEEDED.finditer(content)})


def _tensorrt_version(library: ctypes.CDLL) -> tuple[int, int]:
    number = int(library.getInferLibVersion())
    # 8601 is 8.6.1, 100600 is 10.6.0.
    return (number // 1000, number // 100 % 10) if number < 10000 else (number // 10000, number // 100 % 100)
