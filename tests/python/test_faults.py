"""Fault injection: each call of the parent's path fails in turn, and nothing leaks.

The loop is tests/programs/fault_loop.py; this is its table. Needs a build with
-Dfaults=true (tools/faults makes it). The summary tells how many faults were hit;
a loop that hit none fails.
"""

from __future__ import annotations

import json
import sysconfig
from collections import Counter
from typing import Any

import pytest
from conftest import RunProgram

import anyfork
from anyfork import _anyfork

pytestmark = pytest.mark.skipif(
    not _anyfork.FAULTS, reason="built without -Dfaults=true; tools/faults makes such a build"
)

PLACES = ("main", "legacy", "isolated")
# Where there is no twin fork these work in main only.
NEED_TWIN = {"fork()", "forkpty()", *(r.name for r in anyfork.methods() if r.target == "caller")}
METHODS = [row.name for row in anyfork.methods()]
WITH_OPTIONS = [f"{row.name}+options" for row in anyfork.methods() if row.has_process]
OPERATIONS = ("fork()", "forkpty()", *METHODS)
# What options and the guard do is the same in any interpreter.
CASES = [
    *((place, operation) for place in PLACES for operation in OPERATIONS),
    *(("main", operation) for operation in WITH_OPTIONS),
]

_hit: Counter[str] = Counter()


class _Summary:
    """Tells at the end what was hit."""

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("faults")
        terminalreporter.write_line(f"{_hit['hits']} faults hit at {_hit['points']} points")
        for outcome, count in sorted(_hit.items()):
            if outcome not in ("hits", "points"):
                terminalreporter.write_line(f"  {count:5d}  {outcome}")


@pytest.fixture(scope="module", autouse=True)
def summary(request: pytest.FixtureRequest) -> None:
    if not request.config.pluginmanager.has_plugin("anyfork-faults"):
        request.config.pluginmanager.register(_Summary(), "anyfork-faults")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("warmth", ["warm", "cold"])
@pytest.mark.parametrize("how", ["once", "for-good"])
@pytest.mark.parametrize(("place", "operation"), CASES)
def test_each_failing_call_is_reported_and_leaks_nothing(
    run_program: RunProgram, place: str, operation: str, how: str, warmth: str
) -> None:
    free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
    if place != "main" and (operation in NEED_TWIN or warmth == "cold") and free_threaded:
        pytest.skip("no twin fork on a free-threaded build")
    if operation.startswith("zygote") and (how, warmth) != ("once", "warm"):
        pytest.skip("a try of its own template each, or 30 s for one that never answers")
    arguments = (place, operation, how, warmth)
    found = json.loads(run_program("fault_loop", *arguments, timeout=500).out)
    _hit.update(found["seen"])
    _hit["hits"] += found["hits"]
    _hit["points"] += found["points"]
    assert not found["bad"], f"{' '.join(arguments)}: " + "\n".join(found["bad"])
    assert found["hits"] > 0, f"{' '.join(arguments)}: no fault point reached"
