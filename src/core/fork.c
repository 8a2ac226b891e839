/*
 * The only fork(2) in the tree. Rule: every signal is blocked from before the
 * fork until the child has carried out its plan, so that no handler of the
 * parent ever runs in a child that is not repaired.
 */
#include "core.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

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
}

int
afk_plan_store(struct afk_plan *plan, void *addr, void *value)
{
    if (plan->n_stores == AFK_STORES_MAX)
        return -ENOSPC;
    plan->store[plan->n_stores++] = (struct afk_store){addr, value};
    return 0;
}

pid_t
afk_fork(struct afk_plan *plan)
{
    sigset_t all;
    (void)sigfillset(&all);
    int r = pthread_sigmask(SIG_SETMASK, &all, &plan->caller_mask);
    if (r != 0)
        return -r;
    pid_t pid = AFK_SYS("fork", (pid = fork()) < 0 ? -errno : pid);
    if (pid == 0) {
        afk_child_repair(plan);
        return 0;
    }
    (void)pthread_sigmask(SIG_SETMASK, &plan->caller_mask, NULL);
    return pid;
}
