"""What the programs do with the processes that they start: wait, with a bound."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

LOOK_AT_HUNG = 5.0  # seconds
LIMIT = 60.0  # seconds that a child may take, on a machine under load


def wait(pid: int, limit: float = LIMIT) -> int | None:
    """The exit code of a child, negative for a signal; None if it hung and was killed."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        hung = not poll.poll(limit * 1000)
    finally:
        os.close(pidfd)
    if hung:
        tell_hung(pid)
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if hung else code


def tell_progress(done: int, count: int, bad: int, began: float) -> None:
    """The line that tools/soak shows."""
    speed = done / (time.monotonic() - began)
    print(
        f"{done}/{count} forks, {bad} bad, {speed:.0f}/s, {(count - done) / speed:.0f} s left",
        file=sys.stderr,
        flush=True,
    )


def tell_hung(pid: int | None) -> None:
    """Before it is killed: tools/soak looks at what it waits for."""
    os.write(2, f"hung: {pid}\n".encode())
    time.sleep(LOOK_AT_HUNG)


def in_child(fork: Callable[[], int], work: Callable[[], object]) -> int | None:
    """Fork; the child calls work() and ends with 0, or shows the error and ends with 1."""
    pid = fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            try:
                sys.stderr.flush()
            finally:
                os._exit(code)
    return wait(pid)


def tell(value: Any) -> None:
    """Write one line of JSON, at once and whole, whatever streams are left."""
    os.write(1, (json.dumps(value) + "\n").encode())


def leave(code: int = 0) -> None:
    """End the program without finalizing: 3.13.18 would abort, see known_outcomes.py."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
