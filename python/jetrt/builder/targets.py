"""Which plans a command line asks for: one, or those of GR00T's whole pipeline; and flags of the scripts'
``build_tensorrt_engine.py`` that are no option of ours: each is mapped or refused in a sentence, none is ignored in
silence.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import BuildOptionError
from .options import PRECISIONS, BuildOptions, add_arguments, from_arguments

__all__ = ["Target", "add_build_arguments", "targets"]

#: Components of GR00T N1.7: models that serve, best first, and the plan that the scripts look for.
PIPELINE = {
    "ViT": (("vit_fp32.onnx", "vit_bf16.onnx"), "vit.engine"),
    "LLM": (("llm_bf16.onnx",), "llm_bf16.engine"),
    "VL self-attention": (("vl_self_attention.onnx",), "vl_self_attention.engine"),
    "state encoder": (("state_encoder.onnx",), "state_encoder.engine"),
    "action encoder": (("action_encoder.onnx",), "action_encoder.engine"),
    "DiT": (("dit_bf16.onnx",), "dit_bf16.engine"),
    "action decoder": (("action_decoder.onnx",), "action_decoder.engine"),
}
_ONNX_DIR, _ENGINE_DIR = "gr00t_trt_deployment/onnx", "gr00t_trt_deployment/engines"
_INTERNAL_TACTICS = ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]


@dataclass(frozen=True)
class Target:
    onnx: Path
    #: ``None``: to be named by model, machine and precision.
    engine: Path | None
    options: BuildOptions
    #: To print before the build: what a flag of the scripts was taken for.
    notes: tuple[str, ...] = ()


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that `jetrt build` takes; `targets` reads it."""
    parser.add_argument("--onnx", type=Path, metavar="MODEL.onnx", help="the model")
    parser.add_argument("--engine", type=Path, metavar="FILE", help="the plan (named by model and machine)")
    add_arguments(parser)
    script = parser.add_argument_group("GR00T's pipeline, and other flags of its scripts")
    script.add_argument("--mode", choices=["single", "full_pipeline"], default="single", help="full_pipeline: N1.7")
    script.add_argument("--onnx-dir", type=Path, metavar="DIR", help=f"models of the pipeline ({_ONNX_DIR})")
    script.add_argument("--engine-dir", type=Path, metavar="DIR", help=f"where its plans go ({_ENGINE_DIR})")
    script.add_argument(
        "--disable-external-tactics",
        action="store_const",
        dest="tactic_sources",
        const=[_INTERNAL_TACTICS],
        default=argparse.SUPPRESS,
        help=f"--tactic-sources {' '.join(_INTERNAL_TACTICS)}",
    )
    script.add_argument("--heuristic-build", action="store_true", help="--opt-level 2, which took its place")
    script.add_argument("--memory-monitor", action="store_true", help="memory is always watched; has no effect")


def targets(arguments: argparse.Namespace) -> list[Target]:
    """What to build, in order. Raises `BuildOptionError`."""
    options, notes = from_arguments(arguments), []
    if arguments.memory_monitor:
        notes.append("--memory-monitor: the peak of memory is always measured and stands in the report.")
    if arguments.heuristic_build:
        if options.opt_level is None and not options.low_memory_mode:
            options = replace(options, opt_level=2)
        elif options.opt_level not in (None, 0, 1, 2):
            raise BuildOptionError(
                f"--heuristic-build and --opt-level {options.opt_level} contradict each other: TensorRT 10 has no such "
                "flag any more, it chooses tactics by heuristics at levels 0 to 2. Leave one of them out.",
                option="--heuristic-build",
            )
        notes.append("--heuristic-build: TensorRT 10 has optimisation levels up to 2 in its place; so it is built.")
    if arguments.mode == "full_pipeline":
        return list(_pipeline(arguments, options, tuple(notes)))
    for flag, given in (("--onnx-dir", arguments.onnx_dir), ("--engine-dir", arguments.engine_dir)):
        if given is not None:
            raise BuildOptionError(f"{flag} is for --mode full_pipeline.", option=flag, found=str(given))
    if arguments.onnx is None:
        raise BuildOptionError("--onnx MODEL.onnx is missing: nothing says what to build.", option="--onnx")
    return [Target(arguments.onnx, arguments.engine, options, tuple(notes))]


def _pipeline(arguments: argparse.Namespace, options: BuildOptions, notes: tuple[str, ...]) -> Iterator[Target]:
    for flag, given in (("--onnx", arguments.onnx), ("--engine", arguments.engine)):
        if given is not None:
            raise BuildOptionError(f"{flag} is for one model; --mode full_pipeline takes {flag}-dir.", option=flag)
    folder: Path = arguments.onnx_dir or Path(_ONNX_DIR)
    if options.metadata is None and (folder / "export_metadata.json").exists():
        options = replace(options, metadata=str(folder / "export_metadata.json"))
    if options.metadata is None and not options.allow_default_hints:
        raise BuildOptionError(
            f"--onnx-dir {folder} has no export_metadata.json with the sizes of this export. Export again, or give "
            "--allow-default-hints for those of GR1 with one camera.",
            option="--metadata",
        )
    found = {
        name: next((folder / model for model in models if (folder / model).exists()), None)
        for name, (models, _) in PIPELINE.items()
    }
    missing = [f"{name} ({' or '.join(PIPELINE[name][0])})" for name, path in found.items() if path is None]
    if missing:
        raise BuildOptionError(
            f"--onnx-dir {folder} lacks {', '.join(missing)}. Nothing was built: the scripts need every component.",
            option="--onnx-dir",
            found=str(folder),
            allowed=missing,
        )
    # The export is in several precisions; what a model is in stands in its name, where it is not the pipeline's.
    options = replace(options, strongly_typed=True, precision=options.precision or "bf16")
    for name, path in found.items():
        assert path is not None
        said = path.stem.rpartition("_")[2]
        own = replace(options, precision=said) if said in PRECISIONS else options
        yield Target(path, (arguments.engine_dir or Path(_ENGINE_DIR)) / PIPELINE[name][1], own, notes)
        notes = ()
