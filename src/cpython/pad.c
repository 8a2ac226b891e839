/*
 * The launch pads: threads that never enter an event loop and fork on request. One
 * is the only thread of an isolated sub-interpreter, one belongs to main.
 *
 * Rules: they keep no thread state of main between requests. Every wait for one
 * has a deadline and looks whether the interpreter is finalizing; who gives up
 * is never forked for (afk_pad_commit). They end, with their interpreter, from
 * threading._register_atexit(), before anything of Python is taken down. In a
 * forked child they do not exist.
 */
#include "cpython/cpython.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SLICE_NS 50000000 /* between two looks at Py_IsFinalizing() */

enum { REQUESTED, RUNNING, COMMITTED, DONE, ABANDONED };

/* Main's GIL, which the caller need not let go: it only waits. Beside busy threads
 * pad and caller would each have to win it back. */
enum loan {
    NO_LOAN,
    OFFERED,   /* by the caller, detached from a state that holds it */
    TAKEN,     /* the pad's fresh state of main runs on it */
    RETURNING, /* the pad will not let it go any more */
    RETURNED,
    SPENT,     /* somebody else got it: a hook waited for something */
    REVOKED,   /* the caller gave up, and waits for the GIL as anybody does */
};

/* Freed by whichever of caller and pad is the last to let go. */
struct request {
    atomic_int state;
    atomic_int users;
    sem_t done;
    struct afk_pad_work work;
    enum afk_pad kind;
    cpu_set_t caller_cpus; /* a worker runs where its caller may */
    sigset_t caller_mask;  /* and what fork hooks start gets the signals that it would */
    atomic_int loan;
    int result;
    struct anyfork_error error;
};

struct pad {
    enum afk_pad kind;
    pthread_t thread;
    sem_t wake;
    _Atomic(struct request *) request; /* taken by exchange, by pad or caller */
    atomic_bool quit;
    atomic_bool failed; /* its thread has returned, or is about to */
    atomic_bool idle;   /* waits for nothing but a request */
};

static struct place {
    pthread_mutex_t door; /* one request at a time */
    struct pad *pad;
} places[AFK_PAD_COUNT] = {
    [AFK_PAD_SUBINT] = {.door = PTHREAD_MUTEX_INITIALIZER},
    [AFK_PAD_MAIN] = {.door = PTHREAD_MUTEX_INITIALIZER},
};
static _Atomic(PyInterpreterState *) pad_interp; /* from its making to its end */
static atomic_bool registered; /* with threading._register_atexit() */
static atomic_bool stopped;    /* by it: Python is shutting down */
static _Thread_local struct request *serving;

/* An import hook that is the proof: nothing that runs an event loop is ever
 * imported in this interpreter. */
static const char blocker[] =
    "import sys\n"
    "LOOPS = frozenset(('asyncio', 'trio', 'anyio', 'uvloop', 'curio', 'tornado',\n"
    "                   'twisted', 'gevent', 'eventlet'))\n"
    "class NoEventLoops:\n"
    "    @staticmethod\n"
    "    def find_spec(name, path=None, target=None):\n"
    "        if name.partition('.')[0] in LOOPS:\n"
    "            raise ImportError('the launch pad imports no event loop: ' + name)\n"
    "        return None\n"
    "present = LOOPS.intersection(sys.modules)\n"
    "if present:\n"
    "    raise ImportError('an event loop is imported at start-up: ' + ', '.join(sorted(present)))\n"
    "sys.meta_path.insert(0, NoEventLoops)\n";

static void
drop_work(const struct afk_pad_work *work)
{
    if (work->free != NULL)
        work->free(work->arg);
}

static void
let_go(struct request *r)
{
    if (atomic_fetch_sub(&r->users, 1) != 1)
        return;
    (void)sem_destroy(&r->done);
    drop_work(&r->work);
    free(r);
}

static void
wait_for(sem_t *sem)
{
    while (sem_wait(sem) < 0 && errno == EINTR)
        ;
}

/* On this CPU, which we are about to leave idle by waiting for that thread. Woken
 * where it slept it would queue behind the new child, for a millisecond. */
static void
wake_here(pthread_t thread, sem_t *sem)
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

bool
afk_pad_commit(void)
{
    int running = RUNNING;
    return serving == NULL ||
           atomic_compare_exchange_strong(&serving->state, &running, COMMITTED);
}

bool
afk_pad_borrow_gil(void)
{
    int offered = OFFERED;
    return serving != NULL && atomic_compare_exchange_strong(&serving->loan, &offered, TAKEN);
}

bool
afk_pad_begin_return(bool is_ours)
{
    int taken = TAKEN;
    return serving != NULL &&
           atomic_compare_exchange_strong(&serving->loan, &taken, is_ours ? RETURNING : SPENT) &&
           is_ours;
}

void
afk_pad_end_return(void)
{
    atomic_store(&serving->loan, RETURNED);
}

/* By the caller, once it waits no more: true if ts holds the GIL as before. */
static bool
end_loan(struct request *r)
{
    int loan = atomic_load(&r->loan);
    while ((loan == OFFERED || loan == TAKEN) &&
           !atomic_compare_exchange_weak(&r->loan, &loan, REVOKED))
        ;
    while (atomic_load(&r->loan) == RETURNING)
        (void)sched_yield();
    return loan == OFFERED || atomic_load(&r->loan) == RETURNED;
}

static void
serve(struct request *r)
{
    (void)pthread_setaffinity_np(pthread_self(), sizeof r->caller_cpus, &r->caller_cpus);
    int requested = REQUESTED;
    if (atomic_compare_exchange_strong(&r->state, &requested, RUNNING)) {
        sigset_t ours;
        serving = r;
        (void)pthread_sigmask(SIG_SETMASK, &r->caller_mask, &ours);
        r->result = r->work.job(r->work.arg, &r->error);
        (void)pthread_sigmask(SIG_SETMASK, &ours, NULL);
        serving = NULL;
        /* DONE unless the caller gave up meanwhile. */
        int running = RUNNING, committed = COMMITTED;
        if (!atomic_compare_exchange_strong(&r->state, &running, DONE))
            (void)atomic_compare_exchange_strong(&r->state, &committed, DONE);
        (void)sem_post(&r->done);
    }
    let_go(r);
}

/* The pad's interpreter; attached to it on success, detached on failure. */
static PyThreadState *
make_interpreter(struct anyfork_error *reterr)
{
    PyThreadState *ts = afk_subint_new(ANYFORK_STAGE_PAD, reterr);
    if (ts == NULL)
        return NULL;
    if (PyRun_SimpleString(blocker) != 0) {
        Py_EndInterpreter(ts);
        (void)AFK_FAIL(reterr, ANYFORK_EUNAVAILABLE, ANYFORK_STAGE_PAD, 0,
                       "an event loop is imported when an interpreter starts");
        return NULL;
    }
    atomic_store(&pad_interp, ts->interp);
    return ts;
}

static int
came_up(void *arg, struct anyfork_error *reterr)
{
    (void)arg;
    (void)reterr;
    return 0;
}

static void *
pad_main(void *arg)
{
    struct pad *p = arg;
    wait_for(&p->wake); /* the first request: answered when the pad is up */
    struct request *first = atomic_exchange(&p->request, NULL);
    if (first == NULL) /* stopped before it was ever asked */
        return NULL;
    /* That of main has none of its own: it attaches to main for each request. */
    PyThreadState *ts = p->kind == AFK_PAD_SUBINT ? make_interpreter(&first->error) : NULL;
    if (ts == NULL && p->kind == AFK_PAD_SUBINT) {
        int requested = REQUESTED;
        struct anyfork_error why = first->error;
        atomic_store(&p->failed, true);
        /* Whoever asked meanwhile, since the first gave up, is told the same. */
        for (struct request *r = first; r != NULL; r = atomic_exchange(&p->request, NULL)) {
            requested = REQUESTED;
            r->error = why;
            r->result = why.code;
            if (atomic_compare_exchange_strong(&r->state, &requested, DONE))
                (void)sem_post(&r->done);
            let_go(r);
        }
        return NULL;
    }
    for (struct request *r = first;; r = atomic_exchange(&p->request, NULL)) {
        if (r != NULL) /* NULL: an abandoned one was replaced */
            serve(r);
        if (ts != NULL)
            (void)PyEval_SaveThread();
        atomic_store(&p->idle, true);
        wait_for(&p->wake);
        atomic_store(&p->idle, false);
        if (ts != NULL)
            PyEval_RestoreThread(ts);
        if (atomic_load(&p->quit))
            break;
    }
    if (ts != NULL) {
        Py_EndInterpreter(ts);
        atomic_store(&pad_interp, NULL);
    }
    return NULL;
}

static struct timespec
realtime_after(int64_t ns)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_REALTIME, &t);
    t.tv_sec += ns / 1000000000;
    t.tv_nsec += ns % 1000000000;
    if (t.tv_nsec >= 1000000000) {
        t.tv_nsec -= 1000000000;
        t.tv_sec++;
    }
    return t;
}

/* Waits detached. */
static int
await(struct request *r, int64_t deadline, struct anyfork_error *reterr)
{
    for (;;) {
        int64_t now = afk_os_now_ns();
        struct timespec until = realtime_after(SLICE_NS);
        if (sem_timedwait(&r->done, &until) == 0) {
            if (reterr != NULL)
                *reterr = r->error;
            return r->result;
        }
        bool finalizing = Py_IsFinalizing();
        if (!finalizing && now < deadline)
            continue;
        int requested = REQUESTED, running = RUNNING;
        if (atomic_compare_exchange_strong(&r->state, &requested, ABANDONED) ||
            atomic_compare_exchange_strong(&r->state, &running, ABANDONED)) {
            if (finalizing)
                return AFK_FAIL(reterr, ANYFORK_EFINALIZING, ANYFORK_STAGE_PAD, 0,
                                "can't fork at interpreter shutdown");
            return AFK_FAIL(reterr, ANYFORK_ETIMEDOUT, ANYFORK_STAGE_PAD, ETIMEDOUT,
                            "a lock that the caller holds may be wanted by a before-fork "
                            "hook; use method fork");
        }
        /* COMMITTED: only fork(2) itself is left to wait for. */
        deadline = now + (int64_t)1000000000;
    }
}

/* lent: in, whether to offer main's GIL, which the caller has kept; out, whether it
 * is the caller's again. */
static int
ask(struct pad *p, const struct afk_pad_work *work, int64_t deadline, bool *lent,
    struct anyfork_error *reterr)
{
    struct request *r = AFK_ALLOC("calloc(request)", calloc(1, sizeof *r));
    if (r == NULL) {
        drop_work(work);
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "launch pad");
    }
    (void)sem_init(&r->done, 0, 0);
    atomic_store(&r->users, 2);
    atomic_store(&r->loan, *lent ? OFFERED : NO_LOAN);
    r->kind = p->kind;
    r->work = *work;
    (void)pthread_sigmask(SIG_SETMASK, NULL, &r->caller_mask);
    if (pthread_getaffinity_np(pthread_self(), sizeof r->caller_cpus, &r->caller_cpus) != 0)
        memset(&r->caller_cpus, 0xff, sizeof r->caller_cpus);
    struct request *unserved = atomic_exchange(&p->request, r);
    if (unserved != NULL)
        let_go(unserved); /* its caller gave up while the pad was busy */
    wake_here(p->thread, &p->wake);
    int result = await(r, deadline, reterr);
    *lent = end_loan(r);
    if (result >= 0 && work->collect != NULL)
        work->collect(work->arg, work->collect_into);
    let_go(r);
    return result;
}

/* Called with main's GIL; Python ends the pad before it ends itself. */
static int
register_stop_in_main(struct anyfork_error *reterr)
{
    PyObject *ext = PyImport_ImportModule("anyfork._anyfork");
    PyObject *stop = ext ? PyObject_GetAttrString(ext, "_pad_stop") : NULL;
    PyObject *threading = stop ? PyImport_ImportModule("threading") : NULL;
    PyObject *r = threading ? PyObject_CallMethod(threading, "_register_atexit", "O", stop) : NULL;
    int result = 0;
    if (r == NULL) {
        bool late = PyErr_ExceptionMatches(PyExc_RuntimeError);
        result = afk_fail_python(reterr, ANYFORK_STAGE_PAD, __LINE__, "launch pad");
        if (late)
            result = AFK_FAIL(reterr, ANYFORK_EFINALIZING, ANYFORK_STAGE_PAD, 0,
                              "can't fork at interpreter shutdown");
    }
    Py_XDECREF(r);
    Py_XDECREF(threading);
    Py_XDECREF(stop);
    Py_XDECREF(ext);
    return result;
}

int
afk_pad_register_stop(struct anyfork_error *reterr)
{
    PyThreadState *from, *fresh;
    if (atomic_load(&stopped))
        return AFK_FAIL(reterr, ANYFORK_EFINALIZING, ANYFORK_STAGE_PAD, 0,
                        "can't fork at interpreter shutdown");
    if (atomic_load(&registered))
        return 0;
    int r = ANYFORK_EUNAVAILABLE;
    if (PyInterpreterState_Get() == PyInterpreterState_Main()) {
        r = register_stop_in_main(reterr);
    }
    else {
        fresh = afk_hop_enter(PyInterpreterState_Main(), &from);
        if (fresh == NULL)
            return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "thread state");
        PyObject *boot = afk_boot_prepare(reterr); /* main may not know our package */
        if (boot != NULL)
            r = register_stop_in_main(reterr);
        Py_XDECREF(boot);
        afk_swap_back(fresh, from);
    }
    if (r == 0)
        atomic_store(&registered, true);
    return r;
}

static void
forget(struct place *place)
{
    struct request *unserved = atomic_exchange(&place->pad->request, NULL);
    if (unserved != NULL)
        let_go(unserved);
    (void)sem_destroy(&place->pad->wake);
    free(place->pad);
    place->pad = NULL;
}

/* A pad that did not answer in time is in an unknown place (in a hook, waiting
 * for a lock): it is left there, and serves again once it comes back. */
static int
bring_up(enum afk_pad kind, int64_t deadline, struct anyfork_error *reterr)
{
    struct place *place = &places[kind];
    if (place->pad != NULL && atomic_load(&place->pad->failed)) {
        (void)pthread_join(place->pad->thread, NULL);
        forget(place);
    }
    if (place->pad != NULL)
        return 0;
    struct pad *p = AFK_ALLOC("calloc(pad)", calloc(1, sizeof *p));
    if (p == NULL)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "launch pad");
    p->kind = kind;
    (void)sem_init(&p->wake, 0, 0);
    int r = afk_os_thread(&p->thread, pad_main, p, false);
    if (r < 0) {
        (void)sem_destroy(&p->wake);
        free(p);
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_THREAD, -r, "launch pad");
    }
    place->pad = p;
    bool lent = false;
    return ask(p, &(struct afk_pad_work){.job = came_up}, deadline, &lent, reterr);
}

static int
run_with_door(enum afk_pad kind, const struct afk_pad_work *work, int64_t deadline,
              struct anyfork_error *reterr)
{
    int r = atomic_load(&stopped)
                ? AFK_FAIL(reterr, ANYFORK_EFINALIZING, ANYFORK_STAGE_PAD, 0,
                           "can't fork at interpreter shutdown")
                : bring_up(kind, deadline, reterr);
    if (r < 0) {
        drop_work(work);
        return r;
    }
    bool lent = false;
    return ask(places[kind].pad, work, deadline, &lent, reterr);
}

/* With the door. Only to an idle pad: one that comes up, or comes back from a hook,
 * needs main's GIL itself. */
static bool
can_lend(const struct pad *pad, const PyThreadState *caller)
{
    const struct afk_layout *lo = afk_layout();
    return lo->state[AFK_FEATURE_ATTACH] == AFK_READY && !atomic_load(&stopped) && pad != NULL &&
           atomic_load(&pad->idle) && !atomic_load(&pad->failed) &&
           *afk_interp_gil(lo, caller->interp) == *afk_interp_gil(lo, PyInterpreterState_Main());
}

int
afk_pad_run(enum afk_pad kind, const struct afk_pad_work *work, int64_t timeout_ns,
            struct anyfork_error *reterr)
{
    struct place *place = &places[kind];
    PyThreadState *me = PyThreadState_Get();
    PyInterpreterState *here = me->interp; /* `me` may be freed: Python may end */
    int64_t deadline = afk_os_now_ns() + timeout_ns;

    if (serving != NULL && serving->kind == kind) {
        drop_work(work);
        return AFK_FAIL(reterr, ANYFORK_EUNAVAILABLE, ANYFORK_STAGE_PAD, 0,
                        "a fork hook on the launch pad asks that launch pad: use method fork");
    }
    int result = afk_pad_register_stop(reterr);
    if (result < 0) {
        drop_work(work);
        return result;
    }
    if (pthread_mutex_trylock(&place->door) == 0) {
        if (can_lend(place->pad, me)) {
            const struct afk_layout *lo = afk_layout();
            bool lent = true;
            afk_leave(lo, me);
            result = ask(place->pad, work, deadline, &lent, reterr);
            (void)pthread_mutex_unlock(&place->door);
            if (lent)
                afk_enter(lo, me);
            else
                afk_attach(me, here);
            return result;
        }
        (void)pthread_mutex_unlock(&place->door);
    }
    struct timespec until = realtime_after(timeout_ns);
    (void)PyEval_SaveThread();
    if (pthread_mutex_timedlock(&place->door, &until) != 0) {
        drop_work(work);
        result = AFK_FAIL(reterr, ANYFORK_ETIMEDOUT, ANYFORK_STAGE_PAD, ETIMEDOUT,
                          "other starts are waiting for it");
    }
    else {
        result = run_with_door(kind, work, deadline, reterr);
        (void)pthread_mutex_unlock(&place->door);
    }
    afk_attach(me, here);
    return result;
}

static int
stop(struct place *place, const struct timespec *until)
{
    int r = 0;
    if (pthread_mutex_timedlock(&place->door, until) != 0)
        return ANYFORK_ETIMEDOUT;
    if (place->pad != NULL) {
        atomic_store(&place->pad->quit, true);
        (void)sem_post(&place->pad->wake);
        if (pthread_timedjoin_np(place->pad->thread, NULL, until) == 0)
            forget(place);
        else
            r = ANYFORK_ETIMEDOUT; /* left alone: it waits in somebody's hook */
    }
    (void)pthread_mutex_unlock(&place->door);
    return r;
}

int
afk_pad_stop(int64_t timeout_ns)
{
    struct timespec until = realtime_after(timeout_ns);
    int r = 0;

    atomic_store(&stopped, true);
    PyThreadState *ts = PyEval_SaveThread();
    for (int kind = AFK_PAD_NONE + 1; kind < AFK_PAD_COUNT; kind++) {
        int one = stop(&places[kind], &until);
        r = one < 0 ? one : r;
    }
    PyEval_RestoreThread(ts);
    return r;
}

/* Another Py_Initialize() after a Py_FinalizeEx(). */
void
afk_pad_begin(void)
{
    atomic_store(&registered, false);
    atomic_store(&stopped, false);
}

void
afk_pad_revive(void)
{
    atomic_store(&stopped, false);
}

unsigned
afk_pad_threads(void)
{
    unsigned n = 0;
    for (int kind = AFK_PAD_NONE + 1; kind < AFK_PAD_COUNT; kind++)
        n += places[kind].pad != NULL;
    return n;
}

bool
afk_pad_has_interpreter(void)
{
    return places[AFK_PAD_SUBINT].pad != NULL;
}

/* Async-signal-safe: stores only. The threads do not exist here, and the
 * interpreter of one must not be the one that makes a plain os.fork() of the host crash
 * its child (gh-139759). */
static void
in_forked_child(void)
{
    PyInterpreterState *interp = atomic_exchange(&pad_interp, NULL);
    if (interp != NULL)
        afk_unlink_interpreter(interp);
    for (int kind = 0; kind < AFK_PAD_COUNT; kind++)
        places[kind] = (struct place){.door = PTHREAD_MUTEX_INITIALIZER};
    serving = NULL;
}

__attribute__((constructor)) static void
loaded(void)
{
    afk_at_fork_child(in_forked_child);
}
