/* weights_read.h: runs of rows to be loaded, and how they get from the source into the matrices.
 *
 * Shared by weights.c, which makes the list, and the two that work it off: weights_read.c into host
 * memory, weights_upload.c to a device.
 */
#ifndef SFUMATO_MODEL_WEIGHTS_READ_H
#define SFUMATO_MODEL_WEIGHTS_READ_H

#include "model/model_parts.h"

enum { TENSOR_NAME_BYTES = 128 };

/* Rows [row_begin, +row_count), columns [col_begin, +spec->cols) of a tensor become rows from to_row
 * of a part of a matrix. fp8 blocks count from the run's first row; to_row is a multiple of 8. */
struct weights_run {
    matrix *to;
    const struct matrix_spec *spec; /* of the matrix; borrowed */
    int part;
    int64_t to_row, row_begin, row_count, col_begin;
    char name[TENSOR_NAME_BYTES];
};
struct weights_runs {
    struct weights_run *runs; /* malloc */
    size_t count, capacity;
};

/* Loads all of them. progress: as model_open's, on the calling thread. */
enum status weights_read(source *src, backend *be, const struct weights_runs *list,
                         void (*progress)(void *user, int64_t done, int64_t total), void *user);

/* The same for a backend with ->upload; weights_read calls it. */
enum status weights_upload(source *src, backend *be, const struct weights_runs *list,
                           void (*progress)(void *user, int64_t done, int64_t total), void *user);

/* The matrix holds bf16, and so does the file: no need to go through fp32. */
bool weights_file_has_bf16(const source *src, const struct weights_run *run);
/* values[row_count][K] are rows [row, +row_count) of the run: STATUS_MODEL naming the first NaN or
 * infinity. */
enum status weights_expect_finite(const source *src, const struct weights_run *run, int64_t row,
                                  int64_t row_count, const float *values);
enum status weights_expect_finite_bf16(const source *src, const struct weights_run *run,
                                       int64_t row, int64_t row_count, const bf16 *values);
/* Index of the first NaN or infinity, -1: none; and the message about one. */
int64_t weights_not_finite(const float *values, int64_t count);
enum status weights_fail_not_finite(const source *src, const char *name, double value, int64_t row,
                                    int64_t col);
/* Blocks of columns of a matrix of fp8. */
int64_t weights_column_blocks(const struct matrix_spec *spec);

#endif
