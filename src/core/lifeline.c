/*
 * The fds by which an owner holds its workers, and their end in every forked
 * child: a foreign child that kept a lifeline's write end would keep the worker
 * alive after its owner.
 *
 * Rules: the table has no locks (a fork may come from any thread at any time), only
 * making and closing what is in it has one, which every fork takes first; for a bounded
 * time, as whoever takes it: another library's fork handler may wait, with the lock held,
 * for a lock that the other one holds. A slot is zero
 * when empty, so that zeroed memory is an empty table; chunks are never freed. A
 * forked child closes the write ends first: if it is the last to hold both ends
 * of a lifeline, closing the read end first would leave nobody to be told.
 */
#include "core.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 256
#define HOOKS_MAX 12
#define WINDOW_SECONDS 2 /* a window is three system calls long, or a fork */

struct chunk {
    atomic_int slot[SLOTS];
    _Atomic(struct chunk *) next;
};

/* A slot's value: fd + 1, and whether it is the write end of a lifeline. */
#define WRITE_END (1 << 30)
#define VALUE(fd, is_write_end) (((fd) + 1) | ((is_write_end) ? WRITE_END : 0))
#define FD(value) (((value) & ~WRITE_END) - 1)

static struct chunk first;
static atomic_uint generation;
static atomic_uint forks;
static void (*hooks[HOOKS_MAX])(void);
static atomic_uint n_hooks;

/* Keeps the making of a write end and its registration apart from a fork of another
 * thread, with which the maker may have no GIL in common. A fork waits for a bounded
 * time only: it may come from a signal handler that interrupted the maker. */
static pthread_mutex_t window = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local const int *spared; /* fds that the next fork of this thread keeps */
static _Thread_local unsigned n_spared;
static atomic_bool forking;       /* the window's holder is a fork, */
static _Atomic(pthread_t) forker; /* of this thread */

bool
afk_lifeline_begin(void)
{
    struct timespec until;
    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += WINDOW_SECONDS;
    return pthread_mutex_timedlock(&window, &until) == 0;
}

void
afk_lifeline_end(bool begun)
{
    if (begun)
        (void)pthread_mutex_unlock(&window);
}

void
afk_lifeline_before_fork(void)
{
    atomic_fetch_add(&forks, 1);
    if (afk_lifeline_begin()) {
        atomic_store(&forker, pthread_self());
        atomic_store(&forking, true);
    }
}

void
afk_lifeline_after_fork_in_parent(void)
{
    if (atomic_load(&forking) && pthread_equal(atomic_load(&forker), pthread_self())) {
        atomic_store(&forking, false);
        (void)pthread_mutex_unlock(&window);
    }
}

void
afk_lifeline_spare(const int *fds, unsigned n)
{
    spared = fds;
    n_spared = n;
}

static bool
is_spared(int fd)
{
    for (unsigned i = 0; i < n_spared; i++)
        if (spared[i] == fd)
            return true;
    return false;
}

/* Async-signal-safe: it runs inside fork(2) of any thread, see
 * pthread_atfork(3). */
void
afk_lifeline_after_fork_in_child(void)
{
    atomic_fetch_add(&generation, 1);
    atomic_store(&forking, false);
    window = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    for (int write_ends = 1; write_ends >= 0; write_ends--) {
        for (struct chunk *c = &first; c != NULL; c = atomic_load(&c->next)) {
            for (unsigned i = 0; i < SLOTS; i++) {
                int value = atomic_load(&c->slot[i]);
                if (value == 0 || (write_ends && (value & WRITE_END) == 0))
                    continue;
                atomic_store(&c->slot[i], 0);
                if (!is_spared(FD(value)))
                    (void)close(FD(value));
            }
        }
    }
    for (unsigned i = 0; i < atomic_load(&n_hooks); i++)
        hooks[i]();
}

__attribute__((constructor)) static void
loaded(void)
{
    /* Fails with ENOMEM only; then no fd is ever registered, see below. */
    if (pthread_atfork(afk_lifeline_before_fork, afk_lifeline_after_fork_in_parent,
                       afk_lifeline_after_fork_in_child) != 0)
        abort();
}

unsigned
afk_generation(void)
{
    return atomic_load(&generation);
}

unsigned
afk_forks(void)
{
    return atomic_load(&forks);
}

void
afk_at_fork_child(void (*hook)(void))
{
    unsigned i = atomic_load(&n_hooks);
    if (i < HOOKS_MAX) {
        hooks[i] = hook;
        atomic_store(&n_hooks, i + 1);
    }
    else {
        abort(); /* while the library is loaded: one more file of ours than HOOKS_MAX */
    }
}

int
afk_lifeline_register(int fd, bool is_write_end)
{
    struct chunk *c = &first;
    for (;;) {
        for (unsigned i = 0; i < SLOTS; i++) {
            int empty = 0;
            if (atomic_load(&c->slot[i]) == 0 &&
                atomic_compare_exchange_strong(&c->slot[i], &empty, VALUE(fd, is_write_end)))
                return 0;
        }
        struct chunk *next = atomic_load(&c->next);
        if (next == NULL) {
            struct chunk *fresh = AFK_ALLOC("calloc(chunk)", calloc(1, sizeof *fresh));
            if (fresh == NULL)
                return -ENOMEM;
            if (atomic_compare_exchange_strong(&c->next, &next, fresh))
                next = fresh;
            else
                free(fresh);
        }
        c = next;
    }
}

bool
afk_lifeline_holds(int fd)
{
    for (struct chunk *c = &first; c != NULL; c = atomic_load(&c->next)) {
        for (unsigned i = 0; i < SLOTS; i++) {
            int value = atomic_load(&c->slot[i]);
            if (value != 0 && FD(value) == fd)
                return true;
        }
    }
    return false;
}

void
afk_lifeline_forget(int fd)
{
    for (struct chunk *c = &first; c != NULL; c = atomic_load(&c->next)) {
        for (unsigned i = 0; i < SLOTS; i++) {
            int mine = atomic_load(&c->slot[i]);
            if (mine != 0 && FD(mine) == fd && atomic_compare_exchange_strong(&c->slot[i], &mine, 0))
                return;
        }
    }
}

void
afk_lifeline_close(int *fd)
{
    if (*fd < 0)
        return;
    /* Out of the table first: the other order would let a fork in between close an
     * innocent fd that got the same number. */
    bool begun = afk_lifeline_begin();
    afk_lifeline_forget(*fd);
    (void)close(*fd);
    afk_lifeline_end(begun);
    *fd = -1;
}
