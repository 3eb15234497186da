/* think.h: THE soft-thinking module's interface (soft-thinking.md, normative).
 *
 *   candidates of one row  ──►  think_step  ──►  decision: trace id, concept token, phase,
 *   (merged over ranks)         + parameters               H, end, finish
 *                               + per-sequence state
 *
 * think_step is pure: no allocation, no I/O, no clock, no globals; randomness only from rng.h with
 * the counter of soft-thinking.md §6. The step itself lives in headers (token.h, filter.h, noise.h,
 * policy_*.h, stop.h, step.h: read them in this order) that also compile as CUDA C++; think.c holds
 * validation and names.
 * Refuses to know: tokenizers, ranks, logits tensors, requests. Knows ids, floats and counters.
 */
#ifndef SFUMATO_THINK_THINK_H
#define SFUMATO_THINK_THINK_H

#include <stdbool.h>
#include <stdint.h>

#include "base/check.h"

enum {
    THINK_TOPK_MAX = 64,     /* widest concept token (max_topk) */
    THINK_POLICY_STATE = 16, /* floats a policy may keep per sequence */
    THINK_EOS_MAX = 16,
    THINK_CLOSE_TEXT_MAX = 256, /* ids of close_text */
    THINK_WATCHDOG_IDS = 32,    /* latest trace ids the collapse watchdog looks at */
};
#define THINK_TEMPERATURE_MIN 1e-3f /* below: acts as 0 */

/* clang-format off */
enum think_mode { /* THINK_OFF, THINK_SOFT, ... */
#define POLICY(NAME, name, soft, help) THINK_##NAME,
#include "think/policies.def"
#undef POLICY
    THINK_MODE_COUNT
};
/* clang-format on */
enum think_phase { PHASE_ANSWER, PHASE_THINKING };
enum think_end {
    END_NONE,
    END_MODEL,
    END_COLD_STOP,
    END_BUDGET,
    END_EOS,
    END_LENGTH,
    END_WATCHDOG
};
enum think_on_eos { ON_EOS_CLOSE, ON_EOS_FINISH, ON_EOS_MASK };
enum think_start { START_AUTO, START_FIRST_TOKEN };
enum think_compat { COMPAT_NONE, COMPAT_OFFICIAL_2025_05, COMPAT_OFFICIAL_2026_01 };
/* What the step itself concludes. */
enum think_finish { FINISH_NONE, FINISH_EOS, FINISH_LOOP_BREAK };

const char *think_mode_name(enum think_mode m);
const char *think_mode_help(enum think_mode m); /* one line, for --help */
bool think_mode_is_soft(enum think_mode m);     /* feeds back mixtures: every mode but off */
const char *think_end_name(enum think_end e);
const char *think_phase_name(enum think_phase p);
/* False when the name is unknown. */
bool think_mode_parse(const char *name, enum think_mode *out);
bool think_on_eos_parse(const char *name, enum think_on_eos *out);
bool think_start_parse(const char *name, enum think_start *out);
bool think_compat_parse(const char *name, enum think_compat *out);

/* One set of sampling filters. top_k 0 = off, top_p 1 = off, min_p 0 = off; a temperature below
 * THINK_TEMPERATURE_MIN = argmax (ties to the lower id), whatever the filters. */
struct think_filters {
    float temperature;
    int top_k;
    float top_p, min_p;
};

/* Everything a request may say about thinking, fully resolved (no "unset" left). POD. */
struct think_params {
    enum think_mode mode;
    int max_topk;                  /* K, 1..THINK_TOPK_MAX */
    struct think_filters thinking; /* in mode off: as the request's ordinary fields unless given */
    struct think_filters answer;
    bool cold_stop;           /* on or off */
    float cold_stop_entropy;  /* nats */
    int64_t cold_stop_length; /* steps */
    int64_t budget;           /* thinking steps; 0 = none */
    enum think_start start;
    enum think_on_eos on_eos;
    enum think_compat compat; /* not NONE: overrides start, on_eos and answer.temperature (§7) */
    bool ignore_eos;          /* eos_ids are ordinary ids in both phases */
    float gumbel_temperature, dirichlet_alpha;
    uint64_t seed;
    uint32_t choice;       /* index within its prompt: enters the random counter */
    int open_id, close_id; /* markers; -1: the model has none */
    int eos_count;
    int32_t eos_ids[THINK_EOS_MAX];
    int close_text_count; /* ids forced after a close by cold stop or budget */
    int32_t close_text[THINK_CLOSE_TEXT_MAX];
    int watchdog_repeats; /* 0 = off, 2..32: a trace n-gram this many times in a row closes */
};

/* Ranges of soft-thinking.md §2: STATUS_REQUEST when one is broken, the field's name in the fault's
 * param ("soft_thinking.max_topk"). vocab_count: ids the tokenizer knows. */
enum status think_params_check(const struct think_params *p, int vocab_count);

/* What the rules remember between steps. POD, no pointers: part of a preempted sequence. */
struct think_state {
    enum think_phase phase; /* of the step about to be decided */
    enum think_end end;     /* END_NONE while thinking has not ended */
    uint32_t step;          /* generated steps so far = index of the step about to be decided */
    int64_t thinking_steps, soft_steps;
    int64_t cold_count; /* consecutive low-entropy steps */
    int64_t loop_count; /* compat answer loop breaker */
    int forced_next;    /* next index into close_text, or -1 */
    bool thinking_done; /* a close marker was emitted: thinking cannot restart */
    double entropy_sum; /* over thinking steps, for mean_entropy */
    float policy[THINK_POLICY_STATE];
    uint32_t watchdog_ring[THINK_WATCHDOG_IDS]; /* trace ids of the latest thinking steps */
};

/* Phase of the first generated step, from the prompt's ids (an open marker, no close after it). */
void think_state_init(struct think_state *s, const struct think_params *p,
                      const uint32_t *prompt_ids, int64_t prompt_count);

/* Which temperature the row's logits must be divided by before the statistics (1 when the step's
 * temperature acts as 0), and whether end-of-sequence ids must be masked to -inf first: all of
 * eos_ids except close_id, should a model list its close marker there (thinking must be able to
 * end). min_tokens, which masks eos_ids in both phases and stop ids in the answer, is the engine's matter. */
float think_row_temperature(const struct think_params *p, const struct think_state *s);
bool think_row_masks_eos(const struct think_params *p, const struct think_state *s);

/* Candidates of one row, merged over all ranks: z' = z / T after bias, penalties, masks;
 * sorted by (z' desc, id asc). M, S, Q as soft-thinking.md §4.1 over the whole vocabulary.
 * m must be finite: a row of NaN, or with every id masked, must not come here. */
struct think_candidates {
    float m, s, q;
    int count;          /* entries listed, >= 1 */
    bool complete;      /* every id with z' > -inf is listed (full-logits path) */
    const float *z;     /* [count] */
    const uint32_t *id; /* [count] */
    float close_z;      /* z' of the close marker, -inf when there is none */
};

struct think_decision {
    uint32_t trace_id;
    enum think_phase phase; /* of this step */
    bool soft;              /* a soft step (§1) */
    bool forced;            /* a close_text id: p is null */
    bool marker;            /* trace id is the open or close marker, as marker: no text of it */
    bool loop_break;
    enum think_end end;       /* set on the step where thinking ended */
    enum think_finish finish; /* FINISH_NONE: the sequence goes on */
    float entropy;            /* H, nats */
    float p;                  /* probability of trace_id before filters; NAN when not known yet */
    int count;                /* entries of the concept token, >= 1 */
    uint32_t ids[THINK_TOPK_MAX];
    float weights[THINK_TOPK_MAX];
};

/* The step. Returns false, with *s unchanged, when the list is too short for the filters to be
 * exact: fetch the row's full logits (complete = true) and call again (§4, last paragraph). When it
 * returns true the result has the same bits for every list long enough. */
bool think_step(const struct think_params *p, struct think_state *s,
                const struct think_candidates *c, struct think_decision *out);

/* A sequence ran out of tokens: closes the books (END_LENGTH if still thinking). */
void think_finish_length(struct think_state *s);

#endif
