/* http.c: the HTTP/1.1 front: listener, connections, access rules, dispatch (serving.md §1, §5-§7).
 *
 *   accept ─► libevent (parses, limits) ─► on_request ─► connection limit, headers, Host, path,
 *                                                         OPTIONS, method, Origin, key, type ─► route
 *
 * libevent 2.1 has no limit on connections and tells nobody when an idle one closes. So the inode
 * of each socket is kept, and a sweep finds those that are gone. Its idle limit begins anew with
 * every byte: the sweep also ends connections that do not get a whole request together
 * (--receive-timeout). A connection beyond the limit is told so (503) when its first request has
 * come; beyond some more the listener rests until others have closed. An exchange lives until its last byte is written, or its connection is closed.
 * Thread: net. Memory: three words a connection, an exchange a request.
 */
#include "serve/http.h"

#include <event2/bufferevent.h>
#include <event2/keyvalq_struct.h>
#include <event2/listener.h>
#include <malloc.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "base/log.h"
#include "serve/http_parts.h"

enum { SWEEP_SECONDS = 1, TRIM_SWEEPS = 60, LARGE_BODY_BYTES = 1 << 20 };

/* ---- connections ---- */

/* The number of a closed descriptor is soon another socket's: its inode tells them apart. */
static bool is_open(const struct connection *c) {
    struct stat facts;
    return fstat(c->fd, &facts) == 0 && facts.st_ino == c->inode;
}

/* Closing is libevent's: it sees the end of the stream. */
static void end_if_late(const struct http *h, const struct connection *c) {
    if (c->waits_since == 0) return;
    if (service_clock() - c->waits_since > h->site.params->receive_timeout)
        shutdown(c->fd, SHUT_RDWR);
}

/* Bytes of one request that libevent may hold: it keeps a whole body, or chunk, before it parses it, and
 * the line with a chunk's size however long that is. */
static void limit_input(const struct http *h, struct bufferevent *connection) {
    const size_t most = (size_t)h->site.params->max_body_bytes + HTTP_HEADERS_MAX;
    bufferevent_setwatermark(connection, EV_READ, 0, most);
}

static void rest(struct http *h) {
    h->resting = true;
    evconnlistener_disable(h->listener);
}

/* Out of descriptors, mostly: the next sweep tries again. libevent would say it in every turn. */
static void on_accept_failed(struct evconnlistener *listener, void *user) {
    struct http *h = user;
    (void)listener;
    rest(h);
}

static void sweep(struct http *h) {
    int kept = 0;
    for (int i = 0; i < h->connection_count; i++) {
        if (!is_open(&h->connections[i])) continue;
        end_if_late(h, &h->connections[i]);
        h->connections[kept++] = h->connections[i];
    }
    h->connection_count = kept;
    if (h->resting && kept < h->connection_max + OVER_MAX) {
        h->resting = false;
        evconnlistener_enable(h->listener);
    }
}

static struct connection *find_connection(const struct http *h, int fd) {
    for (int i = 0; i < h->connection_count; i++) {
        if (h->connections[i].fd == fd) return &h->connections[i];
    }
    return NULL;
}

/* In the place of one that is gone and had the same descriptor, if the sweep has not come since. */
static void keep(struct http *h, int fd, ino_t inode) {
    struct connection *c = find_connection(h, fd);
    if (!c && h->connection_count == h->connection_max + OVER_MAX) return;
    if (!c) c = &h->connections[h->connection_count++];
    *c = (struct connection){fd, inode, service_clock()};
}

/* libevent gives the socket to a connection after on_accept, and nothing can close it before this
 * runs: it is next in the queue of the loop. */
static void on_fresh(evutil_socket_t fd, short what, void *user) {
    struct http *h = user;
    (void)fd;
    (void)what;
    for (int i = 0; i < h->fresh_count; i++) {
        const int socket = bufferevent_getfd(h->fresh[i]);
        struct stat facts;
        if (fstat(socket, &facts) == 0) keep(h, socket, facts.st_ino);
        bufferevent_decref(h->fresh[i]);
    }
    h->fresh_count = 0;
    if (h->connection_count >= h->connection_max) sweep(h);
}

static struct bufferevent *on_accept(struct event_base *base, void *user) {
    struct http *h = user;
    struct bufferevent *connection = tls_wire(h->tls, base, -1, 0);
    if (!connection) return NULL;
    limit_input(h, connection);
    bufferevent_incref(connection); /* libevent may drop it at once */
    h->fresh[h->fresh_count++] = connection;
    if (h->fresh_count == FRESH_MAX ||
        h->connection_count + h->fresh_count == h->connection_max + OVER_MAX)
        rest(h); /* ends this round of accepting */
    event_active(h->on_fresh, 0, 0);
    return connection;
}

/* NULL: closed, and swept already. */
static struct connection *connection_of(const struct http *h,
                                        struct evhttp_connection *connection) {
    return find_connection(h, bufferevent_getfd(evhttp_connection_get_bufferevent(connection)));
}

static bool is_over_limit(const struct http *h, const struct connection *c) {
    return c && c - h->connections >= h->connection_max;
}

/* ---- exchanges ---- */

static const char *peer_of(const struct exchange *x) {
    char *address = NULL;
    ev_uint16_t port = 0;
    evhttp_connection_get_peer(evhttp_request_get_connection(x->request), &address, &port);
    return address;
}

const char *http_find(const struct exchange *x, const char *name) {
    return evhttp_find_header(evhttp_request_get_input_headers(x->request), name);
}

static int count_headers(const struct exchange *x, const char *name) {
    int n = 0;
    for (const struct evkeyval *h = evhttp_request_get_input_headers(x->request)->tqh_first; h;
         h = h->next.tqe_next) {
        n += strcasecmp(h->key, name) == 0;
    }
    return n;
}

static bool has_prefix(const struct route *r) {
    const size_t n = strlen(r->path);
    return n > 1 && r->path[n - 1] == '/';
}

static const struct route *find_route(const char *path) {
    for (int i = 0; i < http_route_count; i++) {
        const struct route *r = &http_routes[i];
        const bool same =
            has_prefix(r) ? strncmp(path, r->path, strlen(r->path)) == 0 && path[strlen(r->path)]
                          : strcmp(path, r->path) == 0;
        if (same) return r;
    }
    return NULL;
}

static const char *allowed(const struct route *r) {
    return r->method == ROUTE_GET ? "GET, HEAD, OPTIONS" : "POST, OPTIONS";
}

static void refuse(struct exchange *x, enum refusal kind, const char *text) {
    const struct refused why = refused_as(kind, NULL, "%s", text);
    http_reply_error(x, &why);
}

/* "http://127.0.0.1:8000" of a page that this server sent itself. */
static bool is_own_origin(const char *origin, const char *host) {
    const char *name = strstr(origin, "://");
    return name && host && strcasecmp(name + 3, host) == 0;
}

static bool is_json(const char *type) {
    static const char json[] = "application/json";
    if (!type || strncasecmp(type, json, sizeof json - 1) != 0) return false;
    type += sizeof json - 1;
    return *type == '\0' || *type == ';' || *type == ' ';
}

/* Adds CORS headers; false when the origin is foreign and not listed. */
static bool check_origin(struct exchange *x, const char *host) {
    const char *origin = http_find(x, "Origin");
    if (!origin || is_own_origin(origin, host)) return true;
    if (!access_origin_ok(x->site->access, origin)) return false;
    http_header(x, "Access-Control-Allow-Origin", origin);
    http_header(x, "Access-Control-Expose-Headers", "X-Request-Id, Retry-After");
    http_header(x, "Vary", "Origin");
    return true;
}

/* A listed origin may send any header: clients have their own (X-Stainless-*), all of them without
 * effect here but those that are documented. */
static const char *allowed_headers(const struct exchange *x) {
    static const char letters[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_, ";
    const char *asked = http_find(x, "Access-Control-Request-Headers");
    return asked && *asked && asked[strspn(asked, letters)] == '\0'
               ? asked
               : "authorization, content-type, x-request-id, traceparent";
}

static void preflight(struct exchange *x) {
    http_header(x, "Allow", x->route ? allowed(x->route) : "GET, HEAD, POST, OPTIONS");
    if (http_find(x, "Origin")) {
        http_header(x, "Access-Control-Allow-Methods", "GET, HEAD, POST, OPTIONS");
        http_header(x, "Access-Control-Allow-Headers", allowed_headers(x));
        http_header(x, "Access-Control-Max-Age", "600");
    }
    http_reply(x, 204, NULL, NULL, 0);
}

/* Where the body ends must not be anybody's guess (RFC 9112 §6); libevent takes "+2" for a length,
 * and any coding that ends in "chunked". */
static bool is_framed(const struct exchange *x) {
    const char *length = http_find(x, "Content-Length"),
               *coding = http_find(x, "Transfer-Encoding");
    if (length && coding) return false;
    if (length && (!*length || length[strspn(length, "0123456789")])) return false;
    if (coding && strcasecmp(coding, "chunked") != 0) return false;
    return count_headers(x, "Content-Length") <= 1 && count_headers(x, "Transfer-Encoding") <= 1;
}

/* Everything that can be wrong before a route sees the request. False: answered. */
static bool check(struct exchange *x, enum evhttp_cmd_type method) {
    const struct access *access = x->site->access;
    const char *host = http_find(x, "Host");
    const char *key = http_find(x, "Authorization");
    const char *packed = http_find(x, "Content-Encoding");
    if (count_headers(x, "Host") != 1 || !is_framed(x)) {
        http_header(x, "Connection", "close");
        refuse(x, REFUSAL_INVALID,
               "one Host header is needed, and at most one of Content-Length (digits) and "
               "Transfer-Encoding (chunked)");
        return false;
    }
    if (!access_host_ok(access, host)) {
        refuse(x, REFUSAL_FORBIDDEN,
               "this server is bound to a loopback address and has no key: it answers only to "
               "loopback names in Host");
        return false;
    }
    if (!check_origin(x, host)) {
        refuse(x, REFUSAL_FORBIDDEN, "this origin is not listed by --allowed-origins");
        return false;
    }
    if (method == EVHTTP_REQ_OPTIONS) {
        preflight(x);
        return false;
    }
    if (!x->route) {
        refuse(x, REFUSAL_NO_PATH, "there is nothing at this path");
        return false;
    }
    const bool right = x->route->method == ROUTE_POST
                           ? method == EVHTTP_REQ_POST
                           : method == EVHTTP_REQ_GET || method == EVHTTP_REQ_HEAD;
    if (!right) {
        http_header(x, "Allow", allowed(x->route));
        refuse(x, REFUSAL_METHOD, "this path does not know this method");
        return false;
    }
    if (x->route->access == ROUTE_ADMIN && !access_needs_key(access) &&
        !access_admin_ok(access, key, peer_of(x))) {
        refuse(x, REFUSAL_FORBIDDEN,
               "/admin needs a key, or a loopback client of a server bound to loopback");
        return false;
    }
    if (x->route->access != ROUTE_OPEN && !access_key_ok(access, key)) {
        http_header(x, "WWW-Authenticate", "Bearer");
        refuse(x, REFUSAL_UNAUTHORIZED, "a valid key is needed: Authorization: Bearer KEY");
        return false;
    }
    if (method == EVHTTP_REQ_POST && !is_json(http_find(x, "Content-Type"))) {
        refuse(x, REFUSAL_MEDIA_TYPE, "the body must be sent as Content-Type: application/json");
        return false;
    }
    if (packed && *packed && strcasecmp(packed, "identity") != 0) {
        http_header(x, "Accept-Encoding", "identity");
        refuse(x, REFUSAL_MEDIA_TYPE, "the body must be sent without a Content-Encoding");
        return false;
    }
    return true;
}

/* ---- life of an exchange ---- */

static void unlink_exchange(struct exchange *x) {
    struct http *h = x->http;
    if (x->prev) {
        x->prev->next = x->next;
    } else {
        h->exchanges = x->next;
    }
    if (x->next) x->next->prev = x->prev;
}

/* libevent frees the connection. A request that was not answered it has taken out before: that one
 * is ours. */
static void on_closed(struct evhttp_connection *connection, void *user) {
    struct exchange *x = user;
    (void)connection;
    struct evhttp_request *request = x->answered ? NULL : x->request;
    if (!x->answered && x->on_gone) x->on_gone(x);
    if (!x->answered) x->status = 499;
    http_finish(x);
    if (request && !evhttp_request_get_connection(request)) evhttp_request_free(request);
}

/* The last byte was written. */
static void on_complete(struct evhttp_request *request, void *user) {
    static const struct timeval idle = {.tv_sec = HTTP_IDLE_SECONDS};
    struct evhttp_connection *connection = evhttp_request_get_connection(request);
    evhttp_connection_set_closecb(connection, NULL, NULL);
    struct exchange *x = user;
    bufferevent_set_timeouts(evhttp_connection_get_bufferevent(connection), &idle, &idle);
    limit_input(x->http, evhttp_connection_get_bufferevent(connection));
    struct connection *c = connection_of(x->http, connection);
    if (c) c->waits_since = service_clock();
    http_finish(x);
}

void http_finish(struct exchange *x) {
    unlink_exchange(x);
    http_count(x);
    if (x->http->gathering == x) x->http->gathering = NULL;
    x->http->bloated |= x->large;
    json_writer_fini(&x->out);
    free(x);
}

static struct exchange *exchange_new(struct http *h, struct evhttp_request *request) {
    struct evhttp_connection *connection = evhttp_request_get_connection(request);
    struct exchange *x = calloc(1, sizeof *x);
    if (!x) return NULL;
    x->http = h;
    x->site = &h->site;
    x->request = request;
    x->begin = service_clock();
    x->next = h->exchanges;
    if (x->next) x->next->prev = x;
    h->exchanges = x;
    evhttp_connection_set_closecb(connection, on_closed, x);
    evhttp_request_set_on_complete_cb(request, on_complete, x);
    return x;
}

/* After a request libevent stops reading, and would not see the client leave before it writes. So
 * reading goes on, without its callback, which takes more bytes now for a bug; what a client sends
 * ahead waits, up to a limit. */
void http_hold(struct exchange *x) {
    struct evhttp_connection *connection = evhttp_request_get_connection(x->request);
    struct bufferevent *b = evhttp_connection_get_bufferevent(connection);
    bufferevent_data_cb read, write;
    bufferevent_event_cb event;
    void *user;
    /* The idle limit would count from the request's last byte, however long thinking takes. */
    bufferevent_set_timeouts(b, NULL, NULL);
    bufferevent_getcb(b, &read, &write, &event, &user);
    bufferevent_setcb(b, NULL, write, event, user);
    bufferevent_setwatermark(b, EV_READ, 0, HTTP_AHEAD_MAX);
    bufferevent_enable(b, EV_READ);
    x->held = true;
}

/* A client that has sent so much ahead could leave without being seen to: it is not read any more. */
static void cut_who_is_ahead(struct http *h) {
    struct exchange *x = h->exchanges;
    while (x) {
        struct exchange *next = x->next; /* on_gone and http_cut end this one alone */
        struct evhttp_connection *connection = evhttp_request_get_connection(x->request);
        struct bufferevent *b = connection ? evhttp_connection_get_bufferevent(connection) : NULL;
        if (x->held && !x->answered && b &&
            evbuffer_get_length(bufferevent_get_input(b)) >= HTTP_AHEAD_MAX) {
            if (x->on_gone) x->on_gone(x);
            http_cut(x);
        }
        x = next;
    }
}

void http_answered(struct exchange *x, int status) {
    static const struct timeval idle = {.tv_sec = HTTP_IDLE_SECONDS};
    struct evhttp_connection *connection = evhttp_request_get_connection(x->request);
    struct bufferevent *b = evhttp_connection_get_bufferevent(connection);
    bufferevent_set_timeouts(b, NULL, &idle);
    x->answered = true;
    x->status = status;
}

void http_cut(struct exchange *x) {
    struct evhttp_connection *connection = evhttp_request_get_connection(x->request);
    evhttp_connection_set_closecb(connection, NULL, NULL);
    x->status = 499;
    http_finish(x);
    evhttp_connection_free(connection);
}

const char *http_body(struct exchange *x, size_t *n) {
    struct evbuffer *body = evhttp_request_get_input_buffer(x->request);
    *n = evbuffer_get_length(body);
    return *n > 0 ? (const char *)evbuffer_pullup(body, -1) : "";
}

static void on_request(struct evhttp_request *request, void *user) {
    struct http *h = user;
    const enum evhttp_cmd_type method = evhttp_request_get_command(request);
    const struct evhttp_uri *uri = evhttp_request_get_evhttp_uri(request);
    struct exchange *x = exchange_new(h, request);
    struct connection *c = connection_of(h, evhttp_request_get_connection(request));
    if (!x) {
        evhttp_send_error(request, 503, NULL);
        return;
    }
    if (c) c->waits_since = 0;
    x->method = method == EVHTTP_REQ_POST                               ? ROUTE_POST
                : method == EVHTTP_REQ_GET || method == EVHTTP_REQ_HEAD ? ROUTE_GET
                                                                        : ROUTE_OTHER;
    x->head = method == EVHTTP_REQ_HEAD;
    x->large = evbuffer_get_length(evhttp_request_get_input_buffer(request)) > LARGE_BODY_BYTES;
    x->path = uri ? evhttp_uri_get_path(uri) : NULL;
    if (!x->path || !*x->path) x->path = "/";
    /* libevent takes "//a/health" for a host and a path; a proxy's rule for paths did not */
    const char *target = evhttp_request_get_uri(request);
    if (target && strncmp(target, "//", 2) == 0) x->path = target;
    x->query = uri ? evhttp_uri_get_query(uri) : NULL;
    x->route = find_route(x->path);
    service_request_id(http_find(x, "X-Request-Id"), x->request_id);
    service_trace_id(http_find(x, "traceparent"), x->trace_id);
    if (is_over_limit(h, c)) {
        enum { CONNECTIONS = 2 };
        metric_add(h->site.metrics, METRIC_rejections, CONNECTIONS, 1);
        http_header(x, "Connection", "close");
        refuse(x, REFUSAL_OVERLOADED, "too many connections (--max-connections)");
        return;
    }
    if (check(x, method)) x->route->run(x);
}

/* ---- the front ---- */

static void on_sweep(evutil_socket_t fd, short what, void *user) {
    struct http *h = user;
    (void)fd;
    (void)what;
    sweep(h);
    cut_who_is_ahead(h);
    /* What is free again malloc would keep for ever: JSON of 8 MB can have been 600 MB of small values,
     * and every burst leaves holes. */
    if (!h->bloated && ++h->sweeps < TRIM_SWEEPS) return;
    malloc_trim(0);
    h->bloated = false;
    h->sweeps = 0;
}

static enum status listen_at(struct http *h) {
    const struct params *p = h->site.params;
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    struct addrinfo *found = NULL;
    char port[8], host[256];
    snprintf(port, sizeof port, "%d", (int)p->port);
    snprintf(host, sizeof host, "%s", p->host);
    if (*host == '[') { /* [::1] */
        memmove(host, host + 1, strlen(host));
        host[strcspn(host, "]")] = '\0';
    }
    const int error = getaddrinfo(host, port, &hints, &found);
    if (error) return fail(STATUS_USAGE, "--host %s: %s", p->host, gai_strerror(error));
    h->listener = evconnlistener_new_bind(
        h->site.base, NULL, NULL, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC | LEV_OPT_REUSEABLE,
        HTTP_BACKLOG, found->ai_addr, (int)found->ai_addrlen);
    const int because = EVUTIL_SOCKET_ERROR();
    freeaddrinfo(found);
    if (!h->listener) {
        return fail(STATUS_USAGE, "cannot listen at %s port %d: %s: choose another --port", p->host,
                    (int)p->port, evutil_socket_error_to_string(because));
    }
    const int on = 1; /* accepted sockets inherit it */
    setsockopt(evconnlistener_get_fd(h->listener), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return STATUS_OK;
}

static void http_close(void *state) {
    struct http *h = state;
    if (!h) return;
    if (h->sweep) event_free(h->sweep);
    if (h->evhttp) {
        evhttp_free(h->evhttp); /* with the listener, once it is bound */
    } else if (h->listener) {
        evconnlistener_free(h->listener);
    }
    if (h->on_fresh) event_free(h->on_fresh);
    tls_close(h->tls);
    free(h->connections);
    free(h);
}

static enum status http_open(const struct front_site *site, void **state) {
    static const struct timeval often = {.tv_sec = SWEEP_SECONDS};
    enum status status;
    *state = NULL;
    struct http *h = calloc(1, sizeof *h);
    if (!h) return fail(STATUS_MEMORY, "no memory for HTTP");
    h->site = *site;
    h->connection_max = (int)site->params->max_connections;
    h->connections = calloc((size_t)h->connection_max + OVER_MAX, sizeof *h->connections);
    h->sweep = event_new(site->base, -1, EV_PERSIST, on_sweep, h);
    h->on_fresh = event_new(site->base, -1, 0, on_fresh, h);
    TRY_GOTO(tls_open(site->params, "http/1.1", &h->tls), out);
    TRY_GOTO(listen_at(h), out);
    struct evhttp *evhttp = evhttp_new(site->base);
    if (!evhttp || !h->connections || !h->sweep || !h->on_fresh ||
        !evhttp_bind_listener(evhttp, h->listener)) {
        if (evhttp) evhttp_free(evhttp);
        TRY_GOTO(fail(STATUS_MEMORY, "no memory for HTTP"), out);
    }
    evconnlistener_set_error_cb(h->listener, on_accept_failed);
    h->evhttp = evhttp;
    evhttp_set_max_headers_size(evhttp, HTTP_HEADERS_MAX);
    evhttp_set_max_body_size(evhttp, (ev_ssize_t)site->params->max_body_bytes);
    evhttp_set_timeout(evhttp, HTTP_IDLE_SECONDS);
    evhttp_set_default_content_type(evhttp, NULL);
    evhttp_set_allowed_methods(evhttp, EVHTTP_REQ_GET | EVHTTP_REQ_POST | EVHTTP_REQ_HEAD |
                                           EVHTTP_REQ_PUT | EVHTTP_REQ_DELETE | EVHTTP_REQ_OPTIONS |
                                           EVHTTP_REQ_TRACE | EVHTTP_REQ_CONNECT |
                                           EVHTTP_REQ_PATCH);
    evhttp_set_bevcb(evhttp, on_accept, h);
    evhttp_set_gencb(evhttp, on_request, h);
    event_add(h->sweep, &often);
    *state = h;
    return STATUS_OK;
out:
    http_close(h);
    return status;
}

static int http_port(const void *state) {
    const struct http *h = state;
    struct sockaddr_storage address;
    socklen_t n = sizeof address;
    if (getsockname(evconnlistener_get_fd(h->listener), (struct sockaddr *)&address, &n) != 0)
        return 0;
    const struct sockaddr_in *v4 = (const struct sockaddr_in *)&address;
    const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)&address;
    return ntohs(address.ss_family == AF_INET6 ? v6->sin6_port : v4->sin_port);
}

static bool http_busy(const void *state) {
    const struct http *h = state;
    return h->exchanges != NULL;
}

const struct front http_front = {
    .name = "http",
    .open = http_open,
    .port = http_port,
    .flush = http_flush,
    .busy = http_busy,
    .close = http_close,
};
