/* bench_comm.c: `sfumato bench comm`; the measuring is comm's own, which alone may call MPI. */
#include "cmd/bench.h"
#include "comm/comm_bench.h"

enum status bench_comm(struct host *h) {
    enum { BYTES_MAX = 1 << 20 };
    static const enum comm_kind kinds[] = {COMM_AUTO, COMM_MPI, COMM_NCCL, COMM_FUSED};
    if (kinds[h->params.comm] > COMM_MPI) {
        return fail(STATUS_USAGE,
                    "bench comm is of the CPU's memory: --comm auto or mpi; `sfumato selftest comm "
                    "--backend cuda --comm %s` times sums between GPUs",
                    param_word(&h->params, PARAM_comm));
    }
    const struct comm_config config = {.kind = kinds[h->params.comm],
                                       .slot_floats = BYTES_MAX / sizeof(float),
                                       .bcast_bytes_max = BYTES_MAX,
                                       .gather_bytes_max = BYTES_MAX,
                                       .timeout_seconds = h->params.collective_timeout};
    TRY(comm_agree(h->comm, comm_setup(h->comm, &config)));
    return comm_bench(h->comm, h->params.json);
}
