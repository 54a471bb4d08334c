"""Reference outputs of a model, which the outputs of a plan are compared with.

Kinds:

- "onnxruntime": the ONNX file on the CPU, as it is. Graph optimisations are off (a fused convolution and batch
  normalisation rounds differently), and so is the bfloat16 shortcut of fp32 products on ARM.
- "onnxruntime, upcast copy": onnxruntime has no bfloat16 arithmetic on the CPU and does not load such models
  (microsoft/onnxruntime#28768). A temporary copy has every bfloat16 tensor, constant, cast, input and output in
  float32; what was a bfloat16 input or output is rounded to bfloat16 at the boundary, what lies between is not.
- "torch": a callable or a TorchScript file that the user gives.
- "npz": outputs that the user gives in a file.
- "tensorrt fp32": another plan of the same model, built in fp32 without TF32. It shares the parser with the plan that
  is judged, so it shows rounding and not what the parser got wrong.

What cannot be had is `ReferenceUnavailable`: then nothing was compared, which is never a pass.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ..errors import BuildOptionError, JetrtError
from ..report import dims
from ..runtimes.onnx_cpu import _TYPES, _array_of
from .arrays import Array, dtype_name, from_bits, keys_for, load_npz, owner, pick, to_bfloat16, widened
from .upcast import upcast, uses_bfloat16

if TYPE_CHECKING:
    import os

__all__ = [
    "Kind",
    "Reference",
    "ReferenceUnavailable",
    "Source",
    "compute",
    "from_text",
    "opened",
]

Kind = Literal["onnxruntime", "onnxruntime, upcast copy", "torch", "npz", "tensorrt fp32"]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class ReferenceUnavailable(JetrtError):  # noqa: N818  a state of the parity report, not only a failure
    """There is no reference: a package is missing, or the model cannot be loaded or run. The reason is the message."""

    kind: str | None = None


@dataclass(frozen=True)
class Reference:
    """Outputs by name, of the types that the model declares; bfloat16 as `to_bfloat16` holds it."""

    kind: Kind
    outputs: Mapping[str, Array]
    #: Of the packages that computed it.
    versions: Mapping[str, str]
    #: Of the computation alone; loading the model is not in it.
    seconds: float
    #: What was set so that the numbers are the model's own.
    settings: Mapping[str, str] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """What the parity report keeps; the outputs are not in it."""
        return {"kind": self.kind, "versions": dict(self.versions), "settings": dict(self.settings)}


class Source:
    """An open reference: it computes any number of cases."""

    def __init__(self, kind: Kind, run: _PointRun, versions: Mapping[str, str], settings: Mapping[str, str]) -> None:
        self.kind: Kind = kind
        self.versions = dict(versions)
        self.settings = dict(settings)
        self._run = run

    def compute(self, inputs: Mapping[str, Array], *, profile: int = 0, point: str = "opt") -> Reference:
        """`profile` and `point` tell an .npz file with several cases which one is meant (see `pick`)."""
        started = time.perf_counter()
        outputs = self._run(inputs, profile, point)
        return Reference(self.kind, outputs, self.versions, time.perf_counter() - started, self.settings)


_PointRun = Callable[[Mapping[str, Array], int, str], dict[str, Array]]


def compute(model_path: str | os.PathLike[str], inputs: Mapping[str, Array], **options: Any) -> Reference:
    """One case; the options are those of `opened`. For several cases, `opened` loads the model once."""
    with opened(model_path, **options) as source:
        return source.compute(inputs)


@contextlib.contextmanager
def opened(
    model_path: str | os.PathLike[str],
    *,
    kind: Kind | None = None,
    npz: str | os.PathLike[str] | None = None,
    torch_model: Callable[..., Any] | str | os.PathLike[str] | None = None,
    run: Run | None = None,
    versions: Mapping[str, str] | None = None,
    outputs: Mapping[str, Sequence[int]] | None = None,
    threads: int | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Iterator[Source]:
    """Opens a reference.

    `kind` may be left out: what was given (`npz`, `torch_model`, `run`) names it, else it is onnxruntime on the file
    as it is, or on an upcast copy if the file needs one. `run` computes "tensorrt fp32", `versions` say by what.
    `outputs` are the names and shapes (-1: any) that the plan has; "torch" needs the names unless it answers with a
    dict, "npz" is checked against them. `folder` is where the upcast copy is written (the system's temporary folder if
    left out); it takes 4 bytes for every bfloat16 weight.

    Raises `ReferenceUnavailable`, and `BuildOptionError` for options or an .npz file that make no sense.
    """
    given: dict[Kind, Any] = {"npz": npz, "torch": torch_model, "tensorrt fp32": run}
    named: list[Kind] = [name for name, value in given.items() if value is not None]
    if kind is not None and kind not in get_args(Kind):
        raise _option(kind, " | ".join(get_args(Kind)), "there is no such kind")
    if len(named) > 1 or (kind is not None and named not in ([], [kind])):
        asked = dict.fromkeys([*named, *([kind] if kind is not None else [])])
        raise _option(" and ".join(asked), "one of them", "there can be one reference only")
    if kind in given and kind not in named:
        raise _option(kind, "a kind with what computes it", "nothing was given that computes it")

    path = Path(model_path)
    chosen = kind or (named[0] if named else None)
    if chosen == "npz":
        yield Source("npz", _npz(Path(str(npz)), outputs), {}, {"file": str(npz)})
    elif chosen == "torch":
        torch = _package("torch", "torch", "Install PyTorch, or give --reference out.npz.")
        yield Source("torch", _torch(torch, torch_model, outputs), {"torch": str(torch.__version__)}, {})
    elif chosen == "tensorrt fp32":
        assert run is not None
        yield Source("tensorrt fp32", _given_run(run), versions or {}, {"tf32": "off"})
    else:
        with _onnxruntime(path, chosen, threads, folder) as source:
            yield source


def from_text(text: str) -> dict[str, Any]:
    """What `opened` is given for the text of ``--reference``; "tensorrt-fp32" needs its `run` in addition.

    Raises `BuildOptionError` for a text that is none of these.
    """
    named: dict[str, Kind] = {
        "onnxruntime": "onnxruntime",
        "onnxruntime-upcast": _UPCAST,
        "tensorrt-fp32": "tensorrt fp32",
    }
    if text in named:
        return {"kind": named[text]}
    suffix = Path(text).suffix
    if suffix == ".npz":
        return {"npz": text}
    if suffix in (".pt", ".pth", ".ts"):
        return {"torch_model": text}
    raise _option(text, f"{', '.join(named)}, FILE.npz, FILE.pt (TorchScript)", "there is no such reference")


def _option(found: str, allowed: str, why: str) -> BuildOptionError:
    return BuildOptionError(
        f"--reference: {why}; found: {found}; allowed: {allowed}. Change it or leave it out.",
        option="--reference",
        found=found,
        allowed=allowed,
    )


def _package(name: str, kind: str, step: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ReferenceUnavailable(
            f"the package {name} is missing, which a {kind} reference needs ({error}). {step}", kind=kind
        ) from error


def _given_run(run: Run) -> _PointRun:
    return lambda inputs, _profile, _point: dict(run(inputs))


# ---------------------------------------------------------------------------------------------------------- .npz files


def _npz(path: Path, outputs: Mapping[str, Sequence[int]] | None) -> _PointRun:
    arrays = load_npz(path, "--reference")

    def refuse(why: str, found: str, allowed: str) -> BuildOptionError:
        return BuildOptionError(
            f"--reference {path}: {why}; found: {found}; needed: {allowed}. Write one array for each output.",
            option="--reference",
            found=found,
            allowed=allowed,
        )

    names = dict.fromkeys(owner(key, outputs) for key in arrays)
    wanted = dict.fromkeys(names if outputs is None else outputs)
    for name in [*names, *wanted]:
        if name not in wanted or name not in names:
            raise refuse("the names differ from the outputs", ", ".join(names) or "none", ", ".join(wanted))
    for name, shape in (outputs or {}).items():
        for key in (key for key in arrays if owner(key, outputs) == name):
            found = arrays[key].shape
            if len(found) != len(shape) or any(s not in (-1, d) for s, d in zip(shape, found, strict=True)):
                raise refuse(f"{key!r} has another shape", dims(found), dims(["any" if s < 0 else s for s in shape]))

    def run(_inputs: Mapping[str, Array], profile: int, point: str) -> dict[str, Array]:
        result = {}
        for name in wanted:
            array = pick(arrays, name, profile, point)
            if array is None:
                allowed = " or ".join(map(repr, keys_for(name, profile, point)))
                raise refuse(f"nothing for {name!r} at {point} of profile {profile}", ", ".join(arrays), allowed)
            result[name] = array
        return result

    return run


# --------------------------------------------------------------------------------------------------------------- torch


def _torch(torch: Any, model: Any, outputs: Mapping[str, Sequence[int]] | None) -> _PointRun:
    def unavailable(why: str) -> ReferenceUnavailable:
        return ReferenceUnavailable(f"the torch reference {why}. Or give --reference out.npz.", kind="torch")

    if not callable(model):
        try:
            model = torch.jit.load(str(model), map_location="cpu").eval()
        except Exception as error:  # RuntimeError, ValueError, OSError: torch has no class of its own
            raise unavailable(f"{model} cannot be loaded as TorchScript: {error}") from error

    def tensor(array: Array) -> Any:
        array = np.array(array, order="C")  # torch warns about memory that it must not write
        if dtype_name(array) == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def array(value: Any) -> Array:
        value = value.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:
            return to_bfloat16(value.float().numpy())
        result: Array = value.numpy()
        return result

    def run(inputs: Mapping[str, Array], _profile: int, _point: str) -> dict[str, Array]:
        """In the order of the model's inputs: their names need not be names in Python."""
        try:
            with torch.no_grad():
                answer = model(*map(tensor, inputs.values()))
            if not isinstance(answer, Mapping):
                values = [answer] if isinstance(answer, torch.Tensor) else list(answer)
                if len(values) != len(outputs or ()):
                    raise ValueError(f"it answered with {len(values)} tensors and the model has {len(outputs or ())}")
                answer = dict(zip(outputs or (), values, strict=True))
            return {name: array(value) for name, value in answer.items()}
        except Exception as error:  # the user's code may raise anything
            raise unavailable(f"failed: {type(error).__name__}: {error}") from error

    return run


# --------------------------------------------------------------------------------------------------------- onnxruntime

#: Stated in the report. No optimisation at all: even the basic level folds batch normalisation into convolutions.
_SETTINGS = {"graph_optimization_level": "ORT_DISABLE_ALL", "mlas.enable_gemm_fastmath_arm64_bfloat16": "0"}


@contextlib.contextmanager
def _onnxruntime(
    path: Path, kind: Kind | None, threads: int | None, folder: str | os.PathLike[str] | None
) -> Iterator[Source]:
    ort = _package("onnxruntime", "onnxruntime", "pip install 'jetrt[build]', or give --reference out.npz.")
    versions = {"onnxruntime": str(ort.__version__)}
    narrow: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
    session: Any = None

    def unavailable(error: Exception, what: str) -> ReferenceUnavailable:
        text = " ".join(str(error).split()) or type(error).__name__
        return ReferenceUnavailable(
            f"onnxruntime {ort.__version__} {what}: {text}. Give --reference out.npz with outputs from elsewhere.",
            kind=kind,
        )

    with contextlib.ExitStack() as stack:
        if kind != _UPCAST:
            try:
                session = _session(ort, path, threads)
            except Exception as error:  # onnxruntime's classes have no common base
                if kind is not None or not uses_bfloat16(path):
                    raise unavailable(error, f"cannot load {path}") from error
        if session is None:
            kind = _UPCAST
            onnx = _package("onnx", _UPCAST, "pip install 'jetrt[build]', or give --reference out.npz.")
            versions["onnx"] = str(onnx.__version__)
            try:
                where = stack.enter_context(tempfile.TemporaryDirectory(prefix="jetrt-upcast-", dir=folder))
                copy, narrow = upcast(onnx, path, Path(where))
                session = _session(ort, copy, threads)
            except JetrtError:
                raise
            except Exception as error:
                raise unavailable(error, f"cannot load a copy of {path} with bfloat16 turned into float32") from error
        run = _session_run(ort, session, narrow, lambda error: unavailable(error, f"cannot run {path}"))
        yield Source(kind or "onnxruntime", run, versions, _SETTINGS)


_UPCAST: Kind = "onnxruntime, upcast copy"


def _session(ort: Any, path: Path, threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for node in (*session.get_inputs(), *session.get_outputs()):
        if node.type not in _TYPES:
            raise TypeError(f"{node.name!r} is a {node.type}, which jetrt cannot hand to onnxruntime")
    return session


def _session_run(
    ort: Any,
    session: Any,
    narrow: tuple[frozenset[str], frozenset[str]],
    unavailable: Callable[[Exception], ReferenceUnavailable],
) -> _PointRun:
    nodes = session.get_inputs()
    outputs = {node.name: _TYPES[node.type] for node in session.get_outputs()}

    def value(node: Any, array: Array) -> Any:
        kind = _TYPES[node.type]
        if node.name in narrow[0]:
            array = widened(to_bfloat16(widened(array)))
        array = np.asarray(array, order="C")
        if kind.native:
            return ort.OrtValue.ortvalue_from_numpy(array)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(kind.storage), kind.code)

    def run(inputs: Mapping[str, Array], _profile: int, _point: str) -> dict[str, Array]:
        try:
            feeds = {node.name: value(node, inputs[node.name]) for node in nodes}
            results = session.run_with_ort_values(list(outputs), feeds)
        except KeyError as error:
            raise unavailable(ValueError(f"the plan has no input {error}, which the model needs")) from error
        except Exception as error:
            raise unavailable(error) from error
        arrays = {}
        for (name, kind), result in zip(outputs.items(), results, strict=True):
            array = _array_of(result, kind)
            if name in narrow[1]:
                array = to_bfloat16(array)
            arrays[name] = array if kind.native else from_bits(np.array(array))
        return arrays

    return run
