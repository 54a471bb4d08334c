"""The models that builds are verified with on a GPU (tests/gpu/workloads.py), on the CPU."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed (it does not take numpy 1.21)")
onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import workloads  # noqa: E402
from workloads import Dit  # noqa: E402

SMALL = Dit(layers=4, width=96, heads=4, vl_width=64, output_width=32, tokens=5)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small DiT in both precisions, and a function that runs the fp32 one."""
    folder = tmp_path_factory.mktemp("dit")
    paths = {dtype: SMALL.write(folder / f"{dtype}.onnx", dtype=dtype) for dtype in ("bfloat16", "float32")}
    session = onnxruntime.InferenceSession(paths["float32"], providers=["CPUExecutionProvider"])

    def run(**inputs):
        (output,) = session.run(["output"], inputs)
        return output

    return paths, run


def inputs(s=40, **changes):
    return {**SMALL.inputs(s, dtype="float32"), **changes}


def test_sizes_of_the_published_checkpoints():
    assert Dit(32).parameters == 1_091_722_240
    assert Dit(16).parameters == 550_386_688


def test_contract(tmp_path):
    """Names, types and shapes of GR00T N1.7's DiT; the checker of onnx has no complaint."""
    path = Dit(layers=2).write(tmp_path / "dit.onnx")
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    found = {
        value.name: (
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in [*graph.input, *graph.output]
    }
    assert found == {
        "sa_embs": ("BFLOAT16", [1, 41, 1536]),
        "vl_embs": ("BFLOAT16", [1, "S", 2048]),
        "timestep": ("INT64", [1]),
        "image_mask": ("BOOL", [1, "S"]),
        "backbone_attention_mask": ("BOOL", [1, "S"]),
        "output": ("BFLOAT16", [1, 41, 1024]),
    }
    assert sum(int(np.prod(w.dims)) for w in graph.initializer if "." in w.name) == Dit(layers=2).parameters
    # Strongly typed: no number inside is wider than bfloat16, but for the timestep's sinusoid.
    wide = [w.name for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT]
    assert len(wide) == 1


def test_both_precisions_have_the_same_weights(small):
    paths, _ = small
    weights = [
        {
            w.name: onnx.numpy_helper.to_array(w).astype(np.float32)
            for w in onnx.load(path).graph.initializer
            if "." in w.name
        }
        for path in paths.values()
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][name])


def test_external_data(small, tmp_path):
    """The same model, its weights in another file: what protobuf's 2 GB demand of the one with 32 layers."""
    paths, _ = small
    path = SMALL.write(tmp_path / "large.onnx", external=True)
    onnx.checker.check_model(path)
    assert path.stat().st_size < 100_000
    assert (tmp_path / "large.onnx.data").stat().st_size == SMALL.parameters * 2
    one, other = (
        {w.name: onnx.numpy_helper.to_array(w).tobytes() for w in onnx.load(p).graph.initializer}
        for p in (paths["bfloat16"], path)
    )
    assert one == other


@pytest.mark.parametrize("s", [1, 2, 40, 77])
def test_it_runs_at_any_length(small, s):
    output = small[1](**inputs(s))
    assert output.shape == (1, 5, 32)
    assert np.isfinite(output).all()
    assert 0.05 < output.std() < 5


def test_what_it_depends_on(small):
    """Padding has no influence; every input that is not masked has."""
    _, run = small
    base = inputs()
    expected = run(**base)
    vl, image, attended = (base[name] for name in ("vl_embs", "image_mask", "backbone_attention_mask"))

    def but(where, value=3.0):
        changed = vl.copy()
        changed[np.broadcast_to(where[..., None], vl.shape)] = value
        return run(**inputs(vl_embs=changed))

    np.testing.assert_array_equal(but(~attended), expected)
    assert not np.allclose(but(attended & image), expected)
    assert not np.allclose(but(attended & ~image), expected)
    longer = {
        "vl_embs": np.pad(vl, [(0, 0), (0, 9), (0, 0)], constant_values=7),
        "image_mask": np.pad(image, [(0, 0), (0, 9)], constant_values=True),
        "backbone_attention_mask": np.pad(attended, [(0, 0), (0, 9)]),
    }
    np.testing.assert_allclose(run(**inputs(**longer)), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(run(**inputs(timestep=base["timestep"] + 50)), expected)
    assert not np.allclose(run(**inputs(sa_embs=base["sa_embs"] + 1)), expected)
    # The blocks are ordered: text in 0, image in 2.
    assert not np.allclose(run(**inputs(image_mask=~image)), expected)


def test_against_numpy(small):
    """The same formulas, written down a second time."""
    paths, run = small
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(paths["float32"]).graph.initializer}
    given = inputs(23, timestep=np.array([637]))

    def linear(name, x):
        return x @ weights[f"{name}.weight"].astype(np.float64) + weights[f"{name}.bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def norm(x, epsilon):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)

    angles = 637 * np.exp(-np.log(10000) * np.arange(128) / 127)
    sinusoid = np.concatenate([np.cos(angles), np.sin(angles)])[None]
    time = silu(linear("time.2", silu(linear("time.1", sinusoid))))
    x = given["sa_embs"].astype(np.float64)
    heads, each = SMALL.heads, SMALL.width // SMALL.heads
    for i in range(SMALL.layers):
        scale, shift = np.split(linear(f"{i}.adaln", time)[:, None], 2, axis=-1)
        y = norm(x, 1e-5) * (1 + scale) + shift
        source = y if i % 2 else given["vl_embs"].astype(np.float64)
        q, k, v = (
            linear(f"{i}.{n}", y if n == "q" else source).reshape(1, -1, heads, each).transpose(0, 2, 1, 3)
            for n in "qkv"
        )
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(each)
        if i % 2 == 0:
            image = given["image_mask"] if i % 4 else ~given["image_mask"]
            scores = np.where((given["backbone_attention_mask"] & image)[:, None, None], scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = share / share.sum(-1, keepdims=True) @ v
        x = x + linear(f"{i}.out", mixed.transpose(0, 2, 1, 3).reshape(y.shape))
        up = linear(f"{i}.up", norm(x, 1e-5))
        x = x + linear(f"{i}.down", 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))))
    shift, scale = np.split(linear("tail.adaln", time)[:, None], 2, axis=-1)
    expected = linear("tail.out", norm(x, 1e-6) * (1 + scale) + shift)
    np.testing.assert_allclose(run(**given), expected, rtol=1e-3, atol=1e-4)


# PP-OCR ---------------------------------------------------------------------------------------------------------------


def test_ctc_text():
    scores = np.eye(4, dtype=np.float32)[[[0, 1, 1, 0, 1, 2, 2, 3], [0, 0, 0, 0, 0, 0, 0, 0]]]
    assert workloads.ctc_text(scores, ["", "a", "b", " "]) == ["aab ", ""]


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("scipy", reason="scipy is not installed (pip install 'jetrt[demo]')")
    pytest.importorskip("PIL", reason="pillow is not installed (pip install 'jetrt[demo]')")
    try:
        return workloads.ocr_models()
    except OSError as error:
        pytest.skip(str(error))


def test_the_text_of_the_drawn_page(ocr):
    import jetrt

    detection, recognition = ocr
    page, lines = workloads.demo_page()
    characters = workloads.alphabet(recognition)
    assert len(characters) == 18710
    with jetrt.load(detection, runtime="onnx_cpu") as detect, jetrt.load(recognition, runtime="onnx_cpu") as recognise:
        (info,) = recognise.outputs.values()
        assert info.shape[-1] == len(characters)
        found = workloads.read_page(page, workloads.function(detect), workloads.function(recognise), characters)
    # The model leaves out the blanks in rows of digits; all else is read as it was drawn.
    assert [line.replace(" ", "") for line in found] == [line.replace(" ", "") for line in lines]


def test_calibration_sets(ocr, tmp_path):
    files = workloads.calibration_sets(tmp_path / "data", count=3)
    again = workloads.calibration_sets(tmp_path / "again", count=3)
    for file, shapes in zip(files, (workloads.DETECTION_SHAPES, workloads.RECOGNITION_SHAPES), strict=True):
        x = np.load(file)["x"]
        assert x.dtype == np.float32
        assert x.shape[0] == 3
        least, _, most = shapes
        assert all(a <= n <= b for a, n, b in zip(least[1:], x.shape[1:], most[1:], strict=True))
        assert -1 <= x.min() < -0.5
        assert 0.5 < x.max() <= 1
        assert not np.array_equal(x[0], x[1])
    digests = [[hashlib.sha256(np.load(file)["x"]).hexdigest() for file in pair] for pair in (files, again)]
    assert digests[0] == digests[1]
