/* The table of spawn methods: one row each. */
#ifndef AFK_METHODS_H
#define AFK_METHODS_H

#include "cpython/cpython.h"

enum afk_target {
    AFK_TARGET_CALLER, /* runs in the calling interpreter, with its memory */
    AFK_TARGET_MAIN,   /* runs in the main interpreter, with main's memory */
};
enum afk_pad {
    AFK_PAD_NONE,   /* always on the calling thread */
    AFK_PAD_SUBINT, /* from main: on the thread of a sub-interpreter of its own */
};

struct afk_method {
    const char *name;
    const char *summary;
    const char *runs_in;  /* for the tables */
    const char *memory;
    const char *may_wait_for;
    enum afk_target target;
    enum afk_pad pad;
    enum afk_feature needs_in_main;   /* when called in the main interpreter */
    enum afk_feature needs_elsewhere; /* when called in a sub-interpreter */
};

extern const struct afk_method afk_methods[];
extern const unsigned afk_n_methods;
/* NULL if there is none of that name. */
const struct afk_method *afk_method_find(const char *name);
/* 0, or a negative code with the reason why it cannot work for this caller. */
int afk_method_probe(const struct afk_method *method, struct anyfork_error *reterr);

#endif
