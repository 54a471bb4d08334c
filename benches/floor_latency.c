// floor.c, and what a whole call costs: enqueued, waited for, and timed by CUDA events, without Python and without jetrt.
// It is the floor that `jetrt bench --data device` is measured against (bench_agreement.py).
//
//   cc -O2 -shared -fPIC -o libfloor.so floor_latency.c -ldl

#include "floor.c"

static int (*cuEventCreate)(void **, unsigned);
static int (*cuEventRecord)(void *, void *);
static int (*cuEventElapsedTime)(float *, void *, void *);
static int (*cuEventDestroy_v2)(void *);

static int open_events(Floor *f) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) return fail(f, "%s", dlerror());
    cuEventCreate = (int (*)(void **, unsigned))dlsym(library, "cuEventCreate");
    cuEventRecord = (int (*)(void *, void *))dlsym(library, "cuEventRecord");
    cuEventElapsedTime = (int (*)(float *, void *, void *))dlsym(library, "cuEventElapsedTime");
    cuEventDestroy_v2 = (int (*)(void *))dlsym(library, "cuEventDestroy_v2");
    if (!cuEventCreate || !cuEventRecord || !cuEventElapsedTime || !cuEventDestroy_v2) {
        return fail(f, "libcuda.so.1 has no events");
    }
    return 0;
}

// n calls of a mode, one after the other: nanoseconds from before the call until it was waited for, until it returned
// (enqueue), and between the events about it (gpu). Five untimed ones first.
int floor_latency(Floor *f, int mode, int n, uint64_t *done, uint64_t *enqueue, double *gpu) {
    if (!f->ready) return fail(f, "floor_prepare comes first");
    if (open_events(f) != 0 || bind(f, 0) != 0) return -1;
    void *start = NULL, *end = NULL;
    CU(cuEventCreate(&start, 0));
    CU(cuEventCreate(&end, 0));
    for (int i = -5; i < n; ++i) {
        uint64_t begin = now();
        CU(cuEventRecord(start, f->stream));
        uint64_t called = now();
        if (call_once(f, mode, 0) != 0) return -1;
        uint64_t returned = now();
        CU(cuEventRecord(end, f->stream));
        CU(cuStreamSynchronize(f->stream));
        uint64_t over = now();
        if (i < 0) continue;
        float ms = 0;
        CU(cuEventElapsedTime(&ms, start, end));
        done[i] = over - begin;
        enqueue[i] = returned - called;
        gpu[i] = ms * 1e6;
    }
    CU(cuEventDestroy_v2(start));
    CU(cuEventDestroy_v2(end));
    return 0;
}
