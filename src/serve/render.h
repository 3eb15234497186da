/* render.h: chat templates rendered beside the event loop.
 *
 *   loop: render_start ─► queue ─► thread: body_render (up to 5 s) ─► finished ─► loop: done
 *
 * A template is a program of somebody else's: a slow one must not hold up streams, probes and other
 * requests. So one thread renders, in the order of arrival, because there is one helper process;
 * whoever waits is parked and may leave: a job that waits is dropped then, the one that runs is stopped,
 * so that clients who come and go leave no work behind. Owns: the queue (bounded), the thread. Refuses to know:
 * what the text is for. Threads: all functions belong to the loop's thread. Memory: malloc per job.
 */
#ifndef SFUMATO_SERVE_RENDER_H
#define SFUMATO_SERVE_RENDER_H

#include <event2/event.h>

#include "serve/body.h"

typedef struct renderer renderer;
typedef struct render render;

/* jobs_max: more are refused. The thread starts with the first job. */
enum status renderer_new(struct event_base *base, int jobs_max, renderer **out);
/* Waits for the thread, which drops what it does. No done function is called any more. */
void renderer_free(renderer *r);

/* text: borrowed until it returns; NULL: the failure is this thread's last. */
typedef void render_done(void *user, const char *text, size_t n);

/* Takes over what is in `t` and leaves it empty, or fails and leaves it alone. done: once, later,
 * unless cancelled. STATUS_BUSY: too many wait. */
enum status render_start(renderer *r, struct body_template *t, render_done *done, void *user,
                         render **out);
void render_cancel(render *job);

#endif
