/* The extension module anyfork._anyfork: glue, no logic. */
#include "ext.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "methods.h"

/* In a sub-interpreter, its last atexit callback; see python/anyfork/__init__.py. */
static PyObject *
ext_begin_finalizing(PyObject *module, PyObject *Py_UNUSED(args))
{
    ext_state_of(module)->finalizing = true;
    Py_RETURN_NONE;
}

static int
check_finalizing(PyObject *module)
{
    /* Said here: the package that makes other errors may be gone by now. */
    if (!ext_state_of(module)->finalizing && !Py_IsFinalizing())
        return 0;
    PyErr_SetString(PyExc_PythonFinalizationError, "can't fork at interpreter shutdown");
    return -1;
}

struct ext_state *
ext_state_of(PyObject *module)
{
    return PyModule_GetState(module);
}

/* os.fork() warns where threads may hold locks in the child; so do we. Our own
 * helper threads hold none: not counted. */
static long
count_os_threads(void)
{
    char line[512];
    long n = 0;
    FILE *f = fopen("/proc/self/stat", "re");
    if (f == NULL)
        return 0;
    if (fgets(line, sizeof line, f) != NULL) {
        const char *p = strrchr(line, ')'); /* the name may hold anything */
        for (int field = 2; p != NULL && field < 20; field++)
            p = strchr(p + 1, ' ');
        if (p != NULL)
            (void)sscanf(p, " %ld", &n);
    }
    (void)fclose(f);
    return n - (long)afk_pad_threads() - (long)afk_subint_threads();
}

static void
warn_of_threads(const char *name)
{
    if (count_os_threads() > 1) {
        (void)PyErr_WarnFormat(PyExc_DeprecationWarning, 1,
                               "This process (pid=%d) is multi-threaded, use of %s() may lead to "
                               "deadlocks in the child.",
                               (int)getpid(), name);
        PyErr_Clear(); /* the fork has happened */
    }
}

static PyObject *
ext_fork(PyObject *module, PyObject *Py_UNUSED(args))
{
    struct anyfork_error error;
    if (check_finalizing(module) < 0 || PySys_Audit("os.fork", NULL) < 0)
        return NULL;
    pid_t pid = anyfork_fork(&error);
    if (pid < 0)
        return ext_raise(&error, "fork()");
    if (pid > 0)
        warn_of_threads("fork");
    return PyLong_FromPid(pid);
}

static PyObject *
ext_forkpty(PyObject *module, PyObject *Py_UNUSED(args))
{
    struct anyfork_error error;
    int master = -1;
    if (check_finalizing(module) < 0 || PySys_Audit("os.forkpty", NULL) < 0)
        return NULL;
    pid_t pid = anyfork_forkpty(&master, &error);
    if (pid < 0)
        return ext_raise(&error, "forkpty()");
    if (pid > 0)
        warn_of_threads("forkpty");
    return Py_BuildValue("Ni", PyLong_FromPid(pid), master);
}

/* spawn(type, method, target, args, options or None, report_to, template): target is a
 * callable, bytes that _boot.load() understands, or None for a program. `template`: what a
 * method needs of that kind; True for a program that is one; else None. A str is returned,
 * the reason, where the template has to be made again first. */
static PyObject *
ext_spawn(PyObject *module, PyObject *args)
{
    PyObject *type, *target, *target_args, *dict, *template;
    const char *name;
    int report_to;
    if (!PyArg_ParseTuple(args, "OsOO!OiO", &type, &name, &target, &PyTuple_Type, &target_args, &dict,
                          &report_to, &template))
        return NULL;
    const struct afk_method *method = afk_method_find(name);
    if (method == NULL || !PyType_Check(type))
        return PyErr_Format(PyExc_ValueError, "unknown spawn method: %s", name);
    if (check_finalizing(module) < 0)
        return NULL;
    if (method->process == AFK_PROCESS_FORKED && PySys_Audit("os.fork", NULL) < 0)
        return NULL; /* a program was audited as subprocess.Popen */
    struct afk_job job = {.kind = AFK_JOB_CALLABLE,
                          .report_to = report_to,
                          .callable = target,
                          .args = target_args};
    if (Py_IS_TYPE(template, (PyTypeObject *)ext_state_of(module)->template_type))
        job.template = ext_template_of(template);
    job.orphan = template == Py_True;
    if (PyBytes_Check(target)) {
        job.kind = AFK_JOB_PICKLE;
        job.pickle = PyBytes_AS_STRING(target);
        job.pickle_size = (size_t)PyBytes_GET_SIZE(target);
    }
    else if (target == Py_None) {
        job.kind = AFK_JOB_PROGRAM;
    }
    struct ext_options x = {.keep = NULL};
    if (dict != Py_None) {
        if (!ext_options_take(&x, dict))
            return NULL;
        job.options = &x.options;
    }
    struct anyfork_child *child = NULL;
    struct anyfork_error error;
    int r = afk_start(method, &job, &child, &error);
    ext_options_release(&x);
    if (r == AFK_STALE)
        return ext_text(error.detail);
    if (r < 0)
        return ext_raise(&error, method->name);
    return ext_child_wrap((PyTypeObject *)type, child, method->name);
}

/* spawn_many(type, list of bytes that _boot.load() understands, options or None, template). */
static PyObject *
ext_spawn_many(PyObject *module, PyObject *args)
{
    PyObject *type, *pickles, *dict, *template;
    if (!PyArg_ParseTuple(args, "O!O!OO!", &PyType_Type, &type, &PyList_Type, &pickles, &dict,
                          ext_state_of(module)->template_type, &template))
        return NULL;
    if (check_finalizing(module) < 0)
        return NULL;
    struct ext_options x = {.keep = NULL};
    if (dict != Py_None && !ext_options_take(&x, dict))
        return NULL;
    PyObject *result = ext_template_start_many(template, (PyTypeObject *)type, pickles,
                                               dict != Py_None ? &x.options : NULL);
    ext_options_release(&x);
    return result;
}

/* exec_worker(report fd, pickle): the main program of a worker by exec. */
static PyObject *
ext_exec_worker(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd;
    const char *pickle;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "iy#", &fd, &pickle, &size))
        return NULL;
    afk_boot_run_executed(fd, pickle, (size_t)size);
}

/* begin_template(control fd, (permitted, effective, inheritable)): first of all, before any
 * code of others runs in it. */
static PyObject *
ext_begin_template(PyObject *Py_UNUSED(module), PyObject *args)
{
    int control;
    unsigned long long sets[3];
    if (!PyArg_ParseTuple(args, "i(KKK)", &control, &sets[0], &sets[1], &sets[2]))
        return NULL;
    const uint64_t most[3] = {sets[0], sets[1], sets[2]};
    int r = fcntl(control, F_SETFD, FD_CLOEXEC) < 0 ? -errno : 0;
    if (r == 0)
        r = afk_lifeline_register(control, false);
    if (r == 0)
        r = afk_os_limit_capabilities(most);
    if (r < 0) {
        errno = -r;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

/* serve(control fd, owner's pid, low, high, idle seconds, shared, siblings): the main program of
 * a template. */
static PyObject *
ext_serve(PyObject *Py_UNUSED(module), PyObject *args)
{
    struct afk_server_options options;
    struct anyfork_error error;
    double idle;
    int shared, siblings;
    if (!PyArg_ParseTuple(args, "iiIIdpp", &options.control, &options.owner, &options.low,
                          &options.high, &idle, &shared, &siblings))
        return NULL;
    options.shared = shared != 0;
    options.siblings = siblings != 0;
    options.idle_ns = (int64_t)(idle * 1e9);
    if (afk_template_serve(&options, &error) < 0)
        return ext_raise(&error, "zygote");
    Py_RETURN_NONE;
}

/* stream_is_open(number): whether that standard stream is open, and no descriptor of ours. */
static PyObject *
ext_stream_is_open(PyObject *Py_UNUSED(module), PyObject *number)
{
    int fd = PyLong_AsInt(number);
    if (PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(afk_os_fd_is_open(fd) && !afk_lifeline_holds(fd));
}

/* holds(fd): whether it is a descriptor of ours. */
static PyObject *
ext_holds(PyObject *Py_UNUSED(module), PyObject *number)
{
    int fd = PyLong_AsInt(number);
    if (PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(afk_lifeline_holds(fd));
}

/* stamp(paths): a number that is another one once one of the files is. */
static PyObject *
ext_stamp(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *paths;
    uint64_t stamp = 0;
    if (!PyArg_ParseTuple(args, "O!:stamp", &PyTuple_Type, &paths))
        return NULL;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(paths); i++) {
        const char *path = PyBytes_AsString(PyTuple_GET_ITEM(paths, i));
        if (path == NULL)
            return NULL;
        stamp = afk_os_stamp(stamp, path);
    }
    return PyLong_FromUnsignedLongLong(stamp);
}

/* set_title(text): what ps shows of this process. */
static PyObject *
ext_set_title(PyObject *Py_UNUSED(module), PyObject *title)
{
    PyObject *bytes;
    if (!PyUnicode_FSConverter(title, &bytes))
        return NULL;
    afk_child_set_name(PyBytes_AS_STRING(bytes));
    Py_DECREF(bytes);
    Py_RETURN_NONE;
}

/* set_comm(name): /proc/self/comm alone. */
static PyObject *
ext_set_comm(PyObject *Py_UNUSED(module), PyObject *name)
{
    PyObject *bytes;
    if (!PyUnicode_FSConverter(name, &bytes))
        return NULL;
    afk_child_set_comm(PyBytes_AS_STRING(bytes));
    Py_DECREF(bytes);
    Py_RETURN_NONE;
}

static PyObject *
append(PyObject *list, PyObject *row)
{
    if (row == NULL || PyList_Append(list, row) < 0)
        Py_CLEAR(list);
    Py_XDECREF(row);
    return list;
}

/* What is known of a row without looking at the interpreter's layout. */
static PyObject *
traits(const struct afk_method *m)
{
    static const char *const targets[] = {"caller", "main", "fresh"}; /* enum afk_target */
    bool in_main = PyInterpreterState_Get() == PyInterpreterState_Main();
    return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s,s:z,s:s,s:O,s:O}", "name", m->name, "summary",
                         m->summary, "runs_in", m->runs_in, "memory", m->memory, "may_wait_for",
                         m->may_wait_for, "lacks", m->lacks, "target", targets[m->target], "has_process",
                         m->process != AFK_PROCESS_NONE ? Py_True : Py_False, "pickles",
                         afk_method_pickles(m, in_main) ? Py_True : Py_False);
}

static PyObject *
ext_method_traits(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    PyObject *list = PyList_New(0);
    for (unsigned i = 0; list != NULL && i < afk_n_methods; i++)
        list = append(list, traits(&afk_methods[i]));
    return list;
}

static PyObject *
ext_methods(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    PyObject *list = PyList_New(0);
    for (unsigned i = 0; list != NULL && i < afk_n_methods; i++) {
        struct anyfork_error error = {0};
        int r = afk_method_probe(&afk_methods[i], &error);
        PyObject *row = traits(&afk_methods[i]);
        PyObject *reason = r == 0 ? Py_NewRef(Py_None) : ext_text(error.detail);
        PyObject *tried = Py_BuildValue("{s:O,s:N}", "available", r == 0 ? Py_True : Py_False,
                                        "reason", reason);
        if (row != NULL && (tried == NULL || PyDict_Update(row, tried) < 0))
            Py_CLEAR(row);
        Py_XDECREF(tried);
        list = append(list, row);
    }
    return list;
}

static PyObject *
ext_check_fork(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    struct anyfork_error error;
    bool in_main = PyInterpreterState_Get() == PyInterpreterState_Main();
    int r = in_main ? afk_layout_require(AFK_FEATURE_HOP, &error) : anyfork_check_twin(&error);
    if (r < 0)
        return ext_raise(&error, "fork()");
    Py_RETURN_NONE;
}

/* For a child of install()ed os.fork() that is a worker of somebody's:
 * multiprocessing's. A worker's dispositions and mask, by the same rule. */
static PyObject *
ext_default_signals(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    sigset_t reset, none;
    (void)sigemptyset(&reset);
    (void)sigemptyset(&none);
    afk_child_default_dispositions(&reset);
    (void)pthread_sigmask(SIG_SETMASK, &none, NULL);
    Py_RETURN_NONE;
}

/* SIG_IGN or SIG_DFL, without Python's table, which belongs to main. */
static PyObject *
ext_set_disposition(PyObject *Py_UNUSED(module), PyObject *args)
{
    int sig, ignore;
    struct sigaction action = {0};
    if (!PyArg_ParseTuple(args, "ip", &sig, &ignore))
        return NULL;
    action.sa_handler = ignore ? SIG_IGN : SIG_DFL;
    if (sigaction(sig, &action, NULL) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyObject *
ext_in_main(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    return PyBool_FromLong(PyInterpreterState_Get() == PyInterpreterState_Main());
}

static PyObject *
layout_dict(const struct afk_layout *lo)
{
    static const char *const states[] = {"unknown", "ready", "refused"};
    PyObject *dict = PyDict_New();
    for (int f = 0; dict != NULL && f < AFK_FEATURE_COUNT; f++) {
        PyObject *pair = Py_BuildValue("ss", states[lo->state[f]], lo->why[f]);
        if (pair == NULL || PyDict_SetItemString(dict, afk_feature_name((enum afk_feature)f), pair) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(pair);
    }
    return dict;
}

static PyObject *
ext_layout(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    return layout_dict(afk_layout());
}

/* For tests: what would be found with this table, version and debug flag? */
static PyObject *
ext_layout_doctored(PyObject *Py_UNUSED(module), PyObject *args)
{
    struct afk_layout_source source;
    struct afk_layout found;
    Py_buffer table = {0};
    int debug;
    if (!PyArg_ParseTuple(args, "y*kp", &table, &source.version_hex, &debug))
        return NULL;
    source.debug = debug;
    source.table = table.buf;
    source.table_size = (size_t)table.len;
    afk_layout_discover(&source, &found);
    PyBuffer_Release(&table);
    return layout_dict(&found);
}

/* For tests: the true table, to be doctored. */
static PyObject *
ext_layout_table(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    struct afk_layout_source source;
    afk_layout_source_here(&source);
    return Py_BuildValue("y#kO", source.table, (Py_ssize_t)source.table_size, source.version_hex,
                         source.debug ? Py_True : Py_False);
}

/* Counts for tests and doctor; racy by nature. */
static PyObject *
ext_runtime(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    int interpreters = 0, in_main = 0, own = 0, main_tstate_alive = 0;
    const struct afk_layout *lo = afk_layout();
    PyInterpreterState *me = PyInterpreterState_Get(), *main = PyInterpreterState_Main();
    if (lo->state[AFK_FEATURE_HOP] != AFK_READY)
        Py_RETURN_NONE;
    afk_head_lock(lo);
    for (PyInterpreterState *i = PyInterpreterState_Head(); i; i = *afk_interp_next(lo, i))
        interpreters++;
    for (PyThreadState *t = *afk_interp_threads(lo, main); t; t = t->next) {
        in_main++;
        main_tstate_alive |= t == *afk_runtime_main_tstate(lo);
    }
    for (PyThreadState *t = *afk_interp_threads(lo, me); t; t = t->next)
        own++;
    afk_head_unlock(lo);
    return Py_BuildValue("{s:i,s:i,s:i,s:O,s:i,s:O,s:O,s:O,s:L}", "interpreters", interpreters,
                         "main_thread_states", in_main, "own_thread_states", own,
                         "main_tstate_alive", main_tstate_alive ? Py_True : Py_False,
                         "gilstate_check", PyGILState_Check(), "in_main",
                         me == main ? Py_True : Py_False, "own_gil",
                         lo->state[AFK_FEATURE_TWIN] == AFK_READY &&
                                 afk_interp_has_own_gil(lo, me) == 1 && me != main
                             ? Py_True
                             : Py_False,
                         "pad", afk_pad_has_interpreter() ? Py_True : Py_False, "interpreter",
                         (long long)PyInterpreterState_GetID(me));
}

static PyObject *
ext_workers_held(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    return PyLong_FromUnsignedLong(afk_children_held());
}

static PyObject *
ext_pad_stop(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    (void)afk_pad_stop((int64_t)5 * 1000000000);
    if (afk_subint_join_all() < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
ext_set_package_parent(PyObject *Py_UNUSED(module), PyObject *dir)
{
    PyObject *bytes;
    if (!PyUnicode_FSConverter(dir, &bytes))
        return NULL;
    afk_boot_set_package_parent(PyBytes_AS_STRING(bytes));
    Py_DECREF(bytes);
    Py_RETURN_NONE;
}

#ifdef AFK_FAULTS
static PyObject *
ext_fault_arm(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned nth;
    int errnum, for_good;
    if (!PyArg_ParseTuple(args, "Iip", &nth, &errnum, &for_good))
        return NULL;
    afk_fault_arm(nth, errnum, for_good);
    Py_RETURN_NONE;
}

static PyObject *
ext_fault_report(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    return Py_BuildValue("IIz", afk_fault_hits(), afk_fault_points(), afk_fault_last());
}
#endif

static PyMethodDef functions[] = {
    {"fork", ext_fork, METH_NOARGS,
     "fork()\n--\n\nFork; returns 0 in the child and its pid in the parent, in any interpreter."},
    {"forkpty", ext_forkpty, METH_NOARGS,
     "forkpty()\n--\n\nFork with a new pseudo-terminal; returns (pid, master fd)."},
    {"spawn", ext_spawn, METH_VARARGS, NULL},
    {"spawn_many", ext_spawn_many, METH_VARARGS, NULL},
    {"exec_worker", ext_exec_worker, METH_VARARGS, NULL},
    {"begin_template", ext_begin_template, METH_VARARGS, NULL},
    {"serve", ext_serve, METH_VARARGS, NULL},
    {"stream_is_open", ext_stream_is_open, METH_O, NULL},
    {"holds", ext_holds, METH_O, NULL},
    {"stamp", ext_stamp, METH_VARARGS, NULL},
    {"set_comm", ext_set_comm, METH_O, NULL},
    {"set_title", ext_set_title, METH_O, NULL},
    {"cuda_state", ext_cuda_state, METH_O, NULL},
    {"fork_hooks", ext_fork_hooks, METH_NOARGS, NULL},
    {"fork_handlers", ext_fork_handlers, METH_NOARGS, NULL},
    {"heartbeat_begin", ext_heartbeat_begin, METH_VARARGS, NULL},
    {"heartbeat_end", ext_heartbeat_end, METH_NOARGS, NULL},
    {"heartbeat_verdict", ext_heartbeat_verdict, METH_VARARGS, NULL},
    {"method_traits", ext_method_traits, METH_NOARGS, NULL},
    {"methods", ext_methods, METH_NOARGS, NULL},
    {"check_fork", ext_check_fork, METH_NOARGS, NULL},
    {"layout", ext_layout, METH_NOARGS, NULL},
    {"runtime", ext_runtime, METH_NOARGS, NULL},
    {"_layout_doctored", ext_layout_doctored, METH_VARARGS, NULL},
    {"_layout_table", ext_layout_table, METH_NOARGS, NULL},
    {"default_signals", ext_default_signals, METH_NOARGS, NULL},
    {"set_disposition", ext_set_disposition, METH_VARARGS, NULL},
    {"in_main", ext_in_main, METH_NOARGS, NULL},
    {"_begin_finalizing", ext_begin_finalizing, METH_NOARGS, NULL},
    {"workers_held", ext_workers_held, METH_NOARGS, NULL},
    {"_pad_stop", ext_pad_stop, METH_NOARGS, NULL},
    {"_set_package_parent", ext_set_package_parent, METH_O, NULL},
#ifdef AFK_FAULTS
    {"_fault_arm", ext_fault_arm, METH_VARARGS, NULL},
    {"_fault_report", ext_fault_report, METH_NOARGS, NULL},
#endif
    {NULL, NULL, 0, NULL},
};

static int
add_type(PyObject *module, const char *name, PyType_Spec *spec, PyObject **ret_type)
{
    *ret_type = PyType_FromModuleAndSpec(module, spec, NULL);
    return *ret_type == NULL ? -1 : PyModule_AddObjectRef(module, name, *ret_type);
}

static int
ext_exec(PyObject *module)
{
    struct ext_state *state = ext_state_of(module);
    if (PyInterpreterState_Get() == PyInterpreterState_Main())
        afk_pad_begin();
    if (add_type(module, "Child", &ext_child_spec, &state->child_type) < 0 ||
        add_type(module, "Template", &ext_template_spec, &state->template_type) < 0 ||
        add_type(module, "Channel", &ext_channel_spec, &state->channel_type) < 0 ||
        add_type(module, "View", &ext_view_spec, &state->view_type) < 0 ||
        add_type(module, "Heartbeat", &ext_heartbeat_spec, &state->heartbeat_type) < 0 ||
        add_type(module, "Supervisor", &ext_supervisor_spec, &state->supervisor_type) < 0)
        return -1;
#ifdef AFK_FAULTS
    PyObject *faults = Py_True;
#else
    PyObject *faults = Py_False;
#endif
    return PyModule_AddObjectRef(module, "FAULTS", faults);
}

static int
ext_traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(ext_state_of(module)->child_type);
    Py_VISIT(ext_state_of(module)->template_type);
    Py_VISIT(ext_state_of(module)->channel_type);
    Py_VISIT(ext_state_of(module)->view_type);
    Py_VISIT(ext_state_of(module)->heartbeat_type);
    Py_VISIT(ext_state_of(module)->supervisor_type);
    return 0;
}

static int
ext_clear(PyObject *module)
{
    Py_CLEAR(ext_state_of(module)->child_type);
    Py_CLEAR(ext_state_of(module)->template_type);
    Py_CLEAR(ext_state_of(module)->channel_type);
    Py_CLEAR(ext_state_of(module)->view_type);
    Py_CLEAR(ext_state_of(module)->heartbeat_type);
    Py_CLEAR(ext_state_of(module)->supervisor_type);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)ext_exec},
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_anyfork",
    .m_size = sizeof(struct ext_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = ext_traverse,
    .m_clear = ext_clear,
};

PyMODINIT_FUNC
PyInit__anyfork(void)
{
    return PyModuleDef_Init(&module_def);
}
