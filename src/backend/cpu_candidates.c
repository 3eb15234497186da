/* cpu_candidates.c: what rank 0 needs to know about a row of logits, without sending the row.
 *
 * Per probe and vocabulary slab (one thread owns a slab): z' = edited z / T in a scratch copy, its
 * maximum, the two sums of cpu.md §3.1, and the K largest z'. Then, per probe: statistics along the
 * slab tree, lists merged. The logits themselves are never written: several probes may ask about
 * one row.
 *
 * Top-K without a sort of the slab: values above the running K-th are collected; when the buffer of
 * 4 K is full, the best K stay and the threshold rises. Ids come in ascending order, so an equal
 * value that comes later loses, which is the tie rule (z desc, id asc). Entries are 64-bit keys
 * whose unsigned order is that rule: order-preserving image of the float, then the complemented id.
 * Odd values are made ordinary first: NaN counts as -inf, +inf as FLT_MAX; ids with -inf do not
 * exist.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "backend/cpu.h"

enum { CANDIDATES_MAX = 64, KEYS_MAX = 4 * CANDIDATES_MAX };

struct cpu_slab_answer {
    float m, s, q;
    int count;
    uint64_t keys[CANDIDATES_MAX]; /* descending */
};

static uint64_t key_of(float z, uint32_t id) {
    uint32_t bits;
    memcpy(&bits, &z, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~id;
}

static struct batch_pair pair_of(uint64_t key) {
    uint32_t bits = (uint32_t)(key >> 32);
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    struct batch_pair pair = {.id = ~(uint32_t)key};
    memcpy(&pair.z, &bits, sizeof pair.z);
    return pair;
}

/* Moves the k largest of n distinct keys to the front (quickselect). */
static void keys_select(uint64_t *keys, int n, int k) {
    int low = 0, high = n - 1;
    while (low < high) {
        const uint64_t a = keys[low], b = keys[(low + high) / 2], c = keys[high];
        const uint64_t pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
        int i = low, j = high;
        while (i <= j) {
            while (keys[i] > pivot) i++;
            while (keys[j] < pivot) j--;
            if (i <= j) {
                const uint64_t swap = keys[i];
                keys[i++] = keys[j];
                keys[j--] = swap;
            }
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            return;
    }
}

static void keys_sort(uint64_t *keys, int n) { /* n <= 64 */
    for (int i = 1; i < n; i++) {
        const uint64_t key = keys[i];
        int j = i;
        for (; j > 0 && keys[j - 1] < key; j--) keys[j] = keys[j - 1];
        keys[j] = key;
    }
}

/* The k largest of z[n], ids from `id` on, -inf left out; sorted. Returns how many there are. */
static int slab_top(const struct cpu_kernels *kernels, const float *z, int64_t n, uint32_t id,
                    int k, uint64_t keys[KEYS_MAX]) {
    uint32_t found[KEYS_MAX];
    float threshold = -INFINITY;
    int count = 0;
    for (int64_t i = 0; i < n;) {
        int fresh = 0;
        i = kernels->above(z, i, n, threshold, found, KEYS_MAX - count, &fresh);
        for (int f = 0; f < fresh; f++) keys[count++] = key_of(z[found[f]], id + found[f]);
        if (count + LANES > KEYS_MAX) {
            keys_select(keys, count, k);
            count = k;
            uint64_t least = keys[0];
            for (int j = 1; j < k; j++) least = keys[j] < least ? keys[j] : least;
            threshold = pair_of(least).z;
        }
    }
    if (count > k) {
        keys_select(keys, count, k);
        count = k;
    }
    keys_sort(keys, count);
    return count;
}

struct candidates_job {
    struct cpu *cpu;
    const struct batch *batch;
    const float *logits;
    int slab_count;
    const int64_t *vocab_begin;
    int64_t vocab_count;
    float *z_out; /* probe_logits: [V local] of probe `z_probe`; statistics are not wanted */
    int z_probe;
};

static const float *probe_row(const struct candidates_job *job, const struct batch_probe *probe) {
    const int64_t width = job->vocab_begin[job->slab_count] - job->vocab_begin[0];
    return job->logits + probe->logit_row * width;
}

/* z' of the local id range [begin, end) to out. */
static void probe_values(const struct candidates_job *job, const struct batch_probe *probe,
                         int64_t begin, int64_t end, float *out) {
    const struct cpu_kernels *kernels = job->cpu->kernels;
    const float *z = probe_row(job, probe) + begin - job->vocab_begin[0];
    kernels->divide(z, end - begin, probe->temperature, out);
    const struct batch_edit *edit = job->batch->edits + probe->edit_begin;
    for (int e = 0; e < probe->edit_count; e++, edit++) {
        const int64_t i = (int64_t)edit->id - begin;
        if (i < 0 || edit->id >= end) continue;
        const float edited = (z[i] > 0.0f ? z[i] / edit->rep : z[i] * edit->rep) + edit->add;
        kernels->divide(&edited, 1, probe->temperature, &out[i]);
    }
}

/* Ids of slab s that take part: [*begin, *end), global. */
static void slab_range(const struct candidates_job *job, int s, int64_t *begin, int64_t *end) {
    *begin = job->vocab_begin[s];
    *end = job->vocab_begin[s + 1] < job->vocab_count ? job->vocab_begin[s + 1] : job->vocab_count;
    if (*end < *begin) *end = *begin;
}

static void slab_task(void *context, int thread) {
    const struct candidates_job *job = context;
    struct cpu *cpu = job->cpu;
    const int threads = cpu->base.threads;
    float *z = cpu->thread_row + (size_t)thread * cpu->row_floats;
    const int64_t items = (int64_t)job->batch->probe_count * job->slab_count;
    const int64_t item_end = cpu_range_begin(items, thread + 1, threads);
    for (int64_t i = cpu_range_begin(items, thread, threads); i < item_end; i++) {
        const struct batch_probe *probe = &job->batch->probes[i / job->slab_count];
        struct cpu_slab_answer *answer = &cpu->answers[i];
        uint64_t keys[KEYS_MAX];
        int64_t begin, end;
        slab_range(job, (int)(i % job->slab_count), &begin, &end);
        probe_values(job, probe, begin, end, z);
        cpu->kernels->slab_stats(z, end - begin, &answer->m, &answer->s, &answer->q);
        answer->count = slab_top(cpu->kernels, z, end - begin, (uint32_t)begin,
                                 job->batch->candidate_count, keys);
        memcpy(answer->keys, keys, sizeof keys[0] * (size_t)answer->count);
    }
}

/* Statistics along the tree (binary counter, as in cpu_dense.c), into the root. */
static void stats_tree(const struct cpu_slab_answer *answer, int count, struct batch_record *root) {
    struct batch_record stack[8] = {{.m = -INFINITY}};
    int level[8], top = -1;
    for (int s = 0; s < count; s++) {
        stack[++top] = (struct batch_record){answer[s].m, answer[s].s, answer[s].q, 0};
        level[top] = 0;
        for (; top > 0 && level[top] == level[top - 1]; top--) {
            struct batch_record *a = &stack[top - 1], *b = &stack[top];
            batch_stats_join(&a->m, &a->s, &a->q, b->m, b->s, b->q);
            level[top - 1]++;
        }
    }
    for (; top > 0; top--) {
        struct batch_record *a = &stack[top - 1], *b = &stack[top];
        batch_stats_join(&a->m, &a->s, &a->q, b->m, b->s, b->q);
    }
    *root = stack[0];
}

/* Merges the sorted lists of the slabs. */
static int pairs_merge(const struct cpu_slab_answer *answer, int slab_count, int k,
                       struct batch_pair *pairs) {
    int place[MATRIX_SLABS_MAX] = {0};
    for (int i = 0; i < k; i++) {
        int best = -1;
        for (int s = 0; s < slab_count; s++)
            if (place[s] < answer[s].count &&
                (best < 0 || answer[s].keys[place[s]] > answer[best].keys[place[best]]))
                best = s;
        if (best < 0) return i;
        pairs[i] = pair_of(answer[best].keys[place[best]++]);
    }
    return k;
}

enum status cpu_candidates_init(struct cpu *cpu) {
    cpu->answers =
        cpu_scratch(cpu, sizeof *cpu->answers * (size_t)cpu->probes_max * MATRIX_SLABS_MAX);
    return cpu->answers ? STATUS_OK : STATUS_MEMORY;
}

void cpu_candidates(backend *b, const struct batch *batch, const float *logits, int slab_count,
                    const int64_t *vocab_begin, int64_t vocab_count, void *records) {
    struct cpu *cpu = cpu_of(b);
    struct candidates_job job = {cpu, batch, logits, slab_count, vocab_begin, vocab_count, NULL, 0};
    ASSERT_LE(batch->probe_count, cpu->probes_max);
    ASSERT_LE(slab_count, MATRIX_SLABS_MAX);
    ASSERT_LE(batch->candidate_count, CANDIDATES_MAX);
    if (batch->probe_count == 0) return;
    ASSERT_LE((size_t)(vocab_begin[slab_count] - vocab_begin[0]), cpu->row_floats);
    cpu_pool_run(cpu->pool, slab_task, &job);

    const size_t stride = (size_t)batch_record_bytes(batch->candidate_count, batch->watch_max);
    for (int p = 0; p < batch->probe_count; p++) {
        const struct batch_probe *probe = &batch->probes[p];
        const struct cpu_slab_answer *answer = cpu->answers + (size_t)p * (size_t)slab_count;
        struct batch_record *record =
            (struct batch_record *)((unsigned char *)records + (size_t)p * stride);
        struct batch_pair *pairs = (struct batch_pair *)(record + 1);
        stats_tree(answer, slab_count, record);
        memset(pairs, 0, stride - sizeof *record);
        record->count = pairs_merge(answer, slab_count, batch->candidate_count, pairs);
        for (int w = 0; w < batch->watch_max; w++) {
            struct batch_pair *pair = &pairs[batch->candidate_count + w];
            pair->z = -INFINITY;
            if (w >= probe->watch_count) continue;
            const int64_t id = pair->id = batch->watch_ids[probe->watch_begin + w];
            if (id >= vocab_begin[0] && id < vocab_begin[slab_count] && id < vocab_count)
                probe_values(&job, probe, id, id + 1, &pair->z);
        }
    }
}

static void values_task(void *context, int thread) {
    const struct candidates_job *job = context;
    const int threads = job->cpu->base.threads;
    const int slab_end = (int)cpu_range_begin(job->slab_count, thread + 1, threads);
    for (int s = (int)cpu_range_begin(job->slab_count, thread, threads); s < slab_end; s++) {
        int64_t begin, end;
        slab_range(job, s, &begin, &end);
        probe_values(job, &job->batch->probes[job->z_probe], begin, end,
                     job->z_out + begin - job->vocab_begin[0]);
        for (int64_t id = end; id < job->vocab_begin[s + 1]; id++)
            job->z_out[id - job->vocab_begin[0]] = -INFINITY;
    }
}

void cpu_probe_logits(backend *b, const struct batch *batch, int probe, const float *logits,
                      int slab_count, const int64_t *vocab_begin, int64_t vocab_count, float *out) {
    struct candidates_job job = {cpu_of(b),   batch,       logits, slab_count,
                                 vocab_begin, vocab_count, out,    probe};
    ASSERT(probe >= 0 && probe < batch->probe_count);
    cpu_pool_run(job.cpu->pool, values_task, &job);
}
