"""`TensorRTDiTWrapper` and `TensorRTBackboneWrapper`, the classes of the GR00T scripts and forks, over jetrt's core.

What a call does beyond those classes: names, dtypes and shapes are checked before anything runs, an input of another
type is cast exactly or refused by name, and the result has the type that the engine gives it.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import (
    ClosedEngineError,
    CudaError,
    DeviceError,
    DTypeError,
    EngineDeserializeError,
    GradError,
    InferenceError,
    InputError,
    InputNameError,
    OutOfMemoryError,
)
from ..lookalikes import ContextLookAlike, EngineLookAlike
from .files import backbone_plan, dit_plan
from .preloading import open_core

__all__ = ["TensorRTBackboneWrapper", "TensorRTDiTWrapper"]

_SIGNED = {"int8": 8, "int16": 16, "int32": 32, "int64": 64}
_UNSIGNED = {"uint8": 8, "uint16": 16, "uint32": 32, "uint64": 64}
_FLOAT = ("bfloat16", "float16", "float32", "float64")

#: Input shapes whose output shapes a ring remembers; a loop's sequence lengths are a few hundred at most.
_REMEMBERED = 1024


def may_cast(found: str, wanted: str) -> bool:
    """Is there a cast that keeps the meaning: between floats, to a wider integer, from and to bool (x != 0)?"""
    if found == wanted:
        return True
    known = found in _FLOAT or found in _SIGNED or found in _UNSIGNED or found == "bool"
    if wanted == "bool" or found == "bool":
        return known
    if found in _FLOAT:
        return wanted in _FLOAT
    if found in _SIGNED:
        return _SIGNED[found] < _SIGNED.get(wanted, 0)
    if found in _UNSIGNED:
        return _UNSIGNED[found] < max(_SIGNED.get(wanted, 0), _UNSIGNED.get(wanted, 0))
    return False


def device_ordinal(device: int | str | torch.device) -> int:
    """The ordinal in 1, "cuda:1" or torch.device("cuda", 1); "cuda" is the current device."""
    if isinstance(device, int) and not isinstance(device, bool):
        return device
    found = torch.device(device)
    if found.type != "cuda":
        raise ValueError(f"device: found {device!r}; allowed: a CUDA device, as 0 or 'cuda:0'")
    return torch.cuda.current_device() if found.index is None else int(found.index)


def dtype_name(dtype: Any) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


class EngineWrapper:
    """What both wrappers share: loading, the rules for inputs, reuse of outputs, and the attributes of the scripts'.

    Attributes: device (ordinal), input_dtypes and output_dtypes (name -> torch.dtype), stream (the caller's current
    one), output_generation (calls so far), trt_logger (Python's), core (the `jetrt.Engine`), and the look-alikes engine
    and context. There is no runtime: nothing is left to deserialise with.
    """

    _failed = "TensorRT inference failed"
    _not_loaded = "Failed to load TensorRT engine from"

    def __init__(self, path: Path, device: int | str | torch.device, *, cache_outputs: bool, ring: int) -> None:
        if ring < 0 or (cache_outputs and ring > 1):
            raise ValueError(
                f"ring: found {ring}; allowed: 0 (every result stays valid) or the number of results that do; "
                "cache_outputs=True is ring=1"
            )
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA not available for TensorRT")
        torch.cuda.init()
        self.device = device_ordinal(device)
        # The scripts' wrappers leave their device current.
        torch.cuda.set_device(self.device)
        self.engine_path = str(path)
        try:
            self._engine = open_core(path, self.device)
        except (EngineDeserializeError, OutOfMemoryError, CudaError) as error:
            raise RuntimeError(f"{self._not_loaded} {path}: {error}") from error
        self.trt_logger = logging.getLogger("jetrt")
        self.engine = EngineLookAlike(self._engine)
        self.context = ContextLookAlike(self.engine)
        self._wanted = {name: info.dtype for name, info in self._engine.inputs.items()}
        self._names = list(self._wanted)
        self._accepted: set[tuple[torch.dtype, ...]] = set()
        self._ring = _Ring(self._engine, ring or int(cache_outputs)) if ring or cache_outputs else None
        self._warned = False
        self.output_generation = 0

    # What the scripts' classes have ----------------------------------------------------------------------------------

    @property
    def input_dtypes(self) -> dict[str, torch.dtype]:
        return {name: getattr(torch, dtype) for name, dtype in self._wanted.items()}

    @property
    def output_dtypes(self) -> dict[str, torch.dtype]:
        return {name: getattr(torch, info.dtype) for name, info in self._engine.outputs.items()}

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream that a call now would work on: the caller's current one, so that no other need be waited for."""
        return torch.cuda.current_stream(self.device)

    @property
    def core(self) -> Any:
        """The `jetrt.Engine` behind this, for its stats, profiles and `prepare`."""
        return self._engine

    def close(self) -> None:
        """Waits for the engine's work and frees it. Results that are held stay valid. Safe to call again."""
        if self._ring is not None:
            self._ring.clear()
        self._engine.close()

    # A call -----------------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """All outputs by name. An input that is None, or that the engine does not have, is left out (the latter with
        one warning); one that is missing raises `InputNameError`."""
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        unknown = [name for name in given if name not in self._wanted]
        for name in unknown:
            del given[name]
        if unknown and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.engine_path}: the engine has no input {' or '.join(map(repr, unknown))}; what is passed for it "
                f"is not used. Its inputs: {', '.join(self._names)}.",
                RuntimeWarning,
                stacklevel=3,
            )
        if len(given) < len(self._names):
            return self._engine.run(given)  # raises, naming the missing input
        return self._call([given[name] for name in self._names])

    def _call(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """All inputs in the engine's order."""
        try:
            dtypes = tuple([tensor.dtype for tensor in tensors])
            accepted = dtypes in self._accepted
        except (AttributeError, TypeError):
            accepted = False
        if not accepted:
            self._accept(tensors)
        try:
            try:
                return self._enqueue(tensors)
            except (DeviceError, GradError):
                # As the scripts' wrapper: tensors of another device are moved, gradients end here.
                return self._enqueue([self._placed(name, t) for name, t in zip(self._names, tensors, strict=True)])
        except (InputError, ClosedEngineError):
            raise
        except (InferenceError, CudaError) as error:
            raise RuntimeError(f"{self._failed}: {error}") from error

    def _enqueue(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        # Inside a capture the engine gives the graph buffers of its own: a ring's would be written by other calls.
        if self._ring is None or torch.cuda.is_current_stream_capturing():
            outputs = self._engine(*tensors)
            self.output_generation += 1
            return outputs
        outputs = self._ring(tensors)
        self.output_generation = self._ring.calls
        return outputs

    def _accept(self, tensors: Sequence[torch.Tensor]) -> None:
        """Refuses a type that would have to be guessed."""
        for (name, wanted), tensor in zip(self._wanted.items(), tensors, strict=True):
            if not isinstance(tensor, torch.Tensor):
                raise DTypeError(
                    f"input '{name}': found {type(tensor).__name__}; allowed: torch.Tensor. Convert it first.",
                    tensor=name,
                    found=type(tensor).__name__,
                    allowed="torch.Tensor",
                )
            found = dtype_name(tensor.dtype)
            if not may_cast(found, wanted):
                others = [t for t in ("bool", *_SIGNED, *_UNSIGNED, *_FLOAT) if t != wanted and may_cast(t, wanted)]
                raise DTypeError(
                    f"input '{name}': found {found}; allowed: {wanted}, or, cast by a kernel, {', '.join(others)}. "
                    f"Pass x.to(torch.{wanted}) if that is what is meant.",
                    tensor=name,
                    found=found,
                    allowed=wanted,
                    engine=self._engine.name,
                )
        self._accepted.add(tuple([tensor.dtype for tensor in tensors]))

    def _placed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        # A shape tensor is read by TensorRT on the host.
        on_host = self._engine.inputs[name].location == "host"
        return tensor.detach().to("cpu" if on_host else f"cuda:{self.device}")


class _Ring:
    """Calls an engine with the outputs of the n-th last call as memory, once there are n for these output shapes."""

    def __init__(self, engine: Any, size: int) -> None:
        self._engine = engine
        self._size = size
        self._shapes: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._slots: dict[tuple[Any, ...], list[dict[str, torch.Tensor]]] = {}
        self._lock = threading.Lock()
        self.calls = 0

    def __call__(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        key = tuple([tensor.shape for tensor in tensors])
        with self._lock:
            shapes = self._shapes.get(key)
            slots = [] if shapes is None else self._slots[shapes]
            if len(slots) == self._size:
                outputs = slots[0]
                self._engine(*tensors, out=outputs)
                slots.append(slots.pop(0))  # only now: a call that is refused has written nothing
            else:
                outputs = self._first(tensors, key)
            self.calls += 1
            return dict(outputs)

    def _first(self, tensors: Sequence[torch.Tensor], key: tuple[Any, ...]) -> dict[str, torch.Tensor]:
        # Written by every later call, inside inference mode and outside.
        with torch.inference_mode(False), torch.no_grad():
            outputs: dict[str, torch.Tensor] = self._engine(*tensors)
        shapes = tuple([tensor.shape for tensor in outputs.values()])
        if len(self._shapes) >= _REMEMBERED:
            self._shapes.clear()
        self._shapes[key] = shapes
        slots = self._slots.setdefault(shapes, [])
        slots.append(outputs)
        del slots[: -self._size]
        return outputs

    def clear(self) -> None:
        with self._lock:
            self._shapes.clear()
            self._slots.clear()


class TensorRTDiTWrapper(EngineWrapper):
    """The diffusion transformer of GR00T as a TensorRT engine.

        dit = TensorRTDiTWrapper("dit_bf16.engine")
        velocity = dit(sa_embs, vl_embs, timestep, image_mask, backbone_attention_mask)  # [B, sa, 1024]

    engine_path: the plan, or a folder with a plan that is called as the scripts call it.
    device: GPU ordinal, "cuda:1" or torch.device; becomes the current device, as with the scripts' class.
    output_dtype: of the result; None: what the engine gives. use_fp16_output=True is output_dtype=torch.float16.
    cache_outputs, ring: by default a result stays valid for good. ring=N: the memory of a result is written again by
        the N-th call after it (cache_outputs=True: by the next), in that call's stream order.

    Inputs: sa_embs [B, sa, 1536], vl_embs [B, S, 2048], timestep [B], image_mask and backbone_attention_mask [B, S]; S
    within the engine's profile. On any device, strided or expanded. Floats are cast to the engine's float type, masks
    to bool (x != 0), integers to wider ones; each copy and cast is one kernel, counted in `core.stats`. A mask that
    the engine lacks is left out with one warning.

    The work is enqueued on the caller's current stream and not waited for. Several threads may call it.

    Raises RuntimeError ("CUDA not available …", "Failed to load …", "TensorRT inference failed …"), FileNotFoundError,
    and before anything runs: `DTypeError`, `ShapeError`, `InputNameError` (the engine has masks and none were passed),
    `LayoutError`.
    """

    def __init__(
        self,
        engine_path: str | os.PathLike[str],
        device: int | str | torch.device = 0,
        use_fp16_output: bool = False,
        *,
        cache_outputs: bool = False,
        ring: int = 0,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        if use_fp16_output and output_dtype not in (None, torch.float16):
            raise ValueError(f"output_dtype: found {output_dtype}, and use_fp16_output=True; allowed: one of the two")
        super().__init__(dit_plan(engine_path), device, cache_outputs=cache_outputs, ring=ring)
        self.use_fp16_output = use_fp16_output
        self._output_dtype = torch.float16 if use_fp16_output else output_dtype
        outputs = list(self._engine.outputs)
        if len(outputs) > 1 and "output" not in outputs:
            raise self._other(f"the outputs {', '.join(outputs)}", "one output, or one that is called 'output'")
        self._output = "output" if "output" in outputs else outputs[0]
        # N1.5 calls it otherwise.
        self._timestep = "timesteps_tensor" if "timesteps_tensor" in self._wanted else "timestep"
        known = ["sa_embs", "vl_embs", self._timestep, "image_mask", "backbone_attention_mask"]
        if not set(known[:3]) <= set(self._names) <= set(known):
            raise self._other(
                f"the inputs {', '.join(self._names)}",
                "sa_embs, vl_embs, timestep and optionally image_mask, backbone_attention_mask",
            )
        self._in_order = self._names == known

    def _other(self, found: str, allowed: str) -> InputNameError:
        self.close()
        return InputNameError(
            f"{self.engine_path}: found {found}; allowed: {allowed}. This is not the DiT of N1.5 to N1.7: call other "
            "engines with jetrt.Engine or jetrt.trt_torch.Engine.",
            found=found,
            allowed=allowed,
        )

    def __call__(
        self,
        sa_embs: torch.Tensor,
        vl_embs: torch.Tensor,
        timestep: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        backbone_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step, [B, sa, 1024] on `cuda:{device}`; see the class."""
        if self._in_order and image_mask is not None and backbone_attention_mask is not None:
            outputs = self._call((sa_embs, vl_embs, timestep, image_mask, backbone_attention_mask))
        else:
            outputs = self.run(
                {
                    "sa_embs": sa_embs,
                    "vl_embs": vl_embs,
                    self._timestep: timestep,
                    "image_mask": image_mask,
                    "backbone_attention_mask": backbone_attention_mask,
                }
            )
        output = outputs[self._output]
        return output if self._output_dtype is None else output.to(self._output_dtype)


class TensorRTBackboneWrapper(EngineWrapper):
    """The vision-language backbone of GR00T as one TensorRT engine, as the forks have it.

        features = backbone(pixel_values, input_ids, attention_mask)  # one fork's order
        states, attended, image = backbone(input_ids, attention_mask, pixel_values)  # the other's

    Which order is meant is told by where the pixels are (a float tensor, or a list of views); by name any order will
    do. A list of views is concatenated for an engine that takes pixels of rank 4, and stacked as [views, 1, 3, H, W]
    for one of rank 5. Further inputs of the engine go by name.

    outputs: "tuple" (hidden_states, attn_mask, image_mask), "features" (one tensor), "dict" (all by name), or "auto":
        one output → the tensor, three → the tuple, others → the dict.
    engine_path, device, cache_outputs, ring, casts, streams, errors: as for `TensorRTDiTWrapper`; messages begin with
        "Failed to load backbone …" and "Backbone TensorRT inference failed".
    """

    _failed = "Backbone TensorRT inference failed"
    _not_loaded = "Failed to load backbone TensorRT engine from"

    _MASKS = ("attn_mask", "image_mask")

    def __init__(
        self,
        engine_path: str | os.PathLike[str],
        device: int | str | torch.device = 0,
        *,
        outputs: Literal["auto", "tuple", "features", "dict"] = "auto",
        cache_outputs: bool = False,
        ring: int = 0,
    ) -> None:
        if outputs not in ("auto", "tuple", "features", "dict"):
            raise ValueError(f"outputs: found {outputs!r}; allowed: 'auto', 'tuple', 'features', 'dict'")
        super().__init__(backbone_plan(engine_path), device, cache_outputs=cache_outputs, ring=ring)
        names = list(self._engine.outputs)
        self.features = next((n for n in ("hidden_states", "backbone_features") if n in names), names[0])
        whole = set(names) == {self.features, *self._MASKS}
        self._outputs = outputs
        if outputs == "auto":
            self._outputs = "features" if len(names) == 1 else "tuple" if whole else "dict"
        if (self._outputs == "tuple" and not whole) or "pixel_values" not in self._wanted:
            self.close()
            missing = "an input pixel_values" if "pixel_values" not in self._wanted else ", ".join(self._MASKS)
            raise InputNameError(
                f"{self.engine_path}: found the inputs {', '.join(self._names)} and the outputs {', '.join(names)}; "
                f"allowed: a backbone with {missing}. "
                + ("Use outputs='features' or 'dict'." if "pixel_values" in self._wanted else "Pass the right plan."),
                found=names,
            )
        self._rank = len(self._engine.inputs["pixel_values"].shape)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Features [B, S, 2048] and masks [B, S]; see the class."""
        found = self.run(self._named(args, kwargs))
        if self._outputs == "features":
            return found[self.features]
        if self._outputs == "tuple":
            return (found[self.features], *(found[name] for name in self._MASKS))
        return found

    def run(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """All outputs by name, whatever `outputs` says. Inputs as tensors; `pixel_values` may be a list of views."""
        pixels = inputs.get("pixel_values")
        if isinstance(pixels, (list, tuple)):
            inputs = {**inputs, "pixel_values": self._joined(pixels)}
        return super().run(inputs)

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > 3:
            raise InputNameError(
                f"found {len(args)} positional arguments; allowed: 3, pixel_values, input_ids and attention_mask (or "
                "input_ids, attention_mask, pixel_values). Pass further inputs by name.",
                found=len(args),
            )
        first = ["pixel_values", "input_ids", "attention_mask"]
        last = ["input_ids", "attention_mask", "pixel_values"]
        pixels = [i for i, value in enumerate(args) if _is_pixels(value)]
        if pixels not in ([], [0], [2]) or (pixels == [] and (len(args) == 3 or "pixel_values" not in kwargs)):
            raise InputNameError(
                f"found {', '.join(_described(value) for value in args)}; allowed: the pixels (a float tensor or a "
                "list of views) first or last, and integers otherwise. Pass the inputs by name.",
                tensor="pixel_values",
                found=[_described(value) for value in args],
            )
        names = first if pixels == [0] else last
        named = dict(zip(names, args, strict=False))
        twice = [name for name in kwargs if name in named]
        if twice:
            raise InputNameError(
                f"input '{twice[0]}': found it by position and by name; allowed: once.", tensor=twice[0]
            )
        return {**named, **kwargs}

    def _joined(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        if self._rank == 5:
            frames = [view.squeeze(0) if view.ndim == 4 else view for view in views]
            return torch.stack(frames).unsqueeze(1)
        return torch.stack(list(views)) if views[0].ndim == self._rank - 1 else torch.cat(list(views), dim=0)


def _is_pixels(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or bool(getattr(getattr(value, "dtype", None), "is_floating_point", False))


def _described(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return f"a {type(value).__name__}" if dtype is None else f"{dtype_name(dtype)}{list(value.shape)}"
