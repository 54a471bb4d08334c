"""jetrt builds, runs and judges TensorRT engines: never silently wrong, never silently copied, never silently slow.

    import jetrt

    engine = jetrt.Engine("model.engine")
    outputs = engine(x=array)  # torch in, torch out; numpy in, numpy out

    jetrt.build("model.onnx", "model.engine", precision="fp16")  # checked, with a manifest

Importing needs numpy alone. `libnvinfer` and `libcuda` are opened when the first engine is loaded.
"""

# No NullHandler on the `jetrt` logger: it would swallow TensorRT's warnings in programs that set up no logging.

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

from . import errors
from .errors import JetrtError

try:
    from ._core import (
        DeviceMemory,
        Engine,
        Tensor,
        TensorInfo,
        build_info,
        library_info,
        pinned_empty,
        read_plan,
        record_stream,
    )
except ImportError as error:
    raise ImportError(
        f"jetrt's extension module jetrt._core could not be imported ({error}). Install a wheel of jetrt for this "
        "platform; in a checkout, build one with `pip install .` (it needs cargo)."
    ) from error

if TYPE_CHECKING:
    from .bench import bench
    from .builder import build
    from .fit import load_engines
    from .graph import LoopGraph, graph
    from .runtime import (
        BuildConfig,
        EngineCacheEntry,
        EngineHandle,
        InferenceRuntime,
        ThermalState,
        available_runtimes,
        from_config,
        get_runtime,
        load,
        shared_runtime,
    )
    from .torch_memory import configure_torch_memory

__all__ = [
    "BuildConfig",
    "DeviceMemory",
    "Engine",
    "EngineCacheEntry",
    "EngineHandle",
    "InferenceRuntime",
    "JetrtError",
    "LoopGraph",
    "Tensor",
    "TensorInfo",
    "ThermalState",
    "__version__",
    "available_runtimes",
    "bench",
    "build",
    "build_info",
    "configure_torch_memory",
    "errors",
    "from_config",
    "get_runtime",
    "graph",
    "library_info",
    "load",
    "load_engines",
    "pinned_empty",
    "read_plan",
    "record_stream",
    "shared_runtime",
]

_BUILD = build_info()

__version__: str = _BUILD["version"]

# Names that are imported when they are asked for, and the module that has them.
_LAZY = {
    "bench": "bench",
    "build": "builder",
    "LoopGraph": "graph",
    "graph": "graph",
    "configure_torch_memory": "torch_memory",
    "load_engines": "fit",
    **dict.fromkeys(
        (
            "BuildConfig",
            "EngineCacheEntry",
            "EngineHandle",
            "InferenceRuntime",
            "ThermalState",
            "available_runtimes",
            "from_config",
            "get_runtime",
            "load",
            "shared_runtime",
        ),
        "runtime",
    ),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value  # asked once
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))


if _BUILD["profile"] != "release" and not os.environ.get("JETRT_ALLOW_DEBUG"):
    warnings.warn(
        "jetrt._core is a debug build and several times slower per call; build with `maturin develop --release`, "
        "or set JETRT_ALLOW_DEBUG=1 if that is intended.",
        RuntimeWarning,
        stacklevel=2,
    )
