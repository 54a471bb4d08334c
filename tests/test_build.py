"""What a build leaves: the plan as it was asked for, its checksum and manifest; and what loading makes of them."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fakes
import jetrt
from jetrt.cli import main
from jetrt.errors import (
    BuildOptionError,
    EngineBuildError,
    EngineDeserializeError,
    ManifestError,
    ParityError,
    PlanError,
)
from jetrt.provenance import Manifest, Sha256Sidecar

SHAPES = {"min": "x:1x64", "opt": "x:8x64", "max": "x:64x64"}
RANGE = {"min": [1, 64], "opt": [8, 64], "max": [64, 64]}
FILES = ["m.engine", "m.engine.json", "m.engine.sha256"]
X = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
Y = fakes.mlp_reference(X)

Build = Callable[..., Any]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Builds m.engine from m.onnx. Without the tries that follow, unless parity=True."""

    def one(model: str = "mlp", fields: dict[str, Any] | None = None, engine: str = "m.engine", **more: Any) -> Any:
        if more.get("parity"):
            pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
        path = fakes.onnx_model(tmp_path / "m.onnx", model, **(fields or {}))
        shapes = SHAPES if model in ("mlp", "norm") and "min" not in more else {}
        quick = {"parity": False, "audit": False, "progress": "none"}
        return jetrt.build(path, tmp_path / engine, **{**quick, **shapes, **more})

    return one


def built(result: Any) -> dict[str, Any]:
    return dict(fakes.plan_content(result.path)["built"])


def output(engine: jetrt.Engine, x: Any = X) -> Any:
    return np.asarray(engine.run({"x": x}, synchronize=True)["y"])


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is left ---------------------------------------------------------------------------------------------------------


def test_what_a_build_leaves(tmp_path: Path, build: Build) -> None:
    result = build(parity=True, audit=True, precision="fp16")
    assert result.built
    assert left(tmp_path) == [*FILES, "m.onnx"]
    plan = (tmp_path / "m.engine").read_bytes()
    digest = hashlib.sha256(plan).hexdigest()
    assert (tmp_path / "m.engine.sha256").read_text() == f"{digest}  m.engine\n"
    manifest = json.loads((tmp_path / "m.engine.json").read_text())
    assert Manifest.read(tmp_path / "m.engine") == result.manifest
    assert manifest["schema"] == "jetrt-manifest-1"
    assert manifest["origin"] == "build"
    assert manifest["engine"] == {"file": "m.engine", "sha256": digest, "bytes": len(plan)}
    model = hashlib.sha256((tmp_path / "m.onnx").read_bytes()).hexdigest()
    assert (manifest["model"]["file"], manifest["model"]["sha256"]) == ("m.onnx", model)
    assert (manifest["model"]["opset"], manifest["model"]["producer"]) == (17, "fakes")
    assert manifest["options"]["precision"] == "fp16"
    asked = f"--precision fp16 --min {SHAPES['min']} --opt {SHAPES['opt']} --max {SHAPES['max']}"
    folder = shlex.quote(str(tmp_path))
    assert shlex.join(manifest["command"]) == f"jetrt build --onnx {folder}/m.onnx --engine {folder}/m.engine {asked}"
    machine = manifest["machine"]
    assert (machine["tensorrt"], machine["sm"], machine["sm_count"]) == ("10.6.0.26", 90, 16)
    assert machine["gpu"] == "Fake GPU 0"
    assert manifest["profiles"] == [{"shapes": {"x": RANGE}, "values": {}}]
    names = [(one["name"], one["dtype"], one["shape"]) for one in manifest["inputs"] + manifest["outputs"]]
    assert names == [("x", "float32", [-1, 64]), ("y", "float32", [-1, 10])]
    assert manifest["inputs"][0]["format"] == "Row major linear FP32 format (kLINEAR)"
    assert manifest["parity"]["state"] == "passed"
    assert [case["point"] for case in manifest["parity"]["cases"]] == ["min", "opt", "max"]
    assert manifest["audit"]["share"] == 1.0
    assert set(manifest["build"]["phases"]) == {"start", "parse", "configure", "build", "finish"}
    assert manifest["build"]["level"] == 3
    np.testing.assert_allclose(output(jetrt.Engine(result.path)), Y, atol=0.02)


def test_the_same_again_builds_nothing(build: Build) -> None:
    first = build()
    again = build()
    assert (first.built, again.built) == (True, False)
    assert again.manifest == first.manifest
    assert build(rebuild=True).built


@pytest.mark.parametrize("damage", ["plan", "sidecar", "neither"])
def test_a_damaged_one_is_built_again(tmp_path: Path, build: Build, damage: str) -> None:
    result = build()
    good = result.path.read_bytes()
    if damage == "plan":
        result.path.write_bytes(good[:-1] + b" ")
    elif damage == "sidecar":
        (tmp_path / "m.engine.sha256").write_text(f"{'0' * 64}  m.engine\n")
    assert build().built == (damage != "neither")
    assert Sha256Sidecar.read(result.path) == Sha256Sidecar.of(result.path)


def test_two_configurations_of_one_name(build: Build) -> None:
    build()
    with pytest.raises(EngineBuildError) as caught:
        build(precision="fp16", workspace="64M")
    assert re.search(
        r"m\.engine is there already and was built from something else:\n +there +wanted\n  precision +null +\"fp16\"\n"
        r"  workspace +null +67108864\nGive another --engine, or replace it with --overwrite \(overwrite=True\)\.$",
        caught.value.message,
    )
    assert build(precision="fp16", overwrite=True).built


def test_the_name_by_schema(tmp_path: Path) -> None:
    model = fakes.onnx_model(tmp_path / "m.onnx")
    result = jetrt.build(model, precision="bf16", parity=False, audit=False, progress="none", **SHAPES)
    assert result.path == tmp_path / "m__sm90_jpnone_trt10.6.0.26_bf16.engine"
    assert jetrt.Engine(result.path).load_report["sha256_verified"]


def test_external_data(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    model = fakes.onnx_model(tmp_path / "m.onnx", external="weights.bin")
    more: dict[str, Any] = {"progress": "none", **SHAPES}
    result = jetrt.build(model, tmp_path / "m.engine", **more)
    assert result.manifest.parity.state == "passed"
    assert result.manifest.model is not None
    assert [one.file for one in result.manifest.model.files] == ["m.onnx", "weights.bin"]
    np.testing.assert_allclose(output(jetrt.Engine(result.path)), Y, atol=1e-5)
    assert not jetrt.build(model, tmp_path / "m.engine", **more).built
    # Other weights are another model, though the ONNX file is the same.
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[3] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    with pytest.raises(EngineBuildError, match=r"was built from something else:\n +there +wanted\n  model sha256"):
        jetrt.build(model, tmp_path / "m.engine", **more)


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "flags", "precision"),
    [
        ({}, [], "float32"),
        ({"precision": "fp32"}, [], "float32"),  # TensorRT's own default would be TF32
        ({"precision": "tf32"}, ["TF32"], "tf32"),
        ({"precision": "fp16"}, ["FP16", "TF32"], "float16"),
        ({"precision": "bf16"}, ["TF32", "BF16"], "bfloat16"),
        ({"precision": "mixed"}, ["FP16", "TF32", "BF16"], "float16"),
        ({"strongly_typed": True}, [], "float32"),
        ({"strongly_typed": True, "precision": "tf32"}, ["TF32"], "tf32"),
    ],
)
def test_precisions(build: Build, options: dict[str, Any], flags: list[str], precision: str) -> None:
    result = build(parity=True, audit=True, **options)
    made = built(result)
    assert made["flags"] == flags
    assert made["strongly_typed"] == options.get("strongly_typed", False)
    assert made["precisions"]["/product"] == precision
    assert result.manifest.parity.state == "passed"
    assert result.manifest.audit is not None
    assert result.manifest.audit["share"] == 1.0


def test_strong_typing_takes_the_models_types(build: Build) -> None:
    with pytest.raises(BuildOptionError) as caught:
        build(strongly_typed=True, precision="fp16")
    assert caught.value.message.startswith(
        "--precision fp16: the network is strongly typed, so the plan computes in the model's types, and the model is "
        "fp32. Give --precision fp32, leave --strongly-typed out, or convert the model: python -m modelopt"
    )


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"fp32_norms": True}, {"/norm"}),
        ({"fp32_patterns": "/norm"}, {"/norm"}),
        ({"fp32_patterns": ["/re*", "norm"]}, {"/relu", "/norm"}),  # by the name of an output, too
    ],
)
def test_layers_in_fp32(build: Build, options: dict[str, Any], kept: set[str]) -> None:
    made = built(build("norm", precision="fp16", **options))
    assert {name for name, precision in made["precisions"].items() if precision == "float32"} == kept
    assert "OBEY_PRECISION_CONSTRAINTS" in made["flags"]


def test_a_pattern_without_a_layer(build: Build) -> None:
    with pytest.raises(BuildOptionError, match=r"--fp32-patterns '?/nothing\*'?"):
        build("norm", precision="fp16", fp32_patterns="/nothing*")


def test_io_formats(tmp_path: Path, build: Build) -> None:
    result = build(precision="fp16", io_formats=["x:fp16:linear"], parity=True)
    assert result.manifest.parity.state == "passed"
    engine = jetrt.Engine(result.path)
    assert (engine.inputs["x"].dtype, engine.outputs["y"].dtype) == ("float16", "float32")
    assert result.manifest.inputs[0].dtype == "float16"
    np.testing.assert_allclose(output(engine, X.astype(np.float16)), Y, atol=0.02)
    with pytest.raises(EngineBuildError, match=r"'z'.*'?x'?"):
        build(precision="fp16", io_formats=["z:fp16:linear"], engine="other.engine")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"workspace": "64M", "tactic_memory": "128M"}, {"WORKSPACE": 64 << 20, "TACTIC_DRAM": 128 << 20}),
        ({"tactic_shared_memory": "48K"}, {"TACTIC_SHARED_MEMORY": 48 << 10}),
        ({"low_memory_mode": True}, {"WORKSPACE": 256 << 20, "TACTIC_DRAM": 512 << 20, "BuilderOptimizationLevel": 0}),
        ({"aux_streams": 2}, {"MaxAuxStreams": 2}),
        ({"opt_level": 5}, {"BuilderOptimizationLevel": 5}),
        ({"tactic_sources": "CUBLAS"}, {"tactic_sources": ["CUBLAS"]}),
        ({"tactic_sources": ()}, {"tactic_sources": []}),
        ({}, {"ProfilingVerbosity": 2}),
        ({"profiling_verbosity": "layer_names_only"}, {"ProfilingVerbosity": 0}),
        ({"profiling_verbosity": "none"}, {"ProfilingVerbosity": 1}),
        ({"set_flags": ["DIRECT_IO"]}, {"flags": ["DIRECT_IO"]}),
        ({"set_flags": ["avg_timing_iterations=4", "max_nb_tactics=3"]}, {"AvgTimingIterations": 4, "MaxNbTactics": 3}),
        ({"refittable": True}, {"flags": ["REFIT"]}),
        ({"version_compatible": True}, {"flags": ["VERSION_COMPATIBLE"]}),
        ({"sparse_weights": True}, {"flags": ["SPARSE_WEIGHTS"]}),
    ],
)
def test_builder_settings(build: Build, options: dict[str, Any], found: dict[str, Any]) -> None:
    made = built(build(**options))
    assert {name: made["pools"].get(name, made.get(name)) for name in found} == found


def test_several_profiles(build: Build) -> None:
    more = {"min": ["x:1x64", "x:16x64"], "opt": ["x:1x64", "x:32x64"], "max": ["x:8x64", "x:64x64"]}
    result = build(parity=True, **more)
    (x, _) = fakes.plan_content(result.path)["io"]
    assert x["profiles"] == [[[1, 64], [1, 64], [8, 64]], [[16, 64], [32, 64], [64, 64]]]
    places = [(case["profile"], case["point"]) for case in result.manifest.parity.cases]
    # min and opt of the first are the same.
    assert places == [(0, "opt"), (0, "max"), (1, "min"), (1, "opt"), (1, "max")]
    assert len(jetrt.Engine(result.path).inputs["x"].profiles) == 2


def test_values_of_a_shape_tensor(build: Build) -> None:
    result = build("shape_input", min="size=[1,1]", opt="size=[2,3]", max="size=[8,8]", parity=True)
    assert result.manifest.parity.state == "passed"
    assert result.manifest.profiles[0]["values"] == {"size": {"min": [1, 1], "opt": [2, 3], "max": [8, 8]}}
    assert [one.location for one in result.manifest.inputs] == ["device", "host"]
    with pytest.raises(BuildOptionError) as caught:
        build("shape_input", engine="other.engine", min=[], opt=[], max=[])
    assert caught.value.message == (
        "'size' is a shape tensor, and nothing says which values it takes. Give --min 'size=[?,?]' --opt 'size=[?,?]' "
        "--max 'size=[?,?]' with a number for each ?."
    )


# Plans of a special kind ----------------------------------------------------------------------------------------------


def test_a_stripped_plan(tmp_path: Path, build: Build) -> None:
    result = build(strip_plan=True, parity=True)
    assert result.manifest.parity.state == "passed"  # it was refitted for that
    assert result.manifest.stripped
    assert set(built(result)["flags"]) == {"STRIP_PLAN", "REFIT_IDENTICAL"}
    assert fakes.plan_content(result.path)["stripped"]
    np.testing.assert_allclose(output(jetrt.Engine(result.path, refit=tmp_path / "m.onnx")), Y, atol=1e-5)
    advice = (
        f"{result.path} was built without weights (--strip-plan) and computes nonsense until it is refitted. Load it "
        "with its model: jetrt.Engine('m.engine', refit='m.onnx')."
    )
    with pytest.raises(ManifestError) as caught:
        jetrt.Engine(result.path)
    assert caught.value.message == advice
    assert jetrt.Engine(result.path, verify="off").load_report["warnings"] == [advice]

    w, b = fakes._mlp_weights()
    other = fakes.onnx_model(tmp_path / "other.onnx", weights={"w": 2 * w, "b": b})
    with pytest.raises(ManifestError) as caught:
        jetrt.Engine(result.path, refit=other)
    theirs = hashlib.sha256(other.read_bytes()).hexdigest()
    assert caught.value.message == (
        f"m.engine was built from 'm.onnx' with SHA-256 {result.manifest.model.sha256}, and the ONNX given for the "
        f"refit has {theirs}. Give the ONNX that it was built from, or build the plan again from this."
    )
    warnings = jetrt.Engine(result.path, refit=other, verify="off").load_report["warnings"]
    assert warnings == [caught.value.message]


def test_weight_streaming(build: Build) -> None:
    with pytest.raises(BuildOptionError, match=r"--weight-streaming: needs a strongly typed network\. Give --strongly"):
        build(weight_streaming=True)
    result = build(weight_streaming=True, strongly_typed=True, parity=True)
    assert built(result)["flags"] == ["WEIGHT_STREAMING"]
    assert result.manifest.parity.state == "passed"


def test_version_compatible(build: Build) -> None:
    result = build(version_compatible=True, parity=True)
    assert result.manifest.version_compatible
    assert result.manifest.parity.state == "passed"


def test_hardware_compatibility(tmp_path: Path, build: Build) -> None:
    result = build(hardware_compatibility="ampere_plus")
    assert fakes.plan_content(result.path)["hardware_compatibility"] == "AMPERE_PLUS"
    edit(result.path, machine={"sm": 86, "sm_count": 28, "gpu": "Another GPU"})
    assert jetrt.Engine(result.path).load_report["warnings"] == []
    with pytest.raises(BuildOptionError) as caught:
        build(hardware_compatibility="same_compute_capability")
    assert caught.value.message == (
        "--hardware-compatibility same_compute_capability: TensorRT 10.6.0 does not have the level "
        "SAME_COMPUTE_CAPABILITY; TensorRT 10.9 and later has it."
    )


def test_the_timing_cache(tmp_path: Path, build: Build) -> None:
    cache = tmp_path / "timing.cache"
    first = build(timing_cache=str(cache))
    assert built(first)["timing_cache"] == {"given": True, "hits": 0, "misses": 2}
    assert first.manifest.timing_cache == {"sha256": hashlib.sha256(cache.read_bytes()).hexdigest()}
    second = build(timing_cache=str(cache), rebuild=True)
    assert built(second)["timing_cache"] == {"given": True, "hits": 2, "misses": 0}
    cache.write_bytes(b"of another library")
    third = build(timing_cache=str(cache), rebuild=True)
    assert built(third)["timing_cache"] == {"given": True, "hits": 0, "misses": 2}
    assert third.notes[0].startswith(f"{cache} cannot be read as a timing cache: ")
    assert left(tmp_path) == [*FILES, "m.onnx", "timing.cache"]


# Setters that do not take ---------------------------------------------------------------------------------------------

END = r"\. A plan built now would not be the one that was asked for\."


@pytest.mark.parametrize(
    ("ignored", "options", "text"),
    [
        ("FP16", {"precision": "fp16"}, f"builder flag FP16: set to true, and TensorRT kept false{END}"),
        ("TF32", {}, f"builder flag TF32: set to false, and TensorRT kept true{END}"),
        (
            "WORKSPACE",
            {"workspace": "64M"},
            rf"limit of memory pool WORKSPACE: set to 67108864, and TensorRT kept \d+{END}",
        ),
        ("setMaxAuxStreams", {"aux_streams": 1}, f"max_aux_streams: set to 1, and TensorRT kept -1{END}"),
        ("setBuilderOptimizationLevel", {"opt_level": 1}, f"builder_optimization_level: set to 1, .* kept 3{END}"),
        ("setProfilingVerbosity", {}, f"profiling_verbosity: set to 2, and TensorRT kept 0{END}"),
        ("setTacticSources", {"tactic_sources": "CUBLAS"}, f"tactic sources: set to 1, and TensorRT kept 24{END}"),
        ("setType", {"io_formats": "x:fp16:linear"}, f"type of 'x': set to 1, and TensorRT kept 0{END}"),
        ("setAllowedFormats", {"io_formats": "x:fp16:linear"}, f"formats of 'x': set to 1, .* kept 8191{END}"),
        (
            "setHardwareCompatibilityLevel",
            {"hardware_compatibility": "ampere_plus"},
            f"hardware_compatibility_level: set to 1, and TensorRT kept 0{END}",
        ),
        ("profile", {}, r"profile of 'x': min \[1, 64\] was refused"),
        (
            "setPrecision",
            {"precision": "fp16", "fp32_patterns": "/product"},
            f"precision of layer 0: set to true, and TensorRT kept false{END}",
        ),
        (
            "setOutputType",
            {"precision": "fp16", "fp32_patterns": "/product"},
            f"type of output 0 of layer 0: set to true, and TensorRT kept false{END}",
        ),
    ],
)
def test_a_setter_that_does_not_take(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch, ignored: str, options: dict[str, Any], text: str
) -> None:
    monkeypatch.setenv("FAKE_TRT_BUILD", json.dumps({"ignore": [ignored]}))
    with pytest.raises(EngineBuildError, match=text):
        build(**options)
    assert left(tmp_path) == ["m.onnx"]


# Other versions -------------------------------------------------------------------------------------------------------

ASKED = """
import sys, json, fakes, jetrt
from pathlib import Path
folder = Path(sys.argv[1])
model = fakes.onnx_model(folder / "m.onnx")
for options in json.loads(sys.argv[2]):
    shapes = {"min": "x:1x64", "opt": "x:8x64", "max": "x:64x64"}
    try:
        result = jetrt.build(model, folder / "m.engine", overwrite=True, parity=False, audit=False, progress="none",
                             **shapes, **options)
        print("built", result.manifest.machine.tensorrt, *fakes.plan_content(result.path)["built"]["flags"])
    except jetrt.errors.BuildOptionError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("version", "options", "text"),
    [
        (
            "10.0.1.6",
            {"set_flags": ["STRICT_NANS"]},
            "--set STRICT_NANS=on: TensorRT 10.0.1 does not have the flag STRICT_NANS; TensorRT 10.6 and later has it.",
        ),
        (
            "10.0.1.6",
            {"set_flags": ["max_nb_tactics=2"]},
            "--set max_nb_tactics=2: TensorRT 10.0.1 does not have the "
            "setting max_nb_tactics; TensorRT 10.4 and later has it.",
        ),
        (
            "10.3.0.26",
            {"set_flags": ["tiling_optimization_level=FAST"]},
            "--set tiling_optimization_level=fast: "
            "TensorRT 10.3.0 does not have the setting tiling_optimization_level; TensorRT 10.8 and later has it.",
        ),
        (
            "10.3.0.26",
            {"set_flags": ["EDITABLE_TIMING_CACHE"]},
            "--set EDITABLE_TIMING_CACHE=on: TensorRT 10.3.0 does not "
            "have the flag EDITABLE_TIMING_CACHE; TensorRT 10.8 and later has it.",
        ),
        (
            "10.6.0.26",
            {"set_flags": ["FP4"]},
            "--set FP4=on: FP4 is not set by itself; use a model with such "
            "QuantizeLinear/DequantizeLinear nodes, which sets it.",
        ),
        (
            "10.6.0.26",
            {"dla_core": 0, "precision": "fp16"},
            "--dla-core 0: DLA is on Jetson Xavier and Orin alone; this machine is no Jetson with sm_90.",
        ),
        (
            "10.9.0.34",
            {"dla_core": 0, "precision": "fp16"},
            "--dla-core 0: TensorRT 10.9.0 has no DLA; TensorRT 10.0 to 10.7 and 11.4.1 and later have it.",
        ),
        (
            "11.1.0.5",
            {"precision": "fp16"},
            "--precision fp16: TensorRT 11 has strong typing alone, so the plan "
            "computes in the model's types, and the model is fp32. Give --precision fp32, or convert the model: ",
        ),
        ("11.1.0.5", {"precision": "mixed"}, "--precision mixed: TensorRT 11 has strong typing alone"),
        ("10.3.0.26", {"precision": "fp16"}, "built 10.3.0.26 FP16 TF32"),
        ("10.9.0.34", {"hardware_compatibility": "same_compute_capability"}, "built 10.9.0.34"),
    ],
)
def test_other_versions(tmp_path: Path, version: str, options: dict[str, Any], text: str) -> None:
    done = fakes.run_python(ASKED, str(tmp_path), json.dumps([options]), version=version)
    assert done.stdout.startswith(text)


# The command line -----------------------------------------------------------------------------------------------------

WORDS = [word for name, text in SHAPES.items() for word in (f"--{name}", text)]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    fakes.onnx_model(tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    return lambda *words: main(["build", *words, "--progress", "none"])


def test_the_command(tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    words = ["--onnx", "m.onnx", "--engine", "m.engine", "--precision", "fp16", *WORDS]
    assert command(*words) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^precision\n +layer +type +precision", printed, re.M)
    assert re.search(r"^parity passed\nreference: onnxruntime \(onnxruntime ", printed, re.M)
    assert re.search(
        r"^m\.engine: 0\.\d\d MiB, built in \d+\.\d s, for TensorRT 10\.6\.0\.26, Fake GPU 0 \(sm_90, 16 SMs\); "
        r"parity passed$",
        printed,
        re.M,
    )
    assert command(*words) == 0
    assert "m.engine is there already and is the same plan (0." in capsys.readouterr().out
    assert command("--onnx", "m.onnx", "--engine", "n.engine", "--precision", "fp17", *WORDS) == 2
    assert "--precision is 'fp17'; allowed: " in capsys.readouterr().err
    assert command("--engine", "n.engine") == 2
    assert "jetrt: BuildOptionError: --onnx MODEL.onnx is missing" in capsys.readouterr().err


def test_the_manifests_command_builds_it_again(command: Callable[..., int], tmp_path: Path) -> None:
    words = ["--onnx", "m.onnx", "--engine", "m.engine", "--precision", "fp16", *WORDS, "--workspace", "64"]
    assert command(*words, "--no-parity") == 0
    manifest = json.loads(Path("m.engine.json").read_text())
    for path in map(Path, FILES):
        path.unlink()
    assert main([*manifest["command"][1:], "--progress", "none"]) == 0
    again = json.loads(Path("m.engine.json").read_text())
    assert again["key"] == manifest["key"]
    assert again["command"] == manifest["command"]
    assert fakes.plan_content("m.engine")["built"]["pools"]["WORKSPACE"] == 64 << 20


def test_config_and_from_manifest(command: Callable[..., int], tmp_path: Path) -> None:
    pytest.importorskip("tomllib", reason="Python 3.10 reads TOML with the package tomli")
    shapes = "".join(f'{name} = ["{text}"]\n' for name, text in SHAPES.items())
    Path("b.toml").write_text(f'precision = "bf16"\nworkspace = 64\nparity = false\n{shapes}')
    assert command("--onnx", "m.onnx", "--engine", "m.engine", "--config", "b.toml", "--workspace", "128") == 0
    content = fakes.plan_content("m.engine")["built"]
    assert "BF16" in content["flags"]
    assert content["pools"]["WORKSPACE"] == 128 << 20  # the command line wins
    assert command("--onnx", "m.onnx", "--engine", "n.engine", "--from-manifest", "m.engine") == 0
    assert fakes.plan_content("n.engine")["built"] == content
    keys = [json.loads(Path(f"{name}.engine.json").read_text())["key"] for name in "mn"]
    assert keys[0] == keys[1]


def test_the_scripts_command_line(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """That of build_tensorrt_engine.py."""
    script = ["--onnx", "m.onnx", "--engine", "m.engine", "--precision", "fp16", "--workspace", "512"]
    script += ["--tactic-memory", "256", "--disable-external-tactics", "--heuristic-build", "--memory-monitor"]
    assert command(*script, "--builder-opt-level", "1", *WORDS) == 0
    content = fakes.plan_content("m.engine")["built"]
    assert content["pools"]["WORKSPACE"] == 512 << 20
    assert content["pools"]["TACTIC_DRAM"] == 256 << 20
    assert content["BuilderOptimizationLevel"] == 1
    assert content["tactic_sources"] == ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]


def test_dump_layers(command: Callable[..., int]) -> None:
    assert command("--onnx", "m.onnx", "--engine", "m.engine", *WORDS, "--dump-layers", "layers.json") == 0
    layers = json.loads(Path("layers.json").read_text())
    assert [layer["name"] for layer in layers] == ["/product", "/y"]


# Wrong plans do not get their name ------------------------------------------------------------------------------------


def test_a_wrong_plan(tmp_path: Path, build: Build) -> None:
    with pytest.raises(ParityError, match=r"'?y'?") as caught:
        build(fields={"build": {"differ": True}}, parity=True)
    assert caught.value.failures
    assert left(tmp_path) == ["m.onnx"]


# Loading --------------------------------------------------------------------------------------------------------------


def edit(path: Path, **fields: Any) -> None:
    """Changes fields of the manifest, those of `machine` one by one."""
    manifest_path = path.with_name(f"{path.name}.json")
    manifest = json.loads(manifest_path.read_text())
    for name, value in fields.items():
        manifest[name] = {**manifest[name], **value} if isinstance(value, dict) else value
    manifest_path.write_text(json.dumps(manifest))


def test_on_another_machine(tmp_path: Path, build: Build) -> None:
    result = build(precision="fp16", workspace="64M")
    edit(result.path, machine={"sm": 87, "sm_count": 8, "gpu": "Orin"})
    with pytest.raises(ManifestError) as caught:
        jetrt.Engine(result.path)
    error = caught.value
    assert error.message == (
        f"{result.path} was built for another machine and is refused:\n"
        "  field     in the manifest  here\n"
        "  sm        87               90\n"
        "  sm_count  8                16\n"
        "  gpu       Orin             Fake GPU 0\n"
        "This builds a right one here:\n"
        f"  {error.command}\n"
        'verify="off" loads it anyway.'
    )
    assert error.differences == [("sm", 87, 90), ("sm_count", 8, 16), ("gpu", "Orin", "Fake GPU 0")]
    engine = jetrt.Engine(result.path, verify="off")
    assert engine.load_report["warnings"] == [error.message]
    # The command does what it says.
    assert error.command is not None
    words = shlex.split(error.command)
    assert words[:2] == ["jetrt", "build"]
    for name in FILES:
        (tmp_path / name).unlink()
    assert main([*words[1:], "--progress", "none"]) == 0
    assert jetrt.Engine(result.path).load_report["warnings"] == []


@pytest.mark.parametrize(
    ("machine", "row"),
    [
        ({"tensorrt": "10.6.0.26", "arch": "aarch64"}, r"  arch +aarch64 +\S+"),
        ({"sm_count": 12}, r"  sm_count +12 +16"),
        ({"gpu": "NVIDIA H100 NVL"}, r"  gpu +NVIDIA H100 NVL +Fake GPU 0"),
    ],
)
def test_each_field_alone_is_refused(build: Build, machine: dict[str, Any], row: str) -> None:
    result = build()
    edit(result.path, machine=machine)
    with pytest.raises(ManifestError, match=row):
        jetrt.Engine(result.path)


def test_another_name_by_schema_in_the_command(tmp_path: Path) -> None:
    model = fakes.onnx_model(tmp_path / "m.onnx")
    result = jetrt.build(model, parity=False, audit=False, progress="none", **SHAPES)
    foreign = tmp_path / result.path.name.replace("sm90", "sm87")
    for end in ("", ".sha256", ".json"):
        (tmp_path / f"{result.path.name}{end}").rename(f"{foreign}{end}")
    text = Path(f"{foreign}.json").read_text().replace("sm90", "sm87")
    Path(f"{foreign}.json").write_text(text)
    sidecar = Path(f"{foreign}.sha256")
    sidecar.write_text(sidecar.read_text().replace("sm90", "sm87"))
    edit(foreign, machine={"sm": 87})
    with pytest.raises(ManifestError) as caught:
        jetrt.Engine(foreign)
    assert f"--engine {result.path} " in f"{caught.value.command} "  # the name that a right one has


def test_one_byte_edited(build: Build) -> None:
    result = build()
    good = result.path.read_bytes()
    place = good.index(b'"weights_bytes"') + 1
    result.path.write_bytes(good[:place] + b"W" + good[place + 1 :])
    digest = hashlib.sha256(result.path.read_bytes()).hexdigest()
    with pytest.raises(PlanError) as caught:
        jetrt.Engine(result.path)
    assert caught.value.message == (
        f"{result.path}: its SHA-256 is {digest}, and {result.path}.sha256 says {result.manifest.engine.sha256}: the "
        'plan is damaged or was replaced. Copy or build it again; verify="off" loads it anyway.'
    )


NOT_BOUND = r"{json} \(written for '{whose}'\) is not the manifest of this plan:\n(.*\n)*One of the files was edited"


@pytest.mark.parametrize("what", ["edited", "of another", "gone, plan edited", "nonsense", "manifest of another"])
def test_sidecars(tmp_path: Path, build: Build, what: str) -> None:
    other = build(engine="other.engine", precision="fp16")
    result = build()
    sidecar, manifest = (Path(f"{result.path}.{end}") for end in ("sha256", "json"))
    text, whose = NOT_BOUND, "m.engine"
    if what == "edited":
        sidecar.write_text("0" * 8 + sidecar.read_text()[8:])
    elif what == "of another":
        sidecar.write_bytes(Path(f"{other.path}.sha256").read_bytes())
    elif what == "gone, plan edited":
        sidecar.unlink()
        plan = result.path.read_bytes()
        result.path.write_bytes(plan[:-1] + b" ")
    elif what == "nonsense":
        sidecar.write_text("hello\n")
        text = r"m\.engine\.sha256: no SHA-256 digest in this file\. Write one with sha256sum, or remove the file\."
    else:
        manifest.write_bytes(Path(f"{other.path}.json").read_bytes())
        whose = "other.engine"
    with pytest.raises(ManifestError, match=text.format(json=re.escape(str(manifest)), whose=whose)):
        jetrt.Engine(result.path)


def test_without_sidecar_or_manifest(build: Build) -> None:
    result = build()
    Path(f"{result.path}.sha256").unlink()
    np.testing.assert_allclose(output(jetrt.Engine(result.path)), Y, atol=1e-5)  # by the manifest's own digest
    Path(f"{result.path}.json").unlink()
    jetrt.Engine(result.path)  # as from another tool; `jetrt stamp` gives it a manifest


def test_a_damaged_plan_without_checks(build: Build) -> None:
    result = build()
    result.path.write_bytes(result.path.read_bytes()[:-40])
    with pytest.raises(EngineDeserializeError):
        jetrt.Engine(result.path, verify="off")


def test_options_are_given_once() -> None:
    from jetrt.builder.options import BuildOptions

    with pytest.raises(BuildOptionError, match=r"options and precision are both given: put all into options\."):
        jetrt.build("m.onnx", options=BuildOptions(), precision="fp16")
