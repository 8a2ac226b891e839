"""usage: twin_cases.py CASE KIND [WAY]   (WAY: twin hop)

Corner cases of forks from a sub-interpreter: one function per case. The last line of
the output is the JSON that the case returned.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import child_checks
import outcomes
import subint

import anyfork
from anyfork import _anyfork


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    r, w = os.pipe()
    try:
        yield r, w
    finally:
        os.close(r)
        os.close(w)


def in_sub(kind: str, function: str, *args: object) -> None:
    """Call a function of this module in a new sub-interpreter, on a thread."""
    call = f"{function}({', '.join(map(repr, args))})"
    with subint.interpreter(kind) as made:
        made.run(f"import twin_cases; twin_cases.{call}", "thread")


def nothing() -> None:
    pass


# ---- hooks --------------------------------------------------------------------------


def register(who: str, fd: int) -> None:
    """Hooks of the calling interpreter that say who was called when."""

    def say(when: str) -> Callable[[], None]:
        return lambda: (os.write(fd, f"{who}.{when} ".encode()), None)[1]

    os.register_at_fork(
        before=say("before"), after_in_parent=say("parent"), after_in_child=say("child")
    )


def sub_hooks(way: str, fd: int) -> None:
    register("sub", fd)
    if way == "twin":
        assert outcomes.in_child(anyfork.fork, nothing) == 0
    else:
        anyfork.run(nothing, method="subint_fork", pass_fds=[fd])


def hooks(kind: str, way: str) -> dict[str, list[str]]:
    """Which hooks ran, in order, in the parent and in the child."""
    with pipe() as (r, w):
        register("main", w)
        in_sub(kind, "sub_hooks", way, w)
        words = os.read(r, 4096).decode().split()
    # Two processes write: the order of each is its own.
    return {
        "parent": [word for word in words if not word.endswith(".child")],
        "child": [word for word in words if word.endswith(".child")],
    }


def sub_hook_thread(n: int) -> None:
    def work() -> None:
        for _ in range(5):
            subint.on_thread(child_checks.collect)
        [str(x) for x in range(20000)]
        child_checks.thread_outlives_work()

    codes = [outcomes.in_child(anyfork.fork, work) for _ in range(n)]
    outcomes.tell({"broken": [code for code in codes if code != 0], "forks": len(codes)})


def hook_thread(kind: str) -> None:
    """A child hook of main starts a thread, which works in main beside the child."""

    def start() -> None:
        def work() -> None:
            for k in range(200):
                [str(x) for x in range(k)]

        threading.Thread(target=work).start()

    os.register_at_fork(after_in_child=start)
    in_sub(kind, "sub_hook_thread", 20)


# ---- signals ------------------------------------------------------------------------


def _ready_then_busy(fd: int) -> None:
    os.write(fd, b"r")
    child_checks.busy_until(lambda: False)


def sub_signals(way: str, number: int) -> None:
    with pipe() as (r, w):
        if way == "twin":
            pid = anyfork.fork()
            if pid == 0:
                try:
                    _ready_then_busy(w)
                finally:
                    os._exit(1)
            assert os.read(r, 1) == b"r"
            os.kill(pid, number)
            code = outcomes.wait(pid)
        else:
            child = anyfork.spawn(
                _ready_then_busy, w, method="subint_fork", pass_fds=[w], sigint="own"
            )
            assert os.read(r, 1) == b"r"
            child.signal(number)
            code = child.wait(outcomes.LIMIT)
            if number == signal.SIGINT:  # there in main, a KeyboardInterrupt
                assert isinstance(child.exception(), KeyboardInterrupt)
                code = -number if code == 1 else code
    assert code == -number, code


def signals(kind: str, way: str) -> dict[str, object]:
    """Signals to a child end it, whatever handlers main has, and never reach the parent."""
    hits: list[int] = []
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    with pipe() as (r, w):
        os.set_blocking(r, False)
        os.set_blocking(w, False)
        signal.set_wakeup_fd(w)
        for number in numbers:
            signal.signal(number, lambda number, frame: hits.append(number))
        for number in numbers:
            in_sub(kind, "sub_signals", way, int(number))
        signal.set_wakeup_fd(-1)
        try:
            woken = os.read(r, 100)
        except BlockingIOError:
            woken = b""
    return {"handled": hits, "woken": list(woken)}


def _mask() -> set[int]:
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())}


def sub_mask() -> None:
    blocked = {int(signal.SIGUSR2), int(signal.SIGTERM)}
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def twin() -> None:
        assert _mask() == blocked, _mask()

    assert outcomes.in_child(anyfork.fork, twin) == 0
    assert anyfork.run(_mask, method="subint_fork") == set()
    assert anyfork.run(_mask, method="fork") == set()
    assert _mask() == blocked, _mask()


def mask(kind: str) -> None:
    """The twin has its caller's signal mask, a worker an empty one."""
    in_sub(kind, "sub_mask")


# ---- what surrounds the fork --------------------------------------------------------


def sub_chain(kind: str) -> None:
    with subint.interpreter(kind) as third:
        third.run("import twin_cases; twin_cases.fork_third()")
        third.run("import child_checks; child_checks.grandchild_hop()")


def fork_third() -> None:
    before = _anyfork.runtime()
    try:
        outcomes.in_child(anyfork.fork, nothing)
    except anyfork.MethodUnavailable as exc:
        outcomes.tell({"refused": str(exc), "unchanged": _anyfork.runtime() == before})
    else:
        outcomes.tell({"refused": "", "unchanged": False})


def chain(kind: str) -> None:
    """main, a sub-interpreter and another one on one thread's stack."""
    in_sub(kind, "sub_chain", kind)


MODULE = """
import os
import anyfork
import outcomes
import threading

def work():
    import json, colorsys
    thread = threading.Thread(target=__import__, args=("quopri",))
    thread.start()
    thread.join()

code = outcomes.in_child(anyfork.fork, work)
"""


def sub_importing(folder: str) -> None:
    sys.path.insert(0, folder)
    forks_when_imported = __import__("forks_when_imported")
    assert forks_when_imported.code == 0, forks_when_imported.code
    subint.on_thread(lambda: __import__("quopri"))


def importing(kind: str) -> None:
    """The fork is made while this thread imports a module."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "forks_when_imported.py"), "w") as module:
            module.write(MODULE)
        in_sub(kind, "sub_importing", folder)


def sub_loop() -> None:
    import asyncio

    async def seven() -> int:
        await asyncio.sleep(0.01)
        return 7

    def work() -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise AssertionError("the child still sees its parent's running loop")
        assert asyncio.run(seven()) == 7

    async def main() -> int:
        assert outcomes.in_child(anyfork.fork, work) == 0
        return await seven()

    assert asyncio.run(main()) == 7


def loop(kind: str) -> None:
    """A fork inside a coroutine: no running loop in the child, a new one works."""
    in_sub(kind, "sub_loop")


def sub_os_fork() -> None:
    import posix

    plain = os.fork

    def work() -> None:
        for function, name in (
            (os.fork, "fork"),
            (posix.fork, "fork"),
            (os.forkpty, "forkpty"),
            (posix.forkpty, "forkpty"),
        ):
            try:
                function()
            except RuntimeError as exc:
                assert f"anyfork.{name}()" in str(exc), exc
            else:
                os._exit(99)
        assert outcomes.in_child(anyfork.fork, lambda: os._exit(5)) == 5
        anyfork.install()
        assert outcomes.in_child(os.fork, lambda: os._exit(6)) == 6

    assert outcomes.in_child(anyfork.fork, work) == 0
    assert os.fork is plain


def os_fork(kind: str) -> None:
    """In the child plain os.fork() raises, and names what to call."""
    in_sub(kind, "sub_os_fork")


def sub_atexit(fd: int) -> None:
    import atexit

    atexit.register(os.write, fd, b"sub ")
    pid = anyfork.fork()
    if pid:  # the child goes on, into its host, and ends there
        assert outcomes.wait(pid) == 0


def atexit_lists(kind: str) -> dict[str, str]:
    """The parent's atexit callbacks run in the parent, once, and not in the child."""
    import atexit

    parent = os.getpid()
    r, w = os.pipe()
    atexit.register(os.write, w, b"main ")
    made = subint.Interpreter(kind)
    made.run(f"import twin_cases; twin_cases.sub_atexit({w})")
    made.destroy()
    if os.getpid() != parent:
        sys.exit(0)  # a normal exit: what is registered would run now
    os.set_blocking(r, False)
    return {"ran": os.read(r, 100).decode()}


def _state() -> tuple[object, object]:
    return _anyfork.runtime(), sorted(os.listdir("/proc/self/fd"))


def sub_refused_fork() -> None:
    import errno
    import resource

    # A first fork: what is made once (a helper thread, say) exists from here on.
    assert outcomes.in_child(anyfork.fork, nothing) == 0
    before = _state()
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
    refused = []
    for attempt in (
        anyfork.fork,
        anyfork.forkpty,
        lambda: anyfork.spawn(nothing, method="subint_fork"),
        lambda: anyfork.spawn(nothing, method="fork"),
    ):
        try:
            attempt()
        except OSError as exc:
            refused.append(exc.errno == errno.EAGAIN)
            del exc
        assert _state() == before, (_state(), before)
    resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
    assert refused == [True] * 4, refused
    assert outcomes.in_child(anyfork.fork, nothing) == 0


def refused_fork(kind: str) -> None:
    """The system refuses: EAGAIN, nothing left behind, and the next fork works."""
    made = subint.Interpreter(kind)
    made.run("import twin_cases, resource, errno, pickle")
    anyfork.run(nothing, method="subint_fork")  # imports what a start needs
    for each in ("_errors", "_boot"):
        made.run(f"import anyfork.{each}")
    made.run("anyfork._boot.load_needed()")
    os.setuid(65534)  # root has no such limit
    made.run("twin_cases.sub_refused_fork()", "thread")


def sub_refused_free_threaded() -> None:
    before = _anyfork.runtime()
    for attempt in (anyfork.fork, anyfork.forkpty, anyfork.install):
        try:
            attempt()
        except anyfork.MethodUnavailable as exc:
            assert "free-threaded" in str(exc), exc
            assert isinstance(exc, NotImplementedError)
        else:
            os._exit(99)
        assert _anyfork.runtime() == before
    assert not next(row for row in anyfork.methods() if row.name == "fork").available
    assert anyfork.run(nothing, method="subint_fork") is None


def refused_free_threaded(kind: str) -> None:
    in_sub(kind, "sub_refused_free_threaded")


def main(case: str, *args: str) -> None:
    result: Any = globals()[case](*args)
    if result is not None:
        outcomes.tell(result)
    outcomes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
