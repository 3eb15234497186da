/* cpu_pack.c: see cpu_pack.h. */
#include "backend/cpu_pack.h"

#include <emmintrin.h> /* SSE2: every x86-64 has it */
#include <string.h>

#include "base/bf16.h"

enum { PACK_BLOCK = 256 /* columns at a time: source, rounded copy and target fit L1; even */ };

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

/* A unit is 4 bytes of a row: an fp32 number or two bf16, and what a lane holds of 128 bytes. */
enum {
    UNIT = 4,
    LANES_AT_ONCE = 4,
    UNITS_AT_ONCE = 4,
    LINE_UNITS = 16,
    STRIDE = PANEL_ROWS * UNIT
};

static void transpose_4x4(const unsigned char *from, size_t pitch, unsigned char *to) {
    const __m128i a = _mm_loadu_si128((const void *)from),
                  b = _mm_loadu_si128((const void *)(from + pitch)),
                  c = _mm_loadu_si128((const void *)(from + 2 * pitch)),
                  d = _mm_loadu_si128((const void *)(from + 3 * pitch));
    const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
    const __m128i ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
    _mm_storeu_si128((void *)to, _mm_unpacklo_epi64(ab, cd));
    _mm_storeu_si128((void *)(to + STRIDE), _mm_unpackhi_epi64(ab, cd));
    _mm_storeu_si128((void *)(to + 2 * STRIDE), _mm_unpacklo_epi64(ab2, cd2));
    _mm_storeu_si128((void *)(to + 3 * STRIDE), _mm_unpackhi_epi64(ab2, cd2));
}

/* to[units][32 lanes] gets the first of `rows` lanes' units; from[rows], `pitch` bytes apart. */
static void pack_units(const unsigned char *from, size_t pitch, int rows, int64_t units,
                       unsigned char *to) {
    const int whole_rows = rows / LANES_AT_ONCE * LANES_AT_ONCE;
    const int64_t whole_units = units / UNITS_AT_ONCE * UNITS_AT_ONCE;
    /* a cache line of each row at a time: rows a power of two apart push each other out of L1 */
    for (int64_t line = 0; line < whole_units; line += LINE_UNITS) {
        const int64_t end = line + LINE_UNITS < whole_units ? line + LINE_UNITS : whole_units;
        for (int r = 0; r < whole_rows; r += LANES_AT_ONCE)
            for (int64_t u = line; u < end; u += UNITS_AT_ONCE)
                transpose_4x4(from + (size_t)r * pitch + u * UNIT, pitch,
                              to + u * STRIDE + r * UNIT);
    }
    for (int r = 0; r < rows; r++)
        for (int64_t u = r < whole_rows ? whole_units : 0; u < units; u++)
            memcpy(to + u * STRIDE + r * UNIT, from + (size_t)r * pitch + u * UNIT, UNIT);
}

static int64_t panel_rows_of(const struct matrix *m) {
    return m->kind == MATRIX_GATE_UP ? GATE_ROWS : PANEL_ROWS;
}

/* Columns that a unit holds. */
static int unit_columns(const struct matrix *m) { return m->dtype == BACKEND_BF16 ? 2 : 1; }

void matrix_share(const struct matrix *m, int thread, int threads, int64_t *begin, int64_t *end) {
    const int64_t panel_rows = panel_rows_of(m);
    *begin = cpu_range_begin(m->panel_count, thread, threads) * panel_rows;
    *end = cpu_range_begin(m->panel_count, thread + 1, threads) * panel_rows;
    if (*begin > m->rows) *begin = m->rows;
    if (*end > m->rows) *end = m->rows;
}

static void pack_bf16(const bf16 *rows, int64_t pitch, int n, int64_t columns, unsigned char *to) {
    pack_units((const void *)rows, (size_t)pitch * sizeof(bf16), n, columns / 2, to);
    if (columns % 2 == 0) return;
    for (int r = 0; r < n; r++) { /* the last column of a slab and one of zeros */
        const bf16 pair[2] = {rows[r * pitch + columns - 1], 0};
        memcpy(to + columns / 2 * STRIDE + r * UNIT, pair, UNIT);
    }
}

static void pack_rounded(const float *rows, int64_t pitch, int n, int64_t columns,
                         unsigned char *to) {
    bf16 rounded[PANEL_ROWS][PACK_BLOCK];
    ASSERT(n > 0);
    for (int r = 0; r < n; r++) bf16_round(rows + r * pitch, columns, rounded[r]);
    pack_bf16(rounded[0], PACK_BLOCK, n, columns, to);
}

/* Columns [k, +columns) of rows [row, +n) of `from`, to the first n lanes at `to`. */
static void pack_block(const struct matrix *m, const struct matrix_rows *from, int64_t row, int n,
                       int64_t k, int64_t columns, unsigned char *to) {
    const int64_t at = row * m->cols + k;
    const float *f32 = from->values;
    const bf16 *b16 = from->values;
    if (m->dtype == BACKEND_F32)
        pack_units((const void *)(f32 + at), (size_t)m->cols * sizeof *f32, n, columns, to);
    else if (from->dtype == BACKEND_F32)
        pack_rounded(f32 + at, m->cols, n, columns, to);
    else
        pack_bf16(b16 + at, m->cols, n, columns, to);
}

/* A block of columns for all rows of a panel, then the next block: the panel is written front to
 * back, and cache lines shared by lanes are still in L1. */
void matrix_pack(struct matrix *m, int part, int64_t row_begin, int64_t row_count,
                 const struct matrix_rows *rows) {
    ASSERT(part == 0 || (part == 1 && m->kind == MATRIX_GATE_UP));
    ASSERT(row_begin >= 0 && row_count >= 0);
    ASSERT_LE(row_begin + row_count, m->rows);
    ASSERT(rows->dtype == BACKEND_F32 || rows->dtype == m->dtype);
    const int64_t panel_rows = panel_rows_of(m), end = row_begin + row_count;
    for (int64_t row = row_begin, panel_end; row < end; row = panel_end) {
        const int64_t panel = row / panel_rows;
        panel_end = end < (panel + 1) * panel_rows ? end : (panel + 1) * panel_rows;
        unsigned char *out = m->data + (size_t)panel * m->panel_bytes;
        const int lane = (int)(row % panel_rows) + (part ? GATE_ROWS : 0);
        for (int s = 0; s < m->slab_count; s++) {
            for (int64_t k = m->slab_begin[s]; k < m->slab_begin[s + 1]; k += PACK_BLOCK) {
                const int64_t left = m->slab_begin[s + 1] - k;
                const int64_t to = m->slab_padded[s] + k - m->slab_begin[s];
                pack_block(m, rows, row - row_begin, (int)(panel_end - row), k,
                           left < PACK_BLOCK ? left : PACK_BLOCK,
                           out + to * STRIDE / unit_columns(m) + lane * UNIT);
            }
        }
    }
}
