/* layer: load */
/* fuzz_safetensors.c: the bytes of one file; what passes the checks is read to its last row. */
#include <stdlib.h>

#include "load/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

static void read_rows(const struct tensor_entry *e) {
    float *row = malloc((size_t)(e->cols ? e->cols : 1) * sizeof *row);
    for (int64_t r = 0; row && e->cols && r < e->rows; r++) tensor_read_row(e, r, 0, e->cols, row);
    free(row);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
    arena names;
    struct tensor_table table = {0};
    arena_init(&names, 0);
    if (safetensors_parse(bytes, n, 0, &names, &table) == STATUS_OK &&
        tensor_table_seal(&table) == STATUS_OK) {
        for (size_t i = 0; i < table.count; i++) {
            ASSERT(tensor_table_find(&table, table.entries[i].name) == &table.entries[i]);
            if (table.entries[i].type) read_rows(&table.entries[i]);
        }
    }
    tensor_table_fini(&table);
    arena_fini(&names);
    return 0;
}
