/*
 * The server of a template, where it meets Python: each standby is forked on a thread state
 * of its own, which has no frames of the template's.
 *
 * Rule: between two forks no Python runs here.
 */
#include "cpython/cpython.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/resource.h>

struct serving {
    PyObject *boot;
    struct afk_setup setup; /* of a standby: nothing but the defaults */
    int *keep; /* the standby's beside its own: room for two, then what streams write to */
    unsigned n_keep;
    bool siblings;
    struct rlimit files; /* of the owner's, and so of workers; the server has one for each worker */
};

static int
wait_for_messages(void *fds, unsigned n, int timeout_ms)
{
    int r;
    Py_BEGIN_ALLOW_THREADS
    r = poll(fds, n, timeout_ms);
    r = r < 0 ? -errno : r;
    Py_END_ALLOW_THREADS
    return r;
}

static pid_t
fork_standby(void *arg, const struct afk_standby *standby, int *ret_pidfd)
{
    struct serving *serving = arg;
    struct anyfork_error error = {0};
    struct afk_forking f;
    afk_forking_init(&f, AFK_FORK_WORKER);
    f.plan.setup = &serving->setup;
    f.plan.status_fd = standby->report_fd;
    f.plan.life_fd = standby->life_fd;
    f.plan.owner_holds_us = true; /* its parent does, and tells the owner */
    serving->keep[0] = standby->taken_fd;
    serving->keep[1] = standby->door_fd;
    f.plan.ret_sibling = serving->siblings ? ret_pidfd : NULL;
    f.plan.keep = serving->keep;
    f.plan.n_keep = serving->n_keep;
    pid_t pid = afk_fork_from(&f, &error);
    if (pid == 0) {
        (void)setrlimit(RLIMIT_NOFILE, &serving->files);
        afk_boot_run_standby(serving->boot, &f, standby, serving->keep);
    }
    return pid > 0 ? pid : error.sys_errno > 0 ? -error.sys_errno : -EAGAIN;
}

static int
keep_streams(struct serving *serving, struct anyfork_error *reterr)
{
    PyObject *bytes = PyObject_CallMethod(serving->boot, "descriptors_in_use", NULL);
    if (bytes == NULL || !PyBytes_Check(bytes)) {
        Py_XDECREF(bytes);
        return afk_fail_python(reterr, ANYFORK_STAGE_TEMPLATE, __LINE__, "descriptors in use");
    }
    size_t size = (size_t)PyBytes_GET_SIZE(bytes);
    serving->keep = AFK_ALLOC("malloc(keep)", malloc(2 * sizeof(int) + size));
    if (serving->keep != NULL)
        memcpy(serving->keep + 2, PyBytes_AS_STRING(bytes), size);
    serving->n_keep = 2 + (unsigned)(size / sizeof(int));
    Py_DECREF(bytes);
    return serving->keep != NULL
               ? 0
               : AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "template");
}

/* Before the limit is raised: workers have what is found here. */
static int
look_around(struct afk_surroundings *ret, struct afk_identity *ret_identity,
            struct anyfork_error *reterr)
{
    struct afk_proc_files files;
    int r = afk_proc_files_open(&files);
    if (r == 0) {
        r = afk_identity_read(&files, ret_identity, ret);
        if (r == 0)
            r = afk_identity_read_rest(&files, ret_identity);
        afk_proc_files_close(&files);
    }
    return r < 0 ? AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_TEMPLATE, -r, "/proc") : 0;
}

static int
serve(const struct afk_server_options *options, struct serving *serving, struct anyfork_error *reterr)
{
    int r = afk_server_run(options, fork_standby, wait_for_messages, serving);
    return r < 0 ? AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_TEMPLATE, -r, "serving") : 0;
}

int
afk_template_serve(const struct afk_server_options *options, struct anyfork_error *reterr)
{
    struct serving serving = {.siblings = options->siblings};
    struct afk_surroundings around;
    struct afk_identity identity;
    PyThreadState *from, *fresh;
    int r = afk_check_caller(reterr);
    if (r == 0)
        r = afk_layout_require(AFK_FEATURE_HOP, reterr);
    if (r == 0)
        r = afk_setup_prepare(&serving.setup, NULL, AFK_SETUP_FORK, -1, reterr);
    if (r < 0)
        return r;
    if (options->siblings && (r = afk_fork_sibling_prepare()) < 0)
        return AFK_FAIL(reterr, ANYFORK_EUNAVAILABLE, ANYFORK_STAGE_TEMPLATE, -r,
                        "parent: this C library is not understood: leave 'owner' out");
    serving.boot = afk_boot_prepare_fork(reterr);
    r = serving.boot != NULL ? keep_streams(&serving, reterr) : ANYFORK_EUNAVAILABLE;
    fresh = r == 0 ? afk_hop_enter(PyInterpreterState_Main(), &from) : NULL;
    if (r == 0 && fresh == NULL)
        r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "thread state");
    if (r == 0) {
        struct rlimit most;
        afk_layout_look_again();
        (void)getrlimit(RLIMIT_NOFILE, &serving.files);
        r = look_around(&around, &identity, reterr);
        most = (struct rlimit){serving.files.rlim_max, serving.files.rlim_max};
        (void)setrlimit(RLIMIT_NOFILE, &most);
        struct afk_server_options with = *options;
        with.around = &around;
        with.identity = &identity;
        if (r == 0)
            r = serve(&with, &serving, reterr);
        afk_swap_back(fresh, from);
    }
    Py_XDECREF(serving.boot);
    free(serving.keep);
    afk_setup_release(&serving.setup);
    return r;
}
