/* access.h: who may call (serving.md §7): keys, Host, Origin, the bind rule.
 *
 * Keys come from --api-key, SFUMATO_API_KEY and --api-key-file (one a line). Only their digests
 * are kept; a given key is compared with every one of them in constant time. Without keys a server
 * on a loopback address answers only to loopback Host names (DNS rebinding), and /admin only to
 * loopback peers. Refuses to know: HTTP objects; it is given texts. Thread: net. Memory: one
 * struct, read-only after access_new.
 */
#ifndef SFUMATO_SERVE_ACCESS_H
#define SFUMATO_SERVE_ACCESS_H

#include <stdbool.h>

#include "base/check.h"
#include "base/params.h"

struct access;

/* STATUS_USAGE: a key file that cannot be read, an address other than loopback without a key. */
enum status access_new(const struct params *params, struct access **out);
void access_free(struct access *a);

bool access_needs_key(const struct access *a);
/* header: the value of Authorization ("Bearer KEY"), or NULL. True when no key is needed. */
bool access_key_ok(const struct access *a, const char *header);
/* host: the value of Host or :authority, or NULL. */
bool access_host_ok(const struct access *a, const char *host);
/* /admin/...: a key where there are keys; else a loopback peer of a server bound to loopback. */
bool access_admin_ok(const struct access *a, const char *header, const char *peer);
/* An Origin header: true when listed by --allowed-origins ("*" lists all). */
bool access_origin_ok(const struct access *a, const char *origin);

/* "127.0.0.1", "::1", "127.8.9.10", "localhost", "[::1]:8000" and the like. */
bool access_is_loopback(const char *name);

#endif
