/* request.c: what a request may say. Checked once, at engine_submit; behind it the engine trusts.
 *
 * The names in `param` are the API's (serving.md §2), so a service can hand the fault on unchanged.
 * Lengths that depend on the engine (context, pages, queue) are checked in engine.c.
 * Thread: engine. Memory: a sorted copy while checking for duplicates.
 */
#include "engine/request.h"

#include <math.h>
#include <stdlib.h>

#include "engine/sequence.h"

#define BAD(param, ...) fail_param(STATUS_REQUEST, param, NULL, __VA_ARGS__)

const char *finish_name(enum finish f) {
    switch (f) {
        case FINISH_REASON_NONE:
            return "none";
        case FINISH_REASON_STOP:
            return "stop";
        case FINISH_REASON_LENGTH:
            return "length";
        case FINISH_REASON_ABORT:
            return "abort";
        case FINISH_REASON_ERROR:
            return "error";
    }
    return "none";
}

/* Concept tokens come as they were recorded (soft-thinking.md §8): at most 64 distinct ids, weights
 * >= 0, sum within 1e-3 of 1; used as given. */
static enum status check_mixture(int64_t position, const uint32_t *ids, const float *weights,
                                 int count) {
    double sum = 0;
    for (int i = 0; i < count; i++) {
        if (!isfinite(weights[i]) || weights[i] < 0)
            return BAD("prompt", "position %lld: weight %g is not a finite number >= 0",
                       (long long)position, (double)weights[i]);
        sum += (double)weights[i];
        for (int j = 0; j < i; j++)
            if (ids[j] == ids[i])
                return BAD("prompt", "position %lld: id %u stands twice in one concept token",
                           (long long)position, ids[i]);
    }
    if (!(fabs(sum - 1) <= 1e-3))
        return BAD("prompt", "position %lld: weights sum to %.6g, not 1 (within 0.001)",
                   (long long)position, sum);
    return STATUS_OK;
}

static enum status check_prompt(const struct request_inputs *p, int vocab_count) {
    if (p->count < 1) return BAD("prompt", "the prompt is empty: give at least one token");
    if (!p->ids || (p->begin && !p->weights))
        return BAD("prompt", "the prompt has no ids or no weights");
    if (p->begin && p->begin[0] != 0) return BAD("prompt", "concept tokens must start at 0");
    for (int64_t i = 0; i < p->count; i++) {
        const int64_t begin = p->begin ? p->begin[i] : i;
        const int64_t count = p->begin ? (int64_t)p->begin[i + 1] - begin : 1;
        if (count < 1 || count > THINK_TOPK_MAX)
            return BAD("prompt", "position %lld: a concept token has 1 to %d entries, not %lld",
                       (long long)i, THINK_TOPK_MAX, (long long)count);
        for (int64_t e = begin; e < begin + count; e++)
            if (p->ids[e] >= (uint32_t)vocab_count)
                return BAD("prompt",
                           "position %lld: token id %u is not below the vocabulary size %d",
                           (long long)i, p->ids[e], vocab_count);
        if (p->begin) TRY(check_mixture(i, p->ids + begin, p->weights + begin, (int)count));
    }
    return STATUS_OK;
}

static int order_ids(const void *a, const void *b) {
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static enum status check_bias(const struct request *r, int vocab_count) {
    uint32_t ids[REQUEST_BIAS_MAX];
    if (r->bias_count < 0 || r->bias_count > REQUEST_BIAS_MAX)
        return BAD("logit_bias", "logit_bias has %d entries, at most %d are allowed", r->bias_count,
                   REQUEST_BIAS_MAX);
    for (int i = 0; i < r->bias_count; i++) {
        ids[i] = r->bias[i].id;
        if (ids[i] >= (uint32_t)vocab_count)
            return BAD("logit_bias", "logit_bias: token id %u is not below the vocabulary size %d",
                       ids[i], vocab_count);
        if (!(fabsf(r->bias[i].add) <= 100))
            return BAD("logit_bias", "logit_bias of id %u is %g, must be from -100 to 100", ids[i],
                       (double)r->bias[i].add);
    }
    qsort(ids, (size_t)r->bias_count, sizeof *ids, order_ids);
    for (int i = 1; i < r->bias_count; i++)
        if (ids[i] == ids[i - 1]) return BAD("logit_bias", "logit_bias names id %u twice", ids[i]);
    return STATUS_OK;
}

enum status request_check(const struct request *r, int vocab_count) {
    TRY(check_prompt(&r->prompt, vocab_count));
    if (r->choices < 1 || r->choices > REQUEST_CHOICES_MAX)
        return BAD("n", "n is %d, must be from 1 to %d", r->choices, REQUEST_CHOICES_MAX);
    if (r->score && r->choices != 1)
        return BAD("n", "n is %d, a score request has one choice", r->choices);
    if (r->max_tokens < (r->score ? 0 : 1))
        return BAD("max_tokens", "max_tokens is %lld, must be at least 1",
                   (long long)r->max_tokens);
    if (r->score && r->max_tokens != 0)
        return BAD("max_tokens", "max_tokens is %lld, a score request generates nothing: give 0",
                   (long long)r->max_tokens);
    if (r->min_tokens < 0 || r->min_tokens > r->max_tokens)
        return BAD("min_tokens", "min_tokens is %lld, must be from 0 to max_tokens (%lld)",
                   (long long)r->min_tokens, (long long)r->max_tokens);
    if (r->stop_id_count < 0 || r->stop_id_count > REQUEST_STOP_IDS_MAX)
        return BAD("stop_token_ids", "stop_token_ids has %d entries, at most %d are allowed",
                   r->stop_id_count, REQUEST_STOP_IDS_MAX);
    for (int i = 0; i < r->stop_id_count; i++)
        if (r->stop_ids[i] >= (uint32_t)vocab_count)
            return BAD("stop_token_ids",
                       "stop_token_ids: id %u is not below the vocabulary size %d", r->stop_ids[i],
                       vocab_count);
    if (!(fabsf(r->presence_penalty) <= 2))
        return BAD("presence_penalty", "presence_penalty is %g, must be from -2 to 2",
                   (double)r->presence_penalty);
    if (!(fabsf(r->frequency_penalty) <= 2))
        return BAD("frequency_penalty", "frequency_penalty is %g, must be from -2 to 2",
                   (double)r->frequency_penalty);
    if (!(r->repetition_penalty > 0 && r->repetition_penalty <= 2))
        return BAD("repetition_penalty", "repetition_penalty is %g, must be above 0 and at most 2",
                   (double)r->repetition_penalty);
    TRY(check_bias(r, vocab_count));
    if (r->top_logprobs < 0 || r->top_logprobs > REQUEST_TOP_LOGPROBS_MAX)
        return BAD("top_logprobs", "top_logprobs is %d, must be from 0 to %d", r->top_logprobs,
                   REQUEST_TOP_LOGPROBS_MAX);
    return think_params_check(&r->think, vocab_count);
}
