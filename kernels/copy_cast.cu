// Gathers a strided tensor into a contiguous one, casting on the way: the kernel behind
// `on_strided="copy"` and `on_dtype="cast"`, and, as a batch, behind the buffers of `jetrt.graph`.
//
// Compiled ahead of time to PTX by generate.py; the PTX is committed and embedded in the extension.
// Semantics of the cast are those of torch's `.to()` on CUDA: float to integer truncates towards
// zero (u8 by way of i64), anything to bool is `x != 0`, narrowing floats round to nearest even, and
// f64 reaches f16, bf16 and fp8 by way of f32. Out-of-range float to integer is as undefined here as it is there.
//
// No CUDA header is included: NVRTC then needs nothing but itself.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;

// TensorRT's DataType codes; from 100 on our own, as sources only.
enum Type : i32 {
    F32 = 0, F16 = 1, I8 = 2, I32 = 3, BOOL = 4, U8 = 5, FP8 = 6, BF16 = 7, I64 = 8,
    F64 = 100, I16 = 101, U16 = 102, U32 = 103, U64 = 104,
};

struct CopyCast {
    u64 dst;         // contiguous, row-major, n elements of dst_type
    u64 src;         // address of logical element 0
    u64 n;           // product of dims
    i64 dims[8];
    i64 strides[8];  // of src, in elements; zero and negative allowed
    i32 ndim;
    i32 src_type;
    i32 dst_type;
    i32 pad;
};
static_assert(sizeof(CopyCast) == 168, "the host packs this struct by hand");

// Several plain copies (source and target of one type) in one launch: block row y works on job y. As many as a kernel's
// 4096 bytes of parameters hold.
struct Batch { CopyCast jobs[24]; };
static_assert(sizeof(Batch) <= 4096, "more needs a driver of CUDA 12.1 and sm_70");

// A 16-byte element, for copies wide enough to use it.
struct alignas(16) Wide { u64 lo, hi; };

// A loaded element. Integers are widened to 64 bits, small floats to f32; f64 stays.
struct Value {
    enum Kind { INT, UINT, FLOAT, DOUBLE } kind;
    i64 i;
    float f;
    double d;
};

// What the block works on: the job with mergeable dimensions merged, and for plain copies the widest
// element that dimensions, strides and both addresses allow.
struct Job {
    i64 dims[8];
    i64 strides[8];
    u64 n;
    i32 ndim;
    i32 width;  // bytes of an element when this is a plain copy, 0 when it casts
};

__device__ __forceinline__ i32 size_of(i32 type) {
    switch (type) {
        case I64: case F64: case U64: return 8;
        case F32: case I32: case U32: return 4;
        case F16: case BF16: case I16: case U16: return 2;
        default: return 1;
    }
}

__device__ __forceinline__ float bits_to_float(u32 b) { return __int_as_float((i32)b); }
__device__ __forceinline__ u32 float_to_bits(float f) { return (u32)__float_as_int(f); }

#ifndef JETRT_ON_HOST  // tests/test_kernel_semantics.py compiles this file for the CPU, with these two of its own
__device__ __forceinline__ float f16_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ u16 float_to_f16(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
#endif

// The bf16 conversions of PTX need sm_80; the arithmetic is exact and runs everywhere.
__device__ __forceinline__ u16 float_to_bf16(float f) {
    u32 b = float_to_bits(f);
    if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // a NaN must not round up to infinity
    return (u16)((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
}

// fp8 is E4M3FN: bias 7, three bits of mantissa, no infinity, 0x7f is NaN.
__device__ __forceinline__ float fp8_to_float(u8 v) {
    u32 sign = (u32)(v & 0x80) << 24;
    u32 rest = v & 0x7f;
    if (rest == 0x7f) return bits_to_float(sign | 0x7fc00000u);
    if (rest < 8) {  // subnormal: rest * 2^-9, exact in f32
        return bits_to_float(sign | float_to_bits((float)rest * 0.001953125f));
    }
    return bits_to_float(sign | ((rest << 20) + (120u << 23)));
}

__device__ __forceinline__ u8 float_to_fp8(float f) {
    u32 b = float_to_bits(f);
    u8 sign = (u8)((b >> 24) & 0x80);
    b &= 0x7fffffffu;
    if (b >= (1087u << 20)) return sign | 0x7f;  // 480 and above, infinity and NaN: NaN, as torch has it
    if (b < (121u << 23)) {                      // below 2^-6: let the adder of the FPU round to 2^-9
        return sign | (u8)(float_to_bits(bits_to_float(b) + 16384.0f) - float_to_bits(16384.0f));
    }
    b += ((u32)(7 - 127) << 23) + 0x7ffffu + ((b >> 20) & 1);
    return sign | (u8)(b >> 20);
}

__device__ __forceinline__ Value load(u64 src, i64 at, i32 type) {
    Value v;
    v.kind = Value::INT;
    v.i = 0;
    v.f = 0.0f;
    v.d = 0.0;
    switch (type) {
        case F32: v.kind = Value::FLOAT; v.f = ((const float*)src)[at]; break;
        case F16: v.kind = Value::FLOAT; v.f = f16_to_float(((const u16*)src)[at]); break;
        case BF16: v.kind = Value::FLOAT; v.f = bits_to_float((u32)((const u16*)src)[at] << 16); break;
        case FP8: v.kind = Value::FLOAT; v.f = fp8_to_float(((const u8*)src)[at]); break;
        case F64: v.kind = Value::DOUBLE; v.d = ((const double*)src)[at]; break;
        case I8: v.i = ((const i8*)src)[at]; break;
        case I16: v.i = ((const i16*)src)[at]; break;
        case I32: v.i = ((const i32*)src)[at]; break;
        case I64: v.i = ((const i64*)src)[at]; break;
        case BOOL: v.i = ((const u8*)src)[at] != 0; break;
        case U8: v.i = ((const u8*)src)[at]; break;
        case U16: v.i = ((const u16*)src)[at]; break;
        case U32: v.i = ((const u32*)src)[at]; break;
        case U64: v.kind = Value::UINT; v.i = (i64)((const u64*)src)[at]; break;
    }
    return v;
}

__device__ __forceinline__ float as_float(const Value& v) {
    switch (v.kind) {
        case Value::FLOAT: return v.f;
        case Value::DOUBLE: return (float)v.d;
        case Value::UINT: return (float)(u64)v.i;
        default: return (float)v.i;
    }
}

template <class T>
__device__ __forceinline__ T as_int(const Value& v) {
    switch (v.kind) {
        case Value::FLOAT: return (T)v.f;
        case Value::DOUBLE: return (T)v.d;
        default: return (T)v.i;
    }
}

__device__ __forceinline__ bool as_bool(const Value& v) {
    switch (v.kind) {
        case Value::FLOAT: return v.f != 0.0f;
        case Value::DOUBLE: return v.d != 0.0;
        default: return v.i != 0;
    }
}

__device__ __forceinline__ void store(u64 dst, u64 at, i32 type, const Value& v) {
    switch (type) {
        case F32: ((float*)dst)[at] = as_float(v); break;
        case F16: ((u16*)dst)[at] = float_to_f16(as_float(v)); break;
        case BF16: ((u16*)dst)[at] = float_to_bf16(as_float(v)); break;
        case FP8: ((u8*)dst)[at] = float_to_fp8(as_float(v)); break;
        case I8: ((i8*)dst)[at] = as_int<i8>(v); break;
        case I32: ((i32*)dst)[at] = as_int<i32>(v); break;
        case I64: ((i64*)dst)[at] = as_int<i64>(v); break;
        case BOOL: ((u8*)dst)[at] = as_bool(v); break;
        case U8: ((u8*)dst)[at] = (u8)as_int<i64>(v); break;
    }
}

__device__ void simplify(const CopyCast& p, Job& job) {
    // Drop dimensions of one, and merge a dimension into the one after it where a single stride spans both.
    i32 nd = 0;
    for (i32 k = 0; k < p.ndim; ++k) {
        i64 dim = p.dims[k], stride = p.strides[k];
        if (dim == 1) continue;
        if (nd > 0 && job.strides[nd - 1] == stride * dim) {
            job.dims[nd - 1] *= dim;
            job.strides[nd - 1] = stride;
        } else {
            job.dims[nd] = dim;
            job.strides[nd] = stride;
            ++nd;
        }
    }
    job.ndim = nd;
    job.n = p.n;
    job.width = 0;
    if (p.src_type != p.dst_type) return;

    i32 width = size_of(p.src_type);
    while (width < 16 && nd > 0 && job.strides[nd - 1] == 1 && job.dims[nd - 1] % 2 == 0 &&
           (p.src | p.dst) % (u64)(2 * width) == 0) {
        bool even = true;
        for (i32 k = 0; k < nd - 1; ++k) even = even && job.strides[k] % 2 == 0;
        if (!even) break;
        for (i32 k = 0; k < nd - 1; ++k) job.strides[k] /= 2;
        job.dims[nd - 1] /= 2;
        job.n /= 2;
        width *= 2;
    }
    job.width = width;
}

// Offset of logical element i. Index is u32 where it can be: a 64-bit division costs several times as much.
template <class Index>
__device__ __forceinline__ i64 offset_of(const Job& job, u64 i) {
    i64 at = 0;
    Index rest = (Index)i;
    for (i32 k = job.ndim - 1; k > 0; --k) {
        Index dim = (Index)job.dims[k];
        Index next = rest / dim;
        at += (i64)(rest - next * dim) * job.strides[k];
        rest = next;
    }
    return job.ndim > 0 ? at + (i64)rest * job.strides[0] : 0;
}

template <class Index, bool CASTS>
__device__ __forceinline__ void run(const CopyCast& p, const Job& job) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < job.n; i += step) {
        i64 at = offset_of<Index>(job, i);
        switch (job.width) {
            case 0:
                if (CASTS) store(p.dst, i, p.dst_type, load(p.src, at, p.src_type));
                break;
            case 1: ((u8*)p.dst)[i] = ((const u8*)p.src)[at]; break;
            case 2: ((u16*)p.dst)[i] = ((const u16*)p.src)[at]; break;
            case 4: ((u32*)p.dst)[i] = ((const u32*)p.src)[at]; break;
            case 8: ((u64*)p.dst)[i] = ((const u64*)p.src)[at]; break;
            case 16: ((Wide*)p.dst)[i] = ((const Wide*)p.src)[at]; break;
        }
    }
}

template <bool CASTS>
__device__ __forceinline__ void run_job(const CopyCast& p, Job& job) {
    if (threadIdx.x == 0) simplify(p, job);
    __syncthreads();
    if (job.n >> 32) {
        run<u64, CASTS>(p, job);
    } else {
        run<u32, CASTS>(p, job);
    }
}

extern "C" __global__ void __launch_bounds__(256) jetrt_copy_cast(const __grid_constant__ CopyCast p) {
    __shared__ Job job;
    run_job<true>(p, job);
}

extern "C" __global__ void __launch_bounds__(256) jetrt_copy_batch(const __grid_constant__ Batch p) {
    __shared__ Job job;
    const CopyCast& one = p.jobs[blockIdx.y];
    // The grid is as wide as the largest job needs.
    if ((u64)blockIdx.x * blockDim.x >= one.n) return;
    run_job<false>(one, job);
}
