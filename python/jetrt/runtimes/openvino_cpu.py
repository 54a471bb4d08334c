"""The runtime "openvino_cpu": ONNX files and OpenVINO's own on the CPU (`pip install openvino`). It needs no GPU."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt

from ..errors import EngineDeserializeError, InferenceError, OutOfMemoryError
from ..runtime import BuildConfig
from ._build_checks import with_precision
from ._host_model import TYPES, HostModel, HostTensorInfo, check_policies
from ._opened_runtime import OpenedRuntime
from ._packages import broken
from ._session_model import refuse_plan

if TYPE_CHECKING:
    import os

    Array = npt.NDArray[Any]

#: What OpenVINO may compute in. Left alone it takes bfloat16 on a CPU that is faster with it, in silence.
_HINTS: Final = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}

_NAMES: Final = {
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)},
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "bf16": "bfloat16",
    "boolean": "bool",
}


class OpenvinoCpuRuntime(OpenedRuntime):
    """Runs ONNX files and OpenVINO's .xml on the CPU; each is compiled when it is opened. Its options are the keyword
    arguments of `OpenvinoModel`."""

    label: ClassVar[str] = "openvino_cpu"

    @classmethod
    def missing(cls, options: Mapping[str, Any] | None = None, *, deep: bool = True) -> list[str]:  # noqa: ARG003
        return broken("openvino", "pip install openvino", deep=deep)

    def _opened(self, source: str | os.PathLike[str], config: BuildConfig | None) -> OpenvinoModel:
        options = with_precision(str(source), self._options, config, self.label, tuple(_HINTS))
        return OpenvinoModel(source, **options)

    def versions_here(self) -> dict[str, str]:
        import openvino

        return {"openvino": str(openvino.__version__)}


class OpenvinoModel(HostModel):
    """A model on the CPU by OpenVINO: ``model(x=array)["y"]``. Several threads may call at once."""

    runtime = "openvino_cpu"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        precision: Literal["fp32", "fp16", "bf16"] = "fp32",
        on_strided: Literal["error", "copy"] = "error",
        on_dtype: Literal["error", "cast"] = "error",
    ) -> None:
        """`threads` for all calls together (OpenVINO's own choice if left out); `precision` is what it may compute in,
        where the CPU can: elsewhere OpenVINO computes in fp32, and `load_report["precision"]` says so."""
        import openvino

        check_policies(on_strided, on_dtype)
        started = time.perf_counter()
        file = Path(path)
        refuse_plan(file, self.runtime)
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)
        except Exception as error:  # OpenVINO raises RuntimeError and its own classes
            raise EngineDeserializeError(
                f"{file} was refused by openvino {openvino.__version__}: {str(error).strip()}",
                path=str(file),
                log=str(error).splitlines(),
            ) from error
        devices = list(compiled.get_property("EXECUTION_DEVICES"))
        if devices != ["CPU"]:
            raise EngineDeserializeError(
                f"{file}: OpenVINO runs it on {', '.join(devices)} and not on the CPU, which was asked for.",
                path=str(file),
            )
        inputs = {t.name: t for t in (_describe(file, port, "input") for port in compiled.inputs)}
        outputs = {t.name: t for t in (_describe(file, port, "output") for port in compiled.outputs)}
        computes_in = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        report = {"seconds": time.perf_counter() - started, "precision": computes_in}
        super().__init__(file, compiled, inputs, outputs, report, on_strided=on_strided, on_dtype=on_dtype)
        # One request serves one call at a time; those that are idle wait here.
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def _execute(
        self, session: Any, held: Mapping[str, Array], targets: Mapping[str, Array], bound: list[str]
    ) -> dict[str, Array]:
        import openvino

        try:
            try:
                request = self._idle.get_nowait()
            except queue.Empty:
                request = session.create_infer_request()
            for index, (name, array) in enumerate(held.items()):
                kind = TYPES[self._inputs[name].dtype]
                tensor = (
                    openvino.Tensor(array, shared_memory=True)
                    if kind.native
                    else openvino.Tensor(array, array.shape, openvino.Type.bf16)
                )
                request.set_input_tensor(index, tensor)
            request.infer()
            results = {}
            for index, (name, info) in enumerate(self._outputs.items()):
                tensor = request.get_output_tensor(index)
                # The request's memory is used again by the next call.
                array = np.array(tensor.data).view(TYPES[info.dtype].storage).reshape(tuple(tensor.shape))
                if name in targets:
                    if targets[name].shape != array.shape:
                        raise ValueError(f"output {name!r} is {array.shape}, out= has {targets[name].shape}")
                    targets[name][...] = array
                results[name] = array
            self._idle.put(request)
        except Exception as error:
            text = str(error).strip().rstrip(".")
            if isinstance(error, MemoryError) or "bad_alloc" in text:
                raise OutOfMemoryError(f"{self.name}: {text}. Bound: {', '.join(bound)}.") from error
            raise InferenceError(
                f"{self.name}: OpenVINO failed: {text}. Bound: {', '.join(bound)}.",
                engine=self.name,
                bound=bound,
                log=text.splitlines(),
            ) from error
        return results


def _describe(path: Path, port: Any, mode: Literal["input", "output"]) -> HostTensorInfo:
    name, kind = port.get_any_name(), port.get_element_type().get_type_name()
    if kind not in _NAMES:
        raise EngineDeserializeError(
            f"{path}: {mode} {name!r} is of OpenVINO's type {kind}; openvino_cpu handles tensors of "
            f"{', '.join(TYPES)}. Export the model with one of these.",
            path=str(path),
        )
    shape = port.get_partial_shape()
    if shape.rank.is_dynamic:
        raise EngineDeserializeError(
            f"{path}: {mode} {name!r} has no fixed rank. Export the model with one.", path=str(path)
        )
    sizes = tuple(-1 if size.is_dynamic else size.get_length() for size in shape)
    return HostTensorInfo(name, _NAMES[kind], sizes, mode)
