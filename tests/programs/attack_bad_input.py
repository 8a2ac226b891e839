"""Bad input: a clear error in the caller, nothing started, nothing changed."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from attack_common import LIMIT, available, places, raises, same, status_of, twin_works, until

import anyfork
from anyfork import _anyfork


def nothing_started(call: Callable[[], object], kind: type[BaseException]) -> BaseException:
    before = sorted(os.listdir("/proc/self/fd"))
    states = (_anyfork.runtime() or {}).get("own_thread_states")
    exc = raises(kind, call)
    same(sorted(os.listdir("/proc/self/fd")), before)
    same((_anyfork.runtime() or {}).get("own_thread_states"), states)
    try:
        pid, _ = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        pass
    else:
        raise AssertionError(f"there is a child: {pid}")
    return exc  # type: ignore[no-any-return]


class Text(str):
    pass


async def coroutine() -> None: ...


async def asyncgen() -> AsyncIterator[int]:
    yield 1


def check_arguments(place: str) -> None:
    for method in available():
        anyfork.run(int, method=method)
    known = [row.name for row in anyfork.methods()]
    for target in (None, 5, "int", object()):
        for start in (anyfork.spawn, anyfork.run):
            exc = nothing_started(lambda t=target, s=start: s(t, method="fork"), TypeError)
            assert "callable" in str(exc)
    for target in (coroutine, functools.partial(functools.partial(coroutine)), asyncgen):
        exc = nothing_started(lambda t=target: anyfork.spawn(t, method="fork"), TypeError)
        assert "loop" in str(exc), exc
    for method in ("", "Fork", "fork ", "fork\0", "spawn", "\ud800", Text("nope")):
        exc = nothing_started(lambda m=method: anyfork.spawn(int, method=m), ValueError)
        for name in known:
            assert name in str(exc), exc
    for method in (1, b"fork", ("fork",), object()):
        exc = nothing_started(lambda m=method: anyfork.spawn(int, method=m), TypeError)
        assert "str" in str(exc)
    nothing_started(lambda: anyfork.spawn(method="fork"), TypeError)  # type: ignore[call-arg]
    nothing_started(lambda: anyfork.spawn(fn=int, method="fork"), TypeError)  # type: ignore[call-arg]
    nothing_started(lambda: anyfork.spawn(int, method="fork", x=1), TypeError)  # type: ignore[call-arg]
    for method in available():
        same(anyfork.run(int, method=Text(method)), 0)
    nothing_started(lambda: _anyfork.Child(), TypeError)
    nothing_started(lambda: anyfork.Child(), TypeError)


@places("legacy", "isolated")
def check_targets_that_cannot_be_pickled(place: str) -> None:
    anyfork.run(int, method="subint_fork")
    for target, args in ((lambda: 1, ()), (len, (threading.Lock(),)), (int, ((x for x in ()),))):
        exc = nothing_started(
            lambda t=target, a=args: anyfork.spawn(t, *a, method="subint_fork"), TypeError
        )
        assert "method='fork'" in str(exc), exc
        assert exc.__cause__ is not None


class Ghost:
    """Pickled here by a name that main does not have."""

    def __reduce__(self) -> object:
        return "no_such_name_in_main"


no_such_name_in_main = Ghost()


def absent() -> None:
    pass


def check_target_that_main_lacks(place: str) -> None:
    if place == "main":
        return
    absent.__qualname__ = "absent_elsewhere"
    globals()["absent_elsewhere"] = absent
    with anyfork.spawn(absent, method="subint_fork") as child:
        exc = child.exception(LIMIT)
        assert isinstance(exc, anyfork.SpawnError), exc
        same(exc.stage, "unpickle")
        notes = "".join(getattr(exc.__cause__, "__notes__", [])) + str(exc.__cause__)
        assert "absent_elsewhere" in notes, notes
        error = raises(anyfork.SpawnError, child.wait_ready, LIMIT)
        assert str(child.pid) in str(error), error


def check_unavailable_names_what_to_use(place: str) -> None:
    for row in anyfork.methods():
        if row.available:
            continue
        exc = nothing_started(lambda m=row.name: anyfork.spawn(int, method=m), Exception)
        assert isinstance(exc, anyfork.MethodUnavailable), exc
        assert isinstance(exc, anyfork.SpawnError)
        assert isinstance(exc, NotImplementedError)
        assert isinstance(exc, OSError)
        same((exc.method, exc.errno), (row.name, None))
        assert row.reason
        assert row.reason in str(exc), exc
        assert "`anyfork methods`" in str(exc), exc
    if not twin_works() and place != "main":
        exc = nothing_started(anyfork.fork, anyfork.MethodUnavailable)
        assert "subint_fork" in str(exc), exc
        nothing_started(anyfork.forkpty, anyfork.MethodUnavailable)
        fork = os.fork
        nothing_started(anyfork.install, anyfork.MethodUnavailable)
        same(os.fork, fork)


def check_descriptors_run_out(place: str) -> None:
    for method in available():  # what is needed once is there
        anyfork.run(int, method=method)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    taken: list[int] = []
    try:
        while True:
            try:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        for method in available():
            for spare in range(7):
                freed = [taken.pop() for _ in range(spare)]
                for fd in freed:
                    os.close(fd)
                try:
                    child = anyfork.spawn(int, method=method)
                except anyfork.SpawnError as exc:
                    assert "RLIMIT_NOFILE" in str(exc), exc
                    assert "100" in str(exc) and "holds 0 workers" in str(exc), exc
                    same(exc.errno, 24)
                    enough = False
                else:
                    same(child.result(LIMIT), 0)
                    child.close()
                    enough = True
                taken += [os.open("/dev/null", os.O_RDONLY) for _ in freed]
            assert enough, "seven free descriptors are not enough"
        if twin_works() or place == "main":
            exc = raises(anyfork.SpawnError, anyfork.forkpty)
            assert "RLIMIT_NOFILE" in str(exc), exc
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


audit_refuses: list[str] = []


@places("main")
def check_audit_hook_that_refuses(place: str) -> None:
    for method in available():
        anyfork.run(int, method=method)

    def hook(event: str, args: object) -> None:
        if audit_refuses and event in ("os.fork", "os.forkpty"):
            raise ZeroDivisionError(event)

    sys.addaudithook(hook)
    audit_refuses.append("now")
    try:
        nothing_started(anyfork.fork, ZeroDivisionError)
        nothing_started(anyfork.forkpty, ZeroDivisionError)
        for method in available():
            nothing_started(lambda m=method: anyfork.spawn(int, method=m), ZeroDivisionError)
    finally:
        audit_refuses.clear()
    pid = anyfork.fork()
    if pid == 0:
        os._exit(0)
    same(status_of(pid), 0)


def check_no_processes_left(place: str) -> None:
    """RLIMIT_NPROC: in a child that has given up root, which has no limit."""
    for method in available():
        anyfork.run(int, method=method)
    if place != "main" and not twin_works():
        return
    states = _anyfork.runtime()["own_thread_states"]
    pid = anyfork.fork()
    if pid == 0:
        code = 1
        try:
            anyfork.run(int, method="fork")
            if os.getuid() == 0:
                os.setresuid(65534, 65534, 65534)
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            fds = sorted(os.listdir("/proc/self/fd")) if os.access("/proc/self/fd", 4) else []
            for call in (anyfork.fork, anyfork.forkpty, lambda: anyfork.spawn(int, method="fork")):
                exc = raises(anyfork.SpawnError, call)
                assert exc.errno == 11, exc
                assert exc.stage in ("fork", "thread"), exc
            if fds:
                same(sorted(os.listdir("/proc/self/fd")), fds)
            assert states >= _anyfork.runtime()["own_thread_states"]
            code = 0
        finally:
            os._exit(code)
    same(status_of(pid), 0)


def check_signal_that_is_refused(place: str) -> None:
    for method in available():
        with anyfork.spawn(int, method=method) as child:
            child.result(LIMIT)
            child.signal(9)  # ended: nothing happens
            child.terminate()
            same(child.returncode, 0)


@places("main")
def check_program_that_became_another_user(place: str) -> None:
    """No right to end it: closing its handle does not wait for that in vain."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        return
    with tempfile.TemporaryDirectory(prefix="attack-setuid-") as folder:
        os.chmod(folder, 0o755)
        program = shutil.copy(setpriv, folder)
        os.chmod(program, 0o4755)
        pid = anyfork.fork()
        if pid == 0:
            code = 1
            try:
                os.setuid(65534)
                child = anyfork.spawn(argv=[program, "--reuid=0", "sleep", "2"])
                status = f"/proc/{child.pid}/status"
                until(lambda: b"Uid:\t0\t0\t0\t0" in Path(status).read_bytes(), "another user")
                raises(anyfork.SpawnError, child.kill)
                start = time.monotonic()
                child.close()
                code = 0 if time.monotonic() - start < 1.5 else 2
            finally:
                os._exit(code)
        same(status_of(pid), 0)
