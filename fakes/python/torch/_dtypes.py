"""dtype, device, Size, finfo and iinfo, and the rules of type promotion."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np

BOOL, INTEGER, FLOAT, COMPLEX = range(4)


class dtype:  # noqa: N801 - torch's name
    """One object for each type; compared by identity."""

    def __init__(self, name: str, code: int, itemsize: int, category: int, numpy: str | None) -> None:
        self.name, self.code, self.itemsize, self.category, self.numpy = name, code, itemsize, category, numpy

    @property
    def is_floating_point(self) -> bool:
        return self.category == FLOAT

    @property
    def is_complex(self) -> bool:
        return self.category == COMPLEX

    @property
    def is_signed(self) -> bool:
        return not (self.category == BOOL or self.name.startswith("uint"))

    def __repr__(self) -> str:
        return f"torch.{self.name}"

    def __reduce__(self) -> str:
        return self.name

    def __copy__(self) -> dtype:
        return self

    def __deepcopy__(self, memo: Any) -> dtype:
        return self


dtype.__module__ = "torch"

# The codes are those of kernels.c; -1: no kernel computes with it.
float32 = dtype("float32", 0, 4, FLOAT, "f4")
float64 = dtype("float64", 1, 8, FLOAT, "f8")
float16 = dtype("float16", 2, 2, FLOAT, "f2")
bfloat16 = dtype("bfloat16", 3, 2, FLOAT, None)
int8 = dtype("int8", 4, 1, INTEGER, "i1")
int16 = dtype("int16", 5, 2, INTEGER, "i2")
int32 = dtype("int32", 6, 4, INTEGER, "i4")
int64 = dtype("int64", 7, 8, INTEGER, "i8")
uint8 = dtype("uint8", 8, 1, INTEGER, "u1")
bool_ = dtype("bool", 9, 1, BOOL, "?")
uint16 = dtype("uint16", 10, 2, INTEGER, "u2")
uint32 = dtype("uint32", 11, 4, INTEGER, "u4")
uint64 = dtype("uint64", 12, 8, INTEGER, "u8")
float8_e4m3fn = dtype("float8_e4m3fn", -1, 1, FLOAT, None)
float8_e5m2 = dtype("float8_e5m2", -1, 1, FLOAT, None)
complex64 = dtype("complex64", -1, 8, COMPLEX, "c8")
ALL = (
    *(float32, float64, float16, bfloat16, int8, int16, int32, int64, uint8, bool_, uint16, uint32, uint64),
    *(float8_e4m3fn, float8_e5m2, complex64),
)
LABELS = {
    float32: "Float",
    float64: "Double",
    float16: "Half",
    bfloat16: "BFloat16",
    int8: "Char",
    int16: "Short",
    int32: "Int",
    int64: "Long",
    uint8: "Byte",
    bool_: "Bool",
}


def of_numpy(found: Any) -> dtype:
    found = np.dtype(found)
    for d in ALL:
        if d.numpy is not None and found == np.dtype(d.numpy):
            return d
    raise TypeError(f"can't convert np.ndarray of type {found}.")


def promote(a: dtype, b: dtype) -> dtype:
    """Of two tensors that count alike."""
    if a is b:
        return a
    if COMPLEX in (a.category, b.category) or -1 in (a.code, b.code):
        raise NotImplementedError(f"stand-in torch: promotion of {a} and {b}")
    if a.category != b.category:
        return a if a.category > b.category else b
    if a.category == FLOAT:
        if a.itemsize != b.itemsize:
            return a if a.itemsize > b.itemsize else b
        return float32  # float16 with bfloat16
    if a.is_signed == b.is_signed:
        return a if a.itemsize > b.itemsize else b
    signed, unsigned = (a, b) if a.is_signed else (b, a)
    if unsigned is not uint8:
        raise NotImplementedError(f"stand-in torch: promotion of {a} and {b}")
    return int16 if signed is int8 else signed


def _over(higher: dtype | None, lower: dtype | None) -> dtype | None:
    if higher is None or lower is None:
        return higher or lower
    if higher.category >= lower.category:
        return higher
    return promote(higher, lower) if higher.category != INTEGER else lower


def of_operands(tensors: list[tuple[dtype, int]], numbers: list[Any], default: dtype) -> dtype:
    """`tensors`: (dtype, rank). Tensors with dimensions count before those without, and those before Python numbers."""
    found: list[dtype | None] = [None, None, None]
    for d, rank in tensors:
        k = 0 if rank else 1
        found[k] = d if found[k] is None else promote(found[k], d)  # type: ignore[arg-type]
    for n in numbers:
        d = bool_ if isinstance(n, bool) else int64 if isinstance(n, int) else default
        found[2] = d if found[2] is None else promote(found[2], d)
    result = _over(found[0], _over(found[1], found[2]))
    assert result is not None
    return result


class Size(tuple):  # type: ignore[type-arg]
    __slots__ = ()

    def numel(self) -> int:
        n = 1
        for d in self:
            n *= d
        return n

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Size(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> Size:
        return Size(tuple(self) + tuple(other))

    def __repr__(self) -> str:
        return f"torch.Size({list(self)})"


Size.__module__ = "torch"


class device:  # noqa: N801 - torch's name
    type: str
    index: int | None

    def __init__(self, kind: Any = None, index: int | None = None) -> None:
        if isinstance(kind, device):
            self.type, self.index = kind.type, kind.index
            return
        if isinstance(kind, int) and not isinstance(kind, bool):
            self.type, self.index = "cuda", kind
            return
        if not isinstance(kind, str):
            raise TypeError(f"device(): argument 'type' must be str, not {type(kind).__name__}")
        found = re.fullmatch(r"([a-z]+)(?::(\d+))?", kind)
        if found is None or found[1] not in ("cpu", "cuda", "meta"):
            raise RuntimeError(f"Invalid device string: '{kind}'")
        self.type = found[1]
        self.index = int(found[2]) if found[2] is not None else index

    def __repr__(self) -> str:
        return (
            f"device(type='{self.type}')" if self.index is None else f"device(type='{self.type}', index={self.index})"
        )

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, device) and (self.type, self.index) == (other.type, other.index)

    def __hash__(self) -> int:
        return hash((self.type, self.index))

    def __enter__(self) -> device:
        raise NotImplementedError("stand-in torch: `with torch.device(…)`")

    def __reduce__(self) -> Any:
        return device, (str(self),)


device.__module__ = "torch"


class finfo:  # noqa: N801 - torch's name
    _BITS: ClassVar = {float32: (23, 8), float64: (52, 11), float16: (10, 5), bfloat16: (7, 8)}

    def __init__(self, of: dtype = float32) -> None:
        if of not in self._BITS:
            raise TypeError(f"torch.finfo() requires a floating point input type. Use torch.iinfo to handle '{of}'")
        fraction, exponent = self._BITS[of]
        bias = 2 ** (exponent - 1) - 1
        self.dtype, self.bits = of.name, of.itemsize * 8
        self.eps = 2.0**-fraction
        self.max = (2 - 2.0**-fraction) * 2.0**bias
        self.min = -self.max
        self.tiny = self.smallest_normal = 2.0 ** (1 - bias)


class iinfo:  # noqa: N801 - torch's name
    def __init__(self, of: dtype) -> None:
        if of.category != INTEGER:
            raise TypeError(f"torch.iinfo() requires an integer input type. Use torch.finfo to handle '{of}'")
        self.dtype, self.bits = of.name, of.itemsize * 8
        self.max = 2 ** (self.bits - of.is_signed) - 1
        self.min = -(2 ** (self.bits - 1)) if of.is_signed else 0
