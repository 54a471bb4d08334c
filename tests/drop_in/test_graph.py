"""`jetrt.graph`: what is replayed, what runs eagerly and why, and that both give the same bits."""

from __future__ import annotations

import collections
import ctypes
import enum
import gc
import itertools
import random
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import exits
import numpy as np
import pytest
import rig
import torch

import fakes
import jetrt
from jetrt import errors
from jetrt.graph import LoopGraph, graph


@pytest.fixture
def load(clean: None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`load("mlp", options)`: an engine, closed at the end of the test."""
    made: list[Any] = []

    def make(program: Any = "mlp", options: dict[str, Any] | None = None) -> Any:
        path = fakes.write_plan(tmp_path / f"{len(made)}.plan", program)
        made.append(jetrt.Engine(path, **{"graphs": "off", **(options or {})}))
        return made[-1]

    yield make
    while made:
        made.pop().close()


@pytest.fixture
def made(clean: None) -> Iterator[Callable[..., LoopGraph]]:
    """`made(fn, examples, …)`: a graph, closed at the end of the test, before the engines are."""
    graphs: list[LoopGraph] = []

    def make(*args: Any, **options: Any) -> LoopGraph:
        graphs.append(graph(*args, **options))
        return graphs[-1]

    yield make
    while graphs:
        graphs.pop().close()


class Loop:
    """A small denoising loop: an engine called four times, with torch operations and random numbers between."""

    def __init__(self, engine: Any, noisy: bool = True) -> None:
        self.engine, self.noisy = engine, noisy

    def __call__(self, x: torch.Tensor, noise: torch.Tensor, steps: int = 4) -> dict[str, Any]:
        actions = noise
        for step in range(steps):
            scaled = x + torch.full((1,), float(step), device="cuda")
            actions = actions + self.engine(x=scaled)["y"].sum(0) / steps
        if self.noisy:
            actions = actions + torch.randn(8, 10, device="cuda")
        return {"actions": actions, "steps": steps}


@pytest.fixture
def loop(load: Any) -> Iterator[Loop]:
    made = Loop(load("mlp"))
    yield made
    made.engine = None


def inputs(seed: int = 0, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    x, noise = rng.standard_normal((rows, 64)), rng.standard_normal((8, 10))
    return tuple(torch.tensor(a, dtype=torch.float32, device="cuda") for a in (x, noise))  # type: ignore[return-value]


def bits(value: Any) -> Any:
    """The bytes of every tensor."""
    if isinstance(value, torch.Tensor):
        host = value.detach().cpu()
        host = host.to(torch.float32) if host.dtype is torch.bfloat16 else host
        return tuple(value.shape), value.dtype, host.numpy().tobytes()
    if isinstance(value, (tuple, list)):
        return [bits(v) for v in value]
    if hasattr(value, "items"):
        return {k: bits(v) for k, v in value.items()}
    return value


def seeded(fn: Callable[..., Any], *args: Any, seed: int = 7, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return fn(*args, **kwargs)


def counted(made: LoopGraph) -> list[int]:
    return [made.stats[name] for name in ("replays", "eager", "captures", "evicted")]


# Replays --------------------------------------------------------------------------------------------------------------


def test_replays_give_the_bits_of_eager_runs(loop: Any, made: Any) -> None:
    captured = made(loop, inputs())
    results = []
    for seed in range(5):
        wanted = bits(seeded(loop, *inputs(seed), seed=seed))
        got = seeded(captured, *inputs(seed), seed=seed)
        results.append((got, wanted))
    # They stay what they were.
    for got, wanted in results:
        assert bits(got) == wanted
    assert counted(captured) == [5, 0, 1, 0]
    assert captured.last_reason is None
    assert captured.stats["shapes"] == ["x float32[8, 64], noise float32[8, 10]"]
    assert loop.engine.stats["captured_by_caller"] == 4


def test_random_numbers_go_on_as_in_eager_runs(loop: Any, made: Any) -> None:
    captured = made(loop, inputs())

    def run(fn: Any) -> list[Any]:
        torch.manual_seed(3)
        return [bits((fn(*inputs(k)), torch.randn(4, device="cuda"))) for k in range(5)]

    assert run(captured) == run(loop)


def test_preparing_leaves_random_numbers_modes_and_arguments_alone(loop: Any, made: Any) -> None:
    captured, args = made(loop), inputs()
    before = [bits(t) for t in (*args, torch.cuda.get_rng_state(), torch.get_rng_state())]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.cuda.current_stream()
    report = captured.prepare(args, {"x": args[0], "noise": args[1], "steps": 2})
    assert [bits(t) for t in (*args, torch.cuda.get_rng_state(), torch.get_rng_state())] == before
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.cuda.current_stream()) == modes
    assert gc.isenabled()
    assert [(r["graph"], r["reason"], r["engines"]) for r in report] == [(True, None, (loop.engine.path,))] * 2
    assert report[1]["arguments"] == "x float32[8, 64], noise float32[8, 10], steps=2"


def test_static_outputs_are_the_graphs_own(loop: Any, made: Any) -> None:
    captured = made(loop, inputs(), outputs="static")
    first = seeded(captured, *inputs(1))
    wanted = bits(seeded(loop, *inputs(1)))
    assert bits(first) == wanted
    second = seeded(captured, *inputs(2))
    assert second["actions"] is first["actions"]
    assert bits(second) == bits(seeded(loop, *inputs(2)))


def test_three_launches_no_wait_one_allocation_each_result(loop: Any, made: Any) -> None:
    """Also where torch is deterministic, and `empty` fills: only the new result is filled, by one more."""
    loop.noisy = False  # torch sets its seed by kernels of its own
    for deterministic, fills in ((False, 0), (True, 1)):
        torch.use_deterministic_algorithms(deterministic)
        captured = made(loop, inputs())
        args = inputs(1)
        captured(*args)
        torch.cuda.current_stream().synchronize()
        rig.cuda().reset()
        before = collections.Counter(torch._standin.counts)
        captured(*args)
        log = [name for name in rig.cuda().log() if name.startswith("cuGraphLaunch") or "Kernel" in name]
        # The results are made when the GPU works already.
        assert log == ["cuLaunchKernel", "cuGraphLaunch", *["cuLaunchKernel"] * fills, "cuLaunchKernel"]
        assert not [name for name in rig.cuda().log() if "Synchronize" in name or name.startswith("cuMemAlloc")]
        spent = collections.Counter(torch._standin.counts) - before
        assert (spent["waits"], spent["allocations"], spent["fills"]) == (0, 1, fills)


class Kind(enum.Enum):
    FAST = 1


class Pair(NamedTuple):
    first: Any
    second: Any


class Features(collections.UserDict):
    """As transformers' `BatchFeature`: items and attributes."""

    def __init__(self, data: dict[str, Any], kind: str = "features") -> None:
        super().__init__(data)
        self.kind = kind


class Output(collections.OrderedDict):
    """As transformers' `ModelOutput`: every item is an attribute, too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.__dict__[key] = value


def test_structures_go_in_and_come_out(clean: None, made: Any) -> None:
    def fn(pair: Pair, *rest: Any, batch: Any, kind: Kind, options: Any = None) -> Any:
        total = pair.first + pair.second[0] * 2 + rest[0]["a"] + batch["x"] + batch["x"]
        return Pair(total, [total * 2, (None, "text", batch.kind)]), Features({"y": total - 1}, kind=kind.name)

    def example(seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        one, two, three, four = (torch.full((3,), float(seed * 10 + k), device="cuda") for k in range(4))
        return (Pair(one, [two]), {"a": three}), {"batch": Features({"x": four}), "kind": Kind.FAST}

    def named(args: Any, kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    captured = made(named, ((*example(0),)))
    for seed in (1, 2):
        args, kwargs = example(seed)
        got, wanted = captured(args, kwargs), fn(*args, **kwargs)
        assert bits(got) == bits(wanted)
        assert type(got[0]) is Pair
        assert type(got[1]) is Features
        assert got[1].kind == "FAST"
        assert got[0].second[1] == (None, "text", "features")
    assert counted(captured) == [2, 0, 1, 0]


def test_outputs_of_the_models_kind(clean: None, made: Any) -> None:
    captured = made(lambda x: Output(hidden=x + 1, last=x * 2), (torch.zeros(3, device="cuda"),))
    got = captured(torch.ones(3, device="cuda"))
    assert type(got) is Output
    assert got.hidden is got["hidden"]
    assert bits(got) == bits({"hidden": torch.full((3,), 2.0), "last": torch.full((3,), 2.0)})
    assert counted(captured) == [1, 0, 1, 0]


def test_layouts(clean: None, made: Any) -> None:
    """Results have the strides that they have without a graph, unless those leave gaps; inputs may have any that was
    prepared."""
    whole = torch.arange(60, device="cuda", dtype=torch.float32).view(6, 10)
    captured = made(lambda x: (x.t() + 1, x[:, 1:3], x[0] * 2, x.t()))
    examples = {"plain": whole, "transposed": whole.t(), "sliced": whole[:, 2:7], "expanded": whole[:1].expand(4, 10)}
    report = captured.prepare(*((x,) for x in examples.values()))
    assert [(r["graph"], r["reason"]) for r in report] == [(True, None)] * 4
    for name, x in examples.items():
        got, wanted = captured(x + 0 if name == "plain" else x), captured.fn(x)
        assert bits(got) == bits(wanted)
        if name in ("plain", "transposed"):
            for k, (g, w) in enumerate(zip(got, wanted, strict=True)):
                assert g.stride() == w.stride() or (k == 1 and g.is_contiguous())
    assert counted(captured) == [4, 0, 4, 0]


def test_no_arguments_and_several_dtypes(clean: None, made: Any) -> None:
    weight = torch.arange(4, device="cuda", dtype=torch.float32)
    bare = made(lambda: weight * 2, ())
    assert bits(bare()) == bits(weight * 2)
    weight.add_(1)  # in place: seen
    assert bits(bare()) == bits(weight * 2)
    dtypes = [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int64,
        torch.bool,
    ]
    values = tuple(torch.ones(3, 5, device="cuda").to(dtype) for dtype in dtypes)
    many = made(lambda *all_of_them: [x[1:] if x.dtype is torch.bool else x + x for x in all_of_them], values)
    assert bits(many(*values)) == bits(many.fn(*values))
    assert counted(many) == [1, 0, 1, 0]


def test_more_tensors_than_one_launch_copies(clean: None, made: Any) -> None:
    values = [torch.full((2,), float(k), device="cuda") for k in range(30)]
    captured = made(lambda all_of_them: [x + 1 for x in all_of_them], (values,))
    assert bits(captured(values)) == bits([x + 1 for x in values])
    assert counted(captured) == [1, 0, 1, 0]


# Guards ---------------------------------------------------------------------------------------------------------------


def scaled(x: Any, scale: Any = 1, other: Any = None) -> Any:
    return x * (2 if scale else 1) if isinstance(x, torch.Tensor) else x


X = (8, 4)


def other_arguments() -> dict[str, tuple[Callable[[], tuple[tuple[Any, ...], dict[str, Any]]], str]]:
    def x(*shape: int, **options: Any) -> torch.Tensor:
        return torch.ones(*(shape or X), device=options.pop("device", "cuda"), **options)

    return {
        "shape": (lambda: ((x(7, 4), 1), {}), r"not prepared: x float32\[7, 4\], scale=1"),
        "rank": (lambda: ((x(8, 4, 1), 1), {}), r"not prepared: x float32\[8, 4, 1\]"),
        "dtype": (lambda: ((x(dtype=torch.float16), 1), {}), r"not prepared: x float16\[8, 4\]"),
        "strides": (lambda: ((x(4, 8).t(), 1), {}), r"not prepared: x float32\[8, 4\] of strides \(1, 8\)"),
        "host": (lambda: ((x(device="cpu"), 1), {}), r"an argument lies on cpu: a graph reads tensors on the GPU"),
        "value": (lambda: ((x(), 2), {}), "scale=2"),
        "type of value": (lambda: ((x(), 1.0), {}), r"scale=1\.0"),
        "bool": (lambda: ((x(), True), {}), "scale=True"),
        "by name": (lambda: ((x(),), {"scale": 1}), "scale=1"),
        "another name": (lambda: ((x(), 1), {"other": 3}), "other=3"),
        "nothing": (lambda: ((x(),), {}), r"not prepared: x float32\[8, 4\]$"),
        "a container": (lambda: (([x()], 1), {}), r"not prepared: x\.0 float32\[8, 4\]"),
        "an object": (
            lambda: ((x(), SimpleNamespace(a=1)), {}),
            "scale is a types.SimpleNamespace, whose value cannot",
        ),
        "a function": (lambda: ((x(), 1, print), {}), "other is a builtins.builtin_function_or_method, whose value"),
        "an array": (lambda: ((x(), 1), {"other": np.ones(2)}), r"other is a numpy\.ndarray, whose value cannot"),
        "a set": (lambda: ((x(), 1), {"other": {"a": {1}}}), "other is a builtins.set"),
    }


@pytest.mark.parametrize("what", other_arguments())
def test_a_guard_that_fails_runs_eagerly_with_the_reason(clean: None, made: Any, what: str) -> None:
    captured = made(scaled, (torch.ones(*X, device="cuda"), 1))
    arguments, reason = other_arguments()[what]
    args, kwargs = arguments()
    for turn in (1, 2):
        assert bits(captured(*args, **kwargs)) == bits(scaled(*args, **kwargs))
        (found,) = captured.stats["reasons"]
        assert captured.stats["reasons"] == {found: turn}
        assert counted(captured) == [0, turn, 1, 0]  # never captured in a call
        assert captured.last_reason == found
    assert re.search(reason, found), found
    captured(torch.ones(*X, device="cuda"), 1)
    assert counted(captured) == [1, 2, 1, 0]


def test_floats_are_told_apart_by_sign_and_nan_is_never_known(clean: None, made: Any) -> None:
    captured = made(lambda x, s: x * s, (torch.ones(2, device="cuda"), 0.0))
    for value in (0.0, -0.0, float("nan")):
        got = captured(torch.ones(2, device="cuda"), value)
        assert bits(got) == bits(torch.full((2,), value))
    assert counted(captured) == [1, 2, 1, 0]
    assert captured.prepare((torch.ones(2, device="cuda"), float("nan")))[0]["graph"]
    captured(torch.ones(2, device="cuda"), float("nan"))
    assert captured.stats["replays"] == 1


def test_names_in_any_order_and_plain_values(clean: None, made: Any) -> None:
    plain = {
        "a": None,
        "b": "text",
        "c": (1, 2.5, 3j),
        "d": Kind.FAST,
        "e": torch.float16,
        "f": torch.device("cuda", 0),
    }
    plain |= {"g": np.float32(1), "h": b"bytes", "i": ..., "j": torch.Size([1, 2]), "k": int}
    x = torch.ones(2, device="cuda")
    captured = made(lambda x, **rest: x + len(rest), {"x": x, **plain})
    captured(**dict(reversed({"x": x, **plain}.items())))
    assert counted(captured) == [1, 0, 1, 0]
    for name, value in {"c": (1, 2.5, 4j), "d": "FAST", "e": torch.float32, "g": np.float64(1), "k": float}.items():
        captured(**{"x": x, **plain, name: value})
    assert counted(captured) == [1, 5, 1, 0]


def test_deterministic_mode_is_part_of_the_guard(clean: None, made: Any) -> None:
    captured = made(scaled, (torch.ones(2, device="cuda"),))
    torch.use_deterministic_algorithms(True)
    captured(torch.ones(2, device="cuda"))
    assert captured.last_reason == "not prepared: x float32[2], with deterministic algorithms"
    captured.prepare((torch.ones(2, device="cuda"),))
    captured(torch.ones(2, device="cuda"))
    torch.use_deterministic_algorithms(False)
    captured(torch.ones(2, device="cuda"))
    assert counted(captured) == [2, 1, 2, 0]


def test_reasons_are_bounded(clean: None, made: Any) -> None:
    captured = made(scaled)
    for k in range(300):
        captured(torch.ones(1, device="cuda"), k)
    reasons = captured.stats["reasons"]
    assert sum(reasons.values()) == 300
    assert len(reasons) <= 257
    assert reasons["other reasons"] > 40


# Gradients and inference mode -----------------------------------------------------------------------------------------


def mode_of(name: str) -> Any:
    return {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[name]()


MODES = ("plain", "no_grad", "inference")


@pytest.mark.parametrize(("prepared", "called"), list(itertools.product(MODES, MODES)))
@pytest.mark.parametrize("outputs", ["copy", "static"])
def test_prepared_in_one_mode_and_called_in_another(
    loop: Any, made: Any, prepared: str, called: str, outputs: str
) -> None:
    with mode_of(prepared):
        captured = made(loop, inputs(), outputs=outputs)
    with mode_of(called):
        for seed in (1, 2):
            args = inputs(seed)
            assert bits(seeded(captured, *args)) == bits(seeded(loop, *args))
        got = captured(*args)
        if outputs == "copy":
            assert got["actions"].is_inference() == (called == "inference")
            got["actions"].add_(1)
    assert counted(captured) == [3, 0, 1, 0]


@pytest.mark.parametrize("prepared", MODES)
def test_results_that_need_gradients_are_not_replayed_where_they_are_recorded(
    clean: None, made: Any, prepared: str
) -> None:
    weight = torch.nn.Parameter(torch.full((3,), 2.0, device="cuda"))
    x = torch.ones(3, device="cuda")
    with mode_of(prepared):
        captured = made(lambda x: x * weight, (x,))
    assert captured(x).requires_grad
    assert captured.last_reason == (
        "its results need gradients, which a graph does not record: call it under torch.inference_mode() or "
        "torch.no_grad()"
    )
    for mode in ("no_grad", "inference"):
        with mode_of(mode):
            assert bits(captured(x)) == bits(torch.full((3,), 2.0))
    assert counted(captured) == [2, 1, 1, 0]


def test_arguments_that_require_grad(clean: None, made: Any) -> None:
    x = torch.ones(3, device="cuda", requires_grad=True)
    captured = made(scaled)
    (report,) = captured.prepare((x,))
    assert not report["graph"]
    assert report["reason"].startswith("an argument requires grad")
    with torch.no_grad():
        assert captured.prepare((x,))[0]["graph"]
        captured(x)
    captured(x)
    assert captured.last_reason == report["reason"]
    captured(x.detach())
    assert counted(captured) == [2, 1, 1, 0]


# What cannot be a graph -----------------------------------------------------------------------------------------------


def uncapturable(load: Any) -> dict[str, tuple[Callable[..., Any], str]]:
    count, spare = itertools.count(), torch.zeros(3, device="cuda")
    host = torch.zeros(3).pin_memory()
    nonzero = load("nonzero")

    def raises_in_capture(x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise KeyError("only here")
        return x + 1

    def other_stream(x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.set_stream(torch.cuda.Stream(priority=-1))
        return x + 1

    def unjoined(x: torch.Tensor) -> torch.Tensor:
        side = torch.cuda.Stream(priority=-1)  # of other streams than the one of the capture
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            return x + 1

    def host_noise(x: torch.Tensor) -> torch.Tensor:
        host.copy_(torch.randn(3))
        return x + host.to("cuda", non_blocking=True)

    def in_place(x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)

    def list_changes(x: torch.Tensor) -> list[Any]:
        return [x + 1] * (next(count) % 7 + 1)

    return {
        "item": (lambda x: x * x.sum().item(), "cannot hold a wait"),
        "cpu": (lambda x: x + x.cpu().sum().to("cuda"), "Error: .*capture"),
        "wait": (lambda x: (torch.cuda.current_stream().synchronize(), x + 1)[1], "is capturing.*cannot hold a wait"),
        "wait for all": (lambda x: (torch.cuda.synchronize(), x + 1)[1], "cannot hold a wait"),
        "data-dependent shape": (
            lambda x: nonzero(x=x.expand(4, 3).contiguous().sum() * torch.ones(2, 4, device="cuda"))["y"],
            "GraphCaptureError: .*an output's shape depends on the data",
        ),
        "host result": (lambda x: (x + 1, torch.ones(2)), "a result lies on cpu, not on cuda:0"),
        "no work": (lambda x: x, "it does no work on the GPU"),
        "no tensor": (lambda x: 3, "it does no work on the GPU"),
        "an object": (lambda x: SimpleNamespace(x=x + 1), "the result is a types.SimpleNamespace"),
        "writes its argument": (in_place, "it writes into its argument x"),
        "counter": (lambda x: x * next(count), "the graph's results differ from those of an eager run"),
        "changing structure": (list_changes, "in the capture it returned another structure"),
        "changing value": (lambda x: (x + 1, next(count)), "in the capture it returned another structure"),
        "host random numbers": (lambda x: x * random.random(), "the graph's results differ"),
        "host noise": (host_noise, "the graph's results differ"),
        "raises": (raises_in_capture, "KeyError: 'only here'"),
        "another stream": (other_stream, "."),
        "a branch that does not come back": (unjoined, "."),
        "own memory": (lambda x: spare.copy_(x + spare), "the graph's results differ"),
    }


UNCAPTURABLE = (
    "item", "cpu", "wait", "wait for all", "data-dependent shape", "host result", "no work", "no tensor", "an object",
    "writes its argument", "counter", "changing structure", "changing value", "host random numbers", "host noise",
    "raises", "another stream", "a branch that does not come back", "own memory",
)  # fmt: skip


@pytest.mark.parametrize("what", UNCAPTURABLE)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_a_graph_runs_eagerly(load: Any, made: Any, what: str) -> None:
    """And afterwards everything works: eager results, random numbers, other graphs, and the argument is as it was."""
    cases = uncapturable(load)
    assert sorted(cases) == sorted(UNCAPTURABLE)
    fn, reason = cases[what]
    engine = load("mlp")

    def with_engine(x: torch.Tensor) -> Any:
        engine(x=torch.ones(8, 64, device="cuda"))
        return fn(x)

    x = torch.ones(3, device="cuda")
    stream = torch.cuda.current_stream()
    contexts = rig.trt().live("IExecutionContext")
    for run in (fn, with_engine):
        torch.manual_seed(1)
        captured = made(run)
        (report,) = captured.prepare((x,))
        if not (run is with_engine and what in ("no work", "no tensor")):  # then there is work
            assert (report["graph"], report["engines"]) == (False, ())
            assert re.search(reason, report["reason"]), report["reason"]
            captured(x.clone())
            assert captured.stats["reasons"] == {report["reason"]: 1}
            assert rig.trt().live("IExecutionContext") == contexts
        assert bits(x) == bits(torch.ones(3))
        torch.manual_seed(1)
        first = torch.randn(4, device="cuda")
        torch.manual_seed(1)
        assert bits(torch.randn(4, device="cuda")) == bits(first)
        assert torch.cuda.current_stream() == stream
        assert gc.isenabled()
        after = made(lambda x: x + torch.randn(3, device="cuda"), (x,))
        assert bits(seeded(after, x)) == bits(seeded(after.fn, x))
        assert after.stats["replays"] == 1
        captured.close()
    torch.cuda.set_stream(torch.cuda.default_stream())


@pytest.mark.parametrize("what", ["argument", "result"])
@pytest.mark.parametrize("kind", ["rank", "dtype"])
def test_tensors_that_cannot_be_copied(clean: None, made: Any, what: str, kind: str) -> None:
    def strange() -> torch.Tensor:
        plain = torch.ones(1, 1, 1, 1, 1, 1, 1, 1, 2, device="cuda")
        return plain if kind == "rank" else torch.empty(2, device="cuda", dtype=torch.complex64)

    x = strange() if what == "argument" else torch.ones(2, device="cuda")
    result = torch.ones(2, device="cuda") if what == "argument" else strange()
    captured = made(lambda x: (torch.ones(2, device="cuda") + 1, result))
    (report,) = captured.prepare((x,))
    assert not report["graph"]
    assert report["reason"].startswith(f"input '{'x' if what == 'argument' else 'result 1'}': found ")
    assert "dimensions" in report["reason"] if kind == "rank" else "complex" in report["reason"]
    captured(x)
    assert captured.stats["reasons"] == {report["reason"]: 1}


def test_a_tensor_whose_memory_holds_other_values(clean: None, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch negates lazily: such a tensor is one for an eager run."""
    x = torch.ones(2, device="cuda")
    captured = made(lambda x: x + 1, (x,))
    monkeypatch.setattr(torch.Tensor, "is_neg", lambda self: self is x)
    captured(x)
    assert "lazily negated" in captured.last_reason
    captured(torch.ones(2, device="cuda"))
    assert counted(captured) == [1, 1, 1, 0]


@pytest.mark.parametrize("name", ["capture_begin", "capture_end"])
def test_a_capture_that_torch_refuses(loop: Any, made: Any, name: str) -> None:
    """As one fork reports of a JetPack."""
    captured = made(loop)
    torch._standin.fail(name, 1, RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    (report,) = captured.prepare(inputs())
    assert not report["graph"]
    assert report["reason"].startswith(
        "RuntimeError: CUDA error: operation not permitted when stream is capturing (a graph"
    )
    assert bits(seeded(captured, *inputs(1))) == bits(seeded(loop, *inputs(1)))
    assert counted(captured) == [0, 1, 0, 0]
    # It is tried again when asked.
    assert captured.prepare(inputs())[0]["graph"]
    captured(*inputs(1))
    assert counted(captured) == [1, 1, 1, 0]
    assert captured.last_reason == report["reason"]


def test_every_capture_fails(loop: Any, made: Any) -> None:
    """The driver refuses at the end, with the code that says so, as reported of JetPack 6.2.1."""
    rig.cuda().set("capture_fail", 900)
    try:
        captured = made(loop)
        (report,) = captured.prepare(inputs())
        assert "operation not permitted when stream is capturing" in report["reason"]
        torch.manual_seed(5)
        one = bits((captured(*inputs(1)), torch.randn(3, device="cuda")))
        torch.manual_seed(5)
        assert one == bits((loop(*inputs(1)), torch.randn(3, device="cuda")))
    finally:
        rig.cuda().set("capture_fail", 0)


def test_what_the_function_raises_comes_through(loop: Any, made: Any) -> None:
    captured = made(loop)
    x, noise = inputs()
    with pytest.raises(errors.ShapeError, match="input 'x'"):
        captured.prepare((x[:, :3].contiguous(), noise))
    with pytest.raises(errors.ShapeError, match="input 'x'"):
        captured(x[:, :3].contiguous(), noise)
    assert captured.prepare((x, noise))[0]["graph"]


def test_every_driver_call_of_a_preparation_may_fail(load: Any, made: Any) -> None:
    """Whatever fails: an error of the function's own or a reason, and afterwards all is as before."""
    engine = load("mlp")
    x = torch.ones(8, 64, device="cuda")

    def fn(x: torch.Tensor) -> torch.Tensor:
        return engine(x=x * 2)["y"] + torch.randn(8, 10, device="cuda")

    wanted = bits(seeded(fn, x))
    contexts = rig.trt().live("IExecutionContext")
    outcomes = collections.Counter()
    for n in itertools.count(1):
        captured = made(fn, warmup=1)
        rig.cuda().reset()
        rig.cuda().fail_at(n)
        try:
            graph_made = captured.prepare((x,))[0]["graph"]
        except (RuntimeError, MemoryError, errors.JetrtError):
            graph_made = None
        reached = rig.cuda().last_failed()
        rig.cuda().fail_at(0)
        outcomes[graph_made] += 1
        assert bits(seeded(captured, x)) == wanted
        assert bits(seeded(fn, x)) == wanted
        captured.close()
        assert rig.trt().live("IExecutionContext") == contexts
        if not reached:
            break
    assert outcomes[None] > 0
    assert outcomes[False] > 0
    rig.cuda().reset()  # a call that was made to fail may have been noted


# Several shapes -------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_graph_goes_first(loop: Any, made: Any) -> None:
    captured = made(loop, max_shapes=2)
    captured.prepare(inputs(rows=1), inputs(rows=2))
    captured(*inputs(rows=1))
    with_two = rig.trt().live("IExecutionContext")
    captured.prepare(inputs(rows=3))
    assert rig.trt().live("IExecutionContext") == with_two
    assert [s.split(",")[0] for s in captured.stats["shapes"]] == ["x float32[1", "x float32[3"]
    for rows in (1, 2, 3):
        assert bits(seeded(captured, *inputs(rows, rows))) == bits(seeded(loop, *inputs(rows, rows)))
    assert counted(captured) == [3, 1, 3, 1]
    assert captured.prepare(inputs(rows=1))[0]["graph"]  # there already
    assert captured.stats["captures"] == 3


def test_eviction_and_close_free_everything(loop: Any, made: Any) -> None:
    captured = made(loop)
    captured.prepare(inputs(rows=1))
    captured.close()
    gc.collect()
    torch.cuda.empty_cache()
    kinds = ("device", "graph_exec", "bytes")
    before = {k: rig.live()[k] for k in (*kinds, "IExecutionContext")}
    captured = made(loop, max_shapes=1)
    for rows in (1, 2, 3):
        captured.prepare(inputs(rows=rows))
        captured(*inputs(rows=rows))
    assert rig.cuda().live("graph_exec") == before["graph_exec"] + 1
    captured.close()
    gc.collect()
    torch.cuda.empty_cache()
    after = rig.live()
    assert {k: after[k] for k in before} == before
    captured(*inputs(rows=1))
    assert captured.last_reason == "this graph was closed"
    with pytest.raises(errors.GraphCaptureError, match=r"prepare\(\) after close\(\)"):
        captured.prepare(inputs())
    captured.close()


def test_an_eviction_waits_for_the_launch(loop: Any, made: Any) -> None:
    captured = made(loop, max_shapes=1)
    captured.prepare(inputs(rows=1))
    side = torch.cuda.Stream()
    args = inputs(4, rows=1)
    wanted = bits(seeded(loop, *args))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        result = seeded(captured, *args)
    captured.prepare(inputs(rows=2))
    side.synchronize()
    assert bits(result) == wanted


def test_a_forgotten_graph_gives_everything_back(load: Any) -> None:
    engine = load("mlp")
    captured = graph(lambda x: engine(x=x)["y"] + 1, (torch.ones(8, 64, device="cuda"),))
    contexts = rig.trt().live("IExecutionContext")
    result = captured(torch.ones(8, 64, device="cuda"))
    del captured
    gc.collect()
    assert rig.trt().live("IExecutionContext") == contexts - 1
    assert rig.cuda().live("graph_exec") == 0
    assert result.cpu().shape == (8, 10)


def test_ten_thousand_replays_without_growth(loop: Any, made: Any) -> None:
    captured, sets = made(loop, inputs()), [inputs(k) for k in range(3)]

    def run(n: int) -> dict[str, int]:
        for k in range(n):
            captured(*sets[k % 3])
        torch.cuda.current_stream().synchronize()
        return rig.live()

    before = run(100)
    assert run(10_000) == before


# Engines --------------------------------------------------------------------------------------------------------------


def test_an_engine_that_was_closed(load: Any, made: Any) -> None:
    engine, x = load("mlp"), torch.ones(8, 64, device="cuda")
    current = {"engine": engine}

    def fn(x: torch.Tensor) -> torch.Tensor:
        return current["engine"](x=x)["y"] * 1

    captured = made(fn, (x,))
    result = captured(x)
    engine.close()  # waits for the launch
    wanted = bits(result)
    for _ in range(2):
        with pytest.raises(errors.ClosedEngineError, match="is closed, and this graph launches it"):
            captured(x)
    current["engine"] = load("mlp")
    assert captured.prepare((x,))[0]["engines"] == (current["engine"].path,)
    assert bits(captured(x)) == wanted
    assert counted(captured)[:3] == [2, 0, 2]


def test_an_engine_that_the_program_forgets_lives_with_the_graph(clean: None, made: Any, tmp_path: Path) -> None:
    current = {"engine": jetrt.Engine(fakes.write_plan(tmp_path / "m.plan", "mlp"))}
    x = torch.ones(8, 64, device="cuda")
    captured = made(lambda x: current["engine"](x=x)["y"] * 1, (x,))
    wanted = bits(captured.fn(x))
    current.clear()
    gc.collect()
    assert rig.trt().live("ICudaEngine") == 1
    assert bits(captured(x)) == wanted
    captured.close()
    gc.collect()
    assert rig.trt().live("ICudaEngine") == 0


@pytest.mark.parametrize("options", [{"graphs": "auto", "warmup": 0}, {"outputs": "fresh"}, {"max_contexts": 2}])
def test_engines_of_other_options(load: Any, made: Any, options: dict[str, Any]) -> None:
    engine, other = (
        load("mlp", options),
        load(fakes.copy_of("bfloat16", [8, 64]), {"on_dtype": "cast", "on_strided": "copy"}),
    )

    def fn(x: torch.Tensor) -> torch.Tensor:
        return (
            engine(x=other(x0=x.t().contiguous().t())["y0"].to(torch.float32) if False else x)["y"]
            + other(x=x)["y"].sum()
        )

    x = torch.ones(8, 64, device="cuda")
    captured = made(fn, (x,))
    for k in range(3):
        x = torch.full((8, 64), float(k), device="cuda")
        assert bits(captured(x)) == bits(fn(x))
    assert counted(captured) == [3, 0, 1, 0]


def test_branches_inside_the_function(load: Any, made: Any) -> None:
    """Two calls of one engine at once, on streams of the function's own."""
    engine, side = load("mlp"), torch.cuda.Stream(priority=-1)

    def fn(x: torch.Tensor) -> torch.Tensor:
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            one = engine(x=x * 2)["y"] * 1
        two = engine(x=x)["y"] * 1
        current.wait_stream(side)
        return one + two

    x = torch.ones(8, 64, device="cuda")
    before = rig.trt().live("IExecutionContext")
    captured = made(fn, (x,))
    assert rig.trt().live("IExecutionContext") == before + 2
    assert bits(captured(x * 3)) == bits(fn(x * 3))
    assert captured.stats["replays"] == 1


# Streams, threads, captures of the caller's ---------------------------------------------------------------------------


def test_on_whatever_stream(loop: Any, made: Any) -> None:
    captured = made(loop, inputs())
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    kept = []
    for k in range(9):
        args = inputs(k)
        wanted = bits(seeded(loop, *args))
        torch.cuda.current_stream().synchronize()
        stream = streams[k % 3]
        with torch.cuda.stream(stream):
            late = args[0] * 0 + args[0]  # written on this very stream
            kept.append((seeded(captured, late, args[1]), stream, wanted, args))
    for result, stream, wanted, _ in kept:
        stream.synchronize()
        assert bits(result) == wanted
    assert counted(captured) == [9, 0, 1, 0]


def test_from_several_threads(load: Any, made: Any) -> None:
    engine = load("mlp")

    def fn(x: torch.Tensor) -> torch.Tensor:
        return engine(x=x * 2)["y"] + 1

    captured = made(fn, ((torch.ones(8, 64, device="cuda"),)))
    captured.prepare((torch.ones(4, 64, device="cuda"),))
    reference = {(n, k): bits(fn(torch.full((n, 64), float(k), device="cuda"))) for n in (4, 8) for k in range(40)}

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for k in range(20):
                n, value = (4, 8)[k % 2], (seed * 11 + k) % 40
                x = torch.full((n, 64), float(value), device="cuda")
                result = captured(x)
                torch.cuda.current_stream().synchronize()
                assert bits(result) == reference[n, value]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert counted(captured) == [80, 0, 2, 0]


def test_calls_go_on_while_another_thread_prepares(load: Any, made: Any) -> None:
    engine = load("mlp")
    captured = made(lambda x: engine(x=x)["y"] + 1, max_shapes=3)
    captured.prepare((torch.ones(8, 64, device="cuda"),))
    wrong: list[Any] = []

    def prepare() -> None:
        try:
            for n in (1, 2, 3, 4, 5, 6):
                assert captured.prepare((torch.ones(n, 64, device="cuda"),))[0]["graph"]
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=prepare)
    thread.start()
    x = torch.ones(8, 64, device="cuda")
    calls = 0
    while thread.is_alive() or calls < 5:
        captured(x)
        torch.cuda.current_stream().synchronize()
        calls += 1
    thread.join()
    assert wrong == []
    assert sum(counted(captured)[:2]) == calls


def test_a_capture_runs_on_no_stream_of_torchs(made: Any) -> None:
    """torch hands out 32 streams in turn: what another thread enqueues on one must not become part of the graph."""
    streams: list[int] = []

    def work(x: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            streams.append(torch.cuda.current_stream().cuda_stream)
        return x + 1

    made(work, (torch.ones(2, device="cuda"),))
    torchs = {torch.cuda.Stream(priority=priority).cuda_stream for _ in range(64) for priority in (0, -1)}
    assert len(streams) == 1
    assert streams[0] not in torchs | {0}


def test_another_thread_works_on_while_a_graph_is_captured(clean: None, made: Any) -> None:
    """It allocates and waits, which a capture in CUDA's global mode would forbid it, and be broken by."""
    go, went, found = threading.Event(), threading.Event(), []

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        if torch.cuda.is_current_stream_capturing():
            go.set()
            assert went.wait(30)
        return y

    def work() -> None:
        assert go.wait(30)
        try:
            found.append(torch.full((1 << 18,), 2.0, device="cuda").sum().item())
        except BaseException as error:
            found.append(error)
        went.set()

    thread = threading.Thread(target=work)
    thread.start()
    x = torch.ones(3, device="cuda")
    captured = made(fn, (x,))
    thread.join()
    assert found == [2 << 18]
    assert bits(captured(x)) == bits(x + 1)
    assert counted(captured) == [1, 0, 1, 0]


def test_only_graphs_that_draw_random_numbers_wait_for_each_other(clean: None, made: Any) -> None:
    x = torch.ones(3, device="cuda")
    drawing = [made(lambda x: x + torch.randn(3, device="cuda"), (x,)) for _ in range(2)]
    plain = [made(lambda x: x + 1, (x,)) for _ in range(2)]
    for graphs, waits in ((drawing, True), (plain, False)):
        one, two = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(one):
            first = graphs[0](x)
        with torch.cuda.stream(two):
            graphs[1](x)
        two.synchronize()
        there = ctypes.string_at(first.data_ptr(), 12)
        one.synchronize()
        assert (there == ctypes.string_at(first.data_ptr(), 12)) == waits


def test_seeds_that_inference_mode_made(clean: None, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture of somebody's in inference mode leaves torch's seed in tensors that only inference mode can write."""
    from torch.cuda import graphs

    begin, began = graphs.CUDAGraph.capture_begin, []

    def begins(self: Any, *args: Any, **kwargs: Any) -> None:
        began.append(torch.is_inference_mode_enabled())
        if not began[-1]:
            raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed.")
        begin(self, *args, **kwargs)

    monkeypatch.setattr(graphs.CUDAGraph, "capture_begin", begins)
    x = torch.ones(3, device="cuda")
    captured = made(lambda x: x + torch.randn(3, device="cuda"), (x,))
    assert began == [False, True]
    assert bits(seeded(captured, x)) == bits(seeded(captured.fn, x))
    assert captured.stats["replays"] == 1


def test_inside_a_capture_of_the_callers(loop: Any, made: Any) -> None:
    captured = made(loop, inputs())
    x, noise = inputs()
    outer = torch.cuda.CUDAGraph()
    replays = torch._standin.counts["replays"]
    with torch.cuda.graph(outer):
        result = captured(x, noise)["actions"] * 2
        with pytest.raises(errors.GraphCaptureError, match=r"prepare\(\) inside a capture of the caller's"):
            captured.prepare((x, noise, 3))
    assert captured.last_reason == "inside a capture of the caller's"
    assert torch._standin.counts["replays"] == replays
    for seed in (1, 2):
        other = inputs(seed)
        x.copy_(other[0])
        noise.copy_(other[1])
        torch.manual_seed(3)
        outer.replay()
        assert bits(result) == bits(seeded(loop, *other, seed=3)["actions"] * 2)
    outer.reset()


def test_a_graph_inside_a_graph(loop: Any, made: Any) -> None:
    inner = made(loop, inputs())
    outer = made(lambda x, noise: inner(x * 2, noise)["actions"] + 1, inputs())
    for seed in (1, 2):
        args = inputs(seed)
        wanted = bits(seeded(loop, args[0] * 2, args[1])["actions"] + 1)
        assert bits(seeded(outer, *args)) == wanted
    assert outer.stats["replays"] == 2


# The function itself --------------------------------------------------------------------------------------------------


def test_arguments_of_graph(clean: None) -> None:
    for options, said in (
        ({"warmup": -1}, "warmup: found -1; allowed: 0 or more"),
        ({"max_shapes": 0}, "max_shapes: found 0; allowed: 1 or more"),
        ({"outputs": "fresh"}, 'outputs: found \'fresh\'; allowed: "copy", "static"'),
    ):
        with pytest.raises(ValueError, match=said):
            graph(scaled, **options)
    with pytest.raises(TypeError, match="fn: found int; allowed: a callable"):
        graph(3)
    with pytest.raises(TypeError, match="an example: found Tensor; allowed: a tuple or list of positional arguments"):
        graph(scaled, torch.ones(2, device="cuda"))


def test_names(clean: None, made: Any) -> None:
    assert made(scaled).name == "scaled"
    assert "other" in repr(made(scaled, name="other"))
    with made(scaled, [torch.ones(2, device="cuda")]) as captured:
        assert repr(captured) == "<jetrt.LoopGraph scaled: 1 graph(s)>"
    assert repr(captured) == "<jetrt.LoopGraph scaled: 0 graph(s), closed>"


@pytest.mark.parametrize("warmup", [0, 1, 3, 5])
def test_warmup_is_counted(clean: None, made: Any, warmup: int) -> None:
    calls = []
    made(lambda x: (calls.append(1), x + 1)[1], (torch.ones(2, device="cuda"),), warmup=warmup)
    assert len(calls) == max(warmup, 1) + 2  # one that the graph is compared with, and the capture


def test_the_module_is_the_function(clean: None) -> None:
    """`jetrt.graph` must be callable whichever of the two was imported first."""
    import jetrt.graph as module

    with module(scaled, (torch.ones(2, device="cuda"),)) as captured:
        assert isinstance(captured, LoopGraph)


# Processes of their own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", exits.GRAPH)
def test_interpreter_exit(tmp_path: Path, way: str) -> None:
    exits.run(exits.GRAPH[way], fakes.write_plan(tmp_path / "m.plan", "mlp"))


def test_on_the_second_gpu(tmp_path: Path) -> None:
    """While the first one is current; and tensors of two GPUs in one call are no graph."""
    code = """
import sys
import fakes
import torch
import jetrt
from jetrt.graph import graph

engine = jetrt.Engine(fakes.write_plan(sys.argv[1], "mlp"), device=1, graphs="off")
x = torch.ones(8, 64, device="cuda:1")
def fn(x, y=None):
    return engine(x=x)["y"] * 2 + torch.randn(8, 10, device="cuda:1")
captured = graph(fn, (x,))
for k in range(3):
    torch.manual_seed(k)
    got = captured(x * k)
    torch.manual_seed(k)
    assert torch.equal(got, fn(x * k)) and got.device.index == 1
    with torch.cuda.device(1):
        captured(x)
assert captured.stats["replays"] == 6 and torch.cuda.current_device() == 0
captured(x, torch.ones(1, device="cuda:0"))
print(captured.last_reason)
print(captured.prepare((x, torch.ones(1, device="cuda:0")))[0]["reason"])
plain = graph(lambda x: x + 1, (torch.ones(2, device="cuda:0"),))
plain.prepare((torch.ones(2, device="cuda:1"),))
for index in (0, 1):
    assert plain(torch.ones(2, device=f"cuda:{index}")).device.index == index
assert plain.stats["replays"] == 2
captured.close(); plain.close(); engine.close()
"""
    done = fakes.run_python(code, str(tmp_path / "m.plan"), env={"FAKE_CUDA_DEVICES": 2})
    assert done.stdout.splitlines() == ["the arguments lie on several GPUs (cuda:0, cuda:1)"] * 2
    assert done.stderr == ""


def test_importing_jetrt_imports_neither_this_nor_torch() -> None:
    code = """
import sys
import jetrt
print([name for name in ("torch", "jetrt.graph", "jetrt._graph_capture") if name in sys.modules])
import jetrt.graph
print("torch" in sys.modules)
"""
    assert fakes.run_python(code).stdout.split() == ["[]", "False"]


# What torch leaves behind ---------------------------------------------------------------------------------------------


def test_torch_is_told_of_a_capture_that_failed(loop: Any, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own end of a failed capture stops half-way: its generator still refuses numbers outside of a capture, and
    its allocator still believes in the graph's pool. A capture that ends well sets the one right, two calls the
    other."""
    from torch.cuda import graphs

    stuck, told = [], []
    end, begin, randn = graphs.CUDAGraph.capture_end, graphs.CUDAGraph.capture_begin, torch.randn

    def begins(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        stuck[:] = [self]

    def ends(self: Any) -> None:
        end(self)
        stuck.clear()

    def numbers(*args: Any, **kwargs: Any) -> Any:
        if stuck and not torch.cuda.is_current_stream_capturing():
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return randn(*args, **kwargs)

    monkeypatch.setattr(graphs.CUDAGraph, "capture_begin", begins)
    monkeypatch.setattr(graphs.CUDAGraph, "capture_end", ends)
    monkeypatch.setattr(torch, "randn", numbers)
    native = SimpleNamespace(
        _cuda_endAllocateToPool=lambda *args: told.append(("end", args)),
        _cuda_releasePool=lambda *args: told.append(("release", args)),
        _cuda_clearCublasWorkspaces=lambda: told.append(("workspaces", torch.cuda.is_current_stream_capturing())),
    )
    monkeypatch.setattr(torch, "_C", native, raising=False)

    captured = made(lambda x, noise: torch.cuda.synchronize() if torch.cuda.is_current_stream_capturing() else x + 1)
    assert not captured.prepare(inputs())[0]["graph"]
    assert stuck == []
    numbers(3, device="cuda")
    (first, second) = [entry for entry in told if entry[0] != "workspaces"]
    assert first[0] == "end"
    assert second == ("release", first[1])
    assert first[1][0] == 0  # the device, and the pool of the graph
    # cuBLAS gets a workspace in the graph's pool, and forgets it.
    assert [entry for entry in told if entry[0] == "workspaces"] == [("workspaces", False)] * 2


def test_where_the_random_numbers_stay_broken_it_is_said(loop: Any, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def fn(x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            monkeypatch.setattr(torch, "randn", broken)
            raise ValueError("no")
        return x + 1

    with pytest.raises(errors.CudaError, match=r"random numbers on cuda:0 do not work any more .* Restart the process"):
        made(fn).prepare((torch.ones(2, device="cuda"),))
