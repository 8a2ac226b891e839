/* What the fuzz targets share. */
#include "fuzz.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define N_FDS 4
static int palette[N_FDS];
static int until_we_end; /* a pipe with nothing in it, whose other end is ours */
static int streams[3]; /* copies: a server that has lost its owner lets go of its own */
static int fds_before;

_Noreturn void
fuzz_fail(const char *file, int line, const char *what)
{
    (void)dprintf(streams[2], "%s:%d: not so: %s\n", file, line, what);
    abort();
}

static int
count_fds(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/fd");
    CHECK(dir != NULL);
    while (readdir(dir) != NULL)
        n++;
    (void)closedir(dir);
    return n;
}

static void
open_palette(void)
{
    int ends[2];
    CHECK((palette[0] = open("/dev/null", O_RDWR | O_CLOEXEC)) >= 0);
    CHECK((palette[1] = memfd_create("fuzz", MFD_CLOEXEC)) >= 0);
    CHECK(ftruncate(palette[1], 300) == 0);
    CHECK((palette[2] = open("/", O_PATH | O_CLOEXEC)) >= 0);
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    (void)close(ends[1]); /* hung up, so that nobody waits for it */
    palette[3] = ends[0];
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    until_we_end = ends[0];
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    (void)signal(SIGPIPE, SIG_IGN);
    for (int i = 0; i < 3; i++)
        CHECK((streams[i] = fcntl(i, F_DUPFD_CLOEXEC, 100)) >= 0);
    open_palette();
    return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool warm;
    if (!warm) { /* what every process opens once */
        (void)fuzz_one(data, size);
        warm = true;
    }
    fds_before = count_fds();
    int r = fuzz_one(data, size);
    for (int i = 0; i < 3; i++)
        CHECK(dup2(streams[i], i) == i);
    CHECK(count_fds() == fds_before);
    CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
    return r;
}

uint8_t
fuzz_byte(struct fuzz_input *in)
{
    if (in->left == 0)
        return 0;
    in->left--;
    return *in->at++;
}

size_t
fuzz_bytes(struct fuzz_input *in, void *to, size_t size)
{
    size = size < in->left ? size : in->left;
    memcpy(to, in->at, size);
    in->at += size;
    in->left -= size;
    return size;
}

uint32_t
fuzz_number(struct fuzz_input *in)
{
    uint32_t number = 0;
    (void)fuzz_bytes(in, &number, sizeof number);
    return number;
}

int
fuzz_fd(uint8_t which)
{
    return palette[which % N_FDS];
}

static void
change_fds(struct fuzz_input *in, struct fuzz_message *message)
{
    uint8_t how = fuzz_byte(in);
    unsigned n = how % 32;
    if (how >= 0xf0) /* as many as there may be, and more */
        n = AFK_ZYGOTE_FDS_MAX - 8 + how % 16;
    if (n < message->n_fds)
        message->n_fds = n;
    while (message->n_fds < n)
        message->fds[message->n_fds++] = fuzz_fd(fuzz_byte(in));
}

void
fuzz_change(struct fuzz_input *in, struct fuzz_message *message)
{
    uint8_t what = fuzz_byte(in);
    for (unsigned n = what % 8; n > 0; n--) {
        size_t at = fuzz_number(in) % sizeof message->data, size = 1 + fuzz_byte(in) % 8;
        if (at + size <= sizeof message->data)
            (void)fuzz_bytes(in, message->data + at, size);
    }
    if ((what & 0x10) != 0)
        message->size = fuzz_number(in) % (sizeof message->data + 1);
    if ((what & 0x20) != 0)
        change_fds(in, message);
}

void
fuzz_any(struct fuzz_input *in, struct fuzz_message *message)
{
    change_fds(in, message);
    message->size = fuzz_bytes(in, message->data, fuzz_number(in) % (sizeof message->data + 1));
}

int
fuzz_send(int socket, const struct fuzz_message *message)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(FUZZ_FDS_MAX * sizeof(int))];
    } control;
    struct iovec vec = {(void *)(uintptr_t)message->data, message->size};
    struct msghdr msg = {.msg_iov = &vec, .msg_iovlen = 1};
    size_t bytes = message->n_fds * sizeof(int);
    if (bytes > 0) {
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(bytes);
        control.header = (struct cmsghdr){.cmsg_level = SOL_SOCKET,
                                          .cmsg_type = SCM_RIGHTS,
                                          .cmsg_len = CMSG_LEN(bytes)};
        memcpy(CMSG_DATA(&control.header), message->fds, bytes);
    }
    return sendmsg(socket, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
}

pid_t
fuzz_sleeper(void)
{
    static char *const argv[] = {(char *)(uintptr_t)"cat", NULL};
    posix_spawn_file_actions_t actions;
    pid_t pid;
    CHECK(posix_spawn_file_actions_init(&actions) == 0);
    CHECK(posix_spawn_file_actions_adddup2(&actions, until_we_end, 0) == 0);
    CHECK(posix_spawnp(&pid, argv[0], &actions, NULL, argv, NULL) == 0);
    (void)posix_spawn_file_actions_destroy(&actions);
    return pid;
}

void
fuzz_end(pid_t pid)
{
    (void)kill(pid, SIGKILL);
    while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
        ;
}
