"""The calling interpreter is frozen at the fork, however busy its threads are."""

from __future__ import annotations

import json

import pytest
import subint
from conftest import FORKS_AT_SCALE_1, RunProgram
from known_outcomes import FREE_THREADED


@pytest.mark.timeout(900)
@pytest.mark.skipif(FREE_THREADED, reason="twin fork is refused there")
@pytest.mark.parametrize("kind", subint.KINDS)
def test_busy_threads(run_program: RunProgram, scale: float, kind: str) -> None:
    n = max(20, int(FORKS_AT_SCALE_1 * scale * 0.15))  # 300 at scale 1
    done = run_program("held_gil", kind, n, timeout=800)
    assert json.loads(done.out) == {"forks": n, "broken": []}
