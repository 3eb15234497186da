/* comm_guard.c: the launcher's end, when it cannot find it alone.
 *
 *   rank leaves ─► guard: 4.4 s ─► SIGTERM, SIGTERM, SIGTERM ─► SIGKILL
 *                         └─ the launcher has ended: so does the guard
 *
 * A launcher ends its job by telling the daemons of all hosts and waiting for them. One whose host
 * or network has gone never answers; mpirun then waits until TCP gives up (a quarter of an hour),
 * and so does the daemon of the other side: the job would neither serve nor end, and no supervisor
 * would start it again. So a rank that leaves because ranks are lost leaves a guard behind: a
 * process of its own session, since the launcher signals its ranks' process groups. On one host the
 * launcher needs nobody, and there is none.
 *
 * An orderly end takes mpirun 3 to 4.1 s (on each host 1 s to SIGTERM, 1 s to SIGKILL, at times one
 * host after the other), and a signal in the middle of one may crash it: hence the 4.4 s. Then its third SIGTERM makes it leave with what it has;
 * the daemon of another host leaves at the first.
 *
 * Thread: any; the guard itself is made by _Fork and makes system calls only. Memory: none.
 */
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "comm/comm.h"

enum { PATIENCE_MS = 4400, AGAIN_MS = 50 };

/* True when the process has ended within this time. */
static bool has_ended(int launcher, int ms) {
    struct pollfd ended = {.fd = launcher, .events = POLLIN};
    return poll(&ended, 1, ms) != 0;
}

static _Noreturn void guard(int launcher) {
    static const int signals[] = {SIGTERM, SIGTERM, SIGTERM, SIGKILL};
    setsid();
    dup2(launcher, STDIN_FILENO);
    syscall(SYS_close_range, 1, ~0u,
            0); /* or the launcher would wait for what we could still say */
    int patience_ms = PATIENCE_MS;
    for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++, patience_ms = AGAIN_MS) {
        if (has_ended(STDIN_FILENO, patience_ms)) break;
        syscall(SYS_pidfd_send_signal, STDIN_FILENO, signals[i], NULL, 0);
    }
    _exit(0);
}

void comm_guard(int launcher) {
    const int handle = launcher > 1 ? (int)syscall(SYS_pidfd_open, launcher, 0) : -1;
    if (handle < 0) return; /* it is gone */
    if (_Fork() == 0) guard(handle);
    close(handle);
}
