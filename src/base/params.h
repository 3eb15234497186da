/* params.h: the options of every command, from command line, environment, file and defaults.
 *
 * params.def is the one table; this header turns its rows into struct params and names for the
 * rows. Owns: parsing, ranges and their messages, --help. Refuses to know: what an option does, and
 * whether two options make sense together (the commands do). Thread: start-up, main thread;
 * read-only afterwards. Memory: strings point into argv and environ, or into `memory` (values from
 * a file).
 */
#ifndef SFUMATO_BASE_PARAMS_H
#define SFUMATO_BASE_PARAMS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/arena.h"
#include "base/check.h"

/* Commands, as bits of a row's `commands`. */
enum params_command {
    PARAMS_GENERATE = 1,
    PARAMS_SCORE = 2,
    PARAMS_TOKENIZE = 4,
    PARAMS_INSPECT = 8,
    PARAMS_BENCH = 16,
    PARAMS_SERVE = 32,
    PARAMS_ENGINE = PARAMS_GENERATE | PARAMS_SCORE | PARAMS_BENCH | PARAMS_SERVE,
    PARAMS_ALL = 63,      /* that work on a model */
    PARAMS_SELFTEST = 64, /* works on the machine */
};

enum param_id {
#define X(kind, name, ...) PARAM_##name,
#include "base/params.def"
#undef X
    PARAM_COUNT,
    PARAM_NONE = -1,
};

enum param_origin { PARAM_DEFAULT, PARAM_FILE, PARAM_ENVIRONMENT, PARAM_COMMAND_LINE };

struct params {
#define PARAM_MEMBER_TEXT const char *
#define PARAM_MEMBER_LIST const char *
#define PARAM_MEMBER_CHOICE int
#define PARAM_MEMBER_COUNT int64_t
#define PARAM_MEMBER_MAYBE int64_t
#define PARAM_MEMBER_REAL double
#define PARAM_MEMBER_SWITCH bool
#define X(kind, name, ...) PARAM_MEMBER_##kind name;
#include "base/params.def"
#undef X
    unsigned char origin[PARAM_COUNT]; /* enum param_origin */
    const char *positional;            /* `bench step`: "step"; NULL */
    arena memory;
};

/* argv[0] is not read. Fills p; the caller ends it with params_fini whatever comes back.
 * STATUS_USAGE names the flag (variable, key), the value and what is allowed. Writes nothing
 * anywhere. */
enum status params_parse(struct params *p, enum params_command command, int argc, char **argv);
void params_fini(struct params *p);
/* The --help text of one command. */
void params_help(enum params_command command, const char *program, const char *usage,
                 const char *about, FILE *out);

/* True unless the value is the table's default. */
bool param_given(const struct params *p, enum param_id id);
/* "top-p" */
const char *param_flag(enum param_id id);
/* The word chosen by a CHOICE row. */
const char *param_word(const struct params *p, enum param_id id);

/* Sets one row from text, as the command line would. `where` is for the message ("--top-p"). */
enum status param_set(struct params *p, enum param_id id, const char *text,
                      enum param_origin origin, const char *where);

/* For requests: the row whose FIELD is `field`, or PARAM_NONE; the table's range check, failing
 * with STATUS_REQUEST and `param` = where; and the default as a number. */
enum param_id param_find_field(const char *field);
enum status param_check_number(enum param_id id, double value, const char *where);
enum status param_check_count(enum param_id id, int64_t value, const char *where);
bool param_is_count(enum param_id id);

/* Plain 64-bit FNV-1a over the argument and all values, for the check that ranks were started alike. Options that
 * may differ between ranks (log, files of rank 0) are left out. */
uint64_t params_digest(const struct params *p);

/* "3 GiB", "512", "1k", "2K": false when it is no such number or overflows. */
bool param_parse_count(const char *text, int64_t *out);

#endif
