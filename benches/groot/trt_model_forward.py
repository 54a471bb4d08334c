"""Stands where the scripts have `trt_model_forward.py`: an action head whose networks are engines, or its DiT alone.

Written from the contract: what is called, set, deleted and in which order is theirs. `Engine` is looked up as this
module's global, so that assigning another class to it before `setup_tensorrt_engines` swaps it.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from standin import BatchFeature
from versions import FILES

sys.path.insert(0, str(Path(__file__).resolve().parent))
from trt_torch import Engine

PIPELINE = ("full_pipeline", "n17_full_pipeline")
MODES = (*PIPELINE, "action_head", "dit_only")


def action_head_tensorrt_forward(
    self: Any,
    backbone_output: BatchFeature,
    action_input: BatchFeature,
    options: Any = None,  # noqa: ARG001 (ignored upstream too: no real-time chunking on this path)
) -> BatchFeature:
    """In place of `get_action`: 13 engine calls for 4 steps, 14 with the self-attention of N1.7."""
    vl_embs = self.vlln(backbone_output.backbone_features)
    if getattr(self, "vl_sa_engine", None) is not None:
        self.vl_sa_engine.set_runtime_tensor_shape("hidden_states", vl_embs.shape)
        vl_embs = self.vl_sa_engine(vl_embs)["output"]
    else:
        vl_embs = self.vl_self_attention(vl_embs)
    dtype = torch.bfloat16
    embodiment_id = action_input.embodiment_id.to(torch.int64)
    batch, device = vl_embs.shape[0], vl_embs.device
    vl_embs = vl_embs.to(dtype)
    state = action_input.state.to(dtype)
    if state.ndim == 3 and state.shape[1] > 1:
        state = state.view(batch, 1, -1)
    self.state_encoder_engine.set_runtime_tensor_shape("state", state.shape)
    self.state_encoder_engine.set_runtime_tensor_shape("embodiment_id", embodiment_id.shape)
    state_features = self.state_encoder_engine(state, embodiment_id)["output"]
    if hasattr(self, "init_actions"):
        actions = self.init_actions.expand((batch, -1, -1))
    else:
        actions = torch.randn(size=(batch, self.config.action_horizon, self.action_dim), dtype=dtype, device=device)
    steps = self.num_inference_timesteps
    dt = 1.0 / steps
    for step in range(steps):
        bucket = int(step / float(steps) * self.num_timestep_buckets)
        timesteps = torch.full(size=(batch,), fill_value=bucket, device=device, dtype=torch.int64)
        self.action_encoder_engine.set_runtime_tensor_shape("actions", actions.shape)
        self.action_encoder_engine.set_runtime_tensor_shape("timesteps", timesteps.shape)
        self.action_encoder_engine.set_runtime_tensor_shape("embodiment_id", embodiment_id.shape)
        features = self.action_encoder_engine(actions.to(dtype), timesteps, embodiment_id)["output"]
        if self.config.add_pos_embed:
            places = torch.arange(features.shape[1], dtype=torch.long, device=device)
            features = features + self.position_embedding(places).unsqueeze(0).to(dtype)
        sa_embs = torch.cat((state_features, features), dim=1).to(dtype)
        moved = dit(self.dit_engine, sa_embs, vl_embs, timesteps, backbone_output)
        self.action_decoder_engine.set_runtime_tensor_shape("model_output", moved.shape)
        self.action_decoder_engine.set_runtime_tensor_shape("embodiment_id", embodiment_id.shape)
        move = self.action_decoder_engine(moved, embodiment_id)["output"][:, -self.action_horizon :]
        actions = actions + dt * move
    return BatchFeature(data={"action_pred": actions})


def dit(engine: Any, sa_embs: Any, vl_embs: Any, timesteps: Any, backbone_output: BatchFeature) -> Any:
    engine.set_runtime_tensor_shape("sa_embs", sa_embs.shape)
    engine.set_runtime_tensor_shape("vl_embs", vl_embs.shape)
    engine.set_runtime_tensor_shape("timestep", timesteps.shape)
    masks = {}
    for name in ("image_mask", "backbone_attention_mask"):
        mask = getattr(backbone_output, name, None)
        if mask is not None:
            engine.set_runtime_tensor_shape(name, mask.shape)
            masks[name] = mask
    return engine(sa_embs, vl_embs, timesteps, **masks)["output"]


def plan(folder: str, engine: str) -> str:
    candidates = [Path(folder) / name for name in FILES[engine][1]]
    return str(next((path for path in candidates if path.exists()), candidates[-1]))


def setup_tensorrt_engines(policy: Any, trt_engine_path: str, mode: str = "n17_full_pipeline") -> None:
    """Loads the engines of a folder and puts them in the place of the policy's modules, which are deleted."""
    if mode in PIPELINE or mode == "action_head":
        setup_action_head(policy, trt_engine_path, vl_self_attention=mode in PIPELINE)
    elif mode == "dit_only":
        setup_dit(policy, trt_engine_path)
    else:
        raise ValueError(f"Unknown mode: {mode}. Expected one of {', '.join(MODES)}.")


def setup_action_head(policy: Any, folder: str, vl_self_attention: bool) -> None:
    """The backbone stays in torch: the stand-in's has no engines."""
    head = policy.model.action_head
    head.vl_sa_engine = None
    if vl_self_attention and Path(plan(folder, "vl_self_attention")).exists():
        head.vl_sa_engine = Engine(plan(folder, "vl_self_attention"))
        del head.vl_self_attention
    for name in ("model", "state_encoder", "action_encoder", "action_decoder"):
        if hasattr(head, name):
            delattr(head, name)
    torch.cuda.empty_cache()
    head.state_encoder_engine = Engine(plan(folder, "state_encoder"))
    head.action_encoder_engine = Engine(plan(folder, "action_encoder"))
    head.dit_engine = Engine(plan(folder, "dit"))
    head.action_decoder_engine = Engine(plan(folder, "action_decoder"))
    head.get_action = partial(action_head_tensorrt_forward, head)


def setup_dit(policy: Any, folder: str) -> None:
    """As upstream, with its defect: N1.7's `get_action` passes two more keywords than the function here takes."""
    head = policy.model.action_head
    if hasattr(head, "model"):
        del head.model
    torch.cuda.empty_cache()
    head.dit_engine = Engine(plan(folder, "dit"))

    @torch.no_grad()
    def get_action_with_features(
        backbone_features: Any, state_features: Any, embodiment_id: Any, backbone_output: BatchFeature
    ) -> BatchFeature:
        actions = head.noise(backbone_features)
        steps = head.num_inference_timesteps
        dt = 1.0 / steps
        for step in range(steps):
            bucket = int(step / float(steps) * head.num_timestep_buckets)
            timesteps = torch.full(
                size=(backbone_features.shape[0],), fill_value=bucket, device=backbone_features.device
            )
            features = head.action_encoder(actions, timesteps, embodiment_id)
            if head.config.add_pos_embed:
                places = torch.arange(features.shape[1], dtype=torch.long, device=features.device)
                features = features + head.position_embedding(places).unsqueeze(0)
            sa_embs = torch.cat((state_features, features), dim=1).to(torch.bfloat16)
            vl_embs = backbone_features.to(torch.bfloat16)
            moved = dit(head.dit_engine, sa_embs, vl_embs, timesteps.to(torch.int64), backbone_output)
            move = head.action_decoder(moved, embodiment_id)[:, -head.action_horizon :]
            actions = actions + dt * move
        return BatchFeature(
            data={"action_pred": actions, "backbone_features": backbone_features, "state_features": state_features}
        )

    head.get_action_with_features = get_action_with_features


def close_tensorrt_engines(policy: Any) -> None:
    """Closes whatever engines were set; a policy without any is left as it is."""
    for part in (policy.model.backbone, policy.model.action_head):
        for name, value in list(vars(part).items()):
            if name.endswith("_engine") and value is not None and hasattr(value, "close"):
                value.close()
