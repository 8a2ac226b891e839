/*
 * What needs an interpreter and knows no object of ours: the layout, the hop,
 * the twin fork, the launch pad, the child's boot. Grouped by file.
 */
#ifndef AFK_CPYTHON_H
#define AFK_CPYTHON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <pthread.h>
#include <semaphore.h>

#include "anyfork/anyfork_python.h"
#include "core/core.h"

#if PY_VERSION_HEX < 0x030D0000
#error "anyfork needs CPython 3.13 or newer"
#endif

/* ---- layout.c: the only file that reads private offsets --------------------- */
enum afk_feature {
    AFK_FEATURE_HOP,   /* fork in main: interpreter list, main_tstate */
    AFK_FEATURE_TWIN,  /* fork in a sub-interpreter: HEAD mutex, GIL fields */
    AFK_FEATURE_HOOKS, /* the lists of os.register_at_fork, parked in the child */
    AFK_FEATURE_STACK, /* which thread states run on this thread's C stack */
    AFK_FEATURE_ATTACH, /* to leave a thread state and keep its GIL */
    AFK_FEATURE_COUNT,
    AFK_FEATURE_NONE = -1 /* needs nothing private */
};
enum afk_feature_state { AFK_UNKNOWN, AFK_READY, AFK_REFUSED };

/* Where CPython keeps what a thread is attached to; attach.c. */
struct afk_thread_locals {
    size_t module, bias; /* of the ELF object whose variables they are */
    size_t tstate;       /* offsets of _Py_tss_tstate, */
    size_t interp;       /* _Py_tss_interp (3.15) */
    size_t gilstate;     /* and _Py_tss_gilstate (3.14), else in a pthread key */
    pthread_key_t key;
};

#define AFK_WHY_SIZE 96
struct afk_layout {
    enum afk_feature_state state[AFK_FEATURE_COUNT];
    char why[AFK_FEATURE_COUNT][AFK_WHY_SIZE];
    char *runtime;           /* _PyRuntime */
    size_t runtime_head;     /* interpreters.head; .main, .next_id and so on follow */
    size_t interp_size;
    size_t interp_id;
    size_t interp_next;
    size_t interp_threads;
    size_t interp_gil;       /* pointer to the GIL; own_gil follows */
    size_t interp_own_gil;   /* the embedded GIL that a legacy one does not use */
    size_t interp_hooks;     /* before, after_in_parent, after_in_child */
    size_t interp_gc;
    size_t interp_collecting; /* gc.collecting, an int; 0: not known */
    size_t interp_world;     /* free-threaded: what stops its threads; a mutex first */
    size_t gil_holder;       /* within the GIL */
    size_t frame_previous;
    bool interval_known;     /* gil.interval, before gil.last_holder, was proved */
    struct afk_thread_locals tls;
};

/* Where the table comes from; doctored in tests. */
struct afk_layout_source {
    unsigned long version_hex; /* of the running CPython */
    bool debug;                /* is it a debug build? */
    const unsigned char *table; /* _Py_DebugOffsets */
    size_t table_size;
};
/* Reads, compares and fills *ret; never follows what it has not proved. */
void afk_layout_discover(const struct afk_layout_source *source, struct afk_layout *ret);
void afk_layout_source_here(struct afk_layout_source *ret);
/* The layout of this process, discovered at the first call. Needs an attached
 * thread state. Never NULL. */
const struct afk_layout *afk_layout(void);
const struct afk_layout *afk_layout_if_known(void); /* NULL: not yet; needs no thread state */
/* For what could not be seen at the first call; cheap once it is known. Needs an attached
 * thread state. */
void afk_layout_look_again(void);
const char *afk_feature_name(enum afk_feature feature);
/* 0, or ANYFORK_ELAYOUT with the reason in reterr. */
int afk_layout_require(enum afk_feature feature, struct anyfork_error *reterr);
/* In a forked child: out of the list, so that nothing there clears it. */
void afk_unlink_interpreter(PyInterpreterState *interp);
/* Twin fork turned out not to work after all. */
void afk_layout_refuse(enum afk_feature feature, const char *why);

/* Named fields. Valid only after afk_layout_require(). */
PyInterpreterState **afk_runtime_head(const struct afk_layout *lo);
PyInterpreterState **afk_runtime_main(const struct afk_layout *lo);
PyThreadState **afk_runtime_main_tstate(const struct afk_layout *lo);
PyMutex *afk_runtime_head_mutex(const struct afk_layout *lo);
PyInterpreterState **afk_interp_next(const struct afk_layout *lo, PyInterpreterState *interp);
PyThreadState **afk_interp_threads(const struct afk_layout *lo, PyInterpreterState *interp);
char **afk_interp_gil(const struct afk_layout *lo, PyInterpreterState *interp);
/* The third of three lists: before and after_in_parent come first. */
PyObject **afk_interp_child_hooks(const struct afk_layout *lo, PyInterpreterState *interp);
/* True while a thread collects; NULL: not known. */
int *afk_interp_collecting(const struct afk_layout *lo, PyInterpreterState *interp);
PyMutex *afk_interp_world_mutex(const struct afk_layout *lo, PyInterpreterState *interp);
PyThreadState **afk_gil_holder(const struct afk_layout *lo, char *gil);
/* sys.getswitchinterval(), in microseconds; NULL: not known. */
unsigned long *afk_gil_interval(const struct afk_layout *lo, char *gil);
/* True where interp has a GIL that is not main's; -1 if the fields disagree. */
int afk_interp_has_own_gil(const struct afk_layout *lo, PyInterpreterState *interp);
bool afk_head_is_locked(const struct afk_layout *lo);
void afk_head_lock(const struct afk_layout *lo);
void afk_head_unlock(const struct afk_layout *lo);
/* 1: a frame of ts lies on this thread's C stack; 0: it does not, -1: ts has no
 * frames, or none can be followed. */
int afk_runs_on_this_stack(const struct afk_layout *lo, PyThreadState *ts);
bool afk_this_stack(uintptr_t *ret_low, uintptr_t *ret_high); /* false: not known */

/* ---- attach.c ------------------------------------------------------------------ */
/* Fills lo->tls. `second`: a state of this thread and interpreter, fresh. NULL, or
 * what does not agree. */
const char *afk_attach_discover(struct afk_layout *lo, PyThreadState *second);
/* AFK_FEATURE_ATTACH. Detached from ts, which goes on holding its GIL; attached to ts,
 * whose GIL it held all the time. */
void afk_leave(const struct afk_layout *lo, PyThreadState *ts);
void afk_enter(const struct afk_layout *lo, PyThreadState *ts);
/* PyEval_RestoreThread(), without the delay of a switch interval behind each busy
 * thread. `interp` is that of ts, which may have been freed meanwhile: Python may
 * have ended. */
void afk_attach(PyThreadState *ts, PyInterpreterState *interp);
/* PyThreadState_New(), ready to be attached. NULL: out of memory. */
PyThreadState *afk_state_new(PyInterpreterState *interp);
/* PyThreadState_Swap(), also from no state; a GIL that both share is not let go. */
void afk_swap(PyThreadState *to);
/* From `fresh`, which is cleared and deleted, back to where afk_swap() came from;
 * NULL: to no state. */
void afk_swap_back(PyThreadState *fresh, PyThreadState *to);

/* ---- hop.c ------------------------------------------------------------------- */
/* A fresh thread state on `interp`, made current; *ret_from is what to go back
 * to, NULL if there was none. NULL: out of memory, nothing changed. */
PyThreadState *afk_hop_enter(PyInterpreterState *interp, PyThreadState **ret_from);

enum afk_fork_kind {
    AFK_FORK_CALL,   /* fork(): the child returns into its caller */
    AFK_FORK_WORKER, /* the child runs a target and never returns */
};

/* One fork in progress. `ts` survives in the child. */
struct afk_forking {
    enum afk_fork_kind kind;
    const struct afk_layout *layout;
    PyInterpreterState *main;
    PyThreadState *ts;
    struct anyfork_child *child;  /* adopted right after the fork; NULL for fork() */
    bool for_pad;                 /* it is what the launch pad was asked for */
    struct afk_plan plan;
    PyObject *main_hooks;         /* parked, owned by the interpreter's list */
    bool parked;
    /* twin.c */
    PyThreadState *tm;            /* this thread's state in main */
    bool fresh_tm;
    bool own_gil;
    PyObject *caller_hooks;
    PyThreadState *keep[8];       /* other states of this thread in main */
    unsigned n_keep;
};

/* Each shape of fork is these three. before() fails with nothing changed. */
struct afk_fork_shape {
    int (*before)(struct afk_forking *f, struct anyfork_error *reterr);
    void (*after_in_parent)(struct afk_forking *f);
    void (*after_in_child)(struct afk_forking *f);
};
extern const struct afk_fork_shape afk_fork_in_main; /* hop.c */
extern const struct afk_fork_shape afk_fork_twin;    /* twin.c */

/* The narrator: before, fork, after. ts is attached and current. */
pid_t afk_fork_from(struct afk_forking *f, struct anyfork_error *reterr);
void afk_forking_init(struct afk_forking *f, enum afk_fork_kind kind);
/* Finalization, attached thread state: what every fork asks first. */
int afk_check_caller(struct anyfork_error *reterr);

/* Shared by the shapes. */
int afk_plan_drop_states(struct afk_forking *f, PyInterpreterState *interp);
int afk_plan_only_state(struct afk_forking *f, PyThreadState *only);
void afk_run_child_hooks(PyObject *hooks);
/* Clears inherited atexit callbacks of the current interpreter. */
void afk_clear_atexit(void);
int afk_python_handlers(sigset_t *ret);  /* needs main's thread state */
/* In the child, what Python knows of its signals; needs main's. */
void afk_settle_python_handlers(const struct afk_plan *plan);

/* ---- boot.c ------------------------------------------------------------------ */
enum afk_job_kind { AFK_JOB_C, AFK_JOB_CALLABLE, AFK_JOB_PICKLE, AFK_JOB_PROGRAM };
struct afk_job {
    enum afk_job_kind kind;
    const struct anyfork_options *options; /* NULL: the defaults */
    int report_to;        /* PROGRAM: what its end of the report socket is, or -1 */
    struct afk_setup *setup; /* of a process: filled by afk_start() */
    struct afk_child_wants wants; /* of setup, which may be gone while a launch pad looks */
    anyfork_main entry;
    void *arg;
    PyObject *callable, *args;  /* borrowed: the caller keeps them */
    const char *pickle;
    size_t pickle_size;
    unsigned long caller; /* the thread that asked; filled by afk_start() */
    struct afk_template *template; /* of a method that needs one; else NULL */
    bool orphan;          /* PROGRAM: nobody's child */
};
/* With a thread state of the target's interpreter. Returns a new reference, or NULL with
 * reterr filled and no exception set. */
PyObject *afk_boot_prepare(struct anyfork_error *reterr);
/* The same, in the parent: the Python part must be there, all of it, before the fork. */
PyObject *afk_boot_prepare_fork(struct anyfork_error *reterr);
_Noreturn void afk_boot_run(PyObject *boot, const struct afk_job *job,
                            struct afk_forking *f, bool in_subinterpreter);
/* Runs a job in the current interpreter; its outcome has been reported when the exit
 * code is returned. */
int afk_boot_run_target(PyObject *boot, const struct afk_job *job,
                        const struct afk_reporter *reporter);
/* The main program of an executed worker: never returns. `fd`: its end of the report
 * socket. */
_Noreturn void afk_boot_run_executed(int fd, const char *pickle, size_t size);
/* A standby, which was just forked, up to its end. `keep`: that of f's plan, whose first two
 * are the standby's taken_fd and door_fd. */
struct afk_standby;
_Noreturn void afk_boot_run_standby(PyObject *boot, struct afk_forking *f,
                                    const struct afk_standby *standby, int *keep);
/* In a worker of a template that is shared: its door_fd. Else -1. */
int afk_boot_door(void);
/* The end of Python in the current interpreter: threads, atexit, buffers. */
void afk_boot_finish(PyObject *boot);
/* Where package `anyfork` lies, for interpreters that do not have it on their
 * sys.path. Copied. */
void afk_boot_set_package_parent(const char *dir);

/* ---- pad.c ------------------------------------------------------------------- */
enum afk_pad {
    AFK_PAD_NONE,   /* always on the calling thread */
    AFK_PAD_SUBINT, /* the thread of an isolated sub-interpreter of its own, attached to it */
    AFK_PAD_MAIN,   /* a thread of main, detached between requests */
    AFK_PAD_COUNT
};
/* What runs on a launch pad. `arg` is heap memory that
 * the last of caller and pad frees, for a caller may give up. */
struct afk_pad_work {
    int (*job)(void *arg, struct anyfork_error *reterr);
    void *arg;
    void (*free)(void *arg);
    void (*collect)(void *arg, void *into); /* by the caller, once job was >= 0 */
    void *collect_into;
};
/* Releases the GIL. Returns what job returned; or ANYFORK_ETIMEDOUT,
 * ANYFORK_EFINALIZING, ANYFORK_ESYSTEM with reterr filled, and the job has not
 * passed its point of no return, nor ever will. */
int afk_pad_run(enum afk_pad kind, const struct afk_pad_work *work, int64_t timeout_ns,
                struct anyfork_error *reterr);
/* The job's point of no return: false if its caller has given up. True on any
 * thread that is no pad. */
bool afk_pad_commit(void);
/* On the pad, detached: takes over main's GIL, if the caller lends it. */
bool afk_pad_borrow_gil(void);
/* Before the state that runs on it is left: true if it goes back to the caller, and
 * then afk_pad_end_return(). Not ours any more: it is let go. */
bool afk_pad_begin_return(bool is_ours);
void afk_pad_end_return(void);
/* Lets the end of main's threading stop the pads and wait for subint's threads. */
int afk_pad_register_stop(struct anyfork_error *reterr);
/* Stops the pads and ends their interpreter. Call with main's thread state. */
int afk_pad_stop(int64_t timeout_ns);
void afk_pad_begin(void); /* main's Python starts */
void afk_pad_revive(void); /* a worker of a process whose Python was about to end */
unsigned afk_pad_threads(void); /* how many pads there are */
bool afk_pad_has_interpreter(void);

/* ---- subint.c ----------------------------------------------------------------- */
/* An isolated interpreter, with a GIL of its own. Call detached: attached to it
 * afterwards, or NULL with reterr filled and still detached. `stage`: that of a
 * refusal of CPython's. */
PyThreadState *afk_subint_new(int stage, struct anyfork_error *reterr);
/* In a worker: the job in an interpreter and on a thread of its own; waits for it, and
 * returns its exit code. */
int afk_subint_host(const struct afk_job *job, const struct afk_reporter *reporter);
/* Waits for all that run in this process. Call with main's thread state. -1 with an
 * exception set: a signal's. */
int afk_subint_join_all(void);
unsigned afk_subint_threads(void);

/* ---- start.c -------------------------------------------------------------------- */
/* One message to each of n standbys; those that are not ready the template is asked for in
 * one. `jobs` have a pickle each. 0; AFK_STALE, with the reason as detail: the template has to be
 * made again for those that are not started; or a code with reterr filled. What was started is,
 * in each case. */
int afk_start_many(struct afk_template *t, const struct anyfork_options *options,
                   struct afk_template_job *jobs, unsigned n, struct anyfork_error *reterr);

/* ---- template.c ----------------------------------------------------------------- */
/* Serves, in a template, until its owner has gone and all workers have ended. Call with the
 * main thread's state of main. */
int afk_template_serve(const struct afk_server_options *options, struct anyfork_error *reterr);

/* ---- start.c: the narrator of a worker's start -------------------------------- */
struct afk_method;
int afk_start(const struct afk_method *method, const struct afk_job *job,
              struct anyfork_child **ret_child, struct anyfork_error *reterr);
/* The `start` of a row. */
int afk_start_fork(const struct afk_method *method, const struct afk_job *job,
                   struct anyfork_child **ret_child, struct anyfork_error *reterr);
int afk_start_subint(const struct afk_method *method, const struct afk_job *job,
                     struct anyfork_child **ret_child, struct anyfork_error *reterr);
int afk_start_zygote(const struct afk_method *method, const struct afk_job *job,
                     struct anyfork_child **ret_child, struct anyfork_error *reterr);
int afk_start_exec(const struct afk_method *method, const struct afk_job *job,
                   struct anyfork_child **ret_child, struct anyfork_error *reterr);

/* ---- call.c: fork() and forkpty(), which return twice -------------------------- */
/* os.fork and os.forkpty of this interpreter, replaced by functions that name
 * anyfork.fork(); what is not CPython's own any more is left alone. */
void afk_forbid_os_fork(void);

/* Fills reterr from the Python exception that is set, and clears it. */
int afk_fail_python(struct anyfork_error *reterr, int stage, int line, const char *what);

#endif
