"""Stands where the scripts have `trt_torch.py`: `Engine` over NVIDIA's binding, with the work of theirs in each call.

The calls are those of `benches/script_paths.py`; here is what else the scripts' class has.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import script_paths


def torch_type(trt_type: Any) -> torch.dtype:
    try:
        return script_paths.TORCH_TYPE[trt_type]
    except KeyError:
        raise TypeError(f"torch has no type for TensorRT's {trt_type}") from None


class Engine(script_paths.Engine):
    """Strict about shapes, types and devices; zero-filled outputs in a dict; waits for its stream after every call."""

    def __init__(self, file: str, plugins: Any = ()) -> None:
        self.plugins = [ctypes.CDLL(plugin, ctypes.RTLD_GLOBAL) for plugin in plugins]
        self.file = file
        super().__init__(str(file))
        if int(os.getenv("LOCAL_RANK", "-1")) in (0, -1):
            for title, meta in (("inputs", self.in_meta), ("outputs", self.out_meta)):
                for name, shape, dtype in meta:
                    print(f"{Path(file).name} {title}: {name} {'x'.join(map(str, shape))} {dtype}")

    def dtype_of(self, name: str) -> torch.dtype:
        return {meta[0]: meta[2] for meta in self.in_meta}[name]

    def close(self) -> None:
        """The context goes before its engine; a second time is nothing."""
        self.execution_context = None
        self.handle = None
