"""What a captured loop has baked in of an action head, so that a change of it is noticed before the next replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _core

__all__ = ["Baked"]


class Baked:
    """The parts of a head that a captured loop used: one that is exchanged, moved or hooked must be noticed."""

    def __init__(self, head: Any, names: Sequence[str]) -> None:
        parts = [(name, getattr(head, name)) for name in names]
        modules = [
            (name, inner)
            for name, part in parts
            if isinstance(part, torch.nn.Module)
            # Where `forward` was replaced, what the module holds is not used.
            for inner in ([part] if "forward" in vars(part) else part.modules())
        ]
        used = [(name, module) for name, module in modules if "forward" not in vars(module)]
        #: (dict, key, what is in it): the parts, replaced forwards, and the modules inside.
        objects = [
            (table, name, table.get(name))
            for name, _ in parts
            for table in (vars(head), vars(head).get("_modules"))
            if table is not None
        ]
        held = {name for table, name, _ in objects if table.get(name) is not None}
        #: What is no attribute of the head's own: a property, say.
        self._head, self._others = head, [(name, part) for name, part in parts if name not in held]
        self._told = [f"action_head.{name} was exchanged; prepare(...) again" for _, name, _ in objects]
        inside = [(n, vars(part), "forward", vars(part).get("forward")) for n, part in parts]
        inside += [(n, vars(module), "forward", None) for n, module in used]
        inside += [(n, module._modules, key, child) for n, module in used for key, child in module._modules.items()]
        objects += [(table, key, value) for _, table, key, value in inside]
        self._told += [f"in action_head.{n} {key} was replaced; prepare(...) again" for n, _, key, _ in inside]
        weights = [
            (name, table, key, tensor.data_ptr())
            for name, module in used
            for table in (module._parameters, module._buffers)
            for key, tensor in table.items()
            if tensor is not None
        ]
        self._told += [f"weights of action_head.{name} were moved; prepare(...) again" for name, *_ in weights]
        hooks = [
            (name, hooks) for name, module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._hooked = [f"action_head.{name} has forward hooks, which a graph would not call" for name, _ in hooks]
        self._told += self._hooked
        self._unchanged = _core._Unchanged(objects, [w[1:] for w in weights], [table for _, table in hooks])

    def changed(self) -> str | None:
        """What is not as it was captured, or would be called and is not in a graph; or None."""
        for name, part in self._others:
            if getattr(self._head, name, None) is not part:
                return f"action_head.{name} was exchanged; prepare(...) again"
        first = self._unchanged.changed()
        return None if first is None else self._told[first]

    def exchanged(self) -> bool:
        """Has anything that was captured another object or address by now? (Hooks may come and go.)"""
        reason = self.changed()
        return reason is not None and reason not in self._hooked
