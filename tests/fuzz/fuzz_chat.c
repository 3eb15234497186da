/* layer: text */
/* fuzz_chat.c: a template's text, NUL, messages; the built-in format that the template is
 * recognised as (or the one that its first letter names) renders them. No helper process: what
 * Python does is not ours to fuzz. */
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "text/chat.h"
#include "text/utf8.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
    log_init(LOG_OFF, false);
    char *text = malloc(n + 1);
    ASSERT(text != NULL);
    if (n > 0) memcpy(text, bytes, n);
    text[n] = '\0';
    const size_t template_n = strlen(text);
    const char *messages =
        template_n < n ? text + template_n + 1 : "[{\"role\":\"user\",\"content\":\"a\"}]";
    const char *builtin = text[0] == 'c'   ? "chatml"
                          : text[0] == 'l' ? "llama3"
                          : text[0] == 'd' ? "deepseek-r1"
                                           : NULL;
    chat *c = NULL;
    if (chat_open(NULL, text, builtin, "<s>", NULL, &c) == STATUS_OK) {
        for (int mode = 0; mode < 3; mode++) {
            char *prompt = NULL;
            size_t prompt_n = 0;
            if (chat_render(c, messages, mode == 1, mode == 2, "{\"enable_thinking\":false}",
                            &prompt, &prompt_n) != STATUS_OK)
                continue;
            ASSERT_EQ(prompt[prompt_n], 0);
            free(prompt);
        }
        chat_close(c);
    }
    free(text);
    return 0;
}
