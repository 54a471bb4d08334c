"""Reference outputs: onnxruntime, an upcast copy of a bfloat16 model, torch, .npz files, and what cannot be had."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from jetrt import errors
from jetrt.builder.arrays import dtype_name, load_npz, to_bfloat16, widened
from jetrt.builder.reference import ReferenceUnavailable, compute, from_text, opened
from jetrt.builder.upcast import uses_bfloat16

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.full((2, 3), 10, dtype=np.float32)


@pytest.fixture
def onnx(onnx_models):
    return onnx_models.onnx


# --------------------------------------------------------------------------------------------------------- onnxruntime


def test_onnxruntime(tmp_path, onnx_models):
    path = onnx_models.add(tmp_path / "add.onnx")
    reference = compute(path, {"a": A, "b": B})
    assert reference.kind == "onnxruntime"
    np.testing.assert_array_equal(reference.outputs["sum"], A + B)
    np.testing.assert_array_equal(reference.outputs["twice"], A + A)
    assert list(reference.versions) == ["onnxruntime"]
    assert reference.seconds > 0
    assert reference.to_mapping() == {
        "kind": "onnxruntime",
        "versions": reference.versions,
        "settings": {"graph_optimization_level": "ORT_DISABLE_ALL", "mlas.enable_gemm_fastmath_arm64_bfloat16": "0"},
    }


def test_one_session_serves_many_cases(tmp_path, onnx_models):
    path = onnx_models.nonzero(tmp_path / "nonzero.onnx")
    with opened(path, threads=1) as source:
        for n in (0, 1, 5):
            y = source.compute({"x": np.ones(n, np.float32)}).outputs["y"]
            assert (y.shape, y.dtype) == ((1, n), np.int64)


def test_scalars_keep_their_rank(tmp_path, onnx_models):
    path = onnx_models.save(
        tmp_path / "scalar.onnx",
        [("Add", ["x", "x"], ["y"], {})],
        [("x", onnx_models.F32, [])],
        [("y", onnx_models.F32, [])],
    )
    y = compute(path, {"x": np.array(2, np.float32)}).outputs["y"]
    assert (y.shape, y.item()) == ((), 4.0)


def test_arrays_that_are_not_contiguous(tmp_path, onnx_models):
    path = onnx_models.add(tmp_path / "add.onnx")
    reference = compute(path, {"a": np.asfortranarray(A), "b": B[:, ::-1]})
    np.testing.assert_array_equal(reference.outputs["sum"], A + B)


def test_float16_model(tmp_path, onnx_models, onnx):
    f16 = onnx.TensorProto.FLOAT16
    nodes = [("MatMul", ["x", "x"], ["p"], {}), ("Relu", ["p"], ["y"], {})]
    path = onnx_models.save(tmp_path / "m.onnx", nodes, [("x", f16, [2, 2])], [("y", f16, [2, 2])])
    reference = compute(path, {"x": np.eye(2, dtype=np.float16)})
    assert (reference.kind, reference.outputs["y"].dtype) == ("onnxruntime", np.float16)
    np.testing.assert_array_equal(reference.outputs["y"], np.eye(2))


def test_nothing_is_optimised(tmp_path, onnx_models, monkeypatch):
    import onnxruntime

    seen = []
    make = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, **more: seen.append(options) or make(path, options, **more),
    )
    compute(onnx_models.add(tmp_path / "add.onnx"), {"a": A, "b": B}, threads=1)
    (options,) = seen
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options.get_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16") == "0"
    assert options.intra_op_num_threads == 1


@pytest.mark.parametrize("kind", [None, "onnxruntime", "onnxruntime, upcast copy"])
def test_model_that_cannot_be_loaded(tmp_path, onnx_models, kind):
    path = tmp_path / "broken.onnx"
    for content in (b"\x08\x07 not a model", None):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(
            ReferenceUnavailable, match=r"onnxruntime .* cannot load .*broken\.onnx.*--reference out\.npz"
        ):
            compute(path, {}, kind=kind)


def test_input_that_the_plan_has_not(tmp_path, onnx_models):
    path = onnx_models.add(tmp_path / "add.onnx")
    with pytest.raises(ReferenceUnavailable, match=r"cannot run .*add\.onnx: the plan has no input 'b'"):
        compute(path, {"a": A})


def test_run_that_fails(tmp_path, onnx_models):
    path = onnx_models.save(
        tmp_path / "gather.onnx",
        [("Gather", ["x", "i"], ["y"], {})],
        [("x", onnx_models.F32, ["N"]), ("i", onnx_models.I64, [1])],
        [("y", onnx_models.F32, [1])],
    )
    with pytest.raises(ReferenceUnavailable, match=r"cannot run .*gather\.onnx: .*out of.*bounds"):
        compute(path, {"x": np.zeros(1, np.float32), "i": np.array([5])})


def test_output_that_is_no_tensor(tmp_path, onnx_models, onnx):
    sequence = onnx.helper.make_tensor_sequence_value_info("s", onnx_models.F32, None)
    x = onnx.helper.make_tensor_value_info("x", onnx_models.F32, [4])
    node = onnx.helper.make_node("SplitToSequence", ["x"], ["s"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [x], [sequence]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ReferenceUnavailable, match=r"'s' is a seq\(tensor\(float\)\), which jetrt cannot hand"):
        compute(tmp_path / "m.onnx", {"x": np.zeros(4, np.float32)})


@pytest.mark.parametrize("package", ["onnxruntime", "torch"])
def test_missing_package(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    options = {"torch_model": print} if package == "torch" else {}
    with pytest.raises(ReferenceUnavailable, match=f"the package {package} is missing.*--reference out.npz") as caught:
        compute(tmp_path / "m.onnx", {}, **options)
    assert isinstance(caught.value, errors.JetrtError)


# -------------------------------------------------------------------------------------------------------- upcast copies


def bfloat16_network(onnx, path, *, raw=True, external=(), width=64):
    """y = relu(x w + b) as bfloat16, in a branch of an If, with a constant and casts; z = x w in float32."""
    h, types = onnx.helper, onnx.TensorProto
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((width, width)).astype(np.float32) / 8
    other = generator.standard_normal(width).astype(np.float32)

    def tensor(name, values):
        bits = to_bfloat16(values).view(np.uint16)
        result = types(name=name, dims=values.shape, data_type=types.BFLOAT16)
        if raw:
            result.raw_data = bits.tobytes()
        else:
            result.int32_data.extend(bits.reshape(-1).astype(np.int32).tolist())
        return result

    branch = {}
    for name in ("then", "else"):
        out = h.make_tensor_value_info(f"{name}_out", types.BFLOAT16, None)
        operator = "Relu" if name == "then" else "Neg"
        branch[name] = h.make_graph([h.make_node(operator, ["sum"], [f"{name}_out"])], name, [], [out])
    nodes = [
        h.make_node("MatMul", ["x", "w"], ["product"]),
        h.make_node("Constant", [], ["two"], value=tensor("two_value", np.array([2.0], np.float32))),
        h.make_node("Mul", ["product", "two"], ["doubled"]),
        h.make_node("Cast", ["b"], ["b16"], to=types.BFLOAT16),
        h.make_node("Add", ["doubled", "b16"], ["sum"]),
        h.make_node("If", ["c"], ["y"], then_branch=branch["then"], else_branch=branch["else"]),
        h.make_node("Cast", ["product"], ["z"], to=types.FLOAT),
    ]
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info("x", types.BFLOAT16, ["N", width]), h.make_tensor_value_info("c", types.BOOL, [])],
        [h.make_tensor_value_info("y", types.BFLOAT16, None), h.make_tensor_value_info("z", types.FLOAT, None)],
        [tensor("w", weights), onnx.numpy_helper.from_array(other, "b")],
        value_info=[h.make_tensor_value_info("product", types.BFLOAT16, None)],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    for initializer in model.graph.initializer:
        if initializer.name in external:
            onnx.external_data_helper.set_external_data(initializer, location="weights.bin")
    onnx.save(model, path)
    return path, widened(to_bfloat16(weights)), other


@pytest.mark.parametrize(("raw", "external"), [(True, ()), (False, ()), (True, ("w",)), (True, ("b", "w"))])
@pytest.mark.parametrize("width", [4, 64])
def test_bfloat16_model_runs_as_an_upcast_copy(tmp_path, onnx, monkeypatch, raw, external, width):
    monkeypatch.setattr("jetrt.builder.upcast._CHUNK", 100)  # so that there are several pieces
    folder = tmp_path / "model"
    folder.mkdir()
    path, weights, other = bfloat16_network(onnx, folder / "bf16.onnx", raw=raw, external=external, width=width)
    assert (folder / "weights.bin").exists() == bool(external)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    work = tmp_path / "work"
    work.mkdir()

    x = to_bfloat16(np.random.default_rng(1).standard_normal((3, width)).astype(np.float32))
    with opened(path, folder=work) as source:
        assert source.kind == "onnxruntime, upcast copy"
        assert list(source.versions) == ["onnxruntime", "onnx"]
        outputs = source.compute({"x": x, "c": np.array(True)}).outputs
        negative = source.compute({"x": x.view("V2"), "c": np.array(False)}).outputs
    assert list(work.iterdir()) == []
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    product = widened(x) @ weights
    assert (dtype_name(outputs["y"]), dtype_name(outputs["z"])) == ("bfloat16", "float32")
    np.testing.assert_allclose(outputs["z"], product, rtol=1e-5, atol=1e-5)
    want = np.maximum(2 * product + other, 0)
    np.testing.assert_allclose(widened(outputs["y"]), want, rtol=2**-8, atol=1e-5)  # rounded once, at the end
    assert not np.array_equal(widened(outputs["y"]), want)
    np.testing.assert_allclose(widened(negative["y"]), -(2 * product + other), rtol=2**-8, atol=1e-5)


def test_a_model_that_only_moves_bfloat16_runs_as_it_is(tmp_path, onnx_models):
    path = onnx_models.bfloat16(tmp_path / "cast.onnx")
    x = to_bfloat16(np.array([1.0, 2.5], np.float32))
    for kind in ("onnxruntime", "onnxruntime, upcast copy"):
        reference = compute(path, {"x": x}, kind=kind)
        assert reference.kind == kind
        assert widened(reference.outputs["z"]).tolist() == [1.0, 2.5]
        assert dtype_name(reference.outputs["z"]) == "bfloat16"


def test_inputs_and_outputs_of_a_copy_are_rounded(tmp_path, onnx_models):
    path = onnx_models.bfloat16(tmp_path / "cast.onnx")
    fine = np.array([1.0 + 2**-12], np.float32)
    reference = compute(path, {"x": fine}, kind="onnxruntime, upcast copy")
    assert reference.outputs["y"].tolist() == [1.0]
    path = onnx_models.save(
        tmp_path / "out.onnx",
        [("Cast", ["x"], ["y"], {"to": onnx_models.BF16})],
        [("x", onnx_models.F32, ["N"])],
        [("y", onnx_models.BF16, ["N"])],
    )
    reference = compute(path, {"x": fine}, kind="onnxruntime, upcast copy")
    assert widened(reference.outputs["y"]).tolist() == [1.0]


def test_uses_bfloat16(tmp_path, onnx, onnx_models):
    path, _, _ = bfloat16_network(onnx, tmp_path / "m.onnx")
    assert uses_bfloat16(path)
    assert not uses_bfloat16(onnx_models.add(tmp_path / "add.onnx"))
    assert not uses_bfloat16(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("text")
    assert not uses_bfloat16(tmp_path / "text.onnx")


def test_an_upcast_copy_needs_onnx(tmp_path, onnx, monkeypatch):
    path, _, _ = bfloat16_network(onnx, tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ReferenceUnavailable, match=r"the package onnx is missing.*pip install 'jetrt\[build\]'"):
        compute(path, {}, kind="onnxruntime, upcast copy")
    with pytest.raises(ReferenceUnavailable, match=r"NOT_IMPLEMENTED|is invalid"):
        compute(path, {})


def test_functions_are_upcast_too(tmp_path, onnx):
    h, types = onnx.helper, onnx.TensorProto
    function = h.make_function(
        "local",
        "Widen",
        ["x"],
        ["y"],
        [h.make_node("Cast", ["x"], ["n"], to=types.BFLOAT16), h.make_node("Add", ["n", "n"], ["y"])],
        [h.make_opsetid("", 17)],
    )
    graph = h.make_graph(
        [h.make_node("Widen", ["x"], ["y"], domain="local")],
        "g",
        [h.make_tensor_value_info("x", types.FLOAT, [2])],
        [h.make_tensor_value_info("y", types.BFLOAT16, [2])],
    )
    imports = [h.make_opsetid("", 17), h.make_opsetid("local", 1)]
    onnx.save(h.make_model(graph, functions=[function], opset_imports=imports, ir_version=8), tmp_path / "f.onnx")
    reference = compute(tmp_path / "f.onnx", {"x": np.array([1, 2], np.float32)})
    assert (reference.kind, widened(reference.outputs["y"]).tolist()) == ("onnxruntime, upcast copy", [2, 4])


class TestHostileData:
    @pytest.fixture
    def path(self, tmp_path, onnx):
        path, _, _ = bfloat16_network(onnx, tmp_path / "m.onnx", external=("w",))
        return path

    def edit(self, onnx, path, **entries):
        model = onnx.load(str(path), load_external_data=False)
        tensor = model.graph.initializer[0]
        kept = {entry.key: entry.value for entry in tensor.external_data}
        del tensor.external_data[:]
        for key, value in {**kept, **entries}.items():
            tensor.external_data.add(key=key, value=str(value))
        path.write_bytes(model.SerializeToString())

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"location": "../secret"}, "names data outside of the model's folder"),
            ({"location": "/etc/passwd"}, "names data outside of the model's folder"),
            ({"location": "absent.bin"}, "No such file"),
            ({"offset": 8000}, "ends 8000 bytes early"),
            ({"length": 10}, "'w' has 10 bytes of bfloat16 data for 4096 elements"),
            ({"length": "many"}, "invalid literal"),
            ({"offset": -5}, ""),
        ],
    )
    def test_external_data(self, path, onnx, entries, message):
        self.edit(onnx, path, **entries)
        with pytest.raises(ReferenceUnavailable, match=f"cannot load a copy of .*m.onnx.*: .*{message}"):
            compute(path, {}, kind="onnxruntime, upcast copy")

    def test_odd_number_of_bytes(self, tmp_path, onnx):
        path, _, _ = bfloat16_network(onnx, tmp_path / "m.onnx")
        model = onnx.load(str(path))
        model.graph.initializer[0].raw_data = b"abc"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ReferenceUnavailable, match="cannot load a copy"):
            compute(path, {}, kind="onnxruntime, upcast copy")

    def test_full_disk(self, path, tmp_path):
        missing = tmp_path / "nowhere"
        with pytest.raises(ReferenceUnavailable, match=r"cannot load a copy of .*nowhere"):
            compute(path, {}, kind="onnxruntime, upcast copy", folder=missing)

    def test_bits_cannot_be_widened(self, tmp_path, onnx):
        node = onnx.helper.make_node("BitCast", ["x"], ["y"], name="bits", to=onnx.TensorProto.BFLOAT16)
        x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT16, [1])
        y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.BFLOAT16, [1])
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), tmp_path / "m.onnx")
        with pytest.raises(ReferenceUnavailable, match="node 'bits' is a BitCast"):
            compute(tmp_path / "m.onnx", {}, kind="onnxruntime, upcast copy")


# --------------------------------------------------------------------------------------------------------------- torch


class FakeTensor:
    """As much of a torch tensor as the reference uses."""

    def __init__(self, array, dtype="float32"):
        self.array, self.dtype = array, dtype

    def view(self, dtype):
        return FakeTensor(self.array, dtype)

    def float(self):
        return FakeTensor(widened(self.array.view("V2")), "float32")

    def numpy(self):
        return self.array

    def detach(self):
        return self

    cpu = contiguous = detach


@pytest.fixture
def torch(monkeypatch):
    """PyTorch, or a stand-in for what is used of it."""
    try:
        import torch
    except ImportError:
        import contextlib
        import types

        def load(path, map_location):
            raise RuntimeError(f"no archive: {path}")

        torch = types.SimpleNamespace(
            __version__="0",
            Tensor=FakeTensor,
            bfloat16="bfloat16",
            float32="float32",
            no_grad=contextlib.nullcontext,
            from_numpy=FakeTensor,
            jit=types.SimpleNamespace(load=load),
        )
        monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def test_torch_callable(torch):
    seen = []

    def model(a, b):
        seen.extend(tensor.dtype for tensor in (a, b))
        return (b, a)

    inputs = {"a.1": A, "b": to_bfloat16(A)}
    reference = compute("m.onnx", inputs, torch_model=model, outputs={"y": (-1, 3), "z": (2, 3)})
    assert seen == [torch.float32, torch.bfloat16]
    assert (reference.kind, list(reference.versions)) == ("torch", ["torch"])
    np.testing.assert_array_equal(reference.outputs["z"], A)
    np.testing.assert_array_equal(widened(reference.outputs["y"]), A)
    assert dtype_name(reference.outputs["y"]) == "bfloat16"

    for answer in (lambda a: a, lambda a: {"y": a}):
        assert list(compute("m.onnx", {"a": A}, torch_model=answer, outputs={"y": (2, 3)}).outputs) == ["y"]


def test_torch_that_fails(torch, tmp_path):
    def model(a):
        raise ZeroDivisionError("oh")

    with pytest.raises(ReferenceUnavailable, match="the torch reference failed: ZeroDivisionError: oh"):
        compute("m.onnx", {"a": A}, torch_model=model)
    with pytest.raises(ReferenceUnavailable, match="it answered with 1 tensors and the model has 2"):
        compute("m.onnx", {"a": A}, torch_model=lambda a: a, outputs={"y": (), "z": ()})
    (tmp_path / "m.pt").write_bytes(b"nothing")
    with pytest.raises(ReferenceUnavailable, match=r"m\.pt cannot be loaded as TorchScript"):
        compute("m.onnx", {"a": A}, torch_model=tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(tmp_path):
    torch = pytest.importorskip("torch")

    class Twice(torch.nn.Module):
        def forward(self, a):
            return a * 2

    torch.jit.trace(Twice(), torch.zeros(2, 3)).save(str(tmp_path / "m.pt"))
    reference = compute("m.onnx", {"a": A}, torch_model=str(tmp_path / "m.pt"), outputs={"y": (2, 3)})
    np.testing.assert_array_equal(reference.outputs["y"], 2 * A)


# ---------------------------------------------------------------------------------------------------------- .npz files


def test_npz(tmp_path):
    path = tmp_path / "out.npz"
    np.savez(path, **{"y": A, "y@min": A[:1], "y@1.min": -A[:1], "z": np.arange(3)})
    with opened("m.onnx", npz=path, outputs={"y": (-1, 3), "z": (3,)}) as source:
        assert source.kind == "npz"
        assert source.settings == {"file": str(path)}
        for profile, point, want in ((0, "opt", A), (0, "min", A[:1]), (1, "min", -A[:1]), (1, "max", A)):
            outputs = source.compute({}, profile=profile, point=point).outputs
            np.testing.assert_array_equal(outputs["y"], want)
            assert outputs["z"].tolist() == [0, 1, 2]


def test_npz_with_nothing_for_a_point(tmp_path):
    np.savez(tmp_path / "out.npz", **{"y@opt": A})
    with opened("m.onnx", npz=tmp_path / "out.npz", outputs={"y": (-1, 3)}) as source:
        source.compute({}, point="opt")
        with pytest.raises(
            errors.BuildOptionError,
            match=r"nothing for 'y' at max of profile 0; found: y@opt; needed: 'y@0\.max' or 'y@max' or 'y'",
        ):
            source.compute({}, point="max")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": A, "q": A}, "the names differ from the outputs; found: y, q; needed: y, z"),
        ({"y": A}, "the names differ from the outputs; found: y; needed: y, z"),
        ({"y": A.T, "z": A}, r"'y' has another shape; found: \[3, 2\]; needed: \[any, 3\]"),
        ({"y": A, "z": A, "z@min": A[0]}, r"'z@min' has another shape; found: \[3\]; needed: \[2, 3\]"),
    ],
)
def test_npz_that_does_not_fit(tmp_path, arrays, message):
    np.savez(tmp_path / "out.npz", **arrays)
    with pytest.raises(errors.BuildOptionError, match=rf"--reference .*out\.npz: {message}") as caught:
        compute("m.onnx", {}, npz=tmp_path / "out.npz", outputs={"y": (-1, 3), "z": (2, 3)})
    assert caught.value.option == "--reference"


class Unpickled:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("content", ["pickle", "npy", "text", "cut", "empty"])
def test_files_that_are_no_npz(tmp_path, content):
    path = tmp_path / "out.npz"
    if content == "pickle":
        np.savez(path, y=np.array([Unpickled()], dtype=object))
    elif content == "npy":
        with path.open("wb") as file:
            np.save(file, A)
    elif content == "cut":
        np.savez(path, y=A)
        path.write_bytes(path.read_bytes()[:-30])
    else:
        path.write_bytes(b"text, no archive" if content == "text" else b"")
    with pytest.raises(errors.BuildOptionError, match=r"--inputs .*out\.npz is not an \.npz file of plain arrays"):
        load_npz(path, "--inputs")


def test_missing_npz(tmp_path):
    with pytest.raises(errors.BuildOptionError, match=r"--reference .*none\.npz: there is no such file"):
        compute("m.onnx", {}, npz=tmp_path / "none.npz")


def test_bfloat16_in_npz(tmp_path):
    np.savez(tmp_path / "out.npz", y=to_bfloat16(A))
    y = compute("m.onnx", {}, npz=tmp_path / "out.npz").outputs["y"]
    assert dtype_name(y) == "bfloat16"
    np.testing.assert_array_equal(widened(y), A)


# ----------------------------------------------------------------------------------------------------------- the choice


def test_tensorrt_fp32():
    reference = compute("m.onnx", {"x": A}, run=lambda inputs: {"y": inputs["x"] * 2}, versions={"tensorrt": "10.6"})
    assert (reference.kind, reference.versions, reference.settings) == (
        "tensorrt fp32",
        {"tensorrt": "10.6"},
        {"tf32": "off"},
    )
    np.testing.assert_array_equal(reference.outputs["y"], 2 * A)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tflite"}, r"there is no such kind; found: tflite; allowed: onnxruntime \| onnxruntime, upcast copy"),
        ({"npz": "a.npz", "torch_model": print}, "there can be one reference only; found: npz and torch"),
        ({"npz": "a.npz", "kind": "onnxruntime"}, "there can be one reference only; found: npz and onnxruntime"),
        ({"kind": "npz"}, "nothing was given that computes it; found: npz"),
    ],
)
def test_kinds_that_make_no_sense(options, message):
    with pytest.raises(errors.BuildOptionError, match=f"--reference: {message}"):
        compute("m.onnx", {}, **options)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("onnxruntime", {"kind": "onnxruntime"}),
        ("onnxruntime-upcast", {"kind": "onnxruntime, upcast copy"}),
        ("tensorrt-fp32", {"kind": "tensorrt fp32"}),
        ("dir/out.npz", {"npz": "dir/out.npz"}),
        ("model.pt", {"torch_model": "model.pt"}),
    ],
)
def test_text_of_the_command_line(text, options):
    assert from_text(text) == options


def test_text_that_is_no_reference():
    with pytest.raises(
        errors.BuildOptionError,
        match=r"--reference: there is no such reference; found: out\.npy; allowed: onnx",
    ):
        from_text("out.npy")
