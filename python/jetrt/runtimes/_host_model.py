"""A model that runs on host arrays: the call shape, the checks and the error classes of `jetrt.Engine`.

A runtime derives from `HostModel` and computes in `_execute`; what comes in is checked here, what goes out converted.
"""

from __future__ import annotations

import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import (
    ClosedEngineError,
    DeviceError,
    DTypeError,
    GradError,
    InferenceError,
    InputNameError,
    LayoutError,
    ShapeError,
)
from ..report import dims
from ._callable_model import CallableModel, Given

if TYPE_CHECKING:
    Array = npt.NDArray[Any]

# --------------------------------------------------------------------------------------------------------- types


class ElementType(NamedTuple):
    name: str  # as jetrt writes it
    storage: np.dtype[Any]  # what holds an element in memory
    code: int  # of ONNX's TensorProto.DataType
    native: bool  # numpy has the type itself


def _types() -> dict[str, ElementType]:
    rows = [
        ("float32", np.float32, 1),
        ("uint8", np.uint8, 2),
        ("int8", np.int8, 3),
        ("uint16", np.uint16, 4),
        ("int16", np.int16, 5),
        ("int32", np.int32, 6),
        ("int64", np.int64, 7),
        ("bool", np.bool_, 9),
        ("float16", np.float16, 10),
        ("float64", np.float64, 11),
        ("uint32", np.uint32, 12),
        ("uint64", np.uint64, 13),
    ]
    table = {name: ElementType(name, np.dtype(dtype), code, True) for name, dtype, code in rows}
    table["bfloat16"] = ElementType("bfloat16", np.dtype(np.uint16), 16, False)
    return table


#: Element types that host models take and give, by jetrt's name.
TYPES = _types()


@dataclass(frozen=True)
class HostTensorInfo:
    """One input or output of a model on the host; the same fields as `jetrt.TensorInfo`."""

    name: str
    dtype: str
    #: -1 where the dimension is dynamic.
    shape: tuple[int, ...]
    mode: Literal["input", "output"]
    location: Literal["device", "host"] = "host"
    format: str = "linear"

    @property
    def profiles(self) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Always empty: any size is taken in a dynamic dimension."""
        return []

    @property
    def profile(self) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        return self.profiles


def signature(tensors: Mapping[str, HostTensorInfo]) -> str:
    return ", ".join(f"{t.name} {t.dtype}{dims(t.shape)}" for t in tensors.values()) or "none"


def check_policies(on_strided: str, on_dtype: str) -> None:
    for option, value, allowed in (
        ("on_strided", on_strided, ("error", "copy")),
        ("on_dtype", on_dtype, ("error", "cast")),
    ):
        if value not in allowed:
            raise ValueError(f"{option} is {value!r}; allowed: {' or '.join(map(repr, allowed))}")


# --------------------------------------------------------------------------------------------------------- model


class HostModel(CallableModel):
    """A model on host arrays: ``model(x=array)["y"]``.

    It takes numpy arrays, torch tensors and anything on the CPU with ``__dlpack__`` or ``__array__``, by name or in the
    model's order, and answers in the array library of the first input. A call is finished when it returns. Several
    threads may call at once.
    """

    #: Name of the runtime, for messages.
    runtime: ClassVar[str]

    def __init__(
        self,
        path: Path,
        session: Any,
        inputs: Mapping[str, HostTensorInfo],
        outputs: Mapping[str, HostTensorInfo],
        load_report: Mapping[str, Any],
        *,
        on_strided: Literal["error", "copy"],
        on_dtype: Literal["error", "cast"],
    ) -> None:
        self._path = path
        self._session: Any = session  # ``None`` once it is closed
        self._inputs = dict(inputs)
        self._outputs = dict(outputs)
        self._load_report = {"bytes": path.stat().st_size, "runtime": self.runtime, "warnings": [], **load_report}
        self._on_strided = on_strided
        self._on_dtype = on_dtype
        self._stats = {"calls": 0, "strided_copies": 0, "casts": 0}
        self._lock = threading.Lock()

    @abstractmethod
    def _execute(
        self, session: Any, held: Mapping[str, Array], targets: Mapping[str, Array], bound: list[str]
    ) -> dict[str, Array]:
        """Computes. The arrays are checked, contiguous and in the storage types; `targets` are outputs to write to."""

    # ------------------------------------------------------------------------------------------- what it is

    @property
    def name(self) -> str:
        return self._path.stem

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self._inputs)

    @property
    def path(self) -> str:
        return str(self._path)

    @property
    def closed(self) -> bool:
        return self._session is None

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<{type(self).__name__} {self.name}{state}: {signature(self._inputs)} -> {signature(self._outputs)}>"

    def close(self) -> None:
        self._session = None

    def run(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        *,
        stream: Any = None,
        out: Mapping[str, Any] | None = None,
        synchronize: bool = False,  # noqa: ARG002  a call is always finished when it returns
        timeout: float | None = None,  # noqa: ARG002  nobody waits for another caller
    ) -> dict[str, Any]:
        session = self._session
        if session is None:
            raise ClosedEngineError(
                f"{self.name}: the model is closed. Load it again, or close it later.", engine=self.name
            )
        if stream is not None:
            raise InferenceError(
                f"{self.name}: {self.runtime} has no streams, so it cannot wait for stream={stream!r}. "
                "Wait for the stream yourself and leave stream= out.",
                engine=self.name,
            )
        named = dict(inputs) if isinstance(inputs, Mapping) else self._by_position(inputs)
        self._check_names(named)

        held = {name: self._take(info, named[name]) for name, info in self._inputs.items()}
        targets = {} if out is None else self._targets(out)
        bound = [f"{name} {self._inputs[name].dtype}{dims(array.shape)}" for name, array in held.items()]
        results = self._execute(session, held, targets, bound)

        self._count("calls")
        if out is not None:
            return {name: out[name] for name in self._outputs}
        convert = _exporter(next(iter(named.values()), None))
        return {
            name: convert(results[name], TYPES[info.dtype], f"{self.name}: output {name!r}")
            for name, info in self._outputs.items()
        }

    def _check_names(self, named: Mapping[str, Any]) -> None:
        for name in named:
            if name not in self._inputs:
                raise self._given(name).refused(
                    InputNameError,
                    "no input of that name",
                    ", ".join(self._inputs),
                    "Check the spelling; model.inputs lists them.",
                )
        for name, info in self._inputs.items():
            if name not in named:
                raise self._given(name).refused(
                    InputNameError,
                    "nothing (the input is missing)",
                    f"{info.dtype}{dims(info.shape)}",
                    f"Pass all of: {', '.join(self._inputs)}.",
                )

    def _take(self, info: HostTensorInfo, value: Any) -> Array:
        """The value as a contiguous array in the storage type of the input, checked; copied or cast only by policy."""
        given = self._given(info.name)
        array, found = _import(value, given, self._copy)
        _check_shape(given, info, array.shape)
        strided = not array.flags.c_contiguous or not array.flags.aligned
        if strided:
            self._copy(given, f"strides {array.strides} (bytes) for shape {dims(array.shape)}")
        if found != info.dtype:
            if self._on_dtype == "error":
                step = 'Convert it once where it is made, or load with on_dtype="cast" to convert it at each call.'
                raise given.refused(DTypeError, found, info.dtype, step)
            if "bfloat16" in (found, info.dtype):
                raise given.refused(
                    DTypeError, found, info.dtype, f"{self.runtime} casts no bfloat16: convert it yourself."
                )
            self._count("casts")
            with np.errstate(invalid="ignore"):  # what NaN becomes as an integer is undefined here as it is in torch
                return array.astype(TYPES[info.dtype].storage, order="C")
        return np.array(array, order="C", copy=True) if strided else array

    def _copy(self, given: Given, found: str) -> None:
        """Counts a copy that the policy allows, and refuses it otherwise."""
        if self._on_strided == "error":
            step = 'Make it contiguous once, or load with on_strided="copy" to copy it at each call.'
            raise given.refused(LayoutError, found, "contiguous memory", step)
        self._count("strided_copies")

    def _target(self, name: str, value: Any) -> Array:
        info = self._outputs[name]
        given = self._given(name, "output")

        def refuse(given: Given, found: str) -> None:
            raise given.refused(LayoutError, found, "contiguous memory that can be written", "Give such a tensor.")

        array, found = _import(value, given, refuse)
        _check_shape(given, info, array.shape)
        if found != info.dtype:
            raise given.refused(DTypeError, found, info.dtype, "Give a tensor of that type.")
        if not array.flags.c_contiguous or not array.flags.aligned:
            refuse(given, f"strides {array.strides} (bytes) for shape {dims(array.shape)}")
        if not array.flags.writeable:
            refuse(given, "read-only memory")
        return array

    def _targets(self, out: Mapping[str, Any]) -> dict[str, Array]:
        for name in out:
            if name not in self._outputs:
                raise self._given(name, "output").refused(
                    InputNameError, "no output of that name in out=", ", ".join(self._outputs), "Check the spelling."
                )
        for name in self._outputs:
            if name not in out:
                raise self._given(name, "output").refused(
                    InputNameError, "nothing in out=", "a tensor for every output", "Add it to out=."
                )
        return {name: self._target(name, value) for name, value in out.items()}

    def _count(self, what: str) -> None:
        with self._lock:
            self._stats[what] += 1


def _check_shape(given: Given, info: HostTensorInfo, shape: Sequence[int]) -> None:
    if len(shape) != len(info.shape) or any(want not in (-1, got) for want, got in zip(info.shape, shape, strict=True)):
        allowed = dims(["any" if size < 0 else size for size in info.shape])
        raise given.refused(ShapeError, dims(shape), allowed, "Change the shape, or export the model with others.")


# ------------------------------------------------------------------------------- arrays of other libraries, in, out


def _import(value: Any, given: Given, copy: Callable[[Given, str], None]) -> tuple[Array, str]:
    """The value as a numpy array over the same memory, and the name of its element type. `copy` is asked before a copy
    that cannot be avoided."""

    def on_device(found: str) -> DeviceError:
        return given.refused(DeviceError, found, "cpu", "Move it to the CPU first.")

    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise on_device(str(value.device))
        if value.requires_grad and torch.is_grad_enabled():
            raise given.refused(
                GradError,
                "a tensor that requires grad while grad mode is on",
                "no autograd",
                "Call under torch.no_grad() or torch.inference_mode(), or pass x.detach().",
            )
        value = value.detach()
        if value.is_neg() or value.is_conj():  # lazy bits that the memory does not show
            copy(given, "a lazily negated or conjugated view")
            value = value.resolve_neg().resolve_conj()
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(np.uint16), "bfloat16"
        return _named(value.numpy())

    if not isinstance(value, (np.ndarray, np.generic)):
        if hasattr(value, "__dlpack_device__"):
            kind, index = value.__dlpack_device__()
            if int(kind) not in (1, 3):  # kDLCPU, kDLCUDAHost
                raise on_device(f"device {index} of DLPack type {int(kind)}")
        elif hasattr(value, "__cuda_array_interface__"):
            raise on_device("a CUDA array")
        elif not hasattr(value, "__array__"):
            allowed = "an array of numpy, torch or JAX, or an object with __dlpack__ or __array__"
            found = "None" if value is None else f"an object of type {type(value).__name__}"
            raise given.refused(DTypeError, found, allowed, "Wrap it: numpy.asarray(x, dtype=...).")
        # numpy's own import of DLPack knows no bfloat16 and is missing before 1.23; __array__ serves both.
        value = np.asarray(value) if hasattr(value, "__array__") else np.from_dlpack(value)
    if isinstance(value, np.ma.MaskedArray):
        allowed = "an array in which every element counts"
        raise given.refused(LayoutError, "a masked array", allowed, "Fill it first: x.filled(...).")
    array = np.asarray(value)
    if not array.dtype.isnative:
        found = f"{array.dtype.str}, in the other byte order"
        raise given.refused(DTypeError, found, "native byte order", "Convert it: x.astype(x.dtype.newbyteorder('=')).")
    return _named(array)


def _named(array: Array) -> tuple[Array, str]:
    name = array.dtype.name
    if name == "bfloat16":  # of ml_dtypes
        return array.view(np.uint16), name
    return array, name


def _exporter(first: Any) -> Callable[[Array, ElementType, str], Any]:
    """How to hand an array to the library that the first input came from."""
    library = type(first).__module__.partition(".")[0]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(first, torch.Tensor):

        def to_torch(array: Array, kind: ElementType, what: str) -> Any:  # noqa: ARG001
            if kind.name == "bfloat16":
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)

        return to_torch
    if library in ("jax", "jaxlib"):

        def to_jax(array: Array, kind: ElementType, what: str) -> Any:
            return sys.modules["jax"].numpy.asarray(to_numpy(array, kind, what))

        return to_jax
    return to_numpy


def to_numpy(array: Array, kind: ElementType, what: str) -> Array:
    if kind.native:
        return array
    try:
        import ml_dtypes
    except ImportError as error:
        raise InferenceError(
            f"{what} is {kind.name}, which numpy lacks. Install ml_dtypes, or pass torch tensors."
        ) from error
    return array.view(ml_dtypes.bfloat16)
