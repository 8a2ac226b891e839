/*
 * Fault points: make the nth system call or allocation of the parent's path
 * fail. Compiled only with -Dfaults=true; a release build has no trace of it.
 */
#include "core.h"

#ifdef AFK_FAULTS
#include <errno.h>
#include <stdatomic.h>

int afk_fault_errno = EIO;
static atomic_uint points, hits, due;
static atomic_bool persistent;
static _Atomic(const char *) last;
static _Thread_local bool spared;

/* A place to put a breakpoint. */
static void
injected(const char *what)
{
    atomic_store(&last, what);
    atomic_fetch_add(&hits, 1);
}

bool
afk_fault_due(const char *what)
{
    unsigned nth = atomic_load(&due);
    if (nth == 0 || spared)
        return false;
    unsigned now = atomic_fetch_add(&points, 1) + 1;
    if (now == nth || (now > nth && atomic_load(&persistent))) {
        injected(what);
        return true;
    }
    return false;
}

void
afk_fault_arm(unsigned nth, int errnum, bool for_good)
{
    atomic_store(&due, 0);
    afk_fault_errno = errnum;
    atomic_store(&persistent, for_good);
    atomic_store(&points, 0);
    atomic_store(&hits, 0);
    atomic_store(&last, NULL);
    atomic_store(&due, nth);
}

/* The faults are the parent's path's: a child goes its way. Async-signal-safe. */
static void
in_forked_child(void)
{
    atomic_store(&due, 0);
}

__attribute__((constructor)) static void
loaded(void)
{
    afk_at_fork_child(in_forked_child);
}

/* So does a worker that is a thread of this process. */
void
afk_fault_spare(void)
{
    spared = true;
}

unsigned afk_fault_hits(void) { return atomic_load(&hits); }
unsigned afk_fault_points(void) { return atomic_load(&points); }
const char *afk_fault_last(void) { return atomic_load(&last); }
#endif
