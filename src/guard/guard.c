/*
 * anyfork-guard: ends an owner's workers where the kernel does not do it by the
 * lifeline: a worker of another user, a whole cgroup, an owner whose lifeline a foreign
 * process holds open.
 *
 * usage: anyfork-guard   (started by libanyfork: fd 3 its socket, fd 4 the owner's pidfd)
 *
 * It waits for the owner's end: its pidfd, or the end of file of the socket, whose other
 * end only the owner and its workers-to-be have. Workers announce themselves with their
 * own pidfd before they do anything else. One process per owner, some pages large.
 *
 * Rules: nothing is allocated once the owner has died; what is in the socket then is
 * read first, so that nobody slips through.
 */
#include "core/guard.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif

struct held {
    uint64_t token;
    int pidfd;
    int kill_fd; /* cgroup.kill, or -1 */
    int signal;
    bool ended;
};

static struct held *held;
static size_t n_held, n_room;
static int epoll;

static void watch(int fd);

static void
drop(size_t i)
{
    (void)close(held[i].pidfd);
    if (held[i].kill_fd >= 0)
        (void)close(held[i].kill_fd);
    held[i] = held[--n_held];
}

static void
end_one(const struct held *h)
{
    if (h->kill_fd >= 0)
        (void)!write(h->kill_fd, "1", 1);
    if (!h->ended)
        (void)syscall(SYS_pidfd_send_signal, h->pidfd, h->signal, NULL, 0);
}

static void
take(const struct afk_guard_message *message, int pidfd, int kill_fd)
{
    if (message->op == AFK_GUARD_DROP) {
        for (size_t i = 0; i < n_held; i++) {
            if (held[i].token == message->token) {
                drop(i);
                return;
            }
        }
        return;
    }
    struct held h = {message->token, pidfd, kill_fd, message->signal, false};
    if (n_held == n_room) {
        size_t room = n_room > 0 ? 2 * n_room : 64;
        struct held *larger = realloc(held, room * sizeof *held);
        if (larger == NULL) { /* better now than never */
            end_one(&h);
            return;
        }
        held = larger;
        n_room = room;
    }
    held[n_held++] = h;
    watch(pidfd);
}

/* One message. 0 at the end of file, -1 if there is none now. */
static int
receive(int flags)
{
    struct afk_guard_message message;
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(2 * sizeof(int))];
    } control;
    struct iovec vec = {&message, sizeof message};
    struct msghdr msg = {.msg_iov = &vec,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = sizeof control};
    int fds[2] = {-1, -1};
    ssize_t n = recvmsg(AFK_GUARD_SOCKET, &msg, MSG_CMSG_CLOEXEC | flags);
    if (n == 0)
        return 0;
    if (n != (ssize_t)sizeof message)
        return -1;
    const struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    if (c != NULL && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
        memcpy(fds, CMSG_DATA(c), c->cmsg_len - CMSG_LEN(0));
    take(&message, fds[0], fds[1]);
    return 1;
}

static _Noreturn void
end_all(void)
{
    /* Who comes now is told by EPIPE, and gives up. */
    (void)shutdown(AFK_GUARD_SOCKET, SHUT_RD);
    while (receive(MSG_DONTWAIT) > 0)
        ;
    for (size_t i = 0; i < n_held; i++)
        end_one(&held[i]);
    _exit(0);
}

/* One that ended by itself. */
static void
forget(int pidfd)
{
    for (size_t i = 0; i < n_held; i++) {
        if (held[i].pidfd != pidfd)
            continue;
        held[i].ended = true;
        (void)epoll_ctl(epoll, EPOLL_CTL_DEL, pidfd, NULL);
        if (held[i].kill_fd < 0) /* else its cgroup may have others */
            drop(i);
        return;
    }
}

static void
watch(int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0 &&
        (fd == AFK_GUARD_SOCKET || fd == AFK_GUARD_OWNER))
        _exit(1);
}

int
main(void)
{
    pid_t pid = fork(); /* into the background, see guard.c of core */
    if (pid != 0)
        _exit(pid < 0);
    for (int sig = 1; sig < NSIG; sig++)
        (void)signal(sig, SIG_IGN);
    /* One pidfd for each worker, of which its owner may come to have more than it may now. */
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
    epoll = epoll_create1(EPOLL_CLOEXEC);
    watch(AFK_GUARD_SOCKET);
    watch(AFK_GUARD_OWNER);
    for (;;) {
        struct epoll_event events[16];
        int n = epoll_wait(epoll, events, 16, -1);
        if (n < 0 && errno != EINTR)
            end_all();
        for (int i = 0; i < n; i++)
            if (events[i].data.fd == AFK_GUARD_OWNER)
                end_all();
        for (int i = 0; i < n; i++) {
            if (events[i].data.fd != AFK_GUARD_SOCKET)
                forget(events[i].data.fd);
            else if (receive(0) == 0)
                end_all(); /* the owner has executed another program */
        }
    }
}
