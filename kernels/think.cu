/* think.cu: the thinking step on the device: the ranks' records of a row to its decision.
 *
 * A block per row. Threads merge the ranks' candidate lists by counting how many keys are larger
 * (at most 64 x 64 of them, ids are distinct); thread 0 joins the statistics along the tree over
 * ranks and runs think_step_row of src/think, the very code of the host. Every rank does this on
 * the same gathered bytes and comes to the same decision. No libm, no fused arithmetic: the bits
 * are the host's.
 *
 * Records come from other devices: one that cannot be (engine/merge.c has the same list, and the ranks' ids)
 * decides nothing and is named, and nothing is read by a count that was not checked.
 */
#include "backend/batch.h"
#include "kernels/device.cuh"
#include "think/step.h"

enum { THINK_THREADS = 128 };

static __device__ __forceinline__ bool pair_before(struct batch_pair a, struct batch_pair b) {
    return a.z > b.z || (a.z == b.z && a.id < b.id);
}

/* All but the order of its pairs. NaN fails every comparison. */
static __device__ __forceinline__ bool head_is_possible(const struct batch_record *r, int k) {
    if (r->count < 0 || r->count > k || !(r->m < INFINITY)) return false;
    if (r->m == -INFINITY) return r->count == 0;
    const struct batch_pair *pairs = (const struct batch_pair *)(const void *)(r + 1);
    return r->count > 0 && pairs[0].z == r->m && r->s >= 1.0f && r->s < INFINITY && r->q <= 0.0f &&
           r->q > -INFINITY;
}

/* grid: thinkers. */
static __global__ void __launch_bounds__(THINK_THREADS, 1)
    think(const struct kernels_thinker *thinkers, int k, int watch_max, int ranks,
          const unsigned char *gathered, int64_t rank_stride, const struct think_params *params,
          struct think_state *states, struct think_decision *decisions, int32_t *status) {
    after_previous();
    __shared__ float z[KERNELS_CANDIDATES_MAX];
    __shared__ uint32_t id[KERNELS_CANDIDATES_MAX];
    __shared__ int count[KERNELS_RANKS_MAX];       /* pairs of a rank */
    __shared__ bool impossible[KERNELS_RANKS_MAX]; /* its record */
    const int tid = (int)threadIdx.x;
    const struct kernels_thinker me = thinkers[blockIdx.x];
    if (me.probe < 0) return;
    const int64_t stride = batch_record_bytes(k, watch_max);
    const unsigned char *first = gathered + me.probe * stride;

    if (tid < ranks) {
        const struct batch_record *mine =
            (const struct batch_record *)(const void *)(first + tid * rank_stride);
        impossible[tid] = !head_is_possible(mine, k);
        count[tid] = impossible[tid] ? 0 : mine->count;
    }
    __syncthreads();
    for (int i = tid; i < ranks * k; i += THINK_THREADS) {
        const struct batch_record *mine =
            (const struct batch_record *)(const void *)(first + i / k * rank_stride);
        if (i % k >= count[i / k]) continue;
        const struct batch_pair *at = (const struct batch_pair *)(const void *)(mine + 1) + i % k;
        const struct batch_pair pair = *at;
        if (!(pair.z > -INFINITY) || (i % k > 0 && !pair_before(at[-1], pair)))
            impossible[i / k] = true;
        int place = 0;
        for (int r = 0; r < ranks && place < k;
             r++) { /* lists are sorted: stop at the first that is behind */
            const struct batch_record *other =
                (const struct batch_record *)(const void *)(first + r * rank_stride);
            const struct batch_pair *pairs = (const struct batch_pair *)(const void *)(other + 1);
            int n = 0;
            while (n < count[r] && pair_before(pairs[n], pair)) n++;
            place += n;
        }
        if (place < k) {
            z[place] = pair.z;
            id[place] = pair.id;
        }
    }
    __syncthreads();
    if (tid != 0) return;

    float m[7], s[7], q[7]; /* binary counter over ranks: log2(KERNELS_RANKS_MAX) + 1 */
    int top = -1, total = 0;
    struct think_candidates c;
    c.close_z = -INFINITY;
    for (int r = 0; r < ranks; r++) {
        const struct batch_record *record =
            (const struct batch_record *)(const void *)(first + r * rank_stride);
        const struct batch_pair *watch = (const struct batch_pair *)(const void *)(record + 1) + k;
        const float watched = me.close_watch >= 0 ? watch[me.close_watch].z : -INFINITY;
        if (impossible[r] || !(watched < INFINITY)) {
            status[me.slot] = KERNELS_IMPOSSIBLE - r;
            return;
        }
        if (watched > c.close_z) c.close_z = watched;
        total += count[r];
        top++;
        m[top] = record->m;
        s[top] = record->s;
        q[top] = record->q;
        for (int n = r + 1; n % 2 == 0; n /= 2, top--)
            batch_stats_join(&m[top - 1], &s[top - 1], &q[top - 1], m[top], s[top], q[top]);
    }
    for (; top > 0; top--)
        batch_stats_join(&m[top - 1], &s[top - 1], &q[top - 1], m[top], s[top], q[top]);
    c.m = m[0];
    c.s = s[0];
    c.q = q[0];
    c.count = total < k ? total : k;
    c.complete = false;
    c.z = z;
    c.id = id;
    if (!(c.m > -INFINITY && c.m < INFINITY) || c.count < 1) {
        status[me.slot] = -1;
        return;
    }
    status[me.slot] = think_step_row(&params[me.slot], &states[me.slot], &c, &decisions[me.slot]);
}

extern "C" int kernels_think(kernels_stream stream, int count,
                             const struct kernels_thinker *thinkers, struct kernels_probes batch,
                             int ranks, const void *gathered, size_t rank_bytes,
                             const struct think_params *params, struct think_state *states,
                             struct think_decision *decisions, int32_t *status) {
    if (count > 0)
        KERNELS_LAUNCH(think, dim3((unsigned)count), dim3(THINK_THREADS), 0, stream, thinkers,
                       batch.candidate_count, batch.watch_max, ranks,
                       (const unsigned char *)gathered, (int64_t)rank_bytes, params, states,
                       decisions, status);
    return (int)cudaGetLastError();
}
