"""Attacks on install(): what goes through os.fork, in main and in sub-interpreters."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys

from attack_common import LIMIT, keeps_descriptors, places, raises, same, status_of, twin_works

import anyfork


def works(place: str) -> bool:
    """install() works here, or says so before it changes anything."""
    if place == "main" or twin_works():
        return True
    before = os.fork, os.forkpty
    raises(anyfork.MethodUnavailable, anyfork.install)
    same((os.fork, os.forkpty), before)
    assert not anyfork.is_installed()
    anyfork.install(strict=True)
    raises(RuntimeError, os.fork)
    anyfork.uninstall()
    same((os.fork, os.forkpty), before)
    return False


@contextlib.contextmanager
def installed():  # type: ignore[no-untyped-def]
    before = os.fork, os.forkpty, sys.modules["posix"].fork
    anyfork.install()
    try:
        yield
    finally:
        anyfork.uninstall()
        same((os.fork, os.forkpty, sys.modules["posix"].fork), before)


def check_restores(place: str) -> None:
    if not works(place):
        return
    before = os.fork, os.forkpty
    same(anyfork.is_installed(), False)
    anyfork.uninstall()  # nothing to undo
    with installed():
        anyfork.install()
        same(anyfork.is_installed(), True)
        same((os.fork, os.forkpty), (anyfork.fork, anyfork.forkpty))
        pid = os.fork()
        if pid == 0:
            os._exit(6)
        same(status_of(pid), 6)
    same((os.fork, os.forkpty), before)


def check_strict(place: str) -> None:
    before = os.fork, os.forkpty
    anyfork.install(strict=True)
    if place == "main":
        same((os.fork, os.forkpty), before)
    else:
        for call in (os.fork, os.forkpty):
            assert "anyfork.fork" in str(raises(RuntimeError, call))
        import pty

        raises(RuntimeError, pty.fork)
    if place == "main" or twin_works():
        anyfork.install()
        same(anyfork.is_installed(), True)
    anyfork.install(strict=True)
    same(anyfork.is_installed(), False)
    anyfork.uninstall()
    same((os.fork, os.forkpty), before)


def check_others_patch_is_kept(place: str) -> None:
    if not works(place):
        return
    before = os.fork

    def patched() -> int:
        return before()

    anyfork.install()
    os.fork = patched
    anyfork.uninstall()
    try:
        assert os.fork is patched, "somebody else's replacement was undone"
    finally:
        os.fork = before


def check_per_interpreter(place: str) -> None:
    if not works(place):
        return
    if place == "main":
        import _interpreters

        with installed():
            interpreter = _interpreters.create("legacy")
            failure = _interpreters.exec(
                interpreter,
                f"import sys; sys.path[:] = {sys.path!r}\nimport anyfork, os\n"
                "assert not anyfork.is_installed()\nassert os.fork is not anyfork.fork",
            )
            _interpreters.destroy(interpreter)
            assert failure is None, failure
    else:
        with installed():
            assert anyfork.run(is_installed_in_main, method="subint_fork") is False


def is_installed_in_main() -> bool:
    return anyfork.is_installed()


def check_pty(place: str) -> None:
    if not works(place):
        return
    import pty

    with installed():
        pid, master = pty.fork()
        if pid == 0:
            os.write(1, b"through pty\n")
            os._exit(8)
        data = b""
        try:
            while select.select([master], [], [], LIMIT)[0]:
                data += os.read(master, 1000)
        except OSError:
            pass
        os.close(master)
        same((data.strip(), status_of(pid)), (b"through pty", 8))


@places("main", "legacy")
def check_pexpect(place: str) -> None:
    try:
        import pexpect
    except ImportError:
        print("skipped: no pexpect")
        return
    if not works(place):
        return
    with installed():
        child = pexpect.spawn("/bin/sh", ["-c", "read x; echo got $x; exit 5"], timeout=LIMIT)
        child.sendline("line")
        child.expect("got line")
        child.expect(pexpect.EOF)
        child.close()
        same(child.exitstatus, 5)


def nothing_but_wait() -> None:
    while True:
        select.select([], [], [], 10)


def answer(connection) -> None:  # type: ignore[no-untyped-def]
    connection.send(connection.recv() + 1)
    connection.close()


@places("main", "legacy")
@keeps_descriptors  # multiprocessing closes a Process when it is collected
def check_multiprocessing(place: str) -> None:
    if not works(place):
        return
    import multiprocessing

    context = multiprocessing.get_context("fork")
    with installed():
        for code in (0, 5):
            process = context.Process(target=sys.exit, args=(code,))
            process.start()
            process.join(LIMIT)
            same(process.exitcode, code)
            process.close()
        ours, theirs = context.Pipe()
        process = context.Process(target=answer, args=(theirs,))
        process.start()
        ours.send(41)
        assert ours.poll(LIMIT)
        same(ours.recv(), 42)
        process.join(LIMIT)
        same(process.exitcode, 0)
        ours.close()
        theirs.close()
        queue = context.Queue()
        process = context.Process(target=queue.put, args=("through a queue",))
        process.start()
        same(queue.get(timeout=LIMIT), "through a queue")
        process.join(LIMIT)
        queue.close()
        queue.join_thread()
        for stop, status in ((process.terminate, -signal.SIGTERM), (process.kill, -signal.SIGKILL)):
            process = context.Process(target=nothing_but_wait)
            process.start()
            getattr(process, stop.__name__)()
            process.join(LIMIT)
            same(process.exitcode, status)
            process.close()
        with context.Pool(2) as pool:
            same(pool.map(abs, range(-20, 0), chunksize=3), list(range(20, 0, -1)))
            raises(ZeroDivisionError, pool.apply, divmod, (1, 0))
        pool.join()
