/* http_parts.h: what http.c and http_reply.c know of one another. */
#ifndef SFUMATO_SERVE_HTTP_PARTS_H
#define SFUMATO_SERVE_HTTP_PARTS_H

#include <sys/types.h>

#include "serve/http.h"
#include "serve/tls.h"

enum { OVER_MAX = 64, FRESH_MAX = 64 };

struct connection {
    int fd;
    ino_t inode;
    double waits_since; /* for a whole request; 0: for an answer */
};

struct http {
    struct front_site site;
    struct evhttp *evhttp;
    struct evconnlistener *listener;
    struct tls *tls;                /* NULL: plain */
    struct connection *connections; /* [connection_max + OVER_MAX], those beyond are too many */
    int connection_count, connection_max;
    struct bufferevent *fresh[FRESH_MAX]; /* accepted in this turn of the loop */
    int fresh_count;
    bool resting; /* the listener is disabled */
    bool bloated; /* a large body has been read, and what it became is free again */
    int sweeps;   /* since free memory went back to the system */
    struct event *sweep, *on_fresh;
    struct exchange *exchanges; /* not completely written yet */
    struct exchange *gathering; /* its `out` holds bytes; NULL: nobody's does */
};

/* Sends what is gathered. */
void http_flush(void *state);
/* Nothing more will be said: what is left to write must go out within the idle limit. */
void http_answered(struct exchange *x, int status);
/* Counts and frees the exchange. */
void http_finish(struct exchange *x);
void http_count(const struct exchange *x);

#endif
