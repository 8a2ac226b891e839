/*
 * A program that embeds CPython: two interpreters with a GIL of their own, on two
 * threads, both forking.
 *
 * usage: two_interpreters PYTHON FORKS
 * PYTHON is the interpreter whose standard library is used. Exit status: 0 if
 * every child answered rightly, 77 where twin fork cannot work (says why).
 */
#include <anyfork/anyfork_python.h>

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define THREADS 2
#define WAIT_NS ((int64_t)120 * 1000000000)

struct host {
    int number;
    int forks;
    bool keeps_main_state; /* has a thread state of main while it forks */
    int done, bad;
    char what[200];
};

static void
bad(struct host *host, const char *what, long value)
{
    host->bad++;
    (void)snprintf(host->what, sizeof host->what, "%s: %ld", what, value);
}

static int
ask_python(const char *expression)
{
    PyObject *globals = PyModule_GetDict(PyImport_AddModule("__main__"));
    PyObject *value = PyRun_String(expression, Py_eval_input, globals, globals);
    int answer = value ? (int)PyLong_AsLong(value) : -1;
    if (PyErr_Occurred())
        PyErr_Print();
    Py_XDECREF(value);
    return answer;
}

/* In the child: the same interpreter, its objects, its GIL. */
static int
child_answer(void)
{
    PyThreadState *ts = PyThreadState_Get();
    if (PyInterpreterState_GetID(ts->interp) == 0)
        return 1;
    int number = ask_python("number");
    return number < 0 || ask_python("sum(range(100))") != 4950 ? 2 : 40 + number;
}

static void
fork_once(struct host *host)
{
    struct anyfork_error error;
    int status = -1;
    pid_t pid = anyfork_fork(&error), got;

    if (pid == 0)
        _exit(child_answer());
    if (pid < 0) {
        bad(host, error.detail, error.sys_errno);
        return;
    }
    Py_BEGIN_ALLOW_THREADS
    do
        got = waitpid(pid, &status, 0);
    while (got < 0 && errno == EINTR);
    Py_END_ALLOW_THREADS
    if (got != pid || status != (40 + host->number) << 8)
        bad(host, "wait status of a fork", status);
}

static int
worker_main(void *arg)
{
    const struct host *host = arg;
    int answer = child_answer();
    return answer == 40 + host->number ? 50 + host->number : 3;
}

static void
spawn_once(struct host *host, PyObject *callable)
{
    struct anyfork_error error;
    struct anyfork_child *child = NULL;
    int status = -1, r, expected = 50 + host->number;
    PyObject *args = PyTuple_New(0);

    if (callable != NULL)
        r = anyfork_spawn_callable("fork", callable, args, NULL, &child, &error);
    else
        r = anyfork_spawn_c("fork", worker_main, host, NULL, &child, &error);
    Py_DECREF(args);
    if (r < 0) {
        bad(host, error.detail, error.sys_errno);
        return;
    }
    Py_BEGIN_ALLOW_THREADS
    r = anyfork_child_wait(child, WAIT_NS, &status);
    anyfork_child_close(child);
    Py_END_ALLOW_THREADS
    if (r != 0 || status != expected << 8)
        bad(host, callable ? "wait status of a callable" : "wait status of a C function",
            r != 0 ? r : status);
}

static const PyInterpreterConfig isolated = {
    .check_multi_interp_extensions = 1,
    .allow_threads = 1,
    .gil = PyInterpreterConfig_OWN_GIL,
};

static void
run_in_interpreter(struct host *host)
{
    char program[300];
    (void)snprintf(program, sizeof program,
                   "number = %d\n"
                   "def target():\n"
                   "    raise SystemExit(50 + number)\n",
                   host->number);
    if (PyRun_SimpleString(program) != 0) {
        bad(host, "the interpreter's first program", 0);
        return;
    }
    PyObject *target = PyObject_GetAttrString(PyImport_AddModule("__main__"), "target");
    for (int i = 0; i < host->forks && host->bad == 0; i++) {
        fork_once(host);
        spawn_once(host, i % 2 ? target : NULL);
        host->done += 2;
    }
    Py_XDECREF(target);
}

static void *
host_main(void *arg)
{
    struct host *host = arg;
    PyThreadState *main_state = PyThreadState_New(PyInterpreterState_Main()), *state = NULL;

    PyEval_RestoreThread(main_state);
    PyStatus made = Py_NewInterpreterFromConfig(&state, &isolated);
    if (PyStatus_Exception(made)) {
        bad(host, made.err_msg, 0);
        PyThreadState_Clear(main_state);
        PyThreadState_DeleteCurrent();
        return NULL;
    }
    if (!host->keeps_main_state) {
        (void)PyThreadState_Swap(main_state);
        PyThreadState_Clear(main_state);
        PyThreadState_DeleteCurrent();
        PyEval_RestoreThread(state);
    }
    run_in_interpreter(host);
    Py_EndInterpreter(state);
    if (host->keeps_main_state) {
        PyEval_RestoreThread(main_state);
        PyThreadState_Clear(main_state);
        PyThreadState_DeleteCurrent();
    }
    return NULL;
}

static int
count_fds(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/fd");
    while (dir != NULL && readdir(dir) != NULL)
        n++;
    if (dir != NULL)
        (void)closedir(dir);
    return n;
}

static bool
start_python(const char *python)
{
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    PyStatus status = PyConfig_SetBytesString(&config, &config.program_name, python);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    return !PyStatus_Exception(status);
}

int
main(int argc, char **argv)
{
    struct host hosts[THREADS] = {{0}};
    pthread_t threads[THREADS];
    struct anyfork_error error;
    int failed = 0;

    if (argc != 3 || !start_python(argv[1]))
        return 2;
    if (anyfork_check_twin(&error) < 0) {
        printf("skip: %s\n", error.detail);
        return 77;
    }
    int before = count_fds();
    PyThreadState *main_state = PyEval_SaveThread();
    for (int i = 0; i < THREADS; i++) {
        hosts[i] = (struct host){
            .number = i + 1, .forks = atoi(argv[2]), .keeps_main_state = i == 1};
        if (pthread_create(&threads[i], NULL, host_main, &hosts[i]) != 0)
            return 2;
    }
    for (int i = 0; i < THREADS; i++) {
        (void)pthread_join(threads[i], NULL);
        failed += hosts[i].bad != 0 || hosts[i].done != 2 * hosts[i].forks;
        printf("interpreter %d: %d children, %d bad%s%s\n", hosts[i].number, hosts[i].done,
               hosts[i].bad, hosts[i].bad ? ": " : "", hosts[i].what);
    }
    PyEval_RestoreThread(main_state);
    if (count_fds() != before) {
        printf("fds: %d before, %d after\n", before, count_fds());
        failed++;
    }
    if (waitpid(-1, NULL, WNOHANG) != -1 || errno != ECHILD) {
        printf("a child is left\n");
        failed++;
    }
    if (Py_FinalizeEx() < 0)
        failed++;
    return failed != 0;
}
