/* gpu.c: `bench_gpu`, what gpu.md §14 wants measured first on a device, kernel by kernel.
 *
 *   read       read-only bandwidth: what everything below is compared with
 *   edge       microseconds from one kernel of a graph to the next, with and without overlap
 *              (programmatic dependent launch): of empty kernels, and of kernels that read 8 MB
 *   prefetch   how much of 10, 20, 30, 40 MB asked for by a prefetch is then read faster than from memory
 *   product    the four products of a layer at 1..512 rows, own kernels and cuBLASLt
 *   attention  decode at 1 and 64 sequences of 4k and 16k tokens
 *
 * Everything is captured into graphs of many launches, each launch on other memory than the one
 * before, so that neither the host's launches nor L2 are what is measured; the best of five is
 * reported. Weights and keys are zeros: enough for kernels that wait for memory, a little kind to
 * those that compute. `--small`: sizes for a test of this program. One line a figure, with --json one
 * line of JSON at the end. Exit status 2: no GPU.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/backend.h"
#include "base/json.h"
#include "kernels/kernels.h"

enum { LAUNCHES = 5, EDGES = 200, FLUSH_MB = 200, SWEEP_MB = 8, BATCH_ROWS = 512 };

struct bench {
    cudaStream_t stream;
    char *memory;
    size_t bytes;
    uint32_t *sink;
    double read_gbs;
    bool small;
    struct json_writer json;
};

static void must(int error, const char *what) {
    if (error == 0) return;
    fprintf(stderr, "bench_gpu: %s: %s\n", what, kernels_error_text(error));
    exit(1);
}
static void agreed(enum status status) {
    if (status == STATUS_OK) return;
    fprintf(stderr, "bench_gpu: %s\n", fail_text());
    exit(1);
}

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Microseconds of work(context, 0), ..., (context, calls - 1) as one graph: the best of LAUNCHES. */
static double graph_us(cudaStream_t stream, int calls, void (*work)(void *context, int call),
                       void *context) {
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    double best = 1e30;
    work(context, 0); /* eagerly once: what a first call loads must not be captured */
    must(kernels_wait(stream), "a first call");
    must((int)cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < calls; i++) work(context, i);
    must((int)cudaStreamEndCapture(stream, &graph), "capture");
    must((int)cudaGraphInstantiate(&ready, graph, 0), "graph");
    for (int i = 0; i <= LAUNCHES; i++) {
        const double begin = seconds_now();
        must((int)cudaGraphLaunch(ready, stream), "graph");
        must(kernels_wait(stream), "graph");
        const double seconds = seconds_now() - begin;
        if (i > 0 && seconds < best) best = seconds;
    }
    must((int)cudaGraphExecDestroy(ready), "graph");
    must((int)cudaGraphDestroy(graph), "graph");
    return 1e6 * best;
}

/* One figure: to the terminal and to the JSON array of its kind. */
static void figure(struct bench *b, const char *name, double value, const char *unit) {
    printf("  %-44s %10.3f %s\n", name, value, unit);
    fflush(stdout);
    json_begin(&b->json, '{');
    json_key(&b->json, "name");
    json_write_text(&b->json, name);
    json_key(&b->json, "value");
    json_write_real(&b->json, value);
    json_key(&b->json, "unit");
    json_write_text(&b->json, unit);
    json_end(&b->json, '}');
}

/* ---- reading, edges, prefetch ---- */

struct sweeps {
    struct bench *b;
    size_t bytes; /* of each */
    size_t flush, prefetch, read;
};

static void sweep_next(void *context, int call) {
    struct sweeps *s = context;
    const size_t places = s->b->bytes / s->bytes;
    must(kernels_sweep(s->b->stream, s->b->memory + (size_t)call % places * s->bytes, s->bytes,
                       s->b->sink),
         "sweep");
}
static void nothing(void *context, int call) {
    struct sweeps *s = context;
    (void)call;
    must(kernels_spin(s->b->stream, 0), "an empty kernel");
}
/* Something else into L2, then a prefetch and the reading of what was prefetched: either may be absent. */
static void flush_prefetch_read(void *context, int call) {
    struct sweeps *s = context;
    struct bench *b = s->b;
    (void)call;
    must(kernels_sweep(b->stream, b->memory + s->prefetch + s->read, s->flush, b->sink), "flush");
    must(kernels_prefetch(b->stream, b->memory, s->prefetch), "prefetch");
    must(kernels_sweep(b->stream, b->memory, s->read, b->sink), "sweep");
}

static void measure_read(struct bench *b) {
    struct sweeps all = {.b = b, .bytes = b->bytes};
    b->read_gbs = 1e-3 * (double)b->bytes / graph_us(b->stream, 1, sweep_next, &all);
    figure(b, "read-only bandwidth", b->read_gbs, "GB/s");
}

static void measure_edges(struct bench *b) {
    struct sweeps s = {.b = b, .bytes = (size_t)SWEEP_MB << 20};
    const int edges = b->small ? 4 : EDGES;
    if (b->small) s.bytes = 1 << 16;
    const double read_us = 1e-3 * (double)s.bytes / b->read_gbs;
    for (int overlap = 0; overlap < 2; overlap++) {
        if (kernels_overlap_launches(overlap) != overlap) continue; /* too old a device */
        const char *names[2][2] = {
            {"empty kernels, one after the other", "empty kernels, overlapped"},
            {"8 MB kernels, one after the other, over reading",
             "8 MB kernels, overlapped, over reading"}};
        figure(b, names[0][overlap], graph_us(b->stream, edges, nothing, &s) / edges, "us");
        figure(b, names[1][overlap], graph_us(b->stream, edges, sweep_next, &s) / edges - read_us,
               "us");
    }
    kernels_overlap_launches(true);
}

static void measure_prefetch(struct bench *b) {
    struct sweeps s = {.b = b, .flush = (size_t)FLUSH_MB << 20};
    if (b->small) s.flush = 1 << 16;
    for (int mb = 10; mb <= 40; mb += 10) {
        const size_t bytes = (size_t)mb << (b->small ? 10 : 20);
        char name[64];
        double us[4]; /* flush; + read; + prefetch; + both */
        for (int i = 0; i < 4; i++) {
            s.prefetch = i & 2 ? bytes : 0;
            s.read = i & 1 ? bytes : 0;
            us[i] = graph_us(b->stream, 1, flush_prefetch_read, &s);
        }
        snprintf(name, sizeof name, "reading %d MB, from memory", mb);
        figure(b, name, us[1] - us[0], "us");
        snprintf(name, sizeof name, "reading %d MB, after a prefetch of them", mb);
        figure(b, name, us[3] - us[2], "us");
    }
}

/* ---- products ---- */

enum { COPIES_MAX = 64 };
struct products {
    backend *be;
    enum matrix_kind kind;
    matrix *copies[COPIES_MAX];
    int count, rows;
    void *in, *out;
};

static void multiply(void *context, int call) {
    const struct products *p = context;
    const struct backend_ops *ops = p->be->ops;
    const matrix *m = p->copies[call % p->count];
    if (p->kind == MATRIX_COLUMN) ops->logits(p->be, p->rows, m, p->in, p->out);
    if (p->kind == MATRIX_ROW) ops->row_matmul(p->be, p->rows, m, p->in, p->out);
    if (p->kind == MATRIX_GATE_UP) ops->gate_up(p->be, p->rows, m, p->in, p->out);
}

/* A layer's product on a backend of its own: copies enough to overflow L2, then every number of rows. */
static void measure_product(struct bench *b, const char *model, const char *name,
                            enum matrix_kind kind, int64_t rows, int64_t cols,
                            enum backend_gemm gemm) {
    const int64_t tall = kind == MATRIX_GATE_UP ? 2 * rows : rows;
    const int64_t slabs[2] = {0, cols};
    const struct backend_config config = {.local_ranks = 1,
                                          .rows_max = b->small ? 128 : BATCH_ROWS,
                                          .logit_rows_max = 1,
                                          .probes_max = 1,
                                          .gemm = gemm};
    const struct matrix_spec spec = {.kind = kind,
                                     .dtype = BACKEND_BF16,
                                     .rows = rows,
                                     .cols = cols,
                                     .slab_count = kind == MATRIX_ROW ? 1 : 0,
                                     .slab_begin = kind == MATRIX_ROW ? slabs : NULL};
    struct products p = {.kind = kind};
    if (cuda_open(&config, &p.be) != STATUS_OK) {
        printf("  %s %s: skipped: %s\n", model, name, fail_text());
        return;
    }
    const int64_t bytes = 2 * tall * cols, flush = (int64_t)FLUSH_MB << (b->small ? 0 : 20);
    p.count = (int)(flush / bytes + 2 < COPIES_MAX ? flush / bytes + 2 : COPIES_MAX);
    for (int i = 0; i < p.count; i++) agreed(p.be->ops->matrix_new(p.be, &spec, &p.copies[i]));
    p.in = p.be->ops->alloc(p.be, (size_t)(config.rows_max * cols) * 2, "inputs");
    p.out = p.be->ops->alloc(p.be, (size_t)(config.rows_max * rows) * 4, "outputs");
    if (!p.in || !p.out) agreed(STATUS_MEMORY);
    const struct kv_spec kv = {.layers = 1,
                               .heads = 1,
                               .kv_heads = 1,
                               .head_dim = 16,
                               .positions_max = 64,
                               .page_count = 1,
                               .dtype = BACKEND_BF16};
    if (p.be->ops->kv_new(p.be, &kv) != STATUS_OK) {
        printf("  %s %s: skipped: %s\n", model, name, fail_text());
        p.be->ops->close(p.be);
        return;
    }
    const int first = gemm == GEMM_LT ? 128 : 1;
    for (p.rows = first; p.rows <= config.rows_max; p.rows *= 2) {
        char label[96];
        const int calls = b->small ? 2 : 2 * p.count;
        const double us = graph_us(p.be->stream, calls, multiply, &p) / calls;
        const double read_us = 1e-3 * (double)bytes / b->read_gbs;
        const double tflops = 2e-6 * (double)tall * (double)cols * p.rows / us;
        snprintf(label, sizeof label, "%s %s%s, %d rows", model, name,
                 gemm == GEMM_LT ? " cublaslt" : "", p.rows);
        if (p.rows <= 64)
            figure(b, label, read_us / us, "of reading");
        else
            figure(b, label, tflops, "TFLOP/s");
    }
    p.be->ops->close(p.be);
}

static void measure_products(struct bench *b) {
    static const struct {
        const char *model, *name;
        enum matrix_kind kind;
        int64_t rows, cols;
    } shapes[] = {{"32b", "qkv", MATRIX_COLUMN, 7168, 5120},
                  {"32b", "o", MATRIX_ROW, 5120, 5120},
                  {"32b", "gate-up", MATRIX_GATE_UP, 27648, 5120},
                  {"32b", "down", MATRIX_ROW, 5120, 27648},
                  {"70b/8", "qkv", MATRIX_COLUMN, 1280, 8192},
                  {"70b/8", "o", MATRIX_ROW, 8192, 1024},
                  {"70b/8", "gate-up", MATRIX_GATE_UP, 3584, 8192},
                  {"70b/8", "down", MATRIX_ROW, 8192, 3584}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int gemm = GEMM_OWN; gemm <= GEMM_LT; gemm++) {
            if (b->small && i > 0) return;
            measure_product(b, shapes[i].model, shapes[i].name, shapes[i].kind,
                            b->small ? 64 : shapes[i].rows, b->small ? 48 : shapes[i].cols,
                            (enum backend_gemm)gemm);
        }
}

/* ---- attention ---- */

struct attending {
    struct bench *b;
    struct kernels_kv kv;
    struct kernels_attention spec;
    const struct kernels_row *rows;
    const int32_t *pages;
    float *q;
    uint16_t *o;
    void *workspace;
    size_t workspace_bytes;
    int count;
};

static void attend(void *context, int call) {
    struct attending *a = context;
    struct kernels_attention spec = a->spec;
    spec.layer = call % a->kv.layers;
    must(kernels_attention(a->b->stream, a->count, a->rows, a->pages, spec, a->kv, a->q, a->o,
                           a->workspace, a->workspace_bytes),
         "attention");
}

static void *room(size_t bytes) {
    void *p = NULL;
    must((int)cudaMalloc(&p, bytes), "memory");
    must((int)cudaMemset(p, 0, bytes), "memory");
    return p;
}

static void measure_attention(struct bench *b, int batch, int context, int heads, int kv_heads,
                              const char *name) {
    enum { HEAD_DIM = 128, BATCH_MAX = 64, TILES_MAX = 64 };
    const int pages = (context + KERNELS_PAGE_TOKENS - 1) / KERNELS_PAGE_TOKENS;
    const size_t layer_bytes =
        (size_t)batch * (size_t)pages * (size_t)kv_heads * 2 * KERNELS_PAGE_TOKENS * HEAD_DIM * 2;
    struct attending a = {.b = b, .count = batch};
    const int layers = (int)(((size_t)FLUSH_MB << 20) / layer_bytes) + 2;
    a.kv = (struct kernels_kv){.layers = b->small ? 2 : layers,
                               .page_count = batch * pages,
                               .kv_heads = kv_heads,
                               .head_dim = HEAD_DIM};
    struct kernels_row rows[BATCH_MAX];
    struct kernels_tile tiles[TILES_MAX];
    int32_t *list = calloc((size_t)(batch * pages), sizeof *list);
    if (!list) agreed(fail(STATUS_MEMORY, "no memory for a list of pages"));
    for (int i = 0; i < batch; i++) rows[i] = (struct kernels_row){context - 1, i * pages};
    /* pages of a sequence are scattered, as after some hours of service */
    for (int i = 0; i < batch * pages; i++)
        list[i] = (int32_t)((int64_t)i * 7919 % (batch * pages));
    for (int g = 0; g < kv_heads; g++)
        tiles[g] = (struct kernels_tile){g * (heads / kv_heads), heads / kv_heads, g};
    struct kernels_row *rows_on = room(sizeof rows);
    struct kernels_tile *tiles_on = room(sizeof tiles);
    int32_t *list_on = room(sizeof *list * (size_t)(batch * pages));
    must((int)cudaMemcpy(rows_on, rows, sizeof rows, cudaMemcpyHostToDevice), "rows");
    must((int)cudaMemcpy(tiles_on, tiles, sizeof tiles, cudaMemcpyHostToDevice), "tiles");
    must((int)cudaMemcpy(list_on, list, sizeof *list * (size_t)(batch * pages),
                         cudaMemcpyHostToDevice),
         "pages");
    a.spec = (struct kernels_attention){.heads = heads,
                                        .tile_count = kv_heads,
                                        .tile_heads_max = heads / kv_heads,
                                        .tiles = tiles_on,
                                        .context_max = context,
                                        .run_max = 1};
    a.rows = rows_on;
    a.pages = list_on;
    a.kv.data = room(kernels_kv_bytes(&a.kv));
    a.q = room((size_t)(batch * heads * HEAD_DIM) * 4);
    a.o = room((size_t)(batch * heads * HEAD_DIM) * 2);
    a.workspace_bytes = kernels_attention_workspace_bytes(batch, kv_heads, HEAD_DIM, context);
    a.workspace = room(a.workspace_bytes);
    char label[96];
    snprintf(label, sizeof label, "attention %s, %d x %d tokens", name, batch, context);
    const int calls = b->small ? 2 : 2 * a.kv.layers;
    const double us = graph_us(b->stream, calls, attend, &a) / calls;
    figure(b, label, 1e-3 * (double)layer_bytes / us / b->read_gbs, "of reading");
    void *const all[] = {rows_on, tiles_on, list_on, a.kv.data, a.q, a.o, a.workspace};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) cudaFree(all[i]);
    free(list);
}

static void measure_attentions(struct bench *b) {
    if (b->small) {
        measure_attention(b, 2, 70, 4, 2, "toy");
        return;
    }
    for (int batch = 1; batch <= 64; batch *= 64)
        for (int context = 4096; context <= 16384; context *= 4) {
            if (batch * context <= 64 * 4096) measure_attention(b, batch, context, 40, 8, "32b");
            measure_attention(b, batch, context, 8, 1, "70b/8");
        }
}

/* ---- all of it ---- */

static void section(struct bench *b, const char *name, void (*measure)(struct bench *b)) {
    printf("%s\n", name);
    json_key(&b->json, name);
    json_begin(&b->json, '[');
    measure(b);
    json_end(&b->json, ']');
}

int main(int argc, char **argv) {
    struct bench b = {0};
    struct cudaDeviceProp facts;
    bool json = false;
    size_t left = 0, all = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--json") == 0) {
            json = true;
        } else if (strcmp(argv[i], "--small") == 0) {
            b.small = true;
        } else {
            fprintf(stderr, "usage: bench_gpu [--json] [--small]\n");
            return 2;
        }
    }
    if (cuda_probe() != STATUS_OK) {
        fprintf(stderr, "bench_gpu: %s\n", fail_text());
        return 2;
    }
    must((int)cudaSetDevice(0), "device 0");
    must((int)cudaGetDeviceProperties(&facts, 0), "device 0");
    must(kernels_setup(), "device 0");
    must((int)cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking), "stream");
    must((int)cudaMemGetInfo(&left, &all), "memory");
    b.bytes = b.small ? (size_t)1 << 20 : (size_t)2 << 30;
    if (b.bytes > left / 2) b.bytes = left / 2 >> 20 << 20;
    b.memory = room(b.bytes);
    b.sink = room(256);
    must((int)cudaDeviceSynchronize(), "memory");
    json_writer_init(&b.json);
    json_begin(&b.json, '{');
    json_key(&b.json, "gpu");
    json_write_text(&b.json, facts.name);
    section(&b, "read", measure_read);
    section(&b, "edge", measure_edges);
    section(&b, "prefetch", measure_prefetch);
    section(&b, "product", measure_products);
    section(&b, "attention", measure_attentions);
    json_end(&b.json, '}');
    json_write_bytes(&b.json, "\n", 1);
    if (json) fwrite(b.json.bytes, 1, b.json.n, stdout);
    json_writer_fini(&b.json);
    cudaFree(b.memory);
    cudaFree(b.sink);
    cudaStreamDestroy(b.stream);
    return 0;
}
