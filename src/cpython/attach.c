/*
 * Which thread state this thread is attached to, and what that does to a GIL.
 *
 * PyThreadState_Swap() lets the GIL go and takes it again. Beside busy threads
 * one of those gets it, and the caller waits for milliseconds; and an
 * interpreter with a GIL of its own is no longer frozen. So a thread state is
 * left and entered here without letting go of its GIL. That is CPython's
 * detach_thread() and _PyThreadState_Attach() (Python/pystate.c) without
 * drop_gil() and take_gil().
 *
 * Rules: the thread-local variables are found, and the result proved byte for
 * byte against PyThreadState_Swap(), before the first use. gil.last_holder is
 * never stored to: a waiter reads it under the GIL's mutex, and then sets a bit
 * in that state. So the state that it names must stay alive (afk_swap_back).
 */
#include "cpython/cpython.h"

#include <link.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

#define CANDIDATES_MAX 32
#define BLOCK_MAX 512 /* bytes of the module's thread-local variables */
#define NONE SIZE_MAX /* no such variable */

/* As in pycore_pystate.h; proved. */
enum { DETACHED = 0, ATTACHED = 1 };

extern void *__tls_get_addr(void *index); /* the ELF TLS ABI; glibc, musl */

#if PY_VERSION_HEX >= 0x030E0000
/* Since 3.14.1. */
extern int PyUnstable_ThreadState_SetStackProtection(PyThreadState *ts, void *low, size_t size)
    __attribute__((weak));
#endif

static char *
block_of(size_t module, size_t bias)
{
    size_t index[2] = {module, 0};
    return (char *)__tls_get_addr(index) + bias;
}

static void
set_word(char *block, size_t offset, void *value)
{
    if (offset != NONE)
        memcpy(block + offset, &value, sizeof value);
}

static void
set_holds_gil(PyThreadState *ts, bool holds)
{
#if PY_VERSION_HEX >= 0x030E0000
    __atomic_store_n(&ts->holds_gil, holds, __ATOMIC_RELAXED);
#else
    ts->_status.holds_gil = holds;
#endif
}

void
afk_leave(const struct afk_layout *lo, PyThreadState *ts)
{
    const struct afk_thread_locals *tls = &lo->tls;
    char *block = block_of(tls->module, tls->bias);
    ts->_status.active = 0;
    ts->state = DETACHED;
    set_word(block, tls->tstate, NULL);
    set_word(block, tls->interp, NULL);
}

void
afk_enter(const struct afk_layout *lo, PyThreadState *ts)
{
    const struct afk_thread_locals *tls = &lo->tls;
    char *block = block_of(tls->module, tls->bias);
    set_word(block, tls->tstate, ts);
    set_word(block, tls->interp, ts->interp);
    ts->state = ATTACHED;
    if (!ts->_status.bound_gilstate) {
        PyThreadState *bound = PyGILState_GetThisThreadState();
        if (bound != NULL)
            bound->_status.bound_gilstate = 0;
        if (tls->gilstate != NONE)
            set_word(block, tls->gilstate, ts);
        else
            (void)pthread_setspecific(tls->key, ts);
        ts->_status.bound_gilstate = 1;
    }
    ts->_status.active = 1;
}

/* ---- discovery ----------------------------------------------------------------- */

#ifndef Py_GIL_DISABLED
struct candidates {
    const PyThreadState *ts;
    struct {
        size_t module, bias, size, offset;
    } at[CANDIDATES_MAX];
    unsigned n;
};

/* Words of this thread's variables, of any module, that name the state. */
static int
find_words(struct dl_phdr_info *info, size_t size, void *arg)
{
    struct candidates *found = arg;
    if (size < sizeof *info || info->dlpi_tls_data == NULL)
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        size_t bytes = info->dlpi_phdr[i].p_memsz;
        if (info->dlpi_phdr[i].p_type != PT_TLS)
            continue;
        for (size_t at = 0; at + sizeof(void *) <= bytes; at += sizeof(void *)) {
            void *word;
            memcpy(&word, (char *)info->dlpi_tls_data + at, sizeof word);
            if (word == found->ts && found->n < CANDIDATES_MAX) {
                found->at[found->n].module = info->dlpi_tls_modid;
                found->at[found->n].bias =
                    (size_t)((char *)info->dlpi_tls_data - block_of(info->dlpi_tls_modid, 0));
                found->at[found->n].size = bytes;
                found->at[found->n].offset = at;
                found->n++;
            }
        }
    }
    return 0;
}

/* What can be seen of a thread that is attached to one state or none. */
struct picture {
    char block[BLOCK_MAX];
    PyThreadState *current, *gilstate;
    PyThreadState first, second;
};

static void
take_picture(const struct afk_thread_locals *tls, struct picture *ret, size_t size,
             PyThreadState *first, PyThreadState *second)
{
    memcpy(ret->block, block_of(tls->module, tls->bias), size);
    ret->current = PyThreadState_GetUnchecked();
    ret->gilstate = PyGILState_GetThisThreadState();
    memcpy(&ret->first, first, sizeof ret->first);
    memcpy(&ret->second, second, sizeof ret->second);
    /* Other threads set bits in it. */
    ret->first.eval_breaker = ret->second.eval_breaker = 0;
}

static void *
word_of(const struct picture *p, size_t offset)
{
    void *word;
    memcpy(&word, p->block + offset, sizeof word);
    return word;
}

static const char *
find_gilstate_key(struct afk_thread_locals *tls, PyThreadState *first, PyThreadState *second)
{
    unsigned n = 0;
    for (unsigned key = 0; key < PTHREAD_KEYS_MAX; key++) {
        if (pthread_getspecific(key) != first)
            continue;
        (void)PyThreadState_Swap(second);
        bool follows = pthread_getspecific(key) == second;
        (void)PyThreadState_Swap(first);
        if (follows && pthread_getspecific(key) == first) {
            tls->key = key;
            n++;
        }
    }
    return n == 1 ? NULL : "PyGILState_GetThisThreadState(): where it is kept";
}

/* Attached to first, then second, then neither: what follows is told apart. */
static const char *
name_words(struct afk_thread_locals *tls, size_t size, const struct picture *in_first,
           const struct picture *in_second, const struct picture *in_none, PyThreadState *second)
{
    tls->interp = tls->gilstate = NONE;
    for (size_t at = 0; at + sizeof(void *) <= size; at += sizeof(void *)) {
        void *a = word_of(in_first, at), *b = word_of(in_second, at), *none = word_of(in_none, at);
        if (at == tls->tstate || (a == b && b == none))
            continue;
        if (a == in_first->gilstate && b == second && none == second && tls->gilstate == NONE)
            tls->gilstate = at;
        else if (a == second->interp && b == second->interp && none == NULL && tls->interp == NONE)
            tls->interp = at;
        else
            return "a thread-local variable of CPython that is not known";
    }
    return NULL;
}

static bool
same_picture(const struct picture *a, const struct picture *b, size_t size)
{
    return memcmp(a->block, b->block, size) == 0 && a->current == b->current &&
           a->gilstate == b->gilstate && memcmp(&a->first, &b->first, sizeof a->first) == 0 &&
           memcmp(&a->second, &b->second, sizeof a->second) == 0;
}

const char *
afk_attach_discover(struct afk_layout *lo, PyThreadState *second)
{
    struct afk_thread_locals *tls = &lo->tls;
    PyThreadState *first = PyThreadState_Get();
    struct picture in_first, in_second, in_none, ours;
    struct candidates found = {.ts = first};
    unsigned n = 0;
    size_t size = 0;

    if (PyGILState_GetThisThreadState() != first)
        return "PyGILState_GetThisThreadState(): another state";
    (void)dl_iterate_phdr(find_words, &found);
    for (unsigned i = 0; i < found.n; i++) {
        char *block = block_of(found.at[i].module, found.at[i].bias);
        void *a, *b, *none;
        (void)PyThreadState_Swap(second);
        memcpy(&a, block + found.at[i].offset, sizeof a);
        (void)PyThreadState_Swap(NULL);
        memcpy(&none, block + found.at[i].offset, sizeof none);
        (void)PyThreadState_Swap(first);
        memcpy(&b, block + found.at[i].offset, sizeof b);
        if (a == second && none == NULL && b == first) {
            tls->module = found.at[i].module;
            tls->bias = found.at[i].bias;
            tls->tstate = found.at[i].offset;
            size = found.at[i].size;
            n++;
        }
    }
    if (n != 1)
        return "_Py_tss_tstate: not found";
    if (size > BLOCK_MAX)
        return "CPython's thread-local variables: too many";

    (void)PyThreadState_Swap(second);
    (void)PyThreadState_Swap(first);
    take_picture(tls, &in_first, size, first, second);
    (void)PyThreadState_Swap(second);
    take_picture(tls, &in_second, size, first, second);
    (void)PyThreadState_Swap(NULL);
    take_picture(tls, &in_none, size, first, second);
    (void)PyThreadState_Swap(first);
    const char *bad = name_words(tls, size, &in_first, &in_second, &in_none, second);
    if (bad == NULL && tls->gilstate == NONE)
        bad = find_gilstate_key(tls, first, second);
    if (bad != NULL)
        return bad;

    /* The proof: ours leaves every byte as CPython's does. */
    afk_leave(lo, first);
    set_holds_gil(first, false);
    bool same = PyThreadState_GetUnchecked() == NULL;
    set_holds_gil(second, true);
    afk_enter(lo, second);
    take_picture(tls, &ours, size, first, second);
    same = same && same_picture(&ours, &in_second, size);
    afk_leave(lo, second);
    set_holds_gil(second, false);
    set_holds_gil(first, true);
    afk_enter(lo, first);
    take_picture(tls, &ours, size, first, second);
    same = same && same_picture(&ours, &in_first, size);
    return same ? NULL : "PyThreadState_Swap() does something else";
}
#endif

/* ---- getting a GIL from busy threads --------------------------------------------- */

/* A thread that wants a GIL waits `interval` (5 ms) before it asks the holder to
 * let go, and the GIL then goes to any of the waiters: behind N busy threads that
 * is N times 5 ms (Python/ceval_gil.c, take_gil). While we wait the interval is
 * short; the busy threads switch more often for that time, and no longer. */
#define SHORT_INTERVAL_US 50
#define INTERVALS_MAX 64

static struct shortened {
    unsigned long *interval;
    unsigned long saved;
    unsigned users;
} shortened[INTERVALS_MAX];
static atomic_flag shortened_lock = ATOMIC_FLAG_INIT; /* a few stores; reset in a child */

static void
change_interval(unsigned long *interval, int change)
{
    struct shortened *mine = NULL, *empty = NULL;

    while (atomic_flag_test_and_set_explicit(&shortened_lock, memory_order_acquire))
        (void)sched_yield();
    for (unsigned i = 0; i < INTERVALS_MAX; i++) {
        if (shortened[i].users > 0 && shortened[i].interval == interval)
            mine = &shortened[i];
        else if (shortened[i].users == 0 && empty == NULL)
            empty = &shortened[i];
    }
    if (mine == NULL && change > 0 && empty != NULL &&
        __atomic_load_n(interval, __ATOMIC_RELAXED) > SHORT_INTERVAL_US) {
        mine = empty;
        mine->interval = interval;
        mine->saved = __atomic_load_n(interval, __ATOMIC_RELAXED);
        __atomic_store_n(interval, SHORT_INTERVAL_US, __ATOMIC_RELAXED);
    }
    if (mine != NULL) {
        mine->users += (unsigned)change;
        /* sys.setswitchinterval() meanwhile: its value stays. */
        if (mine->users == 0 && __atomic_load_n(interval, __ATOMIC_RELAXED) == SHORT_INTERVAL_US)
            __atomic_store_n(interval, mine->saved, __ATOMIC_RELAXED);
    }
    atomic_flag_clear_explicit(&shortened_lock, memory_order_release);
}

/* Async-signal-safe: stores only. Nobody waits for a GIL in a forked child. */
static void
in_forked_child(void)
{
    for (unsigned i = 0; i < INTERVALS_MAX; i++) {
        if (shortened[i].users > 0 && *shortened[i].interval == SHORT_INTERVAL_US)
            *shortened[i].interval = shortened[i].saved;
        shortened[i].users = 0;
    }
    atomic_flag_clear(&shortened_lock);
}

__attribute__((constructor)) static void
loaded(void)
{
    afk_at_fork_child(in_forked_child);
}

void
afk_attach(PyThreadState *ts, PyInterpreterState *interp)
{
    const struct afk_layout *lo = afk_layout_if_known();
    unsigned long *interval = lo ? afk_gil_interval(lo, *afk_interp_gil(lo, interp)) : NULL;
    if (interval != NULL)
        change_interval(interval, 1);
    PyEval_RestoreThread(ts);
    if (interval != NULL)
        change_interval(interval, -1);
}

/* ---- from state to state --------------------------------------------------------- */

PyThreadState *
afk_state_new(PyInterpreterState *interp)
{
    PyThreadState *ts = AFK_ALLOC("PyThreadState_New", PyThreadState_New(interp));
#if PY_VERSION_HEX >= 0x030E0000
    /* Else its first _PyThreadState_Attach() asks pthread_getattr_np(3), which for
     * the main thread reads /proc/self/maps. */
    uintptr_t low, high;
    if (ts != NULL && PyUnstable_ThreadState_SetStackProtection != NULL &&
        afk_this_stack(&low, &high))
        (void)PyUnstable_ThreadState_SetStackProtection(ts, (void *)low, high - low);
#endif
    return ts;
}

static bool
can_keep_gil(const struct afk_layout *lo, PyThreadState *from, PyThreadState *to)
{
#if PY_VERSION_HEX >= 0x030E0000
    /* A fresh state that CPython has not attached would have no stack limits. */
    if (PyUnstable_ThreadState_SetStackProtection == NULL)
        return false;
#endif
    return lo->state[AFK_FEATURE_ATTACH] == AFK_READY &&
           *afk_interp_gil(lo, from->interp) == *afk_interp_gil(lo, to->interp);
}

static void
keep_gil_and_enter(const struct afk_layout *lo, PyThreadState *from, PyThreadState *to)
{
    afk_leave(lo, from);
    set_holds_gil(from, false);
    set_holds_gil(to, true);
    afk_enter(lo, to);
}

void
afk_swap(PyThreadState *to)
{
    const struct afk_layout *lo = afk_layout_if_known(); /* with no state attached */
    PyThreadState *from = PyThreadState_GetUnchecked();
    if (from != NULL && lo != NULL && can_keep_gil(lo, from, to)) {
        keep_gil_and_enter(lo, from, to);
        return;
    }
    if (from != NULL)
        (void)PyEval_SaveThread();
    if (to->interp == PyInterpreterState_Main() && afk_pad_borrow_gil()) {
        set_holds_gil(to, true);
        afk_enter(lo, to);
        return;
    }
    afk_attach(to, to->interp);
}

/* Where the GIL was let go meanwhile, by a hook that waited for something, it was
 * taken again for the fresh state: waiters may be about to set their bit in it,
 * and a bit in `to` may be from one that has long had its turn. CPython's own
 * functions put both right. */
void
afk_swap_back(PyThreadState *fresh, PyThreadState *to)
{
    const struct afk_layout *lo = afk_layout();
    PyThreadState_Clear(fresh);
    bool kept = lo->state[AFK_FEATURE_ATTACH] == AFK_READY &&
                __atomic_load_n(afk_gil_holder(lo, *afk_interp_gil(lo, fresh->interp)),
                                __ATOMIC_RELAXED) != fresh;
    if (kept && to != NULL && can_keep_gil(lo, fresh, to)) {
        keep_gil_and_enter(lo, fresh, to);
        PyThreadState_Delete(fresh);
        return;
    }
    if (afk_pad_begin_return(kept)) {
        afk_leave(lo, fresh);
        PyThreadState_Delete(fresh);
        afk_pad_end_return();
    }
    else {
        /* It leaves the interpreter's list before the GIL is released. Cleared but
         * still listed, it would be cleared a second time in the child of a thread
         * that forks just then, and _PyThreadState_DeleteList asserts. */
        PyThreadState_DeleteCurrent();
    }
    if (to != NULL)
        afk_attach(to, to->interp);
}
