/* a_memory.c: limits of control groups, from file trees as the kernel's documents describe them.
 *
 * Each case is a folder with the files of some groups; what is free is worked out by hand beside it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/free_memory.h"
#include "suite.h"

static char root[64];

/* Writes root/path, making its folders. */
static void put(const char *path, const char *text) {
    char whole[256];
    const int n = snprintf(whole, sizeof whole, "%s/%s", root, path);
    for (int i = (int)strlen(root) + 1; i < n; i++) {
        if (whole[i] != '/') continue;
        whole[i] = '\0';
        mkdir(whole, 0700);
        whole[i] = '/';
    }
    FILE *file = fopen(whole, "w");
    CU_ASSERT_FATAL(file != NULL);
    fputs(text, file);
    fclose(file);
}

static void set_up(const char *membership) {
    snprintf(root, sizeof root, "cgroups-XXXXXX");
    CU_ASSERT_FATAL(mkdtemp(root) != NULL);
    put("self", membership);
}

static void check_free(int64_t want) {
    char self[96], command[128];
    snprintf(self, sizeof self, "%s/self", root);
    snprintf(command, sizeof command, "rm -r %s", root);
    CHECK_EQ(free_memory_of_groups(self, root), want);
    CHECK_EQ(system(command), 0);
}

static void test_version_2(void) {
    set_up("0::/\n"); /* a container with a view of its own */
    put("memory.max", "1000\n");
    put("memory.current", "900\n");
    put("memory.stat", "anon 300\nfile 600\ninactive_file 400\nactive_file 100\n");
    check_free(1000 - (900 - 400 - 100));

    set_up("0::/a/b\n"); /* the narrowest of all groups up to the root */
    put("a/b/memory.max", "max\n");
    put("a/b/memory.current", "10\n");
    put("a/memory.max", "500\n");
    put("a/memory.current", "450\n");
    put("memory.max", "700\n");
    put("memory.current", "600\n");
    check_free(50);

    set_up("0::/a\n");
    put("a/memory.max", "100\n");
    put("a/memory.current", "150\n"); /* lowered below what is used */
    check_free(0);

    set_up("0::/../../b\n"); /* outside of what can be seen */
    put("memory.max", "300\n");
    put("memory.current", "100\n");
    check_free(200);
}

static void test_version_1(void) {
    const char *both = "9:name=systemd:/x\n4:cpuset,memory:/job/1\n0::/x\n";
    set_up(both);
    put("memory/job/1/memory.limit_in_bytes", "9223372036854771712\n");
    put("memory/job/1/memory.usage_in_bytes", "5000\n");
    put("memory/job/memory.limit_in_bytes", "8000\n");
    put("memory/job/memory.usage_in_bytes", "7000\n");
    put("memory/job/memory.stat",
        "inactive_file 1\nactive_file 1\ntotal_inactive_file 200\ntotal_active_file 300\n");
    check_free(8000 - (7000 - 200 - 300));

    set_up(both); /* in a container the path is that of the host, and its group is the root */
    put("memory/memory.limit_in_bytes", "4000\n");
    put("memory/memory.usage_in_bytes", "1000\n");
    check_free(3000);

    set_up("4:memory_like:/\n3:cpu,cpuacct:/\n");
    put("memory/memory.limit_in_bytes", "4000\n");
    put("memory/memory.usage_in_bytes", "1000\n");
    check_free(INT64_MAX);
}

static void test_no_groups(void) {
    CHECK_EQ(free_memory_of_groups("there-is-no-such-file", "nor-such-a-folder"), INT64_MAX);
    set_up("0::/a\nrubbish\n::\n");
    put("a/memory.max", "rubbish\n");
    put("a/memory.current", "\n");
    check_free(INT64_MAX);
}

/* What is shared is divided; a limit of the process is not. */
static void test_sharers(void) {
    const int64_t alone = free_memory(1), each = free_memory(4);
    CU_ASSERT(alone > 0 && each > 0);
    CU_ASSERT(each < alone / 2);
#ifndef __SANITIZE_ADDRESS__ /* which could not go on under such a limit */
    struct rlimit before, limit;
    CHECK_EQ(getrlimit(RLIMIT_DATA, &before), 0);
    limit = before;
    limit.rlim_cur = (rlim_t)64 << 20;
    CHECK_EQ(setrlimit(RLIMIT_DATA, &limit), 0);
    const int64_t limited = free_memory(1), limited_each = free_memory(4);
    setrlimit(RLIMIT_DATA, &before);
    CU_ASSERT(limited < 64 << 20);
    CHECK_EQ(limited, limited_each);
#endif
}

const struct suite_case suite_cases[] = {
    {"version 2: every group up to the root, the file cache is free", test_version_2},
    {"version 1: the memory hierarchy, in and out of a container", test_version_1},
    {"no groups, no numbers", test_no_groups},
    {"sharers of a host", test_sharers},
    {NULL, NULL},
};
