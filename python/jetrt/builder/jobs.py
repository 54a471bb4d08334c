"""What the child process does: plain functions of a request and arrays. Only here is TensorRT touched for a build."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..errors import EngineBuildError, ModelError
from .arrays import Array
from .child import Context
from .frames import Message
from .layers import precision_layers
from .options import BuildOptions
from .profiles import NetworkInput, Profile, resolve

__all__ = ["JOBS", "problems_text"]

Answer = tuple[Message, Mapping[str, Array]]


def identify(context: Context) -> Answer:
    """What this machine is, and where its TensorRT lies; in a child, so that the caller holds no CUDA context."""
    machine = dict(_core._machine(context.request["device"]))
    return {"machine": machine, "library": _core.library_info()["path"]}, {}


# ------------------------------------------------------------------------------------------------------------- building


def problems_text(path: str, problems: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{path}: TensorRT's ONNX parser refused it ({len(problems)} problem{'s' if len(problems) > 1 else ''}):"]
    for problem in problems[:20]:
        where = f"node {problem['node']} {problem['name']!r}" if problem["node"] >= 0 else "the file"
        operator = f" ({problem['operator']})" if problem["operator"] else ""
        stack = f", in {' > '.join(problem['stack'])}" if problem["stack"] else ""
        lines.append(f"  {where}{operator}{stack}: {problem['code']}: {problem['reason']}")
    if len(problems) > 20:
        lines.append(f"  … and {len(problems) - 20} more")
    lines.append(
        "Export it again with other operators or another opset, give a plugin library with --plugins, or build it with "
        "a newer TensorRT."
    )
    return "\n".join(lines)


def build(context: Context) -> Answer:
    """Parses, configures, builds and writes a plan."""
    request = context.request
    config, options = request["config"], BuildOptions.from_mapping(request["options"])
    context.phase("start")
    network = _core._Network(
        strongly_typed=config["strongly_typed"], plugins=config["plugins"], device=request["device"]
    )
    with context.watched(network.progress):
        context.phase("parse")
        problems = network.parse(request["onnx"], flags=list(config["parser_flags"]))
        if problems:
            raise ModelError(problems_text(request["onnx"], problems), path=request["onnx"], problems=problems)
        inputs = [NetworkInput.from_mapping(info) for info in network.inputs]
        profiles = resolve(inputs, options.hints())
        layers = network.layers
        context.phase("configure")
        seen = len(context.lines)
        kept = _configure(network, config, options, profiles, layers, request)
        _calibrator(context, network)
        wrong = [line for level, line in context.lines[seen:] if level >= 40]
        if wrong:
            raise EngineBuildError(
                f"{request['onnx']}: TensorRT complained while the build was configured, so the plan would not be the "
                f"one that was asked for: {'; '.join(wrong)}",
                path=request["onnx"],
                log=wrong,
            )
        timing = _timing_cache(network, request)  # what TensorRT says of a foreign one is no fault of the build
        context.phase("build")
        with _writing(Path(request["plan"])):
            built = network.build(request["plan"])
        context.phase("finish")
        arrays: dict[str, Array] = {}
        if network.calibration_cache is not None:
            arrays["calibration_cache"] = np.frombuffer(network.calibration_cache, np.uint8)
        timing["sha256"] = _store_timing_cache(network, request)
    return {
        "tensorrt": network.tensorrt,
        "bytes": built["bytes"],
        "seconds": built["seconds"],
        "flags": network.flags,
        "memory_limits": {pool: network.memory_limit(pool) for pool in ("WORKSPACE", "TACTIC_DRAM")},
        "level": network.option("builder_optimization_level"),
        "inputs": network.inputs,
        "outputs": network.outputs,
        "profiles": [profile.to_mapping() for profile in profiles],
        "layers": layers,
        "fp32_layers": kept,
        "calibration_batches": network.calibration_batches,
        "timing_cache": timing,
    }, arrays


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Full disks and folders that cannot be written, told as such; nothing of the file is left."""
    from ..provenance import write_error

    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise write_error(error, path) from None


def _configure(
    network: Any,
    config: Mapping[str, Any],
    options: BuildOptions,
    profiles: Sequence[Profile],
    layers: Sequence[Mapping[str, Any]],
    request: Mapping[str, Any],
) -> list[str]:
    """Every setter reads its value back. The names of the layers that stay in fp32."""
    for name in config["flags_off"]:
        network.set_flag(name, False)
    for name in config["flags_on"]:
        network.set_flag(name, True)
    for pool, size in config["memory_limits"].items():
        network.set_memory_limit(pool, size)
    for name, value in config["settings"].items():
        network.set_option(name, value)
    if request.get("level") is not None:
        network.set_option("builder_optimization_level", request["level"])
    if config["tactic_sources"] is not None:
        network.set_tactic_sources(list(config["tactic_sources"]))
    for entry in config["io_formats"]:
        network.set_io_format(entry["name"], entry["dtype"], list(entry["formats"]))
    if options.version_compatible and config["plugins"]:
        network.set_plugins_to_serialize(list(config["plugins"]))
    kept = []
    if options.fp32_patterns or options.fp32_norms:
        for index in precision_layers(options.fp32_patterns, layers, norms=options.fp32_norms):
            network.set_layer_precision(index, "float32")
            kept.append(layers[index]["name"])
    dynamic = any(-1 in info["shape"] or info["shape_tensor"] for info in network.inputs)
    for profile in profiles if dynamic else ():
        shapes = {name: (bounds.min, bounds.opt, bounds.max) for name, bounds in profile.shapes.items()}
        network.add_profile(shapes, {name: tuple(map(list, triple)) for name, triple in profile.values.items()})
    return kept


def _calibrator(context: Context, network: Any) -> None:
    wanted = context.request.get("calibration")
    if wanted is None:
        return
    cache = context.arrays.get("calibration_cache")

    def next_batch(names: list[str]) -> Mapping[str, Array] | None:
        reply, arrays = context.ask({"question": "batch", "names": names})
        return arrays if reply["more"] else None

    network.set_calibrator(
        wanted["algorithm"],
        wanted["batch_size"],
        next_batch,
        {name: list(shape) for name, shape in wanted["shapes"].items()},
        None if cache is None else cache.tobytes(),
    )


def _timing_cache(network: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Starts from the file, or from nothing; without either TensorRT keeps no cache that could be stored."""
    from ..provenance import engine_lock

    path = request.get("timing_cache")
    found: dict[str, Any] = {"file": path and Path(path).name, "used": False, "problem": None}
    if path is None:
        return found
    with engine_lock(path, timeout=60):  # refuses a folder that cannot be written before the build, not after it
        pass
    data = b""
    with contextlib.suppress(FileNotFoundError):
        data = Path(path).read_bytes()
    if data:
        try:
            found["used"] = bool(network.set_timing_cache(data))
        except EngineBuildError as error:
            found["problem"] = f"{path} cannot be read as a timing cache: {error}"
        if not found["used"] and found["problem"] is None:
            found["problem"] = f"{path} is of another TensorRT, GPU or configuration and was not used"
    if not found["used"] and not network.set_timing_cache(b""):
        raise EngineBuildError("TensorRT takes no timing cache, not even an empty one.")
    return found


def _store_timing_cache(network: Any, request: Mapping[str, Any]) -> str | None:
    """Adds what was measured to the file, which another build may have extended meanwhile."""
    import hashlib

    from ..provenance import engine_lock, temporary_for

    if request.get("timing_cache") is None:
        return None
    path = Path(request["timing_cache"])
    with engine_lock(path, timeout=60):
        with contextlib.suppress(FileNotFoundError, EngineBuildError):
            network.combine_timing_cache(path.read_bytes())
        data: bytes = network.timing_cache() or b""
        temporary = temporary_for(path)
        with _writing(temporary):
            temporary.write_bytes(data)
            temporary.replace(path)
    return hashlib.sha256(data).hexdigest()


# -------------------------------------------------------------------------------------------------------------- running


def _cases(context: Context) -> list[dict[str, Array]]:
    """Inputs come as "0/name", "1/name", …"""
    cases: list[dict[str, Array]] = [{} for _ in range(context.request["cases"])]
    for key, array in context.arrays.items():
        index, _, name = key.partition("/")
        cases[int(index)][name] = array
    return cases


def _load(context: Context, plan: str) -> Any:
    request = context.request
    return _core.Engine(
        plan,
        device=request["device"],
        graphs="off",
        verify="off",
        host="staged",
        allow_host_code=True,
        plugins=request.get("plugins", []),
        refit=request.get("refit"),
    )


def run(context: Context) -> Answer:
    """Loads a plan, runs every case, and says what TensorRT says of it: outputs come back as "0/name", …"""
    context.phase("load")
    cases = _cases(context)
    outputs: dict[str, Array] = {}
    with _load(context, context.request["plan"]) as engine:
        context.phase("run")
        for index, inputs in enumerate(cases):
            found = engine.run(inputs, synchronize=True)
            outputs |= {f"{index}/{name}": np.array(value) for name, value in found.items()}
        result = _tables(engine)
        runs = context.request.get("layer_runs", 0)
        if runs:
            context.phase("layers")
            chosen = context.request["layer_case"]
            device = {k: v.shape for k, v in cases[chosen].items() if engine.inputs[k].location == "device"}
            result["inspector"] = json.loads(
                engine.inspect(device or None, profile=context.request.get("layer_profile", 0))
            )
            result["layer_times"] = engine.layer_times(cases[chosen], runs=runs)
    return result, outputs


def _tables(engine: Any) -> dict[str, Any]:
    def rows(table: Mapping[str, Any]) -> list[dict[str, Any]]:
        keys = ("name", "dtype", "location", "format")
        return [{**{key: getattr(info, key) for key in keys}, "shape": list(info.shape)} for info in table.values()]

    shapes = [
        {name: dict(zip(("min", "opt", "max"), info.profiles[i], strict=True)) for name, info in engine.inputs.items()}
        for i in range(engine.num_profiles)
        if all(info.profiles for info in engine.inputs.values())
    ]
    return {
        "inputs": rows(engine.inputs),
        "outputs": rows(engine.outputs),
        "profile_shapes": shapes,
        "context_bytes": engine.device_memory_size,
        "tensorrt": engine.tensorrt_version,
        "warnings": list(engine.load_report["warnings"]),
    }


def trial(context: Context) -> Answer:
    """Runs every case again and again; the same inputs must give the same outputs each time that is looked at."""
    context.phase("load")
    cases, request = _cases(context), context.request
    runs, seconds = [], []
    with _load(context, request["plan"]) as engine:
        context.phase("run")
        for index, inputs in enumerate(cases):
            first = {name: np.array(value) for name, value in engine.run(inputs, synchronize=True).items()}
            begin, count = time.monotonic(), 1
            while count < request["runs"] and time.monotonic() - begin < request["seconds"]:
                found = engine.run(inputs, synchronize=True)
                count += 1
                if count % 50 == 0:
                    for name, value in found.items():
                        if np.array(value).tobytes() != first[name].tobytes():
                            raise EngineBuildError(
                                f"output {name!r} changed between runs of the same inputs (case {index}, run {count})."
                            )
            runs.append(count)
            seconds.append(time.monotonic() - begin)
    return {"runs": runs, "seconds": seconds}, {}


def race(context: Context) -> Answer:
    """Times several plans side by side: in each round every plan passes once over the cases."""
    context.phase("load")
    cases, request = _cases(context), context.request
    with contextlib.ExitStack() as stack:
        engines = {level: stack.enter_context(_load(context, plan)) for level, plan in request["plans"].items()}
        context.phase("race")
        for engine in engines.values():
            for inputs in cases * 3:
                engine.run(inputs, synchronize=True)
        rounds: dict[str, list[float]] = {level: [] for level in engines}
        end = time.monotonic() + request["seconds"]
        names = list(engines)
        for turn in range(request["rounds"]):
            if time.monotonic() > end and turn >= 10:
                break
            # Another one begins in each round, so that none always follows the same one.
            for level in names[turn % len(names) :] + names[: turn % len(names)]:
                begin = time.perf_counter()
                for inputs in cases:
                    engines[level].run(inputs, synchronize=True)
                rounds[level].append(time.perf_counter() - begin)
    return {"rounds": rounds}, {}


def reference(context: Context) -> Answer:
    """Reference outputs for every case, as "0/name", …; or the reason why there are none."""
    from . import reference as references

    context.phase("reference")
    request = context.request
    cases, places = _cases(context), request["places"]
    outputs: dict[str, Array] = {}
    found: list[dict[str, Any]] = []
    try:
        with references.opened(request["onnx"], **request["source"], outputs=request["outputs"]) as source:
            for index, (inputs, (profile, point)) in enumerate(zip(cases, places, strict=True)):
                got = source.compute(inputs, profile=profile, point=point)
                found.append({**got.to_mapping(), "seconds": got.seconds})
                outputs |= {f"{index}/{name}": value for name, value in got.outputs.items()}
    except references.ReferenceUnavailable as error:
        return {"unavailable": error.message}, {}
    return {"references": found}, outputs


JOBS: dict[str, Callable[[Context], Answer]] = {
    "identify": identify,
    "build": build,
    "run": run,
    "trial": trial,
    "race": race,
    "reference": reference,
}
