/* layer: text */
/* fuzz_tokenizer.c: tokenizer.json, then a NUL and a text for it when there is one. What opens must
 * encode any text to known ids, decode them to valid UTF-8, and give them back one by one. */
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

static void use(const tokenizer *t, const char *text, size_t n) {
    uint32_t *ids = NULL;
    size_t count = 0, text_n = 0;
    if (tokenizer_encode(t, text, n, true, &ids, &count) != STATUS_OK) return;
    const int vocab = tokenizer_vocab_count(t);
    for (size_t i = 0; i < count; i++) {
        ASSERT_LT(ids[i], vocab);
        tokenizer_piece(t, ids[i]);
    }
    char *decoded = NULL;
    ASSERT(tokenizer_decode(t, ids, count, false, &decoded, &text_n) == STATUS_OK);
    ASSERT_EQ(utf8_valid_bytes(decoded, text_n), text_n);
    free(decoded);
    free(ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
    static const char fixed[] =
        "It's 1234 <a> caf\xC3\xA9\n\n  \xE4\xBD\xA0\xE5\xA5\xBD \xF0\x9F\x98\x80'LL";
    const char *text = (const char *)bytes, *cut = n > 0 ? memchr(text, 0, n) : NULL;
    const size_t json_n = cut != NULL ? (size_t)(cut - text) : n;
    tokenizer *t = NULL;
    log_init(LOG_OFF, false);
    if (tokenizer_open_json(text, json_n, NULL, 0, &t) != STATUS_OK) return 0;
    use(t, fixed, sizeof fixed - 1);
    use(t, "", 0);
    if (cut != NULL) use(t, cut + 1, n - json_n - 1);
    tokenizer_close(t);
    return 0;
}
