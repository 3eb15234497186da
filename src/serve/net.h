/* net.h: the net thread of rank 0: one event loop, the service on it, and the protocols in front.
 *
 *   main thread: net_open (listeners, signals) ─► net_start ─► net_progress … net_ready ─► net_join
 *   net thread:  loop { sockets, timers, signalfd, up mailbox } until drained or told to leave
 *
 * A protocol is a `struct front` in the table of net.c: it opens its own listener on the loop and
 * calls the service. The signals of serving.md §8 are read here; they must be blocked in every
 * thread of every rank before MPI_Init (net_block_signals). Listeners open before the weights load.
 * Thread: net_open, net_start and net_join belong to the main thread, everything else as noted.
 */
#ifndef SFUMATO_SERVE_NET_H
#define SFUMATO_SERVE_NET_H

#include <event2/event.h>

#include "base/params.h"
#include "serve/access.h"
#include "serve/messages.h"
#include "serve/metrics.h"
#include "serve/service.h"

typedef struct net net;

/* What a protocol needs of its surroundings; all of it outlives the front. */
struct front_site {
    struct event_base *base;
    service *service;
    struct access *access; /* keys, Host and Origin rules */
    struct metrics *metrics;
    const struct params *params;
    net *net;
};

/* A protocol. All entries run on the net thread, but open, which runs before the thread starts. */
struct front {
    const char *name;
    /* Opens the listener. *state stays NULL when the protocol is not wanted (no port given).
     * STATUS_USAGE: the address cannot be had. */
    enum status (*open)(const struct front_site *site, void **state);
    int (*port)(const void *state); /* the real one, for the ready line */
    /* The service drains: say so to clients (GOAWAY). New calls are refused by the service. May be
     * NULL. */
    void (*drain)(void *state);
    /* The engine's news have been read: what is gathered for the sockets goes out. May be NULL. */
    void (*flush)(void *state);
    /* Answers not yet written to their sockets: the loop stays a little for them. */
    bool (*busy)(const void *state);
    void (*close)(void *state); /* closes listener and connections */
};

/* SIGUSR1, SIGTERM, SIGINT, SIGPIPE: on every rank, before MPI_Init. */
void net_block_signals(void);

/* model_name: for /metrics, which answers while the model loads. */
enum status net_open(const struct params *params, const char *model_name, int ranks, net **out);
enum status net_start(net *n);
struct wires *net_wires(net *n);
struct metrics *net_metrics(net *n);
int net_port(const net *n);              /* of HTTP */
void net_progress(net *n, double ratio); /* any thread */
/* The engine is there: facts stay valid until net_join. Main thread. */
void net_ready(net *n, const struct body_facts *facts);
/* This process is about to end the job with this code (watchdog, bug): writes error events to all
 * clients and returns after at most half a second. Any thread but the net thread. */
void net_engine_died(net *n, int exit_code, const char *text);
bool net_is_this_thread(const net *n);
/* After DOWN_STOP: waits until the last answers are written. True: requests were aborted. Without a
 * ready engine: stops the loop at once. */
bool net_join(net *n);
void net_free(net *n);

/* A drain from a client (/admin/drain); net thread. */
void net_drain(net *n);

#endif
