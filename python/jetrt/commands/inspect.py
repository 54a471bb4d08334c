"""`jetrt inspect`: what a plan is, where it may run, how exact it is, and where its time goes."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from .. import inspection

__all__ = ["add_inspect", "run_inspect"]


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=run_inspect)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a TensorRT plan")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the layers' times (PNG, SVG, PDF)")
    parser.add_argument("--no-gpu", action="store_true", help="read the files alone")
    parser.add_argument("--profile", type=_whole, metavar="N", help="optimisation profile to look at (0)")
    parser.add_argument(
        "--shape",
        dest="shapes",
        action="append",
        default=[],
        type=_shape,
        metavar="NAME=1x3x224x224",
        help="shape of an input to look at (the profile's optimum)",
    )
    parser.add_argument("--repeat", type=_positive, default=20, metavar="N", help="runs that are timed (20)")
    parser.add_argument("--layers", type=_whole, default=20, metavar="N", help="slowest layers to list (20); 0: all")
    parser.add_argument("--refit", type=Path, metavar="MODEL.onnx", help="weights of a plan that was built without")
    parser.add_argument("--plugin", dest="plugins", action="append", default=[], type=Path, metavar="LIBRARY")
    parser.add_argument("--allow-host-code", action="store_true", help="load a plan that carries host code")


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    value = _whole(text)
    if not value:
        raise argparse.ArgumentTypeError("0 is not a whole number of at least 1")
    return value


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    # Tensor names may hold "=".
    name, separator, shape = text.rpartition("=")
    if not (separator and name and re.fullmatch(r"(\d{1,18}(x\d{1,18})*)?", shape, re.ASCII)):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as NAME=1x3x224x224")
    return name, tuple(map(int, shape.split("x"))) if shape else ()


def run_inspect(arguments: argparse.Namespace) -> None:
    """Show what a plan is, where it may run, how exact it is, and where its time goes."""
    load = {
        "refit": str(arguments.refit) if arguments.refit else None,
        "plugins": arguments.plugins,
        "allow_host_code": arguments.allow_host_code,
    }
    asked = arguments.profile is not None or arguments.shapes
    data = inspection.collect(
        arguments.plan,
        gpu="off" if arguments.no_gpu else "require" if asked else "auto",
        profile=arguments.profile or 0,
        shapes=dict(arguments.shapes),
        runs=arguments.repeat,
        load={key: value for key, value in load.items() if value},
    )
    if arguments.json:
        print(json.dumps(data, indent=1, allow_nan=False))
    else:
        print(inspection.text(data, layers=arguments.layers))
    if arguments.picture:
        inspection.picture(data, arguments.picture)
        if not arguments.json:
            print(f"\nlayer times drawn in {arguments.picture}")
