/* comm_bench.h: `bench comm`: our exchanges beside MPI's, by size, in the same run. */
#ifndef SFUMATO_COMM_COMM_BENCH_H
#define SFUMATO_COMM_COMM_BENCH_H

#include "comm/comm.h"

/* Collective. Rank 0 prints a table, or with json one line, to standard output. A comm without
 * comm_setup is set up here (path auto, 1 MB); otherwise only sizes that fit its configuration are
 * timed. STATUS_USAGE with one rank: there is nothing to compare. */
enum status comm_bench(comm *c, bool json);

#endif
