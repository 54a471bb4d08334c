"""The whole of a build: model and options in, a plan with its manifest out, or an error and nothing on the disk.

    model -> native configuration -> plan (child) -> tried (child) -> audit -> parity (child) -> manifest -> published

Each step in a child process of its own; this one never opens CUDA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core, known_failures, platform
from ..errors import BuildCrashError, BuildOptionError, EngineBuildError, JetrtError
from ..provenance import (
    BuildReport,
    EngineFile,
    EngineFilenameSchema,
    FileHash,
    Machine,
    Manifest,
    ModelFile,
    Parity,
    Tensor,
    build_once,
    key_of,
)
from . import calibration, calibration_cache, levels, parity
from .arrays import Array, load_npz
from .audit import Audit, audit, check
from .cases import Case
from .configure import NativeConfig, native_config
from .onnx_file import Digest, OnnxFile
from .options import BuildOptions
from .preprocessing import Preprocessing
from .process import Answer, run_job
from .profiles import NetworkInput, Profile, resolve
from .progress import Reporter
from .reference import from_text
from .reference import Reference
from .system import prepared_system
from .thresholds import Thresholds

__all__ = [
    "BuildResult",
    "Here",
    "NoReferenceError",
    "build_plan",
    "compare",
    "identify",
    "layer_times",
    "model_file",
    "outputs_of",
    "reference_outputs",
    "tried",
]

_LAYER_RUNS = 20


@dataclass(frozen=True)
class BuildResult:
    """A plan that is there now. `built` is false where the same one was there already."""

    path: Path
    manifest: Manifest
    built: bool
    #: Sentences that the user should read, in order.
    notes: tuple[str, ...] = ()
    #: Tables of the build for the terminal: levels, precision, parity; empty when nothing was built.
    tables: Mapping[str, str] = field(default_factory=dict)
    #: The network's layers as JSON, before TensorRT fused them; ``None`` when nothing was built.
    network: str | None = None


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


# --------------------------------------------------------------------------------------------------------- the sequence


def build_plan(
    onnx: str | os.PathLike[str],
    engine: str | os.PathLike[str] | None,
    options: BuildOptions,
    *,
    calibration_data: Any = None,
    reporter: Reporter,
) -> BuildResult:
    """Builds, tries, audits, compares and publishes. See `jetrt.build` for what it raises."""
    begin = time.monotonic()
    model = OnnxFile.open(onnx)
    reporter.title(f"hashing {model.path}")
    digest = model.sha256()
    reporter.title("looking at this machine")
    here = identify(options.device)
    config = native_config(
        options,
        tensorrt=here.tensorrt,
        quantization=model.quantization,
        sm=here.machine.sm,
        integrated=here.integrated,
        jetson=here.machine.l4t is not None,
        available_memory=platform.identify().memory_available,
        model_dtypes=model.dtypes,
        calibrator=calibration_data is not None,
    )
    if config.dla_core is not None:
        raise BuildOptionError(
            f"--dla-core {config.dla_core}: this machine and TensorRT have a DLA, and jetrt does not build for it yet. "
            f"Build with trtexec --useDLACore={config.dla_core}, and give the plan a manifest with `jetrt stamp`.",
            option="--dla-core",
        )
    final = Path(engine) if engine is not None else _named(model, here.machine, config.precision)
    data = _calibration_data(model, options, calibration_data)
    key = key_of(
        model_sha256=digest.sha256,
        options=options.shaping(),
        calibration_sha256=None if data is None else f"{data.sha256}:{options.calib_algorithm}",
        machine=here.machine,
    )
    work = _Build(model, digest, final, options, here, config, data, key, reporter, begin)
    for note in config.notes:
        work.note(note)
    try:
        manifest, built = build_once(
            final,
            key,
            work.make,
            options=options.to_mapping(),
            model_sha256=digest.sha256,
            machine=here.machine,
            overwrite=options.overwrite,
            rebuild=options.rebuild,
            on_wait=reporter.note,
        )
    except JetrtError as error:
        stage = "run" if getattr(error, "phase", None) in ("load", "run", "layers", "race") else "build"
        raise known_failures.attach(error, tensorrt=here.tensorrt, stage=stage, gpu=here.machine.gpu) from None
    return BuildResult(final, manifest, built, tuple(work.notes), work.tables, work.network)


def _named(model: OnnxFile, machine: Machine, precision: str) -> Path:
    return model.path.with_name(str(EngineFilenameSchema.for_machine(model.path.stem, machine, precision)))


def _calibration_data(
    model: OnnxFile, options: BuildOptions, given: Any
) -> calibration.CalibrationData | None:
    if given is not None and options.calib_data is not None:
        raise BuildOptionError("--calib-data and calibration_data are both given: use one.", option="--calib-data")
    source = given if given is not None else options.calib_data
    if source is None:
        if options.calib_cache is not None:
            raise BuildOptionError(
                f"--calib-cache {options.calib_cache}: the data set that it came from must be given too (--calib-data): "
                "without it nothing says that the cache fits.",
                option="--calib-cache",
            )
        return None
    inputs = model.network_inputs()
    profile = resolve(inputs, options.hints())[0]
    text = options.calib_preprocess
    return calibration.load(
        source,
        inputs,
        profile,
        preprocessing=None if text is None else Preprocessing.parse(text),
        batch_size=options.calib_batch,
        minimum=options.calib_min_samples,
    )


@dataclass
class _Build:
    model: OnnxFile
    digest: Digest
    final: Path
    options: BuildOptions
    here: Here
    config: NativeConfig
    data: calibration.CalibrationData | None
    key: str
    reporter: Reporter
    begin: float
    notes: list[str] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)
    #: What a reader of the manifest should know: log findings, precision, calibration.
    findings: list[dict[str, Any]] = field(default_factory=list)
    calibrated: dict[str, Any] | None = None
    calibration_bytes: bytes | None = None
    references: list[Reference] | None = None
    reference_note: str | None = None
    network: str | None = None

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.reporter.note(text)

    # --- build_once calls this with the name of a file that does not exist yet

    def make(self, temporary: Path) -> Manifest:
        with contextlib.ExitStack() as stack:
            if self.options.prepare_system:
                stack.enter_context(prepared_system(yes=self.options.yes, say=self.reporter.note))
            self._prepare_calibration()
            table = None
            if self.options.opt_level == "auto":
                table, answer = self._levels(temporary, stack)
            else:
                answer = self._one(temporary, None, self._left())
        return self._manifest(temporary, answer, table)

    def _left(self) -> float | None:
        """Seconds that --timeout leaves."""
        if self.options.timeout is None:
            return None
        return max(self.options.timeout - (time.monotonic() - self.begin), 0.1)

    # --- building

    def _one(self, plan: Path, level: int | None, timeout: float | None) -> Answer:
        what = f"building {self.final.name}" + ("" if level is None else f", level {level}")
        self.reporter.title(what)
        request: dict[str, Any] = {
            "onnx": str(self.model.path),
            "plan": str(plan),
            "config": self.config.to_mapping(),
            "options": self.options.to_mapping(),
            "device": self.options.device,
            "level": level,
            "timing_cache": self.options.timing_cache,
        }
        arrays: dict[str, Array] = {}
        if self.data is not None:
            first = next(iter(self.data.shapes.values()))
            request["calibration"] = {
                "algorithm": self.options.calib_algorithm,
                "batch_size": int(first[0]) if first else 1,
                "shapes": {name: list(shape) for name, shape in self.data.shapes.items()},
            }
            if self.calibration_bytes is not None:
                arrays["calibration_cache"] = np.frombuffer(self.calibration_bytes, np.uint8)
        answer = run_job(
            "build",
            request,
            arrays,
            timeout=timeout,
            ask=_Batches(self.data),
            watcher=self.reporter,
            library=self.here.library,
            environment=self.config.environment,
        )
        self.network = json.dumps(answer.result["layers"], indent=1)
        self._read_log(answer)
        self._read_calibration(answer)
        problem = answer.result["timing_cache"]["problem"]
        if problem:
            self.note(problem)
        return answer

    def _read_log(self, answer: Answer) -> None:
        found = known_failures.explain(
            [line for _, line in answer.log], tensorrt=self.here.tensorrt, stage="build", gpu=self.here.machine.gpu
        )
        for finding in found:
            if finding.kind != "note":
                self.findings.append(finding.to_mapping())
                self.note(finding.text())
        bad = [finding for finding in found if finding.kind == "accuracy"]
        if bad and self.options.strict:
            raise EngineBuildError(
                f"{self.final}: --strict, and TensorRT's log has {len(bad)} finding(s) about accuracy:\n"
                + "\n\n".join(finding.text() for finding in bad),
                path=str(self.final),
                log=[finding.line for finding in bad],
            )

    # --- calibration

    def _prepare_calibration(self) -> None:
        path = self.options.calib_cache
        if self.data is None:
            return
        cached = path is not None and Path(path).exists() and not self.options.recalibrate
        if cached:
            assert path is not None
            calibration_cache.check_cache(path, **self._calibration_identity())
            self.calibration_bytes = Path(path).read_bytes()
            self.note(f"the calibration cache {path} fits and is used; the data set is not read")
        else:
            self.reporter.title("checking the calibration data")
            self.data.check()
        for finding in self.data.findings:
            self.note(str(finding))

    def _calibration_identity(self) -> dict[str, Any]:
        return {
            "model": self.digest.sha256,
            "data": self.data,
            "algorithm": self.options.calib_algorithm,
            "tensorrt": self.here.tensorrt,
        }

    def _read_calibration(self, answer: Answer) -> None:
        if self.data is None:
            return
        path = self.options.calib_cache
        used = self.calibration_bytes is not None
        calls = answer.result["calibration_batches"]
        calibration_cache.check_calls(calls, batches=self.data.batches, cached=path if used else None)
        inputs = [_network_input(info) for info in answer.result["inputs"]]
        tensors = calibration_cache.network_tensors(inputs, answer.result["layers"])
        content = answer.arrays.get("calibration_cache")
        written = self.calibration_bytes if content is None else content.tobytes()
        if written is None:
            raise EngineBuildError(
                f"{self.final}: TensorRT read the calibration data and wrote no cache, so nothing says what ranges the "
                "plan has.",
                path=str(self.final),
            )
        cache = calibration_cache.parse_cache(written, path or "TensorRT's calibration cache")
        if not used and path is not None:
            calibration_cache.save_cache(path, written, **self._calibration_identity())
        # The levels of auto share one calibration.
        self.calibration_bytes = self.calibration_bytes or (written if path is not None else None)
        covered = calibration_cache.coverage(cache, tensors)
        without = calibration_cache.check_log(answer.log, tensors)
        self.tables["calibration"] = covered.text()
        self.calibrated = {
            **self.data.to_mapping(),
            "algorithm": self.options.calib_algorithm,
            "cache": {"sha256": _sha256(written), "used": used},
            "coverage": covered.to_mapping(),
            "without_range": without,
        }

    # --- trying it

    def _cases(self, answer: Answer) -> list[Case]:
        inputs = [_network_input(info) for info in answer.result["inputs"]]
        profiles = [Profile.from_mapping(entry) for entry in answer.result["profiles"]]
        given = load_npz(self.options.inputs, "--inputs") if self.options.inputs is not None else None
        return parity.points(profiles, self._as_built(inputs), given=given, seed=self.options.seed)

    def _as_built(self, inputs: Sequence[NetworkInput]) -> list[NetworkInput]:
        """The types that the plan takes, which --io-formats may have changed."""
        changed = {entry.name: entry.dtype for entry in self.config.io_formats if entry.dtype is not None}
        return [dataclasses.replace(one, dtype=changed.get(one.name, one.dtype)) for one in inputs]

    def _load_request(self) -> dict[str, Any]:
        return {
            "device": self.options.device,
            "plugins": list(self.config.plugins),
            "refit": str(self.model.path) if self.options.strip_plan else None,
        }

    def _try(self, plan: Path, cases: Sequence[Case], timeout: float | None, runs: int) -> Answer:
        self.reporter.title(f"trying {self.final.name}")
        return tried(
            plan,
            cases,
            self._load_request(),
            library=self.here.library,
            reporter=self.reporter,
            timeout=timeout,
            layer_runs=runs,
        )

    def _compare(self, answer: Answer, cases: Sequence[Case], found: Answer) -> parity.ParityReport:
        thresholds = self.options.thresholds(self.config.precision)
        if not self.options.parity:
            return parity.not_run("--no-parity", thresholds)
        if self.references is None and self.reference_note is None:
            self._reference(answer, cases)
        if self.references is None:
            return parity.not_run(self.reference_note or "there is no reference", thresholds)
        return compare(cases, found, self.references, thresholds, self._forced_types())

    def _forced_types(self) -> dict[str, str]:
        return {entry.name: entry.dtype for entry in self.config.io_formats if entry.dtype is not None}

    def _reference(self, answer: Answer, cases: Sequence[Case]) -> None:
        source = from_text(self.options.reference) if self.options.reference is not None else {}
        self.reporter.title("computing the reference")
        shapes = {info["name"]: list(info["shape"]) for info in answer.result["outputs"]}
        try:
            if source.get("kind") == "tensorrt fp32":
                self.references = self._tensorrt_reference(cases)
                return
            # The reference takes the model's own types.
            own = {info.name: info.dtype for info in self.model.inputs}
            self.references = reference_outputs(
                self.model.path, cases, source, outputs=shapes, own_types=own, reporter=self.reporter
            )
        except NoReferenceError as error:
            self.reference_note = str(error)
        except BuildCrashError as error:
            if error.how == "interrupted":
                raise
            self.reference_note = str(error)

    def _tensorrt_reference(self, cases: Sequence[Case]) -> list[Reference]:
        """The same model built without any lower precision, as a reference where onnxruntime has none."""
        plain = BuildOptions.from_mapping(
            {
                **self.options.to_mapping(),
                **dict.fromkeys(("fp32_patterns", "io_formats", "set_flags"), ()),
                **dict.fromkeys(("fp32_norms", "strip_plan", "int8_only", "weight_streaming", "strict"), False),
                **dict.fromkeys(("calib_data", "calib_cache", "timing_cache", "require_precision", "levels"), None),
                **dict.fromkeys(("level_timeout", "levels_timeout"), None),
                **dict.fromkeys(("recalibrate", "retry_levels"), False),
                "precision": "fp32",
                "opt_level": 3,
                "strongly_typed": False,
            }
        )
        config = native_config(
            plain,
            tensorrt=self.here.tensorrt,
            quantization=self.model.quantization,
            sm=self.here.machine.sm,
            integrated=self.here.integrated,
            jetson=self.here.machine.l4t is not None,
            available_memory=None,
            model_dtypes=self.model.dtypes,
        )
        with _beside(self.final, "reference") as plan:
            twin = dataclasses.replace(self, options=plain, config=config, data=None, findings=[], notes=list(self.notes))
            twin._one(plan, None, self._left())
            started = time.monotonic()
            found = twin._try(plan, cases, self._left(), 0)
        versions = {"tensorrt": self.here.machine.tensorrt}
        return [
            Reference("tensorrt fp32", outputs, versions, time.monotonic() - started, {"tf32": "off"})
            for outputs in outputs_of(found, len(cases))
        ]

    # --- opt_level="auto"

    def _levels(self, temporary: Path, stack: contextlib.ExitStack) -> tuple[levels.LevelTable, Answer]:
        answers: dict[Path, Answer] = {}
        found: dict[Path, Answer] = {}

        def build(level: int, *, timeout: float) -> levels.Built:
            plan = stack.enter_context(_beside(self.final, f"level{level}"))
            answers[plan] = self._one(plan, level, timeout)
            return levels.Built(plan, answers[plan].result["seconds"], answers[plan].result["bytes"])

        def opts(plan: Path) -> list[Case]:
            cases = self._cases(answers[plan])
            return [case for case in cases if case.point == "opt"]

        def try_run(plan: Path, *, timeout: float) -> levels.Trial:
            cases = opts(plan)
            self.reporter.title(f"running {plan.name} again and again")
            request = {
                **self._load_request(),
                "plan": str(plan),
                "cases": len(cases),
                "runs": levels.MIN_RUNS,
                "seconds": levels.MIN_SECONDS,
            }
            answer = run_job(
                "trial", request, _packed(cases), timeout=timeout, watcher=self.reporter, library=self.here.library
            )
            return levels.Trial(tuple(answer.result["runs"]), tuple(answer.result["seconds"]))

        def compared(plan: Path, *, timeout: float) -> parity.ParityReport:
            cases = self._cases(answers[plan])
            found[plan] = self._try(plan, cases, timeout, _LAYER_RUNS)
            return self._compare(answers[plan], cases, found[plan])

        def race(plans: Mapping[int, Path], *, timeout: float) -> Mapping[int, Sequence[float]]:
            self.reporter.title(f"timing levels {', '.join(map(str, plans))} side by side")
            cases = opts(next(iter(plans.values())))
            request = {
                **self._load_request(),
                "plans": {str(level): str(plan) for level, plan in plans.items()},
                "cases": len(cases),
                "rounds": 200,
                "seconds": min(timeout / 2, 60.0),
            }
            answer = run_job(
                "race", request, _packed(cases), timeout=timeout, watcher=self.reporter, library=self.here.library
            )
            return {int(level): seconds for level, seconds in answer.result["rounds"].items()}

        total = self.options.levels_timeout or 4 * 3600.0
        left = self._left()
        table = levels.search(
            self.options.tried_levels,
            build=build,
            try_run=try_run,
            compare=compared,
            race=race,
            memory=levels.Remembered(
                tensorrt=self.here.machine.tensorrt,
                gpu=self.here.machine.gpu,
                sm_count=self.here.machine.sm_count,
                model_sha256=self.digest.sha256,
                options={**self.options.shaping(), "levels": None},
            ),
            level_seconds=self.options.level_timeout or 3600.0,
            total_seconds=total if left is None else min(total, left),
            retry=self.options.retry_levels,
        )
        self.tables["levels"] = table.table()
        Path(table.plan).replace(temporary)
        return table, answers[table.plan]

    # --- what is kept

    def _manifest(self, plan: Path, answer: Answer, table: levels.LevelTable | None) -> Manifest:
        cases = self._cases(answer)
        checked = self.options.audit or self.options.parity
        found = self._try(plan, cases, self._left(), _LAYER_RUNS) if checked else None
        audited = self._audit(found)
        report = self._compare(answer, cases, found) if found is not None else parity.not_run("--no-parity")
        self.tables["parity"] = report.table()
        if self.options.parity:
            parity.gate(report, allow_not_run=not self.options.strict)
            if report.state == "not run":
                self.note(f"parity was NOT checked: {report.reason}")
        options = self.options
        inputs, outputs = (_tensors(answer, found, kind) for kind in ("inputs", "outputs"))
        timing = answer.result["timing_cache"]
        return Manifest(
            jetrt=_core.build_info()["version"],
            origin="build",
            key=self.key,
            engine=EngineFile.of(plan, self.final.name),
            model=model_file(self.model, self.digest),
            options=options.to_mapping(),
            command=tuple(options.command(self.model.path, self.final)),
            machine=self.here.machine,
            calibration=self.calibrated,
            timing_cache={"sha256": timing["sha256"]} if timing["sha256"] is not None else None,
            stripped=options.strip_plan,
            refittable=options.refittable or options.strip_plan,
            version_compatible=options.version_compatible,
            hardware_compatibility=options.hardware_compatibility,  # type: ignore[arg-type]
            inputs=inputs,
            outputs=outputs,
            profiles=tuple(answer.result["profiles"]),
            build=BuildReport(
                seconds=round(answer.result["seconds"], 3),
                phases=answer.phases,
                level=answer.result["level"],
                peak_host_bytes=answer.memory["peak_host_bytes"],
                findings=tuple(self.findings),
            ),
            levels=None if table is None else table.to_mapping(),
            audit=None if audited is None else audited.to_mapping(),
            parity=Parity(**report.to_mapping() | {"cases": tuple(report.to_mapping()["cases"])}),
        )

    def _audit(self, found: Answer | None) -> Audit | None:
        if not self.options.audit or found is None:
            return None
        times = layer_times(found.result["layer_times"])
        audited = audit(found.result["inspector"], times, self.config.precision)
        self.tables["precision"] = audited.table(limit=15)
        for finding in audited.findings:
            self.note(finding)
            self.findings.append({"kind": "precision", "text": finding})
        if self.options.require_precision is not None:
            check(audited, self.options.require_precision)
        return audited


class _Batches:
    """Answers the child's questions for calibration batches."""

    def __init__(self, data: calibration.CalibrationData | None) -> None:
        self._batches: Iterator[Mapping[str, Array]] | None = None if data is None else iter(data)

    def __call__(self, question: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Array]]:
        batch = next(self._batches, None) if self._batches is not None else None
        if batch is None:
            return {"more": False}, {}
        return {"more": True}, {name: batch[name] for name in question["names"]}


# --------------------------------------------------------------------------------------------- shared with verify, stamp


class NoReferenceError(Exception):
    pass


def tried(
    plan: Path,
    cases: Sequence[Case],
    load: Mapping[str, Any],
    *,
    library: str | None,
    reporter: Reporter,
    timeout: float | None = None,
    layer_runs: int = 0,
) -> Answer:
    """Runs a plan on every case in a child."""
    chosen = next((index for index, case in enumerate(cases) if case.point == "opt"), 0)
    request = {
        **load,
        "plan": str(plan),
        "cases": len(cases),
        "layer_runs": layer_runs,
        "layer_case": chosen,
        "layer_profile": cases[chosen].profile,
    }
    return run_job("run", request, _packed(cases), timeout=timeout, watcher=reporter, library=library)


def reference_outputs(
    onnx: Path,
    cases: Sequence[Case],
    source: Mapping[str, Any],
    *,
    outputs: Mapping[str, Sequence[int]],
    own_types: Mapping[str, str],
    reporter: Reporter,
) -> list[Reference]:
    """The reference at every case, in a child: a model that breaks onnxruntime breaks nothing else."""
    request = {
        "onnx": str(onnx),
        "source": dict(source),
        "outputs": {name: list(shape) for name, shape in outputs.items()},
        "cases": len(cases),
        "places": [[case.profile, case.point] for case in cases],
    }
    arrays = {
        f"{index}/{name}": _as_type(array, own_types.get(name))
        for index, case in enumerate(cases)
        for name, array in case.inputs.items()
    }
    answer = run_job("reference", request, arrays, watcher=reporter)
    if "unavailable" in answer.result:
        raise NoReferenceError(answer.result["unavailable"])
    found = outputs_of(answer, len(cases))
    return [
        Reference(entry["kind"], one, entry["versions"], entry["seconds"], entry["settings"])
        for entry, one in zip(answer.result["references"], found, strict=True)
    ]


def _as_type(array: Array, dtype: str | None) -> Array:
    """Inputs of a plan whose types --io-formats changed, as the model has them: exact where the plan's type is narrower."""
    from .arrays import dtype_name, to_bfloat16, widened

    if dtype is None or dtype == dtype_name(array):
        return array
    return to_bfloat16(widened(array)) if dtype == "bfloat16" else widened(array).astype(dtype)


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


def _packed(cases: Sequence[Case]) -> dict[str, Array]:
    return {f"{index}/{name}": array for index, case in enumerate(cases) for name, array in case.inputs.items()}


def outputs_of(answer: Answer, count: int) -> list[dict[str, Array]]:
    found: list[dict[str, Array]] = [{} for _ in range(count)]
    for key, array in answer.arrays.items():
        index, _, name = key.partition("/")
        found[int(index)][name] = array
    return found


def _network_input(info: Mapping[str, Any]) -> NetworkInput:
    names = tuple(info["dimension_names"])
    return NetworkInput(info["name"], info["dtype"], tuple(info["shape"]), info["shape_tensor"], names)


def _tensors(answer: Answer, found: Answer | None, kind: str) -> tuple[Tensor, ...]:
    """As the loaded plan has them; as the network had them where the plan was not tried."""
    if found is not None:
        rows: Iterable[Mapping[str, Any]] = found.result[kind]
    else:
        rows = [
            {**info, "location": "host" if info["shape_tensor"] else "device", "format": "unknown"}
            for info in answer.result[kind]
        ]
    return tuple(
        Tensor(row["name"], row["dtype"], tuple(row["shape"]), row["location"], row["format"] or "unknown")
        for row in rows
    )


@contextlib.contextmanager
def _beside(final: Path, what: str) -> Iterator[Path]:
    """A name for a plan of this process, in the folder of the final one; removed at the end, if it is still there."""
    from ..provenance import temporary_for

    path = temporary_for(final.with_name(f"{final.name}.{what}"))
    path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
