"""How long a worker outlives its owner, by layer and by the size of the owner.

Each round starts an owner that has touched so much memory and holds one worker, kills it
with SIGKILL, and takes the time until the worker's pidfd is readable. Layers: the
kernel's lifeline; the guard too; PR_SET_PDEATHSIG for comparison (which is of the
starting thread, and so ends workers whose starting thread ends). In random order,
medians.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import select
import signal
import statistics
import sys
import time

import anyfork

PR_SET_PDEATHSIG = 1
LAYERS = ("lifeline", "guard", "pdeathsig")
LIMIT = 60.0


def sleep_for_ever() -> None:
    time.sleep(3600)


def sleep_until_the_thread_dies() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sleep_for_ever()


def own(pipe: int, megabytes: int, layer: str) -> None:
    heap = bytearray(megabytes << 20)
    heap[::4096] = b"\1" * len(heap[::4096])
    # Not by fork: a worker with a copy of the heap would have to be taken apart too.
    if layer == "pdeathsig":
        worker = anyfork.spawn(sleep_until_the_thread_dies, method="exec", lifeline=False)
    else:
        worker = anyfork.spawn(sleep_for_ever, method="exec", guard=layer == "guard")
    worker.wait_ready(LIMIT)
    time.sleep(0.05)  # it is in its target by now
    os.write(pipe, b"%d" % worker.pid)
    sleep_for_ever()


def milliseconds(megabytes: int, layer: str) -> float:
    r, w = os.pipe()
    with anyfork.spawn(own, w, megabytes, layer, method="exec", pass_fds=[w]) as owner:
        os.close(w)
        text = os.read(r, 20)
        os.close(r)
        if not text:
            raise SystemExit(f"the owner could not start: {owner.exception(LIMIT)}")
        pidfd = os.pidfd_open(int(text))
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            start = time.perf_counter()
            owner.kill()
            if not poll.poll(LIMIT * 1000):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                raise SystemExit(f"{layer}: the worker outlived its owner by {LIMIT:.0f} s")
            return (time.perf_counter() - start) * 1000
        finally:
            os.close(pidfd)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="per row (default 15)")
    parser.add_argument("--heaps", type=int, nargs="+", default=[0, 1024, 4096], metavar="MB")
    parser.add_argument("--json", action="store_true", help="print a JSON list, not a table")
    options = parser.parse_args()
    rows = [(heap, layer) for heap in options.heaps for layer in LAYERS]
    times: dict[tuple[int, str], list[float]] = {row: [] for row in rows}
    for n in range(options.rounds):
        print(f"[{n + 1}/{options.rounds}]", file=sys.stderr, flush=True)
        for row in random.sample(rows, len(rows)):
            times[row].append(milliseconds(*row))
    results = [
        {
            "heap_mb": heap,
            "layer": layer,
            "rounds": options.rounds,
            "median_ms": round(statistics.median(got), 2),
            "max_ms": round(max(got), 2),
        }
        for (heap, layer), got in times.items()
    ]
    if options.json:
        print(json.dumps(results, indent=1))
        return 0
    print(f"{'owner MB':>8}  {'layer':<9}  {'median ms':>9}  {'max ms':>8}")
    for r in results:
        print(
            f"{r['heap_mb']:>8}  {r['layer']:<9}  {r['median_ms']:>9.2f}  {r['max_ms']:>8.2f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
