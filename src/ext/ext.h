/* Glue between Python objects and the library; no logic. */
#ifndef AFK_EXT_H
#define AFK_EXT_H

#include "cpython/cpython.h"

struct ext_state {
    PyObject *child_type, *template_type, *channel_type, *view_type;
    PyObject *heartbeat_type, *supervisor_type;
    bool finalizing;
};
struct ext_state *ext_state_of(PyObject *module);

/* py_errors.c: sets the Python exception for `error`; returns NULL. */
PyObject *ext_raise(const struct anyfork_error *error, const char *method);
/* What we say of an error, as str: it may hold a path. */
PyObject *ext_text(const char *detail);

/* py_options.c */
struct ext_options {
    struct anyfork_options options;
    PyObject *dict; /* borrowed, and what options points into */
    PyObject *keep; /* the same, our own */
};
/* False with an exception set. `dict` must outlive the start. */
bool ext_options_take(struct ext_options *x, PyObject *dict);
void ext_options_release(struct ext_options *x);

/* py_channel.c */
extern PyType_Spec ext_channel_spec, ext_view_spec;

/* py_child.c */
extern PyType_Spec ext_child_spec;
/* Steals `child`; closes it on failure. */
PyObject *ext_child_wrap(PyTypeObject *type, struct anyfork_child *child, const char *method);

/* py_template.c */
extern PyType_Spec ext_template_spec;
struct afk_template *ext_template_of(PyObject *template); /* of the type; borrowed */
/* (handles of type `type`, None), for as many pickles; or (handles, and None for those that were
 * not started; a str: why the template has to be made again). */
PyObject *ext_template_start_many(PyObject *template, PyTypeObject *type, PyObject *pickles,
                                  const struct anyfork_options *options);

/* py_heartbeat.c */
extern PyType_Spec ext_heartbeat_spec;
PyObject *ext_heartbeat_begin(PyObject *module, PyObject *args);
PyObject *ext_heartbeat_end(PyObject *module, PyObject *args);
PyObject *ext_heartbeat_verdict(PyObject *module, PyObject *args);

/* py_supervise.c */
extern PyType_Spec ext_supervisor_spec;

/* py_audit.c */
PyObject *ext_cuda_state(PyObject *module, PyObject *path);
PyObject *ext_fork_hooks(PyObject *module, PyObject *args);
PyObject *ext_fork_handlers(PyObject *module, PyObject *args);

#endif
