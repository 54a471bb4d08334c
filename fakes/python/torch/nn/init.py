"""`torch.nn.init`"""

from __future__ import annotations

from typing import Any

from .. import _modes


@_modes.no_grad()
def normal_(t: Any, mean: float = 0, std: float = 1) -> Any:
    return t.normal_(mean, std)


@_modes.no_grad()
def uniform_(t: Any, a: float = 0, b: float = 1) -> Any:
    return t.uniform_(a, b)


@_modes.no_grad()
def zeros_(t: Any) -> Any:
    return t.zero_()


@_modes.no_grad()
def ones_(t: Any) -> Any:
    return t.fill_(1)
