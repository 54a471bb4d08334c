// What TensorRT itself costs per call: the vtable slots called from bare C, without a header and without jetrt.
// It is the floor that the Python paths are measured against.
//
//   cc -O2 -shared -fPIC -o libfloor.so floor.c -ldl     in process, for host_cost.py (ctypes)
//   cc -O2 -DFLOOR_MAIN -o floor floor.c -ldl            by itself: ./floor libnvinfer.so.10 model.engine
//
// TensorRT 10 on x86-64 or AArch64 only. Slots: abi/vtables.csv. Every call is timed by itself; a block of
// calls starts on a drained stream, so that a full launch queue is never mistaken for host cost.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MAX_IO = 64, SETS = 2 };

enum Mode {
    ENQUEUE = 0,            // enqueueV3 alone
    ADDRESSES = 1,          // every address, the same each time, then enqueueV3
    SHAPES = 2,             // every shape and address, the same each time, then enqueueV3
    GRAPH = 3,              // cuGraphLaunch of the same work, captured
    OTHER_ADDRESSES = 4,    // ADDRESSES, the buffers alternating between two sets
    OTHER_SHAPES = 5,       // SHAPES, shapes and buffers alternating between two sets
    MODES = 6,
};

// VRuntime, VCudaEngine, VExecutionContext, TensorRT 10.0-10.16.
enum {
    RUNTIME_DESERIALIZE = 3,
    ENGINE_CREATE_CONTEXT = 5, ENGINE_SHAPE = 19, ENGINE_DTYPE = 20, ENGINE_MODE = 23,
    ENGINE_PROFILE_SHAPE = 29, ENGINE_NB = 30, ENGINE_NAME = 31,
    CONTEXT_SET_SHAPE = 21, CONTEXT_SHAPE = 22, CONTEXT_SET_ADDRESS = 24, CONTEXT_ENQUEUE = 37,
    DELETING_DESTRUCTOR = 1,
};

typedef struct { int32_t nb; int64_t d[8]; } Dims;
typedef struct { void **vtable; void *impl; } Object;
typedef struct { void **vtable; } Impl;
#define SLOT(object, n) (((Impl *)((Object *)(object))->impl)->vtable[n])
#define IMPL(object) (((Object *)(object))->impl)

typedef struct {
    const char *name;
    int is_input;
    int bytes_per_element;
    Dims shape[SETS];
    uint64_t address[SETS];
} Io;

typedef struct {
    Object *runtime, *engine, *context;
    Io io[MAX_IO];
    int nb_io;
    int ready;
    void *stream;
    void *graph_exec;
    size_t graph_nodes;
    char error[512];
    char log[512];
} Floor;

// ---- the driver, by name -------------------------------------------------------------------------------------
#define DRIVER(X)                                                                                  \
    X(cuInit, (unsigned))                                                                          \
    X(cuDeviceGet, (int *, int))                                                                   \
    X(cuDevicePrimaryCtxRetain, (void **, int))                                                    \
    X(cuCtxSetCurrent, (void *))                                                                   \
    X(cuMemAlloc_v2, (uint64_t *, size_t))                                                         \
    X(cuMemFree_v2, (uint64_t))                                                                    \
    X(cuMemsetD8_v2, (uint64_t, unsigned char, size_t))                                            \
    X(cuStreamCreate, (void **, unsigned))                                                         \
    X(cuStreamDestroy_v2, (void *))                                                                \
    X(cuStreamSynchronize, (void *))                                                               \
    X(cuStreamBeginCapture_v2, (void *, int))                                                      \
    X(cuStreamEndCapture, (void *, void **))                                                       \
    X(cuGraphInstantiateWithFlags, (void **, void *, unsigned long long))                          \
    X(cuGraphGetNodes, (void *, void **, size_t *))                                                \
    X(cuGraphDestroy, (void *))                                                                    \
    X(cuGraphExecDestroy, (void *))                                                                \
    X(cuGraphLaunch, (void *, void *))
#define DECLARE(name, args) static int(*name) args;
DRIVER(DECLARE)

static int fail(Floor *f, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(f->error, sizeof f->error, format, args);
    va_end(args);
    return -1;
}

#define CU(call)                                                                             \
    do {                                                                                     \
        int code_ = (call);                                                                  \
        if (code_ != 0) return fail(f, "%s returned CUDA error %d", #call, code_);           \
    } while (0)

static int open_driver(Floor *f) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) return fail(f, "%s", dlerror());
#define RESOLVE(name, args) \
    if (!(name = (int(*) args)dlsym(library, #name))) return fail(f, "libcuda.so.1 has no " #name);
    DRIVER(RESOLVE)
    int device;
    void *context;
    CU(cuInit(0));
    CU(cuDeviceGet(&device, 0));
    CU(cuDevicePrimaryCtxRetain(&context, device));  // the one torch uses; never released
    CU(cuCtxSetCurrent(context));
    return 0;
}

// ---- ILogger of TensorRT 10: log, then two destructors; no type_info -------------------------------------------
static Floor *logging_for;
static void on_log(void *self, int32_t severity, const char *message) {
    (void)self;
    if (severity <= 1 && logging_for) snprintf(logging_for->log, sizeof logging_for->log, "%s", message);
}
static void on_destroy(void *self) { (void)self; }
static void *logger_table[] = {NULL, NULL, (void *)on_log, (void *)on_destroy, (void *)on_destroy};
static struct { void **vtable; } logger = {logger_table + 2};

static int size_of(int32_t dtype) {
    switch (dtype) {
        case 0: case 3: return 4;                  // f32, i32
        case 1: case 7: return 2;                  // f16, bf16
        case 8: return 8;                          // i64
        case 2: case 4: case 5: case 6: return 1;  // i8, bool, u8, fp8
        default: return 0;
    }
}

static int load(Floor *f, const char *nvinfer, const char *plan) {
    if (open_driver(f) != 0) return -1;
    void *library = dlopen(nvinfer, RTLD_NOW | RTLD_GLOBAL);
    if (!library) return fail(f, "%s", dlerror());
    int32_t (*major)(void) = (int32_t(*)(void))dlsym(library, "getInferLibMajorVersion");
    int32_t (*version)(void) = (int32_t(*)(void))dlsym(library, "getInferLibVersion");
    void *(*create)(void *, int32_t) = (void *(*)(void *, int32_t))dlsym(library, "createInferRuntime_INTERNAL");
    if (!major || !version || !create) return fail(f, "%s is no libnvinfer of TensorRT 10", nvinfer);
    if (major() != 10) return fail(f, "TensorRT %d: the slots here are those of 10", major());

    logging_for = f;
    f->runtime = create(&logger, version());
    if ((uintptr_t)f->runtime < 4096) return fail(f, "createInferRuntime failed: %s", f->log);

    int file = open(plan, O_RDONLY);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0) return fail(f, "cannot read %s", plan);
    void *blob = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (blob == MAP_FAILED) return fail(f, "cannot map %s", plan);
    f->engine = ((Object * (*)(void *, const void *, uint64_t)) SLOT(f->runtime, RUNTIME_DESERIALIZE))(
        IMPL(f->runtime), blob, (uint64_t)info.st_size);
    munmap(blob, (size_t)info.st_size);
    if ((uintptr_t)f->engine < 4096) return fail(f, "%s was not deserialised: %s", plan, f->log);

    void *engine = IMPL(f->engine);
    f->context = ((Object * (*)(void *, int32_t)) SLOT(f->engine, ENGINE_CREATE_CONTEXT))(engine, 0);
    if ((uintptr_t)f->context < 4096) return fail(f, "createExecutionContext failed: %s", f->log);

    f->nb_io = ((int32_t(*)(void *))SLOT(f->engine, ENGINE_NB))(engine);
    if (f->nb_io < 1 || f->nb_io > MAX_IO) return fail(f, "%d tensors", f->nb_io);
    for (int i = 0; i < f->nb_io; ++i) {
        Io *io = &f->io[i];
        io->name = ((const char *(*)(void *, int32_t))SLOT(f->engine, ENGINE_NAME))(engine, i);
        io->is_input = ((int32_t(*)(void *, const char *))SLOT(f->engine, ENGINE_MODE))(engine, io->name) == 1;
        io->bytes_per_element =
            size_of(((int32_t(*)(void *, const char *))SLOT(f->engine, ENGINE_DTYPE))(engine, io->name));
        if (!io->bytes_per_element) return fail(f, "%s has a type that is not known here", io->name);
        if (!io->is_input) continue;
        // First set: the profile's optimum. Second: half-way to its minimum, so that tensors that share a
        // dynamic dimension keep sharing it.
        Dims (*profile)(void *, const char *, int32_t, int32_t) =
            (Dims(*)(void *, const char *, int32_t, int32_t))SLOT(f->engine, ENGINE_PROFILE_SHAPE);
        Dims low = profile(engine, io->name, 0, 0);
        io->shape[0] = io->shape[1] = profile(engine, io->name, 0, 1);
        for (int k = 0; k < low.nb; ++k) io->shape[1].d[k] = (low.d[k] + io->shape[0].d[k]) / 2;
    }
    return 0;
}

static int bind_shapes(Floor *f, int set) {
    uint8_t (*set_shape)(void *, const char *, const Dims *) =
        (uint8_t(*)(void *, const char *, const Dims *))SLOT(f->context, CONTEXT_SET_SHAPE);
    for (int i = 0; i < f->nb_io; ++i) {
        if (f->io[i].is_input && !set_shape(IMPL(f->context), f->io[i].name, &f->io[i].shape[set])) {
            return fail(f, "setInputShape(%s) refused: %s", f->io[i].name, f->log);
        }
    }
    return 0;
}

static int bind_addresses(Floor *f, int set) {
    uint8_t (*set_address)(void *, const char *, uint64_t) =
        (uint8_t(*)(void *, const char *, uint64_t))SLOT(f->context, CONTEXT_SET_ADDRESS);
    for (int i = 0; i < f->nb_io; ++i) {
        if (!set_address(IMPL(f->context), f->io[i].name, f->io[i].address[set])) {
            return fail(f, "setTensorAddress(%s) refused: %s", f->io[i].name, f->log);
        }
    }
    return 0;
}

static int bind(Floor *f, int set) { return bind_shapes(f, set) != 0 ? -1 : bind_addresses(f, set); }

static int enqueue(Floor *f) {
    uint8_t (*call)(void *, void *) = (uint8_t(*)(void *, void *))SLOT(f->context, CONTEXT_ENQUEUE);
    return call(IMPL(f->context), f->stream) ? 0 : fail(f, "enqueueV3 failed: %s", f->log);
}

static int capture(Floor *f) {
    void *stream, *graph;
    void *caller = f->stream;
    CU(cuStreamCreate(&stream, 1));  // non-blocking; the legacy default stream cannot be captured
    f->stream = stream;
    int result = -1, code = cuStreamBeginCapture_v2(stream, 1);
    if (code == 0) {
        result = enqueue(f);
        code = cuStreamEndCapture(stream, &graph);
    }
    f->stream = caller;
    cuStreamDestroy_v2(stream);
    if (code != 0) return fail(f, "capture failed with CUDA error %d: %s", code, f->log);
    if (result == 0) {
        CU(cuGraphGetNodes(graph, NULL, &f->graph_nodes));
        CU(cuGraphInstantiateWithFlags(&f->graph_exec, graph, 0));
    }
    cuGraphDestroy(graph);
    return result;
}

// ---- what ctypes calls -------------------------------------------------------------------------------------------
void *floor_open(const char *nvinfer, const char *plan) {
    Floor *f = calloc(1, sizeof *f);
    if (f && load(f, nvinfer, plan) == 0) f->error[0] = 0;
    return f;
}

const char *floor_error(Floor *f) { return f->error; }
int64_t floor_graph_nodes(Floor *f) { return (int64_t)f->graph_nodes; }

// The shape of one input in set 0 or 1, in place of the profile's.
int floor_shape(Floor *f, const char *name, int set, int nb, const int64_t *dims) {
    for (int i = 0; i < f->nb_io; ++i) {
        if (!f->io[i].is_input || strcmp(f->io[i].name, name) != 0) continue;
        if (set < 0 || set >= SETS || nb != f->io[i].shape[set].nb) return fail(f, "%s: bad set or rank", name);
        memcpy(f->io[i].shape[set].d, dims, sizeof(int64_t) * (size_t)nb);
        return 0;
    }
    return fail(f, "no input %s", name);
}

// Allocates both sets of buffers, warms up and captures. `stream` is a CUstream; 0 is the legacy default stream.
int floor_prepare(Floor *f, uint64_t stream) {
    f->stream = (void *)(uintptr_t)stream;
    Dims (*shape_of)(void *, const char *) = (Dims(*)(void *, const char *))SLOT(f->context, CONTEXT_SHAPE);
    size_t bytes[MAX_IO] = {0};
    for (int set = 0; set < SETS; ++set) {
        if (bind_shapes(f, set) != 0) return -1;
        for (int i = 0; i < f->nb_io; ++i) {
            Dims shape = shape_of(IMPL(f->context), f->io[i].name);
            size_t n = (size_t)f->io[i].bytes_per_element;
            for (int k = 0; k < shape.nb; ++k) {
                if (shape.d[k] < 0) return fail(f, "%s has a shape that depends on the data", f->io[i].name);
                n *= (size_t)shape.d[k];
            }
            if (n > bytes[i]) bytes[i] = n;
        }
    }
    for (int set = 0; set < SETS; ++set) {
        for (int i = 0; i < f->nb_io; ++i) {
            CU(cuMemAlloc_v2(&f->io[i].address[set], bytes[i]));
            CU(cuMemsetD8_v2(f->io[i].address[set], 1, bytes[i]));  // a valid bool, small in every float type
        }
    }
    for (int set = SETS - 1; set >= 0; --set) {
        if (bind(f, set) != 0) return -1;
        for (int i = 0; i < 3; ++i) {
            if (enqueue(f) != 0) return -1;
        }
        CU(cuStreamSynchronize(f->stream));
    }
    if (capture(f) != 0) return -1;
    f->ready = 1;
    return 0;
}

// One enqueueV3 on a stream of the caller's, who may be capturing it.
int floor_enqueue(Floor *f, uint64_t stream) {
    void *own = f->stream;
    f->stream = (void *)(uintptr_t)stream;
    int result = bind(f, 0) != 0 ? -1 : enqueue(f);
    f->stream = own;
    return result;
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int call_once(Floor *f, int mode, int turn) {
    switch (mode) {
        case ENQUEUE: return enqueue(f);
        case ADDRESSES: return bind_addresses(f, 0) != 0 ? -1 : enqueue(f);
        case SHAPES: return bind(f, 0) != 0 ? -1 : enqueue(f);
        case GRAPH: {
            int code = cuGraphLaunch(f->graph_exec, f->stream);
            return code == 0 ? 0 : fail(f, "cuGraphLaunch returned CUDA error %d", code);
        }
        case OTHER_ADDRESSES: return bind_addresses(f, turn & 1) != 0 ? -1 : enqueue(f);
        case OTHER_SHAPES: return bind(f, turn & 1) != 0 ? -1 : enqueue(f);
        default: return fail(f, "mode %d is not known", mode);
    }
}

// A block of n timed calls, each in nanoseconds to out[]; three untimed ones first.
int floor_time(Floor *f, int mode, int n, uint64_t *out) {
    if (!f->ready) return fail(f, "floor_prepare comes first");
    if (bind(f, 0) != 0) return -1;  // what an earlier mode left behind
    for (int i = 0; i < 3; ++i) {
        if (call_once(f, mode, i) != 0) return -1;
    }
    CU(cuStreamSynchronize(f->stream));
    for (int i = 0; i < n; ++i) {
        uint64_t start = now();
        int result = call_once(f, mode, i);
        out[i] = now() - start;
        if (result != 0) return -1;
    }
    CU(cuStreamSynchronize(f->stream));
    return 0;
}

void floor_close(Floor *f) {
    if (f->stream || f->ready) cuStreamSynchronize(f->stream);
    if (f->graph_exec) cuGraphExecDestroy(f->graph_exec);
    Object *objects[] = {f->context, f->engine, f->runtime};
    for (int i = 0; i < 3; ++i) {
        if ((uintptr_t)objects[i] >= 4096) {
            ((void (*)(void *))objects[i]->vtable[DELETING_DESTRUCTOR])(objects[i]);
        }
    }
    for (int i = 0; i < f->nb_io; ++i) {
        for (int set = 0; set < SETS; ++set) {
            if (f->io[i].address[set] ) cuMemFree_v2(f->io[i].address[set]);
        }
    }
    if (logging_for == f) logging_for = NULL;
    free(f);
}

#ifdef FLOOR_MAIN
static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    static const char *names[MODES] = {"enqueue", "addresses + enqueue", "shapes + addresses + enqueue", "graph launch",
                                       "other addresses + enqueue", "other shapes + addresses + enqueue"};
    enum { BLOCK = 50 };
    if (argc < 3) {
        fprintf(stderr, "usage: %s LIBNVINFER PLAN [ROUNDS]\n", argv[0]);
        return 2;
    }
    int rounds = argc > 3 ? atoi(argv[3]) : 40;
    Floor *f = floor_open(argv[1], argv[2]);
    void *stream = NULL;
    if (f->error[0] || cuStreamCreate(&stream, 1) != 0 || floor_prepare(f, (uint64_t)(uintptr_t)stream) != 0) {
        fprintf(stderr, "%s\n", f->error);
        return 1;
    }
    size_t n = (size_t)rounds * BLOCK;
    uint64_t *samples = malloc(MODES * n * sizeof *samples);
    for (int round = 0; round < rounds; ++round) {
        for (int mode = 0; mode < MODES; ++mode) {
            if (floor_time(f, mode, BLOCK, samples + (size_t)mode * n + (size_t)round * BLOCK) != 0) {
                fprintf(stderr, "%s\n", f->error);
                return 1;
            }
        }
    }
    printf("{\"stream\": \"side\", \"samples\": %zu, \"graph_nodes\": %zu, \"host_ns\": {", n, f->graph_nodes);
    for (int mode = 0; mode < MODES; ++mode) {
        uint64_t *s = samples + (size_t)mode * n;
        qsort(s, n, sizeof *s, by_value);
        printf("%s\"%s\": {\"min\": %lu, \"median\": %lu, \"p99\": %lu}", mode ? ", " : "", names[mode],
               (unsigned long)s[0], (unsigned long)s[n / 2], (unsigned long)s[n * 99 / 100]);
    }
    printf("}}\n");
    floor_close(f);
    free(samples);
    return 0;
}
#endif
