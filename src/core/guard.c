/*
 * The guard of this process: started when the first worker needs it, told of workers by
 * themselves, and gone with its owner. See src/guard/guard.c.
 *
 * Rules: one guard per process; a forked child has none. Its socket is in the table of
 * lifeline fds, so that no forked child keeps the owner's end.
 */
#include "guard.h"
#include "core.h"
#include "anyfork/anyfork.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define GUARD "anyfork-guard"
#define START_NS ((int64_t)10 * 1000000000)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int guard_socket = -1; /* the owner's end */
static _Thread_local bool starting;
static char *path; /* of the program: beside the library; NULL: not known */

/* Async-signal-safe; the fd is closed by the table. */
static void
in_forked_child(void)
{
    guard_socket = -1;
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}

/* While the library is loaded: the name it was loaded by may be relative to a folder
 * that is not the current one any more when the guard is needed. */
static void
find_guard(void)
{
    Dl_info info;
    if (dladdr((void *)(uintptr_t)find_guard, &info) == 0 || info.dli_fname == NULL)
        return;
    char *library = realpath(info.dli_fname, NULL);
    char *slash = library != NULL ? strrchr(library, '/') : NULL;
    if (slash != NULL && asprintf(&path, "%.*s/" GUARD, (int)(slash - library), library) < 0)
        path = NULL;
    free(library);
}

__attribute__((constructor)) static void
loaded(void)
{
    find_guard();
    afk_at_fork_child(in_forked_child);
}

static int
start(int worker_end, int owner, struct anyfork_error *reterr)
{
    if (path == NULL)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_LIFELINE, ENOENT, GUARD);
    const char *const argv[] = {path, NULL}, *const env[] = {NULL};
    const struct anyfork_fd fds[] = {{worker_end, AFK_GUARD_SOCKET}, {owner, AFK_GUARD_OWNER}};
    struct anyfork_options options;
    struct anyfork_child *child = NULL;
    anyfork_options_init(&options);
    options.argv = argv;
    options.env = env;
    options.cwd = "/";
    options.fds = fds;
    options.n_fds = 2;
    options.session = ANYFORK_SESSION_NEW; /* not to be hit by what hits the owner's group */
    options.lifeline_signal = 0;           /* it has an end of its own */
    for (int i = 0; i < 3; i++)
        options.stdio[i].kind = ANYFORK_STDIO_NULL;
    int r = anyfork_spawn_argv(&options, &child, reterr);
    if (r < 0)
        return r;
    /* It goes into the background at once: a child that never ends would be in the way
     * of a host that waits for all of its children. */
    int status = -1;
    r = anyfork_child_wait(child, START_NS, &status);
    anyfork_child_close(child);
    if (r == ANYFORK_ETIMEDOUT || (r == 0 && status != 0))
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_LIFELINE, 0, GUARD " cannot start");
    return 0;
}

/* Both ends are in the table: a forked child that kept the owner's would keep the guard
 * waiting, one that kept the guard's would hide that it is gone. */
static int
make(struct anyfork_error *reterr)
{
    int pair[2] = {-1, -1}, owner;
    /* A new namespace's first process would be the guard's starter, which ends, and the
     * namespace with it; from inside of one it has no right to signal who is outside. */
    if (afk_os_children_are_elsewhere())
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_LIFELINE, EPERM,
                        "a guard must be there before a pid namespace is unshared: start a worker "
                        "with one first");
    bool begun = afk_lifeline_begin();
    int r = afk_os_socketpair(pair, SOCK_SEQPACKET);
    for (int i = 0; i < 2 && r == 0; i++)
        r = afk_lifeline_register(pair[i], false);
    afk_lifeline_end(begun);
    owner = afk_os_pidfd_open(getpid());
    if (r < 0)
        r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_LIFELINE, -r, "guard's socket");
    else if (owner < 0)
        r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_PIDFD, -owner, "guard's owner");
    else
        r = start(pair[1], owner, reterr);
    afk_os_close(owner);
    afk_lifeline_close(&pair[1]);
    if (r < 0) {
        afk_lifeline_close(&pair[0]); /* the end of file ends the guard */
        return r;
    }
    guard_socket = pair[0];
    return 0;
}

/* The worker's, until it has told the guard of itself. */
static int
copy_socket(struct anyfork_error *reterr)
{
    bool begun = afk_lifeline_begin();
    int fd = afk_os_dup_above(guard_socket, 3);
    int r = fd < 0 ? fd : afk_lifeline_register(fd, false);
    afk_lifeline_end(begun);
    if (r == 0)
        return fd;
    afk_lifeline_close(&fd);
    return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_LIFELINE, -r, "guard's socket");
}

int
afk_guard_open(struct anyfork_error *reterr)
{
    (void)pthread_mutex_lock(&lock);
    if (guard_socket >= 0 && afk_os_hung_up(guard_socket)) /* somebody has killed it */
        afk_lifeline_close(&guard_socket);
    starting = true;
    int r = guard_socket >= 0 ? 0 : make(reterr);
    starting = false;
    if (r == 0)
        r = copy_socket(reterr);
    (void)pthread_mutex_unlock(&lock);
    return r;
}

bool
afk_guard_is_starting(void)
{
    return starting;
}

void
afk_guard_drop(uint64_t token)
{
    const struct afk_guard_message message = {.op = AFK_GUARD_DROP, .token = token};
    (void)pthread_mutex_lock(&lock);
    if (guard_socket >= 0)
        (void)afk_os_send(guard_socket, &message, sizeof message);
    (void)pthread_mutex_unlock(&lock);
}
