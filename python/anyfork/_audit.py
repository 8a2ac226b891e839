"""What a process must not have when it is forked as a template, looked for from inside."""

from __future__ import annotations

import _thread
import gc
import os
import sys
import threading
import time
import warnings
from typing import Any, NamedTuple

from . import _anyfork

_LOCKS = (_thread.LockType, _thread.RLock)
_TRIAL_TIMEOUT = 10.0
_SETTLE = 0.2  # seconds for threads that are ending


class Finding(NamedTuple):
    """``kind``: thread, socket or lock. ``what``: which. ``remedy``: what to do."""

    kind: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}; {self.remedy}"


class Module(NamedTuple):
    """One preload: seconds and kB that its import took, threads that it has started."""

    name: str
    seconds: float
    kb: int
    threads: int
    error: str | None


def _other_threads() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/task"):
        if int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/self/task/{name}/comm") as f:
                found[int(name)] = f.read().strip()
        except OSError:  # it has ended
            continue
    return found


def _fork_once() -> None:
    """As a template will: pools that stop in their fork handlers have stopped then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os._exit(0)
    end = time.monotonic() + _TRIAL_TIMEOUT
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, 9)
        time.sleep(0.001)


def _threads() -> list[Finding]:
    if _other_threads():
        _fork_once()
    end = time.monotonic() + _SETTLE
    while (left := _other_threads()) and time.monotonic() < end:
        time.sleep(0.01)
    known = {thread.native_id: thread.name for thread in threading.enumerate()}
    return [
        Finding(
            "thread",
            known.get(tid) or name,
            "workers would not have it, but find locked what it had locked: start it in workers",
        )
        for tid, name in sorted(left.items())
    ]


def open_sockets() -> frozenset[str]:
    """Those of this process, but for standard streams and what this package uses itself."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            continue
        if target.startswith("socket:") and int(name) > 2 and not _anyfork.holds(int(name)):
            found.add(f"descriptor {name}")
    return frozenset(found)


def _sockets(ours: frozenset[str]) -> list[Finding]:
    return [
        Finding(
            "socket",
            name,
            "two processes that talk on one connection mix what they say, so that workers get a "
            "placeholder: connect in workers",
        )
        for name in sorted(open_sockets() - ours)
    ]


def _is_locked(lock: Any) -> bool:
    # An RLock tells it by its repr alone, before 3.14.
    locked = getattr(lock, "locked", None)
    return bool(locked()) if locked is not None else repr(lock).startswith("<locked")


def _locks() -> list[Finding]:
    """Reachable from modules and from what the garbage collector knows: locks themselves
    are not among that, before they are held by something that is."""
    places: dict[int, tuple[object, str]] = {}
    for name, module in list(sys.modules.items()):
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if isinstance(value, _LOCKS):
                places.setdefault(id(value), (value, f"{name}.{key}"))
    for owner in gc.get_objects():
        if type(owner) is dict or not hasattr(owner, "__dict__") or isinstance(owner, type):
            continue
        try:
            items = list(vars(owner).items())
        except Exception:  # a property of that name, say
            continue
        for key, value in items:
            if isinstance(value, _LOCKS):
                kind = type(owner)
                places.setdefault(id(value), (value, f"{kind.__module__}.{kind.__name__}.{key}"))
    return [
        Finding(
            "lock",
            name,
            "nobody is there to release it in a worker: release it before the template serves",
        )
        for lock, name in places.values()
        if _is_locked(lock)
    ]


def findings(ours: frozenset[str]) -> list[Finding]:
    """All of them; ``ours``: sockets that belong to the template itself."""
    return [*_threads(), *_sockets(ours), *_locks()]


def _resident_kb() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024


def inspect(names: list[str]) -> tuple[list[Module], list[Finding]]:
    """Import modules here, one after the other, and look. For a process of its own."""
    modules = []
    ours = open_sockets()
    for name in names:
        kb, threads, begun = _resident_kb(), len(_other_threads()), time.monotonic()
        error = None
        try:
            __import__(name)
        except BaseException as exc:
            error = f"{type(exc).__name__}: {exc}"
        modules.append(
            Module(
                name,
                time.monotonic() - begun,
                _resident_kb() - kb,
                len(_other_threads()) - threads,
                error,
            )
        )
    return modules, findings(ours)
