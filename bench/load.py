"""What goes on beside a measurement."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def busy(n: int) -> Iterator[None]:
    """n threads of this interpreter that only compute."""
    stop: list[bool] = []

    def spin() -> None:
        while not stop:
            sum(range(500))

    threads = [threading.Thread(target=spin) for _ in range(n)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.append(True)
        for thread in threads:
            thread.join()
