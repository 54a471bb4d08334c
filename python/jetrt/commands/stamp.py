"""`jetrt stamp`: a manifest for a plan that came without one, after running it here."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..builder import parity
from ..builder.arrays import load_npz, widened
from ..builder.audit import ACCEPTED, audit
from ..builder.onnx_file import OnnxFile
from ..builder.profiles import InputRange, NetworkInput, Profile
from ..builder.progress import reporter
from ..builder.reference import from_text
from ..builder.thresholds import Thresholds
from ..builder.trying import (
    NoReferenceError,
    compare,
    identify,
    layer_times,
    model_file,
    outputs_of,
    parity_record,
    reference_outputs,
    tensors,
    tried,
)
from ..errors import BuildOptionError, EngineBuildError
from ..provenance import EngineFile, Manifest, engine_lock, publish

__all__ = ["add_stamp", "run_stamp"]


def add_stamp(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=run_stamp)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a plan that has no manifest")
    parser.add_argument("--onnx", type=Path, metavar="MODEL.onnx", help="the model that it was built from")
    parser.add_argument("--precision", choices=sorted(ACCEPTED), default="fp32", help="what it was built for (fp32)")
    parser.add_argument("--reference", metavar="KIND", help="what to compare with: a kind, or FILE.npz")
    parser.add_argument("--inputs", type=Path, metavar="FILE.npz", help="inputs to run it with")
    parser.add_argument("--parity-limit", action="append", nargs="+", default=[], metavar="LIMIT")
    parser.add_argument("--plugin", dest="plugins", action="append", default=[], metavar="LIBRARY")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="number of the GPU (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the manifest that is there")


def run_stamp(arguments: argparse.Namespace) -> None:
    """Give a plan that came without one a manifest, after running it here."""
    plan: Path = arguments.plan
    header = _core.read_plan(plan)
    if Manifest.path_for(plan).exists() and not arguments.overwrite:
        raise EngineBuildError(
            f"{plan} has a manifest already. Look at it with `jetrt inspect`, or replace it with --overwrite.",
            path=str(plan),
        )
    model = OnnxFile.open(arguments.onnx) if arguments.onnx is not None else None
    source = _source(arguments.reference, model)
    load: dict[str, Any] = {"device": arguments.device, "plugins": arguments.plugins, "refit": None}
    with reporter("auto") as shown:
        shown.title("looking at this machine")
        here = identify(arguments.device)
        shown.title(f"loading {plan}")
        tables = tried(plan, [], load, here=here, reporter=shown).result
        infos = [
            NetworkInput(row["name"], row["dtype"], tuple(row["shape"]), row["location"] == "host")
            for row in tables["inputs"]
        ]
        profiles = _profiles(plan, tables, infos)
        given = load_npz(arguments.inputs, "--inputs") if arguments.inputs is not None else None
        cases = parity.points(profiles, infos, given=given)
        shown.title(f"running {plan}")
        found = tried(plan, cases, load, here=here, reporter=shown, layer_runs=20)
        thresholds = Thresholds.parse(arguments.precision, [word for words in arguments.parity_limit for word in words])
        report = parity.not_run("no model was given (--onnx), and no outputs (--reference)", thresholds)
        if source is not None:
            shown.title("computing the reference")
            try:
                references = reference_outputs(
                    plan if model is None else model.path,
                    cases,
                    source,
                    outputs={row["name"]: row["shape"] for row in tables["outputs"]},
                    own_types={} if model is None else {info.name: info.dtype for info in model.inputs},
                    reporter=shown,
                )
                report = compare(cases, found, references, thresholds)
            except NoReferenceError as error:
                report = parity.not_run(str(error), thresholds)
    print(report.table())
    sys.stdout.flush()
    parity.gate(report, allow_not_run=True)
    what = "random" if arguments.inputs is None else "these"
    for output in outputs_of(found, len(cases)):
        for name, array in output.items():
            wide = widened(array)
            if wide.dtype.kind == "f" and not np.isfinite(wide).all():
                raise EngineBuildError(
                    f"{plan}: output {name!r} holds NaN or infinity for {what} inputs. If the model needs others, give "
                    "them with --inputs.",
                    path=str(plan),
                )
    audited = audit(found.result["inspector"], layer_times(found.result["layer_times"]), arguments.precision)
    engine = EngineFile.of(plan)
    manifest = Manifest(
        jetrt=_core.build_info()["version"],
        origin="stamp",
        key=hashlib.sha256(f"stamp:{engine.sha256}".encode()).hexdigest(),
        engine=engine,
        model=None if model is None else model_file(model, model.sha256()),
        options=None,
        command=None,
        machine=here.machine,
        version_compatible=header["serialization"] == 0,
        inputs=tensors(tables["inputs"]),
        outputs=tensors(tables["outputs"]),
        profiles=tuple(profile.to_mapping() for profile in profiles),
        audit=audited.to_mapping(),
        parity=parity_record(report),
    )
    with engine_lock(plan, timeout=60):
        publish(None, plan, manifest)
    sets = f"{len(cases)} set{'s' if len(cases) != 1 else ''}"
    print(f"{Manifest.path_for(plan)} and {plan}.sha256 are written: it ran here on {sets} of inputs.")


def _source(reference: str | None, model: OnnxFile | None) -> dict[str, Any] | None:
    """What to compare with; ``None``: nothing."""
    if reference is None:
        return None if model is None else {}
    source = from_text(reference)
    if source.get("kind") == "tensorrt fp32":
        raise BuildOptionError(
            f"--reference {reference}: a stamp builds nothing. Give --reference out.npz, or build the plan again with "
            "`jetrt build`.",
            option="--reference",
        )
    if model is None and "npz" not in source:
        raise BuildOptionError(f"--reference {reference} computes with the model: give --onnx.", option="--reference")
    return source


def _profiles(plan: Path, tables: dict[str, Any], infos: list[NetworkInput]) -> list[Profile]:
    unknown = [info.name for info in infos if info.shape_tensor]
    if unknown:
        raise BuildOptionError(
            f"{plan}: {', '.join(unknown)} are shape tensors, whose allowed values a plan does not tell. Build it "
            "again from its ONNX with `jetrt build`, which writes a manifest.",
        )
    if not tables["profile_shapes"]:
        return [Profile({info.name: InputRange(info.shape, info.shape, info.shape) for info in infos})]
    return [
        Profile(
            {
                name: InputRange(tuple(bounds["min"]), tuple(bounds["opt"]), tuple(bounds["max"]))
                for name, bounds in shapes.items()
            }
        )
        for shapes in tables["profile_shapes"]
    ]
