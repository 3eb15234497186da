/* bench_load.c: how fast weights get from their files into the backend, beside reading the files.
 *
 * In one process it alternates, all with the backend's number of threads:
 *
 *   read    pread of all weight files through a small buffer that is used again and again
 *   fill    pread of all weight files into new memory of their size, as a program that keeps them
 *   load    a whole model_open into a fresh backend
 *
 * first hot, from the page cache, then cold, the files' pages dropped before each (which an
 * administrator's file system may ignore: the rates show it). Ratios are taken inside a round.
 * Requirement R6 of the service: cold >= 0.8 of the read rate, hot >= 0.6. Hot, the kernel takes
 * longer to clear new memory than to copy a file out of its cache, so that no program that keeps
 * what it reads comes near `read`: load / fill tells what the loader itself costs. One rank: R ranks
 * read at once and share what the disk gives.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend/cpu_pool.h"
#include "cmd/bench.h"

enum { FILES_MAX = 1024, READ_BYTES = 4 << 20 };

struct weight_file {
    int fd;
    dev_t device;
    ino_t inode;
    int64_t bytes, pieces_end; /* pieces of READ_BYTES of this and all files before */
};

struct load_bench {
    struct host *host;
    cpu_pool *pool; /* while reading: a backend makes its own from the same cores */
    int threads;
    struct weight_file files[FILES_MAX];
    int file_count;
    int64_t bytes;
    unsigned char *buffers; /* [threads][READ_BYTES]; while filling: [bytes] */
    bool filling;
    atomic_int_least64_t next_piece;
    atomic_bool failed;
};

/* Hot and cold. */
struct load_result {
    struct bench_series read_gbs, fill_gbs, load_gbs, of_read, of_fill;
};

static void read_task(void *context, int thread) {
    struct load_bench *b = context;
    unsigned char *buffer = b->buffers + (size_t)thread * READ_BYTES;
    int file = 0;
    for (;;) {
        const int64_t piece = atomic_fetch_add(&b->next_piece, 1);
        while (file < b->file_count && piece >= b->files[file].pieces_end) file++;
        if (file == b->file_count) return;
        const int64_t first = file > 0 ? b->files[file - 1].pieces_end : 0;
        off_t at = (off_t)(piece - first) * READ_BYTES, end = at + READ_BYTES;
        if (end > b->files[file].bytes) end = b->files[file].bytes;
        if (b->filling) buffer = b->buffers + (size_t)piece * READ_BYTES;
        while (at < end) {
            const ssize_t got = pread(b->files[file].fd, buffer, (size_t)(end - at), at);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) {
                atomic_store(&b->failed, true);
                return;
            }
            at += got;
        }
    }
}

/* filling: all bytes are kept. */
static enum status plain_read(struct load_bench *b, bool filling, double *seconds) {
    TRY(cpu_pool_open((int)b->host->params.threads, 0, 1, &b->pool));
    b->threads = cpu_pool_threads(b->pool);
    b->filling = filling;
    const int64_t pieces = b->files[b->file_count - 1].pieces_end;
    const size_t bytes = (size_t)(filling ? pieces : b->threads) * READ_BYTES;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        cpu_pool_close(b->pool);
        return fail(STATUS_MEMORY, "no memory for reading");
    }
    madvise(memory, bytes, MADV_HUGEPAGE); /* as weights; a refusal costs speed only */
    b->buffers = memory;
    atomic_store(&b->next_piece, 0);
    const double start = progress_clock();
    cpu_pool_run(b->pool, read_task, b);
    *seconds = progress_clock() - start;
    munmap(memory, bytes);
    cpu_pool_close(b->pool);
    return atomic_load(&b->failed) ? fail(STATUS_MODEL, "%s cannot be read", b->host->source->path)
                                   : STATUS_OK;
}

static enum status load(struct load_bench *b, double *seconds) {
    struct host *h = b->host;
    backend *be = NULL;
    model *m = NULL;
    TRY(host_new_backend(h, &be));
    const double start = progress_clock();
    const enum status status =
        model_open(h->source, &h->model_options, be, h->comm, NULL, NULL, &m);
    *seconds = progress_clock() - start;
    model_close(m);
    be->ops->close(be);
    return status;
}

static void drop_pages(const struct load_bench *b) {
    for (int i = 0; i < b->file_count; i++)
        posix_fadvise(b->files[i].fd, 0, 0, POSIX_FADV_DONTNEED);
}

static void print_result(const char *name, const struct load_result *r) {
    const struct bench_summary read = bench_summarise(&r->of_read),
                               fill = bench_summarise(&r->of_fill);
    printf(
        "%-4s  read %.2f GB/s  fill %.2f GB/s  load %.2f GB/s"
        "  load/read %.3f (%.3f..%.3f)  load/fill %.3f (%.3f..%.3f)\n",
        name, bench_summarise(&r->read_gbs).median, bench_summarise(&r->fill_gbs).median,
        bench_summarise(&r->load_gbs).median, read.median, read.min, read.max, fill.median,
        fill.min, fill.max);
    fflush(stdout);
}

static enum status run_rounds(struct load_bench *b, bool cold, struct load_result *r) {
    const double gigabytes = 1e-9 * (double)b->bytes;
    for (int64_t i = 0; i < b->host->params.rounds; i++) {
        double reading, filling, loading;
        if (cold) drop_pages(b);
        TRY(plain_read(b, false, &reading));
        if (cold) drop_pages(b);
        TRY(plain_read(b, true, &filling));
        if (cold) drop_pages(b);
        TRY(load(b, &loading));
        if (i == 0 && !cold) continue; /* brought the files in */
        bench_add(&r->read_gbs, gigabytes / reading);
        bench_add(&r->fill_gbs, gigabytes / filling);
        bench_add(&r->load_gbs, gigabytes / loading);
        bench_add(&r->of_read, reading / loading);
        bench_add(&r->of_fill, filling / loading);
    }
    print_result(cold ? "cold" : "hot", r);
    return STATUS_OK;
}

/* ---- set-up ---- */

/* Once, however often it is named. */
static enum status add_file(struct load_bench *b, const char *path) {
    struct stat info;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail(STATUS_MODEL, "%s: %s", path, strerror(errno));
    for (int i = 0; i < b->file_count && fstat(fd, &info) == 0; i++) {
        if (b->files[i].device != info.st_dev || b->files[i].inode != info.st_ino) continue;
        close(fd);
        return STATUS_OK;
    }
    if (b->file_count == FILES_MAX || fstat(fd, &info) != 0) {
        close(fd);
        return fail(STATUS_MODEL, "%s: more than %d files", path, (int)FILES_MAX);
    }
    const int64_t pieces = (info.st_size + READ_BYTES - 1) / READ_BYTES;
    const int64_t before = b->file_count > 0 ? b->files[b->file_count - 1].pieces_end : 0;
    b->files[b->file_count++] =
        (struct weight_file){fd, info.st_dev, info.st_ino, info.st_size, before + pieces};
    b->bytes += info.st_size;
    return STATUS_OK;
}

/* What the source has opened: the one GGUF file, model.safetensors, or the files of the index. A folder may
 * hold more. */
static enum status find_files(struct load_bench *b) {
    const char *path = b->host->source->path;
    char name[sizeof b->host->source->path + 512];
    if (strcmp(b->host->source->ops->kind, "safetensors") != 0) return add_file(b, path);
    snprintf(name, sizeof name, "%s/model.safetensors", path);
    if (access(name, F_OK) == 0) return add_file(b, name);
    json_t *root = NULL;
    const char *tensor;
    json_t *file;
    snprintf(name, sizeof name, "%s/model.safetensors.index.json", path);
    TRY(json_load_path(name, STATUS_MODEL, &root));
    enum status status = STATUS_OK;
    json_object_foreach(json_object_get(root, "weight_map"), tensor, file) {
        snprintf(name, sizeof name, "%s/%s", path, json_string_value(file));
        TRY_GOTO(add_file(b, name), out);
    }
out:
    json_decref(root);
    return status;
}

static void write_json(const struct load_bench *b, const struct load_result results[2]) {
    struct json_writer w;
    json_writer_init(&w);
    json_begin(&w, '{');
    json_key(&w, "model");
    json_write_text(&w, b->host->source->path);
    json_key(&w, "dtype");
    json_write_text(&w, backend_dtype_name(b->host->model_options.weight_dtype));
    json_key(&w, "threads");
    json_write_int(&w, b->threads);
    json_key(&w, "file_bytes");
    json_write_int(&w, b->bytes);
    for (int cold = 0; cold < 2; cold++) {
        json_key(&w, cold ? "cold" : "hot");
        json_begin(&w, '{');
        bench_write_summary(&w, "read_gbs", bench_summarise(&results[cold].read_gbs));
        bench_write_summary(&w, "fill_gbs", bench_summarise(&results[cold].fill_gbs));
        bench_write_summary(&w, "load_gbs", bench_summarise(&results[cold].load_gbs));
        bench_write_summary(&w, "load_of_read", bench_summarise(&results[cold].of_read));
        bench_write_summary(&w, "load_of_fill", bench_summarise(&results[cold].of_fill));
        json_end(&w, '}');
    }
    json_end(&w, '}');
    json_write_bytes(&w, "\n", 1);
    fwrite(w.bytes, 1, w.n, stdout);
    json_writer_fini(&w);
}

enum status bench_load(struct host *h) {
    enum status status = STATUS_OK;
    struct load_result results[2] = {0};
    if (h->ranks > 1) return fail(STATUS_USAGE, "bench load runs on one rank: leave mpirun out");
    TRY(host_open_text(h));
    host_plan_model(h);
    TRY(host_check_options(h));
    host_plan_backend(h);
    struct load_bench *b = calloc(1, sizeof *b);
    if (!b) return fail(STATUS_MEMORY, "no memory for a bench");
    b->host = h;
    TRY_GOTO(find_files(b), out);
    printf("%s: %.3f GB in %d file%s, %s weights\n", h->source->path, 1e-9 * (double)b->bytes,
           b->file_count, b->file_count == 1 ? "" : "s",
           backend_dtype_name(h->model_options.weight_dtype));
    TRY_GOTO(run_rounds(b, false, &results[0]), out);
    TRY_GOTO(run_rounds(b, true, &results[1]), out);
    if (h->params.json) write_json(b, results);
out:
    for (int i = 0; i < b->file_count; i++) close(b->files[i].fd);
    free(b);
    return status;
}
