"""Calls of workers beside their nearest peers, interleaved in one process.

usage: bench_talk.py [--rounds N] [--only TEXT] [--json] [--plot FILE]

Times in µs, medians over the rounds, of one call; ratio: the median, over the rounds, of the
peer's time to ours. Peers: concurrent.futures.ProcessPoolExecutor (forkserver, one worker) and
anyio.to_process. Bodies of 1 MiB and more are numpy arrays. `memcpy`: the same bytes copied once
to memory that is there already.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import anyio
import anyio.to_process
import numpy
import talk_targets as targets
from load import busy

import anyfork.anyio
import anyfork.sync

Timed = Callable[[], Awaitable[float]]  # µs of a call
now = time.monotonic_ns
SMALL = b"x" * 100


def calls(n: int, call: Callable[[], Any]) -> Timed:
    """The median of so many, one after the other."""

    async def timed() -> float:
        took = []
        for _ in range(n):
            begun = now()
            result = call()
            if isinstance(result, Awaitable):
                result = await result
            took.append(now() - begun)
            del result
        return statistics.median(took) / 1e3

    return timed


async def measure(name: str, rounds: int, ours: Timed, peers: dict[str, Timed]) -> dict[str, Any]:
    sides = {"anyfork": ours, **peers}
    took: dict[str, list[float]] = {side: [] for side in sides}
    for n in range(rounds + 1):
        for side in random.sample(list(sides), len(sides)):
            one = await sides[side]()
            if n:
                took[side].append(one)
    row: dict[str, Any] = {"name": name, "rounds": rounds}
    for side, times in took.items():
        row[side] = round(statistics.median(times), 1)
        if side != "anyfork":
            pairs = zip(times, took["anyfork"], strict=True)
            row[f"ratio {side}"] = round(statistics.median(b / a for b, a in pairs), 2)
    return row


@contextlib.contextmanager
def executor(n: int = 1) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(n, mp_context=context) as pool:
        list(pool.map(targets.echo, range(4 * n)))
        yield pool


async def small(rounds: int, loop: str, threads: int) -> list[dict[str, Any]]:
    n, of_peer = (200, 200) if not threads else (50, 3)
    load = busy(threads) if threads else contextlib.nullcontext()
    where = f", {threads} busy threads" if threads else ""
    async with anyfork.anyio.open_worker() as worker:
        with anyfork.sync.open_worker() as blocking, executor() as pool:
            peers = {"PPE": calls(of_peer, lambda: pool.submit(targets.echo, SMALL).result())}
            if not threads:
                peers[f"anyio/{loop}"] = calls(
                    n, lambda: anyio.to_process.run_sync(targets.echo, SMALL)
                )
            with load:
                return [
                    await measure(
                        f"100 B, blocking{where} ({loop} runs)",
                        rounds,
                        calls(n, lambda: blocking.run(targets.echo, SMALL)),
                        peers,
                    ),
                    await measure(
                        f"100 B on {loop}{where}",
                        rounds,
                        calls(n if not threads else 10, lambda: worker.run(targets.echo, SMALL)),
                        peers,
                    ),
                ]


async def large(rounds: int, loop: str) -> list[dict[str, Any]]:
    rows = []
    async with anyfork.anyio.open_worker() as worker:
        with executor() as pool:
            for label, size, n in (("1 MiB", 1 << 20, 20), ("100 MiB", 100 << 20, 1)):
                array = numpy.ones(size, dtype="u1")
                copy = numpy.ones(size, dtype="u1")
                rows.append(
                    await measure(
                        f"{label} both ways, {loop}",
                        rounds,
                        calls(n, lambda: worker.run(targets.echo, array)),  # noqa: B023
                        {
                            "PPE": calls(
                                n,
                                lambda: pool.submit(targets.echo, array).result(),  # noqa: B023
                            ),
                            f"anyio/{loop}": calls(
                                n,
                                lambda: anyio.to_process.run_sync(targets.echo, array),  # noqa: B023
                            ),
                        },
                    )
                )
                rows.append(
                    await measure(
                        f"{label} one way, {loop}",
                        rounds,
                        calls(n, lambda: worker.run(targets.size, array)),  # noqa: B023
                        {"memcpy": calls(n, lambda: numpy.copyto(copy, array))},  # noqa: B023
                    )
                )
    return rows


async def throughput(rounds: int, loop: str) -> list[dict[str, Any]]:
    """µs for each of many small calls by two workers."""
    n = 4000
    async with anyfork.anyio.open_pool(2) as pool:
        with anyfork.sync.open_pool(2) as blocking, executor(2) as peer:

            async def mapped() -> float:
                begun = now()
                results = [r async for r in pool.map(targets.echo, range(n))]
                assert results == list(range(n))
                return (now() - begun) / n / 1e3

            async def mapped_blocking() -> float:
                begun = now()
                assert list(blocking.map(targets.echo, range(n))) == list(range(n))
                return (now() - begun) / n / 1e3

            async def submitted() -> float:
                begun = now()
                futures = [peer.submit(targets.echo, i) for i in range(n)]
                assert [f.result() for f in futures] == list(range(n))
                return (now() - begun) / n / 1e3

            async def peer_mapped() -> float:
                begun = now()
                assert list(peer.map(targets.echo, range(n), chunksize=64)) == list(range(n))
                return (now() - begun) / n / 1e3

            peers = {"PPE": submitted, "PPE map, chunks of 64": peer_mapped}
            return [
                await measure(f"small calls, map on {loop}", rounds, mapped, peers),
                await measure("small calls, map blocking", rounds, mapped_blocking, peers),
            ]


async def cancelling(rounds: int, loop: str) -> list[dict[str, Any]]:
    """From the cancellation of a call that hears nothing to the next result."""
    async with anyfork.anyio.open_pool(1, grace=0) as pool:

        async def ours() -> float:
            await pool.run(targets.echo, 0)
            with anyio.move_on_after(0.02) as scope:
                await pool.run(targets.spin)
            begun = int(scope.deadline * 1e9)
            await pool.run(targets.echo, 0)
            return (now() - begun) / 1e3

        async def peer() -> float:
            context = multiprocessing.get_context("forkserver")
            first = ProcessPoolExecutor(1, mp_context=context)
            first.submit(targets.echo, 0).result()
            running = first.submit(targets.spin)
            time.sleep(0.02)
            begun = now()
            for process in list(first._processes.values()):
                os.kill(process.pid, signal.SIGKILL)
            running.exception()
            first.shutdown()
            with ProcessPoolExecutor(1, mp_context=context) as second:
                second.submit(targets.echo, 0).result()
                took = now() - begun
            return took / 1e3

        return [
            await measure(f"cancel to refilled, {loop}", rounds, ours, {"PPE": peer}),
        ]


def all_rows(rounds: int, only: str, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    parts: dict[str, Callable[[str], Any]] = {
        "small": lambda loop: small(rounds, loop, 0),
        "busy": lambda loop: small(max(3, rounds // 4), loop, 8),
        "large": lambda loop: large(max(5, rounds // 2), loop),
        "throughput": lambda loop: throughput(rounds, loop),
        "cancel": lambda loop: cancelling(rounds, loop),
    }
    for name, part in parts.items():
        for loop in ("trio", "asyncio"):
            if only in name:
                tell(f"{name}, {loop}")
                rows += anyio.run(part, loop, backend=loop)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        peers = [key.removeprefix("ratio ") for key in row if key.startswith("ratio ")]
        beside = "   ".join(f"{peer} {row[peer]:10.1f} = {row[f'ratio {peer}']}x" for peer in peers)
        print(f"{row['name']:50} {row['anyfork']:10.1f} µs   {beside}")


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row['name']}\nbeside {key.removeprefix('ratio ')}", row[key])
        for row in rows
        for key in row
        if key.startswith("ratio ")
    ]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(bars) + 1))
    axes.barh([name for name, _ratio in bars], [ratio for _name, ratio in bars])
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("times faster than the peer")
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("usage:")[0].strip(),
        epilog=__doc__.split("\n\n", 2)[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="small, busy, large, throughput or cancel")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} is not positive")
    warnings.simplefilter("ignore")
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    rows = all_rows(args.rounds, args.only, lambda what: print(what, file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows)
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
