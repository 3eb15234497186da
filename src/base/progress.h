/* progress.h: how far along something long is: a bar on a terminal, plain lines in a pipe.
 *
 * On a terminal one line of standard error is redrawn at most 10 times a second; in a pipe there is
 * a line per 10 % or 2 s, whichever is later, but never silence for more than 10 s. Log lines end a
 * bar first (progress_break). Thread: main. Memory: the caller's struct.
 */
#ifndef SFUMATO_BASE_PROGRESS_H
#define SFUMATO_BASE_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

struct progress {
    const char *what;
    int64_t total; /* 0 = unknown */
    bool shown, terminal, drawn;
    double start, last; /* seconds, monotonic */
    int last_tenth;
};

/* The number of the plan this process is at or was at last, for what is said when the job ends. Any
 * thread. */
void progress_at_step(uint64_t step);
uint64_t progress_step(void);

double progress_clock(void); /* seconds, monotonic */
/* Whether what is written to this descriptor (1 or 2) ends on a terminal. Under mpirun rank 0's standard
 * output is a pseudo-terminal whatever mpirun's own is, so mpirun's descriptor is asked. */
bool progress_is_terminal(int fd);
/* shown = false: silent (--quiet, ranks other than 0). */
void progress_begin(struct progress *p, const char *what, int64_t total, bool shown);
/* note: what stands behind the bar ("812 MB/s"), may be NULL. Cheap to call often. */
void progress_update(struct progress *p, int64_t done, const char *note);
/* Removes the bar, so that a log line may follow. */
void progress_break(struct progress *p);
void progress_end(struct progress *p);

/* "1.50 GB", "3m20s": into out, which is returned. */
const char *progress_bytes(double bytes, char out[32]);
const char *progress_seconds(double seconds, char out[32]);

#endif
