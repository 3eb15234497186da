/* render.c: see render.h. */
#include "serve/render.h"

#include <stdlib.h>
#include <sys/eventfd.h>
#include <threads.h>
#include <unistd.h>

struct render {
    renderer *owner;
    render *next;
    struct body_template template;
    render_done *done;
    void *user;
    bool cancelled; /* under the lock */
    char *text;     /* NULL: fault */
    size_t n;
    struct fault fault;
};

struct list {
    render *first, *last;
};

struct renderer {
    struct event *on_finished;
    int fd; /* an eventfd: something has finished */
    int count, max;
    bool started;
    thrd_t thread;
    mtx_t lock; /* of all below */
    cnd_t more;
    struct list waiting, finished;
    render *running;
    bool leaving;
};

static void append(struct list *l, render *job) {
    job->next = NULL;
    if (l->last) {
        l->last->next = job;
    } else {
        l->first = job;
    }
    l->last = job;
}

static render *take(struct list *l) {
    render *job = l->first;
    if (!job) return NULL;
    l->first = job->next;
    if (!l->first) l->last = NULL;
    return job;
}

static bool drop(struct list *l, const render *job) {
    render *before = NULL, *at = l->first;
    while (at && at != job) {
        before = at;
        at = at->next;
    }
    if (!at) return false;
    if (before) {
        before->next = at->next;
    } else {
        l->first = at->next;
    }
    if (l->last == at) l->last = before;
    return true;
}

static void render_free(render *job) {
    job->owner->count--;
    body_template_fini(&job->template);
    free(job->text);
    free(job);
}

/* ---- the thread ---- */

static int work(void *user) {
    const uint64_t one = 1;
    renderer *r = user;
    mtx_lock(&r->lock);
    for (;;) {
        while (!r->waiting.first && !r->leaving) cnd_wait(&r->more, &r->lock);
        if (r->leaving) break;
        render *job = r->running = take(&r->waiting);
        chat_expect(job->template.chat);
        mtx_unlock(&r->lock);
        if (body_render(&job->template, &job->text, &job->n) != STATUS_OK)
            job->fault = *fail_last();
        mtx_lock(&r->lock);
        r->running = NULL;
        append(&r->finished, job);
        (void)!write(r->fd, &one, sizeof one);
    }
    mtx_unlock(&r->lock);
    return 0;
}

/* ---- the loop ---- */

static render *take_finished(renderer *r) {
    mtx_lock(&r->lock);
    render *job = take(&r->finished);
    mtx_unlock(&r->lock);
    return job;
}

/* One by one: a done function may cancel others that have finished. */
static void on_finished(evutil_socket_t fd, short what, void *user) {
    renderer *r = user;
    uint64_t count;
    render *job;
    (void)what;
    if (read(fd, &count, sizeof count) < 0) return;
    while ((job = take_finished(r)) != NULL) {
        if (!job->cancelled) {
            const struct fault *f = &job->fault;
            if (!job->text) fail_param(f->status, f->param, f->code, "%s", f->text);
            job->done(job->user, job->text, job->n);
        }
        render_free(job);
    }
}

enum status render_start(renderer *r, struct body_template *t, render_done *done, void *user,
                         render **out) {
    *out = NULL;
    if (r->count == r->max)
        return fail(STATUS_BUSY, "%d chat templates wait to be rendered: try again later", r->max);
    if (!r->started && thrd_create(&r->thread, work, r) != thrd_success)
        return fail(STATUS_MEMORY, "the system gives no thread for chat templates");
    r->started = true;
    render *job = calloc(1, sizeof *job);
    if (!job) return fail(STATUS_MEMORY, "no memory for a chat template");
    *job = (render){.owner = r, .template = *t, .done = done, .user = user};
    *t = (struct body_template){0};
    r->count++;
    mtx_lock(&r->lock);
    append(&r->waiting, job);
    cnd_signal(&r->more);
    mtx_unlock(&r->lock);
    *out = job;
    return STATUS_OK;
}

void render_cancel(render *job) {
    renderer *r = job->owner;
    mtx_lock(&r->lock);
    const bool waited = drop(&r->waiting, job);
    job->cancelled = true; /* else it runs or has finished: on_finished frees it */
    if (r->running == job) chat_abandon(job->template.chat);
    mtx_unlock(&r->lock);
    if (waited) render_free(job);
}

/* ---- life ---- */

enum status renderer_new(struct event_base *base, int jobs_max, renderer **out) {
    *out = NULL;
    renderer *r = calloc(1, sizeof *r);
    if (!r) return fail(STATUS_MEMORY, "no memory for chat templates");
    r->max = jobs_max;
    r->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    r->on_finished = event_new(base, r->fd, EV_READ | EV_PERSIST, on_finished, r);
    mtx_init(&r->lock, mtx_plain);
    cnd_init(&r->more);
    if (r->fd < 0 || !r->on_finished || event_add(r->on_finished, NULL) != 0) {
        renderer_free(r);
        return fail(STATUS_MEMORY, "no memory or no file descriptors for chat templates");
    }
    *out = r;
    return STATUS_OK;
}

void renderer_free(renderer *r) {
    render *job;
    if (!r) return;
    if (r->started) {
        mtx_lock(&r->lock);
        r->leaving = true;
        if (r->running) chat_abandon(r->running->template.chat);
        cnd_signal(&r->more);
        mtx_unlock(&r->lock);
        thrd_join(r->thread, NULL);
    }
    while ((job = take(&r->waiting)) != NULL || (job = take(&r->finished)) != NULL) {
        render_free(job);
    }
    if (r->on_finished) event_free(r->on_finished);
    if (r->fd >= 0) close(r->fd);
    cnd_destroy(&r->more);
    mtx_destroy(&r->lock);
    free(r);
}
