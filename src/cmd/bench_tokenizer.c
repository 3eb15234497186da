/* bench_tokenizer.c: `sfumato bench tokenizer`, MB/s of encode and decode with the model's tokenizer.
 *
 * The text is made here from words, numbers, code, accents and other scripts in turn, so that caches of
 * frequent words help no more than they would on real text. One thread, rank 0.
 */
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "cmd/bench.h"
#include "text/tokenizer_bench.h"

enum { TEXT_BYTES = 1 << 20 };

static char *make_text(size_t *n) {
    static const char *const pieces[] = {"the ",
                                         "model thinks in mixtures ",
                                         "of words, ",
                                         "not in words; ",
                                         "therefore ",
                                         "12345 ",
                                         "3.14 ",
                                         "for (int i = 0; i < n; i++) {\n    x += y[i];\n}\n",
                                         "don't ",
                                         "I'll ",
                                         "\n\n",
                                         "  ",
                                         "caf\xc3\xa9 ",
                                         "\xe4\xbd\xa0\xe5\xa5\xbd ",
                                         "\xd0\xbc\xd0\xb8\xd1\x80 ",
                                         "\xf0\x9f\x99\x82 ",
                                         "-> x^2 + y^2 = z^2 ",
                                         "https://example.org/a?b=c ",
                                         "ABCDEF ",
                                         "internationalisation "};
    char *text = malloc(TEXT_BYTES + 64);
    *n = 0;
    for (uint32_t i = 0; text && *n < TEXT_BYTES; i++) {
        const rng_block r = rng_draw(3, i, 0, RNG_CATEGORICAL, 0, 0);
        if (r.word[0] % 3 == 0) { /* a word nobody has seen */
            for (uint32_t k = 0; k < 3 + r.word[1] % 7; k++) {
                text[(*n)++] = (char)('a' + (r.word[2] >> (k % 6) * 5) % 26);
            }
            text[(*n)++] = ' ';
            continue;
        }
        const char *piece = pieces[r.word[1] % (sizeof pieces / sizeof *pieces)];
        memcpy(text + *n, piece, strlen(piece));
        *n += strlen(piece);
    }
    return text;
}

enum status bench_tokenizer(struct host *h) {
    TRY(host_open_text(h));
    if (h->rank > 0) return STATUS_OK;
    size_t n;
    char *text = make_text(&n);
    if (!text) return fail(STATUS_MEMORY, "no memory for a text");
    const enum status status = tokenizer_bench(h->tokenizer, text, n, h->params.json);
    free(text);
    return status;
}
