/* What a child does between fork(2) and its first Python: the plan, carried out. */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

/* Forks by the plan; the child's exit code is check()'s. */
static int
child_answers(struct afk_plan *plan, int (*check)(void))
{
    pid_t pid = afk_fork(plan);
    if (pid == 0)
        _exit(check());
    assert_true(pid > 0);
    int status = reap(pid);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

/* ---- stores, wakeup fd ------------------------------------------------------------ */

static void *cell[4] = {NULL, NULL, NULL, NULL};
static int wakeup_fd = 17;

static int
set_wakeup_fd(int fd)
{
    wakeup_fd = fd;
    return 17;
}

static int
cells_are_set(void)
{
    return cell[0] == cell && cell[1] == NULL && cell[2] == (void *)5 && wakeup_fd == -1 ? 0 : 1;
}

static void
test_stores_are_made_in_the_child_only(void **state)
{
    struct afk_plan plan;
    (void)state;
    afk_plan_init(&plan);
    cell[1] = (void *)1;
    assert_int_equal(afk_plan_store(&plan, &cell[0], cell), 0);
    assert_int_equal(afk_plan_store(&plan, &cell[1], NULL), 0);
    assert_int_equal(afk_plan_store(&plan, &cell[2], (void *)4), 0);
    assert_int_equal(afk_plan_store(&plan, &cell[2], (void *)5), 0); /* in order */
    plan.set_wakeup_fd = set_wakeup_fd;
    assert_int_equal(child_answers(&plan, cells_are_set), 0);
    assert_null(cell[0]);
    assert_ptr_equal(cell[1], (void *)1);
    assert_int_equal(wakeup_fd, 17);
}

static void
test_the_plan_is_bounded(void **state)
{
    static struct afk_plan plan;
    void *target = NULL;
    (void)state;
    afk_plan_init(&plan);
    for (int i = 0; i < AFK_STORES_MAX; i++)
        assert_int_equal(afk_plan_store(&plan, &target, NULL), 0);
    assert_int_equal(afk_plan_store(&plan, &target, NULL), -ENOSPC);
    assert_int_equal(plan.n_stores, AFK_STORES_MAX);
}

/* ---- dispositions ------------------------------------------------------------------ */

static void handler(int sig) { (void)sig; }
static void handler3(int sig, siginfo_t *info, void *context) { (void)sig; (void)info; (void)context; }

static const int signals[] = {SIGTERM, SIGINT, SIGPIPE, SIGCHLD, SIGUSR1};
enum { N_SIGNALS = sizeof signals / sizeof *signals };

/* SIGTERM and SIGUSR1 handled, SIGINT with SA_SIGINFO, SIGPIPE and SIGCHLD ignored. */
static void
dirty_dispositions(struct sigaction *before)
{
    struct sigaction with_info = {.sa_flags = SA_SIGINFO};
    with_info.sa_sigaction = handler3;
    for (int i = 0; i < N_SIGNALS; i++)
        assert_int_equal(sigaction(signals[i], NULL, &before[i]), 0);
    assert_int_equal(sigaction(SIGINT, &with_info, NULL), 0);
    (void)signal(SIGTERM, handler);
    (void)signal(SIGUSR1, handler);
    (void)signal(SIGPIPE, SIG_IGN);
    (void)signal(SIGCHLD, SIG_IGN);
    (void)signal(SIGRTMIN + 3, handler);
}

static void
clean_dispositions(const struct sigaction *before)
{
    for (int i = 0; i < N_SIGNALS; i++)
        (void)sigaction(signals[i], &before[i], NULL);
    (void)signal(SIGRTMIN + 3, SIG_DFL);
}

static bool
is_now(int sig, void (*expected)(int))
{
    struct sigaction now;
    if (sigaction(sig, NULL, &now) < 0)
        return false;
    return (now.sa_flags & SA_SIGINFO) == 0 && now.sa_handler == expected;
}

static int
all_default(void)
{
    return !is_now(SIGTERM, SIG_DFL) * 1 + !is_now(SIGINT, SIG_DFL) * 2 +
           !is_now(SIGPIPE, SIG_IGN) * 4 + /* stays, as over an exec */
           !is_now(SIGCHLD, SIG_DFL) * 8 + !is_now(SIGUSR1, SIG_DFL) * 16 +
           !is_now(SIGRTMIN + 3, SIG_DFL) * 32;
}

static int
listed_default(void)
{
    return !is_now(SIGTERM, SIG_DFL) * 1 + !is_now(SIGUSR1, handler) * 2 +
           !is_now(SIGPIPE, SIG_IGN) * 4 + !is_now(SIGCHLD, SIG_IGN) * 8;
}

static int
all_kept(void)
{
    return !is_now(SIGTERM, handler) * 1 + !is_now(SIGUSR1, handler) * 2 +
           !is_now(SIGPIPE, SIG_IGN) * 4 + !is_now(SIGCHLD, SIG_IGN) * 8 +
           is_now(SIGINT, SIG_DFL) * 16;
}

/* SIGCHLD is ignored in these: the child's answer comes by a pipe. */
static int
answer_with(enum afk_dispositions dispositions, int (*check)(void))
{
    struct sigaction before[N_SIGNALS];
    struct afk_plan plan;
    int fds[2];
    unsigned char answer = 255;

    assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
    dirty_dispositions(before);
    afk_plan_init(&plan);
    plan.dispositions = dispositions;
    (void)sigaddset(&plan.reset, SIGTERM);
    pid_t pid = afk_fork(&plan);
    if (pid == 0) {
        answer = (unsigned char)check();
        _exit(write(fds[1], &answer, 1) == 1 ? 0 : 1);
    }
    assert_true(pid > 0);
    (void)close(fds[1]);
    assert_int_equal(afk_os_read(fds[0], &answer, 1), 1);
    (void)close(fds[0]);
    while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
        ;
    clean_dispositions(before);
    return answer;
}

static void
test_a_worker_gets_default_dispositions(void **state)
{
    (void)state;
    assert_int_equal(answer_with(AFK_DISPOSITIONS_DEFAULT, all_default), 0);
}

static void
test_a_twin_loses_the_listed_handlers_only(void **state)
{
    (void)state;
    assert_int_equal(answer_with(AFK_DISPOSITIONS_RESET_LISTED, listed_default), 0);
}

static void
test_a_plain_fork_keeps_all_handlers(void **state)
{
    (void)state;
    assert_int_equal(answer_with(AFK_DISPOSITIONS_KEEP, all_kept), 0);
}

/* ---- mask --------------------------------------------------------------------------- */

static int
mask_is_full(void)
{
    sigset_t now;
    return sigprocmask(SIG_SETMASK, NULL, &now) == 0 && sigismember(&now, SIGTERM) == 1 &&
                   sigismember(&now, SIGINT) == 1 && sigismember(&now, SIGUSR2) == 0
               ? 0
               : 1;
}

static int
mask_is_empty(void)
{
    sigset_t now;
    if (sigprocmask(SIG_SETMASK, NULL, &now) < 0)
        return 1;
    for (int sig = 1; sig < NSIG; sig++)
        if (sigismember(&now, sig) == 1)
            return 2;
    return 0;
}

static void
test_the_mask_is_the_callers_or_empty(void **state)
{
    sigset_t most, before, after;
    struct afk_plan plan;
    (void)state;
    (void)sigfillset(&most);
    (void)sigdelset(&most, SIGUSR2);
    (void)sigdelset(&most, SIGALRM);
    assert_int_equal(sigprocmask(SIG_SETMASK, &most, &before), 0);
    afk_plan_init(&plan); /* a fork() */
    int kept = child_answers(&plan, mask_is_full);
    afk_plan_init(&plan); /* a worker */
    plan.keep_mask = false;
    int emptied = child_answers(&plan, mask_is_empty);
    int in_parent = mask_is_full();
    assert_int_equal(sigprocmask(SIG_SETMASK, &before, &after), 0);
    assert_int_equal(kept, 0);
    assert_int_equal(emptied, 0);
    assert_int_equal(in_parent, 0);
}

/* A handler of the parent must never run in a child that is not repaired: the
 * signal comes while the child still waits for its owner's byte. */
static volatile sig_atomic_t handled_by_parents_handler;
static void parents_handler(int sig) { (void)sig; handled_by_parents_handler = 1; }

static int
waits_for_the_signal(void)
{
    if (handled_by_parents_handler)
        return 1;
    pause_for_ever();
}

static void
test_a_signal_before_the_repair_waits_until_after_it(void **state)
{
    struct sigaction before;
    struct afk_plan plan;
    int sockets[2];
    (void)state;
    assert_int_equal(afk_os_socketpair(sockets, SOCK_STREAM), 0);
    const struct sigaction mine = {.sa_handler = parents_handler};
    assert_int_equal(sigaction(SIGTERM, &mine, &before), 0);
    afk_plan_init(&plan);
    plan.dispositions = AFK_DISPOSITIONS_DEFAULT;
    plan.keep_mask = false;
    plan.status_fd = sockets[1];
    pid_t pid = afk_fork(&plan);
    if (pid == 0)
        _exit(waits_for_the_signal());
    assert_int_equal(kill(pid, SIGTERM), 0);
    assert_int_equal(write(sockets[0], "g", 1), 1);
    assert_int_equal(reap(pid), SIGTERM);
    assert_int_equal(sigaction(SIGTERM, &before, NULL), 0);
    (void)close(sockets[0]);
    (void)close(sockets[1]);
}

/* ---- lifeline ------------------------------------------------------------------------- */

static int say_zero(void) { return 0; }

/* A child whose owner has closed its end of the lifeline, and perhaps has sent its
 * byte; life_fd >= 0 stands in for the lifeline. */
static int
with_lifeline(bool byte, bool has_socket, struct afk_report *ret_report, int life_fd)
{
    struct afk_plan plan;
    int life[2], sockets[2], answer;
    assert_int_equal(pipe2(life, O_CLOEXEC), 0);
    assert_int_equal(afk_os_socketpair(sockets, SOCK_STREAM), 0);
    if (byte)
        assert_int_equal(write(sockets[0], "g", 1), 1);
    else
        assert_int_equal(shutdown(sockets[0], SHUT_WR), 0);
    if (life_fd < 0)
        (void)close(life[1]);
    afk_plan_init(&plan);
    plan.life_fd = life_fd >= 0 ? life_fd : life[0];
    plan.status_fd = has_socket ? sockets[1] : -1;
    answer = child_answers(&plan, say_zero);
    (void)close(sockets[1]);
    if (ret_report != NULL)
        assert_int_equal(afk_os_read(sockets[0], ret_report, sizeof *ret_report),
                         sizeof *ret_report);
    (void)close(sockets[0]);
    (void)close(life[0]);
    if (life_fd >= 0)
        (void)close(life[1]);
    return answer;
}

static void
test_an_owner_that_died_first_is_noticed(void **state)
{
    int life[2];
    (void)state;
    /* By its lifeline; and by its socket alone, before the byte. */
    assert_int_equal(with_lifeline(true, true, NULL, -1), AFK_EXIT_ORPHANED);
    assert_int_equal(pipe2(life, O_CLOEXEC), 0);
    assert_int_equal(with_lifeline(false, true, NULL, life[0]), AFK_EXIT_ORPHANED);
    (void)close(life[0]);
    (void)close(life[1]);
}

/* fcntl(2) refuses F_GETFL of nothing. */
static int
no_fd(void)
{
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    assert_true(fd >= 0);
    int high = fcntl(fd, F_DUPFD_CLOEXEC, 100);
    assert_true(high >= 0);
    (void)close(fd);
    (void)close(high);
    return high;
}

static void
test_a_lifeline_that_cannot_be_armed_is_reported(void **state)
{
    struct afk_report report;
    (void)state;
    assert_int_equal(with_lifeline(true, true, &report, no_fd()), AFK_EXIT_SETUP);
    assert_int_equal(afk_report_check(&report), 0);
    assert_int_equal(report.kind, AFK_REPORT_ERROR);
    assert_int_equal(report.stage, ANYFORK_STAGE_LIFELINE);
    assert_int_equal(report.sys_errno, EBADF);
    assert_true(strlen(report.detail) > 0);
}

static void
test_giving_up_without_a_socket_is_an_exit_code(void **state)
{
    (void)state;
    assert_int_equal(with_lifeline(true, false, NULL, no_fd()), AFK_EXIT_SETUP);
}

/* An owner that dies between the fork and its byte. */
static void
test_an_owner_killed_before_its_byte(void **state)
{
    int fds[2];
    pid_t worker = 0;
    (void)state;
    assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), 0);
    assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
    pid_t boss = fork();
    if (boss == 0) {
        struct anyfork_child *child;
        struct afk_plan plan;
        afk_plan_init(&plan);
        if (afk_child_new(&child, &plan, &ordinary_worker, NULL) < 0)
            _exit(1);
        pid_t pid = afk_fork(&plan);
        if (pid == 0)
            _exit(0);
        (void)!write(fds[1], &pid, sizeof pid);
        _exit(0); /* without afk_child_adopt() */
    }
    assert_int_equal(afk_os_read(fds[0], &worker, sizeof worker), sizeof worker);
    assert_int_equal(reap(boss), 0);
    int status = reap(worker); /* it noticed; or it was armed already, and killed */
    assert_true(status == AFK_EXIT_ORPHANED << 8 || status == SIGKILL);
    assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0), 0);
    (void)close(fds[0]);
    (void)close(fds[1]);
}

/* ---- terminal ------------------------------------------------------------------------- */

static int
has_terminal(void)
{
    if (!isatty(0) || !isatty(1) || !isatty(2))
        return 1;
    if (getsid(0) != getpid() || tcgetpgrp(0) != getpid())
        return 2;
    for (int fd = 0; fd <= 2; fd++)
        if ((fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0)
            return 3;
    int tty = open("/dev/tty", O_RDWR | O_CLOEXEC);
    if (tty < 0)
        return 4;
    (void)close(tty);
    return write(1, "hello\n", 6) == 6 ? 0 : 5;
}

static void
test_a_pty_is_the_childs_terminal(void **state)
{
    struct afk_plan plan;
    int master, slave;
    char said[16] = "";
    (void)state;
    assert_true(afk_os_openpty(&master, &slave) >= 0);
    assert_true((fcntl(master, F_GETFD) & FD_CLOEXEC) != 0);
    afk_plan_init(&plan);
    plan.tty_fd = slave;
    plan.tty_master_fd = master;
    assert_int_equal(child_answers(&plan, has_terminal), 0);
    assert_int_equal(afk_os_read(master, said, sizeof said - 1), 7);
    assert_string_equal(said, "hello\r\n");
    (void)close(slave);
    (void)close(master);
}

static void
test_what_is_no_terminal_is_reported(void **state)
{
    struct afk_plan plan;
    struct afk_report report;
    int fds[2], sockets[2];
    (void)state;
    assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
    assert_int_equal(afk_os_socketpair(sockets, SOCK_STREAM), 0);
    assert_int_equal(write(sockets[0], "g", 1), 1);
    afk_plan_init(&plan);
    plan.tty_fd = fds[0];
    plan.tty_master_fd = fds[1];
    plan.status_fd = sockets[1];
    assert_int_equal(child_answers(&plan, say_zero), AFK_EXIT_SETUP);
    assert_int_equal(afk_os_read(sockets[0], &report, sizeof report), sizeof report);
    assert_int_equal(report.stage, ANYFORK_STAGE_PTY);
    assert_int_equal(report.sys_errno, ENOTTY);
    for (int i = 0; i < 2; i++) {
        (void)close(fds[i]);
        (void)close(sockets[i]);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        CHECKED(test_stores_are_made_in_the_child_only),
        CHECKED(test_the_plan_is_bounded),
        CHECKED(test_a_worker_gets_default_dispositions),
        CHECKED(test_a_twin_loses_the_listed_handlers_only),
        CHECKED(test_a_plain_fork_keeps_all_handlers),
        CHECKED(test_the_mask_is_the_callers_or_empty),
        CHECKED(test_a_signal_before_the_repair_waits_until_after_it),
        CHECKED(test_an_owner_that_died_first_is_noticed),
        CHECKED(test_a_lifeline_that_cannot_be_armed_is_reported),
        CHECKED(test_giving_up_without_a_socket_is_an_exit_code),
        CHECKED(test_an_owner_killed_before_its_byte),
        CHECKED(test_a_pty_is_the_childs_terminal),
        CHECKED(test_what_is_no_terminal_is_reported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
