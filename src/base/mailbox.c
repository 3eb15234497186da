/* mailbox.c: see mailbox.h.
 *
 * Positions count bytes since the beginning and never wrap (64 bits); a position modulo the size is
 * a place. Each message starts with its length in 8 bytes; the length GAP says that the rest of the
 * ring up to its end is unused. `flushed` belongs to the writer, `popped` to the reader; each is
 * read by the other with acquire, so that bytes are there before the position says so.
 */
#include "base/mailbox.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_BYTES = 8, LINE_BYTES = 64, LEAST_BYTES = 4096, RECHECK_MS = 100 };
#define GAP UINT64_MAX

struct mailbox {
    char *ring;
    size_t size; /* a power of two */
    int filled_fd, room_fd;
    /* writer */
    _Alignas(LINE_BYTES) _Atomic uint64_t flushed;
    uint64_t written, reserved; /* reserved: where the current message's head is */
    _Atomic bool writer_waits;
    /* reader */
    _Alignas(LINE_BYTES) _Atomic uint64_t popped;
};

static size_t padded(size_t n) { return (n + 7) & ~(size_t)7; }

enum status mailbox_new(size_t bytes, mailbox **out) {
    size_t size = LEAST_BYTES;
    while (size < bytes) size *= 2;
    *out = NULL;
    mailbox *m = aligned_alloc(LINE_BYTES, sizeof *m);
    if (!m) return fail(STATUS_MEMORY, "no memory for a mailbox");
    memset(m, 0, sizeof *m);
    m->size = size;
    m->ring = malloc(size);
    m->filled_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    m->room_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!m->ring || m->filled_fd < 0 || m->room_fd < 0) {
        mailbox_free(m);
        return fail(STATUS_MEMORY, "no memory or no file descriptors for a mailbox of %zu bytes",
                    size);
    }
    *out = m;
    return STATUS_OK;
}

void mailbox_free(mailbox *m) {
    if (!m) return;
    if (m->filled_fd >= 0) close(m->filled_fd);
    if (m->room_fd >= 0) close(m->room_fd);
    free(m->ring);
    free(m);
}

static void ring_bell(int fd) {
    const uint64_t one = 1;
    if (write(fd, &one, sizeof one) < 0) ASSERT(errno == EAGAIN); /* full = rung often enough */
}

static void silence(int fd) {
    uint64_t count;
    if (read(fd, &count, sizeof count) < 0) ASSERT(errno == EAGAIN || errno == EINTR);
}

/* ---- writer ---- */

static bool has_room(mailbox *m, uint64_t end) {
    return end - atomic_load_explicit(&m->popped, memory_order_acquire) <= m->size;
}

static void wait_for_room(mailbox *m, uint64_t end) {
    if (has_room(m, end)) return;
    mailbox_flush(m);
    while (!has_room(m, end)) {
        atomic_store(&m->writer_waits, true);
        if (has_room(m, end)) break;
        struct pollfd wait = {.fd = m->room_fd, .events = POLLIN};
        poll(&wait, 1, RECHECK_MS);
        silence(m->room_fd);
    }
    atomic_store(&m->writer_waits, false);
}

void *mailbox_reserve(mailbox *m, size_t n) {
    const size_t whole = HEAD_BYTES + padded(n), place = m->written % m->size;
    ASSERT_LE(whole, m->size / 4);
    const size_t gap = place + whole > m->size ? m->size - place : 0;
    wait_for_room(m, m->written + gap + whole);
    if (gap > 0) {
        const uint64_t mark = GAP;
        memcpy(m->ring + place, &mark, sizeof mark);
    }
    m->reserved = m->written + gap;
    return m->ring + m->reserved % m->size + HEAD_BYTES;
}

void mailbox_commit(mailbox *m, size_t n) {
    const uint64_t length = n;
    memcpy(m->ring + m->reserved % m->size, &length, sizeof length);
    m->written = m->reserved + HEAD_BYTES + padded(n);
}

void mailbox_flush(mailbox *m) {
    if (atomic_load_explicit(&m->flushed, memory_order_relaxed) == m->written) return;
    atomic_store_explicit(&m->flushed, m->written, memory_order_release);
    ring_bell(m->filled_fd);
}

/* ---- reader ---- */

/* Position and length of the oldest message; false when there is none. */
static bool oldest(mailbox *m, uint64_t *at, uint64_t *length) {
    const uint64_t end = atomic_load_explicit(&m->flushed, memory_order_acquire);
    *at = atomic_load_explicit(&m->popped, memory_order_relaxed);
    if (*at == end) return false;
    memcpy(length, m->ring + *at % m->size, sizeof *length);
    if (*length == GAP) {
        *at += m->size - *at % m->size;
        memcpy(length, m->ring, sizeof *length);
    }
    return true;
}

const void *mailbox_peek(mailbox *m, size_t *n) {
    uint64_t at, length;
    if (!oldest(m, &at, &length)) return NULL;
    *n = (size_t)length;
    return m->ring + at % m->size + HEAD_BYTES;
}

void mailbox_pop(mailbox *m) {
    uint64_t at, length;
    const bool there = oldest(m, &at, &length);
    ASSERT(there);
    const uint64_t popped = at + HEAD_BYTES + padded((size_t)length);
    atomic_store(&m->popped, popped);
    /* Not for each message: a writer that waits has flushed all, and what it waits to write is at most
     * half of the ring, with the gap before it. */
    if (!atomic_load(&m->writer_waits) || atomic_load(&m->flushed) - popped > m->size / 2) return;
    atomic_store(&m->writer_waits, false);
    ring_bell(m->room_fd);
}

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

bool mailbox_wait(mailbox *m, double seconds) {
    const int64_t until = seconds < 0 ? 0 : now_ms() + (int64_t)(1000 * seconds);
    size_t n;
    silence(m->filled_fd);
    while (!mailbox_peek(m, &n)) {
        const int64_t left = seconds < 0 ? -1 : until - now_ms();
        if (seconds >= 0 && left <= 0) return false;
        struct pollfd wait = {.fd = m->filled_fd, .events = POLLIN};
        poll(&wait, 1, left > 60000 ? 60000 : (int)left);
        silence(m->filled_fd);
    }
    return true;
}

int mailbox_fd(const mailbox *m) { return m->filled_fd; }

void mailbox_fd_clear(mailbox *m) { silence(m->filled_fd); }
