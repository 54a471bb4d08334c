"""The precision audit and the cache reader on what a real TensorRT wrote (`tests/fixtures/tensorrt_10_6`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jetrt import errors
from jetrt.builder.audit import Audit, audit, check
from jetrt.builder.calibration_cache import coverage, parse_cache

RECORDED = Path(__file__).parent / "fixtures" / "tensorrt_10_6"


def audited(name: str, requested: str) -> Audit:
    times: list[tuple[str, list[float]]] = []
    path = RECORDED / f"{name}_times.json"
    if path.exists():
        runs = json.loads(path.read_text())
        times = [(layer, [run[i][1] for run in runs]) for i, (layer, _) in enumerate(runs[0])]
    return audit((RECORDED / f"{name}.json").read_text(), times, requested)


def test_fp16_that_stayed_in_fp32() -> None:
    # TensorRT was allowed fp16 and found fp32 faster for layers this small: no line of its log says so.
    found = audited("conv_fp16", "fp16")
    assert (found.share, found.weighted_by) == (0, "time")
    assert [row.name for row in found.fallbacks] == [f"node_of_c{i} + node_of_r{i}" for i in (2, 0, 1)]
    with pytest.raises(errors.PrecisionError, match=r"0\.0 % of the GEMM and convolution time runs in fp16"):
        check(found, 95)
    check(audited("conv_fp16", "fp32"), 100)


def test_int8() -> None:
    found = audited("conv_int8", "int8")
    assert found.share == 1
    check(found, 100)
    assert {row.name: row.precision for row in found.rows if row.matrix} == {
        f"node_of_c{i} + node_of_r{i}": "int8" for i in range(3)
    }


def test_gemms_without_times() -> None:
    found = audited("mlp_fp32", "fp32")
    assert (found.share, found.weighted_by, len(found.rows)) == (1, "layers", 3)


def test_a_plan_without_matrix_layers() -> None:
    found = audited("dit_bf16", "bf16")
    assert found.share is None
    assert "no GEMM and no convolution" in found.findings[0]
    check(found, 95)


def test_calibration_cache() -> None:
    cache = parse_cache((RECORDED / "conv_int8.cache").read_bytes())
    assert (cache.version, cache.algorithm) == (100600, "EntropyCalibration2")
    assert list(cache.scales) == ["x", "c0", "r0", "c1", "r1", "c2", "r2", "g", "y"]
    assert cache.scales["x"] == pytest.approx(0.0324, abs=1e-4)  # 127 steps to about 4.1, for normal values
    assert coverage(cache, ["x", "c0", "unseen"]).missing == ("unseen",)
