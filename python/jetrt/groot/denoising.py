"""The denoising loop of GR00T's action head, from noise to actions, over whatever is installed in the head.

The same operations in the same order as in the original, so that the bits are the same. Nothing of it is trusted:
`loop.py` compares it with the original before it is used.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["MASKS", "EngineLoop", "FeatureLoop", "Inputs", "loop_of"]

#: The tensors of one call by name; None for a mask that there is not.
Inputs = dict[str, Any]

MASKS = ("image_mask", "backbone_attention_mask")


def loop_of(head: Any) -> FeatureLoop:
    """The loop of what is installed in this head; TypeError where it is none that is known."""
    engines = ("state_encoder_engine", "action_encoder_engine", "dit_engine", "action_decoder_engine")
    if "get_action" in vars(head) and all(getattr(head, name, None) is not None for name in engines):
        return EngineLoop(head)
    parts = ("action_encoder", "action_decoder")
    dit = getattr(head, "model", None) is not None or getattr(head, "dit_engine", None) is not None
    if dit and all(hasattr(head, name) for name in (FeatureLoop.method, "config", *parts)):
        return FeatureLoop(head)
    raise TypeError(
        f"{type(head).__name__} is no action head of GR00T N1.6 or N1.7: optimize needs get_action_with_features with "
        f"action_encoder, model (or dit_engine) and action_decoder, or a get_action that was installed with "
        f"{', '.join(engines)}. Nothing was changed."
    )


class FeatureLoop:
    """`get_action_with_features`: the features are encoded by the head; encoder, DiT and decoder run in each step.

    The DiT is the module `model`, whose `forward` may be an engine, or `dit_engine` where a set-up deleted the module.
    """

    method = "get_action_with_features"
    required: tuple[str, ...] = ("backbone_features", "state_features", "embodiment_id", "backbone_output")
    optional: tuple[str, ...] = ("action_input", "options")
    returned = frozenset({"action_pred", "backbone_features", "state_features"})

    def __init__(self, head: Any) -> None:
        self.head = head
        self.engine = None if getattr(head, "model", None) is not None else head.dit_engine
        dit = "model" if self.engine is None else "dit_engine"
        self.parts: tuple[str, ...] = ("action_encoder", dit, "action_decoder")
        if head.config.add_pos_embed:
            self.parts += ("position_embedding",)

    def settings(self) -> dict[str, Any]:
        """What the loop reads from the head besides tensors; a change of any of it needs a graph of its own."""
        head, config = self.head, self.head.config
        return {
            "steps": head.num_inference_timesteps,
            "buckets": head.num_timestep_buckets,
            "horizon": head.action_horizon,
            "positions": bool(config.add_pos_embed),
            "masked": bool(getattr(config, "use_alternate_vl_dit", True)),
        }

    def inputs(self, call: Mapping[str, Any]) -> Inputs:
        return {
            "features": call["backbone_features"],
            "state": call["state_features"],
            "embodiment_id": call["embodiment_id"],
            **{name: getattr(call["backbone_output"], name, None) for name in MASKS},
        }

    def call(self, inputs: Inputs) -> dict[str, Any]:
        """A call of the original with these tensors."""
        return {
            "backbone_features": inputs["features"],
            "state_features": inputs["state"],
            "embodiment_id": inputs["embodiment_id"],
            "backbone_output": _backbone_output(inputs),
            "action_input": _Batch(embodiment_id=inputs["embodiment_id"]),
        }

    def state_spec(self, batch: int) -> tuple[tuple[int, ...], Any]:
        return (batch, 1, self.head.input_embedding_dim), self.feature_dtype()

    def feature_dtype(self) -> Any:
        return next(self.head.parameters()).dtype

    def noise(self, features: Any) -> Any:
        """As the original draws it: the same call, so the same numbers from the same state of the generator."""
        head = self.head
        size = (features.shape[0], head.config.action_horizon, head.action_dim)
        return torch.randn(size=size, dtype=features.dtype, device=features.device)

    def given_noise(self, _batch: int) -> Any:
        """The noise that somebody has put into the head, or None: it is drawn."""
        return None

    def begin(self, inputs: Inputs) -> Inputs:
        """What happens once, before the steps."""
        return inputs

    def encode(self, actions: Any, timestep: Any, embodiment_id: Any) -> Any:
        return self.head.action_encoder(actions, timestep, embodiment_id)

    def positions(self, count: int, like: Any) -> Any:
        return self.head.position_embedding(torch.arange(count, dtype=torch.long, device=like.device)).unsqueeze(0)

    def move(self, tokens: Any, timestep: Any, inputs: Inputs, masked: bool) -> Any:
        masks = {name: inputs[name] for name in MASKS} if masked else {}
        if self.engine is None:
            return self.head.model(
                hidden_states=tokens, encoder_hidden_states=inputs["features"], timestep=timestep, **masks
            )
        return _run_dit(self.engine, tokens, timestep, inputs)

    def decode(self, moved: Any, embodiment_id: Any) -> Any:
        return self.head.action_decoder(moved, embodiment_id)

    def run(self, steps: Sequence[Any], inputs: Inputs, *, horizon: int, positions: bool, masked: bool) -> Any:
        """Noise to actions, [B,H,D]; `steps` are the timesteps, int64 [B] each."""
        inputs = self.begin(inputs)
        actions, dt, places = inputs["noise"], 1.0 / len(steps), None
        for timestep in steps:
            features = self.encode(actions, timestep, inputs["embodiment_id"])
            if positions:
                if places is None:  # the same in each step
                    places = self.positions(features.shape[1], features)
                features = features + places
            moved = self.move(torch.cat((inputs["state"], features), dim=1), timestep, inputs, masked)
            # Two roundings, as in the original: fused into one, the last bit would differ.
            actions = actions + dt * self.decode(moved, inputs["embodiment_id"])[:, -horizon:]
        return actions


class EngineLoop(FeatureLoop):
    """`get_action` as a bundle's set-up installs it: everything after the first layer norm is an engine."""

    method = "get_action"
    required = ("backbone_output", "action_input")
    optional = ("options",)
    returned = frozenset({"action_pred"})

    def __init__(self, head: Any) -> None:
        self.head = head
        self.engine = head.dit_engine
        self.noise_dtype = _dtype(head.action_encoder_engine, "actions")
        names = ("vlln", "vl_sa_engine", "vl_self_attention", "position_embedding")
        self.parts = tuple(name for name in names if getattr(head, name, None) is not None)
        self.parts += ("state_encoder_engine", "action_encoder_engine", "dit_engine", "action_decoder_engine")

    def inputs(self, call: Mapping[str, Any]) -> Inputs:
        output, given = call["backbone_output"], call["action_input"]
        return {
            "features": getattr(output, "backbone_features", None),
            "state": getattr(given, "state", None),
            "embodiment_id": getattr(given, "embodiment_id", None),
            **{name: getattr(output, name, None) for name in MASKS},
        }

    def call(self, inputs: Inputs) -> dict[str, Any]:
        given = _Batch(state=inputs["state"], embodiment_id=inputs["embodiment_id"])
        return {"backbone_output": _backbone_output(inputs), "action_input": given}

    def state_spec(self, batch: int) -> tuple[tuple[int, ...], Any]:
        config = self.head.config
        history = getattr(config, "state_history_length", 1)
        return (batch, history, config.max_state_dim), _dtype(self.head.state_encoder_engine, "state")

    def feature_dtype(self) -> Any:
        return _dtype(self.engine, "vl_embs")

    def noise(self, features: Any) -> Any:
        head = self.head
        given = self.given_noise(features.shape[0])
        if given is not None:
            return given
        size = (features.shape[0], head.config.action_horizon, head.action_dim)
        return torch.randn(size=size, dtype=self.noise_dtype, device=features.device)

    def given_noise(self, _batch: int) -> Any:
        return self.head.init_actions.expand((_batch, -1, -1)) if _has(self.head, "init_actions") else None

    def begin(self, inputs: Inputs) -> Inputs:
        head = self.head
        features = head.vlln(inputs["features"])
        attention = getattr(head, "vl_sa_engine", None)
        if attention is not None:
            features = _run(attention, features.to(_dtype(attention, "hidden_states")))
        elif hasattr(head, "vl_self_attention"):
            features = head.vl_self_attention(features)
        embodiment_id = inputs["embodiment_id"].to(torch.int64)
        state = inputs["state"].to(_dtype(head.state_encoder_engine, "state"))
        if state.ndim == 3 and state.shape[1] > 1:
            state = state.view(state.shape[0], 1, -1)  # N1.7: the history in one row
        return {
            **inputs,
            "features": features.to(_dtype(self.engine, "vl_embs")),
            "embodiment_id": embodiment_id,
            "state": _run(head.state_encoder_engine, state, embodiment_id),
        }

    def encode(self, actions: Any, timestep: Any, embodiment_id: Any) -> Any:
        engine = self.head.action_encoder_engine
        return _run(engine, actions.to(_dtype(engine, "actions")), timestep, embodiment_id)

    def positions(self, count: int, like: Any) -> Any:
        return super().positions(count, like).to(_dtype(self.engine, "sa_embs"))

    def decode(self, moved: Any, embodiment_id: Any) -> Any:
        return _run(self.head.action_decoder_engine, moved, embodiment_id)


def _backbone_output(inputs: Inputs) -> _Batch:
    masks = {name: inputs[name] for name in MASKS if inputs[name] is not None}
    return _Batch(backbone_features=inputs["features"], **masks)


def _has(module: Any, name: str) -> bool:
    """`hasattr`, which takes long for what a torch module has not."""
    own = vars(module)
    return (
        name in own
        or name in own.get("_buffers", ())
        or name in own.get("_parameters", ())
        or hasattr(type(module), name)
    )


def _dtype(engine: Any, name: str) -> Any:
    for known, _, dtype in engine.in_meta:
        if known == name:
            return dtype
    raise KeyError(f"the engine {engine.file} has no input {name!r}, but {[meta[0] for meta in engine.in_meta]}")


def _run(engine: Any, *inputs: Any, **named: Any) -> Any:
    """The engine's `output`; inputs in the engine's order, then by name."""
    for (name, *_), tensor in zip(engine.in_meta, inputs):  # noqa: B905 (what is left comes by name)
        engine.set_runtime_tensor_shape(name, tensor.shape)
    for name, tensor in named.items():
        engine.set_runtime_tensor_shape(name, tensor.shape)
    return engine(*inputs, **named)["output"]


def _run_dit(engine: Any, tokens: Any, timestep: Any, inputs: Inputs) -> Any:
    tokens = tokens.to(_dtype(engine, "sa_embs"))
    features = inputs["features"].to(_dtype(engine, "vl_embs"))
    return _run(engine, tokens, features, timestep, **{n: inputs[n] for n in MASKS if inputs[n] is not None})


class _Batch(collections.UserDict[str, Any]):
    """A dict whose items are attributes too, as the heads expect of their inputs."""

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})
        if name not in data:
            raise AttributeError(name)
        return data[name]
