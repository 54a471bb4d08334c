"""What a captured loop has baked in of an action head, so that a change of it is noticed before the next replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Baked"]


class Baked:
    """The parts of a head that a captured loop used: one that is exchanged, moved or hooked must be noticed."""

    def __init__(self, head: Any, names: Sequence[str]) -> None:
        self.head = head
        self.parts = [(name, getattr(head, name)) for name in names]
        modules = [
            (name, inner)
            for name, part in self.parts
            if isinstance(part, torch.nn.Module)
            # Where `forward` was replaced, what the module holds is not used.
            for inner in ([part] if "forward" in vars(part) else part.modules())
        ]
        used = [(name, module) for name, module in modules if "forward" not in vars(module)]
        #: (part, table, key, what is in it): replaced forwards, and the modules inside.
        self.entries = [(n, vars(part), "forward", vars(part).get("forward")) for n, part in self.parts]
        self.entries += [(n, vars(module), "forward", None) for n, module in used]
        self.entries += [
            (n, module._modules, key, child) for n, module in used for key, child in module._modules.items()
        ]
        self.weights = [
            (name, table, key, tensor.data_ptr())
            for name, module in used
            for table in (module._parameters, module._buffers)
            for key, tensor in table.items()
            if tensor is not None
        ]
        self.hooks = [
            (name, hooks) for name, module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    def exchanged(self) -> str | None:
        """What is not as it was captured, or None."""
        for name, part in self.parts:
            if getattr(self.head, name, None) is not part:
                return f"action_head.{name} was exchanged; prepare(...) again"
        for name, table, key, value in self.entries:
            if table.get(key) is not value:
                return f"in action_head.{name} {key} was replaced; prepare(...) again"
        for name, table, key, address in self.weights:
            tensor = table.get(key)
            if tensor is None or tensor.data_ptr() != address:
                return f"weights of action_head.{name} were moved; prepare(...) again"
        return None

    def hooked(self) -> str | None:
        for name, hooks in self.hooks:
            if hooks:
                return f"action_head.{name} has forward hooks, which a graph would not call"
        return None
