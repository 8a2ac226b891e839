"""Many starts by each method: one after the other, and all alive at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import RunProgram
from known_outcomes import DEBUG

import anyfork

METHODS = [row.name for row in anyfork.methods() if row.has_process and row.available]
ALIVE_AT_SCALE_1 = 1000
RSS_SLACK_KB = 16384 if DEBUG else 8192


def starts(run_program: RunProgram, *arguments: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(run_program("starts", *arguments, timeout=1100).out)
    print(row)
    assert row["bad"] == []
    first, last = row["snapshots"][0], row["snapshots"][-1]
    for key in ("runtime", "interpreters", "fds", "threads"):
        assert last[key] == first[key], key
    assert last["rss_kb"] - first["rss_kb"] < RSS_SLACK_KB
    return row


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", METHODS)
def test_one_after_the_other(run_program: RunProgram, method: str) -> None:
    assert starts(run_program, method, "60")["starts"] == 60


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", METHODS)
def test_all_alive_at_once(run_program: RunProgram, scale: float, method: str) -> None:
    count = max(30, int(ALIVE_AT_SCALE_1 * scale))
    row = starts(run_program, method, str(count), "--alive")
    if row["starts"] < count:
        print(f"memory for {row['starts']} of {count} workers by {method}")
    assert row["starts"] > 0
