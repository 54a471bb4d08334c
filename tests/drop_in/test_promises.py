"""The fourteen promises of an import-only swap, one test each; their details are in the other files."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import exits
import groot_rig
import pytest
import rig
import torch
from groot_rig import dit_inputs, dit_io, head_inputs, maskless_io, same, write_bundle
from test_wrappers import backbone_inputs, one_output

import fakes
from jetrt.errors import DTypeError, InputNameError
from jetrt.graph import graph
from jetrt.groot import (
    TensorRTBackboneWrapper,
    TensorRTDiTWrapper,
    install,
    replace_backbone_with_tensorrt,
    replace_dit_with_tensorrt,
    undo,
)
from jetrt.groot.engine import Engine

pytestmark = pytest.mark.usefixtures("clean")


def call(engine: Any, given: groot_rig.Inputs, **more: Any) -> Any:
    """Seam B: shapes of dynamic inputs first, then the inputs in the engine's order."""
    for name, value in vars(given).items():
        engine.set_runtime_tensor_shape(name, value.shape)
    return engine(*given, **more)


def test_promise_01_signatures_and_order_of_the_engine(plan: groot_rig.Write) -> None:
    assert list(inspect.signature(TensorRTDiTWrapper).parameters)[:2] == ["engine_path", "device"]
    assert list(inspect.signature(replace_dit_with_tensorrt).parameters)[:3] == ["policy", "trt_engine_path", "device"]
    assert list(inspect.signature(Engine.__mro__[1]).parameters)[:2] == ["file", "plugins"]
    engine = Engine(str(plan("dit5")), plugins=[])
    assert [meta[0] for meta in engine.in_meta] == list(vars(dit_inputs()))
    given = dit_inputs()
    for found in (call(engine, given), engine(*list(given)[:3], **dict(list(vars(given).items())[3:]))):
        assert same(found["output"], given.expected())
    assert same(engine(*given, return_list=True)[0], given.expected())


def test_promise_02_results_are_usable_at_once_on_the_callers_stream(plan: groot_rig.Write) -> None:
    wrapper, engine = TensorRTDiTWrapper(plan("dit5")), Engine(plan("dit5"))
    for stream in (torch.cuda.Stream(), torch.cuda.default_stream()):
        with torch.cuda.stream(stream):
            given = dit_inputs(seed=4)
            for found in (wrapper(*given), call(engine, given)["output"]):
                assert type(found) is torch.Tensor
                assert found.device == torch.device("cuda", 0)
                # An operation of torch right behind it, on the same stream, without a wait.
                assert same(found + 0, given.expected())
    assert rig.cuda().count("cuCtxSynchronize") == 0
    # On torch's default stream TensorRT would wait by itself, and say so in its log.
    assert rig.trt().count("legacy_stream") == 0


def test_promise_03_results_stay_valid(plan: groot_rig.Write) -> None:
    wrapper, engine = TensorRTDiTWrapper(plan("dit5")), Engine(plan("dit5"))
    given = [dit_inputs(seed=i) for i in range(5)]
    kept = [(wrapper(*one), call(engine, one)["output"]) for one in given]
    for pair, one in zip(kept, given, strict=True):
        assert all(same(found, one.expected()) for found in pair)
    reused = TensorRTDiTWrapper(plan("dit5"), cache_outputs=True)
    assert reused(*given[0]).data_ptr() == reused(*given[1]).data_ptr()


def test_promise_04_what_is_accepted_and_what_is_refused(plan: groot_rig.Write) -> None:
    wrapper, engine = TensorRTDiTWrapper(plan("dit5")), Engine(plan("dit5"))
    given = dit_inputs()
    row = torch.ones(1, 1, 64, device="cuda", dtype=torch.bfloat16)
    strided = groot_rig.Inputs(
        row.expand(1, 41, 64), given.vl_embs.transpose(1, 2).contiguous().transpose(1, 2), *list(given)[2:]
    )
    on_cpu = groot_rig.Inputs(*[t.cpu() for t in given])
    assert same(wrapper(*strided), strided.expected())
    assert same(wrapper(*on_cpu), given.expected())
    assert same(call(engine, strided)["output"], strided.expected())
    with pytest.raises(AssertionError):
        engine(*on_cpu)
    with pytest.raises(AssertionError):
        engine(given.sa_embs.float(), *list(given)[1:])


def test_promise_05_masks(plan: groot_rig.Write) -> None:
    given = dit_inputs()
    without = TensorRTDiTWrapper(plan({"program": "copy", "io": maskless_io()}, name="without.plan"))
    assert torch.equal(without(given.sa_embs, given.vl_embs, given.timestep, None, None), given.sa_embs)
    with pytest.warns(RuntimeWarning, match="has no input 'image_mask'"):
        without(*given)
    with_masks = TensorRTDiTWrapper(plan("dit5"))
    with pytest.raises(InputNameError, match="image_mask"):
        with_masks(given.sa_embs, given.vl_embs, given.timestep)
    assert rig.trt().count("enqueueV3") == 2


@pytest.mark.parametrize("floats", ["bfloat16", "float16", "float32"])
def test_promise_06_output_type(plan: groot_rig.Write, floats: str) -> None:
    path = plan("dit5", io=dit_io(floats=floats, sa=5, lengths=(1, 20, 64)))
    given = dit_inputs(s=20, sa=5)
    found = TensorRTDiTWrapper(path)(*given)
    assert found.dtype is getattr(torch, floats)
    assert same(found, given.expected(floats))
    policy = groot_rig.policy()
    replace_dit_with_tensorrt(policy, path)
    moved = policy.model.action_head.model(*list(given)[:3], None, False, *list(given)[3:])
    assert moved.dtype is given.sa_embs.dtype
    assert torch.equal(moved, found.to(moved.dtype))


def test_promise_07_errors(plan: groot_rig.Write, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = plan("dit5", name="bad.plan", fail="deserialize")
    failing = plan("dit5", name="failing.plan", fail="enqueue")
    with pytest.raises(FileNotFoundError):
        TensorRTDiTWrapper("/nowhere")
    with pytest.raises(RuntimeError, match=r"^Failed to load TensorRT engine from "):
        TensorRTDiTWrapper(bad)
    with pytest.raises(AssertionError, match=r"bad\.plan"):
        Engine(bad)
    with pytest.raises(RuntimeError, match=r"^TensorRT inference failed"):
        TensorRTDiTWrapper(failing)(*dit_inputs())
    backbone = plan({**one_output(), "fail": "enqueue"}, name="backbone.plan")
    with pytest.raises(RuntimeError, match=r"^Backbone TensorRT inference failed"):
        TensorRTBackboneWrapper(backbone)(**backbone_inputs(rank=4))
    with pytest.raises(KeyError):
        Engine(plan("dit5")).dtype_of("output")
    policy = groot_rig.policy()
    replace_dit_with_tensorrt(policy, plan("dit5"))
    with pytest.raises(RuntimeError, match=r"^TensorRT only returns the final output"):
        policy.model.action_head.model(*list(dit_inputs())[:3], return_all_hidden_states=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^CUDA not available for TensorRT"):
        TensorRTDiTWrapper(plan("dit5"))


def test_promise_08_modes_hooks_and_freed_modules(plan: groot_rig.Write) -> None:
    policy = groot_rig.policy()
    seen: list[str] = []
    policy.model.backbone.register_forward_pre_hook(lambda *a: seen.append("before"))
    policy.model.backbone.register_forward_hook(lambda *a: seen.append("after"))
    policy.model.action_head.model.register_forward_hook(lambda *a: seen.append("dit"))
    replace_backbone_with_tensorrt(policy, plan(one_output(), name="b.plan"))
    replace_dit_with_tensorrt(policy, plan("dit5", io=dit_io(sa=5, lengths=(1, 20, 64))))
    torch.use_deterministic_algorithms(True, warn_only=True)
    given, pixels = dit_inputs(s=20, sa=5), backbone_inputs(rank=4)
    fills = torch._standin.counts["fills"]
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            policy.model.backbone(pixels)
            given.sa_embs = given.sa_embs.detach().requires_grad_(mode is torch.enable_grad)
            found = policy.model.action_head.model(*list(given)[:3], None, False, *list(given)[3:])
            assert same(found, given.expected())
            assert not found.requires_grad
    assert seen == ["before", "after", "dit"] * 3
    assert torch._standin.counts["fills"] == fills
    del policy.model.action_head.model
    gc.collect()
    torch.cuda.empty_cache()
    assert rig.trt().live("ICudaEngine") == 1


def test_promise_09_two_devices(tmp_path: Path) -> None:
    code = """
        import sys, torch, groot_rig
        from jetrt.groot import TensorRTDiTWrapper
        from concurrent.futures import ThreadPoolExecutor
        assert not torch.cuda.is_initialized()
        first = TensorRTDiTWrapper(sys.argv[1])
        assert torch.cuda.is_initialized() and torch.cuda.current_device() == 0
        second = TensorRTDiTWrapper(sys.argv[1], device=1)
        assert torch.cuda.current_device() == 1  # as upstream leaves it
        third = TensorRTDiTWrapper(sys.argv[1], torch.device("cuda", 1))
        for current in (0, 1):
            torch.cuda.set_device(current)
            for wrapper in (first, second, third):
                for place in ("cuda:0", "cuda:1", "cpu"):
                    given = groot_rig.dit_inputs(device=place)
                    side = torch.cuda.Stream(wrapper.device)
                    for stream in (torch.cuda.default_stream(wrapper.device), side):
                        torch.cuda.synchronize(given.sa_embs.device if place != "cpu" else 0)
                        with torch.cuda.stream(stream):
                            found = wrapper(*given)
                        assert found.device == torch.device("cuda", wrapper.device), found.device
                        stream.synchronize()
                        assert groot_rig.same(found, given.expected())
                assert torch.cuda.current_device() == current
        given = groot_rig.dit_inputs(device="cuda:1")
        torch.cuda.synchronize(1)
        with ThreadPoolExecutor(1) as pool:  # its current device is 0
            found = pool.submit(lambda: (torch.cuda.current_device(), second(*given), torch.cuda.current_device()))
            before, found, after = found.result()
        assert (before, after, found.device.index) == (0, 0, 1)
        assert groot_rig.same(found, given.expected())
        import fakes
        assert fakes.FakeCuda().errors() == fakes.FakeTrt().errors() == []
    """
    path = fakes.write_plan(tmp_path / "dit.plan", "dit5")
    done = in_process(code, path, FAKE_CUDA_DEVICES=2)
    assert done.returncode == 0, done.stderr


def in_process(code: str, *arguments: Any, **env: Any) -> subprocess.CompletedProcess[str]:
    import os

    environment = {**os.environ, **{key: str(value) for key, value in env.items()}}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_promise_10_streams_wrappers_and_threads(plan: groot_rig.Write) -> None:
    """Two wrappers in one process, called by several threads, each on its stream."""
    wrappers = [TensorRTDiTWrapper(plan("dit5")), TensorRTDiTWrapper(plan("dit5", name="other.plan"), ring=2)]
    # Made on one stream and read on another: the caller orders the two, the temporaries are the wrapper's.
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(producer):
        given = dit_inputs(seed=6)
    consumer.wait_stream(producer)
    with torch.cuda.stream(consumer):
        # Casts and copies: temporaries of the call.
        turned = given.vl_embs.transpose(1, 2).contiguous().transpose(1, 2)
        found = [one(given.sa_embs.float(), turned, *list(given)[2:]) for one in wrappers]
    torch.cuda.current_stream().wait_stream(consumer)
    assert all(same(one, given.expected()) for one in found)

    def work(number: int) -> list[bool]:
        with torch.cuda.stream(torch.cuda.Stream()):
            inputs = [dit_inputs(seed=10 * number + i, s=1 + 97 * number + i) for i in range(10)]
            # A ring's buffers are for one stream's order.
            return [same(wrappers[i % 2 if number == 0 else 0](*one), one.expected()) for i, one in enumerate(inputs)]

    with ThreadPoolExecutor(4) as pool:
        assert all(map(all, pool.map(work, range(4))))


@pytest.mark.parametrize("seam", ["wrapper", "Engine", "graph"])
def test_promise_10_the_next_observation_is_prepared_meanwhile(plan: groot_rig.Write, seam: str) -> None:
    """As the script does it, by one worker thread: it goes on while jetrt waits for 100 ms of work on the GPU."""
    path, given = plan("dit5", ms=100), dit_inputs()
    engine, wrapper = Engine(path, synchronize=True), TensorRTDiTWrapper(path)
    captured = graph(wrapper, tuple(given), warmup=1) if seam == "graph" else None
    observed: list[float] = []
    done = threading.Event()

    def observe() -> None:
        while not done.is_set():
            time.sleep(0.001)
            observed.append(time.perf_counter())

    def act() -> None:
        if seam == "Engine":
            call(engine, given)  # waits by itself
        else:
            found = (captured or wrapper)(*given)
            wrapper.close()  # waits for the work that is under way
            assert same(found, given.expected())

    with ThreadPoolExecutor(1) as pool:
        observing = pool.submit(observe)
        start = time.perf_counter()
        act()
        end = time.perf_counter()
        done.set()
        observing.result()
    meanwhile = [t for t in observed if start < t < end]
    assert end - start > 0.1
    # With the GIL held for the length of the wait there would be none in it.
    longest = max(b - a for a, b in zip([start, *meanwhile], [*meanwhile, end], strict=True))
    assert longest < 0.08, longest
    if captured is not None:
        assert captured.stats["replays"] == 1
        captured.close()


@pytest.mark.parametrize("way", exits.GROOT)
def test_promise_11_interpreter_exit(way: str, plan: groot_rig.Write) -> None:
    exits.run(exits.GROOT[way], plan("dit5"))


def test_promise_12_without_the_packages(tmp_path: Path) -> None:
    """torch is imported where it is used and not before; `tensorrt` and `transformers` never."""
    path = fakes.write_plan(tmp_path / "dit.plan", "dit5")
    code = """
        import sys
        import jetrt, jetrt.groot
        assert "torch" not in sys.modules
        from jetrt.groot import TensorRTDiTWrapper
        import groot_rig
        given = groot_rig.dit_inputs()
        assert groot_rig.same(TensorRTDiTWrapper(sys.argv[1])(*given), given.expected())
        assert not {"tensorrt", "transformers"} & set(sys.modules)
    """
    done = in_process(code, path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", ["10.3.0.30", "10.16.0.1", "11.1.0.1"])
def test_promise_12_other_versions_of_tensorrt(version: str, tmp_path: Path) -> None:
    path = fakes.write_plan(tmp_path / "dit.plan", "dit5", version=version)
    code = """
        import sys, groot_rig
        from jetrt.groot import TensorRTDiTWrapper
        wrapper, given = TensorRTDiTWrapper(sys.argv[1]), groot_rig.dit_inputs()
        assert groot_rig.same(wrapper(*given), given.expected())
        print(wrapper.core.tensorrt_version)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        env={**fakes.environment(version), "PYTHONPATH": in_path()},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == version


def in_path() -> str:
    import os

    here = Path(__file__).parent
    return os.pathsep.join([str(here), str(here.parent), os.environ["PYTHONPATH"]])


def test_promise_13_forward_is_replaced_and_the_module_kept(plan: groot_rig.Write) -> None:
    path = plan("dit5", io=dit_io(sa=5, lengths=(1, 20, 64)))
    policy = groot_rig.policy()
    module = policy.model.action_head.model
    count = len(list(module.parameters()))
    replace_dit_with_tensorrt(policy, path)
    assert policy.model.action_head.model is module
    assert "forward" in vars(module)
    assert len(list(module.parameters())) == count > 1
    freed = groot_rig.policy()
    replace_dit_with_tensorrt(freed, path, free_torch=True)
    assert sum(p.numel() for p in freed.model.action_head.model.parameters()) == 0


@pytest.mark.parametrize(("rank", "shown"), [(None, True), ("-1", True), ("0", True), ("1", False), ("7", False)])
def test_promise_14_the_table_and_local_rank(
    plan: groot_rig.Write,
    rank: str | None,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", rank)
    path = plan("dit5")
    Engine(path)
    printed = capsys.readouterr().out
    assert ("backbone_attention_mask" in printed and "torch.bfloat16" in printed) is shown
    TensorRTDiTWrapper(path)
    assert capsys.readouterr().out == ""  # seam A prints none


# The whole of it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed() -> Iterator[None]:
    install(types.ModuleType("script"))
    yield
    undo()
    sys.modules.pop("trt_model_forward", None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("mode", "calls"), [("dit_only", 4), ("action_head", 13)])
def test_actions_do_not_grow(tmp_path: Path, mode: str, calls: int) -> None:
    """Whole actions of the head, while the sequence length changes. The ten thousand are in tests/gpu."""
    import trt_model_forward

    policy = groot_rig.policy()
    trt_model_forward.setup_tensorrt_engines(policy, str(write_bundle(tmp_path / "b")), mode)

    def actions(count: int) -> None:
        with torch.inference_mode():
            for i in range(count):
                policy.model.action_head.get_action(*head_inputs(s=(5, 20, 64)[i % 3]))
                if i % 100 == 0:
                    torch.cuda.synchronize()  # the stand-in runs work only when somebody waits
            torch.cuda.synchronize()
        gc.collect()

    actions(30)
    before, enqueued = (rig.live(), torch.cuda.memory_allocated()), rig.trt().count("enqueueV3")
    actions(300)
    assert rig.trt().count("enqueueV3") - enqueued == 300 * calls
    assert (rig.live(), torch.cuda.memory_allocated()) == before
    trt_model_forward.close_tensorrt_engines(policy)


def test_a_wrong_type_in_a_loop_is_named(plan: groot_rig.Write) -> None:
    """What upstream would read as something else."""
    policy = groot_rig.policy()
    replace_dit_with_tensorrt(policy, plan("dit5", io=dit_io(sa=5, lengths=(1, 20, 64))))
    given = dit_inputs(s=20, sa=5)
    with pytest.raises(DTypeError, match=r"input 'timestep': found float32; allowed: int64"):
        policy.model.action_head.model(
            given.sa_embs, given.vl_embs, given.timestep.float(), None, False, *list(given)[3:]
        )
