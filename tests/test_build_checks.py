"""The checks of a build from end to end: parity with a reference, precision of the layers, known failures."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fakes
import jetrt
from jetrt.errors import (
    BuildCrashError,
    BuildOptionError,
    EngineBuildError,
    InferenceError,
    ModelError,
    ParityError,
    PrecisionError,
)

SHAPES = {"min": "x:1x64", "opt": "x:8x64", "max": "x:64x64"}
FILES = ["m.engine", "m.engine.json", "m.engine.sha256", "m.onnx"]
X = {"x@min": (1, 64), "x@opt": (8, 64), "x@max": (64, 64)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def build(folder: Path, fault: dict[str, Any] | None = None, model: str = "mlp", **more: Any) -> Any:
    if fault is not None or not (folder / "m.onnx").exists():
        fakes.onnx_model(folder / "m.onnx", model, build=fault or {})
    return jetrt.build(folder / "m.onnx", folder / "m.engine", **{**SHAPES, "progress": "none", **more})


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Parity ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differ", "why"),
    [
        (True, r"cosine 0\.\d+, allowed from 0\.99999"),
        ("nan", r"(NaN|not finite|non-finite|infinity)"),
        (0.01, r"max_rel 0\.0\d+, allowed up to 0\.001"),
    ],
)
def test_wrong_outputs_fail_the_build(folder, differ, why):
    pytest.importorskip("onnxruntime")
    with pytest.raises(
        ParityError, match=r"output 'y' at min of profile 0 differs from the reference \(onnxrun"
    ) as caught:
        build(folder, {"differ": differ})
    assert re.search(why, str(caught.value)), str(caught.value)
    assert "So do 2 other comparisons." in str(caught.value)
    assert "Try another --opt-level or TensorRT version" in str(caught.value)
    assert [(f["point"], f["output"]) for f in caught.value.failures] == [("min", "y"), ("opt", "y"), ("max", "y")]
    assert left(folder) == ["m.onnx"]


def test_one_point_is_enough(folder):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ParityError, match="output 'y' at max of profile 0") as caught:
        build(folder, {"differ": True, "every": 3})
    assert len(caught.value.failures) == 1


def test_thresholds_by_flag(folder):
    pytest.importorskip("onnxruntime")
    fault = {"differ": 0.01}
    loose = build(folder, fault, parity_limit=("y:cosine=0.9,max_rel=0.5",))
    assert loose.manifest.parity.state == "passed"
    assert loose.manifest.parity.thresholds["outputs"]["y"]["max_rel"] == 0.5
    assert build(folder, rebuild=True, parity_limit=("max_rel=none", "cosine=0.9")).manifest.parity.state == "passed"
    with pytest.raises(ParityError, match=r"max_rel 0\.0\d+, allowed up to 0\.001"):
        build(folder, rebuild=True, parity_limit=("cosine=0",))
    with pytest.raises(BuildOptionError, match="--parity-limit: there is no such output; found: z; allowed: y"):
        build(folder, rebuild=True, parity_limit=("z:cosine=0.9",))
    assert left(folder) == FILES


def test_what_is_recorded(folder):
    ort = pytest.importorskip("onnxruntime")
    result = build(folder, precision="fp16")
    parity = result.manifest.parity
    assert (parity.state, parity.reason) == ("passed", None)
    assert parity.reference["kind"] == "onnxruntime"
    assert parity.reference["versions"] == {"onnxruntime": ort.__version__}
    assert parity.thresholds["precision"] == "fp16"
    assert [(case["profile"], case["point"]) for case in parity.cases] == [(0, "min"), (0, "opt"), (0, "max")]
    assert [case["shapes"]["x"] for case in parity.cases] == [[1, 64], [8, 64], [64, 64]]
    outputs = [output for case in parity.cases for output in case["outputs"]]
    assert all(0.9999 < o["cosine"] <= 1 and 0 < o["max_abs"] < 0.05 and 0 < o["max_rel"] < 0.01 for o in outputs)
    assert result.tables["parity"].startswith("parity passed\nreference: onnxruntime (onnxruntime ")


def test_a_reference_from_a_file(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # here; the child does not need it either
    inputs = {key: np.random.default_rng(1).standard_normal(shape, dtype=np.float32) for key, shape in X.items()}
    outputs = {"y" + key[1:]: fakes.mlp_reference(x) for key, x in inputs.items()}
    np.savez(folder.parent / "in.npz", **inputs)
    np.savez(folder.parent / "out.npz", **outputs)
    files = {"inputs": str(folder.parent / "in.npz"), "reference": str(folder.parent / "out.npz")}
    result = build(folder, **files)
    assert result.manifest.parity.reference["kind"] == "npz"
    assert result.manifest.parity.state == "passed"
    np.savez(folder.parent / "out.npz", **{**outputs, "y@opt": -outputs["y@opt"]})
    with pytest.raises(ParityError, match=r"output 'y' at opt of profile 0 differs from the reference \(npz\)"):
        build(folder, **files, rebuild=True)
    np.savez(folder.parent / "out.npz", z=outputs["y@opt"])
    with pytest.raises(BuildOptionError, match="the names differ from the outputs; found: z; needed: y"):
        build(folder, **files, rebuild=True)
    np.savez(folder.parent / "in.npz", x=np.zeros((3, 64), np.float32))
    with pytest.raises(BuildOptionError, match=r"--inputs: input 'x' at opt of profile 0 has another shape"):
        build(folder, inputs=files["inputs"], rebuild=True)


def no_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither here nor in the children."""
    (folder / "onnxruntime.py").write_text("raise ImportError('No module named onnxruntime')\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{__import__('os').environ.get('PYTHONPATH', '')}")


def test_without_a_reference(folder, tmp_path, monkeypatch):
    no_onnxruntime(tmp_path, monkeypatch)
    result = build(folder)
    assert result.manifest.parity.state == "not run"
    assert "the package onnxruntime is missing" in result.manifest.parity.reason
    assert any(note.startswith("parity was NOT checked: the package onnxruntime is missing") for note in result.notes)
    assert "Install" in result.manifest.parity.reason or "pip install 'jetrt[build]'" in result.manifest.parity.reason
    with pytest.raises(ParityError, match="Parity was not checked: the package onnxruntime is missing"):
        build(folder, rebuild=True, strict=True)
    # Asked for, not missing.
    quiet = build(folder, rebuild=True, strict=True, parity=False)
    assert (quiet.manifest.parity.state, quiet.manifest.parity.reason) == ("not run", "--no-parity")
    assert quiet.notes == () or not any("NOT checked" in note for note in quiet.notes)


def test_a_reference_that_takes_too_long(folder, monkeypatch):
    from jetrt.builder import trying

    job = trying.run_job

    def late(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "reference":
            assert 0 < more["timeout"] <= 100
            raise BuildCrashError("the process for the reference ended: it did not end within 100 s.", how="timeout")
        return job(name, *arguments, **more)

    monkeypatch.setattr(trying, "run_job", late)
    with pytest.raises(BuildCrashError, match="it did not end within 100 s"):
        build(folder, timeout=100)
    assert left(folder) == ["m.onnx"]


def test_a_reference_that_crashes(folder, tmp_path, monkeypatch):
    """onnxruntime has crashed on models; that fails no build, and is no pass."""
    (tmp_path / "onnxruntime.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{__import__('os').environ.get('PYTHONPATH', '')}")
    result = build(folder)
    assert result.manifest.parity.state == "not run"
    assert re.match(r"the process for the reference ended .*: it crashed \(SIGSEGV\)", result.manifest.parity.reason)


def test_tensorrt_in_fp32_as_the_reference(folder, monkeypatch, tmp_path):
    no_onnxruntime(tmp_path, monkeypatch)
    result = build(folder, precision="fp16", reference="tensorrt-fp32", io_formats=("x:fp16:linear",))
    parity = result.manifest.parity
    assert (parity.state, parity.reference["kind"]) == ("passed", "tensorrt fp32")
    assert parity.reference["settings"] == {"tf32": "off"}
    assert result.manifest.inputs[0].dtype == "float16"
    assert 0 < max(case["outputs"][0]["max_abs"] for case in parity.cases) < 0.05
    assert left(folder) == FILES


def test_bf16_is_compared_with_an_upcast_copy(folder):
    pytest.importorskip("onnxruntime")
    import onnx_models as om

    b16 = om.BF16
    om.save(
        folder / "m.onnx",
        [("Add", ["a", "b"], ["y"], {})],
        [("a", b16, ["n", 8]), ("b", b16, ["n", 8])],
        [("y", b16, ["n", 8])],
    )
    shapes = {"min": "a:1x8,b:1x8", "opt": "a:4x8,b:4x8", "max": "a:16x8,b:16x8"}
    result = build(folder, precision="bf16", strongly_typed=True, **shapes)
    assert result.manifest.parity.state == "passed"
    assert result.manifest.parity.reference["kind"] == "onnxruntime, upcast copy"
    assert [info.dtype for info in result.manifest.inputs] == ["bfloat16", "bfloat16"]


def test_several_profiles(folder):
    pytest.importorskip("onnxruntime")
    shapes = {"min": ("x:1x64", "x:16x64"), "opt": ("x:1x64", "x:16x64"), "max": ("x:4x64", "x:64x64")}
    cases = build(folder, **shapes).manifest.parity.cases
    assert [(c["profile"], c["point"]) for c in cases] == [(0, "opt"), (0, "max"), (1, "opt"), (1, "max")]


# Precision ------------------------------------------------------------------------------------------------------------


def test_the_share_that_is_required(folder):
    result = build(folder, precision="fp16", require_precision=95)
    audit = result.manifest.audit
    assert (audit["requested"], audit["share"]) == ("fp16", 1.0)
    assert re.search(r"^\* +/product +gemm +fp16 ", result.tables["precision"], re.M)


def test_a_silent_fallback_to_fp32_fails(folder):
    with pytest.raises(PrecisionError, match=r"0\.0 % of the GEMM and convolution time runs in fp16") as caught:
        build(folder, {"keep_fp32": ["*"]}, precision="fp16", require_precision="95%")
    assert "--require-precision asks for 95 %" in str(caught.value)
    assert "/product" in str(caught.value)
    assert (caught.value.found, caught.value.allowed) == (0.0, 95)
    assert left(folder) == ["m.onnx"]
    # Without the demand it is told.
    result = build(folder, precision="fp16", parity=False)
    assert any("precision audit: fp16 was asked for; 0 % of the GEMM" in note for note in result.notes)
    assert result.manifest.audit["share"] == 0


def test_unknown_is_no_pass(folder):
    with pytest.raises(PrecisionError, match=r"0\.0 % of the GEMM and convolution time runs in fp16") as caught:
        build(folder, {"foreign": True}, precision="fp16", require_precision=95)
    assert "\n  unknown: {ForeignNode[/product.../y]}" in str(caught.value)
    assert left(folder) == ["m.onnx"]


def test_no_audit(folder):
    result = build(folder, audit=False, parity=False)
    assert result.manifest.audit is None
    assert "precision" not in result.tables
    assert result.manifest.inputs[0].shape == (-1, 64)
    with pytest.raises(BuildOptionError, match="--require-precision and --no-audit contradict each other"):
        build(folder, audit=False, require_precision=95)


def test_patterns_keep_layers_in_fp32(folder):
    build(folder, precision="fp16", fp32_patterns=("/product",))
    built = fakes.plan_content(folder / "m.engine")["built"]
    assert built["precisions"]["/product"] in ("float32", "tf32")
    assert built["precisions"]["/y"] == "float16"
    assert "OBEY_PRECISION_CONSTRAINTS" in built["flags"]


# Known failures -------------------------------------------------------------------------------------------------------


def test_norms_in_fp16(folder):
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed (it does not take numpy 1.21)")
    result = build(folder, model="norm", precision="fp16")
    finding = next(f for f in result.manifest.build.findings if f.get("id") == "fp16-norm")
    assert finding["kind"] == "accuracy"
    assert finding["line"].startswith("Detected layernorm nodes in FP16")
    assert any(note.startswith("Known trap 'fp16-norm'") for note in result.notes)
    with pytest.raises(
        EngineBuildError, match=r"--strict, and TensorRT's log has 1 finding.* about accuracy"
    ) as caught:
        build(folder, model="norm", precision="fp16", strict=True, rebuild=True)
    assert "Known trap 'fp16-norm'" in str(caught.value)
    assert left(folder) == FILES
    cured = build(folder, model="norm", precision="fp16", strict=True, fp32_norms=True, overwrite=True)
    assert not [f for f in cured.manifest.build.findings if f.get("kind") == "accuracy"]
    assert fakes.plan_content(cured.path)["built"]["precisions"]["/norm"] == "float32"


CASK = "Cask unknown internal error"
MYELIN = "Error Code 1: Myelin ([exec_instruction.cpp:exec:1164] CUDA error 400 launching __myl_ReplMove kernel.)"
UNIMPLEMENTED = (
    "[optimizer.cpp::computeCosts::2011] Error Code 10: Internal Error (Could not find any implementation for node "
    "/product.)"
)


@pytest.mark.parametrize(
    ("fault", "kind", "known"),
    [
        ({"outcome": "null", "log": [[1, UNIMPLEMENTED]]}, EngineBuildError, "no-implementation"),
        ({"outcome": "abort", "log": [[1, CASK]]}, BuildCrashError, "cask"),
        ({"fail": "enqueue", "run_log": [[1, MYELIN]]}, InferenceError, "myelin-launch"),
        ({"run": "crash", "run_log": [[1, CASK]]}, BuildCrashError, "cask"),
    ],
    ids=["build", "crash", "run", "crash at run"],
)
def test_what_is_known_is_told(folder, fault, kind, known):
    with pytest.raises(kind) as caught:
        build(folder, fault)
    assert f"Known failure {known!r}: " in str(caught.value)
    assert "\n  next step: " in str(caught.value)
    assert str(caught.value).count("Known failure") == len([f for f in caught.value.findings if f.kind == "failure"])
    assert known in [finding.id for finding in caught.value.findings]
    assert left(folder) == ["m.onnx"]


def test_what_the_parser_says_is_looked_up(folder):
    fakes.onnx_model(
        folder / "m.onnx",
        {
            "nodes": [fakes.node("Bogus", ["x"], ["y"])],
            "inputs": [("x", "float32", [1, 4])],
            "outputs": [("y", "float32", [1, 4])],
        },
    )
    with pytest.raises(ModelError, match=r"node 0 '/y' \(Bogus\)") as caught:
        jetrt.build(folder / "m.onnx", folder / "m.engine", progress="none")
    assert caught.value.problems[0]["operator"] == "Bogus"
    assert hasattr(caught.value, "findings")


def test_an_unknown_failure_is_told_as_it_is(folder):
    with pytest.raises(EngineBuildError) as caught:
        build(folder, {"outcome": "null", "log": [[1, "Something new."]]})
    assert caught.value.findings == []
    assert "Something new." in str(caught.value)
    assert "Known" not in str(caught.value)


# The rest of a build --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"outcome": "hang"}, {"run": "hang"}])
def test_timeout(folder, fault):
    with pytest.raises(BuildCrashError, match=r"it did not end within [\d.]+ s") as caught:
        build(folder, fault, timeout=4)
    assert caught.value.how == "timeout"
    assert left(folder) == ["m.onnx"]


def test_prepared_system_is_put_back(folder, monkeypatch):
    """Also when the build fails; the line of progress is cleared before the question."""
    import contextlib

    from jetrt.builder import pipeline, progress

    seen: list[str] = []

    @contextlib.contextmanager
    def prepared(*, yes: bool, say: Any) -> Any:
        seen.append(f"prepared, yes={yes}")
        say("drop_caches: done")
        try:
            yield
        finally:
            seen.append("put back")

    class Shown(progress.Reporter):
        def clear(self) -> None:
            seen.append("cleared")

    monkeypatch.setattr(pipeline, "prepared_system", prepared)
    monkeypatch.setattr(progress, "reporter", lambda *_: contextlib.nullcontext(Shown()))
    with pytest.raises(EngineBuildError):
        build(folder, {"outcome": "null"}, prepare_system=True, yes=True)
    assert seen == ["cleared", "prepared, yes=True", "put back"]


def test_a_stripped_plan_is_refitted_to_be_tried(folder):
    pytest.importorskip("onnxruntime")
    result = build(folder, strip_plan=True)
    assert result.manifest.stripped
    assert result.manifest.parity.state == "passed"


def test_a_build_that_waits_has_its_timeout(folder):
    from jetrt.provenance import engine_lock

    with (
        engine_lock(folder / "m.engine"),
        pytest.raises(EngineBuildError, match=r"is building .*m\.engine\. It did not end within [\d.]+ s"),
    ):
        build(folder, timeout=3)


def test_notes_reach_the_log_of_no_one(folder, caplog):
    """A build that is right says nothing to the root logger."""
    with caplog.at_level(logging.WARNING):
        build(folder, parity=False)
    assert not [record for record in caplog.records if record.name.startswith("jetrt")]
