/* engine.h: rank 0's continuous-batching engine, and the loop of every other rank.
 *
 *   submit ─► waiting ─► admit ─► plan ─► bcast ─► model_step ─► gather ─► think_step ─► events
 *
 * Rank 0 alone knows requests, policy, randomness and output; the others repeat what the plan says
 * (engine_follow). A sequence's output does not depend, byte for byte, on what else is in the
 * batch, on chunk size, on preemption, or on prefix-cache hits.
 *
 * Thread: engine. Memory: engine_new takes everything of fixed size, task_new what one request can
 * need; a tick allocates nothing.
 */
#ifndef SFUMATO_ENGINE_ENGINE_H
#define SFUMATO_ENGINE_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "comm/comm.h"
#include "engine/request.h"
#include "model/model.h"

typedef struct engine engine;

struct engine_options {
    int max_seqs;           /* sequences running at once */
    int max_batched_tokens; /* rows of one step */
    int64_t max_model_len;  /* positions of one sequence */
    int32_t page_count;
    bool prefix_cache;
    int queue_max;   /* waiting sequences; 0 = no limit */
    int vocab_count; /* ids the tokenizer knows; 0 = every row of the matrix */
    /* Where the backend decides on the device (engine/run.h): most steps of a run, 0 = no runs, and
     * steps launched before the first of them has been read, 1 .. RUN_AHEAD_MAX. */
    int run_steps, launch_ahead;
};

/* What the model and the backend must be able to do in one step (model_options, backend_config). */
int engine_logit_rows_max(const struct engine_options *options);
int engine_probes_max(const struct engine_options *options);
int engine_run_rows_max(const struct engine_options *options);
struct batch_limits engine_batch_limits(const struct engine_options *options);

typedef void (*engine_event_fn)(void *user, const struct engine_event *event);

/* Rank 0. The event function runs inside engine_tick and engine_cancel; it may call engine_submit
 * and engine_cancel. options are cut to what can be used: sequences to rows, lengths to the page
 * pool. */
enum status engine_new(model *m, comm *c, const struct engine_options *options,
                       engine_event_fn on_event, void *user, engine **out);
void engine_free(engine *e);

/* Copies and queues. STATUS_REQUEST: can never run (too long, n too large), with param;
 * STATUS_BUSY: queue full. */
enum status engine_submit(engine *e, const struct request *r);
/* The same with a task made elsewhere (task_new), which it owns from now on, whatever the status. */
enum status engine_take(engine *e, struct task *t);
/* choice < 0: all choices. Pages go back at once. Gives an ENGINE_FINISHED event with
 * FINISH_REASON_ABORT unless quiet; nothing more comes from the choice. Unknown or finished ones
 * are ignored. */
void engine_cancel(engine *e, uint64_t request_id, int choice, bool quiet);
/* The heaviest step there can be, before the first request: what it takes is there then. */
void engine_warm_up(engine *e);
/* Runs one step, or reads one of a run's. False when there is nothing to do (nothing was sent to the
 * other ranks). */
bool engine_tick(engine *e);
/* Evicts the youngest running sequence as if pages had run out; nothing it says may change by it.
 * For tests (also: SFUMATO_FAULT=preempt:0:N, before every N-th tick). */
void engine_preempt(engine *e);
/* Tells the other ranks to leave engine_follow. Once, after the last tick. */
void engine_stop(engine *e);

/* Every rank but 0: obeys plans until told to stop. */
void engine_follow(model *m, comm *c, const struct engine_options *options);

struct engine_counters {
    uint64_t steps, run_steps /* of these, in runs */, preemptions, prompt_tokens, cached_tokens,
        generated_tokens, soft_steps, full_fetches;
    int running, waiting;
    int32_t pages_used, pages_cached, pages_free;
    double plan_seconds, forward_seconds, sample_seconds; /* per phase, summed */
    double broadcast_seconds;                             /* part of plan_seconds */
    uint64_t decision_hash; /* of all decisions so far: equal hashes = equal runs */
};
void engine_counters_get(const engine *e, struct engine_counters *out);

/* Bytes the engine's plans and gathers need at most, for comm_setup. */
void engine_comm_needs(const struct engine_options *options, size_t *bcast_bytes,
                       size_t *gather_bytes, int64_t vocab_local_max);

#endif
