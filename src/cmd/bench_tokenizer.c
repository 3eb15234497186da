/* bench_tokenizer.c: `sfumato bench tokenizer`, MB/s of encode and decode with the model's tokenizer.
 *
 * The text is made here from words, numbers, code, accents and other scripts in turn, so that caches of
 * frequent words help no more than they would on real text. One thread, rank 0.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "cmd/bench.h"

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

static enum status run(struct host *h) {
    struct bench_series encode = {0}, decode = {0};
    size_t n, count = 0;
    char *text = make_text(&n), *back = NULL;
    if (!text) return fail(STATUS_MEMORY, "no memory for a text");
    enum status status = STATUS_OK;
    for (int round = 0; round < (int)h->params.rounds + 1 && status == STATUS_OK; round++) {
        uint32_t *ids = NULL;
        size_t back_n = 0;
        double start = progress_clock();
        status = tokenizer_encode(h->tokenizer, text, n, false, &ids, &count);
        const double encoded = progress_clock() - start;
        if (status != STATUS_OK) break;
        start = progress_clock();
        status = tokenizer_decode(h->tokenizer, ids, count, false, &back, &back_n);
        const double decoded = progress_clock() - start;
        free(ids);
        free(back);
        back = NULL;
        if (round == 0) continue; /* warm-up */
        bench_add(&encode, 1e-6 * (double)n / encoded);
        bench_add(&decode, 1e-6 * (double)n / decoded);
    }
    free(text);
    TRY(status);
    const struct bench_summary e = bench_summarise(&encode), d = bench_summarise(&decode);
    printf("%s: %zu bytes, %zu ids (%.2f bytes an id)\n", h->model_name, n, count,
           (double)n / (double)count);
    printf("encode %8.2f MB/s (%.2f..%.2f)\ndecode %8.2f MB/s (%.2f..%.2f)\n", e.median, e.min,
           e.max, d.median, d.min, d.max);
    return STATUS_OK;
}

enum status bench_tokenizer(struct host *h) {
    TRY(host_open_text(h));
    return h->rank == 0 ? run(h) : STATUS_OK;
}
