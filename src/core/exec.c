/*
 * The start of a program: options, handle, clone, and what came of it.
 */
#include "core.h"
#include "anyfork/anyfork.h"

#include <errno.h>

/* The worker's way ends in memory that we share, before the clone returns. */
static int
run(struct afk_setup *setup, bool reports, struct anyfork_child *child, struct afk_plan *plan,
    struct anyfork_error *reterr)
{
    struct anyfork_error failure = {.code = 0};
    int pidfd = -1;

    plan->setup = setup;
    plan->failure = &failure;
    plan->dispositions = AFK_DISPOSITIONS_DEFAULT;
    plan->keep_mask = false;
    pid_t pid = afk_fork_exec(plan, &pidfd);
    if (pid < 0) {
        (void)afk_child_adopt(child, -1, plan, NULL); /* closes the worker's ends */
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_FORK, -pid, NULL);
    }
    int r = afk_child_adopt_executed(child, pid, pidfd, !reports, plan, reterr);
    if (r == 0 && failure.code != 0) {
        if (reterr != NULL)
            *reterr = failure;
        r = failure.code;
    }
    return r;
}

int
afk_exec_start(struct afk_setup *setup, struct anyfork_child **ret_child,
               struct anyfork_error *reterr)
{
    struct afk_plan plan;
    struct anyfork_child *child = NULL;
    const struct afk_child_wants wants = afk_setup_wants(setup);
    afk_plan_init(&plan);
    int r = afk_child_new(&child, &plan, &wants, reterr);
    if (r < 0)
        return r;
    r = run(setup, setup->report_to >= 0, child, &plan, reterr);
    if (r < 0) {
        anyfork_child_close(child); /* it has ended, or was killed: reaped here */
        return r;
    }
    *ret_child = child;
    return 0;
}

int
anyfork_spawn_argv(const struct anyfork_options *options, struct anyfork_child **ret_child,
                   struct anyfork_error *reterr)
{
    struct afk_setup setup;
    if (options == NULL || ret_child == NULL)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0,
                        options == NULL ? "options: NULL" : "ret_child: NULL");
    int r = afk_setup_prepare(&setup, options, AFK_SETUP_EXEC, -1, reterr);
    if (r < 0)
        return r;
    r = afk_exec_start(&setup, ret_child, reterr);
    if (r == 0)
        afk_child_set_stdio(*ret_child, &setup);
    afk_setup_release(&setup);
    return r;
}
