/* tensor_table.h: the tensors of mapped files, by name. Shared by the safetensors and GGUF sources.
 *
 * Filled by a parser that has checked that every tensor lies inside its file, then sealed (sorted;
 * duplicate names and overlapping data are refused), then read only: any number of threads may find
 * and read. Memory: one array from malloc; names and data are borrowed from the parser.
 */
#ifndef SFUMATO_LOAD_TENSOR_TABLE_H
#define SFUMATO_LOAD_TENSOR_TABLE_H

#include <stddef.h>
#include <stdint.h>

#include "base/bf16.h"
#include "base/check.h"
#include "load/config.h"
#include "load/dequant.h"
#include "load/file.h"

enum { TENSOR_COUNT_MAX = 1 << 18, TENSOR_NAME_BYTES_MAX = 256, TENSOR_COLUMNS_MAX = INT32_MAX };

struct tensor_entry {
    const char *name;                /* NUL-terminated */
    const char *type_name;           /* as the file says it */
    const struct dequant_type *type; /* NULL: a format that cannot be read here */
    int64_t rows, cols;
    const uint8_t *data;
    int64_t bytes;
    int file; /* index of the file it is in */
    /* fp8 weights: values are multiplied by element [row / scale_rows][col / scale_cols] of this
     * tensor, [.., scale_pitch]. NULL: by nothing. */
    const struct tensor_entry *scale;
    int64_t scale_rows, scale_cols, scale_pitch;
};

struct tensor_table {
    struct tensor_entry *entries;
    size_t count, capacity;
    int64_t total_bytes;
};

enum status tensor_table_add(struct tensor_table *table, const struct tensor_entry *entry);
/* Sorts by name. STATUS_MODEL on duplicates and overlaps. */
enum status tensor_table_seal(struct tensor_table *table);
void tensor_table_fini(struct tensor_table *table);
const struct tensor_entry *tensor_table_find(const struct tensor_table *table, const char *name);
/* Gives every F8_E4M3 tensor its scales: NAME_scale_inv or NAME_scale, one a block of 128 x 128, one
 * a row, or one in all. STATUS_MODEL when there are none or of another shape. The table is sealed. */
enum status tensor_table_bind_scales(struct tensor_table *table);
/* The number format of most bytes. */
enum config_dtype tensor_table_dtype(const struct tensor_table *table);

/* The bytes of rows [row_begin, +row_count) in the file. */
const uint8_t *tensor_rows(const struct tensor_entry *entry, int64_t row_begin, int64_t row_count,
                           size_t *n);
bool tensor_is_bf16(const struct tensor_entry *entry);
/* dst[row_count][col_count] of a bf16 tensor of that file. STATUS_MODEL when it cannot be read. */
enum status tensor_read_bf16(const struct tensor_entry *entry, const struct file_map *map,
                             int64_t row_begin, int64_t row_count, int64_t col_begin,
                             int64_t col_count, bf16 *dst);
/* One row: dst[col_count] = columns [col_begin, +col_count) of row `row`. The entry must have a
 * type. */
void tensor_read_row(const struct tensor_entry *entry, int64_t row, int64_t col_begin,
                     int64_t col_count, float *dst);
/* scales[ceil(col_count / 128)] of rows [row_begin, +row_count) in steps of 128 columns from
 * col_begin. False when the tensor has none, or when rows or columns that belong together here have
 * different ones in the file. */
bool tensor_block_scales(const struct tensor_entry *entry, int64_t row_begin, int64_t row_count,
                         int64_t col_begin, int64_t col_count, float *scales);

#endif
