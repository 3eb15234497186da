/* cuda_run.c: runs on the GPU: slots of rows in device memory, graphs of whole steps, answers.
 *
 *   begin    slots | params | states | thinkers | probes | watch | pages | edits    one DMA each
 *   step     the graph of (bucket, candidates, context), or its kernels one by one where there is none
 *   answers  pinned: [RUN_AHEAD_MAX][rows]; the device writes, the host polls their stamps
 *   stop     pinned: a word a row; the host writes, rank 0's device reads at the start of a step
 *
 * Graphs name memory by address, so every array has its place once and for all, sized for the largest
 * run. A step is as wide as the smallest bucket that holds the rows; rows beyond them rest from the
 * start. A shape is run kernel by kernel the first time it comes (whatever a library does at first use
 * happens then), captured the second time, and launched from then on. Nothing in a step waits for the
 * host or depends on its memory.
 *
 * Thread: engine. Memory: taken in cuda_run_open; a graph takes what the driver keeps for it.
 */
#include <sched.h>
#include <string.h>

#include "backend/cuda.h"
#include "base/alloc_watch.h"
#include "base/log.h"

enum { WATCHED = 1, CONTEXT_MIN = 1024, SPIN_POLLS = 2000 };

static const int buckets[] = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, RUN_ROWS_MAX};

/* ---- memory ---- */

/* Hands out pieces of a block, or with base NULL counts only. */
struct carver {
    unsigned char *base;
    size_t at;
};

static void *carve(struct carver *c, size_t bytes) {
    const size_t at = c->at;
    c->at += (bytes + CUDA_ALIGN - 1) / CUDA_ALIGN * CUDA_ALIGN;
    return c->base ? c->base + at : NULL;
}

/* What begin fills in: the same places in pinned memory and on the device. */
static void carve_upload(struct carver *c, const struct backend_config *config,
                         struct cuda_run_rows *out) {
    const size_t rows = (size_t)config->run_rows;
    out->slots = carve(c, rows * sizeof *out->slots);
    out->params = carve(c, rows * sizeof *out->params);
    out->states = carve(c, rows * sizeof *out->states);
    out->thinkers = carve(c, rows * sizeof *out->thinkers);
    out->probes = carve(c, rows * sizeof *out->probes);
    out->watch_ids = carve(c, rows * WATCHED * sizeof *out->watch_ids);
    out->pages = carve(c, (size_t)config->batch.pages * sizeof *out->pages);
    out->edits = carve(c, (size_t)config->batch.edits * sizeof *out->edits);
}

static size_t part_bytes(int rows, int candidate_count) {
    return (size_t)rows * (sizeof(uint64_t) + (size_t)batch_record_bytes(candidate_count, WATCHED));
}

static void carve_device(struct carver *c, const struct backend_config *config,
                         struct cuda_run *run) {
    const size_t rows = (size_t)config->run_rows;
    const size_t part = part_bytes(config->run_rows, KERNELS_CANDIDATES_MAX);
    struct kernels_run *k = &run->kernels;
    carve_upload(c, config, &run->device);
    k->decisions = carve(c, rows * sizeof *k->decisions);
    k->status = carve(c, rows * sizeof *k->status);
    k->row = carve(c, rows * sizeof *k->row);
    k->mix_begin = carve(c, (rows + 1) * sizeof *k->mix_begin);
    k->mix_ids = carve(c, rows * KERNELS_CANDIDATES_MAX * sizeof *k->mix_ids);
    k->mix_weights = carve(c, rows * KERNELS_CANDIDATES_MAX * sizeof *k->mix_weights);
    run->logit_rows = carve(c, rows * sizeof *run->logit_rows);
    k->control = carve(c, part);
    k->all = carve(c, part * (size_t)config->ranks);
}

static void carve_pinned(struct carver *c, const struct backend_config *config,
                         struct cuda_run *run) {
    const size_t rows = (size_t)config->run_rows;
    carve_upload(c, config, &run->host);
    run->stop = carve(c, rows * sizeof *run->stop);
    run->answers = carve(c, RUN_AHEAD_MAX * rows * sizeof *run->answers);
    run->segments = carve(c, rows * sizeof *run->segments);
    run->host_logit_rows = carve(c, rows * sizeof *run->host_logit_rows);
}

/* Pinned memory as the device sees it. */
static enum status see(void *host, void **out) {
    if (cudaHostGetDevicePointer(out, host, 0) == cudaSuccess) return STATUS_OK;
    return fail(STATUS_USAGE, "this GPU cannot see pinned host memory: use --run-steps 0");
}

enum status cuda_run_open(struct cuda *cuda, const struct backend_config *config) {
    struct cuda_run *run = &cuda->run;
    struct kernels_run *k = &run->kernels;
    const int rows = config->run_rows;
    if (rows == 0) return STATUS_OK;
    ASSERT_LE(rows, RUN_ROWS_MAX);
    struct carver device = {0}, pinned = {0};
    carve_device(&device, config, run);
    carve_pinned(&pinned, config, run);
    device.base = cuda_take(cuda, device.at, "runs");
    if (!device.base) return STATUS_MEMORY;
    cuda->base.scratch_bytes += device.at;
    if (cudaHostAlloc((void **)&run->pinned, pinned.at, cudaHostAllocMapped) != cudaSuccess) {
        run->pinned = NULL;
        return fail(STATUS_MEMORY, "no pinned host memory for runs (%zu bytes)", pinned.at);
    }
    memset(run->pinned, 0, pinned.at);
    pinned.base = run->pinned;
    device.at = pinned.at = 0;
    carve_device(&device, config, run);
    carve_pinned(&pinned, config, run);
    for (int i = 0; i < rows; i++) run->host_logit_rows[i] = i;
    if (cudaMemcpyAsync(run->logit_rows, run->host_logit_rows, sizeof(int32_t) * (size_t)rows,
                        cudaMemcpyHostToDevice, cuda->stream) != cudaSuccess)
        return fail(STATUS_COMM, "the GPU cannot be written to");
    k->ranks = config->ranks;
    k->slots = run->device.slots;
    k->params = run->device.params;
    k->states = run->device.states;
    k->thinkers = run->device.thinkers;
    k->probes = run->device.probes;
    k->answer_steps = RUN_AHEAD_MAX;
    k->answer_rows = rows;
    void *seen;
    TRY(see(run->answers, &seen));
    k->answers = seen;
    TRY(see(run->stop, &seen));
    if (config->rank == 0) k->stop = seen;
    run->rows_max = rows;
    run->positions_max = config->positions_max;
    run->edits_max = config->batch.edits;
    run->pages_max = config->batch.pages;
    run->next_stamp = 1;
    cuda->base.run_rows = rows;
    return STATUS_OK;
}

static void drop_graphs(struct cuda_run *run) {
    for (int i = 0; i < run->graph_count; i++)
        if (run->graphs[i].exec) cudaGraphExecDestroy(run->graphs[i].exec);
    run->graph_count = 0;
    run->graph = NULL;
}

static void run_forget(backend *b) {
    struct cuda *cuda = cuda_of(b);
    if (cuda->run.graph_count == 0) return;
    cuda_wait(cuda); /* one that runs would be destroyed at its end, behind our back */
    drop_graphs(&cuda->run);
}

void cuda_run_close(struct cuda *cuda) {
    drop_graphs(&cuda->run);
    cudaFreeHost(cuda->run.pinned);
}

/* ---- begin ---- */

static struct cuda_graph *find_graph(struct cuda_run *run, struct cuda_graph shape) {
    for (int i = 0; i < run->graph_count; i++) {
        struct cuda_graph *g = &run->graphs[i];
        if (g->rows == shape.rows && g->candidate_count == shape.candidate_count &&
            g->context_max == shape.context_max)
            return g;
    }
    if (run->graph_count == CUDA_GRAPHS_MAX) return NULL; /* more shapes than there can be */
    run->graphs[run->graph_count] = shape;
    return &run->graphs[run->graph_count++];
}

static void choose_shape(struct cuda_run *run, const struct batch *first,
                         const struct run_row *rows) {
    int bucket = 0, context = CONTEXT_MIN;
    while (buckets[bucket] < first->row_count) bucket++;
    for (int i = 0; i < first->row_count; i++)
        while (context < first->segments[i].position + rows[i].steps) context *= 2;
    if (context > run->positions_max) context = run->positions_max;
    struct cuda_graph shape = {
        .rows = buckets[bucket], .candidate_count = first->candidate_count, .context_max = context};
    if (shape.rows > run->rows_max) shape.rows = run->rows_max;
    run->graph = find_graph(run, shape);
    run->shape = (struct batch){.row_count = shape.rows,
                                .segment_count = shape.rows,
                                .logit_row_count = shape.rows,
                                .probe_count = shape.rows,
                                .candidate_count = shape.candidate_count,
                                .watch_max = WATCHED,
                                .segments = run->segments,
                                .logit_rows = run->host_logit_rows};
    run->context_max = context;
    for (int i = 0; i < shape.rows; i++)
        run->segments[i] = (struct batch_segment){.row_begin = i, .row_count = 1};
    run->kernels.rows = shape.rows;
    run->kernels.rank_bytes = part_bytes(shape.rows, shape.candidate_count);
}

static void fill_row(struct cuda_run *run, const struct batch *first, int i,
                     const struct run_row *row) {
    const struct cuda_run_rows *to = &run->host;
    const struct batch_segment *segment = &first->segments[i];
    const struct batch_probe *probe = &first->probes[i];
    const int32_t entry = first->mix_begin[i];
    struct kernels_slot *slot = &to->slots[i];
    *slot = (struct kernels_slot){.position = segment->position,
                                  .page_begin = segment->page_begin,
                                  .steps = row->steps,
                                  .phase_bound = row->phase_bound,
                                  .stamp = run->next_stamp,
                                  .count = first->mix_begin[i + 1] - entry};
    ASSERT_LE(slot->count, KERNELS_CANDIDATES_MAX);
    memcpy(slot->ids, first->mix_ids + entry, (size_t)slot->count * sizeof *slot->ids);
    memcpy(slot->weights, first->mix_weights + entry, (size_t)slot->count * sizeof *slot->weights);
    to->params[i] = row->params;
    to->states[i] = row->state;
    to->probes[i] = *probe;
    to->probes[i].watch_begin = i;
    to->watch_ids[i] = probe->watch_count ? first->watch_ids[probe->watch_begin] : 0;
    to->thinkers[i] =
        (struct kernels_thinker){.probe = i, .close_watch = probe->watch_count ? 0 : -1, .slot = i};
}

/* A row that only fills the bucket: an id that is there, no page, no decision. */
static void fill_resting(struct cuda_run *run, int i) {
    const struct cuda_run_rows *to = &run->host;
    to->slots[i] = (struct kernels_slot){
        .position = -1, .stamp = run->next_stamp, .count = 1, .weights = {1.0f}};
    memset(&to->params[i], 0, sizeof to->params[i]);
    memset(&to->states[i], 0, sizeof to->states[i]);
    to->probes[i] = (struct batch_probe){.logit_row = i, .temperature = 1.0f};
    to->watch_ids[i] = 0;
    to->thinkers[i] = (struct kernels_thinker){.probe = -1, .close_watch = -1, .slot = i};
}

static void send(struct cuda *cuda, void *device, const void *host, size_t bytes) {
    if (bytes == 0) return;
    cuda_must((int)cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, cuda->stream),
              "rows of a run");
}

static void run_begin(backend *b, const struct batch *first, const struct run_row *rows) {
    struct cuda *cuda = cuda_of(b);
    struct cuda_run *run = &cuda->run;
    const struct cuda_run_rows *from = &run->host, *to = &run->device;
    int64_t pages = 0, edits = 0;
    ASSERT_LE(first->row_count, run->rows_max);
    choose_shape(run, first, rows);
    for (int i = 0; i < first->row_count; i++) {
        const struct batch_segment *segment = &first->segments[i];
        const struct batch_probe *probe = &first->probes[i];
        fill_row(run, first, i, &rows[i]);
        if (segment->page_begin + segment->page_count > pages)
            pages = segment->page_begin + segment->page_count;
        if (probe->edit_begin + probe->edit_count > edits)
            edits = probe->edit_begin + probe->edit_count;
    }
    for (int i = first->row_count; i < run->shape.row_count; i++) fill_resting(run, i);
    ASSERT_LE(pages, run->pages_max);
    ASSERT_LE(edits, run->edits_max);
    memcpy(from->pages, first->pages, (size_t)pages * sizeof *from->pages);
    if (edits) memcpy(from->edits, first->edits, (size_t)edits * sizeof *from->edits);
    memset(run->stop, 0, sizeof *run->stop * (size_t)run->shape.row_count);
    const size_t n = (size_t)run->shape.row_count;
    send(cuda, to->slots, from->slots, n * sizeof *from->slots);
    send(cuda, to->params, from->params, n * sizeof *from->params);
    send(cuda, to->states, from->states, n * sizeof *from->states);
    send(cuda, to->thinkers, from->thinkers, n * sizeof *from->thinkers);
    send(cuda, to->probes, from->probes, n * sizeof *from->probes);
    send(cuda, to->watch_ids, from->watch_ids, n * WATCHED * sizeof *from->watch_ids);
    send(cuda, to->pages, from->pages, (size_t)pages * sizeof *from->pages);
    send(cuda, to->edits, from->edits, (size_t)edits * sizeof *from->edits);
    run->first_stamp = run->next_stamp;
}

/* ---- a step ---- */

static bool run_replay(backend *b) {
    struct cuda *cuda = cuda_of(b);
    const struct cuda_graph *graph = cuda->run.graph;
    if (!graph || !graph->exec) return false;
    cuda_must((int)cudaGraphLaunch(graph->exec, cuda->stream), "graph of a step");
    cuda->run.next_stamp++;
    return true;
}

static bool run_capture(backend *b) {
    struct cuda *cuda = cuda_of(b);
    struct cuda_graph *graph = cuda->run.graph;
    if (!graph || graph->never) return false;
    if (!graph->seen) {
        graph->seen = true;
        return false;
    }
    /* the driver takes memory of its own for every node, until there is a graph */
    cuda->run.counted = alloc_watch_thread(false);
    cuda_must((int)cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal),
              "capture of a step");
    return true;
}

/* Makes the graph and sends it to the device. False: there is no memory for it. */
static bool make_graph(struct cuda *cuda, struct cuda_graph *graph, cudaGraph_t captured) {
    cudaError_t error = cudaGraphInstantiate(&graph->exec, captured, 0);
    if (error == cudaErrorMemoryAllocation) graph->exec = NULL;
    if (error == cudaSuccess) error = cudaGraphUpload(graph->exec, cuda->stream);
    if (error == cudaSuccess) return true;
    if (error != cudaErrorMemoryAllocation) cuda_must((int)error, "graph of a step");
    cudaGetLastError(); /* a launcher would take it for its own */
    if (graph->exec) cuda_must((int)cudaGraphExecDestroy(graph->exec), "graph of a step");
    graph->exec = NULL;
    graph->never = true;
    return false;
}

static bool run_captured(backend *b) {
    struct cuda *cuda = cuda_of(b);
    struct cuda_run *run = &cuda->run;
    cudaGraph_t captured = NULL;
    cuda_must((int)cudaStreamEndCapture(cuda->stream, &captured), "capture of a step");
    const bool made = make_graph(cuda, run->graph, captured);
    cuda_must((int)cudaGraphDestroy(captured), "graph of a step");
    alloc_watch_thread(run->counted);
    if (made) {
        cuda_must((int)cudaGraphLaunch(run->graph->exec, cuda->stream), "graph of a step");
        return true;
    }
    run->next_stamp--; /* `step` comes again */
    static bool told;
    if (!told)
        log_warn(
            "no memory on the GPU for a graph of %d rows: such steps are queued kernel by kernel",
            run->graph->rows);
    told = true;
    return false;
}

static const struct batch *run_step(backend *b) {
    struct cuda *cuda = cuda_of(b);
    struct cuda_run *run = &cuda->run;
    const struct kernels_run *k = &run->kernels;
    struct cuda_batch *on = &cuda->batch;
    on->row_count = run->shape.row_count;
    on->context_max = run->context_max;
    on->host_logit_rows = run->host_logit_rows;
    on->rows = k->row;
    on->pages = run->device.pages;
    on->mix_begin = k->mix_begin;
    on->mix_ids = k->mix_ids;
    on->mix_weights = k->mix_weights;
    on->logit_rows = run->logit_rows;
    on->probes = (struct kernels_probes){.probe_count = run->shape.probe_count,
                                         .candidate_count = run->shape.candidate_count,
                                         .watch_max = WATCHED,
                                         .probes = k->probes,
                                         .edits = run->device.edits,
                                         .watch_ids = run->device.watch_ids};
    cuda_must(kernels_run_step(cuda->stream, *k), "start of a step");
    run->next_stamp++;
    return &run->shape;
}

/* Behind the control words. */
static unsigned char *records_of(const struct cuda_run *run, const void *part) {
    return (unsigned char *)part + sizeof(uint64_t) * (size_t)run->kernels.rows;
}

static struct run_exchange run_candidates(backend *b, const struct batch *batch,
                                          const float *logits, int slab_count,
                                          const int64_t *vocab_begin, int64_t vocab_count) {
    struct cuda *cuda = cuda_of(b);
    const struct cuda_run *run = &cuda->run;
    ASSERT_EQ(batch->probe_count, run->kernels.rows);
    cuda_must(kernels_candidates(cuda->stream, cuda->batch.probes, logits,
                                 cuda_borders(slab_count, vocab_begin), vocab_count,
                                 records_of(run, run->kernels.control), cuda->candidates.data),
              "candidates");
    return (struct run_exchange){.mine = run->kernels.control,
                                 .bytes = run->kernels.rank_bytes,
                                 .all = (void *)run->kernels.all};
}

static void run_decide(backend *b, const struct batch *batch) {
    struct cuda *cuda = cuda_of(b);
    const struct kernels_run *k = &cuda->run.kernels;
    cuda_must(kernels_think(cuda->stream, batch->row_count, k->thinkers, cuda->batch.probes,
                            k->ranks, records_of(&cuda->run, k->all), k->rank_bytes, k->params,
                            k->states, k->decisions, k->status),
              "decisions");
    cuda_must(kernels_run_decide(cuda->stream, *k), "end of a step");
}

/* ---- answers ---- */

/* A step whose sums were given up half-way is stamped like any other: whoever made them is asked before
 * its answers go out, once a step. */
static void watch_once(backend *b, uint64_t stamp, double waited_seconds) {
    struct cuda_run *run = &cuda_of(b)->run;
    if (stamp <= run->watched_stamp) return;
    if (b->watch) b->watch(b->watch_user, waited_seconds);
    run->watched_stamp = stamp;
}

static const struct run_answer *run_answer(backend *b, int step, int row) {
    struct cuda *cuda = cuda_of(b);
    const struct cuda_run *run = &cuda->run;
    const uint64_t stamp = run->first_stamp + (uint64_t)step;
    const struct run_answer *answer =
        &run->answers[stamp % RUN_AHEAD_MAX * (uint64_t)run->rows_max + (uint64_t)row];
    ASSERT(row < run->shape.row_count && stamp < run->next_stamp &&
           run->next_stamp - stamp <= RUN_AHEAD_MAX);
    const double start = cuda_seconds();
    for (unsigned polls = 0;; polls++) {
        if (__atomic_load_n(&answer->stamp, __ATOMIC_ACQUIRE) == stamp) {
            watch_once(b, stamp, cuda_seconds() - start);
            return answer;
        }
        if (polls < SPIN_POLLS) continue;
        const cudaError_t state = cudaStreamQuery(cuda->stream);
        if (state == cudaSuccess && __atomic_load_n(&answer->stamp, __ATOMIC_ACQUIRE) != stamp)
            check_device_fault("a step of a run has ended without an answer for row %d", row);
        if (state != cudaSuccess && state != cudaErrorNotReady)
            cuda_must((int)state, "a kernel of this step");
        if (b->watch) b->watch(b->watch_user, cuda_seconds() - start);
        sched_yield();
    }
}

static void run_stop(backend *b, int row) {
    struct cuda_run *run = &cuda_of(b)->run;
    ASSERT(row < run->shape.row_count);
    __atomic_store_n(&run->stop[row], 1, __ATOMIC_RELAXED);
}

const struct run_ops cuda_run_ops = {
    .begin = run_begin,
    .replay = run_replay,
    .capture = run_capture,
    .captured = run_captured,
    .step = run_step,
    .candidates = run_candidates,
    .decide = run_decide,
    .answer = run_answer,
    .stop = run_stop,
    .forget = run_forget,
};
