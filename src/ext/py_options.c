/*
 * The options of a start, from the dict that _options.py makes to the struct of the
 * public API. The dict has plain values only: str and paths are bytes by then.
 */
#include "ext.h"

#include <string.h>

/* Memory that lives until the start returns; freed by ext_options_release(). */
static void *
allocate(struct ext_options *x, size_t size)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(size > 0 ? size : 1));
    if (bytes == NULL || PyList_Append(x->keep, bytes) < 0) {
        Py_XDECREF(bytes);
        return NULL;
    }
    Py_DECREF(bytes); /* the list has it */
    return memset(PyBytes_AS_STRING(bytes), 0, size);
}

/* An item's converter: false with an exception set. */
typedef bool (*convert)(struct ext_options *x, PyObject *value, void *to);

static bool
to_int64(struct ext_options *x, PyObject *value, void *to)
{
    (void)x;
    *(int64_t *)to = PyLong_AsLongLong(value);
    return !PyErr_Occurred();
}

static bool
to_int32(struct ext_options *x, PyObject *value, void *to)
{
    (void)x;
    *(int32_t *)to = PyLong_AsInt(value);
    return !PyErr_Occurred();
}

static bool
to_uint64(struct ext_options *x, PyObject *value, void *to)
{
    (void)x;
    *(uint64_t *)to = PyLong_AsUnsignedLongLong(value);
    return !PyErr_Occurred();
}

static bool
to_uint32(struct ext_options *x, PyObject *value, void *to)
{
    uint64_t wide = 0;
    if (!to_uint64(x, value, &wide))
        return false;
    if (wide > UINT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "a number is out of range");
        return false;
    }
    *(uint32_t *)to = (uint32_t)wide;
    return true;
}

/* The dict's values are kept alive by the caller. */
static bool
to_string(struct ext_options *x, PyObject *value, void *to)
{
    char *text;
    (void)x;
    if (PyBytes_AsStringAndSize(value, &text, NULL) < 0) /* no NUL inside */
        return false;
    *(const char **)to = text;
    return true;
}

static bool
to_signals(struct ext_options *x, PyObject *value, void *to)
{
    sigset_t *set = allocate(x, sizeof *set);
    if (set == NULL)
        return false;
    (void)sigemptyset(set);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value); i++) {
        int sig = PyLong_AsInt(PyList_GET_ITEM(value, i));
        if (PyErr_Occurred())
            return false;
        (void)sigaddset(set, sig);
    }
    *(const sigset_t **)to = set;
    return true;
}

static bool
to_rlimit(struct ext_options *x, PyObject *value, void *to)
{
    struct anyfork_rlimit *limit = to;
    return to_int32(x, PyTuple_GET_ITEM(value, 0), &limit->resource) &&
           to_uint64(x, PyTuple_GET_ITEM(value, 1), &limit->soft) &&
           to_uint64(x, PyTuple_GET_ITEM(value, 2), &limit->hard);
}

static bool
to_fd(struct ext_options *x, PyObject *value, void *to)
{
    struct anyfork_fd *fd = to;
    return to_int32(x, PyTuple_GET_ITEM(value, 0), &fd->fd) &&
           to_int32(x, PyTuple_GET_ITEM(value, 1), &fd->target);
}

static bool
to_stdio(struct ext_options *x, PyObject *value, void *to)
{
    struct anyfork_stdio *stdio = to;
    PyObject *path = PyTuple_GET_ITEM(value, 2);
    return to_int32(x, PyTuple_GET_ITEM(value, 0), &stdio->kind) &&
           to_int32(x, PyTuple_GET_ITEM(value, 1), &stdio->fd) &&
           (path == Py_None || to_string(x, path, &stdio->path)) &&
           to_int32(x, PyTuple_GET_ITEM(value, 3), &stdio->flags) &&
           to_uint32(x, PyTuple_GET_ITEM(value, 4), &stdio->mode);
}

/* A list of items of `size` bytes; one more, of zeros, at its end. */
static void *
to_array(struct ext_options *x, PyObject *list, size_t size, convert item, uint32_t *ret_n)
{
    size_t n = (size_t)PyList_GET_SIZE(list);
    char *array = allocate(x, (n + 1) * size);
    for (size_t i = 0; array != NULL && i < n; i++)
        if (!item(x, PyList_GET_ITEM(list, (Py_ssize_t)i), array + i * size))
            return NULL;
    if (ret_n != NULL)
        *ret_n = (uint32_t)n;
    return array;
}

static bool
take(struct ext_options *x, const char *name, convert how, void *to)
{
    PyObject *value = PyDict_GetItemString(x->dict, name); /* borrowed */
    return value == NULL || how(x, value, to);
}

static bool
take_array(struct ext_options *x, const char *name, size_t size, convert item, const void *ret_array,
           uint32_t *ret_n)
{
    PyObject *value = PyDict_GetItemString(x->dict, name); /* borrowed */
    if (value == NULL)
        return true;
    void *array = to_array(x, value, size, item, ret_n);
    memcpy((void *)(uintptr_t)ret_array, &array, sizeof array);
    return array != NULL;
}

static bool
take_stdio(struct ext_options *x)
{
    static const char *const names[] = {"stdin", "stdout", "stderr"};
    for (int i = 0; i < 3; i++)
        if (!take(x, names[i], to_stdio, &x->options.stdio[i]))
            return false;
    return true;
}

bool
ext_options_take(struct ext_options *x, PyObject *dict)
{
    struct anyfork_options *o = &x->options;
    uint32_t n_groups = 0;
    int32_t guard = 0;
    anyfork_options_init(o);
    x->dict = dict;
    x->keep = PyList_New(0);
    if (x->keep == NULL)
        return false;
    bool ok = take_array(x, "argv", sizeof(char *), to_string, &o->argv, NULL) &&
              take(x, "program", to_string, &o->program) &&
              take_array(x, "env", sizeof(char *), to_string, &o->env, NULL) &&
              take(x, "cwd", to_string, &o->cwd) && take(x, "umask", to_int32, &o->umask) &&
              take(x, "user", to_int64, &o->user) && take(x, "group", to_int64, &o->group) &&
              take_array(x, "groups", sizeof(gid_t), to_uint32, &o->groups, &n_groups) &&
              take_array(x, "rlimits", sizeof(struct anyfork_rlimit), to_rlimit, &o->rlimits,
                         &o->n_rlimits) &&
              take(x, "nice", to_int32, &o->nice) &&
              take_array(x, "cpus", sizeof(uint32_t), to_uint32, &o->cpus, &o->n_cpus) &&
              take(x, "cgroup", to_string, &o->cgroup) &&
              take(x, "oom_score_adj", to_int32, &o->oom_score_adj) &&
              take(x, "name", to_string, &o->name) && take(x, "session", to_int32, &o->session) &&
              take(x, "process_group", to_int32, &o->process_group) && take_stdio(x) &&
              take_array(x, "fds", sizeof(struct anyfork_fd), to_fd, &o->fds, &o->n_fds) &&
              take(x, "fd_policy", to_int32, &o->fd_policy) &&
              take(x, "signal_mask", to_signals, &o->signal_mask) &&
              take(x, "ignored_signals", to_signals, &o->ignored_signals) &&
              take(x, "default_signals", to_signals, &o->default_signals) &&
              take(x, "sigint", to_int32, &o->sigint) &&
              take(x, "lifeline_signal", to_int32, &o->lifeline_signal) &&
              take(x, "lifeline_scope", to_int32, &o->lifeline_scope) &&
              take(x, "guard", to_int32, &guard);
    o->guard = guard != 0;
    if (o->groups != NULL)
        o->n_groups = (int32_t)n_groups;
    if (!ok)
        ext_options_release(x);
    return ok;
}

void
ext_options_release(struct ext_options *x)
{
    Py_CLEAR(x->keep);
}
