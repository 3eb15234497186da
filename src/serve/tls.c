/* tls.c: see tls.h. */
#include "serve/tls.h"

#ifdef SFUMATO_WITH_TLS

#include <errno.h>
#include <event2/bufferevent_ssl.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PROTOCOL_BYTES = 16 };

struct tls {
    SSL_CTX *context;
    unsigned char protocol[PROTOCOL_BYTES]; /* as ALPN writes it: length, name */
    unsigned protocol_n;
};

/* ALPN: ours, or an alert; a client that says nothing gets it anyway. */
static int choose(SSL *ssl, const unsigned char **out, unsigned char *out_n,
                  const unsigned char *offered, unsigned offered_n, void *user) {
    const struct tls *t = user;
    (void)ssl;
    const int found = SSL_select_next_proto((unsigned char **)out, out_n, t->protocol,
                                            t->protocol_n, offered, offered_n);
    return found == OPENSSL_NPN_NEGOTIATED ? SSL_TLSEXT_ERR_OK : SSL_TLSEXT_ERR_ALERT_FATAL;
}

/* Never ask on the terminal. */
static int no_password(char *bytes, int n, int writing, void *user) {
    (void)bytes, (void)n, (void)writing, (void)user;
    return 0;
}

/* OpenSSL's reason is about bytes; what people get wrong is told first. */
static enum status cannot_use(const char *flag, const char *path, const char *what) {
    const unsigned long error = ERR_peek_last_error();
    const char *reason = error ? ERR_reason_error_string(error) : NULL;
    ERR_clear_error();
    return fail(STATUS_USAGE, "%s %s: %s%s%s%s", flag, path, what, reason ? " (" : "",
                reason ? reason : "", reason ? ")" : "");
}

static enum status check_readable(const char *flag, const char *path) {
    if (access(path, R_OK) == 0) return STATUS_OK;
    return fail(STATUS_USAGE, "%s %s: %s", flag, path, strerror(errno));
}

static enum status load(struct tls *t, const struct params *p) {
    const char *certificate = p->ssl_certfile, *key = p->ssl_keyfile;
    TRY(check_readable("--ssl-certfile", certificate));
    TRY(check_readable("--ssl-keyfile", key));
    if (SSL_CTX_use_certificate_chain_file(t->context, certificate) != 1) {
        return cannot_use("--ssl-certfile", certificate, "it holds no PEM certificate");
    }
    if (SSL_CTX_use_PrivateKey_file(t->context, key, SSL_FILETYPE_PEM) != 1) {
        if (ERR_GET_REASON(ERR_peek_last_error()) == X509_R_KEY_VALUES_MISMATCH) {
            ERR_clear_error();
            return fail(STATUS_USAGE, "--ssl-keyfile %s: it is not the key of --ssl-certfile %s",
                        key, certificate);
        }
        return cannot_use("--ssl-keyfile", key, "it holds no PEM key without a password");
    }
    return STATUS_OK;
}

enum status tls_open(const struct params *params, const char *protocol, struct tls **out) {
    enum status status;
    const size_t n = strlen(protocol);
    *out = NULL;
    if (!params->ssl_certfile && !params->ssl_keyfile) return STATUS_OK;
    if (!params->ssl_certfile || !params->ssl_keyfile) {
        return fail(STATUS_USAGE, "--ssl-certfile and --ssl-keyfile need each other");
    }
    struct tls *t = calloc(1, sizeof *t);
    if (!t) return fail(STATUS_MEMORY, "no memory for TLS");
    ASSERT_LT(n, PROTOCOL_BYTES);
    t->protocol[0] = (unsigned char)n;
    memcpy(t->protocol + 1, protocol, n);
    t->protocol_n = (unsigned)n + 1;
    t->context = SSL_CTX_new(TLS_server_method());
    if (!t->context) TRY_GOTO(fail(STATUS_MEMORY, "no memory for TLS"), out);
    SSL_CTX_set_min_proto_version(t->context, TLS1_2_VERSION);
    SSL_CTX_set_options(t->context, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    SSL_CTX_set_default_passwd_cb(t->context, no_password);
    SSL_CTX_set_alpn_select_cb(t->context, choose, t);
    TRY_GOTO(load(t, params), out);
    *out = t;
    return STATUS_OK;
out:
    tls_close(t);
    return status;
}

void tls_close(struct tls *t) {
    if (!t) return;
    SSL_CTX_free(t->context);
    free(t);
}

static struct bufferevent *secure_wire(struct tls *t, struct event_base *base, evutil_socket_t fd,
                                       int options) {
    SSL *ssl = SSL_new(t->context);
    if (!ssl) return NULL;
    struct bufferevent *wire = bufferevent_openssl_socket_new(
        base, fd, ssl, BUFFEREVENT_SSL_ACCEPTING, options | BEV_OPT_CLOSE_ON_FREE);
    if (!wire) {
        SSL_free(ssl);
        return NULL;
    }
    /* Most clients just close; messages have lengths of their own. */
    bufferevent_openssl_set_allow_dirty_shutdown(wire, 1);
    return wire;
}

#else

static struct bufferevent *secure_wire(struct tls *t, struct event_base *base, evutil_socket_t fd,
                                       int options) {
    (void)t, (void)base, (void)fd, (void)options;
    return NULL;
}

enum status tls_open(const struct params *params, const char *protocol, struct tls **out) {
    (void)params, (void)protocol;
    *out = NULL;
    return STATUS_OK;
}

void tls_close(struct tls *t) { (void)t; }

#endif

struct bufferevent *tls_wire(struct tls *t, struct event_base *base, evutil_socket_t fd,
                             int options) {
    return t ? secure_wire(t, base, fd, options) : bufferevent_socket_new(base, fd, options);
}
