"""`torch.nn.Parameter`: a subclass of Tensor, as in torch."""

from __future__ import annotations

from typing import Any

from .._functions import empty
from .._tensor import Tensor


class Parameter(Tensor):
    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> Any:
        data = empty(0) if data is None else data
        made = data.detach()
        made.__class__ = cls
        made._base = None
        return made.requires_grad_(requires_grad)

    def __init__(self, data: Tensor | None = None, requires_grad: bool = True) -> None:
        pass

    def __repr__(self) -> str:
        return f"Parameter containing:\n{super().__repr__()}"


Parameter.__module__ = "torch.nn.parameter"
