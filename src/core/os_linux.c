/*
 * System calls of the parent's path. Every function returns >= 0 or a negative
 * errno, and is a fault point; no other file of core calls the kernel, but for
 * child.c, which must not be interrupted by faults or libraries.
 */
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <poll.h>
#include <pty.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define PEEK_BATCH 512 /* at most IOV_MAX */
#define ALLOCATE_BATCH (4u << 20) /* a signal undoes what one fallocate(2) has done */
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008u /* Linux 6.3 */
#endif

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif

static int
result(long r)
{
    return r < 0 ? -errno : (int)r;
}

int
afk_os_pipe(int ret_fds[2], int flags)
{
    return AFK_SYS("pipe2", result(pipe2(ret_fds, flags)));
}

int
afk_os_socketpair(int ret_fds[2], int type)
{
    return AFK_SYS("socketpair", result(socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, ret_fds)));
}

int
afk_os_dup_above(int fd, int lowest)
{
    int r = AFK_SYS("fcntl(F_DUPFD_CLOEXEC)", result(fcntl(fd, F_DUPFD_CLOEXEC, lowest)));
    return r == -EINVAL ? -EMFILE : r; /* `lowest` is above the limit: none is left */
}

int
afk_os_raise(int *fd, int lowest)
{
    if (*fd < 0 || *fd >= lowest)
        return 0;
    int r = afk_os_dup_above(*fd, lowest);
    if (r < 0)
        return r;
    afk_os_close(*fd);
    *fd = r;
    return 0;
}

int
afk_os_thread(pthread_t *ret_thread, void *(*run)(void *), void *arg, bool for_signals)
{
    sigset_t all, old;
    (void)sigfillset(&all);
    if (!for_signals)
        (void)pthread_sigmask(SIG_SETMASK, &all, &old);
    /* The default stack size: targets run on it. */
    int r = AFK_SYS("pthread_create", -pthread_create(ret_thread, NULL, run, arg));
    if (!for_signals)
        (void)pthread_sigmask(SIG_SETMASK, &old, NULL);
    return r;
}

int
afk_os_pidfd_open(pid_t pid)
{
    return AFK_SYS("pidfd_open", result(syscall(SYS_pidfd_open, pid, 0)));
}

int
afk_os_pidfd_signal(int pidfd, int sig)
{
    return AFK_SYS("pidfd_send_signal",
                   result(syscall(SYS_pidfd_send_signal, pidfd, sig, NULL, 0)));
}

static int
status_of(const siginfo_t *info)
{
    if (info->si_code == CLD_EXITED)
        return (info->si_status & 0xff) << 8;
    return (info->si_status & 0x7f) | (info->si_code == CLD_DUMPED ? 0x80 : 0);
}

int
afk_os_pidfd_reap(int pidfd, bool block, int *ret_status)
{
    siginfo_t info;
    int r;

    memset(&info, 0, sizeof info);
    /* 3 is P_PIDFD, which older libc headers do not name. __WALL: also children
     * whose exit signal is not SIGCHLD. */
    do
        r = AFK_SYS("waitid", result(waitid((idtype_t)3, (id_t)pidfd, &info,
                                            WEXITED | __WALL | (block ? 0 : WNOHANG))));
    while (r == -EINTR);
    if (r < 0)
        return r;
    if (info.si_pid == 0)
        return 0;
    *ret_status = status_of(&info);
    return 1;
}

/* linux/pidfd.h of Linux 6.15; older headers lack it. */
struct pidfd_info_v1 {
    uint64_t mask, cgroupid;
    uint32_t pid, tgid, ppid, ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
    int32_t exit_code;
};
#define AFK_PIDFD_INFO_EXIT (1u << 3)

int
afk_os_pidfd_exit_info(int pidfd, int *ret_status)
{
    struct pidfd_info_v1 info;
    unsigned long request = _IOC(_IOC_READ | _IOC_WRITE, 0xff, 11, sizeof info);

    memset(&info, 0, sizeof info);
    info.mask = AFK_PIDFD_INFO_EXIT;
    int r = AFK_SYS("ioctl(PIDFD_GET_INFO)", result(ioctl(pidfd, request, &info)));
    if (r < 0)
        return r;
    if ((info.mask & AFK_PIDFD_INFO_EXIT) == 0)
        return -ESRCH;
    *ret_status = info.exit_code;
    return 0;
}

int
afk_os_openpty(int *ret_master, int *ret_slave)
{
    int r = AFK_SYS("openpty", result(openpty(ret_master, ret_slave, NULL, NULL, NULL)));
    if (r < 0)
        return r;
    /* openpty(3) has no close-on-exec; the GIL is held, so that only threads of
     * other interpreters could start a program in between. */
    (void)fcntl(*ret_master, F_SETFD, FD_CLOEXEC);
    (void)fcntl(*ret_slave, F_SETFD, FD_CLOEXEC);
    return 0;
}

int
afk_os_open(int dir, const char *path, int flags, unsigned mode)
{
    return AFK_SYS("openat", result(openat(dir, path, flags | O_CLOEXEC, mode)));
}

bool
afk_os_fd_is_open(int fd)
{
    return fcntl(fd, F_GETFD) >= 0;
}

uint64_t
afk_os_stamp(uint64_t seed, const char *path)
{
    struct stat st;
    if (stat(path, &st) < 0)
        memset(&st, 0, sizeof st);
    const uint64_t words[] = {st.st_dev, st.st_ino, (uint64_t)st.st_size,
                              (uint64_t)st.st_mtim.tv_sec, (uint64_t)st.st_mtim.tv_nsec,
                              (uint64_t)st.st_ctim.tv_sec, (uint64_t)st.st_ctim.tv_nsec};
    for (unsigned i = 0; i < sizeof words / sizeof *words; i++) {
        seed = (seed ^ words[i]) * 0xff51afd7ed558ccdull; /* odd: nothing of it is lost */
        seed ^= seed >> 32;
    }
    return seed;
}

bool
afk_os_is_cgroup2(int fd)
{
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 && (unsigned long)fs.f_type == 0x63677270ul; /* linux/magic.h */
}

/* user_namespaces(7): there the map is of all ids to themselves. */
bool
afk_os_is_true_root(void)
{
    char map[64] = "";
    unsigned inside = 1, outside = 1, count = 0;
    if (geteuid() != 0)
        return false;
    int fd = open("/proc/self/uid_map", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, map, sizeof map - 1) : -1;
    if (fd >= 0)
        (void)close(fd);
    return n > 0 && sscanf(map, "%u %u %u", &inside, &outside, &count) == 3 && inside == 0 &&
           outside == 0 && count == UINT32_MAX;
}

#define PID_FOR_CHILDREN "/proc/thread-self/ns/pid_for_children"

bool
afk_os_child_would_be_init(void)
{
    /* pid_namespaces(7): the link leads nowhere until the namespace has its first process. */
    char name[64];
    struct stat link;
    return readlink(PID_FOR_CHILDREN, name, sizeof name) < 0 && errno == ENOENT &&
           lstat(PID_FOR_CHILDREN, &link) == 0;
}

bool
afk_os_children_are_elsewhere(void)
{
    char mine[64], theirs[64];
    if (afk_os_child_would_be_init())
        return true;
    ssize_t n = readlink("/proc/thread-self/ns/pid", mine, sizeof mine);
    ssize_t m = readlink(PID_FOR_CHILDREN, theirs, sizeof theirs);
    return n > 0 && m > 0 && (n != m || memcmp(mine, theirs, (size_t)n) != 0);
}

int
afk_os_capabilities(uint64_t ret[3])
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0, 0, 0}, {0, 0, 0}};
    int r = AFK_SYS("capget", result(syscall(SYS_capget, &head, data)));
    ret[0] = (uint64_t)data[1].permitted << 32 | data[0].permitted;
    ret[1] = (uint64_t)data[1].effective << 32 | data[0].effective;
    ret[2] = (uint64_t)data[1].inheritable << 32 | data[0].inheritable;
    return r;
}

int
afk_os_limit_capabilities(const uint64_t most[3])
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    uint64_t now[3];
    int r = afk_os_capabilities(now);
    if (r < 0)
        return r;
    for (int i = 0; i < 3; i++)
        now[i] &= most[i];
    const struct __user_cap_data_struct data[2] = {
        {(uint32_t)now[1], (uint32_t)now[0], (uint32_t)now[2]},
        {(uint32_t)(now[1] >> 32), (uint32_t)(now[0] >> 32), (uint32_t)(now[2] >> 32)}};
    return AFK_SYS("capset", result(syscall(SYS_capset, &head, data)));
}

int
afk_os_stop_async(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0)
        return -errno;
    return AFK_SYS("fcntl(F_SETFL)", result(fcntl(fd, F_SETFL, flags & ~O_ASYNC)));
}

int
afk_os_map_stack(size_t size, void **ret_base)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK;
    return AFK_SYS("mmap", (*ret_base = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0)) ==
                                   MAP_FAILED
                               ? -errno
                               : 0);
}

void
afk_os_unmap_stack(void *base, size_t size)
{
#ifdef __SANITIZE_ADDRESS__
    /* What ran on it did not return, and left its frames' red zones behind. */
    __asan_unpoison_memory_region(base, size);
#endif
    (void)munmap(base, size);
}

ssize_t
afk_os_read(int fd, void *buf, size_t size)
{
    ssize_t n;
    do
        n = AFK_SYS("read", (n = read(fd, buf, size)) < 0 ? -errno : n);
    while (n == -EINTR);
    return n;
}

int
afk_os_write_all(int fd, const void *buf, size_t size)
{
    const char *p = buf;
    while (size > 0) {
        ssize_t n = AFK_SYS("write", (n = write(fd, p, size)) < 0 ? -errno : n);
        if (n == -EINTR)
            continue;
        if (n < 0)
            return (int)n;
        p += n;
        size -= (size_t)n;
    }
    return 0;
}

/* A closed peer is an error, never a SIGPIPE. */
int
afk_os_send(int fd, const void *message, size_t size)
{
    int r;
    do
        r = AFK_SYS("send", result(send(fd, message, size, MSG_NOSIGNAL)));
    while (r == -EINTR);
    return r < 0 ? r : 0;
}

union control {
    struct cmsghdr header;
    char space[CMSG_SPACE(AFK_FDS_MAX * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
};

int
afk_os_send_with_fds(int socket, const struct iovec *vec, size_t n_vec, const int *fds,
                     unsigned n_fds, int flags)
{
    union control control;
    struct msghdr msg = {.msg_iov = (struct iovec *)(uintptr_t)vec, .msg_iovlen = n_vec};
    if (n_fds > 0) {
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        memset(control.space, 0, msg.msg_controllen); /* what lies behind an odd number of them */
        control.header = (struct cmsghdr){.cmsg_level = SOL_SOCKET,
                                          .cmsg_type = SCM_RIGHTS,
                                          .cmsg_len = CMSG_LEN(n_fds * sizeof(int))};
        memcpy(CMSG_DATA(&control.header), fds, n_fds * sizeof(int));
    }
    size_t size = 0;
    for (size_t i = 0; i < n_vec; i++)
        size += vec[i].iov_len;
    ssize_t n;
    do
        n = AFK_SYS("sendmsg", (n = sendmsg(socket, &msg, MSG_NOSIGNAL | flags)) < 0 ? -errno : n);
    while (n == -EINTR);
    return n < 0 ? (int)n : n == (ssize_t)size ? 0 : -EMSGSIZE;
}

ssize_t
afk_os_receive_with_fds(int socket, void *to, size_t size, int *fds, unsigned max,
                        unsigned *ret_n, struct ucred *ret_from, int flags)
{
    union control control;
    struct iovec vec = {to, size};
    struct msghdr msg = {.msg_iov = &vec,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = sizeof control};
    ssize_t n;
    *ret_n = 0;
    do
        n = AFK_SYS("recvmsg",
                    (n = recvmsg(socket, &msg, MSG_CMSG_CLOEXEC | flags)) < 0 ? -errno : n);
    while (n == -EINTR);
    if (n < 0)
        return n;
    bool cut = (msg.msg_flags & MSG_CTRUNC) != 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c != NULL; c = CMSG_NXTHDR(&msg, c)) {
        if (c->cmsg_level != SOL_SOCKET)
            continue;
        if (c->cmsg_type == SCM_CREDENTIALS && ret_from != NULL)
            memcpy(ret_from, CMSG_DATA(c), sizeof *ret_from);
        if (c->cmsg_type != SCM_RIGHTS)
            continue;
        unsigned have = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (unsigned i = 0; i < have; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (*ret_n < max)
                fds[(*ret_n)++] = fd;
            else {
                afk_os_close(fd);
                cut = true;
            }
        }
    }
    if (!cut)
        return n;
    while (*ret_n > 0) /* no room for them in the table of descriptors */
        afk_os_close(fds[--*ret_n]);
    return -EMFILE;
}

int
afk_os_unread_by_peer(int fd)
{
    int n = 0;
    return ioctl(fd, TIOCOUTQ, &n) < 0 ? -errno : n; /* SIOCOUTQ, by its older name */
}

bool
afk_os_hung_up(int fd)
{
    struct pollfd p = {.fd = fd};
    return poll(&p, 1, 0) > 0 && (p.revents & (POLLHUP | POLLERR)) != 0;
}

static int
memfd_create_sealable(const char *name)
{
    /* What may be executed is refused where vm.memfd_noexec=2, see memfd_create(2). */
    int fd = AFK_SYS("memfd_create", result(memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING |
                                                                   MFD_NOEXEC_SEAL)));
    if (fd == -EINVAL) /* before Linux 6.3 */
        fd = AFK_SYS("memfd_create", result(memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)));
    return fd;
}

/* Where that is not there memory is found as it is touched, which may end the process. */
int
afk_os_allocate(int fd, size_t size)
{
    int r = 0;
    for (size_t at = 0; r >= 0 && at < size; at += ALLOCATE_BATCH) {
        size_t left = size - at;
        off_t batch = (off_t)(left < ALLOCATE_BATCH ? left : ALLOCATE_BATCH);
        do
            r = AFK_SYS("fallocate", result(fallocate(fd, 0, (off_t)at, batch)));
        while (r == -EINTR);
    }
    return r == -EOPNOTSUPP || r == -ENOSYS ? 0 : r;
}

int
afk_os_memfd(const char *name, size_t size)
{
    int fd = memfd_create_sealable(name);
    if (fd < 0)
        return fd;
    int r = AFK_SYS("ftruncate", result(ftruncate(fd, (off_t)size)));
    if (r == 0)
        r = AFK_SYS("fcntl(F_ADD_SEALS)",
                    result(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)));
    if (r == 0)
        return fd;
    (void)close(fd);
    return r;
}

int
afk_os_pwrite_all(int fd, const void *buf, size_t size, size_t at)
{
    const char *p = buf;
    while (size > 0) {
        ssize_t n = AFK_SYS("pwrite", (n = pwrite(fd, p, size, (off_t)at)) < 0 ? -errno : n);
        if (n == -EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? (int)n : -ENOSPC;
        p += n;
        at += (size_t)n;
        size -= (size_t)n;
    }
    return 0;
}

int
afk_os_memfd_check(int fd, size_t size)
{
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || fstat(fd, &st) < 0)
        return -errno;
    bool is_right = (seals & F_SEAL_SHRINK) != 0 && (uint64_t)st.st_size == size;
    return is_right ? 0 : -EINVAL;
}

int
afk_os_map(int fd, size_t size, size_t writable, void **ret_base)
{
    int first = writable == size ? PROT_READ | PROT_WRITE : PROT_READ;
    void *base = MAP_FAILED;
    int r = AFK_SYS("mmap", (base = mmap(NULL, size, first, MAP_SHARED, fd, 0)) == MAP_FAILED
                                ? -errno
                                : 0);
    if (r < 0)
        return r;
    if (writable == size)
        (void)madvise(base, size, MADV_DONTFORK);
    else if (writable > 0)
        r = AFK_SYS("mprotect", result(mprotect(base, writable, PROT_READ | PROT_WRITE)));
    if (r < 0)
        (void)munmap(base, size);
    else
        *ret_base = base;
    return r;
}

void
afk_os_unmap(void *base, size_t size)
{
    (void)munmap(base, size);
}

void
afk_os_discard(void *base, size_t size)
{
    (void)madvise(base, size, MADV_REMOVE);
}

int
afk_os_poll(struct pollfd *fds, unsigned n, int64_t timeout_ns)
{
    struct timespec left = {.tv_sec = (time_t)(timeout_ns / 1000000000),
                            .tv_nsec = (long)(timeout_ns % 1000000000)};
    return AFK_SYS("ppoll", result(ppoll(fds, n, timeout_ns < 0 ? NULL : &left, NULL)));
}

void
afk_os_close(int fd)
{
    if (fd >= 0)
        (void)close(fd); /* Linux frees the number even on EINTR */
}

int64_t
afk_os_now_ns(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* process_vm_readv(2) on ourselves; where a seccomp filter forbids it, the
 * kernel's copy into a pipe answers EFAULT just as well. */
int
afk_os_peek(void *dst, const void *src, size_t size)
{
    struct iovec to = {dst, size};
    struct iovec from = {(void *)(uintptr_t)src, size};
    ssize_t n = process_vm_readv(getpid(), &to, 1, &from, 1, 0);

    if (n == (ssize_t)size)
        return 0;
    if (n >= 0 || errno == EFAULT)
        return -EFAULT;
    if (size > PIPE_BUF)
        return -EFAULT;
    int fds[2];
    if (pipe2(fds, O_CLOEXEC | O_NONBLOCK) < 0)
        return -errno;
    int r = 0;
    if (write(fds[1], src, size) != (ssize_t)size || read(fds[0], dst, size) != (ssize_t)size)
        r = -EFAULT;
    (void)close(fds[0]);
    (void)close(fds[1]);
    return r;
}

/* One system call for many addresses: it stops at the first that faults, and goes
 * on after it. */
void
afk_os_peek_each(void *dst, const uintptr_t *addresses, size_t n, size_t size, bool *ret_read)
{
    struct iovec from[PEEK_BATCH];
    size_t done = 0;

    while (done < n) {
        size_t batch = n - done < PEEK_BATCH ? n - done : PEEK_BATCH;
        for (size_t i = 0; i < batch; i++)
            from[i] = (struct iovec){(void *)addresses[done + i], size};
        struct iovec to = {(char *)dst + done * size, batch * size};
        ssize_t got = process_vm_readv(getpid(), &to, 1, from, batch, 0);
        size_t whole = got < 0 ? 0 : (size_t)got / size;
        for (size_t i = 0; i < whole; i++)
            ret_read[done + i] = true;
        done += whole;
        if (whole < batch) { /* this one faults, or the call is forbidden */
            ret_read[done] = afk_os_peek((char *)dst + done * size, (void *)addresses[done], size) == 0;
            done++;
        }
    }
}
