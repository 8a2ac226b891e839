/* A worker's heartbeat, from both sides; and the verdicts. */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/heartbeat.h"

#define MS ((int64_t)1000000)

static bool
no_answer(void)
{
    return true;
}

static bool
answer_at_once(void)
{
    afk_heartbeat_answer();
    return true;
}

static void
wait_for_beats(const struct afk_heartbeat *heartbeat, uint64_t n)
{
    struct afk_reading reading;
    int64_t end = afk_os_now_ns() + WAIT_NS;
    do {
        afk_heartbeat_read(heartbeat, &reading);
        assert_true(afk_os_now_ns() < end);
        (void)usleep(1000);
    } while (reading.alive < n);
}

static void
test_it_beats_until_it_is_ended(void **state)
{
    struct afk_heartbeat heartbeat;
    struct afk_reading reading, later;
    (void)state;

    assert_int_equal(afk_heartbeat_new(&heartbeat, MS), 0);
    afk_heartbeat_read(&heartbeat, &reading);
    assert_int_equal(reading.alive, 0);
    assert_int_equal(reading.interval_ns, MS);
    assert_int_equal(afk_heartbeat_begin(heartbeat.fd, 0, answer_at_once), 0);
    assert_int_equal(afk_heartbeat_begin(heartbeat.fd, 0, NULL), -EALREADY);
    wait_for_beats(&heartbeat, 3);
    afk_heartbeat_read(&heartbeat, &reading);
    assert_true(reading.progressing >= 2);
    afk_heartbeat_end();
    afk_heartbeat_read(&heartbeat, &reading);
    (void)usleep(5000);
    afk_heartbeat_read(&heartbeat, &later);
    assert_int_equal(reading.alive, later.alive);
    assert_int_equal(afk_heartbeat_verdict(&reading, &later), AFK_VERDICT_STOPPED);
    afk_heartbeat_end(); /* twice does no harm */
    afk_heartbeat_free(&heartbeat);
    afk_heartbeat_free(&heartbeat);
}

static void
test_who_does_not_answer_is_asked_once(void **state)
{
    struct afk_heartbeat heartbeat;
    struct afk_reading reading;
    (void)state;

    assert_int_equal(afk_heartbeat_new(&heartbeat, MS), 0);
    assert_int_equal(afk_heartbeat_begin(heartbeat.fd, 2 * MS, no_answer), 0);
    wait_for_beats(&heartbeat, 3);
    afk_heartbeat_read(&heartbeat, &reading);
    assert_int_equal(reading.progressing, 0);
    assert_int_equal(reading.interval_ns, 2 * MS);
    afk_heartbeat_answer();
    afk_heartbeat_read(&heartbeat, &reading);
    assert_int_equal(reading.progressing, 1);
    afk_heartbeat_end();
    afk_heartbeat_answer(); /* one that comes late */
    afk_heartbeat_free(&heartbeat);
}

static void
test_what_is_no_heartbeat_is_refused(void **state)
{
    struct afk_heartbeat heartbeat;
    struct anyfork_error error;
    (void)state;

    assert_int_equal(afk_heartbeat_new(&heartbeat, 0), -EINVAL);
    assert_int_equal(afk_heartbeat_begin(-1, 0, NULL), -EBADF);
    int fd = memfd_create("none", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_int_equal(afk_heartbeat_begin(fd, 0, NULL), -EBADF);
    assert_int_equal(ftruncate(fd, 4096), 0);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 0);
    assert_int_equal(afk_heartbeat_begin(fd, 0, NULL), -EBADF);
    assert_int_equal(anyfork_heartbeat_begin(fd, 0, &error), ANYFORK_EINVAL);
    (void)close(fd);
    (void)unsetenv("ANYFORK_HEARTBEAT_FD");
    assert_int_equal(anyfork_heartbeat_begin(-1, 0, &error), 0); /* nobody asks for one */
    (void)setenv("ANYFORK_HEARTBEAT_FD", "7x", 1);
    assert_int_equal(anyfork_heartbeat_begin(-1, 0, &error), ANYFORK_EINVAL);
    assert_int_equal(anyfork_heartbeat_begin(0, 5, &error), ANYFORK_EINVAL);
    (void)unsetenv("ANYFORK_HEARTBEAT_FD");
}

static void
test_a_program_says_that_it_gets_on(void **state)
{
    struct afk_heartbeat heartbeat;
    struct afk_reading reading;
    char number[16];
    (void)state;

    assert_int_equal(afk_heartbeat_new(&heartbeat, MS), 0);
    (void)snprintf(number, sizeof number, "%d", heartbeat.fd);
    (void)setenv("ANYFORK_HEARTBEAT_FD", number, 1);
    assert_int_equal(anyfork_heartbeat_begin(-1, 0, NULL), 0);
    wait_for_beats(&heartbeat, 1);
    afk_heartbeat_read(&heartbeat, &reading);
    assert_int_equal(reading.progressing, -1); /* nobody has said so */
    anyfork_heartbeat_progress();
    afk_heartbeat_read(&heartbeat, &reading);
    assert_int_equal(reading.progressing, 1);
    afk_heartbeat_end();
    (void)unsetenv("ANYFORK_HEARTBEAT_FD");
    afk_heartbeat_free(&heartbeat);
}

static void
test_a_forked_child_begins_anew(void **state)
{
    struct afk_heartbeat first, second;
    struct afk_reading reading;
    (void)state;

    assert_int_equal(afk_heartbeat_new(&first, MS), 0);
    assert_int_equal(afk_heartbeat_new(&second, MS), 0);
    assert_int_equal(afk_heartbeat_begin(first.fd, 0, no_answer), 0);
    pid_t pid = fork();
    if (pid == 0) {
        (void)alarm(TEST_SECONDS);
        afk_heartbeat_answer(); /* of its parent's: not for it to give */
        if (afk_heartbeat_begin(second.fd, 0, answer_at_once) < 0)
            _exit(1);
        do {
            (void)usleep(1000);
            afk_heartbeat_read(&second, &reading);
        } while (reading.alive < 2);
        afk_heartbeat_end();
        _exit(0);
    }
    assert_int_equal(reap(pid), 0);
    afk_heartbeat_read(&first, &reading);
    assert_int_equal(reading.progressing, 0);
    afk_heartbeat_read(&second, &reading);
    assert_true(reading.alive >= 2);
    afk_heartbeat_end();
    afk_heartbeat_free(&first);
    afk_heartbeat_free(&second);
}

static void
test_verdicts(void **state)
{
    static const struct {
        struct afk_reading before, after;
        enum afk_verdict verdict;
    } rows[] = {
        {{0, 0, 0, MS}, {0, 0, 0, MS}, AFK_VERDICT_STOPPED},
        {{5, 2, 9, MS}, {5, 2, 9, MS}, AFK_VERDICT_STOPPED},
        {{5, 2, 9, MS}, {6, 3, 9, MS}, AFK_VERDICT_RUNNING},
        {{5, 2, 0, MS}, {7, 2, 2 * MS, MS}, AFK_VERDICT_IN_C},
        {{5, 2, 0, MS}, {7, 2, 2 * MS / 10, MS}, AFK_VERDICT_IN_C}, /* beside others */
        {{5, 2, 0, MS}, {7, 2, 100, MS}, AFK_VERDICT_WAITING},
        {{5, 2, 77, MS}, {7, 2, 77, MS}, AFK_VERDICT_WAITING},
        {{5, -1, 0, MS}, {7, -1, 2 * MS, MS}, AFK_VERDICT_RUNNING}, /* nobody is asked */
        {{5, -1, 77, MS}, {7, -1, 77, MS}, AFK_VERDICT_WAITING},
    };
    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        assert_int_equal(afk_heartbeat_verdict(&rows[i].before, &rows[i].after), rows[i].verdict);
    assert_string_equal(afk_verdict_name(AFK_VERDICT_IN_C), "in_c");
    assert_string_equal(afk_verdict_name(AFK_VERDICT_COUNT), "unknown");
}

static void
test_a_stopped_process_does_not_beat(void **state)
{
    struct afk_heartbeat heartbeat;
    struct afk_reading before, after;
    (void)state;

    assert_int_equal(afk_heartbeat_new(&heartbeat, MS), 0);
    pid_t pid = fork();
    if (pid == 0) {
        (void)alarm(TEST_SECONDS);
        if (afk_heartbeat_begin(heartbeat.fd, 0, answer_at_once) < 0)
            _exit(1);
        pause_for_ever();
    }
    wait_for_beats(&heartbeat, 2);
    assert_int_equal(kill(pid, SIGSTOP), 0);
    int status;
    assert_int_equal(waitpid(pid, &status, WUNTRACED), pid);
    afk_heartbeat_read(&heartbeat, &before);
    (void)usleep(20000);
    afk_heartbeat_read(&heartbeat, &after);
    assert_int_equal(afk_heartbeat_verdict(&before, &after), AFK_VERDICT_STOPPED);
    assert_int_equal(kill(pid, SIGCONT), 0);
    wait_for_beats(&heartbeat, after.alive + 2);
    afk_heartbeat_read(&heartbeat, &after);
    assert_int_equal(afk_heartbeat_verdict(&before, &after), AFK_VERDICT_RUNNING);
    assert_int_equal(kill(pid, SIGKILL), 0);
    (void)reap(pid);
    afk_heartbeat_free(&heartbeat);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        CHECKED(test_it_beats_until_it_is_ended),
        CHECKED(test_who_does_not_answer_is_asked_once),
        CHECKED(test_what_is_no_heartbeat_is_refused),
        CHECKED(test_a_program_says_that_it_gets_on),
        CHECKED(test_a_forked_child_begins_anew),
        CHECKED(test_verdicts),
        CHECKED(test_a_stopped_process_does_not_beat),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
