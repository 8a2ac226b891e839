"""The WSGI application that the web servers run in a sub-interpreter.

One URL, /SCRIPT/OPERATION?n=NUMBER: it does the operation, with NUMBER as exit
code or argument, and answers with JSON. An exception is an answer as well.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hosted_jobs as jobs
import pexpect

import anyfork
from anyfork import _anyfork

STRICT = "strict"
PATIENCE = 60.0
mp: Any = multiprocessing.get_context("fork")
held: list[anyfork.Child] = []


def wait(pid: int) -> int:
    """The exit code of a child, or the negated signal number; -999 if it hangs."""
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], PATIENCE)[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -999
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_of(process: Any) -> int | None:
    """The exit code of a multiprocessing process. join() alone may return without one:
    it takes ECHILD for "still running" if another thread's start() is just reaping the
    process (multiprocessing/popen_fork.py, poll(); also in a program without anyfork)."""
    end = time.monotonic() + PATIENCE
    while process.exitcode is None and time.monotonic() < end:
        process.join(PATIENCE)
        time.sleep(0.001)
    code: int | None = process.exitcode
    return code


def read_all(fd: int) -> str:
    data = b""
    try:
        while part := os.read(fd, 4096):
            data += part
    except OSError:  # EIO: the terminal's other end is closed
        pass
    finally:
        os.close(fd)
    return data.decode()


# ---- operations ---------------------------------------------------------------------


def info(n: int) -> object:
    return {
        "pid": os.getpid(),
        "in_main": _anyfork.in_main(),
        "version": sys.version.split()[0],
        "methods": {m.name: m.available for m in anyfork.methods()},
        "os_fork": os.fork.__module__,
    }


def fork(n: int) -> object:
    pid = anyfork.fork()
    if pid == 0:
        os._exit(n)
    return wait(pid)


def os_fork(n: int) -> object:
    pid = os.fork()  # install() made it anyfork's
    if pid == 0:
        os._exit(n)
    return wait(pid)


def twins(n: int) -> object:
    """A child that forks, runs a thread and a program, and reports all three."""
    pid = anyfork.fork()
    if pid == 0:
        code = 99
        try:
            inner = anyfork.fork()
            if inner == 0:
                os._exit(n)
            seen: list[int] = []
            thread = threading.Thread(target=seen.append, args=(wait(inner),))
            thread.start()
            thread.join()
            program = subprocess.run(["/bin/sh", "-c", f"exit {seen[0]}"], check=False)
            code = program.returncode
        finally:
            os._exit(code)
    return wait(pid)


def forkpty(n: int) -> object:
    pid, fd = anyfork.forkpty()
    if pid == 0:
        try:
            os.write(1, f"tty={os.isatty(0)}".encode())
        finally:
            os._exit(n)
    text = read_all(fd)
    return [text, wait(pid)]


def expect(n: int) -> object:
    child = pexpect.spawn(
        "/bin/sh", ["-c", f"read word; echo got-$word; exit {n}"], timeout=PATIENCE
    )
    child.delaybeforesend = None
    child.sendline("this")
    child.expect_exact("got-this")
    child.expect(pexpect.EOF)
    child.wait()
    child.close()
    return child.exitstatus


def spawned(method: str) -> Callable[[int], object]:
    def spawn(n: int) -> object:
        with anyfork.spawn(jobs.square, n, method=method) as child:
            return [child.result(PATIENCE), child.returncode]

    return spawn


def closure(n: int) -> object:
    return anyfork.run(lambda: n * n, method="fork")


def raised(method: str) -> Callable[[int], object]:
    def run(n: int) -> object:
        try:
            anyfork.run(jobs.refuse, n, method=method)
        except jobs.Refused as exc:
            return [exc.code, any("hosted_jobs.py" in note for note in exc.__notes__)]
        return "nothing raised"

    return run


def left(method: str) -> Callable[[int], object]:
    def leave(n: int) -> object:
        with anyfork.spawn(jobs.leave, n, method=method) as child:
            return child.wait(PATIENCE)

    return leave


def terminated(method: str) -> Callable[[int], object]:
    def terminate(n: int) -> object:
        with anyfork.spawn(jobs.sleep, 600, method=method) as child:
            child.wait_ready(PATIENCE)
            child.terminate()
            return child.wait(PATIENCE)

    return terminate


def said(method: str) -> Callable[[int], object]:
    def say(n: int) -> object:
        with anyfork.spawn(jobs.say, f"said {method} {n:06d} end", method=method) as child:
            return child.wait(PATIENCE)

    return say


def looped(method: str) -> Callable[[int], object]:
    def loop(n: int) -> object:
        """From inside a running event loop; the worker runs one of its own."""

        async def start() -> object:
            return anyfork.run(jobs.loop_square, n, method=method)

        return asyncio.run(start())

    return loop


def hold(n: int) -> object:
    """A worker that outlives its request, and is left to end with the server."""
    child = anyfork.spawn(jobs.sleep, 600, method=("fork", "subint_fork")[n % 2])
    child.wait_ready(PATIENCE)
    held.append(child)
    return child.is_alive()


def release(n: int) -> object:
    codes = []
    while held:
        child = held.pop()
        child.terminate()
        codes.append(child.wait(PATIENCE))
        child.close()
    return all(code == -signal.SIGTERM for code in codes)


def mp_process(n: int) -> object:
    process = mp.Process(target=jobs.leave, args=(n,))
    process.start()
    code = end_of(process)
    process.close()
    return code


def mp_pool(n: int) -> object:
    pool = mp.Pool(2)
    try:
        return pool.map_async(jobs.square, [n, n + 1, n + 2]).get(PATIENCE)
    finally:
        pool.close()
        pool.join()


def mp_pipe(n: int) -> object:
    ours, theirs = mp.Pipe()
    process = mp.Process(target=jobs.answer, args=(theirs,))
    process.start()
    theirs.close()
    ours.send(n)
    result = ours.recv() if ours.poll(PATIENCE) else None
    ours.close()
    return [result, end_of(process)]


def mp_queue(n: int) -> object:
    queue = mp.Queue()
    process = mp.Process(target=jobs.put, args=(queue, n))
    process.start()
    result = queue.get(timeout=PATIENCE)
    code = end_of(process)
    queue.close()
    queue.join_thread()
    return [result, code]


def mp_terminate(n: int) -> object:
    """Of what CPython's own code starts: with a worker's signal set-up once it runs."""
    r, w = os.pipe()
    try:
        process = mp.Process(target=jobs.tell_and_sleep, args=(w, 600))
        process.start()
        select.select([r], [], [], PATIENCE)
        process.terminate()
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
        return end_of(process)
    finally:
        os.close(r)
        os.close(w)


def mp_with_pool(n: int) -> object:
    with mp.Pool(2) as pool:
        result = pool.map(jobs.square, [n])
    return result


def mp_manager(n: int) -> object:
    """The manager's process calls signal.signal(SIGINT, SIG_IGN) first thing, which
    CPython allows in the main interpreter only."""
    with mp.Manager() as manager:
        return manager.list([n])[0]


def executor(n: int) -> object:
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=mp) as pool:
        return list(pool.map(jobs.square, [n, n + 1]))


def collect(n: int) -> object:
    """multiprocessing's pools and queues hold each other, and their pipes; it forgets
    some ended processes, which have two pipes each, only when it is next asked."""
    mp.active_children()
    gc.collect()
    return os.getpid()


def refused(n: int) -> object:
    """With install(strict=True): the error comes before the fork."""
    children = Path("/proc/thread-self/children").read_text()
    try:
        pid = os.fork()
    except RuntimeError as exc:
        same = Path("/proc/thread-self/children").read_text() == children
        return ["anyfork.fork()" in str(exc), same, fork(n)]
    if pid == 0:
        os._exit(0)
    return wait(pid)


OPERATIONS: dict[str, Callable[[int], object]] = {
    "info": info,
    "fork": fork,
    "os_fork": os_fork,
    "twins": twins,
    "forkpty": forkpty,
    "pexpect": expect,
    "spawn.fork": spawned("fork"),
    "spawn.subint_fork": spawned("subint_fork"),
    "closure": closure,
    "raise.fork": raised("fork"),
    "raise.subint_fork": raised("subint_fork"),
    "exit.fork": left("fork"),
    "exit.subint_fork": left("subint_fork"),
    "terminate.fork": terminated("fork"),
    "terminate.subint_fork": terminated("subint_fork"),
    "say.fork": said("fork"),
    "say.subint_fork": said("subint_fork"),
    "loop.fork": looped("fork"),
    "loop.subint_fork": looped("subint_fork"),
    "hold": hold,
    "release": release,
    "mp.Process": mp_process,
    "mp.Pool": mp_pool,
    "mp.Pipe": mp_pipe,
    "mp.Queue": mp_queue,
    "mp.terminate": mp_terminate,
    "mp.with_pool": mp_with_pool,
    "mp.Manager": mp_manager,
    "executor": executor,
    "collect": collect,
    "refused": refused,
}


def application(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    name = environ["PATH_INFO"].strip("/")
    query = urllib.parse.parse_qs(environ["QUERY_STRING"])
    started = time.monotonic()
    reply: dict[str, object]
    try:
        reply = {"result": OPERATIONS[name](int(query["n"][0]))}
    except Exception:
        reply = {"error": traceback.format_exc()}
    reply["pid"] = os.getpid()
    reply["seconds"] = time.monotonic() - started
    body = json.dumps(reply).encode()
    start_response(
        "200 OK",
        [("Content-Type", "application/json"), ("Content-Length", str(len(body)))],
    )
    return [body]
