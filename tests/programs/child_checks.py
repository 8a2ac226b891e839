"""What a forked child has to be able to do. One function, one check, one child.

`MAIN` are the checks for a worker that runs in the main interpreter, `TWIN` those
for the child of a twin fork, which is still in its sub-interpreter. Used by the
programs child_in_main.py and twin_child.py, imported there before the fork.
"""

from __future__ import annotations

import contextvars
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import outcomes
import subint

import anyfork
from anyfork import _anyfork

Check = Callable[[], object]
MAIN: dict[str, Check] = {}
TWIN: dict[str, Check] = {}

SECONDS = 20.0  # the bound of every loop that waits

# What only the caller's own memory can hold; the twin's child has to see it.
context_variable: contextvars.ContextVar[str] = contextvars.ContextVar("context_variable")


def main(fn: Check) -> Check:
    MAIN[fn.__name__] = fn
    return fn


def twin(fn: Check) -> Check:
    TWIN[fn.__name__] = fn
    return fn


def for_each_kind(
    table: dict[str, Check],
) -> Callable[[Callable[[str], object]], Callable[[str], object]]:
    """Register fn(kind) once for legacy and once for isolated interpreters."""

    def register(fn: Callable[[str], object]) -> Callable[[str], object]:
        for kind in subint.KINDS:
            table[f"{fn.__name__}_{kind}"] = lambda kind=kind: fn(kind)
        return fn

    return register


def busy_until(done: Callable[[], object]) -> None:
    """A busy loop: never sleeps, so a signal handler has to break into it."""
    end = time.monotonic() + SECONDS
    while not done() and time.monotonic() < end:
        pass
    assert done()


def truth() -> str:
    return "/bin/true" if os.path.exists("/bin/true") else "/usr/bin/true"


# ---- both ---------------------------------------------------------------------------


@main
@twin
def thread() -> None:
    seen = []
    t = threading.Thread(
        target=lambda: seen.append(threading.current_thread() is threading.main_thread())
    )
    t.start()
    t.join()
    assert seen == [False]
    assert threading.current_thread() is threading.main_thread()
    assert threading.active_count() == 1, threading.enumerate()


@main
@twin
def gil_state() -> None:
    def nested() -> tuple[int, int]:
        api = ctypes.pythonapi
        before = api.PyGILState_Check()
        state = api.PyGILState_Ensure()
        inside = api.PyGILState_Check()
        api.PyGILState_Release(state)
        return before, inside

    assert nested() == (1, 1)
    if subint.current() == 0:  # PyGILState_Ensure() on a new thread knows main only
        assert subint.on_thread(nested) == (1, 1)


@main
@twin
def collect() -> None:
    for _ in range(5):
        gc.collect()


@main
@twin
def imports() -> None:
    import bz2
    import csv
    import decimal
    import lzma
    import sqlite3
    import ssl
    import xml.etree.ElementTree
    import zoneinfo

    assert decimal.Decimal("1.5") + 1 == decimal.Decimal("2.5")
    assert all((bz2, csv, lzma, sqlite3, ssl, xml.etree.ElementTree, zoneinfo))


@main
@twin
def asyncio_run() -> None:
    import asyncio

    async def seven() -> int:
        await asyncio.sleep(0.01)
        return 7

    assert asyncio.run(seven()) == 7


@main
@twin
def futures() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(abs, range(-9, 0))) == list(range(9, 0, -1))


@main
@twin
def run_subprocess() -> None:
    subprocess.run([truth()], check=True, timeout=SECONDS)
    if subint.current() == 0:  # CPython forbids preexec_fn elsewhere
        subprocess.run([truth()], check=True, timeout=SECONDS, preexec_fn=lambda: None)


@main
@twin
def tracemalloc() -> None:
    import tracemalloc

    tracemalloc.start()
    kept = [bytes(100) for _ in range(1000)]
    assert tracemalloc.get_traced_memory()[0] > 1000
    assert len(kept) == 1000
    tracemalloc.stop()


@for_each_kind(MAIN)
@for_each_kind(TWIN)
def new_interpreter(kind: str) -> None:
    before = len(subint.interpreters())
    for _ in range(5):
        with subint.interpreter(kind) as made:
            made.run("import json, threading; json.dumps([1])")
    assert len(subint.interpreters()) == before
    assert _anyfork.runtime()["interpreters"] == before


@for_each_kind(MAIN)
def new_interpreter_in_threads(kind: str) -> None:
    failures: list[BaseException] = []

    def use() -> None:
        try:
            with subint.interpreter(kind) as made:
                made.run("import json; json.dumps([1])")
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures


# ---- in main ------------------------------------------------------------------------


@main
def runtime_is_whole() -> None:
    runtime = _anyfork.runtime()
    assert runtime["interpreters"] == 1, runtime
    assert runtime["main_tstate_alive"], runtime
    assert runtime["gilstate_check"] == 1, runtime
    assert runtime["in_main"], runtime
    assert threading.current_thread() is threading.main_thread()


@main
def only_this_interpreter() -> None:
    assert subint.interpreters() == [0], subint.interpreters()


@main
def one_thread_state() -> None:
    """The dead threads' states are gone; what is left is this thread's, of which the
    one that was in use at the fork may still be listed."""
    assert len(sys._current_frames()) == 1, sys._current_frames()


def _alarm(delay: float) -> list[int]:
    hits: list[int] = []
    signal.signal(signal.SIGALRM, lambda number, frame: hits.append(number))
    signal.setitimer(signal.ITIMER_REAL, delay)
    return hits


@main
def signal_in_busy_loop() -> None:
    hits = _alarm(0.05)
    busy_until(lambda: hits)


@main
def signal_in_sleep() -> None:
    hits = _alarm(0.05)
    end = time.monotonic() + SECONDS
    while not hits and time.monotonic() < end:
        time.sleep(1)
    assert hits


@main
def signal_beside_thread() -> None:
    stop = threading.Event()
    t = threading.Thread(target=stop.wait, args=(SECONDS,))
    t.start()
    hits = _alarm(0.05)
    busy_until(lambda: hits)
    stop.set()
    t.join()


@main
def keyboard_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        busy_until(lambda: False)
    except KeyboardInterrupt:
        return
    raise AssertionError("no KeyboardInterrupt")


@main
def pending_call() -> None:
    hits: list[None] = []
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)

    @prototype
    def call(_: object) -> int:
        hits.append(None)
        return 0

    assert ctypes.pythonapi.Py_AddPendingCall(call, None) == 0
    busy_until(lambda: hits)


@main
def asyncio_subprocess() -> None:
    import asyncio

    async def status() -> int:
        process = await asyncio.create_subprocess_exec(truth())
        return await asyncio.wait_for(process.wait(), SECONDS)

    assert asyncio.run(status()) == 0


@main
def os_fork() -> None:
    assert outcomes.in_child(os.fork, lambda: os._exit(7)) == 7


@main
def os_fork_in_thread() -> None:
    assert subint.on_thread(lambda: outcomes.in_child(os.fork, lambda: os._exit(7))) == 7


def use_a_thread() -> int:
    assert subint.current() == 0
    subint.on_thread(gc.collect)
    return 5


def grandchild_hop() -> None:
    """In any interpreter: a worker in main."""
    assert anyfork.run(use_a_thread, method="subint_fork") == 5


def grandchild_twin() -> None:
    """In a sub-interpreter: a child that is in it too."""
    here = subint.current()

    def look() -> None:
        assert subint.current() == here
        gc.collect()
        os._exit(9)

    try:
        assert outcomes.in_child(anyfork.fork, look) == 9
    except anyfork.MethodUnavailable:
        assert not sys._is_gil_enabled(), "only free-threaded builds refuse"


@for_each_kind(MAIN)
def hop_from_new_interpreter(kind: str) -> None:
    with subint.interpreter(kind) as made:
        made.run("import child_checks; child_checks.grandchild_hop()")


@for_each_kind(MAIN)
def twin_from_new_interpreter(kind: str) -> None:
    with subint.interpreter(kind) as made:
        made.run("import child_checks; child_checks.grandchild_twin()")


@main
def fault_handler() -> None:
    import faulthandler

    faulthandler.enable()
    with open(os.devnull, "w") as sink:
        faulthandler.dump_traceback(file=sink, all_threads=True)
    faulthandler.disable()


@main
def perf_trampoline() -> None:
    try:
        sys.activate_stack_trampoline("perf")
    except ValueError:  # not built in
        return
    exec("def f(): return 1\nassert f() == 1")
    sys.deactivate_stack_trampoline()


@main
def warn() -> None:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("text", stacklevel=1)
    assert len(caught) == 1


@main
def log() -> None:
    import io
    import logging

    sink = io.StringIO()
    logger = logging.getLogger("child_checks")
    logger.addHandler(logging.StreamHandler(sink))
    logger.warning("text")
    assert sink.getvalue() == "text\n"


@main
def multiprocessing_fork() -> None:
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=abs, args=(1,))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0


# A worker ends by _exit(), so the checks of Py_FinalizeEx() ask for it: Py_Exit()
# finalizes and then calls exit(), with 120 instead of 0 if finalizing failed.


def _exit_by_finalizing(code: int = 0) -> None:
    ctypes.pythonapi.Py_Exit(code)


@main
def exit_plain() -> None:
    _exit_by_finalizing()


@main
def exit_code() -> None:
    _exit_by_finalizing(7)


@main
def exit_atexit() -> None:
    import atexit

    atexit.register(os.write, 2, b"atexit ran\n")
    _exit_by_finalizing()


@main
def exit_after_work() -> None:
    imports()
    asyncio_run()
    thread()
    _exit_by_finalizing()


@main
def exit_after_interpreters() -> None:
    for kind in subint.KINDS:
        with subint.interpreter(kind) as made:
            made.run("x = 1")
    _exit_by_finalizing()


@main
def exit_with_thread() -> None:
    threading.Thread(target=time.sleep, args=(0.1,)).start()
    _exit_by_finalizing()


@main
def exit_system_exit() -> None:
    """SystemExit that reaches C: PyErr_Print() calls Py_Exit()."""
    ctypes.pythonapi.PyRun_SimpleString(b"raise SystemExit(0)")


@main
def system_exit() -> None:
    """SystemExit of a target: the worker's own way out."""
    raise SystemExit(0)


EXPECTED_CODE = {"exit_code": 7}
EXPECTED_TEXT = {"exit_atexit": "atexit ran"}


# ---- in the twin --------------------------------------------------------------------


@twin
def state() -> None:
    runtime = _anyfork.runtime()
    assert not runtime["in_main"], runtime
    assert runtime["interpreters"] == 2, runtime
    assert runtime["own_thread_states"] == 1, runtime
    assert runtime["main_tstate_alive"], runtime
    assert runtime["gilstate_check"] == 1, runtime


@twin
def interpreter_id() -> None:
    import twin_child

    assert subint.current() == twin_child.interpreter_id != 0
    assert sorted(subint.interpreters()) == [0, twin_child.interpreter_id]


@twin
def threads_share_the_gil() -> None:
    numbers: list[int] = []

    def add() -> None:
        for i in range(20000):
            numbers.append(i)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(numbers) == 80000


@for_each_kind(TWIN)
def chain_in_new_interpreter(kind: str) -> None:
    """main, this one and a new one on one stack: fork() works or refuses clearly."""
    with subint.interpreter(kind) as made:
        made.run("import child_checks; child_checks.fork_in_chain()")


def fork_in_chain() -> None:
    try:
        code = outcomes.in_child(anyfork.fork, lambda: os._exit(9))
    except anyfork.MethodUnavailable as exc:
        assert "interpreter" in exc.detail, exc.detail
    else:
        assert code == 9, code


@twin
def grandchildren() -> None:
    for _ in range(5):
        assert outcomes.in_child(anyfork.fork, lambda: (gc.collect(), os._exit(11))) == 11


@twin
def six_generations() -> None:
    for _ in range(6):
        pid = anyfork.fork()
        if pid:
            os._exit(outcomes.wait(pid) or 0)
    os._exit(21)


@twin
def worker_in_main() -> None:
    grandchild_hop()


@twin
def fork_in_thread() -> None:
    assert subint.on_thread(lambda: outcomes.in_child(anyfork.fork, lambda: os._exit(12))) == 12


@twin
def sigterm_is_default() -> None:
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with open("/proc/self/status") as status:
        caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
    assert not caught >> (signal.SIGTERM - 1) & 1
    assert not caught >> (signal.SIGINT - 1) & 1


@twin
def signal_handlers_are_mains() -> None:
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    except ValueError:
        return
    raise AssertionError("CPython lets only main set signal handlers")


@twin
def context_is_kept() -> None:
    assert context_variable.get() == "of the caller"


@twin
def exceptions() -> None:
    try:
        raise KeyError("x")
    except KeyError as exc:
        assert exc.args == ("x",)
    assert sys.exception() is None


@twin
def thread_outlives_work() -> None:
    threading.Thread(target=time.sleep, args=(0.05,)).start()


@twin
def finalize() -> None:
    _exit_by_finalizing()


EXPECTED_CODE["six_generations"] = 21


def perform(check: Callable[[], Any], stderr_path: str) -> None:
    """In the child: all it says from now on goes to a file of its own."""
    fd = os.open(stderr_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 2)
    os.close(fd)
    check()


def perform_main(name: str, stderr_path: str) -> None:
    """Picklable: one check by name, in the worker."""
    perform(MAIN[name], stderr_path)
