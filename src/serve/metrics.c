/* metrics.c: see metrics.h.
 *
 *   cells   [ row 0: series 0 | series 1 | ... ] [ row 1: ... ]
 *   series of a histogram: one count per bound, one above all, the sum (bits of a double)
 */
#include "serve/metrics.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum kind { KIND_COUNTER, KIND_GAUGE, KIND_HISTOGRAM, KIND_INFO };

static const double latency[] = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
static const double first[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                               1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
static const double token[] = {.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3,
                               .4,   .5,    .75,  1,   2.5,  5,   7.5,  10, 20,  40, 80};
static const double tokens[] = {1,   2,   5,   1e1, 2e1, 5e1, 1e2, 2e2, 5e2, 1e3, 2e3,
                                5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6, 1e7};
static const double entropy[] = {.001, .01, .05, .1, .25, .5, 1, 2, 4};
static const double support[] = {1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 64};
static const double step[] = {1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2,
                              2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1,    2,    5,    10};

struct bounds {
    const double *at;
    int count;
};
#define BOUNDS(list) \
    { list, sizeof list / sizeof *list }
static const struct bounds NONE = {NULL, 0}, LATENCY = BOUNDS(latency), FIRST = BOUNDS(first),
                           TOKEN = BOUNDS(token), TOKENS = BOUNDS(tokens),
                           ENTROPY = BOUNDS(entropy), SUPPORT = BOUNDS(support),
                           STEP = BOUNDS(step);

static const struct row {
    enum kind kind;
    const char *name, *labels;
    const struct bounds *bounds;
    bool vllm;
    const char *help;
} rows[METRIC_COUNT] = {
#define X(kind, id, name, labels, bounds, vllm, help) \
    {KIND_##kind, name, labels, &bounds, vllm, help},
#include "serve/metrics.def"
#undef X
};

struct shape {
    int series, width; /* cells of a series */
    size_t first;      /* its first cell */
    char **labels;     /* [series], `a="b",` or "" */
};

struct metrics {
    struct metrics_options options;
    char *model_name, *prefix;
    _Atomic(char *) info[METRIC_COUNT]; /* set once, by any thread */
    double start_seconds;
    _Atomic int64_t context;
    struct shape shapes[METRIC_COUNT];
    _Atomic uint64_t *cells;
};

/* ---- labels ---- */

static char *list_of_ranks(int ranks) {
    char *list = calloc((size_t)ranks, 8);
    for (int r = 0, n = 0; list && r < ranks; r++) n += sprintf(list + n, r ? "|%d" : "%d", r);
    return list;
}

/* Appends the product of `spec` ("a=x|y;b=...") to `prefix`, one label text a series. */
static enum status expand(struct shape *shape, const char *spec, const char *prefix,
                          const struct metrics_options *o) {
    if (!*spec) {
        char **grown = realloc(shape->labels, ((size_t)shape->series + 1) * sizeof *grown);
        if (!grown) return fail(STATUS_MEMORY, "no memory for metrics");
        shape->labels = grown;
        shape->labels[shape->series] = strdup(prefix);
        if (!shape->labels[shape->series++]) return fail(STATUS_MEMORY, "no memory for metrics");
        return STATUS_OK;
    }
    const char *equals = strchr(spec, '='), *end = strchrnul(spec, ';');
    ASSERT(equals && equals < end);
    char *ranks = strncmp(equals + 1, "RANKS", 5) == 0 ? list_of_ranks(o->ranks) : NULL;
    char *values = ranks                                     ? ranks
                   : strncmp(equals + 1, "HANDLERS", 8) == 0 ? strdup(o->handlers)
                   : strncmp(equals + 1, "METHODS", 7) == 0
                       ? strdup(o->methods)
                       : strndup(equals + 1, (size_t)(end - equals) - 1);
    enum status status = values ? STATUS_OK : fail(STATUS_MEMORY, "no memory for metrics");
    for (char *v = values, *next; v && status == STATUS_OK; v = next) {
        char *text = NULL;
        next = strchr(v, '|');
        if (next) *next++ = '\0';
        if (asprintf(&text, "%s%.*s=\"%s\",", prefix, (int)(equals - spec), spec, v) < 0) {
            status = fail(STATUS_MEMORY, "no memory for metrics");
            break;
        }
        status = expand(shape, *end ? end + 1 : end, text, o);
        free(text);
    }
    free(values);
    return status;
}

/* ---- life ---- */

static bool is_prefix(const char *text) {
    static const char letters[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_:0123456789";
    return text[strspn(text, letters)] == '\0' && !(*text >= '0' && *text <= '9');
}

enum status metrics_new(const struct metrics_options *options, struct metrics **out) {
    enum status status = STATUS_OK;
    size_t cells = 0;
    *out = NULL;
    if (!is_prefix(options->prefix)) {
        return fail(STATUS_USAGE,
                    "--metrics-prefix %s: a metric's name has letters, digits, _ and :, and does "
                    "not begin with a digit",
                    options->prefix);
    }
    struct metrics *m = calloc(1, sizeof *m);
    if (!m) return fail(STATUS_MEMORY, "no memory for metrics");
    m->options = *options;
    m->start_seconds = (double)time(NULL);
    m->model_name = strdup(options->model_name);
    m->prefix = strdup(options->prefix);
    if (!m->model_name || !m->prefix) TRY_GOTO(fail(STATUS_MEMORY, "no memory for metrics"), out);
    for (int i = 0; i < METRIC_COUNT; i++) {
        struct shape *shape = &m->shapes[i];
        TRY_GOTO(expand(shape, rows[i].labels, "", options), out);
        shape->width = rows[i].kind == KIND_HISTOGRAM ? rows[i].bounds->count + 2 : 1;
        shape->first = cells;
        cells += (size_t)shape->series * (size_t)shape->width;
    }
    m->cells = calloc(cells, sizeof *m->cells);
    if (!m->cells) TRY_GOTO(fail(STATUS_MEMORY, "no memory for metrics"), out);
    *out = m;
    return STATUS_OK;
out:
    metrics_free(m);
    return status;
}

void metrics_free(struct metrics *m) {
    if (!m) return;
    for (int i = 0; i < METRIC_COUNT; i++) {
        for (int s = 0; s < m->shapes[i].series; s++) free(m->shapes[i].labels[s]);
        free(m->shapes[i].labels);
        free(m->info[i]);
    }
    free(m->cells);
    free(m->model_name);
    free(m->prefix);
    free(m);
}

void metrics_set_info(struct metrics *m, enum metric_id id, const char *labels) {
    char *none = NULL, *copy = strdup(labels);
    if (copy && !atomic_compare_exchange_strong(&m->info[id], &none, copy)) free(copy);
}

void metrics_set_context(struct metrics *m, int64_t count) { atomic_store(&m->context, count); }

/* ---- cells ---- */

static _Atomic uint64_t *series_of(const struct metrics *m, enum metric_id id, int series) {
    const struct shape *shape = &m->shapes[id];
    ASSERT_LT(series, shape->series);
    return &m->cells[shape->first + (size_t)series * (size_t)shape->width];
}

static uint64_t load(const _Atomic uint64_t *cell) {
    return atomic_load_explicit(cell, memory_order_relaxed);
}
static void store(_Atomic uint64_t *cell, uint64_t value) {
    atomic_store_explicit(cell, value, memory_order_relaxed);
}
static double real_of(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static uint64_t bits_of(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

void metric_add(struct metrics *m, enum metric_id id, int series, uint64_t n) {
    _Atomic uint64_t *cell = series_of(m, id, series);
    store(cell, load(cell) + n);
}

void metric_set_total(struct metrics *m, enum metric_id id, int series, uint64_t total) {
    store(series_of(m, id, series), total);
}

void metric_set(struct metrics *m, enum metric_id id, int series, double value) {
    store(series_of(m, id, series), bits_of(value));
}

double metric_get(const struct metrics *m, enum metric_id id, int series) {
    const uint64_t bits = load(series_of(m, id, series));
    return rows[id].kind == KIND_COUNTER ? (double)bits : real_of(bits);
}

void metric_observe(struct metrics *m, enum metric_id id, int series, double value) {
    const struct bounds *b = rows[id].bounds;
    _Atomic uint64_t *cell = series_of(m, id, series);
    int i = 0;
    while (i < b->count && value > b->at[i]) i++;
    store(&cell[i], load(&cell[i]) + 1);
    _Atomic uint64_t *sum = &cell[b->count + 1];
    store(sum, bits_of(real_of(load(sum)) + value));
}

/* ---- text ---- */

static void put(struct json_writer *w, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static void put(struct json_writer *w, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    const int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    json_write_bytes(w, text, n < (int)sizeof text ? (size_t)n : sizeof text - 1);
}

/* Label values escape backslash, quote and newline. */
static void put_value(struct json_writer *w, const char *text) {
    for (; *text; text++) {
        if (*text == '\\' || *text == '"') json_write_bytes(w, "\\", 1);
        if (*text == '\n') {
            json_write_bytes(w, "\\n", 2);
        } else {
            json_write_bytes(w, text, 1);
        }
    }
}

/* Everything that stays the same over one metric: its name, and the labels all series carry. */
struct view {
    struct json_writer *w;
    const char *prefix, *name, *model, *engine;
    int name_n;
};

/* vLLM's iteration_tokens_total is a histogram, which strict linters do not allow: with a prefix for
 * them (no colon) the ending goes. */
static void set_name(struct view *v, const struct row *row) {
    static const char total[] = "_total";
    const size_t n = strlen(row->name), tail = sizeof total - 1;
    const bool strict = !strchr(v->prefix, ':');
    const bool cut = strict && row->kind == KIND_HISTOGRAM && n > tail &&
                     strcmp(row->name + n - tail, total) == 0;
    v->name = row->name;
    v->name_n = (int)(cut ? n - tail : n);
}

/* NAME_SUFFIX{LABELS model_name="..."} */
static void put_name(const struct view *v, const char *suffix, const char *labels) {
    put(v->w, "%s%.*s%s{%s%smodel_name=\"", v->prefix, v->name_n, v->name, suffix, labels,
        v->engine);
    put_value(v->w, v->model);
    put(v->w, "\"} ");
}

static void put_histogram(const struct metrics *m, const struct view *v, enum metric_id id,
                          int series) {
    const struct bounds *b = rows[id].bounds;
    const _Atomic uint64_t *cell = series_of(m, id, series);
    const char *labels = m->shapes[id].labels[series];
    const int64_t context = atomic_load(&m->context);
    const double most = b == &TOKENS && context > 0 ? (double)context : INFINITY;
    uint64_t count = 0;
    for (int i = 0; i <= b->count; i++) {
        char with[512], bound[32] = "+Inf";
        count += load(&cell[i]);
        if (i < b->count && b->at[i] > most) continue;
        if (i < b->count) snprintf(bound, sizeof bound, "%.9g", b->at[i]);
        snprintf(with, sizeof with, "%sle=\"%s\",", labels, bound);
        put_name(v, "_bucket", with);
        put(v->w, "%llu\n", (unsigned long long)count);
    }
    put_name(v, "_sum", labels);
    put(v->w, "%.9g\n", real_of(load(&cell[b->count + 1])));
    put_name(v, "_count", labels);
    put(v->w, "%llu\n", (unsigned long long)count);
}

static void put_metric(const struct metrics *m, const struct view *v, enum metric_id id) {
    static const char *const types[] = {"counter", "gauge", "histogram", "gauge"};
    const struct row *row = &rows[id];
    const struct shape *shape = &m->shapes[id];
    put(v->w, "# HELP %s%.*s %s\n# TYPE %s%.*s %s\n", v->prefix, v->name_n, v->name, row->help,
        v->prefix, v->name_n, v->name, types[row->kind]);
    for (int s = 0; s < shape->series; s++) {
        if (row->kind == KIND_HISTOGRAM) {
            put_histogram(m, v, id, s);
            continue;
        }
        const uint64_t bits = load(series_of(m, id, s));
        if (row->kind == KIND_INFO) {
            const char *info = atomic_load(&m->info[id]);
            put_name(v, "", info ? info : "");
            put(v->w, "1\n");
        } else if (row->kind == KIND_COUNTER) {
            put_name(v, "", shape->labels[s]);
            put(v->w, "%llu\n", (unsigned long long)bits);
        } else {
            put_name(v, "", shape->labels[s]);
            put(v->w, "%.17g\n", real_of(bits));
        }
    }
}

static double resident_bytes(void) {
    long pages = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "re");
    if (!file) return 0;
    if (fscanf(file, "%ld %ld", &pages, &resident) != 2) resident = 0;
    fclose(file);
    return (double)resident * (double)sysconf(_SC_PAGESIZE);
}

void metrics_write(const struct metrics *m, struct json_writer *w) {
    struct view v = {w, m->prefix, NULL, m->model_name, "", 0};
    for (int i = 0; i < METRIC_COUNT; i++) {
        set_name(&v, &rows[i]);
        put_metric(m, &v, (enum metric_id)i);
    }
    v.prefix = "vllm:";
    v.engine = "engine=\"0\",";
    for (int i = 0; m->options.vllm && i < METRIC_COUNT; i++) {
        if (!rows[i].vllm) continue;
        set_name(&v, &rows[i]);
        put_metric(m, &v, (enum metric_id)i);
    }
    put(w,
        "# HELP process_start_time_seconds seconds since 1970 at which this process started\n"
        "# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds %.17g\n"
        "# HELP process_resident_memory_bytes resident memory of rank 0\n"
        "# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes %.17g\n",
        m->start_seconds, resident_bytes());
}
