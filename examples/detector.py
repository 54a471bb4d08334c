"""Writes a small detector with random weights twice, with and without non-maximum suppression inside, to be measured.

    python examples/detector.py detectors
    jetrt bench detectors/plain.onnx detectors/with_nms.onnx --runtime tensorrt onnx_cpu --imgsz 480 --no-total

What suppression costs inside a network, and whether a runtime takes it at all, is a question that each model of one's
own answers the same way. Needs onnx.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES, CHANNELS = 8, (16, 32, 64, 128)


def detector(nms: bool) -> Any:
    """images [N, 3, H, W] -> boxes [N, A, 4] (x1, y1, x2, y2 in pixels of stride 16) and scores [N, classes, A]; with
    suppression also selected [K, 3]: image, class, box."""
    generator = np.random.default_rng(0)
    weights: list[Any] = []
    nodes: list[Any] = []

    def constant(name: str, value: Any) -> str:
        weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def conv(x: str, name: str, into: int, out: int, size: int, stride: int) -> str:
        scale = (2 / (into * size * size)) ** 0.5
        w = constant(f"{name}.w", (generator.standard_normal((out, into, size, size)) * scale).astype(np.float32))
        b = constant(f"{name}.b", np.zeros(out, np.float32))
        pad = size // 2
        return node("Conv", [x, w, b], name, kernel_shape=[size] * 2, strides=[stride] * 2, pads=[pad] * 4)

    x, into = "images", 3
    for index, out in enumerate(CHANNELS):
        x = node("Relu", [conv(x, f"down{index}", into, out, 3, 2)], f"down{index}.relu")
        x = node("Relu", [conv(x, f"mix{index}", out, out, 3, 1)], f"mix{index}.relu")
        into = out

    flat = constant("flat", np.array([0, 0, -1], np.int64))
    head = node("Reshape", [conv(x, "box", into, 4, 1, 1), flat], "box.flat")  # [N, 4, A]
    corners = node("Transpose", [node("Sigmoid", [head], "box.size")], "box.last", perm=[0, 2, 1])
    first, second = node("Split", [corners, constant("halves", np.array([2, 2], np.int64))], "first", axis=2), "second"
    nodes[-1].output.append(second)
    end = node("Add", [first, second], "end")  # behind the first corner
    scale = constant("scale", np.float32(64))
    node("Mul", [node("Concat", [first, end], "corners", axis=2), scale], "boxes")
    node("Sigmoid", [node("Reshape", [conv(x, "class", into, CLASSES, 1, 1), flat], "class.flat")], "scores")
    outputs: list[tuple[str, Any, list[Any]]] = [
        ("boxes", TensorProto.FLOAT, ["N", "A", 4]),
        ("scores", TensorProto.FLOAT, ["N", CLASSES, "A"]),
    ]
    if nms:
        most, overlap = constant("most", np.int64(100)), constant("overlap", np.float32(0.5))
        limits = [most, overlap, constant("least", np.float32(0.6))]
        node("NonMaxSuppression", ["boxes", "scores", *limits], "selected")
        outputs.append(("selected", TensorProto.INT64, ["K", 3]))
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info(*output) for output in outputs],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, nms in (("plain", False), ("with_nms", True)):
        onnx.save(detector(nms), folder / f"{name}.onnx")
        print(folder / f"{name}.onnx")


if __name__ == "__main__":
    main()
