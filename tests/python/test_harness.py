"""The harness itself: it notices what it is there for."""

from __future__ import annotations

import os
import signal

import conftest
import pytest
import subint


@pytest.mark.parametrize(
    ("how", "message"),
    [("hang", "hung for"), ("orphan", "left processes behind"), ("fail", "ended with 5")],
)
def test_program(monkeypatch: pytest.MonkeyPatch, how: str, message: str) -> None:
    monkeypatch.setattr(conftest, "SETTLE_SECONDS", 0.5)
    with pytest.raises(pytest.fail.Exception, match=message):
        conftest.run_program_in_subprocess("misbehave", how, timeout=2 if how == "hang" else 60)


def test_leaked_fd() -> None:
    before = conftest.snapshot()
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        assert list(conftest.changes(before, 0)) == ["fds"]
    finally:
        os.close(fd)


def test_leaked_child() -> None:
    before = conftest.snapshot()
    child = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    try:
        assert list(conftest.changes(before, 0)) == ["children"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("kind", subint.KINDS)
def test_leaked_interpreter(kind: str) -> None:
    before = conftest.snapshot()
    with subint.interpreter(kind):
        assert "interpreters" in conftest.changes(before, 0)
