"""The guard: it ends workers where the kernel does not, and nobody else."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from attack_common import LIMIT, is_gone, places, raises, same, until
from attack_options import processes, readable_by_all, sleep_for_ever

import anyfork

CLONE_VM, CLONE_VFORK = 0x100, 0x4000
ROOT = os.geteuid() == 0
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


def hanging_vfork() -> None:
    """A child that shares this memory and never executes anything: as foreign_child()."""
    libc = ctypes.CDLL(None)
    stack = ctypes.create_string_buffer(65536)
    top = (ctypes.addressof(stack) + 65536) & ~15
    flags = CLONE_VM | CLONE_VFORK | signal.SIGCHLD
    libc.clone(libc.pause, ctypes.c_void_p(top), flags, None)


def own_beside_a_hanging_vfork(pipe: int, method: str) -> None:
    with anyfork.spawn(sleep_for_ever, method=method, guard=True) as worker:
        worker.wait_ready(LIMIT)
        threading.Thread(target=hanging_vfork, daemon=True).start()
        # One by a template is no child of ours.
        until(lambda: {*children_of(os.getpid())} - {worker.pid}, "the other child")
        others = {*children_of(os.getpid())} - {worker.pid}
        tell(pipe, worker.pid, *others)
        sleep_for_ever()


@places("main")
def check_a_vfork_hangs(place: str) -> None:
    for method in processes():
        with owned(own_beside_a_hanging_vfork, method) as (owner, (worker, _other)):
            owner.kill()
            until(lambda pid=worker: is_gone(pid), f"the end of a worker by {method}")


# ---- namespaces -------------------------------------------------------------------------


def can_unshare(flags: int) -> bool:
    """In a child: it would be for good."""
    pid = os.fork()
    if pid == 0:
        try:
            os.unshare(flags)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def innermost_pid(process: int | str | None) -> int:
    """Its number in the pid namespace that it is in."""
    with open(f"/proc/{process}/status") as f:
        (line,) = (line for line in f if line.startswith("NSpid:"))
    return int(line.split()[-1])


def own_an_init(pipe: int, method: str, guard: bool, sig: int) -> None:
    if guard:
        anyfork.spawn(int, method=method, guard=True).close()
    os.unshare(os.CLONE_NEWPID)
    try:
        worker = anyfork.spawn(sleep_for_ever, method=method, lifeline=sig)
    except anyfork.SpawnError as exc:
        same((guard, exc.stage, exc.errno), (False, "lifeline", errno.EPERM))
        with anyfork.spawn(sleep_for_ever, method=method, lifeline=False) as worker:
            tell(pipe, worker.pid)
            return
    worker.wait_ready(LIMIT)
    same(innermost_pid(worker.pid), 1)
    tell(pipe, worker.pid)
    sleep_for_ever()


@places("main")
def check_a_worker_is_init_of_a_pid_namespace(place: str) -> None:
    """The kernel keeps all signals from inside from it, and the lifeline's too."""
    if not can_unshare(os.CLONE_NEWPID):
        print("no pid namespace can be made here", file=sys.stderr)
        return
    for method in ("exec", "fork"):  # by the others another thread starts it
        for sig in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            with owned(own_an_init, method, True, int(sig)) as (owner, (worker,)):
                owner.kill()
                until(lambda pid=worker: is_gone(pid), f"the end of a worker by {method}")
        with owned(own_an_init, method, False, int(signal.SIGKILL)) as (owner, (worker,)):
            same((method, owner.exception(LIMIT)), (method, None))


def nice_here() -> tuple[int, list[int]]:
    return os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0))


def be_nice_elsewhere() -> list[tuple[int, list[int]]]:
    """Where /proc has other numbers for processes than they have."""
    keep = anyfork.spawn(sleep_for_ever, method="exec", guard=True)
    os.unshare(os.CLONE_NEWPID)
    init = anyfork.spawn(sleep_for_ever, method="exec")
    cpus = [min(os.sched_getaffinity(0))]
    try:
        return [anyfork.run(nice_here, method=m, nice=2, cpus=cpus) for m in ("fork", "exec")]
    finally:
        init.close()
        keep.close()


@places("main")
def check_numbers_in_a_new_pid_namespace(place: str) -> None:
    if not can_unshare(os.CLONE_NEWPID):
        print("no pid namespace can be made here", file=sys.stderr)
        return
    wanted = (min(os.getpriority(os.PRIO_PROCESS, 0) + 2, 19), [min(os.sched_getaffinity(0))])
    same(anyfork.run(be_nice_elsewhere, method="exec"), [wanted, wanted])


def raise_the_limit_later() -> tuple[int, int]:
    """The guard was started while fewer descriptors were allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, hard))
    workers = [anyfork.spawn(sleep_for_ever, method="fork", guard=True)]
    before = guards(os.getpid())
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    workers += [anyfork.spawn(sleep_for_ever, method="fork", guard=True) for _ in range(30)]
    for worker in workers:
        worker.wait_ready(LIMIT)
    held = len(os.listdir(f"/proc/{before[0]}/fd")) if guards(os.getpid()) == before else 0
    for worker in workers:
        worker.close()
    return held, len(workers)


@places("main")
def check_a_guard_from_before_a_limit_was_raised(place: str) -> None:
    held, workers = anyfork.run(raise_the_limit_later, method="exec")
    assert held >= workers, (held, workers)


def own_as_init(pipe: int, method: str) -> None:
    worker = anyfork.spawn(sleep_for_ever, method=method)
    worker.wait_ready(LIMIT)
    same((os.getpid(), innermost_pid("self")), (1, 1))
    os.write(pipe, b"up")
    sleep_for_ever()


def start_an_init(pipe: int, method: str) -> None:
    """Its child is the owner, process 1 of a namespace; it tells that one's pid and the
    worker's, as they are out here."""
    os.unshare(os.CLONE_NEWPID)
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        own_as_init(w, method)
        os._exit(1)
    os.close(w)
    assert os.read(r, 2) == b"up"
    until(lambda: len(children_of(pid)) == 1, "the worker")
    tell(pipe, pid, *children_of(pid))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@places("main")
def check_the_owner_is_init_of_a_pid_namespace(place: str) -> None:
    if not can_unshare(os.CLONE_NEWPID):
        print("no pid namespace can be made here", file=sys.stderr)
        return
    for method in ("exec", "fork", "main_thread_forkserver"):
        if method in processes():
            with owned(start_an_init, method) as (owner, (_init, worker)):
                same((method, owner.exception(LIMIT)), (method, None))
                until(lambda pid=worker: is_gone(pid), f"the end of a worker by {method}")


def own_in_a_user_namespace(pipe: int, turn: int, method: str, user: int | None) -> None:
    os.unshare(os.CLONE_NEWUSER)
    os.write(turn, b"?")
    os.read(turn, 1)  # the ids are mapped
    options = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    worker = anyfork.spawn(sleep_for_ever, method=method, **options)
    worker.wait_ready(LIMIT)
    same(len(guards(os.getpid())), 0 if user is None else 1)
    tell(pipe, worker.pid)
    sleep_for_ever()


@places("main")
def check_a_user_namespace(place: str) -> None:
    """As rootless containers are: its root may not signal the kernel's way whom it made
    another user, so that the guard is started."""
    if not (ROOT and can_unshare(os.CLONE_NEWUSER)):
        print("no user namespace with several users can be made here", file=sys.stderr)
        return
    fresh = {row.name for row in anyfork.methods() if row.target == "fresh"}
    loadable = readable_by_all()
    for method in processes():
        for user in (None, 1000):
            if user is not None and method in fresh and not loadable:
                continue
            here, there = socket.socketpair()
            r, w = os.pipe()
            arguments = (w, there.fileno(), method, user)
            fds = [w, there.fileno()]
            with here, anyfork.spawn(
                own_in_a_user_namespace, *arguments, method="exec", pass_fds=fds
            ) as owner:
                os.close(w)
                there.close()
                assert here.recv(1) == b"?", owner.exception(LIMIT)
                for name in ("uid_map", "gid_map"):
                    with open(f"/proc/{owner.pid}/{name}", "w") as f:
                        f.write("0 0 65536")
                here.send(b"!")
                assert select.select([r], [], [], LIMIT)[0], "the owner hangs"
                text = os.read(r, 100)
                os.close(r)
                assert text, owner.exception(LIMIT)
                worker = int(text)
                same((method, user, is_gone(worker)), (method, user, False))
                owner.kill()
                until(lambda pid=worker: is_gone(pid), f"the end of a worker by {method}, {user}")


def own_frozen(pipe: int, method: str, folder: str) -> None:
    worker = anyfork.spawn(sleep_for_ever, method=method, cgroup=folder)
    worker.wait_ready(LIMIT)
    with open(f"{folder}/cgroup.freeze", "w") as f:
        f.write("1")
    tell(pipe, worker.pid)
    sleep_for_ever()


@places("main")
def check_a_frozen_worker(place: str) -> None:
    with cgroup() as folder:
        if folder is None or not os.path.exists(f"{folder}/cgroup.freeze"):
            print("no cgroup v2 that can be frozen here", file=sys.stderr)
            return
        for method in processes():
            with owned(own_frozen, method, folder) as (owner, (worker,)):
                owner.kill()
                until(lambda pid=worker: is_gone(pid), f"the end of a worker by {method}")
            with open(f"{folder}/cgroup.freeze", "w") as f:
                f.write("0")


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
        ({"scope": "cgroup"}, "scope"),
    ):
        exc = raises(
            (TypeError, ValueError), lambda o=options: anyfork.spawn(int, method="exec", **o)
        )
        assert named in str(exc), exc
