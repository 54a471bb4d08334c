"""Exceptions of jetrt.

Every class derives from `JetrtError`, can be pickled (so that it survives a process pool), and carries what it
knows as attributes; an attribute that does not apply is ``None``. Where Python has a class for the same mistake
(`ValueError` for a shape, `TypeError` for a dtype, `TimeoutError`, `MemoryError`, …) the exception is that too.

The message says what failed, which tensor or file, what was found, what is allowed, and the next step.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BenchOptionError",
    "BuildCrashError",
    "BuildOptionError",
    "CalibrationCacheError",
    "ClosedEngineError",
    "ContextTimeoutError",
    "CudaError",
    "DTypeError",
    "DeviceError",
    "EngineBuildError",
    "EngineDeserializeError",
    "GradError",
    "GraphCaptureError",
    "InferenceError",
    "InputError",
    "InputNameError",
    "JetrtError",
    "LayoutError",
    "LibraryNotFoundError",
    "ManifestError",
    "ModelError",
    "OutOfMemoryError",
    "ParityError",
    "PlanError",
    "PrecisionError",
    "RuntimeConfigError",
    "RuntimeNotAvailableError",
    "ShapeError",
    "TelemetryUnavailableError",
    "UnsupportedVersionError",
]


class JetrtError(Exception):
    """Base of every exception that jetrt raises on purpose."""

    def __init__(self, message: str = "", **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        # An unknown field is kept rather than refused: an error about an error would hide the first one.
        for name, value in fields.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        return self.message  # OSError would add "[Errno …]", KeyError quotes

    def __reduce__(self) -> tuple[Any, ...]:
        # The default passes `args` alone and would lose the fields.
        return _rebuild, (type(self), dict(self.__dict__))


def _rebuild(cls: type[JetrtError], state: dict[str, Any]) -> JetrtError:
    return cls(**state)


# ------------------------------------------------------------------------------------------- libraries and plans


class LibraryNotFoundError(JetrtError, OSError):
    """A native library (libnvinfer, libcuda, a plugin) was found nowhere, or could not be opened."""

    library: str | None = None
    #: Every place that was tried, in order, with the reason why it did not serve.
    searched: list[str] | None = None


class UnsupportedVersionError(JetrtError):
    """The library was found, but jetrt has no verified slot table for its version."""

    library: str | None = None
    found: str | None = None
    #: Versions that are supported, as prose.
    supported: str | None = None


class EngineDeserializeError(JetrtError):
    """TensorRT refused the plan, or the file is not one."""

    path: str | None = None
    #: Logger lines of the failing call.
    log: list[str] | None = None


class PlanError(EngineDeserializeError):
    """The file was refused before TensorRT saw it: not a plan, truncated, another version, wrong checksum."""

    found: str | None = None
    allowed: str | None = None


class ManifestError(PlanError):
    """The manifest beside a plan is damaged, belongs to another file, or names another machine."""

    #: (field, in the manifest, here) for each difference.
    differences: list[tuple[str, Any, Any]] | None = None
    #: The command that makes a right plan on this machine.
    command: str | None = None


class EngineBuildError(JetrtError):
    """A plan could not be made from the model."""

    path: str | None = None
    log: list[str] | None = None


class BuildOptionError(EngineBuildError, ValueError):
    """What was asked for contradicts itself, or this TensorRT or GPU does not have it. Nothing was started."""

    option: str | None = None
    found: Any = None
    allowed: Any = None


class ModelError(EngineBuildError):
    """The ONNX model is damaged or incomplete, or the parser refused it."""

    #: One dict for each complaint of the parser: node (index), name, operator, code, reason.
    problems: list[dict[str, Any]] | None = None


class BuildCrashError(EngineBuildError):
    """The process that built or tried the plan died: crash, out of memory, killed, timeout, Ctrl-C."""

    #: "crash", "out of memory", "killed", "timeout" or "interrupted".
    how: str | None = None
    #: The signal that ended it, where one did.
    signal: int | None = None
    #: Phase of the build that it was in.
    phase: str | None = None
    seconds: float | None = None


class PrecisionError(EngineBuildError):
    """Less of the plan runs in the precision that was asked for than ``require_precision`` allows."""

    found: Any = None
    allowed: Any = None


class ParityError(EngineBuildError):
    """The plan's outputs differ from the reference by more than the thresholds allow, or could not be compared."""

    #: One dict for each comparison that failed.
    failures: list[dict[str, Any]] | None = None


class CalibrationCacheError(JetrtError):
    """A calibration cache does not belong to this model and data set."""

    path: str | None = None
    found: str | None = None
    expected: str | None = None


# ------------------------------------------------------------------------------------------------------ inference


class InferenceError(JetrtError):
    """A call of an engine failed."""

    engine: str | None = None
    #: What was bound when it failed, as ``"name dtype[shape]"``.
    bound: list[str] | None = None
    log: list[str] | None = None


class InputError(InferenceError):
    """An input (or a tensor given as ``out=``) was refused; nothing was computed."""

    tensor: str | None = None
    found: Any = None
    allowed: Any = None


class ShapeError(InputError, ValueError):
    """Wrong rank, or a dimension outside every optimisation profile."""


class DTypeError(InputError, TypeError):
    """Wrong element type while ``on_dtype="error"``, or a type that no cast can serve."""


class LayoutError(InputError, ValueError):
    """Not contiguous while ``on_strided="error"``, or not aligned as the format needs."""


class DeviceError(InputError, ValueError):
    """The tensor lies on a device from which the engine cannot read."""


class InputNameError(InputError, TypeError):
    """An input is missing, unknown, or given twice."""


class GradError(InputError, RuntimeError):
    """The tensor requires grad while grad mode is on; the engine would cut it off the graph in silence."""


class ContextTimeoutError(InferenceError, TimeoutError):
    """No execution context became free in time."""

    seconds: float | None = None
    max_contexts: int | None = None


class ClosedEngineError(InferenceError):
    """The engine was closed."""


class GraphCaptureError(InferenceError):
    """``graphs="require"`` and the CUDA graph could not be captured, or did not reproduce the eager result."""

    reason: str | None = None


# ---------------------------------------------------------------------------------------------------- the machine


class OutOfMemoryError(JetrtError, MemoryError):
    """Device or page-locked memory is exhausted. Sizes are in bytes."""

    requested: int | None = None
    free: int | None = None
    total: int | None = None


class CudaError(JetrtError, RuntimeError):
    """A call of the CUDA driver failed."""

    call: str | None = None
    code: int | None = None
    name: str | None = None


class TelemetryUnavailableError(JetrtError):
    """There is no source for clocks and temperatures, or it does not answer: the state is unknown."""

    source: str | None = None
    reason: str | None = None


class RuntimeConfigError(JetrtError, ValueError):
    """A configuration of runtimes has an unknown key or a wrong value."""

    #: Where: "robot.toml: [runtime].precison".
    key: str | None = None
    found: Any = None
    allowed: Any = None


class RuntimeNotAvailableError(JetrtError):
    """The runtime that was asked for by name cannot be had; nothing else was tried in its place."""

    runtime: str | None = None
    #: Packages and libraries that are missing.
    missing: list[str] | None = None
    #: Names of the runtimes that can be had here.
    available: list[str] | None = None
    #: Who wanted it.
    consumers: list[str] | None = None


class BenchOptionError(JetrtError, ValueError):
    """What was asked of `jetrt.bench` makes no sense; nothing was measured."""

    option: str | None = None
    found: Any = None
    allowed: Any = None
