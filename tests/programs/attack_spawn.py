"""Attacks on what a worker sends back, on its loops, and on nesting."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from attack_common import (
    LIMIT,
    available,
    in_child,
    places,
    raises,
    same,
    status_of,
    twin_works,
    until,
)

import anyfork

# ---- results and exceptions ----------------------------------------------------------


class Lies(Exception):
    def __reduce__(self) -> Any:
        return str, ("I am no exception",)


class NoText(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError("no text")

    def __repr__(self) -> str:
        raise ZeroDivisionError("no repr")


class NeedsTwo(Exception):
    """The classic: pickled well, unpickled never."""

    def __init__(self, a: object, b: object) -> None:
        super().__init__(f"{a} {b}")


class KillsItsLoader(Exception):
    def __reduce__(self) -> Any:
        return os._exit, (77,)


class OwnNotes(Exception):
    __notes__ = 5

    def add_note(self, note: str) -> None:
        raise ZeroDivisionError("no notes")


def fail_with(what: str) -> object:
    match what:
        case "local":

            class Local(Exception):
                pass

            raise Local("of a function")
        case "lies":
            raise Lies("x")
        case "notext":
            raise NoText
        case "two":
            raise NeedsTwo(1, 2)
        case "notes":
            raise OwnNotes("x")
        case "group":
            raise ExceptionGroup("several", [ValueError(1), KeyError("k")])
        case "cause":
            try:
                raise KeyError("inner")
            except KeyError as exc:
                raise ValueError("outer") from exc
        case "interrupt":
            raise KeyboardInterrupt
        case "generator exit":
            raise GeneratorExit
        case "recursion":
            return fail_with("recursion")
        case "huge":
            raise ValueError("x" * 20_000_000)
        case "lock":
            raise ValueError(threading.Lock())
    raise AssertionError(what)


def check_exceptions(place: str) -> None:
    for method in available():

        def failure(what: str, method: str = method) -> BaseException:
            with anyfork.spawn(fail_with, what, method=method) as child:
                exc = child.exception(LIMIT)
                assert exc is not None
                same(child.returncode, 1)
                notes = "".join(getattr(exc, "__notes__", []))
                assert "fail_with" in notes, (what, notes)
                return exc

        for what, kind in {
            "local": anyfork.RemoteError,
            "lies": anyfork.RemoteError,
            "two": anyfork.RemoteError,
            "notes": anyfork.RemoteError,
            "lock": anyfork.RemoteError,
            "group": ExceptionGroup,
            "cause": ValueError,
            "interrupt": KeyboardInterrupt,
            "generator exit": GeneratorExit,
            "recursion": RecursionError,
        }.items():
            exc = failure(what)
            assert type(exc) is kind, (what, type(exc), exc)
        assert "Local: of a function" in str(failure("local"))
        assert "NeedsTwo: 1 2" in str(failure("two"))
        assert "KeyError: 'inner'" in "".join(failure("cause").__notes__)
        same(type(failure("notext")).__name__, "NoText")
        if place == "main":
            same(len(str(failure("huge"))), 20_000_000)


def kill_the_loader() -> None:
    raise KillsItsLoader


def check_exception_that_kills(place: str) -> None:
    """An exception is tried in the worker first: its owner never loads it."""
    for method in available():
        with anyfork.spawn(kill_the_loader, method=method) as child:
            exc = child.exception(LIMIT)
            assert isinstance(exc, anyfork.WorkerDied), exc
            same(exc.returncode, 77)


def make(what: str) -> object:
    match what:
        case "lambda":
            return lambda: 1
        case "generator":
            return (x for x in ())
        case "lock":
            return threading.Lock()
        case "deep":
            value: list[object] = []
            for _ in range(100_000):
                value = [value]
            return value
        case "huge":
            return b"x" * 100_000_000
    return None


def check_results(place: str) -> None:
    for method in available():
        same(anyfork.run(make, "none", method=method), None)
        for what in ("lambda", "generator", "lock"):
            with anyfork.spawn(make, what, method=method) as child:
                exc = child.exception(LIMIT)
            notes = "".join(getattr(exc, "__notes__", []))
            assert "result cannot be pickled" in notes, (what, exc, notes)
        with anyfork.spawn(make, "huge", method=method) as child:
            same(len(child.result(LIMIT)), 100_000_000)
            same(len(child.result()), 100_000_000)  # as often as one likes
        with anyfork.spawn(len, b"y" * 50_000_000, method=method) as child:
            same(child.result(LIMIT), 50_000_000)


def leave(how: object) -> None:
    if how == "os._exit":
        os._exit(9)
    if isinstance(how, str) and how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(LIMIT)
    sys.exit(how)


def check_exits(place: str) -> None:
    expected = {
        None: 0,
        0: 0,
        3: 3,
        255: 255,
        256: 0,
        -1: 255,
        True: 1,
        "a text": 1,
        2.5: 1,
        "os._exit": 9,
        "SIGKILL": -9,
        "SIGSEGV": -11,
    }
    for method in available():
        for how, code in expected.items():
            with anyfork.spawn(leave, how, method=method) as child:
                same((how, child.wait(LIMIT)), (how, code))
                exc = child.exception()
                assert isinstance(exc, anyfork.WorkerDied), exc
                same(exc.returncode, code)


class Callable_:
    def __call__(self, *args: object) -> object:
        raise LookupError(args)

    def method(self, x: int) -> int:
        return x + 1


def check_kinds_of_callables(place: str) -> None:
    import functools

    for method in available():
        with anyfork.spawn(Callable_(), 1, 2, method=method) as child:
            exc = child.exception(LIMIT)
            assert isinstance(exc, LookupError), exc
        same(anyfork.run(Callable_().method, 1, method=method), 2)
        same(anyfork.run(functools.partial(int, "11"), 2, method=method), 3)
        same(anyfork.run(dict, method=method), {})
        with anyfork.spawn(int, "x", method=method) as child:
            assert isinstance(child.exception(LIMIT), ValueError)
    same(anyfork.run(lambda: place, method=available()[0]) if place == "main" else place, place)


# ---- loops, contexts -----------------------------------------------------------------

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="default")


def run_asyncio() -> list[object]:
    async def main() -> int:
        await asyncio.sleep(0)
        await asyncio.to_thread(int)
        process = await asyncio.create_subprocess_exec("true")
        return await process.wait()

    raises(RuntimeError, asyncio.get_running_loop)
    return [asyncio.run(main()), VARIABLE.get(), asyncio.current_task.__name__]


EXPECTED = [0, "default", "current_task"]


@places("main", "legacy")
def check_from_inside_asyncio(place: str) -> None:
    if place == "legacy":
        # asyncio's runner wants signal handlers and child watching of main
        same(asyncio.run(asyncio.sleep(0, "ran")), "ran")

    async def main(eager: bool) -> None:
        loop = asyncio.get_running_loop()
        if eager:
            loop.set_task_factory(asyncio.eager_task_factory)
        ticks = []

        async def tick() -> None:
            while True:
                ticks.append(1)
                await asyncio.sleep(0.001)

        ticker = loop.create_task(tick())
        await asyncio.sleep(0.01)
        VARIABLE.set("the caller's")
        for method in available():
            if place == "legacy" and method == "fork":
                continue  # no asyncio subprocess outside main

            async def start(method: str = method) -> object:
                return anyfork.run(run_asyncio, method=method)

            same(await loop.create_task(start()), EXPECTED)
            same(await asyncio.to_thread(anyfork.run, run_asyncio, method=method), EXPECTED)
            child = anyfork.spawn(run_asyncio, method=method)
            ready = asyncio.Event()
            loop.add_reader(child.pidfd, ready.set)
            await asyncio.wait_for(ready.wait(), LIMIT)
            loop.remove_reader(child.pidfd)
            same(child.result(0), EXPECTED)
            child.close()
        ticker.cancel()
        assert VARIABLE.get() == "the caller's"

    asyncio.run(main(False))
    asyncio.run(main(True))


def run_trio() -> list[object]:
    import trio

    async def main() -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0)
        return (await trio.run_process(["true"])).returncode

    return [trio.run(main), VARIABLE.get()]


@places("main")
def check_from_inside_trio(place: str) -> None:
    try:
        import trio
    except ImportError:
        print("skipped: no trio")
        return

    async def main() -> None:
        VARIABLE.set("the caller's")
        for method in available():
            same(anyfork.run(run_trio, method=method), [0, "default"])
            same(
                await trio.to_thread.run_sync(lambda m=method: anyfork.run(run_trio, method=m)),
                [0, "default"],
            )
            with anyfork.spawn(run_trio, method=method) as child:
                with trio.fail_after(LIMIT):
                    await trio.lowlevel.wait_readable(child.pidfd)
                same(child.result(0), [0, "default"])

    trio.run(main)


def unraisable() -> list[str]:
    """What the garbage collector has to say of what the owner left."""
    seen: list[str] = []
    sys.unraisablehook = lambda raised: seen.append(repr(raised.exc_value))
    gc.collect()
    return seen


@places("main")
def check_async_generators_of_the_owner(place: str) -> None:
    """Their finalizers belong to the owner's trio loop, whose socket is not the worker's."""
    try:
        import trio
    except ImportError:
        print("skipped: no trio")
        return

    async def numbers() -> AsyncGenerator[int]:
        yield 1

    async def main() -> None:
        for method in available():
            begun = numbers()
            await begun.__anext__()
            cycle: list[object] = [begun]
            cycle.append(cycle)
            gc.disable()  # garbage that the worker is the first to find
            try:
                del begun, cycle
                same(anyfork.run(unraisable, method=method), [])
            finally:
                gc.enable()
                gc.collect()

    trio.run(main)


# ---- nesting -------------------------------------------------------------------------


def nested(depth: int) -> int:
    if depth == 0:
        return 0
    return 1 + max(anyfork.run(nested, depth - 1, method=m) for m in available())


def check_nested(place: str) -> None:
    for method in available():
        with anyfork.spawn(nested, 2, method=method) as child:
            same(child.result(LIMIT), 2)


def fork_inside(how: str) -> str:
    """The child of a worker must not speak for the worker."""
    fork = os.fork if how == "os" else anyfork.fork
    if how == "os" and not anyfork._anyfork.in_main():
        anyfork.install()
        fork = os.fork
    pid = fork()
    if pid == 0:
        sys.exit(33)
    same(status_of(pid), 33)
    return "the worker"


def fork_inside_and_be_killed() -> None:
    pid = anyfork.fork()
    if pid == 0:
        sys.exit(33)
    same(status_of(pid), 33)
    os.kill(os.getpid(), signal.SIGKILL)


def fork_inside_and_raise() -> str:
    pid = anyfork.fork()
    if pid == 0:
        raise ValueError("the child's")
    status_of(pid)
    return "the worker"


def check_fork_inside_a_worker(place: str) -> None:
    for method in available():
        if place != "main" and method == "fork" and not twin_works():
            continue
        for how in ("os", "anyfork"):
            with anyfork.spawn(fork_inside, how, method=method) as child:
                same(child.result(LIMIT), "the worker")
                same(child.returncode, 0)
        with anyfork.spawn(fork_inside_and_raise, method=method) as child:
            same(child.result(LIMIT), "the worker")
        with anyfork.spawn(fork_inside_and_be_killed, method=method) as child:
            same(child.wait(LIMIT), -signal.SIGKILL)


def close_all_and_write(path: str) -> str:
    os.closerange(0, 4096)
    # The numbers of our pipes are free now: what opens there is the user's.
    files = [open(f"{path}-{i}", "w") for i in range(20)]  # noqa: SIM115
    for f in files:
        f.write("mine")
        f.close()
    for i in range(20):
        keep.append(open(f"{path}-{i}", "a"))  # noqa: SIM115
    return "closed"


keep: list[object] = []


def check_worker_that_closes_all(place: str) -> None:
    """The worker's records never go into a file of the user."""
    with tempfile.TemporaryDirectory() as folder:
        for method in available():
            path = os.path.join(folder, method)
            with anyfork.spawn(close_all_and_write, path, method=method) as child:
                code = child.wait(LIMIT)
                exc = child.exception()
            for i in range(20):
                with open(f"{path}-{i}") as f:
                    same((method, i, f.read()), (method, i, "mine"))
            same(code, 0)
            assert isinstance(exc, anyfork.WorkerDied), exc


def use_multiprocessing() -> list[int]:
    import multiprocessing

    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        values = pool.map(abs, [-1, -2])
    queue = context.SimpleQueue()
    process = context.Process(target=queue.put, args=(3,))
    process.start()
    values.append(queue.get())
    process.join(LIMIT)
    return [*values, process.exitcode]


def check_multiprocessing_in_a_worker(place: str) -> None:
    for method in available():
        if method == "fork" and place != "main":
            continue  # os.fork is not there: see attack_install
        with anyfork.spawn(use_multiprocessing, method=method) as child:
            same(child.result(LIMIT), [1, 2, 3, 0])


# ---- the handle ----------------------------------------------------------------------


def wait_for_ever() -> None:
    threading.Event().wait()


def check_foreign_handle(place: str) -> None:
    """In a forked child a handle raises, and touches nothing."""
    for method in available():
        child = anyfork.spawn(wait_for_ever, method=method)
        try:

            def body(child: anyfork.Child = child) -> list[str]:
                calls = [
                    child.wait, child.result, child.exception, child.kill, child.terminate,
                    child.is_alive, child.wait_ready, lambda: child.wait(0),
                ]  # fmt: skip
                names = [type(raises(anyfork.SpawnError, call)).__name__ for call in calls]
                assert "foreign" in repr(child)
                child.close()
                child.__del__()
                return names

            if place == "main" or twin_works():
                same(in_child(body), repr(["SpawnError"] * 8).encode())
            assert child.is_alive()
        finally:
            child.close()


@places("main")
def check_handle_in_a_child_of_os_fork(place: str) -> None:
    """Also beside a launch pad: its interpreter must not make os.fork() deadly."""
    for method in available():
        child = anyfork.spawn(wait_for_ever, method=method)
        try:
            pid = os.fork()
            if pid == 0:
                del child
                gc.collect()
                os._exit(0)
            same((method, status_of(pid)), (method, 0))
            assert child.is_alive()
        finally:
            child.close()


def check_handle_dropped(place: str) -> None:
    for method in available():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            child = anyfork.spawn(wait_for_ever, method=method)
            pid = child.pid
            del child
            gc.collect()
        texts = [str(w.message) for w in caught if w.category is ResourceWarning]
        caught.clear()  # its "source" is the handle
        assert len(texts) == 1, texts
        assert str(pid) in texts[0]
        raises(ProcessLookupError, os.kill, pid, 0)  # dead and reaped


def check_close_and_wait(place: str) -> None:
    for method in available():
        child = anyfork.spawn(wait_for_ever, method=method)
        child.wait_ready(LIMIT)
        child.close()
        child.close()
        same((child.returncode, child.wait(), child.is_alive()), (-9, -9, False))
        assert isinstance(child.exception(), anyfork.WorkerDied)
        child.kill()
        same((child.pidfd, child.report_fd), (-1, -1))

        # From several threads, one of which closes while the others wait.
        for closes in (False, True):
            child = anyfork.spawn(wait_for_ever, method=method)
            started = threading.Barrier(5)
            codes: list[object] = []

            def wait(
                child: anyfork.Child = child,
                started: threading.Barrier = started,
                codes: list[object] = codes,
            ) -> None:
                started.wait()
                try:
                    codes.append(child.wait(LIMIT))
                except ValueError:
                    codes.append(-9)  # closed before the wait began

            threads = [threading.Thread(target=wait) for _ in range(4)]
            for thread in threads:
                thread.start()
            started.wait()
            if closes:
                child.close()
            else:
                child.kill()
            for thread in threads:
                thread.join()
            same(codes, [-9] * 4)
            child.close()


def check_timeouts(place: str) -> None:
    for method in available():
        with anyfork.spawn(wait_for_ever, method=method) as child:
            for timeout in (0, 0.001, -5, False):
                raises(TimeoutError, child.wait, timeout)
            raises(TimeoutError, child.result, 0)
            raises(ValueError, child.wait, float("nan"))
            raises(TypeError, child.wait, "1")
            raises(ValueError, child.signal, 1000)
            raises(TypeError, child.signal, "9")
            child.signal(0)
            child.wait_ready(LIMIT)
            same(child.returncode, None)


@places("main")
def check_status_is_not_lost(place: str) -> None:
    """Whoever else reaps in this process, the EXIT record tells."""
    for method in available():
        stop: list[bool] = []

        def thief(stop: list[bool] = stop) -> None:
            while not stop:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(-1, os.WNOHANG)

        thread = threading.Thread(target=thief)
        thread.start()
        try:
            for code in range(20):
                with anyfork.spawn(sys.exit, code, method=method) as child:
                    same(child.wait(LIMIT), code)
        finally:
            stop.append(True)
            thread.join()
        old = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            for code in range(20):
                with anyfork.spawn(sys.exit, code, method=method) as child:
                    same(child.wait(LIMIT), code)
            with anyfork.spawn(wait_for_ever, method=method) as child:
                child.kill()
                try:
                    same(child.wait(LIMIT), -9)  # Linux 6.15 tells
                except anyfork.WorkerDied as exc:
                    same(exc.returncode, None)
        finally:
            signal.signal(signal.SIGCHLD, old)


@contextlib.contextmanager
def reaped_on_sigchld() -> Iterator[None]:
    """All children, whosever they are, as gunicorn's arbiter does."""

    def reap(_signal: int, _frame: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    old = signal.signal(signal.SIGCHLD, reap)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, old)


@contextlib.contextmanager
def reaped_by(call: Callable[[], object]) -> Iterator[None]:
    """By a thread that goes on calling."""
    stop = threading.Event()

    def reap() -> None:
        while not stop.wait(0.001):
            with contextlib.suppress(ChildProcessError):
                call()

    thread = threading.Thread(target=reap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(LIMIT)


@places("main")
def check_status_beside_hosts_that_reap(place: str) -> None:
    """os.wait() is how tornado's fork_processes() waits; it sleeps while there are children,
    and one that lives on would keep the thread."""
    for method in available():
        for host in (
            reaped_on_sigchld(),
            reaped_by(os.wait),
            reaped_by(multiprocessing.active_children),
        ):
            with host:
                for code in range(10):
                    with anyfork.spawn(sys.exit, code, method=method) as child:
                        same((method, child.wait(LIMIT)), (method, code))


@places("main", "isolated")
def terminate_a_program() -> int:
    with subprocess.Popen(["sleep", "100"]) as process:
        process.terminate()
        try:
            return process.wait(LIMIT / 4)
        finally:
            process.kill()


def check_what_a_worker_starts_can_be_terminated(place: str) -> None:
    """It inherits the signal mask of the thread that its target runs on."""
    for row in anyfork.methods():
        if row.available:
            same((row.name, anyfork.run(terminate_a_program, method=row.name)), (row.name, -15))


def seconds_to_ready(child: anyfork.Child, into: list[float]) -> None:
    start = time.monotonic()
    child.wait_ready(LIMIT)
    into.append(time.monotonic() - start)


def check_ready_is_told_to_every_waiter(place: str) -> None:
    """Whoever reads the record must not leave the others asleep."""
    for method in available():
        for _round in range(3):
            with anyfork.spawn(time.sleep, 1.5, method=method) as child:
                took: list[float] = []
                waiters = [
                    threading.Thread(target=seconds_to_ready, args=(child, took)) for _ in range(3)
                ]
                for thread in waiters:
                    thread.start()
                for thread in waiters:
                    thread.join()
                child.result(LIMIT)
                assert len(took) == 3 and max(took) < 1.2, (method, took)


def large() -> bytes:
    return bytes(3_000_000)


def check_wake_fd(place: str) -> None:
    """One descriptor tells an event loop of all news, whatever other threads read."""
    for method in available():
        with anyfork.spawn(large, method=method) as child, select.epoll() as loop:
            watched = -1
            while child.is_alive():
                if child.wake_fd != watched:
                    watched = child.wake_fd
                    loop.register(watched, select.EPOLLIN)
                assert loop.poll(LIMIT), method
            same((method, len(child.result(0))), (method, 3_000_000))
        with anyfork.spawn(time.sleep, 0.2, method=method) as child, select.epoll() as loop:
            child.wait_ready(LIMIT)
            loop.register(child.wake_fd, select.EPOLLIN)
            thread = threading.Thread(target=child.wait, args=(LIMIT,))
            thread.start()  # it reads the end of the reports
            thread.join()
            assert loop.poll(LIMIT), (method, "the wake-up is lost")


def check_wake_fd_while_the_template_is_stopped(place: str) -> None:
    """A worker tells of its end itself: the template, which has it as a zombie, does not."""
    with anyfork.Template() as template, template.spawn(time.sleep, 0.3) as child:
        pid = template.stats().pid
        assert pid is not None
        child.wait_ready(LIMIT)
        os.kill(pid, signal.SIGSTOP)
        try:
            while child.is_alive():
                assert select.select([child.wake_fd], [], [], LIMIT)[0], "it is not told"
            same(child.result(0), None)
        finally:
            os.kill(pid, signal.SIGCONT)


def check_what_has_arrived_outlives_the_handle(place: str) -> None:
    for method in available():
        with anyfork.spawn(pow, 2, 5, method=method) as child:
            child.wait(LIMIT)
        same((method, child.result(), child.exception()), (method, 32, None))
        with anyfork.spawn(fails, method=method) as child:
            child.wait(LIMIT)
        raises(ZeroDivisionError, child.result)
    with anyfork.spawn(argv=["true"]) as child:
        same((child.result(LIMIT), child.exception()), (None, None))
    with anyfork.spawn(argv=["sh", "-c", "exit 3"]) as child:
        same(raises(anyfork.WorkerDied, lambda: child.result(LIMIT)).returncode, 3)


def fails() -> None:
    raise ZeroDivisionError


class Called:
    async def __call__(self) -> int:
        return 1


def check_coroutines_are_no_targets(place: str) -> None:
    exc = raises(TypeError, lambda: anyfork.spawn(Called(), method="fork"))
    assert "loop" in str(exc)
    for method in available():
        exc = raises(TypeError, lambda m=method: anyfork.run(makes_a_coroutine, method=m))
        assert any("trio.run" in note for note in exc.__notes__), exc.__notes__


def makes_a_coroutine() -> object:
    return Called()()


class Endless:
    """As a Mock, it has any attribute, and that is another of its kind."""

    @property
    def func(self) -> Endless:
        return Endless()

    def __call__(self) -> int:
        return 3


def check_target_with_any_attribute(place: str) -> None:
    for method in available():
        same(anyfork.run(Endless(), method=method), 3)


@places("main")
def check_reason_of_a_failed_prelude(place: str) -> None:
    def boom() -> None:
        raise ValueError("boom")

    anyfork.register_child_reset(boom)
    for method in ("fork", "subint_fork", "main_thread_forkserver"):
        exc = raises(anyfork.SpawnError, lambda m=method: anyfork.run(int, method=m))
        assert "ValueError('boom')" in str(exc), exc


def check_detached_workers_are_reaped(place: str) -> None:
    """By the next handle that is closed, or start."""
    for method in available():
        last = anyfork.spawn(int, method=method)
        children = [anyfork.spawn(int, method=method) for _ in range(3)]
        pids = [child.pid for child in children]
        for child in children:
            child.detach()
            child.close()
        until(lambda p=pids: all(is_zombie(pid) for pid in p), "their end")
        last.close()
        for pid in pids:
            assert not os.path.exists(f"/proc/{pid}"), (method, pid)


def is_zombie(pid: int | None) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def check_close_beside_wait(place: str) -> None:
    """The status is known to who waits, whoever closes the handle meanwhile."""
    for row in anyfork.methods():
        if not (row.available and row.has_process and row.target != "fresh"):
            continue
        for _round in range(5):
            codes: list[object] = []

            def wait(child: anyfork.Child, into: list[object] = codes) -> None:
                try:
                    into.append(child.wait(LIMIT))
                except BaseException as failure:
                    into.append(repr(failure))

            child = anyfork.spawn(time.sleep, 100, method=row.name)
            thread = threading.Thread(target=wait, args=(child,))
            thread.start()
            time.sleep(0.01)
            child.close()
            thread.join()
            same((row.name, codes), (row.name, [-9]))
            exc = raises(anyfork.WorkerDied, child.result)
            assert "its handle was closed" in str(exc), exc


def check_streams_from_several_threads(place: str) -> None:
    for _round in range(5):
        with anyfork.spawn(argv=["true"], stdout=subprocess.PIPE) as child:
            got: list[object] = []

            def take(child: anyfork.Child = child, into: list[object] = got) -> None:
                into.append(child.stdout)

            threads = [threading.Thread(target=take) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(set(map(id, got))) == 1 and None not in got, got


def check_run_has_no_pipes_and_no_programs(place: str) -> None:
    for name in ("stdin", "stdout", "stderr"):
        exc = raises(
            ValueError, lambda n=name: anyfork.run(int, method="exec", **{n: subprocess.PIPE})
        )
        assert name in str(exc) and "spawn()" in str(exc), exc
    assert "spawn(argv" in str(raises(TypeError, lambda: anyfork.run(None, argv=["true"])))


class Unpicklable:
    def __reduce__(self) -> tuple[object, ...]:
        return int, ("not a number",)


def check_a_result_that_cannot_be_unpickled(place: str) -> None:
    exc = raises(ValueError, anyfork.run, Unpicklable, method="exec")
    assert any("cannot be unpickled here" in note for note in exc.__notes__), exc.__notes__


def check_many_at_once(place: str) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard < 0 else min(hard, 4096), hard))
    try:
        for method in available():
            children = [anyfork.spawn(os.getpid, method=method) for _ in range(100)]
            same([c.result(LIMIT) for c in children], [c.pid for c in children])
            for child in children:
                child.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def check_from_many_threads(place: str) -> None:
    """Also while a thread of the worker's owner ends just after a start."""
    for method in available():
        got: list[object] = []

        def start(method: str = method, got: list[object] = got) -> None:
            for n in range(5):
                got.append(anyfork.run(abs, -n, method=method))

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        same(sorted(got), sorted(list(range(5)) * 4))
