/* openai.h: what chat and text completions share (internal to serve/; serving.md §4).
 *
 *   route ─► generation_start ─► service_call        front ─► shape->... ─► chunks or one body
 *
 * A *generation* is one exchange with its call: it begins the stream at the first event, pings when
 * it is silent, writes errors in the place where they belong, and cancels when the client leaves.
 * A *shape* is what differs between the two APIs: names and the JSON of a choice.
 * Thread: net. Memory: one struct per call, with growing buffers.
 */
#ifndef SFUMATO_SERVE_OPENAI_H
#define SFUMATO_SERVE_OPENAI_H

#include "serve/http.h"

struct generation;

struct shape {
    enum call_kind kind;
    const char *id_prefix, *object, *chunk_object;
    /* Writes the items of "choices" of the first chunk of choice `choice`; NULL: none. */
    void (*begin)(struct generation *g, int choice, struct json_writer *w);
    /* A step happened: may keep what it needs (logprobs). NULL: nothing to keep. */
    void (*note)(struct generation *g, int choice, const struct engine_event *event);
    void (*note_prompt)(struct generation *g, int prompt, const struct engine_event *event);
    /* The choice object of a chunk for new text and records, without them sent before. False: there
     * is nothing to say. */
    bool (*delta)(struct generation *g, int choice, const struct stream_delta *delta,
                  struct json_writer *w);
    void (*last)(struct generation *g, int choice, struct json_writer *w);  /* of a stream */
    void (*whole)(struct generation *g, int choice, struct json_writer *w); /* of a body */
    enum status (*open)(struct generation *g); /* g->own; NULL: nothing of its own */
    void (*close)(struct generation *g);
};

struct generation {
    struct exchange *x;
    call *call;
    const struct shape *shape;
    const struct body *body;
    struct json_writer w;
    char *head; /* {"id":...,"choices":[ */
    size_t head_n;
    bool stream, started;
    struct event *ping;
    double last_sent;
    void *own; /* of the shape */
};

/* Answers the exchange, now or when the call ends. */
void generation_start(struct exchange *x, const struct shape *shape);

/* "usage": {...} */
void openai_write_usage(const struct request_usage *u, struct json_writer *w);
/* The end of a choice in a chunk that is not its last: no finish, new records of the trace; "}". */
void openai_end_delta(const struct reply_parts *parts, struct json_writer *w);
/* The end of a finished choice: finish_reason, stop_reason, sfumato; "}". with_trace: of a body, the
 * last chunk's records have been sent before. */
void openai_end_choice(const reply *r, bool with_trace, struct json_writer *w);

#endif
