"""A template, or a standby, is killed at each of its steps: a start gives the right answer or
an error, soon, and the next one works. A step is a system call, see syscalls.py."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from attack_common import LIMIT, beside_nothing, places, raises, same, until
from attack_template import children_of
from syscalls import watched, why_not

import anyfork

SOON = 10.0  # seconds for a start; a second of them is that in which a standby is asked for again
CALLS_MAX = 1000  # of a standby; and of a template, from one start on
CALLS_OF_A_START = 80  # of a standby that waited; more than it has
TRIES = 60  # of the calls in which a template is made


def start(template: anyfork.Template, value: int) -> str:
    """The answer, or the error's name; in time. Of a target that imports nothing, so that the
    calls are those of the start."""
    began = time.monotonic()
    try:
        same(template.run(abs, value), value)
        came = "answer"
    except (anyfork.SpawnError, anyfork.WorkerDied) as exc:
        came = type(exc).__name__
    took = time.monotonic() - began
    assert took < SOON, f"{came} after {took:.1f} s"
    return came


def no_child_is_left() -> None:
    raises(ChildProcessError, os.waitpid, -1, os.WNOHANG)


_rounds: Counter[object] = Counter()


def at_each_call(one_try: Callable[[int], bool], last: int, step: int = 1) -> None:
    """Until a try says that there was no such call any more. A check is run twice: at first
    every other call, then those in between."""
    _rounds[one_try.__qualname__] += 1
    killed = 0
    for nth in range(step * (_rounds[one_try.__qualname__] % 2) + 1, last, 2 * step):
        if not one_try(nth):
            break
        killed += 1
    else:
        assert step > 1 or last < CALLS_MAX, f"still killed at call {last}"
    assert killed > 10, f"only {killed} were killed"


def skipped() -> bool:
    why = why_not()
    if why:
        print(f"no system calls are told here: {why}", file=sys.stderr)
    return bool(why)


@places("main")
@beside_nothing
def check_killed_while_it_is_made(place: str) -> None:
    if skipped():
        return
    came: set[str] = set()

    def one_try(nth: int) -> bool:
        with watched((1, 1)) as (template, watch):
            watch.arm(nth, of_template=True)
            came.add(start(template, nth))
            same((nth, start(template, nth + 1)), (nth, "answer"))
            assert template.stats().made <= 2, (nth, template.stats())
        no_child_is_left()
        return bool(watch.killed)

    with watched((0, 0)) as (template, watch):
        template.warm()
        calls = watch.calls[watch.template]
    at_each_call(one_try, calls, max(1, calls // TRIES))
    assert "SpawnError" in came, came


def wait_and_exit(fd: int) -> None:
    os.read(fd, 1)
    sys.exit(7)


@places("main")
@beside_nothing
def check_killed_as_it_serves(place: str) -> None:
    """From before a start until the next standby is ready. Its worker that lives goes on."""
    if skipped():
        return

    def one_try(nth: int) -> bool:
        r, w = os.pipe()
        with (
            watched((1, 1)) as (template, watch),
            template.spawn(wait_and_exit, r, pass_fds=[r]) as worker,
        ):
            worker.wait_ready(LIMIT)
            watch.arm(nth, of_template=True)
            start(template, nth)
            until(lambda: watch.killed or watch.is_quiet(), "a step")
            watch.disarm()
            for value in range(3):  # at first with the standbys that are left
                same((nth, start(template, value)), (nth, "answer"))
            same((nth, template.stats().made), (nth, 2 if watch.killed else 1))
            assert worker.is_alive(), (nth, watch.killed)
            os.write(w, b"x")
            same((nth, worker.wait(LIMIT)), (nth, 7))
        os.close(r)
        os.close(w)
        no_child_is_left()
        return bool(watch.killed)

    at_each_call(one_try, CALLS_MAX)


@places("main")
@beside_nothing
def check_a_standby_killed_at_each_call(place: str) -> None:
    """From its birth to its end; the template is told, and goes on."""
    if skipped():
        return
    came: set[str] = set()
    with watched((0, 0)) as (template, watch):
        same(template.run(abs, 0), 0)

        def one_try(nth: int) -> bool:
            watch.arm(nth, of_template=False)
            came.add(start(template, nth))
            no_child_is_left()
            return bool(watch.killed)

        at_each_call(one_try, CALLS_MAX)
        same(start(template, 1), "answer")
        same(template.stats().made, 1)
    same(came, {"answer", "SpawnError", "WorkerDied"})


@places("main")
@beside_nothing
def check_a_worker_killed_at_each_call(place: str) -> None:
    """One that waited: its status is the kernel's, or that of a result which was told."""
    if skipped():
        return
    codes: set[int] = set()
    with watched((1, 1)) as (template, watch):
        template.warm()

        def one_try(nth: int) -> bool:
            pid = template.stats().pid
            assert pid is not None
            until(lambda: children_of(pid) and watch.is_quiet(), "a standby that waits")
            watch.arm(nth, of_template=False)
            with template.spawn(abs, nth) as child:
                code = child.wait(LIMIT)
            # It may have been its successor, whose calls count as well.
            expected = {0, -signal.SIGKILL} if watch.killed else {0}
            assert code in expected, (nth, code, watch.killed)
            codes.add(code)
            no_child_is_left()
            return True

        at_each_call(one_try, CALLS_OF_A_START)
        same((codes, template.stats().made), ({0, -signal.SIGKILL}, 1))


# ---- a standby that cannot get ready --------------------------------------------------


def refuse() -> None:
    raise LookupError("no reset today")


def register_refusal() -> None:
    anyfork.register_child_reset(refuse)


def hold_the_gil(stop: list[bool]) -> None:
    """So long that whatever the template offers has ended before the owner looks at it."""
    usleep = ctypes.PyDLL(None).usleep
    while not stop:
        usleep(300_000)


@places("main", "isolated")
def check_a_reset_that_raises(place: str) -> None:
    """The start that waits is told, also if it always comes too late for a standby."""
    stop: list[bool] = []
    thread = threading.Thread(target=hold_the_gil, args=(stop,))
    with anyfork.Template(setup=register_refusal) as template:
        for late in (False, True):
            if late:
                thread.start()
            began = time.monotonic()
            exc = raises(anyfork.SpawnError, template.run, abs, 1)
            same(exc.stage, "prelude")
            assert "no reset today" in str(exc), exc
            assert time.monotonic() - began < SOON
        stop.append(True)
        thread.join()


def refuse_and_count(path: str) -> None:
    with open(path, "a") as f:
        f.write("x")
    refuse()


def register_counted(path: str) -> None:
    anyfork.register_child_reset(partial(refuse_and_count, path))


@places("main", "isolated")
def check_a_standby_that_fails_is_made_ever_more_seldom(place: str) -> None:
    with tempfile.NamedTemporaryFile() as file:
        setup = partial(register_counted, file.name)
        with anyfork.Template(setup=setup, standby=(1, 1)):
            time.sleep(2.0)  # at 0, 0.2, 0.6, 1.4 s
            made = os.path.getsize(file.name)
            assert 2 <= made <= 6, made
