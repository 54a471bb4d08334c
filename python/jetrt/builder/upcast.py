"""A copy of an ONNX model with every bfloat16 in float32, for onnxruntime, which computes in no bfloat16 on the CPU.

Only the structure is held in memory; data in files are read and written in pieces. Needs the package `onnx`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["upcast", "uses_bfloat16"]

_BFLOAT16, _FLOAT = 16, 1  # of ONNX's TensorProto.DataType
#: Attributes that hold a TensorProto.DataType, of all operators up to opset 28.
_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision", "precision"}
_CHUNK = 1 << 24
_INLINE = 1 << 10  # bytes; larger initializers go to the data file, as a protobuf message ends at 2 GB


def _parts(message: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every message inside with the name of its field: graphs of branches and loops, functions, attributes, types.
    Tensors are not entered."""
    yield where, message
    if message.DESCRIPTOR.name == "TensorProto":
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                yield from _parts(child, descriptor.name)


def uses_bfloat16(path: Path) -> bool:
    try:
        import onnx
    except ImportError:
        return False  # the message of onnxruntime has to do
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # protobuf's DecodeError, OSError: onnxruntime's own complaint is the better one
        return False
    return any(_narrow(part) for _, part in _parts(model))


def _narrow(part: Any) -> bool:
    """Whether this message itself says bfloat16."""
    name = part.DESCRIPTOR.name
    if name == "TensorProto":
        return bool(part.data_type == _BFLOAT16)
    if name == "AttributeProto":
        return part.name in _TYPE_ATTRIBUTES and part.i == _BFLOAT16
    return name in ("Tensor", "SparseTensor") and part.elem_type == _BFLOAT16


def upcast(onnx: Any, path: Path, folder: Path) -> tuple[Path, tuple[frozenset[str], frozenset[str]]]:
    """Writes the copy into `folder`. Gives its path, and the names of inputs and outputs that were bfloat16."""
    model = onnx.load(str(path), load_external_data=False)

    def narrow(values: Any) -> frozenset[str]:
        return frozenset(v.name for v in values if v.type.tensor_type.elem_type == _BFLOAT16)

    names = narrow(model.graph.input), narrow(model.graph.output)
    with (folder / "upcast.data").open("wb") as sink:
        for field_name, part in _parts(model):
            kind = part.DESCRIPTOR.name
            if kind == "NodeProto" and part.op_type == "BitCast" and not part.domain:
                raise ValueError(f"node {part.name!r} is a BitCast, whose bits a wider type would change")
            if kind == "TensorProto":
                _move(part, path.parent, sink, field_name == "initializer")
            elif _narrow(part):
                if kind == "AttributeProto":
                    part.i = _FLOAT
                else:
                    part.elem_type = _FLOAT
    copy = folder / "upcast.onnx"
    copy.write_bytes(model.SerializeToString())
    return copy, names


def _move(tensor: Any, folder: Path, sink: BinaryIO, is_initializer: bool) -> None:
    """Turns a bfloat16 tensor into float32; data that lie in a file go to the file of the copy."""
    narrow = tensor.data_type == _BFLOAT16
    external = bool(tensor.external_data)
    if not narrow and not external:
        return
    if external:
        chunks = _external(tensor, folder)
    elif tensor.raw_data:
        chunks = iter([tensor.raw_data])
    else:
        chunks = iter([np.array(tensor.int32_data, np.uint16).tobytes()])
    if narrow:
        chunks = ((np.frombuffer(chunk, "<u2").astype("<u4") << np.uint32(16)).tobytes() for chunk in chunks)
    tensor.data_type = _FLOAT if narrow else tensor.data_type
    count = int(np.prod(tensor.dims, dtype=np.int64))
    tensor.ClearField("int32_data")
    if external or (is_initializer and count * 4 > _INLINE):
        start = sink.tell()
        for chunk in chunks:
            sink.write(chunk)
        size = sink.tell() - start
        tensor.ClearField("raw_data")
        tensor.ClearField("external_data")
        for key, value in {"location": Path(sink.name).name, "offset": start, "length": size}.items():
            tensor.external_data.add(key=key, value=str(value))
        tensor.data_location = 1  # EXTERNAL
    else:
        tensor.raw_data = b"".join(chunks)
        size = len(tensor.raw_data)
    if narrow and size != count * 4:
        raise ValueError(f"tensor {tensor.name!r} has {size // 2} bytes of bfloat16 data for {count} elements")


def _external(tensor: Any, folder: Path) -> Iterator[bytes]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = Path(entries.get("location", ""))
    if location.is_absolute() or ".." in location.parts:
        raise ValueError(f"tensor {tensor.name!r} names data outside of the model's folder: {location}")
    with (folder / location).open("rb") as source:
        source.seek(int(entries.get("offset", 0)))
        left = int(entries.get("length", -1))
        while left != 0:
            chunk = source.read(_CHUNK if left < 0 else min(left, _CHUNK))
            if not chunk:
                break
            yield chunk
            left -= len(chunk) if left > 0 else 0
        if left > 0:
            raise ValueError(f"tensor {tensor.name!r}: {folder / location} ends {left} bytes early")
