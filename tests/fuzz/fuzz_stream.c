/* layer: text */
/* fuzz_stream.c: up to four stop strings, each ended by a NUL, then steps of two bytes: flags and
 * an id. However the steps fall, every delta is valid UTF-8 and no stop string is left in the
 * answer. */
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "text/stream.h"
#include "text/utf8.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

/* 256 tokens, one a byte, in the byte-level alphabet, and two markers. */
static tokenizer *open_bytes(void) {
    static char texts[256][4];
    static struct tokenizer_string tokens[258];
    static int32_t types[258];
    for (int i = 0; i < 256; i++) {
        tokens[i] = (struct tokenizer_string){
            texts[i], (size_t)utf8_put(utf8_byte_to_alphabet((uint8_t)i), texts[i])};
        types[i] = TOKEN_NORMAL;
    }
    tokens[256] = (struct tokenizer_string){"<think>", 7};
    tokens[257] = (struct tokenizer_string){"</think>", 8};
    types[256] = types[257] = TOKEN_CONTROL;
    const struct tokenizer_parts parts = {.tokens = tokens,
                                          .token_types = types,
                                          .vocab_count = 258,
                                          .merges = tokens, /* none of them */
                                          .model = "gpt2",
                                          .pre = "gpt-2",
                                          .bos_id = -1,
                                          .eos_id = -1};
    tokenizer *t = NULL;
    ASSERT(tokenizer_open_parts(&parts, &t) == STATUS_OK);
    return t;
}

static void take(struct text_buffer *answer, const struct stream_delta *d) {
    ASSERT_EQ(utf8_valid_bytes(d->thinking, d->thinking_n), d->thinking_n);
    ASSERT_EQ(utf8_valid_bytes(d->answer, d->answer_n), d->answer_n);
    ASSERT(text_add(answer, d->answer, d->answer_n) == STATUS_OK);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
    static tokenizer *t;
    log_init(LOG_OFF, false);
    if (t == NULL) t = open_bytes();
    const char *stops[4];
    struct stream_options o = {.stops = stops};
    for (const uint8_t *end; o.stop_count < 4 && n > 0 && (end = memchr(bytes, 0, n)) != NULL;) {
        stops[o.stop_count++] = (const char *)bytes;
        n -= (size_t)(end + 1 - bytes);
        bytes = end + 1;
    }
    o.raw = n % 5 == 0;
    o.include_stop = n % 3 == 0;
    stream *s = NULL;
    if (stream_open(t, &o, &s) != STATUS_OK) return 0;
    struct stream_delta d = {0};
    struct text_buffer answer = {0};
    bool phase_changed = false;
    for (size_t i = 0; i + 1 < n && !d.stopped; i += 2) {
        const bool marker = bytes[i] % 16 == 1, thinking = bytes[i] % 16 == 2;
        phase_changed |= marker || thinking;
        ASSERT(stream_push(s, marker ? 256 + bytes[i + 1] % 2 : bytes[i + 1], thinking, marker,
                           &d) == STATUS_OK);
        take(&answer, &d);
    }
    ASSERT(stream_finish(s, &d) == STATUS_OK);
    take(&answer, &d);
    for (int k = 0; k < o.stop_count && !phase_changed && !o.include_stop; k++)
        ASSERT(answer.n == 0 || memmem(answer.bytes, answer.n, stops[k], strlen(stops[k])) == NULL);
    free(answer.bytes);
    stream_close(s);
    return 0;
}
