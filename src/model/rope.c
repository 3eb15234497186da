/* rope.c: the rotary position tables, made once in double and rounded to fp32.
 *
 * Pair i of a head turns by position * inv_freq[i], inv_freq[i] = theta^(-2i/hd) (RoFormer, arXiv
 * 2104.09864), the pair being elements i and i + hd/2. Llama 3's scaling lowers the slow
 * frequencies: wavelengths above original/low are divided by the factor, those below original/high
 * are left, and those between are blended (the rope_scaling block of its config.json). Thread:
 * start-up.
 */
#include <math.h>
#include <stdlib.h>

#include "model/model_parts.h"

static double scaled_frequency(const struct model_config *c, double frequency) {
    if (c->rope == ROPE_LINEAR) return frequency / c->rope_factor;
    if (c->rope != ROPE_LLAMA3) return frequency;
    const double original = (double)c->rope_original_positions;
    const double wavelength = 2.0 * M_PI / frequency;
    if (wavelength < original / c->rope_high_freq_factor) return frequency;
    if (wavelength > original / c->rope_low_freq_factor) return frequency / c->rope_factor;
    const double blend = (original / wavelength - c->rope_low_freq_factor) /
                         (c->rope_high_freq_factor - c->rope_low_freq_factor);
    return (1.0 - blend) * frequency / c->rope_factor + blend * frequency;
}

enum status rope_tables(model *m, float **cos_table, float **sin_table) {
    const int half = m->config.head_dim / 2;
    const size_t bytes = (size_t)m->options.max_positions * (size_t)half * sizeof(float);
    enum status status = STATUS_OK;
    float *row = NULL;
    *cos_table = m->be->ops->alloc(m->be, bytes, "RoPE cosines");
    *sin_table = m->be->ops->alloc(m->be, bytes, "RoPE sines");
    if (!*cos_table || !*sin_table) return STATUS_MEMORY;
    row = malloc(2 * (size_t)half * sizeof *row);
    if (!row) return fail(STATUS_MEMORY, "cannot allocate one row of the RoPE tables");
    for (int position = 0; position < m->options.max_positions; position++) {
        for (int i = 0; i < half; i++) {
            const double plain = pow(m->config.rope_theta, -2.0 * i / m->config.head_dim);
            const double angle = position * scaled_frequency(&m->config, plain);
            row[i] = (float)cos(angle);
            row[half + i] = (float)sin(angle);
        }
        const size_t row_bytes = (size_t)half * sizeof *row;
        const size_t at = (size_t)position * (size_t)half;
        TRY_GOTO(m->be->ops->write(m->be, *cos_table + at, row, row_bytes), out);
        TRY_GOTO(m->be->ops->write(m->be, *sin_table + at, row + half, row_bytes), out);
    }
out:
    free(row);
    return status;
}
