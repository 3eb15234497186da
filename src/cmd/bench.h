/* bench.h: measurements that survive a noisy machine (cpu.md §11), and the bench sub-commands.
 *
 * A figure is a set of per-round ratios, reported as median, min and max; medians of different minutes are
 * never divided. Before a round the machine's multiply-add peak is taken for 50 ms: below BENCH_QUIET of
 * the best so far the machine is busy and the round is repeated.
 */
#ifndef SFUMATO_CMD_BENCH_H
#define SFUMATO_CMD_BENCH_H

#include "base/json.h"
#include "cmd/host.h"

enum { BENCH_ROUNDS_MAX = 1000 };
#define BENCH_QUIET 0.90

struct bench_series {
    int count;
    double value[BENCH_ROUNDS_MAX];
};
struct bench_summary {
    double median, min, max;
};
void bench_add(struct bench_series *s, double value);
struct bench_summary bench_summarise(const struct bench_series *s);
void bench_write_summary(struct json_writer *w, const char *key, struct bench_summary s);

enum status bench_step(struct host *h);      /* bench_step.c */
enum status bench_load(struct host *h);      /* bench_load.c */
enum status bench_comm(struct host *h);      /* bench_comm.c */
enum status bench_sampler(struct host *h);   /* bench_sampler.c */
enum status bench_tokenizer(struct host *h); /* bench_tokenizer.c */

#endif
