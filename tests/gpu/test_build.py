"""Builds on a real TensorRT: needs its builder (libnvinfer_builder_resource) and parser beside libnvinfer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jetrt
from jetrt import errors

SHAPES = {"mlp": ((1, 64), (8, 64), (64, 64)), "conv": ((1, 3, 64, 64), (4, 3, 64, 64), (16, 3, 64, 64))}
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def text(shape: tuple[int, ...]) -> str:
    return "x:" + "x".join(map(str, shape))


@pytest.fixture(scope="session", autouse=True)
def builder() -> None:
    folder = Path(jetrt.library_info()["path"]).parent
    if not list(folder.glob("libnvinfer_builder_resource*")):
        pytest.skip(f"{folder} has no libnvinfer_builder_resource: this TensorRT runs plans and builds none")


@pytest.fixture
def build(engines: Path, tmp_path: Path) -> Callable[..., Any]:
    def one(name: str, **options: Any) -> Any:
        onnx = engines / f"{name}.onnx"
        if not onnx.exists():
            pytest.skip(f"{onnx.name} is not beside its plan")
        bounds = dict(zip(("min", "opt", "max"), map(text, SHAPES[name]), strict=True))
        return jetrt.build(onnx, tmp_path / "built.engine", progress="none", **{**bounds, **options})

    return one


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_precisions(build: Callable[..., Any], name: str, precision: str) -> None:
    result = build(name, precision=precision)
    manifest = result.manifest
    assert manifest.parity.state == "passed"
    assert manifest.machine.gpu
    with jetrt.Engine(result.path) as engine:
        assert engine.load_report["sha256_verified"]
        assert engine(x=np.zeros(SHAPES[name][1], np.float32))["y"].shape[0] == SHAPES[name][1][0]


def test_int8_and_its_cache(build: Callable[..., Any], tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((16, 3, 64, 64)).astype(np.float32))
    cache = tmp_path / "conv.cache"
    more = {"calib_cache": str(cache), "calib_min_samples": 1, "calib_batch": 4}
    result = build("conv", precision="int8", calib_data=str(data), **more)
    assert result.manifest.calibration["coverage"]["share"] > 0.8
    assert cache.read_text().startswith("TRT-")
    again = build("conv", precision="int8", calib_data=str(data), rebuild=True, **more)
    assert again.manifest.calibration["cache"]["used"]
    np.savez(data, x=np.random.default_rng(1).standard_normal((16, 3, 64, 64)).astype(np.float32))
    with pytest.raises(errors.CalibrationCacheError, match="data set"):
        build("conv", precision="int8", calib_data=str(data), overwrite=True, **more)


def test_a_silent_fallback_to_fp32_is_seen(build: Callable[..., Any]) -> None:
    found = build("conv", precision="fp16").manifest.audit
    if found["share"] == 1:
        pytest.skip("this GPU runs the model in fp16")
    with pytest.raises(errors.PrecisionError, match="runs in fp16"):
        build("conv", precision="fp16", require_precision=100, rebuild=True)


def test_stripped_and_refitted(build: Callable[..., Any], engines: Path) -> None:
    x = np.random.default_rng(0).standard_normal(SHAPES["conv"][1]).astype(np.float32)
    whole = build("conv", precision="fp32", refittable=True)
    with jetrt.Engine(whole.path) as engine:
        expected = np.array(engine(x=x)["y"])
    stripped = build("conv", precision="fp32", strip_plan=True, overwrite=True)
    with pytest.raises(errors.ManifestError, match="without weights"):
        jetrt.Engine(stripped.path)
    with pytest.raises(errors.ManifestError, match="Give the ONNX that it was built from"):
        jetrt.Engine(stripped.path, refit=engines / "mlp.onnx")
    with jetrt.Engine(stripped.path, refit=engines / "conv.onnx") as engine:
        np.testing.assert_allclose(engine(x=x)["y"], expected, rtol=1e-4, atol=1e-5)


def test_weight_streaming(build: Callable[..., Any]) -> None:
    result = build("mlp", strongly_typed=True, weight_streaming=True)
    with jetrt.Engine(result.path, weight_streaming_budget=0) as engine:
        assert np.isfinite(engine(x=np.ones((8, 64), np.float32))["y"]).all()
    with pytest.raises(ValueError, match="weight_streaming_budget=-5"):
        jetrt.Engine(result.path, weight_streaming_budget=-5)


def test_versions_and_hardware(build: Callable[..., Any]) -> None:
    result = build("mlp", version_compatible=True, exclude_lean_runtime=True)
    assert result.manifest.version_compatible
    with jetrt.Engine(result.path) as engine:  # without the runtime inside, a plan is no code
        assert np.isfinite(engine(x=np.ones((8, 64), np.float32))["y"]).all()
    other = build("mlp", hardware_compatibility="ampere_plus", overwrite=True)
    assert other.manifest.hardware_compatibility == "ampere_plus"


def test_auto(build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = build("conv", precision="fp16", opt_level="auto", levels=(2, 3)).manifest.levels
    rows = {row["level"]: row for row in found["rows"]}
    assert found["chosen"] in (2, 3)
    assert all(row["runs"] >= 1000 and row["parity"] == "passed" for row in rows.values())


def test_layers_and_their_times(build: Callable[..., Any]) -> None:
    result = build("conv", precision="fp32", audit=False)
    with jetrt.Engine(result.path, graphs="off") as engine:
        x = np.zeros(SHAPES["conv"][1], np.float32)
        layers = {layer["Name"] for layer in json.loads(engine.inspect({"x": x.shape}))["Layers"]}
        times = engine.layer_times({"x": x}, runs=3)
        assert len(times) == 3
        assert {name for name, _ in times[0]} <= layers
        # What the measuring context knew of streams must not outlive it.
        for _ in range(10):
            engine(x=x)


def test_dit_of_the_shape_of_groots(tmp_path: Path) -> None:
    import workloads

    model = workloads.Dit(layers=2)
    onnx = tmp_path / "dit.onnx"
    model.write(onnx)
    bounds = {}
    for bound, length in zip(("min", "opt", "max"), model.lengths, strict=True):
        shapes = model.shapes(length)
        bounds[bound] = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    result = jetrt.build(onnx, tmp_path / "dit.engine", strongly_typed=True, progress="none", **bounds)
    cosines = [output["cosine"] for case in result.manifest.parity.cases for output in case["outputs"]]
    assert min(cosines) >= 0.999


def test_the_text_of_a_page_is_the_same_in_fp32_and_fp16(tmp_path: Path) -> None:
    import workloads

    detection, recognition = workloads.ocr_models()
    texts = {}
    for precision in ("fp32", "fp16"):
        engines = []
        for onnx, shapes in ((detection, workloads.DETECTION_SHAPES), (recognition, workloads.RECOGNITION_SHAPES)):
            bounds = dict(zip(("min", "opt", "max"), map(text, shapes), strict=True))
            plan = tmp_path / f"{onnx.stem}_{precision}.engine"
            more = {"opt_level": 0, "progress": "none"}  # detection has 541 nodes to time: 5 minutes at level 3
            jetrt.build(onnx, plan, precision=precision, **bounds, **more)
            engines.append(workloads.function(jetrt.Engine(plan, graphs="off")))
        page, _ = workloads.demo_page()
        texts[precision] = workloads.read_page(page, *engines, workloads.alphabet(recognition))
    assert texts["fp32"] == texts["fp16"]
