/*
 * Threads that hold an interpreter's own GIL while its caller forks.
 *
 * Rules: threads are kept and used again, for creating one costs more than the
 * fork. No locks: slots are claimed by compare-and-swap, and a forked child,
 * where the threads do not exist, finds the table empty.
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
    int result;
};

static struct afk_holder holders[HOLDERS_MAX];

static void
wait_for(sem_t *sem)
{
    while (sem_wait(sem) < 0 && errno == EINTR)
        ;
}

/* Wakes the thread on this CPU, which we are about to leave idle by waiting for
 * it. Woken where it slept it would queue behind the new child, for a
 * millisecond. */
static void
wake_here(struct afk_holder *h, sem_t *sem)
{
    int cpu = sched_getcpu();
    cpu_set_t here;
    CPU_ZERO(&here);
    if (cpu >= 0 && cpu < CPU_SETSIZE) {
        CPU_SET(cpu, &here);
        (void)pthread_setaffinity_np(h->thread, sizeof here, &here);
    }
    (void)sem_post(sem);
}

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
        PyThreadState *ts = AFK_ALLOC("PyThreadState_New", PyThreadState_New(h->interp));
        h->result = ts != NULL ? 0 : -ENOMEM;
        if (ts != NULL)
            PyEval_RestoreThread(ts);
        (void)sem_post(&h->taken);
        wait_for(&h->release);
        if (ts != NULL) {
            PyThreadState_Clear(ts);
            PyThreadState_DeleteCurrent();
        }
        h->interp = NULL;
        atomic_store(&h->state, IDLE);
    }
    return NULL;
}

static int
start_thread(struct afk_holder *h)
{
    pthread_attr_t attr;
    sigset_t all, old;

    (void)sem_init(&h->take, 0, 0);
    (void)sem_init(&h->taken, 0, 0);
    (void)sem_init(&h->release, 0, 0);
    h->interp = NULL;
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
    wake_here(h, &h->take);
    wait_for(&h->taken);
    return h->result;
}

void
afk_holder_release(struct afk_holder *h)
{
    if (h == NULL)
        return;
    if (h->interp != NULL)
        wake_here(h, &h->release);
    else
        (void)sem_post(&h->take);
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
