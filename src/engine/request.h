/* request.h: what a request is, what comes back, and why it ended. The engine's public face.
 *
 * A request is one prompt and n choices; a choice is a sequence with its own thinking, answer and
 * random stream. Everything is resolved before it comes here: ids not text, numbers not defaults.
 * A task is a copy of it with all the memory it can come to need, made on any thread, so that the
 * engine allocates nothing when it takes one (engine_take). Thread: engine (the service passes
 * requests and tasks through a mailbox).
 */
#ifndef SFUMATO_ENGINE_REQUEST_H
#define SFUMATO_ENGINE_REQUEST_H

#include <stdbool.h>
#include <stdint.h>

#include "base/check.h"
#include "think/think.h"

enum {
    REQUEST_CHOICES_MAX = 64,
    REQUEST_STOP_IDS_MAX = 64,
    REQUEST_BIAS_MAX = 1024,
    REQUEST_TOP_LOGPROBS_MAX = 20,
};

/* Inputs of one sequence prefix, hard ids and concept tokens alike: CSR. begin == NULL: all hard
 * ids. */
struct request_inputs {
    int64_t count;        /* positions */
    const int32_t *begin; /* [count + 1] into ids, weights; NULL: position i is ids[i], weight 1 */
    const uint32_t *ids;
    const float *weights; /* may be NULL when begin is NULL */
};

struct request_bias {
    uint32_t id;
    float add;
};

struct request {
    uint64_t id;                  /* the caller's; unique among live requests */
    struct request_inputs prompt; /* at least one position */
    int choices;                  /* n */
    /* One thinking (choice 0's draws), n answers on shared pages. The steps of the shared part come
     * as events of every choice, but count in choice 0's usage only; if choice 0 ends inside it,
     * all end alike. When thinking does not start within the first steps (SHARING_OPEN_STEPS), each
     * choice is on its own. */
    bool share_thinking;
    struct think_params think;      /* choice is set by the engine */
    int64_t max_tokens, min_tokens; /* steps; max_tokens >= 1 (0 only with score) */
    int stop_id_count;
    uint32_t stop_ids[REQUEST_STOP_IDS_MAX]; /* answer phase only; not part of the text */
    float presence_penalty, frequency_penalty, repetition_penalty; /* 0, 0, 1 = off */
    int bias_count;
    const struct request_bias *bias;
    bool logprobs;
    int top_logprobs; /* 0..REQUEST_TOP_LOGPROBS_MAX */
    /* score: no generation. Every position of `prompt` gives one ENGINE_SCORED event with H (at
     * think.thinking.temperature), the top `top_logprobs` at T = 1 and ln p of the next element;
     * then ENGINE_FINISHED with FINISH_REASON_LENGTH. */
    bool score;
};

/* STATUS_REQUEST with param: the request cannot be right. STATUS_MEMORY. The request may go after
 * it. */
struct task;
enum status task_new(const struct request *r, int vocab_count, struct task **out);
void task_free(struct task *t); /* one that no engine has taken; NULL is nothing */

enum finish {
    FINISH_REASON_NONE,
    FINISH_REASON_STOP,
    FINISH_REASON_LENGTH,
    FINISH_REASON_ABORT,
    FINISH_REASON_ERROR
};
const char *finish_name(enum finish f); /* "stop", "length", "abort", "error" */

/* Of one choice. prompt_tokens and cached_tokens repeat in every choice: a prompt counts once. */
struct request_usage {
    int64_t prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, soft_steps;
};

struct logprob_entry {
    uint32_t id;
    float logprob;
};

enum engine_event_kind { ENGINE_STEP, ENGINE_FINISHED, ENGINE_SCORED };

/* Borrowed: valid during the callback only. */
struct engine_event {
    enum engine_event_kind kind;
    uint64_t request_id;
    int choice;
    double queue_seconds; /* STEP, FINISHED: it waited so long for its first step; -1: had none */
    /* ENGINE_STEP */
    uint32_t step;
    bool shared; /* a step of choice 0, which counts in its usage, told for another choice too */
    const struct think_decision *decision;
    float logprob; /* of the trace id, T = 1, raw logits; NAN if not asked */
    int top_count;
    const struct logprob_entry *top;
    /* ENGINE_FINISHED */
    enum finish finish;
    bool loop_break;
    bool stopped_by_id;
    uint32_t stop_id;
    enum think_end thinking_end;
    double mean_entropy; /* NAN without thinking steps */
    struct request_usage usage;
    /* ENGINE_SCORED */
    int64_t position;
    float entropy;
    double next_logprob; /* NAN at the end */
};

#endif
