/* http_parts.h: what http.c and http_reply.c know of one another. */
#ifndef SFUMATO_SERVE_HTTP_PARTS_H
#define SFUMATO_SERVE_HTTP_PARTS_H

#include "serve/http.h"

struct http {
    struct front_site site;
    struct evhttp *evhttp;
    struct evconnlistener *listener;
    struct bufferevent **connections; /* [connection_max + OVER_MAX], those beyond are too many */
    int connection_count, connection_max;
    bool resting; /* the listener is disabled */
    struct event *sweep;
};

/* The exchange gets no more news of its client; the idle limit applies again. */
void http_let_go(struct exchange *x);
/* Counts it and frees the exchange; status 499: nobody was there to be answered. */
void http_forget(struct exchange *x, int status);

#endif
