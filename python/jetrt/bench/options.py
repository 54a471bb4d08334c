"""What a bench may be asked for, checked before anything runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from ..errors import BenchOptionError
from ..runtime import Precision
from .timing import Plan

__all__ = ["AUTOCAST", "RUNTIMES", "BenchOptions", "RuntimeRow", "shape_of"]


@dataclass(frozen=True)
class RuntimeRow:
    """A runtime as a bench knows it."""

    #: Kinds of subject that it runs.
    kinds: tuple[str, ...]
    #: Precisions that it can be asked for; others are no rows of it.
    precisions: tuple[str, ...]
    #: As the CSV names it.
    csv: str
    #: Whether what it compiles takes time worth a column.
    compiles: bool = False


_ALL = get_args(Precision)
#: "python" is the callable itself.
RUNTIMES: Mapping[str, RuntimeRow] = {
    "tensorrt": RuntimeRow(("onnx", "plan"), _ALL, "tensorrt", compiles=True),
    "onnx_trt_ep": RuntimeRow(("onnx",), ("fp32", "fp16", "bf16", "int8"), "onnx_trt_ep", compiles=True),
    "pytorch_fp16": RuntimeRow(("torch",), ("fp32", "fp16", "bf16"), "pytorch_fp16"),
    "torch_tensorrt": RuntimeRow(("torch",), ("fp32", "fp16", "bf16"), "torch_tensorrt", compiles=True),
    "onnx_cpu": RuntimeRow(("onnx",), ("fp32",), "onnx_cpu"),
    "openvino_cpu": RuntimeRow(("onnx",), ("fp32",), "ovcpu", compiles=True),
    "python": RuntimeRow(("callable",), ("fp32", "fp16", "bf16"), "python"),
}

#: --autocast-dtype -> precision.
AUTOCAST = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Raises `BenchOptionError` for values that make no sense."""

    #: ``None``: every runtime that runs the subject's kind.
    runtimes: tuple[str, ...] | None = None
    #: ``None``: fp32, fp16, bf16 and int8, as far as a runtime has them; torch and callables: that of `autocast_dtype`.
    precisions: tuple[str, ...] | None = None
    #: ``None``: 1, or what the model is fixed at.
    batches: tuple[int, ...] | None = None
    #: Threads that call at once.
    concurrency: tuple[int, ...] = (1,)
    #: Input name -> (shape, type or None); the type is for torch modules, whose inputs have none.
    shapes: Mapping[str, tuple[tuple[int, ...], str | None]] = field(default_factory=dict)
    #: Fills dynamic heights and widths of 4-dimensional inputs, and names the results.
    imgsz: int | None = None
    #: .npz file of inputs.
    inputs: Path | None = None
    #: .npz file of outputs, or for a plan its .onnx file.
    reference: Path | None = None
    #: Of these, what its signature does not take is left out and named.
    arguments: Mapping[str, Any] = field(default_factory=dict)
    #: Callables: the argument that holds a clip, frames along its first axis.
    clip: str | None = None
    #: Callables: called for one frame of the clip after the other.
    per_frame: bool = False
    #: ``None``: "float16".
    autocast_dtype: str | None = None
    #: Number of a GPU, or "cpu" (torch).
    device: int | str = 0
    #: Where inputs begin and outputs end: "host" counts the copies.
    data: str = "host"
    graphs: str = "auto"
    #: Of onnxruntime and OpenVINO on the CPU.
    threads: int | None = None
    seed: int = 0
    timing: Plan = field(default_factory=Plan)
    #: Options of `jetrt.build` for the plans that are built, such as {"opt_level": 2}.
    build: Mapping[str, Any] = field(default_factory=dict)
    #: Sums over the subjects, as components of a pipeline.
    totals: bool = True
    #: Folder for plans that are built; ``None``: beside the model.
    plans: Path | None = None

    def __post_init__(self) -> None:
        for name in ("runtimes", "precisions", "batches", "concurrency"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(dict.fromkeys([value] if isinstance(value, str) else value)))
        for name in ("inputs", "reference", "plans"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))
        for problem in _problems(self):
            raise problem

    @property
    def autocast(self) -> str:
        return self.autocast_dtype or "float16"

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Plan):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _refused(option: str, found: Any, allowed: str, step: str = "") -> BenchOptionError:
    text = f"{option} is {found!r}; allowed: {allowed}.{f' {step}' if step else ''}"
    return BenchOptionError(text, option=option, found=found, allowed=allowed)


def _problems(o: BenchOptions) -> Iterator[BenchOptionError]:
    for name in o.runtimes or ():
        if name not in RUNTIMES:
            yield _refused("--runtime", name, ", ".join(RUNTIMES), "Nothing else is tried in its place.")
    for name in o.precisions or ():
        if name not in _ALL:
            yield _refused("--precision", name, ", ".join(_ALL))
    choices: tuple[tuple[str, Any, Sequence[Any]], ...] = (
        ("--autocast-dtype", o.autocast, tuple(AUTOCAST)),
        ("--data", o.data, ("host", "device")),
        ("--graphs", o.graphs, ("auto", "off", "require")),
    )
    for option, value, allowed in choices:
        if value not in allowed:
            yield _refused(option, value, ", ".join(allowed))
    for option, values in (("--batch", o.batches), ("--concurrency", o.concurrency)):
        if values == ():
            yield _refused(option, [], "at least one")
        for value in values or ():
            if not _whole(value, 1):
                yield _refused(option, value, "whole numbers from 1")
    if not (_whole(o.device, 0) or o.device == "cpu"):
        yield _refused("--device", o.device, "the number of a GPU, or cpu")
    for option, value, least in (("--imgsz", o.imgsz, 1), ("--threads", o.threads, 1), ("--seed", o.seed, 0)):
        if value is not None and not _whole(value, least):
            yield _refused(option, value, f"a whole number from {least}")
    t = o.timing
    for option, value, least in (("--iterations", t.calls, 1), ("--warmup", t.min_calls, 1)):
        if not _whole(value, least):
            yield _refused(option, value, f"a whole number from {least}")
    seconds = {
        "--duration": t.seconds,
        "--time-limit": t.limit_seconds,
        "--warmup-limit": t.max_seconds,
        "--idle-ms": t.idle_ms,
    }
    for option, number in seconds.items():
        if not _number(number):
            yield _refused(option, number, "a number from 0")
    for option, path in (("--inputs", o.inputs), ("--reference", o.reference)):
        if path is not None and not path.is_file():
            yield BenchOptionError(f"{option} {path}: there is no such file.", option=option, found=str(path))
    if o.per_frame and o.clip is None:
        yield BenchOptionError(
            "--per-frame needs --clip NAME, the argument that holds the frames.", option="--per-frame"
        )
    for name, (shape, _) in o.shapes.items():
        if not all(_whole(size, 1) for size in shape):
            yield _refused(f"--shape {name}", "x".join(map(str, shape)), "sizes from 1, such as 1x3x224x224")
    from ..builder.options import BuildOptions

    for name in o.build:
        if name in ("min", "opt", "max", "precision", "device") or name not in {f.name for f in fields(BuildOptions)}:
            allowed = "the options of jetrt.build except precision, device, min, opt and max, which a bench sets"
            yield _refused("build", name, allowed)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def shape_of(text: str) -> tuple[str, tuple[tuple[int, ...], str | None]]:
    """ "x=1x3x224x224" or "ids=1x8:int64", as `BenchOptions.shapes` has it. Raises `ValueError`."""
    name, separator, rest = text.rpartition("=")
    match = re.fullmatch(r"(\d{1,12}(?:x\d{1,12})*)(?::(\w+))?", rest, re.ASCII)
    if not (separator and name and match):
        raise ValueError(f"{text!r}: write it as NAME=1x3x224x224, for a torch module NAME=1x8:int64")
    return name, (tuple(map(int, match[1].split("x"))), match[2])
