"""A bench from beginning to end: which rows, each of them, and what is kept after every one."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..builder.onnx_file import OnnxFile
from ..builder.progress import Reporter
from ..builder.reference import ReferenceUnavailable
from ..errors import BuildCrashError, JetrtError, RuntimeNotAvailableError
from . import accuracy, trtexec
from .accuracy import References
from .inputs import BatchError
from .options import AUTOCAST, RUNTIMES, BenchOptions
from .results import BenchReport, Row, total
from .session import HostSession, Session, SkippedError
from .subjects import Subject
from .telemetry import HostMemory, Telemetry, settings
from .timing import PARTS, Measured, Summary, Warmed, measure, warm_up
from .verdict import judge

__all__ = ["PRECISIONS", "rows_of", "run", "runtimes_of"]

#: Without --precision.
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


# ---------------------------------------------------------------------------------------------------------- which rows


def runtimes_of(subject: Subject, options: BenchOptions) -> list[str]:
    """Those that were asked for and run such a subject."""
    asked = RUNTIMES if options.runtimes is None else options.runtimes
    return [name for name in asked if subject.kind in RUNTIMES[name].kinds]


def rows_of(subject: Subject, options: BenchOptions) -> list[Row]:
    """The rows of a subject, those that are skipped from the start included, with the reason."""
    named = runtimes_of(subject, options)
    if not named:
        fitting = ", ".join(name for name, entry in RUNTIMES.items() if subject.kind in entry.kinds)
        reason = f"{subject.name} is {_KIND[subject.kind]}, which is run by {fitting}"
        return [
            Row(subject.name, subject.kind, "", name, None, 1, status="skipped", reason=reason)
            for name in options.runtimes or ()
        ]
    rows = []
    sweep = list(itertools.product(options.batches or (None,), options.concurrency))
    for name in named:
        asked = _precisions(subject, options)
        offered = [p for p in asked if p in RUNTIMES[name].precisions or p == ""]
        if not offered and options.runtimes is None and options.precisions is None:
            continue
        for precision in offered or asked:
            for batch, threads in sweep:
                row = Row(subject.name, subject.kind, precision, name, batch, threads)
                if not offered:
                    allowed = ", ".join(RUNTIMES[name].precisions)
                    row.status, row.reason = "skipped", f"{name} has no precision {precision}; it has {allowed}"
                rows.append(row)
    return rows


_KIND = {"onnx": "an ONNX file", "plan": "a plan", "torch": "a torch module", "callable": "a callable"}


def _precisions(subject: Subject, options: BenchOptions) -> Sequence[str]:
    if subject.kind == "plan":
        return options.precisions or ("",)  # what it was built for
    if subject.kind in ("torch", "callable"):
        # A type that is asked for by name goes before the list, which may be meant for other subjects.
        if options.autocast_dtype is not None or options.precisions is None:
            return (AUTOCAST[options.autocast],)
        usable = tuple(p for p in options.precisions if p in AUTOCAST.values())
        if subject.kind == "torch":
            return options.precisions
        # Without torch there is no autocast, and one row of it is all.
        return usable if usable and "torch" in sys.modules else (usable or options.precisions)[:1]
    return options.precisions or PRECISIONS


# ----------------------------------------------------------------------------------------------------------- all of it


def run(
    subjects: Sequence[Subject],
    options: BenchOptions,
    *,
    reporter: Reporter,
    keep: Callable[[BenchReport], None],
    failed: Sequence[Row] = (),
) -> BenchReport:
    """Every row of every subject. `keep` is called after each row with what there is so far; `failed` are rows of
    subjects that could not even be loaded. Ctrl-C ends it: the report says so, with the row that it hit marked."""
    work = _Bench(subjects, options, reporter, keep)
    work.rows[:0] = failed
    return work.run()


class _Bench:
    def __init__(
        self,
        subjects: Sequence[Subject],
        options: BenchOptions,
        reporter: Reporter,
        keep: Callable[[BenchReport], None],
    ) -> None:
        self.options, self.reporter, self.keep = options, reporter, keep
        self.sole = len(subjects) == 1
        self.telemetry = Telemetry(options.device if isinstance(options.device, int) else 0)
        # A component in several forms is run in those that the runtimes take; the others are no rows of it.
        run = {subject.name for subject in subjects if runtimes_of(subject, options)}
        wanted = [subject for subject in subjects if runtimes_of(subject, options) or subject.name not in run]
        self.work = [(subject, row) for subject in wanted for row in rows_of(subject, options)]
        self.references = {id(subject): References(subject, options) for subject in subjects}
        self.rows = [row for _, row in self.work]
        #: Plans that were built or found, for rows that differ in threads alone.
        self.built: dict[Any, Any] = {}

    def run(self) -> BenchReport:
        started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        report = BenchReport(self.rows, self.options.to_mapping(), _environment(), started)
        if self.telemetry.problem is not None:
            report.notes.append(f"no temperatures, clocks and power: {self.telemetry.problem}")
        waiting = [(subject, row) for subject, row in self.work if row.status == "not run"]
        try:
            for number, (subject, row) in enumerate(waiting, 1):
                self.title = f"row {number} of {len(waiting)}: {row.label}"
                self._row(subject, row)
                self.keep(report)
        except KeyboardInterrupt:
            report.interrupted = True
        for row in self.rows:
            if row.status == "not run":
                row.reason = "Ctrl-C came before it"
        for row in self.rows:  # a row that was not run has the size of its model's others, where they agree
            sizes = {other.imgsz for other in self.rows if other.model == row.model and other.imgsz}
            if not row.imgsz and len(sizes) == 1:
                (row.imgsz,) = sizes
        if self.telemetry.silent:
            report.notes.append(
                "no sensor told a temperature, a clock or the power; whether anything throttled is unknown"
            )
        report.complete = not report.interrupted
        report.rows = [*self.rows, *(total(self.rows) if self.options.totals else ())]
        self.keep(report)
        return report

    # ------------------------------------------------------------------------------------------------ one row

    def _row(self, subject: Subject, row: Row) -> None:
        """Fills the row. Only Ctrl-C leaves it by an exception, and then the row is marked."""
        self.reporter.title(self.title)
        host = HostMemory()
        gpu = _GpuMemory(self.options, row.runtime)
        session: Session | None = None
        try:
            session = self._opened(subject, row)
            self._measured(session, subject, row, host, gpu)
        except (SkippedError, BatchError) as error:
            row.status, row.reason = "skipped", str(error)
        except RuntimeNotAvailableError as error:
            row.status, row.reason = "skipped", str(error)
        except KeyboardInterrupt:
            if row.status != "interrupted":
                measured = row.end_to_end is not None
                when = "after its calls, while its outputs were compared" if measured else "while it was prepared"
                row.status, row.reason = "interrupted", f"Ctrl-C came {when}"
            raise
        except BuildCrashError as error:
            row.status, row.reason = "failed", f"{type(error).__name__}: {error}"
            if error.how == "interrupted":
                row.status, row.reason = "interrupted", "Ctrl-C came while its plan was built"
                raise KeyboardInterrupt from error
        except Exception as error:  # the code of others may raise anything; the other rows go on
            row.status, row.reason = "failed", _told(error)
        finally:
            if session is not None:
                if not row.memory:
                    row.memory = _memory(host, gpu)
                with contextlib.suppress(JetrtError):  # what broke the row breaks its end
                    session.close()
                row.settings = settings()

    def _opened(self, subject: Subject, row: Row) -> Session:
        options, batch = self.options, row.batch
        precision = row.precision or None
        if row.runtime == "tensorrt":
            from .engine_session import EngineSession

            return EngineSession.open(
                subject,
                precision,
                batch,
                row.concurrency,
                options,
                reporter=self.reporter,
                sole=self.sole,
                built=self.built,
            )
        if row.runtime == "python":
            from .callable_session import CallableSession

            return CallableSession.open(subject, row.precision, batch, row.concurrency, options)
        if subject.kind == "torch":
            _available(row.runtime, device="cpu" if options.device == "cpu" else f"cuda:{options.device}")
            from .torch_session import TorchSession

            return TorchSession.open(subject, row.runtime, row.precision, batch, options, sole=self.sole)
        _available(row.runtime)
        if row.runtime == "onnx_trt_ep" and options.device == "cpu":
            raise SkippedError("onnx_trt_ep runs on GPUs, and --device is cpu")
        if row.precision == "int8" and subject.path is not None and not OnnxFile.open(subject.path).quantization:
            raise SkippedError(
                f"int8 on {row.runtime} needs a model with QuantizeLinear and DequantizeLinear nodes, and this one has "
                "none; a row of tensorrt with --calib-data has int8. Ranges are never made up"
            )
        return HostSession.open(subject, row.runtime, row.precision, batch, options, sole=self.sole)

    def _measured(self, session: Session, subject: Subject, row: Row, host: HostMemory, gpu: _GpuMemory) -> None:
        options = self.options
        row.batch, row.frames, row.imgsz = session.batch, session.frames, session.size
        if options.imgsz is not None and not row.imgsz:
            row.imgsz = str(options.imgsz)
        row.precision, row.runs, row.notes = session.precision, session.runs, session.notes
        row.compile_seconds, row.load_seconds = session.compile_seconds, session.load_seconds
        row.compiled_now = session.compiled_now if session.compile_seconds is not None else None
        row.audit = dict(session.audit) if session.audit is not None else None
        gpu.look()
        self.reporter.title(f"{self.title}: warming up")
        try:
            session.first()
        except Exception as error:  # the others may not fail: there are models that take no single frame
            row.notes.append(f"the first call failed: {_told(error)}")
        calls = [session.call() for _ in range(row.concurrency)]
        ticking = self._ticking()
        warmed: Warmed | None = None
        for call in calls:
            try:
                here = warm_up(_ticked(call, ticking), options.timing)
                warmed = here if warmed is None or not here.stable else warmed
            except Exception as error:
                warmed = Warmed(0, 0.0, False, f"it failed: {_told(error)}")
                break
        row.warmup = dataclasses.asdict(warmed) if warmed is not None else None
        gpu.look()
        row.before = self.telemetry.read()
        self.reporter.title(f"{self.title}: measuring")
        found = measure(calls, options.timing, tick=ticking)
        row.after = self.telemetry.read()
        row.memory = _memory(host, gpu)  # before the reference is computed, which is none of its own
        self._figures(row, found, warmed)
        if isinstance(found.stopped, KeyboardInterrupt):
            row.status, row.reason = "interrupted", f"Ctrl-C came after {len(found.samples)} calls"
            raise found.stopped
        if found.stopped is not None:
            row.status, row.reason = "failed", f"call {len(found.samples) + 1}: {_told(found.stopped)}"
            return
        session.finish()
        row.graph = getattr(session, "graph", None)
        self._trtexec(session, row)
        self._judged(session, subject, row)

    def _figures(self, row: Row, found: Measured, warmed: Warmed | None) -> None:
        times = found.part("end_to_end")
        row.end_to_end = Summary.of(times)
        for name in PARTS:
            summary = Summary.of(found.part(name))
            if summary is not None:
                row.parts[name] = summary
        if row.end_to_end is None:
            return
        if found.busy_seconds > 0 and row.frames:
            row.fps = row.frames * len(times) / found.busy_seconds
        if found.limited:
            row.notes.append(
                f"{len(times)} of {self.options.timing.calls * row.concurrency} calls: --time-limit "
                f"{self.options.timing.limit_seconds:g} s ended the row"
            )
        row.verdict, row.verdict_reasons, row.throttled_by = judge(times, warmed, row.before, row.after)
        for name, reading in (("before", row.before), ("after", row.after)):
            if reading is not None and reading.garbage:
                row.notes.append(f"sensors {name} the row gave what cannot be: {', '.join(reading.garbage)}")

    def _judged(self, session: Session, subject: Subject, row: Row) -> None:
        row.status = "ok"
        outputs = session.outputs()
        nan = accuracy.with_nan(outputs)
        if nan is not None:
            row.status, row.reason = "nan", nan
        if subject.kind == "callable" and self.options.reference is None:
            row.accuracy = accuracy.not_compared("a callable is compared with --reference FILE.npz alone")
            return
        self.reporter.title(f"{self.title}: computing the reference")
        try:
            expected, what = self.references[id(subject)].of(session.inputs)
            row.accuracy = accuracy.judged(outputs, expected, what, row.precision)
        except (ReferenceUnavailable, JetrtError) as error:
            row.accuracy = accuracy.not_compared(str(error))

    def _trtexec(self, session: Session, row: Row) -> None:
        shapes = getattr(session, "shapes", None)
        if row.runtime != "tensorrt" or shapes is None or row.runs is None:
            return
        dynamic = {name: shape for name, shape in shapes.items() if name in session.inputs}
        row.trtexec = trtexec.commands(
            row.runs,
            dynamic,
            graph=row.graph == "graph",
            copies=self.options.data == "host",
            timing=self.options.timing,
            threads=row.concurrency,
            device=int(self.options.device),
        )

    def _ticking(self) -> Callable[[], None]:
        begin = time.monotonic()
        return lambda: self.reporter.tick(time.monotonic() - begin)


def _ticked(call: Callable[[], Any], tick: Callable[[], None]) -> Callable[[], Any]:
    def called() -> Any:
        sample = call()
        tick()
        return sample

    return called


class _GpuMemory:
    """Device memory that is in use more than before the row, at the most of the moments it was looked at. Other
    processes count too: CUDA tells no better."""

    def __init__(self, options: BenchOptions, runtime: str) -> None:
        self.used: int | None = None
        self._gpu: Any = None
        self._free = 0
        if options.device == "cpu" or runtime in ("onnx_cpu", "openvino_cpu"):
            return
        with contextlib.suppress(JetrtError, OSError, AttributeError):
            from . import _cuda

            self._gpu = _cuda.device(int(options.device))
            self._free = self._gpu.memory()[0]
            self.used = 0

    def look(self) -> None:
        if self._gpu is not None and self.used is not None:
            with contextlib.suppress(JetrtError):
                self.used = max(self.used, self._free - self._gpu.memory()[0])


def _memory(host: HostMemory, gpu: _GpuMemory) -> dict[str, int | None]:
    gpu.look()
    peak, before = host.peak(), host.before
    added = None if peak is None or before is None else max(peak - before, 0)
    return {"host_peak": peak, "host_added": added, "device_used": gpu.used}


def _available(runtime: str, **options: Any) -> None:
    """Raises `SkippedError` with what is missing."""
    from ..runtime import get_runtime

    try:
        get_runtime(runtime, **options)
    except RuntimeNotAvailableError as error:
        raise SkippedError(str(error)) from error


def _told(error: BaseException) -> str:
    text = str(error).strip()
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def _environment() -> dict[str, Any]:
    """What `jetrt env` says of this machine."""
    try:
        found: dict[str, Any] = importlib.import_module("jetrt.environment").collect()
    except (ImportError, AttributeError, OSError, JetrtError) as error:
        return {"problem": f"{type(error).__name__}: {error}"}
    return found
