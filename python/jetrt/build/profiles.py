"""Optimisation profiles: what the command line, a metadata file and the model say, as min, opt and max of every input.

Nothing is guessed. A dynamic dimension that no hint covers is an error that prints the flags to add; two hints that
contradict each other are an error that names both. What a hint leaves open is filled like this: ``opt`` missing is
``max``, or ``min`` where that is all there is; ``min`` and ``max`` missing are ``opt``.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BuildOptionError

__all__ = ["Bound", "Hints", "InputRange", "NetworkInput", "Profile", "did_you_mean", "read_metadata", "resolve"]

Shape = tuple[int, ...]
#: A named dimension is one unknown wherever it appears (TensorRT takes equal names to mean equal sizes); one without
#: a name is an unknown of its own: (input, axis).
Key = str | tuple[str, int]

_BOUNDS = ("min", "opt", "max")
_LARGEST = 2**31 - 1  # of one dimension, in TensorRT

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


# ------------------------------------------------------------------------------------------------------------ hints

# Names are taken as they are, unless they hold what this syntax needs itself; then they stand in JSON's quotes.
_ITEM = re.compile(
    r'\s*(?:(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<name>[^",]+?))'
    r"(?::(?P<dims>[-0-9x?]*)|=\[(?P<values>[^\]]*)\]|=(?P<size>-?[0-9?]+))\s*(?:,|\Z)"
)
_PLAIN = re.compile(r'[^\s",=\[\]\\:](?:[^",=\[\]\\\n]*[^\s",=\[\]\\:])?')
_SYNTAX = (
    "NAME:1x3x224x224 for a shape, NAME=[1,2] for the values of a shape tensor, DIMENSION=128 for a named dimension"
)


@dataclass(frozen=True)
class Bound:
    """What one ``--min``, ``--opt`` or ``--max`` says."""

    shapes: Mapping[str, Shape] = field(default_factory=dict)
    #: Values of shape tensors.
    values: Mapping[str, Shape] = field(default_factory=dict)
    #: Sizes of named dimensions.
    dimensions: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | Mapping[str, Any], option: str = "--opt") -> Bound:
        """From ``x:1x3x224x224,n=[1,2],seq_len=128``, or from a mapping in which a list is a shape, a number is a
        dimension, and ``{"values": [...]}`` is for a shape tensor. Raises `BuildOptionError`."""
        found: dict[str, dict[str, Shape]] = {"shapes": {}, "values": {}, "dimensions": {}}
        for name, kind, numbers in _items(text, option):
            low, high = (-(2**63), 2**63 - 1) if kind == "values" else (0, _LARGEST)
            if any(name in names for names in found.values()):
                raise _wrong(f"{option} {text}", f"{name!r} is given twice; a second profile is a second {option}")
            if not all(low <= number <= high for number in numbers):
                raise _wrong(f"{option} {text}", f"{name!r}: a size is at least {low} and at most {high}")
            found[kind][name] = numbers
        return cls(found["shapes"], found["values"], {name: size for name, (size,) in found["dimensions"].items()})

    def sizes(self) -> dict[str, int]:
        """Every number by what it is of, in words."""
        found = {f"{name!r}, axis {i}": n for name, shape in self.shapes.items() for i, n in enumerate(shape)}
        found |= {f"{name!r}, value {i}": n for name, values in self.values.items() for i, n in enumerate(values)}
        return found | {f"the dimension {name!r}": n for name, n in self.dimensions.items()}

    def __str__(self) -> str:
        items = [f"{_quote(name)}:{_dims(shape)}" for name, shape in self.shapes.items()]
        items += [f"{_quote(name)}=[{','.join(map(str, values))}]" for name, values in self.values.items()]
        items += [f"{_quote(name)}={size}" for name, size in self.dimensions.items()]
        return ",".join(items)


def _items(text: str | Mapping[str, Any], option: str) -> Iterable[tuple[str, str, Shape]]:
    if not isinstance(text, str):
        for name, value in text.items():
            kind, numbers = "shapes", value
            if isinstance(value, int):
                kind, numbers = "dimensions", [value]
            elif isinstance(value, Mapping):
                kind, numbers = "values", value.get("values")
            if not isinstance(numbers, (list, tuple)) or any(type(number) is not int for number in numbers):
                raise _wrong(option, f"{name!r} is {value!r}; write a list of whole numbers")
            yield name, kind, tuple(numbers)
        return
    position = 0
    while position < len(text) or not position:
        match = _ITEM.match(text, position)
        if match is None:
            raise _wrong(f"{option} {text}", f"cannot be read from {text[position:]!r} on; write {_SYNTAX}")
        position = match.end()
        name = json.loads(match["quoted"], strict=False) if match["quoted"] else match["name"].strip()
        if match["dims"] is not None:
            kind, parts = "shapes", match["dims"].split("x") if match["dims"] else []
        elif match["values"] is not None:
            kind, parts = "values", match["values"].split(",") if match["values"].strip() else []
        else:
            kind, parts = "dimensions", [match["size"]]
        if any(part.strip() == "?" for part in parts):
            raise _wrong(f"{option} {text}", f"{name!r}: replace each ? by a number")
        try:
            yield name, kind, tuple(map(int, parts))
        except ValueError:
            raise _wrong(f"{option} {text}", f"{name!r} has a part that is no number; write {_SYNTAX}") from None


def _quote(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def _dims(shape: Iterable[object]) -> str:
    return "x".join(map(str, shape))


def _wrong(where: str, message: str, found: Any = None, allowed: Any = None) -> BuildOptionError:
    end = "" if message[-1] in ".?" else "."
    return BuildOptionError(f"{where}: {message}{end}", option=where.split()[0], found=found, allowed=allowed)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`` Did you mean 'images'?``, or nothing when no name is near."""
    near = difflib.get_close_matches(name, list(names), 3, 0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


@dataclass(frozen=True)
class Hints:
    """Everything that is known about sizes beside the model. The n-th `Bound` belongs to the n-th profile; a single
    one holds for all of them."""

    min: tuple[Bound, ...] = ()
    opt: tuple[Bound, ...] = ()
    max: tuple[Bound, ...] = ()
    #: Largest length of the dynamic sequence dimensions (those named ``*seq*`` or ``*length*``, and GR00T's).
    max_seq_len: int | None = None
    #: Length of GR00T's ``sa_embs`` to tune for: 1 + action horizon.
    opt_sa_seq: int | None = None
    #: Dimension name -> usual size, as `read_metadata` gives it.
    metadata: Mapping[str, int] = field(default_factory=dict)
    #: "dit" or "backbone": ranges that the fork's script has for them.
    model_type: str | None = None
    #: Fall back on GR00T's sizes for one GR1 camera where nothing else is known.
    allow_default_hints: bool = False


# GR00T: which dimension an axis is when the exporter left it without a name or made one up ("s77").
_GROOT_AXES: dict[tuple[str, int], str] = {
    ("sa_embs", 1): "sa_seq_len",
    ("vl_embs", 1): "vl_seq_len",
    ("image_mask", 1): "vl_seq_len",
    ("backbone_attention_mask", 1): "vl_seq_len",
    ("hidden_states", 1): "vl_seq_len",
    ("inputs_embeds", 1): "seq_len",
    ("input_ids", 1): "seq_len",
    ("attention_mask", 1): "seq_len",
    ("visual_pos_masks", 1): "seq_len",
    ("position_ids", 2): "seq_len",
    ("deepstack_0", 0): "num_vis_tokens",
    ("deepstack_1", 0): "num_vis_tokens",
    ("deepstack_2", 0): "num_vis_tokens",
}
_METADATA_KEYS = {  # key of export_metadata.json -> names of the dimension in the exported models
    "sa_seq_len": ("sa_seq_len",),
    "vl_seq_len": ("vl_seq_len",),
    "llm_seq_len": ("seq_len", "sequence_length"),
    "num_patches": ("num_patches",),
    "num_merged_patches": ("num_merged_patches",),
    "num_vis_tokens": ("num_vis_tokens",),
    "batch_size": ("batch_size", "batch"),
}
_BATCH = frozenset({"batch_size", "batch"})
_DEFAULT_SIZES = {"sa_seq_len": 51, "vl_seq_len": 280, "seq_len": 280, "sequence_length": 280}
_MODEL_TYPES: dict[str, dict[str, tuple[int, int, int]]] = {
    "dit": {"sa_seq_len": (1, 51, 256), "vl_seq_len": (1, 483, 1024)},
    "backbone": {"seq_len": (1, 483, 1024), "sequence_length": (1, 483, 1024)},
}


def read_metadata(path: str | Path) -> dict[str, int]:
    """Dimension name -> usual size from GR00T's ``export_metadata.json`` (or from the folder that holds it). Keys
    that are no size are left out. Raises `BuildOptionError`."""
    path = Path(path)
    if path.is_dir():
        path /= "export_metadata.json"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise _wrong("--metadata", f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _wrong("--metadata", f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not content.keys() & _METADATA_KEYS:
        known = ", ".join(_METADATA_KEYS)
        raise _wrong("--metadata", f"{path} has none of the sizes that a GR00T export writes: {known}")
    sizes = {}
    for key, names in _METADATA_KEYS.items():
        size = content.get(key)
        if size is None:
            continue
        if type(size) is not int or not 0 < size <= _LARGEST // 2:
            raise _wrong("--metadata", f"{path} says {key} is {size!r}; it must be a whole number above 0", found=size)
        sizes.update(dict.fromkeys(names, size))
    return sizes


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
        return own + [_GROOT_AXES[info.name, axis] for info, axis in self.axes[key] if (info.name, axis) in _GROOT_AXES]

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
                info, source = self.input(name, option), f"{option} {_quote(name)}:{_dims(shape)}"
                if len(shape) != len(info.shape):
                    raise _wrong(
                        source,
                        f"{len(shape)} dimensions; the input has {len(info.shape)}: {_shown(info)}",
                        allowed=info.shape,
                    )
                for axis, (size, fixed) in enumerate(zip(shape, info.shape, strict=True)):
                    if fixed < 0 and not info.shape_tensor:
                        record(info.key(axis), index, size, source)
                    elif fixed not in (size, -1):
                        message = f"axis {axis} is {size}; the model fixes it to {fixed}"
                        raise _wrong(source, message, found=size, allowed=fixed)
            for name, size in bound.dimensions.items():
                source = f"{option} {_quote(name)}={size}"
                if name not in self.axes:
                    raise _wrong(source, self.no_dimension(name), found=name, allowed=self.dimensions())
                record(name, index, size, source)
            for name, numbers in bound.values.items():
                info = self.input(name, option)
                if not info.shape_tensor:
                    source = f"{option} {_quote(name)}=[…]"
                    raise _wrong(source, f"{name!r} is no shape tensor; write its shape as {_quote(name)}:1x3")
                length = 1
                for fixed in info.shape:
                    length *= fixed
                if -1 not in info.shape and length != len(numbers):
                    source = f"{option} {_quote(name)}=[…]"
                    raise _wrong(source, f"has {len(numbers)} values; the input has {length}", len(numbers), length)
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
            return f"{name!r} is an input: write " + (f"{_quote(name)}=[…]" if tensor else f"{_quote(name)}:1x3")
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
                raise _wrong(
                    "--max-seq-len", f"the model has no dynamic sequence dimension (dynamic are: {dynamic}); use --max"
                )
            for key in found:
                source = f"--max-seq-len {hints.max_seq_len}"
                size, flag = hard.setdefault(key, {}).setdefault(2, (hints.max_seq_len, source))
                if size > hints.max_seq_len:
                    raise _wrong(source, f"{flag} asks for more: {size}", found=size, allowed=hints.max_seq_len)
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
                raise _wrong(source, reason, found=size, allowed=fixed)
            for key in found:
                known = hard.setdefault(key, {}).setdefault(1, (size, source))
                if known[0] != size:
                    raise _wrong(source, f"{known[1]} says {known[0]}", found=size, allowed=known[0])
                soft.setdefault(key, []).append({0: 1})

    # --- hints that give way

    def soft(self, hints: Hints) -> dict[Key, list[dict[int, int]]]:
        """For each unknown the ranges that are known for it, best first."""
        levels = [{name: _generous(name, size) for name, size in hints.metadata.items()}]
        if hints.metadata:
            levels[0] = {**dict.fromkeys(_BATCH, (1, 1, 8)), **levels[0]}
        if hints.model_type is not None:
            levels.append({**dict.fromkeys(_BATCH, (1, 1, 1)), **_MODEL_TYPES[hints.model_type]})
        if hints.allow_default_hints:
            sizes = {name: _generous(name, size) for name, size in _DEFAULT_SIZES.items()}
            levels.append({**dict.fromkeys(_BATCH, (1, 1, 8)), **sizes})
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
                    ceiling = min([chosen[i] for i in chosen if i > index], default=_LARGEST)
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
            raise _wrong("--min/--opt/--max", f"{info.name!r} has {[*map(len, triple)]} values in min, opt and max")
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
            return 1 if key in _BATCH else "?"

        flags = []
        for index, bound in enumerate(bounds):
            items = [str(bound)] if str(bound) else []
            items += [f"{_quote(i.name)}:{_dims(size(i, axis, index) for axis in range(len(i.shape)))}" for i in inputs]
            for name in absent:
                length = next((n for n in self.inputs[name].shape if n > 0), 1)
                items.append(f"{_quote(name)}=[{','.join('?' * length)}]")
            flags.append(f"--{_BOUNDS[index]} {shlex.quote(','.join(items))}")
        text = f"{'; '.join(what)}. Give {' '.join(flags)}"
        if "?" in text:
            text += " with a number for each ?"
        return BuildOptionError(f"{text}.", option="--min", found=[i.name for i in inputs] + absent, allowed=flags)


def _generous(name: str, opt: int) -> tuple[int, int, int]:
    """The range that the scripts give a size of export_metadata.json."""
    return (1, opt, max(8, opt)) if name in _BATCH else (1, opt, max(2 * opt, opt + 64))


def _dynamic(info: NetworkInput) -> list[int]:
    return [] if info.shape_tensor else [axis for axis, size in enumerate(info.shape) if size < 0]


def _shown(info: NetworkInput) -> str:
    """``[batch, 3, -1]``: dynamic dimensions by name where they have one."""
    keys = [info.key(axis) for axis in range(len(info.shape))]
    sizes = zip(info.shape, keys, strict=True)
    return f"[{', '.join(key if size < 0 and isinstance(key, str) else str(size) for size, key in sizes)}]"
