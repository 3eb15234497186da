/* fault.c: see fault.h. Reads the environment once, at the first question. */
#include "base/fault.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"

static char wanted[64];
static int wanted_rank = -1;
static long wanted_count;
static bool parsed;

static void parse_environment(void) {
    parsed = true;
    const char *text = getenv("SFUMATO_FAULT");
    if (!text) return;
    const char *colon = strchr(text, ':');
    if (!colon || (size_t)(colon - text) >= sizeof wanted) return;
    memcpy(wanted, text, (size_t)(colon - text));
    char *end;
    wanted_rank = (int)strtol(colon + 1, &end, 10);
    wanted_count = *end == ':' ? strtol(end + 1, NULL, 10) : 1;
}

static bool is_wanted(const char *name) {
    if (!parsed) parse_environment();
    return wanted_rank >= 0 && wanted_rank == log_rank() && strcmp(name, wanted) == 0;
}

bool fault_hit(const char *name) { return is_wanted(name) && --wanted_count == 0; }

bool fault_every(const char *name) {
    static long calls;
    return is_wanted(name) && wanted_count > 0 && ++calls % wanted_count == 0;
}

void fault_sleep(const char *name) {
    if (!is_wanted(name)) return;
    const struct timespec wait = {wanted_count / 1000, wanted_count % 1000 * 1000000};
    nanosleep(&wait, NULL);
}

int fault_delay_ms(void) {
    static unsigned state = 1;
    if (!parsed) parse_environment();
    if (wanted_rank < 0 || wanted_rank != log_rank() || strcmp(wanted, "delay") != 0) return 0;
    state = state * 1103515245u + 12345u; /* jitter for a test, not randomness of a result */
    return (int)((state >> 16) % (unsigned)(wanted_count + 1));
}
