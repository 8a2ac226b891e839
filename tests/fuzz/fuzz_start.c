/*
 * A standby receives a START: afk_start_receive(), from an owner whose every byte and
 * descriptor is the input's. The messages that are changed are those of afk_template_start().
 */
#include "fuzz.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define N_STARTS 4

/* As a template's server sends it: what a start needs to be made. */
static void
offer_to(int control, pid_t pid, int report)
{
    struct afk_zygote_message offer = {.magic = AFK_ZYGOTE_MAGIC,
                                       .version = AFK_ZYGOTE_VERSION,
                                       .op = AFK_ZYGOTE_OFFER,
                                       .pid = pid};
    struct fuzz_message message = {.size = sizeof offer, .n_fds = AFK_OFFER_FDS};
    int life[2], pidfd = afk_os_pidfd_open(pid);
    CHECK(pidfd >= 0 && afk_os_pipe(life, O_CLOEXEC) == 0);
    memcpy(message.data, &offer, sizeof offer);
    message.fds[AFK_OFFER_REPORT] = report;
    message.fds[AFK_OFFER_LIFE_READ] = life[0];
    message.fds[AFK_OFFER_LIFE_WRITE] = life[1];
    message.fds[AFK_OFFER_PIDFD] = pidfd;
    CHECK(fuzz_send(control, &message) == 0);
    (void)close(life[0]);
    (void)close(life[1]);
    (void)close(pidfd);
}

/* The descriptors are of the palette, but for a large body, whose memfd is kept. */
static void
capture(int socket, struct fuzz_message *message)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(AFK_ZYGOTE_FDS_MAX * sizeof(int))];
    } control;
    message->size = message->n_fds = 0;
    for (;;) {
        struct iovec vec = {message->data + message->size, sizeof message->data - message->size};
        struct msghdr msg = {.msg_iov = &vec,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof control};
        ssize_t n = recvmsg(socket, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (n < 0 && errno == EAGAIN)
            return;
        CHECK(n > 0);
        message->size += (size_t)n;
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        if (c == NULL)
            continue;
        message->n_fds = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(message->fds, CMSG_DATA(c), message->n_fds * sizeof(int));
    }
}

static void
make_start(struct fuzz_message *message, const struct anyfork_options *options, size_t pickle)
{
    static char bytes[2 * AFK_ZYGOTE_BODY_IN_MESSAGE];
    struct afk_template *template;
    struct afk_setup setup;
    struct anyfork_error error;
    const char *why;
    int control, report[2];
    pid_t pid = fuzz_sleeper();
    CHECK(afk_template_new(&template, false, &control, &error) == 0);
    CHECK(afk_setup_prepare(&setup, options, AFK_SETUP_TEMPLATE, -1, &error) == 0);
    CHECK(afk_os_socketpair(report, SOCK_STREAM) == 0);
    (void)fcntl(report[0], F_SETFL, O_NONBLOCK);
    offer_to(control, pid, report[0]);
    struct afk_template_job job = {.setup = &setup, .pickle = bytes, .size = pickle};
    CHECK(afk_template_start(template, &job, 1, &why, &error) == 0);
    capture(report[1], message);
    anyfork_child_close(job.child);
    fuzz_end(pid);
    afk_setup_release(&setup);
    afk_template_free(template);
    (void)close(control);
    (void)close(report[0]);
    (void)close(report[1]);
}

static const struct fuzz_message *
starts(void)
{
    static struct fuzz_message made[N_STARTS];
    static const gid_t groups[] = {1, 2, 3};
    static const uint32_t cpus[] = {0};
    static const char *const env[] = {"A=1", "LONGER=value", NULL};
    const struct anyfork_rlimit limit = {RLIMIT_CORE, 0, 0};
    const struct anyfork_fd fds[] = {{fuzz_fd(0), 7}, {fuzz_fd(1), 9}};
    struct anyfork_options o;
    if (made[0].size > 0)
        return made;
    anyfork_options_init(&o);
    make_start(&made[0], &o, 100);
    make_start(&made[1], &o, sizeof made[1].data + AFK_ZYGOTE_BODY_IN_MESSAGE); /* a memfd */
    o.fds = fds;
    o.n_fds = 2;
    make_start(&made[2], &o, 100);
    o.groups = groups;
    o.n_groups = 3;
    o.cpus = cpus;
    o.n_cpus = 1;
    o.env = env;
    o.cwd = "/tmp";
    o.name = "fuzz";
    o.rlimits = &limit;
    o.n_rlimits = 1;
    make_start(&made[3], &o, 100);
    return made;
}

static volatile unsigned char sink;

/* All of it is memory that is ours to read. */
static void
read_all(const void *data, size_t size)
{
    for (size_t i = 0; i < size; i++)
        sink = ((const unsigned char *)data)[i];
}

static void
take_fd(int fd, int lowest)
{
    if (fd < 0)
        return;
    CHECK(fd >= lowest && fcntl(fd, F_GETFD) == FD_CLOEXEC);
    CHECK(close(fd) == 0); /* once: nobody else has it */
}

/* What was received is used as a standby would use it, and let go. */
static void
use(struct afk_start *start)
{
    struct afk_setup *setup = &start->setup;
    read_all(start->pickle, start->pickle_size);
    read_all(setup->rlimits, setup->n_rlimits * sizeof *setup->rlimits);
    read_all(setup->cpus, setup->cpus != NULL ? setup->cpus_size : 0);
    for (int i = 0; i < setup->n_groups; i++)
        read_all(&setup->groups[i], sizeof setup->groups[i]);
    for (int i = 0; setup->env != NULL && setup->env[i] != NULL; i++)
        read_all(setup->env[i], strlen(setup->env[i]) + 1);
    read_all(setup->cwd, setup->cwd != NULL ? strlen(setup->cwd) + 1 : 0);
    read_all(setup->name, setup->name != NULL ? strlen(setup->name) + 1 : 0);
    for (unsigned i = 0; i < setup->n_moves; i++) {
        CHECK(i == 0 || setup->move[i].to > setup->move[i - 1].to);
        CHECK(setup->move[i].to >= 0 && setup->move[i].to < setup->lowest);
        take_fd(setup->move[i].from, setup->lowest);
    }
    for (int i = 0; i < 3; i++) {
        bool moved = false;
        for (unsigned m = 0; m < setup->n_moves; m++)
            moved = moved || setup->move[m].to == i;
        CHECK(moved == start->has_stream[i]);
    }
    take_fd(start->cwd_fd, setup->lowest);
    take_fd(start->guard_fd, setup->lowest);
    take_fd(setup->cgroup_procs, setup->lowest);
    take_fd(setup->cgroup_kill, setup->lowest);
    setup->cgroup_procs = setup->cgroup_kill = -1;
    afk_setup_release(setup);
    free(start->body);
}

int
fuzz_one(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {data, size};
    static struct fuzz_message message; /* not of each call: it is large */
    const struct fuzz_message *made = starts();
    struct afk_start start;
    int report[2], on = 1;
    uint8_t what = fuzz_byte(&in);
    pid_t owner = (what & 0x40) != 0 ? getppid() : getpid();

    if ((what & 0x80) == 0) {
        message = made[what % N_STARTS];
        fuzz_change(&in, &message);
    }
    else {
        fuzz_any(&in, &message);
    }
    CHECK(afk_os_socketpair(report, SOCK_STREAM) == 0);
    if ((what & 0x20) == 0)
        CHECK(setsockopt(report[1], SOL_SOCKET, SO_PASSCRED, &on, sizeof on) == 0);
    int sent = fuzz_send(report[0], &message);
    if ((what & 0x10) != 0) { /* more, by another message */
        message.size = fuzz_bytes(&in, message.data, 256);
        message.n_fds = 1;
        message.fds[0] = fuzz_fd(what);
        sent = fuzz_send(report[0], &message) == 0 ? 0 : sent;
    }
    (void)close(report[0]); /* nobody waits for what does not come */
    int r = afk_start_receive(report[1], owner, &start);
    CHECK(r <= 1);
    CHECK(r <= 0 || (owner == getpid() && sent == 0 && (what & 0x20) == 0));
    if (r == 1)
        use(&start);
    (void)afk_start_is_confirmed(report[1]);
    (void)close(report[1]);
    return 0;
}
