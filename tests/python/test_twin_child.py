"""The child of anyfork.fork() in a sub-interpreter is whole, and stays in it."""

from __future__ import annotations

import json
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
