/*
 * The fds by which an owner holds its workers, and their end in every forked
 * child: a foreign child that kept a lifeline's write end would keep the worker
 * alive after its owner.
 *
 * Rule: no locks (a fork may come from any thread at any time). A slot holds
 * fd + 1, so that zeroed memory is an empty table; chunks are never freed.
 */
#include "core.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#define SLOTS 256
#define HOOKS_MAX 4

struct chunk {
    atomic_int slot[SLOTS];
    _Atomic(struct chunk *) next;
};

static struct chunk first;
static atomic_uint generation;
static void (*hooks[HOOKS_MAX])(void);
static atomic_uint n_hooks;

/* Async-signal-safe: it runs inside fork(2) of any thread, see
 * pthread_atfork(3). */
static void
in_forked_child(void)
{
    atomic_fetch_add(&generation, 1);
    for (struct chunk *c = &first; c != NULL; c = atomic_load(&c->next)) {
        for (unsigned i = 0; i < SLOTS; i++) {
            int fd = atomic_exchange(&c->slot[i], 0) - 1;
            if (fd >= 0)
                (void)close(fd);
        }
    }
    for (unsigned i = 0; i < atomic_load(&n_hooks); i++)
        hooks[i]();
}

__attribute__((constructor)) static void
loaded(void)
{
    /* Fails with ENOMEM only; then no fd is ever registered, see below. */
    if (pthread_atfork(NULL, NULL, in_forked_child) != 0)
        abort();
}

unsigned
afk_generation(void)
{
    return atomic_load(&generation);
}

void
afk_at_fork_child(void (*hook)(void))
{
    unsigned i = atomic_load(&n_hooks);
    if (i < HOOKS_MAX) {
        hooks[i] = hook;
        atomic_store(&n_hooks, i + 1);
    }
}

int
afk_lifeline_register(int fd)
{
    struct chunk *c = &first;
    for (;;) {
        for (unsigned i = 0; i < SLOTS; i++) {
            int empty = 0;
            if (atomic_compare_exchange_strong(&c->slot[i], &empty, fd + 1))
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

void
afk_lifeline_close(int *fd)
{
    if (*fd < 0)
        return;
    for (struct chunk *c = &first; c != NULL; c = atomic_load(&c->next)) {
        for (unsigned i = 0; i < SLOTS; i++) {
            int mine = *fd + 1;
            /* Out of the table first: the other order would let a fork in
             * between close an innocent fd that got the same number. */
            if (atomic_compare_exchange_strong(&c->slot[i], &mine, 0)) {
                (void)close(*fd);
                *fd = -1;
                return;
            }
        }
    }
    (void)close(*fd);
    *fd = -1;
}
