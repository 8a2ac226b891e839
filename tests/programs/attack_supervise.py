"""Supervision where processes matter: each way to start a child, from each interpreter."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import supervise_targets
from attack_common import IN_MAIN_OF_ANOTHER, LIMIT, beside_nothing, is_gone, places, same

import anyfork
from anyfork._supervise import ChildSpec, Event, HeartbeatSpec, Runner, SupervisorSpec


class Driven:
    """A runner, and what it has told."""

    def __init__(self, *children: ChildSpec, **more: Any) -> None:
        self.events: list[Event] = []
        self.runner = Runner(SupervisorSpec(children=children, **more), self.events.append)

    def __enter__(self) -> Driven:
        self.runner.begin()
        return self

    def __exit__(self, *exc: object) -> None:
        pids = self.runner.pids()
        self.runner.close()
        assert all(is_gone(pid) for pid in pids), pids

    def until(self, what: Callable[[], object]) -> None:
        end = time.monotonic() + LIMIT
        poll = select.poll()
        poll.register(self.runner.fileno(), select.POLLIN)
        while not what():
            assert time.monotonic() < end, [str(event) for event in self.events]
            timeout = self.runner.timeout()
            poll.poll(50 if timeout is None else min(50, timeout * 1000 + 1))
            self.runner.handle()

    def told(self, kind: str, child: str | None = None) -> list[Event]:
        return [e for e in self.events if e.kind == kind and child in (None, e.child)]

    def pid(self, name: str) -> int:
        pid = next(child.pid for child in self.runner.children() if child.name == name)
        assert pid is not None
        return pid

    def end(self) -> None:
        self.runner.stop()
        self.until(lambda: self.runner.finished)


def processes() -> list[str]:
    """The methods that make one."""
    rows = [row for row in anyfork.methods() if row.available and row.has_process]
    return [row.name for row in rows]


def check_each_method(place: str) -> None:
    """Ready, restarted when it dies, stopped; and all that is told of it."""
    names = processes()
    children = [
        ChildSpec(
            name=method, target=supervise_targets.ready_after, args=(0,), method=method,
            ready="report", backoff=0.01,
        )
        for method in names
    ]  # fmt: skip
    with Driven(*children, intensity=100) as driven:
        driven.until(lambda: driven.told("all_ready"))
        first = {name: driven.pid(name) for name in names}
        for pid in first.values():
            os.kill(pid, signal.SIGKILL)
        driven.until(lambda: all(len(driven.told("ready", name)) == 2 for name in names))
        for name in names:
            died = driven.told("died", name)[0]
            same((died.pid, died.returncode, died.signal), (first[name], -9, "SIGKILL"))
            assert driven.pid(name) != first[name]
        driven.end()
        same([e.child for e in driven.told("stopped")], names[::-1])
        same(driven.runner.counters()[names[0]]["started"], 2)


@places("main")
def check_targets_by_name(place: str) -> None:
    methods = [name for name in processes() if name in IN_MAIN_OF_ANOTHER]
    children = [
        ChildSpec(name=method, target="supervise_targets:fail", args=("oops",), method=method,
                  restart="temporary")
        for method in methods
    ]  # fmt: skip
    with Driven(*children) as driven:
        driven.until(lambda: driven.runner.finished)
        for name in methods:
            died = driven.told("died", name)[0]
            same(died.detail, "exited with status 1: ValueError: oops")
            assert isinstance(died.exception, ValueError)
            assert driven.told("ready", name), driven.events  # it was called


@places("main")
def check_a_start_that_fails_counts(place: str) -> None:
    children = [
        ChildSpec(name="none", argv=["/no/such/program"], backoff=0),
        ChildSpec(name="behind", argv=["sleep", "1000"]),
    ]
    with Driven(*children, intensity=2) as driven:
        driven.until(lambda: driven.runner.finished)
        same(len(driven.told("not_started")), 3)
        same(driven.told("started"), [])
        failure = driven.runner.failure()
        assert failure is not None and failure.child == "none"
        assert "No such file" in str(failure), failure


@places("main")
@beside_nothing
def check_heartbeats(place: str) -> None:
    """A loop in Python, a C function that holds the GIL and SIGSTOP: three verdicts."""
    beats = HeartbeatSpec(interval=0.02, in_c=30)
    quiet = HeartbeatSpec(interval=0.02, stopped=None)
    children = [
        ChildSpec(name="loop", target=supervise_targets.loop, heartbeat=beats),
        ChildSpec(name="wait", target=supervise_targets.wait, heartbeat=beats),
        ChildSpec(name="in_c", target=supervise_targets.in_c, heartbeat=replace(quiet, in_c=0.3)),
        ChildSpec(name="stopped", target=supervise_targets.loop,
                  heartbeat=replace(quiet, stopped=0.3)),
        ChildSpec(name="tolerated", target=supervise_targets.loop, heartbeat=quiet),
    ]  # fmt: skip
    with Driven(*children, intensity=100) as driven:
        driven.until(lambda: driven.told("all_ready"))
        # Not before it has begun: what does not beat yet is "stopped" too.
        driven.until(lambda: verdict(driven, "stopped") == "running")
        for name in ("stopped", "tolerated"):
            os.kill(driven.pid(name), signal.SIGSTOP)
        driven.until(lambda: driven.told("late", "in_c") and driven.told("late", "stopped"))
        same({e.verdict for e in driven.told("late", "in_c")}, {"in_c"})
        same({e.verdict for e in driven.told("late", "stopped")}, {"stopped"})
        driven.until(lambda: verdict(driven, "loop") == "running")
        driven.until(lambda: verdict(driven, "wait") == "waiting")
        driven.until(lambda: verdict(driven, "tolerated") == "stopped")
        driven.until(lambda: len(driven.told("ready", "in_c")) == 2)
        same({e.child for e in driven.told("late")}, {"in_c", "stopped"})
        for event in driven.told("died"):
            same(event.signal, "SIGKILL")


def verdict(driven: Driven, name: str) -> str | None:
    return next(child.verdict for child in driven.runner.children() if child.name == name)


@places("main")
def check_a_deaf_child(place: str) -> None:
    children = [
        ChildSpec(name="deaf", target=supervise_targets.deaf, ready="report", grace=0.05),
        ChildSpec(name="brutal", target=supervise_targets.wait, grace="brutal_kill"),
    ]
    with Driven(*children) as driven:
        driven.until(lambda: driven.told("all_ready"))
        pid = driven.pid("deaf")
        os.kill(pid, signal.SIGSTOP)  # one that is stopped is asked too
        driven.end()
        same([(e.child, e.signal) for e in driven.told("stopping")],
             [("brutal", "SIGKILL"), ("deaf", "SIGTERM")])  # fmt: skip
        same([e.child for e in driven.told("killing")], ["deaf"])
        assert is_gone(pid)


@places("main")
def check_not_ready_in_time(place: str) -> None:
    child = ChildSpec(
        name="slow", target=supervise_targets.wait, ready="report", ready_timeout=0.1,
        restart="temporary",
    )  # fmt: skip
    closes = ChildSpec(
        name="closes", argv=["sh", "-c", "exec 7>&-; exec sleep 1000"], ready=7,
        ready_timeout=0.1, restart="temporary",
    )  # fmt: skip
    with Driven(child, closes) as driven:
        driven.until(lambda: driven.runner.finished)
        same([e.child for e in driven.told("not_ready")], ["slow", "closes"])
        same([e.child for e in driven.told("died")], ["slow", "closes"])
        same(driven.told("ready"), [])


@places("main")
def check_close_in_the_middle(place: str) -> None:
    """Whenever it is closed, nothing is left: the descriptors are looked at by attack_run."""
    spec = [
        ChildSpec(name="a", argv=["sleep", "1000"]),
        ChildSpec(name="b", target=supervise_targets.ready_after, args=(0.05,), ready="report",
                  heartbeat=HeartbeatSpec(interval=0.05)),
        ChildSpec(name="c", argv=["sh", "-c", "echo >&9; exec sleep 1000"], ready=9),
    ]  # fmt: skip
    for n_events in range(7):
        with Driven(*spec) as driven:
            driven.until(lambda: len(driven.events) >= n_events)  # noqa: B023


@places("main")
def check_strategies(place: str) -> None:
    """With real processes, once each; the table has tests of its own."""
    expected = {"one_for_one": "b", "one_for_all": "abc", "rest_for_one": "bc"}
    for strategy, again in expected.items():
        children = [
            ChildSpec(name=name, argv=["sleep", "1000"], backoff=0.01) for name in "abc"
        ]
        with Driven(*children, strategy=strategy) as driven:
            driven.until(lambda: driven.told("all_ready"))
            os.kill(driven.pid("b"), signal.SIGKILL)
            driven.until(
                lambda: sorted(e.child for e in driven.told("ready")[3:]) == list(again)  # noqa: B023
            )
            driven.end()


@places("main")
def check_reload(place: str) -> None:
    def sleeps(name: str, seconds: int, **more: Any) -> ChildSpec:
        return ChildSpec(name=name, argv=["sleep", str(seconds)], **more)

    with Driven(sleeps("a", 1001), sleeps("b", 1002), sleeps("c", 1003)) as driven:
        driven.until(lambda: driven.told("all_ready"))
        pids = {name: driven.pid(name) for name in "abc"}
        # a's policy alone changes, b goes, c is another program, d is new.
        changed = [sleeps("a", 1001, grace=1.0), sleeps("c", 9), sleeps("d", 1004)]
        driven.runner.reload(SupervisorSpec(children=changed))
        last = [sleeps("a", 1001, grace=2.0), sleeps("d", 1004)]
        driven.runner.reload(SupervisorSpec(children=last))  # while there is one
        driven.until(lambda: len(driven.told("reloaded")) == 2)
        driven.until(lambda: len(driven.told("all_ready")) >= 2)
        same([child.name for child in driven.runner.children()], ["a", "d"])
        same(driven.pid("a"), pids["a"])
        assert is_gone(pids["b"]) and is_gone(pids["c"])
        same({e.child for e in driven.told("stopped")}, {"b", "c"})
        driven.end()


@places("main")
def check_reload_of_the_template(place: str) -> None:
    """Other modules ahead: its workers are started again, by a template that has them."""
    children = [
        ChildSpec(name="a", target="supervise_targets:wait"),
        ChildSpec(name="b", argv=["sleep", "1000"]),
    ]
    with Driven(*children, preload=["decimal"]) as driven:
        driven.until(lambda: driven.told("all_ready"))
        pids = {name: driven.pid(name) for name in "ab"}
        driven.runner.reload(SupervisorSpec(children=children))  # the default one
        driven.until(lambda: len(driven.told("all_ready")) == 2)
        assert driven.pid("a") != pids["a"] and driven.pid("b") == pids["b"]
        same(driven.told("stopped", "b"), [])
        same(len(driven.told("stopped", "a")), 1)
        driven.end()


@places("main")
def check_chaos(place: str) -> None:
    """Deaths, signals, restarts and reloads at random: each child has one process or none, and
    at the end there is none."""
    chance = random.Random(time.time_ns())
    specs = [
        ChildSpec(name="a", argv=["sleep", "1000"], backoff=0),
        ChildSpec(name="b", target=supervise_targets.ready_after, args=(0.01,), ready="report",
                  backoff=0, grace=0.05),
        ChildSpec(name="c", target=supervise_targets.wait, method="fork", backoff=0),
        ChildSpec(name="d", argv=["sh", "-c", "exit 1"], restart="transient", backoff=0.01),
        ChildSpec(name="e", target=supervise_targets.deaf, method="fork", ready="report",
                  grace=0.02, backoff=0, heartbeat=HeartbeatSpec(interval=0.01, stopped=0.1)),
    ]  # fmt: skip
    strategy = chance.choice(["one_for_one", "one_for_all", "rest_for_one"])
    with Driven(*specs, intensity=None, strategy=strategy) as driven:
        for _ in range(80):
            end = time.monotonic() + chance.random() * 0.02
            driven.until(lambda: time.monotonic() > end)  # noqa: B023
            running = [child for child in driven.runner.children() if child.pid]
            what = chance.randrange(6)
            if what < 3 and running:
                sig = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(running).pid or 0, sig)
            elif what == 3:
                driven.runner.restart(chance.choice(driven.runner.children()).name)
            elif what == 4:
                kept = [
                    replace(spec, args=(0.02,)) if spec.name == "b" and chance.random() < 0.5
                    else spec for spec in specs if chance.random() < 0.8
                ]  # fmt: skip
                new = SupervisorSpec(children=kept or specs, intensity=None, strategy=strategy)
                driven.runner.reload(new)
        driven.runner.stop(0.5)
        driven.until(lambda: driven.runner.finished)
        same([child for child in driven.runner.children() if child.pid], [])
    pids = [event.pid for event in driven.told("started")]
    assert all(is_gone(pid) for pid in pids if pid), pids
