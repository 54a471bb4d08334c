"""`jetrt build` on real models: transcripts, accuracy, audit, cost against NVIDIA's binding, and what auto chooses.

    python benches/build_models.py --work /tmp/work --out results/ [--only ocr,dit,auto,cost] [--jobs 8] [--level 2]

Needs a GPU and a TensorRT with its builder (JETRT_TENSORRT_PATH). The models are those of tests/gpu/workloads.py. Every
build is the command line in a process of its own, and its transcript is kept; only the builds' own gates judge.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import workloads  # noqa: E402


def profile_flags(shapes: tuple[tuple[int, ...], ...]) -> list[str]:
    words = []
    for bound, shape in zip(("--min", "--opt", "--max"), shapes, strict=True):
        words += [bound, "x:" + "x".join(map(str, shape))]
    return words


def shown(text: str, *files: Path) -> str:
    """Without the folders, which differ on every machine."""
    for file in files:
        text = text.replace(f"{file.parent}/", "")
    return text


def command(onnx: Path, engine: Path, *more: str) -> dict[str, Any]:
    """One `jetrt build`, with what it printed."""
    words = ["build", "--onnx", str(onnx), "--engine", str(engine), "--progress", "plain", *more]
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "jetrt", *words], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    result: dict[str, Any] = {
        "command": shown(shlex.join(["jetrt", *words]), onnx, engine),
        "status": done.returncode,
        "seconds": round(seconds, 2),
        "output": shown(done.stdout, onnx, engine),
        "messages": shown(done.stderr[-6000:], onnx, engine),
    }
    manifest = Path(f"{engine}.json")
    if done.returncode == 0 and manifest.exists():
        found = json.loads(manifest.read_text())
        parity = found["parity"]
        result |= {
            "bytes": found["engine"]["bytes"],
            "build": found["build"],
            "parity": parity["state"],
            "audit": {key: found["audit"][key] for key in ("share", "shares", "findings")} if found["audit"] else None,
            "outputs": [
                {
                    "point": f"{case['profile']}.{case['point']}",
                    **{key: output[key] for key in ("output", "cosine", "max_abs", "max_rel")},
                }
                for case in parity["cases"]
                for output in case["outputs"]
            ],
            "machine": found["machine"],
            "levels": found["levels"],
        }
    print(f"{result['status']} {seconds:6.1f} s  {result['command']}", flush=True)
    return result


def ocr(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Detection and recognition in four precisions, and the text that each pair reads from a drawn page."""
    import jetrt

    detection, recognition = workloads.ocr_models()
    sets = workloads.calibration_sets(work, count=16)
    drawn = workloads.parity_inputs(work)
    level = ["--opt-level", str(options.level)] if options.level is not None else []

    def one(name: str, precision: str) -> dict[str, Any]:
        onnx, shapes, data = {
            "det": (detection, workloads.DETECTION_SHAPES, sets[0]),
            "rec": (recognition, workloads.RECOGNITION_SHAPES, sets[1]),
        }[name]
        more = ["--precision", precision, *level, "--timing-cache", str(work / "timing.cache"), *profile_flags(shapes)]
        if precision == "int8":
            more += [
                "--calib-data",
                str(data),
                "--calib-cache",
                str(work / f"{name}.calib"),
                "--calib-min-samples",
                "1",
                "--inputs",  # ranges of drawn pages clip noise, which is what the gate would make up
                str(drawn[name]),
            ]
        engine = work / f"{name}_{precision}.engine"
        result = command(onnx, engine, *more)
        if result["status"] != 0:  # kept for its figures and its text, though the gate refused it
            result["without limits"] = command(onnx, engine, *more, "--cosine", "none", "--max-rel", "none")
        return result

    pairs = [(name, precision) for precision in options.precisions.split(",") for name in ("rec", "det")]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda pair: one(*pair), pairs))
    results: dict[str, Any] = {f"{name}_{p}": result for (name, p), result in zip(pairs, found, strict=True)}
    page, lines = workloads.demo_page()
    characters = workloads.alphabet(recognition)
    texts: dict[str, Any] = {"drawn": lines}
    for precision in options.precisions.split(","):
        try:
            detect = jetrt.Engine(work / f"det_{precision}.engine", graphs="off")
            recognise = jetrt.Engine(work / f"rec_{precision}.engine", graphs="off")
            texts[precision] = workloads.read_page(
                page, workloads.function(detect), workloads.function(recognise), characters
            )
        except Exception as error:
            texts[precision] = f"{type(error).__name__}: {error}"
    results["texts"] = texts
    if {"fp32", "fp16"} <= texts.keys():
        results["fp16 reads what fp32 reads"] = texts["fp32"] == texts["fp16"]
    return results


def dit_model(work: Path) -> tuple[Path, list[str], dict[str, Any]]:
    """The DiT's file, the flags of its build, and min, opt and max by input."""
    model = workloads.Dit(layers=2)
    onnx = work / "dit.onnx"
    model.write(onnx)
    words, profile = ["--strongly-typed"], {}
    for bound, length in zip(("--min", "--opt", "--max"), model.lengths, strict=True):
        words += [
            bound,
            ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in model.shapes(length).items()),
        ]
        for name, shape in model.shapes(length).items():
            profile.setdefault(name, []).append(shape)
    return onnx, words, profile


def dit(work: Path, _: argparse.Namespace) -> dict[str, Any]:
    onnx, flags, _ = dit_model(work)
    return {"dit_2_layers": command(onnx, work / "dit.engine", *flags)}


def auto(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What auto picks, and whether it is ever slower than the default level."""
    if options.auto_model:
        model, name = options.auto_model, options.auto_model.stem
        flags = ["--precision", "fp16", *profile_flags(((1, 3, 64, 64), (4, 3, 64, 64), (16, 3, 64, 64)))]
    else:
        (model, flags, _), name = dit_model(work), "dit_2_layers"
    flags += ["--timing-cache", str(work / "timing.cache"), "--opt-level", "auto"]
    return {f"auto_{name}": command(model, work / "auto.engine", *flags)}


BINDING = """
import sys, time, json, resource
import tensorrt_bindings as trt
logger = trt.Logger(trt.Logger.ERROR)
trt.init_libnvinfer_plugins(logger, "")
onnx, plan, profiles = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
begin = time.monotonic()
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(onnx)
config = builder.create_builder_config()
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
profile = builder.create_optimization_profile()
for name, shapes in profiles.items():
    profile.set_shape(name, *shapes)
config.add_optimization_profile(profile)
start = time.monotonic()
data = builder.build_serialized_network(network, config)
built = time.monotonic() - start
open(plan, "wb").write(data)
print(json.dumps({"build_seconds": built, "seconds": time.monotonic() - begin,
                  "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def cost(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build time and memory against NVIDIA's binding, the same model and flags, in turn."""
    onnx, flags, profile = dit_model(work)
    rounds: dict[str, list[Any]] = {"binding": [], "jetrt": [], "jetrt with parity and audit": []}
    for turn in range(options.rounds):
        words = [sys.executable, "-c", BINDING, str(onnx), str(work / "b.engine"), json.dumps(profile)]
        begin = time.monotonic()
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        wall = round(time.monotonic() - begin, 2)
        rounds["binding"].append(json.loads(done.stdout.splitlines()[-1]) | {"wall_seconds": wall})
        print(rounds["binding"][-1], flush=True)
        for name, more in (("jetrt", ["--no-parity", "--no-audit"]), ("jetrt with parity and audit", [])):
            result = command(onnx, work / f"cost{turn}{len(more)}.engine", *flags, *more)
            build = result.get("build") or {}
            rounds[name].append(
                {
                    "build_seconds": build.get("seconds"),
                    "seconds": sum(build.get("phases", {}).values()),  # as the binding's: all that its process did
                    "wall_seconds": result["seconds"],
                    "phases": build.get("phases"),
                    "peak_bytes": build.get("peak_host_bytes"),
                    "status": result["status"],
                }
            )
    medians = {
        name: {
            key: statistics.median(row[key] for row in rows if row[key] is not None)
            for key in ("build_seconds", "seconds", "wall_seconds", "peak_bytes")
            if any(row[key] is not None for row in rows)
        }
        for name, rows in rounds.items()
    }
    return {"rounds": rounds, "medians": medians}


SECTIONS = {"ocr": ocr, "dit": dit, "auto": auto, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where models and plans go")
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--jobs", type=int, default=1, help="builds at a time in ocr; more than 1 disturbs their times")
    parser.add_argument("--level", type=int, metavar="N", help="optimisation level of ocr (TensorRT's own)")
    parser.add_argument("--auto-model", type=Path, metavar="FILE.onnx", help="x: float32 [B,3,64,64] (detection)")
    parser.add_argument("--precisions", default="int8,fp16,fp32,bf16", metavar="NAMES", help="of ocr")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of cost")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="NAMES")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only.split(","):
        try:
            found = SECTIONS[name](arguments.work, arguments)
        except Exception:
            found = {"failed": traceback.format_exc()}
            print(found["failed"], flush=True)
        (arguments.out / f"build_{name}.json").write_text(json.dumps(found, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
