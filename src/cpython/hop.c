/*
 * The hop: the calling thread changes to a fresh thread state, of the main
 * interpreter or of its own, and back; and the fork of the main interpreter.
 *
 * Rule: public API, and stores that layout.c has proved. Everything that can
 * fail is done before PyOS_BeforeFork(); the stores are computed after it, when
 * the list of thread states can no longer change.
 */
#include "cpython/cpython.h"

#include <errno.h>
#include <string.h>

PyThreadState *
afk_hop_enter(PyInterpreterState *interp, PyThreadState **ret_from)
{
    PyThreadState *from = PyThreadState_GetUnchecked();
    PyThreadState *fresh = afk_state_new(interp);
    if (fresh == NULL)
        return NULL;
    afk_swap(fresh);
    *ret_from = from;
    return fresh;
}

void
afk_forking_init(struct afk_forking *f, enum afk_fork_kind kind)
{
    f->kind = kind;
    f->layout = afk_layout();
    f->main = PyInterpreterState_Main();
    f->ts = NULL;
    f->child = NULL;
    f->for_pad = false;
    afk_plan_init(&f->plan);
    if (kind == AFK_FORK_WORKER) {
        f->plan.dispositions = AFK_DISPOSITIONS_DEFAULT;
        f->plan.set_wakeup_fd = PySignal_SetWakeupFd;
        f->plan.keep_mask = false; /* a host's request threads block nearly all */
    }
    f->main_hooks = f->caller_hooks = NULL;
    f->parked = false;
    f->tm = NULL;
    f->fresh_tm = f->own_gil = false;
    f->n_keep = 0;
}

int
afk_check_caller(struct anyfork_error *reterr)
{
    if (PyThreadState_GetUnchecked() == NULL)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_INTERPRETER, 0,
                        "the calling thread has no attached thread state");
    if (Py_IsFinalizing())
        return AFK_FAIL(reterr, ANYFORK_EFINALIZING, ANYFORK_STAGE_INTERPRETER, 0,
                        "can't fork at interpreter shutdown");
    return 0;
}

static bool
is_kept(const struct afk_forking *f, const PyThreadState *ts)
{
    for (unsigned i = 0; i < f->n_keep; i++)
        if (f->keep[i] == ts)
            return true;
    return false;
}

/*
 * Plans the stores that take out of interp's list, in the child,
 *  - states that a dead thread had cleared but not yet deleted: CPython's own
 *    import.c does Clear, Swap, Delete, and clearing twice asserts;
 *  - states of this very thread that must survive (f->keep): they are put back
 *    once CPython has deleted the dead ones.
 * Called under HEAD. Returns 0 or -ENOSPC.
 */
int
afk_plan_drop_states(struct afk_forking *f, PyInterpreterState *interp)
{
    PyThreadState *last = NULL;
    bool dropped = false; /* between last and t */
    int r = 0;

    for (PyThreadState *t = *afk_interp_threads(f->layout, interp);; t = t->next) {
        if (t != NULL && (t->_status.cleared || is_kept(f, t))) {
            dropped = true;
            continue;
        }
        if (dropped) {
            void *addr = last ? (void *)&last->next : (void *)afk_interp_threads(f->layout, interp);
            r = afk_plan_store(&f->plan, addr, t);
            if (r == 0 && t != NULL)
                r = afk_plan_store(&f->plan, &t->prev, last);
            if (r < 0)
                return r;
        }
        if (t == NULL)
            return 0;
        last = t;
        dropped = false;
    }
}

/*
 * For a worker: its one state alone stays in the list, so that CPython has none
 * to delete. Deleting one drops what its thread kept to itself (threading.local,
 * context variables): finalizers of the owner's objects would run here, and
 * delete its temporary folders. The caller's own state, which the worker does
 * not run on, would be one of them. The memory of the others is just left.
 *
 * Free-threaded builds need the deletion, for their reference counts.
 */
int
afk_plan_only_state(struct afk_forking *f, PyThreadState *only)
{
#ifdef Py_GIL_DISABLED
    return afk_plan_drop_states(f, only->interp);
#else
    int r = afk_plan_store(&f->plan, (void *)afk_interp_threads(f->layout, only->interp), only);
    if (r == 0)
        r = afk_plan_store(&f->plan, &only->next, NULL);
    if (r == 0)
        r = afk_plan_store(&f->plan, &only->prev, NULL);
    return r;
#endif
}

/* A worker's child hooks wait until half-done imports are repaired: a hook that
 * imports would wait for a dead thread. */
static int
before_in_main(struct afk_forking *f, struct anyfork_error *reterr)
{
    const struct afk_layout *lo = f->layout;

    PyOS_BeforeFork(); /* hooks, import lock, HEAD */
    struct afk_plan *plan = &f->plan;
    int r = afk_plan_store(plan, afk_runtime_head(lo), f->main);
    if (r == 0)
        r = afk_plan_store(plan, afk_interp_next(lo, f->main), NULL);
    /* Before PyOS_AfterFork_Child(): a signal that arrives after it has reset
     * the tripped ones must find a live state to set its bit in. */
    if (r == 0)
        r = afk_plan_store(plan, afk_runtime_main_tstate(lo), f->ts);
    if (r == 0)
        r = f->kind == AFK_FORK_WORKER ? afk_plan_only_state(f, f->ts)
                                       : afk_plan_drop_states(f, f->main);
    if (r == 0 && f->ts->thread_id != PyThread_get_thread_ident())
        r = afk_plan_store(plan, &f->ts->thread_id, (void *)PyThread_get_thread_ident());
    if (r == 0 && f->kind == AFK_FORK_WORKER && lo->state[AFK_FEATURE_HOOKS] == AFK_READY) {
        f->main_hooks = *afk_interp_child_hooks(lo, f->main);
        f->parked = true;
        r = afk_plan_store(plan, afk_interp_child_hooks(lo, f->main), NULL);
    }
    if (r < 0) {
        PyOS_AfterFork_Parent();
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_FORK, EAGAIN,
                        "too many thread states are being deleted at once");
    }
    return 0;
}

static void
after_in_parent_main(struct afk_forking *f)
{
    (void)f;
    PyOS_AfterFork_Parent();
}

#ifdef Py_GIL_DISABLED
static int
unlock(PyObject *object, void *arg)
{
    (void)arg;
    if (object->ob_mutex._bits != 0) /* else its page is not copied */
        object->ob_mutex._bits = 0;
    return 1;
}

/* Of dead threads. A contended lock is handed to a thread that waits for it, which may be
 * stopped for the fork already (the mechanism of gh-144513): it got the lock and did
 * nothing with it. No other thread has one, for a critical section ends where a thread
 * can be stopped. Not if this thread is inside of one itself, which goes on. */
static void
unlock_objects(const struct afk_forking *f)
{
    /* Who stops one interpreter's world locks its mutex, and waits for our stop of all
     * worlds only then (stop_the_world() in Python/pystate.c; 3.13, 3.14): such a thread,
     * a collecting one, say, leaves it locked. */
    afk_interp_world_mutex(f->layout, f->main)->_bits = 0;
    if (f->ts->critical_section == 0)
        PyUnstable_GC_VisitObjects(unlock, NULL);
}
#else
static void
unlock_objects(const struct afk_forking *f)
{
    (void)f;
}
#endif

static void
after_in_child_main(struct afk_forking *f)
{
    PyOS_AfterFork_Child();
    unlock_objects(f);
    if (f->parked)
        *afk_interp_child_hooks(f->layout, f->main) = f->main_hooks;
}

const struct afk_fork_shape afk_fork_in_main = {
    .before = before_in_main,
    .after_in_parent = after_in_parent_main,
    .after_in_child = after_in_child_main,
};

pid_t
afk_fork_from(struct afk_forking *f, struct anyfork_error *reterr)
{
    f->ts = PyThreadState_Get();
    const struct afk_fork_shape *shape =
        f->ts->interp == f->main ? &afk_fork_in_main : &afk_fork_twin;
    int r = shape->before(f, reterr);
    if (r < 0)
        return r;
    if (f->for_pad && !afk_pad_commit()) {
        shape->after_in_parent(f);
        return AFK_FAIL(reterr, ANYFORK_ETIMEDOUT, ANYFORK_STAGE_PAD, 0, "the caller gave up");
    }
    pid_t pid = afk_fork(&f->plan);
    if (pid == 0) {
        shape->after_in_child(f);
        return 0;
    }
    /* At once: the child waits for it, and it may do so beside our hooks. */
    r = f->child != NULL ? afk_child_adopt(f->child, pid, &f->plan, reterr) : 0;
    shape->after_in_parent(f);
    if (pid < 0)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_FORK, -pid, NULL);
    return r < 0 ? r : pid;
}

/* ---- what both shapes share ------------------------------------------------------ */

/* asyncio's hook (asyncio/events.py, on_fork) has done its work when it calls
 * signal.set_wakeup_fd(-1), which only main allows: not worth a message. */
static bool
is_asyncio_in_subinterpreter(PyObject *hook)
{
    if (!PyErr_ExceptionMatches(PyExc_ValueError) ||
        PyInterpreterState_Get() == PyInterpreterState_Main())
        return false;
    PyObject *exc = PyErr_GetRaisedException();
    PyObject *name = PyObject_GetAttrString(hook, "__module__");
    bool is = name != NULL && PyUnicode_Check(name) &&
              PyUnicode_CompareWithASCIIString(name, "asyncio.events") == 0;
    Py_XDECREF(name);
    PyErr_SetRaisedException(exc);
    return is;
}

/* As run_at_forkers() of Modules/posixmodule.c: errors are unraisable. */
void
afk_run_child_hooks(PyObject *hooks)
{
    PyObject *copy = hooks ? PyList_GetSlice(hooks, 0, PyList_GET_SIZE(hooks)) : NULL;
    for (Py_ssize_t i = 0; copy != NULL && i < PyList_GET_SIZE(copy); i++) {
        PyObject *hook = PyList_GET_ITEM(copy, i);
        PyObject *r = PyObject_CallNoArgs(hook);
        if (r == NULL) {
            if (is_asyncio_in_subinterpreter(hook))
                PyErr_Clear();
            else
                PyErr_WriteUnraisable(hook);
        }
        Py_XDECREF(r);
    }
    Py_XDECREF(copy);
    if (PyErr_Occurred())
        PyErr_WriteUnraisable(NULL);
}

static PyObject *
module_if_imported(const char *name)
{
    PyObject *modules = PyImport_GetModuleDict(); /* borrowed */
    PyObject *module = modules ? PyMapping_GetItemString(modules, name) : NULL;
    if (module == NULL)
        PyErr_Clear();
    return module;
}

void
afk_clear_atexit(void)
{
    PyObject *atexit = module_if_imported("atexit");
    PyObject *r = atexit ? PyObject_CallMethod(atexit, "_clear", NULL) : NULL;
    if (atexit != NULL && r == NULL)
        PyErr_WriteUnraisable(atexit);
    Py_XDECREF(r);
    Py_XDECREF(atexit);
    /* weakref.finalize keeps a list of its own behind one atexit callback. */
    PyObject *boot = module_if_imported("anyfork._boot");
    /* Without it yet: a thread that does not exist here was importing the module. */
    PyObject *forget = NULL;
    if (boot != NULL && PyObject_GetOptionalAttrString(boot, "forget_finalizers", &forget) < 0)
        PyErr_WriteUnraisable(boot);
    r = forget ? PyObject_CallNoArgs(forget) : NULL;
    if (forget != NULL && r == NULL)
        PyErr_WriteUnraisable(boot);
    Py_XDECREF(r);
    Py_XDECREF(forget);
    Py_XDECREF(boot);
}

/* The signals for which signal.getsignal() names a callable: SIG_DFL and SIG_IGN
 * are ints, None is a C handler of the host. Returns how many. */
int
afk_python_handlers(sigset_t *ret)
{
    int n = 0;
    (void)sigemptyset(ret);
    PyObject *signal = module_if_imported("_signal");
    PyObject *getsignal = signal ? PyObject_GetAttrString(signal, "getsignal") : NULL;
    for (int sig = 1; getsignal != NULL && sig < NSIG; sig++) {
        PyObject *number = PyLong_FromLong(sig);
        PyObject *handler = number ? PyObject_CallOneArg(getsignal, number) : NULL;
        if (handler == NULL)
            PyErr_Clear(); /* a signal that libc keeps for itself */
        else if (PyCallable_Check(handler)) {
            (void)sigaddset(ret, sig);
            n++;
        }
        Py_XDECREF(handler);
        Py_XDECREF(number);
    }
    Py_XDECREF(getsignal);
    Py_XDECREF(signal);
    PyErr_Clear();
    return n;
}

/* Python's table of handlers, made to agree with the dispositions that the plan set. */
void
afk_settle_python_handlers(const struct afk_plan *plan)
{
    const struct afk_setup *setup = plan->setup;
    PyObject *signal = module_if_imported("_signal");
    for (int sig = 1; signal != NULL && sig < NSIG; sig++) {
        bool ignored = setup != NULL && sigismember(&setup->ignored, sig) == 1;
        bool by_default = sigismember(&plan->was_reset, sig) == 1 ||
                          (setup != NULL && sigismember(&setup->defaults, sig) == 1);
        if (!ignored && !by_default)
            continue;
        /* getsignal() is an int for SIG_DFL and SIG_IGN, and None for a C handler. */
        PyObject *handler = PyObject_CallMethod(signal, "getsignal", "i", sig);
        bool is_right = handler != NULL && PyLong_Check(handler) && PyLong_AsLong(handler) == ignored;
        PyObject *r = is_right ? Py_NewRef(Py_None) : NULL;
        if (handler != NULL && !is_right)
            r = PyObject_CallMethod(signal, "signal", "ii", sig, ignored); /* SIG_IGN, SIG_DFL */
        if (r == NULL)
            PyErr_WriteUnraisable(signal);
        Py_XDECREF(r);
        Py_XDECREF(handler);
    }
    Py_XDECREF(signal);
}

int
afk_fail_python(struct anyfork_error *reterr, int stage, int line, const char *what)
{
    PyObject *exc = PyErr_GetRaisedException();
    PyObject *text = exc ? PyObject_Str(exc) : NULL;
    const char *utf8 = text ? PyUnicode_AsUTF8(text) : NULL;
    char detail[sizeof reterr->detail];
    (void)PyOS_snprintf(detail, sizeof detail, "%s: %.50s: %.200s", what,
                        exc ? Py_TYPE(exc)->tp_name : "no exception", utf8 ? utf8 : "?");
    PyErr_Clear();
    Py_XDECREF(text);
    Py_XDECREF(exc);
    return afk_fail(reterr, ANYFORK_EUNAVAILABLE, stage, 0, line, detail);
}
