// Counts the calls of CUDA's driver by name, whoever makes them: torch, TensorRT or jetrt, by the runtime or directly.
// CUPTI's callbacks tell; counting.py compiles this and loads it. Nothing of CUPTI's headers is needed.
//
//   cc -O2 -shared -fPIC -o libdriver_calls.so driver_calls.c -ldl

#include <dlfcn.h>
#include <stdint.h>

enum { DRIVER_API = 1, ENTER = 0, FUNCTIONS = 4096 };

typedef struct {            // the beginning of CUpti_CallbackData
    int site;
    const char *function;   // lives as long as the library
} Call;

typedef int Subscribe(void **subscriber, void (*callback)(void *, int, uint32_t, const Call *), void *user);
typedef int EnableDomain(uint32_t enable, void *subscriber, int domain);
typedef int Unsubscribe(void *subscriber);

static void *subscriber;
static EnableDomain *enable_domain;
static Unsubscribe *unsubscribe;
static uint64_t counts[FUNCTIONS];
static const char *names[FUNCTIONS];

static void on_call(void *user, int domain, uint32_t id, const Call *call) {
    (void)user;
    if (domain == DRIVER_API && call->site == ENTER && id < FUNCTIONS) {
        __atomic_store_n(&names[id], call->function, __ATOMIC_RELAXED);
        __atomic_fetch_add(&counts[id], 1, __ATOMIC_RELAXED);
    }
}

// 0, or CUPTI's error code; -1: no such library, -2: it lacks a function.
int driver_calls_open(const char *cupti) {
    void *library = dlopen(cupti, RTLD_NOW);
    if (!library) return -1;
    Subscribe *subscribe = (Subscribe *)dlsym(library, "cuptiSubscribe");
    enable_domain = (EnableDomain *)dlsym(library, "cuptiEnableDomain");
    unsubscribe = (Unsubscribe *)dlsym(library, "cuptiUnsubscribe");
    if (!subscribe || !enable_domain || !unsubscribe) return -2;
    return subscribe(&subscriber, on_call, 0);
}

int driver_calls_start(void) {
    for (int i = 0; i < FUNCTIONS; i++) __atomic_store_n(&counts[i], 0, __ATOMIC_RELAXED);
    return enable_domain(1, subscriber, DRIVER_API);
}

int driver_calls_stop(void) { return enable_domain(0, subscriber, DRIVER_API); }

// How often the function of this number was called since the start; its name, or null where it never was.
uint64_t driver_calls_count(uint32_t id, const char **name) {
    if (id >= FUNCTIONS) return 0;
    *name = names[id];
    return __atomic_load_n(&counts[id], __ATOMIC_RELAXED);
}

uint32_t driver_calls_functions(void) { return FUNCTIONS; }

int driver_calls_close(void) { return unsubscribe(subscriber); }
