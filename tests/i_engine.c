/* i_engine.c: the engine with models/tiny on 1, 2, 3, 4, 8 ranks.
 *
 * Rank 0 drives, the others follow. Rank 0 also holds the whole model alone, so equality over ranks
 * is checked inside one job: the same scripted workload (all modes, late arrivals, cancels, score)
 * must give the same sum of decision hashes on R = 1, 2, 4, 8 ranks and on one; other R must repeat
 * themselves under another schedule. Golden traces (tests/data/golden/tiny_soft.vec) come from
 * transformers and numpy.
 */
#include "comm/comm_path.h"
#include "engine/engine.h"
#include "ranks.h"
#include "support/vec.h"

enum {
    ROWS = 64,
    SEQS = 8,
    PAGES = 40,
    LENGTH = 384,
    REQUESTS = 14,
    STEPS_MAX = 400,
    PROMPT_MAX = 120
};

static comm *job, *alone;
static source *src;
static model *job_model, *alone_model;
static backend *job_backend, *alone_backend;

static struct engine_options options_now(void) {
    return (struct engine_options){.max_seqs = SEQS,
                                   .max_batched_tokens = ROWS,
                                   .max_model_len = LENGTH,
                                   .page_count = PAGES,
                                   .prefix_cache = true};
}

static void open_model(comm *c, backend **be, model **m) {
    const struct engine_options o = options_now();
    struct comm_config config = {.slot_floats = (size_t)ROWS * (size_t)src->config.hidden,
                                 .timeout_seconds = 100};
    engine_comm_needs(&o, &config.bcast_bytes_max, &config.gather_bytes_max,
                      src->config.vocab_rows);
    must(comm_setup(c, &config));
    const struct backend_config backend_config = {.rows_max = ROWS,
                                                  .logit_rows_max = engine_logit_rows_max(&o),
                                                  .probes_max = engine_probes_max(&o),
                                                  .threads = 1,
                                                  .local_rank = comm_local_rank(job),
                                                  .local_ranks = comm_local_size(job)};
    const struct model_options model_options = {.weight_dtype = BACKEND_F32,
                                                .kv_dtype = BACKEND_F32,
                                                .slabs = 8,
                                                .rows_max = ROWS,
                                                .logit_rows_max = engine_logit_rows_max(&o),
                                                .max_positions = LENGTH,
                                                .vocab_count = src->config.vocab_rows};
    must(cpu_open(&backend_config, be));
    must(model_open(src, &model_options, *be, c, NULL, NULL, m));
    must(model_kv_new(*m, PAGES));
}

int suite_setup(int *argc, char ***argv) {
    must(comm_open(argc, argv, &job));
    must(source_open(suite_path("models/tiny"), &src));
    open_model(job, &job_backend, &job_model);
    if (comm_rank(job) != 0) return 0;
    alone = calloc(1, sizeof *alone);
    if (!alone) return 1;
    *alone = (comm){.job = &comm_self_job, .size = 1, .local_size = 1};
    open_model(alone, &alone_backend, &alone_model);
    return 0;
}

unsigned suite_total_failures(unsigned mine) { return ranks_failures(job, mine); }

void suite_teardown(void) {
    model_close(job_model);
    job_backend->ops->close(job_backend);
    if (alone) {
        model_close(alone_model);
        alone_backend->ops->close(alone_backend);
        comm_close(alone);
    }
    source_close(src);
    comm_close(job);
}

static bool exact_ranks(void) { return (comm_size(job) & (comm_size(job) - 1)) == 0; }

/* ---- the workload ---- */

/* Prompts of models/tiny end with <think>; its ids are read from the golden file. */
static uint32_t base_prompt[PROMPT_MAX];
static int base_count, close_id, eos_id;

static struct recorded {
    int count, finished_count;
    struct think_decision steps[STEPS_MAX];
    int scored;
    float entropies[LENGTH];
    double next_logprobs[LENGTH];
    enum finish finish;
    enum think_end thinking_end;
    double mean_entropy;
    struct request_usage usage;
} recorded[REQUESTS];

static engine *live;
static int open_count;
static int cancel_at[REQUESTS]; /* step at which the request is cancelled, 0: never */

static void on_event(void *user, const struct engine_event *ev) {
    (void)user;
    struct recorded *r = &recorded[ev->request_id];
    if (ev->kind == ENGINE_STEP) {
        if (ev->choice == 0 && r->count < STEPS_MAX) r->steps[r->count++] = *ev->decision;
        if (cancel_at[ev->request_id] && (int)ev->step + 1 == cancel_at[ev->request_id])
            engine_cancel(live, ev->request_id, ev->choice, false);
    } else if (ev->kind == ENGINE_SCORED) {
        r->entropies[r->scored] = ev->entropy;
        r->next_logprobs[r->scored++] = ev->next_logprob;
    } else {
        open_count--;
        r->finished_count++;
        if (ev->choice != 0) return;
        r->finish = ev->finish;
        r->thinking_end = ev->thinking_end;
        r->mean_entropy = ev->mean_entropy;
        r->usage = ev->usage;
    }
}

static struct request make_request(int i) {
    static uint32_t prompts[REQUESTS][PROMPT_MAX];
    uint32_t *p = prompts[i];
    memcpy(p, base_prompt, sizeof *p * (size_t)base_count);
    if (i > 0)
        p[(i * 5) % (base_count - 1)] = (20 + 7 * (uint32_t)i) % 300; /* another problem, roughly */
    struct request r = {.id = (uint64_t)i,
                        .prompt = {.count = base_count, .ids = p},
                        .choices = 1,
                        .max_tokens = 60 + 5 * i,
                        .repetition_penalty = 1,
                        .think = {.mode = (enum think_mode)(i % 4),
                                  .max_topk = 1 + 3 * (i % 5),
                                  .thinking = {0.6f, 30, 0.95f, 0.001f},
                                  .answer = {0.6f, 30, 0.95f, 0},
                                  .cold_stop = i % 3 == 0,
                                  .cold_stop_entropy = 0.1f,
                                  .cold_stop_length = 12,
                                  .budget = i % 5 == 4 ? 25 : 0,
                                  .start = START_FIRST_TOKEN,
                                  .gumbel_temperature = 0.5f,
                                  .dirichlet_alpha = 2,
                                  .seed = 100 + (uint64_t)i,
                                  .open_id = -1,
                                  .close_id = close_id,
                                  .eos_count = 1,
                                  .eos_ids = {eos_id}}};
    if (i == 3) r.think.thinking = r.think.answer = (struct think_filters){1.0f, 0, 1.0f, 0};
    if (i == 5) r.think.thinking.temperature = 0;
    if (i == 6) r.choices = 3;
    if (i == 7) {
        r.choices = 3;
        r.share_thinking = true;
    }
    if (i == 8) r.frequency_penalty = 0.4f, r.repetition_penalty = 1.1f;
    if (i == 9) r.logprobs = true, r.top_logprobs = 5;
    if (i == 10) r.think.thinking.top_k = 60, r.think.max_topk = 40;
    if (i == 12) {
        r.score = true;
        r.max_tokens = 0;
    }
    return r;
}

struct way {
    int chunk, preempt_every, arrive_every;
};

/* Collective on the job; alone: rank 0 by itself, with the whole model. */
static uint64_t run_workload(bool by_myself, const struct way *w,
                             struct engine_counters *counters) {
    struct engine_options o = options_now();
    o.max_batched_tokens = w->chunk;
    if (comm_rank(job) != 0) {
        if (!by_myself) engine_follow(job_model, job, &o);
        return 0;
    }
    memset(recorded, 0, sizeof recorded);
    must(engine_new(by_myself ? alone_model : job_model, by_myself ? alone : job, &o, on_event,
                    NULL, &live));
    int submitted = 0;
    open_count = 0;
    for (int tick = 0; submitted < REQUESTS || open_count > 0; tick++) {
        while (submitted < REQUESTS && tick >= submitted * w->arrive_every) {
            const struct request r = make_request(submitted++);
            CHECK_EQ(engine_submit(live, &r), STATUS_OK);
            open_count += r.choices;
        }
        if (w->preempt_every && tick % w->preempt_every == w->preempt_every - 1)
            engine_preempt(live);
        engine_tick(live);
    }
    engine_counters_get(live, counters);
    CHECK_EQ(counters->pages_used, 0);
    engine_stop(live);
    engine_free(live);
    return counters->decision_hash;
}

static void read_base(void) {
    struct vec_file v;
    vec_open(&v, "tiny_soft.vec");
    bool done = false;
    while (!done && vec_next(&v)) {
        if (vec_is(&v, "prompt")) {
            base_count = v.word_count - 1;
            for (int i = 0; i < base_count; i++) base_prompt[i] = (uint32_t)atoi(v.words[i + 1]);
        }
        if (vec_is(&v, "step") && v.words[1][0] == 't')
            close_id = atoi(v.words[2]); /* the last one stays */
        if (vec_is(&v, "step") && v.words[1][0] == 'a') eos_id = atoi(v.words[2]);
        done = vec_is(&v, "end");
    }
    vec_close(&v);
}

static void test_ranks(void) {
    static struct recorded first[REQUESTS];
    struct engine_counters a, b;
    read_base();
    memset(cancel_at, 0, sizeof cancel_at);
    cancel_at[2] = 9;
    cancel_at[11] = 1;
    const uint64_t on_job = run_workload(false, &(struct way){ROWS, 0, 0}, &a);
    memcpy(first, recorded, sizeof first);
    const uint64_t again = run_workload(false, &(struct way){17, 13, 3}, &b);
    if (comm_rank(job) != 0) return;
    CU_ASSERT(on_job == again); /* whatever the schedule */
    CU_ASSERT(b.preemptions > 0);
    CU_ASSERT(a.full_fetches > 0 && a.soft_steps > 100);
    for (int i = 0; i < REQUESTS; i++)
        CHECK_EQ(recorded[i].finished_count, make_request(i).choices);
    CHECK_EQ(first[2].finish, FINISH_REASON_ABORT);
    CHECK_EQ(first[2].count, 9);
    const uint64_t whole = run_workload(true, &(struct way){ROWS, 0, 1}, &a);
    if (exact_ranks()) {
        CU_ASSERT(on_job == whole);
        for (int i = 0; i < REQUESTS; i++)
            CU_ASSERT(suite_equal_bytes("recorded request", &first[i].steps, &recorded[i].steps,
                                        sizeof first[i].steps));
    }
}

/* A run's inputs scored again give the run's entropies, bit for bit (soft-thinking.md §8). */
static void test_score_of_trace(void) {
    static uint32_t ids[LENGTH * 16];
    static float weights[LENGTH * 16];
    static int32_t begin[LENGTH + 1];
    const struct engine_options o = options_now();
    if (comm_rank(job) != 0) {
        engine_follow(job_model, job, &o);
        return;
    }
    memset(recorded, 0, sizeof recorded);
    memset(cancel_at, 0, sizeof cancel_at);
    must(engine_new(job_model, job, &o, on_event, NULL, &live));
    struct request r = make_request(1);
    r.think.thinking.temperature = 1;
    r.think.answer.temperature = 1;
    r.max_tokens = 120;
    CHECK_EQ(engine_submit(live, &r), STATUS_OK);
    while (engine_tick(live)) {
    }
    const struct recorded *run = &recorded[1];
    int n = 0, soft = 0;
    for (int i = 0; i < base_count + run->count; i++) {
        const struct think_decision *d = i < base_count ? NULL : &run->steps[i - base_count];
        begin[i] = n;
        for (int k = 0; k < (d ? d->count : 1); k++) {
            ids[n] = d ? d->ids[k] : r.prompt.ids[i];
            weights[n++] = d ? d->weights[k] : 1;
        }
        soft += d && d->count > 1;
    }
    begin[base_count + run->count] = n;
    struct request score = make_request(12);
    score.prompt = (struct request_inputs){base_count + run->count, begin, ids, weights};
    score.think.thinking.temperature = 1;
    CHECK_EQ(engine_submit(live, &score), STATUS_OK);
    while (engine_tick(live)) {
    }
    engine_stop(live);
    engine_free(live);
    CU_ASSERT(run->count > 20 && soft > 5);
    CHECK_EQ(recorded[12].scored, base_count + run->count);
    for (int i = 0; i < run->count; i++)
        CU_ASSERT(recorded[12].entropies[base_count - 1 + i] == run->steps[i].entropy);
    /* the log-probability of a hard element is that of the trace id before the filters */
    for (int i = 0; i < run->count; i++)
        if (run->steps[i].count == 1)
            CHECK_NEAR(recorded[12].next_logprobs[base_count - 1 + i], log((double)run->steps[i].p),
                       1e-4);
    CU_ASSERT(isnan(recorded[12].next_logprobs[base_count + run->count - 1]));
}

/* ---- golden traces ---- */

static struct request request_of_run(const struct vec_file *v) {
    static const struct {
        const char *name;
        enum think_mode mode;
    } modes[] = {{"off", THINK_OFF},
                 {"soft", THINK_SOFT},
                 {"gumbel", THINK_GUMBEL},
                 {"dirichlet", THINK_DIRICHLET}};
    struct request r = make_request(0);
    struct think_params *t = &r.think;
    for (int i = 0; i < 4; i++)
        if (strncmp(vec_value(v, "mode"), modes[i].name, strlen(modes[i].name)) == 0)
            t->mode = modes[i].mode;
    t->max_topk = (int)vec_value_int(v, "max_topk");
    t->thinking =
        (struct think_filters){vec_value_float(v, "temperature"), (int)vec_value_int(v, "top_k"),
                               vec_value_float(v, "top_p"), vec_value_float(v, "min_p")};
    t->answer = (struct think_filters){
        vec_value_float(v, "answer_temperature"), (int)vec_value_int(v, "answer_top_k"),
        vec_value_float(v, "answer_top_p"), vec_value_float(v, "answer_min_p")};
    t->cold_stop_length = vec_value_int(v, "cold_length");
    t->cold_stop = t->cold_stop_length > 0;
    t->cold_stop_entropy = vec_value_float(v, "cold_entropy");
    if (!t->cold_stop) t->cold_stop_length = 1;
    t->budget = vec_value_int(v, "budget");
    t->gumbel_temperature = vec_value_float(v, "tau");
    t->dirichlet_alpha = vec_value_float(v, "alpha");
    t->seed = strtoull(vec_value(v, "seed"), NULL, 10);
    r.choices = (int)vec_value_int(v, "choice") + 1; /* the wanted choice and those before it */
    r.max_tokens = LENGTH - PROMPT_MAX;
    return r;
}

#define GOLDEN_TOLERANCE 1e-2f
static int wanted_choice;
static void on_golden_event(void *user, const struct engine_event *ev) {
    struct recorded *r = user;
    if (ev->choice != wanted_choice) return;
    if (ev->kind == ENGINE_STEP && r->count < STEPS_MAX) r->steps[r->count++] = *ev->decision;
    if (ev->kind != ENGINE_FINISHED) return;
    r->finish = ev->finish;
    r->thinking_end = ev->thinking_end;
}

/* Compares one step; false when the traces part (legitimately, at a near-tie), after which inputs
 * differ. The tolerance is that of a free run: rounding differences of a step come back through its
 * mixture. */
static bool golden_step(const struct vec_file *v, const struct think_decision *d, double *worst) {
    const bool soft = v->word_count > 7 || strchr(v->words[v->word_count - 1], ':') != NULL;
    const float margin = vec_value_float(v, "margin"),
                set_margin = vec_value_float(v, "set_margin");
    bool same = (int)d->trace_id == atoi(v->words[2]);
    int k = 0;
    for (int w = 0; soft && w < v->word_count; w++) {
        uint32_t id;
        float weight;
        if (!strchr(v->words[w], ':')) continue;
        vec_pair(v->words[w], &id, &weight);
        if (k >= d->count || d->ids[k] != id) {
            same = false;
            break;
        }
        *worst = fmax(*worst, fabs((double)d->weights[k] - (double)weight));
        CHECK_NEAR(d->weights[k], weight, GOLDEN_TOLERANCE);
        k++;
    }
    if (soft && same && k != d->count) same = false;
    if (!same) {
        const bool near_tie = margin < GOLDEN_TOLERANCE || set_margin < GOLDEN_TOLERANCE;
        if (!near_tie)
            printf("\n    step %s %s: got id %u of %d, margins %g %g\n", v->words[1], v->words[2],
                   d->trace_id, d->count, (double)margin, (double)set_margin);
        CU_ASSERT(near_tie);
        return false;
    }
    CHECK_EQ(d->phase == PHASE_THINKING, v->words[1][0] == 't');
    CHECK_NEAR(d->entropy, vec_value_float(v, "H"), GOLDEN_TOLERANCE);
    CHECK_NEAR(d->p, vec_value_float(v, "p"), GOLDEN_TOLERANCE);
    return true;
}

static void test_golden(void) {
    static struct recorded r;
    const struct engine_options o = options_now();
    if (comm_rank(job) != 0) {
        engine_follow(job_model, job, &o);
        return;
    }
    must(engine_new(job_model, job, &o, on_golden_event, &r, &live));
    struct vec_file v;
    struct request request = {0};
    static uint32_t prompt[PROMPT_MAX];
    int runs = 0, compared = 0, skipped = 0, at = 0;
    bool together = false;
    double worst = 0;
    vec_open(&v, "tiny_soft.vec");
    while (vec_next(&v)) {
        if (vec_is(&v, "run")) {
            request = request_of_run(&v);
            runs++;
        } else if (vec_is(&v, "prompt")) {
            request.prompt = (struct request_inputs){.count = v.word_count - 1, .ids = prompt};
            CU_ASSERT_FATAL(v.word_count - 1 <= PROMPT_MAX);
            for (int i = 1; i < v.word_count; i++) prompt[i - 1] = (uint32_t)atoi(v.words[i]);
            memset(&r, 0, sizeof r);
            wanted_choice = request.choices - 1;
            CHECK_EQ(engine_submit(live, &request), STATUS_OK);
            while (engine_tick(live)) {
            }
            at = 0;
            together = true;
        } else if (vec_is(&v, "step")) {
            if (together && at < r.count) together = golden_step(&v, &r.steps[at], &worst);
            compared += together;
            skipped += !together;
            at++;
        } else if (vec_is(&v, "end") && together) {
            CHECK_EQ(at, r.count);
            CHECK_STR(think_end_name(r.thinking_end), v.words[1]);
            CHECK_STR(finish_name(r.finish), v.words[2]);
        }
    }
    vec_close(&v);
    engine_stop(live);
    engine_free(live);
    printf("(%d traces, %d steps equal, %d after a near-tie, worst weight error %.1e) ", runs,
           compared, skipped, worst);
    CU_ASSERT(runs >= 10 && compared > 500 && skipped * 20 <= compared + skipped);
}

const struct suite_case suite_cases[] = {{"one workload, any ranks, any schedule", test_ranks},
                                         {"the score of a trace is the run", test_score_of_trace},
                                         {"golden traces", test_golden},
                                         {NULL, NULL}};
