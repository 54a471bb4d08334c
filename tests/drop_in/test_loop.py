"""`jetrt.groot.optimize`: the denoising loop of both versions' heads, in torch, with a DiT engine, and as a bundle."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import exits
import numpy as np
import pytest
import rig
import torch
from torch import nn

import fakes
from jetrt import errors

GROOT = Path(__file__).resolve().parents[2] / "benches" / "groot"
sys.path.insert(0, str(GROOT))

from standin import HEADS, BatchFeature  # noqa: E402
from versions import N1_6, N1_7  # noqa: E402

from jetrt import trt_torch  # noqa: E402
from jetrt.groot import optimize, replace_dit_with_tensorrt  # noqa: E402

WIDTH, HORIZON, ACTION, S = 8, 4, 6, 8
SMALL: dict[str, Any] = {
    "action_horizon": HORIZON,
    "max_action_dim": ACTION,
    "max_state_dim": ACTION,
    "vl_lengths": (1, S, 32),
    "input_embedding_dim": WIDTH,
    "backbone_embedding_dim": WIDTH,
    "hidden_size": WIDTH,
    "max_num_embodiments": 2,
    "max_seq_len": 16,
}
CONFIGS = {"n1.6": replace(N1_6, **SMALL), "n1.7": replace(N1_7, state_history_length=2, **SMALL)}

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(autouse=True)
def no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")


# A head ---------------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """State encoder and action decoder: a linear layer, and something of the embodiment."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(inputs, outputs), nn.Embedding(2, outputs)

    def forward(self, x: Any, ids: Any) -> Any:
        return self.linear(x) + self.kind(ids).unsqueeze(1)


class Encoder(Mlp):
    def forward(self, actions: Any, timesteps: Any, ids: Any) -> Any:
        return super().forward(actions, ids) + (timesteps.to(actions.dtype) * 0.001).unsqueeze(-1).unsqueeze(-1)


class Dit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        hidden_states: Any,
        encoder_hidden_states: Any,
        timestep: Any,
        encoder_attention_mask: Any = None,
        return_all_hidden_states: bool = False,
        image_mask: Any = None,
        backbone_attention_mask: Any = None,
    ) -> Any:
        kept = (image_mask & backbone_attention_mask).unsqueeze(-1).to(hidden_states.dtype)
        mean = (encoder_hidden_states * kept).mean(1, keepdim=True)
        return torch.tanh(self.linear(hidden_states) + mean) + (timestep.to(mean.dtype) * 0.001).reshape(-1, 1, 1)


def make_policy(version: str) -> SimpleNamespace:
    """A policy with a small head in bfloat16 on the GPU."""
    torch.manual_seed(11)
    config = CONFIGS[version]
    head = HEADS[version](
        config,
        model=Dit(),
        state_encoder=Mlp(config.state_width, WIDTH),
        action_encoder=Encoder(ACTION, WIDTH),
        action_decoder=Mlp(WIDTH, ACTION),
        vlln=nn.LayerNorm(WIDTH),
        vl_self_attention=nn.Linear(WIDTH, WIDTH) if version == "n1.7" else None,
        position_embedding=nn.Embedding(16, WIDTH),
    )
    head = head.to("cuda", torch.bfloat16).eval()
    for parameter in head.parameters():
        parameter.requires_grad_(False)
    return SimpleNamespace(model=SimpleNamespace(action_head=head))


def act(policy: Any, s: int = S, *, seed: int | None = None, number: int = 0, **more: Any) -> Any:
    """One action chunk for the observation of this number, as the policy asks its head for it: under inference mode."""
    if seed is not None:
        torch.manual_seed(seed)
    config = policy.model.action_head.config
    with torch.inference_mode():
        output, given = head_inputs(policy, s, number)
        given.update(more.pop("action_input", {}))
        options = () if config.version == "n1.6" else (more.pop("options", None),)
        assert not more
        return policy.model.action_head.get_action(output, given, *options)


def head_inputs(policy: Any, s: int = S, number: int = 0) -> tuple[BatchFeature, BatchFeature]:
    """backbone_output and action_input of the observation of this number."""
    history = policy.model.action_head.config.state_history_length
    output = {
        "backbone_features": values((1, s, WIDTH), number),
        "backbone_attention_mask": torch.ones((1, s), dtype=torch.bool, device="cuda"),
        "image_mask": torch.arange(s, device="cuda").unsqueeze(0) < s // 2,
    }
    given = {"state": values((1, history, ACTION), number + 1), "embodiment_id": ids(number)}
    return BatchFeature(output), BatchFeature(given)


def values(shape: tuple[int, ...], number: int) -> Any:
    draw = np.random.default_rng([number, *shape]).standard_normal(shape).astype(np.float32)
    return torch.tensor(draw, device="cuda").to(torch.bfloat16)


def ids(number: int) -> Any:
    return torch.full((1,), number % 2, dtype=torch.int64, device="cuda")


def chunk(result: Any) -> bytes:
    return result["action_pred"].cpu().view(torch.uint8).numpy().tobytes()


def chunks(policy: Any, count: int = 20, *, lengths: tuple[int, ...] = (S,)) -> list[bytes]:
    """This many in a row after a seed."""
    torch.manual_seed(42)
    return [chunk(act(policy, lengths[n % len(lengths)], number=n)) for n in range(count)]


# Engines --------------------------------------------------------------------------------------------------------------


def op(kind: str, inputs: list[str], output: str) -> dict[str, Any]:
    return {"op": kind, "in": inputs, "out": [output], "ints": {}, "floats": {}, "precision": "float32"}


def weight(*dims: int) -> dict[str, Any]:
    random = np.random.default_rng(dims).standard_normal(dims)
    return {"dims": list(dims), "values": [round(float(x), 4) for x in random.ravel()]}


def number(value: float) -> dict[str, Any]:
    return {"dims": [1], "values": [value]}


def graph_plan(io: list[dict[str, Any]], nodes: list[dict[str, Any]], **weights: Any) -> dict[str, Any]:
    return {"program": "graph", "io": io, "graph": {"nodes": nodes, "weights": weights}}


def engine_plans(state_width: int, *, turn: float = 1.0) -> dict[str, dict[str, Any]]:
    """The plans of a bundle, by the names that the scripts look for. `turn`: of another DiT."""
    t = fakes.tensor
    some = [([1, 1, WIDTH], [1, S, WIDTH], [1, 32, WIDTH])]
    mask = [([1, 1], [1, S], [1, 32])]
    embodiment, tokens = t("embodiment_id", "input", "int64", [1]), HORIZON + 1

    def mlp(name: str, rows: int, inputs: int, outputs: int, *more: dict[str, Any]) -> dict[str, Any]:
        io = [t(name, "input", "bfloat16", [1, rows, inputs]), *more, embodiment]
        nodes = [op("MatMul", [name, "w"], "product"), op("Add", ["product", "embodiment_id"], "sum")]
        if more:
            nodes += [op("Mul", ["timesteps", "rate"], "time"), op("Add", ["sum", "time"], "output")]
        else:
            nodes += [op("Tanh", ["sum"], "output")]
        io.append(t("output", "output", "bfloat16", [1, rows, outputs]))
        return graph_plan(io, nodes, w=weight(inputs, outputs), rate=number(0.001))

    dit = graph_plan(
        [
            t("sa_embs", "input", "bfloat16", [1, tokens, WIDTH]),
            t("vl_embs", "input", "bfloat16", [1, -1, WIDTH], some),
            t("timestep", "input", "int64", [1]),
            t("image_mask", "input", "bool", [1, -1], mask),
            t("backbone_attention_mask", "input", "bool", [1, -1], mask),
            t("output", "output", "bfloat16", [1, tokens, WIDTH]),
        ],
        [
            op("Mul", ["image_mask", "backbone_attention_mask"], "kept"),
            op("Unsqueeze", ["kept", "axes"], "column"),
            op("Mul", ["vl_embs", "column"], "seen"),
            op("ReduceMean", ["seen", "one"], "mean"),
            op("MatMul", ["sa_embs", "w"], "product"),
            op("Mul", ["product", "turn"], "turned"),
            op("Add", ["turned", "mean"], "sum"),
            op("Tanh", ["sum"], "bounded"),
            op("Mul", ["timestep", "rate"], "time"),
            op("Add", ["bounded", "time"], "output"),
        ],
        w=weight(WIDTH, WIDTH),
        axes=number(2),
        one=number(1),
        rate=number(0.001),
        turn=number(turn),
    )
    attention = graph_plan(
        [
            t("hidden_states", "input", "bfloat16", [1, -1, WIDTH], some),
            t("output", "output", "bfloat16", [1, -1, WIDTH]),
        ],
        [op("MatMul", ["hidden_states", "w"], "product"), op("Tanh", ["product"], "output")],
        w=weight(WIDTH, WIDTH),
    )
    return {
        "state_encoder.engine": mlp("state", 1, state_width, WIDTH),
        "action_encoder.engine": mlp("actions", HORIZON, ACTION, WIDTH, t("timesteps", "input", "int64", [1])),
        "dit_bf16.engine": dit,
        "action_decoder.engine": mlp("model_output", tokens, WIDTH, ACTION),
        "vl_self_attention.engine": attention,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def write(version: str = "n1.7", **more: Any) -> Path:
        made = tmp_path / f"{version}-{len(list(tmp_path.iterdir()))}"
        made.mkdir()
        for name, content in engine_plans(CONFIGS[version].state_width, **more).items():
            fakes.write_plan(made / name, content)
        return made

    return write


@pytest.fixture
def set_up(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`set_up("n1.7", "bundle")`: a policy as the set-ups of the scripts leave it."""
    monkeypatch.setitem(sys.modules, "trt_torch", trt_torch)
    monkeypatch.delitem(sys.modules, "trt_model_forward", raising=False)
    import trt_model_forward

    opened: list[Any] = []

    def engine(*args: Any, **kwargs: Any) -> Any:
        opened.append(trt_torch.Engine(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(trt_model_forward, "Engine", engine)

    def make(version: str, kind: str, **more: Any) -> Any:
        policy = make_policy(version)
        if kind == "torch":
            return policy
        plans = folder(version, **more)
        if kind == "dit":
            replace_dit_with_tensorrt(policy, str(plans / "dit_bf16.engine"))
        elif kind == "bundle":
            mode = "n17_full_pipeline" if version == "n1.7" else "full_pipeline"
            if version == "n1.6":
                (plans / "vl_self_attention.engine").unlink()
            trt_model_forward.setup_tensorrt_engines(policy, str(plans), mode)
        else:
            trt_model_forward.setup_tensorrt_engines(policy, str(plans), kind)
        return policy

    yield make
    while opened:  # pytest holds `make`, and so the list
        opened.pop().close()
    sys.modules.pop("trt_model_forward", None)


KINDS = [(version, kind) for version in CONFIGS for kind in ("torch", "dit", "bundle")]
every_kind = pytest.mark.parametrize(("version", "kind"), KINDS, ids=["-".join(kind) for kind in KINDS])


@pytest.fixture
def optimized(set_up: Callable[..., Any]) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """`optimized("n1.7", "bundle", example=8)`: policy and handle, undone at the end."""
    handles: list[Any] = []

    def make(version: str = "n1.7", kind: str = "dit", **options: Any) -> tuple[Any, Any]:
        policy = set_up(version, kind)
        handles.append(optimize(policy, **options))
        return policy, handles[-1]

    yield make
    while handles:
        handles.pop().undo()


def enqueued() -> int:
    return rig.trt().count("enqueueV3")


# Actions --------------------------------------------------------------------------------------------------------------


@every_kind
def test_twenty_actions_after_a_seed_are_the_originals(set_up: Callable[..., Any], version: str, kind: str) -> None:
    policy = set_up(version, kind)
    expected = chunks(policy)
    handle = optimize(policy, example=S)
    before = enqueued()
    assert chunks(policy) == expected
    assert handle.stats["replays"] == 20
    assert handle.stats["original"] == handle.stats["eager"] == 0
    assert handle.stats["reasons"] == {}
    assert enqueued() == before  # not one engine by itself
    handle.undo()


@pytest.mark.parametrize("kind", ["dit", "bundle"])
def test_twenty_actions_after_the_scripts_set_seed(set_up: Callable[..., Any], kind: str) -> None:
    """Which also makes torch deterministic, so that it fills what it allocates."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    policy = set_up("n1.7", kind)
    expected = chunks(policy, lengths=(8, 11))
    handle = optimize(policy, example=[8, 11])
    assert chunks(policy, lengths=(8, 11)) == expected
    assert handle.stats["replays"] == 20
    handle.undo()


@every_kind
def test_results_are_what_the_original_returns(set_up: Callable[..., Any], version: str, kind: str) -> None:
    policy = set_up(version, kind)
    expected = act(policy, seed=1)
    handle = optimize(policy, example=S)
    found = act(policy, seed=1)
    assert type(found) is type(expected)
    assert list(found.keys()) == list(expected.keys())
    for name in expected:
        assert chunk({"action_pred": found[name]}) == chunk({"action_pred": expected[name]}), name
    handle.undo()


@every_kind
def test_lengths_that_change(set_up: Callable[..., Any], version: str, kind: str) -> None:
    policy = set_up(version, kind)
    lengths = (8, 11, 9)
    expected = chunks(policy, 9, lengths=lengths)
    handle = optimize(policy)
    reports = handle.prepare(*lengths)
    assert [report["captured"] for report in reports] == [True] * 3
    assert [report["shapes"]["features"] for report in reports] == [(1, s, WIDTH) for s in lengths]
    assert chunks(policy, 9, lengths=lengths) == expected
    assert handle.stats["replays"] == 9
    handle.undo()


def test_no_call_waits_or_allocates_more_and_more(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized("n1.7", "bundle", example=S)
    act(policy)
    held = torch.cuda.memory_allocated()
    waits = torch._standin.counts["waits"]
    for number in range(200):
        act(policy, number=number % 3)
    assert torch._standin.counts["waits"] == waits + 400  # observations: .to("cuda"), as each makes two
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held
    assert handle.stats["captures"] == 1


def test_results_stay_valid(optimized: Callable[..., Any]) -> None:
    policy, _ = optimized(example=S)
    first = act(policy, seed=1)
    before = chunk(first)
    act(policy, seed=2)
    assert chunk(first) == before


def test_static_outputs_are_overwritten(optimized: Callable[..., Any]) -> None:
    policy, _ = optimized(example=S, outputs="static")
    first = act(policy, seed=1)
    before = chunk(first)
    second = act(policy, seed=2)
    assert first["action_pred"].data_ptr() == second["action_pred"].data_ptr()
    assert chunk(first) != before


# What goes to the original --------------------------------------------------------------------------------------------


def only_reason(handle: Any) -> str:
    (reason,) = handle.stats["reasons"]
    return str(reason)


def test_a_length_that_was_not_prepared(optimized: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    policy, handle = optimized(example=S)
    with caplog.at_level(logging.WARNING, "jetrt.groot"):
        for _ in range(3):
            act(policy, 12)
    assert handle.stats["original"] == handle.stats["reasons"][only_reason(handle)] == 3
    assert "not prepared" in only_reason(handle)
    assert [record.name for record in caplog.records] == ["jetrt.groot"]  # said once
    (seen,) = handle.stats["not_prepared"]
    assert seen["features"] == (1, 12, WIDTH)
    assert seen["steps"] == 4
    assert handle.stats["captures"] == 1  # a live call captures nothing
    counts: list[dict[str, int]] = []
    for call in (lambda: handle_original(policy, handle, 12), lambda: act(policy, 12, seed=1)):
        torch._standin.counts.clear()
        call()
        counts.append(dict(torch._standin.counts))
    assert counts[0] == counts[1]  # nor does it wait for a comparison, or do anything else besides

    (report,) = handle.prepare()  # what has come so far
    assert report["shapes"]["features"] == (1, 12, WIDTH)
    assert report["captured"]
    assert handle.stats["not_prepared"] == []
    act(policy, 12)
    assert handle.stats["replays"] == 1


def test_another_number_of_steps(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized(example=S)
    head = policy.model.action_head
    head.num_inference_timesteps = 2
    found = act(policy, seed=3)
    assert handle.stats["replays"] == 0
    assert "settings" in only_reason(handle)
    assert handle.stats["not_prepared"][0]["steps"] == 2
    handle.prepare(S)
    assert chunk(act(policy, seed=3)) == chunk(found)
    assert handle.stats["replays"] == 1
    head.num_inference_timesteps = 4
    act(policy)
    assert handle.stats["replays"] == 2  # both are kept


@pytest.mark.parametrize("name", ["num_timestep_buckets", "action_horizon"])
def test_other_settings(optimized: Callable[..., Any], name: str) -> None:
    policy, handle = optimized("n1.7", "torch", example=S)
    setattr(policy.model.action_head, name, 3)
    if name == "action_horizon":
        with pytest.raises(Exception, match="size"):
            act(policy)
    else:
        act(policy)
    assert handle.stats["original"] == 1


RTC = {"action_horizon": HORIZON, "rtc_overlap_steps": 2, "rtc_frozen_steps": 1, "rtc_ramp_rate": 6.0}


def test_real_time_chunking_is_the_originals(set_up: Callable[..., Any]) -> None:
    policy = set_up("n1.7", "dit")
    given = {"action_input": {"action": values((1, HORIZON, ACTION), 9)}, "options": RTC}
    expected = chunk(act(policy, seed=5, **given))
    handle = optimize(policy, example=S)
    given = {"action_input": {"action": values((1, HORIZON, ACTION), 9)}, "options": RTC}
    assert chunk(act(policy, seed=5, **given)) == expected
    assert chunk(act(policy, seed=5)) != expected
    assert "real-time chunking" in only_reason(handle)
    assert handle.stats["replays"] == 1
    handle.undo()


def test_options_alone(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized(example=S)
    act(policy, options={})  # says nothing
    assert handle.stats["replays"] == 1
    act(policy, options={"reset_memory": True})
    assert only_reason(handle) == "options were given: reset_memory"


def test_an_argument_that_the_loop_does_not_know(set_up: Callable[..., Any]) -> None:
    policy = set_up("n1.7", "dit")
    head = policy.model.action_head
    own = type(head).get_action_with_features
    asked: list[Any] = []

    def get_action_with_features(*args: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        asked.append(input_ids)
        return own(head, *args, **kwargs)

    head.get_action_with_features = get_action_with_features
    handle = optimize(policy, example=S)
    asked.clear()
    call = head.get_action_with_features._loop.call(example_inputs())
    head.get_action_with_features(**call, input_ids=None)
    assert (handle.stats["replays"], asked) == (1, [])
    head.get_action_with_features(**call, input_ids=7)
    assert asked == [7]
    assert "'input_ids'" in only_reason(handle)
    handle.undo()
    assert vars(head)["get_action_with_features"] is get_action_with_features


def example_inputs(s: int = S) -> dict[str, Any]:
    return {
        "features": values((1, s, WIDTH), 0),
        "state": values((1, 1, WIDTH), 1),
        "embodiment_id": ids(0),
        "image_mask": torch.arange(s, device="cuda").unsqueeze(0) < 4,
        "backbone_attention_mask": torch.ones((1, s), dtype=torch.bool, device="cuda"),
    }


def test_training_and_deterministic_modes(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized(example=S)
    policy.model.action_head.training = True
    act(policy)
    assert only_reason(handle) == "the action head is in training mode"
    policy.model.action_head.training = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    act(policy)
    assert handle.stats["replays"] == 0
    handle.prepare(S)
    act(policy)
    assert handle.stats["replays"] == 1


@pytest.mark.parametrize("kind", ["torch", "dit"])
def test_hooks_are_called(optimized: Callable[..., Any], kind: str) -> None:
    policy, handle = optimized("n1.7", kind, example=S)
    head = policy.model.action_head
    called: list[Any] = []
    inner = head.model.linear if kind == "torch" else head.model
    hooked = inner.register_forward_hook(lambda *_: called.append(1))
    act(policy)
    assert len(called) == 4
    assert "hooks" in only_reason(handle)
    (report,) = handle.prepare(9)
    assert "hooks" in report["reason"]
    hooked.remove()
    called.clear()
    act(policy)
    assert (handle.stats["replays"], called) == (1, [])  # what was captured before is still there
    assert handle.prepare(9)[0]["captured"]


def test_the_class_refuses_as_before(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized(example=S)
    with pytest.raises(TypeError, match="missing"):
        policy.model.action_head.get_action_with_features(state_features=None)
    with pytest.raises(TypeError, match="unexpected"):
        policy.model.action_head.get_action_with_features(**handle._loop.call(example_inputs()), nonsense=1)
    assert handle.stats["replays"] == 0


# What a graph has baked in --------------------------------------------------------------------------------------------


def test_an_exchanged_dit_is_noticed(optimized: Callable[..., Any], folder: Callable[..., Path]) -> None:
    policy, handle = optimized(example=S)
    first = chunk(act(policy, seed=1))
    replace_dit_with_tensorrt(policy, str(folder(turn=-2.0) / "dit_bf16.engine"))
    other = chunk(act(policy, seed=1))
    assert other != first
    assert only_reason(handle) == "in action_head.model forward was replaced; prepare(...) again"
    handle.prepare(S)
    assert chunk(act(policy, seed=1)) == other
    assert handle.stats["replays"] == 1


def test_an_exchanged_engine_is_noticed(optimized: Callable[..., Any], folder: Callable[..., Path]) -> None:
    policy, handle = optimized("n1.7", "bundle", example=S)
    first = chunk(act(policy, seed=1))
    engine = trt_torch.Engine(str(folder(turn=-2.0) / "dit_bf16.engine"))
    policy.model.action_head.dit_engine = engine
    other = chunk(act(policy, seed=1))
    assert other != first
    assert "dit_engine was exchanged" in only_reason(handle)
    handle.prepare(S)
    assert chunk(act(policy, seed=1)) == other
    assert handle.stats["replays"] == 1
    handle.undo()
    engine.close()


def test_weights_that_move_are_noticed(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized("n1.7", "torch", example=S)
    linear = policy.model.action_head.model.linear
    linear.weight.data = linear.weight.data * 2
    changed = chunk(act(policy, seed=1))
    assert "weights of action_head.model were moved" in only_reason(handle)
    handle.prepare(S)
    assert chunk(act(policy, seed=1)) == changed
    assert handle.stats["replays"] == 1


def test_an_exchanged_layer_is_noticed(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized("n1.7", "torch", example=S)
    model = policy.model.action_head.model
    model.linear = nn.Sequential(model.linear, nn.SiLU())
    changed = chunk(act(policy, seed=1))
    assert "in action_head.model linear was replaced" in only_reason(handle)
    handle.prepare(S)
    assert chunk(act(policy, seed=1)) == changed
    model.linear[0].forward = lambda x: x
    assert chunk(act(policy, seed=1)) != changed
    assert (handle.stats["replays"], handle.stats["original"]) == (1, 2)


def test_weights_that_change_in_place_are_followed(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized("n1.7", "torch", example=S)
    before = chunk(act(policy, seed=1))
    with torch.no_grad():
        policy.model.action_head.position_embedding.weight.mul_(2)
    after = chunk(act(policy, seed=1))
    assert handle.stats["replays"] == 2
    handle.undo()
    assert chunk(act(policy, seed=1)) == after != before


def test_a_closed_engine(optimized: Callable[..., Any]) -> None:
    policy, _ = optimized("n1.7", "bundle", example=S)
    policy.model.action_head.dit_engine.close()
    with pytest.raises(errors.ClosedEngineError):
        act(policy)


# Heads with a loop of their own ---------------------------------------------------------------------------------------


def with_own_loop(policy: Any, change: Callable[..., Any]) -> None:
    """Installs a loop as a fork would: the class's, and then something."""
    head = policy.model.action_head
    own = type(head).get_action_with_features

    @functools.wraps(own)
    def get_action_with_features(*args: Any, **kwargs: Any) -> Any:
        return change(own(head, *args, **kwargs))

    head.get_action_with_features = get_action_with_features


def scaled(result: Any) -> Any:
    result["action_pred"] = result["action_pred"] * 1.5
    return result


def drawn(result: Any) -> Any:
    torch.randn(3, device="cuda")
    return result


def drawn_on_the_host(result: Any) -> Any:
    torch.randn(3)
    return result


def counted(result: Any, calls: list[int] = []) -> Any:  # noqa: B006 - a head that remembers
    calls.append(1)
    result["action_pred"] = result["action_pred"] + len(calls)
    return result


def renamed(result: Any) -> Any:
    result["value"] = result["action_pred"]
    return result


def copied(result: Any) -> Any:
    result["backbone_features"] = result["backbone_features"].clone()
    return result


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (scaled, "a loop of its own"),
        (counted, "each time"),
        (drawn, "random numbers"),
        (drawn_on_the_host, "random numbers"),
        (renamed, "returns action_pred, backbone_features, state_features, value"),
        (copied, "another backbone_features"),
    ],
)
def test_another_loop_stays(set_up: Callable[..., Any], change: Callable[..., Any], why: str) -> None:
    policy = set_up("n1.7", "dit")
    with_own_loop(policy, change)
    expected = chunks(policy, 3)
    handle = optimize(policy)
    (report,) = handle.prepare(S)
    assert not report["captured"]
    assert why in report["reason"]
    assert (chunks(policy, 3) == expected) is (change is not counted)
    assert (handle.stats["original"], handle.stats["replays"]) == (3, 0)
    assert why in only_reason(handle)
    handle.undo()


def test_a_bundle_without_the_self_attention_that_its_head_has(set_up: Callable[..., Any]) -> None:
    """As N1.7's first set-up had it: the module is there, and its `get_action` does not use it."""
    policy = set_up("n1.7", "bundle")
    policy.model.action_head.vl_sa_engine.close()
    policy.model.action_head.vl_sa_engine = None
    installed = policy.model.action_head.get_action.func

    def get_action(head: Any, backbone_output: Any, action_input: Any, options: Any = None) -> Any:
        head.vl_self_attention = nn.Identity()
        try:
            return installed(head, backbone_output, action_input, options)
        finally:
            head.vl_self_attention = attention

    attention = nn.Linear(WIDTH, WIDTH).to("cuda", torch.bfloat16)
    policy.model.action_head.vl_self_attention = attention
    policy.model.action_head.get_action = functools.partial(get_action, policy.model.action_head)
    expected = chunks(policy, 2)
    handle = optimize(policy)
    (report,) = handle.prepare(S)
    assert "other actions" in report["reason"]
    assert chunks(policy, 2) == expected
    handle.undo()


def test_a_part_that_cannot_be_captured(set_up: Callable[..., Any]) -> None:
    policy = set_up("n1.7", "torch")
    head = policy.model.action_head
    plain = head.model.forward

    def forward(**kwargs: Any) -> Any:
        assert kwargs["timestep"].max().item() < 1000  # a wait
        return plain(**kwargs)

    head.model.forward = forward
    expected = chunks(policy, 3)
    handle = optimize(policy)
    (report,) = handle.prepare(S)
    assert not report["captured"]
    assert "captur" in report["reason"]
    assert chunks(policy, 3) == expected
    assert (handle.stats["eager"], handle.stats["replays"]) == (3, 0)
    assert report["reason"] in handle.stats["reasons"]
    torch.randn(3, device="cuda")  # still works
    handle.undo()


@pytest.mark.parametrize("kind", ["dit", "bundle"])
def test_where_every_capture_fails(set_up: Callable[..., Any], kind: str) -> None:
    """The driver refuses, as one fork reports of JetPack 6.2.1: the actions are the same, and the reason is told."""
    policy = set_up("n1.7", kind)
    expected = chunks(policy, 3)
    handle = optimize(policy)
    rig.cuda().set("capture_fail", 900)
    try:
        (report,) = handle.prepare(S)
        assert not report["captured"]
        assert "operation not permitted when stream is capturing" in report["reason"]
        captures = rig.cuda().count("cuStreamBeginCapture_v2")
        assert chunks(policy, 3) == expected
        assert rig.cuda().count("cuStreamBeginCapture_v2") == captures  # remembered
    finally:
        rig.cuda().set("capture_fail", 0)
    assert (handle.stats["eager"], handle.stats["reasons"]) == (3, {report["reason"]: 3})
    assert handle.prepare(S)[0]["captured"]  # tried again when asked
    assert chunks(policy, 3) == expected
    handle.undo()


def test_engines_that_wait_cannot_be_captured(optimized: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JETRT_TRT_SYNCHRONIZE", "1")
    policy, handle = optimized("n1.7", "bundle")
    expected = chunks(policy, 3)
    (report,) = handle.prepare(S)
    assert not report["captured"]
    assert "wait" in report["reason"]
    assert chunks(policy, 3) == expected
    assert handle.stats["eager"] == 3


# Preparing ------------------------------------------------------------------------------------------------------------


@every_kind
def test_preparing_leaves_the_random_numbers(set_up: Callable[..., Any], version: str, kind: str) -> None:
    policy = set_up(version, kind)
    torch.manual_seed(3)
    handle = optimize(policy)
    handle.prepare(S, 9)
    state, host = torch.cuda.get_rng_state(0), torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(state, torch.cuda.get_rng_state(0))
    assert torch.equal(host, torch.get_rng_state())
    handle.undo()


def test_examples_by_name_and_by_position(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized()
    call = handle._loop.call(example_inputs(9))
    (named,) = handle.prepare(call)
    call = handle._loop.call(example_inputs(10))
    names = list(inspect.signature(policy.model.action_head.get_action_with_features).parameters)
    assert names[:5] == ["backbone_features", "state_features", "embodiment_id", "backbone_output", "action_input"]
    (placed,) = handle.prepare([call[name] for name in names[:5]])
    assert named["captured"]
    assert placed["captured"]
    assert [report["shapes"]["features"][1] for report in (named, placed)] == [9, 10]


def test_a_length_takes_the_rest_from_the_last_call(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized()
    call = handle._loop.call(example_inputs())
    call["embodiment_id"] = call["embodiment_id"].to(torch.int32)
    with torch.inference_mode():
        policy.model.action_head.get_action_with_features(**call)
    (report,) = handle.prepare(9)
    assert report["captured"]
    assert handle._last["embodiment_id"][1] is torch.int32
    act(policy, 9)  # int64
    assert handle.stats["replays"] == 0


def test_examples_that_are_none(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized("n1.7", "dit")
    with pytest.raises(ValueError, match="at least 1"):
        handle.prepare(0)
    with pytest.raises(TypeError, match="needs at least backbone_features"):
        handle.prepare({"features": 1})
    call = handle._loop.call(example_inputs())
    with pytest.raises(ValueError, match="real-time chunking"):
        handle.prepare({**call, "action_input": BatchFeature({"action": values((1, HORIZON, ACTION), 0)})})
    with pytest.raises(ValueError, match="features is no tensor, but list"):
        handle.prepare({**call, "backbone_features": [1.0]})
    # What the original says to an example, it says.
    with pytest.raises((errors.JetrtError, RuntimeError), match="vl_embs"):
        handle.prepare(33)
    act(policy)
    assert handle.stats["original"] == 1


@pytest.mark.parametrize("inside", [False, True])
def test_inference_mode(set_up: Callable[..., Any], inside: bool) -> None:
    """Prepared outside and called inside, and the other way round."""
    policy = set_up("n1.7", "bundle")
    expected = chunk(act(policy, seed=1))
    handle = optimize(policy)
    with torch.inference_mode(inside):
        handle.prepare(S)
    if inside:
        head = policy.model.action_head
        output = BatchFeature(
            {
                "backbone_features": values((1, S, WIDTH), 0),
                "backbone_attention_mask": torch.ones((1, S), dtype=torch.bool, device="cuda"),
                "image_mask": torch.arange(S, device="cuda").unsqueeze(0) < S // 2,
            }
        )
        given = BatchFeature({"state": values((1, 2, ACTION), 1), "embodiment_id": ids(0)})
        torch.manual_seed(1)
        found = chunk(head.get_action(output, given))
    else:
        found = chunk(act(policy, seed=1))
    assert found == expected
    assert handle.stats["replays"] == 1
    handle.undo()


def test_warm_up_calls(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized(warmup_calls=3)
    expected = {s: chunk(handle_original(policy, handle, s)) for s in (8, 9, 10, 11)}
    assert [chunk(act(policy, s, seed=1)) for s in (8, 9, 8, 10)] == [expected[s] for s in (8, 9, 8, 10)]
    # The first two prepared their shapes, the third replayed, the fourth came too late.
    assert (handle.stats["captures"], handle.stats["replays"], handle.stats["original"]) == (2, 1, 3)
    assert handle.stats["not_prepared"][0]["features"] == (1, 10, WIDTH)


def test_a_warm_up_call_that_cannot_prepare(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized(warmup_calls=3)
    expected = chunk(handle_original(policy, handle, S))
    torch._standin.fail("empty_like", 1, RuntimeError("no memory"))
    torch._standin.fail("empty", 1, RuntimeError("no memory"))
    assert chunk(act(policy, seed=1)) == expected
    assert handle.stats["captures"] == 0
    assert chunk(act(policy, seed=1)) == expected
    assert "preparing it failed: RuntimeError: no memory" in handle.stats["reasons"]
    torch._standin.fail("empty_like", 0)
    assert handle.prepare(S)[0]["captured"]


def handle_original(policy: Any, handle: Any, s: int) -> Any:
    """What the original gives, past the handle."""
    head = policy.model.action_head
    del head.get_action_with_features
    try:
        return act(policy, s, seed=1)
    finally:
        head.get_action_with_features = handle


def test_more_shapes_than_graphs(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized(max_shapes=2)
    handle.prepare(8, 9, 10)
    assert handle.stats["evicted"] == 1
    expected = chunk(handle_original(policy, handle, 8))
    assert chunk(act(policy, 8, seed=1)) == expected
    assert handle.stats["eager"] == 1
    assert "not prepared" in only_reason(handle)


def test_initial_actions_instead_of_noise(set_up: Callable[..., Any]) -> None:
    policy = set_up("n1.7", "bundle")
    policy.model.action_head.init_actions = values((1, HORIZON, ACTION), 3)
    expected = chunks(policy, 3)
    handle = optimize(policy, example=S)
    assert chunks(policy, 3) == expected
    assert handle.stats["replays"] == 3
    del policy.model.action_head.init_actions
    assert chunk(act(policy, seed=1)) != expected[0]
    handle.undo()


def test_the_dit_alone_as_the_scripts_set_it_up(set_up: Callable[..., Any]) -> None:
    """N1.7's has four parameters where its caller passes six: the loop takes them, the original gets what it knows."""
    policy = set_up("n1.7", "dit_only")
    with pytest.raises(TypeError, match="action_input"):
        act(policy)
    handle = optimize(policy, example=S)
    found = chunk(act(policy, seed=1))
    assert handle.stats["replays"] == 1
    policy.model.action_head.num_inference_timesteps = 2
    act(policy, seed=1)
    policy.model.action_head.num_inference_timesteps = 4
    assert handle.stats["original"] == 1
    assert chunk(act(policy, seed=1)) == found
    with pytest.raises(TypeError, match="action_input"):  # real-time chunking, which it would leave out
        act(policy, action_input={"action": values((1, HORIZON, ACTION), 9)}, options=RTC)
    handle.undo()


# The handle -----------------------------------------------------------------------------------------------------------


@every_kind
def test_undo(set_up: Callable[..., Any], version: str, kind: str) -> None:
    policy = set_up(version, kind)
    head = policy.model.action_head
    before = dict(vars(head))
    handle = optimize(policy, example=S, denoising_steps=2)
    assert head.num_inference_timesteps == 2
    handle.undo()
    handle.undo()
    assert dict(vars(head)) == before
    with pytest.raises(RuntimeError, match="undone"):
        handle.prepare(S)
    act(policy)
    assert handle.stats["original"] == 0


def test_undo_where_somebody_has_wrapped_it(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized(example=S)
    head = policy.model.action_head
    head.get_action_with_features = wrapper = functools.partial(handle)
    expected = chunk(act(policy, seed=1))
    handle.undo()
    assert head.get_action_with_features is wrapper
    assert chunk(act(policy, seed=1)) == expected


def test_optimized_twice(optimized: Callable[..., Any]) -> None:
    policy, _ = optimized()
    with pytest.raises(RuntimeError, match="optimized already"):
        optimize(policy)


def test_fewer_steps_on_request(set_up: Callable[..., Any]) -> None:
    policy = set_up("n1.7", "dit")
    policy.model.action_head.num_inference_timesteps = 2
    expected = chunk(act(policy, seed=1))
    policy.model.action_head.num_inference_timesteps = 4
    handle = optimize(policy, denoising_steps=2, example=[S, 9])
    assert chunk(act(policy, seed=1)) == expected
    assert handle.stats["replays"] == 1
    handle.undo()
    with pytest.raises(ValueError, match="denoising_steps is 0"):
        optimize(policy, denoising_steps=0)


def test_an_example_that_fails_changes_nothing(set_up: Callable[..., Any]) -> None:
    policy = set_up("n1.7", "dit")
    before = dict(vars(policy.model.action_head))
    with pytest.raises((errors.JetrtError, RuntimeError)):
        optimize(policy, example=33, denoising_steps=2)
    assert dict(vars(policy.model.action_head)) == before


def test_heads_that_are_not_known(set_up: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"no model\.action_head"):
        optimize(SimpleNamespace())
    head = nn.Module()
    head.config = CONFIGS["n1.6"]
    with pytest.raises(TypeError, match="Nothing was changed"):
        optimize(SimpleNamespace(model=SimpleNamespace(action_head=head)))


def test_a_policy_in_a_wrapper(set_up: Callable[..., Any]) -> None:
    policy = set_up("n1.6", "torch")
    handle = optimize(SimpleNamespace(policy=policy), example=S)
    act(policy)
    assert handle.stats["replays"] == 1
    assert "1 replays" in repr(handle)
    assert inspect.signature(handle) == inspect.signature(
        type(policy.model.action_head).get_action_with_features.__get__(1)
    )
    handle.undo()


def test_two_threads(optimized: Callable[..., Any]) -> None:
    policy, handle = optimized("n1.7", "bundle")
    policy.model.action_head.init_actions = values((1, HORIZON, ACTION), 3)  # no random numbers to share
    expected = [chunk(act(policy, number=n)) for n in range(4)]
    handle.prepare(S)
    wrong: list[int] = []

    def many() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            wrong.extend(n for n in range(20) if chunk(act(policy, number=n % 4)) != expected[n % 4])

    threads = [threading.Thread(target=many) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert handle.stats["replays"] == 40


# Processes of their own -----------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
PATHS = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
START = """
    import sys
    import test_loop
    import torch
    from jetrt.groot import TensorRTDiTWrapper, optimize, replace_dit_with_tensorrt

    policy, wrapper = test_loop.make_policy("n1.7"), TensorRTDiTWrapper(sys.argv[1])
    replace_dit_with_tensorrt(policy, sys.argv[1], preloaded_trt=wrapper)
    close = wrapper.close
    del wrapper
    handle = optimize(policy, example=test_loop.S)
    def act():
        return test_loop.act(policy)
    result = act()
    assert handle.stats["replays"] == 1
"""


@pytest.mark.parametrize("way", exits.LOOP)
def test_interpreter_exit(folder: Callable[..., Path], way: str) -> None:
    exits.run(exits.programs(START, exits.LOOP)[way], folder() / "dit_bf16.engine", PYTHONPATH=PATHS)


def test_on_the_second_gpu(folder: Callable[..., Path]) -> None:
    """Whichever is the current one; random numbers are those of the second."""
    program = """
        import sys
        import test_loop
        import torch
        from jetrt.groot import optimize, replace_dit_with_tensorrt

        with torch.cuda.device(1):
            policy = test_loop.make_policy("n1.7")
            given = [test_loop.head_inputs(policy, number=n) for n in range(4)]
        replace_dit_with_tensorrt(policy, sys.argv[1], 1)
        assert torch.cuda.current_device() == 1

        def actions():
            torch.manual_seed(5)
            with torch.inference_mode():
                found = [policy.model.action_head.get_action(*map(type(one[0]), one)) for one in given]
            assert all(result["action_pred"].device.index == 1 for result in found)
            return [test_loop.chunk(result) for result in found]

        for current in (1, 0):
            torch.cuda.set_device(current)
            expected, state = actions(), torch.cuda.get_rng_state(0)
            handle = optimize(policy, example=test_loop.S)
            assert actions() == expected
            assert handle.stats["replays"] == 4, handle.stats
            assert torch.cuda.current_device() == current
            assert torch.equal(torch.cuda.get_rng_state(0), state)
            handle.undo()
        print("done", flush=True)
    """
    exits.run(dedent(program), folder() / "dit_bf16.engine", PYTHONPATH=PATHS, FAKE_CUDA_DEVICES="2")
