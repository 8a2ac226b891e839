"""A child of supervise.toml: it counts, and writes that to a pipe."""

import itertools
import time

import anyfork


def count(path: str) -> None:
    with open(path, "w", buffering=1) as pipe:
        anyfork.notify_ready()
        for n in itertools.count():
            print(n, file=pipe)
            time.sleep(0.1)
