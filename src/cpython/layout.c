/*
 * CPython's private layout: the only file that reads private offsets.
 *
 * Rule: the layout is untrusted input. Every field that is written through, or
 * followed, has first been read with afk_os_peek(), which cannot fault, and has
 * agreed with what the public API says of the running interpreter. A field in
 * bounds proves nothing; agreement does. What does not agree is REFUSED(why).
 *
 * CPython publishes the offsets for debuggers at the start of _PyRuntime
 * (Include/internal/pycore_debug_offsets.h; pycore_runtime.h in 3.13). What it
 * does not publish is found beside a published field and proved the same way.
 */
#include "cpython/cpython.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FRAMES_MAX 20000     /* deeper recursion: not followed */
#define INTERPRETERS_MAX 100000
#define STATES_MAX 1000000
#define RETRIES 200          /* other interpreters come and go while we read */
#define INTERP_SIZE_MAX (16u << 20)

/* The head of _Py_DebugOffsets, as far as it is used. */
struct table {
    char cookie[8];
    uint64_t version, free_threaded;
    struct {
        uint64_t size, finalizing, interpreters_head;
    } runtime;
    struct {
        uint64_t size, id, next, threads_head;
#if PY_VERSION_HEX >= 0x030E0000
        uint64_t threads_main;
#endif
        uint64_t gc, imports_modules, sysdict, builtins, ceval_gil, gil, gil_enabled, gil_locked,
            gil_holder;
#if PY_VERSION_HEX >= 0x030E0000
        uint64_t code_object_generation, tlbc_generation;
#endif
    } interp;
    struct {
        uint64_t size, prev, next, interp, current_frame;
#if PY_VERSION_HEX >= 0x030F0000
        uint64_t base_frame, last_profiled_frame, last_profiled_frame_seq;
#endif
        uint64_t thread_id, native_thread_id, datastack_chunk, status;
#if PY_VERSION_HEX >= 0x030F0000
        uint64_t holds_gil, gil_requested, current_exception, exc_state;
#endif
    } thread;
#if PY_VERSION_HEX >= 0x030F0000
    uint64_t exc_value;
#endif
    struct {
        uint64_t size, previous, executable, instr_ptr, localsplus, owner;
    } frame;
};

extern char _PyRuntime[]; /* exported data of every CPython since 3.7 */

static const char *const feature_names[AFK_FEATURE_COUNT] = {"hop", "twin", "hooks", "stack",
                                                              "attach"};

const char *
afk_feature_name(enum afk_feature feature)
{
    return feature_names[feature];
}

static void
refuse(struct afk_layout *lo, enum afk_feature feature, const char *why)
{
    lo->state[feature] = AFK_REFUSED;
    (void)snprintf(lo->why[feature], sizeof lo->why[feature], "%s", why);
}

/* ---- reading without faults -------------------------------------------------- */

static bool
peek_ptr(const void *base, uint64_t offset, void **ret)
{
    return offset < INTERP_SIZE_MAX &&
           afk_os_peek(ret, (const char *)base + offset, sizeof *ret) == 0;
}

static bool
peek_i64(const void *base, uint64_t offset, int64_t *ret)
{
    return offset < INTERP_SIZE_MAX &&
           afk_os_peek(ret, (const char *)base + offset, sizeof *ret) == 0;
}

#ifndef Py_GIL_DISABLED
static bool
peek_int(const void *base, uint64_t offset, int *ret)
{
    return offset < INTERP_SIZE_MAX &&
           afk_os_peek(ret, (const char *)base + offset, sizeof *ret) == 0;
}

#endif

static bool
ptr_is(const void *base, uint64_t offset, const void *expected)
{
    void *p;
    return peek_ptr(base, offset, &p) && p == expected;
}

/* ---- validation --------------------------------------------------------------- */

/* runtime.interpreters: { mutex, head, main, next_id }, then main_thread and
 * main_tstate. Only `head` is in the table. */
static const char *
check_runtime(const struct table *t, char *runtime)
{
    uint64_t head = t->runtime.interpreters_head;
    PyInterpreterState *main = PyInterpreterState_Main();
    int64_t next_id, newest = PyInterpreterState_GetID(PyInterpreterState_Head());

    if (head < 8 || head > t->runtime.size || t->runtime.size > INTERP_SIZE_MAX)
        return "runtime.interpreters.head: out of bounds";
    if (!ptr_is(runtime, head, PyInterpreterState_Head()))
        return "runtime.interpreters.head";
    if (!ptr_is(runtime, head + 8, main))
        return "runtime.interpreters.main";
    if (!peek_i64(runtime, head + 16, &next_id) || next_id <= newest || next_id > (1LL << 40))
        return "runtime.interpreters.next_id";
    return NULL;
}

static const char *
check_interpreters(const struct table *t)
{
    unsigned seen = 0;
    for (PyInterpreterState *i = PyInterpreterState_Head(); i != NULL;
         i = PyInterpreterState_Next(i)) {
        int64_t id;
        if (!ptr_is(i, t->interp.next, PyInterpreterState_Next(i)))
            return "interpreter.next";
        if (!peek_i64(i, t->interp.id, &id) || id != PyInterpreterState_GetID(i))
            return "interpreter.id";
        if (!ptr_is(i, t->interp.threads_head, PyInterpreterState_ThreadHead(i)))
            return "interpreter.threads.head";
        if (++seen > INTERPRETERS_MAX)
            return "interpreter list: does not end";
    }
    return NULL;
}

/* main_tstate lies behind main_thread, which is proved. It is a state of main; or
 * it dangles, as after a plain os.fork() in a thread, where CPython never repairs
 * it: then it is at least the address of something. It is only stored to. */
static const char *
check_main_tstate(const struct table *t, char *runtime)
{
    uint64_t at = t->runtime.interpreters_head + 24;
    int64_t main_thread;
    void *main_tstate;
    PyObject *thread = PyImport_ImportModule("_thread");
    PyObject *id = thread ? PyObject_CallMethod(thread, "_get_main_thread_ident", NULL) : NULL;
    unsigned long expected = id ? PyLong_AsUnsignedLong(id) : 0;
    Py_XDECREF(thread);
    Py_XDECREF(id);
    if (PyErr_Occurred() || expected == 0) {
        PyErr_Clear();
        return "runtime.main_thread: not known";
    }
    if (!peek_i64(runtime, at, &main_thread) || (unsigned long)main_thread != expected)
        return "runtime.main_thread";
    if (!peek_ptr(runtime, at + 8, &main_tstate) || main_tstate == NULL)
        return "runtime.main_tstate";
    void *state = PyInterpreterState_ThreadHead(PyInterpreterState_Main());
    for (unsigned n = 0; state != NULL && n < STATES_MAX; n++) {
        PyThreadState copy;
        if (state == main_tstate)
            return NULL;
        if (afk_os_peek(&copy, state, sizeof copy) < 0)
            return "thread state list of main"; /* it changed: asked again */
        state = copy.next;
    }
    uintptr_t address = (uintptr_t)main_tstate;
    return address < 65536 || address % sizeof(void *) != 0 || address >> 56 != 0
               ? "runtime.main_tstate"
               : NULL;
}

#ifndef Py_GIL_DISABLED
/* gil, gil_runtime_state and their fields: for every interpreter either its own
 * embedded GIL, or main's. */
static const char *
check_gil(const struct table *t)
{
    PyThreadState *ts = PyThreadState_Get();
    PyInterpreterState *main = PyInterpreterState_Main();
    uint64_t locked = t->interp.gil_locked, holder = t->interp.gil_holder;

    if (t->interp.gil >= t->interp.size || locked < t->interp.gil || holder < t->interp.gil ||
        locked - t->interp.gil > 4096 || holder - t->interp.gil > 4096)
        return "interpreter.gil: out of bounds";
    char *main_gil = (char *)main + t->interp.gil;
    for (PyInterpreterState *i = PyInterpreterState_Head(); i != NULL;
         i = PyInterpreterState_Next(i)) {
        void *gil;
        int own;
        if (!peek_ptr(i, t->interp.ceval_gil, &gil) ||
            !peek_int(i, t->interp.ceval_gil + 8, &own))
            return "interpreter.ceval.gil";
        bool is_own = gil == (char *)i + t->interp.gil && own == 1;
        bool is_main = gil == main_gil && own == 0 && i != main;
        if (!is_own && !is_main && gil != NULL) /* NULL: being created */
            return "interpreter.ceval.gil";
        if (i == ts->interp) {
            int is_locked;
            if (gil == NULL || !peek_int(gil, locked - t->interp.gil, &is_locked) ||
                is_locked != 1)
                return "gil.locked";
            if (!ptr_is(gil, holder - t->interp.gil, ts))
                return "gil.last_holder";
        }
    }
    return NULL;
}

/* gil.interval lies before last_holder: proved by sys.getswitchinterval(). */
static bool
check_interval(const struct table *t)
{
    PyThreadState *ts = PyThreadState_Get();
    unsigned long interval;
    void *gil;
    PyObject *get = PySys_GetObject("getswitchinterval"); /* borrowed */
    PyObject *value = get ? PyObject_CallNoArgs(get) : NULL;
    double seconds = value ? PyFloat_AsDouble(value) : -1;
    Py_XDECREF(value);
    PyErr_Clear();
    if (seconds <= 0 || !peek_ptr(ts->interp, t->interp.ceval_gil, &gil) || gil == NULL)
        return false;
    const char *at = (const char *)gil + (t->interp.gil_holder - t->interp.gil) - sizeof interval;
    return afk_os_peek(&interval, at, sizeof interval) == 0 &&
           interval == (unsigned long)(seconds * 1e6 + 0.5);
}
#endif

static const char *
check_source(const struct afk_layout_source *source, const struct table *t)
{
    if (source->table_size < sizeof *t)
        return "debug offsets: table too short";
    if (memcmp(t->cookie, "xdebugpy", 8) != 0)
        return "debug offsets: no cookie";
    if ((source->version_hex >> 16) != (PY_VERSION_HEX >> 16))
        return "built for another minor version of CPython";
    if ((t->version >> 16) != (source->version_hex >> 16))
        return "debug offsets: of another minor version of CPython";
#ifdef Py_DEBUG
    if (!source->debug)
        return "built for a debug build of CPython";
#else
    if (source->debug)
        return "built for a release build of CPython";
#endif
#ifdef Py_GIL_DISABLED
    if (t->free_threaded != 1)
        return "built for a free-threaded build of CPython";
#else
    if (t->free_threaded != 0)
        return "built for a build of CPython with the GIL";
#endif
    return NULL;
}

/* ---- the lists of os.register_at_fork ------------------------------------------ */

static PyObject *
mark(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(args))
{
    Py_RETURN_NONE;
}
static PyMethodDef mark_def = {"anyfork_mark", mark, METH_NOARGS, NULL};

static int
compare_words(const void *a, const void *b)
{
    uintptr_t x = *(const uintptr_t *)a, y = *(const uintptr_t *)b;
    return x < y ? -1 : x > y;
}

/* The last item of a list that was read, or NULL. */
static PyObject *
last_item(const PyListObject *list)
{
    PyObject *item;
    if (Py_TYPE((const PyObject *)list) != &PyList_Type || Py_SIZE(list) < 1 ||
        Py_SIZE(list) > (1 << 24) || list->ob_item == NULL)
        return NULL;
    return afk_os_peek(&item, list->ob_item + Py_SIZE(list) - 1, sizeof item) == 0 ? item : NULL;
}

/* Three marks, registered at once, become the last item of three lists. The lists
 * are named by three consecutive words of the interpreter; stale copies of one
 * word occur (3.13), a run of three only once. */
static const char *
find_hooks(struct afk_layout *lo, const struct table *t)
{
    static const char *const keys[3] = {"before", "after_in_parent", "after_in_child"};
    const char *bad = "cannot register the marks";
    PyInterpreterState *interp = PyInterpreterState_Get();
    size_t n_words = t->interp.size / sizeof(uintptr_t);
    PyObject *marks[3] = {NULL, NULL, NULL}, *kwargs = PyDict_New(), *args = PyTuple_New(0);
    PyObject *posix = PyImport_ImportModule("posix");
    PyObject *reg = posix ? PyObject_GetAttrString(posix, "register_at_fork") : NULL;
    PyObject *done = NULL;
    uintptr_t *words = NULL;
    unsigned char *hit = NULL;
    PyListObject *lists = NULL;
    bool *readable = NULL;

    if (kwargs == NULL || args == NULL || reg == NULL)
        goto out;
    for (int k = 0; k < 3; k++) {
        marks[k] = PyCFunction_New(&mark_def, NULL);
        if (marks[k] == NULL || PyDict_SetItemString(kwargs, keys[k], marks[k]) < 0)
            goto out;
    }
    words = malloc(2 * n_words * sizeof *words);
    hit = calloc(n_words, 1);
    if (words == NULL || hit == NULL)
        goto out;
    done = PyObject_Call(reg, args, kwargs);
    if (done == NULL)
        goto out;
    bad = "the interpreter cannot be read";
    if (afk_os_peek(words, interp, n_words * sizeof *words) < 0)
        goto out;
    bad = "os.register_at_fork's lists not found";
    /* Each distinct word that may be an address is looked at once. Objects are
     * allocated on 8-byte boundaries below the kernel's half. */
    uintptr_t *sorted = words + n_words;
    memcpy(sorted, words, n_words * sizeof *words);
    qsort(sorted, n_words, sizeof *sorted, compare_words);
    size_t n = 0;
    for (size_t i = 0; i < n_words; i++) {
        uintptr_t word = sorted[i];
        if (word % 8 == 0 && word >= 65536 && word >> 56 == 0 && (n == 0 || word != sorted[n - 1]))
            sorted[n++] = word;
    }
    lists = malloc((n + 1) * sizeof *lists);
    readable = calloc(n + 1, sizeof *readable);
    if (lists == NULL || readable == NULL)
        goto out;
    afk_os_peek_each(lists, sorted, n, sizeof *lists, readable);
    for (size_t i = 0; i < n; i++) {
        PyObject *last = readable[i] ? last_item(&lists[i]) : NULL;
        int which = 0;
        for (int k = 0; k < 3 && last != NULL; k++)
            if (last == marks[k])
                which = k + 1;
        if (which == 0)
            continue;
        for (size_t w = 0; w < n_words; w++)
            if (words[w] == sorted[i])
                hit[w] = (unsigned char)which;
    }
    unsigned found = 0;
    for (size_t w = 0; w + 2 < n_words; w++) {
        if (hit[w] == 1 && hit[w + 1] == 2 && hit[w + 2] == 3) {
            lo->interp_hooks = w * sizeof(uintptr_t);
            found++;
        }
    }
    if (found == 1)
        bad = NULL;
out:
    PyErr_Clear();
    free(words);
    free(hit);
    free(lists);
    free(readable);
    Py_XDECREF(done);
    Py_XDECREF(reg);
    Py_XDECREF(posix);
    Py_XDECREF(kwargs);
    Py_XDECREF(args);
    for (int k = 0; k < 3; k++)
        Py_XDECREF(marks[k]);
    return bad;
}

/* ---- the collector ------------------------------------------------------------------ */

#define GC_SIZE_MAX 4096u /* bytes of struct _gc_runtime_state that are looked at */

struct gc_pictures {
    const char *gc;
    size_t words;
    int before[GC_SIZE_MAX / sizeof(int)], during[GC_SIZE_MAX / sizeof(int)],
        after[GC_SIZE_MAX / sizeof(int)];
    bool taken;
};

static PyObject *
during_collection(PyObject *self, PyObject *Py_UNUSED(args))
{
    struct gc_pictures *p = PyCapsule_GetPointer(self, NULL);
    if (p != NULL)
        p->taken = afk_os_peek(p->during, p->gc, p->words * sizeof(int)) == 0;
    Py_RETURN_NONE;
}
static PyMethodDef during_def = {"anyfork_during_collection", during_collection, METH_VARARGS, NULL};

/* Of the youngest generation, with that call in gc.callbacks. */
static bool
collect_young(struct gc_pictures *p)
{
    PyObject *gc = PyImport_ImportModule("gc");
    PyObject *callbacks = gc ? PyObject_GetAttrString(gc, "callbacks") : NULL;
    PyObject *capsule = PyCapsule_New(p, NULL, NULL);
    PyObject *call = capsule ? PyCFunction_New(&during_def, capsule) : NULL;
    PyObject *r = NULL;
    if (callbacks != NULL && call != NULL && PyList_Check(callbacks) &&
        PyList_Append(callbacks, call) == 0) {
        r = PyObject_CallMethod(gc, "collect", "i", 0);
        PyObject *removed = PyObject_CallMethod(callbacks, "remove", "O", call);
        Py_XDECREF(removed);
    }
    bool ok = r != NULL;
    PyErr_Clear();
    Py_XDECREF(r);
    Py_XDECREF(call);
    Py_XDECREF(capsule);
    Py_XDECREF(callbacks);
    Py_XDECREF(gc);
    return ok;
}

/* gc.collecting is the one int that is 1 during a collection, and 0 before and after: its
 * offset in the interpreter, or 0 while another thread collects, say. */
static size_t
find_collecting(const struct afk_layout *lo)
{
    size_t gc = lo->interp_gc, interp_size = lo->interp_size;
    struct gc_pictures *p = malloc(sizeof *p);
    size_t offset = 0;
    unsigned found = 0;
    if (p == NULL || gc == 0 || gc >= interp_size)
        goto out;
    p->words = (interp_size - gc < GC_SIZE_MAX ? interp_size - gc : GC_SIZE_MAX) / sizeof(int);
    p->gc = (char *)PyInterpreterState_Get() + gc;
    p->taken = false;
    if (afk_os_peek(p->before, p->gc, p->words * sizeof(int)) < 0 || !collect_young(p) ||
        !p->taken || afk_os_peek(p->after, p->gc, p->words * sizeof(int)) < 0)
        goto out;
    for (size_t i = 0; i < p->words; i++) {
        if (p->before[i] == 0 && p->during[i] == 1 && p->after[i] == 0) {
            offset = gc + i * sizeof(int);
            found++;
        }
    }
out:
    free(p);
    return found == 1 ? offset : 0;
}

/* ---- stopping the world ------------------------------------------------------------ */

#ifdef Py_GIL_DISABLED
/* struct _stoptheworld_state (Include/internal/pycore_interp*.h), from its first byte. */
struct world {
    unsigned char mutex, requested, stopped, is_global;
    unsigned char stop_event;
    Py_ssize_t countdown;
    PyThreadState *requester;
};

struct world_search {
    PyThreadState *ts;
    char *copy;
    size_t size;
    bool copied;
};

static int
copy_interpreter(PyObject *object, void *arg)
{
    (void)object;
    struct world_search *search = arg;
    search->copied = afk_os_peek(search->copy, search->ts->interp, search->size) == 0;
    return 0;
}

/* While this thread has stopped its interpreter's world, one place of the interpreter says
 * so; afterwards it does not. */
static const char *
find_world(struct afk_layout *lo)
{
    struct world_search search = {.ts = PyThreadState_Get(), .size = lo->interp_size};
    struct world w;
    unsigned found = 0;

    search.copy = malloc(search.size);
    if (search.copy == NULL)
        return "stop-the-world state: no memory to find it";
    PyUnstable_GC_VisitObjects(copy_interpreter, &search);
    for (size_t at = 0; search.copied && at + sizeof w <= search.size; at += sizeof(void *)) {
        memcpy(&w, search.copy + at, sizeof w);
        if (w.requester == search.ts && w.countdown == 0 && (w.mutex & 1) == 1 &&
            w.requested == 1 && w.stopped == 1 && w.is_global == 0) {
            lo->interp_world = at;
            found++;
        }
    }
    free(search.copy);
    if (found != 1 || afk_os_peek(&w, (char *)search.ts->interp + lo->interp_world, sizeof w) < 0 ||
        w.stopped != 0)
        return "stop-the-world state: not found";
    return NULL;
}
#endif

/* ---- C stacks -------------------------------------------------------------------- */

/* pthread_getattr_np(3) reads /proc for the main thread: asked once per thread. */
bool
afk_this_stack(uintptr_t *ret_low, uintptr_t *ret_high)
{
    static _Thread_local uintptr_t low, high;
    if (high == 0) {
        pthread_attr_t attr;
        void *base;
        size_t size;
        if (pthread_getattr_np(pthread_self(), &attr) == 0) {
            if (pthread_attr_getstack(&attr, &base, &size) == 0) {
                low = (uintptr_t)base;
                high = low + size;
            }
            (void)pthread_attr_destroy(&attr);
        }
    }
    *ret_low = low;
    *ret_high = high;
    return high != 0;
}

static bool
has_frames(const PyThreadState *ts)
{
#if PY_VERSION_HEX >= 0x030F0000
    return ts->current_frame != NULL && ts->current_frame != ts->base_frame;
#else
    return ts->current_frame != NULL;
#endif
}

/* The evaluation loop keeps an entry frame on the C stack of the thread that runs
 * it (Python/ceval.c, _PyEval_EvalFrameDefault): reached from current_frame by
 * `previous`, it proves which thread a state runs on, whatever its thread_id
 * says (a host may create states for other threads: uWSGI does). */
static int
walk_frames(uint64_t frame_previous, const PyThreadState *ts)
{
    uintptr_t low, high;
    if (!afk_this_stack(&low, &high) || !has_frames(ts))
        return -1;
    void *frame = ts->current_frame;
    for (unsigned n = 0; n < FRAMES_MAX; n++) {
        if ((uintptr_t)frame >= low && (uintptr_t)frame < high)
            return 1;
        if (!peek_ptr(frame, frame_previous, &frame))
            return -1;
        if (frame == NULL)
            return 0;
    }
    return -1;
}

#define PROBE_TRIES 5 /* a signal handler may raise instead of going on */
static _Thread_local const struct table *probed;
static _Thread_local int probe_result;

static PyObject *
probe_stack(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(args))
{
    probe_result = walk_frames(probed->frame.previous, PyThreadState_Get());
    Py_RETURN_NONE;
}
static PyMethodDef probe_def = {"probe", probe_stack, METH_NOARGS, NULL};

/* What a signal handler raised in the middle of ours comes again at the caller's next
 * step. */
static void
raise_later(void)
{
    PyObject *exc = PyErr_GetRaisedException();
    if (exc != NULL && !PyErr_GivenExceptionMatches(exc, PyExc_MemoryError))
        (void)PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), (PyObject *)Py_TYPE(exc));
    Py_XDECREF(exc);
}

/* Asked from inside a Python frame: a caller in C may have none. A handler may start a
 * worker there, and so come here again. */
static const char *
check_stack(const struct table *t)
{
    const struct table *outer = probed;
    PyObject *globals = PyDict_New(), *probe = PyCFunction_New(&probe_def, NULL), *r = NULL;
    int result = -1;
    bool ready = globals != NULL && probe != NULL &&
                 PyDict_SetItemString(globals, "__builtins__", PyEval_GetBuiltins()) == 0 &&
                 PyDict_SetItemString(globals, "probe", probe) == 0;
    for (int tries = 0; tries < PROBE_TRIES && ready && result == -1; tries++) {
        probed = t;
        probe_result = -1;
        r = PyRun_String("probe()", Py_eval_input, globals, globals);
        result = probed == t ? probe_result : -1;
        Py_XDECREF(r);
        raise_later();
    }
    PyErr_Clear();
    probed = outer;
    Py_XDECREF(probe);
    Py_XDECREF(globals);
    return result == 1 ? NULL : "no entry frame of this thread on its C stack";
}

/* ---- discovery -------------------------------------------------------------------- */

void
afk_layout_source_here(struct afk_layout_source *ret)
{
    ret->version_hex = Py_Version;
    ret->debug = PySys_GetObject("gettotalrefcount") != NULL;
    ret->table = (const unsigned char *)_PyRuntime;
    ret->table_size = sizeof(struct table);
}

void
afk_layout_discover(const struct afk_layout_source *source, struct afk_layout *lo)
{
    struct table t;
    memset(lo, 0, sizeof *lo);
    lo->runtime = _PyRuntime;
    memset(&t, 0, sizeof t);
    memcpy(&t, source->table, source->table_size < sizeof t ? source->table_size : sizeof t);

    const char *bad = check_source(source, &t);
    if (bad != NULL) {
        for (int f = 0; f < AFK_FEATURE_COUNT; f++)
            refuse(lo, (enum afk_feature)f, bad);
        return;
    }
    lo->runtime_head = t.runtime.interpreters_head;
    lo->interp_size = t.interp.size;
    lo->interp_id = t.interp.id;
    lo->interp_next = t.interp.next;
    lo->interp_threads = t.interp.threads_head;
    lo->interp_gc = t.interp.gc;
    lo->interp_gil = t.interp.ceval_gil;
    lo->interp_own_gil = t.interp.gil;
    lo->gil_holder = t.interp.gil_holder - t.interp.gil;
    lo->frame_previous = t.frame.previous;

    /* With one state only, threads.head and threads.main are equal: no proof. */
    PyThreadState *second = PyThreadState_New(PyInterpreterState_Get());
    /* Other threads may be adding interpreters: a mismatch is asked again. */
    const char *hop = NULL, *gil = NULL;
    for (int tries = 0; tries < RETRIES; tries++) {
        hop = t.interp.size < sizeof(void *) || t.interp.size > INTERP_SIZE_MAX
                  ? "interpreter.size: out of bounds"
                  : check_runtime(&t, lo->runtime);
        if (hop == NULL)
            hop = check_interpreters(&t);
        if (hop == NULL)
            hop = check_main_tstate(&t, lo->runtime);
#ifdef Py_GIL_DISABLED
        gil = "free-threaded build: its world cannot be stopped twice; use subint_fork";
#else
        gil = hop != NULL ? hop : check_gil(&t);
#endif
        if (hop == NULL && gil == NULL)
            break;
        (void)sched_yield();
    }
    if (second == NULL)
        hop = "thread state list: no memory to prove it";
#ifdef Py_GIL_DISABLED
    if (hop == NULL)
        hop = find_world(lo);
#endif
    const char *attach = hop != NULL ? hop : gil;
#ifndef Py_GIL_DISABLED
    if (attach == NULL)
        attach = afk_attach_discover(lo, second);
#endif
    if (second != NULL) {
        PyThreadState_Clear(second);
        PyThreadState_Delete(second);
    }
#ifndef Py_GIL_DISABLED
    lo->interval_known = gil == NULL && check_interval(&t);
#endif
    if (hop == NULL)
        lo->interp_collecting = find_collecting(lo);
    lo->state[AFK_FEATURE_HOP] = lo->state[AFK_FEATURE_TWIN] = AFK_READY;
    if (hop != NULL)
        refuse(lo, AFK_FEATURE_HOP, hop);
    if (gil != NULL)
        refuse(lo, AFK_FEATURE_TWIN, gil);

    lo->state[AFK_FEATURE_ATTACH] = AFK_READY;
    if (attach != NULL)
        refuse(lo, AFK_FEATURE_ATTACH, attach);

    const char *hooks = hop != NULL ? hop : find_hooks(lo, &t);
    lo->state[AFK_FEATURE_HOOKS] = AFK_READY;
    if (hooks != NULL)
        refuse(lo, AFK_FEATURE_HOOKS, hooks);

    const char *stack = hop != NULL ? hop : check_stack(&t);
    lo->state[AFK_FEATURE_STACK] = AFK_READY;
    if (stack != NULL)
        refuse(lo, AFK_FEATURE_STACK, stack);
}

/* 0 unknown, 1 being discovered, 2 known. No lock: a fork may come at any time,
 * and what is found is the same for every thread. */
static atomic_int known;
static _Atomic(unsigned long) discoverer; /* a thread's ident; a handler of its signals may ask */
static struct afk_layout here;

const struct afk_layout *
afk_layout(void)
{
    while (atomic_load(&known) != 2) {
        int unknown = 0;
        unsigned long me = PyThread_get_thread_ident();
        bool mine = atomic_compare_exchange_strong(&known, &unknown, 1);
        if (mine || atomic_load(&discoverer) == me) {
            atomic_store(&discoverer, me);
            struct afk_layout_source source;
            struct afk_layout found;
            afk_layout_source_here(&source);
            afk_layout_discover(&source, &found);
            if (atomic_load(&known) != 2)
                here = found;
            atomic_store(&known, 2);
            atomic_store(&discoverer, 0);
            break;
        }
        PyThreadState *ts = PyEval_SaveThread();
        (void)sched_yield();
        PyEval_RestoreThread(ts);
    }
    return &here;
}

void
afk_layout_look_again(void)
{
    static atomic_uint looked;
    if (here.state[AFK_FEATURE_HOP] == AFK_READY && here.interp_collecting == 0 &&
        atomic_fetch_add(&looked, 1) < RETRIES)
        here.interp_collecting = find_collecting(&here);
}

const struct afk_layout *
afk_layout_if_known(void)
{
    return atomic_load(&known) == 2 ? &here : NULL;
}

/* A fork in the middle of another thread's discovery: the child asks anew. */
static void
in_forked_child(void)
{
    int discovering = 1;
    (void)atomic_compare_exchange_strong(&known, &discovering, 0);
    atomic_store(&discoverer, 0);
}

__attribute__((constructor)) static void
loaded(void)
{
    afk_at_fork_child(in_forked_child);
}

/* Async-signal-safe: loads and stores. Bounded, for the list may be torn where a
 * program forked without CPython's knowing. */
void
afk_unlink_interpreter(PyInterpreterState *interp)
{
    const struct afk_layout *lo = afk_layout_if_known();
    if (lo == NULL || lo->state[AFK_FEATURE_HOP] != AFK_READY)
        return;
    PyInterpreterState **link = afk_runtime_head(lo);
    for (unsigned n = 0; *link != NULL && n < INTERPRETERS_MAX; n++) {
        if (*link == interp) {
            *link = *afk_interp_next(lo, interp);
            return;
        }
        link = afk_interp_next(lo, *link);
    }
}

int
afk_layout_require(enum afk_feature feature, struct anyfork_error *reterr)
{
    const struct afk_layout *lo = afk_layout();
    if (lo->state[feature] == AFK_READY)
        return 0;
    int code = ANYFORK_ELAYOUT;
#ifdef Py_GIL_DISABLED
    if (feature == AFK_FEATURE_TWIN)
        code = ANYFORK_EUNAVAILABLE;
#endif
    return AFK_FAIL(reterr, code, ANYFORK_STAGE_LAYOUT, 0, lo->why[feature]);
}

void
afk_layout_refuse(enum afk_feature feature, const char *why)
{
    refuse(&here, feature, why);
}

/* ---- fields ------------------------------------------------------------------------ */

#define FIELD(base, offset, type) ((type *)(void *)((char *)(base) + (offset)))

PyInterpreterState **
afk_runtime_head(const struct afk_layout *lo)
{
    return FIELD(lo->runtime, lo->runtime_head, PyInterpreterState *);
}

PyInterpreterState **
afk_runtime_main(const struct afk_layout *lo)
{
    return FIELD(lo->runtime, lo->runtime_head + 8, PyInterpreterState *);
}

PyThreadState **
afk_runtime_main_tstate(const struct afk_layout *lo)
{
    return FIELD(lo->runtime, lo->runtime_head + 32, PyThreadState *);
}

PyMutex *
afk_runtime_head_mutex(const struct afk_layout *lo)
{
    return FIELD(lo->runtime, lo->runtime_head - 8, PyMutex);
}

PyInterpreterState **
afk_interp_next(const struct afk_layout *lo, PyInterpreterState *interp)
{
    return FIELD(interp, lo->interp_next, PyInterpreterState *);
}

PyThreadState **
afk_interp_threads(const struct afk_layout *lo, PyInterpreterState *interp)
{
    return FIELD(interp, lo->interp_threads, PyThreadState *);
}

char **
afk_interp_gil(const struct afk_layout *lo, PyInterpreterState *interp)
{
    return FIELD(interp, lo->interp_gil, char *);
}

PyObject **
afk_interp_child_hooks(const struct afk_layout *lo, PyInterpreterState *interp)
{
    return FIELD(interp, lo->interp_hooks + 2 * sizeof(PyObject *), PyObject *);
}

int *
afk_interp_collecting(const struct afk_layout *lo, PyInterpreterState *interp)
{
    return lo->interp_collecting != 0 ? FIELD(interp, lo->interp_collecting, int) : NULL;
}

PyMutex *
afk_interp_world_mutex(const struct afk_layout *lo, PyInterpreterState *interp)
{
    return FIELD(interp, lo->interp_world, PyMutex);
}

PyThreadState **
afk_gil_holder(const struct afk_layout *lo, char *gil)
{
    return FIELD(gil, lo->gil_holder, PyThreadState *);
}

unsigned long *
afk_gil_interval(const struct afk_layout *lo, char *gil)
{
    return lo->interval_known ? FIELD(gil, lo->gil_holder - sizeof(unsigned long), unsigned long)
                              : NULL;
}

int
afk_interp_has_own_gil(const struct afk_layout *lo, PyInterpreterState *interp)
{
    PyInterpreterState *main = *afk_runtime_main(lo);
    char *gil = *afk_interp_gil(lo, interp);
    int own = *FIELD(interp, lo->interp_gil + 8, int);
    if (gil == (char *)interp + lo->interp_own_gil && own == 1)
        return 1;
    if (gil == *afk_interp_gil(lo, main) && own == 0)
        return 0;
    return -1;
}

/* PyMutex is one byte, bit 0 is "locked" (Include/cpython/lock.h). */
bool
afk_head_is_locked(const struct afk_layout *lo)
{
    return (__atomic_load_n((unsigned char *)afk_runtime_head_mutex(lo), __ATOMIC_ACQUIRE) & 1) != 0;
}

/* HEAD_LOCK without ever detaching: PyMutex_Lock() would let the GIL go. Whoever
 * holds it is in a few lines of pystate.c, or in a fork(2). */
void
afk_head_lock(const struct afk_layout *lo)
{
    unsigned char *byte = (unsigned char *)afk_runtime_head_mutex(lo);
    for (unsigned n = 0;; n++) {
        /* Bit 1 is "threads are parked": it stays. */
        unsigned char was = __atomic_load_n(byte, __ATOMIC_RELAXED) & 2;
        if (__atomic_compare_exchange_n(byte, &was, was | 1, false, __ATOMIC_ACQUIRE,
                                        __ATOMIC_RELAXED))
            return;
        if (n < 100)
            (void)sched_yield();
        else
            (void)nanosleep(&(struct timespec){0, 50000}, NULL);
    }
}

void
afk_head_unlock(const struct afk_layout *lo)
{
    PyMutex_Unlock(afk_runtime_head_mutex(lo));
}

int
afk_runs_on_this_stack(const struct afk_layout *lo, PyThreadState *ts)
{
    if (lo->state[AFK_FEATURE_STACK] != AFK_READY)
        return -1;
    PyThreadState copy;
    if (afk_os_peek(&copy, ts, sizeof copy) < 0)
        return -1;
    return walk_frames(lo->frame_previous, &copy);
}
