/*
 * Process mechanics without Python: declarations shared by the files of core,
 * and by those of cpython above it. Grouped by file.
 *
 * Rule: nothing here includes Python.h. The parent decides (afk_plan), the
 * child obeys (child.c).
 */
#ifndef AFK_CORE_H
#define AFK_CORE_H

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct anyfork_error;
struct anyfork_child;
struct anyfork_options;

/* ---- fault.c: compiled in with -Dfaults=true only ------------------------ */
#ifdef AFK_FAULTS
bool afk_fault_due(const char *what);
extern int afk_fault_errno;
#define AFK_SYS(what, call) (afk_fault_due(what) ? -afk_fault_errno : (call))
#define AFK_ALLOC(what, call) (afk_fault_due(what) ? NULL : (call))
/* Arm: the nth fault point from now fails (and all after it if `for_good`). */
void afk_fault_arm(unsigned nth, int errnum, bool for_good);
void afk_fault_spare(void);      /* from now on the calling thread has no faults */
unsigned afk_fault_hits(void);   /* faults injected since armed */
unsigned afk_fault_points(void); /* points passed since armed */
const char *afk_fault_last(void);
#else
#define AFK_SYS(what, call) (call)
#define AFK_ALLOC(what, call) (call)
#define afk_fault_spare() ((void)0)
#endif

/* ---- os_linux.c: system calls; each returns >= 0 or a negative errno ------ */
int afk_os_pipe(int ret_fds[2], int flags);
int afk_os_socketpair(int ret_fds[2], int type); /* SOCK_STREAM, say */
int afk_os_dup_above(int fd, int lowest);
/* *fd gets a number from `lowest` on, if it has a lower one; negative: left alone. */
int afk_os_raise(int *fd, int lowest);
/* A thread of ours: the host's signals are not for it. Or one for its caller's code, with
 * the caller's mask: what it starts itself inherits it. */
int afk_os_thread(pthread_t *ret_thread, void *(*run)(void *), void *arg, bool for_signals);
int afk_os_pidfd_open(pid_t pid);
int afk_os_pidfd_signal(int pidfd, int sig);
/* 1 reaped, 0 still running, negative errno. ret_status is a wait status. */
int afk_os_pidfd_reap(int pidfd, bool block, int *ret_status);
/* The wait status of a process that somebody else reaped; Linux >= 6.15. */
int afk_os_pidfd_exit_info(int pidfd, int *ret_status);
int afk_os_openpty(int *ret_master, int *ret_slave);
/* Always close-on-exec. `dir` as of openat(2). */
int afk_os_open(int dir, const char *path, int flags, unsigned mode);
bool afk_os_fd_is_open(int fd);
/* A number that is another one once the file is: of its place, size and dates. */
uint64_t afk_os_stamp(uint64_t seed, const char *path);
bool afk_os_is_cgroup2(int fd);
/* Root of the initial user namespace, whose signals reach every user's processes. */
bool afk_os_is_true_root(void);
/* This thread's next child would be the first process of a new pid namespace. */
bool afk_os_child_would_be_init(void);
/* This thread has unshared its children's pid namespace. */
bool afk_os_children_are_elsewhere(void);
/* Permitted, effective and inheritable ones of the calling thread. */
int afk_os_capabilities(uint64_t ret[3]);
int afk_os_limit_capabilities(const uint64_t most[3]);
/* The flag O_ASYNC of an open file, and so whether anybody is told of its events. */
int afk_os_stop_async(int fd);
/* A stack for a child that shares this memory: its upper end is base + size. */
int afk_os_map_stack(size_t size, void **ret_base);
void afk_os_unmap_stack(void *base, size_t size);
ssize_t afk_os_read(int fd, void *buf, size_t size);
int afk_os_write_all(int fd, const void *buf, size_t size);
int afk_os_send(int fd, const void *message, size_t size);
/* Descriptors of one message: SCM_MAX_FD of the kernel. */
#define AFK_FDS_MAX 253
struct iovec;
struct ucred;
/* One message with descriptors. 0 or a negative errno; -EMSGSIZE if less of it went out. */
int afk_os_send_with_fds(int socket, const struct iovec *vec, size_t n_vec, const int *fds,
                         unsigned n_fds, int flags);
/* The length, or a negative errno. *ret_n is how many descriptors came, at most `max`; -EMFILE:
 * there were more, or no room for them, and they are closed. `ret_from`: who sent it, if the
 * socket passes that. */
ssize_t afk_os_receive_with_fds(int socket, void *to, size_t size, int *fds, unsigned max,
                                unsigned *ret_n, struct ucred *ret_from, int flags);
int afk_os_unread_by_peer(int fd); /* bytes in flight of a socket, unix(7) */
/* A memfd of `size` bytes that nobody can make larger or smaller: and once they are allocated, or
 * written, what is mapped of it never raises SIGBUS. */
int afk_os_memfd(const char *name, size_t size);
int afk_os_allocate(int fd, size_t size);
int afk_os_pwrite_all(int fd, const void *buf, size_t size, size_t at);
/* 0 if `fd` is of that size, and nobody can make it smaller; else -EINVAL, or a negative errno. */
int afk_os_memfd_check(int fd, size_t size);
/* Shared. The first `writable` bytes, a multiple of the page, may be written to; where that is
 * all of it a forked child does not have it. */
int afk_os_map(int fd, size_t size, size_t writable, void **ret_base);
void afk_os_unmap(void *base, size_t size);
/* The memory of a shared mapping is free; whoever reads it again finds zeros. */
void afk_os_discard(void *base, size_t size);
struct pollfd;
/* ppoll(2); a negative timeout is none. -EINTR is the caller's to look at. */
int afk_os_poll(struct pollfd *fds, unsigned n, int64_t timeout_ns);
bool afk_os_hung_up(int fd); /* the other end of a socket is gone */
void afk_os_close(int fd);
int64_t afk_os_now_ns(void);
/* Copies memory of this process, or fails with -EFAULT: never a signal. */
int afk_os_peek(void *dst, const void *src, size_t size);
/* The same for `size` bytes at each of n addresses; ret_read[i] says whether the
 * i-th could be read. ret_read is all false at the start. */
void afk_os_peek_each(void *dst, const uintptr_t *addresses, size_t n, size_t size,
                      bool *ret_read);

/* ---- report.c: what a child tells its owner ------------------------------- */
enum afk_report_kind {
    AFK_REPORT_READY = 1,
    AFK_REPORT_ERROR = 2,   /* payload: traceback text or pickled exception */
    AFK_REPORT_RESULT = 3,  /* payload: the pickled result */
    AFK_REPORT_RAISED = 4,  /* payload: the pickled exception of the target */
    AFK_REPORT_EXIT = 5,    /* value: exit code */
    AFK_REPORT_STATUS = 6,  /* value: wait status, from the template that reaped it */
    AFK_REPORT_COUNT
};
#define AFK_REPORT_MAGIC 0x314b4641u /* "AFK1" */

/* 64 bytes, smaller than PIPE_BUF: one write(2) is atomic. */
struct afk_report {
    uint32_t magic;
    uint16_t kind;
    uint16_t stage;         /* enum anyfork_stage, of ERROR */
    int32_t sys_errno;
    int32_t value;
    uint64_t payload_bytes; /* follow the record */
    char detail[40];
};
/* Async-signal-safe. Returns 0 or a negative errno. */
int afk_report_write(int fd, const struct afk_report *report);
/* Who reports, and over what: nothing is said by a process that came from a fork of
 * it, nor into a descriptor that got the number after the target closed ours. */
struct afk_reporter {
    int fd;
    unsigned generation;
    dev_t device;
    ino_t inode;
};
/* Returns 0 or a negative errno. */
int afk_reporter_init(struct afk_reporter *reporter, int fd);
/* A record and its payload. A failure means that the owner has gone. */
void afk_reporter_send(const struct afk_reporter *reporter, int kind, int stage, int value,
                       const char *payload, size_t size);
/* An ERROR record of what failed before any Python could tell it. */
void afk_reporter_fail(const struct afk_reporter *reporter, const struct anyfork_error *error);
/* 0 if `report` is well formed, else -EBADMSG. */
int afk_report_check(const struct afk_report *report);

/* ---- lifeline.c: worker fds of the owner, closed in every forked child ---- */
/* Counts forks between this process and the one that loaded the library. */
unsigned afk_generation(void);
/* Returns 0 or -ENOMEM; the fd is closed in forked children from here on. */
int afk_lifeline_register(int fd, bool is_write_end);
/* No other thread forks between these two, unless one of them has waited for seconds. Few
 * system calls, nothing that forks, and not afk_lifeline_close(). */
bool afk_lifeline_begin(void);
void afk_lifeline_end(bool begun);
/* Our fork handlers, pthread_atfork(3), for a fork that runs none. */
void afk_lifeline_before_fork(void);
void afk_lifeline_after_fork_in_parent(void);
void afk_lifeline_after_fork_in_child(void);
/* The calling thread's next fork is the start of the worker that these are for: it keeps
 * them. n = 0: none, as before. */
void afk_lifeline_spare(const int *fds, unsigned n);
bool afk_lifeline_holds(int fd);
/* It is somebody else's from here on. */
void afk_lifeline_forget(int fd);
/* Forgets and closes fd, in the order that no fork can race. */
void afk_lifeline_close(int *fd);
/* Counts the forks that this process has begun. */
unsigned afk_forks(void);
/* Runs `hook` in every forked child, async-signal-safe. */
void afk_at_fork_child(void (*hook)(void));

/* ---- options.c: what a start asks for, judged and opened in the parent ----- */
struct afk_fd_move {
    int from, to;
    bool park; /* its source is the target of another one */
};

#define AFK_COPIES_MAX 6

/* Data for child_options.c, and the parent's fds that it refers to. In memory from malloc()
 * if another thread than the caller's may fork: in the child, the stacks of all threads but
 * one are free for its new threads. */
struct afk_setup {
    int session;         /* enum anyfork_session */
    pid_t process_group;
    unsigned n_moves;
    struct afk_fd_move *move; /* in ascending order of `to` */
    int lowest;          /* above every target: where our own fds are */
    int report_to;       /* the worker's end of the report socket moves there, or -1 */
    int fd_policy;       /* enum anyfork_fd_policy, never DEFAULT */
    bool ignore_sigint;
    int sigint;          /* enum anyfork_sigint */
    sigset_t mask, ignored, defaults;
    int lifeline_signal; /* 0: none */
    bool lifeline_group;
    bool guarded;        /* the worker tells the guard of itself */
    int cgroup_kill;     /* fd, or -1: the worker alone */
    int umask;
    int cgroup_dir, cgroup_procs; /* fds, or -1 */
    int oom_score_adj;
    int nice;
    unsigned long *cpus; /* a mask */
    size_t cpus_size;    /* bytes */
    /* What is const is a copy of our own for a fork, and the caller's for an exec, who
     * waits for it. */
    const struct anyfork_rlimit *rlimits;
    unsigned n_rlimits;
    const char *cwd;
    const gid_t *groups;
    int n_groups;        /* -1: keep */
    int64_t user, group; /* -1: keep */
    const char *name;
    const char *const *env;
    /* exec only */
    const char *const *argv;
    const char *program;
    bool orphan;         /* nobody's child: no host meets it when it waits for its own */
    char **argv_named;   /* argv with `name` first */
    char **environ_copy; /* of the pointers; strings of the environment are never freed */
    char **candidates;   /* paths to try in turn, ends with NULL */
    /* the parent's */
    void *copies[AFK_COPIES_MAX];
    unsigned n_copies;
    int opened[3];       /* the worker's ends of its standard streams, ours to close */
    int owner_end[3];    /* of pipes */
};

/* What a start needs of its handle: afk_setup_wants(). */
struct afk_child_wants {
    int lowest;    /* the worker's ends get no lower number than this */
    bool lifeline;
    bool guard;
};

enum afk_setup_for { AFK_SETUP_EXEC, AFK_SETUP_FORK, AFK_SETUP_TEMPLATE };
/* Checks `options` (NULL: the defaults) and opens what they name. Returns 0; or a
 * negative code with reterr filled, and nothing left open. */
int afk_setup_prepare(struct afk_setup *setup, const struct anyfork_options *options,
                      enum afk_setup_for purpose, int report_to, struct anyfork_error *reterr);
/* Frees and closes; twice does no harm. */
void afk_setup_release(struct afk_setup *setup);
struct afk_child_wants afk_setup_wants(const struct afk_setup *setup);

/* ---- fork.c, child.c, child_options.c --------------------------------------- */
#define AFK_STORES_MAX 512
#define AFK_EXIT_SETUP 113   /* phase A failed; an ERROR record says why */
#define AFK_EXIT_ORPHANED 114 /* the owner died before the worker was armed */
#define AFK_EXIT_PRELUDE 115 /* phases B and C failed; an ERROR record says why */

struct afk_store {
    void **addr;
    void *value;
};

enum afk_dispositions {
    AFK_DISPOSITIONS_KEEP,
    AFK_DISPOSITIONS_RESET_LISTED, /* those in plan->reset to SIG_DFL */
    AFK_DISPOSITIONS_DEFAULT,      /* all handlers, and SIGCHLD, to SIG_DFL */
};

/* All that the child does before any Python runs, decided in the parent. */
struct afk_plan {
    unsigned n_stores;
    struct afk_store store[AFK_STORES_MAX];
    int (*set_wakeup_fd)(int); /* NULL: keep; else called with -1 */
    enum afk_dispositions dispositions;
    sigset_t reset;
    sigset_t child_mask;
    bool keep_mask;   /* the caller's mask, not child_mask */
    int life_fd;      /* the worker's read end of the lifeline, or -1 */
    int status_fd;    /* the worker's end of the report socket, or -1 */
    int tty_fd;       /* slave of the new controlling terminal, or -1 */
    int tty_master_fd;
    const struct afk_setup *setup; /* of a worker; NULL for fork() */
    uint64_t guard_token; /* what the guard calls the worker */
    int guard_fd;         /* a copy of the owner's end of the guard's socket, or -1 */
    const int *keep;      /* beside the setup's: these stay open under their numbers */
    unsigned n_keep;
    struct anyfork_error *failure; /* where a child that shares our memory says why it ended */
    bool began;           /* written by a child that shares our memory: it runs */
    int *ret_sibling;     /* not NULL: the child is our parent's child; the pidfd goes there */
    bool owner_holds_us;  /* in the child: nobody frees our number before the owner knows it */
    sigset_t caller_mask; /* filled by afk_fork() */
    sigset_t was_reset;   /* filled in the child: signals that were reset to SIG_DFL */
};
void afk_plan_init(struct afk_plan *plan);
/* Returns 0 or -ENOSPC. */
int afk_plan_store(struct afk_plan *plan, void *addr, void *value);

/* Whether this process can fork children of its parent's, which has to be asked once, before
 * other threads are made: 0; or -ENOSYS, for a libc that is not understood; or what fork(2) says. */
int afk_fork_sibling_prepare(void);
/* fork(2) with all signals blocked; the child has carried out the plan when 0
 * is returned. A negative errno means that there is no child. */
pid_t afk_fork(struct afk_plan *plan);
void afk_child_repair(struct afk_plan *plan);
void afk_child_arm_lifeline(const struct afk_plan *plan);
/* The rule for workers; adds what it reset. */
void afk_child_default_dispositions(sigset_t *ret_reset);
_Noreturn void afk_child_give_up(const struct afk_plan *plan, int stage, int errnum,
                                 const char *detail);

/* clone(2) with the memory shared and the caller stopped until the child has
 * executed plan->setup's program: its pid, with *ret_pidfd. A negative errno means
 * that there is no child; if plan->failure is filled, it has ended. */
pid_t afk_fork_exec(struct afk_plan *plan, int *ret_pidfd);

/* Async-signal-safe, in the child. Each ends it if the system refuses. */
void afk_child_join_session(const struct afk_plan *plan);
void afk_child_tell_guard(const struct afk_plan *plan);
void afk_child_place_fds(struct afk_plan *plan);
void afk_child_set_signals(const struct afk_plan *plan);
/* What a fork's handlers must not be in the way of, nor be hindered by: umask to name. */
void afk_child_apply(const struct afk_plan *plan);
/* /proc/self/comm; and that with all that ps(1) shows of this process. */
void afk_child_set_comm(const char *name);
void afk_child_set_name(const char *name);
_Noreturn void afk_child_exec(const struct afk_plan *plan);

/* ---- process.c ------------------------------------------------------------ */
/* New handle with its pipes; the worker's ends are put in the plan.
 * Returns 0 or a negative enum anyfork_code with reterr filled. */
int afk_child_new(struct anyfork_child **ret_child, struct afk_plan *plan,
                  const struct afk_child_wants *wants, struct anyfork_error *reterr);
/* The same for a worker that is a thread of this process: no pid, no lifeline, and
 * nothing to kill. *ret_fd is its end of the report socket. */
int afk_child_new_in_process(struct anyfork_child **ret_child, int *ret_fd,
                             struct anyfork_error *reterr);
/* After the fork, in the parent: pidfd, then the byte that lets the child go on.
 * On failure the child has been killed and reaped. */
int afk_child_adopt(struct anyfork_child *child, pid_t pid, struct afk_plan *plan,
                    struct anyfork_error *reterr);
/* The same for a child that shared our memory and has executed its program; `ready`
 * if that is all that is to be known of it. */
int afk_child_adopt_executed(struct anyfork_child *child, pid_t pid, int pidfd, bool ready,
                             struct afk_plan *plan, struct anyfork_error *reterr);
/* The owner's ends of standard streams; the handle owns them from now on. */
void afk_child_set_stdio(struct anyfork_child *child, struct afk_setup *setup);
unsigned afk_children_held(void); /* handles that are not closed, of this process */
/* A call under way in another thread keeps the handle alive over a close. */
void afk_child_ref(struct anyfork_child *child);
void afk_child_unref(struct anyfork_child *child);
/* The handle of a standby that a template has offered: all that is in `fds` (see zygote.h), and in the
 * table above, is its own from here on, or closed. */
int afk_child_new_offered(struct anyfork_child **ret_child, pid_t pid, const int *fds,
                          bool is_our_child, struct anyfork_error *reterr);
/* A forked child arms its lifeline, or lets go of it, before it reads our byte: what disarms
 * it has to come after. Bounded, for it may be stopped. */
void afk_child_await_armed(struct anyfork_child *child);
/* The guard's socket for it, and the token: as afk_child_new() puts them in the plan. */
int afk_child_guard(struct anyfork_child *child, int *ret_fd, uint64_t *ret_token,
                    struct anyfork_error *reterr);
/* Drains reports and reaps, without blocking. Returns 1 once the child ended. */
int afk_child_poll(struct anyfork_child *child);
/* Waits until `until` holds or the child ended: 0; or ANYFORK_ETIMEDOUT,
 * -EINTR (so that the caller may look at its signals), ANYFORK_EFOREIGN. */
enum afk_until { AFK_UNTIL_READY, AFK_UNTIL_ENDED };
int afk_child_wait_step(struct anyfork_child *child, enum afk_until until,
                        int64_t timeout_ns);

enum afk_status_from {
    AFK_STATUS_UNKNOWN,     /* still running */
    AFK_STATUS_FROM_REPORT, /* EXIT record */
    AFK_STATUS_FROM_WAIT,   /* the owner's, or the template's */
    AFK_STATUS_FROM_INFO,   /* PIDFD_GET_INFO */
    AFK_STATUS_LOST,        /* reaped by the host */
};
struct afk_child_view {
    pid_t pid;              /* 0: a thread of this process */
    int pidfd;
    int status_fd;
    bool foreign;
    bool ready;
    bool ended;
    enum afk_status_from status_from;
    int status;
    int read_errno;         /* 0, or why the reports could not be read */
    int outcome;            /* enum afk_report_kind or 0: what the payload is */
    const char *payload;
    size_t payload_size;
    struct afk_report error; /* kind 0 if there was none */
};
void afk_child_view(struct anyfork_child *child, struct afk_child_view *ret_view);

/* ---- exec.c ---------------------------------------------------------------- */
/* Starts the prepared program; afk_child_set_stdio() is left to the caller. Blocks until
 * it runs. */
int afk_exec_start(struct afk_setup *setup, struct anyfork_child **ret_child,
                   struct anyfork_error *reterr);

/* ---- guard.c ---------------------------------------------------------------- */
/* A copy of the owner's end of the socket of this process's guard, which is started now
 * if there is none. Or a negative enum anyfork_code with reterr filled. */
int afk_guard_open(struct anyfork_error *reterr);
/* It lets that worker, and its cgroup, live. */
void afk_guard_drop(uint64_t token);
/* The calling thread is starting it: nothing may be reaped meanwhile, for that may want
 * to tell the guard. */
bool afk_guard_is_starting(void);

/* ---- identity.c: what a template must have in common with its owner ----------- */

/* Where one of these differs, a worker could do what its owner cannot. Each is a hash, or
 * a number of the kernel's. */
struct afk_identity {
    uint64_t privileges; /* ids, groups, capabilities, no_new_privs, seccomp */
    uint64_t namespaces;
    uint64_t root;
    uint64_t cgroup;
    uint64_t session;
};

#define AFK_LIMITS_MAX 16
#define AFK_CPUS_WORDS 16

/* What a worker is told where it differs: as the owner has it. */
struct afk_surroundings {
    uint64_t cwd_device, cwd_inode;
    uint64_t ignored; /* signals, bit 0: SIGHUP */
    uint64_t environment; /* a hash */
    struct { uint64_t soft, hard; } limit[AFK_LIMITS_MAX];
    unsigned long cpus[AFK_CPUS_WORDS]; /* all zero: more CPUs than these have bits */
    int64_t process_group;
    int32_t umask, nice, oom_score_adj, reserved;
};

/* Files of /proc that are read for each start, of the process that opened them. */
struct afk_proc_files {
    int status, ns, cgroup, oom_score_adj;
};
/* 0 or a negative errno, then none is open. */
int afk_proc_files_open(struct afk_proc_files *ret);
void afk_proc_files_close(struct afk_proc_files *files);
/* Of the calling thread, in two steps, for it takes long: what a worker needs to be told, and
 * what else its owner must have in common with it. 0 or a negative errno. */
int afk_identity_read(const struct afk_proc_files *files, struct afk_identity *ret_identity,
                      struct afk_surroundings *ret_around);
int afk_identity_read_rest(const struct afk_proc_files *files, struct afk_identity *identity);
/* Of another process, as far as it can be read: to be compared with another one that was read so. */
int afk_identity_read_of(pid_t pid, struct afk_identity *ret);
/* NULL if they are the same; else what differs, a static string. */
const char *afk_identity_difference(const struct afk_identity *a, const struct afk_identity *b);

/* ---- zygote.c: a template's owner, the template's server, its standbys ---------- */

/* A template, as its owner holds it. Of the process that made it: in a forked child every
 * call finds it gone. Any thread. */
struct afk_template;
/* *ret_server_end goes to the template-to-be, and is closed by the caller. `siblings`: as of
 * struct afk_server_options. */
int afk_template_new(struct afk_template **ret_template, bool siblings, int *ret_server_end,
                     struct anyfork_error *reterr);
/* It makes no more standbys; those that it has offered can still be started. */
void afk_template_shutdown(struct afk_template *template);
/* Its descriptors, while no other thread uses it: what it has offered ends with them. */
void afk_template_close(struct afk_template *template);
void afk_template_free(struct afk_template *template); /* closes it too */
/* Permitted, effective, inheritable: all that the template may have. */
void afk_template_capabilities(const struct afk_template *template, uint64_t ret[3]);
int afk_template_fd(const struct afk_template *template); /* readable: it has said something */
/* Reads its HELLO. 1; 0: not yet; or a negative errno: it is gone, or of another version. */
int afk_template_hello(struct afk_template *template);
struct afk_template_counts {
    uint64_t starts, misses; /* of them without a standby that was ready */
};
void afk_template_counts(const struct afk_template *template, struct afk_template_counts *ret);
#define AFK_CALLS_KEPT 256
/* What the last starts took their callers, in ns and in no order: how many. */
unsigned afk_template_calls(const struct afk_template *template, int64_t ret[AFK_CALLS_KEPT]);
void afk_template_took(struct afk_template *template, int64_t ns);
void afk_template_missed(struct afk_template *template, unsigned n);
#define AFK_DROPPED_MAX 4
struct afk_template_job {
    const struct afk_setup *setup; /* of AFK_SETUP_TEMPLATE */
    const char *pickle; /* what _boot.load() understands */
    size_t size;
    bool asked; /* for a standby: then one that could not get ready is the worker, and says why */
    struct anyfork_child *child; /* NULL: to be started */
    bool started;
    struct anyfork_child *dropped[AFK_DROPPED_MAX]; /* killed; the caller's to close, which may take long */
    unsigned n_dropped;
};
/* Starts those that are not yet, as many as there are standbys ready; also where it fails
 * then. 0: all are; -EAGAIN: the others need standbys; -ESTALE, with *ret_why: the template has
 * ended or must not serve its owner any more; or a code with reterr filled. */
int afk_template_start(struct afk_template *template, struct afk_template_job *jobs, unsigned n,
                       const char **ret_why, struct anyfork_error *reterr);
#define AFK_STALE (-6000) /* a start's code: the template has to be made again, and detail says why */
/* In a worker of a template that is shared: have it serve this process too, whose end of the
 * control socket is `server_end`. 0 or a negative errno. */
int afk_template_attach(int door, int server_end);
/* It has been asked so: its HELLO has to say that it may do what this thread may, no more. */
void afk_template_set_attached(struct afk_template *template);
/* Those that were started in vain: may take seconds, where their template is slow to tell of
 * their ends. */
void afk_template_close_dropped(struct afk_template_job *jobs, unsigned n);
/* Asks for `n` standbys, at once. 0 or -ESTALE. */
int afk_template_want(struct afk_template *template, unsigned n);
/* Blocks until there may be a standby. 0, -EINTR, -ETIMEDOUT. */
int afk_template_wait(struct afk_template *template, int64_t timeout_ns);

struct afk_server_options {
    int control;
    pid_t owner;
    const struct afk_surroundings *around; /* of the template, and so of its workers */
    const struct afk_identity *identity;   /* the same */
    unsigned low, high; /* standbys: kept when idle, kept when busy */
    int64_t idle_ns;    /* without a start, before only `low` are kept */
    bool shared;        /* its workers can start workers with it, while they may do what it may */
    bool siblings;      /* they are children of the owner's, as the template is */
};
/* What a new standby has, in the process that the callback forked. */
struct afk_standby {
    int report_fd, life_fd;
    int taken_fd; /* its pid goes there when it has begun its start */
    int door_fd;  /* of a template that is shared; else -1 */
    pid_t owner;  /* who alone can start it */
    int dumpable; /* what its worker is, PR_SET_DUMPABLE(2const) */
};
/* fork(2) into a standby: its pid, or a negative errno; in the child it never returns. Of a
 * sibling its pidfd too, else -1. */
typedef pid_t (*afk_fork_standby)(void *arg, const struct afk_standby *standby, int *ret_pidfd);
/* `wait`: poll(2) as the caller wants it to be done. Serves until the owner has closed its
 * end, or has died, and all workers have ended. 0 or a negative errno. */
int afk_server_run(const struct afk_server_options *options, afk_fork_standby fork_standby,
                   int (*wait)(void *fds, unsigned n, int timeout_ms), void *arg);

/* One start, as the standby received it. */
struct afk_start {
    struct afk_setup setup;
    char *body; /* what setup points into, and the pickle */
    const char *pickle;
    size_t pickle_size;
    bool has_stream[3]; /* else it is closed */
    int cwd_fd, guard_fd;
    uint64_t guard_token;
};
/* Blocks. 1; 0: the owner has gone, or has dropped this standby; or a negative errno. Only
 * from `owner`. */
int afk_start_receive(int fd, pid_t owner, struct afk_start *ret_start);
/* Blocks until the owner has seen that this process may start it. Once it has returned the
 * owner knows too that the lifeline is armed. False: it may not, or there is no owner. */
bool afk_start_is_confirmed(int fd);

/* ---- errors --------------------------------------------------------------- */
/* Fills *reterr if it is not NULL; returns `code`. */
int afk_fail(struct anyfork_error *reterr, int code, int stage, int sys_errno, int line,
             const char *detail);
#define AFK_FAIL(reterr, code, stage, errnum, detail) \
    afk_fail(reterr, code, stage, errnum, __LINE__, detail)

#endif
