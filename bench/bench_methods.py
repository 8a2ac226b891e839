"""What each spawn method costs beside its nearest peer, interleaved in one process.

`call`: until the start has returned. `life`: until a worker that does nothing has ended
and was reaped. A ratio is the median, over the rounds, of the peer's time to ours: 2.00
means that the peer takes twice as long. Each round runs both once, in random order.

Peers: subprocess and os.posix_spawn for a program by exec; multiprocessing's spawn,
fork and forkserver for a target by exec, by fork and by the launch pads, forkserver for
zygote too, neither with anything preloaded (see bench_zygote.py); an interpreter
of its own on a thread (PEP 734) for subint. A method that no peer is named for gets one
by what its row says of it.
"""

from __future__ import annotations

import _interpreters
import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable

from load import busy

import anyfork

Timed = tuple[float, float]
now = time.perf_counter


def ours(method: str) -> Callable[[], Timed]:
    def run() -> Timed:
        start = now()
        with anyfork.spawn(int, method=method) as child:
            called = now() - start
            child.wait()
            return called, now() - start

    return run


def program() -> Timed:
    start = now()
    with anyfork.spawn(argv=["/bin/true"]) as child:
        called = now() - start
        child.wait()
        return called, now() - start


def by_subprocess() -> Timed:
    start = now()
    with subprocess.Popen(["/bin/true"]) as process:
        called = now() - start
        process.wait()
        return called, now() - start


def by_posix_spawn() -> Timed:
    start = now()
    pid = os.posix_spawn("/bin/true", ["/bin/true"], os.environ)
    called = now() - start
    os.waitpid(pid, 0)
    return called, now() - start


def by_multiprocessing(kind: str) -> Callable[[], Timed]:
    context = multiprocessing.get_context(kind)

    def run() -> Timed:
        start = now()
        process = context.Process(target=int)  # type: ignore[attr-defined]
        process.start()
        called = now() - start
        process.join()
        return called, now() - start

    return run


def by_interpreter() -> Timed:
    def work() -> None:
        interpreter = _interpreters.create("isolated")
        _interpreters.exec(interpreter, "int()")
        _interpreters.destroy(interpreter)

    start = now()
    thread = threading.Thread(target=work)
    thread.start()
    called = now() - start
    thread.join()
    return called, now() - start


Peer = tuple[str, Callable[[], Timed]]
SPAWN: Peer = ("multiprocessing spawn", by_multiprocessing("spawn"))
FORK: Peer = ("multiprocessing fork", by_multiprocessing("fork"))
FORKSERVER: Peer = ("multiprocessing forkserver", by_multiprocessing("forkserver"))
INTERPRETER: Peer = ("interpreter on a thread", by_interpreter)
# The nearest one of each method; see nearest_peer() for others.
PEERS = {
    "zygote": FORKSERVER,
    "exec": SPAWN,
    "fork": FORK,
    "subint_fork": FORKSERVER,
    "main_thread_forkserver": FORKSERVER,
    "subint_forkserver": FORKSERVER,
    "subint": INTERPRETER,
}


def nearest_peer(method: anyfork.Method) -> Peer:
    if method.name in PEERS:
        return PEERS[method.name]
    if not method.has_process:
        return INTERPRETER
    return SPAWN if method.target == "fresh" else FORKSERVER


def pairs() -> list[tuple[str, Callable[[], Timed], str, Callable[[], Timed]]]:
    """One for each method that works here, and what exec alone can do."""
    found = [
        ("exec, a program", program, "subprocess", by_subprocess),
        ("exec, a program", program, "os.posix_spawn", by_posix_spawn),
    ]
    for method in anyfork.methods():
        if not method.available:
            print(f"{method.name}: skipped: {method.reason}", file=sys.stderr)
            continue
        name = "exec, a target" if method.name == "exec" else method.name
        found.append((name, ours(method.name), *nearest_peer(method)))
    return found


def measure(
    mine: Callable[[], Timed], peer: Callable[[], Timed], rounds: int
) -> tuple[list[Timed], list[Timed]]:
    results: dict[int, list[Timed]] = {0: [], 1: []}
    for n in range(rounds + 3):
        for which in random.sample((0, 1), 2):
            timed = (mine, peer)[which]()
            if n >= 3:  # the first rounds warm caches
                results[which].append(timed)
    return results[0], results[1]


def row(
    name: str, mine: list[Timed], peer_name: str, peer: list[Timed], busy: int, heap: int
) -> dict[str, object]:
    def median(times: list[Timed], part: int) -> float:
        return round(statistics.median(t[part] for t in times) * 1e6, 1)

    def ratio(part: int) -> float:
        pairs = zip(mine, peer, strict=True)
        return round(statistics.median(b[part] / a[part] for a, b in pairs), 2)

    return {
        "method": name,
        "peer": peer_name,
        "busy_threads": busy,
        "heap_mb": heap,
        "rounds": len(mine),
        "call_us": median(mine, 0),
        "peer_call_us": median(peer, 0),
        "call_ratio": ratio(0),
        "life_us": median(mine, 1),
        "peer_life_us": median(peer, 1),
        "life_ratio": ratio(1),
    }


def show(rows: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"CPython {sys.version.split()[0]}: medians in µs; ratio: peer to anyfork")
    for column in ("method", "peer", "heap MB", "busy", "call", "peer's", "ratio", "life",
                   "peer's", "ratio"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("method", "peer") else "right")
    for r in rows:
        table.add_row(
            str(r["method"]), str(r["peer"]), str(r["heap_mb"]), str(r["busy_threads"]),
            f"{r['call_us']:,.0f}", f"{r['peer_call_us']:,.0f}", f"{r['call_ratio']:.2f}",
            f"{r['life_us']:,.0f}", f"{r['peer_life_us']:,.0f}", f"{r['life_ratio']:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100, help="per pair (default 100)")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="busy Python threads")
    parser.add_argument("--heap", type=int, default=0, metavar="MB", help="touched heap")
    parser.add_argument("--json", action="store_true", help="print a JSON list, not a table")
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    heap = bytearray(options.heap << 20)
    heap[::4096] = b"\1" * len(heap[::4096])
    rows = []
    with busy(options.busy):
        todo = pairs()
        for n, (name, mine, peer_name, peer) in enumerate(todo, 1):
            print(f"[{n}/{len(todo)}] {name} and {peer_name}", file=sys.stderr, flush=True)
            results = measure(mine, peer, options.rounds)
            rows.append(
                row(name, results[0], peer_name, results[1], options.busy, options.heap)
            )
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
