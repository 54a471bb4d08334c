"""`replace_dit_with_tensorrt`, `replace_backbone_with_tensorrt`: engines in the place of a policy's torch modules."""

from __future__ import annotations

import collections
import gc
import importlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import InputNameError
from .wrappers import TensorRTBackboneWrapper, TensorRTDiTWrapper

__all__ = ["replace_backbone_with_tensorrt", "replace_dit_with_tensorrt"]

_log = logging.getLogger("jetrt.groot")


def replace_dit_with_tensorrt(
    policy: Any,
    trt_engine_path: str | os.PathLike[str],
    device: int | str | torch.device = 0,
    preloaded_trt: TensorRTDiTWrapper | None = None,
    *,
    free_torch: bool = False,
) -> None:
    """Lets `policy.model.action_head.model` compute by a TensorRT engine.

    Its `forward` is replaced; the module object, its hooks and its attributes stay. Where there is no module (a policy
    made without its DiT) one is put there. The result is cast to the type of `hidden_states` if the engine gives
    another.

    trt_engine_path: the plan, or a folder that has it; one that `preload` has loaded is taken.
    device: GPU ordinal, "cuda:1" or torch.device.
    preloaded_trt: a wrapper that is there already; then the path and `device` are not used.
    free_torch: also frees the weights, layers and buffers of the torch module. It keeps one empty parameter, so that
        the policy's `device` and `dtype`, which ask the first parameter, stay as they were.

    Raises what `TensorRTDiTWrapper` raises; then nothing has changed.
    """
    wrapper = TensorRTDiTWrapper(trt_engine_path, device) if preloaded_trt is None else preloaded_trt
    place(policy.model.action_head, "model", dit_forward(wrapper), free_torch=free_torch)
    _log.info("the DiT runs on TensorRT: %s", wrapper.engine_path)


def dit_forward(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A `forward` with the DiT's signature over a call with sa_embs, vl_embs, timestep and the two masks."""

    def trt_forward(
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,  # noqa: ARG001 - the scripts do not use it either
        return_all_hidden_states: bool = False,
        image_mask: torch.Tensor | None = None,
        backbone_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if return_all_hidden_states:
            raise RuntimeError(
                "TensorRT only returns the final output: found return_all_hidden_states=True; allowed: False. Hidden "
                "states are for training, which needs the torch module."
            )
        output = run(hidden_states, encoder_hidden_states, timestep, image_mask, backbone_attention_mask)
        return output if output.dtype == hidden_states.dtype else output.to(hidden_states.dtype)

    return trt_forward


def replace_backbone_with_tensorrt(
    policy: Any,
    trt_engine_path: str | os.PathLike[str],
    device: int | str | torch.device = 0,
    preloaded_trt: TensorRTBackboneWrapper | None = None,
    *,
    free_torch: bool = False,
    image_token_id: int | None = None,
) -> None:
    """Lets `policy.model.backbone` compute by a TensorRT engine.

    Its `forward` is replaced and takes what the torch backbone takes: a mapping with input_ids, attention_mask and
    pixel_values (a tensor or a list of views), and whatever else the engine has inputs for. It returns the features of
    the engine as `backbone_features`, cast to the float type of the pixels (the policy's) if the engine gives another,
    and `backbone_attention_mask` and `image_mask`: the engine's, or, where it has only features, attention_mask == 1
    and input_ids == image_token_id. Where there is no module, one is put there.

    image_token_id: None: what the torch backbone's configuration says.
    The other parameters: as for `replace_dit_with_tensorrt`.

    Raises what `TensorRTBackboneWrapper` raises, and `InputNameError` if the engine gives no masks and the image token
    is not known; then nothing has changed.
    """
    wrapper = TensorRTBackboneWrapper(trt_engine_path, device) if preloaded_trt is None else preloaded_trt
    gives_masks = {"attn_mask", "image_mask"} <= set(wrapper.output_dtypes)
    token = image_token_id if image_token_id is not None else _image_token(getattr(policy.model, "backbone", None))
    if not gives_masks and token is None:
        if preloaded_trt is None:
            wrapper.close()
        raise InputNameError(
            f"{wrapper.engine_path}: found the outputs {', '.join(wrapper.output_dtypes)}, without masks, and no image "
            "token in the policy's backbone; allowed: one of the two. Pass image_token_id=.",
            tensor="image_mask",
        )

    def trt_forward(vl_input: Mapping[str, Any]) -> Any:
        """The backbone's forward."""
        found = wrapper.run({name: vl_input[name] for name in wrapper.input_dtypes if name in vl_input})
        if gives_masks:
            attended, image = found["attn_mask"], found["image_mask"]
        else:
            attended, image = vl_input["attention_mask"] == 1, vl_input["input_ids"] == token
        features, pixels = found[wrapper.features], vl_input["pixel_values"]
        wanted = (pixels[0] if isinstance(pixels, (list, tuple)) else pixels).dtype
        if features.dtype != wanted and wanted.is_floating_point:
            features = features.to(wanted)
        return _features(
            vl_input, {"backbone_features": features, "backbone_attention_mask": attended, "image_mask": image}
        )

    place(policy.model, "backbone", trt_forward, free_torch=free_torch)
    _log.info("the backbone runs on TensorRT: %s", wrapper.engine_path)


# Modules --------------------------------------------------------------------------------------------------------------


def prepare_input(batch: Mapping[str, Any]) -> Any:
    """A backbone's inputs, as the model passes them to `forward`."""
    return _features(batch, batch)


def place(parent: Any, name: str, forward: Any, *, free_torch: bool) -> None:
    """Makes `forward` that of `parent.<name>`; a plain object in a registered module's place would be a TypeError."""
    module = getattr(parent, name, None)
    if not isinstance(module, torch.nn.Module):
        module = torch.nn.Module()
        module.prepare_input = prepare_input
        setattr(parent, name, module)
    elif free_torch:
        free(module)
    module.forward = forward


def free(module: torch.nn.Module) -> None:
    """Deletes the weights, layers and buffers of a module, but for one empty parameter of its type and device."""
    before = torch.cuda.memory_allocated()
    first = next(module.parameters(), None)
    if first is not None:
        first = torch.nn.Parameter(torch.empty(0, dtype=first.dtype, device=first.device), requires_grad=False)
    for named in (
        module.named_children,
        lambda: module.named_parameters(recurse=False),
        lambda: module.named_buffers(recurse=False),
    ):
        # One that has two names is listed once at a time.
        while names := [name for name, _ in named()]:
            for name in names:
                delattr(module, name)
    if first is not None:
        module.register_parameter("freed", first)
    gc.collect()
    torch.cuda.empty_cache()
    _log.info("freed %.2f GB of torch weights", (before - torch.cuda.memory_allocated()) / 1e9)


def _image_token(backbone: Any) -> int | None:
    model = getattr(backbone, "model", None)
    for place in (getattr(model, "config", None), model, backbone):
        for name in ("image_token_index", "image_token_id", "_image_token_id"):
            value = getattr(place, name, None)
            if isinstance(value, int):
                return value
    return None


# Features -------------------------------------------------------------------------------------------------------------


class Features(collections.UserDict[str, Any]):
    """A dict whose items are attributes too, where `transformers` and its BatchFeature are not there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


def _features(like: Mapping[str, Any], data: Mapping[str, Any]) -> Any:
    """What a policy's modules pass around: of the class that came in, else a BatchFeature."""
    if isinstance(like, collections.UserDict):
        return type(like)(dict(data))
    try:
        cls = importlib.import_module("transformers.feature_extraction_utils").BatchFeature
    except ImportError:
        cls = Features
    return cls(dict(data))
