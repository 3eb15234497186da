/* prompts.h: prompts made beside the event loop: chat templates rendered, long texts tokenised.
 *
 *   loop: prompts_start ─► queue ─► thread: messages ─ template (up to 5 s) ─► text ─ tokenizer ─► ids
 *                                              finished ─► loop: done ◄───────────────────────────┘
 *
 * A template is a program of somebody else's, and 8 MB of text take the tokenizer a second: neither
 * may hold up streams, probes and other requests. So one thread makes prompts, in the order of arrival,
 * because there is one helper process for templates; whoever waits is parked and may leave: a job that
 * waits is dropped then, a template that runs is stopped, so that clients who come and go leave no work
 * behind. Short texts are not worth the way. Owns: the queue (bounded), the
 * thread. Refuses to know: what the prompts are for. Threads: all functions belong to the loop's
 * thread. Memory: malloc per job.
 */
#ifndef SFUMATO_SERVE_PROMPTS_H
#define SFUMATO_SERVE_PROMPTS_H

#include <event2/event.h>

#include "serve/body.h"
#include "serve/metrics.h"
#include "serve/refusal.h"

typedef struct prompter prompter;
typedef struct prompt_job prompt_job;

struct prompt_made {
    char *text; /* malloc'ed */
    size_t n;
    uint32_t *ids; /* malloc'ed; NULL: not wanted */
    size_t count;
};

/* What is to be made: the text of messages, or of given texts; and their ids. */
struct prompt_order {
    struct body_template template;            /* of messages; chat NULL: the texts are given */
    struct prompt_made all[BODY_PROMPTS_MAX]; /* what was given or made: one with messages */
    int count;
    const tokenizer *tokenizer; /* NULL: no ids are wanted */
    bool add_special;
};
/* Another text to tokenise, copied. */
enum status prompt_order_add(struct prompt_order *o, const char *text, size_t n);
/* So little that prompt_order_make may be called on the loop: no template, short texts or none. */
bool prompt_order_is_short(const struct prompt_order *o);
enum status prompt_order_make(struct prompt_order *o);
void prompt_order_fini(struct prompt_order *o);

/* jobs_max: more are refused. The thread starts with the first job. */
enum status prompter_new(struct event_base *base, struct metrics *metrics, int jobs_max,
                         prompter **out);
/* Waits for the thread, which drops what it does. No done function is called any more. */
void prompter_free(prompter *p);

int prompter_count(
    const prompter *p); /* jobs that have not ended, those nobody waits for included */
/* Every job that somebody waits for is done now, with this refusal unless it is ready. */
void prompter_end_all(prompter *p, const struct refused *why);

/* made: [order->count], borrowed until it returns; NULL: why says why not. */
typedef void prompt_done(void *user, const struct prompt_made *made, const struct refused *why);

/* Takes over what is in `o` and leaves it empty, or fails and leaves it alone. done: once, later,
 * unless cancelled. STATUS_BUSY: too many wait. */
enum status prompts_start(prompter *p, struct prompt_order *o, prompt_done *done, void *user,
                          prompt_job **out);
void prompts_cancel(prompt_job *job);

#endif
