"""One owner and its workers: the owner dies, and none of them may outlive it.

usage: attack_lifeline.py METHOD PLACE WORKER DEATH [MICROSECONDS]
The workers' pids go to stdout; what ends the owner is told by DEATH. Exits with
an error of Python only if the attack itself went wrong.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

slow_sibling = False


def in_every_child() -> None:
    """Runs before anyfork's own, between fork(2) and Python's hooks."""
    if slow_sibling:
        ctypes.PyDLL(None).usleep(2_000_000)


# A pthread_atfork() that ctypes can reach; libraries' handlers run as registered.
as_handler = ctypes.CFUNCTYPE(None)(in_every_child)
if "slow-sibling" in sys.argv:
    ctypes.CDLL(None).__register_atfork(None, None, as_handler, None)

import anyfork  # noqa: E402

PATIENCE = 120  # a worker that nobody ends, ends itself: with a status that tells


def say() -> None:
    os.write(1, b"%d\n" % os.getpid())


def worker(kind: str) -> None:
    libc = ctypes.CDLL(None)
    end = time.monotonic() + PATIENCE
    match kind:
        case "busy":
            say()
            while time.monotonic() < end:
                pass
        case "sleep":  # one C call, with the GIL released
            say()
            libc.sleep(PATIENCE)
        case "held":  # one C call that keeps the GIL
            say()
            ctypes.PyDLL(None).sleep(PATIENCE)
        case "hash":
            say()
            hashlib.pbkdf2_hmac("sha512", b"x", b"y", 50_000_000)
        case "setsid":
            os.setsid()
            say()
            time.sleep(PATIENCE)
        case "user":  # it was root, as its owner is
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            say()
            time.sleep(PATIENCE)
        case "blocks":  # every signal that can be
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            say()
            time.sleep(PATIENCE)
        case "stopped":
            say()
            os.kill(os.getpid(), signal.SIGSTOP)
        case "closed":
            say()
            os.closerange(0, 4096)
            time.sleep(PATIENCE)
        case "nested":
            child = anyfork.spawn(worker, "busy", method="fork")
            grand = anyfork.spawn(worker, "nested2", method="fork")
            say()
            child.wait()
            grand.wait()
        case "nested2":
            child = anyfork.spawn(worker, "closed", method="fork")
            say()
            child.wait()


def wait_until_closed(pid: int) -> None:
    end = time.monotonic() + 60
    while os.listdir(f"/proc/{pid}/fd") and time.monotonic() < end:
        time.sleep(0.001)


def wait_for_workers(children: list[anyfork.Child], kind: str) -> None:
    for child in children:
        child.wait_ready(60)
        # Not while it closes them: see "What it does not cover" in docs/internals.md.
        if kind == "closed":
            wait_until_closed(child.pid)


def own(method: str, kind: str, death: str, microseconds: int) -> None:
    children: list[anyfork.Child] = []

    def start(n: int) -> None:
        children.extend(anyfork.spawn(worker, kind, method=method) for _ in range(n))

    if death == "thread":  # the thread that started them has long gone
        thread = threading.Thread(target=start, args=(2,))
        thread.start()
        thread.join()
        death = "kill"
    elif death == "sibling":  # an unrelated child of the owner lives on for a while
        start(1)
        pid = anyfork.fork()
        if pid == 0:
            time.sleep(3)
            os._exit(0)
        start(1)
        death = "kill"
    elif death in ("os.fork", "subprocess"):
        start(1)
        if death == "subprocess":
            subprocess.Popen(["sleep", "3"])
        elif os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        start(1)
        death = "kill"
    elif death == "slow-sibling":
        # It has not even closed its copies of our descriptors when we die, and
        # the worker has closed its own.
        global slow_sibling
        start(1)
        wait_until_closed(children[0].pid)
        slow_sibling = True
        if anyfork.fork() == 0:
            os._exit(0)
        death = "kill"
    elif death == "random":
        start(1)
        end = time.perf_counter_ns() + 1000 * microseconds
        while time.perf_counter_ns() < end:
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        start(3)
    wait_for_workers(children, kind)
    match death:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "_exit":
            os._exit(0)
        case "segfault":
            ctypes.string_at(0)
        case "terminate":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        case "exec":
            os.execv("/bin/true", ["true"])
        case "exit":
            sys.exit(0)
    time.sleep(60)


IN_A_SUBINTERPRETER = """
import sys
sys.path[:] = {path!r}
import attack_lifeline
attack_lifeline.own({method!r}, {kind!r}, {death!r}, {microseconds!r})
"""


def main() -> None:
    method, place, kind, death = sys.argv[1:5]
    microseconds = int(sys.argv[5]) if len(sys.argv) > 5 else 0
    sys.modules["attack_lifeline"] = sys.modules["__main__"]
    if place == "main":
        own(method, kind, death, microseconds)
        return
    import _interpreters

    interpreter = _interpreters.create(place)
    failure = _interpreters.exec(
        interpreter,
        IN_A_SUBINTERPRETER.format(
            path=sys.path, method=method, kind=kind, death=death, microseconds=microseconds
        ),
    )
    if failure is not None:
        print(failure.formatted, file=sys.stderr)
        os._exit(1)


if __name__ == "__main__":
    main()
