/* chat.c: one model's chat template, rendered by the helper process or by a built-in format. See
 * chat.h. */
#include "text/chat.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "text/chat_builtin.h"
#include "text/chat_helper.h"

static const char FIX[] =
    "install python3-jinja2, or name a built-in format: --chat-template chatml, llama3 or "
    "deepseek-r1";

struct chat {
    chat_helper *helper; /* borrowed; NULL when a built-in format is used */
    char *template_text;
    struct chat_style style;
    char *bos, *eos; /* NULL: the tokenizer has none */
};

/* Sends the template once, so that a broken one is refused when the model is opened. */
static enum status check_template(chat *c) {
    json_t *answer = NULL;
    json_t *request = json_pack("{s:s, s:b}", "template", c->template_text, "check", 1);
    if (request == NULL)
        return fail(STATUS_MODEL, "the model's chat template is not UTF-8; %s", FIX);
    enum status status = chat_helper_ask(c->helper, request, &answer);
    const char *error = json_string_value(json_object_get(answer, "error"));
    if (status == STATUS_REQUEST)
        status =
            fail(STATUS_MODEL, "the model's chat template cannot be compiled: %.200s", fail_text());
    if (status == STATUS_OK && error != NULL)
        status = fail(STATUS_MODEL, "the model's chat template cannot be compiled: %.400s", error);
    json_decref(request);
    json_decref(answer);
    return status;
}

static enum status choose(chat *c, chat_helper *helper, const char *template_text,
                          const char *builtin) {
    if (builtin != NULL) {
        const enum chat_format format = chat_builtin_named(builtin);
        if (format == CHAT_NONE)
            return fail(
                STATUS_USAGE,
                "there is no chat format \"%.40s\"; built in are chatml, llama3, deepseek-r1",
                builtin);
        return chat_style_init(&c->style, format, NULL);
    }
    if (template_text == NULL)
        return fail(STATUS_MODEL,
                    "the model has no chat template; name a format: --chat-template chatml, llama3 "
                    "or deepseek-r1");
    if (strlen(template_text) > CHAT_TEMPLATE_BYTES_MAX)
        return fail(STATUS_MODEL, "the model's chat template is longer than %d bytes",
                    CHAT_TEMPLATE_BYTES_MAX);
    if (helper != NULL) {
        c->helper = helper;
        c->template_text = strdup(template_text);
        if (c->template_text == NULL) return fail(STATUS_MEMORY, "no memory for the chat template");
        return check_template(c);
    }
    const enum chat_format format = chat_builtin_recognize(template_text);
    if (format == CHAT_NONE)
        return fail(STATUS_MODEL, "the model's chat template needs python3 with jinja2; %s", FIX);
    log_warn(
        "chat: python3 with jinja2 is not there; the built-in format %s stands for the model's "
        "template",
        chat_builtin_name(format));
    return chat_style_init(&c->style, format, template_text);
}

enum status chat_open(chat_helper *helper, const char *template_text, const char *builtin,
                      const char *bos_text, const char *eos_text, chat **out) {
    *out = NULL;
    chat *c = calloc(1, sizeof *c);
    if (c == NULL) return fail(STATUS_MEMORY, "no memory for the chat template");
    enum status status = STATUS_OK;
    if ((bos_text != NULL && (c->bos = strdup(bos_text)) == NULL) ||
        (eos_text != NULL && (c->eos = strdup(eos_text)) == NULL)) {
        status = fail(STATUS_MEMORY, "no memory for the chat template");
        goto out;
    }
    TRY_GOTO(choose(c, helper, template_text, builtin), out);
    *out = c;
    c = NULL;
out:
    chat_close(c);
    return status;
}

void chat_close(chat *c) {
    if (c == NULL) return;
    chat_style_fini(&c->style);
    free(c->template_text);
    free(c->bos);
    free(c->eos);
    free(c);
}

void chat_abandon(chat *c) {
    if (c->helper != NULL) chat_helper_abandon(c->helper);
}

void chat_expect(chat *c) {
    if (c->helper != NULL) chat_helper_expect(c->helper);
}

static enum status render_by_helper(chat *c, json_t *messages, bool add_generation_prompt,
                                    bool continue_final_message, json_t *kwargs, char **prompt,
                                    size_t *n) {
    enum status status = STATUS_OK;
    json_t *answer = NULL;
    /* kwargs overwrite the special tokens, as in transformers */
    json_t *variables = json_object();
    if (c->bos != NULL) json_object_set_new(variables, "bos_token", json_string(c->bos));
    if (c->eos != NULL) json_object_set_new(variables, "eos_token", json_string(c->eos));
    if (kwargs != NULL) json_object_update(variables, kwargs);
    json_t *request =
        json_pack("{s:s, s:O, s:b, s:b, s:O}", "template", c->template_text, "messages", messages,
                  "add_generation_prompt", (int)add_generation_prompt, "continue_final_message",
                  (int)continue_final_message, "variables", variables);
    if (request == NULL) {
        status = fail(STATUS_MEMORY, "no memory to render a chat template");
        goto out;
    }
    TRY_GOTO(chat_helper_ask(c->helper, request, &answer), out);
    const char *error = json_string_value(json_object_get(answer, "error"));
    const json_t *text = json_object_get(answer, "text");
    if (error != NULL || !json_is_string(text)) {
        status = fail_param(STATUS_REQUEST, "messages", "chat_template",
                            "the chat template refuses: %.800s", error == NULL ? "no text" : error);
        goto out;
    }
    struct text_buffer out = {0};
    status = text_add(&out, json_string_value(text), json_string_length(text));
    if (status == STATUS_OK) status = text_finish(&out, prompt, n);
    free(out.bytes);
out:
    json_decref(request);
    json_decref(variables);
    json_decref(answer);
    return status;
}

static enum status parse(const char *text, const char *what, bool (*is_right)(const json_t *),
                         json_t **out) {
    json_error_t error;
    *out = json_loads(text, JSON_ALLOW_NUL, &error);
    if (*out != NULL && is_right(*out)) return STATUS_OK;
    json_decref(*out);
    *out = NULL;
    return fail_param(STATUS_REQUEST, what, "invalid_value", "%s is not valid: %s", what,
                      error.text);
}

static bool is_messages(const json_t *v) {
    size_t i;
    const json_t *item;
    if (!json_is_array(v)) return false;
    for (i = 0; i < json_array_size(v); i++)
        if (item = json_array_get(v, i), !json_is_object(item)) return false;
    return true;
}

static bool is_object(const json_t *v) { return json_is_object(v); }

enum status chat_render(chat *c, const char *messages_json, bool add_generation_prompt,
                        bool continue_final_message, const char *kwargs_json, char **prompt,
                        size_t *n) {
    *prompt = NULL;
    *n = 0;
    if (add_generation_prompt && continue_final_message)
        return fail_param(STATUS_REQUEST, "continue_final_message", "invalid_value",
                          "continue_final_message and add_generation_prompt exclude each other");
    enum status status = STATUS_OK;
    json_t *messages = NULL, *kwargs = NULL;
    struct text_buffer out = {0};
    TRY_GOTO(parse(messages_json, "messages", is_messages, &messages), out);
    if (kwargs_json != NULL)
        TRY_GOTO(parse(kwargs_json, "chat_template_kwargs", is_object, &kwargs), out);
    if (c->helper != NULL) {
        status = render_by_helper(c, messages, add_generation_prompt, continue_final_message,
                                  kwargs, prompt, n);
        goto out;
    }
    TRY_GOTO(chat_builtin_render(&c->style, messages, add_generation_prompt, continue_final_message,
                                 kwargs, c->bos == NULL ? "" : c->bos, &out),
             out);
    TRY_GOTO(text_finish(&out, prompt, n), out);
out:
    free(out.bytes);
    json_decref(messages);
    json_decref(kwargs);
    return status;
}
