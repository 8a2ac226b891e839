"""usage: talks.py API COUNT [--progress]   (API: trio, asyncio or sync)

COUNT calls of all kinds, by one worker that stays and a pool whose workers die, and what
they leave. One line of JSON: {"api", "calls", "kinds", "bad", "seconds", "snapshots"}, with
snapshots as of leaks.py after each tenth, and of the worker that stays.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import leaks
import outcomes
import talk_targets as targets
from talking import APIS, Api

import anyfork

SNAPSHOTS = 10
WARM_UP = 300
LARGE = 300_000  # bytes: by shared memory
AT_ONCE = 25  # of a map

Kind = Callable[[Any, Any], Awaitable[int]]
"""Given the worker and the pool; returns how many calls that were."""


async def small(worker: Any, pool: Any) -> int:
    assert await worker.run(targets.add, 1, 2) == 3
    assert await pool.run(targets.add, 3, 4) == 7
    return 2


async def mapped(worker: Any, pool: Any) -> int:
    assert [n async for n in pool.map(targets.echo, range(AT_ONCE))] == list(range(AT_ONCE))
    return AT_ONCE


async def left_early(worker: Any, pool: Any) -> int:
    results = pool.map(targets.echo, range(1000), chunks=2)
    assert [await anext(results) for _ in range(3)] == [0, 1, 2]
    await results.aclose()
    return 3


async def large(worker: Any, pool: Any) -> int:
    blob = targets.Blob(b"x" * LARGE)
    assert len((await worker.run(targets.echo, blob)).data) == LARGE
    assert len(await pool.run(targets.echo, b"y" * LARGE)) == LARGE
    return 2


async def descriptor(worker: Any, pool: Any) -> int:
    with open((await worker.run(targets.open_pipe, b"there")).detach(), "rb") as file:
        assert file.read() == b"there"
    return 1


async def streamed(worker: Any, pool: Any) -> int:
    async with worker.open_stream(targets.double, 7) as stream:
        for n in range(20):
            await stream.send(n)
            assert await stream.receive() == 2 * n
        await stream.send_eof()
        assert await stream.result() == 7
    async with worker.open_stream(targets.count) as stream:  # left in its middle
        assert [await stream.receive() for _ in range(5)] == [0, 1, 2, 3, 4]
    return 2


async def cancelled(worker: Any, pool: Any) -> int:
    for one in (worker, pool):
        try:
            await one.run(targets.sleep, 60, timeout=0.001)
        except TimeoutError:
            continue
        raise AssertionError("it was not cancelled")
    return 2


async def raised(worker: Any, pool: Any) -> int:
    try:
        await worker.run(targets.fail, "no luck")
    except ValueError:
        return 1
    raise AssertionError("it did not raise")


async def died(worker: Any, pool: Any) -> int:
    try:
        await pool.run(targets.die)
    except anyfork.WorkerDied as exc:
        assert exc.returncode == -signal.SIGKILL, exc
        return 1
    raise AssertionError("it did not die")


# Most of them small, as calls are.
KINDS: list[Kind] = [
    *[small] * 10, mapped, large, small, small, descriptor, streamed, mapped, raised, left_early,
    *[small] * 10, mapped, cancelled, large, mapped, died,
]  # fmt: skip


def of_process(pid: int | None) -> dict[str, int]:
    with open(f"/proc/{pid}/statm") as file:
        rss_kb = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024
    return {
        "worker_fds": len(os.listdir(f"/proc/{pid}/fd")),
        "worker_threads": len(os.listdir(f"/proc/{pid}/task")),
        "worker_rss_kb": rss_kb,
    }


def children() -> int:
    found = 0
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            found += len(file.read().split())
    return found


class Talks:
    def __init__(self, api: Api, count: int, progress: bool) -> None:
        self.api = api
        self.count = count
        self.progress = progress
        self.calls = 0
        self.kinds: Counter[str] = Counter()
        self.bad: list[str] = []
        self.snapshots: list[dict[str, Any]] = []
        self.began = self._told = time.monotonic()

    async def run(self) -> None:
        with anyfork.Template(standby=(0, 0)) as template:
            opened = functools.partial(self.api.open_pool, 3, template=template, grace=20)
            async with self.api.open_worker(template=template, grace=20) as worker:
                await self._part(worker, opened, WARM_UP)
                self.calls = 0
                self.began = time.monotonic()
                self._look(worker)
                for n in range(1, SNAPSHOTS + 1):
                    await self._part(worker, opened, self.count * n // SNAPSHOTS)
                    self._look(worker)

    async def _part(self, worker: Any, opened: Any, until: int) -> None:
        async with opened() as pool:
            turn = 0
            while self.calls < until and len(self.bad) < 20:
                kind = KINDS[turn % len(KINDS)]
                turn += 1
                try:
                    n = await kind(worker, pool)
                except Exception as exc:
                    self.bad.append(f"{kind.__name__}: {exc!r}")
                    n = 1
                self.calls += n
                self.kinds[kind.__name__] += n
                if self.progress and time.monotonic() - self._told > 1:
                    self._told = time.monotonic()
                    outcomes.tell_progress(self.calls, self.count, len(self.bad), self.began)

    def _look(self, worker: Any) -> None:
        first = self.snapshots[0] if self.snapshots else leaks.snapshot()
        found = leaks.settled(first) | {"children": children()} | of_process(worker.pid)
        self.snapshots.append(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("api")
    parser.add_argument("count", type=int)
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    api = next(api for api in APIS if api.name == options.api)
    talks = Talks(api, options.count, options.progress)
    api.run(talks.run)
    outcomes.tell(
        {
            "api": api.name,
            "calls": talks.calls,
            "kinds": talks.kinds,
            "bad": talks.bad,
            "seconds": round(time.monotonic() - talks.began, 1),
            "snapshots": talks.snapshots,
        }
    )
    outcomes.leave()


if __name__ == "__main__":
    main()
