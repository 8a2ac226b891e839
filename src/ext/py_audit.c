/* What python/anyfork/_audit.py cannot see from Python. Nothing is loaded for it. */
#include "ext.h"

#include <dlfcn.h>

#define DEVICES_MAX 64
#define HANDLERS_MAX 256
#define CUDA_SUCCESS 0
#define CUDA_ERROR_NOT_INITIALIZED 3

/* The function `name` of a library that is loaded; cast through the pointer to it, as
 * dlsym(3) does. */
static bool
find(void *library, const char *name, void *ret_function)
{
    void *found = dlsym(library, name);
    memcpy(ret_function, &found, sizeof found);
    return found != NULL;
}

/* (state, devices): "off", "on" after cuInit(), or "unknown"; the devices whose primary
 * context is active. cuCtxGetCurrent() adds -1: this thread has one of its own. */
static PyObject *
ask_cuda(void *library)
{
    int (*get_count)(int *), (*get_state)(int, unsigned *, int *), (*get_current)(void **);
    int n = 0;
    if (!find(library, "cuDeviceGetCount", &get_count))
        return Py_BuildValue("s[]", "unknown");
    int r = get_count(&n);
    if (r == CUDA_ERROR_NOT_INITIALIZED)
        return Py_BuildValue("s[]", "off");
    PyObject *devices = PyList_New(0);
    bool primary = find(library, "cuDevicePrimaryCtxGetState", &get_state);
    for (int i = 0; devices != NULL && r == CUDA_SUCCESS && primary && i < n && i < DEVICES_MAX;
         i++) {
        unsigned flags = 0;
        int active = 0;
        if (get_state(i, &flags, &active) != CUDA_SUCCESS || !active)
            continue;
        PyObject *number = PyLong_FromLong(i);
        if (number == NULL || PyList_Append(devices, number) < 0)
            Py_CLEAR(devices);
        Py_XDECREF(number);
    }
    void *context = NULL;
    if (devices != NULL && PyList_GET_SIZE(devices) == 0 &&
        find(library, "cuCtxGetCurrent", &get_current) && get_current(&context) == CUDA_SUCCESS &&
        context != NULL) {
        PyObject *number = PyLong_FromLong(-1);
        if (number == NULL || PyList_Append(devices, number) < 0)
            Py_CLEAR(devices);
        Py_XDECREF(number);
    }
    return devices != NULL ? Py_BuildValue("sN", "on", devices) : NULL;
}

PyObject *
ext_cuda_state(PyObject *Py_UNUSED(module), PyObject *path)
{
    PyObject *bytes;
    if (!PyUnicode_FSConverter(path, &bytes))
        return NULL;
    void *library = dlopen(PyBytes_AS_STRING(bytes), RTLD_LAZY | RTLD_NOLOAD);
    Py_DECREF(bytes);
    if (library == NULL)
        return Py_BuildValue("s[]", "unknown");
    PyObject *answer = ask_cuda(library);
    (void)dlclose(library); /* the reference that was taken here */
    return answer;
}

PyObject *
ext_fork_hooks(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    const struct afk_layout *lo = afk_layout();
    if (lo->state[AFK_FEATURE_HOOKS] != AFK_READY)
        Py_RETURN_NONE;
    PyObject *all = PyList_New(0);
    PyObject **lists = afk_interp_child_hooks(lo, PyInterpreterState_Get()) - 2;
    for (int i = 0; all != NULL && i < 3; i++)
        if (lists[i] != NULL &&
            PyList_SetSlice(all, PyList_GET_SIZE(all), PyList_GET_SIZE(all), lists[i]) < 0)
            Py_CLEAR(all);
    return all;
}

PyObject *
ext_fork_handlers(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    unsigned (*handlers)(const void **, unsigned);
    const void *function[HANDLERS_MAX];
    if (!find(RTLD_DEFAULT, "anyfork_fork_handlers", &handlers))
        Py_RETURN_NONE;
    unsigned n = handlers(function, HANDLERS_MAX);
    PyObject *paths = PyList_New(0);
    for (unsigned i = 0; paths != NULL && i < n; i++) {
        Dl_info info = {0};
        bool known = i < HANDLERS_MAX && function[i] != NULL && dladdr(function[i], &info) != 0 &&
                     info.dli_fname != NULL;
        PyObject *path = PyUnicode_DecodeFSDefault(known ? info.dli_fname : "");
        if (path == NULL || PyList_Append(paths, path) < 0)
            Py_CLEAR(paths);
        Py_XDECREF(path);
    }
    return paths;
}
