/*
 * The twin fork: fork(2) in a sub-interpreter that returns twice.
 *
 * CPython's gate: PyOS_AfterFork_Child() ends in _PyInterpreterState_DeleteExceptMain
 * (Python/pystate.c), which refuses any interpreter but main. The twin fork is
 * the main interpreter's fork, made while the calling interpreter is frozen; in
 * the child PyOS_AfterFork_Child() runs twice, for main and then, with
 * runtime.interpreters.main set to it for that time, for the caller.
 *
 * Invariants:
 *  - The caller's GIL is held at fork(2), or its threads would be cut in the
 *    middle of a change. One of its own is kept while this thread is attached to
 *    main (attach.c): with the caller's thread state as its holder, for a waiter
 *    sets its drop request there, and drop_gil() waits for who made it.
 *  - Order: caller's GIL before main's; nobody takes them the other way round.
 *  - Child hooks of both interpreters wait until both are repaired: a thread
 *    that a hook of main starts dies of the second pass (it recreates the
 *    thread-specific keys and marks all thread handles done).
 *  - No lock of ours exists across the fork.
 */
#include "cpython/cpython.h"

#include <errno.h>
#include <string.h>

static bool
is_usable(const PyThreadState *t)
{
    return t->_status.bound && !t->_status.unbound && !t->_status.cleared;
}

/* This thread's state in main, before main's GIL is held: only what is certain.
 * Reads a list that HEAD protects, and copies what may go away. */
static PyThreadState *
find_certain_tm(struct afk_forking *f)
{
    const struct afk_layout *lo = f->layout;
    unsigned long me = PyThread_get_thread_ident();
    PyThreadState *found = NULL, *main_tstate = *afk_runtime_main_tstate(lo);

    afk_head_lock(lo);
    for (PyThreadState *t = *afk_interp_threads(lo, f->main); t != NULL && found == NULL; t = t->next) {
        if (t->thread_id != me || !is_usable(t) || t->_status.active)
            continue;
        int here = afk_runs_on_this_stack(lo, t);
        /* Without frames: the state of an embedder's main thread. */
        bool main_thread_idle = here < 0 && t == main_tstate && t->current_frame == NULL;
        bool by_id = lo->state[AFK_FEATURE_STACK] != AFK_READY && t->current_frame != NULL;
        if (here == 1 || main_thread_idle || by_id)
            found = t;
    }
    afk_head_unlock(lo);
    return found;
}

/* A third interpreter whose frames lie on this stack would have to be repaired
 * as well; this thread will return into it. */
static bool
runs_third_interpreter(struct afk_forking *f)
{
    const struct afk_layout *lo = f->layout;
    unsigned long me = PyThread_get_thread_ident();
    /* A host may give states the id of another thread. */
    bool ids_hold = f->ts->thread_id == me;
    bool third = false;

    afk_head_lock(lo);
    for (PyInterpreterState *i = *afk_runtime_head(lo); i != NULL && !third; i = *afk_interp_next(lo, i)) {
        if (i == f->main || i == f->ts->interp)
            continue;
        for (PyThreadState *t = *afk_interp_threads(lo, i); t != NULL && !third; t = t->next) {
            if (!is_usable(t) || (ids_hold && t->thread_id != me))
                continue;
            int here = afk_runs_on_this_stack(lo, t);
            third = here == 1 || (here < 0 && t->thread_id == me && t->current_frame != NULL &&
                                  lo->state[AFK_FEATURE_STACK] != AFK_READY);
        }
    }
    afk_head_unlock(lo);
    return third;
}

/* With main's GIL held its frames do not move: a state of main that runs on this
 * stack is this thread's, and better than a fresh one. */
static void
settle_tm(struct afk_forking *f)
{
    const struct afk_layout *lo = f->layout;
    PyThreadState *better = NULL;

    if (!f->fresh_tm)
        return;
    afk_head_lock(lo); /* states are made without the GIL */
    for (PyThreadState *t = *afk_interp_threads(lo, f->main); t != NULL && better == NULL; t = t->next)
        if (t != f->tm && is_usable(t) && afk_runs_on_this_stack(lo, t) == 1)
            better = t;
    afk_head_unlock(lo);
    if (better == NULL)
        return;
    afk_swap_back(f->tm, better);
    f->tm = better;
    f->fresh_tm = false;
}

/* This thread's other states in main survive in the child: those that run on its
 * stack, and idle ones with its id, to which a host may go back. Under HEAD. */
static void
find_kept(struct afk_forking *f)
{
    const struct afk_layout *lo = f->layout;
    unsigned long me = PyThread_get_thread_ident();

    f->n_keep = 0;
    for (PyThreadState *t = *afk_interp_threads(lo, f->main); t != NULL; t = t->next) {
        if (t == f->tm || !is_usable(t) || f->n_keep == sizeof f->keep / sizeof *f->keep)
            continue;
        int here = afk_runs_on_this_stack(lo, t);
        if (here == 1 || (here < 0 && t->thread_id == me))
            f->keep[f->n_keep++] = t;
    }
}

/* Back to the calling interpreter, whatever was reached. Attached to tm, main's
 * fork already undone. */
static void
return_to_caller(struct afk_forking *f)
{
    if (f->fresh_tm)
        afk_swap_back(f->tm, f->own_gil ? NULL : f->ts);
    else if (f->own_gil)
        (void)PyEval_SaveThread();
    else
        afk_swap(f->ts);
    if (f->own_gil)
        afk_enter(f->layout, f->ts);
    afk_head_lock(f->layout);
    PyOS_AfterFork_Parent(); /* unlocks HEAD, the import lock; hooks */
}

/* What before_twin() made, while still attached to the caller. */
static void
discard_before_hop(struct afk_forking *f)
{
    if (f->fresh_tm) {
        afk_swap(f->tm);
        afk_swap_back(f->tm, f->ts);
    }
}

static int
plan_twin(struct afk_forking *f)
{
    const struct afk_layout *lo = f->layout;
    struct afk_plan *plan = &f->plan;
    PyInterpreterState *caller = f->ts->interp;
    void *me = (void *)PyThread_get_thread_ident();

    bool worker = f->kind == AFK_FORK_WORKER;
    if (!worker) /* a worker never goes back to its host */
        find_kept(f);
    int r = afk_plan_store(plan, afk_runtime_head(lo), f->main);
    if (r == 0)
        r = afk_plan_store(plan, afk_interp_next(lo, f->main), NULL);
    if (r == 0)
        r = afk_plan_store(plan, afk_runtime_main_tstate(lo), f->tm);
    if (r == 0)
        r = worker ? afk_plan_only_state(f, f->tm) : afk_plan_drop_states(f, f->main);
    if (r == 0)
        r = worker ? afk_plan_only_state(f, f->ts) : afk_plan_drop_states(f, caller);
    if (r == 0)
        r = afk_plan_store(plan, &f->ts->thread_id, me);
    if (r == 0)
        r = afk_plan_store(plan, &f->tm->thread_id, me);
    if (r == 0 && lo->state[AFK_FEATURE_HOOKS] == AFK_READY) {
        f->main_hooks = *afk_interp_child_hooks(lo, f->main);
        f->caller_hooks = *afk_interp_child_hooks(lo, caller);
        f->parked = true;
        r = afk_plan_store(plan, afk_interp_child_hooks(lo, f->main), NULL);
        if (r == 0)
            r = afk_plan_store(plan, afk_interp_child_hooks(lo, caller), NULL);
    }
    return r;
}

static int
before_twin(struct afk_forking *f, struct anyfork_error *reterr)
{
    const struct afk_layout *lo = f->layout;
    PyInterpreterState *caller = f->ts->interp;
    int r = afk_layout_require(AFK_FEATURE_TWIN, reterr);
    if (r < 0)
        return r;
    int own = afk_interp_has_own_gil(lo, caller);
    if (own < 0)
        return AFK_FAIL(reterr, ANYFORK_ELAYOUT, ANYFORK_STAGE_LAYOUT, 0,
                        "interpreter.ceval.gil: neither its own nor main's");
    f->own_gil = own == 1;
    if (f->own_gil) {
        r = afk_layout_require(AFK_FEATURE_ATTACH, reterr);
        if (r < 0)
            return r;
    }
    if (runs_third_interpreter(f))
        return AFK_FAIL(reterr, ANYFORK_EUNAVAILABLE, ANYFORK_STAGE_INTERPRETER, 0,
                        "a third interpreter is running on this thread's stack; fork from a "
                        "thread of its own, or use subint_fork");
    f->tm = find_certain_tm(f);
    f->fresh_tm = f->tm == NULL;
    if (f->fresh_tm) {
        f->tm = afk_state_new(f->main);
        if (f->tm == NULL)
            return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM,
                            "thread state of main");
    }

    PyOS_BeforeFork(); /* the caller: hooks, import lock, HEAD */
    if (!afk_head_is_locked(lo)) {
        /* What BeforeFork locked is another mutex: undone before anything else
         * needs the list of thread states. */
        PyOS_AfterFork_Parent();
        afk_layout_refuse(AFK_FEATURE_TWIN, "runtime.interpreters.mutex");
        discard_before_hop(f);
        return afk_layout_require(AFK_FEATURE_TWIN, reterr);
    }
    afk_head_unlock(lo);
    if (f->own_gil) {
        afk_leave(lo, f->ts);
        afk_attach(f->tm, f->main);
    }
    else {
        afk_swap(f->tm);
    }
    settle_tm(f);
    /* Only main runs Python handlers, and the child is in the caller: they would
     * swallow its signals, SIGINT and SIGTERM too. */
    if (f->kind == AFK_FORK_CALL) {
        (void)afk_python_handlers(&f->plan.reset);
        f->plan.dispositions = AFK_DISPOSITIONS_RESET_LISTED;
        f->plan.set_wakeup_fd = PySignal_SetWakeupFd;
    }

    PyOS_BeforeFork(); /* main: hooks, import lock, HEAD */
    if (plan_twin(f) < 0) {
        PyOS_AfterFork_Parent();
        return_to_caller(f);
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_FORK, EAGAIN,
                        "too many thread states are being deleted at once");
    }
    return 0;
}

static void
after_in_parent_twin(struct afk_forking *f)
{
    PyOS_AfterFork_Parent(); /* main */
    return_to_caller(f);
}

/* The states of this thread that were taken out of main's list for pass 1. */
static void
put_back_kept(struct afk_forking *f)
{
    PyThreadState *last = f->tm;
    while (last->next != NULL)
        last = last->next;
    for (unsigned i = 0; i < f->n_keep; i++) {
        PyThreadState *t = f->keep[i];
        last->next = t;
        t->prev = last;
        t->next = NULL;
        last = t;
    }
}

static void
after_in_child_twin(struct afk_forking *f)
{
    const struct afk_layout *lo = f->layout;
    PyInterpreterState *caller = f->ts->interp;

    PyOS_AfterFork_Child(); /* pass 1: main */
    put_back_kept(f);
    if (f->own_gil) {
        (void)PyEval_SaveThread();
        afk_enter(lo, f->ts); /* its GIL is made anew in pass 2 */
    }
    else {
        (void)PyThreadState_Swap(f->ts);
    }
    *afk_runtime_main(lo) = caller;
    *afk_runtime_head(lo) = caller;
    *afk_interp_next(lo, caller) = NULL;
    PyOS_AfterFork_Child(); /* pass 2: the caller, as if it were main */
    *afk_runtime_main(lo) = f->main;
    *afk_runtime_head(lo) = caller;
    *afk_interp_next(lo, caller) = f->main;
    *afk_interp_next(lo, f->main) = NULL;
    if (f->parked) {
        *afk_interp_child_hooks(lo, f->main) = f->main_hooks;
        *afk_interp_child_hooks(lo, caller) = f->caller_hooks;
    }
}

const struct afk_fork_shape afk_fork_twin = {
    .before = before_twin,
    .after_in_parent = after_in_parent_twin,
    .after_in_child = after_in_child_twin,
};
