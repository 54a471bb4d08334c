"""Inputs at the points of the profiles, the comparison of outputs, its limits, and the gate."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jetrt
from jetrt import errors
from jetrt.builder import comparison
from jetrt.builder.arrays import dtype_name, from_bits, to_bfloat16, widened
from jetrt.builder.parity import Case, ParityReport, Thresholds, compare, gate, judge, not_run, points
from jetrt.builder.profiles import InputRange, NetworkInput, Profile
from jetrt.builder.reference import Reference
from jetrt.builder.thresholds import Limits

FP32 = Thresholds.of("fp32")
FP16 = Thresholds.of("fp16")


def one(found, expected, precision="fp32", **changes):
    thresholds = Thresholds.of(precision, {"*": changes} if changes else None)
    (result,) = compare({"y": np.asarray(found)}, {"y": np.asarray(expected)}, thresholds)
    return result


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- inputs

IMAGE = NetworkInput("image", "float32", (-1, 3))
IDS = NetworkInput("ids", "int64", (1, -1))
MASK = NetworkInput("mask", "bool", (1, -1))
SIZES = NetworkInput("sizes", "int64", (2,), shape_tensor=True)


def profile(low=1, opt=4, high=8):
    return Profile(
        {
            "image": InputRange((low, 3), (opt, 3), (high, 3)),
            "ids": InputRange((1, low), (1, opt), (1, high)),
            "mask": InputRange((1, low), (1, opt), (1, high)),
        },
        {"sizes": ((1, 2), (3, 4), (5, 6))},
    )


def test_every_point_of_every_profile():
    cases = points([profile(), profile(2, 2, 3)], [IMAGE, IDS, MASK, SIZES])
    assert [(case.profile, case.point, case.inputs["image"].shape[0]) for case in cases] == [
        (0, "min", 1),
        (0, "opt", 4),
        (0, "max", 8),
        (1, "min", 2),
        (1, "opt", 2),  # its shape tensor has other values than at min
        (1, "max", 3),
    ]
    for case in cases:
        assert list(case.inputs) == ["image", "ids", "mask", "sizes"]
        assert {name: dtype_name(array) for name, array in case.inputs.items()} == {
            "image": "float32",
            "ids": "int64",
            "mask": "bool",
            "sizes": "int64",
        }
        assert set(case.inputs["ids"].flat) <= {0, 1}
        assert case.inputs["mask"][0, 0]
    assert [case.inputs["sizes"].tolist() for case in cases[:3]] == [[1, 2], [3, 4], [5, 6]]
    assert set(cases[2].inputs["mask"].flat) == {False, True}


def test_points_that_are_alike_are_one_case():
    static = Profile({"x": InputRange((2,), (2,), (2,))})
    x = NetworkInput("x", "float32", (2,))
    assert [case.point for case in points([static], [x])] == ["opt"]
    given_for = {"x@min": np.zeros(2, np.float32), "x": np.ones(2, np.float32)}
    cases = points([static], [x], given=given_for)
    assert [(case.point, case.inputs["x"].tolist()) for case in cases] == [("min", [0, 0]), ("opt", [1, 1])]


def test_inputs_depend_on_the_seed_alone():
    first, again = (points([profile()], [IMAGE, IDS, MASK, SIZES], seed=1) for _ in range(2))
    other = points([profile()], [IMAGE, IDS, MASK, SIZES], seed=2)
    # An input's values do not change with what else the model has.
    alone = points([profile()], [IMAGE], seed=1)
    for a, b, c, d in zip(first, again, other, alone, strict=True):
        assert all(np.array_equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
        assert np.array_equal(a.inputs["image"], d.inputs["image"])
        assert not np.array_equal(a.inputs["image"], c.inputs["image"])


def test_inputs_of_one_shape_differ():
    inputs = [NetworkInput(name, "float32", (3,)) for name in "ab"]
    (case,) = points([Profile({})], inputs)
    assert not np.array_equal(case.inputs["a"], case.inputs["b"])


@given(
    dtype=st.sampled_from(["bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64", "bfloat16"]),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    seed=st.integers(0, 2**32),
)
def test_random_values_are_of_the_type_and_shape(dtype, shape, seed):
    (case,) = points([Profile({"x": InputRange(shape, shape, shape)})], [NetworkInput("x", dtype, shape)], seed=seed)
    array = case.inputs["x"]
    assert (dtype_name(array), array.shape) == (dtype, shape)
    assert array.flags.c_contiguous
    assert np.isfinite(widened(array).astype(np.float64)).all()
    if dtype in ("bool", "int32", "int64") and array.ndim and array.size:
        assert set(array.reshape(-1).tolist()) <= {0, 1}
        assert (array.any(axis=-1)).all(), "a row of a mask hides everything"


def test_random_values_of_an_unknown_type_are_asked_for():
    x = NetworkInput("x", "float5", (2,))
    with pytest.raises(
        errors.BuildOptionError,
        match=r"--inputs: input 'x' is float5, for which there are no random values; .* float5\[2\]\. Give an array",
    ):
        points([Profile({"x": InputRange((2,), (2,), (2,))})], [x])


class TestGiven:
    X = NetworkInput("x", "float32", (-1,))
    PROFILES = (Profile({"x": InputRange((1,), (2,), (3,))}), Profile({"x": InputRange((1,), (2,), (2,))}))

    def test_array_for_each_point(self):
        arrays = {
            "x": np.full(1, 7.0, np.float32),
            "x@opt": np.full(2, 8.0, np.float32),
            "x@0.max": np.full(3, 9.0, np.float32),
            "x@1.opt": np.full(2, 5.0, np.float32),
            "x@1.max": np.full(2, 6.0, np.float32),
        }
        cases = points(self.PROFILES, [self.X], given=arrays)
        assert [case.inputs["x"].tolist() for case in cases] == [[7], [8, 8], [9, 9, 9], [7], [5, 5], [6, 6]]

    def test_another_shape_says_which_is_needed(self):
        with pytest.raises(
            errors.BuildOptionError,
            match=r"input 'x' at min of profile 0 has another shape; found: \[2\]; allowed: \[1\]\. "
            r"Add an array of that shape to the file as 'x@0\.min' or 'x@min'",
        ) as caught:
            points(self.PROFILES, [self.X], given={"x": np.zeros(2, np.float32)})
        assert caught.value.option == "--inputs"
        with pytest.raises(errors.BuildOptionError, match="at min of profile 0 has another shape; found: nothing"):
            points(self.PROFILES, [self.X], given={"x@opt": np.zeros(2, np.float32)})

    @pytest.mark.parametrize("key", ["y", "x@mid", "x@2.min", "x@"])
    def test_key_that_is_for_nothing(self, key):
        with pytest.raises(errors.BuildOptionError, match=f"{key!r} is for no input of the model; .* allowed: x"):
            points(self.PROFILES, [self.X], given={key: np.zeros(1, np.float32)})

    def test_a_name_may_hold_the_separator(self):
        x = NetworkInput("x@min", "float32", (1,))
        (case,) = points([Profile({})], [x], given={"x@min": np.ones(1, np.float32)})
        assert case.inputs["x@min"].tolist() == [1]

    def test_types(self):
        static = [Profile({"x": InputRange((1,), (1,), (1,))})]
        with pytest.raises(errors.BuildOptionError, match="'x' has another type; found: float64; allowed: float32"):
            points(static, [self.X], given={"x": np.zeros(1)})
        bf16 = NetworkInput("x", "bfloat16", (1,))
        for array in (np.full(1, 1.0, np.float32), np.full(1, 0x3F80, np.uint16).view("V2")):
            (case,) = points(static, [bf16], given={"x": array})
            assert widened(case.inputs["x"]).tolist() == [1.0]


# ------------------------------------------------------------------------------------------------------------ bfloat16


@given(hnp.arrays(np.float32, st.integers(0, 8), elements=st.floats(width=32, allow_nan=False)))
def test_bfloat16_rounds_to_nearest_even(values):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with np.errstate(over="ignore"):
        want = values.astype(ml_dtypes.bfloat16)
    got = to_bfloat16(values)
    assert got.view(np.uint16).tolist() == want.view(np.uint16).tolist()
    assert widened(got).tolist() == want.astype(np.float32).tolist()
    assert widened(got.view("V2")).tolist() == widened(got).tolist()  # as .npy files keep it


def test_bfloat16_ties_go_to_even():
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert widened(to_bfloat16(values)).tolist() == [1.0, 1 + 2**-6, -1.0, 1 + 2**-7]


def test_bfloat16_nan_stays_nan():
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32)
    assert np.isnan(widened(to_bfloat16(bits.view(np.float32)))).all()


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    array = to_bfloat16(np.array(1.5, np.float32))
    assert (array.dtype, array.shape, dtype_name(array), widened(array).item()) == ("V2", (), "bfloat16", 1.5)
    assert dtype_name(from_bits(np.zeros(2, np.uint16))) == "bfloat16"


# ---------------------------------------------------------------------------------------------------------- comparison


def test_definitions():
    result = one([1.0, 2.0, -2.0], [1.0, 2.0, -1.0], absolute=0.003, max_rel=1.5, cosine=0.5)
    assert result.cosine == pytest.approx(7 / (3 * math.sqrt(6)))
    assert result.max_abs == 1.0
    assert result.mean_abs == pytest.approx(1 / 3)
    assert result.max_rel == pytest.approx(1 / (1 + 4 / 3 + 0.002))
    assert result.to_peak == 0.5
    assert result.worst == ((2,), -2.0, -1.0)
    assert (result.elements, result.peak, result.passed) == (3, 2.0, True)


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements=None,
    )
)
def test_an_output_equals_itself(array):
    result = compare({"y": array}, {"y": array}, FP32)[0]
    if array.size and array.dtype.kind == "f" and np.isnan(array).all():
        assert result.reasons == ("the reference is NaN everywhere, so nothing was compared",)
    elif array.dtype != np.float64:  # squares of the largest float64 overflow
        assert result.passed, result
        assert (result.max_abs or 0, result.differing or 0, result.nonfinite) == (0, 0, 0)


FLOATS = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=300)
@given(
    expected=hnp.arrays(np.float32, st.integers(1, 30), elements=FLOATS),
    data=st.data(),
)
def test_what_onnx_allows_its_own_backends_passes(expected, data):
    wrong = data.draw(hnp.arrays(np.float64, expected.shape, elements=st.floats(-1, 1)))
    found = (expected + wrong * (1e-7 + 1e-3 * np.abs(expected.astype(np.float64)))).astype(np.float32)
    if np.allclose(found, expected, rtol=1e-3, atol=1e-7):
        assert compare({"y": found}, {"y": expected}, FP32)[0].passed


@given(hnp.arrays(np.float32, st.integers(2, 50), elements=FLOATS), st.data())
def test_one_wrong_element_fails_in_fp32(expected, data):
    index = data.draw(st.integers(0, expected.size - 1))
    found = expected.copy()
    found[index] += max(np.abs(expected).max(), 1e-3) * 0.01
    result = compare({"y": found}, {"y": expected}, FP32)[0]
    assert not result.passed
    assert result.worst[0] == (index,)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_few_wrong_elements_among_many_fail(precision, scale):
    expected = normal(1000, 100, scale=scale)
    for index, wrong in (((3, 7), 3 * scale), ((999, 99), 0.0)):
        found = expected.copy()
        expected[index] = 2 * scale
        found[index] = wrong
        found[0, 0], expected[0, 0] = 1.5 * scale, 0.0  # what should be 0 and is not
        result = one(found, expected, precision)
        assert result.cosine > 0.9999, "this is what cosine alone would have let through"
        assert not result.passed
        assert "max_rel" in result.reasons[-1]


def test_errors_of_the_size_of_absolute_do_not_turn_an_output():
    expected, found = np.array([1e-6, 0.0], np.float32), np.array([1e-6, 1e-6], np.float32)
    assert one(found, expected).cosine == pytest.approx(math.sqrt(0.5))
    assert one(found, expected).passed
    assert not one(found * 100, expected * 100).passed


def test_wrong_by_a_factor_fails():
    expected = normal(1000)
    result = one(expected * np.float32(1.01), expected)
    assert result.cosine == pytest.approx(1.0)
    assert result.reasons[0].startswith("max_rel ")


def test_small_values_are_not_small_errors():
    expected = normal(1000, scale=1e-4)
    assert one(expected, expected).passed
    result = one(-expected, expected)
    assert result.max_abs < 1e-3
    assert [reason.split()[0] for reason in result.reasons] == ["cosine", "max_rel"]


def network(x, rounded):
    """Twelve residual layers with a norm, in which every tensor is rounded."""
    generator = np.random.default_rng(5)
    width = x.shape[-1]
    for _ in range(12):
        up, down = (rounded(generator.standard_normal((width, width)) / math.sqrt(width)) for _ in range(2))
        norm = rounded((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True))
        x = rounded(x + rounded(rounded(np.maximum(rounded(norm @ up), 0)) @ down))
    return x


ROUNDED = {
    "fp32": lambda x: x.astype(np.float32).astype(np.float64),
    "fp16": lambda x: x.astype(np.float16).astype(np.float64),
    "bf16": lambda x: widened(to_bfloat16(x)).astype(np.float64),
}


@pytest.mark.parametrize("precision", ROUNDED)
def test_rounding_passes_and_a_wrong_row_does_not(precision):
    x = normal(64, 96, seed=3).astype(np.float64)
    exact = network(x, lambda x: x)
    found = network(x, ROUNDED[precision])
    result = one(found.astype(np.float32), exact.astype(np.float32), precision)
    assert result.passed, result
    assert result.max_abs > 0
    found[17] = found[18]
    wrong = one(found.astype(np.float32), exact.astype(np.float32), precision)
    assert not wrong.passed
    assert wrong.worst[0][0] == 17


def test_half_types_are_compared_wide():
    expected = np.array([60000.0, 60000.0], np.float16)
    assert one(expected, expected, "fp16").passed  # their squares are infinite in fp16
    for make in (to_bfloat16, lambda x: to_bfloat16(x).view("V2")):
        a, b = make(normal(100)), make(normal(100) * np.float32(1.001))
        (result,) = compare({"y": a}, {"y": b}, Thresholds.of("bf16"))
        assert (result.passed, result.dtype) == (True, "bfloat16")
        (result,) = compare({"y": make(normal(100, seed=1))}, {"y": b}, Thresholds.of("bf16"))
        assert not result.passed


def test_zeros():
    zero, some = np.zeros(4, np.float32), np.full(4, 2.0, np.float32)
    assert one(zero, zero).cosine == 1.0
    assert one(zero, zero).passed
    result = one(zero, some)
    assert (result.cosine, result.to_peak) == (0.0, 1.0)
    assert not result.passed
    result = one(some, zero)
    assert (result.cosine, result.to_peak) == (0.0, math.inf)
    assert not result.passed
    assert one(np.full(4, 5e-7, np.float32), zero).passed  # rounding


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_no_elements(shape, dtype):
    result = one(np.zeros(shape, dtype), np.zeros(shape, dtype))
    assert (result.elements, result.passed, result.shape) == (0, True, shape)


def test_nan_and_infinities():
    expected = np.array([1.0, np.nan, np.inf, -np.inf, 2.0], np.float32)
    assert one(expected, expected).passed
    for index, value in ((0, np.nan), (1, 1.0), (2, -np.inf), (3, 5.0), (4, np.inf)):
        found = expected.copy()
        found[index] = value
        result = one(found, expected)
        assert result.nonfinite == 1
        assert result.reasons == ("1 of 5 elements are NaN or infinite on one side only",)
    assert not one(np.full(3, np.nan, np.float32), np.full(3, np.nan, np.float32)).passed
    assert one(np.full(3, -np.inf, np.float32), np.full(3, -np.inf, np.float32)).passed


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.bool_])
def test_integers_are_compared_exactly(dtype):
    expected = np.zeros((100, 10), dtype)
    found = expected.copy()
    found[42, 3] = 1
    result = one(found, expected, "int8")
    assert (result.differing, result.worst, result.cosine) == (1, ((42, 3), 1.0, 0.0), None)
    assert result.reasons == ("1 of 1000 elements differ, allowed 0 of them",)
    assert one(found, expected, differing=0.001).passed
    assert not one(found, expected, differing=0.0009).passed


def test_large_integers_are_not_rounded():
    assert not one(np.array([2**62 + 1]), np.array([2**62])).passed


def test_shape_of_a_row_count_that_depends_on_data():
    result = one(np.zeros((3, 4), np.int64), np.zeros((2, 4), np.int64))
    assert result.reasons == ("shape [3, 4], expected [2, 4]",)


def test_types_must_agree_unless_told():
    a, b = normal(10).astype(np.float16), normal(10)
    assert one(a, b).reasons == ("type float16, expected float32",)
    assert compare({"y": a}, {"y": b}, FP16, dtypes={"y": "float16"})[0].passed
    assert compare({"y": b}, {"y": b}, FP16, dtypes={"y": "float16"})[0].passed
    (result,) = compare({"y": b.astype(np.int32)}, {"y": b}, FP16, dtypes={"y": "float16"})
    assert result.reasons == ("type int32, expected float16",)


def test_outputs_that_only_one_side_has():
    results = {r.output: r.reasons for r in compare({"a": normal(1)}, {"b": normal(1)}, FP32)}
    assert results == {"a": ("the reference has no such output",), "b": ("the plan has no such output",)}


def test_large_arrays_are_compared_in_pieces(monkeypatch):
    expected = normal(2, 700_000)
    found = expected.copy()
    found[1, 699_999] += 10
    expected[0, 5] = found[0, 5] = np.nan  # shifts the finite elements
    result = one(found, expected)
    assert result.worst[0] == (1, 699_999)
    whole = [dataclasses.asdict(result)]
    chunks = comparison._chunks
    monkeypatch.setattr(comparison, "_chunks", lambda a, b: chunks(a, b, size=a.size))
    whole.append(dataclasses.asdict(one(found, expected)))
    assert whole[0].pop("worst") == whole[1].pop("worst")
    assert whole[0].pop("reasons")
    assert whole[1].pop("reasons")
    for name, value in whole[0].items():
        assert value == whole[1][name] or value == pytest.approx(whole[1][name]), name


def test_arrays_that_are_not_contiguous():
    expected = normal(6, 8)
    assert one(expected[::2, ::-1], np.ascontiguousarray(expected[::2, ::-1])).passed
    bf16 = to_bfloat16(expected)
    assert compare({"y": bf16.T}, {"y": to_bfloat16(expected.T)}, FP32)[0].passed


# ----------------------------------------------------------------------- what TensorRT 10.6 computes wrongly in silence

X4 = normal(1, 2, 6, 6)
GRID = np.random.default_rng(1).uniform(-2, 2, (1, 5, 5, 2)).astype(np.float32)
W, R, B = normal(1, 9, 4, seed=2), normal(1, 9, 3, seed=3), normal(1, 18, seed=4)


@pytest.mark.parametrize(
    ("operator", "inputs", "right", "wrong"),
    [
        ("Trilu", [normal(6, 6), np.array(1)], {"upper": 1}, {"upper": 0}),
        ("GridSample", [X4, GRID], {"align_corners": 0}, {"align_corners": 1}),
        ("GridSample", [X4, GRID], {"padding_mode": "reflection"}, {"padding_mode": "border"}),
        (
            "AveragePool",
            [X4],
            {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
            {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1], "count_include_pad": 1},
        ),
        ("GRU", [normal(5, 2, 4), W, R, B], {"hidden_size": 3, "linear_before_reset": 1}, {"hidden_size": 3}),
        ("ReduceLogSumExp", [X4], {"axes": [2]}, "ReduceLogSum"),
        ("ReduceL2", [X4], {"axes": [1]}, "ReduceSumSquare"),
        ("LRN", [X4], {"size": 3, "alpha": 0.1}, {"size": 5, "alpha": 0.1}),
        ("Mod", [np.arange(-5, 5), np.full(10, 3)], {"fmod": 0}, {"fmod": 1}),
    ],
)
def test_operators_that_are_computed_wrongly_are_caught(operator, inputs, right, wrong):
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    names = [f"i{n}" for n in range(len(inputs))]

    def run(operator, attributes):
        node = onnx.helper.make_node(operator, names, ["y"], **attributes)
        types = [onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for array in inputs]
        values = [
            onnx.helper.make_tensor_value_info(name, kind, array.shape)
            for name, kind, array in zip(names, types, inputs, strict=True)
        ]
        graph = onnx.helper.make_graph([node], "g", values, [onnx.helper.make_tensor_value_info("y", types[0], None)])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, dict(zip(names, inputs, strict=True)))
        return {"y": y}

    expected = run(operator, right)
    found = run(wrong, right) if isinstance(wrong, str) else run(operator, wrong)
    (result,) = compare(found, expected, FP32)
    assert result.reasons
    assert found["y"].shape == expected["y"].shape, "the shapes are right, the values are not"


# ---------------------------------------------------------------------------------------------------------- thresholds


def test_thresholds_are_changed_by_output():
    thresholds = Thresholds.parse(
        "fp16", ["max_rel=0.2", "y:cosine=0.9,max_abs=3", "a:b:differing=0.01", "z:max_rel=none"]
    )
    default = dataclasses.replace(FP16.default, max_rel=0.2)
    assert thresholds.default == default
    assert thresholds.for_output("y") == dataclasses.replace(default, cosine=0.9, max_abs=3.0)
    assert thresholds.for_output("a:b") == dataclasses.replace(default, differing=0.01)
    assert thresholds.for_output("z").max_rel is None
    assert thresholds.for_output("other") == default
    assert Thresholds.from_mapping(json.loads(json.dumps(thresholds.to_mapping()))) == thresholds


def test_mixed_is_held_to_the_shortest_type():
    assert Thresholds.of("mixed").default == Thresholds.of("bf16").default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosin=0.9", "'\\*' names no limit; found: cosin; allowed: cosine, max_rel"),
        ("y:cosine=high", "'y:cosine=high' is no limit; found: cosine=high; allowed: .OUTPUT:.NAME=NUMBER"),
        ("cosine", "'cosine' is no limit"),
        ("y:max_rel=-1", "'y': max_rel is -1.0; allowed: a number from 0"),
        ("y:max_rel=nan", "'y': max_rel is nan"),
        ("y:absolute=none", "'y': absolute is None; allowed: a number from 0"),
    ],
)
def test_thresholds_that_make_no_sense(text, message):
    with pytest.raises(errors.BuildOptionError, match=f"--parity-limit: {message}"):
        Thresholds.parse("fp32", [text])


def test_unknown_precision():
    with pytest.raises(errors.BuildOptionError, match=r"no limits are known for precision 'fp4'.* allowed: fp32, tf32"):
        Thresholds.of("fp4")


# ------------------------------------------------------------------------------------------------------ report and gate


def report(found, expected, thresholds=FP16, kind="onnxruntime", **options):
    case = Case(0, "max", {"x": np.zeros((2, 3), np.float32)})
    reference = Reference(
        kind, expected, {"onnxruntime": "1.2.3"}, 0.5, {"graph_optimization_level": "ORT_DISABLE_ALL"}
    )
    return judge([case], [found], [reference], thresholds, **options)


def test_report_of_a_plan_that_agrees():
    y = normal(2, 3)
    result = report({"y": y}, {"y": y})
    assert (result.state, result.reason) == ("passed", None)
    gate(result)
    text = result.table()
    assert text.splitlines()[:2] == ["parity passed", "reference: onnxruntime (onnxruntime 1.2.3)"]
    assert "0.max  y       float32[2, 3]  1" in text


def test_report_goes_through_json_and_fits_the_manifest():
    expected = {"y": normal(2, 3), "n": np.arange(4), "z": np.zeros(2, np.float32), "b": to_bfloat16(normal(2))}
    found = {**expected, "y": np.full((2, 3), np.inf, np.float32), "z": np.ones(2, np.float32)}
    for result in (
        report(found, expected),
        report(expected, expected, Thresholds.parse("bf16", ["y:max_abs=1"])),
        not_run("no reference", FP32),
        not_run("no reference"),
    ):
        data = json.loads(json.dumps(result.to_mapping(), allow_nan=False))
        assert ParityReport.from_mapping(data) == result
        schema = json.loads((Path(jetrt.__file__).parent / "schemas" / "manifest.json").read_text())
        assert set(data) == set(schema["$defs"]["Parity"]["properties"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": "fine"}, "state is 'fine'"),
        ({"state": "passed"}, "state is 'passed', and the cases say something else"),
        ({"cases": [{"profile": 0}]}, "'point' is missing"),
        ({"cases": 3}, "not iterable"),
        ({"thresholds": {"precision": "fp32"}}, "thresholds: KeyError"),
        ({"thresholds": []}, "thresholds"),
    ],
)
def test_damaged_record(change, message):
    data = report({"y": normal(3, seed=1)}, {"y": normal(3)}).to_mapping()
    assert data["state"] == "failed"
    with pytest.raises(errors.ManifestError, match=f"parity: the record is damaged: .*{message}.*jetrt verify"):
        ParityReport.from_mapping({**data, **change})


def test_a_record_cannot_claim_to_have_passed_with_nothing_compared():
    data = {**not_run("x").to_mapping(), "state": "passed"}
    with pytest.raises(errors.ManifestError, match="the cases say something else"):
        ParityReport.from_mapping(data)


def test_gate_names_output_point_found_allowed_and_next_step():
    y = normal(100)
    wrong = y.copy()
    wrong[7] = 9.0
    y[7] = 1.0
    result = report({"y": wrong, "z": y}, {"y": y, "z": y})
    assert result.state == "failed"
    assert result.reason.startswith("1 of 2 comparisons; output 'y' at max of profile 0: cosine")
    with pytest.raises(
        errors.ParityError,
        match=r"output 'y' at max of profile 0 differs from the reference \(onnxruntime\): cosine 0\.\d+, allowed from "
        r"0\.999; max_rel 4\.\d+, allowed up to 0\.5 \(found 9 at \[7\], expected 1\)\. "
        r"--precision fp32 tells .*--fp32-norms.*--inputs",
    ) as caught:
        gate(result)
    (failure,) = caught.value.failures
    assert (failure["output"], failure["profile"], failure["point"]) == ("y", 0, "max")


@pytest.mark.parametrize(
    ("found", "expected", "precision", "step"),
    [
        ([np.inf, 1], [7e4, 1], "fp16", "--fp32-norms, or --precision bf16"),
        ([1.0, 2], [1.0, 3], "fp32", "the parser or a kernel computes something else than the ONNX"),
        (np.array([1, 2]), np.array([1, 3]), "fp16", "--parity-limit 'y:differing=0.01'"),
        (np.array([1, 2]), np.array([1]), "fp32", "An index of a maximum flips where values tie"),
    ],
)
def test_next_step(found, expected, precision, step):
    result = report({"y": np.asarray(found)}, {"y": np.asarray(expected)}, Thresholds.of(precision))
    with pytest.raises(errors.ParityError) as caught:
        gate(result)
    assert step in str(caught.value)


def test_not_run_is_no_pass():
    result = not_run("the package onnxruntime\nis missing.")
    assert result.reason == "the package onnxruntime is missing."
    with pytest.raises(errors.ParityError, match=r"not checked: the package onnxruntime is missing\..*--no-parity"):
        gate(result)
    gate(result, allow_not_run=True)
    assert judge([], [], [], FP32).state == "not run"
    assert report({}, {}).state == "not run"


def test_notes_say_where_little_was_shown():
    empty, zero = np.zeros((0, 4), np.float32), np.zeros(3, np.float32)
    result = report({"a": empty, "b": zero}, {"a": empty, "b": zero})
    assert result.state == "passed"
    assert [note.partition(",")[0] for note in result.notes] == [
        "output 'a' has no elements at any point",
        "output 'b' is 0 everywhere in the reference",
    ]
    assert "note: output 'a'" in result.table()


def test_limits_for_an_output_that_does_not_exist():
    with pytest.raises(errors.BuildOptionError, match="there is no such output; found: q; allowed: y"):
        report({"y": normal(1)}, {"y": normal(1)}, Thresholds.of("fp32", {"q": {"cosine": 0.5}}))


def test_limits_are_numbers():
    with pytest.raises(ValueError, match="cosine is 'high'"):
        Limits(cosine="high")
