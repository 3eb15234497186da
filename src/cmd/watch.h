/* watch.h: a thread of every rank that ends the job when a rank stands still unnoticed.
 *
 * Inside a step every wait between ranks has a deadline of its own (comm.h). Joining the job,
 * loading and idling have none: they take as long as they take. There this thread looks, ten times
 * a second, at three things:
 *   - the other ranks of this host: one that has been stopped (state T in /proc: SIGSTOP, a frozen
 *     process) for --collective-timeout;
 *   - between rank 0 and the ranks of other hosts: signs of life (beat.h), missing for as long;
 *   - how long this rank has been in a stage that has a limit (MPI_Init, the preflight).
 * Then it says who, where and when in one line, lets rank 0 tell its clients, and leaves with the
 * stage's exit code, upon which the launcher ends the other ranks. Never through MPI, which belongs
 * to the main thread. It leaves as well when the launcher has gone, with code 5.
 *
 * When rank 0 has been killed, the launcher's SIGTERM (blocked where rank 0 serves, hence pending) is
 * the time to say at which step that was: the next rank of its host does, or the first of each other.
 *
 * Rank 0 goes first; others wait two seconds longer unless it is rank 0 that stands still. Alone
 * (no launcher) there is nothing to watch. Thread: as said; memory: static.
 */
#ifndef SFUMATO_CMD_WATCH_H
#define SFUMATO_CMD_WATCH_H

#include "base/check.h"
#include "comm/comm.h"

/* A part of a rank's life. Lives for ever. */
struct watch_stage {
    const char *name; /* "joining the job" */
    const char *advice;
    int exit_code; /* when the limit is over */
};

/* Before MPI_Init. launcher: the parent as early as can be, which may be gone by now. seconds:
 * --collective-timeout, 0 = never. */
enum status watch_start(int launcher, int rank, double seconds);
/* This rank is in this stage from now on, at most so long; 0: without a limit. */
void watch_enter(const struct watch_stage *stage, double limit_seconds);
/* Collective: all ranks are there. */
void watch_joined(comm *c);
/* Called on the watching thread before the process leaves; must return within a second. NULL: none.
 */
void watch_on_end(void (*hook)(void *user, int exit_code, const char *text), void *user);
void watch_stop(void);

#endif
