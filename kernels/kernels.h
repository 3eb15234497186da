/* kernels.h: every CUDA kernel of sfumato, as C functions. CUDA C++ stays behind this line.
 *
 * A launcher puts its kernels on a stream and returns at once: 0, or the CUDA runtime's
 * error number. All pointers are device memory unless a comment says host; no launcher allocates,
 * waits or talks to other ranks, so every one may be captured into a graph. Sizes come by value (a
 * graph is made per batch bucket), everything that changes from step to step lies in device memory.
 *
 *   T rows, D hidden, H query heads, G kv heads, hd head dim, F ffn columns, V vocabulary rows: the
 *   rank's own. bf16 weights and activations, fp32 residual, sums, scores and partials; KV in bf16
 *   or fp8.
 *
 * Packed weights, one layout for all products and for the embedding (mma.sync m16n8k16 fragments):
 *
 *   [row tile][column tile] 512 bytes = [lane 0..31] 16 bytes, lane = 4 g + t:
 *       W[g][4t .. 4t+3], W[g + 8][4t .. 4t+3]        of the tile's 16 rows and 16 columns
 *   GATE_UP: rows 0..7 of a tile are gate rows of 8 ffn columns, rows 8..15 their up rows
 *   column tiles run part by part; a part's last tile is filled up with zeros
 *
 * fp8 weights (e4m3, base/fp8.h): the same fragments of two column tiles in one load, and scales,
 *
 *   [row tile][pair of column tiles] 512 bytes = [lane] 16 bytes, lane = 4 g + t:
 *       4 bytes each of W[g] and W[g + 8] of the first tile, then of the second; the four are
 *       inputs 4t, 4t + 2, 4t + 1, 4t + 3
 *   behind them [row tile][block of 128 columns][2] fp32: scales of rows 0..7 and of rows 8..15,
 *       so that the gate and the up rows of a tile may have their own
 *   blocks count from the first column of each part; a part's last one is filled up with zeros
 *
 * Activations stay bf16 for any T. A weight is q * scale; q goes to the product as an exact bf16 and
 * the scale to the sum: a part's sum = fma(block sum, scale, sum) over its blocks in ascending
 * order, from 0, a block sum = one chain of products over its 128 columns, from 0.
 *
 * Numerics: gpu.md section 3. KERNELS_DETERMINISTIC: a row's bits do not depend on T or its
 * neighbours, and sums over slabs follow the tree of cpu.md section 3, so TP 1, 2, 4, 8 agree.
 * KERNELS_FAST: the same kernel from 5 rows on, a weight-streaming GEMV with its own order below.
 * Workspaces are zeroed once by the caller; kernels leave their counters at zero. One stream.
 */
#ifndef SFUMATO_KERNELS_KERNELS_H
#define SFUMATO_KERNELS_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st *kernels_stream; /* = cudaStream_t */

enum {
    KERNELS_TILE = 16,          /* rows and columns of a weight tile */
    KERNELS_PARTS_MAX = 8,      /* slabs of a rank, or pieces of K */
    KERNELS_PAGE_TOKENS = 64,   /* = kv/pages.h */
    KERNELS_SPLIT_TOKENS = 256, /* attention: tokens whose scores are normalised together */
    KERNELS_HEADS_TILE = 8,     /* query heads of one kv head that share a pass over the keys */
    KERNELS_HEAD_DIM_MAX = 256,
    KERNELS_CANDIDATES_MAX = 64,
    KERNELS_RANKS_MAX = 64,
    KERNELS_ROWS_MAX = 65535, /* of a step: the y of a grid */
};
enum kernels_mode { KERNELS_FAST, KERNELS_DETERMINISTIC };
enum kernels_dtype { KERNELS_BF16, KERNELS_FP8 }; /* of weights */
enum kernels_kind { KERNELS_COLUMN, KERNELS_GATE_UP, KERNELS_ROW }; /* = enum matrix_kind */

/* Once per process, after cudaSetDevice and before the first launch. */
int kernels_setup(void);
const char *kernels_error_text(int error);
int kernels_multiprocessors(void); /* of the device of kernels_setup */
/* Waits until everything on the stream is done; the first error of it, or 0. */
int kernels_wait(kernels_stream stream);
/* The device reads and writes malloc'ed memory (heterogeneous memory management): for tests. */
bool kernels_reads_host_memory(void);

/* ---- weights (pack.cu) ---- */

struct kernels_matrix {
    void *data; /* kernels_matrix_bytes, aligned to 16; set by the caller */
    enum kernels_dtype dtype;
    enum kernels_kind kind;
    int32_t row_tiles, col_tiles;
    int64_t rows, cols; /* N (GATE_UP: F), K local */
    /* Pieces of K, each one chain of products. ROW: the slabs (an empty one is absent); else 8
     * equal pieces. */
    int32_t part_count;
    int32_t part_begin[KERNELS_PARTS_MAX + 1]; /* columns */
    int32_t part_tile[KERNELS_PARTS_MAX + 1];  /* column tiles */
};
/* Host: fills everything but data. slab_begin: [slab_count + 1] column borders, ROW only. False:
 * more slabs than KERNELS_PARTS_MAX, or a size beyond int32 tiles. */
bool kernels_matrix_shape(enum kernels_dtype dtype, enum kernels_kind kind, int64_t rows,
                          int64_t cols, int slab_count, const int64_t *slab_begin,
                          struct kernels_matrix *out);
size_t kernels_matrix_bytes(const struct kernels_matrix *m);
/* rows: [row_count][K] fp32, rows [row_begin, +row_count) of part (GATE_UP: 0 gate, 1 up), rounded
 * to bf16 (RNE). The padding of data must have been zeroed before. */
int kernels_pack(kernels_stream stream, const struct kernels_matrix *m, int part, int64_t row_begin,
                 int64_t row_count, const float *rows);
/* The same of numbers that have been rounded already. */
int kernels_pack_bf16(kernels_stream stream, const struct kernels_matrix *m, int part,
                      int64_t row_begin, int64_t row_count, const uint16_t *rows);
/* Of an fp8 matrix: codes, and for each 128 rows from row_begin on (a multiple of 8) the scales of
 * their blocks of 128 columns: scales[ceil(row_count / 128)][col_tiles / 8]. */
int kernels_pack_fp8(kernels_stream stream, const struct kernels_matrix *m, int part,
                     int64_t row_begin, int64_t row_count, const uint8_t *rows,
                     const float *scales);

/* ---- embedding and norms (rows.cu) ---- */

/* Slabs of the vocabulary: ids [begin[s], begin[s + 1]) belong to slab s. By value, host. */
struct kernels_borders {
    int32_t count; /* <= KERNELS_PARTS_MAX */
    int64_t begin[KERNELS_PARTS_MAX + 1];
};
/* out[T][D] as embed_mix of backend.h, bit for bit as the CPU: mix_begin [T + 1], ids and weights
 * CSR. Row i of m is id begin[0] + i. */
int kernels_embed_mix(kernels_stream stream, int rows, const int32_t *mix_begin,
                      const uint32_t *mix_ids, const float *mix_weights,
                      const struct kernels_matrix *m, struct kernels_borders vocab, float *out);
/* x[T][D] = first ? scale * sum : x + sum; h[T][D] (bf16) = rmsnorm(x) * weight. */
int kernels_add_norm(kernels_stream stream, int rows, int hidden, bool first, float scale,
                     const float *sum, float *x, const float *weight, float eps, uint16_t *h);
/* h[i][D] = rmsnorm(x[rows[i]] + sum[rows[i]]) * weight; x is left alone. rows: [row_count],
 * device. */
int kernels_add_norm_rows(kernels_stream stream, const int32_t *rows, int row_count, int hidden,
                          const float *sum, const float *x, const float *weight, float eps,
                          uint16_t *h);
/* sum[count] = tree sum over ranks of gathered[ranks][count] (after ncclAllGather; comm.h's tree).
 */
int kernels_rank_tree(kernels_stream stream, int64_t count, int ranks, const float *gathered,
                      float *sum);

/* ---- sums and exchanges over peers' memory (reduce.cu) ---- */

/* Ranks whose GPUs see one another's memory. Each owns a region (kernels_peers_bytes, device memory
 * of its own that all have opened) and launches the same calls in the same order; a call's number
 * lives in the region, so calls may be captured and replayed. Sums are in tree order, whatever the
 * way, and x and h are those of kernels_add_norm after kernels_rank_tree, bit for bit.
 *
 * A kernel that waits for a peer looks at its watch now and then. When abort is set or patience is
 * over it sets failed and leaves, and so does every later kernel: what they should have written is
 * then undefined, and the host must end the job. */
enum { KERNELS_PEERS_MAX = 8 };
enum kernels_way { KERNELS_ONE_SHOT, KERNELS_TWO_SHOT };
struct kernels_watch { /* host memory mapped into the device; zeroed */
    uint64_t abort;    /* host writes */
    uint64_t failed;   /* device writes, last and with release: 1 patience over, 2 abort seen */
    uint32_t missing;  /* rank that was waited for */
    uint32_t gather;   /* in a gather, not a sum */
    uint64_t number;   /* of that kind of call, from 1; sums: of that way */
};
struct kernels_peers {
    int32_t rank, ranks;     /* 2..KERNELS_PEERS_MAX */
    int32_t buffers;         /* that one-shot sums rotate over: 3 (2 would be wrong, see reduce.cu) */
    int32_t blocks_max;      /* of a launch: all must fit on the device at once */
    int64_t one_shot_floats; /* largest one-shot sum; a multiple of 4, as the next */
    int64_t slot_floats;     /* largest sum */
    int64_t gather_words;    /* 4-byte words of a rank in one gather */
    uint64_t patience_ns;    /* 0: for ever */
    struct kernels_watch *watch;     /* as the device sees it */
    void *region[KERNELS_PEERS_MAX]; /* as this device sees them */
};
size_t kernels_peers_bytes(const struct kernels_peers *p);
/* Own region, before any peer's first call. */
int kernels_peers_clear(kernels_stream stream, const struct kernels_peers *p);
/* Where this rank's partial goes: [slot_floats], in its region. */
float *kernels_peers_slot(const struct kernels_peers *p);
/* sum[count] = tree over ranks of their slots. ONE_SHOT: count <= one_shot_floats. */
int kernels_peers_sum(kernels_stream stream, enum kernels_way way, const struct kernels_peers *p,
                      int64_t count, float *sum);
/* The same, then kernels_add_norm on the sum, in one launch. */
int kernels_peers_sum_norm(kernels_stream stream, enum kernels_way way,
                           const struct kernels_peers *p, int rows, int hidden, bool first,
                           float scale, float *x, const float *weight, float eps, uint16_t *h);
/* all[r * stride ..] = bytes of rank r's mine, for every r. bytes <= 4 gather_words. */
int kernels_peers_gather(kernels_stream stream, const struct kernels_peers *p, const void *mine,
                         size_t bytes, void *all, size_t stride);

/* ---- products (product.cu: mma; gemv.cu: up to 4 rows in fast mode; fp8.cu: fp8 weights) ---- */

/* For every matrix of the model: row_tiles_max = largest row_tiles. */
size_t kernels_product_workspace_bytes(int row_tiles_max);
/* COLUMN, ROW: out[T][N] fp32 = in[T][K] (bf16) W^T. ROW: +0.0f on each slab's partial, the slabs
 * along the tree, all -0.0f when no slab has columns. Any T: more than 64 rows go in groups of 64.
 */
int kernels_product(kernels_stream stream, enum kernels_mode mode, int rows,
                    const struct kernels_matrix *m, const uint16_t *in, float *out,
                    void *workspace);
/* GATE_UP: act[T][F] (bf16) = silu(in Wgate) * (in Wup). */
int kernels_gate_up(kernels_stream stream, enum kernels_mode mode, int rows,
                    const struct kernels_matrix *m, const uint16_t *in, uint16_t *act,
                    void *workspace);

/* ---- plain rows for a library's products (unpack.cu) ---- */

/* out[row_count][pitch] (bf16) = rows [row_begin, +row_count) of a packed matrix, K columns each; an
 * fp8 weight times its scale is rounded to bf16. GATE_UP: so many gate rows, then so many up rows. */
int kernels_unpack(kernels_stream stream, const struct kernels_matrix *m, int64_t row_begin,
                   int64_t row_count, uint16_t *out, int64_t pitch);
/* act[row][f] (bf16, rows `pitch` apart) = silu(gate) * up of gate_up[T][units gate, units up]. */
int kernels_swiglu(kernels_stream stream, int rows, int64_t units, const float *gate_up,
                   uint16_t *act, int64_t pitch);

/* ---- attention (heads.cu, attention.cu) ---- */

/* KV pool: [layer][page][G][keys then values][64 tokens][hd], bf16 or e4m3. An fp8 element stands for
 * itself times the scale of its layer, kv head and kind; what is too large for it becomes +-448. */
enum kernels_kv_type { KERNELS_KV_BF16, KERNELS_KV_FP8 };
struct kernels_kv {
    void *data; /* kernels_kv_bytes, aligned to 16 */
    int32_t layers, page_count, kv_heads, head_dim;
    enum kernels_kv_type type; /* FP8: hd is a multiple of 4; BF16: of 2 */
    const float *scales;       /* FP8: [layer][G][key, value] device, or NULL: all 1 */
};
size_t kernels_kv_bytes(const struct kernels_kv *kv);

/* One row of the step. position < 0: padding, touches no page and gives zeros. */
struct kernels_row {
    int32_t position; /* of the row in its sequence */
    int32_t
        page_begin; /* its sequence's list in pages; entry j holds positions [64 j, 64 j + 64) */
};
/* A run of query heads with one kv head. Host makes them from kv_of_head: consecutive heads of one
 * kv head, at most KERNELS_HEADS_TILE in a tile; the array is device memory. */
struct kernels_tile {
    int32_t head_begin, head_count, kv_head;
};
struct kernels_heads {
    int32_t heads, layer;         /* H; G and hd come from the kv pool */
    const float *bias;            /* [(H + 2 G) hd] or NULL */
    const float *q_norm, *k_norm; /* [hd] or NULL */
    float norm_eps;
    const float *rope_cos, *rope_sin; /* [positions][hd / 2] */
};
/* raw: [T][(H + 2 G) hd] fp32 from kernels_product with the qkv matrix. q[T][H][hd] fp32 =
 * rope(norm(. + bias)); keys and values of the rows go to their pages. Bits as the CPU's for equal
 * raw. */
int kernels_heads_append(kernels_stream stream, int rows, const struct kernels_row *row,
                         const int32_t *pages, struct kernels_heads spec, struct kernels_kv kv,
                         const float *raw, float *q);

struct kernels_attention {
    int32_t layer, heads;
    int32_t tile_count, tile_heads_max; /* the largest head_count of a tile */
    const struct kernels_tile *tiles;   /* [tile_count], device */
    /* Host bounds of this step (of the bucket, when captured). context_max: position + 1 of any row.
     * run_max: consecutive rows that are consecutive positions of one sequence; 1 takes the kernel
     * for decode, more the one where such rows share a pass over the keys. Same bits. */
    int32_t context_max, run_max;
};
/* For steps of up to `rows` rows that are all as long as context_max. */
size_t kernels_attention_workspace_bytes(int rows, int tile_count, int head_dim, int context_max);
/* o[T][H][hd] (bf16) = causal softmax(q k / sqrt hd) v over the pages, q rounded to bf16. A row's
 * bits depend on its position and its sequence only. With less workspace than the step needs whole
 * rows are divided among the blocks instead of splits of 256 tokens: same bits, less balanced. */
int kernels_attention(kernels_stream stream, int rows, const struct kernels_row *row,
                      const int32_t *pages, struct kernels_attention spec, struct kernels_kv kv,
                      const float *q, uint16_t *o, void *workspace, size_t workspace_bytes);

/* ---- statistics and candidates (candidates.cu) ---- */

struct batch_probe; /* backend/batch.h; device copies of the batch's arrays */
struct batch_edit;

struct kernels_probes {
    int32_t probe_count, candidate_count, watch_max;
    const struct batch_probe *probes;
    const struct batch_edit *edits;
    const uint32_t *watch_ids;
};
size_t kernels_candidates_workspace_bytes(int probes_max, int64_t vocab_local);
/* logits: [rows][V local]. records: probe_count x batch_record_bytes. As candidates of backend.h:
 * m, lists and watched values exactly, s and q in an order of their own. */
int kernels_candidates(kernels_stream stream, struct kernels_probes batch, const float *logits,
                       struct kernels_borders vocab, int64_t vocab_count, void *records,
                       void *workspace);
/* out[V local], device: z' of every local id for one probe, -inf from vocab_count on. */
int kernels_probe_logits(kernels_stream stream, struct kernels_probes batch, int probe,
                         const float *logits, struct kernels_borders vocab, int64_t vocab_count,
                         float *out);

/* ---- the thinking step (think.cu) ---- */

struct think_params; /* think/think.h */
struct think_state;
struct think_decision;

/* What a row brings. */
struct kernels_thinker {
    int32_t probe;       /* whose records decide */
    int32_t close_watch; /* index of the close marker among the probe's watched ids; -1: none */
    int32_t slot;        /* index into params, states and decisions */
};
/* gathered: [ranks] times probe_count records, rank_bytes apart. probe -1: the thinker rests, and its
 * status says nothing. decisions[slot] for each of the `count` thinkers; states
 * move on. status[slot]: 1 decided, 0 the list was too short (state unchanged, ask for the whole
 * row), -1 the row has no finite maximum, KERNELS_IMPOSSIBLE - r: rank r's record cannot be. */
enum { KERNELS_IMPOSSIBLE = -2 };
int kernels_think(kernels_stream stream, int count, const struct kernels_thinker *thinkers,
                  struct kernels_probes batch, int ranks, const void *gathered, size_t rank_bytes,
                  const struct think_params *params, struct think_state *states,
                  struct think_decision *decisions, int32_t *status);

/* ---- runs: decode steps that follow one another on the device (run.cu, backend/run.h) ---- */

struct run_answer;

/* What a row keeps between steps. */
struct kernels_slot {
    int32_t position;   /* of its next input; -1: it rests */
    int32_t page_begin; /* as in kernels_row */
    int32_t steps;      /* decisions it may still make */
    int32_t phase_bound;
    uint64_t stamp; /* of its next answer */
    int32_t count;  /* entries of its next input, >= 1, of a row that rests too */
    uint64_t hash;  /* of its latest decision */
    uint32_t ids[KERNELS_CANDIDATES_MAX];
    float weights[KERNELS_CANDIDATES_MAX];
};
/* A rank's part of the gather: rows control words, hash << 1 | stop, and the records behind them. */
struct kernels_run {
    int32_t rows, ranks; /* rows of the step, those that rest included */
    struct kernels_slot *slots;
    const struct think_params *params;
    struct think_state *states;
    struct think_decision *decisions;
    int32_t *status;
    struct kernels_thinker *thinkers;
    /* the batch of the step */
    struct kernels_row *row;
    int32_t *mix_begin;
    uint32_t *mix_ids;
    float *mix_weights;
    struct batch_probe *probes;
    uint64_t *control;          /* this rank's */
    const unsigned char *all;   /* [ranks], rank_bytes apart */
    size_t rank_bytes;
    /* Pinned host memory, as the device sees it. stop: [rows], NULL on other ranks than 0, whose answers
     * have no decision. answers: [answer_steps][answer_rows]; those of a stamp are at stamp modulo
     * answer_steps. */
    const uint32_t *stop;
    struct run_answer *answers;
    int32_t answer_steps, answer_rows;
};
/* slots ─► row, mix, temperatures of the probes, control. */
int kernels_run_step(kernels_stream stream, struct kernels_run run);
/* After kernels_think: status, decisions, control of all ranks ─► slots, thinkers, answers. */
int kernels_run_decide(kernels_stream stream, struct kernels_run run);

/* ---- measuring (bench.cu) ---- */

/* Reads bytes (a multiple of 16) once; sink: one word, its value means nothing. */
int kernels_sweep(kernels_stream stream, const void *memory, size_t bytes, uint32_t *sink);
/* mma.sync on registers only; *flops (host): operations of this launch. */
int kernels_peak(kernels_stream stream, int64_t rounds, float *sink, double *flops);
/* Asks for bytes (a multiple of 16) to be in L2. */
int kernels_prefetch(kernels_stream stream, const void *memory, size_t bytes);
/* Whether kernels may start before the one ahead of them ends (device.cuh); so it is from the start
 * where the device can. Returns what is now the case. For launches and captures that follow. */
bool kernels_overlap_launches(bool wanted);
/* One block that waits for so long. */
int kernels_spin(kernels_stream stream, uint64_t ns);

#ifdef __cplusplus
}
#endif

#endif
