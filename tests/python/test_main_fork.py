"""anyfork.fork() in the main interpreter: os.fork(), without what kills its child."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import pytest
import subint
from conftest import RunProgram
from known_outcomes import FREE_THREADED, known_outcome

each_kind = pytest.mark.parametrize("kind", subint.KINDS)


def last(out: str) -> Any:
    """What the case returned."""
    return json.loads(out.splitlines()[-1])


def by_sanitizer(code: int | None) -> bool:
    """A sanitizer reports what would have been a signal, and exits with a status of its own."""
    exitcode = re.search(r"\bexitcode=(\d+)", os.environ.get("ASAN_OPTIONS", ""))
    return exitcode is not None and code == int(exitcode[1])


def control(code: int | None, check: str, kind: str = "") -> None:
    """Plain os.fork() fails as known_outcomes.py says, or the harness is wrong."""
    known = known_outcome("plain os.fork()", check, kind)
    assert known is not None
    if known.outcome == "killed":
        killed = code is None or code < 0 or by_sanitizer(code)
        assert killed, f"ended with {code}: {known.reason}"
    else:
        assert code == known.outcome, f"ended with {code}: {known.reason}"


@each_kind
def test_live_interpreter(run_program: RunProgram, kind: str) -> None:
    """gh-139759."""
    assert last(run_program("main_fork", "live", "anyfork", kind).out) == 0


@each_kind
def test_live_interpreter_control(run_program: RunProgram, kind: str) -> None:
    control(
        last(run_program("main_fork", "live", "os", kind).out), "live sub-interpreter", kind
    )


@each_kind
def test_child_beside_live_interpreter_ends_normally(run_program: RunProgram, kind: str) -> None:
    code = last(run_program("main_fork", "live_child_ends_normally", kind).out)
    known = known_outcome("child of fork() in main", "normal exit", kind)
    assert code == (known.outcome if known else 0)


@pytest.mark.parametrize("case", ["thread_signal", "thread_pending", "thread_finalize"])
def test_fork_in_a_thread(run_program: RunProgram, case: str) -> None:
    assert last(run_program("main_fork", case, "anyfork").out) == 0


@pytest.mark.parametrize(
    ("case", "check"),
    [
        ("thread_signal", "signal in a thread's child"),
        ("thread_pending", "pending call in a thread's child"),
        ("thread_finalize", "finalize in a thread's child"),
    ],
)
def test_fork_in_a_thread_control(run_program: RunProgram, case: str, check: str) -> None:
    control(last(run_program("main_fork", case, "os").out), check)


def test_hooks(run_program: RunProgram) -> None:
    seen = last(run_program("main_fork", "hooks").out)
    expected = ["before2", "before1", "parent1", "parent2", "child1", "child2"]
    assert seen == {"os": expected, "anyfork": expected}


def test_warnings_are_those_of_os_fork(run_program: RunProgram) -> None:
    seen = last(run_program("main_fork", "warns").out)
    for name in ("fork", "forkpty"):
        assert seen["alone"][f"anyfork.{name}"] == seen["alone"][f"os.{name}"] == []
        ours, theirs = seen["beside"][f"anyfork.{name}"], seen["beside"][f"os.{name}"]
        assert ours == theirs
        assert len(ours) == 1 and ours[0].startswith("DeprecationWarning: ")
        assert re.search(rf"use of {name}\(\) may lead to deadlocks", ours[0])


def test_no_warning_of_our_own_threads(run_program: RunProgram) -> None:
    assert last(run_program("main_fork", "does_not_warn_of_our_threads").out) == []


def test_audit_events(run_program: RunProgram) -> None:
    assert last(run_program("main_fork", "audit").out) == {
        "fork": ["os.fork"],
        "forkpty": ["os.forkpty"],
        "spawn fork": ["os.fork"],
        "spawn subint_fork": ["os.fork"],
    }


@each_kind
def test_refused_at_shutdown(run_program: RunProgram, kind: str) -> None:
    said = run_program("main_fork", "finalizing", kind).out.splitlines()
    assert [line.split()[0] for line in said] == ["sub", "sub", "main", "main"]
    for line in said:
        assert line.endswith(" can't fork at interpreter shutdown"), line
        assert line.split()[1] == "refused:", line


@pytest.mark.parametrize(
    "where",
    [
        "main",
        *(
            pytest.param(
                kind,
                marks=pytest.mark.skipif(FREE_THREADED, reason="twin fork is refused there"),
            )
            for kind in subint.KINDS
        ),
    ],
)
def test_forkpty(run_program: RunProgram, where: str) -> None:
    run_program("main_fork", "pty", where)


def test_inside_a_running_loop(run_program: RunProgram) -> None:
    run_program("main_fork", "running_loop")


def test_many_threads(run_program: RunProgram) -> None:
    assert last(run_program("main_fork", "many_threads").out) == [30]


def test_datetime_in_two_interpreters(run_program: RunProgram) -> None:
    """Not ours, but a host sees it: which CPythons die at their normal exit.

    Where they are known to, two kinds have been seen to pass as well: free-threaded builds,
    and those under AddressSanitizer, whose allocator keeps freed memory from being used
    again. If it does see the second free, it exits with a status of its own.
    """
    done = run_program("main_fork", "exit_with_datetime", check=False)
    known = known_outcome("normal exit", "datetime in two sub-interpreters")
    if known and ("ASAN_OPTIONS" in os.environ or not sys._is_gil_enabled()):
        assert done.returncode <= 0 or by_sanitizer(done.returncode), done
        return
    assert (done.returncode < 0) if known else (done.returncode == 0), done
