/* tls.h: TLS for the listeners, by OpenSSL through libevent (--ssl-certfile, --ssl-keyfile).
 *
 *   front ─ open ─► tls_open ─► context       accept ─► tls_wire ─► a bufferevent that speaks TLS
 *
 * One certificate, TLS 1.2 and later, one protocol a listener (ALPN: "http/1.1" or "h2"); no client
 * certificates, no reload: a proxy does that. Without OpenSSL in the build the flags are refused by
 * params.def and every context is NULL. OpenSSL stays behind tls.c. Thread: net.
 */
#ifndef SFUMATO_SERVE_TLS_H
#define SFUMATO_SERVE_TLS_H

#include <event2/bufferevent.h>

#include "base/params.h"

struct tls;

/* *out NULL: no certificate was asked for. STATUS_USAGE names the file that cannot be used. */
enum status tls_open(const struct params *params, const char *protocol, struct tls **out);
void tls_close(struct tls *t);
/* A connection on an accepted socket (-1: given later); plain when t is NULL. NULL: no memory. */
struct bufferevent *tls_wire(struct tls *t, struct event_base *base, evutil_socket_t fd,
                             int options);

#endif
