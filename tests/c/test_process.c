/* A worker's handle: how it ends, who tells, and whose it is. */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAYLOAD_BYTES ((size_t)5 * 1000 * 1000 + 7) /* many pipes full */

static struct afk_child_view
view_of(struct anyfork_child *child)
{
    struct afk_child_view view;
    afk_child_view(child, &view);
    return view;
}

/* ---- how a worker ends --------------------------------------------------------- */

static int
ends_with_record(const struct afk_plan *plan, void *arg)
{
    int code = *(int *)arg;
    send_record(plan->status_fd, AFK_REPORT_READY, 0, NULL, 0);
    send_record(plan->status_fd, AFK_REPORT_EXIT, code, NULL, 0);
    return code;
}

static int
ends_without_record(const struct afk_plan *plan, void *arg)
{
    (void)plan;
    return *(int *)arg;
}

static int
waits_for_ever(const struct afk_plan *plan, void *arg)
{
    (void)arg;
    send_record(plan->status_fd, AFK_REPORT_READY, 0, NULL, 0);
    pause_for_ever();
}

static void
test_the_exit_record_tells_the_status(void **state)
{
    int code = 7, status = -1;
    (void)state;
    struct anyfork_child *child = start_worker(ends_with_record, &code);
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, &status), 0);
    assert_int_equal(status, 7 << 8);
    assert_int_equal(view_of(child).status_from, AFK_STATUS_FROM_REPORT);
    assert_true(view_of(child).ready);
    /* It is kept, and the worker reaped. */
    assert_int_equal(anyfork_child_wait(child, 0, NULL), 0);
    assert_int_equal(waitpid(anyfork_child_pid(child), NULL, WNOHANG), -1);
    anyfork_child_close(child);
}

static void
test_without_a_record_the_kernel_tells(void **state)
{
    int code = 9, status = -1;
    (void)state;
    struct anyfork_child *child = start_worker(ends_without_record, &code);
    assert_int_equal(anyfork_child_wait(child, -1, &status), 0);
    assert_int_equal(status, 9 << 8);
    assert_int_equal(view_of(child).status_from, AFK_STATUS_FROM_WAIT);
    assert_false(view_of(child).ready);
    anyfork_child_close(child);
}

/* PIDFD_GET_INFO tells from Linux 6.15 on; before, only that the status is lost. */
static void
check_stolen(struct anyfork_child *child, int expected)
{
    int status = -1, r = anyfork_child_wait(child, WAIT_NS, &status);
    enum afk_status_from from = view_of(child).status_from;
    if (r == 0) {
        assert_int_equal(from, AFK_STATUS_FROM_INFO);
        assert_int_equal(status, expected);
    }
    else {
        assert_int_equal(r, ANYFORK_EREAPED);
        assert_int_equal(from, AFK_STATUS_LOST);
    }
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, NULL), r);
}

static void
steal(struct anyfork_child *child)
{
    int status;
    pid_t pid;
    do
        pid = waitpid(-1, &status, 0);
    while (pid < 0 && errno == EINTR);
    assert_int_equal(pid, anyfork_child_pid(child));
}

static void
test_a_thief_does_not_hide_the_status(void **state)
{
    int code = 3, status = -1;
    (void)state;
    struct anyfork_child *child = start_worker(ends_with_record, &code);
    steal(child);
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, &status), 0);
    assert_int_equal(status, 3 << 8);
    anyfork_child_close(child);

    child = start_worker(ends_without_record, &code);
    steal(child);
    check_stolen(child, 3 << 8);
    anyfork_child_close(child);

    child = start_worker(waits_for_ever, NULL);
    assert_int_equal(anyfork_child_signal(child, SIGTERM), 0);
    steal(child);
    check_stolen(child, SIGTERM);
    anyfork_child_close(child);
}

static void
test_ignored_sigchld_does_not_hide_the_status(void **state)
{
    const struct sigaction ignore = {.sa_handler = SIG_IGN};
    struct sigaction before;
    int code = 4, status = -1;
    (void)state;
    assert_int_equal(sigaction(SIGCHLD, &ignore, &before), 0);
    struct anyfork_child *child = start_worker(ends_with_record, &code);
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, &status), 0);
    assert_int_equal(status, 4 << 8);
    anyfork_child_close(child);

    child = start_worker(ends_without_record, &code);
    check_stolen(child, 4 << 8);
    anyfork_child_close(child);
    /* And one that is killed by the close. */
    anyfork_child_close(start_worker(waits_for_ever, NULL));
    assert_int_equal(sigaction(SIGCHLD, &before, NULL), 0);
}

static void
test_a_signal_reaches_it_and_is_told(void **state)
{
    int status = -1;
    (void)state;
    struct anyfork_child *child = start_worker(waits_for_ever, NULL);
    assert_int_equal(anyfork_child_wait(child, 0, &status), ANYFORK_ETIMEDOUT);
    errno = 0;
    assert_int_equal(anyfork_child_signal(child, 4096), ANYFORK_ESYSTEM);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(anyfork_child_signal(child, SIGTERM), 0);
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, &status), 0);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), SIGTERM);
    assert_int_equal(anyfork_child_signal(child, SIGTERM), 0);
    anyfork_child_close(child);
}

static void
test_close_kills_and_reaps(void **state)
{
    (void)state;
    struct anyfork_child *child = start_worker(waits_for_ever, NULL);
    pid_t pid = anyfork_child_pid(child);
    int pidfd = fcntl(anyfork_child_pidfd(child), F_DUPFD_CLOEXEC, 0);
    assert_true(pidfd >= 0);
    anyfork_child_close(child);
    wait_readable(pidfd);
    (void)close(pidfd);
    errno = 0;
    assert_int_equal(waitpid(pid, NULL, WNOHANG), -1);
    assert_int_equal(errno, ECHILD);
    anyfork_child_close(NULL);
}

static void
test_the_pidfd_is_readable_once_it_has_ended(void **state)
{
    int code = 0;
    (void)state;
    struct anyfork_child *child = start_worker(ends_without_record, &code);
    wait_readable(anyfork_child_pidfd(child));
    assert_int_equal(afk_child_poll(child), 1);
    assert_int_equal(afk_child_poll(child), 1);
    anyfork_child_close(child);
}

static void
test_ready_can_be_waited_for(void **state)
{
    int code = 5;
    (void)state;
    struct anyfork_child *child = start_worker(waits_for_ever, NULL);
    struct anyfork_error error;
    wait_readable(anyfork_child_report_fd(child));
    assert_int_equal(anyfork_child_wait_ready(child, WAIT_NS, &error), 0);
    assert_true(view_of(child).ready);
    assert_false(view_of(child).ended);
    anyfork_child_close(child);

    child = start_worker(ends_without_record, &code); /* never ready, but it ends */
    assert_int_equal(anyfork_child_wait_ready(child, WAIT_NS, NULL), ANYFORK_EDIED);
    assert_int_equal(anyfork_child_wait_ready(child, WAIT_NS, &error), ANYFORK_EDIED);
    assert_int_equal(error.stage, ANYFORK_STAGE_CHILD);
    assert_false(view_of(child).ready);
    assert_int_equal(anyfork_child_report_fd(child), -1);
    anyfork_child_close(child);
}

static void ticked(int sig) { (void)sig; }

static void
test_a_wait_goes_on_after_a_signal(void **state)
{
    const struct sigaction tick = {.sa_handler = ticked}; /* no SA_RESTART */
    const struct itimerval often = {{0, 5000}, {0, 5000}}, never = {{0, 0}, {0, 0}};
    struct sigaction before;
    int status = -1;
    (void)state;
    struct anyfork_child *child = start_worker(waits_for_ever, NULL);
    assert_int_equal(sigaction(SIGALRM, &tick, &before), 0);
    assert_int_equal(setitimer(ITIMER_REAL, &often, NULL), 0);
    assert_int_equal(afk_child_wait_step(child, AFK_UNTIL_ENDED, WAIT_NS), -EINTR);
    assert_int_equal(anyfork_child_wait(child, (int64_t)50 * 1000000, &status), ANYFORK_ETIMEDOUT);
    assert_int_equal(anyfork_child_signal(child, SIGKILL), 0);
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, &status), 0);
    assert_int_equal(setitimer(ITIMER_REAL, &never, NULL), 0);
    assert_int_equal(sigaction(SIGALRM, &before, NULL), 0);
    assert_int_equal(WTERMSIG(status), SIGKILL);
    anyfork_child_close(child);
}

/* ---- what it reports --------------------------------------------------------------- */

static int
sends_much(const struct afk_plan *plan, void *arg)
{
    char *data = malloc(PAYLOAD_BYTES);
    (void)arg;
    for (size_t i = 0; i < PAYLOAD_BYTES; i++)
        data[i] = (char)(i * 31);
    send_record(plan->status_fd, AFK_REPORT_READY, 0, NULL, 0);
    send_record(plan->status_fd, AFK_REPORT_RESULT, 0, data, PAYLOAD_BYTES);
    send_record(plan->status_fd, AFK_REPORT_EXIT, 0, NULL, 0);
    free(data);
    return 0;
}

static void
test_a_large_result_blocks_nobody(void **state)
{
    int status = -1;
    (void)state;
    struct anyfork_child *child = start_worker(sends_much, NULL);
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, &status), 0);
    assert_int_equal(status, 0);
    struct afk_child_view view = view_of(child);
    assert_int_equal(view.outcome, AFK_REPORT_RESULT);
    assert_int_equal(view.payload_size, PAYLOAD_BYTES);
    for (size_t i = 0; i < PAYLOAD_BYTES; i++)
        assert_int_equal(view.payload[i], (char)(i * 31));
    anyfork_child_close(child);
}

static void
test_a_large_result_that_nobody_takes_is_no_leak(void **state)
{
    (void)state;
    struct anyfork_child *child = start_worker(sends_much, NULL);
    assert_int_equal(afk_child_wait_step(child, AFK_UNTIL_READY, WAIT_NS), 0);
    anyfork_child_close(child);
}

static int
sends_half_a_payload(const struct afk_plan *plan, void *arg)
{
    (void)arg;
    send_record(plan->status_fd, AFK_REPORT_RESULT, 0, NULL, 1000); /* promised */
    (void)afk_os_write_all(plan->status_fd, "half", 4);
    return 0;
}

static int
promises_all_memory(const struct afk_plan *plan, void *arg)
{
    (void)arg;
    send_record(plan->status_fd, AFK_REPORT_RESULT, 0, NULL, SIZE_MAX / 2);
    for (int i = 0; i < 5000; i++)
        (void)afk_os_write_all(plan->status_fd, "not that much", 13);
    return 0;
}

static int
sends_half_a_record(const struct afk_plan *plan, void *arg)
{
    (void)arg;
    (void)afk_os_write_all(plan->status_fd, "AFK1 and then", 13);
    return 0;
}

/* User code that writes into our pipe. It is our end that closes then. */
static int
sends_garbage(const struct afk_plan *plan, void *arg)
{
    char garbage[3000];
    (void)arg;
    memset(garbage, 'g', sizeof garbage);
    (void)signal(SIGPIPE, SIG_IGN);
    send_record(plan->status_fd, AFK_REPORT_READY, 0, NULL, 0);
    for (int i = 0; i < 100; i++)
        (void)afk_os_write_all(plan->status_fd, garbage, sizeof garbage);
    return 0;
}

static void
test_what_is_no_result_is_not_taken_for_one(void **state)
{
    static const worker_body bodies[] = {sends_half_a_payload, promises_all_memory,
                                         sends_half_a_record, sends_garbage};
    (void)state;
    for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++) {
        int status = -1;
        struct anyfork_child *child = start_worker(bodies[i], NULL);
        assert_int_equal(anyfork_child_wait(child, WAIT_NS, &status), 0);
        assert_int_equal(status, 0);
        struct afk_child_view view = view_of(child);
        assert_int_equal(view.outcome, 0);
        assert_null(view.payload);
        assert_int_equal(view.status_from, AFK_STATUS_FROM_WAIT);
        anyfork_child_close(child);
    }
}

/* A view's payload points into the handle: a second one must not replace it. */
static int
sends_two_results(const struct afk_plan *plan, void *arg)
{
    (void)arg;
    (void)signal(SIGPIPE, SIG_IGN);
    send_record(plan->status_fd, AFK_REPORT_RESULT, 0, "first", 5);
    struct afk_report second = {.magic = AFK_REPORT_MAGIC,
                                .kind = AFK_REPORT_RESULT,
                                .payload_bytes = 6};
    if (afk_report_write(plan->status_fd, &second) == 0)
        (void)afk_os_write_all(plan->status_fd, "second", 6);
    return 0;
}

static void
test_the_first_outcome_counts(void **state)
{
    (void)state;
    struct anyfork_child *child = start_worker(sends_two_results, NULL);
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, NULL), 0);
    struct afk_child_view view = view_of(child);
    assert_int_equal(view.payload_size, 5);
    assert_memory_equal(view.payload, "first", 5);
    anyfork_child_close(child);
}

/* A grandchild keeps the write end: there is no end-of-file to wait for. */
static int
leaves_a_grandchild(const struct afk_plan *plan, void *arg)
{
    struct gate **gates = arg;
    int code = 6;
    if (fork() == 0) {
        gate_wait(gates[0]);
        _exit(0);
    }
    return ends_with_record(plan, &code);
}

static void
test_a_grandchild_does_not_delay_the_end(void **state)
{
    struct gate *gate = gate_new();
    int status = -1;
    (void)state;
    assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), 0);
    struct anyfork_child *child = start_worker(leaves_a_grandchild, &gate);
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, &status), 0);
    assert_int_equal(status, 6 << 8);
    anyfork_child_close(child);
    gate_open(gate);
    assert_true(waitpid(-1, &status, 0) > 0);
    assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0), 0);
    gate_free(gate);
}

/* ---- whose it is --------------------------------------------------------------------- */

static void
test_a_handle_in_a_forked_child_is_foreign(void **state)
{
    (void)state;
    struct anyfork_child *child = start_worker(waits_for_ever, NULL);
    assert_int_equal(afk_child_wait_step(child, AFK_UNTIL_READY, WAIT_NS), 0);
    struct afk_child_view ours = view_of(child);
    pid_t pid = fork();
    if (pid == 0) {
        struct afk_child_view view = view_of(child);
        int status;
        if (!view.foreign || view.pid != ours.pid || view.pidfd != -1 || view.status_fd != -1)
            _exit(1);
        if (fd_is_open(ours.pidfd) || fd_is_open(ours.status_fd))
            _exit(2);
        if (anyfork_child_pidfd(child) != -1 || anyfork_child_pid(child) != ours.pid)
            _exit(3);
        if (anyfork_child_wait(child, 0, &status) != ANYFORK_EFOREIGN ||
            afk_child_poll(child) != ANYFORK_EFOREIGN)
            _exit(4);
        if (anyfork_child_signal(child, SIGKILL) != ANYFORK_EFOREIGN)
            _exit(5);
        int before = count_fds();
        anyfork_child_close(child);
        _exit(count_fds() == before ? 0 : 6);
    }
    assert_int_equal(reap(pid), 0);
    assert_int_equal(anyfork_child_wait(child, 0, NULL), ANYFORK_ETIMEDOUT); /* it lives */
    anyfork_child_close(child);
}

/* ---- a worker ends with its owner ------------------------------------------------------ */

struct scene {
    struct gate *ready; /* the worker is where it wants to be */
    struct gate *never;
    bool closes_all;
    bool has_stranger;
    bool fds_are_taken;
};

static int
works_for_owner(const struct afk_plan *plan, void *arg)
{
    struct scene *scene = arg;
    (void)plan;
    if (scene->closes_all)
        for (int fd = 0; fd < 1024; fd++)
            (void)close(fd);
    gate_open(scene->ready);
    pause_for_ever();
}

static _Noreturn void
owner(struct scene *scene, int pid_pipe)
{
    /* Holes below and above: the order of the fd numbers must be forced. */
    int taken[64];
    if (scene->fds_are_taken)
        for (int i = 0; i < 64; i++)
            taken[i] = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (scene->fds_are_taken)
        for (int i = 0; i < 64; i++)
            if (i < 4 || i % 7 == 0)
                (void)close(taken[i]);
    struct anyfork_child *child = start_worker(works_for_owner, scene);
    pid_t pid = anyfork_child_pid(child);
    if (scene->has_stranger && fork() == 0) {
        gate_open(scene->ready);
        gate_wait(scene->never);
        _exit(0);
    }
    (void)!write(pid_pipe, &pid, sizeof pid);
    pause_for_ever();
}

static void
check_dies_with_owner(struct scene scene)
{
    pid_t worker = 0;
    int fds[2], status = -1;

    scene.ready = gate_new();
    scene.never = gate_new();
    assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), 0);
    assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
    pid_t boss = fork();
    if (boss == 0)
        owner(&scene, fds[1]);
    assert_int_equal(afk_os_read(fds[0], &worker, sizeof worker), sizeof worker);
    gate_wait(scene.ready);
    if (scene.has_stranger)
        gate_wait(scene.ready);
    assert_int_equal(kill(boss, SIGKILL), 0);
    assert_int_equal(reap(boss), SIGKILL);
    status = reap(worker); /* ours now: we are the reaper */
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), SIGKILL);
    gate_open(scene.never);
    while (waitpid(-1, NULL, 0) > 0)
        ;
    assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0), 0);
    (void)close(fds[0]);
    (void)close(fds[1]);
    gate_free(scene.ready);
    gate_free(scene.never);
}

static void
test_a_worker_dies_with_its_owner(void **state)
{
    (void)state;
    check_dies_with_owner((struct scene){0});
}

static void
test_also_after_it_closed_every_fd(void **state)
{
    (void)state;
    check_dies_with_owner((struct scene){.closes_all = true});
}

static void
test_also_where_the_fd_numbers_have_holes(void **state)
{
    (void)state;
    check_dies_with_owner((struct scene){.closes_all = true, .fds_are_taken = true});
}

static void
test_also_while_another_child_of_the_owner_lives(void **state)
{
    (void)state;
    check_dies_with_owner((struct scene){.has_stranger = true});
    check_dies_with_owner((struct scene){.has_stranger = true, .closes_all = true});
}

/* A worker that is killed before its owner has a pidfd of it: its death is told by
 * its wait status, and the owner gets no SIGPIPE. */
static void
test_a_worker_killed_before_its_byte(void **state)
{
    struct anyfork_child *child = NULL;
    struct afk_plan plan;
    siginfo_t info;
    int status = -1;
    (void)state;
    (void)signal(SIGPIPE, SIG_DFL);
    afk_plan_init(&plan);
    assert_int_equal(afk_child_new(&child, &plan, &ordinary_worker, NULL), 0);
    pid_t pid = afk_fork(&plan);
    if (pid == 0)
        pause_for_ever();
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT), 0);
    assert_int_equal(afk_child_adopt(child, pid, &plan, NULL), 0);
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, &status), 0);
    assert_int_equal(status, SIGKILL);
    assert_int_equal(view_of(child).read_errno, 0);
    anyfork_child_close(child);

    /* And after its owner's byte, which it has not read. */
    afk_plan_init(&plan);
    assert_int_equal(afk_child_new(&child, &plan, &ordinary_worker, NULL), 0);
    pid = afk_fork(&plan);
    if (pid == 0)
        pause_for_ever();
    assert_int_equal(kill(pid, SIGSTOP), 0);
    assert_int_equal(waitid(P_PID, (id_t)pid, &info, WSTOPPED), 0);
    assert_int_equal(afk_child_adopt(child, pid, &plan, NULL), 0);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, &status), 0);
    assert_int_equal(status, SIGKILL);
    assert_int_equal(view_of(child).read_errno, 0);
    anyfork_child_close(child);
}

/* ---- bounds ---------------------------------------------------------------------------- */

static void
test_no_fd_left(void **state)
{
    struct rlimit limit, low;
    struct afk_plan plan;
    struct anyfork_error error;
    struct anyfork_child *child = NULL;
    (void)state;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    int lowest = open("/dev/null", O_RDONLY | O_CLOEXEC);
    int before = count_fds();
    for (rlim_t room = 1; room < 8; room++) {
        low = limit;
        low.rlim_cur = (rlim_t)lowest + room;
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
        afk_plan_init(&plan);
        int r = afk_child_new(&child, &plan, &ordinary_worker, &error);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
        if (r < 0) {
            assert_int_equal(error.stage, ANYFORK_STAGE_PIPE);
            /* F_DUPFD answers EINVAL where its lowest number is above the limit. */
            assert_int_equal(error.sys_errno, EMFILE);
            assert_null(child);
        }
        else {
            assert_int_equal(afk_child_adopt(child, -1, &plan, NULL), 0);
            anyfork_child_close(child);
            child = NULL;
        }
        assert_int_equal(count_fds(), before);
    }
    (void)close(lowest);
}

static void
test_many_workers_at_once(void **state)
{
    enum { N = 100 };
    struct anyfork_child *children[N];
    int codes[N];
    (void)state;
    for (int i = 0; i < N; i++) {
        codes[i] = i;
        children[i] = start_worker(i % 2 ? ends_with_record : ends_without_record, &codes[i]);
    }
    for (int i = N - 1; i >= 0; i--) {
        int status = -1;
        assert_int_equal(anyfork_child_wait(children[i], WAIT_NS, &status), 0);
        assert_int_equal(status, i << 8);
        anyfork_child_close(children[i]);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        CHECKED(test_the_exit_record_tells_the_status),
        CHECKED(test_without_a_record_the_kernel_tells),
        CHECKED(test_a_thief_does_not_hide_the_status),
        CHECKED(test_ignored_sigchld_does_not_hide_the_status),
        CHECKED(test_a_signal_reaches_it_and_is_told),
        CHECKED(test_close_kills_and_reaps),
        CHECKED(test_the_pidfd_is_readable_once_it_has_ended),
        CHECKED(test_ready_can_be_waited_for),
        CHECKED(test_a_wait_goes_on_after_a_signal),
        CHECKED(test_a_large_result_blocks_nobody),
        CHECKED(test_a_large_result_that_nobody_takes_is_no_leak),
        CHECKED(test_what_is_no_result_is_not_taken_for_one),
        CHECKED(test_the_first_outcome_counts),
        CHECKED(test_a_grandchild_does_not_delay_the_end),
        CHECKED(test_a_handle_in_a_forked_child_is_foreign),
        CHECKED(test_a_worker_dies_with_its_owner),
        CHECKED(test_also_after_it_closed_every_fd),
        CHECKED(test_also_where_the_fd_numbers_have_holes),
        CHECKED(test_also_while_another_child_of_the_owner_lives),
        CHECKED(test_a_worker_killed_before_its_byte),
        CHECKED(test_no_fd_left),
        CHECKED(test_many_workers_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
