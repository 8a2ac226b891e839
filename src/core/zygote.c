/*
 * A template, from both of its ends: the owner, which starts workers with what a template
 * has made ready, and the server, which makes it ready. See zygote.h.
 *
 * Rules: nothing has a name in any namespace. A standby belongs to its owner from the
 * moment that it is offered: its lifeline lies in the owner's queue, and ends with it. The
 * owner's start is one message that it takes and one that it sends; it waits for nobody.
 * The server never waits for an owner or a worker either.
 */
#include "zygote.h"
#include "anyfork/anyfork.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* The number of a standard stream that is closed is not for us: a host may open it. */
#define ABOVE_STREAMS 3
#define ENVIRONMENT_ROOM 8192
#define BODY_ALWAYS_FITS 1024        /* SOCK_MIN_SNDBUF of the kernel is four times that */
#define OFFERS_TRIED 64              /* dead ones, in one start */
#define CLIENTS_MAX 64     /* processes that share a template; more make one of their own */
#define WANTED_MAX 256u    /* standbys that are made at once: more are asked for again */
#define NESTED_HIGH 1u     /* standbys of each of them */
#define LAST_OFFERS_NS ((int64_t)1000000000)
#define REFILL_DELAY_NS ((int64_t)1000000) /* behind the user's first line */
#define REFILL_AFTER_DEATH_NS ((int64_t)100000000)
#define TIMEOUT_MS_MAX 60000

extern char **environ;

/* ---- messages ------------------------------------------------------------------- */

static void
close_all(const int *fds, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        afk_os_close(fds[i]);
}

static struct afk_zygote_message
message_of(enum afk_zygote_op op)
{
    return (struct afk_zygote_message){
        .magic = AFK_ZYGOTE_MAGIC, .version = AFK_ZYGOTE_VERSION, .op = (uint16_t)op};
}

static int
send_message(int socket, const struct afk_zygote_message *message, const int *fds, unsigned n_fds)
{
    const struct iovec vec = {(void *)(uintptr_t)message, sizeof *message};
    return afk_os_send_with_fds(socket, &vec, 1, fds, n_fds, MSG_DONTWAIT);
}

/* ---- the owner: a template ---------------------------------------------------------- */

struct afk_template {
    unsigned generation;
    int control;
    atomic_bool ready; /* has said HELLO */
    bool siblings;     /* its standbys are our children */
    bool attached;     /* it is not ours: it has made us, and other workers */
    uint32_t ids[4];   /* that it has to have */
    uint64_t capabilities[3]; /* and may have: an execution could give it more */
    struct afk_proc_files files;
    struct afk_identity identity;
    struct afk_surroundings around; /* its own, once it is ready */
    atomic_ullong starts, misses;
    atomic_uint n_took;
    atomic_llong took[AFK_CALLS_KEPT]; /* a ring */
};

static void
take_ids(uint32_t ids[4])
{
    ids[0] = getuid();
    ids[1] = geteuid();
    ids[2] = getgid();
    ids[3] = getegid();
}

int
afk_template_new(struct afk_template **ret_template, bool siblings, int *ret_server_end,
                 struct anyfork_error *reterr)
{
    int pair[2] = {-1, -1};
    struct afk_template *t = AFK_ALLOC("calloc(template)", calloc(1, sizeof *t));
    if (t == NULL)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "template");
    t->generation = afk_generation();
    t->control = -1;
    t->siblings = siblings;
    t->files = (struct afk_proc_files){-1, -1, -1, -1};
    if (afk_os_children_are_elsewhere()) {
        afk_template_free(t);
        return AFK_FAIL(reterr, ANYFORK_EUNAVAILABLE, ANYFORK_STAGE_TEMPLATE, EPERM,
                        "children of this thread are in another pid namespace: use method 'fork'");
    }
    int r = afk_proc_files_open(&t->files);
    if (r == 0)
        r = afk_identity_read(&t->files, &t->identity, &t->around);
    if (r == 0)
        r = afk_identity_read_rest(&t->files, &t->identity);
    take_ids(t->ids);
    if (r == 0)
        r = afk_os_capabilities(t->capabilities);
    if (r < 0) {
        afk_template_free(t);
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_TEMPLATE, -r,
                        "/proc cannot be read, which says what a template may do");
    }
    bool begun = afk_lifeline_begin();
    r = afk_os_socketpair(pair, SOCK_SEQPACKET);
    for (int i = 0; i < 2 && r >= 0; i++) {
        r = afk_os_raise(&pair[i], ABOVE_STREAMS);
        if (r == 0)
            r = afk_lifeline_register(pair[i], false);
    }
    afk_lifeline_end(begun);
    t->control = pair[0];
    if (r < 0) {
        afk_lifeline_close(&pair[1]);
        afk_template_free(t);
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_PIPE, -r, "template's socket");
    }
    *ret_template = t;
    *ret_server_end = pair[1];
    return 0;
}

static bool
is_foreign(const struct afk_template *t)
{
    return t->generation != afk_generation();
}

struct offered {
    pid_t pid; /* 0: none */
    int fds[AFK_OFFER_FDS];
};

void
afk_template_capabilities(const struct afk_template *t, uint64_t ret[3])
{
    memcpy(ret, t->capabilities, sizeof t->capabilities);
}

int
afk_template_fd(const struct afk_template *t)
{
    return is_foreign(t) ? -1 : t->control;
}

void
afk_template_counts(const struct afk_template *t, struct afk_template_counts *ret)
{
    ret->starts = atomic_load(&t->starts);
    ret->misses = atomic_load(&t->misses);
}

unsigned
afk_template_calls(const struct afk_template *t, int64_t ret[AFK_CALLS_KEPT])
{
    unsigned n = atomic_load(&t->n_took);
    n = n < AFK_CALLS_KEPT ? n : AFK_CALLS_KEPT;
    for (unsigned i = 0; i < n; i++)
        ret[i] = atomic_load(&t->took[i]);
    return n;
}

void
afk_template_took(struct afk_template *t, int64_t ns)
{
    atomic_store(&t->took[atomic_fetch_add(&t->n_took, 1) % AFK_CALLS_KEPT], ns);
}

void
afk_template_missed(struct afk_template *t, unsigned n)
{
    atomic_fetch_add(&t->misses, n);
}

static bool
is_ours(const struct afk_zygote_message *message, ssize_t size)
{
    return size == (ssize_t)sizeof *message && message->magic == AFK_ZYGOTE_MAGIC &&
           message->version == AFK_ZYGOTE_VERSION;
}

int
afk_template_hello(struct afk_template *t)
{
    struct afk_zygote_message message;
    unsigned n_fds;
    int fds[AFK_OFFER_FDS];
    if (is_foreign(t))
        return -ESTALE;
    if (atomic_load(&t->ready))
        return 1;
    ssize_t n = afk_os_receive_with_fds(t->control, &message, sizeof message, fds, AFK_OFFER_FDS,
                                        &n_fds, NULL, MSG_DONTWAIT);
    if (n == -EAGAIN)
        return 0;
    close_all(fds, n_fds);
    if (n <= 0)
        return n < 0 ? (int)n : -EPIPE;
    if (!is_ours(&message, n) || message.op != AFK_ZYGOTE_HELLO)
        return -EPROTO;
    if (memcmp(message.ids, t->ids, sizeof t->ids) != 0)
        return -EPERM;
    /* Of this very thread, and with what nobody else can read of it. */
    if (t->attached && afk_identity_difference(&t->identity, &message.identity) != NULL)
        return -EPERM;
    t->around = message.around;
    atomic_store(&t->ready, true);
    return 1;
}

int
afk_template_want(struct afk_template *t, unsigned n)
{
    struct afk_zygote_message message = message_of(AFK_ZYGOTE_WANT);
    if (is_foreign(t))
        return -ESTALE;
    message.number = n;
    /* Its queue is full only if it does not read: it has stopped. */
    return send_message(t->control, &message, NULL, 0) < 0 ? -ESTALE : 0;
}

void
afk_template_set_attached(struct afk_template *t)
{
    t->attached = true;
}

int
afk_template_attach(int door, int server_end)
{
    const struct afk_zygote_message message = message_of(AFK_ZYGOTE_ATTACH);
    return send_message(door, &message, &server_end, 1);
}

int
afk_template_wait(struct afk_template *t, int64_t timeout_ns)
{
    struct pollfd p = {.fd = t->control, .events = POLLIN};
    int64_t ms = (timeout_ns + 999999) / 1000000;
    int n = poll(&p, 1, ms > INT_MAX ? INT_MAX : (int)ms);
    return n < 0 ? -errno : n == 0 ? -ETIMEDOUT : 0;
}

static bool
is_dead(int pidfd)
{
    struct pollfd p = {.fd = pidfd, .events = POLLIN};
    return poll(&p, 1, 0) != 0;
}

/* A dead one. Nobody else reaps what is our child. */
static void
drop_dead(const struct afk_template *t, int *fds, unsigned n)
{
    if (t->siblings && n == AFK_OFFER_FDS)
        (void)afk_os_pidfd_reap(fds[AFK_OFFER_PIDFD], false, &(int){0});
    for (unsigned i = 0; i < n; i++)
        afk_lifeline_close(&fds[i]);
}

/* Whether a dead standby has said why it could not get ready: a reset that raises, say. */
static bool
has_failed(int report_fd)
{
    struct afk_report first;
    return recv(report_fd, &first, sizeof first, MSG_PEEK | MSG_DONTWAIT) == sizeof first &&
           afk_report_check(&first) == 0 && first.kind == AFK_REPORT_ERROR;
}

/* A standby that lives: its handle. As afk_template_start(). The first that has failed is
 * kept in *failed; `at_once`: and others left to other starts. What those were told who asked,
 * and did not wait for it, is nothing to a start that has not. */
static int
take_offer(struct afk_template *t, bool asked, bool at_once, struct anyfork_child **ret_child,
           struct offered *failed, const char **ret_why, struct anyfork_error *reterr)
{
    for (int tries = 0; tries < OFFERS_TRIED; tries++) {
        struct afk_zygote_message message;
        int fds[AFK_OFFER_FDS];
        unsigned n_fds;
        /* A fork of another thread must not get what is in no table yet. */
        bool begun = afk_lifeline_begin();
        ssize_t n = afk_os_receive_with_fds(t->control, &message, sizeof message, fds, AFK_OFFER_FDS,
                                            &n_fds, NULL, MSG_DONTWAIT);
        int r = 0;
        for (unsigned i = 0; i < n_fds && r == 0; i++) {
            r = afk_os_raise(&fds[i], ABOVE_STREAMS);
            if (r == 0)
                r = afk_lifeline_register(fds[i], i == AFK_OFFER_LIFE_WRITE);
        }
        afk_lifeline_end(begun);
        bool is_offer = n > 0 && is_ours(&message, n) && message.op == AFK_ZYGOTE_OFFER &&
                        n_fds == AFK_OFFER_FDS && message.pid > 0;
        if (is_offer && r == 0 && !is_dead(fds[AFK_OFFER_PIDFD]))
            return afk_child_new_offered(ret_child, message.pid, fds, t->siblings, reterr);
        if (is_offer && r == 0 && failed->pid == 0 && has_failed(fds[AFK_OFFER_REPORT])) {
            failed->pid = message.pid;
            memcpy(failed->fds, fds, sizeof fds);
            if (at_once)
                return -EAGAIN;
            continue;
        }
        drop_dead(t, fds, n_fds);
        if (r < 0)
            return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, -r, "worker handle");
        if (n == -EAGAIN)
            return -EAGAIN;
        if (n == -EMFILE)
            return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_PIPE, EMFILE, "worker handle");
        if (n > 0 && is_ours(&message, n) && message.op == AFK_ZYGOTE_FAILED && asked)
            return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_FORK, (int)message.number,
                            "in the template");
        if (n <= 0 || !is_ours(&message, n)) {
            *ret_why = "it has ended";
            return -ESTALE;
        }
    }
    return -EAGAIN;
}

void
afk_template_shutdown(struct afk_template *t)
{
    if (!is_foreign(t))
        (void)shutdown(t->control, SHUT_WR);
}

/* What it has offered, and nobody has taken, would stay a zombie of ours. */
static void
end_siblings(struct afk_template *t)
{
    struct anyfork_error ignored;
    struct offered failed = {.pid = 0};
    const char *why;
    struct anyfork_child *child;
    /* It makes no more once it has read that, and closes its own end: then all have come. */
    afk_template_shutdown(t);
    for (int64_t until = afk_os_now_ns() + LAST_OFFERS_NS, left; (left = until - afk_os_now_ns()) > 0;) {
        int r = take_offer(t, false, false, &child, &failed, &why, &ignored);
        if (r == 0)
            anyfork_child_close(child);
        else if (r == -ESTALE || (r == -EAGAIN && afk_template_wait(t, left) == -ETIMEDOUT))
            break;
    }
    if (failed.pid > 0)
        drop_dead(t, failed.fds, AFK_OFFER_FDS);
}

void
afk_template_close(struct afk_template *t)
{
    if (is_foreign(t))
        return;
    if (t->siblings && t->control >= 0)
        end_siblings(t);
    afk_lifeline_close(&t->control);
    afk_proc_files_close(&t->files);
}

void
afk_template_free(struct afk_template *t)
{
    afk_template_close(t);
    free(t);
}

/* ---- the owner: a start ---------------------------------------------------------------- */

#define VECS_MAX 12

struct outgoing {
    struct afk_start_message head;
    int fds[AFK_ZYGOTE_FDS_MAX];
    unsigned n_fds;
    struct iovec vec[VECS_MAX];
    unsigned n_vec;
    int32_t *targets;
    int memfd, cwd;
};

static bool
add_fd(struct outgoing *out, int fd)
{
    if (out->n_fds == AFK_ZYGOTE_FDS_MAX)
        return false;
    out->fds[out->n_fds++] = fd;
    return true;
}

static void
add_body(struct outgoing *out, const void *data, size_t size)
{
    if (size == 0)
        return;
    out->vec[out->n_vec++] = (struct iovec){(void *)(uintptr_t)data, size};
    out->head.body_bytes += size;
}

static uint64_t
bits_of(const sigset_t *set)
{
    uint64_t bits = 0;
    for (int sig = 1; sig < NSIG && sig <= 64; sig++)
        if (sigismember(set, sig) == 1)
            bits |= 1ull << (sig - 1);
    return bits;
}

/* What the owner ignores, its worker does, and no more; but for SIGCHLD, see child.c, and
 * SIGINT, for which there is an option. */
static void
put_signals(struct outgoing *out, const struct afk_template *t, const struct afk_setup *setup,
            const struct afk_surroundings *now)
{
    const uint64_t apart = 1ull << (SIGCHLD - 1) | 1ull << (SIGINT - 1);
    uint64_t more = now->ignored & ~t->around.ignored & ~apart;
    uint64_t less = t->around.ignored & ~now->ignored & ~apart;
    out->head.mask = bits_of(&setup->mask);
    out->head.ignored = bits_of(&setup->ignored);
    out->head.defaults = bits_of(&setup->defaults);
    out->head.ignored |= more & ~out->head.defaults;
    out->head.defaults |= less & ~out->head.ignored;
}

/* The owner's that have changed, then those of this start. */
static bool
put_limits(struct outgoing *out, const struct afk_template *t, const struct afk_setup *setup,
           const struct afk_surroundings *now, struct anyfork_rlimit *changed)
{
    unsigned n = 0;
    for (int i = 0; i < AFK_LIMITS_MAX; i++) {
        if (now->limit[i].soft == t->around.limit[i].soft &&
            now->limit[i].hard == t->around.limit[i].hard)
            continue;
        if (now->limit[i].hard > t->around.limit[i].hard)
            return false; /* a worker might not be allowed to raise it */
        changed[n++] = (struct anyfork_rlimit){i, now->limit[i].soft, now->limit[i].hard};
    }
    add_body(out, changed, n * sizeof *changed);
    add_body(out, setup->rlimits, setup->n_rlimits * sizeof *setup->rlimits);
    out->head.n_rlimits = n + setup->n_rlimits;
    return true;
}

static void
put_cpus(struct outgoing *out, const struct afk_template *t, const struct afk_setup *setup,
         const struct afk_surroundings *now)
{
    const void *cpus = setup->cpus;
    size_t size = setup->cpus != NULL ? setup->cpus_size : 0;
    if (cpus == NULL && memcmp(now->cpus, t->around.cpus, sizeof now->cpus) != 0) {
        cpus = now->cpus;
        size = sizeof now->cpus;
    }
    add_body(out, cpus, size);
    out->head.cpus_bytes = (uint32_t)size;
}

static bool
is_same_folder(const struct afk_surroundings *a, const struct afk_surroundings *b)
{
    return a->cwd_device == b->cwd_device && a->cwd_inode == b->cwd_inode && a->cwd_inode != 0;
}

/* n strings end to end. Another thread may set variables meanwhile: each is measured once. */
static void
put_environment(struct outgoing *out, const char *const *env, char **ret_block)
{
    size_t n = 0, room = ENVIRONMENT_ROOM, size = 0;
    char *block = AFK_ALLOC("malloc(environment)", malloc(room));
    for (; block != NULL && env != NULL && env[n] != NULL; n++) {
        size_t length = strlen(env[n]);
        if (size + length + 1 > room) {
            room = 2 * (size + length + 1);
            char *larger = realloc(block, room);
            if (larger == NULL)
                free(block);
            block = larger;
            if (block == NULL)
                break;
        }
        memcpy(block + size, env[n], length);
        block[size + length] = '\0';
        size += length + 1;
    }
    *ret_block = block;
    if (block == NULL)
        return;
    out->head.has_env = 1;
    out->head.n_env = (uint32_t)n;
    out->head.env_bytes = size;
    add_body(out, block, size);
}

/* Or of ours at all. It may have the number of a standard stream that is closed. */
static bool
is_of_this_start(const struct outgoing *out, const struct afk_setup *setup, int fd)
{
    const int opened[] = {out->memfd, out->cwd, setup->cgroup_dir, setup->cgroup_procs,
                          setup->cgroup_kill};
    for (unsigned i = 0; i < sizeof opened / sizeof *opened && fd <= 2; i++)
        if (opened[i] == fd)
            return true;
    for (int i = 0; i < 3 && fd <= 2; i++)
        if (setup->opened[i] == fd)
            return true;
    return fd <= 2 && afk_lifeline_holds(fd);
}

/* false: too many descriptors. */
static bool
put_fds(struct outgoing *out, const struct afk_setup *setup, int guard_fd)
{
    unsigned at = 0;
    bool ok = true;
    for (int which = 0; which < 3; which++) {
        if (at < setup->n_moves && setup->move[at].to == which) {
            out->head.has_stream[which] = 1;
            ok = ok && add_fd(out, setup->move[at++].from);
            continue;
        }
        int from = which;
        out->head.has_stream[which] = afk_os_fd_is_open(from) && !is_of_this_start(out, setup, from);
        if (out->head.has_stream[which])
            ok = ok && add_fd(out, from);
    }
    for (; at < setup->n_moves; at++)
        ok = ok && add_fd(out, setup->move[at].from);
    if (out->memfd >= 0) {
        out->head.has_memfd = 1;
        ok = ok && add_fd(out, out->memfd);
    }
    if (out->cwd >= 0) {
        out->head.has_cwd = 1;
        ok = ok && add_fd(out, out->cwd);
    }
    if (setup->cgroup_procs >= 0) {
        out->head.has_cgroup = 1;
        ok = ok && add_fd(out, setup->cgroup_procs);
    }
    if (setup->cgroup_kill >= 0) {
        out->head.has_cgroup_kill = 1;
        ok = ok && add_fd(out, setup->cgroup_kill);
    }
    if (guard_fd >= 0) {
        out->head.has_guard = 1;
        ok = ok && add_fd(out, guard_fd);
    }
    return ok;
}

/* What its socket takes at once. */
static uint64_t
body_room(int socket)
{
    int size = 0;
    socklen_t length = sizeof size;
    if (getsockopt(socket, SOL_SOCKET, SO_SNDBUF, &size, &length) < 0 || size <= 0)
        return 0;
    return size / 3 < AFK_ZYGOTE_BODY_IN_MESSAGE ? (uint64_t)size / 3 : AFK_ZYGOTE_BODY_IN_MESSAGE;
}

static int
body_to_memfd(struct outgoing *out)
{
    int fd = AFK_SYS("memfd_create", (fd = memfd_create("anyfork-start", MFD_CLOEXEC)) < 0 ? -errno : fd);
    int r = fd < 0 ? fd : 0;
    for (unsigned i = 1; i < out->n_vec && r == 0; i++)
        r = afk_os_write_all(fd, out->vec[i].iov_base, out->vec[i].iov_len);
    out->memfd = fd;
    out->n_vec = 1;
    return r;
}

static void
put_plain(struct outgoing *out, const struct afk_template *t, const struct afk_setup *setup,
          const struct afk_surroundings *now)
{
    struct afk_start_message *head = &out->head;
    *head = (struct afk_start_message){
        .magic = AFK_ZYGOTE_MAGIC,
        .version = AFK_ZYGOTE_VERSION,
        .lifeline_group = setup->lifeline_group,
        .guarded = setup->guarded,
        .session = setup->session,
        .process_group = setup->process_group,
        .fd_policy = setup->fd_policy,
        .sigint = setup->sigint,
        .lifeline_signal = setup->lifeline_signal,
        .umask = setup->umask,
        .oom_score_adj = setup->oom_score_adj,
        .nice = setup->nice + now->nice - t->around.nice,
        .n_groups = setup->n_groups,
        .user = setup->user,
        .group = setup->group,
    };
    if (setup->umask < 0 && now->umask != t->around.umask)
        head->umask = now->umask;
    if (setup->oom_score_adj == ANYFORK_OOM_KEEP && now->oom_score_adj != t->around.oom_score_adj)
        head->oom_score_adj = now->oom_score_adj;
    if (setup->session == ANYFORK_SESSION_KEEP && now->process_group != t->around.process_group) {
        head->session = ANYFORK_SESSION_GROUP;
        head->process_group = (int32_t)now->process_group;
    }
}

static int
send_start(struct afk_template *t, const struct afk_surroundings *now,
           const struct afk_setup *setup, const char *pickle, size_t size,
           struct anyfork_child *child, const char **ret_why, struct anyfork_error *reterr)
{
    struct outgoing out;
    struct anyfork_rlimit changed[AFK_LIMITS_MAX];
    char *block = NULL;
    int guard_fd = -1, r = 0;
    uint64_t token = 0;

    out.n_fds = 0;
    out.n_vec = 0;
    out.memfd = out.cwd = -1;
    out.targets = AFK_ALLOC("malloc(targets)", malloc((setup->n_moves + 1) * sizeof *out.targets));
    if (out.targets == NULL)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "options");
    put_plain(&out, t, setup, now);
    out.vec[out.n_vec++] = (struct iovec){&out.head, sizeof out.head};
    if (!put_limits(&out, t, setup, now, changed) || now->nice < t->around.nice ||
        now->oom_score_adj < t->around.oom_score_adj) {
        *ret_why = "its limits are lower, or its nice value higher, than here now";
        r = -ESTALE;
        goto out;
    }
    put_cpus(&out, t, setup, now);
    put_signals(&out, t, setup, now);
    if (setup->guarded) {
        r = afk_child_guard(child, &guard_fd, &token, reterr);
        if (r < 0)
            goto out;
        out.head.guard_token = token;
    }
    if ((setup->cwd == NULL || setup->cwd[0] != '/') && !is_same_folder(now, &t->around)) {
        r = out.cwd = afk_os_open(AT_FDCWD, ".", O_PATH | O_DIRECTORY, 0);
        if (r < 0) {
            r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_OPTION, -r, "cwd");
            goto out;
        }
        r = 0;
    }
    unsigned n_more = 0;
    for (unsigned i = 0; i < setup->n_moves; i++)
        if (setup->move[i].to > 2)
            out.targets[n_more++] = setup->move[i].to;
    out.head.n_moves = n_more;
    add_body(&out, out.targets, n_more * sizeof *out.targets);
    if (setup->n_groups > 0)
        add_body(&out, setup->groups, (size_t)setup->n_groups * sizeof *setup->groups);
    if (setup->cwd != NULL) {
        out.head.cwd_bytes = (uint32_t)strlen(setup->cwd) + 1;
        add_body(&out, setup->cwd, out.head.cwd_bytes);
    }
    if (setup->name != NULL) {
        out.head.name_bytes = (uint32_t)strlen(setup->name) + 1;
        add_body(&out, setup->name, out.head.name_bytes);
    }
    if (setup->env != NULL || now->environment != t->around.environment) {
        put_environment(&out, setup->env != NULL ? setup->env : (const char *const *)environ, &block);
        if (block == NULL) {
            r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "environment");
            goto out;
        }
    }
    out.head.pickle_bytes = size;
    add_body(&out, pickle, size);
    struct afk_child_view view;
    afk_child_view(child, &view);
    if (out.head.body_bytes > BODY_ALWAYS_FITS &&
        out.head.body_bytes > body_room(view.status_fd)) {
        r = body_to_memfd(&out);
        if (r < 0) {
            r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_HANDSHAKE, -r, "memfd of the target");
            goto out;
        }
    }
    if (!put_fds(&out, setup, guard_fd)) {
        r = AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0,
                     "fds: too many for one message to a template's worker");
        goto out;
    }
    r = afk_os_send_with_fds(view.status_fd, out.vec, out.n_vec, out.fds, out.n_fds, MSG_DONTWAIT);
    if (r == -EPIPE || r == -ECONNRESET || r == -EMSGSIZE)
        r = -EAGAIN; /* it died after we looked: the next */
    else if (r < 0)
        r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_HANDSHAKE, -r, "to the standby");
out:
    free(out.targets);
    free(block);
    afk_os_close(out.memfd);
    afk_os_close(out.cwd);
    afk_lifeline_close(&guard_fd);
    return r;
}

/* It is killed at once; to wait for its end, and for what its template says of it, is for a
 * caller that holds no locks of others. */
static void
drop_child(struct afk_template_job *job)
{
    struct afk_child_view view;
    afk_child_view(job->child, &view);
    (void)afk_os_pidfd_signal(view.pidfd, SIGKILL);
    if (job->n_dropped < AFK_DROPPED_MAX)
        job->dropped[job->n_dropped++] = job->child;
    else
        anyfork_child_close(job->child);
    job->child = NULL;
}

/* A standby that lives gets the start. As afk_template_start(). */
static int
start_one(struct afk_template *t, const struct afk_surroundings *now, struct afk_template_job *job,
          bool of_many, const char **ret_why, struct anyfork_error *reterr)
{
    struct offered failed = {.pid = 0};
    int r = -EAGAIN;
    for (int tries = 0; tries < OFFERS_TRIED; tries++) {
        r = take_offer(t, job->asked, job->asked && of_many, &job->child, &failed, ret_why, reterr);
        if (r < 0)
            break;
        r = send_start(t, now, job->setup, job->pickle, job->size, job->child, ret_why, reterr);
        if (r == 0)
            break;
        drop_child(job);
        if (r != -EAGAIN)
            break;
    }
    /* Neither does one live that was made for this start: it has failed as that one says. */
    if (r == -EAGAIN && job->asked && failed.pid > 0) {
        r = afk_child_new_offered(&job->child, failed.pid, failed.fds, t->siblings, reterr);
        failed.pid = 0;
    }
    if (failed.pid > 0)
        drop_dead(t, failed.fds, AFK_OFFER_FDS);
    return r;
}

/* The rest of what it has to have in common with us, while standbys prepare themselves. */
static int
check_the_rest(struct afk_template *t, const struct afk_identity *seen, const char **ret_why,
               struct anyfork_error *reterr)
{
    struct afk_identity identity = *seen;
    int r = afk_identity_read_rest(&t->files, &identity);
    if (r < 0)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_TEMPLATE, -r,
                        "/proc cannot be read, which says what this process may do");
    const char *why = afk_identity_difference(&t->identity, &identity);
    if (why == NULL)
        return 0; /* and another reason stays */
    *ret_why = why;
    return -ESTALE;
}

/* Until then it runs nothing of the user's. 0; or -EAGAIN: its end of the socket is closed, and it
 * has not even an error to report. (One that was killed, and not reaped yet, is not noticed.) */
static int
confirm(struct anyfork_child *child)
{
    struct afk_child_view view;
    const struct iovec go = {"g", 1};
    afk_child_view(child, &view);
    if (afk_os_send_with_fds(view.status_fd, &go, 1, NULL, 0, MSG_DONTWAIT) == 0)
        return 0;
    return has_failed(view.status_fd) ? 0 : -EAGAIN;
}

static bool
is_sent(const struct afk_template_job *job)
{
    return job->child != NULL && !job->started;
}

static bool
is_any_sent(const struct afk_template_job *jobs, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        if (is_sent(&jobs[i]))
            return true;
    return false;
}

int
afk_template_start(struct afk_template *t, struct afk_template_job *jobs, unsigned n,
                   const char **ret_why, struct anyfork_error *reterr)
{
    struct afk_identity identity;
    struct afk_surroundings now;
    if (is_foreign(t)) {
        *ret_why = "it is another process's";
        return -ESTALE;
    }
    int r = afk_identity_read(&t->files, &identity, &now);
    if (r < 0)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_TEMPLATE, -r,
                        "/proc cannot be read, which says what this process may do");
    identity.namespaces = t->identity.namespaces; /* not seen yet */
    identity.cgroup = t->identity.cgroup;
    *ret_why = afk_identity_difference(&t->identity, &identity);
    if (*ret_why != NULL)
        return -ESTALE;
    for (unsigned i = 0; i < n && r == 0; i++)
        if (jobs[i].child == NULL)
            r = start_one(t, &now, &jobs[i], n > 1, ret_why, reterr);
    int checked = is_any_sent(jobs, n) ? check_the_rest(t, &identity, ret_why, reterr) : 0;
    for (unsigned i = 0; i < n; i++) {
        if (!is_sent(&jobs[i]))
            continue;
        if (checked == 0 && confirm(jobs[i].child) == 0) {
            jobs[i].started = true;
            atomic_fetch_add(&t->starts, 1);
            continue;
        }
        /* It had not run anything: another takes its place. */
        drop_child(&jobs[i]);
        r = r == 0 ? -EAGAIN : r;
    }
    return checked < 0 ? checked : r;
}

void
afk_template_close_dropped(struct afk_template_job *jobs, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        while (jobs[i].n_dropped > 0)
            anyfork_child_close(jobs[i].dropped[--jobs[i].n_dropped]);
}

/* ---- the server ------------------------------------------------------------------------- */

/* An owner: that of the template; or one of its workers, if it is shared. */
struct client {
    pid_t pid;
    int control;
    int pidfd; /* a process that it has started may hold its end of the socket */
    unsigned low, high;
    unsigned ready;    /* standbys that nobody has taken */
    unsigned wanted;   /* asked for, and to be made at once */
    unsigned goal;     /* how many to keep ready */
    int64_t refill_at; /* 0: nothing to refill */
    int64_t last_start;
    unsigned failed;   /* standbys in a row that could not get ready */
    bool gone;
};

struct worker {
    pid_t pid;
    int report_fd; /* its own end: for STATUS */
    int pidfd;     /* of a sibling, until it is taken; else -1: we are told of its end */
    bool taken, dismissed;
    struct client *client; /* NULL: it is gone */
};

struct server {
    const struct afk_server_options *options;
    afk_fork_standby fork_standby;
    void *arg;
    int signals, taken[2], door[2], dumpable;
    struct worker *worker;
    unsigned n_workers, room;
    struct client *client[CLIENTS_MAX];
    unsigned n_clients;
    struct pollfd *poll;
    unsigned poll_room;
};

static struct worker *
find(struct server *s, pid_t pid)
{
    for (unsigned i = 0; i < s->n_workers; i++)
        if (s->worker[i].pid == pid)
            return &s->worker[i];
    return NULL;
}

static void
forget(struct server *s, struct worker *worker)
{
    afk_lifeline_close(&worker->report_fd);
    afk_lifeline_close(&worker->pidfd);
    *worker = s->worker[--s->n_workers];
}

static void
refill(struct client *c, int64_t delay_ns)
{
    int64_t at = afk_os_now_ns() + delay_ns;
    if (c->refill_at == 0 || at > c->refill_at)
        c->refill_at = at;
}

/* No descriptor of the server is any of a forked child's: they are in the table. */
static int
make_report_and_lifeline(int report[2], int life[2])
{
    int r = afk_os_socketpair(report, SOCK_STREAM);
    if (r == 0 && fcntl(report[0], F_SETFL, O_NONBLOCK) < 0)
        r = -errno;
    if (r == 0)
        r = afk_os_pipe(life, O_CLOEXEC);
    if (r == 0)
        r = afk_lifeline_register(report[0], false);
    if (r == 0)
        r = afk_lifeline_register(life[1], true);
    return r;
}

/* The standby's report end is kept, to tell of its end. */
static int
offer(struct client *c, pid_t pid, int pidfd, int report[2], int life[2])
{
    struct afk_zygote_message message = message_of(AFK_ZYGOTE_OFFER);
    int r = afk_lifeline_register(report[1], false);
    if (r == 0) {
        const int fds[AFK_OFFER_FDS] = {[AFK_OFFER_REPORT] = report[0],
                                        [AFK_OFFER_LIFE_READ] = life[0],
                                        [AFK_OFFER_LIFE_WRITE] = life[1],
                                        [AFK_OFFER_PIDFD] = pidfd};
        message.pid = pid;
        r = send_message(c->control, &message, fds, AFK_OFFER_FDS);
        if (r < 0)
            afk_lifeline_forget(report[1]);
    }
    return r;
}

/* Of a sibling, whose number its parent may free, it came with the fork. */
static int
open_pidfd(int *pidfd, pid_t pid)
{
    if (*pidfd < 0)
        *pidfd = afk_os_pidfd_open(pid);
    return *pidfd < 0 ? *pidfd : afk_lifeline_register(*pidfd, false);
}

/* Whether one more offer fits: it would be killed again. */
static bool
has_room(const struct client *c)
{
    int queued = 0, room = 0;
    socklen_t size = sizeof room;
    return ioctl(c->control, SIOCOUTQ, &queued) < 0 ||
           getsockopt(c->control, SOL_SOCKET, SO_SNDBUF, &room, &size) < 0 || queued < room;
}

static int
make_standby(struct server *s, struct client *c)
{
    int report[2] = {-1, -1}, life[2] = {-1, -1}, pidfd = -1, on = 1;
    if (s->n_workers == s->room) {
        unsigned room = s->room > 0 ? 2 * s->room : 32;
        struct worker *larger = realloc(s->worker, room * sizeof *larger);
        if (larger == NULL)
            return -ENOMEM;
        s->worker = larger;
        s->room = room;
    }
    int r = has_room(c) ? make_report_and_lifeline(report, life) : -ENOBUFS;
    if (r == 0 && setsockopt(report[1], SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0)
        r = -errno;
    if (r == 0) {
        const struct afk_standby standby = {report[1],  life[0], s->taken[1],
                                            s->door[1], c->pid,  s->dumpable};
        pid_t pid = s->fork_standby(s->arg, &standby, &pidfd);
        r = pid < 0 ? (int)pid : open_pidfd(&pidfd, pid);
        if (r == 0)
            r = offer(c, pid, pidfd, report, life);
        if (pid > 0) {
            struct worker *worker = &s->worker[s->n_workers++];
            *worker = (struct worker){.pid = pid, .report_fd = -1, .pidfd = -1, .client = c};
            if (r == 0) {
                worker->report_fd = report[1];
                report[1] = -1;
                c->ready++;
            }
            else if (pidfd >= 0) {
                (void)afk_os_pidfd_signal(pidfd, SIGKILL);
            }
            if (s->options->siblings) {
                worker->pidfd = pidfd;
                pidfd = -1;
            }
        }
    }
    afk_lifeline_close(&pidfd);
    afk_lifeline_close(&life[1]);
    afk_lifeline_close(&report[0]);
    afk_os_close(life[0]);
    afk_os_close(report[1]);
    return r;
}

static void
take_messages(struct client *c)
{
    for (;;) {
        struct afk_zygote_message message;
        int fds[1];
        unsigned n_fds;
        ssize_t n = afk_os_receive_with_fds(c->control, &message, sizeof message, fds, 1, &n_fds,
                                            NULL, MSG_DONTWAIT);
        if (n == -EAGAIN)
            return;
        close_all(fds, n_fds);
        if (n <= 0 || !is_ours(&message, n)) {
            c->gone = true;
            return;
        }
        if (message.op == AFK_ZYGOTE_WANT) {
            c->wanted += message.number < WANTED_MAX ? message.number : WANTED_MAX;
            c->wanted = c->wanted < WANTED_MAX ? c->wanted : WANTED_MAX;
            c->last_start = afk_os_now_ns();
        }
    }
}

/* Serves `pid` from now on; its control socket is ours. 0 or a negative errno. */
static int
add_client(struct server *s, pid_t pid, int control, unsigned low, unsigned high)
{
    struct afk_zygote_message hello = message_of(AFK_ZYGOTE_HELLO);
    if (s->n_clients == CLIENTS_MAX)
        return -EUSERS;
    struct client *c = AFK_ALLOC("calloc(client)", calloc(1, sizeof *c));
    if (c == NULL)
        return -ENOMEM;
    *c = (struct client){.pid = pid, .control = control, .low = low, .high = high, .goal = high};
    c->last_start = afk_os_now_ns();
    int r = c->pidfd = afk_os_pidfd_open(pid);
    if (r >= 0)
        r = afk_lifeline_register(c->pidfd, false);
    take_ids(hello.ids);
    hello.around = *s->options->around;
    hello.identity = *s->options->identity;
    if (r == 0)
        r = send_message(control, &hello, NULL, 0);
    if (r < 0) {
        afk_lifeline_close(&c->pidfd);
        free(c);
        return r;
    }
    refill(c, 0);
    s->client[s->n_clients++] = c;
    return 0;
}

static void
note_taken(struct server *s)
{
    int32_t pids[64];
    ssize_t n;
    while ((n = afk_os_read(s->taken[0], pids, sizeof pids)) > 0) {
        for (size_t i = 0; i < (size_t)n / sizeof *pids; i++) {
            struct worker *worker = find(s, pids[i]);
            if (worker == NULL || worker->taken)
                continue;
            worker->taken = true;
            struct client *c = worker->client;
            bool was_ready = !worker->dismissed;
            if (s->options->siblings) /* somebody else's from here on */
                forget(s, worker);
            if (c == NULL)
                continue;
            if (was_ready)
                c->ready--;
            c->last_start = afk_os_now_ns();
            if (c->failed > 0) { /* and this one has not */
                c->failed = 0;
                c->refill_at = 0;
            }
            c->goal = c->high;
            refill(c, REFILL_DELAY_NS);
        }
    }
}

/* What the kernel says of it, not what it says itself: it may be anything by now. */
static bool
may_be_served(struct server *s, pid_t pid)
{
    struct afk_identity its, ours;
    const struct worker *worker = find(s, pid);
    return worker != NULL && worker->taken && afk_identity_read_of(pid, &its) == 0 &&
           afk_identity_read_of(getpid(), &ours) == 0 &&
           afk_identity_difference(&its, &ours) == NULL;
}

static void
open_the_door(struct server *s)
{
    note_taken(s); /* before it asks a worker has told that it was */
    for (int tries = 0; tries < CLIENTS_MAX; tries++) {
        struct afk_zygote_message message;
        struct ucred from = {.pid = -1};
        int control = -1;
        unsigned n_fds;
        ssize_t n = afk_os_receive_with_fds(s->door[0], &message, sizeof message, &control, 1,
                                            &n_fds, &from, MSG_DONTWAIT);
        if (n == -EAGAIN)
            return;
        bool ok = n > 0 && is_ours(&message, n) && message.op == AFK_ZYGOTE_ATTACH && n_fds == 1 &&
                  may_be_served(s, from.pid) && afk_lifeline_register(control, false) == 0 &&
                  add_client(s, from.pid, control, 0, NESTED_HIGH) == 0;
        if (!ok && n_fds == 1)
            afk_lifeline_close(&control); /* by which it is told */
    }
}

static void
tell_status(const struct worker *worker, int status)
{
    const struct afk_report report = {
        .magic = AFK_REPORT_MAGIC, .kind = AFK_REPORT_STATUS, .value = status};
    /* There is room, or the owner has not read a large result yet, whose end it will not
     * get: the kernel tells it the rest, or it stays unknown. */
    (void)send(worker->report_fd, &report, sizeof report, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* It has told why; the next one is not likely to do better. */
static bool
has_failed_status(int status)
{
    return WIFEXITED(status) && WEXITSTATUS(status) == AFK_EXIT_PRELUDE;
}

/* Ever longer, for the next is not likely to do better. */
static int64_t
after_failure(struct client *c)
{
    c->failed++;
    return REFILL_AFTER_DEATH_NS << (c->failed < 8 ? c->failed : 8);
}

/* One that nobody has taken has ended. */
static void
note_death(struct client *c, int status)
{
    c->ready--;
    if (!has_failed_status(status))
        c->failed = 0;
    refill(c, has_failed_status(status) ? after_failure(c) : REFILL_AFTER_DEATH_NS);
}

static void
reap_all(struct server *s)
{
    struct signalfd_siginfo info[8];
    int status;
    pid_t pid;
    while (afk_os_read(s->signals, info, sizeof info) > 0)
        ;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        struct worker *worker = find(s, pid);
        if (worker == NULL)
            continue; /* of a module that was preloaded */
        if (worker->report_fd >= 0) {
            tell_status(worker, status);
            if (worker->client != NULL && !worker->taken && !worker->dismissed)
                note_death(worker->client, status);
        }
        forget(s, worker);
    }
}

/* Siblings that nobody has taken: their parent is told of their end, not we. */
static void
look_at_siblings(struct server *s)
{
    for (unsigned i = s->n_workers; i-- > 0;) {
        struct worker *worker = &s->worker[i];
        if (worker->pidfd < 0 || !is_dead(worker->pidfd))
            continue;
        if (worker->client != NULL && worker->report_fd >= 0 && !worker->dismissed)
            note_death(worker->client, 0);
        forget(s, worker);
    }
}

static void
make_due(struct server *s, struct client *c)
{
    int64_t now = afk_os_now_ns();
    while (c->wanted > 0) {
        c->wanted--;
        int r = make_standby(s, c);
        if (r < 0) { /* as the others would: told once */
            struct afk_zygote_message message = message_of(AFK_ZYGOTE_FAILED);
            message.number = (uint32_t)-r;
            (void)send_message(c->control, &message, NULL, 0);
            c->wanted = 0;
        }
        refill(c, REFILL_DELAY_NS);
    }
    if (c->refill_at == 0 || now < c->refill_at)
        return;
    if (c->ready >= c->goal) {
        c->refill_at = 0;
        return;
    }
    /* One at a time: what the owner asks for in between goes first. */
    if (make_standby(s, c) < 0)
        c->refill_at = now + after_failure(c);
}

/* They read the end of the file, and end. What their owner has sent already they read before
 * that, and are started; what the owner sends from now on is refused by the socket. */
static void
dismiss_all_but(struct server *s, struct client *c, unsigned kept)
{
    for (unsigned i = 0; i < s->n_workers && c->ready > kept; i++) {
        struct worker *worker = &s->worker[i];
        if (worker->client != c || worker->taken || worker->dismissed || worker->report_fd < 0)
            continue;
        (void)shutdown(worker->report_fd, SHUT_RD);
        worker->dismissed = true;
        c->ready--;
    }
}

/* Those that nobody has wanted for long are ended; the owner passes over them. */
static void
shrink_idle(struct server *s, struct client *c)
{
    if (c->ready <= c->low || s->options->idle_ns <= 0 ||
        afk_os_now_ns() - c->last_start < s->options->idle_ns)
        return;
    c->goal = c->low;
    dismiss_all_but(s, c, c->goal);
}

static int
next_timeout_ms(const struct server *s)
{
    int64_t now = afk_os_now_ns(), until = now + (int64_t)TIMEOUT_MS_MAX * 1000000;
    for (unsigned i = 0; i < s->n_clients; i++) {
        const struct client *c = s->client[i];
        if (c->refill_at != 0 && c->refill_at < until)
            until = c->refill_at;
        if (s->options->idle_ns > 0 && c->ready > c->low &&
            c->last_start + s->options->idle_ns < until)
            until = c->last_start + s->options->idle_ns;
    }
    int64_t ms = (until - now + 999999) / 1000000;
    return ms < 0 ? 0 : (int)ms;
}

static int
open_door(struct server *s)
{
    int on = 1, r = afk_os_socketpair(s->door, SOCK_SEQPACKET);
    if (r == 0 && setsockopt(s->door[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0)
        r = -errno;
    return r == 0 ? afk_lifeline_register(s->door[0], false) : r;
}

static int
open_server(struct server *s)
{
    sigset_t child;
    /* Nobody of the same user reads its memory, traces it or takes its descriptors, a worker
     * that was taken over, say; PR_SET_DUMPABLE(2const). A start undoes that in its worker. */
    s->dumpable = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
    (void)prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    (void)sigemptyset(&child);
    (void)sigaddset(&child, SIGCHLD);
    (void)signal(SIGCHLD, SIG_DFL);
    (void)pthread_sigmask(SIG_BLOCK, &child, NULL);
    s->signals = signalfd(-1, &child, SFD_NONBLOCK | SFD_CLOEXEC);
    int r = s->signals < 0 ? -errno : afk_lifeline_register(s->signals, false);
    if (r == 0)
        r = afk_os_pipe(s->taken, O_CLOEXEC | O_NONBLOCK);
    if (r == 0)
        r = afk_lifeline_register(s->taken[0], false);
    if (r == 0 && s->options->shared)
        r = open_door(s);
    return r;
}

static void
close_server(struct server *s)
{
    while (s->n_workers > 0)
        forget(s, &s->worker[0]);
    free(s->poll);
    for (unsigned i = 0; i < s->n_clients; i++) {
        afk_lifeline_close(&s->client[i]->control);
        afk_lifeline_close(&s->client[i]->pidfd);
        free(s->client[i]);
    }
    afk_lifeline_close(&s->signals);
    afk_lifeline_close(&s->taken[0]);
    afk_os_close(s->taken[1]);
    afk_lifeline_close(&s->door[0]);
    afk_os_close(s->door[1]);
    free(s->worker);
}

/* Whoever reads what the owner wrote waits for the end of the file. */
static void
let_go_of_streams(void)
{
    int null = afk_os_open(AT_FDCWD, "/dev/null", O_RDWR, 0);
    for (int fd = 0; fd <= 2 && null >= 0; fd++)
        (void)dup2(null, fd);
    if (null > 2)
        afk_os_close(null);
}

/* Nobody can start its standbys any more. */
static void
drop_client(struct server *s, unsigned which)
{
    struct client *c = s->client[which];
    dismiss_all_but(s, c, 0);
    for (unsigned i = 0; i < s->n_workers; i++)
        if (s->worker[i].client == c)
            s->worker[i].client = NULL;
    if (c->pid == s->options->owner) {
        let_go_of_streams();
        afk_lifeline_close(&s->door[0]);
    }
    afk_lifeline_close(&c->control);
    afk_lifeline_close(&c->pidfd);
    free(c);
    s->client[which] = s->client[--s->n_clients];
}

static int
await_events(struct server *s, int (*wait)(void *fds, unsigned n, int timeout_ms))
{
    unsigned n_fds = 3, n_clients = s->n_clients, most = 3 + 2 * CLIENTS_MAX + s->n_workers;
    if (most > s->poll_room) {
        struct pollfd *larger = realloc(s->poll, 2 * most * sizeof *larger);
        if (larger == NULL)
            return -ENOMEM;
        s->poll = larger;
        s->poll_room = 2 * most;
    }
    struct pollfd *fds = s->poll;
    fds[0] = (struct pollfd){.fd = s->taken[0], .events = POLLIN};
    fds[1] = (struct pollfd){.fd = s->signals, .events = POLLIN};
    fds[2] = (struct pollfd){.fd = s->door[0], .events = POLLIN};
    for (unsigned i = 0; i < n_clients; i++) {
        fds[n_fds++] = (struct pollfd){.fd = s->client[i]->control, .events = POLLIN};
        fds[n_fds++] = (struct pollfd){.fd = s->client[i]->pidfd, .events = POLLIN};
    }
    for (unsigned i = 0; i < s->n_workers; i++)
        if (s->worker[i].pidfd >= 0)
            fds[n_fds++] = (struct pollfd){.fd = s->worker[i].pidfd, .events = POLLIN};
    int n = wait(fds, n_fds, next_timeout_ms(s));
    if (n <= 0)
        return n == -EINTR ? 0 : n;
    for (unsigned i = 0; i < n_clients; i++) {
        if (fds[3 + 2 * i].revents != 0)
            take_messages(s->client[i]);
        if (fds[4 + 2 * i].revents != 0)
            s->client[i]->gone = true;
    }
    if (fds[2].revents != 0)
        open_the_door(s);
    return 0;
}

int
afk_server_run(const struct afk_server_options *options, afk_fork_standby fork_standby,
               int (*wait)(void *fds, unsigned n, int timeout_ms), void *arg)
{
    struct server server = {.options = options,
                            .fork_standby = fork_standby,
                            .arg = arg,
                            .signals = -1,
                            .taken = {-1, -1},
                            .door = {-1, -1}},
                  *s = &server;
    int r = open_server(s);
    if (r == 0)
        r = add_client(s, options->owner, options->control, options->low, options->high);
    while (r == 0 && (s->n_clients > 0 || s->n_workers > 0)) {
        r = await_events(s, wait);
        note_taken(s);
        for (unsigned i = s->n_clients; i-- > 0;)
            if (s->client[i]->gone)
                drop_client(s, i);
        reap_all(s);
        if (s->options->siblings)
            look_at_siblings(s);
        for (unsigned i = 0; i < s->n_clients; i++) {
            make_due(s, s->client[i]);
            shrink_idle(s, s->client[i]);
        }
    }
    close_server(s);
    return r;
}

/* ---- the standby --------------------------------------------------------------------------- */

static sigset_t
set_of(uint64_t bits)
{
    sigset_t set;
    (void)sigemptyset(&set);
    for (int sig = 1; sig < NSIG && sig <= 64; sig++)
        if ((bits & (1ull << (sig - 1))) != 0)
            (void)sigaddset(&set, sig);
    return set;
}

static bool
is_whole(const struct afk_start_message *head)
{
    size_t n_groups = head->n_groups > 0 ? (size_t)head->n_groups : 0;
    uint64_t sum = (uint64_t)head->n_rlimits * sizeof(struct anyfork_rlimit) + head->cpus_bytes +
                   (uint64_t)head->n_moves * sizeof(int32_t) + n_groups * sizeof(gid_t) +
                   head->cwd_bytes + head->name_bytes;
    return head->magic == AFK_ZYGOTE_MAGIC && head->version == AFK_ZYGOTE_VERSION &&
           head->n_moves <= AFK_ZYGOTE_FDS_MAX && head->cpus_bytes % sizeof(long) == 0 &&
           head->body_bytes < PTRDIFF_MAX && head->env_bytes <= head->body_bytes &&
           head->n_env <= head->env_bytes && head->pickle_bytes <= head->body_bytes &&
           sum + head->env_bytes + head->pickle_bytes == head->body_bytes;
}

static int
read_body(int fd, const struct afk_start_message *head, int memfd, char **ret_body)
{
    char *body = AFK_ALLOC("malloc(body)", malloc(head->body_bytes + 1));
    size_t have = 0;
    if (body == NULL)
        return -ENOMEM;
    while (have < head->body_bytes) {
        ssize_t n = memfd >= 0 ? pread(memfd, body + have, head->body_bytes - have, (off_t)have)
                               : read(fd, body + have, head->body_bytes - have);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            int r = n < 0 ? -errno : -EPIPE;
            free(body);
            return r;
        }
        have += (size_t)n;
    }
    body[have] = '\0';
    *ret_body = body;
    return 0;
}

/* The next `size` bytes. */
static char *
part(char **at, size_t size)
{
    char *p = *at;
    *at += size;
    return p;
}

static int
take_environment(struct afk_setup *setup, char *block, uint64_t size, uint32_t n)
{
    const char **env = AFK_ALLOC("calloc(env)", calloc((size_t)n + 1, sizeof *env));
    if (env == NULL)
        return -ENOMEM;
    char *end = block + size;
    for (uint32_t i = 0; i < n; i++) {
        char *zero = memchr(block, '\0', (size_t)(end - block));
        if (zero == NULL) {
            free(env);
            return -EPROTO;
        }
        env[i] = block;
        block = zero + 1;
    }
    setup->env = env;
    setup->copies[setup->n_copies++] = env;
    return 0;
}

static unsigned
fds_of(const struct afk_start_message *head)
{
    return head->n_moves + !!head->has_stream[0] + !!head->has_stream[1] + !!head->has_stream[2] +
           !!head->has_memfd + !!head->has_cwd + !!head->has_cgroup + !!head->has_cgroup_kill +
           !!head->has_guard;
}

/* Puts the descriptors where setup says. Numbers that the worker will use for something
 * else are left by what has come. */
static int
take_fds(struct afk_start *start, const struct afk_start_message *head, int *fds, unsigned n_fds,
         const int32_t *targets)
{
    struct afk_setup *setup = &start->setup;
    unsigned at = 0;
    if (n_fds != fds_of(head))
        return -EPROTO;
    setup->lowest = 3;
    for (uint32_t i = 0; i < head->n_moves; i++) {
        if (targets[i] < setup->lowest || targets[i] == INT_MAX)
            return -EPROTO; /* they ascend */
        setup->lowest = targets[i] + 1;
    }
    for (unsigned i = 0; i < n_fds; i++) {
        int r = afk_os_raise(&fds[i], setup->lowest);
        if (r < 0)
            return r;
    }
    for (int i = 0; i < 3; i++) {
        start->has_stream[i] = head->has_stream[i];
        if (head->has_stream[i])
            setup->move[setup->n_moves++] = (struct afk_fd_move){.from = fds[at++], .to = i};
    }
    for (uint32_t i = 0; i < head->n_moves; i++)
        setup->move[setup->n_moves++] = (struct afk_fd_move){.from = fds[at++], .to = targets[i]};
    if (head->has_memfd)
        at++;
    start->cwd_fd = head->has_cwd ? fds[at++] : -1;
    setup->cgroup_procs = head->has_cgroup ? fds[at++] : -1;
    setup->cgroup_kill = head->has_cgroup_kill ? fds[at++] : -1;
    start->guard_fd = head->has_guard ? fds[at++] : -1;
    return 0;
}

static int
unpack(struct afk_start *start, const struct afk_start_message *head, int *fds, unsigned n_fds)
{
    struct afk_setup *setup = &start->setup;
    char *at = start->body;
    size_t n_groups = head->n_groups > 0 ? (size_t)head->n_groups : 0;

    setup->session = head->session;
    setup->process_group = head->process_group;
    setup->report_to = -1;
    setup->fd_policy = head->fd_policy;
    setup->sigint = head->sigint;
    setup->mask = set_of(head->mask);
    setup->ignored = set_of(head->ignored);
    setup->defaults = set_of(head->defaults);
    setup->lifeline_signal = head->lifeline_signal;
    setup->lifeline_group = head->lifeline_group;
    setup->guarded = head->guarded;
    setup->umask = head->umask;
    setup->oom_score_adj = head->oom_score_adj;
    setup->nice = head->nice;
    setup->n_groups = head->n_groups;
    setup->user = head->user;
    setup->group = head->group;
    setup->n_rlimits = head->n_rlimits;
    setup->rlimits = (const void *)part(&at, head->n_rlimits * sizeof *setup->rlimits);
    char *cpus = part(&at, head->cpus_bytes);
    const int32_t *targets = (const void *)part(&at, head->n_moves * sizeof *targets);
    setup->groups = (const void *)part(&at, n_groups * sizeof *setup->groups);
    char *cwd = part(&at, head->cwd_bytes), *name = part(&at, head->name_bytes);
    char *env = part(&at, head->env_bytes);
    setup->cwd = head->cwd_bytes > 0 ? cwd : NULL;
    setup->name = head->name_bytes > 0 ? name : NULL;
    start->pickle = at;
    start->pickle_size = head->pickle_bytes;
    start->guard_token = head->guard_token;
    if ((head->cwd_bytes > 0 && cwd[head->cwd_bytes - 1] != '\0') ||
        (head->name_bytes > 0 && name[head->name_bytes - 1] != '\0'))
        return -EPROTO;
    setup->move = AFK_ALLOC("calloc(moves)", calloc((size_t)head->n_moves + 3, sizeof *setup->move));
    if (setup->move == NULL)
        return -ENOMEM;
    if (head->cpus_bytes > 0) {
        setup->cpus = AFK_ALLOC("malloc(cpus)", malloc(head->cpus_bytes));
        if (setup->cpus == NULL)
            return -ENOMEM;
        memcpy(setup->cpus, cpus, head->cpus_bytes);
        setup->cpus_size = head->cpus_bytes;
    }
    int r = take_fds(start, head, fds, n_fds, targets);
    if (r == 0 && head->has_env)
        r = take_environment(setup, env, head->env_bytes, head->n_env);
    return r;
}

/* Its memory; the descriptors are those that have come. */
static void
drop_start(struct afk_start *start)
{
    start->setup.cgroup_procs = start->setup.cgroup_kill = -1;
    afk_setup_release(&start->setup);
    free(start->body);
    start->body = NULL;
}

bool
afk_start_is_confirmed(int fd)
{
    char go;
    ssize_t n;
    do
        n = AFK_SYS("read(confirmation)", (n = read(fd, &go, 1)) < 0 ? -errno : n);
    while (n == -EINTR);
    return n == 1;
}

int
afk_start_receive(int fd, pid_t owner, struct afk_start *start)
{
    struct afk_start_message head;
    struct ucred from = {.pid = -1};
    int fds[AFK_ZYGOTE_FDS_MAX];
    unsigned n_fds;

    memset(start, 0, sizeof *start);
    for (int i = 0; i < 3; i++)
        start->setup.opened[i] = start->setup.owner_end[i] = -1;
    start->setup.cgroup_dir = start->setup.cgroup_procs = start->setup.cgroup_kill = -1;
    start->cwd_fd = start->guard_fd = -1;
    /* The head is smaller than any piece that the kernel would cut a message into. */
    ssize_t n = afk_os_receive_with_fds(fd, &head, sizeof head, fds, AFK_ZYGOTE_FDS_MAX, &n_fds,
                                        &from, 0);
    if (n <= 0)
        return n == -ECONNRESET ? 0 : (int)n;
    int r = n != (ssize_t)sizeof head || !is_whole(&head) ? -EPROTO : 0;
    if (r == 0 && (from.pid != owner || from.uid != getuid() || from.gid != getgid()))
        r = -EPERM;
    int memfd = -1;
    unsigned streams = 0u + !!head.has_stream[0] + !!head.has_stream[1] + !!head.has_stream[2];
    if (head.has_memfd && streams + head.n_moves < n_fds)
        memfd = fds[streams + head.n_moves];
    head.has_memfd = memfd >= 0;
    if (r == 0)
        r = read_body(fd, &head, memfd, &start->body);
    if (memfd >= 0) {
        fds[streams + head.n_moves] = -1;
        afk_os_close(memfd);
    }
    if (r == 0)
        r = unpack(start, &head, fds, n_fds);
    if (r < 0) {
        drop_start(start);
        close_all(fds, n_fds);
    }
    return r < 0 ? r : 1;
}
