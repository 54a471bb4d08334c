"""`jetrt.groot.optimize`: the loop as one graph gives the bits of the loop eager, and those of NVIDIA's own binding.

A small head of N1.7 is built by `jetrt build` from the ONNX files of `benches/groot/models.py`, or one is taken from
the folder that JETRT_TEST_GROOT names (a bundle of that program, such as `n1.7-2`).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import exits
import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

GROOT = Path(__file__).resolve().parents[2] / "benches" / "groot"
sys.path.insert(0, str(GROOT))

LENGTHS = (40, 23, 64)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The configuration and the folder of plans."""
    import models
    import versions

    given = os.environ.get("JETRT_TEST_GROOT")
    if given:
        metadata = json.loads((Path(given) / "export_metadata.json").read_text())
        return replace(
            versions.VERSIONS[metadata["model_version"]],
            num_layers=metadata["num_layers"],
            vl_self_attention_layers=metadata["vl_self_attention_layers"],
        ), Path(given)
    pytest.importorskip("onnx")
    config = replace(
        versions.N1_7,
        num_layers=2,
        input_embedding_dim=256,
        backbone_embedding_dim=256,
        hidden_size=128,
        num_attention_heads=4,
        max_num_embodiments=2,
        max_seq_len=64,
        vl_lengths=(1, 40, 128),
        vl_self_attention_layers=1,
    )
    folder = tmp_path_factory.mktemp("groot")
    options = argparse.Namespace(onnx_only=False, builder="jetrt", opt_level=1, parity=False, jetrt_option=[])
    models.bundle(config, folder, options)
    return config, folder


@pytest.fixture(scope="session")
def nvidia() -> ModuleType:
    """The scripts' `Engine` over NVIDIA's binding, as `benches/groot` has it."""
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        pytest.importorskip("tensorrt_bindings", reason="neither tensorrt nor tensorrt_bindings is installed")
    return fresh("trt_torch")


def fresh(name: str) -> ModuleType:
    """A module of benches/groot, whatever another test put under its name."""
    sys.modules.pop(name, None)
    return importlib.import_module(name)


class Heads:
    """Makes policies with engines, and closes them."""

    def __init__(self, config: Any, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.opened: list[Any] = []

    def torch(self) -> Any:
        import networks

        return networks.policy(self.config, device="cuda")

    def engines(self, engine: Any) -> Any:
        """All of the head on engines, set up as upstream does."""
        import networks

        import jetrt.trt_torch

        sys.modules["trt_torch"] = jetrt.trt_torch  # what trt_model_forward imports; NVIDIA's binding may not be there
        forward = fresh("trt_model_forward")
        del sys.modules["trt_torch"]

        def make(*args: Any) -> Any:
            self.opened.append(engine(*args))
            return self.opened[-1]

        forward.Engine = make
        names = ("state_encoder", "action_encoder", "dit", "action_decoder", "vl_self_attention")
        policy = networks.policy(self.config, device="cuda", without=names)
        mode = "n17_full_pipeline" if self.config.version == "n1.7" else "full_pipeline"
        forward.setup_tensorrt_engines(policy, str(self.folder), mode)
        return policy

    def dit(self, replace_dit: Callable[..., None]) -> Any:
        """The DiT on its engine, the rest in torch."""
        import networks

        policy = networks.policy(self.config, device="cuda", without=("dit",))
        replace_dit(policy, str(self.folder / "dit_bf16.engine"))
        return policy


@pytest.fixture
def heads(bundle: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Heads]:
    monkeypatch.setenv("LOCAL_RANK", "1")  # no tables
    made = Heads(*bundle)
    yield made
    torch.cuda.synchronize()
    while made.opened:
        made.opened.pop().close()


KINDS = ("engines", "dit")


def of_jetrt(heads: Heads, kind: str) -> Any:
    from jetrt.groot import replace_dit_with_tensorrt
    from jetrt.trt_torch import Engine

    return heads.engines(Engine) if kind == "engines" else heads.dit(replace_dit_with_tensorrt)


def of_nvidia(heads: Heads, kind: str, nvidia: ModuleType) -> Any:
    return heads.engines(nvidia.Engine) if kind == "engines" else heads.dit(fresh("script").replace_dit_with_tensorrt)


class Observations:
    """What a policy gives its head, as tensors on the GPU; the same for a number."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.made: dict[tuple[int, int], tuple[Any, Any]] = {}

    def __call__(self, s: int, number: int = 0) -> tuple[Any, Any]:
        from standin import BatchFeature

        if (s, number) not in self.made:
            generator = torch.Generator("cuda").manual_seed(1000 * s + number)
            config = self.config

            def values(*shape: int) -> Any:
                return torch.randn(*shape, generator=generator, device="cuda").to(torch.bfloat16)

            history = config.state_history_length
            features = values(1, s, config.backbone_embedding_dim)
            self.made[s, number] = (
                {
                    "backbone_features": features,
                    "backbone_attention_mask": torch.arange(s, device="cuda").unsqueeze(0) < s - 2,
                    "image_mask": torch.arange(s, device="cuda").unsqueeze(0) < s // 2,
                },
                {
                    "state": values(1, history, config.max_state_dim),
                    "embodiment_id": torch.full((1,), number % 2, dtype=torch.int64, device="cuda"),
                },
            )
        output, given = self.made[s, number]
        return BatchFeature(dict(output)), BatchFeature(dict(given))


def act(policy: Any, observe: Observations, s: int = LENGTHS[0], number: int = 0, **more: Any) -> Any:
    output, given = observe(s, number)
    given.update(more.get("action_input", {}))
    options = () if observe.config.version == "n1.6" else (more.get("options"),)
    with torch.inference_mode():
        return policy.model.action_head.get_action(output, given, *options)["action_pred"]


def chunks(policy: Any, observe: Observations, count: int = 20, lengths: tuple[int, ...] = LENGTHS[:1]) -> list[Any]:
    """This many in a row after a seed, as bits."""
    torch.manual_seed(42)
    torch.cuda.manual_seed_all(42)
    return [bits(act(policy, observe, lengths[n % len(lengths)], n)) for n in range(count)]


def bits(actions: Any) -> bytes:
    return bytes(actions.contiguous().view(torch.uint8).cpu().numpy().tobytes())


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_is_eager_is_the_bare_binding(heads: Heads, nvidia: ModuleType, kind: str) -> None:
    from jetrt.groot import optimize

    observe = Observations(heads.config)
    expected = chunks(of_nvidia(heads, kind, nvidia), observe, lengths=LENGTHS)
    policy = of_jetrt(heads, kind)
    assert chunks(policy, observe, lengths=LENGTHS) == expected
    handle = optimize(policy)
    reports = handle.prepare(*LENGTHS)
    assert [report["reason"] for report in reports] == [None] * len(LENGTHS)
    assert chunks(policy, observe, lengths=LENGTHS) == expected
    stats = handle.stats
    assert (stats["replays"], stats["eager"], stats["original"]) == (20, 0, 0), stats
    handle.undo()
    assert chunks(policy, observe, lengths=LENGTHS) == expected
    assert len(set(expected)) == 20


def test_the_whole_head_in_torch(heads: Heads) -> None:
    from jetrt.groot import optimize

    observe = Observations(heads.config)
    policy = heads.torch()
    expected = chunks(policy, observe)
    handle = optimize(policy)
    (report,) = handle.prepare(LENGTHS[0])
    if report["captured"]:
        assert chunks(policy, observe) == expected
        assert handle.stats["replays"] == 20
    else:  # a kernel that does not give the same bits twice is refused, and the original goes on
        assert chunks(policy, observe, 3) == expected[:3]
        pytest.skip(report["reason"])
    handle.undo()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", ["default", "side"])
def test_streams_and_modes(heads: Heads, kind: str, stream: str) -> None:
    """Prepared outside of inference mode and called inside (as `act` does), and the other way round."""
    from jetrt.groot import optimize

    observe = Observations(heads.config)
    policy = of_jetrt(heads, kind)
    expected = chunks(policy, observe, 3)
    with torch.cuda.stream(torch.cuda.Stream() if stream == "side" else torch.cuda.default_stream()):
        handle = optimize(policy, example=LENGTHS[0])
        assert chunks(policy, observe, 3) == expected
        handle.undo()
        with torch.inference_mode():
            handle = optimize(policy, example=LENGTHS[0])
        torch.manual_seed(42)
        with torch.no_grad():
            found = policy.model.action_head.get_action(*observe(LENGTHS[0], 0))["action_pred"]
        assert bits(found) == expected[0]
        assert handle.stats["replays"] == 1
        handle.undo()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_second_gpu(heads: Heads, kind: str) -> None:
    """Made and captured while GPU 1 is current, called while either is: the bits that GPU 0 gives."""
    from jetrt.groot import optimize, replace_dit_with_tensorrt
    from jetrt.trt_torch import Engine

    def made(device: int) -> Any:
        if kind == "engines":
            return heads.engines(Engine)
        return heads.dit(partial(replace_dit_with_tensorrt, device=device))

    def run(policy: Any, observe: Observations) -> list[Any]:
        return chunks(policy, observe, 6, LENGTHS)

    expected = run(made(0), Observations(heads.config))
    with torch.cuda.device(1):
        policy, observe = made(1), Observations(heads.config)
        assert policy.model.action_head.device == torch.device("cuda:1")
        assert run(policy, observe) == expected
        handle = optimize(policy)
        assert [report["reason"] for report in handle.prepare(*LENGTHS)] == [None] * len(LENGTHS)
        assert run(policy, observe) == expected
    assert torch.cuda.current_device() == 0
    assert run(policy, observe) == expected
    assert (handle.stats["replays"], handle.stats["original"]) == (12, 0), handle.stats
    handle.undo()
    assert run(policy, observe) == expected
    assert torch.cuda.current_device() == 0


def test_deterministic_mode(heads: Heads) -> None:
    """As the scripts' `set_seed` leaves torch."""
    from jetrt.groot import optimize

    observe = Observations(heads.config)
    policy = of_jetrt(heads, "engines")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        expected = chunks(policy, observe, 3)
        handle = optimize(policy, example=LENGTHS[0])
        assert chunks(policy, observe, 3) == expected
        assert handle.stats["replays"] == 3
        handle.undo()
    finally:
        torch.use_deterministic_algorithms(False)


def test_other_steps_and_lengths_run_on_the_original(heads: Heads) -> None:
    from jetrt.groot import optimize

    observe = Observations(heads.config)
    policy = of_jetrt(heads, "engines")
    head = policy.model.action_head
    odd = chunks(policy, observe, 1, lengths=(31,))
    head.num_inference_timesteps = 2
    two = chunks(policy, observe, 2)
    head.num_inference_timesteps = 4
    handle = optimize(policy, example=LENGTHS[0])
    captures = handle.stats["captures"]
    assert chunks(policy, observe, 1, lengths=(31,)) == odd
    head.num_inference_timesteps = 2
    assert chunks(policy, observe, 2) == two
    assert (handle.stats["original"], handle.stats["replays"], handle.stats["captures"]) == (3, 0, captures)
    assert {seen["steps"] for seen in handle.stats["not_prepared"]} == {2, 4}
    handle.prepare()  # of the present number of steps
    assert chunks(policy, observe, 2) == two
    assert handle.stats["replays"] == 2
    handle.undo()


def test_real_time_chunking_runs_on_the_original(heads: Heads) -> None:
    from jetrt.groot import optimize

    if heads.config.version == "n1.6":
        pytest.skip("N1.6 has no real-time chunking")
    observe = Observations(heads.config)
    policy = of_jetrt(heads, "dit")
    config = heads.config
    previous = torch.randn(1, config.action_horizon, config.max_action_dim, device="cuda").to(torch.bfloat16)
    more = {
        "action_input": {"action": previous},
        "options": {
            "action_horizon": config.action_horizon,
            "rtc_overlap_steps": 8,
            "rtc_frozen_steps": 4,
            "rtc_ramp_rate": 6.0,
        },
    }
    torch.manual_seed(1)
    expected = bits(act(policy, observe, **more))
    handle = optimize(policy, example=LENGTHS[0])
    torch.manual_seed(1)
    assert bits(act(policy, observe, **more)) == expected
    (reason,) = handle.stats["reasons"]
    assert "real-time chunking" in reason
    handle.undo()


def test_preparing_leaves_random_numbers_and_torch_as_they_were(heads: Heads) -> None:
    from jetrt.groot import optimize

    policy = of_jetrt(heads, "dit")
    torch.manual_seed(5)
    expected = torch.randn(7, device="cuda"), torch.randn(7)
    torch.manual_seed(5)
    handle = optimize(policy, example=list(LENGTHS))
    found = torch.randn(7, device="cuda"), torch.randn(7)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    handle.undo()


def test_a_loop_that_cannot_be_captured_runs_eagerly(heads: Heads) -> None:
    from jetrt.groot import optimize

    observe = Observations(heads.config)
    policy = of_jetrt(heads, "dit")
    expected = chunks(policy, observe, 3)
    encoder = policy.model.action_head.action_encoder
    plain = encoder.forward

    def forward(actions: Any, timesteps: Any, ids: Any) -> Any:
        assert int(timesteps.max().item()) < 1000  # waits
        return plain(actions, timesteps, ids)

    encoder.forward = forward
    handle = optimize(policy)
    (report,) = handle.prepare(LENGTHS[0])
    assert not report["captured"]
    assert report["reason"]
    assert chunks(policy, observe, 3) == expected
    assert (handle.stats["eager"], handle.stats["replays"]) == (3, 0)
    assert torch.randn(3, device="cuda").isfinite().all()
    handle.undo()
    del encoder.forward
    assert chunks(policy, observe, 3) == expected


def test_parts_that_change_are_noticed(heads: Heads) -> None:
    from jetrt.groot import optimize

    observe = Observations(heads.config)
    policy = of_jetrt(heads, "dit")
    head = policy.model.action_head
    handle = optimize(policy, example=LENGTHS[0])
    before = chunks(policy, observe, 1)
    head.action_decoder.to(torch.float32).to(torch.bfloat16)  # the same values, elsewhere
    # What torch frees and allocates again may come to lie where it lay.
    after = chunks(policy, observe, 1)
    assert after == before
    hooked: list[int] = []
    hook = head.model.register_forward_hook(lambda *_: hooked.append(1))
    assert chunks(policy, observe, 1) == before
    assert len(hooked) == 4
    hook.remove()
    with torch.no_grad():
        head.position_embedding.weight.mul_(2)  # in place: the graph reads it
    changed = chunks(policy, observe, 1)
    assert changed != before
    handle.undo()
    assert chunks(policy, observe, 1) == changed


def test_closing_an_engine_of_a_graph(heads: Heads) -> None:
    import jetrt
    from jetrt.groot import optimize

    observe = Observations(heads.config)
    policy = of_jetrt(heads, "engines")
    handle = optimize(policy, example=LENGTHS[0])
    act(policy, observe)
    policy.model.action_head.dit_engine.close()
    with pytest.raises(jetrt.errors.ClosedEngineError):
        act(policy, observe)
    handle.undo()


@pytest.mark.parametrize("way", ["one graph", "engines called one by one"])
def test_ten_thousand_actions_without_growth(heads: Heads, way: str) -> None:
    from jetrt.groot import optimize

    observe = Observations(heads.config)
    policy = of_jetrt(heads, "engines")
    handle = optimize(policy) if way == "one graph" else None
    if handle is not None:
        handle.prepare(*LENGTHS)

    def run(count: int) -> None:
        for n in range(count):
            act(policy, observe, LENGTHS[n % len(LENGTHS)], n % 6)
            if n % 100 == 99:
                torch.cuda.synchronize()

    def counted() -> list[dict[str, Any]]:
        every = [engine.core.stats for engine in heads.opened]
        # With a graph no engine is called; without, calls alone are counted.
        names = [*every[0]] if handle is not None else ["output_allocations", "staging_allocations", "casts", "waits"]
        return [{name: stats[name] for name in names} for stats in every]

    run(300)
    torch.cuda.synchronize()
    gc.collect()
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    before, resident = counted(), resident_bytes()
    run(10_000)
    torch.cuda.synchronize()
    gc.collect()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (held, reserved)
    assert counted() == before
    # Pages that the C allocator moves about: a leak of 400 bytes an action is seen.
    assert resident_bytes() - resident < 4 << 20
    if handle is not None:
        assert handle.stats["replays"] == 10_300
        assert handle.stats["captures"] == len(LENGTHS)
        handle.undo()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("way", ["one graph", "engines called one by one"])
def test_the_next_observation_is_prepared_while_the_loop_runs(heads: Heads, way: str) -> None:
    """By one worker thread, as the scripts do it: its ticks are not delayed by an action that waits for the GPU."""
    from jetrt.groot import optimize

    observe = Observations(heads.config)
    policy = of_jetrt(heads, "engines")
    handle = optimize(policy, example=LENGTHS[0]) if way == "one graph" else None
    act(policy, observe)
    torch.cuda.synchronize()
    replays = handle.stats["replays"] if handle is not None else 0

    def ticks(seconds: float) -> list[float]:
        end, found = time.perf_counter() + seconds, []
        while time.perf_counter() < end:
            start = time.perf_counter()
            time.sleep(0.0005)
            found.append(time.perf_counter() - start)
        return sorted(found)

    quiet, calls = ticks(0.5), 0
    with ThreadPoolExecutor(1) as pool:
        ticking = pool.submit(ticks, 2.0)
        while not ticking.done():
            torch.cuda._sleep(100_000_000)  # some 50 ms before the action's own work can begin
            act(policy, observe)
            torch.cuda.current_stream().synchronize()
            calls += 1
        busy = ticking.result()
    # With the GIL held for a wait, most ticks would take those 50 ms; Python's switching of threads takes up to 5.
    assert busy[len(busy) * 99 // 100] < max(quiet[len(quiet) * 99 // 100] * 5, 0.02)
    assert calls > 10
    if handle is not None:
        assert handle.stats["replays"] == replays + calls
        handle.undo()


# The end --------------------------------------------------------------------------------------------------------------

START = """
    import pickle
    import sys
    import test_loop
    import torch
    from jetrt.groot import optimize

    with open(sys.argv[1], "rb") as file:
        config, folder = pickle.load(file)
    observe, heads = test_loop.Observations(config), test_loop.Heads(config, folder)
    policy = test_loop.of_jetrt(heads, "engines")
    close = policy.model.action_head.dit_engine.close
    del heads
    handle = optimize(policy, example=test_loop.LENGTHS[0])
    def act():
        return test_loop.act(policy, observe)
    result = act()
    assert handle.stats["replays"] == 1, handle.stats
"""


@pytest.mark.parametrize("way", exits.LOOP)
def test_interpreter_exit(bundle: tuple[Any, Path], way: str, tmp_path: Path) -> None:
    given = tmp_path / "bundle.pickle"
    given.write_bytes(pickle.dumps(bundle))
    paths = [Path(__file__).parent, Path(__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    more = {"PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))), "PYTHONWARNINGS": "ignore"}
    exits.run(exits.programs(START, exits.LOOP)[way], given, **more)
