/* ranks.h: for suites that run on every rank of a job: what must work before tests can begin, and the
 * failures of all ranks together. */
#ifndef SFUMATO_TESTS_RANKS_H
#define SFUMATO_TESTS_RANKS_H

#include "comm/comm.h"
#include "suite.h"

static inline void must(enum status s) {
    if (s == STATUS_OK) return;
    printf("%s\n", fail_text());
    exit(1);
}

/* Collective. Rank 0: failures of all ranks; others: their own. */
static inline unsigned ranks_failures(comm *c, unsigned mine) {
    const unsigned *all = comm_gather(c, &mine, sizeof mine);
    unsigned total = 0;
    for (int r = 0; all && r < comm_size(c); r++) total += all[r];
    return all ? total : mine;
}

#endif
