/* mailbox.h: whole messages from one thread to one other, without locks.
 *
 *   tail ──► [ length | message | length | message | ... ] ──► head (flushed) ──► next (written)
 *
 * A ring of bytes. The writer reserves, fills and commits messages and makes them visible in one
 * go with mailbox_flush, which wakes the reader once, so that a step of the engine costs one
 * write(2) however many events it has. The reader looks at the oldest message in place and pops it.
 * A message never wraps: a gap at the end of the ring is skipped.
 *
 * The reader sleeps either in mailbox_wait (engine thread) or in its own loop on mailbox_fd (net
 * thread, level-triggered). A full ring makes the writer sleep until the reader has popped: a
 * mailbox whose writer must never sleep is made large enough for all that can be under way.
 * Threads: exactly one writer, one reader. Memory: all of it in mailbox_new.
 */
#ifndef SFUMATO_BASE_MAILBOX_H
#define SFUMATO_BASE_MAILBOX_H

#include <stdbool.h>
#include <stddef.h>

#include "base/check.h"

typedef struct mailbox mailbox;

/* bytes: rounded up to a power of two. A message may take a quarter of it at most. */
enum status mailbox_new(size_t bytes, mailbox **out);
void mailbox_free(mailbox *m);

/* ---- writer ---- */
/* Room for n bytes, aligned to 8; sleeps while the ring is full (after flushing). */
void *mailbox_reserve(mailbox *m, size_t n);
/* The reserved bytes are a message; the length may have shrunk. */
void mailbox_commit(mailbox *m, size_t n);
void mailbox_flush(mailbox *m);

/* ---- reader ---- */
/* The oldest visible message, or NULL. */
const void *mailbox_peek(mailbox *m, size_t *n);
void mailbox_pop(mailbox *m);
/* Sleeps until there is a message, at most `seconds` (negative: for ever). */
bool mailbox_wait(mailbox *m, double seconds);
/* An eventfd that is readable while unread flushes are pending; mailbox_fd_clear before reading. */
int mailbox_fd(const mailbox *m);
void mailbox_fd_clear(mailbox *m);

#endif
