/* regex.c: see regex.h. */
#include "text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "text/regex_unicode.h"
#include "text/utf8.h"

enum {
    PATTERN_BYTES_MAX = 1 << 16,
    STEP_LIMIT = 1000 * 1000, /* at one start, beside some steps for each byte of the text */
    STEPS_PER_BYTE = 8,
    /* The time is looked at after so many starts, and before a start goes on beyond so many steps. */
    STARTS_PER_CALL = 16, /* a power of two */
    STEPS_PER_CALL = 4096,
    SLOW_NS = 10 * 1000 * 1000, /* a call that takes this long: one start a call for a while */
    BUDGET_NS = 2000 * 1000 * 1000,
    BUDGET_NS_PER_BYTE = 2000,
    HEAP_LIMIT_KIB = 64 * 1024,
    JIT_STACK_MIN = 64 * 1024,
    JIT_STACK_MAX = 1024 * 1024,
};

struct regex {
    pcre2_code *code;
};

struct regex_match {
    pcre2_match_data *data;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
    struct regex_budget *budget;
    size_t starts; /* bytes of the text that the next call tries */
};

/* --- Oniguruma -> PCRE2 ---------------------------------------------------------------------- */

/* White_Space and its complement, to stand inside a class. PCRE2's own \s has U+180E, which Unicode
 * took out of White_Space. */
static const char SPACE[] =
    "\\x09-\\x0d\\x20\\x85\\xa0\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{"
    "3000}";
static const char NOT_SPACE[] =
    "\\x00-\\x08\\x0e-\\x1f\\x21-\\x84\\x86-\\x9f\\xa1-\\x{167f}\\x{1681}-\\x{1fff}\\x{200b}-\\x{"
    "2027}"
    "\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}";
/* Oniguruma counts the superscripts and fractions of Latin-1 as word characters. */
static const char WORD[] = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\xb2\\xb3\\xb9\\xbc-\\xbe";
static const char HEX[] = "0-9a-fA-F";

struct translation {
    const char *in;
    size_t n, at;
    struct text_buffer out;
    bool in_class;
    bool branch_begins; /* nothing stands before this in its alternative */
};

static enum status refuse(const char *what) {
    return fail(STATUS_MODEL, "tokenizer: a pattern uses %s, which is not supported", what);
}

static enum status add(struct translation *t, const char *text) {
    return text_add(&t->out, text, strlen(text));
}

/* Does PCRE2 know this property name? */
static bool property_exists(const char *name) {
    char pattern[80];
    snprintf(pattern, sizeof pattern, "\\p{%s}", name);
    int error;
    PCRE2_SIZE offset;
    pcre2_code *code =
        pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF, &error, &offset, NULL);
    pcre2_code_free(code);
    return code != NULL;
}

/* New characters of a property: of all general categories that its name is a beginning of ("L" ->
 * "Lu", ...). */
static enum status add_new_characters(struct translation *t, const char *name) {
    static const struct {
        const char *name, *ranges;
    } rows[] = {
#define X(category, ranges) {#category, ranges},
        REGEX_NEW_CHARACTERS(X)
#undef X
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (strncmp(rows[i].name, name, strlen(name)) == 0) TRY(add(t, rows[i].ranges));
    return STATUS_OK;
}

/* \p{...} and \P{...}: a script name means the script itself to Oniguruma, but the larger set of
 * script extensions to PCRE2 unless one writes sc:. */
static enum status translate_property(struct translation *t, char letter) {
    const char *rest = t->in + t->at;
    const size_t left = t->n - t->at;
    if (left < 3 || rest[0] != '{') return refuse("\\p without {name}");
    const char *close = memchr(rest, '}', left);
    if (close == NULL || close - rest > 40) return refuse("an unclosed \\p{");
    const char *name = rest + 1;
    bool negated = letter == 'P';
    if (*name == '^') {
        negated = !negated;
        name++;
    }
    char plain[48], script[sizeof plain + 3];
    snprintf(plain, sizeof plain, "%.*s", (int)(close - name), name);
    snprintf(script, sizeof script, "sc:%s", plain);
    for (const char *c = plain; *c != '\0'; c++)
        if ((uint8_t)*c < 0x20 || (uint8_t)*c > 0x7E || *c == '\\')
            return refuse("a strange \\p{name}");
    const bool is_script = strlen(plain) > 2 && property_exists(script);
    const bool is_category = strlen(plain) <= 2 && property_exists(plain);
    if (!is_script && !is_category) {
        /* Alphabetic, Emoji and the like differ between the two in many characters. */
        char what[80];
        snprintf(what, sizeof what, "the property \\p{%s}", plain);
        return refuse(what);
    }
    t->at += (size_t)(close - rest) + 1;
    const char *known = is_script ? script : plain;
    if (t->in_class && negated) {
        /* No way to take the new characters out again; they count as not having the property. */
        TRY(add(t, "\\P{"));
        TRY(add(t, known));
        return add(t, "}");
    }
    if (!t->in_class) TRY(add(t, negated ? "[^" : "["));
    TRY(add(t, "\\p{"));
    TRY(add(t, known));
    TRY(add(t, "}"));
    TRY(add_new_characters(t, plain));
    return t->in_class ? STATUS_OK : add(t, "]");
}

/* A set for \s, \w or \h, bare inside a class, bracketed outside. */
static enum status add_set(struct translation *t, const char *set, bool negated) {
    if (!t->in_class) TRY(add(t, negated ? "[^" : "["));
    TRY(add(t, set));
    if (set == WORD) {
        TRY(add_new_characters(t, "L"));
        TRY(add_new_characters(t, "M"));
        TRY(add_new_characters(t, "Nd"));
    }
    return t->in_class ? STATUS_OK : add(t, "]");
}

/* \uHHHH, \x{H...} and \xHH. The last is a byte to Oniguruma, so only ASCII is a character in both.
 */
static enum status translate_number(struct translation *t, char letter) {
    const bool braces = letter == 'x' && t->at < t->n && t->in[t->at] == '{';
    if (braces) t->at++;
    const size_t most = letter == 'u' ? 4 : braces ? 6 : 2;
    uint32_t code = 0;
    size_t digits = 0;
    for (; digits < most && t->at < t->n; digits++, t->at++) {
        const char c = t->in[t->at];
        if (c >= '0' && c <= '9')
            code = code * 16 + (uint32_t)(c - '0');
        else if ((c | 0x20) >= 'a' && (c | 0x20) <= 'f')
            code = code * 16 + (uint32_t)((c | 0x20) - 'a' + 10);
        else
            break;
    }
    if (digits == 0 || (letter == 'u' && digits < 4)) return refuse("a number without digits");
    if (braces && (t->at == t->n || t->in[t->at++] != '}')) return refuse("an unclosed \\x{");
    if (letter == 'x' && !braces && code >= 0x80) return refuse("\\x80 and above, which are bytes");
    char text[16];
    snprintf(text, sizeof text, "\\x{%x}", code);
    return add(t, text);
}

static enum status translate_escape(struct translation *t) {
    if (t->at == t->n) return refuse("a trailing backslash");
    const char c = t->in[t->at++];
    switch (c) {
        case 's':
            return add_set(t, SPACE, false);
        case 'S':
            return t->in_class ? add(t, NOT_SPACE) : add_set(t, SPACE, true);
        case 'w':
            return add_set(t, WORD, false);
        case 'W':
            if (t->in_class) return refuse("\\W inside a class");
            return add_set(t, WORD, true);
        case 'h':
            return add_set(t, HEX, false);
        case 'H':
            if (t->in_class) return refuse("\\H inside a class");
            return add_set(t, HEX, true);
        case 'p':
        case 'P':
            return translate_property(t, c);
        case 'b':
        case 'B':
            if (t->in_class && c == 'b') break;
            return refuse("\\b");
        case 'd':
        case 'D': {
            struct translation digit = {
                .in = "{Nd}", .n = 4, .out = t->out, .in_class = t->in_class};
            const enum status status = translate_property(&digit, c == 'd' ? 'p' : 'P');
            t->out = digit.out;
            return status;
        }
        case 'A':
        case 'z':
        case 'Z':
        case 'n':
        case 'r':
        case 't':
        case 'f': {
            const char text[3] = {'\\', c, '\0'};
            return add(t, text);
        }
        case 'v': /* a vertical tab to Oniguruma, a set of them to PCRE2 */
            return add(t, "\\x0b");
        case 'x':
        case 'u':
            return translate_number(t, c);
        default:
            break;
    }
    if (((uint8_t)c >= '0' && (uint8_t)c <= '9') ||
        ((uint8_t)(c | 0x20) >= 'a' && (uint8_t)(c | 0x20) <= 'z')) {
        char what[16];
        snprintf(what, sizeof what, "\\%c", c);
        return refuse(what);
    }
    TRY(add(t, "\\"));
    return text_add(&t->out, &c, 1);
}

static enum status translate_class(struct translation *t) {
    TRY(add(t, "["));
    if (t->at < t->n && t->in[t->at] == '^') {
        TRY(add(t, "^"));
        t->at++;
    }
    t->in_class = true;
    for (bool first = true;; first = false) {
        if (t->at == t->n) return refuse("an unclosed [");
        const char c = t->in[t->at++];
        if (c == ']' && !first) break;
        if (c == '[' || c == ']') return refuse("a class inside a class");
        if (c == '&' && t->at < t->n && t->in[t->at] == '&')
            return refuse("an intersection of classes");
        if (c == '\\')
            TRY(translate_escape(t));
        else
            TRY(text_add(&t->out, &c, 1));
    }
    t->in_class = false;
    return add(t, "]");
}

/* {n,m}: a "+" behind it repeats it for Oniguruma and makes it possessive for PCRE2, a "?" behind {n}
 * makes it optional for Oniguruma and nothing for PCRE2; {,m} is {0,m}. */
static enum status translate_interval(struct translation *t) {
    const char *rest = t->in + t->at;
    size_t i = 0;
    while (t->at + i < t->n && ((rest[i] >= '0' && rest[i] <= '9') || rest[i] == ',')) i++;
    if (i == 0 || t->at + i == t->n || rest[i] != '}' || (i == 1 && rest[0] == ','))
        return refuse("a { that is no repeat count");
    if (t->at + i + 1 < t->n && rest[i + 1] == '+') return refuse("a + behind {n,m}");
    if (t->at + i + 1 < t->n && rest[i + 1] == '?' && memchr(rest, ',', i) == NULL)
        return refuse("a ? behind {n}");
    TRY(add(t, rest[0] == ',' ? "{0" : "{"));
    TRY(text_add(&t->out, rest, i + 1));
    t->at += i + 1;
    return STATUS_OK;
}

/* Behind a "(": ?: ?= ?! ?<= ?<! ?> ?i: are the same in both. (?i) reaches to the end of the group in
 * both, but Oniguruma makes a group of what it reaches: a(?i)b|c is a(?i:b|c). Without an a, that is no
 * difference. */
static enum status translate_group(struct translation *t) {
    const char *rest = t->in + t->at;
    const size_t left = t->n - t->at;
    size_t n = 0; /* bytes of the mark */
    if (left == 0 || rest[0] == '*') return refuse("(*");
    if (rest[0] == '?') {
        if (left >= 2 && strchr(":=!>", rest[1]) != NULL && rest[1] != '\0')
            n = 2;
        else if (left >= 3 && rest[1] == '<' && (rest[2] == '=' || rest[2] == '!'))
            n = 3;
        else if (left >= 3 && rest[1] == 'i' && (rest[2] == ':' || rest[2] == ')'))
            n = 3;
        else
            return refuse("a group of a kind other than (?: (?= (?! (?<= (?<! (?> (?i:");
        if (rest[n - 1] == ')' && !t->branch_begins) return refuse("(?i) behind something");
    }
    t->branch_begins = true;
    t->at += n;
    TRY(add(t, "("));
    return text_add(&t->out, rest, n);
}

static enum status translate(struct translation *t) {
    t->branch_begins = true;
    while (t->at < t->n) {
        const char c = t->in[t->at++];
        if (c == '(') {
            TRY(translate_group(t));
            continue;
        }
        t->branch_begins = c == '|';
        switch (c) {
            case '\\':
                TRY(translate_escape(t));
                break;
            case '[':
                TRY(translate_class(t));
                break;
            case '{':
                TRY(translate_interval(t));
                break;
            default:
                TRY(text_add(&t->out, &c, 1));
        }
    }
    return STATUS_OK;
}

/* --- compile and match ----------------------------------------------------------------------- */

enum status regex_new(const char *pattern, size_t n, bool literal, regex **out) {
    *out = NULL;
    enum status status = STATUS_OK;
    struct translation t = {.in = pattern, .n = n};
    regex *r = NULL;
    if (n > PATTERN_BYTES_MAX) return refuse("more than 65536 bytes");
    if (utf8_valid_bytes(pattern, n) != n) return refuse("bytes that are not UTF-8");
    if (literal)
        TRY_GOTO(text_add(&t.out, pattern, n), out);
    else
        TRY_GOTO(translate(&t), out);
    r = calloc(1, sizeof *r);
    if (r == NULL) {
        status = fail(STATUS_MEMORY, "no memory for a tokenizer pattern");
        goto out;
    }
    int error;
    PCRE2_SIZE offset;
    const uint32_t options =
        PCRE2_UTF | PCRE2_USE_OFFSET_LIMIT |
        (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C);
    r->code = pcre2_compile((PCRE2_SPTR)(t.out.n == 0 ? "" : t.out.bytes), t.out.n, options, &error,
                            &offset, NULL);
    if (r->code == NULL) {
        PCRE2_UCHAR why[120];
        pcre2_get_error_message(error, why, sizeof why);
        status = fail(STATUS_MODEL, "tokenizer: the pattern \"%.*s\" does not compile: %s",
                      (int)(n < 200 ? n : 200), pattern, (const char *)why);
        goto out;
    }
    pcre2_jit_compile(r->code, PCRE2_JIT_COMPLETE); /* refused: the interpreter does it, slower */
    *out = r;
    r = NULL;
out:
    regex_free(r);
    free(t.out.bytes);
    return status;
}

void regex_free(regex *r) {
    if (r == NULL) return;
    pcre2_code_free(r->code);
    free(r);
}

static int64_t read_clock(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

void regex_budget_init(struct regex_budget *b, size_t text_n) {
    b->left_ns = BUDGET_NS + BUDGET_NS_PER_BYTE * (int64_t)text_n;
    b->cpu_end_ns = read_clock(CLOCK_THREAD_CPUTIME_ID) + b->left_ns;
}

static enum status spend(struct regex_budget *b, int64_t ns) {
    b->left_ns -= ns;
    if (b->left_ns > 0) return STATUS_OK;
    b->left_ns = b->cpu_end_ns - read_clock(CLOCK_THREAD_CPUTIME_ID);
    if (b->left_ns > 0) return STATUS_OK;
    return fail(STATUS_REQUEST, "the tokenizer's pattern takes too long on this text");
}

enum status regex_match_new(const regex *r, struct regex_budget *budget, regex_match **out) {
    *out = NULL;
    regex_match *m = calloc(1, sizeof *m);
    if (m == NULL) return fail(STATUS_MEMORY, "no memory to tokenize");
    m->data = pcre2_match_data_create_from_pattern(r->code, NULL);
    m->context = pcre2_match_context_create(NULL);
    if (m->data == NULL || m->context == NULL) {
        regex_match_free(m);
        return fail(STATUS_MEMORY, "no memory to tokenize");
    }
    pcre2_set_heap_limit(m->context, HEAP_LIMIT_KIB);
    m->budget = budget;
    m->starts = 1;
    *out = m;
    return STATUS_OK;
}

void regex_match_free(regex_match *m) {
    if (m == NULL) return;
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->context);
    pcre2_jit_stack_free(m->stack);
    free(m);
}

/* Compiled code starts on 32 KB of our own stack, which is nearly always enough; it gets a larger
 * one when it asks, and the interpreter takes over when that is too small as well. */
static int match_once(const regex *r, regex_match *m, const char *text, size_t n, size_t from) {
    int rc =
        pcre2_match(r->code, (PCRE2_SPTR)text, n, from, PCRE2_NO_UTF_CHECK, m->data, m->context);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT && m->stack == NULL) {
        m->stack = pcre2_jit_stack_create(JIT_STACK_MIN, JIT_STACK_MAX, NULL);
        if (m->stack != NULL) pcre2_jit_stack_assign(m->context, NULL, m->stack);
        rc = pcre2_match(r->code, (PCRE2_SPTR)text, n, from, PCRE2_NO_UTF_CHECK, m->data,
                         m->context);
    }
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(r->code, (PCRE2_SPTR)text, n, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                         m->data, m->context);
    return rc;
}

enum status regex_next(const regex *r, regex_match *m, const char *text, size_t n, size_t from,
                       size_t last_end, bool *found, size_t *begin, size_t *end) {
    *found = false;
    /* long white space honestly takes a step or two a byte */
    const uint32_t most_steps = (uint32_t)(STEP_LIMIT + STEPS_PER_BYTE * n);
    uint32_t steps = STEPS_PER_CALL;
    while (from <= n) {
        const bool last = n - from < m->starts;
        const size_t last_start = last ? n : from + m->starts - 1;
        pcre2_set_match_limit(m->context, steps);
        pcre2_set_offset_limit(m->context, last_start);
        /* a clock of milliseconds: cheap, and its ticks fall into short calls as often as they should */
        const int64_t begin_ns = read_clock(CLOCK_MONOTONIC_COARSE);
        const int rc = match_once(r, m, text, n, from);
        const int64_t taken_ns = read_clock(CLOCK_MONOTONIC_COARSE) - begin_ns;
        TRY(spend(m->budget, taken_ns));
        if (m->starts < STARTS_PER_CALL) m->starts *= 2;
        if (taken_ns >= SLOW_NS) m->starts = 1;
        if (rc == PCRE2_ERROR_MATCHLIMIT && steps < most_steps) {
            steps = most_steps / 8 < steps ? most_steps : 8 * steps;
            continue;
        }
        if (rc == PCRE2_ERROR_NOMATCH) {
            if (last) return STATUS_OK;
            from = last_start + 1;
            while (from < n && ((uint8_t)text[from] & 0xC0) == 0x80) from++;
            steps = STEPS_PER_CALL;
            continue;
        }
        if (rc < 0) {
            PCRE2_UCHAR why[120];
            pcre2_get_error_message(rc, why, sizeof why);
            return fail(STATUS_REQUEST, "the tokenizer's pattern gives up on this text: %s",
                        (const char *)why);
        }
        const PCRE2_SIZE *o = pcre2_get_ovector_pointer(m->data);
        if (o[0] == o[1] && o[1] == last_end) {
            if (o[0] >= n) return STATUS_OK;
            from = o[0] + (size_t)utf8_next(text + o[0], n - o[0]).n;
            last_end = SIZE_MAX;
            continue;
        }
        *found = true;
        *begin = o[0];
        *end = o[1];
        return STATUS_OK;
    }
    return STATUS_OK;
}
