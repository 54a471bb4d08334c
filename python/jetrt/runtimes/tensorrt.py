"""The runtime "tensorrt": plans, run by `jetrt.Engine`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .. import _core
from ..builder.options import BuildOptions
from ..errors import CudaError, EngineBuildError, LibraryNotFoundError, PlanError, UnsupportedVersionError
from ..runtime import BuildConfig, EngineCacheEntry, Model
from ._file import FileRuntime, log

if TYPE_CHECKING:
    import os


class TensorrtRuntime(FileRuntime):
    """Runs plans on the GPU. Its options are the keyword arguments of `jetrt.Engine`."""

    label: ClassVar[str] = "tensorrt"

    @classmethod
    def missing(cls, options: Mapping[str, Any] | None = None, *, deep: bool = True) -> list[str]:  # noqa: ARG003
        try:
            _core.library_info()
        except (LibraryNotFoundError, UnsupportedVersionError, CudaError) as error:
            return [str(error).rstrip(".")]
        return []

    def open(self, path: str | os.PathLike[str]) -> Model:
        if Path(path).suffix.lower() == ".onnx":
            command = shlex.join(BuildOptions().command(path, Path(path).with_suffix(".engine")))
            raise EngineBuildError(
                f"{path} is an ONNX file, and loading builds nothing: that takes minutes. Build a plan from it first, "
                f"`{command}`, jetrt.build or compile_engine, and load that.",
                path=str(path),
            )
        return _core.Engine(path, **self._options)

    def _compile(self, path: Path, config: BuildConfig | None) -> EngineCacheEntry:
        """Makes an entry of a plan, or builds one from an ONNX file (`jetrt.build`): beside it, under a name that says
        for what it is; when that plan is there already, it is used. What a plan is cannot be changed."""
        if path.suffix.lower() == ".onnx":
            return self._built(path, config or BuildConfig())
        try:
            plan = _core.read_plan(path)
        except PlanError as error:
            raise EngineBuildError(str(error), path=str(path)) from error
        if config is not None:
            log.warning(
                "%s was built elsewhere: the build configuration is not applied to it and cannot be checked",
                path,
                extra={"event": "build_config_ignored", "fields": {"engine": str(path), "runtime": self.label}},
            )
        return self._entry(path, None, {"tensorrt": str(plan["tensorrt"])})

    def _built(self, path: Path, config: BuildConfig) -> EngineCacheEntry:
        from ..builder import build

        bounds = ("min", "opt", "max")
        shapes: dict[str, Any] = {
            bound: ({name: list(ranges[index]) for name, *ranges in config.optimization_profiles},)
            for index, bound in enumerate(bounds)
            if config.optimization_profiles
        }
        result = build(
            path,
            precision=config.precision,
            workspace=None if config.workspace_mb is None else config.workspace_mb << 20,
            calib_data=config.calibration_dataset,
            device=self._options.get("device", 0),
            plugins=tuple(map(str, self._options.get("plugins", ()))),
            progress="none",
            **shapes,
        )
        for note in result.notes:
            log.info("%s: %s", result.path, note)
        return self._entry(result.path, config, {"tensorrt": result.manifest.machine.tensorrt})
