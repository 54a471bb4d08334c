"""Rows of "tensorrt": a plan, given or built, called the way that shows its parts.

A call is what trtexec's is: copies of all inputs from page-locked memory, the engine, copies of all outputs back, on
one stream, then a wait. CUDA events lie between the parts; the host's clock tells how long the engine's call took to
return (enqueue) and when everything was there (end to end). With data="device" the inputs are in device memory before
and the outputs stay there, so that the engine is all there is.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..builder.arrays import Array
from ..builder.onnx_file import OnnxFile
from ..builder.options import BuildOptions
from ..builder.pipeline import BuildResult, build_plan
from ..builder.profiles import NetworkInput
from ..builder.progress import Reporter
from ..errors import BuildOptionError, CudaError, LibraryNotFoundError, ManifestError, UnsupportedVersionError
from ..provenance import EngineFilenameSchema, Machine, Manifest
from . import _cuda
from .inputs import batch_of, size_of, sized, values
from .options import BenchOptions
from .session import Session, SkippedError, network_inputs
from .subjects import Subject
from .timing import Sample

__all__ = ["Built", "EngineSession"]

#: (model, precision, shapes of the dynamic inputs) -> the plan.
Built = dict[tuple[Path, str, tuple[tuple[str, tuple[int, ...]], ...]], BuildResult]


class EngineSession(Session):
    _engine: Any

    @classmethod
    def open(
        cls,
        subject: Subject,
        precision: str | None,
        batch: int | None,
        contexts: int,
        options: BenchOptions,
        *,
        reporter: Reporter,
        sole: bool,
        built: Built,
    ) -> EngineSession:
        """`built` has the plans of earlier rows, and gets that of this one."""
        session = cls()
        session._options = options
        if options.device == "cpu":
            raise SkippedError("tensorrt runs on GPUs, and --device is cpu")
        device = int(options.device)
        try:
            _core.library_info()
        except (LibraryNotFoundError, UnsupportedVersionError, CudaError) as error:
            raise SkippedError(str(error)) from error
        assert subject.path is not None
        plan = subject.path
        if subject.kind == "onnx":
            assert precision is not None
            plan = session._build(subject, precision, batch, device, reporter, sole, built)
        else:
            session._as_built(plan, precision)
        reporter.title(f"loading {plan}")
        begin = time.perf_counter()
        engine = _core.Engine(
            plan,
            device=device,
            graphs=options.graphs,  # type: ignore[arg-type]
            max_contexts=contexts,
            plugins=tuple(options.build.get("plugins", ())),
        )
        session._engine = engine
        try:
            session.load_seconds = time.perf_counter() - begin
            session.runs = str(plan)
            session._gpu = _cuda.device(device)
            infos = network_inputs(engine.inputs)
            session.batch = session.frames = batch_of(infos, batch, options)
            usual = {name: info.profiles[0][1] for name, info in engine.inputs.items() if info.profiles}
            shapes = sized(infos, session.batch, options, usual, named=subject.name, sole=sole)
            session.size = size_of(shapes)
            session.inputs = session._values(infos, shapes, sole)
            session.shapes = {  # as trtexec takes them: of a shape tensor its values
                info.name: tuple(map(int, session.inputs[info.name].ravel()))
                if info.shape_tensor
                else shapes[info.name]
                for info in infos
            }
        except BaseException:
            engine.close()
            raise
        if _core.build_info()["profile"] != "release":
            session.notes.append("jetrt is a debug build: host times are several times too long")
        return session

    # ------------------------------------------------------------------------------------------------ opening

    def _as_built(self, plan: Path, precision: str | None) -> None:
        """What the manifest of a plan says; the plan cannot be made another one."""
        try:
            manifest = Manifest.read(plan)
        except ManifestError as error:
            self.notes.append(f"its manifest: {error}")
            manifest = None
        options: Any = (manifest.options if manifest is not None else None) or {}
        known = options.get("precision") if isinstance(options, Mapping) else None
        self.precision = str(known) if known else "own"
        if manifest is not None:
            self._from_manifest(manifest)
        if precision is not None and known is not None and precision != known:
            raise SkippedError(f"the plan was built for {known}, not {precision}: give its ONNX to build another one")

    def _build(
        self,
        subject: Subject,
        precision: str,
        batch: int | None,
        device: int,
        reporter: Reporter,
        sole: bool,
        built: Built,
    ) -> Path:
        path = subject.path
        assert path is not None
        infos = OnnxFile.open(path).network_inputs()
        shapes = sized(infos, batch_of(infos, batch, self._options), self._options, named=subject.name, sole=sole)
        dynamic = {info.name: shapes[info.name] for info in infos if -1 in info.shape}
        key = (path, precision, tuple(dynamic.items()))
        result = built.get(key)
        if result is None:
            result = built[key] = self._built(path, precision, dynamic, device, reporter)
            self.compiled_now = result.built
            self.notes += result.notes
        if not self.compiled_now:
            self.notes.append("the plan was there already; its compile time is that of its own build")
        self.precision = precision
        self._from_manifest(result.manifest)
        return result.path

    def _built(
        self, path: Path, precision: str, dynamic: Mapping[str, tuple[int, ...]], device: int, reporter: Reporter
    ) -> BuildResult:
        bounds: dict[str, Any] = {}
        if dynamic:
            # One shape alone, so that the plan is tuned for what is measured.
            bounds = {bound: ({name: list(s) for name, s in dynamic.items()},) for bound in ("min", "opt", "max")}
        # The bench compares the outputs itself, for every runtime alike; a plan that differs is measured and marked.
        chosen = {"parity": False, **_fitting(self._options.build, precision), **bounds}
        chosen |= {"precision": precision, "device": device}
        folder = self._options.plans or path.parent
        try:
            options = BuildOptions.from_mapping(chosen, "jetrt bench")
            stem = _tagged(path.stem, dynamic, _special(options))
            name = EngineFilenameSchema.for_machine(stem, Machine.here(device), precision)
            folder.mkdir(parents=True, exist_ok=True)
            return build_plan(path, folder / str(name), options, reporter=reporter)
        except BuildOptionError as error:  # int8 without data, a precision that this GPU has not: nothing was started
            raise SkippedError(str(error)) from error

    def _from_manifest(self, manifest: Manifest) -> None:
        self.compile_seconds = manifest.build.seconds if manifest.build is not None else None
        audit = manifest.audit
        shares = audit.get("shares") if isinstance(audit, Mapping) else None
        self.audit = shares if isinstance(shares, Mapping) else None

    def _values(self, infos: list[NetworkInput], shapes: dict[str, tuple[int, ...]], sole: bool) -> dict[str, Array]:
        hidden = [info.name for info in infos if info.shape_tensor and not self._given(info.name)]
        if hidden:
            raise SkippedError(
                f"input {', '.join(hidden)} is a shape tensor, whose allowed values a plan does not tell: give --inputs"
            )
        return values(infos, shapes, self._options, sole=sole)

    def _given(self, name: str) -> bool:
        if self._options.inputs is None:
            return False
        with np.load(self._options.inputs, allow_pickle=False) as archive:
            return name in archive.files

    # ------------------------------------------------------------------------------------------------ calling

    def call(self) -> _EngineCall:
        call = _EngineCall(self._engine, self._gpu, self.inputs, on_host=self._options.data == "host")
        self._calls.append(call)
        return call

    def outputs(self) -> dict[str, Any]:
        return {
            name: np.array(np.asarray(value)) for name, value in self._engine.run(self.inputs, synchronize=True).items()
        }

    def finish(self) -> None:
        stats = self._engine.stats
        replays, eager = stats["replays"], stats["eager"]
        self.graph = "graph" if replays > eager else "eager"
        if self._options.graphs == "auto" and replays <= eager:
            why = (
                "; ".join(dict.fromkeys(stats["graph_failures"].values()))
                or "no CUDA graph was captured for these addresses"
            )
            self.notes.append(f"{eager} of {eager + replays} calls ran without a CUDA graph: {why}")
        if stats["strided_copies"] or stats["casts"]:
            self.notes.append(f"{stats['strided_copies']} strided copies and {stats['casts']} casts were made")

    def close(self) -> None:
        self._engine.close()  # first: it waits for the streams that it was called on
        for call in self._calls:
            call.close()

    _options: BenchOptions
    _gpu: _cuda.Device
    shapes: dict[str, tuple[int, ...]]
    graph: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_EngineCall] = []


def _fitting(build: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """What is said for one precision of several is left out for the others, where it would be a contradiction."""
    calibrated = precision in ("int8", "mixed")
    return {
        name: value
        for name, value in build.items()
        if (calibrated or not name.startswith(("calib_", "recalibrate")))
        and (precision != "fp32" or name not in ("fp32_norms", "fp32_patterns"))
        and (precision == "int8" or name != "int8_only")
    }


def _special(options: BuildOptions) -> dict[str, Any]:
    """What was asked of the builder beside precision and shapes."""
    usual = BuildOptions(precision=options.precision).shaping()
    found = options.shaping()
    return {name: found[name] for name in found if name not in ("min", "opt", "max") and found[name] != usual[name]}


def _tagged(stem: str, dynamic: Mapping[str, tuple[int, ...]], special: Mapping[str, Any]) -> str:
    """The model's part of a plan's name: with the shapes and other options, since a plan for others is another one."""
    words = [re.sub("__+", "_", stem).strip("_.") or "model"]
    if dynamic:
        shapes = "-".join("x".join(map(str, shape)) for shape in dynamic.values())
        words.append(shapes if len(shapes) <= 60 else _digest(dynamic))
    if special:
        words.append(_digest(special))
    return "-".join(words)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


class _EngineCall:
    """Calls for one thread: its stream, its events, its device memory."""

    def __init__(self, engine: Any, gpu: _cuda.Device, inputs: Mapping[str, Array], *, on_host: bool) -> None:
        gpu.enter()
        self._engine, self._gpu, self._on_host = engine, gpu, on_host
        self._stream = _cuda.Stream(gpu)
        self._events = [_cuda.Event() for _ in range(4)]
        # Addresses, since asking numpy for one takes a microsecond; the arrays are kept alive beside them.
        self._copies: list[tuple[_cuda.DeviceArray, int]] = []
        self._kept: list[Array] = []
        self._given: dict[str, Any] = {}
        self._back: dict[str, tuple[int, Array]] = {}
        self._thread: int | None = None
        try:
            self._place(inputs)
        except BaseException:  # no memory for all of them
            self.close()
            raise

    def _place(self, inputs: Mapping[str, Array]) -> None:
        for name, array in inputs.items():
            if self._engine.inputs[name].location == "host" or not _cuda.shown(array.dtype):
                self._given[name] = array  # read by the CPU; or of a type that goes through jetrt's own staging
                continue
            here = _pinned(array)
            there = _cuda.on_device(array, self._gpu.index)
            self._copies.append((there, here.ctypes.data))
            self._kept.append(here)
            there.upload(here.ctypes.data, self._stream)
            self._given[name] = there
        self._stream.wait()

    def __call__(self) -> Sample:
        if self._thread != threading.get_ident():
            self._gpu.enter()  # in this thread, once
            self._thread = threading.get_ident()
        return self._with_copies() if self._on_host else self._alone()

    def _alone(self) -> Sample:
        clock, stream = time.perf_counter, self._stream
        start, end = self._events[1], self._events[2]
        begin = clock()
        start.record(stream)
        called = clock()
        outputs = self._engine.run(self._given, stream=stream.handle)
        returned = clock()
        end.record(stream)
        stream.wait()
        done = clock()
        del outputs
        return Sample((done - begin) * 1e3, (returned - called) * 1e3, None, end.since(start), None)

    def _with_copies(self) -> Sample:
        clock, stream = time.perf_counter, self._stream
        first, start, end, last = self._events
        begin = clock()
        first.record(stream)
        for there, here in self._copies:
            there.upload(here, stream)
        start.record(stream)
        called = clock()
        outputs = self._engine.run(self._given, stream=stream.handle)
        returned = clock()
        end.record(stream)
        for name, tensor in outputs.items():
            if isinstance(tensor, _core.Tensor):
                _cuda.download(self._target(name, tensor.nbytes), tensor.data_ptr, tensor.nbytes, stream)
        last.record(stream)
        stream.wait()
        done = clock()
        del outputs
        return Sample(
            (done - begin) * 1e3, (returned - called) * 1e3, start.since(first), end.since(start), last.since(end)
        )

    def _target(self, name: str, nbytes: int) -> int:
        address, array = self._back.get(name, (0, None))
        if array is None or len(array) < nbytes:
            array = _core.pinned_empty(max(nbytes, 1), np.uint8)
            address = array.ctypes.data
            self._back[name] = (address, array)
        return address

    def close(self) -> None:
        self._gpu.enter()
        self._stream.wait()
        for there, _ in self._copies:
            there.close()
        for event in self._events:
            event.close()
        self._stream.close()


def _pinned(array: Array) -> Array:
    """A copy in page-locked memory."""
    copy = _core.pinned_empty(max(array.nbytes, 1), np.uint8)
    copy[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return copy
