"""No worker outlives its owner, whatever ends the owner, whatever the worker does."""

from __future__ import annotations

import random
import signal

import pytest
from attack_helpers import PLACES, run_program

import anyfork

METHODS = [row.name for row in anyfork.methods() if row.has_process]
KINDS = ("busy", "sleep", "held", "hash", "setsid", "blocks", "stopped", "closed")
DEATHS = {
    "kill": -signal.SIGKILL,
    "thread": -signal.SIGKILL,
    "sibling": -signal.SIGKILL,
    "slow-sibling": -signal.SIGKILL,
    "_exit": 0,
    "segfault": -signal.SIGSEGV,
    "terminate": -signal.SIGTERM,
    "exec": 0,
    "exit": 0,
}


def attack(method: str, place: str, kind: str, death: str, *more: str) -> None:
    """run_program() fails if any process of the program is left; then what the
    owner waits for has to have happened."""
    done = run_program("attack_lifeline.py", method, place, kind, death, *more, orphans_may_take=30)
    if "MethodUnavailable" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    expected = DEATHS.get(death, -signal.SIGKILL)
    assert done.returncode == expected, (done.returncode, done.stdout, done.stderr)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_whatever_the_worker_does(method: str, kind: str) -> None:
    attack(method, "main", kind, "kill")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("death", [d for d in DEATHS if d != "kill"])
@pytest.mark.parametrize("method", METHODS)
def test_whatever_ends_the_owner(method: str, death: str) -> None:
    attack(method, "main", "closed", death)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", [p for p in PLACES if p != "main"])
@pytest.mark.parametrize("method", METHODS)
def test_from_a_subinterpreter(method: str, place: str) -> None:
    for kind, death in (("busy", "kill"), ("closed", "thread"), ("stopped", "sibling")):
        attack(method, place, kind, death)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", METHODS)
def test_workers_of_workers(method: str) -> None:
    attack(method, "main", "nested", "kill")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", METHODS)
def test_owner_dies_around_the_start(method: str) -> None:
    chance = random.Random(0)
    for _ in range(25):
        attack(method, "main", "busy", "random", str(chance.randrange(2000)))
