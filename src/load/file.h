/* file.h: a file in memory, the two ways the loaders need it.
 *
 * file_map: read-only mapping of a whole file (weights); only the pages that are touched are read.
 * file_read_text: a small file in one malloc'ed, NUL-terminated piece, with a size limit.
 * Only regular files are opened: a pipe or a device in place of a model file must not hang the job.
 */
#ifndef SFUMATO_LOAD_FILE_H
#define SFUMATO_LOAD_FILE_H

#include <stddef.h>
#include <stdint.h>

#include "base/check.h"

struct file_map {
    const uint8_t *bytes;
    size_t n;
    int fd; /* of an open map only */
};

/* STATUS_MODEL when it cannot be read or is empty. */
enum status file_map_open(const char *path, struct file_map *out);
void file_map_close(struct file_map *map);
/* dst[n] = the bytes [from, from + n) of the map, read without mapping their pages: the fastest way
 * to what is read once. STATUS_MODEL when the file has become shorter or cannot be read. */
enum status file_map_read(const struct file_map *map, const uint8_t *from, size_t n, void *dst);
/* They will be read soon, by whatever way: the disk begins to bring them in; does not wait. */
void file_map_ahead(const struct file_map *map, const uint8_t *from, size_t n);
/* They will be read through the map at once: they are brought in and mapped in one go, not a page
 * fault at a time. */
void file_map_want(const struct file_map *map, const uint8_t *from, size_t n);
/* Bytes [from, from + n) of the map have been read and packed: they leave this process's resident memory
 * (they are fetched again if read again), so that loading never holds the weights twice. */
void file_map_forget(const struct file_map *map, const uint8_t *from, size_t n);

bool file_exists(const char *path);

/* A file that does not exist gives STATUS_OK with *text = NULL and *n = 0. */
enum status file_read_text(const char *path, size_t limit, char **text, size_t *n);

#endif
