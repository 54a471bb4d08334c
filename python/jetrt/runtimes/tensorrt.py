"""The runtime "tensorrt": plans, run by `jetrt.Engine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .. import _core
from ..errors import CudaError, EngineBuildError, LibraryNotFoundError, PlanError, UnsupportedVersionError
from ..runtime import BuildConfig, EngineCacheEntry, Model
from ._file import FileRuntime, log

if TYPE_CHECKING:
    import os


class TensorrtRuntime(FileRuntime):
    """Runs plans on the GPU. Its configuration is the keyword arguments of `jetrt.Engine`."""

    label: ClassVar[str] = "tensorrt"

    @classmethod
    def missing(cls) -> list[str]:
        try:
            _core.library_info()
        except (LibraryNotFoundError, UnsupportedVersionError, CudaError) as error:
            return [str(error).rstrip(".")]
        return []

    def open(self, path: str | os.PathLike[str]) -> Model:
        if Path(path).suffix.lower() == ".onnx":
            raise self._not_built(Path(path), None)
        return _core.Engine(path, **self._config)

    def compile_engine(
        self, model_path: str | os.PathLike[str], build_config: BuildConfig | None = None
    ) -> EngineCacheEntry:
        """Makes an entry of a plan. Building one from an ONNX file is not part of this version: the error has the
        `trtexec` command that does it."""
        path = Path(model_path)
        if path.suffix.lower() == ".onnx":
            raise self._not_built(path, build_config)
        try:
            plan = _core.read_plan(path)
        except PlanError as error:
            raise EngineBuildError(str(error), path=str(path)) from error
        if build_config is not None:
            log.warning(
                "%s was built elsewhere: the build configuration is not applied to it and cannot be checked", path
            )
        versions = {"tensorrt": str(plan["tensorrt"]), "jetrt": str(_core.build_info()["version"])}
        return self._entry(path, versions, None)

    def _not_built(self, path: Path, build_config: BuildConfig | None) -> EngineBuildError:
        config = build_config or BuildConfig()
        command = ["trtexec", f"--onnx={path}", f"--saveEngine={path.with_suffix('.engine')}"]
        if config.precision == "mixed":
            command.append("--best")
        elif config.precision != "fp32":
            command.append(f"--{config.precision}")
        for option, index in (("min", 0), ("opt", 1), ("max", 2)):
            shapes = [f"{name}:{'x'.join(map(str, range_[index]))}" for name, *range_ in config.optimization_profiles]
            if shapes:
                command.append(f"--{option}Shapes={','.join(shapes)}")
        return EngineBuildError(
            f"{path} is an ONNX file, and this version of jetrt does not build plans. "
            f"Build it on the machine that will run it, `{' '.join(command)}`, and give the plan.",
            path=str(path),
        )
