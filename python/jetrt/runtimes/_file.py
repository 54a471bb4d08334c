"""What the runtimes share: an entry is a file with a hash, a handle is the model that was opened from it."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from ..errors import EngineDeserializeError, InferenceError, TelemetryUnavailableError
from ..provenance import sha256_of
from ..runtime import BuildConfig, EngineCacheEntry, EngineHandle, InferenceRuntime, Model

if TYPE_CHECKING:
    import os

log = logging.getLogger("jetrt.runtime")


class FileRuntime(InferenceRuntime):
    label: ClassVar[str]

    def __init__(self, **config: Any) -> None:
        self._config = config

    @classmethod
    @abstractmethod
    def missing(cls) -> list[str]:
        """What this machine lacks to run it, one sentence each; empty when nothing is missing."""

    @abstractmethod
    def open(self, path: str | os.PathLike[str]) -> Model:
        """Loads the file without the bookkeeping of entries and handles."""

    def deserialize_engine(self, entry: EngineCacheEntry) -> EngineHandle:
        if entry.runtime != self.label:
            raise EngineDeserializeError(
                f"{entry.path}: the entry was made by the runtime {entry.runtime!r} and this is {self.label!r}. "
                "Compile it again with this runtime.",
                path=str(entry.path),
            )
        found = sha256_of(entry.path)
        if found != entry.sha256:
            raise EngineDeserializeError(
                f"{entry.path} changed since its entry was made: sha256 is {found}, the entry has {entry.sha256}. "
                "Compile it again if the change is wanted.",
                path=str(entry.path),
            )
        model = self.open(entry.path)
        log.info("ready: runtime=%s, engine=%s", self.label, entry.path)
        return EngineHandle(entry, model)

    def infer(self, handle: EngineHandle, inputs: Mapping[str, Any], *, synchronize: bool = True) -> dict[str, Any]:
        self._own(handle)
        return handle.model.run(inputs, synchronize=synchronize)

    def release_engine(self, handle: EngineHandle) -> None:
        self._own(handle)
        handle.model.close()

    def thermal_state(self) -> NoReturn:
        raise TelemetryUnavailableError(
            "jetrt has no source of clocks and temperatures yet, so the thermal state is unknown. "
            "Until it has one, read it with `tegrastats` or `nvidia-smi`.",
            reason="this version of jetrt reads no sensors",
        )

    def current_runtime_label(self) -> str:
        return self.label

    def _own(self, handle: EngineHandle) -> None:
        if handle.entry.runtime != self.label:
            raise InferenceError(
                f"The handle of {handle.entry.path} belongs to the runtime {handle.entry.runtime!r}, "
                f"this is {self.label!r}.",
                engine=str(handle.entry.path),
            )

    def _entry(self, path: Path, versions: Mapping[str, str], build_config: BuildConfig | None) -> EngineCacheEntry:
        return EngineCacheEntry(
            path=path,
            sha256=sha256_of(path),
            size_bytes=path.stat().st_size,
            runtime=self.label,
            versions=dict(versions),
            build_config=build_config,
        )
