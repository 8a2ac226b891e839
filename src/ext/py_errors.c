/* The only place that turns our errors into Python exceptions. */
#include "ext.h"

#include <string.h>

/* Paths of any bytes, cut off anywhere. */
PyObject *
ext_text(const char *detail)
{
    return PyUnicode_DecodeUTF8(detail, (Py_ssize_t)strlen(detail), "replace");
}

PyObject *
ext_raise(const struct anyfork_error *error, const char *method)
{
    if (error->code == ANYFORK_EPYTHON && PyErr_Occurred())
        return NULL; /* that of a signal handler, say */
    PyObject *errors = PyImport_ImportModule("anyfork._errors");
    PyObject *exc = NULL;
    if (errors != NULL)
        exc = PyObject_CallMethod(errors, "from_c", "isisNi", error->code,
                                  anyfork_stage_name(error->stage), error->sys_errno, method,
                                  ext_text(error->detail), error->line);
    if (exc != NULL)
        PyErr_SetObject((PyObject *)Py_TYPE(exc), exc);
    Py_XDECREF(exc);
    Py_XDECREF(errors);
    return NULL;
}
