/* model_files.h: writers of small model files, so that parsers are tested on real bytes.
 *
 * A `blob` grows by appending. GGUF and safetensors files are built in one and written to a folder that is
 * removed at the end. Written from the two formats' specifications, not from the parsers: sizes, offsets
 * and the q/k row order of llama files are worked out here a second time. Memory errors abort the test.
 */
#ifndef SFUMATO_TESTS_MODEL_FILES_H
#define SFUMATO_TESTS_MODEL_FILES_H

#include <stddef.h>
#include <stdint.h>

#include "load/source.h"

struct blob {
    uint8_t *bytes;
    size_t n, capacity;
};
void blob_free(struct blob *b);
void blob_add(struct blob *b, const void *bytes, size_t n);
void blob_add_text(struct blob *b, const char *text); /* without NUL */
void blob_add_u32(struct blob *b, uint32_t x);
void blob_add_u64(struct blob *b, uint64_t x);
void blob_pad(struct blob *b, size_t alignment);

/* A fresh folder; static buffer, four in turn. folder_remove takes it away with the files in it. */
const char *folder_make(void);
void folder_remove(const char *folder);
/* "folder/name"; static buffer, eight in turn. */
const char *folder_path(const char *folder, const char *name);
void folder_write(const char *folder, const char *name, const void *bytes, size_t n);
void folder_write_text(const char *folder, const char *name, const char *text);

/* header JSON + data, with the length in front. */
void safetensors_write(struct blob *out, const char *header, const void *data, size_t data_n);

/* GGUF: keys, then tensors, then gguf_finish. Tensor data is kept aside until then. */
struct gguf_writer {
    struct blob keys, tensors, data;
    uint64_t key_count, tensor_count;
    size_t alignment; /* 32 unless set before the first tensor (with the key) */
};
void gguf_key_text(struct gguf_writer *w, const char *key, const char *value);
void gguf_key_u32(struct gguf_writer *w, const char *key, uint32_t value);
void gguf_key_f32(struct gguf_writer *w, const char *key, float value);
void gguf_key_bool(struct gguf_writer *w, const char *key, bool value);
void gguf_key_texts(struct gguf_writer *w, const char *key, const char *const *values,
                    size_t count);
void gguf_key_i32s(struct gguf_writer *w, const char *key, const int32_t *values, size_t count);
/* type: the specification's number; rows = 0 makes a vector. */
void gguf_tensor(struct gguf_writer *w, const char *name, uint32_t type, int64_t rows, int64_t cols,
                 const void *bytes, size_t n);
void gguf_finish(struct gguf_writer *w, struct blob *out); /* frees the writer's blobs */

/* Every tensor of a source, in the numbers of `dtype` (F32, F16 by truncation, or BF16), as a Hugging
 * Face folder: config.json and model.safetensors, or that many shards and their index. */
void model_write_safetensors(source *s, const char *folder, enum config_dtype dtype, int shards);
/* The same as one GGUF file of F32, with vocab_rows tokens "t0", "t1", ...; llama's q and k rows are
 * interleaved as llama.cpp's converter does. */
void model_write_gguf(source *s, const char *folder, const char *name);

/* Calls visit for the name of every tensor the config asks for. */
void model_each_tensor(const struct model_config *c, void (*visit)(void *user, const char *name),
                       void *user);

#endif
