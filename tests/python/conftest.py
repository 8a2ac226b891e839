"""What all tests share: the methods, programs in subprocesses, and the leak check.

Rules: a crasher is a program of tests/programs, run by `run_program`. Every test
leaves the process as it found it, or fails: `leak_check` looks.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import pytest

PROGRAMS = Path(__file__).resolve().parent.parent / "programs"
sys.path.insert(0, str(PROGRAMS))

import known_outcomes  # noqa: E402

import anyfork  # noqa: E402
from anyfork import _anyfork  # noqa: E402

# A shell ignores these for what it runs in the background, and they would stay so in
# every program that the tests start.
for _number in (signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(
            _number,
            signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL,
        )

FORKS_AT_SCALE_1 = 2000
DEFAULT_SCALE = 0.1
SETTLE_SECONDS = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--scale",
        type=float,
        default=float(os.environ.get("ANYFORK_SCALE") or DEFAULT_SCALE),
        help="size of the stress and leak tests; 1 is what `make matrix` runs "
        "(default: $ANYFORK_SCALE, else %(default)s)",
    )
    parser.addoption(
        "--part",
        type=_part,
        metavar="K/N",
        help="only the Kth of N parts of the tests, counted from 1; the others are deselected. "
        "Which part a test is in depends on its name alone",
    )


def _part(text: str) -> tuple[int, int]:
    k, _slash, n = text.partition("/")
    if not (k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"1/2 or 2/2 say, not {text!r}")
    return int(k), int(n)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    if part is None:
        return
    k, n = part
    chosen = [item for item in items if zlib.crc32(item.nodeid.encode()) % n == k - 1]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> float:
    """How large the large tests are."""
    return float(request.config.getoption("--scale"))


@pytest.fixture(params=[row.name for row in anyfork.methods()])
def method(request: pytest.FixtureRequest) -> str:
    """Each spawn method by name; one that cannot work here is a named skip."""
    row = next(row for row in anyfork.methods() if row.name == request.param)
    if not row.available:
        pytest.skip(f"{row.name}: {row.reason}")
    return row.name


# ---- programs -----------------------------------------------------------------------


class Finished(NamedTuple):
    """A program that has ended: its exit code (negative: signal) and what it said."""

    returncode: int
    out: str
    err: str


class RunProgram(Protocol):
    def __call__(
        self, name: str, *args: object, timeout: float = ..., check: bool = ...
    ) -> Finished: ...


def _group_members(pgid: int) -> list[str]:
    """The live processes of a group, as "pid command"."""
    members = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text()
        except OSError:
            continue
        command, rest = stat.rsplit(")", 1)
        state, _ppid, group = rest.split()[:3]
        if int(group) == pgid and state not in "ZX":
            members.append(command.replace(" (", " ", 1))
    return members


def run_program_in_subprocess(
    name: str, *args: object, timeout: float = 100.0, check: bool = True
) -> Finished:
    """Run tests/programs/NAME.py in a process group of its own; see `run_program`."""
    argv = [sys.executable, "-X", "faulthandler", str(PROGRAMS / f"{name}.py"), *map(str, args)]
    if not check:
        del argv[1:3]  # a program that is meant to die says so itself
    # Files, not pipes: a process left behind would keep those open.
    with tempfile.TemporaryFile() as out_file, tempfile.TemporaryFile() as err_file:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out_file, stderr=err_file, process_group=0
        )
        hung = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            hung = True
            os.kill(process.pid, signal.SIGABRT)  # faulthandler tells where it hangs
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        finally:
            # Also on an error of ours: nothing of the group survives the test.
            if process.poll() is None:
                process.kill()
                process.wait()
            left = _wait_for_group(process.pid)
            if left:
                os.killpg(process.pid, signal.SIGKILL)
        out, err = _text(out_file), _text(err_file)
    if hung:
        pytest.fail(f"{name}.py hung for {timeout} s\n{out}\n{err}")
    if left:
        pytest.fail(f"{name}.py left processes behind: {left}\n{out}\n{err}")
    if check and process.returncode != 0:
        pytest.fail(f"{name}.py ended with {process.returncode}\n{out}\n{err}")
    return Finished(process.returncode, out, err)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _wait_for_group(pgid: int) -> list[str]:
    """What is left of a group once a worker's lifeline had time to end it."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := _group_members(pgid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@pytest.fixture(scope="session")
def run_program() -> RunProgram:
    """run_program(name, *args): run tests/programs/NAME.py to its end.

    It must end in `timeout` seconds (else it is killed), leave no process behind
    and, unless check=False, exit with 0.
    """
    return run_program_in_subprocess


# ---- leaks --------------------------------------------------------------------------


def _fds() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # the one that listdir() had open
            continue
    return found


def _children() -> list[str]:
    children: list[str] = []
    for task in os.listdir("/proc/self/task"):
        try:
            children += Path("/proc/self/task", task, "children").read_text().split()
        except OSError:  # a thread that has just ended
            continue
    return sorted(children)


def snapshot() -> dict[str, Any]:
    """What a test must not change. The launch pad, once started, stays: it and its
    interpreter are not counted."""
    runtime = _anyfork.runtime() or {}
    return {
        "fds": _fds(),
        "children": _children(),
        "interpreters": runtime.get("interpreters", 1) - bool(runtime.get("pad")),
        "main_thread_states": runtime.get("main_thread_states"),
        "main_tstate_alive": runtime.get("main_tstate_alive"),
    }


def changes(before: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What differs from a snapshot, after threads and processes had time to end."""
    deadline = time.monotonic() + seconds
    while (after := snapshot()) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


@pytest.fixture(autouse=True)
def leak_check() -> Iterator[None]:
    """Fails a test that leaves fds, children, thread states or interpreters behind."""
    before = snapshot()
    yield
    changed = changes(before, SETTLE_SECONDS)
    assert not changed, f"left behind (before, after): {changed}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Known outcomes are part of every report."""
    if not known_outcomes.seen:
        return
    terminalreporter.section("known outcomes, asserted as such")
    groups: dict[tuple[str, str, object], dict[str, list[str]]] = {}
    for (area, check, kind), row in known_outcomes.seen.items():
        group = groups.setdefault((row.reason, area, row.outcome), {})
        group.setdefault(check, []).append(kind)
    for (reason, area, outcome), checks in groups.items():
        kinds = sorted({kind for found in checks.values() for kind in found if kind})
        where = f" [{', '.join(kinds)}]" if kinds else ""
        terminalreporter.write_line(f"* {area}{where}: {', '.join(checks)} -> {outcome}")
        terminalreporter.write_line(f"    {reason}")
