/* THE table: one row per spawn method; tests, CLI, docs and benchmark loop over it. */
#include "methods.h"

#include <string.h>

const struct afk_method afk_methods[] = {
    {
        .name = "fork",
        .summary = "fork on the calling thread, on a fresh thread state",
        .runs_in = "the calling interpreter",
        .memory = "the calling interpreter's: any callable",
        .may_wait_for = "main's GIL, before-fork hooks, the import lock",
        .target = AFK_TARGET_CALLER,
        .pad = AFK_PAD_NONE,
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
        .pad = AFK_PAD_SUBINT,
        .needs_in_main = AFK_FEATURE_HOP,
        .needs_elsewhere = AFK_FEATURE_HOP,
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

int
afk_method_probe(const struct afk_method *method, struct anyfork_error *reterr)
{
    bool in_main = PyInterpreterState_Get() == PyInterpreterState_Main();
    int r = afk_layout_require(AFK_FEATURE_HOP, reterr);
    if (r < 0)
        return r;
    return afk_layout_require(in_main ? method->needs_in_main : method->needs_elsewhere, reterr);
}
