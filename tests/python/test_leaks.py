"""Many forks leave the parent as it was: states, interpreters, fds, memory, references."""

from __future__ import annotations

import json

import pytest
from conftest import FORKS_AT_SCALE_1, RunProgram
from known_outcomes import DEBUG, FREE_THREADED

# Debug builds grow by about 2.4 MB once, however many forks there are.
RSS_SLACK_KB = 8192 if DEBUG else 4096
# One thread forks, so one is in use, and others may be about to be idle.
MAX_HOLDERS = 4
# The two snapshots themselves, and what the interpreter caches now and then.
SLACK = 100

twin = pytest.mark.skipif(FREE_THREADED, reason="twin fork is refused there")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param("legacy", "fork", marks=twin),
        pytest.param("isolated", "fork", marks=twin),
        pytest.param("legacy", "spawn:fork", marks=twin),
        pytest.param("isolated", "spawn:fork", marks=twin),
        ("legacy", "spawn:subint_fork"),
        ("isolated", "spawn:subint_fork"),
        ("main", "fork"),
        ("main", "spawn:fork"),
        ("main", "spawn:subint_fork"),
    ],
)
def test_nothing_is_left(run_program: RunProgram, scale: float, kind: str, way: str) -> None:
    n = max(100, int(FORKS_AT_SCALE_1 * scale))
    row = json.loads(run_program("leaks", kind, way, n, timeout=800).out)
    assert row["forks"] == n and row["bad"] == []
    before, after = row["before"], row["after"]
    for key in ("runtime", "interpreters", "fds", "other_threads"):
        assert after[key] == before[key], key
    assert after["holders"] <= MAX_HOLDERS
    assert after["rss_kb"] - before["rss_kb"] < RSS_SLACK_KB
    if DEBUG and not FREE_THREADED:
        assert after["refs"] - before["refs"] < SLACK
    if not FREE_THREADED:
        assert after["blocks"] - before["blocks"] < SLACK
