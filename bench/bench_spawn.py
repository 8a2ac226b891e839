"""What a fork costs: anyfork against os.fork(), interleaved in one process.

Every candidate is compared with os.fork() in the main interpreter of the same
process: in each round all of them run once, in turn; a figure is the median of
the rounds, a ratio is the median of the rounds' own ratios.

`call` is the time until the call has returned in the parent; `line` is the time
until the first line of Python in the child, by the system-wide monotonic clock.

A plain os.fork() kills its child while sub-interpreters live (gh-139759), so
where they do it has a `call` and no `line`.
"""

from __future__ import annotations

import _interpreters
import argparse
import json
import os
import random
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable

import anyfork

STAMP = struct.Struct("d")
now = time.monotonic

# One call of a candidate inside a sub-interpreter; the target stamps the line.
IN_SUBINTERPRETER = """
import os, struct, time
import anyfork
def stamp():
    os.write({fd}, struct.pack("d", time.monotonic()))
def twin():
    start = time.monotonic()
    pid = anyfork.fork()
    if pid == 0:
        stamp()
        os._exit(0)
    spent = time.monotonic() - start
    os.waitpid(pid, 0)
    return start, spent
def worker():
    start = time.monotonic()
    child = anyfork.spawn(stamp, method="fork", pass_fds=({fd},))
    spent = time.monotonic() - start
    child.wait()
    child.close()
    return start, spent
def report(pair):
    os.write({report_fd}, struct.pack("dd", *pair))
"""


class Candidate:
    """One way to fork; call() returns (start, seconds until it returned)."""

    def __init__(self, name: str, call: Callable[[], tuple[float, float]], has_line: bool = True):
        self.name = name
        self.call = call
        self.has_line = has_line
        self.calls: list[float] = []
        self.lines: list[float] = []


class Bench:
    def __init__(self) -> None:
        self.line_r, self.line_w = os.pipe()
        self.report_r, self.report_w = os.pipe()
        self.interpreters: list[int] = []

    def stamp(self) -> None:
        os.write(self.line_w, STAMP.pack(now()))

    def by(self, fork: Callable[[], int]) -> Callable[[], tuple[float, float]]:
        def call() -> tuple[float, float]:
            start = now()
            pid = fork()
            if pid == 0:
                self.stamp()
                os._exit(0)
            spent = now() - start
            os.waitpid(pid, 0)
            return start, spent

        return call

    def row(self, method: str) -> Callable[[], tuple[float, float]]:
        def call() -> tuple[float, float]:
            start = now()
            child = anyfork.spawn(self.stamp, method=method, pass_fds=(self.line_w,))
            spent = now() - start
            child.wait()
            child.close()
            return start, spent

        return call

    def in_interpreter(self, config: str, function: str) -> Callable[[], tuple[float, float]]:
        interp = _interpreters.create(config)
        self.interpreters.append(interp)
        self.exec(interp, IN_SUBINTERPRETER.format(fd=self.line_w, report_fd=self.report_w))

        def call() -> tuple[float, float]:
            self.exec(interp, f"report({function}())")
            start, spent = struct.unpack("dd", os.read(self.report_r, 16))
            return start, spent

        return call

    @staticmethod
    def exec(interp: int, code: str) -> None:
        failed = _interpreters.exec(interp, code)
        if failed:
            raise RuntimeError(failed.formatted)

    def close(self) -> None:
        for interp in self.interpreters:
            _interpreters.destroy(interp)

    def run(self, candidates: list[Candidate], rounds: int) -> None:
        for n in range(rounds + 3):
            # In another order each time: what one leaves behind, warm or cold, is
            # not always the next one's.
            for c in random.sample(candidates, len(candidates)):
                start, spent = c.call()
                line = STAMP.unpack(os.read(self.line_r, 8))[0] - start if c.has_line else 0.0
                if n >= 3:  # the first rounds warm caches
                    c.calls.append(spent)
                    c.lines.append(line)


def ratio(mine: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, base, strict=True))


def measure(live: bool, rounds: int, heap_mb: int, busy: int) -> list[dict[str, object]]:
    """One cell, in this process. ``live``: with sub-interpreters alive."""
    heap = bytearray(heap_mb << 20)
    for at in range(0, len(heap), 4096):
        heap[at] = 1
    stop = threading.Event()

    def spin() -> None:
        n = 0
        while not stop.is_set():
            n += 1

    threads = [threading.Thread(target=spin) for _ in range(busy)]
    for t in threads:
        t.start()
    bench = Bench()
    quiet = os.open(os.devnull, os.O_WRONLY)
    stderr = os.dup(2)
    try:
        base = Candidate("os.fork", bench.by(os.fork), has_line=not live)
        candidates = [base, Candidate("anyfork.fork", bench.by(anyfork.fork))]
        if live:
            os.dup2(quiet, 2)  # what the children of os.fork() say when they die
            twin_works = _twin_works()
            for config in ("legacy", "isolated") if twin_works else ():
                candidates.append(Candidate(f"anyfork.fork, {config} twin",
                                            bench.in_interpreter(config, "twin")))
                candidates.append(Candidate(f"method fork, from {config}",
                                            bench.in_interpreter(config, "worker")))
            candidates.append(Candidate("method subint_fork", bench.row("subint_fork")))
        else:
            candidates.append(Candidate("method fork", bench.row("fork")))
        bench.run(candidates, rounds)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(quiet)
        stop.set()
        for t in threads:
            t.join()
        bench.close()
    rows = []
    for c in candidates:
        rows.append({
            "candidate": c.name,
            "live_interpreters": live,
            "heap_mb": heap_mb,
            "busy_threads": busy,
            "rounds": len(c.calls),
            "call_us": statistics.median(c.calls) * 1e6,
            "call_ratio": ratio(c.calls, base.calls),
            "line_us": statistics.median(c.lines) * 1e6 if c.has_line else None,
            "line_ratio": ratio(c.lines, base.lines) if c.has_line and base.has_line else None,
        })
    return rows


def _twin_works() -> bool:
    interp = _interpreters.create("legacy")
    try:
        return not _interpreters.exec(interp, "import anyfork; anyfork._anyfork.check_fork()")
    finally:
        _interpreters.destroy(interp)


def cell_in_subprocess(rounds: int, live: bool, heap: int, busy: int) -> list[dict[str, object]]:
    """Each cell has a process of its own, so that heaps do not add up."""
    import subprocess

    out = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--cell", json.dumps([live, heap, busy]),
         "--rounds", str(rounds)],
        stdout=subprocess.PIPE, check=True, timeout=1800).stdout
    rows: list[dict[str, object]] = json.loads(out)
    return rows


def show(rows: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"CPython {sys.version.split()[0]}: medians, and ratios to os.fork() "
                        "in the main interpreter of the same process")
    for column in ("sub-interpreters", "heap MB", "busy", "candidate", "call µs", "ratio",
                   "line µs", "ratio"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for r in rows:
        table.add_row(
            "live" if r["live_interpreters"] else "none", str(r["heap_mb"]), str(r["busy_threads"]),
            str(r["candidate"]), f"{r['call_us']:,.0f}", f"{r['call_ratio']:.2f}",
            "—" if r["line_us"] is None else f"{r['line_us']:,.0f}",
            "—" if r["line_ratio"] is None else f"{r['line_ratio']:.2f}")
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python bench/bench_spawn.py --rounds 300 --heap 0 --busy 0 --busy 4")
    parser.add_argument("--rounds", type=int, default=300, help="rounds per cell (default 300)")
    parser.add_argument("--heap", type=int, action="append", metavar="MB",
                        help="touched heap, repeatable (default 0, 100, 1024)")
    parser.add_argument("--busy", type=int, action="append", metavar="N",
                        help="busy Python threads of main, repeatable (default 0, 4)")
    parser.add_argument("--json", action="store_true", help="print a JSON list, not a table")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        live, heap, busy = json.loads(args.cell)
        json.dump(measure(live, args.rounds, heap, busy), sys.stdout)
        return 0
    rows: list[dict[str, object]] = []
    cells = [(live, heap, busy) for heap in args.heap or (0, 100, 1024)
             for busy in args.busy or (0, 4) for live in (False, True)]
    for n, (live, heap, busy) in enumerate(cells, 1):
        print(f"[{n}/{len(cells)}] heap {heap} MB, {busy} busy threads, "
              f"{'live' if live else 'no'} sub-interpreters", file=sys.stderr, flush=True)
        rows += cell_in_subprocess(args.rounds, live, heap, busy)
    if args.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
