/* tokenizer_bench.h: how fast one tokenizer encodes and decodes (`sfumato bench tokenizer`). */
#ifndef SFUMATO_TEXT_TOKENIZER_BENCH_H
#define SFUMATO_TEXT_TOKENIZER_BENCH_H

#include <stdbool.h>
#include <stddef.h>

#include "base/check.h"
#include "text/tokenizer.h"

/* Encodes the text whole and line by line (prompts are short: start-up counts), and decodes it.
 * Prints MB/s of text (median, slowest, fastest of several rounds) to standard output: a table, or
 * one JSON object a line. */
enum status tokenizer_bench(const tokenizer *t, const char *text, size_t n, bool json);

#endif
