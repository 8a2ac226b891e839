/*
 * anyfork, the part that needs no Python: start a program as a supervised worker,
 * wait for it, signal it, and tie it to its owner. `pkg-config anyfork` names the
 * library; it uses no Python, and Linux is all that it needs.
 *
 * Every function states: what its arguments own, how it fails, which thread may
 * call it, what it blocks for, and since when it exists.
 */
#ifndef ANYFORK_ANYFORK_H
#define ANYFORK_ANYFORK_H

#include <signal.h>
#if defined(__GLIBC__) && !defined(__USE_POSIX)
#error "anyfork.h needs sigset_t: -std=gnu11, or define _POSIX_C_SOURCE as 200809L"
#endif
#include <stdbool.h>
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
    X(TEMPLATE, "template", "the template cannot start a worker")              \
    X(FORK, "fork", "fork refused by the system")                              \
    X(PIDFD, "pidfd", "cannot open a pidfd")                                   \
    X(HANDSHAKE, "handshake", "cannot release the child")                      \
    X(LIFELINE, "lifeline", "cannot arm the lifeline")                         \
    X(CHILD, "child", "the child could not set itself up")                     \
    X(OPTION, "option", "an option of the start could not be applied")         \
    X(EXEC, "exec", "the program cannot be executed")                          \
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

/* ---- options of one start ------------------------------------------------- */

/* What a standard stream of the worker is. */
enum anyfork_stdio_kind {
    ANYFORK_STDIO_INHERIT, /* the owner's */
    ANYFORK_STDIO_NULL,    /* /dev/null */
    ANYFORK_STDIO_PIPE,    /* a new pipe; the other end: anyfork_child_take_stdio() */
    ANYFORK_STDIO_FD,      /* a copy of `fd`, which stays the caller's */
    ANYFORK_STDIO_FILE,    /* `path`, opened by the owner before the start */
    ANYFORK_STDIO_STDOUT,  /* standard error only: where standard output goes */
    ANYFORK_STDIO_COUNT
};

/* One standard stream. Where it is a path, the owner opens it, so that its own ids and
 * working directory count. */
struct anyfork_stdio {
    int32_t kind;     /* enum anyfork_stdio_kind */
    int32_t fd;       /* FD */
    const char *path; /* FILE */
    int32_t flags;    /* FILE: of open(2), O_WRONLY | O_CREAT | O_APPEND say */
    uint32_t mode;    /* FILE: permissions of a file that is made */
};

/* A descriptor for the worker. `fd` stays the caller's, who keeps it open until the
 * start returns. */
struct anyfork_fd {
    int32_t fd;
    int32_t target; /* its number in the worker: at least 3, and unique */
};

/* What becomes of the descriptors that are not listed. Standard input, output and
 * error are not meant: those are what `stdio` says. */
enum anyfork_fd_policy {
    ANYFORK_FDS_DEFAULT,   /* `exec`: close; methods that fork: tombstone */
    ANYFORK_FDS_CLOSE,
    ANYFORK_FDS_TOMBSTONE, /* replaced by a placeholder that nothing can be read from or
                            * written to, so that what the memory still knows of them closes
                            * the placeholder and not a new file of the same number */
    ANYFORK_FDS_INHERIT,   /* as fork(2), or as execve(2), leave them */
    ANYFORK_FDS_COUNT
};

/* What the worker does with a SIGINT, which a terminal sends to its whole foreground
 * process group. */
enum anyfork_sigint {
    ANYFORK_SIGINT_OWNER, /* ignores it: its owner ends it in its own time */
    ANYFORK_SIGINT_OWN,   /* the default action; KeyboardInterrupt in Python */
    ANYFORK_SIGINT_GROUP, /* the same, in a process group of its own, which no terminal
                           * sends anything to */
    ANYFORK_SIGINT_COUNT
};

/* The session and process group that the worker is in. */
enum anyfork_session {
    ANYFORK_SESSION_KEEP,
    ANYFORK_SESSION_NEW,   /* setsid(2): also a new process group */
    ANYFORK_SESSION_GROUP, /* setpgid(2): the process group `process_group` */
    ANYFORK_SESSION_COUNT
};

/* Who goes when the owner does. */
enum anyfork_scope {
    ANYFORK_SCOPE_WORKER,
    ANYFORK_SCOPE_GROUP, /* its process group; needs a session or a group of its own */
    ANYFORK_SCOPE_CGROUP, /* all of `cgroup`, which must be given; by the guard */
    ANYFORK_SCOPE_COUNT
};

/* One limit of setrlimit(2). */
struct anyfork_rlimit {
    int32_t resource; /* RLIMIT_NOFILE, ...; see getrlimit(2) */
    uint64_t soft, hard; /* UINT64_MAX: no limit */
};

#define ANYFORK_KEEP (-1)         /* leave it as the owner has it */
#define ANYFORK_OOM_KEEP INT32_MIN

/*
 * The state of one worker; what is not set is the owner's. All pointers are
 * borrowed until the start returns. Applied in this order: lifeline, session and
 * process group, descriptors, signals, umask, cgroup, oom score, nice, CPUs, limits,
 * cwd, groups, group, user, name. A worker that forks does the latter half after its
 * fork handlers.
 */
struct anyfork_options {
    uint32_t size;            /* sizeof(struct anyfork_options), set by _init() */
    const char *const *argv;  /* exec only; ends with NULL */
    const char *program;      /* exec only; NULL: argv[0], looked up in PATH of env */
    const char *const *env;   /* "NAME=value", ends with NULL; NULL: the owner's environ(7) */
    const char *cwd;          /* chdir(2) */
    int32_t umask;            /* umask(2), 0 to 0777 */
    int64_t user;             /* setresuid(2): real, effective and saved */
    int64_t group;            /* setresgid(2) */
    const gid_t *groups;      /* setgroups(2) */
    int32_t n_groups;         /* ANYFORK_KEEP: the owner's */
    const struct anyfork_rlimit *rlimits;
    uint32_t n_rlimits;
    int32_t nice;             /* added to the owner's, as nice(2); 0: the same */
    const uint32_t *cpus;     /* sched_setaffinity(2) */
    uint32_t n_cpus;          /* 0: the owner's */
    const char *cgroup;       /* folder of a cgroup v2 */
    int32_t oom_score_adj;    /* -1000 to 1000; ANYFORK_OOM_KEEP */
    const char *name;         /* what ps(1) shows: /proc/PID/comm, of which 15 bytes are
                               * kept, and as much of the command line as there is room
                               * for. With argv: argv[0], and comm is the program's */
    int32_t session;          /* enum anyfork_session */
    int32_t process_group;    /* 0: a new one, led by the worker; or an existing one */
    struct anyfork_stdio stdio[3];
    const struct anyfork_fd *fds;
    uint32_t n_fds;
    int32_t fd_policy;        /* enum anyfork_fd_policy */
    const sigset_t *signal_mask;     /* blocked; NULL: none */
    const sigset_t *ignored_signals; /* SIG_IGN, beside those that the owner
                                      * ignores; NULL: no others */
    const sigset_t *default_signals; /* SIG_DFL though the owner ignores them; NULL: none */
    int32_t sigint;           /* enum anyfork_sigint */
    int32_t lifeline_signal;  /* sent when the owner ends, SIGKILL; 0: none, it lives on */
    int32_t lifeline_scope;   /* enum anyfork_scope */
    bool guard;               /* the worker is held by the guard too: a small process, one per
                               * owner, that ends its workers where the kernel does not. On
                               * where the scope is a cgroup, and where the user changes in
                               * a user namespace. For workers that change their user
                               * themselves, and owners whose descriptors foreign processes
                               * inherit by clone(2) */
};

/* Sets every member to "the owner's", and the defaults named above.
 * Call from: anywhere. Since 0.1. */
ANYFORK_API void anyfork_options_init(struct anyfork_options *options);

/* A worker and what its owner knows of it. Opaque; see anyfork_child_close(). */
struct anyfork_child;

/*
 * Start a program: clone(2) with CLONE_VM and CLONE_VFORK, then execve(2). No
 * pthread_atfork(3) handler runs, and the owner's memory is not copied, however
 * large it is.
 *
 *   options    argv is required; see the struct.
 *   ret_child  set on success only; release with anyfork_child_close().
 *   reterr     set on failure only; may be NULL.
 *
 * Returns 0 once the program runs; or, with nothing left behind:
 *   ANYFORK_EINVAL   stage ARGUMENT: detail names the member.
 *   ANYFORK_ESYSTEM  stage OPTION: detail names the member that the system refused;
 *                    EXEC: execve(2) failed, ENOENT say; FORK, PIPE, MEMORY, LIFELINE.
 *
 * Call from:  any thread; in Python detach the thread state first, for it
 * Blocks for: the system's loading of the program, during which it cannot be
 *             interrupted.
 * Signals:    blocked in the calling thread until the program runs.
 * Since 0.1.
 */
ANYFORK_API int anyfork_spawn_argv(const struct anyfork_options *options,
                                   struct anyfork_child **ret_child,
                                   struct anyfork_error *reterr);

/* The owner's end of a PIPE of `stdio` (which: 0, 1 or 2); from then on the caller's,
 * to close. -1 if there is none, or it was taken. Call from: any thread. Blocks for:
 * nothing. Since 0.1. */
ANYFORK_API int anyfork_child_take_stdio(struct anyfork_child *child, int which);

/* Let the worker go: it lives on without its owner. It is still waited for while
 * the handle is open; anyfork_child_close() then does not kill it, and it is reaped
 * with a later start or close.
 * Returns 0, ANYFORK_EFOREIGN, ANYFORK_EUNAVAILABLE for a thread of this process, or
 * ANYFORK_ESYSTEM with errno set. Call from: any thread. Blocks for: a forked worker's
 * first steps, in which it arms its lifeline; up to ten seconds if it is stopped there.
 * Since 0.1. */
ANYFORK_API int anyfork_child_detach(struct anyfork_child *child);

/* Process id, and a pidfd opened before the child could end. The pidfd belongs
 * to the handle; -1 after close. A worker that is a thread of this process
 * (method "subint") has neither: 0 and -1. Call from: anywhere. Since 0.1. */
ANYFORK_API pid_t anyfork_child_pid(const struct anyfork_child *child);
ANYFORK_API int anyfork_child_pidfd(const struct anyfork_child *child);

/* Readable when the child has reported: that it is ready, how it failed, its result; and
 * once it has no more to report: then -1 is returned, and the descriptor stays open until
 * anyfork_child_close(). For an event loop, beside the pidfd: a child with a large result
 * does not end before that is read, which anyfork_child_wait() with timeout 0 does.
 * Returns a descriptor of the handle; -1: no more reports, or a forked child of the owner.
 * Call from: any thread. Blocks for: nothing. Since 0.1. */
ANYFORK_API int anyfork_child_report_fd(struct anyfork_child *child);

/*
 * Wait until the child is about to enter its target; a program is as soon as it runs.
 *
 *   timeout_ns  nanoseconds; negative: no limit; 0: only look.
 *   reterr      filled unless 0 is returned: of a child that could not get there its
 *               stage, errno and detail; may be NULL.
 *
 * Returns 0; ANYFORK_EDIED if it reported a failure or ended before (its wait status is
 * anyfork_child_wait()'s); ANYFORK_ETIMEDOUT; ANYFORK_EFOREIGN in a forked child.
 *
 * Call from:  any thread; detach the thread state first, for it blocks.
 * Blocks for: the child.
 * Signals:    goes on after EINTR. Since 0.1.
 */
ANYFORK_API int anyfork_child_wait_ready(struct anyfork_child *child, int64_t timeout_ns,
                                         struct anyfork_error *reterr);

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
 * process. Call from: any thread. Blocks for: nothing. Since 0.1. */
ANYFORK_API int anyfork_child_signal(struct anyfork_child *child, int sig);

/* Kill the child if it lives, reap it, close its fds, free the handle. NULL is
 * fine. A thread of this process cannot be killed: it goes on, unheard. In a
 * forked child of the owner it only frees: the worker is not touched.
 * Call from: any thread, once; a wait of another thread then returns.
 * Blocks for: the child's death, up to ten seconds; a fifth of one if the system does not
 * let us kill it (a program that became another user), which is then left to itself, and
 * reaped with a later start or close. Since 0.1. */
ANYFORK_API void anyfork_child_close(struct anyfork_child *child);

/*
 * For a program whose owner watches it (`anyfork supervise`): begin to beat. A thread of
 * the library's own, which takes no signals, counts up in a page that both share, and
 * stores what CPU time the calling thread has used.
 *
 *   fd           what the owner has passed; -1: as the environment says
 *                (ANYFORK_HEARTBEAT_FD); without that, nothing is done and 0 returned.
 *                Stays the caller's; not needed once it has begun.
 *   interval_ns  between beats, from 1 ms to an hour; 0: as the owner asks.
 *   reterr       set on failure only; may be NULL.
 *
 * Returns 0, ANYFORK_EINVAL (also for what is no heartbeat, and the second time), or
 * ANYFORK_ESYSTEM. A forked child does not go on with it, and may begin one of its own.
 * Call from: the main thread. Blocks for: nothing. Since 0.1. */
ANYFORK_API int anyfork_heartbeat_begin(int fd, int64_t interval_ns,
                                        struct anyfork_error *reterr);

/* Say that the program gets on: in its main loop, say. Without a first call its owner
 * does not ask for that. Call from: any thread, and signal handlers. Blocks for: nothing.
 * Since 0.1. */
ANYFORK_API void anyfork_heartbeat_progress(void);

#ifdef __cplusplus
}
#endif
#endif
