"""The same plan, the same inputs: bit for bit what NVIDIA's own binding gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


def bindings() -> Any:
    try:
        import tensorrt
    except ImportError:
        return pytest.importorskip("tensorrt_bindings", reason="neither tensorrt nor tensorrt_bindings is installed")
    return tensorrt


def run_binding(trt: Any, path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context()
    for name, tensor in inputs.items():
        assert context.set_input_shape(name, tuple(tensor.shape))
        assert context.set_tensor_address(name, tensor.data_ptr())
    outputs = {}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        if name not in inputs:
            dtype = {"BF16": torch.bfloat16, "FLOAT": torch.float32}[engine.get_tensor_dtype(name).name]
            outputs[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            assert context.set_tensor_address(name, outputs[name].data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    return outputs


@pytest.mark.parametrize("graphs", ["off", "require"])
@pytest.mark.parametrize("name", ["mlp", "conv_fp16", "dit5"])
def test_bit_for_bit(load, engines, name: str, graphs: str) -> None:
    trt = bindings()
    for n in reference.SIZES[name]:
        if name == "dit5":
            inputs = {k: reference.make("torch", v) for k, v in reference.dit5_inputs(n, seed=n).items()}
        else:
            inputs = {"x": reference.make("torch", reference.random_input(name, n, seed=n))}
        expected = run_binding(trt, engines / f"{name}.engine", inputs)
        got = load(name, graphs=graphs)(**inputs)
        for output, tensor in got.items():
            assert torch.equal(tensor.view(torch.uint8), expected[output].view(torch.uint8)), f"{output} at {n}"
