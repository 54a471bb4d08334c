"""A decoder with grouped-query attention and random weights, to be measured: 18 layers, 970 tokens, 8 heads, 1 KV head.

    python examples/gqa_transformer.py gqa.onnx             # writes the ONNX file
    jetrt bench gqa.onnx eager=examples/gqa_transformer.py:GqaTransformer --precision fp16

The shape of the language model in vision-language-action policies such as pi0.5 (RMSNorm, gated MLP, rotary positions),
narrower by default so that it is built in a minute; --width 2048 --mlp 16384 is the full size. Needs torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor, nn

LAYERS, TOKENS, HEADS = 18, 970, 8


class RmsNorm(nn.Module):  # type: ignore[misc,unused-ignore]
    """In float32 whatever comes in: squares leave the range of float16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (normed * self.weight).to(x.dtype)


class Layer(nn.Module):  # type: ignore[misc,unused-ignore]
    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.head = width // HEADS
        self.before, self.between = RmsNorm(width), RmsNorm(width)
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * self.head, bias=False)  # one head for all eight of q
        self.gate, self.up = nn.Linear(width, mlp, bias=False), nn.Linear(width, mlp, bias=False)
        self.down = nn.Linear(mlp, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.before(x)
        q = turned(self.q(y).unflatten(-1, (HEADS, self.head)).transpose(1, 2), cos, sin)
        k, v = self.kv(y).unsqueeze(1).chunk(2, dim=-1)
        k, v = turned(k, cos, sin), v
        weights = (q @ k.transpose(-1, -2) * self.head**-0.5).float().softmax(-1).to(v.dtype)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        y = self.between(x)
        return x + self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class GqaTransformer(nn.Module):  # type: ignore[misc,unused-ignore]
    """embeddings [1, 970, width] -> hidden states of the same shape. Weights depend on the seed alone."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int = 1024, mlp: int = 4096, layers: int = LAYERS, seed: int = 0) -> None:
        super().__init__()
        self.width = width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(Layer(width, mlp) for _ in range(layers))
        self.norm = RmsNorm(width)
        half = width // HEADS // 2
        angles = torch.arange(TOKENS)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.eval()

    def forward(self, embeddings: Tensor) -> Tensor:
        x = embeddings
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        result: Tensor = self.norm(x)
        return result

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {"embeddings": torch.randn(batch, TOKENS, self.width, generator=generator)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    module = GqaTransformer(arguments.width, arguments.mlp, arguments.layers)
    torch.onnx.export(
        module,
        tuple(module.example_inputs(1).values()),
        str(arguments.onnx),
        input_names=["embeddings"],
        output_names=["hidden"],
        opset_version=17,
        dynamo=False,  # the other exporter needs onnxscript
    )
    print(f"{arguments.onnx}: {sum(p.numel() for p in module.parameters()) / 1e6:.0f} million weights")


if __name__ == "__main__":
    main()
