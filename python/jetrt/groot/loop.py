"""`optimize(policy)`: the denoising loop of GR00T's action head, noise to actions, as one CUDA graph.

The loop (`denoising.py`) runs over whatever is installed in the head: its torch modules, a DiT that an engine has
replaced, or the four engines of a bundle. The noise is drawn outside the graph, by the call that the original makes,
so that a seed gives the same actions as before.

Nothing is taken on trust. `prepare` runs the original once on the same inputs from the same random state; only where
the loop gives the same bits does it take over, and only for those shapes. Everything else goes to the original: other
shapes, another number of steps, real-time chunking, options, hooks, a part that was exchanged. `stats` says how often,
and why.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from .. import _core
from .._graph_capture import modes
from ..graph import LoopGraph, Prepared, graph
from .baked import Baked
from .denoising import MASKS, FeatureLoop, Inputs, loop_of

__all__ = ["OptimizedLoop", "optimize"]

_log = logging.getLogger("jetrt.groot")

#: (shape, dtype, device) of each tensor of a call; None for a mask that there is not.
_Spec = dict[str, tuple[tuple[int, ...], Any, Any] | None]

_SEEN = 32  # shapes without a graph that are remembered for `prepare()`


class _Entry(NamedTuple):
    """One set of shapes and settings."""

    launch: Prepared | None  # None: prepared, and yet the graph runs eagerly
    noise_at: int  # in the graph's tensors, which are in the order of their names
    in_place: bool  # noise that is drawn where the graph reads it has the same bits


# What stands in for the head's method ---------------------------------------------------------------------------------


class _Prepared:
    """A graph over the parts as they are now, and the calls that it may answer."""

    def __init__(self, captured: LoopGraph, baked: Baked) -> None:
        self.graph = captured
        self.baked = baked
        self.entries: dict[Any, _Entry] = {}
        self.guards = _core._Guards()  # finds them natively, where the tensors lie as they were prepared
        # Of what the original returns: the class and the names.
        self.result: tuple[Any, tuple[str, ...]] = (dict, ("action_pred",))


class OptimizedLoop:
    """Stands in for the action head's method; made by `optimize`. Calling it is calling the head."""

    def __init__(
        self, loop: FeatureLoop, *, outputs: Literal["copy", "static"], max_shapes: int, warmup_calls: int
    ) -> None:
        self._loop = loop
        self._head = loop.head
        self._original: Callable[..., Any] = getattr(loop.head, loop.method)
        self._had = vars(loop.head).get(loop.method)  # what the instance had of its own; None: the class's method
        self._outputs = outputs
        self._max_shapes = max_shapes
        self._warmup_calls = warmup_calls
        self._required, self._known = frozenset(loop.required), frozenset(loop.required + loop.optional)
        self._names, self._accepted = _parameters(self._original)
        self._prepared: _Prepared | None = None
        self._refused: dict[Any, str] = {}
        self._seen: collections.OrderedDict[Any, tuple[_Spec, dict[str, Any]]] = collections.OrderedDict()  # by key
        self._last: _Spec | None = None
        self._timesteps: dict[Any, list[Any]] = {}
        self._result: tuple[Any, tuple[str, ...]] | None = None
        self._counts: collections.Counter[str] = collections.Counter()
        self._originals = 0
        self._counting = threading.Lock()  # held for a moment: no call waits for a capture in another thread
        self._preparing = threading.RLock()
        self._steps_before: int | None = None
        self._active = True
        self.__wrapped__ = self._original  # inspect.signature() shows the original's

    # Calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The head's method: actions from the graph where these shapes were prepared, from the original otherwise."""
        warm_up = self._warmup_calls > 0
        if warm_up:
            self._warmup_calls -= 1
        call = self._bound(args, kwargs)
        if call is None:
            return self._to_original("the arguments are not those of the loop that is known", args, kwargs)
        reason = self._foreign(call)
        if reason is not None:
            return self._to_original(reason, args, kwargs)
        inputs, settings, prepared = self._loop.inputs(call), self._loop.settings(), self._prepared
        found = prepared and prepared.guards.find((), {**inputs, **settings}, modes(torch), False)
        if not prepared or not found:
            reason = _no_tensor(inputs)
            if reason is not None:
                return self._to_original(reason, args, kwargs)
            key = _key(inputs, settings)
            if not prepared or key not in prepared.entries:
                return self._unprepared(key, call, inputs, settings, warm_up)
        reason = prepared.baked.changed()
        if reason is not None:
            return self._to_original(reason, (), self._for_original(call))
        features = inputs["features"]
        if found:
            entry, tensors = found
            noise = self._loop.given_noise(features.shape[0])
            if noise is None:
                noise = _draw if entry.in_place else self._loop.noise(features)
            tensors.insert(entry.noise_at, noise)
            refused, actions = prepared.graph.replay(entry.launch, tensors)
            if refused is None:
                return _as_result(prepared.result, actions, call)
        with torch.no_grad():
            actions = prepared.graph(noise=self._loop.noise(features), **inputs, **settings)
        return _as_result(prepared.result, actions, call)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The call by names, or None where it does not fit: the original then says what is wrong with it."""
        call = kwargs
        if args:
            call = {**dict(zip(self._names, args)), **kwargs}  # noqa: B905 (the rest came by name)
            if len(call) < len(args) + len(kwargs):  # too many, or one of them twice
                return None
        return call if self._required <= call.keys() else None

    def _foreign(self, call: dict[str, Any]) -> str | None:
        """Why a call is none that this loop was made for, or None."""
        if not self._active:
            return "optimize() was undone"
        if not call.keys() <= self._known:
            for name in call.keys() - self._known:
                if call[name] is not None:
                    return f"argument {name!r}, which the loop does not know"
        given = call.get("action_input")
        if given is not None and _contains(given, "action"):
            return "real-time chunking: action_input has 'action'"
        if call.get("options"):
            return f"options were given: {', '.join(sorted(map(str, call['options'])))}"
        if getattr(self._head, "training", False):
            return "the action head is in training mode"
        return None

    def _to_original(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._active:
            with self._counting:
                self._originals += 1
                self._counts[reason] += 1
                first = self._counts[reason] == 1
            if first:
                _log.warning("The original %s runs instead of a graph: %s", self._loop.method, reason)
        return self._original(*args, **kwargs)

    def _unprepared(
        self, key: Any, call: dict[str, Any], inputs: Inputs, settings: dict[str, Any], warm_up: bool
    ) -> Any:
        refused = self._refused.get(key)
        with self._counting:
            self._last = _spec(inputs)
            if refused is None:
                self._seen[key] = self._last, settings
                if len(self._seen) > _SEEN:
                    self._seen.popitem(last=False)
        if refused is not None:
            return self._to_original(refused, (), self._for_original(call))
        if not warm_up:
            reason = "shapes or settings that were not prepared: see `not_prepared`"
            return self._to_original(reason, (), self._for_original(call))
        reason = "a warm-up call, which then prepared what it brought"
        result = self._to_original(reason, (), self._for_original(call))
        try:
            self._prepare(call)
        except Exception as error:  # the call itself was answered
            self._refused[key] = f"preparing it failed: {type(error).__name__}: {error}"
            _log.warning("The original %s stays for these shapes: %s", self._loop.method, self._refused[key])
        return result

    def _for_original(self, call: dict[str, Any]) -> dict[str, Any]:
        """Without what it cannot take: a DiT-only set-up knows no action_input and no options."""
        return {name: call[name] for name in call if self._accepted is None or name in self._accepted}

    # Preparing

    def prepare(self, *examples: int | Mapping[str, Any] | Sequence[Any]) -> list[dict[str, Any]]:
        """Captures these shapes now, so that no live call has to run without a graph.

        An example is S, the number of vision-language tokens (the other shapes are those of the last call, or follow
        from the head's configuration with a batch of 1), a mapping with the keyword arguments of a call, or a sequence
        with its positional ones. Without examples: what `stats["not_prepared"]` lists, as far as the head's number of
        steps and torch's autocast and deterministic modes are the same now.

        Each runs the original once, then the loop, and compares. Both use the random state as it is and put it back.
        Returns, per example, `shapes` (name to shape), `steps`, `captured` and `reason` (None where it was captured).
        Errors of the original are raised; a loop that fails or differs is refused, with the reason.
        """
        if not self._active:
            raise RuntimeError("optimize() was undone: call optimize(policy) again to prepare shapes")
        calls = [self._example(one) for one in examples]
        if not examples:
            now, current = self._loop.settings(), modes(torch)
            with self._counting:
                seen = [spec for key, (spec, then) in self._seen.items() if then == now and key[-1] == current]
            calls = [self._loop.call(_tensors(spec)) for spec in seen]
        return [self._prepare(call) for call in calls]

    def _example(self, example: int | Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
        if isinstance(example, int):
            return self._loop.call(_tensors(self._spec_of_length(example)))
        args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})
        call = self._bound(args, kwargs)
        if call is None:
            raise TypeError(
                f"the example has {sorted(kwargs) or f'{len(args)} arguments'}; {self._loop.method} needs at least "
                f"{', '.join(self._loop.required)}. Give the arguments of a call, or S as an int."
            )
        reason = self._foreign(call) or _no_tensor(self._loop.inputs(call))
        if reason is not None:
            raise ValueError(f"the example cannot be prepared: {reason}")
        return call

    def _spec_of_length(self, length: int) -> _Spec:
        if length < 1:
            raise ValueError(f"S is {length}; the number of vision-language tokens is at least 1")
        loop, config = self._loop, self._head.config
        spec = dict(self._last or {})
        if not spec:
            device = next(self._head.parameters()).device
            state, dtype = loop.state_spec(1)
            spec = {
                "features": ((1, length, config.backbone_embedding_dim), loop.feature_dtype(), device),
                "state": (state, dtype, device),
                "embodiment_id": ((1,), torch.int64, device),
                **dict.fromkeys(MASKS, ((1, length), torch.bool, device)),
            }
        for name in ("features", *MASKS):
            one = spec[name]
            if one is not None:
                spec[name] = ((one[0][0], length, *one[0][2:]), *one[1:])
        return spec

    def _prepare(self, call: dict[str, Any]) -> dict[str, Any]:
        with self._preparing, torch.no_grad():
            prepared = self._current()
            inputs, settings = self._loop.inputs(call), self._loop.settings()
            key, features = _key(inputs, settings), inputs["features"]
            self._make_timesteps(features.shape[0], settings["steps"], settings["buckets"], features.device)
            reason = prepared.baked.changed()
            if reason is None:
                with _kept_random_state(features.device):
                    reason = self._difference(prepared, call, inputs, settings)
                if reason is None:
                    with _kept_random_state(features.device):
                        noise = self._loop.noise(features)
                    (report,) = prepared.graph.prepare({"noise": noise, **inputs, **settings})
                    reason = report["reason"]
                    self._enter(prepared, key, {"noise": noise, **inputs}, settings)
                    self._refused.pop(key, None)
                else:
                    prepared.guards.remove(prepared.entries.pop(key, None))
                    self._refused[key] = reason
                    _log.warning("The original %s stays for S=%d: %s", self._loop.method, features.shape[1], reason)
                with self._counting:
                    self._seen.pop(key, None)
            with self._counting:
                self._last = _spec(inputs)
        return {
            "shapes": _shapes(_spec(inputs)),
            "steps": settings["steps"],
            "captured": reason is None,
            "reason": reason,
        }

    def _enter(self, prepared: _Prepared, key: Any, tensors: Inputs, settings: dict[str, Any]) -> None:
        launch = prepared.graph.prepared((), {**tensors, **settings})
        names = sorted(name for name, tensor in tensors.items() if tensor is not None)
        prepared.guards.remove(prepared.entries.get(key))
        in_place = self._draws_alike(tensors["features"])
        prepared.entries[key] = entry = _Entry(launch, names.index("noise"), in_place)
        if launch is not None:
            inputs = {name: tensor for name, tensor in tensors.items() if name != "noise"}
            prepared.guards.add((), {**inputs, **settings}, modes(torch), True, entry)

    def _draws_alike(self, features: Any) -> bool:
        """Does drawing into a tensor give the bits of the original's call, and leave the generator where that does?"""
        device = features.device
        with _kept_random_state(device):
            before = _random_state(device)
            one, after = self._loop.noise(features), _random_state(device)
            _set_random_state(before, device)
            other = torch.empty(one.shape, dtype=one.dtype, device=device)
            _draw(other)
            same = all(torch.equal(a, b) for a, b in zip(after, _random_state(device), strict=True))
            return same and _same_bits(one, other)

    def _current(self) -> _Prepared:
        """What is captured so far; begun anew where the head's parts were exchanged."""
        if self._prepared is not None and not self._prepared.baked.exchanged():
            return self._prepared
        if self._prepared is not None:
            self._prepared.graph.close()
        self._refused.clear()
        self._loop = loop = type(self._loop)(self._head)
        captured = graph(self._run, max_shapes=self._max_shapes, outputs=self._outputs, name="groot action head")
        self._prepared = _Prepared(captured, Baked(self._head, loop.parts))
        return self._prepared

    def _difference(
        self, prepared: _Prepared, call: dict[str, Any], inputs: Inputs, settings: Mapping[str, Any]
    ) -> str | None:
        """Runs the original and the loop from one random state: why the loop may not stand in, or None."""
        device = inputs["features"].device
        before = _random_state(device)
        result = self._original(**self._for_original(call))
        after = _random_state(device)
        names = tuple(result.keys())
        if "action_pred" not in names or not set(names) <= self._loop.returned:
            return f"the original returns {', '.join(names)}; the loop knows {', '.join(sorted(self._loop.returned))}"
        for name in names:
            if name != "action_pred" and result[name] is not call.get(name):
                return f"the original returns another {name} than it was given"
        _set_random_state(before, device)
        try:
            actions = self._run(noise=self._loop.noise(inputs["features"]), **inputs, **settings)
            again = _as_result((type(result), names), actions, call)
        except Exception as error:  # a head that is not what it looks like: the original knows how to run it
            return f"the loop does not fit this head: {type(error).__name__}: {error}"
        if not all(torch.equal(a, b) for a, b in zip(after, _random_state(device), strict=True)):
            return "the original draws other random numbers than the loop"
        if not _same_bits(result["action_pred"], again["action_pred"]):
            _set_random_state(before, device)
            twice = self._original(**self._for_original(call))
            if not _same_bits(result["action_pred"], twice["action_pred"]):
                return "the original gives other actions each time from the same noise: nothing can be compared with it"
            return "the original gives other actions from the same noise: this head has a loop of its own"
        prepared.result = (type(result), names)
        return None

    def _make_timesteps(self, batch: int, steps: int, buckets: int, device: Any) -> None:
        # Before any capture: made inside one, they would be filled by its replays alone.
        key = (batch, steps, buckets, device)
        if key not in self._timesteps:
            self._timesteps[key] = _timesteps(*key)

    def _run(self, *, steps: int, buckets: int, horizon: int, positions: bool, masked: bool, **inputs: Any) -> Any:
        """What is captured."""
        features = inputs["features"]
        key = (features.shape[0], steps, buckets, features.device)
        timesteps = self._timesteps.get(key) or _timesteps(*key)
        return self._loop.run(timesteps, inputs, horizon=horizon, positions=positions, masked=masked)

    # The rest

    @property
    def stats(self) -> dict[str, Any]:
        """What `jetrt.graph` counts (since the last change of the head's parts), and since `optimize`:

        `original`: calls that the original answered; `reasons`: text to count, for those and for calls that ran without
        a graph; `not_prepared`: steps and shapes of calls that came without being prepared, the latest last.
        """
        prepared = self._prepared
        found: dict[str, Any] = {"replays": 0, "eager": 0, "captures": 0, "evicted": 0, "shapes": []}
        found.update(prepared.graph.stats if prepared is not None else {})
        with self._counting:
            found["reasons"] = {**found.get("reasons", {}), **self._counts}
            found["original"] = self._originals
            found["not_prepared"] = [
                {"steps": settings["steps"], **_shapes(spec)} for spec, settings in self._seen.values()
            ]
        return found

    def undo(self) -> None:
        """Puts the original back and frees the graphs. Harmless when called again."""
        with self._preparing:
            if not self._active:
                return
            self._active = False  # also where somebody wrapped this object: it passes everything on from here
            head, method = self._head, self._loop.method
            if vars(head).get(method) is self:
                if self._had is None:
                    delattr(head, method)
                else:
                    setattr(head, method, self._had)
            if self._steps_before is not None:
                head.num_inference_timesteps = self._steps_before
            if self._prepared is not None:
                self._prepared.graph.close()
                self._prepared = None
            self._timesteps.clear()

    def __repr__(self) -> str:
        counts = self.stats
        return f"<optimized {self._loop.method}: {counts['replays']} replays, {counts['original']} by the original>"


def optimize(
    policy: Any,
    *,
    example: Any = None,
    denoising_steps: int | None = None,
    outputs: Literal["copy", "static"] = "copy",
    max_shapes: int = 8,
    warmup_calls: int = 0,
) -> OptimizedLoop:
    """Replaces the denoising loop of a GR00T N1.6 or N1.7 policy by one CUDA graph per shape.

    policy: has `model.action_head`, or is such a policy's wrapper. Call it after engines were installed.
    example: what `OptimizedLoop.prepare` takes (S, or the arguments of a call as a mapping or tuple), or a list of
        such.
    denoising_steps: sets the head's `num_inference_timesteps`; `undo()` sets it back.
    outputs: "copy", or "static": the actions are overwritten by the next call.
    max_shapes: so many shapes keep their graphs, the least recently used goes first.
    warmup_calls: so many calls from now on may stop to prepare the shapes that they bring. 0: no call ever does, and
        shapes that `prepare` did not see run on the original.

    Returns a handle with `prepare`, `stats` and `undo`. Raises TypeError where the head has no loop that is known.
    """
    head = _action_head(policy)
    loop = loop_of(head)
    if isinstance(getattr(head, loop.method), OptimizedLoop):
        raise RuntimeError(f"{loop.method} is optimized already: use that handle, or undo() it first")
    if denoising_steps is not None and denoising_steps < 1:
        raise ValueError(f"denoising_steps is {denoising_steps}; it must be at least 1")
    handle = OptimizedLoop(loop, outputs=outputs, max_shapes=max_shapes, warmup_calls=warmup_calls)
    if denoising_steps is not None:
        handle._steps_before = head.num_inference_timesteps
        head.num_inference_timesteps = denoising_steps
    setattr(head, loop.method, handle)
    if example is not None:
        examples = example if isinstance(example, list) else [example]
        try:
            handle.prepare(*examples)
        except BaseException:
            handle.undo()
            raise
    return handle


def _action_head(policy: Any) -> Any:
    for owner in (policy, getattr(policy, "policy", None)):
        head = getattr(getattr(owner, "model", None), "action_head", None)
        if head is not None:
            return head
    raise TypeError(f"{type(policy).__name__} has no model.action_head; give the Gr00tPolicy")


# Helpers --------------------------------------------------------------------------------------------------------------


def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, ...], frozenset[str] | None]:
    """Names of the positional parameters in their order, and all that may be given by name (None: any)."""
    found = inspect.signature(function).parameters.values()
    positional = tuple(one.name for one in found if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD))
    if any(one.kind is one.VAR_KEYWORD for one in found):
        return positional, None
    return positional, frozenset(one.name for one in found if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY))


def _as_result(kind: tuple[Any, tuple[str, ...]], actions: Any, call: Mapping[str, Any]) -> Any:
    make, names = kind
    return make({name: actions if name == "action_pred" else call[name] for name in names})


def _no_tensor(inputs: Inputs) -> str | None:
    """Which input is none, or None."""
    for name, tensor in inputs.items():
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name not in MASKS):
            return f"{name} is no tensor, but {type(tensor).__name__}"
    return None


def _contains(batch: Any, name: str) -> bool:
    try:
        return name in batch
    except TypeError:  # no container: its attributes are all there is
        return hasattr(batch, name)


def _key(inputs: Inputs, settings: Mapping[str, Any]) -> Any:
    tensors = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in inputs.values())
    return tensors, tuple(settings.values()), modes(torch)


def _spec(inputs: Inputs) -> _Spec:
    return {name: None if t is None else (tuple(t.shape), t.dtype, t.device) for name, t in inputs.items()}


def _shapes(spec: _Spec) -> dict[str, tuple[int, ...] | None]:
    return {name: None if one is None else one[0] for name, one in spec.items()}


def _tensors(spec: _Spec) -> Inputs:
    """Tensors of these shapes. Half of the tokens are the image's: a row that attends to nothing would give NaN."""
    made: Inputs = {}
    for name, one in spec.items():
        if one is None:
            made[name] = None
            continue
        shape, dtype, device = one
        if name == "image_mask":
            half = torch.arange(shape[1], device=device) < (shape[1] + 1) // 2
            made[name] = half.to(dtype).unsqueeze(0).expand(shape).contiguous()
        elif name == "backbone_attention_mask":
            made[name] = torch.ones(shape, dtype=dtype, device=device)
        elif name == "embodiment_id":
            made[name] = torch.zeros(shape, dtype=dtype, device=device)
        else:
            # Between -1 and 1, and no draw from the generator.
            ramp = torch.arange(math.prod(shape), device=device) % 17
            made[name] = (ramp.to(torch.float32) / 8.0 - 1.0).to(dtype).reshape(shape)
    return made


def _timesteps(batch: int, steps: int, buckets: int, device: Any) -> list[Any]:
    return [
        torch.full(size=(batch,), fill_value=int(step / float(steps) * buckets), dtype=torch.int64, device=device)
        for step in range(steps)
    ]


def _draw(place: Any) -> None:
    """What `torch.randn` does with the memory that it allocates."""
    place.normal_()


def _random_state(device: Any) -> list[Any]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(states: list[Any], device: Any) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextlib.contextmanager
def _kept_random_state(device: Any) -> Iterator[None]:
    states = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(states, device)


def _same_bits(a: Any, b: Any) -> bool:
    """NaN equals NaN here, and -0 differs from 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))
