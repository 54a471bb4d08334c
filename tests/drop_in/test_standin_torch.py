"""The stand-in torch keeps torch's rules (tests/torch_rules.py), is stricter where a mistake would go unseen on a GPU,
and fails loudly at what it does not have."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rig
import torch
import torch_rules

import fakes

counts = torch._standin.counts


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rule", torch_rules.ANYWHERE)
def test_rule(clean: None, rule: str, device: str) -> None:
    torch_rules.ANYWHERE[rule](torch, device)


@pytest.mark.parametrize("rule", torch_rules.ON_A_GPU)
def test_rule_of_a_gpu(clean: None, rule: str) -> None:
    torch_rules.ON_A_GPU[rule](torch, "cuda")


# Stricter than torch on a GPU -----------------------------------------------------------------------------------------


def test_nothing_runs_before_somebody_waits(clean: None) -> None:
    x = torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    x += 1
    assert np.array_equal(rig.peek(x), np.zeros(4, np.float32))
    assert x.tolist() == [1, 1, 1, 1]


def test_a_forgotten_order_shows(clean: None) -> None:
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    x = torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(one):
        x += 1
    with torch.cuda.stream(two):
        assert (x * 1).tolist() == [0, 0, 0, 0]
    two.wait_stream(one)
    with torch.cuda.stream(two):
        assert (x * 1).tolist() == [1, 1, 1, 1]


def test_memory_that_was_given_back_shows(clean: None) -> None:
    x = torch.zeros(4, device="cuda")
    stale, side = x.data_ptr(), torch.cuda.Stream()
    del x
    torch.cuda.synchronize()
    assert ctypes.string_at(stale, 16) == b"\xdb" * 16
    assert torch.empty(4, device="cuda").data_ptr() == stale
    with torch.cuda.stream(side):
        assert torch.empty(4, device="cuda").data_ptr() != stale


def test_record_stream_keeps_memory_until_the_stream_has_passed(clean: None) -> None:
    side = torch.cuda.Stream()
    for announced in (True, False):
        x = torch.full((4,), 3.0, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x * 1
        if announced:
            x.record_stream(side)
        place = x.data_ptr()
        del x
        z = torch.full((4,), 9.0, device="cuda")
        torch.cuda.current_stream().synchronize()
        assert (z.data_ptr() == place) is not announced
        side.synchronize()
        assert y.tolist() == ([3.0] * 4 if announced else [9.0] * 4)
        del z


def test_a_kernel_that_reaches_freed_memory_loses_the_device(clean: None) -> None:
    x = torch.zeros(4, device="cuda")
    y = torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    z = torch.zeros(4, device="cuda")
    rig.ok("cuMemFree_v2", x.data_ptr())
    y += x
    with pytest.raises(RuntimeError, match="CUDA error: an illegal memory access was encountered"):
        torch.cuda.synchronize()
    assert "torch's add: a kernel on device 0 touched 16 bytes" in rig.mistakes()[0]
    del z
    # The device is lost for good: what is left is taken away by hand.
    rig.cuda().reset()
    counts.clear()
    x._storage.owner.ptr = rig.made("cuMemAlloc_v2", x._storage.owner.size)


# What tests ask for ---------------------------------------------------------------------------------------------------


def test_counts(clean: None) -> None:
    x = torch.empty(4, device="cuda")
    assert (counts["allocations"], counts["driver_allocations"], counts["fills"], counts["waits"]) == (1, 1, 0, 0)
    x.zero_()
    torch.zeros(4, device="cuda")
    assert (counts["allocations"], counts["fills"]) == (2, 2)
    for wait in (x.tolist, x.sum().item, torch.cuda.synchronize, torch.cuda.current_stream().synchronize):
        before = counts["waits"]
        wait()
        assert counts["waits"] == before + 1
    before = counts["copies"]
    x.clone(), x.to(torch.float16), x[::2].contiguous()
    assert counts["copies"] == before + 3
    before = counts["waits"]
    torch.zeros(4).pin_memory().to("cuda", non_blocking=True)
    assert counts["waits"] == before
    torch.zeros(4).to("cuda")
    assert counts["waits"] == before + 1
    assert counts["host_to_device"] == 2


def test_faults_on_request(clean: None) -> None:
    torch._standin.fail("randn", 2)
    torch.randn(1)
    with pytest.raises(RuntimeError, match="randn: failed on request"):
        torch.randn(1)
    torch.randn(1)
    torch._standin.fail("add", 1, torch.OutOfMemoryError("no"))
    with pytest.raises(torch.OutOfMemoryError, match="no"):
        torch.ones(1, device="cuda") + 1
    torch._standin.fail("cat", 1)
    torch._standin.fail("cat", 0)
    torch.cat([torch.ones(1)])
    torch._standin.fail("replay", 1)
    x = torch.ones(1, device="cuda")
    graph, y = torch_rules._captured(torch, lambda: x * 2)
    with pytest.raises(RuntimeError, match="replay: failed on request"):
        graph.replay()
    graph.replay()
    assert y.item() == 2


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("step", range(1, 65))
def test_every_driver_call_of_a_capture_may_fail(clean: None, step: int) -> None:
    """Afterwards nothing is left over and everything works."""
    x = torch.arange(3.0, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.current_stream()
    rig.cuda().fail_at(step, 999)
    try:
        with torch.cuda.graph(graph):
            y = x * 2 + torch.randn(3, device="cuda")
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        pass
    torch.cuda.set_stream(here)
    reached = bool(rig.cuda().last_failed())
    rig.cuda().fail_at(0)
    y = None  # noqa: F841
    graph.reset()
    assert (x + 1).tolist() == [1, 2, 3]
    assert reached or step > 50  # there are not that many calls


def test_the_reset(clean: None) -> None:
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_per_process_memory_fraction(0.5)
    torch.manual_seed(1)
    torch._standin.fail("add")
    torch.cuda.set_stream(torch.cuda.Stream())
    x = torch.ones(4, device="cuda")
    torch._standin.reset()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.cuda.get_per_process_memory_fraction() == 1
    assert counts == {}
    assert (x + 1).tolist() == [2] * 4
    del x
    torch._standin.reset()
    assert torch.cuda.memory_reserved() == rig.cuda().live("device") == 0


def test_graphs_leave_nothing(clean: None) -> None:
    x = torch.ones(100, device="cuda")
    reserved = torch.cuda.memory_reserved()
    for _ in range(3):
        graph, y = torch_rules._captured(torch, lambda: (x * 2).clone() + torch.randn(100, device="cuda"))
        graph.replay()
        del graph, y
    gc.collect()
    torch.cuda.empty_cache()
    assert rig.cuda().live("graph_exec") == 0
    assert torch.cuda.memory_reserved() == reserved


# What it does not have ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda: torch.compile(lambda x: x),
        lambda: torch.jit,
        lambda: torch.einsum("i,i", torch.ones(1), torch.ones(1)),
        lambda: torch.ones(1).topk(1),
        lambda: torch.cuda.nvtx,
        lambda: torch.nn.Conv2d(1, 1, 1),
        lambda: torch.zeros(1, nonsense=True),
    ],
)
def test_what_is_not_there(use: Any) -> None:
    with pytest.raises((AttributeError, TypeError)):
        use()


@pytest.mark.parametrize(
    "use",
    [
        lambda: torch.ones(2)[torch.tensor([True, False])],
        lambda: torch.ones(1, dtype=torch.float8_e4m3fn),
        lambda: torch.zeros(1, device="meta"),
        lambda: torch.ones(1).max(dim=0),
        lambda: torch.ones(1, requires_grad=True).backward(),
        lambda: torch.Tensor([1]),
        lambda: torch.where(torch.tensor([True])),
        lambda: torch.cuda.CUDAGraph(keep_graph=True),
        lambda: torch.Generator().seed(),
    ],
)
def test_what_is_not_done(clean: None, use: Any) -> None:
    with pytest.raises(NotImplementedError):
        use()


def test_no_real_driver(tmp_path: Path) -> None:
    """Where libcuda is not the stand-in, or is not there, the import says so."""
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", fakes.MARK)}
    code = "import torch"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: the stand-in torch works on the stand-in CUDA driver alone" in done.stderr


def test_no_gpu() -> None:
    code = """
import torch
assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
try:
    torch.zeros(1, device="cuda")
except RuntimeError as error:
    print(error)
assert not torch.cuda.is_initialized()
print(torch.ones(2).tolist())
"""
    done = fakes.run_python(code, env={"FAKE_CUDA_DEVICES": 0})
    assert done.stdout == "No CUDA GPUs are available\n[1.0, 1.0]\n"


def test_expandable_segments_that_the_device_lacks() -> None:
    code = """
import torch
try:
    torch.zeros(1, device="cuda")
except RuntimeError as error:
    print(error)
"""
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        settings = {variable: "expandable_segments:True", "FAKE_TORCH_EXPANDABLE_SEGMENTS": "fail"}
        assert "CUDA error: operation not supported" in fakes.run_python(code, env=settings).stdout
        assert fakes.run_python(code, env={**settings, "FAKE_TORCH_EXPANDABLE_SEGMENTS": None}).stdout == ""


def test_another_torch_is_refused(tmp_path: Path) -> None:
    """These tests do not run on a torch that was imported before."""
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "plugin.py").write_text("import torch")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join(
        p for p in environment["PYTHONPATH"].split(os.pathsep) if not p.endswith("fakes/python")
    )
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "another one is imported already" in done.stdout + done.stderr


def test_two_devices() -> None:
    code = """
import torch, fakes
assert torch.cuda.device_count() == 2
x = torch.arange(4.0, device="cuda:1")
assert x.device == torch.device("cuda", 1) and torch.cuda.current_device() == 0
assert torch.equal(x.to("cuda:0").cpu(), x.cpu())
with torch.cuda.device(1):
    assert torch.cuda.current_device() == 1
    y = torch.ones(4, device="cuda")
    assert y.get_device() == 1
assert torch.cuda.current_device() == 0
assert (x + y).tolist() == [1, 2, 3, 4]
try:
    x + torch.ones(4, device="cuda:0")
except RuntimeError as error:
    print(error)
s = torch.cuda.Stream(1)
with torch.cuda.stream(s):
    assert torch.cuda.current_device() == 1 and torch.cuda.current_stream() == s
    z = x * 2
assert torch.cuda.current_device() == 0
s.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, stream=torch.cuda.Stream(1)):
    drawn = torch.randn(3, device="cuda:1")
assert torch.cuda.current_device() == 0
torch.cuda.manual_seed_all(4)
graph.replay()
torch.cuda.manual_seed_all(4)
assert torch.equal(drawn, torch.randn(3, device="cuda:1"))
torch.cuda.manual_seed_all(3)
assert torch.equal(torch.randn(3, device="cuda:0").cpu(), torch.randn(3, device="cuda:1").cpu())
try:
    torch.zeros(1, device="cuda:2")
except RuntimeError as error:
    print(error)
assert fakes.FakeCuda().errors() == []
"""
    lines = fakes.run_python(code, env={"FAKE_CUDA_DEVICES": 2}).stdout.splitlines()
    assert lines[0].startswith("Expected all tensors to be on the same device, but found at least two devices, cuda:1")
    assert lines[1] == "CUDA error: invalid device ordinal"


@pytest.mark.parametrize(
    "end", ["", "del x, graph, y", "import sys; sys.keep = (graph, y)", "torch.cuda.synchronize()"]
)
def test_the_interpreter_ends(end: str) -> None:
    code = f"""
import torch
x = torch.randn(4, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x * 2
graph.replay()
event = torch.cuda.Event()
event.record()
{end}
print("done", flush=True)
"""
    done = fakes.run_python(code, timeout=30)
    assert (done.stdout, done.stderr) == ("done\n", "")
