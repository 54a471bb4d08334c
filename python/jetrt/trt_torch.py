"""`Engine` of the GR00T scripts' module `trt_torch`, over jetrt: the same calls, and neither waits nor fills.

    import jetrt.trt_torch
    trt_model_forward.Engine = jetrt.trt_torch.Engine  # or, before it is imported: sys.modules["trt_torch"] = …

What differs from the scripts' own class: a call does not wait for its result (`synchronize=True`, or
JETRT_TRT_SYNCHRONIZE=1, waits as theirs does), outputs are not filled with zeros first, a missing input is refused
before anything runs, every return code is checked, and nothing is pinned until the interpreter ends.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from . import _core, settings
from .errors import (
    ClosedEngineError,
    DeviceError,
    DTypeError,
    EngineDeserializeError,
    InputError,
    InputNameError,
    ShapeError,
)
from .lookalikes import DTYPES, ContextLookAlike, DataType, EngineLookAlike

__all__ = ["Engine", "EngineAssertionError", "GraphSafeEngine", "PlanAssertionError", "torch_type"]

_log = logging.getLogger("jetrt")

_TORCH = {
    DataType.FLOAT: torch.float32,
    DataType.HALF: torch.float16,
    DataType.BF16: torch.bfloat16,
    DataType.INT8: torch.int8,
    DataType.INT32: torch.int32,
    DataType.BOOL: torch.bool,
    DataType.UINT8: torch.uint8,
    DataType.INT64: torch.int64,
}


class EngineAssertionError(InputError, AssertionError):
    """An input that `Engine` refuses; the scripts' class asserts."""


class PlanAssertionError(EngineDeserializeError, AssertionError):
    """A plan that could not be loaded; the scripts' class asserts."""


class _ClosedError(ClosedEngineError, RuntimeError):
    """A call of a closed engine; the scripts' newer class raises RuntimeError."""


def torch_type(trt_type: Any) -> torch.dtype:
    """The torch dtype of a TensorRT type: a `tensorrt.DataType`, its number, or jetrt's name for it ("bfloat16").

    Raises TypeError where torch has none that TensorRT binds: FP8, FP4, INT4.
    """
    found: Any = None
    if isinstance(trt_type, str):
        found = DTYPES.get(trt_type)
    elif isinstance(trt_type, int) and not isinstance(trt_type, bool):
        found = trt_type
    else:
        found = getattr(DataType, str(getattr(trt_type, "name", "")), None)
    if found not in _TORCH:
        raise TypeError(
            f"Could not resolve TensorRT datatype to an equivalent PyTorch datatype. {trt_type!s}; allowed: "
            f"{', '.join(name for name, code in DTYPES.items() if code in _TORCH)}"
        )
    return _TORCH[found]


class Engine:
    """A TensorRT engine as the GR00T scripts call it.

        engine = Engine("dit_bf16.engine")
        engine.set_runtime_tensor_shape("vl_embs", (1, 280, 2048))
        velocity = engine(sa_embs, vl_embs, timestep, image_mask=m, backbone_attention_mask=a)["output"]

    file: path of the plan. plugins: paths of plugin libraries.
    synchronize: wait for the result in each call; None: as JETRT_TRT_SYNCHRONIZE says, else no.
    graphs: "off", "auto" or "require", as in `jetrt.Engine`; None: as JETRT_GRAPHS says, else "off".

    The engine is on torch's current device. Results are torch tensors on it, ordered on the current stream; each stays
    valid after later calls. A stream that reads a result and that no call of the engine worked on is announced by
    `jetrt.record_stream`.

    Attributes: file, in_meta and out_meta (lists of [name, shape, torch.dtype] in the engine's order, -1 where a
    dimension is dynamic), meta (both), plugins (ctypes libraries), logger (Python's), core (the `jetrt.Engine`), and
    the look-alikes handle and execution_context, which are None once the engine is closed.

    Prints its inputs and outputs when made, on rank 0 alone (LOCAL_RANK); JETRT_TRT_TABLE=line: one line in the log of
    `jetrt` instead.

    Raises PlanAssertionError (an AssertionError) for a plan that cannot be loaded, FileNotFoundError, TypeError for an
    input or output of a type that torch does not bind.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        plugins: Sequence[str | os.PathLike[str]] = (),
        *,
        synchronize: bool | None = None,
        graphs: str | None = None,
    ) -> None:
        super().__init__()
        self.logger = _log
        self.file = file
        self.synchronize = _flag("JETRT_TRT_SYNCHRONIZE") if synchronize is None else synchronize
        self._graphs: Any = graphs or settings.graphs()
        self._plugin_paths = list(plugins)
        self._closed = False
        self.load(file)
        # The core has opened them, after TensorRT.
        self.plugins = [ctypes.CDLL(os.fspath(path), ctypes.RTLD_GLOBAL) for path in plugins]
        self.print()

    def load(self, file: str | os.PathLike[str]) -> None:
        """Loads the plan; called by the constructor."""
        try:
            self.core = self._open(file)
        except EngineDeserializeError as error:
            raise PlanAssertionError(
                f"Failed to deserialize the cuda engine from file: {file}. {error}", **_fields(error)
            ) from error
        self.handle: Any = EngineLookAlike(self.core)
        self.execution_context: Any = ContextLookAlike(self.handle)
        try:
            self.in_meta = [[name, info.shape, torch_type(info.dtype)] for name, info in self.core.inputs.items()]
            self.out_meta = [[name, info.shape, torch_type(info.dtype)] for name, info in self.core.outputs.items()]
        except TypeError:
            self.close()
            raise
        self.meta = [*self.in_meta, *self.out_meta]
        self._inputs = {name: dtype for name, _, dtype in self.in_meta}
        # Read by TensorRT on the host.
        self._on_host = {name for name, info in self.core.inputs.items() if info.location == "host"}

    def _open(self, file: str | os.PathLike[str]) -> _core.Engine:
        return _core.Engine(
            file,
            device=torch.cuda.current_device(),
            graphs=self._graphs,
            on_strided="copy",
            plugins=self._plugin_paths,
        )

    def print(self) -> None:
        """Shows the inputs and outputs, on rank 0 alone."""
        if int(os.environ.get("LOCAL_RANK", -1)) not in (0, -1):
            return
        lines = [f"Engine file: {self.file}"]
        for title, rows in (("Inputs", self.in_meta), ("Outputs", self.out_meta)):
            lines.append(f"{title}: {len(rows)}")
            lines += [f"   {i}. {n}: {'x'.join(map(str, s))} [{d}]" for i, (n, s, d) in enumerate(rows)]
        if os.environ.get("JETRT_TRT_TABLE") == "line":
            _log.info("%s", "; ".join(line.strip() for line in lines))
        else:
            print("\n".join(["TensorRT engine, run by jetrt", *lines]))

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of an input; KeyError for any other name."""
        return self._inputs[name]

    def set_runtime_tensor_shape(self, name: str, shape: Sequence[int]) -> None:
        """Says which shape an input with dynamic dimensions has from now on. One that the engine does not take changes
        nothing, goes to the log, and is told again by the call that then does not fit."""
        self._context().set_input_shape(name, shape)

    def _context(self) -> Any:
        if self._closed:
            raise _ClosedError(f"{self.file}: the engine was closed; load it again.")
        return self.execution_context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the engine; returns a dict name -> tensor, or with return_list=True a list in the order of out_meta.

        Inputs are CUDA tensors of exactly the engine's dtype and of the shape that is set; strided ones are copied by
        one kernel. They come by position or by name; keywords that name no input are dropped. `synchronize` overrides
        the constructor's. Raises EngineAssertionError (an AssertionError), `jetrt.errors.ClosedEngineError`, and for
        what only the core sees (device 1 instead of 0, no common profile) the other subclasses of
        `jetrt.errors.InferenceError`.
        """
        return_list = kwargs.pop("return_list", False)
        synchronize = self.synchronize
        if "synchronize" in kwargs and "synchronize" not in self._inputs:
            synchronize = kwargs.pop("synchronize")
        tensors = self._checked(args, kwargs)
        outputs = self.core.run(tensors, synchronize=True) if synchronize else self.core(*tensors)
        return list(outputs.values()) if return_list else outputs

    def _checked(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """All inputs in the engine's order."""
        context = self._context()
        if len(args) > len(self.in_meta):
            raise IndexError(
                f"found {len(args)} positional inputs; allowed: {len(self.in_meta)}: {', '.join(self._inputs)}"
            )
        shapes, grad = context.shapes, torch.is_grad_enabled()
        tensors: list[Any] = []
        given = len(args)
        for i, (name, dtype) in enumerate(self._inputs.items()):
            if i < given:
                if name in kwargs:
                    raise self._count(given + 1, f"'{name}' came by position and by name")
                x, by_name = args[i], False
            elif name in kwargs:
                x, by_name = kwargs[name], True
            else:
                continue
            if not isinstance(x, torch.Tensor):
                raise _refused(by_name, name, "type", type(x), torch.Tensor)
            if x.shape != shapes[name]:
                raise self._wrong_shape(by_name, name, x)
            if x.dtype is not dtype:
                raise _refused(by_name, name, "dtype", x.dtype, dtype)
            if not x.is_cuda and name not in self._on_host:
                raise _refused(by_name, name, "device", x.device, "cuda")
            tensors.append(x.detach() if grad and x.requires_grad else x)
        if len(tensors) != len(self.in_meta):
            missing = [name for i, name in enumerate(self._inputs) if i >= given and name not in kwargs]
            dropped = [name for name in kwargs if name not in self._inputs]
            why = f"missing: {', '.join(missing)}"
            raise self._count(len(tensors), why + (f"; not inputs: {', '.join(dropped)}" if dropped else ""))
        return tensors

    def _count(self, found: int, why: str) -> EngineAssertionError:
        outputs = len(self.out_meta)
        return EngineAssertionError(
            f"Invalid input tensors. The expected I/O tensors are {len(self.meta)}, but got {found + outputs}: {why}. "
            f"Pass each of {', '.join(self._inputs)} once. Nothing was run.",
            found=found,
            allowed=len(self.in_meta),
        )

    def _wrong_shape(self, by_name: bool, name: str, x: Any) -> EngineAssertionError:
        wanted, found = self.execution_context.shapes[name], tuple(x.shape)
        if by_name:
            what = f"Invalid input[{name}] shape: {found}, but the expected shape is: {wanted}"
        else:
            what = f"Invalid input shape: {wanted} != {found} (input '{name}')"
        return EngineAssertionError(f"{what}. {self._next_step(name, found)}", tensor=name, found=found, allowed=wanted)

    def _next_step(self, name: str, found: tuple[int, ...]) -> str:
        refused = self.execution_context.refused.get(name)
        if refused is not None:
            return f"The last shape that was asked for was refused: {refused}."
        if -1 in self.handle.get_tensor_shape(name):
            return f"Call set_runtime_tensor_shape('{name}', {found}) first."
        return "The engine was built for this shape alone."

    def close(self) -> None:
        """Waits for the engine's work and frees it. Results that are held stay valid. Safe to call again."""
        self._closed = True
        self.handle = self.execution_context = None
        self.core.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else ", ".join(f"{n} {d}{list(s)}" for n, s, d in self.in_meta)
        return f"<{type(self).__module__}.{type(self).__qualname__} '{self.file}': {state}>"


class GraphSafeEngine(Engine):
    """`Engine` whose outputs keep their addresses, for graphs that are captured over it and loops without allocation.

    With cache_outputs=True (the default of a call) each output is one tensor for each (name, shape, dtype, device),
    which the next call overwrites. Errors are TypeError, ValueError and RuntimeError instead of AssertionError.

    Subclasses may override `_get_output_tensor` and `_bind_input`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._cached: dict[tuple[Any, ...], torch.Tensor] = {}
        #: Shapes of all outputs, by those of all inputs.
        self._output_shapes: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        super().__init__(*args, **kwargs)

    def set_runtime_tensor_shape(self, name: str, shape: Sequence[int]) -> None:
        """As in `Engine`; ShapeError (a ValueError) for a shape that the engine does not take."""
        if not self._context().set_input_shape(name, shape):
            why = self.execution_context.refused[name]
            raise ShapeError(f"input '{name}': {why}.", tensor=name, found=tuple(shape))

    def forward(
        self,
        *args: Any,
        synchronize: bool | None = None,
        cache_outputs: bool = True,
        return_list: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `Engine.forward`. cache_outputs=False: new tensors, which stay valid.

        Raises DTypeError (a TypeError), ShapeError and DeviceError (ValueErrors), InputNameError (a TypeError) for a
        missing input, RuntimeError for a closed engine.
        """
        try:
            tensors = self._checked(args, kwargs)
        except EngineAssertionError as error:
            raise _as_plain(error) from None
        tensors = [self._bind_input(name, x) for name, x in zip(self._inputs, tensors, strict=True)]
        wait = self.synchronize if synchronize is None else synchronize
        if cache_outputs:
            outputs = self._into_cached(tensors, wait)
        else:
            outputs = self.core.run(tensors, synchronize=wait)
        return list(outputs.values()) if return_list else outputs

    def _bind_input(self, name: str, tensor: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - for subclasses
        """Called for each input, which has passed the checks; what it returns is what the engine reads."""
        return tensor

    def _get_output_tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Called for each output with cache_outputs=True; the engine writes into what it returns."""
        key = (name, shape, dtype, device)
        found = self._cached.get(key)
        if found is None:
            # A normal tensor, which may be updated inside inference mode and outside.
            with torch.inference_mode(False):
                found = self._cached[key] = torch.empty(shape, dtype=dtype, device=device)
        return found

    def _into_cached(self, tensors: list[Any], synchronize: bool) -> dict[str, torch.Tensor]:
        shapes: Any = [shape for _, shape, _ in self.out_meta]
        dynamic = any(-1 in shape for shape in shapes)
        key = tuple([tuple(x.shape) for x in tensors])
        if dynamic:
            shapes = self._output_shapes.get(key)
        if shapes is not None:
            outputs = self._output_tensors(shapes)
            try:
                self.core.run(tensors, out=outputs, synchronize=synchronize)
                return outputs
            except ShapeError:
                if not dynamic:
                    raise
                # It depends on values, too. Nothing was run.
        # Dynamic outputs tell their shapes by running; the result is copied this once.
        made = self.core(*tensors)
        shapes = self._output_shapes[key] = [tuple(x.shape) for x in made.values()]
        outputs = self._output_tensors(shapes)
        for name, x in made.items():
            outputs[name].copy_(x)
        if synchronize:
            torch.cuda.current_stream(self.core.device).synchronize()
        return outputs

    def _output_tensors(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, torch.Tensor]:
        device = torch.device("cuda", self.core.device)
        return {
            name: self._get_output_tensor(name, shape, dtype, device)
            for (name, _, dtype), shape in zip(self.out_meta, shapes, strict=True)
        }

    def close(self) -> None:
        """As in `Engine`; results that were cached and are not held elsewhere are freed, too."""
        super().close()
        self._cached.clear()


def _flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def _fields(error: InputError | EngineDeserializeError) -> dict[str, Any]:
    return {name: value for name, value in vars(error).items() if name != "message"}


def _refused(by_name: bool, name: str, what: str, found: Any, allowed: Any) -> EngineAssertionError:
    """`what`: "type", "dtype" or "device"."""
    subject, place = (f"tensor[{name}]", "") if by_name else ("tensor", f" (input '{name}')")
    if what == "type":
        text = f"Unsupported {subject} type: {found}{place}. Pass a torch.Tensor."
    else:
        next_step = f".to({allowed})" if what == "dtype" else ".cuda()"
        text = (
            f"Invalid {subject} {what}, expected {what} is {allowed}, but got {found}{place}. Call {next_step} first."
        )
    return EngineAssertionError(text, tensor=name, found=found, allowed=allowed, kind=what)


def _as_plain(error: EngineAssertionError) -> InputError:
    """The same mistake as GraphSafeEngine tells it."""
    kinds = {"type": DTypeError, "dtype": DTypeError, "device": DeviceError}
    if error.tensor is None:
        cls: type[InputError] = InputNameError
    else:
        cls = kinds.get(getattr(error, "kind", ""), ShapeError)
    return cls(error.message, **_fields(error))
