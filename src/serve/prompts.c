/* prompts.c: see prompts.h. */
#include "serve/prompts.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <threads.h>
#include <unistd.h>

struct prompt_job {
    prompter *owner;
    prompt_job *next;
    struct prompt_order order;
    prompt_done *done;
    void *user;
    bool cancelled; /* under the lock */
    enum status status;
    struct fault fault; /* of a status that is not STATUS_OK */
};

enum { SHORT_BYTES = 8 << 10 }; /* a millisecond of tokenizing at most */

struct list {
    prompt_job *first, *last;
};

struct prompter {
    struct event *on_finished;
    struct metrics *metrics;
    int fd; /* an eventfd: something has finished */
    int count, max;
    bool started;
    thrd_t thread;
    mtx_t lock; /* of all below */
    cnd_t more;
    struct list waiting, finished;
    prompt_job *running;
    bool leaving;
};

static void append(struct list *l, prompt_job *job) {
    job->next = NULL;
    if (l->last) {
        l->last->next = job;
    } else {
        l->first = job;
    }
    l->last = job;
}

static prompt_job *take(struct list *l) {
    prompt_job *job = l->first;
    if (!job) return NULL;
    l->first = job->next;
    if (!l->first) l->last = NULL;
    return job;
}

static bool drop(struct list *l, const prompt_job *job) {
    prompt_job *before = NULL, *at = l->first;
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

static void job_free(prompt_job *job) {
    job->owner->count--;
    prompt_order_fini(&job->order);
    free(job);
}

/* ---- orders ---- */

enum status prompt_order_add(struct prompt_order *o, const char *text, size_t n) {
    ASSERT(o->count < BODY_PROMPTS_MAX);
    char *copy = malloc(n + 1);
    if (!copy) return fail(STATUS_MEMORY, "no memory for a prompt of %zu bytes", n);
    memcpy(copy, text, n);
    o->all[o->count++] = (struct prompt_made){.text = copy, .n = n};
    return STATUS_OK;
}

bool prompt_order_is_short(const struct prompt_order *o) {
    size_t bytes = 0;
    for (int i = 0; i < o->count; i++) bytes += o->all[i].n;
    return !o->template.chat && bytes <= SHORT_BYTES;
}

void prompt_order_fini(struct prompt_order *o) {
    body_template_fini(&o->template);
    for (int i = 0; i < o->count; i++) {
        free(o->all[i].text);
        free(o->all[i].ids);
    }
    o->count = 0;
}

enum status prompt_order_make(struct prompt_order *o) {
    if (o->template.chat) {
        struct prompt_made *rendered = &o->all[0];
        TRY(body_render(&o->template, &rendered->text, &rendered->n));
        o->count = 1;
    }
    for (int i = 0; o->tokenizer && i < o->count; i++) {
        struct prompt_made *m = &o->all[i];
        TRY(tokenizer_encode(o->tokenizer, m->text, m->n, o->add_special, &m->ids, &m->count));
    }
    return STATUS_OK;
}

/* ---- the thread ---- */

static int work(void *user) {
    const uint64_t one = 1;
    prompter *p = user;
    mtx_lock(&p->lock);
    for (;;) {
        while (!p->waiting.first && !p->leaving) cnd_wait(&p->more, &p->lock);
        if (p->leaving) break;
        prompt_job *job = p->running = take(&p->waiting);
        if (job->order.template.chat) chat_expect(job->order.template.chat);
        mtx_unlock(&p->lock);
        job->status = prompt_order_make(&job->order);
        if (job->status != STATUS_OK) job->fault = *fail_last();
        mtx_lock(&p->lock);
        p->running = NULL;
        append(&p->finished, job);
        (void)!write(p->fd, &one, sizeof one);
    }
    mtx_unlock(&p->lock);
    return 0;
}

/* Of a job that runs, when nobody waits for it any more: a template is; a tokenizer is soon done. */
static void stop(const prompt_job *job) {
    if (job->order.template.chat) chat_abandon(job->order.template.chat);
}

/* ---- the loop ---- */

static prompt_job *take_finished(prompter *p) {
    mtx_lock(&p->lock);
    prompt_job *job = take(&p->finished);
    mtx_unlock(&p->lock);
    return job;
}

static void deliver(prompt_job *job) {
    const struct fault *f = &job->fault;
    if (job->status == STATUS_OK) {
        job->done(job->user, job->order.all, NULL);
        return;
    }
    fail_param(f->status, f->param, f->code, "%s", f->text);
    const struct refused why = refused_last();
    job->done(job->user, NULL, &why);
}

/* One by one: a done function may cancel others that have finished. */
static void deliver_finished(prompter *p) {
    prompt_job *job;
    while ((job = take_finished(p)) != NULL) {
        if (!job->cancelled) deliver(job);
        job_free(job);
    }
}

static void on_finished(evutil_socket_t fd, short what, void *user) {
    uint64_t count;
    (void)what;
    if (read(fd, &count, sizeof count) < 0) return;
    deliver_finished(user);
}

int prompter_count(const prompter *p) { return p->count; }

/* NULL: nobody waits for one that has not finished. Cancelled, and its template stopped, if it runs. */
static prompt_job *take_unfinished(prompter *p, bool *runs) {
    mtx_lock(&p->lock);
    prompt_job *job = take(&p->waiting);
    *runs = !job;
    if (!job && p->running && !p->running->cancelled) {
        job = p->running;
        job->cancelled = true; /* on_finished frees it */
        stop(job);
    }
    mtx_unlock(&p->lock);
    return job;
}

void prompter_end_all(prompter *p, const struct refused *why) {
    prompt_job *job;
    bool runs;
    while ((job = take_unfinished(p, &runs)) != NULL) {
        job->done(job->user, NULL, why);
        if (!runs) job_free(job);
    }
    deliver_finished(p);
}

enum status prompts_start(prompter *p, struct prompt_order *o, prompt_done *done, void *user,
                          prompt_job **out) {
    *out = NULL;
    enum { REJECTED_QUEUE };
    if (p->count == p->max) {
        metric_add(p->metrics, METRIC_rejections, REJECTED_QUEUE, 1);
        return fail(STATUS_BUSY, "%d prompts wait to be made: try again later", p->max);
    }
    if (!p->started && thrd_create(&p->thread, work, p) != thrd_success)
        return fail(STATUS_MEMORY, "the system gives no thread for prompts");
    p->started = true;
    prompt_job *job = calloc(1, sizeof *job);
    if (!job) return fail(STATUS_MEMORY, "no memory for a prompt");
    job->owner = p;
    job->order = *o;
    job->done = done;
    job->user = user;
    memset(o, 0, sizeof *o);
    p->count++;
    mtx_lock(&p->lock);
    append(&p->waiting, job);
    cnd_signal(&p->more);
    mtx_unlock(&p->lock);
    *out = job;
    return STATUS_OK;
}

void prompts_cancel(prompt_job *job) {
    prompter *p = job->owner;
    mtx_lock(&p->lock);
    const bool waited = drop(&p->waiting, job);
    job->cancelled = true; /* else it runs or has finished: on_finished frees it */
    if (p->running == job) stop(job);
    mtx_unlock(&p->lock);
    if (waited) job_free(job);
}

/* ---- life ---- */

enum status prompter_new(struct event_base *base, struct metrics *metrics, int jobs_max,
                         prompter **out) {
    *out = NULL;
    prompter *p = calloc(1, sizeof *p);
    if (!p) return fail(STATUS_MEMORY, "no memory for prompts");
    p->metrics = metrics;
    p->max = jobs_max;
    p->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->on_finished = event_new(base, p->fd, EV_READ | EV_PERSIST, on_finished, p);
    mtx_init(&p->lock, mtx_plain);
    cnd_init(&p->more);
    if (p->fd < 0 || !p->on_finished || event_add(p->on_finished, NULL) != 0) {
        prompter_free(p);
        return fail(STATUS_MEMORY, "no memory or no file descriptors for prompts");
    }
    *out = p;
    return STATUS_OK;
}

void prompter_free(prompter *p) {
    prompt_job *job;
    if (!p) return;
    if (p->started) {
        mtx_lock(&p->lock);
        p->leaving = true;
        if (p->running) stop(p->running);
        cnd_signal(&p->more);
        mtx_unlock(&p->lock);
        thrd_join(p->thread, NULL);
    }
    while ((job = take(&p->waiting)) != NULL || (job = take(&p->finished)) != NULL) {
        job_free(job);
    }
    if (p->on_finished) event_free(p->on_finished);
    if (p->fd >= 0) close(p->fd);
    cnd_destroy(&p->more);
    mtx_destroy(&p->lock);
    free(p);
}
