"""usage: starts.py METHOD COUNT [--alive] [--progress]

COUNT starts by one method, a few at a time, and what they leave in the owner; with
--alive all of them at once, as many as memory allows, and what the last hundred cost
beside the first. One line of JSON:
{"method", "starts", "bad", "seconds", "first", "last", "snapshots"}: `first` and `last`
are medians in µs of the start calls of a tenth of all; snapshots as of leaks.py, for method
zygote with the template's own memory and descriptors.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import time
from array import array
from collections import deque
from collections.abc import Sequence

import leaks
import outcomes

import anyfork

AT_A_TIME = 4
STANDBYS = 4  # of a template that is busy
BETWEEN_LOOKS = 0.05  # more than it takes to make one
SNAPSHOTS = 10
WARM_UP = 50
FDS_PER_WORKER = 4
# What a worker that sleeps needs of its own, in MB; generously.
MB = {"exec": 15, "subint_forkserver": 15}
MB_OF_A_FORK = 8
SHARE_OF_MEMORY = 0.7


def nothing() -> None:
    pass


def sleep_for_ever() -> None:
    time.sleep(3600)


def start(method: str, target: object = nothing) -> anyfork.Child:
    if method == "exec" and target is nothing:  # a hundred times as many as of a Python
        return anyfork.spawn(argv=["/bin/true"])
    return anyfork.spawn(target, method=method)


def end(child: anyfork.Child, bad: list[str]) -> None:
    with child:
        try:
            code = child.wait(outcomes.LIMIT)
        except Exception as exc:
            bad.append(repr(exc))
        else:
            if code != 0:
                bad.append(f"{child.pid}: {code}")


def template() -> dict[str, object]:
    """Of the default template, once it has all its standbys again, and does nothing."""
    stats = anyfork.warm().stats()
    deadline = time.monotonic() + outcomes.LIMIT
    before: dict[str, object] = {}
    while True:
        with open(f"/proc/{stats.pid}/task/{stats.pid}/children") as f:
            standbys = len(f.read().split())
        with open(f"/proc/{stats.pid}/statm") as f:
            rss_kb = int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024
        now: dict[str, object] = {
            "template_made": stats.made,
            "template_fds": len(os.listdir(f"/proc/{stats.pid}/fd")),
            "template_children": standbys,
            "template_rss_kb": rss_kb,
        }
        if (standbys == STANDBYS and now == before) or time.monotonic() > deadline:
            return now
        before = now
        time.sleep(BETWEEN_LOOKS)


def settled(method: str, before: dict[str, object]) -> dict[str, object]:
    return leaks.settled(before) | (template() if method == "zygote" else {})


def one_after_the_other(method: str, count: int, progress: bool) -> None:
    bad: list[str] = []
    for _ in range(min(WARM_UP, count)):
        end(start(method), bad)
    first = settled(method, leaks.snapshot())
    snapshots = [first]
    running: deque[anyfork.Child] = deque()
    times = array("d")  # small beside what is looked for
    began = told = time.monotonic()
    for n in range(1, count + 1):
        before = time.perf_counter()
        running.append(start(method))
        times.append(time.perf_counter() - before)
        if len(running) == AT_A_TIME:
            end(running.popleft(), bad)
        if n % max(1, count // SNAPSHOTS) == 0:
            while running:
                end(running.popleft(), bad)
            snapshots.append(settled(method, first))
        if progress and (time.monotonic() - told > 1 or n == count):
            told = time.monotonic()
            outcomes.tell_progress(n, count, len(bad), began)
    while running:
        end(running.popleft(), bad)
    tell(method, count, bad, began, times, snapshots)


def room(method: str, count: int) -> int:
    """How many of `count` sleeping workers this machine has memory and limits for."""
    with open("/proc/meminfo") as f:
        free_kb = next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    by_memory = int(free_kb / 1024 * SHARE_OF_MEMORY) // MB.get(method, MB_OF_A_FORK)
    by_files = (hard - 100) // FDS_PER_WORKER
    return max(1, min(count, by_memory, by_files))


def all_at_once(method: str, count: int) -> None:
    bad: list[str] = []
    end(start(method), bad)
    first = leaks.settled(leaks.snapshot())
    times = array("d")  # small beside what is looked for
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in range(room(method, count)):
            before = time.perf_counter()
            workers.append(stack.enter_context(start(method, sleep_for_ever)))
            times.append(time.perf_counter() - before)
            # Not beside this one's own first steps: what is measured is the start.
            workers[-1].wait_ready(outcomes.LIMIT)
        bad += [f"{w.pid} has ended" for w in workers if not w.is_alive()]
        if len({worker.pid for worker in workers}) != len(workers):
            bad.append("a pid twice")
    tell(method, len(workers), bad, began, times, [first, leaks.settled(first)])


def tell(
    method: str,
    starts: int,
    bad: list[str],
    began: float,
    times: Sequence[float],
    snapshots: list[dict[str, object]],
) -> None:
    tenth = max(1, len(times) // 10)
    outcomes.tell(
        {
            "method": method,
            "starts": starts,
            "bad": bad[:20],
            "seconds": round(time.monotonic() - began, 1),
            "first": round(statistics.median(times[:tenth]) * 1e6, 1),
            "last": round(statistics.median(times[-tenth:]) * 1e6, 1),
            "snapshots": snapshots,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method")
    parser.add_argument("count", type=int)
    parser.add_argument("--alive", action="store_true")
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    if options.alive:
        all_at_once(options.method, options.count)
    else:
        one_after_the_other(options.method, options.count, options.progress)
    outcomes.leave()


if __name__ == "__main__":
    main()
