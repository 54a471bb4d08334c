"""Rows of "pytorch_fp16" and "torch_tensorrt": a torch.nn.Module, TorchScript or a torch.export program.

On a GPU a call is copies of all inputs from page-locked memory, the module, copies of all outputs back, on one stream,
then a wait, with torch's CUDA events between them; on the CPU there is end to end alone.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..builder.arrays import Array, dtype_name, load_npz, to_bfloat16
from ..builder.profiles import NetworkInput
from ..errors import BenchOptionError
from ..runtime import get_runtime
from .inputs import check_batch, size_of, values
from .options import AUTOCAST, RUNTIMES, BenchOptions
from .session import Session, SkippedError
from .subjects import Subject
from .timing import Call, Sample

__all__ = ["TorchSession"]


class TorchSession(Session):
    _model: Any

    @classmethod
    def open(
        cls,
        subject: Subject,
        runtime: str,
        precision: str,
        batch: int | None,
        options: BenchOptions,
        *,
        sole: bool,
        inputs: Mapping[str, Array] | None = None,
    ) -> TorchSession:
        """`inputs` go before all that the options and the module say of them."""
        import torch

        session = cls()
        session.precision = precision
        dtype = next(name for name, short in AUTOCAST.items() if short == precision)
        on_cpu = options.device == "cpu"
        if not on_cpu and not torch.cuda.is_available():
            raise SkippedError("torch sees no GPU; --device cpu measures on the CPU")
        device = "cpu" if on_cpu else f"cuda:{options.device}"
        session.inputs = module_inputs(subject, batch, options, sole) if inputs is None else dict(inputs)
        session.batch = session.frames = next((len(array) for array in session.inputs.values() if array.ndim), 1)
        if inputs is None:
            check_batch(subject, batch, session.inputs, options)
        session.size = size_of({name: array.shape for name, array in session.inputs.items()})
        session.runs = subject.text
        session._torch, session._device = torch, device
        session._on_host = options.data == "host"
        target = subject.target
        if subject.own and isinstance(target, torch.nn.Module):
            if target.training:
                session.notes.append("the module came in training mode and was set to eval mode")
            target = target.eval().to(device)
        config: dict[str, Any] = {"device": device, "autocast_dtype": dtype}
        if runtime == "torch_tensorrt":
            config["example"] = session._tensors(device)  # what it is compiled for
        chosen: Any = get_runtime(runtime, **config)
        begin = time.perf_counter()
        session._model = chosen.open(target)
        session.load_seconds = time.perf_counter() - begin
        if RUNTIMES[runtime].compiles:
            session.compile_seconds = session._model.load_report.get("compile_seconds", session.load_seconds)
            session.compiled_now = True
        return session

    _torch: Any
    _device: str
    _on_host: bool

    def _tensors(self, device: str) -> dict[str, Any]:
        return {name: to_tensor(self._torch, array).to(device) for name, array in self.inputs.items()}

    def outputs(self) -> dict[str, Any]:
        found = self._model.run(self._tensors(self._device))
        return {name: to_array(self._torch, value) for name, value in found.items()}

    def call(self) -> Call:
        if self._device == "cpu":
            return self._on_cpu(self._tensors("cpu"))
        return _CudaCall(self._torch, self._model, self._tensors("cpu"), self._device, self._on_host)

    def _on_cpu(self, tensors: Mapping[str, Any]) -> Call:
        run, clock = self._model.run, time.perf_counter

        def call() -> Sample:
            begin = clock()
            run(tensors)
            return Sample((clock() - begin) * 1e3)

        return call

    def close(self) -> None:
        self._model.close()
        if self._device != "cpu":
            self._torch.cuda.empty_cache()  # its allocator would keep what the next row needs


class _CudaCall:
    """Calls for one thread: its stream, its events, its page-locked memory."""

    def __init__(self, torch: Any, model: Any, tensors: Mapping[str, Any], device: str, on_host: bool) -> None:
        self._torch, self._model, self._on_host = torch, model, on_host
        self._stream = torch.cuda.Stream(device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        self._here = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        self._there = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._back: dict[str, Any] = {}
        torch.cuda.synchronize(device)

    def __call__(self) -> Sample:
        clock = time.perf_counter
        first, start, end, last = self._events
        with self._torch.cuda.stream(self._stream):
            begin = clock()
            first.record()
            if self._on_host:
                for name, tensor in self._here.items():
                    self._there[name].copy_(tensor, non_blocking=True)
            start.record()
            called = clock()
            outputs = self._model.run(self._there)
            returned = clock()
            end.record()
            if self._on_host:
                for name, tensor in outputs.items():
                    self._target(name, tensor).copy_(tensor, non_blocking=True)
            last.record()
            last.synchronize()
            done = clock()
        copied = (first.elapsed_time(start), end.elapsed_time(last)) if self._on_host else (None, None)
        return Sample((done - begin) * 1e3, (returned - called) * 1e3, copied[0], start.elapsed_time(end), copied[1])

    def _target(self, name: str, tensor: Any) -> Any:
        target = self._back.get(name)
        if target is None or target.shape != tensor.shape or target.dtype != tensor.dtype:
            target = self._back[name] = self._torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return target


# -------------------------------------------------------------------------------------------------------------- inputs


def module_inputs(subject: Subject, batch: int | None, options: BenchOptions, sole: bool) -> dict[str, Array]:
    """By the names of `forward`'s arguments: what came with the module (`example_inputs`), else --shape and --inputs.
    Raises `BenchOptionError`."""
    example = subject.example_inputs(batch or 1)
    if example is not None:
        arrays = dict(example) if isinstance(example, Mapping) else dict(enumerate(_sequence(example)))
        names = parameters(subject.target)
        found = {
            (names[key] if key < len(names) else f"input{key}") if isinstance(key, int) else key: from_any(value)
            for key, value in arrays.items()
        }
        if options.shapes.keys() & found.keys():
            taken = ", ".join(sorted(options.shapes.keys() & found.keys()))
            raise BenchOptionError(
                f"--shape {taken}: {subject.name} brings its own inputs (example_inputs). Leave --shape out.",
                option="--shape",
            )
        # What a file has goes before what the module brought; it may be meant for other subjects alone.
        given = load_npz(options.inputs, "--inputs") if options.inputs is not None else {}
        return {name: given.get(name, array) for name, array in found.items()}
    names = parameters(subject.target)
    infos = [
        NetworkInput(name, dtype or "float32", ((batch or shape[0]), *shape[1:]) if shape else ())
        for name, (shape, dtype) in options.shapes.items()
        if not names or name in names
    ]
    if not infos:
        takes = f" Its forward takes {', '.join(names)}." if names else ""
        raise BenchOptionError(
            f"{subject.name}: a torch module does not say what its inputs are.{takes} Give --shape "
            f"{names[0] if names else 'NAME'}=1x3x224x224 for each, or an example_inputs beside it.",
            option="--shape",
        )
    return values_of(options, infos, sole)


def values_of(options: BenchOptions, infos: list[NetworkInput], sole: bool) -> dict[str, Array]:
    return values(infos, {info.name: tuple(info.shape) for info in infos}, options, sole=sole)


def parameters(module: Any) -> list[str]:
    """Names of `forward`'s arguments without a default; empty where nothing says them (a file)."""
    forward = getattr(module, "forward", None)
    if forward is None:
        return []
    try:
        found = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in found if p.kind in positional and p.default is inspect.Parameter.empty]


def _sequence(example: Any) -> Sequence[Any]:
    return list(example) if isinstance(example, (tuple, list)) else [example]


def from_any(value: Any) -> Array:
    """An array, or a torch tensor, as numpy."""
    if type(value).__module__.partition(".")[0] == "torch":
        import torch

        return to_array(torch, value)
    return np.ascontiguousarray(value)


def to_tensor(torch: Any, array: Array) -> Any:
    array = np.array(array, order="C")  # torch warns about memory that it must not write
    if dtype_name(array) == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(torch: Any, value: Any) -> Array:
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        return to_bfloat16(value.float().numpy())
    array: Array = value.numpy()
    return array
