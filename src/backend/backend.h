/* backend.h: the compute verbs of one device. A const table per backend, the instance last in its
 * file.
 *
 * A verb is one fused step of the forward pass in model/dense.c; it works on the rank's own shard
 * and never talks to other ranks. Buffers come from `alloc` (huge pages, zeroed, counted) and are
 * opaque
 * device pointers to everyone else; on the CPU they are ordinary memory. Shapes: [T rows, D hidden,
 * H
 * local query heads, G local kv heads, hd head dim, F local ffn columns, V local vocabulary rows].
 * Contract (cpu.md §3): a row's bits never depend on T, its place, neighbours, chunking, threads or
 * page numbers. Thread: the engine thread calls; the backend has its own pool. After `ready` no
 * allocation.
 */
#ifndef SFUMATO_BACKEND_BACKEND_H
#define SFUMATO_BACKEND_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/batch.h"
#include "backend/run.h"
#include "base/check.h"

/* FP8 is e4m3 (base/fp8.h), of KV and of matrices: these with an fp32 scale a block of 128 x 128, their
 * activations being bf16. */
enum backend_dtype { BACKEND_F32, BACKEND_BF16, BACKEND_FP8 };
enum backend_isa { ISA_AUTO, ISA_SCALAR, ISA_AVX2, ISA_AVX512, ISA_AVX512BF16, ISA_CUDA };
/* The numeric class decides bits: all levels of FMA agree with one another; DPBF16 has its own, and a GPU its own. */
enum backend_numerics { NUMERICS_AUTO, NUMERICS_FMA, NUMERICS_DPBF16, NUMERICS_CUDA };

/* Who makes products of many rows on a GPU: whoever is faster, our kernels, or cuBLASLt. */
enum backend_gemm { GEMM_AUTO, GEMM_OWN, GEMM_LT };

struct backend_config {
    enum backend_isa isa;           /* highest level to use */
    enum backend_numerics numerics; /* FMA: forces the class (after comm_agree_min) */
    int threads;                    /* pool size, 0 = allowed cores / local ranks */
    int local_rank, local_ranks;    /* for pinning */
    int rows_max;                   /* T never exceeds it */
    int logit_rows_max, probes_max; /* per step */
    bool deterministic;             /* CUDA: sums in slab order; the CPU has no other */
    /* CUDA: memory is taken for these when it opens. */
    struct batch_limits batch;
    int run_rows, positions_max; /* rows of a run, 0: no runs; longest sequence */
    int rank, ranks;             /* of the job */
    enum backend_gemm gemm;      /* CUDA, not deterministic */
};

typedef struct backend backend;
typedef struct matrix matrix; /* packed weights, opaque */

enum matrix_kind {
    MATRIX_COLUMN,  /* [N, K]: one chain over the whole K (qkv, lm_head, embedding) */
    MATRIX_GATE_UP, /* two [F, K]: parts 0 (gate) and 1 (up), joined; SwiGLU is the epilogue */
    MATRIX_ROW      /* [N, K local]: one chain per slab, slabs joined in the tree (o, down) */
};
struct matrix_spec {
    enum matrix_kind kind;
    enum backend_dtype dtype;
    int64_t rows, cols; /* N (for GATE_UP: F) and K, local */
    bool lookup_only;   /* read by embed_mix alone: not part of a step's read floor */
    int slab_count;     /* ROW only */
    const int64_t
        *slab_begin; /* ROW only: [slab_count + 1] local column borders; slabs may be empty */
};

/* Where keys and values of all layers live. */
struct kv_spec {
    int layers, heads /* H */, kv_heads /* G */, head_dim;
    int positions_max; /* of one sequence */
    int32_t page_count;
    enum backend_dtype dtype; /* FP8: CUDA only */
    /* FP8: what an element is multiplied by, [layer][G][key, value], host, read by kv_new only;
     * NULL: 1. */
    const float *scales;
};

/* One layer's attention inputs (fp32 vectors are borrowed device memory, NULL = absent). */
struct attention_spec {
    const matrix *qkv;            /* [(H + 2 G) hd, D]: q rows, then k rows, then v rows */
    const float *bias;            /* [(H + 2 G) hd] or NULL */
    const float *q_norm, *k_norm; /* [hd] or NULL */
    float norm_eps;
    int heads, kv_heads, head_dim;    /* H, G, hd local */
    const int *kv_of_head;            /* [H] local kv head of each local query head */
    const float *rope_cos, *rope_sin; /* [max_positions, hd/2], made once in double */
    int layer;
};

/* What a rank brings to the all-gather of a run's step, and where the ranks' parts go; device memory. */
struct run_exchange {
    const void *mine;
    size_t bytes;
    void *all;
};

/* Runs (run.h): between `step` and `decide` come the verbs of a forward pass, with the batch that
 * `step` gave. Everything between `replay` or `capture` and `captured` goes onto one stream and depends
 * on device memory only. Sizes of a step (rows are filled up to a bucket, context) are fixed by begin. */
struct run_ops {
    void (*begin)(backend *b, const struct batch *first, const struct run_row *rows);
    /* Launches the graph of a whole step. False: there is none for this shape yet. */
    bool (*replay)(backend *b);
    /* From here on work is recorded, not done. False: this shape has to be run once before. */
    bool (*capture)(backend *b);
    /* ... up to here: keeps the graph, and launches it. False: the device has no memory for one; nothing was
     * done, and this shape is not captured again. */
    bool (*captured)(backend *b);
    const struct batch *(*step)(backend *b);
    struct run_exchange (*candidates)(backend *b, const struct batch *batch, const float *logits,
                                      int slab_count, const int64_t *vocab_begin,
                                      int64_t vocab_count);
    void (*decide)(backend *b, const struct batch *batch);
    const struct run_answer *(*answer)(backend *b, int step, int row); /* as model_run_answer */
    void (*stop)(backend *b, int row);
    /* Drops all graphs. They hold what was captured into them: a communicator that is in one cannot be
     * closed (comm_nccl.c). */
    void (*forget)(backend *b);
};

/* The way of weights into host memory: every host thread (host_run) packs the rows of its own
 * panels, so that they come to lie near it. */
struct matrix_rows {
    const void *values;       /* [row_count][K] */
    enum backend_dtype dtype; /* F32, or the matrix's own */
};
struct backend_pack {
    /* Rows [*begin, *end) of a part are that thread's; borders are those of panels. */
    void (*share)(backend *b, const matrix *m, int thread, int64_t *begin, int64_t *end);
    /* Rows [row_begin, +row_count) of a part, of the calling thread's share. */
    void (*rows)(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                 const struct matrix_rows *rows);
};

/* The way of weights to a device with memory of its own. The host threads (host_run) bring rows into
 * the matrix's number format in one slot while the device takes them from the other. */
enum { BACKEND_SLOTS = 2 };
struct backend_upload {
    /* Slots of *bytes and starts host_threads threads; *bytes: per thread on entry, of a slot on
     * return. Until end. */
    enum status (*begin)(backend *b, size_t *bytes, void *slot[BACKEND_SLOTS]);
    /* Queues rows [row_begin, +row_count) of a part that lie in a slot: [row_count][K] bf16 or fp8
     * codes; scales (fp8; in the slot): for every 128 rows from row_begin, which is a multiple of 8,
     * one a block of 128 columns; blocks begin anew with each slab of a ROW matrix. */
    void (*rows)(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                 const void *rows, const float *scales);
    /* Returns when everything queued from this slot so far has been taken. */
    void (*wait)(backend *b, int slot);
    void (*end)(backend *b);
};

struct backend_ops {
    const char *name; /* "cpu", "cuda" */
    void (*close)(backend *b);
    /* Zeroed device memory, aligned to 128 bytes, that lives as long as the backend; NULL + fail()
     * when there is none. */
    void *(*alloc)(backend *b, size_t bytes, const char *what);
    enum status (*write)(backend *b, void *device, const void *host, size_t bytes);
    /* host[bytes] = device memory, once everything asked for before has been done. */
    void (*read)(backend *b, void *host, const void *device, size_t bytes);
    /* Device to device, in order with the verbs; the caller does not wait. */
    void (*copy)(backend *b, void *to, const void *from, size_t bytes);
    /* Bytes the device can still give. NULL: device memory is the host's. */
    int64_t (*free_bytes)(backend *b);
    /* sum[count] = the tree of comm_tree.h over gathered[R][count], all on the device. NULL: as
     * above. */
    void (*tree_sum)(backend *b, const float *gathered, int ranks, size_t count, float *sum);

    /* Packed weights. load: part is 0 except for GATE_UP; rows [row_begin, +row_count) of the part,
     * all K columns, row-major fp32, rounded to the matrix's dtype (RNE). Every row is loaded once.
     * */
    enum status (*matrix_new)(backend *b, const struct matrix_spec *spec, matrix **out);
    void (*matrix_load)(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                        const float *rows);
    /* The way of a whole model's weights, one of the two; matrix_load is for single matrices. */
    const struct backend_pack *pack;
    const struct backend_upload *upload;
    /* run(context, thread) once on each of the backend's host_threads threads. */
    void (*host_run)(backend *b, void (*run)(void *context, int thread), void *context);
    enum status (*kv_new)(backend *b, const struct kv_spec *spec);
    /* Bytes that matrix_new and kv_new of a whole model take for the verbs, beside the matrices and the
     * pages themselves; known before either. kv->page_count INT32_MAX: as many as fit. NULL: none worth
     * counting. */
    int64_t (*workspace_bytes)(backend *b, const struct matrix_spec *const *matrices, int count,
                               const struct kv_spec *kv);
    /* Takes the memory of that part of the KV pages from the system, which otherwise is asked for it
     * when a page is first used. NULL: kv_new has it. */
    enum status (*kv_take)(backend *b, int part, int parts);

    /* A step begins: copies the batch to the device. The verbs of the step get the same batch.
     * NULL: they read the host's. */
    void (*begin)(backend *b, const struct batch *batch);
    /* out[T,D] = this rank's part of the concept embeddings: per slab, fma in the order of the
     * record, first term a plain product; slabs along the tree; a row with no id here is all -0.0f
     * (absent).
     * embed holds rows [vocab_begin[0], vocab_begin[slab_count]); vocab_begin: [slab_count + 1],
     * global ids. */
    void (*embed_mix)(backend *b, const struct batch *batch, const matrix *embed, int slab_count,
                      const int64_t *vocab_begin, float *out);
    /* x[T,D] = scale * sum (first = true) or x + sum; then h = rmsnorm(x) * weight, rounded to the
     * activation type of `dtype` weights. h: [T,D] of bf16 or fp32. */
    void (*add_norm)(backend *b, int rows, int hidden, bool first, float scale, const float *sum,
                     float *x, const float *weight, float eps, enum backend_dtype dtype, void *h);
    /* Final norm of chosen rows only: h[i,D] = rmsnorm(x[rows[i]] + sum[rows[i]]). */
    void (*add_norm_rows)(backend *b, const int32_t *rows, int row_count, int hidden,
                          const float *sum, const float *x, const float *weight, float eps,
                          enum backend_dtype dtype, void *h);
    /* q[T,H,hd] = rope(qnorm(h Wq + b)); keys and values of the rows go to their pages. */
    void (*qkv)(backend *b, const struct batch *batch, const struct attention_spec *spec,
                const void *h, float *q);
    /* o[T,H,hd] = causal softmax(q k / sqrt(hd)) v over the pages, rounded to the type of `dtype`. */
    void (*attention)(backend *b, const struct batch *batch, const struct attention_spec *spec,
                      const float *q, enum backend_dtype dtype, void *o);
    /* partial[T,N] = in[T,K local] W^T, slabs of the rank summed along the tree, +0.0f added to
     * each slab's chain; all -0.0f when the rank has no slab with columns. */
    void (*row_matmul)(backend *b, int rows, const matrix *w, const void *in, float *partial);
    /* act[T,F] = silu(h Wgate) * (h Wup), rounded to the activation type. */
    void (*gate_up)(backend *b, int rows, const matrix *w, const void *h, void *act);
    /* logits[n,V] fp32 of normed rows h[n,D]. */
    void (*logits)(backend *b, int rows, const matrix *w, const void *h, float *logits);
    /* Answers all probes of the batch into records (batch_record_bytes apart). vocab_count: ids >=
     * it are padding and never take part. */
    void (*candidates)(backend *b, const struct batch *batch, const float *logits, int slab_count,
                       const int64_t *vocab_begin, int64_t vocab_count, void *records);
    /* The slow path: z' of every local id (edited, divided) for one probe: out[V], host memory. */
    void (*probe_logits)(backend *b, const struct batch *batch, int probe, const float *logits,
                         int slab_count, const int64_t *vocab_begin, int64_t vocab_count,
                         float *out);
    /* Benchmarks only: reads the bytes a decode step reads (all weights but lookup_only ones, and
     * the KV of kv_tokens tokens) once with the best access order. Returns seconds; *bytes = bytes
     * read. */
    double (*read_sweep)(backend *b, int64_t kv_tokens, int64_t *bytes);
    /* Peak multiply-add rate of this ISA for `seconds`, in FLOP/s over the pool. */
    double (*peak_flops)(backend *b, double seconds);
    /* Benchmarks only: keeps the device busy for so long, in order with the verbs, without touching
     * memory: a collective that is not there. NULL: the host waits. */
    void (*delay)(backend *b, double us);
    const struct run_ops *run; /* NULL: decisions are the host's */
};

/* First member of every backend. */
struct backend {
    const struct backend_ops *ops;
    enum backend_isa isa;                         /* in use */
    enum backend_numerics numerics;               /* in use: FMA or DPBF16 */
    int threads;                                  /* that compute */
    int host_threads;                             /* of host_run */
    int run_rows;                                 /* rows a run may have; 0: none */
    size_t weight_bytes, kv_bytes, scratch_bytes; /* taken so far */
    /* A GPU only. stream: what all verbs run on (cudaStream_t). watch: called again and again while
     * the host waits for the device, and once when the wait is over, so that whoever has work on the
     * stream can see that it will never end, or has given up; it may end the job. */
    void *stream;
    void (*watch)(void *user, double waited_seconds);
    void *watch_user;
};

/* The highest numeric class this machine could use under `config` (for comm_agree_min). */
enum backend_numerics cpu_numerics(const struct backend_config *config);
/* Bytes matrix_new takes for this shape (panels padded). */
int64_t cpu_matrix_bytes(const struct matrix_spec *spec);
enum status cpu_open(const struct backend_config *config, backend **out);
/* cuda.c, in programs built with SFUMATO_CUDA. STATUS_USAGE, saying what is missing, where no GPU can be
 * used; the program starts without a driver all the same. probe: opens nothing. */
enum status cuda_probe(void);
enum status cuda_open(const struct backend_config *config, backend **out);
static inline size_t backend_dtype_bytes(enum backend_dtype d) {
    return d == BACKEND_F32 ? 4 : d == BACKEND_BF16 ? 2 : 1;
}
static inline const char *backend_dtype_name(enum backend_dtype d) {
    return d == BACKEND_F32 ? "f32" : d == BACKEND_BF16 ? "bf16" : "fp8";
}
/* What activations are with such weights. */
static inline enum backend_dtype backend_activation(enum backend_dtype weights) {
    return weights == BACKEND_FP8 ? BACKEND_BF16 : weights;
}
const char *backend_isa_name(enum backend_isa isa);
const char *backend_numerics_name(enum backend_numerics n);

#endif
