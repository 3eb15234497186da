/* body_messages.c: chat messages and template variables of a request -> prompt text.
 *
 * The API allows several spellings (content parts, reasoning or reasoning_content,
 * reasoning_effort); templates get one: content is a string, thinking is `reasoning_content`,
 * switches are plain variables. Everything else in a message (name, tool_call_id) is passed on
 * untouched.
 */
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "serve/body.h"
#include "serve/fields.h"

static enum status wrong_message(size_t i, const char *member, const char *what) {
    char path[FAULT_NAME_BYTES];
    snprintf(path, sizeof path, "messages[%zu]%s%s", i, *member ? "." : "", member);
    return fail_param(STATUS_REQUEST, path, NULL, "%s must be %s", path, what);
}

/* Texts of several parts stand on lines of their own, as in vLLM and llama.cpp. */
struct lines {
    struct json_writer text;
    bool any;
};

static void append_line(struct lines *l, const json_t *more) {
    if (l->any) json_write_bytes(&l->text, "\n", 1);
    json_write_bytes(&l->text, json_string_value(more), json_string_length(more));
    l->any = true;
}

/* Without parts *out stays as it is. */
static enum status join_lines(struct lines *l, json_t **out) {
    if (!l->any) return STATUS_OK;
    *out = l->text.failed ? NULL : json_stringn(l->text.n ? l->text.bytes : "", l->text.n);
    return *out ? STATUS_OK : fail(STATUS_MEMORY, "no memory for a message");
}

/* content = [{"type":...}, ...], one by one: there may be as many as fit into a body. */
static enum status read_parts(size_t i, const json_t *parts, bool assistant, struct lines *content,
                              struct lines *reasoning) {
    size_t p;
    json_t *part;
    json_array_foreach(parts, p, part) {
        const char *type = json_string_value(json_object_get(part, "type"));
        const json_t *text = NULL;
        struct lines *to = content;
        if (type && strcmp(type, "text") == 0) {
            text = json_object_get(part, "text");
        } else if (type && assistant && strcmp(type, "thinking") == 0) {
            text = json_object_get(part, "thinking");
            to = reasoning;
        } else if (type && assistant && strcmp(type, "reasoning") == 0) {
            text = json_object_get(part, "text");
            to = reasoning;
        }
        if (!json_is_string(text)) {
            return wrong_message(i, "content",
                                 assistant ? "text, thinking or reasoning parts with their text"
                                           : "text parts with their text");
        }
        append_line(to, text);
    }
    return STATUS_OK;
}

/* Text to *content, thinking to *reasoning. */
static enum status flatten_parts(size_t i, const json_t *parts, bool assistant, json_t **content,
                                 json_t **reasoning) {
    struct lines text = {0}, thinking = {0};
    enum status status = read_parts(i, parts, assistant, &text, &thinking);
    if (status == STATUS_OK) status = join_lines(&text, content);
    if (status == STATUS_OK) status = join_lines(&thinking, reasoning);
    json_writer_fini(&text.text);
    json_writer_fini(&thinking.text);
    return status;
}

static enum status flatten_message(size_t i, const json_t *message, json_t *out) {
    static const char *const roles[] = {"system", "developer", "user", "assistant", "tool", NULL};
    enum status status = STATUS_OK;
    json_t *content = NULL, *reasoning = NULL;
    if (!json_is_object(message)) return wrong_message(i, "", "an object");
    const char *role = json_string_value(json_object_get(message, "role"));
    int r = 0;
    while (role && roles[r] && strcmp(roles[r], role) != 0) r++;
    if (!role || !roles[r])
        return wrong_message(i, "role", "system, developer, user, assistant or tool");
    const bool assistant = strcmp(role, "assistant") == 0;

    json_t *given = field_get(message, "reasoning_content");
    if (!given) given = field_get(message, "reasoning");
    if (given && (!assistant || !json_is_string(given))) {
        return wrong_message(i, "reasoning_content", "a string, in assistant messages only");
    }
    json_t *raw = field_get(message, "content");
    if (json_is_string(raw)) {
        content = json_incref(raw);
    } else if (json_is_array(raw)) {
        TRY_GOTO(flatten_parts(i, raw, assistant, &content, &reasoning), out);
    } else if (raw || !assistant) {
        TRY_GOTO(wrong_message(i, "content",
                               assistant ? "a string, null or an array of parts"
                                         : "a string or an array of parts"),
                 out);
    }
    if (given) {
        json_decref(reasoning);
        reasoning = json_incref(given);
    }
    if (!content) content = json_string("");
    json_object_update(out, (json_t *)message);
    json_object_del(out, "reasoning");
    if (json_object_set(out, "content", content) != 0 ||
        (reasoning && json_object_set(out, "reasoning_content", reasoning) != 0)) {
        status = fail(STATUS_MEMORY, "no memory for a message");
    }
out:
    json_decref(content);
    json_decref(reasoning);
    return status;
}

enum status body_flatten_messages(const json_t *messages, json_t **out) {
    const size_t count = json_array_size(messages);
    *out = NULL;
    if (!json_is_array(messages) || count < 1 || count > BODY_MESSAGES_MAX) {
        return fail_param(STATUS_REQUEST, "messages", NULL,
                          "messages must be an array of 1..%d messages", BODY_MESSAGES_MAX);
    }
    json_t *flat = json_array();
    enum status status = flat ? STATUS_OK : fail(STATUS_MEMORY, "no memory for messages");
    for (size_t i = 0; i < count && status == STATUS_OK; i++) {
        json_t *message = json_object();
        status = flatten_message(i, json_array_get(messages, i), message);
        if (status == STATUS_OK) {
            json_array_append(flat, message);
        }
        json_decref(message);
    }
    if (status != STATUS_OK) {
        json_decref(flat);
        return status;
    }
    *out = flat;
    return STATUS_OK;
}

/* chat_template_kwargs plus what reasoning_effort and reasoning.{effort,enabled} mean for
 * templates. */
static enum status template_variables(const json_t *root, json_t **out) {
    static const char *const efforts[] = {"none", "minimal", "low", "medium",
                                          "high", "xhigh",   "max", NULL};
    json_t *given = field_get(root, "chat_template_kwargs"),
           *reasoning = field_get(root, "reasoning");
    if (given && !json_is_object(given))
        return field_wrong("", "chat_template_kwargs", "an object");
    if (reasoning && !json_is_object(reasoning)) return field_wrong("", "reasoning", "an object");
    const char *effort = NULL;
    bool enabled = true;
    TRY(field_text(root, "", "reasoning_effort", &effort));
    if (!effort) TRY(field_text(reasoning, "reasoning.", "effort", &effort));
    TRY(field_bool(reasoning, "reasoning.", "enabled", &enabled));
    for (int i = 0; effort; i++) {
        if (!efforts[i]) {
            return field_wrong("", "reasoning_effort",
                               "none, minimal, low, medium, high, xhigh or max");
        }
        if (strcmp(efforts[i], effort) == 0) break;
    }
    json_t *variables = given ? json_copy(given) : json_object();
    if (!variables) return fail(STATUS_MEMORY, "no memory for template variables");
    if (effort && !json_object_get(variables, "reasoning_effort")) {
        json_object_set_new(variables, "reasoning_effort", json_string(effort));
    }
    if (!enabled || (effort && strcmp(effort, "none") == 0)) {
        static const char *const switches[] = {"enable_thinking", "thinking"};
        for (int i = 0; i < 2; i++) {
            if (!json_object_get(variables, switches[i])) {
                json_object_set_new(variables, switches[i], json_false());
            }
        }
    }
    *out = variables;
    return STATUS_OK;
}

enum status body_read_template(const struct body_facts *facts, const json_t *root,
                               struct body_template *out) {
    enum status status = STATUS_OK;
    json_t *flat = NULL, *variables = NULL;
    *out = (struct body_template){.chat = facts->chat};
    if (!facts->chat) {
        return fail_param(STATUS_REQUEST, "messages", NULL, "messages cannot be read here: %s",
                          facts->chat_fault ? facts->chat_fault
                                            : "the model has no chat template: send prompt, or "
                                              "start with --chat-template");
    }
    TRY(field_bool(root, "", "continue_final_message", &out->resume));
    out->open = !out->resume;
    TRY(field_bool(root, "", "add_generation_prompt", &out->open));
    if (out->open && out->resume) {
        return fail_param(STATUS_REQUEST, "continue_final_message", NULL,
                          "add_generation_prompt and continue_final_message cannot both be true");
    }
    TRY_GOTO(body_flatten_messages(field_get(root, "messages"), &flat), out);
    TRY_GOTO(template_variables(root, &variables), out);
    out->messages = json_dumps(flat, JSON_COMPACT);
    out->variables = json_dumps(variables, JSON_COMPACT);
    if (!out->messages || !out->variables) status = fail(STATUS_MEMORY, "no memory for messages");
out:
    json_decref(flat);
    json_decref(variables);
    return status;
}

enum status body_render(const struct body_template *t, char **prompt, size_t *n) {
    const enum status status =
        chat_render(t->chat, t->messages, t->open, t->resume, t->variables, prompt, n);
    if (status == STATUS_REQUEST && !fail_last()->param[0]) {
        const struct fault fault = *fail_last();
        fail_param(status, "messages", fault.code, "%s", fault.text);
    }
    return status;
}

void body_template_fini(struct body_template *t) {
    free(t->messages);
    free(t->variables);
    *t = (struct body_template){0};
}

enum status body_render_messages(const struct body_facts *facts, const json_t *root, char **prompt,
                                 size_t *n) {
    struct body_template t;
    enum status status = body_read_template(facts, root, &t);
    if (status == STATUS_OK) status = body_render(&t, prompt, n);
    body_template_fini(&t);
    return status;
}
