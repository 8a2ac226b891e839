"""Timeouts, deadlines and idle workers by trio's fake clock: hours pass at once."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import talk_targets as targets
import trio
import trio.testing

import anyfork.trio

pytestmark = pytest.mark.timeout(60)

HOUR = 3600.0


def at_once(check: Callable[[trio.testing.MockClock], Awaitable[None]]) -> None:
    """With a clock that jumps whenever nothing is to be done for some real time, which is more
    than a worker takes to answer."""
    clock = trio.testing.MockClock(autojump_threshold=0.7)
    trio.run(check, clock, clock=clock)


def test_timeout_of_a_call() -> None:
    async def check(clock: trio.testing.MockClock) -> None:
        async with anyfork.trio.open_worker("fork", grace=HOUR) as worker:
            began, real = trio.current_time(), time.monotonic()
            with pytest.raises(TimeoutError):
                await worker.run(targets.sleep, 60, timeout=2 * HOUR)
            # The worker was asked, and left the call by itself: no grace has passed.
            assert trio.current_time() - began == 2 * HOUR
            assert time.monotonic() - real < 30
            assert await worker.run(targets.echo, 1) == 1

    at_once(check)


def test_grace_of_a_deaf_target(tmp_path: Any) -> None:
    async def check(clock: trio.testing.MockClock) -> None:
        async with anyfork.trio.open_worker("fork", grace=HOUR) as worker:
            began = trio.current_time()
            with pytest.raises(TimeoutError):
                await worker.run(targets.deaf, str(tmp_path / "deaf"), timeout=2 * HOUR)
            assert trio.current_time() - began == 3 * HOUR

    at_once(check)


def test_deadline_of_a_map() -> None:
    async def check(clock: trio.testing.MockClock) -> None:
        async with anyfork.trio.open_pool(2, method="fork", grace=HOUR) as pool:
            began = trio.current_time()
            with pytest.raises(TimeoutError, match="deadline"):
                async for _ in pool.map(targets.sleep, [60] * 4, deadline=5 * HOUR):
                    pass
            assert trio.current_time() - began == 5 * HOUR
            assert await pool.run(targets.echo, 1) == 1

    at_once(check)


def test_idle_workers_end() -> None:
    async def check(clock: trio.testing.MockClock) -> None:
        async with anyfork.trio.open_pool(min=1, max=3, method="fork", idle=8 * HOUR) as pool:
            assert len([n async for n in pool.map(targets.sleep, [0.3] * 3, chunks=1)]) == 3
            assert pool.statistics()["workers"] == 3
            await trio.sleep(7 * HOUR)
            assert pool.statistics()["workers"] == 3
            await trio.sleep(6 * HOUR)
            assert pool.statistics()["workers"] == 1
            assert await pool.run(targets.echo, 1) == 1

    at_once(check)
