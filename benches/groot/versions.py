"""GR00T N1.6 and N1.7 in numbers: the sizes, names and shapes that engines, policies and scripts agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """What the head's code reads as `config`; the defaults are the released checkpoints'."""

    version: str
    action_horizon: int
    max_action_dim: int
    max_state_dim: int
    #: min, opt, max of S, the number of vision-language tokens
    vl_lengths: tuple[int, int, int]
    #: largest batch of the engines; 1: baked in
    max_batch: int = 1
    num_layers: int = 32
    #: layers of the self-attention over the vision-language tokens; 0: there is none (N1.6 has none, N1.7's has 4)
    vl_self_attention_layers: int = 0
    state_history_length: int = 1
    max_num_embodiments: int = 32
    hidden_size: int = 1024
    input_embedding_dim: int = 1536
    backbone_embedding_dim: int = 2048
    num_attention_heads: int = 32
    num_inference_timesteps: int = 4
    num_timestep_buckets: int = 1000
    max_seq_len: int = 1024
    add_pos_embed: bool = True
    use_vlln: bool = True
    use_alternate_vl_dit: bool = True
    attend_text_every_n_blocks: int = 2

    @property
    def sa_tokens(self) -> int:
        """One for the state, and one for each action of the chunk."""
        return 1 + self.action_horizon

    @property
    def state_width(self) -> int:
        return self.max_state_dim * self.state_history_length

    @property
    def diffusion_model_cfg(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "attention_head_dim": self.input_embedding_dim // self.num_attention_heads,
            "output_dim": self.hidden_size,
            "interleave_self_attention": True,
            "norm_type": "ada_norm",
            "positional_embeddings": None,
        }

    @property
    def vl_self_attention_cfg(self) -> dict[str, Any] | None:
        if not self.vl_self_attention_layers:
            return None
        return {
            "num_layers": self.vl_self_attention_layers,
            "num_attention_heads": 32,
            "attention_head_dim": self.backbone_embedding_dim // 32,
            "positional_embeddings": None,
        }

    def engine_inputs(self, batch: int = 1, s: int | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of the inputs of each engine of the head, in the engines' own order; S is the usual one by default."""
        s = self.vl_lengths[1] if s is None else s
        embodiment = {"embodiment_id": (batch,)}
        return {
            "state_encoder": {"state": (batch, 1, self.state_width), **embodiment},
            "action_encoder": {
                "actions": (batch, self.action_horizon, self.max_action_dim),
                "timesteps": (batch,),
                **embodiment,
            },
            "dit": {
                "sa_embs": (batch, self.sa_tokens, self.input_embedding_dim),
                "vl_embs": (batch, s, self.backbone_embedding_dim),
                "timestep": (batch,),
                "image_mask": (batch, s),
                "backbone_attention_mask": (batch, s),
            },
            "action_decoder": {"model_output": (batch, self.sa_tokens, self.hidden_size), **embodiment},
            "vl_self_attention": {"hidden_states": (batch, s, self.backbone_embedding_dim)},
        }

    def engine_output(self, engine: str, batch: int = 1, s: int | None = None) -> tuple[int, ...]:
        """Shape of the one output of each of these engines; it is always named "output"."""
        s = self.vl_lengths[1] if s is None else s
        return {
            "state_encoder": (batch, 1, self.input_embedding_dim),
            "action_encoder": (batch, self.action_horizon, self.input_embedding_dim),
            "dit": (batch, self.sa_tokens, self.hidden_size),
            "action_decoder": (batch, self.sa_tokens, self.max_action_dim),
            "vl_self_attention": (batch, s, self.backbone_embedding_dim),
        }[engine]

    @property
    def engines(self) -> tuple[str, ...]:
        """Of the head, in the order in which an action uses them."""
        first = ("vl_self_attention",) if self.vl_self_attention_layers else ()
        return (*first, "state_encoder", "action_encoder", "dit", "action_decoder")

    @property
    def name(self) -> str:
        """Of its bundle: n1.7-32, and n1.7-32-vl where the vision-language tokens have an engine."""
        return f"{self.version}-{self.num_layers}{'-vl' if self.vl_self_attention_layers else ''}"

    @property
    def engine_calls(self) -> int:
        """Of one action: the state once, the vision-language tokens once where they have an engine, 3 a step."""
        return 1 + bool(self.vl_self_attention_layers) + 3 * self.num_inference_timesteps


#: Batch and number of action tokens are dynamic in N1.6's engines, baked into N1.7's; S is dynamic in both.
N1_6 = Config("n1.6", action_horizon=50, max_action_dim=128, max_state_dim=128, vl_lengths=(1, 122, 512), max_batch=8)
N1_7 = Config("n1.7", action_horizon=40, max_action_dim=132, max_state_dim=132, vl_lengths=(1, 280, 560))
VERSIONS = {config.version: config for config in (N1_6, N1_7)}

INTEGERS = frozenset({"timestep", "timesteps", "embodiment_id"})  # int64
MASKS = frozenset({"image_mask", "backbone_attention_mask"})  # bool

#: ONNX file of each engine, and the names under which the scripts look for its plan, the first that exists wins.
FILES = {
    "state_encoder": ("state_encoder.onnx", ("state_encoder.engine",)),
    "action_encoder": ("action_encoder.onnx", ("action_encoder.engine",)),
    "dit": ("dit_bf16.onnx", ("dit_bf16.engine", "dit_model_bf16.engine", "dit_model_bf16.trt")),
    "action_decoder": ("action_decoder.onnx", ("action_decoder.engine",)),
    "vl_self_attention": ("vl_self_attention.onnx", ("vl_self_attention.engine",)),
}
