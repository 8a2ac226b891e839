/*
 * The record by which a child tells its owner READY, ERROR, RESULT or EXIT.
 * Rule: one write(2) per record, smaller than PIPE_BUF and hence atomic;
 * end-of-file without a record means death, never success.
 */
#include "core.h"
#include "anyfork/anyfork.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(sizeof(struct afk_report) == 64, "wire format");

int
afk_report_write(int fd, const struct afk_report *report)
{
    ssize_t n;
    do
        n = write(fd, report, sizeof *report);
    while (n < 0 && errno == EINTR);
    return n == (ssize_t)sizeof *report ? 0 : n < 0 ? -errno : -EIO;
}

int
afk_reporter_init(struct afk_reporter *reporter, int fd)
{
    struct stat now;
    if (fstat(fd, &now) < 0)
        return -errno;
    *reporter = (struct afk_reporter){fd, afk_generation(), now.st_dev, now.st_ino};
    return 0;
}

static void
send_record(const struct afk_reporter *reporter, const struct afk_report *record,
            const char *payload)
{
    struct stat now;
    if (afk_generation() != reporter->generation || fstat(reporter->fd, &now) < 0 ||
        now.st_ino != reporter->inode || now.st_dev != reporter->device)
        return;
    if (afk_report_write(reporter->fd, record) == 0 && record->payload_bytes > 0)
        (void)afk_os_write_all(reporter->fd, payload, record->payload_bytes);
}

void
afk_reporter_send(const struct afk_reporter *reporter, int kind, int stage, int value,
                  const char *payload, size_t size)
{
    const struct afk_report record = {.magic = AFK_REPORT_MAGIC,
                                      .kind = (uint16_t)kind,
                                      .stage = (uint16_t)stage,
                                      .value = value,
                                      .payload_bytes = size};
    send_record(reporter, &record, payload);
}

void
afk_reporter_fail(const struct afk_reporter *reporter, const struct anyfork_error *error)
{
    struct afk_report record = {.magic = AFK_REPORT_MAGIC,
                                .kind = AFK_REPORT_ERROR,
                                .stage = (uint16_t)error->stage,
                                .sys_errno = error->sys_errno,
                                .value = AFK_EXIT_PRELUDE};
    (void)snprintf(record.detail, sizeof record.detail, "%.39s", error->detail);
    send_record(reporter, &record, NULL);
}

int
afk_report_check(const struct afk_report *report)
{
    if (report->magic != AFK_REPORT_MAGIC || report->kind == 0 ||
        report->kind >= AFK_REPORT_COUNT || report->stage >= ANYFORK_STAGE_COUNT)
        return -EBADMSG;
    if (memchr(report->detail, '\0', sizeof report->detail) == NULL)
        return -EBADMSG;
    return 0;
}
