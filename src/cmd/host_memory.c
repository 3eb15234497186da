/* host_memory.c: how long sequences may be and how many KV pages there are, from the memory there is.
 *
 *   free memory of the host / its ranks  =  weights + scratch + KV pages + reserve
 *
 * --kv-memory fixes the pages. Otherwise: what --max-num-seqs sequences of --max-model-len need, but no more
 * than KV_SHARE of what is left after the weights. A model length that was not asked for is cut to what fits;
 * one that was asked for and does not fit ends start-up (status 4) with a length that would. All ranks
 * end up with the same numbers: the smallest of each. A service takes the pages it has planned before it is
 * ready (host_take_pages); a batch of `generate` takes what it uses.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

#include "base/free_memory.h"
#include "base/log.h"
#include "cmd/host.h"
#include "kv/pages.h"

#define KV_SHARE 0.5
/* A GPU serves nothing else: nearly all of it, after what kernels and the driver need. */
#define KV_SHARE_DEVICE 0.95
enum { DEVICE_RESERVE_BYTES = 1 << 30 };

int64_t host_peak_bytes(void) {
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (int64_t)usage.ru_maxrss * 1024 : 0;
}

static int64_t pages_of(int64_t tokens) { return (tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS; }

/* pages: KV pages that would fit. */
static enum status no_room(const struct host *h, int64_t needed, int64_t available, int64_t pages) {
    char want[32], have[32], advice[128];
    const long long bytes = pages * h->need.kv_bytes_per_page, tokens = pages * KV_PAGE_TOKENS;
    const bool whole = tokens >= h->engine_options.max_model_len; /* a sequence of any length */
    if (pages < 1) {
        snprintf(advice, sizeof advice, "free memory, use more hosts, or a smaller model");
    } else if (whole) {
        snprintf(advice, sizeof advice, "--kv-memory %lld would fit", bytes);
    } else if (h->params.kv_memory > 0) {
        snprintf(advice, sizeof advice, "--max-model-len %lld with --kv-memory %lld would fit",
                 tokens, bytes);
    } else {
        snprintf(advice, sizeof advice, "--max-model-len %lld would fit", tokens);
    }
    return fail(STATUS_MEMORY, "a rank needs %s, %s are free: %s",
                progress_bytes((double)needed, want), progress_bytes((double)available, have),
                advice);
}

/* The part of what is left after weights and scratch that pages may take. */
static double kv_share(const struct host *h) {
    return h->backend->ops->free_bytes ? KV_SHARE_DEVICE : KV_SHARE;
}

/* Weights, scratch, and what must stay free. */
static int64_t fixed_bytes(const struct host *h) {
    const int64_t reserve = h->backend->ops->free_bytes ? DEVICE_RESERVE_BYTES : 0;
    return h->need.weight_bytes + h->need.scratch_bytes + reserve;
}

/* Fills in need, of this rank. The slots of sums that model_need counts are in comm_device_bytes again:
 * small beside the rest, and what is too much stays free. */
static enum status plan_need(struct host *h) {
    const struct comm_config sums = host_comm_config(h);
    TRY(model_need(&h->source->config, &h->model_options, h->shard_ranks, h->shard_rank, &h->need));
    h->need.scratch_bytes += model_workspace_bytes(&h->source->config, &h->model_options,
                                                   h->shard_ranks, h->shard_rank, h->backend) +
                             comm_device_bytes(h->comm, &sums);
    return STATUS_OK;
}

/* Pages this rank can hold, and its own view of whether the model fits at all. */
static enum status own_pages(struct host *h, int64_t *pages, int64_t *available) {
    const int local = comm_local_size(h->comm);
    TRY(plan_need(h));
    const struct backend_ops *ops = h->backend->ops;
    *available = ops->free_bytes ? ops->free_bytes(h->backend) : free_memory(local);
    const int64_t fixed = fixed_bytes(h);
    const int64_t page = h->need.kv_bytes_per_page > 0 ? h->need.kv_bytes_per_page : 1;
    if (fixed + page > *available) return no_room(h, fixed + page, *available, 0);
    const int64_t left = *available - fixed;
    *pages = h->params.kv_memory > 0 ? h->params.kv_memory / page
                                     : (int64_t)(kv_share(h) * (double)left) / page;
    if (h->params.kv_memory > left)
        return no_room(h, fixed + h->params.kv_memory, *available, left / page);
    return STATUS_OK;
}

/* left: bytes of the KV cache that are still to be taken; and scratch, which the first steps use. */
static enum status look_for_room(const struct host *h, int64_t left, int sharers) {
    const int64_t available = free_memory_of_host(sharers), scratch = h->need.scratch_bytes;
    if (left + scratch <= available) return STATUS_OK;
    const int64_t room = available - scratch + (int64_t)h->backend->kv_bytes - left;
    return no_room(h, left + scratch, available, room > 0 ? room / h->need.kv_bytes_per_page : 0);
}

/* Looks before each part: once memory is short, the system kills instead of refusing. */
static enum status take_parts(struct host *h) {
    enum { PART_BYTES = 1 << 28 };
    const int64_t all = (int64_t)h->backend->kv_bytes;
    const int parts = (int)(1 + all / PART_BYTES);
    enum status status = STATUS_OK;
    struct progress progress;
    progress_begin(&progress, "taking memory for the KV cache", all,
                   h->rank == 0 && !h->params.quiet);
    for (int p = 0; p < parts; p++) {
        /* others may have less left, or more */
        TRY_GOTO(look_for_room(h, all - all / parts * p, 1), out);
        TRY_GOTO(h->backend->ops->kv_take(h->backend, p, parts), out);
        progress_update(&progress, all / parts * (p + 1), NULL);
    }
out:
    progress_end(&progress);
    return status;
}

enum status host_take_pages(struct host *h) {
    if (!h->backend->ops->kv_take) return STATUS_OK;
    const int64_t all = (int64_t)h->backend->kv_bytes;
    TRY(comm_agree(h->comm, look_for_room(h, all, comm_local_size(h->comm))));
    return comm_agree(h->comm, take_parts(h));
}

/* Too few pages for a sequence of the length that was asked for, or for any. own: what this rank can hold;
 * of the ranks that can hold the fewest, the first one says so. */
static enum status too_few_pages(const struct host *h, int64_t own, int64_t pages,
                                 int64_t available) {
    const int64_t whole = pages_of(h->engine_options.max_model_len);
    if (own > pages) return STATUS_OK;
    if (h->params.kv_memory > 0) {
        char given[32], one[32];
        return fail(STATUS_MEMORY,
                    "--kv-memory %s holds %lld tokens, a sequence may have %lld, and a page of "
                    "%d takes "
                    "%s: raise it, or lower --max-model-len",
                    progress_bytes((double)h->params.kv_memory, given),
                    (long long)(pages * KV_PAGE_TOKENS), (long long)h->engine_options.max_model_len,
                    KV_PAGE_TOKENS, progress_bytes((double)h->need.kv_bytes_per_page, one));
    }
    const double kv = (double)(whole * h->need.kv_bytes_per_page) / kv_share(h);
    return no_room(h, fixed_bytes(h) + (int64_t)kv, available, pages);
}

enum status host_plan_memory(struct host *h) {
    int64_t own = 0, available = 0;
    TRY(comm_agree(h->comm, own_pages(h, &own, &available)));
    const int64_t whole = pages_of(h->engine_options.max_model_len);
    const int64_t wanted = whole * h->engine_options.max_seqs;
    if (h->params.kv_memory == 0 && own > wanted) own = wanted;
    if (own > INT32_MAX / KV_PAGE_TOKENS) own = INT32_MAX / KV_PAGE_TOKENS;
    const int64_t pages = comm_agree_min(h->comm, (int)own);
    if (pages < whole) {
        const int64_t fits = pages * KV_PAGE_TOKENS;
        if (h->params.max_model_len > 0 || pages < 1)
            TRY(comm_agree(h->comm, too_few_pages(h, own, pages, available)));
        log_info("the model's %lld positions are cut to %lld, which is what the KV cache holds",
                 (long long)h->engine_options.max_model_len, (long long)fits);
        h->engine_options.max_model_len = fits;
        h->model_options.max_positions = (int)fits;
        TRY(plan_need(h));
    }
    h->engine_options.page_count = (int32_t)pages;
    h->facts.max_model_len = h->engine_options.max_model_len;
    return STATUS_OK;
}
