"""The runtime "pytorch_fp16": a torch model as it is, under autocast. The simple baseline for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from ..errors import EngineBuildError, EngineDeserializeError
from ..runtime import BuildConfig, EngineCacheEntry
from ._build_checks import check_profiles, refuse_precision
from ._file import FileRuntime
from ._packages import broken
from ._torch_model import TorchModel, device_missing

__all__ = ["PytorchFp16Runtime", "TorchModel"]

#: Precision of a build configuration -> what autocast computes in.
AUTOCAST: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class PytorchFp16Runtime(FileRuntime):
    """Runs torch models. Its options are the keyword arguments of `TorchModel`."""

    label: ClassVar[str] = "pytorch_fp16"

    @classmethod
    def missing(cls, options: Mapping[str, Any] | None = None, *, deep: bool = True) -> list[str]:
        lacking = broken("torch", "pip install torch, on Jetson the build for its JetPack", deep=deep)
        if lacking or not deep:
            return lacking
        return device_missing(str((options or {}).get("device", "cuda")))

    def open(self, path: Any) -> TorchModel:
        """A TorchScript file, a torch.export program (file or object), or a `torch.nn.Module` in eval mode that lies on
        the device."""
        return self._opened(path, self._build)

    def _open_entry(self, entry: EngineCacheEntry) -> TorchModel:
        return self._opened(entry.path, entry.build_config)

    def _opened(self, source: Any, config: BuildConfig | None) -> TorchModel:
        return TorchModel(source, **with_autocast(source, self._options, config, self.label))

    def _compile(self, path: Path, config: BuildConfig | None) -> EngineCacheEntry:
        """Makes an entry of the file, after opening it once. Without a configuration the options rule autocast."""
        try:
            with self._opened(path, config) as model:
                if config is not None and model.inputs:
                    check_profiles(path, config, model)
        except EngineDeserializeError as error:
            raise EngineBuildError(str(error), path=str(path), log=error.log) from error
        return self._entry(path, config)

    def versions_here(self) -> dict[str, str]:
        import torch

        return {"torch": str(torch.__version__)}

    def _device(self) -> int:
        return device_number(self._options)


def device_number(options: Mapping[str, Any]) -> int:
    number = str(options.get("device", "cuda")).partition(":")[2]
    return int(number) if number.isdigit() else 0


def with_autocast(source: Any, options: Mapping[str, Any], config: BuildConfig | None, runtime: str) -> dict[str, Any]:
    """The options of a model with the precision of the configuration. Two that differ raise `EngineBuildError`."""
    if config is None:
        return dict(options)
    what = source if isinstance(source, (str, Path)) else type(source).__name__
    refuse_precision(what, config, runtime, tuple(AUTOCAST))
    wanted = AUTOCAST[config.precision]
    asked = options.get("autocast_dtype", wanted)
    if asked != wanted:
        raise EngineBuildError(
            f"{what}: the build configuration says precision {config.precision!r} and the runtime's options say "
            f"autocast_dtype {asked!r}. Leave one of them out.",
            path=str(what),
        )
    return {**options, "autocast_dtype": wanted}
