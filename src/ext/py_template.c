/* The heap type _anyfork.Template over a template, as its owner holds it. */
#include "ext.h"

#include <errno.h>

struct template_object {
    PyObject_HEAD
    struct afk_template *template;
    int server_end; /* until it is taken */
    unsigned generation; /* a forked child has closed it already */
};

static PyObject *
template_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    struct anyfork_error error;
    int siblings;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "p", &siblings))
        return NULL;
    struct template_object *self = (struct template_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->server_end = -1;
    self->generation = afk_generation();
    if (afk_template_new(&self->template, siblings != 0, &self->server_end, &error) < 0) {
        self->template = NULL;
        Py_DECREF(self);
        return ext_raise(&error, "zygote");
    }
    return (PyObject *)self;
}

static void
drop_server_end(struct template_object *self)
{
    if (self->generation == afk_generation())
        afk_lifeline_close(&self->server_end);
    self->server_end = -1;
}

static void
template_dealloc(PyObject *op)
{
    struct template_object *self = (struct template_object *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->template != NULL)
        afk_template_free(self->template);
    drop_server_end(self);
    type->tp_free(op);
    Py_DECREF(type);
}

static int
template_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    return 0;
}

struct afk_template *
ext_template_of(PyObject *op)
{
    return ((struct template_object *)op)->template;
}

static PyObject *
template_fileno(PyObject *op, PyObject *Py_UNUSED(args))
{
    return PyLong_FromLong(afk_template_fd(ext_template_of(op)));
}

static PyObject *
template_server_end(PyObject *op, PyObject *Py_UNUSED(args))
{
    return PyLong_FromLong(((struct template_object *)op)->server_end);
}

static PyObject *
template_drop_server_end(PyObject *op, PyObject *Py_UNUSED(args))
{
    drop_server_end((struct template_object *)op);
    Py_RETURN_NONE;
}

/* attach(): asks the template that has made this process. False: it is not shared, or full. */
static PyObject *
template_attach(PyObject *op, PyObject *Py_UNUSED(args))
{
    struct template_object *self = (struct template_object *)op;
    int door = afk_boot_door();
    afk_template_set_attached(self->template);
    return PyBool_FromLong(door >= 0 && afk_template_attach(door, self->server_end) == 0);
}

static PyObject *
template_hello(PyObject *op, PyObject *Py_UNUSED(args))
{
    int r = afk_template_hello(ext_template_of(op));
    if (r >= 0)
        return PyBool_FromLong(r);
    struct anyfork_error error;
    (void)AFK_FAIL(&error, ANYFORK_ESYSTEM, ANYFORK_STAGE_TEMPLATE, r == -EPIPE ? 0 : -r,
                   r == -EPERM    ? "this process changed its user or group meanwhile"
                   : r == -EPROTO ? "it is of another version of anyfork"
                                : "it ended before it was ready");
    return ext_raise(&error, "zygote");
}

static PyObject *
template_capabilities(PyObject *op, PyObject *Py_UNUSED(args))
{
    uint64_t sets[3];
    afk_template_capabilities(ext_template_of(op), sets);
    return Py_BuildValue("KKK", (unsigned long long)sets[0], (unsigned long long)sets[1],
                         (unsigned long long)sets[2]);
}

static PyObject *
template_counts(PyObject *op, PyObject *Py_UNUSED(args))
{
    struct afk_template_counts counts;
    afk_template_counts(ext_template_of(op), &counts);
    return Py_BuildValue("KK", (unsigned long long)counts.starts, (unsigned long long)counts.misses);
}

static PyObject *
template_calls(PyObject *op, PyObject *Py_UNUSED(args))
{
    int64_t took[AFK_CALLS_KEPT];
    unsigned n = afk_template_calls(ext_template_of(op), took);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (unsigned i = 0; list != NULL && i < n; i++) {
        PyObject *one = PyLong_FromLongLong(took[i]);
        if (one != NULL)
            PyList_SET_ITEM(list, (Py_ssize_t)i, one);
        else
            Py_CLEAR(list);
    }
    return list;
}

/* The handles of those that were started, None for the others. */
static PyObject *
wrap_all(PyTypeObject *type, struct afk_template_job *jobs, Py_ssize_t n)
{
    PyObject *list = PyList_New(n);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *one = Py_NewRef(Py_None);
        if (jobs[i].started) {
            Py_DECREF(one);
            one = list != NULL ? ext_child_wrap(type, jobs[i].child, "zygote") : NULL;
            if (list == NULL)
                anyfork_child_close(jobs[i].child);
        }
        if (one == NULL)
            Py_CLEAR(list);
        else if (list != NULL)
            PyList_SET_ITEM(list, i, one);
    }
    return list;
}

static bool
take_pickles(PyObject *pickles, struct afk_template_job *jobs)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(pickles); i++) {
        PyObject *pickle = PyList_GET_ITEM(pickles, i);
        if (!PyBytes_Check(pickle)) {
            PyErr_SetString(PyExc_TypeError, "pickles: a list of bytes is wanted");
            return false;
        }
        jobs[i] = (struct afk_template_job){.pickle = PyBytes_AS_STRING(pickle),
                                            .size = (size_t)PyBytes_GET_SIZE(pickle)};
    }
    return true;
}

static PyObject *
start_all(struct afk_template *t, PyTypeObject *type, const struct anyfork_options *options,
          struct afk_template_job *jobs, Py_ssize_t n)
{
    struct anyfork_error error;
    int r = afk_start_many(t, options, jobs, (unsigned)n, &error);
    PyObject *children = wrap_all(type, jobs, n);
    if (children == NULL)
        return NULL;
    if (r == AFK_STALE)
        return Py_BuildValue("NN", children, ext_text(error.detail));
    if (r == 0)
        return Py_BuildValue("NO", children, Py_None);
    PyObject *raised = ext_raise(&error, "zygote");
    Py_DECREF(children); /* which ends those that were started */
    return raised;
}

PyObject *
ext_template_start_many(PyObject *template, PyTypeObject *type, PyObject *pickles,
                        const struct anyfork_options *options)
{
    Py_ssize_t n = PyList_GET_SIZE(pickles);
    struct afk_template_job *jobs = PyMem_Calloc((size_t)n + 1, sizeof *jobs);
    if (jobs == NULL)
        return PyErr_NoMemory();
    PyObject *result = NULL;
    if (take_pickles(pickles, jobs))
        result = start_all(ext_template_of(template), type, options, jobs, n);
    PyMem_Free(jobs);
    return result;
}

static PyObject *
template_close(PyObject *op, PyObject *Py_UNUSED(args))
{
    afk_template_close(ext_template_of(op));
    Py_RETURN_NONE;
}

static PyObject *
template_shutdown(PyObject *op, PyObject *Py_UNUSED(args))
{
    afk_template_shutdown(ext_template_of(op));
    Py_RETURN_NONE;
}

static PyMethodDef template_methods[] = {
    {"close", template_close, METH_NOARGS, NULL},
    {"shutdown", template_shutdown, METH_NOARGS, NULL},
    {"fileno", template_fileno, METH_NOARGS, NULL},
    {"server_end", template_server_end, METH_NOARGS, NULL},
    {"drop_server_end", template_drop_server_end, METH_NOARGS, NULL},
    {"attach", template_attach, METH_NOARGS, NULL},
    {"hello", template_hello, METH_NOARGS, NULL},
    {"capabilities", template_capabilities, METH_NOARGS, NULL},
    {"calls", template_calls, METH_NOARGS, NULL},
    {"counts", template_counts, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot template_slots[] = {
    {Py_tp_new, template_new},
    {Py_tp_dealloc, template_dealloc},
    {Py_tp_traverse, template_traverse},
    {Py_tp_methods, template_methods},
    {Py_tp_doc, "The owner's end of a template."},
    {0, NULL},
};
PyType_Spec ext_template_spec = {
    .name = "anyfork._anyfork.Template",
    .basicsize = sizeof(struct template_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = template_slots,
};
