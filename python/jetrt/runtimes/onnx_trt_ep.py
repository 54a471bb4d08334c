"""The runtime "onnx_trt_ep": ONNX files on onnxruntime's TensorRT provider.

onnxruntime falls back in three places without an error, and each is closed here: a provider whose library cannot be
loaded is replaced by the CPU (`enable_fallback=0`, providers compared after creation), nodes that TensorRT does not
take go to other providers (`session.disable_cpu_ep_fallback`, nodes counted), and a cached engine is found again by the
structure of the graph, not by its weights (a cache folder for each ONNX hash and set of options).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from ..builder.onnx_file import OnnxFile
from ..errors import EngineBuildError, EngineDeserializeError
from ..runtime import BuildConfig
from ._build_checks import with_precision
from ._calibration_table import check_table
from ._file import log
from ._host_model import check_policies
from ._opened_runtime import OpenedRuntime
from ._placement import count_nodes, refuse_partition
from ._session_model import SessionModel, described, refuse_plan
from ._trt_provider import PROVIDER, missing, tensorrt_version, version

__all__ = ["OnnxTrtEpRuntime", "OnnxTrtModel"]

_CUDA: Final = "CUDAExecutionProvider"
_CPU: Final = "CPUExecutionProvider"

Precision = Literal["fp32", "fp16", "bf16", "int8"]
_FLAGS: Final[Mapping[str, tuple[str, ...]]] = {
    "fp32": (),
    "fp16": ("trt_fp16_enable",),
    "bf16": ("trt_bf16_enable",),
    "int8": ("trt_int8_enable",),
}
Profile = tuple[str, Sequence[int], Sequence[int], Sequence[int]]


class OnnxTrtEpRuntime(OpenedRuntime):
    """Runs ONNX files on TensorRT by onnxruntime; opening one builds TensorRT's engines into the cache folder where all
    shapes are known. Its options are the keyword arguments of `OnnxTrtModel`."""

    label: ClassVar[str] = "onnx_trt_ep"

    @classmethod
    def missing(cls, options: Mapping[str, Any] | None = None, *, deep: bool = True) -> list[str]:  # noqa: ARG003
        return missing(deep=deep)

    def _opened(self, source: str | os.PathLike[str], config: BuildConfig | None) -> OnnxTrtModel:
        path = Path(source)
        options = with_precision(path, self._options, config, self.label, tuple(_FLAGS))
        if config is not None:
            if config.workspace_mb is not None:
                options["workspace_mb"] = config.workspace_mb
            if config.optimization_profiles:
                options["profiles"] = config.optimization_profiles
        return OnnxTrtModel(path, **options)

    def versions_here(self) -> dict[str, str]:
        tensorrt = tensorrt_version()
        return {"onnxruntime": version(), **({} if tensorrt is None else {"tensorrt": tensorrt})}


class OnnxTrtModel(SessionModel):
    """An ONNX model on onnxruntime's TensorRT provider: ``model(x=array)["y"]``.

    It takes and gives arrays of the host (numpy, torch tensors on the CPU, DLPack); onnxruntime copies them to the GPU
    and back in every call. `placement` says how many nodes of the model run on which provider.
    """

    runtime = "onnx_trt_ep"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: int = 0,
        precision: Precision = "fp32",
        calibration_table: str | os.PathLike[str] | None = None,
        profiles: Sequence[Profile] = (),
        workspace_mb: int | None = None,
        allow_partition: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        on_strided: Literal["error", "copy"] = "error",
        on_dtype: Literal["error", "cast"] = "error",
    ) -> None:
        """`precision` is what TensorRT may compute in. "int8" needs a model with QuantizeLinear nodes, or
        `calibration_table`, the cache that `jetrt build` wrote for this very model. `profiles` are (input, min, opt,
        max). With `allow_partition` nodes that TensorRT does not take run on CUDA and the CPU; otherwise one is
        an error. Engines are cached below `cache_dir`, by default in ``~/.cache/jetrt/onnx_trt_ep``."""
        check_policies(on_strided, on_dtype)
        started = time.perf_counter()
        file = Path(path)
        refuse_plan(file, self.runtime)
        wanted = _Wanted(
            device,
            precision,
            _table(file, precision, calibration_table),
            _dynamic(file, profiles),
            workspace_mb,
            allow_partition,
        )
        cache = _cache_folder(file, wanted, cache_dir)
        session = _open_session(file, wanted, cache)
        inputs, outputs = described(file, self.runtime, session)
        self._placement = placement = count_nodes(session, inputs, {name: opt for name, _, opt, _ in wanted.profiles})
        if not allow_partition:
            refuse_partition(file, placement)
        report = {
            "seconds": time.perf_counter() - started,
            "placement": dict(placement.nodes),
            "placement_from": placement.source,
            "cache": str(cache),
        }
        super().__init__(file, session, inputs, outputs, report, on_strided=on_strided, on_dtype=on_dtype)
        log.info(
            "onnx_trt_ep %s: %s",
            file,
            placement,
            extra={"event": "placement", "fields": {"model": str(file), **report}},
        )

    @property
    def placement(self) -> dict[str, int]:
        """Nodes for each provider; empty where onnxruntime did not say, which only `allow_partition` lets pass."""
        return dict(self._placement.nodes)


@dataclass(frozen=True)
class _Wanted:
    device: int
    precision: Precision
    table: Path | None
    profiles: tuple[Profile, ...]
    workspace_mb: int | None
    allow_partition: bool


# ----------------------------------------------------------------------------------------- precision, cache


def _dynamic(path: Path, profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """The profiles without those of inputs that have one shape anyway; another shape than that is refused."""
    fixed = {info.name: info.shape for info in OnnxFile.open(path).inputs if info.shape and -1 not in info.shape}
    kept = []
    for name, *ranges in profiles:
        if name not in fixed:
            kept.append((name, *ranges))
        elif any(tuple(shape) != fixed[name] for shape in ranges):
            shown = ", ".join(str(list(shape)) for shape in ranges)
            raise EngineBuildError(
                f"{path}: the profile of {name!r} has the shapes {shown}, and the input is always {list(fixed[name])}. "
                "Leave the profile out, or export the model with that dimension dynamic.",
                path=str(path),
            )
    return tuple(kept)  # type: ignore[arg-type]


def _table(path: Path, precision: str, given: str | os.PathLike[str] | None) -> Path | None:
    """The calibration table; int8 without scales is refused, since TensorRT would take what it finds."""
    if precision not in _FLAGS:
        raise EngineBuildError(
            f"{path}: precision is {precision!r}; onnx_trt_ep has {', '.join(_FLAGS)}.", path=str(path)
        )
    if given is not None:
        table = Path(given)
        if precision != "int8":
            raise EngineBuildError(
                f"{path}: calibration_table is given and precision is {precision!r}. A table is for int8: leave it "
                'out, or ask for precision="int8".',
                path=str(path),
            )
        check_table(table, path, tensorrt_version())
        return table
    if precision == "int8" and "int8" not in OnnxFile.open(path).quantization:
        raise EngineBuildError(
            f"{path}: int8 was asked for, the model has no QuantizeLinear nodes, and there is no calibration_table. "
            "onnxruntime calibrates nothing by itself: give the cache of a `jetrt build` of it, quantise the "
            'model explicitly, or build it with the runtime "tensorrt", which calibrates from data.',
            path=str(path),
        )
    return None


def _cache_folder(path: Path, wanted: _Wanted, given: str | os.PathLike[str] | None) -> Path:
    """A folder of its own for each model (with its external data), set of options, GPU number and pair of versions."""
    if given is None:
        home = os.environ.get("XDG_CACHE_HOME", "")
        top = (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "jetrt" / "onnx_trt_ep"
    else:
        top = Path(given)
    table = "" if wanted.table is None else hashlib.sha256(wanted.table.read_bytes()).hexdigest()
    parts = [
        wanted.device,
        wanted.precision,
        table,
        [[name, *map(list, shapes)] for name, *shapes in wanted.profiles],
        wanted.workspace_mb,
        wanted.allow_partition,
        version(),
        tensorrt_version(),
    ]
    options = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    folder = top / OnnxFile.open(path).sha256().sha256 / options[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineBuildError(
            f"{path}: the cache folder {folder} cannot be made ({error.strerror or error}). Give another cache_dir.",
            path=str(path),
        ) from error
    if wanted.table is not None:  # the provider looks for it there, by its bare name
        shutil.copyfile(wanted.table, folder / wanted.table.name)
    return folder


def _provider_options(wanted: _Wanted, cache: Path) -> dict[str, str]:
    options = {
        "device_id": str(wanted.device),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
        **dict.fromkeys(_FLAGS[wanted.precision], "True"),
    }
    if wanted.table is not None:
        options["trt_int8_calibration_table_name"] = wanted.table.name
        options["trt_int8_use_native_calibration_table"] = "True"
    if wanted.workspace_mb is not None:
        options["trt_max_workspace_size"] = str(wanted.workspace_mb << 20)
    for index, bound in enumerate(("min", "opt", "max")):
        if wanted.profiles:
            shapes = [f"{name}:{'x'.join(map(str, ranges[index]))}" for name, *ranges in wanted.profiles]
            options[f"trt_profile_{bound}_shapes"] = ",".join(shapes)
    return options


def _open_session(path: Path, wanted: _Wanted, cache: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # what fails is raised; the rest would go to stderr past Python's logging
    if hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    else:  # before 1.24: the profile of one call will say where the nodes are
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(tempfile.mkdtemp(prefix="jetrt-ort-")) / "placement")
    providers: list[Any] = [(PROVIDER, _provider_options(wanted, cache))]
    if wanted.allow_partition:
        providers += [(_CUDA, {"device_id": str(wanted.device)}), _CPU]
    else:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's classes have no common base
        if options.enable_profiling:
            shutil.rmtree(Path(options.profile_file_prefix).parent, ignore_errors=True)
        text = str(error)
        step = ""
        if "fallback to CPU EP has been explicitly disabled" in text:
            step = (
                " TensorRT does not take every node of the model. Pass allow_partition=True to run the rest elsewhere, "
                "which costs copies, or change the model."
            )
        raise EngineDeserializeError(
            f"{path} was refused by onnxruntime {onnxruntime.__version__} with {PROVIDER}: {text.strip()}{step}",
            path=str(path),
            log=text.splitlines(),
        ) from error
    # Several versions only warn when a provider cannot be made, and go on without it.
    found = list(session.get_providers())
    if not found or found[0] != PROVIDER:
        raise EngineDeserializeError(
            f"{path}: onnxruntime {onnxruntime.__version__} made a session without {PROVIDER} (it has "
            f"{', '.join(found) or 'none'}): the provider could not be loaded. Its own message is on stderr.",
            path=str(path),
        )
    return session
