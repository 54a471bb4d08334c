"""Running a plan and its reference in child processes, for what judges plans: `jetrt build`, `verify` and `stamp`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import known_failures
from ..errors import BuildOptionError, EngineDeserializeError, JetrtError
from ..provenance import FileHash, Machine, ModelFile, Parity, Tensor
from . import parity
from .arrays import Array, dtype_name, to_bfloat16, widened
from .cases import Case
from .onnx_file import Digest, OnnxFile
from .process import Answer, run_job
from .profiles import NetworkInput
from .progress import Reporter
from .reference import Reference
from .thresholds import Thresholds

__all__ = [
    "Here",
    "NoReferenceError",
    "compare",
    "explained_job",
    "identify",
    "in_own_types",
    "layer_times",
    "model_file",
    "network_inputs",
    "outputs_of",
    "packed",
    "parity_record",
    "reference_outputs",
    "tensors",
    "tried",
]


class NoReferenceError(Exception):
    """There is nothing to compare with; the message says why."""


@dataclass(frozen=True)
class Here:
    """This machine, as a child saw it."""

    machine: Machine
    #: libnvinfer.
    library: str
    integrated: bool

    @property
    def tensorrt(self) -> tuple[int, ...]:
        return tuple(map(int, self.machine.tensorrt.split(".")[:3]))


def identify(device: int = 0) -> Here:
    """Asks a child what this machine is. Raises what opening TensorRT and the driver raises."""
    found = run_job("identify", {"device": device}, timeout=300).result
    return Here(Machine.here(device, core=lambda _: found["machine"]), found["library"], found["machine"]["integrated"])


def explained_job(
    job: str, request: Mapping[str, Any], arrays: Mapping[str, Array] | None = None, *, here: Here, **more: Any
) -> Answer:
    """`process.run_job` with this machine's library. What the table of known failures says about an error is added to
    its message, and is its ``findings``."""
    try:
        return run_job(job, dict(request), arrays, library=here.library, **more)
    except BuildOptionError:
        raise
    except JetrtError as error:
        stage: known_failures.Stage = "build" if job == "build" else "run"
        if stage == "run" and (isinstance(error, EngineDeserializeError) or getattr(error, "phase", None) == "load"):
            stage = "load"
        where: dict[str, Any] = {"tensorrt": here.tensorrt, "stage": stage, "gpu": here.machine.gpu}
        if getattr(error, "findings", None):
            # The child has put them into the message; they came as text.
            lines = getattr(error, "log", None) or [error.message]
            error.findings = known_failures.explain(lines, **where)  # type: ignore[attr-defined]
        raise known_failures.attach(error, **where) from None


def tried(
    plan: Path,
    cases: Sequence[Case],
    load: Mapping[str, Any],
    *,
    here: Here,
    reporter: Reporter,
    timeout: float | None = None,
    layer_runs: int = 0,
) -> Answer:
    """Loads a plan in a child and runs it on every case; `layer_runs` times its layers at the first optimum."""
    chosen = next((index for index, case in enumerate(cases) if case.point == "opt"), 0)
    request = {**load, "plan": str(plan), "cases": len(cases), "layer_runs": layer_runs}
    if layer_runs:
        request |= {"layer_case": chosen, "layer_profile": cases[chosen].profile}
    return explained_job("run", request, packed(cases), here=here, timeout=timeout, watcher=reporter)


def reference_outputs(
    onnx: Path,
    cases: Sequence[Case],
    source: Mapping[str, Any],
    *,
    outputs: Mapping[str, Sequence[int]],
    own_types: Mapping[str, str],
    reporter: Reporter,
    timeout: float | None = None,
) -> list[Reference]:
    """The reference at every case, in a child: a model that breaks onnxruntime breaks nothing else. Raises
    `NoReferenceError`."""
    request = {
        "onnx": str(onnx),
        "source": dict(source),
        "outputs": {name: list(shape) for name, shape in outputs.items()},
        "cases": len(cases),
        "places": [[case.profile, case.point] for case in cases],
    }
    arrays = packed(in_own_types(cases, own_types))
    answer = run_job("reference", request, arrays, watcher=reporter, timeout=timeout)
    if "unavailable" in answer.result:
        raise NoReferenceError(answer.result["unavailable"])
    found = outputs_of(answer, len(cases))
    return [
        Reference(entry["kind"], one, entry["versions"], entry["seconds"], entry["settings"])
        for entry, one in zip(answer.result["references"], found, strict=True)
    ]


def in_own_types(cases: Sequence[Case], own: Mapping[str, str]) -> list[Case]:
    """Inputs of a plan whose types --io-formats changed, as the model has them: exact where the plan's are narrower."""

    def cast(name: str, array: Array) -> Array:
        dtype = own.get(name)
        if dtype is None or dtype == dtype_name(array):
            return array
        return to_bfloat16(widened(array)) if dtype == "bfloat16" else widened(array).astype(dtype)

    return [
        Case(case.profile, case.point, {name: cast(name, array) for name, array in case.inputs.items()})
        for case in cases
    ]


def compare(
    cases: Sequence[Case],
    found: Answer,
    references: Sequence[Reference],
    thresholds: Thresholds,
    dtypes: Mapping[str, str] | None = None,
) -> parity.ParityReport:
    return parity.judge(cases, outputs_of(found, len(cases)), references, thresholds, dtypes=dtypes or None)


def layer_times(runs: Sequence[Sequence[Sequence[Any]]]) -> list[tuple[str, list[float]]]:
    """The profiler's rows run by run -> one row for each layer."""
    if not runs:
        return []
    return [(name, [run[index][1] for run in runs]) for index, (name, _) in enumerate(runs[0])]


def model_file(model: OnnxFile, digest: Digest) -> ModelFile:
    files = tuple(FileHash(entry["file"], entry["sha256"], entry["bytes"]) for entry in digest.files)
    return ModelFile(model.path.name, digest.sha256, files, model.opset, model.producer or None)


def packed(cases: Sequence[Case]) -> dict[str, Array]:
    """As a job takes them: "0/x", "1/x", …"""
    return {f"{index}/{name}": array for index, case in enumerate(cases) for name, array in case.inputs.items()}


def outputs_of(answer: Answer, count: int) -> list[dict[str, Array]]:
    found: list[dict[str, Array]] = [{} for _ in range(count)]
    for key, array in answer.arrays.items():
        index, _, name = key.partition("/")
        found[int(index)][name] = array
    return found


def network_inputs(answer: Answer) -> list[NetworkInput]:
    """Of the answer of a build."""
    return [NetworkInput.from_mapping(info) for info in answer.result["inputs"]]


def parity_record(report: parity.ParityReport) -> Parity:
    """As a manifest keeps it."""
    stored = report.to_mapping()
    return Parity(**{**stored, "cases": tuple(stored["cases"])})


def tensors(rows: Iterable[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """Inputs or outputs of a plan that was tried, for its manifest."""
    return tuple(
        Tensor(row["name"], row["dtype"], tuple(row["shape"]), row["location"], row["format"] or "unknown")
        for row in rows
    )
