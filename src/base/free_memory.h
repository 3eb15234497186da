/* free_memory.h: how much more memory this process can have, before it is refused or killed.
 *
 *   the machine's MemAvailable ─┐
 *   limits of control groups ───┼─ shared by all ranks of the host ─┐
 *   ulimit -v, ulimit -d ───────┴─ of this process alone ───────────┴─► the least
 *
 * A group's limit holds for all groups below it, so every group up to the root is asked; in a container
 * the files of its own group may lie at the root, whatever path the kernel names. What a group uses
 * includes the file cache, which the kernel gives back before it refuses anything (as MemAvailable
 * knows for the machine). Refuses to know: what the memory is for. Thread: any. Memory: none.
 */
#ifndef SFUMATO_BASE_FREE_MEMORY_H
#define SFUMATO_BASE_FREE_MEMORY_H

#include <stdint.h>

/* Bytes that can still be mapped and used. sharers: processes of this host that take memory at the same
 * time, this one included. */
int64_t free_memory(int sharers);
/* Bytes that can be used of what is mapped already: ulimit has counted it. */
int64_t free_memory_of_host(int sharers);

/* Of the control groups alone; INT64_MAX: no limit. membership: /proc/self/cgroup; mount: where the
 * file systems are, /sys/fs/cgroup. For free_memory and its tests. */
int64_t free_memory_of_groups(const char *membership, const char *mount);

#endif
