/* embedded.c: see embedded.h. SFUMATO_PAGE and SFUMATO_OPENAPI are the paths of the two files, which
 * only this build knows.
 */
#include "serve/embedded.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "base/sha256.h"

#define INCLUDE_FILE(name, path)                                          \
    __asm__(".pushsection .rodata\n.balign 16\n.global " #name "\n" #name \
            ":\n.incbin "                                                 \
            "\"" path "\"\n.global " #name "_end\n" #name "_end:\n.byte 0\n.popsection\n")

INCLUDE_FILE(embedded_page, SFUMATO_PAGE);
INCLUDE_FILE(embedded_openapi, SFUMATO_OPENAPI);
extern const char embedded_page_end[], embedded_openapi_end[];

size_t embedded_page_bytes(void) { return (size_t)(embedded_page_end - embedded_page); }
size_t embedded_openapi_bytes(void) { return (size_t)(embedded_openapi_end - embedded_openapi); }

static void base64(const unsigned char *bytes, size_t n, char *out) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        const unsigned all = (unsigned)bytes[i] << 16 | (i + 1 < n ? bytes[i + 1] << 8 : 0) |
                             (i + 2 < n ? bytes[i + 2] : 0);
        *out++ = digits[all >> 18];
        *out++ = digits[all >> 12 & 63];
        *out++ = i + 1 < n ? digits[all >> 6 & 63] : '=';
        *out++ = i + 2 < n ? digits[all & 63] : '=';
    }
    *out = '\0';
}

/* Appends 'sha256-...' of every <TAG ...>...</TAG> of the page. */
static void add_hashes(const char *tag, char *policy, size_t capacity) {
    char open[16], close[16];
    snprintf(open, sizeof open, "<%s", tag);
    snprintf(close, sizeof close, "</%s>", tag);
    for (const char *at = embedded_page; (at = strstr(at, open)) != NULL;) {
        const char *begin = strchr(at, '>');
        const char *end = begin ? strstr(begin, close) : NULL;
        if (!end) return;
        unsigned char digest[SHA256_BYTES];
        char text[64];
        begin++;
        sha256(begin, (size_t)(end - begin), digest);
        base64(digest, sizeof digest, text);
        const size_t n = strlen(policy);
        snprintf(policy + n, capacity - n, " 'sha256-%s'", text);
        at = end;
    }
}

const char *embedded_page_policy(void) {
    static char policy[2048];
    if (*policy) return policy;
    strcpy(policy,
           "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
           "form-action 'none'; frame-ancestors 'none'; script-src");
    add_hashes("script", policy, sizeof policy);
    strcat(policy, "; style-src");
    add_hashes("style", policy, sizeof policy);
    return policy;
}
