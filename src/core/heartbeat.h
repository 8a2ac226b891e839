/*
 * A worker's heartbeat: two counters in a page that it shares with its owner. A thread
 * that needs nobody (no GIL, no lock of the program) says that the process lives; what it
 * asks of the program's main thread says whether that gets on. The owner only looks.
 */
#ifndef AFK_HEARTBEAT_H
#define AFK_HEARTBEAT_H

#include <stdbool.h>
#include <stdint.h>

#define AFK_HEARTBEAT_MIN_NS ((int64_t)1000000)        /* 1 ms */
#define AFK_HEARTBEAT_MAX_NS ((int64_t)3600 * 1000000000)

/* What an owner reads. */
struct afk_reading {
    uint64_t alive;       /* beats; 0: it has not begun */
    int64_t progressing;  /* of them the main thread took part in; -1: nobody asks it */
    uint64_t cpu_ns;      /* of the main thread, at the last beat */
    int64_t interval_ns;  /* between beats */
};

enum afk_verdict {
    AFK_VERDICT_RUNNING, /* the main thread gets on */
    AFK_VERDICT_IN_C,    /* it computes and does not get on: a C function that holds the GIL */
    AFK_VERDICT_WAITING, /* it does not compute either: a system call, a lock */
    AFK_VERDICT_STOPPED, /* no thread runs: SIGSTOP, a frozen cgroup; or nothing has begun */
    AFK_VERDICT_COUNT
};
const char *afk_verdict_name(int verdict);
/* Of two readings, which are best two intervals apart, or more. */
enum afk_verdict afk_heartbeat_verdict(const struct afk_reading *before,
                                       const struct afk_reading *after);

/* The owner's side: a sealed memfd, which the worker has to inherit, mapped for reading. */
struct afk_heartbeat {
    int fd;
    const void *page;
};
/* Returns 0 or a negative errno. */
int afk_heartbeat_new(struct afk_heartbeat *heartbeat, int64_t interval_ns);
void afk_heartbeat_read(const struct afk_heartbeat *heartbeat, struct afk_reading *ret);
void afk_heartbeat_free(struct afk_heartbeat *heartbeat); /* twice does no harm */

/* The worker's side: one heartbeat a process. `ask` is called at each beat by the thread
 * that beats, unless the last time was not answered yet; it returns whether
 * afk_heartbeat_answer() will be called. NULL: nobody is asked. The calling thread is the
 * one whose time is told. `fd` stays the caller's. `interval_ns` 0: as the owner asks. Returns 0, -EALREADY, -EBADF for what is
 * no heartbeat, or another negative errno. */
int afk_heartbeat_begin(int fd, int64_t interval_ns, bool (*ask)(void));
void afk_heartbeat_answer(void);
/* Returns once the thread has ended. */
void afk_heartbeat_end(void);

#endif
