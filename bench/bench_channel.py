"""A channel beside multiprocessing's Connection and memcpy(3), interleaved, in one run.

usage: bench_channel.py [--rounds N] [--json]

echo: a message to another process and back, by poll(2), and by polling for 200 µs with the GIL
held (spin). one way: messages that the other process takes and drops without reading them,
until it has said that it has the last one. both ways: as echo. memcpy: the same bytes, once,
to memory that is there already. Times in µs, medians; ratios: medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from anyfork._anyfork import Channel

SPIN = 200e-6
ECHO, DROP, ASK = 1, 2, 3
KIB, MIB = 1024, 1 << 20
# Bytes: messages in a round.
SIZES = {100: 500, 16 * KIB: 300, 64 * KIB: 200, MIB: 60, 100 * MIB: 3}


def send(channel: Channel, kind: int, parts: list[Any]) -> None:
    while not channel.send(kind, 0, parts):
        channel.wait_writable()


def receive(channel: Channel, spin: float) -> tuple[Any, ...]:
    while (message := channel.receive()) is None:
        channel.wait(None, spin)
    return message


def serve_channel(channel: Channel, spin: float) -> None:
    while True:
        try:
            kind, _id, parts, _fds = receive(channel, spin)
        except EOFError:
            return
        if kind != DROP:
            send(channel, kind, list(parts))


def serve_connection(connection: Connection) -> None:
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        if data[:1] != b"d":
            connection.send_bytes(data)


@contextmanager
def child(run: Callable[[], None], ours: Any, theirs: Any) -> Iterator[None]:
    pid = os.fork()
    if pid == 0:
        ours.close()
        try:
            run()
        finally:
            os._exit(0)
    theirs.close()
    try:
        yield
    finally:
        ours.close()
        os.waitpid(pid, 0)


class ByChannel:
    def __init__(self, channel: Channel, spin: float) -> None:
        self.channel, self.spin = channel, spin

    def echo(self, data: bytes, n: int) -> None:
        for _ in range(n):
            send(self.channel, ECHO, [data])
            receive(self.channel, self.spin)

    def one_way(self, data: bytes, n: int) -> None:
        for _ in range(n):
            send(self.channel, DROP, [data])
        send(self.channel, ASK, [])
        receive(self.channel, self.spin)


class ByConnection:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def echo(self, data: bytes, n: int) -> None:
        data = b"e" + data[1:]
        for _ in range(n):
            self.connection.send_bytes(data)
            self.connection.recv_bytes()

    def one_way(self, data: bytes, n: int) -> None:
        data = b"d" + data[1:]
        for _ in range(n):
            self.connection.send_bytes(data)
        self.connection.send_bytes(b"ask")
        self.connection.recv_bytes()


class ByCopy:
    """What one copy of it takes."""

    def __init__(self) -> None:
        self.to = bytearray(max(SIZES))

    def one_way(self, data: bytes, n: int) -> None:
        view = memoryview(self.to)[: len(data)]
        for _ in range(n):
            view[:] = data

    echo = one_way


@contextmanager
def by_channel(spin: float) -> Iterator[ByChannel]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = ends[0].detach()

    def run() -> None:
        os.close(fd)
        serve_channel(Channel(ends[1].detach()), spin)

    with child(run, ours := _Closing(fd), ends[1]):
        ours.channel = Channel(fd)
        yield ByChannel(ours.channel, spin)


class _Closing:
    """The owner's end: a descriptor, until the child has its own."""

    def __init__(self, fd: int) -> None:
        self.fd, self.channel = fd, None

    channel: Channel | None

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()


@contextmanager
def by_connection() -> Iterator[ByConnection]:
    ours, theirs = multiprocessing.Pipe()
    with child(lambda: serve_connection(theirs), ours, theirs):
        yield ByConnection(ours)


def timed(call: Callable[[bytes, int], None], data: bytes, n: int) -> float:
    begun = time.perf_counter_ns()
    call(data, n)
    return (time.perf_counter_ns() - begun) / n / 1e3


def measure(rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with by_channel(0) as polls, by_channel(SPIN) as spins, by_connection() as peer:
        ways = {"channel": polls, "spin": spins, "connection": peer, "memcpy": ByCopy()}
        for size, n in SIZES.items():
            data = os.urandom(min(size, MIB)) * max(size // MIB, 1)
            for what in ("echo", "one_way"):
                took: dict[str, list[float]] = {name: [] for name in ways}
                for r in range(rounds + 1):  # the first warms up
                    for name, way in ways.items():
                        us = timed(getattr(way, what), data, n)
                        if r > 0:
                            took[name].append(us)
                rows.append(row(what, size, took))
    return rows


def row(what: str, size: int, took: dict[str, list[float]]) -> dict[str, Any]:
    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(took[a], took[b], strict=True))

    best = min(("channel", "spin"), key=lambda name: statistics.median(took[name]))
    medians = {name: round(statistics.median(us), 2) for name, us in took.items()}
    return {
        "what": what,
        "bytes": size,
        **medians,
        "times_connection": round(ratio("connection", best), 2),
        "of_memcpy": round(ratio("memcpy", best) * (2 if what == "echo" else 1), 2),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = measure(options.rounds)
    if options.json:
        print(json.dumps(rows))
        return 0
    names = list(rows[0])
    print("  ".join(f"{name:>10}" for name in names))
    for one in rows:
        print("  ".join(f"{one[name]:>10}" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
