"""Talking workers where processes and interpreters matter: from each interpreter, beside
forks, and out of memory."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import talk_targets as targets
from attack_common import LIMIT, beside_nothing, is_gone, raises, same, status_of, twin_works

import anyfork
import anyfork.sync

OOM_LIMIT = 64 << 20  # bytes


def processes() -> list[str]:
    return [row.name for row in anyfork.methods() if row.available and row.has_process]


@contextlib.contextmanager
def a_template() -> Iterator[anyfork.Template]:
    """One that keeps nothing ready: what it keeps would count as left behind."""
    with anyfork.Template(standby=(0, 0)) as template:
        yield template


def check_each_method(place: str) -> None:
    """Without a loop, from this interpreter."""
    with a_template() as template:
        for method in processes():
            options: dict[str, Any] = {"template": template} if method == "zygote" else {}
            with anyfork.sync.open_pool(2, method=method, **options) as pool:
                pids = pool.pids()
                same(pool.run(targets.add, 1, 2), 3)
                same(list(pool.map(targets.echo, range(50))), list(range(50)))
                died = raises(anyfork.WorkerDied, pool.run, targets.die)
                assert died.pid in pids, (died, pids)
                same(pool.run(targets.echo, method), method)
            assert all(is_gone(pid) for pid in pids if pid is not None)
            with (
                anyfork.sync.open_worker(method, **options) as worker,
                worker.open_stream(targets.double, 1) as stream,
            ):
                stream.send(21)
                same(stream.receive(), 42)


def check_on_a_loop(place: str) -> None:
    """In a sub-interpreter too, where the loop itself can run."""
    from talking import APIS

    for api in APIS:

        async def check(api: Any = api) -> None:
            async with a_pool(api, template) as pool:
                same(await pool.run(targets.add, 1, 2), 3)
                same([n async for n in pool.map(targets.echo, range(50))], list(range(50)))
                try:
                    await pool.run(targets.sleep, 60, timeout=0.05)
                except TimeoutError:
                    pass
                else:
                    raise AssertionError("no TimeoutError")
                same(await pool.run(targets.echo, 1), 1)

        with a_template() as template:
            api.run(check)


def a_pool(api: Any, template: anyfork.Template) -> Any:
    return api.open_pool(2, template=template)


# ---- forks beside workers --------------------------------------------------------------------


class _Unwound(Exception):
    """The child's way out of the blocks that it was forked in."""


def forks(place: str) -> list[Callable[[], int]]:
    """os.fork() is main's alone."""
    found: list[Callable[[], int]] = [anyfork.fork] if twin_works() else []
    return [*found, os.fork] if place == "main" else found


def check_forked_child(place: str) -> None:
    """It has workers of its own, and touches none of its parent's."""
    for fork in forks(place):
        for method in ("fork", "zygote"):
            fork_beside(fork, method)


def fork_beside(fork: Callable[[], int], method: str) -> None:
    child = None
    try:
        with (
            a_template() as template,
            opened(method, template) as pool,
            opened(method, template) as idle,
            open_stream_of(method, template) as stream,
            call_of_a_thread(pool) as outcome,
            opened(method, template) as at_a_map,
            contextlib.closing(at_a_map.map(targets.echo, range(60), chunks=1)) as results,
        ):
            same(next(results), 0)
            pids = [*pool.pids(), *idle.pids()]
            child = fork()
            if child == 0:
                use_in_child(pool, idle, stream)
                raise _Unwound
            same(status_of(child), 0)
            stream.send(1)
            same(stream.receive(), 2)
            same(pool.run(targets.echo, "parent's"), "parent's")
            same(idle.run(targets.echo, "too"), "too")
            same(list(results), list(range(1, 60)))
            same([*pool.pids(), *idle.pids()], pids)
        same(outcome, [0.25])
    except BaseException as exc:
        if child != 0:
            raise
        if not isinstance(exc, _Unwound):
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(0 if isinstance(exc, _Unwound) else 1)


def opened(method: str, template: anyfork.Template) -> Any:
    options: dict[str, Any] = {"template": template} if method == "zygote" else {}
    return anyfork.sync.open_pool(2, method=method, **options)


@contextlib.contextmanager
def open_stream_of(method: str, template: anyfork.Template) -> Iterator[Any]:
    options: dict[str, Any] = {"template": template} if method == "zygote" else {}
    with (
        anyfork.sync.open_worker(method, **options) as worker,
        worker.open_stream(targets.double, 1) as stream,
    ):
        yield stream


@contextlib.contextmanager
def call_of_a_thread(pool: Any) -> Iterator[list[Any]]:
    """A call that is under way."""
    outcome: list[Any] = []
    owner = os.getpid()

    def call() -> None:
        outcome.append(pool.run(targets.sleep, 0.25))

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.05)
    yield outcome
    if os.getpid() == owner:
        thread.join(LIMIT)


def use_in_child(pool: Any, idle: Any, stream: Any) -> None:
    for call in (
        lambda: pool.run(targets.pid),
        lambda: idle.run(targets.pid),
        lambda: list(idle.map(targets.echo, [1])),
        lambda: stream.send(1),
    ):
        assert "forked" in str(raises(ValueError, call))
    with anyfork.sync.open_pool(2, method="fork") as own:
        same(list(own.map(targets.echo, range(10))), list(range(10)))


# ---- out of memory -------------------------------------------------------------------------


@contextlib.contextmanager
def memory_cgroup() -> Iterator[str | None]:
    """A cgroup below our own, of little memory, where this machine allows one."""
    path = None
    for version, mount, here in my_memory_cgroups():
        new = f"{mount}{here.rstrip('/')}/anyfork-test-{os.getpid()}"
        try:
            os.mkdir(new)
        except OSError:
            continue
        try:
            limit = "memory.max" if version == 2 else "memory.limit_in_bytes"
            write(f"{new}/{limit}", OOM_LIMIT)
            with contextlib.suppress(OSError):  # version 1 has none
                write(f"{new}/memory.swap.max", 0)
        except OSError:
            os.rmdir(new)
            continue
        path = new
        break
    try:
        yield path
    finally:
        if path is not None:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    os.rmdir(path)
                    break
                time.sleep(0.02)


def write(path: str, number: int) -> None:
    with open(path, "w") as file:
        file.write(str(number))


def my_memory_cgroups() -> list[tuple[int, str, str]]:
    """(version, where it is mounted, this process's)."""
    with open("/proc/mounts") as file:
        mounts = [line.split()[1:4] for line in file if line.split()[2].startswith("cgroup")]
    with open("/proc/self/cgroup") as file:
        mine = {line.split(":")[1]: line.rstrip().split(":", 2)[2] for line in file}
    found = []
    for mount, kind, options in mounts:
        if kind == "cgroup2" and "" in mine:
            found.append((2, mount, mine[""]))
        elif "memory" in options.split(",") and "memory" in mine:
            found.append((1, mount, mine["memory"]))
    return found


@beside_nothing
def out_of_memory(place: str) -> None:
    """Whom the kernel kills for want of memory is told so, and nobody else."""
    with memory_cgroup() as folder:
        if folder is None:
            print("skip: no cgroup with a limit of memory can be made here")
            return
        for method in ("fork", "zygote"):
            with anyfork.sync.open_pool(1, method=method) as pool:
                died = raises(anyfork.WorkerDied, pool.run, targets.die)
                assert not died.oom, died
                died = raises(anyfork.WorkerDied, pool.run, targets.use_up, folder, 4 * OOM_LIMIT)
                assert died.oom and died.returncode == -9, died
                assert "oom" in str(died), died
                same(pool.run(targets.echo, 1), 1)
                assert not raises(anyfork.WorkerDied, pool.run, targets.die).oom
