/* openai_chat.c: POST /v1/chat/completions, its choices whole and in chunks (serving.md §4.1, §4.2).
 */
#include <math.h>

#include "serve/openai.h"

/* Both names carry the same text: clients read one or the other. */
static void write_reasoning(const struct generation *g, const char *text, size_t n,
                            struct json_writer *w) {
    enum { BOTH, CONTENT, PLAIN };
    const int fields = g->x->site->params->reasoning_fields;
    if (fields != PLAIN) {
        json_key(w, "reasoning_content");
        json_write_string(w, text, n);
    }
    if (fields != CONTENT) {
        json_key(w, "reasoning");
        json_write_string(w, text, n);
    }
}

static void write_logprobs(const struct generation *g, const struct reply_parts *parts,
                           struct json_writer *w) {
    json_key(w, "logprobs");
    if (!g->body->request.logprobs) {
        json_write_null(w);
        return;
    }
    json_begin(w, '{');
    reply_write_items(w, "content", parts->content_logprobs);
    reply_write_items(w, "reasoning", parts->reasoning_logprobs);
    json_end(w, '}');
}

static void write_index(int choice, struct json_writer *w) {
    json_begin(w, '{');
    json_key(w, "index");
    json_write_int(w, choice);
}

static void chat_begin(struct generation *g, int choice, struct json_writer *w) {
    static const char role[] =
        "{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null";
    (void)g;
    write_index(choice, w);
    json_key(w, "delta");
    json_write_raw(w, role, sizeof role - 1);
    json_end(w, '}');
}

static bool chat_delta(struct generation *g, int choice, const struct stream_delta *delta,
                       struct json_writer *w) {
    struct reply_parts parts;
    reply_get_parts(call_reply(g->call, choice), &parts);
    const bool lp = parts.content_logprobs->n > 0 || parts.reasoning_logprobs->n > 0;
    if (delta->thinking_n == 0 && delta->answer_n == 0 && !lp && parts.trace->n == 0) return false;
    write_index(choice, w);
    json_key(w, "delta");
    json_begin(w, '{');
    if (delta->thinking_n > 0) write_reasoning(g, delta->thinking, delta->thinking_n, w);
    if (delta->answer_n > 0) {
        json_key(w, "content");
        json_write_string(w, delta->answer, delta->answer_n);
    }
    json_end(w, '}');
    write_logprobs(g, &parts, w);
    openai_end_delta(&parts, w);
    return true;
}

static void chat_last(struct generation *g, int choice, struct json_writer *w) {
    const reply *r = call_reply(g->call, choice);
    write_index(choice, w);
    json_key(w, "delta");
    json_begin(w, '{');
    json_end(w, '}');
    json_key(w, "logprobs");
    json_write_null(w);
    openai_end_choice(r, false, w);
}

static void chat_whole(struct generation *g, int choice, struct json_writer *w) {
    const reply *r = call_reply(g->call, choice);
    struct reply_parts parts;
    struct reply_summary s;
    reply_get_parts(r, &parts);
    reply_summarise(r, &s);
    const bool answered = s.usage.completion_tokens > s.usage.reasoning_tokens;
    write_index(choice, w);
    json_key(w, "message");
    json_begin(w, '{');
    json_key(w, "role");
    json_write_text(w, "assistant");
    json_key(w, "content");
    if (answered || parts.answer->n > 0) {
        json_write_string(w, parts.answer->bytes, parts.answer->n);
    } else {
        json_write_null(w);
    }
    json_key(w, "refusal");
    json_write_null(w);
    const bool thought = !isnan(s.mean_entropy); /* also when it is counted for another choice */
    if (thought && g->body->include_reasoning && g->body->separate_reasoning) {
        write_reasoning(g, parts.thinking->bytes, parts.thinking->n, w);
    }
    json_end(w, '}');
    write_logprobs(g, &parts, w);
    openai_end_choice(r, true, w);
}

static const struct shape chat_shape = {
    .kind = CALL_CHAT,
    .id_prefix = "chatcmpl",
    .object = "chat.completion",
    .chunk_object = "chat.completion.chunk",
    .begin = chat_begin,
    .delta = chat_delta,
    .last = chat_last,
    .whole = chat_whole,
};

void openai_chat(struct exchange *x) { generation_start(x, &chat_shape); }
