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
#include <stdlib.h>
#include <string.h>
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
    if (boot != NULL && PyObject_HasAttrString(boot, "_needed")) /* its last line: whole */
        return boot;
    Py_XDECREF(boot);
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

/* The fork generation of the worker itself. */
static unsigned worker_generation;
static struct stat report_socket;

/* Nothing is said by a process that the target forked and that came back here:
 * the report belongs to the worker. */
static void
report(int fd, int kind, int stage, int value, const char *payload, size_t size)
{
    struct stat now;
    if (afk_generation() != worker_generation)
        return;
    /* The target may have closed all its descriptors, and opened others. */
    if (fstat(fd, &now) < 0 || now.st_ino != report_socket.st_ino ||
        now.st_dev != report_socket.st_dev)
        return;
    struct afk_report record = {.magic = AFK_REPORT_MAGIC,
                                .kind = (uint16_t)kind,
                                .stage = (uint16_t)stage,
                                .value = value,
                                .payload_bytes = size};
    /* A failure means that the owner has gone: the lifeline is on its way. */
    if (afk_report_write(fd, &record) == 0 && size > 0)
        (void)afk_os_write_all(fd, payload, size);
}

/* The Python exception that is set becomes an ERROR record with its traceback. */
static _Noreturn void
give_up(PyObject *boot, int fd, int stage)
{
    PyObject *exc = PyErr_GetRaisedException();
    PyObject *text = exc ? PyObject_CallMethod(boot, "describe", "O", exc) : NULL;
    char *data = "";
    Py_ssize_t size = 0;
    if (text == NULL || PyBytes_AsStringAndSize(text, &data, &size) < 0)
        PyErr_Clear();
    report(fd, AFK_REPORT_ERROR, stage, AFK_EXIT_PRELUDE, data, (size_t)size);
    report(fd, AFK_REPORT_EXIT, 0, AFK_EXIT_PRELUDE, NULL, 0);
    _exit(AFK_EXIT_PRELUDE);
}

static PyObject *
call_boot(PyObject *boot, int fd, int stage, PyObject *result)
{
    if (result == NULL)
        give_up(boot, fd, stage);
    return result;
}

/* What the caller left in this interpreter, and the hooks that were parked. */
static void
settle(PyObject *boot, const struct afk_job *job, struct afk_forking *f)
{
    int fd = f->plan.status_fd;

    Py_DECREF(call_boot(boot, fd, ANYFORK_STAGE_PRELUDE,
                        PyObject_CallMethod(boot, "repair_imports", "k", job->caller)));
    if (f->tm != NULL) { /* a twin */
        (void)PyThreadState_Swap(f->tm);
        if (f->parked)
            afk_run_child_hooks(f->main_hooks);
        afk_default_python_handlers(&f->plan.was_reset);
        (void)PyThreadState_Swap(f->ts);
        afk_clear_atexit(); /* before the hooks: they may register their own */
        if (f->parked)
            afk_run_child_hooks(f->caller_hooks);
    }
    else {
        afk_clear_atexit();
        if (f->parked)
            afk_run_child_hooks(f->main_hooks);
        afk_default_python_handlers(&f->plan.was_reset);
    }
    if (f->ts->interp != f->main)
        afk_forbid_os_fork();
    Py_DECREF(call_boot(boot, fd, ANYFORK_STAGE_PRELUDE,
                        PyObject_CallMethod(boot, "prelude", NULL)));
}

/* Returns the exit code; the outcome has been reported. */
static int
run_target(PyObject *boot, const struct afk_job *job, int fd)
{
    PyObject *done;

    if (job->kind == AFK_JOB_C) {
        int code = job->entry(job->arg);
        if (PyErr_Occurred())
            PyErr_WriteUnraisable(NULL);
        return code;
    }
    PyObject *call;
    if (job->kind == AFK_JOB_PICKLE) {
        PyObject *data = PyBytes_FromStringAndSize(job->pickle, (Py_ssize_t)job->pickle_size);
        call = data ? PyObject_CallMethod(boot, "load", "N", data) : NULL;
        (void)call_boot(boot, fd, ANYFORK_STAGE_UNPICKLE, call);
    }
    else {
        call = PyTuple_Pack(2, job->callable, job->args);
        (void)call_boot(boot, fd, ANYFORK_STAGE_PRELUDE, call);
    }
    report(fd, AFK_REPORT_READY, 0, 0, NULL, 0);

    int kind, code;
    Py_buffer payload;
    done = call_boot(boot, fd, ANYFORK_STAGE_PRELUDE, PyObject_CallMethod(boot, "run", "(N)", call));
    if (!PyArg_ParseTuple(done, "iiy*", &kind, &code, &payload))
        give_up(boot, fd, ANYFORK_STAGE_PRELUDE);
    if (kind != 0) {
        Py_BEGIN_ALLOW_THREADS /* large results: the worker's threads go on */
        report(fd, kind, 0, code, payload.buf, (size_t)payload.len);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&payload);
    Py_DECREF(done);
    return code;
}

_Noreturn void
afk_boot_run(PyObject *boot, const struct afk_job *job, struct afk_forking *f)
{
    int fd = f->plan.status_fd;

    worker_generation = afk_generation();
    if (fstat(fd, &report_socket) < 0)
        _exit(AFK_EXIT_PRELUDE);
    /* Not for the worker's own forked children. Out of memory: they keep them. */
    (void)afk_lifeline_register(fd, false);
    (void)afk_lifeline_register(f->plan.life_fd, false);
    settle(boot, job, f);
    if (job->kind == AFK_JOB_C)
        report(fd, AFK_REPORT_READY, 0, 0, NULL, 0);
    int code = run_target(boot, job, fd);
    /* Its non-daemon threads, its own atexit callbacks, its buffers. */
    PyObject *r = PyObject_CallMethod(boot, "finish", NULL);
    if (r == NULL)
        PyErr_WriteUnraisable(boot);
    (void)fflush(NULL);
    report(fd, AFK_REPORT_EXIT, 0, code, NULL, 0);
    _exit(code & 0xff);
}
