/* cpu.h: what the files of the CPU backend share: its state, its scratch memory, its verbs.
 *
 *   cpu.c             table of verbs, choice of kernels, open and close, benchmarks' helpers
 *   cpu_dense.c       matrices, embedding mixture, norms
 *   cpu_attention.c   KV pool, qkv and attention
 *   cpu_candidates.c  statistics and candidates of logits
 *   cpu_pack, cpu_pool, cpu_memory, cpu_kernels: below these, each its own header
 *
 * Thread: verbs are called by the engine thread and run on the pool. Scratch grows while matrices
 * are made (before "ready") and never in a step; one copy per thread where threads write.
 */
#ifndef SFUMATO_BACKEND_CPU_H
#define SFUMATO_BACKEND_CPU_H

#include "backend/backend.h"
#include "backend/cpu_kernels.h"
#include "backend/cpu_memory.h"
#include "backend/cpu_pool.h"

/* KV pages: [layer][page][kv head] blocks of keys, then values (layouts: struct attention_block).
 */
struct cpu_kv {
    struct kv_spec spec;
    int dim_stride;     /* hd rounded up to 16 */
    size_t keys_bytes;  /* of one block; values follow at this offset */
    size_t block_bytes; /* keys and values of one block */
    unsigned char *data;
    float *raw; /* [rows_max][2 G hd]: keys and values of a step before norm and rotation */
    float *thread_scratch; /* [threads] x scratch_floats: q, scores and triples of a tile */
    size_t scratch_floats;
    float *partial; /* [partial_blocks] triples of one tile, when blocks are shared out */
    int partial_blocks;
};

struct cpu_slab_answer; /* cpu_candidates.c */

struct cpu {
    struct backend base;
    const struct cpu_kernels *kernels;
    cpu_pool *pool;
    struct cpu_memory memory;
    struct matrix *matrices;
    int rows_max, probes_max;
    struct cpu_kv kv;
    void *input; /* activations widened to fp32 or moved to padded coordinates */
    size_t input_bytes;
    float *acc; /* [threads] x acc_floats: sets of [rows_max][32] accumulators */
    size_t acc_floats;
    float *thread_row; /* [threads] x row_floats: one row of the vocabulary or of D */
    size_t row_floats;
    struct cpu_slab_answer *answers; /* [probes_max][slabs] */
};

static inline struct cpu *cpu_of(backend *b) { return (struct cpu *)b; }

/* Zeroed scratch, counted; NULL after fail(). */
void *cpu_scratch(struct cpu *cpu, size_t bytes);

enum status cpu_matrix_new(backend *b, const struct matrix_spec *spec, matrix **out);
void cpu_matrix_load(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                     const float *rows);
void cpu_matrix_share(backend *b, const matrix *m, int thread, int64_t *begin, int64_t *end);
void cpu_matrix_pack(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                     const struct matrix_rows *rows);
void cpu_embed_mix(backend *b, const struct batch *batch, const matrix *embed, int slab_count,
                   const int64_t *vocab_begin, float *out);
void cpu_add_norm(backend *b, int rows, int hidden, bool first, float scale, const float *sum,
                  float *x, const float *weight, float eps, enum backend_dtype dtype, void *h);
void cpu_add_norm_rows(backend *b, const int32_t *rows, int row_count, int hidden, const float *sum,
                       const float *x, const float *weight, float eps, enum backend_dtype dtype,
                       void *h);
void cpu_row_matmul(backend *b, int rows, const matrix *w, const void *in, float *partial);
void cpu_gate_up(backend *b, int rows, const matrix *w, const void *h, void *act);
void cpu_logits(backend *b, int rows, const matrix *w, const void *h, float *logits);
/* Output columns [0, split) go to a[T][split], the others to b[T][N - split]. */
void cpu_product_split(struct cpu *cpu, int rows, const matrix *w, const void *h, int64_t split,
                       float *a, float *b);

enum status cpu_kv_new(backend *b, const struct kv_spec *spec);
enum status cpu_kv_take(backend *b, int part, int parts);
void cpu_qkv(backend *b, const struct batch *batch, const struct attention_spec *spec,
             const void *h, float *q);
void cpu_attention(backend *b, const struct batch *batch, const struct attention_spec *spec,
                   const float *q, enum backend_dtype dtype, void *o);

enum status cpu_candidates_init(struct cpu *cpu);
void cpu_candidates(backend *b, const struct batch *batch, const float *logits, int slab_count,
                    const int64_t *vocab_begin, int64_t vocab_count, void *records);
void cpu_probe_logits(backend *b, const struct batch *batch, int probe, const float *logits,
                      int slab_count, const int64_t *vocab_begin, int64_t vocab_count, float *out);

#endif
