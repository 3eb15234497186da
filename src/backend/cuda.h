/* cuda.h: what the files of the CUDA backend share. CUDA headers are included by these files only.
 *
 *   cuda.c          table of verbs, the device, memory, waiting, open and close
 *   cuda_matrix.c   packed weights and their upload
 *   cuda_step.c     a step: the batch on the device, embedding, norms, answers
 *   cuda_attention.c, cuda_products.c    the other verbs over kernels/kernels.h
 *   cuda_lt.c       products of many rows by cuBLASLt
 *   cuda_bench.c    what benchmarks ask
 *
 * One stream; a verb queues kernels and returns. The host waits in two places: `read` and
 * `candidates`, whose answers the engine decides on (a host-synchronous step). There are no CUDA
 * graphs, no launch-ahead and no device sampler in this backend yet.
 *
 * Thread: engine. Memory: device memory lives as long as the backend; what verbs need in between is
 * taken while matrices and the KV pool are made. Only the copy of a batch can grow later, when a
 * step brings more edits than any before it.
 */
#ifndef SFUMATO_BACKEND_CUDA_H
#define SFUMATO_BACKEND_CUDA_H

#include <cuda_runtime_api.h>

#include "backend/backend.h"
#include "kernels/kernels.h"

enum { CUDA_HEADS_MAX = 1024, CUDA_WATCH_MAX = 64, CUDA_ALIGN = 256 };

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
    int kv_of_head[CUDA_HEADS_MAX], head_count; /* what tiles were made of */
    struct kernels_tile *tiles;                 /* device, [CUDA_HEADS_MAX] */
    int tile_count, tile_heads_max;

    int row_tiles_max;
    int64_t vocab_max;
    struct cuda_buffer raw; /* [rows_max][(H + 2 G) hd] fp32: q, k, v before norm and rotation */
    struct cuda_buffer product, attention, candidates; /* workspaces of these kernels */
    struct cuda_buffer records, whole_row, row_list;   /* answers; one row of logits; chosen rows */
    void *records_pinned;
    size_t records_pinned_bytes;
    struct cuda_lt *lt; /* NULL: own kernels for all products */
    uint32_t *sink; /* device, one word: keeps benchmark reads alive */
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
void cuda_matrix_load(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                      const float *rows);

extern const struct backend_upload cuda_upload_ops;
void cuda_host_run(backend *b, void (*run)(void *context, int thread), void *context);

/* cuda_step.c */
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
void cuda_qkv(backend *b, const struct batch *batch, const struct attention_spec *spec,
              const void *h, float *q);
void cuda_attention(backend *b, const struct batch *batch, const struct attention_spec *spec,
                    const float *q, enum backend_dtype dtype, void *o);

/* cuda_products.c */
void cuda_row_matmul(backend *b, int rows, const matrix *w, const void *in, float *partial);
void cuda_gate_up(backend *b, int rows, const matrix *w, const void *h, void *act);
void cuda_logits(backend *b, int rows, const matrix *w, const void *h, float *logits);

/* cuda_lt.c. open: looks for the library; tune: once all weights and the KV pool are there. */
enum status cuda_lt_open(struct cuda *cuda, enum backend_gemm gemm);
enum status cuda_lt_tune(struct cuda *cuda);
void cuda_lt_close(struct cuda *cuda);
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
