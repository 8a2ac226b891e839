/*
 * The least that a start can cost: one sendmsg(2) with three descriptors to a process that
 * sleeps in recvmsg(2). For each line on standard input: wait as long as it says, in µs, send,
 * and print what the call took, and after which time the other process ran, both in ns.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FDS 3
#define BODY 256 /* bytes; of a small start */

union control {
    struct cmsghdr header;
    char space[CMSG_SPACE(FDS * sizeof(int))];
};

static int64_t
now_ns(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void
receive_for_ever(int socket)
{
    char body[BODY];
    for (;;) {
        union control control;
        struct iovec vec = {body, sizeof body};
        struct msghdr msg = {.msg_iov = &vec,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof control};
        if (recvmsg(socket, &msg, MSG_CMSG_CLOEXEC) <= 0)
            _exit(0);
        int64_t woken = now_ns();
        int fds[FDS];
        memcpy(fds, CMSG_DATA(&control.header), sizeof fds);
        for (int i = 0; i < FDS; i++)
            (void)close(fds[i]);
        if (write(socket, &woken, sizeof woken) != sizeof woken)
            _exit(1);
    }
}

static int
send_one(int socket)
{
    static char body[BODY];
    const int fds[FDS] = {0, 1, 2};
    union control control = {.header = {.cmsg_level = SOL_SOCKET,
                                        .cmsg_type = SCM_RIGHTS,
                                        .cmsg_len = CMSG_LEN(sizeof fds)}};
    struct iovec vec = {body, sizeof body};
    struct msghdr msg = {.msg_iov = &vec,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = sizeof control};
    int64_t woken;
    memcpy(CMSG_DATA(&control.header), fds, sizeof fds);
    int64_t start = now_ns();
    if (sendmsg(socket, &msg, MSG_NOSIGNAL) != sizeof body)
        return -1;
    int64_t sent = now_ns();
    if (read(socket, &woken, sizeof woken) != sizeof woken)
        return -1;
    (void)printf("%lld %lld\n", (long long)(sent - start), (long long)(woken - start));
    return fflush(stdout);
}

int
main(void)
{
    int pair[2];
    char line[32];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        return 1;
    pid_t pid = fork();
    if (pid == 0) {
        (void)close(pair[0]);
        receive_for_ever(pair[1]);
    }
    (void)close(pair[1]);
    while (pid > 0 && fgets(line, sizeof line, stdin) != NULL) {
        (void)usleep((useconds_t)strtoul(line, NULL, 10));
        if (send_one(pair[0]) != 0)
            return 1;
    }
    (void)close(pair[0]);
    return waitpid(pid, NULL, 0) == pid ? 0 : 1;
}
