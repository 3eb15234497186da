/* run.cu: what the host does between two steps, done on the device: slots to a batch, decisions to
 * slots.
 *
 *   run_step     slots ─► rows, mixtures, temperatures, and the control words of this rank's part
 *   run_decide   decisions ─► hashes, next inputs, who rests, an answer a row in pinned host memory
 *
 * A block a row, in both. Rank 0's stop words are read in run_step only and travel with the gather,
 * so that a row rests on all ranks after the same step. Every rank looks at every rank's hashes of the
 * step before. An answer is complete when its stamp is there (release at system scope); the host reads
 * the stamp first. A row that rests keeps its last input, one that is always valid: its sums are numbers
 * like any others, and its position -1 keeps it away from the pages.
 */
#include "backend/batch.h"
#include "backend/run.h"
#include "kernels/peer.cuh"
#include "think/step.h"

enum { STEP_THREADS = 64, DECIDE_THREADS = 128 };

/* ---- slots to a batch ---- */

/* Entries of all rows before `row`: every block adds up for itself, so none waits for another. */
static __device__ int entries_before(const struct kernels_slot *slots, int row, int *scratch) {
    int sum = 0;
    for (int i = (int)threadIdx.x; i < row; i += STEP_THREADS) sum += slots[i].count;
    for (int half = WARP / 2; half > 0; half /= 2) sum += __shfl_xor_sync(WARP_ALL, sum, half);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = sum;
    __syncthreads();
    return scratch[0] + scratch[1];
}

static __global__ void __launch_bounds__(STEP_THREADS)
    run_step(const __grid_constant__ struct kernels_run run) {
    after_previous();
    __shared__ int scratch[STEP_THREADS / WARP];
    const int row = (int)blockIdx.x, tid = (int)threadIdx.x;
    const struct kernels_slot *slot = &run.slots[row];
    const int begin = entries_before(run.slots, row, scratch), count = slot->count;
    if (tid < count) {
        run.mix_ids[begin + tid] = slot->ids[tid];
        run.mix_weights[begin + tid] = slot->weights[tid];
    }
    if (tid != 0) return;
    const struct think_params *params = &run.params[row];
    const struct think_filters filters = step_filters(params, run.states[row].phase);
    const uint64_t stop = run.stop && peer_load<1>(&run.stop[row]).v[0] != 0;
    run.mix_begin[row] = begin;
    if (row == run.rows - 1) run.mix_begin[run.rows] = begin + count;
    run.row[row].position = slot->position;
    run.row[row].page_begin = slot->page_begin;
    run.probes[row].temperature = step_is_greedy(&filters) ? 1.0f : filters.temperature;
    run.control[row] = slot->hash << 1 | stop;
}

extern "C" int kernels_run_step(kernels_stream stream, struct kernels_run run) {
    KERNELS_LAUNCH(run_step, dim3((unsigned)run.rows), dim3(STEP_THREADS), 0, stream, run);
    return (int)cudaGetLastError();
}

/* ---- decisions to slots ---- */

static __device__ uint64_t control_of(const struct kernels_run &run, int rank, int row) {
    return ((const uint64_t *)(const void *)(run.all + (size_t)rank * run.rank_bytes))[row];
}

/* 1 + the first rank whose hash is not rank 0's; 0: none. */
static __device__ int first_different(const struct kernels_run &run, int row) {
    const uint64_t want = control_of(run, 0, row) >> 1;
    for (int rank = 1; rank < run.ranks; rank++)
        if (control_of(run, rank, row) >> 1 != want) return rank + 1;
    return 0;
}

/* A sum of mixed words, each with its place: any order of addition gives the same. In every thread.
 */
static __device__ uint64_t hash_block(const uint32_t *words, int count, uint64_t *scratch) {
    uint64_t sum = 0;
    for (int i = (int)threadIdx.x; i < count; i += DECIDE_THREADS) {
        uint64_t h = (words[i] + 1) * 0x9e3779b97f4a7c15u ^ (uint64_t)(i + 1) * 0xd6e8feb86659fd93u;
        h = (h ^ h >> 32) * 0xd6e8feb86659fd93u;
        sum += h ^ h >> 29;
    }
    for (int half = WARP / 2; half > 0; half /= 2) sum += __shfl_xor_sync(WARP_ALL, sum, half);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = sum;
    __syncthreads();
    return scratch[0] + scratch[1] + scratch[2] + scratch[3];
}

static __device__ void copy_words(void *to, const void *from, int bytes) {
    for (int i = (int)threadIdx.x; i < bytes / 4; i += DECIDE_THREADS)
        ((uint32_t *)to)[i] = ((const uint32_t *)from)[i];
}

static __global__ void __launch_bounds__(DECIDE_THREADS)
    run_decide(const __grid_constant__ struct kernels_run run) {
    after_previous();
    __shared__ uint64_t scratch[DECIDE_THREADS / WARP];
    static_assert(sizeof(struct think_decision) % 4 == 0 && sizeof(struct think_state) % 4 == 0,
                  "copied and hashed by words");
    static_assert((int)KERNELS_IMPOSSIBLE == (int)RUN_IMPOSSIBLE, "think's word for it");
    const int row = (int)blockIdx.x, tid = (int)threadIdx.x;
    struct kernels_slot *slot = &run.slots[row];
    const struct think_decision *d = &run.decisions[row];
    const bool rests = slot->position < 0;
    const uint64_t stamp = slot->stamp;
    struct run_answer *answer =
        &run.answers[stamp % (uint64_t)run.answer_steps * (uint64_t)run.answer_rows +
                     (uint64_t)row];
    const uint64_t hash =
        hash_block((const uint32_t *)(const void *)d, (int)sizeof *d / 4, scratch);
    const int status = rests ? (int)RUN_RESTED : run.status[row];
    const bool decided = status == (int)RUN_DECIDED;
    const bool left = slot->phase_bound && run.states[row].phase != d->phase;
    const bool live = decided && !(control_of(run, 0, row) & 1) && d->finish == FINISH_NONE &&
                      slot->steps > 1 && !left;
    if (run.stop && decided) {
        copy_words(&answer->decision, d, (int)sizeof *d);
        copy_words(&answer->state, &run.states[row], (int)sizeof(struct think_state));
    }
    __syncthreads(); /* nobody reads the slot any more */
    if (live && tid < d->count) {
        slot->ids[tid] = d->ids[tid];
        slot->weights[tid] = d->weights[tid];
    }
    if (tid == 0) {
        answer->status = status;
        answer->live = live;
        answer->differs = first_different(run, row);
        if (live) {
            slot->position++;
            slot->steps--;
            slot->count = d->count;
        } else {
            slot->position = -1;
            run.thinkers[row].probe = -1;
        }
        if (decided) slot->hash = hash;
        slot->stamp = stamp + 1;
        flag_set(&answer->stamp, stamp);
    }
}

extern "C" int kernels_run_decide(kernels_stream stream, struct kernels_run run) {
    KERNELS_LAUNCH(run_decide, dim3((unsigned)run.rows), dim3(DECIDE_THREADS), 0, stream, run);
    return (int)cudaGetLastError();
}
