/* normalize.h: what is done to text before it is cut: NFC and friends, Prepend, Replace, in order.
 *
 * A chain of steps built once and then immutable. Text that a step leaves alone is not copied. Runs
 * on the stretches between added tokens, as Hugging Face `tokenizers` does, never across them.
 */
#ifndef SFUMATO_TEXT_NORMALIZE_H
#define SFUMATO_TEXT_NORMALIZE_H

#include <stddef.h>

#include "base/check.h"
#include "text/utf8.h"

typedef struct normalizer normalizer;
struct regex_budget; /* regex.h */

/* As much as a text may have (TOKENIZER_TEXT_BYTES_MAX): a few steps of Replace can make any text long. */
enum { NORMALIZED_BYTES_MAX = 64 << 20 };

enum normal_form { NORMAL_NFC, NORMAL_NFD, NORMAL_NFKC, NORMAL_NFKD };

enum status normalizer_new(normalizer **out);
void normalizer_free(normalizer *z);
enum status normalizer_add_form(normalizer *z, enum normal_form form);
enum status normalizer_add_prepend(normalizer *z, const char *text, size_t n);
/* Every match of the pattern (literal text or a regex) becomes `content`. */
enum status normalizer_add_replace(normalizer *z, const char *pattern, size_t n, bool literal,
                                   const char *content, size_t content_n);

/* out->bytes[0..out->n) = the normalized text; the buffer is reused from call to call. STATUS_REQUEST
 * when a pattern gives up, or the text grows beyond NORMALIZED_BYTES_MAX. */
enum status normalizer_run(const normalizer *z, const char *text, size_t n,
                           struct regex_budget *budget, struct text_buffer *out);

#endif
