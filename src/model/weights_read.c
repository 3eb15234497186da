/* weights_read.c: rows from the source into the backend's matrices, on all host threads of the rank.
 *
 * weights.c says what goes where: a list of runs of rows. They are worked off a slot at a time: as
 * many rows as a slot holds, of one run or several ("chunks"), are cut into pieces that the host
 * threads take one after the other: read as fp32, checked for NaN and infinity, brought into the
 * form the backend wants.
 *
 *   backend          a slot holds             then
 *   host memory      [rows][K] fp32           matrix_load packs it, on the same threads
 *   with upload      [rows][K] bf16           upload->rows queues it while the next slot is filled
 *   with upload      [rows][K] fp8, scales
 *
 * An fp8 block is 128 rows of a run by 128 columns, both counted from where the run and the slab
 * begin, so that the blocks, and with them the numbers, are the same for any number of ranks; in
 * models whose slabs are multiples of 128 they are the blocks of the whole matrix. Where the file
 * has one scale for all of a block, that one is kept and its codes come back exactly (a_fp8.c);
 * elsewhere the scale is the largest magnitude / 448.
 *
 * Beside the packed weights only the slots are in memory. Thread: engine; pieces run on the pool.
 */
#include "model/weights_read.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/bf16.h"
#include "base/fp8.h"

enum {
    SLOT_BYTES = 32 << 20,  /* in host memory: a barrier a slot, so not too small either */
    UPLOAD_BYTES = 4 << 20, /* the same on the way to a device, where few large copies are faster */
    PIECE_FLOATS = 1 << 18,
    CHUNKS_MAX = 512,
};

/* Rows of one run in the slot, and what is left to do with them. */
struct chunk {
    const struct weights_run *run;
    int64_t row, row_count; /* rows of the run */
    void *rows;             /* in the slot */
    float *scales;          /* fp8 */
    int64_t piece_rows;
    int64_t piece_end; /* pieces of this and all chunks before */
};

struct reading {
    source *src;
    bool upload;
    int threads;
    float *scratch; /* [threads][scratch_floats]: upload only */
    int64_t scratch_floats;
    struct chunk chunks[CHUNKS_MAX];
    int chunk_count;
    atomic_int_least64_t next_piece;
    atomic_int failed; /* enum status of the first that failed: whoever set it writes fault */
    struct fault fault;
};

/* ---- blocks of fp8 ---- */

int64_t weights_column_blocks(const struct matrix_spec *spec) {
    if (spec->kind != MATRIX_ROW) return (spec->cols + FP8_BLOCK - 1) / FP8_BLOCK;
    int64_t count = 0;
    for (int s = 0; s < spec->slab_count; s++)
        count += (spec->slab_begin[s + 1] - spec->slab_begin[s] + FP8_BLOCK - 1) / FP8_BLOCK;
    return count;
}

static float largest_magnitude(const float *rows, int64_t row_count, int64_t pitch, int64_t n) {
    uint32_t most = 0;
    for (int64_t r = 0; r < row_count; r++) {
        for (int64_t k = 0; k < n; k++) {
            uint32_t bits;
            memcpy(&bits, rows + r * pitch + k, sizeof bits);
            bits &= 0x7fffffffu; /* magnitudes order as integers */
            most = bits > most ? bits : most;
        }
    }
    float out;
    memcpy(&out, &most, sizeof out);
    return out;
}

/* Columns [begin, end) of a group of rows, block by block from `begin` on; returns the next scale. */
static float *quantise(const struct reading *r, const struct weights_run *run, int64_t row,
                       int64_t row_count, const float *rows, int64_t begin, int64_t end, fp8 *codes,
                       float *scales) {
    const int64_t cols = run->spec->cols, count = (end - begin + FP8_BLOCK - 1) / FP8_BLOCK;
    const bool kept = r->src->ops->block_scales &&
                      r->src->ops->block_scales(r->src, run->name, run->row_begin + row, row_count,
                                                run->col_begin + begin, end - begin, scales);
    for (int64_t b = 0; b < count; b++) {
        const int64_t from = begin + b * FP8_BLOCK;
        const int64_t n = end - from < FP8_BLOCK ? end - from : FP8_BLOCK;
        if (!kept) scales[b] = fp8_scale(largest_magnitude(rows + from, row_count, cols, n));
        for (int64_t i = 0; i < row_count; i++)
            for (int64_t k = from; k < from + n; k++)
                codes[i * cols + k] = fp8_quantise(rows[i * cols + k], scales[b]);
    }
    return scales + count;
}

/* ---- pieces ---- */

static enum status expect_finite(const struct reading *r, const struct weights_run *run,
                                 const float *values, int64_t row, int64_t row_count) {
    const int64_t cols = run->spec->cols, bad = weights_not_finite(values, row_count * cols);
    if (bad < 0) return STATUS_OK;
    return weights_fail_not_finite(r->src, run->name, (double)values[bad],
                                   run->row_begin + row + bad / cols, run->col_begin + bad % cols);
}

/* Rows [row, +n) of the run, which are rows [at, +n) of the chunk. */
static enum status read_piece(struct reading *r, const struct chunk *c, int64_t at, int64_t n,
                              float *scratch) {
    const struct weights_run *run = c->run;
    const struct matrix_spec *spec = run->spec;
    const int64_t cols = spec->cols, row = c->row + at;
    float *values = r->upload ? scratch : (float *)c->rows + at * cols;
    TRY(r->src->ops->read(r->src, run->name, run->row_begin + row, n, run->col_begin, cols,
                          values));
    TRY(expect_finite(r, run, values, row, n));
    if (!r->upload) return STATUS_OK;
    if (spec->dtype == BACKEND_BF16) {
        bf16_round(values, n * cols, (bf16 *)c->rows + at * cols);
        return STATUS_OK;
    }
    fp8 *codes = (fp8 *)c->rows + at * cols;
    float *scales = c->scales + at / FP8_BLOCK * weights_column_blocks(spec);
    if (spec->kind != MATRIX_ROW) {
        quantise(r, run, row, n, values, 0, cols, codes, scales);
    } else {
        for (int s = 0; s < spec->slab_count; s++)
            scales = quantise(r, run, row, n, values, spec->slab_begin[s], spec->slab_begin[s + 1],
                              codes, scales);
    }
    return STATUS_OK;
}

static void read_pieces(void *context, int thread) {
    struct reading *r = context;
    float *scratch = r->scratch ? r->scratch + thread * r->scratch_floats : NULL;
    int at = 0;
    for (;;) {
        const int64_t piece = atomic_fetch_add(&r->next_piece, 1);
        while (at < r->chunk_count && piece >= r->chunks[at].piece_end) at++;
        if (at == r->chunk_count || atomic_load(&r->failed)) return;
        const struct chunk *c = &r->chunks[at];
        const int64_t in_chunk = piece - (at > 0 ? r->chunks[at - 1].piece_end : 0);
        const int64_t row = in_chunk * c->piece_rows, left = c->row_count - row;
        const enum status status =
            read_piece(r, c, row, left < c->piece_rows ? left : c->piece_rows, scratch);
        int none = STATUS_OK;
        if (status != STATUS_OK && atomic_compare_exchange_strong(&r->failed, &none, (int)status))
            r->fault = *fail_last();
    }
}

/* ---- slots ---- */

/* Bytes of n rows in a slot: the rows, then the scales, each aligned to 16. */
static size_t rows_bytes(const struct reading *r, const struct matrix_spec *spec, int64_t n) {
    const size_t element = !r->upload ? sizeof(float) : spec->dtype == BACKEND_FP8 ? 1 : 2;
    return ((size_t)(n * spec->cols) * element + 15) / 16 * 16;
}
static size_t scales_bytes(const struct reading *r, const struct matrix_spec *spec, int64_t n) {
    if (!r->upload || spec->dtype != BACKEND_FP8) return 0;
    const size_t groups = (size_t)((n + FP8_BLOCK - 1) / FP8_BLOCK);
    return (groups * (size_t)weights_column_blocks(spec) * sizeof(float) + 15) / 16 * 16;
}

/* Rows that are read together at least. */
static int64_t unit_rows(const struct reading *r, const struct matrix_spec *spec) {
    return r->upload && spec->dtype == BACKEND_FP8 ? FP8_BLOCK : 1;
}

/* Takes rows from *run on, row *row, until the slot is full or the list ends. */
static void fill(struct reading *r, const struct weights_runs *list, size_t *run, int64_t *row,
                 char *slot, size_t slot_bytes) {
    int64_t pieces = 0;
    r->chunk_count = 0;
    while (*run < list->count && r->chunk_count < CHUNKS_MAX) {
        const struct weights_run *now = &list->runs[*run];
        const int64_t unit = unit_rows(r, now->spec);
        const size_t unit_bytes = rows_bytes(r, now->spec, unit) + scales_bytes(r, now->spec, unit);
        int64_t n = now->row_count - *row;
        const int64_t fit = (int64_t)(slot_bytes / unit_bytes) * unit;
        if (n > fit) n = fit;
        if (n == 0) return; /* never with an empty slot: it holds a unit of any run */
        struct chunk *c = &r->chunks[r->chunk_count++];
        *c = (struct chunk){.run = now, .row = *row, .row_count = n, .rows = slot};
        c->scales = (float *)(void *)(slot + rows_bytes(r, now->spec, n));
        c->piece_rows = unit > 1 ? unit : PIECE_FLOATS / now->spec->cols;
        if (c->piece_rows < 1) c->piece_rows = 1;
        c->piece_end = pieces += (n + c->piece_rows - 1) / c->piece_rows;
        const size_t used = rows_bytes(r, now->spec, n) + scales_bytes(r, now->spec, n);
        slot += used;
        slot_bytes -= used;
        *row += n;
        if (*row == now->row_count) {
            *row = 0;
            ++*run;
        }
    }
}

static void hand_over(const struct reading *r, backend *be) {
    for (int i = 0; i < r->chunk_count; i++) {
        const struct chunk *c = &r->chunks[i];
        const struct weights_run *run = c->run;
        const int64_t to_row = run->to_row + c->row;
        if (r->upload)
            be->ops->upload->rows(be, run->to, run->part, to_row, c->row_count, c->rows, c->scales);
        else
            be->ops->matrix_load(be, run->to, run->part, to_row, c->row_count, c->rows);
    }
}

static enum status read_all(struct reading *r, const struct weights_runs *list, backend *be,
                            void *const slot[BACKEND_SLOTS], size_t slot_bytes, int slots,
                            void (*progress)(void *user, int64_t done, int64_t total), void *user) {
    size_t run = 0;
    int64_t row = 0, done = 0, total = 0;
    for (size_t i = 0; i < list->count; i++)
        total += list->runs[i].row_count * list->runs[i].spec->cols;
    for (int i = 0; run < list->count; i = (i + 1) % slots) {
        if (r->upload) be->ops->upload->wait(be, i);
        fill(r, list, &run, &row, slot[i], slot_bytes);
        atomic_store(&r->next_piece, 0);
        be->ops->host_run(be, read_pieces, r);
        if (atomic_load(&r->failed))
            return fail((enum status)atomic_load(&r->failed), "%s", r->fault.text);
        hand_over(r, be);
        for (int c = 0; c < r->chunk_count; c++)
            done += r->chunks[c].row_count * r->chunks[c].run->spec->cols;
        if (progress) progress(user, done, total);
    }
    return STATUS_OK;
}

enum status weights_read(source *src, backend *be, const struct weights_runs *list,
                         void (*progress)(void *user, int64_t done, int64_t total), void *user) {
    enum status status = STATUS_OK;
    void *slot[BACKEND_SLOTS] = {NULL};
    struct reading *r = calloc(1, sizeof *r);
    if (!r) return fail(STATUS_MEMORY, "no memory to read weights");
    r->src = src;
    r->upload = be->ops->upload != NULL;
    /* a thread's share of a slot holds a unit of any run, and its scratch the same in fp32 */
    size_t slot_bytes = r->upload ? UPLOAD_BYTES : SLOT_BYTES / (size_t)be->host_threads;
    size_t least = 1;
    for (size_t i = 0; i < list->count; i++) {
        const struct matrix_spec *spec = list->runs[i].spec;
        const int64_t unit = unit_rows(r, spec), floats = unit * spec->cols;
        const size_t bytes = rows_bytes(r, spec, unit) + scales_bytes(r, spec, unit);
        if (bytes > slot_bytes) slot_bytes = bytes;
        if (bytes > least) least = bytes;
        if (floats > r->scratch_floats) r->scratch_floats = floats;
    }
    if (r->scratch_floats < PIECE_FLOATS) r->scratch_floats = PIECE_FLOATS;
    if (r->upload) {
        TRY_GOTO(be->ops->upload->begin(be, &slot_bytes, slot), out);
        r->scratch = malloc((size_t)(be->host_threads * r->scratch_floats) * sizeof(float));
    } else {
        slot_bytes *= (size_t)be->host_threads;
        slot[0] = malloc(slot_bytes);
        while (!slot[0] && slot_bytes / 2 >= least * (size_t)be->host_threads) {
            slot_bytes /= 2; /* slower, but what was found to fit must not fail for its way here */
            slot[0] = malloc(slot_bytes);
        }
    }
    if (r->upload ? !r->scratch : !slot[0])
        TRY_GOTO(fail(STATUS_MEMORY, "no memory to read weights through"), out);
    status = read_all(r, list, be, slot, slot_bytes, r->upload ? BACKEND_SLOTS : 1, progress, user);
out:
    if (r->upload)
        be->ops->upload->end(be);
    else
        free(slot[0]);
    free(r->scratch);
    free(r);
    return status;
}
