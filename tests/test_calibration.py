"""Calibration: data sets and what is refused about them, preprocessing, TensorRT's cache and its sidecar."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetrt.builder.calibration import MINIMUM_SAMPLES, CalibrationData, Preprocessing, load
from jetrt.builder.calibration_cache import (
    Cache,
    check_cache,
    check_calls,
    check_log,
    coverage,
    network_tensors,
    parse_cache,
    save_cache,
    sidecar_of,
)
from jetrt.builder.profiles import InputRange, NetworkInput, Profile
from jetrt.errors import BuildOptionError, CalibrationCacheError, EngineBuildError

try:
    from PIL import Image
except ImportError:
    Image = None
with_pillow = pytest.mark.skipif(Image is None, reason="pillow makes the images")

X = NetworkInput("x", "float32", (-1, 4))
MASK = NetworkInput("mask", "bool", (1, -1))
PROFILE = Profile({"x": InputRange((1, 4), (8, 4), (16, 4)), "mask": InputRange((1, 1), (1, 5), (1, 9))})
MODEL = "ab" * 32


@pytest.fixture
def rows():
    return np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def open_(source, inputs=(X,), minimum=1, **others):
    return load(source, inputs, PROFILE, minimum=minimum, **others)


def refused(message, source, inputs=(X,), **others):
    with pytest.raises(BuildOptionError, match=message) as caught:
        open_(source, inputs, **others).check()
    return caught.value


# -------------------------------------------------------------------------------------------------------- data sets


def test_npz_rows_fill_batches_in_order(tmp_path, rows):
    data = open_(npz(tmp_path / "c.npz", x=rows, unused=rows))
    assert data.shapes == {"x": (8, 4)}  # the profile's opt
    assert (data.batches, data.samples, data.kind) == (4, 32, "npz")
    for _ in range(2):  # the same again
        batches = list(data)
        assert np.array_equal(np.concatenate([batch["x"] for batch in batches]), rows)
        assert all(batch["x"].flags.c_contiguous for batch in batches)
    assert open_(tmp_path / "c.npz", batch_size=16).shapes == {"x": (16, 4)}


def test_npz_whole_inputs(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 2, 4)).astype(np.float32)
    masks = rng.random((6, 1, 7)) < 0.5
    data = open_(npz(tmp_path / "c.npz", x=x, mask=masks), (X, MASK))
    assert data.shapes == {"x": (2, 4), "mask": (1, 7)}  # dimensions that the profile leaves open come from the data
    assert data.batches == 6
    batches = list(data)
    assert np.array_equal(batches[3]["x"], x[3])
    assert np.array_equal(batches[3]["mask"], masks[3])


def test_npz_of_inputs_with_different_row_counts(tmp_path):
    # Three images and one sentence a call, both as rows.
    inputs = (NetworkInput("images", "float32", (3, 2)), NetworkInput("ids", "int64", (1, 5)))
    profile = Profile({"images": InputRange((3, 2), (3, 2), (3, 2)), "ids": InputRange((1, 5), (1, 5), (1, 5))})
    path = npz(
        tmp_path / "c.npz", images=np.arange(12, dtype=np.float32).reshape(6, 2), ids=np.arange(10).reshape(2, 5)
    )
    data = load(path, inputs, profile, minimum=1)
    assert (data.batches, data.samples) == (2, 2)
    assert [batch["images"].shape for batch in data] == [(3, 2), (3, 2)]
    path = npz(tmp_path / "d.npz", images=np.ones((9, 2), np.float32), ids=np.arange(10).reshape(2, 5))
    with pytest.raises(BuildOptionError, match=r"do not hold the same number of batches: \{'images': 3, 'ids': 2\}"):
        load(path, inputs, profile, minimum=1)


def test_scalars(tmp_path):
    inputs = (NetworkInput("t", "int64", ()),)
    profile = Profile({"t": InputRange((), (), ())})
    data = load(npz(tmp_path / "c.npz", t=np.arange(4)), inputs, profile, minimum=1)
    assert (data.batches, data.samples) == (4, 4)
    assert [batch["t"].item() for batch in data] == [0, 1, 2, 3]


def test_the_hash_depends_on_content_names_and_types(tmp_path, rows):
    def digest(**arrays):
        inputs = [NetworkInput(name, str(array.dtype), (-1, 4)) for name, array in arrays.items()]
        profile = Profile(dict.fromkeys(arrays, PROFILE.shapes["x"]))
        return load(npz(tmp_path / "c.npz", **arrays), inputs, profile, minimum=1).sha256

    base = digest(x=rows)
    assert digest(x=rows.copy()) == base
    changed = rows.copy()
    changed[3, 1] = np.nextafter(changed[3, 1], np.float32(9))
    others = [digest(x=changed), digest(y=rows), digest(x=rows.astype(np.float64)), digest(x=rows[::-1])]
    assert len({base, *others}) == 5


def test_iterables(rows):
    samples = [{"x": row, "label": 3} for row in rows]
    data = open_(samples)
    assert (data.batches, data.samples, data.kind) == (4, 32, "iterable")
    assert np.array_equal(np.concatenate([batch["x"] for batch in data]), rows)
    # A generator is read once and kept; a function is called for every pass.
    once = open_(sample for sample in samples)
    called = open_(lambda: (sample for sample in samples))
    assert data.sha256 == once.sha256 == called.sha256
    assert len(list(once)) == len(list(once)) == len(list(called)) == len(list(called)) == 4
    whole = open_([{"x": rows[i : i + 2]} for i in range(0, 32, 2)])
    assert whole.shapes == {"x": (2, 4)}
    assert open_([{"x": rows[i : i + 2]} for i in range(0, 32, 2)], batch_size=8).batches == 4
    assert open_([{"x": rows[i : i + 2]} for i in range(0, 32, 2)], batch_size=1).shapes == {"x": (2, 4)}


def test_an_iterable_that_changes_is_refused(rows):
    rng = np.random.default_rng(3)
    refused("changed between two passes", lambda: ({"x": row + rng.random(dtype=np.float32)} for row in rows))


def test_the_byte_order_is_made_native(rows):
    data = open_([{"x": row.astype(">f4")} for row in rows])
    batch = next(iter(data))["x"]
    assert batch.dtype == np.dtype("=f4")
    assert np.array_equal(batch, rows[:8])


def test_constant_masks_are_remarked_and_constant_floats_refused(tmp_path, rows):
    path = npz(tmp_path / "c.npz", x=rows, mask=np.ones((32, 5), bool))
    data = open_(path, (X, MASK), batch_size=1)
    data.check()
    assert data.findings == [
        f"{path}: input 'mask' is True everywhere in every sample; the other branch of the network is then never seen"
    ]
    data.check()
    assert len(data.findings) == 1
    refused(r"input 'x' is all zero in every sample; nothing can be calibrated", npz(path, x=np.zeros_like(rows)))
    refused(r"input 'x' is 2\.5 everywhere in every sample", npz(path, x=np.full_like(rows, 2.5)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(tmp_path, rows, bad):
    rows[17, 2] = bad
    refused(r"c\.npz: batch 2 of input 'x' holds NaN or infinity", npz(tmp_path / "c.npz", x=rows))


def test_what_is_refused_about_arrays(tmp_path, rows):
    path = tmp_path / "c.npz"
    error = refused(r"nothing for the network's input 'x'; found: 'X'\. Every input needs data", npz(path, X=rows))
    assert (error.option, error.found, error.allowed) == ("--calib-data", ["X"], ["x"])
    refused(r"input 'x' is float64; the network takes float32\. Convert it", npz(path, x=rows.astype(float)))
    refused(
        r"a sample of input 'x' has 0 dimensions \[\]; the network's input has 2: \[-1, 4\]", npz(path, x=rows[:, 0])
    )
    refused(r"would be calibrated with \[8, 3\]; the profile allows \[1, 4\] to \[16, 4\]", npz(path, x=rows[:, :3]))
    refused(r"would be calibrated with \[32, 4\]; the profile allows", npz(path, x=rows), batch_size=32)
    refused(
        r"30 samples of input 'x' do not fill batches of 8: the last would hold 6\. Remove 6, or choose a --calib-b",
        npz(path, x=rows[:30]),
    )
    refused(r"array 'x' has the shape \(0, 4\); its first axis must be the samples", npz(path, x=rows[:0]))
    refused(r"array 'x' has the shape \(\); its first axis must be", npz(path, x=np.float32(1)))
    refused("4 rows of input 'x' in an item do not fill a first dimension of 6", [{"x": rows[:4]}] * 6, batch_size=6)


def test_the_minimum(tmp_path, rows):
    path = npz(tmp_path / "c.npz", x=rows)
    error = refused(
        r"c\.npz: 32 samples are fewer than 500, which int8 calibration should have at least\. "
        r"Add data, or accept fewer with --calib-min-samples 32",
        path,
        minimum=MINIMUM_SAMPLES,
    )
    assert (error.found, error.allowed) == (32, 500)
    assert open_(path, minimum=32).samples == 32


def test_no_data_is_an_error_and_never_random():
    error = refused("needs data, and none were given; they are never made up", None)
    assert isinstance(error, EngineBuildError)


def test_sources_of_another_kind(tmp_path, rows):
    refused("--calib-data is a dict; allowed: a path, an iterable of mappings, or a function", {"x": rows})
    refused("--calib-data is a int", 3)
    refused("there is no such file", tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text("hello")
    refused("is not an .npz file of plain arrays", tmp_path / "text.npz")
    np.savez(tmp_path / "object.npz", x=np.array([{"a": 1}], dtype=object))
    refused("is not an .npz file of plain arrays: Object arrays cannot be loaded", tmp_path / "object.npz")
    refused("the calibration data are empty", [])
    refused("calibration item 1 is a ndarray; a mapping from input to array is needed", [{"x": rows[0]}, rows[1]])
    refused("calibration item 1: nothing for the network's input 'x'", [{"x": rows[0]}, {}])
    refused("calibration item 0 holds Python objects", [{"x": [None, 1]}])
    refused(
        r"batch 1 of input 'x' holds float32\[3\] and float32\[4\], the items before float32\[4\]",
        [*({"x": row} for row in rows[:8]), *({"x": row[: 4 - i % 2]} for i, row in enumerate(rows[:8]))],
    )


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (touch, (str(tmp_path / "boom"),))

    (tmp_path / "c.npz").write_bytes(pickle.dumps(Bomb()))
    refused("is not an .npz file of plain arrays", tmp_path / "c.npz")
    assert not (tmp_path / "boom").exists()


def touch(path):
    Path(path).touch()


@given(st.integers(1, 40), st.integers(1, 16))
def test_batches_hold_every_row_once(count, size):
    x = np.arange(count * 4, dtype=np.float32).reshape(count, 4)
    source = [{"x": row} for row in x]
    if count % size:
        with pytest.raises(BuildOptionError, match=f"the last would hold {count % size}"):
            open_(source, batch_size=size)
    else:
        data = open_(source, batch_size=size)
        assert np.array_equal(np.concatenate([batch["x"] for batch in data]), x)
        assert data.batches * size == data.samples == count


# ----------------------------------------------------------------------------------------------------------- images

PIXELS = NetworkInput("image", "float32", (-1, 3, 2, 4))
PLAIN = Preprocessing.parse("resize=4x2,layout=nchw,color=rgb,scale=1/255")


def open_images(folder, preprocessing=PLAIN, network=PIXELS, minimum=1):
    shape = tuple(1 if size < 0 else size for size in network.shape)
    profile = Profile({network.name: InputRange(shape, shape, (4, *shape[1:]))})
    return load(folder, [network], profile, preprocessing=preprocessing, minimum=minimum)


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("PIL", reason="pillow makes the images")
    rng = np.random.default_rng(5)
    images = tmp_path / "images"
    (images / "b").mkdir(parents=True)
    for name in ("b/1.png", "a.PNG", "c.bmp"):
        Image.fromarray(rng.integers(0, 256, (2, 4, 3), dtype=np.uint8)).save(images / name)
    (images / "notes.txt").write_text("no image")
    return images


def test_images(folder):
    data = open_images(folder)
    assert (data.kind, data.samples, data.batches) == ("images", 3, 3)
    batches = [batch["image"] for batch in data]
    for name, batch in zip(("a.PNG", "b/1.png", "c.bmp"), batches, strict=True):
        pixels = np.asarray(Image.open(folder / name), np.float32)
        assert batch.shape == (1, 3, 2, 4)
        assert batch.dtype == np.float32
        np.testing.assert_allclose(batch[0], pixels.transpose(2, 0, 1) / 255, rtol=1e-6)


def test_preprocessing_is_applied(folder):
    text = "resize=4x2,layout=nhwc,color=bgr,scale=0.5,mean=1:2:3,std=2:4:8,dtype=float16"
    network = NetworkInput("image", "float16", (-1, 2, 4, 3))
    first = next(iter(open_images(folder, Preprocessing.parse(text), network)))["image"]
    pixels = np.asarray(Image.open(folder / "a.PNG"), np.float32)[..., ::-1]
    np.testing.assert_allclose(first[0], (pixels * 0.5 - [1, 2, 3]) / [2, 4, 8], rtol=1e-3, atol=1e-2)
    gray = Preprocessing.parse("resize=2x2,layout=nchw,color=gray,scale=1,dtype=uint8")
    network = NetworkInput("image", "uint8", (-1, 1, 2, 2))
    first = next(iter(open_images(folder, gray, network)))["image"]
    assert (first.shape, first.dtype) == ((1, 1, 2, 2), np.uint8)


@with_pillow
def test_images_are_turned_upright(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 2, 3) * 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image.save(tmp_path / "a.png", exif=exif)
    batch = next(iter(open_images(tmp_path)))["image"]
    turned = np.rot90(np.asarray(image), -1).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(batch[0], turned, rtol=1e-6)


def test_the_hash_of_images(folder):
    base = open_images(folder).sha256
    assert open_images(folder).sha256 == base
    (folder / "notes.txt").write_text("still no image")
    assert open_images(folder).sha256 == base
    other = Preprocessing.parse("resize=4x2,layout=nchw,color=rgb,scale=1/255,mean=0.5:0.5:0.5")
    assert open_images(folder, other).sha256 != base
    (folder / "a.PNG").rename(folder / "d.png")
    assert open_images(folder).sha256 != base


def test_what_is_refused_about_images(tmp_path, folder, rows):
    with pytest.raises(
        BuildOptionError, match=r"say how its images become tensors, .*--calib-preprocess resize=640x640"
    ):
        open_images(folder, None)
    with pytest.raises(BuildOptionError, match="images feed a network with one input, and this one has 2"):
        load(folder, [PIXELS, MASK], PROFILE, preprocessing=PLAIN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BuildOptionError, match=r"no image in this folder; looked for \.bmp, \.jpeg"):
        open_images(tmp_path / "empty")
    with pytest.raises(BuildOptionError, match="preprocessing is for a folder of images; arrays are used as they are"):
        open_([{"x": rows[0]}], preprocessing=PLAIN)
    (folder / "a.PNG").write_bytes((folder / "a.PNG").read_bytes()[:40])
    with pytest.raises(BuildOptionError, match=r"a\.PNG: not an image that can be read: .* Remove it or repair it"):
        open_images(folder)


def test_without_pillow_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(EngineBuildError, match=r"calibration from images needs pillow: pip install 'jetrt\[build\]'"):
        open_images(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not one of its parts"),
        ("resize=4x2", "layout, color, scale must be stated"),
        ("resize=4,layout=nchw,color=rgb,scale=1", r"resize is \(4,\); allowed: width x height"),
        ("resize=4x0,layout=nchw,color=rgb,scale=1", "allowed: width x height"),
        ("resize=4x2,layout=hwc,color=rgb,scale=1", "layout is 'hwc'; allowed: nchw or nhwc"),
        ("resize=4x2,layout=nchw,color=cmyk,scale=1", "color is 'cmyk'; allowed: rgb or bgr or gray"),
        ("resize=4x2,layout=nchw,color=rgb,scale=1/0", "'scale=1/0' is not a number of its kind"),
        ("resize=4x2,layout=nchw,color=rgb,scale=nan", "scale is nan; allowed: a number other than 0"),
        ("resize=4x2,layout=nchw,color=rgb,scale=1,mean=1:2", "mean is .1.0, 2.0.; allowed: 3 numbers"),
        ("resize=4x2,layout=nchw,color=gray,scale=1,std=0", "std is .0.0,.; allowed: 1 numbers between colons other"),
        (
            "resize=4x2,layout=nchw,color=rgb,scale=1,scale=2",
            "'scale=2' is not one of its parts, or stands there twice",
        ),
        ("resize=4x2,layout=nchw,color=rgb,scale=1/255,dtype=uint8", "uint8 with scale=1 and neither mean nor std"),
        ("SYNTAX=3", "'SYNTAX=3' is not one of its parts"),
    ],
)
def test_preprocessing_text_that_is_refused(text, message):
    with pytest.raises(BuildOptionError, match=message) as caught:
        Preprocessing.parse(text)
    assert caught.value.option == "--calib-preprocess"
    assert Preprocessing.SYNTAX in str(caught.value)


NUMBERS = st.floats(-1e6, 1e6).filter(bool)


TRIPLE = st.just(()) | st.tuples(NUMBERS, NUMBERS, NUMBERS)


@given(
    st.builds(
        Preprocessing,
        st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
        st.sampled_from(["nchw", "nhwc"]),
        st.sampled_from(["rgb", "bgr"]),
        NUMBERS,
        TRIPLE,
        TRIPLE,
    )
)
def test_preprocessing_as_text_and_back(made):
    assert Preprocessing.parse(made.text()) == made
    assert json.loads(json.dumps(made.to_mapping()))["scale"] == made.scale


def test_the_example_in_the_message_is_right():
    made = Preprocessing.parse(Preprocessing.SYNTAX)
    assert made.scale == 1 / 255
    assert made.std == (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------------------------ cache

# As TensorRT 10.3 wrote it for a detector; names with colons and brackets are usual.
TEXT = b"""TRT-100300-MinMaxCalibration
images: 3c010204
onnx::Conv_129: 3d0123ab
(Unnamed Layer* 1022) [PluginV2]_output_0: 0
output0: 40b7daf4
"""


def test_a_cache_of_tensorrt():
    cache = parse_cache(TEXT)
    assert (cache.version, cache.algorithm) == (100300, "MinMaxCalibration")
    assert cache.scales["images"] == pytest.approx(1 / 127, rel=1e-4)
    assert cache.scales["output0"] * 127 == pytest.approx(729.6, abs=0.1)
    assert cache.scales["(Unnamed Layer* 1022) [PluginV2]_output_0"] == 0
    assert cache.text().encode() == TEXT
    assert parse_cache(TEXT.replace(b"\n", b"\r\n")) == cache


FLOAT32 = st.floats(0, 2.0**120, width=32).map(abs)  # no negative zero
NAME = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1, max_size=20)


@given(st.dictionaries(NAME, FLOAT32, min_size=1, max_size=8))
def test_caches_as_text_and_back(scales):
    cache = Cache(100600, "EntropyCalibration2", scales)
    assert parse_cache(cache.text().encode()) == cache


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"line 1 is ''; expected TRT-<version>-<algorithm>"),
        (b"TRT-100600-EntropyCalibration2\n", "line 1 is the only line; expected a scale for at least one tensor"),
        (b"hello\nx: 3c010204\n", "line 1 is 'hello'"),
        (b"TRT-100600-EntropyCalibration2\nx 3c010204\n", "line 2 is 'x 3c010204'; expected a tensor's name, a colon"),
        (b"TRT-100600-EntropyCalibration2\nx: 3c0102045\n", "line 2 is 'x: 3c0102045'"),
        (b"TRT-100600-EntropyCalibration2\nx: 0.5\n", "line 2 is 'x: 0.5'"),
        (b"TRT-100600-EntropyCalibration2\nx: \n", "line 2 is 'x: '"),
        (b"TRT-100600-EntropyCalibration2\n: 3c010204\n", "line 2 is ': 3c010204'"),
        (b"TRT-100600-EntropyCalibration2\n\nx: 3c010204\n", "line 2 is ''"),
        (b"TRT-100600-EntropyCalibration2\nx: 7f800000\n", "line 2 is the scale inf of 'x'; expected a finite number"),
        (b"TRT-100600-EntropyCalibration2\nx: 7fc00000\n", "the scale nan of 'x'"),
        (b"TRT-100600-EntropyCalibration2\nx: bf800000\n", "the scale -1.0 of 'x'"),
        (b"TRT-100600-EntropyCalibration2\nx: 3c010204\nx: 3c010204\n", "line 3 is 'x' a second time"),
        (b"TRT-100600-EntropyCalibration2\nx: 3c010204\n\xff: 3c010204\n", "line 3 is not UTF-8"),
        (b"a" * ((64 << 20) + 1), "line 1 is the first of 67108865 bytes; expected at most 67108864 bytes"),
    ],
)
def test_hostile_caches(data, message):
    with pytest.raises(CalibrationCacheError, match=message) as caught:
        parse_cache(data, "c.cache")
    assert str(caught.value).startswith("c.cache: this calibration cache cannot be trusted: line ")
    assert str(caught.value).endswith("Rebuild it with --recalibrate.")
    assert caught.value.path == "c.cache"
    assert caught.value.expected


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"TRT-100600-EntropyCalibration2\n" + tail))
def test_any_bytes_are_a_cache_or_refused(data):
    try:
        cache = parse_cache(data)
    except CalibrationCacheError:
        return
    assert all(math.isfinite(scale) and scale >= 0 for scale in cache.scales.values())


# ---------------------------------------------------------------------------------------------------------- sidecar

CONTENT = Cache(100600, "EntropyCalibration2", {"x": 0.5, "y": 0.25}).text().encode()
IDENTITY = {"model": MODEL, "algorithm": "entropy", "tensorrt": (10, 6, 0)}


@pytest.fixture
def data(tmp_path, rows):
    return open_(npz(tmp_path / "c.npz", x=rows))


@pytest.fixture
def cache(tmp_path, data):
    path = tmp_path / "c.cache"
    save_cache(path, CONTENT, data=data, **IDENTITY)
    return path


def distrusted(path, data, message, **others):
    with pytest.raises(CalibrationCacheError, match=message) as caught:
        check_cache(path, data=data, **{**IDENTITY, **others})
    assert str(caught.value).startswith(f"{path}: this calibration cache cannot be trusted: ")
    assert str(caught.value).endswith("\nRebuild it with --recalibrate.")
    assert caught.value.path == str(path)
    assert caught.value.found
    assert caught.value.expected
    return caught.value


def test_a_cache_that_belongs(cache, data):
    assert check_cache(cache, data=data, **IDENTITY).scales == {"x": 0.5, "y": 0.25}
    record = json.loads(sidecar_of(cache).read_text())
    assert sidecar_of(cache).name == "c.cache.json"
    assert record["data"]["sha256"] == data.sha256
    assert record["identity"]["TensorRT"] == "10.6.0"
    assert list(cache.parent.glob(".*")) == []  # nothing temporary stays


def test_every_difference_is_refused_with_both_values(tmp_path, cache, data, rows):
    error = distrusted(cache, data, "another model\\.", model="cd" * 32)
    assert (error.found, error.expected) == (f"model {MODEL}", f"model {'cd' * 32}")
    assert f"\n  found:    model {MODEL}\n  expected: model {'cd' * 32}\n" in str(error)
    other = open_(npz(tmp_path / "d.npz", x=rows[::-1]))
    error = distrusted(cache, other, "another data set\\.")
    assert (error.found, error.expected) == (f"data set {data.sha256}", f"data set {other.sha256}")
    distrusted(cache, data, "another algorithm\\.", algorithm="minmax")
    distrusted(cache, data, "another TensorRT\\.", tensorrt=(10, 3, 0))
    distrusted(cache, open_(tmp_path / "c.npz", batch_size=4), "another shapes\\.\n  found:    shapes x:8x4")
    distrusted(cache, data, "another model, TensorRT\\.", model="", tensorrt=(10, 7, 0))
    distrusted(cache, None, "the data set that it came from is not given")


def test_another_preprocessing(folder, tmp_path):
    path = tmp_path / "c.cache"
    save_cache(path, CONTENT, data=open_images(folder), **IDENTITY)
    check_cache(path, data=open_images(folder), **IDENTITY)
    other = Preprocessing.parse("resize=4x2,layout=nchw,color=bgr,scale=1/255")
    error = distrusted(path, open_images(folder, other), "another data set, preprocessing")
    assert "color=rgb" in error.found
    assert "color=bgr" in error.expected


def test_an_edited_cache(cache, data):
    cache.write_bytes(CONTENT.replace(b"3f000000", b"3f000001"))
    distrusted(cache, data, "another SHA-256 of the cache")
    cache.unlink()
    distrusted(cache, data, "it cannot be read: No such file or directory")


def test_a_sidecar_that_is_missing_or_damaged(cache, data):
    sidecar = sidecar_of(cache)
    good = json.loads(sidecar.read_text())
    sidecar.unlink()
    error = distrusted(cache, data, "there is no c.cache.json, which says what it was made from")
    assert error.found == "no sidecar"
    for text in ("", "{", "null", "[]", "{}", '{"identity": 3}', "[" * 100_000):
        sidecar.write_text(text)
        distrusted(cache, data, "c.cache.json is damaged")
    sidecar.write_text(json.dumps({**good, "schema": "jetrt-calibration-9"}))
    distrusted(cache, data, "another schema")
    sidecar.write_text(json.dumps({**good, "identity": {}}))
    distrusted(cache, data, "found:    model not stated; data set not stated")


def test_a_first_line_that_was_edited_with_its_hash(cache, data):
    # `sed` on the version is what people do when TensorRT refuses a cache.
    save_cache(cache, CONTENT, data=data, **IDENTITY)
    edited = CONTENT.replace(b"TRT-100600", b"TRT-100300")
    cache.write_bytes(edited)
    record = json.loads(sidecar_of(cache).read_text())
    record["cache"]["sha256"] = hashlib.sha256(edited).hexdigest()
    sidecar_of(cache).write_text(json.dumps(record))
    error = distrusted(cache, data, "another first line")
    assert (error.found, error.expected) == (
        "first line TRT-100300-EntropyCalibration2",
        "first line TRT-100600-EntropyCalibration2",
    )


def test_a_cache_of_another_version_is_not_saved(tmp_path, data):
    with pytest.raises(CalibrationCacheError, match="another first line"):
        save_cache(tmp_path / "c.cache", TEXT, data=data, **IDENTITY)
    assert not (tmp_path / "c.cache").exists()
    old = Cache(8601, "EntropyCalibration2", {"x": 0.5}).text().encode()
    save_cache(tmp_path / "c.cache", old, data=data, **{**IDENTITY, "tensorrt": (8, 6, 1)})


def test_a_crash_between_cache_and_sidecar_is_refused(cache, data, monkeypatch):
    from jetrt.builder import calibration_cache

    write = calibration_cache.replace_text

    def dies(path, text):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(calibration_cache, "replace_text", dies)
    with pytest.raises(KeyboardInterrupt):
        save_cache(cache, CONTENT + b"z: 3f000000\n", data=data, **IDENTITY)
    distrusted(cache, data, "another SHA-256 of the cache")


def test_a_folder_that_cannot_be_written(tmp_path, data):
    with pytest.raises(EngineBuildError, match="does not exist"):
        save_cache(tmp_path / "no" / "c.cache", CONTENT, data=data, **IDENTITY)


# ------------------------------------------------------------------------------------------------- what came of it


def test_coverage():
    cache = parse_cache(TEXT)
    layers = [
        {"outputs": ["onnx::Conv_129", "mask"], "output_dtypes": ["float32", "bool"]},
        {"outputs": ["output0"], "output_dtypes": ["float32"]},
        {"outputs": ["head", "output0"], "output_dtypes": ["float16", "float32"]},
    ]
    tensors = network_tensors([NetworkInput("images", "float32", (1,)), NetworkInput("ids", "int64", (1,))], layers)
    assert tensors == ["images", "onnx::Conv_129", "output0", "head", "output0"]
    report = coverage(cache, tensors)
    assert report.covered == ("images", "onnx::Conv_129", "output0")
    assert report.missing == ("head",)
    assert report.zero == report.foreign == ("(Unnamed Layer* 1022) [PluginV2]_output_0",)
    assert report.share == 0.75
    assert report.text().splitlines() == [
        "calibration: 3 of 4 tensors have a range (75.0 %)",
        "  without: head",
        "  zero throughout: (Unnamed Layer* 1022) [PluginV2]_output_0",
        "  not in the network: (Unnamed Layer* 1022) [PluginV2]_output_0",
    ]
    assert json.loads(json.dumps(report.to_mapping()))["share"] == 0.75
    many = coverage(cache, [f"t{i}" for i in range(9)])
    assert many.text().splitlines()[1] == "  without: t0, t1, t2, t3, t4 … and 4 more"
    assert coverage(cache, []).share == 1


def test_calls_of_the_calibrator():
    check_calls(0, batches=4, cached="c.cache")
    check_calls(5, batches=4, cached=None)
    with pytest.raises(
        CalibrationCacheError, match=r"c\.cache: .* TensorRT rejected it and asked for data 1 times"
    ) as caught:
        check_calls(1, batches=4, cached="c.cache")
    assert caught.value.found == "rejected by TensorRT"
    with pytest.raises(EngineBuildError, match="asked the calibrator for 0 of 4 batches"):
        check_calls(0, batches=4, cached=None)


def test_the_log_of_a_build():
    missing = "Missing scale and zero-point for tensor {}, expect fall back to non-int8 implementation for any layer"
    strict = "Missing scale and zero-point for tensor {}. Tensor scale and zero-point must be known when output type"
    made_up = "Setting a default quantization params because quantization data is missing for {}"
    lines = [
        (2, missing.format("/embeddings/CumSum_output_0")),
        (2, missing.format("/embeddings/CumSum_output_0")),
        strict.format("(Unnamed Layer* 117) [ElementWise]_output"),
        made_up.format("a.b"),
        "Calibration completed in 3 seconds.",
    ]
    tensors = ["/embeddings/CumSum_output_0", "a.b", *(f"t{i}" for i in range(8))]
    assert check_log(lines, tensors) == {
        "missing": ["(Unnamed Layer* 117) [ElementWise]_output", "/embeddings/CumSum_output_0"],
        "made_up": ["a.b"],
    }
    with pytest.raises(EngineBuildError, match=r"2 of 10 tensors have no int8 range \(20 %; 10 % may\), e\.g\. /emb"):
        check_log(lines, tensors, allowed=0.1)
    assert check_log([], []) == {"missing": [], "made_up": []}


def test_data_as_json(data):
    assert isinstance(data, CalibrationData)
    data.check()
    mapping = json.loads(json.dumps(data.to_mapping()))
    assert mapping["shapes"] == {"x": [8, 4]}
    assert mapping["preprocessing"] is None
    assert mapping["samples"] == 32
