"""`jetrt run`: a model on .npy files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..report import dims, io_table, latency_table, table
from ..runtime import RUNTIMES, load
from . import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..runtime import Model, TensorDescription

    Arrays = dict[str, npt.NDArray[Any]]

__all__ = ["add_run"]


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=_run)
    parser.add_argument("model", metavar="MODEL", help="a TensorRT plan, an ONNX file or a torch program")
    parser.add_argument("--runtime", metavar="NAME", help=f"{', '.join(RUNTIMES)} (what a plan gets: tensorrt)")
    parser.add_argument(
        "--input", dest="inputs", action="append", default=[], type=_assignment, metavar="NAME=FILE.npy"
    )
    parser.add_argument(
        "--random-inputs",
        type=int,
        metavar="SEED",
        help="fill the inputs that no file is given for with random values; for measuring time alone",
    )
    parser.add_argument(
        "--shape",
        dest="shapes",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=1x3x224x224",
        help="shape of a random input with dynamic dimensions (its profile's optimum if left out)",
    )
    parser.add_argument(
        "--output", dest="outputs", action="append", default=[], type=_assignment, metavar="NAME=FILE.npy"
    )
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="write every output as DIR/NAME.npy")
    parser.add_argument("--repeat", type=_count(1), default=1, metavar="N", help="measured calls (1)")
    parser.add_argument("--warmup", type=_count(0), default=0, metavar="N", help="calls before the measured ones (0)")


def _assignment(text: str) -> tuple[str, str]:
    # Tensor names may hold "=", file names rarely do.
    name, separator, value = text.rpartition("=")
    if not (separator and name and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _count(least: int) -> Any:
    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return count


def _run(arguments: argparse.Namespace) -> None:
    """Run a model and print its inputs and outputs, the latency of a call, and what came out."""
    with load(arguments.model, arguments.runtime) as model:
        print(io_table(model), end="\n\n")
        destinations = _destinations(arguments, model) if model.outputs else None
        inputs = _inputs(arguments, model)

        for _ in range(arguments.warmup):
            model.run(inputs, synchronize=True)
        seconds = []
        outputs: dict[str, Any] = {}
        for _ in range(arguments.repeat):
            start = time.perf_counter()
            outputs = model.run(inputs, synchronize=True)
            seconds.append(time.perf_counter() - start)
        print(latency_table(seconds), end="\n\n")
        if destinations is None:  # what a torch program gives is known once it was called
            destinations = _destinations(arguments, model)

        rows = []
        for name, value in outputs.items():
            array = np.asarray(value)
            rows.append([name, array.dtype.name, dims(array.shape), *_range(array), str(destinations.get(name, ""))])
            if name in destinations:
                np.save(destinations[name], array)
        print(table(["output", "dtype", "shape", "min", "max", "written to"], rows))


def _destinations(arguments: argparse.Namespace, model: Model) -> dict[str, Path]:
    destinations = {}
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        for name in model.outputs:
            destinations[name] = arguments.output_dir / f"{name.replace('/', '_')}.npy"
    for name, file in arguments.outputs:
        if name not in model.outputs:
            raise UsageError(f"--output {name}={file}: the outputs are {', '.join(model.outputs)}")
        destinations[name] = Path(file)
    taken: dict[Path, str] = {}
    for name, path in destinations.items():
        if path in taken:
            raise UsageError(f"the outputs {taken[path]!r} and {name!r} would both go to {path}; use --output")
        taken[path] = name
    return destinations


def _inputs(arguments: argparse.Namespace, model: Model) -> Arrays:
    inputs: Arrays = {}
    for name, file in arguments.inputs:
        if name in inputs:
            raise UsageError(f"--input {name} is given twice")
        inputs[name] = _read(Path(file), model.inputs.get(name))
    missing = [name for name in model.inputs if name not in inputs]
    if arguments.random_inputs is None:
        if missing:
            raise UsageError(
                f"no file for input {', '.join(missing)}: give --input NAME=FILE.npy, "
                "or ask for made-up values with --random-inputs SEED"
            )
        return inputs
    if not model.inputs:
        raise UsageError(
            f"{arguments.model} does not say what its inputs are: give each of them with --input NAME=FILE.npy"
        )
    shapes = dict(arguments.shapes)
    generator = np.random.default_rng(arguments.random_inputs)
    for name in missing:
        inputs[name] = _random(generator, model.inputs[name], shapes.pop(name, None))
    if shapes:
        raise UsageError(f"--shape {next(iter(shapes))}: the random inputs are {', '.join(missing) or 'none'}")
    return inputs


def _read(path: Path, info: TensorDescription | None) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path} is not an .npy file of numbers: {error}", tensor=info and info.name) from error
    if isinstance(array, np.lib.npyio.NpzFile):
        raise InputError(f"{path} is an .npz archive; give one .npy file for each input.", tensor=info and info.name)
    if info is not None and info.dtype == "bfloat16" and array.dtype == np.dtype("V2"):
        array = array.view(_bfloat16())  # .npy files keep the bits of this type and lose its name
    return array


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        raise InputError("bfloat16 values need the package ml_dtypes: pip install ml_dtypes") from error
    return ml_dtypes.bfloat16


def _random(generator: np.random.Generator, info: TensorDescription, shape_text: str | None) -> npt.NDArray[Any]:
    if shape_text is not None:
        try:
            shape = tuple(int(part) for part in shape_text.split("x") if part)
        except ValueError:
            raise UsageError(f"--shape {info.name}={shape_text}: write it as 1x3x224x224") from None
    elif -1 not in info.shape:
        shape = info.shape
    elif info.profiles:
        shape = info.profiles[0][1]
    else:
        raise UsageError(f"input {info.name} has dynamic dimensions {dims(info.shape)}: give --shape {info.name}=…")
    if info.dtype == "bool":
        return generator.integers(0, 2, shape).astype(np.bool_)
    if "int" in info.dtype:
        # 0 and 1 are valid as indices, masks and token ids alike.
        return generator.integers(0, 2, shape).astype(info.dtype)
    values = generator.standard_normal(shape)
    try:
        return values.astype(_bfloat16() if info.dtype == "bfloat16" else info.dtype)
    except TypeError:
        raise UsageError(f"input {info.name} is {info.dtype}: there are no random values of that type") from None


def _range(array: npt.NDArray[Any]) -> tuple[str, str]:
    if array.size == 0:
        return "", ""
    if array.dtype.kind in "fV":  # V: bfloat16
        values = array.astype(np.float64)
        return f"{values.min():.6g}", f"{values.max():.6g}"
    return str(array.min()), str(array.max())
