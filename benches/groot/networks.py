"""The head's networks in torch, with random weights or those of an ONNX file of `models.py`, and a whole policy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from standin import HEADS, Backbone, Model, Policy
from torch import nn
from versions import FILES, Config


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
    """q [B,T,W], k and v [B,S,W], mask [B,S] (true: attended) → [B,T,W]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    kept = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept).transpose(1, 2).flatten(2)


class Attending(nn.Module):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, width: int, source: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(source, width), nn.Linear(source, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def mix(self, x: torch.Tensor, y: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x + attention of the normed y to `source`."""
        return self.out(attention(self.q(y), self.k(source), self.v(source), self.heads, mask)) + x

    def feed(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x + feed-forward of the normed y."""
        return self.down(F.gelu(self.up(y), approximate="tanh")) + x


class DitBlock(Attending):
    """Norms without weights; the first is scaled and shifted by the timestep."""

    def __init__(self, width: int, source: int, heads: int) -> None:
        super().__init__(width, source, heads)
        self.adaln = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, eps=1e-5, elementwise_affine=False)

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, source: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        scale, shift = self.adaln(F.silu(time))[:, None].chunk(2, dim=-1)
        y = self.norm(x) * (1 + scale) + shift
        x = self.mix(x, y, y if source is None else source, mask)
        return self.feed(x, self.norm(x))


class AlternateVLDiT(nn.Module):
    """Even blocks attend to the text's tokens and the image's in turn, odd ones to the action tokens themselves."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, heads = config.input_embedding_dim, config.num_attention_heads
        self.every = 2 * config.attend_text_every_n_blocks
        self.time1, self.time2 = nn.Linear(256, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            DitBlock(width, width if i % 2 else config.backbone_embedding_dim, heads) for i in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaln = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,  # noqa: ARG002 (part of the signature)
        return_all_hidden_states: bool = False,
        image_mask: torch.Tensor | None = None,
        backbone_attention_mask: torch.Tensor | None = None,
    ) -> Any:
        assert image_mask is not None, "Image mask is required"
        assert backbone_attention_mask is not None
        angles = torch.arange(128, device=timestep.device, dtype=torch.float32) * (-math.log(10000) / 127)
        angles = timestep[:, None].float() * angles.exp()
        wave = torch.cat((angles.cos(), angles.sin()), dim=-1).to(hidden_states.dtype)
        time = self.time2(F.silu(self.time1(wave)))
        text, image = ~image_mask & backbone_attention_mask, image_mask & backbone_attention_mask
        x = hidden_states
        states = [x]
        for i, block in enumerate(self.blocks):
            if i % 2:
                x = block(x, time, None, None)
            else:
                x = block(x, time, encoder_hidden_states, text if i % self.every == 0 else image)
            states.append(x)
        shift, scale = self.adaln(F.silu(time))[:, None].chunk(2, dim=-1)
        x = self.out(self.norm(x) * (1 + scale) + shift)
        return (x, states) if return_all_hidden_states else x


class CategoryLinear(nn.Module):
    """A linear layer for each embodiment; ids [B] choose: [B,T,inputs] → [B,T,outputs]."""

    def __init__(self, categories: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(categories, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(categories, outputs))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight[ids]) + self.bias[ids].unsqueeze(1)


class CategoryMlp(nn.Module):
    """State encoder and action decoder."""

    def __init__(self, categories: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layer1 = CategoryLinear(categories, inputs, hidden)
        self.layer2 = CategoryLinear(categories, hidden, outputs)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.layer2(F.relu(self.layer1(x, ids)), ids)


class ActionEncoder(nn.Module):
    """Actions [B,H,D], timesteps [B] and embodiments [B] → [B,H,width]."""

    def __init__(self, categories: int, inputs: int, width: int) -> None:
        super().__init__()
        self.layer1 = CategoryLinear(categories, inputs, width)
        self.layer2 = CategoryLinear(categories, 2 * width, width)
        self.layer3 = CategoryLinear(categories, width, width)

    def forward(self, actions: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.layer1(actions, ids)
        half = x.shape[-1] // 2
        rate = torch.exp(torch.arange(half, device=x.device, dtype=torch.float32) * (-math.log(10000) / half))
        angles = timesteps[:, None].expand(-1, x.shape[1])[..., None].float() * rate
        wave = torch.cat((angles.sin(), angles.cos()), dim=-1).to(x.dtype)
        return self.layer3(F.silu(self.layer2(torch.cat((x, wave), dim=-1), ids)), ids)


class VlBlock(Attending):
    """Norms with weights, attention of the tokens to one another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = self.mix(x, y, y, None)
        return self.feed(x, self.norm2(x))


class VlSelfAttention(nn.Module):
    """N1.7's layers over the vision-language tokens: [B,S,2048] → the same."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            VlBlock(config.backbone_embedding_dim, 32) for _ in range(config.vl_self_attention_layers)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def network(config: Config, engine: str) -> nn.Module:
    """The module that the engine of this name stands in for, its weights not set (a meta device makes that free)."""
    kinds, width, hidden = config.max_num_embodiments, config.input_embedding_dim, config.hidden_size
    if engine == "dit":
        return AlternateVLDiT(config)
    if engine == "state_encoder":
        return CategoryMlp(kinds, config.state_width, hidden, width)
    if engine == "action_encoder":
        return ActionEncoder(kinds, config.max_action_dim, width)
    if engine == "action_decoder":
        return CategoryMlp(kinds, hidden, hidden, config.max_action_dim)
    if engine == "vl_self_attention":
        return VlSelfAttention(config)
    raise ValueError(f"there is no engine of the name {engine!r}; there are {', '.join(FILES)}")


def file_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of each weight in an ONNX file of `models.py`, in place where they lie in a file of their own."""
    import onnx

    types = {onnx.TensorProto.BFLOAT16: (np.int16, torch.bfloat16), onnx.TensorProto.FLOAT: (np.float32, torch.float32)}
    for weight in onnx.load(path, load_external_data=False).graph.initializer:
        if "." not in weight.name:
            continue  # a constant of the graph
        kind, dtype = types[weight.data_type]
        if weight.data_location == onnx.TensorProto.EXTERNAL:
            place = {item.key: item.value for item in weight.external_data}
            file = path.with_name(place["location"])
            array = np.memmap(file, kind, "c", int(place["offset"]), tuple(weight.dims))  # "c": torch wants it writable
        else:
            array = np.frombuffer(bytearray(weight.raw_data), kind).reshape(tuple(weight.dims))
        yield weight.name, torch.from_numpy(array).view(dtype)


def parameter_name(name: str) -> str:
    """Of the module, for a weight of the file: "3.q.weight" is blocks.3.q.weight, "tail.out.bias" is out.bias."""
    head, _, rest = name.partition(".")
    if head.isdecimal():
        return f"blocks.{head}.{rest}"
    return {"time": f"time{rest}", "tail": rest}.get(head, name)


@torch.no_grad()
def load_weights(module: nn.Module, path: Path) -> None:
    """Sets every parameter from the file; raises ValueError where one is missing, left over or of another shape."""
    parameters = dict(module.named_parameters())
    linear = {name for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    for name, value in file_weights(path):
        place = parameter_name(name)
        parameter = parameters.pop(place, None)
        if parameter is None:
            raise ValueError(f"{path.name}: the module has no place for {name}")
        value = value.to(parameter.device)
        if place.rpartition(".")[0] in linear:
            value = value.mT if value.dim() == 2 else value  # torch keeps [outputs, inputs]
        if parameter.shape != value.shape:
            raise ValueError(f"{path.name}: {name} is {list(value.shape)}, the module wants {list(parameter.shape)}")
        parameter.copy_(value)
    if parameters:
        raise ValueError(f"{path.name}: nothing for {', '.join(sorted(parameters))}")


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Weights normal with deviation 0.02, the same for a seed wherever the module lies; norms 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if isinstance(part, nn.LayerNorm):
                parameter.fill_(parameter is part.weight)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return module


def made(config: Config, engine: str, device: Any, dtype: torch.dtype, weights: Path | None) -> nn.Module:
    with torch.device("meta"):
        module = network(config, engine).to(dtype)
    module = module.to_empty(device=device).requires_grad_(False)
    if weights is None:
        return randomize(module, sum(engine.encode()))
    load_weights(module, weights / FILES[engine][0])
    return module


def policy(
    config: Config,
    *,
    device: Any = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    weights: Path | None = None,
    without: Collection[str] = (),
    shared: dict[str, nn.Module] | None = None,
) -> Policy:
    """A policy in torch.

    weights: a folder of `models.py`. without: networks that engines will stand in for. shared: the head's networks that
    there are already, by the engine's name; those made here are added, so that several policies can have the same.
    """
    parts: dict[str, nn.Module] = {}
    shared = {} if shared is None else shared
    for engine in config.engines:
        if engine not in without and engine not in shared:
            shared[engine] = made(config, engine, device, dtype, weights)
        part = nn.Identity() if engine in without else shared[engine]
        parts["model" if engine == "dit" else engine] = part
    width, vl_width = config.input_embedding_dim, config.backbone_embedding_dim

    def small(module: nn.Module, seed: int) -> nn.Module:
        return randomize(module, seed).to(device, dtype).requires_grad_(False)

    if config.add_pos_embed:
        parts["position_embedding"] = small(nn.Embedding(config.max_seq_len, width), 1)
    if config.use_vlln:
        parts["vlln"] = small(nn.LayerNorm(vl_width), 2)
    backbone = Backbone(
        embedding=small(nn.Embedding(256, vl_width), 3), projection=small(nn.Linear(Backbone.PIXELS, vl_width), 4)
    )
    return Policy(Model(config, backbone, HEADS[config.version](config, **parts)))
