/* The kernels of the stand-in torch: one function that works off one node. It runs when the stand-in driver gets to it, on whatever
 * thread that is and without Python's lock, which is why it is not written in Python. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DIMS = 10, MAX_INPUTS = 3 };
enum { F32, F64, F16, BF16, I8, I16, I32, I64, U8, BOOL, U16, U32, U64 };
enum { AS_FLOAT, AS_INT };
enum {
    COPY, ADD, SUB, MUL, DIV, FLOOR_DIVIDE, REMAINDER, POW, NEG, ABS, EXP, LOG, SQRT, RSQRT, SIN, COS, TANH, SIGMOID, ERF, FLOOR, CEIL,
    ROUND, EQ, NE, LT, LE, GT, GE, AND, OR, XOR, NOT, WHERE, MINIMUM, MAXIMUM, ISNAN, ISFINITE, ARANGE, GATHER,
    UNIFORM = 60, NORMAL, INTEGERS,
    SUM = 80, PROD, MIN, MAX, ANY, ALL, ARGMIN, ARGMAX, DOT, CUMSUM,
    SET_RNG = 100,
};

typedef struct {
    uint64_t ptr; /* 0: a number */
    int32_t dtype, pad;
    double f;
    int64_t i;
    int64_t strides[MAX_DIMS];
} Operand;

typedef struct {
    int32_t op, compute, ndim, outer, device, inputs;
    int32_t done, pad;
    int64_t dims[MAX_DIMS];
    Operand out, in[MAX_INPUTS];
    double f[2];
    int64_t i[4];
    uint64_t rng; /* where the seed and the offset are read when the kernel runs; 0: i[1] and i[2] */
    int (*reachable)(uint64_t address, uint64_t size, int device, const char *what);
    const char *name;
} Node;

typedef struct {
    double f;
    int64_t i;
} Value;

static int width(int dtype) {
    switch (dtype) {
    case F64: case I64: case U64: return 8;
    case F32: case I32: case U32: return 4;
    case F16: case BF16: case I16: case U16: return 2;
    default: return 1;
    }
}

static float from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint32_t to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static double half_to_double(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double value = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return h >> 15 ? -value : value;
}

static uint16_t double_to_half(double d) {
    float f = (float)d; /* as torch: by way of f32 */
    uint16_t sign = to_bits(f) >> 31 << 15;
    double a = fabs((double)f);
    if (isnan(f)) return sign | 0x7e00;
    if (a >= 65520) return sign | 0x7c00;
    if (a == 0) return sign;
    int e;
    frexp(a, &e);
    e = e - 1 < -14 ? -14 : e - 1;
    double units = nearbyint(ldexp(a, 10 - e)); /* even on ties; may carry into the exponent, which the sum below does right */
    return sign + (uint16_t)(((e + 14) << 10) + (int)units);
}

static uint16_t double_to_bfloat(double d) {
    uint32_t bits = to_bits((float)d);
    if (isnan((float)d)) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static Value load(const Operand *o, int64_t at) {
    Value v = {o->f, o->i};
    if (!o->ptr) return v;
    const char *p = (const char *)o->ptr + at * width(o->dtype);
#define INTEGER(type) { type x; memcpy(&x, p, sizeof x); v.i = (int64_t)x; v.f = (double)x; return v; }
    switch (o->dtype) {
    case F32: { float x; memcpy(&x, p, 4); v.f = x; break; }
    case F64: { double x; memcpy(&x, p, 8); v.f = x; break; }
    case F16: { uint16_t x; memcpy(&x, p, 2); v.f = half_to_double(x); break; }
    case BF16: { uint16_t x; memcpy(&x, p, 2); v.f = from_bits((uint32_t)x << 16); break; }
    case I8: INTEGER(int8_t)
    case I16: INTEGER(int16_t)
    case I32: INTEGER(int32_t)
    case I64: INTEGER(int64_t)
    case U8: INTEGER(uint8_t)
    case BOOL: { uint8_t x; memcpy(&x, p, 1); v.i = x != 0; v.f = x != 0; return v; }
    case U16: INTEGER(uint16_t)
    case U32: INTEGER(uint32_t)
    case U64: INTEGER(uint64_t)
    }
    v.i = v.f > -9.3e18 && v.f < 9.2e18 ? (int64_t)v.f : INT64_MIN;
    return v;
}

static void store(const Operand *o, int64_t at, Value v, int compute) {
    char *p = (char *)o->ptr + at * width(o->dtype);
    if (compute == AS_INT) v.f = (double)v.i;
    else v.i = v.f > -9.3e18 && v.f < 9.2e18 ? (int64_t)v.f : INT64_MIN;
    switch (o->dtype) {
    case F32: { float x = compute == AS_INT ? (float)v.i : (float)v.f; memcpy(p, &x, 4); break; }
    case F64: memcpy(p, &v.f, 8); break;
    case F16: { uint16_t x = double_to_half(v.f); memcpy(p, &x, 2); break; }
    case BF16: { uint16_t x = double_to_bfloat(v.f); memcpy(p, &x, 2); break; }
    case BOOL: *p = compute == AS_INT ? v.i != 0 : v.f != 0; break;
    default: memcpy(p, &v.i, width(o->dtype)); /* the low bytes; little endian */
    }
}

static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t random_bits(uint64_t seed, uint64_t offset, uint64_t index, uint64_t which) {
    return mix(mix(mix(seed) ^ (offset + 1) * 0xd1342543de82ef95u) ^ (index * 2 + which));
}

static double unit(uint64_t bits) { return (double)(bits >> 11) * 0x1p-53; }


static int64_t int_pow(int64_t base, int64_t n) {
    int64_t result = 1;
    for (; n > 0; n >>= 1, base *= base)
        if (n & 1) result *= base;
    return result;
}

#define BOTH(expression_f, expression_i) do { if (c == AS_FLOAT) { v.f = (expression_f); } else { v.i = (expression_i); } } while (0)
#define TRUTH(expression_f, expression_i) do { v.i = c == AS_FLOAT ? (expression_f) : (expression_i); v.f = (double)v.i; } while (0)

static Value elementwise(const Node *n, Value a, Value b, Value z) {
    int c = n->compute;
    Value v = a;
    switch (n->op) {
    case COPY: break;
    case ADD: BOTH(a.f + b.f, a.i + b.i); break;
    case SUB: BOTH(a.f - b.f, a.i - b.i); break;
    case MUL: BOTH(a.f * b.f, a.i * b.i); break;
    case DIV: v.f = a.f / b.f; break;
    case FLOOR_DIVIDE: BOTH(floor(a.f / b.f), b.i ? a.i / b.i - (a.i % b.i != 0 && (a.i < 0) != (b.i < 0)) : 0); break;
    case REMAINDER: BOTH(a.f - floor(a.f / b.f) * b.f, b.i ? (a.i % b.i + b.i) % b.i : 0); break;
    case POW: BOTH(pow(a.f, b.f), int_pow(a.i, b.i)); break;
    case NEG: BOTH(-a.f, -a.i); break;
    case ABS: BOTH(fabs(a.f), a.i < 0 ? -a.i : a.i); break;
    case EXP: v.f = exp(a.f); break;
    case LOG: v.f = log(a.f); break;
    case SQRT: v.f = sqrt(a.f); break;
    case RSQRT: v.f = 1 / sqrt(a.f); break;
    case SIN: v.f = sin(a.f); break;
    case COS: v.f = cos(a.f); break;
    case TANH: v.f = tanh(a.f); break;
    case SIGMOID: v.f = 1 / (1 + exp(-a.f)); break;
    case ERF: v.f = erf(a.f); break;
    case FLOOR: BOTH(floor(a.f), a.i); break;
    case CEIL: BOTH(ceil(a.f), a.i); break;
    case ROUND: BOTH(nearbyint(a.f), a.i); break;
    case EQ: TRUTH(a.f == b.f, a.i == b.i); break;
    case NE: TRUTH(a.f != b.f, a.i != b.i); break;
    case LT: TRUTH(a.f < b.f, a.i < b.i); break;
    case LE: TRUTH(a.f <= b.f, a.i <= b.i); break;
    case GT: TRUTH(a.f > b.f, a.i > b.i); break;
    case GE: TRUTH(a.f >= b.f, a.i >= b.i); break;
    case AND: v.i = a.i & b.i; break;
    case OR: v.i = a.i | b.i; break;
    case XOR: v.i = a.i ^ b.i; break;
    case NOT: v.i = n->out.dtype == BOOL ? !a.i : ~a.i; break;
    case WHERE: v = a.i ? b : z; break;
    case MINIMUM: BOTH(isnan(a.f) || a.f < b.f ? a.f : b.f, a.i < b.i ? a.i : b.i); break;
    case MAXIMUM: BOTH(isnan(a.f) || a.f > b.f ? a.f : b.f, a.i > b.i ? a.i : b.i); break;
    case ISNAN: TRUTH(isnan(a.f), 0); break;
    case ISFINITE: TRUTH(isfinite(a.f) != 0, 1); break;
    }
    return v;
}

static int64_t offset_of(const Node *n, const Operand *o, const int64_t *index) {
    int64_t at = 0;
    for (int d = 0; d < n->ndim; d++) at += index[d] * o->strides[d];
    return at;
}

/* Steps over the dimensions from `first` to `last`, the last one fastest; 0 when it is through. */
static int step(const Node *n, int64_t *index, int first, int last) {
    for (int d = last; d >= first; d--) {
        if (++index[d] < n->dims[d]) return 1;
        index[d] = 0;
    }
    return 0;
}

static int reach(const Node *n, const Operand *o, int64_t more) {
    if (!o->ptr || n->device < 0) return 1;
    int64_t low = 0, high = more;
    for (int d = 0; d < n->ndim; d++) {
        int64_t far = (n->dims[d] - 1) * o->strides[d];
        if (far < 0) low += far; else high += far;
    }
    int w = width(o->dtype);
    return n->reachable(o->ptr + low * w, (high - low + 1) * w, n->device, n->name);
}

static void reduce(const Node *n) {
    int64_t index[MAX_DIMS] = {0};
    do {
        Value best = {0, 0};
        int64_t count = 0, where = 0;
        int whole = n->compute == AS_INT;
        if (n->op == PROD || n->op == ALL) best = (Value){1, 1};
        do {
            Value a = load(&n->in[0], offset_of(n, &n->in[0], index));
            switch (n->op) {
            case SUM: case CUMSUM: best.f += a.f; best.i += a.i; break;
            case PROD: best.f *= a.f; best.i *= a.i; break;
            case ANY: best.i |= whole ? a.i != 0 : a.f != 0; best.f = best.i; break;
            case ALL: best.i &= whole ? a.i != 0 : a.f != 0; best.f = best.i; break;
            case DOT: {
                Value b = load(&n->in[1], offset_of(n, &n->in[1], index));
                best.f += a.f * b.f;
                best.i += a.i * b.i;
                break;
            }
            default: {
                int less = n->op == MIN || n->op == ARGMIN;
                int better = whole ? (less ? a.i < best.i : a.i > best.i) : isnan(a.f) || (!isnan(best.f) && (less ? a.f < best.f : a.f > best.f));
                if (count == 0 || better) { best = a; where = count; }
            }
            }
            count++;
            if (n->op == CUMSUM) store(&n->out, offset_of(n, &n->out, index), best, n->compute);
        } while (step(n, index, n->outer, n->ndim - 1));
        if (n->op == ARGMIN || n->op == ARGMAX) best = (Value){(double)where, where};
        if (n->op != CUMSUM) store(&n->out, offset_of(n, &n->out, index), best, n->compute);
    } while (step(n, index, 0, n->outer - 1));
}

/* 0, or the CUDA error that the device reports. */
int run_node(void *data) {
    Node *n = data;
    int64_t index[MAX_DIMS] = {0}, linear = 0;
    int result = 0;
    if (n->op == SET_RNG) {
        uint64_t values[2] = {(uint64_t)n->i[1], (uint64_t)n->i[2]};
        if (n->device >= 0 && !n->reachable(n->rng, sizeof values, n->device, n->name)) return 700;
        memcpy((void *)n->rng, values, sizeof values);
        n->done = 1;
        return 0;
    }
    int64_t more = n->op == GATHER ? (n->i[1] - 1) * n->i[0] : 0;
    if (!reach(n, &n->out, 0)) return 700;
    for (int k = 0; k < n->inputs; k++)
        if (!reach(n, &n->in[k], k == 0 ? more : 0)) return 700;
    if (n->op >= SUM) {
        reduce(n);
        n->done = 1;
        return 0;
    }
    uint64_t rng[2] = {(uint64_t)n->i[1], (uint64_t)n->i[2]};
    if (n->rng) memcpy(rng, (void *)n->rng, sizeof rng);
    rng[1] += n->i[0];
    do {
        int64_t to = offset_of(n, &n->out, index);
        Value v = {0, 0};
        int c = n->compute;
        if (n->op >= UNIFORM) {
            uint64_t one = random_bits(rng[0], rng[1], linear, 0), two = random_bits(rng[0], rng[1], linear, 1);
            if (n->op == UNIFORM) v.f = n->f[0] + (n->f[1] - n->f[0]) * (double)(one >> 40) * 0x1p-24;
            else if (n->op == NORMAL) v.f = n->f[0] + n->f[1] * sqrt(-2 * log(1 - unit(one))) * cos(6.283185307179586 * unit(two));
            else v.i = n->i[3] + (int64_t)(one % (uint64_t)n->f[0]);
        } else if (n->op == ARANGE) {
            v.f = n->f[0] + linear * n->f[1];
            v.i = n->i[0] + linear * n->i[1];
        } else if (n->op == GATHER) {
            int64_t k = load(&n->in[1], offset_of(n, &n->in[1], index)).i;
            if (k < 0) k += n->i[1];
            if (k < 0 || k >= n->i[1]) {
                result = 710; /* as the assertion of torch's kernel */
                break;
            }
            v = load(&n->in[0], offset_of(n, &n->in[0], index) + k * n->i[0]);
        } else {
            Value in[MAX_INPUTS] = {{0, 0}};
            for (int k = 0; k < n->inputs; k++) in[k] = load(&n->in[k], offset_of(n, &n->in[k], index));
            if (n->op == COPY && n->in[0].ptr && n->in[0].dtype == n->out.dtype) {
                int w = width(n->out.dtype);
                memmove((char *)n->out.ptr + to * w, (char *)n->in[0].ptr + offset_of(n, &n->in[0], index) * w, w);
                linear++;
                continue;
            }
            v = elementwise(n, in[0], in[1], in[2]);
        }
        store(&n->out, to, v, c);
        linear++;
    } while (step(n, index, 0, n->ndim - 1));
    n->done = 1;
    return result;
}

unsigned long node_size(void) { return sizeof(Node); }
