/* source.c: which kind of model a path is, and what all kinds share. See source.h. */
#include "load/source.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static bool ends_with(const char *text, const char *end) {
    const size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

enum status source_open(const char *path, source **out) {
    struct stat info;
    *out = NULL;
    if (stat(path, &info) != 0) {
        return fail(STATUS_MODEL, "model %s: %s: give a Hugging Face folder or a .gguf file", path,
                    strerror(errno));
    }
    if (S_ISDIR(info.st_mode)) return safetensors_open(path, out);
    if (ends_with(path, ".safetensors") || ends_with(path, ".json")) {
        return fail(STATUS_MODEL, "model %s is one file of a model: give the folder it is in",
                    path);
    }
    return gguf_open(path, out); /* whatever its name: the file says what it is */
}

void source_close(source *s) {
    if (s) s->ops->close(s);
}

enum status source_read_text(const source *s, const char *file, size_t limit, char **text,
                             size_t *n) {
    *text = NULL;
    *n = 0;
    return s->ops->read_text ? s->ops->read_text(s, file, limit, text, n) : STATUS_OK;
}

enum status source_set_path(source *s, const char *path) {
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--; /* "models/tiny/" reads better as "models/tiny" */
    if (n == 0 || n >= sizeof s->path) {
        return fail(STATUS_USAGE, "a model path of %zu bytes: allowed are 1 to %zu", n,
                    sizeof s->path - 1);
    }
    memcpy(s->path, path, n);
    s->path[n] = '\0';
    return STATUS_OK;
}
