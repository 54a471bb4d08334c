"""The stand-ins for CUDA's driver and TensorRT's runtime (`fakes/`): built, put under their real names, and steered.

A process finds them when it was started with the right LD_LIBRARY_PATH, which no process can change for itself. So
`ensure_environment()` starts the running program once more, `run_python()` starts another one, and
`python tests/fakes.py -- COMMAND …` runs any command with them.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "target" / "fakes"
VERSION = "10.6.0.26"
MARK = "JETRT_FAKES"


# Libraries ------------------------------------------------------------------------------------------------------------


@functools.cache
def _built() -> tuple[Path, Path]:
    command = ["cargo", "build", "--quiet", "--target-dir", str(TARGET), "-p", "fake-cuda", "-p", "fake-nvinfer"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RUSTFLAGS", "CARGO_BUILD_TARGET")}
    environment.pop("LD_LIBRARY_PATH", None)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError("the stand-in libraries are built by cargo, which is not on PATH") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return TARGET / "debug" / "libfake_cuda.so", TARGET / "debug" / "libfake_nvinfer.so"


def _place(content: bytes, path: Path) -> None:
    """Replaces a file in one step; a process that has the old one mapped keeps it."""
    if path.exists() and path.read_bytes() == content:
        return
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(name).chmod(0o755)
    Path(name).replace(path)


def _link(path: Path, target: str) -> None:
    if not path.is_symlink():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.symlink_to(target)
        temporary.replace(path)


def major(version: str) -> int:
    return int(version.split(".")[0])


@functools.cache
def library_dir(version: str = VERSION) -> Path:
    """A folder with `libcuda.so.1`, `libnvinfer.so.N`, `libnvinfer_plugin.so.N` and `libnvonnxparser.so.N`, N the
    version's major number. The last three are one file, so the parser sees what is inside the builder's networks."""
    cuda, nvinfer = _built()
    number = major(version)
    folder = TARGET / f"lib{number}"
    folder.mkdir(parents=True, exist_ok=True)
    _place(cuda.read_bytes(), folder / "libcuda.so.1")
    _link(folder / "libcuda.so", "libcuda.so.1")
    name = f"libnvinfer.so.{number}"
    if number == 8:
        temporary = TARGET / f"nvinfer8.{os.getpid()}.so"
        compiler = os.environ.get("CC", "cc")
        source = str(ROOT / "fakes" / "nvinfer8.c")
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(temporary), source], check=True)
        temporary.replace(folder / name)
        return folder
    # The name inside the file follows the major version; both have the same length.
    _place(nvinfer.read_bytes().replace(b"libnvinfer.so.10\0", name.encode() + b"\0"), folder / name)
    _link(folder / f"libnvinfer_plugin.so.{number}", name)
    _link(folder / f"libnvonnxparser.so.{number}", name)
    return folder


def environment(version: str = VERSION, **more: Any) -> dict[str, str]:
    """The environment for a process that is to find the stand-ins; `more` is set on top, None removes a variable."""
    folder = str(library_dir(version))
    result = dict(os.environ)
    others = [p for p in result.get("LD_LIBRARY_PATH", "").split(":") if p and not p.startswith(str(TARGET))]
    tests = str(Path(__file__).resolve().parent)
    paths = [p for p in result.get("PYTHONPATH", "").split(os.pathsep) if p and p != tests]
    result.update(
        LD_LIBRARY_PATH=":".join([folder, *others]),
        PYTHONPATH=os.pathsep.join([tests, *paths]),
        JETRT_TENSORRT_PATH=folder,
        FAKE_TRT_VERSION=version,
    )
    result[MARK] = folder
    for key, value in more.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = str(value)
    return result


def ensure_environment() -> None:
    """Starts the running program once more, the same way, when it was not started with the stand-ins."""
    if os.environ.get(MARK):
        return
    wanted = environment()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def run_python(
    code: str,
    *arguments: str,
    version: str = VERSION,
    env: Mapping[str, Any] | None = None,
    timeout: float = 100,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own that finds the stand-ins; `import fakes` works there."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(version, **(env or {})),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


# Control --------------------------------------------------------------------------------------------------------------


class _Fake:
    _prefix = ""

    def __init__(self, name: str) -> None:
        self.library = ctypes.CDLL(name)

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        function = self.library[f"{self._prefix}_{name}"]
        function.restype = result
        function.argtypes = arguments
        return function

    def reset(self) -> None:
        """Forgets calls, mistakes and the injected failure; objects stay."""
        self._function("reset", None)()

    def calls(self) -> int:
        return int(self._function("calls", ctypes.c_uint64)())

    def count(self, name: str) -> int:
        return int(self._function("call_count", ctypes.c_uint64, ctypes.c_char_p)(name.encode()))

    def last_failed(self) -> str:
        """The call that the injected failure hit; empty while it has not been reached."""
        return str(self._function("last_failed", ctypes.c_char_p)().decode())

    def live(self, kind: str) -> int:
        return int(self._function("live", ctypes.c_uint64, ctypes.c_char_p)(kind.encode()))

    def errors(self) -> list[str]:
        """What the caller did wrong, whether or not it was answered with an error."""
        text = self._function("error_text", ctypes.c_char_p, ctypes.c_uint64)
        return [text(i).decode() for i in range(self._function("errors", ctypes.c_uint64)())]


class FakeCuda(_Fake):
    """The driver stand-in of this process."""

    _prefix = "fake_cuda"
    KINDS = ("device", "pinned", "registered", "stream", "event", "graph", "graph_exec", "module", "capture", "bytes")

    def __init__(self) -> None:
        super().__init__("libcuda.so.1")

    def fail_at(self, n: int, code: int = 2) -> None:
        """The n-th driver call from now (1: the next) answers `code` (2: out of memory); 0 takes it back."""
        self._function("fail_at", None, ctypes.c_int64, ctypes.c_int)(n, code)

    def set(self, name: str, value: int) -> None:
        if not self._function("set", ctypes.c_int, ctypes.c_char_p, ctypes.c_int64)(name.encode(), value):
            raise KeyError(name)

    def all_live(self) -> dict[str, int]:
        """How much of each kind lives, to be compared before and after. Contexts are the process's and left out."""
        return {kind: self.live(kind) for kind in self.KINDS}

    def log(self) -> list[str]:
        """The names of the calls since the reset, in order."""
        name = self._function("call_name", ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_uint64)
        buffer = ctypes.create_string_buffer(128)
        result: list[str] = []
        while name(len(result), buffer, len(buffer)):
            result.append(buffer.value.decode())
        return result

    def place(self, address: int, size: int = 1) -> str:
        code = self._function("place", ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64)(address, size)
        return {0: "pageable", 1: "pinned", 2: "device"}.get(code, "freed")

    def call(self, name: str, *arguments: Any) -> int:
        """A driver function; int arguments are passed as 64 bits. Returns the code."""
        passed = [ctypes.c_uint64(a & (1 << 64) - 1) if isinstance(a, int) else a for a in arguments]
        function = self.library[name]
        function.restype = ctypes.c_int
        return int(function(*passed))


class FakeTrt(_Fake):
    """The TensorRT stand-in of this process."""

    _prefix = "fake_trt"
    KINDS = (
        *("IRuntime", "ICudaEngine", "IExecutionContext", "IHostMemory", "IEngineInspector", "IRefitter"),
        *("IBuilder", "IBuilderConfig", "INetworkDefinition", "ITensor", "ILayer", "IOptimizationProfile"),
        *("ITimingCache", "IParser", "IParserError", "IParserRefitter"),
    )

    def __init__(self) -> None:
        super().__init__(str(Path(os.environ[MARK]) / f"libnvinfer.so.{major(os.environ['FAKE_TRT_VERSION'])}"))

    def fail_at(self, n: int) -> None:
        """The n-th call from now that can fail does; 0 takes it back."""
        self._function("fail_at", None, ctypes.c_int64)(n)

    def all_live(self) -> dict[str, int]:
        return {kind: self.live(kind) for kind in self.KINDS}


# Plans ----------------------------------------------------------------------------------------------------------------

Shape = Sequence[int]
Profile = tuple[Shape, Shape, Shape]


def tensor(
    name: str, mode: str, dtype: str, shape: Shape, profiles: Iterable[Profile] | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "mode": mode,
        "dtype": dtype,
        "shape": list(shape),
        "profiles": [[list(shape) for shape in profile] for profile in profiles or ()],
        **more,
    }


def _mlp_weights() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    k, c = np.meshgrid(np.arange(64), np.arange(10), indexing="ij")
    return ((k * 10 + c) % 7 - 3).astype(np.float32) / 8, (np.arange(10) - 4).astype(np.float32) / 2


def _ready(program: str) -> dict[str, Any]:
    """The plans that are named like those built by TensorRT, with the same tensors and profiles, and four more."""
    if program == "dit5":
        sequence = [([1, 1, 64], [1, 122, 64], [1, 512, 64])]
        mask = [([1, 1], [1, 122], [1, 512])]
        return {
            "program": "dit5",
            "nodes": 4,
            "io": [
                tensor("sa_embs", "input", "bfloat16", [1, 41, 64]),
                tensor("vl_embs", "input", "bfloat16", [1, -1, 64], sequence),
                tensor("timestep", "input", "int64", [1]),
                tensor("image_mask", "input", "bool", [1, -1], mask),
                tensor("backbone_attention_mask", "input", "bool", [1, -1], mask),
                tensor("output", "output", "bfloat16", [1, 41, 64]),
            ],
        }
    if program in ("mlp", "affine"):
        w, b = _mlp_weights()
        return {
            "program": "affine",
            "nodes": 2,
            "io": [
                tensor("x", "input", "float32", [-1, 64], [([1, 64], [8, 64], [64, 64])]),
                tensor("y", "output", "float32", [-1, 10]),
            ],
            "w": w.tolist(),
            "b": b.tolist(),
        }
    if program == "nonzero":
        return {
            "program": "nonzero",
            "io": [
                tensor("x", "input", "float32", [-1, 4], [([1, 4], [8, 4], [64, 4])]),
                tensor("y", "output", "int64", [2, -1]),
            ],
        }
    if program == "add":
        profile = [([1, 8], [4, 8], [16, 8])]
        return {
            "program": "add",
            "io": [
                tensor("a", "input", "float32", [-1, 8], profile),
                tensor("b", "input", "float32", [-1, 8], profile),
                tensor("y", "output", "float32", [-1, 8]),
            ],
        }
    if program == "shape_input":
        return {
            "program": "shape_input",
            "io": [
                tensor("x", "input", "float32", [4]),
                tensor("size", "input", "int64", [2], location="host", values=[[[1, 1], [2, 3], [8, 8]]]),
                tensor("y", "output", "float32", [-1, -1]),
            ],
        }
    if program == "copy":
        return copy_of("float32", [-1, 4], [([1, 4], [2, 4], [16, 4])])
    raise ValueError(f"no ready plan {program!r}")


def copy_of(dtype: str, shape: Shape, profiles: Iterable[Profile] | None = None, n: int = 1) -> dict[str, Any]:
    """The fields of a plan that copies n inputs `x…` to n outputs `y…`, of any dtype and rank."""
    profiles = list(profiles or ())
    tags = [""] if n == 1 else [str(i) for i in range(n)]
    inputs = [tensor(f"x{tag}", "input", dtype, shape, profiles) for tag in tags]
    outputs = [tensor(f"y{tag}", "output", dtype, shape) for tag in tags]
    return {"program": "copy", "io": inputs + outputs}


def plan_bytes(
    program: str | Mapping[str, Any] = "mlp",
    *,
    version: str | None = None,
    serialization: int = 2,
    size: int | None = None,
    magic: bytes = b"ftrt",
    **fields: Any,
) -> bytes:
    """A plan. `program` is the name of a ready one or its fields; `fields` are set on top:

    name, device_memory, weights_bytes, nodes, aux_streams: numbers and names of the engine
    log [[severity, text], …], foreign_model (warns of another GPU model), host_code, sm (another compute capability)
    fail "deserialize" | "context" | "shapes" | "enqueue", in_capture "differ" | "empty" | "fail" | "sync"
    run "crash" | "abort" | "exit" | "kill" | "hang" (in enqueue) | "lost" (the device, when the work runs)
    run_log [[severity, text], …] at each enqueue, ms: how long the work takes
    differ true | "nan" | a relative error: how the outputs are wrong
    every: fail "enqueue", run, run_log and differ happen at every n-th enqueue only
    compute "float32" | "tf32" | "float16" | "bfloat16": what `affine` rounds its operands to
    """
    content = dict(_ready(program)) if isinstance(program, str) else dict(program)
    content.update(fields)
    content.setdefault("name", program if isinstance(program, str) else "plan")
    body = json.dumps(content).encode()
    numbers = [int(part) for part in (version or os.environ.get("FAKE_TRT_VERSION", VERSION)).split(".")]
    total = 28 + len(body) if size is None else size
    return magic + struct.pack("<IQQ4B", serialization, 0, total, *numbers) + body


def write_plan(path: str | os.PathLike[str], program: str | Mapping[str, Any] = "mlp", **more: Any) -> Path:
    """Writes what `plan_bytes` gives."""
    result = Path(path)
    result.write_bytes(plan_bytes(program, **more))
    return result


def mlp_reference(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    w, b = _mlp_weights()
    return np.asarray(x.astype(np.float32) @ w + b, np.float32)


def nonzero_reference(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.stack(np.nonzero(x)).astype(np.int64)


def dit5_reference(
    sa: np.ndarray[Any, Any],
    vl: np.ndarray[Any, Any],
    timestep: np.ndarray[Any, Any],
    image: np.ndarray[Any, Any],
    backbone: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    """In float32; round to bfloat16 to compare exactly."""
    kept = vl.astype(np.float32) * (image & backbone)[..., None].astype(np.float32)
    # Summed one row after the other, as the stand-in does.
    total = np.zeros((1, vl.shape[2]), np.float32)
    for row in range(vl.shape[1]):
        total += kept[:, row]
    mean = total / np.float32(vl.shape[1])
    return np.asarray(sa.astype(np.float32) + mean[:, None, :] + timestep.astype(np.float32), np.float32)


def plan_content(plan: bytes | str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a plan of the stand-ins. One that their builder made says under "built" what it was built with: flags,
    pools, precisions (by layer), scales, tactic_sources, timing_cache, …, and each one-number setter by its name."""
    data = plan if isinstance(plan, bytes) else Path(plan).read_bytes()
    return dict(json.loads(data[28:]))


# ONNX files -----------------------------------------------------------------------------------------------------------

_FIRST = ("float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool", "float16", "float64")
ONNX_TYPES = {name: i + 1 for i, name in enumerate(_FIRST)} | {"complex64": 14, "bfloat16": 16, "float8_e4m3fn": 17}


def _varint(n: int) -> bytes:
    n &= (1 << 64) - 1
    result = bytearray()
    while n > 0x7F:
        result.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*result, n])


def _field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _onnx_value(name: str, dtype: str, shape: Sequence[int | str] | None) -> bytes:
    dims = b"".join(_field(1, _field(1 if isinstance(d, int) else 2, d)) for d in shape or ())
    kind = _field(1, ONNX_TYPES[dtype]) + (b"" if shape is None else _field(2, dims))
    return _field(1, name) + _field(2, _field(1, kind))


def _onnx_tensor(name: str, array: np.ndarray[Any, Any], external: tuple[str, int] | None = None) -> bytes:
    data = b"".join(_field(1, d) for d in array.shape) + _field(2, ONNX_TYPES[array.dtype.name]) + _field(8, name)
    if external is None:
        return data + _field(9, array.tobytes())
    place = {"location": external[0], "offset": str(external[1]), "length": str(array.nbytes)}
    return data + b"".join(_field(13, _field(1, k) + _field(2, v)) for k, v in place.items()) + _field(14, 1)


def _onnx_attribute(name: str, value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return _field(1, name) + _field(5, _onnx_tensor("", value)) + _field(20, 4)
    if isinstance(value, (list, tuple)):
        return _field(1, name) + b"".join(_field(8, v) for v in value) + _field(20, 7)
    number, kind = {float: (2, 1), int: (3, 2), str: (4, 3)}[type(value)]
    return _field(1, name) + _field(number, value) + _field(20, kind)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], name: str | None = None, **attributes: Any) -> bytes:
    """A node of an ONNX graph; its name is the first output's with a slash before it, unless given ("" for none)."""
    data = b"".join(_field(1, i) for i in inputs) + b"".join(_field(2, o) for o in outputs)
    data += _field(3, f"/{outputs[0]}" if name is None else name) + _field(4, op)
    return data + b"".join(_field(5, _onnx_attribute(key, value)) for key, value in attributes.items())


def _ready_model(model: str) -> dict[str, Any]:
    w, b = _mlp_weights()
    if model == "mlp":
        return {
            "nodes": [node("MatMul", ["x", "w"], ["product"]), node("Add", ["product", "b"], ["y"])],
            "inputs": [("x", "float32", ["batch", 64])],
            "outputs": [("y", "float32", ["batch", 10])],
            "weights": {"w": w, "b": b},
        }
    if model == "norm":
        ones = np.ones(10, np.float32)
        return {
            "nodes": [
                node("MatMul", ["x", "w"], ["first"]),
                node("LayerNormalization", ["first", "scale", "b"], ["norm"], axis=-1, epsilon=1e-5),
                node("Relu", ["norm"], ["relu"]),
                node("MatMul", ["relu", "v"], ["y"]),
            ],
            "inputs": [("x", "float32", ["batch", 64])],
            "outputs": [("y", "float32", ["batch", 64])],
            "weights": {"w": w, "b": b, "scale": ones, "v": np.ascontiguousarray(w.T)},
        }
    if model == "qdq":
        scale, zero = np.array(1 / 16, np.float32), np.array(0, np.int8)
        return {
            "nodes": [
                node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
                node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
                node("DequantizeLinear", ["w8", "w_scale", "zero"], ["w"]),
                node("MatMul", ["dq", "w"], ["product"]),
                node("Add", ["product", "b"], ["y"]),
            ],
            "inputs": [("x", "float32", ["batch", 64])],
            "outputs": [("y", "float32", ["batch", 10])],
            "weights": {
                "scale": scale,
                "zero": zero,
                "w8": (w * 8).astype(np.int8),
                "w_scale": np.array(0.125, np.float32),
                "b": b,
            },
        }
    if model == "conv":
        kernel = (np.arange(4 * 3 * 3 * 3) % 7 - 3).reshape(4, 3, 3, 3).astype(np.float32) / 8
        return {
            "nodes": [
                node("Conv", ["x", "k"], ["conv"], pads=[1, 1, 1, 1], strides=[1, 1], kernel_shape=[3, 3]),
                node("Relu", ["conv"], ["relu"]),
                node("GlobalAveragePool", ["relu"], ["mean"]),
                node("Flatten", ["mean"], ["y"]),
            ],
            "inputs": [("x", "float32", ["batch", 3, 8, 8])],
            "outputs": [("y", "float32", ["batch", 4])],
            "weights": {"k": kernel},
        }
    if model == "add":
        return {
            "nodes": [node("Add", ["a", "b"], ["y"])],
            "inputs": [("a", "float32", ["n", 8]), ("b", "float32", ["n", 8])],
            "outputs": [("y", "float32", ["n", 8])],
        }
    if model == "copy":
        return {
            "nodes": [node("Identity", ["x"], ["y"])],
            "inputs": [("x", "float32", ["n", 4])],
            "outputs": [("y", "float32", ["n", 4])],
        }
    if model == "nonzero":
        return {
            "nodes": [node("NonZero", ["x"], ["y"])],
            "inputs": [("x", "float32", ["n", 4])],
            "outputs": [("y", "int64", [2, "count"])],
        }
    if model == "shape_input":
        return {
            "nodes": [node("Expand", ["x", "size"], ["y"])],
            "inputs": [("x", "float32", [1]), ("size", "int64", [2])],
            "outputs": [("y", "float32", ["rows", "columns"])],
            "plan": {"program": "shape_input"},
        }
    raise ValueError(f"no ready model {model!r}")


def onnx_bytes(
    model: str | Mapping[str, Any] = "mlp", *, external: str | None = None, folder: Path | None = None, **fields: Any
) -> bytes:
    """An ONNX file. `model` names a ready one (mlp, norm, qdq, conv, add, copy, nonzero, shape_input) or is its fields;
    `fields` are set on top:

    nodes [node(…), …], inputs and outputs [(name, dtype, shape), …] (a name in a shape is a dynamic dimension)
    values: the same for tensors inside, weights {name: array}
    opset, domains {name: version}, producer, metadata {key: text}
    plan: the fields of a plan (see `plan_bytes`) that say what the built engine computes. Without, the stand-in runs
        the nodes itself, where it knows each of them (fakes/nvinfer/src/graph.rs), in the precision each layer was
        built with; else the build fails with "fake: no program for this model". Of its `io`, `location` and `debug`
        count, by name.
    build: what goes wrong, see below. FAKE_TRT_BUILD in the environment says the same for every model and wins, key by
        key. Setters called before a parse know the environment alone.

    With `external` the weights lie in that file of `folder`, which is written.

    Keys of `build`, about the build itself:
    log [[severity, text], …], seconds it takes (with progress callbacks unless `silent`), memory: bytes eaten meanwhile
    outcome "crash" | "abort" | "exit" | "kill" | "hang" | "null" (no plan, and no line about it)
    parse {…}: the same four while parsing
    ignore: setters, flags and pools that do not take ("FP16", "WORKSPACE", "setMaxAuxStreams", "setPrecision",
        "setOutputType", "setType", "setAllowedFormats", "profile", "setInt8Calibrator", "parserFlag", …)
    keep_fp32: patterns of layers that stay float32 whatever was asked
    foreign: true for one layer whose inside is hidden
    needs_workspace: bytes without which no tactic is found
    About the engine: load_log (the plan's `log`), fail, run, run_log, every, differ, ms, in_capture, aux_streams
    levels {"3": {…}}: any of these for builds of that optimisation level
    """
    content = dict(_ready_model(model)) if isinstance(model, str) else dict(model)
    content.update(fields)
    weights = {name: np.asarray(array) for name, array in content.get("weights", {}).items()}
    blob = b""
    stored = []
    for name, array in weights.items():
        stored.append(_onnx_tensor(name, array, (external, len(blob)) if external else None))
        blob += array.tobytes()
    if external and folder is not None:
        (folder / external).write_bytes(blob)
    graph = b"".join(_field(1, one) for one in content["nodes"]) + _field(2, "graph")
    graph += b"".join(_field(5, one) for one in stored)
    for number, key in ((11, "inputs"), (12, "outputs"), (13, "values")):
        graph += b"".join(_field(number, _onnx_value(*one)) for one in content.get(key, ()))
    metadata = dict(content.get("metadata", {}))
    for key in ("plan", "build"):
        if key in content:
            metadata[f"fake_{key}"] = json.dumps(content[key])
    data = _field(1, 8) + _field(2, content.get("producer", "fakes")) + _field(7, graph)
    for domain, opset in {"": content.get("opset", 17), **content.get("domains", {})}.items():
        data += _field(8, _field(1, domain) + _field(2, opset))
    return data + b"".join(_field(14, _field(1, key) + _field(2, value)) for key, value in metadata.items())


def onnx_model(path: str | os.PathLike[str], model: str | Mapping[str, Any] = "mlp", **more: Any) -> Path:
    """Writes what `onnx_bytes` gives; `external` is the name of a file beside it."""
    result = Path(path)
    result.write_bytes(onnx_bytes(model, folder=result.parent, **more))
    return result


def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or arguments[0] != "--":
        raise SystemExit("usage: python tests/fakes.py -- COMMAND …")
    program = shutil.which(arguments[1])
    if program is None:
        raise SystemExit(f"no such command: {arguments[1]}")
    os.execve(program, arguments[1:], environment(os.environ.get("FAKE_TRT_VERSION", VERSION)))


if __name__ == "__main__":
    main(sys.argv[1:])
