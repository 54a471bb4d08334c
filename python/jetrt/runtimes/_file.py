"""What the runtimes share: an entry is a file with a hash, a handle is the model that was opened from it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .. import _core
from ..errors import (
    BuildOptionError,
    CalibrationCacheError,
    EngineBuildError,
    EngineDeserializeError,
    InferenceError,
    OutOfMemoryError,
)
from ..provenance import EngineFilenameSchema, sha256_of
from ..runtime import BuildConfig, EngineCacheEntry, EngineHandle, InferenceRuntime, Model, ThermalState

if TYPE_CHECKING:
    import os

log = logging.getLogger("jetrt.runtime")


class FileRuntime(InferenceRuntime):
    label: ClassVar[str]

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        build: BuildConfig | None = None,
        fallback_for: str | None = None,
    ) -> None:
        """`options` go to every model that it opens, `build` is what `compile_engine` takes when it gets nothing."""
        self._options = dict(options or {})
        self._build = build
        self._fallback_for = fallback_for
        self._resident: weakref.WeakSet[EngineHandle] = weakref.WeakSet()
        self._lock = threading.Lock()

    # -------------------------------------------------------------------------------- what a runtime fills in

    @classmethod
    @abstractmethod
    def missing(cls, options: Mapping[str, Any] | None = None, *, deep: bool = True) -> list[str]:
        """What this machine lacks to run it with these options, one sentence each; empty when nothing is missing.

        Without `deep` packages are looked for and not imported.
        """

    @abstractmethod
    def open(self, path: str | os.PathLike[str]) -> Model:
        """Loads the file without the bookkeeping of entries and handles."""

    @abstractmethod
    def _compile(self, path: Path, config: BuildConfig | None) -> EngineCacheEntry:
        """`compile_engine`; ``None`` is a configuration that nobody gave."""

    def versions_here(self) -> dict[str, str]:
        """Versions that an entry must have been made with to be loaded here, by name."""
        return {}

    def _open_entry(self, entry: EngineCacheEntry) -> Model:
        return self.open(entry.path)

    # -------------------------------------------------------------------------------------------- six methods

    def compile_engine(
        self, model_path: str | os.PathLike[str], build_config: BuildConfig | None = None
    ) -> EngineCacheEntry:
        with self._told("compile_engine", str(model_path)):
            return self._compile(Path(model_path), build_config if build_config is not None else self._build)

    def deserialize_engine(self, entry: EngineCacheEntry) -> EngineHandle:
        started = time.perf_counter()
        with self._told("deserialize_engine", title(entry)):
            self._check(entry)
            model = self._open_entry(entry)
        handle = EngineHandle(entry, model)
        with self._lock:
            self._resident.add(handle)
            engines = sorted(title(held.entry) for held in self._resident if not held.model.closed)
        seconds = time.perf_counter() - started
        log.info(
            "ready: runtime=%s, engines=[%s]; deserialised %s in %.3f s",
            self.current_runtime_label(),
            ", ".join(engines),
            entry.path,
            seconds,
            extra={
                "event": "ready",
                "fields": {
                    "runtime": self.current_runtime_label(),
                    "engines": engines,
                    "deserialised": str(entry.path),
                    "seconds": seconds,
                },
            },
        )
        return handle

    def infer(self, handle: EngineHandle, inputs: Mapping[str, Any], *, synchronize: bool = True) -> dict[str, Any]:
        # The hot path: a check of the handle, one look at the log level, the model.
        if handle.entry.runtime != self.label:
            self._refuse(handle)
        if log.isEnabledFor(logging.DEBUG):
            return self._timed(handle, inputs, synchronize)
        try:
            return handle.model.run(inputs, synchronize=synchronize)
        except OutOfMemoryError as error:
            self._tell(error, "infer", title(handle.entry))
            raise

    def release_engine(self, handle: EngineHandle) -> None:
        if handle.entry.runtime != self.label:
            self._refuse(handle)
        with self._lock:
            self._resident.discard(handle)
        handle.model.close()

    def thermal_state(self, *, require: bool = False) -> ThermalState:
        from .. import thermal

        monitor = thermal.monitor(self._device())
        state: ThermalState = monitor.require() if require else monitor.state()
        return state

    def current_runtime_label(self) -> str:
        return self.label if self._fallback_for is None else f"{self.label} (fallback for {self._fallback_for})"

    # ------------------------------------------------------------------------------------------------ helpers

    def _device(self) -> int:
        """The GPU whose clock and temperature count."""
        device = self._options.get("device", 0)
        return device if isinstance(device, int) else 0

    def _check(self, entry: EngineCacheEntry) -> None:
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
        differing = [
            f"{name} {entry.versions[name]}, here {here}"
            for name, here in self.versions_here().items()
            if name in entry.versions and entry.versions[name] != here
        ]
        if differing:
            raise EngineDeserializeError(
                f"{entry.path}: the entry was made with {'; '.join(differing)}. "
                f"Compile it again here: compile_engine on the runtime {self.label!r}.",
                path=str(entry.path),
            )

    def _timed(self, handle: EngineHandle, inputs: Mapping[str, Any], synchronize: bool) -> dict[str, Any]:
        engine = title(handle.entry)
        started = time.perf_counter_ns()
        try:
            outputs = handle.model.run(inputs, synchronize=synchronize)
        except OutOfMemoryError as error:
            self._tell(error, "infer", engine)
            raise
        taken = (time.perf_counter_ns() - started) / 1e6
        # Without a wait it is the time until the call was enqueued.
        what = "took" if synchronize else "enqueued_in"
        fields = {"engine": engine, f"{what}_ms": taken, "runtime": self.current_runtime_label()}
        log.debug("infer engine=%s %s=%.3fms", engine, what, taken, extra={"event": "infer", "fields": fields})
        return outputs

    def _refuse(self, handle: EngineHandle) -> None:
        raise InferenceError(
            f"The handle of {handle.entry.path} belongs to the runtime {handle.entry.runtime!r}, "
            f"this is {self.label!r}.",
            engine=str(handle.entry.path),
        )

    @contextlib.contextmanager
    def _told(self, during: str, what: str) -> Iterator[None]:
        """Logs the errors that somebody who reads logs alone must see; they are raised all the same."""
        try:
            yield
        except (EngineBuildError, EngineDeserializeError, CalibrationCacheError, OutOfMemoryError) as error:
            self._tell(error, during, what)
            raise

    def _tell(self, error: Exception, during: str, engine: str) -> None:
        kind = "OOM" if isinstance(error, OutOfMemoryError) else type(error).__name__
        fields = {
            "error": type(error).__name__,
            "during": during,
            "engine": engine,
            "runtime": self.current_runtime_label(),
            "message": str(error),
        }
        event = {"event": "error", "fields": fields}
        log.error("%s during %s; engine=%s; %s", kind, during, engine, error, extra=event)

    def _entry(
        self, path: Path, build_config: BuildConfig | None, versions: Mapping[str, str] | None = None
    ) -> EngineCacheEntry:
        return EngineCacheEntry(
            path=path,
            sha256=sha256_of(path),
            size_bytes=path.stat().st_size,
            runtime=self.label,
            versions={
                **(self.versions_here() if versions is None else versions),
                "jetrt": str(_core.build_info()["version"]),
            },
            build_config=build_config,
        )


def title(entry: EngineCacheEntry) -> str:
    """`ultravpr@fp16`: the model, and its precision where the entry or the file's name says it."""
    model = entry.path.stem.strip("<>")  # "<Head 0>" is a module
    precision: str | None = None
    with contextlib.suppress(BuildOptionError):  # a name of another form
        named = EngineFilenameSchema.parse(entry.path.name)
        model, precision = named.model, named.precision
    if entry.build_config is not None:
        precision = entry.build_config.precision
    return model if precision is None else f"{model}@{precision}"
