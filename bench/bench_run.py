"""A whole command by anyfork-run beside the same by python, interleaved.

usage: bench_run.py [--module NAME] [--rounds N] [--json]

command: from before the program is executed until it has been waited for. Times in ms,
medians; ratio: the median, over the rounds, of python's time to ours. `least`: of
/bin/true, what any command takes here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import anyfork

SETTLE_SECONDS = 0.03  # a template refills behind a start
WARM_UP = 5


def client() -> str:
    beside = Path(anyfork.__file__).resolve().parents[1] / "bin"
    for folder in (beside, Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        if (folder / "anyfork-run").exists():
            return str(folder / "anyfork-run")
    sys.exit("anyfork-run: not installed")


def command(argv: list[str]) -> float:
    """By posix_spawn(3), which takes less than subprocess."""
    time.sleep(SETTLE_SECONDS)
    begun = time.monotonic_ns()
    pid = os.posix_spawn(argv[0], argv, os.environ)
    _pid, status = os.waitpid(pid, 0)
    took = (time.monotonic_ns() - begun) / 1e6
    if status != 0:
        sys.exit(f"{argv}: wait status {status}")
    return took


def measure(ours: list[str], peer: list[str], rounds: int) -> dict[str, float]:
    timed: tuple[list[float], list[float], list[float]] = ([], [], [])
    commands = (ours, peer, ["/bin/true"])
    for n in range(rounds + WARM_UP):
        for which in random.sample((0, 1, 2), 3):
            took = command(commands[which])
            if n >= WARM_UP:
                timed[which].append(took)
    ratios = [b / a for a, b in zip(timed[0], timed[1], strict=True)]
    return {
        "command": round(statistics.median(timed[0]), 2),
        "peer_command": round(statistics.median(timed[1]), 2),
        "command_ratio": round(statistics.median(ratios), 1),
        "least": round(statistics.median(timed[2]), 2),
        "rounds": rounds,
    }


def all_rows(module: str, rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for code in (f"import {module}", "pass"):
        figures = measure([client(), "-c", code], [sys.executable, "-c", code], rounds)
        names = {"what": f"anyfork-run -c {code!r}", "against": f"python -c {code!r}"}
        rows.append({**names, **figures})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{row['what']}  /  {row['against']}")
        ratio = f"{row['command_ratio']:,}x"
        print(f"    {'command':12} {row['command']:>12,} {row['peer_command']:>14,} {ratio:>11}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", default="numpy", help="what is preloaded (default numpy)")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    serve = [sys.executable, "-m", "anyfork", "serve"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        subprocess.run(
            [*serve, "--detach", "--preload", options.module], check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            rows = all_rows(options.module, options.rounds)
        finally:
            subprocess.run([*serve, "--stop"], check=False)
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
