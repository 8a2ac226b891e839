/*
 * A worker's way from the repaired interpreter to its target and to _exit().
 *
 * Rules: the Python part (package anyfork, _boot.py) was imported before the
 * fork, where errors are cheap. Every way out writes a record first: nothing a
 * worker does ends without its owner knowing. Never Py_FinalizeEx(): abandoned
 * interpreters are still counted and debug builds assert.
 */
#include "cpython/cpython.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

static char *package_parent;

void
afk_boot_set_package_parent(const char *dir)
{
    if (package_parent == NULL)
        package_parent = strdup(dir);
}

PyObject *
afk_boot_prepare(struct anyfork_error *reterr)
{
    /* Almost always there already: PyImport_ImportModule() looks at much more. */
    PyObject *name = PyUnicode_FromString("anyfork._boot");
    PyObject *boot = name ? PyImport_GetModule(name) : NULL;
    Py_XDECREF(name);
    if (boot != NULL && PyObject_HasAttrString(boot, "_whole")) /* its last line */
        return boot;
    Py_XDECREF(boot);
    PyErr_Clear();
    if (PySys_SetObject("_anyfork_boots", Py_True) < 0) /* and needs no more, see __init__.py */
        PyErr_Clear();
    boot = PyImport_ImportModule("anyfork._boot");
    if (boot == NULL && PyErr_ExceptionMatches(PyExc_ModuleNotFoundError) &&
        package_parent != NULL) {
        /* The caller's interpreter has the package on a path of its own. */
        PyObject *exc = PyErr_GetRaisedException();
        PyObject *path = PySys_GetObject("path"); /* borrowed */
        PyObject *dir = PyUnicode_DecodeFSDefault(package_parent);
        Py_XINCREF(path);
        if (path != NULL && dir != NULL && PyList_Check(path) && PyList_Append(path, dir) == 0) {
            boot = PyImport_ImportModule("anyfork._boot");
            PyObject *saved = PyErr_GetRaisedException();
            PyObject *r = PyObject_CallMethod(path, "remove", "O", dir);
            Py_XDECREF(r);
            PyErr_SetRaisedException(saved);
        }
        Py_XDECREF(dir);
        Py_XDECREF(path);
        if (boot == NULL && !PyErr_Occurred())
            PyErr_SetRaisedException(exc);
        else
            Py_XDECREF(exc);
    }
    if (boot == NULL)
        (void)afk_fail_python(reterr, ANYFORK_STAGE_PRELUDE, __LINE__,
                              "cannot import anyfork in the worker's interpreter");
    return boot;
}

PyObject *
afk_boot_prepare_fork(struct anyfork_error *reterr)
{
    PyObject *boot = afk_boot_prepare(reterr);
    if (boot == NULL || PyObject_HasAttrString(boot, "_needed"))
        return boot;
    PyObject *r = PyObject_CallMethod(boot, "load_needed", NULL);
    if (r == NULL) {
        (void)afk_fail_python(reterr, ANYFORK_STAGE_PRELUDE, __LINE__,
                              "cannot load what workers need");
        Py_CLEAR(boot);
    }
    Py_XDECREF(r);
    return boot;
}

/* The Python exception that is set becomes a record, ERROR or RAISED, with its
 * traceback; `code`, the exit code, is returned. */
static int
report_exception(PyObject *boot, const struct afk_reporter *reporter, int kind, int stage, int code)
{
    PyObject *exc = PyErr_GetRaisedException();
    PyObject *text = exc ? PyObject_CallMethod(boot, "describe", "O", exc) : NULL;
    char *data = "";
    Py_ssize_t size = 0;
    if (text == NULL || PyBytes_AsStringAndSize(text, &data, &size) < 0)
        PyErr_Clear();
    afk_reporter_send(reporter, kind, stage, code, data, (size_t)size);
    Py_XDECREF(text);
    Py_XDECREF(exc);
    return code;
}

static int
report_failure(PyObject *boot, const struct afk_reporter *reporter, int stage)
{
    return report_exception(boot, reporter, AFK_REPORT_ERROR, stage, AFK_EXIT_PRELUDE);
}

static _Noreturn void
give_up(PyObject *boot, const struct afk_reporter *reporter)
{
    int code = report_failure(boot, reporter, ANYFORK_STAGE_PRELUDE);
    afk_reporter_send(reporter, AFK_REPORT_EXIT, 0, code, NULL, 0);
    _exit(code);
}

static void
call_prelude(PyObject *boot, const struct afk_reporter *reporter, PyObject *result)
{
    if (result == NULL)
        give_up(boot, reporter);
    Py_DECREF(result);
}

/* Which standard streams are not the owner's: bits 0 to 2. */
static int
redirected(const struct afk_setup *setup)
{
    int bits = 0;
    for (unsigned i = 0; i < setup->n_moves && setup->move[i].to <= 2; i++)
        bits |= 1 << setup->move[i].to;
    return bits;
}

static PyObject *
environment(const char *const *env)
{
    PyObject *list = PyList_New(0);
    for (unsigned i = 0; list != NULL && env[i] != NULL; i++) {
        PyObject *entry = PyBytes_FromString(env[i]);
        if (entry == NULL || PyList_Append(list, entry) < 0)
            Py_CLEAR(list);
        Py_XDECREF(entry);
    }
    return list;
}

/* A thread that collected when it vanished, in a finalizer that let the GIL go, say: nobody
 * would ever collect again. */
static void
forget_collection(const struct afk_forking *f, PyInterpreterState *interp)
{
    int *collecting = afk_interp_collecting(f->layout, interp);
    if (collecting != NULL)
        *collecting = 0;
}

/* What the caller left in this interpreter, and the hooks that were parked. */
static void
settle_memory(PyObject *boot, unsigned long caller, struct afk_forking *f,
              const struct afk_reporter *reporter)
{
    forget_collection(f, f->main);
    forget_collection(f, f->ts->interp);
    call_prelude(boot, reporter, PyObject_CallMethod(boot, "silence_loops", NULL));
    call_prelude(boot, reporter, PyObject_CallMethod(boot, "repair_imports", "k", caller));
    if (f->tm != NULL) { /* a twin */
        (void)PyThreadState_Swap(f->tm);
        if (f->parked)
            afk_run_child_hooks(f->main_hooks);
        afk_settle_python_handlers(&f->plan);
        (void)PyThreadState_Swap(f->ts);
        afk_clear_atexit(); /* before the hooks: they may register their own */
        if (f->parked)
            afk_run_child_hooks(f->caller_hooks);
    }
    else {
        afk_clear_atexit();
        if (f->parked)
            afk_run_child_hooks(f->main_hooks);
        afk_settle_python_handlers(&f->plan);
    }
    if (f->ts->interp != f->main)
        afk_forbid_os_fork();
}

static void
settle(PyObject *boot, const struct afk_job *job, struct afk_forking *f,
       const struct afk_reporter *reporter)
{
    const struct afk_setup *setup = f->plan.setup;
    settle_memory(boot, job->caller, f, reporter);
    call_prelude(boot, reporter, PyObject_CallMethod(boot, "prelude", "iN", redirected(setup),
                                                     PyBool_FromLong(setup->sigint !=
                                                                     ANYFORK_SIGINT_OWNER)));
    afk_child_apply(&f->plan); /* or it ends here, with a record */
    if (setup->env != NULL)
        call_prelude(boot, reporter, PyObject_CallMethod(boot, "set_environment", "N",
                                                         environment(setup->env)));
    call_prelude(boot, reporter, PyObject_CallMethod(boot, "reset_registered", NULL));
}

int
afk_boot_run_target(PyObject *boot, const struct afk_job *job, const struct afk_reporter *reporter)
{
    if (job->kind == AFK_JOB_C) {
        afk_reporter_send(reporter, AFK_REPORT_READY, 0, 0, NULL, 0);
        int code = job->entry(job->arg);
        if (PyErr_Occurred())
            PyErr_WriteUnraisable(NULL);
        return code;
    }
    PyObject *call;
    if (job->kind == AFK_JOB_PICKLE) {
        PyObject *data = PyBytes_FromStringAndSize(job->pickle, (Py_ssize_t)job->pickle_size);
        call = data ? PyObject_CallMethod(boot, "load", "N", data) : NULL;
        if (call == NULL)
            return report_failure(boot, reporter, ANYFORK_STAGE_UNPICKLE);
    }
    else {
        call = PyTuple_Pack(2, job->callable, job->args);
        if (call == NULL)
            return report_failure(boot, reporter, ANYFORK_STAGE_PRELUDE);
    }
    afk_reporter_send(reporter, AFK_REPORT_READY, 0, 0, NULL, 0);

    int kind, code;
    Py_buffer payload;
    PyObject *done = PyObject_CallMethod(boot, "run", "(N)", call);
    if (done == NULL || !PyArg_ParseTuple(done, "iiy*", &kind, &code, &payload)) {
        Py_XDECREF(done);
        /* A SIGINT just before the target, say. */
        return report_exception(boot, reporter, AFK_REPORT_RAISED, 0, 1);
    }
    if (kind != 0) {
        Py_BEGIN_ALLOW_THREADS /* large results: other threads go on */
        afk_reporter_send(reporter, kind, 0, code, payload.buf, (size_t)payload.len);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&payload);
    Py_DECREF(done);
    return code;
}

void
afk_boot_finish(PyObject *boot)
{
    /* A signal that came while nothing of Python ran must not take its place. */
    if (PyErr_CheckSignals() < 0)
        PyErr_WriteUnraisable(boot);
    PyObject *r = PyObject_CallMethod(boot, "finish", NULL);
    if (r == NULL && PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
        PyErr_WriteUnraisable(boot);
        r = PyObject_CallMethod(boot, "finish", NULL); /* what it had done is not done again */
    }
    if (r == NULL)
        PyErr_WriteUnraisable(boot);
    Py_XDECREF(r);
}

_Noreturn void
afk_boot_run_executed(int fd, const char *pickle, size_t size)
{
    const struct afk_job job = {.kind = AFK_JOB_PICKLE, .pickle = pickle, .pickle_size = size};
    struct afk_reporter reporter;
    struct anyfork_error error;
    int code = AFK_EXIT_PRELUDE;
    if (afk_reporter_init(&reporter, fd) < 0)
        _exit(code);
    (void)afk_lifeline_register(fd, false); /* not for the worker's own forked children, */
    (void)fcntl(fd, F_SETFD, FD_CLOEXEC);   /* nor for programs that it starts */
    PyObject *boot = afk_boot_prepare(&error);
    if (boot != NULL) {
        code = afk_boot_run_target(boot, &job, &reporter);
        afk_boot_finish(boot);
        (void)fflush(NULL);
    }
    else {
        afk_reporter_fail(&reporter, &error);
    }
    afk_reporter_send(&reporter, AFK_REPORT_EXIT, 0, code, NULL, 0);
    _exit(code & 0xff);
}

static void
own_descriptors(const struct afk_plan *plan)
{
    /* Not for the worker's own forked children. Out of memory: they keep them. */
    (void)afk_lifeline_register(plan->status_fd, false);
    if (plan->life_fd >= 0)
        (void)afk_lifeline_register(plan->life_fd, false);
}

/* Its non-daemon threads, its own atexit callbacks, its buffers; then itself. */
static _Noreturn void
end_worker(PyObject *boot, const struct afk_reporter *reporter, int code)
{
    afk_boot_finish(boot);
    (void)fflush(NULL);
    afk_reporter_send(reporter, AFK_REPORT_EXIT, 0, code, NULL, 0);
    _exit(code & 0xff);
}

_Noreturn void
afk_boot_run(PyObject *boot, const struct afk_job *job, struct afk_forking *f,
             bool in_subinterpreter)
{
    struct afk_reporter reporter;
    if (afk_reporter_init(&reporter, f->plan.status_fd) < 0)
        _exit(AFK_EXIT_PRELUDE);
    own_descriptors(&f->plan);
    afk_pad_revive();
    settle(boot, job, f, &reporter);
    int code = in_subinterpreter ? afk_subint_host(job, &reporter)
                                 : afk_boot_run_target(boot, job, &reporter);
    end_worker(boot, &reporter, code);
}

/* ---- a template's standby ------------------------------------------------------- */

static void
raise_own(struct afk_plan *plan, int *fd)
{
    int r = afk_os_raise(fd, plan->setup->lowest);
    if (r < 0)
        afk_child_give_up(plan, ANYFORK_STAGE_OPTION, -r, "fds");
}

/* Standard streams that are another file than the template's, bits 0 to 2, now that all
 * descriptors are in their places; and from bit 3 on those that are closed. */
static int
place_descriptors(struct afk_plan *plan, struct afk_start *start)
{
    struct stat before[3], after;
    int bits = 0;
    for (int i = 0; i < 3; i++)
        if (fstat(i, &before[i]) < 0)
            memset(&before[i], 0, sizeof before[i]);
    afk_child_place_fds(plan);
    for (unsigned i = 0; i < start->setup.n_moves; i++)
        afk_os_close(start->setup.move[i].from);
    for (int i = 0; i < 3; i++) {
        if (!start->has_stream[i]) {
            (void)close(i);
            bits |= 8 << i;
        }
        else if (fstat(i, &after) == 0 &&
                 (after.st_dev != before[i].st_dev || after.st_ino != before[i].st_ino)) {
            bits |= 1 << i;
        }
    }
    return bits;
}

static void
arm_as_asked(struct afk_plan *plan, const struct afk_start *start)
{
    if (start->setup.lifeline_signal == 0) {
        (void)afk_os_stop_async(plan->life_fd);
        afk_os_close(plan->life_fd);
        plan->life_fd = -1;
        return;
    }
    plan->guard_fd = start->guard_fd;
    plan->guard_token = start->guard_token;
    afk_child_arm_lifeline(plan);
    plan->guard_fd = -1;
}

static int door = -1;
static unsigned door_generation; /* a forked child has it no more */

int
afk_boot_door(void)
{
    return door_generation == afk_generation() ? door : -1;
}

/* A worker that may do less than its template must not ask it for workers; the template does
 * not take its word for it either. */
static void
keep_door(struct afk_plan *plan, int *fd)
{
    const struct afk_setup *setup = plan->setup;
    if (setup->user >= 0 || setup->group >= 0 || setup->n_groups >= 0 || setup->cgroup_procs >= 0 ||
        setup->session == ANYFORK_SESSION_NEW) {
        afk_os_close(*fd);
        *fd = -1;
    }
    if (*fd >= 0) {
        raise_own(plan, fd);
        (void)afk_lifeline_register(*fd, false); /* not for forked children of its own */
    }
    door = *fd;
    door_generation = afk_generation();
}

/* All that this start asked for. As afk_child_repair() and settle(), in their order. */
static void
begin_start(PyObject *boot, struct afk_plan *plan, struct afk_start *start, int *keep,
            struct afk_reporter *reporter)
{
    struct afk_setup *setup = &start->setup;
    plan->setup = setup;
    plan->keep++; /* not the first, with which the template was told */
    plan->n_keep--;
    if (setup->fd_policy == ANYFORK_FDS_TOMBSTONE)
        setup->fd_policy = ANYFORK_FDS_INHERIT; /* they have been, since it was forked */
    raise_own(plan, &plan->status_fd);
    raise_own(plan, &plan->life_fd);
    keep_door(plan, &keep[1]);
    if (afk_reporter_init(reporter, plan->status_fd) < 0)
        _exit(AFK_EXIT_PRELUDE);
    own_descriptors(plan);
    afk_child_join_session(plan);
    arm_as_asked(plan, start);
    if (start->cwd_fd >= 0 && fchdir(start->cwd_fd) < 0)
        afk_child_give_up(plan, ANYFORK_STAGE_OPTION, errno, "cwd");
    afk_os_close(start->cwd_fd);
    int streams = place_descriptors(plan, start);
    afk_child_set_signals(plan);
    if (sigprocmask(SIG_SETMASK, &setup->mask, NULL) < 0)
        afk_child_give_up(plan, ANYFORK_STAGE_CHILD, errno, "sigprocmask");
    afk_settle_python_handlers(plan);
    bool interruptible = setup->sigint != ANYFORK_SIGINT_OWNER;
    if (streams != 0 || interruptible)
        call_prelude(boot, reporter, PyObject_CallMethod(boot, "begin", "iN", streams,
                                                         PyBool_FromLong(interruptible)));
    afk_child_apply(plan);
    if (setup->name == NULL)
        afk_child_set_name("anyfork worker");
    if (setup->env != NULL)
        call_prelude(boot, reporter, PyObject_CallMethod(boot, "set_environment", "N",
                                                         environment(setup->env)));
}

/* All that can be done before the start is known. */
static void
rehearse(PyObject *boot, struct afk_forking *f, const struct afk_reporter *reporter)
{
    settle_memory(boot, PyThread_get_thread_ident(), f, reporter);
    call_prelude(boot, reporter, PyObject_CallMethod(boot, "prelude", "iO", 0, Py_False));
    call_prelude(boot, reporter, PyObject_CallMethod(boot, "reset_registered", NULL));
    call_prelude(boot, reporter, PyObject_CallMethod(boot, "rehearse", NULL));
}

_Noreturn void
afk_boot_run_standby(PyObject *boot, struct afk_forking *f, const struct afk_standby *standby,
                     int *keep)
{
    struct afk_reporter reporter;
    struct afk_start start;
    struct afk_job job = {.kind = AFK_JOB_PICKLE};
    int32_t me = (int32_t)getpid();
    int r;

    if (afk_reporter_init(&reporter, standby->report_fd) < 0)
        _exit(AFK_EXIT_PRELUDE);
    afk_pad_revive();
    afk_child_set_name("anyfork standby");
    rehearse(boot, f, &reporter);
    Py_BEGIN_ALLOW_THREADS /* a fork hook may have started threads */
    r = afk_start_receive(standby->report_fd, standby->owner, &start);
    Py_END_ALLOW_THREADS
    if (r == 0)
        _exit(0);
    if (r < 0) {
        struct anyfork_error error;
        (void)AFK_FAIL(&error, ANYFORK_ESYSTEM, ANYFORK_STAGE_TEMPLATE, -r,
                       r == -EPERM ? "it is asked by another user or process" : "its start");
        afk_reporter_fail(&reporter, &error);
        _exit(AFK_EXIT_PRELUDE);
    }
    /* The template makes another one, but not at once. */
    (void)!write(standby->taken_fd, &me, sizeof me);
    (void)close(standby->taken_fd);
    (void)prctl(PR_SET_DUMPABLE, standby->dumpable, 0, 0, 0);
    begin_start(boot, &f->plan, &start, keep, &reporter);
    if (!afk_start_is_confirmed(f->plan.status_fd))
        _exit(0);
    job.pickle = start.pickle;
    job.pickle_size = start.pickle_size;
    end_worker(boot, &reporter, afk_boot_run_target(boot, &job, &reporter));
}
