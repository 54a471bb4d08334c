"""`jetrt bench`: how fast and how exact a model is on each runtime and in each precision."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from ..builder.progress import KINDS
from ..runtime import RUNTIMES, Precision

__all__ = ["add_bench", "run_bench"]

#: "python" is a callable itself.
_RUNTIMES = (*RUNTIMES, "python")


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=run_bench)
    subjects = "model.onnx, model.engine, model.ts, model.pt2, file.py:attribute, module:attribute"
    parser.add_argument("subjects", nargs="+", metavar="[NAME=]SUBJECT", help=subjects)
    _rows(parser.add_argument_group("rows").add_argument)
    _inputs(parser.add_argument_group("inputs and accuracy").add_argument)
    _timing(parser.add_argument_group("timing").add_argument)
    _plans(parser.add_argument_group("plans that are built").add_argument)
    add = parser.add_argument
    add("--out", type=Path, default=Path("bench_results"), metavar="DIR", help="folder for results (bench_results)")
    add("--no-total", action="store_true", help="no sums: the subjects are not components of one pipeline")
    add("--no-picture", action="store_true", help="draw nothing")
    add("--progress", choices=KINDS, default="auto", help="how progress is shown (auto)")


def _rows(add: Callable[..., Any]) -> None:
    whole = {"nargs": "+", "type": _whole(1), "metavar": "N"}
    autocast = ("float32", "float16", "bfloat16")
    add("--runtime", nargs="+", metavar="NAME", help=f"{', '.join(_RUNTIMES)} (each that runs the subject)")
    add("--precision", nargs="+", metavar="TYPE", help=f"{', '.join(get_args(Precision))} (fp32, fp16, bf16, int8)")
    add("--batch", **whole, help="sizes of a dynamic first dimension (as --shape or --inputs have it, else 1)")
    add("--concurrency", default=[1], **whole, help="threads that call at once (1)")
    add("--autocast-dtype", "--autocast_dtype", choices=autocast, help="torch's autocast (float16); float32: none")
    add("--device", type=_device, default=0, metavar="N", help="number of the GPU (0), or cpu for torch")
    add("--graphs", choices=("auto", "off", "require"), default="auto", help="CUDA graphs of tensorrt (auto)")
    add("--threads", type=_whole(1), metavar="N", help="threads of an operator on the CPU runtimes")


def _inputs(add: Callable[..., Any]) -> None:
    many: dict[str, Any] = {"action": "append", "default": []}
    shape = "shape of an input; for a torch module with its type, ids=1x8:int64"
    argument = "keyword argument for a callable; JSON, else text"
    add("--shape", dest="shapes", type=_shape, metavar="NAME=1x3x480x480", help=shape, **many)
    add("--imgsz", type=_whole(1), metavar="N", help="height and width of image inputs where they are dynamic")
    add("--inputs", type=Path, metavar="FILE.npz", help="inputs (random ones)")
    add("--seed", type=_whole(0), default=0, metavar="N", help="seed of random inputs (0)")
    add("--data", choices=("host", "device"), default="host", help="where inputs begin and outputs end (host)")
    add("--arg", dest="arguments", type=_argument, metavar="NAME=VALUE", help=argument, **many)
    add("--clip", metavar="NAME", help="argument of a callable that takes a clip of frames")
    add("--per-frame", action="store_true", help="call it for one frame of the clip after the other")
    add("--reference", type=Path, metavar="FILE", help="outputs to compare with (.npz), or the .onnx of a plan")


def _timing(add: Callable[..., Any]) -> None:
    add("--iterations", type=_whole(1), default=200, metavar="N", help="measured calls of a row, at least (200)")
    add("--duration", type=_seconds, default=2.0, metavar="S", help="measured seconds of a row, at least (2)")
    add("--time-limit", type=_seconds, default=60.0, metavar="S", help="measured seconds of a row, at most (60)")
    add("--warmup", type=_whole(1), default=10, metavar="N", help="calls before the measured ones, at least (10)")
    add("--warmup-limit", type=_seconds, default=10.0, metavar="S", help="seconds to become stable in, at most (10)")
    add("--idle-ms", type=_seconds, default=0.0, metavar="MS", help="pause between two calls (0)")


def _plans(add: Callable[..., Any]) -> None:
    option = "another option of jetrt build, such as fp32_norms=true"
    add("--plans", type=Path, metavar="DIR", help="where plans are built and looked for (beside the model)")
    add("--calib-data", metavar="PATH", help="int8: .npz file or folder of images")
    add("--calib-cache", metavar="FILE", help="int8: calibration cache")
    add("--opt-level", metavar="N", help="optimisation level")
    add("--timing-cache", metavar="FILE", help="timing cache to use and extend")
    add("--build", action="append", default=[], type=_argument, metavar="OPTION=VALUE", help=option)


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def _device(text: str) -> int | str:
    return text if text == "cpu" else _whole(0)(text)


def _shape(text: str) -> Any:
    from ..bench.options import shape_of

    try:
        return shape_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _argument(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not (separator and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _split(words: list[str] | None) -> list[str] | None:
    """Commas serve as well as blanks."""
    return None if words is None else [part for word in words for part in word.split(",") if part]


def run_bench(arguments: argparse.Namespace) -> None:
    """Measure models on several runtimes and in several precisions."""
    from ..bench import bench

    build = dict(arguments.build)
    for name in ("calib_data", "calib_cache", "opt_level", "timing_cache"):
        if getattr(arguments, name) is not None:
            build[name] = getattr(arguments, name)
    try:
        report = bench(
            arguments.subjects,
            out=arguments.out,
            picture=not arguments.no_picture,
            progress=arguments.progress,
            runtimes=_split(arguments.runtime),
            precisions=_split(arguments.precision),
            batches=arguments.batch,
            concurrency=arguments.concurrency,
            shapes=dict(arguments.shapes),
            imgsz=arguments.imgsz,
            inputs=arguments.inputs,
            reference=arguments.reference,
            arguments=dict(arguments.arguments),
            clip=arguments.clip,
            per_frame=arguments.per_frame,
            autocast_dtype=arguments.autocast_dtype,
            device=arguments.device,
            data=arguments.data,
            graphs=arguments.graphs,
            threads=arguments.threads,
            seed=arguments.seed,
            build=build,
            plans=arguments.plans,
            totals=not arguments.no_total,
            timing={
                "calls": arguments.iterations,
                "seconds": arguments.duration,
                "limit_seconds": arguments.time_limit,
                "min_calls": arguments.warmup,
                "max_seconds": arguments.warmup_limit,
                "idle_ms": arguments.idle_ms,
            },
        )
    except KeyboardInterrupt as interrupt:
        if hasattr(interrupt, "report"):
            _print(interrupt.report)
        raise
    _print(report)


def _print(report: Any) -> None:
    print(report.table())
    for note in report.notes:
        print(f"note: {note}")
    for line in dict.fromkeys(
        f"{command}  # TensorRT {version}" for row in report.rows for version, command in row.trtexec.items()
    ):
        print(line)
    print("\n".join(f"{kind:9} {path}" for kind, path in report.files.items()), flush=True)
