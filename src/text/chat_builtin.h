/* chat_builtin.h: three chat formats written in C, for machines without Python. Private to
 * src/text.
 *
 * Each gives, for system, user and assistant messages with text, exactly what the model's own
 * template gives. Models of one format differ in details; those that can be read off the model's
 * template are taken from it: Qwen's and SmolLM's default system prompts, Qwen3's handling of past
 * thinking, Llama 3.1's date header, whether DeepSeek-R1 opens <think>.
 */
#ifndef SFUMATO_TEXT_CHAT_BUILTIN_H
#define SFUMATO_TEXT_CHAT_BUILTIN_H

#include <jansson.h>
#include <stdbool.h>

#include "base/check.h"
#include "text/utf8.h"

enum chat_format { CHAT_NONE, CHAT_CHATML, CHAT_LLAMA3, CHAT_DEEPSEEK_R1 };

struct chat_style {
    enum chat_format format;
    struct text_buffer default_system; /* chatml: used when the first message is not a system one */
    bool qwen3_thinking;               /* chatml: cut past thinking, enable_thinking */
    bool date_header;   /* llama3: "Cutting Knowledge Date" before the system prompt */
    bool date_is_today; /* llama3: else 26 Jul 2024 */
    bool open_think;    /* deepseek-r1: the generation prompt ends with <think>\n */
};

/* The format of a name, or CHAT_NONE. */
enum chat_format chat_builtin_named(const char *name);
const char *chat_builtin_name(enum chat_format format);
/* The format that a template is recognisably written for, or CHAT_NONE. */
enum chat_format chat_builtin_recognize(const char *template_text);
/* Details from the template when there is one (NULL: the plain format). */
enum status chat_style_init(struct chat_style *style, enum chat_format format,
                            const char *template_text);
void chat_style_fini(struct chat_style *style);

/* Appends the prompt. STATUS_REQUEST when a message is not of a kind the format knows. */
enum status chat_builtin_render(const struct chat_style *style, const json_t *messages,
                                bool add_generation_prompt, bool continue_final_message,
                                const json_t *variables, const char *bos_text,
                                struct text_buffer *out);

#endif
