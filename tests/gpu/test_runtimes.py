"""The runtimes behind one interface, on a GPU."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import reference

import jetrt
from jetrt import errors
from jetrt.runtime import shared_runtime

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x):
        return {"y": self.linear(x)}


@pytest.fixture
def head():
    torch.manual_seed(0)
    return Head().eval().cuda()


def test_tensorrt_six_methods(engines) -> None:
    runtime = shared_runtime({"name": "tensorrt", "tensorrt": {"max_contexts": 2}})
    entry = runtime.compile_engine(engines / "mlp.engine")
    handle = runtime.deserialize_engine(entry)
    x = reference.random_input("mlp", 8, seed=1)
    assert np.isfinite(runtime.infer(handle, {"x": x})["y"]).all()
    on_gpu = runtime.infer(handle, {"x": torch.from_numpy(x).cuda()})["y"]
    assert on_gpu.device.type == "cuda"
    np.testing.assert_array_equal(on_gpu.cpu().numpy(), runtime.infer(handle, {"x": x})["y"])
    state = runtime.thermal_state()
    assert state.gpu_temp_c is None or 0 < state.gpu_temp_c < 120
    runtime.release_engine(handle)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["module", "script", "program"])
def test_pytorch_on_the_gpu(head, tmp_path, kind: str, dtype: str) -> None:
    x = torch.randn(8, 64, device="cuda")
    source = head
    if kind == "script":
        torch.jit.save(torch.jit.trace(head, (x,), strict=False), tmp_path / "head.pt")
        source = tmp_path / "head.pt"
    elif kind == "program":
        torch.export.save(torch.export.export(head, (x,)), tmp_path / "head.pt2")
        source = tmp_path / "head.pt2"
    model = jetrt.load(source, runtime="pytorch_fp16", autocast_dtype=dtype)
    assert model.device == "cuda:0"
    wanted = getattr(torch, dtype)
    with torch.no_grad(), torch.autocast("cuda", dtype=wanted, enabled=dtype != "float32"):
        expected = head(x)["y"]
    found = model(x)["y"]
    assert found.dtype == wanted
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert model.stats["host_copies"] == 0  # nothing left the GPU
    assert model.inputs["x"].location == "device"

    host = model(x.cpu())["y"]
    assert host.device.type == "cpu"
    torch.testing.assert_close(host, found.cpu(), rtol=1e-2, atol=1e-2)
    assert model.stats["host_copies"] == 2  # in and out
    if dtype != "bfloat16":
        assert isinstance(model(x.cpu().numpy())["y"], np.ndarray)


def test_a_program_of_the_cpu_is_moved(tmp_path) -> None:
    torch.manual_seed(0)
    head = Head().eval()
    x = torch.randn(8, 64)
    torch.export.save(torch.export.export(head, (x,)), tmp_path / "head.pt2")
    model = jetrt.load(tmp_path / "head.pt2", runtime="pytorch_fp16", autocast_dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(model(x.cuda())["y"].cpu(), head(x)["y"], rtol=1e-4, atol=1e-4)


def test_a_module_of_the_cpu_is_not_moved() -> None:
    with pytest.raises(errors.EngineDeserializeError, match=r"its weights lie on cpu .*module\.to\('cuda:0'\)"):
        jetrt.load(Head().eval(), runtime="pytorch_fp16")


def test_pytorch_is_ordered_on_the_callers_stream(head) -> None:
    model = jetrt.load(head, runtime="pytorch_fp16", autocast_dtype="float32")
    x = torch.zeros(8, 64, device="cuda")
    expected = head(torch.ones_like(x))["y"].detach()
    model(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1)
        found = model(x)["y"]
    stream.synchronize()
    torch.testing.assert_close(found, expected)
    for given in (stream, stream.cuda_stream):
        found = model(x, stream=given)["y"]
        stream.synchronize()
        torch.testing.assert_close(found, expected)


def test_pytorch_out_of_memory() -> None:
    class Greedy(torch.nn.Module):
        def forward(self, x):
            return torch.empty(1 << 50, dtype=torch.uint8, device=x.device)

    model = jetrt.load(Greedy().eval(), runtime="pytorch_fp16")
    with pytest.raises(errors.OutOfMemoryError, match="Greedy: CUDA out of memory"):
        model(torch.zeros(1, device="cuda"))


def test_pytorch_in_threads(head) -> None:
    runtime = jetrt.get_runtime("pytorch_fp16", autocast_dtype="float32")
    model = runtime.open(head)
    failures = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            for i in range(30):
                x = torch.full((8, 64), float(seed * 100 + i), device="cuda")
                if not torch.allclose(model(x)["y"], head(x)["y"], rtol=1e-3):
                    failures.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("name", ["onnx_trt_ep", "torch_tensorrt"])
def test_what_cannot_be_had_is_refused_with_a_reason(name: str) -> None:
    if name in jetrt.available_runtimes():
        pytest.skip("the package is installed")
    with pytest.raises(errors.RuntimeNotAvailableError) as caught:
        jetrt.get_runtime(name)
    assert caught.value.missing
    assert name not in caught.value.available
