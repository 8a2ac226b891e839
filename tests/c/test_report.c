/* The 64-byte record, and the texts of errors. */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <unistd.h>

static struct afk_report
good(void)
{
    return (struct afk_report){.magic = AFK_REPORT_MAGIC, .kind = AFK_REPORT_READY};
}

static void
test_a_record_is_one_atomic_write(void **state)
{
    struct afk_report sent = good(), got;
    int fds[2];
    (void)state;

    assert_true(sizeof sent <= PIPE_BUF);
    sent.kind = AFK_REPORT_ERROR;
    sent.stage = ANYFORK_STAGE_PTY;
    sent.sys_errno = ENOTTY;
    sent.payload_bytes = 1ull << 40;
    strcpy(sent.detail, "what was seen");
    assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
    assert_int_equal(afk_report_write(fds[1], &sent), 0);
    assert_int_equal(afk_os_read(fds[0], &got, sizeof got), sizeof got);
    assert_memory_equal(&sent, &got, sizeof got);
    assert_int_equal(afk_report_check(&got), 0);
    (void)close(fds[0]);
    (void)close(fds[1]);
}

static void
test_a_write_that_fails_says_why(void **state)
{
    struct afk_report report = good();
    (void)state;
    assert_int_equal(afk_report_write(-1, &report), -EBADF);
}

static void
test_what_is_no_record_is_refused(void **state)
{
    struct afk_report report;
    (void)state;

    for (int kind = 1; kind < AFK_REPORT_COUNT; kind++) {
        report = good();
        report.kind = (uint16_t)kind;
        assert_int_equal(afk_report_check(&report), 0);
    }
    report = good();
    report.magic ^= 1;
    assert_int_equal(afk_report_check(&report), -EBADMSG);
    report = good();
    report.kind = 0;
    assert_int_equal(afk_report_check(&report), -EBADMSG);
    report.kind = AFK_REPORT_COUNT;
    assert_int_equal(afk_report_check(&report), -EBADMSG);
    report = good();
    report.stage = ANYFORK_STAGE_COUNT;
    assert_int_equal(afk_report_check(&report), -EBADMSG);
    report = good();
    memset(report.detail, 'x', sizeof report.detail);
    assert_int_equal(afk_report_check(&report), -EBADMSG);
    memset(&report, 0xff, sizeof report);
    assert_int_equal(afk_report_check(&report), -EBADMSG);
}

static void
test_every_stage_has_a_name_and_a_text(void **state)
{
    (void)state;
    for (int i = 0; i < ANYFORK_STAGE_COUNT; i++) {
        assert_true(strlen(anyfork_stage_name(i)) > 0);
        assert_true(strlen(anyfork_stage_text(i)) > 0);
    }
    assert_string_equal(anyfork_stage_name(ANYFORK_STAGE_FORK), "fork");
    assert_string_equal(anyfork_stage_name(-1), "unknown");
    assert_string_equal(anyfork_stage_text(ANYFORK_STAGE_COUNT), "unknown");
}

static void
test_an_error_is_filled_and_ends(void **state)
{
    struct anyfork_error error;
    char longer[300];
    (void)state;

    assert_int_equal(sizeof error, 128);
    memset(longer, 'y', sizeof longer);
    longer[sizeof longer - 1] = '\0';
    memset(&error, 0xaa, sizeof error);
    int line = __LINE__ + 1;
    int r = AFK_FAIL(&error, ANYFORK_ESYSTEM, ANYFORK_STAGE_PIPE, EMFILE, longer);
    assert_int_equal(r, ANYFORK_ESYSTEM);
    assert_int_equal(error.code, ANYFORK_ESYSTEM);
    assert_int_equal(error.stage, ANYFORK_STAGE_PIPE);
    assert_int_equal(error.sys_errno, EMFILE);
    assert_int_equal(error.line, line);
    assert_int_equal(strlen(error.detail), sizeof error.detail - 1);
    (void)AFK_FAIL(&error, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0, NULL);
    assert_string_equal(error.detail, "");
    assert_int_equal(AFK_FAIL(NULL, ANYFORK_EINVAL, 0, 0, "nobody listens"), ANYFORK_EINVAL);
}

static void
test_peek_never_faults(void **state)
{
    long value = 42, copy = 0;
    (void)state;
    assert_int_equal(afk_os_peek(&copy, &value, sizeof copy), 0);
    assert_int_equal(copy, 42);
    assert_int_equal(afk_os_peek(&copy, NULL, sizeof copy), -EFAULT);
    assert_int_equal(afk_os_peek(&copy, (void *)(uintptr_t)-4096, sizeof copy), -EFAULT);
    assert_int_equal(afk_os_peek(&copy, (void *)(uintptr_t)0xdead000000000000u, sizeof copy), -EFAULT);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        CHECKED(test_a_record_is_one_atomic_write),
        CHECKED(test_a_write_that_fails_says_why),
        CHECKED(test_what_is_no_record_is_refused),
        CHECKED(test_every_stage_has_a_name_and_a_text),
        CHECKED(test_an_error_is_filled_and_ends),
        CHECKED(test_peek_never_faults),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
