/* What a guard and those whom it holds say to each other. */
#ifndef AFK_GUARD_H
#define AFK_GUARD_H

#include <stdint.h>

#define AFK_GUARD_SOCKET 3
#define AFK_GUARD_OWNER 4

enum afk_guard_op { AFK_GUARD_HOLD = 1, AFK_GUARD_DROP };

/* SOCK_SEQPACKET. HOLD carries the worker's pidfd, and cgroup.kill if all of a cgroup
 * is meant. */
struct afk_guard_message {
    uint32_t op; /* enum afk_guard_op */
    int32_t signal;
    uint64_t token; /* of the owner's, for one worker: pids are used again */
};

#endif
