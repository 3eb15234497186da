/* cuda_lt.c: products of many rows by cuBLASLt, in fast mode: prefill.
 *
 * The library wants plain rows, our weights lie in fragments. So a product goes piece by piece: some
 * rows of the weights are unpacked to a scratch that stays in L2 and multiplied from there:
 *
 *   packed W ─ unpack ─► [chunk][K] bf16 ─ matmul with in [T][K] ─► out[T][chunk of N] fp32
 *                                       gate and up: ─► [T][2 chunk] fp32 ─ swiglu ─► act[T][F]
 *
 * The library is column-major: our row-major W [N][K] is its K x N, "T" makes it N x K; in [T][K] is
 * K x T as it stands; the result N x T with leading dimension N is our out[T][N].
 *
 * Once the weights are there cuda_lt_tune times up to HEURISTICS algorithms for every shape and
 * every doubling of rows, the best of them against our own kernel, and keeps who wins (auto) or the
 * best of them (cublaslt). A step only looks up: nothing is created, timed or taken in it. A call the
 * library refuses is made by our own kernel instead. Which algorithm wins may differ between runs
 * and ranks, so --deterministic never comes here.
 *
 * The library is looked for when the backend opens (dlopen): without it a program with CUDA runs as
 * before. Thread: engine. Memory: scratch for weights and results, the library's workspace; taken in
 * cuda_lt_tune.
 */
#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>

#include "backend/cuda.h"
#include "base/log.h"

#ifdef SFUMATO_WITH_CUBLASLT
#include <cublasLt.h>

enum {
    ROWS_OWN = 64, /* up to here our kernels read the weights once and win */
    HEURISTICS = 32,
    BUCKETS = 10, /* bucket i: up to 128 << i rows */
    SHAPES = 8,
    REPEATS = 4,
    WORKSPACE_BYTES = 32 << 20,
    CHUNK_ROWS = 128, /* chunks are multiples of it */
};
size_t cuda_lt_scratch_bytes = 64 << 20; /* of weights, and of results; a test lowers it */

#define LT_CALLS(X)                         \
    X(cublasLtCreate)                       \
    X(cublasLtDestroy)                      \
    X(cublasLtGetVersion)                   \
    X(cublasLtMatmul)                       \
    X(cublasLtMatmulAlgoGetHeuristic)       \
    X(cublasLtMatmulDescCreate)             \
    X(cublasLtMatmulDescDestroy)            \
    X(cublasLtMatmulDescSetAttribute)       \
    X(cublasLtMatmulPreferenceCreate)       \
    X(cublasLtMatmulPreferenceDestroy)      \
    X(cublasLtMatmulPreferenceSetAttribute) \
    X(cublasLtMatrixLayoutCreate)           \
    X(cublasLtMatrixLayoutDestroy)          \
    X(cublasLtMatrixLayoutSetAttribute)

struct lt_choice {
    bool use;
    cublasLtMatmulAlgo_t algo;
};
/* Matrices of one kind and size. */
struct lt_shape {
    enum kernels_dtype dtype;
    enum kernels_kind kind;
    int64_t rows, cols, chunk; /* chunk: rows (GATE_UP: units) unpacked at a time */
    cublasLtMatrixLayout_t weights, in, out;
    struct lt_choice choice[BUCKETS];
};
struct cuda_lt {
    void *library;
    struct {
#define X(call) __typeof__(call) *call;
        LT_CALLS(X)
#undef X
    } lib;
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t product;
    cublasLtMatmulPreference_t preference;
    struct cuda_buffer weights, results, workspace;
    struct lt_shape shapes[SHAPES];
    int shape_count;
    bool forced;
};

/* ---- one product ---- */

/* Layout rows or columns, for this call. */
static bool set_size(struct cuda_lt *lt, cublasLtMatrixLayout_t layout, bool columns, uint64_t n) {
    return lt->lib.cublasLtMatrixLayoutSetAttribute(
               layout, columns ? CUBLASLT_MATRIX_LAYOUT_COLS : CUBLASLT_MATRIX_LAYOUT_ROWS, &n,
               sizeof n) == CUBLAS_STATUS_SUCCESS;
}
static bool set_pitch(struct cuda_lt *lt, cublasLtMatrixLayout_t layout, int64_t pitch) {
    return lt->lib.cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_LD, &pitch,
                                                    sizeof pitch) == CUBLAS_STATUS_SUCCESS;
}

/* The layouts of s for `rows` rows times n unpacked ones, results `pitch` apart. */
static bool set_sizes(struct cuda_lt *lt, const struct lt_shape *s, int rows, int64_t n,
                      int64_t pitch) {
    return set_size(lt, s->weights, true, (uint64_t)n) &&
           set_size(lt, s->in, true, (uint64_t)rows) && set_size(lt, s->out, false, (uint64_t)n) &&
           set_size(lt, s->out, true, (uint64_t)rows) && set_pitch(lt, s->out, pitch);
}

/* out[T][pitch], n columns of it = in[T][K] times the n unpacked rows. False: refused. */
static bool multiply(struct cuda *cuda, struct lt_shape *s, const cublasLtMatmulAlgo_t *algo,
                     int rows, int64_t n, const void *in, float *out, int64_t pitch) {
    struct cuda_lt *lt = cuda->lt;
    const float one = 1.0f, zero = 0.0f;
    return set_sizes(lt, s, rows, n, pitch) &&
           lt->lib.cublasLtMatmul(lt->handle, lt->product, &one, lt->weights.data, s->weights, in,
                                  s->in, &zero, out, s->out, out, s->out, algo, lt->workspace.data,
                                  lt->workspace.bytes, cuda->stream) == CUBLAS_STATUS_SUCCESS;
}

/* The product for weight rows (units) [begin, +n). out: COLUMN, ROW: fp32 [T][pitch] from column
 * `begin` on; GATE_UP: bf16 likewise. */
static bool run_chunk(struct cuda *cuda, struct lt_shape *s, const cublasLtMatmulAlgo_t *algo,
                      int rows, const struct kernels_matrix *m, int64_t begin, int64_t n,
                      const void *in, void *out, int64_t pitch) {
    struct cuda_lt *lt = cuda->lt;
    const bool gated = s->kind == KERNELS_GATE_UP;
    cuda_must(kernels_unpack(cuda->stream, m, begin, n, lt->weights.data, m->cols),
              "unpacking of weights");
    float *to = gated ? (float *)lt->results.data : (float *)out + begin;
    if (!multiply(cuda, s, algo, rows, gated ? 2 * n : n, in, to, gated ? 2 * n : pitch))
        return false;
    if (gated) {
        cuda_must(kernels_swiglu(cuda->stream, rows, n, to, (uint16_t *)out + begin, pitch),
                  "gate and up");
    }
    return true;
}

static int bucket_of(int rows) {
    int bucket = 0;
    while (bucket < BUCKETS && (128 << bucket) < rows) bucket++;
    return bucket;
}

static struct lt_shape *find_shape(struct cuda_lt *lt, const struct kernels_matrix *m) {
    for (int i = 0; i < lt->shape_count; i++) {
        struct lt_shape *s = &lt->shapes[i];
        if (s->dtype == m->dtype && s->kind == m->kind && s->rows == m->rows && s->cols == m->cols)
            return s;
    }
    return NULL;
}

bool cuda_lt_product(struct cuda *cuda, int rows, const struct kernels_matrix *m, const void *in,
                     void *out) {
    struct lt_shape *s = rows > ROWS_OWN && cuda->lt ? find_shape(cuda->lt, m) : NULL;
    const int bucket = bucket_of(rows);
    if (!s || bucket >= BUCKETS || !s->choice[bucket].use) return false;
    if (s->kind == KERNELS_GATE_UP &&
        sizeof(float) * 2 * (size_t)rows * (size_t)s->chunk > cuda->lt->results.bytes)
        return false;
    for (int64_t begin = 0, n; begin < s->rows; begin += n) {
        n = s->rows - begin < s->chunk ? s->rows - begin : s->chunk;
        if (!run_chunk(cuda, s, &s->choice[bucket].algo, rows, m, begin, n, in, out, s->rows))
            return false;
    }
    return true;
}

/* ---- choosing ---- */

/* Seconds of REPEATS + 1 runs but the first, each; negative: refused. */
static double seconds_of(struct cuda *cuda, struct lt_shape *s, const cublasLtMatmulAlgo_t *algo,
                         int rows, const struct kernels_matrix *m) {
    const struct cuda_lt *lt = cuda->lt;
    double begin = 0;
    for (int i = 0; i <= REPEATS; i++) {
        if (i <= 1) cuda_wait(cuda);
        if (i == 1) begin = cuda_seconds();
        /* any numbers will do as input: those in the weights' scratch */
        if (algo) {
            if (!run_chunk(cuda, s, algo, rows, m, 0, s->chunk, lt->weights.data, lt->results.data,
                           s->chunk))
                return -1;
        } else if (s->kind == KERNELS_GATE_UP) {
            cuda_must(kernels_gate_up(cuda->stream, cuda->mode, rows, m, lt->weights.data,
                                      lt->results.data, cuda->product.data),
                      "timing of a product");
        } else {
            cuda_must(kernels_product(cuda->stream, cuda->mode, rows, m, lt->weights.data,
                                      lt->results.data, cuda->product.data),
                      "timing of a product");
        }
    }
    cuda_wait(cuda);
    return (cuda_seconds() - begin) / REPEATS;
}

/* The first chunk of m as a matrix of its own: row tiles lie one after the other. (Of fp8 the scales
 * do not: good enough to be timed.) */
static struct kernels_matrix first_chunk(const struct kernels_matrix *m, int64_t chunk) {
    struct kernels_matrix part = *m;
    const int64_t tile_rows = m->kind == KERNELS_GATE_UP ? KERNELS_TILE / 2 : KERNELS_TILE;
    part.rows = chunk;
    part.row_tiles = (int32_t)((chunk + tile_rows - 1) / tile_rows);
    return part;
}

static void choose(struct cuda *cuda, struct lt_shape *s, const struct kernels_matrix *m,
                   int bucket, int rows) {
    struct cuda_lt *lt = cuda->lt;
    struct lt_choice *choice = &s->choice[bucket];
    const int64_t n = s->kind == KERNELS_GATE_UP ? 2 * s->chunk : s->chunk;
    const int64_t pitch = s->kind == KERNELS_GATE_UP ? n : s->rows;
    cublasLtMatmulHeuristicResult_t results[HEURISTICS];
    int count = 0;
    if (!set_sizes(lt, s, rows, n, pitch) ||
        lt->lib.cublasLtMatmulAlgoGetHeuristic(lt->handle, lt->product, s->weights, s->in, s->out,
                                               s->out, lt->preference, HEURISTICS, results,
                                               &count) != CUBLAS_STATUS_SUCCESS)
        return;
    const struct kernels_matrix part = first_chunk(m, s->chunk);
    double best = INFINITY;
    for (int i = 0; i < count; i++) {
        if (results[i].state != CUBLAS_STATUS_SUCCESS ||
            results[i].workspaceSize > lt->workspace.bytes)
            continue;
        const double seconds = seconds_of(cuda, s, &results[i].algo, rows, &part);
        if (seconds < 0 || seconds >= best) continue;
        best = seconds;
        choice->algo = results[i].algo;
    }
    choice->use = best < INFINITY;
    if (lt->forced || !choice->use) return;
    const double own = seconds_of(cuda, s, NULL, rows, &part);
    choice->use = best < own;
    log_debug("%lld x %lld with %d rows: %.3f ms a chunk by cuBLASLt, %.3f ms by our own kernel",
              (long long)s->rows, (long long)s->cols, rows, 1e3 * best, 1e3 * own);
}

/* False: not for the library, or more shapes than a model has. */
static bool add_shape(struct cuda *cuda, const struct kernels_matrix *m) {
    struct cuda_lt *lt = cuda->lt;
    const bool gated = m->kind == KERNELS_GATE_UP;
    if (lt->shape_count == SHAPES || m->rows == 0 || m->cols == 0) return false;
    struct lt_shape *s = &lt->shapes[lt->shape_count];
    *s = (struct lt_shape){.dtype = m->dtype, .kind = m->kind, .rows = m->rows, .cols = m->cols};
    const int64_t height = gated ? 2 : 1; /* weight rows of a chunk's row */
    int64_t most = (int64_t)cuda_lt_scratch_bytes / (height * m->cols * 2);
    const int64_t results =
        (int64_t)cuda_lt_scratch_bytes / (height * cuda->rows_max * (int64_t)sizeof(float));
    if (results < most) most = results;
    if (most < CHUNK_ROWS) return false;
    const int64_t chunks = (m->rows + most - 1) / most;
    s->chunk = ((m->rows + chunks - 1) / chunks + CHUNK_ROWS - 1) / CHUNK_ROWS * CHUNK_ROWS;
    if (s->chunk > most) s->chunk = most / CHUNK_ROWS * CHUNK_ROWS;
    if (s->chunk > m->rows) s->chunk = m->rows;
    const uint64_t k = (uint64_t)m->cols, n = (uint64_t)(height * s->chunk);
    const int64_t pitch = gated ? height * s->chunk : m->rows;
    if (lt->lib.cublasLtMatrixLayoutCreate(&s->weights, CUDA_R_16BF, k, n, m->cols) ==
            CUBLAS_STATUS_SUCCESS &&
        lt->lib.cublasLtMatrixLayoutCreate(&s->in, CUDA_R_16BF, k, ROWS_OWN + 1, m->cols) ==
            CUBLAS_STATUS_SUCCESS &&
        lt->lib.cublasLtMatrixLayoutCreate(&s->out, CUDA_R_32F, n, ROWS_OWN + 1, pitch) ==
            CUBLAS_STATUS_SUCCESS) {
        lt->shape_count++;
        return true;
    }
    lt->lib.cublasLtMatrixLayoutDestroy(s->weights);
    lt->lib.cublasLtMatrixLayoutDestroy(s->in);
    return false;
}

size_t cuda_lt_workspace_bytes(const struct cuda *cuda) {
    return cuda->lt && cuda->rows_max > ROWS_OWN ? 2 * cuda_lt_scratch_bytes + WORKSPACE_BYTES : 0;
}

static bool take_scratch(struct cuda *cuda) {
    struct cuda_lt *lt = cuda->lt;
    return cuda_grow(cuda, &lt->weights, cuda_lt_scratch_bytes, "unpacked weights") == STATUS_OK &&
           cuda_grow(cuda, &lt->results, cuda_lt_scratch_bytes, "results of products") ==
               STATUS_OK &&
           cuda_grow(cuda, &lt->workspace, WORKSPACE_BYTES, "workspace of cuBLASLt") == STATUS_OK;
}

enum status cuda_lt_tune(struct cuda *cuda) {
    struct cuda_lt *lt = cuda->lt;
    if (!lt || cuda->rows_max <= ROWS_OWN) return STATUS_OK;
    if (!take_scratch(cuda)) {
        if (lt->forced) return STATUS_MEMORY;
        log_info("cuBLASLt is not used: %s", fail_text());
        cuda_lt_close(cuda);
        return STATUS_OK;
    }
    int sizes = 0, won = 0;
    for (const struct matrix *m = cuda->matrices; m; m = m->next) {
        if (m->lookup_only || find_shape(lt, &m->shape) || !add_shape(cuda, &m->shape)) continue;
        struct lt_shape *s = &lt->shapes[lt->shape_count - 1];
        for (int bucket = 0; bucket < BUCKETS && (bucket == 0 || (64 << bucket) < cuda->rows_max);
             bucket++) {
            int64_t rows = 128 << bucket, fits = (int64_t)cuda_lt_scratch_bytes / (2 * s->cols);
            if (rows > cuda->rows_max) rows = cuda->rows_max;
            if (rows > fits) rows = fits;
            choose(cuda, s, &m->shape, bucket, (int)rows);
            sizes++;
            won += s->choice[bucket].use;
        }
    }
    if (lt->forced && won < sizes) {
        return fail(
            STATUS_USAGE,
            "--gemm cublaslt: the library has no algorithm for %d of %d sizes of this model: "
            "use --gemm auto",
            sizes - won, sizes);
    }
    log_info("products of more than %d rows: cuBLASLt for %d of %d sizes, own kernels for the rest",
             (int)ROWS_OWN, won, sizes);
    return STATUS_OK;
}

/* ---- life ---- */

void cuda_lt_close(struct cuda *cuda) {
    struct cuda_lt *lt = cuda->lt;
    if (!lt) return;
    for (int i = 0; i < lt->shape_count; i++) {
        lt->lib.cublasLtMatrixLayoutDestroy(lt->shapes[i].weights);
        lt->lib.cublasLtMatrixLayoutDestroy(lt->shapes[i].in);
        lt->lib.cublasLtMatrixLayoutDestroy(lt->shapes[i].out);
    }
    if (lt->preference) lt->lib.cublasLtMatmulPreferenceDestroy(lt->preference);
    if (lt->product) lt->lib.cublasLtMatmulDescDestroy(lt->product);
    if (lt->handle) lt->lib.cublasLtDestroy(lt->handle);
    struct cuda_buffer *const buffers[] = {&lt->weights, &lt->results, &lt->workspace};
    for (int i = 0; i < 3; i++) {
        cudaFree(buffers[i]->data);
        cuda->base.scratch_bytes -= buffers[i]->bytes;
    }
    if (lt->library) dlclose(lt->library);
    free(lt);
    cuda->lt = NULL;
}

static enum status load(struct cuda_lt *lt) {
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
    /* the header's own release: the structures below it are what we were compiled with */
    const char *name = names[CUBLAS_VER_MAJOR >= 13 ? 0 : 1];
    lt->library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!lt->library) return fail(STATUS_USAGE, "%s", dlerror());
#define X(call)                                          \
    *(void **)&lt->lib.call = dlsym(lt->library, #call); \
    if (!lt->lib.call) return fail(STATUS_USAGE, "%s has no " #call, name);
    LT_CALLS(X)
#undef X
    const uint64_t workspace = WORKSPACE_BYTES;
    const cublasOperation_t turned = CUBLAS_OP_T;
    if (lt->lib.cublasLtCreate(&lt->handle) != CUBLAS_STATUS_SUCCESS ||
        lt->lib.cublasLtMatmulDescCreate(&lt->product, CUBLAS_COMPUTE_32F, CUDA_R_32F) !=
            CUBLAS_STATUS_SUCCESS ||
        lt->lib.cublasLtMatmulDescSetAttribute(lt->product, CUBLASLT_MATMUL_DESC_TRANSA, &turned,
                                               sizeof turned) != CUBLAS_STATUS_SUCCESS ||
        lt->lib.cublasLtMatmulPreferenceCreate(&lt->preference) != CUBLAS_STATUS_SUCCESS ||
        lt->lib.cublasLtMatmulPreferenceSetAttribute(
            lt->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
            sizeof workspace) != CUBLAS_STATUS_SUCCESS)
        return fail(STATUS_USAGE, "%s cannot start on this GPU", name);
    return STATUS_OK;
}

enum status cuda_lt_open(struct cuda *cuda, enum backend_gemm gemm) {
    static bool told; /* selftest opens many backends */
    if (gemm == GEMM_OWN || cuda->mode == KERNELS_DETERMINISTIC) return STATUS_OK;
    cuda->lt = calloc(1, sizeof *cuda->lt);
    if (!cuda->lt) return fail(STATUS_MEMORY, "no memory for cuBLASLt");
    cuda->lt->forced = gemm == GEMM_LT;
    const enum status status = load(cuda->lt);
    if (status == STATUS_OK) {
        if (!told) log_info("cuBLASLt %zu", cuda->lt->lib.cublasLtGetVersion());
        told = true;
        return STATUS_OK;
    }
    const struct fault why = *fail_last();
    cuda_lt_close(cuda);
    if (gemm == GEMM_LT) {
        return fail(STATUS_USAGE,
                    "--gemm cublaslt: %.200s: install it, set LD_LIBRARY_PATH, or use --gemm auto",
                    why.text);
    }
    if (!told) log_info("no cuBLASLt (%s): own kernels for all products", why.text);
    told = true;
    return STATUS_OK;
}

#else

enum status cuda_lt_open(struct cuda *cuda, enum backend_gemm gemm) {
    (void)cuda;
    if (gemm != GEMM_LT) return STATUS_OK;
    return fail(STATUS_USAGE,
                "--gemm cublaslt: this program was built without cublasLt.h: use "
                "--gemm auto");
}
void cuda_lt_close(struct cuda *cuda) { (void)cuda; }
size_t cuda_lt_workspace_bytes(const struct cuda *cuda) {
    (void)cuda;
    return 0;
}
enum status cuda_lt_tune(struct cuda *cuda) {
    (void)cuda;
    return STATUS_OK;
}
bool cuda_lt_product(struct cuda *cuda, int rows, const struct kernels_matrix *m, const void *in,
                     void *out) {
    (void)cuda, (void)rows, (void)m, (void)in, (void)out;
    return false;
}
#endif
