"""Results, exceptions, exits, event loops, nesting, and the handle of a worker."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check, run_program


@pytest.mark.timeout(300)
@parametrized("attack_spawn")
def test_spawn(check: str, place: str) -> None:
    run_check("attack_spawn", check, place)


PAD_MODES = {
    "idle": 0,
    "exit": 7,
    "raise": 7,
    "logging": 0,
    "logging-live": 0,
    "atexit": 0,
    "atexit-live": 0,
    "shutdown": 0,
    "thread": 0,
    "del": 0,
    "del-live": 0,
    "finalize": 0,
    "forked": 0,
    "threads": 0,
    "daemon": 0,
    "hooks": 0,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", PAD_MODES)
def test_pad(mode: str) -> None:
    """It is never waited for without end, and the end of a program is as without it."""
    done = run_program("attack_pad.py", mode)
    assert done.returncode == PAD_MODES[mode], (done.stdout, done.stderr)
    assert done.stderr == ""
    if mode not in ("exit", "raise"):
        assert "ok" in done.stdout.split()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", ["fork", "subint_fork"])
def test_a_signal_handler_starts_a_worker_in_the_middle_of_the_first_start(method: str) -> None:
    done = run_program("first_start.py", method)
    if "MethodUnavailable" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.split() == ["ok"]
