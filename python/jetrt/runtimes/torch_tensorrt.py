"""The runtime "torch_tensorrt": an adapter to Torch-TensorRT, which compiles torch models to TensorRT engines.

Torch-TensorRT runs in torch what it cannot convert, without an error; here the whole model must be converted
(`require_full_compilation`, and the parts of the result are counted) unless `allow_partition` is given.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from ..errors import CudaError, EngineBuildError, EngineDeserializeError, LibraryNotFoundError, UnsupportedVersionError
from ..runtime import BuildConfig, EngineCacheEntry
from ._file import log
from ._packages import broken, version_of
from ._torch_model import TorchModel, device_missing
from ._torch_runtime import TorchRuntime
from ._torch_source import TorchSource, arguments_of, program_source

__all__ = ["TorchTensorrtModel", "TorchTensorrtRuntime"]

PRECISIONS: Final[Mapping[str, Literal["fp32", "fp16", "bf16"]]] = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}
Profile = tuple[str, Sequence[int], Sequence[int], Sequence[int]]


class TorchTensorrtRuntime(TorchRuntime):
    """Compiles torch.export programs and modules by Torch-TensorRT, which takes minutes, and runs them; a file that
    `compile_engine` made is only loaded. Its options are the keyword arguments of `TorchTensorrtModel`."""

    label: ClassVar[str] = "torch_tensorrt"

    @classmethod
    def missing(cls, options: Mapping[str, Any] | None = None, *, deep: bool = True) -> list[str]:
        lacking = broken("torch", "pip install torch, on Jetson the build for its JetPack", deep=deep)
        step = "pip install torch_tensorrt, the version for this torch and TensorRT"
        # Its own import would open a TensorRT, so that the versions are compared before.
        found = broken("torch_tensorrt", step, deep=False)
        lacking += found or _unpaired()
        if lacking or not deep:
            return lacking
        device = str((options or {}).get("device", "cuda"))
        if device.startswith("cpu"):
            return [f"a CUDA device (device={device!r} was asked for, and TensorRT runs on no CPU)"]
        return device_missing(device) or broken("torch_tensorrt", step, deep=True)

    def _opened(self, source: Any, config: BuildConfig | None) -> TorchTensorrtModel:
        options = self._with_autocast(source, config)
        if config is not None:
            if config.workspace_mb is not None:
                options["workspace_mb"] = config.workspace_mb
            if config.optimization_profiles:
                options["profiles"] = config.optimization_profiles
        return TorchTensorrtModel(source, **options)

    def _compile(self, path: Path, config: BuildConfig | None) -> EngineCacheEntry:
        """Compiles a torch.export program and saves it beside, as ``<name>.torch_tensorrt_<precision>.pt2``."""
        try:
            with self._opened(path, config) as model:
                if model.load_report["compile_seconds"] is None:
                    return self._entry(path, config)
                precision = PRECISIONS[model.load_report["autocast_dtype"]]
                target = path.with_name(f"{path.stem}.torch_tensorrt_{precision}.pt2")
                model.save(target)
        except EngineDeserializeError as error:
            raise EngineBuildError(str(error), path=str(path), log=error.log) from error
        return self._entry(target, config or BuildConfig(precision=precision))

    def versions_here(self) -> dict[str, str]:
        import torch

        versions = {"torch": str(torch.__version__)}
        for name, found in (
            ("torch_tensorrt", version_of("torch_tensorrt")),
            ("tensorrt", version_of("tensorrt", "tensorrt-cu13", "tensorrt-cu12")),
        ):
            if found is not None:
                versions[name] = found
        return versions


class TorchTensorrtModel(TorchModel):
    """A torch model that Torch-TensorRT has compiled. ``load_report["compile_seconds"]`` is the time of that; "seconds"
    covers everything. It is ``None`` where the file was compiled before."""

    runtime = "torch_tensorrt"

    def __init__(
        self,
        source: Any,
        *,
        device: str = "cuda",
        autocast_dtype: Any = "float16",
        example: Mapping[str, Any] | Sequence[Any] | None = None,
        output_names: Sequence[str] = (),
        profiles: Sequence[Profile] = (),
        workspace_mb: int | None = None,
        allow_partition: bool = False,
    ) -> None:
        """As `TorchModel`; `autocast_dtype` is what TensorRT may compute in. A module needs `example`, from which it is
        exported; `profiles` are (input, min, opt, max) for inputs with dynamic dimensions."""
        self._profiles = {name: (tuple(low), tuple(opt), tuple(high)) for name, low, opt, high in profiles}
        self._settings = (autocast_dtype, workspace_mb, allow_partition)
        self._compile_seconds: float | None = None
        self._parts = (0, 0)
        super().__init__(
            source, device=device, autocast_dtype=autocast_dtype, example=example, output_names=output_names
        )
        self._load_report["compile_seconds"] = self._compile_seconds
        self._load_report["parts"] = {"tensorrt": self._parts[0], "torch": self._parts[1]}

    def _autocast(self, torch: Any) -> Any:
        return torch.autocast(self._device.type, enabled=False)  # the precision is in the engines

    def _prepare(self, source: TorchSource, device: Any, example: Any) -> TorchSource:
        import torch_tensorrt

        if source.kind == "TorchScript":
            raise EngineDeserializeError(
                f"{source.path or source.name}: torch_tensorrt compiles a torch.nn.Module or a torch.export program; "
                "this is TorchScript. Export the module with torch.export.",
                path=str(source.path or source.name),
            )
        if source.kind == "torch.export program" and _engines(source.model.graph):
            self._parts = _engines(source.model.graph), 0
            return source
        started = time.perf_counter()
        values = self._example_values(source, example, device)
        if source.kind == "module":
            source = program_source(self._exported(source, values), None, source.name, device)
        compiled = self._compiled(torch_tensorrt, source, values, device)
        self._compile_seconds = time.perf_counter() - started
        self._parts = self._check_parts(source, compiled)
        log.info(
            "torch_tensorrt compiled %s in %.1f s: %d parts on TensorRT, %d in torch",
            source.name,
            self._compile_seconds,
            *self._parts,
            extra={
                "event": "compiled",
                "fields": {
                    "model": source.name,
                    "runtime": self.runtime,
                    "seconds": self._compile_seconds,
                    "tensorrt_parts": self._parts[0],
                    "torch_parts": self._parts[1],
                },
            },
        )
        self._example = values

        def call(named: Mapping[str, Any]) -> Any:
            positional, keywords = arguments_of(source, named)
            return compiled(*positional, **keywords)

        return replace(source, model=compiled, call=call)

    def _example_values(self, source: TorchSource, example: Any, device: Any) -> dict[str, Any]:
        """Inputs to compile for: the example, or zeros of a program's own shapes."""
        import torch

        if example is not None:
            pairs = example.items() if isinstance(example, Mapping) else zip(source.names, example, strict=False)
            return {name: torch.as_tensor(value).to(device) for name, value in pairs}
        if source.kind == "module":
            raise EngineDeserializeError(
                f"{source.name}: a module says nothing about its inputs, so torch_tensorrt cannot compile it. Pass "
                "example=, or export it with torch.export.",
                path=source.name,
            )
        values = {}
        for name, info in source.inputs.items():
            shape = self._profiles[name][1] if name in self._profiles else info.shape
            if -1 in shape:
                raise EngineDeserializeError(
                    f"{source.path or source.name}: input {name!r} has dynamic dimensions {list(shape)} and no "
                    "profile. Give profiles= or example=.",
                    path=str(source.path or source.name),
                )
            values[name] = torch.zeros(shape, dtype=getattr(torch, info.dtype), device=device)
        return values

    def _exported(self, source: TorchSource, values: Mapping[str, Any]) -> Any:
        import torch

        dynamic = {
            name: {
                axis: torch.export.Dim(f"{name}_{axis}", min=low, max=high)
                for axis, (low, high) in enumerate(zip(*self._profiles[name][::2], strict=True))
                if low != high
            }
            if name in self._profiles
            else None
            for name in values
        }
        try:
            return torch.export.export(
                source.model, (), dict(values), dynamic_shapes=dynamic if any(dynamic.values()) else None
            )
        except Exception as error:
            raise EngineDeserializeError(
                f"{source.name}: torch.export refused the module: {str(error).strip()}", path=source.name
            ) from error

    def _compiled(self, torch_tensorrt: Any, source: TorchSource, values: Mapping[str, Any], device: Any) -> Any:
        import torch

        dtype, workspace, allow_partition = self._settings
        settings: dict[str, Any] = {"require_full_compilation": not allow_partition, "device": device}
        if workspace is not None:
            settings["workspace_size"] = workspace << 20
        if not allow_partition:
            settings["min_block_size"] = 1
        known = inspect.signature(torch_tensorrt.dynamo.compile).parameters
        if dtype != "float32":
            low = getattr(torch, dtype)
            if "enable_autocast" in known:  # newer versions keep the program's own types otherwise
                settings.update(enable_autocast=True, autocast_low_precision_type=low)
            else:
                settings["enabled_precisions"] = {torch.float32, low}
        arguments = {
            name: torch_tensorrt.Input(
                min_shape=self._profiles[name][0],
                opt_shape=self._profiles[name][1],
                max_shape=self._profiles[name][2],
                dtype=value.dtype,
                name=name,
            )
            if name in self._profiles
            else value
            for name, value in values.items()
        }
        positional, keywords = arguments_of(source, arguments)
        try:
            return torch_tensorrt.dynamo.compile(source.model, arg_inputs=positional, kwarg_inputs=keywords, **settings)
        except Exception as error:
            step = "" if allow_partition else " Pass allow_partition=True to run in torch what it cannot convert."
            raise EngineDeserializeError(
                f"{source.path or source.name}: torch_tensorrt {torch_tensorrt.__version__} refused it: "
                f"{str(error).strip()}.{step}",
                path=str(source.path or source.name),
                log=str(error).splitlines(),
            ) from error

    def _check_parts(self, source: TorchSource, compiled: Any) -> tuple[int, int]:
        """Submodules on TensorRT and in torch, by the names that Torch-TensorRT gives them."""
        names = [name for name, _ in compiled.named_children()]
        parts = sum("_run_on_acc" in name for name in names), sum("_run_on_gpu" in name for name in names)
        if parts[0] == 0 or (parts[1] and not self._settings[2]):
            raise EngineDeserializeError(
                f"{source.path or source.name}: torch_tensorrt made {parts[0]} parts on TensorRT and {parts[1]} in "
                "torch. "
                + (
                    "Nothing runs on TensorRT: choose pytorch_fp16."
                    if parts[0] == 0
                    else "Pass allow_partition=True to accept that."
                ),
                path=str(source.path or source.name),
            )
        return parts

    def save(self, path: Path) -> None:
        """Writes the compiled model as a torch.export program. Raises `EngineBuildError`."""
        import torch_tensorrt

        if self._source is None or self._compile_seconds is None:
            raise EngineBuildError(f"{path}: there is no model that was compiled here to save.", path=str(path))
        temporary = path.with_name(f".{path.name}.tmp.pt2")
        try:
            positional, keywords = arguments_of(self._source, self._example)
            torch_tensorrt.save(
                self._source.model,
                str(temporary),
                output_format="exported_program",
                arg_inputs=positional,
                kwarg_inputs=keywords,
            )
            temporary.replace(path)
        except Exception as error:
            raise EngineBuildError(f"{path}: the compiled model could not be saved: {error}", path=str(path)) from error
        finally:
            temporary.unlink(missing_ok=True)


def _engines(graph: Any) -> int:
    """Engines of TensorRT that a program calls."""
    return sum("tensorrt" in str(node.target) and "engine" in str(node.target) for node in graph.nodes)


def _unpaired() -> list[str]:
    """Where the torch or TensorRT that is installed is not the one that torch_tensorrt was built for."""
    try:
        wanted = importlib.metadata.requires("torch_tensorrt") or []
        mine = importlib.metadata.version("torch_tensorrt")
    except importlib.metadata.PackageNotFoundError:
        return []  # an own build, which says nothing about itself; its import decides
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["the package packaging, which torch_tensorrt needs and by which its versions are compared"]
    lacking = []
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        relevant = name == "torch" or name.startswith("tensorrt")
        if not relevant or (requirement.marker and not requirement.marker.evaluate()):
            continue
        found = version_of(name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            have = "is not installed" if found is None else f"here is {found}"
            lacking.append(
                f"{name} {requirement.specifier}, which torch_tensorrt {mine} is built for ({name} {have}); "
                "install the torch_tensorrt for it"
            )
    return lacking or _other_library(wanted)


def _other_library(wanted: Sequence[str]) -> list[str]:
    """The TensorRT that jetrt has found: two versions of it in one process do not go together."""
    from packaging.requirements import Requirement

    from .. import _core

    try:
        here = str(_core.library_info()["tensorrt"])
    except (LibraryNotFoundError, UnsupportedVersionError, CudaError):
        return []
    for requirement in map(Requirement, wanted):
        about = requirement.name.lower().startswith("tensorrt")
        # The library says 10.3.0.26 where the package that holds it is 10.3.0.
        same = (here, ".".join(here.split(".")[:3]))
        if about and not any(requirement.specifier.contains(version, prereleases=True) for version in same):
            return [
                f"a TensorRT of {requirement.specifier}, which torch_tensorrt is built for, as the only one of the "
                f"process (jetrt uses {here}); set JETRT_TENSORRT_PATH to it"
            ]
    return []
