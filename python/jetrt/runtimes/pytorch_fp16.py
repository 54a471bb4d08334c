"""The runtime "pytorch_fp16": a torch model as it is, under autocast. The simple baseline for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..runtime import BuildConfig, EngineCacheEntry
from ._packages import broken
from ._torch_model import TorchModel, device_missing
from ._torch_runtime import TorchRuntime

__all__ = ["PytorchFp16Runtime", "TorchModel"]


class PytorchFp16Runtime(TorchRuntime):
    """Runs TorchScript, torch.export programs and modules. Its options are the keyword arguments of `TorchModel`."""

    label: ClassVar[str] = "pytorch_fp16"

    @classmethod
    def missing(cls, options: Mapping[str, Any] | None = None, *, deep: bool = True) -> list[str]:
        lacking = broken("torch", "pip install torch, on Jetson the build for its JetPack", deep=deep)
        if lacking or not deep:
            return lacking
        return device_missing(str((options or {}).get("device", "cuda")))

    def _opened(self, source: Any, config: BuildConfig | None) -> TorchModel:
        return TorchModel(source, **self._with_autocast(source, config))

    def _compile(self, path: Path, config: BuildConfig | None) -> EngineCacheEntry:
        """Makes an entry of the file, after opening it once. Without a configuration the options rule autocast."""
        self._try(path, config)
        return self._entry(path, config)

    def versions_here(self) -> dict[str, str]:
        import torch

        return {"torch": str(torch.__version__)}
