/* metrics.h: counters, gauges and histograms of the service, and their text for a scrape.
 *
 *   net thread ─┐
 *   engine ─────┴─► relaxed atomics ─► metrics_write (text format 0.0.4)
 *
 * metrics.def is the table of all series. Every series exists, as zero, from the start. A cell has
 * one writer; who reads sees a value that was true a moment ago, and takes no lock, so a scrape is
 * answered while a rank hangs. Owns: the cells and the text. Refuses to know: what the numbers mean.
 * Memory: all of it in metrics_new.
 */
#ifndef SFUMATO_SERVE_METRICS_H
#define SFUMATO_SERVE_METRICS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/check.h"
#include "base/json.h"

enum metric_id {
#define X(kind, id, ...) METRIC_##id,
#include "serve/metrics.def"
#undef X
    METRIC_COUNT,
};

struct metrics;

struct metrics_options {
    const char *model_name;
    const char *prefix;   /* "sfumato:" */
    const char *handlers; /* label values of HTTP routes, joined by '|' */
    const char *methods;  /* the same of gRPC */
    int ranks;
    bool vllm; /* also the rows marked so, as "vllm:" */
};
enum status metrics_new(const struct metrics_options *options, struct metrics **out);
void metrics_free(struct metrics *m);

/* series: index in the product of the row's labels, the last label running fastest. */
void metric_add(struct metrics *m, enum metric_id id, int series, uint64_t n);
void metric_set(struct metrics *m, enum metric_id id, int series, double value);
void metric_observe(struct metrics *m, enum metric_id id, int series, double value);
double metric_get(const struct metrics *m, enum metric_id id, int series); /* counters and gauges */
/* A counter that is counted elsewhere: the new total. */
void metric_set_total(struct metrics *m, enum metric_id id, int series, uint64_t total);
/* labels: `a="b",c="d",` with the last comma. Once; any thread. */
void metrics_set_info(struct metrics *m, enum metric_id id, const char *labels);
/* Token histograms show buckets up to this. */
void metrics_set_context(struct metrics *m, int64_t tokens);

/* Appends the whole exposition. */
void metrics_write(const struct metrics *m, struct json_writer *w);

#endif
