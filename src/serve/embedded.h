/* embedded.h: files that are part of the program: the page at / and the description of the API.
 *
 * embedded.c takes them in byte by byte at build time (.incbin); a change of the files rebuilds it.
 * The page's policy allows exactly the inline scripts and styles that are in it, by their hashes.
 */
#ifndef SFUMATO_SERVE_EMBEDDED_H
#define SFUMATO_SERVE_EMBEDDED_H

#include <stddef.h>

extern const char embedded_page[], embedded_openapi[];
size_t embedded_page_bytes(void);
size_t embedded_openapi_bytes(void);
/* Value of Content-Security-Policy; made at the first call. Net thread. */
const char *embedded_page_policy(void);

#endif
