"""Everything that computes: factories, elementwise operators, reductions, joining, and copies between devices."""

from __future__ import annotations

import builtins
import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _driver, _dtypes, _kernels, _memory, _modes, _random, _standin
from ._dtypes import FLOAT, INTEGER, LABELS, Size, bool_, device, dtype, float32, float64, int64
from ._standin import counts
from ._tensor import Tensor, _sizes

_default_dtype = float32


def get_default_dtype() -> dtype:
    return _default_dtype


def set_default_dtype(d: dtype) -> None:
    global _default_dtype
    _default_dtype = d


def _ordinal(where: Any) -> int:
    """-1 for the host; a device's number, the current one's where none is named."""
    if where is None:
        return -1
    where = device(where)
    if where.type == "meta":
        raise NotImplementedError("stand-in torch: the meta device")
    if where.type == "cpu":
        return -1
    from . import cuda

    cuda.init()
    index = cuda.current_device() if where.index is None else where.index
    if index >= cuda.device_count():
        raise _driver.AcceleratorError("CUDA error: invalid device ordinal")
    return index


def _stream(ordinal: int) -> int:
    from . import cuda

    return int(cuda.current_stream(ordinal).cuda_stream) if ordinal >= 0 else 0


# Making tensors -------------------------------------------------------------------------------------------------------


def _new(
    shape: Sequence[int],
    of: dtype,
    ordinal: int,
    strides: tuple[int, ...] | None = None,
    *,
    grad_of: Sequence[Any] = (),
    pinned: bool = False,
) -> Tensor:
    shape = Size(shape)
    nbytes = shape.numel() * of.itemsize
    if ordinal < 0:
        storage = _memory.on_host(nbytes, pinned=pinned)
    else:
        storage = _memory.on_device(nbytes, ordinal, _stream(ordinal))
    made = Tensor._make(storage, shape, of, strides)
    if (
        _modes.is_grad_enabled()
        and of.category == FLOAT
        and builtins.any(getattr(t, "requires_grad", False) for t in grad_of)
    ):
        made._requires_grad, made._leaf = True, False
    return made


def _like(t: Tensor, of: dtype | None = None, ordinal: int | None = None, *, grad_of: Sequence[Any] = ()) -> Tensor:
    """Of the same layout where that is dense, as torch preserves it."""
    strides = t._strides if t._dense() and t.numel() else None
    return _new(t._shape, of or t._dtype, t._storage.device if ordinal is None else ordinal, strides, grad_of=grad_of)


def _uninitialized(t: Tensor) -> Tensor:
    """Under deterministic algorithms new memory is filled: NaN, or the largest number."""
    if _modes.deterministic and _modes.fill_uninitialized_memory and t.numel():
        counts["fills"] += 1
        value: Any = math.nan if t._dtype.category == FLOAT else True
        if t._dtype.category == INTEGER:
            value = _dtypes.iinfo(t._dtype).max
        _fill(t, value)
    return t


def empty(
    *sizes: Any,
    size: Any = None,
    dtype: Any = None,
    device: Any = None,
    requires_grad: bool = False,
    pin_memory: bool = False,
) -> Tensor:
    _standin.reached("empty")
    t = _new(_sizes(sizes, size), dtype or _default_dtype, _ordinal(device), pinned=pin_memory)
    return _uninitialized(t).requires_grad_(requires_grad)


def empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
    size, stride = _sizes((size,)), _sizes((stride,))
    n = 1 + builtins.sum((d - 1) * s for d, s in zip(size, stride, strict=True)) if builtins.all(size) else 0
    made = _new((n,), dtype or _default_dtype, _ordinal(device))
    return _uninitialized(Tensor._make(made._storage, size, made._dtype, stride))


def full(size: Any, fill_value: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    _standin.reached("full")
    if dtype is None:
        kind = type(fill_value.item() if isinstance(fill_value, Tensor) else fill_value)
        dtype = bool_ if kind is bool else int64 if kind is int else _default_dtype
    counts["fills"] += 1
    return _fill(_new(_sizes((size,)), dtype, _ordinal(device)), fill_value).requires_grad_(requires_grad)


def zeros(*sizes: Any, size: Any = None, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    return full(_sizes(sizes, size), 0, dtype=dtype or _default_dtype, device=device, requires_grad=requires_grad)


def ones(*sizes: Any, size: Any = None, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    return full(_sizes(sizes, size), 1, dtype=dtype or _default_dtype, device=device, requires_grad=requires_grad)


def empty_like(t: Tensor, *, dtype: Any = None, device: Any = None) -> Tensor:
    _standin.reached("empty")
    return _uninitialized(_like(t, dtype, None if device is None else _ordinal(device)))


def full_like(t: Tensor, fill_value: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
    counts["fills"] += 1
    return _fill(_like(t, dtype, None if device is None else _ordinal(device)), fill_value)


def zeros_like(t: Tensor, *, dtype: Any = None, device: Any = None) -> Tensor:
    return full_like(t, 0, dtype=dtype, device=device)


def ones_like(t: Tensor, *, dtype: Any = None, device: Any = None) -> Tensor:
    return full_like(t, 1, dtype=dtype, device=device)


def _host(array: Any) -> Tensor:
    """A copy of a numpy array."""
    array = np.asarray(array)
    t = _new(array.shape, _dtypes.of_numpy(array.dtype), -1)
    if array.size:
        ctypes.memmove(t.data_ptr(), np.ascontiguousarray(array).ctypes.data, array.nbytes)
    return t


def _plain(data: Any) -> Any:
    if isinstance(data, Tensor):
        return data.item() if data.numel() == 1 and not data.ndim else data.tolist()
    return [_plain(d) for d in data] if isinstance(data, (list, tuple)) else data


def tensor(
    data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, pin_memory: bool = False
) -> Tensor:
    """Always a copy."""
    if isinstance(data, Tensor):
        return data.detach().clone().to(_where(device, data), dtype or data._dtype).requires_grad_(requires_grad)
    array = data if isinstance(data, (np.ndarray, np.generic)) else np.asarray(_plain(data))
    if not isinstance(data, (np.ndarray, np.generic)):
        if array.dtype == np.float64:
            wanted = dtype or _default_dtype
            array = array.astype(wanted.numpy) if wanted.category == FLOAT and wanted.numpy else array
            dtype = wanted
        elif array.dtype == object or array.dtype.kind in "US":
            raise TypeError(f"new(): invalid data type '{type(data).__name__}'")
        elif array.size == 0:
            dtype = dtype or _default_dtype
    t = _host(array)
    if dtype is not None:
        t = t.to(dtype)
    if pin_memory:
        t = t.pin_memory()
    return t.to(_where(device, t)).requires_grad_(requires_grad)


def _where(wanted: Any, t: Tensor) -> device:
    return t.device if wanted is None else device(wanted)


def as_tensor(data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
    if isinstance(data, Tensor):
        return data.to(_where(device, data), dtype or data._dtype)
    if isinstance(data, np.ndarray):
        t = from_numpy(data)
        return t.to(_where(device, t), dtype or t._dtype)
    return tensor(data, dtype=dtype, device=device)


def from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """On the array's own memory."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"expected np.ndarray (got {type(array).__name__})")
    d = _dtypes.of_numpy(array.dtype)
    if builtins.any(s < 0 for s in array.strides):
        raise ValueError("At least one stride in the given numpy array is negative")
    if builtins.any(s % d.itemsize for s in array.strides):
        raise ValueError("given numpy array strides not a multiple of the element byte size.")
    storage = _memory.Storage(array.ctypes.data if array.size else 0, array.nbytes, -1, array)
    return Tensor._make(storage, array.shape, d, tuple(s // d.itemsize for s in array.strides))


def frombuffer(buffer: Any, *, dtype: dtype, count: int = -1, offset: int = 0) -> Tensor:
    raw = np.frombuffer(buffer, np.uint8, offset=offset)
    n = raw.size // dtype.itemsize if count < 0 else count
    return Tensor._make(_memory.Storage(raw.ctypes.data, raw.nbytes, -1, raw), (n,), dtype)


def arange(*args: Any, dtype: Any = None, device: Any = None) -> Tensor:
    _standin.reached("arange")
    start, stop, by = (0, args[0], 1) if len(args) == 1 else (*args, 1) if len(args) == 2 else args
    if dtype is None:
        dtype = _default_dtype if builtins.any(isinstance(x, float) for x in (start, stop, by)) else int64
    t = _new((builtins.max(0, math.ceil((stop - start) / by)),), dtype, _ordinal(device))
    if not t.numel():
        return t
    node = _kernels.make("arange", t._shape, _compute(dtype), t._storage.device)
    _kernels.set_operand(node.out, t, t._strides)
    node.f[:] = [start, by]
    node.i[:2] = [int(start), int(by)]
    _kernels.submit(node, _stream(t._storage.device))
    return t


def linspace(start: float, end: float, steps: int, *, dtype: Any = None, device: Any = None) -> Tensor:
    values = np.linspace(start, end, steps, dtype=np.float64)
    return tensor(values, dtype=dtype or _default_dtype, device=device)


def randn(
    *sizes: Any,
    size: Any = None,
    dtype: Any = None,
    device: Any = None,
    generator: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    _standin.reached("randn")
    t = _new(_sizes(sizes, size), dtype or _default_dtype, _ordinal(device))
    return _random.fill(t, "normal", 0, 1, generator=generator).requires_grad_(requires_grad)


def rand(*sizes: Any, size: Any = None, dtype: Any = None, device: Any = None, generator: Any = None) -> Tensor:
    _standin.reached("rand")
    return _random.fill(
        _new(_sizes(sizes, size), dtype or _default_dtype, _ordinal(device)), "uniform", 0, 1, generator=generator
    )


def randint(*args: Any, dtype: Any = None, device: Any = None, generator: Any = None) -> Tensor:
    low, high, size = (0, *args) if len(args) == 2 else args
    t = _new(_sizes((size,)), dtype or int64, _ordinal(device))
    return _random.fill(t, "integers", high - low, 0, low, generator=generator)


def randn_like(t: Tensor, *, dtype: Any = None) -> Tensor:
    return randn(t._shape, dtype=dtype or t._dtype, device=t.device)


def rand_like(t: Tensor, *, dtype: Any = None) -> Tensor:
    return rand(t._shape, dtype=dtype or t._dtype, device=t.device)


def normal_(t: Tensor, mean: float = 0, std: float = 1, *, generator: Any = None) -> Tensor:
    t._written()
    made = _random.fill(_new(t._shape, t._dtype, t._storage.device), "normal", mean, std, generator=generator)
    _copy(t, made)
    return t


def uniform_(t: Tensor, a: float = 0, b: float = 1, *, generator: Any = None) -> Tensor:
    t._written()
    made = _random.fill(_new(t._shape, t._dtype, t._storage.device), "uniform", a, b, generator=generator)
    _copy(t, made)
    return t


# Copies ---------------------------------------------------------------------------------------------------------------


def _compute(d: dtype) -> int:
    return _kernels.AS_FLOAT if d.category == FLOAT else _kernels.AS_INT


def _by_kernel(target: Tensor, source: Any) -> None:
    """Within one device: another layout or dtype, or a number."""
    if not target.numel():
        return
    of = source._dtype if isinstance(source, Tensor) else target._dtype
    node = _kernels.make("copy", target._shape, _compute(of), target._storage.device)
    _kernels.set_operand(node.out, target, target._strides)
    node.inputs = 1
    if isinstance(source, Tensor):
        _kernels.set_operand(node.in_[0], source, source._strides)
    else:
        _kernels.set_number(node.in_[0], source)
    _kernels.submit(node, _stream(target._storage.device))


def _fill(t: Tensor, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.ndim:
            raise RuntimeError(
                f"fill_ only supports 0-dimension value tensor but got tensor with {value.ndim} dimensions."
            )
        if value.is_cuda == t.is_cuda:
            _by_kernel(t, value.expand(t._shape))
            return t
        value = value.item()
    if t._dtype.category != FLOAT and isinstance(value, float):
        value = int(value) if t._dtype is not bool_ else bool(value)
    _by_kernel(t, value)
    return t


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> None:
    """Values of `source`, of the same shape, into `target`."""
    a, b = target._storage.device, source._storage.device
    if not target.numel():
        return
    if a == b:
        same = target._dtype is source._dtype and target._strides == source._strides
        if a >= 0 and same and target.is_contiguous():
            with _driver.on(a):
                _driver.call("cuMemcpyDtoDAsync_v2", target.data_ptr(), source.data_ptr(), target.nbytes, _stream(a))
            return
        _by_kernel(target, source)
        return
    if a >= 0 and b >= 0:
        _between_devices(target, source)
        return
    # Across: dense and of one dtype, so the rest is done on either side, as torch does.
    source = source.to(target._dtype).contiguous()
    dense = target if target.is_contiguous() else _new(target._shape, target._dtype, a)
    _across(dense, source, non_blocking)
    if dense is not target:
        _by_kernel(target, dense)


def _across(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    to_device = target.is_cuda
    ordinal = target._storage.device if to_device else source._storage.device
    on_host = source if to_device else target
    stream = _stream(ordinal)
    with _driver.on(ordinal):
        if _driver.capture_id(stream) and not on_host.is_pinned():
            raise RuntimeError(
                "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned."
            )
        name = "cuMemcpyHtoDAsync_v2" if to_device else "cuMemcpyDtoHAsync_v2"
        counts["host_to_device" if to_device else "device_to_host"] += 1
        _driver.call(name, target.data_ptr(), source.data_ptr(), target.nbytes, stream)
        if not non_blocking:
            _driver.wait(stream)


def _between_devices(target: Tensor, source: Tensor) -> None:
    """On the source's stream, between events on both devices' current streams."""
    a, b = target._storage.device, source._storage.device
    if source._dtype is not target._dtype or not source.is_contiguous():
        source = source.to(target._dtype).contiguous()
    if not target.is_contiguous():
        raise NotImplementedError("stand-in torch: a copy between devices into a strided tensor")
    _order(_stream(a), a, _stream(b), b)
    with _driver.on(b):
        _driver.call("cuMemcpyAsync", target.data_ptr(), source.data_ptr(), target.nbytes, _stream(b))
    _order(_stream(b), b, _stream(a), a)


def _order(first: int, of_first: int, then: int, of_then: int) -> None:
    with _driver.on(of_first):
        event = _driver.made("cuEventCreate", ctypes.c_uint(2))
        _driver.call("cuEventRecord", event, first)
    with _driver.on(of_then):
        _driver.call("cuStreamWaitEvent", then, event, 0)
    with _driver.on(of_first):
        _driver.call("cuEventDestroy_v2", event)


def _read(t: Tensor) -> Tensor:
    """The values on the host, waited for, as `item()` reads them."""
    if not t.is_cuda:
        return t
    t = t.detach().contiguous()
    made = _new(t._shape, t._dtype, -1)
    if t.numel():
        stream = _stream(t._storage.device)
        with _driver.on(t._storage.device):
            counts["device_to_host"] += 1
            _driver.call("cuMemcpyDtoHAsync_v2", made.data_ptr(), t.data_ptr(), t.nbytes, stream)
            _driver.wait(stream)
    return made


def to(t: Tensor, *args: Any, non_blocking: bool = False, copy: bool = False, **kwargs: Any) -> Tensor:
    where, of = kwargs.pop("device", None), kwargs.pop("dtype", None)
    if kwargs:
        raise NotImplementedError(f"stand-in torch: to({', '.join(kwargs)}=…)")
    for arg in args:
        if isinstance(arg, Tensor):
            where, of = arg.device, arg._dtype
        elif isinstance(arg, dtype):
            of = arg
        elif isinstance(arg, bool):
            non_blocking = arg
        elif arg is not None:
            where = arg
    ordinal = t._storage.device if where is None else _ordinal(where)
    of = of or t._dtype
    if ordinal == t._storage.device and of is t._dtype and not copy:
        return t
    _standin.reached("to")
    made = _like(t, of, ordinal, grad_of=(t,))
    return made._copy(t, non_blocking)


# Elementwise ----------------------------------------------------------------------------------------------------------


def broadcast_shapes(*shapes: Sequence[int]) -> Size:
    rank = builtins.max((len(s) for s in shapes), default=0)
    result = [1] * rank
    for s in shapes:
        for i, d in enumerate(s, rank - len(s)):
            if d != 1 and result[i] not in (1, d):
                raise RuntimeError(
                    f"The size of tensor a ({result[i]}) must match the size of tensor b ({d}) "
                    f"at non-singleton dimension {i}"
                )
            if d != 1:
                result[i] = d
    return Size(result)


def _device_of(tensors: Sequence[Tensor]) -> int:
    found = {t._storage.device for t in tensors if t.is_cuda or t.ndim}
    if len(found) > 1:
        names = [str(device("cuda", i)) if i >= 0 else "cpu" for i in sorted(found, reverse=True)]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {names[0]} and {names[1]}!"
        )
    return found.pop() if found else -1


def _is_number(x: Any) -> bool:
    return isinstance(x, (bool, int, float, np.number, np.bool_))


def _number(x: Any) -> Any:
    return x.item() if isinstance(x, (np.number, np.bool_)) else x


def _elementwise(
    op: str, *operands: Any, kind: str = "promote", out: Tensor | None = None, name: str | None = None
) -> Tensor:
    """`kind`: what the result is: "promote" (of the common dtype), "float" (at least floating), "bool"."""
    _standin.reached(name or op)
    values = [_number(x) for x in operands]
    tensors = [x for x in values if isinstance(x, Tensor)]
    for x in values:
        if not isinstance(x, Tensor) and not _is_number(x):
            raise TypeError(f"{op}(): argument must be Tensor or a number, not {type(x).__name__}")
    promoted = values[1:] if op == "where" else values
    common = _dtypes.of_operands(
        [(x._dtype, x.ndim) for x in promoted if isinstance(x, Tensor)],
        [x for x in promoted if not isinstance(x, Tensor)],
        _default_dtype,
    )
    if kind == "float" and common.category != FLOAT:
        common = _default_dtype
    if kind == "int" and common.category == FLOAT:
        raise NotImplementedError(f"\"{op}\" not implemented for '{LABELS[common]}'")
    result = bool_ if kind == "bool" else common
    ordinal = _device_of(tensors if out is None else [*tensors, out])
    shape = broadcast_shapes(*(x._shape for x in tensors))
    if out is None:
        same = next((x for x in tensors if x._shape == shape and (not x.is_contiguous()) and x._dense()), None)
        strides = same._strides if same is not None and shape.numel() else None
        to = _new(shape, result, ordinal, strides, grad_of=tensors)
    else:
        out._written()
        if out._shape != broadcast_shapes(out._shape, shape):
            raise RuntimeError(
                f"output with shape {list(out._shape)} doesn't match the broadcast shape "
                f"{list(broadcast_shapes(out._shape, shape))}"
            )
        if result.category > out._dtype.category:
            raise RuntimeError(
                f"result type {LABELS[result]} can't be cast to the desired output type {LABELS[out._dtype]}"
            )
        to, shape = out, out._shape
    if not shape.numel():
        return to
    node = _kernels.make(op, shape, _compute(common), ordinal)
    _kernels.set_operand(node.out, to, to._strides)
    node.inputs = len(values)
    for i, x in enumerate(values):
        if isinstance(x, Tensor) and x._storage.device != ordinal:
            x = x.item()  # one number on the host beside tensors on a device: read now
        if isinstance(x, Tensor):
            _kernels.set_operand(node.in_[i], x, x.expand(shape)._strides)
        else:
            if common.category == FLOAT and common is not float64:
                x = float(np.float32(x))  # numbers take part as float32
            _kernels.set_number(node.in_[i], x)
    _kernels.submit(node, _stream(ordinal))
    return to


def _binary(op: str, kind: str = "promote") -> Callable[..., Tensor]:
    def function(a: Any, b: Any, *, out: Tensor | None = None) -> Tensor:
        return _elementwise(op, a, b, kind=kind, out=out)

    function.__name__ = op
    return function


def _unary(op: str, kind: str = "promote") -> Callable[..., Tensor]:
    def function(a: Tensor, *, out: Tensor | None = None) -> Tensor:
        return _elementwise(op, a, kind=kind, out=out)

    function.__name__ = op
    return function


_add, _sub = _binary("add"), _binary("sub")


def add(a: Any, b: Any, *, alpha: Any = 1, out: Tensor | None = None) -> Tensor:
    return _add(a, b if alpha == 1 else mul(b, alpha), out=out)


def sub(a: Any, b: Any, *, alpha: Any = 1, out: Tensor | None = None) -> Tensor:
    return _sub(a, b if alpha == 1 else mul(b, alpha), out=out)


mul, pow = _binary("mul"), _binary("pow")
minimum, maximum, remainder = _binary("minimum"), _binary("maximum"), _binary("remainder")
floor_divide = _binary("floor_divide")
eq, ne, lt, le, gt, ge = (_binary(op, "bool") for op in ("eq", "ne", "lt", "le", "gt", "ge"))
bitwise_and, bitwise_or, bitwise_xor = (_binary(op, "int") for op in ("and", "or", "xor"))
neg, abs, floor, ceil, round = (_unary(op) for op in ("neg", "abs", "floor", "ceil", "round"))
exp, log, sqrt, rsqrt, sin, cos, tanh, sigmoid, erf = (
    _unary(op, "float") for op in ("exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "erf")
)
isnan, isfinite = _unary("isnan", "bool"), _unary("isfinite", "bool")
bitwise_not = _unary("not", "int")


def div(a: Any, b: Any, *, rounding_mode: str | None = None, out: Tensor | None = None) -> Tensor:
    if rounding_mode == "floor":
        return floor_divide(a, b)
    if rounding_mode is not None:
        raise NotImplementedError(f"stand-in torch: div(rounding_mode={rounding_mode!r})")
    return _elementwise("div", a, b, kind="float", out=out)


def logical_not(a: Tensor) -> Tensor:
    return eq(a, 0)


def logical_and(a: Tensor, b: Tensor) -> Tensor:
    return bitwise_and(ne(a, 0), ne(b, 0))


def logical_or(a: Tensor, b: Tensor) -> Tensor:
    return bitwise_or(ne(a, 0), ne(b, 0))


def where(condition: Tensor, a: Any = None, b: Any = None) -> Tensor:
    if a is None or b is None:
        raise NotImplementedError("stand-in torch: where(condition) alone waits for the device")
    return _elementwise("where", condition, a, b)


def masked_fill(t: Tensor, mask: Tensor, value: Any) -> Tensor:
    return where(mask, value, t).to(t._dtype)


def masked_fill_(t: Tensor, mask: Tensor, value: Any) -> Tensor:
    return _elementwise("where", mask, value, t, out=t)


def clamp(t: Tensor, min: Any = None, max: Any = None) -> Tensor:
    t = t if min is None else maximum(t, min)
    return t if max is None else minimum(t, max)


def clamp_min(t: Tensor, min: Any) -> Tensor:
    return clamp(t, min)


def clamp_max(t: Tensor, max: Any) -> Tensor:
    return clamp(t, None, max)


def relu(t: Tensor) -> Tensor:
    return maximum(t, 0)


def square(t: Tensor) -> Tensor:
    return mul(t, t)


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def update(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(t, *args, out=t, **kwargs)

    return update


def clamp_(t: Tensor, min: Any = None, max: Any = None) -> Tensor:
    t._written()
    _copy(t, clamp(t, min, max))
    return t


def _broad(mask: Tensor, rank: int) -> Tensor:
    """A mask over the first dimensions, for all of the rest."""
    return mask.reshape(*mask._shape, *([1] * (rank - mask.ndim)))


# Reductions and products ----------------------------------------------------------------------------------------------


def _reduce(op: str, t: Tensor, dim: Any, keepdim: bool, result: dtype, compute: dtype | None = None) -> Tensor:
    _standin.reached(op)
    dims = (
        list(range(t.ndim)) if dim is None else [t._dim(d) for d in (dim if isinstance(dim, (tuple, list)) else [dim])]
    )
    kept = [i for i in range(t.ndim) if i not in dims]
    order = kept + dims
    shape = tuple(t._shape[i] for i in kept)
    out = _new(shape, result, t._storage.device, grad_of=(t,))
    if not t.numel():
        if op not in ("sum", "prod", "any", "all"):
            raise RuntimeError(f"{op}(): Expected reduction dim to be specified for input.numel() == 0.")
        _fill(out, op in ("prod", "all"))
    else:
        node = _kernels.make(op, tuple(t._shape[i] for i in order), _compute(compute or t._dtype), t._storage.device)
        node.outer, node.inputs = len(kept), 1
        _kernels.set_operand(node.out, out, (*out._strides, *([0] * len(dims))))
        _kernels.set_operand(node.in_[0], t, tuple(t._strides[i] for i in order))
        _kernels.submit(node, _stream(t._storage.device))
    return out.reshape(*(1 if i in dims else t._shape[i] for i in range(t.ndim))) if keepdim else out


def sum(t: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    result = dtype or (t._dtype if t._dtype.category == FLOAT else int64)
    return _reduce("sum", t, dim, keepdim, result)


def prod(t: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return _reduce("prod", t, dim, keepdim, dtype or (t._dtype if t._dtype.category == FLOAT else int64))


def mean(t: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if dtype is None and t._dtype.category != FLOAT:
        raise RuntimeError(
            "mean(): could not infer output dtype. Input dtype must be either a floating point or complex dtype. Got: "
            f"{LABELS[t._dtype]}"
        )
    total = sum(t, dim, keepdim, dtype=float64)
    n = t.numel() // total.numel() if total.numel() else 1
    return div(total, n).to(dtype or t._dtype)


def any(t: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _reduce("any", t, dim, keepdim, bool_)


def all(t: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _reduce("all", t, dim, keepdim, bool_)


def argmax(t: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _reduce("argmax", t, dim, keepdim, int64, t._dtype)


def argmin(t: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _reduce("argmin", t, dim, keepdim, int64, t._dtype)


def max(t: Tensor, other: Any = None, *, dim: Any = None) -> Tensor:
    return _extreme("max", maximum, t, other, dim)


def min(t: Tensor, other: Any = None, *, dim: Any = None) -> Tensor:
    return _extreme("min", minimum, t, other, dim)


def _extreme(op: str, pairwise: Callable[..., Tensor], t: Tensor, other: Any, dim: Any) -> Tensor:
    if isinstance(other, Tensor):
        return pairwise(t, other)
    if other is not None or dim is not None:
        raise NotImplementedError(f"stand-in torch: {op} with dim; use a{op}")
    return _reduce(op, t, None, False, t._dtype)


def amax(t: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _reduce("max", t, dim, keepdim, t._dtype)


def amin(t: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _reduce("min", t, dim, keepdim, t._dtype)


def cumsum(t: Tensor, dim: int) -> Tensor:
    dim = t._dim(dim)
    out = _new(t._shape, t._dtype if t._dtype.category == FLOAT else int64, t._storage.device, grad_of=(t,))
    if t.numel():
        order = [i for i in range(t.ndim) if i != dim] + [dim]
        node = _kernels.make("cumsum", tuple(t._shape[i] for i in order), _compute(t._dtype), t._storage.device)
        node.outer, node.inputs = t.ndim - 1, 1
        _kernels.set_operand(node.out, out, tuple(out._strides[i] for i in order))
        _kernels.set_operand(node.in_[0], t, tuple(t._strides[i] for i in order))
        _kernels.submit(node, _stream(t._storage.device))
    return out


def matmul(a: Tensor, b: Tensor) -> Tensor:
    _standin.reached("matmul")
    if a._dtype is not b._dtype:
        raise RuntimeError(
            f"expected m1 and m2 to have the same dtype, but got: {LABELS[a._dtype]} != {LABELS[b._dtype]}"
        )
    if not a.ndim or not b.ndim:
        raise RuntimeError("both arguments to matmul need to be at least 1D")
    x = a.unsqueeze(0) if a.ndim == 1 else a
    y = b.unsqueeze(1) if b.ndim == 1 else b
    if x._shape[-1] != y._shape[-2]:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({x._shape[:-1].numel()}x{x._shape[-1]} and "
            f"{y._shape[-2]}x{y._shape[-1]})"
        )
    batch = broadcast_shapes(x._shape[:-2], y._shape[:-2])
    m, k, n = x._shape[-2], x._shape[-1], y._shape[-1]
    ordinal = _device_of([x, y])
    out = _new((*batch, m, n), a._dtype, ordinal, grad_of=(a, b))
    if not k:
        _fill(out, 0)
    elif out.numel():
        node = _kernels.make("dot", (*batch, m, n, k), _compute(a._dtype), ordinal)
        node.outer, node.inputs = len(batch) + 2, 2
        x, y = x.expand(*batch, m, k), y.expand(*batch, k, n)
        _kernels.set_operand(node.out, out, (*out._strides, 0))
        _kernels.set_operand(node.in_[0], x, (*x._strides[:-1], 0, x._strides[-1]))
        _kernels.set_operand(node.in_[1], y, (*y._strides[:-2], 0, y._strides[-1], y._strides[-2]))
        _kernels.submit(node, _stream(ordinal))
    if a.ndim == 1:
        out = out.squeeze(-2)
    return out.squeeze(-1) if b.ndim == 1 else out


def bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.ndim != 3 or b.ndim != 3:
        raise RuntimeError("batch1 must be a 3D tensor")
    return matmul(a, b)


# Joining and picking --------------------------------------------------------------------------------------------------


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    _standin.reached("cat")
    tensors = list(tensors)
    if not tensors:
        raise RuntimeError("torch.cat(): expected a non-empty list of Tensors")
    first = tensors[0]
    if not first.ndim:
        raise RuntimeError("zero-dimensional tensor (at position 0) cannot be concatenated")
    dim = first._dim(dim)
    for i, t in enumerate(tensors):
        if t.ndim != first.ndim:
            raise RuntimeError(f"Tensors must have same number of dimensions: got {first.ndim} and {t.ndim}")
        for d in range(t.ndim):
            if d != dim and t._shape[d] != first._shape[d]:
                raise RuntimeError(
                    f"Sizes of tensors must match except in dimension {dim}. Expected size {first._shape[d]} but got "
                    f"size {t._shape[d]} for tensor number {i} in the list."
                )
    ordinal = _device_of(tensors)
    length = 0
    for t in tensors:
        length += t._shape[dim]
    of = functools.reduce(_dtypes.promote, (t._dtype for t in tensors))
    out = _new((*first._shape[:dim], length, *first._shape[dim + 1 :]), of, ordinal, grad_of=tensors)
    with _modes.no_grad():
        at = 0
        for t in tensors:
            if t.numel():
                _by_kernel(out.narrow(dim, at, t._shape[dim]), t)
            at += t._shape[dim]
    return out


concat = concatenate = cat


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    tensors = list(tensors)
    for i, t in enumerate(tensors):
        if t._shape != tensors[0]._shape:
            raise RuntimeError(
                f"stack expects each tensor to be equal size, but got {list(tensors[0]._shape)} at entry 0 and "
                f"{list(t._shape)} at entry {i}"
            )
    return cat([t.unsqueeze(dim) for t in tensors], dim)


def repeat(t: Tensor, *sizes: Any) -> Tensor:
    times = _sizes(sizes)
    t = t.reshape(*([1] * (len(times) - t.ndim)), *t._shape)
    paired = [x for n, d in zip(times, t._shape, strict=True) for x in (n, d)]
    apart = t.reshape(*(x for d in t._shape for x in (1, d))).expand(*paired)
    return apart.clone().reshape(*(n * d for n, d in zip(times, t._shape, strict=True)))


def _gather(t: Tensor, dim: int, index: Tensor) -> Tensor:
    """Along one dimension, which becomes those of `index`."""
    _standin.reached("index")
    if index._dtype.category != INTEGER:
        raise IndexError("tensors used as indices must be long, int, byte or bool tensors")
    if index._storage.device != t._storage.device:
        if index.is_cuda:
            raise RuntimeError(
                f"indices should be either on cpu or on the same device as the indexed tensor ({t.device})"
            )
        index = index.to(t.device)
    shape = (*t._shape[:dim], *index._shape, *t._shape[dim + 1 :])
    out = _new(shape, t._dtype, t._storage.device, grad_of=(t,))
    if not out.numel():
        return out
    before, after = dim, t.ndim - dim - 1
    node = _kernels.make("gather", shape, _compute(t._dtype), t._storage.device)
    node.inputs = 2
    _kernels.set_operand(node.out, out, out._strides)
    _kernels.set_operand(node.in_[0], t, (*t._strides[:dim], *([0] * index.ndim), *t._strides[dim + 1 :]))
    _kernels.set_operand(node.in_[1], index, (*([0] * before), *index._strides, *([0] * after)))
    node.i[:2] = [t._strides[dim], t._shape[dim]]
    _kernels.submit(node, _stream(t._storage.device))
    return out


def index_select(t: Tensor, dim: int, index: Tensor) -> Tensor:
    return _gather(t, t._dim(dim), index)


def outer(a: Tensor, b: Tensor) -> Tensor:
    return mul(a.unsqueeze(1), b.unsqueeze(0))


# Comparing ------------------------------------------------------------------------------------------------------------


def equal(a: Tensor, b: Tensor) -> bool:
    """Waits. Same shape, dtype and values; NaN equals nothing."""
    if a._storage.device != b._storage.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {a.device} and {b.device}!"
        )
    return a._shape == b._shape and bool(np.array_equal(a._values(), b._values()))


def isclose(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Tensor:
    if a._dtype is not b._dtype:
        raise RuntimeError(f"{LABELS[a._dtype]} did not match {LABELS[b._dtype]}")
    close = np.isclose(a._values(), b._values(), rtol, atol, equal_nan)
    return _host(close).to(a.device)


def allclose(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    return bool(isclose(a, b, rtol, atol, equal_nan)._values().all())


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def is_floating_point(t: Tensor) -> bool:
    return t.is_floating_point()


def numel(t: Tensor) -> int:
    return t.numel()


def result_type(a: Any, b: Any) -> dtype:
    both = [a, b]
    return _dtypes.of_operands(
        [(x._dtype, x.ndim) for x in both if isinstance(x, Tensor)],
        [x for x in both if not isinstance(x, Tensor)],
        _default_dtype,
    )


def promote_types(a: dtype, b: dtype) -> dtype:
    return _dtypes.promote(a, b)


# As methods -----------------------------------------------------------------------------------------------------------


def softmax(t: Tensor, dim: int, dtype: Any = None) -> Tensor:
    x = t if dtype is None else t.to(dtype)
    e = exp(sub(x, amax(x, dim, keepdim=True)).to(float64))
    return div(e, sum(e, dim, keepdim=True)).to(x._dtype)


def var(t: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    x = t.to(float64)
    centred = sub(x, mean(x, dim, keepdim=dim is not None))
    total = sum(square(centred), dim, keepdim)
    return div(total, t.numel() // total.numel() - unbiased).to(t._dtype)


def std(t: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    return sqrt(var(t, dim, unbiased, keepdim))


_METHODS = """
add sub mul div pow minimum maximum remainder floor_divide eq ne lt le gt ge bitwise_and bitwise_or bitwise_xor
bitwise_not neg abs floor ceil round exp log sqrt rsqrt sin cos tanh sigmoid erf isnan isfinite logical_not logical_and
logical_or masked_fill masked_fill_ clamp clamp_ clamp_min clamp_max relu square sum prod mean any all argmax argmin max
min amax amin cumsum matmul bmm repeat index_select equal allclose isclose normal_ uniform_ softmax var std
"""
for _name in _METHODS.split():
    setattr(Tensor, _name, globals()[_name])
for _name in ("add", "sub", "mul", "div", "pow", "neg", "abs", "exp", "sqrt", "tanh", "sigmoid"):
    setattr(Tensor, f"{_name}_", _in_place(globals()[_name]))


def _reflected(function: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda a, b: function(b, a) if _is_number(b) else NotImplemented


def _operator(function: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda a, b: function(a, b) if isinstance(b, Tensor) or _is_number(b) else NotImplemented


for _symbol, _function in {
    "add": add,
    "sub": sub,
    "mul": mul,
    "truediv": div,
    "floordiv": floor_divide,
    "mod": remainder,
    "pow": pow,
    "matmul": matmul,
    "and": bitwise_and,
    "or": bitwise_or,
    "xor": bitwise_xor,
}.items():
    setattr(Tensor, f"__{_symbol}__", _operator(_function))
    setattr(Tensor, f"__r{_symbol}__", _reflected(_function))
for _symbol, _function in {"add": add, "sub": sub, "mul": mul, "truediv": div}.items():
    setattr(Tensor, f"__i{_symbol}__", _in_place(_function))
for _symbol, _function in {"eq": eq, "ne": ne, "lt": lt, "le": le, "gt": gt, "ge": ge}.items():
    setattr(Tensor, f"__{_symbol}__", _operator(_function))
Tensor.__neg__ = lambda t: neg(t)  # type: ignore[attr-defined]
Tensor.__invert__ = lambda t: bitwise_not(t)  # type: ignore[attr-defined]
Tensor.__abs__ = lambda t: abs(t)  # type: ignore[attr-defined]
for _name, _type in {
    "float": float32,
    "double": float64,
    "half": _dtypes.float16,
    "bfloat16": _dtypes.bfloat16,
    "int": _dtypes.int32,
    "long": int64,
    "short": _dtypes.int16,
    "byte": _dtypes.uint8,
    "bool": bool_,
}.items():
    setattr(Tensor, _name, functools.partialmethod(lambda t, of: t.to(of), _type))


def new_empty(t: Tensor, *sizes: Any, dtype: Any = None, device: Any = None) -> Tensor:
    return empty(*sizes, dtype=dtype or t._dtype, device=_where(device, t))


def new_zeros(t: Tensor, *sizes: Any, dtype: Any = None, device: Any = None) -> Tensor:
    return zeros(*sizes, dtype=dtype or t._dtype, device=_where(device, t))


def new_full(t: Tensor, size: Any, fill_value: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
    return full(size, fill_value, dtype=dtype or t._dtype, device=_where(device, t))


for _name in ("new_empty", "new_zeros", "new_full"):
    setattr(Tensor, _name, globals()[_name])


__all__ = [
    name
    for name, value in globals().items()
    if not name.startswith("_") and getattr(value, "__module__", None) == __name__ and callable(value)
]
