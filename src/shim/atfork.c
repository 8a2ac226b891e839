/*
 * Notes who registers fork handlers, for `anyfork doctor --template`: a library that is
 * preloaded into the one process in which modules are tried, and into no template.
 *
 * Rule: every registration goes on to the C library as it came. Nothing here allocates, and
 * nothing fails: what does not fit into the table is counted only.
 */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define KEPT 256
#define EXPORTED __attribute__((visibility("default")))

static const void *handler[KEPT]; /* one function of each registration */
static atomic_uint registered;

/* How many there were; `ret` gets the first `max` of them. */
EXPORTED unsigned anyfork_fork_handlers(const void **ret, unsigned max);
unsigned
anyfork_fork_handlers(const void **ret, unsigned max)
{
    unsigned n = atomic_load(&registered);
    for (unsigned i = 0; i < n && i < max && i < KEPT; i++)
        ret[i] = handler[i];
    return n;
}

static void
note(const void *prepare, const void *parent, const void *child)
{
    unsigned i = atomic_fetch_add(&registered, 1);
    if (i < KEPT)
        handler[i] = prepare != NULL ? prepare : parent != NULL ? parent : child;
}

typedef void handler_function(void);

#ifdef __GLIBC__
/* What pthread_atfork(3), which is linked into each library, calls. */
EXPORTED int __register_atfork(handler_function *prepare, handler_function *parent,
                               handler_function *child, void *library);
int
__register_atfork(handler_function *prepare, handler_function *parent, handler_function *child,
                  void *library)
{
    int (*next)(handler_function *, handler_function *, handler_function *, void *);
    *(void **)&next = dlsym(RTLD_NEXT, "__register_atfork");
    note(*(void **)&prepare, *(void **)&parent, *(void **)&child);
    return next(prepare, parent, child, library);
}
#else
EXPORTED int pthread_atfork(handler_function *prepare, handler_function *parent,
                            handler_function *child);
int
pthread_atfork(handler_function *prepare, handler_function *parent, handler_function *child)
{
    int (*next)(handler_function *, handler_function *, handler_function *);
    *(void **)&next = dlsym(RTLD_NEXT, "pthread_atfork");
    note(*(void **)&prepare, *(void **)&parent, *(void **)&child);
    return next(prepare, parent, child);
}
#endif

/* Programs that a module runs are not for us: we are the first of the list. */
__attribute__((constructor)) static void
leave_environment(void)
{
    const char *list = getenv("LD_PRELOAD");
    size_t first = list != NULL ? strcspn(list, ":") : 0;
    if (first == 0)
        return;
    if (list[first] == ':')
        (void)setenv("LD_PRELOAD", list + first + 1, 1);
    else
        (void)unsetenv("LD_PRELOAD");
}
