/* weights_upload.c: rows from the source to a device with memory of its own, a slot at a time.
 *
 * The list of weights_read.c, but rows go through slots that the device can read: as many rows as a
 * slot holds, of one run or several ("chunks"), are cut into pieces that the host threads take one
 * after the other: read as fp32, checked for NaN and infinity, brought into the form the device
 * wants ([rows][K] bf16, or fp8 codes and scales), then queued, while the next slot is filled. bf16
 * of the file stays bf16.
 *
 * An fp8 block is 128 rows of a run by 128 columns, both counted from where the run and the slab
 * begin, so that the blocks, and with them the numbers, are the same for any number of ranks; in
 * models whose slabs are multiples of 128 they are the blocks of the whole matrix. Where the file
 * has one scale for all of a block, that one is kept and its codes come back exactly (a_fp8.c);
 * elsewhere the scale is the largest magnitude / 448.
 *
 *
 * Thread: engine; pieces run on the host threads.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/bf16.h"
#include "base/fp8.h"
#include "model/weights_read.h"

enum {
    UPLOAD_BYTES = 4 << 20, /* a thread's share of a slot: few large copies are faster */
    PIECE_FLOATS = 1 << 18,
    CHUNKS_MAX = 512,
};

/* Rows of one run in the slot, and what is left to do with them. */
struct chunk {
    const struct weights_run *run;
    int64_t row, row_count; /* rows of the run */
    void *rows;             /* in the slot */
    float *scales;          /* fp8 */
    bool as_bf16;           /* read so from the file */
    int64_t piece_rows;
    int64_t piece_end; /* pieces of this and all chunks before */
};

struct reading {
    source *src;
    float *scratch; /* [host_threads][scratch_floats] */
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

/* ---- pieces ---- */

/* Rows [row, +n) of the run become codes and scales. */
static void quantise_rows(const struct reading *r, const struct weights_run *run, int64_t row,
                          int64_t n, const float *values, fp8 *codes, float *scales) {
    const struct matrix_spec *spec = run->spec;
    if (spec->kind != MATRIX_ROW) {
        quantise(r, run, row, n, values, 0, spec->cols, codes, scales);
        return;
    }
    for (int s = 0; s < spec->slab_count; s++)
        scales = quantise(r, run, row, n, values, spec->slab_begin[s], spec->slab_begin[s + 1],
                          codes, scales);
}

/* Rows [row, +n) of the run, which are rows [at, +n) of the chunk. */
static enum status read_piece(struct reading *r, const struct chunk *c, int64_t at, int64_t n,
                              float *values) {
    const struct weights_run *run = c->run;
    const struct matrix_spec *spec = run->spec;
    const struct source_ops *ops = r->src->ops;
    const int64_t cols = spec->cols, row = c->row + at, from = run->row_begin + row;
    if (c->as_bf16) {
        bf16 *rows = (bf16 *)c->rows + at * cols;
        TRY(ops->read_bf16(r->src, run->name, from, n, run->col_begin, cols, rows));
        return weights_expect_finite_bf16(r->src, run, row, n, rows);
    }
    TRY(ops->read(r->src, run->name, from, n, run->col_begin, cols, values));
    TRY(weights_expect_finite(r->src, run, row, n, values));
    if (spec->dtype == BACKEND_BF16)
        bf16_round(values, n * cols, (bf16 *)c->rows + at * cols);
    else
        quantise_rows(r, run, row, n, values, (fp8 *)c->rows + at * cols,
                      c->scales + at / FP8_BLOCK * weights_column_blocks(spec));
    return STATUS_OK;
}

static void read_pieces(void *context, int thread) {
    struct reading *r = context;
    float *scratch = r->scratch + thread * r->scratch_floats;
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
static size_t rows_bytes(const struct matrix_spec *spec, int64_t n) {
    const size_t element = spec->dtype == BACKEND_FP8 ? sizeof(fp8) : sizeof(bf16);
    return ((size_t)(n * spec->cols) * element + 15) / 16 * 16;
}
static size_t scales_bytes(const struct matrix_spec *spec, int64_t n) {
    if (spec->dtype != BACKEND_FP8) return 0;
    const size_t groups = (size_t)((n + FP8_BLOCK - 1) / FP8_BLOCK);
    return (groups * (size_t)weights_column_blocks(spec) * sizeof(float) + 15) / 16 * 16;
}

/* Rows that are read together at least. */
static int64_t unit_rows(const struct matrix_spec *spec) {
    return spec->dtype == BACKEND_FP8 ? FP8_BLOCK : 1;
}

/* Takes rows from *run on, row *row, until the slot is full or the list ends. */
static void fill(struct reading *r, const struct weights_runs *list, size_t *run, int64_t *row,
                 char *slot, size_t slot_bytes) {
    int64_t pieces = 0;
    r->chunk_count = 0;
    while (*run < list->count && r->chunk_count < CHUNKS_MAX) {
        const struct weights_run *now = &list->runs[*run];
        const int64_t unit = unit_rows(now->spec);
        const size_t unit_bytes = rows_bytes(now->spec, unit) + scales_bytes(now->spec, unit);
        int64_t n = now->row_count - *row;
        const int64_t fit = (int64_t)(slot_bytes / unit_bytes) * unit;
        if (n > fit) n = fit;
        if (n == 0) return; /* never with an empty slot: it holds a unit of any run */
        struct chunk *c = &r->chunks[r->chunk_count++];
        *c = (struct chunk){.run = now, .row = *row, .row_count = n, .rows = slot};
        c->as_bf16 = weights_file_has_bf16(r->src, now);
        c->scales = (float *)(void *)(slot + rows_bytes(now->spec, n));
        c->piece_rows = unit > 1 ? unit : PIECE_FLOATS / now->spec->cols;
        if (c->piece_rows < 1) c->piece_rows = 1;
        c->piece_end = pieces += (n + c->piece_rows - 1) / c->piece_rows;
        const size_t used = rows_bytes(now->spec, n) + scales_bytes(now->spec, n);
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
        be->ops->upload->rows(be, c->run->to, c->run->part, c->run->to_row + c->row, c->row_count,
                              c->rows, c->scales);
    }
}

static enum status read_all(struct reading *r, const struct weights_runs *list, backend *be,
                            void *const slot[BACKEND_SLOTS], size_t slot_bytes,
                            void (*progress)(void *user, int64_t done, int64_t total), void *user) {
    size_t run = 0;
    int64_t row = 0, done = 0, total = 0;
    for (size_t i = 0; i < list->count; i++)
        total += list->runs[i].row_count * list->runs[i].spec->cols;
    for (int i = 0; run < list->count; i = (i + 1) % BACKEND_SLOTS) {
        be->ops->upload->wait(be, i);
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

enum status weights_upload(source *src, backend *be, const struct weights_runs *list,
                           void (*progress)(void *user, int64_t done, int64_t total), void *user) {
    enum status status;
    void *slot[BACKEND_SLOTS] = {NULL};
    struct reading *r = calloc(1, sizeof *r);
    if (!r) return fail(STATUS_MEMORY, "no memory to read weights");
    r->src = src;
    /* a thread's share of a slot holds a unit of any run, and its scratch the same in fp32 */
    size_t slot_bytes = UPLOAD_BYTES;
    r->scratch_floats = PIECE_FLOATS;
    for (size_t i = 0; i < list->count; i++) {
        const struct matrix_spec *spec = list->runs[i].spec;
        const int64_t unit = unit_rows(spec), floats = unit * spec->cols;
        const size_t bytes = rows_bytes(spec, unit) + scales_bytes(spec, unit);
        if (bytes > slot_bytes) slot_bytes = bytes;
        if (floats > r->scratch_floats) r->scratch_floats = floats;
    }
    TRY_GOTO(be->ops->upload->begin(be, &slot_bytes, slot), out);
    r->scratch = malloc((size_t)(be->host_threads * r->scratch_floats) * sizeof(float));
    if (!r->scratch) TRY_GOTO(fail(STATUS_MEMORY, "no memory to read weights through"), out);
    status = read_all(r, list, be, slot, slot_bytes, progress, user);
out:
    be->ops->upload->end(be);
    free(r->scratch);
    free(r);
    return status;
}
