"""The two ways in which the Isaac-GR00T scripts call an engine, written from their contract, for comparison.

Our own code: the per-call work is theirs (moves, checks, setters, allocation, wait), nothing else is.
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


class TensorRTDiTWrapper:
    """Inputs moved and made contiguous, every shape and address set, a new bfloat16 output, no wait."""

    def __init__(self, engine_path: str, device: int = 0) -> None:
        self.device = device
        self.engine = load(engine_path)
        self.context = self.engine.create_execution_context()

    def __call__(
        self,
        sa_embs: torch.Tensor,
        vl_embs: torch.Tensor,
        timestep: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        backbone_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        place = f"cuda:{self.device}"
        given = {
            "sa_embs": sa_embs.to(place).contiguous(),
            "vl_embs": vl_embs.to(place).contiguous(),
            "timestep": timestep.to(place).contiguous(),
        }
        if image_mask is not None:
            given["image_mask"] = image_mask.to(place).contiguous()
        if backbone_attention_mask is not None:
            given["backbone_attention_mask"] = backbone_attention_mask.to(place).contiguous()
        for name, tensor in given.items():
            self.context.set_input_shape(name, tensor.shape)
        for name, tensor in given.items():
            self.context.set_tensor_address(name, tensor.data_ptr())
        shape = tuple(self.context.get_tensor_shape("output"))
        output = torch.empty(shape, dtype=torch.bfloat16, device=place)
        self.context.set_tensor_address("output", output.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT inference failed")
        return output


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
