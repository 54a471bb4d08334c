"""`kernels.c`: built once, filled in, and put on a stream or run at once on the host."""

from __future__ import annotations

import collections
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from . import _driver, _standin
from ._standin import counts

MAX_DIMS = 10
AS_FLOAT, AS_INT = 0, 1

# In the order of the enumerations in kernels.c.
_ELEMENTWISE = """
copy add sub mul div floor_divide remainder pow neg abs exp log sqrt rsqrt sin cos tanh sigmoid erf floor ceil round eq
ne lt le gt ge and or xor not where minimum maximum isnan isfinite arange gather
"""
_REDUCING = "sum prod min max any all argmin argmax dot cumsum"
CODES = {
    **{name: i for i, name in enumerate(_ELEMENTWISE.split())},
    **{name: 60 + i for i, name in enumerate(("uniform", "normal", "integers"))},
    **{name: 80 + i for i, name in enumerate(_REDUCING.split())},
    "set_rng": 100,
}


class Operand(ctypes.Structure):
    _fields_ = (
        ("ptr", ctypes.c_uint64),
        ("dtype", ctypes.c_int32),
        ("pad", ctypes.c_int32),
        ("f", ctypes.c_double),
        ("i", ctypes.c_int64),
        ("strides", ctypes.c_int64 * MAX_DIMS),
    )


class Node(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_int32),
        ("compute", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("outer", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("done", ctypes.c_int32),
        ("pad", ctypes.c_int32),
        ("dims", ctypes.c_int64 * MAX_DIMS),
        ("out", Operand),
        ("in_", Operand * 3),
        ("f", ctypes.c_double * 2),
        ("i", ctypes.c_int64 * 4),
        ("rng", ctypes.c_uint64),
        ("reachable", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("kernels.c")
    content = source.read_bytes()
    folder = source.parents[3] / "target" / "fakes"
    path = folder / f"torch_kernels.{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)
        os.close(handle)
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", temporary, str(source), "-lm"], check=True)
        Path(temporary).replace(path)
    library = ctypes.CDLL(str(path))
    library.node_size.restype = ctypes.c_ulong
    assert library.node_size() == ctypes.sizeof(Node)
    return library


# Nodes must live until they have run; those of a capture as long as its graph.
_queued: collections.deque[Node] = collections.deque()
_captured: dict[int, list[Node]] = {}


def captured_nodes(capture: int) -> list[Node]:
    return _captured.pop(capture, [])


def make(op: str, dims: tuple[int, ...], compute: int, device: int) -> Node:
    if len(dims) > MAX_DIMS:
        raise NotImplementedError(f"stand-in torch: tensors of more than {MAX_DIMS} dimensions")
    node = Node()
    node.op, node.compute, node.ndim, node.device = CODES[op], compute, len(dims), device
    node.dims[: len(dims)] = dims
    node.name = f"torch's {op}".encode()
    return node


def set_operand(to: Operand, tensor: Any, strides: tuple[int, ...]) -> None:
    if tensor.dtype.code < 0:
        raise NotImplementedError(f"stand-in torch: computing with {tensor.dtype}")
    to.ptr, to.dtype = tensor.data_ptr(), tensor.dtype.code
    to.strides[: len(strides)] = strides


def set_number(to: Operand, number: Any) -> None:
    to.ptr = 0
    to.f = float(number)
    to.i = int(number) if isinstance(number, int) else int(number) if abs(number) < 2**62 else 0


def submit(node: Node, stream: int) -> None:
    """On the host at once; on a device when the stream gets there."""
    run = _library().run_node
    if node.device < 0:
        node.done = 0
        error = run(ctypes.byref(node))
        if error == 710:
            raise IndexError("index out of range in self")
        return
    _standin.reached("launch")
    node.reachable = ctypes.cast(_driver.library["fake_cuda_reachable"], ctypes.c_void_p).value
    with _driver.on(node.device):
        capture = _driver.capture_id(stream)
        launch = _driver.library["fake_cuda_launch"]
        address = ctypes.cast(run, ctypes.c_void_p)
        _driver.check(launch(ctypes.c_uint64(stream), address, ctypes.c_uint64(ctypes.addressof(node))))
    counts["kernels"] += 1
    if capture:
        _captured.setdefault(capture, []).append(node)
        return
    while _queued:
        try:
            oldest = _queued.popleft()
        except IndexError:
            break
        if not oldest.done:
            _queued.appendleft(oldest)
            break
    _queued.append(node)
