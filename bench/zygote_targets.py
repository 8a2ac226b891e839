"""What the workers of bench_zygote.py run: in a module, so that all methods find it."""

from __future__ import annotations

import gc
import sys
import time
from typing import Any


def stamp() -> int:
    """The time of a worker's first line."""
    return time.monotonic_ns()


def stamp_with(module: str) -> int:
    """The same, once the module is there."""
    __import__(module)
    return time.monotonic_ns()


def send_stamp(connection: Any, module: str) -> None:
    connection.send(stamp_with(module))


def nothing() -> None:
    pass


def private_kb() -> int:
    """What this process alone has in memory."""
    with open("/proc/self/smaps_rollup") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith("Private_"))


def memory(module: str) -> tuple[int, int]:
    """Private memory in kB at the first line, and after some work and a collection."""
    __import__(module)
    before = private_kb()
    kept = [{"n": n, "text": str(n)} for n in range(2000)]
    gc.collect()
    return before, private_kb() - sys.getsizeof(kept) // 1024


def send_memory(connection: Any, module: str) -> None:
    connection.send(memory(module))
