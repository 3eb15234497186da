/* Chat templates. Expected prompts: transformers' apply_chat_template
 * (tests/data/golden/chat.jsonl), and for DeepSeek-R1 and Llama 3.1 the formats their model cards
 * print. */
#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "c_text.h"
#include "text/chat.h"

static chat_helper *helper;
static char *templates[TEXT_TOKENIZER_COUNT], *bos[TEXT_TOKENIZER_COUNT],
    *eos[TEXT_TOKENIZER_COUNT];

static char *copy_text(const json_t *config, const char *name) {
    const char *text = json_string_value(json_object_get(config, name));
    return text == NULL ? NULL : strdup(text);
}

int suite_setup(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    for (int i = 0; i < TEXT_TOKENIZER_COUNT; i++) {
        size_t n;
        json_error_t error;
        char *bytes = text_read(text_files[i].config, &n);
        if (bytes == NULL) return 1;
        json_t *config = json_loadb(bytes, n, JSON_DECODE_INT_AS_REAL, &error);
        templates[i] = copy_text(config, "chat_template");
        bos[i] = copy_text(config, "bos_token");
        eos[i] = copy_text(config, "eos_token");
        json_decref(config);
        free(bytes);
    }
    setenv("SFUMATO_API_KEY", "secret", 1);
    if (chat_helper_start(&helper) != STATUS_OK) return 1;
    if (helper == NULL)
        printf("\n    SKIPPED: tests of the model's own template (no python3 with jinja2)\n");
    return 0;
}

void suite_teardown(void) {
    for (int i = 0; i < TEXT_TOKENIZER_COUNT; i++) {
        free(templates[i]);
        free(bos[i]);
        free(eos[i]);
    }
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* --- golden prompts -------------------------------------------------------------------------- */

static chat *chats[TEXT_TOKENIZER_COUNT];
static int compared;

static bool is_plain(const json_t *messages) {
    size_t i;
    json_t *m;
    json_array_foreach(messages, i, m) {
        const char *role = json_string_value(json_object_get(m, "role"));
        if (strcmp(role, "tool") == 0 || !json_is_string(json_object_get(m, "content")))
            return false;
    }
    return true;
}

static void check_prompt(chat *c, const json_t *line) {
    const json_t *want = json_object_get(line, "text"),
                 *messages = json_object_get(line, "messages");
    char *text = json_dumps(messages, 0), *kwargs = json_dumps(json_object_get(line, "kwargs"), 0);
    char *prompt = NULL;
    size_t n = 0;
    const enum status status =
        chat_render(c, text, json_is_true(json_object_get(line, "add_generation_prompt")), false,
                    kwargs, &prompt, &n);
    if (status != STATUS_OK) printf("\n    %s\n", fail_text());
    CHECK_EQ(status, STATUS_OK);
    if (prompt != NULL) {
        CHECK_EQ(n, json_string_length(want));
        CHECK_STR(prompt, json_string_value(want));
    }
    compared++;
    free(prompt);
    free(text);
    free(kwargs);
}

static void each_helper(const json_t *line) {
    check_prompt(chats[text_file_index(json_string_value(json_object_get(line, "tokenizer")))],
                 line);
}

static void test_golden(void) {
    if (helper == NULL) return;
    for (int i = 0; i < TEXT_TOKENIZER_COUNT; i++)
        CHECK_EQ(chat_open(helper, templates[i], NULL, bos[i], eos[i], &chats[i]), STATUS_OK);
    compared = 0;
    text_lines("tests/data/golden/chat.jsonl", each_helper);
    CU_ASSERT(compared > 50);
    for (int i = 0; i < TEXT_TOKENIZER_COUNT; i++) chat_close(chats[i]);
}

/* Without a helper the recognised format gives the same prompts. */
static void each_builtin(const json_t *line) {
    const int i = text_file_index(json_string_value(json_object_get(line, "tokenizer")));
    if (chats[i] != NULL && is_plain(json_object_get(line, "messages")))
        check_prompt(chats[i], line);
}

static void test_builtin_golden(void) {
    for (int i = 0; i < 2; i++)
        CHECK_EQ(chat_open(NULL, templates[i], NULL, bos[i], eos[i], &chats[i]), STATUS_OK);
    chats[2] = NULL;
    compared = 0;
    text_lines("tests/data/golden/chat.jsonl", each_builtin);
    CU_ASSERT(compared > 30);
    for (int i = 0; i < 2; i++) chat_close(chats[i]);
    CHECK_EQ(chat_open(NULL, templates[2], NULL, NULL, NULL, &chats[2]), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "python3-jinja2") != NULL &&
              strstr(fail_text(), "--chat-template") != NULL);
}

/* --- built-in formats by name ---------------------------------------------------------------- */

static void check_render(chat *c, const char *messages, bool generate, bool continue_final,
                         const char *want) {
    char *prompt = NULL;
    size_t n = 0;
    const enum status status =
        chat_render(c, messages, generate, continue_final, NULL, &prompt, &n);
    if (status != STATUS_OK) printf("\n    %s\n", fail_text());
    CHECK_EQ(status, STATUS_OK);
    if (prompt != NULL) CHECK_STR(prompt, want);
    free(prompt);
}

#define U "{\"role\":\"user\",\"content\":\"Hi\"}"
#define S "{\"role\":\"system\",\"content\":\" Be brief. \"}"
#define A "{\"role\":\"assistant\",\"content\":\"<think>\\nx\\n</think>\\n\\nHo  \"}"
#define BAR "\xEF\xBD\x9C"
static void test_builtin_formats(void) {
    chat *c = NULL;
    CHECK_EQ(chat_open(NULL, NULL, "chatml", NULL, NULL, &c), STATUS_OK);
    check_render(c, "[" S "," U "]", true, false,
                 "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                 "<|im_start|>assistant\n");
    check_render(
        c, "[" U "," A "]", false, true,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nx\n</think>\n\nHo  ");
    chat_close(c);
    CHECK_EQ(chat_open(NULL, NULL, "llama3", "<|begin_of_text|>", NULL, &c), STATUS_OK);
    check_render(
        c, "[" S "," U "]", true, false,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n");
    check_render(c, "[" U "," A "]", false, true, /* the format trims: so does the cut */
                 "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                 "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\nx\n</think>\n\nHo");
    chat_close(c);
    CHECK_EQ(chat_open(NULL, NULL, "deepseek-r1",
                       "<" BAR "begin\xE2\x96\x81of\xE2\x96\x81sentence" BAR ">", NULL, &c),
             STATUS_OK);
    check_render(c, "[" S "," U "," A "," U "]", true, false,
                 "<" BAR "begin\xE2\x96\x81of\xE2\x96\x81sentence" BAR "> Be brief. <" BAR
                 "User" BAR ">Hi<" BAR "Assistant" BAR ">\n\nHo  <" BAR
                 "end\xE2\x96\x81of\xE2\x96\x81sentence" BAR "><" BAR "User" BAR ">Hi<" BAR
                 "Assistant" BAR "><think>\n");
    char *prompt;
    size_t n;
    /* it cuts past thinking, so it cannot continue this message */
    CHECK_EQ(chat_render(c, "[" A "]", false, true, NULL, &prompt, &n), STATUS_REQUEST);
    CHECK_EQ(
        chat_render(c, "[{\"role\":\"tool\",\"content\":\"1\"}]", true, false, NULL, &prompt, &n),
        STATUS_REQUEST);
    CHECK_EQ(chat_render(c, "[{\"role\":\"user\",\"content\":[]}]", true, false, NULL, &prompt, &n),
             STATUS_REQUEST);
    CHECK_EQ(chat_render(c, "[" U "]", true, true, NULL, &prompt, &n), STATUS_REQUEST);
    CHECK_EQ(chat_render(c, "{}", true, false, NULL, &prompt, &n), STATUS_REQUEST);
    CHECK_EQ(chat_render(c, "[1]", true, false, NULL, &prompt, &n), STATUS_REQUEST);
    CHECK_EQ(chat_render(c, "[" U "]", true, false, "[]", &prompt, &n), STATUS_REQUEST);
    chat_close(c);
    CHECK_EQ(chat_open(NULL, NULL, "vicuna", NULL, NULL, &c), STATUS_USAGE);
    CHECK_EQ(chat_open(NULL, NULL, NULL, NULL, NULL, &c), STATUS_MODEL);
}

/* A tool's answer as a user message: what the model thought before it stays in the prompt. The model's own
 * template, rendered by the helper, says the same. */
static void test_builtin_tool_response(void) {
    static const char messages[] =
        "[" U "," A
        ","
        "{\"role\":\"user\",\"content\":\"<tool_response>\\n1\\n</tool_response>\"},"
        "{\"role\":\"assistant\",\"content\":\"One\"}]";
    static const char want[] =
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nx\n</think>\n\nHo  "
        "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nOne<|im_end|>\n";
    const int qwen = text_file_index("qwen3");
    for (int i = 0; i < 2; i++) {
        chat *c = NULL;
        if (i == 1 && helper == NULL) continue;
        CHECK_EQ(chat_open(i ? helper : NULL, templates[qwen], NULL, NULL, NULL, &c), STATUS_OK);
        check_render(c, messages, false, false, want);
        chat_close(c);
    }
}

/* Defaults that a recognised template carries in its text. */
static void test_builtin_details(void) {
    chat *c = NULL;
    CHECK_EQ(
        chat_open(
            NULL,
            "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
            "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}...",
            NULL, NULL, NULL, &c),
        STATUS_OK);
    check_render(
        c, "[" U "]", true, false,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    check_render(c, "[" S "]", false, false, "<|im_start|>system\n Be brief. <|im_end|>\n");
    chat_close(c);
    CHECK_EQ(
        chat_open(
            NULL,
            "{{- \"<|start_header_id|>\" }}{{- \"Cutting Knowledge Date: December 2023\\n\" }}",
            NULL, "<B>", NULL, &c),
        STATUS_OK);
    check_render(c, "[" S "," U "]", false, false,
                 "<B><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
                 "December 2023\nToday "
                 "Date: 26 Jul 2024\n\nBe "
                 "brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>");
    chat_close(c);
}

/* --- the helper: what templates may do, and what they may not -------------------------------- */

static void check_template(const char *text, const char *want) {
    chat *c = NULL;
    CHECK_EQ(chat_open(helper, text, NULL, "<s>", NULL, &c), STATUS_OK);
    if (c != NULL) check_render(c, "[" U "]", false, false, want);
    chat_close(c);
}

static void test_environment(void) {
    if (helper == NULL) return;
    check_template("{%- if true %}\n  x\n{%- endif %}", "  x");
    check_template("{{ {'a': '<\xC3\xA9>'} | tojson }}", "{\"a\": \"<\xC3\xA9>\"}");
    check_template(
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01");
    check_template("{% generation %}a{{ bos_token }}{% endgeneration %}{{ eos_token }}", "a<s>");
    check_template("{{ tools is none }}{{ messages[0].role }}{{ strftime_now('%%') }}",
                   "Trueuser%");
    check_template("{{ '\\u00e9' }}\xF0\x9F\x98\x80", "\xC3\xA9\xF0\x9F\x98\x80");
    chat *c = NULL;
    CHECK_EQ(chat_open(helper, "{% for %}", NULL, NULL, NULL, &c), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "line 1") != NULL);
    CHECK_EQ(chat_open(helper, "{{ messages[-1].content | trim }}!", NULL, NULL, NULL, &c),
             STATUS_OK);
    check_render(c, "[{\"role\":\"user\",\"content\":\" a \"}]", false, true, "a");
    check_render(c, "[{\"role\":\"user\",\"content\":\"a\\u0000b\"}]", false, false,
                 "a"); /* up to its NUL */
    chat_close(c);
    CHECK_EQ(chat_open(helper, "{{ messages[0].content }}{{ messages[1].content }} end", NULL, NULL,
                       NULL, &c),
             STATUS_OK);
    check_render(c, "[" U "," U "]", false, true, "HiHi");
    chat_close(c);
}

/* Renders, and expects a refusal that names `want` within the deadline. */
static void check_refused(const char *text, const char *want) {
    chat *c = NULL;
    char *prompt = NULL;
    size_t n;
    CHECK_EQ(chat_open(helper, text, NULL, NULL, NULL, &c), STATUS_OK);
    const double start = seconds();
    CHECK_EQ(chat_render(c, "[" U "]", false, false, NULL, &prompt, &n), STATUS_REQUEST);
    CU_ASSERT(seconds() - start < CHAT_RENDER_SECONDS + 5);
    if (strstr(fail_text(), want) == NULL)
        printf("\n    \"%s\" does not say %s\n", fail_text(), want);
    CU_ASSERT(strstr(fail_text(), want) != NULL);
    free(prompt);
    chat_close(c);
}

static void test_hostile(void) {
    if (helper == NULL) return;
    check_refused("{{ raise_exception('roles must alternate') }}", "roles must alternate");
    check_refused("{{ messages[0].nothing.at_all }}", "nothing");
    check_refused("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe");
    check_refused("{{ messages.append(1) }}", "unsafe");
    check_refused(
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor "
        "%}{{ n.s }}",
        "emory");
    check_refused("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
                  "seconds");
    check_template("alive", "alive"); /* a new process has taken its place */
}

/* Messages that jansson reads and Python does not: an error, and the same process answers the next. */
static void test_deep_messages(void) {
    enum { DEPTH = 1500 };
    if (helper == NULL) return;
    static const char head[] = "[{\"role\":\"user\",\"content\":\"Hi\",\"x\":", tail[] = "}]";
    char text[sizeof head + 2 * DEPTH + sizeof tail], *prompt = NULL;
    size_t n = 0;
    snprintf(text, sizeof text, "%s%*s%s", head, 2 * DEPTH, "", tail);
    memset(text + sizeof head - 1, '[', DEPTH);
    memset(text + sizeof head - 1 + DEPTH, ']', DEPTH);
    chat *c = NULL;
    CHECK_EQ(chat_open(helper, "{{ messages[0].content }}", NULL, NULL, NULL, &c), STATUS_OK);
    CHECK_EQ(chat_render(c, text, false, false, NULL, &prompt, &n), STATUS_REQUEST);
    CU_ASSERT(strstr(fail_text(), "nested too deeply") != NULL);
    check_render(c, "[" U "]", false, false, "Hi");
    chat_close(c);
}

/* The one child of this process has what it needs, and nothing of ours. */
static void test_inherited(void) {
    char path[64], bytes[65536];
    int pid = 0;
    if (helper == NULL) return;
    snprintf(path, sizeof path, "/proc/self/task/%d/children", (int)getpid());
    FILE *f = fopen(path, "r");
    if (f == NULL) return; /* a kernel without it */
    CHECK_EQ(fscanf(f, "%d", &pid), 1);
    fclose(f);
    snprintf(path, sizeof path, "/proc/%d/environ", pid);
    f = fopen(path, "r");
    CU_ASSERT_FATAL(f != NULL);
    const size_t n = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    CU_ASSERT(memmem(bytes, n, "PATH=", 5) != NULL);
    CU_ASSERT(memmem(bytes, n, "secret", 6) == NULL);
}

static int child_count(void) {
    errno = 0;
    const pid_t pid = waitpid(-1, NULL, WNOHANG);
    return pid < 0 && errno == ECHILD ? 0 : 1;
}

static void test_stop(void) {
    CHECK_EQ(child_count(), helper == NULL ? 0 : 1);
    chat_helper_stop(helper);
    helper = NULL;
    chat_helper_stop(NULL);
    CHECK_EQ(child_count(), 0); /* nothing is left, not even a zombie */
}

/* A process with a helper that is in the middle of an endless render is killed: the helper must end
 * too. Orphans come to us as the nearest subreaper. */
static void test_killed_parent(void) {
    if (helper == NULL) return;
    int ready[2];
    char byte;
    CHECK_EQ(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
    CHECK_EQ(pipe(ready), 0);
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        chat_helper *own = NULL;
        chat *c = NULL;
        char *prompt;
        size_t n;
        if (chat_helper_start(&own) != STATUS_OK || own == NULL) _exit(1);
        if (chat_open(
                own,
                "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
                NULL, NULL, NULL, &c) != STATUS_OK ||
            write(ready[1], "x", 1) != 1)
            _exit(1);
        chat_render(c, "[]", false, false, NULL, &prompt, &n);
        _exit(0);
    }
    close(ready[1]);
    CHECK_EQ(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    usleep(200 * 1000); /* into the render */
    kill(child, SIGKILL);
    CHECK_EQ(waitpid(child, NULL, 0), child);
    const double start = seconds();
    pid_t orphan = 0;
    while (seconds() - start < 4) { /* its CPU limit would end it only after 6 */
        const pid_t pid = waitpid(-1, NULL, WNOHANG);
        if (pid > 0) orphan = pid;
        if (pid > 0) break;
        usleep(20 * 1000);
    }
    CU_ASSERT(orphan > 0);
    prctl(PR_SET_CHILD_SUBREAPER, 0);
}

static void test_no_python(void) {
    char *path = strdup(getenv("PATH"));
    chat_helper *none = (chat_helper *)path;
    setenv("PATH", "/nonexistent", 1);
    CHECK_EQ(chat_helper_start(&none), STATUS_OK);
    CU_ASSERT(none == NULL);
    setenv("PATH", path, 1);
    free(path);
    CHECK_EQ(child_count(), 0);
}

/* As in a virtual environment: a python3 without jinja2 comes first. */
static void test_python_without_jinja(void) {
    char *path = strdup(getenv("PATH")), folder[] = "/tmp/sfumato-python-XXXXXX";
    char file[64], changed[8192];
    CU_ASSERT_FATAL(mkdtemp(folder) != NULL);
    snprintf(file, sizeof file, "%s/python3", folder);
    snprintf(changed, sizeof changed, "%s:%s", folder, path);
    CHECK_EQ(symlink("/bin/false", file), 0);
    setenv("PATH", changed, 1);
    chat_helper *mine = NULL;
    CHECK_EQ(chat_helper_start(&mine), STATUS_OK);
    CU_ASSERT(mine != NULL);
    chat_helper_stop(mine);
    setenv("PATH", path, 1);
    unlink(file);
    rmdir(folder);
    free(path);
    CHECK_EQ(child_count(), 0);
}

const struct suite_case suite_cases[] = {
    {"prompts as transformers gives, by the helper", test_golden},
    {"the same prompts by built-in formats", test_builtin_golden},
    {"built-in formats by name", test_builtin_formats},
    {"a tool's answer is no question to Qwen3", test_builtin_tool_response},
    {"details that a template's text carries", test_builtin_details},
    {"what templates find", test_environment},
    {"hostile templates", test_hostile},
    {"what the helper inherits", test_inherited},
    {"messages nested deeply", test_deep_messages},
    {"the helper of a killed process ends", test_killed_parent},
    {"the helper is gone after stop", test_stop},
    {"no python3", test_no_python},
    {"a python3 without jinja2", test_python_without_jinja},
    {NULL, NULL},
};
