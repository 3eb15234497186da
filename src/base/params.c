/* params.c: see params.h and params.def.
 *
 * All four origins end in param_set, which parses one text by the row's kind and checks the row's
 * range:
 *
 *   default text ─► file (values rendered to text) ─► environment ─► command line (argp)
 *
 * in this order, so that the later wins. argp finds options and prints --help; it is kept from
 * printing errors or exiting by itself, because under mpirun every rank parses and only rank 0 may
 * speak.
 */
#include "base/params.h"

#include <argp.h>
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"

enum kind { KIND_TEXT, KIND_LIST, KIND_CHOICE, KIND_COUNT, KIND_MAYBE, KIND_REAL, KIND_SWITCH };
enum group {
    GROUP_COMMAND = 1,
    GROUP_MODEL,
    GROUP_THINK,
    GROUP_ANSWER,
    GROUP_LIMITS,
    GROUP_OUTPUT
};

static const char *const group_titles[] = {
    [GROUP_COMMAND] = "This command:",
    [GROUP_MODEL] = "Model and machine:",
    [GROUP_THINK] = "Thinking:",
    [GROUP_ANSWER] = "Answer:",
    [GROUP_LIMITS] = "Limits (numbers take k, m, g = powers of 1000 and K, M, G = powers of 1024):",
    [GROUP_OUTPUT] = "Options and output:",
};

struct row {
    enum kind kind;
    size_t offset;
    const char *name;
    int letter;
    const char *flag, *preset, *range;
    int commands;
    enum group group;
    const char *argument, *field, *help;
};

#define GENERATE PARAMS_GENERATE
#define SCORE PARAMS_SCORE
#define TOKENIZE PARAMS_TOKENIZE
#define INSPECT PARAMS_INSPECT
#define BENCH PARAMS_BENCH
#define SERVE PARAMS_SERVE
#define ENGINE PARAMS_ENGINE
#define ALL PARAMS_ALL
#define SELFTEST PARAMS_SELFTEST
#ifdef SFUMATO_WITH_CUDA
#define CUDA ""
#else
#define CUDA "!"
#endif
#ifdef SFUMATO_WITH_NCCL
#define NCCL ""
#else
#define NCCL "!"
#endif
#ifdef SFUMATO_WITH_TLS
#define TLS NULL
#else
#define TLS "!"
#endif
static const struct row rows[PARAM_COUNT] = {
#define X(kind, name, letter, flag, preset, range, commands, group, argument, field, help) \
    {KIND_##kind,   offsetof(struct params, name),                                         \
     #name,         letter,                                                                \
     flag,          preset,                                                                \
     range,         commands,                                                              \
     GROUP_##group, argument,                                                              \
     field,         help},
#include "base/params.def"
#undef X
};

/* ---- ranges ---- */

struct range {
    double low, high;
    bool low_open, high_open;
};

/* "1..64", "(0,1]", "[0,1)"; the table is ours, so anything else is a bug. */
static struct range range_parse(const char *text) {
    struct range r = {-INFINITY, INFINITY, false, false};
    char *end;
    if (!text) return r;
    const bool bracket = *text == '(' || *text == '[';
    r.low_open = *text == '(';
    r.low = strtod(text + bracket, &end);
    end += bracket ? strspn(end, ",") : strspn(end, ".");
    r.high = strtod(end, &end);
    r.high_open = *end == ')';
    return r;
}

static bool range_holds(const char *text, double value) {
    const struct range r = range_parse(text);
    if (isnan(value)) return false;
    return (r.low_open ? value > r.low : value >= r.low) &&
           (r.high_open ? value < r.high : value <= r.high);
}

enum status param_check_number(enum param_id id, double value, const char *where) {
    if (range_holds(rows[id].range, value)) return STATUS_OK;
    return fail_param(STATUS_REQUEST, where, NULL, "%s is %.9g: it must be in %s", where, value,
                      rows[id].range);
}

enum status param_check_count(enum param_id id, int64_t value, const char *where) {
    if (range_holds(rows[id].range, (double)value)) return STATUS_OK;
    return fail_param(STATUS_REQUEST, where, NULL, "%s is %lld: it must be in %s", where,
                      (long long)value, rows[id].range);
}

bool param_is_count(enum param_id id) {
    return rows[id].kind == KIND_COUNT || rows[id].kind == KIND_MAYBE;
}

enum param_id param_find_field(const char *field) {
    for (int i = 0; i < PARAM_COUNT; i++) {
        if (rows[i].field && strcmp(rows[i].field, field) == 0) return (enum param_id)i;
    }
    return PARAM_NONE;
}

/* ---- one value ---- */

bool param_parse_count(const char *text, int64_t *out) {
    static const struct {
        char letter;
        int64_t factor;
    } suffixes[] = {{'k', 1000}, {'m', 1000000},     {'g', 1000000000},
                    {'K', 1024}, {'M', 1024 * 1024}, {'G', 1024 * 1024 * 1024}};
    char *end;
    errno = 0;
    const long long number = strtoll(text, &end, 10);
    if (end == text || errno || isspace((unsigned char)*text)) return false;
    int64_t factor = 1;
    for (size_t i = 0; *end && i < sizeof suffixes / sizeof *suffixes; i++) {
        if (suffixes[i].letter != *end) continue;
        factor = suffixes[i].factor;
        end++;
        if (isupper((unsigned char)suffixes[i].letter) && strcmp(end, "iB") == 0) end += 2;
        break;
    }
    return *end == '\0' && !__builtin_mul_overflow((int64_t)number, factor, out);
}

static bool parse_switch(const char *text, bool *out) {
    static const char *const words[] = {"false", "true", "off", "on", "0", "1", "no", "yes"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (strcmp(words[i], text) != 0) continue;
        *out = i % 2;
        return true;
    }
    return false;
}

/* Index of a word in "a|b|!c", or -1; *lacking: it is known but this binary has no such thing. */
static int choice_find(const char *list, const char *word, bool *lacking) {
    int index = 0;
    for (const char *p = list; p; index++) {
        const char *bar = strchr(p, '|');
        *lacking = *p == '!';
        p += *lacking;
        const size_t n = bar ? (size_t)(bar - p) : strlen(p);
        if (strlen(word) == n && strncmp(p, word, n) == 0) return index;
        p = bar ? bar + 1 : NULL;
    }
    return -1;
}

static void choice_text(const char *list, char *out, size_t capacity) {
    size_t n = 0;
    bool lacking = false;
    for (const char *p = list; n + 3 < capacity; p++) {
        if (*p == '!') {
            lacking = true; /* words that this binary lacks are not offered */
        } else if (*p == '|' || *p == '\0') {
            if (!*p) break;
            lacking = false;
            if (p[1] != '!') {
                out[n++] = ',';
                out[n++] = ' ';
            }
        } else if (!lacking) {
            out[n++] = *p;
        }
    }
    out[n] = '\0';
}

static enum status set_choice(struct params *p, enum param_id id, const char *text,
                              const char *where) {
    bool lacking;
    const int index = choice_find(rows[id].range, text, &lacking);
    char known[128];
    choice_text(rows[id].range, known, sizeof known);
    if (index < 0) return fail(STATUS_USAGE, "%s %s: it must be one of %s", where, text, known);
    if (lacking) {
        return fail(STATUS_USAGE, "%s %s: not built into this binary, which has %s", where, text,
                    known);
    }
    *(int *)((char *)p + rows[id].offset) = index;
    return STATUS_OK;
}

static enum status set_number(struct params *p, enum param_id id, const char *text,
                              const char *where) {
    const struct row *row = &rows[id];
    void *member = (char *)p + row->offset;
    int64_t count = 0;
    double real = 0;
    bool parsed = false, flag;
    if (row->kind == KIND_REAL) {
        char *end;
        real = strtod(text, &end);
        parsed = end != text && *end == '\0' && isfinite(real);
    } else if (row->kind == KIND_MAYBE && parse_switch(text, &flag) &&
               !isdigit((unsigned char)*text)) {
        *(int64_t *)member = flag ? (int64_t)range_parse(row->range).high : 0;
        return STATUS_OK;
    } else {
        parsed = param_parse_count(text, &count);
        if (!parsed && !row->range && isdigit((unsigned char)*text)) { /* a seed: any 64 bits */
            char *end;
            errno = 0;
            count = (int64_t)strtoull(text, &end, 10);
            parsed = errno == 0 && *end == '\0';
        }
        real = (double)count;
    }
    if (!parsed) {
        return fail(STATUS_USAGE, "%s %s: it must be a number%s%s", where, text,
                    row->range ? " in " : "", row->range ? row->range : "");
    }
    if (!range_holds(row->range, real)) {
        return fail(STATUS_USAGE, "%s %s: it must be in %s", where, text, row->range);
    }
    if (row->kind == KIND_REAL) {
        *(double *)member = real;
    } else {
        *(int64_t *)member = count;
    }
    return STATUS_OK;
}

/* A flag given again adds to the list; a stronger origin replaces it. */
static enum status set_list(struct params *p, enum param_id id, const char *text,
                            enum param_origin origin) {
    const char **member = (const char **)((char *)p + rows[id].offset);
    if (*member && origin == PARAM_COMMAND_LINE && p->origin[id] == PARAM_COMMAND_LINE) {
        const size_t before = strlen(*member), n = before + strlen(text) + 2;
        char *both = arena_alloc_array(&p->memory, n, 1);
        if (!both) return STATUS_MEMORY;
        snprintf(both, n, "%s,%s", *member, text);
        text = both;
    }
    *member = text;
    p->origin[id] = (unsigned char)origin;
    return STATUS_OK;
}

enum status param_set(struct params *p, enum param_id id, const char *text,
                      enum param_origin origin, const char *where) {
    const struct row *row = &rows[id];
    void *member = (char *)p + row->offset;
    if (row->range && strcmp(row->range, "!") == 0) {
        return fail(STATUS_USAGE, "%s: not built into this binary", where);
    }
    switch (row->kind) {
        case KIND_TEXT:
            *(const char **)member = text;
            break;
        case KIND_LIST:
            return set_list(p, id, text, origin);
        case KIND_CHOICE:
            TRY(set_choice(p, id, text, where));
            break;
        case KIND_SWITCH:
            if (!parse_switch(text, (bool *)member)) {
                return fail(STATUS_USAGE, "%s %s: it must be true or false", where, text);
            }
            break;
        case KIND_COUNT:
        case KIND_MAYBE:
        case KIND_REAL:
            TRY(set_number(p, id, text, where));
            break;
    }
    p->origin[id] = (unsigned char)origin;
    return STATUS_OK;
}

/* ---- the four origins ---- */

static enum status set_defaults(struct params *p) {
    for (int i = 0; i < PARAM_COUNT; i++) {
        if (rows[i].preset)
            TRY(param_set(p, (enum param_id)i, rows[i].preset, PARAM_DEFAULT, "default"));
    }
    return STATUS_OK;
}

static enum status set_from_file(struct params *p, const char *path) {
    json_t *root = NULL;
    enum status status = json_load_path(path, STATUS_USAGE, &root);
    if (status != STATUS_OK) return status;
    const char *key;
    json_t *value;
    if (!json_is_object(root)) {
        status = fail(STATUS_USAGE, "--config %s: it must hold one JSON object", path);
        goto out;
    }
    json_object_foreach(root, key, value) {
        char where[512], number[64];
        int id = 0;
        while (id < PARAM_COUNT && strcmp(rows[id].name, key) != 0) id++;
        snprintf(where, sizeof where, "--config %s: %s", path, key);
        if (id == PARAM_COUNT || id == PARAM_config || id == PARAM_help) {
            status = fail(STATUS_USAGE, "%s is not an option: see --help, with _ for -", where);
            goto out;
        }
        const char *text = number;
        if (json_is_null(value)) continue;
        if (json_is_string(value)) {
            text = json_string_value(value);
        } else if (json_is_integer(value)) {
            snprintf(number, sizeof number, "%lld", (long long)json_integer_value(value));
        } else if (json_is_real(value)) {
            snprintf(number, sizeof number, "%.17g", json_real_value(value));
        } else if (json_is_boolean(value)) {
            snprintf(number, sizeof number, "%s", json_is_true(value) ? "true" : "false");
        } else {
            status = fail(STATUS_USAGE, "%s must be a string, a number or true/false", where);
            goto out;
        }
        const char *copy = arena_strndup(&p->memory, text, strlen(text));
        if (!copy) {
            status = STATUS_MEMORY;
            goto out;
        }
        TRY_GOTO(param_set(p, (enum param_id)id, copy, PARAM_FILE, where), out);
    }
out:
    json_decref(root);
    return status;
}

static enum status set_from_environment(struct params *p, enum params_command command) {
    for (int i = 0; i < PARAM_COUNT; i++) {
        char variable[64] = "SFUMATO_";
        size_t n = strlen(variable);
        for (const char *c = rows[i].name; *c; c++)
            variable[n++] = (char)toupper((unsigned char)*c);
        variable[n] = '\0';
        const char *text = (rows[i].commands & command) ? getenv(variable) : NULL;
        if (!text || i == PARAM_help) continue;
        TRY(param_set(p, (enum param_id)i, text, PARAM_ENVIRONMENT, variable));
    }
    return STATUS_OK;
}

struct argp_input {
    struct params *params; /* NULL in the first pass, which looks for --config only */
    const char *config;
    enum status status;
    int next; /* index of the argument after the last good one: where an unknown option stands */
};

enum { KEY_BASE = 1000 };

static error_t on_option(int key, char *argument, struct argp_state *state) {
    struct argp_input *input = state->input;
    if (key == ARGP_KEY_ARG) {
        input->next = state->next;
        if (!input->params) return 0;
        if (input->params->positional) {
            input->status =
                fail(STATUS_USAGE, "%s: unexpected argument; options start with --", argument);
            return EINVAL;
        }
        input->params->positional = argument;
        return 0;
    }
    int id = 0;
    while (id < PARAM_COUNT && key != KEY_BASE + id && (!rows[id].letter || key != rows[id].letter))
        id++;
    if (id == PARAM_COUNT) return ARGP_ERR_UNKNOWN; /* also argp's own keys: start, end, error */
    input->next = state->next;
    if (id == PARAM_config) input->config = argument;
    if (!input->params) return 0;
    char where[64];
    snprintf(where, sizeof where, "--%s", rows[id].flag);
    input->status = param_set(input->params, (enum param_id)id, argument ? argument : "true",
                              PARAM_COMMAND_LINE, where);
    return input->status == STATUS_OK ? 0 : EINVAL;
}

/* argp's own table for one command: [PARAM_COUNT + group titles + end]. */
enum { ARGP_ROWS = PARAM_COUNT + 8 };
static void argp_rows(enum params_command command, struct argp_option out[ARGP_ROWS],
                      char help[PARAM_COUNT][320]) {
    int n = 0;
    for (int g = GROUP_COMMAND; g <= GROUP_OUTPUT; g++) {
        bool used = false; /* a title over nothing would only be puzzling */
        for (int i = 0; i < PARAM_COUNT; i++)
            used |= (int)rows[i].group == g && (rows[i].commands & command);
        if (used) out[n++] = (struct argp_option){.doc = group_titles[g], .group = g};
    }
    for (int i = 0; i < PARAM_COUNT; i++) {
        const struct row *row = &rows[i];
        if (!(row->commands & command)) continue;
        char extra[160] = "", words[128];
        if (row->kind == KIND_CHOICE) {
            choice_text(row->range, words, sizeof words);
            snprintf(extra, sizeof extra, " [%s; default %s]", words, row->preset);
        } else if (row->range && strcmp(row->range, "!") == 0) {
            snprintf(extra, sizeof extra, " [not built into this binary]");
        } else if (row->preset) {
            snprintf(extra, sizeof extra, " [default %s]", row->preset);
        }
        snprintf(help[i], sizeof help[i], "%s%s", row->help, extra);
        out[n++] = (struct argp_option){
            .name = row->flag,
            .key = row->letter ? row->letter : KEY_BASE + i,
            .arg = row->argument,
            .flags = row->kind == KIND_MAYBE ? OPTION_ARG_OPTIONAL : 0,
            .doc = help[i],
            .group = (int)row->group,
        };
    }
    out[n] = (struct argp_option){0};
}

static enum status unknown_option(enum params_command command, const char *argument) {
    const char *name = argument + strspn(argument, "-");
    const size_t n = strcspn(name, "=");
    for (int i = 0; i < PARAM_COUNT; i++) {
        if (strlen(rows[i].flag) != n || strncmp(rows[i].flag, name, n) != 0) continue;
        if (!(rows[i].commands & command)) {
            return fail(STATUS_USAGE, "%s: not an option of this command; --help lists them",
                        argument);
        }
        return fail(STATUS_USAGE, "%s: %s", argument,
                    rows[i].kind == KIND_SWITCH ? "takes no value" : "needs a value");
    }
    return fail(STATUS_USAGE, "%s: unknown or ambiguous option; --help lists them", argument);
}

static enum status parse_command_line(struct argp_input *input, enum params_command command,
                                      int argc, char **argv) {
    struct argp_option options[ARGP_ROWS];
    char help[PARAM_COUNT][320];
    argp_rows(command, options, help);
    const struct argp argp = {.options = options, .parser = on_option};
    input->next = 1;
    const error_t error = argp_parse(
        &argp, argc, argv, ARGP_NO_ERRS | ARGP_NO_EXIT | ARGP_NO_HELP | ARGP_IN_ORDER, NULL, input);
    if (!error) return STATUS_OK;
    if (input->status != STATUS_OK) return input->status;
    if (error == ENOMEM) return fail(STATUS_MEMORY, "no memory for the command line");
    return unknown_option(command, input->next < argc ? argv[input->next] : "?");
}

enum status params_parse(struct params *p, enum params_command command, int argc, char **argv) {
    *p = (struct params){0};
    arena_init(&p->memory, 1 << 20);
    TRY(set_defaults(p));
    struct argp_input first = {0}, second = {.params = p};
    TRY(parse_command_line(&first, command, argc, argv));
    const char *config = first.config ? first.config : getenv("SFUMATO_CONFIG");
    if (config) TRY(set_from_file(p, config));
    TRY(set_from_environment(p, command));
    return parse_command_line(&second, command, argc, argv);
}

void params_fini(struct params *p) { arena_fini(&p->memory); }

void params_help(enum params_command command, const char *program, const char *usage,
                 const char *about, FILE *out) {
    struct argp_option options[ARGP_ROWS];
    char help[PARAM_COUNT][320], name[64];
    argp_rows(command, options, help);
    const struct argp argp = {
        .options = options, .parser = on_option, .args_doc = usage, .doc = about};
    snprintf(name, sizeof name, "%s", program);
    argp_help(&argp, out, ARGP_HELP_SHORT_USAGE | ARGP_HELP_LONG | ARGP_HELP_DOC, name);
}

/* ---- questions ---- */

bool param_given(const struct params *p, enum param_id id) {
    return p->origin[id] != PARAM_DEFAULT;
}

const char *param_flag(enum param_id id) { return rows[id].flag; }

const char *param_word(const struct params *p, enum param_id id) {
    static _Thread_local char word[32];
    ASSERT(rows[id].kind == KIND_CHOICE);
    const char *text = rows[id].range;
    for (int i = *(const int *)((const char *)p + rows[id].offset); i > 0; i--) {
        text = strchr(text, '|') + 1;
    }
    text += *text == '!';
    snprintf(word, sizeof word, "%.*s", (int)strcspn(text, "|"), text);
    return word;
}

static uint64_t fnv(uint64_t h, const void *bytes, size_t n) {
    for (const unsigned char *b = bytes; n > 0; n--, b++) h = (h ^ *b) * 0x100000001b3u;
    return h;
}

uint64_t params_digest(const struct params *p) {
    uint64_t h = 0xcbf29ce484222325u;
    if (p->positional) h = fnv(h, p->positional, strlen(p->positional));
    for (int i = 0; i < PARAM_COUNT; i++) {
        if (rows[i].group == GROUP_OUTPUT || rows[i].group == GROUP_COMMAND || i == PARAM_threads)
            continue;
        const void *member = (const char *)p + rows[i].offset;
        switch (rows[i].kind) {
            case KIND_TEXT:
            case KIND_LIST: {
                const char *text = *(const char *const *)member;
                if (text) h = fnv(h, text, strlen(text));
                break;
            }
            case KIND_CHOICE:
                h = fnv(h, member, sizeof(int));
                break;
            case KIND_SWITCH:
                h = fnv(h, member, sizeof(bool));
                break;
            case KIND_COUNT:
            case KIND_MAYBE:
            case KIND_REAL:
                h = fnv(h, member, 8);
                break;
        }
        h = fnv(h, &i, sizeof i);
    }
    return h;
}
