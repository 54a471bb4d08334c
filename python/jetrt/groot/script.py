"""Runs a GR00T script that was not edited: its definitions first, then jetrt in their place, then the rest.

The script's classes live in what runs as `__main__`: whatever is put there beforehand, its own `class` statements bind
again. So the file is split where its definitions end, which is at `if __name__ == "__main__":`.
"""

from __future__ import annotations
import __future__

import argparse
import ast
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from .bundle import OPTIONAL, REQUIRED
from .files import backbone_plan, dit_plan
from .installing import SEAM_A, install, statistics
from .preloading import load_report, preload

__all__ = ["main", "run_script"]

#: Flags of the scripts and their forks that name plans.
_ENGINES, _BACKBONES = "trt-engine-path", ("backbone-trt-engine-path", "trt-backbone-path")


def main(words: Sequence[str] | None = None) -> None:
    """`python -m jetrt.groot [OPTIONS] SCRIPT [ARGUMENTS]`."""
    parser = _parser()
    ours, script = _ours(sys.argv[1:] if words is None else words)
    options = parser.parse_args(ours)
    if not script:
        parser.error("SCRIPT is missing")
    if options.graphs is not None:
        os.environ["JETRT_GRAPHS"] = options.graphs
    if options.synchronize:
        os.environ["JETRT_TRT_SYNCHRONIZE"] = "1"
    try:
        run_script(
            script[0],
            script[1:],
            memory_budget=options.memory_budget,
            free_torch=options.free_torch,
            optimize=options.optimize,
        )
    finally:
        if options.report is not None:
            _report(options.report)


def run_script(
    script: str | os.PathLike[str],
    arguments: Sequence[str] = (),
    *,
    memory_budget: int | str | None = None,
    free_torch: bool = False,
    optimize: bool = False,
) -> None:
    """Runs a script as `python SCRIPT ARGUMENTS` would, in this process, with jetrt's engines.

    It becomes `sys.modules["__main__"]`, with its own `sys.argv`, `__file__` and `sys.path[0]`. Engines that its
    arguments name are loaded before its main part begins, so before there is a policy: largest first, within
    `memory_budget` (see `preload`). free_torch, optimize: as for `install`.

    Whatever the script raises passes through, SystemExit too. Raises FileNotFoundError and SyntaxError for the script
    itself, and what `preload` raises.
    """
    path = os.path.abspath(script)  # noqa: PTH100 - a link stays one, as with python
    definitions, rest = split(Path(path).read_bytes(), path)
    module = ModuleType("__main__")
    vars(module).update(__file__=path, __builtins__=__builtins__, __cached__=None, __loader__=None)
    sys.argv = [os.fspath(script), *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(path).resolve().parent)
    sys.modules["__main__"] = module
    # For the modules that the definitions import.
    install(ModuleType("__main__"), free_torch=free_torch, optimize=optimize)
    exec(definitions, vars(module))
    install(module, free_torch=free_torch, optimize=optimize)
    for plans, seam in engines_of(arguments):
        preload(plans, memory_budget, seam=seam)
    exec(rest, vars(module))


def split(source: bytes, path: str) -> tuple[CodeType, CodeType]:
    """The script up to the first `if __name__ == "__main__":`, and from there on. Without one: up to and with the last
    of the definitions that jetrt replaces."""
    tree = ast.parse(source, path)
    at = next((i for i, node in enumerate(tree.body) if _is_guard(node)), None)
    if at is None:
        at = max((i + 1 for i, node in enumerate(tree.body) if getattr(node, "name", None) in SEAM_A), default=0)
    flags = 0
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            for name in node.names:
                flags |= getattr(__future__, name.name).compiler_flag
    parts = [ast.Module(body=body, type_ignores=[]) for body in (tree.body[:at], tree.body[at:])]
    first, second = (compile(part, path, "exec", flags=flags, dont_inherit=True) for part in parts)
    return first, second


def _is_guard(node: ast.stmt) -> bool:
    """`if __name__ == "__main__":`, or with more in the condition."""
    if not isinstance(node, ast.If):
        return False
    for inner in ast.walk(node.test):
        if isinstance(inner, ast.Compare) and any(isinstance(op, ast.Eq) for op in inner.ops):
            sides = [inner.left, *inner.comparators]
            names = [side.id for side in sides if isinstance(side, ast.Name)]
            values = [side.value for side in sides if isinstance(side, ast.Constant)]
            if "__name__" in names and "__main__" in values:
                return True
    return False


def engines_of(arguments: Sequence[str]) -> list[tuple[list[Path], Any]]:
    """The plans that a script will load by these arguments, and the seam that will ask for them.

    Nothing unless `--inference-mode` is there and is not pytorch: without, the scripts use torch.
    """
    found = _flags(arguments)
    mode = found.get("inference-mode", "pytorch")
    if mode == "pytorch":
        return []
    path = found.get(_ENGINES)
    backbone = next((found[name] for name in _BACKBONES if found.get(name)), None)
    if mode == "trt_full_pipeline":
        return [(_pipeline(Path(path)), "engine")] if path is not None and Path(path).is_dir() else []
    plans = [dit_plan(path)] if path is not None and Path(path).exists() else []
    plans += [backbone_plan(backbone)] if backbone is not None and Path(backbone).exists() else []
    # A path that is not there is the script's to report.
    return [(plans, "wrapper")] if plans else []


def _pipeline(folder: Path) -> list[Path]:
    """Of N1.7's and N1.6's full pipeline, what is there."""
    plans = []
    for mode in ("n17_full_pipeline", "full_pipeline"):
        for names in {**REQUIRED[mode], **OPTIONAL[mode]}.values():
            plans += [folder / name for name in names if (folder / name).is_file()][:1]
    return list(dict.fromkeys(plans))


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    """--name value and --name=value; the scripts' parser takes _ for - in names."""
    found = {}
    for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name.replace("_", "-")] = value if equals else following
    return found


def _report(path: str) -> None:
    text = json.dumps({"loads": load_report(), "loops": statistics()}, indent=1, default=str)
    if path == "-":
        print(text, file=sys.stderr)
    else:
        Path(path).write_text(text + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jetrt.groot",
        usage="%(prog)s [OPTIONS] SCRIPT [ARGUMENTS]",
        description="Runs a GR00T script with jetrt in the place of its TensorRT classes. The script is not changed; "
        "its ARGUMENTS are passed on as they are.",
        allow_abbrev=False,
    )
    parser.add_argument("--memory-budget", metavar="SIZE", help="device memory for the engines, such as 6G")
    parser.add_argument("--free-torch", action="store_true", help="free the torch modules that engines stand in for")
    parser.add_argument("--graphs", choices=("off", "auto"), help="CUDA graphs of single engines (JETRT_GRAPHS)")
    parser.add_argument("--optimize", action="store_true", help="the denoising loop as one CUDA graph")
    parser.add_argument("--synchronize", action="store_true", help="wait after each engine (JETRT_TRT_SYNCHRONIZE=1)")
    parser.add_argument("--report", metavar="FILE", help="JSON of what loading took, at the end; - is stderr")
    return parser


_WITH_VALUE = ("--memory-budget", "--graphs", "--report")


def _ours(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The options before SCRIPT, and SCRIPT with its arguments, which are passed on as they are. (argparse would take a
    `--` out of them.)"""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        if words[at] == "--":
            return words[:at], words[at + 1 :]
        at += 2 if words[at] in _WITH_VALUE else 1
    return words[:at], words[at:]
