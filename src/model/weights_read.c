/* weights_read.c: rows from the source into matrices in host memory, on all threads of the rank.
 *
 * weights.c says what goes where: a list of runs of rows. Every thread walks the whole list and
 * takes of each run the rows whose panels are its own, a piece at a time: read into its scratch,
 * which stays in its cache, checked for NaN and infinity, packed. No thread waits for another, and
 * a page of the weights is first written by the thread that will read it.
 *
 *   thread 0   run 0 [....      ]   run 1 [...    ]   ...     scratch: one piece
 *   thread 1   run 0 [    ......]   run 1 [   ....]   ...     ahead of it: AHEAD_ELEMENTS asked
 *                                                             of the disk
 *
 * A piece is fp32, or bf16 as in the file where the matrix holds bf16 as well. Beside the packed
 * weights only the scratch is in memory. Devices with memory of their own: weights_upload.c.
 * Thread: engine; pieces on the pool, whose thread 0 is the calling one and reports progress.
 */
#include "model/weights_read.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "base/progress.h"

enum {
    PIECE_ELEMENTS = 1 << 17,
    PIECE_ROWS = 32, /* at least, and where pieces end: whole panels are written once */
    AHEAD_ELEMENTS = 1 << 23,
};
#define WAIT_NS 1000000 /* thread 0 looks after the others, once it has done its part */
#define REPORT_SECONDS 0.05

struct packing {
    source *src;
    backend *be;
    const struct weights_runs *list;
    const bool *as_bf16;             /* [list->count]: these are read as bf16 */
    float *scratch;                  /* [host_threads][scratch_elements] */
    int64_t scratch_elements, total; /* elements */
    atomic_int_least64_t done;
    atomic_int failed; /* enum status of the first that failed: whoever set it writes fault */
    struct fault fault;
    void (*progress)(void *user, int64_t done, int64_t total);
    void *user;
    double reported_at; /* progress_clock */
    int64_t reported;   /* elements */
};

/* Where a thread is in the list. */
struct walk {
    size_t run;
    int64_t row; /* of the matrix */
};
struct piece {
    size_t run;
    int64_t row, row_count; /* of the run */
};

static int64_t piece_rows(const struct matrix_spec *spec) {
    const int64_t rows = PIECE_ELEMENTS / spec->cols / PIECE_ROWS * PIECE_ROWS;
    return rows > 0 ? rows : PIECE_ROWS;
}

static bool next_piece(const struct packing *p, int thread, struct walk *at, struct piece *out) {
    for (; at->run < p->list->count; at->run++, at->row = 0) {
        const struct weights_run *run = &p->list->runs[at->run];
        int64_t begin, end;
        p->be->ops->pack->share(p->be, run->to, thread, &begin, &end);
        if (begin < run->to_row) begin = run->to_row;
        if (begin < at->row) begin = at->row;
        if (end > run->to_row + run->row_count) end = run->to_row + run->row_count;
        if (begin >= end) continue;
        const int64_t border = begin / PIECE_ROWS * PIECE_ROWS + piece_rows(run->spec);
        if (end > border) end = border;
        *out = (struct piece){at->run, begin - run->to_row, end - begin};
        at->row = end;
        return true;
    }
    return false;
}

static int64_t piece_elements(const struct packing *p, const struct piece *piece) {
    return piece->row_count * p->list->runs[piece->run].spec->cols;
}

static enum status pack_piece(const struct packing *p, const struct piece *piece, void *scratch) {
    const struct weights_run *run = &p->list->runs[piece->run];
    const struct source_ops *ops = p->src->ops;
    const int64_t row = run->row_begin + piece->row, n = piece->row_count, cols = run->spec->cols;
    struct matrix_rows rows = {scratch, BACKEND_F32};
    if (p->as_bf16[piece->run]) {
        rows.dtype = BACKEND_BF16;
        TRY(ops->read_bf16(p->src, run->name, row, n, run->col_begin, cols, scratch));
        TRY(weights_expect_finite_bf16(p->src, run, piece->row, n, scratch));
    } else {
        TRY(ops->read(p->src, run->name, row, n, run->col_begin, cols, scratch));
        TRY(weights_expect_finite(p->src, run, piece->row, n, scratch));
    }
    p->be->ops->pack->rows(p->be, run->to, run->part, run->to_row + piece->row, n, &rows);
    return STATUS_OK;
}

/* The end is always told, and once. */
static void report(struct packing *p) {
    const int64_t done = atomic_load(&p->done);
    const double now = progress_clock();
    if (!p->progress || done == p->reported) return;
    if (done < p->total && now - p->reported_at < REPORT_SECONDS) return;
    p->reported = done;
    p->reported_at = now;
    p->progress(p->user, done, p->total);
}

static void pack_share(void *context, int thread) {
    struct packing *p = context;
    float *scratch = p->scratch + thread * p->scratch_elements;
    struct walk here = {0}, ahead = {0};
    struct piece piece, coming;
    int64_t in_front = 0; /* elements that the disk was asked for and that are not packed yet */
    bool more = p->src->ops->ahead != NULL;
    while (!atomic_load(&p->failed) && next_piece(p, thread, &here, &piece)) {
        while (more && in_front < AHEAD_ELEMENTS &&
               (more = next_piece(p, thread, &ahead, &coming))) {
            const struct weights_run *run = &p->list->runs[coming.run];
            p->src->ops->ahead(p->src, run->name, run->row_begin + coming.row, coming.row_count);
            in_front += piece_elements(p, &coming);
        }
        const enum status status = pack_piece(p, &piece, scratch);
        int none = STATUS_OK;
        if (status != STATUS_OK && atomic_compare_exchange_strong(&p->failed, &none, (int)status))
            p->fault = *fail_last();
        in_front -= piece_elements(p, &piece);
        atomic_fetch_add(&p->done, piece_elements(p, &piece));
        if (thread == 0) report(p);
    }
    if (thread > 0) return;
    while (!atomic_load(&p->failed) && atomic_load(&p->done) < p->total) {
        nanosleep(&(struct timespec){.tv_nsec = WAIT_NS}, NULL);
        report(p);
    }
    if (!atomic_load(&p->failed)) report(p);
}

static enum status pack_all(struct packing *p, bool *as_bf16) {
    for (size_t i = 0; i < p->list->count; i++) {
        const struct weights_run *run = &p->list->runs[i];
        const int64_t elements = piece_rows(run->spec) * run->spec->cols;
        as_bf16[i] = weights_file_has_bf16(p->src, run);
        if (elements > p->scratch_elements) p->scratch_elements = elements;
        p->total += run->row_count * run->spec->cols;
    }
    p->as_bf16 = as_bf16;
    p->scratch = malloc((size_t)(p->be->host_threads * p->scratch_elements) * sizeof(float));
    if (!p->scratch) return fail(STATUS_MEMORY, "no memory to read weights through");
    p->be->ops->host_run(p->be, pack_share, p);
    free(p->scratch);
    const enum status status = (enum status)atomic_load(&p->failed);
    return status == STATUS_OK ? STATUS_OK : fail(status, "%s", p->fault.text);
}

/* ---- what both ways need ---- */

bool weights_file_has_bf16(const source *src, const struct weights_run *run) {
    struct source_tensor t;
    return run->spec->dtype == BACKEND_BF16 && src->ops->find(src, run->name, &t) && t.bf16;
}

static enum status not_finite(const source *src, const struct weights_run *run, int64_t row,
                              int64_t at, float value) {
    return weights_fail_not_finite(src, run->name, (double)value,
                                   run->row_begin + row + at / run->spec->cols,
                                   run->col_begin + at % run->spec->cols);
}

enum status weights_expect_finite(const source *src, const struct weights_run *run, int64_t row,
                                  int64_t row_count, const float *values) {
    const int64_t bad = weights_not_finite(values, row_count * run->spec->cols);
    return bad < 0 ? STATUS_OK : not_finite(src, run, row, bad, values[bad]);
}

enum status weights_expect_finite_bf16(const source *src, const struct weights_run *run,
                                       int64_t row, int64_t row_count, const bf16 *values) {
    enum { BLOCK = 512, EXPONENT = 0x7f80 }; /* a fixed count, so that it is vectorised */
    const int64_t count = row_count * run->spec->cols;
    int64_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK) {
        uint16_t bad = 0;
        for (int k = 0; k < BLOCK; k++) bad |= (uint16_t)((values[i + k] & EXPONENT) == EXPONENT);
        if (bad) break;
    }
    while (i < count && (values[i] & EXPONENT) != EXPONENT) i++;
    return i == count ? STATUS_OK : not_finite(src, run, row, i, bf16_to_float(values[i]));
}

enum status weights_read(source *src, backend *be, const struct weights_runs *list,
                         void (*progress)(void *user, int64_t done, int64_t total), void *user) {
    if (be->ops->upload) return weights_upload(src, be, list, progress, user);
    struct packing *p = calloc(1, sizeof *p);
    bool *as_bf16 = calloc(list->count + 1, sizeof *as_bf16);
    enum status status = STATUS_OK;
    if (!p || !as_bf16)
        TRY_GOTO(fail(STATUS_MEMORY, "no memory for a list of %zu tensors", list->count), out);
    *p = (struct packing){.src = src, .be = be, .list = list, .progress = progress, .user = user};
    status = pack_all(p, as_bf16);
out:
    free(p);
    free(as_bf16);
    return status;
}
