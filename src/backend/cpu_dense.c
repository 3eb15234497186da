/* cpu_dense.c: products with packed weights, the embedding mixture, norms.
 *
 * Every product is the same loop: a thread walks its panels; for each panel the slabs of K one
 * after the other, and for each slab all rows of the step, so that a weight leaves DRAM once per
 * step. What differs is the epilogue. Partial sums of slabs meet in a binary counter that builds
 * the tree of cpu.md §3.1:
 *
 *   slab     0     1         2     3                     a set = [rows][32] accumulators, at most
 *   stack   [0] [01]     [01|2] [01|23] -> [0123] ...    log2(slabs) + 1 of them live
 *
 * An absent slab is a set of -0.0f. COLUMN and GATE_UP have one slab and no tree.
 */
#include <string.h>

#include "backend/cpu.h"

enum {
    INLINE_ELEMENTS = 8192, /* below this waking the pool costs more than it saves */
    ALIGN_FLOATS = CPU_MEMORY_ALIGN / sizeof(float),
    EMBED_COLUMNS = 256, /* columns a thread takes at a time when a step has few rows */
};

static void run_rows(struct cpu *cpu, int64_t elements, cpu_task *task, void *context) {
    if (elements >= INLINE_ELEMENTS || cpu_pool_threads(cpu->pool) == 1)
        cpu_pool_run(cpu->pool, task, context);
    else
        for (int t = 0; t < cpu_pool_threads(cpu->pool); t++) task(context, t);
}

/* ---- matrices ---- */

/* Sets of accumulators alive at once: one being computed, and a stack of partial sums. */
static int live_sets(int slab_count) {
    int sets = 1;
    for (int n = slab_count; n > 1; n /= 2) sets++;
    return sets;
}

/* Replaces *buffer by a larger one; the old one was never touched and costs address space only. */
static enum status grow(struct cpu *cpu, void *buffer, size_t *have, size_t want,
                        size_t unit_bytes) {
    if (want <= *have) return STATUS_OK;
    void *fresh = cpu_scratch(cpu, want * unit_bytes);
    if (!fresh) return STATUS_MEMORY;
    cpu->base.scratch_bytes -= *have * unit_bytes;
    memcpy(buffer, &fresh, sizeof fresh);
    *have = want;
    return STATUS_OK;
}

enum status cpu_matrix_new(backend *b, const struct matrix_spec *spec, matrix **out) {
    struct cpu *cpu = cpu_of(b);
    const size_t threads = (size_t)b->threads, rows = (size_t)cpu->rows_max;
    if (spec->dtype == BACKEND_FP8)
        return fail(STATUS_USAGE, "the CPU backend has no fp8 weights: use --dtype bf16");
    matrix *m = cpu_memory_take(&cpu->memory, sizeof *m, "matrix");
    if (!m) return STATUS_MEMORY;
    TRY(matrix_init(m, spec, &cpu->memory));
    m->next = cpu->matrices;
    cpu->matrices = m;
    b->weight_bytes += (size_t)m->panel_count * m->panel_bytes;

    TRY(grow(cpu, &cpu->acc, &cpu->acc_floats, rows * PANEL_ROWS * (size_t)live_sets(m->slab_count),
             sizeof(float) * threads));
    TRY(grow(cpu, &cpu->input, &cpu->input_bytes, rows * (size_t)m->k_padded * sizeof(float), 1));
    const size_t row = (size_t)(m->rows > m->cols ? m->rows : m->cols);
    TRY(grow(cpu, &cpu->thread_row, &cpu->row_floats,
             (row + ALIGN_FLOATS) / ALIGN_FLOATS * ALIGN_FLOATS, sizeof(float) * threads));
    *out = m;
    return STATUS_OK;
}

void cpu_matrix_share(backend *b, const matrix *m, int thread, int64_t *begin, int64_t *end) {
    matrix_share(m, thread, b->host_threads, begin, end);
}

void cpu_matrix_pack(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                     const struct matrix_rows *rows) {
    (void)b;
    matrix_pack(m, part, row_begin, row_count, rows);
}

void cpu_matrix_load(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                     const float *rows) {
    (void)b;
    matrix_pack(m, part, row_begin, row_count, &(struct matrix_rows){rows, BACKEND_F32});
}

/* ---- products ---- */

enum epilogue { STORE, STORE_SPLIT, SWIGLU };

struct product {
    struct cpu *cpu;
    const struct matrix *m;
    int rows;
    panel_product *kernel;
    const unsigned char *x; /* [rows][k_padded] in the kernel's type */
    size_t x_bytes;         /* of one element */
    enum epilogue epilogue;
    float *out, *out_b; /* STORE: [rows][N]; SPLIT: [rows][split], [rows][N - split] */
    int64_t split;
    void *act; /* SWIGLU: [rows][F] in the matrix's type */
};

struct input_job {
    struct cpu *cpu;
    const struct matrix *m;
    int rows;
    const unsigned char *in;
    bool widen;
};

static void input_task(void *context, int thread) {
    const struct input_job *job = context;
    const struct matrix *m = job->m;
    const int threads = job->cpu->base.threads;
    const int64_t end = cpu_range_begin(job->rows, thread + 1, threads);
    for (int64_t r = cpu_range_begin(job->rows, thread, threads); r < end; r++) {
        const bf16 *in = (const bf16 *)job->in + r * m->cols;
        for (int s = 0; s < m->slab_count; s++) {
            const int64_t columns = m->slab_begin[s + 1] - m->slab_begin[s];
            const int64_t pad = m->slab_padded[s + 1] - m->slab_padded[s] - columns;
            const int64_t to = r * m->k_padded + m->slab_padded[s];
            if (job->widen) {
                float *x = (float *)job->cpu->input + to;
                job->cpu->kernels->widen(in + m->slab_begin[s], columns, x);
                if (pad) x[columns] = 0.0f;
            } else {
                bf16 *x = (bf16 *)job->cpu->input + to;
                memcpy(x, in + m->slab_begin[s], sizeof(bf16) * (size_t)columns);
                if (pad) x[columns] = 0;
            }
        }
    }
}

/* Chooses the kernel and brings the activations [rows][K] into its type and coordinates. */
static void product_input(struct product *p, const void *in) {
    struct cpu *cpu = p->cpu;
    p->x = in;
    p->x_bytes = sizeof(float);
    p->kernel = cpu->kernels->panel_f32;
    if (p->m->dtype == BACKEND_F32) return;
    const bool dpbf16 = cpu->base.numerics == NUMERICS_DPBF16;
    p->kernel = dpbf16 ? cpu->kernels->panel_dpbf16 : cpu->kernels->panel_bf16;
    if (dpbf16) p->x_bytes = sizeof(bf16);
    if (dpbf16 && !matrix_is_padded(p->m)) return;
    ASSERT_LE((size_t)p->rows * (size_t)p->m->k_padded * p->x_bytes, cpu->input_bytes);
    struct input_job job = {cpu, p->m, p->rows, in, !dpbf16};
    run_rows(cpu, p->rows * p->m->cols, input_task, &job);
    p->x = cpu->input;
}

static void store_panel(const struct product *p, int64_t panel, const float *acc) {
    const struct matrix *m = p->m;
    const int64_t row = panel * (p->epilogue == SWIGLU ? GATE_ROWS : PANEL_ROWS);
    const int64_t left = m->rows - row;
    if (p->epilogue == SWIGLU) {
        const int n = (int)(left < GATE_ROWS ? left : GATE_ROWS);
        for (int r = 0; r < p->rows; r++) {
            float act[GATE_ROWS];
            p->cpu->kernels->swiglu(acc + r * PANEL_ROWS, act);
            if (m->dtype == BACKEND_F32)
                memcpy((float *)p->act + r * m->rows + row, act, sizeof(float) * (size_t)n);
            else
                p->cpu->kernels->round(act, n, (bf16 *)p->act + r * m->rows + row);
        }
        return;
    }
    const int64_t n = left < PANEL_ROWS ? left : PANEL_ROWS;
    const int64_t split = p->epilogue == STORE ? m->rows : p->split;
    const int64_t n_a = row >= split ? 0 : row + n <= split ? n : split - row;
    for (int r = 0; r < p->rows; r++, acc += PANEL_ROWS) {
        if (n_a > 0) memcpy(p->out + r * split + row, acc, sizeof(float) * (size_t)n_a);
        if (n_a < n)
            memcpy(p->out_b + r * (m->rows - split) + row + n_a - split, acc + n_a,
                   sizeof(float) * (size_t)(n - n_a));
    }
}

static void product_task(void *context, int thread) {
    const struct product *p = context;
    const struct matrix *m = p->m;
    const struct cpu_kernels *kernels = p->cpu->kernels;
    const int threads = p->cpu->base.threads;
    const int64_t set_floats = (int64_t)p->rows * PANEL_ROWS;
    float *sets = p->cpu->acc + (size_t)thread * p->cpu->acc_floats;
    const size_t column_bytes = PANEL_ROWS * backend_dtype_bytes(m->dtype);
    const int64_t panel_end = cpu_range_begin(m->panel_count, thread + 1, threads);
    for (int64_t panel = cpu_range_begin(m->panel_count, thread, threads); panel < panel_end;
         panel++) {
        const unsigned char *w = matrix_panel(m, panel);
        int level[8], top = -1;
        for (int s = 0; s < m->slab_count; s++) {
            float *acc = sets + ++top * set_floats;
            level[top] = 0;
            const int64_t k = m->slab_padded[s], k_count = m->slab_padded[s + 1] - k;
            if (k_count > 0)
                p->kernel(w + (size_t)k * column_bytes, p->x + (size_t)k * p->x_bytes, m->k_padded,
                          k_count, p->rows, acc);
            if (m->kind == MATRIX_ROW) {
                if (k_count > 0)
                    kernels->add(acc, NULL, set_floats, true);
                else
                    for (int64_t i = 0; i < set_floats; i++) acc[i] = -0.0f;
            } else if (k_count == 0) {
                for (int64_t i = 0; i < set_floats; i++) acc[i] = 0.0f;
            }
            for (; top > 0 && level[top] == level[top - 1]; top--) {
                kernels->add(acc - set_floats, acc, set_floats, false);
                acc -= set_floats;
                level[top - 1]++;
            }
        }
        for (; top > 0; top--)
            kernels->add(sets + (top - 1) * set_floats, sets + top * set_floats, set_floats, false);
        if (m->slab_count == 0)
            for (int64_t i = 0; i < set_floats; i++) sets[i] = -0.0f;
        store_panel(p, panel, sets);
    }
}

static void product_run(struct product *p, const void *in) {
    ASSERT_LE(p->rows, p->cpu->rows_max);
    if (p->rows == 0) return;
    product_input(p, in);
    cpu_pool_run(p->cpu->pool, product_task, p);
}

void cpu_row_matmul(backend *b, int rows, const matrix *w, const void *in, float *partial) {
    struct product p = {.cpu = cpu_of(b), .m = w, .rows = rows, .epilogue = STORE, .out = partial};
    product_run(&p, in);
}

void cpu_logits(backend *b, int rows, const matrix *w, const void *h, float *logits) {
    struct product p = {.cpu = cpu_of(b), .m = w, .rows = rows, .epilogue = STORE, .out = logits};
    product_run(&p, h);
}

void cpu_gate_up(backend *b, int rows, const matrix *w, const void *h, void *act) {
    struct product p = {.cpu = cpu_of(b), .m = w, .rows = rows, .epilogue = SWIGLU, .act = act};
    product_run(&p, h);
}

void cpu_product_split(struct cpu *cpu, int rows, const matrix *w, const void *h, int64_t split,
                       float *a, float *b) {
    struct product p = {.cpu = cpu,
                        .m = w,
                        .rows = rows,
                        .epilogue = STORE_SPLIT,
                        .out = a,
                        .out_b = b,
                        .split = split};
    product_run(&p, h);
}

/* ---- embedding mixture ---- */

struct embed_job {
    struct cpu *cpu;
    const struct batch *batch;
    struct embed_row row; /* of the matrix; ids, columns and out are filled in per item */
    float *out;
};

static void embed_task(void *context, int thread) {
    const struct embed_job *job = context;
    const struct batch *batch = job->batch;
    const int threads = job->cpu->base.threads;
    const int64_t hidden = job->row.embed->cols;
    const int64_t chunks = (hidden + EMBED_COLUMNS - 1) / EMBED_COLUMNS;
    const int64_t items = batch->row_count * chunks;
    const int64_t end = cpu_range_begin(items, thread + 1, threads);
    for (int64_t i = cpu_range_begin(items, thread, threads); i < end; i++) {
        const int64_t r = i / chunks;
        struct embed_row row = job->row;
        row.ids = batch->mix_ids + batch->mix_begin[r];
        row.weights = batch->mix_weights + batch->mix_begin[r];
        row.count = batch->mix_begin[r + 1] - batch->mix_begin[r];
        row.k_begin = i % chunks * EMBED_COLUMNS;
        row.k_end = row.k_begin + EMBED_COLUMNS < hidden ? row.k_begin + EMBED_COLUMNS : hidden;
        row.out = job->out + r * hidden;
        job->cpu->kernels->embed_row(&row);
    }
}

void cpu_embed_mix(backend *b, const struct batch *batch, const matrix *embed, int slab_count,
                   const int64_t *vocab_begin, float *out) {
    struct embed_job job = {cpu_of(b),
                            batch,
                            {.embed = embed, .slab_count = slab_count, .vocab_begin = vocab_begin},
                            out};
    run_rows(job.cpu, embed->cols * batch->mix_begin[batch->row_count], embed_task, &job);
}

/* ---- norms ---- */

struct norm_job {
    struct cpu *cpu;
    const int32_t *rows; /* NULL: all rows, x is updated; else the chosen ones, x is left alone */
    int row_count;
    struct norm_row row;
};

static void norm_task(void *context, int thread) {
    const struct norm_job *job = context;
    const int threads = job->cpu->base.threads;
    const int64_t hidden = job->row.hidden;
    const int64_t end = cpu_range_begin(job->row_count, thread + 1, threads);
    for (int64_t i = cpu_range_begin(job->row_count, thread, threads); i < end; i++) {
        const int64_t r = job->rows ? job->rows[i] : i;
        struct norm_row row = job->row;
        row.sum += r * hidden;
        row.x += r * hidden;
        row.h = (unsigned char *)row.h + (size_t)(i * hidden) * backend_dtype_bytes(row.dtype);
        if (job->rows) {
            float *copy = job->cpu->thread_row + (size_t)thread * job->cpu->row_floats;
            row.x = memcpy(copy, row.x, sizeof(float) * (size_t)hidden);
        }
        job->cpu->kernels->norm_row(&row);
    }
}

void cpu_add_norm(backend *b, int rows, int hidden, bool first, float scale, const float *sum,
                  float *x, const float *weight, float eps, enum backend_dtype dtype, void *h) {
    struct norm_job job = {cpu_of(b),
                           NULL,
                           rows,
                           {.sum = sum,
                            .x = x,
                            .weight = weight,
                            .first = first,
                            .scale = scale,
                            .eps = eps,
                            .hidden = hidden,
                            .dtype = dtype,
                            .h = h}};
    run_rows(job.cpu, (int64_t)rows * hidden, norm_task, &job);
}

void cpu_add_norm_rows(backend *b, const int32_t *rows, int row_count, int hidden, const float *sum,
                       const float *x, const float *weight, float eps, enum backend_dtype dtype,
                       void *h) {
    struct norm_job job = {cpu_of(b),
                           rows,
                           row_count,
                           {.sum = sum,
                            .x = (float *)x,
                            .weight = weight,
                            .eps = eps,
                            .hidden = hidden,
                            .dtype = dtype,
                            .h = h}};
    ASSERT_LE((size_t)hidden, job.cpu->row_floats);
    run_rows(job.cpu, (int64_t)row_count * hidden, norm_task, &job);
}
