"""Attacks on fork() in a sub-interpreter: what it keeps, and what it must not do."""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time

from attack_common import (
    LIMIT,
    in_child,
    places,
    raises,
    same,
    signal_sets,
    status_of,
    twin_works,
    with_main,
)
from attack_prelude import bits, install_handlers

import anyfork


def needs_twin(place: str) -> bool:
    if place == "main" or twin_works():
        return True
    raises(anyfork.MethodUnavailable, anyfork.fork)
    return False


def check_returns_twice(place: str) -> None:
    if not needs_twin(place):
        return
    local = ["before"]
    for depth in range(3):
        pid = anyfork.fork()
        if pid == 0:
            local.append(f"child {depth}")
            assert threading.current_thread() is threading.main_thread()
            same(threading.active_count(), 1)
            child = anyfork.fork()
            if child == 0:
                os._exit(40 + len(local))
            os._exit(status_of(child))
        same(local, ["before"])
        same(status_of(pid), 42)


def check_mask_is_kept(place: str) -> None:
    if not needs_twin(place):
        return
    blocked = {signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP}
    old = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        mine = signal_sets()["SigBlk"]
        same(in_child(lambda: signal_sets()["SigBlk"]), str(mine).encode())
        same(signal_sets()["SigBlk"], mine)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


@places("legacy", "isolated")
@with_main(install_handlers)
def check_dispositions(place: str) -> None:
    """Where a Python handler stood: default. C's and ignored ones stay."""
    if not needs_twin(place):
        return

    def body() -> list[object]:
        sets = signal_sets()
        python = bits(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
        return [
            sets["SigCgt"] & python,
            bool(sets["SigCgt"] & bits(signal.SIGUSR2)),
            bool(sets["SigCgt"] & bits(signal.SIGSEGV)),
            bool(sets["SigIgn"] & bits(signal.SIGHUP)),
            bool(sets["SigIgn"] & bits(signal.SIGCHLD)),
            signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
            signal.getsignal(signal.SIGINT) is signal.SIG_DFL,
            signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,
        ]

    r, w = os.pipe()
    pid = anyfork.fork()  # SIGCHLD is ignored: no status to collect
    if pid == 0:
        os.write(w, repr(body()).encode())
        os._exit(0)
    os.close(w)
    answer = b""
    while piece := os.read(r, 1000):
        answer += piece
    os.close(r)
    raises(ChildProcessError, os.waitpid, pid, 0)
    same(answer, repr([0] + [True] * 7).encode())


@places("legacy", "isolated")
def check_signals_end_it(place: str) -> None:
    if not needs_twin(place):
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        r, w = os.pipe()
        pid = anyfork.fork()
        if pid == 0:
            os.write(w, b"r")
            end = time.monotonic() + LIMIT
            while time.monotonic() < end:
                select.select([], [], [], 1)
            os._exit(7)
        os.read(r, 1)
        os.close(r)
        os.close(w)
        os.kill(pid, number)
        same(status_of(pid), -number)


@places("legacy", "isolated")
def check_plain_fork_in_the_child(place: str) -> None:
    if not needs_twin(place):
        return

    def body() -> list[str]:
        import pty

        texts = []
        for call in (os.fork, os.forkpty, pty.fork, sys.modules["posix"].fork):
            texts.append(str(raises(RuntimeError, call)))
        assert all("anyfork.fork" in t or "anyfork.forkpty" in t for t in texts), texts
        pid = anyfork.fork()
        if pid == 0:
            os._exit(3)
        same(status_of(pid), 3)
        anyfork.install()
        pid = os.fork()
        if pid == 0:
            os._exit(4)
        same(status_of(pid), 4)
        anyfork.uninstall()
        raises(RuntimeError, os.fork)
        return ["ok"]

    fork = os.fork
    same(in_child(body), b"['ok']")
    assert os.fork is fork


@places("legacy", "isolated")
def check_atexit_of_the_parent(place: str) -> None:
    if not needs_twin(place):
        return
    parent = os.getpid()
    r, w = os.pipe()

    def say() -> None:
        if os.getpid() != parent:
            os.write(w, b"parent's ")

    atexit.register(say)
    pid = anyfork.fork()
    if pid == 0:
        atexit.register(os.write, w, b"own")
        atexit._run_exitfuncs()
        os._exit(0)
    same(status_of(pid), 0)
    atexit.unregister(say)
    os.close(w)
    same(os.read(r, 100), b"own")
    os.close(r)


def check_forkpty(place: str) -> None:
    if not needs_twin(place):
        return
    pid, master = anyfork.forkpty()
    if pid == 0:
        ok = all(os.isatty(fd) for fd in range(3)) and os.getsid(0) == os.getpid()
        os.write(1, b"terminal %d\n" % ok)
        os._exit(5)
    data = b""
    try:
        while select.select([master], [], [], LIMIT)[0]:
            data += os.read(master, 1000)
    except OSError:
        pass
    assert not os.get_inheritable(master)
    os.close(master)
    same((data.strip(), status_of(pid)), (b"terminal 1", 5))


def check_child_is_not_tied(place: str) -> None:
    """POSIX: the child of fork() outlives its parent."""
    if not needs_twin(place):
        return
    r, w = os.pipe()
    go_r, go_w = os.pipe()
    pid = anyfork.fork()
    if pid == 0:
        if anyfork.fork() == 0:
            os.close(go_w)
            os.read(go_r, 1)  # until the owner of go_w has ended
            end = time.monotonic() + LIMIT
            while os.getppid() == 1 and time.monotonic() > end:
                pass
            os.write(w, b"alive")
        os._exit(0)
    same(status_of(pid), 0)
    os.close(go_w)
    os.close(go_r)
    os.close(w)
    same(os.read(r, 10), b"alive")
    os.close(r)


def check_hooks_run_once(place: str) -> None:
    if not needs_twin(place):
        return
    calls: list[str] = []
    active = [True]

    def hook(name: str) -> None:
        if active:
            calls.append(name)
            if name == "raises":
                raise ZeroDivisionError

    os.register_at_fork(
        before=lambda: hook("before"),
        after_in_child=lambda: hook("child"),
        after_in_parent=lambda: hook("parent"),
    )
    try:
        same(in_child(lambda: calls), b"['before', 'child']")
        same(calls, ["before", "parent"])
    finally:
        active.clear()


def check_audit_events(place: str) -> None:
    if not needs_twin(place):
        return
    seen: list[str] = []
    active = [True]
    sys.addaudithook(lambda event, args: seen.append(event) if active and "fork" in event else None)
    in_child(int)
    active.clear()
    assert "os.fork" in seen, seen
