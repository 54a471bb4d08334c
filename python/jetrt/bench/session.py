"""A row's subject, opened on its runtime and ready to be called; and how to open it on the CPU runtimes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..builder.arrays import Array
from ..builder.onnx_file import OnnxFile
from ..builder.profiles import NetworkInput
from ..runtime import BuildConfig, get_runtime
from .inputs import batch_of, size_of, sized, values
from .options import RUNTIMES, BenchOptions
from .subjects import Subject
from .timing import Call, Sample

__all__ = ["HostSession", "Session", "SkippedError"]


class SkippedError(Exception):
    """This row cannot be had here; the message says why."""


class Session:
    """What a row measures. Made by its class's `open`, closed after the row."""

    #: Samples, frames or what a call works on at once.
    frames: int = 1
    batch: int = 1
    #: "480", "736x960", "970x1024".
    size: str = ""
    #: Of what was compiled for this row or an earlier run; ``None`` where nothing is compiled.
    compile_seconds: float | None = None
    #: Whether that was done now.
    compiled_now: bool = False
    load_seconds: float | None = None
    #: What runs: a plan's path for a row of "tensorrt".
    runs: str | None = None
    #: As it turned out ("own": nothing says it).
    precision: str = "own"

    def __init__(self) -> None:
        self.notes: list[str] = []
        #: Shares of the precisions in the time of a plan's layers, as its build found.
        self.audit: Mapping[str, Any] | None = None
        self.inputs: dict[str, Array] = {}

    def call(self) -> Call:
        """What one thread calls. All that it needs is allocated now."""
        raise NotImplementedError

    def first(self) -> None:
        """The first call of the row, the smallest that there is."""
        self.outputs()

    def outputs(self) -> dict[str, Any]:
        """The results of one call as numpy arrays; what is no array is left out."""
        raise NotImplementedError

    def finish(self) -> None:
        """Adds what the calls showed to the notes."""

    def close(self) -> None: ...


class HostSession(Session):
    """A runtime whose calls are finished when they return: onnx_cpu, openvino_cpu, onnx_trt_ep."""

    @classmethod
    def open(
        cls, subject: Subject, runtime: str, precision: str, batch: int | None, options: BenchOptions, *, sole: bool
    ) -> HostSession:
        session = cls()
        session.precision = precision
        assert subject.path is not None
        infos = OnnxFile.open(subject.path).network_inputs()
        session.batch = session.frames = batch_of(infos, batch, options)
        shapes = sized(infos, session.batch, options, named=subject.name, sole=sole)
        session.size = size_of(shapes)
        session.inputs = values(infos, shapes, options, sole=sole)
        config: dict[str, Any] = {}
        if runtime in ("onnx_cpu", "openvino_cpu") and options.threads is not None:
            config["threads"] = options.threads
        if runtime == "onnx_trt_ep":
            config["device"] = options.device
        chosen = get_runtime(runtime, **config)
        dynamic = {info.name: shapes[info.name] for info in infos if -1 in info.shape and runtime == "onnx_trt_ep"}
        profiles = tuple((name, shape, shape, shape) for name, shape in dynamic.items())
        begin = time.perf_counter()
        entry = chosen.compile_engine(
            subject.path,
            BuildConfig(precision=precision, optimization_profiles=profiles),  # type: ignore[arg-type]
        )
        compiled = time.perf_counter()
        session._runtime, session._handle = chosen, chosen.deserialize_engine(entry)
        session.load_seconds = time.perf_counter() - compiled
        report = session._handle.model.load_report
        if RUNTIMES[runtime].compiles:
            session.compile_seconds = report.get("compile_seconds", compiled - begin)
            session.compiled_now = True
        session.runs = str(subject.path)
        return session

    _runtime: Any
    _handle: Any

    def outputs(self) -> dict[str, Any]:
        return dict(self._handle.model.run(self.inputs, synchronize=True))

    def call(self) -> Call:
        run, inputs, clock = self._handle.model.run, self.inputs, time.perf_counter

        def call() -> Sample:
            begin = clock()
            run(inputs, synchronize=True)
            return Sample((clock() - begin) * 1e3)

        return call

    def close(self) -> None:
        self._runtime.release_engine(self._handle)


def network_inputs(tensors: Mapping[str, Any]) -> list[NetworkInput]:
    """What a loaded model says of its inputs."""
    return [
        NetworkInput(name, info.dtype, tuple(info.shape), info.location == "host" and bool(info.profiles))
        for name, info in tensors.items()
    ]
