"""Arguments and results of a function that `jetrt.graph` captures: their tensors, and a key of everything else.

Containers are tuples (named ones too), lists, dicts and `UserDict`s; subclasses of the last two with their attributes.
"""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from enum import Enum
from types import NoneType
from typing import Any

import numpy as np

# What never changes, and whose equality says all about its value. Floats are told apart further, by sign.
_PLAIN = frozenset({NoneType, bool, int, str, bytes, range, type(Ellipsis)})


class UnsupportedValueError(Exception):
    """A value that no key can stand for; the message says which and why."""


class Trees:
    """How torch's tensors are found in a value, and put back into another like it. `strides`: part of their keys."""

    def __init__(self, torch: Any, *, strides: bool = True) -> None:
        self._strides = strides
        self._tensor = torch.Tensor
        self._tensors = (torch.Tensor, torch.nn.Parameter)
        self._strided = torch.strided
        formats = (type(torch.strided), type(torch.contiguous_format))
        self._constants = (torch.dtype, torch.device, torch.Size, *formats, type)

    def key(self, value: Any, tensors: list[Any], name: str = "") -> Hashable:
        """A key of the value: its structure and names, the shape, dtype, device and (unless contiguous) strides of each
        tensor, and every other value. The tensors are appended to `tensors`, in order.

        Raises UnsupportedValueError for anything else; `name` is what the message calls the value.
        """
        kind = type(value)
        if kind in self._tensors:
            tensors.append(value)
            return self._tensor_key(value, name)
        if kind in _PLAIN:
            return (kind, value)
        if kind is float:
            return (kind, value, math.copysign(1.0, value))
        if kind is tuple or kind is list:
            return (kind, *(self.key(item, tensors, name) for item in value))
        if kind is dict:
            return (kind, *((type(k), k, self.key(v, tensors, name)) for k, v in value.items()))
        return self._unusual_key(kind, value, tensors, name)

    def _tensor_key(self, tensor: Any, name: str) -> Hashable:
        if tensor.layout != self._strided:
            raise UnsupportedValueError(f"{name or 'a value'} is a tensor of layout {tensor.layout}, not torch.strided")
        strides = tensor.stride() if self._strides and not tensor.is_contiguous() else None
        return (tensor.shape, tensor.dtype, tensor.device, strides)

    def _unusual_key(self, kind: type, value: Any, tensors: list[Any], name: str) -> Hashable:
        if isinstance(value, self._tensor):
            raise UnsupportedValueError(f"{name or 'a value'} is a {kind.__name__}, a subclass of torch.Tensor")
        if isinstance(value, self._constants):
            return (kind, value)
        if isinstance(value, np.generic):
            return (kind, value.tobytes())
        if isinstance(value, Enum):
            return (kind, value.name)
        if kind is complex:
            return (kind, value, math.copysign(1.0, value.real), math.copysign(1.0, value.imag))
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return (kind, *(self.key(item, tensors, name) for item in value))
        if isinstance(value, (dict, UserDict)):
            items = tuple((type(k), k, self.key(v, tensors, name)) for k, v in value.items())
            attributes = tuple((k, self.key(v, tensors, f"{name}.{k}")) for k, v in _attributes(value))
            return (kind, items, attributes)
        raise UnsupportedValueError(
            f"{name or 'a value'} is a {kind.__module__}.{kind.__qualname__}, whose value cannot be compared; allowed: "
            "tensors, numbers, strings, None, enums, dtypes, devices, and tuples, lists and dicts of them"
        )

    def with_tensors(self, value: Any, tensors: Iterator[Any]) -> Any:
        """The same value with other tensors in the places of its own, in the order of `key`."""
        kind = type(value)
        if kind in self._tensors:
            return next(tensors)
        if kind is tuple or kind is list:
            return kind(self.with_tensors(item, tensors) for item in value)
        if kind is dict:
            return {k: self.with_tensors(v, tensors) for k, v in value.items()}
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return kind(*(self.with_tensors(item, tensors) for item in value))
        if isinstance(value, (dict, UserDict)):
            made = copy.copy(value)
            for k, v in value.items():
                made[k] = self.with_tensors(v, tensors)
            for k, v in _attributes(value):
                setattr(made, k, self.with_tensors(v, tensors))
            return made
        return value

    def names(self, value: Any, name: str) -> Iterator[str]:
        """A name for each tensor, in the order of `key`."""
        if isinstance(value, self._tensors):
            yield name
        elif isinstance(value, (tuple, list)):
            fields: Sequence[Any] = getattr(value, "_fields", range(len(value)))
            for k, item in zip(fields, value, strict=True):
                yield from self.names(item, f"{name}.{k}" if name else str(k))
        elif isinstance(value, (dict, UserDict)):
            for k, v in (*value.items(), *_attributes(value)):
                yield from self.names(v, f"{name}.{k}" if name else str(k))

    def describe(self, value: Any, name: str) -> Iterator[str]:
        """`x float32[8, 64]` for each tensor, `steps=4` for each other value, shortened."""
        if isinstance(value, self._tensor):
            text = f"{name} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            if value.layout == self._strided and not value.is_contiguous():
                text += f" of strides {value.stride()}"
            yield text if value.is_cuda else f"{text} on {value.device}"
        elif isinstance(value, (tuple, list)):
            fields: Sequence[Any] = getattr(value, "_fields", range(len(value)))
            for k, item in zip(fields, value, strict=True):
                yield from self.describe(item, f"{name}.{k}")
        elif isinstance(value, (dict, UserDict)):
            for k, v in (*value.items(), *_attributes(value)):
                yield from self.describe(v, f"{name}.{k}")
        else:
            text = repr(value)
            yield f"{name}={text if len(text) <= 40 else text[:37] + '...'}"


def _attributes(value: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """What a mapping has besides its items; some have each item as an attribute too."""
    found = []
    for k, v in getattr(value, "__dict__", {}).items():
        if k == "data" and isinstance(value, UserDict):
            continue
        if k in value and value[k] is v:
            continue
        found.append((k, v))
    return found


def named_arguments(
    parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """(name, value) of each argument; positional ones that the function does not name are `#k`."""
    for k, value in enumerate(args):
        yield (parameters[k] if k < len(parameters) else f"#{k}"), value
    yield from kwargs.items()


def parameter_names(fn: Callable[..., Any]) -> list[str]:
    """The names of a function's positional parameters, as far as Python knows them."""
    import inspect

    try:
        # What a torch module is called with says its forward.
        parameters = inspect.signature(getattr(fn, "forward", fn)).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds]
