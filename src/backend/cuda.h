/* cuda.h: what the files of the CUDA backend share. CUDA headers are included by these files only.
 *
 *   cuda.c          table of verbs, the device, memory, waiting, open and close
 *   cuda_matrix.c   packed weights and their upload
 *   cuda_step.c     a step: the batch on the device, embedding, norms, answers
 *   cuda_attention.c, cuda_products.c    the other verbs over kernels/kernels.h
 *   cuda_lt.c       products of many rows by cuBLASLt
 *   cuda_run.c      runs: steps that decide on the device, their graphs and answers
 *   cuda_bench.c    what benchmarks ask
 *
 * One stream; a verb queues kernels and returns. The host waits in three places: `read`, `candidates`,
 * whose answers the engine decides on (an ordinary step), and for answers of a run, which is queued
 * steps ahead.
 *
 * Thread: engine. Memory: device memory lives as long as the backend; what verbs need in between is
 * taken while it is opened and while matrices and the KV pool are made, by the largest step there can
 * be.
 */
#ifndef SFUMATO_BACKEND_CUDA_H
#define SFUMATO_BACKEND_CUDA_H

#include <cuda_runtime_api.h>

#include "backend/backend.h"
#include "kernels/kernels.h"

enum { CUDA_HEADS_MAX = 1024, CUDA_WATCH_MAX = 64, CUDA_ALIGN = 256, CUDA_GRAPHS_MAX = 256 };

/* Device memory that may be replaced by a larger piece; zeroed. */
struct cuda_buffer {
    void *data;
    size_t bytes;
};

/* The batch of the running step, on the device, and the few of its numbers launches need. */
struct cuda_batch {
    unsigned char *pinned; /* the copy is made here, then sent in one piece */
    struct cuda_buffer device;
    size_t pinned_bytes;
    const int32_t *host_logit_rows; /* the batch's own array: says that logit_rows is its copy */
    int32_t row_count, context_max;
    const struct kernels_row *rows; /* the rest: device, as in struct batch */
    const int32_t *pages, *mix_begin, *logit_rows;
    const uint32_t *mix_ids;
    const float *mix_weights;
    struct kernels_probes probes;
};

/* A whole step of a run, by shape. exec NULL: not captured yet. */
struct cuda_graph {
    int32_t rows, candidate_count, context_max;
    bool seen;  /* was run once, kernel by kernel */
    bool never; /* there was no memory for its graph */
    cudaGraphExec_t exec;
};

/* What a run brings: [rows], and the lists they point into. */
struct cuda_run_rows {
    struct kernels_slot *slots;
    struct think_params *params;
    struct think_state *states;
    struct kernels_thinker *thinkers;
    struct batch_probe *probes;
    uint32_t *watch_ids;
    int32_t *pages;
    struct batch_edit *edits;
};

struct cuda_run {
    int rows_max, positions_max;
    int64_t pages_max, edits_max;
    unsigned char *pinned; /* host, stop, answers and the two arrays after them */
    struct cuda_run_rows host, device;
    uint32_t *stop;
    struct run_answer *answers;
    struct batch_segment *segments; /* of `shape` */
    int32_t *host_logit_rows;       /* 0, 1, 2 ... */
    int32_t *logit_rows;            /* the same on the device */
    struct kernels_run kernels;
    struct batch shape; /* of a step, for the verbs: counts only */
    int context_max;
    uint64_t first_stamp, next_stamp; /* of the run's first step; of the one queued next */
    uint64_t watched_stamp;   /* the latest step that was watched after its answers had come */
    struct cuda_graph *graph; /* of the shape; NULL: no room for one */
    struct cuda_graph graphs[CUDA_GRAPHS_MAX];
    int graph_count;
    bool counted; /* before a capture: whether this thread's allocations count */
};

struct matrix {
    struct kernels_matrix shape;
    bool lookup_only;
    struct matrix *next;
};

struct cuda_lt; /* cuda_lt.c */

struct cuda {
    struct backend base;
    cudaStream_t stream;
    int device, sharing; /* ranks of this host that use the same GPU */
    enum kernels_mode mode;
    int rows_max, logit_rows_max, probes_max;
    struct cuda_memory *memory; /* every piece given out by alloc */
    struct matrix *matrices;

    int local_rank, local_ranks;
    struct cuda_upload *upload; /* cuda_matrix.c, while weights are loaded */

    struct kernels_kv kv;
    int positions_max;
    struct cuda_batch batch;
    cudaEvent_t batch_sent;
    struct cuda_run run;
    int kv_of_head[CUDA_HEADS_MAX], head_count; /* what tiles were made of */
    struct kernels_tile host_tiles[CUDA_HEADS_MAX];
    struct kernels_tile *tiles; /* the same on the device */
    int tile_count, tile_heads_max;

    int row_tiles_max;
    int64_t vocab_max;
    struct cuda_buffer raw; /* [rows_max][(H + 2 G) hd] fp32: q, k, v before norm and rotation */
    struct cuda_buffer product, attention, candidates; /* workspaces of these kernels */
    struct cuda_buffer records, whole_row, row_list;   /* answers; one row of logits; chosen rows */
    void *records_pinned;
    size_t records_pinned_bytes;
    struct cuda_lt *lt; /* NULL: own kernels for all products */
    uint32_t *sink;     /* device, one word: keeps benchmark reads alive */
};

static inline struct cuda *cuda_of(backend *b) { return (struct cuda *)b; }

/* Ends the job when a CUDA call or a launcher of kernels.h failed. what: "matrix product". */
void cuda_must(int error, const char *what);
/* At least `bytes` of zeroed device memory, counted as scratch; what was in it is lost. */
enum status cuda_grow(struct cuda *cuda, struct cuda_buffer *buffer, size_t bytes,
                      const char *what);
/* Zeroed device memory that dies with the backend; NULL + fail() when there is none. */
void *cuda_take(struct cuda *cuda, size_t bytes, const char *what);
/* Waits until the stream is empty, polling, so that base.watch can end a wait that never would. */
void cuda_wait(struct cuda *cuda);

/* cuda_matrix.c */
void cuda_matrices_close(struct cuda *cuda);
enum status cuda_matrix_new(backend *b, const struct matrix_spec *spec, matrix **out);
/* Of the products and of the candidates. */
size_t cuda_matrix_workspace_bytes(const struct cuda *cuda,
                                   const struct matrix_spec *const *matrices, int count);
void cuda_matrix_load(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                      const float *rows);

extern const struct backend_upload cuda_upload_ops;
void cuda_host_run(backend *b, void (*run)(void *context, int thread), void *context);

/* cuda_step.c */
enum status cuda_batch_open(struct cuda *cuda, const struct backend_config *config);
struct kernels_borders cuda_borders(int slab_count, const int64_t *vocab_begin);
void cuda_begin(backend *b, const struct batch *batch);
void cuda_embed_mix(backend *b, const struct batch *batch, const matrix *embed, int slab_count,
                    const int64_t *vocab_begin, float *out);
void cuda_add_norm(backend *b, int rows, int hidden, bool first, float scale, const float *sum,
                   float *x, const float *weight, float eps, enum backend_dtype dtype, void *h);
void cuda_add_norm_rows(backend *b, const int32_t *rows, int row_count, int hidden,
                        const float *sum, const float *x, const float *weight, float eps,
                        enum backend_dtype dtype, void *h);
void cuda_candidates(backend *b, const struct batch *batch, const float *logits, int slab_count,
                     const int64_t *vocab_begin, int64_t vocab_count, void *records);
void cuda_probe_logits(backend *b, const struct batch *batch, int probe, const float *logits,
                       int slab_count, const int64_t *vocab_begin, int64_t vocab_count, float *out);

/* cuda_attention.c */
enum status cuda_kv_new(backend *b, const struct kv_spec *spec);
/* Of qkv and attention. */
size_t cuda_kv_workspace_bytes(const struct cuda *cuda, const struct kv_spec *spec);
void cuda_qkv(backend *b, const struct batch *batch, const struct attention_spec *spec,
              const void *h, float *q);
void cuda_attention(backend *b, const struct batch *batch, const struct attention_spec *spec,
                    const float *q, enum backend_dtype dtype, void *o);

/* cuda_products.c. product: out fp32, by whoever is faster. */
void cuda_product(struct cuda *cuda, int rows, const matrix *w, const void *in, float *out,
                  const char *what);
void cuda_row_matmul(backend *b, int rows, const matrix *w, const void *in, float *partial);
void cuda_gate_up(backend *b, int rows, const matrix *w, const void *h, void *act);
void cuda_logits(backend *b, int rows, const matrix *w, const void *h, float *logits);

/* cuda_run.c */
extern const struct run_ops cuda_run_ops;
enum status cuda_run_open(struct cuda *cuda, const struct backend_config *config);
void cuda_run_close(struct cuda *cuda);

/* cuda_lt.c. open: looks for the library; tune: once all weights and the KV pool are there. */
enum status cuda_lt_open(struct cuda *cuda, enum backend_gemm gemm);
enum status cuda_lt_tune(struct cuda *cuda);
void cuda_lt_close(struct cuda *cuda);
size_t cuda_lt_workspace_bytes(const struct cuda *cuda); /* that tune takes */
/* As kernels_product (out fp32) or kernels_gate_up (out bf16). False: not a product for the library;
 * our own kernel has to do it. */
bool cuda_lt_product(struct cuda *cuda, int rows, const struct kernels_matrix *m, const void *in,
                     void *out);

/* cuda_bench.c */
double cuda_seconds(void); /* a steady clock */
double cuda_read_sweep(backend *b, int64_t kv_tokens, int64_t *bytes);
double cuda_peak_flops(backend *b, double seconds);
void cuda_delay(backend *b, double us);

#endif
