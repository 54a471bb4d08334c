"""One interface over several ways to run a model: `InferenceRuntime`, its records, and `load`.

A runtime is always chosen by name. When the one that was named cannot be had, the error says everything that is
missing and what is available instead; another one is taken only where a configuration lists it as `fallback`, and then
`current_runtime_label` says so.

    runtime = jetrt.get_runtime("tensorrt")  # or from_config("robot.toml"), or shared_runtime() for the whole program
    entry = runtime.compile_engine("model.engine")
    handle = runtime.deserialize_engine(entry)
    outputs = runtime.infer(handle, {"x": array})

`load` is the short way to the same thing: a callable with one call shape, whatever runs behind it.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, overload

from .errors import PlanError, RuntimeNotAvailableError

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._core import Engine
    from .runtimes._file import FileRuntime
    from .runtimes.config import RuntimeConfig
    from .runtimes.onnx_cpu import OnnxModel

__all__ = [
    "RUNTIMES",
    "BuildConfig",
    "EngineCacheEntry",
    "EngineHandle",
    "InferenceRuntime",
    "Model",
    "Precision",
    "TensorDescription",
    "ThermalState",
    "available_runtimes",
    "from_config",
    "get_runtime",
    "load",
    "shared_runtime",
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
    """What `load` returns, whatever runs behind it: `jetrt.Engine` for a plan."""

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
    #: Of the file itself; weights that an ONNX file keeps in other files are not covered. Empty for a torch module,
    #: which is no file: such an entry is good for the runtime object that made it.
    sha256: str
    size_bytes: int
    #: Name of the runtime that made the entry and alone can load it.
    runtime: str
    #: Versions of what made or will run the file, such as ``{"tensorrt": "10.6.0.26", "jetrt": "0.1.0"}``.
    versions: Mapping[str, str]
    #: The configuration that the file is known to follow; ``None`` for a plan that was built elsewhere.
    build_config: BuildConfig | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the entry as JSON, so that a program can load the same engine after a restart without compiling.

        An engine in the folder of `path` or below it is written with its relative path, so that both can move
        together. Raises `EngineBuildError` where it cannot be written.
        """
        from .runtimes.entry_file import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EngineCacheEntry:
        """Reads what `save` wrote. Raises `EngineDeserializeError`; `deserialize_engine` checks the engine itself."""
        from .runtimes.entry_file import load

        return load(path)


@dataclass(frozen=True, eq=False)
class EngineHandle:
    """A loaded engine. Any thread may use it; only a runtime of the same name can."""

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
    def thermal_state(self, *, require: bool = False) -> ThermalState:
        """The last reading of the sensors; never blocks. What is not known is ``None``, and nothing counts as throttled
        then, with one warning. With `require` that raises `TelemetryUnavailableError` instead."""

    @abstractmethod
    def current_runtime_label(self) -> str:
        """The runtime's name; "onnx_cpu (fallback for tensorrt)" where a configuration allowed that."""


# -------------------------------------------------------------------------------------------------- choose, load

#: Every runtime and its class. Imported when asked for: importing jetrt must import neither onnxruntime nor torch.
RUNTIMES: Mapping[str, str] = {
    "tensorrt": "TensorrtRuntime",
    "onnx_trt_ep": "OnnxTrtEpRuntime",
    "pytorch_fp16": "PytorchFp16Runtime",
    "torch_tensorrt": "TorchTensorrtRuntime",
    "onnx_cpu": "OnnxCpuRuntime",
    "openvino_cpu": "OpenvinoCpuRuntime",
}

_log = logging.getLogger("jetrt.runtime")


def _implementation(name: str) -> type[FileRuntime]:
    module = importlib.import_module(f"{__package__}.runtimes.{name}")
    implementation: type[FileRuntime] = getattr(module, RUNTIMES[name])
    return implementation


def available_runtimes() -> list[str]:
    """Names of the runtimes that can be had here: the BUILD_* flag is not off, and nothing that they need is missing.

    Opens TensorRT to find out. Packages are looked for and not imported, so one that is broken is found out when its
    runtime is chosen.
    """
    from .runtimes.config import RuntimeConfig

    return _available(RuntimeConfig(""))


def _available(config: RuntimeConfig) -> list[str]:
    names = RUNTIMES if config.allowed is None else config.allowed
    return [name for name in names if not _missing(name, config, deep=False)]


def _missing(name: str, config: RuntimeConfig, *, deep: bool) -> list[str]:
    """Everything that keeps a runtime from being used: its flag, packages, libraries."""
    from .runtimes.config import build_flag, flag_is_on

    flag = build_flag(name)
    reasons = []
    if not flag_is_on(name, config.flags):
        where = "configuration" if flag in config.flags else "environment"
        reasons.append(f"the flag {flag}, which is OFF in the {where}; set it to ON")
    # What is switched off is not imported either.
    return reasons + _implementation(name).missing(config.options.get(name), deep=deep and not reasons)


def _choose(config: RuntimeConfig) -> FileRuntime:
    """The runtime of a configuration, or the first of its fallbacks. Raises `RuntimeNotAvailableError`."""
    from .runtimes.config import build_flag

    name = config.name
    if config.allowed is not None and name not in config.allowed:
        missing = [f"the runtime {name!r} among those that are allowed"]
        said = f"The runtime {name!r} is not allowed here"
    elif name not in RUNTIMES:
        import difflib

        missing = [f"a runtime of the name {name!r}"]
        near = difflib.get_close_matches(name, RUNTIMES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        said = f"There is no runtime {name!r}{hint}; jetrt knows {', '.join(map(repr, RUNTIMES))}"
    else:
        missing = _missing(name, config, deep=True)
        if not missing:
            return _made(name, config)
        said = f"The runtime {name!r} cannot be had here"
    lacking_too = {name}
    for other in config.fallback:
        lacking = _missing(other, config, deep=True)
        if not lacking:
            fields = {"runtime": other, "for": name, "missing": missing, "consumers": list(config.consumers)}
            _log.warning(
                "fallback: runtime=%s stands in for %s; missing: %s",
                other,
                name,
                "; ".join(missing),
                extra={"event": "fallback", "fields": fields},
            )
            return _made(other, config, fallback_for=name)
        missing += [f"for the fallback {other!r}: {reason}" for reason in lacking]
        lacking_too.add(other)
    # Looked at closely above, which may have found what a look at the packages does not.
    available = [each for each in _available(config) if each not in lacking_too]
    wanted = f", which {', '.join(config.consumers)} need" + "s" * (len(config.consumers) == 1)
    flags = ", ".join(f"{each!r} ({build_flag(each)})" for each in config.allowed or ())
    sentences = [
        said + (wanted if config.consumers else ""),
        f"Missing: {'; '.join(missing)}",
        f"Allowed here, and what switches it on: {flags}" if config.allowed is not None else "",
        f"Available: {', '.join(map(repr, available)) or 'none'}",
        f"Tried in its place too: {', '.join(map(repr, config.fallback))}"
        if config.fallback
        else "Nothing else was tried in its place",
    ]
    raise RuntimeNotAvailableError(
        ". ".join(filter(None, sentences)) + ".",
        runtime=name,
        missing=missing,
        available=available,
        consumers=list(config.consumers),
    )


def _made(name: str, config: RuntimeConfig, fallback_for: str | None = None) -> FileRuntime:
    return _implementation(name)(config.options.get(name), build=config.build, fallback_for=fallback_for)


def _announced(runtime: FileRuntime, consumers: Sequence[str] = ()) -> FileRuntime:
    label = runtime.current_runtime_label()
    fields = {"runtime": label, "engines": [], "consumers": list(consumers)}
    _log.info("ready: runtime=%s, engines=[]", label, extra={"event": "ready", "fields": fields})
    return runtime


def get_runtime(name: str, **options: Any) -> InferenceRuntime:
    """The runtime of that name; `RUNTIMES` has them all.

    `options` go to every model that it loads: the keyword arguments of `jetrt.Engine` for "tensorrt", those of
    `jetrt.runtimes.onnx_cpu.OnnxModel` for "onnx_cpu", and so on. Raises `RuntimeNotAvailableError`.
    """
    return _announced(_get(name, options))


def _get(name: str, options: Mapping[str, Any]) -> FileRuntime:
    from .runtimes.config import RuntimeConfig

    return _choose(RuntimeConfig(name, options={name: options}))


def from_config(
    source: Mapping[str, Any] | str | os.PathLike[str] | RuntimeConfig | None = None,
    *,
    allowed: Sequence[str] | None = None,
    fallback: Sequence[str] | None = None,
    consumers: Sequence[str] | None = None,
) -> InferenceRuntime:
    """A new runtime from a configuration: a mapping, a TOML file, or (``None``) the environment.

    `allowed` narrows what the configuration allows, so that a program can refuse what it was never tested with;
    `fallback` and `consumers` replace what it says. The keys are described in `jetrt.runtimes.config`. Raises
    `RuntimeConfigError` (a `ValueError`) for an unknown key or a wrong value, and `RuntimeNotAvailableError`.
    """
    config = _resolved(source, allowed, fallback, consumers)
    return _announced(_choose(config), config.consumers)


def _resolved(
    source: Mapping[str, Any] | str | os.PathLike[str] | RuntimeConfig | None,
    allowed: Sequence[str] | None,
    fallback: Sequence[str] | None,
    consumers: Sequence[str] | None,
) -> RuntimeConfig:
    from .runtimes.config import narrowed, read_config

    return narrowed(read_config(source), allowed, fallback, consumers)


_shared: dict[str, FileRuntime] = {}
_shared_lock = threading.Lock()


def _forget_shared() -> None:
    # In the child of a fork neither CUDA nor a lock that another thread held can be used.
    global _shared_lock
    _shared_lock = threading.Lock()
    _shared.clear()


os.register_at_fork(after_in_child=_forget_shared)


def shared_runtime(
    source: Mapping[str, Any] | str | os.PathLike[str] | RuntimeConfig | None = None,
    *,
    allowed: Sequence[str] | None = None,
    fallback: Sequence[str] | None = None,
    consumers: Sequence[str] | None = None,
) -> InferenceRuntime:
    """`from_config`, built once: every consumer and thread of the process that gives the same configuration gets the
    same object. It lives as long as the process."""
    config = _resolved(source, allowed, fallback, consumers)
    key = config.key()
    with _shared_lock:
        if key not in _shared:
            _shared[key] = _announced(_choose(config), config.consumers)
        return _shared[key]


@overload
def load(path: str | os.PathLike[str], runtime: Literal["tensorrt"] | None = None, **options: Any) -> Engine: ...
@overload
def load(path: str | os.PathLike[str], runtime: Literal["onnx_cpu"], **options: Any) -> OnnxModel: ...
@overload
def load(path: Any, runtime: str | None, **options: Any) -> Model: ...
def load(path: Any, runtime: str | None = None, **options: Any) -> Model:
    """Loads a plan, an ONNX file or a torch model and returns a callable: ``model(x=array)["y"]``.

    A plan is run by "tensorrt" when no runtime is named. Everything else needs it named, since running an ONNX file on
    the CPU and building a plan from it are different things to ask for. "pytorch_fp16" and "torch_tensorrt" take a
    TorchScript file, a torch.export program or a `torch.nn.Module` as `path`.
    """
    if runtime is None:
        found = _no_plan(path)
        if found is not None:
            what, named = found
            raise PlanError(
                f"{path if isinstance(path, (str, os.PathLike)) else type(path).__name__} is {what} and no runtime was "
                f'named. Name it, jetrt.load(…, runtime="{named}"), or give a TensorRT plan.',
                path=str(path),
                found=what,
                allowed=f'a TensorRT plan, or {what} with runtime="{named}"',
            )
        runtime = "tensorrt"
    return _get(runtime, options).open(path)


def _no_plan(path: Any) -> tuple[str, str] | None:
    """What the thing is, and a runtime for it, when it surely is no plan."""
    if not isinstance(path, (str, os.PathLike)):
        return "an object", "pytorch_fp16"
    kinds = {
        ".onnx": ("an ONNX file", "onnx_cpu"),
        ".pt2": ("a torch.export program", "pytorch_fp16"),
        ".pt": ("a torch file", "pytorch_fp16"),
        ".ts": ("a TorchScript file", "pytorch_fp16"),
    }
    return kinds.get(Path(path).suffix.lower())
