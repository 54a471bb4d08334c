"""What the tests of `jetrt.groot` share: plans, inputs and references of a small DiT, a policy, bundles."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

import fakes
from fakes import tensor

BENCHES = Path(__file__).resolve().parents[2] / "benches" / "groot"
if str(BENCHES) not in sys.path:
    sys.path.append(str(BENCHES))

import standin  # noqa: E402
import versions  # noqa: E402

# The DiT --------------------------------------------------------------------------------------------------------------


def dit_io(
    *,
    floats: str = "bfloat16",
    timestep: str = "int64",
    mask: str = "bool",
    output: str | None = None,
    sa: int = 41,
    width: int = 64,
    lengths: Sequence[int] = (1, 122, 512),
    batch: int = 1,
) -> list[dict[str, Any]]:
    """Inputs and outputs of the ready plan "dit5", of other types and sizes."""
    sequence = [tuple([batch, length, width] for length in lengths)]
    masks = [tuple([batch, length] for length in lengths)]
    return [
        tensor("sa_embs", "input", floats, [batch, sa, width]),
        tensor("vl_embs", "input", floats, [batch, -1, width], sequence),
        tensor("timestep", "input", timestep, [batch]),
        tensor("image_mask", "input", mask, [batch, -1], masks),
        tensor("backbone_attention_mask", "input", mask, [batch, -1], masks),
        tensor("output", "output", output or floats, [batch, sa, width]),
    ]


def maskless_io(floats: str = "bfloat16", timestep: str = "timestep") -> list[dict[str, Any]]:
    """A DiT without masks; with the program "copy" its output is sa_embs."""
    inputs = [tensor_ for tensor_ in dit_io(floats=floats) if "mask" not in tensor_["name"]]
    return [{**t, "name": timestep} if t["name"] == "timestep" else t for t in inputs]


@dataclasses.dataclass
class Inputs:
    sa_embs: torch.Tensor
    vl_embs: torch.Tensor
    timestep: torch.Tensor
    image_mask: torch.Tensor
    backbone_attention_mask: torch.Tensor

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(vars(self).values())

    def expected(self, dtype: str = "bfloat16") -> np.ndarray[Any, Any]:
        """The engine's answer, as float32."""
        found = fakes.dit5_reference(*(values(t) for t in self))
        return rounded(found, dtype)


def dit_inputs(
    seed: int = 0,
    s: int = 122,
    device: Any = "cuda",
    floats: torch.dtype = torch.bfloat16,
    sa: int = 41,
    width: int = 64,
) -> Inputs:
    draw = np.random.default_rng(seed)

    def floating(*shape: int) -> torch.Tensor:
        return torch.tensor(draw.standard_normal(shape).astype(np.float32)).to(torch.bfloat16).to(floats).to(device)

    def mask() -> torch.Tensor:
        return torch.tensor(draw.integers(0, 4, (1, s)) > 0).to(device)

    return Inputs(floating(1, sa, width), floating(1, s, width), torch.tensor([250 + seed]).to(device), mask(), mask())


def values(t: torch.Tensor) -> np.ndarray[Any, Any]:
    """Waits, and gives float32 (or the integers and booleans as they are)."""
    t = t.detach()
    return (t.float() if t.is_floating_point() else t).cpu().numpy()


def rounded(found: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    return values(torch.tensor(np.ascontiguousarray(found, np.float32)).to(getattr(torch, dtype)))


def same(found: torch.Tensor, expected: np.ndarray[Any, Any]) -> bool:
    return bool(np.array_equal(values(found), expected))


# A policy -------------------------------------------------------------------------------------------------------------

CONFIG = dataclasses.replace(
    versions.N1_7,
    action_horizon=4,
    max_action_dim=64,
    max_state_dim=64,
    hidden_size=64,
    input_embedding_dim=64,
    backbone_embedding_dim=64,
    num_layers=2,
)


class Encoder(nn.Module):
    """Scales its first input by a weight, so that it has one."""

    def __init__(self, device: Any = "cuda", dtype: Any = torch.bfloat16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.5, device=device, dtype=dtype))
        self.register_buffer("table", torch.ones(4, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, *ids: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Dit(nn.Module):
    """A DiT in torch: what it computes does not matter, what it holds does."""

    def __init__(self, device: Any = "cuda", dtype: Any = torch.bfloat16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64, device=device, dtype=dtype) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(64, device=device, dtype=dtype))
        self.register_buffer("positions", torch.zeros(512, device=device, dtype=dtype))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        return_all_hidden_states: bool = False,
        image_mask: torch.Tensor | None = None,
        backbone_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return hidden_states * self.scale


class VisionLanguage(nn.Module):
    """As N1.6's backbone: the image token is in its model's configuration."""

    def __init__(self, device: Any = "cuda", dtype: Any = torch.bfloat16) -> None:
        super().__init__()
        self.model = nn.Linear(64, 64, device=device, dtype=dtype)
        self.model.config = SimpleNamespace(image_token_index=7)

    def prepare_input(self, batch: dict[str, Any]) -> standin.BatchFeature:
        return standin.BatchFeature(data=batch)

    def forward(self, vl_input: standin.BatchFeature) -> standin.BatchFeature:
        ids = vl_input["input_ids"]
        features = torch.ones(*ids.shape, 64, device=ids.device, dtype=torch.bfloat16)
        return standin.BatchFeature(
            data={
                "backbone_features": features,
                "backbone_attention_mask": vl_input["attention_mask"] == 1,
                "image_mask": ids == 7,
            }
        )


def policy(config: Any = CONFIG, head: Any = standin.ActionHeadN17, device: Any = "cuda") -> Any:
    """An object with `model.backbone` and `model.action_head`, as the scripts' policies have them; always the same."""
    torch.manual_seed(1)
    made = head(
        config,
        model=Dit(device),
        state_encoder=Encoder(device),
        action_encoder=Encoder(device),
        action_decoder=Encoder(device),
        vlln=nn.Identity(),
        position_embedding=nn.Embedding(64, 64, device=device, dtype=torch.bfloat16),
    )
    return SimpleNamespace(model=standin.Model(config, VisionLanguage(device), made).eval())


def head_inputs(seed: int = 0, s: int = 20, config: Any = CONFIG) -> tuple[standin.BatchFeature, standin.BatchFeature]:
    """backbone_output and action_input of a head."""
    draw = np.random.default_rng(seed)

    def floating(*shape: int) -> torch.Tensor:
        return torch.tensor(draw.standard_normal(shape).astype(np.float32)).to(torch.bfloat16).to("cuda")

    output = {
        "backbone_features": floating(1, s, config.backbone_embedding_dim),
        "backbone_attention_mask": torch.tensor(draw.integers(0, 4, (1, s)) > 0).to("cuda"),
        "image_mask": torch.tensor(draw.integers(0, 2, (1, s)) > 0).to("cuda"),
    }
    given = {
        "state": floating(1, config.state_history_length, config.max_state_dim),
        "embodiment_id": torch.tensor([3]).to("cuda"),
    }
    return standin.BatchFeature(data=output), standin.BatchFeature(data=given)


# Bundles --------------------------------------------------------------------------------------------------------------

BF16, IDS = "bfloat16", tensor("embodiment_id", "input", "int64", [1])


def head_plans(horizon: int = 4, width: int = 64) -> dict[str, dict[str, Any]]:
    """File name -> fields of a plan, for an action head whose sizes are all `width`."""
    tokens = horizon + 1

    def copies(name: str, rows: int, *more: dict[str, Any]) -> dict[str, Any]:
        shape = [1, rows, width]
        return {
            "program": "copy",
            "io": [tensor(name, "input", BF16, shape), *more, tensor("output", "output", BF16, shape)],
        }

    return {
        "state_encoder.engine": copies("state", 1, IDS),
        "action_encoder.engine": copies("actions", horizon, tensor("timesteps", "input", "int64", [1]), IDS),
        "dit_bf16.engine": {"program": "dit5", "nodes": 4, "io": dit_io(sa=tokens, width=width, lengths=(1, 20, 64))},
        "action_decoder.engine": copies("model_output", tokens, IDS),
    }


def backbone_plans(width: int = 64, n17: bool = True) -> dict[str, dict[str, Any]]:
    """The vision and language engines of N1.7, or of N1.6."""
    rows = [([1, 1, width], [1, 20, width], [1, 64, width])]
    ids = [([1, 1], [1, 20], [1, 64])]
    llm = [
        tensor("inputs_embeds", "input", BF16, [1, -1, width], rows),
        tensor("attention_mask", "input", "int64", [1, -1], ids),
        tensor("embeddings", "output", BF16, [1, -1, width]),
    ]
    if not n17:
        vit = [tensor("pixel_values", "input", BF16, [1, 3, 8, 8]), tensor("vit_embeds", "output", BF16, [1, 3, 64])]
        plans = {"vit_bf16.engine": vit, "llm_bf16.engine": llm}
    else:
        places = [([3, 1, 1], [3, 1, 20], [3, 1, 64])]
        llm.insert(2, tensor("position_ids", "input", "int64", [3, 1, -1], places))
        vit = [
            tensor("pixel_values", "input", "float32", [16, width]),
            tensor("image_embeds", "output", "float32", [16, width]),
        ]
        plans = {"vit.engine": vit, "llm_bf16.engine": llm}
    return {name: {"program": "copy", "io": io} for name, io in plans.items()}


def metadata(config: Any = CONFIG, **more: Any) -> dict[str, Any]:
    """export_metadata.json as N1.7's exporter writes it."""
    found = {
        "schema_version": 1,
        "model_version": "n1d7",
        "sa_seq_len": config.sa_tokens,
        "vl_seq_len": 20,
        "llm_seq_len": 20,
        "num_patches": 16,
        "num_merged_patches": 4,
        "num_vis_tokens": 4,
        "action_horizon": config.action_horizon,
        "max_action_dim": config.max_action_dim,
        "max_state_dim": config.max_state_dim,
        "state_history_length": config.state_history_length,
        "hidden_size": config.hidden_size,
        "input_embedding_dim": config.input_embedding_dim,
        "backbone_embedding_dim": config.backbone_embedding_dim,
        "batch_size": 1,
        "precision": "bf16",
        "export_mode": "action_head",
    }
    found.update(more)
    return {key: value for key, value in found.items() if value is not None}


def write_bundle(
    folder: Path, plans: dict[str, dict[str, Any]] | None = None, meta: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, fields in (head_plans() if plans is None else plans).items():
        fakes.write_plan(folder / name, fields)
    if meta is None:
        meta = metadata()
    (folder / "export_metadata.json").write_text(json.dumps(meta))
    return folder


Write = Callable[..., Path]
