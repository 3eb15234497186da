/* file.c: see file.h. */
#include "load/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Opens a regular file and tells its size; -1 with errno, or after fail() with *status set. */
static int open_regular(const char *path, size_t *n, enum status *status) {
    struct stat info;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a fifo must not block */
    *status = STATUS_OK;
    if (fd < 0) return -1;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        close(fd);
        *status = fail(STATUS_MODEL, "%s is not a regular file", path);
        return -1;
    }
    *n = (size_t)info.st_size;
    return fd;
}

enum status file_map_open(const char *path, struct file_map *out) {
    enum status status;
    *out = (struct file_map){0};
    const int fd = open_regular(path, &out->n, &status);
    if (fd < 0) {
        if (status != STATUS_OK) return status;
        return fail(STATUS_MODEL, "%s: %s", path, strerror(errno));
    }
    if (out->n == 0) {
        close(fd);
        return fail(STATUS_MODEL, "%s is empty: download it again", path);
    }
    void *bytes = mmap(NULL, out->n, PROT_READ, MAP_SHARED, fd, 0);
    const int why = errno;
    if (bytes == MAP_FAILED) {
        close(fd);
        return fail(why == ENOMEM ? STATUS_MEMORY : STATUS_MODEL, "%s cannot be mapped: %s", path,
                    strerror(why));
    }
    out->bytes = bytes;
    out->fd = fd;
    return STATUS_OK;
}

void file_map_close(struct file_map *map) {
    if (map->bytes) {
        munmap((void *)(uintptr_t)map->bytes, map->n);
        close(map->fd);
    }
    *map = (struct file_map){0};
}

static bool map_holds(const struct file_map *map, const uint8_t *from, size_t n) {
    return from >= map->bytes && n <= map->n && (size_t)(from - map->bytes) <= map->n - n;
}

enum status file_map_read(const struct file_map *map, const uint8_t *from, size_t n, void *dst) {
    ASSERT(map_holds(map, from, n));
    for (size_t done = 0; done < n;) {
        const off_t at = (off_t)(from - map->bytes) + (off_t)done;
        const ssize_t got = pread(map->fd, (char *)dst + done, n - done, at);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0)
            return fail(STATUS_MODEL, "byte %lld of the weights cannot be read: %s", (long long)at,
                        got < 0 ? strerror(errno) : "the file has become shorter");
        done += (size_t)got;
    }
    return STATUS_OK;
}

void file_map_ahead(const struct file_map *map, const uint8_t *from, size_t n) {
    enum { AT_ONCE = 1 << 20 }; /* bytes: a kernel takes no more of one call than its window */
    ASSERT(map_holds(map, from, n));
    for (size_t done = 0; done < n; done += AT_ONCE)
        posix_fadvise(map->fd, (off_t)(from - map->bytes) + (off_t)done,
                      (off_t)(n - done < AT_ONCE ? n - done : AT_ONCE), POSIX_FADV_WILLNEED);
}

void file_map_want(const struct file_map *map, const uint8_t *from, size_t n) {
    ASSERT(map_holds(map, from, n));
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = (uintptr_t)from / page * page, end = (uintptr_t)from + n;
#ifdef MADV_POPULATE_READ
    if (end > begin && madvise((void *)begin, end - begin, MADV_POPULATE_READ) == 0) return;
#endif
    if (end > begin) madvise((void *)begin, end - begin, MADV_WILLNEED); /* an old kernel */
}

void file_map_forget(const struct file_map *map, const uint8_t *from, size_t n) {
    ASSERT(map_holds(map, from, n));
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = (uintptr_t)from / page * page, end = (uintptr_t)from + n;
    /* of a shared file mapping only the page table's entries go: rounding outward loses nothing */
    if (end > begin) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

bool file_exists(const char *path) { return access(path, F_OK) == 0; }

enum status file_read_text(const char *path, size_t limit, char **text, size_t *n) {
    enum status status;
    size_t size, done = 0;
    *text = NULL;
    *n = 0;
    const int fd = open_regular(path, &size, &status);
    if (fd < 0) {
        if (status != STATUS_OK || errno == ENOENT) return status;
        return fail(STATUS_MODEL, "%s: %s", path, strerror(errno));
    }
    if (size > limit) {
        close(fd);
        return fail(STATUS_MODEL, "%s has %zu bytes, the limit is %zu", path, size, limit);
    }
    char *bytes = malloc(size + 1);
    if (!bytes) {
        close(fd);
        return fail(STATUS_MEMORY, "%s: no memory for %zu bytes", path, size);
    }
    while (done < size) {
        const ssize_t got = read(fd, bytes + done, size - done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) break;
        done += (size_t)got;
    }
    close(fd);
    if (done < size) {
        free(bytes);
        return fail(STATUS_MODEL, "%s: only %zu of %zu bytes could be read", path, done, size);
    }
    bytes[size] = '\0';
    *text = bytes;
    *n = size;
    return STATUS_OK;
}
