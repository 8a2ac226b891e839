"""usage: leaks.py KIND WAY N   (KIND: legacy isolated main; WAY: fork, or a method's name)

What rounds of N forks leave in the parent. One line of JSON: {"bad", "snapshots"}, with
counts of the interpreter, the process and the debug build before and after each round.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any

import outcomes
import subint

import anyfork
from anyfork import _anyfork

WARM_UP = 50
ROUNDS = 3
SETTLE_SECONDS = 5.0


def nothing() -> None:
    pass


def one(way: str) -> int | None:
    if way == "fork":
        return outcomes.in_child(anyfork.fork, nothing)
    with anyfork.spawn(nothing, method=way.removeprefix("spawn:")) as child:
        return child.wait(outcomes.LIMIT)


def snapshot() -> dict[str, Any]:
    gc.collect()
    with open("/proc/self/statm") as statm:
        rss_kb = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024
    runtime = _anyfork.runtime()
    return {
        "runtime": runtime,
        "interpreters": subint.interpreters(),
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "rss_kb": rss_kb,
        "refs": getattr(sys, "gettotalrefcount", int)(),
        "blocks": sys.getallocatedblocks(),
    }


def settled(before: dict[str, Any]) -> dict[str, Any]:
    """A snapshot once threads that are about to end had time to."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = snapshot()
        if now["threads"] <= before["threads"] or time.monotonic() > deadline:
            return now
        time.sleep(0.01)


def run(way: str, n: int) -> None:
    bad = [code for code in (one(way) for _ in range(WARM_UP)) if code != 0]
    first = settled(snapshot())
    kept = [json.dumps(first)]  # one object each: what they count includes themselves
    for _ in range(ROUNDS):
        bad += [code for code in (one(way) for _ in range(n)) if code != 0]
        kept.append(json.dumps(settled(first)))
    outcomes.tell({"bad": bad, "snapshots": [json.loads(text) for text in kept]})


def main(kind: str, way: str, n: str) -> None:
    if kind == "main":
        run(way, int(n))
    else:
        with subint.interpreter(kind) as made:
            made.run(f"import leaks; leaks.run({way!r}, {int(n)})", "thread")
    outcomes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
