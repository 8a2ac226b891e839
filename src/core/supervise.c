/* A supervisor as a table of states and events: see supervise.h. */
#include "supervise.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

/* What becomes of a child that has ended because it was told to. */
enum after {
    AFTER_FAILURE, /* as if it had died by itself */
    AFTER_QUEUE,   /* it is started when it is its turn */
    AFTER_START,   /* at once */
    AFTER_DONE,
    AFTER_REMOVE,  /* the same, and it is no child any more */
};

struct child {
    struct afk_sv_child spec;
    int state;
    int after;
    bool down;          /* it is stopped when it is its turn, the last one first */
    bool in_sweep;      /* those behind it wait until it is ready */
    bool removed;
    bool held;          /* by the kernel, though it was killed */
    int pending;        /* STOP or KILL, which came while it was started; or -1 */
    int64_t deadline;   /* of its state */
    int64_t look_at;
    int64_t ready_at;
    uint32_t failures;  /* in a row */
    bool has_reading;
    struct afk_reading reading;
    int verdict;        /* -1: none yet */
    int64_t verdict_since;
};

enum phase { PHASE_NEW, PHASE_RUNNING, PHASE_STOPPING, PHASE_FINISHED };

struct afk_supervisor {
    struct afk_sv_spec spec; /* without its children */
    struct child *children;
    size_t n;
    enum phase phase;
    bool gave_up;
    uint32_t culprit;
    bool say_all_ready;
    int64_t hold_until;      /* nobody's turn comes before */
    int64_t most_ns;
    int64_t restarts[AFK_SV_INTENSITY_MAX]; /* when the last ones were, in a ring */
    size_t n_restarts;
    struct afk_supervisor *next; /* a reload that has not taken place; only its children */
    struct afk_sv_out *queue;
    size_t queue_size, queue_head, queue_end;
};

static const char *const state_names[AFK_SV_STATES] = {
    [AFK_SV_QUEUED] = "queued",     [AFK_SV_STARTING] = "starting", [AFK_SV_UNREADY] = "unready",
    [AFK_SV_READY] = "ready",       [AFK_SV_STOPPING] = "stopping", [AFK_SV_KILLED] = "killed",
    [AFK_SV_BACKOFF] = "backoff",   [AFK_SV_DONE] = "done",
};
static const char *const kind_names[AFK_SV_KINDS] = {
    [AFK_SV_DO_START] = "start",
    [AFK_SV_DO_SIGNAL] = "signal",
    [AFK_SV_DO_LOOK] = "look",
    [AFK_SV_DO_FORGET] = "forget",
    [AFK_SV_SAY_STARTED] = "started",
    [AFK_SV_SAY_READY] = "ready",
    [AFK_SV_SAY_NOT_STARTED] = "not_started",
    [AFK_SV_SAY_EXITED] = "exited",
    [AFK_SV_SAY_DIED] = "died",
    [AFK_SV_SAY_STOPPED] = "stopped",
    [AFK_SV_SAY_STOPPING] = "stopping",
    [AFK_SV_SAY_NOT_READY] = "not_ready",
    [AFK_SV_SAY_LATE] = "late",
    [AFK_SV_SAY_KILLING] = "killing",
    [AFK_SV_SAY_HELD] = "held",
    [AFK_SV_SAY_RESTARTING] = "restarting",
    [AFK_SV_SAY_DONE] = "done",
    [AFK_SV_SAY_ALL_READY] = "all_ready",
    [AFK_SV_SAY_GIVING_UP] = "giving_up",
    [AFK_SV_SAY_SHUTDOWN] = "shutdown",
    [AFK_SV_SAY_RELOADED] = "reloaded",
    [AFK_SV_SAY_FINISHED] = "finished",
};

const char *
afk_sv_state_name(int state)
{
    return state >= 0 && state < AFK_SV_STATES ? state_names[state] : "unknown";
}

const char *
afk_sv_kind_name(int kind)
{
    return kind >= 0 && kind < AFK_SV_KINDS ? kind_names[kind] : "unknown";
}

/* ---- small things ------------------------------------------------------------------ */

static int64_t
later(int64_t now, int64_t ns)
{
    return ns >= AFK_SV_FOREVER - now ? AFK_SV_FOREVER : now + ns;
}

static int64_t
least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static void
put(struct afk_supervisor *s, int kind, const struct child *c, int value, int64_t ns)
{
    if (s->queue_end == s->queue_size)
        abort(); /* the caller has not emptied it: see queue_room() */
    s->queue[s->queue_end++] =
        (struct afk_sv_out){.kind = kind, .id = c != NULL ? c->spec.id : 0, .value = value, .ns = ns};
}

/* Of one call: all deadlines of a child can come in it, each with a few words. */
static size_t
queue_room(size_t n_children)
{
    return 12 * n_children + 16;
}

static bool
has_process(const struct child *c)
{
    return c->state == AFK_SV_STARTING || c->state == AFK_SV_UNREADY || c->state == AFK_SV_READY ||
           c->state == AFK_SV_STOPPING || c->state == AFK_SV_KILLED;
}

static void
enter(struct child *c, int state, int64_t deadline)
{
    c->state = state;
    c->deadline = deadline;
    if (state != AFK_SV_UNREADY && state != AFK_SV_READY)
        c->look_at = AFK_SV_FOREVER;
}

static struct child *
find(struct child *children, size_t n, uint32_t id)
{
    for (size_t i = 0; i < n; i++)
        if (children[i].spec.id == id)
            return &children[i];
    return NULL;
}

/* ---- steps of one child ------------------------------------------------------------ */

static void dispatch(struct afk_supervisor *s, struct child *c, int event, int64_t now);
static void fail(struct afk_supervisor *s, struct child *c, int64_t now);

static void
start(struct afk_supervisor *s, struct child *c)
{
    enter(c, AFK_SV_STARTING, AFK_SV_FOREVER);
    c->pending = -1;
    c->held = false;
    c->has_reading = false;
    c->verdict = -1;
    put(s, AFK_SV_DO_START, c, 0, 0);
}

static void
queue(struct child *c)
{
    enter(c, AFK_SV_QUEUED, AFK_SV_FOREVER);
    c->in_sweep = true;
}

static void
done(struct afk_supervisor *s, struct child *c)
{
    bool was = c->state == AFK_SV_DONE;
    enter(c, AFK_SV_DONE, AFK_SV_FOREVER);
    c->in_sweep = false;
    c->down = false;
    if (!was && s->phase == PHASE_RUNNING && !c->removed)
        put(s, AFK_SV_SAY_DONE, c, 0, 0);
}

/* It has no process (any more), as it was told to. */
static void
conclude(struct afk_supervisor *s, struct child *c, int64_t now)
{
    c->down = false;
    switch (c->after) {
    case AFTER_FAILURE:
        fail(s, c, now);
        break;
    case AFTER_QUEUE:
        queue(c);
        break;
    case AFTER_START:
        start(s, c);
        break;
    case AFTER_REMOVE:
        c->removed = true;
        done(s, c);
        break;
    default:
        done(s, c);
        break;
    }
}

static void
kill_it(struct afk_supervisor *s, struct child *c, int64_t now)
{
    enter(c, AFK_SV_KILLED, later(now, AFK_SV_HELD_NS));
    put(s, AFK_SV_DO_SIGNAL, c, SIGKILL, 0);
}

static void
stop_it(struct afk_supervisor *s, struct child *c, int64_t now)
{
    int64_t grace = least(c->spec.grace_ns, s->most_ns);
    put(s, AFK_SV_SAY_STOPPING, c, grace > 0 ? c->spec.stop_signal : SIGKILL, 0);
    if (grace == 0) {
        kill_it(s, c, now);
        return;
    }
    enter(c, AFK_SV_STOPPING, later(now, grace));
    put(s, AFK_SV_DO_SIGNAL, c, c->spec.stop_signal, 0);
}

static void
be_ready(struct afk_supervisor *s, struct child *c, int64_t now)
{
    enter(c, AFK_SV_READY, AFK_SV_FOREVER);
    c->ready_at = now;
    c->in_sweep = false;
    put(s, AFK_SV_SAY_READY, c, 0, 0);
}

/* ---- restarts -------------------------------------------------------------------------- */

/* Of the restarts in the last period, with this one: too many? */
static bool
is_one_too_many(struct afk_supervisor *s, int64_t now)
{
    uint32_t most = s->spec.intensity;
    if (most == AFK_SV_UNLIMITED)
        return false;
    size_t recent = 0;
    for (size_t i = 0; i < s->n_restarts && i < AFK_SV_INTENSITY_MAX; i++)
        recent += now - s->restarts[i] <= s->spec.period_ns;
    s->restarts[s->n_restarts++ % AFK_SV_INTENSITY_MAX] = now;
    if (s->n_restarts == 2 * AFK_SV_INTENSITY_MAX)
        s->n_restarts = AFK_SV_INTENSITY_MAX;
    return recent + 1 > most;
}

static int64_t
delay_of(const struct child *c)
{
    int64_t ns = c->spec.backoff_ns;
    for (uint32_t i = 1; i < c->failures && ns < c->spec.backoff_max_ns; i++)
        ns *= 2;
    return least(ns, c->spec.backoff_max_ns);
}

static bool
is_in_group(const struct afk_supervisor *s, size_t i, size_t of)
{
    return i == of || s->spec.strategy == AFK_SV_ONE_FOR_ALL ||
           (s->spec.strategy == AFK_SV_REST_FOR_ONE && i > of);
}

/* A reload has no place for it. */
static bool
is_leaving(const struct child *c)
{
    return c->removed || (c->after == AFTER_REMOVE && c->down);
}

/* One that goes down and is started again when it is its turn, if it is started again. */
static void
take_down(struct afk_supervisor *s, struct child *c, int64_t now)
{
    if (is_leaving(c))
        return;
    bool again = c->spec.restart != AFK_SV_TEMPORARY;
    if (!again && c->state == AFK_SV_DONE)
        return;
    c->after = again ? AFTER_QUEUE : AFTER_DONE;
    c->in_sweep = again;
    if (has_process(c))
        c->down = true;
    else
        conclude(s, c, now);
}

static void
take_down_group(struct afk_supervisor *s, const struct child *of, int64_t now)
{
    size_t first = (size_t)(of - s->children);
    for (size_t i = 0; i < s->n; i++)
        if (i != first && is_in_group(s, i, first))
            take_down(s, &s->children[i], now);
}

static void
stop_all(struct afk_supervisor *s, int64_t most_ns, int64_t now)
{
    if (s->phase == PHASE_FINISHED)
        return;
    if (s->phase != PHASE_STOPPING)
        put(s, AFK_SV_SAY_SHUTDOWN, NULL, 0, 0);
    s->phase = PHASE_STOPPING;
    s->most_ns = least(s->most_ns, most_ns);
    afk_sv_free(s->next);
    s->next = NULL;
    for (size_t i = 0; i < s->n; i++) {
        struct child *c = &s->children[i];
        c->after = AFTER_DONE;
        c->down = has_process(c) && !c->held;
        if (!c->down)
            done(s, c);
        else if (c->state == AFK_SV_STOPPING)
            c->deadline = least(c->deadline, later(now, most_ns));
    }
}

static void
give_up(struct afk_supervisor *s, struct child *c, int64_t now)
{
    s->gave_up = true;
    s->culprit = c->spec.id;
    put(s, AFK_SV_SAY_GIVING_UP, c, 0, 0);
    enter(c, AFK_SV_DONE, AFK_SV_FOREVER);
    stop_all(s, s->most_ns, now);
}

/* It has ended, and should not have: whether and when it is started again. */
static void
fail(struct afk_supervisor *s, struct child *c, int64_t now)
{
    if (s->phase == PHASE_STOPPING || c->spec.restart == AFK_SV_TEMPORARY) {
        done(s, c);
        return;
    }
    if (c->failures < UINT32_MAX)
        c->failures++;
    if (is_one_too_many(s, now)) {
        give_up(s, c, now);
        return;
    }
    int64_t delay = delay_of(c);
    put(s, AFK_SV_SAY_RESTARTING, c, 0, delay);
    if (s->spec.strategy == AFK_SV_ONE_FOR_ONE) {
        enter(c, AFK_SV_BACKOFF, later(now, delay));
        return;
    }
    queue(c);
    take_down_group(s, c, now);
    int64_t until = later(now, delay);
    s->hold_until = until > s->hold_until ? until : s->hold_until;
}

/* ---- the table ------------------------------------------------------------------------- */

static void
on_started(struct afk_supervisor *s, struct child *c, int64_t now)
{
    int pending = c->pending;
    c->pending = -1;
    put(s, AFK_SV_SAY_STARTED, c, 0, 0);
    enter(c, AFK_SV_UNREADY, later(now, c->spec.ready_ns));
    c->look_at = c->spec.look_ns > 0 ? later(now, c->spec.look_ns) : AFK_SV_FOREVER;
    if (pending >= 0)
        dispatch(s, c, pending, now);
    else if (!c->spec.reports_ready)
        be_ready(s, c, now);
}

static void
on_not_started(struct afk_supervisor *s, struct child *c, int64_t now)
{
    put(s, AFK_SV_SAY_NOT_STARTED, c, 0, 0);
    if (c->down || c->pending >= 0)
        conclude(s, c, now);
    else
        fail(s, c, now);
}

static void
on_ready(struct afk_supervisor *s, struct child *c, int64_t now)
{
    be_ready(s, c, now);
}

static void
end_by_itself(struct afk_supervisor *s, struct child *c, bool well, int64_t now)
{
    put(s, well ? AFK_SV_SAY_EXITED : AFK_SV_SAY_DIED, c, 0, 0);
    if (c->state == AFK_SV_READY && now - c->ready_at >= c->spec.healthy_ns)
        c->failures = 0;
    if (c->down)
        conclude(s, c, now);
    else if (c->spec.restart == AFK_SV_PERMANENT || (c->spec.restart == AFK_SV_TRANSIENT && !well))
        fail(s, c, now);
    else
        done(s, c);
}

static void
on_exited(struct afk_supervisor *s, struct child *c, int64_t now)
{
    end_by_itself(s, c, true, now);
}

static void
on_died(struct afk_supervisor *s, struct child *c, int64_t now)
{
    end_by_itself(s, c, false, now);
}

/* It has ended because it was told to. */
static void
on_gone(struct afk_supervisor *s, struct child *c, int64_t now)
{
    put(s, c->after == AFTER_FAILURE ? AFK_SV_SAY_DIED : AFK_SV_SAY_STOPPED, c, 0, 0);
    conclude(s, c, now);
}

static void
on_ready_late(struct afk_supervisor *s, struct child *c, int64_t now)
{
    put(s, AFK_SV_SAY_NOT_READY, c, 0, 0);
    if (!c->down)
        c->after = AFTER_FAILURE;
    stop_it(s, c, now);
}

static void
on_late(struct afk_supervisor *s, struct child *c, int64_t now)
{
    put(s, AFK_SV_SAY_LATE, c, c->verdict, 0);
    if (now - c->ready_at >= c->spec.healthy_ns)
        c->failures = 0;
    if (!c->down)
        c->after = AFTER_FAILURE;
    kill_it(s, c, now);
}

static void
on_stop(struct afk_supervisor *s, struct child *c, int64_t now)
{
    stop_it(s, c, now);
}

static void
on_kill(struct afk_supervisor *s, struct child *c, int64_t now)
{
    kill_it(s, c, now);
}

static void
on_grace_over(struct afk_supervisor *s, struct child *c, int64_t now)
{
    put(s, AFK_SV_SAY_KILLING, c, 0, 0);
    kill_it(s, c, now);
}

/* Its process is not there yet: once it is. */
static void
on_stop_too_early(struct afk_supervisor *s, struct child *c, int64_t now)
{
    (void)s;
    (void)now;
    if (c->pending < 0)
        c->pending = AFK_SV_STOP;
}

static void
on_kill_too_early(struct afk_supervisor *s, struct child *c, int64_t now)
{
    (void)s;
    (void)now;
    c->pending = AFK_SV_KILL;
}

static void
on_held(struct afk_supervisor *s, struct child *c, int64_t now)
{
    (void)now;
    put(s, AFK_SV_SAY_HELD, c, 0, 0);
    c->held = true;
    c->deadline = AFK_SV_FOREVER;
    if (s->phase == PHASE_STOPPING)
        done(s, c);
}

static void
on_its_time(struct afk_supervisor *s, struct child *c, int64_t now)
{
    (void)now;
    start(s, c);
}

typedef void handler(struct afk_supervisor *s, struct child *c, int64_t now);

/* What is not in it is ignored: news that come too late, and what is so already. */
static handler *const table[AFK_SV_STATES][AFK_SV_EVENTS] = {
    [AFK_SV_QUEUED] = {[AFK_SV_STOP] = conclude, [AFK_SV_KILL] = conclude},
    [AFK_SV_STARTING] = {[AFK_SV_STARTED] = on_started, [AFK_SV_FAILED] = on_not_started,
                         [AFK_SV_STOP] = on_stop_too_early, [AFK_SV_KILL] = on_kill_too_early},
    [AFK_SV_UNREADY] = {[AFK_SV_IS_READY] = on_ready, [AFK_SV_EXITED] = on_exited,
                        [AFK_SV_DIED] = on_died, [AFK_SV_DUE] = on_ready_late,
                        [AFK_SV_STOP] = on_stop, [AFK_SV_KILL] = on_kill},
    [AFK_SV_READY] = {[AFK_SV_EXITED] = on_exited, [AFK_SV_DIED] = on_died,
                      [AFK_SV_LATE] = on_late, [AFK_SV_STOP] = on_stop, [AFK_SV_KILL] = on_kill},
    [AFK_SV_STOPPING] = {[AFK_SV_EXITED] = on_gone, [AFK_SV_DIED] = on_gone,
                         [AFK_SV_DUE] = on_grace_over, [AFK_SV_KILL] = on_kill},
    [AFK_SV_KILLED] = {[AFK_SV_EXITED] = on_gone, [AFK_SV_DIED] = on_gone, [AFK_SV_DUE] = on_held},
    [AFK_SV_BACKOFF] = {[AFK_SV_DUE] = on_its_time, [AFK_SV_STOP] = conclude,
                        [AFK_SV_KILL] = conclude},
    [AFK_SV_DONE] = {[AFK_SV_STOP] = conclude},
};

static void
dispatch(struct afk_supervisor *s, struct child *c, int event, int64_t now)
{
    handler *handle = table[c->state][event];
    if (handle != NULL)
        handle(s, c, now);
}

/* ---- turns ----------------------------------------------------------------------------- */

static bool
all_are(const struct afk_supervisor *s, int state, int or_state)
{
    for (size_t i = 0; i < s->n; i++)
        if (s->children[i].state != state && s->children[i].state != or_state)
            return false;
    return true;
}

/* Who is to go down, the last one first and one at a time. False: nobody is left. */
static bool
go_down(struct afk_supervisor *s, int64_t now)
{
    for (size_t i = s->n; i-- > 0;) {
        struct child *c = &s->children[i];
        if (!c->down)
            continue;
        if (c->state != AFK_SV_STOPPING && c->state != AFK_SV_KILLED)
            dispatch(s, c, AFK_SV_STOP, now);
        return true;
    }
    return false;
}

/* The first of those that wait for their turn, unless one before it is not ready yet. */
static void
go_up(struct afk_supervisor *s)
{
    for (size_t i = 0; i < s->n; i++) {
        struct child *c = &s->children[i];
        if (!c->in_sweep)
            continue;
        if (c->state == AFK_SV_QUEUED)
            start(s, c);
        return;
    }
}

/* The new children take the place of the old ones. */
static void
swap(struct afk_supervisor *s)
{
    struct afk_supervisor *next = s->next;
    for (size_t i = 0; i < next->n; i++) {
        struct child *c = &next->children[i];
        const struct child *old = find(s->children, s->n, c->spec.id);
        if (old != NULL) {
            const struct afk_sv_child spec = c->spec;
            *c = *old;
            c->spec = spec;
        }
        else {
            queue(c);
        }
    }
    for (size_t i = 0; i < s->n; i++)
        if (find(next->children, next->n, s->children[i].spec.id) == NULL)
            put(s, AFK_SV_DO_FORGET, &s->children[i], 0, 0);
    struct child *old = s->children;
    s->children = next->children;
    s->n = next->n;
    s->spec = next->spec;
    next->children = old;
    afk_sv_free(next);
    s->next = NULL;
    s->say_all_ready = true;
    put(s, AFK_SV_SAY_RELOADED, NULL, 0, 0);
}

static void
advance(struct afk_supervisor *s, int64_t now)
{
    if (now >= s->hold_until)
        s->hold_until = 0;
    if (s->phase == PHASE_NEW || s->phase == PHASE_FINISHED || go_down(s, now))
        return;
    if (s->next != NULL)
        swap(s);
    if (all_are(s, AFK_SV_DONE, AFK_SV_DONE)) {
        s->phase = PHASE_FINISHED;
        put(s, AFK_SV_SAY_FINISHED, NULL, 0, 0);
        return;
    }
    if (s->hold_until == 0)
        go_up(s);
    if (s->say_all_ready && all_are(s, AFK_SV_READY, AFK_SV_DONE)) {
        s->say_all_ready = false;
        put(s, AFK_SV_SAY_ALL_READY, NULL, 0, 0);
    }
}

/* ---- what comes in ---------------------------------------------------------------------- */

static bool
is_duration(int64_t ns)
{
    return ns >= 0;
}

static const char *
check_child(const struct afk_sv_child *child)
{
    if (child->restart < AFK_SV_PERMANENT || child->restart > AFK_SV_TEMPORARY)
        return "restart: none of enum afk_sv_restart";
    if (child->stop_signal < 1 || child->stop_signal > SIGRTMAX)
        return "stop_signal: not a signal";
    if (!is_duration(child->ready_ns) || !is_duration(child->grace_ns) ||
        !is_duration(child->backoff_ns) || !is_duration(child->healthy_ns) ||
        !is_duration(child->look_ns))
        return "a duration is negative";
    if (child->backoff_max_ns < child->backoff_ns || child->backoff_max_ns > AFK_SV_FOREVER / 4)
        return "backoff_max: less than backoff, or too long";
    for (int i = 0; i < AFK_VERDICT_COUNT; i++)
        if (child->limit_ns[i] <= 0)
            return "limit: a verdict may not last at all";
    return NULL;
}

const char *
afk_sv_check(const struct afk_sv_spec *spec)
{
    if (spec->strategy < AFK_SV_ONE_FOR_ONE || spec->strategy > AFK_SV_REST_FOR_ONE)
        return "strategy: none of enum afk_sv_strategy";
    if (spec->intensity > AFK_SV_INTENSITY_MAX && spec->intensity != AFK_SV_UNLIMITED)
        return "intensity: at most 1000, or unlimited";
    if (spec->period_ns <= 0)
        return "period: must be positive";
    if (spec->n_children == 0 || spec->n_children > AFK_SV_CHILDREN_MAX)
        return "children: from 1 to 10000";
    for (size_t i = 0; i < spec->n_children; i++) {
        const char *wrong = check_child(&spec->children[i]);
        if (wrong != NULL)
            return wrong;
        for (size_t j = 0; j < i; j++)
            if (spec->children[j].id == spec->children[i].id)
                return "id: twice";
    }
    return NULL;
}

struct afk_supervisor *
afk_sv_new(const struct afk_sv_spec *spec)
{
    struct afk_supervisor *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->spec = *spec;
    s->spec.children = NULL;
    s->n = spec->n_children;
    s->most_ns = AFK_SV_FOREVER;
    s->queue_size = queue_room(s->n);
    s->children = calloc(s->n, sizeof *s->children);
    s->queue = calloc(s->queue_size, sizeof *s->queue);
    if (s->children == NULL || s->queue == NULL) {
        afk_sv_free(s);
        return NULL;
    }
    for (size_t i = 0; i < s->n; i++) {
        struct child *c = &s->children[i];
        c->spec = spec->children[i];
        c->pending = c->verdict = -1;
        c->look_at = AFK_SV_FOREVER;
        queue(c);
    }
    return s;
}

void
afk_sv_free(struct afk_supervisor *s)
{
    if (s == NULL)
        return;
    afk_sv_free(s->next);
    free(s->children);
    free(s->queue);
    free(s);
}

void
afk_sv_start(struct afk_supervisor *s, int64_t now)
{
    if (s->phase != PHASE_NEW)
        return;
    s->phase = PHASE_RUNNING;
    s->say_all_ready = true;
    advance(s, now);
}

int
afk_sv_event(struct afk_supervisor *s, uint32_t id, int event, int64_t now)
{
    struct child *c = find(s->children, s->n, id);
    if (event < AFK_SV_STARTED || event > AFK_SV_DIED)
        return -EINVAL;
    if (c == NULL)
        return -ESRCH;
    dispatch(s, c, event, now);
    advance(s, now);
    return 0;
}

int
afk_sv_beat(struct afk_supervisor *s, uint32_t id, const struct afk_reading *reading, int64_t now)
{
    struct child *c = find(s->children, s->n, id);
    if (c == NULL)
        return -ESRCH;
    struct afk_reading before = c->reading;
    bool had_one = c->has_reading;
    c->reading = *reading;
    c->has_reading = true;
    if (c->state != AFK_SV_READY || !had_one)
        return 0;
    int verdict = (int)afk_heartbeat_verdict(&before, reading);
    if (verdict != c->verdict) {
        c->verdict = verdict;
        c->verdict_since = now;
    }
    if (now - c->verdict_since >= c->spec.limit_ns[verdict]) {
        dispatch(s, c, AFK_SV_LATE, now);
        advance(s, now);
    }
    return 0;
}

void
afk_sv_tick(struct afk_supervisor *s, int64_t now)
{
    for (size_t i = 0; i < s->n; i++) {
        struct child *c = &s->children[i];
        if (c->deadline <= now)
            dispatch(s, c, AFK_SV_DUE, now);
        if (c->look_at <= now) {
            c->look_at = later(now, c->spec.look_ns);
            put(s, AFK_SV_DO_LOOK, c, 0, 0);
        }
    }
    advance(s, now);
}

int
afk_sv_restart(struct afk_supervisor *s, uint32_t id, int64_t now)
{
    struct child *c = find(s->children, s->n, id);
    if (c == NULL)
        return -ESRCH;
    if (s->phase != PHASE_RUNNING || is_leaving(c))
        return 0;
    c->failures = 0;
    if (s->spec.strategy == AFK_SV_ONE_FOR_ONE) {
        c->after = AFTER_START;
        dispatch(s, c, AFK_SV_STOP, now);
    }
    else {
        c->after = AFTER_QUEUE;
        c->in_sweep = true;
        if (has_process(c))
            c->down = true;
        else
            conclude(s, c, now);
        take_down_group(s, c, now);
    }
    advance(s, now);
    return 0;
}

void
afk_sv_stop(struct afk_supervisor *s, int64_t most_ns, int64_t now)
{
    if (s->phase == PHASE_NEW)
        s->phase = PHASE_RUNNING;
    stop_all(s, most_ns, now);
    advance(s, now);
}

void
afk_sv_kill(struct afk_supervisor *s, int64_t now)
{
    if (s->phase == PHASE_NEW)
        s->phase = PHASE_RUNNING;
    stop_all(s, 0, now);
    for (size_t i = 0; i < s->n; i++)
        if (s->children[i].down)
            dispatch(s, &s->children[i], AFK_SV_KILL, now);
    advance(s, now);
}

/* Those that a reload ends: with their group, if they are started again. */
static void
take_down_for(struct afk_supervisor *s, const struct afk_sv_spec *spec, const bool *restart,
              int64_t now)
{
    for (size_t i = 0; i < s->n; i++) {
        struct child *c = &s->children[i];
        size_t at = 0;
        while (at < spec->n_children && spec->children[at].id != c->spec.id)
            at++;
        if (at == spec->n_children) {
            c->after = AFTER_REMOVE;
            c->down = has_process(c);
            if (!c->down)
                conclude(s, c, now);
        }
        else if (restart[at]) {
            c->failures = 0;
            c->after = AFTER_QUEUE;
            c->in_sweep = true;
            c->down = has_process(c);
            if (!c->down)
                conclude(s, c, now);
            take_down_group(s, c, now);
        }
    }
}

int
afk_sv_reload(struct afk_supervisor *s, const struct afk_sv_spec *spec, const bool *restart,
              int64_t now)
{
    if (s->phase != PHASE_RUNNING)
        return 0;
    if (s->next != NULL)
        return -EBUSY;
    size_t room = queue_room(s->n + spec->n_children);
    struct afk_sv_out *larger = realloc(s->queue, room * sizeof *larger);
    if (larger == NULL)
        return -ENOMEM;
    s->queue = larger;
    s->queue_size = room;
    s->next = afk_sv_new(spec);
    if (s->next == NULL)
        return -ENOMEM;
    take_down_for(s, spec, restart, now);
    advance(s, now);
    return 0;
}

/* ---- what comes out --------------------------------------------------------------------- */

bool
afk_sv_next(struct afk_supervisor *s, struct afk_sv_out *ret)
{
    if (s->queue_head == s->queue_end) {
        s->queue_head = s->queue_end = 0;
        return false;
    }
    *ret = s->queue[s->queue_head++];
    return true;
}

int64_t
afk_sv_next_deadline(const struct afk_supervisor *s)
{
    int64_t next = AFK_SV_FOREVER;
    if (s->phase == PHASE_NEW || s->phase == PHASE_FINISHED)
        return next;
    if (s->hold_until > 0)
        next = s->hold_until;
    for (size_t i = 0; i < s->n; i++)
        next = least(next, least(s->children[i].deadline, s->children[i].look_at));
    return next;
}

bool
afk_sv_is_finished(const struct afk_supervisor *s)
{
    return s->phase == PHASE_FINISHED;
}

bool
afk_sv_gave_up(const struct afk_supervisor *s, uint32_t *ret_id)
{
    if (s->gave_up)
        *ret_id = s->culprit;
    return s->gave_up;
}

bool
afk_sv_is_reloading(const struct afk_supervisor *s)
{
    return s->next != NULL;
}

bool
afk_sv_view(const struct afk_supervisor *s, size_t index, struct afk_sv_view *ret)
{
    if (index >= s->n)
        return false;
    const struct child *c = &s->children[index];
    *ret = (struct afk_sv_view){.id = c->spec.id,
                                .state = c->state,
                                .verdict = c->state == AFK_SV_READY ? c->verdict : -1,
                                .failures = c->failures};
    return true;
}
