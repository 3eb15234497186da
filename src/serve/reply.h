/* reply.h: engine events of one choice -> text, counts and JSON (cli.md "generate", serving.md §4).
 *
 *   ENGINE_STEP ─► reply_step ─► stream (text, stop strings) ─► delta: what became visible
 *                      └─► ids, counts, trace and logprob records (rendered at once)
 *   ENGINE_FINISHED ─► reply_finish ─► reply_write_line / the service's own forms
 *
 * Owns: one choice's visible result. A step past a stop match is not counted: the caller cancels
 * the choice in the engine when `delta.stopped` says so. Refuses to know: sockets, files, order of
 * lines. Thread: one at a time. Memory: malloc, grows with the reply, freed by reply_free.
 */
#ifndef SFUMATO_SERVE_REPLY_H
#define SFUMATO_SERVE_REPLY_H

#include "base/json.h"
#include "engine/request.h"
#include "serve/body.h"
#include "text/stream.h"

typedef struct reply reply;

/* choice: index within the body, prompt * n + choice. Facts and body must outlive the reply. */
enum status reply_new(const struct body_facts *facts, const struct body *body, int choice,
                      reply **out);
void reply_free(reply *r);

/* One step. delta is borrowed until the next call; what include_reasoning hides and what
 * stream_reasoning holds back until thinking ends is not in it. */
enum status reply_step(reply *r, const struct engine_event *event, struct stream_delta *delta);
/* The end: from the engine's last event; after a stop string it may be NULL, and says only what was
 * cached. */
enum status reply_finish(reply *r, const struct engine_event *event, struct stream_delta *delta);
/* True when the choice was aborted or failed: there is no result to write. */
bool reply_aborted(const reply *r);

/* The facts a summary shows. */
struct reply_summary {
    struct request_usage usage;
    enum finish finish;
    enum think_end end;
    double mean_entropy; /* NAN without thinking steps */
    int64_t soft_steps; /* of the thinking it shows, also when usage counts it for another choice */
    uint64_t seed;
    bool loop_break;
    const char *stop_text; /* the stop string that matched, or NULL */
    bool stopped_by_id;
    uint32_t stop_id;
};
void reply_summarise(const reply *r, struct reply_summary *out);

/* ---- for the service's own forms ---- */

/* What has been rendered since the last reply_forget. thinking, answer: plain bytes; the others:
 * items of JSON arrays, without brackets, with commas between. Borrowed. */
struct reply_parts {
    const struct json_writer *thinking, *answer, *trace, *content_logprobs, *reasoning_logprobs;
};
void reply_get_parts(const reply *r, struct reply_parts *out);
/* A stream has sent its parts: counts stay, parts go, memory is used again. */
void reply_forget(reply *r);
/* "stop_reason": the stop string, the stop id, or null. */
void reply_write_stop_reason(const reply *r, struct json_writer *w);
/* "sfumato": {mode, counts, ...}; with the trace that has not been forgotten when asked for. */
void reply_write_info(const reply *r, bool with_trace, struct json_writer *w);
/* "KEY": [items]. */
void reply_write_items(struct json_writer *w, const char *key, const struct json_writer *items);

/* The object of an output line, no newline. */
void reply_write_line(const reply *r, struct json_writer *w);
/* {"custom_id":...,"error":{...}} from this thread's last failure. body may be a failed one. */
void reply_write_error_line(const struct body_facts *facts, const struct body *body,
                            struct json_writer *w);
/* The error object alone (serving.md §5). */
void reply_write_error(const struct fault *fault, struct json_writer *w);
/* custom_id as it came, or null. */
void reply_write_custom_id(const json_t *custom_id, struct json_writer *w);

#endif
