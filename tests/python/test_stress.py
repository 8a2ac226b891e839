"""Many interpreters and threads fork at once: nothing bad, nothing hung, nothing left."""

from __future__ import annotations

import json

import pytest
from conftest import FORKS_AT_SCALE_1, RunProgram
from known_outcomes import FREE_THREADED


@pytest.mark.timeout(1800)
def test_stress(run_program: RunProgram, scale: float) -> None:
    count = max(12, int(FORKS_AT_SCALE_1 * scale))
    done = run_program("stress", "--count", count, timeout=1700, check=False)
    row = json.loads(done.out.splitlines()[-1])
    print(row)
    assert row["forks"] == count, row
    assert row["ways"] == (["hop"] if FREE_THREADED else ["twin", "hop"]), row
    assert (row["bad"], row["hung"], row["failures"]) == ([], 0, []), (row, done.err)
    assert row["leftover"] == {"interpreters": 0, "fds": 0}, row
    assert row["churned"] > 0, row
    assert done.returncode == 0, done.err
