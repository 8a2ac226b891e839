"""Targets of the workers. A module of its own: `subint_fork` imports them by name
in the main interpreter, which has never seen the application. So it imports little."""

from __future__ import annotations

import os
import sys
import time
from typing import Any


class Refused(Exception):
    """An exception that only this application knows."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def square(n: int) -> int:
    return n * n


def refuse(code: int) -> None:
    raise Refused(code)


def leave(code: int) -> None:
    sys.exit(code)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def tell_and_sleep(fd: int, seconds: float) -> None:
    os.write(fd, b"x")
    time.sleep(seconds)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def loop_square(n: int) -> int:
    import asyncio

    async def later() -> int:
        await asyncio.sleep(0.001)
        return n * n

    return asyncio.run(later())


def put(queue: Any, n: int) -> None:
    queue.put(n * n)


def answer(connection: Any) -> None:
    connection.send(square(connection.recv()))
    connection.close()
