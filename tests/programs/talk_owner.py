"""usage: talk_owner.py API WHAT   (API: trio, asyncio or sync)

A program that has workers at something, for the tests to end it in some way. It and its
workers say what they are at, a line each, on standard output.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from typing import Any

from talking import APIS, Api


def tell(*words: object) -> None:
    os.write(1, " ".join(map(str, words)).encode() + b"\n")


def begin(_item: object = None) -> None:
    """What a worker does all the time."""
    tell("begun", os.getpid())
    time.sleep(1000)


def begin_stream(stream: Any) -> None:
    tell("begun", os.getpid())
    stream.send(1)
    for _ in stream:
        pass


# ---- what the owner is at -----------------------------------------------------------------


async def run(api: Api) -> None:
    async with api.open_worker(grace=10) as worker:
        await worker.run(begin)


async def pool_run(api: Api) -> None:
    async with api.open_pool(2, grace=10) as pool:
        await pool.run(begin)


async def pool_map(api: Api) -> None:
    async with api.open_pool(2, grace=10) as pool:
        async for _ in pool.map(begin, range(100), chunks=1):
            pass


async def stream(api: Api) -> None:
    async with api.open_worker(grace=10) as worker, worker.open_stream(begin_stream) as stream:
        async for _ in stream:
            pass


async def idle(api: Api) -> None:
    """Its workers wait for calls."""
    async with api.open_pool(2, grace=10) as pool:
        tell("begun", *pool.pids())
        await api.sleep(1000)


async def plain(api: Api) -> None:
    """No worker at all: how the loop's own traceback looks."""
    tell("begun")
    await api.sleep(1000)


async def leave(api: Api) -> None:
    """The program's end from within the blocks."""
    async with api.open_pool(2, grace=10) as pool, api.open_worker() as worker:
        tell("begun", worker.pid, *pool.pids())
        sys.exit(7)


async def leave_at_once(api: Api) -> None:
    async with api.open_pool(2) as pool:
        tell("begun", *pool.pids())
        os._exit(7)


async def dropped(api: Api) -> None:
    """Nobody closes these: the collector finds them, here and at the program's end. Not a pool
    on trio, whose tasks must not be left so."""
    manager: Any = api.open_worker()
    worker = await manager.__aenter__()
    tell("begun", worker.pid)
    worker.itself = worker
    del manager, worker
    gc.collect()
    if api.name == "trio":
        kept.append(api.open_worker())
        worker = await kept[0].__aenter__()
        tell("begun", worker.pid)
        return
    kept.append(api.open_pool(2))
    pool = await kept[0].__aenter__()
    tell("begun", *pool.pids())


kept: list[Any] = []

WHAT = (run, pool_run, pool_map, stream, idle, plain, leave, leave_at_once, dropped)


def main() -> None:
    name, what = sys.argv[1:]
    api = next(api for api in APIS if api.name == name)
    api.run(next(function for function in WHAT if function.__name__ == what), api)
    tell("ended")


if __name__ == "__main__":
    main()
