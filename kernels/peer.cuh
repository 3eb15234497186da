/* peer.cuh: memory that several devices read and write, as the kernels of reduce.cu see it.
 *
 * Every access of such memory is one of these, so that what the protocols rely on is in one place:
 *
 *   peer_load, peer_store    relaxed, at system scope; each 4-byte element arrives whole, in no order
 *   pair_load, pair_store    8 bytes that arrive whole: a word of data and the mark that it is there
 *   flag_set, flag_get       release and acquire at system scope: what the block did before its last
 *                            barrier is visible to whoever sees the flag
 *
 * PTX's vector accesses are not atomic as a whole, only per element; no protocol here needs more.
 * Under g++ they are the compiler's atomics: ThreadSanitizer checks that nothing else is shared.
 */
#ifndef SFUMATO_KERNELS_PEER_CUH
#define SFUMATO_KERNELS_PEER_CUH

#include "kernels/device.cuh"

template <int V>
static __device__ __forceinline__ several<uint32_t, V> peer_load(const void *p) {
    several<uint32_t, V> out;
#ifdef KERNELS_FIBRE
    fibre_touch(p, false);
    for (int i = 0; i < V; i++)
        out.v[i] = __atomic_load_n((const uint32_t *)p + i, __ATOMIC_RELAXED);
#else
    if constexpr (V == 4)
        asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out.v[0]), "=r"(out.v[1 % V]), "=r"(out.v[2 % V]), "=r"(out.v[3 % V])
                     : "l"(p)
                     : "memory");
    else
        asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(out.v[0]) : "l"(p) : "memory");
#endif
    return out;
}

template <int V>
static __device__ __forceinline__ void peer_store(void *p, const several<uint32_t, V> &x) {
#ifdef KERNELS_FIBRE
    fibre_touch(p, true);
    for (int i = 0; i < V; i++) __atomic_store_n((uint32_t *)p + i, x.v[i], __ATOMIC_RELAXED);
#else
    if constexpr (V == 4)
        asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.v[0]),
                     "r"(x.v[1 % V]), "r"(x.v[2 % V]), "r"(x.v[3 % V])
                     : "memory");
    else
        asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(x.v[0]) : "memory");
#endif
}

static __device__ __forceinline__ uint64_t pair_load(const uint64_t *p) {
#ifdef KERNELS_FIBRE
    fibre_touch(p, false);
    return __atomic_load_n(p, __ATOMIC_RELAXED);
#else
    uint64_t out;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(out) : "l"(p) : "memory");
    return out;
#endif
}

static __device__ __forceinline__ void pair_store(uint64_t *p, uint64_t x) {
#ifdef KERNELS_FIBRE
    fibre_touch(p, true);
    __atomic_store_n(p, x, __ATOMIC_RELAXED);
#else
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
#endif
}

static __device__ __forceinline__ void flag_set(uint64_t *p, uint64_t x) {
#ifdef KERNELS_FIBRE
    fibre_touch(p, true);
    __atomic_store_n(p, x, __ATOMIC_RELEASE);
#else
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
#endif
}

static __device__ __forceinline__ uint64_t flag_get(const uint64_t *p) {
#ifdef KERNELS_FIBRE
    fibre_touch(p, false);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#else
    uint64_t out;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(out) : "l"(p) : "memory");
    return out;
#endif
}

/* Between two looks at a value that is not there yet. */
static __device__ __forceinline__ void poll_pause() {
#ifdef KERNELS_FIBRE
    fibre_spin();
#endif
}

#endif
