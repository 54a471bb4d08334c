"""The reader of ONNX files, against the onnx package, and with damaged, incomplete and hostile files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jetrt.builder.onnx_file import _TYPES, OnnxFile
from jetrt.builder.profiles import NetworkInput
from jetrt.errors import ModelError

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed (it does not take numpy 1.21)")
TensorProto, helper, numpy_helper = onnx.TensorProto, onnx.helper, onnx.numpy_helper
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def tensor(name, shape, dtype=FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def model(nodes, inputs, outputs, weights=(), **graph):
    graph_ = helper.make_graph(nodes, "g", inputs, outputs, list(weights), **graph)
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph_, producer_name="tester", producer_version="1.2", ir_version=9, opset_imports=opsets)


def weight(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def linear():
    w = weight("w", np.ones((4, 2), np.float16))
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], "cast", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "w"], ["y"], "mul"),
    ]
    # Up to IR version 3 a weight was an input too.
    inputs = [tensor("x", ["batch", 4]), tensor("w", [4, 2], TensorProto.FLOAT16)]
    return model(nodes, inputs, [tensor("y", ["batch", 2], TensorProto.FLOAT16)], [w])


def written(path, proto):
    path.write_bytes(proto.SerializeToString() if not isinstance(proto, bytes) else proto)
    return path


def refused(path, *texts):
    with pytest.raises(ModelError) as caught:
        OnnxFile.open(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith(".")
    for text in texts:
        assert text in message
    assert caught.value.path == str(path)
    return message


def test_structure(tmp_path):
    found = OnnxFile.open(written(tmp_path / "m.onnx", linear()))
    assert found.bytes == (tmp_path / "m.onnx").stat().st_size
    assert (found.ir_version, found.producer, found.opset) == (9, "tester 1.2", 19)
    assert found.opsets == {"": 19, "ai.onnx.ml": 3}
    assert [(t.name, t.dtype, t.shape, t.dimension_names) for t in found.inputs] == [
        ("x", "float32", (-1, 4), ("batch", None))
    ]
    assert [(t.name, t.dtype, t.shape) for t in found.outputs] == [("y", "float16", (-1, 2))]
    assert [(n.name, n.op, n.domain, n.inputs, n.outputs) for n in found.nodes] == [
        ("cast", "Cast", "", ("x",), ("h",)),
        ("mul", "MatMul", "", ("h", "w"), ("y",)),
    ]
    (w,) = found.initializers
    assert (w.name, w.dtype, w.shape, w.bytes, w.location) == ("w", "float16", (4, 2), 16, None)
    assert found.dtypes == {"float32", "float16"}
    assert found.operators == {"Cast": 1, "MatMul": 1}
    assert found.quantization == frozenset()
    assert found.external == ()
    assert found.network_inputs() == [NetworkInput("x", "float32", (-1, 4), dimension_names=("batch", None))]


def test_sparse_weights_and_packed_numbers(tmp_path):
    proto = linear()
    values = weight("sparse", np.ones(3, np.float32))
    indices = weight("", np.arange(3))
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 4]))
    content = proto.SerializeToString()
    found = OnnxFile.open(written(tmp_path / "m.onnx", content))
    assert [(w.name, w.shape) for w in found.initializers] == [("w", (4, 2)), ("sparse", (3,))]
    # protobuf allows repeated numbers in either form
    packed = content.replace(b"\x08\x04\x08\x02\x10\x0a", b"\x0a\x02\x04\x02\x10\x0a")
    assert packed != content
    assert OnnxFile.open(written(tmp_path / "p.onnx", packed)).initializers == found.initializers


def test_operators_of_subgraphs_and_functions(tmp_path):
    def branch(op):
        inner = helper.make_graph([helper.make_node(op, ["x"], ["b"])], op, [], [tensor("b", [2])])
        return helper.make_graph(
            [helper.make_node("If", ["c"], ["b"], then_branch=inner, else_branch=inner)], op, [], [tensor("b", [2])]
        )

    nodes = [
        helper.make_node("If", ["c"], ["m"], then_branch=branch("Relu"), else_branch=branch("Sigmoid")),
        helper.make_node("Scale", ["m"], ["y"], domain="mine"),
    ]
    proto = model(nodes, [tensor("x", [2]), tensor("c", [], BOOL)], [tensor("y", [2])])
    body = [helper.make_node("Mul", ["a", "a"], ["b"])]
    proto.functions.append(helper.make_function("mine", "Scale", ["a"], ["b"], body, [helper.make_opsetid("", 19)]))
    found = OnnxFile.open(written(tmp_path / "m.onnx", proto))
    assert found.operators == {"If": 3, "Relu": 2, "Sigmoid": 2, "mine.Scale": 1, "Mul": 1}
    assert [node.op for node in found.nodes] == ["If", "Scale"]


@pytest.mark.parametrize("number", sorted(set(_TYPES) - {TensorProto.STRING}))
def test_bytes_of_every_element_type(tmp_path, number):
    proto = linear()
    proto.graph.initializer.append(weight("t", np.zeros(5, helper.tensor_dtype_to_np_dtype(number))))
    added = OnnxFile.open(written(tmp_path / "m.onnx", proto)).initializers[1]
    assert added.bytes == len(proto.graph.initializer[1].raw_data)
    assert added.dtype == helper.tensor_dtype_to_np_dtype(number).name.replace("e2m1fn", "e2m1").replace(
        "e8m0fnu", "e8m0"
    )


def test_every_kind_of_number_is_stepped_over(tmp_path):
    """Floats of attributes are fixed32; fixed64 is in no field of ONNX yet."""
    proto = linear()
    proto.graph.node.append(helper.make_node("Elu", ["h"], ["e"], alpha=1.5))
    content = proto.SerializeToString() + bytes([99 << 3 & 0x7F | 0x81, 99 >> 4]) + bytes(range(8))
    assert [node.op for node in OnnxFile.open(written(tmp_path / "m.onnx", content)).nodes] == ["Cast", "MatMul", "Elu"]


def test_every_kind_of_shape(tmp_path):
    sequence = helper.make_tensor_sequence_value_info("q", FLOAT, [1])
    proto = model(
        [helper.make_node("Identity", ["s"], ["y"])],
        [tensor("s", []), tensor("d", [None, "n", 0, -1]), tensor("r", None), sequence],
        [tensor("y", [])],
    )
    found = OnnxFile.open(written(tmp_path / "m.onnx", proto))
    assert [(t.name, t.dtype, t.shape, t.dimension_names) for t in found.inputs] == [
        ("s", "float32", (), ()),
        ("d", "float32", (-1, -1, 0, -1), (None, "n", None, None)),
        ("r", "float32", None, ()),
        ("q", "sequence", None, ()),
    ]
    with pytest.raises(ModelError, match="input 'r' has no shape; export the model with one"):
        found.network_inputs()
    with pytest.raises(ModelError, match="input 'q' is of type sequence; TensorRT takes tensors alone"):
        replace(found, inputs=found.inputs[3:]).network_inputs()


@pytest.mark.parametrize(
    ("zero_point", "attributes", "expected"),
    [
        (TensorProto.INT8, {}, {"int8"}),
        (TensorProto.UINT8, {}, {"int8"}),
        (TensorProto.FLOAT8E4M3FN, {}, {"fp8"}),
        (TensorProto.INT4, {}, {"int4"}),
        (TensorProto.FLOAT4E2M1, {}, {"fp4"}),
        (TensorProto.INT16, {}, {"int16"}),
        (None, {}, {"int8"}),
        (None, {"output_dtype": TensorProto.FLOAT8E4M3FN}, {"fp8"}),
    ],
)
@pytest.mark.parametrize("constant", [False, True])
def test_quantization_from_q_dq_nodes(tmp_path, zero_point, attributes, expected, constant):
    extra, nodes, names = [weight("scale", np.float32(0.1))], [], ["scale"]
    if zero_point is not None:
        zero = TensorProto(name="zero", data_type=zero_point, dims=[], raw_data=bytes(2 if zero_point == 5 else 1))
        names.append("zero")
        if constant:
            nodes.append(helper.make_node("Constant", [], ["zero"], value=zero))
        else:
            extra.append(zero)
    nodes += [
        helper.make_node("QuantizeLinear", ["x", *names], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", *names], ["y"]),
    ]
    found = OnnxFile.open(written(tmp_path / "m.onnx", model(nodes, [tensor("x", [2])], [tensor("y", [2])], extra)))
    assert found.quantization == expected


def test_quantization_of_weights_alone_and_of_tensorrts_operators(tmp_path):
    scale, bias = weight("scale", np.float32(1)), weight("bias", np.zeros(2, np.int32))
    packed = TensorProto(name="w4", data_type=TensorProto.INT4, dims=[3], raw_data=bytes(2))
    nodes = [
        helper.make_node("DequantizeLinear", ["w4", "scale"], ["w"]),
        helper.make_node("DequantizeLinear", ["bias", "scale"], ["b"]),
        helper.make_node("TRT_FP8QuantizeLinear", ["x", "scale"], ["q"], domain="trt"),
        helper.make_node("TRT_FP4DynamicQuantize", ["x", "scale"], ["q4", "s4"], domain="trt"),
    ]
    proto = model(nodes, [tensor("x", [2])], [tensor("b", [2])], [scale, bias, packed])
    found = OnnxFile.open(written(tmp_path / "m.onnx", proto))
    assert found.quantization == {"int4", "fp8", "fp4"}
    assert next(w for w in found.initializers if w.name == "w4").bytes == 2


# ---------------------------------------------------------------------------------------------------- external data


def external(tmp_path, **entries):
    proto = linear()
    (w,) = proto.graph.initializer
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "m.data", "offset": "8", "length": "16", **entries}.items():
        if value is not None:
            w.external_data.add(key=key, value=value)
    return written(tmp_path / "m.onnx", proto)


def test_external_data(tmp_path):
    path = external(tmp_path)
    (tmp_path / "m.data").write_bytes(bytes(24))
    found = OnnxFile.open(path)
    (file,) = found.external
    assert (file.location, file.path, file.bytes, file.tensors) == ("m.data", tmp_path / "m.data", 24, 1)
    assert found.initializers[0].location == "m.data"

    digest = found.sha256()
    assert [entry["file"] for entry in digest.files] == ["m.onnx", "m.data"]
    for entry in digest.files:
        content = (tmp_path / entry["file"]).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))

    before = digest.sha256
    (tmp_path / "m.data").write_bytes(bytes(23) + b"\1")
    assert OnnxFile.open(path).sha256().sha256 != before
    (tmp_path / "m.data").write_bytes(bytes(24))
    renamed = path.rename(tmp_path / "other.onnx")
    assert OnnxFile.open(renamed).sha256().sha256 == before
    assert json.dumps(digest.files)  # goes into the manifest


def test_hash_of_a_model_in_one_file_is_that_of_the_file(tmp_path):
    path = written(tmp_path / "m.onnx", linear())
    assert OnnxFile.open(path).sha256().sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_external_data_missing(tmp_path):
    message = refused(external(tmp_path), "its weights lie in 'm.data'", "No such file or directory")
    assert "Put that file beside the model, under this name" in message


def test_external_data_too_short(tmp_path):
    path = external(tmp_path)
    (tmp_path / "m.data").write_bytes(bytes(23))
    refused(path, "its weights need 24 bytes of 'm.data', which has 23", "Copy or download that file again")
    (tmp_path / "m.data").write_bytes(bytes(24))
    refused(external(tmp_path, length="15"), "the weight 'w' has 15 bytes in 'm.data'; its shape needs 16")


def test_external_data_without_length_is_as_long_as_its_shape(tmp_path):
    path = external(tmp_path, length=None, offset=None)
    (tmp_path / "m.data").write_bytes(bytes(16))
    assert OnnxFile.open(path).external[0].bytes == 16
    (tmp_path / "m.data").write_bytes(bytes(15))
    refused(path, "need 16 bytes of 'm.data', which has 15")


@pytest.mark.parametrize("location", ["/etc/passwd", "../m.data", "a/../../m.data", "", "a\0b"])
def test_external_data_outside_the_folder(tmp_path, location):
    (tmp_path / "in").mkdir()
    (tmp_path / "m.data").write_bytes(bytes(24))
    refused(external(tmp_path / "in", location=location), f"lies in {location!r}", "in the model's own folder")


def test_external_data_in_a_folder_below(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_bytes(bytes(24))
    assert OnnxFile.open(external(tmp_path, location="weights/a")).external[0].path == tmp_path / "weights" / "a"
    refused(external(tmp_path, location="weights"), "'weights', which is not a regular file")


@pytest.mark.parametrize("number", ["-1", "1.5", "x", "9" * 30, "٣"])
def test_external_data_with_a_senseless_offset(tmp_path, number):
    refused(external(tmp_path, offset=number), "the weight 'w' has the offset", "it must be a number")


def test_model_over_two_gigabytes_with_external_data(tmp_path):
    size, count = 1 << 30, 3
    proto = linear()
    for i in range(count):
        big = proto.graph.initializer.add(name=f"big{i}", data_type=FLOAT, dims=[size // 4])
        big.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "m.data"), ("offset", i * size), ("length", size)):
            big.external_data.add(key=key, value=str(value))
    path = written(tmp_path / "m.onnx", proto)
    with (tmp_path / "m.data").open("wb") as file:
        os.truncate(file.fileno(), size * count)
    found = OnnxFile.open(path)
    assert found.external[0].bytes == size * count > 2**31
    assert sum(w.bytes for w in found.initializers) == size * count + 16
    os.truncate(tmp_path / "m.data", size * count - 1)
    refused(path, f"which has {size * count - 1:,}")


def test_model_file_over_two_gigabytes(tmp_path):
    """The weight inside the file itself, which protobuf's library could not read; none of it is touched."""

    def varint(number):
        out = bytearray()
        while number > 0x7F:
            out.append(number & 0x7F | 0x80)
            number >>= 7
        return bytes([*out, number])

    def message(number, length):
        return varint(number << 3 | 2) + varint(length)

    size = 3 << 30
    head = TensorProto(name="big", data_type=FLOAT, dims=[size // 4]).SerializeToString()
    head += message(9, size)
    rest = linear().graph.SerializeToString()
    graph = message(5, len(head) + size) + head
    start = b"\x08\x09" + message(7, len(graph) + size + len(rest)) + graph
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.write(start)
        file.seek(size, os.SEEK_CUR)
        file.write(rest)
        file.write(message(8, 2) + b"\x10\x13")
    path_bytes = path.stat().st_size
    tracemalloc.start()
    found = OnnxFile.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [w.name for w in found.initializers] == ["big", "w"]
    assert found.initializers[0].bytes == size
    assert found.opset == 19
    assert peak < 1 << 20
    os.truncate(path, size)
    refused(path, "it is truncated", f"and the file has {size:,}. Copy or download it again")
    assert f"field 7 needs {path_bytes - 4:,} bytes" in refused(path)


# ---------------------------------------------------------------------------------------------------- damaged files


def test_missing_empty_and_not_a_file(tmp_path):
    refused(tmp_path / "none.onnx", "there is no such file")
    refused(written(tmp_path / "empty.onnx", b""), "the file is empty")
    refused(tmp_path, "it cannot be read: Is a directory")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "it is not a regular file")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"ftrt" + bytes(60), "(it is a TensorRT plan)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\3\4" + bytes(40), "it is not an ONNX model, or damaged"),
        (b"<!DOCTYPE html><html></html>", "it is not an ONNX model, or damaged"),
        (bytes(64), "it is not an ONNX model, or damaged"),
        (b"\x08\x09", "no IR version or no graph"),
        (b"\x3a\x00", "no IR version or no graph"),
        (b"\x08" + b"\xff" * 11, "a number has more than ten bytes"),
        (b"\x08\x09\x3b", "unknown wire type 3"),
        (b"zzzzzzzz", "it does not begin like one"),
    ],
)
def test_other_files(tmp_path, content, text):
    refused(written(tmp_path / "m.onnx", content), text)


def test_ir_version_newer_than_known(tmp_path):
    proto = linear()
    proto.ir_version = 99
    refused(written(tmp_path / "m.onnx", proto), "its IR version is 99; known are 1 to 14", "with an older onnx")


def test_no_outputs(tmp_path):
    proto = linear()
    del proto.graph.output[:]
    refused(written(tmp_path / "m.onnx", proto), "the graph has no outputs")


def test_weight_shorter_than_its_shape(tmp_path):
    proto = linear()
    proto.graph.initializer[0].raw_data = bytes(15)
    refused(written(tmp_path / "m.onnx", proto), "the weight 'w' has 15 bytes; its shape needs 16")


def test_input_of_impossible_rank(tmp_path):
    proto = linear()
    proto.graph.input[0].CopyFrom(tensor("x", [1] * 65))
    refused(written(tmp_path / "m.onnx", proto), "'x' has 65 dimensions")


def test_input_without_a_type(tmp_path):
    proto = linear()
    proto.graph.input[0].ClearField("type")
    assert OnnxFile.open(written(tmp_path / "m.onnx", proto)).inputs[0].dtype == "undefined"


@pytest.mark.parametrize("number", [1, 4, 5])
def test_a_number_where_a_message_belongs(tmp_path, number):
    """Of a node: its inputs, its operator, its attributes."""
    graph = linear().graph.SerializeToString() + b"\x0a\x02" + bytes([number << 3, 1])
    refused(
        written(tmp_path / "m.onnx", b"\x08\x09\x42\x02\x10\x13\x3a" + _varint(len(graph)) + graph),
        "it is not an ONNX model, or damaged: a number stands where",
    )


@pytest.mark.parametrize("dims", [[-1, 0], [2**62, 2**62], [1] * 65, [0] * 1_000_000])
def test_impossible_shapes(tmp_path, dims):
    proto = linear()
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(dims)
    refused(written(tmp_path / "m.onnx", proto), "the weight 'w' has the impossible shape")


def test_truncated_anywhere(tmp_path):
    """Cut at any byte it is refused; only a cut between the opsets, at the very end, leaves a whole model."""
    proto = linear()
    content = proto.SerializeToString()
    whole = content.index(helper.make_opsetid("", 19).SerializeToString()) + 4
    for length in range(1, len(content)):
        path = written(tmp_path / "m.onnx", content[:length])
        if length == whole:
            assert OnnxFile.open(path).opsets == {"": 19}
        else:
            message = refused(path)
            assert "truncated" in message or length < 3


def nested(depth):
    def message(number, content):
        return bytes([number << 3 | 2]) + _varint(len(content)) + content

    graph = b""
    for _ in range(depth):
        graph = message(1, message(5, message(6, graph)))  # node, attribute, graph
    return b"\x08\x09" + message(7, graph) + message(8, b"\x10\x13")


def _varint(number):
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def test_nesting_is_limited(tmp_path):
    refused(written(tmp_path / "m.onnx", nested(10_000)), "its subgraphs nest more than 64 deep")
    refused(written(tmp_path / "m.onnx", nested(60)), "the graph has no outputs")


def test_a_node_longer_than_its_graph(tmp_path):
    graph = b"\x0a\x20" + bytes(8)
    content = b"\x08\x09\x42\x02\x10\x13\x3a" + _varint(len(graph)) + graph + b"\x12\x40" + bytes(64)
    refused(written(tmp_path / "m.onnx", content), "field 1 is longer than the message around it")


def test_a_file_of_empty_nodes_takes_no_memory_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("jetrt.builder.wire.MAX_ENTRIES", 1000)
    body = b"\x0a\x00" * 2000  # two bytes a node in the file, hundreds in memory
    refused(
        written(tmp_path / "m.onnx", b"\x08\x09\x42\x02\x10\x13\x3a" + _varint(len(body)) + body),
        "it has more than 1,000 entries",
    )


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_ends_in_model_error(tmp_path, data):
    content = bytearray(linear().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        edit = data.draw(st.sampled_from(["set", "delete", "insert"]))
        if edit == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif edit == "delete" and len(content) > 1:
            del content[at]
        else:
            content.insert(at, data.draw(st.integers(0, 255)))
    path = written(tmp_path / "m.onnx", bytes(content))
    with contextlib.suppress(ModelError):  # any other exception fails the test
        assert len(OnnxFile.open(path).sha256().sha256) == 64


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=200))
def test_random_bytes_end_in_model_error(tmp_path, content):
    refused(written(tmp_path / "m.onnx", content))
    refused(written(tmp_path / "m.onnx", b"\x08\x09\x3a" + _varint(len(content)) + content))


# ------------------------------------------------------------------------------------------ agreement with onnx


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
DIMS = st.lists(st.one_of(st.integers(0, 5), NAMES, st.none()), max_size=4)
TYPES = st.sampled_from([FLOAT, INT64, BOOL, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.UINT8])


@st.composite
def models(draw):
    tensors = draw(st.lists(st.tuples(NAMES, TYPES, DIMS), min_size=2, max_size=6, unique_by=lambda t: t[0]))
    infos = [helper.make_tensor_value_info(*entry) for entry in tensors]
    cut = draw(st.integers(0, len(infos) - 1))
    ops = draw(st.lists(st.tuples(st.sampled_from(["Add", "Relu", "Cast"]), NAMES, NAMES), max_size=5))
    nodes = [helper.make_node(op, [a], [b], a, domain="d" if op == "Cast" else "") for op, a, b in ops]
    arrays = draw(st.dictionaries(NAMES, st.lists(st.integers(0, 3), max_size=3), max_size=3))
    weights = [weight(name, np.zeros(shape, np.float32)) for name, shape in arrays.items()]
    return model(nodes, infos[:cut], infos[cut:], weights)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(proto=models())
def test_reads_what_onnx_reads(tmp_path, proto):
    found = OnnxFile.open(written(tmp_path / "m.onnx", proto))
    graph = onnx.load(tmp_path / "m.onnx").graph
    weights = {w.name: list(w.dims) for w in graph.initializer}

    def described(info):
        dims = info.type.tensor_type.shape.dim
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        return info.name, shape, tuple(d.dim_param or None for d in dims)

    def read(entry):
        return entry.name, entry.shape, entry.dimension_names

    assert [read(t) for t in found.inputs] == [described(i) for i in graph.input if i.name not in weights]
    assert [read(t) for t in found.outputs] == [described(o) for o in graph.output]
    assert {w.name: list(w.shape) for w in found.initializers} == weights
    assert [(n.op, n.name, n.inputs, n.outputs, n.domain) for n in found.nodes] == [
        (n.op_type, n.name, tuple(n.input), tuple(n.output), n.domain) for n in graph.node
    ]
    counted = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in graph.node)
    assert found.operators == counted


def test_large_graph_in_seconds(tmp_path):
    """23,000 layers is GR00T's backbone in TensorRT."""
    nodes = [helper.make_node("Add", [f"t{i}", "t0"], [f"t{i + 1}"], f"/model/layers.{i}/Add") for i in range(23_000)]
    path = written(tmp_path / "m.onnx", model(nodes, [tensor("t0", [2])], [tensor("t23000", [2])]))
    start = time.perf_counter()
    assert len(OnnxFile.open(path).nodes) == 23_000
    assert time.perf_counter() - start < 10
