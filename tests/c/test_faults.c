/* Every system call and allocation of a worker's start, use and end, made to fail
 * in turn: once, and for good. Compiled with AFK_FAULTS. */
#include "harness.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/channel.h"
#include "core/heartbeat.h"

#define POINTS_MAX 200

static unsigned total_hits;

static int
child_body(const struct afk_plan *plan)
{
    (void)signal(SIGPIPE, SIG_IGN); /* as Python does; after a read error nobody listens */
    const struct afk_report ready = {.magic = AFK_REPORT_MAGIC, .kind = AFK_REPORT_READY};
    const struct afk_report result = {
        .magic = AFK_REPORT_MAGIC, .kind = AFK_REPORT_RESULT, .payload_bytes = 6};
    const struct afk_report end = {.magic = AFK_REPORT_MAGIC, .kind = AFK_REPORT_EXIT};
    (void)afk_report_write(plan->status_fd, &ready);
    (void)afk_report_write(plan->status_fd, &result);
    (void)afk_os_write_all(plan->status_fd, "result", 6);
    (void)afk_report_write(plan->status_fd, &end);
    return 0;
}

/* 0 with the right result, or the error. Faults do not reach into the child. */
static int
whole_life(struct anyfork_error *error)
{
    struct anyfork_child *child = NULL;
    struct afk_plan plan;
    struct afk_child_view view;
    int status = -1;

    memset(error, 0, sizeof *error);
    afk_plan_init(&plan);
    int r = afk_child_new(&child, &plan, &ordinary_worker, error);
    if (r < 0)
        return r;
    plan.dispositions = AFK_DISPOSITIONS_DEFAULT;
    plan.keep_mask = false;
    pid_t pid = afk_fork(&plan);
    if (pid == 0) {
        afk_fault_arm(0, 0, false);
        _exit(child_body(&plan));
    }
    r = afk_child_adopt(child, pid, &plan, error);
    if (pid < 0)
        r = AFK_FAIL(error, ANYFORK_ESYSTEM, ANYFORK_STAGE_FORK, -pid, NULL);
    if (r == 0) {
        r = anyfork_child_wait(child, WAIT_NS, &status);
        afk_child_view(child, &view);
        if (r == 0) {
            assert_int_equal(status, 0);
            if (view.outcome == AFK_REPORT_RESULT)
                assert_memory_equal(view.payload, "result", 6);
            else if (afk_fault_errno != EAGAIN) /* that means "nothing there" */
                assert_int_not_equal(view.read_errno, 0); /* lost, and it says so */
        }
        else {
            assert_int_equal(r, ANYFORK_EREAPED);
            (void)AFK_FAIL(error, r, ANYFORK_STAGE_WAIT, afk_fault_errno, NULL);
        }
    }
    anyfork_child_close(child);
    return r;
}

/* The same for a program, with options that open files and allocate. */
static int
whole_life_of_a_program(struct anyfork_error *error)
{
    struct anyfork_child *child = NULL;
    struct anyfork_options options;
    const uint32_t cpus[] = {0};
    int status = -1;

    memset(error, 0, sizeof *error);
    anyfork_options_init(&options);
    options.argv = (const char *const[]){"sh", "-c", "exit 0", NULL};
    options.name = "named";
    options.cpus = cpus;
    options.n_cpus = 1;
    options.stdio[0].kind = ANYFORK_STDIO_NULL;
    options.stdio[1].kind = ANYFORK_STDIO_PIPE;
    int r = anyfork_spawn_argv(&options, &child, error);
    if (r < 0) {
        assert_null(child);
        return r;
    }
    r = anyfork_child_wait(child, WAIT_NS, &status);
    if (r == 0)
        assert_int_equal(status, 0);
    else {
        assert_int_equal(r, ANYFORK_EREAPED);
        (void)AFK_FAIL(error, r, ANYFORK_STAGE_WAIT, afk_fault_errno, NULL);
    }
    anyfork_child_close(child);
    return r;
}

/* A message of that many bytes, there and back to its memory: 0, or what failed. */
static int
there(struct afk_channel *from, struct afk_channel *to, char *bytes, size_t size, int fd)
{
    static struct afk_received received;
    const char *why = NULL;
    const struct iovec part = {bytes, size};
    const struct afk_message message = {.parts = &part, .n_parts = 1, .fds = &fd, .n_fds = 1};
    int r = afk_channel_send(from, &message);
    if (r == 0) /* "no room" is what EAGAIN says, of sendmsg(2) alone */
        assert_string_equal(afk_fault_last(), "sendmsg");
    if (r <= 0)
        return r < 0 ? r : -EAGAIN;
    r = afk_channel_receive(to, &received, &why);
    if (r == 0)
        assert_string_equal(afk_fault_last(), "recvmsg");
    if (r <= 0)
        return r < 0 ? r : -EAGAIN;
    bool right = received.n_fds == 1 && received.parts[0].iov_len == size &&
                 memcmp(received.parts[0].iov_base, bytes, size) == 0;
    afk_received_drop(&received, 0);
    assert_true(right);
    return 0;
}

static int
whole_life_of_a_channel(int *ret_errno)
{
    static char bytes[300000];
    struct afk_channel *channel[2] = {NULL, NULL};
    const size_t sizes[] = {100, sizeof bytes, sizeof bytes};
    int fds[2] = {-1, -1};
    memset(bytes, 'x', sizeof bytes);
    int r = afk_os_socketpair(fds, SOCK_SEQPACKET);
    for (int i = 0; r == 0 && i < 2; i++) {
        r = afk_channel_new(&channel[i], fds[i], sizeof bytes);
        if (r == 0)
            fds[i] = -1;
    }
    for (int i = 0; r == 0 && i < 3; i++)
        r = there(channel[0], channel[1], bytes, sizes[i], STDIN_FILENO);
    for (int i = 0; i < 2; i++) {
        if (channel[i] != NULL)
            afk_channel_free(channel[i]);
        afk_os_close(fds[i]);
    }
    *ret_errno = -r;
    return r;
}

static void
every_point_of_a_channel(int errnum, bool for_good)
{
    int before = count_fds();
    for (unsigned nth = 1; nth < POINTS_MAX; nth++) {
        int failed = 0;
        afk_fault_arm(nth, errnum, for_good);
        int r = whole_life_of_a_channel(&failed);
        unsigned hits = afk_fault_hits();
        afk_fault_arm(0, 0, false);
        total_hits += hits;
        assert_int_equal(count_fds(), before);
        if (r < 0)
            assert_true(hits > 0 && (failed == errnum || failed == ENOMEM));
        if (hits == 0) {
            assert_int_equal(r, 0);
            assert_true(nth > 10);
            return;
        }
    }
    fail_msg("still failing after %d points", POINTS_MAX);
}

static void
test_a_channel(void **state)
{
    (void)state;
    for (int for_good = 0; for_good < 2; for_good++) {
        every_point_of_a_channel(EMFILE, for_good);
        every_point_of_a_channel(EAGAIN, for_good);
        every_point_of_a_channel(ENOMEM, for_good);
    }
}

static void
every_point_of(int (*life)(struct anyfork_error *error), int errnum, bool for_good)
{
    struct anyfork_error error;
    int before = count_fds();
    for (unsigned nth = 1; nth < POINTS_MAX; nth++) {
        afk_fault_arm(nth, errnum, for_good);
        int r = life(&error);
        unsigned hits = afk_fault_hits();
        afk_fault_arm(0, 0, false);
        total_hits += hits;
        assert_int_equal(count_fds(), before);
        /* Where waitid(2) never works, nobody can reap: then a zombie is left, but
         * nothing that runs. */
        pid_t left = waitpid(-1, NULL, WNOHANG);
        if (for_good && left > 0)
            left = waitpid(-1, NULL, WNOHANG);
        assert_int_equal(left, -1);
        if (r < 0 && r != ANYFORK_EREAPED) {
            assert_true(hits > 0);
            assert_int_equal(r, ANYFORK_ESYSTEM);
            assert_int_equal(error.sys_errno, error.stage == ANYFORK_STAGE_MEMORY ? ENOMEM : errnum);
            assert_int_not_equal(error.stage, ANYFORK_STAGE_NONE);
        }
        if (hits == 0) {
            assert_int_equal(r, 0);
            assert_true(nth > 5);
            return;
        }
    }
    fail_msg("still failing after %d points", POINTS_MAX);
}

static void
every_point(int errnum, bool for_good)
{
    every_point_of(whole_life, errnum, for_good);
    every_point_of(whole_life_of_a_program, errnum, for_good);
}

static int
heartbeat_of_ours(struct anyfork_error *error)
{
    struct afk_heartbeat heartbeat = {.fd = -1};
    struct afk_reading reading = {.alive = 0};
    int r = afk_heartbeat_new(&heartbeat, AFK_HEARTBEAT_MIN_NS);
    if (r == 0) {
        r = anyfork_heartbeat_begin(heartbeat.fd, 0, error);
        for (int i = 0; r == 0 && reading.alive == 0; i++) {
            assert_true(i < 60000);
            (void)usleep(1000);
            afk_heartbeat_read(&heartbeat, &reading);
        }
    }
    else {
        r = AFK_FAIL(error, ANYFORK_ESYSTEM, ANYFORK_STAGE_OPTION, -r, NULL);
    }
    afk_heartbeat_end();
    afk_heartbeat_free(&heartbeat);
    return r;
}

static void
test_heartbeat(void **state)
{
    struct anyfork_error error;
    unsigned failed = 0;
    (void)state;
    for (unsigned nth = 1; nth < POINTS_MAX; nth++) {
        afk_fault_arm(nth, ENOSPC, false);
        int r = heartbeat_of_ours(&error);
        unsigned hits = afk_fault_hits();
        afk_fault_arm(0, 0, false);
        if (hits == 0) {
            assert_int_equal(r, 0);
            assert_true(failed >= 5); /* of its system calls each one */
            return;
        }
        assert_int_equal(r, ANYFORK_ESYSTEM);
        failed++;
    }
    fail_msg("still failing after %d points", POINTS_MAX);
}

static void
test_once(void **state)
{
    (void)state;
    every_point(EMFILE, false);
    every_point(EAGAIN, false);
    every_point(ENOMEM, false);
}

static void
test_for_good(void **state)
{
    (void)state;
    every_point(EMFILE, true);
    every_point(EAGAIN, true);
    every_point(ENOMEM, true);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {CHECKED(test_once), CHECKED(test_for_good),
                                       CHECKED(test_a_channel), CHECKED(test_heartbeat)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    print_message("%u faults hit\n", total_hits);
    return failed != 0 || total_hits == 0;
}
