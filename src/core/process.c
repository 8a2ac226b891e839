/*
 * One worker, as its owner sees it: a socket, a pipe, a pidfd, what the child reported
 * and how it ended.
 *
 * Rules: a handle belongs to the process that made it; in a forked child every
 * call answers ANYFORK_EFOREIGN and touches no fd. A status, once known, is
 * kept. There is one way to reap, under the handle's lock, and ECHILD is never
 * taken for an answer.
 */
#include "core.h"
#include "zygote.h"
#include "anyfork/anyfork.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEATH_WAIT_NS ((int64_t)10 * 1000000000) /* for a child that was killed */
#define REFUSED_WAIT_NS ((int64_t)200 * 1000000) /* one that the lifeline alone may end */

#define REAPED_WAIT_NS ((int64_t)2 * 1000000000) /* for a template to tell what it reaped */
#define LOOK_MS 20
#define REAP_TRIES 3
#define ARMED_LOOK_US 200
#define ARMED_TRIES 50000 /* ten seconds */

struct anyfork_child {
    atomic_uint refs;     /* the owner's, and one for each call under way */
    pthread_mutex_t lock; /* short steps only, never across a wait or a fork */
    unsigned generation;
    pid_t pid;       /* 0: none yet, or a thread of this process */
    bool in_process;
    int pidfd;
    int status_fd;   /* our end of the socket, non-blocking; open as long as the handle, for an
                      * event loop forgets a descriptor that is closed, and whoever waits for it */
    bool no_more_reports; /* end-of-file, or not to be read any more */
    int life_write;  /* closes with the owner: that is the lifeline */
    int life_read;   /* keeps the worker's read end alive though it closes its own */
    int stdio[3];    /* our ends of its standard streams, until they are taken */
    bool detached;   /* lives on without us */
    uint64_t guard_token; /* 0: the guard does not know of it */
    struct anyfork_child *next; /* in the list of those whose handle is closed */
    bool ready;
    bool ended;
    bool reaped;     /* or nothing left to reap */
    enum afk_status_from status_from;
    int status;
    int read_errno;  /* the report pipe failed */
    bool has_exit_report;
    int exit_report;
    bool of_template; /* which reaps it, and says so */
    bool has_wait_report;
    int wait_report;
    int64_t dead_since; /* 0: not seen to be dead */
    int outcome;
    char *payload;
    size_t payload_size, payload_have;
    struct afk_report error;
    /* The record being read. */
    struct afk_report partial;
    size_t partial_have;
};

static atomic_uint n_held; /* handles of this process */
static _Atomic(uint64_t) last_token;

static void
close_fds(struct anyfork_child *child)
{
    afk_lifeline_close(&child->status_fd);
    afk_lifeline_close(&child->life_write);
    afk_lifeline_close(&child->life_read);
    for (int i = 0; i < 3; i++)
        afk_lifeline_close(&child->stdio[i]);
    afk_lifeline_close(&child->pidfd);
}

void
afk_child_ref(struct anyfork_child *child)
{
    atomic_fetch_add(&child->refs, 1);
}

/* The fds are closed with the last reference and not before: a call of another
 * thread may be about to poll them, and the numbers are soon somebody else's. */
void
afk_child_unref(struct anyfork_child *child)
{
    if (atomic_fetch_sub(&child->refs, 1) != 1)
        return;
    if (child->generation == afk_generation()) {
        if (child->guard_token != 0 && child->pid > 0)
            afk_guard_drop(child->guard_token); /* it would hold on to the rest of a cgroup */
        close_fds(child);
        atomic_fetch_sub(&n_held, 1);
    }
    (void)pthread_mutex_destroy(&child->lock);
    free(child->payload);
    free(child);
}

/* ---- workers that were let go ------------------------------------------------- */

/* Their handles are closed, and they are reaped once they end: when another worker is
 * started. try_lock, for a dead thread may hold it in a forked child. */
static struct anyfork_child *let_go;
static pthread_mutex_t let_go_lock = PTHREAD_MUTEX_INITIALIZER;

static void
keep_to_reap(struct anyfork_child *child)
{
    (void)pthread_mutex_lock(&let_go_lock);
    child->next = let_go;
    let_go = child;
    (void)pthread_mutex_unlock(&let_go_lock);
}

static void
reap_detached(void)
{
    if (let_go == NULL || afk_guard_is_starting() || pthread_mutex_trylock(&let_go_lock) != 0)
        return;
    for (struct anyfork_child **link = &let_go; *link != NULL;) {
        struct anyfork_child *child = *link;
        if (afk_child_poll(child) == 0) {
            link = &child->next;
            continue;
        }
        *link = child->next;
        afk_child_unref(child);
    }
    (void)pthread_mutex_unlock(&let_go_lock);
}

unsigned
afk_children_held(void)
{
    reap_detached();
    return atomic_load(&n_held);
}

/* Async-signal-safe. They are the parent's to reap. */
static void
in_forked_child(void)
{
    atomic_store(&n_held, 0);
    let_go = NULL;
    let_go_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}

__attribute__((constructor)) static void
loaded(void)
{
    afk_at_fork_child(in_forked_child);
}

/* ---- making one ----------------------------------------------------------------- */

/* On failure what is left in `life` is the caller's to close. */
static int
make_lifeline(struct anyfork_child *child, int life[2])
{
    int r = afk_os_pipe(life, O_CLOEXEC);
    if (r < 0)
        return r;
    child->life_read = life[0];
    life[0] = -1;
    r = afk_lifeline_register(child->life_read, false);
    if (r < 0)
        return r;
    /* A dying process closes its fds in ascending order, but the kernel takes
     * the files apart from the last to the first (fput() in fs/file_table.c,
     * task_work_run() is last-in first-out since Linux 4.3). The write end must
     * go first, so have the higher number: with the read end of a worker that
     * has closed its own goes whoever would get the signal. */
    if (life[1] < child->life_read) {
        r = afk_os_dup_above(life[1], child->life_read + 1);
        if (r < 0)
            return r;
        afk_os_close(life[1]);
        life[1] = r;
    }
    child->life_write = life[1];
    life[1] = -1;
    return afk_lifeline_register(child->life_write, true);
}

static struct anyfork_child *
allocate(void)
{
    struct anyfork_child *child = AFK_ALLOC("calloc(child)", calloc(1, sizeof *child));
    if (child == NULL)
        return NULL;
    atomic_store(&child->refs, 1);
    atomic_fetch_add(&n_held, 1);
    (void)pthread_mutex_init(&child->lock, NULL);
    child->generation = afk_generation();
    child->pidfd = child->status_fd = child->life_write = child->life_read = -1;
    child->stdio[0] = child->stdio[1] = child->stdio[2] = -1;
    return child;
}

/* *ret_fd is the worker's end; -1 on failure. In the table too if it is a thread's: its
 * end is seen by the end of the file alone, which no forked child may hold back. */
static int
make_report_socket(struct anyfork_child *child, int *ret_fd)
{
    int status[2] = {-1, -1};
    bool begun = afk_lifeline_begin();
    int r = afk_os_socketpair(status, SOCK_STREAM);
    for (int i = 0; i < (child->in_process ? 2 : 1) && r == 0; i++)
        r = afk_lifeline_register(status[i], false);
    afk_lifeline_end(begun);
    child->status_fd = status[0];
    *ret_fd = status[1];
    if (r < 0) {
        afk_lifeline_close(ret_fd);
        return r;
    }
    (void)fcntl(child->status_fd, F_SETFL, O_NONBLOCK);
    return 0;
}

int
afk_child_new_in_process(struct anyfork_child **ret_child, int *ret_fd,
                         struct anyfork_error *reterr)
{
    struct anyfork_child *child = allocate();
    if (child == NULL)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "worker handle");
    child->in_process = true;
    int r = make_report_socket(child, ret_fd);
    if (r < 0) {
        afk_child_unref(child);
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM,
                        r == -ENOMEM ? ANYFORK_STAGE_MEMORY : ANYFORK_STAGE_PIPE, -r,
                        "report socket");
    }
    *ret_child = child;
    return 0;
}

/* The worker's end is the owner's too until it is closed here: the write end's number
 * is above it, for the reason that make_lifeline() gives. */
static int
keep_write_end_last(struct anyfork_child *child, int worker_end)
{
    if (child->life_write > worker_end)
        return 0;
    int higher = afk_os_dup_above(child->life_write, worker_end + 1);
    if (higher < 0)
        return higher;
    int r = afk_lifeline_register(higher, true);
    if (r < 0) {
        afk_os_close(higher);
        return r;
    }
    afk_lifeline_forget(child->life_write);
    afk_os_close(child->life_write);
    child->life_write = higher;
    return 0;
}

int
afk_child_new(struct anyfork_child **ret_child, struct afk_plan *plan,
              const struct afk_child_wants *wants, struct anyfork_error *reterr)
{
    int status_fd = -1, life[2] = {-1, -1};
    const char *what = "report socket";
    reap_detached();
    struct anyfork_child *child = allocate();
    if (child == NULL)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "worker handle");
    int r = make_report_socket(child, &status_fd);
    if (r == 0)
        r = afk_os_raise(&status_fd, wants->lowest);
    if (r < 0)
        goto fail;
    if (wants->lifeline) {
        what = "lifeline pipe";
        bool begun = afk_lifeline_begin();
        r = make_lifeline(child, life);
        if (r == 0)
            r = life[0] = afk_os_dup_above(child->life_read, wants->lowest);
        if (r >= 0)
            r = keep_write_end_last(child, life[0]);
        afk_lifeline_end(begun);
        if (r < 0)
            goto fail;
    }
    if (wants->guard) {
        r = afk_guard_open(reterr);
        if (r < 0)
            goto fail_told;
        plan->guard_fd = r;
        plan->guard_token = child->guard_token = atomic_fetch_add(&last_token, 1) + 1;
    }
    plan->status_fd = status_fd;
    plan->life_fd = life[0];
    *ret_child = child;
    return 0;

fail:
    r = AFK_FAIL(reterr, ANYFORK_ESYSTEM, r == -ENOMEM ? ANYFORK_STAGE_MEMORY : ANYFORK_STAGE_PIPE,
                 -r, what);
fail_told:
    afk_os_close(status_fd);
    afk_os_close(life[0]);
    afk_os_close(life[1]);
    afk_child_unref(child);
    return r;
}

int
afk_child_new_offered(struct anyfork_child **ret_child, pid_t pid, const int *fds,
                      bool is_our_child, struct anyfork_error *reterr)
{
    reap_detached();
    struct anyfork_child *child = allocate();
    if (child == NULL) {
        for (int i = 0; i < AFK_OFFER_FDS; i++)
            afk_lifeline_close(&(int){fds[i]});
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, ENOMEM, "worker handle");
    }
    child->of_template = !is_our_child;
    child->pid = pid;
    int *const to[AFK_OFFER_FDS] = {&child->status_fd, &child->life_read, &child->life_write,
                                    &child->pidfd};
    for (int i = 0; i < AFK_OFFER_FDS; i++)
        *to[i] = fds[i];
    bool begun = afk_lifeline_begin();
    int r = keep_write_end_last(child, child->life_read);
    afk_lifeline_end(begun);
    if (r < 0) {
        afk_child_unref(child);
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM,
                        r == -ENOMEM ? ANYFORK_STAGE_MEMORY : ANYFORK_STAGE_PIPE, -r,
                        "worker handle");
    }
    *ret_child = child;
    return 0;
}

int
afk_child_guard(struct anyfork_child *child, int *ret_fd, uint64_t *ret_token,
                struct anyfork_error *reterr)
{
    int r = afk_guard_open(reterr);
    if (r < 0)
        return r;
    *ret_fd = r;
    *ret_token = child->guard_token = atomic_fetch_add(&last_token, 1) + 1;
    return 0;
}

static void
close_worker_ends(struct afk_plan *plan)
{
    afk_os_close(plan->status_fd);
    afk_os_close(plan->life_fd);
    afk_lifeline_close(&plan->guard_fd);
    plan->status_fd = plan->life_fd = plan->guard_fd = -1;
}

int
afk_child_adopt(struct anyfork_child *child, pid_t pid, struct afk_plan *plan,
                struct anyfork_error *reterr)
{
    int stage = ANYFORK_STAGE_PIDFD;

    close_worker_ends(plan);
    if (pid < 0)
        return 0; /* no child: the caller reports the fork's failure */
    child->pid = pid;
    int r = afk_os_pidfd_open(pid);
    if (r < 0)
        goto fail;
    child->pidfd = r;
    r = afk_lifeline_register(r, false);
    if (r < 0)
        goto fail;
    stage = ANYFORK_STAGE_HANDSHAKE;
    r = afk_os_send(child->status_fd, "g", 1);
    if (r < 0 && r != -EPIPE) /* EPIPE: it is dead already, and its status will tell */
        goto fail;
    return 0;

fail:
    /* The child still waits for its byte, so the number is still its own. */
    (void)kill(pid, SIGKILL);
    while (waitpid(pid, &(int){0}, 0) < 0 && errno == EINTR)
        ;
    child->ended = child->reaped = true;
    return AFK_FAIL(reterr, ANYFORK_ESYSTEM, stage, -r, NULL);
}

int
afk_child_adopt_executed(struct anyfork_child *child, pid_t pid, int pidfd, bool ready,
                         struct afk_plan *plan, struct anyfork_error *reterr)
{
    close_worker_ends(plan);
    child->pid = pid;
    child->pidfd = pidfd;
    child->ready = ready;
    int r = afk_lifeline_register(pidfd, false);
    if (r == 0)
        return 0;
    (void)afk_os_pidfd_signal(pidfd, SIGKILL);
    (void)afk_os_pidfd_reap(pidfd, true, &(int){0});
    child->ended = child->reaped = true;
    return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_MEMORY, -r, "worker handle");
}

void
afk_child_set_stdio(struct anyfork_child *child, struct afk_setup *setup)
{
    for (int i = 0; i < 3; i++) {
        child->stdio[i] = setup->owner_end[i];
        setup->owner_end[i] = -1;
    }
}

/* ---- reading reports ------------------------------------------------------ */

/* False for a record that no worker of ours sends: a second outcome. It must not
 * replace the first, whose payload a caller may be looking at. */
static bool
take_record(struct anyfork_child *child)
{
    const struct afk_report *r = &child->partial;
    switch (r->kind) {
    case AFK_REPORT_READY:
        child->ready = true;
        return true;
    case AFK_REPORT_EXIT:
        child->has_exit_report = true;
        child->exit_report = (r->value & 0xff) << 8;
        return true;
    case AFK_REPORT_STATUS:
        child->has_wait_report = true;
        child->wait_report = r->value;
        return true;
    default:
        if (child->outcome != 0)
            return false;
        if (r->kind == AFK_REPORT_ERROR)
            child->error = *r;
        child->outcome = r->kind;
        child->payload_size = r->payload_bytes;
        child->payload_have = 0;
        child->payload = r->payload_bytes ? malloc(r->payload_bytes) : NULL;
        return true;
    }
}

static void
end_of_reports(struct anyfork_child *child)
{
    child->no_more_reports = true;
    /* Who still writes there gets EPIPE, and does not wait for us. Readable from now on. */
    if (child->status_fd >= 0)
        (void)shutdown(child->status_fd, SHUT_RDWR);
    if (child->payload_have < child->payload_size) { /* cut off: not a result */
        child->outcome = 0;
        child->payload_size = 0;
    }
}

/* Reads what is there. The lock is held. */
static void
drain(struct anyfork_child *child)
{
    while (child->status_fd >= 0 && !child->no_more_reports) {
        char scratch[4096];
        bool in_payload = child->payload_have < child->payload_size;
        char *to;
        size_t want;
        if (!in_payload) {
            to = (char *)&child->partial + child->partial_have;
            want = sizeof child->partial - child->partial_have;
        }
        else {
            want = child->payload_size - child->payload_have;
            if (child->payload != NULL) {
                to = child->payload + child->payload_have;
            }
            else { /* too large for us: keep the child going */
                to = scratch;
                want = want < sizeof scratch ? want : sizeof scratch;
            }
        }
        ssize_t n = afk_os_read(child->status_fd, to, want);
        if (n == -EAGAIN)
            return;
        if (n <= 0) {
            /* It died before it read our byte, unix(7): an end like another. */
            child->read_errno = n == -ECONNRESET ? 0 : (int)-n;
            end_of_reports(child);
            return;
        }
        if (in_payload) {
            child->payload_have += (size_t)n;
            continue;
        }
        child->partial_have += (size_t)n;
        if (child->partial_have == sizeof child->partial) {
            child->partial_have = 0;
            if (afk_report_check(&child->partial) < 0 || !take_record(child)) {
                end_of_reports(child); /* user code wrote into our pipe */
                return;
            }
        }
    }
}

/* The lock is held. */
static void
reap(struct anyfork_child *child, bool block)
{
    int status = 0, r = -EAGAIN;

    /* Anything but ECHILD is a passing fault: ask again, but not for ever. */
    for (int tries = 0; tries < REAP_TRIES && r < 0 && r != -ECHILD; tries++)
        r = afk_os_pidfd_reap(child->pidfd, block, &status);
    if (r == 0)
        return;
    child->reaped = r == 1 || r == -ECHILD;
    if (child->ended)
        return;
    /* Dead: all it ever wrote is in the pipe. Grandchildren may hold the write
     * end open, so there may be no end-of-file to wait for. */
    drain(child);
    child->ended = true;
    if (child->has_exit_report) {
        child->status = child->exit_report;
        child->status_from = AFK_STATUS_FROM_REPORT;
    }
    else if (r == 1) {
        child->status = status;
        child->status_from = AFK_STATUS_FROM_WAIT;
    }
    else if (afk_os_pidfd_exit_info(child->pidfd, &status) == 0) {
        child->status = status;
        child->status_from = AFK_STATUS_FROM_INFO;
    }
    else {
        child->status_from = AFK_STATUS_LOST;
    }
    end_of_reports(child);
    afk_lifeline_close(&child->life_write);
    afk_lifeline_close(&child->life_read);
}

/* The template's record, which is the last, was taken for the payload of one that the worker
 * did not live to finish. */
static void
find_status_in_payload(struct anyfork_child *child)
{
    struct afk_report last;
    size_t of_partial = child->partial_have, of_payload = sizeof last - of_partial;
    if (child->payload == NULL || child->payload_have < of_payload)
        return;
    memcpy(&last, child->payload + child->payload_have - of_payload, of_payload);
    memcpy((char *)&last + of_payload, &child->partial, of_partial);
    if (afk_report_check(&last) < 0 || last.kind != AFK_REPORT_STATUS || last.payload_bytes != 0)
        return;
    child->has_wait_report = true;
    child->wait_report = last.value;
    child->payload_have = child->payload_size = 0;
    child->outcome = 0;
}

/* Ended, and its status known, or not to be known any more. The lock is held. */
static void
end_offered(struct anyfork_child *child)
{
    int status = 0;
    if (child->dead_since == 0)
        child->dead_since = afk_os_now_ns();
    drain(child);
    if (!child->has_exit_report && !child->has_wait_report)
        find_status_in_payload(child);
    if (child->has_exit_report) {
        status = child->exit_report;
        child->status_from = AFK_STATUS_FROM_REPORT;
    }
    else if (child->has_wait_report) {
        status = child->wait_report;
        child->status_from = AFK_STATUS_FROM_WAIT;
    }
    /* Ours only if its template has gone, and orphans come to us. */
    else if (afk_os_pidfd_reap(child->pidfd, false, &status) == 1) {
        child->status_from = AFK_STATUS_FROM_WAIT;
    }
    else if (afk_os_pidfd_exit_info(child->pidfd, &status) == 0) {
        child->status_from = AFK_STATUS_FROM_INFO;
    }
    else if (child->no_more_reports || afk_os_now_ns() - child->dead_since > REAPED_WAIT_NS) {
        child->status_from = AFK_STATUS_LOST;
    }
    else {
        return; /* its template is about to tell */
    }
    child->status = status;
    child->ended = child->reaped = true;
    end_of_reports(child);
    afk_lifeline_close(&child->life_write);
    afk_lifeline_close(&child->life_read);
}

/* A thread of this process has ended when it has closed its end of the socket, all
 * that it ever wrote being in ours; or when ours is closed, because of an error. */
static bool
hung_up(const struct anyfork_child *child)
{
    return child->no_more_reports || afk_os_hung_up(child->status_fd);
}

static void
end_in_process(struct anyfork_child *child)
{
    drain(child);
    end_of_reports(child);
    child->ended = child->reaped = true;
    child->status = child->exit_report;
    child->status_from = child->has_exit_report ? AFK_STATUS_FROM_REPORT : AFK_STATUS_LOST;
}

/* Whether the process has ended, without asking for its status: somebody else
 * may have reaped it, and waitid(2) says ECHILD for that only once it is dead. */
static bool
dead(const struct anyfork_child *child)
{
    struct pollfd p = {.fd = child->pidfd, .events = POLLIN};
    return poll(&p, 1, 0) > 0 && (p.revents & POLLIN) != 0;
}

int
afk_child_poll(struct anyfork_child *child)
{
    if (child->generation != afk_generation())
        return ANYFORK_EFOREIGN;
    (void)pthread_mutex_lock(&child->lock);
    drain(child);
    if (child->in_process && !child->ended && hung_up(child))
        end_in_process(child);
    else if (child->of_template && !child->ended && dead(child))
        end_offered(child);
    else if (!child->in_process && !child->of_template && !child->ended && dead(child))
        reap(child, false);
    int r = child->ended;
    (void)pthread_mutex_unlock(&child->lock);
    return r;
}

int
afk_child_wait_step(struct anyfork_child *child, enum afk_until until, int64_t timeout_ns)
{
    int64_t deadline = timeout_ns < 0 ? -1 : afk_os_now_ns() + timeout_ns;

    for (;;) {
        int r = afk_child_poll(child);
        if (r != 0)
            return r < 0 ? r : 0;
        if (until == AFK_UNTIL_READY && (child->ready || child->error.kind != 0))
            return 0;
        (void)pthread_mutex_lock(&child->lock);
        bool awaits_status = child->dead_since != 0;
        struct pollfd fds[2] = {{.fd = awaits_status ? -1 : child->pidfd, .events = POLLIN},
                                {.fd = child->no_more_reports ? -1 : child->status_fd,
                                 .events = POLLIN}};
        (void)pthread_mutex_unlock(&child->lock);
        /* A pidfd stays readable, and so does the end of the reports; a READY may be read
         * by another thread that waits, of which nothing would be left to wake this one. */
        int timeout_ms = awaits_status ? 1 : until == AFK_UNTIL_READY ? LOOK_MS : -1;
        if (deadline >= 0) {
            int64_t left = deadline - afk_os_now_ns();
            if (left <= 0)
                return ANYFORK_ETIMEDOUT;
            left = (left + 999999) / 1000000;
            left = left > INT_MAX ? INT_MAX : left;
            timeout_ms = timeout_ms >= 0 && timeout_ms < left ? timeout_ms : (int)left;
        }
        /* A negative status_fd is ignored by poll(2). */
        if (poll(fds, 2, timeout_ms) < 0 && errno == EINTR)
            return -EINTR;
    }
}

void
afk_child_view(struct anyfork_child *child, struct afk_child_view *ret_view)
{
    memset(ret_view, 0, sizeof *ret_view);
    ret_view->foreign = child->generation != afk_generation();
    ret_view->pid = child->pid;
    if (ret_view->foreign) {
        ret_view->pidfd = ret_view->status_fd = -1;
        return;
    }
    (void)pthread_mutex_lock(&child->lock);
    ret_view->pidfd = child->pidfd;
    /* EXIT is a worker's last. Behind it comes what its template tells, late if that has stopped. */
    bool told_all = child->no_more_reports || (child->has_exit_report && !child->in_process);
    ret_view->status_fd = told_all ? -1 : child->status_fd;
    ret_view->ready = child->ready;
    ret_view->ended = child->ended;
    ret_view->status_from = child->status_from;
    ret_view->status = child->status;
    ret_view->error = child->error;
    ret_view->read_errno = child->read_errno;
    if (child->outcome != 0 && child->payload_have == child->payload_size &&
        (child->payload != NULL || child->payload_size == 0)) {
        ret_view->outcome = child->outcome;
        ret_view->payload = child->payload;
        ret_view->payload_size = child->payload_size;
    }
    (void)pthread_mutex_unlock(&child->lock);
}

/* ---- public --------------------------------------------------------------- */

pid_t
anyfork_child_pid(const struct anyfork_child *child)
{
    return child->pid;
}

int
anyfork_child_pidfd(const struct anyfork_child *child)
{
    return child->generation == afk_generation() ? child->pidfd : -1;
}

/* Goes on after a signal. */
static int
wait_until(struct anyfork_child *child, enum afk_until until, int64_t timeout_ns)
{
    int64_t deadline = timeout_ns < 0 ? -1 : afk_os_now_ns() + timeout_ns;
    int r;

    while ((r = afk_child_wait_step(child, until, timeout_ns)) == -EINTR) {
        if (deadline >= 0) {
            timeout_ns = deadline - afk_os_now_ns();
            if (timeout_ns < 0)
                timeout_ns = 0;
        }
    }
    return r;
}

int
anyfork_child_report_fd(struct anyfork_child *child)
{
    struct afk_child_view view;
    afk_child_view(child, &view);
    return view.status_fd;
}

int
anyfork_child_wait_ready(struct anyfork_child *child, int64_t timeout_ns,
                         struct anyfork_error *reterr)
{
    struct afk_child_view view;
    int r = wait_until(child, AFK_UNTIL_READY, timeout_ns);
    if (r < 0)
        return AFK_FAIL(reterr, r, ANYFORK_STAGE_CHILD, 0,
                        r == ANYFORK_EFOREIGN ? "the worker is another process's"
                                              : "the worker is not ready yet");
    afk_child_view(child, &view);
    if (view.ready)
        return 0;
    if (view.error.kind == 0)
        return AFK_FAIL(reterr, ANYFORK_EDIED, ANYFORK_STAGE_CHILD, 0,
                        "the worker ended before it was ready");
    char detail[sizeof view.error.detail + 1];
    memcpy(detail, view.error.detail, sizeof view.error.detail);
    detail[sizeof view.error.detail] = '\0';
    return AFK_FAIL(reterr, ANYFORK_EDIED, view.error.stage, view.error.sys_errno, detail);
}

int
anyfork_child_wait(struct anyfork_child *child, int64_t timeout_ns, int *ret_status)
{
    int r = wait_until(child, AFK_UNTIL_ENDED, timeout_ns);
    if (r < 0)
        return r;
    if (child->status_from == AFK_STATUS_LOST)
        return ANYFORK_EREAPED;
    if (ret_status != NULL)
        *ret_status = child->status;
    return 0;
}

int
anyfork_child_signal(struct anyfork_child *child, int sig)
{
    if (child->generation != afk_generation())
        return ANYFORK_EFOREIGN;
    if (child->in_process)
        return ANYFORK_EUNAVAILABLE;
    if (child->ended)
        return 0;
    int r = afk_os_pidfd_signal(child->pidfd, sig);
    if (r < 0 && r != -ESRCH) {
        errno = -r;
        return ANYFORK_ESYSTEM;
    }
    return 0;
}

int
anyfork_child_take_stdio(struct anyfork_child *child, int which)
{
    if (which < 0 || which > 2 || child->generation != afk_generation())
        return -1;
    (void)pthread_mutex_lock(&child->lock);
    int fd = child->stdio[which];
    child->stdio[which] = -1;
    if (fd >= 0)
        afk_lifeline_forget(fd);
    (void)pthread_mutex_unlock(&child->lock);
    return fd;
}

void
afk_child_await_armed(struct anyfork_child *child)
{
    for (int tries = 0; tries < ARMED_TRIES && afk_child_poll(child) == 0; tries++) {
        (void)pthread_mutex_lock(&child->lock);
        int unread = !child->no_more_reports ? afk_os_unread_by_peer(child->status_fd) : 0;
        (void)pthread_mutex_unlock(&child->lock);
        if (unread <= 0)
            return;
        (void)usleep(ARMED_LOOK_US);
    }
}

int
anyfork_child_detach(struct anyfork_child *child)
{
    if (child->generation != afk_generation())
        return ANYFORK_EFOREIGN;
    if (child->in_process)
        return ANYFORK_EUNAVAILABLE;
    afk_child_await_armed(child);
    (void)pthread_mutex_lock(&child->lock);
    int r = 0;
    if (!child->ended && !child->detached && child->life_read >= 0) {
        /* The same open file as the worker's end: nobody is told any more. */
        r = afk_os_stop_async(child->life_read);
        if (r == 0) {
            afk_lifeline_close(&child->life_write);
            afk_lifeline_close(&child->life_read);
        }
    }
    if (r == 0)
        child->detached = true;
    (void)pthread_mutex_unlock(&child->lock);
    if (r == 0 && child->guard_token != 0)
        afk_guard_drop(child->guard_token);
    if (r < 0) {
        errno = -r;
        return ANYFORK_ESYSTEM;
    }
    return 0;
}

/* Only its end is waited for. */
static void
let_it_go(struct anyfork_child *child)
{
    (void)pthread_mutex_lock(&child->lock);
    afk_lifeline_close(&child->status_fd);
    for (int i = 0; i < 3; i++)
        afk_lifeline_close(&child->stdio[i]);
    (void)pthread_mutex_unlock(&child->lock);
    /* One that is no child of ours is not ours to reap. */
    if (afk_os_pidfd_reap(child->pidfd, false, &(int){0}) == -ECHILD)
        return;
    afk_child_ref(child);
    keep_to_reap(child);
}

void
anyfork_child_close(struct anyfork_child *child)
{
    if (child == NULL)
        return;
    if (child->generation == afk_generation()) {
        reap_detached();
        if (child->detached && !child->ended && afk_child_poll(child) == 0)
            let_it_go(child);
        else if (!child->ended && child->pid > 0 && child->pidfd >= 0) {
            int r = afk_os_pidfd_signal(child->pidfd, SIGKILL);
            /* The lifeline kills too, should the signal have been refused. */
            (void)pthread_mutex_lock(&child->lock);
            afk_lifeline_close(&child->life_write);
            (void)pthread_mutex_unlock(&child->lock);
            /* Refused: a program that has become another user. */
            if (anyfork_child_wait(child, r == -EPERM ? REFUSED_WAIT_NS : DEATH_WAIT_NS, NULL) ==
                ANYFORK_ETIMEDOUT)
                let_it_go(child);
        }
        (void)pthread_mutex_lock(&child->lock);
        if (child->in_process && !child->ended)
            end_in_process(child); /* as far as this handle goes */
        if (child->ended && !child->reaped)
            reap(child, false);
        (void)pthread_mutex_unlock(&child->lock);
    }
    afk_child_unref(child);
}
