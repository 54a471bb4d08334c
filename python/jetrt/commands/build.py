"""`jetrt build`: a plan from an ONNX file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..builder.pipeline import BuildResult, build_plan
from ..builder.progress import KINDS, reporter
from ..builder.targets import add_build_arguments, targets

__all__ = ["add_build", "print_result", "run_build"]


def add_build(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=run_build)
    add_build_arguments(parser)
    parser.add_argument("--progress", choices=KINDS, default="auto", help="how progress is shown (auto)")


def run_build(arguments: argparse.Namespace) -> None:
    """Build a plan from an ONNX file, check it, and write it with a checksum and a manifest."""
    for target in targets(arguments):
        if arguments.mode == "full_pipeline" and target.engine is not None:
            target.engine.parent.mkdir(parents=True, exist_ok=True)
        with reporter(arguments.progress) as shown:
            for note in target.notes:
                shown.note(note)
            result = build_plan(target.onnx, target.engine, target.options, reporter=shown)
        print_result(result)
        if target.options.dump_layers is not None:
            _dump(target.options.dump_layers, result)
        sys.stdout.flush()


def _dump(where: str, result: BuildResult) -> None:
    if result.network is None:
        print(f"--dump-layers {where}: nothing was built, so there are no layers to write; --rebuild builds it again.")
    elif where == "-":
        print(result.network)
    else:
        Path(where).write_text(result.network + "\n", encoding="utf-8")


def print_result(result: BuildResult) -> None:
    """What was built, how exact it is, and where it may run."""
    manifest = result.manifest
    for title, text in result.tables.items():
        print(f"{text}\n" if text.startswith(title) else f"{title}\n{text}\n")
    machine = manifest.machine
    where = f"TensorRT {machine.tensorrt}, {machine.gpu} (sm_{machine.sm}, {machine.sm_count} SMs)"
    size = f"{manifest.engine.bytes / 2**20:.2f} MiB"
    if not result.built:
        print(f"{result.path} is there already and is the same plan ({size}, {where}); nothing was built.")
        return
    seconds = f", built in {manifest.build.seconds:.1f} s" if manifest.build is not None else ""
    print(f"{result.path}: {size}{seconds}, for {where}; parity {manifest.parity.state}")
