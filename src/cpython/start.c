/*
 * How a worker comes to be: the narrator. Each layer returns before the next is
 * called; the same lines serve every method, whose row says where its target
 * runs and which thread forks.
 */
#include "cpython/cpython.h"
#include "methods.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PAD_TIMEOUT_NS ((int64_t)10 * 1000000000)
#define TEMPLATE_TIMEOUT_NS ((int64_t)30 * 1000000000)
#define CHUNK 32u /* starts whose options are held, with their descriptors, at once */
#define ASK_AGAIN_NS ((int64_t)1000000000) /* a standby may have died before it was taken */

/* What the worker's standard streams and logs write to. They are its own too, under the
 * same numbers. *ret_bytes is what plan->keep points into. */
static int
keep_streams(PyObject *boot, struct afk_plan *plan, PyObject **ret_bytes,
             struct anyfork_error *reterr)
{
    PyObject *bytes = PyObject_CallMethod(boot, "descriptors_in_use", NULL);
    if (bytes == NULL || !PyBytes_Check(bytes)) {
        Py_XDECREF(bytes);
        return afk_fail_python(reterr, ANYFORK_STAGE_OPTION, __LINE__, "descriptors in use");
    }
    *ret_bytes = bytes;
    plan->keep = (const int *)(const void *)PyBytes_AS_STRING(bytes);
    plan->n_keep = (unsigned)((size_t)PyBytes_GET_SIZE(bytes) / sizeof(int));
    return 0;
}

/* A fork hook has forked itself, and its child went on, out of the hook: the thread states
 * that the start would go back to are gone. */
static void
end_if_forked_by_a_hook(unsigned generation)
{
    static const char text[] = "anyfork: a fork hook forked, and its child returned from it: "
                               "it ends here\n";
    if (afk_generation() == generation)
        return;
    (void)!write(2, text, sizeof text - 1);
    _exit(AFK_EXIT_PRELUDE);
}

/* On the thread that forks. */
static int
start_here(const struct afk_method *method, const struct afk_job *job, bool for_pad,
           struct anyfork_child **ret_child, struct anyfork_error *reterr)
{
    unsigned generation = afk_generation();
    struct afk_forking f;
    struct anyfork_child *child = NULL;
    PyThreadState *from, *fresh;
    PyObject *boot, *kept = NULL;
    /* What is hosted in an interpreter of its own needs that of main first. */
    PyInterpreterState *target = method->target == AFK_TARGET_CALLER ? PyInterpreterState_Get()
                                                                     : PyInterpreterState_Main();

    afk_forking_init(&f, AFK_FORK_WORKER);
    int r = afk_child_new(&child, &f.plan, &job->wants, reterr);
    if (r < 0)
        return r;
    f.child = child;
    f.for_pad = for_pad;
    f.plan.setup = job->setup;

    fresh = afk_hop_enter(target, &from);
    if (fresh == NULL) {
        r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "thread state");
        goto out;
    }
    afk_layout_look_again();
    r = ANYFORK_EUNAVAILABLE;
    boot = afk_boot_prepare_fork(reterr);
    if (boot != NULL) {
        r = keep_streams(boot, &f.plan, &kept, reterr);
        if (r == 0)
            r = afk_fork_from(&f, reterr);
        if (r == 0)
            /* In the child; never returns. */
            afk_boot_run(boot, job, &f, method->target == AFK_TARGET_FRESH);
        end_if_forked_by_a_hook(generation);
        Py_XDECREF(kept);
        Py_DECREF(boot);
    }
    afk_swap_back(fresh, from);
out:
    if (r < 0) {
        (void)afk_child_adopt(child, -1, &f.plan, NULL); /* the worker's ends */
        anyfork_child_close(child);
        return r;
    }
    *ret_child = child;
    return 0;
}

struct pad_start {
    const struct afk_method *method;
    struct afk_job job;
    struct anyfork_child *child;
};

static int
start_on_pad(void *arg, struct anyfork_error *reterr)
{
    struct pad_start *start = arg;
    return start_here(start->method, &start->job, true, &start->child, reterr);
}

static void
take_child(void *arg, void *into)
{
    struct pad_start *start = arg;
    *(struct anyfork_child **)into = start->child;
    start->child = NULL;
}

/* The child of a start that nobody waits for any more ends with its handle. */
static void
free_pad_start(void *arg)
{
    struct pad_start *start = arg;
    anyfork_child_close(start->child);
    free(start);
}

int
afk_start_fork(const struct afk_method *method, const struct afk_job *job,
               struct anyfork_child **ret_child, struct anyfork_error *reterr)
{
    bool in_main = PyInterpreterState_Get() == PyInterpreterState_Main();
    if (method->pad == AFK_PAD_NONE || (method->pad == AFK_PAD_SUBINT && !in_main))
        return start_here(method, job, false, ret_child, reterr);

    struct pad_start *start = AFK_ALLOC("calloc(start)", calloc(1, sizeof *start));
    if (start == NULL)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "start");
    start->method = method;
    start->job = *job;
    const struct afk_pad_work work = {.job = start_on_pad,
                                      .arg = start,
                                      .free = free_pad_start,
                                      .collect = take_child,
                                      .collect_into = ret_child};
    return afk_pad_run(method->pad, &work, PAD_TIMEOUT_NS, reterr);
}

/* The parent's end of what the options named is the handle's, or gone. */
static int
start_with_options(const struct afk_method *method, struct afk_job *job,
                   struct anyfork_child **ret_child, struct anyfork_error *reterr)
{
    static const enum afk_setup_for purposes[] = {[AFK_PROCESS_FORKED] = AFK_SETUP_FORK,
                                                  [AFK_PROCESS_EXECUTED] = AFK_SETUP_EXEC,
                                                  [AFK_PROCESS_FROM_TEMPLATE] = AFK_SETUP_TEMPLATE};
    enum afk_setup_for purpose = purposes[method->process];
    struct afk_setup *setup = AFK_ALLOC("malloc(setup)", malloc(sizeof *setup));
    if (setup == NULL)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "options");
    int r = afk_setup_prepare(setup, job->options, purpose, job->report_to, reterr);
    if (r == 0) {
        setup->orphan = job->orphan;
        job->setup = setup;
        job->wants = afk_setup_wants(setup);
        r = method->start(method, job, ret_child, reterr);
        if (r == 0)
            afk_child_set_stdio(*ret_child, setup);
        afk_setup_release(setup);
    }
    free(setup);
    return r;
}

int
afk_start_exec(const struct afk_method *method, const struct afk_job *job,
               struct anyfork_child **ret_child, struct anyfork_error *reterr)
{
    (void)method;
    PyInterpreterState *interp = PyInterpreterState_Get();
    PyThreadState *ts = PyEval_SaveThread();
    int r = afk_exec_start(job->setup, ret_child, reterr);
    afk_attach(ts, interp);
    return r;
}

/* A worker without a lifeline: until then it would end with us. */
static void
await_armed(const struct afk_template_job *jobs, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        if (!jobs[i].started || jobs[i].setup->lifeline_signal != 0)
            continue;
        Py_BEGIN_ALLOW_THREADS
        afk_child_await_armed(jobs[i].child);
        Py_END_ALLOW_THREADS
    }
}

static unsigned
not_started(const struct afk_template_job *jobs, unsigned n)
{
    unsigned left = 0;
    for (unsigned i = 0; i < n; i++)
        left += !jobs[i].started;
    return left;
}

static void
close_dropped(struct afk_template_job *jobs, unsigned n)
{
    unsigned dropped = 0;
    for (unsigned i = 0; i < n; i++)
        dropped += jobs[i].n_dropped;
    if (dropped == 0)
        return;
    Py_BEGIN_ALLOW_THREADS
    afk_template_close_dropped(jobs, n);
    Py_END_ALLOW_THREADS
}

/* All of them, with the GIL: no other thread runs until the standbys have been told. While some
 * are waited for it is let go. AFK_STALE, with the reason as detail: the template has to be made
 * again for those that are not started. */
static int
start_from_template(struct afk_template *t, struct afk_template_job *jobs, unsigned n,
                    struct anyfork_error *reterr)
{
    int64_t begun = afk_os_now_ns(), deadline = 0, ask_again = 0;
    unsigned left = n;
    for (;;) {
        const char *why = NULL;
        for (unsigned i = 0; i < n; i++)
            jobs[i].asked = deadline != 0;
        int r = afk_template_start(t, jobs, n, &why, reterr);
        close_dropped(jobs, n);
        int64_t now = afk_os_now_ns();
        if (deadline != 0 && not_started(jobs, n) < left) { /* it is at it */
            ask_again = now + ASK_AGAIN_NS;
            deadline = now + TEMPLATE_TIMEOUT_NS;
        }
        left = not_started(jobs, n);
        if (r == -EAGAIN && now >= ask_again) {
            r = afk_template_want(t, left);
            why = "it has ended";
            if (deadline == 0)
                afk_template_missed(t, left);
            ask_again = now + ASK_AGAIN_NS;
            deadline = deadline == 0 ? now + TEMPLATE_TIMEOUT_NS : deadline;
            r = r == 0 ? -EAGAIN : r;
        }
        if (r != -EAGAIN)
            await_armed(jobs, n);
        if (r == 0)
            afk_template_took(t, now - begun);
        if (r == -ESTALE)
            return AFK_FAIL(reterr, AFK_STALE, ANYFORK_STAGE_TEMPLATE, 0, why);
        if (r != -EAGAIN)
            return r;
        if (now >= deadline)
            return AFK_FAIL(reterr, ANYFORK_ETIMEDOUT, ANYFORK_STAGE_TEMPLATE, 0,
                            "it does not answer");
        Py_BEGIN_ALLOW_THREADS
        r = afk_template_wait(t, ask_again < deadline ? ask_again - now : deadline - now);
        Py_END_ALLOW_THREADS
        if (r == -EINTR && PyErr_CheckSignals() < 0)
            return AFK_FAIL(reterr, ANYFORK_EPYTHON, ANYFORK_STAGE_TEMPLATE, 0, "interrupted");
    }
}

int
afk_start_zygote(const struct afk_method *method, const struct afk_job *job,
                 struct anyfork_child **ret_child, struct anyfork_error *reterr)
{
    (void)method;
    if (job->template == NULL)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0, "template: none is given");
    struct afk_template_job one = {
        .setup = job->setup, .pickle = job->pickle, .size = job->pickle_size};
    int r = start_from_template(job->template, &one, 1, reterr);
    *ret_child = one.child;
    return r;
}

static int
start_chunk(struct afk_template *t, const struct anyfork_options *options, struct afk_setup *setups,
            struct afk_template_job *jobs, unsigned n, struct anyfork_error *reterr)
{
    unsigned prepared = 0;
    int r = 0;
    while (r == 0 && prepared < n) {
        r = afk_setup_prepare(&setups[prepared], options, AFK_SETUP_TEMPLATE, -1, reterr);
        if (r == 0) {
            jobs[prepared].setup = &setups[prepared];
            prepared++;
        }
    }
    if (r == 0)
        r = start_from_template(t, jobs, n, reterr);
    for (unsigned i = 0; i < prepared; i++) {
        if (jobs[i].started)
            afk_child_set_stdio(jobs[i].child, &setups[i]);
        afk_setup_release(&setups[i]);
        jobs[i].setup = NULL;
    }
    return r;
}

int
afk_start_many(struct afk_template *t, const struct anyfork_options *options,
               struct afk_template_job *jobs, unsigned n, struct anyfork_error *reterr)
{
    struct afk_setup *setups = AFK_ALLOC("malloc(setups)", malloc(CHUNK * sizeof *setups));
    int r = afk_check_caller(reterr);
    if (setups == NULL)
        r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "options");
    for (unsigned at = 0; at < n && r == 0; at += CHUNK)
        r = start_chunk(t, options, setups, jobs + at, n - at < CHUNK ? n - at : CHUNK, reterr);
    free(setups);
    return r;
}

int
afk_start(const struct afk_method *method, const struct afk_job *asked,
          struct anyfork_child **ret_child, struct anyfork_error *reterr)
{
    struct afk_job job = *asked;
    job.caller = PyThread_get_thread_ident();
    job.setup = NULL;
    bool in_main = PyInterpreterState_Get() == PyInterpreterState_Main();
    int r = afk_check_caller(reterr);
    if (r == 0)
        r = afk_method_probe(method, reterr);
    if (r < 0)
        return r;
    if (job.kind == AFK_JOB_CALLABLE && afk_method_pickles(method, in_main))
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0,
                        "callable: it runs in another interpreter, so must be pickled");
    if (job.options != NULL && method->process == AFK_PROCESS_NONE)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0,
                        "options: a thread of this process has none of its own");
    if (job.kind == AFK_JOB_C && method->target == AFK_TARGET_FRESH)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0,
                        "entry: this method runs pickled Python only");
    if (job.kind != AFK_JOB_PROGRAM && method->process == AFK_PROCESS_EXECUTED)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0,
                        "entry: this method starts programs: set argv");
    if (job.kind == AFK_JOB_PROGRAM && method->process != AFK_PROCESS_EXECUTED)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0,
                        "argv: only method exec starts programs");
    if (method->process == AFK_PROCESS_NONE)
        return method->start(method, &job, ret_child, reterr);
    return start_with_options(method, &job, ret_child, reterr);
}

int
anyfork_spawn_c(const char *method, anyfork_main entry, void *arg,
                const struct anyfork_options *options, struct anyfork_child **ret_child, struct anyfork_error *reterr)
{
    int r = afk_check_caller(reterr);
    if (r < 0)
        return r;
    const struct afk_method *row = method ? afk_method_find(method) : NULL;
    if (row == NULL)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0, "method: unknown name");
    if (entry == NULL)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0, "entry: NULL");
    if (ret_child == NULL)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0, "ret_child: NULL");
    struct afk_job job = {.kind = AFK_JOB_C, .options = options, .report_to = -1, .entry = entry, .arg = arg};
    return afk_start(row, &job, ret_child, reterr);
}

int
anyfork_spawn_callable(const char *method, PyObject *callable, PyObject *args,
                       const struct anyfork_options *options, struct anyfork_child **ret_child, struct anyfork_error *reterr)
{
    int r = afk_check_caller(reterr);
    if (r < 0)
        return r;
    const struct afk_method *row = method ? afk_method_find(method) : NULL;
    if (row == NULL)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0, "method: unknown name");
    if (callable == NULL || !PyCallable_Check(callable))
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0, "callable: not callable");
    if (args == NULL || !PyTuple_Check(args))
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0, "args: not a tuple");
    if (ret_child == NULL)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0, "ret_child: NULL");
    struct afk_job job = {.kind = AFK_JOB_CALLABLE,
                          .options = options,
                          .report_to = -1,
                          .callable = callable,
                          .args = args};
    return afk_start(row, &job, ret_child, reterr);
}
