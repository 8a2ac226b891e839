/* The heap type _anyfork.Supervisor over the table of core/supervise.c. Each call that may
 * change something returns what is to be done and told, as a list of (kind, id, value, ns). */
#include "ext.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core/supervise.h"

struct supervisor_object {
    PyObject_HEAD
    struct afk_supervisor *supervisor;
    PyMutex lock;
};

static struct afk_supervisor *
of(PyObject *op)
{
    return ((struct supervisor_object *)op)->supervisor;
}

/* ---- specs ---------------------------------------------------------------------------- */

static bool
take_child(PyObject *row, struct afk_sv_child *ret)
{
    unsigned int id;
    long long ready, grace, backoff, backoff_max, healthy, look, limit[AFK_VERDICT_COUNT];
    int reports;
    if (!PyTuple_Check(row)) {
        PyErr_SetString(PyExc_TypeError, "a child is a tuple");
        return false;
    }
    if (!PyArg_ParseTuple(row, "IiipLLLLLL(LLLL)", &id, &ret->restart, &ret->stop_signal, &reports,
                          &ready, &grace, &backoff, &backoff_max, &healthy, &look, &limit[0],
                          &limit[1], &limit[2], &limit[3]))
        return false;
    ret->id = id;
    ret->reports_ready = reports != 0;
    ret->ready_ns = ready;
    ret->grace_ns = grace;
    ret->backoff_ns = backoff;
    ret->backoff_max_ns = backoff_max;
    ret->healthy_ns = healthy;
    ret->look_ns = look;
    for (int i = 0; i < AFK_VERDICT_COUNT; i++)
        ret->limit_ns[i] = limit[i];
    return true;
}

/* The caller frees its children with PyMem_Free(). */
static bool
take_spec(PyObject *args, struct afk_sv_spec *spec, PyObject **ret_again)
{
    PyObject *rows, *again = NULL;
    long long intensity, period;
    if (!PyArg_ParseTuple(args, "iLLO!|O!", &spec->strategy, &intensity, &period, &PyList_Type,
                          &rows, &PyList_Type, &again))
        return false;
    spec->intensity = intensity < 0 ? AFK_SV_UNLIMITED
                      : intensity > AFK_SV_INTENSITY_MAX ? AFK_SV_INTENSITY_MAX + 1
                                                         : (uint32_t)intensity;
    spec->period_ns = period;
    spec->n_children = (size_t)PyList_GET_SIZE(rows);
    struct afk_sv_child *children = PyMem_Calloc(spec->n_children + 1, sizeof *children);
    if (children == NULL) {
        (void)PyErr_NoMemory();
        return false;
    }
    bool ok = true;
    for (size_t i = 0; ok && i < spec->n_children; i++)
        ok = take_child(PyList_GET_ITEM(rows, (Py_ssize_t)i), &children[i]);
    spec->children = children;
    const char *wrong = ok ? afk_sv_check(spec) : NULL;
    if (wrong != NULL) {
        PyErr_SetString(PyExc_ValueError, wrong);
        ok = false;
    }
    if (!ok)
        PyMem_Free(children);
    if (ret_again != NULL)
        *ret_again = again;
    return ok;
}

static PyObject *
supervisor_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    struct afk_sv_spec spec;
    (void)kwargs;
    if (!take_spec(args, &spec, NULL))
        return NULL;
    struct supervisor_object *self = (struct supervisor_object *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->supervisor = afk_sv_new(&spec);
        if (self->supervisor == NULL) {
            (void)PyErr_NoMemory();
            Py_CLEAR(self);
        }
    }
    PyMem_Free((void *)spec.children);
    return (PyObject *)self;
}

static void
supervisor_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    afk_sv_free(of(op));
    type->tp_free(op);
    Py_DECREF(type);
}

static int
supervisor_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    return 0;
}

/* ---- calls ------------------------------------------------------------------------------ */

static void
lock(PyObject *op)
{
    PyMutex_Lock(&((struct supervisor_object *)op)->lock);
}

static void
unlock(PyObject *op)
{
    PyMutex_Unlock(&((struct supervisor_object *)op)->lock);
}

/* What the call has put out, in the caller's memory: no Python object is made, for which
 * the collector might run, while the lock is held. NULL, and not 0: no memory. */
static struct afk_sv_out *
take_queue(struct afk_supervisor *s, size_t *ret_n)
{
    size_t n = 0, room = 0;
    struct afk_sv_out out, *all = NULL;
    while (afk_sv_next(s, &out)) {
        if (n == room) {
            room = room == 0 ? 16 : 2 * room;
            struct afk_sv_out *larger = realloc(all, room * sizeof *larger);
            if (larger == NULL) {
                free(all);
                *ret_n = 1;
                return NULL;
            }
            all = larger;
        }
        all[n++] = out;
    }
    *ret_n = n;
    return all;
}

static PyObject *
raise_for(int r)
{
    if (r == -ESRCH)
        return PyErr_Format(PyExc_KeyError, "no such child");
    errno = -r;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* Unlocks. `r`: what the call has returned. */
static PyObject *
take_all(PyObject *op, int r)
{
    size_t n = 0;
    struct afk_sv_out *all = take_queue(of(op), &n);
    unlock(op);
    if (r < 0) {
        free(all);
        return raise_for(r);
    }
    if (all == NULL && n > 0)
        return PyErr_NoMemory();
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list != NULL && i < n; i++) {
        PyObject *row = Py_BuildValue("sIiL", afk_sv_kind_name(all[i].kind), all[i].id,
                                      all[i].value, (long long)all[i].ns);
        if (row != NULL)
            PyList_SET_ITEM(list, (Py_ssize_t)i, row);
        else
            Py_CLEAR(list);
    }
    free(all);
    return list;
}

static PyObject *
supervisor_start(PyObject *op, PyObject *args)
{
    long long now;
    if (!PyArg_ParseTuple(args, "L", &now))
        return NULL;
    lock(op);
    afk_sv_start(of(op), now);
    return take_all(op, 0);
}

static PyObject *
supervisor_event(PyObject *op, PyObject *args)
{
    static const char *const names[] = {"started", "failed", "ready", "exited", "died"};
    unsigned int id;
    const char *name;
    long long now;
    int event = 0;
    if (!PyArg_ParseTuple(args, "IsL", &id, &name, &now))
        return NULL;
    while (event <= AFK_SV_DIED && strcmp(names[event], name) != 0)
        event++;
    lock(op);
    return take_all(op, afk_sv_event(of(op), id, event, now));
}

static PyObject *
supervisor_beat(PyObject *op, PyObject *args)
{
    unsigned int id;
    unsigned long long alive, cpu_ns;
    long long progressing, interval_ns, now;
    if (!PyArg_ParseTuple(args, "I(KLKL)L", &id, &alive, &progressing, &cpu_ns, &interval_ns,
                          &now))
        return NULL;
    struct afk_reading reading = {.alive = alive,
                                  .progressing = progressing,
                                  .cpu_ns = cpu_ns,
                                  .interval_ns = interval_ns};
    lock(op);
    return take_all(op, afk_sv_beat(of(op), id, &reading, now));
}

static PyObject *
supervisor_tick(PyObject *op, PyObject *args)
{
    long long now;
    if (!PyArg_ParseTuple(args, "L", &now))
        return NULL;
    lock(op);
    afk_sv_tick(of(op), now);
    return take_all(op, 0);
}

static PyObject *
supervisor_restart(PyObject *op, PyObject *args)
{
    unsigned int id;
    long long now;
    if (!PyArg_ParseTuple(args, "IL", &id, &now))
        return NULL;
    lock(op);
    return take_all(op, afk_sv_restart(of(op), id, now));
}

static PyObject *
supervisor_stop(PyObject *op, PyObject *args)
{
    long long most, now;
    if (!PyArg_ParseTuple(args, "LL", &most, &now))
        return NULL;
    lock(op);
    afk_sv_stop(of(op), most < 0 ? AFK_SV_FOREVER : most, now);
    return take_all(op, 0);
}

static PyObject *
supervisor_kill(PyObject *op, PyObject *args)
{
    long long now;
    if (!PyArg_ParseTuple(args, "L", &now))
        return NULL;
    lock(op);
    afk_sv_kill(of(op), now);
    return take_all(op, 0);
}

static bool *
take_again(PyObject *list, size_t n)
{
    bool *again = PyMem_Calloc(n + 1, sizeof *again);
    if (again == NULL)
        (void)PyErr_NoMemory();
    for (size_t i = 0; again != NULL && i < n; i++)
        again[i] = list != NULL && (Py_ssize_t)i < PyList_GET_SIZE(list) &&
                   PyList_GET_ITEM(list, (Py_ssize_t)i) == Py_True;
    return again;
}

/* reload(now, (strategy, intensity, period, children, [whether each is started again])) */
static PyObject *
supervisor_reload(PyObject *op, PyObject *args)
{
    struct afk_sv_spec spec;
    PyObject *tuple, *list = NULL;
    long long now;
    if (!PyArg_ParseTuple(args, "LO!", &now, &PyTuple_Type, &tuple) ||
        !take_spec(tuple, &spec, &list))
        return NULL;
    PyObject *result = NULL;
    bool *again = take_again(list, spec.n_children);
    if (again != NULL) {
        lock(op);
        result = take_all(op, afk_sv_reload(of(op), &spec, again, now));
    }
    PyMem_Free(again);
    PyMem_Free((void *)spec.children);
    return result;
}

/* ---- looks -------------------------------------------------------------------------------- */

static PyObject *
supervisor_deadline(PyObject *op, PyObject *Py_UNUSED(args))
{
    lock(op);
    int64_t next = afk_sv_next_deadline(of(op));
    unlock(op);
    if (next == AFK_SV_FOREVER)
        Py_RETURN_NONE;
    return PyLong_FromLongLong(next);
}

static bool
look(PyObject *op, size_t index, struct afk_sv_view *ret)
{
    lock(op);
    bool found = afk_sv_view(of(op), index, ret);
    unlock(op);
    return found;
}

/* (id, state, verdict or None, failures in a row) of each child, in their order. */
static PyObject *
supervisor_children(PyObject *op, PyObject *Py_UNUSED(args))
{
    struct afk_sv_view view;
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && look(op, i, &view); i++) {
        PyObject *row = Py_BuildValue("IszI", view.id, afk_sv_state_name(view.state),
                                      view.verdict < 0 ? NULL : afk_verdict_name(view.verdict),
                                      view.failures);
        if (row == NULL || PyList_Append(list, row) < 0)
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

static PyObject *
supervisor_finished(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(afk_sv_is_finished(of(op)));
}

static PyObject *
supervisor_reloading(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(afk_sv_is_reloading(of(op)));
}

static PyObject *
supervisor_culprit(PyObject *op, void *Py_UNUSED(closure))
{
    uint32_t id;
    if (!afk_sv_gave_up(of(op), &id))
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLong(id);
}

static PyMethodDef supervisor_methods[] = {
    {"start", supervisor_start, METH_VARARGS, NULL},
    {"event", supervisor_event, METH_VARARGS, NULL},
    {"beat", supervisor_beat, METH_VARARGS, NULL},
    {"tick", supervisor_tick, METH_VARARGS, NULL},
    {"restart", supervisor_restart, METH_VARARGS, NULL},
    {"stop", supervisor_stop, METH_VARARGS, NULL},
    {"kill", supervisor_kill, METH_VARARGS, NULL},
    {"reload", supervisor_reload, METH_VARARGS, NULL},
    {"deadline", supervisor_deadline, METH_NOARGS, NULL},
    {"children", supervisor_children, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef supervisor_members[] = {
    {"finished", supervisor_finished, NULL, NULL, NULL},
    {"reloading", supervisor_reloading, NULL, NULL, NULL},
    {"culprit", supervisor_culprit, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot supervisor_slots[] = {
    {Py_tp_new, supervisor_new},
    {Py_tp_dealloc, supervisor_dealloc},
    {Py_tp_traverse, supervisor_traverse},
    {Py_tp_methods, supervisor_methods},
    {Py_tp_getset, supervisor_members},
    {0, NULL},
};
PyType_Spec ext_supervisor_spec = {
    .name = "anyfork._anyfork.Supervisor",
    .basicsize = sizeof(struct supervisor_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = supervisor_slots,
};
