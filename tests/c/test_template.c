/* What an owner makes of the standbys that a template offers. */
#include "harness.h"

#include "core/zygote.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* A template whose every word is this test's. */
struct world {
    struct afk_template *template;
    struct afk_setup setup;
    int control; /* the template's end */
};

static void
begin(struct world *world)
{
    struct anyfork_error error;
    assert_int_equal(afk_template_new(&world->template, false, &world->control, &error), 0);
    assert_int_equal(afk_setup_prepare(&world->setup, NULL, AFK_SETUP_TEMPLATE, -1, &error), 0);
}

static void
end(struct world *world)
{
    afk_setup_release(&world->setup);
    afk_template_free(world->template);
    afk_lifeline_close(&world->control);
}

/* A child that ends when its input does; *ret_end is that. */
static pid_t
make_child(int *ret_end)
{
    int ends[2];
    assert_int_equal(afk_os_pipe(ends, O_CLOEXEC), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        char byte;
        (void)close(ends[1]);
        _exit(read(ends[0], &byte, 1) == 0 ? AFK_EXIT_PRELUDE : 1);
    }
    (void)close(ends[0]);
    *ret_end = ends[1];
    return pid;
}

/* Its report socket's other end. */
static int
offer(struct world *world, pid_t pid, pid_t told)
{
    const struct afk_zygote_message message = {.magic = AFK_ZYGOTE_MAGIC,
                                               .version = AFK_ZYGOTE_VERSION,
                                               .op = AFK_ZYGOTE_OFFER,
                                               .pid = told};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(AFK_OFFER_FDS * sizeof(int))];
    } control = {.header = {.cmsg_level = SOL_SOCKET,
                            .cmsg_type = SCM_RIGHTS,
                            .cmsg_len = CMSG_LEN(AFK_OFFER_FDS * sizeof(int))}};
    struct iovec vec = {(void *)(uintptr_t)&message, sizeof message};
    struct msghdr msg = {.msg_iov = &vec,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = sizeof control};
    int report[2], life[2], pidfd = afk_os_pidfd_open(pid);
    assert_true(pidfd >= 0);
    assert_int_equal(afk_os_socketpair(report, SOCK_STREAM), 0);
    assert_int_equal(fcntl(report[0], F_SETFL, O_NONBLOCK), 0);
    assert_int_equal(afk_os_pipe(life, O_CLOEXEC), 0);
    const int fds[AFK_OFFER_FDS] = {report[0], life[0], life[1], pidfd};
    memcpy(CMSG_DATA(&control.header), fds, sizeof fds);
    assert_int_equal(sendmsg(world->control, &msg, 0), sizeof message);
    for (unsigned i = 0; i < AFK_OFFER_FDS; i++)
        (void)close(fds[i]);
    return report[1];
}

/* One that has ended, and is a zombie; and what it has told before. */
static pid_t
offer_dead(struct world *world, int kind)
{
    int end_of_life;
    pid_t pid = make_child(&end_of_life);
    int report = offer(world, pid, pid), pidfd = afk_os_pidfd_open(pid);
    if (kind != 0)
        send_record(report, kind, AFK_EXIT_PRELUDE, "why", 3);
    send_record(report, AFK_REPORT_EXIT, AFK_EXIT_PRELUDE, NULL, 0);
    (void)close(report);
    (void)close(end_of_life);
    wait_readable(pidfd);
    (void)close(pidfd);
    return pid;
}

static int
start(struct world *world, bool asked, struct anyfork_child **ret_child)
{
    struct afk_template_job job = {.setup = &world->setup, .pickle = "", .asked = asked};
    struct anyfork_error error;
    const char *why = NULL;
    int r = afk_template_start(world->template, &job, 1, &why, &error);
    *ret_child = job.child;
    afk_template_close_dropped(&job, 1);
    return r;
}

static void
test_a_standby_that_failed_is_passed_over_at_first(void **state)
{
    struct world world;
    struct anyfork_child *child;
    (void)state;
    begin(&world);
    pid_t pid = offer_dead(&world, AFK_REPORT_ERROR);
    assert_int_equal(start(&world, false, &child), -EAGAIN);
    assert_null(child);
    (void)reap(pid);
    end(&world);
}

static void
test_one_that_was_asked_for_tells_why_it_failed(void **state)
{
    struct world world;
    struct anyfork_child *child;
    struct afk_child_view view;
    (void)state;
    begin(&world);
    pid_t first = offer_dead(&world, AFK_REPORT_ERROR);
    pid_t second = offer_dead(&world, AFK_REPORT_ERROR);
    assert_int_equal(start(&world, true, &child), 0);
    assert_int_equal(anyfork_child_pid(child), first);
    assert_int_equal(afk_child_poll(child), 1);
    afk_child_view(child, &view);
    assert_int_equal(view.error.kind, AFK_REPORT_ERROR);
    assert_int_equal(view.payload_size, 3);
    assert_memory_equal(view.payload, "why", 3);
    assert_int_equal(view.status, AFK_EXIT_PRELUDE << 8);
    anyfork_child_close(child);
    assert_int_equal(start(&world, true, &child), -EAGAIN); /* none is told of twice */
    (void)reap(first);
    (void)reap(second);
    end(&world);
}

static void
test_one_that_was_ended_says_nothing(void **state)
{
    struct world world;
    struct anyfork_child *child;
    (void)state;
    begin(&world);
    pid_t pid = offer_dead(&world, 0);
    assert_int_equal(start(&world, true, &child), -EAGAIN);
    (void)reap(pid);
    end(&world);
}

static void
test_one_that_lives_goes_first(void **state)
{
    struct world world;
    struct anyfork_child *child;
    int end_of_life;
    (void)state;
    begin(&world);
    pid_t dead = offer_dead(&world, AFK_REPORT_ERROR), living = make_child(&end_of_life);
    int report = offer(&world, living, living);
    assert_int_equal(start(&world, true, &child), 0);
    assert_int_equal(anyfork_child_pid(child), living);
    anyfork_child_close(child);
    (void)close(report);
    (void)close(end_of_life);
    (void)reap(dead);
    end(&world);
}

static void
test_a_process_has_a_number(void **state)
{
    struct world world;
    struct anyfork_child *child;
    (void)state;
    for (pid_t told = -1; told <= 0; told++) {
        int end_of_life;
        begin(&world);
        pid_t pid = make_child(&end_of_life);
        int report = offer(&world, pid, told);
        assert_int_equal(start(&world, true, &child), -EAGAIN);
        (void)close(report);
        (void)close(end_of_life);
        (void)reap(pid);
        end(&world);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        CHECKED(test_a_standby_that_failed_is_passed_over_at_first),
        CHECKED(test_one_that_was_asked_for_tells_why_it_failed),
        CHECKED(test_one_that_was_ended_says_nothing),
        CHECKED(test_one_that_lives_goes_first),
        CHECKED(test_a_process_has_a_number),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
