"""What the runtimes share that make no plan: to compile a model is to open it once, which shows that it can be."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from ..errors import EngineBuildError, EngineDeserializeError
from ..runtime import BuildConfig, EngineCacheEntry
from ._build_checks import check_profiles
from ._file import FileRuntime


class OpenedRuntime(FileRuntime):
    """Its entries are model files with the configuration to open them with."""

    @abstractmethod
    def _opened(self, source: Any, config: BuildConfig | None) -> Any:
        """The model of a file. Raises `EngineBuildError` for a configuration that it cannot follow."""

    def open(self, path: Any) -> Any:
        """The model of a file, by the configuration of the runtime."""
        return self._opened(path, self._build)

    def _open_entry(self, entry: EngineCacheEntry) -> Any:
        return self._opened(entry.path, entry.build_config)

    def _compile(self, path: Path, config: BuildConfig | None) -> EngineCacheEntry:
        config = config or BuildConfig()
        self._try(path, config)
        return self._entry(path, config)

    def _try(self, source: Any, config: BuildConfig | None) -> None:
        """Opens it once: what cannot be loaded cannot be compiled."""
        what = source if isinstance(source, Path) else type(source).__name__
        try:
            with self._opened(source, config) as model:
                if config is not None and model.inputs:  # a torch module does not say what they are
                    check_profiles(what, config, model)
        except EngineDeserializeError as error:
            raise EngineBuildError(str(error), path=str(what), log=error.log) from error
