"""kernels/copy_cast.cu itself, compiled for the CPU, against numpy: the cast, the layouts, the widened copies.

tests/gpu/test_kernel.py compares the PTX on a GPU with torch; this one needs a C++ compiler alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels"

# One thread after another, thread 0 of a block first; blocks and threads enough that the grid-stride loop strides.
SHIM = """
#define JETRT_ON_HOST
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(n)
static inline int __float_as_int(float f) { int i; __builtin_memcpy(&i, &f, 4); return i; }
static inline float __int_as_float(int i) { float f; __builtin_memcpy(&f, &i, 4); return f; }
static inline void __syncthreads() {}
static struct { unsigned x, y; } gridDim = {3, 1}, blockDim = {5, 1}, blockIdx, threadIdx;

static inline float f16_to_float(unsigned short h) {
    int e = (h >> 10) & 31, m = h & 1023;
    float f = e == 31 ? (m ? __builtin_nanf("") : __builtin_inff())
            : e == 0 ? __builtin_ldexpf((float)m, -24) : __builtin_ldexpf((float)(m | 1024), e - 25);
    return h & 0x8000 ? -f : f;
}
static inline unsigned short float_to_f16(float f) {
    unsigned b = (unsigned)__float_as_int(f), sign = (b >> 16) & 0x8000, rest = b & 0x7fffffff;
    if (rest > 0x7f800000) return sign | 0x7e00;
    if (rest >= 0x477ff000) return sign | 0x7c00;
    if (rest < 0x38800000) return sign | (unsigned short)__builtin_rintf(__builtin_ldexpf(__int_as_float(rest), 24));
    return sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13);
}
#include "copy_cast.cu"
extern "C" void run(const CopyCast* p) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) jetrt_copy_cast(*p);
}
extern "C" void run_batch(const Batch* p, unsigned count) {
    for (blockIdx.y = 0; blockIdx.y < count; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) jetrt_copy_batch(*p);
    blockIdx.y = 0;
}
"""

F32, F16, I8, I32, BOOL, U8, FP8, BF16, I64 = range(9)
F64, I16, U16, U32, U64 = range(100, 105)
NUMPY = {
    F32: "f4", F16: "f2", I8: "i1", I32: "i4", BOOL: "?", U8: "u1", I64: "i8",
    F64: "f8", I16: "i2", U16: "u2", U32: "u4", U64: "u8",
}  # fmt: skip
STORED = NUMPY | {FP8: "u1", BF16: "u2"}  # as bytes where numpy has no such type
TARGETS = range(9)
NAMES = {v: k for k, v in globals().items() if isinstance(v, int) and k.isupper()}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("kernel")
    source, library = folder / "host.cpp", folder / "host.so"
    source.write_text(SHIM)
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{KERNELS}", "-o", library, source], check=True
    )
    return ctypes.CDLL(str(library))


def packed(x: np.ndarray, out: np.ndarray, source: int, target: int) -> bytes:
    """The job that writes x to `out`, with the strides that x has."""
    strides = [s // x.itemsize for s in x.strides]
    pad = [0] * (8 - x.ndim)
    job = struct.pack(
        "<QQQ8q8qiiii", out.ctypes.data, x.__array_interface__["data"][0], x.size,
        *x.shape, *pad, *strides, *pad, x.ndim, source, target, 0,
    )  # fmt: skip
    assert len(job) == 168
    return job


@pytest.fixture(scope="module")
def run(library):
    def call(x: np.ndarray, source: int, target: int) -> np.ndarray:
        """x (stored as STORED says) as `target`."""
        out = np.full(x.shape, 0xAB, dtype="u1").astype(STORED[target])
        library.run(ctypes.create_string_buffer(packed(x, out, source, target), 168))
        return out

    return call


# ---- references that share nothing with the kernel's arithmetic -------------------------------------------------


def decode(bits: np.ndarray, kind: int) -> np.ndarray:
    """bf16 or fp8 E4M3FN as float64."""
    bits = bits.astype(np.int64)
    if kind == BF16:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return (bits << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(mantissa + 8, exponent - 10))
    value = np.where((bits & 0x7F) == 0x7F, np.nan, value)
    return np.where(bits & 0x80, -value, value)


def encode(x: np.ndarray, kind: int) -> np.ndarray:
    """The nearest number there is, the even one of two; beyond the largest: infinity (bf16) or NaN (fp8)."""
    codes = np.arange(0x7F81 if kind == BF16 else 0x7F)
    table = decode(codes, kind)
    step = 2.0**120 if kind == BF16 else 32.0  # what would follow the largest finite number
    if kind == BF16:
        table[-1] = table[-2] + step
    else:
        table, codes = np.append(table, 480.0), np.append(codes, 0x7F)
    magnitude = np.minimum(np.abs(np.nan_to_num(x, nan=0.0, posinf=np.finfo(float).max)), table[-1])
    above = np.searchsorted(table, magnitude).clip(1)
    below = above - 1
    middle = (table[below] + table[above]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (codes[above] % 2 == 0))
    bits = np.where(up, codes[above], codes[below])
    bits = np.where(np.isnan(x), 0x7FC0 if kind == BF16 else 0x7F, bits)
    sign = np.where(np.signbit(x) & ~np.isnan(x), 0x8000 if kind == BF16 else 0x80, 0)
    return (bits | sign).astype(STORED[kind])


def as_numbers(x: np.ndarray, kind: int) -> np.ndarray:
    return decode(x, kind) if kind in (BF16, FP8) else x


def cast(x: np.ndarray, source: int, target: int) -> np.ndarray:
    values = as_numbers(x, source)
    if source == target:
        return x.copy()
    with np.errstate(all="ignore"):
        if target == BOOL:
            return values != 0
        if target in (F16, BF16, FP8):
            values = values.astype(np.float32)  # by way of f32, as torch does it
        if target in (BF16, FP8):
            return encode(values.astype(np.float64), target)
        if target == U8 and values.dtype.kind == "f":
            values = values.astype(np.int64)
        return values.astype(NUMPY[target])


def same(got: np.ndarray, expected: np.ndarray, kind: int) -> None:
    assert got.shape == expected.shape
    a, b = as_numbers(got, kind), as_numbers(expected, kind)
    if a.dtype.kind == "f":
        nan = np.isnan(b)
        np.testing.assert_array_equal(np.isnan(a), nan)
        np.testing.assert_array_equal(np.signbit(a)[~nan], np.signbit(b)[~nan])
        a, b = a[~nan], b[~nan]
    np.testing.assert_array_equal(a, b)


def store(values: np.ndarray, kind: int) -> np.ndarray:
    """Numbers, small enough for every type, as this type holds them."""
    if kind in (U8, U16, U32, U64):
        values = np.abs(values)
    return encode(values, kind) if kind in (BF16, FP8) else values.astype(NUMPY[kind])


def quarters(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-28, 29, n) / 4


# ---- the tests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=NAMES.get)
@pytest.mark.parametrize("source", STORED, ids=NAMES.get)
def test_every_pair(run, source, target) -> None:
    values = quarters(997)
    x = store(np.abs(values) if target == U8 else values, source)
    same(run(x, source, target), cast(x, source, target), target)


@pytest.mark.parametrize("target", [F32, F16, BF16, FP8, BOOL], ids=NAMES.get)
@pytest.mark.parametrize("source", [F16, BF16, FP8], ids=NAMES.get)
def test_every_small_float(run, source, target) -> None:
    codes = np.arange(256 if source == FP8 else 65536).astype("u1" if source == FP8 else "u2")
    x = codes.view(STORED[source])
    same(run(x, source, target), cast(x, source, target), target)


@pytest.mark.parametrize("target", [F16, BF16, FP8], ids=NAMES.get)
@pytest.mark.parametrize("source", [F32, F64], ids=NAMES.get)
def test_rounding_of_large_floats(run, source, target) -> None:
    random = np.random.default_rng(1)
    bits = random.integers(0, 256, 8 * 50_000, dtype=np.uint8)
    near = random.standard_normal(50_000) * np.exp2(random.integers(-30, 20, 50_000))
    # Half-way between two numbers of the target, where only ties-to-even is right.
    codes = np.arange(0x7E if target == FP8 else 0x7BFF if target == F16 else 0x7F00)
    grid = decode(codes, target) if target != F16 else codes.astype("u2").view("f2").astype(float)
    ties = (grid[1:] + grid[:-1]) / 2
    for values in (bits.view(NUMPY[source]), near, ties, -ties, np.array([448, 464, 465, 480, 65519, 65520, 3.4e38])):
        x = values.astype(NUMPY[source])
        same(run(x, source, target), cast(x, source, target), target)


@pytest.mark.parametrize("target", [F32, F16, BF16, I8, I32, U8, BOOL], ids=NAMES.get)
@pytest.mark.parametrize("source", [I64, U64, I32, U32], ids=NAMES.get)
def test_large_integers(run, source, target) -> None:
    x = np.random.default_rng(2).integers(0, 256, 8 * 20_000, dtype=np.uint8).view(NUMPY[source])
    same(run(x, source, target), cast(x, source, target), target)


LAYOUTS = {
    "contiguous": lambda x: x.reshape(5, 4, 3, 40),
    "transposed": lambda x: x.reshape(40, 60).T,
    "permuted, 8 dimensions": lambda x: x[:1440].reshape(2, 3, 2, 5, 2, 3, 2, 2).transpose(7, 0, 5, 2, 3, 6, 1, 4),
    "every third": lambda x: x[::3],
    "pitched": lambda x: x.reshape(20, 120)[:, :64],
    "pitched, odd width": lambda x: x.reshape(20, 120)[:, :63],
    "pitched, odd pitch": lambda x: x[:2379].reshape(39, 61)[:, :32],
    "odd start": lambda x: x[1:1025],
    "rows backwards": lambda x: x.reshape(20, 120)[::-1, :64],
    "backwards": lambda x: x[::-1],
    "expanded": lambda x: np.broadcast_to(x[:30, None], (30, 20)),
    "expanded in front": lambda x: np.broadcast_to(x[:32], (7, 32)),
    "one element": lambda x: np.broadcast_to(x[:1], (64,)),
    "0-d": lambda x: x[7:8].reshape(()),
    "dimensions of one": lambda x: x[:64].reshape(1, 8, 1, 8, 1),
    "empty": lambda x: x[:0].reshape(0, 7),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("source", "target"), [(k, k) for k in TARGETS] + [(U8, F32), (F32, BF16)], ids=NAMES.get)
def test_every_layout(run, source, target, layout) -> None:
    x = LAYOUTS[layout](store(quarters(2400), source))
    same(run(x, source, target), cast(x, source, target), target)


def test_committed_ptx_is_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", KERNELS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    try:
        nvrtc = generate.find_nvrtc()
    except generate.NvrtcMissingError as error:
        pytest.skip(str(error))
    assert generate.compile_ptx(nvrtc, generate.SOURCE.read_text()) == generate.PTX.read_text()


def test_ptx_is_what_jetpack_6_accepts() -> None:
    """PTX 8.2 is that of CUDA 12.2; a driver refuses newer PTX than its own."""
    text = (KERNELS / "copy_cast.ptx").read_text()
    assert ".version 8.2\n" in text
    assert ".target sm_70\n" in text
    assert ".entry jetrt_copy_cast(\n\t.param .align 8 .b8 jetrt_copy_cast_param_0[168]\n)" in text
    assert "call" not in text.split()  # no printf, no assert, no libdevice: nothing to link


# ---- many tensors at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 24])
def test_a_batch_copies_every_tensor(library, count):
    rng = np.random.default_rng(count)
    types = (U8, U16, U32, U64)
    whole = [rng.integers(0, 200, (4, 6 + k)).astype(NUMPY[types[k % 4]]) for k in range(count)]
    views = [[x, x.T, x[::2, 1:], x[:0], np.broadcast_to(x[:1], (5, x.shape[1]))][k % 5] for k, x in enumerate(whole)]
    outputs = [np.full(x.shape, 0xAB, x.dtype) for x in views]
    jobs = b"".join(
        packed(x, out, types[k % 4], types[k % 4]) for k, (x, out) in enumerate(zip(views, outputs, strict=True))
    )
    library.run_batch(ctypes.create_string_buffer(jobs, 24 * 168), count)
    for x, out in zip(views, outputs, strict=True):
        np.testing.assert_array_equal(out, x)
