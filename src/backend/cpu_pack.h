/* cpu_pack.h: packed weights: panels of 32 output rows, one sequential stream each.
 *
 * A matrix [N, K] becomes ceil(N / 32) panels. Inside a panel the input index is the slow one:
 *
 *   f32    [K][32]          w(k, row)                       128 bytes per input
 *   bf16   [K / 2][32][2]   w(k, row), w(k + 1, row)        128 bytes per pair of inputs
 *
 *   COLUMN    lane = row of the panel                       one chain over the whole K
 *   GATE_UP   lanes 0..15 gate, 16..31 up, rows 16 p ..     one chain over the whole K
 *   ROW       as COLUMN; K runs slab by slab                one chain per slab
 *
 * A thread reads a panel from front to back: DRAM sees one stream per thread whatever K is, and 32
 * lanes are enough independent chains to hide the latency of a multiply-add at batch 1 (cpu.md §4).
 * bf16 slabs with an odd number of columns get one column of zeros ("padded" coordinates), so that
 * pairs never straddle a border; activations are brought into the same coordinates. Missing rows of
 * the last panel are zero. Panels [P t / threads, P (t + 1) / threads) belong to thread t: it
 * packs them, so that their pages come from memory near it, and reads them.
 */
#ifndef SFUMATO_BACKEND_CPU_PACK_H
#define SFUMATO_BACKEND_CPU_PACK_H

#include <stdbool.h>
#include <stdint.h>

#include "backend/backend.h"
#include "backend/cpu_memory.h"
#include "backend/cpu_pool.h"

enum { PANEL_ROWS = 32, GATE_ROWS = 16, MATRIX_SLABS_MAX = 64 };

struct matrix {
    enum matrix_kind kind;
    enum backend_dtype dtype;
    bool lookup_only;
    int64_t rows, cols; /* N (GATE_UP: F), K */
    int64_t k_padded;   /* inputs of a panel, zero columns included */
    int64_t panel_count;
    size_t panel_bytes;
    int slab_count;                            /* 1 unless ROW */
    int64_t slab_begin[MATRIX_SLABS_MAX + 1];  /* columns */
    int64_t slab_padded[MATRIX_SLABS_MAX + 1]; /* the same borders in padded coordinates */
    unsigned char *data;                       /* [panel_count] panels */
    struct matrix *next;                       /* of the same backend, newest first */
};

static inline const void *matrix_panel(const struct matrix *m, int64_t panel) {
    return m->data + (size_t)panel * m->panel_bytes;
}
/* Padding columns exist: activations must be copied before use. */
static inline bool matrix_is_padded(const struct matrix *m) { return m->k_padded != m->cols; }

enum status matrix_init(struct matrix *m, const struct matrix_spec *spec,
                        struct cpu_memory *memory);
/* Rows [*begin, *end) of a part are in the panels of that thread. */
void matrix_share(const struct matrix *m, int thread, int threads, int64_t *begin, int64_t *end);
/* Rows [row_begin, +row_count) of a part, on the calling thread; several threads may pack rows of
 * different panels at once. The first to write to a page decides where it lies. */
void matrix_pack(struct matrix *m, int part, int64_t row_begin, int64_t row_count,
                 const struct matrix_rows *rows);

#endif
