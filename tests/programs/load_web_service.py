"""examples/web_service.py under load while its workers are killed: every request is answered,
rightly or with the reason why not; and when it has stopped nothing of it is left.

    python tests/programs/load_web_service.py SECONDS
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy

SERVICE = Path(__file__).resolve().parents[2] / "examples" / "web_service.py"
MARK = f"ANYFORK_LOAD={uuid.uuid4()}"
CLIENTS = 12
ANSWER = 5.0  # seconds that a request may take: the service's own limit is longer
REASON = re.compile(r"worker \d+ was killed by SIGKILL")


def is_of_the_service(pid: str) -> bool:
    """Itself, its template, a standby, a worker, or a child of those."""
    try:
        return MARK.encode() in Path("/proc", pid, "environ").read_bytes()
    except OSError:  # it has just ended
        return False


def of_the_service() -> list[str]:
    return [entry for entry in os.listdir("/proc") if entry.isdigit() and is_of_the_service(entry)]


def fds_of(pid: int) -> Counter[str]:
    """Its descriptors, by kind."""
    kinds: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            kinds[os.readlink(f"/proc/{pid}/fd/{fd}").partition(":[")[0]] += 1
    return kinds


async def client(session: aiohttp.ClientSession, until: float, seed: int) -> Counter[int]:
    """Ask again and again, each time about another signal."""
    generator = random.Random(seed)
    answers: Counter[int] = Counter()
    while time.monotonic() < until:
        # Some fit into a message, others go by shared memory.
        n = generator.choice((1 << 9, 1 << 13, 1 << 17))
        peak = generator.randrange(1, n // 2)
        samples = numpy.cos(numpy.arange(n) * (2 * math.pi * peak / n))
        async with session.post("/spectrum", data=samples.tobytes()) as response:
            found = await response.json()
            answers[response.status] += 1
            if response.status == 200:
                assert found["peak"] == peak, (found, peak, n)
                assert math.isclose(found["energy"], n / 2, rel_tol=1e-6), (found, n)
            else:
                assert response.status == 503, (response.status, found)
                assert REASON.search(found["error"]), found
    return answers


async def killer(session: aiohttp.ClientSession, until: float) -> int:
    """Kill a worker every few milliseconds, at whatever it is, rather one that computes."""
    generator = random.Random(0)
    killed = 0
    while time.monotonic() < until:
        pids = [p for p in (await get(session, "/health"))["pids"] if is_of_the_service(str(p))]
        busy = [pid for pid in pids if is_running(pid)]
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(generator.choice(busy or pids), signal.SIGKILL)
                killed += 1
        await asyncio.sleep(generator.uniform(0, 0.03))
    return killed


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"
    return False


async def get(session: aiohttp.ClientSession, path: str) -> Any:
    async with session.get(path) as response:
        return await response.json()


async def load(pid: int, url: str, seconds: float) -> None:
    before = fds_of(pid)
    timeout = aiohttp.ClientTimeout(total=ANSWER)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(client(session, until, n)) for n in range(CLIENTS)]
            kills = group.create_task(killer(session, until))
        answers = sum((task.result() for task in clients), Counter())
        health = await get(session, "/health")
    assert health["workers"] == 4 and health["cancelled"] == 0, health
    # A worker that is killed while it has nothing to do fails no request.
    assert 0 < answers[503] <= health["died"] <= kills.result(), (answers, kills.result(), health)
    assert answers[200] > answers[503], answers
    after = await settled(pid, before)
    assert after == before, {"before": before, "after": after}
    print(json.dumps({"answers": answers, "kills": kills.result(), "health": health}))


async def settled(pid: int, before: Counter[str]) -> Counter[str]:
    """Its descriptors once connections are closed and standbys are there again."""
    deadline = time.monotonic() + 5
    while (now := fds_of(pid)) != before and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return now


async def main(seconds: float) -> None:
    name, _equals, value = MARK.partition("=")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SERVICE), "0",
        env={**os.environ, name: value}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        assert line.startswith("listening on"), line
        *_words, host, port = line.split()
        await load(process.pid, f"http://{host}:{port}", seconds)
        assert len(of_the_service()) >= 5
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
        assert (await process.stdout.read()).decode() == "stopped\n"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    deadline = time.monotonic() + 5
    while (left := of_the_service()) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert not left, f"left behind: {left}"


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
