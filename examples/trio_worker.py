"""A trio program that starts a worker with a trio loop of its own, and can cancel it.

    python examples/trio_worker.py

The parent's loop never waits: a descriptor tells it of news of the worker.
"""

from __future__ import annotations

import subprocess

import trio

import anyfork


async def job(n: int) -> int:
    await trio.sleep(0.1)
    return n * n


def target(n: int) -> int:
    return trio.run(job, n)


async def call(n: int) -> int:
    """What job(n) returns, in a process of its own; cancelled, it is killed."""
    with anyfork.spawn(target, n, method="fork") as child:
        while child.is_alive():
            await trio.lowlevel.wait_readable(child.wake_fd)
        result: int = child.result(0)
        return result


async def main() -> None:
    print("7 * 7 =", await call(7))
    with trio.move_on_after(0.05) as scope:
        await call(8)
    print("cancelled" if scope.cancelled_caught else "too fast")
    with anyfork.spawn(argv=["uname", "-s"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        print("a program says", (await trio.to_thread.run_sync(child.stdout.read)).decode().strip())


if __name__ == "__main__":
    trio.run(main)
