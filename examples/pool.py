"""A few workers at a time, from any interpreter; what fails is told with its traceback.

    python examples/pool.py 4 16

Counts the primes below so many millions, in as many workers at once as the first word
says. Each worker is a fork of this program, niced, with a limit on its CPU time; Ctrl-C
ends all of them.
"""

from __future__ import annotations

import resource
import select
import sys
from collections.abc import Iterator

import anyfork


def primes(begin: int, end: int) -> int:
    """How many there are from begin to end, by trial division."""
    return sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(max(begin, 2), end))


Share = tuple[int, int]


def in_workers(at_once: int, shares: list[Share]) -> Iterator[tuple[Share, int]]:
    """Each share and its result, in the order in which they are done."""
    running: dict[int, tuple[anyfork.Child, Share]] = {}
    waiting = list(reversed(shares))
    poll = select.poll()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                share = waiting.pop()
                child = anyfork.spawn(
                    primes, *share, method="fork", nice=5, name=f"primes {share[0]}",
                    rlimits={resource.RLIMIT_CPU: 60},
                )  # fmt: skip
                running[child.wake_fd] = child, share
                poll.register(child.wake_fd, select.POLLIN)
            for fd, _event in poll.poll():
                poll.unregister(fd)
                child, share = running.pop(fd)
                if child.is_alive():  # it reported, and has not ended yet
                    running[child.wake_fd] = child, share
                    poll.register(child.wake_fd, select.POLLIN)
                    continue
                with child:
                    yield share, child.result()
    finally:
        for child, _share in running.values():
            child.close()  # kills it


def main() -> None:
    at_once, shares = int(sys.argv[1]), int(sys.argv[2])
    size = 20_000 // shares
    total = 0
    all_shares = [(n * size, (n + 1) * size) for n in range(shares)]
    for (begin, end), found in in_workers(at_once, all_shares):
        total += found
        print(f"{begin:7} to {end:7}: {found}")
    print(f"{total} primes below {size * shares}")


if __name__ == "__main__":
    main()
