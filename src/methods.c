/* THE table: one row per spawn method; tests, CLI, docs and benchmark loop over it. */
#include "methods.h"

#include <string.h>

const struct afk_method afk_methods[] = {
    {
        .name = "zygote",
        .summary = "a process that a template has made ready; the default",
        .runs_in = "an interpreter that a template has warmed up",
        .memory = "the template's: pickled",
        .may_wait_for = "the first start of a template; a standby, after many starts at once",
        .target = AFK_TARGET_FRESH,
        .process = AFK_PROCESS_FROM_TEMPLATE,
        .pad = AFK_PAD_NONE,
        .start = afk_start_zygote,
        .needs_in_main = AFK_FEATURE_NONE,
        .needs_elsewhere = AFK_FEATURE_NONE,
    },
    {
        .name = "exec",
        .summary = "clone and exec: a new program, or an interpreter for a target",
        .runs_in = "a fresh interpreter of a fresh process",
        .memory = "none: pickled",
        .may_wait_for = "the system's loading of the program",
        .target = AFK_TARGET_FRESH,
        .process = AFK_PROCESS_EXECUTED,
        .pad = AFK_PAD_NONE,
        .start = afk_start_exec,
        .needs_in_main = AFK_FEATURE_NONE,
        .needs_elsewhere = AFK_FEATURE_NONE,
    },
    {
        .name = "fork",
        .summary = "fork on the calling thread, on a fresh thread state",
        .runs_in = "the calling interpreter",
        .memory = "the calling interpreter's: any callable",
        .may_wait_for = "main's GIL, before-fork hooks, the import lock",
        .target = AFK_TARGET_CALLER,
        .process = AFK_PROCESS_FORKED,
        .pad = AFK_PAD_NONE,
        .start = afk_start_fork,
        .needs_in_main = AFK_FEATURE_HOP,
        .needs_elsewhere = AFK_FEATURE_TWIN,
    },
    {
        .name = "subint_fork",
        .summary = "fork from a sub-interpreter's thread; the worker runs in main",
        .runs_in = "the main interpreter",
        .memory = "main's: any callable from main, pickled from elsewhere",
        .may_wait_for = "main's GIL, before-fork hooks, the import lock, the launch pad",
        .target = AFK_TARGET_MAIN,
        .process = AFK_PROCESS_FORKED,
        .pad = AFK_PAD_SUBINT,
        .start = afk_start_fork,
        .needs_in_main = AFK_FEATURE_HOP,
        .needs_elsewhere = AFK_FEATURE_HOP,
    },
    {
        .name = "main_thread_forkserver",
        .summary = "fork from a thread of main that runs no event loop",
        .runs_in = "the main interpreter",
        .memory = "main's: any callable from main, pickled from elsewhere",
        .may_wait_for = "main's GIL, before-fork hooks, the import lock, the launch pad",
        .target = AFK_TARGET_MAIN,
        .process = AFK_PROCESS_FORKED,
        .pad = AFK_PAD_MAIN,
        .start = afk_start_fork,
        .needs_in_main = AFK_FEATURE_HOP,
        .needs_elsewhere = AFK_FEATURE_HOP,
    },
    {
        .name = "subint_forkserver",
        .summary = "the same; the worker hosts its target in a sub-interpreter",
        .runs_in = "a fresh sub-interpreter of the worker, on a thread of its own",
        .memory = "none: pickled",
        .may_wait_for = "main's GIL, before-fork hooks, the import lock, the launch pad",
        .target = AFK_TARGET_FRESH,
        .process = AFK_PROCESS_FORKED,
        .pad = AFK_PAD_MAIN,
        .start = afk_start_fork,
        .needs_in_main = AFK_FEATURE_HOP,
        .needs_elsewhere = AFK_FEATURE_HOP,
    },
    {
        .name = "subint",
        .summary = "a sub-interpreter on a thread of this process; it cannot be killed",
        .runs_in = "a fresh sub-interpreter of this process",
        .memory = "none: pickled",
        .may_wait_for = "main's GIL",
#if PY_VERSION_HEX < 0x030E0000
        .lacks = "many extension modules of CPython 3.13 refuse to be imported there",
#endif
        .target = AFK_TARGET_FRESH,
        .process = AFK_PROCESS_NONE,
        .pad = AFK_PAD_NONE,
        .start = afk_start_subint,
        .needs_in_main = AFK_FEATURE_NONE,
        .needs_elsewhere = AFK_FEATURE_NONE,
    },
};
const unsigned afk_n_methods = sizeof afk_methods / sizeof *afk_methods;

const struct afk_method *
afk_method_find(const char *name)
{
    for (unsigned i = 0; i < afk_n_methods; i++)
        if (strcmp(afk_methods[i].name, name) == 0)
            return &afk_methods[i];
    return NULL;
}

const char *
anyfork_method_name(unsigned index)
{
    return index < afk_n_methods ? afk_methods[index].name : NULL;
}

bool
afk_method_pickles(const struct afk_method *method, bool in_main)
{
    return method->target == AFK_TARGET_FRESH || (method->target == AFK_TARGET_MAIN && !in_main);
}

int
afk_method_probe(const struct afk_method *method, struct anyfork_error *reterr)
{
    bool in_main = PyInterpreterState_Get() == PyInterpreterState_Main();
    enum afk_feature needs = in_main ? method->needs_in_main : method->needs_elsewhere;
    if (needs == AFK_FEATURE_NONE)
        return 0;
    int r = afk_layout_require(AFK_FEATURE_HOP, reterr);
    return r < 0 ? r : afk_layout_require(needs, reterr);
}
