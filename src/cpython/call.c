/*
 * fork() and forkpty(): they return twice, in any interpreter.
 *
 * Rule: in main the child keeps all that os.fork() keeps. In a sub-interpreter
 * it is a twin, in which the parent's atexit callbacks are dropped and plain
 * os.fork(), deadly there, is replaced by an error that says what to use.
 */
#include "cpython/cpython.h"

#include <errno.h>
#include <string.h>

static PyObject *
forbidden(PyObject *self, PyObject *Py_UNUSED(args))
{
    PyErr_Format(PyExc_RuntimeError,
                 "os.%s() would kill its child in a sub-interpreter; call anyfork.%s(), or "
                 "anyfork.install() once to have os.%s() do so",
                 PyUnicode_AsUTF8(self), PyUnicode_AsUTF8(self), PyUnicode_AsUTF8(self));
    return NULL;
}
static PyMethodDef forbidden_def = {"forbidden_fork", forbidden, METH_NOARGS,
                                    "Raises: os.fork() cannot work in a sub-interpreter."};

static void
forbid(const char *module_name, const char *name)
{
    PyObject *modules = PyImport_GetModuleDict();
    PyObject *module = modules ? PyMapping_GetItemString(modules, module_name) : NULL;
    PyObject *now = module ? PyObject_GetAttrString(module, name) : NULL;
    PyObject *self = NULL, *error = NULL;
    /* CPython's own is a builtin of module posix; anything else is somebody's. */
    if (now != NULL && PyCFunction_Check(now) &&
        ((PyCFunctionObject *)now)->m_ml != &forbidden_def) {
        PyObject *owner = PyObject_GetAttrString(now, "__module__");
        if (owner != NULL && PyUnicode_Check(owner) &&
            PyUnicode_CompareWithASCIIString(owner, "posix") == 0) {
            self = PyUnicode_FromString(name);
            error = self ? PyCFunction_New(&forbidden_def, self) : NULL;
            if (error != NULL)
                (void)PyObject_SetAttrString(module, name, error);
        }
        Py_XDECREF(owner);
    }
    PyErr_Clear();
    Py_XDECREF(self);
    Py_XDECREF(error);
    Py_XDECREF(now);
    Py_XDECREF(module);
}

void
afk_forbid_os_fork(void)
{
    forbid("posix", "fork");
    forbid("posix", "forkpty");
    forbid("os", "fork");
    forbid("os", "forkpty");
}

/* Both interpreters are whole: what waited for that. */
static void
settle_twin(struct afk_forking *f)
{
    (void)PyThreadState_Swap(f->tm);
    afk_clear_atexit(); /* before the hooks: they may register their own */
    if (f->parked)
        afk_run_child_hooks(f->main_hooks);
    afk_settle_python_handlers(&f->plan);
    (void)PyThreadState_Swap(f->ts);
    afk_clear_atexit();
    if (f->parked)
        afk_run_child_hooks(f->caller_hooks);
    afk_forbid_os_fork();
}

static pid_t
fork_planned(struct afk_forking *f, struct anyfork_error *reterr)
{
    pid_t pid = afk_fork_from(f, reterr);
    if (pid == 0 && f->ts->interp != f->main)
        settle_twin(f);
    return pid < 0 ? -1 : pid;
}

static int
before_call(struct afk_forking *f, struct anyfork_error *reterr)
{
    int r = afk_check_caller(reterr);
    if (r == 0)
        r = afk_layout_require(AFK_FEATURE_HOP, reterr);
    if (r == 0)
        afk_forking_init(f, AFK_FORK_CALL);
    return r;
}

pid_t
anyfork_fork(struct anyfork_error *reterr)
{
    struct afk_forking f;
    if (before_call(&f, reterr) < 0)
        return -1;
    return fork_planned(&f, reterr);
}

pid_t
anyfork_forkpty(int *ret_master_fd, struct anyfork_error *reterr)
{
    struct afk_forking f;
    int master = -1, slave = -1;

    if (before_call(&f, reterr) < 0)
        return -1;
    int r = afk_os_openpty(&master, &slave);
    if (r < 0) {
        (void)AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_PTY, -r, NULL);
        return -1;
    }
    f.plan.tty_fd = slave;
    f.plan.tty_master_fd = master;
    pid_t pid = fork_planned(&f, reterr);
    if (pid == 0) {
        *ret_master_fd = -1;
        return 0;
    }
    afk_os_close(slave);
    if (pid < 0)
        afk_os_close(master);
    else
        *ret_master_fd = master;
    return pid;
}

int
anyfork_check_twin(struct anyfork_error *reterr)
{
    int r = afk_check_caller(reterr);
    if (r == 0)
        r = afk_layout_require(AFK_FEATURE_HOP, reterr);
    return r < 0 ? r : afk_layout_require(AFK_FEATURE_TWIN, reterr);
}
