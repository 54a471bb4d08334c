"""Optimisation profiles: what the command line, a metadata file and the model say, as min, opt and max of every input.

Nothing is guessed. A dynamic dimension that no hint covers is an error that prints the flags to add; two hints that
contradict each other are an error that names both. What a hint leaves open is filled like this: ``opt`` missing is
``max``, or ``min`` where that is all there is; ``min`` and ``max`` missing are ``opt``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import BuildOptionError
from .hints import (
    BATCH,
    DEFAULT_SIZES,
    GROOT_AXES,
    LARGEST,
    MODEL_TYPES,
    Bound,
    Hints,
    did_you_mean,
    dims,
    quote,
    wrong,
)

__all__ = ["Hints", "InputRange", "NetworkInput", "Profile", "resolve"]

Shape = tuple[int, ...]
#: A named dimension is one unknown wherever it appears (TensorRT takes equal names to mean equal sizes); one without
#: a name is an unknown of its own: (input, axis).
Key = str | tuple[str, int]

_BOUNDS = ("min", "opt", "max")

# ---------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class NetworkInput:
    """An input as TensorRT's parser or the ONNX file describes it; -1 is a dynamic dimension."""

    name: str
    dtype: str
    shape: Shape
    #: Its values, not only its shape, decide shapes inside the network.
    shape_tensor: bool = False
    #: One for each axis; ``None`` where the model gives no name. May be empty.
    dimension_names: tuple[str | None, ...] = ()

    @classmethod
    def from_mapping(cls, info: Mapping[str, Any]) -> NetworkInput:
        """From what `_core._Network.inputs` tells of one."""
        names = tuple(info["dimension_names"])
        return cls(info["name"], info["dtype"], tuple(info["shape"]), info["shape_tensor"], names)

    def key(self, axis: int) -> Key:
        name = self.dimension_names[axis] if axis < len(self.dimension_names) else None
        return name or (self.name, axis)


@dataclass(frozen=True)
class InputRange:
    min: Shape
    opt: Shape
    max: Shape

    def to_mapping(self) -> dict[str, list[int]]:
        return {bound: list(getattr(self, bound)) for bound in _BOUNDS}


@dataclass(frozen=True)
class Profile:
    """min <= opt <= max for every input."""

    #: Every execution input, static ones included.
    shapes: Mapping[str, InputRange]
    #: Shape tensors: min, opt and max of their values.
    values: Mapping[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON: ``{"shapes": {name: {"min": [...], "opt": [...], "max": [...]}}, "values": {...}}``."""
        values = {name: InputRange(*triple).to_mapping() for name, triple in self.values.items()}
        return {"shapes": {name: shape.to_mapping() for name, shape in self.shapes.items()}, "values": values}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Profile:
        def triple(entry: Mapping[str, Sequence[int]]) -> tuple[Shape, Shape, Shape]:
            low, opt, high = (tuple(map(int, entry[bound])) for bound in _BOUNDS)
            return low, opt, high

        shapes = {name: InputRange(*triple(entry)) for name, entry in mapping["shapes"].items()}
        return cls(shapes, {name: triple(entry) for name, entry in mapping.get("values", {}).items()})


# ---------------------------------------------------------------------------------------------------------- resolve


def resolve(inputs: Sequence[NetworkInput], hints: Hints) -> tuple[Profile, ...]:
    """The optimisation profiles. Flags win over ``max_seq_len``, that over metadata, that over ``model_type`` and the
    default hints; a weaker hint is narrowed to fit a stronger one. Raises `BuildOptionError`."""
    given = {bound: getattr(hints, bound) for bound in _BOUNDS}
    count = max(1, *map(len, given.values()))
    for bound, entries in given.items():
        if len(entries) not in (0, 1, count):
            raise BuildOptionError(
                f"--{bound} is given {len(entries)} times, another of --min, --opt, --max {count} times. The n-th of "
                "each makes the n-th profile; one that is given once holds for all; several inputs of one profile "
                "are separated by commas.",
                option=f"--{bound}",
                found=len(entries),
                allowed=[1, count],
            )
    network = _Network(inputs)
    padded = [entries * count if len(entries) == 1 else entries or (Bound(),) * count for entries in given.values()]
    return tuple(network.profile(bounds, hints) for bounds in zip(*padded, strict=True))


class _Network:
    """The unknowns of a network: which key stands for which axes."""

    def __init__(self, inputs: Sequence[NetworkInput]) -> None:
        self.inputs = {info.name: info for info in inputs}
        self.axes: dict[Key, list[tuple[NetworkInput, int]]] = {}
        for info in inputs:
            for axis in _dynamic(info):
                self.axes.setdefault(info.key(axis), []).append((info, axis))

    def names(self, key: Key) -> list[str]:
        """The names that a metadata file could know this dimension by, its own first."""
        own = [key] if isinstance(key, str) else []
        return own + [GROOT_AXES[info.name, axis] for info, axis in self.axes[key] if (info.name, axis) in GROOT_AXES]

    def where(self, key: Key) -> str:
        info, axis = self.axes[key][0]
        name = f" ({key})" if isinstance(key, str) else ""
        return f"input {info.name!r}, axis {axis}{name}"

    def profile(self, bounds: Sequence[Bound], hints: Hints) -> Profile:
        hard, soft = self.explicit(bounds), self.soft(hints)
        self.sequences(hints, hard, soft)
        missing = [key for key in self.axes if not hard.get(key) and not soft.get(key)]
        triples = {key: self.fill(key, hard.get(key, {}), soft.get(key, [])) for key in self.axes if key not in missing}
        values = {name: self.values(info, bounds) for name, info in self.inputs.items() if info.shape_tensor}
        absent = [name for name, triple in values.items() if triple is None]
        if missing or absent:
            raise self.uncovered(missing, absent, triples, bounds)

        shapes = {}
        for name, info in self.inputs.items():
            if not info.shape_tensor:
                sizes = [(n, n, n) if n >= 0 else triples[info.key(axis)] for axis, n in enumerate(info.shape)]
                shapes[name] = InputRange(*(tuple(size[i] for size in sizes) for i in range(3)))
        return Profile(shapes, {name: triple for name, triple in values.items() if triple is not None})

    # --- hints that must hold

    def explicit(self, bounds: Sequence[Bound]) -> dict[Key, dict[int, tuple[int, str]]]:
        hard: dict[Key, dict[int, tuple[int, str]]] = {}

        def record(key: Key, index: int, size: int, source: str) -> None:
            known = hard.setdefault(key, {}).setdefault(index, (size, source))
            if known[0] != size:
                raise BuildOptionError(
                    f"{known[1]} and {source} give the dimension {key!r} the sizes {known[0]} and {size}; inputs that "
                    "share a dimension have the same size there.",
                    option=f"--{_BOUNDS[index]}",
                    found=size,
                    allowed=known[0],
                )

        for index, bound in enumerate(bounds):
            option = f"--{_BOUNDS[index]}"
            for name, shape in bound.shapes.items():
                info, source = self.input(name, option), f"{option} {quote(name)}:{dims(shape)}"
                if len(shape) != len(info.shape):
                    raise wrong(
                        source,
                        f"{len(shape)} dimensions; the input has {len(info.shape)}: {_shown(info)}",
                        allowed=info.shape,
                    )
                for axis, (size, fixed) in enumerate(zip(shape, info.shape, strict=True)):
                    if fixed < 0 and not info.shape_tensor:
                        record(info.key(axis), index, size, source)
                    elif fixed not in (size, -1):
                        message = f"axis {axis} is {size}; the model fixes it to {fixed}"
                        raise wrong(source, message, found=size, allowed=fixed)
            for name, size in bound.dimensions.items():
                source = f"{option} {quote(name)}={size}"
                if name not in self.axes:
                    raise wrong(source, self.no_dimension(name), found=name, allowed=self.dimensions())
                record(name, index, size, source)
            for name, numbers in bound.values.items():
                info = self.input(name, option)
                if not info.shape_tensor:
                    source = f"{option} {quote(name)}=[…]"
                    raise wrong(source, f"{name!r} is no shape tensor; write its shape as {quote(name)}:1x3")
                length = 1
                for fixed in info.shape:
                    length *= fixed
                if -1 not in info.shape and length != len(numbers):
                    source = f"{option} {quote(name)}=[…]"
                    raise wrong(source, f"has {len(numbers)} values; the input has {length}", len(numbers), length)
        return hard

    def input(self, name: str, option: str) -> NetworkInput:
        info = self.inputs.get(name)
        if info is None:
            raise BuildOptionError(
                f"{option} names {name!r}; the model's inputs are {', '.join(map(repr, self.inputs)) or 'none'}."
                + did_you_mean(name, self.inputs),
                option=option,
                found=name,
                allowed=list(self.inputs),
            )
        return info

    def dimensions(self) -> list[str]:
        return [key for key in self.axes if isinstance(key, str)]

    def no_dimension(self, name: str) -> str:
        if name in self.inputs:
            tensor = self.inputs[name].shape_tensor
            return f"{name!r} is an input: write " + (f"{quote(name)}=[…]" if tensor else f"{quote(name)}:1x3")
        known = ", ".join(map(repr, self.dimensions())) or "none"
        return f"the model has no dynamic dimension {name!r}; it has {known}.{did_you_mean(name, self.dimensions())}"

    def sequences(
        self, hints: Hints, hard: dict[Key, dict[int, tuple[int, str]]], soft: dict[Key, list[dict[int, int]]]
    ) -> None:
        """``max_seq_len`` and ``opt_sa_seq``, which name no dimension themselves."""
        if hints.max_seq_len is not None:
            found = [key for key in self.axes if any(re.search("seq|length", n, re.I) for n in self.names(key))]
            if not found:
                dynamic = ", ".join(map(self.where, self.axes)) or "none"
                raise wrong(
                    "--max-seq-len", f"the model has no dynamic sequence dimension (dynamic are: {dynamic}); use --max"
                )
            for key in found:
                source = f"--max-seq-len {hints.max_seq_len}"
                size, flag = hard.setdefault(key, {}).setdefault(2, (hints.max_seq_len, source))
                if size > hints.max_seq_len:
                    raise wrong(source, f"{flag} asks for more: {size}", found=size, allowed=hints.max_seq_len)
                soft.setdefault(key, []).append({0: 1})
        if hints.opt_sa_seq is not None:
            size, source = hints.opt_sa_seq, f"--opt-sa-seq {hints.opt_sa_seq}"
            info = self.inputs.get("sa_embs")
            found = [key for key in self.axes if "sa_seq_len" in self.names(key)]
            if not found and (info is None or len(info.shape) < 2 or info.shape[1] != size):
                fixed = info.shape[1] if info is not None and len(info.shape) > 1 else None
                reason = (
                    f"the model fixes sa_embs to {fixed}" if fixed is not None else "the model has no input sa_embs"
                )
                raise wrong(source, reason, found=size, allowed=fixed)
            for key in found:
                known = hard.setdefault(key, {}).setdefault(1, (size, source))
                if known[0] != size:
                    raise wrong(source, f"{known[1]} says {known[0]}", found=size, allowed=known[0])
                soft.setdefault(key, []).append({0: 1})

    # --- hints that give way

    def soft(self, hints: Hints) -> dict[Key, list[dict[int, int]]]:
        """For each unknown the ranges that are known for it, best first."""
        levels = [{name: _generous(name, size) for name, size in hints.metadata.items()}]
        if hints.metadata:
            levels[0] = {**dict.fromkeys(BATCH, (1, 1, 8)), **levels[0]}
        if hints.model_type is not None:
            levels.append({**dict.fromkeys(BATCH, (1, 1, 1)), **MODEL_TYPES[hints.model_type]})
        if hints.allow_default_hints:
            sizes = {name: _generous(name, size) for name, size in DEFAULT_SIZES.items()}
            levels.append({**dict.fromkeys(BATCH, (1, 1, 8)), **sizes})
        result: dict[Key, list[dict[int, int]]] = {}
        for key in self.axes:
            known = [level[name] for level in levels for name in self.names(key) if name in level]
            if known:
                result[key] = [dict(enumerate(triple)) for triple in known]
        return result

    # --- from hints to numbers

    def fill(self, key: Key, hard: dict[int, tuple[int, str]], soft: list[dict[int, int]]) -> tuple[int, int, int]:
        chosen = {index: size for index, (size, _) in hard.items()}
        for low in range(3):
            for high in range(low + 1, 3):
                if low in chosen and high in chosen and chosen[low] > chosen[high]:
                    raise BuildOptionError(
                        f"{self.where(key)}: {_BOUNDS[low]} is {chosen[low]} ({hard[low][1]}), above {_BOUNDS[high]} "
                        f"{chosen[high]} ({hard[high][1]}); min <= opt <= max must hold.",
                        option=f"--{_BOUNDS[low]}",
                        found=chosen[low],
                        allowed=chosen[high],
                    )
        for level in soft:
            for index, size in level.items():
                if index not in chosen:
                    floor = max([chosen[i] for i in chosen if i < index], default=0)
                    ceiling = min([chosen[i] for i in chosen if i > index], default=LARGEST)
                    chosen[index] = min(max(size, floor), ceiling)
        opt = chosen.get(1, chosen.get(2, chosen.get(0)))
        assert opt is not None  # the caller has put aside what no hint covers
        return chosen.get(0, opt), opt, chosen.get(2, opt)

    def values(self, info: NetworkInput, bounds: Sequence[Bound]) -> tuple[Shape, Shape, Shape] | None:
        given = [bound.values.get(info.name) for bound in bounds]
        low, opt, high = given
        opt = opt if opt is not None else high if high is not None else low
        if opt is None:
            return None
        triple = (low if low is not None else opt, opt, high if high is not None else opt)
        if len(set(map(len, triple))) != 1:
            raise wrong("--min/--opt/--max", f"{info.name!r} has {[*map(len, triple)]} values in min, opt and max")
        for i, sizes in enumerate(zip(*triple, strict=True)):
            if not sizes[0] <= sizes[1] <= sizes[2]:
                raise BuildOptionError(
                    f"value {i} of the shape tensor {info.name!r}: min is {sizes[0]}, opt {sizes[1]}, max {sizes[2]}; "
                    "min <= opt <= max must hold.",
                    option="--min",
                    found=list(sizes),
                )
        return triple

    def uncovered(
        self, missing: list[Key], absent: list[str], known: Mapping[Key, tuple[int, int, int]], bounds: Sequence[Bound]
    ) -> BuildOptionError:
        """Says what no hint covers, with the whole flags to give: what was given already, and the rest."""
        open_axes = {i.name: [a for a in _dynamic(i) if i.key(a) in missing] for i in self.inputs.values()}
        inputs = [info for info in self.inputs.values() if open_axes[info.name]]
        what = []
        for info in inputs:
            keys = [(info.key(axis), axis) for axis in open_axes[info.name]]
            axes = ", ".join(key if isinstance(key, str) else f"axis {axis}" for key, axis in keys)
            what.append(f"the input {info.name!r} is {_shown(info)}, and nothing says how large {axes} can be")
        what += [f"{name!r} is a shape tensor, and nothing says which values it takes" for name in absent]

        def size(info: NetworkInput, axis: int, index: int) -> object:
            key = info.key(axis)
            if info.shape[axis] >= 0:
                return info.shape[axis]
            if key in known:
                return known[key][index]
            return 1 if key in BATCH else "?"

        flags = []
        for index, bound in enumerate(bounds):
            items = [str(bound)] if str(bound) else []
            items += [f"{quote(i.name)}:{dims(size(i, axis, index) for axis in range(len(i.shape)))}" for i in inputs]
            for name in absent:
                length = next((n for n in self.inputs[name].shape if n > 0), 1)
                items.append(f"{quote(name)}=[{','.join('?' * length)}]")
            flags.append(f"--{_BOUNDS[index]} {shlex.quote(','.join(items))}")
        text = f"{'; '.join(what)}. Give {' '.join(flags)}"
        if "?" in text:
            text += " with a number for each ?"
        return BuildOptionError(f"{text}.", option="--min", found=[i.name for i in inputs] + absent, allowed=flags)


def _generous(name: str, opt: int) -> tuple[int, int, int]:
    """The range that the scripts give a size of export_metadata.json."""
    return (1, opt, max(8, opt)) if name in BATCH else (1, opt, max(2 * opt, opt + 64))


def _dynamic(info: NetworkInput) -> list[int]:
    return [] if info.shape_tensor else [axis for axis, size in enumerate(info.shape) if size < 0]


def _shown(info: NetworkInput) -> str:
    """``[batch, 3, -1]``: dynamic dimensions by name where they have one."""
    keys = [info.key(axis) for axis in range(len(info.shape))]
    sizes = zip(info.shape, keys, strict=True)
    return f"[{', '.join(key if size < 0 and isinstance(key, str) else str(size) for size, key in sizes)}]"
