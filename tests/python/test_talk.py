"""Workers that talk: the whole API, by every method, on every loop and without one."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import talk_targets as targets
from talking import APIS, Api, stepping

import anyfork

pytestmark = pytest.mark.timeout(60)

# By one that keeps nothing ready: what it keeps would count as left behind.
_template: anyfork.Template | None = None


@pytest.fixture(scope="module", autouse=True)
def template() -> Iterator[None]:
    global _template
    with anyfork.Template(preload=["anyio", "trio"], standby=(0, 0)) as _template:
        _template.warm()
        for row in anyfork.methods():
            if row.available:  # the launch pad, and imports in this process
                with anyfork.spawn(os.getpid, method=row.name, **_by(row.name)) as child:
                    child.result(30)
        for api in APIS:
            api.run(_nothing, api)
        yield
    _template = None


async def _nothing(api: Api) -> None:
    async with api.open_worker("fork") as worker:
        await worker.run(targets.echo, 1)


def _by(method: str) -> dict[str, Any]:
    return {"template": _template} if method == "zygote" else {}


@pytest.fixture(params=[api.name for api in APIS])
def api(request: pytest.FixtureRequest) -> Api:
    return next(api for api in APIS if api.name == request.param)


def worker(api: Api, method: str, **options: Any) -> Any:
    return api.open_worker(method, **_by(method), **options)


def pool(api: Api, size: int | None = None, method: str = "zygote", **options: Any) -> Any:
    return api.open_pool(size, method=method, **_by(method), **options)


def has_process(method: str) -> bool:
    return method != "subint"


def can_be_asked(method: str) -> bool:
    """A signal reaches the target: it runs in a process's main interpreter."""
    return method not in ("subint", "subint_forkserver")


# ---- calls ------------------------------------------------------------------------------


def test_calls(api: Api, method: str) -> None:
    async def check() -> None:
        async with worker(api, method, loop=api.backend or "asyncio") as w:
            assert await w.run(targets.add, 1, 2) == 3
            assert (w.pid is not None) == has_process(method)
            if has_process(method):
                assert await w.run(targets.pid) == w.pid
            with pytest.raises(ValueError, match="no luck") as caught:
                await w.run(targets.fail, "no luck")
            assert "in fail" in caught.value.__notes__[-1]
            with pytest.raises(ExceptionGroup) as group:
                await w.run(targets.fail_in_a_group)
            assert [type(e) for e in group.value.exceptions] == [ValueError, ExceptionGroup]
            assert await w.run(functools.partial(targets.add, 1), 4) == 5
            assert await w.run("a".join, ["b", "c"]) == "bac"
            assert await w.run(targets.async_add, 2, 3) == (api.backend or "asyncio", 5)
            with pytest.raises(ValueError, match="async"):
                await w.run(targets.async_fail, "async")
            with pytest.raises(anyfork.CallCancelled):
                await w.run(targets.interrupt)
            assert await w.run(targets.echo, "still there") == "still there"
            statistics = w.statistics()
            assert (statistics["calls"], statistics["failed"]) == (9 + has_process(method), 4)

    api.run(check)


def test_by_value(api: Api, method: str) -> None:
    """Lambdas and closures go too, and come back."""
    base = 40

    async def check() -> None:
        async with worker(api, method) as w:
            assert await w.run(lambda x: x + base, 2) == 42
            made = await w.run(lambda: targets.echo)
            assert made is targets.echo

    api.run(check)


def test_what_cannot_be_sent(api: Api, method: str) -> None:
    async def check() -> None:
        async with worker(api, method) as w:
            with pytest.raises(TypeError, match="pickl"):
                await w.run(targets.echo, threading.Lock())
            with pytest.raises(Exception, match="pickle") as caught:
                await w.run(targets.unpicklable)
            assert any("cannot be sent" in note for note in caught.value.__notes__)
            assert await w.run(targets.echo, 1) == 1

    api.run(check)


def test_large(api: Api, method: str) -> None:
    data = os.urandom(3 << 20)

    async def check() -> None:
        async with worker(api, method) as w:
            for _ in range(3):
                assert await w.run(targets.echo, data) == data
            assert w.statistics()["shared_sent"] > 3 * len(data)

    api.run(check)


def test_buffers_are_views(api: Api, method: str) -> None:
    async def check() -> None:
        async with worker(api, method) as w:
            blob = targets.Blob(os.urandom(1 << 20))
            kind, readonly, size = await w.run(targets.look_at, blob)
            assert (kind, readonly, size) == ("memoryview", True, 1 << 20)
            first = await w.run(targets.echo, blob)
            second = await w.run(targets.echo, targets.Blob(b"x" * (1 << 20)))
            assert first.data == blob.data  # not overwritten by the second one
            assert memoryview(first.data).readonly
        assert second.data == b"x" * (1 << 20)  # outlives its worker

    api.run(check)


def test_arrays_are_views(api: Api) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(1 << 20)

    async def check() -> None:
        async with worker(api, "zygote") as w:
            assert await w.run(targets.total, array) == (array.sum(), False)
            parts = await w.run(targets.ones, 1 << 16)
            assert [int(part[0]) for part in parts] == [0, 1, 2]
            assert not parts[0].flags.writeable
            again = await w.run(targets.ones, 1 << 16)
            del again
        assert [int(part.sum()) for part in parts] == [0, 1 << 16, 2 << 16]  # still there

    api.run(check)


def test_descriptors(api: Api, method: str) -> None:
    async def check() -> None:
        async with worker(api, method) as w:
            r, wr = os.pipe()
            try:
                assert not await w.run(targets.write_descriptor, anyfork.Descriptor(wr), b"hello")
                assert os.read(r, 10) == b"hello"
            finally:
                os.close(r)
                os.close(wr)
            descriptor = await w.run(targets.open_pipe, b"from there")
            with open(descriptor.detach(), "rb") as file:
                assert file.read() == b"from there"

    api.run(check)


def test_progress_context_and_log(api: Api, method: str, caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with worker(api, method, log_level=logging.INFO) as w:
            seen: list[Any] = []
            assert await w.run(targets.progress, 3, on_progress=seen.append) == 3
            assert seen == [(0, 3), (1, 3), (2, 3)]
            token = targets.request_id.set("r1")
            try:
                assert await w.run(targets.carried, context=[targets.request_id]) == "r1"
            finally:
                targets.request_id.reset(token)
            with caplog.at_level(logging.DEBUG):
                await w.run(targets.log, "it")
            assert [r.getMessage() for r in caplog.records if r.name == "talk"] == ["said it"]

    api.run(check)


# ---- cancellation -------------------------------------------------------------------------


def test_timeout(api: Api, method: str) -> None:
    """A call that takes too long has gone; its worker stays where it can be asked."""

    async def check() -> None:
        async with worker(api, method, grace=5 if can_be_asked(method) else 0.05) as w:
            with pytest.raises(TimeoutError):
                await w.run(targets.sleep, 0.5 if method == "subint" else 60, timeout=0.05)
            if can_be_asked(method):
                assert await w.run(targets.echo, 1) == 1
            else:
                with pytest.raises(anyfork.WorkerDied):
                    await w.run(targets.echo, 1)
        if method == "subint":
            time.sleep(0.5)  # its thread

    api.run(check)


@pytest.mark.parametrize("what", ["sleep", "spin", "async_sleep"])
def test_cancel(api: Api, what: str) -> None:
    async def check() -> None:
        async with worker(api, "zygote", grace=10, loop=api.backend or "asyncio") as w:
            args = () if what == "spin" else (60,)
            for _ in range(3):
                began = time.monotonic()
                with contextlib.suppress(TimeoutError):
                    if api.name == "sync":
                        await w.run(getattr(targets, what), *args, timeout=0.02)
                    else:
                        run = functools.partial(w.run, getattr(targets, what), *args)
                        assert await api.within(0.02, run)
                assert time.monotonic() - began < 8
                assert await w.run(targets.echo, 1) == 1
            assert w.statistics()["cancelled"] == 3

    api.run(check)


@pytest.mark.parametrize("what", ["read", "program", "socket", "lock", "queue"])
def test_cancelled_in_a_system_call(api: Api, what: str) -> None:
    """It is asked, not killed: the same worker does the next call."""

    async def check() -> None:
        async with worker(api, "zygote", grace=20) as w:
            with pytest.raises(TimeoutError):
                await w.run(targets.block, what, timeout=0.2)
            assert await w.run(targets.pid) == w.pid

    api.run(check)


def test_cancelled_target_cleans_up(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "tidy"

    async def check() -> None:
        async with worker(api, "zygote", grace=10) as w:
            with pytest.raises(TimeoutError):
                await w.run(targets.tidy, str(path), timeout=0.1)
            assert path.read_text() == "tidy"
            assert await w.run(targets.echo, 1) == 1

    api.run(check)


def test_deaf_target_is_killed(api: Api, method: str, tmp_path: Path) -> None:
    if not has_process(method):
        pytest.skip("subint: a thread of this process cannot be ended")
    path = tmp_path / "deaf"

    async def check() -> None:
        async with worker(api, method, grace=0.1) as w:
            with pytest.raises(TimeoutError):
                await w.run(targets.deaf, str(path), timeout=0.2)
            assert path.exists()
            assert not Path(f"/proc/{w.pid}").exists()
            with pytest.raises(anyfork.WorkerDied, match="SIGKILL"):
                await w.run(targets.echo, 1)

    api.run(check)


def _steps(api: Api) -> int:
    return 40


def test_cancelled_at_every_step(api: Api) -> None:
    """A pool's call, cancelled at its first suspension, its second, and so on: each time the
    pool is as good as before."""
    if api.name == "sync":
        pytest.skip("sync: its calls are not suspended")

    async def check() -> None:
        async with pool(api, 1, grace=5) as p:
            at = 0
            steps = 10**6
            while at < steps and at < 100:
                at += 1
                with anyio.CancelScope() as scope:
                    steps, _value = await stepping(p.run(targets.echo, at), at, scope.cancel)
                    assert _value == at
                if scope.cancelled_caught:
                    steps = 10**6
                assert await p.run(targets.echo, "whole") == "whole"
            assert at > 1
            statistics = p.statistics()
            assert (statistics["workers"], statistics["idle"]) == (1, 1)

    api.run(check)


def test_opening_cancelled_at_every_step(api: Api) -> None:
    if api.name == "sync":
        pytest.skip("sync: its calls are not suspended")

    async def opened() -> int:
        async with worker(api, "fork") as w:
            return int(await w.run(targets.add, 1, 1))

    async def check() -> None:
        for at in range(1, 30):
            with anyio.CancelScope() as scope:
                steps, value = await stepping(opened(), at, scope.cancel)
                assert value == 2
            if not scope.cancelled_caught and steps < at:
                break
        assert at > 2

    api.run(check)


# ---- deaths --------------------------------------------------------------------------------


def test_deaths_are_named(api: Api, method: str) -> None:
    if not has_process(method):
        pytest.skip("subint: it has no process that could die")

    async def check() -> None:
        for target, args, returncode in (
            (targets.die, (signal.SIGKILL,), -signal.SIGKILL),
            (targets.die, (signal.SIGTERM,), -signal.SIGTERM),
            (targets.leave, (3,), 3),
            (os._exit, (4,), 4),
        ):
            async with worker(api, method) as w:
                with pytest.raises(anyfork.WorkerDied) as caught:
                    await w.run(target, *args)
                assert caught.value.pid == w.pid
                assert caught.value.returncode == returncode
                with pytest.raises(anyfork.WorkerDied):
                    await w.run(targets.echo, 1)

    api.run(check)


def test_last_words(api: Api, capfd: pytest.CaptureFixture[str]) -> None:
    async def check() -> None:
        async with worker(api, "zygote") as w:
            with pytest.raises(anyfork.WorkerDied) as caught:
                await w.run(targets.say_and_die, "what a world")
            assert caught.value.stderr == "what a world\n"
            assert "what a world" in caught.value.__notes__[0]
        async with worker(api, "zygote") as w:
            with pytest.raises(anyfork.WorkerDied) as caught:
                await w.run(targets.crash)
            assert caught.value.returncode == -signal.SIGSEGV
            assert "in crash" in caught.value.stderr  # by faulthandler

    api.run(check)
    assert "what a world\n" in capfd.readouterr().err  # passed on


def test_child_that_holds_the_channel(api: Api, tmp_path: Path) -> None:
    """A worker's death is noticed though a process of its own has all its descriptors."""
    path = tmp_path / "pid"

    async def check() -> None:
        async with worker(api, "zygote") as w:
            with pytest.raises(anyfork.WorkerDied, match="SIGKILL"):
                await w.run(targets.with_child_that_holds, str(path))

    api.run(check)
    os.kill(int(path.read_text()), signal.SIGKILL)


def test_initializer(api: Api, method: str, tmp_path: Path) -> None:
    path = tmp_path / "mark"

    async def check() -> None:
        async with worker(api, method, initializer=targets.mark, initargs=(str(path),)) as w:
            assert path.exists()
            assert await w.run(targets.echo, 1) == 1
        with pytest.raises(ValueError, match="not today") as caught:
            async with worker(api, method, initializer=targets.fail, initargs=("not today",)):
                pass
        assert "in fail" in caught.value.__notes__[-1]

    api.run(check)


def test_heartbeat(api: Api) -> None:
    """Seen while a call runs: what computes, what holds the GIL, what waits, what stopped."""
    if api.name == "sync":
        pytest.skip("sync: its thread waits for the call; the loops' tests show it")

    async def check() -> None:
        for target, args, verdict in (
            (targets.spin, (), "running"),
            (targets.hold_gil, (), "in_c"),
            (targets.sleep, (60,), "waiting"),
        ):
            async with (
                worker(api, "zygote", heartbeat=0.02, grace=0) as w,
                anyio.create_task_group() as group,
            ):
                group.start_soon(functools.partial(w.run, target, *args))
                with anyio.fail_after(20):
                    while await w.heartbeat() != verdict:
                        pass
                os.kill(w.pid, signal.SIGSTOP)
                with anyio.fail_after(20):
                    while await w.heartbeat() != "stopped":
                        pass
                group.cancel_scope.cancel()

    api.run(check)


# ---- streams -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [targets.double, targets.async_double])
def test_stream_both_ways(api: Api, method: str, target: Any) -> None:
    async def check() -> None:
        async with worker(api, method, loop=api.backend or "asyncio") as w:
            async with w.open_stream(target, 7) as stream:
                for n in range(10):
                    await stream.send(n)
                assert [await stream.receive() for _ in range(10)] == [2 * n for n in range(10)]
                for n in range(40):
                    await stream.send(n)
                    assert await stream.receive() == 2 * n
                await stream.send_eof()
                assert [item async for item in stream] == []
                with pytest.raises(api.end_of_stream):
                    await stream.receive()
                with pytest.raises(api.closed):
                    await stream.send(1)
                assert await stream.result() == 7
            assert await w.run(targets.echo, 1) == 1

    api.run(check)


@pytest.mark.parametrize("target", [targets.count, targets.async_count])
def test_stream_left_early(api: Api, target: Any) -> None:
    """The block's end cancels an endless one; what it had sent ahead is dropped."""

    async def check() -> None:
        async with worker(api, "zygote", loop=api.backend or "asyncio", grace=10) as w:
            for _ in range(3):
                async with w.open_stream(target) as stream:
                    async for n in stream:
                        if n == 50:
                            break
                assert await w.run(targets.echo, 1) == 1

    api.run(check)


def test_stream_that_fails(api: Api) -> None:
    async def check() -> None:
        async with worker(api, "zygote") as w:
            seen = []
            with pytest.raises(ValueError, match="after its items"):
                async with w.open_stream(targets.send_and_fail, 3) as stream:
                    async for item in stream:
                        seen.append(item)
            assert seen == [0, 1, 2]
            with pytest.raises(ValueError, match="after its items"):
                async with w.open_stream(targets.send_and_fail, 40) as stream:
                    await stream.result()
            assert await w.run(targets.echo, 1) == 1
            with pytest.raises(anyfork.WorkerDied, match="SIGKILL"):
                async with w.open_stream(targets.send_and_die) as stream:
                    assert await stream.receive() == "last words"
                    await stream.receive()

    api.run(check)


def test_stream_that_nobody_reads(api: Api) -> None:
    """What its target raised is told at the end of the block."""

    async def check() -> None:
        async with worker(api, "zygote") as w:
            with pytest.raises(ValueError, match="unread"):
                async with w.open_stream(targets.fail_at_once, "unread"):
                    assert select.select([w._link.fd], [], [], 20)[0]
            assert await w.run(targets.echo, 1) == 1

    api.run(check)


def test_stream_of_large_items(api: Api) -> None:
    """Both sides have their sockets full meanwhile."""

    async def check() -> None:
        async with worker(api, "zygote") as w:
            async with w.open_stream(targets.sum_up) as stream:
                for n in range(100):
                    await stream.send(n)
                await stream.send_eof()
                assert await stream.result() == sum(range(100))
            async with w.open_stream(targets.large_items, 20, 30_000) as stream:
                for _ in range(16):
                    await stream.send(b"y" * 30_000)
                for _ in range(4):
                    await stream.receive()
                    await stream.send(b"y" * 30_000)
                assert len([item async for item in stream]) == 16

    api.run(check)


def test_stream_with_two_tasks(api: Api) -> None:
    if api.name == "sync":
        pytest.skip("sync: a stream is of one thread at a time")

    async def check() -> None:
        async with worker(api, "zygote") as w, w.open_stream(targets.double, 1) as stream:

            async def send() -> None:
                for n in range(500):
                    await stream.send(n)
                await stream.send_eof()

            async with anyio.create_task_group() as group:
                group.start_soon(send)
                assert [item async for item in stream] == [2 * n for n in range(500)]

    api.run(check)


# ---- pools ---------------------------------------------------------------------------------


def test_pool(api: Api) -> None:
    async def check() -> None:
        async with pool(api, 2) as p:
            assert await p.run(targets.add, 1, 2) == 3
            for chunks in (None, 1, 7):
                results = [r async for r in p.map(targets.echo, range(200), chunks=chunks)]
                assert results == list(range(200))
            results = [r async for r in p.map(targets.echo, range(200), ordered=False)]
            assert sorted(results) == list(range(200))
            assert [r async for r in p.map(targets.echo, [])] == []
            with pytest.raises(ValueError, match="seven"):
                async for _ in p.map(targets.fail_at_7, range(20), chunks=3):
                    pass
            results = [
                r
                async for r in p.map(targets.fail_at_7, range(20), chunks=3, return_exceptions=True)
            ]
            assert [type(r) for r in results if not isinstance(r, int)] == [ValueError]
            with pytest.raises(TimeoutError):
                async for _ in p.map(targets.sleep, [60] * 3, deadline=0.1):
                    pass
            assert await p.run(targets.echo, "whole") == "whole"
            statistics = p.statistics()
            assert (statistics["workers"], statistics["died"]) == (2, 0)

    api.run(check)


def test_pool_loses_only_the_calls_that_died(api: Api) -> None:
    async def check() -> None:
        async with pool(api, 2) as p:
            for chunks in (1, 16):
                results = [
                    r
                    async for r in p.map(
                        targets.die_at_7, range(60), chunks=chunks, return_exceptions=True
                    )
                ]
                for n, result in enumerate(results):
                    if n % 10 == 7:
                        assert isinstance(result, anyfork.WorkerDied)
                        assert result.returncode == -signal.SIGKILL
                    else:
                        assert result == n
            assert p.statistics()["died"] == 12
        async with pool(api, 5) as p:
            for pid in p.pids():  # while they have nothing to do: nobody notices
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
            assert await p.run(targets.echo, 1) == 1
        async with pool(api, 5) as p:
            for pid in p.pids():
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
            results = [r async for r in p.map(targets.echo, range(60), chunks=7)]
            assert results == list(range(60))

    api.run(check)


def test_pool_buries_what_died_unseen(api: Api, tmp_path: Path) -> None:
    """A worker that became ready and died while nobody looked is no worker of the pool."""
    path = tmp_path / "marks"
    initializer = {"initializer": targets.live_briefly_if_second, "initargs": (str(path),)}

    async def check() -> None:
        async with pool(api, 1, **initializer) as p:
            with pytest.raises(anyfork.WorkerDied):
                await p.run(targets.die)
            (second,) = p.pids()
            deadline = time.monotonic() + 20
            while second in p.pids() and not _is_zombie(second):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert await p.run(targets.echo, 1) == 1
            assert len(path.read_text().splitlines()) == 3
            statistics = p.statistics()
            assert (statistics["workers"], statistics["died"]) == (1, 2)
            assert (statistics["calls"], statistics["failed"]) == (2, 1)

    api.run(check)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:  # reaped, by its template
        return True


def test_pool_replaces_the_worn(api: Api) -> None:
    async def check() -> None:
        async with pool(api, 1, max_calls=2) as p:
            pids = [await p.run(targets.pid) for _ in range(5)]
            assert len(set(pids)) == 3
        async with pool(api, 1, max_rss=200 << 20) as p:
            first = await p.run(targets.pid)
            assert await p.run(targets.grow, 1) == first
            assert await p.run(targets.grow, 300 << 20) == first
            assert await p.run(targets.pid) != first

    api.run(check)


def test_pool_grows_and_shrinks(api: Api) -> None:
    async def check() -> None:
        async with pool(api, min=0, max=3, idle=0.2) as p:
            assert p.statistics()["workers"] == 0
            results = [r async for r in p.map(targets.sleep, [0.1] * 6, chunks=1)]
            assert len(results) == 6
            assert p.statistics()["workers"] == 3
            if api.name == "sync":  # with the next call
                time.sleep(0.3)
                await p.run(targets.echo, 1)
            else:
                await anyio.sleep(0.6)
            assert p.statistics()["workers"] <= 1

    api.run(check)


def test_pool_whose_workers_cannot_start(api: Api) -> None:
    async def check() -> None:
        with pytest.raises(ValueError, match="never"):
            async with pool(api, 2, initializer=targets.fail, initargs=("never",)):
                pass
        async with pool(api, min=0, max=2, initializer=targets.fail, initargs=("never",)) as p:
            for _ in range(3):
                with pytest.raises(ValueError, match="never"):
                    await p.run(targets.echo, 1)
            with pytest.raises(ValueError, match="never"):
                async for _ in p.map(targets.echo, range(3)):
                    pass

    api.run(check)


def test_pool_of_many_tasks(api: Api) -> None:
    """More calls than workers, some cancelled, some of them deadly."""
    if api.name == "sync":
        pytest.skip("sync: threads have a test of their own")

    async def check() -> None:
        outcomes: dict[str, int] = {"result": 0, "died": 0, "cancelled": 0}

        async def one(p: Any, n: int) -> None:
            if n % 10 == 3:
                with pytest.raises(anyfork.WorkerDied):
                    await p.run(targets.die)
                outcomes["died"] += 1
            elif n % 10 == 5:
                with anyio.move_on_after(0.01) as scope:
                    await p.run(targets.sleep, 60)
                assert scope.cancelled_caught
                outcomes["cancelled"] += 1
            else:
                assert await p.run(targets.echo, n) == n
                outcomes["result"] += 1

        async with pool(api, 3, grace=5) as p, anyio.create_task_group() as group:
            for n in range(100):
                group.start_soon(one, p, n)
        assert outcomes == {"result": 80, "died": 10, "cancelled": 10}

    api.run(check)


@pytest.mark.parametrize("what", ["worker", "pool"])
def test_block_that_ends_beside_calls(api: Api, method: str, what: str) -> None:
    """Its end cuts off the calls of other tasks and threads; none of them waits for ever."""
    seconds = 60 if has_process(method) else 0.5
    outcomes: list[BaseException | None] = []

    def opened() -> Any:
        return worker(api, method) if what == "worker" else pool(api, 2, method=method)

    async def call(run: Any) -> None:
        try:
            await run(targets.sleep, seconds)
        except Exception as exc:
            outcomes.append(exc)

    async def check() -> None:
        async with anyio.create_task_group() as group, opened() as w:
            for _ in range(4):
                group.start_soon(call, w.run)
            await anyio.sleep(0.1)

    async def check_threads() -> None:
        async with opened() as w:
            w_run.append(w.run)
            for thread in threads:
                thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()

    w_run: list[Any] = []
    threads = [threading.Thread(target=lambda: api.run(call, w_run[0])) for _ in range(4)]
    api.run(check_threads if api.name == "sync" else check)
    assert len(outcomes) == 4
    if not has_process(method):
        time.sleep(0.5)  # their threads


def test_pool_of_threads() -> None:
    failures: list[BaseException] = []

    def one(p: Any, n: int) -> None:
        try:
            for i in range(20):
                if (n, i) == (3, 10):
                    with pytest.raises(anyfork.WorkerDied):
                        p.run(targets.die)
                assert p.run(targets.add, n, i) == n + i
        except BaseException as exc:
            failures.append(exc)

    import anyfork.sync

    with anyfork.sync.open_pool(2, template=_template) as p:
        threads = [threading.Thread(target=one, args=(p, n)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_closed_pool(api: Api) -> None:
    async def check() -> None:
        async with pool(api, 1) as p:
            pass
        with pytest.raises(api.closed):
            await p.run(targets.echo, 1)
        with pytest.raises(api.closed):
            async for _ in p.map(targets.echo, [1]):
                pass

    api.run(check)


def test_map_of_an_async_iterable(api: Api) -> None:
    if api.name == "sync":
        pytest.skip("sync: it has no async iterables")

    async def numbers() -> Any:
        for n in range(20):
            await anyio.sleep(0)
            yield n

    async def check() -> None:
        async with pool(api, 2) as p:
            assert [r async for r in p.map(targets.echo, numbers())] == list(range(20))

    api.run(check)


def test_map_left_early(api: Api) -> None:
    async def check() -> None:
        async with pool(api, 2) as p:
            async for n in p.map(targets.echo, range(10**9)):
                if n == 100:
                    break
            assert await p.run(targets.echo, 1) == 1

    api.run(check)


def test_map_whose_chunks_are_cancelled(api: Api) -> None:
    """By the worker itself, or in their middle: those behind go elsewhere, or nowhere; the
    workers stay, and nobody waits for grace to pass."""

    async def check() -> None:
        async with pool(api, 2, grace=50) as p:
            pids = p.pids()
            results = [
                r
                async for r in p.map(
                    targets.interrupt_at_7, range(60), chunks=16, return_exceptions=True
                )
            ]
            for n, result in enumerate(results):
                assert isinstance(result, anyfork.CallCancelled) if n % 10 == 7 else result == n
            for _ in range(20):
                started = p.map(targets.sleep, [0.001] * 100, chunks=25)
                assert await anext(started) == 0.001
                await started.aclose()
            assert p.pids() == pids

    api.run(check)


# ---- misuse --------------------------------------------------------------------------------


def test_bad_arguments(api: Api) -> None:
    async def check() -> None:
        for options, error in (
            ({"size": 0}, ValueError),
            ({"size": "2"}, TypeError),
            ({"size": 2, "max": 3}, TypeError),
            ({"min": 3, "max": 2}, ValueError),
            ({"size": 1, "nice": "x"}, TypeError),
            ({"size": 1, "method": "nothing"}, ValueError),
            ({"size": 1, "what": 1}, TypeError),
        ):
            with pytest.raises(error):
                async with api.open_pool(**options):
                    pass
        async with worker(api, "fork") as w:
            with pytest.raises(TypeError, match="ContextVar"):
                await w.run(targets.echo, 1, context=["x"])
            assert await w.run(targets.echo, 1) == 1

    api.run(check)


def test_wrong_loop() -> None:
    import anyfork.asyncio
    import anyfork.trio

    async def open_(module: Any) -> None:
        async with module.open_worker("fork"):
            pass

    with pytest.raises(RuntimeError, match=r"anyfork\.trio"):
        anyio.run(open_, anyfork.asyncio, backend="trio")
    with pytest.raises(RuntimeError, match=r"anyfork\.asyncio"):
        anyio.run(open_, anyfork.trio, backend="asyncio")
    with pytest.raises(RuntimeError, match=r"anyfork\.sync"):
        open_(anyfork.trio).send(None)


def test_no_loop_was_asked_for() -> None:
    import anyfork.sync

    with anyfork.sync.open_worker("fork") as w, pytest.raises(TypeError, match="loop="):
        w.run(targets.async_add, 1, 2)


def test_nested(api: Api) -> None:
    async def check() -> None:
        async with worker(api, "zygote") as w:
            assert await w.run(targets.nested, 20) == list(range(20))

    api.run(check)


# ---- what a careless program does ---------------------------------------------------------


def test_progress_callback_that_raises(api: Api) -> None:
    """Its exception comes out of the call; the worker is as good as before."""

    def fail(_value: object) -> None:
        raise ZeroDivisionError("mine")

    async def check() -> None:
        async with worker(api, "zygote", grace=10) as w:
            for _ in range(3):
                with pytest.raises(ZeroDivisionError, match="mine"):
                    await w.run(targets.progress, 5, on_progress=fail)
                assert await w.run(targets.echo, 1) == 1

    api.run(check)


def test_late_progress_is_dropped(api: Api) -> None:
    async def check() -> None:
        async with worker(api, "zygote") as w:
            await w.run(targets.leave_a_thread, 0.3)
            seen: list[Any] = []
            await w.run(targets.sleep, 0.1, on_progress=seen.append)
            assert seen == []

    api.run(check)


def test_bad_timeouts(api: Api) -> None:
    async def check() -> None:
        async with worker(api, "fork") as w:
            for bad, error in (("1", TypeError), (-1, ValueError), (True, TypeError)):
                with pytest.raises(error, match="timeout"):
                    await w.run(targets.echo, 1, timeout=bad)
            with pytest.raises(TimeoutError):
                await w.run(targets.sleep, 60, timeout=0)
        with pytest.raises(ValueError, match="grace"):
            async with worker(api, "fork", grace=-1):
                pass

    api.run(check)


def test_pickling_that_exits(api: Api) -> None:
    """An argument or result that raises SystemExit fails its call, nothing else."""

    async def check() -> None:
        async with worker(api, "fork") as w:
            with pytest.raises(SystemExit):  # it has not left this program yet
                await w.run(targets.echo, targets.ExitsWhenDumped())
            with pytest.raises((anyfork.RemoteError, SystemExit)):
                await w.run(targets.make, "ExitsWhenDumped")
            with pytest.raises(pickle.UnpicklingError, match="SystemExit"):
                await w.run(targets.make, "ExitsWhenLoaded")
            assert await w.run(targets.echo, 1) == 1

    api.run(check)


def test_after_the_block(api: Api) -> None:
    async def check() -> None:
        async with worker(api, "fork") as w:
            pass
        with pytest.raises(api.closed):
            await w.run(targets.echo, 1)
        async with pool(api, 1) as p:
            results = p.map(targets.echo, range(10))
            assert await anext(aiter(results)) == 0
        with pytest.raises(api.closed):
            await p.run(targets.echo, 1)
        with pytest.raises((api.closed, StopAsyncIteration)):
            while True:
                await anext(aiter(results))
        with pytest.raises(api.closed):
            await anext(aiter(p.map(targets.echo, range(3))))

    began = time.monotonic()
    api.run(check)
    assert time.monotonic() - began < 8


def test_worker_used_inside_its_stream(api: Api) -> None:
    async def check() -> None:
        async with worker(api, "fork") as w, w.open_stream(targets.double, 1) as stream:
            with pytest.raises(RuntimeError, match="stream"):
                await w.run(targets.echo, 1)
            await stream.send(2)
            assert await stream.receive() == 4

    api.run(check)


@pytest.mark.parametrize("size", [1, 2])
def test_two_maps_at_once(api: Api, size: int) -> None:
    """Taken from in turn, with calls in between, by one task or thread."""

    async def check() -> None:
        async with pool(api, size) as p:
            first = p.map(targets.echo, range(50), chunks=5)
            second = p.map(targets.add_one, range(50), chunks=5)
            for n in range(50):
                assert await anext(first) == n
                assert await anext(second) == n + 1
                assert await p.run(targets.echo, n) == n

    api.run(check)


def test_maps_that_are_dropped(api: Api) -> None:
    """They let go of the workers, however they are left."""

    async def check() -> None:
        async with pool(api, 2, grace=10) as p:
            for _ in range(20):
                results = p.map(targets.echo, range(10**6))
                assert await anext(aiter(results)) == 0
                del results
            if api.name != "sync":
                with anyio.move_on_after(0.05):
                    async for _ in p.map(targets.sleep, [60] * 4):
                        pass
            with anyio.fail_after(20) if api.name != "sync" else contextlib.nullcontext():
                assert await p.run(targets.echo, 1) == 1
            gc.collect()
            kinds = ("_Mapping", "Results")
            alive = [o for o in gc.get_objects() if type(o).__name__ in kinds]
            for _ in range(100):  # their tasks end with the next turns of the loop
                if not alive or api.name == "sync":
                    break
                del alive
                await anyio.sleep(0.01)
                gc.collect()
                alive = [o for o in gc.get_objects() if type(o).__name__ in kinds]
            assert not alive

    api.run(check)


def test_iterable_that_exits(api: Api) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise SystemExit(5)

    async def check() -> None:
        async with pool(api, 1) as p:
            with pytest.raises(SystemExit):
                async for _ in p.map(targets.echo, numbers()):
                    pass
            assert await p.run(targets.echo, 1) == 1

    api.run(check)


def test_another_loop() -> None:
    import anyfork.asyncio

    kept: list[Any] = []

    async def open_() -> None:
        async with anyfork.asyncio.open_pool(1, template=_template) as p:
            kept.append(p)
            await anyio.to_thread.run_sync(run)

    def run() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            anyio.run(kept[0].run, targets.echo, 1)

    anyio.run(open_)


def test_signal_handler_that_calls() -> None:
    import anyfork.sync

    with anyfork.sync.open_worker("fork") as w:

        def handler(_number: int, _frame: object) -> None:
            with pytest.raises(RuntimeError, match="already"):
                w.run(targets.echo, 1)
            told.append(True)

        told: list[bool] = []
        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            w.run(targets.sleep, 0.3)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert told == [True]


def test_two_native_cancellations() -> None:
    """asyncio: the second one comes while the first is seen to."""
    import asyncio

    import anyfork.asyncio

    async def check() -> None:
        async with anyfork.asyncio.open_worker("zygote", template=_template, grace=10) as w:
            task = asyncio.ensure_future(w.run(targets.deaf, os.devnull))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(anyfork.WorkerDied, match="SIGKILL"):
                await w.run(targets.echo, 1)

    asyncio.run(check())
