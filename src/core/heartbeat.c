/* A worker's heartbeat, from both sides: see heartbeat.h. */
#include "heartbeat.h"
#include "core.h"
#include "anyfork/anyfork.h"

#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define PAGE_MAGIC 0x42464b41u /* "AKFB" */
#define PAGE_BYTES 4096
#define NS 1000000000

struct page {
    uint32_t magic;
    uint32_t version;
    _Atomic int64_t interval_ns;
    _Atomic uint64_t alive;
    _Atomic uint64_t progressing;
    _Atomic uint64_t cpu_ns;
    _Atomic uint32_t is_asked; /* the main thread is, by the thread that beats */
};

/* ---- the owner ------------------------------------------------------------------- */

static bool
is_interval(int64_t ns)
{
    return AFK_HEARTBEAT_MIN_NS <= ns && ns <= AFK_HEARTBEAT_MAX_NS;
}

int
afk_heartbeat_new(struct afk_heartbeat *heartbeat, int64_t interval_ns)
{
    const struct page first = {.magic = PAGE_MAGIC, .version = 1, .interval_ns = interval_ns};
    void *page = NULL;
    if (!is_interval(interval_ns))
        return -EINVAL;
    int fd = afk_os_memfd("anyfork-heartbeat", PAGE_BYTES);
    if (fd < 0)
        return fd;
    int r = afk_os_pwrite_all(fd, &first, sizeof first, 0);
    if (r == 0)
        r = afk_os_map(fd, PAGE_BYTES, 0, &page);
    if (r < 0) {
        afk_os_close(fd);
        return r;
    }
    heartbeat->fd = fd;
    heartbeat->page = page;
    return 0;
}

void
afk_heartbeat_read(const struct afk_heartbeat *heartbeat, struct afk_reading *ret)
{
    const struct page *page = heartbeat->page;
    uint64_t progressing = atomic_load(&page->progressing);
    bool is_asked = progressing > 0 || atomic_load(&page->is_asked) != 0;
    ret->progressing = is_asked ? (int64_t)progressing : -1;
    ret->cpu_ns = atomic_load(&page->cpu_ns);
    ret->interval_ns = atomic_load(&page->interval_ns);
    ret->alive = atomic_load(&page->alive);
}

void
afk_heartbeat_free(struct afk_heartbeat *heartbeat)
{
    if (heartbeat->page != NULL)
        afk_os_unmap((void *)heartbeat->page, PAGE_BYTES);
    heartbeat->page = NULL;
    if (heartbeat->fd >= 0)
        afk_os_close(heartbeat->fd);
    heartbeat->fd = -1;
}

const char *
afk_verdict_name(int verdict)
{
    static const char *const names[AFK_VERDICT_COUNT] = {"running", "in_c", "waiting", "stopped"};
    return verdict >= 0 && verdict < AFK_VERDICT_COUNT ? names[verdict] : "unknown";
}

enum afk_verdict
afk_heartbeat_verdict(const struct afk_reading *before, const struct afk_reading *after)
{
    uint64_t beats = after->alive - before->alive;
    if (after->alive == 0 || beats == 0)
        return AFK_VERDICT_STOPPED;
    if (after->progressing != before->progressing)
        return AFK_VERDICT_RUNNING;
    /* What waits does not compute at all; what computes beside others may get little. */
    uint64_t passed = beats * (uint64_t)after->interval_ns;
    bool computes = after->cpu_ns - before->cpu_ns > passed / 100;
    if (after->progressing < 0)
        return computes ? AFK_VERDICT_RUNNING : AFK_VERDICT_WAITING;
    return computes ? AFK_VERDICT_IN_C : AFK_VERDICT_WAITING;
}

/* ---- the worker -------------------------------------------------------------------- */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t stop_asked;
    _Atomic(struct page *) page; /* NULL: there is no heartbeat */
    pid_t pid;
    pthread_t thread;
    clockid_t clock; /* of the thread whose time is told */
    bool (*ask)(void);
    atomic_bool unanswered;
    bool stop;
} self = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* A forked child has neither that thread nor the page, and what was asked is not for it to
 * answer. */
static void
forget_in_child(void)
{
    const pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
    atomic_store(&self.page, NULL);
    self.lock = fresh;
    self.stop = false;
}

__attribute__((constructor)) static void
loaded(void)
{
    afk_at_fork_child(forget_in_child);
}

static void
beat(struct page *page)
{
    struct timespec used;
    if (clock_gettime(self.clock, &used) == 0)
        atomic_store(&page->cpu_ns, (uint64_t)used.tv_sec * NS + (uint64_t)used.tv_nsec);
    /* Only one at a time: else the interpreter's queue would be full of them. */
    if (self.ask != NULL && !atomic_exchange(&self.unanswered, true) && !self.ask())
        atomic_store(&self.unanswered, false);
    atomic_fetch_add(&page->alive, 1);
}

/* Until `*next`, or until it is to end; moves `*next` on. True: go on. */
static bool
wait_for_next(struct timespec *next, int64_t interval_ns)
{
    struct timespec now;
    int64_t ns = next->tv_nsec + interval_ns;
    next->tv_sec += ns / NS;
    next->tv_nsec = ns % NS;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec > next->tv_sec || (now.tv_sec == next->tv_sec && now.tv_nsec > next->tv_nsec))
        *next = now; /* it was stopped for long: beats are not made up for */
    (void)pthread_mutex_lock(&self.lock);
    int r = 0;
    while (!self.stop && r == 0)
        r = pthread_cond_timedwait(&self.stop_asked, &self.lock, next);
    bool go_on = !self.stop;
    (void)pthread_mutex_unlock(&self.lock);
    return go_on;
}

static void *
beat_until_stopped(void *arg)
{
    struct page *page = arg;
    struct timespec next;
    (void)clock_gettime(CLOCK_MONOTONIC, &next);
    do
        beat(page);
    while (wait_for_next(&next, atomic_load(&page->interval_ns)));
    return NULL;
}

/* The page of an owner: checked, for it comes from a number in the environment. */
static int
map_page(int fd, struct page **ret_page)
{
    void *base = NULL;
    if (afk_os_memfd_check(fd, PAGE_BYTES) < 0)
        return -EBADF;
    int r = afk_os_map(fd, PAGE_BYTES, PAGE_BYTES, &base);
    if (r < 0)
        return r;
    struct page *page = base;
    if (page->magic != PAGE_MAGIC || page->version != 1 ||
        !is_interval(atomic_load(&page->interval_ns))) {
        afk_os_unmap(page, PAGE_BYTES);
        return -EBADF;
    }
    *ret_page = page;
    return 0;
}

static int
start_thread(struct page *page)
{
    pthread_condattr_t monotonic;
    int r = -pthread_getcpuclockid(pthread_self(), &self.clock);
    if (r < 0)
        return r;
    (void)pthread_condattr_init(&monotonic);
    (void)pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    r = -pthread_cond_init(&self.stop_asked, &monotonic);
    (void)pthread_condattr_destroy(&monotonic);
    if (r < 0)
        return r;
    self.stop = false;
    atomic_store(&self.unanswered, false);
    return afk_os_thread(&self.thread, beat_until_stopped, page, false);
}

int
afk_heartbeat_begin(int fd, int64_t interval_ns, bool (*ask)(void))
{
    struct page *page = NULL, *none = NULL;
    if (interval_ns != 0 && !is_interval(interval_ns))
        return -EINVAL;
    int r = map_page(fd, &page);
    if (r < 0)
        return r;
    if (!atomic_compare_exchange_strong(&self.page, &none, page)) {
        afk_os_unmap(page, PAGE_BYTES);
        return -EALREADY;
    }
    self.ask = ask;
    self.pid = getpid();
    if (interval_ns != 0)
        atomic_store(&page->interval_ns, interval_ns);
    atomic_store(&page->is_asked, ask != NULL);
    r = start_thread(page);
    if (r < 0) {
        atomic_store(&self.page, NULL);
        afk_os_unmap(page, PAGE_BYTES);
    }
    return r;
}

void
afk_heartbeat_answer(void)
{
    struct page *page = atomic_load(&self.page);
    if (page == NULL || getpid() != self.pid) /* no handler runs in a child of clone(2) */
        return;
    atomic_fetch_add(&page->progressing, 1);
    atomic_store(&self.unanswered, false);
}

void
afk_heartbeat_end(void)
{
    struct page *page = atomic_load(&self.page);
    if (page == NULL)
        return;
    (void)pthread_mutex_lock(&self.lock);
    self.stop = true;
    (void)pthread_cond_signal(&self.stop_asked);
    (void)pthread_mutex_unlock(&self.lock);
    (void)pthread_join(self.thread, NULL);
    /* The page stays mapped: an answer may be on its way. */
    atomic_store(&self.page, NULL);
}

/* The number in the environment; -ENOENT: none; -EBADF. */
static int
announced(void)
{
    const char *text = getenv("ANYFORK_HEARTBEAT_FD");
    char *end = NULL;
    if (text == NULL)
        return -ENOENT;
    errno = 0;
    long fd = strtol(text, &end, 10);
    return errno != 0 || end == text || *end != '\0' || fd < 0 || fd > INT_MAX ? -EBADF : (int)fd;
}

int
anyfork_heartbeat_begin(int fd, int64_t interval_ns, struct anyfork_error *reterr)
{
    if (fd < 0)
        fd = announced();
    if (fd == -ENOENT)
        return 0;
    int r = fd < 0 ? fd : afk_heartbeat_begin(fd, interval_ns, NULL);
    if (r == -EINVAL)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0,
                        "interval_ns: from 1000000 (1 ms) to an hour; 0: as its owner asks");
    if (r == -EALREADY)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0,
                        "this process has a heartbeat already");
    if (r == -EBADF)
        return AFK_FAIL(reterr, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0,
                        "fd: no heartbeat of anyfork, or of another version");
    if (r < 0)
        return AFK_FAIL(reterr, ANYFORK_ESYSTEM, ANYFORK_STAGE_OPTION, -r, "heartbeat");
    return 0;
}

void
anyfork_heartbeat_progress(void)
{
    afk_heartbeat_answer();
}
