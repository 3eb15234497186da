/* free_memory.c: see free_memory.h. Control groups of both versions: Linux Documentation/admin-guide,
 * cgroup-v1/memory.rst and cgroup-v2.rst. */
#include "base/free_memory.h"

#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

/* The number behind `name` at the beginning of a line; -1: there is none, or it is "max". */
static int64_t read_number(const char *path, const char *name) {
    char line[256];
    long long value = -1;
    FILE *file = fopen(path, "re");
    if (!file) return -1;
    while (fgets(line, sizeof line, file)) {
        if (strncmp(line, name, strlen(name)) != 0) continue;
        if (sscanf(line + strlen(name), "%lld", &value) != 1) value = -1;
        break;
    }
    fclose(file);
    return value;
}

/* ---- control groups ---- */

struct group_files {
    const char *limit, *used, *inactive, *active; /* the last two: lines of memory.stat */
};
static const struct group_files version_1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                                             "total_inactive_file ", "total_active_file "};
static const struct group_files version_2 = {"memory.max", "memory.current", "inactive_file ",
                                             "active_file "};

static int64_t read_in(const char *folder, const char *file, const char *name) {
    char path[PATH_MAX + 32];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    return read_number(path, name);
}

static int64_t free_of_group(const char *folder, const struct group_files *files) {
    const int64_t limit = read_in(folder, files->limit, "");
    const int64_t used = read_in(folder, files->used, "");
    if (limit < 0 || used < 0) return INT64_MAX;
    const int64_t inactive = read_in(folder, "memory.stat", files->inactive);
    const int64_t active = read_in(folder, "memory.stat", files->active);
    int64_t kept = used - (inactive > 0 ? inactive : 0) - (active > 0 ? active : 0);
    if (kept < 0) kept = 0;
    return limit > kept ? limit - kept : 0;
}

/* The least of a group and all above it. */
static int64_t free_up_to_root(const char *mount, const char *group,
                               const struct group_files *files) {
    char folder[PATH_MAX];
    int64_t least = INT64_MAX;
    const bool outside = strstr(group, "/..") != NULL; /* of our view: its limits cannot be read */
    const int n = snprintf(folder, sizeof folder, "%s%s", mount, outside ? "" : group);
    if (n < 0 || (size_t)n >= sizeof folder) return INT64_MAX;
    for (;;) {
        const int64_t here = free_of_group(folder, files);
        if (here < least) least = here;
        char *end = strrchr(folder, '/');
        if (!end || (size_t)(end - folder) < strlen(mount)) return least;
        *end = '\0';
    }
}

static bool names_memory(const char *controllers) {
    for (const char *at = controllers; at; at = strchr(at, ',')) {
        if (*at == ',') at++;
        if (strncmp(at, "memory", 6) == 0 && (at[6] == '\0' || at[6] == ',')) return true;
    }
    return false;
}

/* Lines of the file: number ":" controllers of version 1, or none ":" path. */
int64_t free_memory_of_groups(const char *membership, const char *mount) {
    char line[PATH_MAX + 256], mount_1[PATH_MAX];
    int64_t least = INT64_MAX;
    FILE *file = fopen(membership, "re");
    if (!file) return INT64_MAX;
    snprintf(mount_1, sizeof mount_1, "%s/memory", mount);
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = '\0';
        int64_t here = INT64_MAX;
        if (controllers[1] == '\0') here = free_up_to_root(mount, group, &version_2);
        if (names_memory(controllers + 1)) here = free_up_to_root(mount_1, group, &version_1);
        if (here < least) least = here;
    }
    fclose(file);
    return least;
}

/* ---- all of it ---- */

/* Of a limit of this process, part of which is taken. */
static int64_t free_of_limit(int resource, const char *taken_name) {
    struct rlimit limit;
    if (getrlimit(resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY ||
        limit.rlim_cur > INT64_MAX)
        return INT64_MAX;
    const int64_t taken = read_number("/proc/self/status", taken_name);
    const int64_t left = (int64_t)limit.rlim_cur - (taken > 0 ? taken : 0) * 1024;
    return left > 0 ? left : 0;
}

int64_t free_memory_of_host(int sharers) {
    const int64_t machine = read_number("/proc/meminfo", "MemAvailable:");
    const int64_t groups = free_memory_of_groups("/proc/self/cgroup", "/sys/fs/cgroup");
    const int64_t least = machine < 0 ? INT64_MAX : machine * 1024;
    return (groups < least ? groups : least) / sharers;
}

int64_t free_memory(int sharers) {
    const int64_t limits[] = {free_of_limit(RLIMIT_AS, "VmSize:"),
                              free_of_limit(RLIMIT_DATA, "VmData:")};
    int64_t least = free_memory_of_host(sharers);
    for (int i = 0; i < 2; i++) {
        if (limits[i] < least) least = limits[i];
    }
    return least;
}
