/*
 * A program that uses both the C library and the Python package: the process has
 * one copy of anyfork, so that handles and forks of either are known to the other.
 *
 * usage: one_copy PYTHON, with PYTHONPATH naming the package's folder.
 */
#include <anyfork/anyfork_python.h>

#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define WAIT_NS ((int64_t)60 * 1000000000)

static int failed;

static void
check(bool ok, const char *what)
{
    printf("%s: %s\n", ok ? "ok" : "FAILED", what);
    failed += !ok;
}

/* How many different files named libanyfork are mapped. */
static int
count_mapped(void)
{
    char line[4096], seen[16][4096];
    int n = 0;
    FILE *maps = fopen("/proc/self/maps", "re");
    while (maps != NULL && n < 16 && fgets(line, sizeof line, maps) != NULL) {
        const char *name = strstr(line, "/libanyfork-"), *path = strchr(line, '/');
        bool known = name == NULL;
        for (int i = 0; i < n && !known; i++)
            known = strcmp(seen[i], path) == 0;
        if (!known)
            (void)snprintf(seen[n++], sizeof seen[0], "%s", path);
    }
    if (maps != NULL)
        (void)fclose(maps);
    return n;
}

static int
waits(void *arg)
{
    (void)arg;
    (void)pause(); /* until it is killed */
    return 0;
}

static long
ask(const char *expression)
{
    PyObject *globals = PyModule_GetDict(PyImport_AddModule("__main__"));
    PyObject *value = PyRun_String(expression, Py_eval_input, globals, globals);
    long answer = value ? PyLong_AsLong(value) : -1;
    if (PyErr_Occurred())
        PyErr_Print();
    Py_XDECREF(value);
    return answer;
}

static int
reap(pid_t pid)
{
    int status = -1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void
check_addresses(void)
{
    PyObject *ext = PyImport_ImportModule("anyfork._anyfork");
    PyObject *file = ext ? PyObject_GetAttrString(ext, "__file__") : NULL;
    const char *path = file ? PyUnicode_AsUTF8(file) : NULL;
    void *handle = path ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : NULL;
    void *theirs = handle ? dlsym(handle, "anyfork_fork") : NULL;
    check(theirs != NULL && theirs == dlsym(RTLD_DEFAULT, "anyfork_fork"),
          "the extension's anyfork_fork is the program's");
    if (handle != NULL)
        (void)dlclose(handle);
    Py_XDECREF(file);
    Py_XDECREF(ext);
    PyErr_Clear();
}

int
main(int argc, char **argv)
{
    struct anyfork_error error;
    struct anyfork_child *child = NULL;
    PyConfig config;

    if (argc != 2)
        return 2;
    PyConfig_InitPythonConfig(&config);
    PyStatus status = PyConfig_SetBytesString(&config, &config.program_name, argv[1]);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        return 2;

    check(count_mapped() == 1, "the program has the library");
    check(PyRun_SimpleString("import os, anyfork") == 0, "import anyfork");
    check(count_mapped() == 1, "and the import brought no second one");
    check_addresses();

    /* A worker of C's, in a child that Python forked: foreign, and left alone. */
    if (anyfork_spawn_c("fork", waits, NULL, NULL, &child, &error) < 0) {
        printf("FAILED: spawn: %s: %s\n", anyfork_stage_text(error.stage), error.detail);
        return 1;
    }
    long pid = ask("anyfork.fork()");
    if (pid == 0)
        _exit(anyfork_child_wait(child, 0, NULL) == ANYFORK_EFOREIGN ? 0 : 1);
    check(reap((pid_t)pid) == 0, "C's handle is foreign in a child that Python forked");
    check(anyfork_child_wait(child, 0, NULL) == ANYFORK_ETIMEDOUT, "and lives on here");
    anyfork_child_close(child);

    /* And the other way round. */
    check(PyRun_SimpleString("import signal\n"
                             "child = anyfork.spawn(signal.pause, method='fork')\n") == 0,
          "a worker of Python's");
    pid = anyfork_fork(&error);
    if (pid == 0)
        _exit(ask("child._foreign") == 1 ? 0 : 1);
    check(reap((pid_t)pid) == 0, "Python's handle is foreign in a child that C forked");
    check(ask("child.is_alive()") == 1, "and lives on here");
    check(PyRun_SimpleString("child.close()") == 0, "and closes");
    check(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "no child is left");
    check(Py_FinalizeEx() == 0, "Python ends");
    return failed != 0;
}
