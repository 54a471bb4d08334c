"""What the runtimes of torch models share: modules beside files, and precision as autocast knows it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .. import _core
from ..errors import EngineBuildError, EngineDeserializeError
from ..runtime import BuildConfig, EngineCacheEntry
from ._build_checks import refuse_precision
from ._opened_runtime import OpenedRuntime

#: Precision of a build configuration -> what autocast computes in.
AUTOCAST: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class TorchRuntime(OpenedRuntime):
    """`compile_engine` takes a `torch.nn.Module` or an exported program too. Its entry is good for this runtime object
    alone: there is no file to load after a restart."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._objects: dict[Path, Any] = {}

    def open(self, path: Any) -> Any:
        """The `TorchModel` of a file of torch's, a program that torch.export made, or a `torch.nn.Module` in eval mode
        that lies on the device."""
        return super().open(path)

    def _open_entry(self, entry: EngineCacheEntry) -> Any:
        return self._opened(self._objects.get(entry.path, entry.path), entry.build_config)

    def compile_engine(self, model_path: Any, build_config: BuildConfig | None = None) -> EngineCacheEntry:
        if isinstance(model_path, (str, os.PathLike)):
            return super().compile_engine(model_path, build_config)
        config = build_config if build_config is not None else self._build
        with self._told("compile_engine", type(model_path).__name__):
            self._try(model_path, config)
        with self._lock:
            path = Path(f"<{type(model_path).__name__} {len(self._objects)}>")
            self._objects[path] = model_path
        versions = {**self.versions_here(), "jetrt": str(_core.build_info()["version"])}
        return EngineCacheEntry(path, "", 0, self.label, versions, config)

    def _check(self, entry: EngineCacheEntry) -> None:
        if entry.sha256 or entry.runtime != self.label:
            super()._check(entry)
        elif entry.path not in self._objects:
            raise EngineDeserializeError(
                f"{entry.path}: the entry was made from a module by another runtime object, which alone can load it. "
                "Compile the module again, or export it to a file.",
                path=str(entry.path),
            )

    def _device(self) -> int:
        number = str(self._options.get("device", "cuda")).partition(":")[2]
        return int(number) if number.isdigit() else 0

    def _with_autocast(self, source: Any, config: BuildConfig | None) -> dict[str, Any]:
        """The options with the precision of the configuration. Two that differ raise `EngineBuildError`."""
        options: Mapping[str, Any] = self._options
        if config is None:
            return dict(options)
        what = source if isinstance(source, (str, Path)) else type(source).__name__
        refuse_precision(what, config, self.label, tuple(AUTOCAST))
        wanted = AUTOCAST[config.precision]
        asked = options.get("autocast_dtype", wanted)
        if asked != wanted:
            raise EngineBuildError(
                f"{what}: the build configuration says precision {config.precision!r} and the runtime's options say "
                f"autocast_dtype {asked!r}. Leave one of them out.",
                path=str(what),
            )
        return {**options, "autocast_dtype": wanted}
