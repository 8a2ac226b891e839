"""A stream in both directions, on trio: readings go to a worker, what it finds comes back.

    python examples/stream.py 100000

The worker keeps a running mean of each sensor, and says when a reading is far off. Sending
waits while a window full of items has not been taken, so neither side runs away from the other.
"""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncIterator
from typing import Any

import trio

import anyfork.trio

Reading = tuple[str, float]


def watch(stream: Any, limit: float) -> dict[str, float]:
    """Send the readings that are off by more than that; return the means. In the worker."""
    means: dict[str, float] = {}
    for batch in stream:
        for sensor, value in batch:
            mean = means.setdefault(sensor, value)
            if abs(value - mean) > limit:
                stream.send((sensor, value, mean))
            else:
                means[sensor] = mean + (value - mean) / 100
    return means


async def readings(count: int) -> AsyncIterator[list[Reading]]:
    """Batches of them: an item costs some microseconds, whatever is in it."""
    noise = random.Random(1)
    for begin in range(0, count, 1000):
        batch = []
        for n in range(begin, min(begin + 1000, count)):
            value = 500.0 if n % 20_000 == 19_999 else noise.gauss(20, 1)
            batch.append((f"sensor {n % 3}", value))
        yield batch
        await trio.lowlevel.checkpoint()


async def send(stream: anyfork.trio.Stream, count: int) -> None:
    async for batch in readings(count):
        await stream.send(batch)
    await stream.send_eof()


async def main(count: int) -> None:
    async with (
        anyfork.trio.open_worker() as worker,
        worker.open_stream(watch, 50.0) as stream,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(send, stream, count)
        async for sensor, value, mean in stream:
            print(f"{sensor}: {value:.1f}, where {mean:.1f} was to be expected")
        for sensor, mean in sorted((await stream.result()).items()):
            print(f"{sensor}: {mean:.1f} in the mean")


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]))
