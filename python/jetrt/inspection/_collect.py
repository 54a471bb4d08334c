"""Gathers what is known about a plan as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from ..errors import BuildOptionError, JetrtError, ManifestError, PlanError
from ..report import dims

if TYPE_CHECKING:
    import os

    from ..builder.cases import Case
    from ..builder.profiles import Profile

SCHEMA: Final = "jetrt-inspection-1"

Shapes = Mapping[str, Sequence[int]]
Data = dict[str, Any]


def collect(
    path: str | os.PathLike[str],
    *,
    gpu: Literal["auto", "off", "require"] = "auto",
    profile: int = 0,
    shapes: Shapes | None = None,
    runs: int = 20,
    load: Mapping[str, Any] | None = None,
    open_engine: Callable[..., Any] | None = None,
    machine: Callable[[], Any] | None = None,
) -> Data:
    """Everything about the plan, as dicts, lists and plain values (JSON).

    `profile` and `shapes` (input name -> shape; the profile's opt if left out) say for what the layers are shown and
    timed, `runs` how often; `load` are further options of `jetrt.Engine`, such as ``refit``. What could not be had is
    ``None``, with the reason in the key of that name with ``_problem`` appended. `open_engine` and `machine` replace
    `jetrt.Engine` and `Machine.here`, for tests.

    Raises `PlanError` for a file that is no plan, `BuildOptionError` for a profile or shape that the plan does not
    have, and, where the GPU is required, whatever loading it raised.
    """
    from .._core import read_plan
    from ..provenance import Machine, Manifest, Sha256Sidecar, differences, sha256_of

    path = Path(path)
    data: Data = {
        "schema": SCHEMA,
        "file": {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)},
        "plan": dict(read_plan(path)),
        "manifest": None,
        "here": None,
        "differences": [],
        "device": None,
    }
    data["file"]["sidecar"] = _sidecar(Sha256Sidecar, path, data["file"]["sha256"])
    try:
        manifest = Manifest.read(path)
    except ManifestError as error:
        manifest, data["manifest_problem"] = None, str(error)
    if manifest is not None:
        data["manifest"] = manifest.to_mapping()
        if manifest.engine.sha256 != data["file"]["sha256"]:
            data["manifest_problem"] = (
                f"it was written for {manifest.engine.file!r} with SHA-256 {manifest.engine.sha256}, which is not "
                "this plan: one of the two was edited or copied alone"
            )
    if gpu == "off":
        data["device_problem"] = "it was not asked for"
        return data

    try:
        here = (machine or Machine.here)()
        data["here"] = dict(vars(here))
        if manifest is not None:
            data["differences"] = [dict(vars(difference)) for difference in differences(manifest, here)]
        with _opened(path, {"graphs": "off", "profile": profile, **(load or {})}, open_engine) as engine:
            data["device"] = _device(engine, data["manifest"], profile, shapes or {}, runs)
    except BuildOptionError:
        raise
    except (JetrtError, OSError) as error:
        if gpu == "require":
            raise
        data["device_problem"] = f"{type(error).__name__}: {error}"
    return data


def _sidecar(kind: Any, path: Path, digest: str) -> str:
    try:
        found = kind.read(path)
    except PlanError as error:
        return str(error)
    if found is None:
        return "none"
    return "matches" if found.sha256 == digest else f"differs: it says {found.sha256}"


def _opened(path: Path, options: Mapping[str, Any], open_engine: Callable[..., Any] | None) -> Any:
    if open_engine is None:
        from .._core import Engine

        open_engine = Engine
    try:
        return open_engine(path, **options)
    except ValueError as error:
        if isinstance(error, JetrtError):
            raise
        raise BuildOptionError(f"{path}: {error}") from error  # such as a profile that it does not have


def _device(engine: Any, manifest: Data | None, profile: int, shapes: Shapes, runs: int) -> Data:
    """What TensorRT says of the loaded plan."""
    from ..builder.audit import ACCEPTED, audit

    chosen = _profile(engine, manifest, profile, shapes)
    sizes = {name: bounds.opt for name, bounds in chosen.shapes.items() if engine.inputs[name].location == "device"}
    report = engine.load_report
    tensors = {"inputs": engine.inputs, "outputs": engine.outputs}
    found: Data = {
        "tensorrt": engine.tensorrt_version,
        "gpu": engine.device,
        "profile": profile,
        "profiles": engine.num_profiles,
        "shapes": {name: list(shape) for name, shape in sizes.items()},
        "memory": {
            "context_bytes": engine.device_memory_size,
            "load_peak_host_bytes": report.get("peak_host_bytes"),
            "load_seconds": report.get("seconds"),
        },
        "warnings": list(report.get("warnings", ())),
        **{
            kind: [
                {
                    **{key: getattr(info, key) for key in ("name", "dtype", "location", "format")},
                    "shape": list(info.shape),
                    "profiles": [[list(shape) for shape in bounds] for bounds in info.profiles],
                }
                for info in infos.values()
            ]
            for kind, infos in tensors.items()
        },
        "timing": None,
    }
    times: list[tuple[str, list[float]]] = []
    try:
        measured = engine.layer_times(_inputs(engine, chosen).inputs, runs=runs)
        times = [(name, [run[i][1] for run in measured]) for i, (name, _) in enumerate(measured[0])]
        found["timing"] = {"runs": len(measured), "run_ms": [sum(ms for _, ms in run) for run in measured]}
    except JetrtError as error:
        found["timing_problem"] = f"{type(error).__name__}: {error}"

    asked = ((manifest or {}).get("options") or {}).get("precision")
    known = asked in ACCEPTED
    # Without a request there is nothing to judge, but the layers are what they are.
    result = audit(engine.inspect(sizes, profile=profile), times, str(asked) if known else "mixed").to_mapping()
    found["layers"] = result.pop("layers")
    found["audit"] = result if known else {"requested": None, "shares": result["shares"]}
    return found


def _profile(engine: Any, manifest: Data | None, number: int, shapes: Shapes) -> Profile:
    """The profile of that number, narrowed to the shapes that are asked for."""
    from ..builder.profiles import InputRange, Profile

    ranges = {}
    for name, info in engine.inputs.items():
        bounds = info.profiles[number] if info.profiles else [info.shape] * 3
        ranges[name] = InputRange(*map(tuple, bounds))
    for name, shape in shapes.items():
        allowed = ranges.get(name)
        if allowed is None:
            raise _no_shape(name, shape, f"the inputs are {', '.join(ranges)}")
        low, high = allowed.min, allowed.max
        if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            raise _no_shape(name, shape, f"profile {number} has {dims(low)} to {dims(high)}")
        ranges[name] = InputRange(*[tuple(shape)] * 3)
    values: Mapping[str, Any] = {}
    if manifest is not None and any(info.location == "host" for info in engine.inputs.values()):
        try:
            values = Profile.from_mapping(manifest["profiles"][number]).values
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{engine.path}: profile {number} in its manifest is damaged: {error!r}") from error
    return Profile(ranges, values)


def _no_shape(name: str, shape: Sequence[int], allowed: str) -> BuildOptionError:
    return BuildOptionError(
        f"--shape {name}={'x'.join(map(str, shape))}: {allowed}.", option="--shape", found=list(shape), allowed=allowed
    )


def _inputs(engine: Any, profile: Profile) -> Case:
    """Random inputs of the profile's opt shapes; values of shape tensors as the manifest has them."""
    from ..builder.cases import points
    from ..builder.profiles import NetworkInput

    unknown = [n for n, info in engine.inputs.items() if info.location == "host" and n not in profile.values]
    if unknown:
        raise PlanError(f"without a manifest the values of the shape tensor {', '.join(unknown)} are not known")
    infos = [
        NetworkInput(name, info.dtype, tuple(info.shape), info.location == "host")
        for name, info in engine.inputs.items()
    ]
    return next(case for case in points([profile], infos) if case.point == "opt")
