"""One interface over several ways to run a model: `InferenceRuntime`, its records, and `load`.

A runtime is always chosen by name. When the one that was named cannot be had, `get_runtime` says everything that is
missing and what is available instead; it never takes another one on its own.

    runtime = jetrt.get_runtime("tensorrt")
    entry = runtime.compile_engine("model.engine")
    handle = runtime.deserialize_engine(entry)
    outputs = runtime.infer(handle, {"x": array})

`load` is the short way to the same thing: a callable with one call shape, whatever runs behind it.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, overload

from .errors import PlanError, RuntimeNotAvailableError

if TYPE_CHECKING:
    import os

    from typing_extensions import Self

    from ._core import Engine
    from .runtimes._file import FileRuntime
    from .runtimes.onnx_cpu import OnnxModel

__all__ = [
    "BuildConfig",
    "EngineCacheEntry",
    "EngineHandle",
    "InferenceRuntime",
    "Model",
    "Precision",
    "TensorDescription",
    "ThermalState",
    "available_runtimes",
    "get_runtime",
    "load",
]

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "mixed"]

Shape = tuple[int, ...]


# ------------------------------------------------------------------------------------------------ what is loaded


class TensorDescription(Protocol):
    """What every runtime can say about one input or output."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def mode(self) -> Literal["input", "output"]: ...
    @property
    def location(self) -> Literal["device", "host"]: ...
    @property
    def format(self) -> str: ...
    @property
    def profiles(self) -> list[tuple[Shape, Shape, Shape]]: ...


class Model(Protocol):
    """What `load` returns: `jetrt.Engine` for a plan, `jetrt.runtimes.onnx_cpu.OnnxModel` for an ONNX file."""

    @property
    def inputs(self) -> Mapping[str, TensorDescription]: ...
    @property
    def outputs(self) -> Mapping[str, TensorDescription]: ...
    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def closed(self) -> bool: ...
    @property
    def load_report(self) -> Mapping[str, Any]: ...
    def __call__(
        self,
        *args: Any,
        stream: Any = None,
        out: Mapping[str, Any] | None = None,
        synchronize: bool = False,
        timeout: float | None = None,
        **inputs: Any,
    ) -> dict[str, Any]: ...
    def run(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        *,
        stream: Any = None,
        out: Mapping[str, Any] | None = None,
        synchronize: bool = False,
        timeout: float | None = None,
    ) -> dict[str, Any]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


# ------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class BuildConfig:
    """How a plan is to be built. A runtime that cannot do what is asked refuses; it never does something else."""

    #: What TensorRT may compute in; "fp32" allows no precision below the model's own.
    precision: Precision = "fp32"
    #: Scratch memory that the builder may use; ``None``: what the library takes, or on an integrated GPU what is free.
    workspace_mb: int | None = None
    #: Data for the int8 calibrator.
    calibration_dataset: Path | None = None
    #: (input name, min, opt, max) for each input with dynamic dimensions.
    optimization_profiles: tuple[tuple[str, Shape, Shape, Shape], ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is {self.precision!r}; allowed: {', '.join(get_args(Precision))}")
        if self.workspace_mb is not None and self.workspace_mb <= 0:
            raise ValueError(f"workspace_mb is {self.workspace_mb}; it must be above 0")
        if self.calibration_dataset is not None:
            object.__setattr__(self, "calibration_dataset", Path(self.calibration_dataset))
        profiles = tuple(
            (name, tuple(low), tuple(opt), tuple(high)) for name, low, opt, high in self.optimization_profiles
        )
        for name, low, opt, high in profiles:
            if not len(low) == len(opt) == len(high):
                raise ValueError(f"profile of {name!r}: min {low}, opt {opt} and max {high} differ in rank")
            if not all(0 <= a <= b <= c for a, b, c in zip(low, opt, high, strict=True)):
                raise ValueError(f"profile of {name!r}: min {low} <= opt {opt} <= max {high} does not hold")
        object.__setattr__(self, "optimization_profiles", profiles)


@dataclass(frozen=True)
class EngineCacheEntry:
    """A file that a runtime can load, and what it was when `compile_engine` looked at it."""

    path: Path
    #: Of the file itself; weights that an ONNX file keeps in other files are not covered.
    sha256: str
    size_bytes: int
    #: Name of the runtime that made the entry and alone can load it.
    runtime: str
    #: Versions of what made or will run the file, such as ``{"tensorrt": "10.6.0.26", "jetrt": "0.1.0"}``.
    versions: Mapping[str, str]
    #: The configuration that the file is known to follow; ``None`` for a plan that was built elsewhere.
    build_config: BuildConfig | None = None


@dataclass(frozen=True, eq=False)
class EngineHandle:
    """A loaded engine. Only the runtime object that made it can use and release it."""

    entry: EngineCacheEntry
    model: Model = field(repr=False)


@dataclass(frozen=True)
class ThermalState:
    """Temperatures and clock at one moment; ``None`` is a sensor that does not answer, never zero degrees."""

    cpu_temp_c: float | None
    gpu_temp_c: float | None
    thermal_throttle_active: bool
    measured_clock_mhz: int | None
    #: `time.monotonic_ns()` of the measurement.
    measured_at: int


# ----------------------------------------------------------------------------------------------------- interface


class InferenceRuntime(ABC):
    """Six methods that every runtime has."""

    @abstractmethod
    def compile_engine(
        self, model_path: str | os.PathLike[str], build_config: BuildConfig | None = None
    ) -> EngineCacheEntry:
        """Makes a model loadable. Raises `EngineBuildError`, `CalibrationCacheError`."""

    @abstractmethod
    def deserialize_engine(self, entry: EngineCacheEntry) -> EngineHandle:
        """Loads an entry, after checking that its file is still the same. Raises `EngineDeserializeError`."""

    @abstractmethod
    def infer(self, handle: EngineHandle, inputs: Mapping[str, Any], *, synchronize: bool = True) -> dict[str, Any]:
        """Runs it and waits for the results. With ``synchronize=False`` they are ordered on the caller's stream
        instead. Raises `InferenceError`, `OutOfMemoryError`."""

    @abstractmethod
    def release_engine(self, handle: EngineHandle) -> None:
        """Frees the engine; releasing it again does nothing."""

    @abstractmethod
    def thermal_state(self) -> ThermalState:
        """Raises `TelemetryUnavailableError` where there is no source; a caller that steers by it should then go on
        as if nothing were throttled, and say so once."""

    @abstractmethod
    def current_runtime_label(self) -> str:
        """The name under which `get_runtime` knows this runtime."""


# -------------------------------------------------------------------------------------------------- choose, load

# Looked up by name and imported when asked for: importing jetrt must not import onnxruntime.
_RUNTIMES = {
    "tensorrt": "TensorrtRuntime",
    "onnx_cpu": "OnnxCpuRuntime",
}


def _implementation(name: str) -> type[FileRuntime]:
    module = importlib.import_module(f"{__package__}.runtimes.{name}")
    implementation: type[FileRuntime] = getattr(module, _RUNTIMES[name])
    return implementation


def available_runtimes() -> list[str]:
    """Names of the runtimes that can be had here. Opens TensorRT to find out."""
    return [name for name in _RUNTIMES if not _implementation(name).missing()]


def _get(name: str, config: Mapping[str, Any]) -> FileRuntime:
    if name not in _RUNTIMES:
        raise RuntimeNotAvailableError(
            f"There is no runtime {name!r}; jetrt knows {', '.join(map(repr, _RUNTIMES))}.",
            runtime=name,
            missing=[f"a runtime of the name {name!r}"],
            available=available_runtimes(),
        )
    implementation = _implementation(name)
    missing = implementation.missing()
    if missing:
        available = available_runtimes()
        raise RuntimeNotAvailableError(
            f"The runtime {name!r} cannot be had here. Missing: {'; '.join(missing)}. "
            f"Available: {', '.join(map(repr, available)) or 'none'}. Nothing else was tried in its place.",
            runtime=name,
            missing=missing,
            available=available,
        )
    return implementation(**config)


def get_runtime(name: str, **config: Any) -> InferenceRuntime:
    """The runtime of that name: "tensorrt" or "onnx_cpu".

    `config` goes to every model that it loads: the keyword arguments of `jetrt.Engine` for "tensorrt", those of
    `jetrt.runtimes.onnx_cpu.OnnxModel` for "onnx_cpu".
    """
    return _get(name, config)


@overload
def load(path: str | os.PathLike[str], runtime: Literal["tensorrt"] | None = None, **options: Any) -> Engine: ...
@overload
def load(path: str | os.PathLike[str], runtime: Literal["onnx_cpu"], **options: Any) -> OnnxModel: ...
@overload
def load(path: str | os.PathLike[str], runtime: str | None, **options: Any) -> Model: ...
def load(path: str | os.PathLike[str], runtime: str | None = None, **options: Any) -> Model:
    """Loads a plan or an ONNX file and returns a callable: ``model(x=array)["y"]``.

    A plan is run by "tensorrt" when no runtime is named. An ONNX file needs it named, since running it on the CPU and
    building a plan from it are different things to ask for.
    """
    if runtime is None:
        if Path(path).suffix.lower() == ".onnx":
            raise PlanError(
                f"{path} is an ONNX file and no runtime was named. "
                'Name it, jetrt.load(path, runtime="onnx_cpu"), or give a TensorRT plan.',
                path=str(path),
                found="an ONNX file",
                allowed='a TensorRT plan, or an ONNX file with runtime="onnx_cpu"',
            )
        runtime = "tensorrt"
    chosen = _get(runtime, options)
    return chosen.open(path)
