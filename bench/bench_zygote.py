"""A template's workers beside their nearest peers, interleaved in one process.

usage: bench_zygote.py [--module NAME] [--rounds N] [--json] [--plot FILE]

first line: from the start to the first line of a target in a module, with NAME loaded;
call: until the start has returned. Times in µs, medians; ratio: the median, over the
rounds, of the peer's time to ours. Peers: multiprocessing's forkserver, which has
preloaded NAME too, and its spawn; os.fork() where the owner has a gigabyte. The floor: one
sendmsg(2) with three descriptors between two C programs (floor.c), which wait as long before
it. `forked`: a template that keeps no standbys.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import zygote_targets
from load import busy

import anyfork

Timed = tuple[float, float]  # call, first line, in µs
now = time.monotonic_ns
SETTLE_SECONDS = 0.01  # a template refills behind a start


def by_template(template: anyfork.Template, module: str) -> Callable[[], Timed]:
    def run() -> Timed:
        time.sleep(SETTLE_SECONDS)
        start = now()
        with template.spawn(zygote_targets.stamp_with, module) as child:
            called = now()
            return (called - start) / 1e3, (child.result() - start) / 1e3

    return run


def by_multiprocessing(kind: str, module: str) -> Callable[[], Timed]:
    context: Any = multiprocessing.get_context(kind)

    def run() -> Timed:
        time.sleep(SETTLE_SECONDS)
        ours, theirs = context.Pipe(duplex=False)
        start = now()
        process = context.Process(target=zygote_targets.send_stamp, args=(theirs, module))
        process.start()
        called = now()
        stamp = ours.recv()
        process.join()
        ours.close()
        theirs.close()
        return (called - start) / 1e3, (stamp - start) / 1e3

    return run


def by_fork() -> Timed:
    time.sleep(SETTLE_SECONDS)
    r, w = os.pipe()
    start = now()
    pid = os.fork()
    if pid == 0:
        os.write(w, str(now()).encode())
        os._exit(0)
    called = now()
    stamp = int(os.read(r, 50))
    os.waitpid(pid, 0)
    os.close(r)
    os.close(w)
    return (called - start) / 1e3, (stamp - start) / 1e3


@contextlib.contextmanager
def floor() -> Iterator[Callable[[], Timed]]:
    """The C programs of floor.c."""
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "floor")
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "floor.c")
        subprocess.run(["cc", "-O2", "-std=c11", "-o", program, source], check=True)
        with subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            to, answers = process.stdin, process.stdout

            def run() -> Timed:
                to.write(f"{SETTLE_SECONDS * 1e6:.0f}\n")
                to.flush()
                took, woken = answers.readline().split()
                return int(took) / 1e3, int(woken) / 1e3

            yield run
            to.close()


def measure(ours: Callable[[], Timed], peer: Callable[[], Timed], rounds: int) -> dict[str, float]:
    timed: tuple[list[Timed], list[Timed]] = ([], [])
    for n in range(rounds + 3):
        for which in random.sample((0, 1), 2):
            one = (ours, peer)[which]()
            if n >= 3:
                timed[which].append(one)

    def ratio(part: int) -> float:
        pairs = zip(timed[0], timed[1], strict=True)
        return round(statistics.median(b[part] / a[part] for a, b in pairs), 2)

    def median(which: int, part: int) -> float:
        return round(statistics.median(one[part] for one in timed[which]), 1)

    return {
        "call": median(0, 0),
        "peer_call": median(1, 0),
        "call_ratio": ratio(0),
        "first_line": median(0, 1),
        "peer_first_line": median(1, 1),
        "first_line_ratio": ratio(1),
        "rounds": rounds,
    }


def per_second(start: Callable[[], Any], n: int) -> float:
    """Until all of n that were started at once have ended."""
    time.sleep(0.2)
    begun = now()
    running = [start() for _ in range(n)]
    for one in running:
        (one.result if hasattr(one, "result") else one.join)()
    took = (now() - begun) / 1e9
    for one in running:
        one.close()
    return n / took


def throughput(template: anyfork.Template, context: Any, rounds: int, n: int) -> dict[str, float]:
    def forkserver() -> Any:
        process = context.Process(target=zygote_targets.nothing)
        process.start()
        return process

    ours, peer = [], []
    for _ in range(rounds):
        ours.append(per_second(lambda: template.spawn(zygote_targets.nothing), n))
        peer.append(per_second(forkserver, n))
    return {
        "per_second": round(statistics.median(ours)),
        "peer_per_second": round(statistics.median(peer)),
        "per_second_ratio": round(
            statistics.median(a / b for a, b in zip(ours, peer, strict=True)), 1
        ),
        "rounds": rounds,
    }


def memory(template: anyfork.Template, context: Any, module: str) -> dict[str, float]:
    ours = template.run(zygote_targets.memory, module)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=zygote_targets.send_memory, args=(there, module))
    process.start()
    peer = here.recv()
    process.join()
    return {
        "first_kb": ours[0],
        "peer_first_kb": peer[0],
        "first_kb_ratio": round(peer[0] / max(1, ours[0]), 1),
        "collected_kb": ours[1],
        "peer_collected_kb": peer[1],
        "collected_kb_ratio": round(peer[1] / max(1, ours[1]), 1),
    }


def all_rows(module: str, rounds: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    preload = ["zygote_targets", module]
    forkserver: Any = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(preload)
    standbys = anyfork.Template(preload, standby=(8, 8)).warm()
    many = anyfork.Template(preload, standby=(80, 80)).warm()
    none = anyfork.Template(preload, standby=(0, 0)).warm()
    ours, forked = by_template(standbys, module), by_template(none, module)
    peer, spawn = by_multiprocessing("forkserver", module), by_multiprocessing("spawn", module)
    peer()
    rows: list[dict[str, Any]] = []

    def add(name: str, against: str, figures: dict[str, float]) -> None:
        rows.append({"what": name, "against": against, **figures})

    tell("idle")
    add("standby", "forkserver, preloaded", measure(ours, peer, rounds))
    add("standby", "spawn, which imports", measure(ours, spawn, max(5, rounds // 10)))
    add("forked", "forkserver, preloaded", measure(forked, peer, rounds))
    with floor() as send:
        add("standby", "one sendmsg(2) in C, the floor", measure(ours, send, rounds))
    tell("8 busy threads")
    with busy(8):
        add(
            "standby, 8 busy threads",
            "forkserver, preloaded",
            measure(ours, peer, max(5, rounds // 10)),
        )
    tell("64 at once")
    add(
        "64 standbys",
        "forkserver, preloaded",
        throughput(many, forkserver, max(3, rounds // 20), 64),
    )
    add(
        "64 forked", "forkserver, preloaded", throughput(none, forkserver, max(3, rounds // 20), 64)
    )
    tell("memory")
    add("private memory", "forkserver, preloaded", memory(standbys, forkserver, module))
    tell("1 GB")
    heap = bytearray(1 << 30)
    heap[::4096] = b"\1" * len(heap[::4096])
    add("standby, owner of 1 GB", "os.fork()", measure(ours, by_fork, max(10, rounds // 4)))
    for template in (standbys, many, none):
        template.close()
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{row['what']}  /  {row['against']}")
        for key in row:
            if key.endswith("_ratio"):
                name = key.removesuffix("_ratio")
                print(f"    {name:12} {row[name]:>12,} {row['peer_' + name]:>14,} {row[key]:>10,}x")


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """All ratios, as bars on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (
            f"{row['what']}: {key.removesuffix('_ratio').replace('_', ' ')}\n/ {row['against']}",
            row[key],
        )
        for row in rows
        for key in row
        if key.endswith("_ratio")
    ]
    figure, axes = pyplot.subplots(figsize=(9, 0.55 * len(bars) + 1.2), layout="constrained")
    drawn = axes.barh([name for name, _ in bars], [ratio for _, ratio in bars], color="#3b6ea5")
    axes.bar_label(drawn, fmt="{:,.3g}x", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("times better than the peer (median of interleaved rounds)")
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", default="numpy", help="what workers need (default numpy)")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios; SVG, PNG or PDF")
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot: matplotlib is not installed: pip install '.[bench]'")
    try:
        importlib.util.find_spec(options.module) or sys.exit(f"{options.module}: not installed")
    except ModuleNotFoundError as exc:
        sys.exit(str(exc))

    def tell(text: str) -> None:
        print(f"... {text}", file=sys.stderr, flush=True)

    rows = all_rows(options.module, options.rounds, tell)
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
