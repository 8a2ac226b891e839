/*
 * Threads that hold an interpreter's own GIL while its caller forks.
 *
 * Rules: a thread waits ready in its slot, for creating one costs more than the
 * fork; it holds a GIL once, makes its successor and ends. Its caller takes the
 * GIL back without waiting for it (afk_holder_let_go): woken beside a new child
 * it would be a millisecond late. No locks: slots are claimed by
 * compare-and-swap, and a forked child, where the threads do not exist, finds
 * the table empty.
 */
#include "cpython/cpython.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>

#define HOLDERS_MAX 256
#define STACK_BYTES (256 * 1024) /* PyThreadState_Clear may run finalizers */

enum { EMPTY, IDLE, BUSY };

struct afk_holder {
    atomic_int state;
    pthread_t thread;
    sem_t take, taken, release;
    PyInterpreterState *interp;
    PyThreadState *ts;  /* attached on the holder's thread; deleted by the caller */
    int result;
};

static struct afk_holder holders[HOLDERS_MAX];

static void
wait_for(sem_t *sem)
{
    while (sem_wait(sem) < 0 && errno == EINTR)
        ;
}

/* On this CPU, which we are about to leave idle by waiting for that thread. Woken
 * where it slept it would queue behind the new child, for a millisecond. */
void
afk_wake_here(pthread_t thread, sem_t *sem)
{
    int cpu = sched_getcpu();
    cpu_set_t here;
    CPU_ZERO(&here);
    if (cpu >= 0 && cpu < CPU_SETSIZE) {
        CPU_SET(cpu, &here);
        (void)pthread_setaffinity_np(thread, sizeof here, &here);
    }
    (void)sem_post(sem);
}

static int start_thread(struct afk_holder *h);

static void *
holder_main(void *arg)
{
    struct afk_holder *h = arg;
    for (;;) {
        wait_for(&h->take);
        if (h->interp == NULL) { /* claimed, but not needed after all */
            atomic_store(&h->state, IDLE);
            continue;
        }
        h->ts = AFK_ALLOC("PyThreadState_New", PyThreadState_New(h->interp));
        h->result = h->ts != NULL ? 0 : -ENOMEM;
        if (h->ts != NULL)
            PyEval_RestoreThread(h->ts);
        (void)sem_post(&h->taken);
        wait_for(&h->release);
        h->interp = NULL;
        if (h->ts != NULL)
            break;
        atomic_store(&h->state, IDLE);
    }
    /* For CPython this thread is still attached to a state that is no more: it
     * must not call CPython again. */
    h->ts = NULL;
    atomic_store(&h->state, start_thread(h) == 0 ? IDLE : EMPTY);
    return NULL;
}

static int
start_thread(struct afk_holder *h)
{
    pthread_attr_t attr;
    sigset_t all, old;

    int r = pthread_attr_init(&attr);
    if (r != 0)
        return r;
    (void)pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    (void)pthread_attr_setstacksize(&attr, STACK_BYTES);
    /* The host's signals are not for this thread. */
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &old);
    r = AFK_SYS("pthread_create", pthread_create(&h->thread, &attr, holder_main, h));
    if (r < 0)
        r = -r;
    (void)pthread_sigmask(SIG_SETMASK, &old, NULL);
    (void)pthread_attr_destroy(&attr);
    return r;
}

struct afk_holder *
afk_holder_claim(int *ret_errno)
{
    for (unsigned i = 0; i < HOLDERS_MAX; i++) {
        int idle = IDLE;
        if (atomic_load(&holders[i].state) == IDLE &&
            atomic_compare_exchange_strong(&holders[i].state, &idle, BUSY))
            return &holders[i];
    }
    for (unsigned i = 0; i < HOLDERS_MAX; i++) {
        int empty = EMPTY;
        if (atomic_compare_exchange_strong(&holders[i].state, &empty, BUSY)) {
            (void)sem_init(&holders[i].take, 0, 0);
            (void)sem_init(&holders[i].taken, 0, 0);
            (void)sem_init(&holders[i].release, 0, 0);
            holders[i].interp = NULL;
            holders[i].ts = NULL;
            int r = start_thread(&holders[i]);
            if (r == 0)
                return &holders[i];
            atomic_store(&holders[i].state, EMPTY);
            *ret_errno = r;
            return NULL;
        }
    }
    *ret_errno = EAGAIN;
    return NULL;
}

int
afk_holder_take(struct afk_holder *h, PyInterpreterState *interp)
{
    h->interp = interp;
    afk_wake_here(h->thread, &h->take);
    wait_for(&h->taken);
    return h->result;
}

/* The holder's thread sleeps and is inside nothing: what it holds may be let go
 * for it. A relaxed store is what drop_gil() does, under the GIL's mutex and with
 * a signal; waiters look again within an interval, and the caller is one. */
void
afk_holder_let_go(struct afk_holder *h, const struct afk_layout *lo)
{
    if (h->ts != NULL)
        __atomic_store_n(afk_gil_locked(lo, *afk_interp_gil(lo, h->interp)), 0, __ATOMIC_RELEASE);
}

void
afk_holder_done(struct afk_holder *h)
{
    if (h->interp == NULL) { /* claimed only */
        (void)sem_post(&h->take);
        return;
    }
    if (h->ts != NULL) {
        /* Bound to the holder's thread, whose specific keys are not ours to clear. */
        h->ts->_status.bound_gilstate = 0;
        h->ts->_status.active = 0;
        PyThreadState_Clear(h->ts);
        PyThreadState_Delete(h->ts);
    }
    (void)sem_post(&h->release);
}

unsigned
afk_holder_threads(void)
{
    unsigned n = 0;
    for (unsigned i = 0; i < HOLDERS_MAX; i++)
        n += atomic_load(&holders[i].state) != EMPTY;
    return n;
}

/* Async-signal-safe: stores only. */
static void
in_forked_child(void)
{
    for (unsigned i = 0; i < HOLDERS_MAX; i++)
        atomic_store(&holders[i].state, EMPTY);
}

__attribute__((constructor)) static void
loaded(void)
{
    afk_at_fork_child(in_forked_child);
}
