"""open_supervisor() for trio and asyncio, written once on anyio."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import anyio
import anyio.lowlevel

from ._supervise import ChildInfo, Event, Runner, SupervisorSpec

# What a reader of events may be behind.
_KEPT_EVENTS = 4096
# Of a block that is cancelled, or raises: a child whose grace is longer is killed after it.
_CANCELLED_GRACE = 5.0


class Supervisor:
    """Children that are kept running, as :func:`open_supervisor` gives them.

    For the tasks of its event loop.
    """

    def __init__(self, spec: SupervisorSpec) -> None:
        self._changed = anyio.Event()
        self._history: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self._told = 0  # events so far
        self._all_ready = False
        self._done = False
        self._scope = anyio.CancelScope()
        self._runner = Runner(spec, self._tell)

    # ---- what is offered --------------------------------------------------------------------

    def children(self) -> list[ChildInfo]:
        """Each child as it is now, in their order."""
        return self._runner.children()

    def counters(self) -> dict[str, dict[str, int]]:
        """How many events of each kind there were, by child."""
        return self._runner.counters()

    def events(self) -> AsyncIterator[Event]:
        """What happened, from the beginning, and what happens; ends with the supervisor.

        A reader that is more than 4096 events behind gets one of kind "lost" in their place.
        """
        return _Events(self)

    async def wait_ready(self) -> None:
        """Until all children have been ready, or have ended for good."""
        await anyio.lowlevel.checkpoint()
        while not (self._all_ready or self._done):
            await self._changed.wait()

    def restart(self, name: str) -> None:
        """Have that child, and those that go with it by the strategy, stopped and started
        again. Does not wait for it. Raises KeyError."""
        self._runner.restart(name)
        self._runner.wake()

    def reload(self, spec: SupervisorSpec) -> None:
        """Take another spec: children that it does not have are stopped, new ones started, and
        those started again whose process would be another. Does not wait for it."""
        self._runner.reload(spec)
        self._runner.wake()

    async def stop(self) -> None:
        """Stop all, the last one first; return once they have ended."""
        self._runner.stop()
        self._runner.wake()
        await self.wait()

    async def wait(self) -> None:
        """Until all children have ended for good."""
        await anyio.lowlevel.checkpoint()
        while not self._done:
            await self._changed.wait()

    # ---- how it runs ---------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        self._history.append(event)
        self._told += 1
        self._all_ready = self._all_ready or event.kind == "all_ready"
        self._wake_readers()

    def _wake_readers(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _end(self, most: float | None) -> None:
        if not self._done:
            self._runner.stop(most)
            self._runner.wake()
        await self.wait()

    async def _run(self) -> None:
        """Until all have ended. Cancelled by nobody: it is told to stop instead."""
        runner = self._runner
        try:
            with anyio.CancelScope(shield=True):
                runner.begin()
                while not runner.finished:
                    with anyio.move_on_after(runner.timeout()):
                        await anyio.wait_readable(runner.fileno())
                    runner.handle()
        finally:
            self._done = True
            runner.close()
            self._wake_readers()
        if runner.failure() is not None:
            self._scope.cancel()


class _Events:
    """A reader; no generator, which its loop would want to be closed."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._seen = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        await anyio.lowlevel.checkpoint()
        of = self._supervisor
        while self._seen == of._told:
            if of._done:
                raise StopAsyncIteration
            await of._changed.wait()
        first = of._told - len(of._history)
        if self._seen < first:
            text = f"{first - self._seen} events are lost: they came faster than they were read"
            self._seen = first
            return Event(kind="lost", time=of._history[0].time, detail=text)
        self._seen += 1
        return of._history[self._seen - 1 - first]


@asynccontextmanager
async def open_supervisor(spec: SupervisorSpec) -> AsyncGenerator[Supervisor]:
    """Start children and keep them running while the block runs; then stop them, the last one
    first.

    When a restart would be one too many, all are stopped, the block is cancelled, and
    :class:`SupervisorFailed` is raised out of it. Where the block is cancelled or raises,
    no child has more than 5 seconds of grace. Whatever happens, nothing is left behind.
    """
    supervisor = Supervisor(spec)
    raised: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(supervisor._run)
            try:
                with supervisor._scope:
                    yield supervisor
            except BaseException as exc:
                raised = exc
            if raised is None:
                try:
                    await supervisor._end(None)
                except BaseException as exc:
                    raised = exc
            if raised is not None:
                with anyio.CancelScope(shield=True):
                    await supervisor._end(_CANCELLED_GRACE)
    except BaseExceptionGroup as exc:  # of our own task: KeyboardInterrupt, or a bug
        raise _only_one(exc) from None
    finally:
        supervisor._runner.close()
    failure = supervisor._runner.failure()
    if failure is not None and isinstance(raised, Exception):
        raise ExceptionGroup("supervised block", [failure, raised])
    if raised is not None:
        raise raised
    if failure is not None:
        raise failure


def _only_one(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    return exc
