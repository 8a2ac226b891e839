/* The table of spawn methods: one row each. */
#ifndef AFK_METHODS_H
#define AFK_METHODS_H

#include "cpython/cpython.h"

enum afk_target {
    AFK_TARGET_CALLER, /* the calling interpreter, with its memory: any callable */
    AFK_TARGET_MAIN,   /* the main interpreter, with main's memory */
    AFK_TARGET_FRESH,  /* an interpreter made for it, with nobody's memory: by pickle */
};

enum afk_process {
    AFK_PROCESS_NONE,   /* a thread of this one: no pid, no options, no signals, no lifeline */
    AFK_PROCESS_FORKED,
    AFK_PROCESS_EXECUTED,
    AFK_PROCESS_FROM_TEMPLATE, /* forked by another process */
};

struct afk_method;
typedef int (*afk_method_start)(const struct afk_method *method, const struct afk_job *job,
                                struct anyfork_child **ret_child, struct anyfork_error *reterr);

struct afk_method {
    const char *name;
    const char *summary;
    const char *runs_in;  /* for the tables */
    const char *memory;
    const char *may_wait_for;
    const char *lacks;    /* on this CPython; or NULL */
    enum afk_target target;
    enum afk_process process;
    enum afk_pad pad;     /* AFK_PAD_SUBINT: from main only */
    afk_method_start start;
    enum afk_feature needs_in_main;   /* when called in the main interpreter */
    enum afk_feature needs_elsewhere; /* when called in a sub-interpreter */
};

extern const struct afk_method afk_methods[];
extern const unsigned afk_n_methods;
/* NULL if there is none of that name. */
const struct afk_method *afk_method_find(const char *name);
/* Whether a target changes interpreter on its way, so has to be pickled. */
bool afk_method_pickles(const struct afk_method *method, bool in_main);
/* 0, or a negative code with the reason why it cannot work for this caller. */
int afk_method_probe(const struct afk_method *method, struct anyfork_error *reterr);

#endif
