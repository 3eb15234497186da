/* source.h: one way to read tensors, wherever they come from.
 *
 *   safetensors folder ─┐
 *   one GGUF file      ─┼─► source ─► rows of fp32, under Hugging Face's canonical tensor names
 *   synthetic weights  ─┘
 *
 * A source is a const table of functions plus its own state; the instance is last in its file
 * (safetensors.c, gguf.c, synthetic.c). Files are mapped, every header field is checked before use,
 * and a rank touches only the pages of the rows it asks for. Names are always the Hugging Face ones
 * ("model.layers.3.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"); the GGUF source
 * translates, and un-permutes the q and k rows of llama files, so callers see one convention.
 * Threads: reads may run on several threads at once; open and close on one.
 */
#ifndef SFUMATO_LOAD_SOURCE_H
#define SFUMATO_LOAD_SOURCE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/bf16.h"
#include "base/check.h"
#include "load/config.h"

typedef struct source source;

/* Shape of a tensor as Hugging Face writes it: [rows, cols]; a vector is [1, cols]. */
struct source_tensor {
    int64_t rows, cols;
    const char *dtype_name; /* "BF16", "Q4_1", for messages and `inspect` */
    int64_t file_bytes;     /* bytes it takes in the file */
    bool bf16;              /* its rows lie in the file as bf16, in this order */
};

struct source_ops {
    const char *kind; /* "safetensors", "gguf", "synthetic" */
    /* False when there is no such tensor; errors are for unusable ones. */
    bool (*find)(const source *s, const char *name, struct source_tensor *out);
    /* dst[row_count][col_count] fp32 = rows [row_begin, +row_count), columns [col_begin, +col_count),
     * dequantised. The range must lie inside the tensor (ASSERT). STATUS_MODEL when unreadable. */
    enum status (*read)(source *s, const char *name, int64_t row_begin, int64_t row_count,
                        int64_t col_begin, int64_t col_count, float *dst);
    /* The same, as the bf16 numbers that the file holds; only of tensors that say bf16. */
    enum status (*read_bf16)(source *s, const char *name, int64_t row_begin, int64_t row_count,
                             int64_t col_begin, int64_t col_count, bf16 *dst);
    /* These rows will be read soon: the disk may begin. NULL: there is none. */
    void (*ahead)(const source *s, const char *name, int64_t row_begin, int64_t row_count);
    /* fp8 weights: scales[ceil(col_count / 128)] of these rows, in steps of 128 columns from
     * col_begin. False when the file does not keep them so. NULL: it never does. */
    bool (*block_scales)(const source *s, const char *name, int64_t row_begin, int64_t row_count,
                         int64_t col_begin, int64_t col_count, float *scales);
    /* All rows have been read: pages that stayed in memory because somebody read next to them go as
     * well. NULL: there are none. */
    void (*forget)(source *s);
    /* A text file that belongs to the model, see source_read_text. NULL: there are none. */
    enum status (*read_text)(const source *s, const char *file, size_t limit, char **text,
                             size_t *n);
    void (*close)(source *s);
};

/* First member of every source implementation. */
struct source {
    const struct source_ops *ops;
    struct model_config config;
    char path[1024];     /* for messages */
    int64_t total_bytes; /* of all tensors, for progress */
};

/* A Hugging Face folder or one .gguf file, told apart by what is there. */
enum status source_open(const char *path, source **out);
enum status safetensors_open(const char *folder, source **out);
enum status gguf_open(const char *file, source **out);
/* Weights made from a hash of (seed, tensor name, row, column): the same values for every rank and
 * machine, scaled so that activations and logits are sane (see synthetic.c). */
enum status synthetic_open(const struct model_config *config, uint64_t seed, source **out);
void source_close(source *s); /* NULL is allowed */

/* The text of tokenizer.json, tokenizer_config.json, chat_template.jinja, ... beside the weights:
 * malloc'ed, NUL-terminated. *text = NULL, *n = 0 and STATUS_OK when the model has no such file (GGUF and
 * synthetic sources have none; GGUF's tokenizer is in load/gguf.h). STATUS_MODEL above `limit` bytes. */
enum status source_read_text(const source *s, const char *file, size_t limit, char **text,
                             size_t *n);

/* For implementations: keeps the path for messages; STATUS_USAGE when it is too long. */
enum status source_set_path(source *s, const char *path);

#endif
