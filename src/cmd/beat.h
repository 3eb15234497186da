/* beat.h: signs of life between hosts, for watch.h. A rank of another host that stands still, a host that
 * has lost power and a network that is gone look the same from here: nothing is heard any more.
 *
 *   rank r, on another host than rank 0    {token, r, i} ─► address i of rank 0, ten times a second
 *   rank 0                                 {token, 0, i} ─► where that came from
 *
 * Datagrams of UDP over IPv4, of their own and not of MPI, which belongs to the main thread and may be
 * busy or waiting. Rank 0 says over MPI where it can be reached and a random token; a datagram without
 * it is nobody's. Whoever was never heard is not missed either (a firewall: said once): then the next
 * step's deadline finds a rank that stands still.
 *
 * Thread: beat_join the main one, the others the watching one. Memory: static.
 */
#ifndef SFUMATO_CMD_BEAT_H
#define SFUMATO_CMD_BEAT_H

#include "comm/comm.h"

/* Collective. On one host nothing is opened. */
void beat_join(comm *c);
/* Once a look: hears what has come, sends what is due. */
void beat_look(void);
/* Looks since this rank was heard; 0: it is there, or never was heard, or is not listened to. Rank 0
 * listens to the ranks of other hosts, these to rank 0. Silence is counted in looks, not in time: see
 * watch.c. */
int beat_silent_looks(int rank);

#endif
