/* cpu.c: the CPU backend: choice of kernels, memory, benchmark helpers, and the table of verbs.
 *
 * The instruction set is chosen once, at open: the highest level that the CPU and the operating
 * system support (cpuid and xgetbv, by way of the compiler's run-time) and that the configuration
 * allows. The numeric class decides bits (cpu.md §3.2): DPBF16 exists on AVX512BF16 only, FMA
 * everywhere. Own C17 kernels, no BLAS, no OpenMP. Where things are: cpu.h.
 */
#include "backend/cpu.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static enum backend_isa isa_available(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return ISA_SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return ISA_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? ISA_AVX512BF16 : ISA_AVX512;
#else
    return ISA_SCALAR;
#endif
}

static enum backend_isa isa_choose(enum backend_isa highest) {
    const enum backend_isa available = isa_available();
    return highest == ISA_AUTO || highest > available ? available : highest;
}

static const struct cpu_kernels *kernels_of(enum backend_isa isa) {
    switch (isa) {
        case ISA_AVX2:
            return &cpu_kernels_avx2;
        case ISA_AVX512:
            return &cpu_kernels_avx512;
        case ISA_AVX512BF16:
            return &cpu_kernels_avx512bf16;
        default:
            return &cpu_kernels_scalar;
    }
}

enum backend_numerics cpu_numerics(const struct backend_config *config) {
    const bool possible = kernels_of(isa_choose(config->isa))->panel_dpbf16 != NULL;
    return possible && config->numerics != NUMERICS_FMA ? NUMERICS_DPBF16 : NUMERICS_FMA;
}

const char *backend_isa_name(enum backend_isa isa) {
    static const char *const names[] = {"auto", "scalar", "avx2", "avx512", "avx512bf16", "cuda"};
    return names[isa];
}

const char *backend_numerics_name(enum backend_numerics n) {
    static const char *const names[] = {"auto", "fma", "dpbf16", "cuda"};
    return names[n];
}

static void cpu_host_run(backend *b, cpu_task *run, void *context) {
    cpu_pool_run(cpu_of(b)->pool, run, context);
}

/* ---- memory ---- */

void *cpu_scratch(struct cpu *cpu, size_t bytes) {
    void *out = cpu_memory_take(&cpu->memory, bytes, "scratch");
    if (out) cpu->base.scratch_bytes += bytes;
    return out;
}

static void *cpu_alloc(backend *b, size_t bytes, const char *what) {
    void *out = cpu_memory_take(&cpu_of(b)->memory, bytes, what);
    if (out) b->scratch_bytes += bytes;
    return out;
}

static enum status cpu_write(backend *b, void *device, const void *host, size_t bytes) {
    (void)b;
    memcpy(device, host, bytes);
    return STATUS_OK;
}

static void cpu_copy(backend *b, void *to, const void *from, size_t bytes) {
    (void)b;
    memcpy(to, from, bytes);
}

/* ---- benchmarks ---- */

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct sweep_job {
    struct cpu *cpu;
    int64_t kv_pages;
    _Atomic uint64_t sum; /* keeps the reads alive */
};

/* Each thread the bytes a step makes it read, front to back. */
static void sweep_task(void *context, int thread) {
    struct sweep_job *job = context;
    const struct cpu *cpu = job->cpu;
    const struct cpu_kv *kv = &cpu->kv;
    const int threads = cpu->base.threads;
    uint64_t sum = 0;
    for (const struct matrix *m = cpu->matrices; m; m = m->next) {
        if (m->lookup_only) continue;
        const int64_t begin = cpu_range_begin(m->panel_count, thread, threads);
        const int64_t end = cpu_range_begin(m->panel_count, thread + 1, threads);
        sum += cpu->kernels->sweep(matrix_panel(m, begin), (size_t)(end - begin) * m->panel_bytes);
    }
    const int64_t blocks = job->kv_pages * kv->spec.kv_heads;
    const int64_t begin = cpu_range_begin(blocks, thread, threads);
    const int64_t end = cpu_range_begin(blocks, thread + 1, threads);
    for (int64_t l = 0; l < kv->spec.layers && blocks > 0; l++) {
        const int64_t first = l * kv->spec.page_count * kv->spec.kv_heads + begin;
        sum += cpu->kernels->sweep(kv->data + (size_t)first * kv->block_bytes,
                                   (size_t)(end - begin) * kv->block_bytes);
    }
    atomic_fetch_add(&job->sum, sum);
}

static double cpu_read_sweep(backend *b, int64_t kv_tokens, int64_t *bytes) {
    struct cpu *cpu = cpu_of(b);
    const struct cpu_kv *kv = &cpu->kv;
    struct sweep_job job = {.cpu = cpu};
    if (kv->data) job.kv_pages = (kv_tokens + KV_BLOCK_TOKENS - 1) / KV_BLOCK_TOKENS;
    if (job.kv_pages > kv->spec.page_count) job.kv_pages = kv->spec.page_count;
    *bytes = job.kv_pages * kv->spec.kv_heads * kv->spec.layers * (int64_t)kv->block_bytes;
    for (const struct matrix *m = cpu->matrices; m; m = m->next)
        if (!m->lookup_only) *bytes += m->panel_count * (int64_t)m->panel_bytes;
    const double start = seconds_now();
    cpu_pool_run(cpu->pool, sweep_task, &job);
    return seconds_now() - start;
}

struct peak_job {
    struct cpu *cpu;
    double until;
    double flops[CPU_THREADS_MAX];
};

static void peak_task(void *context, int thread) {
    struct peak_job *job = context;
    double flops = 0.0;
    do {
        flops += job->cpu->kernels->peak(job->cpu->base.numerics == NUMERICS_DPBF16, 20000);
    } while (seconds_now() < job->until);
    job->flops[thread] = flops;
}

static double cpu_peak_flops(backend *b, double seconds) {
    const double start = seconds_now();
    struct peak_job job = {.cpu = cpu_of(b), .until = start + seconds};
    cpu_pool_run(job.cpu->pool, peak_task, &job);
    const double elapsed = seconds_now() - start;
    double flops = 0.0;
    for (int t = 0; t < b->threads; t++) flops += job.flops[t];
    return flops / elapsed;
}

/* ---- open and close ---- */

static void cpu_close(backend *b) {
    struct cpu *cpu = cpu_of(b);
    cpu_pool_close(cpu->pool);
    cpu_memory_fini(&cpu->memory);
    free(cpu);
}

static const struct backend_ops cpu_ops;

enum status cpu_open(const struct backend_config *config, backend **out) {
    enum status status = STATUS_OK;
    if (config->numerics == NUMERICS_DPBF16 && cpu_numerics(config) != NUMERICS_DPBF16)
        return fail(
            STATUS_USAGE,
            "numerics dpbf16 needs the AVX512-BF16 instructions, which this CPU or --isa does not "
            "offer: use --numerics fma");
    struct cpu *cpu = calloc(1, sizeof *cpu);
    if (!cpu) return fail(STATUS_MEMORY, "no memory for the CPU backend");
    cpu->base.ops = &cpu_ops;
    cpu->base.numerics = cpu_numerics(config);
    cpu->kernels = kernels_of(isa_choose(config->isa));
    cpu->base.isa = cpu->kernels->isa;
    cpu->rows_max =
        config->rows_max > config->logit_rows_max ? config->rows_max : config->logit_rows_max;
    cpu->probes_max = config->probes_max;
    TRY_GOTO(cpu_pool_open(config->threads, config->local_rank, config->local_ranks, &cpu->pool),
             out);
    cpu->base.threads = cpu->base.host_threads = cpu_pool_threads(cpu->pool);
    TRY_GOTO(cpu_candidates_init(cpu), out);
    *out = &cpu->base;
    return STATUS_OK;
out:
    cpu_close(&cpu->base);
    return status;
}

static const struct backend_pack cpu_pack = {.share = cpu_matrix_share, .rows = cpu_matrix_pack};

static const struct backend_ops cpu_ops = {
    .name = "cpu",
    .close = cpu_close,
    .alloc = cpu_alloc,
    .write = cpu_write,
    .read = cpu_copy,
    .copy = cpu_copy,
    .matrix_new = cpu_matrix_new,
    .matrix_load = cpu_matrix_load,
    .pack = &cpu_pack,
    .host_run = cpu_host_run,
    .kv_new = cpu_kv_new,
    .kv_take = cpu_kv_take,
    .embed_mix = cpu_embed_mix,
    .add_norm = cpu_add_norm,
    .add_norm_rows = cpu_add_norm_rows,
    .qkv = cpu_qkv,
    .attention = cpu_attention,
    .row_matmul = cpu_row_matmul,
    .gate_up = cpu_gate_up,
    .logits = cpu_logits,
    .candidates = cpu_candidates,
    .probe_logits = cpu_probe_logits,
    .read_sweep = cpu_read_sweep,
    .peak_flops = cpu_peak_flops,
};
