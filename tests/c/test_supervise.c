/* The supervisor's table, with a clock of our own. */
#include "harness.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/supervise.h"

#define S ((int64_t)1000000000)
#define N_MAX 8

static struct afk_sv_child children[N_MAX];
static struct afk_sv_spec spec;
static struct afk_supervisor *sv;
static int64_t now;
static char said[4096]; /* what came out since the last expect(), as words */

static void
set_child(struct afk_sv_child *child, uint32_t id)
{
    *child = (struct afk_sv_child){
        .id = id,
        .restart = AFK_SV_PERMANENT,
        .stop_signal = SIGTERM,
        .ready_ns = 10 * S,
        .grace_ns = 5 * S,
        .backoff_ns = 1 * S,
        .backoff_max_ns = 8 * S,
        .healthy_ns = 60 * S,
    };
    for (int i = 0; i < AFK_VERDICT_COUNT; i++)
        child->limit_ns[i] = AFK_SV_FOREVER;
}

/* n children, numbered from 1, which report that they are ready if `report`. */
static void
set_spec(size_t n, int strategy, bool report)
{
    for (size_t i = 0; i < n; i++) {
        set_child(&children[i], (uint32_t)i + 1);
        children[i].reports_ready = report;
    }
    spec = (struct afk_sv_spec){.strategy = strategy,
                                .intensity = 3,
                                .period_ns = 100 * S,
                                .children = children,
                                .n_children = n};
    now = 1000 * S;
}

/* "1start 1started 2sig15 ..." */
static void
drain(void)
{
    struct afk_sv_out out;
    while (afk_sv_next(sv, &out)) {
        char word[64], id[16] = "";
        if (out.id != 0)
            (void)snprintf(id, sizeof id, "%u", out.id);
        if (out.kind == AFK_SV_DO_SIGNAL)
            (void)snprintf(word, sizeof word, "%ssig%d ", id, out.value);
        else if (out.kind == AFK_SV_SAY_RESTARTING)
            (void)snprintf(word, sizeof word, "%sagain%d ", id, (int)(out.ns / S));
        else if (out.kind == AFK_SV_SAY_LATE)
            (void)snprintf(word, sizeof word, "%slate:%s ", id, afk_verdict_name(out.value));
        else
            (void)snprintf(word, sizeof word, "%s%s ", id, afk_sv_kind_name(out.kind));
        assert_true(strlen(said) + strlen(word) < sizeof said);
        strcat(said, word);
    }
}

static void
expect(const char *words)
{
    drain();
    if (said[0] != '\0')
        said[strlen(said) - 1] = '\0';
    assert_string_equal(said, words);
    said[0] = '\0';
}

static void
begin(void)
{
    assert_null(afk_sv_check(&spec));
    sv = afk_sv_new(&spec);
    assert_non_null(sv);
    said[0] = '\0';
    afk_sv_start(sv, now);
}

static void
end(void)
{
    afk_sv_free(sv);
    sv = NULL;
}

static void
on(uint32_t id, int event)
{
    assert_int_equal(afk_sv_event(sv, id, event, now), 0);
    drain();
}

static void
tick(int64_t ns)
{
    now += ns;
    afk_sv_tick(sv, now);
    drain();
}

static int
state_of(uint32_t id)
{
    struct afk_sv_view view;
    for (size_t i = 0; afk_sv_view(sv, i, &view); i++)
        if (view.id == id)
            return view.state;
    return -1;
}

/* All of them started and ready. */
static void
begin_ready(size_t n)
{
    begin();
    for (uint32_t id = 1; id <= n; id++)
        on(id, AFK_SV_STARTED);
    for (uint32_t id = 1; id <= n; id++)
        assert_int_equal(state_of(id), AFK_SV_READY);
    drain();
    said[0] = '\0';
}

/* ---- the table, cell by cell --------------------------------------------------------------- */

/* One child, brought into that state. */
static void
bring_into(int state)
{
    set_spec(1, AFK_SV_ONE_FOR_ONE, true);
    children[0].look_ns = 1 * S;
    children[0].limit_ns[AFK_VERDICT_STOPPED] = 1;
    assert_null(afk_sv_check(&spec));
    sv = afk_sv_new(&spec);
    assert_non_null(sv);
    if (state != AFK_SV_QUEUED)
        afk_sv_start(sv, now);
    drain();
    if (state == AFK_SV_STARTING || state == AFK_SV_QUEUED)
        return;
    on(1, AFK_SV_STARTED);
    if (state == AFK_SV_UNREADY)
        return;
    if (state != AFK_SV_BACKOFF)
        on(1, AFK_SV_IS_READY);
    if (state == AFK_SV_STOPPING || state == AFK_SV_KILLED)
        afk_sv_restart(sv, 1, now);
    if (state == AFK_SV_KILLED)
        afk_sv_tick(sv, now + 5 * S);
    if (state == AFK_SV_BACKOFF)
        on(1, AFK_SV_DIED);
    if (state == AFK_SV_DONE)
        afk_sv_stop(sv, AFK_SV_FOREVER, now);
    if (state == AFK_SV_DONE)
        on(1, AFK_SV_EXITED);
    drain();
}

static void
send(int event)
{
    const struct afk_reading stuck = {.alive = 1, .interval_ns = S};
    int64_t deadline = afk_sv_next_deadline(sv);
    switch (event) {
    case AFK_SV_DUE:
        tick(deadline == AFK_SV_FOREVER ? 1000 * S : 10 * S);
        break;
    case AFK_SV_LATE:
        for (int i = 0; i < 3; i++)
            assert_int_equal(afk_sv_beat(sv, 1, &stuck, now += S), 0);
        break;
    case AFK_SV_STOP:
        afk_sv_stop(sv, AFK_SV_FOREVER, now);
        break;
    case AFK_SV_KILL:
        afk_sv_kill(sv, now);
        break;
    default:
        assert_int_equal(afk_sv_event(sv, 1, event, now), 0);
        break;
    }
}

/* The state after it, and what came out. NULL: it is ignored. */
static const struct {
    int after;
    const char *out;
} cells[AFK_SV_STATES][AFK_SV_EVENTS] = {
    [AFK_SV_QUEUED] = {
        [AFK_SV_STOP] = {AFK_SV_DONE, "shutdown finished"},
        [AFK_SV_KILL] = {AFK_SV_DONE, "shutdown finished"},
    },
    [AFK_SV_STARTING] = {
        [AFK_SV_STARTED] = {AFK_SV_UNREADY, "1started"},
        [AFK_SV_FAILED] = {AFK_SV_BACKOFF, "1not_started 1again1"},
        [AFK_SV_STOP] = {AFK_SV_STARTING, "shutdown"}, /* once it has started */
        [AFK_SV_KILL] = {AFK_SV_STARTING, "shutdown"},
    },
    [AFK_SV_UNREADY] = {
        [AFK_SV_IS_READY] = {AFK_SV_READY, "1ready all_ready"},
        [AFK_SV_EXITED] = {AFK_SV_BACKOFF, "1exited 1again1"},
        [AFK_SV_DIED] = {AFK_SV_BACKOFF, "1died 1again1"},
        [AFK_SV_DUE] = {AFK_SV_STOPPING, "1not_ready 1stopping 1sig15"},
        [AFK_SV_STOP] = {AFK_SV_STOPPING, "shutdown 1stopping 1sig15"},
        [AFK_SV_KILL] = {AFK_SV_KILLED, "shutdown 1sig9"},
    },
    [AFK_SV_READY] = {
        [AFK_SV_EXITED] = {AFK_SV_BACKOFF, "1exited 1again1"},
        [AFK_SV_DIED] = {AFK_SV_BACKOFF, "1died 1again1"},
        [AFK_SV_DUE] = {AFK_SV_READY, "1look"},
        [AFK_SV_LATE] = {AFK_SV_KILLED, "1late:stopped 1sig9"},
        [AFK_SV_STOP] = {AFK_SV_STOPPING, "shutdown 1stopping 1sig15"},
        [AFK_SV_KILL] = {AFK_SV_KILLED, "shutdown 1sig9"},
    },
    [AFK_SV_STOPPING] = {
        [AFK_SV_EXITED] = {AFK_SV_STARTING, "1stopped 1start"},
        [AFK_SV_DIED] = {AFK_SV_STARTING, "1stopped 1start"},
        [AFK_SV_DUE] = {AFK_SV_KILLED, "1killing 1sig9"},
        [AFK_SV_STOP] = {AFK_SV_STOPPING, "shutdown"},
        [AFK_SV_KILL] = {AFK_SV_KILLED, "shutdown 1sig9"},
    },
    [AFK_SV_KILLED] = {
        [AFK_SV_EXITED] = {AFK_SV_STARTING, "1stopped 1start"},
        [AFK_SV_DIED] = {AFK_SV_STARTING, "1stopped 1start"},
        [AFK_SV_DUE] = {AFK_SV_KILLED, "1held"},
        [AFK_SV_STOP] = {AFK_SV_KILLED, "shutdown"},
        [AFK_SV_KILL] = {AFK_SV_KILLED, "shutdown"},
    },
    [AFK_SV_BACKOFF] = {
        [AFK_SV_DUE] = {AFK_SV_STARTING, "1start"},
        [AFK_SV_STOP] = {AFK_SV_DONE, "shutdown finished"},
        [AFK_SV_KILL] = {AFK_SV_DONE, "shutdown finished"},
    },
    [AFK_SV_DONE] = {{0, NULL}},
};

static void
test_each_event_in_each_state(void **state)
{
    (void)state;
    for (int from = 0; from < AFK_SV_STATES; from++) {
        for (int event = 0; event < AFK_SV_EVENTS; event++) {
            const char *out = cells[from][event].out;
            bring_into(from);
            if (from == AFK_SV_KILLED && event == AFK_SV_DUE)
                now += 5 * S;
            assert_int_equal(state_of(1), from);
            said[0] = '\0';
            send(event);
            expect(out != NULL ? out : "");
            assert_int_equal(state_of(1), out != NULL ? cells[from][event].after : from);
            end();
        }
    }
}

/* ---- order ------------------------------------------------------------------------------- */

static void
test_one_starts_when_the_one_before_is_ready(void **state)
{
    (void)state;
    set_spec(3, AFK_SV_ONE_FOR_ONE, true);
    children[1].reports_ready = false;
    begin();
    expect("1start");
    on(1, AFK_SV_STARTED);
    expect("1started");
    tick(9 * S);
    expect("");
    on(1, AFK_SV_IS_READY);
    expect("1ready 2start");
    on(2, AFK_SV_STARTED); /* it is ready by that */
    expect("2started 2ready 3start");
    on(3, AFK_SV_STARTED);
    on(3, AFK_SV_IS_READY);
    expect("3started 3ready all_ready");
    assert_int_equal(afk_sv_next_deadline(sv), AFK_SV_FOREVER);
    end();
}

static void
test_those_behind_wait_for_one_that_is_not_ready_yet(void **state)
{
    (void)state;
    set_spec(3, AFK_SV_ONE_FOR_ONE, true);
    begin();
    on(1, AFK_SV_STARTED);
    tick(10 * S);
    expect("1start 1started 1not_ready 1stopping 1sig15");
    on(1, AFK_SV_DIED);
    expect("1died 1again1");
    tick(1 * S);
    on(1, AFK_SV_STARTED);
    on(1, AFK_SV_DIED);
    expect("1start 1started 1died 1again2");
    tick(2 * S);
    on(1, AFK_SV_STARTED);
    on(1, AFK_SV_IS_READY);
    expect("1start 1started 1ready 2start");
    end();
}

static void
test_shutdown_goes_from_the_last_to_the_first(void **state)
{
    (void)state;
    set_spec(4, AFK_SV_ONE_FOR_ONE, false);
    children[1].grace_ns = 0;              /* brutal_kill */
    children[2].grace_ns = AFK_SV_FOREVER; /* infinity */
    begin_ready(4);
    afk_sv_stop(sv, AFK_SV_FOREVER, now);
    expect("shutdown 4stopping 4sig15");
    tick(5 * S);
    expect("4killing 4sig9");
    on(4, AFK_SV_DIED);
    expect("4stopped 3stopping 3sig15");
    tick(1000000 * S);
    expect("");
    on(3, AFK_SV_EXITED);
    expect("3stopped 2stopping 2sig9");
    on(2, AFK_SV_DIED);
    expect("2stopped 1stopping 1sig15");
    assert_false(afk_sv_is_finished(sv));
    on(1, AFK_SV_EXITED);
    expect("1stopped finished");
    assert_true(afk_sv_is_finished(sv));
    uint32_t id;
    assert_false(afk_sv_gave_up(sv, &id));
    end();
}

static void
test_grace_is_cut_short(void **state)
{
    (void)state;
    set_spec(2, AFK_SV_ONE_FOR_ONE, false);
    children[0].grace_ns = children[1].grace_ns = AFK_SV_FOREVER;
    begin_ready(2);
    afk_sv_stop(sv, AFK_SV_FOREVER, now);
    tick(100 * S);
    expect("shutdown 2stopping 2sig15");
    afk_sv_stop(sv, 2 * S, now); /* the second time, in a hurry */
    tick(2 * S);
    expect("2killing 2sig9");
    on(2, AFK_SV_DIED);
    tick(2 * S);
    expect("2stopped 1stopping 1sig15 1killing 1sig9");
    end();
}

static void
test_a_kill_does_not_wait_for_turns(void **state)
{
    (void)state;
    set_spec(3, AFK_SV_ONE_FOR_ONE, false);
    begin_ready(3);
    afk_sv_stop(sv, AFK_SV_FOREVER, now);
    afk_sv_kill(sv, now);
    expect("shutdown 3stopping 3sig15 1sig9 2sig9 3sig9");
    on(2, AFK_SV_DIED);
    on(3, AFK_SV_DIED);
    on(1, AFK_SV_DIED);
    expect("2stopped 3stopped 1stopped finished");
    end();
}

static void
test_what_the_kernel_holds_is_not_waited_for_at_the_end(void **state)
{
    (void)state;
    set_spec(2, AFK_SV_ONE_FOR_ONE, false);
    begin_ready(2);
    afk_sv_stop(sv, 0, now);
    expect("shutdown 2stopping 2sig9");
    tick(AFK_SV_HELD_NS);
    expect("2held 1stopping 1sig9");
    on(1, AFK_SV_DIED);
    expect("1stopped finished");
    end();
    /* One that was held already. */
    begin_ready(2);
    afk_sv_restart(sv, 2, now);
    tick(5 * S);
    tick(AFK_SV_HELD_NS);
    expect("2stopping 2sig15 2killing 2sig9 2held");
    afk_sv_stop(sv, 0, now);
    expect("shutdown 1stopping 1sig9");
    on(1, AFK_SV_DIED);
    expect("1stopped finished");
    end();
}

/* ---- restarts ------------------------------------------------------------------------------ */

static void
test_restart_types(void **state)
{
    static const struct {
        int restart;
        bool after_exit, after_death;
    } rows[] = {
        {AFK_SV_PERMANENT, true, true},
        {AFK_SV_TRANSIENT, false, true},
        {AFK_SV_TEMPORARY, false, false},
    };
    (void)state;
    for (int i = 0; i < 3; i++)
        for (int died = 0; died < 2; died++) {
            set_spec(2, AFK_SV_ONE_FOR_ONE, false);
            children[0].restart = rows[i].restart;
            begin_ready(2);
            on(1, died ? AFK_SV_DIED : AFK_SV_EXITED);
            bool again = died ? rows[i].after_death : rows[i].after_exit;
            expect(died ? (again ? "1died 1again1" : "1died 1done")
                        : (again ? "1exited 1again1" : "1exited 1done"));
            assert_int_equal(state_of(2), AFK_SV_READY);
            end();
        }
}

static void
test_it_ends_with_its_last_child(void **state)
{
    (void)state;
    set_spec(2, AFK_SV_ONE_FOR_ONE, false);
    children[0].restart = AFK_SV_TEMPORARY;
    children[1].restart = AFK_SV_TRANSIENT;
    begin_ready(2);
    on(1, AFK_SV_DIED);
    on(2, AFK_SV_EXITED);
    expect("1died 1done 2exited 2done finished");
    end();
}

static void
test_back_off_doubles_up_to_its_cap_and_begins_anew(void **state)
{
    static const int delays[] = {1, 2, 4, 8, 8, 8};
    char words[64];
    (void)state;
    set_spec(1, AFK_SV_ONE_FOR_ONE, false);
    spec.intensity = AFK_SV_UNLIMITED;
    begin_ready(1);
    for (int i = 0; i < 6; i++) {
        on(1, AFK_SV_DIED);
        (void)snprintf(words, sizeof words, "1died 1again%d", delays[i]);
        expect(words);
        tick(delays[i] * S - 1);
        expect("");
        tick(1);
        expect("1start");
        on(1, AFK_SV_STARTED);
        expect("1started 1ready");
    }
    tick(60 * S);
    on(1, AFK_SV_DIED);
    expect("1died 1again1");
    end();
}

static void
test_one_restart_too_many(void **state)
{
    uint32_t id = 0;
    (void)state;
    set_spec(2, AFK_SV_ONE_FOR_ONE, false);
    children[0].backoff_max_ns = children[0].backoff_ns = 0;
    begin_ready(2);
    for (int i = 0; i < 3; i++) {
        on(1, AFK_SV_DIED);
        tick(1);
        on(1, AFK_SV_STARTED);
        expect("1died 1again0 1start 1started 1ready");
    }
    on(1, AFK_SV_DIED);
    expect("1died 1giving_up shutdown 2stopping 2sig15");
    assert_true(afk_sv_gave_up(sv, &id));
    assert_int_equal(id, 1);
    on(2, AFK_SV_DIED);
    expect("2stopped finished");
    end();
}

static void
test_restarts_of_long_ago_do_not_count(void **state)
{
    (void)state;
    set_spec(1, AFK_SV_ONE_FOR_ONE, false);
    children[0].backoff_max_ns = children[0].backoff_ns = 0;
    begin_ready(1);
    for (int i = 0; i < 2500; i++) { /* more than the ring of times holds */
        on(1, AFK_SV_DIED);
        tick(34 * S); /* three in 100 s */
        on(1, AFK_SV_STARTED);
        said[0] = '\0';
        assert_int_equal(state_of(1), AFK_SV_READY);
    }
    end();
    set_spec(1, AFK_SV_ONE_FOR_ONE, false);
    spec.intensity = 0;
    begin_ready(1);
    on(1, AFK_SV_EXITED);
    expect("1exited 1giving_up shutdown finished");
    end();
}

static void
test_one_for_all(void **state)
{
    (void)state;
    set_spec(4, AFK_SV_ONE_FOR_ALL, false);
    children[2].restart = AFK_SV_TEMPORARY;
    children[3].restart = AFK_SV_TRANSIENT;
    begin_ready(4);
    on(4, AFK_SV_EXITED);
    expect("4exited 4done");
    on(2, AFK_SV_DIED);
    expect("2died 2again1 3stopping 3sig15");
    on(3, AFK_SV_EXITED);
    expect("3stopped 3done 1stopping 1sig15");
    tick(3 * S); /* the delay has passed, but one still runs */
    expect("");
    assert_true(afk_sv_next_deadline(sv) > now); /* and nobody turns in circles */
    on(1, AFK_SV_DIED);
    expect("1stopped 1start");
    on(1, AFK_SV_STARTED);
    on(2, AFK_SV_STARTED);
    on(4, AFK_SV_STARTED); /* transient: with the others; temporary: never */
    expect("1started 1ready 2start 2started 2ready 4start 4started 4ready");
    end();
}

static void
test_the_delay_of_a_group_is_waited_for(void **state)
{
    (void)state;
    set_spec(2, AFK_SV_ONE_FOR_ALL, false);
    begin_ready(2);
    on(2, AFK_SV_DIED);
    on(1, AFK_SV_EXITED);
    expect("2died 2again1 1stopping 1sig15 1stopped");
    assert_int_equal(afk_sv_next_deadline(sv), now + 1 * S);
    tick(1 * S);
    expect("1start");
    on(1, AFK_SV_FAILED); /* in the middle of it */
    expect("1not_started 1again1");
    tick(1 * S);
    expect("1start");
    end();
}

static void
test_rest_for_one(void **state)
{
    (void)state;
    set_spec(4, AFK_SV_REST_FOR_ONE, false);
    begin_ready(4);
    on(2, AFK_SV_DIED);
    expect("2died 2again1 4stopping 4sig15");
    on(3, AFK_SV_DIED); /* by itself, before its turn: it would have been stopped */
    expect("3died");
    on(4, AFK_SV_DIED);
    expect("4stopped");
    tick(1 * S);
    for (uint32_t id = 2; id <= 4; id++)
        on(id, AFK_SV_STARTED);
    expect("2start 2started 2ready 3start 3started 3ready 4start 4started 4ready");
    assert_int_equal(state_of(1), AFK_SV_READY);
    end();
}

static void
test_one_for_one_leaves_the_others_alone(void **state)
{
    (void)state;
    set_spec(3, AFK_SV_ONE_FOR_ONE, false);
    begin_ready(3);
    on(1, AFK_SV_DIED);
    on(3, AFK_SV_DIED);
    expect("1died 1again1 3died 3again1");
    tick(1 * S);
    expect("1start 3start"); /* neither waits for the other */
    end();
}

static void
test_restart_by_hand(void **state)
{
    (void)state;
    set_spec(3, AFK_SV_ONE_FOR_ONE, false);
    spec.intensity = 0; /* it does not count */
    begin_ready(3);
    assert_int_equal(afk_sv_restart(sv, 2, now), 0);
    expect("2stopping 2sig15");
    on(2, AFK_SV_DIED);
    expect("2stopped 2start");
    assert_int_equal(afk_sv_restart(sv, 2, now), 0); /* while it starts */
    on(2, AFK_SV_STARTED);
    expect("2started 2stopping 2sig15");
    on(2, AFK_SV_EXITED);
    on(2, AFK_SV_STARTED);
    expect("2stopped 2start 2started 2ready");
    assert_int_equal(afk_sv_restart(sv, 9, now), -ESRCH);
    end();
    set_spec(3, AFK_SV_REST_FOR_ONE, false);
    begin_ready(3);
    assert_int_equal(afk_sv_restart(sv, 2, now), 0);
    on(3, AFK_SV_DIED);
    on(2, AFK_SV_DIED);
    expect("3stopping 3sig15 3stopped 2stopping 2sig15 2stopped 2start");
    end();
}

static void
test_a_stop_while_it_starts(void **state)
{
    (void)state;
    set_spec(1, AFK_SV_ONE_FOR_ONE, false);
    begin();
    afk_sv_stop(sv, AFK_SV_FOREVER, now);
    on(1, AFK_SV_STARTED);
    expect("1start shutdown 1started 1stopping 1sig15");
    on(1, AFK_SV_EXITED);
    expect("1stopped finished");
    end();
    begin();
    afk_sv_kill(sv, now);
    on(1, AFK_SV_STARTED);
    expect("1start shutdown 1started 1sig9");
    end();
    begin();
    afk_sv_stop(sv, AFK_SV_FOREVER, now);
    on(1, AFK_SV_FAILED);
    expect("1start shutdown 1not_started finished");
    end();
}

/* ---- heartbeats ------------------------------------------------------------------------------ */

static void
beat(uint64_t alive, int64_t progressing, uint64_t cpu_ns)
{
    const struct afk_reading reading = {
        .alive = alive, .progressing = progressing, .cpu_ns = cpu_ns, .interval_ns = S};
    tick(2 * S);
    expect("1look");
    assert_int_equal(afk_sv_beat(sv, 1, &reading, now), 0);
    drain();
}

static void
test_a_late_heartbeat(void **state)
{
    static const char *const late[] = {NULL, "1late:in_c 1sig9", "1late:waiting 1sig9",
                                       "1late:stopped 1sig9"};
    (void)state;
    for (int verdict = AFK_VERDICT_IN_C; verdict < AFK_VERDICT_COUNT; verdict++) {
        set_spec(1, AFK_SV_ONE_FOR_ONE, false);
        children[0].look_ns = 2 * S;
        children[0].limit_ns[verdict] = 6 * S;
        begin_ready(1);
        uint64_t alive = 1, cpu_ns = 1;
        for (int64_t i = 0; i < 20; i++) { /* it gets on for as long as it likes */
            beat(alive += 2, i, cpu_ns += 1);
            expect("");
        }
        for (int i = 0; i < 4; i++) {
            expect("");
            if (verdict != AFK_VERDICT_STOPPED)
                alive += 2;
            if (verdict == AFK_VERDICT_IN_C)
                cpu_ns += (uint64_t)S;
            beat(alive, 19, cpu_ns);
        }
        expect(late[verdict]);
        on(1, AFK_SV_DIED);
        expect("1died 1again1");
        end();
    }
}

static void
test_a_verdict_that_changes_begins_anew(void **state)
{
    (void)state;
    set_spec(1, AFK_SV_ONE_FOR_ONE, false);
    children[0].look_ns = 2 * S;
    children[0].limit_ns[AFK_VERDICT_STOPPED] = 6 * S;
    begin_ready(1);
    for (uint64_t i = 1; i < 40; i++) {
        beat(1 + i / 3, (int64_t)(i / 3), 0); /* every third time it has moved */
        expect("");
    }
    struct afk_sv_view view;
    assert_true(afk_sv_view(sv, 0, &view));
    assert_int_equal(view.verdict, AFK_VERDICT_RUNNING);
    end();
}

/* ---- reloads ----------------------------------------------------------------------------------- */

static void
reload(uint32_t *ids, size_t n, const bool *restart)
{
    static struct afk_sv_child next[N_MAX];
    for (size_t i = 0; i < n; i++)
        set_child(&next[i], ids[i]);
    struct afk_sv_spec with = spec;
    with.children = next;
    with.n_children = n;
    assert_null(afk_sv_check(&with));
    assert_int_equal(afk_sv_reload(sv, &with, restart, now), 0);
    drain();
}

static void
test_a_reload(void **state)
{
    (void)state;
    set_spec(4, AFK_SV_ONE_FOR_ONE, false);
    begin_ready(4);
    /* 2 goes, 3 has changed, 5 and 6 are new. */
    reload((uint32_t[]){5, 1, 3, 4, 6}, 5, (bool[]){false, false, true, false, false});
    expect("3stopping 3sig15");
    assert_true(afk_sv_is_reloading(sv));
    assert_int_equal(afk_sv_reload(sv, &spec, (bool[]){0, 0, 0, 0}, now), -EBUSY);
    on(3, AFK_SV_EXITED);
    expect("3stopped 2stopping 2sig15");
    on(2, AFK_SV_EXITED);
    expect("2stopped 2forget reloaded 5start");
    assert_false(afk_sv_is_reloading(sv));
    assert_int_equal(afk_sv_event(sv, 2, AFK_SV_DIED, now), -ESRCH);
    on(5, AFK_SV_STARTED);
    on(3, AFK_SV_STARTED);
    on(6, AFK_SV_STARTED);
    expect("5started 5ready 3start 3started 3ready 6start 6started 6ready all_ready");
    assert_int_equal(state_of(1), AFK_SV_READY);
    afk_sv_stop(sv, AFK_SV_FOREVER, now);
    expect("shutdown 6stopping 6sig15"); /* in the new order */
    end();
}

static void
test_a_reload_that_changes_nothing(void **state)
{
    (void)state;
    set_spec(2, AFK_SV_ONE_FOR_ALL, false);
    children[1].restart = AFK_SV_TEMPORARY;
    begin_ready(2);
    on(2, AFK_SV_EXITED);
    expect("2exited 2done");
    reload((uint32_t[]){1, 2}, 2, (bool[]){false, false});
    expect("reloaded all_ready");
    assert_int_equal(state_of(2), AFK_SV_DONE); /* what has ended for good stays so */
    reload((uint32_t[]){1, 2}, 2, (bool[]){false, true});
    expect("1stopping 1sig15"); /* with its group */
    on(1, AFK_SV_EXITED);
    on(1, AFK_SV_STARTED);
    on(2, AFK_SV_STARTED);
    expect("1stopped reloaded 1start 1started 1ready 2start 2started 2ready all_ready");
    end();
}

static void
test_a_stop_while_it_reloads(void **state)
{
    (void)state;
    set_spec(2, AFK_SV_ONE_FOR_ONE, false);
    begin_ready(2);
    reload((uint32_t[]){3}, 1, (bool[]){false});
    expect("2stopping 2sig15");
    afk_sv_stop(sv, AFK_SV_FOREVER, now);
    on(2, AFK_SV_EXITED);
    on(1, AFK_SV_EXITED);
    expect("shutdown 2stopped 1stopping 1sig15 1stopped finished");
    end();
}

/* ---- specs, and chance ---------------------------------------------------------------------- */

static void
test_what_is_wrong_with_a_spec_is_named(void **state)
{
    (void)state;
    set_spec(2, AFK_SV_ONE_FOR_ONE, false);
    children[1].id = 1;
    assert_string_equal(afk_sv_check(&spec), "id: twice");
    set_spec(2, 3, false);
    assert_string_equal(afk_sv_check(&spec), "strategy: none of enum afk_sv_strategy");
    set_spec(0, 0, false);
    assert_string_equal(afk_sv_check(&spec), "children: from 1 to 10000");
    set_spec(1, 0, false);
    children[0].stop_signal = 0;
    assert_string_equal(afk_sv_check(&spec), "stop_signal: not a signal");
    set_spec(1, 0, false);
    children[0].backoff_max_ns = 0;
    assert_string_equal(afk_sv_check(&spec), "backoff_max: less than backoff, or too long");
    set_spec(1, 0, false);
    children[0].grace_ns = -1;
    assert_string_equal(afk_sv_check(&spec), "a duration is negative");
    set_spec(1, 0, false);
    spec.intensity = 1001;
    assert_string_equal(afk_sv_check(&spec), "intensity: at most 1000, or unlimited");
    set_spec(1, 0, false);
    children[0].restart = 3;
    assert_string_equal(afk_sv_check(&spec), "restart: none of enum afk_sv_restart");
}

/* What the processes of the supervisor are, as a model that follows its orders. */
struct model {
    bool starting, runs, was_signalled;
};

static void
follow_orders(struct model *model)
{
    struct afk_sv_out out;
    while (afk_sv_next(sv, &out)) {
        struct model *m = &model[out.id];
        if (out.kind == AFK_SV_DO_START) {
            assert_false(m->starting || m->runs); /* never two processes of one child */
            m->starting = true;
        }
        else if (out.kind == AFK_SV_DO_SIGNAL) {
            assert_true(m->runs); /* never a signal to nobody */
            m->was_signalled = true;
        }
        else if (out.kind == AFK_SV_DO_FORGET) {
            assert_false(m->starting || m->runs);
        }
    }
}

static void
let_happen(struct model *model, size_t n, unsigned *seed)
{
    uint32_t id = 1 + (uint32_t)rand_r(seed) % (uint32_t)n;
    struct model *m = &model[id];
    int r = rand_r(seed) % 8;
    if (m->starting) {
        m->starting = false;
        m->runs = r != 0;
        m->was_signalled = false;
        (void)afk_sv_event(sv, id, r != 0 ? AFK_SV_STARTED : AFK_SV_FAILED, now);
    }
    else if (m->runs && (r < 2 || m->was_signalled)) {
        m->runs = false;
        (void)afk_sv_event(sv, id, r == 0 ? AFK_SV_EXITED : AFK_SV_DIED, now);
    }
    else if (m->runs && r < 5) {
        (void)afk_sv_event(sv, id, AFK_SV_IS_READY, now);
    }
    else if (r == 6 && rand_r(seed) % 10 == 0) {
        (void)afk_sv_restart(sv, id, now);
    }
    follow_orders(model);
}

static void
reload_at_random(struct model *model, size_t n, unsigned *seed)
{
    static struct afk_sv_child next[N_MAX];
    bool restart[N_MAX];
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
        if (rand_r(seed) % 4 != 0 || kept == 0) {
            restart[kept] = rand_r(seed) % 3 == 0;
            next[kept++] = children[i];
        }
    struct afk_sv_spec with = spec;
    with.children = next;
    with.n_children = kept;
    int r = afk_sv_reload(sv, &with, restart, now);
    assert_true(r == 0 || r == -EBUSY);
    follow_orders(model);
}

static void
test_whatever_happens_it_ends_with_nothing_left(void **state)
{
    (void)state;
    for (unsigned seed = 1; seed <= 3000; seed++) {
        unsigned dice = seed;
        struct model model[N_MAX + 1] = {{false, false, false}};
        size_t n = 1 + seed % 5;
        set_spec(n, (int)(seed % 3), false);
        for (size_t i = 0; i < n; i++) {
            children[i].restart = rand_r(&dice) % 3;
            children[i].reports_ready = rand_r(&dice) % 2;
            children[i].grace_ns = rand_r(&dice) % 2 ? 0 : 5 * S;
        }
        spec.intensity = seed % 2 ? 20 : AFK_SV_UNLIMITED;
        begin();
        follow_orders(model);
        for (int step = 0; step < 60 && !afk_sv_is_finished(sv); step++) {
            let_happen(model, n, &dice);
            if (rand_r(&dice) % 20 == 0)
                reload_at_random(model, n, &dice);
            now += (int64_t)(rand_r(&dice) % 3) * S;
            assert_true(afk_sv_next_deadline(sv) >= 0);
            afk_sv_tick(sv, now);
            follow_orders(model);
        }
        afk_sv_stop(sv, AFK_SV_FOREVER, now);
        follow_orders(model);
        for (int step = 0; step < 1000 && !afk_sv_is_finished(sv); step++) {
            let_happen(model, n, &dice);
            int64_t next = afk_sv_next_deadline(sv);
            if (next != AFK_SV_FOREVER && rand_r(&dice) % 2) {
                now = next > now ? next : now;
                afk_sv_tick(sv, now);
                follow_orders(model);
            }
        }
        assert_true(afk_sv_is_finished(sv));
        for (size_t i = 1; i <= n; i++)
            assert_false(model[i].starting);
        end();
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        CHECKED(test_each_event_in_each_state),
        CHECKED(test_one_starts_when_the_one_before_is_ready),
        CHECKED(test_those_behind_wait_for_one_that_is_not_ready_yet),
        CHECKED(test_shutdown_goes_from_the_last_to_the_first),
        CHECKED(test_grace_is_cut_short),
        CHECKED(test_a_kill_does_not_wait_for_turns),
        CHECKED(test_what_the_kernel_holds_is_not_waited_for_at_the_end),
        CHECKED(test_restart_types),
        CHECKED(test_it_ends_with_its_last_child),
        CHECKED(test_back_off_doubles_up_to_its_cap_and_begins_anew),
        CHECKED(test_one_restart_too_many),
        CHECKED(test_restarts_of_long_ago_do_not_count),
        CHECKED(test_one_for_all),
        CHECKED(test_the_delay_of_a_group_is_waited_for),
        CHECKED(test_rest_for_one),
        CHECKED(test_one_for_one_leaves_the_others_alone),
        CHECKED(test_restart_by_hand),
        CHECKED(test_a_stop_while_it_starts),
        CHECKED(test_a_late_heartbeat),
        CHECKED(test_a_verdict_that_changes_begins_anew),
        CHECKED(test_a_reload),
        CHECKED(test_a_reload_that_changes_nothing),
        CHECKED(test_a_stop_while_it_reloads),
        CHECKED(test_what_is_wrong_with_a_spec_is_named),
        CHECKED(test_whatever_happens_it_ends_with_nothing_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
