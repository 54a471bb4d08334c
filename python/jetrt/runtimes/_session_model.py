"""A model in an onnxruntime session, whatever provider computes it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from ..errors import EngineDeserializeError, InferenceError, JetrtError, OutOfMemoryError
from ._host_model import TYPES, ElementType, HostModel, HostTensorInfo

if TYPE_CHECKING:
    Array = npt.NDArray[Any]

_ONNXRUNTIME_NAMES = {"float32": "float", "float64": "double"}

#: Element types by onnxruntime's names.
SESSION_TYPES = {f"tensor({_ONNXRUNTIME_NAMES.get(name, name)})": kind for name, kind in TYPES.items()}


class SessionModel(HostModel):
    """`HostModel` over an `onnxruntime.InferenceSession`; the session is bound to memory of the host."""

    def _execute(
        self, session: Any, held: Mapping[str, Array], targets: Mapping[str, Array], bound: list[str]
    ) -> dict[str, Array]:
        import onnxruntime

        def value(name: str, array: Array) -> Any:
            kind = TYPES[self._inputs[name].dtype]
            if kind.native:
                return onnxruntime.OrtValue.ortvalue_from_numpy(array)
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind.code)

        try:
            binding = session.io_binding()
            for name, array in held.items():
                binding.bind_ortvalue_input(name, value(name, array))
            for name, info in self._outputs.items():
                if name in targets:
                    kind = TYPES[info.dtype]
                    element: Any = kind.storage.type if kind.native else kind.code
                    array = targets[name]
                    binding.bind_output(name, "cpu", 0, element, list(array.shape), array.ctypes.data)
                else:
                    binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
            values = binding.get_outputs()
        except JetrtError:
            raise
        except Exception as error:  # onnxruntime's classes have no common base
            text = str(error).strip().rstrip(".")
            if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
                raise OutOfMemoryError(f"{self.name}: {text}. Bound: {', '.join(bound)}.") from error
            raise InferenceError(
                f"{self.name}: onnxruntime failed: {text}. Bound: {', '.join(bound)}.",
                engine=self.name,
                bound=bound,
                log=text.splitlines(),
            ) from error
        return {
            name: array_of(value, TYPES[info.dtype])
            for (name, info), value in zip(self._outputs.items(), values, strict=True)
        }


_NO_MEMORY = ("bad_alloc", "Failed to allocate memory", "out of memory")


def array_of(value: Any, kind: ElementType) -> Array:
    """An OrtValue on the host as an array."""
    if kind.native:
        return cast("Array", value.numpy())
    # onnxruntime has no numpy form of this type: a view of its memory that keeps the value alive.
    shape = value.shape()
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, kind.storage)
    memory: Any = (ctypes.c_char * (count * kind.storage.itemsize)).from_address(value.data_ptr())
    memory._owner = value
    array: Array = np.frombuffer(memory, kind.storage).reshape(shape)
    return array


def describer(path: Path, runtime: str, mode: Literal["input", "output"]) -> Callable[[Any], HostTensorInfo]:
    """Turns a node argument of a session into a description; a type that is no plain tensor is refused."""

    def describe(node: Any) -> HostTensorInfo:
        kind = SESSION_TYPES.get(node.type)
        if kind is None:
            raise EngineDeserializeError(
                f"{path}: {mode} {node.name!r} is a {node.type}; {runtime} handles tensors of "
                f"{', '.join(TYPES)}. Export the model with one of these.",
                path=str(path),
            )
        shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in node.shape)
        return HostTensorInfo(node.name, kind.name, shape, mode)

    return describe


def described(path: Path, runtime: str, session: Any) -> tuple[dict[str, HostTensorInfo], dict[str, HostTensorInfo]]:
    """Inputs and outputs of a session."""
    inputs = {t.name: t for t in map(describer(path, runtime, "input"), session.get_inputs())}
    outputs = {t.name: t for t in map(describer(path, runtime, "output"), session.get_outputs())}
    return inputs, outputs


def refuse_plan(path: Path, runtime: str) -> None:
    """A missing file is a FileNotFoundError, as it is for `jetrt.Engine`; a plan is no ONNX file."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"ftrt":
        raise EngineDeserializeError(
            f'{path} is a TensorRT plan; {runtime} runs ONNX files. Load it with runtime="tensorrt".', path=str(path)
        )
