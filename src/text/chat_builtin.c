/* chat_builtin.c: see chat_builtin.h. */
#include "text/chat_builtin.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A fullwidth bar and a low line of a kind of their own stand in DeepSeek's markers. */
#define DEEPSEEK_USER "<\xEF\xBD\x9CUser\xEF\xBD\x9C>"
#define DEEPSEEK_ASSISTANT \
    "<\xEF\xBD\x9C"        \
    "Assistant\xEF\xBD\x9C>"
#define DEEPSEEK_END \
    "<\xEF\xBD\x9C"  \
    "end\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>"

/* Stands behind the content of the message to be continued while it is rendered (as in
 * transformers): where it comes out, the prompt is cut. The space tells whether the format trimmed
 * the content. */
static const char CONTINUE_TAG[] = "CONTINUE_FINAL_MESSAGE_TAG ";

struct message {
    const char *role;
    const char *content, *reasoning; /* reasoning NULL: none given */
    size_t content_n, reasoning_n;
};

struct slice {
    const char *bytes;
    size_t n;
};

static const struct {
    enum chat_format format;
    const char *name, *marker;
} FORMATS[] = {
    {CHAT_CHATML, "chatml", "<|im_start|>"},
    {CHAT_LLAMA3, "llama3", "<|start_header_id|>"},
    {CHAT_DEEPSEEK_R1, "deepseek-r1", DEEPSEEK_USER},
};
enum { FORMAT_COUNT = sizeof FORMATS / sizeof *FORMATS };

enum chat_format chat_builtin_named(const char *name) {
    for (int i = 0; i < FORMAT_COUNT; i++)
        if (strcmp(name, FORMATS[i].name) == 0) return FORMATS[i].format;
    return CHAT_NONE;
}

const char *chat_builtin_name(enum chat_format format) {
    for (int i = 0; i < FORMAT_COUNT; i++)
        if (format == FORMATS[i].format) return FORMATS[i].name;
    return "none";
}

enum chat_format chat_builtin_recognize(const char *template_text) {
    for (int i = 0; i < FORMAT_COUNT; i++)
        if (strstr(template_text, FORMATS[i].marker) != NULL) return FORMATS[i].format;
    return CHAT_NONE;
}

/* '<|im_start|>system\nYou are ...<|im_end|>' as one literal of the template is its default system
 * prompt. The newline is a real one or the two characters "\n". */
static enum status find_default_system(const char *template_text, struct text_buffer *out) {
    static const char open[] = "<|im_start|>system", close[] = "<|im_end|>";
    for (const char *at = template_text; (at = strstr(at, open)) != NULL;) {
        at += sizeof open - 1;
        if (*at != '\n' && !(at[0] == '\\' && at[1] == 'n')) continue;
        const char *text = at + (*at == '\n' ? 1 : 2), *end = strstr(text, close);
        if (end == NULL || end == text) continue;
        const char *odd = strpbrk(text, "'\"{}\\");
        if (odd != NULL && odd < end)
            continue; /* an expression, or escapes we would have to read */
        return text_add(out, text, (size_t)(end - text));
    }
    return STATUS_OK;
}

enum status chat_style_init(struct chat_style *style, enum chat_format format,
                            const char *template_text) {
    *style = (struct chat_style){.format = format, .open_think = true};
    if (template_text == NULL) return STATUS_OK;
    style->qwen3_thinking = strstr(template_text, "last_query_index") != NULL &&
                            strstr(template_text, "reasoning_content") != NULL;
    style->date_header = strstr(template_text, "Cutting Knowledge Date") != NULL;
    style->date_is_today = strstr(template_text, "strftime_now") != NULL;
    style->open_think = strstr(template_text, DEEPSEEK_ASSISTANT "<think>") != NULL;
    return format == CHAT_CHATML ? find_default_system(template_text, &style->default_system)
                                 : STATUS_OK;
}

void chat_style_fini(struct chat_style *style) { free(style->default_system.bytes); }

/* --- text helpers ---------------------------------------------------------------------------- */

static enum status add(struct text_buffer *out, const char *text) {
    return text_add(out, text, strlen(text));
}
static enum status add_slice(struct text_buffer *out, struct slice s) {
    return text_add(out, s.bytes, s.n);
}

/* Python's str.strip(): White_Space and the four ASCII separators. */
static bool is_strip_space(uint32_t code) {
    return utf8_is_space(code) || (code >= 0x1C && code <= 0x1F);
}

static struct slice strip_right(struct slice s) {
    while (s.n > 0) {
        const size_t at = utf8_last_start(s.bytes, s.n);
        if (!is_strip_space(utf8_next(s.bytes + at, s.n - at).code)) break;
        s.n = at;
    }
    return s;
}

static struct slice strip(struct slice s) {
    while (s.n > 0) {
        const struct utf8_unit u = utf8_next(s.bytes, s.n);
        if (!is_strip_space(u.code)) break;
        s.bytes += u.n;
        s.n -= (size_t)u.n;
    }
    return strip_right(s);
}

static struct slice strip_newlines(struct slice s, bool left, bool right) {
    while (left && s.n > 0 && s.bytes[0] == '\n') {
        s.bytes++;
        s.n--;
    }
    while (right && s.n > 0 && s.bytes[s.n - 1] == '\n') s.n--;
    return s;
}

/* Where the first or the last `what` begins; s.n when nowhere. */
static size_t find_text(struct slice s, const char *what, bool last) {
    const size_t n = strlen(what);
    size_t found = s.n;
    for (size_t i = 0; i + n <= s.n; i++) {
        if (memcmp(s.bytes + i, what, n) != 0) continue;
        found = i;
        if (!last) break;
    }
    return found;
}

/* split('</think>')[-1] */
static struct slice after_think(struct slice s) {
    const size_t at = find_text(s, "</think>", true);
    if (at == s.n) return s;
    return (struct slice){s.bytes + at + 8, s.n - at - 8};
}

/* split('</think>')[0].split('<think>')[-1] */
static struct slice before_think(struct slice s) {
    s.n = find_text(s, "</think>", false);
    s = strip_newlines(s, false, true);
    const size_t at = find_text(s, "<think>", true);
    if (at == s.n) return s;
    return (struct slice){s.bytes + at + 7, s.n - at - 7};
}

/* --- the formats ----------------------------------------------------------------------------- */

static bool is_role(const struct message *m, const char *role) {
    return strcmp(m->role, role) == 0;
}

static enum status add_chatml(struct text_buffer *out, const char *role, struct slice content) {
    TRY(add(out, "<|im_start|>"));
    TRY(add(out, role));
    TRY(add(out, "\n"));
    TRY(add_slice(out, content));
    return add(out, "<|im_end|>\n");
}

/* Not a tool's answer that goes as a user message: those do not end what the model thought before. */
static bool is_question(const struct message *m) {
    static const char open[] = "<tool_response>", close[] = "</tool_response>";
    const size_t open_n = sizeof open - 1, close_n = sizeof close - 1;
    return is_role(m, "user") &&
           (m->content_n < open_n + close_n || memcmp(m->content, open, open_n) != 0 ||
            memcmp(m->content + m->content_n - close_n, close, close_n) != 0);
}

/* Qwen3 shows the thinking of assistant messages behind the last question only. */
static enum status add_qwen3_assistant(struct text_buffer *out, const struct message *m,
                                       bool behind_question, bool last) {
    struct slice content = {m->content, m->content_n}, reasoning = {"", 0};
    if (m->reasoning != NULL) {
        reasoning = (struct slice){m->reasoning, m->reasoning_n};
    } else if (find_text(content, "</think>", false) < content.n) {
        reasoning = strip_newlines(before_think(content), true, false);
        content = strip_newlines(after_think(content), true, false);
    }
    if (!behind_question || (!last && reasoning.n == 0))
        return add_chatml(out, "assistant", content);
    TRY(add(out, "<|im_start|>assistant\n<think>\n"));
    TRY(add_slice(out, strip_newlines(reasoning, true, true)));
    TRY(add(out, "\n</think>\n\n"));
    TRY(add_slice(out, strip_newlines(content, true, false)));
    return add(out, "<|im_end|>\n");
}

static enum status render_chatml(const struct chat_style *style, const struct message *m,
                                 size_t count, bool generate, const json_t *variables,
                                 struct text_buffer *out) {
    size_t question = count;
    for (size_t i = 0; i < count; i++)
        if (is_question(&m[i])) question = i;
    if (style->default_system.n > 0 && (count == 0 || !is_role(&m[0], "system")))
        TRY(add_chatml(out, "system",
                       (struct slice){style->default_system.bytes, style->default_system.n}));
    for (size_t i = 0; i < count; i++) {
        if (style->qwen3_thinking && is_role(&m[i], "assistant"))
            TRY(add_qwen3_assistant(out, &m[i], question < count && i > question, i + 1 == count));
        else
            TRY(add_chatml(out, m[i].role, (struct slice){m[i].content, m[i].content_n}));
    }
    if (!generate) return STATUS_OK;
    TRY(add(out, "<|im_start|>assistant\n"));
    if (style->qwen3_thinking && json_is_false(json_object_get(variables, "enable_thinking")))
        TRY(add(out, "<think>\n\n</think>\n\n"));
    return STATUS_OK;
}

static enum status add_llama3_header(struct text_buffer *out, const char *role) {
    TRY(add(out, "<|start_header_id|>"));
    TRY(add(out, role));
    return add(out, "<|end_header_id|>\n\n");
}

static enum status render_llama3(const struct chat_style *style, const struct message *m,
                                 size_t count, bool generate, const char *bos,
                                 struct text_buffer *out) {
    TRY(add(out, bos));
    size_t first = 0;
    if (style->date_header) {
        char date[32] = "26 Jul 2024";
        const time_t now = time(NULL);
        struct tm local;
        if (style->date_is_today && localtime_r(&now, &local) != NULL)
            strftime(date, sizeof date, "%d %b %Y", &local);
        TRY(add_llama3_header(out, "system"));
        TRY(add(out, "Cutting Knowledge Date: December 2023\nToday Date: "));
        TRY(add(out, date));
        TRY(add(out, "\n\n"));
        if (count > 0 && is_role(&m[0], "system")) {
            TRY(add_slice(out, strip((struct slice){m[0].content, m[0].content_n})));
            first = 1;
        }
        TRY(add(out, "<|eot_id|>"));
    }
    for (size_t i = first; i < count; i++) {
        TRY(add_llama3_header(out, m[i].role));
        TRY(add_slice(out, strip((struct slice){m[i].content, m[i].content_n})));
        TRY(add(out, "<|eot_id|>"));
    }
    return generate ? add_llama3_header(out, "assistant") : STATUS_OK;
}

static enum status render_deepseek(const struct chat_style *style, const struct message *m,
                                   size_t count, bool generate, const char *bos,
                                   struct text_buffer *out) {
    TRY(add(out, bos));
    for (size_t i = count; i-- > 0;) {
        if (!is_role(&m[i], "system")) continue;
        TRY(text_add(out, m[i].content, m[i].content_n)); /* the last one stands for all */
        break;
    }
    for (size_t i = 0; i < count; i++) {
        const struct slice content = {m[i].content, m[i].content_n};
        if (is_role(&m[i], "user")) {
            TRY(add(out, DEEPSEEK_USER));
            TRY(add_slice(out, content));
        } else if (is_role(&m[i], "assistant")) {
            TRY(add(out, DEEPSEEK_ASSISTANT));
            TRY(add_slice(out, after_think(content)));
            TRY(add(out, DEEPSEEK_END));
        }
    }
    if (!generate) return STATUS_OK;
    TRY(add(out, DEEPSEEK_ASSISTANT));
    return style->open_think ? add(out, "<think>\n") : STATUS_OK;
}

/* --- messages in, prompt out ----------------------------------------------------------------- */

static enum status read_message(const json_t *object, size_t index, struct message *m) {
    const json_t *role = json_object_get(object, "role"),
                 *content = json_object_get(object, "content");
    static const char *const names[] = {"reasoning_content", "thinking", "reasoning"};
    if (!json_is_string(role) || !json_is_string(content))
        return fail_param(
            STATUS_REQUEST, "messages", "invalid_value",
            "messages[%zu] needs a role and a content that are text (the built-in chat formats "
            "know no tools)",
            index);
    m->role = json_string_value(role);
    m->content = json_string_value(content);
    m->content_n = json_string_length(content);
    for (int i = 0; i < 3 && m->reasoning == NULL; i++) {
        const json_t *v = json_object_get(object, names[i]);
        m->reasoning = json_string_value(v);
        m->reasoning_n = json_string_length(v);
    }
    if (!is_role(m, "system") && !is_role(m, "user") && !is_role(m, "assistant"))
        return fail_param(
            STATUS_REQUEST, "messages", "invalid_value",
            "messages[%zu] has the role \"%.40s\"; the built-in chat formats know system, user "
            "and assistant (install python3-jinja2 for the model's own template)",
            index, m->role);
    return STATUS_OK;
}

/* Cuts the prompt where the final message's content ends. A format that drops part of the content
 * (a past <think>...</think>) cannot be continued: the model would not see what it said. */
static enum status cut_at_tag(struct text_buffer *out, struct slice content) {
    const size_t tag_n = sizeof CONTINUE_TAG - 1;
    const struct slice all = {out->bytes, out->n};
    char word[sizeof CONTINUE_TAG];
    memcpy(word, CONTINUE_TAG, sizeof word);
    word[tag_n - 1] = '\0'; /* without its space */
    const size_t at = find_text(all, word, true);
    content = strip(content);
    const bool whole_content =
        content.n == 0 || memmem(all.bytes, all.n, content.bytes, content.n) != NULL;
    if (at == all.n || !whole_content)
        return fail(STATUS_REQUEST, "the chat format drops the message to be continued");
    const bool whole = all.n - at >= tag_n && all.bytes[at + tag_n - 1] == ' ';
    out->n = whole ? at : strip_right((struct slice){all.bytes, at}).n;
    return STATUS_OK;
}

enum status chat_builtin_render(const struct chat_style *style, const json_t *messages,
                                bool add_generation_prompt, bool continue_final_message,
                                const json_t *variables, const char *bos_text,
                                struct text_buffer *out) {
    const size_t count = json_array_size(messages);
    enum status status = STATUS_OK;
    struct text_buffer tagged = {0};
    struct message *m = calloc(count + 1, sizeof *m);
    if (m == NULL) return fail(STATUS_MEMORY, "no memory for %zu messages", count);
    for (size_t i = 0; i < count; i++)
        TRY_GOTO(read_message(json_array_get(messages, i), i, &m[i]), out);
    if (continue_final_message) {
        if (count == 0) {
            status = fail_param(STATUS_REQUEST, "messages", "invalid_value",
                                "continue_final_message needs a message to continue");
            goto out;
        }
        struct message *final = &m[count - 1];
        TRY_GOTO(text_add(&tagged, final->content, final->content_n), out);
        TRY_GOTO(add(&tagged, CONTINUE_TAG), out);
        final->content = tagged.bytes;
        final->content_n = tagged.n;
    }
    switch (style->format) {
        case CHAT_CHATML:
            TRY_GOTO(render_chatml(style, m, count, add_generation_prompt, variables, out), out);
            break;
        case CHAT_LLAMA3:
            TRY_GOTO(render_llama3(style, m, count, add_generation_prompt, bos_text, out), out);
            break;
        case CHAT_DEEPSEEK_R1:
            TRY_GOTO(render_deepseek(style, m, count, add_generation_prompt, bos_text, out), out);
            break;
        case CHAT_NONE:
            ASSERT(false);
    }
    if (continue_final_message) {
        const struct slice content = {tagged.bytes, tagged.n - (sizeof CONTINUE_TAG - 1)};
        TRY_GOTO(cut_at_tag(out, content), out);
    }
out:
    free(m);
    free(tagged.bytes);
    return status;
}
