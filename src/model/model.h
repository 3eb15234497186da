/* model.h: a loaded model on one rank: weights in the backend, and the forward pass of a step.
 *
 * Owns the rank's packed weights, its KV cache, the activations and logits buffers. Refuses to
 * know: requests, sampling, text. model_step is the whole forward pass (dense.c), readable from top
 * to bottom; the comm_ calls in it are the only places where ranks meet. Thread: engine.
 */
#ifndef SFUMATO_MODEL_MODEL_H
#define SFUMATO_MODEL_MODEL_H

#include <stdint.h>

#include "backend/backend.h"
#include "backend/batch.h"
#include "backend/run.h"
#include "base/check.h"
#include "comm/comm.h"
#include "load/shard.h"
#include "load/source.h"

typedef struct model model;

struct model_options {
    enum backend_dtype weight_dtype, kv_dtype;
    int slabs; /* S */
    /* A bench of one rank may hold the share of rank slice_rank of slice_ranks; 0: the job's own. */
    int slice_ranks, slice_rank;
    int rows_max;       /* T of a step */
    int logit_rows_max; /* rows with logits in a step */
    int max_positions;  /* longest sequence: RoPE tables */
    int vocab_count;    /* ids the tokenizer knows (<= vocab_rows) */
};

/* Bytes one rank needs, before anything is taken (also `inspect`). */
struct model_need {
    int64_t weight_bytes; /* packed, this rank */
    int64_t kv_bytes_per_page;
    /* activations, logits, RoPE tables, communication slots; what a backend takes for each thread, a
     * few MB in all, is not in it */
    int64_t scratch_bytes;
};
enum status model_need(const struct model_config *config, const struct model_options *options,
                       int ranks, int rank, struct model_need *out);
/* Beside these, on a rank whose backend is open: what its kernels work in. After model_need was OK. */
int64_t model_workspace_bytes(const struct model_config *config,
                              const struct model_options *options, int ranks, int rank,
                              backend *be);

/* Loads this rank's shard. progress(user, done, total bytes) is called now and then on the calling
 * thread; NULL = silent. Not collective: bring the status to comm_agree afterwards. comm_setup must
 * have been called with slot_floats >= rows_max * hidden before the first step. */
enum status model_open(source *src, const struct model_options *options, backend *be, comm *c,
                       void (*progress)(void *user, int64_t done, int64_t total), void *user,
                       model **out);
void model_close(model *m);

/* Takes the KV cache; once, after the weights. */
enum status model_kv_new(model *m, int32_t page_count);

/* One step: fills records (probe_count records, batch_record_bytes apart) with this rank's answers.
 * Collective. Logits stay for model_fetch until the next step. */
void model_step(model *m, const struct batch *batch, void *records);

/* The slow path: this rank's z' of the last step's probe, [vocab count of the rank] fp32 to `out`.
 */
void model_fetch(model *m, const struct batch *batch, int probe, float *out);

/* Runs (backend/run.h), where the backend has them: rows one may have, 0: none. */
int model_run_rows(const model *m);
/* Uploads the rows: `first` is what the first step works on. */
void model_run_begin(model *m, const struct batch *first, const struct run_row *rows);
/* Collective: queues one step, forward pass to next inputs; the host does not wait where sums of device
 * memory do not pass it. */
void model_run_step(model *m);
/* What row `row` answered in step `step` since begin, once it has; until RUN_AHEAD_MAX further ones
 * were queued. Waits, with the backend's watch. */
const struct run_answer *model_run_answer(model *m, int step, int row);
/* Rank 0: the row shall rest. Takes effect, on all ranks alike, in a step that has not started yet.
 */
void model_run_stop(model *m, int row);

const struct model_config *model_get_config(const model *m);
const shard_map *model_get_shard(const model *m);
/* Largest local vocabulary over all ranks (the padded length of a fetch). */
int64_t model_vocab_local_max(const model *m);
/* Seconds spent so far in the forward pass, for bench. */
double model_forward_seconds(const model *m);

#endif
