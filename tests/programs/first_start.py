"""usage: first_start.py METHOD. A signal handler that starts a worker, and one that
raises, from before this process's first start."""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
from types import FrameType

import anyfork
from anyfork import _anyfork

ROUNDS = 40


def main(method: str) -> None:
    faulthandler.dump_traceback_later(60, exit=True)
    busy = started = 0

    def start(_number: int, _frame: FrameType | None) -> None:
        nonlocal busy, started
        if not busy:
            busy = 1
            try:
                assert anyfork.run(int, method=method) == 0
                started += 1
            finally:
                busy = 0

    signal.signal(signal.SIGALRM, start)
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    end = time.monotonic() + 60
    rounds = 0
    while (rounds < ROUNDS or started < 3) and time.monotonic() < end:
        assert anyfork.run(int, method=method) == 0
        rounds += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert rounds >= ROUNDS and started >= 3, (rounds, started)
    state = _anyfork.layout()["stack"]
    assert state[0] == "ready", state
    print("ok")


if __name__ == "__main__":
    main(sys.argv[1])
