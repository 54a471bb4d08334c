"""Which layers of a network are to stay in fp32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..errors import BuildOptionError
from .hints import did_you_mean

__all__ = ["precision_layers"]

Layer = Mapping[str, Any]
# Layers that compute. TensorRT finds no way to convert between the types when constants, shapes and reshapes are
# constrained as well.
_COMPUTE = frozenset(
    {
        "ACTIVATION",
        "CONVOLUTION",
        "CUMULATIVE",
        "DECONVOLUTION",
        "EINSUM",
        "ELEMENTWISE",
        "GRID_SAMPLE",
        "LRN",
        "MATRIX_MULTIPLY",
        "NORMALIZATION",
        "PARAMETRIC_RELU",
        "POOLING",
        "RAGGED_SOFTMAX",
        "REDUCE",
        "RESIZE",
        "SCALE",
        "SOFTMAX",
        "UNARY",
    }
)
_FLOATS = frozenset({"float32", "float16", "bfloat16"})


def precision_layers(patterns: Sequence[str], layers: Sequence[Layer], *, norms: bool = False) -> tuple[int, ...]:
    """Indices, ascending, of the layers that ``--fp32-patterns`` and ``--fp32-norms`` ask for.

    A pattern is a shell pattern for the name of a layer or of one of its outputs. Norms are NORMALIZATION layers, and
    the layers that make up a LayerNorm or RMSNorm in an ONNX file before opset 17. Raises `BuildOptionError` where a
    pattern, or the norms, match no layer that computes in floating point.
    """
    usable = [layer for layer in layers if layer["type"] in _COMPUTE and _FLOATS.intersection(layer["output_dtypes"])]
    found: set[int] = set()
    for pattern in patterns:
        matched = {layer["index"] for layer in usable if _matches(layer, pattern)}
        if not matched:
            raise _unmatched(pattern, layers, usable)
        found |= matched
    if norms:
        matched = set(_norms(usable, layers))
        if not matched:
            raise BuildOptionError(
                "--fp32-norms: the network has no normalisation layer, and none in parts. Leave it out.",
                option="--fp32-norms",
            )
        found |= matched
    return tuple(sorted(found))


def _matches(layer: Layer, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (layer["name"], *layer["outputs"]))


def _unmatched(pattern: str, layers: Sequence[Layer], usable: Sequence[Layer]) -> BuildOptionError:
    names = [layer["name"] for layer in usable]
    inside = next((name for name in names if pattern in name), None)
    if any(_matches(layer, pattern) for layer in layers):
        why = "it matches only layers that do not compute in floating point, such as constants and reshapes."
    elif inside is not None:
        why = f"a pattern matches the whole name; {pattern!r} is within {inside!r}: write '*{pattern}*'."
    else:
        why = f"no layer and no output of one matches; --dump-layers lists them.{did_you_mean(pattern, names)}"
    return BuildOptionError(f"--fp32-patterns {pattern!r}: {why}", option="--fp32-patterns", found=pattern)


def _norms(usable: Iterable[Layer], layers: Iterable[Layer]) -> Iterator[int]:
    """NORMALIZATION layers, and every part of sqrt(mean(square) + epsilon) with what is divided by it.

    That chain is REDUCE, ELEMENTWISE with a constant, UNARY; in a softmax the second has no constant.
    """
    producers = {name: layer for layer in layers for name in layer["outputs"]}
    usable = list(usable)
    consumers: dict[str, list[Layer]] = {}
    for layer in usable:
        for name in layer["inputs"]:
            consumers.setdefault(name, []).append(layer)

    def after(layer: Layer, kind: str) -> list[Layer]:
        return [entry for name in layer["outputs"] for entry in consumers.get(name, ()) if entry["type"] == kind]

    def before(layer: Layer, kind: str) -> list[Layer]:
        found = [producers[name] for name in layer["inputs"] if name in producers]
        return [entry for entry in found if entry["type"] == kind]

    def constant(name: str) -> bool:
        layer = producers.get(name)
        while layer is not None and layer["type"] in ("SHUFFLE", "UNSQUEEZE", "CAST", "IDENTITY") and layer["inputs"]:
            layer = producers.get(layer["inputs"][0])
        return layer is not None and layer["type"] == "CONSTANT"

    for layer in usable:
        if layer["type"] == "NORMALIZATION":
            yield layer["index"]
        if layer["type"] != "REDUCE":
            continue
        for add in after(layer, "ELEMENTWISE"):
            roots = after(add, "UNARY")
            if not roots or not any(constant(name) for name in add["inputs"]):
                continue
            parts = [layer, add, *roots]
            inverses = [inverse for root in roots for inverse in after(root, "UNARY")]
            parts += inverses + [scaled for root in roots + inverses for scaled in after(root, "ELEMENTWISE")]
            for square in before(layer, "ELEMENTWISE"):
                parts.append(square)
                for difference in before(square, "ELEMENTWISE"):
                    means = before(difference, "REDUCE")  # of a LayerNorm; an RMSNorm has none
                    parts += [difference, *means] if means else []
            yield from (part["index"] for part in parts)
