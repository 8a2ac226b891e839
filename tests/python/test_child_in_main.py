"""A worker in main can do all that a process can, from wherever it was started."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import child_checks
import pytest
from conftest import RunProgram
from judge import judge

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def outcomes_from(run_program: RunProgram) -> Callable[[str], dict[str, dict[str, object]]]:
    """All checks for one start, run once."""

    @cache
    def run(start: str) -> dict[str, dict[str, object]]:
        done = run_program("child_in_main", start, timeout=500)
        return {row["check"]: row for row in map(json.loads, done.out.splitlines())}

    return run


@pytest.mark.parametrize("check", child_checks.MAIN)
@pytest.mark.parametrize("start", ["legacy", "isolated", "pad", "main"])
def test_child(
    outcomes_from: Callable[[str], dict[str, dict[str, object]]], start: str, check: str
) -> None:
    judge("child in main", start, outcomes_from(start)[check])
