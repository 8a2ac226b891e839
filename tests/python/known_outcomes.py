"""Outcomes that are known, not wished for: asserted as such, and printed by every run.

Each is a property of CPython that anyfork neither causes nor can mend. A test
asks `known_outcome()` before it judges; an entry that no longer comes true fails
the test that asked, so that the table cannot go stale unseen.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from typing import NamedTuple

DEBUG = hasattr(sys, "gettotalrefcount")
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


class Known(NamedTuple):
    """One row: in `area`, `check` ends with `outcome` where `applies`."""

    area: str
    check: str
    applies: Callable[[str], bool]  # given the start or interpreter kind under test
    outcome: int | str  # an exit code (negative: signal), an exception's name, or "killed"
    text: str  # what the dying process says
    reason: str


def _debug(_: str) -> bool:
    return DEBUG


def _always(_: str) -> bool:
    return True


def _isolated(kind: str) -> bool:
    return kind == "isolated"


_COUNTED = (
    "debug builds assert in managed_static_type_state_clear() (Objects/typeobject.c): "
    "interpreters that a fork abandoned are still counted; release builds pass. "
    "That is why a worker ends by _exit() and never by Py_FinalizeEx()"
)
_FINALIZES = (
    "exit_atexit",
    "exit_plain",
    "exit_after_work",
    "exit_after_interpreters",
    "exit_with_thread",
    "exit_code",
    "exit_system_exit",
)

KNOWN_OUTCOMES: tuple[Known, ...] = (
    *(Known("child in main", name, _debug, -6, "interp_count", _COUNTED) for name in _FINALIZES),
    Known("child of fork() in main", "normal exit", _debug, -6, "interp_count", _COUNTED),
    Known(
        "twin child",
        "finalize",
        _debug,
        -6,
        "Assertion",
        "Py_FinalizeEx() called in a running sub-interpreter is the caller's error, which "
        "debug builds assert; the child of a twin fork ends by returning into its host",
    ),
    Known(
        "twin child",
        "tracemalloc",
        _isolated,
        "ImportError",
        "does not support loading in subinterpreters",
        "CPython's rule: _tracemalloc has no per-interpreter state",
    ),
    Known(
        "plain os.fork()",
        "live sub-interpreter",
        _always,
        "killed",
        "",
        "gh-139759: with a live sub-interpreter, the child of os.fork() in main dies",
    ),
    Known(
        "plain os.fork()",
        "signal in a thread's child",
        _always,
        1,
        "",
        "_PyRuntime.main_tstate dangles in the child of a thread: its signal handlers never "
        "run in a busy loop",
    ),
    Known(
        "plain os.fork()",
        "pending call in a thread's child",
        _always,
        1,
        "",
        "_PyRuntime.main_tstate dangles in the child of a thread: pending calls never run",
    ),
    Known(
        "plain os.fork()",
        "finalize in a thread's child",
        _always,
        "killed",
        "",
        "_PyRuntime.main_tstate dangles in the child of a thread: Py_FinalizeEx() swaps to it",
    ),
    Known(
        "normal exit",
        "datetime in two sub-interpreters",
        lambda _: sys.version_info[:2] == (3, 13),
        "killed",
        "",
        "3.13 frees memory twice (seen with 3.13.0 and 3.13.18) once two sub-interpreters, one "
        "of them isolated, have imported datetime and the older one was destroyed first; no "
        "fork and no anyfork involved, mended in 3.14",
    ),
)

# (area, check, kind) -> row: what this run has seen, for its summary.
seen: dict[tuple[str, str, str], Known] = {}


def known_outcome(area: str, check: str, kind: str = "") -> Known | None:
    """The row for this check here, noted for the summary; None: it has to pass."""
    for row in KNOWN_OUTCOMES:
        if row.area == area and row.check == check and row.applies(kind):
            seen[area, check, kind] = row
            return row
    return None
