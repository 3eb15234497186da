/* stream.h: ids of a growing reply -> text, split into thinking and answer (serving.md §4.2).
 *
 * Owns the held-back bytes of one reply: an incomplete UTF-8 sequence, newlines at the borders of
 * the thinking text (rule 5), the longest suffix that may begin a stop string (rule 6). Phases are
 * told by the caller (from marker ids), never found in text. Pure state machine: no I/O; memory
 * from malloc, bounded by the longest stop string. One owner at a time.
 */
#ifndef SFUMATO_TEXT_STREAM_H
#define SFUMATO_TEXT_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "text/tokenizer.h"

typedef struct stream stream;

enum { STREAM_STOP_COUNT_MAX = 16, STREAM_STOP_BYTES_MAX = 256 };

struct stream_options {
    const char *const *stops; /* NUL-terminated, borrowed until stream_close */
    int stop_count;
    bool include_stop; /* keep the stop string in the answer */
    bool skip_special; /* leave special ids out of the text */
    bool raw;          /* completions: thinking, markers and answer as one text, newlines kept */
};

/* What one push made visible; borrowed until the next push. Empty strings are n = 0. */
struct stream_delta {
    const char *thinking;
    size_t thinking_n;
    const char *answer; /* with raw: everything goes here */
    size_t answer_n;
    bool stopped;   /* a stop string matched: nothing more may be pushed */
    int stop_index; /* which one, or -1 */
};

enum status stream_open(const tokenizer *t, const struct stream_options *options, stream **out);
void stream_close(stream *s);
/* thinking: the step's phase. marker: the step is the open or close marker (no text unless raw). */
enum status stream_push(stream *s, uint32_t id, bool thinking, bool marker,
                        struct stream_delta *out);
/* Flushes what is held back (incomplete UTF-8 becomes U+FFFD). */
enum status stream_finish(stream *s, struct stream_delta *out);

#endif
