"""Make every system call and allocation of one operation fail, in turn.

usage: fault_loop.py main|legacy|isolated OPERATION once|for-good warm|cold

OPERATION: fork(), forkpty(), a spawn method (start, result, close), or one with
"+options": with pipes, a file, descriptors and the guard. In `cold` each
try runs in a forked child, where no helper thread and no launch pad exist yet.
All of it with EMFILE, ENOMEM and EAGAIN.
Each try must give the right result, or an error that names a stage and the errno,
and leave nothing behind. Prints a JSON object: what was hit, how often, and what
came of it. Needs a build with -Dfaults=true.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

import subint

import anyfork
from anyfork import _anyfork, _errors

POINTS_MAX = 100
ERRNOS = (errno.EMFILE, errno.ENOMEM, errno.EAGAIN)
ANSWER = "x" * 200_000  # more than a pipe holds
SHORT_ANSWER = "x" * 20_000  # less

# The stages that a failure of each call may be told as.
STAGES = {
    "pipe2": {"pipe"},
    "fcntl(F_DUPFD_CLOEXEC)": {"pipe"},
    "calloc(child)": {"memory"},
    "calloc(chunk)": {"memory"},
    "calloc(start)": {"memory"},
    "calloc(pad)": {"memory"},
    "calloc(request)": {"memory"},
    "calloc(host)": {"memory"},
    "calloc(fds)": {"memory"},
    "calloc(candidates)": {"memory"},
    "calloc(environ)": {"memory"},
    "calloc(cpus)": {"memory"},
    "calloc(argv)": {"memory"},
    "malloc(setup)": {"memory"},
    "malloc(copy)": {"memory"},
    "malloc(targets)": {"memory"},
    "malloc(environment)": {"memory"},
    "pread": {"template"},
    "recvmsg": {"pipe"},
    "memfd_create": {"handshake"},
    "sendmsg": {"handshake"},
    "openat": {"option"},
    "malloc(path)": {"memory"},
    "mmap": {"fork"},
    "clone": {"fork"},
    "malloc(pickle)": {"memory"},
    "PyThreadState_New": {"memory"},
    "pthread_create": {"thread"},
    "openpty": {"pty"},
    "fork": {"fork"},
    "pidfd_open": {"pidfd"},
    "socketpair": {"pipe"},
    "write": {"handshake"},
    "send": {"handshake"},
    "read": {"read"},
    "waitid": {"wait"},
    "pidfd_send_signal": {"signal"},
    "ioctl(PIDFD_GET_INFO)": {"wait"},
}
# A passing fault that is asked again, or whose answer comes from elsewhere; a
# spare helper thread that is started ahead.
# A message that cannot be received or sent may be that of a template which has gone: it is
# made again.
# With options, also what the guard is told at a worker's end, which it sees by itself.
OPTIONS = "+options"
OPTION_STAGES = {"lifeline", "option"}
BENIGN = {
    "waitid",
    "pidfd_send_signal",
    "ioctl(PIDFD_GET_INFO)",
    "read",
    "pthread_create",
    "recvmsg",
    "sendmsg",
}


def _reap(pid: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with {status}"


def do_fork() -> None:
    pid = anyfork.fork()
    if pid == 0:
        os._exit(0)
    _reap(pid)


def do_forkpty() -> None:
    pid, master = anyfork.forkpty()
    if pid == 0:
        os._exit(0 if os.isatty(0) else 1)
    _reap(pid)  # first: a terminal without a master end is nobody's
    os.close(master)


def do_spawn(method: str, answer: str) -> None:
    # A callable that main finds too, should it have to be pickled.
    with anyfork.spawn(str.upper, answer.lower(), method=method) as child:
        assert child.result() == answer.upper()


def do_spawn_with_options(method: str) -> None:
    answer = SHORT_ANSWER
    with anyfork.spawn(
        str.upper,
        answer.lower(),
        method=method,
        stdin=subprocess.PIPE,
        stdout=os.devnull,
        cpus=os.sched_getaffinity(0),
        fds={50: 1},
        guard=True,
    ) as child:
        assert child.stdin is not None
        assert child.result() == answer.upper()


def is_guard_socket(fd: int) -> bool:
    """There is one, which stays, once the guard is up."""
    try:
        looked_at = socket.socket(fileno=fd)
    except OSError:
        return False
    kind = looked_at.type
    looked_at.detach()
    return kind == socket.SOCK_SEQPACKET


def snapshot() -> dict[str, object]:
    runtime = _anyfork.runtime()
    return {
        # Not their numbers: a template that is made again has others.
        "fds": sum(not is_guard_socket(int(fd)) for fd in os.listdir("/proc/self/fd")),
        "interpreters": runtime["interpreters"],
        "pad": runtime["pad"],
        "main_thread_states": runtime["main_thread_states"],
        "own_thread_states": runtime["own_thread_states"],
    }


def left_behind(before: dict[str, object]) -> dict[str, object]:
    gc.collect()  # the frames of an earlier failure hold what they held
    deadline = time.monotonic() + 20
    while (changed := changes(before, snapshot())) and time.monotonic() < deadline:
        time.sleep(0.005)
    return changed


def changes(before: dict[str, object], after: dict[str, object]) -> dict[str, object]:
    changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    # The launch pad came up, and stays: with its interpreter, or on its way there.
    one_more = after["interpreters"] == before["interpreters"] + 1  # type: ignore[operator]
    if changed.pop("pad", None) == (False, True) and one_more:
        del changed["interpreters"]
    return changed


def children_left(may_be_zombie: bool) -> str:
    """What is left, reaped; a zombie is all right where waitid(2) never works."""
    found = ""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return "a running child is left"
        if not may_be_zombie:
            found = f"zombie {pid} is left"


def judge(
    exc: BaseException | None, call: str | None, hits: int, errnum: int, good: bool, options: bool
) -> str:
    """Why this outcome is wrong; empty if it is right."""
    if exc is None:
        if hits and not good and call not in (BENIGN | {"send"} if options else BENIGN):
            return f"{call} failed and nobody noticed"
        return ""
    if not hits:
        return f"failed without a fault: {exc!r}"
    # EAGAIN of a read says that there is nothing to read: "it sent nothing".
    silent = isinstance(exc, anyfork.WorkerDied) or getattr(exc, "stage", "") == "child"
    if silent and errnum == errno.EAGAIN:
        return ""
    if not isinstance(exc, anyfork.SpawnError) or isinstance(exc, anyfork.MethodUnavailable):
        return f"not a SpawnError: {exc!r}"
    wanted = errno.ENOMEM if exc.stage == "memory" else errnum
    if exc.errno != wanted:
        return f"errno {exc.errno} instead of {wanted}: {exc!r}"
    if exc.stage not in OPTION_STAGES.union(*STAGES.values()):
        return f"stage {exc.stage!r} is none of a system call: {exc!r}"
    # The kernel's ENOMEM is told as memory too.
    stages = STAGES.get(call or "", set()) | ({"memory"} if errnum == errno.ENOMEM else set())
    if options:  # the guard's, and of what the options name
        stages = stages | OPTION_STAGES
    if not good and exc.stage not in stages:
        return f"{call} was told as stage {exc.stage!r}: {exc!r}"
    makes_fds = exc.stage in {"pipe", "pty", "pidfd", "option", "lifeline"}
    if makes_fds and wanted == errno.EMFILE and "RLIMIT_NOFILE" not in str(exc):
        return f"the limit is not named: {exc}"
    return ""


def one_try(operation: str, nth: int, errnum: int, good: bool) -> dict[str, Any]:
    before = snapshot()
    failure: BaseException | None = None
    _anyfork._fault_arm(nth, errnum, good)
    try:
        if operation == "fork()":
            do_fork()
        elif operation == "forkpty()":
            do_forkpty()
        elif operation.endswith(OPTIONS):
            do_spawn_with_options(operation.removesuffix(OPTIONS))
        else:
            # A read that says "nothing there" for ever: the worker must not wait for it.
            endless = good and errnum == errno.EAGAIN
            do_spawn(operation, SHORT_ANSWER if endless else ANSWER)
    except Exception as exc:
        failure = exc
    hits, _points, call = _anyfork._fault_report()
    _anyfork._fault_arm(0, 0, False)
    bad = judge(failure, call, hits, errnum, good, operation.endswith(OPTIONS))
    left = children_left(good and hits > 0)
    bad = bad or left
    changed = left_behind(before)
    if changed and not bad:
        bad = f"left behind: {changed}"
    return {
        "hits": hits,
        "call": call,
        "came": "result" if failure is None else str(getattr(failure, "stage", "died")),
        "bad": bad,
    }


def try_in_child(operation: str, nth: int, errnum: int, good: bool) -> dict[str, Any]:
    """one_try() where nothing is warm."""
    reading, writing = os.pipe()
    pid = anyfork.fork()
    if pid == 0:
        code = 1
        try:
            outcome = one_try(operation, nth, errnum, good)
            os.write(writing, json.dumps(outcome).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        data = file.read()
    _reap(pid)
    outcome = json.loads(data)
    assert isinstance(outcome, dict)
    return outcome


def loop(operation: str, how: str, warmth: str) -> dict[str, Any]:
    # What every start needs once: imports, the lists of hooks, /proc's opinion.
    if warmth == "warm":
        for _ in range(2):
            one_try(operation, 0, 0, False)
    _errors._descriptor_limit()
    total: dict[str, Any] = {"hits": 0, "points": 0, "seen": {}, "bad": []}
    for errnum in ERRNOS:
        one_loop(operation, errnum, how == "for-good", warmth, total)
    return total


def one_loop(operation: str, errnum: int, good: bool, warmth: str, total: dict[str, Any]) -> None:
    name = errno.errorcode[errnum]
    run = one_try if warmth == "warm" else try_in_child
    for nth in range(1, POINTS_MAX):
        outcome = run(operation, nth, errnum, good)
        total["hits"] += outcome["hits"]
        if outcome["bad"]:
            total["bad"].append(f"{name} at point {nth} ({outcome['call']}): {outcome['bad']}")
        if not outcome["hits"]:
            return
        total["points"] += 1
        key = f"{outcome['call']} -> {outcome['came']}"
        total["seen"][key] = total["seen"].get(key, 0) + 1
    total["bad"].append(f"{name}: still failing after {POINTS_MAX} points")


def main() -> None:
    place, *arguments = sys.argv[1:]
    if not _anyfork.FAULTS:
        sys.exit("fault_loop.py: built without -Dfaults=true")
    if place == "main":
        print(json.dumps(loop(*arguments)))
        return
    with subint.interpreter(place) as made:
        made.run(
            "import json, fault_loop\n"
            f"print(json.dumps(fault_loop.loop(*{arguments!r})), flush=True)"
        )


if __name__ == "__main__":
    main()
