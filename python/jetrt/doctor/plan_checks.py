"""The plan files of the folder: whole, of this TensorRT, of this machine."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final

from ..environment import used_by_jetrt
from ..provenance import Difference, differences, rebuild_command
from .facts import Facts, PlanFile
from .finding import Finding
from .versions import differ, numbers


def whole_plans(facts: Facts) -> Iterator[Finding]:
    for plan in facts.plans:
        if plan.problem:
            yield Finding(
                "plan-damaged",
                "error",
                plan.problem.partition("\n")[0],
                "it cannot be loaded",
                (_rebuild(facts, plan),),
            )


def plans_of_this_machine(facts: Facts) -> Iterator[Finding]:
    for plan in facts.plans:
        if plan.problem:
            continue
        found = list(_differences(facts, plan))
        refused = [d for d in found if d.refused]
        if refused:
            rows = "; ".join(f"{d.field} is {d.here} here and {d.manifest} in the plan" for d in refused)
            yield Finding(
                "plan-of-another-machine",
                "error",
                f"{plan.path} cannot run here: {rows}",
                "a plan belongs to one TensorRT and one model of GPU; TensorRT refuses it, or it fails when it runs",
                (_rebuild(facts, plan),),
            )
        elif found:
            rows = "; ".join(f"{d.field} is {d.here} here and was {d.manifest}" for d in found)
            yield Finding(
                "plan-of-another-setup",
                "note",
                f"{plan.path} was built on a machine that was set up differently: {rows}",
                "it runs, and its figures may be others",
                (_rebuild(facts, plan),),
            )


def _differences(facts: Facts, plan: PlanFile) -> Iterator[Difference]:
    here, manifest = facts.environment, plan.manifest
    if manifest is not None and facts.machine is not None:
        yield from differences(manifest, facts.machine)
        return
    # Without asking CUDA: what files tell.
    library = used_by_jetrt(here.libraries)
    version = library.version if library else None
    newer_is_fine = manifest is not None and manifest.version_compatible
    if version is not None and differ(plan.tensorrt, version):
        newer = numbers(version)[:3] > numbers(plan.tensorrt)[:3]
        if not (newer and newer_is_fine):
            yield Difference("TensorRT", plan.tensorrt, version, refused=True)
    if manifest is None:
        return
    if manifest.machine.arch != here.platform.arch:
        yield Difference("arch", manifest.machine.arch, here.platform.arch, refused=True)
    sm = next((gpu.sm for gpu in here.gpus), None)
    if sm is not None and sm != manifest.machine.sm and manifest.hardware_compatibility != "ampere_plus":
        yield Difference("sm", manifest.machine.sm, sm, refused=True)


def _rebuild(facts: Facts, plan: PlanFile) -> str:
    command = plan.manifest and rebuild_command(plan.manifest, facts.machine)
    if command:
        return command
    model = plan.path.with_suffix(".onnx")
    name = str(model) if model.exists() else "MODEL.onnx"
    return shlex.join(["jetrt", "build", "--onnx", name, "--engine", str(plan.path), "--rebuild"])


CHECKS: Final = (whole_plans, plans_of_this_machine)
