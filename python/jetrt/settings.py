"""What the environment says about the drop-ins, where it counts for more than one of them."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["graphs"]


def graphs() -> Any:
    """`JETRT_GRAPHS`: the core's own CUDA graphs, "off" unless said otherwise."""
    return os.environ.get("JETRT_GRAPHS") or "off"
