/* tiny_facts.h: what requests are resolved against, with the tokenizer of models/tiny and no engine: for the
 * body suite and the fuzzers of bodies and messages.
 *
 * A header alone, because it needs the layer serve, which most suites do not link. Include it once per program.
 * Memory: static, until tiny_facts_close.
 */
#ifndef TESTS_SUPPORT_TINY_FACTS_H
#define TESTS_SUPPORT_TINY_FACTS_H

#include <stdlib.h>

#include "base/json.h"
#include "base/log.h"
#include "serve/body.h"

static struct params params;
static struct model_config config; /* filters: -1 = the model does not say */
static struct body_facts facts;

/* file: models/tiny/tokenizer.json. STATUS_OK, or why not. */
static inline enum status tiny_facts_open(const char *file, enum params_command command) {
    char *json, *none[] = {"test", NULL};
    size_t n;
    tokenizer *t;
    chat *c;
    log_init(LOG_OFF, false);
    TRY(params_parse(&params, command, 1, none));
    TRY(json_read_file(file, TOKENIZER_FILE_BYTES_MAX, false, STATUS_MODEL, &json, &n));
    const enum status status = tokenizer_open_json(json, n, NULL, 0, &t);
    free(json);
    TRY(status);
    TRY(chat_open(NULL, NULL, "chatml", "", "", &c));
    config = (struct model_config){.temperature = -1, .top_p = -1, .top_k = -1, .min_p = -1};
    facts = (struct body_facts){.params = &params,
                                .config = &config,
                                .tokenizer = t,
                                .chat = c,
                                .model_name = "tiny",
                                .model_names = "tiny",
                                .mode = THINK_SOFT,
                                .vocab_count = tokenizer_vocab_count(t),
                                .open_id = tokenizer_find(t, "<think>"),
                                .close_id = tokenizer_find(t, "</think>"),
                                .eos_count = 1,
                                .eos_ids = {3},
                                .max_model_len = 1024,
                                .batch = command != PARAMS_SERVE};
    return STATUS_OK;
}

static inline void tiny_facts_close(void) {
    chat_close(facts.chat);
    tokenizer_close((tokenizer *)facts.tokenizer);
    params_fini(&params);
}

#endif
