/*
 * What a start asked for, carried out in the child: session, descriptors, signals,
 * and all that is listed in struct anyfork_options.
 *
 * Rule: as child.c, async-signal-safe only, and checked by the same tool. The child
 * may share its owner's memory and threads (exec), so that nothing is stored but in
 * the plan, and ids are changed by system call: glibc would change them in all
 * threads of the owner.
 */
#include "core.h"
#include "guard.h"
#include "anyfork/anyfork.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC poison malloc calloc realloc free printf exit abort

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

#ifndef CLOSE_RANGE_CLOEXEC
#define CLOSE_RANGE_CLOEXEC (1u << 2) /* linux/close_range.h */
#endif

#define FD_FOLDER "/proc/self/fd"
#define TASK_FOLDER "/proc/self/task"
#define FDS_WITHOUT_PROC 65536 /* how far is looked where there is no /proc */

static _Noreturn void
give_up(const struct afk_plan *plan, const char *member)
{
    afk_child_give_up(plan, ANYFORK_STAGE_OPTION, errno, member);
}

void
afk_child_join_session(const struct afk_plan *plan)
{
    const struct afk_setup *setup = plan->setup;
    if (setup->session == ANYFORK_SESSION_NEW && setsid() < 0)
        give_up(plan, "session");
    if (setup->session == ANYFORK_SESSION_GROUP && setpgid(0, setup->process_group) < 0)
        give_up(plan, "process_group");
}

/* Before anything else, so that there is no moment at which nobody holds us. */
void
afk_child_tell_guard(const struct afk_plan *plan)
{
    int fds[2] = {(int)syscall(SYS_pidfd_open, getpid(), 0), plan->setup->cgroup_kill};
    size_t size = (fds[1] >= 0 ? 2 : 1) * sizeof(int);
    const struct afk_guard_message message = {.op = AFK_GUARD_HOLD,
                                              .token = plan->guard_token,
                                              /* no other reaches process 1 of a namespace */
                                              .signal = getpid() == 1 ? SIGKILL
                                                                      : plan->setup->lifeline_signal};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(2 * sizeof(int))];
    } control = {.header = {.cmsg_level = SOL_SOCKET,
                            .cmsg_type = SCM_RIGHTS,
                            .cmsg_len = CMSG_LEN(size)}};
    struct iovec vec = {(void *)(uintptr_t)&message, sizeof message};
    const struct msghdr msg = {.msg_iov = &vec,
                               .msg_iovlen = 1,
                               .msg_control = &control,
                               .msg_controllen = CMSG_SPACE(size)};
    if (fds[0] < 0)
        give_up(plan, "guard: pidfd_open");
    int *to = (int *)(void *)CMSG_DATA(&control.header);
    to[0] = fds[0];
    to[1] = fds[1] >= 0 ? fds[1] : 0; /* beyond its length */
    ssize_t n;
    do
        n = sendmsg(plan->guard_fd, &msg, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        give_up(plan, "guard");
    (void)close(fds[0]);
}

/* ---- descriptors ------------------------------------------------------------- */

/* The lowest number from `from` on that must stay open; INT_MAX: none. */
static int
next_kept(const struct afk_plan *plan, int from)
{
    const struct afk_setup *setup = plan->setup;
    int found = INT_MAX;
    const int ours[] = {plan->status_fd, plan->life_fd, setup->cgroup_procs};
    for (unsigned i = 0; i < sizeof ours / sizeof *ours; i++)
        if (ours[i] >= from && ours[i] < found)
            found = ours[i];
    for (unsigned i = 0; i < plan->n_keep; i++)
        if (plan->keep[i] >= from && plan->keep[i] < found)
            found = plan->keep[i];
    for (unsigned i = 0; i < setup->n_moves; i++) {
        if (setup->move[i].to >= from) {
            if (setup->move[i].to < found)
                found = setup->move[i].to;
            break; /* ascending */
        }
    }
    return found;
}

/* A target that the worker's own streams have would silently change what they are. */
static void
check_targets(const struct afk_plan *plan)
{
    for (unsigned i = 0; i < plan->n_keep; i++)
        for (unsigned k = 0; k < plan->setup->n_moves; k++)
            if (plan->setup->move[k].to == plan->keep[i] &&
                plan->setup->move[k].from != plan->keep[i])
                afk_child_give_up(plan, ANYFORK_STAGE_OPTION, EBUSY,
                                  "fds: a stream or log has that number");
}

/* Calls `visit` for each entry of a folder of /proc whose name is a number; not for the
 * folder's own descriptor, if it lists descriptors. False: there is no such folder. */
static bool
for_each_number(const char *folder, bool lists_fds, void (*visit)(int number, void *arg), void *arg)
{
    char buffer[4096] __attribute__((aligned(8)));
    int dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0)
        return false;
    for (;;) {
        long n = syscall(SYS_getdents64, dir, buffer, sizeof buffer);
        if (n <= 0)
            break;
        for (long at = 0; at < n;) {
            /* linux/dirent.h: ino, off, reclen, type, name */
            unsigned short size = *(unsigned short *)(void *)(buffer + at + 16);
            int number = 0;
            const char *p = buffer + at + 19;
            bool is_number = *p >= '0' && *p <= '9';
            for (; *p >= '0' && *p <= '9'; p++)
                number = number * 10 + (*p - '0');
            if (is_number && !(lists_fds && number == dir))
                visit(number, arg);
            at += size;
        }
    }
    (void)close(dir);
    return true;
}

struct inherited {
    const struct afk_plan *plan;
    void (*visit)(int fd, int *placeholder);
    int placeholder;
};

static void
visit_inherited(int fd, void *arg)
{
    struct inherited *inherited = arg;
    if (fd >= 3 && next_kept(inherited->plan, fd) != fd)
        inherited->visit(fd, &inherited->placeholder);
}

/* Calls `visit` for each open descriptor from 3 on that is not kept. */
static void
for_each_inherited(const struct afk_plan *plan, void (*visit)(int fd, int *placeholder))
{
    struct inherited inherited = {plan, visit, -1};
    if (for_each_number(FD_FOLDER, true, visit_inherited, &inherited))
        return;
    struct rlimit limit = {.rlim_cur = FDS_WITHOUT_PROC};
    (void)getrlimit(RLIMIT_NOFILE, &limit);
    int end = limit.rlim_cur < FDS_WITHOUT_PROC ? (int)limit.rlim_cur : FDS_WITHOUT_PROC;
    for (int fd = 3; fd < end; fd++)
        if (fcntl(fd, F_GETFD) >= 0)
            visit_inherited(fd, &inherited);
}

static void
close_one(int fd, int *placeholder)
{
    (void)placeholder;
    (void)close(fd);
}

/* From `from` to before `kept`. False: Linux 5.8 and older. */
static bool
close_gap(int from, int kept, bool executes)
{
    unsigned last = kept == INT_MAX ? UINT_MAX : (unsigned)kept - 1;
    /* Whoever shares our memory waits until execve(2) has let go of it, which then closes
     * what is marked beside the owner; so many descriptors that would take a millisecond. */
    if (executes && syscall(SYS_close_range, (unsigned)from, last, CLOSE_RANGE_CLOEXEC) == 0)
        return true;
    return syscall(SYS_close_range, (unsigned)from, last, 0) == 0; /* a fork; or Linux before 5.11 */
}

/* Closes all but what is kept, or marks it to be closed by execve(2): the gaps in one system
 * call each. */
static void
close_inherited(struct afk_plan *plan)
{
    int from = 3;
    for (;;) {
        int kept = next_kept(plan, from);
        if (kept > from && !close_gap(from, kept, plan->setup->argv != NULL)) {
            for_each_inherited(plan, close_one);
            return;
        }
        if (kept == INT_MAX)
            return;
        from = kept + 1;
    }
}

/* A placeholder needs no number of its own: it takes the first that it replaces. */
static void
bury(int fd, int *placeholder)
{
    if (*placeholder >= 0) {
        if (dup3(*placeholder, fd, O_CLOEXEC) < 0) /* beyond a limit that was lowered */
            (void)close(fd);
        return;
    }
    (void)close(fd);
    int made = open("/", O_PATH | O_CLOEXEC);
    if (made < 0)
        return;
    if (made == fd || dup3(made, fd, O_CLOEXEC) >= 0)
        *placeholder = fd;
    if (made != fd)
        (void)close(made);
}

void
afk_child_place_fds(struct afk_plan *plan)
{
    const struct afk_setup *setup = plan->setup;
    bool executes = setup->argv != NULL;
    int above = setup->lowest;

    check_targets(plan);
    if (above <= plan->status_fd)
        above = plan->status_fd + 1;
    if (above <= plan->life_fd)
        above = plan->life_fd + 1;
    for (unsigned i = 0; i < setup->n_moves; i++) {
        struct afk_fd_move *move = &setup->move[i];
        if (move->from < 0)
            move->from = plan->status_fd;
        if (move->park) {
            move->from = fcntl(move->from, F_DUPFD_CLOEXEC, above);
            if (move->from < 0)
                give_up(plan, "fds");
        }
    }
    for (unsigned i = 0; i < setup->n_moves; i++) {
        const struct afk_fd_move *move = &setup->move[i];
        bool inheritable = executes || move->to <= 2;
        if (move->from != move->to) {
            if (dup3(move->from, move->to, inheritable ? 0 : O_CLOEXEC) < 0)
                give_up(plan, move->to <= 2 ? "stdin, stdout or stderr" : "fds");
        }
        else if (inheritable && fcntl(move->to, F_SETFD, 0) < 0)
            give_up(plan, "fds");
    }
    for (unsigned i = 0; i < setup->n_moves; i++)
        if (setup->move[i].park)
            (void)close(setup->move[i].from);
    /* A worker that inherits all has no use for what its own start has opened. */
    const int spent[] = {setup->opened[0], setup->opened[1], setup->opened[2], setup->cgroup_dir,
                         setup->cgroup_kill};
    for (unsigned i = 0; i < sizeof spent / sizeof *spent && !executes; i++)
        if (spent[i] >= 0 && next_kept(plan, spent[i]) != spent[i])
            (void)close(spent[i]);
    if (setup->fd_policy == ANYFORK_FDS_CLOSE)
        close_inherited(plan);
    else if (setup->fd_policy == ANYFORK_FDS_TOMBSTONE)
        for_each_inherited(plan, bury);
}

/* ---- signals ------------------------------------------------------------------- */

void
afk_child_set_signals(const struct afk_plan *plan)
{
    const struct sigaction dfl = {.sa_handler = SIG_DFL}, ign = {.sa_handler = SIG_IGN};
    for (int sig = 1; sig < NSIG; sig++) {
        if (sigismember(&plan->setup->ignored, sig) == 1)
            (void)sigaction(sig, &ign, NULL);
        else if (sigismember(&plan->setup->defaults, sig) == 1)
            (void)sigaction(sig, &dfl, NULL);
    }
}

/* ---- the rest -------------------------------------------------------------------- */

static void
write_small(const struct afk_plan *plan, int fd, const char *text, size_t size, const char *member)
{
    ssize_t n;
    do
        n = write(fd, text, size);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        give_up(plan, member);
}

static void
set_oom_score(const struct afk_plan *plan)
{
    char text[8], *p = text + sizeof text;
    int value = plan->setup->oom_score_adj;
    unsigned left = value < 0 ? (unsigned)-value : (unsigned)value;
    do
        *--p = (char)('0' + left % 10);
    while ((left /= 10) != 0);
    if (value < 0)
        *--p = '-';
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        give_up(plan, "oom_score_adj");
    write_small(plan, fd, p, (size_t)(text + sizeof text - p), "oom_score_adj");
    (void)close(fd);
}

/* Of one thread, 0 for this one: the kernel keeps both apart for each. */
static bool
set_nice(const struct afk_plan *plan, int tid)
{
    errno = 0;
    int now = getpriority(PRIO_PROCESS, (id_t)tid);
    return errno == 0 && setpriority(PRIO_PROCESS, (id_t)tid, now + plan->setup->nice) == 0;
}

static bool
set_cpus(const struct afk_plan *plan, int tid)
{
    return syscall(SYS_sched_setaffinity, tid, plan->setup->cpus_size, plan->setup->cpus) >= 0;
}

static void
set_scheduling(const struct afk_plan *plan, int tid)
{
    bool others = tid != 0; /* may have ended meanwhile: ESRCH */
    if (plan->setup->nice != 0 && !set_nice(plan, tid) && !(others && errno == ESRCH))
        give_up(plan, "nice");
    if (plan->setup->cpus != NULL && !set_cpus(plan, tid) && !(others && errno == ESRCH))
        give_up(plan, "cpus");
}

static void
set_scheduling_of_other(int tid, void *arg)
{
    if (tid != (int)syscall(SYS_gettid))
        set_scheduling(arg, tid);
}

/* Whether /proc has this process by the number that it has for itself: not that of another
 * pid namespace. */
static bool
proc_is_ours(void)
{
    char name[16];
    ssize_t n = readlink("/proc/self", name, sizeof name);
    pid_t pid = 0;
    for (ssize_t i = 0; i < n; i++)
        pid = pid * 10 + (name[i] - '0');
    return n > 0 && pid == getpid();
}

/* A forked worker may have threads by now, which fork hooks have started; one that
 * shares its owner's memory has itself alone. */
static void
set_scheduling_of_all(const struct afk_plan *plan)
{
    if (plan->setup->nice == 0 && plan->setup->cpus == NULL)
        return;
    set_scheduling(plan, 0);
    if (plan->failure == NULL && proc_is_ours())
        (void)for_each_number(TASK_FOLDER, false, set_scheduling_of_other,
                              (void *)(uintptr_t)plan);
}

static void
set_limits(const struct afk_plan *plan)
{
    const struct afk_setup *setup = plan->setup;
    for (unsigned i = 0; i < setup->n_rlimits; i++) {
        const struct { uint64_t soft, hard; } limit = {setup->rlimits[i].soft, setup->rlimits[i].hard};
        if (syscall(SYS_prlimit64, 0, setup->rlimits[i].resource, &limit, NULL) < 0)
            give_up(plan, "rlimits");
    }
}

/* A system call is of the calling thread alone: right for a child that shares its
 * owner's threads, as glibc sees it. A forked one may have threads of its own by now,
 * which fork hooks have started: glibc changes the ids of all. */
static void
set_ids(const struct afk_plan *plan)
{
    const struct afk_setup *setup = plan->setup;
    bool shares = plan->failure != NULL;
    size_t n = (size_t)setup->n_groups;
    gid_t gid = (gid_t)setup->group;
    uid_t uid = (uid_t)setup->user;
    if (setup->n_groups >= 0 &&
        (shares ? syscall(SYS_setgroups, n, setup->groups) : setgroups(n, setup->groups)) < 0)
        give_up(plan, "groups");
    if (setup->group >= 0 &&
        (shares ? syscall(SYS_setresgid, gid, gid, gid) : setresgid(gid, gid, gid)) < 0)
        give_up(plan, "group");
    if (setup->user >= 0 &&
        (shares ? syscall(SYS_setresuid, uid, uid, uid) : setresuid(uid, uid, uid)) < 0)
        give_up(plan, "user");
}

/* Field `index` (from 1) of /proc/self/stat, whose second is in parentheses. */
static uintptr_t
stat_field(const char *text, unsigned index)
{
    const char *p = text;
    for (const char *q = text; *q != '\0'; q++)
        if (*q == ')')
            p = q;
    for (unsigned at = 2; *p != '\0' && at < index; p++)
        at += *p == ' ';
    uintptr_t value = 0;
    for (; *p >= '0' && *p <= '9'; p++)
        value = value * 10 + (uintptr_t)(*p - '0');
    return value;
}

/* The command line that ps(1) shows is the memory of the program's arguments. Where that is
 * stays the same over a fork: looked up once. */
static bool
find_arguments(char **ret_start, char **ret_end)
{
    static char *start, *end;
    char text[1024];
    if (start == NULL) {
        int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return false; /* no /proc, so nobody sees it either */
        ssize_t n = read(fd, text, sizeof text - 1);
        (void)close(fd);
        if (n <= 0)
            return false;
        text[n] = '\0';
        end = (char *)stat_field(text, 49);
        start = (char *)stat_field(text, 48);
    }
    *ret_start = start;
    *ret_end = end;
    return start != NULL && end > start;
}

void
afk_child_set_comm(const char *name)
{
    char comm[16] = "";
    /* Without spaces: CPython takes the number of threads from behind so many of them
     * (Modules/posixmodule.c, get_number_of_os_threads()), and warns at a fork. */
    for (size_t i = 0; i < sizeof comm - 1 && name[i] != '\0'; i++)
        comm[i] = name[i] == ' ' ? '-' : name[i];
    (void)prctl(PR_SET_NAME, comm);
}

void
afk_child_set_name(const char *name)
{
    char *start, *end;
    afk_child_set_comm(name);
    if (!find_arguments(&start, &end))
        return;
    while (*name != '\0' && start + 1 < end)
        *start++ = *name++;
    while (start < end)
        *start++ = '\0';
}

void
afk_child_apply(const struct afk_plan *plan)
{
    const struct afk_setup *setup = plan->setup;
    if (setup->umask >= 0)
        (void)umask((mode_t)setup->umask);
    if (setup->cgroup_procs >= 0) {
        write_small(plan, setup->cgroup_procs, "0", 1, "cgroup");
        (void)close(setup->cgroup_procs);
    }
    if (setup->oom_score_adj != ANYFORK_OOM_KEEP)
        set_oom_score(plan);
    set_scheduling_of_all(plan);
    set_limits(plan);
    if (setup->cwd != NULL && chdir(setup->cwd) < 0)
        give_up(plan, "cwd");
    set_ids(plan);
    if (setup->name != NULL)
        afk_child_set_name(setup->name);
}

/* As execvp(3), but for scripts without an interpreter. */
_Noreturn void
afk_child_exec(const struct afk_plan *plan)
{
    const struct afk_setup *setup = plan->setup;
    char *const *env = (char *const *)(uintptr_t)setup->env;
    int errnum = ENOENT;
    for (char **path = setup->candidates; *path != NULL; path++) {
        (void)execve(*path, (char *const *)(uintptr_t)setup->argv, env);
        if (errno != ENOENT && errno != ENOTDIR)
            errnum = errno;
    }
    afk_child_give_up(plan, ANYFORK_STAGE_EXEC, errnum, setup->program);
}
