"""The child of anyfork.fork() in a sub-interpreter is whole, and stays in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache

import child_checks
import pytest
import subint
from conftest import RunProgram
from judge import judge
from known_outcomes import FREE_THREADED

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def outcomes_of(run_program: RunProgram) -> Callable[[str, str], dict[str, dict[str, object]]]:
    """All checks for one kind and place, run once."""

    @cache
    def run(kind: str, place: str) -> dict[str, dict[str, object]]:
        done = run_program("twin_child", kind, place, timeout=500)
        return {row["check"]: row for row in map(json.loads, done.out.splitlines())}

    return run


@pytest.mark.skipif(FREE_THREADED, reason="twin fork is refused there: test_refused_clearly")
@pytest.mark.parametrize("check", child_checks.TWIN)
@pytest.mark.parametrize("place", subint.PLACES)
@pytest.mark.parametrize("kind", subint.KINDS)
def test_child(
    outcomes_of: Callable[[str, str], dict[str, dict[str, object]]],
    kind: str,
    place: str,
    check: str,
) -> None:
    judge("twin child", kind, outcomes_of(kind, place)[check])


twin_fork = pytest.mark.skipif(FREE_THREADED, reason="refused there: test_refused_clearly")
each_kind = pytest.mark.parametrize("kind", subint.KINDS)
each_way = pytest.mark.parametrize("way", [pytest.param("twin", marks=twin_fork), "hop"])


def told(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.skipif(not FREE_THREADED, reason="only free-threaded builds refuse twin forks")
@each_kind
def test_refused_clearly(run_program: RunProgram, kind: str) -> None:
    run_program("twin_cases", "refused_free_threaded", kind)


@twin_fork
@pytest.mark.parametrize("way", ["return", "raise", "sys_exit", "destroy"])
@pytest.mark.parametrize("place", subint.PLACES)
@each_kind
def test_child_returns_into_its_host(
    run_program: RunProgram, kind: str, place: str, way: str
) -> None:
    rows = told(run_program("twin_return", kind, place, way).out)
    child = next(row for row in rows if row.get("child") is True)
    parent = next(row for row in rows if row.get("child") is False)
    failure = {"raise": "ValueError: in the child", "sys_exit": "SystemExit: 3"}.get(way, "")
    assert failure in str(child["failure"]) and bool(failure) == bool(child["failure"])
    assert child["is_main_thread"] and child["threads"] == 1
    assert parent["failure"] == ""
    assert {"code": 0} in rows, rows
    if way == "destroy":
        assert {"interpreters": [0]} in rows


HOOKS = {
    "twin": {
        "parent": ["sub.before", "main.before", "main.parent", "sub.parent"],
        "child": ["main.child", "sub.child"],
    },
    "hop": {"parent": ["main.before", "main.parent"], "child": ["main.child"]},
}


@each_way
@each_kind
def test_order_of_hooks(run_program: RunProgram, kind: str, way: str) -> None:
    assert told(run_program("twin_cases", "hooks", kind, way).out) == [HOOKS[way]]


@twin_fork
@each_kind
def test_hook_of_main_starts_a_thread(run_program: RunProgram, kind: str) -> None:
    assert told(run_program("twin_cases", "hook_thread", kind).out) == [
        {"broken": [], "forks": 20}
    ]


@each_way
@each_kind
def test_signals_end_the_child_and_spare_the_parent(
    run_program: RunProgram, kind: str, way: str
) -> None:
    done = run_program("twin_cases", "signals", kind, way)
    assert told(done.out) == [{"handled": [], "woken": []}]


@twin_fork
@each_kind
def test_third_interpreter_is_refused(run_program: RunProgram, kind: str) -> None:
    (row,) = told(run_program("twin_cases", "chain", kind).out)
    assert "third interpreter" in str(row["refused"])
    assert row["unchanged"]


@twin_fork
@each_kind
def test_atexit_callbacks_stay_with_the_parent(run_program: RunProgram, kind: str) -> None:
    # main's own would run when the parent exits, which it does after this.
    assert told(run_program("twin_cases", "atexit_lists", kind).out) == [{"ran": "sub "}]


@twin_fork
@pytest.mark.parametrize("case", ["mask", "importing", "loop", "os_fork"])
@each_kind
def test_case(run_program: RunProgram, kind: str, case: str) -> None:
    run_program("twin_cases", case, kind)


@twin_fork
@pytest.mark.skipif(os.getuid() != 0, reason="needs root: becomes a user with RLIMIT_NPROC 0")
@each_kind
def test_fork_refused_by_the_system(run_program: RunProgram, kind: str) -> None:
    run_program("twin_cases", "refused_fork", kind)
