/* host.h: what every command needs before and after its own work: the job, the options, the model.
 *
 *   host_join       chat helper ─► comm ─► options          all ranks
 *   host_open_text  model files ─► tokenizer ─► template    facts shared by rank 0
 *   host_open_model slabs ─► backend ─► pages ─► weights ─► communication ─► KV cache ─► "ready"
 *   host_leave      tear down in reverse, one message, exit code
 *
 * Start-up is collective: each phase ends in comm_agree, so that all ranks stop together with the first
 * failing rank's message (architecture.md §5). Owns: everything below, in the order it was opened.
 * Refuses to know: what the command does with it. Thread: main = engine thread of the rank.
 */
#ifndef SFUMATO_CMD_HOST_H
#define SFUMATO_CMD_HOST_H

#include "backend/backend.h"
#include "base/params.h"
#include "base/progress.h"
#include "comm/comm.h"
#include "engine/engine.h"
#include "load/source.h"
#include "model/model.h"
#include "serve/body.h"
#include "text/chat.h"
#include "text/tokenizer.h"

/* Words of --backend, in the order of params.def. */
enum { BACKEND_IS_AUTO, BACKEND_IS_CPU, BACKEND_IS_SCALAR, BACKEND_IS_CUDA };

struct host {
    enum params_command command;
    struct params params;
    chat_helper *helper; /* rank 0; NULL without python3 and jinja2 */
    comm *comm;
    int rank, ranks;
    int shard_rank, shard_ranks; /* whose share this process holds: its own, but for a bench */
    source *source;
    tokenizer *tokenizer; /* rank 0 only */
    chat *chat;           /* rank 0 only; NULL without a usable template */
    backend *backend;
    model *model;
    char model_name[256];
    char chat_fault[FAULT_TEXT_BYTES]; /* why the model's template cannot be used; "" */
    /* Rank 0: complete. Other ranks: vocab_count and ids only. */
    struct body_facts facts;
    struct backend_config backend_config;
    struct model_options model_options;
    struct engine_options engine_options;
    struct model_need need; /* of this rank */
    /* Called while weights load; may be NULL. Then what log lines say, for whoever reports it. */
    void (*on_load)(void *user, double ratio);
    void *on_load_user;
    double load_seconds;
    struct host_memory {
        int64_t weights, kv, workspace, free;
    } memory[COMM_RANKS_MAX]; /* of every rank, on rank 0 */
    double start, phase_start;
};

/* One command of the program. */
struct command {
    const char *name;
    enum params_command bit;
    const char *usage, *about;
    /* Called on every rank. A failure of rank 0 alone must first release the others. */
    enum status (*run)(struct host *h);
    void (*before)(void); /* on every rank, before MPI; may be NULL */
};

/* As the launcher says, before MPI_Init does; 0 without one. */
int host_launched_rank(void);
enum status host_join(struct host *h, const struct command *command, int argc, char **argv);
/* Where the model is, and what it is called (model_name); nothing is opened. */
enum status host_find_model(struct host *h, char *path); /* [PATH_MAX] */
enum status host_open_text(struct host *h);
/* A model whose source is open. With synthetic weights there is no tokenizer. A service has more to
 * do before it is ready and says so itself (host_log_ready). */
enum status host_open_model(struct host *h);
void host_log_ready(const struct host *h);
/* Takes the command's status and returns the exit code. Prints the last failure, once for all ranks. */
int host_leave(struct host *h, enum status status);

/* Collective end of a start-up phase: agreement, then a log line "what: seconds" (detail may be NULL). */
enum status host_phase(struct host *h, enum status mine, const char *what, const char *detail);
/* The same for work of rank 0 that cannot fail: no agreement. */
void host_phase_alone(struct host *h, const char *what, const char *detail);
/* Options that go into model_need, without opening anything: also for `inspect`. */
void host_plan_model(struct host *h);
/* Options that contradict one another: those of the machine, and all of them once a model is planned. */
enum status host_check_machine(const struct host *h);
enum status host_check_options(const struct host *h);
/* backend_config from the options, rows_max and the like. Collective: one numeric class for all. */
void host_plan_backend(struct host *h);
/* A backend of the chosen kind, planned so. Not collective. */
enum status host_new_backend(const struct host *h, backend **out);

/* What comm_setup is told, but for the bytes of plans and gathers. */
struct comm_config host_comm_config(const struct host *h);

/* host_text.c */
enum status host_open_tokenizer(struct host *h);
/* host_memory.c: max_model_len and page_count from the memory there is. Collective. */
enum status host_plan_memory(struct host *h);
/* All of the KV cache, for good. Collective. */
enum status host_take_pages(struct host *h);
int64_t host_peak_bytes(void); /* of this process: peak resident size */

#endif
