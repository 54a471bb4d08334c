"""Whole-loop graphs: a Python function of torch tensors, replayed as one CUDA graph.

    import jetrt

    def act(noise, features):  # calls engines, with torch operations between them
        ...
        return actions

    loop = jetrt.graph(act, (noise, features))  # warms up, captures, compares with an eager run
    actions = loop(noise, features)  # three launches: inputs, graph, outputs

Needs torch with CUDA, which is imported when the first graph is made.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

from . import _core
from ._graph_capture import CapturedGraph, Capturer, NotCapturableError, gate, modes
from ._graph_tree import Trees, UnsupportedValueError, named_arguments, parameter_names
from .errors import GraphCaptureError, InputError

__all__ = ["LoopGraph", "graph"]

# Different reasons that are counted one by one, and failures that are remembered: shapes may be many.
_REASONS = 256


def graph(
    fn: Callable[..., Any],
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    warmup: int = 3,
    max_shapes: int = 8,
    outputs: Literal["copy", "static"] = "copy",
    name: str | None = None,
) -> LoopGraph:
    """A callable that does what `fn` does, by replaying one CUDA graph where it can.

    fn: takes tensors and plain values (numbers, strings, None, enums, dtypes; in tuples, lists, dicts), positionally
        or by name, and returns tensors and plain values likewise. It may call jetrt's engines and drop-ins, torch
        operations, and torch's random numbers. What it reads besides its arguments (weights, attributes, buffers) is
        read where it lay when the graph was captured: update such tensors in place, or make a new graph.
    example_inputs: a tuple or list of positional arguments, or a mapping of named ones, for which a graph is captured
        now. None: `prepare` does it later.
    warmup: eager runs before each capture.
    max_shapes: graphs that are kept; the least recently used one goes first, with its memory.
    outputs: "copy": each call returns new tensors, which stay as they are; "static": the graph's own, which the next
        call overwrites.
    name: what messages call the function.

    Raises TypeError and ValueError for wrong arguments, and what `fn` raises when it runs eagerly for the example.
    """
    made = LoopGraph(fn, warmup=warmup, max_shapes=max_shapes, outputs=outputs, name=name)
    if example_inputs is not None:
        made.prepare(example_inputs)
    return made


class LoopGraph:
    """A function that is replayed as CUDA graphs, one for each set of shapes that was prepared; made by `jetrt.graph`.

    A call with prepared arguments (same structure, names, shapes, dtypes, devices, strides where not contiguous, and
    values of everything that is no tensor; same autocast and deterministic modes) copies the tensors into the graph's
    buffers, launches it, and copies the results out, all on the current stream and without a wait. Anything else runs
    `fn` itself, with the reason in `stats`: a call never captures. It may be called from several threads and streams:
    the launches follow each other. Inside a capture of the caller's, `fn` is run plainly.

    Raises ClosedEngineError when one of the captured engines was closed since, and what `fn` raises.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        warmup: int = 3,
        max_shapes: int = 8,
        outputs: Literal["copy", "static"] = "copy",
        name: str | None = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn: found {type(fn).__name__}; allowed: a callable")
        _check_count("warmup", warmup, 0)
        _check_count("max_shapes", max_shapes, 1)
        if outputs not in ("copy", "static"):
            raise ValueError(f'outputs: found {outputs!r}; allowed: "copy", "static"')
        import torch

        self._torch, self.fn = torch, fn
        self.name: str = name if name is not None else getattr(fn, "__qualname__", type(fn).__qualname__)
        self._warmup, self._max_shapes, self._copies = warmup, max_shapes, outputs == "copy"
        self._trees = Trees(torch)
        self._parameters = parameter_names(fn.forward if isinstance(fn, torch.nn.Module) else fn)
        # Preparing takes long; calls only ever wait for the other one.
        self._preparing, self._lock = threading.RLock(), threading.RLock()
        self._graphs: OrderedDict[Hashable, Prepared] = OrderedDict()
        self._guards = _core._Guards()  # finds those with plain arguments natively
        self._failures: dict[Hashable, str] = {}
        self._unknown: dict[Hashable, str] = {}
        self._capturers: dict[int, Capturer] = {}
        self._counts = {"replays": 0, "eager": 0, "captures": 0, "evicted": 0}
        self._reasons: dict[str, int] = {}
        self._last_reason: str | None = None
        self._closed = False

    # Calls ------------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recording = self._torch.is_grad_enabled()
        found = self._guards.find(args, kwargs, modes(self._torch), recording)
        if found is not None:
            refused, result = self.replay(*found)
            return result if refused is None else self._run_eagerly(refused, args, kwargs)
        tensors: list[Any] = []
        try:
            key = self._key(args, kwargs, tensors)
        except UnsupportedValueError as error:
            return self._run_eagerly(str(error), args, kwargs)
        prepared = self._graphs.get(key)
        if prepared is None:
            return self._run_eagerly(self._why_not(key, tensors, args, kwargs), args, kwargs)
        if recording:
            if any(t.requires_grad for t in tensors):
                return self._run_eagerly(_REQUIRES_GRAD, args, kwargs)
            if not prepared.captured.gradient_free:
                return self._run_eagerly(_NEEDS_GRADIENT, args, kwargs)
        refused, result = self.replay(prepared, tensors)
        return result if refused is None else self._run_eagerly(refused, args, kwargs)

    def replay(self, prepared: Prepared, tensors: list[Any]) -> tuple[str | None, Any]:
        """Launches what was prepared for a call with these tensors: why it did not, or None; and the result."""
        refused, result = prepared.replay(tensors, self._copies)
        if refused is None:
            with self._lock:
                self._counts["replays"] += 1
                if prepared.key in self._graphs:
                    self._graphs.move_to_end(prepared.key)
        return refused, result

    def prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared | None:
        """What was prepared for such a call."""
        return self._graphs.get(self._key(args, kwargs, []))

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Any]) -> Hashable:
        key_of, names = self._trees.key, self._parameters
        parts: list[Hashable] = [
            key_of(value, tensors, names[k] if k < len(names) else f"argument #{k}") for k, value in enumerate(args)
        ]
        if kwargs:
            # In whatever order they are written at the call.
            parts += [(k, key_of(kwargs[k], tensors, k)) for k in sorted(kwargs)]
        return (len(args), *modes(self._torch), *parts)

    def _why_not(self, key: Hashable, tensors: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if self._closed:
            return "this graph was closed"
        failure = self._failures.get(key)
        if failure is not None:
            return failure
        reason = self._unknown.get(key)
        if reason is None:
            try:
                self._device(tensors)
                reason = f"not prepared: {self._describe(args, kwargs)}"
            except NotCapturableError as error:
                reason = str(error)
            with self._lock:
                if len(self._unknown) >= _REASONS:
                    self._unknown.clear()
                self._unknown[key] = reason
        return reason

    def _run_eagerly(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            self._counts["eager"] += 1
            self._last_reason = reason
            counted = reason if reason in self._reasons or len(self._reasons) < _REASONS else "other reasons"
            self._reasons[counted] = self._reasons.get(counted, 0) + 1
        return self.fn(*args, **kwargs)

    def _describe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        found = [
            text
            for name, value in named_arguments(self._parameters, args, kwargs)
            for text in self._trees.describe(value, name)
        ]
        deterministic, dtype = modes(self._torch)
        if dtype is not None:
            found.append(f"under autocast to {dtype}")
        if deterministic:
            found.append("with deterministic algorithms")
        return ", ".join(found) or "no arguments"

    # Preparing --------------------------------------------------------------------------------------------------------

    def prepare(self, *examples: Sequence[Any] | Mapping[str, Any]) -> list[dict[str, Any]]:
        """Captures a graph for each example (a tuple or list of positional arguments, or a mapping of named ones), so
        that calls with such arguments replay it. Waits for the GPU; runs `fn` several times for each, and leaves the
        examples, torch's random numbers and its modes as they were. No other thread may draw random numbers on that
        GPU meanwhile. What could not be captured before is tried again.

        Returns a dict for each: arguments (text), graph (bool), reason (why calls will run eagerly, or None), engines
        (the names of the engines in the graph). Raises GraphCaptureError inside a capture of the caller's, and what
        `fn` raises when it runs.
        """
        return [self._prepare(*_arguments(example)) for example in examples]

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        torch = self._torch
        arguments = self._describe(args, kwargs)
        report: dict[str, Any] = {"arguments": arguments, "graph": True, "reason": None, "engines": ()}
        tensors: list[Any] = []
        try:
            key = self._key(args, kwargs, tensors)
            device = self._device(tensors)
            if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
                return {**report, "graph": False, "reason": _REQUIRES_GRAD}  # without gradients it may work
            with torch.cuda.device(device):
                capturing = torch.cuda.is_current_stream_capturing()
            if capturing or self._closed:
                why = "inside a capture of the caller's" if capturing else "after close()"
                raise GraphCaptureError(f"{self.name}: prepare() {why}. Prepare before that.", reason=why)
            with self._preparing:
                known = self._graphs.get(key)
                if known is not None and known.captured.alive:
                    return {**report, "engines": known.captured.engines}
                self._make_room(key)
                captured = self._capture(device, args, kwargs, tensors)
                self._keep(Prepared(captured, key, arguments, device), args, kwargs)
        except UnsupportedValueError as error:  # there is no key to remember it by: calls find out as quickly
            return {**report, "graph": False, "reason": str(error)}
        except NotCapturableError as error:
            with self._lock:
                if len(self._failures) >= _REASONS:
                    self._failures.pop(next(iter(self._failures)))
                self._failures[key] = str(error)
            return {**report, "graph": False, "reason": str(error)}
        return {**report, "engines": captured.engines}

    def _keep(self, prepared: Prepared, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._lock:
            self._counts["captures"] += 1
            self._failures.pop(prepared.key, None)
            if not self._closed:
                self._graphs[prepared.key] = prepared
                self._guards.add(args, kwargs, modes(self._torch), prepared.captured.gradient_free, prepared)
                return
        prepared.free()  # closed meanwhile

    def _device(self, tensors: Sequence[Any]) -> int:
        """The GPU that all tensors lie on, else torch's current one."""
        devices = {t.device for t in tensors}
        elsewhere = next((d for d in devices if d.type != "cuda"), None)
        if elsewhere is not None:
            raise NotCapturableError(f"an argument lies on {elsewhere}: a graph reads tensors on the GPU")
        if len(devices) > 1:
            raise NotCapturableError(f"the arguments lie on several GPUs ({', '.join(sorted(map(str, devices)))})")
        return int(next(iter(devices)).index if devices else self._torch.cuda.current_device())

    def _make_room(self, key: Hashable) -> None:
        """Frees what another graph will take the place of, before that one takes memory."""
        if key in self._graphs:
            self._free(key)
        while len(self._graphs) >= self._max_shapes:
            self._free(next(iter(self._graphs)))
            with self._lock:
                self._counts["evicted"] += 1

    def _free(self, key: Hashable) -> None:
        prepared = self._graphs.get(key)
        if prepared is not None:
            prepared.free()  # first: it is refused by what runs in the middle of a launch
            self._guards.remove(prepared)
        with self._lock:
            self._graphs.pop(key, None)

    def _capture(
        self, device: int, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Any]
    ) -> CapturedGraph:
        capturer = self._capturers.get(device)
        if capturer is None:
            capturer = self._capturers[device] = Capturer(self.fn, self._trees, device, self._warmup)
        ordered = {k: kwargs[k] for k in sorted(kwargs)}
        names = [
            text
            for name, value in named_arguments(self._parameters, args, ordered)
            for text in self._trees.names(value, name)
        ]
        return capturer.capture(args, ordered, tensors, names)

    # The rest ---------------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> dict[str, Any]:
        """replays, eager (calls that ran `fn`), captures and evicted (graphs), reasons (why calls ran eagerly -> how
        many), shapes (the arguments that graphs are kept for, least recently used first)."""
        with self._lock:
            return {
                **self._counts,
                "reasons": dict(self._reasons),
                "shapes": [prepared.arguments for prepared in self._graphs.values()],
            }

    @property
    def last_reason(self) -> str | None:
        """Why the last call that ran `fn` itself did so; None while every call was replayed."""
        return self._last_reason

    def close(self) -> None:
        """Waits for the last launch and frees all graphs; calls run `fn` from then on. Safe to call again."""
        self._closed = True
        for key in list(self._graphs):
            self._free(key)

    def __enter__(self) -> LoopGraph:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Buffers must not go back to torch while a launch uses them. (Half made, or the interpreter is going down.)
        with contextlib.suppress(Exception):
            self.close()

    def __repr__(self) -> str:
        return f"<jetrt.LoopGraph {self.name}: {len(self._graphs)} graph(s){', closed' if self._closed else ''}>"


class Prepared:
    """A captured graph, and what it was captured for."""

    def __init__(self, captured: CapturedGraph, key: Hashable, arguments: str, device: int) -> None:
        self.captured, self.key, self.arguments = captured, key, arguments
        self._gate = gate(device)

    def replay(self, tensors: Sequence[Any], copies: bool) -> tuple[str | None, Any]:
        with self._gate:
            try:
                return self.captured.replay(tensors, copies)
            except InputError as error:  # a lazily negated tensor, say; nothing was launched
                return str(error), None

    def free(self) -> None:
        self.captured.free()


_REQUIRES_GRAD = "an argument requires grad: call it under torch.inference_mode() or torch.no_grad(), or detach it"
_NEEDS_GRADIENT = (
    "its results need gradients, which a graph does not record: call it under torch.inference_mode() or torch.no_grad()"
)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: found {value!r}; allowed: {least} or more")


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise TypeError(
        f"an example: found {type(example).__name__}; allowed: a tuple or list of positional arguments, or a mapping "
        "of named ones"
    )


class _CallableModule(types.ModuleType):
    """`jetrt.graph` is this function whether or not somebody imported this module, whose name it has."""

    def __call__(self, *args: Any, **kwargs: Any) -> LoopGraph:
        return graph(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
