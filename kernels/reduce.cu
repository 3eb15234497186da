/* reduce.cu: sums and exchanges over ranks by loads and stores into one another's memory.
 *
 *   region of rank r:   head | flags | one-shot [3][R][floats] | slot | sums | gather [2][R][pairs]
 *                       own    peers   peers push               own    peers   peers push
 *
 * One-shot (Lamport), for small sums: every rank pushes its partial into its place in every peer's
 * region and polls its own until no element is the mark "nothing here"; data is its own readiness.
 *
 *   The mark. In our tree -0.0f means an absent partial (kernels.h, cpu.md 3.1) and x + -0.0f = x for
 *   every x, so -0.0f is a payload like any other and cannot be the mark. The mark is one signalling
 *   NaN, which no arithmetic of any machine gives; should memory bring it all the same, the sender
 *   makes it quiet, as an addition would.
 *
 *   Three buffers in turn. Call f pushes into f % 3 and puts the marks back into (f - 1) % 3 of its own
 *   region. A peer can push into (f + 2) % 3, the same one, only after it has all of our call f + 1,
 *   and that starts when our call f is over, marks and all (after_previous). With two buffers a fast
 *   peer's call f + 1 is wiped out by our call f: then that call waits for ever.
 *
 * Two-shot, for large sums: block b of all ranks works on the same rows. Rank r sums piece r of each
 * row over all slots and pushes it to all; then every rank has the rows.
 *
 *   slots ─ flag: I have started ─ sum own piece ─ push ─ flag: pushed ─ rows are here
 *
 *   Who sees `pushed` of all knows that nobody reads its slot any more; who sees `started` of all
 *   knows that they have let go of what it pushed last time. The norm is made by every rank for all
 *   rows: sending h too would cost more than making it.
 *
 * Gather: 8-byte pairs of a word and the call's number, two buffers in turn, no marks to put back.
 *
 * A block of any rank waits only for blocks of the same index, in launches whose blocks all fit on the
 * device. Numbers of calls are kept on the device: a launch may be replayed from a graph. They are 64
 * bits wide where they choose buffers (2^32 % 3 is not 0); a gather's mark has 31 and would be mistaken
 * only for a word last written exactly 2^31 gathers ago.
 */
#include "kernels/norm.cuh"
#include "kernels/peer.cuh"

enum {
    SUM_COLUMNS = 4 * NORM_THREADS, /* of a plain sum's "row" */
    FLAGS_OF_BLOCK = 2 * KERNELS_PEERS_MAX,
    REGION_ALIGN = 256,
    POLLS = 512, /* between looks at the watch */
};
#define NOTHING_HERE 0xffa5a5a5u /* a NaN whose quiet bit is clear */
#define QUIET_BIT 0x00400000u

struct head {
    uint64_t calls[3];                    /* one-shot, two-shot, gather: completed */
    uint32_t arrived[3];                  /* blocks of the running one */
    uint32_t failed;                      /* never cleared: later kernels leave at once */
    int64_t used[KERNELS_PEERS_MAX];      /* by buffer: floats of a rank pushed there last */
};
enum { GATHER = 2 };

/* ---- the region ---- */

static __host__ __device__ __forceinline__ size_t aligned(size_t bytes) {
    return (bytes + REGION_ALIGN - 1) / REGION_ALIGN * REGION_ALIGN;
}
static __host__ __device__ __forceinline__ size_t flags_at(const kernels_peers &) {
    return aligned(sizeof(struct head));
}
static __host__ __device__ __forceinline__ size_t pushes_at(const kernels_peers &p) {
    return flags_at(p) + aligned(sizeof(uint64_t) * FLAGS_OF_BLOCK * (size_t)p.blocks_max);
}
static __host__ __device__ __forceinline__ size_t slot_at(const kernels_peers &p) {
    return pushes_at(p) +
           aligned(sizeof(float) * (size_t)(p.buffers * p.ranks) * (size_t)p.one_shot_floats);
}
static __host__ __device__ __forceinline__ size_t sums_at(const kernels_peers &p) {
    return slot_at(p) + aligned(sizeof(float) * (size_t)p.slot_floats);
}
static __host__ __device__ __forceinline__ size_t pairs_at(const kernels_peers &p) {
    return sums_at(p) + aligned(sizeof(float) * (size_t)p.slot_floats);
}
static __host__ __device__ __forceinline__ size_t region_bytes(const kernels_peers &p) {
    return pairs_at(p) + aligned(sizeof(uint64_t) * (size_t)(2 * p.ranks) * (size_t)p.gather_words);
}

template <typename T>
static __host__ __device__ __forceinline__ T *in_region(const kernels_peers &p, int of,
                                                        size_t at) {
    return (T *)(void *)((char *)p.region[of] + at);
}
static __device__ __forceinline__ head *head_of(const kernels_peers &p) {
    return in_region<head>(p, p.rank, 0);
}
/* What `from` pushes to `of` in a one-shot sum. */
static __device__ __forceinline__ float *push_place(const kernels_peers &p, int of, int buffer,
                                                    int from) {
    return in_region<float>(p, of, pushes_at(p)) +
           ((int64_t)buffer * p.ranks + from) * p.one_shot_floats;
}
static __device__ __forceinline__ uint64_t *pair_place(const kernels_peers &p, int of, int buffer,
                                                       int from) {
    return in_region<uint64_t>(p, of, pairs_at(p)) +
           ((int64_t)buffer * p.ranks + from) * p.gather_words;
}
static __device__ __forceinline__ uint64_t *flag_place(const kernels_peers &p, int of, int phase,
                                                       int from) {
    return in_region<uint64_t>(p, of, flags_at(p)) + (int64_t)blockIdx.x * FLAGS_OF_BLOCK +
           phase * KERNELS_PEERS_MAX + from;
}

/* ---- waiting ---- */

static __device__ __forceinline__ uint32_t word_load(const uint32_t *p) {
    return peer_load<1>(p).v[0];
}
static __device__ __forceinline__ void word_store(uint32_t *p, uint32_t x) {
    peer_store<1>(p, several<uint32_t, 1>{{x}});
}

/* Has somebody failed before? The same answer in every thread of the block. */
static __device__ __forceinline__ bool already_failed(const kernels_peers &p, uint32_t *shared) {
    if (threadIdx.x == 0) *shared = word_load(&head_of(p)->failed);
    __syncthreads();
    const bool failed = *shared != 0;
    __syncthreads();
    return failed;
}

/* One thread's wait for one value. */
struct waiting {
    uint64_t since_ns;
    uint32_t polls;
};

static __device__ __forceinline__ bool report(const kernels_peers &p, uint64_t reason, int missing,
                                           bool gather, uint64_t number) {
    kernels_watch *watch = p.watch;
    if (atomicAdd(&head_of(p)->failed, 1u) == 0) {
        word_store(&watch->missing, (uint32_t)missing);
        word_store(&watch->gather, gather);
        pair_store(&watch->number, number);
        flag_set(&watch->failed, reason);
    }
    return true;
}

/* Called while `missing` has not brought what this thread waits for. True: leave. */
static __device__ __forceinline__ bool give_up(const kernels_peers &p, waiting *w, int missing,
                                               bool gather, uint64_t number) {
    poll_pause();
    if (++w->polls % POLLS != 0) return false;
    if (word_load(&head_of(p)->failed) != 0) return true;
    if (flag_get(&p.watch->abort) != 0) return report(p, 2, missing, gather, number);
    const uint64_t now_ns = device_clock_ns();
    if (w->since_ns == 0) w->since_ns = now_ns;
    if (p.patience_ns == 0 || now_ns - w->since_ns < p.patience_ns) return false;
    return report(p, 1, missing, gather, number);
}

/* The last block of a call counts it. */
static __device__ __forceinline__ void call_ends(const kernels_peers &p, int kind, uint64_t number,
                                                 int buffer, int64_t used, uint32_t *shared) {
    head *own = head_of(p);
    if (!last_arrival(&own->arrived[kind], gridDim.x, shared) || threadIdx.x != 0) return;
    if (kind == KERNELS_ONE_SHOT) own->used[buffer] = used;
    own->calls[kind] = number;
}

/* ---- operands ---- */

template <int V>
static __device__ __forceinline__ several<uint32_t, V> not_the_mark(several<uint32_t, V> x) {
#pragma unroll
    for (int i = 0; i < V; i++)
        if (x.v[i] == NOTHING_HERE) x.v[i] |= QUIET_BIT;
    return x;
}

static __device__ __forceinline__ float float_of(uint32_t bits) {
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* comm.h's tree over P operands; P is a power of two, absent ones are -0.0f. */
template <int V, int P>
static __device__ __forceinline__ several<float, V> tree_of(const several<uint32_t, V> (&x)[P]) {
    several<float, V> out;
#pragma unroll
    for (int i = 0; i < V; i++) {
        float node[P];
#pragma unroll
        for (int r = 0; r < P; r++) node[r] = float_of(x[r].v[i]);
#pragma unroll
        for (int n = P / 2; n > 0; n /= 2)
#pragma unroll
            for (int r = 0; r < n; r++) node[r] = node[2 * r] + node[2 * r + 1];
        out.v[i] = node[0];
    }
    return out;
}

template <int V>
static __device__ __forceinline__ several<uint32_t, V> absent() {
    several<uint32_t, V> out;
#pragma unroll
    for (int i = 0; i < V; i++) out.v[i] = 0x80000000u;
    return out;
}

/* ---- what is done with a sum ---- */

/* A sum of `count` floats as rows of `width`; with a norm, or into `sum`. */
struct job {
    int64_t count;
    int rows, width;
    float *sum; /* plain */
    bool first; /* the rest: norm */
    float scale, eps;
    float *x;
    const float *weight;
    bf16 *h;
};

static __device__ __forceinline__ int width_of(const job &j, int row) {
    const int64_t left = j.count - (int64_t)row * j.width;
    return left < j.width ? (int)left : j.width;
}

template <int V, bool NORM, typename Sum>
static __device__ __forceinline__ void use_row(const job &j, int row, Sum &sum, float *scratch) {
    const int64_t at = (int64_t)row * j.width;
    sum.begin(at);
    if constexpr (NORM) {
        norm_row<V>(j.width, j.first, j.scale, sum, j.x + at, j.x + at, j.weight, j.eps, j.h + at,
                    scratch);
    } else {
        const int n = width_of(j, row);
        for (int k = (int)threadIdx.x * V; k < n; k += NORM_THREADS * V)
            store_several<V>(j.sum + at + k, sum(k));
    }
}

/* ---- one-shot ---- */

template <int V, int P>
struct sum_of_pushes {
    const kernels_peers &p;
    uint64_t number;
    const uint32_t *slot; /* own partial */
    const float *pushes;  /* [R][one_shot_floats] of this call */
    bool gone;            /* waited in vain: nothing matters any more */
    int64_t at;

    __device__ __forceinline__ void begin(int64_t at_) { at = at_; }
    __device__ __forceinline__ several<float, V> operator()(int k) {
        several<uint32_t, V> x[P];
        const several<uint32_t, V> own = not_the_mark(load_several<V>(slot + at + k));
        waiting w = {0, 0};
        for (;;) {
            int missing = -1;
#pragma unroll
            for (int r = 0; r < P; r++) {
                x[r] = r == p.rank ? own : absent<V>();
                if (r < p.ranks && r != p.rank)
                    x[r] = peer_load<V>(pushes + r * p.one_shot_floats + at + k);
#pragma unroll
                for (int i = 0; i < V; i++) missing = x[r].v[i] == NOTHING_HERE ? r : missing;
            }
            if (missing < 0 || gone) break;
            gone = give_up(p, &w, missing, false, number);
        }
        return tree_of<V, P>(x);
    }
};

template <int V, int P, bool NORM>
static __global__ void __launch_bounds__(NORM_THREADS, 1)
    one_shot(const __grid_constant__ struct kernels_peers p, const __grid_constant__ struct job j) {
    after_previous();
    __shared__ float scratch[WARP + 1];
    __shared__ uint32_t word;
    if (already_failed(p, &word)) return;
    const head *own = head_of(p);
    const uint64_t number = own->calls[KERNELS_ONE_SHOT] + 1;
    const int buffer = (int)(number % (uint64_t)p.buffers);
    const int before = (int)((number + (uint64_t)p.buffers - 1) % (uint64_t)p.buffers);

    const uint32_t *slot = in_region<const uint32_t>(p, p.rank, slot_at(p));
    for (int row = (int)blockIdx.x; row < j.rows; row += (int)gridDim.x) {
        const int64_t at = (int64_t)row * j.width;
        const int n = width_of(j, row);
        for (int k = (int)threadIdx.x * V; k < n; k += NORM_THREADS * V) {
            const several<uint32_t, V> x = not_the_mark(load_several<V>(slot + at + k));
            for (int i = 1; i < p.ranks; i++) {
                const int peer = (p.rank + i) % p.ranks;
                peer_store<V>(push_place(p, peer, buffer, p.rank) + at + k, x);
            }
        }
    }

    const several<uint32_t, 4> nothing = {{NOTHING_HERE, NOTHING_HERE, NOTHING_HERE, NOTHING_HERE}};
    const int64_t used = own->used[before];
    for (int r = 0; r < p.ranks; r++) {
        if (r == p.rank) continue;
        float *place = push_place(p, p.rank, before, r);
        for (int64_t k = 4 * ((int64_t)blockIdx.x * NORM_THREADS + threadIdx.x); k < used;
             k += 4 * (int64_t)gridDim.x * NORM_THREADS)
            peer_store<4>(place + k, nothing);
    }

    sum_of_pushes<V, P> sum = {p, number, slot, push_place(p, p.rank, buffer, 0), false, 0};
    for (int row = (int)blockIdx.x; row < j.rows; row += (int)gridDim.x)
        use_row<V, NORM>(j, row, sum, scratch);
    call_ends(p, KERNELS_ONE_SHOT, number, buffer, j.count, &word);
}

/* ---- two-shot ---- */

/* All ranks' blocks of this index have come to `phase` of call `number`; false: leave, as one. */
static __device__ __forceinline__ bool blocks_meet(const kernels_peers &p, int phase,
                                                   uint64_t number, uint32_t *shared) {
    if (threadIdx.x == 0) *shared = 0;
    __syncthreads();
    const int r = (int)threadIdx.x;
    if (r < p.ranks && r != p.rank) {
        waiting w = {0, 0};
        flag_set(flag_place(p, r, phase, p.rank), number);
        while (flag_get(flag_place(p, p.rank, phase, r)) < number) {
            if (!give_up(p, &w, r, false, number)) continue;
            *shared = 1;
            break;
        }
    }
    __syncthreads();
    return *shared == 0;
}

template <int V>
struct sum_pushed {
    const float *sums;
    int64_t at;
    __device__ void begin(int64_t at_) { at = at_; }
    __device__ several<float, V> operator()(int k) const {
        const several<uint32_t, V> x = peer_load<V>(sums + at + k);
        several<float, V> out;
#pragma unroll
        for (int i = 0; i < V; i++) out.v[i] = float_of(x.v[i]);
        return out;
    }
};

template <int V, int P, bool NORM>
static __global__ void __launch_bounds__(NORM_THREADS, 1)
    two_shot(const __grid_constant__ struct kernels_peers p, const __grid_constant__ struct job j) {
    after_previous();
    __shared__ float scratch[WARP + 1];
    __shared__ uint32_t word;
    if (already_failed(p, &word)) return;
    const uint64_t number = head_of(p)->calls[KERNELS_TWO_SHOT] + 1;
    if (!blocks_meet(p, 0, number, &word)) return;

    for (int row = (int)blockIdx.x; row < j.rows; row += (int)gridDim.x) {
        const int64_t at = (int64_t)row * j.width;
        const int64_t pieces = width_of(j, row) / V;
        const int end = (int)(pieces * (p.rank + 1) / p.ranks);
        for (int k = (int)(pieces * p.rank / p.ranks) + (int)threadIdx.x; k < end;
             k += NORM_THREADS) {
            several<uint32_t, V> x[P];
#pragma unroll
            for (int r = 0; r < P; r++)
                x[r] = r < p.ranks ? peer_load<V>(in_region<const float>(p, r, slot_at(p)) + at +
                                                  (int64_t)k * V)
                                   : absent<V>();
            const several<float, V> sum = tree_of<V, P>(x);
            several<uint32_t, V> bits;
            memcpy(&bits, &sum, sizeof bits);
            for (int i = 0; i < p.ranks; i++) {
                const int peer = (p.rank + i) % p.ranks;
                peer_store<V>(in_region<float>(p, peer, sums_at(p)) + at + (int64_t)k * V, bits);
            }
        }
    }

    if (!blocks_meet(p, 1, number, &word)) return;
    sum_pushed<V> sum = {in_region<const float>(p, p.rank, sums_at(p)), 0};
    for (int row = (int)blockIdx.x; row < j.rows; row += (int)gridDim.x)
        use_row<V, NORM>(j, row, sum, scratch);
    call_ends(p, KERNELS_TWO_SHOT, number, 0, 0, &word);
}

/* ---- gather ---- */

static __device__ __forceinline__ uint32_t bytes_load(const unsigned char *from, int64_t left) {
    uint32_t out = 0;
    if (left >= 4 && (uintptr_t)from % 4 == 0) return *(const uint32_t *)(const void *)from;
    for (int i = 0; i < 4 && i < left; i++) out |= (uint32_t)from[i] << (8 * i);
    return out;
}
static __device__ __forceinline__ void bytes_store(unsigned char *to, int64_t left, uint32_t x) {
    if (left >= 4 && (uintptr_t)to % 4 == 0) {
        *(uint32_t *)(void *)to = x;
        return;
    }
    for (int i = 0; i < 4 && i < left; i++) to[i] = (unsigned char)(x >> (8 * i));
}

static __global__ void __launch_bounds__(NORM_THREADS, 1)
    gather(const __grid_constant__ struct kernels_peers p, const unsigned char *mine, int64_t bytes,
           unsigned char *all, int64_t stride) {
    after_previous();
    __shared__ uint32_t word;
    if (already_failed(p, &word)) return;
    const uint64_t number = head_of(p)->calls[GATHER] + 1;
    const int buffer = (int)(number % 2);
    const uint32_t mark = (uint32_t)number | 0x80000000u; /* never the 0 of a fresh region */
    const int64_t step = (int64_t)gridDim.x * NORM_THREADS, words = (bytes + 3) / 4;
    const int64_t begin = (int64_t)blockIdx.x * NORM_THREADS + threadIdx.x;
    for (int64_t i = begin; i < words; i += step) {
        const uint32_t x = bytes_load(mine + 4 * i, bytes - 4 * i);
        for (int k = 1; k < p.ranks; k++)
            pair_store(pair_place(p, (p.rank + k) % p.ranks, buffer, p.rank) + i,
                       (uint64_t)mark << 32 | x);
        bytes_store(all + p.rank * stride + 4 * i, bytes - 4 * i, x);
    }
    bool gone = false;
    for (int k = 1; k < p.ranks; k++) {
        const int r = (p.rank + k) % p.ranks;
        const uint64_t *from = pair_place(p, p.rank, buffer, r);
        for (int64_t i = begin; i < words && !gone; i += step) {
            waiting w = {0, 0};
            uint64_t pair;
            while ((uint32_t)((pair = pair_load(from + i)) >> 32) != mark && !gone)
                gone = give_up(p, &w, r, true, number);
            bytes_store(all + r * stride + 4 * i, bytes - 4 * i, (uint32_t)pair);
        }
    }
    call_ends(p, GATHER, number, 0, 0, &word);
}

/* ---- launchers ---- */

static __global__ void __launch_bounds__(NORM_THREADS, 1)
    clear(const __grid_constant__ struct kernels_peers p) {
    after_previous();
    const size_t begin = pushes_at(p) / 4, end = slot_at(p) / 4, all = region_bytes(p) / 4;
    uint32_t *region = in_region<uint32_t>(p, p.rank, 0);
    for (size_t i = (size_t)blockIdx.x * NORM_THREADS + threadIdx.x; i < all;
         i += (size_t)gridDim.x * NORM_THREADS)
        word_store(&region[i], i >= begin && i < end ? NOTHING_HERE : 0u);
}

extern "C" size_t kernels_peers_bytes(const struct kernels_peers *p) { return region_bytes(*p); }

extern "C" float *kernels_peers_slot(const struct kernels_peers *p) {
    return in_region<float>(*p, p->rank, slot_at(*p));
}

static unsigned grid_of(const struct kernels_peers *p, int64_t wanted) {
    return (unsigned)(wanted < p->blocks_max ? wanted : p->blocks_max);
}

extern "C" int kernels_peers_clear(kernels_stream stream, const struct kernels_peers *p) {
    KERNELS_LAUNCH(clear, dim3(grid_of(p, 64)), dim3(NORM_THREADS), 0, stream, *p);
    return (int)cudaGetLastError();
}

template <int V, int P, bool NORM>
static void launch(kernels_stream stream, enum kernels_way way, const struct kernels_peers *p,
                   const job &j) {
    const dim3 grid(grid_of(p, j.rows)), block(NORM_THREADS);
    const auto kernel = way == KERNELS_ONE_SHOT ? one_shot<V, P, NORM> : two_shot<V, P, NORM>;
    KERNELS_LAUNCH(kernel, grid, block, 0, stream, *p, j);
}

template <bool NORM>
static int launch_by_shape(kernels_stream stream, enum kernels_way way,
                           const struct kernels_peers *p, const job &j) {
    if (j.rows <= 0) return 0;
    if (j.count % 4 != 0 || j.width % 4 != 0)
        launch<1, 8, NORM>(stream, way, p, j);
    else if (p->ranks <= 2)
        launch<4, 2, NORM>(stream, way, p, j);
    else if (p->ranks <= 4)
        launch<4, 4, NORM>(stream, way, p, j);
    else
        launch<4, 8, NORM>(stream, way, p, j);
    return (int)cudaGetLastError();
}

extern "C" int kernels_peers_sum(kernels_stream stream, enum kernels_way way,
                                 const struct kernels_peers *p, int64_t count, float *sum) {
    job j = {};
    j.count = count;
    j.rows = (int)blocks_of(count, SUM_COLUMNS);
    j.width = SUM_COLUMNS;
    j.sum = sum;
    return launch_by_shape<false>(stream, way, p, j);
}

extern "C" int kernels_peers_sum_norm(kernels_stream stream, enum kernels_way way,
                                      const struct kernels_peers *p, int rows, int hidden,
                                      bool first, float scale, float *x, const float *weight,
                                      float eps, uint16_t *h) {
    const job j = {(int64_t)rows * hidden, rows, hidden, nullptr, first, scale, eps, x, weight, h};
    return launch_by_shape<true>(stream, way, p, j);
}

extern "C" int kernels_peers_gather(kernels_stream stream, const struct kernels_peers *p,
                                    const void *mine, size_t bytes, void *all, size_t stride) {
    if (bytes > 0)
        KERNELS_LAUNCH(gather, dim3(grid_of(p, blocks_of((int64_t)bytes, 4 * NORM_THREADS))),
                       dim3(NORM_THREADS), 0, stream, *p, (const unsigned char *)mine,
                       (int64_t)bytes, (unsigned char *)all, (int64_t)stride);
    return (int)cudaGetLastError();
}
