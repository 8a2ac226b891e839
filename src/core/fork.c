/*
 * The only fork(2) and the only clone(2) in the tree. Rule: every signal is blocked
 * from before the fork until the child has carried out its plan, so that no handler of
 * the parent ever runs in a child that is not repaired.
 */
#include "core.h"

#include "anyfork/anyfork.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x1000
#endif
#define CLONE_INTO_CGROUP_FLAG 0x200000000ull
#define DEATH_WAIT_MS 200
#define CHILD_STACK (256 * 1024) /* of which the child touches some pages only */

void
afk_plan_init(struct afk_plan *plan)
{
    plan->n_stores = 0; /* store[] needs no clearing, and is large */
    plan->set_wakeup_fd = NULL;
    plan->dispositions = AFK_DISPOSITIONS_KEEP;
    (void)sigemptyset(&plan->reset);
    (void)sigemptyset(&plan->child_mask);
    (void)sigemptyset(&plan->was_reset);
    plan->keep_mask = true;
    plan->life_fd = plan->status_fd = plan->tty_fd = plan->tty_master_fd = -1;
    plan->setup = NULL;
    plan->guard_fd = -1;
    plan->guard_token = 0;
    plan->keep = NULL;
    plan->n_keep = 0;
    plan->failure = NULL;
    plan->ret_sibling = NULL;
    plan->owner_holds_us = false;
    plan->began = false;
}

int
afk_plan_store(struct afk_plan *plan, void *addr, void *value)
{
    if (plan->n_stores == AFK_STORES_MAX)
        return -ENOSPC;
    plan->store[plan->n_stores++] = (struct afk_store){addr, value};
    return 0;
}

/* ---- a child of our parent's -------------------------------------------------------- */

/* What fork(2) of the libc does for the child beside the system call, as far as a process with
 * one thread needs it: its thread's number, which the kernel writes where the libc keeps it, and
 * the list of its robust mutexes. Handlers of pthread_atfork(3) but our own are not called. */

#define TID_WITHIN 1024 /* bytes of the thread's descriptor */

static int tid_offset = -1;

/* Where the libc's own fork(2) writes the number of the child: what equals ours before, and
 * equals the child's in the child. */
int
afk_fork_sibling_prepare(void)
{
    const char *self = (const char *)(uintptr_t)pthread_self();
    const pid_t ours = (pid_t)syscall(SYS_gettid);
    int candidate[8], n = 0, status = 0;
    for (int at = 0; at < TID_WITHIN && n < 8; at += (int)sizeof ours) {
        pid_t there;
        if (afk_os_peek(&there, self + at, sizeof there) < 0) /* a smaller one than glibc's */
            break;
        if (there == ours)
            candidate[n++] = at;
    }
    pid_t pid = n > 0 ? fork() : -1;
    if (pid == 0) {
        const pid_t its = (pid_t)syscall(SYS_gettid);
        int found = -1, matches = 0;
        for (int i = 0; i < n; i++)
            if (memcmp(self + candidate[i], &its, sizeof its) == 0)
                matches++, found = i;
        _exit(matches == 1 ? found : 255);
    }
    if (pid < 0)
        return n > 0 ? -errno : -ENOSYS;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (!WIFEXITED(status) || WEXITSTATUS(status) >= n)
        return -ENOSYS;
    tid_offset = candidate[WEXITSTATUS(status)];
    return 0;
}

static pid_t
fork_sibling(int *ret_pidfd)
{
    void *robust = NULL;
    size_t robust_size = 0;
    (void)syscall(SYS_get_robust_list, 0, &robust, &robust_size);
    void *tid = (char *)(uintptr_t)pthread_self() + tid_offset;
    const unsigned long flags =
        CLONE_PARENT | CLONE_PIDFD | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD;
    afk_lifeline_before_fork();
#ifdef __x86_64__
    long pid = syscall(SYS_clone, flags, 0, ret_pidfd, tid, 0);
#else
    long pid = syscall(SYS_clone, flags, 0, ret_pidfd, 0, tid);
#endif
    int error = errno;
    if (pid == 0) {
        if (robust != NULL)
            (void)syscall(SYS_set_robust_list, robust, robust_size);
        afk_lifeline_after_fork_in_child();
        return 0;
    }
    afk_lifeline_after_fork_in_parent();
    if (pid > 0)
        return (pid_t)pid;
    *ret_pidfd = -1; /* as in clone_vm() */
    return -error;
}

pid_t
afk_fork(struct afk_plan *plan)
{
    sigset_t all;
    (void)sigfillset(&all);
    int r = pthread_sigmask(SIG_SETMASK, &all, &plan->caller_mask);
    if (r != 0)
        return -r;
    int spared[4] = {plan->guard_fd, -1, -1, -1};
    for (int i = 0; i < 3 && plan->setup != NULL; i++)
        spared[1 + i] = plan->setup->opened[i];
    afk_lifeline_spare(spared, 4);
    pid_t pid = AFK_SYS("fork", plan->ret_sibling != NULL ? fork_sibling(plan->ret_sibling)
                                : (pid = fork()) < 0      ? -errno
                                                          : pid);
    afk_lifeline_spare(NULL, 0);
    if (pid == 0) {
        afk_child_repair(plan);
        return 0;
    }
    (void)pthread_sigmask(SIG_SETMASK, &plan->caller_mask, NULL);
    return pid;
}

/* ---- fork and exec in one ------------------------------------------------------ */

static int
child_main(void *arg)
{
    struct afk_plan *plan = arg;
    plan->began = true;
    afk_child_repair(plan);
    afk_child_apply(plan);
    afk_child_exec(plan);
}

#ifdef __x86_64__
/* linux/sched.h; older headers lack the last member. */
struct clone_arguments {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
        set_tid_size, cgroup;
};

/* clone3(2), for which libcs have no wrapper: the child calls child_main(). Born into
 * its cgroup, it is never charged to its owner's, nor has it to be moved. */
static pid_t
clone_into_cgroup(struct afk_plan *plan, void *stack, int *ret_pidfd)
{
    struct clone_arguments args = {
        .flags = CLONE_VM | CLONE_VFORK | CLONE_PIDFD | CLONE_INTO_CGROUP_FLAG,
        .pidfd = (uintptr_t)ret_pidfd,
        .exit_signal = SIGCHLD,
        .stack = (uintptr_t)stack,
        .stack_size = CHILD_STACK,
        .cgroup = (uint64_t)plan->setup->cgroup_dir,
    };
    long r;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "mov %[arg], %%rdi\n\t"
                     "call *%[function]\n\t"
                     "hlt\n"
                     "1:"
                     : "=a"(r)
                     : "0"((long)SYS_clone3), "D"(&args), "S"(sizeof args), [function] "r"(child_main),
                       [arg] "r"(plan)
                     : "rcx", "r11", "memory", "cc");
    return (pid_t)r;
}
#else
static pid_t
clone_into_cgroup(struct afk_plan *plan, void *stack, int *ret_pidfd)
{
    (void)plan, (void)stack, (void)ret_pidfd;
    return -ENOSYS; /* it is moved, then, by itself */
}
#endif

/* ---- nobody's child --------------------------------------------------------------- */

struct between {
    struct afk_plan *plan;
    void *stack; /* of the program-to-be */
    int *ret_pidfd;
    pid_t pid;   /* its number, or a negative errno */
};

static pid_t clone_vm(struct afk_plan *plan, void *stack, int *ret_pidfd);

/* The process between owner and program shares the owner's memory and descriptors, so
 * that the pidfd is the owner's, and ends at once: the program is then init's child, or
 * that of the nearest subreaper. */
static int
between_main(void *arg)
{
    struct between *between = arg;
    between->pid = clone_vm(between->plan, between->stack, between->ret_pidfd);
    _exit(0);
}

/* Without an exit signal the process between is seen by no waitpid(-1) of the host. */
static pid_t
clone_orphan(struct afk_plan *plan, void *stack, int *ret_pidfd)
{
    struct between between = {plan, stack, ret_pidfd, -EAGAIN};
    void *own_stack;
    int r = afk_os_map_stack(CHILD_STACK, &own_stack);
    if (r < 0)
        return r;
    int flags = CLONE_VM | CLONE_VFORK | CLONE_FILES;
    pid_t pid = clone(between_main, (char *)own_stack + CHILD_STACK, flags, &between);
    r = pid < 0 ? -errno : 0;
    while (pid > 0 && waitpid(pid, NULL, __WALL) < 0 && errno == EINTR)
        ;
    afk_os_unmap_stack(own_stack, CHILD_STACK);
    if (r == 0 && between.pid < 0 && *ret_pidfd >= 0) { /* it was killed in between */
        afk_os_close(*ret_pidfd);
        *ret_pidfd = -1;
    }
    return r < 0 ? r : between.pid;
}

/* Since 6.14 Linux takes every child that is born into a cgroup on which cgroup.kill was
 * ever written for one that escaped it: cgroup_css_set_fork() reads the kill_seq of the
 * parent's cgroup (kargs->cgrp is not set yet), cgroup_post_fork() compares that of the
 * child's. It is killed before its first instruction. */
static bool
was_killed_at_birth(const struct afk_plan *plan, int *pidfd)
{
    int status;
    struct pollfd death = {.fd = *pidfd, .events = POLLIN};
    /* Where the two memories are not the same, in an emulator of the kernel, it may live. */
    if (plan->began || poll(&death, 1, DEATH_WAIT_MS) <= 0 ||
        afk_os_pidfd_reap(*pidfd, false, &status) != 1)
        return false;
    afk_os_close(*pidfd);
    *pidfd = -1;
    return true;
}

static pid_t
clone_vm(struct afk_plan *plan, void *stack, int *ret_pidfd)
{
    struct afk_setup *setup = (struct afk_setup *)(uintptr_t)plan->setup;
    if (setup->cgroup_dir >= 0) {
        int procs = setup->cgroup_procs;
        setup->cgroup_procs = -1; /* nothing left to do for the child */
        pid_t pid = AFK_SYS("clone3", clone_into_cgroup(plan, stack, ret_pidfd));
        setup->cgroup_procs = procs;
        if (pid < 0)
            *ret_pidfd = -1;
        if (pid > 0 && was_killed_at_birth(plan, ret_pidfd))
            pid = -ENOSYS; /* it moves there by itself, then */
        /* No such call, or no such member of it; what the cgroup itself refuses is told
         * by the child, which tries to move there. */
        if (pid >= 0 || pid == -EAGAIN || pid == -ENOMEM)
            return pid;
    }
    int flags = CLONE_VM | CLONE_VFORK | CLONE_PIDFD | SIGCHLD;
    pid_t pid = clone(child_main, (char *)stack + CHILD_STACK, flags, plan, ret_pidfd);
    if (pid >= 0)
        return pid;
    *ret_pidfd = -1; /* written before it failed, and closed again: the number is not ours */
    return -errno;
}

pid_t
afk_fork_exec(struct afk_plan *plan, int *ret_pidfd)
{
    sigset_t all;
    void *stack;
    int cancel;
    int r = afk_os_map_stack(CHILD_STACK, &stack);
    if (r < 0)
        return r;
    /* The child has this thread's control block: it must not act on a cancellation. */
    (void)pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &plan->caller_mask);
    *ret_pidfd = -1;
    pid_t pid = AFK_SYS("clone", plan->setup->orphan ? clone_orphan(plan, stack, ret_pidfd)
                                                    : clone_vm(plan, stack, ret_pidfd));
    (void)pthread_sigmask(SIG_SETMASK, &plan->caller_mask, NULL);
    afk_os_unmap_stack(stack, CHILD_STACK);
    (void)pthread_setcancelstate(cancel, NULL);
    return pid;
}
