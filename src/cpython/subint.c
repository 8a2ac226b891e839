/*
 * A target in an interpreter and on a thread of its own: in this process (method
 * "subint"), or in a worker (method "subint_forkserver").
 *
 * Rules: the interpreter is isolated, with a GIL of its own. It lives as long as
 * its thread, which ends it. What runs in this process cannot be killed; the end
 * of main's threading waits for it, as for threads that are no daemons. A forked
 * child has none.
 */
#include "cpython/cpython.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LOOK_US 50000 /* between two looks at signals */

/* From malloc(): in a forked child of the target's, the stack of the thread that waits for
 * it is free for new threads. */
struct host {
    unsigned generation; /* of the process that it is hosted in */
    struct afk_job job;
    struct afk_reporter reporter;
    bool owned;      /* the thread frees this, and closes the reporter's fd */
    int code;
};

static atomic_uint running;

PyThreadState *
afk_subint_new(int stage, struct anyfork_error *reterr)
{
    static const PyInterpreterConfig isolated = {
        .use_main_obmalloc = 0,
        .allow_fork = 0,
        .allow_exec = 0,
        .allow_threads = 1,
        .allow_daemon_threads = 0,
        .check_multi_interp_extensions = 1,
        .gil = PyInterpreterConfig_OWN_GIL,
    };
    PyThreadState *ts = NULL;
    PyThreadState *tm = AFK_ALLOC("PyThreadState_New", PyThreadState_New(PyInterpreterState_Main()));
    if (tm == NULL) {
        (void)AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM,
                       "thread state of main");
        return NULL;
    }
    PyEval_RestoreThread(tm);
    PyStatus status = Py_NewInterpreterFromConfig(&ts, &isolated);
    if (PyStatus_Exception(status) || ts == NULL) {
        ts = NULL;
        (void)AFK_FAIL(reterr, ANYFORK_ESYSTEM, stage, 0,
                       status.err_msg ? status.err_msg : "cannot create an interpreter");
    }
    else {
        (void)PyThreadState_Swap(tm);
    }
    PyThreadState_Clear(tm);
    PyThreadState_DeleteCurrent();
    if (ts != NULL)
        PyEval_RestoreThread(ts);
    return ts;
}

/* The exit code. */
static int
run(struct host *h)
{
    struct anyfork_error error;
    PyThreadState *ts = afk_subint_new(ANYFORK_STAGE_INTERPRETER, &error);
    PyObject *boot = ts ? afk_boot_prepare(&error) : NULL;
    int code = AFK_EXIT_PRELUDE;
    if (boot != NULL) {
        afk_fault_spare(); /* from here on it is the worker's own way */
        code = afk_boot_run_target(boot, &h->job, &h->reporter);
        afk_boot_finish(boot);
        Py_DECREF(boot);
    }
    else {
        afk_reporter_fail(&h->reporter, &error);
    }
    if (ts != NULL)
        Py_EndInterpreter(ts);
    return code;
}

static void *
host_main(void *arg)
{
    struct host *h = arg;
    h->code = run(h);
    if (!h->owned)
        return NULL;
    if (h->generation != afk_generation())
        return NULL; /* a child that the target forked: nobody's worker */
    afk_reporter_send(&h->reporter, AFK_REPORT_EXIT, 0, h->code, NULL, 0);
    int fd = h->reporter.fd;
    free((void *)(uintptr_t)h->job.pickle);
    free(h);
    /* Before the owner can know of the end: who then looks finds nothing running. */
    atomic_fetch_sub(&running, 1);
    afk_lifeline_close(&fd);
    return NULL;
}

int
afk_subint_host(const struct afk_job *job, const struct afk_reporter *reporter)
{
    struct host *h = calloc(1, sizeof *h);
    pthread_t thread;
    int r = -ENOMEM, code = AFK_EXIT_PRELUDE;
    if (h != NULL) {
        *h = (struct host){.job = *job, .reporter = *reporter, .code = AFK_EXIT_PRELUDE};
        r = afk_os_thread(&thread, host_main, h, true);
    }
    if (r < 0) {
        struct anyfork_error error;
        (void)AFK_FAIL(&error, ANYFORK_ESYSTEM, ANYFORK_STAGE_THREAD, -r, "for the interpreter");
        afk_reporter_fail(reporter, &error);
        free(h);
        return code;
    }
    Py_BEGIN_ALLOW_THREADS
    (void)pthread_join(thread, NULL);
    Py_END_ALLOW_THREADS
    code = h->code;
    free(h);
    return code;
}

int
afk_start_subint(const struct afk_method *method, const struct afk_job *job,
                 struct anyfork_child **ret_child, struct anyfork_error *reterr)
{
    (void)method;
    int r = afk_pad_register_stop(reterr);
    if (r < 0)
        return r;
    struct host *h = AFK_ALLOC("calloc(host)", calloc(1, sizeof *h));
    char *pickle = h ? AFK_ALLOC("malloc(pickle)", malloc(job->pickle_size + 1)) : NULL;
    if (pickle == NULL) {
        free(h);
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "the target");
    }
    memcpy(pickle, job->pickle, job->pickle_size);
    h->job = *job;
    h->job.pickle = pickle;
    h->owned = true;
    h->generation = afk_generation();

    struct anyfork_child *child = NULL;
    int fd = -1;
    pthread_t thread;
    r = afk_child_new_in_process(&child, &fd, reterr);
    if (r < 0)
        goto fail;
    r = afk_reporter_init(&h->reporter, fd);
    if (r < 0) {
        r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_PIPE, -r, "report socket");
        goto fail;
    }
    atomic_fetch_add(&running, 1);
    r = afk_os_thread(&thread, host_main, h, true);
    if (r < 0) {
        atomic_fetch_sub(&running, 1);
        r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_THREAD, -r, "for the interpreter");
        goto fail;
    }
    (void)pthread_detach(thread);
    *ret_child = child;
    return 0;

fail:
    afk_lifeline_close(&fd);
    anyfork_child_close(child);
    free(pickle);
    free(h);
    return r;
}

unsigned
afk_subint_threads(void)
{
    return atomic_load(&running);
}

int
afk_subint_join_all(void)
{
    while (atomic_load(&running) > 0) {
        Py_BEGIN_ALLOW_THREADS
        (void)usleep(LOOK_US);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
    return 0;
}

/* Async-signal-safe: stores only. */
static void
in_forked_child(void)
{
    atomic_store(&running, 0);
}

__attribute__((constructor)) static void
loaded(void)
{
    afk_at_fork_child(in_forked_child);
}
