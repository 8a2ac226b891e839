/* The heap types _anyfork.Channel and _anyfork.View over a channel of core. */
#include "ext.h"

#include <errno.h>
#include <math.h>
#include <string.h>
#include <time.h>

#include "core/channel.h"

#define COPY_WITHOUT_GIL (256u << 10)
#define FREE_WITHOUT_GIL (16 << 20)
#define FEW_BUFFERS 8

/* ---- View: a part of a message, in a segment ---------------------------------------- */

struct view_object {
    PyObject_HEAD
    struct afk_mapping *mapping;
    const char *data;
    Py_ssize_t size;
};

/* With a view of `mapping` that is its own. */
static PyObject *
view_of(PyTypeObject *type, struct afk_mapping *mapping, const struct iovec *part)
{
    struct view_object *self = (struct view_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    afk_mapping_ref(mapping);
    self->mapping = mapping;
    self->data = part->iov_base;
    self->size = (Py_ssize_t)part->iov_len;
    return (PyObject *)self;
}

static void
view_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    struct afk_mapping *mapping = ((struct view_object *)op)->mapping;
    /* It may be the end of the memory. */
    Py_ssize_t size = ((struct view_object *)op)->size;
    PyThreadState *ts = size > FREE_WITHOUT_GIL ? PyEval_SaveThread() : NULL;
    if (mapping != NULL)
        afk_mapping_unref(mapping);
    if (ts != NULL)
        PyEval_RestoreThread(ts);
    type->tp_free(op);
    Py_DECREF(type);
}

static int
view_getbuffer(PyObject *op, Py_buffer *buffer, int flags)
{
    struct view_object *self = (struct view_object *)op;
    return PyBuffer_FillInfo(buffer, op, (void *)(uintptr_t)self->data, self->size, 1, flags);
}

static Py_ssize_t
view_length(PyObject *op)
{
    return ((struct view_object *)op)->size;
}

static PyType_Slot view_slots[] = {
    {Py_tp_dealloc, view_dealloc},
    {Py_bf_getbuffer, view_getbuffer},
    {Py_sq_length, view_length},
    {Py_tp_doc, "A part of a message, read-only, where the sender has put it: a buffer. The memory "
                "is the sender's again once all views of the message, and what was made of them "
                "without a copy, have gone."},
    {0, NULL},
};
PyType_Spec ext_view_spec = {
    .name = "anyfork._anyfork.View",
    .basicsize = sizeof(struct view_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = view_slots,
};

/* ---- Channel ------------------------------------------------------------------------- */

struct channel_object {
    PyObject_HEAD
    struct afk_channel *channel; /* while the object lives */
};

static struct afk_channel *
channel_of(PyObject *op)
{
    return ((struct channel_object *)op)->channel;
}

/* An exception by `errnum`, with what to do; NULL. */
static PyObject *
raise_errno(int errnum, const char *text)
{
    PyObject *args = Py_BuildValue("(is)", errnum, text);
    if (args != NULL)
        PyErr_SetObject(PyExc_OSError, args); /* the class is by the number */
    Py_XDECREF(args);
    return NULL;
}

static PyObject *
raise_code(int code)
{
    if (code == -ESHUTDOWN) {
        PyErr_SetString(PyExc_ValueError,
                        "the channel is closed, or of the process that this one was forked from");
        return NULL;
    }
    if (code == -EPIPE || code == -ECONNRESET)
        return raise_errno(-code, "the peer has closed the channel");
    if (code == -ETOOMANYREFS)
        return raise_errno(-code, "too many descriptors are on their way: let the receivers go "
                                  "on, or raise RLIMIT_NOFILE");
    if (code == -ENOMEM)
        return PyErr_NoMemory();
    if (code == -EMFILE || code == -ENFILE)
        return raise_errno(-code, "no descriptor left for the message: close some, or raise "
                                  "RLIMIT_NOFILE");
    errno = -code;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *
channel_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {(char *)"fd", (char *)"message_max", NULL};
    long long message_max = 1ll << 32;
    int fd;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i|L:Channel", names, &fd, &message_max))
        return NULL;
    if (message_max < 0)
        return PyErr_Format(PyExc_ValueError, "message_max: %lld is less than 0", message_max);
    struct channel_object *self = (struct channel_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    int r = afk_channel_new(&self->channel, fd, (uint64_t)message_max);
    if (r == 0)
        return (PyObject *)self;
    Py_DECREF(self);
    if (r == -EPROTOTYPE)
        return PyErr_Format(PyExc_ValueError,
                            "fd %d: a Unix socket of type SOCK_SEQPACKET is wanted: "
                            "socket.socketpair(type=socket.SOCK_SEQPACKET)", fd);
    errno = -r;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static void
channel_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    if (channel_of(op) != NULL)
        afk_channel_free(channel_of(op));
    type->tp_free(op);
    Py_DECREF(type);
}

/* Positional or by name, the first `needed` of them by position; what is missing stays as it is. */
static bool
take_arguments(const char *function, const char *const *names, Py_ssize_t needed, PyObject **ret,
               PyObject *const *args, Py_ssize_t n_args, PyObject *kwnames)
{
    Py_ssize_t n = 0;
    while (names[n] != NULL)
        n++;
    if (n_args < needed || n_args > n) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd to %zd positional arguments, not %zd",
                     function, needed, n, n_args);
        return false;
    }
    for (Py_ssize_t i = 0; i < n_args; i++)
        ret[i] = args[i];
    for (Py_ssize_t k = 0; kwnames != NULL && k < PyTuple_GET_SIZE(kwnames); k++) {
        PyObject *name = PyTuple_GET_ITEM(kwnames, k);
        Py_ssize_t i = n_args;
        while (i < n && PyUnicode_CompareWithASCIIString(name, names[i]) != 0)
            i++;
        if (i == n) {
            PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", function,
                         name);
            return false;
        }
        ret[i] = args[n_args + k];
    }
    return true;
}

/* ---- sending */

struct buffers {
    Py_ssize_t n;
    Py_buffer *buffer;
    struct iovec *part;
    uint64_t bytes;
    Py_buffer few_buffers[FEW_BUFFERS];
    struct iovec few_parts[FEW_BUFFERS];
};

static void
release_buffers(struct buffers *b)
{
    for (Py_ssize_t i = 0; i < b->n; i++)
        PyBuffer_Release(&b->buffer[i]);
    if (b->buffer != b->few_buffers)
        PyMem_Free(b->buffer);
    if (b->part != b->few_parts)
        PyMem_Free(b->part);
}

static bool
room_for_buffers(struct buffers *b, Py_ssize_t n)
{
    b->n = 0;
    b->bytes = 0;
    b->buffer = b->few_buffers;
    b->part = b->few_parts;
    if (n > (Py_ssize_t)AFK_PARTS_MAX) {
        PyErr_Format(PyExc_ValueError, "a message has at most %u parts, not %zd", AFK_PARTS_MAX, n);
        return false;
    }
    if (n <= FEW_BUFFERS)
        return true;
    b->buffer = PyMem_New(Py_buffer, (size_t)n);
    b->part = PyMem_New(struct iovec, (size_t)n);
    if (b->buffer != NULL && b->part != NULL)
        return true;
    (void)PyErr_NoMemory();
    release_buffers(b);
    return false;
}

static bool
take_buffers(struct buffers *b, PyObject *tuple)
{
    Py_ssize_t n = PyTuple_GET_SIZE(tuple);
    if (!room_for_buffers(b, n))
        return false;
    for (Py_ssize_t i = 0; i < n; i++) {
        Py_buffer *one = &b->buffer[i];
        /* In the order of memory, whatever that is: as PickleBuffer.raw(). */
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(tuple, i), one, PyBUF_ANY_CONTIGUOUS) < 0) {
            release_buffers(b);
            return false;
        }
        b->n++;
        b->part[i] = (struct iovec){one->buf, (size_t)one->len};
        b->bytes += (uint64_t)one->len;
    }
    return true;
}

static bool
take_fds(int fds[AFK_CHANNEL_FDS_MAX], unsigned *ret_n, PyObject *tuple)
{
    Py_ssize_t n = PyTuple_GET_SIZE(tuple);
    if (n > AFK_CHANNEL_FDS_MAX) {
        PyErr_Format(PyExc_ValueError, "a message has at most %d descriptors, not %zd",
                     AFK_CHANNEL_FDS_MAX, n);
        return false;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        fds[i] = PyObject_AsFileDescriptor(PyTuple_GET_ITEM(tuple, i));
        if (fds[i] < 0)
            return false;
    }
    *ret_n = (unsigned)n;
    return true;
}

static PyObject *
send_message(PyObject *op, struct afk_message *message, const struct buffers *b)
{
    struct afk_channel *channel = channel_of(op);
    message->parts = b->part;
    message->n_parts = (unsigned)b->n;
    PyThreadState *ts = b->bytes > COPY_WITHOUT_GIL ? PyEval_SaveThread() : NULL;
    int r = afk_channel_send(channel, message);
    if (ts != NULL)
        PyEval_RestoreThread(ts);
    if (r >= 0)
        return PyBool_FromLong(r);
    if (r == -EMSGSIZE)
        return PyErr_Format(PyExc_ValueError,
                            "the message has %llu bytes, more than message_max of this channel",
                            (unsigned long long)b->bytes);
    return raise_code(r);
}

static PyObject *
channel_send(PyObject *op, PyObject *const *args, Py_ssize_t n_args, PyObject *kwnames)
{
    static const char *const names[] = {"kind", "id", "parts", "fds", NULL};
    PyObject *given[4] = {NULL, NULL, NULL, NULL};
    if (!take_arguments("send", names, 3, given, args, n_args, kwnames))
        return NULL;
    long kind = PyLong_AsLong(given[0]);
    if (kind == -1 && PyErr_Occurred())
        return NULL;
    if (kind < 0 || kind > UINT16_MAX)
        return PyErr_Format(PyExc_ValueError, "kind: 0 to 65535 is wanted, not %ld", kind);
    unsigned long long id = PyLong_AsUnsignedLongLong(given[1]);
    if (id == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    int fds[AFK_CHANNEL_FDS_MAX];
    struct afk_message message = {.kind = (uint16_t)kind, .id = id, .fds = fds};
    struct buffers b;
    PyObject *result = NULL;
    PyObject *parts = PySequence_Tuple(given[2]);
    PyObject *fd_tuple = given[3] != NULL ? PySequence_Tuple(given[3]) : NULL;
    if (parts == NULL || (given[3] != NULL && fd_tuple == NULL))
        goto out;
    if (fd_tuple != NULL && !take_fds(fds, &message.n_fds, fd_tuple))
        goto out;
    if (!take_buffers(&b, parts))
        goto out;
    result = send_message(op, &message, &b);
    release_buffers(&b);
out:
    Py_XDECREF(parts);
    Py_XDECREF(fd_tuple);
    return result;
}

/* ---- receiving */

static PyObject *
parts_of(PyObject *op, const struct afk_received *r)
{
    struct ext_state *state = PyType_GetModuleState(Py_TYPE(op));
    PyObject *tuple = PyTuple_New((Py_ssize_t)r->n_parts);
    for (unsigned i = 0; tuple != NULL && i < r->n_parts; i++) {
        const struct iovec *part = &r->parts[i];
        PyObject *one = r->copy
                            ? PyBytes_FromStringAndSize(part->iov_base, (Py_ssize_t)part->iov_len)
                            : view_of((PyTypeObject *)state->view_type, r->mapping, part);
        if (one == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, one);
    }
    return tuple;
}

static PyObject *
fds_of(const struct afk_received *r)
{
    PyObject *tuple = PyTuple_New((Py_ssize_t)r->n_fds);
    for (unsigned i = 0; tuple != NULL && i < r->n_fds; i++) {
        PyObject *one = PyLong_FromLong(r->fds[i]);
        if (one == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, one);
    }
    return tuple;
}

static PyObject *
message_of(PyObject *op, const struct afk_received *r)
{
    PyObject *parts = parts_of(op, r), *fds = fds_of(r), *kind = PyLong_FromLong(r->kind),
             *id = PyLong_FromUnsignedLongLong(r->id), *message = NULL;
    if (parts != NULL && fds != NULL && kind != NULL && id != NULL)
        message = PyTuple_Pack(4, kind, id, parts, fds);
    Py_XDECREF(parts);
    Py_XDECREF(fds);
    Py_XDECREF(kind);
    Py_XDECREF(id);
    return message;
}

static PyObject *
channel_receive(PyObject *op, PyObject *Py_UNUSED(args))
{
    struct afk_received received;
    const char *why = NULL;
    int r = afk_channel_receive(channel_of(op), &received, &why);
    if (r == 0)
        Py_RETURN_NONE;
    if (r == 1) {
        PyObject *message = message_of(op, &received);
        afk_received_drop(&received, message != NULL ? received.n_fds : 0);
        if (message == NULL)
            afk_channel_close(channel_of(op)); /* it is lost */
        return message;
    }
    if (r == -EPIPE) {
        PyErr_SetString(PyExc_EOFError, "the peer has closed the channel");
        return NULL;
    }
    if (r == -ESHUTDOWN)
        return raise_code(r);
    afk_channel_close(channel_of(op)); /* its message is lost */
    if (r != -EBADMSG)
        return raise_code(r);
    char text[200];
    (void)snprintf(text, sizeof text,
                   "the peer sent %s; the channel is closed: start the worker again", why);
    return raise_errno(ECONNABORTED, text);
}

/* ---- waiting */

static bool
to_ns(PyObject *seconds, const char *name, int64_t *ret)
{
    double value = PyFloat_AsDouble(seconds);
    if (value == -1.0 && PyErr_Occurred())
        return false;
    if (isnan(value)) {
        PyErr_Format(PyExc_ValueError, "%s: not a number", name);
        return false;
    }
    *ret = value < 0 ? 0 : value < 9e9 ? (int64_t)(value * 1e9) : -1;
    return true;
}

/* Until the deadline, -1: none. The GIL is held while `spin_until` has not passed. */
static int
wait_until(struct afk_channel *channel, bool for_writing, int also, int64_t deadline,
           int64_t spin_until)
{
    int64_t now = 0;
    int r = afk_channel_wait(channel, for_writing, also, 0);
    if (deadline == 0)
        return r;
    while (r == 0 && spin_until > 0 && (now = afk_os_now_ns()) < spin_until &&
           (deadline < 0 || now < deadline))
        r = PyErr_CheckSignals() < 0 ? -ECANCELED : afk_channel_wait(channel, for_writing, also, 0);
    while (r == 0 || r == -EINTR) {
        if (r == -EINTR && PyErr_CheckSignals() < 0)
            return -ECANCELED;
        now = deadline < 0 ? 0 : afk_os_now_ns();
        if (deadline >= 0 && now >= deadline)
            return 0;
        Py_BEGIN_ALLOW_THREADS
        r = afk_channel_wait(channel, for_writing, also, deadline < 0 ? -1 : deadline - now);
        Py_END_ALLOW_THREADS
    }
    return r;
}

/* False with an exception. *ret: -1, none; 0: a look. */
static bool
deadline_of(PyObject *timeout, int64_t *ret)
{
    *ret = -1;
    if (timeout == NULL || timeout == Py_None)
        return true;
    if (!to_ns(timeout, "timeout", ret))
        return false;
    if (*ret > 0)
        *ret += afk_os_now_ns();
    return true;
}

static PyObject *
channel_wait(PyObject *op, PyObject *const *args, Py_ssize_t n_args, PyObject *kwnames)
{
    static const char *const names[] = {"timeout", "spin", "also", NULL};
    PyObject *given[3] = {NULL, NULL, NULL};
    int64_t deadline, spin = 0;
    if (!take_arguments("wait", names, 0, given, args, n_args, kwnames) ||
        !deadline_of(given[0], &deadline) || (given[1] != NULL && !to_ns(given[1], "spin", &spin)))
        return NULL;
    int also = given[2] != NULL ? PyLong_AsInt(given[2]) : -1;
    if (also == -1 && PyErr_Occurred())
        return NULL;
    int64_t until = spin == 0 ? 0 : spin < 0 ? INT64_MAX : spin + afk_os_now_ns();
    int r = wait_until(channel_of(op), false, also, deadline, until);
    if (r == -ECANCELED)
        return NULL;
    return r < 0 ? raise_code(r) : PyLong_FromLong(r);
}

static PyObject *
channel_wait_writable(PyObject *op, PyObject *const *args, Py_ssize_t n_args, PyObject *kwnames)
{
    static const char *const names[] = {"timeout", NULL};
    PyObject *given[1] = {NULL};
    int64_t deadline;
    if (!take_arguments("wait_writable", names, 0, given, args, n_args, kwnames) ||
        !deadline_of(given[0], &deadline))
        return NULL;
    int r = wait_until(channel_of(op), true, -1, deadline, 0);
    if (r == -ECANCELED)
        return NULL;
    return r < 0 ? raise_code(r) : PyBool_FromLong(r);
}

/* ---- the rest */

static PyObject *
channel_fileno(PyObject *op, PyObject *Py_UNUSED(args))
{
    int fd = afk_channel_fd(channel_of(op));
    return fd < 0 ? raise_code(-ESHUTDOWN) : PyLong_FromLong(fd);
}

static PyObject *
channel_close(PyObject *op, PyObject *Py_UNUSED(args))
{
    afk_channel_close(channel_of(op));
    Py_RETURN_NONE;
}

static PyObject *
channel_shutdown(PyObject *op, PyObject *Py_UNUSED(args))
{
    (void)afk_channel_shutdown(channel_of(op)); /* a closed one is shut down */
    Py_RETURN_NONE;
}

static PyObject *
channel_trim(PyObject *op, PyObject *Py_UNUSED(args))
{
    afk_channel_trim(channel_of(op));
    Py_RETURN_NONE;
}

static PyObject *
channel_statistics(PyObject *op, PyObject *Py_UNUSED(args))
{
    struct afk_channel_counts c;
    afk_channel_counts(channel_of(op), &c);
    return Py_BuildValue(
        "{s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K}", "sent", (unsigned long long)c.sent, "received",
        (unsigned long long)c.received, "bytes_sent", (unsigned long long)c.bytes_sent,
        "bytes_received", (unsigned long long)c.bytes_received, "shared_sent",
        (unsigned long long)c.shared_sent, "shared_received", (unsigned long long)c.shared_received,
        "segments", (unsigned long long)c.segments, "segment_bytes",
        (unsigned long long)c.segment_bytes);
}

static PyObject *
get_closed(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(afk_channel_fd(channel_of(op)) < 0);
}

#define FAST (METH_FASTCALL | METH_KEYWORDS)
static PyMethodDef channel_methods[] = {
    {"send", (PyCFunction)(void (*)(void))channel_send, FAST,
     "send($self, kind, id, parts, /, fds=())\n--\n\n"
     "One message; False if there is no room for it now."},
    {"receive", channel_receive, METH_NOARGS,
     "receive($self, /)\n--\n\n(kind, id, parts, fds), or None if nothing is there now."},
    {"wait", (PyCFunction)(void (*)(void))channel_wait, FAST,
     "wait($self, /, timeout=None, spin=0.0, also=-1)\n--\n\n"
     "1: readable; 2: `also` is; 0: neither."},
    {"wait_writable", (PyCFunction)(void (*)(void))channel_wait_writable, FAST,
     "wait_writable($self, /, timeout=None)\n--\n\nWhether there is room for a message."},
    {"fileno", channel_fileno, METH_NOARGS, NULL},
    {"close", channel_close, METH_NOARGS, NULL},
    {"shutdown", channel_shutdown, METH_NOARGS, NULL},
    {"trim", channel_trim, METH_NOARGS, NULL},
    {"statistics", channel_statistics, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef channel_getset[] = {
    {"closed", get_closed, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot channel_slots[] = {
    {Py_tp_new, channel_new},
    {Py_tp_dealloc, channel_dealloc},
    {Py_tp_methods, channel_methods},
    {Py_tp_getset, channel_getset},
    {Py_tp_doc, "One end of a socket over which two processes send each other messages."},
    {0, NULL},
};
PyType_Spec ext_channel_spec = {
    .name = "anyfork._anyfork.Channel",
    .basicsize = sizeof(struct channel_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = channel_slots,
};
