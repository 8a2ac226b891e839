/*
 * anyfork for programs that embed or extend CPython: fork() from any
 * interpreter and any thread, and workers that are supervised children.
 *
 * The library is built per CPython minor version; `pkg-config anyfork-3.14`
 * names the one for 3.14. It is the very library that the Python package uses:
 * a process that does both has one copy of it.
 *
 * Every function states: what its arguments own, how it fails, which thread and
 * interpreter may call it, what it blocks for, and since when it exists.
 */
#ifndef ANYFORK_ANYFORK_PYTHON_H
#define ANYFORK_ANYFORK_PYTHON_H

#include <Python.h>

#include "anyfork/anyfork.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * fork(2) that returns twice in the calling interpreter.
 *
 * In the main interpreter: what os.fork() does, except that live
 * sub-interpreters do not crash the child (CPython gh-139759) and that the
 * child's runtime.main_tstate is alive. In a sub-interpreter: the twin fork;
 * signals with a Python handler get SIG_DFL in the child, the inherited atexit
 * callbacks are dropped.
 *
 *   reterr  set on failure only; may be NULL.
 *
 * Returns the child's pid in the parent and 0 in the child; -1 with nothing
 * started and nothing changed:
 *   ANYFORK_ELAYOUT       the layout of this CPython does not agree.
 *   ANYFORK_EUNAVAILABLE  free-threaded twin fork, or a third interpreter on
 *                         this thread's stack.
 *   ANYFORK_EFINALIZING   the interpreter shuts down.
 *   ANYFORK_ESYSTEM       stage FORK (EAGAIN, ENOMEM), THREAD or MEMORY.
 *   ANYFORK_EINVAL        no attached thread state.
 *
 * Call from:  any thread, any interpreter, with an attached thread state.
 * Blocks for: the main interpreter's GIL (sub-interpreters with a GIL of their
 *             own), the before-fork hooks, the import lock, one fork(2).
 * Signals:    blocked in the calling thread around the fork(2), then restored.
 * Since 0.1.  See fork(2), os.register_at_fork, CPython gh-139759.
 */
ANYFORK_API pid_t anyfork_fork(struct anyfork_error *reterr);

/*
 * As anyfork_fork(); the child is the session leader of a new pseudo-terminal,
 * which is its standard input, output and error.
 *   ret_master_fd  set in the parent: the close-on-exec master end, owned by
 *                  the caller. Set to -1 in the child.
 * Fails also with stage PTY. Since 0.1. See forkpty(3), os.forkpty.
 */
ANYFORK_API pid_t anyfork_forkpty(int *ret_master_fd, struct anyfork_error *reterr);

/* Runs in the child with a thread state attached; its value is the exit code. */
typedef int (*anyfork_main)(void *arg);

/*
 * Start a worker that runs a C function, or a Python callable; return as soon
 * as the process exists, before it is ready.
 *
 *   method     a name of anyfork_method_name(), "fork" say.
 *   entry,arg  called in the child; arg is whatever the memory there holds. Not the
 *              caller's stack, where another thread may fork: the child's own new
 *              threads may get it.
 *   callable,  called as callable(*args) in the child. Borrowed references; the
 *   args       child's memory has the objects. Methods that change interpreter
 *              refuse a callable from a sub-interpreter: use Python's
 *              anyfork.spawn(), which pickles.
 *   options    of the worker's process; NULL: the defaults. Borrowed until it returns.
 *   ret_child  set on success only; release with anyfork_child_close().
 *   reterr     set on failure only; may be NULL.
 *
 * Returns 0, or a negative enum anyfork_code with nothing started.
 *
 * In the child: default signal dispositions, an empty signal mask, standard
 * streams and logging handlers rebuilt, half-imported modules of dead threads
 * dropped, the inherited atexit list cleared; it ends by _exit(), never by
 * Py_FinalizeEx(). It ends with its owner: see docs/internals.md, "Lifeline".
 *
 * Call from:  any thread, any interpreter, with an attached thread state.
 * Blocks for: as anyfork_fork(); the launch pad's answer for "subint_fork" from
 *             the main interpreter (at most 10 s).
 * Since 0.1.
 */
ANYFORK_API int anyfork_spawn_c(const char *method, anyfork_main entry, void *arg,
                                const struct anyfork_options *options,
                                struct anyfork_child **ret_child,
                                struct anyfork_error *reterr);
ANYFORK_API int anyfork_spawn_callable(const char *method, PyObject *callable,
                                       PyObject *args,
                                       const struct anyfork_options *options,
                                       struct anyfork_child **ret_child,
                                       struct anyfork_error *reterr);

/* The methods of this build, by index; NULL past the end.
 * Call from: anywhere. Since 0.1. */
ANYFORK_API const char *anyfork_method_name(unsigned index);

/* 0 if twin fork (the fork of a sub-interpreter) can work in this process, else
 * a negative code and the reason. Call with an attached thread state. Since 0.1. */
ANYFORK_API int anyfork_check_twin(struct anyfork_error *reterr);

#ifdef __cplusplus
}
#endif
#endif
