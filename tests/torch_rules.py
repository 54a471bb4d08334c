"""Rules of torch that jetrt's drop-ins rely on, as functions of a torch module and a device.

The stand-in torch must keep them (tests/drop_in/test_standin_torch.py), and so must the real one
(tests/gpu/test_torch_rules.py): a rule that only one of them keeps is wrong.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Rule = Callable[[Any, str], None]
#: Rules for the host and for a GPU, and rules for a GPU alone.
ANYWHERE: dict[str, Rule] = {}
ON_A_GPU: dict[str, Rule] = {}


def anywhere(rule: Rule) -> Rule:
    ANYWHERE[rule.__name__] = rule
    return rule


def on_a_gpu(rule: Rule) -> Rule:
    ON_A_GPU[rule.__name__] = rule
    return rule


def raises(error: Any, beginning: str = "") -> Any:
    return pytest.raises(error, match=re.escape(beginning) or None)


# Shapes and layouts ---------------------------------------------------------------------------------------------------


@anywhere
def views_share_memory(torch: Any, device: str) -> None:
    x = torch.arange(24, device=device).view(2, 3, 4)
    assert (tuple(x.stride()), x.is_contiguous(), tuple(x.shape), x.dim(), x.numel()) == (
        (12, 4, 1),
        True,
        (2, 3, 4),
        3,
        24,
    )
    views = {
        "x[1]": ((3, 4), (4, 1), 12),
        "x[:, 1:]": ((2, 2, 4), (12, 4, 1), 4),
        "x[..., ::2]": ((2, 3, 2), (12, 4, 2), 0),
        "x[:, -1, 1:3]": ((2, 2), (12, 1), 9),
        "x[None]": ((1, 2, 3, 4), (24, 12, 4, 1), 0),
        "x.unsqueeze(1)": ((2, 1, 3, 4), (12, 12, 4, 1), 0),
        "x.unsqueeze(-1)": ((2, 3, 4, 1), (12, 4, 1, 1), 0),
        "x.transpose(0, 2)": ((4, 3, 2), (1, 4, 12), 0),
        "x.permute(1, 0, 2)": ((3, 2, 4), (4, 12, 1), 0),
        "x[:1].squeeze(0)": ((3, 4), (4, 1), 0),
        "x[:1].expand(5, 3, 4)": ((5, 3, 4), (0, 4, 1), 0),
        "x[:, :1].expand(-1, 6, -1)": ((2, 6, 4), (12, 0, 1), 0),
        "x.view(6, 4)": ((6, 4), (4, 1), 0),
        "x.view(-1)": ((24,), (1,), 0),
        "x.flatten(1)": ((2, 12), (12, 1), 0),
        "x[:, :, :2].view(2, 3, 2, 1)": ((2, 3, 2, 1), (12, 4, 1, 1), 0),
        "x.transpose(0, 1).flatten(1, 2).transpose(0, 1)": ((8, 3), (1, 8), 0),
        "x.narrow(1, 1, 2)": ((2, 2, 4), (12, 4, 1), 4),
        "x.select(2, 3)": ((2, 3), (12, 4), 3),
        "x.chunk(2, dim=2)[1]": ((2, 3, 2), (12, 4, 1), 2),
        "x.unbind(1)[2]": ((2, 4), (12, 1), 8),
    }
    for text, (shape, strides, offset) in views.items():
        v = eval(text, {"x": x})
        found = tuple(v.shape), tuple(v.stride()), v.storage_offset()
        if "flatten(1, 2)" not in text:  # which copies
            assert found == (shape, strides, offset), text
            assert v.data_ptr() == x.data_ptr() + offset * 8, text
        else:
            assert found == (shape, strides, 0), text
            assert v.data_ptr() != x.data_ptr()


@anywhere
def view_of_what_is_not_contiguous(torch: Any, device: str) -> None:
    x = torch.arange(12, device=device).view(3, 4)
    with raises(RuntimeError, "view size is not compatible with input tensor's size and stride"):
        x.t().view(12)
    with raises(RuntimeError, "shape '[5, 2]' is invalid for input of size 12"):
        x.view(5, 2)
    flat = x.t().reshape(12)
    assert flat.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert flat.data_ptr() != x.data_ptr()
    assert x.reshape(12).data_ptr() == x.data_ptr()


@anywhere
def contiguous_copies_only_where_needed(torch: Any, device: str) -> None:
    x = torch.arange(12, device=device).view(3, 4)
    assert x.contiguous() is x
    y = x.t().contiguous()
    assert tuple(y.stride()) == (3, 1)
    assert y.data_ptr() != x.data_ptr()
    # Dimensions of size 1 do not count.
    assert x[:1].expand(1, 4).is_contiguous()
    assert torch.empty(0, 3, device=device).t().is_contiguous()


@anywhere
def layouts_are_preserved(torch: Any, device: str) -> None:
    x = torch.arange(12, device=device, dtype=torch.float32).view(3, 4)
    for y in (x.t().clone(), x.t().to(torch.float64), x.t() * 2, torch.zeros_like(x.t()), torch.empty_like(x.t())):
        assert tuple(y.stride()) == (1, 4)
    for y in (x[:, ::2].clone(), x[:, ::2] + 1, x[:1].expand(3, 4).clone(), torch.cat([x.t(), x.t()])):
        assert y.is_contiguous()


@anywhere
def expand_refuses(torch: Any, device: str) -> None:
    with raises(RuntimeError, "The expanded size of the tensor (4) must match the existing size (3) at non-singleton"):
        torch.zeros(3, device=device).expand(4)
    with raises(
        RuntimeError, "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1"
    ):
        torch.zeros(2, 3, device=device) + torch.zeros(4, device=device)


@anywhere
def indexing(torch: Any, device: str) -> None:
    x = torch.arange(12, device=device).view(3, 4)
    assert x[1, 2].item() == 6
    assert x[-1].tolist() == [8, 9, 10, 11]
    assert x[torch.tensor([2, 0], device=device)].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert x[:, torch.tensor([[1], [3]], device=device)].tolist() == [[[1], [3]], [[5], [7]], [[9], [11]]]
    assert x[[0, 2]].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    with raises(IndexError, "index 3 is out of bounds for dimension 0 with size 3"):
        x[3]
    with raises(IndexError, "too many indices for tensor of dimension 2"):
        x[0, 0, 0]
    y = x.clone()
    y[:, 1] = 7
    y[0] = torch.tensor([1, 2, 3, 4], device=device)
    y[y > 9] = 0
    assert y.tolist() == [[1, 2, 3, 4], [4, 7, 6, 7], [8, 7, 0, 0]]


# Types ----------------------------------------------------------------------------------------------------------------

ORDER = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
# Row with column, in that order: as `torch.promote_types` has it.
PROMOTED = """
0123456789
1133456789
2323456789
3333456789
4444456789
5555556789
6666666889
7777778789
8888888889
9999999999
"""


@anywhere
def promotion(torch: Any, device: str) -> None:
    rows = PROMOTED.split()
    for (i, a), (j, b) in itertools.product(enumerate(ORDER), enumerate(ORDER)):
        x, y = (torch.ones(2, dtype=getattr(torch, n), device=device) for n in (a, b))
        wanted = getattr(torch, ORDER[int(rows[i][j])])
        assert torch.promote_types(x.dtype, y.dtype) is wanted, (a, b)
        assert (x * y).dtype is wanted, (a, b)
        assert torch.cat([x, y]).dtype is wanted, (a, b)
        # One without dimensions counts only for its kind: bool, integer, floating.
        kind = [0 if n == "bool" else 2 if "float" in n else 1 for n in (a, b)]
        assert (x * y[0]).dtype is (x.dtype if kind[0] >= kind[1] else y.dtype), (a, b)
    for name in ORDER:
        x = torch.ones(2, dtype=getattr(torch, name), device=device)
        assert (x * 2).dtype is (torch.int64 if name == "bool" else x.dtype)
        assert (x * 2.0).dtype is (x.dtype if "float" in name else torch.float32)
        assert (x * True).dtype is x.dtype
        assert (x / 2).dtype is (x.dtype if "float" in name else torch.float32)
        assert (x == 1).dtype is torch.bool
        assert (x.sum()).dtype is (x.dtype if "float" in name else torch.int64)


@anywhere
def casts(torch: Any, device: str) -> None:
    values = [-2.75, -1.0, -0.4, 0.0, 0.5, 1.5, 3.999, 65.0, 127.0]
    x = torch.tensor(values, device=device)
    for name in ("int8", "int16", "int32", "int64"):
        assert x.to(getattr(torch, name)).tolist() == [int(v) for v in values]
    assert x.bool().tolist() == [v != 0 for v in values]
    assert x.half().float().tolist() == np.array(values, np.float16).astype(np.float32).tolist()
    assert torch.tensor([300, -1], device=device).to(torch.uint8).tolist() == [44, 255]
    assert torch.tensor([True, False], device=device).long().tolist() == [1, 0]
    # To bfloat16: to the nearest, ties to even.
    bits = np.arange(0x3F800000, 0x3F800000 + (1 << 18), 997, np.uint32)
    wide = torch.tensor(bits.view(np.float32), device=device)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.int64)
    found = wide.bfloat16().view(torch.int16).cpu().numpy().astype(np.int64) & 0xFFFF
    assert np.array_equal(found, rounded)
    half = torch.tensor([65519.0, 65520.0, 6e-8, 2e-8, math.nan, -math.inf], device=device).half().float().tolist()
    assert half[:4] == [65504.0, math.inf, 5.960464477539063e-08, 0.0]
    assert math.isnan(half[4])
    assert half[5] == -math.inf


@anywhere
def inferred_types(torch: Any, device: str) -> None:
    assert torch.tensor([1, 2], device=device).dtype is torch.int64
    assert torch.tensor([1.0, 2], device=device).dtype is torch.float32
    assert torch.tensor([True], device=device).dtype is torch.bool
    assert torch.tensor(np.float64(1), device=device).dtype is torch.float64
    assert torch.tensor([], device=device).dtype is torch.float32
    assert torch.full((2,), 3, device=device).dtype is torch.int64
    assert torch.full((2,), 3.0, device=device).dtype is torch.float32
    assert torch.full((2,), True, device=device).dtype is torch.bool
    assert torch.arange(3, device=device).dtype is torch.int64
    for make in (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand):
        assert make(size=(2, 3), device=device).shape == make((2, 3)).shape == make(2, 3).shape == (2, 3)
    assert torch.arange(0, 1, 0.5, device=device).tolist() == [0.0, 0.5]
    assert torch.zeros(2, device=device).dtype is torch.get_default_dtype() is torch.float32
    assert str(torch.bfloat16) == "torch.bfloat16"
    assert (torch.bfloat16.itemsize, torch.bool.itemsize, torch.int64.is_floating_point) == (2, 1, False)
    assert torch.finfo(torch.bfloat16).max == 3.3895313892515355e38
    assert torch.finfo(torch.float16).eps == 0.0009765625
    assert (torch.iinfo(torch.int8).min, torch.iinfo(torch.uint8).max) == (-128, 255)


@anywhere
def devices(torch: Any, device: str) -> None:
    assert torch.device("cuda:1") == torch.device("cuda", 1)
    assert torch.device("cuda") != torch.device("cuda:0")
    assert str(torch.device("cuda", 1)) == "cuda:1"
    assert (torch.device("cpu").type, torch.device("cpu").index) == ("cpu", None)
    x = torch.zeros(1, device=device)
    assert x.device == (torch.device("cpu") if device == "cpu" else torch.device("cuda:0"))
    assert (x.is_cuda, x.get_device()) == ((False, -1) if device == "cpu" else (True, 0))
    with raises(RuntimeError):
        torch.device("nonsense")


# Computing ------------------------------------------------------------------------------------------------------------


def _bf16(x: Any) -> Any:
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return (
        ((bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16) << np.uint64(16))
        .astype(np.uint32)
        .view(np.float32)
    )


@anywhere
def arithmetic_is_rounded_as_torchs(torch: Any, device: str) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(200).astype(np.float32) for _ in range(2))
    operations: list[Callable[[Any, Any], Any]] = [
        lambda x, y: x + y,
        lambda x, y: x - y,
        lambda x, y: x * y,
        lambda x, y: x / y,
    ]
    for name, rounded in (
        ("float32", lambda v: v),
        ("bfloat16", _bf16),
        ("float16", lambda v: v.astype(np.float16).astype(np.float32)),
    ):
        x, y = (torch.tensor(v, device=device).to(getattr(torch, name)) for v in (a, b))
        m, n = x.float().cpu().numpy(), y.float().cpu().numpy()
        for op in operations:
            assert np.array_equal(op(x, y).float().cpu().numpy(), rounded(op(m, n))), name
        # Numbers take part as float32.
        assert np.array_equal((x * 0.1).float().cpu().numpy(), rounded(m * np.float32(0.1))), name
        assert np.array_equal((x + 0.25).float().cpu().numpy(), rounded(m + np.float32(0.25))), name


@anywhere
def integers_and_truth(torch: Any, device: str) -> None:
    a = torch.tensor([-7, -1, 0, 5, 9], device=device)
    assert (a // 2).tolist() == [-4, -1, 0, 2, 4]
    assert (a % 4).tolist() == [1, 3, 0, 1, 1]
    assert (-a).tolist() == [7, 1, 0, -5, -9]
    assert (a**2).tolist() == [49, 1, 0, 25, 81]
    assert (2 - a).tolist() == [9, 3, 2, -3, -7]
    assert (a > 0).tolist() == [False, False, False, True, True]
    assert (~(a > 0)).tolist() == [True, True, True, False, False]
    assert ((a > 0) & (a < 9)).tolist() == [False, False, False, True, False]
    assert ((a > 0) | (a < -1)).tolist() == [True, False, False, True, True]
    assert torch.where(a > 0, a, 0).tolist() == [0, 0, 0, 5, 9]
    assert a.masked_fill(a < 0, 100).tolist() == [100, 100, 0, 5, 9]
    assert a.clamp(-1, 5).tolist() == [-1, -1, 0, 5, 5]
    assert a.clamp_min(0).tolist() == [0, 0, 0, 5, 9]
    assert a.clamp_max(5).tolist() == [-7, -1, 0, 5, 5]
    assert a.max().item() == 9
    assert a.argmax().item() == 4
    assert a.cumsum(0).tolist() == [-7, -8, -8, -3, 6]


@anywhere
def reductions_and_products(torch: Any, device: str) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 4, 5))
    x, y = torch.tensor(a, device=device), torch.tensor(b, device=device)
    close = lambda t, v: np.testing.assert_allclose(t.cpu().numpy(), v, rtol=1e-12, atol=1e-12)  # noqa: E731
    close(x.sum(), a.sum())
    close(x.sum(1), a.sum(1))
    close(x.mean((0, 2), keepdim=True), a.mean((0, 2), keepdims=True))
    close(x.amax(-1), a.max(-1))
    close(x.var(1), a.var(1, ddof=1))
    close(torch.matmul(x, y), a @ b)
    close(x[0] @ y[1], a[0] @ b[1])
    close(x @ y[0, :, 0], a @ b[0, :, 0])
    close(torch.softmax(x, -1).sum(-1), np.ones((2, 3)))
    close(
        torch.nn.functional.layer_norm(x, (4,)),
        (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5),
    )
    close(torch.nn.functional.silu(x), a / (1 + np.exp(-a)))
    close(
        torch.nn.functional.gelu(x, approximate="tanh"),
        0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))),
    )
    assert (x > 0).any().item() is True
    assert (x > 100).all().item() is False
    with raises(RuntimeError, "mean(): could not infer output dtype."):
        torch.arange(3, device=device).mean()
    with raises(RuntimeError, "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x2)"):
        x[0] @ torch.zeros(5, 2, dtype=torch.float64, device=device)


@anywhere
def joining(torch: Any, device: str) -> None:
    x, y = torch.zeros(2, 3, device=device), torch.ones(2, 1, device=device)
    assert torch.cat([x, y], dim=1).tolist() == [[0, 0, 0, 1]] * 2
    assert tuple(torch.stack([x, x], dim=1).shape) == (2, 2, 3)
    assert x.repeat(2, 2).shape == (4, 6)
    with raises(RuntimeError, "Sizes of tensors must match except in dimension 0."):
        torch.cat([x, y])
    with raises(
        RuntimeError, "stack expects each tensor to be equal size, but got [2, 3] at entry 0 and [2, 1] at entry 1"
    ):
        torch.stack([x, y])


@anywhere
def updates_in_place(torch: Any, device: str) -> None:
    x = torch.zeros(2, 3, device=device)
    before = x._version
    y = x
    x += 1
    x.mul_(2).add_(torch.ones(3, device=device))
    assert y is x
    assert x.tolist() == [[3.0] * 3] * 2
    assert x._version - before == 3
    x[0].fill_(5)
    x[:, 1].copy_(torch.tensor([7, 8], device=device))
    assert x.tolist() == [[5, 7, 5], [3, 8, 3]]
    with raises(RuntimeError, "result type Float can't be cast to the desired output type Long"):
        torch.zeros(2, dtype=torch.int64, device=device).add_(0.5)
    with raises(RuntimeError, "output with shape [3] doesn't match the broadcast shape [2, 3]"):
        torch.zeros(3, device=device).add_(x)
    with raises(
        RuntimeError,
        "unsupported operation: more than one element of the written-to tensor refers to a single memory location.",
    ):
        torch.zeros(1, device=device).expand(3).add_(1)


@anywhere
def comparing(torch: Any, device: str) -> None:
    x = torch.tensor([1.0, math.nan], device=device)
    assert not torch.equal(x, x.clone())
    assert torch.equal(x[:1], x[:1].clone())
    assert not torch.equal(x[:1], x)
    assert torch.allclose(x, x.clone(), equal_nan=True)
    with raises(RuntimeError, "Boolean value of Tensor with more than one value is ambiguous"):
        bool(x)
    with raises(RuntimeError, "a Tensor with 2 elements cannot be converted to Scalar"):
        x.item()
    assert x[0].item() == 1.0 == float(x[0])
    assert isinstance(torch.tensor(3, device=device).item(), int)
    assert isinstance(torch.tensor(True, device=device).item(), bool)
    assert [1, 2, 3][torch.tensor(1, device=device)] == 2


@anywhere
def numpy_and_back(torch: Any, device: str) -> None:
    x = torch.arange(4, dtype=torch.float32)
    x.numpy()[1] = 9
    assert x[1].item() == 9
    source = np.arange(6).reshape(2, 3)
    y = torch.from_numpy(source[:, ::2])
    source[0, 2] = 50
    assert (tuple(y.stride()), y.tolist()) == ((3, 2), [[0, 50], [3, 5]])
    assert torch.tensor(source).data_ptr() != source.ctypes.data
    with raises(TypeError, "Got unsupported ScalarType BFloat16"):
        torch.zeros(1, dtype=torch.bfloat16).numpy()
    with raises(RuntimeError, "Can't call numpy() on Tensor that requires grad."):
        torch.zeros(1, requires_grad=True).numpy()
    if device != "cpu":
        with raises(TypeError, "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()"):
            torch.zeros(1, device=device).numpy()


@anywhere
def dlpack(torch: Any, device: str) -> None:
    from torch.utils.dlpack import from_dlpack, to_dlpack

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        x = torch.ones(2, 3, device=device).to(dtype)[:, 1:]
        capsule = to_dlpack(x)
        y = from_dlpack(capsule)
        assert (y.data_ptr(), y.dtype, tuple(y.stride()), y.device) == (x.data_ptr(), dtype, (3, 1), x.device)
        with raises(RuntimeError):
            from_dlpack(capsule)
        assert from_dlpack(x).data_ptr() == x.data_ptr()
    with raises((BufferError, RuntimeError), "Can't export tensors that require gradient"):
        torch.ones(1, device=device, requires_grad=True).__dlpack__()
    with torch.inference_mode():
        assert from_dlpack(to_dlpack(torch.ones(1, device=device))).is_inference()


# Modes ----------------------------------------------------------------------------------------------------------------


@anywhere
def inference_mode(torch: Any, device: str) -> None:
    outside = torch.zeros(2, device=device)
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        inside = torch.zeros(2, device=device)
        assert inside.is_inference()
        inside.add_(1)
        outside.add_(1)  # a normal tensor may be updated inside
        assert not outside[:1].is_inference()
        with torch.inference_mode(False):
            assert torch.is_grad_enabled()
            assert not torch.zeros(1, device=device).is_inference()
    assert not torch.is_inference_mode_enabled()
    for update in (lambda t: t.add_(1), lambda t: t.copy_(outside), lambda t: t.zero_(), lambda t: t[:1].fill_(3)):
        with raises(RuntimeError, "Inplace update to inference tensor outside InferenceMode is not allowed."):
            update(inside)
    with raises(RuntimeError, "Inference tensors do not track version counter."):
        _ = inside._version
    with raises(RuntimeError, "Setting requires_grad=True on inference tensor outside InferenceMode is not allowed."):
        inside.requires_grad_()
    assert (inside * 2).shape == (2,)
    assert not (inside * 2).is_inference()
    assert not inside.clone().is_inference()
    assert inside[:1].is_inference()
    outside.copy_(inside)


@anywhere
def gradient_modes(torch: Any, device: str) -> None:
    x = torch.ones(2, device=device, requires_grad=True)
    assert (x * 2).requires_grad
    assert (x * 2).grad_fn is not None
    assert not (x * 2).is_leaf
    assert not x.detach().requires_grad
    with torch.no_grad():
        assert not (x * 2).requires_grad
        x.mul_(1)
        with torch.enable_grad():
            assert (x * 2).requires_grad
    with raises(RuntimeError, "a leaf Variable that requires grad is being used in an in-place operation."):
        x.mul_(2)
    with raises(RuntimeError, "only Tensors of floating point"):
        torch.ones(1, dtype=torch.int64, device=device).requires_grad_()

    @torch.no_grad()
    def inside() -> bool:
        return torch.is_grad_enabled()

    @torch.inference_mode()
    def deeper() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert (inside(), deeper(), torch.is_grad_enabled()) == (False, (False, True), True)
    seen: list[bool] = []
    with torch.no_grad():
        thread = threading.Thread(target=lambda: seen.append(torch.is_grad_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]  # each thread has its own


@anywhere
def deterministic_algorithms_fill_new_memory(torch: Any, device: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.empty(3, device=device).isnan().all().item()
        assert torch.empty(3, dtype=torch.bfloat16, device=device).isnan().all().item()
        assert torch.empty(2, dtype=torch.int32, device=device).tolist() == [2**31 - 1] * 2
        assert torch.empty_like(torch.zeros(2, device=device)).isnan().all().item()
        assert torch.utils.deterministic.fill_uninitialized_memory is True
    finally:
        torch.use_deterministic_algorithms(False)


@anywhere
def random_numbers(torch: Any, device: str) -> None:
    torch.manual_seed(3)
    a = torch.randn(1001, device=device)
    b = torch.randn(1001, device=device)
    assert not torch.equal(a, b)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(1001, device=device), a)
    cuda = device != "cpu"
    get, put = (
        (torch.cuda.get_rng_state, torch.cuda.set_rng_state) if cuda else (torch.get_rng_state, torch.set_rng_state)
    )
    state = get()
    assert (state.dtype, state.device.type) == (torch.uint8, "cpu")
    assert torch.equal(torch.randn(1001, device=device), b)
    put(state)
    assert torch.equal(torch.randn(1001, device=device), b)
    assert abs(a.mean().item()) < 0.2
    assert 0.8 < a.std().item() < 1.2
    u = torch.rand(1000, device=device)
    assert 0 <= u.min().item() < 0.1
    assert 0.9 < u.max().item() < 1
    assert set(torch.randint(2, 5, (200,), device=device).tolist()) == {2, 3, 4}
    generator = torch.Generator(device).manual_seed(3)
    before = get()
    assert torch.equal(torch.randn(1001, device=device, generator=generator), a)
    assert torch.equal(get(), before)
    assert torch.randn(3, device=device, dtype=torch.bfloat16).dtype is torch.bfloat16


# Modules --------------------------------------------------------------------------------------------------------------


@anywhere
def modules(torch: Any, device: str) -> None:
    nn = torch.nn
    calls: list[str] = []

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("scale", torch.ones(2))

        def forward(self, x: Any, more: Any = 0) -> Any:
            return self.linear(x) * self.scale + more

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Any) -> Any:
            return self.inner(x, more=1)

    outer = Outer().to(device).eval()
    assert [n for n, _ in outer.named_parameters()] == ["weight", "inner.linear.weight", "inner.linear.bias"]
    assert [n for n, _ in outer.named_modules()] == ["", "inner", "inner.linear"]
    assert [n for n, _ in outer.named_buffers()] == ["inner.scale"]
    assert next(outer.parameters()).device.type == torch.device(device).type
    assert not outer.inner.training
    x = torch.ones(1, 3, device=device)
    hooks = [
        outer.inner.register_forward_pre_hook(lambda m, args: calls.append(f"before {len(args)}")),
        outer.inner.register_forward_hook(lambda m, args, result: calls.append("after")),
        outer.inner.register_forward_hook(lambda m, a, k, r: calls.append(f"with {list(k)}"), with_kwargs=True),
    ]
    first = outer(x)
    assert calls == ["before 1", "after", "with ['more']"]
    # What is set on the instance is called; hooks go on working.
    outer.inner.forward = lambda x, more: x.sum() * 0 + 42
    assert outer(x).item() == 42
    assert len(calls) == 6
    for hook in hooks:
        hook.remove()
    del outer.inner.forward
    assert torch.equal(outer(x), first)
    assert len(calls) == 6
    with outer.inner.register_forward_hook(lambda m, args, result: result * 0):
        assert outer(x).abs().sum().item() == 0
    with raises(TypeError, "cannot assign '") as caught:
        outer.inner = object()
    assert "as child module 'inner' (torch.nn.Module or None expected)" in str(caught.value)
    with raises(TypeError, "as parameter 'weight' (torch.nn.Parameter or None expected)"):
        outer.weight = torch.zeros(1)
    with raises(AttributeError, "has no attribute 'nonsense'"):
        _ = outer.nonsense
    twin = copy.deepcopy(outer)
    assert torch.equal(twin(x), first)
    assert twin.weight.data_ptr() != outer.weight.data_ptr()
    del outer.inner
    assert [n for n, _ in outer.named_parameters()] == ["weight"]
    assert isinstance(outer.weight, nn.Parameter)
    assert isinstance(outer.weight, torch.Tensor)
    assert outer.weight.requires_grad
    assert (type(outer.weight.detach()), type(outer.weight.data)) == (torch.Tensor, torch.Tensor)
    outer.half()
    assert outer.weight.dtype is torch.float16
    bare = nn.Module()
    bare.child = None
    with raises(NotImplementedError):
        bare(1)
    assert nn.Embedding(4, 2).to(device)(torch.tensor([3, 0], device=device)).shape == (2, 2)


# A GPU: devices, streams and memory -----------------------------------------------------------------------------------


@on_a_gpu
def between_host_and_device(torch: Any, device: str) -> None:
    x = torch.arange(12, dtype=torch.float32).view(3, 4)
    y = x.to(device)
    assert y.to(device) is y
    assert y.cuda() is y
    assert x.cpu() is x
    assert torch.equal(y.cpu(), x)
    assert tuple(x.t().to(device).stride()) == (1, 4)
    assert torch.equal(x.t().to(device, torch.int32).cpu(), x.t().int())
    assert torch.equal(torch.zeros(4, 3, device=device).copy_(x.t()).cpu(), x.t())
    assert torch.equal(torch.zeros(3, 4).copy_(y), x)
    with raises(
        RuntimeError, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
    ):
        x + y
    # One number on the host is taken along.
    assert torch.equal((y + torch.tensor(1.0)).cpu(), x + 1)
    with raises(RuntimeError):
        y.pin_memory()
    pinned = x.pin_memory()
    assert pinned.is_pinned()
    assert not x.is_pinned()
    z = pinned.to(device, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(z.cpu(), x)


@on_a_gpu
def streams(torch: Any, device: str) -> None:
    default = torch.cuda.default_stream()
    assert default.cuda_stream == 0
    assert torch.cuda.current_stream() == default
    side = torch.cuda.Stream()
    assert side.cuda_stream not in (0, 1, 2)
    assert side != default
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
        with torch.cuda.stream(None):
            assert torch.cuda.current_stream() == side
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_stream()))
        thread.start()
        thread.join()
        assert seen == [default]  # each thread has its own
    assert torch.cuda.current_stream() == default
    assert (side.device, default.device_index) == (torch.device("cuda:0"), 0)
    assert torch.cuda.ExternalStream(side.cuda_stream).cuda_stream == side.cuda_stream


@on_a_gpu
def events_order_streams(torch: Any, device: str) -> None:
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    x = torch.zeros(1 << 16, device=device)
    one.wait_stream(torch.cuda.current_stream())
    event = torch.cuda.Event()
    assert event.query()  # never recorded
    with torch.cuda.stream(one):
        for _ in range(50):
            x += 1
        event.record()
    with torch.cuda.stream(two):
        two.wait_event(event)
        y = x * 2
        x.record_stream(two)
    torch.cuda.current_stream().wait_stream(two)
    assert y[123].item() == 100
    event.synchronize()
    assert event.query()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    x += 1
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) >= 0
    one.synchronize()
    assert one.query()


@on_a_gpu
def the_default_stream_is_ordered_with_blocking_streams(torch: Any, device: str) -> None:
    """Waiting for it, or asking whether it is through, takes in what blocking streams had to do before."""
    import ctypes

    driver = ctypes.CDLL("libcuda.so.1")
    handle = ctypes.c_void_p()
    x = torch.zeros(1000, device=device)
    torch.cuda.synchronize()
    assert driver.cuStreamCreate(ctypes.byref(handle), 0) == 0
    blocking, default = torch.cuda.ExternalStream(handle.value), torch.cuda.default_stream()
    event = torch.cuda.Event()
    with torch.cuda.stream(blocking):
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(500_000_000)  # cycles; the stand-in works lazily anyway
        x += 1
        event.record()
    assert not default.query()
    default.synchronize()
    assert event.query()
    assert x[5].item() == 1
    torch.cuda.synchronize()
    assert driver.cuStreamDestroy_v2(handle) == 0


@on_a_gpu
def memory_is_reused_on_its_stream(torch: Any, device: str) -> None:
    gc.collect()  # what others left
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    x = torch.empty(1000, device=device)
    assert torch.cuda.memory_allocated() == before + 4096
    assert torch.cuda.memory_reserved() >= torch.cuda.memory_allocated()
    place = x.data_ptr()
    assert place % 512 == 0
    del x
    assert torch.cuda.memory_allocated() == before
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.empty(1000, device=device).data_ptr() != place
    x = torch.empty(1000, device=device)
    assert x.data_ptr() == place
    with raises(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate"):
        torch.empty(1 << 44, dtype=torch.uint8, device=device)
    assert torch.cuda.OutOfMemoryError is torch.OutOfMemoryError
    assert issubclass(torch.OutOfMemoryError, RuntimeError)


@on_a_gpu
def the_memory_fraction_is_a_limit(torch: Any, device: str) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(0.01)
        with raises(torch.OutOfMemoryError):
            torch.empty(total // 50, dtype=torch.uint8, device=device)
        torch.empty(total // 200, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    with raises(ValueError, "Invalid fraction value: 2.0. Allowed range: 0~1"):
        torch.cuda.set_per_process_memory_fraction(2.0)


# A GPU: graphs --------------------------------------------------------------------------------------------------------


def _captured(torch: Any, function: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.current_stream()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # where the function fails at once
            with torch.cuda.graph(graph, **options):
                result = function()
    finally:
        torch.cuda.set_stream(here)  # a capture that fails leaves its own
    return graph, result


@on_a_gpu
def a_replay_works_on_what_is_there_now(torch: Any, device: str) -> None:
    x = torch.arange(6, dtype=torch.float32, device=device)
    index = torch.tensor([2, 0], device=device)

    def work() -> Any:
        y = torch.cat([x * 2, torch.full((2,), 7.0, device=device)])
        return y[::2].contiguous() + y[index].sum()

    eager = work()
    graph, y = _captured(torch, work, capture_error_mode="thread_local")
    graph.replay()
    assert torch.equal(y, eager)
    x.copy_(torch.randn(6, device=device))
    index.copy_(torch.tensor([5, 1], device=device))
    graph.replay()
    assert torch.equal(y, work())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.replay()
        z = y.clone()
    side.synchronize()
    assert torch.equal(z, work())
    graph.reset()


@on_a_gpu
def a_replay_draws_what_the_calls_would(torch: Any, device: str) -> None:
    def work() -> Any:
        return torch.randn(33, device=device) + torch.rand(5, 1, device=device)

    work()
    torch.manual_seed(11)
    wanted = [work() for _ in range(3)]
    after = torch.cuda.get_rng_state()
    graph, y = _captured(torch, work)
    torch.manual_seed(11)
    for w in wanted:
        graph.replay()
        assert torch.equal(y, w)
    assert torch.equal(torch.cuda.get_rng_state(), after)
    graph.reset()


@on_a_gpu
def capturing_leaves_the_random_state(torch: Any, device: str) -> None:
    torch.manual_seed(5)
    before = torch.cuda.get_rng_state()
    graph, _ = _captured(torch, lambda: torch.randn(8, device=device))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    graph.reset()


@on_a_gpu
def a_wait_cannot_be_captured(torch: Any, device: str) -> None:
    x = torch.ones(3, device=device)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool((x > 0).all()),
        lambda: torch.cuda.synchronize(),
        lambda: torch.cuda.current_stream().synchronize(),
    ):
        with raises(RuntimeError, "CUDA error: operation "):
            _captured(torch, wait)
        # Afterwards everything works again, but for random numbers: torch 2.11's fail until another capture ends.
        assert not torch.cuda.is_current_stream_capturing()
        torch.cuda.synchronize()
        assert (x * 2).tolist() == [2, 2, 2]
        graph, y = _captured(torch, lambda: x * 2)
        graph.replay()
        assert y.tolist() == [2, 2, 2]
        assert torch.randn(2, device=device).shape == (2,)
        graph.reset()


@on_a_gpu
def ordinary_host_memory_cannot_be_captured(torch: Any, device: str) -> None:
    x = torch.ones(3)
    with raises(
        RuntimeError,
        "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned.",
    ):
        _captured(torch, lambda: x.to(device))
    y = x.to(device)
    with raises(RuntimeError):
        _captured(torch, lambda: y.cpu())
    assert torch.equal(y.cpu(), x)
    pinned = x.pin_memory()
    graph, y = _captured(torch, lambda: pinned.to(device, non_blocking=True) * 2)
    pinned.fill_(4)
    graph.replay()
    assert y.tolist() == [8, 8, 8]
    graph.reset()


@on_a_gpu
def rules_of_capture(torch: Any, device: str) -> None:
    x = torch.ones(3, device=device)
    graph = torch.cuda.CUDAGraph()
    with raises(RuntimeError, "CUDA graphs must be captured on a non-default stream."):
        graph.capture_begin()
    with raises(RuntimeError, "Called CUDAGraph::replay without a preceding successful capture."):
        torch.cuda.CUDAGraph().replay()
    with raises(RuntimeError, "Unknown capture error mode."):
        _captured(torch, lambda: x * 2, capture_error_mode="nonsense")
    empty = torch.cuda.CUDAGraph()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.cuda.graph(empty):
            pass
    assert any("The CUDA Graph is empty." in str(w.message) for w in caught)
    empty.reset()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert not torch.cuda.is_current_stream_capturing()
        graph.capture_begin(capture_error_mode="thread_local")
        assert torch.cuda.is_current_stream_capturing()
        y = x + 1
        graph.capture_end()
        assert not torch.cuda.is_current_stream_capturing()
        with raises(RuntimeError, "This CUDAGraph instance already owns a captured graph."):
            graph.capture_begin()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    assert y.tolist() == [2, 2, 2]
    graph.reset()


@on_a_gpu
def branches_of_a_capture(torch: Any, device: str) -> None:
    x = torch.ones(3, device=device)
    side = torch.cuda.Stream(priority=-1)  # torch hands out 32 streams of each kind in turn: not the one it captures on

    def work() -> Any:
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            a = x * 2
        b = x * 3
        here.wait_stream(side)
        return a + b

    graph, y = _captured(torch, work)
    x.fill_(2)
    graph.replay()
    assert y.tolist() == [10, 10, 10]
    graph.reset()

    def unjoined() -> Any:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            return x * 2

    with raises(RuntimeError, "CUDA error: capturing stream has unjoined work"):
        _captured(torch, unjoined)
    torch.cuda.synchronize()
    assert (x + 1).tolist() == [3, 3, 3]


@on_a_gpu
def a_graphs_memory_is_its_own(torch: Any, device: str) -> None:
    x = torch.ones(1000, device=device)
    graph, y = _captured(torch, lambda: (x * 2) * 3)
    graph.replay()
    others = [torch.full((1000,), 9.0, device=device) for _ in range(20)]
    graph.replay()
    assert y[0].item() == 6
    assert all(o[0].item() == 9 for o in others)
    pool = torch.cuda.graph_pool_handle()
    first, a = _captured(torch, lambda: x * 2, pool=pool)
    second, b = _captured(torch, lambda: x * 5, pool=pool)
    assert first.pool() == second.pool() == pool
    assert a.data_ptr() != b.data_ptr()  # a is held
    first.replay()
    second.replay()
    assert (a[0].item(), b[0].item()) == (2, 5)
    del y, others
    for g in (graph, first, second):
        g.reset()
    assert (a[0].item(), b[0].item()) == (2, 5)  # what is held lives on
    del a, b
    gc.collect()
    torch.cuda.empty_cache()


@on_a_gpu
def another_threads_work_does_not_disturb_a_thread_local_capture(torch: Any, device: str) -> None:
    x = torch.ones(3, device=device)
    results: list[Any] = []

    def other() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append((torch.ones(1 << 20, device=device) * 2).sum().item())

    def work() -> Any:
        y = x * 2
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return y + 1

    graph, y = _captured(torch, work, capture_error_mode="thread_local")
    graph.replay()
    assert (y.tolist(), results) == ([3, 3, 3], [2.0 * (1 << 20)])
    graph.reset()
