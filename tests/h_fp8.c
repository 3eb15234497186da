/* h_fp8.c: what the loader sends to a device with memory of its own, seen from the other side.
 *
 * The backend here has no kernels: it keeps the codes and scales that upload->rows brings, by row of
 * its matrix. Of every rank's share of toy models it is then asked: was every row brought once, does
 * code * scale lie within half a step of the weight, does a block's largest weight use the whole
 * range, and are codes and scales of a weight the same for 1, 2 and 4 ranks? bf16 rows must be the
 * weights, rounded.
 */
#include "base/bf16.h"
#include "base/fp8.h"
#include "comm/comm.h"
#include "model/model.h"
#include "suite.h"
#include "support/toy_model.h"

enum { SLABS = 8, MATRICES_MAX = 64, THREADS = 3 };

/* As the loader made them: embed, then qkv, o, gate_up, down of each layer, then lm_head. */
struct matrix {
    struct matrix_spec spec;
    int64_t slab_begin[SHARD_SLABS_MAX + 1], blocks;
    int *brought; /* [parts][rows] */
    bf16 *rounded;
    fp8 *codes;    /* [parts][rows][cols] */
    float *scales; /* the same */
};

struct device {
    backend base;
    struct matrix matrices[MATRICES_MAX];
    int count;
    void *slot[BACKEND_SLOTS], *pieces[1024];
    size_t slot_bytes;
    int piece_count, waits;
};

static struct device *device_of(backend *b) { return (struct device *)b; }

static void *device_alloc(backend *b, size_t bytes, const char *what) {
    struct device *d = device_of(b);
    (void)what;
    CU_ASSERT_FATAL(d->piece_count < 1024);
    return d->pieces[d->piece_count++] = calloc(1, bytes + 1);
}

static enum status device_write(backend *b, void *to, const void *from, size_t bytes) {
    (void)b;
    memcpy(to, from, bytes);
    return STATUS_OK;
}

/* Where blocks of columns begin: anew in each slab of a ROW matrix. */
static int64_t block_of(const struct matrix *m, int64_t col) {
    if (m->spec.kind != MATRIX_ROW) return col / 128;
    int64_t before = 0;
    int s = 0;
    for (; col >= m->slab_begin[s + 1]; s++)
        before += (m->slab_begin[s + 1] - m->slab_begin[s] + 127) / 128;
    return before + (col - m->slab_begin[s]) / 128;
}

static enum status device_matrix_new(backend *b, const struct matrix_spec *spec, matrix **out) {
    struct device *d = device_of(b);
    CU_ASSERT_FATAL(d->count < MATRICES_MAX);
    struct matrix *m = *out = &d->matrices[d->count++];
    const size_t rows = (size_t)spec->rows * (spec->kind == MATRIX_GATE_UP ? 2 : 1);
    m->spec = *spec;
    for (int s = 0; spec->kind == MATRIX_ROW && s <= spec->slab_count; s++)
        m->slab_begin[s] = spec->slab_begin[s];
    m->blocks = spec->cols > 0 ? block_of(m, spec->cols - 1) + 1 : 0;
    m->brought = calloc(rows + 1, sizeof *m->brought);
    m->rounded = calloc(rows * (size_t)spec->cols + 1, sizeof *m->rounded);
    m->codes = calloc(rows * (size_t)spec->cols + 1, 1);
    m->scales = calloc(rows * (size_t)spec->cols + 1, sizeof *m->scales);
    return STATUS_OK;
}

static enum status upload_begin(backend *b, size_t *bytes, void *slot[BACKEND_SLOTS]) {
    struct device *d = device_of(b);
    b->host_threads = THREADS;
    *bytes *= THREADS;
    d->slot_bytes = *bytes;
    for (int i = 0; i < BACKEND_SLOTS; i++) slot[i] = d->slot[i] = malloc(*bytes);
    return STATUS_OK;
}

static bool in_slot(const struct device *d, const void *p, size_t bytes) {
    for (int i = 0; i < BACKEND_SLOTS; i++)
        if ((const char *)p >= (char *)d->slot[i] &&
            (const char *)p + bytes <= (char *)d->slot[i] + d->slot_bytes)
            return true;
    return false;
}

static void upload_rows(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                        const void *rows, const float *scales) {
    struct device *d = device_of(b);
    const int64_t cols = m->spec.cols;
    const bool is_fp8 = m->spec.dtype == BACKEND_FP8;
    CU_ASSERT_FATAL(in_slot(d, rows, (size_t)(row_count * cols) * (is_fp8 ? 1 : 2)));
    if (is_fp8) {
        const int64_t groups = (row_count + 127) / 128;
        CU_ASSERT_FATAL(in_slot(d, scales, sizeof(float) * (size_t)(groups * m->blocks)));
        CU_ASSERT(row_begin % 8 == 0);
    }
    for (int64_t i = 0; i < row_count; i++) {
        const int64_t at = part * m->spec.rows + row_begin + i;
        m->brought[at]++;
        for (int64_t k = 0; k < cols; k++) {
            if (is_fp8) {
                m->codes[at * cols + k] = ((const fp8 *)rows)[i * cols + k];
                m->scales[at * cols + k] = scales[i / 128 * m->blocks + block_of(m, k)];
            } else {
                m->rounded[at * cols + k] = ((const bf16 *)rows)[i * cols + k];
            }
        }
    }
}

static void upload_wait(backend *b, int slot) {
    device_of(b)->waits++;
    CU_ASSERT(slot >= 0 && slot < BACKEND_SLOTS);
}

static void upload_end(backend *b) {
    for (int i = 0; i < BACKEND_SLOTS; i++) free(device_of(b)->slot[i]);
}

static void device_host_run(backend *b, void (*run)(void *context, int thread), void *context) {
    for (int t = b->host_threads - 1; t >= 0; t--) run(context, t);
}

static const struct backend_upload upload = {upload_begin, upload_rows, upload_wait, upload_end};
static const struct backend_ops device_ops = {.name = "device",
                                              .alloc = device_alloc,
                                              .write = device_write,
                                              .matrix_new = device_matrix_new,
                                              .upload = &upload,
                                              .host_run = device_host_run};

static void device_free(struct device *d) {
    for (int i = 0; i < d->count; i++) {
        struct matrix *m = &d->matrices[i];
        free(m->brought), free(m->rounded), free(m->codes), free(m->scales);
    }
    for (int i = 0; i < d->piece_count; i++) free(d->pieces[i]);
    free(d);
}

/* Codes and scales of a tensor by its own rows and columns, as the first run made them. */
struct known {
    fp8 *codes;
    float *scales, *weights;
    int64_t rows, cols;
};

static void known_open(struct known *k, source *src, const char *name) {
    struct source_tensor t;
    CU_ASSERT_FATAL(src->ops->find(src, name, &t));
    const size_t n = (size_t)(t.rows * t.cols);
    *k = (struct known){malloc(n), malloc(n * sizeof(float)), malloc(n * sizeof(float)), t.rows,
                        t.cols};
    memset(k->scales, 0xff, n * sizeof(float)); /* NaN: not known yet */
    CU_ASSERT(src->ops->read(src, name, 0, t.rows, 0, t.cols, k->weights) == STATUS_OK);
}

static void known_close(struct known *k) { free(k->codes), free(k->scales), free(k->weights); }

/* Rows [to, +count) of a part of m are rows from `row`, columns from `col` of the tensor. */
static int compare(struct known *k, const struct matrix *m, int part, int64_t to, int64_t row,
                   int64_t count, int64_t col) {
    int wrong = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t mine = part * m->spec.rows + to + i;
        wrong += m->brought[mine] != 1;
        for (int64_t c = 0; c < m->spec.cols; c++) {
            const int64_t at = (row + i) * k->cols + col + c, own = mine * m->spec.cols + c;
            const double scale = (double)m->scales[own], w = (double)k->weights[at];
            const double q = (double)fp8_to_float(m->codes[own]);
            const double step = fmax(0x1p-9, ldexp(1.0, ilogb(fmax(fabs(q), 0x1p-9)) - 3));
            wrong += !(fabs(w / scale - q) <= step * 0.5001 && fabs(w) <= 448.001 * scale);
            if (k->scales[at] != k->scales[at]) {
                k->scales[at] = m->scales[own];
                k->codes[at] = m->codes[own];
            }
            wrong += k->scales[at] != m->scales[own] || k->codes[at] != m->codes[own];
        }
    }
    return wrong;
}

/* The largest code of every block of the first matrix is the largest there is. */
static int blocks_not_full(const struct matrix *m, int64_t rows) {
    int wrong = 0;
    for (int64_t b = 0; b < m->blocks; b++) {
        unsigned most = 0;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < m->spec.cols; c++)
                if (block_of(m, c) == b && (m->codes[r * m->spec.cols + c] & 0x7fu) > most)
                    most = m->codes[r * m->spec.cols + c] & 0x7fu;
        wrong += most != 0x7e;
    }
    return wrong;
}

static void check_toy(const char *toy) {
    static const char *const names[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
    static const char *const ffn_names[] = {"gate_proj", "up_proj", "down_proj"};
    struct model_config c;
    struct known known[7], embed;
    comm *alone = NULL;
    source *src = NULL;
    char name[96];
    CU_ASSERT_FATAL(toy_config(toy, &c) && synthetic_open(&c, 3, &src) == STATUS_OK);
    CU_ASSERT_FATAL(comm_open_alone(&alone) == STATUS_OK);
    for (int i = 0; i < 7; i++) {
        snprintf(name, sizeof name, "model.layers.0.%s.%s.weight", i < 4 ? "self_attn" : "mlp",
                 i < 4 ? names[i] : ffn_names[i - 4]);
        known_open(&known[i], src, name);
    }
    known_open(&embed, src, "model.embed_tokens.weight");
    for (int ranks = 1; ranks <= 4; ranks *= 2)
        for (int rank = 0; rank < ranks; rank++) {
            struct device *d = calloc(1, sizeof *d);
            struct shard_dims dims;
            shard_map shard;
            model *m = NULL;
            d->base.ops = &device_ops;
            const struct model_options options = {.weight_dtype = BACKEND_FP8,
                                                  .kv_dtype = BACKEND_BF16,
                                                  .slabs = SLABS,
                                                  .slice_ranks = ranks,
                                                  .slice_rank = rank,
                                                  .rows_max = 1,
                                                  .logit_rows_max = 1,
                                                  .max_positions = 16,
                                                  .vocab_count = c.vocab_rows};
            CHECK_EQ(model_open(src, &options, &d->base, alone, NULL, NULL, &m), STATUS_OK);
            CU_ASSERT_FATAL(m != NULL);
            config_shard_dims(&c, &dims);
            shard_map_init(&shard, &dims, SLABS, ranks, rank);
            const struct matrix *qkv = &d->matrices[1], *o = qkv + 1, *gate_up = o + 1,
                                *down = gate_up + 1;
            const int64_t hd = c.head_dim, q = shard_head_count(&shard) * hd,
                          kv = shard_kv_count(&shard) * hd, ffn = shard_ffn_count(&shard);
            const int64_t head = shard.head_begin[0] * hd, first_kv = shard.kv_begin * hd;
            int wrong = compare(&known[0], qkv, 0, 0, head, q, 0);
            wrong += compare(&known[1], qkv, 0, q, first_kv, kv, 0);
            wrong += compare(&known[2], qkv, 0, q + kv, first_kv, kv, 0);
            wrong += compare(&known[3], o, 0, 0, 0, c.hidden, head);
            wrong += compare(&known[4], gate_up, 0, 0, shard.ffn_begin[0], ffn, 0);
            wrong += compare(&known[5], gate_up, 1, 0, shard.ffn_begin[0], ffn, 0);
            wrong += compare(&known[6], down, 0, 0, 0, c.hidden, shard.ffn_begin[0]);
            CHECK_EQ(wrong, 0);
            CHECK_EQ(blocks_not_full(o, c.hidden < 128 ? c.hidden : 128), 0);
            CHECK_EQ(blocks_not_full(down, c.hidden < 128 ? c.hidden : 128), 0);
            const struct matrix *e = &d->matrices[0];
            CHECK_EQ(e->spec.dtype, BACKEND_BF16); /* never fp8 */
            const float *rows = embed.weights + shard.vocab_begin[0] * c.hidden;
            for (int64_t i = 0; i < e->spec.rows * c.hidden; i++)
                wrong += e->rounded[i] != bf16_from_float(rows[i]);
            CHECK_EQ(wrong, 0);
            CU_ASSERT(d->waits > 0);
            model_close(m);
            device_free(d);
        }
    for (int i = 0; i < 7; i++) known_close(&known[i]);
    known_close(&embed);
    comm_close(alone);
    source_close(src);
}

static void test_toys(void) {
    check_toy("toy_qk");
    check_toy("toy_gqa3");
}

const struct suite_case suite_cases[] = {
    {"fp8 blocks: within half a step, full range, the same for any number of ranks", test_toys},
    {NULL, NULL},
};
