/*
 * A template's server between an owner, whose messages are the input's, and standbys that
 * start, end, knock at its door and write what they like: afk_server_run() with a fork of our
 * own.
 */
#include "fuzz.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define STANDBYS_MAX 3 /* then the system refuses */
#define WAITS_MAX 3000
#define LOOK_MS 1

struct script {
    struct fuzz_input in;
    int owner_end;
    unsigned standbys, waits;
};
static struct script *current; /* the server's wait has no argument */

/* Reads until its owner, or the server, has dismissed it. */
static _Noreturn void
be_standby(const struct afk_standby *standby, uint8_t how)
{
    int32_t pids[2] = {(int32_t)getpid(), (int32_t)getpid()};
    int control[2];
    char byte;
    if (how % 4 == 1)
        _exit(how);
    if (how % 4 == 2)
        (void)!write(standby->taken_fd, pids, how % 3 == 0 ? sizeof pids : sizeof *pids);
    if ((how & 0x20) != 0 && afk_os_socketpair(control, SOCK_SEQPACKET) == 0 &&
        afk_template_attach(standby->door_fd, control[1]) == 0) {
        (void)close(control[1]);
        (void)recv(control[0], &byte, 1, 0); /* its HELLO, or the end */
    }
    while (read(standby->report_fd, &byte, 1) > 0)
        ;
    _exit(0);
}

static pid_t
fork_standby(void *arg, const struct afk_standby *standby, int *ret_pidfd)
{
    (void)ret_pidfd;
    struct script *script = arg;
    uint8_t how = fuzz_byte(&script->in);
    if (how % 8 == 7 || script->standbys == STANDBYS_MAX)
        return -EAGAIN;
    script->standbys++;
    if (how % 8 == 6) { /* one that writes nonsense */
        char bytes[16];
        size_t n = fuzz_bytes(&script->in, bytes, 1 + how % sizeof bytes);
        (void)!write(standby->taken_fd, bytes, n);
    }
    if ((how & 0x40) != 0 && standby->door_fd >= 0) {
        static struct fuzz_message message;
        fuzz_any(&script->in, &message);
        (void)fuzz_send(standby->door_fd, &message);
    }
    pid_t pid = fork();
    if (pid == 0)
        be_standby(standby, how);
    return pid < 0 ? -errno : pid;
}

static void
drop_offers(int socket)
{
    char bytes[sizeof(struct afk_zygote_message)];
    while (recv(socket, bytes, sizeof bytes, MSG_DONTWAIT) > 0) /* and what came with it */
        ;
}

static void
send_one(struct script *script, uint8_t how)
{
    static struct fuzz_message message;
    const struct afk_zygote_message want = {.magic = AFK_ZYGOTE_MAGIC,
                                            .version = AFK_ZYGOTE_VERSION,
                                            .op = AFK_ZYGOTE_WANT,
                                            .number = how % 5};
    if (how % 4 == 3) {
        fuzz_any(&script->in, &message);
    }
    else {
        memcpy(message.data, &want, sizeof want);
        message.size = sizeof want;
        message.n_fds = 0;
        if (how % 4 == 2)
            fuzz_change(&script->in, &message);
    }
    (void)fuzz_send(script->owner_end, &message);
}

/* In between two waits of the server the owner acts. */
static int
act_and_wait(void *fds, unsigned n, int timeout_ms)
{
    struct script *script = current;
    CHECK(script->waits++ < WAITS_MAX);
    if (script->in.left == 0 && script->owner_end >= 0) {
        (void)close(script->owner_end);
        script->owner_end = -1;
    }
    if (script->owner_end >= 0) {
        uint8_t how = fuzz_byte(&script->in);
        if (how < 0x80)
            send_one(script, how);
        else if (how < 0xc0)
            drop_offers(script->owner_end);
        else if (how >= 0xf8)
            return -EINTR;
    }
    int r = poll(fds, n, timeout_ms < LOOK_MS ? timeout_ms : LOOK_MS);
    return r < 0 ? -errno : r;
}

int
fuzz_one(const uint8_t *data, size_t size)
{
    static struct afk_surroundings around;
    static struct afk_identity identity;
    struct script script = {.in = {data, size}};
    int control[2];
    uint8_t what = fuzz_byte(&script.in);
    CHECK(afk_os_socketpair(control, SOCK_SEQPACKET) == 0);
    const struct afk_server_options options = {.control = control[1],
                                               .owner = getpid(),
                                               .around = &around,
                                               .identity = &identity,
                                               .low = what % 2,
                                               .high = what / 2 % 4,
                                               .idle_ns = what < 0x80 ? 1000000 : 0,
                                               .shared = what / 8 % 2 == 1};
    CHECK(afk_lifeline_register(control[0], false) == 0); /* a standby has no copy of it */
    CHECK(afk_lifeline_register(control[1], false) == 0); /* and it is the server's */
    script.owner_end = control[0];
    current = &script;
    CHECK(afk_server_run(&options, fork_standby, act_and_wait, &script) == 0);
    afk_lifeline_forget(control[0]);
    CHECK(script.owner_end == -1 || close(script.owner_end) == 0);
    return 0;
}
