"""Workers that die at random under load: each death is its own call's, and no other is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import talk_targets as targets
from talking import APIS, Api

import anyfork

DEATHS_AT_SCALE_1 = 10_000  # on all ways of waiting together
CALLS_PER_DEATH = 3
WORKERS = 3
CALLERS = 12
WAYS = (-signal.SIGKILL, -signal.SIGSEGV, 1)
KILLS_PER_CALL = 0.05  # from outside

pytestmark = pytest.mark.timeout(1200)

Calls = list[tuple[int, int, float]]


@pytest.fixture(params=[api.name for api in APIS])
def api(request: pytest.FixtureRequest) -> Api:
    return next(api for api in APIS if api.name == request.param)


def some_calls(count: int, seed: int) -> Calls:
    """A third of them deadly."""
    chance = random.Random(seed)
    calls = []
    for n in range(count):
        how = 0
        if chance.randrange(CALLS_PER_DEATH) == 0:
            how = chance.choice(WAYS)
            if how > 0:
                how = 1 + n % 200  # a status that tells which one it was
        calls.append((n, how, chance.random() * 0.0005))
    return calls


class Load:
    """Calls of a pool, and what came of them."""

    def __init__(self, api: Api, pool: Any, calls: Calls) -> None:
        self.api = api
        self.pool = pool
        self.calls = calls
        self.outcomes: dict[int, Any] = {}
        self.twice: list[int] = []
        self.killed: set[int] = set()
        self.over = False
        self._left = iter(calls)
        self._lock = threading.Lock()

    def answered(self, n: int, outcome: Any) -> None:
        if n in self.outcomes:
            self.twice.append(n)
        self.outcomes[n] = outcome

    async def call(self) -> None:
        """One of several that call."""
        while True:
            with self._lock:
                call = next(self._left, None)
            if call is None:
                return
            try:
                outcome = await self.pool.run(targets.risk, call)
            except anyfork.WorkerDied as exc:
                outcome = exc
            self.answered(call[0], outcome)

    async def map(self, ordered: bool) -> None:
        """All of them by one map; what is not in order tells by itself which one it is."""
        results = self.pool.map(
            targets.risk, self.calls, ordered=ordered, return_exceptions=True
        )
        n = 0
        deaths = []
        async for outcome in results:
            if ordered:
                self.answered(n, outcome)
            elif isinstance(outcome, anyfork.WorkerDied):
                deaths.append(outcome)
            else:
                self.answered(outcome[0], outcome)
            n += 1
        assert n == len(self.calls)
        left = [call[0] for call in self.calls if call[0] not in self.outcomes]
        for n, outcome in zip(left, deaths, strict=True):
            self.answered(n, outcome)

    async def kill(self) -> None:
        """From outside, whatever they are at."""
        chance = random.Random(len(self.calls))
        while not self.over:
            await self.api.sleep(chance.random() * 0.005)
            pids = [pid for pid in self.pool.pids() if pid not in self.killed]
            if not pids or len(self.killed) >= KILLS_PER_CALL * len(self.outcomes):
                continue
            pid = chance.choice(pids)
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                try:
                    if pid in self.pool.pids():  # not another one by that number
                        self.killed.add(pid)
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                finally:
                    os.close(pidfd)

    async def beside_kills(self, *parts: Callable[[], Awaitable[None]]) -> None:
        if self.api.name == "sync":
            await self._in_threads(*parts)
            return
        async with anyio.create_task_group() as killers:
            killers.start_soon(self.kill)
            async with anyio.create_task_group() as group:
                for part in parts:
                    group.start_soon(part)
            self.over = True

    async def _in_threads(self, *parts: Callable[[], Awaitable[None]]) -> None:
        failures: list[BaseException] = []

        def run(part: Any) -> None:
            try:
                self.api.run(part)
            except BaseException as exc:
                failures.append(exc)

        killer = threading.Thread(target=run, args=(self.kill,))
        threads = [threading.Thread(target=run, args=(part,)) for part in parts]
        for thread in (killer, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        self.over = True
        killer.join()
        if failures:
            raise failures[0]


def journal_of(path: Path) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {"begun": [], "done": []}
    for line in path.read_text().splitlines():
        what, n, pid = line.split()
        found[what].append((int(n), int(pid)))
    return found


def judge(load: Load, journal: dict[str, list[tuple[int, int]]], named: bool = True) -> None:
    """``named``: whose death it was is known without its pid."""
    assert load.twice == []
    assert len(load.outcomes) == len(load.calls)
    begun = dict(journal["begun"])
    assert max(Counter(n for n, _pid in journal["begun"]).values()) == 1, "begun twice"
    done = dict(journal["done"])
    deaths: Counter[int] = Counter()
    for n, how, _delay in load.calls:
        outcome = load.outcomes[n]
        if not isinstance(outcome, anyfork.WorkerDied):
            assert not how, (n, how, outcome)
            assert outcome == (n, done[n])
            continue
        assert not outcome.oom
        assert outcome.pid is not None
        deaths[outcome.pid] += 1
        if named and how and begun.get(n) == outcome.pid and outcome.pid not in load.killed:
            expected = -how if how < 0 else how
            got = outcome.returncode
            assert got is not None and abs(got) == expected and (got < 0) == (how < 0), outcome
        elif named:
            assert outcome.pid in load.killed, (n, how, str(outcome))
            assert outcome.returncode in (-signal.SIGKILL, how), str(outcome)
    assert max(deaths.values()) == 1, deaths.most_common(3)


def a_load(api: Api, pool: Any, scale: float, part: float) -> Load:
    deaths = max(20, int(part * scale * DEATHS_AT_SCALE_1 / len(APIS)))
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return Load(api, pool, some_calls(deaths * CALLS_PER_DEATH, seed))


@contextlib.contextmanager
def _by_template() -> Any:
    with anyfork.Template(standby=(0, 0)) as template:
        template.warm()
        yield template


@pytest.mark.parametrize("way", ["run", "map", "map-as-completed"])
def test_random_deaths(api: Api, way: str, scale: float, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    loads = []

    async def check(template: Any) -> None:
        async with api.open_pool(
            WORKERS,
            template=template,
            grace=10,
            initializer=targets.keep_journal,
            initargs=(str(path),),
        ) as pool:
            load = a_load(api, pool, scale, 0.6 if way == "run" else 0.2)
            loads.append(load)
            if way == "run":
                await load.beside_kills(*[load.call] * CALLERS)
            else:
                await load.beside_kills(lambda: load.map(way == "map"))
            statistics = pool.statistics()
            dead = sum(isinstance(o, anyfork.WorkerDied) for o in load.outcomes.values())
            assert statistics["died"] >= dead
            assert statistics["started"] >= WORKERS + dead - 1
            await load.api.sleep(0.05)  # who was killed last may not be dead yet
            with contextlib.suppress(anyfork.WorkerDied):
                await pool.run(targets.echo, "that one's")
            assert await pool.run(targets.echo, "whole") == "whole"
            assert statistics["workers"] <= WORKERS

    began = time.monotonic()
    with _by_template() as template:
        api.run(check, template)
    judge(loads[0], journal_of(path), named=way != "map-as-completed")
    deaths = sum(isinstance(o, anyfork.WorkerDied) for o in loads[0].outcomes.values())
    print(f"{deaths} deaths in {len(loads[0].calls)} calls, {time.monotonic() - began:.1f} s")
    assert deaths >= len(loads[0].calls) / CALLS_PER_DEATH / 2
