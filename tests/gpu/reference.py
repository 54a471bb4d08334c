"""What the test engines compute, and how to make and read arrays of each library."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

# Relative to the largest reference value. mlp was built with TF32 allowed, as is TensorRT's default: with a mantissa of
# 10 bits 1e-5 is out of reach (up to 1.1e-3 measured). That jetrt adds nothing to it, test_binding.py shows: bit for
# bit what NVIDIA's own binding gives.
TOLERANCE = {"mlp": 2e-3, "conv_fp16": 1e-2}
ONNX = {"mlp": "mlp.onnx", "conv_fp16": "conv.onnx"}
SHAPE = {"mlp": lambda n: (n, 64), "conv_fp16": lambda n: (n, 3, 64, 64), "nonzero": lambda n: (n, 4)}
# min, opt, max of the profile and something in between
SIZES = {"mlp": (1, 8, 33, 64), "conv_fp16": (1, 4, 7, 16), "nonzero": (1, 8, 31, 64), "dit5": (1, 122, 300, 512)}


def random_input(engine: str, n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(SHAPE[engine](n)).astype(np.float32)
    if engine == "nonzero":
        x[np.abs(x) < 0.7] = 0
    return x


@cache
def session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def check(engine: str, folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    """Compares one output of mlp, conv_fp16 or nonzero with its ONNX reference."""
    if engine == "nonzero":
        np.testing.assert_array_equal(y, np.stack(np.nonzero(x)))
        assert y.dtype == np.int64
        return
    (expected,) = session(folder / ONNX[engine]).run(None, {"x": x})
    assert y.shape == expected.shape
    assert y.dtype == np.float32
    error = np.abs(y.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE[engine], f"{engine}: error {error:.2e}"


def ulp(x: np.ndarray) -> np.ndarray:
    """The distance of bf16 numbers around x."""
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(x), 1e-30))) - 7)


def dit5_inputs(s: int, seed: int, timestep: int = 1) -> dict[str, np.ndarray]:
    import ml_dtypes

    random = np.random.default_rng(seed)
    return {
        "sa_embs": random.standard_normal((1, 41, 64)).astype(ml_dtypes.bfloat16),
        "vl_embs": random.standard_normal((1, s, 64)).astype(ml_dtypes.bfloat16),
        "timestep": np.array([timestep], dtype=np.int64),
        "image_mask": random.random((1, s)) < 0.8,
        "backbone_attention_mask": random.random((1, s)) < 0.8,
    }


def check_dit5(inputs: dict[str, np.ndarray], output: np.ndarray) -> None:
    """Exact to rounding: the three places where bf16 may round, half a unit each, and nothing more."""
    sa, vl = (inputs[name].astype(np.float64) for name in ("sa_embs", "vl_embs"))
    kept = (inputs["image_mask"] & inputs["backbone_attention_mask"])[..., None]
    mean = (vl * kept).mean(axis=1, keepdims=True)
    total = sa + mean
    exact = total + float(inputs["timestep"][0])
    bound = (ulp(mean) + ulp(total) + ulp(exact)) / 2 * 1.01 + 1e-6
    assert output.shape == exact.shape
    wrong = np.abs(output.astype(np.float64) - exact) > bound
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements differ by more than rounding"


# ---- array libraries ------------------------------------------------------------------------------------------


def make(framework: str, x: np.ndarray) -> Any:
    """x as a tensor of the framework, on the GPU (numpy: on the host)."""
    if framework == "numpy":
        return x.copy()
    if framework == "torch":
        import torch

        if x.dtype.name == "bfloat16":  # torch.from_numpy does not know ml_dtypes
            return torch.from_numpy(x.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(x).cuda()
    if framework == "cupy":
        import cupy

        return cupy.asarray(x)
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.device_put(x, jax.devices("gpu")[0])


def to_numpy(framework: str, y: Any) -> np.ndarray:
    """y back on the host, after a look at its type."""
    if framework == "numpy":
        assert type(y) is np.ndarray
        return y
    if framework == "torch":
        import ml_dtypes
        import torch

        assert type(y) is torch.Tensor
        assert y.is_cuda
        if y.dtype == torch.bfloat16:
            return y.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return y.cpu().numpy()
    if framework == "cupy":
        import cupy

        assert type(y) is cupy.ndarray
        return cupy.asnumpy(y)
    import jax

    assert isinstance(y, jax.Array)
    return np.asarray(y)


def need(framework: str) -> None:
    import pytest

    if framework == "numpy":
        return
    module = pytest.importorskip(framework)
    if framework == "jax":
        try:
            module.devices("gpu")
        except RuntimeError as error:
            pytest.skip(f"this JAX has no GPU: {error}")


@contextlib.contextmanager
def on_stream(framework: str, kind: str) -> Any:
    """Runs the body on the default stream or on a side stream of the framework; yields what `stream=` needs."""
    if kind == "default":
        yield {}
    elif framework == "torch":
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            yield {}
        torch.cuda.current_stream().wait_stream(side)
    elif framework == "cupy":
        import cupy

        cupy.cuda.get_current_stream().synchronize()
        with cupy.cuda.Stream(non_blocking=True):
            yield {}
            cupy.cuda.get_current_stream().synchronize()
    else:  # no current stream of their own: named in the call
        import torch

        side = torch.cuda.Stream()
        yield {"stream": side}
        side.synchronize()
