"""What an ONNX file says about itself, read without the onnx package and without reading a weight (`wire`).

A damaged or hostile file ends in `ModelError`: subgraphs nest at most 64 deep, shapes have at most 64 dimensions, and a
weight in another file must lie in the model's folder, within that file. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .profiles import NetworkInput
from .wire import Damaged, Truncated, Wire

__all__ = ["Digest", "ExternalFile", "Initializer", "OnnxFile", "OnnxNode", "OnnxTensor"]

NEWEST_IR_VERSION = 14
_MAX_DEPTH = 64
_MAX_RANK = 64

# Element types by number (onnx.TensorProto.DataType): jetrt's name and bits for each element; 0 bits: no fixed size.
_TYPES: dict[int, tuple[str, int]] = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    8: ("string", 0),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    17: ("float8_e4m3fn", 8),
    18: ("float8_e4m3fnuz", 8),
    19: ("float8_e5m2", 8),
    20: ("float8_e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4_e2m1", 4),
    24: ("float8_e8m0", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
}
_OTHER_TYPES = {4: "sequence", 5: "map", 8: "sparse tensor", 9: "optional"}  # fields of TypeProto
# Element type of a quantised tensor -> what TensorRT would call the quantisation.
_QUANTIZATION = {
    "int8": "int8",
    "uint8": "int8",
    "int4": "int4",
    "uint4": "int4",
    "int16": "int16",
    "uint16": "int16",
    "float4_e2m1": "fp4",
    **{name: "fp8" for name, _ in _TYPES.values() if name.startswith("float8")},
}
# TensorRT's own operators say in their name what they make.
_TENSORRT_QUANTIZER = re.compile(r"TRT_(?:MX)?(FP8|FP4|INT8|INT4).*[Qq]uantize")


# ---------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class OnnxTensor:
    """An input or output. ``dtype`` is "sequence", "map" or "optional" for what is no tensor."""

    name: str
    dtype: str
    #: -1 is a dynamic dimension; ``None`` where the model does not even say the rank.
    shape: tuple[int, ...] | None
    dimension_names: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Initializer:
    """A weight, without its values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    #: Of its values, wherever they lie.
    bytes: int
    #: Location in the model when the values lie in another file.
    location: str | None = None


@dataclass(frozen=True)
class OnnxNode:
    name: str
    op: str
    #: "" is ONNX's own domain.
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ExternalFile:
    """A file that holds weights of the model."""

    #: As the model names it, relative to the model's folder.
    location: str
    path: Path
    #: End of the last weight in it; the file is at least this long.
    bytes: int
    tensors: int


@dataclass(frozen=True)
class Digest:
    """Hash of a model with all its files."""

    #: Of everything; equal to the hash of the model file when there are no others.
    sha256: str
    #: {"file", "sha256", "bytes"} for the model file first, then for each external file by location.
    files: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class OnnxFile:
    path: Path
    bytes: int
    ir_version: int
    producer: str
    #: Version for each domain; "" is ONNX's own.
    opsets: Mapping[str, int]
    #: Those that a caller gives: without the ones that have an initializer.
    inputs: tuple[OnnxTensor, ...]
    outputs: tuple[OnnxTensor, ...]
    #: Of the main graph, in its order.
    nodes: tuple[OnnxNode, ...]
    #: How often each operator occurs, bodies of If, Loop, Scan and functions included; "domain.Op" outside ONNX's own.
    operators: Mapping[str, int]
    initializers: tuple[Initializer, ...]
    #: What its QuantizeLinear and DequantizeLinear nodes use: of "int8", "int4", "fp8", "fp4", "int16".
    quantization: frozenset[str]
    #: Element types of inputs, outputs, weights, constants and casts.
    dtypes: frozenset[str]
    external: tuple[ExternalFile, ...] = field(default=())

    @property
    def opset(self) -> int | None:
        return self.opsets.get("")

    def network_inputs(self) -> list[NetworkInput]:
        """Its inputs for `profiles.resolve`. Which of them are shape tensors only TensorRT's parser knows."""
        for info in self.inputs:
            if info.shape is None and info.dtype in _OTHER_TYPES.values():
                raise _refused(
                    self.path, f"the input {info.name!r} is of type {info.dtype}; TensorRT takes tensors alone"
                )
            if info.shape is None:
                raise _refused(self.path, f"the input {info.name!r} has no shape; export the model with one")
        return [
            NetworkInput(info.name, info.dtype, info.shape, dimension_names=info.dimension_names)
            for info in self.inputs
            if info.shape is not None
        ]

    def sha256(self) -> Digest:
        """Reads every byte of the model and its external files."""
        files = [(self.path.name, self.path)] + [(entry.location, entry.path) for entry in self.external]
        found = [{"file": name, **_hashed(path)} for name, path in files]
        if len(found) == 1:
            return Digest(found[0]["sha256"], tuple(found))
        # The model file's own name is left out: renaming it changes nothing.
        parts = [["", found[0]["sha256"]], *([entry["file"], entry["sha256"]] for entry in found[1:])]
        return Digest(hashlib.sha256(json.dumps(parts).encode()).hexdigest(), tuple(found))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> OnnxFile:
        """Reads the structure and checks that every external file is there. Raises `ModelError`."""
        path = Path(path)
        try:
            # Opening a pipe would wait for its writer.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise _refused(path, "it is not a regular file")
                if status.st_size == 0:
                    raise _refused(path, "the file is empty")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    return _Reader(path, mapped, status.st_size).model()
        except FileNotFoundError as error:
            raise _refused(path, "there is no such file") from error
        except OSError as error:
            raise _refused(path, f"it cannot be read: {error.strerror or error}") from error


def _refused(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path}: {reason}.", path=str(path))


def _hashed(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise _refused(path, f"it cannot be read: {error.strerror or error}") from error
    return {"sha256": digest.hexdigest(), "bytes": size}


# ----------------------------------------------------------------------------------------------------- ONNX messages


class _Reader(Wire):
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        super().__init__(data, size)
        self.path = path
        self.operators: Counter[str] = Counter()
        self.dtypes: set[str] = set()
        self.initializers: list[Initializer] = []
        self.quantized: set[str] = set()
        self.quantizers: list[tuple[str, tuple[str, ...], tuple[str, ...], list[str]]] = []  # …, types it names itself
        self.typed: dict[str, str] = {}  # name of a weight, constant or annotated tensor -> element type
        self.needed: dict[str, list[int]] = {}  # external location -> [end, tensors]
        self.folder = path.parent

    def model(self) -> OnnxFile:
        try:
            return self._model()
        except Truncated as error:
            raise _refused(self.path, f"it is truncated: {error}. Copy or download it again") from None
        except Damaged as error:
            raise _refused(self.path, f"it is not an ONNX model, or damaged: {error}{self._looks_like()}") from None

    def _looks_like(self) -> str:
        start = self.data[:40]
        if start.startswith(b"ftrt"):
            return " (it is a TensorRT plan)"
        if start.startswith(b"version https://git-lfs"):
            return " (it is a pointer of Git LFS; fetch the file itself with git lfs pull)"
        return ""

    def _model(self) -> OnnxFile:
        message: dict[int, list[Any]] = {}
        try:
            for number, wire, value, stop in self.fields(0, self.size):
                self.count()
                message.setdefault(number, []).append(value if wire == 0 else (value, stop))
        except Truncated:
            # Any text can pass for a field that is too long; a model begins with its IR version.
            if not message or not isinstance(message.get(1, [None])[0], int):
                raise Damaged("it does not begin like one") from None
            raise
        ir_version = self.last_number(message, 1)
        if not isinstance(message.get(1, [None])[0], int) or not message.get(7):
            raise Damaged("it has no IR version or no graph")
        if not 1 <= ir_version <= NEWEST_IR_VERSION:
            raise _refused(
                self.path,
                f"its IR version is {ir_version}; known are 1 to {NEWEST_IR_VERSION}. Export it with an older onnx, or "
                "save it again with model.ir_version set to what TensorRT's parser knows",
            )
        opsets: dict[str, int] = {}
        for span in self.spans(message, 8):
            entry = self.message(*span)
            domain = _domain(self.last_text(entry, 1))
            opsets[domain] = self.last_number(entry, 2)
        if not opsets and ir_version >= 3:
            raise Truncated("it has no opset")
        for span in self.spans(message, 25):
            for number, wire, value, stop in self.fields(*span):
                if number == 7 and wire == 2:
                    self.node(value, stop, 0)
        producer = f"{self.last_text(message, 2)} {self.last_text(message, 3)}".strip()

        inputs, outputs, nodes = self.graph(*list(self.spans(message, 7))[-1], 0)
        if not outputs:
            raise _refused(self.path, "the graph has no outputs")
        weights = {weight.name for weight in self.initializers}
        return OnnxFile(
            self.path,
            self.size,
            ir_version,
            producer,
            opsets,
            tuple(info for info in inputs if info.name not in weights),
            tuple(outputs),
            tuple(nodes),
            self.operators,
            tuple(self.initializers),
            frozenset(self.quantization()),
            frozenset(self.dtypes),
            tuple(self.external()),
        )

    def graph(self, begin: int, end: int, depth: int) -> tuple[list[OnnxTensor], list[OnnxTensor], list[OnnxNode]]:
        if depth > _MAX_DEPTH:
            raise Damaged(f"its subgraphs nest more than {_MAX_DEPTH} deep")
        inputs: list[OnnxTensor] = []
        outputs: list[OnnxTensor] = []
        nodes: list[OnnxNode] = []
        for number, wire, value, stop in self.fields(begin, end):
            self.count()
            if wire != 2:
                continue
            if number == 1:
                nodes.append(self.node(value, stop, depth))
            elif number == 5:
                self.initializers.append(self.tensor(value, stop))
            elif number == 15:
                for span in self.spans(self.message(value, stop), 1):
                    self.initializers.append(self.tensor(*span))
            elif number in (11, 12, 13):
                info = self.value_info(value, stop)
                if number != 13:
                    (inputs if number == 11 else outputs).append(info)
        return inputs, outputs, nodes

    def node(self, begin: int, end: int, depth: int) -> OnnxNode:
        message = self.message(begin, end)
        op, domain = self.last_text(message, 4), _domain(self.last_text(message, 7))
        inputs = tuple(self.text(span) for span in message.get(1, ()))
        outputs = tuple(self.text(span) for span in message.get(2, ()))
        self.operators[f"{domain}.{op}" if domain else op] += 1
        named: list[str] = []
        for span in self.spans(message, 5):
            attribute = self.message(*span)
            name = self.last_text(attribute, 1)
            for graph in (*self.spans(attribute, 6), *self.spans(attribute, 11)):
                self.graph(*graph, depth + 1)
            for tensor in (*self.spans(attribute, 5), *self.spans(attribute, 10)):
                weight = self.tensor(*tensor)
                if op == "Constant" and outputs:
                    self.typed[outputs[0]] = weight.dtype
            if (op, name) in (("Cast", "to"), ("QuantizeLinear", "output_dtype"), ("DequantizeLinear", "output_dtype")):
                named += filter(None, [self.dtype(self.last_number(attribute, 3))])
                self.dtypes.update(named)
        if op in ("QuantizeLinear", "DequantizeLinear"):
            self.quantizers.append((op, inputs, outputs, named))
        elif match := _TENSORRT_QUANTIZER.match(op):
            self.quantized.add(match[1].lower())
        return OnnxNode(self.last_text(message, 3), op, domain, inputs, outputs)

    def dtype(self, number: int) -> str:
        """The name of an element type; "" for none."""
        if number == 0:
            return ""
        return _TYPES[number][0] if number in _TYPES else f"type {number}"

    def tensor(self, begin: int, end: int) -> Initializer:
        message = self.message(begin, end)
        name, number = self.last_text(message, 8), self.last_number(message, 2)
        dtype = self.dtype(number)
        self.dtypes.add(dtype or "undefined")
        self.typed[name] = dtype
        shape = tuple(islice(self.numbers(message, 1), _MAX_RANK + 1))
        elements = math.prod(shape)
        if len(shape) > _MAX_RANK or elements >> 63 or any(size >> 63 for size in shape):
            raise _refused(self.path, f"the weight {name!r} has the impossible shape {list(shape[:8])}")
        bits = _TYPES.get(number, ("", 0))[1]
        expected = (elements * bits + 7) // 8
        if self.last_number(message, 14) == 1:
            return Initializer(name, dtype, shape, expected, self.outside(name, message, expected))
        raw = [stop - start for start, stop in self.spans(message, 9)]
        if raw and bits and raw[-1] != expected:
            raise _refused(self.path, f"the weight {name!r} has {raw[-1]:,} bytes; its shape needs {expected:,}")
        return Initializer(name, dtype, shape, expected)

    def outside(self, name: str, message: Mapping[int, Sequence[Any]], expected: int) -> str:
        """Checks one reference to an external file by its words; `external` looks at the files."""
        entries = {}
        for span in self.spans(message, 13):
            entry = self.message(*span)
            entries[self.last_text(entry, 1)] = self.last_text(entry, 2)
        location = entries.get("location", "")
        parts = Path(location).parts
        if not location or "\0" in location or Path(location).is_absolute() or ".." in parts:
            raise _refused(
                self.path,
                f"the weight {name!r} lies in {location!r}; external data must be a file in the model's own folder",
            )
        numbers = []
        for key, default in (("offset", 0), ("length", expected)):
            text = entries.get(key, "") or str(default)
            if not (text.isascii() and text.isdigit() and len(text) < 20):
                raise _refused(self.path, f"the weight {name!r} has the {key} {text[:40]!r}; it must be a number")
            numbers.append(int(text))
        if numbers[1] < expected:
            raise _refused(
                self.path, f"the weight {name!r} has {numbers[1]:,} bytes in {location!r}; its shape needs {expected:,}"
            )
        need = self.needed.setdefault(location, [0, 0])
        need[0], need[1] = max(need[0], sum(numbers)), need[1] + 1
        return location

    def external(self) -> Iterator[ExternalFile]:
        for location, (end, tensors) in sorted(self.needed.items()):
            path = self.folder / location
            try:
                status = path.stat()
            except OSError as error:
                raise _refused(
                    self.path,
                    f"its weights lie in {location!r}, and {path} cannot be read ({error.strerror or error}). Put that "
                    "file beside the model, under this name",
                ) from error
            if not stat.S_ISREG(status.st_mode):
                raise _refused(self.path, f"its weights lie in {location!r}, which is not a regular file")
            if status.st_size < end:
                raise _refused(
                    self.path,
                    f"its weights need {end:,} bytes of {location!r}, which has {status.st_size:,}. Copy or download "
                    "that file again",
                )
            yield ExternalFile(location, path, end, tensors)

    def value_info(self, begin: int, end: int) -> OnnxTensor:
        message = self.message(begin, end)
        name = self.last_text(message, 1)
        for type_span in self.spans(message, 2):
            kind = self.message(*type_span)
            for tensor_span in self.spans(kind, 1):
                tensor = self.message(*tensor_span)
                dtype = self.dtype(self.last_number(tensor, 1))
                self.dtypes.add(dtype or "undefined")
                self.typed.setdefault(name, dtype)
                shapes = list(self.spans(tensor, 2))
                if not shapes:
                    return OnnxTensor(name, dtype, None)
                dims = [self.dimension(*span) for span in self.spans(self.message(*shapes[-1]), 1)]
                if len(dims) > _MAX_RANK:
                    raise _refused(self.path, f"{name!r} has {len(dims):,} dimensions")
                return OnnxTensor(name, dtype, tuple(size for size, _ in dims), tuple(label for _, label in dims))
            return OnnxTensor(name, next(filter(None, map(_OTHER_TYPES.get, kind)), "undefined"), None)
        return OnnxTensor(name, "undefined", None)

    def dimension(self, begin: int, end: int) -> tuple[int, str | None]:
        message = self.message(begin, end)
        if 1 in message:
            size = self.last_number(message, 1)
            return (size, None) if size >= 0 else (-1, None)
        return -1, self.last_text(message, 2) or None

    def quantization(self) -> set[str]:
        """Which types the quantisers use: named by themselves, else that of the zero point, else of the tensor."""
        made: dict[str, str] = {}
        for op, inputs, outputs, named in self.quantizers:
            zero_point = self.typed.get(inputs[2], "") if len(inputs) > 2 else ""
            if op == "QuantizeLinear":
                dtype = zero_point or (named or ["uint8"])[0]  # uint8 is ONNX's default
                made.update(dict.fromkeys(outputs, dtype))
            else:
                source = inputs[0] if inputs else ""
                dtype = zero_point or made.get(source, "") or self.typed.get(source, "")
            if dtype in _QUANTIZATION:  # a DequantizeLinear of an int32 bias is none
                self.quantized.add(_QUANTIZATION[dtype])
        return self.quantized


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name
