# SPDX-License-Identifier: AGPL-3.0-or-later
"""The backend, beside tractor's own suite: start, boot death, cancel, orphans, options."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import tractor
import trio

import anyfork
import anyfork_tractor

anyfork_tractor.register()

IN_MAIN = ("fork", "subint_fork", "main_thread_forkserver")
STARTED = (*IN_MAIN, "exec")
SECONDS = 60


def run(main: partial) -> object:  # type: ignore[type-arg]
    async def bounded() -> object:
        with trio.fail_after(SECONDS):
            return await main()

    return trio.run(bounded)


def failure_of(main: partial) -> BaseException:  # type: ignore[type-arg]
    """What it raises, out of the groups that nurseries put it in."""
    with pytest.raises(BaseException) as caught:
        run(main)
    found = caught.value
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def nursery(method: str, port: int):  # type: ignore[no-untyped-def]
    return tractor.open_nursery(start_method=method, registry_addrs=[("127.0.0.1", port)])


@pytest.fixture
def port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(autouse=True)
def nothing_is_left():  # type: ignore[no-untyped-def]
    # What the first actor of all opens for good: the debugger's, the launch pad's.
    before = len(os.listdir("/proc/self/fd"))
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


async def who() -> tuple[int, int, str]:
    return os.getpid(), os.getppid(), str(signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize("method", STARTED)
def test_an_actor_answers(method: str, port: int) -> None:
    async def main() -> None:
        async with nursery(method, port) as an:
            portals = [
                await an.start_actor(f"kid{n}", enable_modules=[__name__]) for n in range(3)
            ]
            pids = {(await portal.run(who))[0] for portal in portals}
            assert len(pids) == 3 and os.getpid() not in pids
            await an.cancel()

    run(main)


async def start_another(method: str, depth: int) -> int:
    """Below this actor, by the method that is inherited."""
    from tractor.spawn import _spawn

    assert _spawn._spawn_method == method
    async with tractor.open_nursery() as an:
        portal = await an.start_actor(f"below{depth}", enable_modules=[__name__])
        n = 1
        if depth:
            n += await portal.run(start_another, method=method, depth=depth - 1)
        await portal.cancel_actor()
        return n


async def unraisable() -> list[str]:
    """What the garbage collector has to say of the parent's objects."""
    seen: list[str] = []
    sys.unraisablehook = lambda raised: seen.append(repr(raised.exc_value))
    gc.collect()
    return seen


@pytest.mark.parametrize("method", IN_MAIN)
def test_the_parents_async_generators(method: str, port: int) -> None:
    """Their finalizers belong to the parent's loop, whose socket is not the child's."""

    async def numbers():  # type: ignore[no-untyped-def]
        yield 1

    async def main() -> list[str]:
        async with nursery(method, port) as an:
            begun = numbers()
            await begun.__anext__()
            cycle = [begun]
            cycle.append(cycle)  # type: ignore[arg-type]
            gc.disable()  # garbage that the child is the first to find
            try:
                del begun, cycle
                portal = await an.start_actor("kid", enable_modules=[__name__])
            finally:
                gc.enable()
            found = await portal.run(unraisable)
            await an.cancel()
            return found

    assert run(partial(main)) == []


@pytest.mark.parametrize("method", STARTED)
def test_actors_of_actors(method: str, port: int) -> None:
    async def main() -> None:
        async with nursery(method, port) as an:
            portal = await an.start_actor("top", enable_modules=[__name__])
            assert await portal.run(start_another, method=method, depth=2) == 3
            await an.cancel()

    run(main)


def _boot_death() -> None:
    raise LookupError("this actor cannot boot")


@pytest.mark.parametrize("method", IN_MAIN)
def test_death_while_booting_is_an_error(method: str, port: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import tractor._child

    monkeypatch.setattr(tractor._child, "_actor_child_main", lambda **kw: _boot_death())

    async def main() -> None:
        async with nursery(method, port) as an:
            await an.start_actor("stillborn")

    found = failure_of(main)
    assert "before its actor had connected" in str(found), repr(found)
    assert isinstance(found.__cause__, LookupError), found.__cause__


@pytest.mark.parametrize("method", STARTED)
def test_cancelled_while_it_starts(method: str, port: int) -> None:
    async def main() -> None:
        for n in range(5):
            with trio.move_on_after(0.001 + 0.002 * n):
                async with nursery(method, port) as an:
                    await an.start_actor("early")
                    await trio.sleep_forever()

    run(main)


async def sleep_deaf() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        time.sleep(1)


@pytest.mark.parametrize("method", IN_MAIN)
def test_a_deaf_actor_is_killed(method: str, port: int) -> None:
    async def main() -> None:
        async with nursery(method, port) as an:
            portal = await an.start_actor("deaf", enable_modules=[__name__])
            async with trio.open_nursery() as tn:
                tn.start_soon(portal.run, sleep_deaf)
                await trio.sleep(0.2)
                tn.cancel_scope.cancel()
            await an.cancel()

    run(main)


@pytest.mark.parametrize("method", IN_MAIN)
def test_options_arrive(method: str, port: int) -> None:
    async def main() -> None:
        async with nursery(method, port) as an:
            portal = await an.start_actor(
                "nice", enable_modules=[__name__], proc_kwargs={"nice": 3, "umask": 0o127}
            )
            here = os.getpriority(os.PRIO_PROCESS, 0)
            assert await portal.run(priority_and_mask) == [min(here + 3, 19), 0o127]
            await an.cancel()

    run(main)


async def priority_and_mask() -> list[int]:
    return [os.getpriority(os.PRIO_PROCESS, 0), os.umask(0)]


@pytest.mark.parametrize("method", ["subint", "subint_forkserver"])
def test_no_actor_in_a_subinterpreter(method: str, port: int) -> None:
    async def main() -> None:
        async with nursery(method, port) as an:
            await an.start_actor("nowhere")

    found = failure_of(main)
    assert isinstance(found, anyfork.MethodUnavailable), repr(found)
    assert "msgspec" in str(found)


def test_registration() -> None:
    anyfork_tractor.register()
    with pytest.raises(ValueError, match="unknown spawn method"):
        anyfork_tractor.register({"mine": "nosuch"})
    from tractor.spawn import _spawn

    with pytest.raises(ValueError):
        _spawn.try_set_start_method("nosuch")


ORPHAN = """
import os, sys, signal, trio, tractor, anyfork_tractor
anyfork_tractor.register()
async def who():
    from trio._core._run import GLOBAL_RUN_CONTEXT
    handler = signal.getsignal(signal.SIGINT)
    cells = [c.cell_contents for c in getattr(handler, "__closure__", None) or ()]
    own = any(getattr(c, "__self__", None) is GLOBAL_RUN_CONTEXT.runner for c in cells)
    return os.getpid(), own
async def main():
    async with tractor.open_nursery(
        start_method=sys.argv[1], registry_addrs=[("127.0.0.1", int(sys.argv[2]))]
    ) as an:
        options = {"lifeline": False} if sys.argv[3] == "off" else {}
        portal = await an.start_actor("kid", enable_modules=[__name__], proc_kwargs=options)
        print(*await portal.run(who), flush=True)
        await trio.sleep_forever()
if __name__ == "__main__":
    trio.run(main)
"""


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("lifeline", ["on", "off"])
@pytest.mark.parametrize("method", IN_MAIN)
def test_an_orphan(method: str, lifeline: str, port: int, tmp_path: Path) -> None:
    """The kernel ends it; without a lifeline it still answers to a SIGINT of its own."""
    program = tmp_path / "orphan.py"
    program.write_text(textwrap.dedent(ORPHAN))
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(program), method, str(port), lifeline],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    pid, own = parent.stdout.readline().split()
    assert own == "True", "the handler of SIGINT is the parent's"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    if lifeline == "off":
        time.sleep(0.3)
        if not _is_gone(int(pid)):
            os.kill(int(pid), signal.SIGINT)
    while not _is_gone(int(pid)):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)
