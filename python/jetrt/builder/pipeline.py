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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import _core, known_failures, platform
from ..errors import BuildCrashError, BuildOptionError, EngineBuildError
from ..provenance import (
    BuildReport,
    EngineFile,
    EngineFilenameSchema,
    Manifest,
    build_once,
    key_of,
    temporary_for,
)
from ..report import size
from . import calibrating, levels, parity
from .arrays import Array, load_npz
from .audit import Audit, audit, check
from .calibrating import Calibration
from .cases import Case
from .configure import NativeConfig, native_config
from .onnx_file import Digest, OnnxFile
from .options import BuildOptions
from .process import Answer
from .profiles import Profile
from .progress import Reporter
from .reference import Reference, from_text
from .system import prepared_system
from .trying import (
    Here,
    NoReferenceError,
    compare,
    explained_job,
    identify,
    in_own_types,
    layer_times,
    model_file,
    network_inputs,
    outputs_of,
    packed,
    parity_record,
    reference_outputs,
    tensors,
    tried,
)

__all__ = ["BuildResult", "build_plan", "fp32_reference"]

_LAYER_RUNS = 20
#: Of the race between levels.
_ROUNDS, _RACE_SECONDS = 200, 60.0

#: Seconds that a step may still take; ``None``: any number.
Left = Callable[[], float | None]


@dataclass(frozen=True)
class BuildResult:
    """A plan that is there now. `built` is false where the same one was there already."""

    path: Path
    manifest: Manifest
    built: bool
    #: Sentences that the user should read, in order.
    notes: tuple[str, ...] = ()
    #: Tables of the build for the terminal: levels, calibration, precision, parity; empty when nothing was built.
    tables: Mapping[str, str] = field(default_factory=dict)
    #: The network's layers as JSON, before TensorRT fused them; ``None`` when nothing was built.
    network: str | None = None


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
    config = _configuration(model, options, here, calibrator=calibration_data is not None)
    if config.dla_core is not None:
        raise BuildOptionError(
            f"--dla-core {config.dla_core}: this machine and TensorRT have a DLA, and jetrt does not build for it yet. "
            f"Build with trtexec --useDLACore={config.dla_core}, and give the plan a manifest with `jetrt stamp`.",
            option="--dla-core",
        )
    final = Path(engine) if engine is not None else _named(model, here, config.precision)
    calibration = calibrating.opened(model, digest.sha256, options, calibration_data, here.machine)
    key = key_of(
        model_sha256=digest.sha256,
        options=options.shaping(),
        calibration_sha256=None if calibration is None else calibration.key,
        machine=here.machine,
    )
    work = _Build(model, digest, final, options, here, config, calibration, key, reporter, begin)
    for note in config.notes:
        work.note(note)
    manifest, built = build_once(
        final,
        key,
        work.make,
        options=options.to_mapping(),
        model_sha256=digest.sha256,
        machine=here.machine,
        overwrite=options.overwrite,
        rebuild=options.rebuild,
        timeout=work.left(),
        on_wait=reporter.note,
    )
    return BuildResult(final, manifest, built, tuple(work.notes), work.tables, work.network)


def _configuration(model: OnnxFile, options: BuildOptions, here: Here, *, calibrator: bool = False) -> NativeConfig:
    return native_config(
        options,
        tensorrt=here.tensorrt,
        quantization=model.quantization,
        sm=here.machine.sm,
        integrated=here.integrated,
        jetson=here.machine.l4t is not None,
        available_memory=platform.identify().memory_available,
        model_dtypes=model.dtypes,
        calibrator=calibrator,
    )


def _named(model: OnnxFile, here: Here, precision: str) -> Path:
    return model.path.with_name(str(EngineFilenameSchema.for_machine(model.path.stem, here.machine, precision)))


def _built(
    model: OnnxFile,
    plan: Path,
    options: BuildOptions,
    config: NativeConfig,
    here: Here,
    reporter: Reporter,
    timeout: float | None,
    level: int | None = None,
    calibration: Calibration | None = None,
) -> Answer:
    """Builds a plan in a child."""
    request: dict[str, Any] = {
        "onnx": str(model.path),
        "plan": str(plan),
        "config": config.to_mapping(),
        "options": options.to_mapping(),
        "device": options.device,
        "level": level,
        "timing_cache": options.timing_cache,
    }
    arrays: dict[str, Array] = {}
    if calibration is not None:
        request["calibration"], arrays = calibration.request()
    return explained_job(
        "build",
        request,
        arrays,
        here=here,
        timeout=timeout,
        ask=None if calibration is None else calibration.batches(),
        watcher=reporter,
        environment=config.environment,
    )


@dataclass
class _Build:
    model: OnnxFile
    digest: Digest
    final: Path
    options: BuildOptions
    here: Here
    config: NativeConfig
    calibration: Calibration | None
    key: str
    reporter: Reporter
    begin: float
    notes: list[str] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)
    #: What a reader of the manifest should know: of the log and of the precision.
    findings: list[dict[str, Any]] = field(default_factory=list)
    references: list[Reference] | None = None
    no_reference: str | None = None
    network: str | None = None

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.reporter.note(text)

    def left(self) -> float | None:
        """Seconds that --timeout leaves."""
        if self.options.timeout is None:
            return None
        return max(self.options.timeout - (time.monotonic() - self.begin), 0.1)

    def make(self, temporary: Path) -> Manifest:
        """`build_once` calls this with the name of a file that does not exist yet."""
        with contextlib.ExitStack() as stack:
            if self.options.prepare_system:
                self.reporter.clear()  # it may ask
                stack.enter_context(prepared_system(yes=self.options.yes, say=self.reporter.note))
            if self.calibration is not None:
                self.reporter.title("checking the calibration data")
                self.calibration.prepare(self.note)
            table = None
            if self.options.opt_level == "auto":
                table, answer = self._levels(temporary, stack)
            else:
                answer = self._one(temporary, None, self.left())
        return self._manifest(temporary, answer, table)

    # --- building

    def _one(self, plan: Path, level: int | None, timeout: float | None) -> Answer:
        self.reporter.title(f"building {self.final.name}" + ("" if level is None else f", level {level}"))
        answer = _built(
            self.model, plan, self.options, self.config, self.here, self.reporter, timeout, level, self.calibration
        )
        self.network = json.dumps(answer.result["layers"], indent=1)
        self._explain([line for _, line in answer.log], "TensorRT's log")
        if self.calibration is not None:
            self.calibration.read(answer)
            self.tables["calibration"] = self.calibration.table
        if answer.result["timing_cache"]["problem"]:
            self.note(answer.result["timing_cache"]["problem"])
        return answer

    def _explain(self, lines: Sequence[str], whose: str) -> None:
        """What the table of known failures says about lines of a build that did not fail."""
        found = known_failures.explain(lines, tensorrt=self.here.tensorrt, stage="build", gpu=self.here.machine.gpu)
        for finding in found:
            if finding.kind != "note" and finding.to_mapping() not in self.findings:
                self.findings.append(finding.to_mapping())
                self.note(finding.text())
        bad = [finding for finding in found if finding.kind == "accuracy"]
        if bad and self.options.strict:
            raise EngineBuildError(
                f"{self.final}: --strict, and {whose} has {len(bad)} finding(s) about accuracy:\n"
                + "\n\n".join(finding.text() for finding in bad),
                path=str(self.final),
                log=[finding.line for finding in bad],
            )

    # --- trying it

    def _cases(self, answer: Answer) -> list[Case]:
        profiles = [Profile.from_mapping(entry) for entry in answer.result["profiles"]]
        given = load_npz(self.options.inputs, "--inputs") if self.options.inputs is not None else None
        forced = self._forced_types()
        inputs = [dataclasses.replace(one, dtype=forced.get(one.name, one.dtype)) for one in network_inputs(answer)]
        return parity.points(profiles, inputs, given=given, seed=self.options.seed)

    def _forced_types(self) -> dict[str, str]:
        """Of --io-formats."""
        return {entry.name: entry.dtype for entry in self.config.io_formats if entry.dtype is not None}

    def _load_request(self) -> dict[str, Any]:
        return {
            "device": self.options.device,
            "plugins": list(self.config.plugins),
            "refit": str(self.model.path) if self.options.strip_plan else None,
        }

    def _try(self, plan: Path, cases: Sequence[Case], timeout: float | None, layer_runs: int = 0) -> Answer:
        self.reporter.title(f"trying {self.final.name}")
        return tried(
            plan,
            cases,
            self._load_request(),
            here=self.here,
            reporter=self.reporter,
            timeout=timeout,
            layer_runs=layer_runs,
        )

    def _compare(self, answer: Answer, cases: Sequence[Case], found: Answer, left: Left) -> parity.ParityReport:
        thresholds = self.options.thresholds(self.config.precision)
        if not self.options.parity:
            return parity.not_run("--no-parity", thresholds)
        if self.references is None and self.no_reference is None:
            self._reference(answer, cases, left)
        if self.references is None:
            return parity.not_run(self.no_reference or "there is no reference", thresholds)
        return compare(cases, found, self.references, thresholds, self._forced_types())

    def _reference(self, answer: Answer, cases: Sequence[Case], left: Left) -> None:
        source = from_text(self.options.reference) if self.options.reference is not None else {}
        self.reporter.title("computing the reference")
        try:
            if source.get("kind") == "tensorrt fp32":
                self.references = fp32_reference(
                    self.model, self.final, self.options, self.here, cases, self.reporter, left
                )
                return
            self.references = reference_outputs(
                self.model.path,
                cases,
                source,
                outputs={info["name"]: list(info["shape"]) for info in answer.result["outputs"]},
                own_types=_own_types(self.model),
                reporter=self.reporter,
                timeout=left(),
            )
        except NoReferenceError as error:
            self.no_reference = str(error)
        except BuildCrashError as error:
            if error.how in ("interrupted", "timeout"):
                raise
            self.no_reference = str(error)

    # --- opt_level="auto"

    def _levels(self, temporary: Path, stack: contextlib.ExitStack) -> tuple[levels.LevelTable, Answer]:
        answers: dict[Path, Answer] = {}

        def build(level: int, *, timeout: float) -> levels.Built:
            plan = stack.enter_context(_beside(self.final, f"level{level}"))
            answers[plan] = self._one(plan, level, timeout)
            return levels.Built(plan, answers[plan].result["seconds"], answers[plan].result["bytes"])

        def again_and_again(job: str, plan: Path, timeout: float, more: Mapping[str, Any]) -> dict[str, Any]:
            """At the optimum of every profile."""
            cases = [case for case in self._cases(answers[plan]) if case.point == "opt"]
            request = {**self._load_request(), "cases": len(cases), **more}
            return explained_job(
                job, request, packed(cases), here=self.here, timeout=timeout, watcher=self.reporter
            ).result

        def try_run(plan: Path, *, timeout: float) -> levels.Trial:
            self.reporter.title(f"running {self.final.name} again and again")
            limits = {"plan": str(plan), "runs": levels.MIN_RUNS, "seconds": levels.MIN_SECONDS}
            result = again_and_again("trial", plan, timeout, limits)
            return levels.Trial(tuple(result["runs"]), tuple(result["seconds"]))

        def compared(plan: Path, *, timeout: float) -> parity.ParityReport:
            end = time.monotonic() + timeout
            cases = self._cases(answers[plan])
            found = self._try(plan, cases, timeout)
            return self._compare(answers[plan], cases, found, lambda: max(end - time.monotonic(), 0.1))

        def race(plans: Mapping[int, Path], *, timeout: float) -> Mapping[int, Sequence[float]]:
            self.reporter.title(f"timing levels {', '.join(map(str, plans))} side by side")
            rivals = {str(level): str(plan) for level, plan in plans.items()}
            limits = {"plans": rivals, "rounds": _ROUNDS, "seconds": min(timeout / 2, _RACE_SECONDS)}
            result = again_and_again("race", next(iter(plans.values())), timeout, limits)
            return {int(level): seconds for level, seconds in result["rounds"].items()}

        total, left = self.options.levels_timeout or 4 * 3600.0, self.left()
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
        options = self.options
        cases = self._cases(answer)
        found = None
        if options.audit or options.parity:
            found = self._try(plan, cases, self.left(), _LAYER_RUNS if options.audit else 0)
        audited = self._audit(found)
        report = parity.not_run("--no-parity") if found is None else self._compare(answer, cases, found, self.left)
        self.tables["parity"] = report.table()
        if options.parity:
            parity.gate(report, allow_not_run=not options.strict)
            if report.state == "not run":
                self.note(f"parity was NOT checked: {report.reason}")
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
            calibration=None if self.calibration is None else self.calibration.record,
            timing_cache={"sha256": timing["sha256"]} if timing["sha256"] is not None else None,
            stripped=options.strip_plan,
            refittable=options.refittable or options.strip_plan,
            version_compatible=options.version_compatible,
            hardware_compatibility=options.hardware_compatibility,  # type: ignore[arg-type]
            inputs=tensors(_rows(answer, found, "inputs")),
            outputs=tensors(_rows(answer, found, "outputs")),
            profiles=tuple(answer.result["profiles"]),
            build=BuildReport(
                seconds=round(answer.result["seconds"], 3),
                phases=answer.phases,
                level=answer.result["level"],
                peak_host_bytes=answer.memory["peak_host_bytes"],
                findings=(*self.findings, *_memory(found)),
            ),
            levels=None if table is None else table.to_mapping(),
            audit=None if audited is None else audited.to_mapping(),
            parity=parity_record(report),
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
        self._explain(audited.findings, "the precision audit")
        if self.options.require_precision is not None:
            check(audited, self.options.require_precision)
        return audited


def fp32_reference(
    model: OnnxFile,
    final: Path,
    options: BuildOptions,
    here: Here,
    cases: Sequence[Case],
    reporter: Reporter,
    left: Left = lambda: None,
) -> list[Reference]:
    """The same model built in fp32, as a reference where onnxruntime has none. Its plan lies beside `final` meanwhile;
    of `options`, the shapes and what the builder may use count."""
    checks = ("reference", "inputs", "require_precision", "parity_limit", "strict")
    calibration = ("calib_data", "calib_cache", "calib_preprocess", "calib_algorithm", "recalibrate", "int8_only")
    lowered = ("fp32_patterns", "fp32_norms", "strongly_typed", "io_formats", "set_flags", "timing_cache")
    form = ("strip_plan", "refittable", "weight_streaming", "opt_level", "levels", "level_timeout", "levels_timeout")
    dropped = {*checks, *calibration, *lowered, *form, "retry_levels", "dump_layers"}
    kept = {name: value for name, value in options.to_mapping().items() if name not in dropped}
    plain = BuildOptions.from_mapping({**kept, "precision": "fp32"})
    config = _configuration(model, plain, here)
    with _beside(final, "reference") as plan:
        _built(model, plan, plain, config, here, reporter, left())
        started = time.monotonic()
        load = {"device": plain.device, "plugins": list(config.plugins), "refit": None}
        own = in_own_types(cases, _own_types(model))
        found = tried(plan, own, load, here=here, reporter=reporter, timeout=left())
    seconds, versions = time.monotonic() - started, {"tensorrt": here.machine.tensorrt}
    return [
        Reference("tensorrt fp32", outputs, versions, seconds, {"tf32": "off"})
        for outputs in outputs_of(found, len(cases))
    ]


def _memory(found: Answer | None) -> tuple[dict[str, Any], ...]:
    """Scratch memory of one context as the tried plan has it; `jetrt plan` adds it up (`jetrt.fit`)."""
    if found is None:
        return ()
    count = int(found.result["context_bytes"])
    return ({"kind": "memory", "context_bytes": count, "text": f"a context takes {size(count)} of device memory"},)


def _own_types(model: OnnxFile) -> dict[str, str]:
    return {info.name: info.dtype for info in model.inputs}


def _rows(answer: Answer, found: Answer | None, kind: str) -> list[dict[str, Any]]:
    """Tensors as the loaded plan has them; as the network had them where the plan was not tried."""
    if found is not None:
        return list(found.result[kind])
    return [
        {**info, "location": "host" if info["shape_tensor"] else "device", "format": "unknown"}
        for info in answer.result[kind]
    ]


@contextlib.contextmanager
def _beside(final: Path, what: str) -> Iterator[Path]:
    """A name for a plan of this process, in the folder of the final one; removed at the end, if it is still there."""
    path = temporary_for(final.with_name(f"{final.name}.{what}"))
    path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
