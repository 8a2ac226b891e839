/*
 * An owner between a template and a worker whose every byte and descriptor is the input's:
 * HELLO, OFFER and FAILED on the control socket, then records on a report socket, of the
 * worker and, at the end, of the template.
 */
#include "fuzz.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define RECORDS_MAX 64

static pid_t living; /* what an offer may name; it ends with a handle */

struct world {
    struct fuzz_input in;
    struct afk_template *template;
    struct afk_setup setup;
    int control;   /* the template's end */
    int reports[8]; /* of standbys: their ends */
    unsigned n_reports;
};

static bool
is_alive(pid_t pid)
{
    return pid > 0 && waitpid(pid, NULL, WNOHANG) == 0;
}

static void
add_offer(struct world *world, uint8_t how, struct fuzz_message *message)
{
    int report[2], life[2];
    if (!is_alive(living))
        living = fuzz_sleeper();
    CHECK(world->n_reports < sizeof world->reports / sizeof *world->reports);
    CHECK(afk_os_socketpair(report, SOCK_STREAM) == 0 && afk_os_pipe(life, O_CLOEXEC) == 0);
    (void)fcntl(report[0], F_SETFL, O_NONBLOCK);
    world->reports[world->n_reports++] = report[1];
    message->fds[AFK_OFFER_REPORT] = report[0];
    message->fds[AFK_OFFER_LIFE_READ] = life[0];
    message->fds[AFK_OFFER_LIFE_WRITE] = life[1];
    message->fds[AFK_OFFER_PIDFD] =
        how % 8 == 7 ? dup(fuzz_fd(how / 8)) : afk_os_pidfd_open(living);
    message->n_fds = AFK_OFFER_FDS;
}

static void
send_one(struct world *world, uint8_t how)
{
    static struct fuzz_message message;
    struct afk_zygote_message one = {.magic = AFK_ZYGOTE_MAGIC,
                                     .version = AFK_ZYGOTE_VERSION,
                                     .op = (uint16_t)(AFK_ZYGOTE_HELLO + how % 4),
                                     .pid = getpid(),
                                     .number = EAGAIN,
                                     .ids = {getuid(), geteuid(), getgid(), getegid()}};
    unsigned n_own = 0;
    message.n_fds = 0;
    if (one.op == AFK_ZYGOTE_OFFER && world->n_reports < 8) {
        add_offer(world, how / 4, &message);
        n_own = message.n_fds;
    }
    int own[AFK_OFFER_FDS];
    memcpy(own, message.fds, sizeof own);
    memcpy(message.data, &one, sizeof one);
    message.size = sizeof one;
    if ((how & 0x40) != 0)
        fuzz_change(&world->in, &message);
    if ((how & 0x80) != 0)
        fuzz_any(&world->in, &message);
    (void)fuzz_send(world->control, &message);
    for (unsigned i = 0; i < n_own; i++)
        (void)close(own[i]);
}

/* What it says of the worker holds together. */
static void
look_at(struct anyfork_child *child)
{
    struct afk_child_view view;
    struct anyfork_error error;
    CHECK(afk_child_poll(child) >= 0);
    afk_child_view(child, &view);
    CHECK(view.outcome == 0 || view.payload_size == 0 || view.payload != NULL);
    for (size_t i = 0; view.outcome != 0 && i < view.payload_size; i += 97)
        (void)*(const volatile char *)(view.payload + i);
    int r = anyfork_child_wait_ready(child, 0, &error);
    CHECK(r == 0 || r == ANYFORK_ETIMEDOUT || r == ANYFORK_EDIED);
    CHECK(r == 0 || memchr(error.detail, '\0', sizeof error.detail) != NULL);
}

static void
report_one(struct world *world, int to)
{
    struct afk_report record = {.magic = AFK_REPORT_MAGIC};
    uint8_t how = fuzz_byte(&world->in), payload[256];
    record.kind = how % (AFK_REPORT_COUNT + 1);
    record.stage = fuzz_byte(&world->in);
    record.value = (int32_t)fuzz_number(&world->in);
    uint8_t size = fuzz_byte(&world->in);
    record.payload_bytes = size < 0xf0 ? size : (uint64_t)fuzz_number(&world->in) << size % 32;
    if ((how & 0x40) != 0)
        record.detail[fuzz_byte(&world->in) % sizeof record.detail] = (char)how;
    if ((how & 0x80) == 0)
        (void)send(to, &record, sizeof record, MSG_NOSIGNAL | MSG_DONTWAIT);
    size_t n = fuzz_bytes(&world->in, payload, fuzz_byte(&world->in));
    (void)send(to, payload, n, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* As if the newest offer had been taken: the inputs that offer more find that out. */
static void
live(struct world *world, struct anyfork_child *child)
{
    uint8_t how = fuzz_byte(&world->in);
    for (unsigned n = how % RECORDS_MAX; n > 0 && world->in.left > 0; n--) {
        report_one(world, world->reports[world->n_reports - 1]);
        if ((how & 0x40) != 0)
            look_at(child);
    }
    look_at(child);
    if ((how & 0x80) != 0) { /* its end, of which the template may not have told */
        fuzz_end(living);
        living = 0;
        int status;
        int r = anyfork_child_wait(child, -1, &status);
        CHECK(r == 0 || r == ANYFORK_EREAPED);
        look_at(child);
    }
    anyfork_child_close(child);
}

static void
start_one(struct world *world, bool asked)
{
    struct afk_template_job jobs[2] = {
        {.setup = &world->setup, .pickle = "pickle", .size = 6, .asked = asked}};
    struct anyfork_error error = {0};
    const char *why = NULL;
    jobs[1] = jobs[0];
    unsigned n = 1 + (fuzz_byte(&world->in) % 4 == 3);
    int r = afk_template_start(world->template, jobs, n, &why, &error);
    afk_template_close_dropped(jobs, n);
    CHECK(r == 0 || r == -EAGAIN || r == -ESTALE || (r < 0 && r == error.code));
    CHECK(r != -ESTALE || why != NULL);
    for (unsigned i = 0; i < n; i++) {
        CHECK(jobs[i].started == (jobs[i].child != NULL));
        CHECK(r != 0 || jobs[i].started);
    }
    for (unsigned i = 0; i < n; i++)
        if (jobs[i].started)
            live(world, jobs[i].child);
}

int
fuzz_one(const uint8_t *data, size_t size)
{
    struct world world = {.in = {data, size}};
    struct anyfork_error error;
    CHECK(afk_template_new(&world.template, false, &world.control, &error) == 0);
    CHECK(afk_setup_prepare(&world.setup, NULL, AFK_SETUP_TEMPLATE, -1, &error) == 0);
    while (world.in.left > 0) {
        uint8_t how = fuzz_byte(&world.in);
        int r = how % 8 == 7 ? afk_template_hello(world.template) : 0;
        CHECK(r <= 1);
        if (how % 8 == 6)
            start_one(&world, (how & 8) != 0);
        else if (how % 8 < 6)
            send_one(&world, fuzz_byte(&world.in));
    }
    afk_setup_release(&world.setup);
    afk_template_free(world.template);
    afk_lifeline_close(&world.control);
    for (unsigned i = 0; i < world.n_reports; i++)
        (void)close(world.reports[i]);
    if (living != 0)
        fuzz_end(living);
    living = 0;
    return 0;
}
