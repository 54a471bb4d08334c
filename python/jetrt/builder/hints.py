"""What is known about sizes beside the model: the flags ``--min``, ``--opt`` and ``--max``, and GR00T's metadata."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BuildOptionError

__all__ = ["Bound", "Hints", "did_you_mean", "read_metadata"]

Shape = tuple[int, ...]
LARGEST = 2**31 - 1  # of one dimension, in TensorRT

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
            low, high = (-(2**63), 2**63 - 1) if kind == "values" else (0, LARGEST)
            if any(name in names for names in found.values()):
                raise wrong(f"{option} {text}", f"{name!r} is given twice; a second profile is a second {option}")
            if not all(low <= number <= high for number in numbers):
                raise wrong(f"{option} {text}", f"{name!r}: a size is at least {low} and at most {high}")
            found[kind][name] = numbers
        return cls(found["shapes"], found["values"], {name: size for name, (size,) in found["dimensions"].items()})

    def sizes(self) -> dict[str, int]:
        """Every number by what it is of, in words."""
        found = {f"{name!r}, axis {i}": n for name, shape in self.shapes.items() for i, n in enumerate(shape)}
        found |= {f"{name!r}, value {i}": n for name, values in self.values.items() for i, n in enumerate(values)}
        return found | {f"the dimension {name!r}": n for name, n in self.dimensions.items()}

    def __str__(self) -> str:
        items = [f"{quote(name)}:{dims(shape)}" for name, shape in self.shapes.items()]
        items += [f"{quote(name)}=[{','.join(map(str, values))}]" for name, values in self.values.items()]
        items += [f"{quote(name)}={size}" for name, size in self.dimensions.items()]
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
                raise wrong(option, f"{name!r} is {value!r}; write a list of whole numbers")
            yield name, kind, tuple(numbers)
        return
    position = 0
    while position < len(text) or not position:
        match = _ITEM.match(text, position)
        if match is None:
            raise wrong(f"{option} {text}", f"cannot be read from {text[position:]!r} on; write {_SYNTAX}")
        position = match.end()
        name = json.loads(match["quoted"], strict=False) if match["quoted"] else match["name"].strip()
        if match["dims"] is not None:
            kind, parts = "shapes", match["dims"].split("x") if match["dims"] else []
        elif match["values"] is not None:
            kind, parts = "values", match["values"].split(",") if match["values"].strip() else []
        else:
            kind, parts = "dimensions", [match["size"]]
        if any(part.strip() == "?" for part in parts):
            raise wrong(f"{option} {text}", f"{name!r}: replace each ? by a number")
        try:
            yield name, kind, tuple(map(int, parts))
        except ValueError:
            raise wrong(f"{option} {text}", f"{name!r} has a part that is no number; write {_SYNTAX}") from None


def quote(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def dims(shape: Iterable[object]) -> str:
    return "x".join(map(str, shape))


def wrong(where: str, message: str, found: Any = None, allowed: Any = None) -> BuildOptionError:
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
GROOT_AXES: dict[tuple[str, int], str] = {
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
METADATA_KEYS = {  # key of export_metadata.json -> names of the dimension in the exported models
    "sa_seq_len": ("sa_seq_len",),
    "vl_seq_len": ("vl_seq_len",),
    "llm_seq_len": ("seq_len", "sequence_length"),
    "num_patches": ("num_patches",),
    "num_merged_patches": ("num_merged_patches",),
    "num_vis_tokens": ("num_vis_tokens",),
    "batch_size": ("batch_size", "batch"),
}
BATCH = frozenset({"batch_size", "batch"})
DEFAULT_SIZES = {"sa_seq_len": 51, "vl_seq_len": 280, "seq_len": 280, "sequence_length": 280}
MODEL_TYPES: dict[str, dict[str, tuple[int, int, int]]] = {
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
        raise wrong("--metadata", f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise wrong("--metadata", f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not content.keys() & METADATA_KEYS:
        known = ", ".join(METADATA_KEYS)
        raise wrong("--metadata", f"{path} has none of the sizes that a GR00T export writes: {known}")
    sizes = {}
    for key, names in METADATA_KEYS.items():
        size = content.get(key)
        if size is None:
            continue
        if type(size) is not int or not 0 < size <= LARGEST // 2:
            raise wrong("--metadata", f"{path} says {key} is {size!r}; it must be a whole number above 0", found=size)
        sizes.update(dict.fromkeys(names, size))
    return sizes
