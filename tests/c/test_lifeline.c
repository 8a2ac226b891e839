/* The table of fds that every forked child closes. */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define MANY 700 /* three chunks of the table */

static int
open_null(void)
{
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert_true(fd >= 0);
    return fd;
}

/* How many of them are open, in a forked child. */
static int
open_in_child(const int *fds, int n)
{
    pid_t pid = fork();
    if (pid == 0) {
        int open = 0;
        for (int i = 0; i < n; i++)
            open += fd_is_open(fds[i]);
        _exit(open < 200 ? open : 200);
    }
    assert_true(pid > 0);
    int status = reap(pid);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void
test_a_registered_fd_is_closed_in_the_child_only(void **state)
{
    int fds[2] = {open_null(), open_null()};
    (void)state;

    assert_int_equal(afk_lifeline_register(fds[0], false), 0);
    assert_int_equal(open_in_child(fds, 2), 1);
    assert_true(fd_is_open(fds[0]));
    int number = fds[0];
    afk_lifeline_close(&fds[0]);
    assert_int_equal(fds[0], -1);
    assert_false(fd_is_open(number));
    afk_lifeline_close(&fds[0]); /* -1 is fine */

    /* The number is somebody else's now: no longer closed. */
    fds[0] = fcntl(fds[1], F_DUPFD_CLOEXEC, number);
    assert_int_equal(open_in_child(fds, 2), 2);
    (void)close(fds[0]);
    (void)close(fds[1]);
}

static void
test_an_fd_that_was_never_registered_is_closed_all_the_same(void **state)
{
    int fd = open_null(), number = fd;
    (void)state;
    afk_lifeline_close(&fd);
    assert_int_equal(fd, -1);
    assert_false(fd_is_open(number));
}

static void
test_more_fds_than_one_chunk_holds(void **state)
{
    static int fds[MANY];
    struct rlimit limit;
    (void)state;

    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    if (limit.rlim_cur < MANY + 50) {
        limit.rlim_cur = MANY + 50;
        if (setrlimit(RLIMIT_NOFILE, &limit) < 0) {
            print_message("[  SKIPPED ] RLIMIT_NOFILE is below %d and cannot be raised\n", MANY);
            skip();
        }
    }
    for (int i = 0; i < MANY; i++) {
        fds[i] = open_null();
        assert_int_equal(afk_lifeline_register(fds[i], false), 0);
    }
    assert_int_equal(open_in_child(fds, MANY), 0);
    for (int i = 0; i < MANY; i++)
        assert_true(fd_is_open(fds[i]));
    /* Every other one; the freed slots are used again. */
    for (int i = 0; i < MANY; i += 2)
        afk_lifeline_close(&fds[i]);
    for (int i = 0; i < MANY; i += 2) {
        fds[i] = open_null();
        assert_int_equal(afk_lifeline_register(fds[i], false), 0);
    }
    assert_int_equal(open_in_child(fds, MANY), 0);
    for (int i = 0; i < MANY; i++)
        afk_lifeline_close(&fds[i]);
}

static void
test_the_generation_counts_forks(void **state)
{
    unsigned here = afk_generation();
    (void)state;

    pid_t pid = fork();
    if (pid == 0) {
        if (afk_generation() != here + 1)
            _exit(1);
        pid_t grandchild = fork();
        if (grandchild == 0)
            _exit(afk_generation() == here + 2 ? 0 : 2);
        int status = -1;
        (void)waitpid(grandchild, &status, 0);
        _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 3);
    }
    assert_int_equal(reap(pid), 0);
    assert_int_equal(afk_generation(), here);
}

static atomic_int hooks_run;
static void hook(void) { atomic_fetch_add(&hooks_run, 1); }

static void
test_hooks_run_in_a_child(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++)
        afk_at_fork_child(hook);
    pid_t pid = fork();
    if (pid == 0)
        _exit(atomic_load(&hooks_run));
    assert_int_equal(reap(pid), 4 << 8);
    assert_int_equal(atomic_load(&hooks_run), 0);
}

/* ---- no fork between making a write end and registering it ----------------------- */

static atomic_bool window_closed;

static void *
fork_now(void *arg)
{
    pid_t pid = fork();
    if (pid == 0)
        _exit(atomic_load(&window_closed) ? 0 : 1);
    *(int *)arg = reap(pid);
    return NULL;
}

static void
test_a_fork_waits_for_an_open_window(void **state)
{
    pthread_t thread;
    int status = -1;
    (void)state;

    bool begun = afk_lifeline_begin();
    assert_true(begun);
    assert_int_equal(pthread_create(&thread, NULL, fork_now, &status), 0);
    (void)usleep(100000); /* time for the fork to be wrong */
    atomic_store(&window_closed, true);
    afk_lifeline_end(begun);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_int_equal(status, 0);
}

static void
test_a_fork_inside_its_own_window_is_late_but_works(void **state)
{
    (void)state;
    bool begun = afk_lifeline_begin();
    pid_t pid = fork();
    if (pid == 0) { /* a window of its own: none is open here */
        bool again = afk_lifeline_begin();
        afk_lifeline_end(again);
        _exit(again ? 0 : 1);
    }
    afk_lifeline_end(begun);
    assert_int_equal(reap(pid), 0);
    pid = fork();
    if (pid == 0)
        _exit(0);
    assert_int_equal(reap(pid), 0);
}

/* ---- no locks: forks beside threads that open and close -------------------------- */

static atomic_bool stop;

static void *
open_and_close(void *arg)
{
    (void)arg;
    while (!atomic_load(&stop)) {
        int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
        if (fd < 0)
            continue;
        (void)afk_lifeline_register(fd, false);
        afk_lifeline_close(&fd);
    }
    return NULL;
}

static void
test_a_fork_beside_busy_threads_closes_no_innocent_fd(void **state)
{
    pthread_t threads[3];
    int mine[8];
    (void)state;

    atomic_store(&stop, false);
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, open_and_close, NULL), 0);
    int rounds = getenv("ANYFORK_TEST_SLOW") != NULL ? 10 : 200; /* valgrind: one thread at a time */
    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < 8; i++)
            mine[i] = open_null();
        assert_int_equal(open_in_child(mine, 8), 8);
        for (int i = 0; i < 8; i++)
            (void)close(mine[i]);
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_join(threads[i], NULL), 0);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        CHECKED(test_a_registered_fd_is_closed_in_the_child_only),
        CHECKED(test_an_fd_that_was_never_registered_is_closed_all_the_same),
        CHECKED(test_more_fds_than_one_chunk_holds),
        CHECKED(test_the_generation_counts_forks),
        CHECKED(test_hooks_run_in_a_child),
        CHECKED(test_a_fork_waits_for_an_open_window),
        CHECKED(test_a_fork_inside_its_own_window_is_late_but_works),
        CHECKED(test_a_fork_beside_busy_threads_closes_no_innocent_fd),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
