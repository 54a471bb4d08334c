"""What is known about a plan: from its files alone, and from TensorRT where there is a GPU that can load it.

`collect` gathers it as plain data, `text` writes it for people, `picture` draws where the time goes. Without a GPU: the
plan's header, its checksum, and all that the manifest beside it says. With one: inputs and outputs, layers, memory, the
time of each layer, and in what precision each one computes.
"""

from __future__ import annotations

from ._collect import SCHEMA, collect
from ._picture import picture
from ._text import text

__all__ = ["SCHEMA", "collect", "picture", "text"]
