/*
 * The record by which a child tells its owner READY, ERROR, RESULT or EXIT.
 * Rule: one write(2) per record, smaller than PIPE_BUF and hence atomic;
 * end-of-file without a record means death, never success.
 */
#include "core.h"
#include "anyfork/anyfork.h"

#include <errno.h>
#include <string.h>
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
afk_report_check(const struct afk_report *report)
{
    if (report->magic != AFK_REPORT_MAGIC || report->kind == 0 ||
        report->kind >= AFK_REPORT_COUNT || report->stage >= ANYFORK_STAGE_COUNT)
        return -EBADMSG;
    if (memchr(report->detail, '\0', sizeof report->detail) == NULL)
        return -EBADMSG;
    return 0;
}
