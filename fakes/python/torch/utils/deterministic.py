"""`torch.utils.deterministic.fill_uninitialized_memory`"""

from __future__ import annotations

import sys
import types

from .. import _modes


class _Module(types.ModuleType):
    @property
    def fill_uninitialized_memory(self) -> bool:
        return _modes.fill_uninitialized_memory

    @fill_uninitialized_memory.setter
    def fill_uninitialized_memory(self, mode: bool) -> None:
        _modes.fill_uninitialized_memory = bool(mode)


sys.modules[__name__].__class__ = _Module
