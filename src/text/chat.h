/* chat.h: messages -> prompt text, by the model's own template.
 *
 * Exact Jinja runs in a helper process of rank 0 (python3 + jinja2, sandboxed, with limits and a
 * deadline per render); chatml, llama3 and deepseek-r1 are built in for machines without Python.
 * Templates are hostile input. Start the helper before MPI_Init (chat_helper_start). One thread at a
 * time; chat_abandon and chat_expect may come from another.
 */
#ifndef SFUMATO_TEXT_CHAT_H
#define SFUMATO_TEXT_CHAT_H

#include <stdbool.h>
#include <stddef.h>

#include "base/check.h"

typedef struct chat chat;
typedef struct chat_helper chat_helper;

enum { CHAT_RENDER_SECONDS = 5, CHAT_TEMPLATE_BYTES_MAX = 1 << 20 };

/* Starts python3 by posix_spawn with a clean signal mask and RLIMITs; NULL in *out (and STATUS_OK)
 * when there is no python3 with jinja2. Call before MPI_Init and before any thread. */
enum status chat_helper_start(chat_helper **out);
void chat_helper_stop(chat_helper *helper);

/* template_text: Jinja source, or NULL. builtin: "chatml", "llama3", "deepseek-r1", or NULL for the
 * model's own. bos/eos: their texts, for the template's variables. A template with neither helper
 * nor a matching built-in is STATUS_MODEL with the fix. */
enum status chat_open(chat_helper *helper, const char *template_text, const char *builtin,
                      const char *bos_text, const char *eos_text, chat **out);
void chat_close(chat *c);

/* messages_json: a JSON array as in the API (content strings or text parts are the caller's to
 * check and flatten). kwargs_json: JSON object of extra template variables, or NULL. The prompt is
 * malloc'ed. STATUS_REQUEST with the template's own message when it raises. */
enum status chat_render(chat *c, const char *messages_json, bool add_generation_prompt,
                        bool continue_final_message, const char *kwargs_json, char **prompt,
                        size_t *n);

/* Nobody waits for what the helper renders: it is stopped after a moment, and so is all that comes later,
 * until chat_expect. */
void chat_abandon(chat *c);
void chat_expect(chat *c);

#endif
