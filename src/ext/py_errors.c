/* The only place that turns our errors into Python exceptions. */
#include "ext.h"

PyObject *
ext_raise(const struct anyfork_error *error, const char *method)
{
    PyObject *errors = PyImport_ImportModule("anyfork._errors");
    PyObject *exc = NULL;
    if (errors != NULL)
        exc = PyObject_CallMethod(errors, "from_c", "isissi", error->code,
                                  anyfork_stage_name(error->stage), error->sys_errno, method,
                                  error->detail, error->line);
    if (exc != NULL)
        PyErr_SetObject((PyObject *)Py_TYPE(exc), exc);
    Py_XDECREF(exc);
    Py_XDECREF(errors);
    return NULL;
}
