"""The guard: it ends workers where the kernel does not, and nobody else."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from attack_common import LIMIT, is_gone, places, raises, same, until
from attack_options import processes, sleep_for_ever

import anyfork

SYS_CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine())


def foreign_child() -> int:
    """A child by the bare system call: no fork handler runs, so that it holds the write
    ends of all lifelines, as what a library made with clone(2) does."""
    assert SYS_CLONE is not None
    libc = ctypes.CDLL(None)
    pid: int = libc.syscall(SYS_CLONE, int(signal.SIGCHLD), 0, 0, 0, 0)
    if pid == 0:
        while True:
            libc.poll(None, 0, 1000)
    return pid


def guards(owner: int | None) -> list[int]:
    """Of that process: they hold its pidfd as their descriptor 4."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{entry}/comm") as f:
                ours = f.read() == "anyfork-guard\n"
            with open(f"/proc/{entry}/fdinfo/4") as f:
                if ours and f"Pid:\t{owner}\n" in f.read() and not is_gone(int(entry)):
                    found.append(int(entry))
    return found


Owner = Callable[..., None]


@contextlib.contextmanager
def owned(owner: Owner, *args: object) -> Iterator[tuple[anyfork.Child, list[int]]]:
    """An owner in a process of its own, and the pids that it tells."""
    r, w = os.pipe()
    with anyfork.spawn(owner, w, *args, method="exec", pass_fds=[w]) as child:
        os.close(w)
        assert select.select([r], [], [], LIMIT)[0], "the owner hangs"
        text = os.read(r, 1000)
        assert text, child.exception(LIMIT)
        pids = [int(word) for word in text.split()]
        try:
            yield child, pids
        finally:
            os.close(r)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def tell(pipe: int, *pids: int | None) -> None:
    os.write(pipe, " ".join(map(str, pids)).encode())


def own_beside_a_foreign_child(pipe: int, method: str, guard: bool) -> None:
    with anyfork.spawn(sleep_for_ever, method=method, guard=guard) as worker:
        worker.wait_ready(LIMIT)
        tell(pipe, worker.pid, foreign_child())
        sleep_for_ever()


@places("main")
def check_a_foreign_child_holds_the_lifeline(place: str) -> None:
    """What the kernel's lifeline cannot do, and the guard does."""
    if SYS_CLONE is None:
        return
    for method in processes():
        with owned(own_beside_a_foreign_child, method, False) as (owner, (worker, _foreign)):
            owner.kill()
            owner.wait(LIMIT)
            time.sleep(0.1)
            same((method, is_gone(worker)), (method, False))
        for _round in range(5):
            with owned(own_beside_a_foreign_child, method, True) as (owner, (worker, _foreign)):
                owner.kill()
                until(lambda pid=worker: is_gone(pid), f"the end of a worker by {method}")


def own_several(pipe: int) -> None:
    """Several at once, by all methods, one of them let go."""
    workers = [anyfork.spawn(sleep_for_ever, method=m, guard=True) for m in processes() * 3]
    for worker in workers:
        worker.wait_ready(LIMIT)
    workers[0].detach()
    tell(pipe, *(worker.pid for worker in workers), foreign_child())
    sleep_for_ever()


@places("main")
def check_one_guard_for_all(place: str) -> None:
    if SYS_CLONE is None:
        return
    with owned(own_several) as (owner, pids):
        (guard,) = guards(owner.pid)
        detached, *workers, _foreign = pids
        owner.kill()
        for pid in workers:
            until(lambda pid=pid: is_gone(pid), "the end of a worker")
        same(is_gone(detached), False)
        until(lambda: is_gone(guard), "the end of the guard")


def own_and_execute(pipe: int) -> None:
    worker = anyfork.spawn(sleep_for_ever, method="fork", guard=True)
    worker.wait_ready(LIMIT)
    tell(pipe, worker.pid)
    os.execv("/bin/sleep", ["sleep", "100"])


@places("main")
def check_an_owner_that_becomes_another_program(place: str) -> None:
    with owned(own_and_execute) as (_owner, (worker,)):
        until(lambda: is_gone(worker), "the end of the worker")


def own_without_its_guard(pipe: int) -> None:
    first = anyfork.spawn(sleep_for_ever, method="fork", guard=True)
    (guard,) = guards(os.getpid())
    os.kill(guard, signal.SIGKILL)
    until(lambda: is_gone(guard), "the end of the first guard")
    second = anyfork.spawn(sleep_for_ever, method="fork", guard=True)
    second.wait_ready(LIMIT)
    same(len(guards(os.getpid())), 1)
    tell(pipe, first.pid, second.pid, foreign_child())
    sleep_for_ever()


@places("main")
def check_a_guard_that_was_killed_is_replaced(place: str) -> None:
    if SYS_CLONE is None:
        return
    with owned(own_without_its_guard) as (owner, (_first, second, _foreign)):
        owner.kill()
        until(lambda: is_gone(second), "the end of the worker")


def check_it_is_no_child(place: str) -> None:
    """A host that waits for all of its children does not wait for the guard; nor does the
    guard hold on to anything of its owner's."""
    with anyfork.spawn(sleep_for_ever, method="exec", guard=True) as worker:
        worker.wait_ready(LIMIT)
        assert worker.pid is not None
        worker.kill()
        worker.wait(LIMIT)
        raises(ChildProcessError, os.waitpid, -1, os.WNOHANG)
        (guard,) = guards(os.getpid())
        only = {str(fd) for fd in range(6)}  # 5 is epoll's
        until(lambda: set(os.listdir(f"/proc/{guard}/fd")) == only, "it to forget the worker")
        links = {os.readlink(f"/proc/{guard}/fd/{fd}") for fd in ("0", "1", "2")}
        same(links, {"/dev/null"})
        same(os.readlink(f"/proc/{guard}/cwd"), "/")
        assert os.getsid(guard) != os.getsid(0)


check_it_is_no_child.keeps_descriptors = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def cgroup() -> Iterator[str | None]:
    """A cgroup v2 of our own, where this machine allows one."""
    with open("/proc/mounts") as f:
        mounts = [line.split()[1] for line in f if line.split()[2] == "cgroup2"]
    folder = None
    for mount in mounts:
        path = os.path.join(mount, f"anyfork-test-{os.getpid()}")
        with contextlib.suppress(OSError):
            os.mkdir(path)
            folder = path
            break
    try:
        yield folder
    finally:
        if folder is not None:
            with contextlib.suppress(OSError), open(f"{folder}/cgroup.kill", "w") as f:
                f.write("1")
            for _ in range(200):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
                    break
                time.sleep(0.02)


def my_cgroup() -> str:
    with open("/proc/self/cgroup") as f:
        (line,) = (line for line in f if line.startswith("0::"))
    return line[3:].strip()


def check_cgroup(place: str) -> None:
    with cgroup() as folder:
        if folder is None:
            print("no cgroup v2 can be made here", file=sys.stderr)
            return
        for method in processes():
            got = anyfork.run(my_cgroup, method=method, cgroup=folder)
            same((method, os.path.basename(got)), (method, os.path.basename(folder)))


def with_a_child_of_its_own() -> None:
    os.posix_spawn("/bin/sleep", ["sleep", "1000"], os.environ, setsid=True)
    sleep_for_ever()


def children_of(pid: int | None) -> list[int]:
    """Of all its threads."""
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as f:
            found += [int(word) for word in f.read().split()]
    return found


def own_a_cgroup(pipe: int, method: str, folder: str) -> None:
    options: dict[str, Any] = {"cgroup": folder, "scope": "cgroup"}
    worker = anyfork.spawn(with_a_child_of_its_own, method=method, **options)
    worker.wait_ready(LIMIT)
    until(lambda: bool(children_of(worker.pid)), "the worker's child")
    tell(pipe, worker.pid, *children_of(worker.pid))
    sleep_for_ever()


@places("main")
def check_scope_cgroup(place: str) -> None:
    """All that the worker has started goes, in sessions of their own too."""
    with cgroup() as folder:
        if folder is None or not os.path.exists(f"{folder}/cgroup.kill"):
            print("no cgroup v2 that can be killed here", file=sys.stderr)
            return
        for method in processes():
            with owned(own_a_cgroup, method, folder) as (owner, (worker, child)):
                owner.kill()
                for pid in (worker, child):
                    until(lambda pid=pid: is_gone(pid), f"the end of {method}'s")


def check_bad_values(place: str) -> None:
    for options, named in (
        ({"guard": 1}, "guard"),
        ({"guard": True, "lifeline": False}, "lifeline"),
        ({"scope": "cgroup"}, "lifeline_scope"),
    ):
        exc = raises(
            (TypeError, ValueError), lambda o=options: anyfork.spawn(int, method="exec", **o)
        )
        assert named in str(exc), exc
