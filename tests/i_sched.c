/* i_sched.c: the engine over a fake model (i_fake.h): scheduling may not change a bit
 * (verification.md §5.1).
 *
 * The reference is a loop over one sequence without engine, pages, chunks or merging: it folds the
 * inputs, edits and sorts the whole row, and calls think_step with the complete list. Everything
 * the engine can do to a request (batch, chunk, preempt, share, cache, cancel, spread over ranks)
 * must give the same decisions.
 */
#include <sys/wait.h>

#include "engine/engine.h"
#include "i_fake.h"

enum { REQUESTS_MAX = 256, CLOSE = 5, OPEN = 6, EOS = 7, EOS2 = 190 };

/* What one choice did, from events or from the reference. */
struct run {
    int count, capacity;
    struct think_decision *decisions;
    float *logprobs;
    int scored;
    float entropies[512];
    double next_logprobs[512];
    bool finished;
    enum finish finish;
    bool stopped_by_id, loop_break;
    enum think_end thinking_end;
    struct request_usage usage;
    uint64_t top_hash;
};

static struct script {
    struct request request;
    uint32_t ids[2048];
    float weights[2048];
    int32_t begin[600];
    struct request_bias bias[8];
    struct run want[8], got[8];
} scripts[REQUESTS_MAX];

static void run_push(struct run *run, const struct think_decision *d, float logprob,
                     const struct logprob_entry *top, int top_count) {
    if (run->count == run->capacity) {
        run->capacity = run->capacity ? 2 * run->capacity : 64;
        run->decisions = realloc(run->decisions, (size_t)run->capacity * sizeof *run->decisions);
        run->logprobs = realloc(run->logprobs, (size_t)run->capacity * sizeof *run->logprobs);
    }
    run->decisions[run->count] = *d;
    run->logprobs[run->count++] = logprob;
    for (int i = 0; i < top_count; i++) {
        uint32_t bits;
        memcpy(&bits, &top[i].logprob, sizeof bits);
        run->top_hash = fake_mix(fake_mix(run->top_hash, top[i].id), bits);
    }
}

static void run_clear(struct run *run) {
    free(run->decisions);
    free(run->logprobs);
    memset(run, 0, sizeof *run);
}

/* ---- scripted requests ---- */

static uint64_t seed_now;
static uint32_t draw_index;
static uint32_t draw(uint32_t below) { return suite_random(seed_now, draw_index++) % below; }

static struct request plain_request(uint64_t id) {
    struct request r = {.id = id,
                        .choices = 1,
                        .max_tokens = 40,
                        .repetition_penalty = 1,
                        .think = {.mode = THINK_SOFT,
                                  .max_topk = 10,
                                  .thinking = {0.6f, 30, 0.95f, 0.001f},
                                  .answer = {0.6f, 30, 0.95f, 0},
                                  .cold_stop = true,
                                  .cold_stop_entropy = 0.01f,
                                  .cold_stop_length = 256,
                                  .start = START_FIRST_TOKEN,
                                  .gumbel_temperature = 0.5f,
                                  .dirichlet_alpha = 1,
                                  .seed = id * 77 + 1,
                                  .open_id = OPEN,
                                  .close_id = CLOSE,
                                  .eos_count = 2,
                                  .eos_ids = {EOS, EOS2}}};
    return r;
}

/* Prompt of script i: length positions, some of them soft when asked. group: scripts of one group
 * share their first positions. */
static void make_prompt(struct script *s, int length, bool soft, uint32_t group) {
    int n = 0;
    for (int p = 0; p < length; p++) {
        const bool mixed = soft && suite_random(seed_now + 99, (uint32_t)p + 4096 * group) % 3 == 0;
        const int count = mixed ? 3 : 1;
        s->begin[p] = n;
        for (int k = 0; k < count; k++) {
            s->ids[n] = (suite_random(seed_now + 98, (uint32_t)(p + k) + 4096 * group) +
                         31u * (uint32_t)k) %
                        FAKE_VOCAB;
            for (int j = s->begin[p]; j < n; j++)
                if (s->ids[j] == s->ids[n])
                    s->ids[n] = (s->ids[n] + 1) % FAKE_VOCAB, j = s->begin[p] - 1;
            s->weights[n++] = count == 1 ? 1.0f : k == 0 ? 0.5f : 0.25f;
        }
    }
    s->begin[length] = n;
    s->request.prompt =
        (struct request_inputs){length, soft ? s->begin : NULL, s->ids, soft ? s->weights : NULL};
}

static void make_script(int i, bool with_choices) {
    struct script *s = &scripts[i];
    s->request = plain_request(1000 + (uint64_t)i);
    struct request *r = &s->request;
    const uint32_t group = draw(4);
    make_prompt(s, 1 + (int)draw(draw(3) ? 90 : 260), draw(3) == 0, group);
    struct think_params *t = &r->think;
    t->mode = (enum think_mode)draw(4);
    t->max_topk = draw(4) == 0 ? 50 : 1 + (int)draw(12);
    t->thinking = (struct think_filters){draw(5) == 0 ? 0 : 0.4f + 0.1f * (float)draw(8),
                                         (int)draw(80), draw(2) ? 1.0f : 0.9f, draw(2) ? 0 : 0.01f};
    t->answer = (struct think_filters){draw(4) == 0 ? 0
                                       : draw(2)    ? 1.0f
                                                    : 0.7f,
                                       draw(2) ? 0 : 20, draw(2) ? 1.0f : 0.95f, 0};
    t->start = draw(2) ? START_FIRST_TOKEN : START_AUTO;
    t->on_eos = (enum think_on_eos)draw(3);
    t->cold_stop = draw(2);
    t->cold_stop_entropy = 2.5f;
    t->cold_stop_length = 3;
    t->budget = draw(3) ? 0 : 1 + (int)draw(20);
    t->ignore_eos = draw(3) == 0;
    if (draw(3) == 0) {
        t->close_text_count = 2;
        t->close_text[0] = 100;
        t->close_text[1] = 101;
    }
    r->max_tokens = 1 + (int)draw(draw(3) ? 30 : 150);
    r->min_tokens = draw(3) ? 0 : (int64_t)draw((uint32_t)r->max_tokens + 1);
    if (draw(2)) {
        r->stop_id_count = 2;
        r->stop_ids[0] = 11;
        r->stop_ids[1] = 150;
    }
    if (draw(3) == 0) {
        r->presence_penalty = 0.5f;
        r->frequency_penalty = 0.25f;
    }
    if (draw(3) == 0) r->repetition_penalty = 1.2f;
    if (draw(3) == 0) {
        r->bias_count = 2;
        s->bias[0] = (struct request_bias){140, 3.5f};
        s->bias[1] = (struct request_bias){3, -2};
        r->bias = s->bias;
    }
    r->logprobs = draw(2);
    r->top_logprobs = r->logprobs ? (int)draw(21) : 0;
    if (with_choices && draw(3) == 0) {
        r->choices = 2 + (int)draw(3);
        r->share_thinking = draw(2);
    }
    if (draw(8) == 0) {
        r->score = true;
        r->choices = 1;
        r->max_tokens = r->min_tokens = 0;
        r->top_logprobs = (int)draw(21);
    }
}

/* ---- reference ---- */

static uint64_t fold_prompt(const struct request *r, int64_t count) {
    uint64_t state = 1;
    for (int64_t p = 0; p < count; p++) {
        const int64_t begin = r->prompt.begin ? r->prompt.begin[p] : p;
        const int64_t end = r->prompt.begin ? r->prompt.begin[p + 1] : p + 1;
        state =
            fake_mix(state, fake_input_digest(r->prompt.ids + begin,
                                              r->prompt.weights ? r->prompt.weights + begin : NULL,
                                              (int)(end - begin)));
    }
    return state;
}

struct row {
    float z[FAKE_VOCAB], m, s, q;
    struct batch_pair sorted[FAKE_VOCAB];
    int count;
};

static void finish_row(struct row *row) {
    fake_stats(row->z, 0, FAKE_SLABS, &row->m, &row->s, &row->q);
    row->count = 0;
    for (uint32_t v = 0; v < FAKE_VOCAB; v++)
        if (row->z[v] > -INFINITY) row->sorted[row->count++] = (struct batch_pair){row->z[v], v};
    qsort(row->sorted, (size_t)row->count, sizeof *row->sorted, fake_order);
}
static float logprob_in(const struct row *row, uint32_t id) {
    return (row->z[id] - row->m) - fmath_log(row->s);
}

static void edit_row(const struct request *r, const struct think_params *p,
                     const struct think_state *st, const struct run *run, struct row *row) {
    const bool young = st->step < r->min_tokens;
    for (uint32_t v = 0; v < FAKE_VOCAB; v++) {
        float generated = 0, add = 0;
        bool prompt = false, eos = (int)v == EOS || (int)v == EOS2, stop = false;
        for (int i = 0; i < run->count; i++) generated += run->decisions[i].trace_id == v;
        for (int64_t i = 0; i < r->prompt.count; i++)
            prompt |= r->prompt.ids[r->prompt.begin ? r->prompt.begin[i] : i] == v;
        for (int i = 0; i < r->stop_id_count; i++) stop |= r->stop_ids[i] == v;
        for (int i = 0; i < r->bias_count; i++)
            if (r->bias[i].id == v) add = r->bias[i].add;
        if (generated > 0 || prompt)
            row->z[v] = row->z[v] > 0 ? row->z[v] / r->repetition_penalty
                                      : row->z[v] * r->repetition_penalty;
        if (generated > 0) add = add - r->presence_penalty - r->frequency_penalty * generated;
        if (eos && !p->ignore_eos &&
            (young || (p->on_eos == ON_EOS_MASK && st->phase == PHASE_THINKING)))
            add = -INFINITY;
        if (stop && young && st->phase == PHASE_ANSWER) add = -INFINITY;
        row->z[v] += add;
    }
}

static void reference_score(const struct request *r, struct run *run) {
    float t = r->think.thinking.temperature;
    if (t < 1e-3f) t = 1;
    for (int64_t p = 0; p < r->prompt.count; p++) {
        struct row raw, own;
        fake_logits(fold_prompt(r, p + 1), raw.z);
        for (int v = 0; v < FAKE_VOCAB; v++) own.z[v] = raw.z[v] / t;
        finish_row(&raw);
        finish_row(&own);
        double next = NAN;
        if (p + 1 < r->prompt.count) {
            const int64_t begin = r->prompt.begin ? r->prompt.begin[p + 1] : p + 1;
            const int64_t end = r->prompt.begin ? r->prompt.begin[p + 2] : p + 2;
            next = 0;
            for (int64_t i = begin; i < end; i++)
                next += (double)(r->prompt.weights ? r->prompt.weights[i] : 1.0f) *
                        (double)logprob_in(&raw, r->prompt.ids[i]);
        }
        run->entropies[run->scored] = fmath_log(own.s) - own.q / own.s;
        run->next_logprobs[run->scored++] = next;
    }
    run->finished = true;
    run->finish = FINISH_REASON_LENGTH;
}

/* Steps one choice until it ends or, with until_end, until its thinking ended. Returns whether it
 * ended. */
static bool reference_steps(const struct request *r, const struct think_params *p,
                            struct think_state *st, uint64_t *state, struct run *run,
                            bool until_end) {
    for (;;) {
        struct row raw, row;
        fake_logits(*state, raw.z);
        row = raw;
        edit_row(r, p, st, run, &row);
        const float t = think_row_temperature(p, st);
        for (int v = 0; v < FAKE_VOCAB; v++) row.z[v] = row.z[v] / t;
        finish_row(&row);
        finish_row(&raw);
        float z[FAKE_VOCAB];
        uint32_t id[FAKE_VOCAB];
        for (int i = 0; i < row.count; i++) {
            z[i] = row.sorted[i].z;
            id[i] = row.sorted[i].id;
        }
        const struct think_candidates c = {row.m, row.s, row.q, row.count,
                                           true,  z,     id,    row.z[CLOSE]};
        struct think_decision d;
        CU_ASSERT(think_step(p, st, &c, &d));
        struct logprob_entry top[32];
        for (int i = 0; i < r->top_logprobs; i++)
            top[i] = (struct logprob_entry){raw.sorted[i].id, logprob_in(&raw, raw.sorted[i].id)};
        run_push(run, &d, r->logprobs ? logprob_in(&raw, d.trace_id) : NAN, top, r->top_logprobs);
        *state = fake_mix(*state, fake_input_digest(d.ids, d.weights, d.count));
        run->thinking_end = st->end;
        run->finish = FINISH_REASON_STOP;
        if (d.finish != FINISH_NONE) break;
        for (int i = 0; i < r->stop_id_count; i++)
            if (d.phase == PHASE_ANSWER && !d.forced && r->stop_ids[i] == d.trace_id)
                run->stopped_by_id = true;
        if (run->stopped_by_id) break;
        run->finish = FINISH_REASON_LENGTH;
        if ((int64_t)st->step == r->max_tokens) {
            think_finish_length(st);
            run->thinking_end = st->end;
            break;
        }
        if (until_end && (d.end != END_NONE ||
                          (st->step == 4 && st->thinking_steps == 0 && st->phase == PHASE_ANSWER)))
            return false;
    }
    run->finished = true;
    return true;
}

static void reference_choice(const struct request *r, int choice, struct run *run) {
    struct think_params p = r->think;
    struct think_state st;
    uint64_t state = fold_prompt(r, r->prompt.count);
    uint32_t first[600];
    for (int64_t i = 0; i < r->prompt.count; i++)
        first[i] = r->prompt.ids[r->prompt.begin ? r->prompt.begin[i] : i];
    think_state_init(&st, &p, first, r->prompt.count);
    if (choice > 0 && r->share_thinking) {
        const struct think_state fresh = st;
        if (reference_steps(r, &p, &st, &state, run, true)) {
            if (st.thinking_steps > 0) return; /* ended inside the shared part: all end alike */
        } else if (st.thinking_steps > 0) {
            p.choice = (uint32_t)choice;
            reference_steps(r, &p, &st, &state, run, false);
            return;
        }
        run_clear(run); /* no thinking to share: from the prompt */
        st = fresh;
        state = fold_prompt(r, r->prompt.count);
    }
    p.choice = (uint32_t)choice;
    reference_steps(r, &p, &st, &state, run, false);
}

static bool fit_for_runs; /* scripts without what only ordinary steps can do */

static void make_scripts(uint64_t seed, int count, bool with_choices) {
    seed_now = seed;
    draw_index = 0;
    for (int i = 0; i < count; i++) {
        for (int c = 0; c < 8; c++) run_clear(&scripts[i].want[c]);
        make_script(i, with_choices);
        if (fit_for_runs) {
            struct request *r = &scripts[i].request;
            if (r->score) r->max_tokens = 30;
            r->score = r->logprobs = false;
            r->top_logprobs = 0;
            r->presence_penalty = r->frequency_penalty = 0;
            r->repetition_penalty = 1;
            if (i % 8) r->think.thinking.top_k = r->think.answer.top_k = 1 + i; /* lists suffice */
        }
        const struct request *r = &scripts[i].request;
        if (r->score) reference_score(r, &scripts[i].want[0]);
        for (int c = 0; c < r->choices && !r->score; c++)
            reference_choice(r, c, &scripts[i].want[c]);
    }
}

/* ---- running the engine ---- */

static engine *live;
static int finished_choices;
static int cancel_one_in; /* > 0: each step event cancels its choice with probability 1 / this */
static bool cancel_quietly;

static void on_event(void *user, const struct engine_event *ev) {
    CU_ASSERT(user == &scripts);
    struct run *run = &scripts[ev->request_id - 1000].got[ev->choice];
    CU_ASSERT(!run->finished);
    if (ev->kind == ENGINE_STEP) {
        CHECK_EQ(ev->step, run->count);
        run_push(run, ev->decision, ev->logprob, ev->top, ev->top_count);
        if (cancel_one_in && draw((uint32_t)cancel_one_in) == 0) {
            if (cancel_quietly) {
                run->finished = true;
                run->finish = FINISH_REASON_ABORT;
                finished_choices++;
            }
            engine_cancel(live, ev->request_id, ev->choice, cancel_quietly);
        }
    } else if (ev->kind == ENGINE_SCORED) {
        CHECK_EQ(ev->position, run->scored);
        run->entropies[run->scored] = ev->entropy;
        run->next_logprobs[run->scored++] = ev->next_logprob;
        CHECK_EQ(ev->top_count, scripts[ev->request_id - 1000].request.top_logprobs);
    } else {
        run->finished = true;
        run->finish = ev->finish;
        run->stopped_by_id = ev->stopped_by_id;
        run->loop_break = ev->loop_break;
        run->thinking_end = ev->thinking_end;
        run->usage = ev->usage;
        finished_choices++;
    }
}

struct way { /* of running the scripts */
    int max_seqs, chunk, pages, ranks;
    bool cache;
    int preempt_in; /* > 0: before a tick, evict with probability 1 / this */
    int arrive_in;  /* > 0: a request arrives per tick with probability 1 / this; 0: all at once */
    bool reversed;  /* order of submission */
};
static int run_steps, run_ahead; /* of the engine's runs; 0: none */
static const struct way plain_way = {64, 512, 4000, 1, false, 0, 0, false};

static struct engine_counters run_scripts(int count, const struct way *w) {
    fake.ranks = w->ranks;
    const struct engine_options o = {.max_seqs = w->max_seqs,
                                     .max_batched_tokens = w->chunk,
                                     .max_model_len = 512,
                                     .page_count = w->pages,
                                     .prefix_cache = w->cache,
                                     .vocab_count = FAKE_VOCAB,
                                     .run_steps = run_steps,
                                     .launch_ahead = run_ahead};
    int64_t position_max = 512;
    if (position_max > (int64_t)w->pages * KV_PAGE_TOKENS)
        position_max = (int64_t)w->pages * KV_PAGE_TOKENS;
    fake.limits = (struct plan_limits){
        w->chunk, 64,       64,         128,          64 * w->chunk, 1 << 20,   1 << 20,
        1 << 20,  w->pages, FAKE_VOCAB, position_max, FAKE_RUN_ROWS, run_steps, run_ahead};
    memset(fake.pages, 0xee, sizeof fake.pages);
    CHECK_EQ(engine_new((model *)&fake, NULL, &o, on_event, &scripts, &live), STATUS_OK);
    int submitted = 0, choices = 0;
    finished_choices = 0;
    for (int i = 0; i < count; i++)
        for (int c = 0; c < 8; c++) run_clear(&scripts[i].got[c]);
    while (submitted < count || finished_choices < choices) {
        while (submitted < count && (!w->arrive_in || draw((uint32_t)w->arrive_in) == 0)) {
            const struct script *s = &scripts[w->reversed ? count - 1 - submitted : submitted];
            CHECK_EQ(engine_submit(live, &s->request), STATUS_OK);
            choices += s->request.choices;
            submitted++;
        }
        if (w->preempt_in && draw((uint32_t)w->preempt_in) == 0) engine_preempt(live);
        if (!engine_tick(live) && submitted == count && finished_choices < choices) {
            CU_FAIL("the engine stopped before all were done");
            break;
        }
    }
    /* launched ahead before the stop, and before it was seen that all rows rest */
    for (int i = 0; i < 2 * run_ahead && engine_tick(live); i++) continue;
    CU_ASSERT(!engine_tick(live));
    struct engine_counters counters;
    engine_counters_get(live, &counters);
    CHECK_EQ(counters.pages_used, 0);
    CHECK_EQ(counters.running, 0);
    CHECK_EQ(counters.waiting, 0);
    CHECK_EQ(counters.pages_free + counters.pages_cached, w->pages);
    engine_stop(live);
    engine_free(live);
    return counters;
}

static void check_run(int i, int choice) {
    const struct run *want = &scripts[i].want[choice], *got = &scripts[i].got[choice];
    CHECK_EQ(got->count, want->count);
    for (int s = 0; s < got->count && s < want->count; s++) {
        if (!suite_equal_bytes("decision", &got->decisions[s], &want->decisions[s],
                               sizeof want->decisions[s])) {
            printf("    seed %llu, request %d, choice %d, step %d\n", (unsigned long long)seed_now,
                   i, choice, s);
            CU_FAIL("a decision differs from the reference");
            return;
        }
    }
    CU_ASSERT(got->count == 0 ||
              memcmp(got->logprobs, want->logprobs, (size_t)want->count * sizeof(float)) == 0);
    CU_ASSERT(got->top_hash == want->top_hash);
    CHECK_EQ(got->scored, want->scored);
    CU_ASSERT(memcmp(got->entropies, want->entropies, sizeof want->entropies) == 0);
    for (int p = 0; p < want->scored; p++) {
        const double a = got->next_logprobs[p], b = want->next_logprobs[p];
        CU_ASSERT(a == b || (a != a && b != b));
    }
    CHECK_EQ(got->finish, want->finish);
    CHECK_EQ(got->stopped_by_id, want->stopped_by_id);
    CHECK_EQ(got->thinking_end, want->thinking_end);
}

static void check_all(int count) {
    for (int i = 0; i < count; i++)
        for (int c = 0; c < scripts[i].request.choices; c++) check_run(i, c);
}

static void check_way(int count, const struct way *w) {
    run_scripts(count, w);
    check_all(count);
}

/* ---- tests ---- */

static void test_alone(void) {
    make_scripts(1, 40, false);
    for (int i = 0; i < 40; i++) {
        struct script keep = scripts[0];
        scripts[0] = scripts[i];
        scripts[0].request.id = 1000;
        memset(scripts[0].got, 0, sizeof scripts[0].got);
        if (scripts[0].request.prompt.begin) scripts[0].request.prompt.begin = scripts[0].begin;
        check_way(1, &plain_way);
        for (int c = 0; c < 8; c++) run_clear(&scripts[0].got[c]);
        scripts[0] = keep;
    }
}

static void test_batch(void) {
    make_scripts(2, 60, false);
    static const int slots[] = {1, 2, 3, 7, 12, 64};
    for (int i = 0; i < 6; i++)
        check_way(60, &(struct way){slots[i], 512, 4000, 1, false, 0, 0, i % 2});
    check_way(60, &(struct way){16, 128, 4000, 1, false, 0, 3, false});
}

static void test_chunks(void) {
    make_scripts(3, 40, false);
    static const int chunks[] = {1, 2, 7, 16, 64, 100, 512};
    for (int i = 0; i < 7; i++)
        check_way(40, &(struct way){8, chunks[i], 4000, 1, false, 0, 0, false});
}

static void test_preemption(void) {
    make_scripts(4, 40, true);
    const struct engine_counters k =
        run_scripts(40, &(struct way){16, 64, 4000, 1, false, 3, 0, false});
    check_all(40);
    CU_ASSERT(k.preemptions > 50);
    check_way(40, &(struct way){16, 64, 10, 1, true, 5, 4, false});
}

/* Long answers of many short prompts in 8 pages: none can finish beside three others. */
static void test_pages_run_out(void) {
    seed_now = 14;
    for (int i = 0; i < 12; i++) {
        struct script *s = &scripts[i];
        run_clear(&s->want[0]);
        s->request = plain_request(1000 + (uint64_t)i);
        make_prompt(s, 10 + i, i % 2, (uint32_t)i);
        s->request.think.mode = i % 3 ? THINK_GUMBEL : THINK_SOFT;
        s->request.think.ignore_eos = true;
        s->request.max_tokens = 150;
        reference_choice(&s->request, 0, &s->want[0]);
    }
    for (int cache = 0; cache < 2; cache++) {
        const struct engine_counters k =
            run_scripts(12, &(struct way){12, 64, 8, 1, cache, 0, 0, false});
        check_all(12);
        CU_ASSERT(k.preemptions > 0);
        CU_ASSERT(k.preemptions < 60); /* they do not take turns evicting one another */
    }
}

static void test_prefix_cache(void) {
    make_scripts(5, 60, true);
    const struct engine_counters cold =
        run_scripts(60, &(struct way){1, 512, 4000, 1, false, 0, 0, false});
    check_all(60);
    CHECK_EQ(cold.cached_tokens, 0);
    const struct engine_counters warm =
        run_scripts(60, &(struct way){1, 512, 4000, 1, true, 0, 0, false});
    check_all(60);
    CU_ASSERT(warm.cached_tokens > 0);
    CHECK_EQ(warm.prompt_tokens, cold.prompt_tokens);
    CU_ASSERT(warm.decision_hash == cold.decision_hash);
    check_way(60,
              &(struct way){8, 64, 12, 1, true, 7, 0, true}); /* with eviction of cached pages */
}

static void test_choices(void) {
    make_scripts(6, 60, true);
    const struct engine_counters k = run_scripts(60, &plain_way);
    check_all(60);
    int64_t made = 0, prompts = 0;
    for (int i = 0; i < 60; i++) {
        prompts += scripts[i].got[0].usage.prompt_tokens;
        for (int c = 0; c < scripts[i].request.choices; c++)
            made += scripts[i].got[c].usage.completion_tokens;
    }
    CHECK_EQ(k.generated_tokens, made); /* shared steps count once */
    CHECK_EQ(k.prompt_tokens, prompts);
    check_way(60, &(struct way){3, 32, 4000, 1, false, 0, 0, false});
    check_way(60, &(struct way){4, 32, 16, 1, true, 6, 2, false});
    int shared = 0;
    for (int i = 0; i < 60; i++) {
        const struct request *r = &scripts[i].request;
        if (!r->share_thinking) continue;
        int64_t thinking = 0, steps = 0;
        for (int c = 0; c < r->choices; c++) {
            const struct request_usage *u = &scripts[i].got[c].usage;
            thinking += u->reasoning_tokens;
            steps += u->completion_tokens;
            if (c > 0 && u->reasoning_tokens == 0 && scripts[i].got[0].usage.reasoning_tokens > 0)
                shared++;
        }
        CU_ASSERT(thinking <= steps);
    }
    CU_ASSERT(shared > 0); /* the case occurs */
}

/* One prompt, n choices: it is run once, and its full pages are held once. */
static void test_prompt_shared(void) {
    seed_now = 7;
    struct script *s = &scripts[0];
    s->request = plain_request(1000);
    make_prompt(s, 200, false, 0);
    s->request.choices = 8;
    s->request.max_tokens = 4;
    s->request.think.mode = THINK_GUMBEL;
    s->request.think.ignore_eos = true;
    for (int c = 0; c < 8; c++) {
        run_clear(&s->want[c]);
        reference_choice(&s->request, c, &s->want[c]);
    }
    const struct engine_counters k =
        run_scripts(1, &(struct way){8, 512, 3 + 8, 1, false, 0, 0, false});
    check_all(1);
    CHECK_EQ(k.preemptions, 0); /* 3 shared pages and one of each choice's own suffice */
    CHECK_EQ(k.prompt_tokens, 200);
}

/* Rows without any id that could follow: those who wait for the thinking of such a choice end as well. */
static void test_broken_rows(void) {
    fit_for_runs = true;
    for (run_steps = 0; run_steps <= 8; run_steps += 8) {
        int broken = 0, waited = 0;
        run_ahead = run_steps ? 2 : 0;
        make_scripts(12, 60, true); /* their references know nothing of it */
        fake.break_one_in = 8;
        run_scripts(60, &(struct way){12, 64, 4000, 1, true, 0, 0, false});
        fake.break_one_in = 0;
        for (int i = 0; i < 60; i++)
            for (int c = 0; c < scripts[i].request.choices; c++) {
                const bool ended = scripts[i].got[c].finish == FINISH_REASON_ERROR;
                CU_ASSERT(scripts[i].got[c].finished);
                broken += ended;
                waited += ended && c > 0 && scripts[i].request.share_thinking &&
                          scripts[i].got[0].finish == FINISH_REASON_ERROR;
            }
        CU_ASSERT(broken > 20 && waited > 5);
    }
    run_steps = run_ahead = 0;
    fit_for_runs = false;
}

static void test_cancel(void) {
    for (int quiet = 0; quiet < 2; quiet++) {
        make_scripts(8, 120, true);
        cancel_one_in = 12;
        cancel_quietly = quiet;
        run_scripts(
            120, &(struct way){16, 64, 40, 1, true, 9, 2, false}); /* checks that no page is left */
        cancel_one_in = 0;
        int aborted = 0;
        for (int i = 0; i < 120; i++)
            for (int c = 0; c < scripts[i].request.choices; c++) {
                struct run *got = &scripts[i].got[c];
                const struct run *want = &scripts[i].want[c];
                if (got->finish != FINISH_REASON_ABORT) {
                    check_run(i, c);
                    continue;
                }
                aborted++;
                CU_ASSERT(got->count <= want->count); /* a prefix of what it would have been */
                CU_ASSERT(memcmp(got->decisions, want->decisions,
                                 (size_t)got->count * sizeof *want->decisions) == 0);
            }
        CU_ASSERT(aborted > 50);
    }
}

static void test_ranks(void) {
    make_scripts(9, 40, true);
    uint64_t hash = 0;
    for (int ranks = 1; ranks <= 8; ranks *= 2) {
        const struct engine_counters k =
            run_scripts(40, &(struct way){12, 64, 4000, ranks, true, 0, 0, false});
        check_all(40);
        if (ranks == 1) hash = k.decision_hash;
        CU_ASSERT(k.decision_hash == hash);
        CU_ASSERT(k.full_fetches > 0);
    }
    for (int ranks = 3; ranks < 8; ranks += ranks == 3 ? 2 : 1) {
        const struct engine_counters a =
            run_scripts(40, &(struct way){12, 64, 4000, ranks, true, 0, 0, false});
        const struct engine_counters b =
            run_scripts(40, &(struct way){5, 32, 30, ranks, false, 9, 2, true});
        CU_ASSERT(a.decision_hash == b.decision_hash);
    }
}

static void test_many_queued(void) {
    make_scripts(10, 200, false);
    const struct engine_counters k =
        run_scripts(200, &(struct way){64, 256, 120, 1, true, 0, 0, false});
    check_all(200);
    int64_t steps = 0, prompts = 0;
    for (int i = 0; i < 200; i++) {
        steps += scripts[i].got[0].usage.completion_tokens;
        prompts += scripts[i].got[0].usage.prompt_tokens;
        CHECK_EQ(scripts[i].got[0].usage.completion_tokens, scripts[i].want[0].count);
    }
    CHECK_EQ(k.generated_tokens, steps); /* totals = sum of usage */
    CHECK_EQ(k.prompt_tokens, prompts);
}

static void test_random_ways(void) {
    for (uint64_t seed = 20; seed < 26; seed++) {
        make_scripts(seed, 24, true);
        draw_index = 1000000;
        struct way w = {.max_seqs = 1 + (int)draw(20),
                        .chunk = 1 + (int)draw(100),
                        .pages = 8 + (int)draw(40),
                        .ranks = 1 << draw(4),
                        .cache = draw(2),
                        .arrive_in = (int)draw(4),
                        .reversed = draw(2)};
        w.preempt_in =
            4 + 1000 / w.chunk; /* rarer than a prompt takes, or nothing would ever end */
        check_way(24, &w);
    }
}

static void check_refused(engine *e, struct request r, enum status want, const char *param,
                          const char *code) {
    CHECK_EQ(engine_submit(e, &r), want);
    CHECK_STR(fail_last()->param, param);
    CHECK_STR(fail_last()->code, code);
}

static void test_refusals(void) {
    static const char too_long[] = "context_length_exceeded";
    const struct engine_options o = {.max_seqs = 2,
                                     .max_batched_tokens = 64,
                                     .max_model_len = 512,
                                     .page_count = 4, /* 256 positions: less than max_model_len */
                                     .queue_max = 1,
                                     .vocab_count = FAKE_VOCAB};
    fake.ranks = 1;
    fake.limits = (struct plan_limits){64,      2, 64,         128, 64 * 64, 1 << 20, 1 << 20,
                                       1 << 20, 4, FAKE_VOCAB, 256, 0,       0,       0};
    engine *e;
    CHECK_EQ(engine_new((model *)&fake, NULL, &o, on_event, &scripts, &e), STATUS_OK);
    struct script *s = &scripts[0];
    s->request = plain_request(1000);
    make_prompt(s, 20, true, 0);
    struct request r = s->request;
    r.prompt.count = 0;
    check_refused(e, r, STATUS_REQUEST, "prompt", "");
    r = s->request;
    s->weights[0] += 0.01f; /* the sum of the first concept token */
    check_refused(e, r, STATUS_REQUEST, "prompt", "");
    s->weights[0] -= 0.01f;
    const uint32_t id = s->ids[3];
    s->ids[3] = FAKE_VOCAB;
    check_refused(e, r, STATUS_REQUEST, "prompt", "");
    s->ids[3] = id;
    r.max_tokens = 237;
    check_refused(e, r, STATUS_REQUEST, "max_tokens", too_long);
    CU_ASSERT(
        strstr(fail_text(),
               "maximum context length is 256 tokens. However, you requested 257 tokens (20 in the "
               "messages, 237 in the completion)") != NULL);
    make_prompt(s, 256, false, 0);
    r = s->request;
    r.max_tokens = 1;
    check_refused(e, r, STATUS_REQUEST, "prompt", too_long);
    make_prompt(s, 20, false, 0);
    r = s->request;
    r.choices = 65;
    check_refused(e, r, STATUS_REQUEST, "n", "");
    r.choices = 4; /* 2 slots and a queue of 1 */
    check_refused(e, r, STATUS_REQUEST, "n", "");
    r = s->request;
    r.max_tokens = 0;
    check_refused(e, r, STATUS_REQUEST, "max_tokens", "");
    r = s->request;
    r.min_tokens = r.max_tokens + 1;
    check_refused(e, r, STATUS_REQUEST, "min_tokens", "");
    r = s->request;
    r.repetition_penalty = 0;
    check_refused(e, r, STATUS_REQUEST, "repetition_penalty", "");
    r = s->request;
    r.presence_penalty = NAN;
    check_refused(e, r, STATUS_REQUEST, "presence_penalty", "");
    r = s->request;
    r.top_logprobs = 21;
    check_refused(e, r, STATUS_REQUEST, "top_logprobs", "");
    r = s->request;
    r.stop_id_count = 1;
    r.stop_ids[0] = FAKE_VOCAB;
    check_refused(e, r, STATUS_REQUEST, "stop_token_ids", "");
    r = s->request;
    r.bias_count = 2;
    r.bias = s->bias;
    s->bias[0] = s->bias[1] = (struct request_bias){3, 1};
    check_refused(e, r, STATUS_REQUEST, "logit_bias", "");
    r = s->request;
    r.think.max_topk = 65;
    check_refused(e, r, STATUS_REQUEST, "soft_thinking.max_topk", "");
    r = s->request;
    r.choices = 2;
    CHECK_EQ(engine_submit(e, &r), STATUS_OK);
    check_refused(e, r, STATUS_BUSY, "", ""); /* one more fits, two do not */
    r.choices = 1;
    check_refused(e, r, STATUS_REQUEST, "request_id", "");
    r.id = 1001;
    CHECK_EQ(engine_submit(e, &r), STATUS_OK);
    r.id = 1002;
    check_refused(e, r, STATUS_BUSY, "", "");
    engine_cancel(e, 1000, -1, true);
    engine_cancel(e, 1001, 0, true);
    engine_cancel(e, 4711, 0, false); /* nobody: nothing happens */
    CU_ASSERT(!engine_tick(e));
    engine_free(e);
}

/* One request, in a process of its own, with what `corrupt` arranges: the job must end. */
static void check_job_ends(int ranks, void (*corrupt)(void)) {
    seed_now = 13;
    scripts[0].request = plain_request(1000);
    make_prompt(&scripts[0], 30, false, 0);
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        fake.corrupt = true;
        if (corrupt) corrupt();
        run_scripts(1, &(struct way){4, 64, 100, ranks, false, 0, 0, false});
        _exit(0);
    }
    int how = 0;
    CU_ASSERT(waitpid(child, &how, 0) == child);
    CU_ASSERT(WIFEXITED(how));
    CHECK_EQ(WEXITSTATUS(how), STATUS_COMM);
}

/* A flipped bit in a record ends the job with the row and the rank, not with a plausible token. */
static void test_flipped_bit(void) { check_job_ends(2, NULL); }

/* Steps that decide on the device give the reference's decisions, whatever their number, however far they
 * are launched ahead, and whatever happens to their sequences meanwhile. */
static void test_runs(void) {
    fit_for_runs = true;
    make_scripts(31, 60, true);
    const struct engine_counters plain =
        run_scripts(60, &(struct way){.max_seqs = 12, .chunk = 64, .pages = 4000, .ranks = 1});
    check_all(60);
    for (int steps = 2; steps <= 32; steps *= 4)
        for (int ahead = 1; ahead <= RUN_AHEAD_MAX; ahead *= 2) {
            fake_run.begun = 0;
            run_steps = steps;
            run_ahead = ahead;
            const struct engine_counters k = run_scripts(
                60, &(struct way){12, 64, 4000, ahead == 2 ? 4 : 1, steps == 8, 0, 0, false});
            check_all(60);
            CU_ASSERT(k.decision_hash == plain.decision_hash);
            CHECK_EQ(k.generated_tokens, plain.generated_tokens);
            CHECK_EQ(k.soft_steps, plain.soft_steps);
            CU_ASSERT(fake_run.begun > 10);
            CU_ASSERT(k.run_steps > k.steps / 4);
        }
    CU_ASSERT(fake_run.ended_short > 0); /* and the row went on by an ordinary step */
    /* few pages, evictions, late arrivals, one slot */
    run_ahead = 2;
    check_way(60, &(struct way){16, 64, 12, 1, true, 9, 3, false});
    check_way(60, &(struct way){1, 512, 4000, 1, true, 0, 0, false});
    run_steps = 5;
    check_way(60, &(struct way){5, 32, 10, 2, false, 7, 2, true});
    fit_for_runs = false;
    make_scripts(32, 40, true); /* most steps cannot be runs */
    check_way(40, &(struct way){3, 64, 4000, 1, true, 11, 0, false});
    run_steps = run_ahead = 0;
}

/* A cancelled sequence costs at most the launch-ahead in further steps of its row, and no page. */
static void test_runs_cancelled(void) {
    fit_for_runs = true;
    make_scripts(33, 120, true);
    fit_for_runs = false;
    for (int ahead = 1; ahead <= 4; ahead *= 2) {
        cancel_one_in = 12;
        cancel_quietly = ahead == 2;
        fake_run.late = 0;
        run_steps = 16;
        run_ahead = ahead;
        run_scripts(120, &(struct way){16, 64, 400, 1, true, 20, 2, false});
        cancel_one_in = 0;
        int aborted = 0;
        for (int i = 0; i < 120; i++)
            for (int c = 0; c < scripts[i].request.choices; c++) {
                struct run *got = &scripts[i].got[c];
                if (got->finish != FINISH_REASON_ABORT) {
                    check_run(i, c);
                    continue;
                }
                aborted++;
                CU_ASSERT(memcmp(got->decisions, scripts[i].want[c].decisions,
                                 (size_t)got->count * sizeof *got->decisions) == 0);
            }
        CU_ASSERT(aborted > 50);
        CHECK_EQ(fake_run.late, 0);
    }
    run_steps = run_ahead = 0;
}

/* The other ranks' hashes: a rank that decides otherwise ends the job, with step, row and rank. */
static void differ_in_runs(void) {
    fake_run.differs_at = 3;
    run_steps = 8;
    run_ahead = 2;
}
static void test_runs_differ(void) { check_job_ends(1, differ_in_runs); }

/* Freeing an engine with work in it leaves nothing behind (seen by the leak checker). */
static void test_freed_in_flight(void) {
    make_scripts(12, 10, true);
    fake.limits = (struct plan_limits){64,      4,  64,         128, 64 * 64, 1 << 20, 1 << 20,
                                       1 << 20, 50, FAKE_VOCAB, 512, 0,       0,       0};
    const struct engine_options o = {.max_seqs = 4,
                                     .max_batched_tokens = 64,
                                     .max_model_len = 512,
                                     .page_count = 50,
                                     .vocab_count = FAKE_VOCAB};
    for (int i = 0; i < 10; i++)
        for (int c = 0; c < 8; c++) run_clear(&scripts[i].got[c]);
    CHECK_EQ(engine_new((model *)&fake, NULL, &o, on_event, &scripts, &live), STATUS_OK);
    for (int i = 0; i < 10; i++) CHECK_EQ(engine_submit(live, &scripts[i].request), STATUS_OK);
    for (int i = 0; i < 5; i++) CU_ASSERT(engine_tick(live));
    engine_free(live);
}

void suite_teardown(void) {
    for (int i = 0; i < REQUESTS_MAX; i++)
        for (int c = 0; c < 8; c++) {
            run_clear(&scripts[i].want[c]);
            run_clear(&scripts[i].got[c]);
        }
    free(fake.gather);
}

const struct suite_case suite_cases[] = {
    {"one request alone gives the reference's decisions", test_alone},
    {"beside others, in any slot and order", test_batch},
    {"prompts in chunks of any size", test_chunks},
    {"evicted at random steps and rebuilt", test_preemption},
    {"pages run out", test_pages_run_out},
    {"prefix cache: hit equals miss", test_prefix_cache},
    {"n choices, one thinking and n answers", test_choices},
    {"the pages of a prompt are shared by its choices", test_prompt_shared},
    {"rows without any id, and those that wait for them", test_broken_rows},
    {"random cancels leave no page behind", test_cancel},
    {"1, 2, 4, 8 ranks agree, others repeat themselves", test_ranks},
    {"64 sequences, 200 requests", test_many_queued},
    {"random ways of running random scripts", test_random_ways},
    {"what cannot run is refused", test_refusals},
    {"a flipped bit in a record is named", test_flipped_bit},
    {"runs: decisions on the device", test_runs},
    {"runs: cancelled within", test_runs_cancelled},
    {"runs: ranks that differ end the job", test_runs_differ},
    {"an engine may be freed in flight", test_freed_in_flight},
    {NULL, NULL}};
