"""`jetrt.groot` on real GPUs: what the stand-in torch cannot show."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exits
import pytest
import reference
from test_binding import bindings, run_binding

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")
pytestmark = pytest.mark.gpu

NAMES = ("sa_embs", "vl_embs", "timestep", "image_mask", "backbone_attention_mask")


@pytest.fixture
def dit(engines: Path) -> Iterator[Callable[..., Any]]:
    """`dit(ring=2)`: a wrapper of dit5.engine that is closed after the test."""
    from jetrt.groot import TensorRTDiTWrapper

    made = []

    def make(device: Any = 0, **options: Any) -> Any:
        made.append(TensorRTDiTWrapper(engines / "dit5.engine", device, **options))
        return made[-1]

    yield make
    for wrapper in made:
        wrapper.close()
    torch.cuda.set_device(0)


def arrays(s: int = 122, seed: int = 0) -> dict[str, Any]:
    return reference.dit5_inputs(s, seed=seed, timestep=seed % 7)


def tensors(given: dict[str, Any], device: Any = "cuda") -> list[Any]:
    return [reference.make("torch", given[name]).to(device) for name in NAMES]


def check(given: dict[str, Any], found: Any) -> None:
    reference.check_dit5(given, reference.to_numpy("torch", found.detach().to("cuda:0")))


def same_bits(a: Any, b: Any) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def masked(wrapper: Any, values: list[Any]) -> Any:
    """Called as the heads call it."""
    return wrapper(values[0], values[1], values[2], image_mask=values[3], backbone_attention_mask=values[4])


# Bit for bit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", ["off", "auto"])
@pytest.mark.parametrize("options", [{}, {"cache_outputs": True}, {"ring": 3}])
def test_bit_for_bit_what_the_binding_gives(
    dit: Any, engines: Path, graphs: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = bindings()
    monkeypatch.setenv("JETRT_GRAPHS", graphs)
    wrapper = dit(**options)
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        for s in reference.SIZES["dit5"]:
            values = tensors(arrays(s, seed=s))
            expected = run_binding(trt, engines / "dit5.engine", dict(zip(NAMES, values, strict=True)))["output"]
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                for _ in range(6):
                    found = masked(wrapper, values)
                assert same_bits(found, expected), (s, stream)
    if graphs == "off":
        assert wrapper.core.stats["captures"] == 0


def test_casts_are_those_of_torch(dit: Any) -> None:
    wrapper = dit()
    sa, vl, timestep, image, attended = tensors(arrays())
    expected = wrapper(sa, vl.to(torch.float16).to(torch.bfloat16), timestep, image, attended)
    numbers = torch.where(
        attended, torch.full_like(attended, 2, dtype=torch.uint8), torch.zeros_like(attended, dtype=torch.uint8)
    )
    found = wrapper(sa.float(), vl.to(torch.float16), timestep.to(torch.int32), image.to(torch.float32) * 0.25, numbers)
    assert same_bits(found, expected)
    assert wrapper.core.stats["casts"] == 5
    from jetrt.errors import DTypeError

    with pytest.raises(DTypeError, match="'timestep'"):
        wrapper(sa, vl, timestep.float(), image, attended)


def test_cpu_strided_expanded_and_unaligned(dit: Any) -> None:
    wrapper = dit()
    given = arrays()
    values = tensors(given)
    expected = masked(wrapper, values)
    assert same_bits(masked(wrapper, tensors(given, "cpu")), expected)
    wide = torch.zeros(1, 41, 128, device="cuda", dtype=torch.bfloat16)
    wide[:, :, :64] = values[0]
    turned = values[1].transpose(1, 2).contiguous().transpose(1, 2)
    pair = torch.cat([values[2] * 0, values[2]])
    found = masked(wrapper, [wide[:, :, :64], turned, pair[1:], *values[3:]])
    assert same_bits(found, expected)
    row = values[0][:, :1]
    assert same_bits(
        masked(wrapper, [row.expand(1, 41, 64), *values[1:]]), masked(wrapper, [row.repeat(1, 41, 1), *values[1:]])
    )


# Modes, hooks, freed modules ------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "enable_grad"])
def test_grad_modes(dit: Any, mode: str) -> None:
    wrapper = dit(ring=1)
    given = arrays()
    with getattr(torch, mode)():
        values = tensors(given)
        if mode == "enable_grad":
            values[0] = values[0].detach().requires_grad_()
        check(given, masked(wrapper, values))
    # Written in the one mode, read and written in the other.
    with torch.inference_mode():
        check(given, masked(wrapper, [v.detach() for v in values]))
    found = masked(wrapper, [v.detach().clone() for v in values])
    assert not found.requires_grad
    found.add_(0)


def kernels(work: Callable[[], Any]) -> list[str]:
    """Names of what ran on the GPU."""
    work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert names, "the profiler saw nothing"
    return names


@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode_fills_nothing(dit: Any) -> None:
    """There torch fills what `torch.empty` gives; the scripts' wrapper pays that in each call."""
    values = tensors(arrays())
    fill = kernels(lambda: torch.empty(1, 41, 64, device="cuda", dtype=torch.bfloat16))
    for options in ({}, {"ring": 2}):
        wrapper = dit(**options)
        for _ in range(4):
            masked(wrapper, values)
        ours = kernels(lambda wrapper=wrapper: [masked(wrapper, values) for _ in range(8)])
        assert not set(fill) & set(ours)
        assert not [name for name in ours if "memset" in name.lower()]
        assert len(ours) % 8 == 0


class Dit(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(1024, 1024) for _ in range(4)])
        self.register_buffer("positions", torch.zeros(1 << 20))

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Dit()
        self.decoder = torch.nn.Linear(4, 4)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.action_head = Head()
        self.backbone = None


def policy() -> Any:
    return SimpleNamespace(model=Model().to("cuda", torch.bfloat16))


def forward(of: Any, values: list[Any]) -> Any:
    return of.model.action_head.model(
        hidden_states=values[0],
        encoder_hidden_states=values[1],
        timestep=values[2],
        image_mask=values[3],
        backbone_attention_mask=values[4],
    )


@pytest.mark.parametrize("free_torch", [False, True])
def test_replaced_hooked_and_freed(engines: Path, free_torch: bool) -> None:
    from jetrt.groot import replace_dit_with_tensorrt

    made = policy()
    module, first = made.model.action_head.model, next(made.model.parameters())
    weights = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    kind = (first.dtype, first.device)
    del first
    before = torch.cuda.memory_allocated()
    replace_dit_with_tensorrt(made, engines / "dit5.engine", free_torch=free_torch)
    freed = before - torch.cuda.memory_allocated()
    assert freed >= weights - 512 if free_torch else freed <= 0  # but for the empty parameter
    assert made.model.action_head.model is module
    first = next(made.model.parameters())
    assert (first.dtype, first.device) == kind
    given = arrays()
    with torch.inference_mode():
        check(given, forward(made, tensors(given)))
    assert seen == [torch.bfloat16]
    made.model.to(torch.bfloat16)  # a walk over modules and parameters
    with pytest.raises(RuntimeError, match=r"^TensorRT only returns the final output"):
        module(*tensors(given)[:3], return_all_hidden_states=True)
    del made, module
    gc.collect()
    torch.cuda.empty_cache()


def test_a_module_in_the_gap(engines: Path) -> None:
    from jetrt.groot import replace_dit_with_tensorrt

    made = policy()
    made.model.action_head.model = None
    replace_dit_with_tensorrt(made, engines / "dit5.engine")
    assert isinstance(made.model.action_head.model, torch.nn.Module)
    given = arrays()
    check(given, forward(made, tensors(given)))


# Streams, threads, devices --------------------------------------------------------------------------------------------


def test_ordered_by_the_callers_streams(dit: Any) -> None:
    """The inputs come late on one stream, the result is read on another; nobody waits on the host."""
    wrapper = dit()
    given = arrays(seed=5)
    final = tensors(given)
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    for main in (torch.cuda.default_stream(), torch.cuda.Stream()):
        values = [torch.zeros_like(v) for v in final]
        torch.cuda.synchronize()
        with torch.cuda.stream(producer):
            torch.cuda._sleep(50_000_000)
            for value, last in zip(values, final, strict=True):
                value.copy_(last)
        main.wait_stream(producer)
        with torch.cuda.stream(main):
            # Cast and gathered: temporaries of the call must live as long as the work.
            turned = values[1].transpose(1, 2).contiguous().transpose(1, 2)
            found = wrapper(values[0].float(), turned, *values[2:])
            later = found + 0
        consumer.wait_stream(main)
        with torch.cuda.stream(consumer):
            kept = found.clone()
        torch.cuda.synchronize()
        check(given, later)
        check(given, kept)


def test_two_wrappers_and_threads(dit: Any) -> None:
    wrappers = [dit(), dit(ring=2)]

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(100):
                given = arrays(s=1 + (number * 131 + i * 17) % 512, seed=i % 7)
                values = tensors(given)
                # A ring's buffers are for one stream's order: only thread 0 uses it.
                found = masked(wrappers[0 if number else i % 2], values)
                stream.synchronize()
                check(given, found)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_the_next_observation_is_prepared_meanwhile(dit: Any) -> None:
    """One worker thread, as the script has it: its ticks are not held up by calls, nor by the wait at the end."""
    wrapper = dit()
    values = tensors(arrays())
    masked(wrapper, values)
    torch.cuda.synchronize()

    def ticks(seconds: float) -> list[float]:
        end, found = time.perf_counter() + seconds, []
        while time.perf_counter() < end:
            start = time.perf_counter()
            time.sleep(0.0005)
            found.append(time.perf_counter() - start)
        return found

    quiet = sorted(ticks(0.5))
    with ThreadPoolExecutor(1) as pool:
        ticking = pool.submit(ticks, 1.0)
        while not ticking.done():
            torch.cuda._sleep(20_000_000)  # some 10 ms of work on the GPU, waited for below
            for _ in range(16):
                masked(wrapper, values)
            torch.cuda.current_stream().synchronize()
        busy = sorted(ticking.result())
    # Held up for the length of a wait, a tick would take 50 ms; Python's own switching of threads takes up to 5.
    assert busy[len(busy) * 99 // 100] < max(quiet[len(quiet) * 99 // 100] * 5, 0.02)
    assert len(busy) > len(quiet) / 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_1(dit: Any, engines: Path) -> None:
    from jetrt.groot import preload
    from jetrt.groot.preloading import drop_all

    first = dit(0)
    assert torch.cuda.current_device() == 0
    preload(engines / "dit5.engine", device=1)
    second = dit("cuda:1")
    assert torch.cuda.current_device() == 1
    third = dit(torch.device("cuda", 1), cache_outputs=True)
    given = arrays(seed=2)
    for current in (0, 1):
        torch.cuda.set_device(current)
        for wrapper in (first, second, third):
            for place in ("cuda:0", "cuda:1", "cpu"):
                values = tensors(given, place)
                torch.cuda.synchronize(0)
                torch.cuda.synchronize(1)
                found = masked(wrapper, values)
                assert found.device == torch.device("cuda", wrapper.device)
                assert torch.cuda.current_device() == current
                torch.cuda.synchronize(wrapper.device)
                check(given, found)
                with torch.cuda.device(wrapper.device), torch.cuda.stream(torch.cuda.Stream(wrapper.device)):
                    found = masked(wrapper, values)
                    torch.cuda.current_stream().synchronize()
                check(given, found)
    drop_all()


# Growth, exit ---------------------------------------------------------------------------------------------------------


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [{}, {"ring": 2}])
def test_ten_thousand_actions_do_not_grow(dit: Any, options: dict[str, Any]) -> None:
    """An action of the DiT alone: four steps, over changing sequence lengths."""
    wrapper = dit(**options)
    sets = [tensors(arrays(s, seed=s % 7)) for s in (80, 122, 280, 300, 512)]

    def actions(count: int) -> None:
        with torch.inference_mode():
            for i in range(count):
                values = sets[i % len(sets)]
                hidden = values[0]
                for _ in range(4):
                    hidden = masked(wrapper, [hidden, *values[1:]])
            torch.cuda.synchronize()

    actions(1000)
    gc.collect()
    host, device, before = resident(), torch.cuda.mem_get_info()[0], wrapper.core.stats
    actions(10_000)
    gc.collect()
    after = wrapper.core.stats
    assert after["calls"] - before["calls"] == 40_000
    for counter in ("output_allocations", "staging_allocations", "casts", "waits"):
        assert after[counter] == before[counter], counter
    assert resident() - host <= 3 << 20
    assert device - torch.cuda.mem_get_info()[0] <= 0


@pytest.mark.parametrize("way", exits.GROOT)
def test_interpreter_exit(engines: Path, way: str) -> None:
    exits.run(exits.GROOT[way], engines / "dit5.engine", PYTHONWARNINGS="ignore")


# The runner, loading, memory ------------------------------------------------------------------------------------------

SCRIPT = '''
"""A script as GR00T's are made."""
import argparse
import logging

import torch


class TensorRTDiTWrapper:
    def __init__(self, engine_path, device=0):
        raise AssertionError("the script's own class was used")


def replace_dit_with_tensorrt(policy, trt_engine_path, device=0):
    policy.model.action_head.model.forward = TensorRTDiTWrapper(trt_engine_path, device)


class Policy:
    def __init__(self):
        self.model = torch.nn.Module()
        self.model.action_head = torch.nn.Module()
        self.model.action_head.model = torch.nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)


def main(args):
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    policy = Policy()
    if args.inference_mode == "tensorrt":
        replace_dit_with_tensorrt(policy, args.trt_engine_path)
    bf16, mask = torch.bfloat16, torch.ones(1, 122, device="cuda", dtype=torch.bool)
    with torch.inference_mode():
        hidden = torch.ones(1, 41, 64, device="cuda", dtype=bf16)
        other = torch.ones(1, 122, 64, device="cuda", dtype=bf16)
        for step in range(4):
            hidden = policy.model.action_head.model(
                hidden_states=hidden,
                encoder_hidden_states=other,
                timestep=torch.full((1,), step, device="cuda"),
                image_mask=mask,
                backbone_attention_mask=mask,
            )
    print(hidden.float().mean().item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--inference-mode", default="pytorch")
    parser.add_argument("--trt-engine-path", default="")
    main(parser.parse_args())
'''


def test_the_runner_swaps_the_seam_of_a_script(engines: Path, tmp_path: Path) -> None:
    script, report = tmp_path / "script.py", tmp_path / "report.json"
    script.write_text(SCRIPT)
    words = ["--report", report, "--memory-budget", "8G", "--free-torch", "--graphs", "off", script]
    words += ["--inference-mode", "tensorrt", "--trt-engine-path", engines / "dit5.engine"]
    done = subprocess.run(
        [sys.executable, "-m", "jetrt.groot", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # 1, and 1 more (the mean of the ones) in each of four steps, and the steps 0 to 3.
    assert float(done.stdout) == 1 + 4 + 6
    (load,) = json.loads(report.read_text())["loads"]
    assert load["bytes"] == (engines / "dit5.engine").stat().st_size
    assert load["device_free_before"] >= load["device_free_after"] > 0  # the driver counts in steps of 2 MiB


BENCH = Path(__file__).resolve().parents[2] / "benches" / "groot" / "script.py"


@pytest.mark.timeout(600)
@pytest.mark.skipif("JETRT_TEST_GROOT" not in os.environ, reason="JETRT_TEST_GROOT names no bundle of benches/groot")
@pytest.mark.parametrize("mode", ["tensorrt", "trt_full_pipeline"])
def test_the_unchanged_script_gives_the_same_actions(mode: str, tmp_path: Path) -> None:
    """Over NVIDIA's binding as it is, over jetrt, and with the loop as one graph: bit for bit."""
    import numpy as np

    bundle = os.environ["JETRT_TEST_GROOT"]
    metadata = json.loads((Path(bundle) / "export_metadata.json").read_text())
    if (mode, metadata["model_version"]) == ("trt_full_pipeline", "n1.6"):
        pytest.skip("the script of N1.6 has no such mode")
    ways = {
        "jetrt": ["-m", "jetrt.groot", str(BENCH)],
        "optimized": ["-m", "jetrt.groot", "--optimize", "--report", str(tmp_path / "report.json"), str(BENCH)],
    }
    try:
        bindings()
        ways["alone"] = [str(BENCH)]
    except pytest.skip.Exception:
        pass
    words = ["--model-path", bundle, "--inference-mode", mode, "--trt-engine-path", bundle, "--steps", "320"]
    actions = {}
    for name, command in ways.items():
        file = tmp_path / f"{name}.npy"
        done = subprocess.run(
            [sys.executable, *command, *words, "--save-actions", str(file)],
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "LOCAL_RANK": "1"},
            check=False,
        )
        assert done.returncode == 0, f"{name}\n{done.stderr}"
        actions[name] = np.load(file)
    assert np.abs(actions["jetrt"]).max() > 0
    for name, found in actions.items():
        np.testing.assert_array_equal(found, actions["jetrt"], err_msg=name)
    (loop,) = json.loads((tmp_path / "report.json").read_text())["loops"]
    assert loop["replays"] > 0, loop


def test_preload_refuses_with_the_arithmetic(engines: Path) -> None:
    from jetrt.errors import OutOfMemoryError
    from jetrt.groot import preload
    from jetrt.groot.preloading import drop_all

    plans = [engines / "mlp.engine", engines / "dit5.engine"]
    with pytest.raises(OutOfMemoryError, match=r"mlp\.engine .* \+ dit5\.engine .* = .*Nothing was read"):
        preload(plans, memory_budget="100K")
    rows = preload(plans, memory_budget="16G")
    assert [Path(row["path"]).name for row in rows] == ["mlp.engine", "dit5.engine"]
    drop_all()


def in_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=200,
        env={k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("imported", ["", "import torch"])
def test_memory_settings_take_effect(imported: str) -> None:
    """Whether or not torch was imported before; expandable segments work on a discrete GPU, so "auto" turns them on."""
    found = in_process(
        f"""
        {imported}
        from jetrt.torch_memory import configure_torch_memory, TorchMemoryError
        report = configure_torch_memory(garbage_collection_threshold=0.8, memory_fraction=0.05)
        import torch
        x = torch.zeros(32 << 20, dtype=torch.uint8, device="cuda")
        assert any(s.get("is_expandable") for s in torch.cuda.memory_snapshot())
        assert report.settings["expandable_segments"] == "True", str(report)
        total = torch.cuda.get_device_properties(0).total_memory
        assert abs(report.memory_bytes - total * 0.05) < 2
        try:
            torch.empty(int(total * 0.06), dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            print("capped")
        try:
            configure_torch_memory(garbage_collection_threshold=0.5)
        except TorchMemoryError as error:
            print(error.setting)
        """
    )
    assert found.split() == ["capped", "garbage_collection_threshold"]
