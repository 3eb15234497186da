/* replay_main.c: runs a fuzz entry point without libFuzzer: the whole corpus, then mutations of it for a
 * while. For compilers without -fsanitize=fuzzer, and as a ctest.
 *
 *   fuzz_replay_NAME FOLDER [--seconds S] [--only I]
 *
 * Mutation i is a pure function of i and of the sorted corpus (bit flips, bytes and integers that are
 * often wrong, truncations, splices, removed and doubled pieces), so `--only I` runs the one that
 * failed again; its bytes are also written to ./crash-NAME-I. An input that takes longer than
 * INPUT_SECONDS is a failure, like a crash. One thread.
 */
#include <dirent.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

enum { FILES_MAX = 1024, FILE_BYTES_MAX = 1 << 20, INPUT_SECONDS = 20 };

static struct file {
    char *name;
    uint8_t *bytes;
    size_t n;
} files[FILES_MAX];
static size_t file_count;

/* What is running, for the handler. */
static const uint8_t *current;
static size_t current_n;
static char crash_path[256];

static void dump(void) {
    if (!current) return;
    FILE *f = fopen(crash_path, "wb"); /* not async-signal-safe; the process is lost anyway */
    if (!f) return;
    fwrite(current, 1, current_n, f);
    fclose(f);
    fprintf(stderr, "fuzz: the input is in %s\n", crash_path);
}

static void on_signal(int signal_number) {
    fprintf(stderr, "fuzz: %s\n",
            signal_number == SIGALRM ? "took too long" : strsignal(signal_number));
    dump();
    _exit(1);
}

/* Present in sanitized builds: called before the process dies of a report. */
__attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)(void));

static void run(const uint8_t *bytes, size_t n) {
    /* an exact copy, so that a sanitizer sees a read past the end */
    uint8_t *copy = malloc(n ? n : 1);
    if (!copy) abort();
    if (n) memcpy(copy, bytes, n);
    current = copy;
    current_n = n;
    alarm(INPUT_SECONDS);
    LLVMFuzzerTestOneInput(copy, n);
    alarm(0);
    current = NULL;
    free(copy);
}

static uint64_t state;
static uint64_t next(void) { /* SplitMix64 */
    uint64_t x = state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}
static size_t below(size_t n) { return n ? next() % n : 0; }

static size_t mutate_once(uint8_t *b, size_t n, size_t capacity) {
    static const uint64_t numbers[] = {
        0,          1,          7,         127,        128,
        255,        256,        65535,     1 << 20,    INT32_MAX,
        UINT32_MAX, 1ull << 32, INT64_MAX, UINT64_MAX, UINT64_MAX - 7,
        1ull << 60};
    static const char *const texts[] = {
        "-1",  "1e999", "null",    "[]", "{}",  "\"\"", "9223372036854775807",
        "0.5", "true",  "\\u0000", ",",  "[[[["};
    const size_t at = below(n), left = n - at;
    switch (below(9)) {
        case 0: /* one bit */
            if (n) b[at] ^= (uint8_t)(1u << below(8));
            return n;
        case 1: /* one byte */
            if (n) b[at] = (uint8_t)next();
            return n;
        case 2: { /* an integer of 1, 2, 4 or 8 bytes */
            const uint64_t number =
                numbers[below(sizeof numbers / sizeof numbers[0])] + below(3) - 1;
            const size_t size = (size_t)1 << below(4);
            if (size <= left) memcpy(b + at, &number, size);
            return n;
        }
        case 3: /* cut off */
            return at;
        case 4: { /* take a piece out */
            const size_t size = below(left < 64 ? left : 64);
            memmove(b + at, b + at + size, left - size);
            return n - size;
        }
        case 5: { /* double a piece */
            size_t size = below(left < 64 ? left : 64);
            if (n + size > capacity) size = capacity - n;
            memmove(b + at + size, b + at, left);
            return n + size;
        }
        case 6: { /* another file's piece over it */
            const struct file *f = &files[below(file_count)];
            const size_t from = below(f->n), size = below(f->n - from < left ? f->n - from : left);
            if (size) memcpy(b + at, f->bytes + from, size);
            return n;
        }
        case 7: { /* another file's end after it */
            const struct file *f = &files[below(file_count)];
            const size_t from = below(f->n), room = capacity - at;
            const size_t size = f->n - from < room ? f->n - from : room;
            if (size) memcpy(b + at, f->bytes + from, size);
            return at + size;
        }
        default: { /* a text that JSON readers meet */
            const char *text = texts[below(sizeof texts / sizeof texts[0])];
            if (strlen(text) <= left) memcpy(b + at, text, strlen(text));
            return n;
        }
    }
}

static void run_mutation(uint64_t i, const char *name, uint8_t *scratch) {
    state = i * 0xd1342543de82ef95u;
    const struct file *f = &files[below(file_count)];
    size_t n = f->n;
    if (n) memcpy(scratch, f->bytes, n);
    for (size_t count = 1 + below(6); count > 0; count--)
        n = mutate_once(scratch, n, 2 * FILE_BYTES_MAX);
    snprintf(crash_path, sizeof crash_path, "crash-%s-%llu", name, (unsigned long long)i);
    run(scratch, n);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const struct file *)a)->name, ((const struct file *)b)->name);
}

static void load_corpus(const char *folder) {
    DIR *dir = opendir(folder);
    if (!dir) {
        perror(folder);
        exit(2);
    }
    for (struct dirent *e = readdir(dir); e && file_count < FILES_MAX; e = readdir(dir)) {
        char path[2048];
        if (e->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        FILE *in = fopen(path, "rb");
        struct file *f = &files[file_count];
        f->name = strdup(e->d_name);
        f->bytes = malloc(FILE_BYTES_MAX);
        if (!in || !f->name || !f->bytes) {
            perror(path);
            exit(2);
        }
        f->n = fread(f->bytes, 1, FILE_BYTES_MAX, in);
        fclose(in);
        file_count++;
    }
    closedir(dir);
    qsort(files, file_count, sizeof files[0], by_name); /* readdir has no order */
}

int main(int argc, char **argv) {
    const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    double seconds = 2;
    long long only = -1;
    uint64_t count = 0;
    struct timespec begin, now;
    if (argc < 2) {
        fprintf(stderr, "usage: %s FOLDER [--seconds S] [--only I]\n", name);
        return 2;
    }
    for (int i = 2; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--seconds") == 0) seconds = atof(argv[i + 1]);
        if (strcmp(argv[i], "--only") == 0) only = atoll(argv[i + 1]);
    }
    static const int deadly[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM};
    for (size_t i = 0; i < sizeof deadly / sizeof deadly[0]; i++) {
        const bool sanitized = __sanitizer_set_death_callback != NULL;
        if (!sanitized || deadly[i] == SIGALRM) signal(deadly[i], on_signal);
    }
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(dump);
    load_corpus(argv[1]);
    if (file_count == 0) {
        fprintf(stderr, "%s: %s is empty\n", name, argv[1]);
        return 2;
    }
    uint8_t *scratch = malloc(2 * FILE_BYTES_MAX);
    if (!scratch) return 2;
    for (size_t i = 0; i < file_count && only < 0; i++) {
        snprintf(crash_path, sizeof crash_path, "crash-%s-%s", name, files[i].name);
        run(files[i].bytes, files[i].n);
    }
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (bool more = true; more; count++) {
        run_mutation(only >= 0 ? (uint64_t)only : count, name, scratch);
        clock_gettime(CLOCK_MONOTONIC, &now);
        const double passed =
            (double)(now.tv_sec - begin.tv_sec) + 1e-9 * (double)(now.tv_nsec - begin.tv_nsec);
        more = only < 0 && passed < seconds;
    }
    printf("%s: %zu files of the corpus, %llu mutations\n", name, file_count,
           (unsigned long long)count);
    free(scratch);
    for (size_t i = 0; i < file_count; i++) {
        free(files[i].name);
        free(files[i].bytes);
    }
    return 0;
}
