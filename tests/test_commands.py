"""`jetrt build`, `verify`, `stamp` and `inspect` from end to end: what they print, write, refuse, and exit with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fakes
import jetrt
from jetrt.builder.targets import PIPELINE
from jetrt.cli import main
from jetrt.provenance import Manifest

SHAPES = ["--min", "x:1x64", "--opt", "x:8x64", "--max", "x:64x64"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("onnxruntime")
    fakes.onnx_model(tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(*words: str, engine: str = "m.engine") -> int:
    return main(["build", "--onnx", "m.onnx", "--engine", engine, *SHAPES, "--progress", "none", *words])


@pytest.fixture
def plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert build("--precision", "fp16") == 0
    capsys.readouterr()
    return folder / "m.engine"


@pytest.fixture
def bare(folder: Path) -> Path:
    """A plan that came without a manifest."""
    return fakes.write_plan(folder / "bare.engine", "mlp")


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failed(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 1) -> str:
    """What a command that fails says."""
    assert main(arguments) == code
    return capsys.readouterr().err


# build ----------------------------------------------------------------------------------------------------------------


def test_build(folder, capsys):
    assert build("--precision", "fp16") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^precision\n +layer +type +precision +in -> out +ms +share$", printed, re.M)
    assert re.search(
        r"^parity passed\nreference: onnxruntime \(onnxruntime [\d.]+\)\n\npoint  output  type ", printed, re.M
    )
    assert len(re.findall(r"^0\.(?:min|opt|max)  y +float32\[\d+, 10\] .* passed$", printed, re.M)) == 3
    assert re.search(
        r"^m\.engine: \d+\.\d\d MiB, built in \d+\.\d s, for TensorRT 10\.6\.0\.26, Fake GPU 0 \(sm_90, 16 SMs\); "
        r"parity passed$",
        printed,
        re.M,
    )
    assert left(folder) == ["m.engine", "m.engine.json", "m.engine.sha256", "m.onnx"]
    before = Path("m.engine").stat().st_mtime_ns
    assert build("--precision", "fp16") == 0
    assert re.fullmatch(
        r"m\.engine is there already and is the same plan \(\d+\.\d\d MiB, TensorRT 10\.6\.0\.26, Fake GPU 0 \(sm_90, "
        r"16 SMs\)\); nothing was built\.\n",
        capsys.readouterr().out,
    )
    assert Path("m.engine").stat().st_mtime_ns == before


def test_build_names_the_plan(folder, capsys):
    assert main(["build", "--onnx", "m.onnx", *SHAPES, "--precision", "fp16", "--progress", "none"]) == 0
    (name,) = (path.name for path in folder.glob("*.engine"))
    assert re.fullmatch(r"m__sm90_\w+_trt10\.6\.0\.26_fp16\.engine", name) or "fp16" in name


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--precision", "fp16", "--fp32-norms", "--strongly-typed"], 2, "BuildOptionError: --fp32-norms and --strong"),
        (["--precision", "fp3"], 2, "BuildOptionError: --precision is 'fp3'; allowed: fp32"),
        (["--precision", "int8"], 2, "BuildOptionError: --precision int8: int8 needs ranges"),
        (["--set", "NO_SUCH_FLAG"], 2, "BuildOptionError: .*NO_SUCH_FLAG"),
        (["--max", "z:1x64"], 2, "BuildOptionError: .*z"),
        (["--parity-limit", "y:cosine=1.5"], 1, "ParityError: output 'y' at min of profile 0 differs"),
    ],
)
def test_build_fails(folder, capsys, words, code, message):
    assert build(*words) == code
    assert re.match(rf"jetrt: {message}", capsys.readouterr().err)
    assert left(folder) == ["m.onnx"]


def test_build_without_a_model(folder, capsys):
    assert failed(capsys, ["build"], 2) == (
        "jetrt: BuildOptionError: --onnx MODEL.onnx is missing: nothing says what to build.\n"
    )
    assert re.match(
        r"jetrt: (ModelError|FileNotFoundError): .*none\.onnx", failed(capsys, ["build", "--onnx", "none.onnx"])
    )
    with pytest.raises(SystemExit) as caught:
        main(["build", "--no-such-flag"])
    assert caught.value.code == 2


def test_a_dynamic_dimension_without_a_hint(folder, capsys):
    error = failed(capsys, ["build", "--onnx", "m.onnx", "--progress", "none"], 2)
    assert "--min" in error
    assert "--opt" in error
    assert "--max" in error
    assert "x:" in error


def test_progress_kinds(folder, capsys):
    assert build("--precision", "fp16") == 0
    for kind in ("notebook", "plain"):
        assert main(["build", "--onnx", "m.onnx", "--engine", f"{kind}.engine", *SHAPES, "--progress", kind]) == 0
        assert "[0:0" in capsys.readouterr().err  # there is no notebook here, so that lines are printed


def test_dump_layers(folder, capsys):
    assert build("--dump-layers", "layers.json") == 0
    layers = json.loads(Path("layers.json").read_text())
    assert [layer["name"] for layer in layers][-2:] == ["/product", "/y"]
    capsys.readouterr()
    assert build("--dump-layers", "again.json") == 0
    assert "--dump-layers again.json: nothing was built, so there are no layers" in capsys.readouterr().out
    assert not Path("again.json").exists()
    assert build("--dump-layers", "--rebuild") == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("\n[\n") :]) == layers


def test_the_command_in_the_manifest_builds_it_again(plan, folder, capsys):
    command = json.loads((folder / "m.engine.json").read_text())["command"]
    assert command[:2] == ["jetrt", "build"]
    assert main([*command[1:], "--progress", "none"]) == 0
    assert "is there already and is the same plan" in capsys.readouterr().out
    assert main(["build", "--from-manifest", "m.engine", "--onnx", "m.onnx", "--engine", "m.engine"]) == 0
    assert "is there already and is the same plan" in capsys.readouterr().out


def test_another_configuration_of_that_name(plan, capsys):
    assert build("--precision", "fp32") == 1
    error = capsys.readouterr().err
    assert re.search(r'^  precision +"fp16" +"fp32"$', error, re.M)
    assert "Give another --engine, or replace it with --overwrite" in error


def test_the_whole_pipeline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "export_metadata.json").write_text('{"vl_seq_len": 122}')
    b16 = {
        "nodes": [fakes.node("Identity", ["x"], ["y"])],
        "inputs": [("x", "bfloat16", [1, 4])],
        "outputs": [("y", "bfloat16", [1, 4])],
    }
    f32 = {**b16, "inputs": [("x", "float32", [1, 4])], "outputs": [("y", "float32", [1, 4])]}
    for models, _ in PIPELINE.values():
        fakes.onnx_model(tmp_path / "onnx" / models[0], f32 if "fp32" in models[0] else b16)
    words = ["build", "--mode", "full_pipeline", "--onnx-dir", "onnx", "--engine-dir", "engines", "--progress", "none"]
    assert main([*words, "--no-parity"]) == 0
    printed = capsys.readouterr().out
    assert [path.name for path in sorted((tmp_path / "engines").glob("*.engine"))] == sorted(
        engine for _, engine in PIPELINE.values()
    )
    assert len(re.findall(r"^engines/\w+\.engine: .* parity not run$", printed, re.M)) == len(PIPELINE)
    assert fakes.plan_content(tmp_path / "engines" / "dit_bf16.engine")["built"]["strongly_typed"] is True


# verify ---------------------------------------------------------------------------------------------------------------


def test_verify(plan, folder, capsys):
    before = (folder / "m.engine.json").read_text()
    assert main(["verify", "m.engine"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("parity passed\nreference: onnxruntime (")
    assert len(re.findall(r"^0\.(?:min|opt|max) .* passed$", printed, re.M)) == 3
    assert (folder / "m.engine.json").read_text() == before


def test_verify_with_limits(plan, capsys):
    error = failed(capsys, ["verify", "m.engine", "--parity-limit", "y:max_abs=0", "--seed", "3"])
    assert re.search(r"^jetrt: ParityError: output 'y' at min of profile 0 differs .*max_abs", error, re.M)


def test_verify_updates_the_manifest(plan, folder, capsys):
    assert main(["verify", "m.engine", "--parity-limit", "y:max_abs=0", "--update"]) == 1
    manifest = Manifest.read(plan)
    assert manifest.parity.state == "failed"
    assert manifest.parity.thresholds["outputs"]["y"]["max_abs"] == 0
    assert main(["verify", "m.engine", "--update"]) == 0
    assert Manifest.read(plan).parity.state == "passed"
    assert main(["run", "m.engine", "--random-inputs", "1"]) == 0  # still one plan with its files


def test_verify_of_an_edited_plan(plan, folder, capsys):
    data = bytearray(plan.read_bytes())
    data[-5] ^= 1
    plan.write_bytes(data)
    assert re.match(r"jetrt: (ManifestError|PlanError): m\.engine", failed(capsys, ["verify", "m.engine"]))


def test_verify_with_another_model(plan, folder, capsys):
    fakes.onnx_model(folder / "m.onnx", producer="another")
    error = failed(capsys, ["verify", "m.engine"])
    assert re.match(
        r"jetrt: ManifestError: m\.engine was built from 'm\.onnx' with SHA-256 \w{64}, and m\.onnx has", error
    )
    Path("m.onnx").unlink()
    assert failed(capsys, ["verify", "m.engine"], 2) == (
        "jetrt: BuildOptionError: m.engine: its model is not there (m.onnx). Give it with --onnx.\n"
    )


def test_verify_against_a_file_needs_no_model(plan, folder, capsys):
    x = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    inputs = {"x@min": x[:1], "x@opt": x, "x@max": np.tile(x, (8, 1))}
    np.savez("in.npz", **inputs)
    np.savez("out.npz", **{"y" + key[1:]: fakes.mlp_reference(array) for key, array in inputs.items()})
    Path("m.onnx").unlink()
    assert main(["verify", "m.engine", "--inputs", "in.npz", "--reference", "out.npz"]) == 0
    assert "reference: npz" in capsys.readouterr().out


def test_verify_against_tensorrt(plan, folder, capsys):
    assert main(["verify", "m.engine", "--reference", "tensorrt-fp32"]) == 0
    assert "reference: tensorrt fp32 (tensorrt 10.6.0.26)" in capsys.readouterr().out
    assert left(folder) == ["m.engine", "m.engine.json", "m.engine.sha256", "m.onnx"]


def test_verify_a_stripped_plan(folder, capsys):
    assert build("--strip-plan") == 0
    assert main(["verify", "m.engine"]) == 0


def test_verify_without_a_manifest(bare, capsys):
    assert failed(capsys, ["verify", "bare.engine"]) == (
        "jetrt: ManifestError: bare.engine has no manifest, so that nothing says what it should compute. Give it one "
        "with `jetrt stamp`.\n"
    )
    assert re.match(r"jetrt: \w+: .*none\.engine", failed(capsys, ["verify", "none.engine"]))


def test_verify_on_another_machine(plan, folder, capsys):
    path = folder / "m.engine.json"
    record = json.loads(path.read_text())
    record["machine"]["sm_count"] = 20
    path.write_text(json.dumps(record))
    error = failed(capsys, ["verify", "m.engine"])
    assert re.search(r"^ *sm_count +20 +16\b", error, re.M)
    assert "jetrt build --onnx m.onnx" in error


# stamp ----------------------------------------------------------------------------------------------------------------


def test_stamp(bare, folder, capsys):
    assert main(["stamp", "bare.engine"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("parity not run: no model was given (--onnx), and no outputs (--reference)")
    assert printed.endswith("bare.engine.json and bare.engine.sha256 are written: it ran here on 3 sets of inputs.\n")
    manifest = Manifest.read(bare)
    assert (manifest.origin, manifest.parity.state, manifest.options) == ("stamp", "not run", None)
    assert manifest.inputs[0].shape == (-1, 64)
    assert manifest.profiles[0]["shapes"]["x"]["max"] == [64, 64]
    with jetrt.Engine(bare) as engine:
        assert engine.load_report["warnings"] == []
    error = failed(capsys, ["stamp", "bare.engine"])
    assert error == (
        "jetrt: EngineBuildError: bare.engine has a manifest already. Look at it with `jetrt inspect`, or replace it "
        "with --overwrite.\n"
    )
    assert main(["stamp", "bare.engine", "--overwrite", "--onnx", "m.onnx"]) == 0
    assert Manifest.read(bare).parity.state == "passed"
    assert Manifest.read(bare).model.file == "m.onnx"
    assert main(["verify", "bare.engine"]) == 0


def test_stamp_compares(folder, capsys):
    fakes.write_plan(folder / "bare.engine", "mlp", differ=0.01)
    error = failed(capsys, ["stamp", "bare.engine", "--onnx", "m.onnx"])
    assert re.search(
        r"^jetrt: ParityError: output 'y' at min of profile 0 differs from .* \(onnxruntime\)", error, re.M
    )
    assert left(folder) == ["bare.engine", "m.onnx"]
    assert main(["stamp", "bare.engine", "--onnx", "m.onnx", "--parity-limit", "max_rel=0.5", "cosine=0.9"]) == 0


def test_stamp_with_outputs_from_a_file(bare, capsys):
    x = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    inputs = {"x@min": x[:1], "x@opt": x[:8], "x@max": x}
    np.savez("in.npz", **inputs)
    np.savez("out.npz", **{"y" + key[1:]: fakes.mlp_reference(array) for key, array in inputs.items()})
    assert main(["stamp", "bare.engine", "--inputs", "in.npz", "--reference", "out.npz"]) == 0
    assert "reference: npz" in capsys.readouterr().out
    assert Manifest.read(bare).model is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reference", "onnxruntime"], "--reference onnxruntime computes with the model: give --onnx"),
        (["--reference", "tensorrt-fp32", "--onnx", "m.onnx"], "--reference tensorrt-fp32: a stamp builds nothing"),
    ],
)
def test_stamp_refuses_a_reference(bare, capsys, words, message):
    assert message in failed(capsys, ["stamp", "bare.engine", *words], 2)


def test_stamp_refuses_nan(folder, capsys):
    fakes.write_plan(folder / "bare.engine", "mlp", differ="nan")
    error = failed(capsys, ["stamp", "bare.engine"])
    assert "bare.engine: output 'y' holds NaN or infinity for random inputs." in error
    assert left(folder) == ["bare.engine", "m.onnx"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sm": 80}, r"Known failure 'other-compute-capability'"),
        ({"run": "crash"}, r"trying the plan ended after .*: it crashed \(SIGSEGV\)"),
        ({"fail": "enqueue", "run_log": [[1, "Cask unknown internal error"]]}, r"Known failure 'cask'"),
    ],
)
def test_stamp_of_a_plan_that_does_not_run(folder, capsys, fields, message):
    fakes.write_plan(folder / "bare.engine", "mlp", **fields)
    assert re.search(message, failed(capsys, ["stamp", "bare.engine"]))
    assert left(folder) == ["bare.engine", "m.onnx"]


def test_stamp_of_what_is_no_plan(folder, capsys):
    Path("bare.engine").write_bytes(b"no plan at all")
    assert re.match(r"jetrt: PlanError: bare\.engine", failed(capsys, ["stamp", "bare.engine"]))


def test_stamp_of_a_static_plan(folder, capsys):
    fakes.write_plan(folder / "bare.engine", fakes.copy_of("float32", [2, 4]))
    assert main(["stamp", "bare.engine"]) == 0
    assert "it ran here on 1 set of inputs." in capsys.readouterr().out
    assert Manifest.read(folder / "bare.engine").profiles[0]["shapes"]["x"]["opt"] == [2, 4]


def test_stamp_of_shape_tensors(folder, capsys):
    fakes.write_plan(folder / "bare.engine", "shape_input")
    error = failed(capsys, ["stamp", "bare.engine"], 2)
    assert "size are shape tensors, whose allowed values a plan does not tell" in error


# inspect --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--no-gpu"]])
def test_inspect(plan, capsys, words):
    assert main(["inspect", "m.engine", *words]) == 0
    printed = capsys.readouterr().out
    assert "m.engine" in printed
    assert "10.6.0.26" in printed
    assert "Fake GPU 0" in printed
    assert re.search(r"\bx +float32", printed)
    assert "parity" in printed
    assert ("/product" in printed) == (not words)


@pytest.mark.parametrize("words", [[], ["--no-gpu"]])
def test_inspect_as_json(plan, capsys, words):
    assert main(["inspect", "m.engine", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["manifest"]["parity"]["state"] == "passed"
    layers = (found["device"] or {}).get("layers", [])
    assert ("/product" in json.dumps(layers)) == (not words)


def test_inspect_of_a_bare_plan(bare, capsys):
    assert main(["inspect", "bare.engine", "--no-gpu"]) == 0
    assert re.search(r"^manifest +none, so nothing says where it came from$", capsys.readouterr().out, re.M)
    assert main(["inspect", "bare.engine", "--no-gpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"] is None
    assert re.match(r"jetrt: \w+: .*none\.engine", failed(capsys, ["inspect", "none.engine"]))
