"""Stand in where callers of the drop-ins look at `tensorrt` objects: the engine, its context, and two enumerations.

They tell what an engine has; what would bind or run something is not there, since jetrt does that itself.
"""

from __future__ import annotations

import enum
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from . import _core

_log = logging.getLogger("jetrt")


class DataType(enum.IntEnum):
    """As `tensorrt.DataType`, by name and number."""

    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8
    INT4 = 9
    FP4 = 10
    E8M0 = 11


class TensorIOMode(enum.IntEnum):
    """As `tensorrt.TensorIOMode`."""

    NONE = 0
    INPUT = 1
    OUTPUT = 2


DTYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "bfloat16": DataType.BF16,
    "int8": DataType.INT8,
    "int32": DataType.INT32,
    "int64": DataType.INT64,
    "uint8": DataType.UINT8,
    "bool": DataType.BOOL,
    "float8_e4m3fn": DataType.FP8,
    "int4": DataType.INT4,
    "float4_e2m1fn": DataType.FP4,
    "float8_e8m0fnu": DataType.E8M0,
}


def _as_tensorrt(value: DataType | TensorIOMode) -> Any:
    """The constant of NVIDIA's package where that is imported: its enumerations equal nothing but themselves."""
    enumeration = getattr(sys.modules.get("tensorrt"), type(value).__name__, None)
    return getattr(enumeration, value.name, value)


class EngineLookAlike:
    """As `tensorrt.ICudaEngine`, for looking: names (inputs first), shapes, dtypes, modes and profiles. An unknown name
    raises KeyError."""

    def __init__(self, core: _core.Engine) -> None:
        self.name = core.name
        self.num_optimization_profiles = core.num_profiles
        self.device_memory_size = self.device_memory_size_v2 = core.device_memory_size
        self._tensors = {**core.inputs, **core.outputs}
        self._names = list(self._tensors)

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, index: int) -> str:
        return self._names[index]

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """-1 where a dimension is dynamic."""
        return self._tensor(name).shape

    def get_tensor_dtype(self, name: str) -> Any:
        return _as_tensorrt(DTYPES[self._tensor(name).dtype])

    def get_tensor_mode(self, name: str) -> Any:
        found = self._tensors.get(name)
        if found is None:
            return _as_tensorrt(TensorIOMode.NONE)
        return _as_tensorrt(TensorIOMode.INPUT if found.mode == "input" else TensorIOMode.OUTPUT)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        """[min, opt, max] of an input; [] for an output."""
        profiles = self._tensor(name).profiles
        return list(profiles[profile_index]) if profiles else []

    def _tensor(self, name: str) -> _core.TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{name!r}: no input or output of that name; there are {', '.join(self._names)}") from None


class ContextLookAlike:
    """As `tensorrt.IExecutionContext`, for the shapes that the next call is to have."""

    def __init__(self, engine: EngineLookAlike) -> None:
        self.engine = engine
        #: Why the last shape of an input was refused, by name.
        self.refused: dict[str, str] = {}
        #: Of every input and output, as `get_tensor_shape` tells them.
        self.shapes = {name: engine.get_tensor_shape(name) for name in engine}

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """-1 where a dimension is not set yet, or an output's depends on such a one."""
        self.engine._tensor(name)
        return self.shapes[name]

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """False, with a line in the log of `jetrt`, where the engine does not take this shape; then nothing changes."""
        wanted = tuple(int(d) for d in shape)
        why = self._refusal(name, wanted)
        if why is not None:
            self.refused[name] = why
            _log.error("set_input_shape: input %r: %s", name, why)
            return False
        self.refused.pop(name, None)
        self.shapes[name] = wanted
        return True

    @property
    def all_binding_shapes_specified(self) -> bool:
        inputs = (n for n in self.engine if self.engine.get_tensor_profile_shape(n, 0))
        return all(d >= 0 for name in inputs for d in self.shapes[name])

    def _refusal(self, name: str, wanted: tuple[int, ...]) -> str | None:
        profiles = [
            self.engine.get_tensor_profile_shape(name, i)
            for i in range(self.engine.num_optimization_profiles)
            if name in self.shapes
        ]
        if not profiles or not profiles[0]:
            inputs = [n for n in self.engine if self.engine.get_tensor_profile_shape(n, 0)]
            return f"found no such input; allowed: {', '.join(inputs)}"

        def fits(low: Sequence[int], high: Sequence[int]) -> bool:
            return len(low) == len(wanted) and all(a <= d <= b for a, d, b in zip(low, wanted, high, strict=True))

        if any(fits(low, high) for low, _, high in profiles):
            return None
        ranges = " or ".join(f"{list(low)} to {list(high)}" for low, _, high in profiles)
        return f"found {list(wanted)}; allowed: {ranges}"
