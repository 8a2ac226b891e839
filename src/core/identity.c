/*
 * What a process may do and where it is, as far as a template made earlier may differ from
 * its owner now.
 *
 * Rule: read from the kernel for each start, of the thread that starts, never remembered:
 * any code of the process may have changed it since, by a bare system call too. What is
 * long, and only ever compared, is kept as a hash.
 */
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <linux/securebits.h>
#include <sys/prctl.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STATUS_PIECE 4096
#define LINK_MAX_BYTES 64
#define ROOT_MASK (STATX_INO | STATX_MNT_ID_BITS)

#ifndef STATX_MNT_ID
#define STATX_MNT_ID_BITS 0x1000u /* linux/stat.h */
#else
#define STATX_MNT_ID_BITS STATX_MNT_ID
#endif

extern char **environ;

/* Of what is compared with itself only, and never kept. */
static uint64_t
hash(uint64_t seed, const void *data, size_t size)
{
    const unsigned char *p = data;
    uint64_t h = seed ^ (size * 0x9e3779b97f4a7c15ull);
    for (; size >= 8; size -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, sizeof word);
        h = (h ^ word) * 0xff51afd7ed558ccdull;
        h ^= h >> 32;
    }
    for (; size > 0; size--)
        h = (h ^ *p++) * 0x100000001b3ull;
    h ^= h >> 29;
    return h * 0xc4ceb9fe1a85ec53ull + 1;
}

/* ---- files ------------------------------------------------------------------------- */

int
afk_proc_files_open(struct afk_proc_files *ret)
{
    static const char *const paths[] = {"/proc/self/status", "/proc/self/ns", "/proc/self/cgroup",
                                        "/proc/self/oom_score_adj"};
    int *const to[] = {&ret->status, &ret->ns, &ret->cgroup, &ret->oom_score_adj};
    *ret = (struct afk_proc_files){-1, -1, -1, -1};
    for (unsigned i = 0; i < sizeof to / sizeof *to; i++) {
        /* Of a process that has dropped its privileges the folder is root's, proc(5). */
        int flags = to[i] == &ret->ns ? O_PATH | O_DIRECTORY : O_RDONLY;
        bool begun = afk_lifeline_begin();
        int fd = afk_os_open(AT_FDCWD, paths[i], flags, 0);
        int r = fd < 0 ? fd : afk_os_raise(&fd, 3); /* a closed stream's number is not for us */
        if (r == 0) /* a forked child would read of its parent */
            r = afk_lifeline_register(fd, false);
        afk_lifeline_end(begun);
        *to[i] = fd < 0 ? -1 : fd;
        if (r < 0) {
            afk_proc_files_close(ret);
            return r;
        }
    }
    return 0;
}

void
afk_proc_files_close(struct afk_proc_files *files)
{
    afk_lifeline_close(&files->status);
    afk_lifeline_close(&files->ns);
    afk_lifeline_close(&files->cgroup);
    afk_lifeline_close(&files->oom_score_adj);
}

/* A file of the calling thread: those that are held are the main thread's. */
static int
open_of_thread(int held, const char *path, int flags)
{
    if (syscall(SYS_gettid) == getpid())
        return held;
    int fd = open(path, flags | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

static void
close_of_thread(int held, int fd)
{
    if (fd != held)
        afk_os_close(fd);
}

/* ---- reading ------------------------------------------------------------------------- */

struct reading {
    uint64_t privileges;
    uint64_t ignored;
    int umask;
    bool in_long_line;
    unsigned found; /* bits: umask, ids, capabilities, ignored */
};

static void
take_line(struct reading *r, const char *line, size_t size)
{
    if (r->in_long_line) { /* the rest of it */
        r->privileges = hash(r->privileges, line, size);
        r->in_long_line = false;
        return;
    }
    /* Of proc(5), status: those by which the kernel judges what a process may do. */
    static const char *const names[] = {"Uid:",    "Gid:",    "Groups:", "NoNewPrivs:",
                                        "Seccomp", "CapInh:", "CapPrm:", "CapEff:",
                                        "CapBnd:", "CapAmb:"};
    if (size > 6 && memcmp(line, "Umask:", 6) == 0) {
        r->umask = (int)strtol(line + 6, NULL, 8);
        r->found |= 1;
        return;
    }
    if (size > 7 && memcmp(line, "SigIgn:", 7) == 0) {
        r->ignored = strtoull(line + 7, NULL, 16);
        r->found |= 8;
        return;
    }
    switch (line[0]) {
    case 'U':
    case 'G':
    case 'N':
    case 'S':
    case 'C':
        break;
    default:
        return;
    }
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        size_t length = strlen(names[i]);
        if (size >= length && memcmp(line, names[i], length) == 0) {
            r->privileges = hash(r->privileges, line, size);
            r->found |= line[0] == 'U' ? 2u : line[0] == 'C' ? 4u : 0;
            return;
        }
    }
}

/* A line longer than a piece, of many groups, is taken piece by piece. */
static int
read_status(int fd, struct reading *ret)
{
    char buffer[STATUS_PIECE + 1];
    size_t have = 0;
    off_t at = 0;
    *ret = (struct reading){.umask = -1};
    for (;;) {
        const size_t room = STATUS_PIECE - have;
        ssize_t n;
        do
            n = AFK_SYS("pread", (n = pread(fd, buffer + have, room, at)) < 0 ? -errno : n);
        while (n == -EINTR);
        if (n < 0)
            return (int)n;
        at += n;
        have += (size_t)n;
        buffer[have] = '\0';
        char *line = buffer, *end = buffer + have, *newline;
        while ((newline = memchr(line, '\n', (size_t)(end - line))) != NULL) {
            take_line(ret, line, (size_t)(newline - line));
            line = newline + 1;
        }
        have = (size_t)(end - line);
        if (have == STATUS_PIECE) {
            ret->privileges = hash(ret->privileges, line, have);
            ret->in_long_line = true;
            have = 0;
        }
        if ((size_t)n < room) /* the kernel has written all of it */
            break;
        memmove(buffer, line, have);
    }
    return ret->found == 15 ? 0 : -ESRCH; /* of a thread that has ended */
}

/* Not "pid", which no process ever changes; nor "mnt", for each copy of a mount has an id of
 * its own, so that the root tells it. */
static int
read_namespaces(int dir, uint64_t *ret)
{
    static const char *const names[] = {"user", "pid_for_children", "net",
                                        "ipc",  "uts", "cgroup", "time_for_children"};
    uint64_t h = 1;
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        char text[LINK_MAX_BYTES];
        ssize_t n = readlinkat(dir, names[i], text, sizeof text);
        if (n < 0 && errno != ENOENT) /* a kernel without it; or none has begun there yet */
            return -errno;
        h = hash(h + i, text, n < 0 ? 0 : (size_t)n);
    }
    *ret = h;
    return 0;
}

static int
read_hash(int fd, uint64_t *ret)
{
    char buffer[1024];
    ssize_t n;
    off_t at = 0;
    uint64_t h = 2;
    while ((n = pread(fd, buffer, sizeof buffer, at)) > 0) {
        h = hash(h, buffer, (size_t)n);
        at += n;
        if (n < (ssize_t)sizeof buffer)
            break;
    }
    *ret = h;
    return n < 0 ? -errno : 0;
}

static uint64_t
hash_environment(void)
{
    uint64_t h = 3;
    for (char **entry = environ; entry != NULL && *entry != NULL; entry++)
        h = hash(h, *entry, strlen(*entry));
    return h;
}

static int
read_root(const char *path, uint64_t *ret)
{
    struct statx root;
    if (statx(AT_FDCWD, path, 0, ROOT_MASK, &root) < 0)
        return -errno;
    const uint64_t parts[] = {root.stx_ino, root.stx_dev_major, root.stx_dev_minor,
                              (root.stx_mask & STATX_MNT_ID_BITS) != 0 ? root.stx_mnt_id : 0};
    *ret = hash(4, parts, sizeof parts);
    return 0;
}

static int
read_place(struct afk_identity *identity, struct afk_surroundings *around)
{
    struct statx cwd;
    int r = read_root("/", &identity->root);
    if (r < 0)
        return r;
    /* Where it is not there any more the worker is told of it all the same. */
    if (statx(AT_FDCWD, ".", 0, ROOT_MASK, &cwd) == 0) {
        around->cwd_device = ((uint64_t)cwd.stx_dev_major << 32 | cwd.stx_dev_minor) ^
                             ((cwd.stx_mask & STATX_MNT_ID_BITS) != 0 ? cwd.stx_mnt_id << 8 : 0);
        around->cwd_inode = cwd.stx_ino;
    }
    return 0;
}

static int
read_number(int fd)
{
    char text[16] = "";
    return pread(fd, text, sizeof text - 1, 0) > 0 ? (int)strtol(text, NULL, 10) : 0;
}

static void
read_scheduling(struct afk_surroundings *around)
{
    for (int i = 0; i < AFK_LIMITS_MAX; i++)
        (void)syscall(SYS_prlimit64, 0, i, NULL, &around->limit[i]);
    if (syscall(SYS_sched_getaffinity, 0, sizeof around->cpus, around->cpus) < 0)
        memset(around->cpus, 0, sizeof around->cpus);
    around->nice = getpriority(PRIO_PROCESS, 0);
    around->process_group = getpgrp();
}

int
afk_identity_read(const struct afk_proc_files *held, struct afk_identity *ret_identity,
                  struct afk_surroundings *ret_around)
{
    struct reading reading;
    memset(ret_identity, 0, sizeof *ret_identity);
    memset(ret_around, 0, sizeof *ret_around);
    int status = open_of_thread(held->status, "/proc/thread-self/status", O_RDONLY);
    int r = status < 0 ? status : read_status(status, &reading);
    close_of_thread(held->status, status);
    if (r == 0)
        r = read_place(ret_identity, ret_around);
    if (r < 0)
        return r;
    int securebits = prctl(PR_GET_SECUREBITS, 0, 0, 0, 0);
    ret_identity->privileges = hash(reading.privileges, &securebits, sizeof securebits);
    ret_identity->session = (uint64_t)getsid(0);
    ret_around->umask = reading.umask;
    ret_around->ignored = reading.ignored;
    ret_around->oom_score_adj = read_number(held->oom_score_adj);
    ret_around->environment = hash_environment();
    read_scheduling(ret_around);
    return 0;
}

int
afk_identity_read_rest(const struct afk_proc_files *held, struct afk_identity *identity)
{
    int ns = open_of_thread(held->ns, "/proc/thread-self/ns", O_PATH | O_DIRECTORY);
    int cgroup = open_of_thread(held->cgroup, "/proc/thread-self/cgroup", O_RDONLY);
    int r = ns < 0 ? ns : cgroup < 0 ? cgroup : read_namespaces(ns, &identity->namespaces);
    if (r == 0)
        r = read_hash(cgroup, &identity->cgroup);
    close_of_thread(held->ns, ns);
    close_of_thread(held->cgroup, cgroup);
    return r;
}

static int
open_of(pid_t pid, const char *name, int flags)
{
    char path[64];
    (void)snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    int fd = open(path, flags | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

int
afk_identity_read_of(pid_t pid, struct afk_identity *ret)
{
    struct reading reading = {.umask = -1};
    char root[64];
    int status = open_of(pid, "status", O_RDONLY), ns = open_of(pid, "ns", O_PATH | O_DIRECTORY),
        cgroup = open_of(pid, "cgroup", O_RDONLY);
    memset(ret, 0, sizeof *ret);
    (void)snprintf(root, sizeof root, "/proc/%d/root", (int)pid);
    int r = status < 0 ? status : ns < 0 ? ns : cgroup < 0 ? cgroup : read_status(status, &reading);
    if (r == 0)
        r = read_namespaces(ns, &ret->namespaces);
    if (r == 0)
        r = read_hash(cgroup, &ret->cgroup);
    if (r == 0)
        r = read_root(root, &ret->root);
    ret->privileges = reading.privileges;
    ret->session = (uint64_t)getsid(pid);
    afk_os_close(status);
    afk_os_close(ns);
    afk_os_close(cgroup);
    return r;
}

const char *
afk_identity_difference(const struct afk_identity *a, const struct afk_identity *b)
{
    return a->privileges != b->privileges   ? "the ids, groups, capabilities or filters"
           : a->namespaces != b->namespaces ? "the namespaces"
           : a->root != b->root             ? "the root folder"
           : a->cgroup != b->cgroup         ? "the cgroup"
           : a->session != b->session       ? "the session"
                                            : NULL;
}
