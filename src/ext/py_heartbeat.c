/* A worker's heartbeat: _anyfork.Heartbeat, as its owner has it, and what the worker calls. */
#include "ext.h"

#include <errno.h>

#include "core/heartbeat.h"

struct heartbeat_object {
    PyObject_HEAD
    struct afk_heartbeat heartbeat;
};

static PyObject *
raise_errno(int r)
{
    errno = -r;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* Seconds, of which 0 is allowed where `least` is. -1 with an exception set. */
static int64_t
interval_ns(double seconds, double least)
{
    if (seconds >= least && (seconds == 0 || (seconds >= 0.001 && seconds <= 3600)))
        return (int64_t)(seconds * 1e9);
    PyErr_SetString(PyExc_ValueError, "interval: from 0.001 to 3600 seconds");
    return -1;
}

static PyObject *
heartbeat_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"interval", NULL};
    double interval = 1.0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|d", names, &interval))
        return NULL;
    int64_t ns = interval_ns(interval, 0.001);
    if (ns < 0)
        return NULL;
    struct heartbeat_object *self = (struct heartbeat_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->heartbeat.fd = -1;
    int r = afk_heartbeat_new(&self->heartbeat, ns);
    if (r < 0) {
        Py_DECREF(self);
        return raise_errno(r);
    }
    return (PyObject *)self;
}

static void
heartbeat_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    afk_heartbeat_free(&((struct heartbeat_object *)op)->heartbeat);
    type->tp_free(op);
    Py_DECREF(type);
}

static int
heartbeat_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    return 0;
}

static PyObject *
heartbeat_fileno(PyObject *op, PyObject *Py_UNUSED(args))
{
    return PyLong_FromLong(((struct heartbeat_object *)op)->heartbeat.fd);
}

static PyObject *
heartbeat_read(PyObject *op, PyObject *Py_UNUSED(args))
{
    struct afk_reading reading;
    afk_heartbeat_read(&((struct heartbeat_object *)op)->heartbeat, &reading);
    return Py_BuildValue("KLKL", (unsigned long long)reading.alive,
                         (long long)reading.progressing, (unsigned long long)reading.cpu_ns,
                         (long long)reading.interval_ns);
}

static PyMethodDef heartbeat_methods[] = {
    {"fileno", heartbeat_fileno, METH_NOARGS, NULL},
    {"read", heartbeat_read, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot heartbeat_slots[] = {
    {Py_tp_new, heartbeat_new},
    {Py_tp_dealloc, heartbeat_dealloc},
    {Py_tp_traverse, heartbeat_traverse},
    {Py_tp_methods, heartbeat_methods},
    {0, NULL},
};
PyType_Spec ext_heartbeat_spec = {
    .name = "anyfork._anyfork.Heartbeat",
    .basicsize = sizeof(struct heartbeat_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = heartbeat_slots,
};

static int
parse_reading(PyObject *op, void *ret)
{
    struct afk_reading *reading = ret;
    unsigned long long alive, cpu_ns;
    long long progressing, ns;
    if (!PyTuple_Check(op)) {
        PyErr_SetString(PyExc_TypeError, "a reading is what Heartbeat.read() returned");
        return 0;
    }
    if (!PyArg_ParseTuple(op, "KLKL", &alive, &progressing, &cpu_ns, &ns))
        return 0;
    *reading = (struct afk_reading){
        .alive = alive, .progressing = progressing, .cpu_ns = cpu_ns, .interval_ns = ns};
    return 1;
}

/* heartbeat_verdict(before, after): its name. */
PyObject *
ext_heartbeat_verdict(PyObject *Py_UNUSED(module), PyObject *args)
{
    struct afk_reading before, after;
    if (!PyArg_ParseTuple(args, "O&O&", parse_reading, &before, parse_reading, &after))
        return NULL;
    return PyUnicode_FromString(afk_verdict_name((int)afk_heartbeat_verdict(&before, &after)));
}

/* ---- the worker -------------------------------------------------------------------- */

static int
answer(void *Py_UNUSED(arg))
{
    afk_heartbeat_answer();
    return 0;
}

/* On the thread that beats, which Python does not know. The main thread's evaluation loop
 * calls it back, as soon as it gets to that. */
static bool
ask_main_thread(void)
{
    return Py_AddPendingCall(answer, NULL) == 0;
}

/* heartbeat_begin(fd, interval): in the main thread; 0: as the owner asks. A thread that
 * runs a sub-interpreter is not asked: pending calls are main's. */
PyObject *
ext_heartbeat_begin(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd;
    double interval = 0;
    if (!PyArg_ParseTuple(args, "i|d", &fd, &interval))
        return NULL;
    int64_t ns = interval_ns(interval, 0);
    if (ns < 0)
        return NULL;
    bool in_main = PyInterpreterState_Get() == PyInterpreterState_Main();
    int r = afk_heartbeat_begin(fd, ns, in_main ? ask_main_thread : NULL);
    if (r == -EALREADY)
        return PyErr_Format(PyExc_RuntimeError, "this process has a heartbeat already");
    if (r == -EBADF)
        return PyErr_Format(PyExc_ValueError, "descriptor %d is no heartbeat of anyfork", fd);
    if (r < 0)
        return raise_errno(r);
    Py_RETURN_NONE;
}

/* Before the interpreter ends: the thread asks it no more. */
PyObject *
ext_heartbeat_end(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    Py_BEGIN_ALLOW_THREADS
    afk_heartbeat_end();
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
