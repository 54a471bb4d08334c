"""The runtime "onnx_cpu": ONNX files on the CPU by onnxruntime (`pip install jetrt[cpu]`). It needs no GPU.

`OnnxModel` has the call shape, the checks and the error classes of `jetrt.Engine`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import EngineDeserializeError, RuntimeNotAvailableError
from ..runtime import BuildConfig
from ._build_checks import refuse_precision
from ._host_model import check_policies
from ._opened_runtime import OpenedRuntime
from ._packages import broken
from ._session_model import SESSION_TYPES as _TYPES
from ._session_model import SessionModel, described, refuse_plan
from ._session_model import array_of as _array_of

if TYPE_CHECKING:
    import os

__all__ = ["_TYPES", "OnnxCpuRuntime", "OnnxModel", "_array_of"]


class OnnxCpuRuntime(OpenedRuntime):
    """Runs ONNX files as they are. Its options are the keyword arguments of `OnnxModel`."""

    label: ClassVar[str] = "onnx_cpu"

    @classmethod
    def missing(cls, options: Mapping[str, Any] | None = None, *, deep: bool = True) -> list[str]:  # noqa: ARG003
        return broken("onnxruntime", "pip install 'jetrt[cpu]'", deep=deep)

    def _opened(self, source: str | os.PathLike[str], config: BuildConfig | None) -> OnnxModel:
        # The model stays as it is, so that another precision or calibration is refused.
        if config is not None:
            refuse_precision(str(source), config, self.label, ("fp32",))
        return OnnxModel(source, **self._options)

    def versions_here(self) -> dict[str, str]:
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}


class OnnxModel(SessionModel):
    """An ONNX model on the CPU: ``model(x=array)["y"]``.

    It takes numpy arrays, torch tensors and anything on the CPU with ``__dlpack__`` or ``__array__``, by name or in the
    model's order, and answers in the array library of the first input. A call is finished when it returns. Several
    threads may call at once.
    """

    runtime = "onnx_cpu"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        on_strided: Literal["error", "copy"] = "error",
        on_dtype: Literal["error", "cast"] = "error",
    ) -> None:
        """`threads` of one operator (onnxruntime's own choice if left out). `on_strided` and `on_dtype` say whether an
        input that is not contiguous, or of another type, is refused or converted; `stats` counts conversions."""
        check_policies(on_strided, on_dtype)
        started = time.perf_counter()
        file = Path(path)
        session = _open_session(file, threads)
        inputs, outputs = described(file, self.runtime, session)
        report = {"seconds": time.perf_counter() - started}
        super().__init__(file, session, inputs, outputs, report, on_strided=on_strided, on_dtype=on_dtype)


def _open_session(path: Path, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeNotAvailableError(
            f"onnx_cpu needs the package onnxruntime: pip install 'jetrt[cpu]' ({error}).",
            runtime="onnx_cpu",
            missing=["onnxruntime"],
        ) from error

    refuse_plan(path, "onnx_cpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # what fails is raised; the rest would go to stderr past Python's logging
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes have no common base
        raise EngineDeserializeError(
            f"{path} was refused by onnxruntime {onnxruntime.__version__}: {error}",
            path=str(path),
            log=str(error).splitlines(),
        ) from error
