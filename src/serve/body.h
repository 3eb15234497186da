/* body.h: the JSON body of a request -> a resolved struct request (serving.md §2, §3).
 *
 *   {"messages": ...} ─ template ─┐
 *   {"prompt": "text"} ───────────┼─ tokenizer ─► ids ─► struct request, one per prompt
 *   {"prompt": [ids]} ────────────┘      ▲
 *   every other field ── range ── flags and model defaults
 *
 * Used by `generate` for its lines and meant for the service: no files, no sockets, no engine
 * calls. Owns: everything a body says, validated, with nothing left unset. Refuses to know: what is
 * done with it. Thread: one (the one that owns the chat helper). Memory: one arena and one JSON
 * tree per body, freed together; a struct request made from it borrows from it.
 */
#ifndef SFUMATO_SERVE_BODY_H
#define SFUMATO_SERVE_BODY_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/params.h"
#include "engine/request.h"
#include "load/config.h"
#include "text/chat.h"
#include "text/stream.h"
#include "text/tokenizer.h"

enum { BODY_PROMPTS_MAX = 128, BODY_MESSAGES_MAX = 4096, BODY_DECODED_FACTOR = 4 };

/* What all requests of a process are resolved against. Borrowed, set once at start-up. */
struct body_facts {
    const struct params *params; /* flags: defaults of fields that are left out */
    const struct model_config *config;
    const tokenizer *tokenizer;
    chat *chat;              /* NULL: the model has no template */
    const char *chat_fault;  /* why the template cannot be used; NULL: there is none */
    const char *model_name;  /* of replies and metrics: the first of model_names */
    const char *model_names; /* what `model` may say, commas between */
    enum think_mode mode;    /* --think, or off when the model cannot (soft-thinking.md §3) */
    int vocab_count;         /* V of soft-thinking.md §4 */
    int open_id, close_id;   /* markers; -1: none */
    int eos_count;
    int32_t eos_ids[THINK_EOS_MAX];
    int64_t max_model_len;
    int64_t completion_max_tokens; /* default of max_tokens for "prompt" bodies; 0 = what fits */
    const char *fingerprint;       /* system_fingerprint of replies; NULL in `generate` */
    int64_t created;               /* of the model entry: seconds since 1970 */
    bool batch; /* `generate`: fields that only a live connection can honour are refused */
};

struct body_prompt {
    const char *text; /* to be tokenised, borrowed from root; NULL: sent as ids, or a chat's */
    size_t text_bytes;
    uint32_t *ids; /* NULL: not yet */
    int64_t count;
    int64_t max_tokens; /* resolved for this prompt */
};

struct body {
    arena memory;
    json_t *root;            /* NULL when the text was no JSON object */
    const json_t *custom_id; /* any JSON value, or NULL */
    bool chat;               /* messages, not prompt: one prompt, the template's */
    struct request request;  /* without prompt, id and max_tokens: see body_request */
    int prompt_count;
    struct body_prompt prompts[BODY_PROMPTS_MAX];
    /* how the reply looks */
    const char *stops[STREAM_STOP_COUNT_MAX];
    int stop_count;
    bool include_stop, skip_special;
    bool include_reasoning, separate_reasoning, stream_reasoning;
    bool stream, include_usage, continuous_usage, echo;
    int64_t asked_tokens;   /* max_tokens as it was asked for; -1: it was not */
    bool fills_context;     /* then: what fits (set after body_begin) instead of the defaults */
    int64_t truncate;       /* of prompts: most ids; -1: what fits; 0: none */
    double timeout_seconds; /* 0 = none */
    int trace_entries;      /* most entries of a concept token in the trace; 0 = no trace */
    int64_t too_long;       /* prompt ids of a context_length_exceeded error, else 0 */
};

/* Always leaves a body that body_fini takes, also on failure (custom_id is there when it could be
 * read). STATUS_REQUEST with param and code as in serving.md §5. */
enum status body_parse(const struct body_facts *facts, const char *text, size_t n,
                       struct body *out);
/* The same from a tree, whose reference is taken over. */
enum status body_parse_tree(const struct body_facts *facts, json_t *root, struct body *out);
/* body_parse in parts, for who renders and tokenises elsewhere:
 *   body_begin     everything that needs no prompt; prompts that were sent as ids
 *   body_give_ids  the ids of a prompt that has none (copied)
 *   body_end       what is known only now that all have ids */
enum status body_begin(const struct body_facts *facts, const char *text, size_t n,
                       struct body *out);
enum status body_begin_tree(const struct body_facts *facts, json_t *root, struct body *out);
enum status body_give_ids(const struct body_facts *facts, struct body *b, int prompt,
                          const uint32_t *ids, size_t count);
enum status body_end(const struct body_facts *facts, struct body *b);
void body_fini(struct body *b);
/* The engine's request for one prompt of the body. Borrows from the body. */
struct request body_request(const struct body *b, int prompt, uint64_t id);

/* Flag defaults that no request overrides are checked once: STATUS_USAGE names the flag. */
enum status body_facts_check(const struct body_facts *facts);

/* What a template is given, in texts of its own: another thread may render it. */
struct body_template {
    chat *chat;
    char *messages, *variables;
    bool open, resume; /* add_generation_prompt, continue_final_message */
};
/* Of {"messages": ...}. The caller ends it with body_template_fini whatever comes back. */
enum status body_read_template(const struct body_facts *facts, const json_t *root,
                               struct body_template *out);
/* prompt: malloc'ed. May take CHAT_RENDER_SECONDS. */
enum status body_render(const struct body_template *t, char **prompt, size_t *n);
void body_template_fini(struct body_template *t);
/* All of it at once. */
enum status body_render_messages(const struct body_facts *facts, const json_t *root, char **prompt,
                                 size_t *n);

/* The names one by one: *at begins as facts->model_names. NULL: no more; else *n bytes of it. */
const char *body_next_name(const char **at, size_t *n);
/* STATUS_REQUEST, model_not_found: name (NULL: not given) is none of them. */
enum status body_check_model(const struct body_facts *facts, const char *name);

/* The text of ids, as tokenizer_decode makes it. STATUS_REQUEST: it would have more than
 * BODY_DECODED_FACTOR x --max-body-bytes, as an id may stand for many times its own bytes. */
enum status body_decode(const struct body_facts *facts, const uint32_t *ids, size_t count,
                        char **text, size_t *n);

/* Internal to serve/: the parts of body_parse. */
enum status body_think_block(const struct body_facts *facts, struct body *b);
/* messages -> the JSON array given to templates: contents flattened, reasoning under one name. */
enum status body_flatten_messages(const json_t *messages, json_t **out);

#endif
