"""`Engine` as the Isaac-GR00T scripts call it, written from their contract, for comparison.

Our own code: the per-call work is theirs (checks, setters, allocation, wait), nothing else is. The scripts' other way,
`TensorRTDiTWrapper`, is in `groot/script.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

try:
    import tensorrt as trt
except ImportError:
    import tensorrt_bindings as trt  # the same module without the wheel that brings the libraries

TORCH_TYPE = {
    trt.float32: torch.float32,
    trt.float16: torch.float16,
    trt.bfloat16: torch.bfloat16,
    trt.int8: torch.int8,
    trt.int32: torch.int32,
    trt.int64: torch.int64,
    trt.uint8: torch.uint8,
    trt.bool: torch.bool,
}

LOGGER = trt.Logger(trt.Logger.ERROR)
RUNTIME = trt.Runtime(LOGGER)


def load(path: str) -> Any:
    engine = RUNTIME.deserialize_cuda_engine(Path(path).read_bytes())
    if engine is None:
        raise RuntimeError(f"Failed to load TensorRT engine from {path}")
    return engine


class Engine:
    """Positional or named inputs, asserted; zero-filled outputs; waits for its stream unless told not to."""

    def __init__(self, path: str, synchronize: bool = True) -> None:
        self.handle = load(path)
        self.execution_context = self.handle.create_execution_context()
        self.synchronize = synchronize
        self.in_meta: list[list[Any]] = []
        self.out_meta: list[list[Any]] = []
        for i in range(self.handle.num_io_tensors):
            name = self.handle.get_tensor_name(i)
            meta = [name, self.handle.get_tensor_shape(name), TORCH_TYPE[self.handle.get_tensor_dtype(name)]]
            is_input = self.handle.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.in_meta if is_input else self.out_meta).append(meta)

    def set_runtime_tensor_shape(self, name: str, shape: Any) -> None:
        self.execution_context.set_input_shape(name, shape)

    def __call__(self, *args: torch.Tensor, **kwargs: Any) -> Any:
        return_list = kwargs.pop("return_list", False)
        stream = torch.cuda.current_stream()
        kept = []  # a copy made for contiguity must outlive the launch
        device = None
        supplied = 0
        for i, (name, _, dtype) in enumerate(self.in_meta):
            tensor = args[i] if i < len(args) else kwargs.get(name)
            if tensor is None:
                continue
            supplied += 1
            expected = self.execution_context.get_tensor_shape(name)
            assert isinstance(tensor, torch.Tensor), name
            assert tuple(tensor.shape) == tuple(expected), f"{name}: {tensor.shape} is not {expected}"
            assert tensor.dtype == dtype, f"{name}: {tensor.dtype} is not {dtype}"
            assert tensor.is_cuda, name
            tensor = tensor.contiguous()
            kept.append(tensor)
            device = device or tensor.device
            self.execution_context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for name, _, dtype in self.out_meta:
            shape = tuple(self.execution_context.get_tensor_shape(name))
            tensor = torch.zeros(shape, dtype=dtype, device=device)
            self.execution_context.set_tensor_address(name, tensor.data_ptr())
            outputs[name] = tensor
        self.execution_context.execute_async_v3(stream.cuda_stream)
        if self.synchronize:
            stream.synchronize()
        assert supplied == len(self.in_meta)
        return list(outputs.values()) if return_list else outputs
