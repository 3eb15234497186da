/* think_bench.h: what the thinking step costs by itself, for benchmarks.
 *
 * Times think_step on one thread over rows that look like a language model's, at the default filters.
 * The statistics and the candidates before it belong to the backend and are timed there.
 */
#ifndef SFUMATO_THINK_THINK_BENCH_H
#define SFUMATO_THINK_THINK_BENCH_H

#include "think/think.h"

/* Nanoseconds of one thinking step of `mode` (median over rounds of about seconds / 9 each): concept
 * tokens of max_topk entries (1..THINK_TOPK_MAX) cut from lists of the same length, top_k as wide. */
double think_bench_step_ns(enum think_mode mode, int max_topk, double seconds);

#endif
