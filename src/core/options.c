/*
 * What one start asks for, judged and opened in the parent, where errors are cheap.
 *
 * Rule: an error names the member and changes nothing; what the child will do is data
 * in struct afk_setup, and child_options.c only carries it out.
 */
#include "core.h"
#include "anyfork/anyfork.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define CPUS_MAX 65536
#define ID_MAX 0xfffffffell /* (uid_t)-1 means "keep" to the kernel */
#define FIRST_FREE 3        /* above standard error */
#define OUR_FDS 8           /* the worker's own, above every target */
#define DEFAULT_PATH "/bin:/usr/bin"

void
anyfork_options_init(struct anyfork_options *options)
{
    memset(options, 0, sizeof *options);
    options->size = sizeof *options;
    options->umask = ANYFORK_KEEP;
    options->user = options->group = ANYFORK_KEEP;
    options->n_groups = ANYFORK_KEEP;
    options->oom_score_adj = ANYFORK_OOM_KEEP;
    options->lifeline_signal = SIGKILL;
}

#define INVALID(reterr, detail) \
    AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0, detail)

static int
no_memory(struct anyfork_error *reterr)
{
    return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "options");
}

static int
refused(struct anyfork_error *reterr, int errnum, const char *format, const char *value)
{
    char detail[sizeof reterr->detail];
    (void)snprintf(detail, sizeof detail, format, value);
    return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_OPTION, errnum, detail);
}

/* ---- numbers ---------------------------------------------------------------- */

static bool
is_id(int64_t id)
{
    return id == ANYFORK_KEEP || (id >= 0 && id <= ID_MAX);
}

static const char *
wrong_number(const struct anyfork_options *o)
{
    if (o->size != sizeof *o)
        return "size: not set by anyfork_options_init() of this version";
    if (o->umask < ANYFORK_KEEP || o->umask > 0777)
        return "umask: not 0 to 0777";
    if (!is_id(o->user))
        return "user: not a user id";
    if (!is_id(o->group))
        return "group: not a group id";
    if (o->n_groups < ANYFORK_KEEP || o->n_groups > NGROUPS_MAX)
        return "n_groups: not 0 to NGROUPS_MAX";
    if (o->n_groups > 0 && o->groups == NULL)
        return "groups: NULL";
    if (o->nice < -40 || o->nice > 40)
        return "nice: not -40 to 40";
    if (o->oom_score_adj != ANYFORK_OOM_KEEP && (o->oom_score_adj < -1000 || o->oom_score_adj > 1000))
        return "oom_score_adj: not -1000 to 1000";
    if (o->session < 0 || o->session >= ANYFORK_SESSION_COUNT)
        return "session: unknown";
    if (o->process_group < 0)
        return "process_group: negative";
    if (o->process_group > 0 && o->session != ANYFORK_SESSION_GROUP)
        return "process_group: without ANYFORK_SESSION_GROUP";
    if (o->sigint < 0 || o->sigint >= ANYFORK_SIGINT_COUNT)
        return "sigint: unknown";
    if (o->sigint == ANYFORK_SIGINT_GROUP && o->session == ANYFORK_SESSION_GROUP &&
        o->process_group != 0)
        return "sigint: \"group\" wants a process group of its own, and process_group another";
    if (o->fd_policy < 0 || o->fd_policy >= ANYFORK_FDS_COUNT)
        return "fd_policy: unknown";
    if (o->lifeline_signal < 0 || o->lifeline_signal >= NSIG)
        return "lifeline_signal: not a signal number";
    if (o->lifeline_scope < 0 || o->lifeline_scope >= ANYFORK_SCOPE_COUNT)
        return "lifeline_scope: unknown";
    if (o->lifeline_scope == ANYFORK_SCOPE_GROUP && o->session == ANYFORK_SESSION_KEEP &&
        o->sigint != ANYFORK_SIGINT_GROUP)
        return "lifeline_scope: a group needs a session or process group of its own";
    if (o->lifeline_scope == ANYFORK_SCOPE_CGROUP && o->cgroup == NULL)
        return "lifeline_scope: no cgroup is given";
    if (o->lifeline_signal == 0 && (o->guard || o->lifeline_scope != ANYFORK_SCOPE_WORKER))
        return "lifeline_signal: none, so there is nothing to guard";
    if (o->lifeline_scope == ANYFORK_SCOPE_GROUP && o->process_group != 0)
        return "lifeline_scope: the process group is not the worker's own";
    if (o->name != NULL && o->name[0] == '\0')
        return "name: empty";
    if (o->cwd != NULL && o->cwd[0] == '\0')
        return "cwd: empty";
    return NULL;
}

static const char *
wrong_limit(const struct anyfork_options *o)
{
    if (o->n_rlimits > 0 && o->rlimits == NULL)
        return "rlimits: NULL";
    for (unsigned i = 0; i < o->n_rlimits; i++) {
        if (o->rlimits[i].resource < 0 || o->rlimits[i].resource >= (int)RLIM_NLIMITS)
            return "rlimits: unknown resource";
        if (o->rlimits[i].soft > o->rlimits[i].hard)
            return "rlimits: the soft limit is above the hard one";
    }
    return NULL;
}

static int
prepare_cpus(struct afk_setup *setup, const struct anyfork_options *o, struct anyfork_error *reterr)
{
    uint32_t highest = 0;
    if (o->n_cpus == 0)
        return 0;
    if (o->cpus == NULL)
        return INVALID(reterr, "cpus: NULL");
    for (unsigned i = 0; i < o->n_cpus; i++) {
        if (o->cpus[i] >= CPUS_MAX)
            return INVALID(reterr, "cpus: not the number of a CPU");
        highest = o->cpus[i] > highest ? o->cpus[i] : highest;
    }
    const unsigned bits = 8 * sizeof(unsigned long);
    setup->cpus_size = (highest / bits + 1) * sizeof(unsigned long);
    setup->cpus = AFK_ALLOC("calloc(cpus)", calloc(1, setup->cpus_size));
    if (setup->cpus == NULL)
        return no_memory(reterr);
    for (unsigned i = 0; i < o->n_cpus; i++)
        setup->cpus[o->cpus[i] / bits] |= 1ul << (o->cpus[i] % bits);
    return 0;
}

/* ---- signals ----------------------------------------------------------------- */

static int
prepare_signals(struct afk_setup *setup, const struct anyfork_options *o,
                struct anyfork_error *reterr)
{
    (void)sigemptyset(&setup->mask);
    (void)sigemptyset(&setup->ignored);
    (void)sigemptyset(&setup->defaults);
    if (o->signal_mask != NULL)
        setup->mask = *o->signal_mask;
    if (o->ignored_signals != NULL)
        setup->ignored = *o->ignored_signals;
    if (o->default_signals != NULL)
        setup->defaults = *o->default_signals;
    for (int sig = 1; sig < NSIG; sig++)
        if (sigismember(&setup->ignored, sig) == 1 && sigismember(&setup->defaults, sig) == 1)
            return INVALID(reterr, "ignored_signals: one is in default_signals too");
    if (sigismember(&setup->ignored, SIGKILL) == 1 || sigismember(&setup->ignored, SIGSTOP) == 1)
        return INVALID(reterr, "ignored_signals: SIGKILL and SIGSTOP cannot be ignored");
    setup->sigint = o->sigint;
    if (o->lifeline_signal != 0 && o->lifeline_signal != SIGKILL) {
        if (sigismember(&setup->ignored, o->lifeline_signal) == 1 ||
            sigismember(&setup->mask, o->lifeline_signal) == 1 ||
            (o->lifeline_signal == SIGINT && o->sigint == ANYFORK_SIGINT_OWNER))
            return INVALID(reterr, "lifeline_signal: the worker would ignore or block it");
        (void)sigaddset(&setup->defaults, o->lifeline_signal);
    }
    if (sigismember(&setup->ignored, SIGINT) != 1 && sigismember(&setup->defaults, SIGINT) != 1)
        (void)sigaddset(o->sigint == ANYFORK_SIGINT_OWNER ? &setup->ignored : &setup->defaults,
                        SIGINT);
    return 0;
}

/* ---- descriptors --------------------------------------------------------------- */

static int
by_target(const void *a, const void *b)
{
    const struct afk_fd_move *x = a, *y = b;
    return (x->to > y->to) - (x->to < y->to);
}

static int
stdio_error(struct anyfork_error *reterr, int which, int code, int errnum, const char *what)
{
    static const char *const names[] = {"stdin", "stdout", "stderr"};
    char detail[sizeof reterr->detail];
    (void)snprintf(detail, sizeof detail, "%s: %s", names[which], what);
    return AFK_FAIL(reterr, code,
                    code == ANYFORK_EINVAL ? ANYFORK_STAGE_ARGUMENT : ANYFORK_STAGE_OPTION, errnum,
                    detail);
}

/* The worker's end, or a negative errno. No forked child keeps either end: whoever reads
 * the other would wait for that child too. */
static int
open_pipe(struct afk_setup *setup, int which)
{
    int ends[2];
    bool begun = afk_lifeline_begin();
    int r = afk_os_pipe(ends, O_CLOEXEC);
    if (r == 0) {
        setup->opened[which] = ends[which == 0 ? 0 : 1];
        setup->owner_end[which] = ends[which == 0 ? 1 : 0];
        for (int i = 0; i < 2 && r == 0; i++)
            r = afk_lifeline_register(ends[i], false);
    }
    afk_lifeline_end(begun);
    return r < 0 ? r : setup->opened[which];
}

/* What the worker's standard stream `which` is: *ret_fd, or -1 for the owner's. */
static int
open_stdio(struct afk_setup *setup, const struct anyfork_stdio *stdio, int which, int *ret_fd,
           struct anyfork_error *reterr)
{
    int fd;
    *ret_fd = -1;
    switch (stdio->kind) {
    case ANYFORK_STDIO_INHERIT:
        return 0;
    case ANYFORK_STDIO_NULL:
        fd = afk_os_open(AT_FDCWD, "/dev/null", which == 0 ? O_RDONLY : O_WRONLY, 0);
        break;
    case ANYFORK_STDIO_PIPE:
        fd = open_pipe(setup, which);
        break;
    case ANYFORK_STDIO_FD:
        if (!afk_os_fd_is_open(stdio->fd))
            return stdio_error(reterr, which, ANYFORK_EINVAL, 0, "not an open file descriptor");
        *ret_fd = stdio->fd;
        return 0;
    case ANYFORK_STDIO_FILE:
        if (stdio->path == NULL)
            return stdio_error(reterr, which, ANYFORK_EINVAL, 0, "path is NULL");
        fd = afk_os_open(AT_FDCWD, stdio->path, stdio->flags, stdio->mode);
        break;
    case ANYFORK_STDIO_STDOUT:
        if (which != 2)
            return stdio_error(reterr, which, ANYFORK_EINVAL, 0, "only standard error can follow standard output");
        return 0;
    default:
        return stdio_error(reterr, which, ANYFORK_EINVAL, 0, "unknown kind");
    }
    if (fd < 0)
        return stdio_error(reterr, which, ANYFORK_ESYSTEM, -fd, "cannot be opened");
    *ret_fd = setup->opened[which] = fd;
    return 0;
}

static int
prepare_fds(struct afk_setup *setup, const struct anyfork_options *o, enum afk_setup_for purpose,
            struct anyfork_error *reterr)
{
    if (o->n_fds > 0 && o->fds == NULL)
        return INVALID(reterr, "fds: NULL");
    setup->move = AFK_ALLOC("calloc(fds)", calloc((size_t)o->n_fds + 4, sizeof *setup->move));
    if (setup->move == NULL)
        return no_memory(reterr);
    for (int which = 0; which < 3; which++) {
        int from;
        int r = open_stdio(setup, &o->stdio[which], which, &from, reterr);
        if (r < 0)
            return r;
        if (o->stdio[which].kind == ANYFORK_STDIO_STDOUT)
            from = setup->n_moves > 0 && setup->move[setup->n_moves - 1].to == 1
                       ? setup->move[setup->n_moves - 1].from
                       : 1;
        if (from >= 0)
            setup->move[setup->n_moves++] = (struct afk_fd_move){.from = from, .to = which};
    }
    struct rlimit limit = {.rlim_cur = RLIM_INFINITY};
    (void)getrlimit(RLIMIT_NOFILE, &limit);
    for (unsigned i = 0; i < o->n_fds; i++) {
        if (!afk_os_fd_is_open(o->fds[i].fd))
            return INVALID(reterr, "fds: not an open file descriptor");
        if (o->fds[i].target < FIRST_FREE)
            return INVALID(reterr, "fds: a target is below 3; see stdin, stdout and stderr");
        if ((rlim_t)o->fds[i].target + OUR_FDS >= limit.rlim_cur)
            return INVALID(reterr, "fds: a target is not below RLIMIT_NOFILE, less 8 for our own");
        setup->move[setup->n_moves++] =
            (struct afk_fd_move){.from = o->fds[i].fd, .to = o->fds[i].target};
    }
    if (setup->report_to >= 0) /* its source is known when the socket is made */
        setup->move[setup->n_moves++] = (struct afk_fd_move){.from = -1, .to = setup->report_to};
    qsort(setup->move, setup->n_moves, sizeof *setup->move, by_target);
    for (unsigned i = 0; i < setup->n_moves; i++) {
        if (i > 0 && setup->move[i].to == setup->move[i - 1].to)
            return INVALID(reterr, "fds: a target is given twice");
        struct afk_fd_move wanted = {.to = setup->move[i].from};
        struct afk_fd_move *taken =
            bsearch(&wanted, setup->move, setup->n_moves, sizeof *setup->move, by_target);
        setup->move[i].park = taken != NULL && taken != &setup->move[i];
    }
    setup->lowest = FIRST_FREE;
    if (setup->n_moves > 0 && setup->move[setup->n_moves - 1].to >= setup->lowest)
        setup->lowest = setup->move[setup->n_moves - 1].to + 1;
    setup->fd_policy = o->fd_policy;
    if (o->fd_policy == ANYFORK_FDS_DEFAULT)
        setup->fd_policy = purpose == AFK_SETUP_EXEC ? ANYFORK_FDS_CLOSE : ANYFORK_FDS_TOMBSTONE;
    if (setup->fd_policy == ANYFORK_FDS_INHERIT && purpose == AFK_SETUP_TEMPLATE)
        return INVALID(reterr, "fd_policy: a template's worker inherits none: list them in fds");
    if (setup->fd_policy == ANYFORK_FDS_TOMBSTONE && purpose == AFK_SETUP_EXEC)
        return INVALID(reterr, "fd_policy: tombstones are for workers that fork");
    return 0;
}

static int
prepare_cgroup(struct afk_setup *setup, const struct anyfork_options *o,
               struct anyfork_error *reterr)
{
    if (o->cgroup == NULL)
        return 0;
    setup->cgroup_dir = afk_os_open(AT_FDCWD, o->cgroup, O_RDONLY | O_DIRECTORY, 0);
    if (setup->cgroup_dir < 0)
        return refused(reterr, -setup->cgroup_dir, "cgroup: %s", o->cgroup);
    if (!afk_os_is_cgroup2(setup->cgroup_dir))
        return INVALID(reterr, "cgroup: not a folder of a cgroup v2");
    setup->cgroup_procs = afk_os_open(setup->cgroup_dir, "cgroup.procs", O_WRONLY, 0);
    if (setup->cgroup_procs < 0)
        return refused(reterr, -setup->cgroup_procs, "cgroup: %s/cgroup.procs", o->cgroup);
    if (o->lifeline_scope == ANYFORK_SCOPE_CGROUP) {
        setup->cgroup_kill = afk_os_open(setup->cgroup_dir, "cgroup.kill", O_WRONLY, 0);
        if (setup->cgroup_kill < 0)
            return refused(reterr, -setup->cgroup_kill, "cgroup: %s/cgroup.kill", o->cgroup);
    }
    /* The worker will have lower numbers itself. */
    int r = afk_os_raise(&setup->cgroup_procs, setup->lowest);
    return r < 0 ? refused(reterr, -r, "cgroup: %s", o->cgroup) : 0;
}

/* ---- the program ----------------------------------------------------------------- */

static const char *
search_path(const struct anyfork_options *o)
{
    if (o->env == NULL) {
        const char *path = getenv("PATH");
        return path != NULL ? path : DEFAULT_PATH;
    }
    for (unsigned i = 0; o->env[i] != NULL; i++)
        if (strncmp(o->env[i], "PATH=", 5) == 0)
            return o->env[i] + 5;
    return DEFAULT_PATH;
}

static char *
joined(const char *dir, size_t size, const char *name)
{
    size_t length = strlen(name);
    char *path = AFK_ALLOC("malloc(path)", malloc(size + length + 2));
    if (path == NULL)
        return NULL;
    memcpy(path, dir, size);
    if (size > 0)
        path[size++] = '/';
    memcpy(path + size, name, length + 1);
    return path;
}

static int
prepare_program(struct afk_setup *setup, const struct anyfork_options *o,
                struct anyfork_error *reterr)
{
    if (o->argv == NULL || o->argv[0] == NULL)
        return INVALID(reterr, "argv: empty");
    const char *program = o->program != NULL ? o->program : o->argv[0];
    if (program[0] == '\0')
        return INVALID(reterr, "argv: the program's name is empty");
    const char *dirs = strchr(program, '/') != NULL ? "" : search_path(o);
    size_t n = 1;
    for (const char *p = dirs; *p != '\0'; p++)
        n += *p == ':';
    setup->candidates = AFK_ALLOC("calloc(candidates)", calloc(n + 1, sizeof(char *)));
    if (setup->candidates == NULL)
        return no_memory(reterr);
    for (size_t i = 0; i < n; i++) {
        size_t size = strcspn(dirs, ":");
        setup->candidates[i] = joined(dirs, size, program);
        if (setup->candidates[i] == NULL)
            return no_memory(reterr);
        dirs += size + (dirs[size] == ':');
    }
    setup->argv = o->argv;
    setup->program = program;
    if (o->env == NULL) {
        /* Another thread may change it while this one waits for the kernel. */
        extern char **environ;
        size_t size = 0;
        while (environ != NULL && environ[size] != NULL)
            size++;
        setup->environ_copy = AFK_ALLOC("calloc(environ)", calloc(size + 1, sizeof(char *)));
        if (setup->environ_copy == NULL)
            return no_memory(reterr);
        if (size > 0)
            memcpy(setup->environ_copy, environ, size * sizeof(char *));
        setup->env = (const char *const *)setup->environ_copy;
    }
    if (o->name == NULL)
        return 0;
    size_t argc = 0;
    while (o->argv[argc] != NULL)
        argc++;
    setup->argv_named = AFK_ALLOC("calloc(argv)", calloc(argc + 1, sizeof(char *)));
    if (setup->argv_named == NULL)
        return no_memory(reterr);
    memcpy(setup->argv_named, o->argv, argc * sizeof(char *));
    setup->argv_named[0] = (char *)(uintptr_t)o->name;
    setup->argv = (const char *const *)setup->argv_named;
    setup->name = NULL;
    return 0;
}

/* ---- all of it --------------------------------------------------------------------- */

static void
take_plain_members(struct afk_setup *setup, const struct anyfork_options *o,
                   enum afk_setup_for purpose)
{
    setup->session = o->session;
    setup->process_group = o->process_group;
    if (o->sigint == ANYFORK_SIGINT_GROUP && o->session == ANYFORK_SESSION_KEEP)
        setup->session = ANYFORK_SESSION_GROUP;
    setup->lifeline_signal = o->lifeline_signal;
    setup->lifeline_group = o->lifeline_scope == ANYFORK_SCOPE_GROUP;
    setup->guarded = o->guard || o->lifeline_scope == ANYFORK_SCOPE_CGROUP ||
                     (o->lifeline_signal != 0 &&
                      ((o->user >= 0 && !afk_os_is_true_root()) ||
                       (purpose != AFK_SETUP_TEMPLATE && afk_os_child_would_be_init())));
    setup->umask = o->umask;
    setup->oom_score_adj = o->oom_score_adj;
    setup->nice = o->nice;
    setup->rlimits = o->rlimits;
    setup->n_rlimits = o->n_rlimits;
    setup->cwd = o->cwd;
    setup->groups = o->groups;
    setup->n_groups = o->n_groups;
    setup->user = o->user;
    setup->group = o->group;
    setup->name = o->name;
    setup->env = o->env;
}

/* NULL stays NULL; *ok is false once memory has run out. */
static const void *
copy_of(struct afk_setup *setup, const void *data, size_t size, bool *ok)
{
    if (data == NULL || !*ok)
        return data;
    void *copy = AFK_ALLOC("malloc(copy)", malloc(size + (size == 0)));
    *ok = copy != NULL;
    if (copy == NULL)
        return NULL;
    memcpy(copy, data, size);
    setup->copies[setup->n_copies++] = copy;
    return copy;
}

static const char *
copy_of_text(struct afk_setup *setup, const char *text, bool *ok)
{
    return text == NULL ? NULL : copy_of(setup, text, strlen(text) + 1, ok);
}

/* One block: the pointers, then the strings. */
static const char *const *
copy_of_texts(struct afk_setup *setup, const char *const *texts, bool *ok)
{
    size_t n = 0, bytes = 0;
    if (texts == NULL || !*ok)
        return texts;
    for (; texts[n] != NULL; n++)
        bytes += strlen(texts[n]) + 1;
    char **copy = AFK_ALLOC("malloc(copy)", malloc((n + 1) * sizeof *copy + bytes));
    *ok = copy != NULL;
    if (copy == NULL)
        return NULL;
    char *to = (char *)(copy + n + 1);
    for (size_t i = 0; i < n; i++) {
        size_t size = strlen(texts[i]) + 1;
        copy[i] = memcpy(to, texts[i], size);
        to += size;
    }
    copy[n] = NULL;
    setup->copies[setup->n_copies++] = copy;
    return (const char *const *)copy;
}

static int
copy_what_is_borrowed(struct afk_setup *setup, struct anyfork_error *reterr)
{
    bool ok = true;
    size_t n_groups = setup->n_groups > 0 ? (size_t)setup->n_groups : 0;
    setup->rlimits =
        copy_of(setup, setup->rlimits, setup->n_rlimits * sizeof *setup->rlimits, &ok);
    setup->groups = copy_of(setup, setup->groups, n_groups * sizeof *setup->groups, &ok);
    setup->cwd = copy_of_text(setup, setup->cwd, &ok);
    setup->name = copy_of_text(setup, setup->name, &ok);
    setup->env = copy_of_texts(setup, setup->env, &ok);
    return ok ? 0 : no_memory(reterr);
}

int
afk_setup_prepare(struct afk_setup *setup, const struct anyfork_options *options,
                  enum afk_setup_for purpose, int report_to, struct anyfork_error *reterr)
{
    struct anyfork_options defaults;
    if (options == NULL) {
        anyfork_options_init(&defaults);
        options = &defaults;
    }
    memset(setup, 0, sizeof *setup);
    for (int i = 0; i < 3; i++)
        setup->opened[i] = setup->owner_end[i] = -1;
    setup->cgroup_dir = setup->cgroup_procs = setup->cgroup_kill = -1;
    setup->report_to = report_to;
    const char *wrong = wrong_number(options);
    if (wrong == NULL)
        wrong = wrong_limit(options);
    if (wrong != NULL)
        return INVALID(reterr, wrong);
    take_plain_members(setup, options, purpose);
    int r = prepare_signals(setup, options, reterr);
    if (r == 0)
        r = prepare_cpus(setup, options, reterr);
    if (r == 0)
        r = purpose == AFK_SETUP_EXEC ? prepare_program(setup, options, reterr)
                                      : copy_what_is_borrowed(setup, reterr);
    if (r == 0)
        r = prepare_fds(setup, options, purpose, reterr);
    if (r == 0)
        r = prepare_cgroup(setup, options, reterr);
    if (r < 0)
        afk_setup_release(setup);
    return r;
}

struct afk_child_wants
afk_setup_wants(const struct afk_setup *setup)
{
    return (struct afk_child_wants){.lowest = setup->lowest,
                                    .lifeline = setup->lifeline_signal != 0,
                                    .guard = setup->guarded};
}

void
afk_setup_release(struct afk_setup *setup)
{
    for (int i = 0; i < 3; i++) {
        afk_lifeline_close(&setup->opened[i]);
        afk_lifeline_close(&setup->owner_end[i]);
    }
    afk_os_close(setup->cgroup_dir);
    afk_os_close(setup->cgroup_procs);
    afk_os_close(setup->cgroup_kill);
    setup->cgroup_dir = setup->cgroup_procs = setup->cgroup_kill = -1;
    for (unsigned i = 0; setup->candidates != NULL && setup->candidates[i] != NULL; i++)
        free(setup->candidates[i]);
    while (setup->n_copies > 0)
        free(setup->copies[--setup->n_copies]);
    free(setup->candidates);
    free(setup->argv_named);
    free(setup->environ_copy);
    free(setup->cpus);
    free(setup->move);
    setup->candidates = NULL;
    setup->argv_named = setup->environ_copy = NULL;
    setup->cpus = NULL;
    setup->move = NULL;
    setup->n_moves = 0;
}
