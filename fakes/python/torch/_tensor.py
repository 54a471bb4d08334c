"""`torch.Tensor`: a view of memory, and what can be asked of it. What computes is in `_functions.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import _driver, _memory, _modes, _standin
from ._dtypes import BOOL, INTEGER, LABELS, Size, bool_, device, dtype, float32, int64
from ._memory import Storage
from ._standin import counts

_INFERENCE_UPDATE = "Inplace update to inference tensor outside InferenceMode is not allowed."


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, n = [], 1
    for d in reversed(shape):
        strides.append(n)
        n *= max(d, 1)
    return tuple(reversed(strides))


class Tensor:
    _storage: Storage
    _offset: int  # in elements
    _shape: Size
    _strides: tuple[int, ...]
    _dtype: dtype
    _requires_grad: bool
    _inference: bool
    _leaf: bool
    _base: Tensor | None
    grad: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG004 - of subclasses
        if cls is Tensor:
            raise NotImplementedError("stand-in torch: torch.Tensor(…); use torch.tensor or torch.empty")
        return object.__new__(cls)

    @staticmethod
    def _make(
        storage: Storage,
        shape: tuple[int, ...],
        of: dtype,
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
        base: Tensor | None = None,
    ) -> Tensor:
        t = object.__new__(Tensor)
        t._storage, t._shape, t._dtype, t._offset = storage, Size(shape), of, offset
        t._strides = dense_strides(tuple(shape)) if strides is None else tuple(strides)
        t._base = base
        # A view of a normal tensor is a normal tensor, in inference mode, too.
        t._inference = _modes.is_inference_mode_enabled() if base is None else base._inference
        t._requires_grad, t._leaf = False, True
        if base is not None and base.requires_grad and _modes.is_grad_enabled():
            t._requires_grad, t._leaf = True, False
        return t

    def _view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int | None = None) -> Tensor:
        return Tensor._make(
            self._storage, shape, self._dtype, strides, self._offset if offset is None else offset, base=self
        )

    # What it is -------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> dtype:
        return self._dtype

    @property
    def shape(self) -> Size:
        return self._shape

    def size(self, dim: int | None = None) -> Any:
        return self._shape if dim is None else self._shape[dim]

    def stride(self, dim: int | None = None) -> Any:
        return self._strides if dim is None else self._strides[dim]

    def storage_offset(self) -> int:
        return self._offset

    def untyped_storage(self) -> Storage:
        return self._storage

    def data_ptr(self) -> int:
        if self._storage.ptr == 0 or self.numel() == 0:
            return 0
        return self._storage.ptr + self._offset * self._dtype.itemsize

    @property
    def device(self) -> device:
        return device("cpu") if self._storage.device < 0 else device("cuda", self._storage.device)

    def get_device(self) -> int:
        return self._storage.device

    @property
    def is_cuda(self) -> bool:
        return self._storage.device >= 0

    @property
    def is_cpu(self) -> bool:
        return self._storage.device < 0

    is_sparse = is_quantized = is_meta = is_nested = False
    names = property(lambda self: (None,) * self.ndim)
    layout = "torch.strided"

    @property
    def ndim(self) -> int:
        return len(self._shape)

    def dim(self) -> int:
        return len(self._shape)

    def numel(self) -> int:
        return self._shape.numel()

    nelement = numel

    def element_size(self) -> int:
        return self._dtype.itemsize

    @property
    def itemsize(self) -> int:
        return self._dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.numel() * self._dtype.itemsize

    def is_contiguous(self) -> bool:
        expected = 1
        for d, s in zip(reversed(self._shape), reversed(self._strides), strict=True):
            if d != 1:
                if s != expected:
                    return self.numel() == 0
                expected *= d
        return True

    def _dense(self) -> bool:
        """No gaps and no overlaps, whatever the order of the dimensions."""
        expected = 1
        for s, d in sorted(
            ((s, d) for s, d in zip(self._strides, self._shape, strict=True) if d != 1), key=lambda x: x[0]
        ):
            if s != expected:
                return False
            expected *= d
        return True

    def is_floating_point(self) -> bool:
        return self._dtype.is_floating_point

    def is_complex(self) -> bool:
        return False

    def is_neg(self) -> bool:
        return False

    def is_conj(self) -> bool:
        return False

    def is_inference(self) -> bool:
        return self._inference

    def is_pinned(self) -> bool:
        return not self.is_cuda and _driver.started() and _memory.is_pinned(self.data_ptr())

    @property
    def _version(self) -> int:
        if self._inference:
            raise RuntimeError("Inference tensors do not track version counter.")
        return self._storage.version

    # Gradients: the flag alone ----------------------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, value: bool = True) -> Tensor:
        if value and not self._dtype.is_floating_point:
            raise RuntimeError("only Tensors of floating point dtype can require gradients")
        if value and self._inference and not _modes.is_inference_mode_enabled():
            raise RuntimeError("Setting requires_grad=True on inference tensor outside InferenceMode is not allowed.")
        if not value and not self._leaf:
            raise RuntimeError("you can only change requires_grad flags of leaf variables.")
        self._requires_grad = bool(value)
        return self

    @property
    def is_leaf(self) -> bool:
        return self._leaf

    @property
    def grad_fn(self) -> Any:
        return None if self._leaf else "stand-in"

    def backward(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("stand-in torch: gradients are a flag here, nothing computes them")

    def detach(self) -> Tensor:
        t = self._view(self._shape, self._strides)
        t._requires_grad, t._leaf = False, True
        return t

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self._storage, self._offset, self._dtype = value._storage, value._offset, value._dtype
        self._shape, self._strides = value._shape, value._strides

    def _written(self) -> None:
        """Before an update in place."""
        if self._inference and not _modes.is_inference_mode_enabled():
            raise RuntimeError(_INFERENCE_UPDATE)
        if self._requires_grad and self._leaf and _modes.is_grad_enabled():
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        if 0 in self._strides and any(d > 1 and s == 0 for d, s in zip(self._shape, self._strides, strict=True)):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single memory "
                "location."
            )
        self._storage.version += 1

    # To the host ------------------------------------------------------------------------------------------------------

    def _bytes(self) -> bytes:
        """Of a contiguous tensor on the host."""
        assert not self.is_cuda
        assert self.is_contiguous()
        return ctypes.string_at(self.data_ptr(), self.nbytes) if self.numel() else b""

    def _values(self) -> np.ndarray[Any, Any]:
        """The values, wherever they are, as numpy can hold them (bfloat16 as float32)."""
        host = _functions._read(self)
        if host._dtype.numpy is None:
            host = host.to(float32)
        host = host.contiguous()
        return np.frombuffer(host._bytes(), np.dtype(host._dtype.numpy)).reshape(self._shape)

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        if force:
            return self.detach().cpu().numpy()
        if self._requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        if self.is_cuda:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")
        if self._dtype.numpy is None:
            raise TypeError(f"Got unsupported ScalarType {LABELS.get(self._dtype, self._dtype.name)}")
        as_numpy = np.dtype(self._dtype.numpy)
        if self.numel() == 0:
            return np.empty(self._shape, as_numpy)
        raw = (ctypes.c_ubyte * self._storage.nbytes).from_address(self._storage.ptr)
        raw.storage = self._storage  # type: ignore[attr-defined] # the array keeps the memory
        return np.ndarray(
            tuple(self._shape),
            as_numpy,
            buffer=raw,
            offset=self._offset * as_numpy.itemsize,
            strides=[s * as_numpy.itemsize for s in self._strides],
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        found = self.numpy()
        return found if dtype is None else found.astype(dtype, copy=False)

    def item(self) -> Any:
        if self.numel() != 1:
            raise RuntimeError(f"a Tensor with {self.numel()} elements cannot be converted to Scalar")
        return self._values().reshape(()).item()

    def tolist(self) -> Any:
        return self.detach().cpu()._values().tolist()

    def __bool__(self) -> bool:
        if self.numel() == 0:
            raise RuntimeError("Boolean value of Tensor with no values is ambiguous")
        if self.numel() > 1:
            raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        if self._dtype.category not in (INTEGER, BOOL):
            raise TypeError("only integer tensors of a single element can be converted to an index")
        return int(self.item())

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("len() of a 0-d tensor")
        return int(self._shape[0])

    def __iter__(self) -> Iterator[Tensor]:
        if not self._shape:
            raise TypeError("iteration over a 0-d tensor")
        return iter([self[i] for i in range(len(self))])

    def __repr__(self) -> str:
        if self.is_cuda and _driver.capture_id(_current_stream(self)):
            raise RuntimeError("stand-in torch: printing a tensor waits, which a capture cannot")
        more = [] if self._dtype in (float32, int64, bool_) else [f"dtype={self._dtype}"]
        if self.is_cuda:
            more.append(f"device='{self.device}'")
        if self._requires_grad:
            more.append("requires_grad=True")
        values = self._values()
        text = (
            f"size={tuple(self._shape)}"
            if values.size > 1000
            else np.array2string(values, separator=", ", prefix="tensor(")
        )
        return f"tensor({', '.join([text, *more])})"

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, memo: Any) -> Tensor:
        if not self._leaf:
            raise RuntimeError(
                "Only Tensors created explicitly by the user support the deepcopy protocol at the moment."
            )
        made = self.detach().clone()
        made.__class__ = type(self)
        made._requires_grad = self._requires_grad
        memo[id(self)] = made
        return made

    # Other libraries --------------------------------------------------------------------------------------------------

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if not self.is_cuda:
            raise AttributeError(
                f"Can't get __cuda_array_interface__ on non-CUDA tensor type: torch.{LABELS[self._dtype]}Tensor"
            )
        if self._requires_grad:
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")
        if self._dtype.numpy is None:
            raise TypeError("stand-in torch: bfloat16 has no typestr")
        size = self._dtype.itemsize
        strides = None if self.is_contiguous() else tuple(s * size for s in self._strides)
        typestr = np.dtype(self._dtype.numpy).str
        return {
            "typestr": typestr,
            "shape": tuple(self._shape),
            "strides": strides,
            "data": (self.data_ptr(), False),
            "version": 2,
        }

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: Any = None,
        dl_device: Any = None,
        copy: Any = None,
    ) -> Any:
        from .utils import dlpack

        return dlpack.export(self, stream, dl_device, copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self._storage.device) if self.is_cuda else (1, 0)

    # Devices and dtypes -----------------------------------------------------------------------------------------------

    def record_stream(self, stream: Any) -> None:
        block = self._storage.owner
        if isinstance(block, _memory.Block):
            block.readers.add(stream.cuda_stream)
        elif not self.is_cuda:
            raise NotImplementedError("Could not run 'aten::record_stream' with arguments from the 'CPU' backend.")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return _functions.to(self, *args, **kwargs)

    def type(self, of: Any = None) -> Any:
        if of is None:
            return f"torch.{'cuda.' if self.is_cuda else ''}{LABELS[self._dtype]}Tensor"
        return self.to(of)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Tensor:
        return self.to(f"cuda:{device}" if isinstance(device, int) else device or "cuda", non_blocking=non_blocking)

    def type_as(self, other: Tensor) -> Tensor:
        return self.to(other.device, other.dtype)

    def pin_memory(self) -> Tensor:
        if self.is_cuda:
            raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")
        if self.is_pinned():
            return self
        return _functions.empty(self._shape, dtype=self._dtype, pin_memory=True).copy_(self)

    def contiguous(self) -> Tensor:
        if self.is_contiguous():
            return self
        _standin.reached("contiguous")
        return _functions._new(self._shape, self._dtype, self._storage.device, grad_of=(self,))._copy(self)

    def clone(self) -> Tensor:
        _standin.reached("clone")
        return _functions._like(self, grad_of=(self,))._copy(self)

    def copy_(self, source: Any, non_blocking: bool = False) -> Tensor:
        self._written()
        if not isinstance(source, Tensor):
            raise TypeError(f"copy_(): argument 'other' (position 1) must be Tensor, not {type(source).__name__}")
        return self._copy(source.expand(self._shape) if source._shape != self._shape else source, non_blocking)

    def _copy(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        _standin.reached("copy")
        counts["copies"] += 1
        _functions._copy(self, source, non_blocking)
        return self

    def fill_(self, value: Any) -> Tensor:
        self._written()
        counts["fills"] += 1
        return _functions._fill(self, value)

    def zero_(self) -> Tensor:
        return self.fill_(0)

    # Views ------------------------------------------------------------------------------------------------------------

    def as_strided(self, size: Any, stride: Any, storage_offset: int | None = None) -> Tensor:
        return self._view(tuple(size), tuple(stride), storage_offset)

    def expand(self, *sizes: Any) -> Tensor:
        wanted = _sizes(sizes)
        more = len(wanted) - self.ndim
        if more < 0:
            raise RuntimeError(
                f"expand: the number of sizes provided ({len(wanted)}) must be greater or equal to the number of "
                f"dimensions in the tensor ({self.ndim})"
            )
        shape, strides = [], []
        for i, w in enumerate(wanted):
            have, stride = (1, 0) if i < more else (self._shape[i - more], self._strides[i - more])
            if w == -1 and i >= more:
                w = have
            if have != w and have != 1:
                raise RuntimeError(
                    f"The expanded size of the tensor ({w}) must match the existing size ({have}) at non-singleton "
                    f"dimension {i}."
                )
            shape.append(w)
            strides.append(0 if have == 1 and w != 1 else stride)
        return self._view(tuple(shape), tuple(strides))

    def expand_as(self, other: Tensor) -> Tensor:
        return self.expand(other.shape)

    def _shape_for(self, sizes: tuple[Any, ...]) -> tuple[int, ...]:
        wanted = list(_sizes(sizes))
        n = self.numel()
        if wanted.count(-1) > 1:
            raise RuntimeError("only one dimension can be inferred")
        known = Size(d for d in wanted if d != -1).numel()
        if -1 in wanted and known:
            wanted[wanted.index(-1)] = n // known
        if Size(wanted).numel() != n or any(d < 0 for d in wanted):
            raise RuntimeError(f"shape '{list(_sizes(sizes))}' is invalid for input of size {n}")
        return tuple(wanted)

    def _strides_for(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Strides under which the same memory has another shape, if there are any."""
        if self.is_contiguous():
            return dense_strides(shape)
        result: list[int] = []
        todo = list(shape)
        chunk = 1
        base = self._strides[-1] if self._strides else 1
        for d in range(self.ndim - 1, -1, -1):
            chunk *= self._shape[d]
            ends = d == 0 or (self._shape[d - 1] != 1 and self._strides[d - 1] != chunk * base)
            if not ends:
                continue
            made = 1
            while todo and (made < chunk or todo[-1] == 1):
                result.insert(0, made * base)
                made *= todo.pop()
            if made != chunk:
                return None
            if d > 0:
                base, chunk = self._strides[d - 1], 1
        return tuple(result) if not todo else None

    def view(self, *sizes: Any) -> Tensor:
        if len(sizes) == 1 and isinstance(sizes[0], dtype):
            return self._reinterpreted(sizes[0])
        shape = self._shape_for(sizes)
        strides = self._strides_for(shape)
        if strides is None:
            raise RuntimeError(
                "view size is not compatible with input tensor's size and stride. Use .reshape(...) instead."
            )
        return self._view(shape, strides)

    def _reinterpreted(self, of: dtype) -> Tensor:
        if of.itemsize != self._dtype.itemsize:
            if not self.is_contiguous() or not self._shape or self._shape[-1] * self._dtype.itemsize % of.itemsize:
                raise NotImplementedError(
                    "stand-in torch: view(dtype) of another size of a tensor that is not contiguous"
                )
            last = self._shape[-1] * self._dtype.itemsize // of.itemsize
            shape = (*self._shape[:-1], last)
            t = self._view(shape, dense_strides(shape), self._offset * self._dtype.itemsize // of.itemsize)
        else:
            t = self._view(self._shape, self._strides)
        t._dtype = of
        return t

    def view_as(self, other: Tensor) -> Tensor:
        return self.view(other.shape)

    def reshape(self, *sizes: Any) -> Tensor:
        shape = self._shape_for(sizes)
        return self.view(shape) if self._strides_for(shape) is not None else self.contiguous().view(shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        if not self._shape:
            return self.reshape(1)
        a, b = self._dim(start_dim), self._dim(end_dim)
        return self.reshape(*self._shape[:a], self._shape[a : b + 1].numel(), *self._shape[b + 1 :])

    def unflatten(self, dim: int, sizes: Any) -> Tensor:
        dim = self._dim(dim)
        return self.reshape(*self._shape[:dim], *sizes, *self._shape[dim + 1 :])

    def _dim(self, dim: int, extra: int = 0) -> int:
        n = max(self.ndim + extra, 1)
        if not -n <= dim < n:
            raise IndexError(f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {dim})")
        return dim % n

    def unsqueeze(self, dim: int) -> Tensor:
        dim = self._dim(dim, 1)
        stride = self._strides[dim] * self._shape[dim] if dim < self.ndim else 1
        return self._view(
            (*self._shape[:dim], 1, *self._shape[dim:]), (*self._strides[:dim], stride, *self._strides[dim:])
        )

    def squeeze(self, dim: int | None = None) -> Tensor:
        kept = [i for i in range(self.ndim) if self._shape[i] != 1 or (dim is not None and i != self._dim(dim))]
        return self._view(tuple(self._shape[i] for i in kept), tuple(self._strides[i] for i in kept))

    def permute(self, *dims: Any) -> Tensor:
        order = [self._dim(d) for d in _sizes(dims)]
        if sorted(order) != list(range(self.ndim)):
            raise RuntimeError(f"permute(sparse_coo): dims {order} do not fit a tensor of {self.ndim} dimensions")
        return self._view(tuple(self._shape[i] for i in order), tuple(self._strides[i] for i in order))

    def transpose(self, a: int, b: int) -> Tensor:
        order = list(range(self.ndim))
        a, b = self._dim(a), self._dim(b)
        order[a], order[b] = order[b], order[a]
        return self.permute(order)

    def t(self) -> Tensor:
        return self.transpose(0, 1) if self.ndim == 2 else self

    @property
    def T(self) -> Tensor:  # noqa: N802 - torch's name
        return self.permute(*reversed(range(self.ndim)))

    @property
    def mT(self) -> Tensor:  # noqa: N802 - torch's name
        return self.transpose(-2, -1)

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        dim = self._dim(dim)
        if start < 0:
            start += self._shape[dim]
        if start + length > self._shape[dim]:
            raise RuntimeError(f"start ({start}) + length ({length}) exceeds dimension size ({self._shape[dim]}).")
        return self[(slice(None),) * dim + (slice(start, start + length),)]

    def select(self, dim: int, index: int) -> Tensor:
        return self[(slice(None),) * self._dim(dim) + (index,)]

    def split(self, size: Any, dim: int = 0) -> tuple[Tensor, ...]:
        dim = self._dim(dim)
        n = self._shape[dim]
        sizes = [min(size, n - i) for i in range(0, n, size)] if isinstance(size, int) else list(size)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self.narrow(dim, start, length) for start, length in zip(starts, sizes, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
        return self.split(-(-self._shape[self._dim(dim)] // chunks), dim)

    def unbind(self, dim: int = 0) -> tuple[Tensor, ...]:
        return tuple(self.select(dim, i) for i in range(self._shape[self._dim(dim)]))

    def __getitem__(self, index: Any) -> Tensor:
        items = list(index) if isinstance(index, tuple) else [index]
        used = sum(
            i.ndim if isinstance(i, Tensor) and i.dtype is bool_ else i is not None and i is not Ellipsis for i in items
        )
        if used > self.ndim:
            raise IndexError(f"too many indices for tensor of dimension {self.ndim}")
        if Ellipsis in [i for i in items if not isinstance(i, Tensor)]:
            at = next(k for k, i in enumerate(items) if i is Ellipsis)
            items[at : at + 1] = [slice(None)] * (self.ndim - used)
        shape: list[int] = []
        strides: list[int] = []
        offset, dim = self._offset, 0
        chosen: tuple[int, Tensor] | None = None
        for i in items:
            if i is None:
                shape.append(1)
                strides.append(self._strides[dim] * self._shape[dim] if dim < self.ndim else 1)
            elif isinstance(i, bool):
                raise NotImplementedError("stand-in torch: indexing with a bool")
            elif isinstance(i, slice):
                if i.step is not None and i.step <= 0:
                    raise ValueError("step must be greater than zero")
                start, stop, step = i.indices(self._shape[dim])
                shape.append(max(0, -(-(stop - start) // step)))
                strides.append(self._strides[dim] * step)
                offset += start * self._strides[dim]
                dim += 1
            elif isinstance(i, (Tensor, list, np.ndarray)):
                if chosen is not None:
                    raise NotImplementedError("stand-in torch: indexing with more than one tensor")
                i = i if isinstance(i, Tensor) else _functions.tensor(i, device=self.device)
                if i.dtype is bool_:
                    raise NotImplementedError("stand-in torch: indexing with a mask; use torch.where or masked_fill")
                chosen = len(shape), i
                shape.append(self._shape[dim])
                strides.append(self._strides[dim])
                dim += 1
            else:
                i = i.__index__()
                if not -self._shape[dim] <= i < self._shape[dim]:
                    raise IndexError(f"index {i} is out of bounds for dimension {dim} with size {self._shape[dim]}")
                offset += i % self._shape[dim] * self._strides[dim]
                dim += 1
        shape += self._shape[dim:]
        strides += self._strides[dim:]
        found = self._view(tuple(shape), tuple(strides), offset)
        return found if chosen is None else _functions._gather(found, *chosen)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, Tensor) and index.dtype is bool_:
            if isinstance(value, Tensor) and value.numel() != 1:
                raise NotImplementedError("stand-in torch: x[mask] = tensor")
            self.masked_fill_(_functions._broad(index, self.ndim), value)  # type: ignore[attr-defined]
            return
        items = index if isinstance(index, tuple) else (index,)
        if any(
            isinstance(i, (Tensor, list, np.ndarray)) and not (isinstance(i, Tensor) and i.ndim == 0) for i in items
        ):
            raise NotImplementedError("stand-in torch: x[tensor] = value")
        target = self[index]
        if isinstance(value, Tensor):
            target.copy_(value)
        else:
            target.fill_(value)


def _sizes(sizes: tuple[Any, ...], named: Any = None) -> tuple[int, ...]:
    if named is not None:
        if sizes:
            raise TypeError("got multiple values for argument 'size'")
        sizes = (named,)
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return tuple(int(s) for s in sizes)


def _current_stream(t: Tensor) -> int:
    from . import cuda

    return int(cuda.current_stream(t.device).cuda_stream)


Tensor.__module__ = "torch"
Tensor.__qualname__ = "Tensor"

from . import _functions  # noqa: E402 - which needs Tensor
