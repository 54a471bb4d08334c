"""The runtime "onnx_cpu": ONNX files on the CPU by onnxruntime (`pip install jetrt[cpu]`). It needs no GPU.

`OnnxModel` has the call shape, the checks and the error classes of `jetrt.Engine`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import (
    ClosedEngineError,
    DeviceError,
    DTypeError,
    EngineBuildError,
    EngineDeserializeError,
    GradError,
    InferenceError,
    InputError,
    InputNameError,
    JetrtError,
    LayoutError,
    OutOfMemoryError,
    ShapeError,
)
from ..report import dims
from ..runtime import BuildConfig, EngineCacheEntry
from ._file import FileRuntime

if TYPE_CHECKING:
    import os

    from typing_extensions import Self

    Array = npt.NDArray[Any]

_InputErrorT = TypeVar("_InputErrorT", bound=InputError)


class OnnxCpuRuntime(FileRuntime):
    """Runs ONNX files as they are. Its configuration is the keyword arguments of `OnnxModel`."""

    label: ClassVar[str] = "onnx_cpu"

    @classmethod
    def missing(cls) -> list[str]:
        if importlib.util.find_spec("onnxruntime") is None:
            return ["the package onnxruntime (pip install 'jetrt[cpu]')"]
        return []

    def open(self, path: str | os.PathLike[str]) -> OnnxModel:
        return OnnxModel(path, **self._config)

    def compile_engine(
        self, model_path: str | os.PathLike[str], build_config: BuildConfig | None = None
    ) -> EngineCacheEntry:
        """Makes an entry of an ONNX file. The model stays as it is, so a configuration that asks for another precision
        or for calibration is refused."""
        import onnxruntime

        path = Path(model_path)
        config = build_config or BuildConfig()
        if config.precision != "fp32" or config.calibration_dataset is not None:
            asked = "calibration" if config.precision == "fp32" else f"precision {config.precision!r}"
            raise EngineBuildError(
                f"{path}: {asked} was asked for, and onnx_cpu runs a model in the types that it has. "
                'Leave precision at "fp32" and calibration_dataset out, or convert the model first.',
                path=str(path),
            )
        try:
            with self.open(path) as model:  # refuses now what could not be loaded later
                for name, low, _, _ in config.optimization_profiles:
                    info = model.inputs.get(name)
                    if info is None or len(info.shape) != len(low):
                        raise EngineBuildError(
                            f"{path}: the profile names input {name!r} of rank {len(low)}; "
                            f"the model has {_signature(model.inputs)}.",
                            path=str(path),
                        )
        except EngineDeserializeError as error:
            raise EngineBuildError(str(error), path=str(path)) from error
        versions = {"onnxruntime": onnxruntime.__version__, "jetrt": str(_core.build_info()["version"])}
        return self._entry(path, versions, config)


# --------------------------------------------------------------------------------------------------------- types


class _Type(NamedTuple):
    name: str  # as jetrt writes it
    storage: np.dtype[Any]  # what holds an element in memory
    code: int  # of ONNX's TensorProto.DataType
    native: bool  # numpy has the type itself


def _types() -> dict[str, _Type]:
    rows = [
        ("float", "float32", np.float32, 1),
        ("uint8", "uint8", np.uint8, 2),
        ("int8", "int8", np.int8, 3),
        ("uint16", "uint16", np.uint16, 4),
        ("int16", "int16", np.int16, 5),
        ("int32", "int32", np.int32, 6),
        ("int64", "int64", np.int64, 7),
        ("bool", "bool", np.bool_, 9),
        ("float16", "float16", np.float16, 10),
        ("double", "float64", np.float64, 11),
        ("uint32", "uint32", np.uint32, 12),
        ("uint64", "uint64", np.uint64, 13),
    ]
    table = {f"tensor({onnx})": _Type(name, np.dtype(dtype), code, True) for onnx, name, dtype, code in rows}
    table["tensor(bfloat16)"] = _Type("bfloat16", np.dtype(np.uint16), 16, False)
    return table


_TYPES = _types()
_BY_NAME = {t.name: t for t in _TYPES.values()}


@dataclass(frozen=True)
class OnnxTensorInfo:
    """One input or output of an ONNX model; the same fields as `jetrt.TensorInfo`."""

    name: str
    dtype: str
    #: -1 where the dimension is dynamic.
    shape: tuple[int, ...]
    mode: Literal["input", "output"]
    location: Literal["device", "host"] = "host"
    format: str = "linear"

    @property
    def profiles(self) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Always empty: onnxruntime takes any size in a dynamic dimension."""
        return []

    @property
    def profile(self) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        return self.profiles


def _signature(tensors: Mapping[str, OnnxTensorInfo]) -> str:
    return ", ".join(f"{t.name} {t.dtype}{dims(t.shape)}" for t in tensors.values()) or "none"


# --------------------------------------------------------------------------------------------------------- model


class OnnxModel:
    """An ONNX model on the CPU: ``model(x=array)["y"]``.

    It takes numpy arrays, torch tensors and anything on the CPU with ``__dlpack__`` or ``__array__``, by name or in the
    model's order, and answers in the array library of the first input. A call is finished when it returns. Several
    threads may call at once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        on_strided: Literal["error", "copy"] = "error",
        on_dtype: Literal["error", "cast"] = "error",
    ) -> None:
        """`threads` of one operator (onnxruntime's own choice if left out). `on_strided` and `on_dtype` say whether an
        input that is not contiguous, or of another type, is refused or converted; `stats` counts conversions."""
        for option, value, allowed in (
            ("on_strided", on_strided, ("error", "copy")),
            ("on_dtype", on_dtype, ("error", "cast")),
        ):
            if value not in allowed:
                raise ValueError(f"{option} is {value!r}; allowed: {' or '.join(map(repr, allowed))}")
        started = time.perf_counter()
        self._path = Path(path)
        self._on_strided = on_strided
        self._on_dtype = on_dtype
        self._stats = {"calls": 0, "strided_copies": 0, "casts": 0}
        self._lock = threading.Lock()
        self._session: Any = _open_session(self._path, threads)
        self._inputs = {t.name: t for t in map(self._describe("input"), self._session.get_inputs())}
        self._outputs = {t.name: t for t in map(self._describe("output"), self._session.get_outputs())}
        self._load_report = {
            "seconds": time.perf_counter() - started,
            "bytes": self._path.stat().st_size,
            "runtime": "onnx_cpu",
            "warnings": [],
        }

    # ------------------------------------------------------------------------------------------- what it is

    @property
    def inputs(self) -> dict[str, OnnxTensorInfo]:
        return dict(self._inputs)

    @property
    def outputs(self) -> dict[str, OnnxTensorInfo]:
        return dict(self._outputs)

    @property
    def name(self) -> str:
        return self._path.stem

    @property
    def path(self) -> str:
        return str(self._path)

    @property
    def closed(self) -> bool:
        return self._session is None

    @property
    def load_report(self) -> dict[str, Any]:
        return dict(self._load_report)

    @property
    def stats(self) -> dict[str, Any]:
        """Calls, and the copies and casts that a policy allowed."""
        with self._lock:
            return dict(self._stats)

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<OnnxModel {self.name}{state}: {_signature(self._inputs)} -> {_signature(self._outputs)}>"

    def close(self) -> None:
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- calling

    def __call__(
        self,
        *args: Any,
        stream: Any = None,
        out: Mapping[str, Any] | None = None,
        synchronize: bool = False,
        timeout: float | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        named = self._by_position(args) if args else {}
        for name in inputs:
            if name in named:
                raise self._given(name).refused(
                    InputNameError, "the input twice (by position and by name)", "once", "Remove one of the two."
                )
        return self.run({**named, **inputs}, stream=stream, out=out, synchronize=synchronize, timeout=timeout)

    def run(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        *,
        stream: Any = None,
        out: Mapping[str, Any] | None = None,
        synchronize: bool = False,  # noqa: ARG002  a CPU call is always finished when it returns
        timeout: float | None = None,  # noqa: ARG002  one session serves any number of threads
    ) -> dict[str, Any]:
        session = self._session
        if session is None:
            raise ClosedEngineError(
                f"{self.name}: the model is closed. Load it again, or close it later.", engine=self.name
            )
        if stream is not None:
            raise InferenceError(
                f"{self.name}: onnx_cpu has no streams, so it cannot wait for stream={stream!r}. "
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
            name: convert(results[name], _BY_NAME[info.dtype], f"{self.name}: output {name!r}")
            for name, info in self._outputs.items()
        }

    def _execute(
        self, session: Any, held: Mapping[str, Array], targets: Mapping[str, Array], bound: list[str]
    ) -> dict[str, Array]:
        import onnxruntime

        def value(name: str, array: Array) -> Any:
            kind = _BY_NAME[self._inputs[name].dtype]
            if kind.native:
                return onnxruntime.OrtValue.ortvalue_from_numpy(array)
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind.code)

        try:
            binding = session.io_binding()
            for name, array in held.items():
                binding.bind_ortvalue_input(name, value(name, array))
            for name, info in self._outputs.items():
                if name in targets:
                    kind = _BY_NAME[info.dtype]
                    element: Any = kind.storage.type if kind.native else kind.code
                    array = targets[name]
                    binding.bind_output(name, "cpu", 0, element, list(array.shape), array.ctypes.data)
                else:
                    binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
            values = binding.get_outputs()
        except JetrtError:
            raise
        except Exception as error:  # onnxruntime's classes have no common base
            text = str(error).strip().rstrip(".")
            if isinstance(error, MemoryError) or "bad_alloc" in text or "Failed to allocate memory" in text:
                raise OutOfMemoryError(f"{self.name}: {text}. Bound: {', '.join(bound)}.") from error
            raise InferenceError(
                f"{self.name}: onnxruntime failed: {text}. Bound: {', '.join(bound)}.",
                engine=self.name,
                bound=bound,
                log=text.splitlines(),
            ) from error
        return {
            name: _array_of(value, _BY_NAME[info.dtype])
            for (name, info), value in zip(self._outputs.items(), values, strict=True)
        }

    # ----------------------------------------------------------------------------------------------- checks

    def _describe(self, mode: Literal["input", "output"]) -> Callable[[Any], OnnxTensorInfo]:
        def describe(node: Any) -> OnnxTensorInfo:
            kind = _TYPES.get(node.type)
            if kind is None:
                raise EngineDeserializeError(
                    f"{self._path}: {mode} {node.name!r} is a {node.type}; onnx_cpu handles tensors of "
                    f"{', '.join(_BY_NAME)}. Export the model with one of these.",
                    path=str(self._path),
                )
            shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in node.shape)
            return OnnxTensorInfo(node.name, kind.name, shape, mode)

        return describe

    def _given(self, tensor: str) -> _Given:
        return _Given(self.name, "input" if tensor in self._inputs or tensor not in self._outputs else "output", tensor)

    def _by_position(self, values: Sequence[Any]) -> dict[str, Any]:
        count = len(self._inputs)
        if len(values) > count:
            raise self._given(f"#{count}").refused(
                InputNameError,
                f"{len(values)} positional inputs",
                f"{count}: {', '.join(self._inputs)}",
                "Pass one array per input, in this order or by name.",
            )
        return dict(zip(self._inputs, values, strict=False))

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

    def _take(self, info: OnnxTensorInfo, value: Any) -> Array:
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
                raise given.refused(DTypeError, found, info.dtype, "onnx_cpu casts no bfloat16: convert it yourself.")
            self._count("casts")
            with np.errstate(invalid="ignore"):  # what NaN becomes as an integer is undefined here as it is in torch
                return array.astype(_BY_NAME[info.dtype].storage, order="C")
        return np.array(array, order="C", copy=True) if strided else array

    def _copy(self, given: _Given, found: str) -> None:
        """Counts a copy that the policy allows, and refuses it otherwise."""
        if self._on_strided == "error":
            step = 'Make it contiguous once, or load with on_strided="copy" to copy it at each call.'
            raise given.refused(LayoutError, found, "contiguous memory", step)
        self._count("strided_copies")

    def _target(self, name: str, value: Any) -> Array:
        info = self._outputs[name]
        given = self._given(name)

        def refuse(given: _Given, found: str) -> None:
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
                raise self._given(name).refused(
                    InputNameError, "no output of that name in out=", ", ".join(self._outputs), "Check the spelling."
                )
        for name in self._outputs:
            if name not in out:
                raise self._given(name).refused(
                    InputNameError, "nothing in out=", "a tensor for every output", "Add it to out=."
                )
        return {name: self._target(name, value) for name, value in out.items()}

    def _count(self, what: str) -> None:
        with self._lock:
            self._stats[what] += 1


@dataclass(frozen=True)
class _Given:
    """Where a value was given; what an error about it names."""

    engine: str
    kind: str
    tensor: str

    def refused(self, error: type[_InputErrorT], found: str, allowed: str, next_step: str) -> _InputErrorT:
        return error(
            f"{self.kind} {self.tensor!r}: found {found}; allowed: {allowed}. {next_step}",
            engine=self.engine,
            tensor=self.tensor,
            found=found,
            allowed=allowed,
        )


def _check_shape(given: _Given, info: OnnxTensorInfo, shape: Sequence[int]) -> None:
    if len(shape) != len(info.shape) or any(want not in (-1, got) for want, got in zip(info.shape, shape, strict=True)):
        allowed = dims(["any" if size < 0 else size for size in info.shape])
        raise given.refused(ShapeError, dims(shape), allowed, "Change the shape, or export the model with others.")


def _open_session(path: Path, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        from ..errors import RuntimeNotAvailableError

        raise RuntimeNotAvailableError(
            f"onnx_cpu needs the package onnxruntime: pip install 'jetrt[cpu]' ({error}).",
            runtime="onnx_cpu",
            missing=["onnxruntime"],
        ) from error

    def refuse(why: str) -> EngineDeserializeError:
        return EngineDeserializeError(f"{path} {why}", path=str(path))

    with path.open("rb") as file:  # a missing file is a FileNotFoundError, as it is for `jetrt.Engine`
        head = file.read(4)
    if head == b"ftrt":
        raise refuse('is a TensorRT plan; onnx_cpu runs ONNX files. Load it with runtime="tensorrt".')
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # what fails is raised; the rest would go to stderr past Python's logging
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes have no common base
        failure = refuse(f"was refused by onnxruntime {onnxruntime.__version__}: {error}")
        failure.log = str(error).splitlines()
        raise failure from error


# ------------------------------------------------------------------------------- arrays of other libraries, in, out


def _import(value: Any, given: _Given, copy: Callable[[_Given, str], None]) -> tuple[Array, str]:
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


def _array_of(value: Any, kind: _Type) -> Array:
    if kind.native:
        return cast("Array", value.numpy())
    # onnxruntime has no numpy form of this type: a view of its memory that keeps the value alive.
    shape = value.shape()
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, kind.storage)
    memory: Any = (ctypes.c_char * (count * kind.storage.itemsize)).from_address(value.data_ptr())
    memory._owner = value
    array: Array = np.frombuffer(memory, kind.storage).reshape(shape)
    return array


def _exporter(first: Any) -> Callable[[Array, _Type, str], Any]:
    """How to hand an array to the library that the first input came from."""
    library = type(first).__module__.partition(".")[0]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(first, torch.Tensor):

        def to_torch(array: Array, kind: _Type, what: str) -> Any:  # noqa: ARG001
            if kind.name == "bfloat16":
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)

        return to_torch
    if library in ("jax", "jaxlib"):

        def to_jax(array: Array, kind: _Type, what: str) -> Any:
            return sys.modules["jax"].numpy.asarray(_to_numpy(array, kind, what))

        return to_jax
    return _to_numpy


def _to_numpy(array: Array, kind: _Type, what: str) -> Array:
    if kind.native:
        return array
    try:
        import ml_dtypes
    except ImportError as error:
        raise InferenceError(
            f"{what} is {kind.name}, which numpy lacks. Install ml_dtypes, or pass torch tensors."
        ) from error
    return array.view(ml_dtypes.bfloat16)
