/* run.c: a step of a run on one rank: the forward pass between two kernels that stand for the host.
 *
 *   slots ─► batch ─► model_forward ─► records ─► all-gather ─► think_step ─► slots, answers
 *
 * The same on every rank, in the order of one stream, so that it may be captured: a graph per shape of
 * step (rows, records, context), made when the shape comes a second time, and launched from then on.
 * Where sums of device memory pass the host, or a rank's device has no memory for a graph, it is queued anew
 * each time.
 *
 * Thread: engine. Memory: the backend's, taken when it was opened.
 */
#include "model/model_parts.h"

int model_run_rows(const model *m) { return m->be->run_rows; }

void model_run_begin(model *m, const struct batch *first, const struct run_row *rows) {
    m->be->ops->run->begin(m->be, first, rows);
}

static void queue_step(model *m) {
    backend *be = m->be;
    const struct run_ops *run = be->ops->run;
    const struct batch *batch = run->step(be);
    model_forward(m, batch);
    const struct run_exchange records = run->candidates(
        be, batch, m->logits, m->shard.slab_count, m->shard.vocab_begin, m->options.vocab_count);
    comm_all_gather(m->c, records.mine, records.bytes, records.all);
    run->decide(be, batch);
}

void model_run_step(model *m) {
    const struct run_ops *run = m->be->ops->run;
    const bool capturable = comm_capturable(m->c);
    if (capturable && run->replay(m->be)) return;
    const bool captured = capturable && run->capture(m->be);
    queue_step(m);
    /* other ranks may launch theirs: the same work in the same order */
    if (captured && !run->captured(m->be)) queue_step(m);
}

const struct run_answer *model_run_answer(model *m, int step, int row) {
    return m->be->ops->run->answer(m->be, step, row);
}

void model_run_stop(model *m, int row) { m->be->ops->run->stop(m->be, row); }
