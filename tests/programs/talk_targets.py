"""What workers are asked to do in the tests of talking workers."""

from __future__ import annotations

import contextvars
import ctypes
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import anyfork

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id")


def echo(value: Any) -> Any:
    return value


def add(a: int, b: int) -> int:
    return a + b


def add_one(n: int) -> int:
    return n + 1


def fail(text: str) -> None:
    raise ValueError(text)


def fail_in_a_group() -> None:
    raise ExceptionGroup("two", [ValueError("one"), ExceptionGroup("in", [KeyError("two")])])


def die(sig: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), sig)
    time.sleep(60)


def crash() -> None:
    ctypes.string_at(0)


def leave(code: int) -> None:
    sys.exit(code)


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def block(what: str) -> None:
    """For ever, in a system call that the kernel would restart after a signal."""
    if what == "read":
        os.read(os.pipe()[0], 1)
    elif what == "program":
        subprocess.run(["sleep", "60"])
    elif what == "socket":
        ours, _theirs = socket.socketpair()
        ours.recv(1)
    elif what == "lock":
        lock = threading.Lock()
        while lock.acquire():
            pass
    elif what == "queue":
        queue.Queue[None]().get()


def spin() -> None:
    while True:
        pass


def hold_gil() -> None:
    """Computes in C: no other Python runs meanwhile."""
    sum(range(10**12))


def deaf(path: str) -> None:
    """Does not let itself be cancelled."""
    while True:
        try:
            open(path, "a").close()
            time.sleep(60)
        except anyfork.Cancelled:
            pass


def tidy(path: str) -> None:
    """Cleans up when it is cancelled."""
    try:
        time.sleep(60)
    except anyfork.Cancelled:
        with open(path, "w") as file:
            file.write("tidy")
        raise


def unpicklable() -> object:
    return threading.Lock()


def interrupt() -> None:
    raise KeyboardInterrupt


def carried() -> str | None:
    return request_id.get(None)


def log(text: str) -> None:
    logging.getLogger("talk").debug("not %s", text)
    logging.getLogger("talk").warning("said %s", text)


def progress(n: int) -> int:
    for i in range(n):
        anyfork.report_progress((i, n))
    return n


def write_descriptor(descriptor: anyfork.Descriptor, data: bytes) -> bool:
    os.write(descriptor.fileno(), data)
    return os.get_inheritable(descriptor.fileno())


def open_pipe(data: bytes) -> anyfork.Descriptor:
    r, w = os.pipe()
    os.write(w, data)
    os.close(w)
    return anyfork.Descriptor(os.fdopen(r, "rb"))


def pid() -> int:
    return os.getpid()


def total(array: Any) -> tuple[Any, bool]:
    return array.sum(), array.flags.writeable


class Blob:
    """Bytes that are sent out of band."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return Blob, (pickle.PickleBuffer(self.data),)


def look_at(blob: Blob) -> tuple[str, bool, int]:
    view = memoryview(blob.data)
    return type(blob.data).__name__, view.readonly, view.nbytes


def ones(n: int) -> Any:
    import numpy

    return [numpy.full(n, i, dtype="u1") for i in range(3)]


def grow(n: int) -> int:
    globals()["_held"] = b"x" * n
    return os.getpid()


def use_up(cgroup: str, n: int) -> int:
    """So much memory, in a cgroup that has less."""
    with open(f"{cgroup}/cgroup.procs", "w") as file:
        file.write("0")
    return len(b"x" * n)


def with_child_that_holds(path: str) -> None:
    """Dies, and leaves a process that has all its descriptors."""
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    with open(path, "w") as file:
        file.write(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


def nested(n: int) -> list[int]:
    import anyfork.sync

    with anyfork.sync.open_pool(2) as pool:
        return list(pool.map(echo, range(n)))


def say_and_die(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    os._exit(7)


def mark(path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")


def live_briefly_if_second(path: str) -> None:
    """An initializer: the second worker that calls it is killed when it has been ready for
    some time."""
    mark(path)
    with open(path) as file:
        if len(file.readlines()) == 2:
            signal.setitimer(signal.ITIMER_REAL, 0.1)


def run_program() -> str:
    return subprocess.check_output(["echo", "program"], text=True)


def die_at_7(n: int) -> int:
    if n % 10 == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def fail_at_7(n: int) -> int:
    if n == 7:
        raise ValueError("seven")
    return n


def interrupt_at_7(n: int) -> int:
    if n % 10 == 7:
        raise KeyboardInterrupt
    return n


# ---- coroutine functions --------------------------------------------------------------


async def async_add(a: int, b: int) -> tuple[str | None, int]:
    import anyio

    from anyfork._aio import running_loop

    await anyio.sleep(0.001)
    return running_loop(), a + b


async def async_sleep(seconds: float) -> None:
    import anyio

    await anyio.sleep(seconds)


async def async_fail(text: str) -> None:
    raise ValueError(text)


# ---- streams ---------------------------------------------------------------------------


def double(stream: Any, n: int) -> int:
    for item in stream:
        stream.send(2 * item)
    return n


async def async_double(stream: Any, n: int) -> int:
    async for item in stream:
        await stream.send(2 * item)
    return n


def count(stream: Any) -> None:
    n = 0
    while True:
        stream.send(n)
        n += 1


async def async_count(stream: Any) -> None:
    n = 0
    while True:
        await stream.send(n)
        n += 1


def send_and_fail(stream: Any, items: int) -> None:
    for n in range(items):
        stream.send(n)
    raise ValueError("after its items")


def fail_at_once(stream: Any, text: str) -> None:
    raise ValueError(text)


def send_and_die(stream: Any) -> None:
    stream.send("last words")
    os.kill(os.getpid(), signal.SIGKILL)


def sum_up(stream: Any) -> int:
    return sum(stream)


def large_items(stream: Any, n: int, size: int) -> None:
    for _ in range(n):
        stream.send(b"x" * size)
        stream.receive()


# ---- what should not be done ----------------------------------------------------------


class ExitsWhenLoaded:
    """Its unpickling asks the program to end."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (9,)


class ExitsWhenDumped:
    def __reduce__(self) -> tuple[Any, ...]:
        sys.exit(9)


def make(name: str) -> Any:
    return globals()[name]()


def leave_a_thread(seconds: float) -> None:
    """It goes on reporting after the call, in a copy of its context."""
    context = contextvars.copy_context()
    end = time.monotonic() + seconds

    def report() -> None:
        while time.monotonic() < end:
            context.run(anyfork.report_progress, "late")
            time.sleep(0.001)

    threading.Thread(target=report, daemon=True).start()
# ---- deaths at random ------------------------------------------------------------------

_journal = -1


def keep_journal(path: str) -> None:
    """Initializer: what this worker begins and ends is written down there."""
    global _journal
    _journal = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(n: int, what: str) -> None:
    os.write(_journal, f"{what} {n} {os.getpid()}\n".encode())


def risk(call: tuple[int, int, float]) -> tuple[int, int]:
    """Perhaps its end: by so many seconds, by a signal (negative) or a status."""
    n, how, delay = call
    note(n, "begun")
    if how:
        end = time.perf_counter() + delay
        while time.perf_counter() < end:
            pass
        if how > 0:
            os._exit(how)
        os.kill(os.getpid(), -how)
        time.sleep(60)
    note(n, "done")
    return n, os.getpid()
