/* cpu_pack.c: see cpu_pack.h. */
#include "backend/cpu_pack.h"

#include <string.h>

#include "base/bf16.h"

enum { PACK_BLOCK = 256 /* columns rounded at a time: source, rounded copy and target fit L1 */ };

/* Everything but the memory. */
static void matrix_shape(struct matrix *m, const struct matrix_spec *spec) {
    ASSERT(spec->rows >= 0 && spec->cols >= 0);
    m->kind = spec->kind;
    m->dtype = spec->dtype;
    m->lookup_only = spec->lookup_only;
    m->rows = spec->rows;
    m->cols = spec->cols;
    m->slab_count = 1;
    m->slab_begin[1] = spec->cols;
    if (spec->kind == MATRIX_ROW) {
        ASSERT_LE(spec->slab_count, MATRIX_SLABS_MAX);
        m->slab_count = spec->slab_count;
        for (int s = 0; s <= spec->slab_count; s++) m->slab_begin[s] = spec->slab_begin[s];
        ASSERT_EQ(m->slab_begin[0], 0);
        ASSERT_EQ(m->slab_begin[m->slab_count], spec->cols);
    }
    for (int s = 0; s < m->slab_count; s++) {
        const int64_t columns = m->slab_begin[s + 1] - m->slab_begin[s];
        ASSERT_LE(0, columns);
        m->slab_padded[s + 1] =
            m->slab_padded[s] + (m->dtype == BACKEND_BF16 ? columns + columns % 2 : columns);
    }
    m->k_padded = m->slab_padded[m->slab_count];
    const int64_t panel_rows = m->kind == MATRIX_GATE_UP ? GATE_ROWS : PANEL_ROWS;
    m->panel_count = (m->rows + panel_rows - 1) / panel_rows;
    m->panel_bytes = (size_t)m->k_padded * PANEL_ROWS * backend_dtype_bytes(m->dtype);
}

int64_t cpu_matrix_bytes(const struct matrix_spec *spec) {
    struct matrix m = {0};
    matrix_shape(&m, spec);
    return m.panel_count * (int64_t)m.panel_bytes;
}

enum status matrix_init(struct matrix *m, const struct matrix_spec *spec,
                        struct cpu_memory *memory) {
    matrix_shape(m, spec);
    if (m->panel_count > 0 && m->panel_bytes > SIZE_MAX / 4 / (size_t)m->panel_count)
        return fail(STATUS_MEMORY, "a matrix of %lld x %lld does not fit any memory",
                    (long long)m->rows, (long long)m->cols);
    m->data = cpu_memory_take(memory, (size_t)m->panel_count * m->panel_bytes, "weights");
    return m->data ? STATUS_OK : STATUS_MEMORY;
}

/* Columns [begin, begin + count) of one row, to its lane of a panel; `to` is the padded coordinate
 * of `begin`, even for bf16. */
static void pack_f32(const float *from, int64_t count, float *panel, int64_t to, int lane) {
    float *out = panel + to * PANEL_ROWS + lane;
    for (int64_t k = 0; k < count; k++) out[k * PANEL_ROWS] = from[k];
}

static void pack_bf16(const float *from, int64_t count, bf16 *panel, int64_t to, int lane) {
    bf16 *out = panel + to * PANEL_ROWS + 2 * lane;
    for (int64_t k = 0; k < count; k += PACK_BLOCK) {
        bf16 rounded[PACK_BLOCK];
        const int n = (int)(count - k < PACK_BLOCK ? count - k : PACK_BLOCK);
        bf16_round(from + k, n, rounded);
        if (n % 2) rounded[n] = 0; /* n < PACK_BLOCK: PACK_BLOCK is even */
        for (int i = 0; i < n; i += 2)
            memcpy(out + (k + i) * PANEL_ROWS, rounded + i, 2 * sizeof(bf16));
    }
}

struct touch_job {
    struct matrix *m;
    int threads;
};

/* The owner of a panel is the first to write to its pages: they come from memory near it. */
static void touch_task(void *context, int thread) {
    enum { PAGE_BYTES = 4096 };
    const struct touch_job *job = context;
    const struct matrix *m = job->m;
    const size_t begin =
        (size_t)cpu_range_begin(m->panel_count, thread, job->threads) * m->panel_bytes;
    const size_t end =
        (size_t)cpu_range_begin(m->panel_count, thread + 1, job->threads) * m->panel_bytes;
    for (size_t at = begin; at < end; at += PAGE_BYTES) ((volatile unsigned char *)m->data)[at] = 0;
}

void matrix_touch(struct matrix *m, cpu_pool *pool) {
    struct touch_job job = {m, cpu_pool_threads(pool)};
    cpu_pool_run(pool, touch_task, &job);
}

struct pack_job {
    struct matrix *m;
    int threads, part;
    int64_t row_begin, row_end;
    const float *rows;
};

static void pack_task(void *context, int thread) {
    const struct pack_job *job = context;
    struct matrix *m = job->m;
    const int64_t panel_rows = m->kind == MATRIX_GATE_UP ? GATE_ROWS : PANEL_ROWS;
    /* equal numbers of the job's panels: they are the range of one or two owners */
    const int64_t first = job->row_begin / panel_rows;
    const int64_t panels = (job->row_end + panel_rows - 1) / panel_rows - first;
    int64_t row = (first + cpu_range_begin(panels, thread, job->threads)) * panel_rows;
    int64_t end = (first + cpu_range_begin(panels, thread + 1, job->threads)) * panel_rows;
    if (row < job->row_begin) row = job->row_begin;
    if (end > job->row_end) end = job->row_end;
    /* A block of columns for all rows of a panel, then the next block: the panel is written front
     * to back, and cache lines shared by lanes are still in L1. */
    while (row < end) {
        const int64_t panel = row / panel_rows;
        const int64_t panel_end = end < (panel + 1) * panel_rows ? end : (panel + 1) * panel_rows;
        void *out = m->data + (size_t)panel * m->panel_bytes;
        for (int s = 0; s < m->slab_count; s++) {
            for (int64_t k = m->slab_begin[s]; k < m->slab_begin[s + 1]; k += PACK_BLOCK) {
                const int64_t left = m->slab_begin[s + 1] - k;
                const int64_t count = left < PACK_BLOCK ? left : PACK_BLOCK;
                const int64_t to = m->slab_padded[s] + k - m->slab_begin[s];
                for (int64_t r = row; r < panel_end; r++) {
                    const int lane = (int)(r % panel_rows) + (job->part ? GATE_ROWS : 0);
                    const float *from = job->rows + (r - job->row_begin) * m->cols + k;
                    if (m->dtype == BACKEND_F32)
                        pack_f32(from, count, out, to, lane);
                    else
                        pack_bf16(from, count, out, to, lane);
                }
            }
        }
        row = panel_end;
    }
}

void matrix_pack(struct matrix *m, cpu_pool *pool, int part, int64_t row_begin, int64_t row_count,
                 const float *rows) {
    ASSERT(part == 0 || (part == 1 && m->kind == MATRIX_GATE_UP));
    ASSERT(row_begin >= 0 && row_count >= 0);
    ASSERT_LE(row_begin + row_count, m->rows);
    struct pack_job job = {m, cpu_pool_threads(pool), part, row_begin, row_begin + row_count, rows};
    cpu_pool_run(pool, pack_task, &job);
}
