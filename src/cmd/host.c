/* host.c: see host.h. */
#include "cmd/host.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fault.h"
#include "base/free_memory.h"
#include "base/log.h"
#include "cmd/watch.h"

/* ---- joining ---- */

int host_launched_rank(void) {
    const char *rank = getenv("OMPI_COMM_WORLD_RANK");
    if (!rank) rank = getenv("PMIX_RANK");
    return rank ? atoi(rank) : 0;
}

static const struct watch_stage joining = {
    "joining the job (MPI_Init)",
    "a rank has not come: check that all start the same program with the same Open MPI, and that "
    "their hosts reach one another; --collective-timeout sets how long to wait",
    STATUS_COMM};
static const struct watch_stage starting = {"starting up", "", STATUS_WATCHDOG};
static const struct watch_stage running = {"running", "", STATUS_WATCHDOG};
static const struct watch_stage preflight_stage = {
    "the first exchange between all ranks (preflight)",
    "on one host check /dev/shm and the binding (mpirun --bind-to none); between hosts name the "
    "network interface (mpirun --mca btl_tcp_if_include IF)",
    STATUS_COMM};

static void set_log(const struct host *h) {
    static const enum log_level levels[] = {LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR, LOG_OFF};
    const enum log_level level = levels[h->params.log_level];
    log_init(h->params.quiet && level < LOG_WARN ? LOG_WARN : level, h->params.log_json);
    log_set_rank(h->rank);
}

enum status host_phase(struct host *h, enum status mine, const char *what, const char *detail) {
    TRY(comm_agree(h->comm, mine));
    host_phase_alone(h, what, detail);
    return STATUS_OK;
}

void host_phase_alone(struct host *h, const char *what, const char *detail) {
    const double now = progress_clock();
    log_info("%s%s%s: %.2f s", what, detail ? " " : "", detail ? detail : "", now - h->phase_start);
    h->phase_start = now;
}

/* Before anything collective depends on an option: a rank with others would be waited for, for ever. */
static enum status agree_on_start(struct host *h) {
    const char build[] = SFUMATO_VERSION " " __VERSION__;
    const uint64_t options[] = {h->command, h->params.help, params_digest(&h->params)};
    TRY(comm_agree_equal(h->comm, "build", build, sizeof build));
    return comm_agree_equal(h->comm, "command or options", options, sizeof options);
}

enum status host_join(struct host *h, const struct command *command, int argc, char **argv) {
    const int launcher = getppid();
    h->command = command->bit;
    h->start = h->phase_start = progress_clock();
    h->rank = host_launched_rank();
    log_set_rank(h->rank);
    if (h->rank == 0) TRY(chat_helper_start(&h->helper));
    const enum status status = params_parse(&h->params, command->bit, argc, argv);
    TRY(watch_start(launcher, h->rank, h->params.collective_timeout));
    watch_enter(&joining, h->params.collective_timeout);
    fault_sleep("init-delay");
    TRY(comm_open(&argc, &argv, &h->comm));
    watch_enter(&starting, 0);
    h->rank = comm_rank(h->comm);
    h->ranks = comm_size(h->comm);
    h->shard_rank = h->rank;
    h->shard_ranks = h->ranks;
    if (h->rank > 0) {
        chat_helper_stop(h->helper);
        h->helper = NULL;
    }
    TRY(comm_agree(h->comm, status));
    TRY(agree_on_start(h));
    watch_joined(h->comm);
    if (h->params.help) {
        char program[64];
        snprintf(program, sizeof program, "sfumato %s", command->name);
        if (h->rank == 0)
            params_help(command->bit, program, command->usage, command->about, stdout);
        return STATUS_END;
    }
    set_log(h);
    char detail[48];
    snprintf(detail, sizeof detail, "%d rank%s", h->ranks, h->ranks == 1 ? "" : "s");
    return host_phase(h, STATUS_OK, "start-up,", detail);
}

/* ---- the model's files ---- */

static bool is_there(const char *path) {
    struct stat facts;
    return stat(path, &facts) == 0;
}

/* models/tiny beside the build folder, or where `install` puts it. */
static enum status default_model(char path[PATH_MAX]) {
    char self[PATH_MAX];
    const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    static const char *const places[] = {"../models/tiny", "../share/sfumato/models/tiny"};
    if (n > 0) {
        self[n] = '\0';
        *strrchr(self, '/') = '\0';
        for (int i = 0; i < 2; i++) {
            if (snprintf(path, PATH_MAX, "%s/%s", self, places[i]) >= PATH_MAX) continue;
            if (is_there(path)) return STATUS_OK;
        }
    }
    return fail(STATUS_USAGE,
                "the embedded model (models/tiny) is not beside this program: pass --model PATH");
}

/* The first name it is served by, else that of its folder or file. */
static enum status name_model(struct host *h, const char *path) {
    char full[PATH_MAX];
    if (h->params.served_model_name) {
        const char *at = h->params.served_model_name;
        size_t n;
        const char *name = body_next_name(&at, &n);
        if (!name) return fail(STATUS_USAGE, "--served-model-name: the name is empty");
        if (n >= sizeof h->model_name) return fail(STATUS_USAGE, "--served-model-name: too long");
        snprintf(h->model_name, sizeof h->model_name, "%.*s", (int)n, name);
        return STATUS_OK;
    }
    if (!realpath(path, full)) snprintf(full, sizeof full, "%s", path);
    const char *slash = strrchr(full, '/');
    snprintf(h->model_name, sizeof h->model_name, "%.255s", slash && slash[1] ? slash + 1 : full);
    char *dot = strstr(h->model_name, ".gguf");
    if (dot && !dot[5]) *dot = '\0';
    return STATUS_OK;
}

enum status host_find_model(struct host *h, char *path) {
    if (h->params.model) {
        snprintf(path, PATH_MAX, "%s", h->params.model);
    } else {
        TRY(default_model(path));
    }
    return name_model(h, path);
}

static enum status open_source(struct host *h) {
    char path[PATH_MAX];
    TRY(host_find_model(h, path));
    return source_open(path, &h->source);
}

/* What other ranks must know of rank 0's tokenizer. */
struct text_facts {
    int vocab_count, open_id, close_id, eos_count;
    int32_t eos_ids[THINK_EOS_MAX];
};

enum status host_open_text(struct host *h) {
    TRY(host_phase(h, open_source(h), "model files", NULL));
    const enum status status = h->rank == 0 ? host_open_tokenizer(h) : STATUS_OK;
    TRY(host_phase(h, status, "tokenizer", NULL));
    struct text_facts facts = {
        h->facts.vocab_count, h->facts.open_id, h->facts.close_id, h->facts.eos_count, {0}};
    memcpy(facts.eos_ids, h->facts.eos_ids, sizeof facts.eos_ids);
    comm_share(h->comm, &facts, sizeof facts);
    h->facts.vocab_count = facts.vocab_count;
    h->facts.open_id = facts.open_id;
    h->facts.close_id = facts.close_id;
    h->facts.eos_count = facts.eos_count;
    memcpy(h->facts.eos_ids, facts.eos_ids, sizeof facts.eos_ids);
    return STATUS_OK;
}

/* ---- the loaded model ---- */

void host_plan_model(struct host *h) {
    const struct params *p = &h->params;
    const struct model_config *c = &h->source->config;
    const bool f32_file = c->file_dtype == DTYPE_F32 && p->backend != BACKEND_IS_CUDA;
    const bool f32 = p->dtype == 0 ? f32_file : p->dtype == 1;
    static const enum backend_dtype kv_dtypes[] = {BACKEND_BF16, BACKEND_F32, BACKEND_BF16,
                                                   BACKEND_FP8}; /* as the words of --kv-dtype */
    const bool fp8_file = c->file_dtype == DTYPE_FP8 && p->backend == BACKEND_IS_CUDA;
    const bool fp8 = p->dtype == 0 ? fp8_file : p->dtype == 3;
    h->engine_options = (struct engine_options){
        .max_seqs = (int)p->max_num_seqs,
        .max_batched_tokens =
            (int)(p->max_num_batched_tokens > p->max_num_seqs ? p->max_num_batched_tokens
                                                              : p->max_num_seqs),
        .max_model_len = p->max_model_len > 0 ? p->max_model_len : c->max_positions,
        .prefix_cache = p->prefix_cache == 0,
        .run_steps = p->backend == BACKEND_IS_CUDA ? (int)p->run_steps : 0,
        .launch_ahead = (int)p->launch_ahead,
        .vocab_count = h->facts.vocab_count > 0 ? h->facts.vocab_count : c->vocab_rows,
    };
    h->model_options = (struct model_options){
        .weight_dtype = f32   ? BACKEND_F32
                        : fp8 ? BACKEND_FP8
                              : BACKEND_BF16,
        .kv_dtype = p->kv_dtype == 0 && f32 ? BACKEND_F32 : kv_dtypes[p->kv_dtype],
        .slabs = p->slabs > 0 ? (int)p->slabs : shard_default_slabs(h->shard_ranks),
        .slice_ranks = h->shard_ranks,
        .slice_rank = h->shard_rank,
        .rows_max = h->engine_options.max_batched_tokens,
        .logit_rows_max = engine_logit_rows_max(&h->engine_options),
        .max_positions = (int)h->engine_options.max_model_len,
        .vocab_count = h->engine_options.vocab_count,
    };
}

enum status host_check_machine(const struct host *h) {
    const bool cuda = h->params.backend == BACKEND_IS_CUDA;
    if (h->params.backend == BACKEND_IS_SCALAR && h->params.isa > 1) {
        return fail(STATUS_USAGE, "--backend cpu-scalar contradicts --isa %s",
                    param_word(&h->params, PARAM_isa));
    }
    if (h->params.gemm > 0 && (!cuda || (h->params.deterministic && h->params.gemm > 1))) {
        return fail(STATUS_USAGE, "--gemm %s is for --backend cuda without --deterministic",
                    param_word(&h->params, PARAM_gemm));
    }
    if (cuda && (h->params.isa > 0 || h->params.numerics > 0 || h->params.threads > 0)) {
        return fail(STATUS_USAGE,
                    "--isa, --numerics and --threads are for the CPU: leave them out with "
                    "--backend cuda");
    }
    return STATUS_OK;
}

enum status host_check_options(const struct host *h) {
    const struct model_config *c = &h->source->config;
    struct shard_dims dims;
    TRY(host_check_machine(h));
    if (h->params.max_model_len > c->max_positions) {
        return fail(STATUS_USAGE,
                    "--max-model-len %lld: the model was made for at most %d positions",
                    (long long)h->params.max_model_len, c->max_positions);
    }
    if (h->model_options.kv_dtype == BACKEND_FP8 && h->params.backend != BACKEND_IS_CUDA) {
        return fail(
            STATUS_USAGE,
            "--kv-dtype fp8 is for --backend cuda: the CPU backend keeps keys and values in "
            "f32 or bf16");
    }
    if (h->model_options.weight_dtype == BACKEND_FP8 && h->params.backend != BACKEND_IS_CUDA) {
        return fail(STATUS_USAGE,
                    "--dtype fp8 is for --backend cuda: the CPU computes with f32 or bf16 weights");
    }
    config_shard_dims(c, &dims);
    return shard_check(&dims, h->model_options.slabs, h->shard_ranks);
}

static void warn_of_threads(const struct host *h) {
    const int wanted = (int)h->params.threads * comm_local_size(h->comm);
    const int allowed = comm_local_cores(h->comm);
    if (comm_local_rank(h->comm) > 0 || allowed == 0 || allowed >= wanted) return;
    log_warn(
        "%d threads in all on %d allowed cores: lower --threads, or pass --bind-to none to "
        "mpirun",
        wanted, allowed);
}

void host_plan_backend(struct host *h) {
    const struct params *p = &h->params;
    struct backend_config *config = &h->backend_config;
    *config = (struct backend_config){
        .isa = p->backend == BACKEND_IS_SCALAR ? ISA_SCALAR : (enum backend_isa)p->isa,
        .numerics = p->numerics == 1 ? NUMERICS_FMA : NUMERICS_AUTO,
        .threads = (int)p->threads,
        .local_rank = comm_local_rank(h->comm),
        .local_ranks = comm_local_size(h->comm),
        .rows_max = h->model_options.rows_max,
        .logit_rows_max = h->model_options.logit_rows_max,
        .probes_max = engine_probes_max(&h->engine_options),
        .deterministic = p->deterministic,
        .batch = engine_batch_limits(&h->engine_options),
        .run_rows = engine_run_rows_max(&h->engine_options),
        .positions_max = h->model_options.max_positions,
        .rank = h->rank,
        .ranks = h->ranks,
        .gemm = (enum backend_gemm)p->gemm,
    };
    config->numerics = (enum backend_numerics)comm_agree_min(h->comm, (int)cpu_numerics(config));
}

enum status host_new_backend(const struct host *h, backend **out) {
#ifdef SFUMATO_WITH_CUDA
    if (h->params.backend == BACKEND_IS_CUDA) return cuda_open(&h->backend_config, out);
#endif
    return cpu_open(&h->backend_config, out);
}

static enum status open_backend(struct host *h) {
#ifdef SFUMATO_WITH_CUDA
    if (h->params.backend == BACKEND_IS_AUTO) {
        if (cuda_probe() != STATUS_OK) {
            log_info("no GPU can be used here: computing on the CPU");
        } else if (h->rank == 0) {
            log_warn("there is a GPU; --backend auto computes on the CPU, --backend cuda on it");
        }
    }
#endif
    host_plan_backend(h);
    warn_of_threads(h);
    return host_new_backend(h, &h->backend);
}

/* FNV-1a of the fields a rank must share, as text: struct padding must not count. */
static uint64_t config_digest(const struct host *h) {
    const struct model_config *c = &h->source->config;
    char text[512];
    const int n =
        snprintf(text, sizeof text,
                 "%s %d %d %d %d %d %d %d %d %d %d %.9g %d %.17g %.17g %d %d %d %lld %lld %d %d",
                 c->arch_name, c->arch, c->layers, c->hidden, c->ffn, c->heads, c->kv_heads,
                 c->head_dim, c->vocab_rows, c->tied, c->qkv_bias * 2 + c->qk_norm,
                 (double)c->norm_eps, c->rope, c->rope_theta, c->rope_factor, c->max_positions,
                 h->model_options.weight_dtype, h->model_options.kv_dtype,
                 (long long)h->source->total_bytes, (long long)h->engine_options.max_model_len,
                 h->engine_options.vocab_count, h->model_options.slabs);
    uint64_t digest = 0xcbf29ce484222325u;
    for (int i = 0; i < n; i++) digest = (digest ^ (unsigned char)text[i]) * 0x100000001b3u;
    return digest;
}

static enum status agree_on_model(struct host *h) {
    const uint64_t config = config_digest(h);
    return comm_agree_equal(h->comm, "model configuration", &config, sizeof config);
}

struct loading {
    struct host *host;
    struct progress progress;
};

static void on_load(void *user, int64_t done, int64_t total) {
    struct loading *loading = user;
    fault_sleep("load-delay");
    struct progress *progress = &loading->progress;
    if (loading->host->on_load && total > 0) {
        loading->host->on_load(loading->host->on_load_user, (double)done / (double)total);
    }
    char note[64], bytes[32];
    const double seconds = progress_clock() - progress->start;
    progress->total = total;
    snprintf(note, sizeof note, "%s/s",
             progress_bytes(seconds > 0 ? (double)done / seconds : 0, bytes));
    progress_update(progress, done, note);
}

static enum status load_weights(struct host *h) {
    struct loading loading = {.host = h};
    progress_begin(&loading.progress, "loading weights", h->source->total_bytes,
                   h->rank == 0 && !h->params.quiet);
    const enum status status =
        model_open(h->source, &h->model_options, h->backend, h->comm, on_load, &loading, &h->model);
    progress_end(&loading.progress);
    char detail[96], bytes[32], rate[32];
    const double seconds = h->load_seconds = progress_clock() - loading.progress.start;
    snprintf(
        detail, sizeof detail, "(%s on rank 0, %s/s)",
        progress_bytes((double)h->backend->weight_bytes, bytes),
        progress_bytes((double)h->backend->weight_bytes / (seconds > 1e-9 ? seconds : 1e-9), rate));
    return host_phase(h, status, "weights", detail);
}

struct comm_config host_comm_config(const struct host *h) {
    static const enum comm_kind kinds[] = {COMM_AUTO, COMM_MPI, COMM_NCCL, COMM_FUSED};
    return (struct comm_config){
        .kind = kinds[h->params.comm],
        .slot_floats = (size_t)h->model_options.rows_max * (size_t)h->source->config.hidden,
        .timeout_seconds = h->params.collective_timeout,
        .device = h->backend->ops->free_bytes ? h->backend : NULL,
        .tree_sums = h->params.deterministic,
        .stand_in_us = h->params.collective_us,
    };
}

static enum status setup_comm(struct host *h) {
    struct comm_config config = host_comm_config(h);
    engine_comm_needs(&h->engine_options, &config.bcast_bytes_max, &config.gather_bytes_max,
                      model_vocab_local_max(h->model));
    if (config.gather_bytes_max < 4096) config.gather_bytes_max = 4096; /* the memory table below */
    return comm_setup(h->comm, &config);
}

/* A sum of every size class, checked: what can be wrong with the ways between ranks shows here, and
 * not in a client's first request. Of device memory only the first step can tell. */
static enum status preflight(struct host *h) {
    enum { LIMIT_SECONDS = 30 };
    const size_t most = (size_t)h->model_options.rows_max * (size_t)h->source->config.hidden;
    const double given = h->params.collective_timeout;
    /* a little less than the deadline of a single exchange, so that the advice is what is read */
    const double limit = 0.85 * (given > 0 && given < LIMIT_SECONDS ? given : LIMIT_SECONDS);
    if (h->ranks == 1 || h->backend->ops->free_bytes) return STATUS_OK;
    float *sum = malloc(most * sizeof *sum);
    const enum status status =
        comm_agree(h->comm, sum ? STATUS_OK : fail(STATUS_MEMORY, "no memory for the preflight"));
    if (status != STATUS_OK) {
        free(sum);
        return status;
    }
    watch_enter(&preflight_stage, limit);
    fault_sleep("preflight-delay");
    bool right = true;
    for (size_t count = 1, last = 0; count != last;
         last = count, count = most / 2 < count ? most : 2 * count) {
        float *slot = comm_slot(h->comm);
        for (size_t i = 0; i < count; i++) slot[i] = (float)(h->rank + 1 + (int)(i % 13));
        comm_all_reduce(h->comm, count, sum);
        for (size_t i = 0; i < count; i++)
            right = right &&
                    sum[i] == (float)(h->ranks * (h->ranks + 1) / 2 + h->ranks * (int)(i % 13));
    }
    watch_enter(&starting, 0);
    free(sum);
    if (right) return STATUS_OK;
    return fail(STATUS_COMM,
                "preflight: ranks exchange wrong sums over path %s: try --comm mpi, and `sfumato "
                "selftest comm` says more",
                comm_path_name(h->comm));
}

/* One line a rank: where it is and what it holds. */
struct rank_row {
    char name[64];
    int local_rank, threads, slab_begin, slab_count;
    int64_t weight_bytes, kv_bytes, scratch_bytes, resident_bytes, free_bytes;
};

static void log_ranks(struct host *h) {
    struct rank_row row = {.local_rank = comm_local_rank(h->comm),
                           .threads = h->backend->threads,
                           .slab_begin = model_get_shard(h->model)->slab_begin,
                           .slab_count = model_get_shard(h->model)->slab_count,
                           .weight_bytes = (int64_t)h->backend->weight_bytes,
                           .kv_bytes = (int64_t)h->backend->kv_bytes,
                           .scratch_bytes = (int64_t)h->backend->scratch_bytes,
                           .resident_bytes = host_peak_bytes(),
                           .free_bytes = free_memory(1)};
    if (gethostname(row.name, sizeof row.name - 1) != 0) snprintf(row.name, sizeof row.name, "?");
    const struct rank_row *all = comm_gather(h->comm, &row, sizeof row);
    for (int r = 0; all && r < h->ranks; r++) {
        char weights[32], kv[32], scratch[32], resident[32];
        h->memory[r] = (struct host_memory){all[r].weight_bytes, all[r].kv_bytes,
                                            all[r].scratch_bytes, all[r].free_bytes};
        log_info(
            "rank %d on %s: slabs %d..%d of %d, %d thread%s, weights %s, KV cache %s, scratch %s, "
            "resident %s",
            r, all[r].name, all[r].slab_begin, all[r].slab_begin + all[r].slab_count - 1,
            h->model_options.slabs, all[r].threads, all[r].threads == 1 ? "" : "s",
            progress_bytes((double)all[r].weight_bytes, weights),
            progress_bytes((double)all[r].kv_bytes, kv),
            progress_bytes((double)all[r].scratch_bytes, scratch),
            progress_bytes((double)all[r].resident_bytes, resident));
    }
}

void host_log_ready(const struct host *h) {
    watch_enter(&running, 0);
    log_info("ready: %s, %d rank%s, %s, %s weights, numeric class %s, %.2f s", h->model_name,
             h->ranks, h->ranks == 1 ? "" : "s", backend_isa_name(h->backend->isa),
             backend_dtype_name(h->model_options.weight_dtype),
             backend_numerics_name(h->backend->numerics), progress_clock() - h->start);
}

enum status host_open_model(struct host *h) {
    host_plan_model(h);
    TRY(comm_agree(h->comm, host_check_options(h)));
    TRY(comm_agree(h->comm, open_backend(h)));
    TRY(host_plan_memory(h));
    TRY(agree_on_model(h));
    TRY(host_phase(h, STATUS_OK, "compute backend", backend_isa_name(h->backend->isa)));
    TRY(load_weights(h));
    const enum status connected = setup_comm(h);
    TRY(comm_agree(h->comm, connected));
    TRY(host_phase(h, preflight(h), "communication", comm_path_name(h->comm)));
    TRY(comm_agree(h->comm, model_kv_new(h->model, h->engine_options.page_count)));
    if (h->command == PARAMS_SERVE) TRY(host_take_pages(h));
    host_phase_alone(h, "KV cache", NULL);
    log_ranks(h);
    const double tokens = 64.0 * h->engine_options.page_count;
    log_info("KV cache size: %.0f tokens", tokens);
    log_info("Maximum concurrency for %lld tokens per request: %.2fx",
             (long long)h->engine_options.max_model_len,
             tokens / (double)h->engine_options.max_model_len);
    if (h->command != PARAMS_SERVE || h->rank > 0) host_log_ready(h);
    return STATUS_OK;
}

/* ---- leaving ---- */

int host_leave(struct host *h, enum status status) {
    struct fault fault = *fail_last();
    if (h->model) model_close(h->model);
    chat_close(h->chat);
    tokenizer_close(h->tokenizer);
    source_close(h->source);
    chat_helper_stop(h->helper);
    /* a rank that has not joined cannot leave its message to rank 0 */
    if (status != STATUS_OK && status != STATUS_END && (h->rank == 0 || !h->comm)) {
        log_failure(fault.status == status ? fault.text : status_name(status));
    }
    comm_close(h->comm);
    watch_stop();
    if (h->backend) h->backend->ops->close(h->backend); /* its memory may be the comm's slots */
    params_fini(&h->params);
    return status == STATUS_END ? 0 : status == STATUS_REQUEST ? STATUS_USAGE : (int)status;
}
