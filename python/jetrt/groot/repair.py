"""What the scripts' `setup_tensorrt_engines` leaves behind it that would fail later, or be wrong without a word."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError, ShapeError
from .replace import dit_forward, place

__all__ = ["StrictLogger", "repair"]


def repair(policy: Any) -> None:
    """Puts right what a set-up has just installed in `policy.model.action_head`."""
    head = policy.model.action_head
    _dit_only(head)
    _chunking(head)


def _dit_only(head: Any) -> None:
    """The DiT-only set-up of N1.7 installs a `get_action_with_features` that its caller passes too much to, and that
    knows no real-time chunking. The class's own takes everything: it needs only a `model`, which the engine becomes."""
    installed = vars(head).get("get_action_with_features")
    own = getattr(type(head), "get_action_with_features", None)
    if installed is None or own is None or getattr(head, "dit_engine", None) is None:
        return
    if set(inspect.signature(own).parameters) - {"self"} <= set(inspect.signature(installed).parameters):
        return
    delattr(head, "get_action_with_features")
    place(head, "model", dit_forward(_through(head.dit_engine)), free_torch=False)


def _through(engine: Any) -> Any:
    """A call of seam B's engine as the DiT's: types and shapes as it wants them told."""

    def run(*tensors: torch.Tensor | None) -> torch.Tensor:
        names = ("sa_embs", "vl_embs", "timestep", "image_mask", "backbone_attention_mask")
        given = {}
        for name, tensor in zip(names, tensors, strict=True):
            if tensor is None:
                continue
            wanted = dtypes.get(name, tensor.dtype)
            # Floats only: an integer or a mask of the wrong type is a mistake, which the engine names.
            floats = wanted.is_floating_point and tensor.dtype.is_floating_point
            given[name] = tensor.to(wanted) if floats else tensor
            if name in dtypes:
                engine.set_runtime_tensor_shape(name, tensor.shape)
        output: torch.Tensor = engine(**given)["output"]
        return output

    dtypes = {name: dtype for name, _, dtype in engine.in_meta}
    return run


def _chunking(head: Any) -> None:
    """The engines' `get_action` would ignore the previous actions of real-time chunking; torch's modules are gone."""
    installed = vars(head).get("get_action")
    if not isinstance(installed, functools.partial):
        return
    parameters = inspect.signature(installed).parameters.values()
    takes_options = any(p.name == "options" or p.kind is p.VAR_POSITIONAL for p in parameters)

    @functools.wraps(installed.func)
    def get_action(_: Any, backbone_output: Any, action_input: Any, options: Mapping[str, Any] | None = None) -> Any:
        if "action" in action_input:
            raise InputError(
                "real-time chunking: found the previous actions ('action') among the inputs; allowed: none, since the "
                "engines' loop starts from noise alone and would ignore them. Run it with the action head in torch, or "
                "with the DiT alone as an engine (mode 'dit_only').",
                tensor="action",
            )
        return installed(backbone_output, action_input, *([options] if takes_options else []))

    head.get_action = functools.partial(get_action, head)


class StrictLogger:
    """The logger of `trt_model_forward`: what it warns of and then computes wrongly is an error.

    N1.6's backbone warns when image tokens and patches differ in number, and then leaves the tokens zero, since its
    assignment goes into a copy.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def warning(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if "token count mismatch" in str(message):
            text = str(message) % args if args else str(message)
            raise ShapeError(
                f"input 'pixel_values': found {text} allowed: as many image tokens as patches. Check that the number "
                "of views and their size are those that the processor was set up for.",
                tensor="pixel_values",
            )
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        self._logger.warning(message, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name)
