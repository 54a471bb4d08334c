"""Rows of "python": a callable of the user's, as it is.

Three ways of calling it:

- once for each sample, with the inputs as keyword arguments;
- with a whole clip (`clip` names that argument): frames per second are the frames of the clip over the time of a call;
- frame by frame (`per_frame`): a runner with state. It is told of a new clip by its method `reset`, where it has one,
  and called once for each frame; a sample is one frame.

Arguments that its signature does not take are left out, and named. Where a wrapper takes anything (``**kwargs``) and
what it wraps does not, the TypeError of the first call says which one it was; that is left out too, and the first call
made again.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..builder.arrays import Array, load_npz
from ..errors import BenchOptionError, CudaError, LibraryNotFoundError
from . import _cuda
from .inputs import check_batch, size_of
from .options import AUTOCAST, BenchOptions
from .session import Session, SkippedError
from .subjects import Subject
from .timing import Call, Sample

__all__ = ["CallableSession", "accepted"]


class CallableSession(Session):
    @classmethod
    def open(
        cls, subject: Subject, precision: str, batch: int | None, threads: int, options: BenchOptions
    ) -> CallableSession:
        session = cls()
        session._function, session._options = subject.target, options
        session.runs = subject.text
        dtype = next(name for name, short in AUTOCAST.items() if short == precision)
        if options.device != "cpu":
            with contextlib.suppress(LibraryNotFoundError, CudaError, AttributeError):
                session._gpu = _cuda.device(int(options.device))
        session._autocast, autocasts = _autocast(dtype, options)
        session.precision = precision if autocasts else "own"
        first = next((p for p in options.precisions or () if p in AUTOCAST.values()), precision)
        if not autocasts and precision != first:
            raise SkippedError("the callable decides about its own precision: no torch autocast applies to it")
        if options.per_frame and threads > 1:
            raise SkippedError("--per-frame calls a runner that may have state, which several threads would mix up")
        arguments = session._gather(subject, batch)
        session._keep(*accepted(subject.target, arguments))
        if options.clip is not None:
            if batch not in (None, 1):
                raise SkippedError(f"--batch {batch}: with --clip a call takes one clip, or one frame of it")
            session._open_clip(subject)
        else:
            check_batch(subject, batch, {**arguments, **dict(enumerate(session._positional))}, options)
            session.batch = session.frames = batch or 1
        return session

    _function: Any
    _options: BenchOptions
    _autocast: Any
    _clip: Any = None

    def __init__(self) -> None:
        super().__init__()
        self._gpu: _cuda.Device | None = None
        self._positional: tuple[Any, ...] = ()
        self._named: dict[str, Any] = {}

    # ---------------------------------------------------------------------------------------------- arguments

    def _gather(self, subject: Subject, batch: int | None) -> dict[str, Any]:
        options = self._options
        found: dict[str, Any] = {}
        example = subject.example_inputs(batch or 1)
        if isinstance(example, Mapping):
            found |= example
        elif example is not None:
            self._positional = tuple(example) if isinstance(example, (tuple, list)) else (example,)
        generator = np.random.default_rng(options.seed)
        for name, (shape, dtype) in options.shapes.items():
            sized = (batch or shape[0], *shape[1:]) if name != options.clip and shape else shape
            found[name] = generator.standard_normal(sized).astype(dtype or "float32")
        if options.inputs is not None:
            found |= load_npz(options.inputs, "--inputs")
        arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
        self.size = size_of({name: array.shape for name, array in arrays.items()})
        self.inputs = arrays
        return {**found, **options.arguments}

    def _keep(self, named: dict[str, Any], dropped: list[str]) -> None:
        self._named = named
        if dropped:
            self.notes.append(f"left out, since its signature does not take them: {', '.join(dropped)}")

    def _open_clip(self, subject: Subject) -> None:
        name = self._options.clip
        assert name is not None
        if name not in self._named:
            raise BenchOptionError(
                f"--clip {name}: {subject.name} is given {', '.join(self._named) or 'no arguments'}. Give the frames "
                f"with --inputs FILE.npz (an array {name!r}) or --shape {name}=32x480x640x3.",
                option="--clip",
                found=name,
                allowed=list(self._named),
            )
        self._clip = self._named[name]
        if len(self._clip) == 0:
            raise BenchOptionError(f"--clip {name}: there is no frame in it.", option="--clip")
        self.batch = 1
        self.frames = 1 if self._options.per_frame else len(self._clip)

    # ------------------------------------------------------------------------------------------------ calling

    def _with(self, clip: Any) -> dict[str, Any]:
        return self._named if clip is None else {**self._named, str(self._options.clip): clip}

    def _run(self, clip: Any = None) -> Any:
        return self._function(*self._positional, **self._with(clip))

    def _reset(self) -> None:
        reset = getattr(self._function, "reset", None)
        if callable(reset):
            reset()

    def first(self) -> None:
        """One frame, under the same autocast as the measurement."""
        while True:
            try:
                with self._autocast():
                    self._reset()
                    self._run(self._piece(1))
                    self._wait()
                return
            except TypeError as error:
                match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
                if match is None or match[1] not in self._named or match[1] == self._options.clip:
                    raise
                self._named = {name: value for name, value in self._named.items() if name != match[1]}
                self.notes.append(f"left out, since the first call refused it: {match[1]} ({error})")

    def _piece(self, frames: int | None) -> Any:
        """So many frames of the clip (``None``: all) as a call takes them; one frame where it goes frame by frame."""
        if self._clip is None:
            return None
        return self._clip[0] if self._options.per_frame else self._clip[:frames]

    def _wait(self) -> None:
        """For what the callable left running on the GPU, by whatever library."""
        if self._gpu is None:
            return
        self._gpu.wait()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized() and torch.cuda.current_device() != self._gpu.index:
            torch.cuda.synchronize()

    def call(self) -> Call:
        clock = time.perf_counter
        if not self._options.per_frame:

            def whole() -> Sample:
                with self._autocast():
                    begin = clock()
                    self._run(self._clip)
                    self._wait()
                    return Sample((clock() - begin) * 1e3)

            return whole

        position = -1

        def frame() -> Sample:
            nonlocal position
            position = (position + 1) % len(self._clip)
            if position == 0:
                self._reset()  # of a new clip; not part of a frame's time
            with self._autocast():
                begin = clock()
                self._run(self._clip[position])
                self._wait()
                return Sample((clock() - begin) * 1e3)

        return frame

    def outputs(self) -> dict[str, Any]:
        with self._autocast():
            self._reset()
            found = self._run(self._piece(None))
            self._wait()
        return dict(_arrays(found))


def accepted(function: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keyword arguments that its signature takes, and the names of the others."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of C, without one
        return dict(arguments), []
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(arguments), []
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {p.name for p in parameters if p.kind in by_name}
    return (
        {name: value for name, value in arguments.items() if name in names},
        [name for name in arguments if name not in names],
    )


def _autocast(dtype: str, options: BenchOptions) -> tuple[Any, bool]:
    """A function that gives the context of a call, and whether it is torch's autocast. It is where torch has a GPU, or
    where the type was asked for; float32 is autocast switched off."""
    torch = sys.modules.get("torch")
    asked = options.autocast_dtype is not None or options.precisions is not None
    if torch is None or not hasattr(torch, "autocast"):
        if options.autocast_dtype not in (None, "float32"):
            raise SkippedError(
                f"--autocast-dtype {options.autocast_dtype}: the callable has not imported torch, so that there is "
                "nothing to cast. Leave it out, or import torch in its file."
            )
        return contextlib.nullcontext, False
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    if not on_gpu and not asked:
        return contextlib.nullcontext, False
    kind = "cuda" if on_gpu else "cpu"
    if dtype == "float32":
        return (lambda: torch.autocast(kind, enabled=False)), True
    return (lambda: torch.autocast(kind, dtype=getattr(torch, dtype))), True


def _arrays(found: Any) -> dict[str, Array]:
    """Arrays among what a callable answered: an array, or a mapping or sequence of arrays."""
    if isinstance(found, Mapping):
        items = {str(key): value for key, value in found.items()}
    elif isinstance(found, (tuple, list)):
        items = {f"output{index}": value for index, value in enumerate(found)}
    else:
        items = {"output": found}
    arrays = {}
    for name, value in items.items():
        if isinstance(value, (bool, int, float, np.ndarray, np.generic)):
            arrays[name] = np.asarray(value)
        elif type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
            import torch

            from .torch_session import to_array

            arrays[name] = to_array(torch, value)
    return arrays
