"""`jetrt plan`: does this set of plans fit into the memory, in which order, and by which arithmetic?"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from .. import _core, fit
from ..errors import CudaError, LibraryNotFoundError
from . import UsageError

__all__ = ["add_plan"]


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=_plan)
    parser.epilog = "exit code: 0 it fits, 1 it does not or may not, or a file is wrong, 2 a senseless command line"
    parser.add_argument("plans", nargs="+", type=Path, metavar="PLAN", help="plans; a folder stands for those in it")
    parser.add_argument(
        "--budget", type=_size, metavar="16GiB", help="memory for the engines (what this machine has available)"
    )
    parser.add_argument(
        "--reserve", type=_size, metavar="SIZE", help="memory that stays free for the system (5 %% on unified memory)"
    )
    parser.add_argument(
        "--torch-fraction", type=_fraction, metavar="0.6", help="share of the memory that torch may take"
    )
    parser.add_argument("--contexts", type=_count, default=1, metavar="N", help="execution contexts of each engine (1)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="number of the GPU (0)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _size(text: str) -> int:
    try:
        return fit.read_size(text, "size")
    except ValueError as error:
        allowed = str(error).partition("allowed: ")[2]
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: {allowed}") from None


def _fraction(text: str) -> float:
    if not re.fullmatch(r"0?\.\d+|1(\.0*)?", text, re.ASCII) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: a number above 0 and up to 1")
    return float(text)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _plan(arguments: argparse.Namespace) -> int:
    # The set counts as a whole: one file that is no plan, and the answer would be about another set.
    files = fit.plans_of(arguments.plans)
    for file in files:
        _core.read_plan(file)
    found = fit.check(fit.needs(files, contexts=arguments.contexts), _budget(arguments))
    if arguments.json:
        print(json.dumps(found.to_mapping(), indent=1))
    else:
        print(found.text())
        named = sum(1 for path in arguments.plans if not path.is_dir())
        if not any(path.is_dir() for path in arguments.plans) and named > len(files):
            print(f"{named - len(files)} of the files named is one of the others and counts once.", file=sys.stderr)
    return int(found.verdict != "fits")


def _budget(arguments: argparse.Namespace) -> fit.Budget:
    more = {"reserve": arguments.reserve, "torch_fraction": arguments.torch_fraction}
    if arguments.budget is not None:
        return fit.stated_budget(arguments.budget, **more)
    try:
        return fit.machine_budget(fit.gpu_memory(arguments.device), **more)
    except (LibraryNotFoundError, CudaError) as error:
        raise UsageError(f"{error} Here: --budget 16GiB.") from error
