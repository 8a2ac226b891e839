/*
 * A supervisor as a table: what it does about each event of each of its children, and what
 * it does for all of them together. No process is touched and no clock is read here: the
 * time comes with each call, and what is to be done goes out as a queue of actions and
 * events.
 *
 * Rule: after each call that may change something the caller takes all that is in the
 * queue, carries out its actions, and calls again by afk_sv_next_deadline() at the latest.
 */
#ifndef AFK_SUPERVISE_H
#define AFK_SUPERVISE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/heartbeat.h"

#define AFK_SV_CHILDREN_MAX 10000
#define AFK_SV_FOREVER INT64_MAX /* no deadline; as a grace: no kill */
#define AFK_SV_UNLIMITED UINT32_MAX
#define AFK_SV_INTENSITY_MAX 1000
/* After a SIGKILL: what the kernel does not end by then is told, and not waited for. */
#define AFK_SV_HELD_NS ((int64_t)10 * 1000000000)

enum afk_sv_strategy { AFK_SV_ONE_FOR_ONE, AFK_SV_ONE_FOR_ALL, AFK_SV_REST_FOR_ONE };
enum afk_sv_restart { AFK_SV_PERMANENT, AFK_SV_TRANSIENT, AFK_SV_TEMPORARY };

struct afk_sv_child {
    uint32_t id;          /* the caller's; unique */
    int32_t restart;      /* enum afk_sv_restart */
    int32_t stop_signal;
    bool reports_ready;   /* else it is ready once it has started */
    int64_t ready_ns;     /* in which it has to be ready; FOREVER */
    int64_t grace_ns;     /* between the stop signal and the kill; 0: killed at once; FOREVER */
    int64_t backoff_ns;   /* before its first restart; doubled with each one more */
    int64_t backoff_max_ns;
    int64_t healthy_ns;   /* ready for so long, it begins anew */
    int64_t look_ns;      /* between looks at its heartbeat; 0: it has none */
    int64_t limit_ns[AFK_VERDICT_COUNT]; /* how long each verdict may last; FOREVER */
};

struct afk_sv_spec {
    int32_t strategy;     /* enum afk_sv_strategy */
    uint32_t intensity;   /* restarts in period_ns that are not too many; UNLIMITED */
    int64_t period_ns;
    const struct afk_sv_child *children; /* in the order of their start */
    size_t n_children;
};

/* Of one child. docs/supervision.md has the table. */
enum afk_sv_state {
    AFK_SV_QUEUED,   /* to be started when it is its turn */
    AFK_SV_STARTING, /* the caller starts it */
    AFK_SV_UNREADY,  /* it runs, and is not ready yet */
    AFK_SV_READY,
    AFK_SV_STOPPING, /* it got its stop signal */
    AFK_SV_KILLED,   /* it got SIGKILL */
    AFK_SV_BACKOFF,  /* to be started at a time */
    AFK_SV_DONE,     /* it has ended for good */
    AFK_SV_STATES
};
enum afk_sv_event {
    AFK_SV_STARTED,
    AFK_SV_FAILED,   /* it could not be started */
    AFK_SV_IS_READY,
    AFK_SV_EXITED,   /* well */
    AFK_SV_DIED,     /* or not */
    AFK_SV_DUE,      /* the deadline of its state has come */
    AFK_SV_LATE,     /* a verdict on its heartbeat has lasted too long */
    AFK_SV_STOP,     /* it is to end; what then is in `after` */
    AFK_SV_KILL,     /* at once */
    AFK_SV_EVENTS
};
const char *afk_sv_state_name(int state);

/* What comes out. */
enum afk_sv_kind {
    /* to be done */
    AFK_SV_DO_START,
    AFK_SV_DO_SIGNAL, /* value: the signal */
    AFK_SV_DO_LOOK,   /* at its heartbeat, for afk_sv_beat() */
    AFK_SV_DO_FORGET, /* it is none of the children any more */
    /* to be told */
    AFK_SV_SAY_STARTED,
    AFK_SV_SAY_READY,
    AFK_SV_SAY_NOT_STARTED,
    AFK_SV_SAY_EXITED,
    AFK_SV_SAY_DIED,
    AFK_SV_SAY_STOPPED,    /* it has ended as it was asked to */
    AFK_SV_SAY_STOPPING,   /* value: the signal */
    AFK_SV_SAY_NOT_READY,  /* in time */
    AFK_SV_SAY_LATE,       /* value: the verdict */
    AFK_SV_SAY_KILLING,    /* its grace is over */
    AFK_SV_SAY_HELD,       /* the kernel does not end it */
    AFK_SV_SAY_RESTARTING, /* ns: after which delay */
    AFK_SV_SAY_DONE,       /* it is not started again */
    /* of the supervisor itself */
    AFK_SV_SAY_ALL_READY,
    AFK_SV_SAY_GIVING_UP,  /* id: whose restart was one too many */
    AFK_SV_SAY_SHUTDOWN,
    AFK_SV_SAY_RELOADED,
    AFK_SV_SAY_FINISHED,
    AFK_SV_KINDS
};
const char *afk_sv_kind_name(int kind);
struct afk_sv_out {
    int kind;
    uint32_t id;
    int value;
    int64_t ns;
};

struct afk_supervisor;
/* What is wrong with a spec, naming the member; NULL: nothing. */
const char *afk_sv_check(const struct afk_sv_spec *spec);
/* A copy of the spec, which has been checked. NULL: no memory. Nothing starts yet. */
struct afk_supervisor *afk_sv_new(const struct afk_sv_spec *spec);
void afk_sv_free(struct afk_supervisor *s);

void afk_sv_start(struct afk_supervisor *s, int64_t now);
/* STARTED to DIED of the child with that id; -ESRCH: there is none. What cannot be in the
 * child's state is ignored. */
int afk_sv_event(struct afk_supervisor *s, uint32_t id, int event, int64_t now);
int afk_sv_beat(struct afk_supervisor *s, uint32_t id, const struct afk_reading *reading,
                int64_t now);
/* All deadlines that have come. */
void afk_sv_tick(struct afk_supervisor *s, int64_t now);
/* Stop that child, or those that go with it by the strategy, and start them again; not
 * counted as a failure. */
int afk_sv_restart(struct afk_supervisor *s, uint32_t id, int64_t now);
/* Stop all, the last one first. `most_ns`: no grace is longer. */
void afk_sv_stop(struct afk_supervisor *s, int64_t most_ns, int64_t now);
/* Kill all, at once. */
void afk_sv_kill(struct afk_supervisor *s, int64_t now);
/* A new spec, checked: ids that are in both are the same child, which goes on unless
 * restart[i] (one for each of the new children) says that it has to be started again.
 * Takes place once those that have to go have gone. Returns 0, -ENOMEM, or -EBUSY: there
 * is one that has not taken place yet. Ignored (0) while it stops. */
int afk_sv_reload(struct afk_supervisor *s, const struct afk_sv_spec *spec, const bool *restart,
                  int64_t now);

bool afk_sv_next(struct afk_supervisor *s, struct afk_sv_out *ret);
int64_t afk_sv_next_deadline(const struct afk_supervisor *s); /* or FOREVER */
bool afk_sv_is_finished(const struct afk_supervisor *s);
/* It gave up: the restart of *ret_id was one too many. */
bool afk_sv_gave_up(const struct afk_supervisor *s, uint32_t *ret_id);
bool afk_sv_is_reloading(const struct afk_supervisor *s);
struct afk_sv_view {
    uint32_t id;
    int state;
    int verdict; /* -1: not known */
    uint32_t failures; /* in a row */
};
/* Of the child at that place in the order; false: there are not so many. */
bool afk_sv_view(const struct afk_supervisor *s, size_t index, struct afk_sv_view *ret);

#endif
