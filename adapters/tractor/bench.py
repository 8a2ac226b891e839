#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Time actors of tractor on anyfork's methods against its default, interleaved.

usage: adapters/tractor/bench.py CHECKOUT [--python NAME] [--methods M...] [--rounds N]
                                 [--json FILE]

CHECKOUT is a clone of tractor, which is not changed; NAME one of tools/pythons. Each round
runs a fresh program per method, in random order, that times

  start    start_actor(): until the actor has connected; median of 20
  cascade  25 actors that raise at once, from the opening of their nursery until its group
           of errors has come

A ratio is the median of the rounds' own ratios to the default. Exit status: 0; 2 if
nothing could be run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # an actor imports this file too

from suite import DEFAULT, METHODS, python_path, run, venv_of

STARTS = 20
ACTORS = 25
RUN_SECONDS = 300
FIGURES = ("start", "cascade")


async def _raise() -> None:
    raise ValueError("for the benchmark")


def program(method: str) -> None:
    """One round of one method, in an environment with tractor: prints its figures."""
    import time

    import tractor
    import trio

    import anyfork_tractor

    anyfork_tractor.register()
    now = time.perf_counter

    async def main() -> dict[str, float]:
        starts = []
        async with tractor.open_root_actor(start_method=method, loglevel="critical"):
            async with tractor.open_nursery() as nursery:
                for i in range(STARTS):
                    begin = now()
                    portal = await nursery.start_actor(f"actor{i}")
                    starts.append(now() - begin)
                    await portal.cancel_actor()
            begin = now()
            errors = 0
            try:
                async with tractor.open_nursery() as nursery:
                    for i in range(ACTORS):
                        await nursery.run_in_actor(_raise, name=f"errorer{i}")
            except* tractor.RemoteActorError as group:
                errors = len(group.exceptions)
            cascade = now() - begin
            assert errors > 0, "no actor's error has come"
        return {"start": statistics.median(starts), "cascade": cascade}

    print(json.dumps(trio.run(main)))


def one(name: str, method: str, python: list[object]) -> dict[str, float] | None:
    done = run(
        name, *python, Path(__file__).resolve(), "--program", method,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        timeout=RUN_SECONDS,
    )  # fmt: skip
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        print(f"{name} {method}: exit {done.returncode}: {done.stderr[-2000:]}", file=sys.stderr)
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, nargs="?")
    parser.add_argument("--python", default="3.13")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--program", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program is not None:
        program(options.program)
        return 0
    if options.checkout is None or not (options.checkout / "tractor/spawn/_spawn.py").exists():
        parser.error(f"{options.checkout} is no checkout of tractor")
    checkout = options.checkout.resolve()
    python = [
        "env", python_path(options.python, checkout), "PYTHONWARNINGS=ignore",
        venv_of(options.python, checkout) / "bin/python",
    ]  # fmt: skip
    methods = [DEFAULT, *(m for m in options.methods if m != DEFAULT)]
    rounds: list[dict[str, dict[str, float]]] = []
    for n in range(options.rounds):
        figures = {}
        for method in random.sample(methods, len(methods)):
            found = one(options.python, method, python)
            if found is not None:
                figures[method] = found
                text = ", ".join(f"{key} {found[key] * 1e3:.1f} ms" for key in FIGURES)
                print(f"round {n + 1}: {method:24} {text}", file=sys.stderr, flush=True)
        rounds.append(figures)

    print(f"{'method':24}" + "".join(f" {key + ' ms':>12} {'faster':>7}" for key in FIGURES))
    rows = {}
    for method in methods:
        have = [r for r in rounds if method in r and DEFAULT in r]
        if not have:
            continue
        row = {}
        for key in FIGURES:
            row[f"{key}_ms"] = statistics.median(r[method][key] for r in have) * 1e3
            row[f"{key}_times_faster"] = statistics.median(
                r[DEFAULT][key] / r[method][key] for r in have
            )
        rows[method] = row
        print(
            f"{method:24}"
            + "".join(
                f" {row[f'{key}_ms']:12.1f} {row[f'{key}_times_faster']:6.1f}x" for key in FIGURES
            )
        )
    if options.json is not None and rows:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if rows else 2


if __name__ == "__main__":
    sys.exit(main())
