"""The requests that the load is made of, and the only right answer to each."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

METHODS = ("fork", "subint_fork")

# operation: (how many of each round, the answer for n)
_ROUND: dict[str, tuple[int, Callable[[int], object]]] = {
    "fork": (4, lambda n: n),
    "os_fork": (3, lambda n: n),
    "twins": (2, lambda n: n),
    "forkpty": (2, lambda n: ["tty=True", n]),
    "pexpect": (2, lambda n: n),
    "closure": (2, lambda n: n * n),
    "mp.Process": (2, lambda n: n),
    "mp.Pool": (1, lambda n: [n * n, (n + 1) ** 2, (n + 2) ** 2]),
    "mp.with_pool": (1, lambda n: [n * n]),
    "mp.Pipe": (2, lambda n: [n * n, 0]),
    "mp.Queue": (2, lambda n: [n * n, 0]),
    "refused": (2, lambda n: [True, True, n]),
}
for _method in METHODS:
    _ROUND[f"spawn.{_method}"] = (3, lambda n: [n * n, 0])
    _ROUND[f"raise.{_method}"] = (2, lambda n: [n, True])
    _ROUND[f"exit.{_method}"] = (2, lambda n: n)
    _ROUND[f"terminate.{_method}"] = (2, lambda n: -15)
    _ROUND[f"say.{_method}"] = (2, lambda n: 0)
    _ROUND[f"loop.{_method}"] = (1, lambda n: n * n)

OPERATIONS = tuple(_ROUND)


@dataclass
class Reply:
    operation: str
    n: int
    pid: int = 0
    result: object = None
    error: str = ""
    seconds: float = 0.0

    @property
    def wrong(self) -> str:
        """Why this answer is not the right one; empty if it is."""
        if self.error:
            return self.error
        right = _ROUND[self.operation][1](self.n) if self.operation in _ROUND else self.result
        return "" if self.result == right else f"expected {right!r}, got {self.result!r}"


def mix(count: int, first: int = 0, without: Container[str] = ()) -> Iterator[tuple[str, int]]:
    """`count` requests: (operation, n)."""
    full = {name: each for name, (each, _) in _ROUND.items() if name not in without}
    left: dict[str, int] = {}
    made = 0
    while made < count:
        if not any(left.values()):
            left = dict(full)
        for name in left:
            if left[name] and made < count:
                left[name] -= 1
                n = first + made
                # The log tells the lines of say apart by their n. Elsewhere an exit code
                # fits in a byte; 0 would also be that of a child that did nothing.
                yield name, n if name.startswith("say.") else 1 + n % 120
                made += 1


def ask(port: int, operation: str, n: int, timeout: float = 90.0) -> Reply:
    reply = Reply(operation, n)
    script = "strict" if operation == "refused" else "app"
    started = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", f"/{script}/{operation}?n={n}", headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            reply.error = f"HTTP {response.status}: {body[:200]!r}"
        else:
            data = json.loads(body)
            reply.pid = data["pid"]
            reply.result = data.get("result")
            reply.error = data.get("error", "")
    except (OSError, http.client.HTTPException, ValueError) as exc:
        reply.error = f"{type(exc).__name__}: {exc}"
    finally:
        connection.close()
    reply.seconds = time.monotonic() - started
    return reply


def load(port: int, requests: list[tuple[str, int]], concurrency: int) -> list[Reply]:
    """Send them all, `concurrency` at a time, and wait for all answers."""
    todo = iter(requests)
    replies: list[Reply] = []
    lock = threading.Lock()
    start = threading.Barrier(concurrency)

    def client() -> None:
        start.wait()
        while True:
            with lock:
                request = next(todo, None)
            if request is None:
                return
            reply = ask(port, *request)
            with lock:
                replies.append(reply)

    clients = [threading.Thread(target=client, daemon=True) for _ in range(concurrency)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return replies
