"""Methods whose target runs in an interpreter made for it, where nothing of the caller's
is: by what name it is found, what comes back, what it can do there, and its end."""

from __future__ import annotations

import _interpreters
import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from attack_common import (
    IN_MAIN_OF_ANOTHER,
    LIMIT,
    available,
    busy,
    given,
    places,
    raises,
    same,
    until,
)

import anyfork
from anyfork import _anyfork

MARK = "as imported"


def fresh(*, process: bool | None = None) -> list[str]:
    rows = [row for row in anyfork.methods() if row.target == "fresh" and row.available]
    assert rows
    return [row.name for row in rows if process in (None, row.has_process)]


def where() -> tuple[int, bool, bool, str, int]:
    """pid, in main?, a GIL of its own?, the mark, interpreter."""
    runtime = _anyfork.runtime()
    assert runtime is not None
    return os.getpid(), runtime["in_main"], runtime["own_gil"], MARK, runtime["interpreter"]


def check_it_runs_in_an_interpreter_of_its_own(place: str) -> None:
    global MARK
    MARK = "changed here"
    here, _ = _interpreters.get_current()
    for method in fresh():
        with anyfork.spawn(where, method=method) as child:
            pid, in_main, own_gil, mark, interpreter = child.result(LIMIT)
            same(pid, os.getpid() if child.pid is None else child.pid)
            executed = child.method in IN_MAIN_OF_ANOTHER
            same((in_main, mark), (executed, "as imported"))
            same(own_gil, not executed and _anyfork.layout()["twin"][0] == "ready")
            assert child.pid is not None or interpreter != here
            same(child.wait(LIMIT), 0)


def give(n: int) -> bytes:
    return bytes(n)


def check_a_name_is_not_the_program(place: str) -> None:
    """Text that happens to be in an argument."""
    for method in fresh():
        same(anyfork.run(str, "__main__ __mp_main__", method=method), "__main__ __mp_main__")


HEAVY = ("anyfork._request", "contextlib", "enum", "pickle", "re", "threading", "typing")
LOADED = f"[m for m in {HEAVY!r} if m in __import__('sys').modules]"
# What the package offers is there all the same, when it is asked for.
OFFERED = "__import__('anyfork').SpawnError.__module__"


@places("main", "isolated")
def check_what_a_worker_waits_for(place: str) -> None:
    """Modules that take as long as all the rest of a start."""
    command = [sys.executable, "-c", f"print({LOADED})"]
    bare = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    for method in fresh():
        if method == "zygote":  # loaded before there is a start
            continue
        same((method, anyfork.run(eval, LOADED, method=method)), (method, eval(bare.stdout)))
        same((method, anyfork.run(eval, OFFERED, method=method)), (method, "anyfork"))
        names = anyfork.run(eval, "dir(__import__('anyfork'))", method=method)
        same((method, set(anyfork.__all__) - set(names)), (method, set()))
        raises(AttributeError, anyfork.run, eval, "__import__('anyfork').nosuch", method=method)


def check_results_of_any_size(place: str) -> None:
    for method in fresh():
        for n in (0, 5_000_000):
            same(len(anyfork.run(give, n, method=method)), n)


class NeedsTwo(Exception):
    def __init__(self, a: object, b: object) -> None:
        super().__init__(f"{a} {b}")


def fail(how: str) -> Any:
    if how == "exception":
        raise KeyError("of the target")
    if how == "unloadable":
        raise NeedsTwo(1, 2)
    if how == "unpicklable":
        return threading.Lock()
    return sys.exit(int(how))


def check_exceptions_come_back(place: str) -> None:
    for method in fresh():
        with anyfork.spawn(fail, "exception", method=method) as child:
            exc = child.exception(LIMIT)
            assert isinstance(exc, KeyError), exc
            assert "in fail" in "".join(exc.__notes__), exc.__notes__
            same(child.returncode, 1)
        raises(anyfork.RemoteError, anyfork.run, fail, "unloadable", method=method)
        error = raises(TypeError, anyfork.run, fail, "unpicklable", method=method)
        assert "cannot be pickled" in "".join(error.__notes__)
        with anyfork.spawn(fail, "7", method=method) as child:
            same(child.wait(LIMIT), 7)
            died = raises(anyfork.WorkerDied, child.result, LIMIT)
            same(died.returncode, 7)


def check_what_cannot_be_pickled_is_refused(place: str) -> None:
    for method in fresh():
        error = raises(TypeError, anyfork.spawn, threading.Lock().acquire, method=method)
        assert "picklable" in str(error)
        assert "fork" in str(error)


class Absent:
    """Unpickles by a function of a module that is nowhere."""

    def __reduce__(self) -> Any:
        return absent, ()


def absent() -> None:
    pass


def check_what_cannot_be_loaded_is_told(place: str) -> None:
    absent.__module__ = "attack_fresh_nowhere"
    module = type(sys)("attack_fresh_nowhere")
    module.absent = absent  # type: ignore[attr-defined]
    sys.modules["attack_fresh_nowhere"] = module
    for method in fresh():
        with anyfork.spawn(give, Absent(), method=method) as child:
            error = raises(anyfork.SpawnError, child.wait_ready, LIMIT)
            same(error.stage, "unpickle")
            assert "attack_fresh_nowhere" in str(error.__cause__), error.__cause__
            raises(anyfork.SpawnError, child.result, LIMIT)


def leave_a_trail(fd: int) -> None:
    os.write(fd, b"target ")
    atexit.register(os.write, fd, b"atexit ")
    threading.Thread(target=lambda: (time.sleep(0.05), os.write(fd, b"thread "))).start()


@places("main")
def check_threads_and_atexit_end_first(place: str) -> None:
    for method in fresh():
        r, w = os.pipe()
        with anyfork.spawn(leave_a_trail, w, method=method, **given(method, w)) as child:
            child.result(LIMIT)
            same(os.read(r, 100), b"target thread atexit ")
        os.close(r)
        os.close(w)


def check_many_at_once(place: str) -> None:
    for method in fresh():
        with busy():
            children = [anyfork.spawn(where, method=method) for _ in range(4)]
            answers = [child.result(LIMIT) for child in children]
        same(len({(pid, interpreter) for pid, *_, interpreter in answers}), 4)
        for child in children:
            child.close()


def start_one_more(method: str, depth: int) -> int:
    return 1 + (start_one_more_elsewhere(method, depth - 1) if depth else 0)


def start_one_more_elsewhere(method: str, depth: int) -> int:
    n: int = anyfork.run(start_one_more, method, depth, method=method)
    return n


def check_workers_of_workers(place: str) -> None:
    for method in fresh():
        same(start_one_more_elsewhere(method, 2), 3)


def execute_both() -> tuple[int, bool, bool]:
    """A program, and a target of ours: how the one ended; of the other, whether it was
    another process, and in main."""
    with anyfork.spawn(argv=["/bin/sh", "-c", "exit 7"], method="exec") as child:
        code = child.wait(LIMIT)
    pid, in_main, *_ = anyfork.run(where, method="exec")
    return code, pid != os.getpid(), in_main


def check_exec_from_a_thread(place: str) -> None:
    """One that never enters an event loop."""
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(execute_both()))
    thread.start()
    thread.join(LIMIT)
    same(answers, [(7, True, True)])


held: list[tuple[threading.Event, threading.Event]] = []


def hold_the_start() -> None:
    """A before-fork hook, which cannot be taken away again."""
    for entered, go_on in held:
        entered.set()
        go_on.wait(LIMIT)


@places("main")
def check_exec_beside_a_start_that_waits(place: str) -> None:
    """No fork: it runs no hook, and waits for nothing that a start by fork has taken."""
    os.register_at_fork(before=hold_the_start)
    held[:] = [(threading.Event(), threading.Event())]
    entered, go_on = held[0]
    forked: list[object] = []

    def fork() -> None:
        forked.append(anyfork.run(os.getppid, method="subint_fork"))

    thread = threading.Thread(target=fork)
    thread.start()
    try:
        assert entered.wait(LIMIT), "the start by fork does not come to its hook"
        children = [
            anyfork.spawn(argv=["/bin/sh", "-c", "exit 7"], method="exec"),
            anyfork.spawn(where, method="exec"),
        ]
        same((thread.is_alive(), forked), (True, []))
    finally:
        held.clear()
        go_on.set()
        thread.join(LIMIT)
    same(forked, [os.getpid()])
    program, target = children
    same(program.wait(LIMIT), 7)
    same(target.result(LIMIT)[1], True)
    for child in children:
        child.close()


def check_exec_in_workers(place: str) -> None:
    """Whichever thread they were forked on."""
    for method in available():
        same((method, anyfork.run(execute_both, method=method)), (method, (7, True, True)))


def fork_in_it() -> int:
    pid = anyfork.fork()
    if pid == 0:
        os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_fork_in_it(place: str) -> None:
    if _anyfork.layout()["twin"][0] != "ready":
        return
    for method in fresh():
        same(anyfork.run(fork_in_it, method=method), 9)


def return_twice() -> str:
    """Both copies return from the target: one reports."""
    pid = anyfork.fork()
    if pid == 0:
        return "from the child"
    os.waitpid(pid, 0)
    return "from the target"


def check_only_the_worker_reports(place: str) -> None:
    if _anyfork.layout()["twin"][0] != "ready":
        return
    for method in fresh(process=True):
        same(anyfork.run(return_twice, method=method), "from the target")


def sleep_for(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def check_a_process_can_be_killed(place: str) -> None:
    for method in fresh(process=True):
        with anyfork.spawn(sleep_for, 1000.0, method=method) as child:
            child.wait_ready(LIMIT)
            child.terminate()
            same(child.wait(LIMIT), -signal.SIGTERM)


def check_a_thread_cannot(place: str) -> None:
    for method in fresh(process=False):
        with anyfork.spawn(sleep_for, 0.3, method=method) as child:
            same((child.pid, child.pidfd), (None, None))
            for call in (child.terminate, child.kill):
                error = raises(anyfork.MethodUnavailable, call)
                assert "thread" in str(error)
            raises(TimeoutError, child.result, 0.01)
            assert child.is_alive()
            same(child.result(LIMIT), 0.3)
            assert not child.is_alive()


def write_then(fd: int, seconds: float) -> None:
    time.sleep(seconds)
    os.write(fd, b"x")


def check_a_thread_outlives_its_handle(place: str) -> None:
    threads = len(os.listdir("/proc/self/task"))
    r, w = os.pipe()
    for method in fresh(process=False):
        anyfork.spawn(write_then, w, 0.1, method=method).close()
        same(os.read(r, 1), b"x")
    os.close(r)
    os.close(w)
    # It still writes its reports, into a socket that nobody reads: no SIGPIPE.
    until(lambda: len(os.listdir("/proc/self/task")) <= threads, "the thread's end")
