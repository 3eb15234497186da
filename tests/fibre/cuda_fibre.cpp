/* cuda_fibre.cpp: see cuda_fibre.h. Fibres, their two kinds of barrier, shared memory.
 *
 * A barrier is a counter of arrivals and a generation. Who arrives last opens it; the others give
 * the CPU back until they see the generation change. The scheduler walks the fibres in order.
 */
#include "fibre/cuda_fibre.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <memory>
#include <vector>

#include "fibre/switch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define FIBRE_SANITIZED 1
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define FIBRE_THREAD_SANITIZED 1
#endif

__thread fibre_place fibre_here;
__thread unsigned char *fibre_shared;
extern "C" {
int (*fibre_record)(void *stream, void (*run)(void *), void (*drop)(void *), void *context);
}

namespace {

enum { WARP = 32, EXCHANGE_BYTES = 64, STACK_BYTES = 128 * 1024 };

struct barrier {
    int arrived = 0;
    uint64_t generation = 0;
};

struct warp {
    barrier meet;
    /* two buffers: a lane may write for the next exchange while another still reads this one */
    alignas(16) unsigned char packed[2][WARP * EXCHANGE_BYTES];
};

struct fibre {
    switch_context context;
    std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK_BYTES]};
    fibre_place place;
    bool done = false, waited = false; /* waited: for the kernel before */
    int exchanges = 0;
    void *fake_stack = nullptr;
#ifdef FIBRE_THREAD_SANITIZED
    void *thread = __tsan_create_fiber(0);
    ~fibre() { __tsan_destroy_fiber(thread); }
#endif
};

/* One device: the state of an OS thread. Stacks are kept from launch to launch. */
thread_local std::vector<std::unique_ptr<fibre>> fibres;
thread_local std::vector<warp> warps;
thread_local barrier block_barrier;
thread_local switch_context scheduler;
thread_local fibre *now;
thread_local int alive;
thread_local bool moved; /* somebody got past a barrier, polled or returned, in this round */
thread_local bool polled;
thread_local void (*touched)(const void *, bool);
thread_local fibre_body *body;
thread_local void *body_context;
#ifdef FIBRE_SANITIZED
thread_local const void *scheduler_stack;
thread_local size_t scheduler_stack_bytes;
thread_local void *scheduler_fake_stack;
#endif
#ifdef FIBRE_THREAD_SANITIZED
thread_local void *scheduler_thread;
#endif

void must(bool holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "fibre: block (%u, %u, %u), thread %u: %s\n", fibre_here.block.x,
            fibre_here.block.y, fibre_here.block.z, fibre_here.thread.x, what);
    abort();
}

void to_scheduler(bool last) {
#ifdef FIBRE_THREAD_SANITIZED
    __tsan_switch_to_fiber(scheduler_thread, 0);
#endif
#ifdef FIBRE_SANITIZED
    __sanitizer_start_switch_fiber(last ? nullptr : &now->fake_stack, scheduler_stack,
                                   scheduler_stack_bytes);
#endif
    fibre *const me = now;
    switch_to(&me->context, &scheduler);
    if (last) abort();
#ifdef FIBRE_SANITIZED
    __sanitizer_finish_switch_fiber(me->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void to_fibre(fibre *f) {
    now = f;
    fibre_here = f->place;
#ifdef FIBRE_SANITIZED
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, f->stack.get(), STACK_BYTES);
#endif
#ifdef FIBRE_THREAD_SANITIZED
    scheduler_thread = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(f->thread, 0);
#endif
    switch_to(&scheduler, &f->context);
#ifdef FIBRE_SANITIZED
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void fibre_main() {
#ifdef FIBRE_SANITIZED
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    body(body_context);
    must(now->waited, "a thread returns without after_previous()");
    now->done = true;
    moved = true;
    alive--;
    if (block_barrier.arrived > 0 &&
        block_barrier.arrived == alive) { /* the others waited for us */
        block_barrier.arrived = 0;
        block_barrier.generation++;
    }
    to_scheduler(true);
}

void wait(barrier *b, int expected) {
    must(now->waited, "threads meet before after_previous()");
    moved = true;
    if (++b->arrived == expected) {
        b->arrived = 0;
        b->generation++;
        return;
    }
    const uint64_t generation = b->generation;
    while (b->generation == generation) to_scheduler(false);
    moved = true;
}

void fibre_prepare(fibre *f, int i, dim3 block) {
    f->done = f->waited = false;
    f->exchanges = 0;
    f->fake_stack = nullptr;
    f->place = fibre_here;
    f->place.thread = dim3((unsigned)i % block.x, (unsigned)i / block.x % block.y,
                           (unsigned)i / block.x / block.y);
    switch_make(&f->context, f->stack.get(), STACK_BYTES, fibre_main);
}

void run_block(dim3 block, int threads) {
    alive = threads;
    block_barrier = barrier();
    for (warp &w : warps) w.meet = barrier();
    for (int i = 0; i < threads; i++) fibre_prepare(fibres[(size_t)i].get(), i, block);

    while (alive > 0) {
        moved = polled = false;
        for (int i = 0; i < threads; i++)
            if (!fibres[(size_t)i]->done) to_fibre(fibres[(size_t)i].get());
        if (polled) sched_yield();
        if (moved || alive == 0) continue;
        fprintf(stderr, "fibre: block (%u, %u, %u): a barrier that not all threads reach\n",
                fibre_here.block.x, fibre_here.block.y, fibre_here.block.z);
        abort();
    }
}

}  // namespace

void __syncthreads() { wait(&block_barrier, alive); }

void fibre_touch(const void *p, bool store) {
    if (touched) touched(p, store);
}

extern "C" void fibre_on_touch(void (*hook)(const void *p, bool store)) { touched = hook; }

uint64_t fibre_clock_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void fibre_spin() {
    moved = polled = true;
    to_scheduler(false);
}

void fibre_after_previous() {
    must(!now->waited, "after_previous() twice");
    now->waited = true;
}

void fibre_prefetch(const void *p, int64_t bytes) {
    const volatile unsigned char *at = static_cast<const unsigned char *>(p);
    must((uintptr_t)p % 16 == 0 && bytes % 16 == 0, "a prefetch that is not aligned");
    (void)at[0];
    (void)at[bytes - 1];
}

const unsigned char *fibre_exchange_bytes(const void *mine, size_t bytes) {
    const unsigned index = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    warp *w = &warps[index / WARP];
    const int buffer = now->exchanges++ % 2;
    memcpy(w->packed[buffer] + index % WARP * bytes, mine, bytes);
    wait(&w->meet, WARP);
    return w->packed[buffer];
}

const uint64_t *fibre_exchange(uint64_t mine) {
    return (const uint64_t *)(const void *)fibre_exchange_bytes(&mine, sizeof mine);
}

void fibre_run(dim3 grid, dim3 block, size_t shared_bytes, fibre_body *run, void *context) {
    const int threads = (int)(block.x * block.y * block.z);
    if (threads % WARP != 0 || threads > 1024 || block.x % WARP != 0) {
        fprintf(stderr, "fibre: a block of %d threads\n", threads);
        abort();
    }
    while ((int)fibres.size() < threads) fibres.emplace_back(new fibre);
    warps.resize((size_t)threads / WARP);
    body = run;
    body_context = context;
    fibre_here.block_size = block;
    fibre_here.grid = grid;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                unsigned char *shared =
                    (unsigned char *)aligned_alloc(16, (shared_bytes + 15) / 16 * 16 + 16);
                memset(shared, 0xff, shared_bytes);
                fibre_shared = shared;
                fibre_here.block = dim3(x, y, z);
                fibre_here.block_size = block;
                fibre_here.grid = grid;
                run_block(block, threads);
                free(shared);
            }
}
