/* safetensors.h: the header of one safetensors file, apart from the folder it lies in (for
 * fuzzing).
 *
 *   ┌──────────────┬───────────────────────┬───────────────────────────────────────┐
 *   │ n: u64, LE   │ JSON of n bytes       │ data; offsets are relative to here    │
 *   └──────────────┴───────────────────────┴───────────────────────────────────────┘
 *   JSON: {"name": {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [begin, end]}, ...}
 */
#ifndef SFUMATO_LOAD_SAFETENSORS_H
#define SFUMATO_LOAD_SAFETENSORS_H

#include "base/arena.h"
#include "load/tensor_table.h"

/* 1,000 tensors take about 100 KB; the limit bounds the memory of the JSON tree, about 25 times as much. */
enum { SAFETENSORS_HEADER_BYTES_MAX = 16 << 20 };

/* Adds the tensors of a mapped file to the table; names are copied to the arena, data is borrowed.
 * file: number to store in the entries. STATUS_MODEL (without the file's name) on any defect. */
enum status safetensors_parse(const uint8_t *bytes, size_t n, int file, arena *names,
                              struct tensor_table *table);
/* True when a shard name of an index may be opened: a plain name, no path. */
bool safetensors_file_name_ok(const char *name);

#endif
