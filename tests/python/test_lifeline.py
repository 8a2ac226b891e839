"""No worker outlives its owner, whatever ends the owner, whatever the worker does."""

from __future__ import annotations

import os
import random
import signal

import pytest
from attack_helpers import PLACES, run_program

import anyfork

METHODS = [row.name for row in anyfork.methods() if row.has_process]
KINDS = ["busy", "sleep", "held", "hash", "setsid", "blocks", "stopped", "closed"]
KINDS += ["user"] if os.geteuid() == 0 else []
DEATHS = {
    "kill": -signal.SIGKILL,
    "thread": -signal.SIGKILL,
    "sibling": -signal.SIGKILL,
    "slow-sibling": -signal.SIGKILL,
    "os.fork": -signal.SIGKILL,
    "subprocess": -signal.SIGKILL,
    "_exit": 0,
    "segfault": -signal.SIGSEGV,
    "terminate": -signal.SIGTERM,
    "exec": 0,
    "exit": 0,
}


# While these go on, a child sleeps for seconds.
SLOW = ("sibling", "slow-sibling", "os.fork", "subprocess")


def rounds(scale: float, death: str) -> range:
    """A race that is lost once in a while is seen by trying often."""
    return range(max(1, int(4 * scale)) if death in SLOW else max(1, int(10 * scale)))


def attack(method: str, place: str, kind: str, death: str, *more: str, told: object = "") -> None:
    """run_program() fails if any process of the program is left; then what the
    owner waits for has to have happened."""
    done = run_program("attack_lifeline.py", method, place, kind, death, *more, orphans_may_take=30)
    if "MethodUnavailable" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    expected = DEATHS.get(death, -signal.SIGKILL)
    assert done.returncode == expected, (told, done.returncode, done.stdout, done.stderr)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_whatever_the_worker_does(method: str, kind: str, scale: float) -> None:
    for n in rounds(scale, "kill"):
        attack(method, "main", kind, "kill", told=f"round {n}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("death", [d for d in DEATHS if d != "kill"])
@pytest.mark.parametrize("method", METHODS)
def test_whatever_ends_the_owner(method: str, death: str, scale: float) -> None:
    for n in rounds(scale, death):
        attack(method, "main", "closed", death, told=f"round {n}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", [p for p in PLACES if p != "main"])
@pytest.mark.parametrize("method", METHODS)
def test_from_a_subinterpreter(method: str, place: str, scale: float) -> None:
    for kind, death in (("busy", "kill"), ("closed", "thread"), ("stopped", "sibling")):
        for n in rounds(scale, death):
            attack(method, place, kind, death, told=f"round {n} of {kind}, {death}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", METHODS)
def test_workers_of_workers(method: str, scale: float) -> None:
    for n in rounds(scale, "kill"):
        attack(method, "main", "nested", "kill", told=f"round {n}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", METHODS)
def test_owner_dies_around_the_start(method: str, scale: float) -> None:
    seed = random.randrange(2**32)
    told = f"seed {seed}"
    print(told)  # where run_program() fails, it is in what pytest captured
    chance = random.Random(seed)
    for _ in range(max(10, int(100 * scale))):
        attack(method, "main", "busy", "random", str(chance.randrange(2000)), told=told)
