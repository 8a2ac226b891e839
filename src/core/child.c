/*
 * Between fork(2) and the repaired child.
 *
 * Rule: async-signal-safe only, see signal-safety(7): the other threads are
 * gone and whatever locks they held stay locked. No Python, malloc, stdio or
 * locks; tools/check_child.py checks the undefined symbols of this object. The
 * parent judged (afk_plan), this file only carries out.
 */
#include "core.h"
#include "anyfork/anyfork.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#pragma GCC poison malloc calloc realloc free printf exit abort

/* One byte: the owner holds a pidfd of us. Until then we must not end, for who
 * reaps us would free our number. End of file: the owner is gone. */
static void
await_owner(struct afk_plan *plan)
{
    char go;
    ssize_t n;

    do
        n = read(plan->status_fd, &go, 1);
    while (n < 0 && errno == EINTR);
    if (n != 1)
        _exit(AFK_EXIT_ORPHANED);
    plan->owner_holds_us = true;
}

/* The owner's thread is stopped until we end, and then reads it. Where the two memories
 * are not the same, in an emulator of the kernel, the record tells. */
static void
tell_in_memory(struct anyfork_error *failure, int stage, int errnum, const char *detail)
{
    failure->code = ANYFORK_ESYSTEM;
    failure->stage = stage;
    failure->sys_errno = errnum;
    unsigned i = 0;
    for (; i + 1 < sizeof failure->detail && detail[i] != '\0'; i++)
        failure->detail[i] = detail[i];
    failure->detail[i] = '\0';
}

_Noreturn void
afk_child_give_up(const struct afk_plan *plan, int stage, int errnum, const char *detail)
{
    if (plan->failure != NULL)
        tell_in_memory(plan->failure, stage, errnum, detail);
    struct afk_report report = {.magic = AFK_REPORT_MAGIC,
                                .kind = AFK_REPORT_ERROR,
                                .stage = (uint16_t)stage,
                                .sys_errno = errnum};
    for (unsigned i = 0; i + 1 < sizeof report.detail && detail[i] != '\0'; i++)
        report.detail[i] = detail[i];
    if (plan->status_fd >= 0) {
        (void)!write(plan->status_fd, &report, sizeof report);
        if (!plan->owner_holds_us && plan->failure == NULL)
            await_owner((struct afk_plan *)(uintptr_t)plan);
    }
    _exit(AFK_EXIT_SETUP);
}

/* A host's C handlers too: Apache's makes a terminated child exit with 255. */
void
afk_child_default_dispositions(sigset_t *ret_reset)
{
    const struct sigaction dfl = {.sa_handler = SIG_DFL};
    struct sigaction now;

    for (int sig = 1; sig < NSIG; sig++) {
        if (sig == SIGKILL || sig == SIGSTOP)
            continue;
        if (sigaction(sig, NULL, &now) < 0) /* glibc keeps two for itself */
            continue;
        /* An ignored signal stays ignored, as over an exec: nohup(1), and
         * Python's own SIGPIPE. But an ignored SIGCHLD would take the exit
         * status of the worker's own children away. */
        bool handler = (now.sa_flags & SA_SIGINFO) != 0 ||
                       (now.sa_handler != SIG_IGN && now.sa_handler != SIG_DFL);
        if (handler || (now.sa_handler == SIG_IGN && sig == SIGCHLD)) {
            (void)sigaddset(ret_reset, sig);
            (void)sigaction(sig, &dfl, NULL);
        }
    }
}

static void
reset_listed(struct afk_plan *plan)
{
    const struct sigaction dfl = {.sa_handler = SIG_DFL};
    for (int sig = 1; sig < NSIG; sig++) {
        if (sigismember(&plan->reset, sig) == 1) {
            (void)sigaddset(&plan->was_reset, sig);
            (void)sigaction(sig, &dfl, NULL);
        }
    }
}

/* The worker's end of the lifeline: the kernel kills us when the last write end
 * closes, whatever we are doing then. No thread, no polling, and unlike
 * PR_SET_PDEATHSIG not bound to the thread that forked, prctl(2). */
void
afk_child_arm_lifeline(const struct afk_plan *plan)
{
    if (plan->guard_fd >= 0) {
        afk_child_tell_guard(plan);
        (void)close(plan->guard_fd);
    }
    /* Nothing is ever written to this pipe: that would be an event too, and
     * pipe_write() of the kernel sends it after it has woken the reader. */
    int flags = fcntl(plan->life_fd, F_GETFL);
    int sig = plan->setup != NULL ? plan->setup->lifeline_signal : SIGKILL;
    bool group = plan->setup != NULL && plan->setup->lifeline_group;
    if (fcntl(plan->life_fd, F_SETOWN, group ? -getpid() : getpid()) < 0 ||
        fcntl(plan->life_fd, F_SETSIG, sig) < 0 || flags < 0 ||
        fcntl(plan->life_fd, F_SETFL, flags | O_ASYNC) < 0)
        afk_child_give_up(plan, ANYFORK_STAGE_LIFELINE, errno, "fcntl");
    /* A hang-up that came before O_ASYNC sends no signal. */
    struct pollfd now = {.fd = plan->life_fd};
    if (poll(&now, 1, 0) > 0 && (now.revents & POLLHUP) != 0)
        _exit(AFK_EXIT_ORPHANED);
}

/* login_tty(3), which is not listed as async-signal-safe. */
static void
take_terminal(const struct afk_plan *plan)
{
    (void)close(plan->tty_master_fd);
    if (setsid() < 0 || ioctl(plan->tty_fd, TIOCSCTTY, 0) < 0)
        afk_child_give_up(plan, ANYFORK_STAGE_PTY, errno, "controlling terminal");
    for (int fd = 0; fd <= 2; fd++)
        if (dup2(plan->tty_fd, fd) < 0)
            afk_child_give_up(plan, ANYFORK_STAGE_PTY, errno, "dup2");
    if (plan->tty_fd > 2)
        (void)close(plan->tty_fd);
    else
        (void)fcntl(plan->tty_fd, F_SETFD, 0);
}

void
afk_child_repair(struct afk_plan *plan)
{
    for (unsigned i = 0; i < plan->n_stores; i++)
        *plan->store[i].addr = plan->store[i].value;
    /* Before any signal can arrive: CPython's handler would write the number
     * into the pipe of the parent's event loop. */
    if (plan->set_wakeup_fd != NULL)
        (void)plan->set_wakeup_fd(-1);
    if (plan->dispositions == AFK_DISPOSITIONS_DEFAULT)
        afk_child_default_dispositions(&plan->was_reset);
    else if (plan->dispositions == AFK_DISPOSITIONS_RESET_LISTED)
        reset_listed(plan);
    if (plan->setup != NULL)
        afk_child_join_session(plan); /* first: a whole group may hang on the lifeline */
    if (plan->life_fd >= 0)
        afk_child_arm_lifeline(plan);
    if (plan->status_fd >= 0 && plan->failure == NULL && !plan->owner_holds_us)
        await_owner(plan);
    if (plan->tty_fd >= 0)
        take_terminal(plan);
    if (plan->setup != NULL) {
        afk_child_place_fds(plan);
        afk_child_set_signals(plan);
    }
    /* Last here, and not after Python's hooks: processes and threads that those
     * start would inherit a full mask, and could never be terminated. */
    const sigset_t *mask = plan->setup != NULL ? &plan->setup->mask : &plan->child_mask;
    if (sigprocmask(SIG_SETMASK, plan->keep_mask ? &plan->caller_mask : mask, NULL) < 0)
        afk_child_give_up(plan, ANYFORK_STAGE_CHILD, errno, "sigprocmask");
}
