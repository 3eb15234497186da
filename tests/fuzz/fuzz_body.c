/* fuzz_body.c: request bodies (serve/body.h) from hostile bytes, against the tokenizer of models/tiny.
 *
 * Whatever comes in, body_parse either succeeds with a request that keeps its promises, or fails with
 * STATUS_REQUEST and a text; nothing is written, nothing leaks, and the memory is bounded.
 */
/* layer: serve */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../support/tiny_facts.h"
#include "serve/reply.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void open_facts(void) {
    char path[4096];
    const char *root = getenv("SFUMATO_SOURCE_DIR");
    snprintf(path, sizeof path, "%s/models/tiny/tokenizer.json", root ? root : ".");
    if (tiny_facts_open(path, PARAMS_GENERATE) != STATUS_OK) {
        fprintf(stderr, "fuzz_body: %s\n", fail_text());
        exit(1);
    }
}

static void check(bool holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "fuzz_body: %s\n", what);
    abort();
}

static void check_request(const struct request *r) {
    check(r->prompt.count >= 1 && r->max_tokens >= 1, "an empty prompt or reply was accepted");
    check(r->prompt.count + r->max_tokens <= facts.max_model_len,
          "a request longer than the context");
    for (int64_t i = 0; i < r->prompt.count; i++) {
        check(r->prompt.ids[i] < (uint32_t)facts.vocab_count, "a prompt id outside the vocabulary");
    }
    check(r->choices >= 1 && r->choices <= REQUEST_CHOICES_MAX, "n out of range");
    check(think_params_check(&r->think, facts.vocab_count) == STATUS_OK,
          "thinking options out of range");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!facts.params) open_facts();
    struct body body;
    struct json_writer w;
    json_writer_init(&w);
    const enum status status = body_parse(&facts, (const char *)data, size, &body);
    if (status == STATUS_OK) {
        for (int i = 0; i < body.prompt_count; i++) {
            const struct request r = body_request(&body, i, 1);
            check_request(&r);
        }
    } else {
        check(status == STATUS_REQUEST, "a bad body is the caller's fault, nothing else");
        reply_write_error_line(&facts, &body, &w);
        json_t *line = json_loadb(w.bytes, w.n, 0, NULL);
        check(line != NULL, "the error line is no JSON");
        json_decref(line);
    }
    json_writer_fini(&w);
    body_fini(&body);
    return 0;
}
