"""What /proc tells about the processes of one server.

A server and all that it starts carry a token in their environment; a zombie, whose
environment is gone, is found by its parent. Nothing here looks at other processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TOKEN = "HOSTS_RUN"


@dataclass(frozen=True)
class Process:
    pid: int
    ppid: int
    state: str
    command: str

    def __str__(self) -> str:
        return f"{self.pid} ({self.state}, child of {self.ppid}) {self.command or '-'}"


def _read(pid: str | int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _process(pid: int) -> Process | None:
    # The name, in parentheses, may contain anything: split behind the last one.
    head, _, tail = _read(pid, "stat").decode(errors="replace").rpartition(")")
    if not head:
        return None
    state, ppid = tail.split()[:2]
    command = _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(pid, int(ppid), state, command[:80])


def of_server(token: str) -> dict[int, Process]:
    """All processes of the server, zombies too."""
    mark = f"{TOKEN}={token}".encode()
    mine: dict[int, Process] = {}
    others: list[Process] = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        process = _process(int(name))
        if process is None:
            continue
        if mark in _read(name, "environ").split(b"\0"):
            mine[process.pid] = process
        else:
            others.append(process)
    for process in others:
        if process.state == "Z" and process.ppid in mine:
            mine[process.pid] = process
    return mine


@dataclass(frozen=True)
class Held:
    """What a daemon process holds: file descriptors by what they are, threads."""

    fds: tuple[str, ...]
    threads: int
    rss_kb: int


def held_by(pid: int) -> Held:
    fds = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            fds.append(f"{name} -> {os.readlink(f'/proc/{pid}/fd/{name}')}")
        except FileNotFoundError:
            continue
    status = _read(pid, "status").decode().splitlines()
    rss = next((int(line.split()[1]) for line in status if line.startswith("VmRSS:")), 0)
    return Held(tuple(sorted(fds)), len(os.listdir(f"/proc/{pid}/task")), rss)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll: /proc has no event for what is asked here."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def kill_all(token: str) -> list[Process]:
    """Kill what is left of the server; return what was left."""
    left: dict[int, Process] = {}
    # Again, until a look finds nothing: one may have forked just before it was killed.
    for _ in range(100):
        alive = [p for p in of_server(token).values() if p.state != "Z"]
        if not alive:
            break
        for process in alive:
            left.setdefault(process.pid, process)
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    return list(left.values())
