"""Whether a plan may run here, decided from its manifest before TensorRT sees a byte of it.

Who hashes: the native loader reads the plan anyway and compares it with the `.sha256` beside it. Here that file is
compared with the manifest, so that the three are bound together and the plan is hashed once. Only a plan with a
manifest and no `.sha256` is hashed here.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import BuildOptionError, ManifestError, PlanError
from .manifest import Machine, Manifest
from .names import EngineFilenameSchema, Sha256Sidecar, sha256_of
from .publish import aligned


@dataclass(frozen=True)
class Difference:
    """One field in which a machine is not the one of the manifest."""

    field: str
    manifest: Any
    here: Any
    #: Whether the plan must not run because of it; otherwise it is worth a warning.
    refused: bool


def differences(manifest: Manifest, machine: Machine) -> tuple[Difference, ...]:
    """Compares the machine that a plan was built on with another one. Pure.

    Refused: another architecture, SM, SM count, GPU name or TensorRT, or a driver below the floor; a version-compatible
    plan runs on every newer TensorRT, a hardware-compatible one on other GPUs (Ampere and newer, or the same SM).
    Warned about: L4T, JetPack, power mode, and a driver that is unknown where a floor is set. What is unknown on either
    side is not compared, except for that.
    """
    built, found = manifest.machine, []

    def add(field: str, there: Any, here: Any, *, refused: bool) -> None:
        found.append(Difference(field, there, here, refused))

    if built.arch != machine.arch:
        add("arch", built.arch, machine.arch, refused=True)
    if not _tensorrt_fits(built.tensorrt, machine.tensorrt, newer=manifest.version_compatible):
        add("tensorrt", built.tensorrt, machine.tensorrt, refused=True)
    same_sm = built.sm == machine.sm
    if not (same_sm or (manifest.hardware_compatibility == "ampere_plus" and machine.sm >= 80)):
        add("sm", built.sm, machine.sm, refused=True)
    if manifest.hardware_compatibility == "none":
        for field in ("sm_count", "gpu"):
            if getattr(built, field) != getattr(machine, field):
                add(field, getattr(built, field), getattr(machine, field), refused=True)
    if manifest.driver_floor is not None:
        floor, driver = manifest.driver_floor, machine.driver
        known = driver is not None and re.match(r"\d+(\.\d+)*", driver)
        if not known:
            add("driver", f"{floor} or newer", "unknown", refused=False)
        elif _numbers(known[0]) < _numbers(floor):
            add("driver", f"{floor} or newer", driver, refused=True)
    for field in ("l4t", "jetpack", "power_mode"):
        there, here = getattr(built, field), getattr(machine, field)
        if there is not None and here is not None and there != here:
            add(field, there, here, refused=False)
    return tuple(found)


def _tensorrt_fits(built: str, here: str, *, newer: bool) -> bool:
    a, b = _numbers(built), _numbers(here)
    if newer:
        return b[:3] >= a[:3]
    shared = min(len(a), len(b))
    return a[:shared] == b[:shared]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def check_before_load(
    engine_path: str | os.PathLike[str],
    machine: Machine | Callable[[], Machine],
    *,
    verify: Literal["auto", "off"] = "auto",
    tensorrt_plan_version: str | None = None,
    refit: bool = False,
) -> list[str]:
    """Checks the manifest of a plan against the plan and this machine; gives warnings, one text each.

    A plan without a manifest has nothing to check. Raises `ManifestError` when the manifest is damaged or of another
    plan, when the plan may not run here (with a table of the differing fields and the command that builds a right one),
    and when the plan was stripped of its weights and is not about to be refitted. With ``verify="off"`` the same texts
    are warnings.

    `machine` may be a function, which is called only when it is needed. `tensorrt_plan_version` is what the plan's own
    header says; `refit` says that a refit follows.
    """
    if verify not in ("auto", "off"):
        raise ValueError(f'verify is {verify!r}; allowed: "auto", "off"')
    engine = Path(engine_path)
    warnings: list[str] = []
    try:
        manifest = Manifest.read(engine)
    except ManifestError as error:
        if verify == "auto":
            raise
        return [str(error)]
    if manifest is None:
        return []

    def refuse(error: ManifestError | None) -> None:
        if error is not None and verify == "auto":
            raise error
        if error is not None:
            warnings.append(str(error))

    refuse(_not_bound(engine, manifest, tensorrt_plan_version, hash_it=verify == "auto"))
    if manifest.stripped and not refit:
        refuse(_unrefitted(engine, manifest))
    here = machine() if callable(machine) else machine
    found = differences(manifest, here)
    refuse(_refused(engine, manifest, here, found))
    milder = [d for d in found if not d.refused]
    if milder:
        rows = ", ".join(f"{d.field} is {d.here}, in the manifest {d.manifest}" for d in milder)
        warnings.append(f"{engine} was built on a machine that was set up differently: {rows}.")
    return warnings


def check_for_core(
    engine: str | os.PathLike[str],
    gpu: Mapping[str, Any],
    verify: Literal["auto", "off"],
    version: str,
    refit: str | os.PathLike[str] | None,
) -> list[str]:
    """What `jetrt.Engine` calls: `check_before_load`, and for a plan without weights that the ONNX is the right one."""
    warnings = check_before_load(
        engine,
        lambda: Machine.here(core=lambda _: gpu),
        verify=verify,
        tensorrt_plan_version=version,
        refit=refit is not None,
    )
    if refit is None:
        return warnings
    from ..builder.onnx_file import OnnxFile

    try:
        manifest = Manifest.read(engine)
        if manifest is not None:
            check_refit(manifest, OnnxFile.open(refit).sha256().sha256)
    except ManifestError as error:
        if verify == "auto":
            raise
        warnings.append(str(error))
    return warnings


def _not_bound(engine: Path, manifest: Manifest, header: str | None, *, hash_it: bool) -> ManifestError | None:
    """What shows that the manifest is not the one of this plan."""
    path, expected = Manifest.path_for(engine), manifest.engine
    found: dict[str, tuple[Any, Any]] = {}
    try:
        sidecar = Sha256Sidecar.read(engine)
    except PlanError as error:
        return ManifestError(str(error), path=error.path)
    if sidecar is not None:
        found[str(Sha256Sidecar.path_for(engine))] = sidecar.sha256, expected.sha256
    if header is not None and not _same_release(header, manifest.machine.tensorrt):
        found["TensorRT in its header"] = header, manifest.machine.tensorrt
    if engine.exists():  # a missing plan is the loader's to report
        found["size in bytes"] = engine.stat().st_size, expected.bytes
        if sidecar is None and hash_it and not _wrong(found):
            found["SHA-256 of the plan"] = sha256_of(engine), expected.sha256
    wrong = _wrong(found)
    if not wrong:
        return None
    rows = [[what, str(there), str(said)] for what, there, said in wrong]
    return ManifestError(
        f"{engine}: {path} (written for {expected.file!r}) is not the manifest of this plan:\n"
        f"{aligned(['', 'found', 'in the manifest'], rows)}\n"
        "One of the files was edited, copied alone, or left by an interrupted build. Copy them again together, or "
        'build the plan again. verify="off" loads it anyway.',
        path=str(engine),
        differences=[(what, said, there) for what, there, said in wrong],
        command=rebuild_command(manifest),
    )


def _wrong(found: dict[str, tuple[Any, Any]]) -> list[tuple[str, Any, Any]]:
    return [(what, there, said) for what, (there, said) in found.items() if there != said]


def _same_release(header: str, manifest: str) -> bool:
    # The header keeps one byte of the build number.
    a, b = ([n & 0xFF for n in _numbers(version)] for version in (header, manifest))
    shared = min(len(a), len(b))
    return a[:shared] == b[:shared]


def _refused(engine: Path, manifest: Manifest, machine: Machine, found: tuple[Difference, ...]) -> ManifestError | None:
    rows = [d for d in found if d.refused]
    if not rows:
        return None
    lines = [
        f"{engine} was built for another machine and is refused:",
        aligned(["field", "in the manifest", "here"], [[d.field, str(d.manifest), str(d.here)] for d in rows]),
    ]
    mode = next((d for d in found if d.field == "power_mode"), None)
    if mode is not None and any(d.field == "sm_count" for d in rows):
        lines.append(
            f"The power mode differs too ({mode.manifest} in the manifest, {mode.here} here), and a lower one switches "
            f"SMs off: set {mode.manifest} again with nvpmodel, or build for this one."
        )
    command = rebuild_command(manifest, machine)
    lines.append(
        f"This builds a right one here:\n  {command}"
        if command
        else "It came without the command that built it: build it here from its ONNX with `jetrt build`."
    )
    lines.append('verify="off" loads it anyway.')
    return ManifestError(
        "\n".join(lines),
        path=str(engine),
        differences=[(d.field, d.manifest, d.here) for d in rows],
        command=command,
    )


def rebuild_command(manifest: Manifest, machine: Machine | None = None) -> str | None:
    """The command line that makes this plan, quoted for a shell; ``None`` when the manifest has none.

    A plan that is named by `EngineFilenameSchema` gets the name that it has on `machine`.
    """
    if manifest.command is None:
        return None
    argv = list(manifest.command)
    if machine is not None:
        try:
            old = EngineFilenameSchema.parse(manifest.engine.file)
            new = str(EngineFilenameSchema.for_machine(old.model, machine, old.precision))
            argv = [str(Path(a).with_name(new)) if Path(a).name == manifest.engine.file else a for a in argv]
        except BuildOptionError:
            pass  # a name of the user's own
    return shlex.join(argv)


# ----------------------------------------------------------------------------------------------------------- refit


def needs_refit(manifest: Manifest) -> bool:
    """Whether the plan has no weights, so that it would compute nonsense before a refit."""
    return manifest.stripped


def _unrefitted(engine: Path, manifest: Manifest) -> ManifestError:
    model = manifest.model.file if manifest.model else "m.onnx"
    return ManifestError(
        f"{engine} was built without weights (--strip-plan) and computes nonsense until it is refitted. Load it with "
        f"its model: jetrt.Engine({engine.name!r}, refit={model!r}).",
        path=str(engine),
        found="a stripped plan without refit",
        allowed=f"refit={model!r}",
    )


def check_refit(manifest: Manifest, onnx_sha256: str) -> None:
    """Raises `ManifestError` when the ONNX with this hash (external data included) is not the one of the plan.

    A stripped plan assumes the very weights that it was built with; others give wrong results without an error.
    """
    model = manifest.model
    if model is None:
        raise ManifestError(
            f"{manifest.engine.file}: its manifest names no ONNX model, so that none can be checked for a refit. Build "
            "the plan again from its ONNX.",
            path=manifest.engine.file,
        )
    if model.sha256 != onnx_sha256:
        raise ManifestError(
            f"{manifest.engine.file} was built from {model.file!r} with SHA-256 {model.sha256}, and the ONNX given for "
            f"the refit has {onnx_sha256}. Give the ONNX that it was built from, or build the plan again from this.",
            path=manifest.engine.file,
            found=onnx_sha256,
            allowed=model.sha256,
        )
