"""The copy and cast kernel, launched by itself, against torch's `.to()`."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

PTX = Path(__file__).resolve().parents[2] / "kernels" / "copy_cast.ptx"
TARGETS = {
    torch.float32: 0, torch.float16: 1, torch.int8: 2, torch.int32: 3, torch.bool: 4, torch.uint8: 5,
    torch.float8_e4m3fn: 6, torch.bfloat16: 7, torch.int64: 8,
}  # fmt: skip
SOURCES = TARGETS | {
    torch.float64: 100, torch.int16: 101, torch.uint16: 102, torch.uint32: 103, torch.uint64: 104,
}  # fmt: skip
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


class Kernel:
    def __init__(self) -> None:
        torch.empty(1, device="cuda")  # makes the primary context current
        self.cuda = ctypes.CDLL("libcuda.so.1")
        module = ctypes.c_void_p()
        self.function = ctypes.c_void_p()
        self.check(self.cuda.cuModuleLoadData(ctypes.byref(module), PTX.read_bytes() + b"\0"))
        self.check(self.cuda.cuModuleGetFunction(ctypes.byref(self.function), module, b"jetrt_copy_cast"))

    @staticmethod
    def check(code: int) -> None:
        assert code == 0, f"CUDA error {code}"

    def __call__(self, source, dtype, shape=None, strides=None, offset=0):
        """`source` as `dtype`, contiguous; shape and strides (in elements) are the tensor's unless given."""
        shape = tuple(source.shape) if shape is None else shape
        strides = source.stride() if strides is None else strides
        out = torch.empty(shape, dtype=torch.uint8 if dtype == torch.bool else dtype, device="cuda")
        out.view(-1).view(torch.uint8).fill_(0xAB)  # an element that is not written shows
        pad = (0,) * (8 - len(shape))
        address = source.data_ptr() + offset * source.element_size()
        packed = struct.pack(
            "<QQQ8q8qiiii", out.data_ptr(), address, out.numel(),
            *shape, *pad, *strides, *pad, len(shape), SOURCES[source.dtype], TARGETS[dtype], 0,
        )  # fmt: skip
        assert len(packed) == 168
        buffer = ctypes.create_string_buffer(packed, 168)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        grid = max(1, min(1024, -(-out.numel() // 256)))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.check(self.cuda.cuLaunchKernel(self.function, grid, 1, 1, 256, 1, 1, 0, stream, arguments, None))
        torch.cuda.synchronize()
        return out.view(torch.bool) if dtype == torch.bool else out


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return Kernel()


def values(dtype, n: int):
    """Small numbers that every type can hold, with fractions and signs where the type has them."""
    x = torch.randint(-28, 29, (n,), device="cuda").to(torch.float64) / 4
    if dtype in UNSIGNED:
        x = x.abs()
    if dtype == torch.bool:
        return x > 0
    return x.to(dtype)


def same(got, expected) -> None:
    """Bit for bit, but any NaN is as good as another."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.dtype.is_floating_point:
        nan = expected.to(torch.float64).isnan()
        assert torch.equal(got.to(torch.float64).isnan(), nan)
        code = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
        assert torch.equal(got.view(code)[~nan], expected.view(code)[~nan])
    else:
        assert torch.equal(got, expected)


def ids(dtype) -> str:
    return str(dtype).removeprefix("torch.")


pairs = [(s, t) for s in SOURCES for t in TARGETS]
pair_ids = [f"{ids(s)}-{ids(t)}" for s, t in pairs]


@pytest.mark.parametrize(("source", "target"), pairs, ids=pair_ids)
def test_every_pair(kernel, source, target) -> None:
    """Out of unsigned into everything, out of fractions into integers: what is in range agrees with torch."""
    x = values(source, 10_007)
    if target in UNSIGNED and source not in UNSIGNED and source != torch.bool:
        x = x.to(torch.float64).abs().to(source)
    same(kernel(x, target), x.to(target))


LAYOUTS = {
    "contiguous": lambda x: x.view(50, 40, 30),
    "transposed": lambda x: x.view(200, 300).t(),
    "permuted 4-d": lambda x: x.view(10, 20, 30, 10).permute(3, 1, 0, 2),
    "permuted 8-d": lambda x: x[:1440].view(2, 3, 2, 5, 2, 3, 2, 2).permute(7, 0, 5, 2, 3, 6, 1, 4),
    "every third": lambda x: x[::3],
    "pitched": lambda x: x.view(200, 300)[:, :256],
    "pitched, odd": lambda x: x.view(200, 300)[:, 1:256],
    "odd start": lambda x: x[1:4098],
    "expanded": lambda x: x[:300].view(300, 1).expand(300, 200),
    "expanded in front": lambda x: x[:300].expand(50, 300),
    "one element expanded": lambda x: x[:1].expand(77),
    "0-d": lambda x: x[5],
    "empty": lambda x: x[:0].view(0, 7),
    "empty, strided": lambda x: x.view(200, 300).t()[:, :0],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("source", "target"),
    [(d, d) for d in TARGETS] + [(torch.uint8, torch.float32), (torch.float32, torch.bfloat16)],
    ids=ids,
)
def test_every_layout(kernel, source, target, layout) -> None:
    x = LAYOUTS[layout](values(source, 60_000))
    same(kernel(x, target), x.to(target).contiguous())


@pytest.mark.parametrize("dtype", list(TARGETS), ids=ids)
def test_negative_strides(kernel, dtype) -> None:
    """torch has none of its own; numpy arrays and CUDA array interfaces do."""
    x = values(dtype, 60 * 50)
    flipped = kernel(x, dtype, shape=(60, 50), strides=(-50, -1), offset=60 * 50 - 1)
    same(flipped.view(-1), torch.flip(x, (0,)))
    rows = kernel(x, dtype, shape=(60, 50), strides=(-50, 1), offset=59 * 50)
    same(rows, torch.flip(x.view(60, 50), (0,)))


def test_bytes_are_kept_when_the_type_is(kernel) -> None:
    """A copy is no conversion: NaN payloads, signed zeros and odd bools pass unchanged."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool):
        bits = torch.randint(0, 256, (40_000,), device="cuda", dtype=torch.uint8)
        x = bits.view(dtype)
        assert torch.equal(kernel(x, dtype).view(torch.uint8), bits)
        every_other = x.view(-1, 2)[:, 1]
        expected = bits.view(x.numel() // 2, 2, x.element_size())[:, 1].reshape(-1)
        assert torch.equal(kernel(every_other, dtype).view(torch.uint8).view(-1), expected)


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool)


@pytest.mark.parametrize("target", FLOATS, ids=ids)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=ids)
def test_every_small_float(kernel, source, target) -> None:
    """All bit patterns there are: subnormals, ties, infinities, NaN."""
    if source == torch.float8_e4m3fn:
        x = torch.arange(256, device="cuda").to(torch.uint8).view(source)
    else:
        x = torch.arange(-32768, 32768, device="cuda").to(torch.int16).view(source)
    same(kernel(x, target), x.to(target))


@pytest.mark.parametrize("target", FLOATS, ids=ids)
@pytest.mark.parametrize("source", [torch.float32, torch.float64], ids=ids)
def test_random_bits_of_large_floats(kernel, source, target) -> None:
    code = {torch.float32: torch.int32, torch.float64: torch.int64}[source]
    info = torch.iinfo(code)
    x = torch.randint(info.min, info.max, (1 << 20,), device="cuda", dtype=code).view(source)
    near = torch.randn(1 << 20, device="cuda", dtype=source) * 100
    for given in (x, near):
        same(kernel(given, target), given.to(target))


@pytest.mark.parametrize("target", [torch.int8, torch.int32, torch.int64, torch.uint8], ids=ids)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=ids)
def test_truncation(kernel, source, target) -> None:
    low = 0 if target == torch.uint8 else -120
    x = torch.rand(100_000, device="cuda", dtype=torch.float64).mul(120 - low).add(low).to(source)
    same(kernel(x, target), x.to(target))


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8], ids=ids)
@pytest.mark.parametrize("source", [torch.int64, torch.int32], ids=ids)
def test_large_integers(kernel, source, target) -> None:
    info = torch.iinfo(source)
    x = torch.randint(info.min, info.max, (100_000,), device="cuda", dtype=source)
    same(kernel(x, target), x.to(target))


def test_more_elements_than_32_bits_count(kernel) -> None:
    """The 64-bit index path: 2^32 + 7 elements of one byte, cast so that nothing is widened."""
    n = (1 << 32) + 7
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("needs 13 GB of device memory")
    x = torch.zeros(n, dtype=torch.uint8, device="cuda")
    x[-5:] = torch.arange(1, 6, dtype=torch.uint8, device="cuda")
    x[1 << 32] = 77
    y = kernel(x, torch.int8)
    assert y[-5:].tolist() == [1, 2, 3, 4, 5]
    assert y[1 << 32].item() == 77
    assert not any(bool(part.any()) for part in y[: 1 << 32].split(1 << 28))
