/* cuda_bench.c: what benchmarks ask of the GPU: its read bandwidth, its peak rate, a kernel that only
 * takes time.
 *
 * The sweep reads what a decode step reads, all weights but those that are looked up and the KV of
 * so many tokens, front to back, one kernel a matrix: the floor that a step is compared with.
 *
 * Thread: engine. Memory: none but the word that keeps reads alive.
 */
#include <time.h>

#include "backend/cuda.h"

double cuda_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double cuda_read_sweep(backend *b, int64_t kv_tokens, int64_t *bytes) {
    struct cuda *cuda = cuda_of(b);
    const struct kernels_kv *kv = &cuda->kv;
    int64_t pages = (kv_tokens + KERNELS_PAGE_TOKENS - 1) / KERNELS_PAGE_TOKENS;
    if (!kv->data) pages = 0;
    if (pages > kv->page_count) pages = kv->page_count;
    cuda_wait(cuda);
    *bytes = 0;
    const double start = cuda_seconds();
    for (const struct matrix *m = cuda->matrices; m; m = m->next) {
        if (m->lookup_only) continue;
        const size_t n = kernels_matrix_bytes(&m->shape);
        cuda_must(kernels_sweep(cuda->stream, m->shape.data, n, cuda->sink), "read sweep");
        *bytes += (int64_t)n;
    }
    for (int layer = 0; layer < kv->layers && pages > 0; layer++) {
        struct kernels_kv part = *kv;
        part.layers = 1;
        const size_t layer_bytes = kernels_kv_bytes(&part);
        part.page_count = (int32_t)pages;
        const size_t n = kernels_kv_bytes(&part);
        cuda_must(kernels_sweep(cuda->stream, (char *)kv->data + (size_t)layer * layer_bytes, n,
                                cuda->sink),
                  "read sweep");
        *bytes += (int64_t)n;
    }
    cuda_wait(cuda);
    return cuda_seconds() - start;
}

double cuda_peak_flops(backend *b, double seconds) {
    enum { ROUNDS_MAX = 1 << 16 };
    struct cuda *cuda = cuda_of(b);
    double flops = 0.0, now;
    const double start = cuda_seconds();
    int64_t rounds = 1; /* longer and longer launches: the last ones count */
    do {
        double part = 0.0;
        cuda_must(kernels_peak(cuda->stream, rounds, (float *)cuda->sink, &part), "peak rate");
        cuda_wait(cuda);
        flops += part;
        if (rounds < ROUNDS_MAX) rounds *= 2;
        now = cuda_seconds();
    } while (now < start + seconds);
    return flops / (now - start);
}

void cuda_delay(backend *b, double us) {
    cuda_must(kernels_spin(cuda_of(b)->stream, (uint64_t)(1e3 * us)), "delay");
}
