"""`jetrt.trt_torch.Engine` as the scripts' set-up gets it: it finds what was preloaded, and its loads are recorded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from .. import _core, trt_torch
from .preloading import load_core, take

__all__ = ["Engine", "made"]

_made: list[list[Engine]] = []


class Engine(trt_torch.Engine):
    """See `jetrt.trt_torch.Engine`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for engines in _made:
            engines.append(self)

    def _open(self, file: str | os.PathLike[str]) -> _core.Engine:
        device = torch.cuda.current_device()
        found: _core.Engine | None = None if self._plugin_paths else take(file, device, "engine")
        if found is not None:
            return found
        return load_core(file, device, "engine", graphs=self._graphs, plugins=self._plugin_paths)


@contextlib.contextmanager
def made() -> Iterator[list[Engine]]:
    """The engines that are made inside, in order."""
    engines: list[Engine] = []
    _made.append(engines)
    try:
        yield engines
    finally:
        _made[:] = [other for other in _made if other is not engines]
