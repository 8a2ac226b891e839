"""Many forks leave the parent as it was: states, interpreters, fds, memory, references."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from conftest import FORKS_AT_SCALE_1, RunProgram
from known_outcomes import DEBUG, FREE_THREADED

# Debug builds grow by about 2.4 MB once, however many forks there are.
RSS_SLACK_KB = 8192 if DEBUG else 4096

# Of a leak of one per fork. CPython's caches take up to 90 in a round, whether of 120 forks or 400.
CACHES = 0.8

twin = pytest.mark.skipif(FREE_THREADED, reason="twin fork is refused there")


def least_growth(snapshots: list[dict[str, Any]], key: str) -> int:
    """A leak of one per fork grows by n in every round; a cache that is filled once, by
    some hundred, in one."""
    values = [snapshot[key] for snapshot in snapshots]
    return min(after - before for before, after in itertools.pairwise(values))


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
    n = max(120, int(FORKS_AT_SCALE_1 * scale / 3))  # in each of three rounds
    row = json.loads(run_program("leaks", kind, way, n, timeout=800).out)
    assert row["bad"] == []
    first, *later = row["snapshots"]
    for after in later:
        for key in ("runtime", "interpreters", "fds", "threads"):
            assert after[key] == first[key], key
        assert after["rss_kb"] - first["rss_kb"] < RSS_SLACK_KB
    if not FREE_THREADED:
        for key in ("refs", "blocks"):
            assert least_growth(row["snapshots"], key) < n * CACHES, key
