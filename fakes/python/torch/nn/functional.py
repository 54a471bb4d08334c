"""`torch.nn.functional`, made of the operators: slower than torch's own, with the same results within rounding."""

from __future__ import annotations

import math
from typing import Any

from .. import _functions as f
from .._functions import relu, sigmoid, softmax, tanh
from .._tensor import Tensor

__all__ = ["embedding", "gelu", "layer_norm", "linear", "pad", "relu", "sigmoid", "silu", "softmax", "tanh"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = f.matmul(x, weight.t())
    return y if bias is None else f.add(y, bias)


def embedding(index: Tensor, weight: Tensor) -> Tensor:
    return f._gather(weight, 0, index)


def layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    wide = x.to(f.float64)
    centred = f.sub(wide, f.mean(wide, dims, keepdim=True))
    y = f.mul(centred, f.rsqrt(f.add(f.mean(f.square(centred), dims, keepdim=True), eps)))
    y = y if weight is None else f.mul(y, weight)
    y = y if bias is None else f.add(y, bias)
    return y.to(x.dtype)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    wide = x.to(f.float64)
    if approximate == "tanh":
        inner = f.mul(f.add(wide, f.mul(f.pow(wide, 3), 0.044715)), math.sqrt(2 / math.pi))
        factor = f.tanh(inner)
    else:
        factor = f.erf(f.mul(wide, math.sqrt(0.5)))
    return f.mul(f.mul(wide, 0.5), f.add(factor, 1)).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    wide = x.to(f.float64)
    return f.mul(wide, f.sigmoid(wide)).to(x.dtype)


def pad(x: Tensor, pad: Any, mode: str = "constant", value: float = 0) -> Tensor:
    if mode != "constant" or len(pad) % 2:
        raise NotImplementedError(f"stand-in torch: pad(mode={mode!r})")
    sizes = list(x.shape)
    window: list[slice] = [slice(None)] * x.ndim
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        if before < 0 or after < 0:
            raise NotImplementedError("stand-in torch: negative padding")
        window[-1 - i] = slice(before, before + sizes[-1 - i])
        sizes[-1 - i] += before + after
    out = f.full(sizes, value, dtype=x.dtype, device=x.device)
    out[tuple(window)] = x
    return out
