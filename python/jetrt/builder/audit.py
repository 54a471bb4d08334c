"""Precision audit: in what the layers of a plan compute, against what was asked for, weighted by measured time.

Input is the JSON of TensorRT's engine inspector (detailed verbosity, from a context whose shapes are set) and the time
of each layer. What a matrix layer (GEMM, convolution, attention) multiplies in is read from the name of its kernel,
else, for a layer that is one kernel, from the formats of its operands. A fused layer (Myelin's ForeignNode and
generated kernels) shows formats at its edges only, so inside it is *unknown* unless its kernel says more. Unknown never
counts as what was asked for.

Sources: names of kernels and formats are those in libnvinfer 10.6.0; the layout of the JSON is that of
NVIDIA/TensorRT tools/experimental/trt-engine-explorer and of TensorRT 10.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..errors import BuildOptionError, EngineBuildError, PrecisionError
from ..report import table

__all__ = ["ACCEPTED", "Audit", "Row", "audit", "check", "tactic_precision"]

#: What a matrix layer may multiply in, for each request. "mixed" allows everything below fp32.
ACCEPTED: Mapping[str, frozenset[str]] = {
    **{name: frozenset((name,)) for name in ("fp32", "tf32", "fp16", "bf16", "int8", "fp8", "int4", "fp4")},
    "mixed": frozenset(("fp16", "bf16", "int8", "fp8", "int4", "fp4")),
}

# ------------------------------------------------------------------------------------------------- names of kernels

_TYPES = {
    **dict.fromkeys(("f32", "fp32", "float"), "fp32"),
    "tf32": "tf32",
    **dict.fromkeys(("f16", "fp16", "half", "hmma"), "fp16"),
    "bf16": "bf16",
    **dict.fromkeys(("i8", "s8", "u8", "int8", "imma"), "int8"),
    **dict.fromkeys(("e4m3", "e5m2", "fp8"), "fp8"),
    **dict.fromkeys(("i4", "int4"), "int4"),
    **dict.fromkeys(("e2m1", "fp4", "nvfp4"), "fp4"),
}
_ANY = "|".join(sorted((*_TYPES, "i32", "s32"), key=len, reverse=True))
# sm80_xmma_gemm_f16f16_f16f32_f32_…: operand and result, then what is multiplied and what is summed, then the epilogue.
_XMMA = re.compile(rf"_({_ANY})(?:{_ANY})_({_ANY})(?:{_ANY})?_")
# trt_turing_cutlass_…_f16f16f32_…, cutlass3x_sm90_…gemm_f16_f16_f32_…: two operands and the sum.
_OPERANDS = re.compile(rf"_({_ANY})_?(?:{_ANY})_?(?:f32|f16|s32|i32)_")
# ampere_h16816gemm_…, ampere_fp16_s16816gemm_fp16_… (result, sum, operand), turing_fp32_i8816cudnn_int8_…
_CASK = re.compile(rf"(?:^|_)([hsi])(\d*)({_ANY})?(?:gemm|cudnn)(?:_winograd)?(?:_({_ANY})(?=_|x\d|$))?")
_WORD = re.compile(rf"(?<![a-z0-9])({_ANY})(?![a-z0-9])|depthwise(fp32|hmma)|(int8)int8|(i8)i8")


def tactic_precision(name: str) -> str | None:
    """What the kernel called `name` multiplies in ("fp16", "tf32", …); ``None`` where the name does not say.

    A kernel that reads fp16 and multiplies in fp32 registers (``gemvx``, ``fp16_sgemm_fp16``) counts as fp16: its
    operands are.
    """
    name = name.lower()
    if found := _XMMA.search(name):
        operand, product = (_TYPES.get(text) for text in found.groups())
        return operand if product == "fp32" else product
    if found := _CASK.search(name):
        kind, shape, inside, operand = found.groups()
        if kind != "s":
            return {"h": "fp16", "i": "int8"}[kind]
        if inside or operand:
            return _TYPES.get(inside or operand)
        if not shape:
            return "fp32"
        if shape == "884":
            return "fp16"  # Volta's tensor cores have nothing else
    if found := _OPERANDS.search(name):
        operand = _TYPES.get(found[1])
        return None if operand == "fp32" else operand  # tensor cores take it as tf32, others do not
    words = {_TYPES.get(next(filter(None, match.groups()))) for match in _WORD.finditer(name)} - {None}
    return words.pop() if len(words) == 1 else None


# ---------------------------------------------------------------------------------------------------------- layers

_FORMAT = re.compile(
    r"\b(?:(?P<fp32>FP32|Float|float32)|(?P<fp16>FP16|Half|float16)|(?P<bf16>BF16|BFloat16)|(?P<fp8>FP8|E4M3|Float8)"
    r"|(?P<int8>Int8)|(?P<int4>Int4)|(?P<fp4>FP4|E2M1)|(?P<int64>Int64)|(?P<int32>Int32)|(?P<uint8>UInt8)|(?P<bool>Bool))",
    re.IGNORECASE,
)
_FLOATS = frozenset(("fp32", "fp16", "bf16", "fp8", "fp4", "int8", "int4"))
_MATRIX = re.compile(
    r"conv(?!ert)|gemm|gemv|matmul|matri|correlation|fully|einsum|attention|mha|lstm|rnn|fprop|winograd|linear"
)
_MATRIX_KERNEL = re.compile(r"gemm|gemv|conv(?!ert)|mha|fprop|winograd")
_GENERATED = re.compile(r"__myl_(?P<operations>[A-Za-z0-9]*)")
_MATRIX_OPERATION = re.compile(r"Fc|Corr|Gemm|Conv|Dot|MulSum|Mha")
_FUSED_TYPES = frozenset(("kgen", "myelin", "foreignnode"))
# Layers that move or reshape data, by name, for when the inspector gives the name alone.
_HARMLESS = re.compile(
    r"^Reformatting CopyNode|^PWN\(|^\[trainStation| copy$|\[(?:Constant|Shuffle|Slice|NMS)\]|HostCopy\]"
)
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]\x1f]*)")


@dataclass(frozen=True)
class Row:
    """One layer of the plan."""

    name: str
    #: TensorRT's name of the layer's kind; "" where the inspector does not say.
    type: str
    #: What it may compute in: one precision, several where they cannot be told apart, none where nothing is known.
    possible: tuple[str, ...]
    #: Types of its inputs and outputs, as "fp16 -> fp32".
    edges: str
    tactic: str
    #: Median time of a call in milliseconds; ``None``: not measured.
    ms: float | None
    #: GEMM, convolution, attention, or something that may hide one.
    matrix: bool

    @property
    def precision(self) -> str:
        return " or ".join(self.possible) or "unknown"

    def to_mapping(self) -> dict[str, Any]:
        return {**vars(self), "possible": list(self.possible), "precision": self.precision}


def _row(layer: Any, ms: float | None) -> Row:
    if not isinstance(layer, dict):
        layer = {"Name": str(layer)}
    name, kind = str(layer.get("Name") or ""), str(layer.get("LayerType") or "")
    tactic, parameter = str(layer.get("TacticName") or ""), str(layer.get("ParameterType") or "")
    inputs, outputs = _formats(layer.get("Inputs")), _formats(layer.get("Outputs"))
    edges = f"{_join(inputs)} -> {_join(outputs)}" if inputs or outputs else ""
    generated = _GENERATED.match(name)
    whole = "ForeignNode[" in name or kind.lower() in ("myelin", "foreignnode")
    fused = whole or generated is not None or kind.lower() in _FUSED_TYPES

    if not kind and not tactic:
        matrix = not _HARMLESS.search(name)
    elif fused:
        nodes = _ONNX_NODE.findall(str(layer.get("Metadata") or ""))
        matrix = (
            whole
            or bool(_MATRIX_KERNEL.search(tactic.lower()) or _MATRIX.search(kind.lower()))
            or bool(_MATRIX_OPERATION.search(generated["operations"] if generated else name))
            or any(_MATRIX.search(node.rpartition("/")[2].lower()) for node in nodes)
        )
    else:
        told = f"{kind} {parameter}".lower()
        matrix = bool(_MATRIX.search(told) or _MATRIX_KERNEL.search(tactic.lower())) or (
            "plugin" in told and bool(_MATRIX.search(name.lower()))
        )

    said = tactic_precision(tactic) if matrix else None
    possible: tuple[str, ...] = ()
    if said is not None:
        possible = (said,)
    elif matrix and not fused and kind:
        possible = _of_operands(inputs, layer.get("Weights"))
    elif not matrix:
        floats = {text for text in (*inputs, *outputs) if text in _FLOATS}
        possible = (floats.pop(),) if len(floats) == 1 else ()
    return Row(name, kind, possible, edges, tactic, ms, matrix)


def _of_operands(inputs: Sequence[str], weights: Any) -> tuple[str, ...]:
    """A layer that is one kernel multiplies what it reads: its first input, and its weights where they are listed."""
    operands = {*inputs[:1]}
    if isinstance(weights, dict):
        operands |= {*_formats([{"Format/Datatype": weights.get("Type")}])}
    if len(operands) != 1 or not operands <= _FLOATS:
        return ()
    (operand,) = operands
    return ("fp32", "tf32") if operand == "fp32" else (operand,)


def _formats(tensors: Any) -> list[str]:
    """Types of the tensors; "?" where TensorRT does not say ("N/A due to dynamic shapes") or in words not known."""
    found = []
    for tensor in tensors if isinstance(tensors, list) else ():
        text = tensor.get("Format/Datatype", tensor.get("Datatype")) if isinstance(tensor, dict) else None
        match = _FORMAT.search(str(text or ""))
        found.append(match.lastgroup or "?" if match else "?")
    return found


def _join(types: Sequence[str]) -> str:
    return "+".join(dict.fromkeys(types)) or "-"


# ----------------------------------------------------------------------------------------------------------- result


@dataclass(frozen=True)
class Audit:
    requested: str
    rows: tuple[Row, ...]
    #: Part of the matrix layers' time that runs in what was asked for, 0 to 1; ``None``: there are no such layers.
    share: float | None
    #: The same for every precision that was found ("unknown" among them); adds up to 1.
    shares: Mapping[str, float]
    #: "time", or "layers" where no time was measured.
    weighted_by: str
    findings: tuple[str, ...]

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        """Matrix layers that compute in something else than what was asked for, longest first."""
        accepted = ACCEPTED[self.requested]
        rows = [row for row in self.rows if row.matrix and row.possible and accepted.isdisjoint(row.possible)]
        return tuple(sorted(rows, key=_time, reverse=True))

    def to_mapping(self) -> dict[str, Any]:
        return {
            "requested": self.requested,
            "share": self.share,
            "shares": dict(self.shares),
            "weighted_by": self.weighted_by,
            "fallbacks": [row.name for row in self.fallbacks],
            "findings": list(self.findings),
            "layers": [row.to_mapping() for row in self.rows],
        }

    def table(self, limit: int | None = None) -> str:
        """Layers by time, longest first; a star marks those that count for the share."""
        total = sum(map(_time, self.rows))
        rows = sorted(self.rows, key=_time, reverse=True)
        lines = [
            [
                "*" if row.matrix else "",
                _shorten(row.name),
                row.type or "?",
                row.precision if row.possible or row.matrix else "-",
                row.edges,
                "-" if row.ms is None else f"{row.ms:.4f}",
                f"{100 * _time(row) / total:.1f} %" if total and row.ms is not None else "-",
            ]
            for row in rows[:limit]
        ]
        text = table(["", "layer", "type", "precision", "in -> out", "ms", "share"], lines)
        if limit is not None and len(rows) > limit:
            text += f"\n… and {len(rows) - limit} more layers"
        return text


def audit(
    inspector_json: str | bytes | Mapping[str, Any],
    times: Mapping[str, Sequence[float]] | Iterable[tuple[str, Sequence[float]]],
    requested: str,
) -> Audit:
    """Audits a plan.

    `times` are the milliseconds of each layer as the profiler names it, one for each call; a name that comes twice is
    the second layer of that name. Without any time every layer counts the same. Raises `BuildOptionError` for a request
    that is none of `ACCEPTED`, `EngineBuildError` where `inspector_json` is not the inspector's.
    """
    if requested not in ACCEPTED:
        raise BuildOptionError(
            f"precision {requested!r} cannot be audited; allowed: {', '.join(ACCEPTED)}",
            option="--precision",
            found=requested,
            allowed=list(ACCEPTED),
        )
    layers = _layers(inspector_json)
    measured: defaultdict[str, deque[float]] = defaultdict(deque)
    for name, milliseconds in times.items() if isinstance(times, Mapping) else times:
        if len(milliseconds):
            measured[name].append(float(median(milliseconds)))

    rows = []
    for layer in layers:
        waiting = measured[str(layer.get("Name") if isinstance(layer, dict) else layer)]
        rows.append(_row(layer, waiting.popleft() if waiting else None))
    # What ran and is not in the inspector's list is a layer all the same, of which nothing is known but the time.
    unlisted = [_row(name, ms) for name, waiting in measured.items() for ms in waiting]
    rows += unlisted

    matrix = [row for row in rows if row.matrix]
    timed = any(row.ms is not None for row in rows)
    weights = [_time(row) if timed else 1.0 for row in matrix]
    total = sum(weights)
    shares: defaultdict[str, float] = defaultdict(float)
    share = 0.0
    accepted = ACCEPTED[requested]
    for row, weight in zip(matrix, weights, strict=True):
        if weight:
            shares[row.precision] += weight / total
            share += weight / total if row.possible and accepted.issuperset(row.possible) else 0
    result = Audit(
        requested=requested,
        rows=tuple(rows),
        share=min(share, 1.0) if total else None,
        shares=dict(sorted(shares.items(), key=lambda item: -item[1])),
        weighted_by="time" if timed else "layers",
        findings=(),
    )
    return Audit(**{**vars(result), "findings": tuple(_findings(result, layers, unlisted, timed))})


def check(result: Audit, required_percent: float) -> None:
    """Raises `PrecisionError` where less than `required_percent` of the matrix layers' time runs in what was asked for.

    A plan whose layers are all known and of which none is a matrix layer passes: there is nothing to require.
    """
    if result.rows and result.share is None and not any(row.matrix for row in result.rows):
        return
    found = None if result.share is None else 100 * result.share
    if found is not None and found >= required_percent - 1e-9:
        return
    lines = [
        f"{'an unknown part' if found is None else f'{found:.1f} %'} of the GEMM and convolution "
        f"{result.weighted_by} runs in {result.requested}; --require-precision asks for {required_percent:g} %."
    ]
    others = [
        row
        for row in result.rows
        if row.matrix and not ACCEPTED[result.requested].issuperset(row.possible or ("unknown",))
    ]
    others.sort(key=_time, reverse=True)
    for row in others[:10]:
        lines.append(f"  {row.precision}: {_shorten(row.name)}" + ("" if row.ms is None else f" ({row.ms:.4f} ms)"))
    if len(others) > 10:
        lines.append(f"  … and {len(others) - 10} more")
    lines += [f"  {finding}" for finding in result.findings[1:]]
    lines.append(
        "Next step: look at these layers with `jetrt inspect`; strong typing or another --opt-level may place them, or "
        "lower --require-precision if they may stay."
    )
    raise PrecisionError("\n".join(lines), found=found, allowed=required_percent)


def _layers(inspector_json: str | bytes | Mapping[str, Any]) -> list[Any]:
    data: Any = inspector_json
    if isinstance(inspector_json, (str, bytes)):
        try:
            data = json.loads(inspector_json)
        except (ValueError, RecursionError) as error:
            raise EngineBuildError(f"the engine inspector's answer is not JSON: {error}") from None
    layers = data.get("Layers") if isinstance(data, Mapping) else None
    if not isinstance(layers, list):
        raise EngineBuildError('the engine inspector\'s answer has no list "Layers"; the plan cannot be audited')
    return layers


def _findings(result: Audit, layers: Sequence[Any], unlisted: Sequence[Row], timed: bool) -> Iterable[str]:
    asked, what = result.requested, f"the GEMM and convolution {result.weighted_by}"
    matrix = [row for row in result.rows if row.matrix]
    if not result.rows:
        yield f"precision audit: {asked} was asked for, and the inspector lists no layer"
    elif not matrix:
        yield f"precision audit: {asked} was asked for; no GEMM and no convolution in this plan"
    elif result.share is None:
        yield f"precision audit: {asked} was asked for; no GEMM or convolution ran while the layers were timed"
    else:
        others = [
            f"{100 * part:.3g} % in {name}" for name, part in result.shares.items() if name not in ACCEPTED[asked]
        ]
        yield ", ".join(
            [f"precision audit: {asked} was asked for; {100 * result.share:.3g} % of {what} runs in it", *others]
        ).replace("% in unknown", "% unknown")
    tf32 = [row for row in matrix if "tf32" in row.possible and asked == "fp32"]
    if tf32:
        certain = sum(row.possible == ("tf32",) for row in tf32)
        yield (
            f"layers multiply in TF32 (10 bits of mantissa) although fp32 was asked for: {certain} for certain, "
            f"{len(tf32) - certain} perhaps; the TF32 flag is on unless it is cleared"
        )
    if layers and not any(isinstance(layer, dict) for layer in layers):
        yield "the inspector gave names only: build with detailed profiling verbosity"
    blind = sum("?" in row.edges and not row.possible for row in matrix)
    if blind:
        yield f"the inspector gave no formats for {blind} of these layers: inspect with a context whose shapes are set"
    if unlisted:
        ms = sum(map(_time, unlisted))
        yield f"measured but not listed by the inspector: {len(unlisted)} ({ms:.4f} ms), e.g. {unlisted[0].name!r}"
    idle = [row for row in matrix if row.ms is None]
    if timed and idle:
        yield f"{len(idle)} of these layers did not run while the layers were timed, e.g. {idle[0].name!r}"


def _time(row: Row) -> float:
    return row.ms or 0.0


def _shorten(name: str, width: int = 72) -> str:
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-(width // 2) :]}"
