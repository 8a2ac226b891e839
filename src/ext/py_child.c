/* The heap type _anyfork.Child over a worker's handle. */
#include "ext.h"

#include <errno.h>
#include <math.h>

struct child_object {
    PyObject_HEAD
    struct anyfork_child *child; /* NULL once closed */
    bool closing;                /* by one call; others see the worker until it is done */
    const char *method;          /* static string of the table */
    struct afk_child_view last;  /* what was known when it was closed */
    PyObject *payload; /* bytes, of a closed handle; or NULL */
};

PyObject *
ext_child_wrap(PyTypeObject *type, struct anyfork_child *child, const char *method)
{
    struct child_object *self = (struct child_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        anyfork_child_close(child);
        return NULL;
    }
    self->child = child;
    self->method = method;
    return (PyObject *)self;
}

/* The handle, kept alive until afk_child_unref() whatever another thread closes
 * meanwhile; NULL once closed. */
static struct anyfork_child *
borrow(struct child_object *self)
{
    struct anyfork_child *child;
    Py_BEGIN_CRITICAL_SECTION(self);
    child = self->child;
    if (child != NULL)
        afk_child_ref(child);
    Py_END_CRITICAL_SECTION();
    return child;
}

static void
view(struct child_object *self, struct afk_child_view *ret)
{
    struct anyfork_child *child = borrow(self);
    if (child == NULL) {
        *ret = self->last;
        return;
    }
    afk_child_view(child, ret);
    afk_child_unref(child);
}

/* `keep` what has arrived of its result. */
static void
close_handle(struct child_object *self, bool keep)
{
    struct anyfork_child *child = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (self->child != NULL && !self->closing) {
        self->closing = true;
        child = self->child;
        afk_child_ref(child);
    }
    Py_END_CRITICAL_SECTION();
    if (child == NULL)
        return;
    Py_BEGIN_ALLOW_THREADS
    anyfork_child_close(child); /* kills and reaps what still runs */
    Py_END_ALLOW_THREADS
    Py_BEGIN_CRITICAL_SECTION(self);
    afk_child_view(child, &self->last);
    if (keep && self->last.outcome != 0) { /* a result is not lost with its handle */
        self->payload = PyBytes_FromStringAndSize(self->last.payload,
                                                  (Py_ssize_t)self->last.payload_size);
        if (self->payload == NULL)
            PyErr_Clear();
    }
    self->last.payload = NULL;
    self->last.outcome = self->payload != NULL ? self->last.outcome : 0;
    self->last.pidfd = self->last.status_fd = -1;
    self->child = NULL;
    Py_END_CRITICAL_SECTION();
    afk_child_unref(child);
}

static void
child_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    if (PyObject_CallFinalizerFromDealloc(op) < 0)
        return;
    PyObject_GC_UnTrack(op);
    PyObject *exc = PyErr_GetRaisedException();
    close_handle((struct child_object *)op, false);
    Py_XDECREF(((struct child_object *)op)->payload);
    PyErr_SetRaisedException(exc);
    type->tp_free(op);
    Py_DECREF(type);
}

static int
child_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    return 0;
}

static PyObject *
raise_closed(void)
{
    PyErr_SetString(PyExc_ValueError, "the handle of this worker is closed");
    return NULL;
}

static PyObject *
raise_code(struct child_object *self, int code, int stage, int errnum, const char *detail)
{
    struct anyfork_error error;
    (void)afk_fail(&error, code, stage, errnum, 0, detail);
    return ext_raise(&error, self->method);
}

static PyObject *
foreign(struct child_object *self)
{
    return raise_code(self, ANYFORK_EFOREIGN, ANYFORK_STAGE_WAIT, 0,
                      "this worker belongs to the process that this one was forked from");
}

/* seconds or None -> nanoseconds or -1. */
static int
timeout_ns(PyObject *timeout, int64_t *ret)
{
    *ret = -1;
    if (timeout == Py_None)
        return 0;
    double seconds = PyFloat_AsDouble(timeout);
    if (seconds == -1.0 && PyErr_Occurred())
        return -1;
    if (isnan(seconds)) {
        PyErr_SetString(PyExc_ValueError, "timeout: not a number");
        return -1;
    }
    if (seconds < 0)
        seconds = 0;
    if (seconds < 9e9)
        *ret = (int64_t)(seconds * 1e9);
    return 0;
}

/* _wait(until_ended: bool, timeout) -> bool: false if the time has passed. */
static PyObject *
child_wait(PyObject *op, PyObject *args)
{
    struct child_object *self = (struct child_object *)op;
    int ended, r;
    PyObject *timeout;
    int64_t ns;

    if (!PyArg_ParseTuple(args, "pO", &ended, &timeout) || timeout_ns(timeout, &ns) < 0)
        return NULL;
    struct anyfork_child *child = borrow(self);
    if (child == NULL) {
        if (self->last.ended)
            Py_RETURN_TRUE;
        return raise_closed();
    }
    enum afk_until until = ended ? AFK_UNTIL_ENDED : AFK_UNTIL_READY;
    int64_t deadline = ns < 0 ? -1 : afk_os_now_ns() + ns;
    for (;;) {
        if (deadline >= 0) {
            ns = deadline - afk_os_now_ns();
            if (ns < 0)
                ns = 0;
        }
        /* A mere look keeps the GIL: beside busy threads it would be long in
         * coming back. */
        PyThreadState *ts = ns == 0 ? NULL : PyEval_SaveThread();
        r = afk_child_wait_step(child, until, ns);
        if (ts != NULL)
            PyEval_RestoreThread(ts);
        if (r != -EINTR)
            break;
        if (PyErr_CheckSignals() < 0) {
            afk_child_unref(child);
            return NULL;
        }
    }
    afk_child_unref(child);
    if (r == ANYFORK_EFOREIGN)
        return foreign(self);
    return PyBool_FromLong(r == 0);
}

static PyObject *
child_poll(PyObject *op, PyObject *Py_UNUSED(args))
{
    struct child_object *self = (struct child_object *)op;
    struct anyfork_child *child = borrow(self);
    if (child == NULL)
        return PyBool_FromLong(self->last.ended);
    int r = afk_child_poll(child);
    afk_child_unref(child);
    if (r == ANYFORK_EFOREIGN)
        return foreign(self);
    return PyBool_FromLong(r == 1);
}

/* What came of a call that acts on the worker: None, or its exception. `stage`: that of a
 * system call that failed. */
static PyObject *
done(struct child_object *self, struct anyfork_child *child, int r, int stage,
     const char *why_no_thread)
{
    int errnum = errno;
    afk_child_unref(child);
    if (r == ANYFORK_EFOREIGN)
        return foreign(self);
    if (r == ANYFORK_EUNAVAILABLE)
        return raise_code(self, r, ANYFORK_STAGE_SIGNAL, 0, why_no_thread);
    if (r < 0)
        return raise_code(self, ANYFORK_ESYSTEM, stage, errnum, NULL);
    Py_RETURN_NONE;
}

static PyObject *
child_signal(PyObject *op, PyObject *arg)
{
    struct child_object *self = (struct child_object *)op;
    int sig = PyLong_AsInt(arg);
    if (sig == -1 && PyErr_Occurred())
        return NULL;
    if (sig < 0 || sig >= NSIG)
        return PyErr_Format(PyExc_ValueError, "signal: %d is not a signal number", sig);
    struct anyfork_child *child = borrow(self);
    if (child == NULL) {
        if (self->last.ended)
            Py_RETURN_NONE;
        return raise_closed();
    }
    int r = anyfork_child_signal(child, sig);
    return done(self, child, r, ANYFORK_STAGE_SIGNAL,
                "it is a thread of this process, which cannot be signalled: use a method that is a "
                "process, 'fork' say");
}

/* _take_stdio(which) -> fd, the caller's from now on, or -1. */
static PyObject *
child_take_stdio(PyObject *op, PyObject *arg)
{
    int which = PyLong_AsInt(arg);
    if (which == -1 && PyErr_Occurred())
        return NULL;
    struct anyfork_child *child = borrow((struct child_object *)op);
    int fd = child != NULL ? anyfork_child_take_stdio(child, which) : -1;
    if (child != NULL)
        afk_child_unref(child);
    return PyLong_FromLong(fd);
}

static PyObject *
child_detach(PyObject *op, PyObject *Py_UNUSED(args))
{
    struct child_object *self = (struct child_object *)op;
    struct anyfork_child *child = borrow(self);
    if (child == NULL)
        return raise_closed();
    int r, errnum;
    Py_BEGIN_ALLOW_THREADS /* it waits for the worker's first steps */
    r = anyfork_child_detach(child);
    errnum = errno;
    Py_END_ALLOW_THREADS
    errno = errnum;
    return done(self, child, r, ANYFORK_STAGE_LIFELINE,
                "it is a thread of this process, and ends with it");
}

static PyObject *
child_close(PyObject *op, PyObject *Py_UNUSED(args))
{
    close_handle((struct child_object *)op, true);
    Py_RETURN_NONE;
}

/* _outcome() -> (kind, payload or None): what the worker sent. */
static PyObject *
child_outcome(PyObject *op, PyObject *Py_UNUSED(args))
{
    struct afk_child_view v;
    PyObject *pair;
    struct anyfork_child *child = borrow((struct child_object *)op);
    if (child == NULL) {
        struct child_object *self = (struct child_object *)op;
        PyObject *payload = self->payload; /* set once, before child is NULL */
        return Py_BuildValue("iO", self->last.outcome, payload != NULL ? payload : Py_None);
    }
    afk_child_view(child, &v);
    if (v.outcome == 0)
        pair = Py_BuildValue("iO", 0, Py_None);
    else
        pair = Py_BuildValue("iy#", v.outcome, v.payload ? v.payload : "",
                             (Py_ssize_t)v.payload_size);
    afk_child_unref(child);
    return pair;
}

/* _error() -> (stage, errno, detail), or None if the worker reported none. */
static PyObject *
child_error(PyObject *op, PyObject *Py_UNUSED(args))
{
    struct afk_child_view v;
    view((struct child_object *)op, &v);
    if (v.error.kind == 0)
        Py_RETURN_NONE;
    return Py_BuildValue("siN", anyfork_stage_name(v.error.stage), v.error.sys_errno,
                         ext_text(v.error.detail));
}

static PyObject *
get_status(PyObject *op, void *Py_UNUSED(closure))
{
    struct afk_child_view v;
    view((struct child_object *)op, &v);
    if (!v.ended || v.status_from == AFK_STATUS_LOST)
        Py_RETURN_NONE;
    return PyLong_FromLong(v.status);
}

static PyObject *
get_status_from(PyObject *op, void *Py_UNUSED(closure))
{
    static const char *const names[] = {"running", "report", "wait", "pidfd", "lost"};
    struct afk_child_view v;
    view((struct child_object *)op, &v);
    return PyUnicode_FromString(names[v.status_from]);
}

#define GETTER(name, expression)                                        \
    static PyObject *get_##name(PyObject *op, void *Py_UNUSED(closure)) \
    {                                                                   \
        struct child_object *self = (struct child_object *)op;          \
        struct afk_child_view v;                                        \
        view(self, &v);                                                 \
        return expression;                                              \
    }
GETTER(pid, v.pid == 0 ? Py_NewRef(Py_None) : PyLong_FromLong(v.pid))
GETTER(pidfd, v.pid == 0 ? Py_NewRef(Py_None) : PyLong_FromLong(v.pidfd))
GETTER(report_fd, PyLong_FromLong(v.status_fd))
GETTER(is_ready, PyBool_FromLong(v.ready))
GETTER(has_ended, PyBool_FromLong(v.ended))
GETTER(is_foreign, PyBool_FromLong(v.foreign))
GETTER(read_errno, PyLong_FromLong(v.read_errno))
GETTER(is_closed, PyBool_FromLong(self->child == NULL))
GETTER(method, PyUnicode_FromString(self->method))

static PyMethodDef child_methods[] = {
    {"_wait", child_wait, METH_VARARGS, NULL},
    {"_poll", child_poll, METH_NOARGS, NULL},
    {"_outcome", child_outcome, METH_NOARGS, NULL},
    {"_error", child_error, METH_NOARGS, NULL},
    {"_take_stdio", child_take_stdio, METH_O, NULL},
    {"detach", child_detach, METH_NOARGS,
     "Let the worker outlive its owner and its handle, which then neither kills nor waits."},
    {"signal", child_signal, METH_O, "Send a signal; by pidfd, so never to another process."},
    {"close", child_close, METH_NOARGS, "Kill the worker if it runs, unless it is detached; reap it, close its fds."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef child_getset[] = {
    {"pid", get_pid, NULL, "Process id; None for a thread of this process.", NULL},
    {"pidfd", get_pidfd, NULL, "Readable once the process has ended, which may be waiting for its result to be read: see wake_fd. -1 after close(); None for a thread of this process.", NULL},
    {"report_fd", get_report_fd, NULL, "Readable when the worker has reported; -1 when it has no more. Read what is there, by is_alive() say, before the worker can end: it waits for that if there is much.", NULL},
    {"method", get_method, NULL, "Name of the spawn method.", NULL},
    {"_ready", get_is_ready, NULL, NULL, NULL},
    {"_ended", get_has_ended, NULL, NULL, NULL},
    {"_foreign", get_is_foreign, NULL, NULL, NULL},
    {"_closed", get_is_closed, NULL, NULL, NULL},
    {"_read_errno", get_read_errno, NULL, NULL, NULL},
    {"_status", get_status, NULL, NULL, NULL},
    {"_status_from", get_status_from, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot child_slots[] = {
    {Py_tp_dealloc, child_dealloc},
    {Py_tp_traverse, child_traverse},
    {Py_tp_methods, child_methods},
    {Py_tp_getset, child_getset},
    {Py_tp_doc, "A worker process, by its handle. Made by anyfork.spawn()."},
    {0, NULL},
};
PyType_Spec ext_child_spec = {
    .name = "anyfork._anyfork.Child",
    .basicsize = sizeof(struct child_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC |
             Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = child_slots,
};
