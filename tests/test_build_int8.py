"""int8 builds from end to end: where the data come from, the cache and what it is bound to, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fakes
import jetrt
from jetrt.cli import main
from jetrt.errors import BuildOptionError, CalibrationCacheError, EngineBuildError

DATA = np.random.default_rng(0).standard_normal((16, 64), dtype=np.float32)
OPTIONS: dict[str, Any] = {
    "precision": "int8",
    "min": "x:1x64",
    "opt": "x:8x64",
    "max": "x:64x64",
    "calib_min_samples": 8,
    "progress": "none",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("onnxruntime")
    fakes.onnx_model(tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=DATA)
    return tmp_path


def build(folder: Path, *, model: str = "m.onnx", **more: Any) -> Any:
    options = {"calib_data": str(folder / "data.npz"), **OPTIONS, **more}
    if "calibration_data" in more:
        del options["calib_data"]
    return jetrt.build(folder / model, folder / "m.engine", **options)


def scales(folder: Path) -> dict[str, float]:
    return dict(fakes.plan_content(folder / "m.engine")["built"]["scales"])


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Counted:
    """The data as an iterable; counts the items that were read."""

    def __init__(self, data: np.ndarray[Any, Any] = DATA) -> None:
        self.data, self.read = data, 0

    def __iter__(self) -> Any:
        for row in self.data:
            self.read += 1
            yield {"x": row}


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["entropy", "minmax"])
def test_from_an_npz_file(folder, algorithm):
    result = build(folder, calib_algorithm=algorithm)
    built = fakes.plan_content(result.path)["built"]
    assert {"INT8", "FP16"} <= set(built["flags"])
    assert built["precisions"] == {"/product": "int8", "/y": "int8"}
    largest = np.abs(DATA).max() / 127
    assert scales(folder)["x"] == pytest.approx(largest) if algorithm == "minmax" else scales(folder)["x"] < largest
    record = result.manifest.calibration
    assert (record["kind"], record["samples"], record["batches"], record["algorithm"]) == ("npz", 16, 16, algorithm)
    assert record["coverage"]["covered"] == ["x", "product", "y"]
    assert record["coverage"]["share"] == 1
    assert record["cache"]["used"] is False
    assert result.tables["calibration"] == "calibration: 3 of 3 tensors have a range (100.0 %)"
    assert result.manifest.parity.state == "passed"
    assert left(folder) == {"data.npz", "m.engine", "m.engine.json", "m.engine.sha256", "m.onnx"}


def test_from_an_iterable(folder):
    build(folder)
    expected, key = scales(folder), build(folder).manifest.key
    data = Counted()
    result = build(folder, calibration_data=data, rebuild=True, overwrite=True)
    assert scales(folder) == expected
    assert result.manifest.calibration["kind"] == "iterable"
    assert data.read == 16 + 1 + 16 + 16  # hashed, looked at, checked, used
    assert result.manifest.key != key  # a digest of another form
    once = build(folder, calibration_data=({"x": row} for row in DATA))
    assert not once.built
    assert once.manifest.key == result.manifest.key


def test_batches_of_several_samples(folder):
    record = build(folder, calib_batch=4).manifest.calibration
    assert (record["batches"], record["samples"], record["shapes"]) == (4, 16, {"x": [4, 64]})
    with pytest.raises(
        BuildOptionError, match="16 samples of input 'x' do not fill batches of 5: the last would hold 1"
    ):
        build(folder, calib_batch=5)


def test_from_a_folder_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("onnxruntime")
    fakes.onnx_model(tmp_path / "conv.onnx", "conv")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(1).integers(0, 255, (9, 10, 12, 3), np.uint8)
    for index, one in enumerate(pixels):
        image.fromarray(one).save(tmp_path / "images" / f"{index}.png")
    shapes = {"min": "x:1x3x8x8", "opt": "x:2x3x8x8", "max": "x:4x3x8x8"}
    more: dict[str, Any] = {**shapes, "model": "conv.onnx", "calib_data": str(tmp_path / "images"), "calib_batch": 3}
    with pytest.raises(BuildOptionError, match=r"say how its images become tensors, .*: --calib-preprocess resize="):
        build(tmp_path, **more)
    says = "resize=8x8,layout=nchw,color=rgb,scale=1/255"
    record = build(tmp_path, **more, calib_preprocess=says).manifest.calibration
    assert (record["kind"], record["samples"], record["batches"]) == ("images", 9, 3)
    assert record["preprocessing"]["resize"] == [8, 8]
    assert 0 < scales(tmp_path)["x"] <= 1 / 127
    # Another preprocessing is another data set, and another plan under this name.
    with pytest.raises(EngineBuildError, match=r"is there already and was built from something else"):
        build(tmp_path, **more, calib_preprocess=says.replace("rgb", "bgr"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"calib_data": None}, "int8 needs ranges: give --calib-data .* Ranges are never made up"),
        ({"calib_data": None, "calib_cache": "c"}, "--calib-cache c: the data set that it came from is needed too"),
        ({"calib_data": "none.npz"}, r"--calib-data none.npz: there is no such file"),
        ({"calib_min_samples": 500}, r"16 samples are fewer than 500, .*--calib-min-samples 16"),
        ({"precision": "fp16", "calib_min_samples": 500}, "--calib-data is for --precision int8 or mixed"),
        ({"strongly_typed": True}, "--calib-data and --strongly-typed contradict each other"),
    ],
)
def test_refused(folder, more, message):
    with pytest.raises(BuildOptionError, match=message):
        build(folder, **more)
    assert left(folder) == {"data.npz", "m.onnx"}


def test_data_are_given_once(folder):
    with pytest.raises(BuildOptionError, match=r"--calib-data and calibration_data are both given: use one\."):
        jetrt.build(
            folder / "m.onnx", calibration_data=[{"x": DATA[0]}], calib_data=str(folder / "data.npz"), **OPTIONS
        )
    with pytest.raises(BuildOptionError, match="calibration data were given, which only int8 and mixed use"):
        build(folder, calibration_data=Counted(), precision="fp16")


def test_data_that_are_no_good(folder):
    bad = DATA.copy()
    bad[5, 3] = np.nan
    with pytest.raises(BuildOptionError, match="the calibration data: batch 5 of input 'x' holds NaN or infinity"):
        build(folder, calibration_data=Counted(bad))
    with pytest.raises(BuildOptionError, match="input 'x' is all zero in every sample; nothing can be calibrated"):
        build(folder, calibration_data=Counted(DATA * 0))

    class Changing(Counted):
        def __iter__(self) -> Any:
            self.data = self.data * 2
            return super().__iter__()

    with pytest.raises(BuildOptionError, match="the calibration data changed between two passes"):
        build(folder, calibration_data=Changing())
    assert left(folder) == {"data.npz", "m.onnx"}


def test_an_iterable_that_changes_while_it_is_used(folder):
    """The child is waiting for a batch when it shows."""

    class Late(Counted):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter([{"x": row * (1 if self.passes < 4 else 2)} for row in self.data])

    with pytest.raises(BuildOptionError, match="the calibration data changed between two passes"):
        build(folder, calibration_data=Late())
    assert left(folder) == {"data.npz", "m.onnx"}


def test_a_calibrator_that_is_left_out(folder):
    fakes.onnx_model(folder / "m.onnx", build={"ignore": ["setInt8Calibrator"]})
    with pytest.raises(EngineBuildError, match=r"[Cc]alibrator"):
        build(folder)
    assert left(folder) == {"data.npz", "m.onnx"}


# The cache ------------------------------------------------------------------------------------------------------------


def test_the_cache_is_used_without_reading_data(folder, capsys):
    cache = folder / "c.cache"
    first = build(folder, calibration_data=Counted(), calib_cache=str(cache))
    assert cache.read_text().startswith("TRT-100600-EntropyCalibration2\nx: ")
    sidecar = json.loads((folder / "c.cache.json").read_text())
    assert sidecar["identity"]["model"] == first.manifest.model.sha256
    assert (sidecar["identity"]["algorithm"], sidecar["identity"]["TensorRT"]) == ("entropy", "10.6.0")
    data = Counted()
    again = build(folder, calibration_data=data, calib_cache=str(cache), rebuild=True)
    assert data.read == 16 + 1  # hashed, looked at
    assert again.built
    assert again.manifest.calibration["cache"] == {**first.manifest.calibration["cache"], "used": True}
    assert again.manifest.calibration["coverage"] == first.manifest.calibration["coverage"]
    assert f"the calibration cache {cache} fits and is used: TensorRT reads no data" in again.notes
    assert left(folder) >= {"c.cache", "c.cache.json"}


def other_model(folder: Path) -> dict[str, Any]:
    fakes.onnx_model(folder / "m.onnx", producer="another")
    return {}


def other_data(folder: Path) -> dict[str, Any]:
    np.savez(folder / "data.npz", x=DATA + 1)
    return {}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_model, "model"),
        (other_data, "data set"),
        (lambda _: {"calib_batch": 2}, "shapes"),
        (lambda _: {"calib_algorithm": "minmax"}, "algorithm"),
    ],
)
def test_a_cache_of_something_else(folder, change, what):
    cache = folder / "c.cache"
    build(folder, calib_cache=str(cache))
    before = cache.read_bytes()
    (folder / "m.engine").unlink()
    more = {**change(folder), "calib_cache": str(cache)}
    with pytest.raises(CalibrationCacheError, match=rf"cannot be trusted: another {what}\.") as caught:
        build(folder, **more)
    assert re.search(rf"found: +{what} \S+\n +expected: {what} \S+\nRebuild it with --recalibrate", str(caught.value))
    assert caught.value.found.startswith(what)
    assert caught.value.expected.startswith(what)
    assert caught.value.found != caught.value.expected
    assert cache.read_bytes() == before
    assert "m.engine" not in left(folder)

    assert build(folder, **more, recalibrate=True).manifest.calibration["cache"]["used"] is False
    assert build(folder, **more, rebuild=True).manifest.calibration["cache"]["used"] is True


def test_a_cache_of_another_preprocessing(tmp_path):
    image = pytest.importorskip("PIL.Image")
    fakes.onnx_model(tmp_path / "conv.onnx", "conv")
    (tmp_path / "images").mkdir()
    for index, one in enumerate(np.random.default_rng(1).integers(0, 255, (8, 8, 8, 3), np.uint8)):
        image.fromarray(one).save(tmp_path / "images" / f"{index}.png")
    shapes = {"min": "x:1x3x8x8", "opt": "x:2x3x8x8", "max": "x:4x3x8x8"}
    files = {"calib_data": str(tmp_path / "images"), "calib_cache": str(tmp_path / "c.cache")}
    more: dict[str, Any] = {**shapes, **files, "model": "conv.onnx"}
    build(tmp_path, **more, calib_preprocess="resize=8x8,layout=nchw,color=rgb,scale=1/255")
    with pytest.raises(CalibrationCacheError, match="another data set, preprocessing") as caught:
        build(tmp_path, **more, calib_preprocess="resize=8x8,layout=nchw,color=rgb,scale=1", overwrite=True)
    assert "scale=0.00392156862745098,dtype=float32" in caught.value.found
    assert "scale=1.0,dtype=float32" in caught.value.expected


def test_a_cache_of_another_tensorrt(folder):
    build(folder, calib_cache=str(folder / "c.cache"))
    done = fakes.run_python(
        "import sys; from jetrt.cli import main; sys.exit(main(sys.argv[1:]))",
        *("build", "--onnx", str(folder / "m.onnx"), "--engine", str(folder / "other.engine"), "--precision", "int8"),
        *("--min", "x:1x64", "--opt", "x:8x64", "--max", "x:64x64", "--calib-data", str(folder / "data.npz")),
        *("--calib-min-samples", "8", "--calib-cache", str(folder / "c.cache"), "--progress", "none"),
        version="10.3.0.26",
        check=False,
    )
    assert done.returncode == 1
    assert re.search(
        r"^jetrt: CalibrationCacheError: .*c\.cache: this calibration cache cannot be trusted: another TensorRT\.\n"
        r"  found:    TensorRT 10\.6\.0\n  expected: TensorRT 10\.3\.0\n",
        done.stderr,
    )
    assert "other.engine" not in left(folder)


def test_a_cache_that_was_edited(folder):
    cache = folder / "c.cache"
    build(folder, calib_cache=str(cache))
    cache.write_text(cache.read_text().replace("x: 3", "x: 4"))
    with pytest.raises(CalibrationCacheError, match="another SHA-256 of the cache"):
        build(folder, calib_cache=str(cache), rebuild=True)
    (folder / "c.cache.json").unlink()
    with pytest.raises(CalibrationCacheError, match=r"there is no c\.cache\.json, which says what it was made from"):
        build(folder, calib_cache=str(cache), rebuild=True)
    (folder / "c.cache.json").write_text("{")
    with pytest.raises(CalibrationCacheError, match=r"c\.cache\.json is damaged"):
        build(folder, calib_cache=str(cache), rebuild=True)
    build(folder, calib_cache=str(cache), rebuild=True, recalibrate=True)
    assert build(folder, calib_cache=str(cache), rebuild=True).manifest.calibration["cache"]["used"]


def test_the_key_changes_with_the_data(folder):
    keys = {build(folder).manifest.key}
    other_data(folder)
    with pytest.raises(EngineBuildError, match="is there already and was built from something else"):
        build(folder)
    keys.add(build(folder, overwrite=True).manifest.key)
    keys.add(build(folder, overwrite=True, calib_algorithm="minmax").manifest.key)
    assert len(keys) == 3


def test_levels_share_one_calibration(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = Counted()
    result = build(folder, calibration_data=data, opt_level="auto", levels=(2, 3, 4))
    assert data.read == 16 + 1 + 16 + 16  # as for one level
    assert [row["state"] in ("chosen", "tie", "slower") for row in result.manifest.levels["rows"]] == [True] * 3
    assert result.manifest.calibration["cache"]["used"] is False
    with_cache = build(folder, calibration_data=Counted(), opt_level="auto", levels=(2, 3, 4), rebuild=True)
    assert with_cache.manifest.calibration["cache"]["sha256"] == result.manifest.calibration["cache"]["sha256"]


# Q/DQ -----------------------------------------------------------------------------------------------------------------


def test_a_model_with_qdq_takes_no_calibrator(folder):
    fakes.onnx_model(folder / "m.onnx", "qdq")
    result = build(folder, calib_data=None)
    built = fakes.plan_content(result.path)["built"]
    assert "INT8" in built["flags"]
    assert result.manifest.calibration is None
    assert "calibration" not in result.tables
    assert built["precisions"]["/product"] == "explicit"  # by its Q and DQ


def test_a_calibrator_for_a_model_with_qdq_is_refused(folder):
    fakes.onnx_model(folder / "m.onnx", "qdq")
    for more in ({}, {"calibration_data": Counted()}):
        with pytest.raises(BuildOptionError, match=r"so TensorRT would ignore the calibration\. Leave the calibration"):
            build(folder, **more)


def test_printed_by_the_command(folder, capsys):
    assert not main(
        [
            *("build", "--onnx", str(folder / "m.onnx"), "--engine", str(folder / "m.engine"), "--precision", "int8"),
            *("--min", "x:1x64", "--opt", "x:8x64", "--max", "x:64x64", "--calib-dir", str(folder / "data.npz")),
            *("--calib-min-samples", "8", "--progress", "none"),
        ]
    )
    printed = capsys.readouterr().out
    assert re.search(r"^calibration: 3 of 3 tensors have a range \(100\.0 %\)$", printed, re.M)
    assert printed.count("calibration") == 1
