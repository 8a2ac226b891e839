"""Targets of supervised children, by name: imported in their workers."""

from __future__ import annotations

import os
import re
import signal
import time

import anyfork


def wait(seconds: float = 1000.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, max(0.0, end - time.monotonic())))


def ready_after(seconds: float) -> None:
    time.sleep(seconds)
    assert anyfork.notify_ready()
    assert not anyfork.notify_ready()
    wait()


def deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    anyfork.notify_ready()
    wait()


def fail(text: str) -> None:
    raise ValueError(text)


def loop() -> None:
    while True:
        pass


def in_c() -> None:
    """One call of a C function that holds the GIL, for hours."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def write(path: str, text: str = "") -> None:
    with open(path, "a") as file:
        file.write(text or f"{os.getpid()}\n")
    wait()
