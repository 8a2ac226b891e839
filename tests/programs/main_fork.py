"""usage: main_fork.py CASE [ARG...]

Forks of the main interpreter: one function per case. FORK is `os` for the control,
plain os.fork(), or `anyfork`. Lines of JSON; the last one is what the case returned.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import child_checks
import outcomes
import subint

import anyfork


def fork_of(name: str) -> Callable[[], int]:
    if name == "os":  # what never comes need not be waited for as long
        child_checks.SECONDS = 2.0
    return {"os": os.fork, "anyfork": anyfork.fork}[name]


def live(fork: str, kind: str) -> int | None:
    """gh-139759: fork in main while a sub-interpreter is alive."""

    def work() -> None:
        child_checks.signal_in_busy_loop()
        child_checks.thread()

    with subint.interpreter(kind) as made:
        made.run("import json, threading")
        return outcomes.in_child(fork_of(fork), work)


def live_child_ends_normally(kind: str) -> int | None:
    """The child of anyfork.fork() runs off the end of the program; see known outcomes."""
    made = subint.Interpreter(kind)
    pid = anyfork.fork()
    if pid == 0:
        sys.exit(0)
    code = outcomes.wait(pid)
    made.destroy()
    return code


def thread_signal(fork: str) -> int | None:
    """Fork from a thread; the child runs a signal handler in a busy loop."""
    return subint.on_thread(
        lambda: outcomes.in_child(fork_of(fork), child_checks.signal_in_busy_loop)
    )


def thread_pending(fork: str) -> int | None:
    """Fork from a thread; the child runs a pending call in a busy loop."""
    return subint.on_thread(lambda: outcomes.in_child(fork_of(fork), child_checks.pending_call))


def thread_finalize(fork: str) -> int | None:
    """Fork from a thread; the child finalizes."""
    return subint.on_thread(
        lambda: outcomes.in_child(fork_of(fork), lambda: ctypes.pythonapi.Py_Exit(0))
    )


def _hooks_seen(fork: Callable[[], int]) -> list[str]:
    r, w = os.pipe()
    mark = f"{w}:"
    for when, key in (
        ("before", "before"),
        ("parent", "after_in_parent"),
        ("child", "after_in_child"),
    ):
        for n in (1, 2):
            word = f"{mark}{when}{n} ".encode()
            os.register_at_fork(**{key: lambda word=word: os.write(w, word)})
    assert outcomes.in_child(fork, lambda: None) == 0
    words = [word.removeprefix(mark) for word in os.read(r, 4096).decode().split()]
    # Two processes write: the order of each is its own.
    return sorted(words, key=lambda word: word.startswith("child"))


def hooks() -> dict[str, list[str]]:
    """The hooks of both, in order; each registers its own on top."""
    return {name: _hooks_seen(fork_of(name))[:6] for name in ("os", "anyfork")}


def _warnings_of(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = call()
        pid = made[0] if isinstance(made, tuple) else made
        if pid == 0:
            os._exit(0)
    if isinstance(made, tuple):
        os.close(made[1])
    outcomes.wait(pid)
    return [f"{w.category.__name__}: {w.message} {os.path.basename(w.filename)}" for w in caught]


def warns() -> dict[str, dict[str, list[str]]]:
    """What both warn of, without and with a second thread."""
    forks = {
        "os.fork": os.fork,
        "anyfork.fork": anyfork.fork,
        "os.forkpty": os.forkpty,
        "anyfork.forkpty": anyfork.forkpty,
    }
    alone = {name: _warnings_of(fork) for name, fork in forks.items()}
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    beside = {name: _warnings_of(fork) for name, fork in forks.items()}
    # A warning that is an error comes after the fork: it may not lose the child.
    warnings.simplefilter("error")
    assert outcomes.in_child(anyfork.fork, lambda: os._exit(4)) == 4
    stop.set()
    thread.join()
    return {"alone": alone, "beside": beside}


def does_not_warn_of_our_threads() -> list[str]:
    """The launch pad is a thread of ours, which holds no lock."""
    anyfork.run(int, method="subint_fork")
    return _warnings_of(anyfork.fork)


def audit() -> dict[str, list[str]]:
    """Audit events; a hook that raises prevents the fork."""
    events: list[str] = []
    refuse = False

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in ("os.fork", "os.forkpty"):
            events.append(event)
            if refuse:
                raise PermissionError(event)

    sys.addaudithook(hook)
    seen = {}
    for name in ("fork", "forkpty"):
        events.clear()
        _warnings_of(getattr(anyfork, name))
        seen[name] = list(events)
    for name in ("fork", "subint_fork"):
        events.clear()
        anyfork.run(int, method=name)
        seen[f"spawn {name}"] = list(events)
    refuse = True
    for attempt in (anyfork.fork, anyfork.forkpty, lambda: anyfork.spawn(int, method="fork")):
        try:
            attempt()
        except PermissionError:
            continue
        os._exit(99)
    refuse = False
    return seen


class Late:
    """Its finalizer runs while the modules are taken down: it needs no global name."""

    def __init__(self, who: str) -> None:
        self.who = who
        self.calls = (anyfork.fork, anyfork.forkpty)
        self.error = PythonFinalizationError
        self.write = os.write

    def __del__(self) -> None:
        for call in self.calls:
            try:
                call()
            except self.error as exc:
                said = f"refused: {exc}"
            except BaseException as exc:
                said = f"wrong: {exc!r}"
            else:
                said = "forked"
            self.write(1, f"{self.who} {said}\n".encode())


def finalizing(kind: str) -> None:
    """anyfork.fork() in a finalizer that runs at shutdown, in main and elsewhere."""
    with subint.interpreter(kind) as made:
        made.run("import main_fork; late = main_fork.Late('sub')")
    sys.modules["__main__"].late = Late("main")  # type: ignore[attr-defined]
    sys.exit(0)


def use_pty() -> None:
    """In any interpreter."""
    pid, master = anyfork.forkpty()
    if pid == 0:
        code = 1
        try:
            assert master == -1
            assert all(os.isatty(fd) for fd in (0, 1, 2))
            assert os.getsid(0) == os.getpid()
            assert os.tcgetpgrp(0) == os.getpid()
            line = os.read(0, 100)
            os.write(1, b"child read " + line)
            code = 3
        finally:
            os._exit(code)
    os.write(master, b"hello\n")
    said = b""
    try:
        while data := os.read(master, 1000):
            said += data
    except OSError:  # EIO: the child closed its end
        pass
    os.close(master)
    code = outcomes.wait(pid)
    assert code == 3, (code, said)
    assert b"child read hello" in said, said


def pty(where: str) -> None:
    """forkpty() in main, or in a sub-interpreter of that kind."""
    before = sorted(os.listdir("/proc/self/fd"))
    if where == "main":
        use_pty()
    else:
        with subint.interpreter(where) as made:
            made.run("import main_fork; main_fork.use_pty()", "thread")
    assert sorted(os.listdir("/proc/self/fd")) == before


def running_loop() -> None:
    """Inside a coroutine of main: no running loop in the child, a new one works."""
    import asyncio

    async def main() -> int | None:
        return outcomes.in_child(anyfork.fork, child_checks.asyncio_run)

    assert asyncio.run(main()) == 0


def many_threads() -> list[int | None]:
    """Forks from several threads at once beside a busy one."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    codes: list[int | None] = []

    def forks() -> None:
        for _ in range(10):
            codes.append(outcomes.in_child(anyfork.fork, child_checks.signal_in_busy_loop))

    busy = threading.Thread(target=spin)
    busy.start()
    threads = [threading.Thread(target=forks) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    stop.set()
    busy.join()
    return [code for code in codes if code != 0] + [len(codes)]


def exit_with_datetime() -> None:
    """CPython alone: two interpreters imported datetime, the older one goes first."""
    made = [subint.Interpreter(kind) for kind in ("isolated", "legacy")]
    for interpreter in made:
        interpreter.run("import datetime")
    for interpreter in made:
        interpreter.destroy()
    sys.exit(0)


def main(case: str, *args: str) -> None:
    outcomes.tell(globals()[case](*args))


if __name__ == "__main__":
    main(*sys.argv[1:])
