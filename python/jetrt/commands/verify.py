"""`jetrt verify`: compares a plan with its reference again, on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..builder import parity
from ..builder.arrays import load_npz
from ..builder.cases import Case
from ..builder.onnx_file import OnnxFile
from ..builder.options import BuildOptions
from ..builder.pipeline import fp32_reference
from ..builder.profiles import NetworkInput, Profile
from ..builder.progress import Reporter, reporter
from ..builder.reference import from_text
from ..builder.thresholds import Thresholds
from ..builder.trying import NoReferenceError, compare, identify, parity_record, reference_outputs, tried
from ..errors import BuildOptionError, ManifestError
from ..provenance import Manifest, Sha256Sidecar, check_before_load, engine_lock, publish

__all__ = ["add_verify", "run_verify", "verified"]


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=run_verify)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a plan with a manifest")
    parser.add_argument("--onnx", type=Path, metavar="MODEL.onnx", help="its model (the one its manifest names)")
    parser.add_argument("--reference", metavar="KIND", help="what to compare with: a kind, or FILE.npz")
    parser.add_argument("--inputs", type=Path, metavar="FILE.npz", help="inputs to compare with")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the inputs that are made up")
    parser.add_argument(
        "--parity-limit",
        action="append",
        nargs="+",
        default=[],
        metavar="LIMIT",
        help="[OUTPUT:]cosine=0.99,max_rel=0.2",
    )
    parser.add_argument("--device", type=int, default=0, metavar="N", help="number of the GPU (0)")
    parser.add_argument("--update", action="store_true", help="write the result into the manifest")


def run_verify(arguments: argparse.Namespace) -> None:
    """Compare a plan with its reference again, on this machine."""
    limits = [word for words in arguments.parity_limit for word in words]
    with reporter("auto") as shown:
        report = verified(
            arguments.plan,
            onnx=arguments.onnx,
            reference=arguments.reference,
            inputs=arguments.inputs,
            seed=arguments.seed,
            limits=limits,
            device=arguments.device,
            update=arguments.update,
            shown=shown,
        )
    print(report.table())
    sys.stdout.flush()
    parity.gate(report)


def verified(
    plan: Path,
    *,
    onnx: Path | None = None,
    reference: str | None = None,
    inputs: Path | None = None,
    seed: int | None = None,
    limits: list[str] | None = None,
    device: int = 0,
    update: bool = False,
    shown: Reporter,
) -> parity.ParityReport:
    """The parity report of a plan on this machine. The files are checked before the plan is run; the report is not
    judged. Raises `ManifestError` for a plan without manifest (stamp it first) or of another machine."""
    manifest = Manifest.read(plan)
    if manifest is None:
        raise ManifestError(
            f"{plan} has no manifest, so that nothing says what it should compute. Give it one with `jetrt stamp`.",
            path=str(plan),
        )
    here = identify(device)
    for warning in check_before_load(plan, here.machine, refit=True):
        shown.note(warning)
    sidecar = Sha256Sidecar.read(plan)
    if sidecar is not None:
        sidecar.verify(plan)
    options = BuildOptions() if manifest.options is None else BuildOptions.from_mapping(manifest.options)
    source = from_text(text) if (text := reference or options.reference) is not None else {}
    model = None if "npz" in source and not manifest.stripped and onnx is None else _model(plan, manifest, onnx)
    given = inputs if inputs is not None else options.inputs
    cases = _cases(manifest, given, options.seed if seed is None else seed)
    load = {
        "device": device,
        "plugins": list(options.plugins),
        "refit": str(model.path) if model is not None and manifest.stripped else None,
    }
    shown.title(f"running {plan}")
    found = tried(plan, cases, load, here=here, reporter=shown)
    precision = options.precision or _stored_precision(manifest)
    thresholds = Thresholds.parse(precision, limits or list(options.parity_limit))
    shown.title("computing the reference")
    try:
        if source.get("kind") == "tensorrt fp32":
            assert model is not None
            references = fp32_reference(model, plan, replace(options, device=device), here, cases, shown)
        else:
            references = reference_outputs(
                plan if model is None else model.path,
                cases,
                source,
                outputs={info.name: list(info.shape) for info in manifest.outputs},
                own_types={} if model is None else {info.name: info.dtype for info in model.inputs},
                reporter=shown,
            )
        report = compare(cases, found, references, thresholds, _forced(options))
    except NoReferenceError as error:
        report = parity.not_run(str(error), thresholds)
    if update:
        _store(plan, manifest, report)
    return report


def _stored_precision(manifest: Manifest) -> str:
    stored = manifest.parity.thresholds
    found = stored.get("precision") if isinstance(stored, Mapping) else None
    return str(found or "fp32")


def _forced(options: BuildOptions) -> dict[str, str] | None:
    from ..builder.io_formats import parse_io_format

    entries = [parse_io_format(text) for text in options.io_formats]
    return {entry.name: entry.dtype for entry in entries if entry.dtype is not None} or None


def _model(plan: Path, manifest: Manifest, given: Path | None) -> OnnxFile:
    """The model that the manifest names: where its command had it, else beside the plan. It must be the same one."""
    command = list(manifest.command or ())
    candidates = [Path(command[command.index("--onnx") + 1])] if "--onnx" in command else []
    if manifest.model is not None:
        candidates.append(plan.with_name(manifest.model.file))
    path = given or next((path for path in candidates if path.exists()), None)
    if path is None:
        named = ", ".join(map(str, dict.fromkeys(candidates))) or "none that its manifest names"
        raise BuildOptionError(f"{plan}: its model is not there ({named}). Give it with --onnx.", option="--onnx")
    model = OnnxFile.open(path)
    found = model.sha256().sha256
    if manifest.model is not None and manifest.model.sha256 != found:
        raise ManifestError(
            f"{plan} was built from {manifest.model.file!r} with SHA-256 {manifest.model.sha256}, and {path} has "
            f"{found}. Give the model that it was built from with --onnx, or build the plan again from this one.",
            path=str(plan),
            found=found,
            allowed=manifest.model.sha256,
        )
    return model


def _cases(manifest: Manifest, inputs: Path | str | None, seed: int) -> list[Case]:
    profiles = [Profile.from_mapping(entry) for entry in manifest.profiles]
    infos = [
        NetworkInput(info.name, info.dtype, tuple(info.shape), info.location == "host") for info in manifest.inputs
    ]
    given: dict[str, Any] | None = load_npz(inputs, "--inputs") if inputs is not None else None
    return parity.points(profiles, infos, given=given, seed=seed)


def _store(plan: Path, manifest: Manifest, report: parity.ParityReport) -> None:
    with engine_lock(plan, timeout=60):
        publish(None, plan, replace(manifest, parity=parity_record(report)))
