/* fault.h: fault points for tests, compiled in, inert unless SFUMATO_FAULT=name:rank:count is set.
 *
 * fault_hit("step-kill") is true on the count-th call with that name on that rank, and only then.
 * The list of names in use is in tests/README.md. Thread: a plain counter, so one thread a name; the
 * environment is read by the main thread, which asks for init-delay before there is another.
 */
#ifndef SFUMATO_BASE_FAULT_H
#define SFUMATO_BASE_FAULT_H

#include <stdbool.h>

bool fault_hit(const char *name);
/* The same on every count-th call. */
bool fault_every(const char *name);
/* Sleeps count milliseconds at every call with that name on that rank: holds a phase open. */
void fault_sleep(const char *name);
/* Milliseconds of random delay asked for by SFUMATO_FAULT=delay:rank:max_ms on this rank, else 0. */
int fault_delay_ms(void);

#endif
