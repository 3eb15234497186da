/* comm_gpu.c: which GPU each rank has, and whether one can reach the other's memory. For comm_nccl.c
 * and comm_fused.c, which both want a GPU a rank.
 *
 * A GPU is known by its place on the PCI bus and its host: ranks number devices in their own ways
 * (CUDA_VISIBLE_DEVICES). Thread: engine. Memory: none.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "comm/comm_path.h"

struct place {
    char host[64], bus[24];
};

static struct place own_place(void) {
    struct place out = {.host = "", .bus = ""};
    int device = 0;
    if (gethostname(out.host, sizeof out.host - 1) != 0) snprintf(out.host, sizeof out.host, "?");
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetPCIBusId(out.bus, sizeof out.bus - 1, device) != cudaSuccess) {
        cudaGetLastError();
        snprintf(out.bus, sizeof out.bus, "?");
    }
    return out;
}

static void gather_places(comm *c, struct place all[COMM_RANKS_MAX]) {
    const struct place own = own_place();
    c->job->all_gather(c, &own, sizeof own, all);
}

int comm_gpu_sharing(comm *c, int *first, int *second) {
    struct place all[COMM_RANKS_MAX];
    int most = 1;
    gather_places(c, all);
    for (int r = 0; r < c->size; r++) {
        int same = 0;
        for (int q = 0; q < c->size; q++) {
            if (memcmp(&all[q], &all[r], sizeof all[q]) != 0) continue;
            if (++same == 2 && most == 1) *first = r, *second = q;
        }
        if (same > most) most = same;
    }
    return most;
}

enum status comm_gpu_reach(comm *c) {
    struct place all[COMM_RANKS_MAX];
    int device = 0, peer, can;
    gather_places(c, all);
    const struct place own = all[c->rank];
    cudaGetDevice(&device);
    for (int r = 0; r < c->size; r++) {
        if (strcmp(all[r].host, own.host) != 0) {
            return fail(STATUS_USAGE,
                        "--comm fused: ranks %d (%s) and %d (%s) are on different hosts, which "
                        "cannot see one another's GPU memory: use --comm nccl",
                        c->rank, own.host, r, all[r].host);
        }
        if (strcmp(all[r].bus, own.bus) == 0) continue;
        /* a device this process cannot see may still be opened: that is tried later */
        if (cudaDeviceGetByPCIBusId(&peer, all[r].bus) != cudaSuccess) {
            cudaGetLastError();
            continue;
        }
        if (cudaDeviceCanAccessPeer(&can, device, peer) == cudaSuccess && can) continue;
        cudaGetLastError();
        return fail(STATUS_USAGE,
                    "--comm fused: GPU %s of rank %d cannot reach the memory of GPU %s of rank %d "
                    "(nvidia-smi topo -p2p r): use --comm nccl",
                    own.bus, c->rank, all[r].bus, r);
    }
    return STATUS_OK;
}
