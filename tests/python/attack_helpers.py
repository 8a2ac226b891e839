"""Run the attack programs of tests/programs, each in a process of its own."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent.parent / "programs"
PLACES = ("main", "legacy", "isolated")
LIMIT = 3 * float(os.environ.get("ATTACK_LIMIT", "40")) + 10


def leftovers(tag: str) -> list[int]:
    """Processes that were started, however indirectly, with this mark in their
    environment and still run."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as f:
                marked = tag.encode() in f.read()
            with open(f"/proc/{entry}/stat") as f:
                state = f.read().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if marked and state not in "ZX":
            found.append(int(entry))
    return found


def run_program(
    name: str,
    *args: str,
    timeout: float = LIMIT,
    env: dict[str, str] | None = None,
    orphans_may_take: float = 10.0,
) -> subprocess.CompletedProcess[str]:
    """Run tests/programs/NAME; no process of it may be left."""
    tag = f"ATTACK_TAG={uuid.uuid4().hex}"
    key, _, value = tag.partition("=")
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", str(PROGRAMS / name), *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **(env or {}), key: value},
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in leftovers(tag):
            os.kill(pid, signal.SIGABRT if pid == process.pid else signal.SIGKILL)
        out, err = process.communicate(timeout=30)
        pytest.fail(f"{name} {' '.join(args)} hangs\n{out}\n{err}")
    end = time.monotonic() + orphans_may_take
    while (left := leftovers(tag)) and time.monotonic() < end:
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"{name} {args}: processes left: {left}\n{out}\n{err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_check(module: str, check: str, place: str) -> None:
    done = run_program("attack_run.py", module, check, place)
    ok = done.returncode == 0 and done.stdout.rstrip().endswith("ok")
    assert ok, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"


def checks(module: str) -> list[tuple[str, str]]:
    """(check, place) of every check of an attack module."""
    if str(PROGRAMS) not in sys.path:
        sys.path.insert(0, str(PROGRAMS))
    loaded = importlib.import_module(module)
    return [
        (name, place)
        for name in vars(loaded)
        if name.startswith("check_")
        for place in getattr(getattr(loaded, name), "places", PLACES)
    ]


# What is known to fail, and why: strict, so that its repair removes it from here.
DESTROYED = "the states of dead threads are destroyed, not left alone"
KNOWN: dict[str, str] = {}
if not sys._is_gil_enabled():
    KNOWN["check_thread_locals_of_the_parent-main"] = DESTROYED


def parametrized(module: str) -> pytest.MarkDecorator:
    """Parametrize with (check, place) of every check of an attack module."""
    rows = []
    for check, place in checks(module):
        why = KNOWN.get(check) or KNOWN.get(f"{check}-{place}")
        marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
        rows.append(pytest.param(check, place, marks=marks, id=f"{check[6:]}-{place}"))
    return pytest.mark.parametrize(("check", "place"), rows)
