"""A worker's heartbeat, as its owner reads it: see src/core/heartbeat.h."""

from __future__ import annotations

from typing import Literal, NamedTuple

from . import _anyfork

Verdict = Literal["running", "in_c", "waiting", "stopped"]
VERDICTS: tuple[Verdict, ...] = ("running", "in_c", "waiting", "stopped")


class Reading(NamedTuple):
    """What :meth:`_anyfork.Heartbeat.read` returns.

    ``alive``: beats of a thread that needs no GIL; 0: none yet. ``progressing``: those that the
    main thread's evaluation loop took part in; -1: nobody asks it. ``cpu_ns``: what CPU time
    the main thread had used at the last beat. ``interval_ns``: between beats.
    """

    alive: int
    progressing: int
    cpu_ns: int
    interval_ns: int


def verdict(before: tuple[int, int, int, int], after: tuple[int, int, int, int]) -> Verdict:
    """What a worker has done between two readings, which are best two intervals apart or more.

    "running": its main thread gets on, in Python. "in_c": it computes, and does not get on:
    a C function that holds the GIL. "waiting": it does not compute either: it is in a system
    call, or waits for a lock. "stopped": not a single thread runs (SIGSTOP, a frozen
    cgroup), or the heartbeat has not begun.
    """
    return _anyfork.heartbeat_verdict(before, after)
