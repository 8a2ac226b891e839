"""What the attack programs share. Runs in any interpreter of the attacked process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyfork

LIMIT = float(os.environ.get("ATTACK_LIMIT", "40"))  # seconds for one step: then it hangs
HERE = os.path.dirname(os.path.abspath(__file__))

Check = Callable[[str], None]


def places(*names: str) -> Callable[[Check], Check]:
    """Run a check in these places only: main, legacy, isolated."""

    def mark(check: Check) -> Check:
        check.places = names  # type: ignore[attr-defined]
        return check

    return mark


def with_main(prepare: Callable[[], object]) -> Callable[[Check], Check]:
    """Before the check, call ``prepare`` in the main interpreter: a worker by
    ``subint_fork`` has main's memory, wherever it was started."""

    def mark(check: Check) -> Check:
        check.in_main = prepare  # type: ignore[attr-defined]
        return check

    return mark


def keeps_descriptors(check: Check) -> Check:
    """Something else than anyfork keeps descriptors after this check."""
    check.keeps_descriptors = True  # type: ignore[attr-defined]
    return check


def beside_nothing(check: Check) -> Check:
    """No busy threads beside this check: a thread of its own has to answer often."""
    check.beside_nothing = True  # type: ignore[attr-defined]
    return check


def available() -> list[str]:
    """The methods whose targets run in an interpreter that is there: any function of
    these programs will do. The others have test_fresh.py."""
    return [row.name for row in anyfork.methods() if row.available and row.target != "fresh"]


# Their targets run in the main interpreter of a process that was executed.
IN_MAIN_OF_ANOTHER = ("exec", "zygote")


def given(method: str, *fds: int) -> dict[str, Any]:
    """The option by which a worker gets these descriptors; a thread of this process has
    them anyhow."""
    has_process = any(row.name == method and row.has_process for row in anyfork.methods())
    return {"pass_fds": fds} if has_process else {}


def twin_works() -> bool:
    """Whether fork() can work here; where not, it has to say so."""
    try:
        anyfork._anyfork.check_fork()
    except anyfork.MethodUnavailable:
        return False
    return True


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {LIMIT:.0f} s: {what}")
        time.sleep(0.002)


def status_of(pid: int) -> int:
    """Exit code, or the negated signal number, of a child of ours; bounded."""
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], LIMIT)[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError("the child hangs")
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(body: Callable[[], Any]) -> bytes:
    """What ``body`` returns in a child of anyfork.fork(), as bytes."""
    r, w = os.pipe()
    pid = anyfork.fork()
    if pid == 0:
        try:
            os.close(r)
            os.write(w, repr(body()).encode())
            os._exit(0)
        except BaseException as exc:
            os.write(w, f"raised {exc!r}".encode())
            os._exit(1)
    os.close(w)
    try:
        data = b""
        while select.select([r], [], [], LIMIT)[0]:
            piece = os.read(r, 65536)
            if not piece:
                break
            data += piece
    finally:
        os.close(r)
    code = status_of(pid)
    assert code == 0, (code, data)
    return data


def same(got: object, expected: object) -> None:
    assert got == expected, f"{got!r} is not {expected!r}"


def raises(kind: type[BaseException], call: Callable[..., object], *args: Any, **kw: Any) -> Any:
    try:
        value = call(*args, **kw)
    except kind as exc:
        return exc
    raise AssertionError(f"no {kind.__name__}, but {value!r}")


def is_gone(pid: int) -> bool:
    """Ended: no such process, or a zombie of somebody who does not reap."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def signal_sets(thread: str = "self") -> dict[str, int]:
    """SigBlk, SigIgn, SigCgt of a thread of this process."""
    with open("/proc/thread-self/status" if thread == "self" else thread) as f:
        rows = dict(line.split(":", 1) for line in f)
    return {name: int(rows[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")}


@contextlib.contextmanager
def busy(n: int = 2) -> Iterator[None]:
    """Threads that only compute. Not daemons: isolated interpreters have none."""
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


@contextlib.contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe in which a write blocks; whoever is blocked gets EPIPE at the end."""
    r, w = os.pipe()
    try:
        yield r, w
    finally:
        os.close(r)
        with contextlib.suppress(OSError):
            os.close(w)


def fill_level(r: int) -> int:
    n = ctypes.c_int()
    import fcntl
    import termios

    return int.from_bytes(fcntl.ioctl(r, termios.FIONREAD, bytes(n)), sys.byteorder)
