"""A policy that calls its modules as GR00T N1.6 and N1.7 do, without NVIDIA's package and checkpoint.

Written from the contract in plain torch. What the seams touch has the names that they look for: the policy's
`model.backbone` and `model.action_head`; the head's `model` (the DiT, whose `forward` is replaced), `state_encoder`,
`action_encoder`, `action_decoder`, `_encode_features`, `get_action_with_features`, `get_action`, the loop's parameters.
The networks are handed in (`networks.py` makes them), so that the loop runs over anything called alike.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from versions import Config


class BatchFeature(collections.UserDict[str, Any]):
    """A dict whose items are attributes too, as `transformers` has it: `BatchFeature(data={...})`."""

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        super().__init__(data)

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})  # copy and pickle ask before there is any
        if name not in data:
            raise AttributeError(name)
        return data[name]


class _Part(nn.Module):
    """Says where its parameters are, as the head and the model do upstream."""

    @property
    def device(self) -> Any:
        return next(iter(self.parameters())).device

    @property
    def dtype(self) -> Any:
        return next(iter(self.parameters())).dtype


class ActionHead(_Part):
    """Flow matching over action chunks: the part that N1.6 and N1.7 share.

    vlln, vl_self_attention: [B,S,2048] → the same. state_encoder: ([B,1,state], [B]) → [B,1,1536]. action_encoder:
    ([B,H,D], [B], [B]) → [B,H,1536]. model: the DiT. action_decoder: ([B,1+H,1024], [B]) → [B,1+H,D].
    """

    def __init__(
        self,
        config: Config,
        *,
        model: nn.Module,
        state_encoder: nn.Module,
        action_encoder: nn.Module,
        action_decoder: nn.Module,
        vlln: nn.Module | None = None,
        vl_self_attention: nn.Module | None = None,
        position_embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.input_embedding_dim = config.input_embedding_dim
        self.action_dim = config.max_action_dim
        self.action_horizon = config.action_horizon
        self.num_inference_timesteps = config.num_inference_timesteps
        self.num_timestep_buckets = config.num_timestep_buckets
        self.model = model
        self.state_encoder = state_encoder
        self.action_encoder = action_encoder
        self.action_decoder = action_decoder
        self.vlln = nn.Identity() if vlln is None else vlln
        self.vl_self_attention = nn.Identity() if vl_self_attention is None else vl_self_attention
        if config.add_pos_embed:
            if position_embedding is None:
                raise ValueError("config.add_pos_embed is set: a position_embedding is needed")
            self.position_embedding = position_embedding

    def process_backbone_output(self, backbone_output: BatchFeature) -> BatchFeature:
        features = self.vl_self_attention(self.vlln(backbone_output["backbone_features"]))
        backbone_output["backbone_features"] = features  # in place, as upstream: a second call would do it twice
        return backbone_output

    def encoder_input(self, state: torch.Tensor) -> torch.Tensor:
        return state

    def _encode_features(self, backbone_output: BatchFeature, action_input: BatchFeature) -> BatchFeature:
        backbone_output = self.process_backbone_output(backbone_output)
        state = self.encoder_input(action_input.state)
        state_features = self.state_encoder(state, action_input.embodiment_id)
        return BatchFeature(
            data={"backbone_features": backbone_output.backbone_features, "state_features": state_features}
        )

    def velocity(
        self,
        actions: torch.Tensor,
        step: int,
        vl_embeds: torch.Tensor,
        state_features: torch.Tensor,
        embodiment_id: torch.Tensor,
        backbone_output: BatchFeature,
    ) -> torch.Tensor:
        """[B,H,D]: where the actions move at this step of `num_inference_timesteps`."""
        device = vl_embeds.device
        bucket = int(step / float(self.num_inference_timesteps) * self.num_timestep_buckets)
        timesteps = torch.full(size=(vl_embeds.shape[0],), fill_value=bucket, device=device)
        features = self.action_encoder(actions, timesteps, embodiment_id)
        if self.config.add_pos_embed:
            places = torch.arange(features.shape[1], dtype=torch.long, device=device)
            features = features + self.position_embedding(places).unsqueeze(0)
        sa_embs = torch.cat((state_features, features), dim=1)
        masks = {}
        if self.config.use_alternate_vl_dit:
            masks["image_mask"] = backbone_output.image_mask
            masks["backbone_attention_mask"] = backbone_output.backbone_attention_mask
        moved = self.model(hidden_states=sa_embs, encoder_hidden_states=vl_embeds, timestep=timesteps, **masks)
        return self.action_decoder(moved, embodiment_id)[:, -self.action_horizon :]

    def noise(self, vl_embeds: torch.Tensor) -> torch.Tensor:
        return torch.randn(
            size=(vl_embeds.shape[0], self.config.action_horizon, self.action_dim),
            dtype=vl_embeds.dtype,
            device=vl_embeds.device,
        )

    def prepare_input(self, batch: dict[str, Any]) -> BatchFeature:
        return BatchFeature(data=batch)


class ActionHeadN16(ActionHead):
    """N1.6: no options, no history of states, no real-time chunking."""

    @torch.no_grad()
    def get_action_with_features(
        self,
        backbone_features: torch.Tensor,
        state_features: torch.Tensor,
        embodiment_id: torch.Tensor,
        backbone_output: BatchFeature,
    ) -> BatchFeature:
        actions = self.noise(backbone_features)
        dt = 1.0 / self.num_inference_timesteps
        for step in range(self.num_inference_timesteps):
            move = self.velocity(actions, step, backbone_features, state_features, embodiment_id, backbone_output)
            actions = actions + dt * move
        return BatchFeature(
            data={"action_pred": actions, "backbone_features": backbone_features, "state_features": state_features}
        )

    @torch.no_grad()
    def get_action(self, backbone_output: BatchFeature, action_input: BatchFeature) -> BatchFeature:
        features = self._encode_features(backbone_output, action_input)
        return self.get_action_with_features(
            backbone_features=features.backbone_features,
            state_features=features.state_features,
            embodiment_id=action_input.embodiment_id,
            backbone_output=backbone_output,
        )


class ActionHeadN17(ActionHead):
    """N1.7: a history of states in one row, and real-time chunking (RTC) where the input has an `action`."""

    def encoder_input(self, state: torch.Tensor) -> torch.Tensor:
        assert state.shape[1] == self.config.state_history_length, "the state's history has another length"
        return state.view(state.shape[0], 1, -1)

    @torch.no_grad()
    def get_action_with_features(
        self,
        backbone_features: torch.Tensor,
        state_features: torch.Tensor,
        embodiment_id: torch.Tensor,
        backbone_output: BatchFeature,
        action_input: BatchFeature,
        options: dict[str, Any] | None = None,
    ) -> BatchFeature:
        actions = self.noise(backbone_features)
        strength = torch.ones_like(actions)
        if "action" in action_input:
            self.keep_previous(actions, strength, action_input["action"], options)
        dt = 1.0 / self.num_inference_timesteps
        for step in range(self.num_inference_timesteps):
            move = self.velocity(actions, step, backbone_features, state_features, embodiment_id, backbone_output)
            actions = actions + dt * move * strength
        return BatchFeature(
            data={"action_pred": actions, "backbone_features": backbone_features, "state_features": state_features}
        )

    def keep_previous(
        self, actions: torch.Tensor, strength: torch.Tensor, previous: torch.Tensor, options: dict[str, Any] | None
    ) -> None:
        """RTC: the chunk begins with the end of the previous one; frozen at first, then freed along an exponential."""
        assert options is not None, "options is not None"
        end, overlap, frozen = (options[n] for n in ("action_horizon", "rtc_overlap_steps", "rtc_frozen_steps"))
        actions[:, :overlap] = previous[:, end - overlap : end]
        strength[:, :frozen] = 0.0
        ramp = 1 - torch.exp(
            -options["rtc_ramp_rate"] * torch.linspace(0.0, 1.0, overlap - frozen + 2, device=actions.device)
        )
        ramp = ramp / ramp[-1].clamp_min(1e-8)
        strength[:, frozen:overlap] = ramp[1:-1][None, :, None]

    @torch.no_grad()
    def get_action(
        self, backbone_output: BatchFeature, action_input: BatchFeature, options: dict[str, Any] | None = None
    ) -> BatchFeature:
        features = self._encode_features(backbone_output, action_input)
        return self.get_action_with_features(
            backbone_features=features.backbone_features,
            state_features=features.state_features,
            embodiment_id=action_input.embodiment_id,
            backbone_output=backbone_output,
            action_input=action_input,
            options=options,
        )


HEADS = {"n1.6": ActionHeadN16, "n1.7": ActionHeadN17}


class Backbone(nn.Module):
    """Stands for the vision-language model: cheap, but its output has the shapes, types and masks of the real one.

    embedding: [B,T] ids → [B,T,2048]; projection: [B,patches,pixels] → [B,patches,2048].
    """

    IMAGE = 1  # the id that holds an image token's place
    PIXELS = 192  # of one patch: 8×8×3

    def __init__(self, embedding: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.projection = projection

    def prepare_input(self, batch: dict[str, Any]) -> BatchFeature:
        return BatchFeature(data={key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")})

    def forward(self, vl_input: BatchFeature) -> BatchFeature:
        patches = self.projection(vl_input.pixel_values)
        text = self.embedding(vl_input.input_ids[:, patches.shape[1] :])  # the image's tokens come first
        return BatchFeature(
            data={
                "backbone_features": torch.cat((patches, text), dim=1),
                "backbone_attention_mask": vl_input.attention_mask == 1,
                "image_mask": vl_input.input_ids == self.IMAGE,
            }
        )


class Model(_Part):
    """Backbone and action head, and what lies between the policy and them."""

    def __init__(self, config: Config, backbone: nn.Module, action_head: ActionHead) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.action_head = action_head

    def prepare_input(self, inputs: dict[str, Any]) -> tuple[BatchFeature, BatchFeature]:
        def moved(features: BatchFeature) -> BatchFeature:
            return BatchFeature(
                data={
                    name: value.to(self.device, dtype=self.dtype)
                    if torch.is_floating_point(value)
                    else value.to(self.device)
                    for name, value in features.items()
                }
            )

        return moved(self.backbone.prepare_input(inputs)), moved(self.action_head.prepare_input(inputs))

    def get_action(self, inputs: dict[str, Any], options: dict[str, Any] | None = None) -> BatchFeature:
        backbone_input, action_input = self.prepare_input(inputs)
        backbone_output = self.backbone(backbone_input)
        if self.config.version == "n1.6":
            return self.action_head.get_action(backbone_output, action_input)
        return self.action_head.get_action(backbone_output, action_input, options)


class Policy:
    """Observations of numpy arrays and text to actions in numpy, with the model under `torch.inference_mode()`.

    Observation: {"video": {"front": uint8 [B,1,8·h,8·w,3]}, "state": {"joints": float32 [B,history,D]},
    "language": {"task": [[text]] · B}}. The actions: {"joints": float32 [B,H,D]}.
    """

    def __init__(self, model: Model, embodiment_id: int = 0) -> None:
        self.model = model.eval()
        self.embodiment_id = embodiment_id

    def collate(self, observation: dict[str, Any]) -> dict[str, Any]:
        """On the CPU: the model's inputs, S = patches + characters of the longest text (the rest is masked)."""
        video = observation["video"]["front"][:, 0]
        batch, height, width = video.shape[0], video.shape[1] // 8, video.shape[2] // 8
        patches = video.reshape(batch, height, 8, width, 8, 3).transpose(0, 1, 3, 2, 4, 5)
        texts = [row[0].encode() for row in observation["language"]["task"]]
        longest = max(map(len, texts))
        ids = np.zeros((batch, longest), np.int64)
        attended = np.zeros((batch, longest), np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = np.frombuffer(text, np.uint8)
            attended[row, : len(text)] = 1
        image = np.full((batch, height * width), Backbone.IMAGE, np.int64)
        state = observation["state"]["joints"]
        room = self.model.config.max_state_dim - state.shape[2]
        return {
            "input_ids": torch.from_numpy(np.concatenate([image, ids], axis=1)),
            "attention_mask": torch.from_numpy(np.concatenate([np.ones_like(image), attended], axis=1)),
            "pixel_values": torch.from_numpy(patches.reshape(batch, height * width, Backbone.PIXELS) / np.float32(255)),
            "state": torch.from_numpy(np.pad(state, [(0, 0), (0, 0), (0, room)])),
            "embodiment_id": torch.full((batch,), self.embodiment_id, dtype=torch.int64),
        }

    def get_action(
        self, observation: dict[str, Any], options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs = self.collate(observation)
        with torch.inference_mode():
            found = self.model.get_action(inputs, options)
        width = observation["state"]["joints"].shape[2]
        return {"joints": found["action_pred"].float().cpu().numpy()[:, :, :width]}, {}
