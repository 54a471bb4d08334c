"""A torch model with the call shape and the error classes of `jetrt.Engine`."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import (
    ClosedEngineError,
    DeviceError,
    DTypeError,
    GradError,
    InferenceError,
    InputNameError,
    JetrtError,
    LayoutError,
    OutOfMemoryError,
    RuntimeNotAvailableError,
    ShapeError,
)
from ..report import dims
from ._callable_model import CallableModel, Given
from ._host_model import TYPES, HostTensorInfo, to_numpy
from ._torch_source import TorchSource, open_source

if TYPE_CHECKING:
    pass

AutocastDtype = Literal["float16", "bfloat16", "float32"]
_AUTOCAST: tuple[str, ...] = ("float16", "bfloat16", "float32")


class TorchModel(CallableModel):
    """A `torch.nn.Module`, TorchScript or torch.export program: ``model(x=tensor)["y"]``.

    Torch tensors on the device go in and out as they are; tensors and arrays of the host are moved there and the
    results back, which `stats` counts as ``host_copies``. A single result is called "output", those of a tuple
    "output_0", "output_1", …, those of a mapping by their keys, unless `output_names` says otherwise.

    `inputs` describe a torch.export program from the start. A module or TorchScript says nothing about its tensors:
    there they are empty until `example` or the first call has shown them, and then describe that call. `outputs`
    are known after the first call everywhere.
    """

    runtime = "pytorch_fp16"

    def __init__(
        self,
        source: Any,
        *,
        device: str = "cuda",
        autocast_dtype: AutocastDtype = "float16",
        example: Mapping[str, Any] | Sequence[Any] | None = None,
        output_names: Sequence[str] = (),
    ) -> None:
        """`device` is "cuda", "cuda:1" or "cpu"; nothing else is taken when it cannot be had. `autocast_dtype` is what
        torch's autocast computes in, "float32" switches it off. `example` are inputs for one call that describes and
        warms up the model."""
        started = time.perf_counter()
        chosen = checked_device(device, self.runtime)
        opened = self._prepare(open_source(source, chosen, self.runtime), chosen, example)
        self._start(opened, chosen, autocast_dtype, output_names, started)
        if example is not None:
            self.run(example, synchronize=True)
            self._load_report["seconds"] = time.perf_counter() - started

    def _prepare(self, source: TorchSource, device: Any, example: Any) -> TorchSource:  # noqa: ARG002  for adapters
        """What is done to a model before it is run: here nothing."""
        return source

    def _start(
        self, source: TorchSource, device: Any, autocast_dtype: str, output_names: Sequence[str], started: float
    ) -> None:
        if autocast_dtype not in _AUTOCAST:
            raise ValueError(f"autocast_dtype is {autocast_dtype!r}; allowed: {', '.join(_AUTOCAST)}")
        self._source: TorchSource | None = source
        self._name, self._path = source.name, "" if source.path is None else str(source.path)
        self._device, self._autocast_dtype = device, autocast_dtype
        self._names, self._required, self._open_ended = source.names, source.required, source.open_ended
        self._output_names = tuple(output_names)
        self._fixed = dict(source.inputs)
        self._inputs = dict(source.inputs)
        self._outputs: dict[str, HostTensorInfo] = {}
        self._stats = {"calls": 0, "host_copies": 0}
        self._lock = threading.Lock()
        self._load_report: dict[str, Any] = {
            "seconds": time.perf_counter() - started,
            "bytes": None if source.path is None else source.path.stat().st_size,
            "runtime": self.runtime,
            "kind": source.kind,
            "device": str(device),
            "autocast_dtype": autocast_dtype,
            "warnings": list(source.warnings),
        }

    # ------------------------------------------------------------------------------------------- what it is

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names that a call may give, in order; known from the start."""
        return self._names

    @property
    def name(self) -> str:
        return self._name

    @property
    def path(self) -> str:
        """Empty for a module that came from no file."""
        return self._path

    @property
    def device(self) -> str:
        return str(self._device)

    @property
    def closed(self) -> bool:
        return self._source is None

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<{type(self).__name__} {self._name}{state}: {', '.join(self._names)} on {self._device}>"

    def close(self) -> None:
        """Drops the model. Memory of a file's model returns to torch's cache; a module of the caller's stays."""
        self._source = None

    def run(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        *,
        stream: Any = None,
        out: Mapping[str, Any] | None = None,
        synchronize: bool = False,
        timeout: float | None = None,  # noqa: ARG002  nobody waits for another caller
    ) -> dict[str, Any]:
        import torch

        source = self._source
        if source is None:
            raise ClosedEngineError(f"{self._name}: the model is closed. Load it again, or close it later.")
        named = dict(inputs) if isinstance(inputs, Mapping) else self._by_position(inputs)
        self._check_names(named)
        with self._on_stream(torch, stream):
            taken = {name: self._take(torch, name, value) for name, value in named.items()}
            if stream is not None:  # the allocator must not give their memory away before that stream has read it
                for value in taken.values():
                    if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                        value.record_stream(torch.cuda.current_stream(self._device))
            bound = [f"{name} {_shown(value)}" for name, value in taken.items()]
            with self._failures(torch, bound), torch.no_grad(), self._autocast(torch):
                results = self._named_results(torch, source.call(taken))
            first = next(iter(named.values()), None)
            if out is None:
                answer = {name: self._give(torch, name, value, first) for name, value in results.items()}
            else:
                answer = self._write(torch, results, out)
            if synchronize and self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        with self._lock:
            self._stats["calls"] += 1
            if not self._outputs:
                self._describe(taken, results)
        return answer

    @contextlib.contextmanager
    def _on_stream(self, torch: Any, stream: Any) -> Iterator[None]:
        if self._device.type != "cuda":
            if stream is not None:
                raise InferenceError(
                    f"{self._name}: device {str(self._device)!r} has no streams, so it cannot wait for "
                    f"stream={stream!r}. Leave stream= out.",
                    engine=self._name,
                )
            yield
            return
        if isinstance(stream, int):
            stream = torch.cuda.ExternalStream(stream, device=self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            yield

    def _autocast(self, torch: Any) -> Any:
        if self._autocast_dtype == "float32":
            # The caller's own autocast must not reach in either.
            return torch.autocast(self._device.type, enabled=False)
        return torch.autocast(self._device.type, dtype=getattr(torch, self._autocast_dtype))

    @contextlib.contextmanager
    def _failures(self, torch: Any, bound: list[str]) -> Iterator[None]:
        try:
            yield
        except JetrtError:
            raise
        except Exception as error:  # a module may raise anything
            text = str(error).strip().rstrip(".") or type(error).__name__
            if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
                raise OutOfMemoryError(f"{self._name}: {text}. Bound: {', '.join(bound)}.") from error
            raise InferenceError(
                f"{self._name}: torch failed: {type(error).__name__}: {text}. Bound: {', '.join(bound)}.",
                engine=self._name,
                bound=bound,
                log=text.splitlines(),
            ) from error

    # ------------------------------------------------------------------------------------- what goes in and out

    def _check_names(self, named: Mapping[str, Any]) -> None:
        for name in named:
            if name not in self._names and not self._open_ended:
                raise self._given(name).refused(
                    InputNameError,
                    "no input of that name",
                    ", ".join(self._names),
                    "Check the spelling; model.input_names lists them.",
                )
        for name in self._names:
            if name in self._required and name not in named:
                raise self._given(name).refused(
                    InputNameError,
                    "nothing (the input is missing)",
                    "an array",
                    f"Pass all of: {', '.join(n for n in self._names if n in self._required)}.",
                )

    def _take(self, torch: Any, name: str, value: Any) -> Any:
        """The value as a tensor on the device. Python's numbers, texts and None go in as they are: forward may have
        such arguments."""
        given = self._given(name)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.Tensor):
            tensor = value
            if tensor.requires_grad and torch.is_grad_enabled():
                raise given.refused(
                    GradError,
                    "a tensor that requires grad while grad mode is on",
                    "no autograd",
                    "Call under torch.no_grad() or torch.inference_mode(), or pass x.detach().",
                )
        elif isinstance(value, (np.ndarray, np.generic)):
            tensor = self._from_numpy(torch, given, np.asanyarray(value))
        elif hasattr(value, "__dlpack__"):
            tensor = torch.from_dlpack(value)
        elif hasattr(value, "__cuda_array_interface__"):
            tensor = torch.as_tensor(value, device=self._device)
        else:
            allowed = "an array of torch, numpy or JAX, or an object with __dlpack__"
            raise given.refused(
                DTypeError,
                f"an object of type {type(value).__name__}",
                allowed,
                "Wrap it: numpy.asarray(x, dtype=...).",
            )
        self._check_fixed(given, name, tensor)
        if _is_on(tensor.device, self._device):
            return tensor
        if tensor.device.type != "cpu":
            raise given.refused(DeviceError, str(tensor.device), f"{self._device} or cpu", "Move it there first.")
        with self._lock:
            self._stats["host_copies"] += 1
        return tensor.to(self._device)

    def _from_numpy(self, torch: Any, given: Given, array: Any) -> Any:
        if isinstance(array, np.ma.MaskedArray) or not array.dtype.isnative or any(s < 0 for s in array.strides):
            found = f"dtype {array.dtype.str}, strides {array.strides} (bytes)"
            raise given.refused(
                LayoutError, found, "native byte order and no negative stride", "Make a plain copy of it."
            )
        if array.dtype.name == "bfloat16":  # of ml_dtypes
            return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
        try:
            # torch cannot share what must not be written to.
            return torch.from_numpy(array if array.flags.writeable else array.copy())
        except TypeError as error:
            raise given.refused(
                DTypeError, array.dtype.name, "a type that torch has", "Convert it where it is made."
            ) from error

    def _check_fixed(self, given: Given, name: str, tensor: Any) -> None:
        info = self._fixed.get(name)
        if info is None:
            return
        shape = tuple(tensor.shape)
        if len(shape) != len(info.shape) or any(w not in (-1, got) for w, got in zip(info.shape, shape, strict=True)):
            allowed = dims(["any" if size < 0 else size for size in info.shape])
            raise given.refused(ShapeError, dims(shape), allowed, "Change the shape, or export the model with others.")
        found = str(tensor.dtype).removeprefix("torch.")
        if found != info.dtype:
            raise given.refused(DTypeError, found, info.dtype, "Convert it once where it is made.")

    def _named_results(self, torch: Any, results: Any) -> dict[str, Any]:
        if isinstance(results, torch.Tensor):
            pairs = [("output", results)]
        elif isinstance(results, Mapping):
            pairs = [(str(name), value) for name, value in results.items()]
        elif hasattr(results, "_asdict"):  # a named tuple
            pairs = list(results._asdict().items())
        elif isinstance(results, (tuple, list)):
            pairs = [(f"output_{index}", value) for index, value in enumerate(results)]
        else:
            pairs = [("output", results)]
        if self._output_names:
            if len(self._output_names) != len(pairs):
                raise InferenceError(
                    f"{self._name}: output_names has {len(self._output_names)} names "
                    f"({', '.join(self._output_names)}) and the model gave {len(pairs)} results.",
                    engine=self._name,
                )
            pairs = [(name, value) for name, (_, value) in zip(self._output_names, pairs, strict=True)]
        for name, value in pairs:
            if value is not None and not isinstance(value, torch.Tensor):
                raise InferenceError(
                    f"{self._name}: result {name!r} is a {type(value).__name__}, not a tensor. Wrap the module in one "
                    "that returns a tensor, or a tuple or mapping of tensors.",
                    engine=self._name,
                )
        return {name: value for name, value in pairs if value is not None}

    def _give(self, torch: Any, name: str, value: Any, first: Any) -> Any:
        """A result in the library of the first input, and on the host where that was."""
        if isinstance(first, torch.Tensor):
            if value.device == first.device or first.device.type != "cpu":
                return value
            return self._to_host(value)
        if not isinstance(first, (np.ndarray, np.generic)):
            return value
        host = self._to_host(value) if value.device.type != "cpu" else value
        host = host.detach().resolve_conj().resolve_neg().contiguous()
        if host.dtype == torch.bfloat16:
            bits = host.view(torch.int16).numpy().view(np.uint16)
            return to_numpy(bits, TYPES["bfloat16"], f"{self._name}: output {name!r}")
        return host.numpy()

    def _to_host(self, value: Any) -> Any:
        with self._lock:
            self._stats["host_copies"] += 1
        return value.cpu()

    def _write(self, torch: Any, results: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
        for name in (*out, *results):
            if name not in results or name not in out:
                found = "no output of that name in out=" if name not in results else "nothing in out="
                raise self._given(name, "output").refused(
                    InputNameError, found, ", ".join(results), "Give a tensor for every output."
                )
        for name, value in results.items():
            given, target = self._given(name, "output"), out[name]
            if isinstance(target, np.ndarray) and target.flags.writeable:
                target = torch.from_numpy(target)
            if not isinstance(target, torch.Tensor):
                raise given.refused(DTypeError, f"a {type(target).__name__}", "a tensor or array", "Give one.")
            if target.shape != value.shape:
                raise given.refused(ShapeError, dims(target.shape), dims(value.shape), "Give a tensor of that shape.")
            if target.dtype != value.dtype:
                raise given.refused(DTypeError, str(target.dtype), str(value.dtype), "Give a tensor of that type.")
            target.copy_(value)
        return {name: out[name] for name in results}

    def _describe(self, taken: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        def info(name: str, value: Any, mode: Literal["input", "output"]) -> HostTensorInfo:
            location: Literal["device", "host"] = "host" if value.device.type == "cpu" else "device"
            return HostTensorInfo(
                name, str(value.dtype).removeprefix("torch."), tuple(map(int, value.shape)), mode, location
            )

        if not self._inputs:
            self._inputs = {n: info(n, value, "input") for n, value in taken.items() if hasattr(value, "device")}
        self._outputs = {n: info(n, value, "output") for n, value in results.items()}


def _is_on(found: Any, wanted: Any) -> bool:
    return bool(found.type == wanted.type and (found.index or 0) == (wanted.index or 0))


def _shown(value: Any) -> str:
    if not hasattr(value, "shape"):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{dims(tuple(value.shape))}"


# -------------------------------------------------------------------------------------------------------- device


def checked_device(device: str, runtime: str) -> Any:
    """The torch device, with its number. Raises `ValueError` for what is none, `RuntimeNotAvailableError` where it
    cannot be had."""
    import torch

    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device is {device!r}; allowed: "cuda", "cuda:1" and so on, "cpu" ({error})') from error
    lacking = device_missing(device)
    if lacking:
        raise RuntimeNotAvailableError(
            f"The runtime {runtime!r} cannot be had here. Missing: {'; '.join(lacking)}.",
            runtime=runtime,
            missing=lacking,
            available=[],
            consumers=[],
        )
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def device_missing(device: str) -> list[str]:
    """Why torch, which is imported, cannot use the device."""
    import torch

    kind, _, number = device.partition(":")
    if kind == "cpu":
        return []
    if kind != "cuda":
        return [f'a device {device!r} (allowed: "cuda", "cuda:1" and so on, "cpu")']
    with warnings.catch_warnings(record=True) as said:  # torch says the reason as a warning
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = "was built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        why += "".join(f": {str(warning.message).partition('. ')[0]}" for warning in said[:1])
        return [f'a CUDA device for torch (torch {torch.__version__} {why}); device="cpu" must be asked for']
    if number and int(number) >= torch.cuda.device_count():
        return [f"the CUDA device {number} (torch sees {torch.cuda.device_count()})"]
    return []
