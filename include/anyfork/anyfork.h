/*
 * anyfork, the part that needs no Python: errors, and the handle of a worker.
 *
 * Every function states: what its arguments own, how it fails, which thread may
 * call it, what it blocks for, and since when it exists.
 */
#ifndef ANYFORK_ANYFORK_H
#define ANYFORK_ANYFORK_H

#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ANYFORK_VERSION_MAJOR 0
#define ANYFORK_VERSION_MINOR 1
#define ANYFORK_VERSION_PATCH 0

#define ANYFORK_API __attribute__((visibility("default")))

/* Where a start failed. One list makes the enum, the names and the texts. */
#define ANYFORK_STAGE_MAP(X)                                                   \
    X(NONE, "none", "no failure")                                              \
    X(ARGUMENT, "argument", "bad argument")                                    \
    X(LAYOUT, "layout", "unknown interpreter layout")                          \
    X(INTERPRETER, "interpreter", "wrong state of the interpreter")            \
    X(MEMORY, "memory", "out of memory")                                       \
    X(PIPE, "pipe", "cannot create a pipe")                                    \
    X(PTY, "pty", "cannot open a pseudo-terminal")                             \
    X(THREAD, "thread", "cannot start a helper thread")                        \
    X(PAD, "pad", "the launch pad does not answer")                            \
    X(FORK, "fork", "fork refused by the system")                              \
    X(PIDFD, "pidfd", "cannot open a pidfd")                                   \
    X(HANDSHAKE, "handshake", "cannot release the child")                      \
    X(LIFELINE, "lifeline", "cannot arm the lifeline")                         \
    X(CHILD, "child", "the child could not set itself up")                     \
    X(PRELUDE, "prelude", "the child's Python prelude failed")                 \
    X(UNPICKLE, "unpickle", "the target could not be loaded in the child")     \
    X(READ, "read", "cannot read the child's report")                          \
    X(WAIT, "wait", "cannot wait for the child")                               \
    X(SIGNAL, "signal", "cannot signal the child")

enum anyfork_stage {
#define X(id, name, text) ANYFORK_STAGE_##id,
    ANYFORK_STAGE_MAP(X)
#undef X
    ANYFORK_STAGE_COUNT
};

/* Return codes. Below -4095, so never mistaken for a negated errno. */
enum anyfork_code {
    ANYFORK_OK = 0,
    ANYFORK_EINVAL = -5000,     /* an argument is malformed; detail names it */
    ANYFORK_ELAYOUT = -5001,    /* refused: the interpreter's layout does not agree */
    ANYFORK_EUNAVAILABLE = -5002, /* this method or call cannot work here */
    ANYFORK_ESYSTEM = -5003,    /* a system call failed: see stage and sys_errno */
    ANYFORK_EFINALIZING = -5004, /* the interpreter is shutting down */
    ANYFORK_EPYTHON = -5005,    /* a Python exception is set */
    ANYFORK_ETIMEDOUT = -5006,  /* the time given has passed */
    ANYFORK_EDIED = -5007,      /* the child ended without what was asked for */
    ANYFORK_EFOREIGN = -5008,   /* the handle belongs to another process (a forked parent's) */
    ANYFORK_EREAPED = -5009,    /* the host reaped the child: its status is not known */
};

/*
 * What failed, where, and the errno seen there. 128 bytes, no pointers: it is
 * filled where the failure is seen and travels unchanged to the C caller and to
 * the attributes of Python's SpawnError.
 */
struct anyfork_error {
    int32_t code;       /* enum anyfork_code */
    int32_t stage;      /* enum anyfork_stage */
    int32_t sys_errno;  /* 0 if no system call was involved */
    int32_t line;       /* source line of the check that failed */
    char detail[112];   /* NUL-terminated; says what, never where */
};

/* The name of a stage ("fork"), and its text ("fork refused by the system").
 * Static strings; "unknown" for a number that is no stage.
 * Call from: anywhere.  Since 0.1. */
ANYFORK_API const char *anyfork_stage_name(int stage);
ANYFORK_API const char *anyfork_stage_text(int stage);

/* A worker and what its owner knows of it. Opaque; see anyfork_child_close(). */
struct anyfork_child;

/* Process id, and a pidfd opened before the child could end. The pidfd belongs
 * to the handle; -1 after close. A worker that is a thread of this process
 * (method "subint") has neither: 0 and -1. Call from: anywhere. Since 0.1. */
ANYFORK_API pid_t anyfork_child_pid(const struct anyfork_child *child);
ANYFORK_API int anyfork_child_pidfd(const struct anyfork_child *child);

/*
 * Wait until the child has ended, and reap it; reads its reports meanwhile, so
 * that a child which sends a large result never blocks for its owner.
 *
 *   timeout_ns  nanoseconds; negative: no limit; 0: only look.
 *   ret_status  a wait status as of waitpid(2); may be NULL.
 *
 * Returns 0; ANYFORK_ETIMEDOUT; ANYFORK_EREAPED if somebody else reaped it and
 * no EXIT record tells its code; ANYFORK_EFOREIGN in a forked child.
 * The answer is kept: later calls return the same at once.
 *
 * Call from:  any thread; detach the thread state first, for it blocks.
 * Signals:    goes on after EINTR. Since 0.1.
 */
ANYFORK_API int anyfork_child_wait(struct anyfork_child *child, int64_t timeout_ns,
                                   int *ret_status);

/* Send a signal by pidfd: never to another process that got the same pid.
 * Returns 0 (also when the child has already ended), or ANYFORK_ESYSTEM with
 * errno set, ANYFORK_EFOREIGN, ANYFORK_EUNAVAILABLE for a thread of this
 * process. Call from: any thread. Since 0.1. */
ANYFORK_API int anyfork_child_signal(struct anyfork_child *child, int sig);

/* Kill the child if it lives, reap it, close its fds, free the handle. NULL is
 * fine. A thread of this process cannot be killed: it goes on, unheard. In a
 * forked child of the owner it only frees: the worker is not touched.
 * Call from: any thread, once; a wait of another thread then returns.
 * Blocks for: the child's death. Since 0.1. */
ANYFORK_API void anyfork_child_close(struct anyfork_child *child);

#ifdef __cplusplus
}
#endif
#endif
